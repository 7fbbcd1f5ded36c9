"""Data behind URLs: the same sequences, copied once, tried again, checked, removed when old."""

import functools
import http.server
import os
import shutil
import threading

import pytest
from omegaconf import OmegaConf

from data_prep.formats.manifest import Manifest
from pipeline.data import place
from pipeline.data.batch import sequence_digest
from pipeline.data.place import DataConfig, open_data_dir
from pipeline.data.source import SequenceSource
from tidar_common.errors import UserError


@pytest.fixture
def store(data_dir, tmp_path):
    """A copy of the data, as it stands on another machine; tests damage it."""
    return shutil.copytree(data_dir, tmp_path / "store")


@pytest.fixture
def served(store):
    """The copy behind http; `requests` lists what was asked for."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(store))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(place, "FIRST_WAIT_S", 0.0)


def section(url, cache, **values):
    return OmegaConf.create({"data": {"dir": url, "cache_dir": str(cache), **values}})


def digests(folder, data=None, count=None):
    manifest = Manifest.load(folder)
    source = SequenceSource(folder, manifest, manifest.train, 0, None, data)
    return [sequence_digest(source[n]) for n in range(count or manifest.train.sequences)]


@pytest.mark.parametrize("kind", ["http", "pipe", "fsspec"])
def test_a_url_gives_what_the_folder_gives(data_dir, store, served, tmp_path, kind):
    url = {"http": served[0], "pipe": f"pipe:cat {store}", "fsspec": f"file://{store}"}[kind]
    folder = open_data_dir(section(url, tmp_path / "cache"))
    assert not list(folder.rglob("*.tar")), "shards are copied when their turn comes"
    assert digests(folder, count=1) == digests(data_dir, count=1)
    assert len(list(folder.rglob("*.tar"))) == 1
    assert digests(folder) == digests(data_dir)
    again = open_data_dir(section(url, tmp_path / "cache"))
    assert again == folder
    if kind == "http":
        asked = [path for path in served[1] if path != "/manifest.json"]
        assert len(asked) == len(set(asked)), "every file is copied once"


def test_a_copy_that_failed_is_tried_again(store, tmp_path, capfd):
    """Every file arrives broken twice."""
    script = tmp_path / "flaky"
    script.write_text(
        '#!/bin/bash\nname="$1"; seen="$0.$(basename "$name")"; echo x >> "$seen"\n'
        'if [ "$(wc -l < "$seen")" -lt 3 ]; then head -c 100 "$name"; exit 0; fi\ncat "$name"\n'
    )
    script.chmod(0o755)
    url = f"pipe:{script} {store}"
    manifest = Manifest.load(store)
    shard = manifest.train.shards[0]
    folder = tmp_path / "cache"
    place._copy(f"{url}/{shard.name}", folder / shard.name, shard.sha256)
    assert (folder / shard.name).read_bytes() == (store / shard.name).read_bytes()
    said = capfd.readouterr().err
    assert said.count("it differs from what the manifest says; trying again") == 2


def test_what_never_arrives_is_named(served, store, tmp_path, monkeypatch):
    url = served[0]
    folder = open_data_dir(section(url, tmp_path / "cache"))
    for path in store.glob("train/*.tar"):
        path.write_bytes(b"something else")
    monkeypatch.setattr(place, "ATTEMPTS", 2)
    with pytest.raises(UserError, match=r"data\.dir: http://.*\.tar cannot be read after 2"):
        digests(folder, count=1)
    assert not list(folder.rglob("*.tar"))
    with pytest.raises(UserError, match=r"data\.dir: .*/none/manifest\.json cannot be read after"):
        open_data_dir(section(f"{url}/none", tmp_path / "cache"))


def test_data_prepared_anew_is_another_folder(store, tmp_path):
    url = f"pipe:cat {store}"
    first = place.mirror(url, tmp_path / "cache")
    manifest = Manifest.load(store)
    manifest.config["note"] = "other"
    manifest.save(store)
    assert place.mirror(url, tmp_path / "cache") != first


def test_old_shards_are_removed(data_dir, store, tmp_path):
    folder = place.mirror(f"pipe:cat {store}", tmp_path / "cache")
    shards = Manifest.load(folder).train.shards
    limit = max(shard.bytes for shard in shards)
    for n, shard in enumerate(shards):
        place.local_shard(folder, shard, limit)
        os.utime(folder / shard.name, (n, n))
    left = list(folder.rglob("*.tar"))
    assert sum(path.stat().st_size for path in left) <= limit
    assert folder / shards[-1].name in left
    assert digests(folder, DataConfig(cache_bytes=limit)) == digests(data_dir)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"dir": "http://x"}, r"data\.cache_dir: has no value, and http://x has to be copied"),
        ({"dir": "/none"}, r"data\.dir: /none does not exist"),
        ({"dir": None}, r"data\.dir: has no value"),
        ({"dir": "/none", "cache_bytes": -1}, r"data\.cache_bytes: must be at least 0"),
    ],
)
def test_a_bad_section_is_named(values, text):
    with pytest.raises(UserError, match=text):
        open_data_dir(OmegaConf.create({"data": values}))
