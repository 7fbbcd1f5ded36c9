"""Writes docs/results.md out of bench/results: `python -m tools.results`.

Figures come from the JSON files alone, words from tools/results_template.md. A test compares the
page with what they say today.
"""

import json
import operator
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from bench.experiments.runs import (
    BEST_AT,
    HEADLINE_SEEDS,
    PUBLISHED_AT,
    RUNS,
    STEPS,
    TWINS,
    Run,
)
from tidar_common.tables import MISSING, Table

ROOT = Path(__file__).resolve().parents[1]

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "results.md"
TEMPLATE = ROOT / "tools" / "results_template.md"
Result = dict[str, Any]
Results = dict[str, dict[int, Result]]
"""Of one corpus, by run and seed. A run of another length than most has it in its name, as in
`published-x4`."""
LENGTH = "-x"
"""Before the length, in times that of others."""


def load(folder: Path, corpus: str, study: str = "experiments") -> Results:
    """The results of a study on a corpus; an empty dict where there are none."""
    results: Results = {}
    for path in sorted((folder / study).glob(f"{corpus}-*-seed*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        name = path.stem.removeprefix(f"{corpus}-").rpartition("-seed")[0]
        results.setdefault(name, {})[result["seed"]] = result
    return results


def score(result: Result, block_size: int | None = None) -> Result:
    """The figures at one block length; None takes the first."""
    scores = result["scores"]
    return next(s for s in scores if block_size in (None, s["block_size"]))


def figure(name: str, temperature: str | None = None) -> Callable[[Result], float | None]:
    """Reads a figure of a result, one of the likelihood or of a temperature's decoding; None where
    an older result does not have it."""

    def read(result: Result) -> float | None:
        own = score(result)
        value: float | None = own[name] if temperature is None else own[temperature].get(name)
        return value

    return read


def spread(results: Iterable[Result], read: Callable[[Result], float | None], form: str) -> str:
    """The mean over seeds, with the smallest and largest where there are several."""
    values = [value for value in map(read, results) if value is not None]
    if not values:
        return MISSING
    mean = format(statistics.mean(values), form)
    low, high = format(min(values), form), format(max(values), form)
    return mean if low == high else f"{mean} ({low}–{high})"


def ratio(
    results: Results, over: str, under: str, read: Callable[[Result], float | None]
) -> list[float]:
    """The ratio of two runs' figures for every seed that both have."""
    above, below = results.get(over, {}), results.get(under, {})
    pairs = [(read(above[seed]), read(below[seed])) for seed in sorted(above.keys() & below.keys())]
    return [a / b for a, b in pairs if a is not None and b]


def ratio_text(values: list[float]) -> str:
    if not values:
        return "not measured"
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ({min(values):.3f}–{max(values):.3f}, {len(values)} seeds)"
    return text + (" (one seed)" if len(values) == 1 else "")


def wanted(results: Results, drafted: Results) -> str:
    """What the experiments were set up for, and whether it was reached: drafts by the study of
    draft heads, the quality of the published objective by the first one."""
    bits, loss = figure("bits_per_byte"), figure("ar_loss")
    expected = figure("expected_tokens_per_forward", "sampled")
    rows = []
    for size, least in ((8, 1.8), (16, 2.0)):
        best, base = BEST_AT[size], PUBLISHED_AT[size]
        values = ratio(drafted, best, base, expected)
        what = f"expected tokens per forward at K = {size}, `{best}` ÷ `{base}`, equal compute"
        rows.append(wanted_row(what, f"≥ {least:g}", values, partial(operator.le, least)))
    best = BEST_AT[8]
    for run, twin, source, read in (
        (best, "published", drafted, loss),
        *((best, twin, drafted, loss) for twin in TWINS),
        *(("published", twin, results, bits) for twin in TWINS),
    ):
        what = "AR loss" if read is loss else "bits per byte"
        terms = TWINS.get(twin, "equal compute")
        text = f"held-out {what}, `{run}` ÷ `{twin}`, {terms}"
        rows.append(wanted_row(text, "≤ 1.01", ratio(source, run, twin, read), lambda v: v <= 1.01))
    return Table(["figure", "wanted", "seen", ""], rows).markdown()


def wanted_row(
    what: str, target: str, values: list[float], reached: Callable[[float], bool]
) -> list[str]:
    return [what, target, ratio_text(values), verdict(values, reached)]


def verdict(values: list[float], reached: Callable[[float], bool]) -> str:
    if not values:
        return ""
    if all(map(reached, values)):
        return "reached"
    return "reached on average" if reached(statistics.mean(values)) else "missed"


def headline(results: Results) -> str:
    """Quality and speed of the twins and the published objective."""
    rows = []
    for name in (*TWINS, "published"):
        own = list(results.get(name, {}).values())
        if own:
            bits = spread(own, figure("bits_per_byte"), ".3f")
            rows.append([f"`{name}`", str(len(own)), bits, *speed_cells(own)])
    return Table(
        ["run", "seeds", "bits/byte", "expected tokens/forward", "of a unigram draft",
         "measured T = 0", "measured T = 1", "distinct 4-grams T = 0 / 1",
         "tokens/s ÷ AR T = 0 / 1"],
        rows,
    ).markdown()  # fmt: skip


def speed_cells(own: list[Result]) -> list[str]:
    distinct = " / ".join(
        spread(own[:1], figure("distinct_4grams", t), ".2f") for t in ("greedy", "sampled")
    )
    return [
        spread(own, figure("expected_tokens_per_forward", "sampled"), ".3f"),
        spread(own, figure("unigram_expected_tokens_per_forward", "sampled"), ".2f"),
        spread(own, figure("tokens_per_forward", "greedy"), ".2f"),
        spread(own, figure("tokens_per_forward", "sampled"), ".2f"),
        distinct,
        " / ".join(spread(own, figure("speedup_over_ar", t), ".2f") for t in ("greedy", "sampled")),
    ]


def gpu(folder: Path) -> str:
    """What `bench/gpu_train.sh` found where it was run."""
    path = folder / "gpu_train-cuda.json"
    if not path.is_file():
        return "It has not been run yet: no figure of this project comes from a GPU."
    found = json.loads(path.read_text(encoding="utf-8"))
    bits = {name: own["bits_per_byte"] for name, own in found["likelihood"].items()}
    rows = [
        [row["method"], f"{row['temperature']:g}", f"{row['tokens_per_forward']:.2f}",
         f"{row['speedup_over_ar']:.2f}", number(row["distinct_4grams"], ".2f"),
         f"{row['ar_loss']:.3f}", number(row["unigram_expected_tokens_per_forward"], ".2f"),
         number(row.get("bigram_expected_tokens_per_forward"), ".2f")]
        for row in found["decode_speed"]
    ]  # fmt: skip
    quality = (
        f"{found['machine']['gpu']}, torch {found['machine']['torch']}, {found['date'][:10]}: "
        f"held-out bits per byte {bits['tidar']:.3f}, AR twin {bits['twin']:.3f}, ratio "
        f"{found['bits_per_byte_over_twin']:.3f} (≤ 1.01 wanted)."
    )
    head = ["method", "T", "tokens/forward", "tokens/s ÷ AR", "distinct 4-grams", "AR loss",
            "unigram T/F", "bigram T/F"]  # fmt: skip
    return f"{quality}\n\n{Table(head, rows).markdown()}"


def recipes(results: Results) -> str:
    """Every run of the first seed, and the same at each block length for mixed ones."""
    seed = HEADLINE_SEEDS[0]
    rows = []
    for run in RUNS:
        result = results.get(run.name, {}).get(seed)
        if result is None:
            continue
        for own in result["scores"]:
            k = own["block_size"]
            sampled = own["sampled"]
            rows.append(
                [
                    f"`{run.name}`",
                    run.about + (f", decoded at K = {k}" if len(result["scores"]) > 1 else ""),
                    f"{result['clean_tokens'] / 1e6:.2f}",
                    f"{own['ar_loss']:.3f}",
                    f"{own['bits_per_byte']:.3f}",
                    number(sampled["expected_tokens_per_forward"], ".3f"),
                    number(sampled["unigram_expected_tokens_per_forward"], ".2f"),
                ]
            )
    return Table(
        ["run", "what", "M tokens", "AR loss", "bits/byte", "T/F", "unigram T/F"],
        rows,
    ).markdown()  # fmt: skip


def drafts(results: Results) -> str:
    """Runs with a draft head beside the published objective at their block length and their length
    of training: every figure with its controls, and ratios seed by seed."""
    if not results:
        return "Not run yet."
    lengths = sorted({name.partition(LENGTH)[2] for name in results}, key=lambda x: float(x or 1))
    rows = [
        drafts_row(run, f"{LENGTH}{length}" if length else "", results)
        for length in lengths
        for run in RUNS
        if is_of_drafts(run) and run.name + (f"{LENGTH}{length}" if length else "") in results
    ]
    return Table(
        ["run", "K", "seeds", "expected tokens/forward", "greedy", "without slots", "bigram",
         "unigram", "÷ `published` at this K", "AR loss ÷"],
        rows,
    ).markdown()  # fmt: skip


def is_of_drafts(run: Run) -> bool:
    """Whether it has a draft head, or is what those with one are compared with."""
    head = any(word.startswith("model.draft_rank") for word in run.overrides)
    return head or run.name in PUBLISHED_AT.values()


def drafts_row(run: Run, length: str, results: Results) -> list[str]:
    """The cells of a run of that length."""
    read = figure("expected_tokens_per_forward", "sampled")
    by_seed = list(results[run.name + length].values())
    size = score(by_seed[0])["block_size"]
    base = PUBLISHED_AT[size]
    ratios = [
        ratio_text(ratio(results, run.name + length, base + length, figures))
        for figures in (read, figure("ar_loss"))
    ]
    times = f", {length.removeprefix(LENGTH)} times as long" if length else ""
    controls = [
        spread(by_seed, figure(f"{name}_expected_tokens_per_forward", "sampled"), ".2f")
        for name in ("recurrent", "bigram", "unigram")
    ]
    return [
        f"`{run.name}`: {run.about}{times}", str(size), str(len(by_seed)),
        spread(by_seed, read, ".2f"),
        spread(by_seed, figure("expected_tokens_per_forward", "greedy"), ".2f"),
        *controls, *(["1", "1"] if run.name == base else ratios),
    ]  # fmt: skip


def number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def missing(*studies: Results) -> str:
    """Which runs have no result in any study yet."""
    absent: dict[str, list[str]] = {}
    for seed in HEADLINE_SEEDS:
        for run in RUNS:
            wanted_here = run.headline or seed == HEADLINE_SEEDS[0]
            if wanted_here and not any(seed in study.get(run.name, {}) for study in studies):
                absent.setdefault(run.name, []).append(str(seed))
    if not absent:
        return "All runs are here."
    runs = "; ".join(f"`{name}` {', '.join(seeds)}" for name, seeds in absent.items())
    return f"Not run yet, by seed: {runs}."


TEXTS = {
    "stdlib": "the standard library of Python",
    "installed": "the standard library and of the packages that this project installs, Python",
}


def origin(results: Results) -> str:
    """Text, machine, versions and dates of the experiments."""
    every = [result for by_seed in results.values() for result in by_seed.values()]
    first = every[0]
    machine = first["machine"]
    dates = sorted(result["date"][:10] for result in every)
    seconds = sum(result["training_seconds"] for result in every)
    packages = ", ".join(f"{name} {version}" for name, version in first["packages"].items())
    loads = [result["machine"]["load_average"] for result in every]
    return (
        f"{text_of(first['corpus'])}\n\n"
        f"Machine: {machine['cpu']}, {machine['cores']} cores of which a run had one thread, "
        f"Python {machine['python']}, {packages}. {len(every)} runs, {seconds / 3600:.1f} hours "
        f"of training, {dates[0]} to {dates[-1]}. Other work kept the cores busy (load average "
        f"{min(loads):.0f} to {max(loads):.0f}), so times of these runs say nothing; tokens per "
        "forward do not depend on them."
    )


def text_of(corpus: dict[str, Any]) -> str:
    """Files, and what was held out of them."""
    return (
        f"Text: {corpus['documents']:,} files of {TEXTS[corpus['corpus']['name']]} "
        f"{corpus['python']}; {corpus['heldout_documents']} of them held out, after "
        f"{corpus['heldout_dropped']} more were dropped because over "
        f"{corpus['most_shared']:.0%} of their {corpus['ngram']}-grams of words stand in training "
        f"files. Of those that stayed, {corpus['heldout_ngrams_shared']:.1%} do."
    )


def larger(results: Results) -> str:
    """The runs on the larger corpus, with the two ratios of the first table."""
    if not results:
        return "`python -m bench.experiments --corpus installed` has not been run yet."
    bits = figure("bits_per_byte")
    above = {
        what: ratio_text(ratio(results, "published", twin, bits)) for twin, what in TWINS.items()
    }
    compared = ", ".join(f"{value} at {what}" for what, value in above.items())
    first = next(iter(results["published"].values()))
    command = f"python -m bench.experiments --corpus installed --scale {first['steps'] / STEPS:g}"
    return (
        f"{text_of(first['corpus'])} `published` has {first['steps']} steps here "
        f"(`{command}`).\n\n"
        f"Held-out bits per byte, `published` ÷ AR twin: {compared}.\n\n{recipes(results)}"
    )


def benchmarks(folder: Path) -> str:
    """Ratios of the other benchmarks that have a target."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, value in content.get("ratios", {}).items():
            if "at_most" not in value and "at_least" not in value:
                continue
            own = value["cpu" if path.stem.endswith("-cpu") else "wall"]
            low, high = own["per_round"]["min"], own["per_round"]["max"]
            most, least = value.get("at_most", float("inf")), value.get("at_least", 0.0)
            reached = least <= own["of_medians"] <= most
            target = f"≤ {most:g}" if "at_most" in value else f"≥ {least:g}"
            rows.append(
                [f"`{path.stem}`", name, target, f"{own['of_medians']:.3f}",
                 f"{low:.3f}–{high:.3f}", "reached" if reached else "missed"]
            )  # fmt: skip
    return Table(["file", "ratio", "wanted", "seen", "over rounds", ""], rows).markdown()


def reliability(folder: Path) -> str:
    """What the runs that were killed on purpose showed."""
    path = folder / "reliability-cpu.json"
    if not path.is_file():
        return "Not measured."
    found = json.loads(path.read_text(encoding="utf-8"))["figures"]
    kills = found["kills survived"]
    equal = "bit-equal" if found["bit-equal to the run left alone"] else "not equal"
    return (
        f"A run killed {kills} times at chosen moments came out {equal} to one left alone; "
        f"{found['damaged files refused']} of {found['damaged files tried']} damaged checkpoint "
        f"files and {found['bad inputs refused']} of {found['bad inputs tried']} malicious ones "
        "were refused ([promises](training.md#promises))."
    )


def conversion(folder: Path) -> str:
    """How a real model learned to draft with its base frozen, and how it then decodes."""
    path = folder / "conversion-cpu.json"
    if not path.is_file():
        return "Not measured."
    found = json.loads(path.read_text(encoding="utf-8"))
    kinds = ("slots", "alone", "bigram", "unigram")
    rows = [
        [f"{point['tokens']:,}", f"{point['minutes']:.0f}",
         *(" / ".join(f"{point[t][kind]:.2f}" for t in ("sampled", "greedy")) for kind in kinds),
         f"{point['ar_loss']:.4f}"]
        for point in found["points"]
    ]  # fmt: skip
    head = ["tokens seen", "minutes", "slots and head", "head alone", "bigram", "unigram",
            "AR loss"]  # fmt: skip
    decoded = [
        [row["method"], f"{row['temperature']:g}", f"{row['tokens_per_forward']:.2f}",
         f"{row['speedup_over_ar']:.2f}",
         "–" if row["temperature"] else f"{row['exact_match_ar']:.0%} of {row['prompts']}"]
        for row in found["decoding"]
    ]  # fmt: skip
    machine = found["machine"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores of which the run had one thread, Python "
        f"{machine['python']}, torch {machine['torch']}, {found['date'][:10]}. Other work kept the "
        "cores busy, so minutes and speeds are rough; tokens per forward do not depend on them."
    )
    commands = "\n".join(found["commands"])
    decoding = Table(
        ["method", "T", "tokens/forward", "tokens/s ÷ AR", "text equal to AR's"], decoded
    ).markdown()
    return f"```\n{commands}\n```\n\n{Table(head, rows).markdown()}\n\n{decoding}\n\n{where}"


def findings(results: Results) -> str:
    """What each recipe changed against the published one, seed by seed, most first."""
    read = figure("expected_tokens_per_forward", "sampled")
    lines = []
    for run in RUNS:
        gains = ratio(results, run.name, "published", read)
        losses = ratio(results, run.name, "published", figure("ar_loss"))
        if run.name != "published" and gains and run.start and not run.score_at:
            row = [f"`{run.name}`", str(len(gains)), change(gains), change(losses)]
            lines.append((statistics.mean(gains), row))
    return Table(
        ["against `published`, equal compute", "seeds", "expected tokens/forward", "AR loss"],
        [row for _, row in sorted(lines, reverse=True)],
    ).markdown()


def change(ratios: list[float]) -> str:
    """The mean of ratios as a change in percent, with its range where there are several."""
    text = f"{statistics.mean(ratios) - 1:+.1%}"
    if len(ratios) > 1:
        text += f" ({min(ratios) - 1:+.1%}, {max(ratios) - 1:+.1%})"
    return text


def page(folder: Path = RESULTS) -> str:
    """The whole page."""
    results, drafted = load(folder, "stdlib"), load(folder, "stdlib", "drafts")
    filled = {
        "wanted": wanted(results, drafted),
        "headline": headline(results),
        "findings": findings(results),
        "drafts": drafts(drafted),
        "recipes": recipes(results),
        "missing": missing(results, drafted),
        "larger": larger(load(folder, "installed")),
        "origin": origin(results),
        "drafts_origin": origin(drafted),
        "benchmarks": benchmarks(folder),
        "gpu": gpu(folder),
        "conversion": conversion(folder),
        "reliability": reliability(folder),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, part in filled.items():
        text = text.replace("{{" + name + "}}", part)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
