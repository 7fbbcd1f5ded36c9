"""A real Slurm on this host: munged, slurmctld and two slurmd in folders and ports of their own.

    python tests/private_slurm.py        starts one, says how to use it, ends it at Ctrl-C

For the tests, and for trying the job scripts and docs/cluster.md without a cluster. Needs Debian's
slurm-wlm and munge, and changes nothing outside its folder.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
NODES = ("n1", "n2")
START_TIMEOUT_S = 30
RUNNING_STATES = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}
# cred_expire: a requeued job waits for its old credential to expire, two minutes by default.
CONFIG = """\
ClusterName=tidar
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
JobRequeue=1
KillWait=5
ReturnToService=2
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of slurm-wlm and munge that are not installed."""
    return [name for name in PROGRAMS if find(name) is None]


def find(name: str) -> str | None:
    """The path of a program; daemons are in sbin, which users may not have on their path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclass
class Cluster:
    """Two nodes, `n1` and `n2`; `start` before use, `stop` at the end."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """For Slurm's commands: this cluster, and none of the settings of the caller's."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SBATCH_", "SLURM_"))}
        return {**own, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        self.folder.chmod(0o755)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        config = CONFIG.format(
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            folder=self.folder,
            ports=free_ports(3),
        )
        (self.folder / "slurm.conf").write_text(config)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file")]
        munge += [f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *munge)
        wait_until(lambda: (self.folder / "munge.socket").exists(), START_TIMEOUT_S, self.tail)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(self._idle, START_TIMEOUT_S, self.tail)

    def stop(self) -> None:
        """End all jobs, then the daemons, the ones started last first."""
        self.run("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 20
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_end(self, number: str, timeout_s: float, log: Path) -> dict[str, str]:
        """The job's fields once it is neither waiting nor running."""

        def ended() -> bool:
            return self.job(number)["JobState"] not in RUNNING_STATES

        wait_until(ended, timeout_s, lambda: f"{self.job(number)}\n{read(log)}\n{self.tail()}")
        return self.job(number)

    def tail(self) -> str:
        """The last lines of the daemons' logs."""
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"--- {log.name}\n{read(log)[-2000:]}" for log in logs)

    def _daemon(self, name: str, *arguments: str) -> None:
        program = find(name)
        if program is None:
            raise FileNotFoundError(f"{name}: not installed")
        with (self.folder / f"{name}-{len(self.daemons)}.out").open("w") as out:
            self.daemons.append(
                subprocess.Popen(
                    [program, *arguments], env=self.environment, stdout=out, stderr=out
                )
            )

    def _idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).split("\n")
        return sum(line.endswith(" idle") for line in states) == len(NODES)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_until(condition: Callable[[], bool], timeout_s: float, explain: Callable[[], str]) -> None:
    """Poll until `condition()`; raises TimeoutError with `explain()` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s:\n{explain()}")
        time.sleep(0.25)


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def main() -> int:
    missing = missing_programs()
    if missing:
        print(
            f"error: {', '.join(missing)} not installed; apt-get install slurm-wlm munge",
            file=sys.stderr,
        )
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="tidar-slurm-") as name:
        cluster = Cluster(Path(name))
        try:
            cluster.start()
            print(
                f"Two nodes, {' and '.join(NODES)}, with two CPUs each. In another shell:\n\n"
                f"  export SLURM_CONF={cluster.folder}/slurm.conf TIDAR_INTERFACE=lo\n\n"
                "Ctrl-C ends it, and its jobs.",
                flush=True,
            )
            cluster.daemons[1].wait()
        except KeyboardInterrupt:
            pass  # how it is ended
        finally:
            cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
