"""Watches that a base model keeps its autoregressive quality while it learns to draft."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.training.config import ArGuardConfig
from pipeline.training.moments import Guard, make_event
from tidar_common.files import write_text_atomic

BASE_FILE = "ar_base.json"
"""Under `evals`: the held-out AR loss of `init_from`, before the first step."""


def write_base(run_dir: Path, ar_loss: float) -> None:
    """Keep the base model's loss for all starts of the run."""
    (run_dir / "evals").mkdir(parents=True, exist_ok=True)
    write_text_atomic(run_dir / "evals" / BASE_FILE, json.dumps({"ar_loss": ar_loss}) + "\n")


def read_base(run_dir: Path) -> float | None:
    """What `write_base` kept; None where the run did not start from a base model."""
    path = run_dir / "evals" / BASE_FILE
    return float(json.loads(path.read_text())["ar_loss"]) if path.is_file() else None


class ArGuard(Guard):
    """Says at every eval how far the held-out AR loss is from the base model's; too far above it
    is an event, `ar_guard`."""

    def __init__(self, run_dir: Path, config: ArGuardConfig, say: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.config = config
        self.say = say

    def on_eval(self, rows: Sequence[Mapping[str, Any]]) -> None:
        base = read_base(self.run_dir)
        if base is None or not rows:
            return
        # On the same sequences in every row, and the same as the base's.
        loss, step = rows[0]["ar_loss"], rows[0]["step"]
        rise = loss - base
        self.say(f"step {step}: held-out AR loss {loss:.4f}, base model {base:.4f} ({rise:+.4f})")
        if rise > self.config.most_rise:
            text = (
                f"held-out AR loss rose by {rise:.4f} nats a token, more than "
                f"ar_guard.most_rise={self.config.most_rise:g}; raise objective.alpha or "
                "lower optimizer.learning_rate"
            )
            details = {"ar_loss": loss, "base": base, "rise": rise}
            self.report(make_event("ar_guard", step, text, **details))
