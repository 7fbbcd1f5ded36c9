"""Likelihood of the held-out split: every sequence once, spread over the ranks.

The AR loss is that of plain causal prediction. The diffusion loss is taken on the published layout:
full coverage, each document's grid at its start, so that every position is predicted once, from a
block that begins 0 … K - 1 positions before it. Letters: K block length.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from data_prep.tokenizers.load import Tokenizer
from pipeline.distributed import World
from pipeline.evals.acceptance import Controls, DraftScores, drafts_of
from pipeline.evals.config import LikelihoodConfig
from pipeline.evals.heldout import HeldOut, documents
from pipeline.evals.heldout_scores import describe_drafts
from pipeline.evals.scoring import score_sequence
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError
from tidar_common.jsonlines import parse_strictly
from tidar_common.progress import doing

TEXTS_KEY = "evals.likelihood.texts_file"


@dataclass(frozen=True)
class LikelihoodSums:
    """Sums over sequences, losses in nats; add the ranks' with `+`."""

    sequences: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    ar_tokens: int
    ar_loss: float
    unigram_loss: float
    """Over the same tokens as `ar_loss`."""
    first_loss: float
    """Unigram loss of each document's first token, which nothing predicts."""
    diffusion_tokens: Tensor
    """At place 0 … K - 1 of a block, fp64 [K]."""
    diffusion_loss: Tensor
    """fp64 [K]"""
    drafts: DraftScores
    """Of the blocks that have text before them."""

    @classmethod
    def zero(cls, block_size: int) -> "LikelihoodSums":
        none = torch.zeros(block_size, dtype=torch.float64)
        return cls(0, 0, 0, 0, 0.0, 0.0, 0.0, none, none, DraftScores.zero(block_size))

    def __add__(self, other: "LikelihoodSums") -> "LikelihoodSums":
        return LikelihoodSums(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def evaluate_likelihood(
    model: Transformer,
    tokenizer: Tokenizer,
    heldout: HeldOut,
    config: LikelihoodConfig,
    world: World,
) -> dict[str, Any]:
    """Losses and drafts on held-out text, equal on all ranks; keys as in `docs/evals.md`.

    Every rank must call it with the same full weights.

    Args:
        model: in evaluation mode. Without a mask token the diffusion entries are None.
        tokenizer: the data's; counts the bytes of text where not the whole split is scored.
        heldout: where sequences come from.
        config: how many of them.
        world: the ranks that share the work.
    """
    drafts = model.config.mask_token_id is not None
    block_size = (config.block_size or model.config.block_size or 1) if drafts else 1
    entropy = heldout.unigram().entropy
    total = _of_split(model, tokenizer, heldout, config, block_size, world)
    return {
        "sequences": total.sequences,
        "whole_split": total.sequences == heldout.manifest.heldout.sequences,
        **_figures(total, _text_bytes(total, heldout), drafts),
        "unigram_entropy": entropy,
        "block_size": block_size if drafts else None,
        "by_source": _by_source(model, tokenizer, heldout, config, block_size, world),
    }


def _by_source(
    model: Transformer,
    tokenizer: Tokenizer,
    heldout: HeldOut,
    config: LikelihoodConfig,
    block_size: int,
    world: World,
) -> dict[str, Any] | None:
    """Figures of each set of a mix and of each source of `texts_file`; None without either."""
    drafts = model.config.mask_token_id is not None
    rows: dict[str, Any] = {}
    for name, part in heldout.by_source().items():
        total = _of_split(model, tokenizer, part, config, block_size, world)
        rows[name] = _figures(total, _text_bytes(total, part), drafts)
    if config.texts_file is not None:
        longest = heldout.manifest.sequence_length
        texts = read_texts(Path(config.texts_file).expanduser(), tokenizer, longest, block_size)
        controls = heldout.controls(world, drafts)
        for source, sequences in texts.items():
            if source in rows:
                raise UserError(
                    f"{TEXTS_KEY}: the source {source!r} is also a set of "
                    "data.mix; rename one of them"
                )
            share = sequences[world.rank :: world.size]
            sums = sum_up(model, tokenizer, share, block_size, controls)
            total = sum(world.gather(sums), LikelihoodSums.zero(block_size))
            rows[source] = _figures(total, total.text_bytes, drafts)
    return rows or None


def _of_split(
    model: Transformer,
    tokenizer: Tokenizer,
    heldout: HeldOut,
    config: LikelihoodConfig,
    block_size: int,
    world: World,
) -> LikelihoodSums:
    share = heldout.sequences(
        config.sequences,
        config.seed,
        block_size,
        shift=False,
        loss_span="document",
        rank=world.rank,
        world_size=world.size,
    )
    controls = heldout.controls(world, model.config.mask_token_id is not None)
    sums = sum_up(model, tokenizer, share, block_size, controls)
    return sum(world.gather(sums), LikelihoodSums.zero(block_size))


def _text_bytes(total: LikelihoodSums, heldout: HeldOut) -> int:
    """Of the whole split what the manifest counted; of a part, what decoding its documents found,
    the same number but where a cut went through a character."""
    split = heldout.manifest.heldout
    return split.text_bytes if total.sequences == split.sequences else total.text_bytes


def _figures(total: LikelihoodSums, text_bytes: int, drafts: bool) -> dict[str, Any]:
    """Losses, perplexities and code lengths of what `total` sums up, `text_bytes` long."""
    ar_loss = total.ar_loss / max(total.ar_tokens, 1)
    diffusion_tokens = int(total.diffusion_tokens.sum())
    diffusion_loss = float(total.diffusion_loss.sum()) / max(diffusion_tokens, 1)
    bits = (total.ar_loss + total.first_loss) / math.log(2)
    diffusion_bits = float(total.diffusion_loss.sum()) / math.log(2)
    places = zip(total.diffusion_loss.tolist(), total.diffusion_tokens.tolist(), strict=True)
    by_place = [loss / count if count else None for loss, count in places]
    return {
        "documents": total.documents,
        "text_bytes": text_bytes,
        "ar_tokens": total.ar_tokens,
        "ar_loss": ar_loss,
        "perplexity": math.exp(ar_loss),
        "bits_per_byte": bits / max(text_bytes, 1),
        "unigram_loss": total.unigram_loss / max(total.ar_tokens, 1),
        "diffusion_tokens": diffusion_tokens,
        "diffusion_loss": diffusion_loss if drafts else None,
        "diffusion_perplexity": math.exp(diffusion_loss) if drafts else None,
        "diffusion_bits_per_byte": diffusion_bits / max(text_bytes, 1) if drafts else None,
        "diffusion_loss_by_place": by_place if drafts else None,
        "drafts": describe_drafts(total.drafts) if drafts else None,
    }


def sum_up(
    model: Transformer,
    tokenizer: Tokenizer,
    sequences: Iterable[PackedSequence],
    block_size: int,
    controls: Controls,
) -> LikelihoodSums:
    """The sums of `sequences`; `controls` of the tokenizer's ids, with an fp64 unigram."""
    costs = controls.unigram.log().neg()
    over_model = controls.on(model)
    total = LikelihoodSums.zero(block_size)
    for number, sequence in enumerate(sequences, 1):
        doing.part("sequence", number)
        scored = score_sequence(model, sequence, block_size)
        pieces = documents(sequence)
        first = torch.tensor([int(piece[0]) for piece in pieces])
        tokens = torch.zeros(block_size, dtype=torch.float64)
        losses = torch.zeros_like(tokens)
        if scored.batch.diffusion_labels:
            layout = sequence.layout
            place = layout.slot_position - layout.prefix_end[layout.slot_block]
            places = torch.from_numpy(place.astype("int64"))
            tokens.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
            losses.index_add_(0, places, scored.diffusion_losses)
        labels = scored.batch.labels[: scored.batch.ar_labels].cpu()
        total = total + LikelihoodSums(
            sequences=1,
            documents=len(pieces),
            text_bytes=sum(len(tokenizer.decode(p.tolist()).encode()) for p in pieces),
            ar_tokens=scored.batch.ar_labels,
            ar_loss=float(scored.ar_losses.sum()),
            unigram_loss=float(costs[labels].sum()),
            first_loss=float(costs[first].sum()),
            diffusion_tokens=tokens,
            diffusion_loss=losses,
            drafts=drafts_of(model, scored, block_size, over_model),
        )
    return total


def read_texts(
    path: Path, tokenizer: Tokenizer, longest: int, block_size: int
) -> dict[str, list[PackedSequence]]:
    """The texts of a file of JSON lines, `{"text": "...", "source": "..."}`, by source.

    Each text ends with the end token, as a document in training. One that is longer than `longest`
    tokens is cut into pieces, each a sequence without padding, drafted in full on a grid from its
    start. Without a "source" it is `text`.

    Raises:
        UserError: naming the file and the line that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{TEXTS_KEY}: {path} is not a file of UTF-8 text ({error})") from error
    by_source: dict[str, list[PackedSequence]] = {}
    for number, row in parse_strictly(lines, f"{TEXTS_KEY}: {path}"):
        text, source = row.get("text"), str(row.get("source", "text"))
        if not isinstance(text, str):
            raise UserError(f'{TEXTS_KEY}: {path}:{number}: "text" must be there, and be a text')
        ids = np.array([*tokenizer.encode(text), tokenizer.eos_id])
        pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        sequences = by_source.setdefault(source, [])
        sequences += [_sequence(piece, block_size) for piece in pieces]
    if not by_source:
        raise UserError(f"{TEXTS_KEY}: {path} holds no text")
    return by_source


def _sequence(tokens: np.ndarray, block_size: int) -> PackedSequence:
    lengths = [len(tokens)]
    return PackedSequence(tokens, np.array(lengths), build_layout(lengths, block_size))
