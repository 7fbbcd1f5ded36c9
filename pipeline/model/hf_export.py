"""A model as a Hugging Face folder that other software loads, complete or not there at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from data_prep.tokenizers.load import Tokenizer
from pipeline.model.card import model_card
from pipeline.model.config import DRAFTING_FIELDS
from pipeline.model.hf_tokenizer import padding_id, save_tokenizer
from pipeline.model.huggingface import (
    CONFIG_FILE,
    DRAFTING_WEIGHTS_FILE,
    FORMAT_VERSION,
    TIDAR_FILE,
    config_to_huggingface,
)
from pipeline.model.parameters import is_drafting
from pipeline.model.source import HEAD, SavedModel
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError
from tidar_common.files import fsync_path

SHARD_BYTES = 5_000_000_000
GENERATION_CONFIG_FILE = "generation_config.json"


def write_export(
    model: Transformer,
    tokenizer: Tokenizer,
    source: SavedModel,
    output: Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> str | None:
    """Write `model` to the folder `output`; returns a warning, or None when all is well.

    Args:
        model: its weights are written as they are, in their own type.
        tokenizer: the one the model was trained with.
        source: where the model came from, for the model card.
        output: created; may exist when empty, or when it is an export and `overwrite` is set.
        overwrite: replace an earlier export.
        shard_bytes: largest weight file; above it there are several, with an index.

    Raises:
        UserError: when `output` is in the way or cannot be written, or the model has a shape that
            no Hugging Face class has.
    """
    dtype = next(model.parameters()).dtype
    config = config_to_huggingface(model.config, dtype)
    ids = {
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": padding_id(tokenizer),
    }
    tidar = tidar_settings(model, tokenizer, source)
    try:
        with folder_written_atomically(output, overwrite) as folder:
            _write_json(folder / CONFIG_FILE, {**config, **ids})
            _write_json(folder / GENERATION_CONFIG_FILE, {**ids, "do_sample": False})
            _write_json(folder / TIDAR_FILE, tidar)
            write_weights(model, folder, shard_bytes)
            warning = save_tokenizer(tokenizer, folder)
            card = model_card(model.config, tidar, dtype, auto_tokenizer=warning is None)
            (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error})") from error
    return warning


def tidar_settings(model: Transformer, tokenizer: Tokenizer, source: SavedModel) -> dict[str, Any]:
    """Content of `tidar.json`: what a decoder must know beside the config."""
    return {
        "format_version": FORMAT_VERSION,
        "mask_token_id": model.config.mask_token_id,
        "block_size": model.config.block_size,
        # By how many positions the label of a row lies ahead of the row itself.
        "label_shift": {"clean": 1, "mask": 0},
        "drafting": {name: getattr(model.config, name) for name in DRAFTING_FIELDS},
        "tokenizer": {
            "kind": tokenizer.kind,
            "file": tokenizer.file_name,
            "eos_token_id": tokenizer.eos_id,
        },
        "training": source.progress,
        # By the last evals: with it blocks=auto needs no steps on trial.
        "acceptance": None if source.draft_record is None else source.draft_record.plain(),
    }


def write_weights(model: Transformer, folder: Path, shard_bytes: int) -> None:
    """Safetensors files under the names of Hugging Face; a tied head is written once. What only
    drafts goes into a file of its own, which other software does not look at."""
    state = dict(model.state_dict())
    if model.config.tie_embeddings:
        del state[HEAD]
    drafting = {name: state.pop(name).contiguous() for name in list(state) if is_drafting(name)}
    if drafting:
        save_file(drafting, folder / DRAFTING_WEIGHTS_FILE, metadata={"format": "pt"})
    save_torch_state_dict(state, folder, max_shard_size=shard_bytes, metadata={"format": "pt"})
    mode = (folder / CONFIG_FILE).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # the library makes files that only their owner can read


@contextmanager
def folder_written_atomically(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which gets the name `output` when the block ends well.

    Raises:
        UserError: when `output` is in the way. Only an earlier export is ever replaced.
    """
    check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.writing")
    replaced = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [p for p in temporary.rglob("*") if p.is_file()]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_path(temporary)
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(output, replaced)
        os.rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Whether an export may go to `output`; raises UserError with the remedy when it may not."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output: {output} is a file; give the name of a new folder")
    if not any(output.iterdir()):
        return
    if not (output / TIDAR_FILE).is_file():
        raise UserError(f"output: {output} holds other files; give the name of a new folder")
    if not overwrite:
        raise UserError(f"output: {output} holds an export; overwrite=true replaces it")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
