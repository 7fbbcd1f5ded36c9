"""The keys under `filters`, `dedup` and `decontaminate`.

Rules carry the names that datatrove gives them, and None switches one off. What holds them is not
frozen: OmegaConf does not merge into a frozen dataclass inside another.
"""

from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tidar_common.errors import UserError


@dataclass
class QualityRules:
    """Gopher's (arXiv 2112.11446): words, symbols, lines."""

    min_doc_words: int | None = 50
    """Fewest words."""
    max_doc_words: int | None = 100_000
    """Most words."""
    min_avg_word_length: float | None = 3
    """Least mean length of a word."""
    max_avg_word_length: float | None = 10
    """Greatest mean length of a word."""
    max_symbol_word_ratio: float | None = 0.1
    """Most "#", and most ellipses, for each word."""
    max_bullet_lines_ratio: float | None = 0.9
    """Greatest share of lines that start with a bullet."""
    max_ellipsis_lines_ratio: float | None = 0.3
    """Greatest share of lines that end with an ellipsis."""
    max_non_alpha_words_ratio: float | None = 0.8
    """Least share of words with a letter in them, whatever the name says."""
    min_stop_words: int | None = 2
    """Fewest different stop words; None where the text is not English."""
    stop_words: list[str] | None = None
    """None takes the, be, to, of, and, that, have, with."""


@dataclass
class RepetitionRules:
    """Gopher's: lines, paragraphs and n-grams that stand in a text again and again."""

    dup_line_frac: float | None = 0.3
    """Greatest share of lines that stood before."""
    dup_para_frac: float | None = 0.3
    """Of paragraphs that stood before."""
    dup_line_char_frac: float | None = 0.2
    """Of characters in such lines."""
    dup_para_char_frac: float | None = 0.2
    """Of characters in such paragraphs."""
    top_n_grams: list[list[Any]] = field(default_factory=lambda: [[2, 0.2], [3, 0.18], [4, 0.16]])
    """[n, share]: of characters in the most frequent n-gram of words."""
    dup_n_grams: list[list[Any]] = field(
        default_factory=lambda: [[5, 0.15], [6, 0.14], [7, 0.13], [8, 0.12], [9, 0.11], [10, 0.1]]
    )
    """[n, share]: of characters in n-grams that stood before."""

    def __post_init__(self) -> None:
        for key in ("top_n_grams", "dup_n_grams"):
            for pair in getattr(self, key):
                # Not typed: OmegaConf takes no whole number for a float inside a list.
                if not (
                    len(pair) == 2
                    and isinstance(pair[0], int)
                    and isinstance(pair[1], int | float)
                    and pair[0] > 0
                ):
                    raise UserError(
                        f"filters.repetition.{key}: {pair} is not [n, share]; write [[2,0.2],...]"
                    )


@dataclass
class C4Rules:
    """C4's rules that remove a document (arXiv 1910.10683)."""

    filter_no_terminal_punct: bool = False
    """Drop lines without an end mark; dropped lines do not count as sentences, the text stays."""
    min_num_sentences: int = 5
    """Fewest sentences; -1 switches the rule off."""
    min_words_per_line: int = 3
    """Drop lines of fewer words."""
    max_word_length: int = 1000
    """Drop lines with a longer word."""
    filter_lorem_ipsum: bool = True
    """Remove documents with "lorem ipsum"."""
    filter_javascript: bool = True
    """Drop lines that speak of javascript."""
    filter_curly_bracket: bool = True
    """Remove documents with "{", which most code has."""
    filter_policy: bool = True
    """Drop lines on cookies and terms of use."""


@dataclass
class FineWebRules:
    """FineWeb's own (arXiv 2406.17557)."""

    line_punct_thr: float = 0.12
    """Least share of lines with an end mark."""
    line_punct_exclude_zero: bool = False
    """Whether a document with no such line passes that rule."""
    short_line_thr: float = 0.67
    """Greatest share of short lines."""
    short_line_length: int = 30
    """Characters of a short line, at most."""
    char_duplicates_ratio: float = 0.01
    """Greatest share of characters in lines that stood before."""
    new_line_ratio: float = 0.3
    """Most line ends for each word."""


@dataclass
class FiltersConfig:
    """Groups of rules, in the order in which they are tried; None leaves one out."""

    repetition: RepetitionRules | None = None
    """Gopher's rules on text that repeats itself; a share above the value removes the document,
    None switches a rule or the whole group off."""
    quality: QualityRules | None = None
    """Gopher's rules on words, symbols and lines, each of its own, as {min_doc_words:20}."""
    c4: C4Rules | None = None
    """C4's rules."""
    fineweb: FineWebRules | None = None
    """FineWeb's own rules."""

    @property
    def any(self) -> bool:
        return any(getattr(self, group.name) is not None for group in fields(self))


@dataclass(frozen=True)
class DedupConfig:
    exact: bool = False
    """Remove documents whose text is that of an earlier one; needs the filters extra, as
    minhash."""
    minhash: bool = False
    """Remove documents that are nearly an earlier one, by MinHash over all of the corpus."""
    n_grams: int = 5
    """Words of a shingle; near copies share most of them."""
    num_buckets: int = 14
    """Buckets of a signature; documents with an equal one are near copies."""
    hashes_per_bucket: int = 8
    """Sharing a part s of the shingles is found with probability 1-(1-s^hashes)^buckets."""

    def __post_init__(self) -> None:
        for key in ("n_grams", "num_buckets", "hashes_per_bucket"):
            if getattr(self, key) < 1:
                raise UserError(f"dedup.{key}: must be at least 1, got {getattr(self, key)}")

    @property
    def any(self) -> bool:
        return self.exact or self.minhash


@dataclass(frozen=True)
class DecontaminateConfig:
    evals: dict[str, str] | None = None
    """Remove documents that hold text of an eval, by name: a jsonl file or a folder of them, such
    as {gsm8k:/evals/gsm8k.jsonl}; listed in contaminated.jsonl. Needs the filters extra."""
    fields: list[str] | None = None
    """Fields of the evals with text, such as [question,answer]; None takes all that hold text."""
    n_grams: int = 13
    """Words in a row that both have; case, punctuation and numbers do not count."""

    def __post_init__(self) -> None:
        if self.n_grams < 1:
            raise UserError(f"decontaminate.n_grams: must be at least 1, got {self.n_grams}")

    @property
    def any(self) -> bool:
        return bool(self.evals)


def datatrove_version() -> str:
    """The version that is installed; UserError where there is none."""
    try:
        return version("datatrove")
    except PackageNotFoundError as error:
        raise UserError(
            "filters, dedup, decontaminate: need datatrove; pip install 'tidar-pretrain[filters]', "
            "or filters=none and neither of the others"
        ) from error
