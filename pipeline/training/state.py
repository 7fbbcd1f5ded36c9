"""How far a run has come: small, exact, saved with every checkpoint."""

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any

EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()


@dataclass
class TrainState:
    """Progress of a run. The order of data is a pure function, so these few numbers are all."""

    step: int = 0
    """Optimizer steps done."""
    sequences_seen: int = 0
    tokens: int = 0
    """Clean tokens without padding."""
    data_digest: str = EMPTY_DIGEST
    """Running SHA-256 over the sequences consumed, in order; equal iff the data was equal."""

    def consume(self, sequence_digests: list[bytes]) -> None:
        """Take the digests of a step's sequences, in the global order, into account."""
        current = bytes.fromhex(self.data_digest)
        for digest in sequence_digests:
            current = hashlib.sha256(current + digest).digest()
        self.data_digest = current.hex()
        self.sequences_seen += len(sequence_digests)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        return cls(**{field.name: values[field.name] for field in fields(cls)})
