"""One table as text, Markdown and HTML, and numbers as text."""

import pytest

from tidar_common.tables import Table, compact, duration, percent, significant

TABLE = Table(("name", "n", "remark"), [("a|b", "10", "x <y>"), ("long name", "2")], left=(0, 2))


def test_text_is_aligned_and_short_rows_are_filled() -> None:
    assert TABLE.text(" ").splitlines() == [
        " name        n  remark",
        " a|b        10  x <y>",
        " long name   2  –",
    ]
    assert Table((), [("a", "1")]).text() == "a  1"


def test_markdown() -> None:
    assert TABLE.markdown().splitlines() == [
        "| name | n | remark |",
        "| --- | --- | --- |",
        "| a|b | 10 | x <y> |",
        "| long name | 2 | – |",
    ]


def test_html_is_escaped_and_names_rows() -> None:
    html = TABLE.html()
    assert '<th scope="row">long name</th><td>2</td><td class="left">–</td>' in html
    assert "x &lt;y&gt;" in html
    assert '<th scope="col">n</th>' in html
    assert "<thead>" not in Table((), [("a", "1")]).html()


@pytest.mark.parametrize(
    ("count", "text"), [(950, "950"), (1_834_240, "1.83M"), (999_600, "1M"), (1.54e9, "1.54B")]
)
def test_counts_in_three_figures(count: float, text: str) -> None:
    assert compact(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.999, "99.9 %"), (0.0, "0 %"), (0.001, "0.1 %"), (0.5, "50 %")],
)
def test_only_all_is_100_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_four_significant_digits() -> None:
    values = (123456.0, 12345, True, None, "text")
    assert [significant(value) for value in values] == ["1.235e+05", "12,345", "yes", "–", "text"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
