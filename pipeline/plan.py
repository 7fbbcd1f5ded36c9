"""`tidar-plan`: what a training run takes, or with `check=true` whether it could start."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from tidar_common.cli import run
from tidar_common.errors import UserError
from tidar_common.files import write_text_atomic
from tidar_common.run_files import Exit

if TYPE_CHECKING:
    from pipeline.planning.plan import Plan


def plan(cfg: DictConfig) -> int:
    # Here, so that no help or mistake in a key waits for torch.
    from pipeline.planning.checks import run_checks
    from pipeline.planning.config import Planned
    from pipeline.planning.plan import make_plan
    from pipeline.planning.show import describe

    started = time.monotonic()
    planned = Planned.from_config(cfg)
    result = make_plan(planned)
    if planned.plan.json is not None:
        write_json(result, Path(planned.plan.json).expanduser())
    if planned.check:
        run_checks(result, lambda line: print(line, flush=True))
        print(f"ready to submit; checked in {time.monotonic() - started:.1f} s")
        return Exit.DONE
    print(describe(result), flush=True)
    if result.errors:
        raise UserError("; ".join(result.errors))
    return Exit.DONE


def write_json(result: "Plan", path: Path) -> None:
    try:
        write_text_atomic(path, json.dumps(result.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"plan.json: {path} cannot be written ({error})") from error


def main() -> None:
    sys.exit(run("plan", plan))


if __name__ == "__main__":
    main()
