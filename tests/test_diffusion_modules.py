"""Blocks for denoisers: against the formula token by token, at a start that changes nothing, and trained a little."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vision_attn.diffusion.modules import AdaptiveBlock, LaMambaBlock, MoHDiTBlock
from vision_attn.modules import load_balance

BLOCKS = {
    "moh": lambda **options: MoHDiTBlock(16, num_heads=4, shared_heads=1, routed_heads=2, **options),
    "lamamba": lambda **options: LaMambaBlock(16, num_heads=4, window=3, **options),
    "lamamba-shifted": lambda **options: LaMambaBlock(16, num_heads=2, window=4, shift=2, kind="elu", **options),
}
EVERY = pytest.mark.parametrize("name", BLOCKS)


def awake(block):
    """With conditions that do something."""
    torch.manual_seed(1)
    for parameter in block.condition.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.double()


def normed(token):
    return (token - token.mean()) / (token.var(correction=0) + 1e-6).sqrt()


def expected(block, x, condition):
    """`x + gate * layer(norm(x) (1 + scale) + shift)`, sample by sample and token by token around each layer."""
    outputs = []
    for sample, c in zip(x, condition, strict=True):
        numbers = (block.condition.weight @ (c * torch.sigmoid(c)) + block.condition.bias).split(x.shape[-1])
        for i, layer in enumerate(block.layers):
            shift, scale, gate = numbers[3 * i : 3 * i + 3]
            tokens = sample.reshape(-1, x.shape[-1])
            changed = torch.stack([normed(token) * (1 + scale) + shift for token in tokens]).view_as(sample)
            sample = sample + gate * layer(changed[None])[0]
        outputs.append(sample)
    return torch.stack(outputs)


@EVERY
@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (3, 2)])
def test_block_is_that_of_the_formula(name, grid):
    block = awake(BLOCKS[name](cond_dim=6, mlp_ratio=1.5))
    x, condition = torch.randn(2, *grid, 16).double(), torch.randn(2, 6).double()
    torch.testing.assert_close(block(x, condition), expected(block, x, condition))


def test_moh_attention_is_gated_heads():
    """The heads of a token, each times its gate, written out; and on video tokens too."""
    block = awake(BLOCKS["moh"]())
    attn = block.layers[0]
    x = torch.randn(1, 2, 3, 3, 16).double()
    tokens = x.reshape(18, 16)
    q, k, v = (tokens @ attn.qkv.weight.T + attn.qkv.bias).split(16, -1)
    out = torch.zeros(18, 16).double()
    for n, token in enumerate(tokens):
        routed = torch.softmax(attn.router.wg.weight @ token, 0)
        best = set(routed.topk(2).indices.tolist())
        total = sum(routed[i] for i in best)
        shared, rest = 2 * torch.softmax(attn.router.wg_0.weight @ token, 0)
        gates = [shared] + [rest * 2 * routed[i] / total if i in best else 0.0 for i in range(3)]
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            weights = torch.softmax(k[:, part] @ q[n, part] / 2, 0)
            out[n, part] = gates[h] * (weights @ v[:, part])
    torch.testing.assert_close(attn(x).view(18, 16), out @ attn.proj.weight.T + attn.proj.bias)


def test_lamamba_sees_everything_but_its_windows_do_not():
    block = awake(BLOCKS["lamamba"]())
    x = torch.randn(1, 6, 6, 16).double().requires_grad_()
    condition = torch.randn(1, 16).double()
    (far,) = torch.autograd.grad(block(x, condition)[0, 0, 0].sum(), x)
    assert far[0, 5, 5].abs().sum() > 0
    (near,) = torch.autograd.grad(block.layers[1](x)[0, 0, 0].sum(), x)
    assert near[0, :3, :3].abs().sum() > 0 and near[0, 3:].abs().sum() == near[0, :, 3:].abs().sum() == 0


@EVERY
def test_a_new_block_changes_nothing_and_every_weight_can_learn(name):
    block = BLOCKS[name]()
    x, condition = torch.randn(2, 5, 7, 16), torch.randn(2, 16)
    assert torch.equal(block(x, condition), x)
    awake(block)(x.double(), condition.double()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    half = block.bfloat16()(x.bfloat16(), condition.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@EVERY
def test_a_tiny_denoiser_learns(name):
    """Flow matching on maps of one class each: the loss falls by more than half."""
    torch.manual_seed(0)
    block, label = BLOCKS[name](), nn.Embedding(4, 16)
    into, out = nn.Linear(3, 16), nn.Linear(16, 3)
    model = nn.ModuleList([block, label, into, out])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pictures = torch.randn(4, 1, 1, 3).expand(4, 6, 6, 3)
    losses = []
    for _ in range(80):
        kind, noise, s = torch.randint(4, (16,)), torch.randn(16, 6, 6, 3), torch.rand(16, 1, 1, 1)
        x = (1 - s) * pictures[kind] + s * noise
        with load_balance(block) if name == "moh" else torch.enable_grad() as balance:
            guess = out(block(into(x), label(kind) + s.view(16, 1)))
        loss = (guess - (noise - pictures[kind])).square().mean()
        losses.append(loss.item())
        (loss + 0.01 * balance() if name == "moh" else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_bad_conditions():
    block = AdaptiveBlock(8, [nn.Identity()], cond_dim=5)
    for condition in (torch.zeros(2, 8), torch.zeros(1, 5), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"the condition must be \[2, 5\]"):
            block(torch.zeros(2, 3, 3, 8), condition)
    with pytest.raises(ValueError, match="routed_heads"):
        MoHDiTBlock(16, num_heads=4, shared_heads=2, routed_heads=3)
    with pytest.raises(ValueError, match="kind"):
        LaMambaBlock(16, num_heads=4, kind="mamba")
