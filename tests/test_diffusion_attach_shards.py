"""A denoiser over two processes, by `attach(..., parallel=Shards(...))` or by diffusers' Ulysses parallelism, gives
what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
from diffusion_models import MODELS  # noqa: E402
from test_kernels_parallel import processes  # noqa: E402

from vision_attn import Circle, Dense, Neighborhood, Radial, Shards, attach  # noqa: E402

WAN, FLUX, QWEN = "WanTransformer3DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"
LTX = "LTXVideoTransformer3DModel"
VIDEO, IMAGE = Neighborhood(window=(3, 3, 3)), Neighborhood(window=3)
# name -> class, pattern, axis, options of attach. Grids are (3, 4, 5) and (6, 8), so some axes do not divide.
CASES = {
    "frames": (WAN, VIDEO, 0, {}),
    "rows": (WAN, Neighborhood(window=(2, 3, 3)), 1, {}),
    "columns": (WAN, VIDEO, 2, {"dense_layers": 1, "temperature": 1.2}),
    "radial": (WAN, Radial(decay=0.1, block=2, thin=8), 0, {}),
    "dense": (WAN, Dense(), 1, {}),
    "ltx": (LTX, VIDEO, 2, {}),
    "guided": (LTX, VIDEO, 1, {"calls": "cond"}),
    "flux": (FLUX, IMAGE, 0, {"dense_layers": 1}),
    "flux disc": (FLUX, Circle(radius=2, pooled=2), 1, {"temperature": "proportional", "train_tokens": 30}),
    "qwen": (QWEN, IMAGE, 1, {"dense_layers": 1}),
}

# name -> class, attach before enabling parallelism, kind of parallelism
ULYSSES = {
    "Wan": (WAN, False, "ulysses_degree"),
    "Flux": (FLUX, False, "ulysses_degree"),
    "QwenImage": (QWEN, False, "ulysses_degree"),
    "LTX": (LTX, False, "ulysses_degree"),
    "ring": (WAN, False, "ring_degree"),
    "attached first": (FLUX, True, "ulysses_degree"),
}


def hooked(denoiser: torch.nn.Module) -> list[str]:
    return [n for n, m in denoiser.named_modules() if hasattr(m, "_diffusers_hook") or "forward" in vars(m)]


def announced(denoiser: torch.nn.Module, given: dict) -> torch.Tensor:
    """A call whose batch is `[uncond, cond]`."""
    with denoiser.cache_context("cond_uncond"):
        return denoiser(**given)[0]


def compare(rank: int) -> dict[str, list[float]]:
    """Per case the largest difference to one process, the effect of the pattern, and whether detaching left a trace."""
    found = {}
    for name, (cls, pattern, axis, options) in CASES.items():
        model = MODELS[cls]
        denoiser, given = model.build(), {**model.inputs(2, pad=model.padded), "return_dict": False}
        with torch.no_grad():
            dense, before = denoiser(**given)[0], hooked(denoiser)
            with attach(denoiser, pattern, strict=True, **options) as run:
                sparse, alone = announced(denoiser, given), run.report
            with attach(denoiser, pattern, strict=True, parallel=Shards(axis), **options) as run:
                out, shared = announced(denoiser, given), run.report
            again = denoiser(**given)[0]
        assert shared.options.pop("parallel") == {"axis": axis, "ranks": 2}
        assert shared.denoisers[0].kept == pytest.approx(alone.denoisers[0].kept, rel=1e-9)
        assert torch.equal(dense, again) and hooked(denoiser) == before
        found[name] = [float((out - sparse).abs().max()), float((sparse - dense).abs().max())]
    return found


def gradients(rank: int) -> float:
    """Gradients of every parameter, summed over the ranks, against those of one process."""
    model, found = MODELS[WAN], []
    given = {**model.inputs(1), "return_dict": False}
    for parallel in (None, Shards(axis=2)):
        denoiser = model.build().requires_grad_().double()
        double = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
        with attach(denoiser, VIDEO, parallel=parallel, dense_layers=(1,)):
            denoiser(**double)[0].square().sum().backward()
        found.append({name: p.grad for name, p in denoiser.named_parameters()})
    far = []
    for name, whole in found[0].items():
        share = found[1][name]
        torch.distributed.all_reduce(share)
        far.append(float((share - whole).abs().max() / whole.abs().max().clamp(min=1e-12)))
    return max(far)


def refused(rank: int) -> list[str]:
    """What is said where a model cannot be cut."""
    said = []

    def call(cls: str, shards: Shards, pattern=IMAGE, more=None, grad: bool = False) -> None:
        model = MODELS[cls]
        with attach(denoiser := model.build(), pattern, parallel=shards), torch.set_grad_enabled(grad):
            denoiser(**{**model.inputs(1), **(more or {})})

    flux = MODELS[FLUX].inputs(1)
    appended = {
        "hidden_states": torch.cat([flux["hidden_states"]] * 2, 1),
        "img_ids": torch.cat([flux["img_ids"], flux["img_ids"] + torch.tensor([1, 0, 0])]),
    }
    for wrong in (
        lambda: call("CogVideoXTransformer3DModel", Shards(0), VIDEO),
        lambda: call(FLUX, Shards(2)),
        lambda: call(FLUX, Shards(0), grad=True),
        lambda: call(FLUX, Shards(0), more=appended),
        lambda: call(FLUX, Shards(0), more={"controlnet_block_samples": [torch.zeros(1, 48, 32)]}),
        lambda: call(WAN, Shards(0), VIDEO, more={"hidden_states": torch.randn(1, 4, 1, 8, 10)}),
        lambda: call(WAN, Shards(0), Circle(radius=2)),
        lambda: attach(MODELS[WAN].build(), VIDEO, parallel=2),
    ):
        try:
            wrong()
            said.append("nothing")
        except (ValueError, TypeError) as error:
            said.append(str(error))
    return said


def ulysses(rank: int) -> dict[str, list[float] | str]:
    """As `compare`, or what is said where a kind of parallelism is refused."""
    torch.accelerator.device_count = lambda: 2  # diffusers expects accelerators; these are CPU processes
    found = {}
    for name, case in ULYSSES.items():
        try:
            found[name] = by_diffusers(*case)
        except ValueError as error:
            found[name] = str(error)
    return found


def by_diffusers(cls: str, attach_first: bool, degree: str) -> list[float]:
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    model = MODELS[cls]
    given = {**model.inputs(2, pad=True), "return_dict": False}  # with a mask where the class takes one
    for name in given if given["encoder_hidden_states"].shape[1] % 2 else ():  # both ranks have as much of the text
        if name.startswith("encoder_"):
            given[name] = torch.cat([given[name], given[name][:, :1]], 1)
    pattern = Neighborhood(window=model.window)
    with torch.no_grad():
        dense = model.build()(**given)[0]
        alone, shared = model.build(), model.build()
        with attach(alone, pattern, strict=True):
            sparse = alone(**given)[0]
        run = attach(shared, pattern, strict=True) if attach_first else None
        shape = (2, 1) if degree == "ring_degree" else (1, 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
        shared.enable_parallelism(config=ContextParallelConfig(**{degree: 2}, mesh=mesh))
        run = run or attach(shared, pattern, strict=True)
        out = shared(**given)[0]
    assert run.report.denoisers[0].calls == {"sparse": model.calls, "dense": 0}
    return [float((out - sparse).abs().max()), float((sparse - dense).abs().max())]


def work(rank: int) -> dict[str, object]:
    return {"compare": compare(rank), "gradients": gradients(rank), "refused": refused(rank), "ulysses": ulysses(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return processes(work, 2, folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(found, name):
    for rank in found:
        difference, effect = rank["compare"][name]
        assert difference < 1e-5, rank["compare"]
        assert effect > 1e-3 or name == "dense"


def test_gradients_add_up(found):
    assert max(rank["gradients"] for rank in found) < 1e-5  # Wan computes its norms in float32


def test_what_cannot_be_cut_is_refused(found):
    for rank in found:
        for text, part in zip(
            rank["refused"],
            (
                "these can be cut: Wan", "axes 0 to 1", "run under torch.no_grad()", "appended images",
                "controlnet_block_samples cannot be cut", "has 1 rows along axis 0, fewer than the 2 ranks",
                "nothing is gained by cutting frames", "parallel must be Shards",
            ),
            strict=True,
        ):  # fmt: skip
            assert part in text, (part, text)


@pytest.mark.parametrize("name", ULYSSES)
def test_ulysses_gives_what_one_process_gives_and_the_rest_is_refused(found, name):
    said = {"ring": "use ulysses_degree instead", "attached first": "attach after it"}
    for rank in found:
        got = rank["ulysses"][name]
        if name in said:
            assert said[name] in got
        else:
            assert not isinstance(got, str), got
            assert got[0] < 1e-5 < 1e-3 < got[1]


def test_without_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        attach(MODELS[WAN].build(), VIDEO, parallel=Shards())
