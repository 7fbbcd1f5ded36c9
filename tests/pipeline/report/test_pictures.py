"""Pictures that stand on pages by themselves."""

import re

from pipeline.report.pictures import heat_map


def test_a_heat_map_says_its_numbers_and_leaves_out_what_was_not_measured() -> None:
    html = heat_map(["100", "<200>"], [[0.5, None], [1.0]])
    shown = re.findall(r"<t[hd][^>]*>([^<]+)</t", html)
    assert shown == ["1", "2", "100", "50%", "&lt;200&gt;", "100%"]
    assert re.findall(r"--share: (\d+%)", html) == ["50%", "100%"]
