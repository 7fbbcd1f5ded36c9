"""The second backbone: a decoder of transformers, run by its own code.

The compact transformer (`pipeline.model.transformer`) knows three families. For others the layers
of transformers run as they are, and one thing of theirs is replaced: attention, through the
registry that the library has for it. Our function gets each layer's queries and keys, puts them
into our cache, and applies our mask; positions and embeddings are handed in. So one model trains,
scores and decodes as any other. Adapters are added to projections from outside.

Letters: B batch, L tokens, E hidden size, H heads, D head size, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.attention import Mask, SectionMasks, attend
from pipeline.model.config import ModelConfig
from pipeline.model.draft_head import DraftHead
from pipeline.model.inference import DecodingForward
from pipeline.model.layers import Cache, CleanPart, LowRank
from pipeline.model.parameters import Opening, whole
from pipeline.model.transformer import Decoder, Head, Transformer
from tidar_common.errors import UserError

ATTENTION = "tidar"
"""The name of our function in transformers' registry."""
BASE = "model.base."
"""Before the names of the weights that transformers' decoder has itself."""


@dataclass(frozen=True)
class ForwardState:
    """What our attention function has to know of the forward that calls it."""

    mask: Mask
    cache: Cache | list[CleanPart] | None

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`key` and `value` [B, H_kv, L, D] behind those that the layer has kept."""
        if isinstance(self.cache, list):
            return self.cache[layer].join(key, value)
        return (key, value) if self.cache is None else self.cache.extend(layer, key, value)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    tidar: ForwardState,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [B, H, L, D] queries to [B, L, H, D]."""
    key, value = tidar.joined(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    usual = 1 / math.sqrt(query.shape[-1])
    if scaling is not None and not math.isclose(scaling, usual):
        query = query * (scaling / usual)
    return attend(query, key, value, tidar.mask).transpose(1, 2), None


class HostedDecoder(Decoder):
    """Embedding, transformers' layers and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        base = bare_model(config)
        self.embed_tokens = base.get_input_embeddings()
        self.embed_tokens.padding_idx = None  # its row learns as any other
        base.set_input_embeddings(nn.Module())  # its weights stand here, under one name
        self.base: Any = base
        self.mask_token_id = config.mask_token_id
        self.mask_embedding: nn.Parameter | None = None
        if config.own_mask_embedding:
            self.mask_embedding = nn.Parameter(torch.empty(config.hidden_size))
        assert config.hosted is not None
        self.logits_scaling = float(config.hosted.get("logits_scaling") or 1.0)
        """What logits are divided by (Granite): hidden states are, which comes to the same."""
        self._slots_from: int | None = None
        self._add_adapters(config)

    def _add_adapters(self, config: ModelConfig) -> None:
        """An adapter beside every projection that has one, added to what the projection gives."""
        if not config.adapter_rank:
            return
        missing = set(config.adapter_targets)
        for parent in list(self.base.modules()):
            for name, projection in list(parent.named_children()):
                if name in config.adapter_targets and isinstance(projection, nn.Linear):
                    sizes = projection.in_features, projection.out_features
                    adapter = LowRank(*sizes, config.adapter_rank)
                    setattr(parent, name.replace("_proj", "_adapter"), adapter)
                    projection.register_forward_hook(partial(self._adapt, adapter))
                    missing.discard(name)
        if missing:
            linear = {
                name.rpartition(".")[2]
                for name, module in self.base.named_modules()
                if isinstance(module, nn.Linear)
            }
            known = sorted(linear & set(config.projections))
            raise UserError(
                f"adapter.targets: {config.family} has no projection {min(missing)}; set "
                f"adapter.targets=[{','.join(known)}]"
                + ("" if known else " and adapter.rank=0: none of its projections can have one")
            )

    def _adapt(self, adapter: LowRank, _: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        # The row is that of the last forward: recomputation for a backward pass follows its own.
        first = self._slots_from
        if first is None:
            return out
        out[:, first:] += adapter(inputs[0][:, first:])
        return out

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Mask | SectionMasks,
        cache: Cache | None = None,
        clean: int | None = None,
    ) -> Tensor:
        clean = None if clean is None or clean >= input_ids.shape[1] else clean
        if isinstance(mask, SectionMasks):
            assert clean is not None, "for forwards with a mask section"
            return self._one_after_the_other(input_ids, position_ids, mask, clean)
        x = self.embed_tokens(input_ids)
        if clean is not None and self.mask_embedding is not None:
            x = torch.cat([x[:, :clean], self._slots(input_ids[:, clean:], x[:, clean:])], dim=1)
        return self._layers(x, position_ids, ForwardState(mask, cache), clean)

    def _one_after_the_other(
        self, input_ids: Tensor, position_ids: Tensor, masks: SectionMasks, clean: int
    ) -> Tensor:
        parts = [CleanPart() for _ in range(self.base.config.num_hidden_layers)]
        where = position_ids.expand(len(input_ids), -1)
        with torch.no_grad():
            x = self.embed_tokens(input_ids)
            first = ForwardState(masks.clean, parts)
            text = self._layers(x[:, :clean], where[:, :clean], first, None)
        slots = self._slots(input_ids[:, clean:], x[:, clean:])
        then = ForwardState(masks.slots, parts)
        return torch.cat([text, self._layers(slots, where[:, clean:], then, 0)], dim=1)

    def _slots(self, input_ids: Tensor, x: Tensor) -> Tensor:
        if self.mask_embedding is None:
            return x
        # Some embeddings are scaled on their way out (Gemma), and the slots' own starts as a row.
        scale = getattr(self.embed_tokens, "scalar_embed_scale", 1.0)
        assert self.mask_token_id is not None, "a model with mask slots has a mask token"
        is_mask = input_ids == self.mask_token_id
        return torch.where(is_mask[..., None], self.mask_embedding * scale, x)

    def _layers(
        self, x: Tensor, position_ids: Tensor, state: ForwardState, slots_from: int | None
    ) -> Tensor:
        self._slots_from = slots_from
        where = position_ids if position_ids.ndim == 2 else position_ids[None]
        done = self.base(inputs_embeds=x, position_ids=where, use_cache=False, tidar=state)
        hidden: Tensor = done.last_hidden_state
        return hidden if self.logits_scaling == 1.0 else hidden / self.logits_scaling


class HostedTransformer(Transformer):
    """`Transformer` with a decoder of transformers."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.model = HostedDecoder(config)
        self.lm_head = Head(config.hidden_size, config.num_embeddings, bias=False)
        self.frozen_base = False
        self.draft_head = DraftHead(config) if config.draft_rank else None
        self.draft_record = None
        self._tie()

    @classmethod
    def empty(cls, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> "Transformer":
        # Made on the CPU in its type, as transformers does: rotary tables, which no file holds, are
        # made along, and stay in fp32 where a cast of the whole would round them.
        with default_dtype(dtype):
            return cls(config).to(device)

    def for_decoding(self, positions: int) -> DecodingForward:
        return HostedForward(self)

    def initialize(self, seed: int, opened: Opening = whole) -> "Transformer":
        raise UserError(
            f"model.backbone: weights of {self.config.family} are only read; set init_from=..."
        )

    def checkpoint_activations(self, how: str) -> "Transformer":
        if how == "selective":
            raise UserError(
                "activation_checkpointing: selective is for model.backbone=compact; set full or "
                "none"
            )
        if how == "full":
            base: Any = self.model.base
            base.gradient_checkpointing_enable({"use_reentrant": False})
        return self

    def compile_layers(self) -> "Transformer":
        raise UserError("compile: is for model.backbone=compact; set compile=false")


class HostedForward(DecodingForward):
    """Decoding by the model's own forward, as in training: its layers are not ours to fuse."""

    def __init__(self, model: HostedTransformer) -> None:
        self.model = model
        self.backend = None

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Any,
        clean: int | None = None,
    ) -> Tensor:
        hidden: Tensor = self.model.hidden(input_ids, positions, mask, cache, clean)
        return hidden


def empty_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model of shape `config`, on either backbone, whose weights are not yet set."""
    kind = Transformer if config.hosted is None else HostedTransformer
    return kind.empty(config, device, dtype)


def library_config(config: ModelConfig) -> Any:
    """The config of transformers for a hosted `config`, with its vocabulary."""
    import transformers

    assert config.hosted is not None, "only a hosted model has one"
    values = {**config.hosted, "vocab_size": config.num_embeddings}
    # Nothing in a model draws random numbers.
    values |= {name: 0.0 for name, value in values.items() if "dropout" in name and value}
    theirs = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    theirs.use_cache = False
    return theirs


def bare_model(config: ModelConfig) -> Any:
    """transformers' decoder without an LM head, with our attention; weights are not set."""
    import transformers
    from transformers.initialization import no_init_weights

    transformers.AttentionInterface.register(ATTENTION, _attend)
    theirs = library_config(config)
    theirs._attn_implementation = ATTENTION
    with no_init_weights():
        return transformers.AutoModel.from_config(theirs, dtype=torch.get_default_dtype())


def library_names(config: ModelConfig, names: Iterator[str]) -> dict[str, str]:
    """Our name of each weight `names` of transformers' model with its head; a tied head, which is
    the embedding, is left out."""
    import transformers

    kind: Any = transformers.AutoModelForCausalLM._model_mapping[type(library_config(config))]
    prefix = f"{kind.base_model_prefix}."
    with torch.device("meta"):
        skeleton = kind(library_config(config))
    modules = {id(module): name for name, module in skeleton.named_modules()}
    embedding = f"{modules[id(skeleton.get_input_embeddings())]}.weight"
    head = f"{modules[id(skeleton.get_output_embeddings())]}.weight"
    ours = {embedding: "model.embed_tokens.weight", head: "lm_head.weight"}
    if config.tie_embeddings:
        del ours[head]
    return {
        name: ours.get(name, BASE + name.removeprefix(prefix))
        for name in names
        if name != head or not config.tie_embeddings
    }


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's type of new tensors, while the context lasts."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
