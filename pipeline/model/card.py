"""The model card of an export: what the model is, and how to decode with it."""

from typing import Any

import torch

from pipeline.model.config import ModelConfig

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---
"""

DRAFTS = """
# TiDAR model

A decoder-only transformer trained with TiDAR ([arXiv 2511.08923](https://arxiv.org/abs/2511.08923)):
the same weights draft the next {block_size} tokens by one-step masked diffusion and verify them
autoregressively, in one forward. Greedy output is that of plain autoregressive decoding, token for
token; sampled output has its distribution.

{table}

## Decoding

Several tokens a forward, with the package `tidar-pretrain`:

```python
from pipeline import load_model
from pipeline.decoding import generate

model, tokenizer = load_model("path/to/this/folder")
result = generate(model, tokenizer.encode("Once upon a time"), max_new_tokens=128,
                  eos_id=tokenizer.eos_id)
print(tokenizer.decode(result.tokens), result.tokens_per_forward)
```

or `tidar-generate checkpoint=path/to/this/folder prompt="Once upon a time"`.
"""

PLAIN = """
# Autoregressive model

A decoder-only transformer of the {family} family, trained to predict the next token.

{table}

## Decoding
"""

TRANSFORMERS = """
One token a forward, with transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=128)[0]))
```

Training documents were `[tokens, eos]` without a token in front: nothing is prepended to a prompt.
`AutoTokenizer` reads control symbols written out in a text (`</s>`) as symbols; in training they
were plain text, which `split_special_tokens=True` gives.
"""

SENTENCEPIECE_ONLY = """
transformers runs the model as a plain autoregressive one (`AutoModelForCausalLM`), but not its
tokenizer: use `tokenizer.model` with the package sentencepiece. Nothing is prepended to a prompt.
"""

FORMAT = """
## For other decoders

`tidar.json` holds what a decoder needs beside `config.json`:

- `mask_token_id`: the token that stands in every position to be drafted;
- `block_size`: positions drafted at once in training, the default for decoding;
- `label_shift`: the logits of a clean row at position i are for position i + {clean}, those of a
  mask row at position i for position i + {mask};
- `drafting`: what the model has for drafting alone, with its weights in `tidar.safetensors`: a
  draft head, low-rank updates of mask rows' projections, an embedding of the mask rows' own;
- `tokenizer`: which of the files is the tokenizer of the training data.

Clean rows attend causally. A block of mask tokens attends to all clean rows before its first
position and to itself in both directions (with `causal_slots` up to each row itself); its position
ids are those of the tokens it drafts. `docs/decoding.md` of the package says all of it.
"""


def model_card(
    config: ModelConfig, tidar: dict[str, Any], dtype: torch.dtype, auto_tokenizer: bool
) -> str:
    """`README.md` of an export.

    Args:
        config: shape of the model.
        tidar: content of its `tidar.json`.
        dtype: of the weights.
        auto_tokenizer: whether transformers' AutoTokenizer can read the tokenizer.
    """
    drafts = config.mask_token_id is not None
    tags = "\n".join(f"- {tag}" for tag in (*(["tidar"] if drafts else []), config.family))
    body = (DRAFTS if drafts else PLAIN).format(
        block_size=config.block_size,
        family=config.family,
        table=_table(config, tidar, dtype),
    )
    parts = [HEADER.format(tags=tags), body]
    parts.append(TRANSFORMERS if auto_tokenizer else SENTENCEPIECE_ONLY)
    if drafts:
        parts.append(FORMAT.format(**tidar["label_shift"]))
    return "".join(parts)


def _table(config: ModelConfig, tidar: dict[str, Any], dtype: torch.dtype) -> str:
    progress = tidar["training"] or {}
    rows: dict[str, Any] = {
        "Parameters": f"{config.num_parameters:,}",
        "Architecture": f"{config.family}, {config.num_layers} layers, width {config.hidden_size}",
        "Weights": str(dtype).removeprefix("torch."),
        "Longest sequence": f"{config.max_positions:,} tokens",
        "Vocabulary": f"{config.num_embeddings:,}",
    }
    if config.mask_token_id is not None:
        rows["Block size"] = config.block_size
        rows["Mask token id"] = config.mask_token_id
    if progress:
        rows["Trained for"] = f"{progress['step']:,} steps, {progress['tokens']:,} tokens"
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )
