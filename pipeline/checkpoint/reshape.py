"""A checkpoint of one topology into an engine of another.

DeepSpeed's files are partitioned for a number of processes and a ZeRO stage. What they hold does
not depend on either (`FullState`), so it is set here, tensor by tensor, in an engine of any stage.
DeepSpeed's own universal checkpoints do the same for ZeRO 1 to 3, by a conversion of the whole
checkpoint on disk beforehand, and not for stage 0. A process holds one tensor of one kind at a time
besides its own partition.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.read import MOMENTS, WEIGHT, FullState, read_full_state
from pipeline.model.parameters import full_shape
from tidar_common.errors import UserError


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


@torch.no_grad()
def _set_frozen(engine: Any, state: FullState) -> None:
    """The weights that do not learn; those that do are known to be there."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        whole = state.frozen[name].read().flatten()
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
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {
            id(copy): master
            for group, copies in pairs
            for copy, master in zip(group, copies, strict=True)
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
            for kind, values in kinds.items():
                part = state.read(name, kind).narrow(0, source.start, source.numel)
                values.narrow(0, target.start, target.numel).copy_(part)
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
            part = _own_part(state.read(name, kind))
            key = None if kind == WEIGHT else kind
            zero.set_local_hp_param(part, parameter, key)
            if kind == WEIGHT:
                parameter.ds_tensor.data.copy_(part)
