"""Recorded attention: the model is not changed by a bit, and the rows are the ones it used."""

import threading

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")
from vision_towers import SWINS, TOWERS  # noqa: E402

from vision_attn import BlockList, Circle, Dense, LengthDecay, Neighborhood, PerHead, Window, attach, attend  # noqa: E402
from vision_attn.analysis import attention_entropy, record  # noqa: E402
from vision_attn.analysis.geometry import Place, cut, place  # noqa: E402
from vision_attn.analysis.recording import Recording  # noqa: E402
from vision_attn.kernels.backends import BACKENDS  # noqa: E402


def entropy_of(weights):
    return -torch.special.xlogy(weights.double(), weights.double()).sum(-1)


class WithOutputs(Recording):
    """Also keeps what every call computed and its values, to multiply the rows with."""

    def __init__(self, model):
        super().__init__(model, None, None)
        self.results = []

    def saw_sdpa(self, q, k, v, *args, **kwargs):
        out = super().saw_sdpa(q, k, v, *args, **kwargs)
        if q.ndim == 4:
            self.results.append((self._found[-1][1], v, out))
        return out


def noted(model, images, run=None):
    with torch.no_grad(), WithOutputs(model) as recording:
        run(model, images) if run else model(images)
    return recording


@pytest.mark.parametrize("tower", TOWERS, ids=repr)
def test_towers_are_not_changed_and_rows_give_their_outputs(tower):
    net, images = tower.build(), tower.images()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    backends = dict(BACKENDS)
    with torch.no_grad():
        before = tower.run(net, images)
        with WithOutputs(net) as recording:
            during = tower.run(net, images)
    assert torch.equal(before, during)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    assert dict(BACKENDS) == backends
    layers = recording.layers
    assert len(layers) >= tower.calls
    for layer in layers:
        rows = layer.rows()
        torch.testing.assert_close(layer.entropy().double(), entropy_of(rows), atol=2e-5, rtol=0)
        if layer.queries > 1:
            assert layer.key_place.grid is not None, layer
    if tower not in SWINS:
        assert (layers[0].key_place, layers[0].grid) == (Place(tower.prefix, tower.grid), tower.grid)
        for layer, v, out in recording.results:
            torch.testing.assert_close(layer.rows() @ v, out, atol=1e-5, rtol=1e-4)
        assert recording.results or any(isinstance(m, torch.nn.MultiheadAttention) for m in net.modules())


def rebuilt(layer, attention, x):
    """The output of an attention layer from its rows and its input `[batch, tokens or rows and columns, channels]`."""
    x = x.flatten(1, -2)
    value = attention.qkv(x)[..., -attention.qkv.out_features // 3 :]
    if getattr(attention, "v_bias", None) is not None:
        value = value + attention.v_bias
    value = value.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    return attention.proj((layer.rows() @ value).transpose(1, 2).flatten(2))


class Ends:
    """Input and output of a module in the last call."""

    def __init__(self, module):
        module.register_forward_hook(self.keep)

    def keep(self, module, args, out):
        self.x, self.out = args[0], out


@pytest.mark.parametrize("tower", [t for t in TOWERS if t.name in ("vit_tiny_patch16_224", "vit_tiny_patch16_224 4x7")])
@pytest.mark.parametrize(
    "pattern",
    [Neighborhood(3, dilation=1), Window(2), Circle(2), Dense(), PerHead([(1, Neighborhood(3)), (1, Dense())])],
)
def test_rows_of_attached_models(tower, pattern):
    net, images = tower.build(), tower.images()
    ends = Ends(net.blocks[1].attn)
    with torch.no_grad(), attach(net, pattern):
        before = net(images)
        with record(net, layers=[1]) as recording:
            assert torch.equal(net(images), before)
        (layer,) = recording.layers
        torch.testing.assert_close(rebuilt(layer, net.blocks[1].attn, ends.x), ends.out, atol=2e-5, rtol=1e-4)
        rows = layer.rows()
        assert rows.shape[1:] == (2, layer.keys, layer.keys) and layer.key_place == Place(1, tower.grid)
        mask = pattern.mask(tower.grid) if not isinstance(pattern, PerHead) else Neighborhood(3).mask(tower.grid)
        assert torch.equal(rows[:, :1, 1:, 1:] > 0, mask.expand(2, 1, -1, -1))
        assert (rows[..., 0] > 0).all() and (rows[:, :, 0] > 0).all()
        torch.testing.assert_close(layer.entropy().double(), entropy_of(rows), atol=2e-5, rtol=0)
        some = torch.tensor([5, 0, 3])
        torch.testing.assert_close(layer.rows(some), rows[:, :, some])


@pytest.mark.parametrize("pooled", [2])
def test_rows_with_pooled_keys(pooled):
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=24, num_heads=2).eval()
    with torch.no_grad(), attach(net, Circle(radius=2, pooled=pooled)), record(net) as recording:
        net(torch.randn(2, 3, 64, 64))
    (layer,) = recording.layers
    rows = layer.rows()
    assert layer.key_place == Place(1 + 4, (4, 4)) and layer.query_place == Place(1, (4, 4))
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 2, 17))
    assert (rows[:, :, 0, 1:5] == 0).all() and (rows[:, :, 1:, 1:5] > 0).all()


def test_attached_swin():
    net, images = SWINS[0].build(), SWINS[0].images()
    with torch.no_grad(), attach(net, Neighborhood(3)):
        before = net(images)
        with record(net) as recording:
            assert torch.equal(net(images), before)
    for layer in recording.layers:
        seen = Neighborhood(3).mask(layer.grid)
        assert torch.equal(layer.rows()[0, 0] > 0, seen)
        torch.testing.assert_close(layer.entropy().double(), entropy_of(layer.rows()), atol=2e-5, rtol=0)


def test_swin_windows_lie_where_the_block_cuts_them():
    """Shifted, padded and not square; rebuilt from the map as a whole."""
    torch.manual_seed(0)
    options = dict(embed_dim=12, depths=(2, 2), num_heads=(2, 2), window_size=4, strict_img_size=False)
    for name in ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"):
        net = timm.create_model(name, img_size=(56, 72), **options).eval()  # maps of 14 x 18 and 7 x 9
        images = torch.randn(2, 3, 56, 72)
        with torch.no_grad(), record(net) as recording:
            net(images)
        layers = recording.layers
        assert [layer.grid for layer in layers] == [(14, 18), (14, 18), (7, 9), (7, 9)]
        for layer in layers:
            block = net.get_submodule(layer.name.removesuffix(".attn"))
            ends = Ends(block)
            with torch.no_grad():
                net(images)
                x = block.norm1(ends.x) if "v2" not in name else ends.x
                padded = 1 - layer.rows().sum(-1)  # padding is zeros, whose value is the bias
                bias = block.attn.v_bias if "v2" in name else block.attn.qkv.bias[-block.attn.qkv.in_features :]
                rest = padded.transpose(1, 2)[..., None] * bias.view(layer.heads, -1)
                out = rebuilt(layer, block.attn, x) + F.linear(rest.flatten(2), block.attn.proj.weight)
                torch.testing.assert_close(out, block._attn(x).flatten(1, 2), atol=1e-5, rtol=1e-4)
            assert layer.entropy().shape == layer.rows().shape[:3]


@pytest.mark.parametrize(
    "name, size", [("nat_mini", (36, 52)), ("dinat_mini", (96, 64)), ("biformer_stl_nchw", (88, 56))]
)
def test_own_backbones(name, size):
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=2 * p[0].numel() ** -0.5)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        before = net(images)
        with record(net) as recording:
            assert torch.equal(net(images), before)
        layers = recording.layers
        for index in (0, 1, 2, -1):
            layer = layers[index]
            attention = net.get_submodule(layer.name)
            ends = Ends(attention)
            net(images)
            assert layer.grid == tuple(ends.x.shape[1:3])
            missing = (1 - layer.rows().sum(-1)).transpose(1, 2)[..., None]  # on padding
            assert missing.min() > -1e-5 and missing.max() < 1
            if "biformer" in name:  # padding has value 0; a convolution of the values is added before the projection
                value = attention.qkv(ends.x)[..., 2 * attention.proj.in_features :]
                local = attention.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
                rest = local
            else:
                bias = attention.qkv.bias[-attention.proj.in_features :]
                rest = (missing * bias.view(layer.heads, -1)).flatten(2)
            out = rebuilt(layer, attention, ends.x) + F.linear(rest, attention.proj.weight)
            torch.testing.assert_close(out, ends.out.flatten(1, 2), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("small_map", ["shrink", "pad"])
@pytest.mark.parametrize("size", [(9, 14), (3, 10), (4, 4), (2, 3)])
def test_own_windows(size, small_map, shift):
    from vision_attn.modules.window import WindowAttention2d

    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WindowAttention2d(24, 2, window=4, shift=shift, small_map=small_map)
            self.x = torch.randn(2, *size, 24)

        def forward(self, image):
            return self.layer(self.x)

    net = Net()
    torch.nn.init.normal_(net.layer.relative_position_bias_table)
    torch.nn.init.normal_(net.layer.qkv.weight)
    torch.nn.init.normal_(net.layer.qkv.bias)
    with torch.no_grad(), record(net) as recording:
        out = net(torch.zeros(2, 3, 32, 32))
    (layer,) = recording.layers
    assert layer.grid == size
    with torch.no_grad():
        missing = (1 - layer.rows().sum(-1)).transpose(1, 2)[..., None]
        rest = (missing * net.layer.qkv.bias[48:].view(2, -1)).flatten(2)
        found = rebuilt(layer, net.layer, net.x) + F.linear(rest, net.layer.proj.weight)
    torch.testing.assert_close(found, out.flatten(1, 2), atol=1e-4, rtol=1e-4)


def test_layers_whose_keys_have_no_place_do_not_pretend():
    tiny = dict(depths=(1, 1, 1, 1))
    for name, size, options in (
        ("swin_tiny_vsa", 224, tiny),
        ("moh_transnext_small_80", 64, tiny),
        ("illama_tiny", 224, dict(depth=2)),
        ("hiera_tiny_224", 224, dict(stages=(1, 1, 1, 1))),
    ):
        net = timm.create_model(name, **options).eval()
        images = torch.randn(1, 3, size, size)
        with torch.no_grad(), record(net) as recording:
            net(images)
        kinds = {type(net.get_submodule(each.name)).__name__: each for each in recording.layers}
        odd = {"VariedWindowAttention", "AggregatedAttention", "SoftCausalAttention", "MaskUnitAttention"} & set(kinds)
        assert odd
        for each in odd:
            assert kinds[each].key_place.grid is None
            assert (kinds[each].entropy() >= 0).all()
            with pytest.raises(ValueError, match="no known place"):
                kinds[each].map()


def test_legacy_routing_with_padding():
    """Padded tokens are keys too; the places of the others are known, whatever the order in the layer."""
    torch.manual_seed(0)
    net = timm.create_model("biformer_tiny").eval()
    images = torch.randn(1, 3, 80, 112)
    with torch.no_grad(), record(net) as recording:
        net(images)
    layer = recording.layers[0]
    assert layer.grid == (20, 28) and layer.queries == 560
    attention = net.get_submodule(layer.name)
    ends = Ends(attention)
    with torch.no_grad():
        net(images)
        qkv = attention.qkv(F.pad(ends.x, (0, 0, 0, 0, 0, 1)))
        local = (
            attention.lepe(qkv[..., 2 * attention.dim :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, :20].flatten(1, 2)
        )
        missing = (1 - layer.rows().sum(-1)).transpose(1, 2)[..., None]
        rest = (missing * attention.qkv.bias[2 * attention.dim :].view(layer.heads, -1)).flatten(2) + local
        out = rebuilt(layer, attention, ends.x) + F.linear(rest, attention.proj.weight)
    assert missing.max() > 0.01  # some padding is seen
    torch.testing.assert_close(out, ends.out.flatten(1, 2), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128", "xcit_nano_12_p16_224", "pvt_v2_b0"])
def test_layers_that_spell_attention_out(name, monkeypatch):
    """The weights of the softmax are taken as they are; where a switch exists, they equal those of the fused layer."""
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    images = torch.randn(1, 3, 224, 224)
    recorded = noted(net, images).layers
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with torch.no_grad():
        before = net(images)
        with record(net) as recording:
            assert torch.equal(net(images), before)
    assert [each.name for each in recorded] == [each.name for each in recording.layers]
    for fused, plain in zip(recorded, recording.layers, strict=True):
        assert plain.key_place == fused.key_place
        some = torch.arange(0, plain.queries, 7)
        torch.testing.assert_close(plain.rows(some), fused.rows(some), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(plain.entropy(), fused.entropy(), atol=1e-4, rtol=1e-4)
    if name.startswith("xcit"):  # its main layers attend over channels
        assert all(each.name.startswith("cls_attn_blocks") for each in recorded)


def masked_rows(q, k, mask, scale, extra=None, bias=None):
    """Independent: `[batch, heads, tokens, extra + tokens]` in float64."""
    q, k = (x.double().flatten(1, -3).transpose(1, 2) for x in (q, k))
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~mask, -torch.inf)
    if extra is not None:
        extra = extra.double().transpose(1, 2).repeat_interleave(q.shape[1] // extra.shape[2], 1)
        scores = torch.cat([q @ extra.mT * scale, scores], -1)
    return scores.softmax(-1).nan_to_num(0)


BLOCKS = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
CASES = {
    "dense": (Dense(), (5, 7)),
    "neighborhood": (Neighborhood((3, 5), stride=(1, 2)), (7, 11)),
    "dilated, causal": (Neighborhood(3, dilation=2, causal=True), (13,)),
    "blocks": (BlockList.from_mask(BLOCKS, block=4), (11,)),
    "blocks by head": (BlockList.from_mask(torch.stack([BLOCKS, ~BLOCKS])[None], block=4), (3, 4)),
    "blocks within": (BlockList.from_mask(BLOCKS, 4, within=Window(2)), (3, 4)),
    "decay": (LengthDecay(train_frames=2), (4, 2, 3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extra", [0, 3])
def test_rows_and_entropy_of_patterns(case, extra):
    pattern, grid = CASES[case]
    torch.manual_seed(0)
    q, k, v = (2 * torch.randn(2, *grid, heads, 8) for heads in (4, 2, 2))
    if case == "blocks by head":
        k, v, q = k, v, q[..., :2, :]
    beside = 2 * torch.randn(2, extra, 2, 8) if extra else None

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = torch.nn.Identity()

        def forward(self, image):
            return attend(q, k, v, pattern, scale=0.3, extra_kv=None if beside is None else (beside, beside))

    with record(Layer()) as recording:
        recording.model(torch.zeros(2, 3, 8, 8))
    (layer,) = recording.layers
    rows = layer.rows()
    rule = pattern.score_rule(grid)
    if rule is None:
        expected = masked_rows(q, k, pattern.mask(grid), 0.3, beside)
        torch.testing.assert_close(rows.double(), expected, atol=1e-6, rtol=1e-5)
        entropy = attention_entropy(q, k, pattern, scale=0.3, extra_k=beside)
        found = entropy.flatten(1, len(grid)).transpose(1, 2).double()
        torch.testing.assert_close(found, entropy_of(expected), atol=1e-5, rtol=0)
        assert layer.visible == pytest.approx(float((expected > 0).sum(-1).double().mean()))
    else:
        with pytest.raises(ValueError, match="changes scores or keys"):
            attention_entropy(q, k, pattern)
    out = attend(q, k, v, pattern, scale=0.3, extra_kv=None if beside is None else (beside, beside))
    value = v.flatten(1, -3) if beside is None else torch.cat([beside, v.flatten(1, -3)], 1)
    value = value.transpose(1, 2).repeat_interleave(q.shape[-2] // 2, 1)
    torch.testing.assert_close(rows @ value, out.flatten(1, -3).transpose(1, 2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.entropy().double(), entropy_of(rows), atol=1e-5, rtol=0)


def test_entropy_of_large_scores_and_half_precision():
    torch.manual_seed(0)
    q, k = (6 * torch.randn(1, 9, 9, 2, 32) for _ in range(2))
    rows = masked_rows(q, k, Neighborhood(5).mask((9, 9)), 32**-0.5)
    found = attention_entropy(q, k, Neighborhood(5)).flatten(1, 2).transpose(1, 2)
    assert rows.max() > 0.999
    torch.testing.assert_close(found.double(), entropy_of(rows), atol=2e-4, rtol=0)
    for dtype in (torch.float16, torch.bfloat16):
        low = [x.to(dtype) for x in (q, k)]
        rows = masked_rows(*low, Neighborhood(5).mask((9, 9)), 32**-0.5)
        found = attention_entropy(*low, Neighborhood(5)).flatten(1, 2).transpose(1, 2)
        torch.testing.assert_close(found.double(), entropy_of(rows), atol=2e-4, rtol=0)


@pytest.mark.parametrize("form", ["bool", "float", "padding", "per head", "causal"])
def test_masks_of_multihead_attention(form):
    torch.manual_seed(0)
    other = dict(kdim=12, vdim=12) if form == "padding" else {}
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=form != "float", **other)
    tokens, batch = 6, 2
    x = torch.randn(batch, tokens, 16)
    memory = torch.randn(batch, tokens, 12) if form == "padding" else x
    given = {}
    if form == "bool":
        given["attn_mask"] = torch.eye(tokens, dtype=torch.bool)
    elif form == "float":
        given["attn_mask"] = torch.randn(tokens, tokens)
    elif form == "padding":
        given["key_padding_mask"] = torch.arange(tokens).expand(batch, -1) > 3
    elif form == "per head":
        given["attn_mask"] = torch.randn(batch * 4, tokens, tokens)
    else:
        given |= {"attn_mask": torch.ones(tokens, tokens).triu(1).bool(), "is_causal": True}

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer.eval()

        def forward(self, image):
            turn = (lambda t: t) if layer.batch_first else (lambda t: t.transpose(0, 1))
            self.weights = layer(turn(x), turn(memory), turn(memory), average_attn_weights=False, **given)[1]

    net = Net()
    with torch.no_grad(), record(net) as recording:
        net(torch.zeros(batch, 3, 8, 8))
    torch.testing.assert_close(recording.layers[0].rows(), net.weights, atol=1e-6, rtol=1e-5)


def test_maps_and_choice_of_layers():
    net = timm.create_model("vit_tiny_patch16_224", img_size=(48, 80), depth=3).eval()
    with torch.no_grad(), record(net, layers=[2, "blocks.0.attn"]) as recording:
        net(torch.randn(2, 3, 48, 80))
    first, last = recording.layers
    assert (first.name, last.layer) == ("blocks.0.attn", 2)
    rows = last.rows()
    torch.testing.assert_close(last.map((1, 2)), rows[:, :, 1 + 7, 1:].unflatten(2, (3, 5)))
    torch.testing.assert_close(last.map("class"), rows[:, :, 0, 1:].unflatten(2, (3, 5)))
    torch.testing.assert_close(last.map(3), rows[:, :, 3, 1:].unflatten(2, (3, 5)))
    torch.testing.assert_close(last.map(), rows[:, :, 1:, 1:].mean(2).unflatten(2, (3, 5)))
    for wrong, part in (((3, 0), "grid is (3, 5)"), ("mid", "'mean', 'class'"), (16, "0 to 15"), (-1, "0 to 15")):
        with pytest.raises(ValueError) as caught:
            last.map(wrong)
        assert part in str(caught.value)
    assert "3 heads, 16 queries" in repr(last)


def test_chunks_are_the_rows(monkeypatch):
    net = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1).eval()
    with torch.no_grad(), record(net) as recording:
        net(torch.randn(2, 3, 48, 48))
    (layer,) = recording.layers
    whole, entropy = layer.rows(), layer.entropy()
    monkeypatch.setattr("vision_attn.analysis.layer.CHUNK", 2 * 3 * 10 * 3)
    parts = list(layer.chunks())
    assert [len(at) for at, _ in parts] == [3, 3, 3, 1]
    torch.testing.assert_close(torch.cat([w for _, w in parts], 2), whole)
    torch.testing.assert_close(layer.entropy(), entropy)


def test_the_last_call_is_kept_and_parts_of_a_model_may_be_called():
    net = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(2, 2), num_heads=(2, 2)
    ).eval()
    one, two = torch.randn(2, 1, 3, 56, 56)
    with torch.no_grad(), record(net) as recording:
        net(one)
        net(two)
        latest = [layer.rows([0]) for layer in recording.layers]
        assert len(latest) == 4
        net(one)
        net.forward_head(net.forward_features(two))
        assert len(recording.layers) == 4
        for layer, rows in zip(recording.layers, latest, strict=True):
            assert torch.equal(layer.rows([0]), rows)


def test_gradients_are_those_of_the_plain_model():
    net = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2).train()
    images = torch.randn(2, 3, 48, 48)
    net(images).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with record(net) as recording:
        net(images).square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), expected, strict=True))
    assert not recording.layers[0].rows([0]).requires_grad


def test_what_cannot_be_recorded_says_why():
    with torch.no_grad():
        net = timm.create_model("resnet18").eval()
        with record(net) as recording:
            pass
        with pytest.raises(ValueError, match="was not called with images"):
            _ = recording.layers
        with record(net) as recording:
            net(torch.randn(1, 3, 64, 64))
        with pytest.raises(ValueError, match="ran no softmax attention"):
            _ = recording.layers
        net = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2).eval()
        with record(net, layers=[0, 7, "blocks.9.attn"]) as recording:
            net(torch.randn(1, 3, 48, 48))
        with pytest.raises(ValueError, match="no attention layer.*it has 0 blocks.0.attn, 1 blocks.1.attn"):
            _ = recording.layers
        for wrong in ("vit", torch.jit.script(torch.nn.Linear(2, 2))):
            with pytest.raises(TypeError, match="a torch module that is not scripted"):
                record(wrong)


def test_a_grid_that_cannot_be_told_can_be_given():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, image):
            x = torch.randn(len(image), 23, 8)
            return self.mix(x, x, x)[0]

    net = Net().eval()
    with torch.no_grad(), record(net) as recording:
        net(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"23 keys have no known place.*grid=\(rows, columns\)"):
        recording.layers[0].map()
    assert recording.layers[0].entropy().shape == (1, 2, 23)
    with torch.no_grad(), record(net, grid=(4, 5)) as recording:
        net(torch.zeros(1, 3, 64, 64))
    assert recording.layers[0].key_place == Place(3, (4, 5)) and recording.layers[0].map().shape == (1, 2, 4, 5)


def test_an_error_inside_leaves_no_trace_and_recordings_nest():
    net = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2).eval()
    backends = dict(BACKENDS)
    with pytest.raises(RuntimeError, match="stop"):
        with record(net), record(net.blocks[1]):
            net.blocks[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
            net(torch.randn(1, 3, 48, 48))
    net.blocks[1].mlp._forward_pre_hooks.clear()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    assert dict(BACKENDS) == backends
    with torch.no_grad(), record(net) as outer, record(net, layers=[1]) as inner:
        net(torch.randn(1, 3, 48, 48))
    assert len(outer.layers) == 2 and len(inner.layers) == 1
    torch.testing.assert_close(outer.layers[1].rows(), inner.layers[0].rows())


def test_an_error_inside_multihead_attention_gives_torch_functions_back():
    net = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    with pytest.raises(TypeError):
        with record(net):
            net(torch.randn(1, 3, 4, 8))
    assert torch.overrides.has_torch_function_unary(None) is False
    with torch.overrides.TorchFunctionMode():
        assert torch.overrides.has_torch_function_unary(None)


def test_other_threads_are_not_recorded():
    q = torch.randn(1, 6, 6, 2, 8)
    done = []

    def elsewhere(*_):
        thread = threading.Thread(target=lambda: done.append(attend(q, q, q, Neighborhood(3))))
        thread.start()
        thread.join()

    net = timm.create_model("nat_shapes").eval()
    net.stages[1].register_forward_pre_hook(elsewhere)
    with torch.no_grad(), record(net) as recording:
        net(torch.randn(1, 3, 48, 48))
    assert len(done) == 1 and len(recording.layers) == 6


@pytest.mark.parametrize(
    "tokens, image, prefix, expected",
    [
        (196, (224, 224), None, Place(0, (14, 14))),
        (197, (224, 224), None, Place(1, (14, 14))),
        (201, (224, 224), 5, Place(5, (14, 14))),
        (49, (224, 224), 1, Place(0, (7, 7))),
        (60, (96, 160), 0, Place(0, (6, 10))),
        (77, (100, 170), 0, Place(0, (7, 11))),  # rounded up
        (77, (224, 224), None, Place(0, None)),
        (1, (224, 224), 1, Place(1, None)),
        (50, None, None, Place(0, None)),
    ],
)
def test_place(tokens, image, prefix, expected):
    assert place(tokens, image, prefix, None) == expected


def test_cut_is_roll_pad_and_partition():
    windows = cut((5, 7), (3, 4), (1, 2))
    numbered = F.pad(torch.arange(35).view(5, 7).roll((-1, -2), (0, 1)), (0, 1, 0, 1), value=-1)
    expected = [numbered[r : r + 3, c : c + 4].flatten().tolist() for r in (0, 3) for c in (0, 4)]
    assert windows.token.tolist() == expected
    slot = windows.slot
    assert all(windows.token[w, i] == token for token, (w, i) in enumerate(slot.tolist()))
