"""The pictures in docs/figures are what the code says today."""

import importlib.util
from pathlib import Path

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"


def test_committed_pictures_are_what_the_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("draw_figures", FIGURES / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    drawn = draw.figures()
    committed = {path.name: path.read_text(encoding="utf-8") for path in FIGURES.glob("*.svg")}
    assert committed.keys() == drawn.keys()
    for name, text in drawn.items():
        assert committed[name] == text, f"{name} is out of date; run python docs/figures/draw.py"
