"""The measure of starts on Slurm: what it refuses. tests/slurm runs it on a real one."""

import private_slurm
import pytest
import slurm_starts
from slurm_starts import Jobs, main, shown


def test_it_needs_a_folder_that_its_nodes_see(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: --folder: has no value; give a new folder")


def test_without_slurm_it_says_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(slurm_starts.shutil, "which", lambda name: None)
    assert main(["--folder", str(tmp_path)]) == 2
    assert "start a Slurm here with python tests/private_slurm.py" in capsys.readouterr().err
    monkeypatch.setattr(private_slurm, "missing_programs", lambda: ["slurmctld"])
    assert private_slurm.main() == 2
    assert "apt-get install slurm-wlm munge" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wait_that_is_over_explains_itself(tmp_path):
    with pytest.raises(TimeoutError, match="not within 0 s:\nthe log"):
        private_slurm.wait_until(lambda: False, 0, lambda: "the log")
    (tmp_path / "job-7.out").write_text("its log")
    with pytest.raises(TimeoutError, match="not within 0 s:\nits log"):
        Jobs({}, tmp_path).wait("7", lambda: False, 0)


def test_a_job_is_shown_in_scontrol_s_words():
    fields = {"JobId": "7", "JobState": "COMPLETED", "Restarts": "2", "ExitCode": "0:0",
              "NumNodes": "2", "UserId": "root(0)"}  # fmt: skip
    assert shown(fields) == "JobId=7 JobState=COMPLETED Restarts=2 ExitCode=0:0 NumNodes=2"
