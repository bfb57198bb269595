"""CLEAR against a masked softmax written from its definition, its weights in files, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import FluxTransformer2DModel  # noqa: E402
from diffusion_models import MODELS  # noqa: E402

from vision_attn import attach  # noqa: E402
from vision_attn.diffusion import CLEAR  # noqa: E402

FLUX = MODELS["FluxTransformer2DModel"]  # 6 text tokens, then 6 x 8 image tokens


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def seen_by(radius: int, grid=(6, 8), text: int = 6) -> torch.Tensor:
    """Who sees whom, `[text + image, text + image]`, from the words of the paper."""
    at = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    mask = torch.ones(text + len(at), text + len(at), dtype=torch.bool)
    for i, (y, x) in enumerate(at):
        for j, (v, u) in enumerate(at):
            mask[text + i, text + j] = (y - v) ** 2 + (x - u) ** 2 < radius**2
    return mask


def by_definition(q, k, v, radius: int, cell: int | None, weight=None, factor: float = 1.0, grid=(6, 8), text: int = 6):
    """`[batch, heads, tokens, dim]` in float64; pooled tokens are seen by image tokens only."""
    q, k, v = q.double(), k.double(), v.double()
    mask = seen_by(radius, grid, text)
    if cell is not None:
        weight = torch.full((cell, cell), 1 / cell**2) if weight is None else weight
        pooled = []
        for x in (k, v):
            image = x[:, :, text:].unflatten(2, grid)
            cells = [
                sum(
                    weight[i, j].double() * image[:, :, y * cell + i, u * cell + j]
                    for i in range(cell)
                    for j in range(cell)
                )
                for y in range(grid[0] // cell)
                for u in range(grid[1] // cell)
            ]
            pooled.append(torch.stack(cells, 2))
        k, v = torch.cat([k, pooled[0]], 2), torch.cat([v, pooled[1]], 2)
        extra = torch.zeros(len(mask), pooled[0].shape[2], dtype=torch.bool)
        extra[text:] = True
        mask = torch.cat([mask, extra], 1)
    scores = q @ k.mT * (factor / math.sqrt(q.shape[-1]))
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


class Spy(torch.overrides.TorchFunctionMode):
    """Keeps q, k, v and the result of attention calls; put inside an attachment it sees what the model asked for."""

    def __init__(self, replace=None):
        super().__init__()
        self.calls, self.replace = [], replace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (args + tuple((kwargs or {})[n] for n in ("query", "key", "value") if n in (kwargs or {})))[:3]
        out = self.replace(len(self.calls), q, k, v)
        self.calls.append((q, k, v))
        return out.to(q.dtype)


def expected(model, batch: int, radius: int, cell, weights=None, factor=1.0, **changes):
    """The whole model with every attention call computed by definition."""
    weights = weights or {}
    spy = Spy(lambda i, q, k, v: by_definition(q, k, v, radius, cell, weights.get(f"pool.{i}"), factor))
    with spy:
        out = model(**{**FLUX.inputs(batch), **changes}).sample
    assert len(spy.calls) == 2
    return out


@pytest.mark.parametrize("radius, cell", [(1, None), (3, None), (3, 2), (20, 2), (2, 2)])
def test_flux_follows_the_definition(radius, cell):
    model = FLUX.build()
    with attach(model, CLEAR(radius, cell)) as run:
        out = model(**FLUX.inputs(2)).sample
    torch.testing.assert_close(out, expected(model, 2, radius, cell), atol=2e-5, rtol=1e-4)
    assert run.report.pattern == {"pattern": "circle", "radius": radius, "pooled": cell}
    assert run.report.denoisers[0].calls == {"sparse": 2, "dense": 0}


def test_every_layer_has_a_weight_of_its_own_per_place_in_a_cell():
    model = FLUX.build()
    with attach(model, CLEAR(2, 2)) as run:
        start = model(**FLUX.inputs(2)).sample
        generator = torch.Generator().manual_seed(3)
        weights = {f"pool.{i}": torch.randn(2, 2, generator=generator) for i in range(2)}
        for name, weight in weights.items():
            run.trainable[name].copy_(weight)
        out = model(**FLUX.inputs(2)).sample
    torch.testing.assert_close(out, expected(model, 2, 2, 2, weights), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(out, start, atol=1e-3)


@pytest.mark.parametrize("cell, keys", [(None, 54), (2, 10 * (54 + 12))])
def test_proportional_attention_counts_what_is_seen(cell, keys):
    """The factor is sqrt of the logarithm to the base of the training length; ten times the keys with pooled cells."""
    model = FLUX.build()
    with attach(model, CLEAR(3, cell), temperature="proportional", train_tokens=30):
        out = model(**FLUX.inputs(1)).sample
    factor = math.sqrt(math.log(keys, 30))
    torch.testing.assert_close(out, expected(model, 1, 3, cell, factor=factor), atol=2e-5, rtol=1e-4)


def test_ntk_is_a_model_with_another_base():
    """FLUX takes its base as an argument of the rotary module, so the oracle is that module made with ten times it."""
    model, other = FLUX.build(), FLUX.build()
    other.pos_embed = type(other.pos_embed)(theta=100_000, axes_dim=other.pos_embed.axes_dim)
    with attach(model, CLEAR(3, ntk=10)), attach(other, CLEAR(3)):
        torch.testing.assert_close(model(**FLUX.inputs(1)).sample, other(**FLUX.inputs(1)).sample)
    assert model.pos_embed.theta == 10_000 and type(model.pos_embed.theta) is int
    with pytest.raises(ValueError, match="FLUX's rotary embeddings, and WanTransformer3DModel has none"):
        attach(MODELS["WanTransformer3DModel"].build(), CLEAR(3, ntk=10))


def test_bf16_is_finite_and_close():
    model = FLUX.build().bfloat16()
    call = {
        name: x.bfloat16() if name not in ("timestep", "img_ids", "txt_ids") else x
        for name, x in FLUX.inputs(2).items()
    }
    with attach(model, CLEAR(3, 2)):
        out = model(**call).sample
    exact = FLUX.build()
    with attach(exact, CLEAR(3, 2)):
        assert (out.float() - exact(**FLUX.inputs(2)).sample).abs().max() < 0.1 * out.float().abs().max()


def trained(model: FluxTransformer2DModel, path) -> torch.Tensor:
    """Change everything that can be trained, keep it in a file; returns what the model says then."""
    student = copy.deepcopy(model)
    with attach(student, CLEAR(3, 2)) as run:
        for i, parameter in enumerate(run.trainable.values()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        run.save(path)
        return student(**FLUX.inputs(1)).sample


def test_weights_go_through_a_file_and_come_out_again(tmp_path):
    model = FLUX.build()
    dense, plain = model(**FLUX.inputs(1)).sample, {n: id(p) for n, p in model.named_parameters()}
    out = trained(model, tmp_path / "w.safetensors")
    assert torch.equal(model(**FLUX.inputs(1)).sample, dense)  # the student was a copy
    run = attach(model, CLEAR(3, 2, weights=tmp_path / "w.safetensors"))
    assert torch.equal(model(**FLUX.inputs(1)).sample, out)
    assert run.report.options["weights"].endswith("w.safetensors")
    model.double().float()  # moved while attached, as pipe.to() does
    run.detach()
    assert {n: id(p) for n, p in model.named_parameters()} == plain
    assert torch.equal(model(**FLUX.inputs(1)).sample, dense)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_file_holds_projections_of_the_image_stream_and_nothing_else(tmp_path):
    from safetensors import safe_open

    trained(FLUX.build(), tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        names = set(file.keys())
    double = {
        f"transformer_blocks.0.attn.{p}.{k}" for p in ("to_q", "to_k", "to_v", "to_out.0") for k in ("weight", "bias")
    }
    single = {f"single_transformer_blocks.0.attn.{p}.{k}" for p in ("to_q", "to_k", "to_v") for k in ("weight", "bias")}
    assert names == double | single | {"pool.0", "pool.1"}


def test_files_that_do_not_fit(tmp_path):
    model, path = FLUX.build(), tmp_path / "w.safetensors"
    dense = model(**FLUX.inputs(1)).sample
    trained(model, path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    cases = [
        (CLEAR(3, 2, weights=bad), model, "cannot be read as weights"),
        (CLEAR(3, 2, weights=tmp_path / "missing"), model, "cannot be read as weights"),
        (CLEAR(4, 2, weights=path), model, "was made for radius=3, and this is radius=4"),
        (CLEAR(3, weights=path), model, "was made for pooled=2, and this is pooled=None"),
        (
            CLEAR(3, 2, weights=path),
            MODELS["SD3Transformer2DModel"].build(),
            "was made for model=FluxTransformer2DModel",
        ),
        (CLEAR(3, 2, weights=path), FLUX.build(num_layers=2), "does not fit this model: .* of .* tensors"),
    ]
    for method, target, message in cases:
        with pytest.raises(ValueError, match=message):
            attach(target, method)
    assert torch.equal(model(**FLUX.inputs(1)).sample, dense)


def test_a_model_that_is_moved_part_by_part(tmp_path):
    model = FLUX.build()
    trained(model, tmp_path / "w.safetensors")
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="attach first, then enable sequential or group offload"):
        attach(model, CLEAR(3, 2, weights=tmp_path / "w.safetensors"))


def test_options_out_of_range():
    for options, message in [
        (dict(radius=0), "radius must be at least 1"), (dict(pooled=1), "pooled must be at least 2"),
        (dict(ntk=0.5), "ntk must be a number of at least 1"), (dict(ntk=float("nan")), "ntk must be"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            CLEAR(**options)
    with pytest.raises(TypeError, match="weights must be the path"):
        CLEAR(weights=3)
    model = FLUX.build()
    with attach(model, CLEAR(3, 4)), pytest.raises(ValueError, match="6 x 8 tokens cannot be pooled in cells of 4 x 4"):
        model(**FLUX.inputs(1))


def test_gradients_reach_what_is_trainable():
    model = FLUX.build()
    with torch.enable_grad(), attach(model, CLEAR(3, 2)) as run:
        for parameter in run.trainable.values():
            parameter.requires_grad_(True)
        model(**FLUX.inputs(1)).sample.square().sum().backward()
        missing = [
            name for name, parameter in run.trainable.items() if parameter.grad is None or not parameter.grad.any()
        ]
    # a bias of keys moves all scores of a row alike, but for the norm and the rotation that follow it here
    assert not missing
