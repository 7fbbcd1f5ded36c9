"""Steps of every run: equal clean tokens, or equal FLOPs by the planner."""

from pathlib import Path

from hydra import compose, initialize_config_dir

from bench.experiments.corpus import ROOT
from bench.experiments.runs import BASE_STEPS, BY_NAME, STEPS, Run
from pipeline.planning.plan import make_plan
from pipeline.planning.settings import Planned


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
