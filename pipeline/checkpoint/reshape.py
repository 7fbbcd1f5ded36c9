"""A checkpoint of one topology into an engine of another.

DeepSpeed's files are partitioned for a number of processes and a ZeRO stage. What they hold does
not depend on either: for each parameter its fp32 weights and Adam's two moments, and the number of
updates. Here these are put together tensor by tensor out of the partitions of any stage and set in
an engine of any stage. DeepSpeed's own universal checkpoints do the same for ZeRO 1 to 3, by a
conversion of the whole checkpoint on disk beforehand, and not for stage 0.

Files are mapped, not read whole: a process holds one tensor of one kind at a time besides its own
partition.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.read import unique_names
from pipeline.checkpoint.safe_load import load_checked
from pipeline.model.adapters import is_drafting
from pipeline.model.opening import full_shape
from pipeline.training.engine import divide, is_plain
from tidar_common.errors import UserError

WEIGHT = "weight"
"""The fp32 weights, beside Adam's own names of its moments."""
MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL_STATES = "*_model_states.pt"
PARTITIONS = "*_optim_states.pt"


@dataclass(frozen=True)
class FullState:
    """State without a topology."""

    shapes: dict[str, torch.Size]
    """By parameter name."""
    updates: float
    """Updates that Adam has counted."""
    read: Callable[[str, str], Tensor]
    """`read(name, kind)`: the whole tensor in fp32, flat; kind is WEIGHT or one of MOMENTS."""
    frozen: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Weights that do not learn, flat and in their own type; the others' maps do not have them."""


def load_reshaped(engine: Any, folder: Path) -> None:
    """Set weights and optimizer state of `engine` to those of the checkpoint in `folder`.

    Raises:
        UserError: when the checkpoint lacks a parameter, or has another shape for it.
    """
    state = read_full_state(folder)
    parameters = {
        name: parameter
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    shapes = {name: full_shape(p) for name, p in parameters.items()}
    if shapes != state.shapes:
        name = next(n for n in [*shapes, *state.shapes] if shapes.get(n) != state.shapes.get(n))
        raise UserError(
            f"{folder}: tensor {name} has shape {_spelled(state.shapes.get(name))}, the model "
            f"{_spelled(shapes.get(name))}; start in a new run_dir, with init_from if shapes allow"
        )
    _set_frozen(engine, state)
    if not engine.zero_optimization():
        _set_plain(engine, parameters, state)
    elif engine.zero_optimization_partition_weights():
        _set_stage3(engine, parameters, state)
    else:
        _set_partitioned(engine, parameters, state)


def _spelled(shape: torch.Size | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape))


# Reading.


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
        return _read_stage3([main, *(load_checked(p, mmap=True) for p in model_states[1:])], ranks)
    return _read_slices(folder, main, ranks)


def _rank(path: Path) -> int:
    found = re.search(r"pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0


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

    updates = float(next(iter(states.values()))["step"])
    shapes = {name: module[name].shape for name in names}
    return FullState(shapes, updates, read, _frozen_in(module, shapes))


def _frozen_in(
    module: dict[str, Tensor], learning: Collection[str]
) -> dict[str, Callable[[], Tensor]]:
    return {n: module[n].flatten for n in unique_names(module) if n not in learning}


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

    updates = float(ranks[0]["base_optimizer_state"]["state"][0]["step"])
    return FullState(shapes, updates, read, _frozen_in(main["module"], shapes))


def _read_stage3(models: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> FullState:
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

    def read_frozen(name: str, numel: int) -> Tensor:
        return torch.cat([model["frozen_param_fragments"][name] for model in models])[:numel]

    frozen = models[0].get("frozen_param_shapes") or {}
    return FullState(
        shapes,
        float(ranks[0]["optimizer_state_dict"]["state"][0]["step"]),
        read,
        {name: partial(read_frozen, name, shape.numel()) for name, shape in frozen.items()},
    )


# Setting.


@torch.no_grad()
def _set_frozen(engine: Any, state: FullState) -> None:
    """The weights that do not learn; those that do are known to be there."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        whole = state.frozen[name]()
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data.copy_(_own_part(whole))
        else:
            parameter.copy_(whole.view_as(parameter))


def _own_part(whole: Tensor) -> Tensor:
    """What ZeRO 3 gives this rank of a flat tensor: equal parts, the last one padded."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    part = -(-whole.numel() // size)
    padded = torch.nn.functional.pad(whole, (0, part * size - whole.numel()))
    return padded.narrow(0, part * rank, part)


def _empty_state(optimizer: Any, flat: Tensor, updates: float, step: Tensor | None) -> None:
    """Adam's state for one of its parameters, to be filled."""
    device = step.device if step is not None else torch.device("cpu")
    optimizer.state[flat] = {
        "step": torch.tensor(updates, dtype=torch.float32, device=device),
        **{moment: torch.zeros_like(flat) for moment in MOMENTS},
    }


def _step_device(optimizer: Any) -> Tensor | None:
    """A tensor on the device where this optimizer counts its updates; None for the host."""
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    return first if fused else None


@torch.no_grad()
def _set_plain(engine: Any, parameters: dict[str, Any], state: FullState) -> None:
    """Without ZeRO; in bf16 DeepSpeed keeps an fp32 copy of each parameter beside it."""
    optimizer, masters = engine.optimizer, {id(p): p for p in parameters.values()}
    if not is_plain(engine):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {
            id(own): master
            for group, copies in pairs
            for own, master in zip(group, copies, strict=True)
        }
        optimizer = optimizer.optimizer
    step = _step_device(optimizer)
    for name, parameter in parameters.items():
        master = masters[id(parameter)]
        _empty_state(optimizer, master, state.updates, step)
        for kind in (WEIGHT, *MOMENTS):
            target = master if kind == WEIGHT else optimizer.state[master][kind]
            target.copy_(state.read(name, kind).view_as(target))
        parameter.copy_(master)


@torch.no_grad()
def _set_partitioned(engine: Any, parameters: dict[str, Any], state: FullState) -> None:
    """ZeRO 1 and 2: flat fp32 partitions, whose slices DeepSpeed maps."""
    zero = engine.optimizer
    flats = getattr(zero, "single_partition_of_fp32_groups", None)
    if flats is None:
        flats = zero.fp32_groups_flat_partition
    step = _step_device(zero.optimizer)
    for flat in flats:
        _empty_state(zero.optimizer, flat, state.updates, step)
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is not None:  # else another rank holds all of it
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = flats[mapping.param_group_index]
            kinds = {WEIGHT: flat, **{m: zero.optimizer.state[flat][m] for m in MOMENTS}}
            for kind, own in kinds.items():
                part = state.read(name, kind).narrow(0, source.start, source.numel)
                own.narrow(0, target.start, target.numel).copy_(part)
        parameter.copy_(state.read(name, WEIGHT).view_as(parameter))
    # Views into the moments that DeepSpeed links at the first update, unless it has already.
    if getattr(zero, "_hp_optimizer_states_linked", False):
        zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def _set_stage3(engine: Any, parameters: dict[str, Any], state: FullState) -> None:
    zero = engine.optimizer
    zero._set_fp32_optimizer_param_groups()
    step = _step_device(zero.optimizer)
    zero._clear_fp32_optimizer_param_groups()
    for flat in zero.fp32_partitioned_groups_flat:
        _empty_state(zero.optimizer, flat, state.updates, step)
    for name, parameter in parameters.items():
        for kind in (WEIGHT, *MOMENTS):
            own = _own_part(state.read(name, kind))
            key = None if kind == WEIGHT else kind
            zero.set_local_hp_param(own, parameter, key)
            if kind == WEIGHT:
                parameter.ds_tensor.data.copy_(own)
