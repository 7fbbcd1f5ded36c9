"""Rules of quality: datatrove's filters, asked about one document at a time."""

from dataclasses import asdict

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result

from data_prep.filters.config import FiltersConfig
from data_prep.filters.words import WORD, plain_words


class Rules:
    """The groups of rules that `config` names."""

    def __init__(self, config: FiltersConfig) -> None:
        self._filters: dict[str, BaseFilter] = {}
        language = plain_words()
        if config.repetition is not None:
            values = asdict(config.repetition)
            for key in ("top_n_grams", "dup_n_grams"):
                values[key] = tuple((int(n), share) for n, share in values[key])
            self._filters["repetition"] = GopherRepetitionFilter(**values, language=language)
        if config.quality is not None:
            self._filters["quality"] = GopherQualityFilter(
                **asdict(config.quality), language=language
            )
        if config.c4 is not None:
            self._filters["c4"] = C4QualityFilter(**asdict(config.c4), language=language)
        if config.fineweb is not None:
            self._filters["fineweb"] = FineWebQualityFilter(
                **asdict(config.fineweb), language=language
            )

    def broken_by(self, text: str) -> str | None:
        """The first rule that `text` breaks, as `group: rule`; None keeps it."""
        if self._filters and WORD.search(text) is None:
            return "no words"  # datatrove's ratios divide by their number
        for group, rules in self._filters.items():
            # C4's rules drop lines from what they are given; the document itself stays as it is.
            kept, rule = get_filter_result(rules.filter(Document(text=text, id="")))
            if not kept:
                return f"{group}: {str(rule).removeprefix('gopher_')}"
        return None
