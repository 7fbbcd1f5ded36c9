"""Prompts: told apart from the corpus to the shards, drafted by no block, predicted by no row."""

import json
from collections import Counter

import numpy as np
import pytest

from data_prep.corpora.base import Document
from data_prep.formats.manifest import Manifest
from data_prep.formats.shards import read_shard
from data_prep.inspect.show import PROMPT, attention_picture
from data_prep.stages.pack import PACKINGS, Piece, make_packer
from data_prep.stages.task import encode_documents
from data_prep.tokenizers.load import load_tokenizer

PAIRS = [
    (f"Question {number}: how much is {number} plus {number}?\n" * (1 + number % 5),
     f"Answer: {2 * number}. " * (1 + number % 7))
    for number in range(120)
]  # fmt: skip
PAIRS += [("", f"Plain text number {number}, without a prompt.") for number in range(20)]
PAIRS += [("A prompt far longer than a sequence. " * 60, "Short.")]


@pytest.fixture(scope="module")
def pairs_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        json.dumps({"id": f"p{number}", "ask": prompt, "text": text})
        for number, (prompt, text) in enumerate(PAIRS)
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def with_prompts(command, overrides, pairs_path, tmp_path):
    """A folder prepared with `layout.loss_span=response`."""
    own = [f"corpus.path={pairs_path}", "corpus.prompt_field=ask", "layout.loss_span=response"]

    def prepare(name, *changes):
        result = command(*overrides, *own, f"output_dir={tmp_path / name}", *changes)
        assert result.code == 0, result.err
        return tmp_path / name

    return prepare


def pieces_in(folder):
    """(ids, prompt length, goes on from a cut) of everything in the shards, and each sequence."""
    tokenizer = load_tokenizer(folder)
    found, sequences = Counter(), []
    for path in sorted(folder.glob("*/*.tar")):
        for sequence in read_shard(path):
            sequences.append(sequence)
            real, start = sequence.real_tokens(tokenizer.pad_id), 0
            rows = zip(
                sequence.document_lengths, sequence.prompt_lengths, sequence.continued, strict=False
            )
            for length, prompt, mark in rows:
                if start < real:
                    ids = tuple(sequence.tokens[start : start + length].tolist())
                    found[ids, int(prompt), bool(mark)] += 1
                start += length
    return found, sequences


def expected_pieces(folder, length):
    """The same from the text: prompt and text encoded one by one, cut at multiples of `length`."""
    tokenizer, found = load_tokenizer(folder), Counter()
    for prompt, text in PAIRS:
        head = tokenizer.encode(prompt) if prompt else []
        ids = [*head, *tokenizer.encode(text), tokenizer.eos_id]
        for start in range(0, len(ids), length):
            piece = tuple(ids[start : start + length])
            own = sum(position < len(head) for position in range(start, start + len(piece)))
            found[piece, own, start > 0] += 1
    return found


def test_prompts_arrive_in_the_shards_with_their_lengths(with_prompts, command):
    folder = with_prompts("data")
    assert Manifest.load(folder).loss_span == "response"
    found, sequences = pieces_in(folder)
    assert found == expected_pieces(folder, 128)
    assert sum(prompt == len(ids) for ids, prompt, _ in found) > 0, "a piece of prompt alone"
    for sequence in sequences:
        drafted = set(sequence.layout.slot_position.tolist())
        ends = np.cumsum(sequence.document_lengths)
        starts = ends - sequence.document_lengths
        real = sequence.real_tokens(load_tokenizer(folder).pad_id)
        rows = zip(starts.tolist(), sequence.prompt_lengths.tolist(), ends.tolist(), strict=True)
        learnt = {p for start, prompt, end in rows for p in range(start + prompt, min(end, real))}
        assert drafted == learnt
    assert "as the manifest says" in command("verify=true", f"output_dir={folder}").out


def test_it_is_the_same_for_any_number_of_workers_and_layout(with_prompts, command):
    one = with_prompts("one", "layout.coverage=0.5", "layout.shift=true", "task_bytes=4000")
    two = with_prompts(
        "two", "layout.coverage=0.5", "layout.shift=true", "task_bytes=4000", "workers=2"
    )
    assert Manifest.load(one) == Manifest.load(two)
    assert pieces_in(one)[0] == expected_pieces(one, 128), "also what went through rests"
    assert command("verify=true", f"output_dir={one}").code == 0


def test_without_the_key_a_prompt_is_text_as_any_other(with_prompts, command):
    folder = with_prompts("data", "layout.loss_span=document")
    tokenizer = load_tokenizer(folder)
    for path in folder.glob("*/*.tar"):
        for sequence in read_shard(path):
            assert sequence.prompt_lengths is None
            assert sequence.layout.num_slots == sequence.real_tokens(tokenizer.pad_id)
    assert command("verify=true", f"output_dir={folder}").code == 0


def test_a_corpus_without_prompts_is_refused(command, overrides, tmp_path):
    result = command(*overrides, "layout.loss_span=response", f"output_dir={tmp_path / 'data'}")
    assert result.code == 2
    assert "layout.loss_span: response needs a corpus that tells prompts apart" in result.err
    assert command(*overrides, "layout.loss_span=half", f"output_dir={tmp_path}").code == 2


def test_a_missing_prompt_is_named_with_its_line(command, overrides, pairs_path, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(pairs_path.read_text().splitlines()[0] + '\n{"id": "x", "text": "y"}\n')
    result = command(*overrides, f"corpus.path={path}", "corpus.prompt_field=ask",
                     f"output_dir={tmp_path / 'data'}")  # fmt: skip
    assert result.code == 2
    assert "broken.jsonl:2: has no field 'ask'; set corpus.prompt_field" in result.err


def test_inspect_shows_prompts(with_prompts, command, tmp_path):
    folder = with_prompts("data")
    result = command("inspect=0", f"output_dir={folder}")
    assert "tokens are a prompt" in result.out
    _, sequences = pieces_in(folder)
    sequence = next(s for s in sequences if s.prompt_lengths[0] > 2)
    picture = attention_picture(sequence, len(sequence.tokens))
    assert tuple(picture[2, 1]) == PROMPT
    behind = int(sequence.prompt_lengths[0])
    assert tuple(picture[behind, behind]) != PROMPT


def test_a_prompt_is_encoded_apart(tokenizer):
    documents = [
        Document("a", "tail", prompt="head"),
        Document("b", "tail"),
        Document("c", "headtail"),
    ]
    encoded = list(encode_documents(documents, tokenizer, "plain"))
    assert [document for document, _ in encoded] == documents
    apart, alone, together = (piece for _, piece in encoded)
    end = tokenizer.eos_id
    assert apart.ids.tolist() == [*tokenizer.encode("head"), *tokenizer.encode("tail"), end]
    assert together.ids.tolist() == [*tokenizer.encode("headtail"), end]
    assert apart.ids.dtype == tokenizer.dtype
    assert apart.prompt == len(tokenizer.encode("head"))
    assert (alone.prompt, together.prompt) == (0, 0)


def test_a_text_that_is_cut_gets_no_end_token(command, overrides, tmp_path, tokenizer):
    path = tmp_path / "cut.jsonl"
    rows = [{"id": str(n), "text": f"text {n}", "cut": n % 3 == 0} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "data"
    own = [f"corpus.path={path}", "corpus.cut_field=cut", f"output_dir={folder}"]
    assert command(*overrides, *own).code == 0
    found = Counter()
    for shard in folder.glob("*/*.tar"):
        for sequence in read_shard(shard):
            ends = np.cumsum(sequence.document_lengths)
            real = sequence.real_tokens(tokenizer.pad_id)
            for length, end in zip(sequence.document_lengths, ends, strict=True):
                found[tuple(sequence.tokens[end - length : end].tolist())] += bool(end <= real)
    expected = Counter()
    for row in rows:
        end = [] if row["cut"] else [tokenizer.eos_id]
        expected[(*tokenizer.encode(row["text"]), *end)] += 1
    assert +found == expected
    assert command("verify=true", f"output_dir={folder}").code == 0
    path.write_text('{"id": 1, "text": "a", "cut": true}\n{"id": 2, "text": "b", "cut": 1}\n')
    result = command(*overrides, *own, "overwrite=true")
    assert result.code == 2
    assert "cut.jsonl:2: field 'cut' is neither true nor false" in result.err


@pytest.mark.parametrize("packing", PACKINGS)
def test_cuts_divide_a_prompt(packing):
    """Token t of document d is 100 d + t, so that a piece says itself where it comes from."""
    packer = make_packer(packing, 8)
    shapes = [(20, 11), (5, 5), (9, 0), (3, 1), (16, 16)]
    documents = [
        Piece(np.arange(100 * number, 100 * number + length), prompt=prompt)
        for number, (length, prompt) in enumerate(shapes, 1)
    ]
    done = [one for document in documents for one in packer.add(document)]
    for pieces in [*done, *packer.finish()]:
        for piece in pieces:
            number, first = divmod(int(piece.ids[0]), 100)
            prompt = shapes[number - 1][1]
            assert piece.prompt == sum(t < prompt for t in range(first, first + len(piece.ids)))
