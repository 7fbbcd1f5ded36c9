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
    max_doc_words: int | None = 100_000
    min_avg_word_length: float | None = 3
    max_avg_word_length: float | None = 10
    max_symbol_word_ratio: float | None = 0.1
    max_bullet_lines_ratio: float | None = 0.9
    max_ellipsis_lines_ratio: float | None = 0.3
    max_non_alpha_words_ratio: float | None = 0.8
    """The least share of words with a letter, whatever the name says."""
    min_stop_words: int | None = 2
    stop_words: list[str] | None = None


@dataclass
class RepetitionRules:
    """Gopher's: lines, paragraphs and n-grams that stand in a text again and again."""

    dup_line_frac: float | None = 0.3
    dup_para_frac: float | None = 0.3
    dup_line_char_frac: float | None = 0.2
    dup_para_char_frac: float | None = 0.2
    top_n_grams: list[list[Any]] = field(default_factory=lambda: [[2, 0.2], [3, 0.18], [4, 0.16]])
    dup_n_grams: list[list[Any]] = field(
        default_factory=lambda: [[5, 0.15], [6, 0.14], [7, 0.13], [8, 0.12], [9, 0.11], [10, 0.1]]
    )

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
    min_num_sentences: int = 5
    min_words_per_line: int = 3
    max_word_length: int = 1000
    filter_lorem_ipsum: bool = True
    filter_javascript: bool = True
    filter_curly_bracket: bool = True
    filter_policy: bool = True


@dataclass
class FineWebRules:
    """FineWeb's own (arXiv 2406.17557)."""

    line_punct_thr: float = 0.12
    line_punct_exclude_zero: bool = False
    short_line_thr: float = 0.67
    short_line_length: int = 30
    char_duplicates_ratio: float = 0.01
    new_line_ratio: float = 0.3


@dataclass
class FiltersConfig:
    """Groups of rules, in the order in which they are tried; None leaves one out."""

    repetition: RepetitionRules | None = None
    quality: QualityRules | None = None
    c4: C4Rules | None = None
    fineweb: FineWebRules | None = None

    @property
    def any(self) -> bool:
        return any(getattr(self, group.name) is not None for group in fields(self))


@dataclass(frozen=True)
class DedupConfig:
    exact: bool = False
    minhash: bool = False
    n_grams: int = 5
    num_buckets: int = 14
    hashes_per_bucket: int = 8

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
    """By name: a jsonl file, or a folder of them."""
    fields: list[str] | None = None
    """Fields with text; None takes every field that holds text."""
    n_grams: int = 13

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
