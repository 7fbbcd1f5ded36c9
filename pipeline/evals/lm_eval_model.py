"""The model as lm-evaluation-harness sees it; imported only where that library is installed.

`loglikelihood` and `loglikelihood_rolling` run plain causal forwards; `generate_until` decodes one
request at a time by TiDAR or AR. A context that is empty is the end token: documents start with
no token of their own in training.
"""

import time
from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from data_prep.tokenizers.load import Tokenizer
from pipeline.decoding import DecodeOptions, Generation, Sampling, stream
from pipeline.distributed import World
from pipeline.evals.config import TasksConfig
from pipeline.evals.decoders import Decoder
from pipeline.evals.totals import Cost
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError

NEUTRAL = {"min_p": (None, 0), "typical_p": (None, 1), "num_beams": (None, 1)}
"""Options of Hugging Face's `generate` that this decoder lacks, and the values that change nothing;
others are refused where a task samples."""


class TidarLM(TemplateLM):
    """Every rank holds the whole model and answers its share of the requests."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: TasksConfig,
        decoder: Decoder,
        world: World,
    ) -> None:
        super().__init__()
        self.model = model
        self.tidar_tokenizer = tokenizer
        self.config = config
        self.decoder = decoder
        self.world = world
        self._rank, self._world_size = world.rank, world.size
        self._device = next(model.parameters()).device
        self.generated: defaultdict[str, Cost] = defaultdict(Cost)
        """What `generate_until` cost for each task on this rank."""

    @property
    def eot_token_id(self) -> int:
        return self.tidar_tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.model.config.max_positions

    @property
    def device(self) -> torch.device:
        return self._device

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.world.gather(tensor.cpu())).flatten()

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        parts = self.world.gather(obj)
        return parts if self.rank == dst else None

    def barrier(self) -> None:
        self.world.barrier()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.tidar_tokenizer.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether greedy decoding would give it.

        Args:
            requests: (names, context ids, continuation ids) each; contexts that do not fit are cut
                from the left.
            disable_tqdm: unused; there is no bar of our own.
            **kwargs: of other adapters.

        Raises:
            UserError: for a continuation of more tokens than the model has positions.
        """
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"evals.tasks.tasks: a continuation has {longest} tokens, the model has "
                f"{self.max_length} positions; leave its task out"
            )
        results: dict[int, tuple[float, bool]] = {}
        # Neighbours of like length waste little on padding.
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1] + requests[n][2]))
        for start in range(0, len(order), self.config.batch_size):
            numbers = order[start : start + self.config.batch_size]
            pairs = [(requests[n][1], requests[n][2]) for n in numbers]
            results.update(zip(numbers, self._score(pairs), strict=True))
        return [results[n] for n in range(len(requests))]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        whole = [(context + target)[-(self.max_length + 1) :] for context, target in pairs]
        targets = [tokens[-len(target) :] for tokens, (_, target) in zip(whole, pairs, strict=True)]
        width = max(len(tokens) for tokens in whole) - 1
        # Padding stands on the right, where no token of the sequence can see it.
        ids = torch.full((len(whole), width), self.eot_token_id)
        rows = []
        for number, (tokens, target) in enumerate(zip(whole, targets, strict=True)):
            ids[number, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            end = number * width + len(tokens) - 1
            rows.append(torch.arange(end - len(target), end))
        logits = self.model(ids.to(self.device), rows=torch.cat(rows).to(self.device))
        results = []
        for part, target in zip(logits.split([len(t) for t in targets]), targets, strict=True):
            labels = torch.tensor(target, device=self.device)
            chosen = torch.log_softmax(part.float(), -1).gather(1, labels[:, None])
            greedy = bool((part.argmax(-1) == labels).all())
            results.append((float(chosen.double().sum()), greedy))
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, longer ones in windows that score each token once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            spans = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, target in map(make_disjoint_window, spans):
                windows.append((None, context, target))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to its first stop string."""
        answers = []
        for request in requests:
            context, options = request.args
            options = normalize_gen_kwargs(options, self.config.max_new_tokens)
            text, cost = self._answer(context, options)
            self.generated[request.task_name or ""] += cost
            answers.append(text)
        return answers

    def _answer(self, context: str, options: dict[str, Any]) -> tuple[str, Cost]:
        limit, stops = options["max_gen_toks"], [stop for stop in options["until"] if stop]
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        if limit >= self.max_length:
            raise UserError(
                f"evals.tasks.tasks: an answer may have {limit} tokens, the model has "
                f"{self.max_length} positions; leave this task out"
            )
        started = time.perf_counter()
        decoding = DecodeOptions(
            method=self.decoder.method,
            block_size=self.config.block_size,
            sampling=self._sampling(options),
            max_new_tokens=limit,
            eos_id=self.eot_token_id,
        )
        run, text = Generation(), ""
        for tokens in stream(self.model, prompt[-(self.max_length - limit) :], decoding):
            run.tokens += tokens
            run.forwards += 1
            text = self.tidar_tokenizer.decode(run.tokens)
            if any(stop in text for stop in stops):
                break
        run.seconds = time.perf_counter() - started
        return postprocess_generated_text(text, stops, None), Cost.of(run)

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        temperature = float(options.get("temperature") or 0.0) if options["do_sample"] else 0.0
        for name, neutral in NEUTRAL.items():
            if temperature > 0 and options.get(name) not in neutral:
                raise UserError(
                    f"evals.tasks.tasks: a task samples with {name}={options[name]}, which this "
                    "decoder does not offer; leave it out or redefine it in evals.tasks.tasks_dir"
                )
        top_k, top_p = options.get("top_k"), options.get("top_p")
        penalty = options.get("repetition_penalty")
        return Sampling(
            temperature=temperature,
            trust=self.decoder.trust,
            seed=self.config.seed,
            top_k=int(top_k) if top_k is not None and top_k > 0 else None,
            top_p=1.0 if top_p is None else float(top_p),
            repetition_penalty=1.0 if penalty is None else float(penalty),
        )
