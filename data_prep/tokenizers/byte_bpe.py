"""A byte-level BPE `tokenizer.json` as a tiktoken encoding over the same merges.

tiktoken joins any two neighbours whose bytes together are a token, Hugging Face those that the file
lists as a pair. For tables that BPE training made this gives the same ids, but no file says how
it was made: whoever uses this compares both on the text at hand.
"""

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` divides by with `use_regex`."""


class ByteBpe:
    """Ids of texts by tiktoken; None for a text that it cannot be trusted with."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """
        Args:
            spec: a `tokenizer.json`.

        Raises:
            ImportError: without tiktoken.
            ValueError: when the file does more than tiktoken can.
        """
        import tiktoken
        from tokenizers.normalizers import NFC

        self._nfc = NFC() if _is_nfc(spec.get("normalizer")) else None
        pattern = _pattern(spec.get("pre_tokenizer"))
        ranks, self._ids = _ranks(spec["model"])
        self._added = _added(spec.get("added_tokens") or [])
        self._encoding = tiktoken.Encoding(
            "tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> NDArray[np.int32] | None:
        """int32 [tokens]; None when `text` spells out an added token, or tiktoken gives up."""
        if self._nfc and not text.isascii():
            # Not Python's: it may know another version of Unicode.
            text = self._nfc.normalize_str(text)
        if self._added and self._added.search(text):
            return None
        try:
            return self._ids[self._encoding.encode_to_numpy(text, disallowed_special=())]
        except ValueError:  # its expressions run out of stack on a million spaces
            return None


def byte_bpe(content: bytes) -> ByteBpe | None:
    """The encoding of a `tokenizer.json`; None without tiktoken, or where it cannot be had."""
    try:
        return ByteBpe(json.loads(content))
    except (ImportError, ValueError, KeyError, TypeError):
        return None


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return False
    parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if [part["type"] for part in parts] not in ([], ["NFC"]):
        raise ValueError("a normalizer other than NFC")
    return bool(parts)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The expression that divides a text; only of `ByteLevel`, perhaps behind one `Split`."""
    if pre_tokenizer is None:
        raise ValueError("no pre-tokenizer")
    together = pre_tokenizer["type"] == "Sequence"
    parts = pre_tokenizer["pretokenizers"] if together else [pre_tokenizer]
    last = parts[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise ValueError("not byte-level, or with a space in front")
    by_own = last.get("use_regex", True)
    if len(parts) == 1 and by_own:
        return GPT2_PATTERN
    if len(parts) != 2 or by_own or parts[0]["type"] != "Split":
        raise ValueError("not one Split and ByteLevel")
    if parts[0]["behavior"] != "Isolated" or parts[0]["invert"]:
        raise ValueError("a Split of another kind")
    return str(parts[0]["pattern"]["Regex"])


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], NDArray[np.int32]]:
    """Bytes of each token by the order in which it is merged, and the id of each rank."""
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in (*odd, "byte_fallback")):
        raise ValueError("not a plain BPE model")
    byte_of = _bytes_of_signs()
    vocab: dict[str, int] = model["vocab"]
    ranked = [sign for sign in byte_of if sign in vocab]
    if len(ranked) != len(byte_of):
        raise ValueError("not every byte is a token")
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranked.append(left + right)
    if model.get("ignore_merges"):
        ranked += sorted(vocab, key=vocab.__getitem__)  # found as whole words only
    ranked = [token for token in dict.fromkeys(ranked) if all(sign in byte_of for sign in token)]
    ranks = {bytes(map(byte_of.__getitem__, token)): rank for rank, token in enumerate(ranked)}
    return ranks, np.array([vocab[token] for token in ranked], dtype=np.int32)


def _added(tokens: list[dict[str, Any]]) -> re.Pattern[str] | None:
    """Added tokens that text can have: special ones are text when a document spells them out."""
    contents = [re.escape(token["content"]) for token in tokens if not token["special"]]
    return re.compile("|".join(contents)) if contents else None


def _bytes_of_signs() -> dict[str, int]:
    """By the sign that byte-level BPE writes for a byte: the byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + number): byte for number, byte in enumerate(others)}
