"""The three decoders that a table of quality and speed compares, as in the published results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from pipeline.evals.totals import fourgrams
from tidar_common.errors import UserError

if TYPE_CHECKING:
    from pipeline.model.transformer import Transformer

DECODERS = ("ar", "tidar", "tidar_diffusion")


@dataclass(frozen=True)
class Decoder:
    """How answers are generated."""

    name: str
    method: str
    """`tidar` or `ar`."""
    trust: float
    """Weight of the AR logits in the target: 1 is lossless."""


@dataclass
class Cost:
    """What the answers of one decoder cost on this rank; ranks' costs add up."""

    answers: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    """Of decoding, one answer after the other."""
    fourgrams: int = 0
    distinct_fourgrams: int = 0
    """Different ones within an answer, summed over answers."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def add(self, tokens: Sequence[int], forwards: int, seconds: float) -> None:
        """Count one answer."""
        self.answers += 1
        self.tokens += len(tokens)
        self.forwards += forwards
        self.seconds += seconds
        count, distinct = fourgrams(tokens)
        self.fourgrams += count
        self.distinct_fourgrams += distinct

    def rates(self) -> dict[str, float | None]:
        """With tokens per forward and per second, prompts included, of one process; and the share
        of distinct 4-grams, without which the first says little: repetition is easy to draft."""
        sums = {f.name: getattr(self, f.name) for f in fields(self)}
        count, distinct = sums.pop("fourgrams"), sums.pop("distinct_fourgrams")
        return {
            **sums,
            "tokens_per_forward": self.tokens / max(self.forwards, 1),
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "distinct_4grams": distinct / count if count else None,
        }


def check_decoders(names: Sequence[str]) -> None:
    """Raises ValueError unless `names` are different ones of `DECODERS`, at least one."""
    unknown = [name for name in names if name not in DECODERS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"decoders must be different ones of {', '.join(DECODERS)}, got {list(names)}"
        )


def decoders_of(
    names: Sequence[str], trust: float, model: "Transformer", key: str
) -> list[Decoder]:
    """The decoders called `names`; `trust` is that of `tidar_diffusion`.

    Raises:
        UserError: naming `key`, when the model cannot draft and more than `ar` is asked for.
    """
    if model.config.mask_token_id is None and set(names) != {"ar"}:
        raise UserError(f"{key}: this model has no mask token, so it cannot draft; use {key}=[ar]")
    make: dict[str, Callable[[], Decoder]] = {
        "ar": lambda: Decoder("ar", "ar", 1.0),
        "tidar": lambda: Decoder("tidar", "tidar", 1.0),
        "tidar_diffusion": lambda: Decoder("tidar_diffusion", "tidar", trust),
    }
    return [make[name]() for name in names]
