"""The report of a run directory, from the files that a run leaves at different moments."""

import html
import json
import math
import os
import re
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.page import build_report, warnings
from pipeline.report.read import read_run
from tests.pipeline.report.page import page_of
from tests.pipeline.report.written_run import CODE, write_lines, write_run
from tidar_common.errors import UserError


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "demo"))
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
    assert not [
        (tag, name)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in loading and not str(value).startswith("#")
    ]
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base"}
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert "fetch(" not in page.source


def test_all_sections_are_there(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "demo"))
    for heading in (
        "A generation, forward by forward",
        "Tokens per forward",
        "Speed over AR",
        "Distinct 4-grams",
        "Acceptance by draft position, greedy",
        "Acceptance by draft position, T = 1",
        "Training loss",
        "Held-out loss",
        "Training throughput",
        "Model FLOPs a second",
        "Peak memory",
        "Mask token's embedding",
        "Eval at step 300",
    ):
        assert heading in page.headings
    assert sum(tag == "svg" and "aria-label" in a for tag, a in page.tags) == 3 + 2 + 2 + 6
    for said in ("300 of 400 steps", "1.83M parameters", "stage: 2", "of 16 prompts", "100 %"):
        assert said in page.text
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text


def test_it_says_where_the_run_stands(tmp_path: Path) -> None:
    """Of a run that Slurm started three times: saved, crashed, and started again."""
    run_dir = write_run(tmp_path / "demo")
    (run_dir / "checkpoints" / "step-00000290").mkdir(parents=True)
    lines = [
        {"event": "start", "job": "7", "start": 0, "time": 1000.0, "nodes": "n[1-2]"},
        {"event": "end", "job": "7", "start": 0, "time": 4725.0, "code": 75, "why": "saved",
         "checkpoint": "step-00000200", "failed_node": None},
        {"event": "start", "job": "7", "start": 1, "time": 4800.0, "nodes": "n[1-2]"},
        {"event": "end", "job": "7", "start": 1, "time": 4812.0, "code": 1, "why": "crash 1 <b>",
         "checkpoint": "step-00000200", "failed_node": "n2"},
        {"event": "start", "job": "7", "start": 2, "time": 4900.0, "nodes": "n[1,3]"},
    ]  # fmt: skip
    write_lines(run_dir / "starts.jsonl", lines)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    write_lines(run_dir / "metrics.jsonl", [{**row, "step_seconds": 2.0} for row in rows])
    os.utime(run_dir / "metrics.jsonl", (5000.0, 5000.0))
    page = page_of(run_dir)
    assert "Where the run stands" in page.headings
    for said in (
        "300 of 400", "step-00000290", "3: 1 saved and requeued, 1 crashed", "1 h 2 min", "12 s",
        "1970-01-01 00:16:40 UTC", "3 min 20 s",
        "1970-01-01 01:26:40 UTC, without", "crash 1 <b> (first on n2)", "n[1,3]",
        "no end recorded",
    ):  # fmt: skip
        assert said in page.text, said


def test_sources_of_text_are_a_table(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    assert "Held-out text by source" not in page_of(run_dir).headings
    path = run_dir / "evals" / "decode_speed.jsonl"
    own = {"ar_loss": 2.5, "teacher_forced_survival": [0.5, 0.25], "draft_calibration_error": None}
    sources = {"code": own, "w<b>": {"ar_loss": 4.125, "expected_tokens_per_forward": 1.875}}
    rows = [json.loads(line) | {"by_source": sources} for line in path.read_text().splitlines()]
    path.unlink()
    write_lines(path, rows)
    page = page_of(run_dir)
    assert "Held-out text by source" in page.headings
    for said in ("code", "w<b>", "2.500", "4.125", "1.88", "kept up to 2", "0.25"):
        assert said in page.text, said


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "<b>run"))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag in ("demo", "size", "b") for tag, _ in page.tags)
    assert "runs/<demo>" in page.text
    assert "<script>alert('prompt')</script>" in page.prompt


def test_groups_of_tokens_are_those_of_the_example(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    tokens = json.loads((run_dir / "evals" / "example.json").read_text())["tokens"]
    expected = []
    for forward, members in groupby(tokens, key=lambda token: token["forward"]):
        texts = [token["text"] for token in members]
        expected.append((forward, "".join(texts), len(texts)))
    page = page_of(run_dir)
    assert page.groups == expected
    assert "".join(text for _, text, _ in page.groups) == CODE
    classes = [str(a["class"]) for _, a in page.tags if "data-forward" in a]
    assert all(one != other for one, other in pairwise(classes))


def test_warns_that_repetition_inflates_tokens_per_forward(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    assert "only 35 % of its 4-grams are distinct" in page_of(run_dir).text
    path = run_dir / "evals" / "decode_speed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [{**row, "distinct_4grams": 0.8} for row in rows])
    assert "4-grams are distinct" not in page_of(run_dir).text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exact_match_ar": 0.75}, "another text than greedy AR for 25 %"),
        ({"speedup_over_ar": 0.6}, "decoded more slowly than AR here (0.60×)"),
        ({"ar_loss": 6.5}, "not below the unigram entropy"),
        ({"acceptance_by_position": [0.1, 0.1, 0.1]}, "no more often (10 %)"),
        ({"bigram_expected_tokens_per_forward": 3.5}, "a table of token pairs would draft as well"),
    ],
)
def test_warns_of_what_looks_better_than_it_is(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    run_dir = write_run(tmp_path / "demo")
    assert said not in " ".join(warnings(read_run(run_dir)))
    path = run_dir / "evals" / "decode_speed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [{**row, **change} if row["method"] == "tidar" else row for row in rows])
    assert said in " ".join(warnings(read_run(run_dir)))


def test_other_decoders_stand_in_the_table_and_the_chosen_step_answers_a_slow_one(
    tmp_path: Path,
) -> None:
    run_dir = write_run(tmp_path / "demo")
    path = run_dir / "evals" / "decode_speed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    slow = [{**row, "speedup_over_ar": 0.6} if row["method"] == "tidar" else row for row in rows]
    of_tidar = [row for row in rows if row["method"] == "tidar"]
    measured = {
        "queries_per_forward": 12, "seconds_per_decoding_forward": 0.0125,
        "largest_divergence_gap": 0.03, "peak_memory_bytes": 3 * 2**30, "speedup_over_ar": 0.95,
    }  # fmt: skip
    others = [
        {**row, **measured, "method": method, "block_size": 99}
        for row in of_tidar
        for method in ("tidar_chosen", "block_diffusion", "speculative")
    ]
    write_lines(path, slow + others)
    text = page_of(run_dir).text
    assert "The step chosen for this machine decoded at 0.95× the speed of AR." in text
    assert "block length 99" not in text
    assert text.count(f"block length {of_tidar[0]['block_size']}") == 2
    for shown in (
        "TiDAR, chosen step", "block diffusion (not lossless)", "speculative", "12.5", "3.00 GiB",
        "0.03",
    ):  # fmt: skip
        assert shown in text
    # One decodes with the chosen step: where that is fast, its speed is the run's.
    write_lines(path, slow + [{**row, "speedup_over_ar": 1.25} for row in others])
    text = page_of(run_dir).text
    assert "decoded more slowly" not in text
    assert "with the step chosen for it; 0.60× with every mask block; 1.25× at T = 1" in text


def test_ar_run_shows_no_diffusion(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "twin", objective="ar"))
    assert "Training loss" in page.headings
    assert "objective ar" in page.text
    assert not [a for _, a in page.tags if "var(--diffusion)" in str(a.get("style"))]
    assert "AR loss, held out" in page.text
    assert "Acceptance by draft position" not in page.text
    assert "Tokens per forward" not in page.headings
    assert "None" not in page.text


def test_run_without_evals_yet(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "young", evals=False)
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    page = page_of(run_dir)
    assert "No decode-speed eval has been recorded yet." in page.text
    assert "1 of 400 steps" in page.text
    assert not page.groups


def test_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    path = run_dir / "metrics.jsonl"
    os.utime(path, (5000.0, 5000.0))  # the expected end counts from it
    whole = page_of(run_dir).source
    path.write_text(path.read_text() + '{"step": 301, "loss": 4.')
    os.utime(path, (5000.0, 5000.0))
    assert page_of(run_dir).source == whole
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:7], "garbage\n", *lines[8:]]))
    assert "metrics.jsonl: 1 of 300 lines could not be read" in page_of(run_dir).text


def test_damaged_config_and_example_are_named_on_the_page(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    (run_dir / "config.yaml").write_text("a: [1,\n")
    (run_dir / "evals" / "example.json").write_text('{"tokens": [{"text"')
    page = page_of(run_dir)
    assert "config.yaml is not valid YAML" in page.text
    assert "evals/example.json could not be read" in page.text


def test_non_finite_losses_are_gaps(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::9]:
        row.update(loss_ar=math.nan, grad_norm=math.inf)
    write_lines(path, rows)
    drawn = re.findall(r' d="([^"]*)"', page_of(run_dir).source)
    assert drawn
    assert not [path for path in drawn if re.search(r"nan|inf", path)]


def test_repeated_eval_after_a_resume_counts_once(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    path = run_dir / "evals" / "decode_speed.jsonl"
    once = page_of(run_dir).source
    stale = {**json.loads(path.read_text().splitlines()[1]), "tokens_per_forward": 99.0}
    path.write_text(json.dumps(stale) + "\n" + path.read_text())
    assert page_of(run_dir).source == once


def test_two_builds_are_equal_and_leave_one_file(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    before = set(run_dir.iterdir())
    target = build_report(run_dir)
    first = target.read_bytes()
    assert build_report(run_dir).read_bytes() == first
    assert set(run_dir.iterdir()) - before == {target}
    assert target == run_dir / "report.html"


def test_mistakes_are_one_line_and_code_2(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        build_report(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.status", "--report", str(empty)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "metrics.jsonl: does not exist" in done.stderr
    (empty / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(UserError, match="no complete line"):
        build_report(empty)


def test_control_characters_become_visible(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    path = run_dir / "evals" / "example.json"
    text = "\x00\r\n\x1b[0m é 🙂"
    path.write_text(json.dumps({**json.loads(path.read_text()),
                                "tokens": [{"text": text, "forward": 1}]}))  # fmt: skip
    page = page_of(run_dir)
    assert page.groups == [(1, "␀␍\n␛[0m é 🙂", 1)]
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html.unescape(page.source))
