"""The decoders that evals compare: a method each, with the options that set it apart."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.decoding.methods import METHODS, Method
from tidar_common.errors import UserError

if TYPE_CHECKING:
    from pipeline.model.transformer import Transformer


@dataclass(frozen=True)
class Decoder:
    """How answers are generated."""

    name: str
    """What rows call it."""
    method: str
    """One of `METHODS`."""
    trust: float = 1.0
    """Weight of the AR logits in the target; below 1 the text is not that of `ar`."""
    chooses_step: bool = False
    """Whether block length and blocks are those that pay on this machine, plain steps where none
    do."""

    @property
    def traits(self) -> Method:
        """What holds for the method."""
        return METHODS[self.method]

    def fits(self, model: "Transformer") -> bool:
        """Whether `model` has what the method needs."""
        has_mask, has_head = model.config.mask_token_id is not None, model.draft_head is not None
        needs = self.traits
        return has_mask >= needs.needs_mask and has_head >= needs.needs_head


COMPARED = {
    "ar": Decoder("ar", "ar"),
    "tidar": Decoder("tidar", "tidar"),
    "tidar_chosen": Decoder("tidar_chosen", "tidar", chooses_step=True),
    **{name: Decoder(name, name) for name in METHODS if name not in ("ar", "tidar")},
}
"""Those of the decode-speed eval, by name."""
ANSWERING = ("ar", "tidar", "tidar_diffusion")
"""Those of tasks and code, as in the published results: `tidar_diffusion` is TiDAR with a trust
below 1."""


def check_names(key: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raises ValueError naming `key` unless `names` are different ones of `known`, at least one."""
    if not names or not set(names) <= set(known) or len(set(names)) < len(names):
        raise ValueError(f"{key} must be different ones of {', '.join(known)}, got {list(names)}")


def answering_decoders(
    names: Sequence[str], trust: float, model: "Transformer", key: str
) -> list[Decoder]:
    """The decoders called `names`, of `ANSWERING`; `trust` is that of `tidar_diffusion`.

    Raises:
        UserError: naming `key`, when the model cannot draft and more than `ar` is asked for.
    """
    if model.config.mask_token_id is None and set(names) != {"ar"}:
        raise UserError(f"{key}: this model has no mask token, so it cannot draft; use {key}=[ar]")
    mixed = replace(COMPARED["tidar"], name="tidar_diffusion", trust=trust)
    return [mixed if name == mixed.name else COMPARED[name] for name in names]
