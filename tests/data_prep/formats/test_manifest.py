"""The manifest survives the file, and its fingerprint is that of the data."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep.formats.manifest import Manifest
from tidar_common.config import config_hash
from tidar_common.errors import UserError


def test_it_survives_the_file(prepared, tmp_path):
    manifest = Manifest.load(prepared)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert (tmp_path / "manifest.json").read_bytes() == (prepared / "manifest.json").read_bytes()


def test_names_that_are_not_utf8_survive_the_file(prepared, tmp_path):
    config = {"corpus": {"path": "\udcff.jsonl"}}
    manifest = replace(Manifest.load(prepared), config=config)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path).config == config


def test_the_config_hash_is_that_of_the_config(prepared):
    manifest = Manifest.load(prepared)
    assert manifest.config_hash == config_hash(manifest.config)


def test_the_fingerprint_follows_the_shards_and_the_tokenizer(prepared):
    manifest = Manifest.load(prepared)
    shards = (replace(manifest.train.shards[0], sha256="0"), *manifest.train.shards[1:])
    changed = [
        replace(manifest, train=replace(manifest.train, shards=shards)),
        replace(manifest, heldout=manifest.train),
        replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="0")),
    ]
    prints = {one.fingerprint() for one in (manifest, *changed)}
    assert len(prints) == 4
    assert replace(manifest, config={}).fingerprint() == manifest.fingerprint()


def test_counts_of_another_vocabulary_are_refused(prepared, tmp_path):
    manifest = Manifest.load(prepared)
    assert manifest.token_counts(prepared).sum() == manifest.train.tokens
    np.save(tmp_path / "token_counts.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(UserError, match=r"token_counts\.npy: does not fit the tokenizer"):
        manifest.token_counts(tmp_path)
