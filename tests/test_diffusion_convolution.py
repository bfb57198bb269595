"""3-D convolutions by another kernel: the same numbers, gradients and modules."""

import copy

import pytest
import torch

from vision_attn.diffusion.convolution import quick_conv3d

CASES = [
    dict(kernel_size=3),
    dict(kernel_size=(1, 3, 3), padding=(0, 1, 1)),
    dict(kernel_size=(3, 1, 1), stride=(2, 1, 1), bias=False),
    dict(kernel_size=3, dilation=2, groups=2, padding=2),
    dict(kernel_size=3, padding="same"),
    dict(kernel_size=3, padding=1, padding_mode="replicate"),
    dict(kernel_size=1),
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("batch", (1, 2))
def test_same_numbers_and_gradients(options, batch):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(4, 6, **options)
    exact, quick = copy.deepcopy(conv).double(), copy.deepcopy(conv)
    quick_conv3d(quick)
    x = torch.randn(batch, 4, 7, 9, 11)
    grads = {}
    for name, module, given in (("quick", quick, x), ("exact", exact, x.double())):
        given = given.clone().requires_grad_()
        out = module(given)
        out.square().sum().backward()
        grads[name] = out, given.grad, module.weight.grad
    for a, b in zip(*grads.values(), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5 * float(b.detach().abs().max()), rtol=1e-5)


def test_what_is_used_and_what_stays():
    conv = torch.nn.Conv3d(4, 6, 3)
    keys = list(conv.state_dict())
    quick_conv3d(conv)
    assert list(conv.state_dict()) == keys
    x = torch.randn(1, 4, 3, 5, 5)

    def kernels(module, x):
        with torch.profiler.profile() as profile, torch.no_grad():
            module(x)
        return {event.key for event in profile.key_averages()}

    assert "aten::mkldnn_convolution" in kernels(conv, x) and "aten::slow_conv3d_forward" not in kernels(conv, x)
    assert conv.double()(x.double()).dtype == torch.float64  # others as before
    other = copy.deepcopy(conv).float()
    with torch.no_grad():
        other.weight.zero_()
        other.bias.zero_()
    assert not other(x).any() and conv.float()(x).any()  # the copy computes with its own weights


def test_the_built_in_model_decodes_the_same():
    from diffusers import AutoencoderKLWan

    from vision_attn.diffusion.loading import BUILT_IN, load

    plain = AutoencoderKLWan.from_pretrained(BUILT_IN / "vae").eval()
    latents = torch.randn(1, 16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, out = plain.decode(latents).sample, load(device="cpu").pipe.vae.decode(latents).sample
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
