"""`tidar-status --compare`: what it finds, and its exit codes."""

import json
from pathlib import Path

import pytest

from pipeline.report.compare import compare
from pipeline.status import main


def write(folder: Path, losses: list[float], digest: str = "d", seconds: float = 1.0) -> Path:
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            row = {"step": step, "loss": loss, "step_seconds": seconds, "data_digest": digest}
            file.write(json.dumps(row) + "\n")
    return folder


def test_equal_runs_are_equal_whatever_the_clock_says(tmp_path, capsys):
    a = write(tmp_path / "a", [3.0, 2.0])
    b = write(tmp_path / "b", [3.0, 2.0], seconds=9.0)
    assert main(["--compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out == (
        f"{a} and {b}\n2 common steps\nbit-equal in every key but the clock's\nthe same data\n"
    )


def test_the_first_and_the_largest_difference_are_named(tmp_path, capsys):
    a = write(tmp_path / "a", [4.0, 4.0, 4.0, 1.0])
    b = write(tmp_path / "b", [4.0, 4.0 + 2**-40, 5.0], digest="e")
    assert main(["--compare", str(a), str(b), "--plot", str(tmp_path / "page.html")]) == 1
    output = capsys.readouterr().out
    assert "1 steps only in the first run, from 4" in output
    assert "first differing step 1 (data_digest)" in output
    assert "largest relative difference of loss: 0.25 at step 3" in output
    assert "different data from step 1 on" in output
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert compare(a, b, "loss").first_differing == 1


@pytest.mark.parametrize(("tolerance", "code"), [("0.1", 0), ("0.01", 1)])
def test_a_tolerance_allows_rounding_but_no_other_data(tmp_path, tolerance, code):
    a = write(tmp_path / "a", [4.0, 4.0])
    b = write(tmp_path / "b", [4.0, 4.1])
    assert main(["--compare", str(a), str(b), "--tolerance", tolerance]) == code
    other = write(tmp_path / "c", [4.0, 4.1], digest="e")
    assert main(["--compare", str(a), str(other), "--tolerance", tolerance]) == 1


def test_mistakes_are_one_line(tmp_path, capsys):
    a = write(tmp_path / "a", [4.0])
    assert main(["--compare", str(a), str(tmp_path / "nothing")]) == 2
    assert "metrics.jsonl: cannot be read" in capsys.readouterr().err
    assert main(["--compare", str(a), str(a), "--key", "lost"]) == 2
    assert "metrics.jsonl:1: has no number 'lost'; choose another with" in capsys.readouterr().err
    assert main(["--compare", str(a)]) == 2
    assert "--compare: give two runs or more" in capsys.readouterr().err


def test_each_of_several_runs_is_compared_with_the_first(tmp_path, capsys):
    runs = [
        str(write(tmp_path / name, [4.0, loss]))
        for name, loss in zip("abc", (2, 2, 3), strict=True)
    ]
    assert main(["--compare", *runs[:2]]) == 0
    assert main(["--compare", *runs]) == 1
    out = capsys.readouterr().out
    assert f"{runs[0]} and {runs[2]}\n2 common steps\nfirst differing step 2 (loss)" in out
