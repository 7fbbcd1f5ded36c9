"""A generation for the report: every token with the forward that made it final."""

import json
from pathlib import Path

from data_prep.files import write_text_atomic
from data_prep.tokenizers import Tokenizer
from pipeline.decoding import generate
from pipeline.evals.heldout import HeldOut
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.model.transformer import Transformer


def write_example(
    model: Transformer,
    tokenizer: Tokenizer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    step: int,
    path: Path,
) -> None:
    """Continue one held-out prompt greedily with TiDAR and write it to `path` (JSON).

    It runs twice as far as the eval's own generations, or to the model's last position.
    """
    prompt = heldout.prompts(1, config.prompt_tokens, config.seed)[0]
    room = model.config.max_positions - len(prompt)
    result = generate(
        model,
        prompt,
        block_size=config.block_size,
        max_new_tokens=min(2 * config.max_new_tokens, room),
    )
    content = {
        "step": step,
        "prompt": tokenizer.decode(prompt),
        "method": "tidar",
        "temperature": 0.0,
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


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text, so that the parts join to the decoded whole.

    A character of several byte tokens stands at the last of them.
    """
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        complete = end == len(ids) or not text.endswith("\ufffd")
        grown = text if complete and text.startswith(done) else done
        texts.append(grown[len(done) :])
        done = grown
    return texts
