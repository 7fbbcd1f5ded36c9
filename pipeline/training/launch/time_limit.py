"""The wall-clock limit of a run: given, or read from Slurm."""

import os
import re
import time
from datetime import datetime

from tidar_common.errors import UserError

SLURM_END = "SLURM_JOB_END_TIME"
"""Set by Slurm in every job: when its time limit is reached, in seconds since the epoch."""
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def deadline(stop_before: str | None, margin_s: float) -> float | None:
    """When the last step has to be done, in seconds since the epoch; None for no limit.

    Args:
        stop_before: `auto` (Slurm's limit where there is one), null, a length of time from now
            such as `90m` or `1d12h`, or a moment such as `2026-01-31T18:00`.
        margin_s: seconds before it that are left for the last step and its save. At most half of
            the time that is left now: a limit that is too short must not stop every start before
            its first step.
    """
    now = time.time()
    limit = _limit(stop_before, now)
    if limit is None:
        return None
    return limit - min(margin_s, max(limit - now, 0.0) / 2)


def _limit(stop_before: str | None, now: float) -> float | None:
    if stop_before is None:
        return None
    if stop_before == "auto":
        end = os.environ.get(SLURM_END, "")
        return float(end) if end.isdigit() else None
    if re.fullmatch(r"(\d+[smhd])+", stop_before):
        return now + sum(
            int(number) * UNITS_S[unit]
            for number, unit in re.findall(r"(\d+)([smhd])", stop_before)
        )
    try:
        moment = datetime.fromisoformat(stop_before).timestamp()
    except ValueError as error:
        raise UserError(
            f"stop_before: {stop_before!r} is no time; give auto, null, a length such as 90m or "
            "1d12h, or a moment such as 2026-01-31T18:00"
        ) from error
    if moment <= now:
        raise UserError(f"stop_before: {stop_before} is over; give a later moment")
    return moment
