"""Every backend against the float64 reference: random problems, compiled graphs, memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention

from vision_attn import BlockList, Dense, Neighborhood, Radial, Window, attend
from vision_attn.kernels.backends import BACKENDS, flex, natten, refuse
from vision_attn.kernels.problem import Problem
from vision_attn.kernels.testing import Case, error

CASES, PER_TEST = 1000, 25


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that is allocated and not written reads as NaN, so that an output left out cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["reference", "tiled", "masked", "cpu"])
@pytest.mark.parametrize("pattern", [Neighborhood(window=3), Window(size=4), Radial(decay=0.5)], ids=str)
def test_inference_mode_leaves_nothing_that_a_gradient_trips_over(backend, pattern):
    """What is kept for the next call was made in the one before, with whatever mode that ran in."""
    grid = (3, 8, 8) if isinstance(pattern, Radial) else (8, 8)
    q, k, v = torch.randn(3, 1, *grid, 2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    for mode in (torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            out = attend(q, k, v, pattern, backend=backend)
        if mode is torch.enable_grad:
            out.sum().backward(retain_graph=True)


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """FlexAttention evaluated pair by pair: the layouts and predicates are ours, compiling is tested apart."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(flex, "_compiled", lambda problem, device: flex._call)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, CASES, PER_TEST))
def test_random_problems(first, uncompiled_flex):
    compared = dict.fromkeys(BACKENDS, 0)
    for seed in range(first, first + PER_TEST):
        case = Case(seed)
        for backend in BACKENDS:
            # uncompiled FlexAttention tests every pair and never looks at the blocks
            if not (backend == "flex" and isinstance(case.parts["pattern"], BlockList)):
                compared[backend] += case.compare(backend) > 0
    assert compared["tiled"] == compared["reference"] == PER_TEST
    assert compared["flex"], "no case of this batch reached flex"


def test_a_wrong_backend_is_caught(monkeypatch):
    """The sweep can fail: a backend that drops one key, forgets the scale, or leaves a row unwritten is reported."""
    real = BACKENDS["tiled"].run

    def forgets_scale(problem, q, k, v, scale, *rest):
        return real(problem, q, k, v, scale * 1.01, *rest)

    def leaves_a_row(problem, *rest):
        out, lse = real(problem, *rest)
        out = out.clone()
        out.view(-1)[:1] = torch.empty(1, dtype=out.dtype)
        return out, lse

    for wrong in (forgets_scale, leaves_a_row):
        monkeypatch.setattr(BACKENDS["tiled"], "run", wrong)
        with pytest.raises(AssertionError, match="off by"):
            for seed in range(5):
                Case(seed).compare("tiled")


def compare(q, k, v, pattern, backend, **options):
    wide, wide_options = [t.double() for t in (q, k, v)], dict(options)
    if "extra_kv" in options:
        options["extra_kv"] = tuple(options["extra_kv"])
        wide_options["extra_kv"] = tuple(t.double() for t in options["extra_kv"])
    want = attend(*wide, pattern, backend="reference", **wide_options)
    plain = attend(q, k, v, pattern, backend="reference", **options)
    got = attend(q, k, v, pattern, backend=backend, **options)
    assert error(got, want) <= 8 * max(error(plain, want), torch.finfo(q.dtype).eps)


@pytest.mark.skipif(bool(flex.missing("cpu")), reason="; ".join(flex.missing("cpu")))
def test_flex_compiled_neighborhood():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 13, 11, 4, 16), torch.randn(2, 5, 13, 11, 2, 16), torch.randn(2, 5, 13, 11, 2, 16)
    extra, visible = (torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)), torch.rand(2, 7) < 0.5
    pattern = Neighborhood((3, 5, 1), dilation=(1, 2, 3), causal=(True, False, False))
    compare(q, k, v, pattern, "flex", extra_kv=extra, extra_mask=visible)


@pytest.mark.skipif(bool(flex.missing("cpu")), reason="; ".join(flex.missing("cpu")))
def test_flex_compiled_block_list():
    """Full blocks skip the test, the last one is short, one row is empty."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 50, 2, 16)
    index = torch.tensor([[0, 3], [3, 1], [2, 0], [3, 1]])
    pattern = BlockList(16, index, torch.tensor([2, 2, 2, 0]), torch.tensor([1, 2, 0, 0]), within=Neighborhood(3))
    compare(q, k, v, pattern, "flex")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern, grid", [
    (Neighborhood(5), (20, 13)), (Window(5, 2), (16, 16)), (Radial(block=16, thin=8), (5, 50)),
    (BlockList.from_mask(torch.ones(2, 2, 4, 2, dtype=torch.bool), (16, 32)), (50,)),
])  # fmt: skip
def test_flex_compiled(pattern, grid, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, *grid, 2, 12).to(dtype)
    compare(q, k, v, pattern, "flex", extra_kv=torch.randn(2, 2, 70, 2, 12).to(dtype))


@pytest.mark.parametrize(
    "pattern", [Neighborhood(4, 3, 2), Neighborhood((3, 6), causal=True, dilation=(2, 1)), Radial(0.5, 4, thin=4)]
)
def test_flex_blocks_from_intervals(pattern):
    """The block mask visits every allowed pair, and calls a block full only when all of it is allowed."""
    grid = (9, 10)
    layout = flex._layout(pattern, grid, 5, torch.device("cpu"))
    mask, want = layout.block_mask(None), pattern.mask(grid)
    place = torch.arange(90) if layout.places is None else layout.places
    query, key = place[:, None], place[None] + layout.start
    visited = mask.to_dense()[0, 0].bool()
    full = torch.zeros_like(visited)
    for row, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        full[row, mask.full_kv_indices[0, 0, row, :count].long()] = True
    visited, full = (m[query // mask.BLOCK_SIZE[0], key // mask.BLOCK_SIZE[1]] for m in (visited, full))
    assert torch.equal(visited & (full | mask.mask_mod(0, 0, query, key)), want)
    assert (visited | ~want).all() and (want | ~full).all()
    assert not visited.all() or not full.all()


@pytest.mark.skipif(bool(natten.missing("cpu")), reason="; ".join(natten.missing("cpu")))
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(80))
def test_natten_is_a_witness(seed, uncompiled_flex):
    """An implementation that others wrote agrees on what a neighborhood is."""
    import random

    pick = random.Random(seed)
    grid = tuple(pick.randint(2, 9) for _ in range(pick.choice((1, 2, 3))))
    dilation = tuple(pick.randint(1, n // 2) for n in grid)
    window = tuple(pick.randint(2, n // d) for n, d in zip(grid, dilation, strict=True))
    stride = tuple(pick.randint(1, w) for w in window)
    causal = tuple(pick.random() < 0.3 and window != grid for _ in grid)
    pattern = Neighborhood(window, stride, dilation, causal)
    q, k, v = torch.randn(3, 1, *grid, 2, 8)
    out, lse = attend(q, k, v, pattern, return_lse=True, backend="natten")
    want, want_lse = attend(q.double(), k.double(), v.double(), pattern, return_lse=True, backend="reference")
    assert error(out, want) < 2e-6 and error(lse, want_lse) < 2e-6


LEAVES = {"q": (2, 6, 7, 4, 8), "k": (2, 6, 7, 2, 8), "v": (2, 6, 7, 2, 8), "ek": (2, 3, 2, 8), "ev": (2, 3, 2, 8)}


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("pattern", [
    Neighborhood((3, 5), dilation=(2, 1)), Dense(), Radial(block=4, thin=4),
    BlockList.from_mask(torch.eye(4, dtype=torch.bool), 11, Neighborhood(3)),
], ids=lambda p: p.name)  # fmt: skip
def test_compiles_in_one_graph(pattern, lse, mode):
    torch.manual_seed(0)
    torch._dynamo.reset()
    leaves = [torch.randn(s, requires_grad=True) for s in LEAVES.values()]
    visible = torch.rand(2, 3) < 0.5

    def model(q, k, v, ek, ev):
        result = attend(q * 2, k, v, pattern, extra_kv=(ek, ev), extra_mask=visible, return_lse=lse)
        return (result[0].sin().sum() + result[1].sin().sum()) if lse else result.sin().sum()

    compiled = torch.compile(model, backend=mode, fullgraph=True)
    want = torch.autograd.grad(model(*leaves), leaves)
    for got, grad in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        torch.testing.assert_close(got, grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), model(*leaves))


def test_compiled_graph_follows_the_pattern():
    """A pattern that changes on the module, or is made inside the graph, is not baked in."""
    torch._dynamo.reset()

    class Model(torch.nn.Module):
        def forward(self, q):
            return attend(q, q, q, self.pattern) + attend(q, q, q, Neighborhood(window=(3, 3)))

    model, q = Model(), torch.randn(1, 8, 8, 2, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for model.pattern in (Neighborhood(5), Neighborhood(3), Radial(block=8, thin=4), Dense()):
        assert torch.equal(compiled(q), model(q))
    model.pattern = Neighborhood(9)
    with pytest.raises(ValueError, match="larger than the grid"):
        compiled(q)


def test_reference_backward_in_a_graph():
    torch._dynamo.reset()
    q = torch.randn(1, 6, 2, 8, requires_grad=True)

    def model(q):
        return attend(q, q, q, Neighborhood(3), backend="reference").sin().sum()

    want = torch.autograd.grad(model(q), q)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(model, backend="eager", fullgraph=True)(q), q), want)
    assert refuse("flex", Problem(Neighborhood(3), (64, 64), device="cuda", needs_grad=True, in_graph=True))[
        -1
    ].startswith("no gradients")


PROBE = """
import resource, sys, torch
torch.set_num_threads(1)
from vision_attn import attend, Neighborhood, Radial
pattern, grid, lse, grad = eval(sys.argv[1])
q, k, v = (torch.randn(1, *grid, 2, 32, requires_grad=grad) for _ in range(3))
small = torch.randn(1, 16, *[8] * (len(grid) - 1), 2, 32, requires_grad=grad)
def run(q, k, v, pattern):
    out = attend(q, k, v, pattern, return_lse=lse)
    if grad:
        (out[0] if lse else out).sum().backward()
run(small, small, small, type(pattern)() if isinstance(pattern, Radial) else Neighborhood(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(q, k, v, pattern)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory the way Linux reports it")
@pytest.mark.parametrize("problem, allowed", [
    ("Neighborhood(13), (128, 128), False, False", 60),
    ("Neighborhood(13), (128, 128), True, True", 90),
    ("Radial(0.2, 64), (8, 32, 32), False, True", 80),
])  # fmt: skip
def test_memory_stays_far_below_all_pairs(problem, allowed):
    """16384 tokens: one bool per pair would be 256 MB, one float32 per pair and head 2 GB. 8192: a quarter."""
    ran = subprocess.run([sys.executable, "-c", PROBE, problem], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < allowed


def test_autocast_does_not_change_the_dtype():
    q, k, v = torch.randn(3, 1, 8, 8, 2, 16)
    want = attend(q, k, v, Neighborhood(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k, v, Neighborhood(3)), want)


def test_inputs_that_require_grad_run_forward_only_backends_without_grad(uncompiled_flex):
    q = torch.randn(1, 8, 8, 2, 16, requires_grad=True)
    with torch.no_grad():
        got = attend(q, q, q, Neighborhood(3), backend="flex")
        assert error(got, attend(q, q, q, Neighborhood(3), backend="reference").double()) < 2e-6
