"""Out of the shards comes the text that went in, read with nothing of this project: webdataset and
SentencePiece alone."""

from collections import Counter

import numpy as np
import pytest
import sentencepiece
import webdataset


def pieces_in(folder, pad_id):
    """(ids, whether it goes on from a cut) of everything that was packed, padding left out."""
    found = []
    for path in sorted(folder.glob("*/*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
            rows = zip(
                sample["tokens.npy"], sample["document_lengths.npy"], sample["continued.npy"],
                strict=True,
            )  # fmt: skip
            for tokens, lengths, continued in rows:
                ends = np.cumsum(lengths[lengths > 0].astype(int))
                for start, end, mark in zip([0, *ends], ends, continued, strict=False):
                    if tokens[start] != pad_id:
                        found.append((tuple(tokens[start:end].tolist()), bool(mark)))
    return found


def model_in(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_whole_documents_come_back(command, overrides, texts, tmp_path, packing):
    """Every one, byte for byte, but for those that concatenation cut."""
    folder = tmp_path / "data"
    longer = ["sequence_length=4096", f"packing={packing}"]
    assert command(*overrides, *longer, f"output_dir={folder}").code == 0
    model = model_in(folder)
    pieces = pieces_in(folder, model.pad_id())
    whole = [ids for ids, mark in pieces if not mark and ids[-1] == model.eos_id()]
    cut = [ids for ids, mark in pieces if mark or ids[-1] != model.eos_id()]
    assert (len(cut) > 0) == (packing == "concatenate")
    found = Counter(model.decode(list(ids[:-1])) for ids in whole)
    assert found <= Counter(texts), "nothing that was not there"
    if packing == "best_fit":
        assert found == Counter(texts)
    # What was cut is all there, too: as many tokens as the other documents have.
    rest = Counter(texts) - found
    tokens = sum(1 + len(model.encode(text)) for text in rest.elements())
    assert sum(map(len, cut)) == tokens


def test_cut_documents_are_all_there(prepared, texts, tokenizer):
    """Documents longer than a sequence: cut at its length, every piece once, the later marked."""
    model = model_in(prepared)
    expected = Counter()
    for text in texts:
        # SentencePiece alone would read its own sign for a space, where a text has it, as a space.
        ids = (*(tokenizer if "▁" in text else model).encode(text), model.eos_id())
        for start in range(0, len(ids), 128):
            expected[ids[start : start + 128], start > 0] += 1
    assert len(expected) > len(texts)
    assert Counter(pieces_in(prepared, model.pad_id())) == expected
