"""`stats=true` counts what stands in the shards."""

from collections import Counter

from test_prepare import texts_of

from data_prep.manifest import Manifest
from data_prep.shards import read_shard
from data_prep.stats import piece_lengths


def test_lengths_are_those_of_the_pieces(prepared, tokenizer):
    manifest = Manifest.load(prepared)
    counted, continued = piece_lengths(prepared, manifest)
    assert counted.total() == len(texts_of(prepared, "train"))
    lengths = []
    for shard in manifest.train.shards:
        for sequence in read_shard(prepared / shard.name):
            real = sequence.real_tokens(tokenizer.pad_id)
            padded = real < len(sequence.tokens)
            lengths += sequence.document_lengths.tolist()[: -1 if padded else None]
    assert counted == Counter(length.bit_length() - 1 for length in lengths)
    assert counted.total() - continued == manifest.train.documents


def test_the_command_prints_them(command, prepared):
    result = command(f"output_dir={prepared}", "stats=true")
    assert result.code == 0, result.err
    manifest = Manifest.load(prepared)
    assert f"train: {manifest.train.documents:,} documents, {manifest.train.tokens:,}" in result.out
    assert "64 to      127" in result.out
    assert "####" in result.out
    assert "0 of them though they fit" in result.out


def test_a_folder_without_data_is_named(command, tmp_path):
    result = command(f"output_dir={tmp_path}", "stats=true")
    assert result.code == 2
    assert "manifest.json: not found" in result.err
