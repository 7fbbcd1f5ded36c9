"""`tidar-evaluate` put together: its settings, and the evals that were asked for."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from data_prep.formats.manifest import Manifest
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from pipeline.data.mix import open_mix
from pipeline.data.place import DataConfig, is_remote, open_place
from pipeline.data.source import LayoutChoice
from pipeline.distributed import World
from pipeline.evals.code.evaluate import code_rows, evaluate_code
from pipeline.evals.decode_speed import evaluate_decode_speed
from pipeline.evals.heldout import HeldOut
from pipeline.evals.likelihood import evaluate_likelihood
from pipeline.evals.settings import SCHEMAS, EvalData, Progress
from pipeline.evals.tasks import evaluate_tasks, task_rows
from pipeline.model.transformer import Transformer
from tidar_common.config import existing_path, parse
from tidar_common.errors import UserError
from tidar_common.files import read_text_checked, write_text_atomic
from tidar_common.run_files import METHOD_LABELS, newest_checkpoint
from tidar_common.tables import Table, percent, significant

WITHOUT_DATA = {"tasks", "code"}
"""Evals that bring text of their own."""
ROWS = {"tasks": task_rows, "code": code_rows}
"""How the results of these become columns of a table."""
LAID_OUT_ANEW = LayoutChoice(block_size=1, coverage=1.0)
"""Evals choose their own layouts: how the sets of a mix were laid out does not matter."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Origin:
    """Where a model comes from; None where its folder does not say, as in an export."""

    step: int | None
    """Optimizer steps it was trained for."""
    data: dict[str, Any]
    """The section `data` of its run's config; empty where the folder has no config."""

    @classmethod
    def of(cls, path: Path) -> "Origin":
        """Read `path`: a checkpoint, a run directory (its latest checkpoint), or any other model.

        Raises:
            UserError: when a file that is there cannot be read.
        """
        if (name := newest_checkpoint(path)) is not None:
            path = path / "checkpoints" / name
        state = _read_part(path / "state.json", json.loads)
        config = _read_part(path / "config.yaml", yaml.safe_load)
        data = config.get("data")
        return cls(state.get("step"), data if isinstance(data, dict) else {})


def _read_part(path: Path, parse: Any) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse(read_text_checked(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged ({error}); use another checkpoint") from error
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class EvaluateSettings:
    """The whole config of `tidar-evaluate`, checked."""

    checkpoint: Path
    origin: Origin
    evals: dict[str, Any]
    """Settings of each eval asked for, by name."""
    data_dir: Path | None
    """None where no eval needs data."""
    data: DataConfig
    """Where that is, and the sets of `data.mix`."""
    output: Path | None
    dtype: torch.dtype | None
    """None takes the checkpoint's own."""
    device: str | None
    """None takes a GPU where there is one."""

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "EvaluateSettings":
        """Check `cfg`; raises UserError naming the first key that is wrong and the remedy."""
        checkpoint = existing_path(cfg, "checkpoint", "a checkpoint, an export or a model folder")
        origin = Origin.of(checkpoint)
        if not cfg.get("evals"):
            raise UserError(f"evals: none given; choose from {', '.join(SCHEMAS)}")
        unknown = [name for name in map(str, cfg.evals) if name not in SCHEMAS]
        if unknown:
            raise UserError(f"evals.{unknown[0]}: unknown eval; known are {', '.join(SCHEMAS)}")
        evals: dict[str, Any] = {
            name: parse(schema, cfg.evals[name], f"evals.{name}")
            for name, schema in SCHEMAS.items()
            if name in cfg.evals
        }
        needs_data = set(evals) - WITHOUT_DATA
        data, data_dir = DataConfig(), None
        if needs_data:
            data, data_dir = _open_data(cfg, origin)
        if cfg.dtype is not None and str(cfg.dtype) not in DTYPES:
            raise UserError(f"dtype: unknown value {str(cfg.dtype)!r}; known are bf16 and fp32")
        if cfg.device not in (None, "cpu", "cuda"):
            raise UserError(f"device: unknown value {str(cfg.device)!r}; known are cpu and cuda")
        return cls(
            checkpoint=checkpoint,
            origin=origin,
            evals=evals,
            data_dir=data_dir,
            data=data,
            output=None if cfg.output is None else Path(str(cfg.output)).expanduser(),
            dtype=None if cfg.dtype is None else DTYPES[str(cfg.dtype)],
            device=cfg.device,
        )

    def device_of(self, world: World) -> torch.device:
        """The device this rank computes on."""
        if self.device == "cuda" and world.device.type != "cuda":
            raise UserError("device: cuda asked for, but torch sees no GPU; use device=cpu")
        return torch.device("cpu") if self.device == "cpu" else world.device


def run_evals(
    settings: EvaluateSettings,
    model: Transformer,
    tokenizer: Tokenizer,
    world: World,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run every eval on all ranks together; the content of the output file, equal on all."""
    heldout = None
    if settings.data_dir is not None:
        heldout = open_heldout(settings.data_dir, tokenizer, settings.data)
    results: dict[str, Any] = {}
    for name, config in settings.evals.items():
        say(f"running {name}")
        if name == "tasks":
            results[name] = evaluate_tasks(model, tokenizer, config, world)
            continue
        if name == "code":
            results[name] = evaluate_code(model, tokenizer, config, world)
            continue
        assert heldout is not None, "from_config asks for data"
        if name == "decode_speed":
            step = settings.origin.step
            for line in heldout.shortages(config):
                say(f"warning: {line}")
            progress = Progress(say, name)
            results[name] = evaluate_decode_speed(model, heldout, config, world, step, progress)
        else:
            results[name] = evaluate_likelihood(model, tokenizer, heldout, config, world)
    first = next(model.parameters())
    return {
        "checkpoint": str(settings.checkpoint),
        "step": settings.origin.step,
        "data_dir": None if settings.data_dir is None else str(settings.data_dir),
        "data_fingerprint": None if heldout is None else heldout.manifest.fingerprint(),
        "device": device_name(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "processes": world.size,
        "threads_per_process": torch.get_num_threads(),
        "torch": torch.__version__,
        **results,
    }


def open_heldout(data_dir: Path, tokenizer: Tokenizer, data: DataConfig | None = None) -> HeldOut:
    """The held-out split of `data_dir`, which must be in the model's own tokens, and those of the
    sets of `data.mix`.

    Raises:
        UserError: when the data was prepared with another tokenizer, or has no held-out split.
    """
    if load_tokenizer(data_dir).content() != tokenizer.content():
        raise UserError(
            f"data.dir: {data_dir} was prepared with another tokenizer than the checkpoint's; "
            "give the data that the model was trained on, or data prepared with its tokenizer"
        )
    manifest = Manifest.load(data_dir)
    mix = () if data is None else open_mix(data, manifest, LAID_OUT_ANEW)
    return HeldOut(data_dir, manifest, mix)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the output file, all or nothing."""
    try:
        write_text_atomic(path, json.dumps(results, indent=2, default=str) + "\n")
    except OSError as error:
        raise UserError(f"output: {path} cannot be written ({error}); give another") from error


def describe(results: dict[str, Any]) -> str:
    """The results for a reader, as text."""
    parts = []
    for name in SCHEMAS:
        if name in results:
            columns = ROWS[name](results[name]) if name in ROWS else results[name]
            columns = columns if isinstance(columns, list) else [columns]
            parts.append(f"{name}\n{measures_table(columns).text()}")
        if name == "decode_speed" and name in results:
            parts.append(comparison_table(results[name]).markdown())
    return "\n\n".join(parts)


def measures_table(columns: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each measure, one column for each thing measured; measures that are None in
    every column are left out, a list takes several lines."""
    flat = [dict(_flat(column)) for column in columns]
    names = dict.fromkeys(name for column in flat for name in column)
    rows = [
        [name, *(significant(column.get(name)) for column in flat)]
        for name in names
        if any(column.get(name) is not None for column in flat)
    ]
    return Table((), rows)


def _flat(column: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Draft positions of a block count from 1 (0 is the verifier's), its places from 0."""
    for name, value in column.items():
        if isinstance(value, list):
            first = 0 if name.endswith("_by_place") else 1
            yield from ((f"{name} {number}", entry) for number, entry in enumerate(value, first))
        elif isinstance(value, dict):
            yield from ((f"{name} {key}", entry) for key, entry in _flat(value))
        else:
            yield name, value


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each method and temperature of the rows of one decode-speed eval."""
    head = ("method", "T", "K", "tokens/forward", "tokens/s", "over AR", "conversion",
            "equal to AR")  # fmt: skip
    cells = []
    for row in rows:
        match, spread = row["exact_match_ar"], row["speedup_over_ar_range"]
        cells.append(
            [
                METHOD_LABELS[row["method"]],
                f"{row['temperature']:g}",
                str(row["block_size"]),
                f"{row['tokens_per_forward']:.2f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['speedup_over_ar']:.2f}× ({spread['min']:.2f} to {spread['max']:.2f})",
                percent(row["conversion"]),
                "–" if match is None else f"{percent(match)} of {row['prompts']}",
            ]
        )
    return Table(head, cells)


def device_name(device: torch.device) -> str:
    """The GPU's own name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _open_data(cfg: DictConfig, origin: Origin) -> tuple[DataConfig, Path]:
    """The data that the command line names, else that of the checkpoint's run; and its folder."""
    values = vars(parse(EvalData, cfg.data, "data"))
    given = {key: value for key, value in values.items() if value is not None}
    if "dir" in given:
        data = DataConfig(**given)
        return data, open_place(given["dir"], data, "data.dir")
    trained_on = {key: value for key, value in origin.data.items() if key in values}
    if trained_on.get("dir") is None:
        raise UserError(
            "data.dir: has no value, and the checkpoint does not name its data; set data.dir=... "
            "on the command line"
        )
    data = parse(DataConfig, OmegaConf.create(trained_on | given), "data")
    assert data.dir is not None, "looked at above"
    if not is_remote(data.dir) and not Path(data.dir).expanduser().exists():
        raise UserError(
            f"data.dir: {data.dir}, which the checkpoint names, does not exist here; set "
            "data.dir=... on the command line"
        )
    return data, open_place(data.dir, data, "data.dir")
