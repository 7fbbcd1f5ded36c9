"""A decoder of exported folders that does what docs/decoding.md says: numpy, fp64, nothing cached.

It shares no code with the project, so a mistake of one is not in the other. Every step runs the
whole text again. `margin` is the least distance of any decision from its opposite: of two
logits, of a number from the edge that it is compared with. Letters as on the page: K block size, n
tokens in hand, Q queries, E hidden size, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def unit(x, eps=1e-12):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


class Export:
    """The weights of a folder, and its forward."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.tidar = json.loads((folder / "tidar.json").read_text())
        assert self.tidar["format_version"] in (1, 2)
        assert self.config["rope_parameters"]["rope_type"] == "default"
        self.drafting = {
            "draft_rank": 0, "adapter_rank": 0, "own_mask_embedding": False,
            "causal_slots": False, "linear_drafts": False, **self.tidar.get("drafting", {}),
        }  # fmt: skip
        tensors = load_file(folder / "model.safetensors")
        if (folder / "tidar.safetensors").is_file():
            tensors |= load_file(folder / "tidar.safetensors")
        self.weights = {name: value.astype(np.float64) for name, value in tensors.items()}
        self.embedding = self.weights["model.embed_tokens.weight"]
        self.lm_head = self.weights.get("lm_head.weight", self.embedding)

    def linear(self, name, x):
        out = x @ self.weights[f"{name}.weight"].T
        return out + self.weights.get(f"{name}.bias", 0.0)

    def projection(self, name, x, is_slot):
        """`name` as in `model.layers.0.mlp.up_proj`."""
        out = self.linear(name, x)
        adapter = name.removesuffix("proj") + "adapter"
        if f"{adapter}.down.weight" in self.weights:
            low = self.linear(f"{adapter}.up", self.linear(f"{adapter}.down", x))
            out = out + np.where(is_slot[:, None], low, 0.0)
        return out

    def norm(self, name, x):
        return unit(x, self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def rotate(self, x, positions):
        """x [Q, heads, D]"""
        half = x.shape[-1] // 2
        frequency = self.config["rope_parameters"]["rope_theta"] ** (-np.arange(half) / half)
        angle = positions[:, None, None] * frequency
        first, second = x[..., :half], x[..., half:]
        cosine, sine = np.cos(angle), np.sin(angle)
        return np.concatenate(
            [first * cosine - second * sine, second * cosine + first * sine], axis=-1
        )

    def hidden(self, ids, positions, sees, is_slot):
        """Final hidden states [Q, E]; `sees` [Q, Q] says whom each row sees."""
        x = self.embedding[ids]
        if self.drafting["own_mask_embedding"]:
            x = np.where(is_slot[:, None], self.weights["model.mask_embedding"], x)
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            x = x + self.attention(layer, self.norm(f"{layer}.input_layernorm", x), positions,
                                   sees, is_slot)  # fmt: skip
            inner = self.norm(f"{layer}.post_attention_layernorm", x)
            gate = self.projection(f"{layer}.mlp.gate_proj", inner, is_slot)
            up = self.projection(f"{layer}.mlp.up_proj", inner, is_slot)
            both = gate * sigmoid(gate) * up
            x = x + self.projection(f"{layer}.mlp.down_proj", both, is_slot)
        return self.norm("model.norm", x)

    def attention(self, layer, x, positions, sees, is_slot):
        size = self.config["head_dim"]
        query, key, value = (
            self.projection(f"{layer}.self_attn.{name}_proj", x, is_slot).reshape(len(x), -1, size)
            for name in "qkv"
        )
        if f"{layer}.self_attn.q_norm.weight" in self.weights:
            query = self.norm(f"{layer}.self_attn.q_norm", query)
            key = self.norm(f"{layer}.self_attn.k_norm", key)
        query, key = self.rotate(query, positions), self.rotate(key, positions)
        shared = query.shape[1] // key.shape[1]
        key, value = np.repeat(key, shared, axis=1), np.repeat(value, shared, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(size)
        shares = softmax(np.where(sees, scores, -np.inf))
        mixed = np.einsum("hqk,khd->qhd", shares, value).reshape(len(x), -1)
        return self.projection(f"{layer}.self_attn.o_proj", mixed, is_slot)


class Head:
    """The sequential head: z and the next state of each place in turn."""

    def __init__(self, export: Export) -> None:
        self.export, self.kind = export, export.drafting["draft_cell"]
        self.no_slot = export.weights["draft_head.no_slot"]

    def start(self, row):
        """The state before place 1, and what the LM head gets where there is no slot."""
        state = None
        if self.kind == "gru":
            state = np.tanh(self.export.linear("draft_head.cell.start", unit(row)))
        return state, self.export.linear("draft_head.plain", unit(row))

    def step(self, h, token, state):
        linear = self.export.linear
        x = linear("draft_head.cell.slot", unit(h))
        x = x + linear("draft_head.cell.token", unit(self.export.embedding[token]))
        if self.kind == "linear":
            return x, None
        if self.kind == "mlp":
            return linear("draft_head.cell.down", x * sigmoid(x)), None
        y = linear("draft_head.cell.state", state)
        (x_r, x_u, x_n), (y_r, y_u, y_n) = np.split(x, 3), np.split(y, 3)
        candidate = np.tanh(x_n + sigmoid(x_r + y_r) * y_n)
        update = sigmoid(x_u + y_u)
        state = (1 - update) * candidate + update * state
        return linear("draft_head.cell.down", state), state


@dataclass
class Settings:
    temperature: float = 0.0
    trust: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class Decoder:
    """One request: `start`, then `step` after `step`; `draft` is the draft in hand."""

    def __init__(self, export: Export, settings: Settings, size, blocks, verifier, drafter):
        """`verifier` and `drafter` are the two streams of numbers; of no use when greedy."""
        self.export, self.settings, self.size, self.blocks = export, settings, size, blocks
        self.streams = {"verify": iter(verifier), "draft": iter(drafter)}
        self.head = Head(export) if export.drafting["draft_rank"] else None
        self.one_block = export.drafting["linear_drafts"]
        self.slots = 2 * size - 1 if self.one_block else size
        self.text, self.draft, self.q, self.own = [], None, [], []
        self.margin = np.inf

    # --- the forward ---

    def start(self, prompt):
        some = bool(self.blocks) or self.head is None
        hidden = self.forward(list(prompt), [], [1] if some else [])
        last, block = hidden[len(prompt) - 1], hidden[len(prompt) :]
        logits = self.export.lm_head @ last
        if self.settings.trust < 1:
            logits = self.mixed(logits, self.export.lm_head @ block[0])
        (number,) = self.take("verify", 1)
        self.text = list(prompt)
        self.current = self.chosen(logits, set(prompt), number)[0]
        self.draft_next(last, block[1 : self.size] if some else None)
        return self.current

    def forward(self, kept, in_hand, blocks):
        """Hidden states of `kept` tokens, those in hand and the slots of `blocks`."""
        count, before = len(in_hand), len(kept) + len(in_hand)
        ids, positions = [*kept, *in_hand], list(range(before))
        sees = np.tri(before + self.slots * len(blocks), dtype=bool)
        for order, number in enumerate(blocks):
            first = before + order * self.slots
            own = slice(first, first + self.slots)
            ids += [self.export.tidar["mask_token_id"]] * self.slots
            place = len(kept) + (number if count else 0)
            positions += range(place, place + self.slots)
            sees[own] = False
            sees[own, : len(kept) + min(number, count)] = True
            inside = np.ones((self.slots, self.slots), dtype=bool)
            sees[own, own] = np.tril(inside) if self.export.drafting["causal_slots"] else inside
        is_slot = np.arange(len(ids)) >= before
        return self.export.hidden(np.array(ids), np.array(positions), sees, is_slot)

    def step(self):
        """The tokens that become final behind d_0, the last of which is the new d_0."""
        short = self.draft is None
        drafts = [] if short else self.draft
        blocks = [1] if short else self.blocks
        in_hand = [self.current, *drafts]
        hidden = self.forward(self.text, in_hand, blocks)[len(self.text) :]
        count = len(in_hand)
        logits = hidden[:count] @ self.export.lm_head.T
        if self.settings.trust < 1:
            behind = self.slots_after(hidden, count, blocks, count)[0]
            logits = self.mixed(logits, np.stack([*self.own, self.export.lm_head @ behind]))
        final = self.verify(drafts, logits)
        self.text += in_hand[:final]
        self.draft_next(hidden[final - 1], self.slots_after(hidden, count, blocks, final, 1))
        return [*drafts[: final - 1], self.current]

    def slots_after(self, hidden, count, blocks, final, place=0):
        """Slots `place` … K - 1 of the draft that follows `final` tokens, None without a block."""
        if self.one_block:
            first = count + final - 1 if blocks else None
        else:
            first = count + blocks.index(final) * self.size if final in blocks else None
        return None if first is None else hidden[first + place : first + self.size]

    # --- verification ---

    def verify(self, drafts, logits):
        """How many tokens become final, d_0 and the accepted drafts; draws the next d_0."""
        *decide, last = self.take("verify", self.size)
        seen = {*self.text, self.current}
        for place, draft in enumerate(drafts):
            if self.settings.temperature == 0:
                token, _ = self.chosen(logits[place], seen, None)
                accepted, rest = token == draft, None
            else:
                p, q = self.probabilities(logits[place], seen), self.q[place]
                self.note(decide[place] * q[draft], p[draft])
                accepted, rest = decide[place] * q[draft] < p[draft], np.maximum(p - q, 0)
            if not accepted:
                self.current = token if rest is None else self.drawn(rest, last)
                return place + 1
            seen = {*seen, draft}
        self.current = self.chosen(logits[len(drafts)], seen, last)[0]
        return len(drafts) + 1

    def mixed(self, verifier, own):
        return self.settings.trust * verifier + (1 - self.settings.trust) * own

    # --- drafts ---

    def draft_next(self, row, slots):
        """Draft behind the new d_0: `row` [E] drew it, `slots` [K - 1, E] are its block's."""
        numbers = self.take("draft", self.size - 1)
        seen = {*self.text, self.current}
        self.draft, self.q, self.own = [], [], []
        if self.head is None:
            if slots is None:
                self.draft = None
                return
            for h, number in zip(slots, numbers, strict=True):
                self.keep(self.export.lm_head @ h, seen, number)
            return
        state, plain = self.head.start(row)
        before = self.current
        for place, number in enumerate(numbers):
            h = self.head.no_slot if slots is None else slots[place]
            z, state = self.head.step(h, before, state)
            logits = self.export.lm_head @ (plain if slots is None else slots[place])
            before = self.keep(logits + self.export.weights["draft_head.up.weight"] @ z, seen,
                               number)  # fmt: skip
            seen = {*seen, before}

    def keep(self, logits, seen, number):
        token, q = self.chosen(logits, seen, number)
        self.draft.append(token)
        self.q.append(q)
        self.own.append(logits)
        return token

    # --- logits to tokens ---

    def take(self, stream, count):
        if self.settings.temperature == 0:
            return [None] * count
        return [next(self.streams[stream]) for _ in range(count)]

    def chosen(self, logits, seen, number):
        """A token, and the distribution that it was drawn from."""
        if self.settings.temperature == 0:
            scores = self.penalised(logits, seen)
            second, best = np.sort(scores)[-2:]
            self.note(best, second)
            return int(scores.argmax()), None
        q = self.probabilities(logits, seen)
        return self.drawn(q, number), q

    def penalised(self, logits, seen):
        scores, ids = logits.copy(), sorted(seen)
        penalty = self.settings.repetition_penalty
        scores[ids] = np.where(scores[ids] > 0, scores[ids] / penalty, scores[ids] * penalty)
        return scores

    def probabilities(self, logits, seen):
        scores = self.penalised(logits, seen) / self.settings.temperature
        if self.settings.top_k is not None and self.settings.top_k < len(scores):
            ordered = np.sort(scores)[::-1]
            self.note(*ordered[self.settings.top_k - 1 : self.settings.top_k + 1])
            scores = np.where(scores >= ordered[self.settings.top_k - 1], scores, -np.inf)
        p = softmax(scores)
        if self.settings.top_p < 1:
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]
            self.note(before, self.settings.top_p)
            p = np.where(np.isin(np.arange(len(p)), order[before < self.settings.top_p]), p, 0.0)
            p = p / p.sum()
        return p

    def drawn(self, weights, number):
        edges = np.cumsum(weights / weights.sum())
        self.note(edges[:-1], number)
        return int(np.searchsorted(edges, number, side="right"))

    def note(self, left, right):
        self.margin = min(self.margin, float(np.abs(np.asarray(left) - right).min()))
