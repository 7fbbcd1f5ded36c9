"""Words and sentences by regular expressions, for datatrove's rules and signatures.

datatrove's own tokenizers need spaCy, Stanza or NLTK, the last two with models that are fetched at
run time. These need nothing, and give the same words everywhere.
"""

import re
from functools import lru_cache

from datatrove.utils.text import TERMINAL_PUNCTUATION
from datatrove.utils.word_tokenizers import WordTokenizer

HAN_AND_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
"""Written without spaces: each character counts as a word."""
WORD = re.compile(
    rf"[{HAN_AND_KANA}]|(?:(?![{HAN_AND_KANA}])\w)+(?:['’](?:(?![{HAN_AND_KANA}])\w)+)*|[^\w\s]"
)
_ENDS = re.escape("".join(sorted(TERMINAL_PUNCTUATION)))
SENTENCE = re.compile(rf"[^{_ENDS}\n]*[{_ENDS}]+[\"'”’)\]]*|[^{_ENDS}\n]+")


class PlainWords(WordTokenizer):
    """A word is a run of letters and digits, with apostrophes inside, or one other sign."""

    def __init__(self) -> None:
        super().__init__("plain")

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in SENTENCE.finditer(text) if match[0].strip()]


@lru_cache(maxsize=1)
def plain_words() -> PlainWords:
    """The one instance; datatrove takes it where it takes a language."""
    return PlainWords()
