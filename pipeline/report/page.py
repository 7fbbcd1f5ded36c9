"""`report.html`: the sections of a run's page, in order."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.report import plots
from pipeline.report.headline import headline, warnings
from pipeline.report.pictures import generation
from pipeline.report.read import Row, Run, as_number, read_run
from pipeline.report.standing import (
    ran_as,
    read_starts,
    skipped_shards,
    standing_tables,
)
from tidar_common.figures import chart_grid
from tidar_common.files import write_text_atomic
from tidar_common.page import Section, page, visible
from tidar_common.run_files import METHOD_LABELS, METRICS, REPORT, newest_checkpoint
from tidar_common.tables import MISSING, Table, compact, fixed, percent

FOOTER = (
    "TiDAR: Think in Diffusion, Talk in Autoregression (arXiv 2511.08923). Made from config.yaml, "
    "metrics.jsonl and evals/ of this run; rebuild with tidar-status RUN_DIR --report."
)
ACCEPTANCE = Markup(
    "<p>A draft is accepted when the AR half of the same model agrees with it. Position 1 is the "
    "first token after the one that the verifier itself has set. <em>While decoding</em>: share of "
    "the steps that got as far as this position in which its draft was accepted. "
    "<em>Teacher-forced</em>: the acceptance to expect on held-out text. <em>Unigram draft</em>: "
    "what a draft without any knowledge of the context would get. <em>Bigram draft</em>: what a "
    "table of token pairs would get, which knows the token before the position; only a lead over "
    "it is worth a model.</p>"
)


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
    standing = standing_tables(
        run,
        read_starts(run_dir),
        checkpoint,
        (run_dir / METRICS).stat().st_mtime,
        skipped_shards(run_dir),
        ran_as(run_dir),
    )
    text = page(
        run.name,
        _sections(run, standing),
        kicker="TiDAR training report",
        subtitle=_subtitle(run),
        tiles=headline(run),
        warnings=[*warnings(run), *run.notices],
        footer=FOOTER,
    )
    target = run_dir / REPORT
    write_text_atomic(target, text)
    return target


def _subtitle(run: Run) -> str:
    objective = run.setting("objective", "name") or run.setting("objective", "kind")
    if objective is None and isinstance(run.setting("objective"), str):
        objective = run.setting("objective")
    parts = [f"objective {objective}"] if objective else []
    parts.append(f"step {run.metrics[-1]['step']:,}")
    if run.block_size:
        parts.append(f"block length {run.block_size}")
    if run.parameters:
        parts.append(f"{compact(run.parameters)} parameters")
    if run.evals:
        parts.append(f"last decode-speed eval at step {run.evals[-1]['step']:,}")
    return " · ".join(parts)


def _sections(run: Run, standing: list[Table]) -> list[Section]:
    sections = []
    if run.example is not None:
        sections.append(Section("A generation, forward by forward", generation(run.example)))
    if decoding := plots.decode_charts(run):
        sections.append(Section("Decode speed over training", chart_grid(decoding, 3)))
    if acceptance := plots.acceptance_charts(run):
        body = ACCEPTANCE + chart_grid(acceptance, 2)
        sections.append(Section("What the drafts are worth", body))
    sections.append(Section("Loss", chart_grid(plots.loss_charts(run), 2)))
    sections.append(Section("Training", chart_grid(plots.training_charts(run), 3)))
    if run.evals:
        sections += _eval_sections(run)
    else:
        sections.append(
            Section("Evals", Markup("<p>No decode-speed eval has been recorded yet.</p>"))
        )
    tables = Markup("").join(table.html() for table in standing)
    sections.append(Section("Where the run stands", tables))
    if run.config_text:
        config = Markup("<pre>{}</pre>").format(visible(run.config_text))
        sections.append(Section("Resolved config", config, folded=True))
    return sections


def _number(digits: int, scale: float = 1, unit: str = "") -> Callable[[Any], str]:
    def show(value: Any) -> str:
        number = as_number(value)
        return MISSING if number is None else fixed(scale * number, digits) + unit

    return show


def _share(value: Any) -> str:
    return percent(as_number(value))


EVAL_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("method", "method", lambda name: METHOD_LABELS.get(name, str(name))),
    ("temperature", "temperature", _number(1)),
    ("prompts", "prompts", _number(0)),
    ("tokens", "tokens", _number(0)),
    ("forwards", "forwards", _number(0)),
    ("tokens per forward", "tokens_per_forward", _number(2)),
    ("tokens/s", "tokens_per_second", _number(1)),
    ("speed over AR", "speedup_over_ar", _number(2, unit="×")),
    ("conversion", "conversion", _share),
    ("queries per forward", "queries_per_forward", _number(0)),
    ("ms per forward", "seconds_per_decoding_forward", _number(1, 1e3)),
    ("exact match with AR", "exact_match_ar", _share),
    ("largest logit gap at a difference", "largest_divergence_gap", _number(2)),
    ("distinct 4\N{NON-BREAKING HYPHEN}grams", "distinct_4grams", _number(2)),
    ("peak memory", "peak_memory_bytes", _number(2, 2**-30, " GiB")),
)
"""Head, key of a row, and how a value is shown."""
SOURCE_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("AR loss", "ar_loss", _number(3)),
    ("diffusion loss", "diffusion_loss", _number(3)),
    ("expected tokens per forward", "expected_tokens_per_forward", _number(2)),
    ("of a unigram draft", "unigram_expected_tokens_per_forward", _number(2)),
    ("of a bigram draft", "bigram_expected_tokens_per_forward", _number(2)),
    ("of the draft head alone", "recurrent_expected_tokens_per_forward", _number(2)),
    ("calibration error", "draft_calibration_error", _number(3)),
)


def _eval_sections(run: Run) -> list[Section]:
    """The last eval: methods, acceptance in numbers, and drafts on each source of the text."""
    rows = sorted(run.latest_rows(), key=lambda row: (row["temperature"], row["method"]))
    table = Table(
        [head for head, _, _ in EVAL_COLUMNS],
        [[show(row.get(key)) for _, key, show in EVAL_COLUMNS] for row in rows],
    )
    sections = [Section(f"Eval at step {run.evals[-1]['step']:,}", table.html())]
    if (acceptance := _acceptance_table(run)) is not None:
        sections.append(Section("Acceptance in numbers", acceptance.html(), folded=True))
    if (sources := _sources_table(run)) is not None:
        sections.append(Section("Held-out text by source", sources.html()))
    return sections


def _acceptance_table(run: Run) -> Table | None:
    """The numbers behind the acceptance charts; None when TiDAR was not measured."""
    body = [
        [measure, fixed(temperature, 1), *map(fixed, _values(row, key))]
        for temperature in (0.0, 1.0)
        if (row := run.last_eval("tidar", temperature)) is not None
        for key, measure, *_ in plots.ACCEPTANCE
    ]
    positions = max(map(len, body), default=2) - 2
    if not positions:
        return None
    return Table(("measure", "temperature", *map(str, range(1, positions + 1))), body)


def _sources_table(run: Run) -> Table | None:
    """How drafts do on each source of held-out text, at the last eval; None without sources."""
    body = []
    for temperature in (0.0, 1.0):
        row = run.last_eval("tidar", temperature)
        sources = row.get("by_source") if row else None
        for source, own in (sources if isinstance(sources, Mapping) else {}).items():
            cells = [show(own.get(key)) for _, key, show in SOURCE_COLUMNS]
            kept = map(fixed, _values(own, "teacher_forced_survival"))
            body.append([source, fixed(temperature, 1), *cells, *kept])
    if not body:
        return None
    head = ["source", "temperature", *(name for name, _, _ in SOURCE_COLUMNS)]
    positions = max(map(len, body)) - len(head)
    return Table([*head, *(f"kept up to {n}" for n in range(1, positions + 1))], body)


def _values(row: Row, key: str) -> list[float | None]:
    return [value for _, value in plots.by_position(row, key)]
