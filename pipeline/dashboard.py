"""`tidar-dashboard`: a W&B report with the panels of `conf/dashboard.yaml`, by W&B's own API."""

import importlib.util
import sys

from omegaconf import DictConfig

from data_prep.cli import run
from data_prep.config import parse
from data_prep.errors import UserError
from pipeline.training.callbacks.dashboard import PACKAGE, DashboardConfig, create


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
