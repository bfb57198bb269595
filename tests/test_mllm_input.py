"""Methods that drop tokens before the text model: each against its formula, and what they read of vision towers."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")
import transformers as hf  # noqa: E402
from vlm_models import IMAGE, PATCH, PRUNED, SIDE, START, TOWER, VIDEO, VLM, VLMS, generate, single  # noqa: E402

from vision_attn.mllm import (  # noqa: E402
    M3ID,
    VHR,
    VTCCLS,
    CDPruner,
    DivPrune,
    FasterVLM,
    FastV,
    HoloV,
    KVPrune,
    PruMerge,
    PruMergePlus,
    RandomPrune,
    VisionZip,
    VisPruner,
    attach,
)
from vision_attn.mllm.image import Image  # noqa: E402
from vision_attn.mllm.method import InputPrune  # noqa: E402
from vision_attn.mllm.towers import TowerLayer, attention_modules  # noqa: E402

EVERY = pytest.mark.parametrize("vlm", PRUNED, ids=lambda vlm: vlm.name)
CLOSE = dict(atol=1e-5, rtol=1e-4)


pytestmark = pytest.mark.usefixtures("inference")


@dataclasses.dataclass(frozen=True)
class Probe(InputPrune):
    """Keeps the first tokens, and every image it was shown."""

    layers: tuple[int, ...] = (0, 1)
    images: list[Image] = dataclasses.field(default_factory=list)
    looks: ClassVar[tuple[str, ...]] = ("attention", "keys", "vision")

    def tower_layers(self, count: int, cls: bool) -> tuple[int, ...]:
        return self.layers

    def select(self, image: Image, keep: int) -> torch.Tensor:
        self.images.append(image)
        return torch.arange(keep)


def probed(vlm: VLM, rows: list[list[int | str]], model: Any = None, **options: Any) -> list[Image]:
    probe = Probe(**options)
    model = model or vlm.build()
    with attach(model, probe):
        generate(model, vlm.inputs(rows), tokens=1)
    return probe.images


# What methods are shown of a vision tower


@EVERY
def test_the_rows_of_the_tower_project_to_the_features(vlm: VLM):
    """So every family has the right rows for every token, in the right order, and only newline tokens are left out."""
    images = probed(vlm, [["image", 2, "image"], [4], [3, "image"]])
    assert len(images) == 3
    for image in images:
        assert len(image.features) == vlm.tokens - vlm.newlines
        torch.testing.assert_close(image.project(image.vision), image.features, **CLOSE)
    assert not torch.allclose(images[0].features, images[1].features)


@EVERY
def test_a_token_has_the_mean_of_its_patches(vlm: VLM, monkeypatch: pytest.MonkeyPatch):
    """Whatever comes per patch is laid out as the features are: here the features themselves take the way of keys."""
    model = vlm.build()
    patches = []
    base = model.model
    module = {
        "InternVL": getattr(base, "vision_tower", None),
        "Idefics3": getattr(base, "connector", None),
        "SmolVLM": getattr(base, "connector", None),
    }.get(vlm.name) or (base.visual.merger if vlm.mrope else base.multi_modal_projector)

    def see(module, args, out):
        patches.append(out.last_hidden_state[:, 1:] if vlm.name == "InternVL" else args[0])

    def channels(layer: TowerLayer, cls: bool, lengths: Any) -> torch.Tensor:
        found = patches[-1]
        return found if lengths is None else found[None]

    module.register_forward_hook(see)
    monkeypatch.setattr(TowerLayer, "key_patches", channels)
    for image in probed(vlm, [["image", 2, "image"], [3, "image"]], model):
        many = image.vision.shape[1] // TOWER["hidden_size"]
        assert many == (1 if vlm.tokens >= 36 or vlm.name == "Gemma3" else 4)
        torch.testing.assert_close(image.keys.flatten(1), image.vision.unflatten(1, (many, -1)).mean(1), **CLOSE)


@EVERY
def test_attention_of_the_tower_is_that_of_the_eager_maps(vlm: VLM, monkeypatch: pytest.MonkeyPatch):
    """Patch by patch, before anything is laid out: the row of the class token, or means over heads and rows."""
    model = vlm.build()
    model.model.set_attn_implementation("eager")
    modules = attention_modules(getattr(model.model, "visual" if vlm.mrope else vlm_tower(vlm)))
    assert len(modules) == (3 if vlm.name in ("Qwen2_5_VL", "Qwen3VL") else 2 if vlm.name == "Qwen2VL" else 4)
    maps: dict[int, list[torch.Tensor]] = {}
    home = sys.modules[type(modules[0]).__module__]
    plain = home.eager_attention_forward

    def eager(module, *args, **kwargs):
        out, weights = plain(module, *args, **kwargs)
        if module in modules:
            maps.setdefault(modules.index(module), []).append(weights)
        return out, weights

    monkeypatch.setattr(home, "eager_attention_forward", eager)
    found = []
    own = TowerLayer.patches
    monkeypatch.setattr(TowerLayer, "patches", lambda *args: found.append(own(*args)) or found[-1])
    probed(vlm, [["image", 2, "image"], [3, "image"]], model, layers=(-2, -1))
    for number, scores in zip((len(modules) - 2, len(modules) - 1), found, strict=True):
        means = [weights.mean(1) for weights in maps[number]]
        wanted = torch.cat([mean[:, 0, 1:] if vlm.tower == "cls" else mean.mean(1) for mean in means])
        torch.testing.assert_close(scores.flatten(), wanted.flatten(), **CLOSE)
        assert scores.std() > 1e-4


def vlm_tower(vlm: VLM) -> str:
    return "vision_model" if vlm.name in ("Idefics3", "SmolVLM") else "vision_tower"


@pytest.mark.parametrize("name", ["Llava", "PaliGemma"])
def test_keys_are_those_of_the_last_layer_asked_for(name: str):
    vlm, found = VLMS[name], []
    model = vlm.build()
    module = attention_modules(model.model.vision_tower)[2].k_proj
    handle = module.register_forward_hook(lambda module, args, out: found.append(out))
    image = probed(vlm, [["image", 2]], model, layers=(1, 2))[0]
    handle.remove()
    patches = found[0][0, 1:] if vlm.tower == "cls" else found[0][0]
    torch.testing.assert_close(image.keys, patches.view(36, 4, 8))


def test_blocks_that_attend_in_windows_are_not_asked():
    images = probed(VLMS["Qwen2_5_VL"], [["image"]], layers=(0,))
    last = probed(VLMS["Qwen2_5_VL"], [["image"]], layers=(2,))
    torch.testing.assert_close(images[0].attention, last[0].attention)


def test_one_softmax_over_the_whole_width():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    layer = TowerLayer([q], [k], [None], 0.5)
    wide = [x.transpose(1, 2).reshape(2, 5, 12) for x in (q, k)]
    maps = (wide[0] @ wide[1].mT / math.sqrt(12)).softmax(-1)
    torch.testing.assert_close(layer.of_class_token(merged=True), maps[:, None, 0, 1:])
    torch.testing.assert_close(layer.received(merged=True), maps.mean(1))


def test_received_attention_in_pieces_and_under_a_mask(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vision_attn.mllm.towers.ROWS", 3)
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 4)
    mask = torch.rand(2, 1, 8, 8) > 0.3
    mask[..., 0] = True
    maps = (q @ k.mT * 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for form in (mask, additive):
        torch.testing.assert_close(TowerLayer([q], [k], [form], 0.5).received(), maps.mean((1, 2)))
    together = TowerLayer([q[:1]], [k[:1]], [None], 0.5).received(lengths=[3, 5])
    apart = [(q[0, :, a:b] @ k[0, :, a:b].mT * 0.5).softmax(-1).mean((0, 1)) for a, b in ((0, 3), (3, 8))]
    torch.testing.assert_close(together[0], torch.cat(apart))


def test_the_class_token_among_the_features():
    vlm = VLMS["LlavaNext"]
    model = vlm.build()
    inputs = vlm.inputs([["image", 2, "image"]])
    states = model.model.vision_tower(inputs["pixel_values"].flatten(0, 1), output_hidden_states=True).hidden_states[-2]
    images = probed(vlm, [["image", 2, "image"]], model)
    for image, view in zip(images, (0, 3), strict=True):  # the view of the whole picture comes before its two tiles
        torch.testing.assert_close(image.cls, states[view, 0], **CLOSE)
    assert probed(VLMS["InternVL"], [["image"]])[0].cls is None


def test_a_model_whose_image_is_a_few_learned_tokens():
    for method in (HoloV(), FastV(), KVPrune()):
        with pytest.raises(ValueError, match="InstructBlipForConditionalGeneration has a few learned ones"):
            attach(VLMS["InstructBlip"].build(), method)


@pytest.mark.parametrize("method", [HoloV(keep=0.3), VisionZip(keep=0.3), PruMerge()], ids=lambda m: m.name)
def test_a_family_with_another_tower(method: InputPrune):
    """LLaVA on SigLIP: no class token is looked for."""
    vlm = VLMS["Llava"]
    tower = hf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    config = vlm.config()
    config.vision_config, config.vision_feature_select_strategy, config.vision_feature_layer = tower, "full", -1
    model = dataclasses.replace(vlm, config=lambda: config).build()
    inputs, probe = vlm.inputs([["image", 3]]), Probe(keep=11)
    with attach(model, probe):
        generate(model, inputs, tokens=1)
    (image,) = probe.images
    torch.testing.assert_close(image.project(image.vision), image.features, **CLOSE)
    assert image.cls is None and abs(float(image.attention[0].sum()) - 1) < 1e-4
    with attach(model, method) as run:
        assert generate(model, inputs)[1].isfinite().any()
        assert 0 < int(run.engine.current.read.visual.sum()) < 30


# Images, tiles and videos in a prompt


def prompt(parts: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([sum(parts, [])])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_images_side_by_side_are_two_and_tiles_are_one():
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for name, sizes in (("Llava", [36, 36]), ("InternVL", [18])):
        probe, vlm = Probe(keep=4), VLMS[name]
        model = vlm.build()
        inputs = prompt([[5, 6], [IMAGE] * 2 * vlm.tokens, [7]]) | {"pixel_values": pixels}
        with attach(model, probe) as run:
            model(**inputs)
            assert int(run.engine.current.read.visual.sum()) == 4 * len(sizes)
        assert [len(image.features) for image in probe.images] == sizes
        for image in probe.images:
            torch.testing.assert_close(image.project(image.vision), image.features, **CLOSE)
        assert [image.grid for image in probe.images] == ([(6, 6)] * 2 if name == "Llava" else [None])


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_pictures_of_several_sizes(name: str):
    vlm, probe = VLMS[name], Probe(keep=0.5, layers=(-1,))
    model, sizes = vlm.build(), [(6, 10), (4, 6)]
    parts = sum([[START, *[IMAGE] * (h * w // 4)] for h, w in sizes], [])
    inputs = prompt([[5], parts, [6]])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    pixels = torch.randn(84, 3 * 2 * PATCH**2, generator=torch.Generator().manual_seed(0))
    with attach(model, probe):
        model(**inputs, pixel_values=pixels, image_grid_thw=torch.tensor([[1, h, w] for h, w in sizes]))
    both = probe.images.copy()
    assert [image.grid for image in both] == [(3, 5), (2, 3)]
    for image in both:
        torch.testing.assert_close(image.project(image.vision), image.features, **CLOSE)
    inputs = prompt([[START, *[IMAGE] * 6]])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    with attach(model, probe):  # the second picture by itself: images are not mixed
        model(**inputs, pixel_values=pixels[60:], image_grid_thw=torch.tensor([[1, 4, 6]]))
    for name in ("attention", "keys", "vision"):
        torch.testing.assert_close(getattr(probe.images[-1], name), getattr(both[1], name), **CLOSE)
    inputs = prompt([[5], parts, [6]]) | {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 6, 10], [1, 4, 6]]),
    }
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    with attach(model, HoloV(keep=0.5, segments=3, crops="grid", scale="global")) as run:
        model(**inputs)
        assert int(run.engine.current.read.visual.sum()) == 8 + 3


def test_several_pictures_of_a_prompt_are_not_tiled():
    """As the processor of LLaVA-OneVision gives them: one view each, and a newline token."""
    vlm, probe = VLMS["LlavaOnevision"], Probe(keep=0.5)
    model = vlm.build()
    inputs = prompt([[5], [IMAGE] * 37, [6], [IMAGE] * 37, [7]]) | {
        "pixel_values": torch.randn(2, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),
        "image_sizes": torch.tensor([[SIDE, 2 * SIDE]] * 2),
        "batch_num_images": torch.tensor([2]),
    }
    with attach(model, probe) as run:
        model(**inputs)
        assert int(run.engine.current.read.visual.sum()) == 2 * (18 + 1)
    for image in probe.images:
        assert image.grid == (6, 6)
        torch.testing.assert_close(image.project(image.vision), image.features, **CLOSE)


def video(vlm: VLM, frames: int = 4, beside: bool = False) -> dict[str, torch.Tensor]:
    """A prompt with a video, and with an image before it if `beside`."""
    generator = torch.Generator().manual_seed(0)
    images = vlm.images([1], generator) if beside else {}
    front = [5, START, *[IMAGE] * vlm.tokens, 6] if beside else [5, START]
    if vlm.name == "LlavaOnevision":
        inputs = prompt([front, [VIDEO] * (9 * frames + 1), [8]])
        inputs["pixel_values_videos"] = torch.randn(1, frames, 3, SIDE, SIDE, generator=generator)
    else:
        steps = frames // 2
        apart = [[VIDEO] * 9 + ([9] if vlm.name == "Qwen3VL" else [])] * steps  # the time of a frame stands between
        inputs = prompt([front, sum(apart, []), [8]])
        inputs["pixel_values_videos"] = torch.randn(36 * steps, 3 * 2 * PATCH**2, generator=generator)
        inputs["video_grid_thw"] = torch.tensor([[steps, SIDE // PATCH, SIDE // PATCH]])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int() + 2 * (inputs["input_ids"] == VIDEO).int()
    return inputs | images


@pytest.mark.parametrize("name", ["LlavaOnevision", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_videos(name: str):
    """Frames share a budget evenly, and each is looked at by itself; an image beside has its own."""
    vlm = VLMS[name]
    model = vlm.build()
    frames = 4 if name == "LlavaOnevision" else 2
    for beside in (False, True):
        probe, inputs = Probe(keep=0.3), video(vlm, beside=beside)
        with attach(model, probe) as run:
            generate(model, inputs, tokens=1)
            kept = run.engine.current.read.column[0][run.engine.current.read.visual[0]]
        image = [vlm.tokens - vlm.newlines] if beside else []
        assert [len(part.features) for part in probe.images] == [*image, *[9] * frames]
        for part in probe.images:
            if name != "LlavaOnevision" or len(part.features) > 9:  # its frames are pooled after they were projected
                torch.testing.assert_close(part.project(part.vision), part.features, **CLOSE)
            assert part.attention.isfinite().all() and part.attention.std() > 1e-4
        kinds = inputs["input_ids"][0][kept]
        total = round(0.3 * 9 * frames) if name != "Qwen3VL" else 2 * round(0.3 * 9)
        assert int((kinds == VIDEO).sum()) == total + (name == "LlavaOnevision")
        for method in (HoloV(keep=0.5), VisionZip(keep=0.5), PruMerge(), DivPrune(keep=0.5)):
            with attach(model, method):
                _, cached = generate(model, inputs, tokens=3)
                _, again = generate(model, inputs, tokens=3, use_cache=False)
                torch.testing.assert_close(cached, again, atol=1e-4, rtol=1e-4)
    with attach(model, Probe(keep=20 if name == "LlavaOnevision" else 8)):  # above a frame, and no more than the video
        generate(model, video(vlm), tokens=1)


def test_images_of_beams_and_of_other_prompts():
    vlm = VLMS["Llava"]
    model, rows = vlm.build(), [[3, "image", 4], [5, "image", 2, "image", 3], [6]]
    with attach(model, PruMerge()):
        batch = model.generate(**vlm.inputs(rows), max_new_tokens=4, do_sample=False, num_beams=3, length_penalty=0.0)
        for i in range(len(rows)):
            alone = model.generate(
                **single(vlm, rows, i), max_new_tokens=4, do_sample=False, num_beams=3, length_penalty=0.0
            )
            assert batch[i, -4:].tolist() == alone[0, -4:].tolist()
    with attach(model, FasterVLM()), pytest.raises(ValueError, match="the prompt has 36 tokens of images"):
        inputs = single(vlm, rows, 0)
        model(**{**inputs, "pixel_values": None, "mm_encoder_outputs": {"image": features(model, vlm, rows)}})


def test_images_of_a_prompt_that_was_not_read_are_forgotten():
    vlm = VLMS["Llava"]
    model, inputs, others = vlm.build(), vlm.inputs([["image", 3]]), vlm.inputs([[4, "image"]], seed=1)
    with attach(model, VisPruner(keep=0.3)) as run:
        _, wanted = generate(model, inputs)
        model.model.get_image_features(pixel_values=others["pixel_values"])
        assert torch.equal(generate(model, inputs)[1], wanted)
        handle = model.model.vision_tower.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="boom"):
            generate(model, others)
        handle.remove()
        assert torch.equal(generate(model, inputs)[1], wanted)
        model.model.vision_tower.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="boom"):
            generate(model, others)
        watch = run.engine.watch
    assert watch.vision is None and not any(layer.q for _, layer in watch.layers.values())


def fail(*_: Any) -> None:
    raise RuntimeError("boom")


def features(model: Any, vlm: VLM, rows: Any) -> Any:
    """Features that the tower made before anything was attached."""
    plain = type(model.model).get_image_features
    return plain(model.model, pixel_values=single(vlm, rows, 0)["pixel_values"])


# Methods


@pytest.fixture(params=[True, False], ids=["at once", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Products of all pairs at once, and a few rows at a time."""
    if not request.param:
        for name in ("holov", "divprune", "vispruner", "prumerge"):
            monkeypatch.setattr(f"vision_attn.mllm.methods.{name}.ROWS", 3)
        monkeypatch.setattr("vision_attn.mllm.methods.divprune.FEW", 0)


IN_PIECES = pytest.mark.usefixtures("pieces")


def shown(tokens: int = 60, seed: int = 0, layers: int = 1, cls: bool = False, grid: Any = None) -> Image:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    attention = draw(layers, tokens).mul(1.5).softmax(-1)
    weight = draw(12, 10)
    return Image(
        draw(tokens, 10) + 0.5, draw(3, 10), attention=attention, keys=draw(tokens, 2, 4), vision=draw(tokens, 12),
        cls=draw(12) if cls else None, project=lambda rows: rows @ weight, grid=grid,
    )  # fmt: skip


def ordered(scores: torch.Tensor) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -float(scores[i]))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_vtccls_and_fastervlm():
    image = shown(layers=3)
    best = ordered(image.attention.double().sum(0))[:20]
    assert VTCCLS().select(image, 20).tolist() == sorted(best)
    assert VTCCLS().tower_layers(24, True) == tuple(range(16, 23))
    assert VTCCLS(start_layer=-4).tower_layers(24, False) == (20, 21, 22)
    assert FasterVLM().tower_layers(24, True) == VTCCLS(start_layer=22).tower_layers(24, True) == (22,)
    assert VTCCLS().tower_layers(3, True) == (1,) and VTCCLS().tower_layers(1, True) == (0,)
    for start in (23, 40, -1, -25):
        with pytest.raises(ValueError, match="allowed are 0 to 22"):
            VTCCLS(start_layer=start).tower_layers(24, True)
    with pytest.raises(ValueError, match="number of a layer, or None"):
        VTCCLS(start_layer=2.5)
    with pytest.raises(ValueError, match="the vision tower has 4 layers"):
        attach(VLMS["Llava"].build(), VTCCLS(start_layer=3))


def holov(image: Image, keep: int, count: int, alpha: float, whole: bool) -> tuple[list[int], list[float]]:
    """HoloV by its formula, token by token, and what its crops are worth; no crop is ever full."""
    x, a = image.features.double(), image.attention[0].double()
    size, more = divmod(len(x), count)
    edges = [c * size + min(c, more) for c in range(count + 1)]
    crops = [list(range(edges[c], edges[c + 1])) for c in range(count)]
    variance = {}
    for crop in crops:
        for i in crop:
            row = [0.0 if i == j else float(x[i] @ x[j] / (x[i].norm() + 1e-6) / (x[j].norm() + 1e-6)) for j in crop]
            mean = sum(row) / (len(crop) - 1)
            variance[i] = sum((s - mean) ** 2 for s in row) / (len(crop) - 1)
    everything = range(len(x))
    scores = []
    for crop in crops:
        over = everything if whole else crop
        scale = sum(1000 * float(a[i]) for i in over) / len(over)
        scale /= sum(variance[i] for i in over) / len(over) + 1e-6
        scores.append(sum(1000 * float(a[i]) + alpha * scale * variance[i] for i in crop) / len(crop))
    weights = [score / (sum(scores) + 1e-6) for score in scores]
    shares = [int(weight * keep) for weight in weights]
    for crop in sorted(range(count), key=lambda c: -weights[c])[: keep - sum(shares)]:
        shares[crop] += 1
    return [crop[j] for crop, n in zip(crops, shares, strict=True) for j in ordered(a[crop])[:n]], scores


@IN_PIECES
@pytest.mark.parametrize("seed", range(2))
def test_holov(seed: int):
    image = shown(61, seed)
    for whole in (False, True):
        for alpha in (0.09, 3.0):
            order, scores = holov(image, 15, 7, alpha, whole)
            options = dict(keep=15, segments=7, alpha=alpha, scale="global" if whole else "crop")
            worth = HoloV(**options)._worth(image.features, image.attention[0], HoloV(**options)._crops(image, 15))
            torch.testing.assert_close(worth, torch.tensor(scores).double(), atol=0, rtol=1e-5)
            assert HoloV(**options).select(image, 15).tolist() == sorted(order)
            places, features = HoloV(**options, order="official").select(image, 15)
            assert places.tolist() == sorted(order) and torch.equal(features, image.features[order])


def test_diversity_counts_in_holov_with_one_scale_only():
    crop, whole = 0, 0
    for seed in range(10):
        image = shown(60, seed)
        first = dict(keep=20, segments=5)
        crop += int(
            HoloV(**first, alpha=0.0).select(image, 20).tolist()
            != HoloV(**first, alpha=10.0).select(image, 20).tolist()
        )
        whole += int(
            HoloV(**first, alpha=0.0, scale="global").select(image, 20).tolist()
            != HoloV(**first, alpha=10.0, scale="global").select(image, 20).tolist()
        )
    assert crop == 0 and whole >= 5


def test_holov_budgets():
    flat = dataclasses.replace(shown(64), attention=torch.full((1, 64), 1 / 64), features=torch.ones(64, 4))
    kept = HoloV(segments=8).select(flat, 16)
    assert kept.div(8, rounding_mode="floor").bincount().tolist() == [2] * 8
    peak = torch.full((1, 64), 1e-6)
    peak[0, 16:24] = 1.0  # a crop that is worth everything has 8 tokens to give
    kept = HoloV(segments=8).select(dataclasses.replace(flat, attention=peak), 16)
    assert len(kept.unique()) == 16 and set(range(16, 24)) <= set(kept.tolist())
    for keep, crops in ((64, 16), (128, 8), (192, 5)):  # the published numbers of crops
        assert len(HoloV()._crops(shown(576), keep)) == crops
    assert HoloV().select(shown(9), 9).tolist() == list(range(9))


def test_holov_on_boxes():
    """The budget of a box depends on what is in it, wherever its rows lie in reading order."""
    attention = torch.full((6, 6), 0.01)
    attention[:3, :3] = torch.arange(9).view(3, 3) + 1.0
    image = dataclasses.replace(shown(36, grid=(6, 6)), attention=attention.view(1, 36))
    method = HoloV(segments=4, crops="grid")
    corner = [r * 6 + c for r in range(3) for c in range(3)]
    assert [sorted(crop.tolist()) for crop in method._crops(image, 9)][0] == corner
    assert set(corner) <= set(method.select(image, 10).tolist())
    for shape, count in (((5, 7), 6), ((4, 4), 16), ((2, 9), 5), ((1, 5), 3), ((3, 3), 40)):
        place = torch.arange(shape[0] * shape[1])
        parts = HoloV(segments=count, crops="grid")._crops(shown(len(place), grid=shape), 3)
        assert torch.cat(parts).sort().values.tolist() == place.tolist()
        if count <= min(shape) ** 2:
            assert max(map(len, parts)) <= 3 * min(map(len, parts))
    with pytest.raises(ValueError, match="use crops='raster'"):
        method.select(shown(36), 9)


def test_holov_refuses():
    for options in (
        dict(scale="x"),
        dict(crops="x"),
        dict(order="x"),
        dict(segments=0),
        dict(alpha=-1.0),
        dict(keep=0),
    ):
        with pytest.raises(ValueError, match="HoloV"):
            HoloV(**options)
    with pytest.raises(ValueError, match="numbers them by row and column; use order='sorted'"):
        attach(VLMS["Qwen2VL"].build(), HoloV(order="official"))
    vlm = VLMS["LlavaNext"]
    model, inputs = vlm.build(), vlm.inputs([["image", 3]])
    _, stock = generate(model, inputs)
    with attach(model, HoloV(crops="grid")), pytest.raises(ValueError, match="use crops='raster'"):
        generate(model, inputs)
    assert torch.equal(generate(model, inputs)[1], stock)


def visionzip(image: Image, keep: int, merged: int, mean: bool) -> tuple[list[int], list[int], list[torch.Tensor]]:
    """Dominant places, targets, and rows: class token, dominant patches, merged ones."""
    own = 0 if image.cls is None else 1
    dominant = sorted(ordered(image.attention[0])[: keep - merged - own])
    rest = [i for i in range(len(image.vision)) if i not in dominant]
    step = max(1, len(rest) // merged)
    targets = [rest[t * step] for t in range(merged)]
    key = [k / k.norm() for k in image.keys.mean(1)]
    assigned: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            best = max(targets, key=lambda t: float(key[i] @ key[t]))
            assigned[best].append(i)
    rows = [] if image.cls is None else [image.cls]
    rows += [image.vision[i] for i in dominant]
    for t in targets:
        total = sum((image.vision[i] for i in assigned[t]), torch.zeros(12))
        n = len(assigned[t])
        rows.append((image.vision[t] + total) / (1 + n) if mean else image.vision[t] + total / max(1, n))
    return dominant, targets, rows


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("merge", ["sum", "mean"])
def test_visionzip(cls: bool, merge: str):
    image = shown(60, cls=cls)
    places, made = VisionZip(merge=merge).select(image, 32)  # 27 and 5
    dominant, targets, rows = visionzip(image, 32, 5, merge == "mean")
    wanted = image.project(torch.stack(rows))
    assert len(places) == len(made) == 32 and places.tolist() == sorted(set(places.tolist()))
    if cls:  # released order, and one more place
        assert len(dominant) == 26 and set(dominant + targets) < set(places.tolist())
        torch.testing.assert_close(made, wanted, **CLOSE)
    else:
        at = dominant + targets
        assert places.tolist() == sorted(at)
        torch.testing.assert_close(made, wanted[sorted(range(32), key=lambda i: at[i])], **CLOSE)
    everything, same = VisionZip(contextual=0.0).select(dataclasses.replace(image, cls=None), 60)
    assert everything.tolist() == list(range(60))
    torch.testing.assert_close(same, image.project(image.vision), **CLOSE)
    for keep in (1, 2, 3, 59, 60):
        assert len(VisionZip().select(image, keep)[0].unique()) == keep
    for options in (dict(contextual=1.0), dict(merge="max")):
        with pytest.raises(ValueError, match="VisionZip"):
            VisionZip(**options)


def divprune(x: torch.Tensor, keep: int) -> list[int]:
    """Max-min by full maps."""
    d = [[1 - cosine(a, b) for b in x.double()] for a in x.double()]
    n = len(x)
    chosen = [max(range(n), key=lambda i: min(d[i][j] for j in range(n) if j != i))]
    while len(chosen) < keep:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(d[i][j] for j in chosen)))
    return sorted(chosen)


@IN_PIECES
def test_divprune():
    for seed in range(3):
        image = shown(40, seed)
        assert DivPrune().select(image, 11).tolist() == divprune(image.features, 11)
    corners = torch.eye(6).repeat_interleave(4, 0)  # four copies of each corner of a simplex
    kept = DivPrune().select(dataclasses.replace(image, features=corners), 6)
    assert kept.div(4, rounding_mode="floor").tolist() == list(range(6))
    assert DivPrune().select(image, 40).tolist() == list(range(40))
    alike = dataclasses.replace(image, features=torch.full((40, 10), 0.3))
    assert len(DivPrune().select(alike, 9).unique()) == 9


def determinant(x: torch.Tensor, r: torch.Tensor, keep: int) -> list[int]:
    """Greedily the largest determinant of the kernel, computed anew for every candidate."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    kernel = r[:, None].double() * (unit @ unit.T).fill_diagonal_(1) * r.double()
    chosen: list[int] = []
    for _ in range(keep):
        left = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(left, key=lambda i: round(float(kernel[[*chosen, i]][:, [*chosen, i]].logdet()), 9)))
    return sorted(chosen)


@IN_PIECES
@pytest.mark.parametrize("seed", range(2))
def test_cdpruner_takes_the_largest_determinant(seed: int):
    image = shown(30, seed)
    assert CDPruner().select(image, 7).tolist() == determinant(image.features, torch.ones(30), 7)
    assert CDPruner().select(image, 30).tolist() == list(range(30))  # far above the rank, nothing twice


def clip() -> Any:
    torch.manual_seed(3)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    config = hf.CLIPConfig(text_config=dict(text, eos_token_id=49), vision_config=TOWER, projection_dim=8)
    return hf.CLIPModel(config).eval().requires_grad_(False)


def test_cdpruner_and_the_words():
    dual, vlm = clip(), VLMS["Llava"]
    model, inputs = vlm.build(), vlm.inputs([[4, "image", 6], ["image", 2]])
    asked = []

    def encode(ids: torch.Tensor) -> torch.Tensor:
        asked.append(ids.tolist())
        return torch.tensor([[1, 2 + len(ids), 49], [1, 3, 49]])

    probe = Probe(keep=12)
    with attach(model, probe):
        generate(model, inputs, tokens=1)
    with attach(model, CDPruner(keep=12, clip=dual, encode=encode)) as run:
        generate(model, inputs, tokens=1)
        kept = run.engine.current.read
    mask = inputs["attention_mask"].bool()
    words = [ids[real & (ids != IMAGE)].tolist() for ids, real in zip(inputs["input_ids"], mask, strict=True)]
    assert asked == words
    for row, image in enumerate(probe.images):
        text = torch.tensor([[1, 2 + len(words[row]), 49], [1, 3, 49]])
        pieces = dual.text_projection(dual.text_model(text).pooler_output).double()
        patches = dual.visual_projection(dual.vision_model.post_layernorm(image.vision)).double()
        away = torch.tensor([-sum(cosine(p, w) for w in pieces) / 2 for p in patches]).double()
        r = (away - away.min() + 1e-6) / (away.max() - away.min())
        first = int((inputs["input_ids"][row] == IMAGE).nonzero()[0])
        assert (kept.column[row][kept.visual[row]] - first).tolist() == determinant(image.features, r, 12)


def test_cdpruner_refuses():
    with pytest.raises(ValueError, match="used together"):
        CDPruner(clip=clip())
    with pytest.raises(ValueError, match="one of width"):
        attach(VLMS["Qwen2VL"].build(), CDPruner(clip=clip(), encode=lambda ids: ids))
    model = VLMS["InternVL"].build()
    with attach(model, CDPruner(clip=clip(), encode=lambda ids: ids)):
        with pytest.raises(ValueError, match="one patch per token"):
            generate(model, VLMS["InternVL"].inputs([["image", 2]]))
    with pytest.warns(UserWarning, match="without clip="):
        attach(VLMS["Llava"].build(), CDPruner()).detach()


def vispruner(image: Image, keep: int) -> list[int]:
    order, important = ordered(image.attention[0]), keep // 2
    kept, rest = order[:important], order[important:]
    while len(rest) > keep - important:
        r = min(8, len(rest) - (keep - important))
        a, b = rest[0::2], rest[1::2]
        score = {i: max(cosine(image.vision[i], image.vision[j]) for j in b) for i in a}
        a = sorted(a, key=lambda i: score[i])[: len(a) - r]
        rest = a + b
    return sorted(kept + rest)


@IN_PIECES
@pytest.mark.parametrize("seed", range(2))
def test_vispruner(seed: int):
    image = shown(60, seed)
    for keep in (7, 20, 59):
        assert VisPruner().select(image, keep).tolist() == vispruner(image, keep)
    for keep in (1, 2, 60):
        assert len(VisPruner().select(image, keep).unique()) == keep
    assert VisPruner(important=1.0).select(image, 9).tolist() == sorted(ordered(image.attention[0])[:9])
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        VisPruner(important=2)


def merged(image: Image, chosen: list[int], rest: bool) -> torch.Tensor:
    """Rows of the chosen tokens in order, and of one for what is left."""
    a, x = image.attention[0], image.vision
    keys = image.keys.flatten(1)
    rows = []
    for i in chosen:
        others = [j for j in range(len(x)) if j != i]
        near = sorted(others, key=lambda j: -cosine(keys[i], keys[j]))[:32]
        rows.append(x[i] + sum(a[j] * x[j] for j in near))
    if rest:
        rows.append(sum(a[j] * x[j] for j in range(len(x)) if j not in chosen))
    return torch.stack(rows)


@IN_PIECES
@pytest.mark.parametrize("seed", range(2))
def test_prumerge(seed: int):
    image = shown(60, seed)
    a = image.attention[0].double()
    values = sorted(a.tolist())

    def quantile(q: float) -> float:
        at = q * (len(values) - 1)
        low = int(at)
        return values[low] + (at - low) * (values[low + 1] - values[low])

    limit = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25))
    outliers = [i for i in range(60) if a[i] > limit]
    assert 2 <= len(outliers) <= 12
    step = max(1, int(int(60 / len(outliers)) / 3))
    grid = sorted({*outliers, *range(0, 59, step)})
    for method, chosen in (
        (PruMerge(), outliers),
        (PruMerge(keep=9), sorted(ordered(a)[:8])),
        (PruMergePlus(), grid),
    ):
        places, made = method.select(image, 60 if method.keep is None else 9)
        extra = max(i for i in range(60) if i not in chosen)
        at = [*chosen, extra]
        assert places.tolist() == sorted(at)
        rows = image.project(merged(image, chosen, True))[sorted(range(len(at)), key=lambda i: at[i])]
        torch.testing.assert_close(made, rows, **CLOSE)
    for keep in (1, 2, 17, 60):
        for method in (PruMerge(keep=keep), PruMergePlus(keep=keep)):
            assert len(method.select(image, keep)[0].unique()) == keep
    plus = PruMergePlus(keep=33).select(image, 33)[0].tolist()
    assert set(ordered(a)[:10]) < set(plus)
    gaps = torch.tensor(plus).diff()
    assert gaps.max() <= 6
    with pytest.raises(ValueError, match="PruMergePlus"):
        PruMergePlus(keep=0)


def test_prumerge_without_outliers_keeps_one():
    image = dataclasses.replace(shown(20), attention=torch.full((1, 20), 0.05))
    places, _ = PruMerge().select(image, 20)
    assert places.tolist() == [0, 19]


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("steer", [VHR(), M3ID(decay=2.0, beta=0)], ids=lambda method: method.name)
def test_new_features_and_steering(vlm: VLM, steer: Any):
    """Tokens made of several are visual tokens to what steers, in its second branch too."""
    model, rows = vlm.build(), [[3, "image", 4], [5, "image", 2, "image", 3]]
    with attach(model, VisionZip(keep=0.4)):
        _, alone = generate(model, vlm.inputs(rows), tokens=3)
    with attach(model, VisionZip(keep=0.4), steer):
        _, batch = generate(model, vlm.inputs(rows), tokens=3)
        for i in range(len(rows)):
            _, row = generate(model, single(vlm, rows, i), tokens=3)
            torch.testing.assert_close(batch[:, i : i + 1], row, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(batch, alone, atol=1e-4)


# Sizes


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf):
                self.most = max(self.most, leaf.numel())
        return out


METHODS = [
    HoloV(keep=1.0), VTCCLS(), FasterVLM(), VisionZip(), DivPrune(), CDPruner(), VisPruner(), PruMerge(),
    PruMergePlus(), RandomPrune(),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_no_map_of_all_pairs(method: InputPrune):
    tokens = 2048
    image = shown(tokens, layers=2)
    image = dataclasses.replace(image, attention=image.attention[-1:] if method.name != "vtccls" else image.attention)
    with Largest() as sizes:
        method.select(image, tokens if method.name == "holov" else 40)
    assert 0 < sizes.most <= tokens**2 // 4
    with Largest() as sizes:
        q = torch.randn(1, 1, tokens, 4)
        TowerLayer([q], [q], [None], 0.5).received()
    assert sizes.most <= tokens**2 // 2
