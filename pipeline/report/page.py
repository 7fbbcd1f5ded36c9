"""The page as a whole: sections in order, put into the template, written in one piece."""

import os
from importlib import resources
from pathlib import Path
from string import Template

from pipeline.report import plots
from pipeline.report.generation import generation_section
from pipeline.report.headline import headline, warnings
from pipeline.report.read import Run, read_run
from pipeline.report.standing import (
    Starts,
    read_starts,
    skipped_shards,
    standing_section,
)
from pipeline.report.svg import Chart
from pipeline.report.tables import acceptance_table, eval_table, sources_table
from pipeline.report.wording import compact, escape
from tidar_common.run_files import newest_checkpoint

FILE_NAME = "report.html"


def build_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from the files of the run; works at any moment of a run.

    The page needs no network. The same files, with their times, give the same bytes. The old page
    stays in place until the new one is complete.

    Returns:
        Path: the page.

    Raises:
        UserError: when `run_dir` or its metrics.jsonl does not exist or holds no whole line.
    """
    run_dir = Path(run_dir)
    checkpoint = newest_checkpoint(run_dir)
    run = read_run(run_dir)
    updated = (run_dir / "metrics.jsonl").stat().st_mtime
    page = render(run, read_starts(run_dir), checkpoint, updated, skipped_shards(run_dir))
    target = run_dir / FILE_NAME
    partial = run_dir / f".{FILE_NAME}.{os.getpid()}"
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def render(
    run: Run,
    starts: Starts | None = None,
    checkpoint: str | None = None,
    updated: float | None = None,
    skipped: str | None = None,
) -> str:
    """The whole page as HTML, with the run's starts, the name of its newest checkpoint, and the
    shards that it went on without.

    `updated` is when the last step was recorded, in seconds since the epoch.
    """
    standing = standing_section(run, starts, checkpoint, updated, skipped)
    package = resources.files("pipeline.report")
    parts = {
        "title": escape(f"{run.name}: TiDAR training report"),
        "name": escape(run.name),
        "subtitle": escape(_subtitle(run)),
        "figures": "\n".join(figure.draw() for figure in headline(run)),
        "warnings": _warnings(run),
        "sections": "\n".join(_sections(run, standing)),
        "style": package.joinpath("style.css").read_text(encoding="utf-8"),
        "script": package.joinpath("script.js").read_text(encoding="utf-8"),
    }
    template = package.joinpath("template.html").read_text(encoding="utf-8")
    return Template(template).substitute(parts)


def _subtitle(run: Run) -> str:
    last = run.metrics[-1]
    objective = run.setting("objective", "name") or run.setting("objective", "kind")
    if objective is None and isinstance(run.setting("objective"), str):
        objective = run.setting("objective")
    parts = [f"step {last['step']:,}"]
    if objective:
        parts.insert(0, f"objective {objective}")
    if run.block_size:
        parts.append(f"block length {run.block_size}")
    if run.parameters:
        parts.append(f"{compact(run.parameters)} parameters")
    if run.evals:
        parts.append(f"last decode-speed eval at step {run.evals[-1]['step']:,}")
    return " · ".join(parts)


def _warnings(run: Run) -> str:
    lines = [*warnings(run), *run.notices]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<aside class="warnings"><h2>Read with care</h2><ul>{items}</ul></aside>'


def _sections(run: Run, standing: str) -> list[str]:
    sections = []
    if run.example is not None:
        sections.append(
            _section("A generation, forward by forward", generation_section(run.example))
        )
    decoding = plots.decode_charts(run)
    if decoding:
        sections.append(_section("Decode speed over training", _grid(decoding, 3)))
    acceptance = plots.acceptance_charts(run)
    if acceptance:
        sections.append(_section("What the drafts are worth", _ACCEPTANCE + _grid(acceptance, 2)))
    sections.append(_section("Loss", _grid(plots.loss_charts(run), 2)))
    sections.append(_section("Training", _grid(plots.training_charts(run), 3)))
    if run.evals:
        sections.append(_section(f"Eval at step {run.evals[-1]['step']:,}", _tables(run)))
    else:
        sections.append(
            _section("Evals", '<p class="empty">No decode-speed eval has been recorded yet.</p>')
        )
    sections.append(_section("Where the run stands", standing))
    if run.config_text:
        config = f"<pre>{escape(run.config_text)}</pre>"
        sections.append(f"<details><summary>Resolved config</summary>{config}</details>")
    return sections


_ACCEPTANCE = (
    "<p>A draft is accepted when the AR half of the same model agrees with it. Position 1 is the "
    "first token after the one that the verifier itself has set. <em>While decoding</em>: share of "
    "the steps that got as far as this position in which its draft was accepted. "
    "<em>Teacher-forced</em>: the acceptance to expect on held-out text. <em>Unigram draft</em>: "
    "what a draft without any knowledge of the context would get. <em>Bigram draft</em>: what a "
    "table of token pairs would get, which knows the token before the position; only a lead over "
    "it is worth a model.</p>"
)


def _tables(run: Run) -> str:
    numbers = acceptance_table(run)
    folded = f"<details><summary>Acceptance in numbers</summary>{numbers}</details>"
    sources = sources_table(run)
    by_source = f"<h3>Held-out text by source</h3>{sources}" if sources else ""
    return eval_table(run) + (folded if numbers else "") + by_source


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def _grid(charts: list[Chart], columns: int) -> str:
    return f'<div class="grid g{columns}">{"".join(chart.draw() for chart in charts)}</div>'
