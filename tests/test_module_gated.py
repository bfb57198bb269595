"""Gated attention: the formula, timm's own gated layer, and packed projections."""

import math

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn

from vision_attn.modules.gated import GatedAttention, split_packed_gate


@pytest.mark.parametrize("gating", ["elementwise", "headwise"])
@pytest.mark.parametrize("grid", [(7, 5), (1, 1), (1, 11), (13,)])
@pytest.mark.parametrize("fused", [True, False])
def test_output_is_attention_times_its_gates(gating, grid, fused):
    was = use_fused_attn()
    try:
        set_fused_attn(fused)
        layer = GatedAttention(24, num_heads=3, gating=gating).double()
    finally:
        set_fused_attn(was)
    x = torch.randn(2, *grid, 24, dtype=torch.float64)
    tokens = x.flatten(1, -2)
    gates = 1 / (1 + (-layer.gate(tokens)).exp())
    q, k, v = (layer.qkv(tokens)[..., 24 * i : 24 * (i + 1)] for i in range(3))
    parts = []
    for h in range(3):
        one = slice(8 * h, 8 * h + 8)
        gate = gates[..., one] if gating == "elementwise" else gates[..., h : h + 1]
        parts.append((q[..., one] @ k[..., one].mT / math.sqrt(8)).softmax(-1) @ v[..., one] * gate)
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(parts, -1)).view(x.shape))
    torch.testing.assert_close(layer.gates(x), gates.view(*x.shape[:-1], -1))


@pytest.mark.skipif("gated" not in timm.layers.Attention.__init__.__annotations__, reason="timm has no gated attention")
def test_elementwise_is_timms_layer():
    theirs, ours = timm.layers.Attention(32, num_heads=4, qkv_bias=True, gated=True), GatedAttention(32, num_heads=4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 11, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("gating", ["elementwise", "headwise"])
def test_every_weight_learns_and_half_precision_is_finite(gating):
    layer = GatedAttention(32, num_heads=4, gating=gating)
    layer(torch.randn(2, 5, 7, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        assert layer.to(dtype)(torch.randn(1, 64, 64, 32, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("gating", ["elementwise", "headwise"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_packed_rows_are_taken_apart_in_the_order_of_the_heads(gating, heads, kv_heads):
    head_dim, rows = 5, []
    wide = head_dim if gating == "elementwise" else 1
    q = [[100 * h + i for i in range(head_dim)] for h in range(heads)]
    gate = [[-(100 * h + i) - 1 for i in range(wide)] for h in range(heads)]
    for group in range(kv_heads):
        mine = range(group * heads // kv_heads, (group + 1) * heads // kv_heads)
        rows += [n for h in mine for n in q[h]] + [n for h in mine for n in gate[h]]
    for packed in (torch.tensor(rows), torch.tensor(rows)[:, None].expand(-1, 7)):
        got_q, got_gate = split_packed_gate(packed, heads, kv_heads, gating)
        assert got_q.view(len(got_q), -1)[:, 0].tolist() == [n for h in q for n in h]
        assert got_gate.view(len(got_gate), -1)[:, 0].tolist() == [n for h in gate for n in h]


def test_errors():
    with pytest.raises(ValueError, match="'elementwise', 'headwise'"):
        GatedAttention(32, gating="both")
    with pytest.raises(ValueError, match="5 heads"):
        GatedAttention(32, num_heads=5)
    with pytest.raises(ValueError, match="must divide"):
        split_packed_gate(torch.zeros(40, 8), 4, 3)
    with pytest.raises(ValueError, match="41 rows"):
        split_packed_gate(torch.zeros(41, 8), 4, 2)
