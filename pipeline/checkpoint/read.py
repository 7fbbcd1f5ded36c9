"""A training checkpoint as a source of weights, read by one process without a DeepSpeed engine.

What DeepSpeed writes: under ZeRO 0, 1 and 2 `mp_rank_00_model_states.pt` holds the whole module in
the training precision; under ZeRO 3 the module is empty, and the weights are the fp32 partitions in
every rank's `*_optim_states.pt`. Under ZeRO 1 and 2 such partitions exist too: in bf16 training
they are the fp32 master weights.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.tokenizers.load import load_tokenizer
from pipeline.checkpoint.files import verify_file_list
from pipeline.checkpoint.safe_load import load_checked
from pipeline.model.config import ModelConfig
from pipeline.model.source import NamedWeight, SavedModel
from tidar_common.errors import UserError
from tidar_common.files import read_text_checked

MODEL_FILE = "model.json"
STATE_FILE = "state.json"
LATEST = "latest"
WHOLE_MODULE = "mp_rank_00_model_states.pt"
PARTITIONS = "*_optim_states.pt"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint that `latest` names in `folder`, a run's `checkpoints`."""
    latest = folder / LATEST
    try:
        name = read_text_checked(latest).strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{latest}: cannot be read, so the run has no checkpoint yet") from error
    if not name or Path(name).name != name or not (folder / name).is_dir():
        raise UserError(f"{latest}: names {name!r}, which is not there; give another checkpoint")
    return folder / name


def open_checkpoint(folder: Path) -> SavedModel:
    """The checkpoint in `folder`, after all its files were found to be what was saved.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    verify_file_list(folder)
    config = ModelConfig.load(folder / MODEL_FILE)
    state = _read_state(folder)
    dtype = DTYPES[state["identity"]["precision"]]

    def weights(wanted: torch.dtype) -> Iterator[NamedWeight]:
        whole = folder / WHOLE_MODULE
        if not whole.is_file():
            return _read_stage3(folder)
        # Without ZeRO the masters are a list without names: the module's own weights are taken.
        partitions = sorted(folder.glob(PARTITIONS), key=_rank)
        if partitions and wanted == torch.float32 != dtype:
            return _read_masters(whole, partitions)
        return _read_module(whole)

    return SavedModel(
        folder=folder,
        config=config,
        dtype=dtype,
        weights=weights,
        tokenizer=lambda: load_tokenizer(folder),
        progress={"step": state["step"], "tokens": state["tokens"]},
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


def _read_masters(whole: Path, partitions: list[Path]) -> Iterator[NamedWeight]:
    """The fp32 weights under ZeRO 1 and 2, each put together from the ranks' slices of it.

    DeepSpeed's own converter does not know what ZeRO 1 writes in bf16, and joins whole groups of
    parameters in memory; the slice mappings beside the partitions serve both stages.
    """
    _import_deepspeed()  # unpickling needs its classes
    main = load_checked(whole, mmap=True)
    shapes = main["param_shapes"]
    ranks = [load_checked(path, mmap=True)["optimizer_state_dict"] for path in partitions]
    for group, parameters in enumerate(shapes):
        for name, shape in parameters.items():
            slices = []
            for rank in ranks:
                address = rank["param_slice_mappings"][group].get(name)
                if address is not None:
                    flat = rank["single_partition_of_fp32_groups"][group]
                    slices.append(flat.narrow(0, address.start, address.numel))
            if sum(len(part) for part in slices) != shape.numel():
                raise UserError(f"{whole.parent}: tensor {name} is incomplete in {PARTITIONS}")
            joined = partial(_join, slices, shape)
            yield NamedWeight(name, whole.parent, torch.Size(shape), joined)
    learning = {name for parameters in shapes for name in parameters}
    for name in unique_names(main["module"]):  # what does not learn has no masters
        if name not in learning:
            tensor = main["module"][name]
            yield NamedWeight(name, whole, tensor.shape, tensor.contiguous)


def unique_names(module: dict[str, Tensor]) -> list[str]:
    """The names of a saved module's tensors; a tied head stands under its first name alone."""
    names: dict[tuple[int, int], str] = {}
    for name, tensor in module.items():
        key = (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()))
        names.setdefault(key, name)
    return list(names.values())


def _join(slices: list[Tensor], shape: torch.Size) -> Tensor:
    return torch.cat(slices).view(shape)


def _rank(path: Path) -> int:
    found = re.search(r"pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0


def _read_stage3(folder: Path) -> Iterator[NamedWeight]:
    """The fp32 weights under ZeRO 3, put together tensor by tensor by DeepSpeed's converter."""
    _import_deepspeed()
    for path in sorted(folder.glob("*.pt")):
        load_checked(path, mmap=True)  # the converter unpickles whatever it finds there
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It reports on stdout, where text that a model writes must stand alone.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(
            str(folder.parent), tag=folder.name, lazy_mode=True
        )
    for name, tensor in state.items():
        yield NamedWeight(name, folder, torch.Size(tensor.shape), tensor.contiguous)


def _import_deepspeed() -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - after DS_ACCELERATOR: it looks for one when imported
