"""The charts of a run: which numbers go on which axes, and what the reader should know of them."""

from collections.abc import Sequence

from pipeline.report.read import Row, Run, as_number
from pipeline.report.svg import Chart, Point, Reference, Series
from pipeline.report.wording import percent

MAX_DRAWN_POINTS = 600
TEMPERATURES = ((0.0, "greedy", "greedy", "circle"), (1.0, "T = 1", "sampled", "square"))


def loss_charts(run: Run) -> list[Chart]:
    """Training losses by step, and held-out losses by eval where there are any."""
    series = [
        *smoothed("AR", run.column("loss_ar"), "ar"),
        *smoothed("diffusion", run.column("loss_diffusion"), "diffusion"),
    ]
    charts = [
        Chart(
            "Training loss",
            series,
            "step",
            "nats per token",
            note=f"Faint: every step. Bold: mean over {window(len(run.metrics))} steps around it.",
            references=entropy_line(run),
            x_end=last_step(run),
        )
    ]
    if run.evals:
        charts.append(_heldout_chart(run))
    return charts


def _heldout_chart(run: Run) -> Chart:
    ar = per_eval(run, "ar_loss")
    diffusion = per_eval(run, "diffusion_loss")
    unigram = per_eval(run, "unigram_loss")
    return Chart(
        "Held-out loss",
        [
            Series("AR", ar, "ar", marker="circle"),
            Series("diffusion", diffusion, "diffusion", marker="square"),
            Series("unigram model", unigram, "quiet", dashed=True, marker="ring"),
        ],
        "step",
        "nats per token",
        note="Teacher-forced, on documents never trained on. The unigram model knows only how "
        "frequent each token is in the training text.",
        references=entropy_line(run) if not any(y is not None for _, y in unigram) else (),
        x_end=last_step(run),
    )


def acceptance_charts(run: Run) -> list[Chart]:
    """Acceptance by draft position at the last eval, one chart per temperature."""
    charts = []
    for temperature, words, color, _ in TEMPERATURES:
        row = run.last_eval("tidar", temperature)
        if row is None:
            continue
        series = [
            Series(
                "while decoding", by_position(row, "acceptance_by_position"), color, marker="circle"
            ),
            Series(
                "teacher-forced",
                by_position(row, "teacher_forced_acceptance"),
                color,
                dashed=True,
                marker="ring",
            ),
            Series(
                "unigram draft",
                by_position(row, "unigram_acceptance"),
                "quiet",
                dashed=True,
                marker="square",
            ),
            Series("bigram draft", by_position(row, "bigram_acceptance"), "quiet", marker="ring"),
            Series(
                "draft head without slots",
                by_position(row, "recurrent_acceptance"),
                color,
                dashed=True,
                marker="square",
            ),
        ]
        charts.append(
            Chart(
                f"Acceptance by draft position, {words}",
                series,
                "draft position",
                "share accepted",
                y_range=(0.0, 1.0),
            )
        )
    return charts


def decode_charts(run: Run) -> list[Chart]:
    """Tokens per forward, speed over AR and repetition, by step; none for a run without drafts."""
    limit = f"Between 1 and the block length {run.block_size}. " if run.block_size else ""
    charts = [
        Chart(
            "Tokens per forward",
            _both_temperatures(run, "tokens_per_forward"),
            "step",
            "tokens per forward",
            note=limit + "Prefill counts as a forward.",
            references=[Reference(1.0, "one token per forward (AR)")],
            small=True,
            x_end=last_step(run),
        ),
        Chart(
            "Speed over AR",
            _both_temperatures(run, "speedup_over_ar"),
            "step",
            "× AR tokens/s",
            note="Wall-clock tokens per second of TiDAR over those of AR decoding: same weights, "
            "same prompts, same machine.",
            references=[Reference(1.0, "as fast as AR")],
            y_range=(0.0, None),
            small=True,
            x_end=last_step(run),
        ),
        Chart(
            "Distinct 4-grams",
            _both_temperatures(run, "distinct_4grams"),
            "step",
            "share distinct",
            note="Of the generated text. Text that repeats itself is easy to draft, so tokens per "
            "forward means little where this is low.",
            references=[Reference(0.5, "below: much repetition")],
            y_range=(0.0, 1.0),
            small=True,
            x_end=last_step(run),
        ),
    ]
    return _with_values(charts)


def training_charts(run: Run) -> list[Chart]:
    """Throughput, gradient norm, learning rate, use of the machine and the mask token by step."""
    throughput = run.column("tokens_per_second")
    waiting = share_waiting(run)
    note = "" if waiting is None else f"Waiting for data: {percent(waiting, 1)} of the time."
    charts = [
        Chart(
            "Training throughput",
            smoothed("clean tokens/s", throughput, "ar"),
            "step",
            "tokens/s",
            note=note,
            y_range=(0.0, None),
            small=True,
            x_end=last_step(run),
        ),
        Chart(
            "Gradient norm",
            smoothed("before clipping", run.column("grad_norm"), "ar"),
            "step",
            "L2 norm",
            y_range=(0.0, None),
            small=True,
            x_end=last_step(run),
        ),
        Chart(
            "Learning rate",
            [Series("learning rate", thin(run.column("learning_rate")), "ar")],
            "step",
            "learning rate",
            y_range=(0.0, None),
            small=True,
            x_end=last_step(run),
        ),
        *machine_charts(run),
        Chart(
            "Mask token's embedding",
            [Series("norm", thin(run.column("mask_embedding_norm")), "diffusion")],
            "step",
            "L2 norm",
            small=True,
            x_end=last_step(run),
        ),
    ]
    return _with_values(charts)


def machine_charts(run: Run) -> list[Chart]:
    """Rate of model FLOPs, as a share of the peak where that is known, and memory."""
    utilisation = run.column("mfu")
    known = any(value is not None for _, value in utilisation)
    rate = utilisation if known else run.column("model_tflops")
    memory = [
        (step, None if value is None else value / 2**30)
        for step, value in run.column("peak_memory_bytes")
    ]
    return [
        Chart(
            "Model FLOPs utilisation" if known else "Model FLOPs a second",
            smoothed("a process", rate, "ar"),
            "step",
            "share of the peak" if known else "TFLOP/s",
            y_range=(0.0, None),
            small=True,
            x_end=last_step(run),
        ),
        Chart(
            "Peak memory",
            [Series("rank 0", thin(memory), "ar")],
            "step",
            "GiB",
            y_range=(0.0, None),
            small=True,
            x_end=last_step(run),
        ),
    ]


def _with_values(charts: list[Chart]) -> list[Chart]:
    return [chart for chart in charts if any(series.has_values for series in chart.series)]


def last_step(run: Run) -> float:
    """The common end of every axis of steps, so that charts can be compared by eye."""
    return run.metrics[-1]["step"]


def share_waiting(run: Run) -> float | None:
    """Share of the step time spent waiting for data; None when it was not recorded."""
    waits = [as_number(row.get("data_wait_seconds")) for row in run.metrics]
    steps = [as_number(row.get("step_seconds")) for row in run.metrics]
    pairs = [(w, s) for w, s in zip(waits, steps, strict=True) if w is not None and s is not None]
    total = sum(s for _, s in pairs)
    return sum(w for w, _ in pairs) / total if total > 0 else None


def entropy_line(run: Run) -> list[Reference]:
    """The unigram entropy of the tokenizer's training text as a reference line."""
    values = [as_number(row.get("unigram_entropy")) for row in run.evals]
    known = [value for value in values if value is not None]
    return [Reference(known[-1], f"unigram entropy {known[-1]:.2f}")] if known else []


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
