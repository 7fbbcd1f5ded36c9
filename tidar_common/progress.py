"""What `tidar-prepare` says while it works: a line every few seconds."""

import time

EVERY_S = 10.0


class Progress:
    """Counts documents, text and tokens."""

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
        if now - self._last >= EVERY_S:
            self._last = now
            megabytes = self.text_bytes / 1e6
            print(
                f"{self.documents:,} documents, {megabytes:,.1f} MB, {self.tokens:,} tokens, "
                f"{megabytes / (now - self._started):.2f} MB/s",
                flush=True,
            )
