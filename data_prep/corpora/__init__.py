"""Readers of text, one file each; a reader yields documents and counts what it refuses."""

from data_prep.corpora.base import Corpus, Document, Part, utf8_bytes
from data_prep.corpora.opening import open_corpus

__all__ = ["Corpus", "Document", "Part", "open_corpus", "utf8_bytes"]
