"""What every test shares: a small prepared corpus, and one run trained on it by two processes."""

import os
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType

import pytest
from filelock import FileLock

# Tests start processes of their own; more threads than cores only slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from commands import prepare_small, train_small


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true",
        help="the first case of each test, and none that runs the project's commands",
    )  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """How tests are divided among processes: by file, since a file's tests share fixtures, and
    those of tests/slurm together, since they share one cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What waits comes first, beside all others; with --fast a choice: what most changes break, in
    the time that one waits for (`make test-fast`)."""
    items.sort(key=lambda item: "tests/slurm/" not in item.nodeid)
    if not config.getoption("fast"):
        return
    kept: dict[str, pytest.Item] = {}
    for item in items:
        if "trained_run" not in item.fixturenames and not _runs_commands(item):
            kept.setdefault(item.nodeid.split("[")[0], item)
    config.hook.pytest_deselected(items=[i for i in items if i not in kept.values()])
    items[:] = kept.values()


def _runs_commands(item: pytest.Item) -> bool:
    """Whether a test, or a function of its file that it calls, starts the project's commands or
    ranks: by what it takes from `commands` and `workers`."""
    seen, left = set(), [item.function.__code__]
    while left:
        code = left.pop()
        seen.add(code)
        left += [part for part in code.co_consts if isinstance(part, CodeType)]
        for name in code.co_names:
            value = item.module.__dict__.get(name)
            if getattr(value, "__module__", None) in ("commands", "workers"):
                return True
            if isinstance(value, FunctionType) and value.__code__ not in seen:
                left.append(value.__code__)
    return "run_workers" in item.module.__dict__


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latency curves of test models do not go to the user's cache folder."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(path)
    return path


@pytest.fixture(scope="session")
def shared(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Make a folder once for all test processes: `shared(name, make)`."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def data_dir(shared: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder written by `tidar-prepare`: sequences of 64 tokens, 400 pieces, K = 4."""
    return shared("data", prepare_small)


@pytest.fixture(scope="session")
def trained_run(data_dir: Path, shared: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The run directory of 12 steps under ZeRO-1 on two processes, with evals and checkpoints."""

    def train(run_dir: Path) -> None:
        done = train_small(data_dir, run_dir, processes=2)
        assert done.returncode == 0, done.stderr

    return shared("trained", train)
