"""Mixture of heads: gates and outputs against the formula token by token, and the loss that balances heads."""

import copy
import math

import pytest
import torch
from timm.layers import set_fused_attn, use_fused_attn

from vision_attn.modules.mixture_of_heads import HeadRouter, MixtureOfHeads, load_balance

SPLITS = [(8, 2, 3), (6, 1, 2), (6, 0, 4), (4, 4, 0), (4, 3, 1), (1, 1, 0)]  # heads, shared, routed


def gates_of_token(router, x):
    """The definition, for one token `[dim]`, as a list."""
    shared, routed = router.shared_heads, router.routed_heads

    def probabilities(layer):
        logits = (layer.weight @ x).tolist()
        total = sum(math.exp(v) for v in logits)
        return [math.exp(v) / total for v in logits]

    gates = [p * shared for p in probabilities(router.wg_1)] if shared > 1 else [1.0] * shared
    if not routed:
        return gates
    scores = probabilities(router.wg)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:routed]
    others = [routed * s / sum(scores[j] for j in best) if i in best else 0.0 for i, s in enumerate(scores)]
    a = [2 * p for p in probabilities(router.wg_0)] if shared else [1.0, 1.0]
    return [a[0] * g for g in gates] + [a[1] * g for g in others]


def sharpened(layer, scale=20.0):
    """Routing weights large enough that gates differ visibly."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if ".wg" in f".{name}":
                weight.mul_(scale)
    return layer.double()


@pytest.mark.parametrize("heads, shared, routed", SPLITS)
def test_gates_are_those_of_the_definition(heads, shared, routed):
    torch.manual_seed(heads)
    router = sharpened(HeadRouter(12, heads, shared, routed))
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    expected = torch.tensor([gates_of_token(router, token) for token in x.reshape(-1, 12)], dtype=torch.float64)
    torch.testing.assert_close(router(x).reshape(-1, heads), expected)


@pytest.mark.parametrize("heads, shared, routed", SPLITS)
@pytest.mark.parametrize("grid", [(7, 5), (1, 1), (1, 11), (13,), (2, 3, 3)])
def test_output_is_gated_attention_of_every_head(heads, shared, routed, grid):
    torch.manual_seed(0)
    layer = sharpened(MixtureOfHeads(24, heads, shared, routed))
    x = torch.randn(2, *grid, 24, dtype=torch.float64)
    tokens, d = x.flatten(1, -2), 24 // heads
    q, k, v = (layer.qkv(tokens)[..., 24 * i : 24 * (i + 1)] for i in range(3))
    gates = layer.router(tokens)
    parts = []
    for h in range(heads):
        one = slice(h * d, (h + 1) * d)
        weights = (q[..., one] @ k[..., one].mT / math.sqrt(d)).softmax(-1)
        parts.append(gates[..., h : h + 1] * (weights @ v[..., one]))
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(parts, -1)).view(x.shape))


def test_explicit_branch_is_equal():
    x, outs, was = torch.randn(2, 5, 7, 32), [], use_fused_attn()
    for fused in (True, False):
        try:
            set_fused_attn(fused)
            torch.manual_seed(0)
            layer = MixtureOfHeads(32)
        finally:
            set_fused_attn(was)
        assert layer.fused_attn == fused
        outs.append(layer(x))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


def test_every_weight_learns_and_half_precision_is_finite():
    layer = MixtureOfHeads(32, 8, 2, 3)
    layer(torch.randn(2, 5, 7, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        out = copy.deepcopy(layer).to(dtype)(torch.randn(1, 64, 64, 32, dtype=dtype))
        assert out.dtype == dtype and out.isfinite().all()


def test_dropout_acts_in_training_only():
    layer, x = MixtureOfHeads(16, 4, 1, 2, attn_drop=0.5), torch.randn(1, 6, 6, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_balance_loss():
    torch.manual_seed(0)
    router = sharpened(HeadRouter(12, 7, 2, 3))
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    scores = (x.reshape(-1, 12) @ router.wg.weight.T).softmax(-1)
    kept = torch.stack([(row >= row.sort().values[-3]).double() for row in scores])
    expected = 25 * sum(scores[:, i].mean() * kept[:, i].mean() for i in range(5)) / 5
    torch.testing.assert_close(router.balance_loss(x), expected)
    assert expected > 3  # what heads used alike give


def test_load_balance_is_the_mean_over_the_layers_with_a_gradient():
    first, second = MixtureOfHeads(16, 4, 1, 2), MixtureOfHeads(16, 4, 4, 0)
    model = torch.nn.Sequential(first, second, MixtureOfHeads(16, 4, 0, 3))
    x = torch.randn(2, 5, 5, 16)
    with load_balance(model) as loss:
        with pytest.raises(ValueError, match="no forward pass"):
            loss()
        model(x)
    expected = (first.router.balance_loss(x) + model[2].router.balance_loss(second(first(x)))) / 2
    torch.testing.assert_close(loss(), expected)
    loss().backward()
    assert first.router.wg.weight.grad.abs().sum() > 0
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no layer that routes heads"), load_balance(second):
        pass


@pytest.mark.parametrize(
    "heads, shared, routed, words",
    [
        (8, 9, 0, "0 to num_heads = 8"),
        (8, 2, 0, "1 to 6"),
        (8, 2, 7, "1 to 6"),
        (8, 8, 1, "0 to 0"),
        (5, 1, 1, "dim 32"),
    ],
)
def test_numbers_of_heads_that_do_not_fit(heads, shared, routed, words):
    with pytest.raises(ValueError, match=words):
        MixtureOfHeads(32, heads, shared, routed)
