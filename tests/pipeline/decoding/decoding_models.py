"""Small random models whose logits are spread out enough to be worth verifying."""

import torch

from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer

VOCABULARY = 13
MASK = 12
CPU = torch.device("cpu")


def make_model(
    seed: int = 0, scale: float = 8.0, vocabulary: int = VOCABULARY, **changes
) -> Transformer:
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "vocab_size": vocabulary, "mask_token_id": MASK,
        "block_size": 4, "qk_norm": True, **changes,
    }  # fmt: skip
    model = Transformer(ModelConfig(**values)).initialize(seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
        if model.draft_head is not None:
            # Large and random everywhere, B too, so that a draft's q is far from p and from flat.
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.draft_head.parameters():
                parameter.normal_(0.0, 0.7, generator=generator)
    return model


def random_prompts(seed: int, lengths: tuple[int, ...], vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]
