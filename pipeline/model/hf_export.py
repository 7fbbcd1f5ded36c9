"""A model as a Hugging Face folder that other software loads, complete or not there at all, with
its card: what the model is, and how to decode with it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from data_prep.tokenizers.load import Tokenizer
from pipeline.model import custom_generate
from pipeline.model.config import DRAFTING_FIELDS, ModelConfig
from pipeline.model.draft_record import DraftRecord
from pipeline.model.hf_tokenizer import padding_id, save_tokenizer
from pipeline.model.hosted import save_hosted
from pipeline.model.huggingface import (
    CONFIG_FILE,
    DRAFTING_WEIGHTS_FILE,
    FORMAT_VERSION,
    TIDAR_FILE,
    config_to_huggingface,
    read_json,
)
from pipeline.model.parameters import is_drafting
from pipeline.model.source import HEAD, SavedModel
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError
from tidar_common.files import fsync_path

SHARD_BYTES = 5_000_000_000
GENERATION_CONFIG_FILE = "generation_config.json"
GENERATE_FOLDER = "custom_generate"
"""What transformers runs of a folder in place of its own `generate`."""
OLDEST_TRANSFORMERS = "5.17"
"""Whose interfaces that code was tested with."""


def write_export(
    model: Transformer,
    tokenizer: Tokenizer,
    source: SavedModel,
    output: Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    hub_id: str | None = None,
) -> str | None:
    """Write `model` to the folder `output`; returns a warning, or None when all is well.

    Args:
        model: its weights are written as they are, in their own type.
        tokenizer: the one the model was trained with.
        source: where the model came from, for the model card.
        output: created; may exist when empty, or when it is an export and `overwrite` is set.
        overwrite: replace an earlier export.
        shard_bytes: largest weight file; above it there are several, with an index.
        hub_id: under which id it will stand on the hub, for the model card.

    Raises:
        UserError: when `output` is in the way or cannot be written, or the model has a shape that
            no Hugging Face class has.
    """
    dtype = next(model.parameters()).dtype
    hosted = model.config.hosted is not None
    config = {} if hosted else config_to_huggingface(model.config, dtype)
    ids = {
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": padding_id(tokenizer),
    }
    tidar = tidar_settings(model, tokenizer, source)
    try:
        with folder_written_atomically(output, overwrite) as folder:
            if hosted:
                save_hosted(model, model.config, folder, shard_bytes)
                config = read_json(folder / CONFIG_FILE)
            _write_json(folder / CONFIG_FILE, {**config, **ids})
            _write_json(folder / GENERATION_CONFIG_FILE, {**ids, "do_sample": False})
            _write_json(folder / TIDAR_FILE, tidar)
            write_weights(model, folder, shard_bytes)
            if model.config.mask_token_id is not None:
                write_custom_generate(folder)
            warning = save_tokenizer(tokenizer, folder)
            name = hub_id or "path/to/this/folder"
            card = model_card(model.config, tidar, dtype, name, auto_tokenizer=warning is None)
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
    if model.config.hosted is not None:  # the base's are written by transformers
        state = {name: tensor for name, tensor in state.items() if is_drafting(name)}
    drafting = {name: state.pop(name).contiguous() for name in list(state) if is_drafting(name)}
    if drafting:
        save_file(drafting, folder / DRAFTING_WEIGHTS_FILE, metadata={"format": "pt"})
    if state:
        save_torch_state_dict(state, folder, max_shard_size=shard_bytes, metadata={"format": "pt"})
    mode = (folder / CONFIG_FILE).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # the library makes files that only their owner can read


def write_custom_generate(folder: Path) -> None:
    """The code that drafts in transformers, with what it needs."""
    target = folder / GENERATE_FOLDER
    target.mkdir()
    for source in Path(custom_generate.__file__).parent.glob("*.py"):
        if source.name != "__init__.py":
            shutil.copyfile(source, target / source.name)
    (target / "requirements.txt").write_text(f"transformers>={OLDEST_TRANSFORMERS}\n")


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
        for path in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
            fsync_path(path)
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


HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---
"""

DRAFTS = """
# TiDAR model

A decoder-only transformer trained with TiDAR ([arXiv 2511.08923](https://arxiv.org/abs/2511.08923)):
the same weights draft the next {block_size} tokens by one-step masked diffusion and verify them
autoregressively, in one forward. Greedy output is that of plain autoregressive decoding, token for
token; sampled output has its distribution.

{table}

## Decoding
"""

PLAIN = """
# Autoregressive model

A decoder-only transformer of the {family} family, trained to predict the next token.

{table}

## Decoding
"""

DRAFTING_TRANSFORMERS = """
Several tokens a forward, with transformers ({oldest} or newer) alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
stats = {{}}
ids = model.generate(**inputs, max_new_tokens=128, stats=stats,
                     custom_generate=folder, trust_remote_code=True)
print(tokenizer.decode(ids[0]), stats["tokens_per_forward"])
```

This runs `custom_generate/` of this folder. Without the last two arguments and `stats`, the same
text comes one token a forward, with no code but that of transformers.
"""

PLAIN_TRANSFORMERS = """
With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))
```
"""

TOKENIZER = """
Training documents were `[tokens, eos]` without a token in front: nothing is prepended to a prompt.
`AutoTokenizer` reads control symbols written out in a text (`</s>`) as symbols; in training they
were plain text, which `split_special_tokens=True` gives.
"""

SENTENCEPIECE_ONLY = """
transformers runs the model (`AutoModelForCausalLM`), but not its tokenizer: use `tokenizer.model`
with the package sentencepiece. Nothing is prepended to a prompt.
"""

PACKAGE = """
In batches, with CUDA graphs and as a command, with the package `tidar-pretrain`:
`tidar-generate checkpoint={name} prompt="Once upon a time"`.
"""

FORMAT = """
## For other decoders

`tidar.json` holds what a decoder needs beside `config.json`:

- `mask_token_id`: the token that stands in every position to be drafted;
- `block_size`: positions drafted at once in training, the default for decoding;
- `label_shift`: the logits of a clean row at position i are for position i + {clean}, those of a
  mask row at position i for position i + {mask};
- `drafting`: what the model has for drafting alone, with its weights in `tidar.safetensors`: a
  draft head, low-rank updates of mask rows' projections, an embedding of the mask rows' own;
- `tokenizer`: which of the files is the tokenizer of the training data.

Clean rows attend causally. A block of mask tokens attends to all clean rows before its first
position and to itself in both directions (with `causal_slots` up to each row itself); its position
ids are those of the tokens it drafts. `docs/decoding.md` of the package says all of it.
"""


def model_card(
    config: ModelConfig, tidar: dict[str, Any], dtype: torch.dtype, name: str, auto_tokenizer: bool
) -> str:
    """`README.md` of an export.

    Args:
        config: shape of the model.
        tidar: content of its `tidar.json`.
        dtype: of the weights.
        name: what a reader loads it by, a folder or an id on the hub.
        auto_tokenizer: whether transformers' AutoTokenizer can read the tokenizer.
    """
    drafts = config.mask_token_id is not None
    tags = [*(["tidar", "custom_generate"] if drafts else []), config.family]
    words: dict[str, Any] = {
        "tags": "\n".join(f"- {tag}" for tag in tags),
        "block_size": config.block_size,
        "family": config.family,
        "table": _table(config, tidar, dtype),
        "name": name,
        "oldest": OLDEST_TRANSFORMERS,
        **tidar["label_shift"],
    }
    parts = [HEADER, DRAFTS if drafts else PLAIN]
    if auto_tokenizer:
        parts += [DRAFTING_TRANSFORMERS if drafts else PLAIN_TRANSFORMERS, TOKENIZER]
    else:
        parts.append(SENTENCEPIECE_ONLY)
    if drafts:
        parts += [PACKAGE, FORMAT]
    return "".join(part.format(**words) for part in parts)


def _table(config: ModelConfig, tidar: dict[str, Any], dtype: torch.dtype) -> str:
    progress = tidar["training"] or {}
    rows: dict[str, Any] = {
        "Parameters": f"{config.num_parameters:,}",
        "Architecture": f"{config.family}, {config.num_layers} layers, width {config.hidden_size}",
        "Weights": str(dtype).removeprefix("torch."),
        "Longest sequence": f"{config.max_positions:,} tokens",
        "Vocabulary": f"{config.num_embeddings:,}",
    }
    if config.mask_token_id is not None:
        rows["Block size"] = config.block_size
        rows["Mask token id"] = config.mask_token_id
    record = DraftRecord.from_plain(tidar["acceptance"] or {})
    for how, measured in (("greedy", record.greedy), ("temperature 1", record.sampled)):
        if measured is not None:
            tokens = f"{measured.expected_tokens:.2f} on held-out text"
            rows[f"Tokens expected of a forward, {how}"] = tokens
    if progress:
        rows["Trained for"] = f"{progress['step']:,} steps, {progress['tokens']:,} tokens"
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )
