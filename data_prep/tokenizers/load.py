"""Tokenizers: SentencePiece (trained here or given) and Hugging Face's `tokenizer.json`.

Every text round-trips byte for byte through a SentencePiece model trained here: byte fallback, no
normalisation, no added or removed spaces. Ids of control symbols never come out of text.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from data_prep.formats.manifest import TokenizerInfo
from data_prep.tokenizers.byte_bpe import ByteBpe, byte_bpe
from tidar_common.errors import UserError
from tidar_common.files import read_text_checked, sha256_of, write_text_atomic, written_atomically

SPACE_SIGN = "\u2581"
"""What SentencePiece writes for a space; in a text of its own it must not become one."""
SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
HUGGINGFACE_CONFIG = "tokenizer_config.json"
GGUF = ".gguf"
MASK_PIECE = "<mask>"
HUGGINGFACE_MASK = "<|mask|>"
RESERVED = re.compile(
    r"(<\|?|\[)(reserved|unused|dummy|placeholder|extra|special)[a-z_-]*\d+(\|?>|\])", re.IGNORECASE
)
"""Names of tokens that a vocabulary keeps for later use, such as `<|reserved_special_token_0|>`
(Llama 3), `<unused0>` (Gemma), `<|placeholder1|>` (Phi-3), `<SPECIAL_20>` (Mistral)."""
HUGGINGFACE_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
HUGGINGFACE_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")


Ids = NDArray[np.int32]


class Tokenizer(ABC):
    """Text to ids and back. Documents become `[ids…, eos_id]`; nothing adds a bos by itself.

    It travels to other processes as its file's content.
    """

    kind: str
    file_name: str
    vocab_size: int
    mask_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    """Not an id that text can have; the mask's where the vocabulary has none for padding."""

    @property
    def encoders(self) -> tuple[str, ...]:
        """Ways of `encode_batch`, the fastest first; the last, `plain`, is `encode` itself. Another
        has to be compared with it on the text at hand."""
        return ("plain",)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest unsigned type that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text` without control symbols."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control symbols give nothing."""

    @abstractmethod
    def content(self) -> bytes:
        """The tokenizer's file."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """The id of every piece."""

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether both have the same vocabulary, but for a mask token that one of them appended."""
        first, second = self.vocabulary(), other.vocabulary()
        for pieces in (first, second):
            pieces.pop(HUGGINGFACE_MASK, None)
        return first == second

    def encode_batch(self, texts: Sequence[str], encoder: str = "plain") -> list[Ids]:
        """What `encode` gives for each text, by one of `encoders`; int32 [tokens] each."""
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    @property
    def sha256(self) -> str:
        """Of the file that `save` writes."""
        return hashlib.sha256(self.content()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write the tokenizer's file into `folder`; returns its path."""
        path = folder / self.file_name
        with written_atomically(path) as file:
            file.write(self.content())
        return path

    def info(self, path: Path) -> TokenizerInfo:
        """The manifest's entry for this tokenizer saved at `path`."""
        return TokenizerInfo(
            kind=self.kind,
            file=path.name,
            sha256=sha256_of(path),
            vocab_size=self.vocab_size,
            mask_id=self.mask_id,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback and the control symbols `<pad>`, `<s>`, `</s>`,
    `<mask>`."""

    kind = "sentencepiece"
    file_name = SENTENCEPIECE_FILE

    def __init__(self, content: bytes, source: str) -> None:
        self._content = content
        self._source = source
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"{source}: not a SentencePiece model") from error
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        self.mask_id = self._model.piece_to_id(MASK_PIECE)
        pad = self._model.pad_id()
        self.pad_id = pad if pad >= 0 else self.mask_id
        if self.eos_id < 0 or not self._model.is_control(self.mask_id):
            raise UserError(
                f"{source}: has no end symbol or no control symbol {MASK_PIECE}; train one with "
                f"tokenizer=sentencepiece, or add control_symbols=[{MASK_PIECE}] when training it"
            )
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]
        self._space_sign = byte_ids if all(map(self._model.is_byte, byte_ids)) else None
        probe = f"a{SPACE_SIGN}a"
        if self.decode(self.encode(probe)) != probe:
            # A model that puts a space before each text would put one before each part.
            self._space_sign = None

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._content, self._source)

    def encode(self, text: str) -> list[int]:
        if self._space_sign is None or SPACE_SIGN not in text:
            return self._model.encode(text)
        # SentencePiece would read the sign as a space: spell it in bytes instead.
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_SIGN)):
            ids += self._space_sign if number else []
            ids += self._model.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str], encoder: str = "plain") -> list[Ids]:
        # One by one: for a list SentencePiece starts a thread, and its caches are cold.
        return [
            np.array(self.encode(text), dtype=np.int32)
            if SPACE_SIGN in text
            else self._model.encode(text, return_type="numpy")
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def content(self) -> bytes:
        return self._content

    def vocabulary(self) -> dict[str, int]:
        return {self._model.id_to_piece(number): number for number in range(self.vocab_size)}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. Its mask token is `<|mask|>` where it has one of that name, or else the
    first that it keeps in reserve, which has a row in the model; or else one is appended."""

    kind = "huggingface"
    file_name = HUGGINGFACE_FILE

    def __init__(self, content: bytes, source: str, eos_token: str | None = None) -> None:
        import tokenizers

        self._source = source
        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{source}: not a Hugging Face tokenizer.json ({error})") from error
        self._model.no_padding()
        self._model.no_truncation()
        # "<|endoftext|>" or "<|mask|>" spelled out in a document is text, not a control symbol.
        self._model.encode_special_tokens = True
        self._mask_token = self._reserved_token() or HUGGINGFACE_MASK
        mask = tokenizers.AddedToken(self._mask_token, special=True, normalized=False)
        self._model.add_special_tokens([mask])
        mask_id = self._model.token_to_id(self._mask_token)
        assert mask_id is not None, "it was added above"
        self.mask_id = mask_id
        # Ids of added tokens may leave gaps, so a count of the tokens would be too small.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        names = (eos_token,) if eos_token else HUGGINGFACE_EOS
        eos = self._first_known(names)
        if eos is None:
            raise UserError(
                f"tokenizer.eos_token: {source} has none of {', '.join(names)}; name its "
                "end-of-document token"
            )
        self._eos_token, self.eos_id = eos
        bos_token, self.bos_id = self._first_known(HUGGINGFACE_BOS) or eos
        # Text could hold any other token; the mask is ours alone.
        self.pad_id = self.mask_id
        self._keep_out_of_text({self._eos_token, bos_token, self._mask_token})
        if self._model.num_special_tokens_to_add(False):
            # Documents begin without a token here, and shall wherever the file is read.
            plain = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B")
            self._model.post_processor = plain

    def _keep_out_of_text(self, names: set[str]) -> None:
        """Let no text give the ids of the control tokens `names`, whatever the file makes of them:
        added tokens that it does not call special, or pieces of its own vocabulary.

        Raises:
            UserError: when a text can spell one all the same.
        """
        import tokenizers

        def spelled() -> list[str]:
            ids = {name: self._model.token_to_id(name) for name in names}
            texts = [f"a {name} b{name}{name}" for name in names]
            given = set().union(*map(self.encode, texts))
            return sorted(name for name in names if ids[name] in given)

        if not spelled():
            return
        added = {token.content for token in self._model.get_added_tokens_decoder().values()}
        self._model.add_special_tokens(
            [
                tokenizers.AddedToken(name, special=True, normalized=False)
                for name in spelled()
                if name in added
            ]
        )
        if broken := spelled():
            # Broken behind their first letter, such names are pieces like any text. Best behind the
            # file's own splits, some of which put a space in front of each part.
            pattern = "|".join(f"{re.escape(n[0])}(?={re.escape(n[1:])})" for n in broken)
            split = tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(pattern), "merged_with_previous"
            )
            present = [self._model.pre_tokenizer] if self._model.pre_tokenizer else []
            for splits in ([*present, split], [split, *present]):
                self._model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splits)
                if not spelled():
                    break
        if left := spelled():
            raise UserError(
                f"{self._source}: text that spells {left[0]} becomes that control token; name "
                "another with tokenizer.eos_token, or use another tokenizer"
            )

    def _reserved_token(self) -> str | None:
        """The first token in reserve; None without one, and where there is a mask token already."""
        if self._model.token_to_id(HUGGINGFACE_MASK) is not None:
            return None
        added = sorted(self._model.get_added_tokens_decoder().items())
        names = (str(token.content) for _, token in added)
        return next(filter(RESERVED.fullmatch, names), None)

    def _first_known(self, names: Sequence[str]) -> tuple[str, int] | None:
        """The first token that the file has, and its id."""
        ids = ((name, self._model.token_to_id(name)) for name in names)
        return next(((name, number) for name, number in ids if number is not None), None)

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self.content(), self._source, self._eos_token)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    @cached_property
    def _byte_bpe(self) -> ByteBpe | None:
        """Made when it is asked for: with a large vocabulary that takes a second."""
        return byte_bpe(self.content())

    @property
    def encoders(self) -> tuple[str, ...]:
        return (*(("tiktoken",) if self._byte_bpe else ()), "batch", "plain")

    def encode_batch(self, texts: Sequence[str], encoder: str = "plain") -> list[Ids]:
        if encoder == "tiktoken":
            if self._byte_bpe is None:
                raise UserError(
                    "tokenizer: tiktoken was chosen where these data were begun and is missing "
                    "here; pip install 'tidar-pretrain[tiktoken]'"
                )
            by_tiktoken = map(self._byte_bpe.encode, texts)
            return [
                np.array(self.encode(text), dtype=np.int32) if ids is None else ids
                for ids, text in zip(by_tiktoken, texts, strict=True)
            ]
        if encoder == "batch":
            encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]
        return super().encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def _content(self) -> bytes:
        return self._model.to_str().encode()

    def content(self) -> bytes:
        return self._content

    def vocabulary(self) -> dict[str, int]:
        return self._model.get_vocab(with_added_tokens=True)

    def save(self, folder: Path) -> Path:
        """Write `tokenizer.json`, and beside it `tokenizer_config.json`, which names the control
        symbols the way `transformers` reads them; returns the path of the former."""
        names = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._model.id_to_token(self.bos_id),
            "eos_token": self._model.id_to_token(self.eos_id),
            "mask_token": self._mask_token,
        }
        write_text_atomic(folder / HUGGINGFACE_CONFIG, json.dumps(names, indent=2) + "\n")
        return super().save(folder)


def load_tokenizer(path: Path, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer in file `path` (that of a GGUF file too), or in the folder `path`:
    `tokenizer.model` before `tokenizer.json`.

    The end-of-document token of a `tokenizer.json` is `eos_token`, or the one that a
    `tokenizer_config.json` beside it names, or the first of the usual names that it has.

    Raises:
        UserError: when there is none, or the file is not what its name says.
    """
    path = Path(path)
    if path.suffix == GGUF:
        return HuggingFaceTokenizer(*_in_gguf(path, eos_token))
    if path.is_dir():
        names = (SENTENCEPIECE_FILE, HUGGINGFACE_FILE)
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            raise UserError(f"{path}: holds neither {names[0]} nor {names[1]}")
        path = file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a tokenizer") from error
    if path.suffix == ".json":
        return HuggingFaceTokenizer(content, str(path), eos_token or _configured_eos(path))
    return SentencePieceTokenizer(content, str(path))


def _in_gguf(path: Path, eos_token: str | None) -> tuple[bytes, str, str | None]:
    """Arguments of `HuggingFaceTokenizer` for the tokenizer in a GGUF file."""
    # Imported here: it takes seconds, and only GGUF files need it. AutoTokenizer would read the
    # whole file's description for the name of a class, which takes longer than all the rest.
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
        content = tokenizer.backend_tokenizer.to_str().encode()
    except ImportError as error:
        raise UserError(
            f"{path}: GGUF files need the package gguf; pip install 'tidar-pretrain[gguf]'"
        ) from error
    except Exception as error:  # of many kinds, for what the format may hold
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: its tokenizer cannot be read ({reason})") from error
    return content, str(path), eos_token or tokenizer.eos_token


def _configured_eos(path: Path) -> str | None:
    """The `eos_token` of the `tokenizer_config.json` beside `path`; None where there is none."""
    config = path.with_name(HUGGINGFACE_CONFIG)
    if not config.is_file():
        return None
    try:
        token = json.loads(read_text_checked(config)).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config}: not a JSON object ({error}); mend or remove it") from error
    return token.get("content") if isinstance(token, dict) else token
