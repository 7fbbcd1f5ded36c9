"""What an export holds for drafting: `tidar.json`, and the weights of `tidar.safetensors`.

Letters: K block size, E hidden size, V vocabulary, r rank and w width of the draft head.
"""

import json
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

VERSIONS = (1, 2)
"""Of `tidar.json`: those that this file reads."""
OFF: dict[str, Any] = {
    "draft_rank": 0, "draft_cell": "gru", "draft_width": None, "adapter_rank": 0,
    "adapter_targets": [], "own_mask_embedding": False, "causal_slots": False,
    "linear_drafts": False,
}  # fmt: skip
"""The key `drafting` of a model that has nothing of it."""
ROWS_AT_DOUBLE_COST = {"cpu": 32}
"""About how many queries double the time of a forward; on any other device 256."""


class Drafting:
    """What a folder says of drafting."""

    def __init__(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        options = {**OFF, **values.get("drafting", {})}
        self.mask_token_id: int = values["mask_token_id"]
        self.block_size: int = values["block_size"]
        self.causal_slots, self.linear = options["causal_slots"], options["linear_drafts"]
        self.slots = 2 * self.block_size - 1 if self.linear else self.block_size
        """Of a block."""
        self.blocks = (1,) if self.linear else tuple(range(1, self.block_size + 1))
        """All that a step may have."""
        self.mask_embedding = tensors.get("model.mask_embedding")
        self.adapters = _adapters(tensors)
        """A [rank, inputs] and B [outputs, rank], by the name of the projection in the decoder."""
        head = {name[11:]: t for name, t in tensors.items() if name.startswith("draft_head.")}
        self.head = Head(head, options["draft_cell"]) if options["draft_rank"] else None
        self._acceptance: dict[str, Any] = values.get("acceptance") or {}

    def choose(
        self, blocks: str | Sequence[int] | None, greedy: bool, device: str
    ) -> tuple[int, ...]:
        """The numbers of a step's blocks, in increasing order; see `generate`."""
        if blocks is None:
            blocks = self._by_acceptance(greedy, device)
        if isinstance(blocks, str):
            blocks = {"all": self.blocks, "none": ()}.get(blocks, blocks)
        if isinstance(blocks, str) or not set(blocks) <= set(self.blocks):
            known = list(self.blocks)
            raise ValueError(f'blocks: {blocks!r} is not "all", "none" or numbers of {known}')
        return tuple(sorted(set(blocks))) if self.block_size > 1 else ()

    def _by_acceptance(self, greedy: bool, device: str) -> str:
        """All blocks, or none where the head alone promises more tokens in the same time."""
        measured = self._acceptance.get("greedy" if greedy else "sampled") or {}
        if self.head is None or not measured.get("alone"):
            return "all"
        rows = ROWS_AT_DOUBLE_COST.get(device, 256)
        tokens = {name: 1 + sum(accumulate(measured[name], mul)) for name in ("block", "alone")}
        time = 1 + self.block_size / rows
        more = self.slots * len(self.blocks) / rows
        return "all" if tokens["block"] * time >= tokens["alone"] * (time + more) else "none"


def _adapters(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    adapters = {}
    for name, down in tensors.items():
        if name.endswith("_adapter.down.weight"):
            stem = name.removesuffix(".down.weight")
            module = stem.removeprefix("model.").removeprefix("base.").removesuffix("adapter")
            adapters[f"{module}proj"] = (down, tensors[f"{stem}.up.weight"])
    return adapters


class Head:
    """The sequential draft head: each place of a block knows the tokens drafted before it."""

    def __init__(self, weights: dict[str, Tensor], cell: str) -> None:
        if cell not in ("linear", "mlp", "gru"):
            raise ValueError(f"tidar.json: draft_cell {cell!r} is unknown")
        self.weights, self.cell = weights, cell
        self.no_slot = weights["no_slot"]
        """In place of a slot's hidden state in the cell, [E]."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def start(self, row: Tensor) -> tuple[Tensor | None, Tensor]:
        """Of the hidden state that drew d_0 [E]: the cell's first state [w], and what stands for
        slots under the LM head where there are none [E]."""
        row = unit(row)
        state = torch.tanh(self.linear("cell.start", row)) if self.cell == "gru" else None
        return state, self.linear("plain", row)

    def slot_parts(self, hidden: Tensor) -> Tensor:
        """What the cell adds up of slots [..., E]."""
        return self.linear("cell.slot", unit(hidden))

    def step(self, part: Tensor, token: Tensor, state: Tensor | None) -> tuple[Tensor, Any]:
        """What is added to a place's logits [V], and the next state [w].

        Args:
            part: of its slot, from `slot_parts`.
            token: embedding of the token before it, [E].
            state: the state before it; None but for a GRU.
        """
        part = part + self.linear("cell.token", unit(token))
        if self.cell == "mlp":
            part = self.linear("cell.down", F.silu(part))
        elif state is not None:
            reset_in, update_in, new_in = part.chunk(3)
            reset, update, new = self.linear("cell.state", state).chunk(3)
            candidate = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
            state = torch.lerp(candidate, state, torch.sigmoid(update_in + update))
            part = self.linear("cell.down", state)
        return self.linear("up", part), state


def unit(x: Tensor) -> Tensor:
    """`x` [..., E] with root mean square 1, computed in fp32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-12).to(x.dtype)


_LOADED: WeakKeyDictionary[Any, tuple[tuple[Any, ...], Drafting]] = WeakKeyDictionary()
"""Of each model, with the folder, type and device that it was read for."""


def load_drafting(model: Any, source: str, hub: dict[str, Any]) -> Drafting:
    """What `source`, a folder or an id on the hub, says of drafting; read once for a model.

    Args:
        model: for its type and devices.
        source: holds `tidar.json`.
        hub: arguments of `cached_file`.

    Raises:
        ValueError: when there is no `tidar.json`, or it cannot be read.
    """
    weight = model.get_output_embeddings().weight
    key = (source, model.get_input_embeddings().weight.dtype, weight.device)
    if model not in _LOADED or _LOADED[model][0] != key:
        values = _read_settings(source, hub)
        options = {**OFF, **values.get("drafting", {})}
        tensors: dict[str, Tensor] = {}
        if options["draft_rank"] or options["adapter_rank"] or options["own_mask_embedding"]:
            tensors = load_file(_path(source, "tidar.safetensors", hub), device=str(weight.device))
        tensors = {name: tensor.to(key[1]) for name, tensor in tensors.items()}
        _LOADED[model] = (key, Drafting(values, tensors))
    return _LOADED[model][1]


def _read_settings(source: str, hub: dict[str, Any]) -> dict[str, Any]:
    path = _path(source, "tidar.json", hub)
    with open(path, encoding="utf-8") as file:
        values: dict[str, Any] = json.load(file)
    version = values.get("format_version")
    if version not in VERSIONS:
        raise ValueError(
            f"{path}: format_version {version}, this custom_generate reads 1 to {VERSIONS[-1]}; "
            "take the one that was exported with it"
        )
    if unknown := sorted(values.get("drafting", {}).keys() - OFF.keys()):
        raise ValueError(f"{path}: drafting has the unknown key {unknown[0]}")
    if values.get("mask_token_id") is None:
        raise ValueError(f"{path}: the model has no mask token, so it cannot draft")
    return values


def _path(source: str, name: str, hub: dict[str, Any]) -> str:
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise ValueError(
            f"{source}: has no {name}; name the folder or hub id of an export with drafting=..."
        )
    return str(path)
