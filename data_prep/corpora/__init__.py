"""Readers of text, one file each; a reader yields documents and counts what it refuses."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.corpora.arrow import ArrowConfig, ArrowCorpus
from data_prep.corpora.base import Corpus, Document, Part, utf8_bytes
from data_prep.corpora.jsonl import JsonlConfig, JsonlCorpus
from data_prep.corpora.mix import CorpusWithHeldOut, MixConfig, MixCorpus, Source
from data_prep.corpora.parquet import ParquetConfig, ParquetCorpus
from data_prep.corpora.text_files import (
    StdlibConfig,
    StdlibCorpus,
    TextFolderConfig,
    TextFolderCorpus,
)
from data_prep.corpora.text_tar import TextTarConfig, TextTarCorpus
from tidar_common.config import parse
from tidar_common.errors import UserError

__all__ = ["Corpus", "Document", "Part", "open_corpus", "utf8_bytes"]

READERS: dict[str, tuple[type, Callable[[Any], Corpus]]] = {
    "python_stdlib": (StdlibConfig, StdlibCorpus),
    "text_folder": (TextFolderConfig, TextFolderCorpus),
    "jsonl": (JsonlConfig, JsonlCorpus),
    "parquet": (ParquetConfig, ParquetCorpus),
    "arrow": (ArrowConfig, ArrowCorpus),
    "webdataset": (TextTarConfig, TextTarCorpus),
}


def open_corpus(section: DictConfig, heldout_path: str | None = None) -> Corpus:
    """The reader that `section.kind` names; with `heldout_path` all there is held out, read like
    the corpus, and nothing of the corpus. UserError naming the key that is wrong."""
    if heldout_path is not None:
        return CorpusWithHeldOut(open_corpus(section), _open_held_out(section, heldout_path))
    kind = section.get("kind")
    if kind == "mix":
        config = parse(MixConfig, section, "corpus")
        sources = {name: _open_source(name, keys) for name, keys in (config.sources or {}).items()}
        return MixCorpus(sources, config.max_epochs)
    if kind not in READERS:
        raise UserError(f"corpus.kind: unknown value {kind!r}; known are {', '.join(READERS)}, mix")
    schema, reader = READERS[kind]
    return reader(parse(schema, section, "corpus"))


def _open_held_out(section: DictConfig, path: str) -> Corpus:
    if "path" not in section:
        raise UserError(
            f"heldout_path: corpus={section.get('kind')} has no path, of which this would be "
            "another; use heldout_fraction"
        )
    try:
        return open_corpus(OmegaConf.create({**section, "path": path}))
    except UserError as error:
        raise UserError(str(error).replace("corpus.path", "heldout_path", 1)) from error


def _open_source(name: str, values: Any) -> Source:
    key = f"corpus.sources.{name}"
    if not isinstance(values, dict):
        raise UserError(f"{key}: is not a group of keys with kind, weight and path")
    weight = values.get("weight")
    if not isinstance(weight, int | float) or weight <= 0:
        raise UserError(f"{key}.weight: must be a number above 0, got {weight!r}")
    keys = {k: v for k, v in values.items() if k != "weight"}
    if keys.get("kind") == "mix":
        raise UserError(f"{key}.kind: a mix cannot be part of a mix; list its sources here")
    try:
        return Source(open_corpus(OmegaConf.create(keys)), float(weight))
    except UserError as error:
        raise UserError(str(error).replace("corpus.", f"{key}.", 1)) from error
