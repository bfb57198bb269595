"""Training of the built-in vision models: what they are taught is true, stopping changes nothing, every stage runs."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_attn import compare, evaluate, train
from vision_attn.batches import classified, draw
from vision_attn.fit import fit
from vision_attn.shapes import caption, parse, render
from vision_attn.shapes.render import coverage
from vision_attn.shapes.scene import COLORS
from vision_attn.shapes.stills import LABELS, label_of, largest, sample_still


def test_the_label_is_the_thing_that_covers_clearly_most_pixels():
    rng = np.random.default_rng(0)
    counts = Counter()
    for _ in range(80):
        scene = sample_still(rng)
        pixels = [
            coverage(thing, path, 192, 192).sum()
            for thing, path in zip(scene.things, scene.paths() * 192 / 48, strict=True)
        ]
        main = scene.things[int(np.argmax(pixels))]
        assert largest(scene) is main and LABELS[label_of(scene)] == f"{main.color} {main.shape}"
        assert sorted(pixels)[-2:][0] * 1.17 <= max(pixels) or len(pixels) == 1
        counts[len(pixels), scene.things.index(main)] += 1
    assert len(counts) == 1 + 2 + 3, "one to three things, and the largest stands in every place of a caption"


def test_labels_are_balanced_in_crowds_too():
    rng = np.random.default_rng(1)
    scenes = [sample_still(rng) for _ in range(600)]
    shares = Counter(largest(scene).shape for scene in scenes if len(scene.things) == 3)
    assert all(0.16 < share / shares.total() < 0.34 for share in shares.values()) and len(shares) == 4


def test_pictures_are_those_of_the_scene():
    rng = np.random.default_rng(2)
    scenes = [sample_still(rng) for _ in range(4)]
    plain = draw(scenes)
    pixels = np.concatenate([render(scene) for scene in scenes])
    assert torch.equal(plain, torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1)
    seen = {round((draw(scenes, np.random.default_rng(i)) - plain).abs().mean().item(), 3) for i in range(8)}
    assert len(seen) > 4 and 0 < max(seen) < 0.2, "sizes and noise vary, and stay close to the scene"
    one, same = (classified(np.random.default_rng(3), 5) for _ in range(2))
    assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1])


def small_fit(out, stop=None):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    calls = itertools.count(1)

    def loss_of(rng, progress):
        if next(calls) == stop:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((8, 3))).float()
        return (module(x) - x[:, :2]).square().mean()

    fit("toy", module, loss_of, out=out, steps=6, lr=0.05, seed=0, decay=0.9, every=2)
    return module.state_dict()


def test_buffers_are_averaged_and_kept_for_resuming(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = small_fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path, stop=6)
    resumed = small_fit(tmp_path)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert whole["1.num_batches_tracked"] == 6
    assert (whole["1.running_mean"] != 0).all()


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("a red circle", "a red circle", True),
        ("a red circle", "a big red circle", True),
        ("a small red circle", "a big red circle", False),
        ("a red circle", "a red cross", False),
        ("a red circle", "a red circle and a red circle", False),
        ("a red circle and a blue cross", "a blue cross and a red circle", True),
        ("a red circle and a blue cross", "a red cross and a blue circle", False),
        ("a small red circle and a big red circle", "a big red circle and a red circle", True),
    ],
)
def test_which_captions_may_tell_of_one_picture(one, other, same):
    assert train.same_picture(parse(one), parse(other)) == same == train.same_picture(parse(other), parse(one))


def test_contrastive_loss_leaves_out_what_also_fits():
    torch.manual_seed(0)
    texts = ["a red circle", "a blue cross", "a big red circle", "a green square"]
    logits = torch.randn(4, 4, dtype=torch.float64)
    rows = 0.0
    for i in range(4):
        for matrix in (logits, logits.T):
            others = [j for j in range(4) if j == i or {i, j} != {0, 2}]
            rows += torch.logsumexp(matrix[i, others], 0) - matrix[i, i]
    torch.testing.assert_close(train.contrastive_loss(logits, texts), rows / 8)
    texts[2] = "a white square"
    plain = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    torch.testing.assert_close(train.contrastive_loss(logits, texts), plain)


def test_shares_right_takes_labels_apart():
    truth = ["red circle", "red circle", "blue cross", "white square"]
    guess = ["red circle", "red cross", "white cross", "green circle"]
    labels, guesses = (torch.tensor([LABELS.index(name) for name in names]) for names in (truth, guess))
    got = evaluate.shares_right(F.one_hot(guesses, len(LABELS)).float(), labels)
    assert got == {"shape": 0.5, "color": 0.5, "both": 0.25}
    assert len(LABELS) == 4 * len(COLORS)


def test_fifty_captions_fit_one_scene_each():
    scenes = evaluate.different_scenes(np.random.default_rng(0), 50)
    texts = [parse(caption(scene)) for scene in scenes]
    assert not any(train.same_picture(a, b) for a, b in itertools.combinations(texts, 2))
    assert Counter(map(len, texts)).keys() == {1, 2, 3}


def test_retrieval_counts_what_is_right(monkeypatch):
    def similarity(images, texts, share):
        """The diagonal is best for the first part of the pictures; for the rest another caption is."""
        cosines = torch.eye(len(images), len(texts))
        rest = int(len(images) * share)
        cosines[rest:] = 0
        cosines[rest:, 0] = 0.5
        return cosines

    monkeypatch.setattr("vision_attn.clip.similarity", similarity)
    scores = evaluate.score_clip(0.5, seed=0, rounds=2)
    assert scores["text"] == 0.5 and 0.5 <= scores["image"] < 0.6


def test_every_stage_runs_and_leaves_a_card(tmp_path, capsys, monkeypatch):
    import open_clip
    import timm

    out = ["--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="train nat_shapes first"):
        train.main(["clip_shapes", *out])
    for stage in ("nat_shapes", "biformer_shapes"):
        train.main([stage, *out, "--steps", "2", "--batch", "4"])
    start = timm.create_model(f"local-dir:{tmp_path}/nat_shapes", pretrained=True)
    train.main(["clip_shapes", *out, "--steps", "1", "--batch", "4", "--lr", "1e-9"])
    train.main(["evaluate", *out, "--scenes", "10"])
    capsys.readouterr()
    clip = open_clip.create_model(f"local-dir:{tmp_path}/clip_shapes")
    trunk = clip.visual.trunk.state_dict()
    assert torch.equal(trunk["stem.proj.0.weight"], start.stem.proj[0].weight), "it starts from nat_shapes"
    for name in ("nat_shapes", "biformer_shapes", "clip_shapes"):
        record = json.loads((tmp_path / name / "training.json").read_text())
        assert record["command"].startswith(f"{name} --out OUT --steps") and record["seed"] == 0
        card = (tmp_path / name / "README.md").read_text()
        assert f"python -m vision_attn.train {record['command']}" in card and f"{record['parameters']:,}" in card
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    named = [path.name for path in tmp_path.rglob("*.json") if str(tmp_path) in path.read_text()]
    assert not named, "a path of this machine"

    monkeypatch.setattr(compare, "kinds", lambda: {"dense": compare.Dense, "again": compare.Dense})
    monkeypatch.setattr(compare, "PICTURES", 40)
    monkeypatch.setattr(compare, "FRESH", 8)
    train.main(["compare", *out, "--steps", "1"])
    rows = compare.read(tmp_path / "compare" / "attention.csv")
    runs = [(row["attention"], row["seed"]) for row in rows]
    assert runs == [(kind, str(seed)) for kind in ("dense", "again") for seed in (0, 1, 2)]
    for one, same in zip(rows[:3], rows[3:], strict=True):  # the seed decides everything
        assert [one[key] for key in ("shape", "color", "both")] == [same[key] for key in ("shape", "color", "both")]
    monkeypatch.setattr(compare, "fit", None)  # runs that are done are not repeated
    train.main(["compare", *out, "--steps", "1"])
    assert "| dense |" in (tmp_path / "compare" / "README.md").read_text()


def test_every_kind_of_attention_learns_in_the_comparison():
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    outs = {}
    for name, layer in compare.kinds().items():
        torch.manual_seed(0)
        model = compare.Classifier(layer)
        outs[name] = model(x)
        outs[name].square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters()), name
    assert len(outs) >= 8
    for one, other in itertools.combinations(outs, 2):
        assert not torch.allclose(outs[one], outs[other], atol=1e-5), f"{one} and {other} are the same"


def test_the_table_gives_means_and_deviations(tmp_path):
    path = tmp_path / "attention.csv"
    lines = [",".join(compare.COLUMNS)]
    lines += [
        f"dense,{seed},1000,600,{shape},1.0,0.5,{ms}" for seed, shape, ms in ((0, 0.5, 9), (1, 0.6, 7.4), (2, 0.7, 8))
    ]
    path.write_text("\n".join(lines) + "\n")
    assert compare.table(path).splitlines()[-1] == "| dense | 1,000 | 60.0 ± 10.0 | 100.0 ± 0.0 | 50.0 ± 0.0 | 7 |"
    assert "600 steps" in compare.report(path) and "over 3 seeds" in compare.report(path)
