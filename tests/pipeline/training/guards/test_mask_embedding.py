"""The norm of the mask token's embedding, read off a forward, and the bounds it is held against."""

import pytest
import torch
from small_models import random_model, small_config

from pipeline.training.guards.mask_embedding import MaskEmbedding, MaskGuardConfig

MASK = 4
IDS = torch.tensor([[9, 7, 300, 7, MASK, MASK], [8, 8, 8, 8, MASK, MASK]])


def watched(config: MaskGuardConfig, mask_token_id: int | None = MASK):
    model = random_model(small_config(mask_token_id=mask_token_id))
    return model, MaskEmbedding(model.model, mask_token_id, config)


def test_it_reads_the_weights_that_the_forward_used():
    model, watch = watched(MaskGuardConfig())
    assert watch.read() is None
    model(IDS)
    found = watch.read()
    weight = model.model.embed_tokens.weight.detach()
    assert found.norm == pytest.approx(float(weight[MASK].norm()))
    text = [float(weight[token].norm()) for token in (9, 7, 300, 7)]
    assert found.text == pytest.approx(sum(text) / 4)
    assert found.share == pytest.approx(found.norm / found.text)


def test_a_model_without_drafts_has_none():
    model, watch = watched(MaskGuardConfig(), None)
    model(IDS)
    assert watch.read() is None


def test_leaving_the_bounds_is_told_once_until_it_is_back():
    model, watch = watched(MaskGuardConfig(least_share=0.5, most_share=2.0))
    weight = model.model.embed_tokens.weight
    told = []
    for scale in (1.0, 1e-2, 0.9, 1e2, 1.1, 1e4):
        with torch.no_grad():
            weight[MASK] *= scale
        model(IDS)
        told.append(watch.left(watch.read()))
    # In bounds, far below, still, back within, and above.
    assert [text is not None for text in told] == [False, True, False, False, False, True]
    assert "mask_guard.least_share=0.5" in told[1]
    assert "mask_guard.most_share=2" in told[5]


def test_bounds_that_are_none_are_refused():
    with pytest.raises(ValueError, match="below most_share"):
        MaskGuardConfig(least_share=2.0, most_share=1.0)
