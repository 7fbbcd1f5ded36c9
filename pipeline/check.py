"""`tidar-check`: whether a run could start, asked on a login node before it is submitted."""

import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from pipeline.data.place import is_remote
from pipeline.planning.checks import run_checks
from pipeline.planning.plan import make_plan
from pipeline.planning.settings import Planned
from tidar_common.cli import run
from tidar_common.config import require


def check(cfg: DictConfig) -> int:
    started = time.monotonic()
    require(cfg, "data.dir", "run_dir")
    plan = make_plan(Planned.from_config(cfg))
    data_dir = None if is_remote(cfg.data.dir) else Path(cfg.data.dir).expanduser()
    run_checks(plan, data_dir, cfg.init_from, lambda line: print(line, flush=True))
    print(f"ready to submit; checked in {time.monotonic() - started:.1f} s")
    return 0


def main() -> None:
    sys.exit(run("check", check))


if __name__ == "__main__":
    main()
