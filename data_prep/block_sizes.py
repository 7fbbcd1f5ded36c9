"""Several block sizes in one data set: each sequence is laid out with one of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.errors import UserError


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
        weights = list(shares) if shares else [1.0] * len(sizes)
        if len(weights) != len(sizes) or min(weights) <= 0:
            raise UserError(
                f"layout.block_shares: needs a number above 0 for each of {len(sizes)} block sizes"
            )
        total = sum(weights)
        return cls(tuple(sizes), tuple(weight / total for weight in weights))

    def draw(self, rng: np.random.Generator) -> int:
        """One of the sizes."""
        return int(rng.choice(self.sizes, p=self.shares))
