"""The pictures in docs/figures are what the code says today."""

from pathlib import Path

from tools import figures

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"


def test_committed_pictures_are_what_the_script_draws() -> None:
    drawn = figures.figures()
    committed = {path.name: path.read_text(encoding="utf-8") for path in FIGURES.glob("*.svg")}
    assert committed.keys() == drawn.keys()
    for name, text in drawn.items():
        assert committed[name] == text, f"{name} is out of date; run python -m tools.figures"
