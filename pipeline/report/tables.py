"""The last eval as tables."""

from collections.abc import Mapping, Sequence

from pipeline.report.plots import by_position
from pipeline.report.read import Row, Run, as_number
from pipeline.report.wording import MISSING, escape, fixed, percent

_METHODS = {
    "ar": "AR",
    "tidar": "TiDAR",
    "tidar_chosen": "TiDAR, chosen step",
    "recurrent": "draft head alone",
    "block_diffusion": "block diffusion (not lossless)",
    "prompt_lookup": "prompt lookup",
    "speculative": "speculative",
}


def eval_table(run: Run) -> str:
    """One row per method and temperature of the last eval."""
    head = (
        "method",
        "temperature",
        "prompts",
        "tokens",
        "forwards",
        "tokens per forward",
        "tokens/s",
        "speed over AR",
        "conversion",
        "queries per forward",
        "ms per forward",
        "exact match with AR",
        "largest logit gap at a difference",
        "distinct 4\N{NON-BREAKING HYPHEN}grams",
        "peak memory",
    )
    rows = sorted(run.latest_rows(), key=lambda row: (row["temperature"], row["method"]))
    return table(head, [_eval_cells(row) for row in rows])


def _eval_cells(row: Row) -> list[str]:
    speed = as_number(row.get("speedup_over_ar"))
    seconds = as_number(row.get("seconds_per_decoding_forward"))
    peak = as_number(row.get("peak_memory_bytes"))
    return [
        escape(_METHODS.get(row["method"], row["method"])),
        fixed(as_number(row["temperature"]), 1),
        *(fixed(as_number(row.get(name)), 0) for name in ("prompts", "tokens", "forwards")),
        fixed(as_number(row.get("tokens_per_forward"))),
        fixed(as_number(row.get("tokens_per_second")), 1),
        MISSING if speed is None else f"{speed:.2f}×",
        percent(as_number(row.get("conversion"))),
        fixed(as_number(row.get("queries_per_forward")), 0),
        fixed(None if seconds is None else 1e3 * seconds, 1),
        percent(as_number(row.get("exact_match_ar"))),
        fixed(as_number(row.get("largest_divergence_gap"))),
        fixed(as_number(row.get("distinct_4grams"))),
        MISSING if peak is None else f"{peak / 2**30:.2f} GiB",
    ]


def acceptance_table(run: Run) -> str:
    """The numbers behind the acceptance charts; empty when TiDAR was not measured."""
    measures = (
        ("acceptance_by_position", "while decoding"),
        ("teacher_forced_acceptance", "teacher-forced"),
        ("unigram_acceptance", "unigram draft"),
        ("bigram_acceptance", "bigram draft"),
        ("recurrent_acceptance", "draft head without slots"),
    )
    body, positions = [], 0
    for temperature in (0.0, 1.0):
        row = run.last_eval("tidar", temperature)
        if row is None:
            continue
        for name, words in measures:
            values = [value for _, value in by_position(row, name)]
            positions = max(positions, len(values))
            body.append([words, fixed(temperature, 1), *(fixed(value) for value in values)])
    if not positions:
        return ""
    padded = [[*cells, *[MISSING] * (positions + 2 - len(cells))] for cells in body]
    return table(("measure", "temperature", *map(str, range(1, positions + 1))), padded)


def sources_table(run: Run) -> str:
    """How drafts do on each source of held-out text, at the last eval; empty without sources."""
    measures = (
        ("ar_loss", 3),
        ("diffusion_loss", 3),
        ("expected_tokens_per_forward", 2),
        ("unigram_expected_tokens_per_forward", 2),
        ("bigram_expected_tokens_per_forward", 2),
        ("recurrent_expected_tokens_per_forward", 2),
        ("draft_calibration_error", 3),
    )
    body, positions = [], 0
    for temperature in (0.0, 1.0):
        row = run.last_eval("tidar", temperature)
        sources = row.get("by_source") if row else None
        for source, own in (sources if isinstance(sources, Mapping) else {}).items():
            values = [fixed(value) for _, value in by_position(own, "teacher_forced_survival")]
            positions = max(positions, len(values))
            numbers = [fixed(as_number(own.get(name)), digits) for name, digits in measures]
            body.append([escape(source), fixed(temperature, 1), *numbers, *values])
    if not body:
        return ""
    head = (
        "source", "temperature", "AR loss", "diffusion loss", "expected tokens per forward",
        "of a unigram draft", "of a bigram draft", "calibration error",
        *(f"kept up to {place}" for place in range(1, positions + 1)),
    )  # fmt: skip
    return table(head, [[*cells, *[MISSING] * (len(head) - len(cells))] for cells in body])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table from escaped cells; the first of each row is its header."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{cells[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells[1:])
        + "</tr>\n"
        for cells in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )
