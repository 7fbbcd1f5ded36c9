"""The panels of `conf/dashboard.yaml` as a report on the W&B server, by W&B's own API."""

import importlib
from dataclasses import dataclass
from typing import Any

from pipeline.training.trackers.metrics import AXES
from tidar_common.cli import one_line
from tidar_common.errors import UserError

PACKAGE = "wandb_workspaces"
WIDTH, HEIGHT, COLUMNS = 12, 8, 2
"""Of a panel, on W&B's grid of 24 columns."""


@dataclass(frozen=True)
class Panel:
    """Lines of the metrics `y` over `x`, or the media under one key."""

    title: str
    x: str | None = None
    y: tuple[str, ...] = ()
    log_y: bool = False
    media: str | None = None

    def __post_init__(self) -> None:
        if bool(self.y) == bool(self.media):
            raise ValueError(f"panel {self.title!r}: give either y or media")
        if self.y and self.x not in AXES:
            raise ValueError(f"panel {self.title!r}: x must be one of {', '.join(AXES)}")

    @property
    def keys(self) -> tuple[str, ...]:
        return self.y or (str(self.media),)

    def build(self, reports: Any, number: int) -> Any:
        """The panel as W&B's object, in the place of the `number`-th of its section."""
        row, column = divmod(number, COLUMNS)
        layout = reports.Layout(x=column * WIDTH, y=row * HEIGHT, w=WIDTH, h=HEIGHT)
        if self.media:
            return reports.MediaBrowser(title=self.title, media_keys=[self.media], layout=layout)
        return reports.LinePlot(
            title=self.title, x=self.x, y=list(self.y), log_y=self.log_y or None, layout=layout
        )


@dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class DashboardConfig:
    """The keys of `conf/dashboard.yaml`; they are explained there."""

    entity: str
    project: str
    title: str
    dry_run: bool
    sections: tuple[Section, ...]


def create(config: DashboardConfig) -> str:
    """Create the report on the server that W&B is logged in to; returns its address.

    Raises:
        UserError: without a login, an answer, or the right to write to the project.
    """
    try:
        report = build(config)
        report.save()
        return str(report.url)
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(
            f"entity: no report for {config.entity}/{config.project} ({one_line(error)}); look at "
            "wandb login, WANDB_BASE_URL, and the names"
        ) from error


def build(config: DashboardConfig) -> Any:
    """The report as W&B's object, not yet saved."""
    reports: Any = importlib.import_module(f"{PACKAGE}.reports.v2")
    blocks: list[Any] = []
    for section in config.sections:
        panels = [panel.build(reports, number) for number, panel in enumerate(section.panels)]
        runs = reports.Runset(entity=config.entity, project=config.project, name="Runs")
        blocks += [reports.H2(text=section.title), reports.PanelGrid(runsets=[runs], panels=panels)]
    return reports.Report(
        entity=config.entity, project=config.project, title=config.title, blocks=blocks
    )
