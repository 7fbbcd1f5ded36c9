"""The messages and exit codes that docs/cluster.md explains are those of the code."""

import re

import pytest
from documented import ROOT, section

from tidar_common.run_files import Exit

FOREIGN = {"CUDA out of memory", "data_wait_seconds", "invalid device ordinal"}
"""What torch and CUDA say, and a key of metrics.jsonl."""
FIRST_CELLS = re.findall(
    r"^\| `([^`]+)`", section(ROOT / "docs" / "cluster.md", "Troubleshooting"), re.MULTILINE
)
MESSAGES = sorted(set(FIRST_CELLS) - FOREIGN - {"loss_diffusion"})


@pytest.fixture(scope="module")
def code() -> str:
    """All sources as one text, string literals that are continued on the next line joined."""
    files = [
        p
        for name in ("tidar_common", "data_prep", "pipeline", "slurm")
        for p in (ROOT / name).rglob("*.*")
    ]
    kinds = (".py", ".sh", ".sbatch")
    text = "\n".join(p.read_text(encoding="utf-8") for p in files if p.suffix in kinds)
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message, code):
    assert message in code


def test_exit_codes_are_those_of_all_commands():
    table = section(ROOT / "docs" / "cluster.md", "What a job does").partition("| exit code |")[2]
    cells = re.findall(r"^\| ([\d, ]+)(?: and others)? \|", table, re.MULTILINE)
    assert [int(code) for cell in cells for code in cell.split(",")] == list(Exit)


def test_job_scripts_spell_the_code_of_a_saved_run_as_it_is():
    for script in ("slurm/train.sbatch", "bench/gpu_train.sh"):
        spelled = re.search(
            r"^(?:readonly )?SAVED=(\d+)", (ROOT / script).read_text(), re.MULTILINE
        )
        assert spelled is not None
        assert int(spelled[1]) == Exit.SAVED


def test_many_are_explained():
    assert len(MESSAGES) >= 20
