"""`report.html`: the sections of a run's page, in order; above them figures, each with what it has
to be read against, and warnings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.report import plots
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
from tidar_common.page import Section, Tile, page, visible
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
        for source, scores in (sources if isinstance(sources, Mapping) else {}).items():
            cells = [show(scores.get(key)) for _, key, show in SOURCE_COLUMNS]
            kept = map(fixed, _values(scores, "teacher_forced_survival"))
            body.append([source, fixed(temperature, 1), *cells, *kept])
    if not body:
        return None
    head = ["source", "temperature", *(name for name, _, _ in SOURCE_COLUMNS)]
    positions = max(map(len, body)) - len(head)
    return Table([*head, *(f"kept up to {n}" for n in range(1, positions + 1))], body)


def _values(row: Row, key: str) -> list[float | None]:
    return [value for _, value in plots.by_position(row, key)]


REPETITION_LIMIT = 0.5
"""Share of distinct 4-grams below which tokens per forward says little about the method."""


def headline(run: Run) -> list[Tile]:
    """The figures this run can show, most important first."""
    greedy, sampled = run.last_eval("tidar", 0.0), run.last_eval("tidar", 1.0)
    tiles: list[Tile] = []
    if greedy:
        tiles.append(_tokens_per_forward("Tokens per forward, greedy", greedy))
    if sampled:
        tiles.append(_tokens_per_forward("Tokens per forward, T = 1", sampled))
    if greedy:
        chosen = [run.last_eval("tidar_chosen", temperature) for temperature in (0.0, 1.0)]
        tiles += [_speed(greedy, sampled, *chosen), _exact_match(greedy), _first_draft(greedy)]
    tiles += [_ar_loss(run), _training(run)]
    if greedy:
        tiles.append(_repetition(greedy))
    return tiles


def _tokens_per_forward(label: str, row: Row) -> Tile:
    value = as_number(row.get("tokens_per_forward"))
    size = row.get("block_size")
    context = f"at most K = {size}; AR decoding has 1" if size else "AR decoding has 1"
    return Tile(label, fixed(value), f"{context}; prefill included")


def _speed(greedy: Row, sampled: Row | None, chosen: Row | None, drawn: Row | None) -> Tile:
    """That of the step chosen for the machine where it was measured, which is how one decodes."""
    best, other = (chosen, drawn) if chosen else (greedy, sampled)
    value = as_number(best.get("speedup_over_ar"))
    context = "tokens/s over AR's, same prompts and machine"
    if chosen:
        every = as_number(greedy.get("speedup_over_ar"))
        context += f", with the step chosen for it; {fixed(every)}× with every mask block"
    second = as_number(other.get("speedup_over_ar")) if other else None
    if second is not None:
        context += f"; {fixed(second)}× at T = 1"
    return Tile("Speed over AR, greedy", "–" if value is None else f"{value:.2f}×", context)


def _exact_match(greedy: Row) -> Tile:
    prompts = greedy.get("prompts")
    context = "prompts whose greedy text equals greedy AR's, token for token"
    if prompts:
        context = f"of {prompts} " + context
    return Tile("Exact match with AR", percent(as_number(greedy.get("exact_match_ar"))), context)


def first_acceptance(row: Row, name: str) -> float | None:
    """The value of a list over draft positions at position 1."""
    values = row.get(name) or [None]
    return as_number(values[0])


def _first_draft(greedy: Row) -> Tile:
    measured = first_acceptance(greedy, "acceptance_by_position")
    context = "greedy, draft position 1"
    for draft in ("unigram", "bigram"):
        share = first_acceptance(greedy, f"{draft}_acceptance")
        if share is not None:
            context += f"; a {draft} draft would get {percent(share)}"
    return Tile("First draft accepted", percent(measured), context)


def _ar_loss(run: Run) -> Tile:
    row = next(
        (row for row in run.latest_rows() if as_number(row.get("ar_loss")) is not None), None
    )
    if row is None:
        last = as_number(run.metrics[-1].get("loss_ar"))
        return Tile("AR loss, training", fixed(last), "nats per token at the last step")
    loss, entropy = as_number(row.get("ar_loss")), as_number(row.get("unigram_entropy"))
    context = "nats per token"
    if loss is not None and entropy is not None:
        side = "below" if loss <= entropy else "ABOVE"
        context += f"; {abs(entropy - loss):.2f} {side} the unigram entropy {entropy:.2f}"
    return Tile("AR loss, held out", fixed(loss), context)


def _training(run: Run) -> Tile:
    last = run.metrics[-1]
    planned = run.setting("steps")
    steps = f"{last['step']:,} steps"
    if isinstance(planned, int):
        steps = f"{last['step']:,} of {planned:,} steps"
    if run.parameters:
        steps += f"; {compact(run.parameters)} parameters"
    return Tile("Training tokens", compact(as_number(last.get("tokens"))), steps)


def _repetition(greedy: Row) -> Tile:
    share = as_number(greedy.get("distinct_4grams"))
    return Tile(
        "Distinct 4-grams, greedy",
        fixed(share),
        "share of the generated text's 4-grams; low means it repeats itself",
    )


def warnings(run: Run) -> list[str]:
    """What a reader could mistake for a success, or should know of a failure; plain text."""
    lines: list[str] = []
    for temperature, words in ((0.0, "Greedy"), (1.0, "Sampled (T = 1)")):
        row = run.last_eval("tidar", temperature)
        if row:
            lines += _row_warnings(row, words)
    greedy = run.last_eval("tidar", 0.0)
    if greedy:
        lines += _greedy_warnings(greedy, run.last_eval("tidar_chosen", 0.0))
    return lines


def _row_warnings(row: Row, words: str) -> list[str]:
    lines = []
    distinct = as_number(row.get("distinct_4grams"))
    if distinct is not None and distinct < REPETITION_LIMIT:
        lines.append(
            f"{words} text repeats itself: only {percent(distinct)} of its 4-grams are distinct. "
            "Repetition is easy to draft and inflates tokens per forward: do not take "
            f"{fixed(as_number(row.get('tokens_per_forward')))} for what varied text would get."
        )
    measured = first_acceptance(row, "acceptance_by_position")
    unigram = first_acceptance(row, "unigram_acceptance")
    if measured is not None and unigram is not None and measured <= unigram:
        lines.append(
            f"{words}: the first draft is accepted no more often ({percent(measured)}) than one "
            f"that ignores the context would be ({percent(unigram)}). The model has not yet "
            "learned to draft."
        )
    expected = as_number(row.get("expected_tokens_per_forward"))
    bigram = as_number(row.get("bigram_expected_tokens_per_forward"))
    if expected is not None and bigram is not None and expected <= bigram:
        lines.append(
            f"{words}: on held-out text a table of token pairs would draft as well, "
            f"{fixed(bigram)} expected tokens per forward beside {fixed(expected)}. The diffusion "
            "half does not pay for itself yet."
        )
    return lines


def _greedy_warnings(greedy: Row, chosen: Row | None) -> list[str]:
    lines = []
    loss, entropy = as_number(greedy.get("ar_loss")), as_number(greedy.get("unigram_entropy"))
    if loss is not None and entropy is not None and loss >= entropy:
        lines.append(
            "The held-out AR loss is not below the unigram entropy: the model predicts no better "
            "than token frequencies, and acceptance says nothing yet."
        )
    match = as_number(greedy.get("exact_match_ar"))
    if match is not None and match < 1:
        lines.append(
            f"Greedy TiDAR gave another text than greedy AR for {percent(1 - match)} of the "
            "prompts. They should be equal in fp32; in bf16, rounding can turn a near tie."
        )
    speed = as_number(greedy.get("speedup_over_ar"))
    best = as_number(chosen.get("speedup_over_ar")) if chosen else None
    if speed is not None and speed < 1 and (best is None or best < 1):
        lines.append(
            f"TiDAR decoded more slowly than AR here ({speed:.2f}×). A step computes K + K² tokens "
            "at once; that is nearly free only where a forward is bound by reading weights, as "
            "for large models on a GPU. On a CPU the extra tokens cost time."
        )
        if best is not None:
            lines[-1] += (
                f" The step chosen for this machine decoded at {best:.2f}× the speed of AR."
            )
    return lines
