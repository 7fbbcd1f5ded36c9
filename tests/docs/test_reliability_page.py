"""Every test that docs/training.md names as a proof of a promise exists."""

import re

from documented import ROOT, section

PROMISES = section(ROOT / "docs" / "training.md", "Promises")


def test_the_named_tests_exist():
    files = {path.name: path.read_text() for path in ROOT.glob("tests/**/test_*.py")}
    named, current = 0, None
    for file, test in re.findall(r"`(?:[\w/]*?(test_\w+\.py))?(?:::)?(test_\w+)?`", PROMISES):
        current = file or current
        if not current:
            continue
        assert current in files, f"{current} does not exist"
        if test:
            named += 1
            assert f"def {test}(" in files[current], f"{current} has no {test}"
    assert named >= 20


def test_every_promise_names_a_proof():
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        promise, proof = [cell for cell in re.split(r"(?<!`)\|", row) if cell.strip()][:2]
        assert re.search(r"test_\w+|bench\.reliability|the same test", proof), promise
