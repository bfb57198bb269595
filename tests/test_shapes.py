"""The shapes world: the judge must agree with the truth, and disagree where the truth was broken."""

import numpy as np
import pytest

from vision_attn.shapes import (
    COLORS,
    DIRECTIONS,
    SHAPES,
    WORDS,
    Scene,
    Thing,
    caption,
    judge,
    parse,
    render,
    sample_scene,
    score,
)


@pytest.mark.parametrize("things", [1, 2, 3])
@pytest.mark.parametrize("size", [(48, 48), (64, 96)])
def test_judge_agrees_with_truth(things, size):
    rng = np.random.default_rng(things)
    for _ in range(12):
        scene = sample_scene(rng, things, height=size[0], width=size[1])
        assert min(score(render(scene), caption(scene, rng)).values()) == 1.0, caption(scene)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_every_shape_and_color_as_an_image(shape, color):
    scene = sample_scene(np.random.default_rng(7), [{"shape": shape, "color": color}], frames=1)
    video = render(scene)
    assert video.shape == (1, 48, 48, 3)
    assert caption(scene) == f"a {color} {shape}"
    assert score(video, caption(scene)) == dict.fromkeys(("color", "shape", "both", "count", "direction"), 1.0)


def test_judge_finds_each_kind_of_fault():
    scene = sample_scene(np.random.default_rng(1), [{"shape": "square", "color": "red", "direction": "left"}])
    video = render(scene)
    assert score(video, "a blue square moves left")["color"] == 0
    assert score(video, "a red circle moves left")["shape"] == 0
    assert score(video, "a red square moves right")["direction"] == 0
    assert score(video[::-1], "a red square moves left")["direction"] == 0
    assert score(video, "a red square moves left and a blue circle moves up")["count"] == 0
    assert score(np.concatenate([video, video], axis=2), "a red square moves left")["count"] == 0
    empty = np.broadcast_to(video[:1, :1, :1], video.shape)
    assert score(empty, "a red square moves left") == {"color": 0, "shape": 0, "both": 0, "count": 0, "direction": 0}
    still = np.repeat(video[:1], 17, axis=0)
    assert score(still, "a red square moves left")["direction"] == 0


def test_tracks_follow_the_truth():
    scene = sample_scene(np.random.default_rng(3), 2)
    seen = judge(render(scene))
    truth = scene.paths()
    for track in seen.tracks:
        gaps = np.abs(truth - np.asarray(track.centers)).max(axis=(1, 2))
        assert gaps.min() < 3, "further than a triangle's centroid lies from its middle"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_motion_is_smooth_stays_inside_and_never_repeats(direction):
    rng = np.random.default_rng(5)
    for _ in range(20):
        scene = sample_scene(rng, [{"direction": direction}], frames=129)
        path, thing = scene.paths()[0], scene.things[0]
        margin = thing.radius * 48 * 0.9
        assert path.min() > margin - 1 and path.max() < 48 - margin + 1
        along = path @ np.asarray(DIRECTIONS[direction])
        assert (np.diff(along) > 0).all(), "it turned back, so frames could repeat"
        assert np.abs(np.diff(path, axis=0)).max() < 0.045 * 48


def test_captions_round_trip():
    rng = np.random.default_rng(11)
    for things in (1, 2, 3):
        scene = sample_scene(rng, things)
        read = parse(caption(scene))
        assert [(t["color"], t["shape"], t["direction"]) for t in read] == [
            (t.color, t.shape, t.direction) for t in scene.things
        ]
        assert set(caption(scene, rng).split()) <= set(WORDS)


@pytest.mark.parametrize("text", ["", "a circle", "a red", "a red circle dances", "red red", "a red circle and"])
def test_captions_outside_the_grammar_are_refused(text):
    with pytest.raises(ValueError, match="cannot read"):
        parse(text)


def test_scenes_are_the_same_for_the_same_seed_and_scale_with_size():
    one, same = (sample_scene(np.random.default_rng(9), 2) for _ in range(2))
    assert one == same and (render(one) == render(same)).all()
    large = render(Scene(one.things, 192, 192, 17))
    small = large.reshape(17, 48, 4, 48, 4, 3).mean((2, 4))
    assert np.abs(small - render(one)).mean() < 0.004


def test_bad_scenes_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="1 to 3 things, got 4"):
        sample_scene(np.random.default_rng(0), 4)
    monkeypatch.setattr("vision_attn.shapes.scene._apart", lambda *_: False)
    with pytest.raises(ValueError, match="no room"):
        sample_scene(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        render(Scene((Thing("star", "red", 0.1, (0.5, 0.5)),)))
    with pytest.raises(ValueError, match="got shape"):
        judge(np.zeros((48, 48, 3)))
