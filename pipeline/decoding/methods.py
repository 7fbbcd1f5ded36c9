"""The ways to decode, by name: what each needs of a model, and what holds for its text.

Needs no torch, so that reports and settings can read it.
"""

from dataclasses import dataclass

LOOKUP_TOKENS = 7
"""Drafts of `prompt_lookup` and `speculative`, unless `block_size` says otherwise (minus one)."""
CONFIDENCE = 0.9
"""Probability from which `block_diffusion` keeps a token, unless said otherwise."""


@dataclass(frozen=True)
class Method:
    """One way to decode."""

    needs_mask: bool = False
    """Whether the model must have a mask token."""
    needs_head: bool = False
    """Whether it must have a draft head."""
    proposes: bool = False
    """Whether drafts come from elsewhere than the model; they do for one row only."""
    verifies: bool = True
    """Whether steps verify drafts, which are then counted by position; text of `block_diffusion`,
    which does not, is not that of `ar`."""
    batches: bool = True
    """Whether several rows can be decoded side by side."""


METHODS = {
    "tidar": Method(needs_mask=True),
    "recurrent": Method(needs_head=True),
    "ar": Method(verifies=False),
    "prompt_lookup": Method(proposes=True, batches=False),
    "speculative": Method(proposes=True, batches=False),
    "block_diffusion": Method(needs_mask=True, verifies=False, batches=False),
}
