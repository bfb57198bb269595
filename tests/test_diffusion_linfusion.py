"""LinFusion against sums written from its formula, its weights in files, and what it refuses."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
from diffusion_models import MODELS  # noqa: E402

from vision_attn import Neighborhood, attach  # noqa: E402
from vision_attn.diffusion import LinFusion  # noqa: E402

UNET = MODELS["UNet2DConditionModel"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def by_definition(module, x: torch.Tensor, reduce: int) -> torch.Tensor:
    """One linear attention module in float64, token by token, from its weights by name."""
    w = {name: tensor.double() for name, tensor in module.state_dict().items()}
    x = x.double()

    def mapped(name: str) -> torch.Tensor:
        if reduce == -1:
            return x
        y = x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = y * w[f"{name}.1.weight"] + w[f"{name}.1.bias"]
        return torch.where(y > 0, y, 0.01 * y) @ w[f"{name}.3.weight"].T + w[f"{name}.3.bias"]

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.unflatten(-1, (module.heads, -1)).transpose(1, 2)

    q = heads((x + mapped("map_q")) @ w["to_q.weight"].T)
    k = heads((x + mapped("map_k")) @ w["to_k.weight"].T)
    q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))  # elu + 1
    v = heads(x @ w["to_v.weight"].T)
    n = x.shape[1]
    weights = q @ k.mT / n  # the quadratic form of it
    out = weights @ v / (weights.sum(-1, keepdim=True) + 1e-4)
    return out.transpose(1, 2).flatten(-2) @ w["to_out.0.weight"].T + w["to_out.0.bias"]


@pytest.mark.parametrize("reduce", [1, 2, -1])
def test_every_module_follows_the_formula(reduce):
    unet, seen = UNET.build(), []
    layers = LinFusion.from_unet(unet, reduce=reduce)
    generator = torch.Generator().manual_seed(0)
    for parameter in layers.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    for module in layers.values():
        module.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
    with layers.mount():
        unet(**UNET.inputs(2))
    assert len(seen) == UNET.calls
    for module, x, out in seen:
        assert x.shape[0] == 2
        torch.testing.assert_close(out.double(), by_definition(module, x, reduce), atol=1e-5, rtol=1e-4)


def test_new_modules_start_from_the_pretrained_projections():
    unet = UNET.build()
    layers = LinFusion.from_unet(unet, 1)
    names = {name for name, _ in unet.named_modules() if name.endswith("attn1")}
    assert {name.replace("/", ".") for name in layers} == names and len(names) == 7
    for name, module in layers.items():
        old = unet.get_submodule(name.replace("/", "."))
        for key, tensor in old.state_dict().items():
            assert torch.equal(module.state_dict()[key], tensor)
            assert module.state_dict()[key].data_ptr() != tensor.data_ptr()  # training does not reach the originals


def test_making_modules_disturbs_nobody_and_is_always_the_same():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    one = LinFusion.from_unet(UNET.build(), 1)
    assert not torch.equal(torch.randn(3), expected)  # build() draws weights and seeds
    unet = UNET.build()
    torch.manual_seed(5)
    other = LinFusion.from_unet(unet, 1)
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_mount_and_unmount():
    unet = UNET.build()
    dense, keys = unet(**UNET.inputs(1)).sample, list(unet.state_dict())
    layers = LinFusion.from_unet(unet, 1)
    layers.unmount()  # nothing is mounted yet
    run = layers.mount()
    linear = unet(**UNET.inputs(1)).sample
    assert not torch.equal(linear, dense) and "not distilled" in str(run.report)
    unet.double().float()  # as pipe.to() may do meanwhile
    layers.unmount()
    layers.unmount()
    assert torch.equal(unet(**UNET.inputs(1)).sample, dense) and list(unet.state_dict()) == keys
    with layers.mount():
        assert torch.equal(unet(**UNET.inputs(1)).sample, linear)
    assert torch.equal(unet(**UNET.inputs(1)).sample, dense)


def test_half_the_channels_for_the_model_that_asks_for_it():
    """SDXL is known by its text and size conditions; others keep all channels."""
    config = dict(block_out_channels=(32, 64), norm_num_groups=4, addition_embed_type=None)
    for unet, middle in ((UNET.build(**config), 32), (UNET.build(**config | {"addition_embed_type": "text_time"}), 2)):
        module = next(iter(LinFusion.from_unet(unet).values()))
        assert module.map_q[0].out_features == module.map_k[0].out_features == middle


def test_weights_go_through_a_file(tmp_path):
    unet, path = UNET.build(), tmp_path / "w.safetensors"
    layers = LinFusion.from_unet(unet, 1)
    for parameter in layers.parameters():
        parameter.mul_(1.1)
    with layers.mount():
        expected = unet(**UNET.inputs(1)).sample
    layers.save(path)
    with attach(unet, LinFusion(path, reduce=1)) as run:
        assert torch.equal(unet(**UNET.inputs(1)).sample, expected)
        assert run.report.to_dict()["distilled"] and "not distilled" not in str(run.report)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = set(file.keys())
    old = {f"{n}.{key}" for n, m in unet.named_modules() if n.endswith("attn1") for key in m.state_dict()}
    assert old < names and all(".attn1.map_" in name for name in names - old)


def test_bf16_is_finite_and_close():
    unet = UNET.build()
    layers = LinFusion.from_unet(unet, 1)
    with layers.mount():
        exact = unet(**UNET.inputs(2)).sample
        call = {
            name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x
            for name, x in UNET.inputs(2).items()
        }
        call["added_cond_kwargs"] = {name: x.bfloat16() for name, x in call["added_cond_kwargs"].items()}
        half = unet.bfloat16()(**call).sample
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_lora_on_the_mounted_modules():
    """The names of the projections are the old ones, so adapters find them."""
    peft = pytest.importorskip("peft")
    unet = UNET.build()
    dense = unet(**UNET.inputs(1)).sample
    layers = LinFusion.from_unet(unet, 1)
    layers.mount()
    linear = unet(**UNET.inputs(1)).sample
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["attn1.to_q", "attn1.to_v"], init_lora_weights=False))
    assert not torch.equal(unet(**UNET.inputs(1)).sample, linear)
    unet.disable_adapters()
    torch.testing.assert_close(unet(**UNET.inputs(1)).sample, linear)
    layers.unmount()
    assert torch.equal(unet(**UNET.inputs(1)).sample, dense)


def test_processors_are_not_looked_at():
    """Loading image prompts sets processors on every module; linear ones stay linear, cross-attention gets them."""
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNET.build()
    with LinFusion.from_unet(unet, 1).mount():
        linear = unet(**UNET.inputs(1)).sample
        unet.set_attn_processor(AttnProcessor())
        torch.testing.assert_close(unet(**UNET.inputs(1)).sample, linear, atol=1e-5, rtol=1e-4)


def test_what_is_refused(tmp_path):
    flux, unet = MODELS["FluxTransformer2DModel"].build(), UNET.build()
    with pytest.raises(ValueError, match="LinFusion is for UNet2DConditionModel .*; got FluxTransformer2DModel"):
        attach(flux, LinFusion())
    with pytest.raises(TypeError, match="needs a U-Net; got str"):
        LinFusion.from_unet("unet")
    for reduce in (0, -2, 1.5):
        with pytest.raises(ValueError, match="reduce must be"):
            LinFusion(reduce=reduce)
    with pytest.raises(ValueError, match="reduce=64 leaves nothing of 4 channels"):
        LinFusion.from_unet(unet, reduce=64)
    with pytest.raises(TypeError, match="LinFusion takes no dense_steps"):
        attach(unet, LinFusion(), dense_steps=2)
    with attach(unet, Neighborhood(window=3)), pytest.raises(ValueError, match="cannot also follow LinFusion"):
        attach(unet, LinFusion(reduce=1))
    layers = LinFusion.from_unet(unet, reduce=1)
    layers.save(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="was made for reduce=1, and this is reduce=2"):
        attach(unet, LinFusion(tmp_path / "w.safetensors", reduce=2))
    with pytest.raises(ValueError, match="does not fit this model"):
        other = UNET.build(layers_per_block=2)
        LinFusion.from_unet(other, reduce=1).load(tmp_path / "w.safetensors")
    with layers.mount(), pytest.raises(ValueError, match="neither a second sequence nor a mask"):
        unet(**UNET.inputs(1), attention_mask=torch.ones(1, 140))
    unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="is offloaded part by part; attach first"):
        LinFusion.from_unet(unet)
