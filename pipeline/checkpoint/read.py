"""A training checkpoint read by one process without a DeepSpeed engine: as a model's weights, or as
the whole state of a run.

What DeepSpeed writes: under ZeRO 0, 1 and 2 `mp_rank_00_model_states.pt` holds the whole module in
the training precision; under ZeRO 3 the module is empty. The fp32 weights and Adam's two moments
are whole tensors without ZeRO, and else partitions in every rank's `*_optim_states.pt`, which are
put together here tensor by tensor: DeepSpeed's own converter does not know what ZeRO 1 writes in
bf16, and joins whole groups of parameters in memory. Files are mapped, not read whole.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.tokenizers.load import load_tokenizer
from pipeline.checkpoint.files import load_checked, verify_file_list
from pipeline.model.config import ModelConfig
from pipeline.model.draft_record import record_of_run
from pipeline.model.parameters import divide, is_drafting
from pipeline.model.source import NamedWeight, SavedModel
from tidar_common.errors import UserError
from tidar_common.files import read_text_checked

MODEL_FILE = "model.json"
STATE_FILE = "state.json"
WHOLE_MODULE = "mp_rank_00_model_states.pt"
MODEL_STATES = "*_model_states.pt"
PARTITIONS = "*_optim_states.pt"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHT = "weight"
"""The fp32 weights, beside Adam's own names of its moments."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def open_checkpoint(folder: Path, verify: bool = True) -> SavedModel:
    """The checkpoint in `folder`, after all its files were found to be what was saved; reading them
    for that takes minutes where they are large, and is left out without `verify`.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    if verify:
        verify_file_list(folder)
    config = ModelConfig.load(folder / MODEL_FILE)
    state = _read_state(folder)
    dtype = DTYPES[state["identity"]["precision"]]

    def weights(wanted: torch.dtype) -> Iterator[NamedWeight]:
        whole = folder / WHOLE_MODULE
        # Without ZeRO the masters are a list without names: the module's own weights are taken.
        partitioned = any(folder.glob(PARTITIONS)) and wanted == torch.float32 != dtype
        if partitioned or not whole.is_file():
            return read_full_state(folder).weights()
        return _read_module(whole)

    return SavedModel(
        folder=folder,
        config=config,
        dtype=dtype,
        weights=weights,
        tokenizer=lambda: load_tokenizer(folder),
        progress={"step": state["step"], "tokens": state["tokens"]},
        draft_record=record_of_run(folder.parent.parent, state["step"]),
    )


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    try:
        state = json.loads(read_text_checked(path))
        if state["identity"]["precision"] not in DTYPES:
            raise ValueError(f"precision {state['identity']['precision']!r} is unknown")
        return {"identity": state["identity"], "step": state["step"], "tokens": state["tokens"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the state of a training run ({error})") from error


def _read_module(path: Path) -> Iterator[NamedWeight]:
    # Mapped, not read: pages come in as tensors are copied.
    module = load_checked(path, mmap=True, tensors_only=True)["module"]
    for name, tensor in module.items():
        yield NamedWeight(name, path, tensor.shape, tensor.contiguous)


@dataclass(frozen=True)
class FullState:
    """The state of a checkpoint without its topology."""

    folder: Path
    shapes: dict[str, torch.Size]
    """Of each parameter that learns, by name."""
    updates: float
    """Updates that Adam has counted."""
    read: Callable[[str, str], Tensor]
    """`read(name, kind)`: the whole tensor in fp32, flat; kind is WEIGHT or one of MOMENTS."""
    frozen: dict[str, NamedWeight]
    """Weights that do not learn, in their own type; `shapes` does not have them."""

    def weights(self) -> Iterator[NamedWeight]:
        """All weights: in fp32 those that learn."""
        for name, shape in self.shapes.items():
            yield NamedWeight(name, self.folder, shape, partial(self._weight, name, shape))
        yield from self.frozen.values()

    def _weight(self, name: str, shape: torch.Size) -> Tensor:
        return self.read(name, WEIGHT).view(shape)


def read_full_state(folder: Path) -> FullState:
    """The state of the checkpoint in `folder`, whatever wrote it."""
    model_states = sorted(folder.glob(MODEL_STATES), key=_rank)
    partitions = sorted(folder.glob(PARTITIONS), key=_rank)
    if not model_states:
        raise UserError(f"{folder}: has no {MODEL_STATES}; use another checkpoint")
    main = load_checked(model_states[0], mmap=True)
    if not partitions:
        return _read_plain(folder, main)
    ranks = [load_checked(path, mmap=True)["optimizer_state_dict"] for path in partitions]
    if "fp32_flat_groups" in ranks[0]:
        models = [main, *(load_checked(path, mmap=True) for path in model_states[1:])]
        return _read_stage3(folder, models, ranks)
    return _read_slices(folder, main, ranks)


def _rank(path: Path) -> int:
    match = re.search(r"pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0


def _read_plain(folder: Path, main: dict[str, Any]) -> FullState:
    """Without ZeRO: whole tensors by number, in the order of the optimizer's parameter groups."""
    module, optimizer = main["module"], main["optimizer"]
    masters: list[Tensor] = []  # only beside bf16 weights
    if "fp32_groups" in optimizer:
        masters = [tensor for group in optimizer["fp32_groups"] for tensor in group]
        optimizer = optimizer["optimizer_state_dict"]
    unique = unique_names(module)
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    if len(numbers) < len(unique):  # a frozen base
        unique = [name for name in unique if is_drafting(name)]
    names = [n for group in divide([(n, module[n].shape) for n in unique]) for n in group]
    if len(names) != len(numbers):
        raise UserError(f"{folder}: {len(numbers)} optimizer states for {len(names)} parameters")
    states = dict(zip(names, (optimizer["state"][number] for number in numbers), strict=True))
    weights = dict(zip(names, masters, strict=True)) if masters else module

    def read(name: str, kind: str) -> Tensor:
        tensor = weights[name] if kind == WEIGHT else states[name][kind]
        return tensor.detach().reshape(-1).float()

    shapes = {name: module[name].shape for name in names}
    return FullState(folder, shapes, _updates(optimizer), read, _frozen_in(folder, module, shapes))


def _updates(optimizer: dict[str, Any]) -> float:
    return max((float(state["step"]) for state in optimizer["state"].values()), default=0.0)


def _frozen_in(
    folder: Path, module: dict[str, Tensor], learning: Collection[str]
) -> dict[str, NamedWeight]:
    return {
        name: NamedWeight(name, folder, module[name].shape, module[name].contiguous)
        for name in unique_names(module)
        if name not in learning
    }


def _read_slices(folder: Path, main: dict[str, Any], ranks: list[dict[str, Any]]) -> FullState:
    """ZeRO 1 and 2: each rank holds slices of some parameters."""
    shapes, group_of = {}, {}
    for group, parameters in enumerate(main["param_shapes"]):
        for name, shape in parameters.items():
            shapes[name], group_of[name] = torch.Size(shape), group

    def flat(rank: dict[str, Any], group: int, kind: str) -> Tensor:
        if kind == WEIGHT:
            return rank["single_partition_of_fp32_groups"][group]
        return rank["base_optimizer_state"]["state"][group][kind]

    def read(name: str, kind: str) -> Tensor:
        group, slices = group_of[name], []
        for rank in ranks:
            address = rank["param_slice_mappings"][group].get(name)
            if address is not None:
                part = flat(rank, group, kind)
                slices.append(part.narrow(0, address.start, address.numel))
        whole = torch.cat(slices) if slices else torch.empty(0)
        if len(whole) != shapes[name].numel():
            raise UserError(f"{folder}: tensor {name} is incomplete in {PARTITIONS}")
        return whole

    updates = _updates(ranks[0]["base_optimizer_state"])
    return FullState(folder, shapes, updates, read, _frozen_in(folder, main["module"], shapes))


def _read_stage3(
    folder: Path, models: list[dict[str, Any]], ranks: list[dict[str, Any]]
) -> FullState:
    """ZeRO 3: rank r holds the r-th of equal parts of every parameter, the last one padded."""
    shapes: dict[str, torch.Size] = {}
    offsets: dict[str, tuple[int, int]] = {}
    for group, parameters in enumerate(models[0]["param_shapes"]):
        offset = 0
        for name, shape in parameters.items():
            shapes[name] = torch.Size(shape)
            offsets[name] = (group, offset)
            offset += -(-shapes[name].numel() // len(ranks))

    def flat(rank: dict[str, Any], group: int, kind: str) -> Tensor:
        if kind == WEIGHT:
            return rank["fp32_flat_groups"][group]
        return rank["optimizer_state_dict"]["state"][group][kind]

    def read(name: str, kind: str) -> Tensor:
        group, offset = offsets[name]
        numel = shapes[name].numel()
        part = -(-numel // len(ranks))
        whole = torch.cat([flat(rank, group, kind).narrow(0, offset, part) for rank in ranks])
        return whole[:numel]

    def read_frozen(name: str, shape: torch.Size) -> Tensor:
        parts = [model["frozen_param_fragments"][name] for model in models]
        return torch.cat(parts)[: shape.numel()].view(shape)

    frozen = models[0].get("frozen_param_shapes") or {}
    return FullState(
        folder,
        shapes,
        _updates(ranks[0]["optimizer_state_dict"]),
        read,
        {n: NamedWeight(n, folder, s, partial(read_frozen, n, s)) for n, s in frozen.items()},
    )


def unique_names(module: dict[str, Tensor]) -> list[str]:
    """The names of a saved module's tensors; a tied head stands under its first name alone."""
    names: dict[tuple[int, int], str] = {}
    for name, tensor in module.items():
        key = (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()))
        names.setdefault(key, name)
    return list(names.values())
