"""Worker processes: their end is noticed, whatever ends them, and what they say arrives."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from data_prep.corpora import open_corpus
from data_prep.stages.plan import Preparation, make_tasks
from data_prep.stages.task import run_task
from data_prep.stages.workers import Worker, Workers
from tidar_common import files
from tidar_common.errors import UserError


@pytest.fixture
def job(overrides, tokenizer, tmp_path):
    """A preparation that has not begun, and its tasks."""
    from hydra import compose, initialize_config_dir

    from data_prep.config import PrepareSettings
    from tidar_common.cli import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("prepare", [*overrides, f"output_dir={tmp_path / 'data'}", "workers=2"])
    settings, corpus = PrepareSettings.from_config(cfg), open_corpus(OmegaConf.create(cfg.corpus))
    return Preparation(settings, corpus, tokenizer), make_tasks(settings, corpus, tokenizer)


def gone(pid):
    """Whether a process has ended; a zombie has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def quiet(*_):
    """A report that nobody reads."""


def working(preparation):
    """A worker that has been told what to do with tasks."""
    worker = Worker()
    worker.send((run_task, preparation))
    return worker


def test_a_dead_worker_is_one_clear_error(job):
    preparation, tasks = job
    made = []

    def kill(*_):
        os.kill(made[1].pid, signal.SIGKILL)

    def run():
        with Workers(2) as workers:
            made.extend(worker.process for worker in workers.started)
            workers.run(run_task, tasks * 20, preparation, kill)

    with pytest.raises(UserError, match=r"^workers: a process died \(exit code -9"):
        run()
    assert all(not process.is_alive() for process in made), "the others must not stay behind"


def test_workers_stay_for_the_next_stage(job):
    preparation, tasks = job
    folder = preparation.settings.output_dir / "tasks"
    with Workers(2) as workers:
        first = [worker.process.pid for worker in workers.started]
        for _ in range(2):
            workers.run(run_task, tasks, preparation, quiet)
            made = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert len([name for name in made if name.endswith(".json")]) == len(tasks)
        assert [worker.process.pid for worker in workers.started] == first
        assert len({os.getpid(), *first}) == 3
    for task in tasks:
        run_task(task, preparation, quiet)
    assert made == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_exception_ends_the_workers_in_the_middle(job):
    preparation, tasks = job

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
        workers.run(run_task, tasks * 50, preparation, interrupt)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_ends_with_the_pipe(job, which):
    """As the system closes it when the main process is killed; none holds that of another."""
    preparation, tasks = job
    with Workers(2) as workers:
        worker = workers.started[which]
        worker.send((run_task, preparation))
        worker.send(tasks[0])
        while worker.receive()[0] != "done":
            pass
        worker.pipe.close()
        deadline = time.monotonic() + 10
        while not gone(worker.process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not gone(workers.started[1 - which].process.pid)


def test_a_fault_inside_a_worker_keeps_its_traceback(job):
    preparation, _ = job
    worker = working(preparation)
    worker.send(3)
    with pytest.raises(RuntimeError, match=r"in a worker process: Traceback[\s\S]*AttributeError"):
        worker.receive()
    worker.stop()


def test_all_that_a_task_left_has_its_name_on_the_disk(job, monkeypatch):
    """The folder is synced once, behind the record, which comes last."""
    preparation, tasks = job
    synced = []

    def note(folder):
        synced.append(sorted(path.name for path in folder.iterdir()))

    monkeypatch.setattr(files, "fsync_path", note)
    run_task(tasks[0], preparation, quiet)
    (names,) = synced
    assert {"000000.json", "000000.rests", "000000-000.tar"} <= set(names)
    assert names == sorted(
        path.name for path in (preparation.settings.output_dir / "tasks").iterdir()
    )


def ending(worker):
    """Read its messages until one is an error."""
    while True:
        worker.receive()


def test_a_full_disk_and_a_broken_line_arrive_as_what_they_are(job):
    preparation, tasks = job
    preparation.settings.output_dir.mkdir()
    (preparation.settings.output_dir / "tasks").write_text("a file where a folder goes")
    worker = working(preparation)
    worker.send(tasks[0])
    with pytest.raises(FileExistsError):
        ending(worker)
    worker.stop()
    corpus = preparation.corpus
    corpus = type(corpus)(type(corpus.config)(path=corpus.config.path, text_field="body"))
    worker = working(replace(preparation, corpus=corpus))
    worker.send(tasks[0])
    with pytest.raises(UserError, match=r"text\.jsonl:\d+: has no field 'body'"):
        ending(worker)
    worker.stop()
