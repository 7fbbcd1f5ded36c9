"""Several tokens a forward, wherever transformers runs: the `generate` of an exported TiDAR model.

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, max_new_tokens=128)

`FOLDER` is a folder of `tidar-export`, or its id on the hub. Input, settings, stopping and output
are those of `generate`; the loop is TiDAR's (arXiv 2511.08923): a forward verifies the tokens
drafted before, and drafts those that follow. Greedy text is that of plain `generate` (to rounding),
drawn text has its distribution. docs/decoding.md of the package tidar-pretrain says all of a step.

Letters: P tokens kept, n tokens in hand (the first is final, the others drafted), K block size, Q
queries, E hidden size, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, StopStringCriteria
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .drafting import Drafting, load_drafting

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
"""Arguments of `generate` that say how to reach the hub."""
ARGUMENTS = (
    "assistant_model", "inputs_embeds", "negative_prompt_attention_mask", "negative_prompt_ids",
    "synced_gpus",
)  # fmt: skip
SETTINGS = ("guidance_scale", "output_attentions", "output_hidden_states")
"""What of `generate` this loop does not do: arguments, and settings of its config."""
PROMPT_PIECE = 512
"""Most tokens of a prompt in one forward, where `prefill_chunk_size` is not set."""


def generate(
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    model: Any,
    blocks: str | Sequence[int] | None = None,
    stats: dict[str, Any] | None = None,
    drafting: str | None = None,
    **kwargs: Any,
) -> Any:
    """As `model.generate`, with several tokens a forward.

    Args:
        inputs: token ids of one prompt, [1, N].
        generation_config: of greedy search or sampling. Whatever changes scores applies, as long as
            it depends on nothing but the text and the scores.
        model: loaded by transformers from an export, with eager or sdpa attention.
        blocks: the mask blocks of a step: "all", "none", or numbers from 1 to K. None takes all, or
            none where by `tidar.json` the draft head alone pays more. Greedy text does not depend
            on it, drawn text only in the draw.
        stats: is filled with `tokens`, `forwards`, `tokens_per_forward`, and `accepted`, how many
            tokens each forward behind the prompt made final.
        drafting: folder or hub id that holds `tidar.json`; None is where the model came from.
        **kwargs: the other arguments of `generate`.

    Raises:
        ValueError: in one line, for what this loop cannot do.
    """
    plain = partial(type(model).generate, model, inputs, generation_config)
    if kwargs.get("custom_generate") is not None:  # the model's own `generate` is this function
        named = {"blocks": blocks, "stats": stats, "drafting": drafting}
        return plain(**{k: v for k, v in named.items() if v is not None}, **kwargs)
    for name in ("custom_generate", "trust_remote_code"):
        kwargs.pop(name, None)
    for name in ARGUMENTS:
        if kwargs.pop(name, None):
            raise ValueError(f"{name}: is not supported when drafting; leave it out")
    check_model(model)
    hub = {"revision": getattr(model.config, "_commit_hash", None)}
    hub |= {name: kwargs.pop(name) for name in HUB if name in kwargs}
    loaded = load_drafting(model, drafting or model.config._name_or_path, hub)
    kwargs |= _take_cache(model, kwargs)
    _take_stop_strings(kwargs)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        streamer = kwargs.get("streamer")
        request = Request(model, loaded, input_ids, prepared, blocks=blocks, streamer=streamer)
        request.run()
        if stats is not None:
            stats.update(request.stats())
        return request.output()

    return plain(custom_generate=loop, **kwargs)


def check_model(model: Any) -> None:
    """Raises ValueError for a model whose forward cannot run a step."""
    config = model.config
    needed = {"inputs_embeds", "position_ids", "attention_mask", "logits_to_keep"}
    layers = set(getattr(config, "layer_types", None) or ())
    family = (
        needed <= parameters(model.__class__)
        and layers <= {"full_attention", "sliding_attention"}
        and model.base_model is not model
        and getattr(config, "final_logit_softcapping", None) is None
    )
    if not family:
        raise ValueError(f"{config.model_type}: drafting is not supported for this family")
    attention = config._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation: {attention} takes no mask of a step's own; load the model with "
            "attn_implementation='sdpa'"
        )


@cache
def parameters(kind: type) -> set[str]:
    """Names of the arguments of a model's forward."""
    return set(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def cache_argument(model: Any) -> str:
    """That of its forward for keys and values, which transformers renamed."""
    return "cache" if "cache" in parameters(model.__class__) else "past_key_values"


def _take_cache(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The user's cache, out of `kwargs`, or a new one, under the name that the model has for it.

    Every layer keeps all tokens: one with a window loses some for drafts that are refused."""
    given = [kwargs.pop(name, None) for name in ("past_key_values", "cache")]
    kept = [value for value in given if value is not None] or [DynamicCache()]
    return {cache_argument(model): kept[0]}


def _take_stop_strings(kwargs: dict[str, Any]) -> None:
    """Make a criterion of `stop_strings`, for which transformers passes no tokenizer on."""
    tokenizer, strings = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
    if strings and tokenizer is None:
        raise ValueError("stop_strings: need tokenizer=... beside them")
    if strings:
        criterion = StopStringCriteria(tokenizer, strings)
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), criterion]


@lru_cache(maxsize=16)
def queries(
    count: int, blocks: tuple[int, ...], slots: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of `count` tokens and the `slots` of each of `blocks`: positions behind P, int64 [Q], and
    whom of each other they see, bool [Q, Q].

    A token sees those up to itself, a slot of block j the first j tokens and its own block; with
    `causal` of that block those up to itself.
    """
    tokens = torch.arange(count, device=device)
    number = torch.tensor(blocks, dtype=torch.int64, device=device).repeat_interleave(slots)
    places = torch.arange(slots, device=device).repeat(len(blocks))
    block = number[:, None] == number
    block = block.tril() if causal else block
    text = torch.cat([tokens[:, None] >= tokens, block.new_zeros(count, len(number))], dim=1)
    slot = torch.cat([number[:, None] > tokens, block], dim=1)
    return torch.cat([tokens, number + places]), torch.cat([text, slot])


class Request:
    """One prompt on its way: the text so far, its cache, and the draft in hand."""

    def __init__(
        self,
        model: Any,
        drafting: Drafting,
        input_ids: Tensor,
        prepared: dict[str, Any],
        *,
        blocks: str | Sequence[int] | None,
        streamer: Any,
    ) -> None:
        """`prepared` is what transformers hands to a loop of one's own."""
        self.model, self.drafting, self.streamer = model, drafting, streamer
        self.config = prepared["generation_config"]
        self.processors = prepared["logits_processor"]
        self.criteria = prepared["stopping_criteria"]
        self.cache_argument = cache_argument(model)
        self.cache = prepared[self.cache_argument]
        self.text = input_ids
        """Prompt and final tokens, [1, L]; all but the last are in the cache."""
        self._check(prepared.get("attention_mask"))
        self.prompt_length = input_ids.shape[1]
        self.greedy = not self.config.do_sample
        self.embed, self.lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        self.blocks = drafting.choose(blocks, self.greedy, self.lm_head.weight.device.type)
        self.has_slots = bool(self.blocks) or (drafting.head is None and drafting.block_size > 1)
        """Whether there is a block behind the prompt, and in a step of one token."""
        self.drafts: list[Tensor] = []
        """d_1 … d_{n-1}, each [1]."""
        self.draft_chances: list[Tensor] = []
        """q of each, what it was drawn from, fp32 [V]; none when greedy."""
        self.hidden = torch.empty(0)
        """Final hidden states of the last forward, [Q, E]."""
        self.clean = 0
        """Tokens of the last forward; its rows behind are slots."""
        self.done, self.forwards, self.accepted = False, 0, list[int]()
        self.scores, self.logits = list[Tensor](), list[Tensor]()

    def _check(self, mask: Tensor | None) -> None:
        """Raises ValueError for what transformers lets through and this loop cannot do."""
        config, rows, name = self.config, len(self.text), self.cache_argument
        mode = config.get_generation_mode()
        if mode not in ("greedy_search", "sample"):
            raise ValueError(f"{mode.value}: drafting does greedy search and sampling only")
        if rows > 1:
            raise ValueError(f"inputs: drafting takes one prompt, got {rows}; loop over them")
        if mask is not None and not bool((mask == 1).all()):
            raise ValueError("attention_mask: drafting takes no padding; pass a mask of ones")
        for setting in SETTINGS:
            value = getattr(config, setting)
            if value is True or value not in (None, False, 1.0):
                raise ValueError(f"{setting}: is not supported when drafting; leave it out")
        layers = getattr(self.cache, "layers", [None])
        if not all(type(layer) is DynamicLayer for layer in layers):
            raise ValueError(f"{name}: drafting takes a DynamicCache() made without a config")
        if self.cache.get_seq_length() >= self.text.shape[1]:
            raise ValueError(f"{name}: holds the whole prompt; crop the last token off")

    def run(self) -> None:
        """Generate until a criterion stops it."""
        size = self.drafting.block_size
        with self._hooks():
            logits, first, starts = self._read()
            while True:
                count = self._settle(logits)
                if self.done:
                    break
                start = starts.get(count)
                block = None if start is None else self.hidden[start : start + size]
                self._draft(self.hidden[first + count - 1], block)
                logits, starts = self._step()
                first = 0
        if self.streamer is not None:
            self.streamer.end()

    # --- forwards ---

    def _read(self) -> tuple[Tensor, int, dict[int, int]]:
        """The prompt in pieces, and behind it a block where there is one: logits [1, V] and row of
        the last token, and the first slot for what follows it."""
        piece = self.config.prefill_chunk_size or PROMPT_PIECE
        rest = self.text[0, self.cache.get_seq_length() :]
        while len(rest) > piece:
            self._forward(rest[:piece], (), 1)
            rest = rest[piece:]
        count = len(rest)
        logits = self._forward(rest, (count,) if self.has_slots else (), 1)
        return logits, count - 1, {1: count} if self.has_slots else {}

    def _step(self) -> tuple[Tensor, dict[int, int]]:
        """Run the tokens in hand and the step's blocks: logits [n, V], and by the number of tokens
        that become final the first of the K slots for what follows."""
        tokens = torch.cat([self.text[0, -1:], *self.drafts])
        count, slots, blocks = len(tokens), self.drafting.slots, self.blocks
        if count == 1:
            blocks = (1,) if self.has_slots else ()
        logits = self._forward(tokens, blocks, count)
        if self.drafting.linear and blocks:
            return logits, {final: count + final - 1 for final in range(1, count + 1)}
        return logits, {block: count + slots * order for order, block in enumerate(blocks)}

    def _forward(self, tokens: Tensor, blocks: tuple[int, ...], rows: int) -> Tensor:
        """Run `tokens` [n] and `blocks` behind the cache, which keeps the tokens alone; logits of
        the last `rows` tokens, [rows, V]."""
        drafting, count, kept = self.drafting, len(tokens), self.cache.get_seq_length()
        x = self.embed(tokens.to(self.embed.weight.device))
        slots = drafting.slots * len(blocks)
        if slots:
            x = torch.cat([x, self._slot().to(x).expand(slots, -1)])
        offsets, sees = queries(count, blocks, drafting.slots, drafting.causal_slots, x.device)
        sees = torch.cat([sees.new_ones(len(sees), kept), sees], dim=1)
        positions, self.clean = kept + offsets, count
        done = self.model(
            inputs_embeds=x[None], attention_mask=self._masks(sees, positions, kept, x.dtype),
            position_ids=positions[None], use_cache=True, return_dict=True,
            logits_to_keep=torch.arange(count - rows, count, device=x.device),
            **{self.cache_argument: self.cache},
        )  # fmt: skip
        self.forwards += 1
        self._drop(slots)
        logits: Tensor = done.logits[0]
        return logits

    def _slot(self) -> Tensor:
        """What a mask slot starts from, [E]."""
        own, device = self.drafting.mask_embedding, self.embed.weight.device
        if own is None:
            row: Tensor = self.embed(torch.tensor(self.drafting.mask_token_id, device=device))
            return row
        # Some embeddings are scaled on their way out (Gemma), and the slots' own starts as a row.
        return own * getattr(self.embed, "scalar_embed_scale", 1.0)

    def _masks(self, sees: Tensor, positions: Tensor, kept: int, dtype: torch.dtype) -> Any:
        """The rule as an additive mask [1, 1, Q, P + Q], where a layer has a window within it; by
        kind of layer where a model has several."""
        config = self.model.config
        window: Any = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        kinds = kinds or ["full_attention" if window is None else "sliding_attention"]
        keys = torch.cat([torch.arange(kept, device=positions.device), positions])
        masks = {}
        for kind in set(kinds):
            allowed = sees
            if kind == "sliding_attention":
                allowed = sees & (positions[:, None] - keys < window)
            bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            masks[kind] = bias.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]
        return masks if len(masks) > 1 else masks[kinds[0]]

    def _drop(self, rows: int) -> None:
        """Take the last `rows` off the cache."""
        if rows:
            self.cache.crop(-rows)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Keep the final hidden states of each forward, and add the adapters to its slots."""
        base, handles = self.model.base_model, []
        try:
            handles.append(base.register_forward_hook(self._keep_hidden))
            for name, adapter in self.drafting.adapters.items():
                projection = base.get_submodule(name)
                down, up = (matrix.to(projection.weight.device) for matrix in adapter)
                handles.append(projection.register_forward_hook(partial(self._adapt, down, up)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep_hidden(self, module: nn.Module, args: Any, out: Any) -> None:
        # What the LM head's logits are divided by (Granite) is taken out here.
        self.hidden = out.last_hidden_state[0] / getattr(self.model.config, "logits_scaling", 1.0)

    def _adapt(
        self, down: Tensor, up: Tensor, module: nn.Module, args: tuple[Tensor], out: Tensor
    ) -> Tensor:
        if self.clean == out.shape[1]:
            return out
        slots = F.linear(F.linear(args[0][:, self.clean :], down), up)
        return torch.cat([out[:, : self.clean], out[:, self.clean :] + slots], dim=1)

    # --- tokens ---

    def _settle(self, logits: Tensor) -> int:
        """Make tokens final by the logits [n, V] of those in hand: accept drafts from the left, and
        choose the token after the last one. Returns their number, 1 … n."""
        before, config = self.text.shape[1], self.config
        for place, row in enumerate(logits):
            scores = self._processed(self.text, row)
            token, accepted = self._choose(scores, place)
            self.text = torch.cat([self.text, token[None]], dim=1)
            if config.return_dict_in_generate and config.output_scores:
                self.scores.append(scores[None])
            if config.return_dict_in_generate and config.output_logits:
                self.logits.append(row[None].float())
            self.done = bool(self.criteria(self.text, tuple(self.scores) or None).all())
            if self.done or not accepted:
                break
        count = self.text.shape[1] - before
        self._drop(self.cache.get_seq_length() + 1 - self.text.shape[1])
        if before > self.prompt_length:
            self.accepted.append(count)
        if self.streamer is not None:
            self.streamer.put(self.text[0, before:].cpu())
        return count

    def _processed(self, text: Tensor, logits: Tensor) -> Tensor:
        """The scores that plain `generate` chooses by behind `text`, fp32 [V]."""
        row = logits.to(dtype=torch.float32, device=text.device, copy=True)
        scores: Tensor = self.processors(text, row[None])[0]
        return scores

    def _choose(self, scores: Tensor, place: int) -> tuple[Tensor, bool]:
        """The next token [1], and whether it is the draft for it: that is accepted with the chance
        min(1, p / q), or else one is drawn from what of p is above q (Leviathan et al., 2023)."""
        draft = self.drafts[place] if place < len(self.drafts) else None
        if self.greedy:
            token = scores.argmax(-1, keepdim=True)
            return token, draft is not None and bool(token == draft)
        p = weights = scores.softmax(-1)
        if draft is not None:
            q = self.draft_chances[place]
            uniform = torch.rand(1, dtype=torch.float64, device=p.device)
            if bool(uniform * q[draft] < p[draft]):
                return draft, True
            rest = (p - q).clamp_min(0)
            # Where p and q agree to the last bit, p is all that is left to draw from.
            weights = rest if bool(rest.sum() > 0) else p
        return torch.multinomial(weights, 1), False

    def _draft(self, row: Tensor, block: Tensor | None) -> None:
        """Draft d_1 … d_{K-1} from the hidden state that drew d_0 [E] and those of the K slots
        behind it [K, E]; without slots by the head alone, without a head then nothing."""
        head, text, device = self.drafting.head, self.text, self.embed.weight.device
        self.drafts, self.draft_chances = [], []
        if head is None and block is None:
            return
        bases: Any = None if block is None else self.lm_head(block[1:])
        if head is not None:
            state, plain = head.start(row)
            parts = head.slot_parts(head.no_slot[None] if block is None else block[1:])
            bases = self.lm_head(plain[None]) if bases is None else bases
        for place in range(self.drafting.block_size - 1):
            logits = bases[place % len(bases)]
            if head is not None:
                embedded = self.embed(text[0, -1].to(device)).to(row.device)
                more, state = head.step(parts[place % len(parts)], embedded, state)
                logits = logits + more
            scores = self._processed(text, logits)
            if self.greedy:
                token = scores.argmax(-1, keepdim=True)
            else:
                self.draft_chances.append(scores.softmax(-1))
                token = torch.multinomial(self.draft_chances[-1], 1)
            self.drafts.append(token)
            text = torch.cat([text, token[None]], dim=1)

    # --- results ---

    def stats(self) -> dict[str, Any]:
        """See `generate`."""
        tokens, forwards = self.text.shape[1] - self.prompt_length, self.forwards
        rate = tokens / forwards
        counts = {"tokens": tokens, "forwards": forwards, "tokens_per_forward": rate}
        return {**counts, "accepted": self.accepted}

    def output(self) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` returns."""
        if not self.config.return_dict_in_generate:
            return self.text
        rows: dict[str, Any] = {"scores": self.scores, "logits": self.logits}
        rows = {kind: tuple(values) or None for kind, values in rows.items()}
        text: Any = self.text
        return GenerateDecoderOnlyOutput(text, **rows, **{self.cache_argument: self.cache})
