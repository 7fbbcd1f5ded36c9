"""Several block sizes in one data set: each sequence is laid out with one of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tidar_common.errors import UserError


@dataclass(frozen=True)
class BlockSizes:
    """A choice of K, drawn for every sequence."""

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    """How often each is drawn; they add up to 1."""

    @classmethod
    def checked(
        cls, sizes: Sequence[int] | None, shares: Sequence[float] | None, largest: int | None
    ) -> "BlockSizes | None":
        """From `layout.block_sizes` and `layout.block_shares`; None where there is no choice.

        Args:
            sizes: the values of K; None or empty for none but `layout.block_size`.
            shares: as many, of any sum; None draws all alike.
            largest: `layout.block_size`, which none may exceed; None leaves that open.

        Raises:
            UserError: naming the key that is wrong.
        """
        if not sizes:
            if shares:
                raise UserError("layout.block_shares: says how often to draw layout.block_sizes, "
                                "which has no value")  # fmt: skip
            return None
        if min(sizes) < 1:
            raise UserError(f"layout.block_sizes: must be at least 1, got {min(sizes)}")
        if largest is not None and max(sizes) > largest:
            raise UserError(
                f"layout.block_sizes: {max(sizes)} is above layout.block_size {largest}, the most "
                "that a block drafts; raise that"
            )
        alike = cls(tuple(sizes), (1 / len(sizes),) * len(sizes))
        return alike.with_shares(shares, "layout.block_shares") if shares else alike

    def with_shares(self, shares: Sequence[float], key: str) -> "BlockSizes":
        """The same sizes drawn by `shares` of any sum; raises UserError naming `key`."""
        total = sum(shares)
        if len(shares) != len(self.sizes) or min(shares) < 0 or total <= 0:
            raise UserError(
                f"{key}: needs a number for each of {len(self.sizes)} block sizes, none below 0 "
                "and one above"
            )
        return BlockSizes(self.sizes, tuple(share / total for share in shares))

    def draw(self, rng: np.random.Generator) -> int:
        """One of the sizes."""
        return int(rng.choice(self.sizes, p=self.shares))
