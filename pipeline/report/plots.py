"""The charts of a run: which numbers go on which axes, and what the reader should know of them."""

from collections.abc import Sequence
from dataclasses import replace

from pipeline.report.read import Row, Run, as_number
from tidar_common.figures import Chart, Point, Series
from tidar_common.tables import percent

MAX_DRAWN_POINTS = 600
ACCEPTANCE = (
    ("acceptance_by_position", "while decoding", True, False, "circle"),
    ("teacher_forced_acceptance", "teacher-forced", True, True, "ring"),
    ("unigram_acceptance", "unigram draft", False, True, "square"),
    ("bigram_acceptance", "bigram draft", False, False, "ring"),
    ("recurrent_acceptance", "draft head alone", True, True, "square"),
)
"""Key of a row, name, whether in the temperature's colour, dashed, marker."""
TEMPERATURES = ((0.0, "greedy", "greedy", "circle"), (1.0, "T = 1", "sampled", "square"))


def loss_charts(run: Run) -> list[Chart]:
    """Training losses by step, and held-out losses by eval where there are any."""
    training = _by_step(
        run,
        "Training loss",
        [
            *smoothed("AR", run.column("loss_ar"), "ar"),
            *smoothed("diffusion", run.column("loss_diffusion"), "diffusion"),
        ],
        "nats per token",
        f"Faint: every step. Bold: mean over {window(len(run.metrics))} steps around it.",
        reference=unigram_entropy(run),
    )
    if not run.evals:
        return [replace(training, small=False)]
    unigram = Series("unigram model", per_eval(run, "unigram_loss"), "quiet", True, marker="ring")
    heldout = _by_step(
        run,
        "Held-out loss",
        [
            Series("AR", per_eval(run, "ar_loss"), "ar", marker="circle"),
            Series("diffusion", per_eval(run, "diffusion_loss"), "diffusion", marker="square"),
            unigram,
        ],
        "nats per token",
        "Teacher-forced, on documents never trained on. The unigram model knows only how frequent "
        "each token is in the training text.",
        reference=None if unigram.has_values else unigram_entropy(run),
    )
    return [replace(chart, small=False) for chart in (training, heldout)]


def acceptance_charts(run: Run) -> list[Chart]:
    """Acceptance by draft position at the last eval, one chart per temperature."""
    return [
        Chart(
            f"Acceptance by draft position, {words}",
            [
                Series(measure, by_position(row, key), color if of_model else "quiet", dashed,
                       marker=marker)
                for key, measure, of_model, dashed, marker in ACCEPTANCE
            ],
            "draft position",
            "share accepted",
            y_range=(0.0, 1.0),
        )
        for temperature, words, color, _ in TEMPERATURES
        if (row := run.last_eval("tidar", temperature)) is not None
    ]  # fmt: skip


def decode_charts(run: Run) -> list[Chart]:
    """Tokens per forward, speed over AR and repetition, by step; none for a run without drafts."""
    limit = f"Between 1 and the block length {run.block_size}. " if run.block_size else ""
    charts = [
        _by_step(
            run,
            "Tokens per forward",
            _both_temperatures(run, "tokens_per_forward"),
            "tokens per forward",
            limit + "Prefill counts as a forward.",
            reference=(1.0, "one token per forward (AR)"),
        ),
        _by_step(
            run,
            "Speed over AR",
            _both_temperatures(run, "speedup_over_ar"),
            "× AR tokens/s",
            "Wall-clock tokens per second of TiDAR over those of AR decoding: same weights, same "
            "prompts, same machine.",
            reference=(1.0, "as fast as AR"),
            y_range=(0.0, None),
        ),
        _by_step(
            run,
            "Distinct 4-grams",
            _both_temperatures(run, "distinct_4grams"),
            "share distinct",
            "Of the generated text. Text that repeats itself is easy to draft, so tokens per "
            "forward means little where this is low.",
            reference=(0.5, "below: much repetition"),
            y_range=(0.0, 1.0),
        ),
    ]
    return [chart for chart in charts if chart.has_values]


def training_charts(run: Run) -> list[Chart]:
    """Throughput, gradient norm, learning rate, rate of model FLOPs (as a share of the peak where
    that is known), memory and the mask token by step."""
    waiting = share_waiting(run)
    note = "" if waiting is None else f"Waiting for data: {percent(waiting, 1)} of the time."
    known = any(value is not None for _, value in run.column("mfu"))
    flops, unit, column = (
        ("Model FLOPs utilisation", "share of the peak", "mfu")
        if known
        else ("Model FLOPs a second", "TFLOP/s", "model_tflops")
    )
    memory = [
        (step, None if value is None else value / 2**30)
        for step, value in run.column("peak_memory_bytes")
    ]
    from_zero: tuple[float | None, float | None] = (0.0, None)
    charts = [
        _by_step(run, "Training throughput",
                 smoothed("clean tokens/s", run.column("tokens_per_second"), "ar"), "tokens/s",
                 note, y_range=from_zero),
        _by_step(run, "Gradient norm",
                 smoothed("before clipping", run.column("grad_norm"), "ar"), "L2 norm",
                 y_range=from_zero),
        _by_step(run, "Learning rate",
                 [Series("learning rate", thin(run.column("learning_rate")), "ar")],
                 "learning rate", y_range=from_zero),
        _by_step(run, flops, smoothed("a process", run.column(column), "ar"), unit,
                 y_range=from_zero),
        _by_step(run, "Peak memory", [Series("rank 0", thin(memory), "ar")], "GiB",
                 y_range=from_zero),
        _by_step(run, "Mask token's embedding",
                 [Series("norm", thin(run.column("mask_embedding_norm")), "diffusion")],
                 "L2 norm"),
    ]  # fmt: skip
    return [chart for chart in charts if chart.has_values]


def _by_step(
    run: Run,
    title: str,
    series: Sequence[Series],
    y_label: str,
    note: str = "",
    reference: tuple[float, str] | None = None,
    y_range: tuple[float | None, float | None] = (None, None),
) -> Chart:
    """A small chart over steps; all end at the last one, so that they can be compared by eye."""
    end = run.metrics[-1]["step"]
    return Chart(title, series, "step", y_label, note, reference, y_range, end, small=True)


def share_waiting(run: Run) -> float | None:
    """Share of the step time spent waiting for data; None when it was not recorded."""
    waits = [as_number(row.get("data_wait_seconds")) for row in run.metrics]
    steps = [as_number(row.get("step_seconds")) for row in run.metrics]
    pairs = [(w, s) for w, s in zip(waits, steps, strict=True) if w is not None and s is not None]
    total = sum(s for _, s in pairs)
    return sum(w for w, _ in pairs) / total if total > 0 else None


def unigram_entropy(run: Run) -> tuple[float, str] | None:
    """The unigram entropy of the tokenizer's training text as a reference line."""
    values = [as_number(row.get("unigram_entropy")) for row in run.evals]
    known = [value for value in values if value is not None]
    return (known[-1], f"unigram entropy {known[-1]:.2f}") if known else None


def per_eval(run: Run, name: str) -> list[Point]:
    """(step, value) of a figure that an eval's rows share; the last row that has it counts."""
    values: dict[float, float | None] = {}
    for row in run.evals:
        value = as_number(row.get(name))
        if value is not None or row["step"] not in values:
            values[row["step"]] = value
    return list(values.items())


def _both_temperatures(run: Run, name: str) -> list[Series]:
    return [
        Series(words, run.eval_column(name, "tidar", temperature), color, marker=marker)
        for temperature, words, color, marker in TEMPERATURES
    ]


def by_position(row: Row, name: str) -> list[Point]:
    """(draft position from 1, value) of a list over positions; null stays a gap."""
    values = row.get(name) or []
    return [(position, as_number(value)) for position, value in enumerate(values, start=1)]


def window(steps: int) -> int:
    """Odd width of the running mean for a run of `steps` steps."""
    return max(1, steps // 40) | 1


def smoothed(name: str, points: Sequence[Point], color: str) -> list[Series]:
    """The raw line, faint, and its centred running mean: centred so that it lags behind nothing."""
    mean = running_mean(points, window(len(points)))
    return [
        Series(name, thin(points), color, faint=True),
        Series(name, thin(mean), color),
    ]


def running_mean(points: Sequence[Point], width: int) -> list[Point]:
    """The mean of the values within `width // 2` points on either side; fewer at the ends."""
    half = width // 2
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (0.0 if y is None else y))
        counts.append(counts[-1] + (y is not None))
    means: list[Point] = []
    for index, (x, y) in enumerate(points):
        # At an end both sides shrink alike, or the mean would lean towards the middle.
        reach = min(half, index, len(points) - 1 - index)
        low, high = index - reach, index + reach + 1
        count = counts[high] - counts[low]
        means.append((x, None if y is None else (sums[high] - sums[low]) / count))
    return means


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about MAX_DRAWN_POINTS points that keep every stretch's lowest and highest value."""
    if len(points) <= MAX_DRAWN_POINTS:
        return list(points)
    stretches = MAX_DRAWN_POINTS // 2
    kept: list[Point] = []
    for number in range(stretches):
        low = number * len(points) // stretches
        high = (number + 1) * len(points) // stretches
        known = [(y, index) for index in range(low, high) if (y := points[index][1]) is not None]
        if not known:
            kept.append(points[low])
            continue
        kept += [points[index] for index in sorted({min(known)[1], max(known)[1]})]
    return kept
