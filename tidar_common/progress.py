"""What commands say while they work, so that no silence is long."""

import os
import sys
import threading
import time
from collections.abc import Callable

SILENCE_S, SILENT_SHARE = 10.0, 0.1
"""How long a silence may be: that, or in what takes long this share of the time since it began."""
POLLED_EVERY_S = 1.0


class Progress:
    """Counts documents, text and tokens for `tidar-prepare`; a line every few seconds."""

    def __init__(self) -> None:
        self.documents = 0
        self.text_bytes = 0
        self.tokens = 0
        self._started = self._last = time.monotonic()

    def add(self, documents: int, text_bytes: int, tokens: int) -> None:
        """Count some documents; prints when it is time."""
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens
        now = time.monotonic()
        if now - self._last >= SILENCE_S:
            self._last = now
            megabytes = self.text_bytes / 1e6
            print(
                f"{self.documents:,} documents, {megabytes:,.1f} MB, {self.tokens:,} tokens, "
                f"{megabytes / (now - self._started):.2f} MB/s",
                flush=True,
            )


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Doing:
    """What this process is at: a thread tells it when nothing else was said for a while.

    Long work calls the object as it begins something, and `part` as it goes on; both cost next to
    nothing. Only rank 0 tells.
    """

    def __init__(self) -> None:
        self.tell: Callable[[str], None] = to_stderr
        self._what = self._part = ""
        self._since = self._told = time.monotonic()
        self._thread: threading.Thread | None = None

    def __call__(self, what: str) -> None:
        """Something else begins, such as `loading weights`; empty where nothing takes long."""
        self._what, self._part, self._since = what, "", time.monotonic()
        # Started late: most commands never need it, and processes are forked before it is there.
        if what and self._thread is None and os.environ.get("RANK", "0") == "0":
            self._thread = threading.Thread(target=self._watch, name="doing", daemon=True)
            self._thread.start()

    def part(self, name: str, number: int, count: int | None = None) -> None:
        """The work has come to `number` of `count`, from 1."""
        self._part = f": {name} {number:,}" + ("" if count is None else f" of {count:,}")

    def spoke(self) -> None:
        """Something was said: silence begins anew."""
        self._told = time.monotonic()

    def poll(self) -> None:
        """Tell, if it is time."""
        what, now = self._what, time.monotonic()
        silence = max(SILENCE_S, SILENT_SHARE * (now - self._since))
        if what and now - max(self._told, self._since) >= silence:
            self._told = now
            self.tell(f"... {what}{self._part}, for {now - self._since:.0f} s")

    def _watch(self) -> None:
        while True:
            time.sleep(POLLED_EVERY_S)
            self.poll()


doing = Doing()
"""Of this process."""
