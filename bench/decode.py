"""The latency curve of decoding: what one step of each method takes over a cache of some length.

An AR step has one query, a TiDAR step K + K². Their ratio is the number of tokens that a TiDAR
forward must make final to break even; it can make at most K. How many it does make depends on the
weights, so it is measured by the evals of a trained model, not here. Steps are those of the
decoder itself, verification and sampling included; after each the cache is rolled back.
"""

from dataclasses import dataclass

import torch

from bench.inputs import model_config, new_model
from bench.measure import Work, interleaved, ratio
from bench.results import Outcome
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape, num_queries
from pipeline.model.transformer import Transformer

STEPS_A_ROUND = 8
"""One step is too short for the clock."""


@dataclass(frozen=True)
class Options:
    model: str = "tiny"
    """a shape of conf/model"""
    vocab_size: int = 2048
    """ids of the tokenizer; the last is the mask token"""
    block_sizes: tuple[int, ...] = (2, 4, 8)
    """K of the TiDAR variants"""
    cached: tuple[int, ...] = (64, 256, 1024)
    """tokens in the cache before a step"""
    temperature: float = 0.0
    """0 is greedy"""
    precision: str = "fp32"
    """fp32 or bf16"""


@torch.inference_mode()
def run(options: Options, device: torch.device, rounds: int, warmup: int) -> Outcome:
    config = model_config(options.model, options.vocab_size, max(options.block_sizes))
    model = new_model(config, options.precision, device).eval()
    outcome = Outcome()
    outcome.figures["steps a round"] = STEPS_A_ROUND
    for cached in options.cached:
        steps = {"ar": decoding_steps(model, cached, None, options.temperature)}
        for size in options.block_sizes:
            steps[f"K={size}"] = decoding_steps(model, cached, size, options.temperature)
        samples = interleaved(steps, rounds=rounds, warmup=warmup, device=device)
        prefix = f"{cached} cached: "
        outcome.add(samples, prefix)
        for name in steps:
            variant = outcome.variants[prefix + name]
            size = int(name.removeprefix("K=")) if name != "ar" else 0
            variant["queries"] = num_queries(size) if size else 1
            variant["milliseconds_per_forward"] = (
                1e3 * variant["wall_seconds"]["median"] / STEPS_A_ROUND
            )
            if size:
                pair = ratio(samples[name], samples["ar"])
                outcome.ratios[f"{prefix}{name} / ar"] = pair
                break_even = pair["wall"]["of_medians"]
                variant["break_even_tokens_per_forward"] = break_even
                outcome.figures[f"{prefix}{name} breaks even at"] = (
                    f"{break_even:.2f} tokens a forward, of at most {size}"
                )
    return outcome


def decoding_steps(
    model: Transformer, cached: int, block_size: int | None, temperature: float
) -> Work:
    """`STEPS_A_ROUND` steps over exactly `cached` kept tokens each; block size None is AR."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.num_embeddings - 1, (cached,), generator=generator)
    shape = StepShape(1) if block_size is None else StepShape.full(block_size)
    engine = StepEngine(model, Sampling(temperature=temperature), shape, capacity=cached + 1)
    engine.admit(0, prompt.to(device), seed=0)

    def work() -> None:
        for _ in range(STEPS_A_ROUND):
            engine.rewind(0, cached)  # what the step before has kept is dropped again
            engine.step()

    return work
