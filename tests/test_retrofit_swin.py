"""attach() on Swin: a pattern on the whole map in place of shifted windows, with the positions the model learned."""

import itertools

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")
from vision_towers import SWINS, Model  # noqa: E402

from vision_attn import Circle, Dense, Neighborhood, PerHead, Window, attach  # noqa: E402
from vision_attn.hosts import AttachError  # noqa: E402

EVERY = pytest.mark.parametrize("model", SWINS, ids=repr)


pytestmark = pytest.mark.usefixtures("inference")


@EVERY
def test_its_own_windows_and_shifts_are_the_model_itself(model: Model):
    """Swin hides with -100, not with minus infinity: at these weights no difference in float64 beyond 1e-9."""
    net, images = model.build().double(), model.images().double()
    dense = net(images)
    for kept, shift in ((1, 0), (0, 2)):  # blocks 0 and 2 have whole windows, 1 and 3 shifted ones
        with attach(net, Window(size=4, shift=shift), dense_layers=[kept, kept + 2], strict=True) as run:
            torch.testing.assert_close(net(images), dense, rtol=1e-9, atol=1e-9)
        names = [f"layers.{stage}.blocks.{1 - kept}" for stage in (0, 1)]
        assert run.report.towers[0].modules == names and run.report.towers[0].grids == [[16, 16], [8, 8]]
        report = run.report.towers[0].flops
        assert (report["before"] == report["after"]) == (shift == 0)  # cut windows are smaller


def plain_attention(attn, x, window):
    """Attention of one Swin layer within moving windows, pair by pair."""
    batch, height, width, channels = x.shape
    heads, (rows, columns) = attn.num_heads, attn.window_size
    qkv = attn.qkv(x)
    cosine = hasattr(attn, "cpb_mlp")
    if cosine:
        qkv = qkv + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        table = attn.cpb_mlp(attn.relative_coords_table)[0]
        table = 16 / (1 + (-table).exp())
    else:
        table = attn.relative_position_bias_table.reshape(2 * rows - 1, 2 * columns - 1, heads)
    q, k, v = (t.reshape(batch, height, width, heads, -1) for t in qkv.chunk(3, -1))
    out = torch.zeros_like(v)
    for y, x_ in itertools.product(range(height), range(width)):
        top = min(max(y - window // 2, 0), height - window)
        left = min(max(x_ - window // 2, 0), width - window)
        keys, values = (t[:, top : top + window, left : left + window].flatten(1, 2) for t in (k, v))
        query = q[:, y, x_]
        if cosine:
            query, keys = F.normalize(query, dim=-1), F.normalize(keys, dim=-1)
            scale = attn.logit_scale.exp().clamp(max=100).reshape(heads)
        else:
            scale = torch.full((heads,), query.shape[-1] ** -0.5, dtype=x.dtype)
        scores = torch.einsum("bhd,bkhd->bhk", query, keys) * scale[:, None]
        bias = [
            table[y - b + rows - 1, x_ - a + columns - 1]
            for b in range(top, top + window)
            for a in range(left, left + window)
        ]
        weights = (scores + torch.stack(bias, -1)).softmax(-1)
        out[:, y, x_] = torch.einsum("bhk,bkhd->bhd", weights, values)
    return attn.proj(out.flatten(3))


@EVERY
@pytest.mark.parametrize("window", [3, 4])
def test_a_moving_window_with_the_learned_positions(model: Model, window):
    net = model.build().double()
    block = net.layers[0].blocks[1]
    x = torch.randn(2, 7, 9, 24).double()  # not a multiple of the window
    expected = plain_attention(block.attn, x, window)
    with attach(net, Neighborhood(window=window), strict=True):
        torch.testing.assert_close(block._attn(x), expected, rtol=1e-9, atol=1e-9)


def test_continuous_positions_reach_beyond_the_window():
    """Version 2 computes positions for any distance; within its window they are those of the model."""
    from vision_attn.retrofit.swin import relative_bias

    for trained in (0, 3):
        net = Model(
            "swinv2_tiny_window8_256",
            {**SWINS[1].options, "pretrained_window_sizes": (trained,) * 4},
            grid=(16, 16),
            patch=4,
        ).build()
        attn = net.layers[0].blocks[0].attn
        own = relative_bias(attn, Neighborhood(window=4), (16, 16))
        torch.testing.assert_close(relative_bias(attn, Neighborhood(window=(8, 6)), (16, 16))[:, 4:-4, 2:-2], own)
        table = 16 * attn.cpb_mlp(attn.relative_coords_table)[0].sigmoid()
        torch.testing.assert_close(own, table.flip(0, 1).permute(2, 0, 1))
    with attach(net, Neighborhood(window=7), strict=True):
        assert net(SWINS[1].images()).isfinite().all()


@EVERY
def test_other_sizes_of_image(model: Model):
    options = {**model.options, "strict_img_size": False}
    net = Model(model.name, options, model.grid, patch=4).build()
    images = torch.randn(1, 3, 56, 72)
    with attach(net, Neighborhood(window=3), strict=True) as run:
        assert net(images).isfinite().all()
        assert run.report.towers[0].grids == [[14, 18], [7, 9]]
        assert net(torch.randn(2, 3, 16, 24)).isfinite().all()  # 4 x 6, then 2 x 3: the window is cut down
        assert run.report.towers[0].density[-1] == 1.0


def test_what_swin_refuses():
    net = SWINS[0].build()
    with pytest.raises(AttachError, match="reaches 5 x 5 tokens, and this Swin layer has relative positions within"):
        attach(net, Neighborhood(window=5))
    for pattern in (Dense(), Circle(radius=2), PerHead(((2, Window(size=2)),))):
        with pytest.raises(
            AttachError, match=f"which {type(pattern).__name__} cannot take; use Neighborhood or Window"
        ):
            attach(net, pattern)
    assert not any("_vision_attn" in vars(m) for m in net.modules())
    dropping = Model(SWINS[0].name, {**SWINS[0].options, "attn_drop_rate": 0.1}, (16, 16), patch=4).build().train()
    with attach(dropping, Window(size=2)), pytest.warns(UserWarning, match="drops attention weights"):
        dropping(SWINS[0].images())


def test_a_feature_extractor_has_no_root_and_still_works():
    options = {**SWINS[0].options, "img_size": 64, "features_only": True}
    options.pop("num_classes")
    from vision_attn.retrofit import attach

    net = timm.create_model(SWINS[0].name, **options).eval()
    images = SWINS[0].images()
    dense = net(images)
    with attach(net, Neighborhood(window=3), strict=True) as run:
        assert not torch.equal(net(images)[-1], dense[-1])
        assert run.report.towers[0].grids == [[16, 16], [8, 8]]
    assert all(map(torch.equal, net(images), dense))


@pytest.mark.parametrize("model", [pytest.param(SWINS[0], marks=pytest.mark.slow), SWINS[1]], ids=repr)
def test_compiled_swin_follows(model: Model):
    net, images = Model(model.name, {**model.options, "depths": (1, 1)}, (16, 16), patch=4).build(), model.images(1)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with attach(compiled, Neighborhood(window=3)) as run:
        torch.testing.assert_close(compiled(images), net(images), rtol=1e-4, atol=1e-5)
        assert run.report.towers[0].density == [Neighborhood(window=3).density((n, n)) for n in (16, 8)]
