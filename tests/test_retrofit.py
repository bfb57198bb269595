"""attach() on vision towers, against an oracle that knows nothing of it."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")
from timm.models import vision_transformer as vit  # noqa: E402
from vision_towers import SEQUENCES, TINY, TOWERS, Model  # noqa: E402

from vision_attn import (  # noqa: E402
    Circle,
    Dense,
    LengthDecay,
    Neighborhood,
    PerHead,
    Radial,
    Streaming,
    Window,
    attach,
)
from vision_attn.hosts import AttachError  # noqa: E402

EVERY = pytest.mark.parametrize("model", TOWERS, ids=repr)
SEQUENCE = pytest.mark.parametrize("model", SEQUENCES, ids=repr)
LOCAL = Neighborhood(window=3)


pytestmark = pytest.mark.usefixtures("inference")


def window_mask(grid: tuple[int, int], prefix: int, window: int) -> torch.Tensor:
    """Who sees whom: `window` places around a token on each axis, pushed inward at the borders; the tokens before the
    grid and everyone."""
    places = list(itertools.product(*map(range, grid)))
    rows = []
    for place in places:
        starts = [min(max(x - window // 2, 0), n - window) for x, n in zip(place, grid, strict=True)]
        seen = [all(s <= y < s + window for s, y in zip(starts, other, strict=True)) for other in places]
        rows.append([True] * prefix + seen)
    return torch.tensor([[True] * (prefix + len(places))] * prefix + rows)


class Oracle:
    """Hides, for everybody who calls scaled_dot_product_attention on that many tokens, what the mask hides."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch, window: int = 3) -> None:
        self.mask, self.plain, self.calls = (
            window_mask(model.grid, model.prefix, window),
            F.scaled_dot_product_attention,
            0,
        )
        monkeypatch.setattr(F, "scaled_dot_product_attention", self)
        monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        if query.shape[-2] == key.shape[-2] == len(self.mask):
            self.calls += 1
            hidden = torch.zeros(self.mask.shape, dtype=query.dtype).masked_fill(~self.mask, -math.inf)
            if attn_mask is not None:
                given = attn_mask
                if given.dtype == torch.bool:
                    given = torch.zeros(given.shape, dtype=query.dtype).masked_fill(~given, -math.inf)
                hidden = hidden + given
            attn_mask = hidden
        return self.plain(query, key, value, attn_mask=attn_mask, **options)


@SEQUENCE
def test_a_window_equals_the_masked_model(model: Model, monkeypatch):
    net, images = model.build().double(), model.images().double()
    dense = model.run(net, images)
    with attach(net, LOCAL, strict=True) as run:
        sparse = model.run(net, images)
    report = run.report.towers[0]
    kind = "masked" if model.biased else "sparse"
    assert report.calls == {"sparse": 0, "masked": 0, "dense": 0} | {kind: model.calls}
    assert report.grids == [list(model.grid)] and report.prefix == model.prefix and not run.report.warnings
    oracle = Oracle(model, monkeypatch)
    torch.testing.assert_close(sparse, model.run(net, images), rtol=1e-9, atol=1e-9)
    assert oracle.calls == model.calls and (sparse - dense).abs().max() > 1e-4


@SEQUENCE
def test_a_window_as_large_as_the_grid_is_the_model_itself(model: Model):
    net, images = model.build().double(), model.images().double()
    dense = model.run(net, images)
    for pattern in (Dense(), Neighborhood(window=99), Neighborhood(window=99, stride=50)):
        with attach(net, pattern, strict=True):
            torch.testing.assert_close(model.run(net, images), dense, rtol=1e-9, atol=1e-9)


def trace(net: torch.nn.Module) -> list:
    """Everything about a model that could show that something had been attached."""
    shown = [list(net.state_dict())]
    for name, module in net.named_modules():
        hooks = [(k, len(v)) for k, v in vars(module).items() if "hook" in k and hasattr(v, "__len__")]
        shown.append((name, type(module), sorted(vars(module)), hooks, getattr(module, "fused_attn", None)))
    return shown


@EVERY
def test_detach_leaves_no_trace(model: Model):
    net, images = model.build(), model.images()
    dense, before = model.run(net, images), trace(net)
    with attach(net, model.pattern) as run:
        assert list(net.state_dict()) == before[0] and not torch.equal(model.run(net, images), dense)
        attached = trace(net)
        assert [a[3] for a in attached[1:]] == [b[3] for b in before[1:]] and attached != before
    assert trace(net) == before and torch.equal(model.run(net, images), dense)
    run.detach()
    with pytest.raises(RuntimeError, match="boom"), attach(net, model.pattern):
        handle = next(m for m in net.modules() if isinstance(m, torch.nn.Dropout | torch.nn.LayerNorm))
        hook = handle.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
        try:
            model.run(net, images)
        finally:
            hook.remove()
    assert torch.equal(model.run(net, images), dense)
    assert [t[:3] for t in trace(net)[1:]] == [t[:3] for t in before[1:]]


@EVERY
def test_gradients_reach_every_parameter_that_had_one(model: Model):
    net, images = model.build(), model.images(1)
    with torch.enable_grad():
        model.run(net, images).square().mean().backward()
        had = {n for n, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
        with attach(net, model.pattern):
            model.run(net, images).square().mean().backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert set(grads) == had and all(g.isfinite().all() for g in grads.values())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(model: Model, dtype):
    net = model.build().to(dtype)
    with attach(net, model.pattern):
        out = model.run(net, model.images().to(dtype))
    assert out.dtype == dtype and out.isfinite().all()


def small(**options) -> torch.nn.Module:
    return Model("vit_tiny_patch16_224", {**TINY, "depth": 3, **options}).build()


def test_chosen_layers_only():
    net, x = small(), torch.randn(2, 3, 80, 80)
    seen = {}
    for index, block in enumerate(net.blocks):
        block.register_forward_hook(lambda m, i, o, index=index: seen.__setitem__(index, o))
    net(x)
    before = dict(seen)
    with attach(net, LOCAL, dense_layers=[0, 2]) as run:
        net(x)
        assert type(net.blocks[0].attn) is type(net.blocks[2].attn) is timm.layers.Attention
    report = run.report.towers[0]
    assert report.modules == ["blocks.1.attn"] and report.dense == ["blocks.0.attn", "blocks.2.attn"]
    assert torch.equal(before[0], seen[0]) and not torch.equal(before[1], seen[1])
    assert attach(net, LOCAL, dense_layers=2).report.towers[0].modules == ["blocks.2.attn"]


@pytest.mark.parametrize("size", [(48, 112), (112, 48), (16, 96), (80, 80)])
def test_the_grid_follows_the_image(size, monkeypatch):
    net, x = small(dynamic_img_size=True).double(), torch.randn(2, 3, *size).double()
    grid = (size[0] // 16, size[1] // 16)
    with attach(net, Neighborhood(window=(min(3, grid[0]), 3)), strict=True) as run:
        sparse = net(x)
        assert run.report.towers[0].grids == [list(grid)]
        features = net.forward_intermediates(x, intermediates_only=True)[-1]
        assert features.shape[-2:] == grid
    if grid[0] >= 3:
        Oracle(Model("", grid=grid, prefix=1), monkeypatch)
        torch.testing.assert_close(sparse, net(x), rtol=1e-9, atol=1e-9)


def test_samples_of_a_batch_do_not_mix():
    net, x = small(), torch.randn(3, 3, 80, 80)
    with attach(net, LOCAL):
        together = net(x)
        torch.testing.assert_close(together, torch.cat([net(one[None]) for one in x]), rtol=1e-5, atol=1e-6)


def test_unfused_attention_is_intercepted_and_stays_unfused():
    net, x = small(), torch.randn(2, 3, 80, 80)
    with attach(net, LOCAL):
        fused = net(x)
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with attach(net, LOCAL, strict=True):
        torch.testing.assert_close(net(x), fused, rtol=1e-5, atol=1e-6)
        assert not net.blocks[0].attn.fused_attn
    assert not net.blocks[0].attn.fused_attn


@pytest.mark.parametrize("kind", ["bool", "float", "keys"])
def test_masks_of_the_model_are_kept(kind, monkeypatch):
    net, x = small().double(), torch.randn(2, 3, 80, 80).double()
    tokens = 26
    mask = torch.rand(tokens, tokens) > 0.3
    mask.fill_diagonal_(True)
    if kind == "keys":
        mask = mask[:2, None, None]
        mask[..., :3] = True
    elif kind == "float":
        mask = torch.randn(tokens, tokens).double()
    with attach(net, LOCAL, strict=True) as run:
        sparse = net(x, attn_mask=mask)
    assert run.report.towers[0].calls["masked"] == 3
    assert run.report.towers[0].flops["after"] == run.report.towers[0].flops["before"]
    Oracle(Model("", grid=(5, 5), prefix=1), monkeypatch)
    torch.testing.assert_close(sparse, net(x, attn_mask=mask), rtol=1e-9, atol=1e-9)


def test_what_cannot_follow_the_pattern_is_left_dense_with_a_warning():
    net, x = small(), torch.randn(1, 3, 80, 80)
    causal = net(x, is_causal=True)
    with attach(net, LOCAL) as run, pytest.warns(UserWarning, match="blocks.0.attn was left dense: .* causal mask"):
        assert torch.equal(net(x, is_causal=True), causal)
    assert run.report.towers[0].calls == {"sparse": 0, "masked": 0, "dense": 3}
    assert run.report.towers[0].density == [1.0] * 3 and "left dense" in str(run.report)
    with attach(net, LOCAL, strict=True), pytest.raises(AttachError, match="causal mask"):
        net(x, is_causal=True)
    masked = torch.ones(26, 26, dtype=torch.bool)
    with (
        attach(net, Circle(radius=2, pooled=2), strict=True),
        pytest.raises(AttachError, match="does more than hide"),
    ):
        net(x, attn_mask=masked)
    parts = PerHead(((1, LOCAL), (1, LengthDecay(train_frames=1, alpha=0.1))))
    with attach(net, parts, strict=True), pytest.raises(AttachError, match="PerHead does more than hide"):
        net(x, attn_mask=masked)
    dropping = small(attn_drop_rate=0.1, patch_drop_rate=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(dropping, LOCAL):
            dropping(x)  # eval: nothing is dropped
    dropping.train()
    with attach(dropping, LOCAL, strict=True), pytest.raises(AttachError, match="13 tokens, and 1 tokens before"):
        dropping(x)
    with (
        attach(small(attn_drop_rate=0.1).train(), LOCAL, strict=True) as run,
        pytest.raises(AttachError, match="dropout"),
    ):
        run._model(x)


def test_patterns_with_other_parts(monkeypatch):
    net, x = small(), torch.randn(2, 3, 80, 80)
    out = {}
    for pattern in (
        Window(size=3, shift=1),
        Circle(radius=2),
        Streaming(window=5, sink=2),
        PerHead(((1, LOCAL), (1, Dense()))),
    ):
        with attach(net, pattern, strict=True) as run:
            out[pattern] = net(x)
        assert run.report.towers[0].density == [pattern.density((5, 5))] * 3
        mask = F.pad(pattern.mask((5, 5)), (1, 0, 1, 0), value=True)
        torch.testing.assert_close(out[pattern], net(x, attn_mask=mask), rtol=1e-5, atol=1e-6)
    dense = net(x)
    with attach(net, LengthDecay(train_frames=1, alpha=0.1), strict=True) as run:
        assert (net(x) - dense).abs().max() > 1e-3
    assert run.report.towers[0].density == [1.0] * 3
    with attach(net, Neighborhood(window=(7, 3))), pytest.raises(ValueError, match="window"):
        net(x)


def test_checkpointed_blocks_give_the_same_gradients():
    x, grads = torch.randn(1, 3, 80, 80), []
    for enable in (False, True):
        net = small()
        net.set_grad_checkpointing(enable)
        with torch.enable_grad(), attach(net, LOCAL):
            net(x).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(*grads)


def test_a_copy_of_an_attached_model_is_a_model_of_its_own():
    net, x = small(), torch.randn(1, 3, 80, 80)
    dense = net(x)
    with attach(net, LOCAL):
        sparse = net(x)
        twin = copy.deepcopy(net)
        assert torch.equal(twin(x), sparse)
        for p in net.parameters():
            p.mul_(2)
        assert torch.equal(twin(x), sparse)  # its own weights
    assert torch.equal(twin(x), sparse)
    run = attach(twin, Window(size=2), replace=True)
    run.detach()
    assert torch.equal(twin(x), dense)


def test_attaching_twice():
    net, x = small(), torch.randn(1, 3, 80, 80)
    dense = net(x)
    first = attach(net, LOCAL)
    with pytest.raises(ValueError, match="already has something attached; detach"):
        attach(net, Window(size=2))
    with attach(net, Window(size=2), replace=True) as second:
        windows = net(x)
        first.detach()  # has nothing on any more, and must not take off what came after
        assert torch.equal(net(x), windows)
    assert torch.equal(net(x), dense) and "detached" in repr(first) and "detached" in repr(second)


class Outer(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x)


def test_errors_name_what_was_looked_for():
    net = small()
    conv = timm.create_model("resnet10t")
    with pytest.raises(
        ValueError, match="nothing to attach to in ResNet: looked for attention layers in VisionTransformer"
    ):
        attach(conv, LOCAL)
    with pytest.raises(ValueError, match="then for modules whose class has Attention in its name"):
        attach(conv, LOCAL, grid=(5, 5))
    with pytest.raises(ValueError, match="cannot attach to NaFlexVit: the images of one batch"):
        attach(timm.create_model("naflexvit_base_patch16_gap", embed_dim=24, depth=1, num_heads=2), LOCAL)
    with pytest.raises(TypeError, match="pattern must be a pattern such as"):
        attach(net, "neighborhood")
    with pytest.raises(ValueError, match="Radial follows the distance between frames"):
        attach(net, Radial())
    with pytest.raises(ValueError, match="unknown backend 'gpu'; allowed: natten"):
        attach(net, LOCAL, backend="gpu")
    with pytest.raises(ValueError, match=r"dense_layers=4, but the model has the layers 0 to 2"):
        attach(net, LOCAL, dense_layers=4)
    with pytest.raises(ValueError, match="so nothing would be attached"):
        attach(net, LOCAL, dense_layers=[0, 1, 2])
    with pytest.raises(ValueError, match="dense_layers must be an int"):
        attach(net, LOCAL, dense_layers=[True])
    with pytest.raises(TypeError, match="dense_step"):
        attach(net, LOCAL, dense_steps=3)
    with attach(net, LOCAL), pytest.raises(AttachError, match="before the image was cut into tokens"):
        net.blocks(torch.randn(1, 26, 24))
    with (
        attach(net, LOCAL, grid=(4, 4)),
        pytest.raises(AttachError, match=r"grid=\(4, 4\), but this image has \(5, 5\)"),
    ):
        net(torch.randn(1, 3, 80, 80))
    with pytest.raises(ValueError, match="says what is before its grid; leave prefix out"):
        attach(net, LOCAL, grid=(5, 5), prefix=1)
    for options in ({"prefix": 1}, {"grid": (5, 5), "prefix": -1}):
        with pytest.raises(ValueError, match="prefix is a number of tokens, from 0, and goes with grid"):
            attach(net, LOCAL, **options)
    with pytest.raises(TypeError, match="cannot attach to list; allowed: pipelines of diffusers, and torch modules"):
        attach([], LOCAL)
    with pytest.raises(ValueError, match="grid"):
        attach(net, LOCAL, grid=(5, 0))
    assert not any("_vision_attn" in vars(m) for m in net.modules())


def test_towers_inside_of_other_models():
    from vision_attn.retrofit import attach

    x = torch.randn(1, 3, 80, 80)
    net = small()
    with attach(net, LOCAL):
        sparse = net(x)
    with attach(Outer(net), LOCAL) as run:
        assert run.report.towers[0].modules[0] == "inner.blocks.0.attn" and torch.equal(net(x), sparse)
    features = timm.create_model("vit_tiny_patch16_224", img_size=80, features_only=True, depth=3).eval()
    dense = features(x)[-1]
    with attach(features, LOCAL, strict=True):
        assert not torch.equal(features(x)[-1], dense)


def test_a_class_that_is_not_known_needs_a_grid(monkeypatch):
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = vit.Attention(24, 2), torch.nn.MultiheadAttention(24, 2, batch_first=True)

        def forward(self, x):
            x = self.first(x)
            return self.second(x, x, x, need_weights=False)[0]

    net, x = Plain().double().eval(), torch.randn(2, 20, 24).double()
    with pytest.raises(ValueError, match=r"any other model needs grid=\(h, w\)"):
        attach(net, LOCAL)
    with attach(net, LOCAL, grid=(4, 5), strict=True) as run:
        sparse = net(x)
    assert run.report.towers[0].calls["sparse"] == 2
    Oracle(Model("", grid=(4, 5), prefix=0), monkeypatch)
    torch.testing.assert_close(sparse, net(x))


@pytest.mark.parametrize("prefix", [0, 2])
def test_attention_of_ones_own(prefix, monkeypatch):
    """Its class is known by name only, and what is before the grid by what one says."""

    class Attn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(24, 72)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    net, x = torch.nn.Sequential(Attn(), Attn()).double().eval(), torch.randn(2, prefix + 20, 24).double()
    dense = net(x)
    with attach(net, LOCAL, grid=(4, 5), prefix=prefix, strict=True) as run:
        sparse = net(x)
    assert run.report.towers[0].calls["sparse"] == 2 and torch.equal(net(x), dense)
    Oracle(Model("", grid=(4, 5), prefix=prefix), monkeypatch)
    torch.testing.assert_close(sparse, net(x))


def test_the_report_counts_what_was_computed():
    net, x = small(), torch.randn(2, 3, 80, 80)
    with attach(net, LOCAL, dense_layers=1) as run:
        assert "not called yet" in str(run.report) and run.report.flops is None
        report = run.measure(x, repeats=2)
    pairs = 25 * 9 + 2 * 25 + 1  # 3 x 3 for every patch; the class token both ways
    assert report.towers[0].flops == {"before": 2 * 2 * 2 * 26**2 * 24 * 2, "after": 2 * 2 * 2 * pairs * 24 * 2}
    saved = report.towers[0].flops["before"] - report.towers[0].flops["after"]
    assert report.flops["before"] - report.flops["after"] == saved
    linear = 26 * (24 * 72 + 24 * 24 + 2 * 24 * 96) * 3 + 25 * 768 * 24 + 24 * 5
    assert report.flops["before"] == 2 * 2 * (linear + 3 * 2 * 26**2 * 24)
    assert min(report.seconds.values()) > 0 and report.to_dict()["towers"][0]["prefix"] == 1
    said = [line.strip() for line in str(report).splitlines() if "density" in line]
    assert said == ["density    36.0% in blocks.1.attn to blocks.2.attn (2)"]
    with pytest.raises(ValueError, match="detached"):
        run.measure(x)
    with attach(net, LOCAL) as run, pytest.raises(ValueError, match="repeats"):
        run.measure(x, repeats=0)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_models_follow_and_come_back(fused):
    timm.layers.set_fused_attn(fused)
    try:
        net, x = small(dynamic_img_size=True), torch.randn(2, 3, 80, 80)
    finally:
        timm.layers.set_fused_attn(True)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    dense = compiled(x)
    with attach(compiled, LOCAL) as run:
        for images in (x, x[:, :, :64]):
            torch.testing.assert_close(compiled(images), net(images), rtol=1e-5, atol=1e-6)
        assert (compiled(x) - dense).abs().max() > 1e-4
        assert run.report.towers[0].density == [LOCAL.density((5, 5))] * 3
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiled(x), compiled(x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert torch.equal(compiled(x), dense)


@pytest.mark.parametrize("mask", ["bool", "float", "per head"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_multihead_attention(mask, batch_first, monkeypatch):
    """True hides there; a mask of three dimensions is one per head."""
    from vision_attn.retrofit import attach

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(24, 2, batch_first=batch_first)

        def forward(self, x, mask):
            return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    torch.manual_seed(0)
    net, x = Holder().double().eval(), torch.randn(2, 20, 24).double()
    x = x if batch_first else x.transpose(0, 1)
    hidden = torch.rand(20, 20) > 0.7
    hidden.fill_diagonal_(False)
    given = {"bool": hidden, "float": torch.randn(20, 20).double(), "per head": torch.randn(4, 20, 20).double()}[mask]
    with attach(net, LOCAL, grid=(4, 5), strict=True) as run:
        sparse = net(x, given)
    assert run.report.towers[0].calls["masked"] == 1
    Oracle(Model("", grid=(4, 5), prefix=0), monkeypatch)
    torch.testing.assert_close(sparse, net(x, given))
    with attach(net, LOCAL, grid=(4, 5), strict=True), pytest.raises(AttachError, match="need_weights"):
        net.attn(x, x, x)
