"""FastVGGT: token merging in a model built like VGGT, against global attention written out from the paper."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_attn import Neighborhood, attach
from vision_attn.hosts import AttachError
from vision_attn.merging import TokenMerge
from vision_attn.retrofit import attach as attach_vision

PATCH, WIDTH, HEADS, SPECIAL = 4, 16, 2, 5


class Rotary(nn.Module):
    """Rotary positions on two axes, half of the head each."""

    def forward(self, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        out = []
        for part, place in zip(x.chunk(2, -1), pos.unbind(-1), strict=True):
            half = part.shape[-1] // 2
            angle = place[:, None, :, None] * 100.0 ** -(torch.arange(half, dtype=x.dtype) / half)
            a, b = part[..., :half], part[..., half:]
            out += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
        return torch.cat(out, -1)


class Attention(nn.Module):
    def __init__(self, rope: nn.Module | None) -> None:
        super().__init__()
        self.num_heads, self.fused_attn, self.rope = HEADS, True, rope
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, rope: nn.Module | None) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Attention(rope), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), pos=pos)
        return x + self.mlp(self.norm2(x))


class Backbone(nn.Module):
    """A small DINO: patches, and a block that must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.blocks = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.ModuleList([Block(None)])

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x_norm_patchtokens": self.blocks[0](self.proj(images).flatten(2).transpose(1, 2))}


class Aggregator(nn.Module):
    """Attention inside of frames and over all frames in turns; a camera token and registers before every frame."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patch_embed, self.patch_size, self.patch_start_idx = Backbone(), PATCH, SPECIAL
        self.special = nn.Parameter(torch.randn(2, SPECIAL, WIDTH))  # of the first frame, and of the others
        rope = Rotary()
        self.frame_blocks = nn.ModuleList(Block(rope) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(rope) for _ in range(depth))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        batch, frames, _, height, width = images.shape
        patches = self.patch_embed(images.flatten(0, 1))["x_norm_patchtokens"]
        first = [self.special[min(frame, 1)] for frame in range(frames)]
        x = torch.cat([torch.stack(first).repeat(batch, 1, 1), patches], 1)
        y, z = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
        pos = torch.stack([y.flatten(), z.flatten()], -1) + 1
        pos = torch.cat([torch.zeros(SPECIAL, 2), pos]).to(x.dtype).expand(len(x), -1, -1)
        out = []
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame_block(x, pos=pos)
            whole = x.unflatten(0, (batch, frames)).flatten(1, 2)
            whole = global_block(whole, pos=pos.unflatten(0, (batch, frames)).flatten(1, 2))
            x = whole.unflatten(1, (frames, -1)).flatten(0, 1)
            out.append(x.unflatten(0, (batch, frames)))
        return out


class VGGT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aggregator, self.camera_head = Aggregator(), nn.ModuleDict({"trunk": Block(None)})

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.aggregator(images)[-1]
        return tokens, self.camera_head["trunk"](tokens[:, :, 0])


@pytest.fixture
def model() -> VGGT:
    torch.manual_seed(0)
    return VGGT().eval().double().requires_grad_(False)


def frames(count: int = 3, height: int = 5, width: int = 6, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, count, 3, height * PATCH, width * PATCH, generator=generator).double()


def roles(count: int, height: int, width: int) -> tuple[list[int], list[int], list[int]]:
    """Destinations, protected tokens and sources of FastVGGT, token by token."""
    length, destinations = SPECIAL + height * width, []
    generator = torch.Generator().manual_seed(33)
    for frame in range(count):
        if frame == 0:
            destinations += range(length)
            continue
        destinations += range(frame * length, frame * length + SPECIAL)
        picks = torch.randint(4, (height // 2, width // 2), generator=generator)
        for y in range(height // 2):
            for x in range(width // 2):
                pick = int(picks[y, x])
                row, column = 2 * y + pick // 2, 2 * x + pick % 2
                destinations.append(frame * length + SPECIAL + row * width + column)
    n = count * length
    protected = [i * (n // int(0.1 * n)) for i in range(int(0.1 * n))]
    sources = [t for t in range(n) if t not in destinations and t not in protected]
    return destinations, protected, sources


def merged_attention(x, q, k, v, grid: tuple[int, int, int], ratio: float, strict: bool):
    """One sample `[heads, n, head_dim]`, by loops over tokens; `x` `[n, width]` says who is alike."""
    destinations, protected, sources = roles(*grid)
    n, unit = len(x), x / x.norm(dim=-1, keepdim=True)
    best = {s: max(destinations, key=lambda t, s=s: float(unit[s] @ unit[t])) for s in sources}
    gone = sorted(sources, key=lambda s: -float(unit[s] @ unit[best[s]]))[: int(ratio * n)]
    groups = {t: [t] for t in range(n) if t not in gone}
    for s in gone:
        groups[best[s]].append(s)
    where = {t: place for place, group in enumerate(groups.values()) for t in group}
    short = list(groups.values())
    if strict:
        for t in protected:
            if t in destinations:
                where[t] = len(short)
                short.append([t])
    q, k, v = (torch.stack([t[:, group].mean(1) for group in short], 1) for t in (q, k, v))
    out = ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return torch.stack([out[:, where[t]] for t in range(n)], 1), len(short)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("ratio", [0.9, 0.2])
def test_a_model_like_vggt_merges_over_all_frames(model, monkeypatch, strict: bool, ratio: float):
    images, grid = frames(), (3, 5, 6)
    dense = model(images)
    with torch.no_grad(), attach_vision(model, TokenMerge("vggt", ratio=ratio, strict=strict)) as run:
        tokens, camera = model(images)
    tower = run.report.towers[0]
    assert tower.modules == [f"aggregator.global_blocks.{i}.attn" for i in range(2)] and tower.prefix == SPECIAL
    assert tower.grids == [[3, 5, 6]]
    lengths, inputs, plain = [], [], F.scaled_dot_product_attention
    for block in model.aggregator.global_blocks:
        block.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    def attention(q, k, v):
        if q.shape[2] != 3 * 35:  # inside of a frame, in the backbone, in the head
            return plain(q, k, v)
        found = [merged_attention(inputs[-1][i], q[i], k[i], v[i], grid, ratio, strict) for i in range(len(q))]
        lengths.append(found[0][1])
        return torch.stack([out for out, _ in found])

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    wanted = model(images)
    torch.testing.assert_close(tokens, wanted[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(camera, wanted[1], rtol=1e-6, atol=1e-7)
    assert [layer[1] for layer in tower.tokens] == lengths and (tokens - dense[0]).abs().max() > 1e-3


def test_what_is_attached_follows_the_images_and_leaves_no_trace(model):
    method = TokenMerge("vggt")
    before = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    dense = model(frames())
    with attach_vision(model, method) as run:
        for shape in ((3, 5, 6), (2, 4, 7), (1, 5, 5)):
            one = model(frames(*shape, batch=1))[0]
            both = model(frames(*shape, batch=2))[0]
            torch.testing.assert_close(both[:1], one)
            assert run.report.towers[0].grids == [list(shape)]
            assert run.report.towers[0].tokens[0][0] == shape[0] * (SPECIAL + shape[1] * shape[2])
        with pytest.raises(AttachError, match=r"\[batch, frames, channels, height, width\]"):
            model(frames()[0])
        assert not run.report.warnings
        with pytest.raises(ValueError, match="already has something attached"):
            attach_vision(model, method)
    assert [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()] == before
    assert torch.equal(model(frames())[0], dense[0])
    with attach_vision(model, method, dense_layers=[0]) as run:
        model(frames())
    assert run.report.towers[0].dense == ["aggregator.global_blocks.0.attn"]
    nothing = TokenMerge("vggt", ratio=0.0, strict=False)
    with attach_vision(model, nothing):
        torch.testing.assert_close(model(frames())[0], dense[0])


def test_the_flops_are_counted_and_the_real_share_is_reported(model):
    with attach_vision(model, TokenMerge("vggt")) as run:
        report = run.measure(frames(12, 8, 8), repeats=1)
    before, left, after = report.towers[0].tokens[0]
    destinations, protected, sources = roles(12, 8, 8)
    assert before == after == 12 * 69 and left == before - len(sources)
    assert 0.3 < left / before < 0.5 and report.flops["after"] < report.flops["before"]


def test_the_package_of_the_model_is_known_by_name(model):
    class Named(VGGT):
        pass

    Named.__module__ = "vggt.models.vggt"
    net = Named().eval()
    with torch.no_grad(), attach(net, TokenMerge("vggt")) as run:
        net(frames().float())
    assert run.report.towers[0].calls["sparse"] == 2
    with torch.no_grad(), attach(model, TokenMerge("vggt")) as run:  # as is what is built like it, in any package
        model(frames())
    assert run.report.towers[0].calls["sparse"] == 2


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="partition 'tome' is for one image, and Aggregator sees many frames"):
        attach_vision(model, TokenMerge())
    with pytest.raises(ValueError, match="use TokenMerge"):
        attach_vision(model, Neighborhood(window=3))
    with attach_vision(model, TokenMerge("vggt"), grid=(3, 4, 4)), pytest.raises(AttachError, match="leave grid out"):
        model(frames())
    with (
        attach_vision(model, TokenMerge("vggt", dst_frames=(7,))),
        pytest.raises(ValueError, match="there are 3 frames"),
    ):
        model(frames())


def test_half_precision(model):
    model = model.to(torch.bfloat16)
    with attach_vision(model, TokenMerge("vggt")):
        assert model(frames().to(torch.bfloat16))[0].isfinite().all()
