"""When a generation ends: a limit, an end token, or a string; exact also inside a step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_prep.tokenizers.load import Tokenizer
from pipeline.decoding.text import TextStream
from tidar_common.errors import UserError


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
        found = [at for at in (self.text.find(stop, start) for stop in self._strings) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def finish(self) -> str:
        """The text at the end of a generation that no string stopped."""
        self.text += self._decoder.end()
        return self.text


class Watch(Protocol):
    """What a `Limit` asks of a `StopWatch`."""

    def completes(self, token: int) -> bool: ...


class Limit:
    """Counts one generation's tokens down and cuts each step's where the generation ends."""

    def __init__(
        self, max_new_tokens: int, stop_ids: Iterable[int], watch: Watch | None = None
    ) -> None:
        self._remaining = max_new_tokens
        self._stop_ids = frozenset(stop_ids)
        self._watch = watch
        self.reason: str | None = None
        """Why the generation ended: `length`, `eos` or `stop`; None while it goes on."""

    def cut(self, tokens: Sequence[int]) -> list[int]:
        """The part of a step's tokens that still counts, the ending token included."""
        kept: list[int] = []
        for token in tokens:
            kept.append(token)
            self._remaining -= 1
            if token in self._stop_ids:
                self.reason = "eos"
            elif self._watch is not None and self._watch.completes(token):
                self.reason = "stop"
            elif self._remaining == 0:
                self.reason = "length"
            if self.reason is not None:
                break
        return kept
