"""The built-in classifiers and the built-in CLIP do what their cards say, through the doors of timm and open_clip."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from timm_contract import CHECKS

from vision_attn import compare
from vision_attn.classify import classify, labels_of, load_classifier
from vision_attn.clip import CONFIGS, WEIGHTS, add_towers, clip_score, load_clip, similarity
from vision_attn.evaluate import CAPTIONS, card, score_classifier, score_clip
from vision_attn.shapes import Scene, Thing, render, sample_scene
from vision_attn.shapes.stills import LABELS

CLASSIFIERS = ("nat_shapes", "biformer_shapes")
FOLDERS = [WEIGHTS.parent / name for name in (*CLASSIFIERS, "clip_shapes")]
RESULTS = WEIGHTS.parents[1] / "results"


@pytest.fixture(scope="module")
def clip():
    return load_clip()


def record(name, kind):
    return json.loads((WEIGHTS.parent / name / f"{kind}.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_card_is_written_from_the_records(folder):
    assert (folder / "README.md").read_text() == card(folder)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".safetensors"}


def test_the_claims_and_the_size_hold():
    for name in CLASSIFIERS:
        for row in record(name, "evaluation")["rows"].values():
            assert min(row.values()) >= 0.97, f"{name}: {row}"
    scores = record("clip_shapes", "evaluation")
    assert CAPTIONS == 50 and min(scores["text"], scores["image"]) >= 0.8
    assert sum(path.stat().st_size for folder in FOLDERS for path in folder.glob("*.safetensors")) <= 4_000_000


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_on_scenes_that_even_the_card_has_not_seen(name):
    model = timm.create_model(name, pretrained=True).eval()
    scores = score_classifier(model, seed=17, count=200, vary=True)
    assert min(scores.values()) >= 0.95, "200 pictures: three standard deviations below 0.98"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_folder_name_and_features_are_one_model(name):
    x = torch.rand(2, 3, 48, 48) * 2 - 1
    model = timm.create_model(name, pretrained=True).eval()
    local = timm.create_model(f"local-dir:{WEIGHTS.parent / name}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(x), local(x))
        maps = timm.create_model(name, pretrained=True, features_only=True).eval()(x)
        other = model.forward_intermediates(x, intermediates_only=True, output_fmt=model.output_fmt)
        assert all(torch.equal(a, b) for a, b in zip(maps, other, strict=True)) and len(maps) == 3
    assert labels_of(model) == labels_of(local) == list(LABELS)
    seven = timm.create_model(name, pretrained=True, num_classes=7)
    assert seven.head.fc.out_features == 7
    assert torch.equal(next(seven.parameters()), next(model.parameters()))


@pytest.mark.parametrize("check", [c for c in CHECKS if c.__name__ != "forward"], ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_contract(name, check):
    check(name)  # `forward` counts 1000 classes


def test_classify_takes_any_picture_size():
    model = load_classifier("nat_shapes")
    things = (Thing("cross", "yellow", 0.25, (0.4, 0.4)), Thing("circle", "red", 0.1, (0.8, 0.8)))
    for side in (40, 48, 301):
        picture = np.rint(render(Scene(things, side, side, 1))[0] * 255).astype(np.uint8)
        (best, second), *_ = classify([picture], model, top=2)
        assert best.label == "yellow cross" and best.probability > 0.5 > second.probability
    assert len(classify([picture], model, top=99)[0]) == 20


@pytest.mark.parametrize(
    "name, part",
    [
        ("nat_shapez", "no model 'nat_shapez'; timm has nat_"),
        ("{tmp}/empty", "no config.json"),
        ("{tmp}/pickle", "no .safetensors file"),
        ("{tmp}/broken", "cannot load"),
        ("nat_mini", "cannot load nat_mini: No pretrained weights exist"),
    ],
)
def test_classifier_that_cannot_be_opened(name, part, tmp_path):
    for folder, files in {"empty": [], "pickle": ["pytorch_model.bin"], "broken": ["model.safetensors"]}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_bytes(b"none")
            config = (WEIGHTS.parent / "nat_shapes" / "config.json").read_text()
            (tmp_path / folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=part):
        load_classifier(name.format(tmp=tmp_path))


def test_retrieval_on_scenes_that_even_the_card_has_not_seen(clip):
    scores = score_clip(clip, seed=17, rounds=3)
    assert scores["text"] >= 0.8 and scores["image"] >= 0.8 and scores["label"] >= 0.9


def test_clip_reads_every_word_and_not_their_order(clip):
    things = [{"shape": "circle", "color": "red"}, {"shape": "square", "color": "blue"}]
    image = render(sample_scene(np.random.default_rng(0), things, frames=1))
    same = ["a red circle and a blue square", "A Blue square and a Red circle"]
    other = ["a green circle and a blue square", "a red circle and a white square", "a red cross and a blue square"]
    cosines = similarity(image, [*same, *other], clip)[0]
    assert cosines[:2].min() > cosines[2:].max() + 0.02


def test_clip_score_takes_pixels_pictures_and_videos(clip):
    from PIL import Image

    video = render(sample_scene(np.random.default_rng(1), [{"shape": "cross", "color": "blue", "direction": "up"}]))
    good = clip_score(video, "a blue cross moves up")
    assert good.shape == (17,) and (good > clip_score(video, "a white circle moves up")).all()
    torch.testing.assert_close(clip_score(video, "a blue cross", clip), good)
    eight = np.rint(video * 255).astype(np.uint8)
    torch.testing.assert_close(clip_score(eight, "a blue cross"), good)
    torch.testing.assert_close(clip_score([Image.fromarray(frame) for frame in eight], ["a blue cross"] * 17), good)
    cosine = similarity(video[:1], ["a white circle"], clip).item()
    assert clip_score(video[:1], "a white circle", clip).item() == pytest.approx(max(100 * cosine, 0))


@pytest.mark.parametrize(
    "images, texts, part",
    [
        (np.zeros((2, 8, 8, 3)), ["a"], "2 pictures but 1 texts"),
        (np.zeros((0, 8, 8, 3)), [], "no pictures"),
        (np.zeros((8, 8, 3)), "a red circle", "got shape"),
    ],
)
def test_clip_score_of_what_is_no_picture(images, texts, part, clip):
    with pytest.raises(ValueError, match=part):
        clip_score(images, texts, clip)


def test_folder_that_is_no_clip(tmp_path):
    with pytest.raises(ValueError, match="no open_clip model: it needs open_clip_config.json"):
        load_clip(tmp_path)
    for path in WEIGHTS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match="cannot open"):
        load_clip(tmp_path)


def test_clip_score_tells_which_prompt_an_image_was_generated_from(clip):
    from vision_attn.diffusion.loading import load

    prompts = ["a blue square", "a yellow circle", "a red triangle"]
    loaded = load(device="cpu")
    loaded.pipe.set_progress_bar_config(disable=True)
    images = loaded.pipe(
        prompts,
        height=48,
        width=48,
        num_frames=1,
        num_inference_steps=20,
        guidance_scale=3.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
    ).frames[:, 0]
    assert similarity(images, prompts, clip).argmax(1).tolist() == [0, 1, 2]


def test_towers_for_open_clip_are_found_by_name():
    add_towers()
    add_towers()
    for path in CONFIGS.glob("*.json"):
        config = open_clip.get_model_config(path.stem)
        assert timm.is_model(config["vision_cfg"]["timm_model_name"])
    small = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 100, "context_length": 8}
    model = open_clip.create_model("nat_mini", text_cfg=small, pretrained_image=False)
    image, text = torch.randn(1, 3, 96, 96), torch.randint(1, 99, (2, 8))
    assert model.encode_image(image).shape == (1, 512) and model.encode_text(text).shape == (2, 512)
    model.lock_image_tower()
    assert not any(p.requires_grad for p in model.visual.trunk.parameters())


def test_results_of_the_comparison_are_those_of_its_runs():
    path = RESULTS / "attention.csv"
    assert (RESULTS / "README.md").read_text() == compare.report(path)
    rows = compare.read(path)
    kinds = {row["attention"] for row in rows}
    assert {"dense", *(name for name in compare.kinds() if not name.startswith("linear"))} <= kinds
    for kind in kinds:
        seeds = [row["seed"] for row in rows if row["attention"] == kind]
        assert sorted(seeds) == ["0", "1", "2"], f"{kind}: seeds {seeds}"
