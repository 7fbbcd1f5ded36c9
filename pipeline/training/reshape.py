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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.model.safe_load import load_checked
from pipeline.training.discard import is_plain

WEIGHT = "weight"
"""The fp32 weights, beside Adam's own names of its moments."""
MOMENTS = ("exp_avg", "exp_avg_sq")
WHOLE_MODULE = "mp_rank_00_model_states.pt"
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
    shapes = {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    if shapes != state.shapes:
        name = next(n for n in [*shapes, *state.shapes] if shapes.get(n) != state.shapes.get(n))
        raise UserError(
            f"{folder}: tensor {name} has shape {_spelled(state.shapes.get(name))}, the model "
            f"{_spelled(shapes.get(name))}; start in a new run_dir, with init_from if shapes allow"
        )
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
        return _read_stage3(main, ranks)
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
    names = [name for group in _names_by_group(module) for name in group]
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    if len(names) != len(numbers):
        raise UserError(f"{folder}: {len(numbers)} optimizer states for {len(names)} parameters")
    states = dict(zip(names, (optimizer["state"][number] for number in numbers), strict=True))
    weights = dict(zip(names, masters, strict=True)) if masters else module

    def read(name: str, kind: str) -> Tensor:
        tensor = weights[name] if kind == WEIGHT else states[name][kind]
        return tensor.detach().reshape(-1).float()

    updates = float(next(iter(states.values()))["step"])
    return FullState({name: module[name].shape for name in names}, updates, read)


def _names_by_group(module: dict[str, Tensor]) -> list[list[str]]:
    """As `engine.parameter_groups` divides them: matrices, then the rest."""
    tied: set[tuple[int, int]] = set()
    unique = []
    for name, tensor in module.items():  # a tied head is a parameter once, under its first name
        key = (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()))
        if key not in tied:
            tied.add(key)
            unique.append(name)
    return [
        [name for name in unique if module[name].ndim >= 2],
        [name for name in unique if module[name].ndim < 2],
    ]


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

    return FullState(shapes, float(ranks[0]["base_optimizer_state"]["state"][0]["step"]), read)


def _read_stage3(main: dict[str, Any], ranks: list[dict[str, Any]]) -> FullState:
    """ZeRO 3: rank r holds the r-th of equal parts of every parameter, the last one padded."""
    shapes: dict[str, torch.Size] = {}
    offsets: dict[str, tuple[int, int]] = {}
    for group, parameters in enumerate(main["param_shapes"]):
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

    return FullState(shapes, float(ranks[0]["optimizer_state_dict"]["state"][0]["step"]), read)


# Setting.


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
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, parameter in parameters.items():
        for kind in (WEIGHT, *MOMENTS):
            whole = state.read(name, kind)
            part = -(-whole.numel() // size)
            padded = torch.nn.functional.pad(whole, (0, part * size - whole.numel()))
            own = padded.narrow(0, part * rank, part)
            key = None if kind == WEIGHT else kind
            zero.set_local_hp_param(own, parameter, key)
            if kind == WEIGHT:
                parameter.ds_tensor.data.copy_(own)
