"""From tokens to text while they come: characters are shown when they are complete."""

from collections.abc import Iterable, Sequence

from data_prep.tokenizers.load import Tokenizer

INCOMPLETE = "\ufffd"
"""What decoding gives for bytes that are not yet a character."""


class TextStream:
    """Decodes a growing sequence of tokens; the parts join to the decoded whole.

    A character may be spread over several byte tokens, and what a token looks like may depend on
    its neighbours. So a token is decoded together with the few before it, and the text held back
    while it ends in the middle of a character.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """`context` are the tokens before the first, such as a prompt; their text is not given."""
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start = 0
        """Tokens before it can no longer change what follows."""
        self._shown = len(self._ids)
        """Tokens whose text was given."""

    def add(self, tokens: Iterable[int]) -> str:
        """The text that became complete with `tokens`."""
        self._ids += tokens
        text, whole = self._pending()
        if whole.endswith(INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def end(self) -> str:
        """What was held back, complete or not."""
        text, _ = self._pending()
        self._shown = len(self._ids)
        return text

    def _pending(self) -> tuple[str, str]:
        shown = self._tokenizer.decode(self._ids[self._start : self._shown])
        whole = self._tokenizer.decode(self._ids[self._start :])
        return whole[len(shown) :], whole


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, so that the parts join to the decoded whole.

    A character of several byte tokens stands at the last of them.
    """
    stream = TextStream(tokenizer)
    texts = [stream.add([token]) for token in ids]
    if texts:
        texts[-1] += stream.end()
    return texts
