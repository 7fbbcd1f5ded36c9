"""The report of a run directory, from the files that a run leaves at different moments."""

import html
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from pipeline.report import build_report

STEPS, EVAL_EVERY, BLOCK_SIZE = 300, 100, 4
CODE = (
    '    def read(self, size=-1):\n        """Read <size> & more."""\n\tif size < 0:\n'
    '            return self.raw.readall()\n        return b"".join(self._chunks(size))\n\n'
    "    def close(self):\n        if not self.closed:\n            self.flush()\n"
    "        raise ValueError('I/O operation on closed file')\n"
)


def write_run(path: Path, *, objective: str = "tidar", evals: bool = True, seed: int = 0) -> Path:
    """A run directory like a small model's after `STEPS` steps."""
    rng = random.Random(seed)
    (path / "evals").mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"run_dir: runs/<demo>\nsteps: 400\nseed: 0\n"
        f"objective:\n  name: {objective}\n  alpha: 1.0\n"
        "model:\n  hidden_size: 160\n  num_layers: 6\n  parameters: 1834240\n"
        f"layout:\n  block_size: {BLOCK_SIZE}\ndeepspeed:\n  zero_optimization:\n    stage: 2\n"
    )
    write_lines(path / "metrics.jsonl", [metric(s, objective, rng) for s in range(1, STEPS + 1)])
    if evals:
        at = range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)
        rows = [row for step in at for row in eval_rows(step, objective, rng)]
        write_lines(path / "evals" / "decode_speed.jsonl", rows)
        if objective == "tidar":
            (path / "evals" / "example.json").write_text(json.dumps(example(rng)))
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metric(step: int, objective: str, rng: random.Random) -> dict[str, Any]:
    ar = 3.7 + 3.3 * math.exp(-step / 70) + rng.gauss(0, 0.06)
    diffusion = 5.0 + 2.1 * math.exp(-step / 90) + rng.gauss(0, 0.05)
    tidar = objective == "tidar"
    return {
        "step": step,
        "loss": (ar + diffusion) / 2 if tidar else ar,
        "loss_ar": ar,
        "loss_diffusion": diffusion if tidar else None,
        "learning_rate": 2e-3 * min(1, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / 400)),
        "grad_norm": 0.6 + 2 * math.exp(-step / 30) + abs(rng.gauss(0, 0.1)),
        "tokens": 4096 * step,
        "tokens_per_second": 2900 + rng.gauss(0, 90) - (900 if step == 1 else 0),
        "sequences_seen": 16 * step,
        "data_digest": f"{rng.getrandbits(64):016x}",
        "step_seconds": 1.4,
        "data_wait_seconds": 0.004,
        "model_tflops": 0.02 + rng.gauss(0, 0.001),
        "mfu": None,
        "peak_memory_bytes": 3 * 2**28 + 2**20 * step,
        "mask_embedding_norm": 0.45 + step / 4000 if tidar else None,
    }


def eval_rows(step: int, objective: str, rng: random.Random) -> list[dict[str, Any]]:
    progress = step / STEPS
    shared = {
        "step": step,
        "block_size": BLOCK_SIZE,
        "prompts": 16,
        "tokens": 1024,
        "ar_loss": 5.2 - 1.3 * progress,
        "diffusion_loss": 6.0 - 0.8 * progress if objective == "tidar" else None,
        "unigram_entropy": 6.31,
        "unigram_loss": 6.40,
    }
    rows = []
    for temperature in (0.0, 1.0):
        common = {**shared, "temperature": temperature, "distinct_4grams": 0.35 + 0.3 * temperature}
        rows.append(
            {
                **common,
                "method": "ar",
                "forwards": 1024,
                "tokens_per_forward": 1.0,
                "tokens_per_second": 210.0,
                "speedup_over_ar": 1.0,
                "exact_match_ar": 1.0 if temperature == 0 else None,
                "acceptance_by_position": None,
                "teacher_forced_acceptance": None,
                "unigram_acceptance": None,
            }
        )
        if objective == "ar":
            continue
        first = 0.2 + 0.5 * progress - 0.15 * temperature + rng.uniform(0, 0.02)
        rate = 1 + first + first**2
        rows.append(
            {
                **common,
                "method": "tidar",
                "forwards": round(1024 / rate),
                "tokens_per_forward": rate,
                "tokens_per_second": 210.0 * rate * 0.55,
                "speedup_over_ar": rate * 0.55,
                "exact_match_ar": 1.0 if temperature == 0 else None,
                "acceptance_by_position": [first, first * 0.9, None if step == 100 else 0.4],
                "teacher_forced_acceptance": [first - 0.08, first * 0.75, first * 0.6],
                "unigram_acceptance": [0.12 + 0.1 * temperature] * 3,
            }
        )
    return rows


def example(rng: random.Random) -> dict[str, Any]:
    """Pieces of code as tokens; the first forward gives one, every further one 1 … K."""
    pieces = re.findall(r"\w{1,5}|\s{4}|\s|[^\w\s]{1,2}", CODE)
    assert "".join(pieces) == CODE
    tokens, forward, left = [], 1, 1
    for piece in pieces:
        if left == 0:
            forward, left = forward + 1, rng.choice([1, 1, 2, 2, 3, 4])
        tokens.append({"text": piece, "forward": forward})
        left -= 1
    return {
        "step": STEPS,
        "prompt": "class Reader(io.RawIOBase):\n    # <script>alert('prompt')</script>\n",
        "method": "tidar",
        "temperature": 0.0,
        "tokens_per_forward": len(tokens) / forward,
        "tokens": tokens,
        "block_size": BLOCK_SIZE,
    }


class Page(HTMLParser):
    """What a browser would see: tags, text by section, and the example's groups."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.groups: list[tuple[int, str, int]] = []
        """(forward, text, tokens)"""
        self.prompt = ""
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag in self.VOID or self.get_starttag_text().endswith("/>"):
            return
        self.open.append((tag, attributes))
        if "data-forward" in attributes:
            self.groups.append((int(attributes["data-forward"] or -1), "", 0))
        if attributes.get("class") == "token":
            forward, text, tokens = self.groups[-1]
            self.groups[-1] = (forward, text, tokens + 1)

    def handle_endtag(self, tag: str) -> None:
        if not self.get_starttag_text() or not self.open:
            raise AssertionError(f"</{tag}> without a start")
        opened, _ = self.open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = [attributes for _, attributes in self.open]
        names = [tag for tag, _ in self.open]
        if any("data-forward" in attributes for attributes in inside):
            forward, text, tokens = self.groups[-1]
            self.groups[-1] = (forward, text + data, tokens)
        elif any(attributes.get("class") == "prompt" for attributes in inside):
            self.prompt += data
        if "h2" in names or "h3" in names:
            self.headings.append(data)
        if "script" not in names and "style" not in names:
            self.text += data


def page_of(run_dir: Path) -> Page:
    return Page(build_report(run_dir).read_text(encoding="utf-8"))


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "demo"))
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
    assert not [
        (tag, name) for tag, attributes in page.tags for name in attributes if name in loading
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
    assert sum(tag == "svg" and "aria-label" in a for tag, a in page.tags) == 3 + 2 + 2 + 6 + 1
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
    ],
)
def test_warns_of_what_looks_better_than_it_is(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    run_dir = write_run(tmp_path / "demo")
    assert said not in page_of(run_dir).text
    path = run_dir / "evals" / "decode_speed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [{**row, **change} if row["method"] == "tidar" else row for row in rows])
    assert said in page_of(run_dir).text


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
        "largest_divergence_gap": 0.03, "peak_memory_bytes": 3 * 2**30, "speedup_over_ar": 1.25,
    }  # fmt: skip
    others = [
        {**row, **measured, "method": method, "block_size": 99}
        for row in of_tidar
        for method in ("tidar_chosen", "block_diffusion", "speculative")
    ]
    write_lines(path, slow + others)
    text = page_of(run_dir).text
    assert "The step chosen for this machine decoded at 1.25× the speed of AR." in text
    assert "block length 99" not in text
    assert text.count(f"block length {of_tidar[0]['block_size']}") == 2
    for shown in (
        "TiDAR, chosen step", "block diffusion (not lossless)", "speculative", "12.5", "3.00 GiB",
        "0.03",
    ):  # fmt: skip
        assert shown in text


def test_ar_run_shows_no_diffusion(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "twin", objective="ar"))
    assert "Training loss" in page.headings
    assert "objective ar" in page.text
    assert not [a for _, a in page.tags if "diffusion" in str(a.get("class")).split()]
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
        [sys.executable, "-m", "pipeline.report", str(empty)], capture_output=True, text=True
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
