"""`tidar-export`: a checkpoint to a Hugging Face folder that other software loads."""

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from tidar_common.cli import run
from tidar_common.config import existing_path, parse
from tidar_common.schema import Command, register


@dataclass(frozen=True)
class ExportConfig:
    """The keys of `tidar-export`."""

    checkpoint: str
    """A training checkpoint (run_dir/checkpoints/step-...), a run_dir (its latest one), an earlier
    export or a Hugging Face folder."""
    output: str
    """The folder to write; it appears when it is complete."""
    dtype: str | None = None
    """bf16 or fp32. None keeps the type of training; fp32 of a bf16 checkpoint gives the master
    weights."""
    overwrite: bool = False
    """Replace an export that is already there. Folders that hold anything else are never
    touched."""
    push_to: str | None = None
    """Upload the folder to this id on the Hugging Face hub (owner/name), with the token of
    `hf auth login` or HF_TOKEN."""
    push_private: bool = True
    """Keep it private; false makes a new id public, and allows one that is."""


ABOUT = """\
tidar-export: write a checkpoint as a Hugging Face folder, with tidar.json beside it.

  tidar-export checkpoint=runs/first output=exports/first
  tidar-export checkpoint=runs/first/checkpoints/step-00000500 output=exports/at500 dtype=bf16
  tidar-export checkpoint=runs/first output=exports/first push_to=owner/name

transformers loads the folder as a plain autoregressive model; with its custom_generate, as with
tidar-generate and pipeline.load_model, several tokens come out of a forward.
"""
register(Command("export", ABOUT, ExportConfig))


def export(cfg: DictConfig) -> int:
    from pipeline.model.hf_export import check_output, write_export
    from pipeline.model.loading import as_dtype, open_model, read_model
    from tidar_common.hub import check_push, push

    checkpoint = existing_path(cfg, "checkpoint", "a checkpoint, a run_dir or a model folder")
    config = parse(ExportConfig, cfg, "")
    output = Path(config.output).expanduser()
    dtype = None if config.dtype is None else as_dtype(config.dtype)
    check_output(output, config.overwrite)
    if config.push_to is not None:
        check_push(config.push_to, "push_to")
    source = open_model(checkpoint)
    tokenizer = source.tokenizer()
    model = read_model(source, dtype=dtype, device="cpu")
    warning = write_export(
        model, tokenizer, source, output, overwrite=config.overwrite, hub_id=config.push_to
    )
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    stored = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(
        f"{output}: {model.config.num_parameters:,} parameters in {stored}, "
        f"{model.config.family} architecture, {tokenizer.kind} tokenizer"
    )
    if config.push_to is not None:
        print(push(output, config.push_to, "push_to", private=config.push_private))
    return 0


def main() -> None:
    sys.exit(run("export", export))


if __name__ == "__main__":
    main()
