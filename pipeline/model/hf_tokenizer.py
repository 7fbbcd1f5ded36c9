"""Tokenizer files of an export: what the model was trained with, and what AutoTokenizer reads."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from data_prep.tokenizers.load import HUGGINGFACE_FILE, SentencePieceTokenizer, Tokenizer
from pipeline.model.huggingface import TOKENIZER_CONFIG_FILE
from tidar_common.files import write_text_atomic

BPE = 2
"""Its number among the model types of a SentencePiece file; 1 is unigram."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of its pieces; 6 is a byte."""
SPACE_SIGN = "\u2581"

SAMPLES = (
    'def f(x: int) -> str:\n    """Doc."""\n\treturn f"{x!r:>{8}}" if x != 0 else None\r\n',
    "The quick brown fox; it's 3.14% (or 1,000,000)   of   everything.\n\n  - a\n  - b\n",
    "今日は世界。漢字かな交じり文、中文也可以。한국어도 있어요.",
    "🙂 👩‍👩‍👧‍👦 🇪🇺 naïve café e\u0301 Ωμέγα Привет שלום \u00a0\u200b\ufeff",
    " leading, trailing \u2581sign\u2581 and <0x41> as text ",
    "\\frac{a_1}{b^2} <html attr='v'> #!/bin/sh && echo $HOME | tee \\\\n",
)
"""Text on which ids must agree: code, prose, CJK, emoji, spaces, what looks like a byte piece."""


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> str | None:
    """Write all tokenizer files into `folder`; returns a warning when AutoTokenizer gets none."""
    tokenizer.save(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        converted, names = from_sentencepiece(tokenizer.content())
        differs = first_difference(tokenizer, converted, SAMPLES)
        if differs is not None:
            return (
                f"no {HUGGINGFACE_FILE} written, AutoTokenizer cannot be used: ids differ from "
                f"SentencePiece on {differs!r}"
            )
        converted.save(str(folder / HUGGINGFACE_FILE))
    else:
        converted = tokenizers.Tokenizer.from_buffer(tokenizer.content())
        names = {}
    text = json.dumps(tokenizer_config(tokenizer, converted, names), indent=2, ensure_ascii=False)
    write_text_atomic(folder / TOKENIZER_CONFIG_FILE, text + "\n")
    return None


def tokenizer_config(
    tokenizer: Tokenizer, converted: tokenizers.Tokenizer, names: dict[str, str]
) -> dict[str, Any]:
    """Content of `tokenizer_config.json`; `names` has more special tokens (`unk_token`)."""
    special = {
        "eos_token": converted.id_to_token(tokenizer.eos_id),
        "mask_token": converted.id_to_token(tokenizer.mask_id),
        "pad_token": converted.id_to_token(padding_id(tokenizer)),
        **names,
    }
    if tokenizer.bos_id >= 0:
        special["bos_token"] = converted.id_to_token(tokenizer.bos_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }


def padding_id(tokenizer: Tokenizer) -> int:
    """The id for padding in batches; the end token where the vocabulary has none of its own."""
    return tokenizer.eos_id if tokenizer.pad_id == tokenizer.mask_id else tokenizer.pad_id


def from_sentencepiece(content: bytes) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A `tokenizers` model with the ids of a SentencePiece one, and the name of `unk_token`.

    SentencePiece writes spaces as U+2581. Here the pieces get plain spaces instead, so the text
    needs no replacement, and a U+2581 in it is what it is for our own tokenizer: three bytes.

    Where two splits of a text are equally likely under a unigram model (runs of 12 and 8 spaces, or
    of 8 and 12), rounding decides, and the two libraries sum in different precision: the order of
    such pieces may differ in long texts. Control symbols in a text are read as such unless
    `encode_special_tokens` is set, as everywhere in that library.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(content)
    pieces = [piece.piece.replace(SPACE_SIGN, " ") for piece in proto.pieces]
    normalizer = proto.normalizer_spec
    is_bpe = proto.trainer_spec.model_type == BPE
    result = tokenizers.Tokenizer(_bpe(proto, pieces) if is_bpe else _unigram(proto, pieces))
    result.pre_tokenizer = _splits(proto, pieces)
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if steps:
        result.normalizer = normalizers.Sequence(steps)
    parts: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        parts.append(decoders.Strip(content=" ", left=1, right=0))
    result.decoder = decoders.Sequence(parts)
    result.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    control = [p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN)]
    result.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in control])
    unknown = [p.piece for p in proto.pieces if p.type == UNKNOWN]
    return result, {"unk_token": unknown[0]} if unknown else {}


def _unigram(proto: Any, pieces: list[str]) -> models.Model:
    scores = [piece.score for piece in proto.pieces]
    vocabulary = list(zip(pieces, scores, strict=True))
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    return models.Unigram(vocabulary, unknown, proto.trainer_spec.byte_fallback)


def _bpe(proto: Any, pieces: list[str]) -> models.Model:
    """Merges in order of the score of what they make; ours are all pairs that make a piece."""
    normal = {
        name: piece.score
        for name, piece in zip(pieces, proto.pieces, strict=True)
        if piece.type == NORMAL
    }
    merges = [
        (-score, name[:cut], name[cut:])
        for name, score in normal.items()
        for cut in range(1, len(name))
        if name[:cut] in normal and name[cut:] in normal
    ]
    return models.BPE(
        {name: number for number, name in enumerate(pieces)},
        [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])],
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        # A user-defined piece stands alone after the splits, and no merges lead to it.
        ignore_merges=USER_DEFINED in {piece.type for piece in proto.pieces},
    )


def _splits(proto: Any, pieces: list[str]) -> pre_tokenizers.PreTokenizer:
    """User-defined pieces are always whole, and no text spells a control or byte piece.

    The latter are broken behind their first character. SentencePiece trains no piece that crosses
    that place, between a `<` and a letter, digit or slash, so nothing else changes.
    """
    whole = [n for n, p in zip(pieces, proto.pieces, strict=True) if p.type == USER_DEFINED]
    never = [p.piece for p in proto.pieces if p.type not in (NORMAL, USER_DEFINED)]
    steps: list[Any] = []
    if whole:
        longest_first = sorted(whole, key=len, reverse=True)
        pattern = "|".join(re.escape(piece) for piece in longest_first)
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    pattern = "|".join(f"{re.escape(p[0])}(?={re.escape(p[1:])})" for p in never if len(p) > 1)
    steps.append(pre_tokenizers.Split(Regex(pattern), "merged_with_previous"))
    return pre_tokenizers.Sequence(steps)


def first_difference(
    tokenizer: Tokenizer, converted: tokenizers.Tokenizer, texts: Iterable[str]
) -> str | None:
    """The first of `texts` whose ids or decoded text differ between the two; None if none."""
    for text in texts:
        ids = tokenizer.encode(text)
        if converted.encode(text, add_special_tokens=False).ids != ids:
            return text
        if converted.decode(ids, skip_special_tokens=True) != tokenizer.decode(ids):
            return text
    return None
