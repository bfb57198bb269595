"""Predicted sparse attention: the mask query by query, attention under it, and what the predictor learns from."""

import math

import pytest
import torch
from timm.layers import set_fused_attn, use_fused_attn

from vision_attn.modules.predicted import MaskPredictor, PredictedAttention


def layer_of(**options):
    torch.manual_seed(0)
    layer = PredictedAttention(**{"dim": 24, "num_heads": 3, "num_tokens": 23, **options}).double()
    with torch.no_grad():
        for name in ("proj_n", "proj_back_n"):
            getattr(layer.mask_predictor, name).mul_(50)
    return layer


def heads_first(layer, x):
    return layer.qkv(x).view(*x.shape[:2], 3, 3, 8).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("keep", [0.25, 0.01, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_mask_is_the_best_of_the_low_rank_guess(keep, threshold):
    layer = layer_of(keep=keep, threshold=threshold)
    guess = layer.mask_predictor
    x = torch.randn(2, 23, 24, dtype=torch.float64)
    q, k, _ = heads_first(layer, x)
    mask = guess(q, k)
    kept = math.ceil(keep * 23)
    assert mask.dtype == torch.bool and mask[:, :, 0].all() and (mask[:, :, 1:].sum(-1) == kept).all()
    basis = torch.where(guess.proj_back_n.abs() > threshold, guess.proj_back_n.abs(), 0.0)
    for b in range(2):
        for h in range(3):
            reduced = [guess.proj_n[:, r] @ guess.proj_c_k(k[b, h]) for r in range(guess.proj_n.shape[1])]
            for i in range(1, 23):
                logits = torch.stack([guess.proj_c_q(q[b, h, i]) @ row for row in reduced]) / math.sqrt(3)
                score = basis @ logits.softmax(0)
                inside, outside = score[mask[b, h, i]], score[~mask[b, h, i]]
                assert not len(outside) or inside.min() >= outside.max()


@pytest.mark.parametrize("fused", [True, False])
def test_output_is_softmax_over_the_kept_keys(fused):
    was = use_fused_attn()
    try:
        set_fused_attn(fused)
        layer = layer_of()
    finally:
        set_fused_attn(was)
    x = torch.randn(2, 23, 24, dtype=torch.float64)
    q, k, v = heads_first(layer, x)
    mask, out = layer.mask_predictor(q, k), torch.zeros(2, 23, 3, 8, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(23)).tolist():
        keys = mask[b, h, i].nonzero()[:, 0]
        weights = (k[b, h, keys] @ q[b, h, i] / math.sqrt(8)).softmax(0)
        out[b, i, h] = weights @ v[b, h, keys]
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(2)))


def test_keeping_all_is_dense_attention():
    layer, x = layer_of(keep=1.0), torch.randn(1, 23, 24, dtype=torch.float64)
    q, k, v = heads_first(layer, x)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(layer(x), layer.proj(dense.transpose(1, 2).flatten(2)))


def test_the_predictor_learns_from_reconstruction_alone():
    layer, x = layer_of(), torch.randn(2, 23, 24, dtype=torch.float64)
    layer(x).square().sum().backward()
    learners = [p for _, p in layer.mask_predictor.named_parameters()]
    assert all(p.grad is None for p in learners)
    layer.zero_grad()
    layer.reconstruction_loss(x).backward()
    assert all(p.grad.abs().sum() > 0 for p in learners)
    q, k, _ = heads_first(layer, x)
    guess, expected = layer.mask_predictor, 0.0
    for b in range(2):
        for h in range(3):
            logits = guess.proj_c_q(q[b, h]) @ guess.proj_c_k(k[b, h]).T @ guess.proj_n / math.sqrt(3)
            approx = logits.softmax(-1) @ guess.proj_back_n.T
            dense = (q[b, h] @ k[b, h].T / math.sqrt(8)).softmax(-1)
            expected += (approx - dense)[1:].square().sum()
    torch.testing.assert_close(layer.reconstruction_loss(x), expected)


def test_reconstruction_makes_the_mask_find_what_dense_attention_looks_at():
    torch.manual_seed(0)
    layer = PredictedAttention(16, num_heads=2, num_tokens=32, rank_factor=2)
    x = torch.randn(1, 32, 16) * 3

    def covered():  # weight of dense attention on the keys that are kept
        q, k, _ = layer.qkv(x).view(1, 32, 3, 2, 8).permute(2, 0, 3, 1, 4)
        dense = (q @ k.mT / math.sqrt(8)).softmax(-1)
        return (dense * layer.mask_predictor(q, k))[:, :, 1:].sum(-1).mean().item()

    before = covered()
    optimizer = torch.optim.Adam(layer.mask_predictor.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        layer.reconstruction_loss(x).backward()
        optimizer.step()
    assert covered() > before + 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(dtype):
    layer = PredictedAttention(32, num_heads=4, num_tokens=197).to(dtype)
    out = layer(torch.randn(2, 197, 32, dtype=dtype))
    assert out.dtype == dtype and out.isfinite().all()


def test_published_sizes_and_keys():
    shapes = {k: tuple(v.shape) for k, v in PredictedAttention(384, num_heads=6).state_dict().items()}
    assert shapes == {
        "qkv.weight": (1152, 384), "qkv.bias": (1152,), "proj.weight": (384, 384), "proj.bias": (384,),
        "mask_predictor.proj_c_q.weight": (32, 64), "mask_predictor.proj_c_q.bias": (32,),
        "mask_predictor.proj_c_k.weight": (32, 64), "mask_predictor.proj_c_k.bias": (32,),
        "mask_predictor.proj_n": (197, 32), "mask_predictor.proj_back_n": (197, 32),
    }  # fmt: skip


def test_errors():
    with pytest.raises(ValueError, match="num_tokens=24"):
        layer_of()(torch.randn(1, 24, 24, dtype=torch.float64))
    for options, words in [({"keep": 0.0}, "keep is"), ({"keep": 1.5}, "keep is"), ({"rank_factor": 0}, "rank_factor")]:
        with pytest.raises(ValueError, match=words):
            MaskPredictor(24, 3, 23, **options)
    with pytest.raises(ValueError, match="at least 2"):
        MaskPredictor(24, 24, 23)
