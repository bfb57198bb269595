"""Maps of attention of vision-language models, against the full maps of eager attention; places of visual tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import IMAGE, PATCH, ROWS, SIDE, VIDEO, VLM, VLMS, generate, single  # noqa: E402

from vision_attn import mllm  # noqa: E402
from vision_attn.mllm import flow  # noqa: E402
from vision_attn.mllm.flow import attention_flow, rollout  # noqa: E402
from vision_attn.mllm.grids import grids, overview  # noqa: E402
from vision_attn.mllm.maps import Capture, image_entropy, mass, sink_tokens  # noqa: E402

EVERY = pytest.mark.parametrize("vlm", VLMS.values(), ids=lambda vlm: vlm.name)


pytestmark = pytest.mark.usefixtures("inference")


def eager_maps(vlm: VLM, inputs: dict) -> torch.Tensor:
    """Full maps float64 `[layers, batch, heads, n, n]`, without what rows of padding attend to."""
    model = vlm.build()
    model.set_attn_implementation("eager")
    out = model(**inputs, use_cache=False, output_attentions=True)
    maps = getattr(out, "attentions", None) or out.language_model_outputs.attentions
    real = inputs["attention_mask"].double()
    return torch.stack(maps).double() * real[:, None, :, None] * real[:, None, None, :]


@EVERY
def test_rollout_is_the_product_of_full_maps(vlm: VLM, monkeypatch):
    monkeypatch.setattr(flow, "ROWS", 7)
    inputs, token = vlm.inputs(ROWS), -2
    product = torch.eye(inputs["input_ids"].shape[1]).double()
    for w in eager_maps(vlm, inputs):
        mixed = 0.5 * torch.eye(w.shape[-1]) + 0.5 * w.mean(1)
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    torch.testing.assert_close(rollout(vlm.build(), inputs, token).double(), product[:, token], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "vlm, options",
    [(vlm, {}) for vlm in VLMS.values()]
    + [(VLMS["Llava"], {"regularise": False}), (VLMS["Gemma3"], {"head_weights": False})],
    ids=lambda x: getattr(x, "name", None),
)
def test_flow_is_the_recursion_of_full_maps(vlm: VLM, options: dict, monkeypatch):
    monkeypatch.setattr(flow, "ROWS", 7)
    inputs = vlm.inputs(ROWS)
    tokens = inputs["attention_mask"].sum(1).double()
    identity = torch.eye(inputs["input_ids"].shape[1]).double()
    through = torch.zeros_like(identity)
    for w in eager_maps(vlm, inputs):
        weight = w.amax(-1).sum(-1) / tokens[:, None] if options.get("head_weights", True) else torch.ones(w.shape[:2])
        through = (identity + (weight[..., None, None] * w).mean(1)) @ (identity + through)
        if options.get("regularise", True):
            through = through * (1 - ((w.amax(1) > 0).sum(1) - 1) / tokens[:, None])[:, None]
    wanted = through[:, -1] * inputs["attention_mask"]
    torch.testing.assert_close(attention_flow(vlm.build(), inputs, **options).double(), wanted, atol=1e-4, rtol=1e-4)


def test_no_map_of_all_pairs_is_made(monkeypatch):
    monkeypatch.setattr(flow, "ROWS", 7)
    vlm = VLMS["Llava"]
    sizes = [w.shape[2] for layer in flow.attentions(vlm.build(), vlm.inputs(ROWS)) for _, w in layer.parts()]
    assert max(sizes) == 7 and len(sizes) > 4


def test_flow_is_not_followed_through_tokens_that_were_dropped():
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    wanted = rollout(model, inputs)
    with mllm.attach(model, mllm.UniformPrune(keep=0.5)), pytest.raises(ValueError, match="detach what drops tokens"):
        rollout(model, inputs)
    with pytest.raises(ValueError, match="columns 0 to"):
        rollout(model, inputs, token=999)
    assert torch.equal(rollout(model, inputs), wanted)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert not [name for m in model.modules() for name in vars(m) if "listeners" in name]


@EVERY
def test_captured_rows_are_those_of_full_maps(vlm: VLM):
    """Of a padded batch, reading and generating, also where tokens were dropped, in every layer."""
    drops = (mllm.UniformPrune(keep=0.5), mllm.FastV(keep=0.5, layer=2), mllm.KVPrune(keep=0.5, rows=4))
    bridged = vlm.name == "InstructBlip"  # wants an image in every row, and keeps all of its tokens
    model, inputs = vlm.build(), vlm.inputs([[3, "image", 4], [5, "image", 2]] if bridged else ROWS)
    model.set_attn_implementation({"text_config": "eager"})
    for methods in ((),) if bridged else ((), drops):
        look = Capture(rows=2)
        with mllm.attach(model, *methods, look) as run:
            out = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
            )
            prompt = run.engine.current
        assert len(look.steps) == 3 and set(look.steps[0]) == set(range(4))
        for t, (step, maps) in enumerate(zip(look.steps, out.attentions, strict=True)):
            for layer, full in enumerate(maps):
                rows = full[:, :, -2:]
                tokens = prompt.cached[layer] if t else prompt.tokens[layer]
                column = tokens.column if tokens.column.ndim == 3 else tokens.column[:, None].expand(-1, 3, -1)
                valid = tokens.valid if tokens.valid.ndim == 3 else tokens.valid[:, None]
                held = column.where(valid, -1).repeat_interleave(rows.shape[1] // column.shape[1], 1)
                wanted = torch.zeros(*rows.shape[:3], prompt.length + t)
                gone = max(held.shape[-1] + t - rows.shape[-1], 0)
                for b, h, j in (held >= 0).nonzero().tolist():
                    if j >= gone:
                        wanted[b, h, :, held[b, h, j]] = rows[b, h, :, j - gone]
                if t:
                    wanted[..., -t:] = rows[..., -t:]
                real = inputs["attention_mask"][:, -2:] if t == 0 else torch.ones(1, 1)
                wanted = wanted * real[:, None, :, None]
                torch.testing.assert_close(step[layer], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_captured_rows_with_beams_and_a_static_cache(options: dict):
    vlm = VLMS["Gemma3"]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    look, beams = Capture(reduce=lambda w, image: (mass(w, image), w.sum(-1))), options.get("num_beams", 1)
    with mllm.attach(model, look):
        generate(model, inputs, tokens=3, **options)
    plain = Capture()
    with mllm.attach(model, plain):
        model(**inputs)
    for layer, weights in plain.steps[0].items():
        on_image = weights.masked_fill((inputs["input_ids"] != IMAGE)[:, None, None], 0).sum(-1)
        torch.testing.assert_close(look.steps[0][layer][0], on_image.repeat_interleave(beams, 0), atol=1e-5, rtol=1e-4)
    for step in look.steps:
        for image, whole in step.values():
            torch.testing.assert_close(whole, torch.ones_like(whole))
            assert (
                image.shape == (3 * beams, 6, 1) and (image[2 * beams :] == 0).all() and (image[: 2 * beams] < 1).all()
            )


def test_entropy_and_mass():
    weights = torch.tensor([[0.1, 0.3, 0.1, 0.5], [0.25, 0.25, 0.25, 0.25]])
    image = torch.tensor([[True, True, False, False], [True, False, True, True]])
    p = torch.tensor([0.25, 0.75]).double()
    wanted = torch.tensor([float(-(p * p.log()).sum() / np.log(2)), 1.0])
    torch.testing.assert_close(image_entropy(weights, image), wanted)
    torch.testing.assert_close(mass(weights, image), torch.tensor([0.4, 0.75]))
    assert image_entropy(weights, image & (torch.arange(4) == 0)).isnan().all()
    assert image_entropy(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([True, True, True])) == 0


def test_sink_mass_is_what_goes_to_massive_tokens():
    vlm = VLMS["Qwen2VL"]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    dims, states = (5, 11), model(**inputs, output_hidden_states=True).hidden_states
    sinks = sink_tokens(model, inputs, dims, tau=2.0)
    look = Capture()
    with mllm.attach(model, look):
        model(**inputs)
    assert len(sinks) == 4 and 0 < sum(int(layer.sum()) for layer in sinks) < 4 * inputs["attention_mask"].sum()
    for layer, weights in look.steps[0].items():
        wanted = torch.zeros(weights.shape[:3])
        for row in range(3):
            for j in inputs["attention_mask"][row].nonzero()[:, 0].tolist():
                x = states[layer][row, j]
                if x[list(dims)].abs().max() > 2.0 * x.square().mean().sqrt():
                    wanted[row] += weights[row, ..., j]
        torch.testing.assert_close(mass(weights, sinks[layer]), wanted)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_the_built_in_model_looks_where_the_thing_is_that_it_names():
    """Chance is a sixteenth; a flow that is not regularised ends in the first columns of the prompt."""
    from vision_attn.mllm import points, tiny
    from vision_attn.mllm.loading import load
    from vision_attn.shapes.crowd import KINDS, draw_crowd, sample_crowd

    loaded, hits = load("shapes-llava"), {"flow": [], "rollout": [], "attention": []}
    for i in range(30):
        rng = np.random.default_rng((5, i))
        crowd = sample_crowd(rng, 0.5)
        cells = {KINDS[kind]: cell for cell, kind in crowd.places.items()}
        inputs = loaded.inputs(draw_crowd(crowd, rng), tiny.DESCRIBE)
        ids = loaded.model.generate(**inputs, max_new_tokens=48, do_sample=False)
        given = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
        words, (grid,) = loaded.processor.tokenizer.convert_ids_to_tokens(ids[0]), grids(loaded.model, given)
        look = Capture(rows=ids.shape[1], reduce=lambda weights, image: weights.mean(1))
        with mllm.attach(loaded.model, look):
            loaded.model(**given)
        for at in range(inputs["input_ids"].shape[1], len(words) - 1):
            name = f"{words[at]} {words[at + 1]}"
            if name in cells:
                seen = torch.stack(list(look.steps[0].values())).mean(0)[:, at - 1]
                maps = {
                    "flow": attention_flow(loaded.model, given, token=at - 1),
                    "rollout": rollout(loaded.model, given, token=at - 1),
                    "attention": seen,
                }
                for kind, values in maps.items():
                    x, y = points(grid.of(values)[0].numpy()).positive
                    hits[kind].append((int(y * 4), int(x * 4)) == divmod(cells[name], 4))
    shares = {kind: np.mean(found) for kind, found in hits.items()}
    assert len(hits["flow"]) > 50 and shares["attention"] > 0.4 and shares["flow"] > 0.2 > shares["rollout"], shares


def test_captures_that_cannot_be():
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="a number of rows"):
            Capture(rows=bad)
    with pytest.raises(ValueError, match="layers 0 to 3"):
        mllm.attach(VLMS["Llava"].build(), Capture(layers=(1, 4)))


def blocks(values: torch.Tensor, side: int) -> torch.Tensor:
    """Which values each of `side * side` equal squares of a map holds, sorted: `[side, side, n]`."""
    size = len(values) // side
    return values.unfold(0, size, size).unfold(1, size, size).flatten(2).sort(-1).values


NUMBERS = torch.arange((SIDE // PATCH) ** 2).view(SIDE // PATCH, -1)


@pytest.mark.parametrize("name", ["Llava", "PaliGemma", "InternVL", "Idefics3", "SmolVLM", "Gemma3"])
def test_tokens_hold_the_patches_of_their_square(name: str):
    """What the model itself makes of patches that hold their number, read at the places of the grid."""
    vlm = VLMS[name]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    found = grids(model, inputs)
    assert [(grid.row, grid.picture, grid.frame) for grid in found] == [(0, 0, 0), (1, 0, 0), (1, 1, 0)]
    base, numbers = model.base_model, NUMBERS.double().flatten()[None, :, None]
    if name == "InternVL":
        tokens = base.pixel_shuffle(numbers.view(1, 6, 6, 1), scale_factor=0.5).flatten(1, 2)[0]
    elif name in ("Idefics3", "SmolVLM"):
        tokens = base.connector.pixel_shuffle(numbers, base.config.scale_factor)[0]
    elif name == "Gemma3":
        tokens = torch.nn.functional.avg_pool2d(numbers.view(1, 1, 6, 6), 2).flatten()[:, None]
    else:
        tokens = numbers[0]
    for grid in found:
        columns = (inputs["input_ids"][grid.row] == IMAGE).nonzero()[:, 0]
        held = torch.full((inputs["input_ids"].shape[1], tokens.shape[1]), -1.0).double()
        held[columns[grid.picture * vlm.tokens :][: vlm.tokens]] = tokens
        wanted = blocks(NUMBERS, len(grid.columns)).double()
        wanted = wanted.mean(-1, keepdim=True) if name == "Gemma3" else wanted
        assert torch.equal(grid.of(held.T).permute(1, 2, 0).sort(-1).values, wanted)


@pytest.mark.parametrize("name", ["LlavaNext", "LlavaOnevision"])
@pytest.mark.parametrize("size, tiles, cut", [([24, 48], (1, 2), (6, 12)), ([40, 48], (2, 2), (10, 12))])
def test_tiles_make_one_grid(name: str, size: list[int], tiles: tuple[int, int], cut: tuple[int, int]):
    vlm = VLMS[name]
    model = vlm.build()
    height, width = tiles[0] * 6, tiles[1] * 6
    number = torch.arange(height * width).view(height, width).double()
    local = number.view(tiles[0], 6, tiles[1], 6).transpose(1, 2).flatten(2).flatten(0, 1)
    features = torch.cat([NUMBERS.flatten()[None] + 1000.0, local])[..., None]
    option = (
        ("vision_feature_select_strategy", "default")
        if name == "LlavaNext"
        else ("vision_aspect_ratio", "anyres_max_9")
    )
    (packed,), _ = model.model.pack_image_features(
        [features], [torch.tensor(size)], image_newline=torch.tensor([-1.0]), **dict([option])
    )
    held = torch.cat([torch.zeros(5), packed[:, 0], torch.zeros(4)])
    ids = torch.tensor([[3] * 5 + [IMAGE] * len(packed) + [3] * 4])
    whole, tiled = grids(model, {"input_ids": ids, "image_sizes": torch.tensor([size])})
    assert overview(model, [whole, tiled]) is whole
    assert torch.equal(whole.of(held), NUMBERS + 1000.0)
    top = (height - cut[0]) // 2
    assert torch.equal(tiled.of(held), number[top : top + cut[0]].float())


def test_a_picture_that_is_not_cut():
    model = VLMS["LlavaOnevision"].build()
    ids = torch.tensor([[3, *[IMAGE] * 37, 4, *[IMAGE] * 37]])
    sizes = torch.tensor([[24, 48]] * 2)
    first, second = grids(model, {"input_ids": ids, "image_sizes": sizes, "batch_num_images": torch.tensor([2])})
    assert first.columns[0, 0] == 1 and second.columns[0, 0] == 39 and second.columns[-1, -1] == 74


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_merged_patches_by_the_processor(name: str):
    """Of a picture whose pixels say where they are, by the processor that cuts it."""
    from transformers import Qwen2VLImageProcessor

    rows, columns = 4, 6
    pixels = np.zeros((rows * 2 * PATCH, columns * 2 * PATCH, 3), dtype=np.uint8)
    for i in range(rows * columns):
        r, c = divmod(i, columns)
        pixels[r * 8 : r * 8 + 8, c * 8 : c * 8 + 8] = i * 4
    processor = Qwen2VLImageProcessor(
        patch_size=PATCH, temporal_patch_size=2, merge_size=2, do_resize=False, do_normalize=False, do_convert_rgb=False
    )
    made = processor([pixels], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 8, 12]]
    held = (made["pixel_values"] * 255 / 4).view(rows * columns, -1).mean(1).round()
    ids = torch.tensor([[3, 3, *[IMAGE] * len(held), 3]])
    (grid,) = grids(VLMS[name].build(), {"input_ids": ids, "image_grid_thw": made["image_grid_thw"]})
    values = torch.nn.functional.pad(held, (2, 1))
    assert torch.equal(grid.of(values), torch.arange(24.0).view(rows, columns))


def test_frames_of_a_video_beside_a_picture():
    ids = torch.tensor([[0, *[VIDEO] * 12, 4, *[IMAGE] * 9, 5], [0] * 12 + [3, 3, *[IMAGE] * 9, 5]])
    inputs = {
        "input_ids": ids,
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
        "image_grid_thw": torch.tensor([[1, 6, 6]] * 2),
    }
    found = grids(VLMS["Qwen2VL"].build(), inputs)
    assert [(g.row, g.frame, tuple(g.columns.shape)) for g in found] == [
        (0, 0, (2, 3)), (0, 1, (2, 3)), (0, 0, (3, 3)), (1, 0, (3, 3)),
    ]  # fmt: skip
    assert [int(g.columns[0, 0]) for g in found] == [1, 7, 14, 14]


def test_pooled_frames_end_with_one_newline():
    ids = torch.tensor([[0, *[VIDEO] * 19, 4, *[VIDEO] * 19]])
    found = grids(
        VLMS["LlavaOnevision"].build(), {"input_ids": ids, "pixel_values_videos": torch.zeros(2, 2, 3, 24, 24)}
    )
    assert [(g.picture, g.frame, int(g.columns[0, 0])) for g in found] == [
        (0, 0, 1),
        (0, 1, 10),
        (1, 0, 21),
        (1, 1, 30),
    ]


def test_places_that_do_not_fit():
    vlm = VLMS["InstructBlip"]
    with pytest.raises(ValueError, match="show no places"):
        grids(vlm.build(), vlm.inputs(ROWS))
    for name, more in (("Llava", 1), ("Qwen2VL", -1), ("LlavaNext", -2)):
        inputs = single(VLMS[name], ROWS, 0)
        where = (inputs["input_ids"][0] == IMAGE).nonzero()[-1]
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][0, where + 1 if more > 0 else where] = IMAGE if more > 0 else 5
        with pytest.raises(ValueError, match="its pictures do not explain"):
            grids(VLMS[name].build(), inputs)
    with pytest.raises(ValueError, match="views of one row"):
        overview(VLMS["Llava"].build(), [])
