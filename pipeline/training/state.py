"""How far a run has come: small, exact, saved with every checkpoint."""

import hashlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipeline.data.order import numbers_after

EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()


@dataclass
class TrainState:
    """Progress of a run. The order of data is a pure function, so these few numbers are all."""

    step: int = 0
    """Optimizer steps done."""
    sequences_seen: int = 0
    """Of the run's order: all before this number were consumed or left out."""
    tokens: int = 0
    """Clean tokens without padding."""
    data_digest: str = EMPTY_DIGEST
    """Running SHA-256 over the sequences consumed, in order; equal iff the data was equal."""

    left_out: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of order numbers (first, behind the last) that are passed over; sorted, disjoint."""
    anomalies: dict[str, Any] = field(default_factory=dict)
    """What the scores of the next steps are compared with; see `anomalies.Anomalies`."""

    def consume(self, sequence_digests: list[bytes]) -> None:
        """Take the digests of a step's sequences, in the global order, into account."""
        current = bytes.fromhex(self.data_digest)
        for digest in sequence_digests:
            current = hashlib.sha256(current + digest).digest()
        self.data_digest = current.hex()
        numbers = numbers_after(self.sequences_seen, len(sequence_digests), self.left_out)
        self.sequences_seen = numbers[-1] + 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        known = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        known["left_out"] = [(first, end) for first, end in known.get("left_out", [])]
        return cls(**known)
