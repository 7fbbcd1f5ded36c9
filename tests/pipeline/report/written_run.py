"""A run directory as a small model's run leaves it, without any training."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

STEPS, EVAL_EVERY, BLOCK_SIZE = 300, 100, 4
CODE = (
    '    def read(self, size=-1):\n        """Read <size> & more."""\n\tif size < 0:\n'
    '            return self.raw.readall()\n        return b"".join(self._chunks(size))\n\n'
    "    def close(self):\n        if not self.closed:\n            self.flush()\n"
    "        raise ValueError('I/O operation on closed file')\n"
)


def write_run(path: Path, *, objective: str = "tidar", evals: bool = True, seed: int = 0) -> Path:
    """A run directory like a small model's after `STEPS` steps."""
    rng = random.Random(seed)
    (path / "evals").mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"run_dir: runs/<demo>\nsteps: 400\nseed: 0\n"
        f"objective:\n  name: {objective}\n  alpha: 1.0\n"
        "model:\n  hidden_size: 160\n  num_layers: 6\n  parameters: 1834240\n"
        f"layout:\n  block_size: {BLOCK_SIZE}\ndeepspeed:\n  zero_optimization:\n    stage: 2\n"
    )
    write_lines(path / "metrics.jsonl", [metric(s, objective, rng) for s in range(1, STEPS + 1)])
    if evals:
        at = range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)
        rows = [row for step in at for row in eval_rows(step, objective, rng)]
        write_lines(path / "evals" / "decode_speed.jsonl", rows)
        if objective == "tidar":
            (path / "evals" / "example.json").write_text(json.dumps(example(rng)))
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metric(step: int, objective: str, rng: random.Random) -> dict[str, Any]:
    ar = 3.7 + 3.3 * math.exp(-step / 70) + rng.gauss(0, 0.06)
    diffusion = 5.0 + 2.1 * math.exp(-step / 90) + rng.gauss(0, 0.05)
    tidar = objective == "tidar"
    return {
        "step": step,
        "loss": (ar + diffusion) / 2 if tidar else ar,
        "loss_ar": ar,
        "loss_diffusion": diffusion if tidar else None,
        "loss_alone": None,
        "learning_rate": 2e-3 * min(1, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / 400)),
        "grad_norm": 0.6 + 2 * math.exp(-step / 30) + abs(rng.gauss(0, 0.1)),
        "tokens": 4096 * step,
        "tokens_per_second": 2900 + rng.gauss(0, 90) - (900 if step == 1 else 0),
        "sequences_seen": 16 * step,
        "data_digest": f"{rng.getrandbits(64):016x}",
        "step_seconds": 1.4,
        "data_wait_seconds": 0.004,
        "model_tflops": 0.02 + rng.gauss(0, 0.001),
        "mfu": None,
        "peak_memory_bytes": 3 * 2**28 + 2**20 * step,
        "mask_embedding_norm": 0.45 + step / 4000 if tidar else None,
    }


def eval_rows(step: int, objective: str, rng: random.Random) -> list[dict[str, Any]]:
    progress = step / STEPS
    shared = {
        "step": step,
        "block_size": BLOCK_SIZE,
        "prompts": 16,
        "tokens": 1024,
        "ar_loss": 5.2 - 1.3 * progress,
        "diffusion_loss": 6.0 - 0.8 * progress if objective == "tidar" else None,
        "unigram_entropy": 6.31,
        "unigram_loss": 6.40,
    }
    rows = []
    for temperature in (0.0, 1.0):
        common = {**shared, "temperature": temperature, "distinct_4grams": 0.35 + 0.3 * temperature}
        rows.append(
            {
                **common,
                "method": "ar",
                "forwards": 1024,
                "tokens_per_forward": 1.0,
                "tokens_per_second": 210.0,
                "speedup_over_ar": 1.0,
                "exact_match_ar": 1.0 if temperature == 0 else None,
                "acceptance_by_position": None,
                "teacher_forced_acceptance": None,
                "unigram_acceptance": None,
                "bigram_acceptance": None,
            }
        )
        if objective == "ar":
            continue
        first = 0.2 + 0.5 * progress - 0.15 * temperature + rng.uniform(0, 0.02)
        rate = 1 + first + first**2
        rows.append(
            {
                **common,
                "method": "tidar",
                "forwards": round(1024 / rate),
                "tokens_per_forward": rate,
                "tokens_per_second": 210.0 * rate * 0.55,
                "speedup_over_ar": rate * 0.55,
                "exact_match_ar": 1.0 if temperature == 0 else None,
                "acceptance_by_position": [first, first * 0.9, None if step == 100 else 0.4],
                "teacher_forced_acceptance": [first - 0.08, first * 0.75, first * 0.6],
                "unigram_acceptance": [0.12 + 0.1 * temperature] * 3,
                "bigram_acceptance": [0.17 + 0.1 * temperature] * 3,
                "expected_tokens_per_forward": rate,
                "bigram_expected_tokens_per_forward": 1.1,
            }
        )
    return rows


def example(rng: random.Random) -> dict[str, Any]:
    """Pieces of code as tokens; the first forward gives one, every further one 1 … K."""
    pieces = re.findall(r"\w{1,5}|\s{4}|\s|[^\w\s]{1,2}", CODE)
    assert "".join(pieces) == CODE
    tokens, forward, left = [], 1, 1
    for piece in pieces:
        if left == 0:
            forward, left = forward + 1, rng.choice([1, 1, 2, 2, 3, 4])
        tokens.append({"text": piece, "forward": forward})
        left -= 1
    return {
        "step": STEPS,
        "prompt": "class Reader(io.RawIOBase):\n    # <script>alert('prompt')</script>\n",
        "method": "tidar",
        "temperature": 0.0,
        "tokens_per_forward": len(tokens) / forward,
        "tokens": tokens,
        "block_size": BLOCK_SIZE,
    }
