"""Train and score the runs one after the other; what is done stays done, what was killed goes on.

Each run is an ordinary `tidar-train`, then an ordinary `tidar-evaluate`; their commands are part of
the result, and anybody can repeat one by hand. They have equal clean tokens, or equal FLOPs by the
planner.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from bench.experiments.corpus import ROOT, CorpusChoice, prepare
from bench.experiments.record import make_result
from bench.experiments.runs import BASE_STEPS, BY_NAME, STEPS, Run
from pipeline.planning.config import Planned
from pipeline.planning.plan import make_plan
from tidar_common.errors import UserError
from tidar_common.files import write_text_atomic

SCORING = (
    "evals=[decode_speed,likelihood]", "dtype=fp32", "evals.decode_speed.prompts=8",
    "evals.decode_speed.prompt_tokens=32", "evals.decode_speed.max_new_tokens=64",
    "evals.decode_speed.repeats=1", "evals.decode_speed.score_sequences=1000000",
)  # fmt: skip
"""Greedy and temperature 1 on few prompts; losses and acceptance on the whole held-out split. In
fp32, where greedy TiDAR decoding gives AR's tokens."""
DONE = "commands.json"
"""File of a run directory, there once the run is trained, scored and its result written."""


class Budgets:
    """Steps of every run on prepared data, from the planner's FLOPs."""

    def __init__(
        self, data_dir: Path, shared: tuple[str, ...] = (), scale: float = 1.0, length: float = 1.0
    ) -> None:
        """`scale` shortens or lengthens all runs alike, `length` all but those they start from;
        `shared` overrides come to every run."""
        self.data_dir = data_dir
        self.shared = shared
        self.base_steps = max(1, round(BASE_STEPS * scale))
        self.reference_steps = max(1, round(STEPS * scale * length))
        self._flops: dict[str, int] = {}

    def flops_per_step(self, run: Run) -> int:
        """By `tidar-plan`, forward and backward of both sections."""
        if run.name not in self._flops:
            self._flops[run.name] = self._planned_flops(run)
        return self._flops[run.name]

    def _planned_flops(self, run: Run) -> int:
        # A plan does not look at the weights that a run starts from; a frozen base needs some.
        start = [] if run.start is None else [f"init_from={run.start}"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose(
                "plan",
                ["experiment=study", f"data.dir={self.data_dir}", "cluster.nodes=1",
                 "cluster.gpus_per_node=1", *start, *run.overrides, *self.shared],
            )  # fmt: skip
            return make_plan(Planned.from_config(cfg)).flops.model

    def steps(self, run: Run) -> int:
        if run.budget == "base":
            return self.base_steps
        if run.budget == "tokens":
            return self.reference_steps
        if run.budget in BY_NAME:
            return self.steps(BY_NAME[run.budget])
        allowed = self.flops_per_step(BY_NAME["published"]) * self.reference_steps
        if run.budget == "total":
            allowed += self.flops_per_step(BY_NAME["base"]) * self.base_steps
        return max(1, round(allowed / self.flops_per_step(run)))


@dataclass(frozen=True)
class Study:
    """Where the runs of one corpus live, and how long they are."""

    choice: CorpusChoice
    work: Path
    """Folder for text, data and runs."""
    results: Path
    """Folder for the JSON files."""
    shared: tuple[str, ...] = ()
    """Overrides for every training run."""
    scoring: tuple[str, ...] = ()
    """Overrides for every evaluation."""
    scale: float = 1.0
    """Length of all runs."""
    length: float = 1.0
    """Length of all runs that start from `base`, beside `scale`; part of their names unless 1."""

    @property
    def folder(self) -> Path:
        return self.work / self.choice.name

    def run_dir(self, run: Run, seed: int) -> Path:
        return self.folder / f"{self.name(run)}-seed{seed}"

    def name(self, run: Run) -> str:
        """Of its directory and result; `base` is the same whatever the length of what follows."""
        longer = self.length != 1 and run.budget != "base"
        return f"{run.name}-x{self.length:g}" if longer else run.name

    def train_command(self, run: Run, seed: int, steps: int) -> list[str]:
        """The words behind `tidar-train`."""
        words = [
            "experiment=study", f"data.dir={self.folder / 'data'}",
            f"run_dir={self.run_dir(run, seed)}", f"seed={seed}", f"steps={steps}",
            *run.overrides, *self.shared,
        ]  # fmt: skip
        if run.start is not None:
            words.append(f"init_from={self.run_dir(BY_NAME[run.start], seed)}")
        return words

    def score_command(self, run: Run, seed: int, block_size: int | None) -> list[str]:
        """The words behind `tidar-evaluate`; `block_size` None takes the one trained with."""
        run_dir = self.run_dir(run, seed)
        blocks = []
        if block_size is not None:
            blocks = [
                f"evals.{name}.block_size={block_size}" for name in ("decode_speed", "likelihood")
            ]
        output = run_dir / f"scores{'' if block_size is None else f'-k{block_size}'}.json"
        return [
            f"checkpoint={run_dir}", f"data.dir={self.folder / 'data'}", f"output={output}",
            *SCORING, *blocks, *self.scoring,
        ]  # fmt: skip

    def perform(self, jobs: Iterable[tuple[Run, int]], say: Callable[[str], None]) -> list[Path]:
        """Do the (run, seed) pairs that are not done, in order; returns the result files.

        Raises:
            UserError: when a command fails or is interrupted; the same call goes on from there.
        """
        prepare(self.choice, self.folder)
        budgets = Budgets(self.folder / "data", self.shared, self.scale, self.length)
        written = []
        for run, seed in jobs:
            if run.start is not None:
                start = self.run_dir(BY_NAME[run.start], seed) / DONE
                if not start.is_file():
                    raise UserError(
                        f"{run.name}: starts from {run.start} with seed {seed}, which is not done; "
                        f"run that first (--only {run.start} --seeds {seed})"
                    )
            written.append(self.do(run, seed, budgets, say))
        return written

    def do(self, run: Run, seed: int, budgets: Budgets, say: Callable[[str], None]) -> Path:
        """Train, score, write the result; each only if it was not done by the same command."""
        path = self.results / f"{self.choice.name}-{self.name(run)}-seed{seed}.json"
        steps = budgets.steps(run)
        train = self.train_command(run, seed, steps)
        scores = [self.score_command(run, seed, size) for size in run.score_at or (None,)]
        commands = [f"tidar-train {shlex.join(train)}"]
        commands += [f"tidar-evaluate {shlex.join(words)}" for words in scores]
        mark = self.run_dir(run, seed) / DONE
        if mark.is_file() and json.loads(mark.read_text()) == commands and path.is_file():
            say(f"{path.stem}: done before")
            return path
        say(f"{path.stem}: {steps} steps")
        execute("pipeline.train", train)
        for words in scores:
            execute("pipeline.evaluate", words)
        result = make_result(
            run, seed, steps, commands,
            flops=steps * budgets.flops_per_step(run),
            run_dir=self.run_dir(run, seed),
            scores=[self.read_scores(words) for words in scores],
            text=json.loads((self.folder / "text.json").read_text()),
        )  # fmt: skip
        write_text_atomic(path, json.dumps(result, indent=1) + "\n")
        write_text_atomic(mark, json.dumps(commands, indent=1) + "\n")
        say(f"{path.stem}: written")
        return path

    @staticmethod
    def read_scores(words: list[str]) -> dict[str, Any]:
        (output,) = (word.partition("=")[2] for word in words if word.startswith("output="))
        return json.loads((ROOT / output).read_text())


def execute(module: str, words: list[str]) -> None:
    """Run one command of the project to its end, from the repository's folder."""
    code = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, check=False).returncode
    if code:
        raise UserError(
            f"{module}: ended with code {code}; the messages above say why, and the same command "
            "goes on from here"
        )
