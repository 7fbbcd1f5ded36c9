"""What a checkpoint folder says of itself beside the weights: its step and its data."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tidar_common.errors import UserError
from tidar_common.files import read_text_checked


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
        latest = path / "checkpoints" / "latest"
        if latest.is_file():
            path = latest.parent / latest.read_text(encoding="utf-8").strip()
        state = _read(path / "state.json", json.loads)
        config = _read(path / "config.yaml", yaml.safe_load)
        data = config.get("data")
        return cls(state.get("step"), data if isinstance(data, dict) else {})


def _read(path: Path, parse: Any) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse(read_text_checked(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged ({error}); use another checkpoint") from error
    return content if isinstance(content, dict) else {}
