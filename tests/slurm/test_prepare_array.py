"""A preparation that two jobs of an array share, of which one is killed at work."""

from conftest import PREPARE
from private_slurm import wait_until


def contents(folder) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_killed_task_is_redone_and_the_bytes_are_those_of_one_job(
    prepared, submit, slurm, tmp_path
):
    data = tmp_path / "data"
    array = submit(
        "prepare.sbatch", *PREPARE, f"output_dir={data}", options=("--array=0-1",),
        output="job-%a.out",
    )  # fmt: skip
    killed = f"{array}_1"

    def logs() -> str:
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("job-*.out")))

    def states() -> list[str]:
        lines = slurm.run("scontrol", "--oneliner", "show", "job", array).splitlines()
        fields = [dict(w.split("=", 1) for w in line.split() if "=" in w) for line in lines]
        return [f["JobState"] for f in sorted(fields, key=lambda f: f.get("ArrayTaskId", "9"))]

    def at_work() -> bool:
        path = tmp_path / "job-1.out"
        return path.is_file() and "prepare.sbatch: job" in path.read_text()

    wait_until(at_work, 60, logs)
    slurm.run("scancel", "--signal=KILL", "--full", killed)
    wait_until(lambda: states()[1] in ("FAILED", "CANCELLED"), 60, logs)
    wait_until(lambda: states()[0] not in ("RUNNING", "PENDING"), 60, logs)
    assert not (data / "manifest.json").exists(), "a share is missing"
    slurm.run("scontrol", "requeue", killed)
    wait_until(lambda: states()[1] == "COMPLETED", 90, logs)
    assert states() == ["COMPLETED", "COMPLETED"], logs()
    assert contents(data) == contents(prepared[0])
