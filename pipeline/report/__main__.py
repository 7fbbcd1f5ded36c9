"""Rebuild a run's report: `python -m pipeline.report RUN_DIR`."""

import argparse
import sys
from pathlib import Path

from pipeline.report.page import build_report
from tidar_common.cli import telling_mistakes


@telling_mistakes
def main(arguments: list[str] | None = None) -> None:
    """Write the report and print its path; returns the exit code (2 for a mistake in the input)."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a training run's directory")
    run_dir = parser.parse_args(arguments).run_dir
    print(build_report(run_dir))


if __name__ == "__main__":
    sys.exit(main())
