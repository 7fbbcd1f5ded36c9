"""Every reader: what it yields, what it refuses and counts, what stops it and how that is named."""

import gzip
import json
import os
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from data_prep.corpora import jsonl, open_corpus
from tidar_common.errors import UserError

RECORDS = [
    {"id": "a", "text": "one\n", "other": 1},
    {"id": "b", "text": "zwei – 二 🙂"},
    {"id": "c", "text": ""},
]


def read(**section):
    corpus = open_corpus(OmegaConf.create(section))
    refused = Counter()
    return [(one.id, one.text) for one in corpus.documents(refused=refused)], dict(refused)


def as_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_zst(path, content):
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(content)


def write_parquet(path, records, **types):
    columns = {name: [record[name] for record in records] for name in ("id", "text")}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **types)


def test_a_text_folder_is_read_in_order_of_path(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("2")
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "c.md").write_text("3")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "e.txt").write_text("")
    documents, refused = read(kind="text_folder", path=str(tmp_path))
    assert documents == [("a.txt", "1"), ("b/two.txt", "2"), ("c.md", "3")]
    assert refused == {"not UTF-8": 1, "empty": 1}
    assert read(kind="text_folder", path=str(tmp_path), glob="*.md")[0] == [("c.md", "3")]
    one = read(kind="text_folder", path=str(tmp_path / "a.txt"))
    assert one == ([("a.txt", "1")], {})


def test_line_ends_stay_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert read(kind="text_folder", path=str(tmp_path))[0] == [("a.txt", "a\r\nb\rc\n")]


def test_a_file_that_is_gone_is_refused_with_the_reason(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    corpus = open_corpus(OmegaConf.create({"kind": "text_folder", "path": str(tmp_path)}))
    (tmp_path / "a.txt").unlink()
    refused = Counter()
    assert [one.id for one in corpus.documents(refused=refused)] == ["b.txt"]
    assert dict(refused) == {"not readable (No such file or directory)": 1}


def test_file_names_that_are_not_utf8_are_read(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb") as file:
        file.write(b"text")
    assert read(kind="text_folder", path=str(tmp_path))[0] == [("\udcff.txt", "text")]


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        ("", lambda path, content: path.write_bytes(content)),
        (".gz", lambda path, content: path.write_bytes(gzip.compress(content))),
        (".zst", write_zst),
    ],
)
def test_jsonl_plain_and_compressed(tmp_path, suffix, write):
    path = tmp_path / f"x.jsonl{suffix}"
    write(path, as_lines(RECORDS[:1]) + b"\n" + as_lines(RECORDS[1:]))
    name = path.name
    third = len(as_lines(RECORDS[:1])) + 1
    expected = [(f"{name}:0", RECORDS[0]["text"]), (f"{name}:{third}", RECORDS[1]["text"])]
    for place in (path, tmp_path):
        assert read(kind="jsonl", path=str(place)) == (expected, {"empty": 1})
    by_id = read(kind="jsonl", path=str(path), id_field="id")[0]
    assert [identity for identity, _ in by_id] == ["a", "b"]


def test_a_text_field_of_another_name(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(as_lines([{"content": "text", "n": 7}]))
    assert read(kind="jsonl", path=str(path), text_field="content", id_field="n")[0] == [
        ("7", "text")
    ]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "n": 123456789012345678901234567890}\r\n',
        b' \t {"text": "a"} \t \n',
        b'\xef\xbb\xbf{"text": "a"}\n',
        '{"text": "zwei \u4e8c"}'.encode("utf-16"),
        b'{"text": "\xed\xa0\xbd"}\n',
        b'{"text": "\\ud83d \\u0000"}',
        b'{"text": NaN, "text": -Infinity}\n',
        b'{"text": "a"} {"text": "b"}\n',
        b'{"text": "a"}\x0b\n',
        b'{"text": "a\tb"}\n',
        b'{"text": "\xff"}\n',
        b"\xef\xbb\xbf\n",
        b"\n",
        b"",
    ],
)
def test_a_line_means_what_json_takes_it_for(line):
    """By way of Python's own `json.loads`, mistakes included."""

    def by(reader):
        try:
            return "value", reader(line)
        except ValueError as error:
            return "mistake", str(error)

    assert by(jsonl._parsed) == by(json.loads)


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    assert read(kind="jsonl", path=str(path)) == ([("x.jsonl:19", "🙂")], {"not UTF-8": 1})


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"body": "a"}', "has no field 'text'"),
        (b'["text"]', "a JSON array, not an object; write one object a line"),
        (b'"text"', "a JSON string, not an object"),
        (b'{"text": 3}', "field 'text' is not text"),
    ],
)
def test_a_broken_line_is_named_with_file_and_line(tmp_path, line, text):
    path = tmp_path / "x.jsonl"
    path.write_bytes(as_lines(RECORDS) + line + b"\n")
    with pytest.raises(UserError, match=text) as caught:
        read(kind="jsonl", path=str(tmp_path))
    assert str(caught.value).startswith(f"{path}:4: ")


def test_a_null_id_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(as_lines([{"text": "a", "id": None}]))
    with pytest.raises(UserError, match=r"x\.jsonl:1: field 'id' is null"):
        read(kind="jsonl", path=str(path), id_field="id")


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".gz", "truncated"),
        (".gz", "flipped"),
        (".gz", "another format"),
        (".zst", "truncated"),
        (".zst", "another format"),
    ],
)
def test_a_damaged_compressed_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"x.jsonl{suffix}"
    lines = as_lines([{"text": os.urandom(50).hex()} for _ in range(200)])
    if suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    else:
        write_zst(path, lines)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        for place in range(2000, 2040):
            content[place] ^= 0xFF
    else:
        content = bytearray(lines)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.jsonl\.(gz|zst)(: cannot be read|:\d+: not JSON)"):
        read(kind="jsonl", path=str(path))


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, [*RECORDS, {"id": "d", "text": None}], row_group_size=2)
    documents, refused = read(kind="parquet", path=str(tmp_path))
    assert documents == [("x.parquet:1", RECORDS[0]["text"]), ("x.parquet:2", RECORDS[1]["text"])]
    assert refused == {"empty": 2}
    by_id = read(kind="parquet", path=str(path), id_field="id")[0]
    assert [identity for identity, _ in by_id] == ["a", "b"]
    write_parquet(path, RECORDS)
    same = read(kind="parquet", path=str(path), id_field="text")[0]
    assert same[0] == (RECORDS[0]["text"], RECORDS[0]["text"])


@pytest.mark.parametrize(
    ("records", "section", "text"),
    [
        (RECORDS, {"text_field": "body"}, "has no column 'body'"),
        (RECORDS, {"id_field": "key"}, "has no column 'key'"),
        ([{"id": "a", "text": 3}], {}, "row 1: column 'text' is not text"),
        ([{"id": None, "text": "a"}], {"id_field": "id"}, "row 1: column 'id' is null"),
    ],
)
def test_a_parquet_file_that_does_not_fit_is_named(tmp_path, records, section, text):
    path = tmp_path / "x.parquet"
    write_parquet(path, records)
    with pytest.raises(UserError, match=text) as caught:
        read(kind="parquet", path=str(path), **section)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("damage", ["no parquet", "truncated", "a page overwritten"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = tmp_path / "x.parquet"
    texts = [{"id": str(i), "text": os.urandom(100).hex()} for i in range(500)]
    write_parquet(path, texts, compression="gzip", use_dictionary=False)
    content = bytearray(path.read_bytes())
    if damage == "no parquet":
        content = bytearray(b"text")
    elif damage == "truncated":
        content = content[:-100]
    else:
        content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read to its end"):
        read(kind="parquet", path=str(path))


def test_the_standard_library_is_read_in_order_and_limited_on_request():
    whole, refused = read(kind="python_stdlib")
    names = [identity for identity, _ in whole]
    assert {"json/decoder.py", "typing.py"} <= set(names)
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert 5e6 < sum(len(text.encode()) for _, text in whole) < 5e7
    assert set(refused) <= {"empty", "not UTF-8"}
    part, _ = read(kind="python_stdlib", max_bytes=300_000)
    assert part == whole[: len(part)]
    assert 0 < sum(len(text.encode()) for _, text in part) <= 300_000


def test_a_corpus_can_be_read_twice_with_the_same_counts(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(as_lines(RECORDS))
    corpus = open_corpus(OmegaConf.create({"kind": "jsonl", "path": str(path)}))
    first, second = Counter(), Counter()
    assert list(corpus.documents(refused=first)) == list(corpus.documents(refused=second))
    assert first == second == {"empty": 1}


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"kind": "csv"}, r"corpus\.kind: unknown value 'csv'; known are python_stdlib,"),
        ({"kind": "jsonl", "path": "/none"}, r"corpus\.path: /none does not exist"),
        ({"kind": "jsonl", "path": "{tmp}"}, r"corpus\.path: no file matching \*\.jsonl or"),
        ({"kind": "text_folder", "path": "{tmp}", "glob": "/x"}, r"cannot look for '/x'"),
        ({"kind": "parquet", "path": "{tmp}"}, r"no file matching \*\.parquet"),
        ({"kind": "python_stdlib", "max_bytes": 0}, r"corpus\.max_bytes: must be at least 1"),
        ({"kind": "jsonl", "path": "???"}, r"corpus\.path: has no value"),
        ({"kind": "jsonl", "path": "x", "field": "y"}, r"corpus\.field: unknown key"),
    ],
)
def test_a_bad_corpus_section_is_named(tmp_path, section, text):
    filled = {key: str(tmp_path) if value == "{tmp}" else value for key, value in section.items()}
    with pytest.raises(UserError, match=text):
        read(**filled)


def test_a_null_is_empty_text_in_json_lines_as_in_tables(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "b", "prompt": null}\n')
    keys = {"kind": "jsonl", "path": str(tmp_path)}
    corpus, refused = open_corpus(OmegaConf.create(keys)), Counter()
    assert [document.text for document in corpus.documents(None, refused)] == ["b"]
    assert refused == {"empty": 1}
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text(lines[1] + "\n")
    corpus = open_corpus(OmegaConf.create({**keys, "prompt_field": "prompt"}))
    assert [document.pieces for document in corpus.documents()] == [("b",)]


@pytest.mark.parametrize("content", ['[\n{"text": "a"}\n]', '[{"text": "a"},\n{"text": "b"}]',
                                     '{\n "text": "a"\n}'])  # fmt: skip
def test_json_over_several_lines_is_told_from_a_broken_line(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    corpus = open_corpus(OmegaConf.create({"kind": "jsonl", "path": str(tmp_path)}))
    with pytest.raises(UserError, match=r"a\.jsonl:1: JSON over several lines; write one object"):
        list(corpus.documents())


def test_files_of_lines_by_other_names(tmp_path):
    """A folder's *.json are something else where *.jsonl stand beside them."""
    line = b'{"text": "x"}\n'
    (tmp_path / "c4").mkdir()
    (tmp_path / "a.json").write_bytes(line)
    (tmp_path / "c4" / "b.json.gz").write_bytes(gzip.compress(line))
    write_zst(tmp_path / "c.json.zstd", line)

    def files() -> list[str]:
        return [identity for identity, _ in read(kind="jsonl", path=str(tmp_path))[0]]

    assert files() == ["a.json:0", "c.json.zstd:0", "c4/b.json.gz:0"]
    write_zst(tmp_path / "c.jsonl.zstd", line)
    assert files() == ["c.jsonl.zstd:0"]


def test_stars_in_a_path_stand_for_files_and_folders(tmp_path):
    for name in ("web-1/a.txt", "web-2/deep/b.md", "books/c.txt", "web-3.txt", "web-1/d.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(path: str) -> list[str]:
        return [name for name, _ in read(kind="text_folder", path=f"{tmp_path}/{path}")[0]]

    assert names("web-*") == ["web-1/a.txt", "web-2/deep/b.md", "web-3.txt"]
    assert names("web-1/*") == ["a.txt", "d.html"], "files that a path names are taken as they are"
    assert names("**/b.md") == ["web-2/deep/b.md"]
    with pytest.raises(UserError, match=r"^corpus\.path: no file matching"):
        names("none-*")
    (tmp_path / "odd[1]").mkdir()
    (tmp_path / "odd[1]" / "e.txt").write_text("e")
    assert names("odd[1]") == ["e.txt"]


def test_folders_that_are_links_are_read_once_and_without_loops(tmp_path):
    for name in ("corpus/real/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = tmp_path / "corpus"
    (corpus / "another").symlink_to(tmp_path / "elsewhere")
    (corpus / "same").symlink_to(corpus / "real")
    (corpus / "real" / "loop").symlink_to(corpus)
    (corpus / "0.txt").symlink_to(corpus / "real" / "a.txt")
    (corpus / "file.txt").symlink_to(tmp_path / "elsewhere" / "deep" / "c.txt")
    (corpus / "broken.txt").symlink_to(tmp_path / "nowhere")
    read_names = [name for name, _ in read(kind="text_folder", path=str(corpus))[0]]
    assert read_names == ["another/b.txt", "another/deep/c.txt", "real/a.txt"]
    (tmp_path / "link").symlink_to(corpus)
    assert [
        name for name, _ in read(kind="text_folder", path=str(tmp_path / "link"))[0]
    ] == read_names
