"""Block lengths over a run: with which shares a sequence draws its K at a step."""

from dataclasses import dataclass, replace

from data_prep.layout import BlockSizes
from tidar_common.errors import UserError


@dataclass(frozen=True)
class BlockCurriculum:
    """Shares that move linearly from those of `start` to those of `end`.

    A pure function of the step, and so of a sequence's number in the run: neither a resume nor the
    number of processes changes what a sequence draws.
    """

    start: BlockSizes
    end: BlockSizes
    from_step: int
    ramp_steps: int

    @classmethod
    def checked(
        cls,
        start: BlockSizes | None,
        end_shares: list[float] | None,
        from_step: int,
        ramp_steps: int,
    ) -> "BlockCurriculum | None":
        """From the keys of `conf/curriculum`; None where all sequences have the same K.

        Args:
            start: `layout.block_sizes` with `layout.block_shares`.
            end_shares: `layout.block_shares_end`; None keeps those of `start`.
            from_step: steps before the shares move.
            ramp_steps: steps over which they do.

        Raises:
            UserError: naming the key that is wrong.
        """
        for name, value in (("from_step", from_step), ("ramp_steps", ramp_steps)):
            if value < 0:
                raise UserError(f"layout.block_shares_{name}: must be 0 or more, got {value}")
        if start is None:
            if end_shares:
                raise UserError(
                    "layout.block_shares_end: says how often to draw layout.block_sizes, which has "
                    "no value"
                )
            return None
        end = start
        if end_shares:
            end = start.with_shares(end_shares, "layout.block_shares_end")
        return cls(start, end, from_step, ramp_steps)

    def at(self, step: int) -> BlockSizes:
        """What the sequences of the step after `step` done ones draw from."""
        begun = step - self.from_step
        if begun < 0:
            return self.start
        grown = min(1.0, begun / self.ramp_steps) if self.ramp_steps else 1.0
        pairs = zip(self.start.shares, self.end.shares, strict=True)
        return replace(self.start, shares=tuple((1 - grown) * a + grown * b for a, b in pairs))
