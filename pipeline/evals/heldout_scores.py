"""How drafts do on held-out text, without decoding: of all of it, and source by source."""

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor

from data_prep.formats.groups import PackedSequence
from pipeline.distributed import World
from pipeline.evals.acceptance import (
    ALONE,
    MODEL,
    DraftScores,
    describe_calibration,
    score_drafts,
)
from pipeline.evals.config import Check, DecodeSpeedConfig, never
from pipeline.evals.heldout import HeldOut
from pipeline.model.transformer import Transformer
from tidar_common.progress import doing
from tidar_common.run_files import DraftScoresRow, HeldOutRow

DRAFTS = (MODEL, ALONE, "unigram", "bigram")
"""Those of every row, the model's own and controls; None where one was not scored."""
STALENESS = (0, 1, 2, 4, 7)
"""Numbers of tokens that a linear model's slots are scored without, as far as K allows."""


def score_heldout(
    model: Transformer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    world: World,
    check: Check = never,
    *,
    first: int = 0,
) -> DraftScores:
    """Losses and acceptance on the held-out sequences of `config`; sums over all ranks, which must
    call it together with the same weights. `check` as in `evaluate_decode_speed`, `first` as for
    `score_sequence`."""
    drafts = model.config.mask_token_id is not None
    block_size = (config.block_size or model.config.block_size or 1) if drafts else 1
    sequences = heldout.sequences(
        config.score_sequences,
        config.seed,
        block_size,
        shift=True,  # the decoder, too, starts its blocks anywhere
        rank=world.rank,
        world_size=world.size,
    )
    total = min(config.score_sequences, heldout.manifest.heldout.sequences)
    checked = _checked(sequences, -(-total // world.size), check)
    # Beside stale slots there is no need for controls: theirs are those of place 0.
    controls = heldout.controls(world, drafts and first == 0)
    scores = score_drafts(model, checked, block_size, controls, first)
    return reduce(add, world.gather(scores))


def score_by_staleness(
    model: Transformer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    world: World,
    fresh: DraftScores,
    check: Check = never,
) -> dict[int, DraftScores]:
    """`score_heldout` by the number of tokens that the slots know nothing of, for each of
    `STALENESS` below K; `fresh` is that of none. Empty for a model without linear drafts."""
    if not model.config.linear_drafts:
        return {}
    size = config.block_size or model.config.block_size or 1
    stale = {
        first: score_heldout(model, heldout, config, world, check, first=first)
        for first in STALENESS
        if 0 < first < size
    }
    return {0: fresh, **stale}


def describe_staleness(
    scores: Mapping[int, DraftScores], temperature: float
) -> dict[str, float | None] | None:
    """Expected tokens per forward by staleness; None where that is not scored."""
    if not scores or temperature not in (0, 1):
        return None
    return {
        str(first): _acceptance(score, temperature)["expected_tokens_per_forward"]
        for first, score in scores.items()
    }


def _checked(
    sequences: Iterator[PackedSequence], rounds: int, check: Check
) -> Iterator[PackedSequence]:
    """`sequences`, of which a rank may have one less than there are rounds of all ranks."""
    for number in range(1, rounds + 1):
        check()
        doing.part("held-out sequence", number, rounds)
        sequence = next(sequences, None)
        if sequence is not None:
            yield sequence


def describe_text(
    scores: DraftScores, temperature: float, drafts: bool, unigram_entropy: float
) -> HeldOutRow:
    """What was measured on held-out text, as keys of a decode-speed row at `temperature`.

    `drafts`: whether the model has a mask token. Without, what is about drafts is None.
    """
    # Sampling is scored at temperature 1 only; at others the sum of minima differs.
    scored = drafts and temperature in (0, 1)
    slots = scores.diffusion_tokens
    return HeldOutRow(
        ar_loss=scores.ar_loss / max(scores.ar_tokens, 1),
        diffusion_loss=scores.diffusion_loss / slots if slots else None,
        unigram_loss=scores.unigram_loss / max(scores.ar_tokens, 1),
        unigram_entropy=unigram_entropy,
        **_acceptance(scores, temperature if scored else None),
        **describe_calibration(scores.calibration),
    )


def describe_drafts(scores: DraftScores) -> dict[str, Any]:
    """The same of the drafts alone, at both temperatures that are scored."""
    return {
        "temperature_0": _acceptance(scores, 0.0),
        "temperature_1": _acceptance(scores, 1.0),
        **describe_calibration(scores.calibration),
    }


def _acceptance(scores: DraftScores, temperature: float | None) -> DraftScoresRow:
    """Of every draft at `temperature`, 0 or 1; all None where that is None."""

    def shares(sums: Mapping[str, Tensor], draft: str) -> list[float | None] | None:
        if temperature is None or draft not in sums:
            return None
        return _shares(sums[draft][int(temperature)], scores.drafts)

    accepted = {name: shares(scores.accepted, name) for name in DRAFTS}
    survived = {name: shares(scores.survived, name) for name in DRAFTS}
    return DraftScoresRow(
        teacher_forced_acceptance=accepted[MODEL],
        teacher_forced_survival=survived[MODEL],
        expected_tokens_per_forward=_expected_tokens(survived[MODEL]),
        recurrent_acceptance=accepted[ALONE],
        recurrent_expected_tokens_per_forward=_expected_tokens(survived[ALONE]),
        unigram_acceptance=accepted["unigram"],
        unigram_expected_tokens_per_forward=_expected_tokens(survived["unigram"]),
        bigram_acceptance=accepted["bigram"],
        bigram_expected_tokens_per_forward=_expected_tokens(survived["bigram"]),
    )


def _shares(sums: Tensor, counts: Tensor) -> list[float | None]:
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [total / count if count else None for total, count in pairs]


def _expected_tokens(survival: list[float | None] | None) -> float | None:
    """1, and for each place the chance that a draft is kept there."""
    return None if survival is None else 1 + sum(share or 0.0 for share in survival)
