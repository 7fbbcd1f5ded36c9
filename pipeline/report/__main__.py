"""Rebuild a run's report: `python -m pipeline.report RUN_DIR`."""

import argparse
import sys
from pathlib import Path

from data_prep.cli import EXIT_BAD_INPUT, report_mistake
from data_prep.errors import UserError
from pipeline.report.page import build_report


def main(arguments: list[str] | None = None) -> int:
    """Write the report and print its path; returns the exit code (2 for a mistake in the input)."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a training run's directory")
    run_dir = parser.parse_args(arguments).run_dir
    try:
        print(build_report(run_dir))
    except UserError as error:
        report_mistake(str(error))
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
