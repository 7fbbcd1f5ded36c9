"""Arrow folders, tars of text, URLs, and several corpora in one."""

import io
import json
import tarfile
from collections import Counter

import fsspec
import pyarrow
import pytest
from omegaconf import OmegaConf
from test_corpora import RECORDS, as_lines, read

from data_prep.corpora import open_corpus
from data_prep.formats.manifest import Manifest
from tidar_common.errors import UserError


def write_arrow(path, records, rows=2):
    path.parent.mkdir(exist_ok=True)
    table = pyarrow.table({name: [r[name] for r in records] for name in ("id", "text")})
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        for batch in table.to_batches(max_chunksize=rows):
            stream.write_batch(batch)


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_an_arrow_folder(tmp_path):
    records = [{"id": str(n), "text": f"text {n} " * 20} for n in range(50)]
    write_arrow(tmp_path / "train" / "data-00000-of-00002.arrow", [*RECORDS, *records])
    write_arrow(tmp_path / "train" / "data-00001-of-00002.arrow", [{"id": "z", "text": None}])
    write_arrow(tmp_path / "train" / "cache-123.arrow", records)
    documents, refused = read(kind="arrow", path=str(tmp_path))
    assert documents[1] == ("train/data-00000-of-00002.arrow:2", RECORDS[1]["text"])
    assert len(documents) == 52
    assert refused == {"empty": 2}
    assert read(kind="arrow", path=str(tmp_path), id_field="id")[0][0][0] == "a"
    corpus = open_corpus(OmegaConf.create({"kind": "arrow", "path": str(tmp_path)}))
    parts = corpus.parts(700)
    assert len(parts) > 5
    assert [(d.id, d.text) for part in parts for d in corpus.documents([part])] == documents
    with pytest.raises(UserError, match="has no column 'body'"):
        read(kind="arrow", path=str(tmp_path), text_field="body")
    file = tmp_path / "train" / "data-00000-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"data-00000-of-00002\.arrow: cannot be read to its end"):
        read(kind="arrow", path=str(tmp_path))


def test_tars_of_text(tmp_path):
    members = [
        ("a/0.txt", b"zero"), ("a/0.json", b'{"n": 1}'), ("a/1.json", b"{}"),
        ("a/2.txt", b"\xff"), ("a/3.txt", b""), ("a/4.txt", b"vier\n"), ("a/5.md", b""),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    write_tar(tmp_path / "y.tar.gz", members[:1], "w:gz")
    documents, refused = read(kind="webdataset", path=str(tmp_path))
    assert documents == [("x.tar:a/0", "zero"), ("x.tar:a/4", "vier\n"), ("y.tar.gz:a/0", "zero")]
    assert refused == {"no member txt": 2, "not UTF-8": 1, "empty": 1}


def test_tars_of_json(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("0.json", b'{"body": "eins"}')])
    section = {"kind": "webdataset", "path": str(path), "member": "json", "text_field": "body"}
    assert read(**section) == ([("x.tar:0", "eins")], {})
    for content in (b"{", b"[]", b'{"text": ""}', b'{"body": 3}'):
        write_tar(path, [("0.json", content)])
        with pytest.raises(UserError, match=r"x\.tar: sample x\.tar:0: "):
            read(**section)
    path.write_bytes(path.read_bytes()[:600] + b"?" * 700)
    with pytest.raises(UserError, match=r"x\.tar"):
        read(**section)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_urls_give_what_a_folder_gives(tmp_path, scheme):
    import gzip

    write_tar(tmp_path / "t.tar", [("0.txt", b"zero")])
    write_arrow(tmp_path / "a.arrow", RECORDS)
    (tmp_path / "x.jsonl").write_bytes(as_lines(RECORDS))
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(as_lines(RECORDS[:1])))
    (tmp_path / "a.txt").write_text("eins")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p", "q"]}), tmp_path / "p.parquet")
    base = f"file://{tmp_path}"
    if scheme == "memory":
        store = fsspec.filesystem("memory")
        for path in tmp_path.iterdir():
            store.pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
        base = f"memory://{tmp_path.name}"
    for kind in ("jsonl", "text_folder", "parquet", "arrow", "webdataset"):
        local = read(kind=kind, path=str(tmp_path))
        assert len(local[0]) > 0
        assert read(kind=kind, path=base) == local
    with pytest.raises(UserError, match=r"corpus\.path: no file matching"):
        read(kind="jsonl", path=f"{base}/nothing")
    with pytest.raises(UserError, match=r"corpus\.path: nope://x cannot be opened"):
        read(kind="jsonl", path="nope://x")


@pytest.fixture
def mixed(tmp_path, texts, write_corpus):
    """A large source and a small one, which tell whose a document is."""
    write_corpus(tmp_path / "large.jsonl", [f"LARGE {text}" for text in texts])
    write_corpus(
        tmp_path / "small.jsonl", [f"SMALL {n} {text}" for n, text in enumerate(texts[:30])]
    )
    return {
        "large": {"kind": "jsonl", "path": str(tmp_path / "large.jsonl"), "weight": 3},
        "small": {"kind": "jsonl", "path": str(tmp_path / "small.jsonl"), "weight": 2},
    }


def as_override(sources):
    inside = ",".join(
        f"{name}:{{{','.join(f'{k}:{v}' for k, v in own.items())}}}"
        for name, own in sources.items()
    )
    return f"corpus.sources={{{inside}}}"


def test_a_mix_has_the_shares_it_was_asked_for(command, overrides, mixed, tmp_path):
    own = [one for one in overrides if not one.startswith("corpus")]
    folder = tmp_path / "data"
    options = [*own, "corpus=mix", as_override(mixed), "task_bytes=20000"]
    for place, workers in ((folder, 1), (tmp_path / "two", 2)):
        result = command(*options, f"output_dir={place}", f"workers={workers}")
        assert result.code == 0, result.err
    manifest = Manifest.load(folder)
    assert manifest == Manifest.load(tmp_path / "two")
    tokens = {name: one["tokens"] for name, one in manifest.sources.items()}
    assert tokens["small"] / sum(tokens.values()) == pytest.approx(0.4, abs=0.03)
    assert manifest.sources["large"]["epochs"] == 1
    assert 1.5 < manifest.sources["small"]["epochs"] < 3.5
    assert "small: " in result.out
    assert "held out in an earlier epoch" in manifest.documents["refused"]
    assert command("verify=true", f"output_dir={folder}").code == 0
    from test_prepare import texts_of

    held_out = Counter(text for text in texts_of(folder, "heldout") if text.startswith("SMALL"))
    assert held_out
    train = set(texts_of(folder, "train"))
    assert not train & set(held_out), "a later epoch must not bring held-out text into training"


def weighed(corpus):
    """Its parts, a token a character."""
    corpus.weigh(lambda texts: sum(map(len, texts)))
    return corpus.parts()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"small": None}, "corpus.sources: needs two corpora or more"),
        ({"small": {"weight": 0}}, "corpus.sources.small.weight: must be a number above 0"),
        ({"small": {"path": "/none"}}, "corpus.sources.small.path: /none does not exist"),
        ({"small": {"kind": "mix"}}, "corpus.sources.small.kind: a mix cannot be part of a mix"),
        ({"small": {"weight": 90}}, "corpus.sources.small: would be read"),
    ],
)
def test_a_bad_mix_is_named(mixed, change, text):
    for name, values in change.items():
        if values is None:
            del mixed[name]
        else:
            mixed[name] |= values
    section = json.loads(json.dumps({"kind": "mix", "sources": mixed}))
    with pytest.raises(UserError, match=text):
        weighed(open_corpus(OmegaConf.create(section)))
