"""`tidar-dashboard`: a W&B report with the panels of `conf/dashboard.yaml`, by W&B's own API."""

import importlib.util
import sys

from omegaconf import DictConfig

from pipeline.training.trackers.dashboard import PACKAGE, DashboardConfig, create
from tidar_common.cli import run
from tidar_common.config import parse
from tidar_common.errors import UserError


def dashboard(cfg: DictConfig) -> int:
    config = parse(DashboardConfig, cfg, "")
    if config.dry_run:
        for section in config.sections:
            print(section.title)
            for panel in section.panels:
                over = f" over {panel.x}" if panel.x else ""
                print(f"  {panel.title}: {', '.join(panel.keys)}{over}")
        return 0
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            "tidar-dashboard: its package is not installed; pip install -c constraints.txt "
            "-e '.[dashboard]', or dry_run=true to see the panels"
        )
    print(create(config))
    return 0


def main() -> None:
    sys.exit(run("dashboard", dashboard))


if __name__ == "__main__":
    main()
