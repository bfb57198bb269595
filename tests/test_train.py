"""Training of the built-in model: resumable to the bit, and every stage runs end to end."""

import json

import pytest
import torch
from torch import nn

from vision_attn.diffusion import train


def tiny_fit(out, steps_until_stop=None):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    calls = 0

    def loss_of(rng, progress):
        nonlocal calls
        calls += 1
        if steps_until_stop and calls > steps_until_stop:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((8, 3))).float() + 0.1 * torch.randn(8, 3)
        return (module(x) - x[:, :2]).square().mean()

    train.fit("toy", module, loss_of, out=out, steps=6, lr=0.05, seed=0, decay=0.9, every=2)
    return [p.detach().clone() for p in module.parameters()]


def test_an_interrupted_training_resumes_to_the_same_bits(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = tiny_fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tiny_fit(tmp_path, steps_until_stop=5)
    assert not list(tmp_path.glob("*.partial"))
    resumed = tiny_fit(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    steps = [json.loads(line)["step"] for line in (tmp_path / "toy.log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
    again = tiny_fit(tmp_path)  # nothing left to do
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_every_stage_runs_and_leaves_a_pipeline(tmp_path, capsys):
    from diffusers import AutoencoderKLWan, WanPipeline

    train.main(["vae", "--out", str(tmp_path), "--steps", "2"])
    encoder = AutoencoderKLWan.from_pretrained(tmp_path / "vae").encoder.state_dict()
    train.main(["denoiser", "--out", str(tmp_path), "--steps", "2", "--clips", "16"])
    train.main(["decoder", "--out", str(tmp_path), "--steps", "1"])
    defaults = json.loads((tmp_path / "defaults.json").read_text())
    (tmp_path / "defaults.json").write_text(json.dumps(defaults | {"steps": 1}))
    train.main(["evaluate", "--out", str(tmp_path), "--prompts", "1"])
    dense = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert dense["attention"] == "Dense()" and 0 <= dense["both"] <= 1
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [row["density"] < 1 for row in rows] == [False, True, True, True]
    card = (tmp_path / "README.md").read_text()
    assert "train vae --out OUT --steps 2" in card and "| `Radial(" in card
    pipe = WanPipeline.from_pretrained(tmp_path)
    assert pipe.vae.config.latents_std != [1.0] * 16, "the measured statistics of the latents are stored"
    assert all(torch.equal(value, encoder[name]) for name, value in pipe.vae.encoder.state_dict().items())
    assert not list(tmp_path.rglob("*.bin")), "safetensors only"
    named = [path.name for path in tmp_path.rglob("*.json") if str(tmp_path) in path.read_text()]
    assert not named, "a path of this machine"
