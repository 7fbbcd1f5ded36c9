"""`tidar-export`: a checkpoint to a Hugging Face folder that other software loads."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.model.hf_export import check_output, write_export
from pipeline.model.loading import as_dtype, open_model, read_model
from tidar_common.cli import run
from tidar_common.config import existing_path, require


def export(cfg: DictConfig) -> int:
    checkpoint = existing_path(cfg, "checkpoint", "a checkpoint, a run_dir or a model folder")
    require(cfg, "output")
    output = Path(str(cfg.output)).expanduser()
    dtype = None if cfg.dtype is None else as_dtype(str(cfg.dtype))
    check_output(output, bool(cfg.overwrite))
    source = open_model(checkpoint)
    tokenizer = source.tokenizer()
    model = read_model(source, dtype=dtype, device="cpu")
    warning = write_export(model, tokenizer, source, output, overwrite=bool(cfg.overwrite))
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    stored = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(
        f"{output}: {model.config.num_parameters:,} parameters in {stored}, "
        f"{model.config.family} architecture, {tokenizer.kind} tokenizer"
    )
    return 0


def main() -> None:
    sys.exit(run("export", export))


if __name__ == "__main__":
    main()
