"""From the `corpus` section of a config to a reader."""

from omegaconf import DictConfig

from data_prep.config import parse
from data_prep.corpora.base import Corpus
from data_prep.corpora.jsonl import JsonlConfig, JsonlCorpus
from data_prep.corpora.parquet import ParquetConfig, ParquetCorpus
from data_prep.corpora.python_stdlib import StdlibConfig, StdlibCorpus
from data_prep.corpora.text_folder import TextFolderConfig, TextFolderCorpus
from data_prep.errors import UserError


def open_corpus(section: DictConfig) -> Corpus:
    """The reader that `section.kind` names; UserError naming the key that is wrong."""
    kind = section.get("kind")
    if kind == "python_stdlib":
        return StdlibCorpus(parse(StdlibConfig, section, "corpus"))
    if kind == "text_folder":
        return TextFolderCorpus(parse(TextFolderConfig, section, "corpus"))
    if kind == "jsonl":
        return JsonlCorpus(parse(JsonlConfig, section, "corpus"))
    if kind == "parquet":
        return ParquetCorpus(parse(ParquetConfig, section, "corpus"))
    raise UserError(
        f"corpus.kind: unknown value {kind!r}; known are python_stdlib, text_folder, jsonl, parquet"
    )
