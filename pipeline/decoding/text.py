"""From tokens to text while they come: whole characters only, and where the text ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_prep.tokenizers.load import Tokenizer
from tidar_common.errors import UserError

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


@dataclass(frozen=True)
class StopStrings:
    """Texts after whose first occurrence in the new text decoding ends."""

    tokenizer: Tokenizer
    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(self.strings):
            raise UserError("stop: holds an empty string; leave it out")

    def watch(self, prompt: Sequence[int]) -> "StopWatch":
        """A watch over one generation after `prompt`."""
        return StopWatch(self, prompt)


class StopWatch:
    """Follows one generation's text, token by token."""

    def __init__(self, stops: StopStrings, prompt: Sequence[int]) -> None:
        self._strings = stops.strings
        self._decoder = TextStream(stops.tokenizer, prompt)
        self._longest = max(map(len, stops.strings), default=0)
        self.text = ""
        """The text so far; after a stop, what stands before the stop string."""

    def completes(self, token: int) -> bool:
        """Whether the text with `token` holds a stop string; then `text` is cut before it."""
        before = len(self.text)
        self.text += self._decoder.add([token])
        start = max(0, before - self._longest)
        places = [self.text.find(stop, start) for stop in self._strings]
        places = [place for place in places if place >= 0]
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    def finish(self) -> str:
        """The text at the end of a generation that no string stopped."""
        self.text += self._decoder.end()
        return self.text


class Limit:
    """Counts one generation's tokens down and cuts each step's where the generation ends."""

    def __init__(
        self, max_new_tokens: int, eos_id: int | None = None, watch: StopWatch | None = None
    ) -> None:
        self._remaining = max_new_tokens
        self._eos_id = eos_id
        self._watch = watch
        self.reason: str | None = None
        """Why the generation ended: `length`, `eos` or `stop`; None while it goes on."""

    def cut(self, tokens: Sequence[int]) -> list[int]:
        """The part of a step's tokens that still counts, the ending token included."""
        kept: list[int] = []
        for token in tokens:
            kept.append(token)
            self._remaining -= 1
            if token == self._eos_id:
                self.reason = "eos"
            elif self._watch is not None and self._watch.completes(token):
                self.reason = "stop"
            elif self._remaining == 0:
                self.reason = "length"
            if self.reason is not None:
                break
        return kept

    def text(self) -> str | None:
        """The whole text of a generation that ended, cut before a stop string; None where no
        strings are looked for."""
        if self._watch is None:
            return None
        return self._watch.text if self.reason == "stop" else self._watch.finish()
