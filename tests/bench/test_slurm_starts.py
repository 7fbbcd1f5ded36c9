"""The measure of starts on Slurm: what it refuses. tests/slurm runs it on a real one."""

import pytest

from bench import private_slurm, slurm_starts
from bench.slurm_starts import main, shown


def test_a_cluster_needs_a_folder_that_its_nodes_see(capsys):
    assert main(["--cluster"]) == 2
    assert capsys.readouterr().err.startswith("error: --folder: has no value; give a new folder")


def test_without_slurm_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(slurm_starts, "missing_programs", lambda: ["slurmctld"])
    monkeypatch.setattr(private_slurm, "missing_programs", lambda: ["slurmctld"])
    assert main(["--results", str(tmp_path)]) == 2
    assert "slurmctld not installed here" in capsys.readouterr().err
    assert private_slurm.main() == 2
    assert "apt-get install slurm-wlm munge" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wait_that_is_over_explains_itself():
    with pytest.raises(TimeoutError, match="not within 0 s:\nthe log"):
        private_slurm.wait_until(lambda: False, 0, lambda: "the log")


def test_a_job_is_shown_in_scontrol_s_words():
    fields = {"JobId": "7", "JobState": "COMPLETED", "Restarts": "2", "ExitCode": "0:0",
              "NumNodes": "2", "UserId": "root(0)"}  # fmt: skip
    assert shown(fields) == "JobId=7 JobState=COMPLETED Restarts=2 ExitCode=0:0 NumNodes=2"
