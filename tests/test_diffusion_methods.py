"""What holds for every method that attach() takes: it leaves no trace, treats samples alike, and refuses company."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers.models.attention_dispatch import attention_backend  # noqa: E402
from diffusion_models import MODELS, Model  # noqa: E402

from vision_attn import Neighborhood, Radial, attach  # noqa: E402
from vision_attn.diffusion import CLEAR, FreeSwim, LinFusion, Preset, UltraViCo  # noqa: E402
from vision_attn.diffusion.method import Method  # noqa: E402
from vision_attn.diffusion.methods.isolation import IRDiffusion  # noqa: E402
from vision_attn.diffusion.methods.rope import NTK, PI, TASR, RIFLEx, RotaryEdit, YaRN  # noqa: E402


def halves(model: Model) -> torch.Tensor:
    """Masks of one target with a subject in its upper and one in its lower half."""
    lower = (torch.arange(model.grid[-2]) >= model.grid[-2] // 2)[:, None].expand(model.grid[-2:])
    return torch.stack([~lower, lower])[None]


ROTARY = tuple(f"{name}Transformer3DModel" for name in ("Wan", "HunyuanVideo", "LTXVideo", "Cosmos")) + (
    "FluxTransformer2DModel",
)


def edit(cls: type[RotaryEdit], model: Model, **options) -> RotaryEdit:
    """An edit for a model that was trained on less than the grid of its call."""
    trained = {"train_frames": 1} if len(model.grid) == 3 else {"train_size": (2, 2)}
    return cls(**{**trained, **options})


# Name -> how to make it for a tiny model, and the classes it is for. One line per method.
METHODS: dict[str, tuple[Callable[[Model], Method], tuple[str, ...]]] = {
    "preset": (lambda model: Preset(Neighborhood(window=model.window), {"dense_layers": 1}), tuple(MODELS)),
    "freeswim": (
        lambda model: FreeSwim(base=tuple(n // 2 for n in model.grid[-2:])),
        ("WanTransformer3DModel", "LTXVideoTransformer3DModel", "CosmosTransformer3DModel", "PixArtTransformer2DModel"),
    ),
    "ir-diffusion": (lambda model: IRDiffusion(halves(model)), ("UNet2DConditionModel", "WanTransformer3DModel")),
    "clear": (lambda model: CLEAR(2, 2 if model.grid == (6, 8) else None), tuple(MODELS)),
    "linfusion": (lambda model: LinFusion(reduce=1), ("UNet2DConditionModel",)),
    "ultravico": (
        lambda model: UltraViCo(train_frames=1, alpha=0.3),
        tuple(cls for cls, model in MODELS.items() if len(model.grid) == 3),
    ),
    "pi": (lambda model: edit(PI, model), ROTARY),
    "ntk": (lambda model: edit(NTK, model, train_size=(2, 2)), ("WanTransformer3DModel", "FluxTransformer2DModel")),
    "yarn": (lambda model: edit(YaRN, model), ROTARY),
    "tasr": (lambda model: edit(TASR, model), ("WanTransformer3DModel",)),
    "riflex": (lambda model: edit(RIFLEx, model, index=0), ROTARY[:-1]),
}
CASES = [(name, cls) for name, (_, classes) in METHODS.items() for cls in classes]
EVERY = pytest.mark.parametrize("name, cls", CASES, ids=[f"{name}-{cls}" for name, cls in CASES])


@pytest.fixture(autouse=True)
def quiet_inference():
    with torch.no_grad(), warnings.catch_warnings(), attention_backend("native"):
        warnings.filterwarnings("ignore", message=".*CPU autocast.*")
        yield


def run(model: Model, denoiser: torch.nn.Module, batch: int = 1, **changes) -> torch.Tensor:
    torch.manual_seed(0)
    return model.output(denoiser(**{**model.inputs(batch), **changes}))


def trace(denoiser: torch.nn.Module):
    """Everything an attachment might leave behind."""
    modules = {
        name: (type(m), id(m), set(vars(m)), dict(m._forward_hooks), dict(m._forward_pre_hooks))
        for name, m in denoiser.named_modules()
    }
    found = {name: m.processor for name, m in denoiser.named_modules() if hasattr(m, "processor")}
    processors = {name: (type(p), dict(vars(p))) for name, p in found.items()}
    tensors = {name: (id(t), t.data_ptr()) for name, t in denoiser.state_dict(keep_vars=True).items()}
    buffers = {name: (id(t), t.sum().item()) for name, t in denoiser.named_buffers()}
    return modules, processors, tensors, buffers


@EVERY
def test_detach_leaves_no_trace(name: str, cls: str):
    make, model = METHODS[name][0], MODELS[cls]
    denoiser = model.build()
    dense, before = run(model, denoiser), trace(denoiser)
    attached = attach(denoiser, make(model))
    changed = run(model, denoiser)
    assert changed.isfinite().all() and changed.shape == dense.shape and not torch.equal(changed, dense)
    assert str(attached.report) and attached.report.to_dict()
    attached.detach()
    attached.detach()
    assert trace(denoiser) == before
    assert torch.equal(run(model, denoiser), dense)


@EVERY
def test_an_exception_leaves_no_trace(name: str, cls: str):
    make, model = METHODS[name][0], MODELS[cls]
    denoiser = model.build()
    dense, before = run(model, denoiser), trace(denoiser)

    def fail(*_):
        raise RuntimeError("at the end of the denoiser")

    handle = list(denoiser.modules())[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="at the end"), attach(denoiser, make(model)):
        run(model, denoiser)
    handle.remove()
    assert trace(denoiser) == before
    assert torch.equal(run(model, denoiser), dense)


@EVERY
def test_batch_of_two_equals_two_calls(name: str, cls: str):
    make, model = METHODS[name][0], MODELS[cls]
    denoiser = model.build()
    with attach(denoiser, make(model)):
        both, first = run(model, denoiser, batch=2), run(model, denoiser)
    torch.testing.assert_close(both[:1], first, atol=1e-5, rtol=1e-4)
    assert not torch.equal(both[0], both[1])


@EVERY
def test_what_holds_a_part_is_in_the_way_of_another(name: str, cls: str):
    make, model = METHODS[name][0], MODELS[cls]
    denoiser = model.build()
    before = trace(denoiser)
    with attach(denoiser, make(model)):
        changed = run(model, denoiser)
        with pytest.raises(ValueError, match="already has .* attached"):
            attach(denoiser, make(model))
        assert torch.equal(run(model, denoiser), changed)
        with attach(denoiser, make(model), replace=True):
            assert torch.equal(run(model, denoiser), changed)
    assert trace(denoiser) == before


def test_options_that_a_method_does_not_know():
    class Plain(Method):
        def attach(self, target, *, strict=False):
            raise AssertionError("not reached")

    with pytest.raises(TypeError, match="Plain takes no dense_steps; options it knows: strict"):
        attach(MODELS["WanTransformer3DModel"].build(), Plain(), dense_steps=2)


def test_a_pattern_per_layer():
    """Each layer follows its own: what the layers before see is what they would see alone."""
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build()
    local, other = Neighborhood(window=model.window), Neighborhood(window=(1, 1, 1))
    outputs = {}
    for name, pattern in {"both": (local, other), "first": local, "second": other}.items():
        seen = []
        hooks = [block.attn1.register_forward_hook(lambda *a, to=seen: to.append(a[2])) for block in denoiser.blocks]
        with attach(denoiser, pattern) as attached:
            run(model, denoiser)
        outputs[name] = seen
        for hook in hooks:
            hook.remove()
        if name == "both":
            assert [round(d, 3) for d in attached.report.denoisers[0].layers] == [0.3, 0.017]
            assert "layer 0 neighborhood(window=[2, 3, 3]" in str(attached.report)
    assert torch.equal(outputs["both"][0], outputs["first"][0])
    assert not torch.equal(outputs["both"][1], outputs["first"][1])
    with pytest.raises(ValueError, match="3 patterns for 2 layers"):
        attach(denoiser, (local, local, local))


def test_presets_go_through_files(tmp_path):
    preset = Preset((Neighborhood(window=(2, 3, 3)), Radial(decay=0.5)), {"dense_steps": 1}, note="by hand")
    preset.save(tmp_path / "a.json")
    assert Preset.load(tmp_path / "a.json") == preset
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "b.json").write_text('{"method": "preset", "pattern": {"pattern": "nothing"}}')
    for name in ("b.json", "missing.json"):
        with pytest.raises(ValueError, match="cannot be read as a preset"):
            Preset.load(tmp_path / name)


def test_a_preset_knows_its_model():
    flux = MODELS["FluxTransformer2DModel"].build()
    with pytest.raises(ValueError, match="this preset is for WanTransformer3DModel, and the denoiser is Flux"):
        attach(flux, Preset(Neighborhood(window=3), model="WanTransformer3DModel"))
