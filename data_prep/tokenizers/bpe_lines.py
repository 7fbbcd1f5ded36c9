"""Where a text can be divided without changing what a SentencePiece BPE model makes of it.

BPE joins two symbols only into a piece of the vocabulary, so nothing is ever joined across two
characters that stand side by side in no piece. Short texts are encoded faster than long ones.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

import sentencepiece

SPACE_SIGN = "\u2581"
"""What SentencePiece writes for a space; in a text of its own it must not become one."""
SHORT_TEXT = 256
"""Characters of the least text that is encoded by itself where a longer one is divided."""


def is_bpe(content: bytes) -> bool:
    """Whether the model in a file is BPE."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(content)
    return bool(model.trainer_spec.model_type == model.trainer_spec.BPE)


def plain_pieces(model: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    """The pieces that stand for text, with spaces as spaces."""
    for i in range(model.vocab_size()):
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i)):
            yield model.id_to_piece(i).replace(SPACE_SIGN, " ")


def boundary_of(pieces: Iterable[str]) -> re.Pattern[str]:
    """The places beside line ends that no piece reaches across."""
    pairs = {pair for piece in pieces for pair in pairwise(piece) if "\n" in pair}
    before = "".join(re.escape(a) for a, b in sorted(pairs) if b == "\n")
    after = "".join(re.escape(b) for a, b in sorted(pairs) if a == "\n")
    # A line end is in both sets: runs of them stay together.
    return re.compile(rf"(?<=[^\n{before}])(?=\n)|(?<=\n)(?=[^\n{after}])")


def runs_of_lines(lines: list[str]) -> list[str]:
    """Neighbours joined until a run has `SHORT_TEXT` characters."""
    runs: list[str] = []
    run: list[str] = []
    size = 0
    for line in lines:
        run.append(line)
        size += len(line)
        if size >= SHORT_TEXT:
            runs.append("".join(run))
            run, size = [], 0
    if run or not runs:
        runs.append("".join(run))
    return runs
