"""OverLoCK: sizes, timm's contract, merged kernels, published weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from test_module_contmix import spread
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, forward, parameters

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.overlock import OverLoCK, checkpoint_filter_fn
from vision_attn.backbones.skeleton import cfg
from vision_attn.modules import LargeKernel

COUNTS = {  # with the auxiliary head, without, and with merged kernels
    "overlock_xt": (17_307_272, 16_969_600, 16_453_712),
    "overlock_t": (34_990_472, 34_476_448, 33_467_040),
    "overlock_s": (58_309_772, 57_795_748, 56_156_452),
    "overlock_b": (98_012_968, 97_434_816, 94_942_528),
}
SMALL = {
    "depths": (1, 1, 2, 1), "focus_depths": (2, 1), "dims": (8, 12, 16, 32), "num_heads": (2, 4), "projection": 24,
}  # fmt: skip
default_cfgs = generate_default_cfgs({"test_overlock.untrained": cfg()})
register_variants(globals(), OverLoCK, {"test_overlock": SMALL}, checkpoint_filter_fn)


def test_every_name_is_counted():
    assert set(timm.list_models(module="overlock")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    found = [parameters(name, **options) for options in ({"aux_head": True}, {}, {"deploy": True})]
    assert tuple(found) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("test_overlock")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_a_published_size(check):
    check("overlock_xt")


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_forward_of_published_sizes(name):
    forward(name)


def randomised(module, seed=0):
    """Parameters and statistics that are all different, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.double().state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5 if "running_var" in name else -0.5, 1.5 if "running_var" in name else 0.5)
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).abs() / 10)
    return module.eval()


@pytest.mark.parametrize("kernel", [7, 13, 15, 17])
def test_merged_kernel(kernel):
    torch.manual_seed(kernel)
    layer, x = randomised(LargeKernel(4, kernel)), torch.randn(2, 4, 9, 20, dtype=torch.float64)
    before = layer(x)
    layer.merge()
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "conv.weight": (4, 1, kernel, kernel),
        "conv.bias": (4,),
    }
    torch.testing.assert_close(layer(x), before)
    layer.merge()  # again does nothing
    torch.testing.assert_close(layer(x), before)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel 8; allowed: 7, 13, 15, 17"):
        LargeKernel(4, 8)


def test_merged_model():
    torch.manual_seed(0)
    model, x = randomised(OverLoCK(**SMALL)), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    before = model(x)
    model.merge_branches()
    torch.testing.assert_close(model(x), before)
    deployed = OverLoCK(**SMALL, deploy=True).double().eval()
    deployed.load_state_dict(model.state_dict())
    torch.testing.assert_close(deployed(x), before)


def test_auxiliary_head():
    model, x = OverLoCK(**SMALL, num_classes=7, aux_head=True), torch.randn(2, 3, 64, 64)
    main, overview = model(x)
    assert main.shape == overview.shape == (2, 7)
    overview.sum().backward()
    assert model.stages[3].blocks[0].dwconv.weight.grad is not None  # the overview, and nothing after it
    assert model.focus[0].blocks[0].dwconv1.weight.grad is None
    model.reset_classifier(5)
    assert model(x)[1].shape == (2, 5)
    assert model.eval()(x).shape == (2, 5)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


DEPTHS, FOCUS, DIMS, HEADS, KERNELS = (1, 1, 2, 1), (2, 1), (8, 12, 16, 32), (2, 4), (17, 15, 13, 7)
BRANCHES = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
}


def published(aux=True, seed=0):
    """Random weights with the names and shapes of a published file, in the form that is trained."""
    shapes, context = {}, DIMS[3] // 4

    def conv(name, out, inputs, size=1, bias=True):
        shapes[f"{name}.weight"] = (out, inputs, size, size)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name, dim, statistics=True):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)
        if statistics:
            shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (dim,)
            shapes[f"{name}.num_batches_tracked"] = ()

    def normed(name, out, inputs, size=1):
        conv(f"{name}.0", out, inputs, size, bias=False)
        norm(f"{name}.1", out)

    def large(name, dim, kernel):
        conv(f"{name}.lk_origin", dim, 1, kernel, bias=False)
        norm(f"{name}.origin_bn", dim)
        for size, step in BRANCHES[kernel]:
            conv(f"{name}.dil_conv_k{size}_{step}", dim, 1, size, bias=False)
            norm(f"{name}.dil_bn_k{size}_{step}", dim)

    def squeeze(name, dim):
        conv(f"{name}.proj.1", max(16, dim // 8), dim)
        conv(f"{name}.proj.3", dim, max(16, dim // 8))

    def mlp(name, at, dim, hidden):
        conv(f"{name}.{at[0]}", hidden, dim)
        conv(f"{name}.{at[1]}", hidden, 1, 3)
        grn(f"{name}.{at[2]}", hidden)
        conv(f"{name}.{at[3]}", dim, hidden)

    def grn(name, dim):
        shapes[f"{name}.gamma"] = shapes[f"{name}.beta"] = (1, dim, 1, 1)

    half = DIMS[0] // 2
    for i, out, inputs in ((0, half, 3), (3, half, half), (6, DIMS[0], half), (9, DIMS[0], DIMS[0])):
        conv(f"patch_embed1.{i}", out, inputs, 3, bias=False)
        norm(f"patch_embed1.{i + 1}", out)
    for i in (1, 2, 3):
        normed(f"patch_embed{i + 1}", DIMS[i], DIMS[i - 1], 3)
    conv("high_level_proj", context, DIMS[3])
    normed("patch_embedx.x_proj", DIMS[3], DIMS[2], 3)
    normed("patch_embedx.h_proj", context, context, 3)
    for i, (depth, dim) in enumerate(zip(DEPTHS, DIMS, strict=True)):
        for j in range(depth):
            name = f"blocks{i + 1}.{j}"
            conv(f"{name}.dwconv", dim, 1, 3)
            norm(f"{name}.proj.0", dim, statistics=False)
            large(f"{name}.proj.1", dim, KERNELS[i])
            norm(f"{name}.proj.2", dim)
            squeeze(f"{name}.proj.3", dim)
            mlp(f"{name}.proj", (4, 6, 7, 8), dim, 4 * dim)
            if i > 1:
                conv(f"{name}.ls", dim, 1)
    for i, (depth, dim) in enumerate(zip(FOCUS, DIMS[2:], strict=True)):
        for j in range(depth):
            name, both, kernel, groups = f"sub_blocks{i + 3}.{j}", dim + context, KERNELS[2 + i], 2 * HEADS[i]
            if i + j:
                conv(f"{name}.x_scale", context, 1)
                conv(f"{name}.h_scale", context, 1)
            conv(f"{name}.dwconv1", both, 1, 3)
            norm(f"{name}.norm1", both, statistics=False)
            conv(f"{name}.fusion.0", both, 1, 3)
            norm(f"{name}.fusion.1", both)
            conv(f"{name}.fusion.3", dim, both)
            grn(f"{name}.fusion.4", dim)
            normed(f"{name}.weight_query", dim // 2, dim)
            conv(f"{name}.weight_key.1", dim // 2, context, bias=False)
            norm(f"{name}.weight_key.2", dim // 2)
            conv(f"{name}.weight_proj", 25 + kernel**2, 49)
            normed(f"{name}.dyconv_proj", dim, dim)
            large(f"{name}.lepe.0", dim, kernel)
            norm(f"{name}.lepe.1", dim)
            squeeze(f"{name}.se_layer", dim)
            normed(f"{name}.gate", dim, dim)
            norm(f"{name}.proj.0", dim)
            conv(f"{name}.proj.1", both, dim)
            conv(f"{name}.dwconv2", both, 1, 3)
            norm(f"{name}.norm2", both, statistics=False)
            mlp(f"{name}.mlp", (0, 2, 3, 4), both, 3 * dim)
            conv(f"{name}.ls1", both, 1)
            conv(f"{name}.ls2", both, 1)
            shapes[f"{name}.rpb1"], shapes[f"{name}.rpb2"] = (groups, 9, 9), (groups, 2 * kernel - 1, 2 * kernel - 1)
    conv("head.0", 24, DIMS[3] + context, bias=False)
    norm("head.1", 24)
    conv("head.4", 5, 24)
    if aux:
        norm("aux_head.0", DIMS[3])
        conv("aux_head.2", 5, DIMS[3])
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64) / max(1, len(shape) - 1) ** 2
        weights[name] = value.abs() + 0.5 if "running_var" in name else value
    return weights


def logits(weights, image):
    """The model from its formulas, on weights under their published names; also the logits of the overview."""

    def conv(x, name, **options):
        weight = weights[f"{name}.weight"]
        if weight.shape[1] == 1:
            options["groups"] = len(weight)
        options.setdefault("padding", weight.shape[-1] // 2)
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), **options)

    def norm(x, name):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if f"{name}.running_mean" in weights:
            return F.batch_norm(x, weights[f"{name}.running_mean"], weights[f"{name}.running_var"], weight, bias)
        return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6).permute(0, 3, 1, 2)

    def normed(x, name, **options):
        return norm(conv(x, f"{name}.0", **options), f"{name}.1")

    def residual(x, name):
        return x + conv(x, name)

    def large(x, name, kernel):
        out = norm(conv(x, f"{name}.lk_origin"), f"{name}.origin_bn")
        for size, step in BRANCHES[kernel]:
            part = conv(x, f"{name}.dil_conv_k{size}_{step}", dilation=step, padding=step * (size - 1) // 2)
            out = out + norm(part, f"{name}.dil_bn_k{size}_{step}")
        return out

    def squeeze(x, name):
        y = conv(F.gelu(conv(x.mean((2, 3), keepdim=True), f"{name}.proj.1")), f"{name}.proj.3")
        return x * y.sigmoid()

    def grn(x, name):
        size = x.square().sum((2, 3), keepdim=True).sqrt()
        share = size / (size.mean(1, keepdim=True) + 1e-6)
        return (weights[f"{name}.gamma"] * share + 1) * x + weights[f"{name}.beta"]

    def mlp(x, name, at):
        x = residual(F.gelu(conv(x, f"{name}.{at[0]}")), f"{name}.{at[1]}")
        return conv(grn(x, f"{name}.{at[2]}"), f"{name}.{at[3]}")

    def block(x, name, kernel):
        x = residual(x, f"{name}.dwconv")
        y = norm(large(norm(x, f"{name}.proj.0"), f"{name}.proj.1", kernel), f"{name}.proj.2")
        y = mlp(squeeze(y, f"{name}.proj.3"), f"{name}.proj", (4, 6, 7, 8))
        return (conv(x, f"{name}.ls") if f"{name}.ls.weight" in weights else x) + y

    def mix(x, context, values, name, groups, kernel):
        size = x.shape[2:]
        if min(size) < kernel:
            new = (kernel, int(kernel / size[0] * size[1])), (int(kernel / size[1] * size[0]), kernel)
            new = new[0] if size[0] < size[1] else new[1]
            x, context, values = (F.interpolate(t, new, mode="bilinear") for t in (x, context, values))
        dim = x.shape[1]
        query = normed(x, f"{name}.weight_query").unflatten(1, (groups, -1)) * (dim / groups) ** -0.5
        key = norm(conv(F.adaptive_avg_pool2d(context, 7), f"{name}.weight_key.1"), f"{name}.weight_key.2")
        products = torch.einsum("bgchw,bgcl->bghwl", query, key.flatten(2).unflatten(1, (groups, -1)))
        weight, bias = weights[f"{name}.weight_proj.weight"], weights[f"{name}.weight_proj.bias"]
        kernels = F.linear(products, weight[:, :, 0, 0], bias).permute(0, 2, 3, 1, 4)
        first, second = values.unflatten(1, (2, groups, -1)).unbind(1)
        small = spread(kernels[..., :25], weights[f"{name}.rpb1"], 5)
        wide = spread(kernels[..., 25:], weights[f"{name}.rpb2"], kernel)
        out = [torch.einsum("bghwrs,bgcrs->bgchw", w, v).flatten(1, 2) for w, v in ((small, first), (wide, second))]
        return F.adaptive_avg_pool2d(torch.cat(out, 1), size)

    def focus(x, context, new, name, groups, kernel):
        dim = x.shape[1]
        if f"{name}.x_scale.weight" in weights:
            context = conv(context, f"{name}.x_scale") + conv(new, f"{name}.h_scale")
        x = residual(torch.cat([x, context], 1), f"{name}.dwconv1")
        y = norm(x, f"{name}.norm1")
        fused = F.gelu(norm(conv(y, f"{name}.fusion.0"), f"{name}.fusion.1"))
        fused = grn(conv(fused, f"{name}.fusion.3"), f"{name}.fusion.4")
        mixed = normed(mix(y[:, :dim], y[:, dim:], fused, name, groups, kernel), f"{name}.dyconv_proj")
        mixed = squeeze(mixed + norm(large(fused, f"{name}.lepe.0", kernel), f"{name}.lepe.1"), f"{name}.se_layer")
        mixed = conv(norm(F.silu(normed(fused, f"{name}.gate")) * mixed, f"{name}.proj.0"), f"{name}.proj.1")
        x = residual(conv(x, f"{name}.ls1") + mixed, f"{name}.dwconv2")
        x = conv(x, f"{name}.ls2") + mlp(norm(x, f"{name}.norm2"), f"{name}.mlp", (0, 2, 3, 4))
        return x[:, :dim], x[:, dim:]

    x = image
    for i in (0, 3, 6, 9):
        x = norm(conv(x, f"patch_embed1.{i}", stride=1 if i % 6 else 2), f"patch_embed1.{i + 1}")
        x = F.gelu(x) if i < 9 else x
    base = None
    for i, depth in enumerate(DEPTHS):
        x = normed(x, f"patch_embed{i + 1}", stride=2) if i else x
        for j in range(depth):
            x = block(x, f"blocks{i + 1}.{j}", KERNELS[i])
        base = x if i == 2 else base
    overview = x
    new = conv(overview, "high_level_proj")
    near = F.interpolate(new, base.shape[2:], mode="bilinear")
    x, context = base, near
    for j in range(FOCUS[0]):
        x, context = focus(x, context, near, f"sub_blocks3.{j}", 2 * HEADS[0], KERNELS[2])
    x = normed(x, "patch_embedx.x_proj", stride=2)
    context = normed(context, "patch_embedx.h_proj", stride=2)
    for j in range(FOCUS[1]):
        x, context = focus(x, context, new, f"sub_blocks4.{j}", 2 * HEADS[1], KERNELS[3])
    x = F.silu(norm(conv(torch.cat([x, context], 1), "head.0"), "head.1")).mean((2, 3), keepdim=True)
    aux = norm(overview, "aux_head.0").mean((2, 3), keepdim=True)
    return conv(x, "head.4").flatten(1), conv(aux, "aux_head.2").flatten(1)


@pytest.mark.parametrize("options", [{}, {"aux_head": True}, {"deploy": True}], ids=["plain", "aux", "deploy"])
def test_published_weights(options):
    weights, image = published(), torch.randn(1, 3, 70, 100, dtype=torch.float64)
    model = OverLoCK(**SMALL, num_classes=5, **options).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"state_dict": weights}, model))
    want, overview = logits(weights, image)
    torch.testing.assert_close(model(image), want, rtol=1e-8, atol=1e-8)
    if "aux_head" in options:
        found = model.aux_head(model._look_twice(image)[1]).flatten(1)
        torch.testing.assert_close(found, overview, rtol=1e-8, atol=1e-8)


def test_merged_weights():
    trained = OverLoCK(**SMALL, num_classes=5).double()
    deployed = OverLoCK(**SMALL, num_classes=5, deploy=True).double()
    ours = checkpoint_filter_fn(published(), deployed)
    theirs = {}
    for key, value in published().items():  # the published form after merging: lk_origin has a bias and is alone
        if "dil_" not in key and "origin_bn" not in key:
            theirs[key] = value
    names = [(f"blocks{i + 1}.{j}.proj.1", f"stages.{i}.blocks.{j}.conv") for i in range(4) for j in range(DEPTHS[i])]
    names += [
        (f"sub_blocks{i + 3}.{j}.lepe.0", f"focus.{i}.blocks.{j}.lepe.0") for i in (0, 1) for j in range(FOCUS[i])
    ]
    for name, our in names:
        theirs |= {f"{name}.lk_origin.{part}": ours[f"{our}.conv.{part}"] for part in ("weight", "bias")}
    again = checkpoint_filter_fn(theirs, deployed)
    assert again.keys() == ours.keys() and all(torch.equal(again[key], ours[key]) for key in ours)
    with pytest.raises(ValueError, match="merged kernels; build the model with deploy=True"):
        checkpoint_filter_fn(theirs, trained)


def test_wrong_weights():
    model = OverLoCK(**SMALL, num_classes=5)
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
    part = dict(list(published().items())[:100])
    with pytest.raises(ValueError, match="not OverLoCK weights for this OverLoCK.*are missing"):
        checkpoint_filter_fn(part, model)
    with pytest.raises(ValueError, match="are unknown"):
        checkpoint_filter_fn(timm.create_model("resnet18").state_dict(), model)
    with pytest.raises(ValueError, match="are missing, such as aux_head"):
        checkpoint_filter_fn(published(aux=False), OverLoCK(**SMALL, aux_head=True))
