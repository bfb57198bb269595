"""The masked backend: small grids only, biases with gradients, tokens that are not finite. Random problems are in
test_kernels_backends.py."""

import pytest
import torch

from vision_attn import BlockList, Circle, Dense, LengthDecay, Neighborhood, Window, attend, explain
from vision_attn.kernels.backends import masked, refuse
from vision_attn.kernels.problem import Problem


def test_small_grids_use_it_and_larger_ones_do_not():
    assert explain(Neighborhood(7), (14, 14)).used == "masked"
    assert explain(Neighborhood(7), (16, 16), heads=8, batch=8).used != "masked"  # enough to compile for
    assert "at most 256 tokens" in " ".join(refuse("masked", Problem(Neighborhood(7), (17, 16))))
    assert explain(Dense(), (14, 14)).used == "tiled"


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(device="cuda"), "only cpu"),
        (dict(extra=3), "no extra tokens"),
        (dict(return_lse=True), "no log-sum-exp"),
        (dict(pattern=LengthDecay(1)), "no score rule"),
    ],
)
def test_what_it_cannot_do_is_said(changes, reason):
    assert reason in " ".join(masked.limits(Problem(**({"pattern": Neighborhood(3), "grid": (5, 5)} | changes))))


def test_block_lists_are_left_to_others():
    index = torch.zeros(1, 1, dtype=torch.int32)
    pattern = BlockList(16, index, torch.ones(1, dtype=torch.int32))
    assert "no BlockList" in " ".join(masked.limits(Problem(pattern, (4, 4))))


@pytest.mark.parametrize("pattern", [Neighborhood((3, 5), dilation=(2, 1)), Window((3, 4), shift=(1, 2))])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_bias_and_its_gradient(pattern, kv_heads):
    torch.manual_seed(0)
    q = torch.randn(2, 7, 11, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 7, 11, kv_heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(pattern.bias_shape((7, 11), 4), dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("masked", "reference"):
        out = attend(q, k, v, pattern, bias=bias, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pattern", [Neighborhood(3), Circle(2)])
def test_a_bad_token_reaches_only_who_sees_it(pattern):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 6, 7, 2, 4)
    k[0, 2, 3, 1, 0] = float("nan")
    v[0, 5, 6, 0, 2] = float("inf")
    got, want = (attend(q, k, v, pattern, backend=b) for b in ("masked", "reference"))
    assert want.isnan().any() and not want.isnan().all()
    torch.testing.assert_close(got, want, equal_nan=True)


def test_in_a_compiled_graph():
    q = torch.randn(1, 5, 6, 2, 4, requires_grad=True)
    bias = torch.randn(2, 5, 5, requires_grad=True)

    def call(q, bias):
        return attend(q, q, q, Neighborhood(3), bias=bias, backend="masked").square().sum()

    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(call, backend="aot_eager", fullgraph=True)(q, bias), (q, bias))
    torch.testing.assert_close(got, torch.autograd.grad(call(q, bias), (q, bias)))
