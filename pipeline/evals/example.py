"""A generation for the report: every token with the forward that made it final."""

import json
from pathlib import Path

from data_prep.tokenizers.load import Tokenizer
from pipeline.decoding import generate
from pipeline.decoding.text import token_texts
from pipeline.evals.heldout import HeldOut
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.model.transformer import Transformer
from tidar_common.files import write_text_atomic


def write_example(
    model: Transformer,
    tokenizer: Tokenizer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    step: int,
    path: Path,
) -> None:
    """Continue one held-out prompt with TiDAR and write it to `path` (JSON).

    At the eval's highest temperature: greedy text of a base model soon repeats itself, and shows
    little. It runs twice as far as the eval's own generations, or to the model's last position.
    """
    temperature = max(config.temperatures)
    prompt = heldout.prompts(1, config.prompt_tokens, config.seed)[0]
    room = model.config.max_positions - len(prompt)
    result = generate(
        model,
        prompt,
        block_size=config.block_size,
        temperature=temperature,
        seed=config.seed,
        max_new_tokens=min(2 * config.max_new_tokens, room),
    )
    content = {
        "step": step,
        "prompt": tokenizer.decode(prompt),
        "method": "tidar",
        "temperature": temperature,
        "block_size": config.block_size or model.config.block_size,
        "tokens_per_forward": result.tokens_per_forward,
        "tokens": [
            {"text": text, "forward": forward}
            for text, forward in zip(
                token_texts(tokenizer, result.tokens), result.forward_of_token, strict=True
            )
        ],
    }
    write_text_atomic(path, json.dumps(content, ensure_ascii=False))
