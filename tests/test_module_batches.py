"""Images of a batch do not see each other, however many there are."""

from __future__ import annotations

import pytest
import torch

from vision_attn.modules import (
    BiLevelRoutingAttention,
    LinearAttention2d,
    NeighborhoodAttention,
    QuadrangleAttention,
    VariedWindowAttention,
    WindowAttention2d,
)

KINDS = ("elu", "relu", "mala", "rala", "inline", "l2vit", "slab", "flow", "care", "nala", "lightnet", "gla")
LAYERS = {
    "neighborhood": lambda: NeighborhoodAttention(32, 4, window=5),
    "routing": lambda: BiLevelRoutingAttention(32, 4, regions=4, topk=2),
    "routing nchw": lambda: BiLevelRoutingAttention(32, 4, regions=4, topk=2, form="nchw"),
    "varied window": lambda: VariedWindowAttention(32, 4, window=4),
    "quadrangle": lambda: QuadrangleAttention(32, 4, window=4),
    "window": lambda: WindowAttention2d(32, 4, window=4, shift=2),
    **{kind: lambda kind=kind: LinearAttention2d(32, 4, kind=kind) for kind in KINDS},
}


@pytest.mark.parametrize("name", LAYERS)
def test_images_do_not_see_each_other(name):
    layer, x = LAYERS[name]().eval(), torch.randn(2, 12, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = layer(x[:1])
        x[1] = torch.nan
        torch.testing.assert_close(layer(x)[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gradient", [False, True])
def test_no_images(name, gradient):
    layer, x = LAYERS[name](), torch.empty(0, 12, 9, 32, requires_grad=gradient)
    with torch.set_grad_enabled(gradient):
        out = layer(x)
    assert out.shape == x.shape
    if gradient:
        out.sum().backward()
        assert x.grad.shape == x.shape
