"""The table of methods: what is measured, what it is compared with, and that runs go on where they stopped."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from vision_attn import attach  # noqa: E402
from vision_attn.diffusion import clips, distill, drawing, evaluate, lora, measures, results, trained  # noqa: E402
from vision_attn.diffusion.comparison import PLAIN, SIZES, TRUTH, RandomBlocks, Row, rows  # noqa: E402
from vision_attn.diffusion.loading import BUILT_IN, load  # noqa: E402
from vision_attn.kernels.patterns import Neighborhood, Radial  # noqa: E402
from vision_attn.shapes import parse  # noqa: E402
from vision_attn.shapes.scene import BACKGROUND, COLORS  # noqa: E402


def clip(places, side=48, half=8, color="red"):
    """One frame per entry of `places`, which lists the left upper corners of squares."""
    video = np.full((len(places), side, side, 3), BACKGROUND, np.uint8)
    for frame, corners in zip(video, places, strict=True):
        for x, y in corners:
            frame[y : y + 2 * half, x : x + 2 * half] = COLORS[color]
    return video


def test_things_are_counted_against_the_caption():
    one, two = [(2, 2)], [(2, 2), (28, 28)]
    found = measures.measure(clip([one, two, [], two]), "a red square", 17)
    assert found["count_error"] == pytest.approx(3 / 4) and found["objects"] == pytest.approx(5 / 4)
    assert measures.measure(clip([two, two]), "a red square and a red square", 17)["count_error"] == 0


def test_agreement_is_the_share_of_what_is_named():
    moving = clip([[(2 + 2 * i, 10)] for i in range(8)])
    expected = {"a red square moves right": 1, "a red square moves up": 2 / 3, "a blue cross moves right": 1 / 3}
    for text, share in expected.items():
        assert measures.measure(moving, text, 17)["agreement"] == pytest.approx(share)


def test_a_direction_counts_only_where_one_is_named():
    still = clip([[(2, 2)]])
    assert measures.measure(still, "a blue square", 17)["agreement"] == 1 / 2
    assert "motion" not in measures.measure(still, "a blue square", 17)


def test_motion_is_the_way_per_frame():
    right = measures.measure(clip([[(2 + 2 * i, 10)] for i in range(8)]), "a red square", 17)
    assert right["motion"] == pytest.approx(2 / 48)
    there_and_back = measures.measure(clip([[(10, 10 + 3 * (i % 2))] for i in range(8)]), "a red square", 17)
    assert there_and_back["motion"] == pytest.approx(3 / 48)
    assert measures.measure(clip([[(2, 2)]] * 4), "a red square", 17)["motion"] == 0
    assert measures.measure(clip([[]] * 4), "a red square", 17)["motion"] == 0


def test_repetition_is_looked_for_in_clips_longer_than_trained():
    way = [[(2 + 2 * (i % 12), 10)] for i in range(24)]
    assert measures.measure(clip(way), "a red square", 12)["no_repeat"] == 0
    onwards = clip([[(2 + i, 10 + i // 2)] for i in range(24)])
    assert measures.measure(onwards, "a red square", 12)["no_repeat"] == 100
    assert "no_repeat" not in measures.measure(onwards, "a red square", 24)
    assert "no_repeat" not in measures.measure(clip([[(2, 2)]] * 24), "a red square", 12), "it stands still"


@pytest.mark.parametrize("width", [1, 2, 5])
def test_sharpness_is_the_height_of_an_edge_over_its_width(width):
    ramp = np.clip((np.arange(32) - 10) / width, 0, 1) * 0.6
    pixels = np.broadcast_to(ramp[None, None, :, None], (3, 20, 32, 3))
    assert measures.sharpness(pixels) == pytest.approx(0.6 / width)
    assert measures.sharpness(pixels.swapaxes(1, 2)) == pytest.approx(0.6 / width)
    assert measures.sharpness(np.zeros((2, 8, 8, 3))) == 0


def test_psnr():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert measures.psnr(black + 10, black) == pytest.approx(20 * math.log10(25.5))
    assert measures.psnr(black, black) == math.inf


@pytest.mark.parametrize("like", [Neighborhood(window=(3, 5, 5)), Radial(decay=0.5, block=4, thin=8)])
@pytest.mark.parametrize("grid", [(5, 6, 6), (3, 7, 5)])
def test_random_blocks_are_as_many_as_the_pattern_has_pairs(like, grid):
    drawn = RandomBlocks(like, grid).patterns(layers=3)
    blocks = -(-math.prod(grid) // 6)
    for pattern in drawn:
        mask = pattern.mask(grid)
        assert mask.diagonal().all()
        assert abs(mask.float().mean().item() - like.density(grid)) < 0.5 / blocks
    assert not torch.equal(drawn[0].mask(grid), drawn[1].mask(grid))
    again = RandomBlocks(like, grid).patterns(layers=3)
    assert all(torch.equal(a.mask(grid), b.mask(grid)) for a, b in zip(drawn, again, strict=True))


def test_every_row_has_its_control_and_settings_of_its_own():
    for size in SIZES.values():
        mine = rows(size)
        names = [row.name for row in mine]
        assert names[:2] == [TRUTH, PLAIN] and len(set(names)) == len(names)
        assert {row.control for row in mine} - {""} <= set(names)
        settings = [json.dumps(row.to_dict(), sort_keys=True) for row in mine]
        assert len(set(settings)) == len(settings)


def test_every_method_for_video_has_a_row():
    from vision_attn.diffusion.methods import _FILES

    shown = {row.to_dict()["method"].get("method") for size in SIZES.values() for row in rows(size) if row.method}
    shown |= {"ir-diffusion"} & {row.name.lower() for row in rows(SIZES["still"])}
    assert set(_FILES) <= shown


def test_captions_stay_the_same_when_there_are_more():
    for size in SIZES.values():
        texts = [clips.caption(size, number) for number in range(30)]
        assert len(set(texts)) >= 15 and all(len(parse(text)) == 1 + (size.name == "still") for text in texts)
    one, two = parse(clips.caption(SIZES["still"], 3))
    assert one["color"] != two["color"] and one["shape"] != two["shape"]


def test_every_row_goes_into_the_built_in_model_and_out_again():
    pipe = load(device="cpu").pipe
    for size in SIZES.values():
        for row in rows(size):
            if row.method is not None and size.name != "unet":
                attach(pipe, row.method).detach()
    assert not hasattr(pipe.transformer, "_diffusers_hook")


def scored(**values):
    """Clips of as many prompts as there are values of each measure."""
    count = len(next(iter(values.values())))
    return {(i, 0): {"measures": {name: value[i] for name, value in values.items()}} for i in range(count)}


def test_a_difference_needs_two_standard_errors():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 1, 12)
    for shift in (0.1, 0.02, -0.1):
        noise = rng.normal(0, 0.05, 12)
        gain = shift + noise
        sure = abs(gain.mean()) > 2 * gain.std(ddof=1) / math.sqrt(12)
        found = results.differences(scored(agreement=base + gain), scored(agreement=base), {"agreement": 1.0})
        assert found["better"] == (["agreement"] if sure and gain.mean() > 0 else [])
        assert found["worse"] == (["agreement"] if sure and gain.mean() < 0 else [])
    worse = results.differences(scored(count_error=base + 1), scored(count_error=base), {"count_error": 0.0})
    assert worse == {"better": [], "worse": ["count error"]}


def test_motion_is_better_nearer_to_the_truth():
    fast, slow, right = ([value] * 6 for value in (0.9, 0.1, 0.4))
    truth = {"motion": 0.45}
    for other in (fast, slow):
        assert results.differences(scored(motion=right), scored(motion=other), truth)["better"] == ["motion"]
        assert results.differences(scored(motion=other), scored(motion=right), truth)["worse"] == ["motion"]


def test_few_clips_say_nothing():
    few = scored(agreement=[1.0] * 4)
    assert results.differences(few, scored(agreement=[0.0] * 4), {"agreement": 1.0}) is None
    many = scored(agreement=[1.0] * 9)
    some = {
        (i, 0): {"measures": {"agreement": 1.0, **({"no_repeat": 9.0 - i / 99} if i < 3 else {})}} for i in range(9)
    }
    others = {clip: {"measures": {"agreement": 1.0, "no_repeat": 5.0}} for clip in some}
    assert results.differences(some, others, {"agreement": 1.0, "no_repeat": 9.0}) == {"better": [], "worse": []}
    still = {clip: {"measures": {"motion": 0.0}} for clip in many}
    assert results.differences(many, still, {"agreement": 1.0}) == {"better": [], "worse": []}
    apart = {(i + 6, 0): clip for (i, _), clip in many.items()}
    assert results.differences(many, apart, {"agreement": 1.0}) is None, "three clips in common"


def test_a_row_is_the_mean_over_its_clips_with_its_error(tmp_path):
    cache, size = clips.Cache(tmp_path, BUILT_IN, 2), SIZES["2x-large"]
    plain = next(row for row in rows(size) if row.name == PLAIN)
    for prompt, things in enumerate([1, 2, 2, 4]):
        corners = [(2 + 22 * i, 2) for i in range(things)]
        cache.store((size, plain, prompt, 0), clip([corners], side=96), {"seconds": 9.0**prompt, "density": 0.5})
    (one,) = results.summarize(cache, prompts=5, seeds=1)
    assert one["clips"] == 4 and one["seconds"] == 45 and one["density"] == 0.5
    assert one["count_error"] == [1.25, round(np.std([0, 1, 1, 3], ddof=1) / 2, 4)]
    page = results.page({"command": "", "steps": 2, "rows": [one]})
    assert "| 1.25 +- 0.63 |" in page and "17 frames of 96 x 96 pixels, 5 x 12 x 12 tokens" in page


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A run of three rows, one clip each, interrupted before the last."""
    folder = tmp_path_factory.mktemp("evaluate")
    command = ["--cache", str(folder / "cache"), "--out", str(folder / "out"), "--sizes", "1x", "--rows", TRUTH, PLAIN]
    command += ["neighborhood", "--prompts", "1", "--seeds", "1", "--steps", "2"]
    return folder, command


def test_an_interrupted_run_goes_on_and_draws_nothing_twice(once, monkeypatch):
    folder, command = once
    drawn, draw = [], drawing.Artist.draw

    def counted(self, size, row, prompt, seed):
        if row.name == "neighborhood" and not drawn.count("stop"):
            drawn.append("stop")
            raise KeyboardInterrupt
        drawn.append(row.name)
        draw(self, size, row, prompt, seed)

    monkeypatch.setattr(drawing.Artist, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    assert drawn == [TRUTH, PLAIN, "stop"] and not (folder / "out").exists()
    evaluate.main(command)
    assert drawn[3:] == ["neighborhood", "random, as dense as neighborhood"]
    evaluate.main(command)
    assert len(drawn) == 5
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    found = json.loads((folder / "out" / "results" / "evaluation.json").read_text())
    by_name = {one["row"]: one for one in found["rows"]}
    assert by_name[TRUTH]["agreement"] == [1.0, None] and by_name[TRUTH]["seconds"] is None
    assert by_name[PLAIN]["density"] == 1 and by_name[PLAIN]["seconds"] > 0 and "psnr" not in by_name[PLAIN]
    assert by_name["neighborhood"]["density"] == round(Neighborhood(window=(3, 5, 5)).density((5, 6, 6)), 3)
    assert 5 < by_name["neighborhood"]["psnr"][0] < 60
    page = (folder / "out" / "RESULTS.md").read_text()
    assert page == results.page(found) and "too few clips" in page
    assert "--cache CACHE --prompts 1 --seeds 1 --steps 2\n" in page and str(folder) not in page


def test_a_run_goes_on_from_the_scores_alone(once, tmp_path, monkeypatch):
    """Where the folder of clips is lost, only what the picture shows is drawn again, and nothing is lost."""
    folder, command = once
    out, scores = folder / "out", folder / "out" / "results" / "clips.csv"
    evaluate.main([*command, "--seeds", "2"])
    drawn, draw = [], drawing.Artist.draw

    def lines(seed):
        with open(scores, newline="") as file:
            return [line for line in csv.DictReader(file) if line["seed"] == str(seed)]

    def counted(self, size, row, prompt, seed):
        drawn.append((row.name, seed))
        draw(self, size, row, prompt, seed)

    second = lines(1)
    monkeypatch.setattr(drawing.Artist, "draw", counted)
    again = [str(tmp_path) if word == str(folder / "cache") else word for word in command]
    evaluate.main([*again, "--seeds", "2"])
    names = [TRUTH, PLAIN, "neighborhood", "random, as dense as neighborhood"]
    assert drawn == [(name, 0) for name in names]
    found = {one["row"]: one for one in json.loads((out / "results" / "evaluation.json").read_text())["rows"]}
    assert [found[name]["clips"] for name in names] == [2] * 4 and found["neighborhood"]["psnr"][1] is not None

    evaluate.main([*again, "--seeds", "3", "--rows", names[-1]])
    assert drawn[4:] == [(names[-1], 2), (PLAIN, 2)], "PSNR needs the plain clip"
    assert {line["row"]: bool(line["psnr"]) for line in lines(2)} == {names[-1]: True, PLAIN: False}

    evaluate.main([*again, "--table"])
    assert len(second) == 4 and lines(1) == second, "scores of other clips stay"
    monkeypatch.setattr(clips, "_MEASURED_BY", "something else")
    assert not clips.Cache(tmp_path / "none", BUILT_IN, 2, scores).has(SIZES["1x"], Row(PLAIN), 0, 0)


def test_the_noise_of_a_clip_is_that_of_its_prompt_and_seed(once, tmp_path):
    folder, command = once
    args = (SIZES["1x"], Row(PLAIN), 0, 0)
    cache = clips.Cache(tmp_path, BUILT_IN, 2)
    artist = drawing.Artist(cache, BUILT_IN)
    artist.draw(*args)
    artist.draw(SIZES["1x"], Row(PLAIN), 0, 1)
    assert np.array_equal(cache.video(*args), clips.Cache(folder / "cache", BUILT_IN, 2).video(*args))
    assert not np.array_equal(cache.video(*args), cache.video(SIZES["1x"], Row(PLAIN), 0, 1))


def test_clips_of_other_settings_are_other_clips(tmp_path):
    cache, size = clips.Cache(tmp_path, BUILT_IN, 2), SIZES["1x"]
    window = Row("a", Neighborhood(window=(3, 5, 5)))
    paths = {
        cache.path(size, window, 0, 0),
        cache.path(size, Row("a", Neighborhood(window=(3, 5, 3))), 0, 0),
        cache.path(size, Row("a", window.method, "upscale"), 0, 0),
        cache.path(size, Row("a", window.method, options={"strength": 0.5}), 0, 0),
        cache.path(SIZES["2x-long"], window, 0, 0),
        cache.path(dataclasses.replace(size, frames=21), window, 0, 0),
        cache.path(size, window, 1, 0),
        cache.path(size, window, 0, 1),
        clips.Cache(tmp_path, BUILT_IN, 3).path(size, window, 0, 0),
    }
    assert len(paths) == 9
    assert cache.path(size, Row("another name", window.method), 0, 0) in paths
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"others")
    assert clips.Cache(tmp_path, tmp_path / "model", 2).path(size, window, 0, 0) not in paths


def test_a_clip_is_measured_again_when_the_measures_changed(tmp_path, monkeypatch):
    cache, args = clips.Cache(tmp_path, BUILT_IN, 2), (SIZES["2x-long"], Row(PLAIN), 0, 0)
    cache.store(args, clip([[(2, 2)]] * 2), {"seconds": 1.0, "density": 1.0})
    assert cache.record(*args)["measures"]["count_error"] == 0
    monkeypatch.setattr(measures, "measure", lambda *_: {"count_error": 7.0})
    assert cache.record(*args)["measures"]["count_error"] == 0, "kept"
    monkeypatch.setattr(clips, "_MEASURED_BY", "something else")
    assert cache.record(*args) | {"measured_by": ""} == {
        "seconds": 1.0, "density": 1.0, "measures": {"count_error": 7.0}, "measured_by": "",
    }  # fmt: skip
    assert cache.record(*args)["measured_by"] == "something else"


def test_a_clip_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    cache, args = clips.Cache(tmp_path, BUILT_IN, 2), (SIZES["1x"], Row(PLAIN), 0, 0)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError):
        cache.store(args, clip([[]]), {})
    assert not cache.has(*args) and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_page_is_written_from_the_numbers():
    folder = Path(results.__file__).parent
    found = json.loads((folder / "results" / "evaluation.json").read_text())
    assert (folder / "RESULTS.md").read_text() == results.page(found)


WAYS = [("1x", "calibrated"), ("2x-large", "FreeSwim, cached"), ("2x-large", "resized"), ("still", "IR-Diffusion")]
WAYS += [("edit", PLAIN), ("edit", "protect_image"), ("edit", "noise as large")]


@pytest.mark.parametrize("name, row", WAYS)
def test_every_way_draws_a_clip_of_its_size(tmp_path, name, row):
    cache, size = clips.Cache(tmp_path, BUILT_IN, 2), SIZES[name]
    one = next(each for each in rows(size) if each.name == row)
    drawing.Artist(cache, BUILT_IN).draw(size, one, 0, 0)
    assert cache.video(size, one, 0, 0).shape == (size.frames, size.side, size.side, 3)
    record = cache.record(size, one, 0, 0)
    assert record["seconds"] > 0 and (record["density"] is None or 0 < record["density"] <= 1)
    if row == "resized":
        small = cache.video(SIZES["1x"], Row(PLAIN), 0, 0).astype(float)
        large = cache.video(size, one, 0, 0).reshape(17, 48, 2, 48, 2, 3).mean((2, 4))
        assert np.abs(large - small)[:, 1:-1, 1:-1].mean() < 4


QUICK = {
    "flux": "distill teacher flux --steps 1 --vae-steps 1 --batch 2",
    "unet": "distill teacher unet --steps 1 --vae-steps 1 --batch 2",
    "clear": "distill clear {flux} --radius 2 --pooled 3 --steps 1 --batch 2 --images 16 --sampling-steps 1",
    "linfusion": "distill linfusion {unet} --steps 1 --batch 2 --images 16 --sampling-steps 1",
}


@pytest.mark.parametrize("name", ["flux", "unet"])
def test_image_models_and_their_layers_are_trained_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trained, "COMMANDS", trained.COMMANDS | QUICK)
    cache, size = clips.Cache(tmp_path, BUILT_IN, 1), SIZES[name]
    mine, artist = rows(size), drawing.Artist(cache, BUILT_IN)
    for row in mine:
        artist.draw(size, row, 0, 0)
        assert cache.video(size, row, 0, 0).shape == (1, 48, 48, 3)
    own, calls = [artist._trained(row) for row in mine[1:]], []
    assert [method.to_dict().get("weights") is not None for _, method in own] == [False, False, True]
    assert cache.record(size, mine[1], 0, 0)["density"] == 1.0 and len(artist._pipes) == 1
    monkeypatch.setattr(distill, "main", calls.append)
    assert all(trained.folder(tmp_path, stored.split("-")[0]).name == stored for stored in mine[-1].options.values())
    assert not calls


def test_a_row_with_a_lora_draws_with_it(tmp_path):
    cache, size, plain = clips.Cache(tmp_path, BUILT_IN, 1), SIZES["2x-long"], load(device="cpu").pipe
    for layer in lora.add_lora(plain.transformer, rank=1):
        torch.nn.init.constant_(layer.default.weight, 0.3)
    lora.save_lora(plain, tmp_path / "trained" / trained.key("lora"))
    (tmp_path / "trained" / trained.key("lora") / "done").touch()
    by_name, artist = {row.name: row for row in rows(size)}, drawing.Artist(cache, BUILT_IN)
    drawn = []
    for name in ("radial", "radial, with a LoRA", "radial"):
        artist.draw(size, by_name[name], 0, 0)
        drawn.append(cache.video(size, by_name[name], 0, 0))
    assert np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("words, told", [(["--rows", "tea"], "neighborhood"), (["--seeds", "0"], "at least 1")])
def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, words, told):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--cache", str(tmp_path), *words])
    assert stopped.value.code == 2 and told in capsys.readouterr().err
