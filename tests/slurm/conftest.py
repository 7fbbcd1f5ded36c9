"""One Slurm for all tests here, and a small prepared corpus, prepared by its own job script."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_slurm import Cluster, missing_programs, read

ROOT = Path(__file__).parents[2]
PREPARE = (
    "corpus.max_bytes=200000",
    "sequence_length=32",
    "tokenizer.vocab_size=400",
    "layout.block_size=4",
    "heldout_fraction=0.2",
    "task_bytes=20000",
)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        reason = f"SLURM TESTS DID NOT RUN: {', '.join(missing)} not installed; run .ci/run, or "
        reason += "apt-get install slurm-wlm munge"
        # On the terminal itself, since a skip among many passes is not seen.
        print(f"\n*** {reason} ***", file=sys.__stderr__, flush=True)
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Submit:
    """Submits the checkout's own job scripts; logs go to a folder of the test's."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder

    def __call__(
        self,
        script: str,
        *arguments: str,
        nodes: int = 1,
        options: tuple[str, ...] = (),
        output: str = "job-%j.out",
        **environment: str,
    ) -> str:
        """Submit `script` with its arguments and sbatch's `options`; returns the job's number."""
        output = self.cluster.run(
            "sbatch",
            "--parsable",
            f"--chdir={ROOT}",
            f"--nodes={nodes}",
            f"--output={self.folder}/{output}",
            *options,
            str(ROOT / "slurm" / script),
            *arguments,
            **{**self.environment, **environment},
        )
        return output.strip()

    def checked(self, *arguments: str) -> str:
        """The same by slurm/submit.sh, options of sbatch included; returns all that it printed."""
        return self.cluster.run(
            str(ROOT / "slurm" / "submit.sh"),
            "--parsable",
            f"--output={self.folder}/job-%j.out",
            *arguments,
            **self.environment,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What a user would have set in cluster.env."""
        return {
            "SLURM_SUBMIT_DIR": str(ROOT),
            "TIDAR_CLUSTER_ENV": "slurm/cluster.env.example",
            "TIDAR_PYTHON": sys.executable,
            "TIDAR_INTERFACE": "lo",
            "TIDAR_LOGS": str(self.folder),
            "OMP_NUM_THREADS": "1",
        }

    def log_path(self, job: str) -> Path:
        return self.folder / f"job-{job}.out"

    def log(self, job: str) -> str:
        return read(self.log_path(job))

    def wait(self, job: str, timeout_s: float) -> dict[str, str]:
        """The job's fields once it has ended."""
        return self.cluster.wait_for_end(job, timeout_s, self.log_path(job))


@pytest.fixture
def submit(slurm, tmp_path) -> Submit:
    return Submit(slurm, tmp_path)


@pytest.fixture(scope="session")
def prepared(slurm, tmp_path_factory) -> tuple[Path, str]:
    """A data folder written by prepare.sbatch, and that job's log."""
    folder = tmp_path_factory.mktemp("prepared")
    submit = Submit(slurm, folder)
    job = submit("prepare.sbatch", *PREPARE, f"output_dir={folder / 'data'}")
    fields = submit.wait(job, 90)
    assert fields["JobState"] == "COMPLETED", submit.log(job)
    return folder / "data", submit.log(job)
