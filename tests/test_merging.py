"""Token merging, against loops that follow the papers token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

timm = pytest.importorskip("timm")
from vision_towers import SEQUENCES, SWINS, TINY, Model, clip  # noqa: E402

from vision_attn import Neighborhood, attach  # noqa: E402
from vision_attn.hosts import AttachError  # noqa: E402
from vision_attn.merging import TokenMerge  # noqa: E402
from vision_attn.retrofit.merge_maps import alternate, frame_roles, grid_roles, towards  # noqa: E402

TOWERS = {model.name: model for model in SEQUENCES}
TOME = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_tiny_patch16_224 4x7",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "residual post norm",
    "open_clip ViT",
    "open_clip timm tower",
]
AROUND = [*TOME, "vit_small_patch16_18x2_224", "open_clip ViT qk norm"]
INSIDE = [*AROUND, "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "parallel scaling block", "differential block"]


pytestmark = pytest.mark.usefixtures("inference")


def small(**options) -> torch.nn.Module:
    return Model("vit_tiny_patch16_224", {**TINY, "depth": 3, **options}).build()


# The maps


def tome_by_loops(metric: torch.Tensor, r: int, prefix: int) -> list[list[int]]:
    """For one sample, the groups of tokens in the order they come out."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    tokens = range(len(metric))
    even, odd = [[t for t in tokens if t % 2 == side and t >= prefix] for side in (0, 1)]
    best = {a: max(odd, key=lambda b, a=a: float(unit[a] @ unit[b])) for a in even}
    ranked = sorted(even, key=lambda a: -float(unit[a] @ unit[best[a]]))
    stay = sorted(ranked[r:]) if prefix else ranked[r:]
    groups = {b: [b] for b in odd}
    for a in ranked[:r]:
        groups[best[a]].append(a)
    return [[t] for t in range(prefix)] + [[a] for a in stay] + [groups[b] for b in odd]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 5), st.integers(2, 19), st.integers(0, 9), st.integers(0, 99))
def test_alternate_merges_what_the_paper_merges(prefix, patches, r, seed):
    torch.manual_seed(seed)
    r = min(r, patches // 2)
    metric = torch.randn(2, prefix + patches, 6, dtype=torch.double)
    x, size = torch.randn(2, prefix + patches, 3).double(), torch.randint(1, 5, (2, prefix + patches)).double()
    merge = alternate(metric, r, prefix)
    out, sizes, back = merge.merge(x, size), merge.sizes(size), merge.unmerge(merge.merge(x, size))
    assert merge.length == out.shape[1] == prefix + patches - r
    for b in range(2):
        for place, group in enumerate(tome_by_loops(metric[b], r, prefix)):
            mean = sum(size[b, t] * x[b, t] for t in group) / sum(size[b, t] for t in group)
            torch.testing.assert_close(out[b, place], mean, rtol=1e-5, atol=1e-6)
            assert sizes[b, place] == sum(size[b, t] for t in group)
            assert all(torch.equal(back[b, t], out[b, place]) for t in group)


def test_grid_roles_take_one_token_of_every_whole_cell():
    for grid, cell, prefix in (((5, 7), 2, 3), ((4, 4), (1, 4), 0), ((6, 6), 3, 1)):
        for seed in (None, 33, 5):
            method = TokenMerge("grid", cell=cell, seed=seed)
            roles = grid_roles(grid, prefix, method, "cpu")
            (rows, columns), (height, width) = method.cell, grid
            cells = [((t - prefix) // width // rows, (t - prefix) % width // columns) for t in roles.targets.tolist()]
            assert cells == [(y, x) for y in range(height // rows) for x in range(width // columns)]
            assert roles.kept.tolist() == list(range(prefix)) and roles.copies is None
            everyone = sorted(roles.kept.tolist() + roles.targets.tolist() + roles.sources.tolist())
            assert everyone == list(range(prefix + height * width))
            again = grid_roles(grid, prefix, method, "cpu")
            assert torch.equal(roles.targets, again.targets)
    first = grid_roles((4, 4), 0, TokenMerge("grid", seed=None), "cpu").targets.tolist()
    assert first == [0, 2, 8, 10]
    assert (
        len({tuple(grid_roles((8, 8), 0, TokenMerge("grid", seed=s), "cpu").targets.tolist()) for s in range(5)}) == 5
    )


@pytest.mark.parametrize("strict", [False, True])
def test_frame_roles_are_those_of_fastvggt(strict):
    method = TokenMerge("vggt", num_special=5, strict=strict)
    frames, height, width = grid = (4, 6, 6)
    length, tokens = 5 + 36, 4 * 41
    roles = frame_roles(grid, 5, method, "cpu")
    targets = set(roles.targets.tolist())
    assert set(range(length)) <= targets  # the first frame
    for frame in range(1, frames):
        assert {frame * length + t for t in range(5)} <= targets
        patches = [t - frame * length - 5 for t in targets if frame * length + 5 <= t < (frame + 1) * length]
        assert len({(p // width // 2, p % width // 2) for p in patches}) == len(patches) == 9
    count = int(0.1 * tokens)
    protected = [i * (tokens // count) for i in range(count)]
    assert not set(protected) & set(roles.sources.tolist())
    assert roles.kept.tolist() == [t for t in protected if t not in targets]
    assert (roles.copies is not None) == strict
    if strict:
        assert roles.copies.tolist() == [t for t in protected if t in targets]
    assert sorted({*roles.sources.tolist(), *targets, *protected}) == list(range(tokens))


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("strict", [False, True])
def test_towards_is_a_plain_mean_with_the_target(share, strict):
    torch.manual_seed(0)
    method = TokenMerge("vggt", ratio=share, num_special=1, strict=strict)
    roles = frame_roles((2, 4, 5), 1, method, "cpu")
    x = torch.randn(3, 42, 4, dtype=torch.double)
    merge = towards(x, roles, share)
    merging = min(int(share * 42), len(roles.sources))
    copies = [] if roles.copies is None else roles.copies.tolist()
    assert merge.length == 42 - merging + len(copies)
    out, back = merge.merge(x), merge.unmerge(merge.merge(x))
    unit = x / x.norm(dim=-1, keepdim=True)
    for b in range(3):
        targets, sources = roles.targets.tolist(), roles.sources.tolist()
        best = {s: max(targets, key=lambda t, s=s: float(unit[b, s] @ unit[b, t])) for s in sources}
        gone = sorted(sources, key=lambda s: -float(unit[b, s] @ unit[b, best[s]]))[:merging]
        groups = {t: [t] + [s for s in gone if best[s] == t] for t in targets}
        for t in range(42):
            group = groups.get(best[t] if t in gone else t, [t])
            mean = x[b, t] if t in copies else x[b, group].mean(0)
            torch.testing.assert_close(back[b, t], mean, rtol=1e-5, atol=1e-6)
        wanted = [x[b, g].mean(0) for g in groups.values()]
        wanted += [x[b, t] for t in [*roles.kept.tolist(), *[s for s in sources if s not in gone], *copies]]
        key = lambda rows: sorted(map(tuple, torch.stack(list(rows)).mul(1e4).round().tolist()))  # noqa: E731
        assert key(out[b]) == key(wanted)


def test_many_frames_leave_about_a_third():
    """0.9 is asked for, but targets and protected tokens cannot merge."""
    roles = frame_roles((40, 10, 10), 5, TokenMerge("vggt", num_special=5), "cpu")
    left = 1 - len(roles.sources) / (40 * 105)
    assert 0.3 < left < 0.45


# In a model


class Tome:
    """A timm ViT with token merging written out in its own words: every key is repeated as often as it counts."""

    def __init__(self, net: torch.nn.Module, r: int, prefix: int) -> None:
        self.net, self.r, self.prefix = net, r, prefix

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(sample[None]) for sample in x])

    def one(self, x: torch.Tensor) -> torch.Tensor:
        net = self.net
        x = net.norm_pre(net._pos_embed(net.patch_embed(x)))
        groups = [[t] for t in range(x.shape[1])]
        for block in net.blocks:
            attn, y = block.attn, block.norm1(x)
            qkv = attn.qkv(y).reshape(x.shape[1], 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            q, (k, v) = attn.q_norm(qkv[0]), (attn.k_norm(qkv[1]), qkv[2])
            times = torch.tensor([len(g) for g in groups])
            keys, values = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
            out = ((q @ keys.mT) * q.shape[-1] ** -0.5).softmax(-1) @ values
            x = x + block.ls1(attn.proj(out.transpose(0, 1).flatten(1)[None]))
            parts = tome_by_loops(k.mean(0), self.r, self.prefix)
            means = [sum(len(groups[t]) * x[0, t] for t in p) / sum(len(groups[t]) for t in p) for p in parts]
            groups = [sum((groups[t] for t in p), []) for p in parts]
            x = torch.stack(means)[None]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        whole = x.new_zeros(1, sum(map(len, groups)), x.shape[2])
        for place, group in enumerate(groups):
            whole[0, group] = x[0, place]
        return net.forward_head(net.norm(whole))


@pytest.mark.parametrize("name", TOME[:6])
def test_tome_equals_the_model_written_out(name):
    model = TOWERS[name]
    net, images = model.build().double(), model.images().double()
    dense = net(images)
    with attach(net, TokenMerge(ratio=4)) as run:
        merged = net(images)
        features = net.forward_features(images)
    tokens = model.prefix + math.prod(model.grid)
    assert run.report.towers[0].tokens == [[tokens] * 2 + [tokens - 4], [tokens - 4] * 2 + [tokens - 8]]
    torch.testing.assert_close(merged, Tome(net, 4, model.prefix)(images), rtol=1e-5, atol=1e-6)
    assert features.shape[1] == tokens and (merged - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", TOME)
def test_nothing_merges_at_ratio_0(name):
    model = TOWERS[name]
    net, images = model.build().double(), model.images().double()
    dense = model.run(net, images)
    for method in (TokenMerge(ratio=0), TokenMerge("grid", ratio=0), TokenMerge("vggt", ratio=0, dst_frames=())):
        with attach(net, method, strict=True) as run:
            torch.testing.assert_close(model.run(net, images), dense, rtol=1e-9, atol=1e-9)
        assert {n for layer in run.report.towers[0].tokens for n in layer} == {model.prefix + math.prod(model.grid)}


SAME = "vit_base_patch16_siglip_gap_224"


@pytest.mark.parametrize(("partition", "name"), [*(("tome", name) for name in TOME), ("grid", SAME), ("vggt", SAME)])
def test_alike_tokens_merge_without_a_loss(name, partition):
    """Where tokens are equal in pairs, merging is exact: keys count as often as tokens they stand for."""
    model = TOWERS[name]
    net = model.build().double()
    visual = getattr(net, "visual", net)
    visual = getattr(visual, "trunk", visual)
    position = visual.pos_embed if hasattr(visual, "pos_embed") else visual.positional_embedding
    position.data.zero_()
    images = model.images()[..., :1, :1].double().expand(-1, -1, *model.images().shape[2:])  # one colour
    dense = model.run(net, images)
    patches = math.prod(model.grid)
    if partition == "tome":
        method = TokenMerge(ratio=patches // 2)
    else:
        method = TokenMerge(
            partition, ratio=0.5, **({"dst_frames": (), "proportional": True} if partition == "vggt" else {})
        )
    with attach(net, method) as run:
        torch.testing.assert_close(model.run(net, images), dense, rtol=1e-5, atol=1e-6)
    assert run.report.towers[0].flops["after"] < run.report.towers[0].flops["before"]
    if partition == "tome":
        with attach(net, TokenMerge(ratio=patches // 2, proportional=False)):
            # Without a tower's other tokens every key is equal, and counts do not matter.
            assert torch.allclose(model.run(net, images), dense, rtol=1e-5, atol=1e-6) == (model.prefix == 0)


@pytest.mark.parametrize("name", AROUND)
def test_grid_merges_around_attention(name, monkeypatch):
    """Averages in, copies out, with the map that the layer's own input gives."""
    model = TOWERS[name]
    net, images = model.build().double(), model.images().double()
    method = TokenMerge("grid", ratio=0.6)
    with attach(net, method) as run:
        merged = model.run(net, images)
    roles = grid_roles(model.grid, model.prefix, method, "cpu")
    layers = [m for n, m in net.named_modules() if n in run.report.towers[0].modules]
    handles = []
    for layer in layers:

        def around(module, args, kwargs):
            module.merge_ = towards(args[0], roles, 0.6)
            x = module.merge_.merge(args[0])
            return (x,) * len(args), kwargs

        def back(module, args, kwargs, out):
            first = out[0] if isinstance(out, tuple) else out
            first = module.merge_.unmerge(first)
            return (first, None) if isinstance(out, tuple) else first

        handles += [layer.register_forward_pre_hook(around, with_kwargs=True)]
        handles += [layer.register_forward_hook(back, with_kwargs=True)]
    torch.testing.assert_close(merged, model.run(net, images), rtol=1e-6, atol=1e-7)
    left = run.report.towers[0].tokens[0]
    total = model.prefix + math.prod(model.grid)
    assert left == [total, total - min(int(0.6 * total), len(roles.sources)), total]


@pytest.mark.parametrize("name", INSIDE)
def test_vggt_merges_queries_keys_and_values(name, monkeypatch):
    model = TOWERS[name]
    net, images = model.build().double(), model.images().double()
    method = TokenMerge("vggt", ratio=0.4, dst_frames=(), protect=0.2)
    dense = model.run(net, images)
    with attach(net, method) as run:
        merged = model.run(net, images)
    assert (merged - dense).abs().max() > 1e-4
    roles = frame_roles((1, *model.grid), model.prefix, method, "cpu")
    given, plain = [], F.scaled_dot_product_attention

    def attention(q, k, v, *args, **kwargs):
        merge, heads = towards(given[-1], roles, 0.4), q.shape[1]
        q, k, v = (torch.stack([merge.merge(t[:, h]) for h in range(heads)], 1) for t in (q, k, v))
        weights = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)
        return torch.stack([merge.unmerge((weights @ v)[:, h]) for h in range(heads)], 1)

    for name, module in net.named_modules():
        if name in run.report.towers[0].modules:
            module.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    torch.testing.assert_close(merged, model.run(net, images), rtol=1e-6, atol=1e-7)
    assert plain is not F.scaled_dot_product_attention


def test_frames_of_any_module():
    """What FastVGGT is: global attention over the tokens of all frames; frame attention stays as it is."""
    from timm.models.vision_transformer import Attention

    from vision_attn.retrofit import attach

    class Aggregator(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frame, self.all = Attention(16, 2), Attention(16, 2)

        def forward(self, x):  # [batch, frames, tokens, channels]
            x = x + self.frame(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return x + self.all(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

    torch.manual_seed(0)
    net, x = Aggregator().eval(), torch.randn(2, 3, 5 + 24, 16)
    dense = net(x)
    with attach(net, TokenMerge("vggt", num_special=5), grid=(3, 4, 6), dense_layers=[0], strict=True) as run:
        merged = net(x)
    tower = run.report.towers[0]
    assert tower.modules == ["all"] and tower.dense == ["frame"] and tower.tokens[0][1] < 87
    assert (merged - dense).abs().max() > 1e-4 and torch.equal(net(x), dense)
    with (
        attach(net, TokenMerge("vggt", num_special=5), grid=(3, 4, 6)),
        pytest.warns(UserWarning, match="frame was left dense: it was called with 29"),
    ):
        torch.testing.assert_close(net(x), merged)
    beyond = TokenMerge("vggt", num_special=5, dst_frames=(3,))
    with attach(net, beyond, grid=(3, 4, 6), dense_layers=1), pytest.raises(ValueError, match="there are 3 frames"):
        net(x)
    with pytest.raises(ValueError, match="partition 'tome' needs a class that is known, and Aggregator is not"):
        attach(net, TokenMerge(), grid=(3, 4, 6))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "open_clip ViT"])
@pytest.mark.parametrize("partition", ["tome", "grid", "vggt"])
def test_the_counts_are_those_of_the_operators(name, partition, monkeypatch):
    """FLOPs that torch counts while it runs, against those that the report works out."""
    model = TOWERS[name]
    net, images = model.build(), model.images()
    method = TokenMerge(partition, **({"dst_frames": ()} if partition == "vggt" else {}))
    with attach(net, method) as run:
        inputs = (images, None) if hasattr(net, "encode_image") else (images,)
        report = run.measure(*inputs, repeats=1)
        monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net(*inputs)
    assert counter.get_total_flops() == report.flops["after"] < report.flops["before"]
    assert min(report.seconds.values()) > 0 and " -> " in str(report)


def test_schedules():
    net, x = small(), torch.randn(1, 3, 80, 80)
    for ratio, tokens in (
        (3, [23, 20, 17]),
        ((3, -1.0), [20, 17, 17]),
        (0.25, [20, 16, 13]),  # of 25, 19, 15 patches
        (99, [14, 8, 5]),  # never more than half
    ):
        with attach(net, TokenMerge(ratio=ratio)) as run:
            net(x)
        assert [t[2] for t in run.report.towers[0].tokens] == tokens, ratio
    with attach(net, TokenMerge(ratio=3), dense_layers=[1]) as run:
        net(x)
    assert [t[2] for t in run.report.towers[0].tokens] == [23, 23, 20] and run.report.towers[0].dense == ["blocks.1"]


@pytest.mark.parametrize(
    ("partition", "name"),
    [(p, name) for p, names in (("tome", TOME), ("grid", AROUND), ("vggt", INSIDE)) for name in names],
)
def test_detach_leaves_no_trace(name, partition):
    from test_retrofit import trace

    model = TOWERS[name]
    net, images = model.build(), model.images()
    dense, before = model.run(net, images), trace(net)
    method = TokenMerge(partition, **({"dst_frames": ()} if partition == "vggt" else {}))
    with attach(net, method):
        merged = model.run(net, images)
        assert list(net.state_dict()) == before[0]
        torch.testing.assert_close(model.run(net, images[:1]), merged[:1], rtol=1e-4, atol=1e-4)
    assert trace(net) == before and torch.equal(model.run(net, images), dense)
    with pytest.raises(RuntimeError), attach(net, method):
        model.run(net, images[:, :2])
    assert trace(net) == before and torch.equal(model.run(net, images), dense)


def test_a_call_that_failed_does_not_disturb_the_next():
    net, x = small(), torch.randn(2, 3, 80, 80)
    with attach(net, TokenMerge(ratio=4)):
        merged = net(x)
        hook = net.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net(x)
        hook.remove()
        assert torch.equal(net(x), merged)


def test_gradients_and_training():
    net, x = small(drop_path_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1).train(), torch.randn(2, 3, 80, 80)
    for method in (TokenMerge(ratio=4), TokenMerge("grid"), TokenMerge("vggt", dst_frames=())):
        net.zero_grad()
        with torch.enable_grad(), attach(net, method):
            net(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.set_grad_checkpointing(True)
    with (
        torch.enable_grad(),
        attach(net, TokenMerge(ratio=4)),
        pytest.raises(AttachError, match="set_grad_checkpointing"),
    ):
        net(x)
    with attach(net.eval(), TokenMerge(ratio=4)):
        net(x)  # nothing runs again
    plain = []
    for enable in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(enable)
        with torch.enable_grad(), attach(net, TokenMerge("grid")):
            net(x).square().sum().backward()
        plain.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(*plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("partition", ["tome", "grid", "vggt"])
def test_half_precision_is_finite(dtype, partition):
    net, x = small().to(dtype), torch.randn(2, 3, 80, 80).to(dtype)
    with attach(net, TokenMerge(partition, **({"dst_frames": ()} if partition == "vggt" else {}))):
        out = net(x)
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("partition", ["tome", "grid", pytest.param("vggt", marks=pytest.mark.slow)])
def test_compiled_models_merge(partition):
    net, x = small(), torch.randn(2, 3, 80, 80)
    method = TokenMerge(partition, **({"dst_frames": ()} if partition == "vggt" else {"ratio": 0.4}))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with attach(compiled, method) as run:
        first, again = compiled(x), compiled(x)
        merged = net(x)
        assert run.report.towers[0].tokens[0][0] == 26
    for out in (first, again):
        torch.testing.assert_close(out, merged, rtol=1e-4, atol=1e-5)
    assert (merged - net(x)).abs().max() > 1e-4
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


def test_what_is_refused_says_why():
    net, x = small(), torch.randn(1, 3, 80, 80)
    for model, words in (
        (SWINS[0], "its windows need every token"),
        (TOWERS["beit_base_patch16_224"], "adds a bias for every pair of places"),
        (TOWERS["eva02_tiny_patch14_224"], "use partition 'grid', or 'vggt' with rotary positions"),
        (TOWERS["parallel scaling block"], "attention and MLP as one"),
    ):
        with pytest.raises(ValueError, match=words):
            attach(model.build(), TokenMerge())
    with attach(net, TokenMerge(ratio=2)):
        with pytest.raises(AttachError, match="between layers merged tokens are no map"):
            net.forward_intermediates(x)
        with pytest.raises(AttachError, match="a mask is about places"):
            net(x, attn_mask=torch.ones(26, 26, dtype=torch.bool))
    with attach(net, TokenMerge("grid")) as run:
        with pytest.raises(AttachError, match="a mask is about places"):
            net(x, is_causal=True)
        with pytest.raises(AttachError, match="was called with 20 tokens; the grid and what is before it make 26"):
            net(x)
            net.blocks(torch.randn(1, 20, 24))
        assert net.forward_intermediates(x, intermediates_only=True)[0].shape == (1, 24, 5, 5)
    run.detach()
    eva = TOWERS["eva02_tiny_patch14_224"]
    with attach(eva.build(), TokenMerge("grid")) as run, pytest.raises(AttachError, match="use partition 'vggt'"):
        run._model(eva.images())
    with pytest.raises(ValueError, match="unknown backend 'cpu'; allowed: None"):
        attach(net, TokenMerge(), backend="cpu")
    with (
        attach(net, Neighborhood(window=3)),
        pytest.raises(ValueError, match="^VisionTransformer already has"),
    ):
        attach(net, TokenMerge())
    batch_second = torch.nn.MultiheadAttention(24, 2)
    clip_tower = TOWERS["open_clip ViT"].build()
    clip_tower.visual.transformer.resblocks[0].attn = batch_second
    with pytest.raises(ValueError, match="its blocks take the batch second"):
        attach(clip_tower, TokenMerge())


def test_one_method_replaces_another():
    net, x = small(), torch.randn(1, 3, 80, 80)
    dense, outputs = net(x), []
    for method in (TokenMerge(ratio=2), Neighborhood(window=3), TokenMerge("grid"), TokenMerge(ratio=2)):
        run = attach(net, method, replace=True)
        outputs.append(net(x))
        assert run.report.towers[0].cls == "VisionTransformer"
    assert torch.equal(outputs[0], outputs[3]) and len({tuple(out[0].tolist()) for out in outputs}) == 3
    run.detach()
    assert torch.equal(net(x), dense)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(partition="random"), "partition must be one of tome, grid, vggt"),
        (dict(ratio=0.7), "ratio of partition 'tome' must be an int"),
        (dict(ratio=-1), "ratio"),
        (dict(ratio=(8, 2)), "inflect from -1 to 1"),
        (dict(ratio=True), "ratio"),
        (dict(partition="grid", ratio=8), "a share from 0 to 1"),
        (dict(partition="vggt", protect=1.0), "protect"),
        (dict(partition="grid", cell=0), "cell"),
        (dict(partition="grid", cell=(2, 2, 2)), "cell"),
        (dict(partition="grid", seed=-1), "seed"),
        (dict(partition="vggt", dst_frames=0), "dst_frames"),
        (dict(partition="vggt", num_special=1.5), "num_special"),
        (dict(strict=1), "strict"),
        (dict(partition="grid", protect=0.1), "partition 'grid' has no protect"),
        (dict(partition="tome", cell=3), "partition 'tome' has no cell"),
        (dict(partition="grid", proportional=True), "partition 'grid' has no proportional"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        TokenMerge(**options)


def test_the_text_tower_stays_as_it_is():
    net = clip(layers=2, width=24, head_width=12, patch_size=16, image_size=80)().eval()
    tokens = torch.randint(1, 50, (2, 8))
    before = net.encode_text(tokens)
    for method in (TokenMerge(ratio=2), TokenMerge("grid"), Neighborhood(window=3)):
        with attach(net, method) as run:
            assert torch.equal(net.encode_text(tokens), before)
            assert all(name.startswith("visual.") for name in run.report.towers[0].modules)
