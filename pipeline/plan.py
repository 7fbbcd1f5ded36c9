"""`tidar-plan`: what a training run takes, before a GPU is asked for."""

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.planning.plan import make_plan
from pipeline.planning.settings import Planned
from pipeline.planning.show import describe
from tidar_common.cli import run
from tidar_common.errors import UserError
from tidar_common.files import write_text_atomic


def plan(cfg: DictConfig) -> int:
    planned = Planned.from_config(cfg)
    result = make_plan(planned)
    print(describe(result), flush=True)
    if planned.plan.json is not None:
        try:
            text = json.dumps(result.to_dict(), indent=2) + "\n"
            write_text_atomic(Path(planned.plan.json).expanduser(), text)
        except OSError as error:
            raise UserError(
                f"plan.json: {planned.plan.json} cannot be written ({error})"
            ) from error
    if result.errors:
        raise UserError("; ".join(result.errors))
    return 0


def main() -> None:
    sys.exit(run("plan", plan))


if __name__ == "__main__":
    main()
