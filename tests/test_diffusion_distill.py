"""The distillation trainers, end to end on tiny random models: losses by hand, falling, resumed to the same bits."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
from vision_attn import attach  # noqa: E402
from vision_attn.diffusion import CLEAR, LinFusion, distill, tiny_image  # noqa: E402
from vision_attn.shapes import score  # noqa: E402

FEW = ["--images", "16", "--sampling-steps", "1", "--batch", "2", "--every", "2"]
STAGES = {"clear": ["--radius", "2", "--pooled", "3"], "linfusion": []}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the two tiny pipelines with random weights, by trainer."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("models")
    for name, make in (("clear", tiny_image.flux), ("linfusion", tiny_image.stable_diffusion)):
        pipe = make()
        generator = torch.Generator().manual_seed(1)
        for parameter in (pipe.transformer if name == "clear" else pipe.unet).parameters():
            if not parameter.any():  # gates that start at zero would hide the attention
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        pipe.save_pretrained(folder / name)
    return folder


def run(models, name: str, out, *more: str) -> dict:
    distill.main([name, str(models / name), "--out", str(out), *STAGES[name], *FEW, *more])
    return json.loads((out / f"{name}.json").read_text())


def test_noised_latents_of_flux():
    pipe, clean = tiny_image.flux(), torch.randn(3, 36, 32)
    call, target = distill.noisy(pipe, clean, ["a red circle"] * 3, 3.5)
    level = call["timestep"]
    assert level.shape == (3,) and 0 <= level.min() and level.max() <= 1
    torch.testing.assert_close(call["hidden_states"], clean + level[:, None, None] * target)
    assert call["img_ids"][7].tolist() == [0, 1, 1]
    assert pipe.transformer(**call).sample.shape == clean.shape


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noised_latents_of_a_unet(kind):
    pipe, clean = tiny_image.stable_diffusion(), torch.randn(3, 8, 12, 12)
    pipe.scheduler.register_to_config(prediction_type=kind)
    call, target = distill.noisy(pipe, clean, ["a red circle"] * 3, 3.5)
    kept = pipe.scheduler.alphas_cumprod[call["timestep"]].view(-1, 1, 1, 1)
    noise = target if kind == "epsilon" else (target + (1 - kept).sqrt() * clean) / kept.sqrt()
    torch.testing.assert_close(call["sample"], kept.sqrt() * clean + (1 - kept).sqrt() * noise, atol=1e-5, rtol=1e-4)
    assert 0.8 < noise.std() < 1.2


@pytest.mark.parametrize("radius", [2, 20])
def test_the_three_losses_of_clear(radius):
    """By hand; with windows that hold the whole image the student is the teacher."""
    pipe = tiny_image.flux()
    args = type("Args", (), {"radius": radius, "pooled": None})
    student = distill.Student(pipe.transformer, distill.clear_student(args))
    torch.manual_seed(0)
    call, target = distill.noisy(pipe, torch.randn(2, 36, 32), ["a red circle"] * 2, 3.5)
    with torch.no_grad():
        losses = student.losses(call, target)
    other, seen = copy.deepcopy(pipe.transformer), {}
    for block in (0, 4):  # every fourth of five single blocks
        other.single_transformer_blocks[block].attn.register_forward_hook(
            lambda m, args, out, at=block: seen.setdefault(at, []).append(out)
        )
    with torch.no_grad():
        teacher = other(**call).sample
        with attach(other, CLEAR(radius)):
            ours = other(**call).sample
    assert set(losses) == {"target", "output", "attention"}
    torch.testing.assert_close(losses["target"], (ours - target).square().mean())
    torch.testing.assert_close(losses["output"], (ours - teacher).square().mean())
    both = [(a - b).square().mean() for a, b in seen.values()]
    assert len(both) == 2
    torch.testing.assert_close(losses["attention"], sum(both) / 2)
    assert all((losses[term] < 1e-12) == (radius == 20) for term in ("output", "attention"))
    assert distill.total({"target": 1.0, "output": 2.0, "attention": 4.0}) == 4.0


@pytest.mark.parametrize("name", list(STAGES))
def test_end_to_end(models, tmp_path, name):
    done = run(models, name, tmp_path, "--steps", "6", "--lr", "1e-2")
    assert done["after"]["loss"] < done["before"]["loss"]
    if name == "clear":  # the attention of a U-Net that nobody trained is next to nothing
        assert done["after"]["attention"] < done["before"]["attention"] and done["factor"] > 1
    assert done["images"] == 16
    path = tmp_path / f"{name}.safetensors"
    pipe = (tiny_image.flux if name == "clear" else tiny_image.stable_diffusion)()
    method = CLEAR(2, 3, weights=path) if name == "clear" else LinFusion(path)
    with attach(pipe, method), torch.no_grad():
        pipe.set_progress_bar_config(disable=True)
        assert np.isfinite(
            pipe("a red circle", height=48, width=48, num_inference_steps=1, output_type="np").images
        ).all()
    stored = sum(tensor.numel() for tensor in load_file(path).values())
    assert stored == done["parameters"]  # nothing else of the model
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", list(STAGES))
def test_an_interrupted_run_goes_on_to_the_same_bits(models, tmp_path, monkeypatch, name):
    whole = run(models, name, tmp_path / "whole", "--steps", "4")
    losses, calls = distill.Student.losses, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 5:  # one chunk of held-out images, then steps 0, 1 and 2
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr(distill.Student, "losses", fail)
    with pytest.raises(KeyboardInterrupt):
        run(models, name, tmp_path / "parts", "--steps", "4")
    assert not (tmp_path / "parts" / f"{name}.safetensors").exists()
    monkeypatch.setattr(distill.Student, "losses", losses)
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts" / "images").iterdir()}
    again = run(models, name, tmp_path / "parts", "--steps", "4")
    assert len(images) == 2 and all(path.stat().st_mtime_ns == at for path, at in images.items())
    ours, theirs = (load_file(tmp_path / part / f"{name}.safetensors") for part in ("parts", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and set(ours) == set(theirs)
    assert again["after"] == whole["after"] and again["before"] == whole["before"]


def test_what_is_refused(models, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    cases = [
        (["clear", str(models / "linfusion")], "clear distils a FluxPipeline; .* is a StableDiffusionPipeline"),
        (["linfusion", str(models / "clear")], "linfusion distils a StableDiffusionPipeline"),
        (["clear", str(tmp_path / "nothing")], "cannot be opened as a diffusers pipeline"),
        (["clear", str(models / "clear"), "--prompts", str(tmp_path / "empty.txt")], "has no prompts"),
        (["clear", str(models / "clear"), "--images", "8", "--sampling-steps", "1"], "leaves none to train on"),
        (["clear", str(models / "clear"), "--images", "8", "--sampling-steps", "2"], "was made with other settings"),
    ]
    for words, message in cases:
        with pytest.raises(SystemExit, match=message):
            distill.main([*words, "--out", str(tmp_path / "out"), "--radius", "2"])


def test_the_pictures_of_a_teacher_show_what_their_captions_say():
    pictures, texts = distill.stills(np.random.default_rng(0), 8)
    assert pictures.shape == (8, 3, 48, 48) and -1 <= pictures.min() < -0.5 and 0.5 < pictures.max() <= 1
    for picture, text in zip(pictures, texts, strict=True):
        found = score((picture.permute(1, 2, 0)[None].numpy() + 1) / 2, text)
        assert found["color"] == found["shape"] == 1, text


def test_a_teacher_is_a_pipeline(tmp_path):
    from diffusers import FluxPipeline

    words = ["teacher", "flux", "--out", str(tmp_path), "--steps", "2", "--vae-steps", "2", "--batch", "2"]
    distill.main(words)
    pipe = FluxPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", height=48, width=48, num_inference_steps=1).images[0].size == (48, 48)
    assert pipe.vae.config.scaling_factor != 1
