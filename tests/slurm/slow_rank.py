"""slurm/rank.py, in a job's first start with steps long enough that a time limit comes first."""

import os
import runpy
import time
from typing import Any

from pipeline.training import step

original = step.head_loss


def slow(*args: Any, **kwargs: Any) -> Any:
    time.sleep(float(os.environ["TIDAR_TEST_STEP_S"]))
    return original(*args, **kwargs)


if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    step.head_loss = slow
runpy.run_path("slurm/rank.py", run_name="__main__")
