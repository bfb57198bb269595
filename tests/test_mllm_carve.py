"""CARVE and VL-SAM's points: from maps to regions, pictures and points, and both passes over a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("cv2")
from PIL import Image  # noqa: E402
from vlm_models import VLMS, single  # noqa: E402

from vision_attn.mllm.carve import CARVE, cut_out  # noqa: E402
from vision_attn.mllm.regions import points, regions  # noqa: E402


def flood(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The regions of a mask, each found by walking to the four neighbours."""
    left, found = {(int(r), int(c)) for r, c in zip(*mask.nonzero(), strict=True)}, []
    while left:
        edge, region = [left.pop()], set()
        while edge:
            r, c = edge.pop()
            region.add((r, c))
            near = {(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)} & left
            left -= near
            edge += near
        found.append(region)
    return found


def test_regions_are_those_of_walking():
    mask = np.random.default_rng(0).random((13, 17)) < 0.5
    numbers, count = regions(mask)
    held = [{(int(r), int(c)) for r, c in zip(*(numbers == i).nonzero(), strict=True)} for i in range(1, count + 1)]
    assert sorted(map(sorted, held)) == sorted(map(sorted, flood(mask)))


@pytest.mark.parametrize("seed", range(5))
def test_points_lie_in_and_out_of_the_largest_region(seed: int):
    values = np.random.default_rng(seed).normal(size=(7, 11))
    found = points(values, threshold=0.6)
    high = values > values.min() + 0.6 * (values.max() - values.min())
    largest = max(map(len, flood(high)))
    area = {(int(r), int(c)) for r, c in zip(*found.area.nonzero(), strict=True)}
    assert area in flood(high) and len(area) == largest
    rest = [(r, c) for r in range(7) for c in range(11) if (r, c) not in area]
    for (x, y), (row, column) in (
        (found.positive, max(area, key=lambda at: values[at])),
        (found.negative, min(rest, key=lambda at: values[at])),
    ):
        assert (int(x * 11), int(y * 7)) == (column, row)
    with pytest.raises(ValueError, match="has no points"):
        points(np.ones((3, 3)))
    with pytest.raises(ValueError, match="from 0 to below 1"):
        points(values, threshold=1.0)


def resized(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, between the middles of cells."""
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = np.clip((y + 0.5) * grid.shape[0] / height - 0.5, 0, grid.shape[0] - 1)
            u = np.clip((x + 0.5) * grid.shape[1] / width - 0.5, 0, grid.shape[1] - 1)
            i, j = int(v), int(u)
            k, m = min(i + 1, grid.shape[0] - 1), min(j + 1, grid.shape[1] - 1)
            a, b = v - i, u - j
            upper, lower = (1 - b) * grid[i, j] + b * grid[i, m], (1 - b) * grid[k, j] + b * grid[k, m]
            out[y, x] = (1 - a) * upper + a * lower
    return out


@pytest.mark.parametrize("version, normalise", [(4, False), (4, True), (1, False)])
def test_saliency_is_the_weighted_ratio(version: int, normalise: bool):
    rng = np.random.default_rng(1)
    own, other = rng.random((4, 2, 3, 5)), rng.random((3, 2, 3, 5))
    wanted = np.zeros((12, 14))
    for t in range(3 if version == 4 else 1):
        for layer in range(2):
            q, g = own[t, layer], other[t, layer]
            if normalise:
                q, g = q / q.sum(), g / g.sum()
            wanted += (t + 1) * resized(q / (g + 1e-8), 12, 14)
    found = CARVE(version=version, normalise=normalise).saliency(torch.tensor(own), torch.tensor(other), (14, 12))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_the_regions_that_stay(version: int):
    values = np.random.default_rng(2).normal(size=(40, 50))
    values[5:9, 5:15] += 3  # one large region, one of few pixels but the largest sum
    values[30:33, 30:33] += 40
    high = values >= np.sort(values.ravel())[int(np.ceil(0.8 * (values.size - 1)))]
    found = flood(high)
    if version == 1:
        stay = [region for region in found if len(region) >= 0.001 * high.sum()]
    else:
        size = (lambda r: len(r)) if version == 2 else (lambda r: sum(values[at] for at in r))
        stay = sorted(found, key=size, reverse=True)[: max(3, int(0.2 * len(found)))]
    mask = CARVE(version=version).mask(values)
    sizes = sorted(map(len, stay))
    assert sorted(map(len, flood(mask))) == sizes
    if version >= 3:
        assert {(int(r), int(c)) for r, c in zip(*mask.nonzero(), strict=True)} == set.union(*stay)
    few = np.zeros((10, 10))
    few[1, 1], few[3, 3:5], few[5, 5], few[7, 7] = 9, 8, 7, 6
    if version > 1:
        assert CARVE(version=version, top=0.05).mask(few).sum() == 4  # three regions at least


def test_the_refined_picture():
    rng = np.random.default_rng(3)
    pixels = rng.integers(1, 256, (30, 40, 3), dtype=np.uint8)
    mask = np.zeros((30, 40), dtype=bool)
    mask[4:9, 10:20] = mask[9:14, 18:22] = True
    refined = cut_out(Image.fromarray(pixels), mask)
    box = np.where(mask[..., None], pixels, 0)[4:14, 10:22].astype(np.uint8)
    scale = max(40 / 12, 30 / 10)
    assert refined.size == (round(12 * scale), round(10 * scale)) == (40, 33)
    wanted = Image.fromarray(box).resize((40, 33), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(refined), np.asarray(wanted))


def test_what_cannot_be_done_is_said():
    for bad in (0, 1, -0.5, 2.0):
        with pytest.raises(ValueError, match="a share above 0 and below 1"):
            CARVE(top=bad)
    with pytest.raises(ValueError, match="allowed are 1, 2, 3 and 4"):
        CARVE(version=5)
    with pytest.raises(ValueError, match="at least 1"):
        CARVE(steps=0)
    with pytest.raises(ValueError, match="layers 0 to 3"):
        CARVE(layers=(4,)).chosen(4)


def eager_look(model: Any, inputs: dict, layers: tuple[int, ...], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated ids, and the attention of each step's last row to the 64 image tokens, from full maps."""
    model.set_attn_implementation("eager")
    out = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    model.set_attn_implementation("sdpa")
    image = inputs["input_ids"][0] == model.config.image_token_id
    rows = [[maps[at][0, :, -1, : len(image)].mean(0)[image].view(8, 8) for at in layers] for maps in out.attentions]
    return out.sequences[0, inputs["input_ids"].shape[1] :], torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("pair", [True, False])
def test_both_passes_over_a_picture(pair: bool):
    from vision_attn.mllm import tiny

    model, processor = tiny.model(seed=3).eval(), tiny.processor()
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    asked = []

    def read(pictures, text):
        asked.append((len(pictures), text))
        return processor(images=pictures, text=f"{'<image> ' * len(pictures)}{text}", return_tensors="pt")

    carve = CARVE(layers=(1, 3), steps=5, pair=pair, general="describe the image", suffix="")
    found = carve(model, read, picture, "is there a red circle ?")
    many = 2 if pair else 1
    assert asked == [(1, "is there a red circle ?"), (1, "describe the image"), (many, "is there a red circle ?")]
    with torch.no_grad():
        first, own = eager_look(model, read([picture], "is there a red circle ?"), (1, 3), 5)
        _, other = eager_look(model, read([picture], "describe the image"), (1, 3), 5)
    assert torch.equal(found.first, first) and found.steps == min(len(own), len(other))
    saliency = carve.saliency(own, other, (64, 48))
    torch.testing.assert_close(found.saliency, saliency, rtol=1e-3, atol=1e-4)
    assert found.mask.shape == (48, 64) and (found.mask != carve.mask(saliency.numpy())).mean() < 0.01
    assert np.array_equal(found.refined, cut_out(picture, found.mask))
    assert found.given == ([picture, found.refined] if pair else [found.refined])
    with torch.no_grad():
        again = model.generate(**read(found.given, "is there a red circle ?"), max_new_tokens=5, do_sample=False)
    assert torch.equal(found.answer, again[0, -len(found.answer) :])
    assert found.answer.shape[0] <= 5 and model.config.text_config._attn_implementation == "sdpa"


def test_a_picture_that_is_cut_in_tiles_is_looked_at_as_a_whole():
    vlm = VLMS["LlavaNext"]
    model = vlm.build()

    def read(pictures, text):
        return single(vlm, [[3, *["image"] * len(pictures), 4]], 0)

    picture = Image.new("RGB", (48, 24), "blue")
    picture.putpixel((5, 5), (255, 0, 0))
    found = CARVE(steps=2)(model, read, picture, "what?")
    assert found.saliency.shape == (24, 48) and found.mask.any()
    with pytest.raises(ValueError, match="views of one row"):
        CARVE(steps=2)(model, lambda pictures, text: vlm.inputs([["image"], ["image"]]), picture, "what?")
    with pytest.raises(ValueError, match="show no places"):
        CARVE(steps=2)(VLMS["InstructBlip"].build(), lambda *_: VLMS["InstructBlip"].inputs([["image"]]), picture, "?")
