"""Models from disk: a training checkpoint, an export, or a plain Hugging Face folder."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from data_prep.tokenizers.load import GGUF, Tokenizer, load_tokenizer
from pipeline.checkpoint.files import FILE_LIST
from pipeline.checkpoint.read import DTYPES, MODEL_FILE, open_checkpoint
from pipeline.model.config import ModelConfig
from pipeline.model.gguf import open_gguf
from pipeline.model.huggingface import BACKBONES, CONFIG_FILE, open_folder
from pipeline.model.parameters import MASK_EMBEDDING, Opening, is_adapter, is_of_head, whole
from pipeline.model.source import EMBEDDING, HEAD, SavedModel, fill
from pipeline.model.transformer import Transformer
from pipeline.model.transformers_backbone import empty_model
from tidar_common.errors import UserError
from tidar_common.progress import doing
from tidar_common.run_files import newest_checkpoint

MAY_DIFFER = (
    "vocab_size", "max_positions", "mask_token_id", "block_size", "causal_slots", "linear_drafts",
)  # fmt: skip
"""Fields in which a run may differ from the weights it starts from."""
KEYS = {
    "adapter_rank": "adapter.rank",
    "adapter_targets": "adapter.targets",
    "own_mask_embedding": "adapter.own_mask_embedding",
}
"""Where a user sets a field that is not `model.` and its name."""
SMALLEST_SHARE = 1e-4
"""Of the median norm of an embedding's rows: the mask token's below it is a mistake somewhere."""


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[Transformer, Tokenizer]:
    """A model ready to decode, and its tokenizer.

    Args:
        path: a training checkpoint (`run_dir/checkpoints/step-00000100`), a `run_dir` (its latest
            checkpoint), a folder written by `tidar-export`, a Hugging Face folder, or a GGUF
            file.
        dtype: a torch type, `bf16` or `fp32`; None keeps that of the weights, for a checkpoint the
            precision it was trained in. `fp32` takes the master weights of a bf16 checkpoint where
            ZeRO 1, 2 or 3 kept them.
        device: None is the GPU where there is one, else the CPU.

    Returns:
        The model, in evaluation mode, and the tokenizer it was trained with.

    Raises:
        UserError: naming the file, and the tensor or field in it, that cannot be used.
    """
    doing(f"loading {path}")
    source = open_model(path)
    model, tokenizer = read_model(source, dtype=dtype, device=device), source.tokenizer()
    doing("")
    model.lm_head.known = tokenizer.vocab_size
    return model, tokenizer


def read_model(
    source: SavedModel,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Transformer:
    """The model of an opened `source`, in evaluation mode; arguments as in `load_model`."""
    chosen = source.dtype if dtype is None else as_dtype(dtype)
    model = empty_model(source.config, as_device(device), chosen)
    fill(model, source)
    model.draft_record = source.draft_record
    return model.eval()


def initialize_from(
    path: str | Path, config: ModelConfig, dtype: torch.dtype | None = None
) -> Transformer:
    """A model of shape `config` on the CPU, with the weights found at `path`; for training.

    Raises:
        UserError: as `load_model`, or naming the key whose value contradicts the weights.
    """
    source = open_model(path)
    check_shape(source, config)
    model = empty_model(config, torch.device("cpu"), dtype or source.dtype)
    load_into(model, source)
    return model


@dataclass(frozen=True)
class MaskEmbedding:
    """The mask token's row of the embedding beside the others."""

    norm: float
    median: float
    """Of the norms of all rows."""

    def __str__(self) -> str:
        return f"norm {self.norm:.3g}, median of all rows {self.median:.3g}"


def load_into(
    model: Transformer, source: SavedModel, opened: Opening = whole, seed: int = 0
) -> MaskEmbedding | None:
    """Fill `model` with the weights of `source`, whose shape has been checked.

    The model may have more embedding rows, and a mask token where the weights have none. Rows that
    mean nothing yet (those added, and the mask token's) start as the mean of the source's rows, in
    an untied LM head as well: a typical embedding, so that no logit stands out at the first step.
    Where mask slots have an embedding of their own, that one starts so (or as the mask token's row,
    if it was trained), and the source's rows stay as they are. Adapters and a draft head that the
    source lacks are drawn from `seed`.

    Returns:
        How the mask slots' embedding compares; None without one, and where another process writes.

    Raises:
        UserError: as `fill`, or when the mask slots' embedding is next to nothing.
    """
    config, fresh = model.config, fresh_names(model, source.config)
    fill(model, source, opened, fresh)
    model.initialize_adapters(seed, fresh, opened)
    rows, trained = source.config.num_embeddings, source.config.mask_token_id is not None
    mask, embedding = config.mask_token_id, model.model.mask_embedding
    if model.draft_head is not None and not source.config.draft_rank:
        model.draft_head.reset(seed, opened)
    elif model.draft_head is not None:
        matrix = dict(model.draft_head.named_parameters())["up.weight"]
        with torch.no_grad(), opened(matrix) as writes:
            if writes:  # tokens that the source does not have
                matrix[rows:].zero_()
    new = set(range(rows, config.num_embeddings))
    if mask is not None and not trained and embedding is None:
        new.add(mask)
    matrices = dict(model.named_parameters())  # a tied one once
    norms = start = None
    for name in (name for name in (EMBEDDING, HEAD) if name in matrices):
        weight = matrices[name]
        with torch.no_grad(), opened(weight) as writes:
            if not writes:
                continue
            if new:
                _set_to_mean(weight, rows, torch.tensor(sorted(new), device=weight.device))
            if name == EMBEDDING and mask is not None:
                norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
                start = weight[mask].clone() if trained else _mean(weight, rows)
    if embedding is not None:
        with torch.no_grad(), opened(embedding) as writes:
            if writes and MASK_EMBEDDING in fresh:
                assert start is not None, "set with the embedding matrix"
                embedding.copy_(start)
            start = embedding.clone()
    if norms is None or start is None:
        return None
    measured = MaskEmbedding(float(start.float().norm()), float(norms.median()))
    if measured.norm < SMALLEST_SHARE * measured.median:
        raise UserError(
            f"init_from: {source.folder}: the embedding of mask token {mask} is next to nothing "
            f"({measured}), and the first layer's norm would blow it up to noise; use another model"
        )
    return measured


def fresh_names(model: Transformer, source: ModelConfig) -> list[str]:
    """The weights of `model` that a source of shape `source` does not have by design: those of
    adapters, draft head and mask slots, each kind whole or not at all."""
    there = {
        is_adapter: source.adapter_rank > 0,
        MASK_EMBEDDING.__eq__: source.own_mask_embedding,
        is_of_head: source.draft_rank > 0,
    }
    names = [name for name, _ in model.named_parameters()]
    return [n for n in names if any(kind(n) and not has for kind, has in there.items())]


def check_backbone(name: str) -> None:
    """Raises UserError for what is none of `BACKBONES`."""
    if name not in BACKBONES:
        raise UserError(f"model.backbone: {name!r} is not one of {', '.join(BACKBONES)}")


def open_model(path: str | Path, verify: bool = True, backbone: str = "auto") -> SavedModel:
    """Find out what `path` is, and read everything but its weights.

    Args:
        path: as in `load_model`, or a GGUF file.
        verify: compare all files of a checkpoint with what was saved.
        backbone: what is to run the layers of a Hugging Face folder, one of `BACKBONES`.
    """
    check_backbone(backbone)
    folder = Path(path).expanduser()
    if folder.suffix == GGUF and folder.is_file():
        return open_gguf(folder.resolve())
    if not folder.is_dir():
        raise UserError(
            f"{folder}: not a folder; give a training checkpoint, a run_dir, an export, a "
            "downloaded Hugging Face model or a .gguf file"
        )
    folder = folder.resolve()
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise UserError(
                f"{folder / 'checkpoints'}: holds no checkpoint yet; give another model"
            )
        return open_checkpoint(folder / "checkpoints" / newest, verify)
    if any((folder / name).is_file() for name in (FILE_LIST, MODEL_FILE)):
        return open_checkpoint(folder, verify)
    if (folder / CONFIG_FILE).is_file():
        return open_folder(folder, backbone)
    raise UserError(
        f"{folder}: holds no model: neither {FILE_LIST} of a training checkpoint nor {CONFIG_FILE} "
        "of a Hugging Face folder"
    )


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`bf16`, `fp32` or a torch type as a torch type."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype: unknown value {dtype!r}; known are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def as_device(device: torch.device | str | None) -> torch.device:
    """A device that is there; None is the GPU where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"device: {device} cannot be used here; try device=cpu") from error
    return chosen


def check_shape(source: SavedModel, config: ModelConfig) -> None:
    """Whether training can go on from `source` with `config`; raises UserError with the key."""
    may_differ = {*MAY_DIFFER, *_new_kinds(source.config, config)}
    for name in (field.name for field in fields(ModelConfig) if field.name not in may_differ):
        saved, asked = getattr(source.config, name), getattr(config, name)
        if saved != asked:
            refuse_difference(name, saved, asked, source.folder)
    if config.hosted is not None and config.max_positions > source.config.max_positions:
        # Beyond, a sliding window would hide what our masks show.
        refuse_difference(
            "max_positions", source.config.max_positions, config.max_positions, source.folder
        )
    rows, asked_rows = source.config.num_embeddings, config.num_embeddings
    if asked_rows < rows:
        raise UserError(
            f"init_from: {source.folder} has vocab_size {rows}, the config has {asked_rows}; "
            f"set model.vocab_size={rows}, or more"
        )
    trained, mask = source.config.mask_token_id, config.mask_token_id
    if trained is not None and mask is not None and trained != mask:
        raise UserError(
            f"init_from: {source.folder} was trained with mask token {trained}, the data's "
            f"tokenizer has {mask}; prepare the data with the tokenizer of that model"
        )


def refuse_difference(name: str, saved: object, asked: object, folder: Path) -> NoReturn:
    """Raises UserError for the field `name` of a config, `asked` for and otherwise in `folder`."""
    key = KEYS.get(name, f"model.{name}")
    leave = "" if name in KEYS else "leave out model=... and its keys, which the folder gives, or "
    raise UserError(
        f"init_from: {folder} has {name} {_spelled(saved)}, the config has {_spelled(asked)}; "
        f"{leave}set {key}={_spelled(saved)}"
    )


def check_tokenizer(source: SavedModel, data_dir: Path) -> None:
    """Whether the data in `data_dir` have the ids that `source` was trained with; a folder that
    holds weights alone is taken at its word.

    Raises:
        UserError: naming both tokenizers.
    """
    try:
        theirs = source.tokenizer()
    except UserError:
        return  # there is none, or none that could have made these data
    ours = load_tokenizer(data_dir)
    if not ours.same_ids(theirs):
        raise UserError(
            f"init_from: {source.folder} has the {theirs.kind} tokenizer {theirs.sha256[:12]} of "
            f"{theirs.vocab_size} ids, the data in {data_dir} the {ours.kind} tokenizer "
            f"{ours.sha256[:12]} of {ours.vocab_size}; prepare them with tokenizer.path="
            f"{source.folder}"
        )


def _new_kinds(source: ModelConfig, config: ModelConfig) -> set[str]:
    """Fields of what drafts alone that may differ: what the source lacks starts anew, and a model
    that does not draft has none of it."""
    twin = config.mask_token_id is None
    lacking = (
        (not source.draft_rank, ("draft_rank", "draft_cell", "draft_width")),
        (not source.adapter_rank, ("adapter_rank", "adapter_targets")),
        (not source.own_mask_embedding, ("own_mask_embedding",)),
    )
    return {name for lacks, names in lacking if lacks or twin for name in names}


def _spelled(value: object) -> str:
    """As a user writes it on the command line."""
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _mean(weight: Tensor, rows: int) -> Tensor:
    """The mean of the first `rows` rows of `weight` [V, E], [E]."""
    return weight[:rows].mean(0, dtype=torch.float32).to(weight.dtype)


def _set_to_mean(weight: Tensor, rows: int, index: Tensor) -> None:
    """Set the rows `index` [N] of `weight` [V, E] to the mean of its first `rows` rows."""
    weight[index] = _mean(weight, rows)


def load_draft_model(
    path: str,
    tokenizer: Tokenizer,
    key: str,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
) -> Transformer:
    """The model at `path`; raises UserError naming `key` unless it has the same `tokenizer`."""
    model, its_tokenizer = load_model(path, dtype=dtype, device=device)
    if its_tokenizer.content() != tokenizer.content():
        raise UserError(
            f"{key}: {path} was trained with another tokenizer; give a model with the same one"
        )
    return model
