"""Beginnings of documents: all that there are, each in one share, read without the rest."""

from itertools import pairwise

import pytest
import torch
from document_sets import prepare_documents
from small_models import huggingface_tokenizer

from data_prep.formats.manifest import Manifest
from data_prep.formats.shards import read_shard
from data_prep.tokenizers.load import load_tokenizer
from pipeline.decoding.prompts import DocumentPrompts, Share, rank_device
from tidar_common.errors import UserError

ALL = {"split": "train", "prompt_tokens": 6, "limit": None, "share": Share()}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare_documents(tmp_path_factory.mktemp("documents"))


def prompts_of(data_dir, **changes) -> DocumentPrompts:
    return DocumentPrompts(data_dir, load_tokenizer(data_dir), **{**ALL, **changes})


def as_dict(prompts: DocumentPrompts) -> dict[str, str]:
    rows = [prompts[place] for place in range(len(prompts))]
    assert [row.id for row in rows] == [prompts.id_of(place) for place in range(len(prompts))]
    return {row.id: row.prompt for row in rows}


def expected(data_dir, split: str, prompt_tokens: int) -> dict[str, str]:
    """The same, from a plain walk over every token of every shard."""
    tokenizer, found = load_tokenizer(data_dir), {}
    for shard in Manifest.load(data_dir).splits[split].shards:
        for number, sequence in enumerate(read_shard(data_dir / shard.name)):
            start, tokens = 0, sequence.tokens.tolist()
            for length, goes_on in zip(sequence.document_lengths, sequence.continued, strict=True):
                text = [t for t in tokens[start : start + length] if t != tokenizer.eos_id]
                padding = tokens[start] == tokenizer.pad_id
                if len(text) > prompt_tokens and not goes_on and not padding:
                    name = f"{shard.name}:{number}:{start}"
                    found[name] = tokenizer.decode(text[:prompt_tokens]).rstrip("\ufffd")
                start += length
    return found


@pytest.mark.parametrize(("split", "prompt_tokens"), [("train", 6), ("train", 47), ("heldout", 1)])
def test_every_document_that_is_long_enough(data_dir, split, prompt_tokens):
    found = as_dict(prompts_of(data_dir, split=split, prompt_tokens=prompt_tokens))
    assert found == expected(data_dir, split, prompt_tokens)
    assert len(found) > 5


def test_shares_and_limits_leave_numbers_alone(data_dir):
    whole = list(as_dict(prompts_of(data_dir)).items())
    for count, limit in ((1, 40), (3, None), (3, 40), (50, 40)):
        numbered = {}
        for index in range(count):
            share = Share(index, count)
            prompts = prompts_of(data_dir, share=share, limit=limit)
            assert prompts.total == len(whole[:limit])
            for place, row in enumerate(as_dict(prompts).items()):
                numbered[share.number(place)] = row
        assert [numbered[number] for number in range(len(numbered))] == whole[:limit]
    shards = {name.partition(":")[0] for name, _ in whole[:40]}
    assert len(shards) > 2, "a sample of all"


def test_a_group_is_read_once_and_nothing_is_kept(data_dir, monkeypatch):
    prompts = prompts_of(data_dir)
    reads = []
    read = prompts._read_group
    prompts._group.cache_clear()
    monkeypatch.setattr(prompts, "_group", lambda group: reads.append(group) or read(group))
    as_dict(prompts)
    changes = 1 + sum(left != right for left, right in pairwise(reads))
    assert changes == len(set(reads)), "places stand in the order of their groups"
    assert prompts._places.nbytes == 32 * len(prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "prompts_split: 'test' is not train or heldout"),
        ({"prompt_tokens": 48}, "train split has more than 48 tokens; give a smaller"),
        ({"prompt_tokens": None}, "train split has a prompt; give prompt_tokens"),
    ],
)
def test_mistakes_are_named(data_dir, changes, message):
    with pytest.raises(UserError, match=message):
        prompts_of(data_dir, **changes)


def test_another_tokenizer_is_refused(data_dir):
    with pytest.raises(UserError, match=r"prompts_data: .* was prepared with another tokenizer"):
        DocumentPrompts(data_dir, huggingface_tokenizer(), **ALL)


def test_ranks_divide_the_share_of_a_job(monkeypatch, tmp_path):
    seen = []
    for job in range(3):
        for rank in range(4):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "4")
            share = Share.of_process(f"{job}/3")
            seen += [share.number(place) for place in range(5)]
    assert sorted(seen) == list(range(60))
    assert share.file(tmp_path / "a.b.jsonl").name == "a.b-00011-of-00012.jsonl"
    assert Share().file(tmp_path / "a.jsonl") == tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="array: '3/3' is not i/n"):
        Share.of_process("3/3")


def test_a_rank_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert rank_device(None) is None, "without torchrun"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (rank_device(None), rank_device("cpu"), taken) == ("cuda:1", "cpu", [1])
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 of this machine has no GPU of its own"):
        rank_device(None)
