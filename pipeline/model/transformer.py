"""A compact decoder of the Qwen2 / Qwen3 / Llama family.

RMSNorm, rotary positions, grouped-query attention, SwiGLU. Parameter names are those of Hugging
Face's `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `LlamaForCausalLM`, so weights move both ways
unchanged. Letters: B batch, L tokens, E hidden size, H heads, D head size, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.attention import Mask, SectionMasks
from pipeline.model.config import CHECKPOINTING, ModelConfig
from pipeline.model.draft_head import BlockRows, DraftHead, DraftRows
from pipeline.model.draft_record import DraftRecord
from pipeline.model.inference import DecodingForward
from pipeline.model.layers import Cache, CleanPart, DecoderLayer, again_in_backward
from pipeline.model.parameters import Opening, initial_value, is_drafting, is_of_head, whole
from pipeline.model.rotary import rotary_table

Finish = Callable[[Tensor, Tensor], Any]
"""Takes final hidden states [B·L, E] and the LM head's matrix [V, E]."""


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.num_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.recompute = False
        self.rope_theta = config.rope_theta
        self.rope_scaling = config.rope_scaling
        self.head_dim = config.head_dim
        self.mask_token_id = config.mask_token_id
        self.mask_embedding: nn.Parameter | None = None
        if config.own_mask_embedding:
            self.mask_embedding = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Mask | SectionMasks,
        cache: Cache | None = None,
        clean: int | None = None,
    ) -> Tensor:
        rows = input_ids.shape[1]
        clean = None if clean is None or clean >= rows else clean
        if isinstance(mask, SectionMasks):
            assert clean is not None, "for forwards with a mask section"
            return self._one_after_the_other(input_ids, position_ids, mask, clean)
        x = self.embed_tokens(input_ids)
        if clean is not None and self.mask_embedding is not None:
            slots = self._slots(input_ids[:, clean:], x[:, clean:])
            x = torch.cat([x[:, :clean], slots], dim=1)
        rotary = self._rotary(position_ids, x)
        for layer in self.layers:
            if self.recompute and self.training:
                x = again_in_backward(layer, x, rotary, mask, cache, clean)
            else:
                x = layer(x, rotary, mask, cache, clean)
        return self.norm(x)

    def _one_after_the_other(
        self, input_ids: Tensor, position_ids: Tensor, masks: SectionMasks, clean: int
    ) -> Tensor:
        """The joint forward with a frozen base: no clean row leads to a weight that learns, so the
        clean section goes ahead without a graph, and the slots find its keys and values there."""
        parts = [CleanPart() for _ in self.layers]
        with torch.no_grad():
            x = self.embed_tokens(input_ids)
            text, slots = x[:, :clean], x[:, clean:]
            rotary = self._rotary(position_ids[..., :clean], x)
            for layer, part in zip(self.layers, parts, strict=True):
                text = layer(text, rotary, masks.clean, part, None)
            text = self.norm(text)
        slots = self._slots(input_ids[:, clean:], slots)
        rotary = self._rotary(position_ids[..., clean:], x)
        for layer, part in zip(self.layers, parts, strict=True):
            if self.recompute and self.training:
                slots = again_in_backward(layer, slots, rotary, masks.slots, part, 0)
            else:
                slots = layer(slots, rotary, masks.slots, part, 0)
        return torch.cat([text, self.norm(slots)], dim=1)

    def _slots(self, input_ids: Tensor, x: Tensor) -> Tensor:
        """The embeddings `x` [B, M, E] of slots, with their own in place of the mask token's."""
        if self.mask_embedding is None:
            return x
        assert self.mask_token_id is not None, "a model with mask slots has a mask token"
        is_mask = input_ids == self.mask_token_id
        return torch.where(is_mask[..., None], self.mask_embedding, x)

    def _rotary(self, position_ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(
            position_ids, self.head_dim, self.rope_theta, x.dtype, self.rope_scaling
        )


class Head(nn.Linear):
    """The LM head: logits, or whatever is made of hidden states and the head's matrix together."""

    known: int | None = None
    """Ids of the tokenizer: rows behind them, as of a padded matrix, are no text, and have the
    smallest logit there is. None where all are text."""

    def forward(self, input: Tensor, then: Finish | None = None) -> Any:
        if then is not None:
            # Called in here, the matrix is whole even where ZeRO 3 has cut it up.
            return then(input, self.weight)
        return self._without_padding(super().forward(input))

    def logits_to_choose_by(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., E]; on a GPU in fp32, since in bf16 neighbouring
        candidates often come out equal."""
        if not hidden.is_cuda or hidden.dtype not in (torch.bfloat16, torch.float16):
            return self._without_padding(super().forward(hidden))
        rows = torch.mm(hidden.flatten(0, -2), self.weight.T, out_dtype=torch.float32)
        return self._without_padding(rows.unflatten(0, hidden.shape[:-1]))

    def _without_padding(self, logits: Tensor) -> Tensor:
        if self.known is not None and self.known < logits.shape[-1]:
            # Not -inf, which a weight of 0 would make nan.
            logits[..., self.known :] = torch.finfo(logits.dtype).min
        return logits


class Transformer(nn.Module):
    """The decoder with its language-model head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.num_embeddings, bias=False)
        self.frozen_base = False
        """Whether only what drafts learns; see `freeze_base`."""
        self.draft_head = DraftHead(config) if config.draft_rank else None
        """Makes drafts sequential; None where a block's places are drawn independently."""
        self.draft_record: DraftRecord | None = None
        """What evals measured of the drafts of these weights, where that is known."""
        self._tie()

    @classmethod
    def empty(cls, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> "Transformer":
        """A model whose weights are allocated but not yet set."""
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device=device)
        model._tie()  # allocation gave the two ends of a tied matrix one each
        return model

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Mask | SectionMasks = None,
        cache: Cache | None = None,
        rows: Tensor | None = None,
        then: Finish | None = None,
        clean: int | None = None,
        blocks: BlockRows | None = None,
    ) -> Any:
        """Logits of a forward pass; with `input_ids` alone, of a plain causal one.

        Args:
            input_ids: [B, L].
            position_ids: rotary position of each token, [B, L] or [L]; None counts from 0.
            mask: boolean, broadcasting to [B, H, L, keys], or a backend's form of it; None is
                causal. `SectionMasks` has the sections go one after the other, the clean one
                without a graph: for a frozen base.
            cache: keys and values of earlier tokens; extended in place.
            rows: [N] indexes into the B·L rows; None takes all. Logits are computed only there.
            then: what to make of the final hidden states [B·L, E] and the LM head's matrix [V, E]
                instead of logits; training passes its loss, whose logits never stand whole.
            clean: how many rows of each sequence are clean; those behind them are mask slots, and
                adapters act on them. None is all.
            blocks: for `then` of a model with a draft head, where blocks stand: hidden states and
                matrix are then `[h | z]` and `[W | B]`, with the rows of drafts of the head alone
                behind the others (`pipeline.model.draft_head`).

        Returns:
            Logits [B, L, V], or [N, V] with `rows`; or what `then` returns.
        """
        hidden = self.hidden(input_ids, position_ids, mask, cache, clean)
        if then is not None and self.draft_head is not None and blocks is not None:
            return self._finish_drafts(self.drafts(hidden.flatten(0, 1), blocks), then)
        if then is not None:
            return self.lm_head(hidden.flatten(0, 1), then)
        if rows is not None:
            hidden = hidden.flatten(0, 1)[rows]
        return self.lm_head(hidden)

    def drafts(self, hidden: Tensor, blocks: BlockRows) -> DraftRows:
        """Final hidden states [R, E] of a joint forward with what the draft head adds to them."""
        assert self.draft_head is not None, "only a model with a draft head has them"
        return DraftRows(*self.draft_head(hidden, blocks, self.model.embed_tokens))

    def draft_logits(self, drafts: DraftRows, rows: Tensor) -> Tensor:
        """Logits [N, V] of the rows [N] among `drafts`."""
        assert self.draft_head is not None, "only a model with a draft head has them"
        logits: Tensor = self.lm_head(drafts.hidden[rows]) + self.draft_head.up(drafts.z[rows])
        return logits

    def _finish_drafts(self, drafts: DraftRows, then: Finish) -> Any:
        """`then` of `[h | z]` and `[W | B]`, with both matrices whole."""
        head = self.draft_head
        assert head is not None

        def with_head(hidden: Tensor, weight: Tensor) -> Any:
            def with_both(z: Tensor, low: Tensor) -> Any:
                return then(torch.cat([hidden, z], dim=1), torch.cat([weight, low], dim=1))

            return head.up(drafts.z, with_both)

        return self.lm_head(drafts.hidden, with_head)

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Mask | SectionMasks = None,
        cache: Cache | None = None,
        clean: int | None = None,
    ) -> Tensor:
        """Final hidden states [B, L, E], arguments as in `forward`; input of `lm_head`."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.model(input_ids, position_ids, mask, cache, clean)

    def for_decoding(self, positions: int) -> DecodingForward:
        """The forward that decoding runs, for texts of up to so many `positions`; the model is in
        evaluation mode. Made anew after weights were replaced, not written in place."""
        return DecodingForward(self, positions)

    def freeze_base(self) -> "Transformer":
        """Have only the weights that draft learn (`adapters.is_drafting`); returns self."""
        self.frozen_base = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_drafting(name))
        return self

    def checkpoint_activations(self, how: str) -> "Transformer":
        """Hold less for the backward pass, one of `CHECKPOINTING`; returns self."""
        if how not in CHECKPOINTING:
            raise ValueError(f"checkpointing must be one of {', '.join(CHECKPOINTING)}, got {how}")
        self.model.recompute = how == "full"
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer)
            layer.mlp.recompute = how == "selective"
        return self

    def compile_layers(self) -> "Transformer":
        """Have layers compiled at their first forward, for the shapes they then see; returns self.

        A layer at a time: all share one compiled function, so the time does not grow with their
        number, and activation checkpointing stays around them.
        """
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        return self

    def initialize(self, seed: int, opened: Opening = whole) -> "Transformer":
        """Draw all weights anew from `seed`, the same on every rank; returns self.

        Normal with deviation 0.02, the projections that write into the residual stream scaled down
        by sqrt(2 · layers) (GPT-2), norms at one, biases at zero. Drawn on the CPU in fp32, one
        tensor at a time, whatever the type and place of the weights: the values do not depend on
        either. What only drafts comes after (`initialize_adapters`). `opened` makes a parameter
        whole where ZeRO 3 has cut it up.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if is_drafting(name):
                continue
            with torch.no_grad(), opened(parameter) as writes:
                if not writes:
                    continue
                if name.endswith("bias"):
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                    deviation = residual if writes_residual else 0.02
                    drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                    parameter.copy_(drawn.normal_(0.0, deviation, generator=generator))
        drafting = [name for name, _ in self.named_parameters() if is_drafting(name)]
        self.initialize_adapters(seed, drafting, opened)
        if self.draft_head is not None:
            self.draft_head.reset(seed, opened)
        return self

    def initialize_adapters(
        self, seed: int, names: Collection[str], opened: Opening = whole
    ) -> "Transformer":
        """Draw the weights `names`, but for those of a draft head; returns self.

        Each from a generator of its own, keyed by seed and name: neither the base's weights nor
        another's depend on whether it is there.
        """
        parameters = dict(self.named_parameters())
        for name in sorted(name for name in names if not is_of_head(name)):
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            with torch.no_grad(), opened(parameters[name]) as writes:
                if writes:
                    shape = parameters[name].shape
                    parameters[name].copy_(initial_value(name, shape, generator))
        return self
