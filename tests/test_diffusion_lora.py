"""LoRAs: what they compute, files that diffusers reads, refusal of those of other models, and training of one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
from diffusion_models import MODELS  # noqa: E402

from vision_attn import Radial, attach  # noqa: E402
from vision_attn.apps.cli import main  # noqa: E402
from vision_attn.diffusion import Preset, add_lora, load_lora, save_lora, train  # noqa: E402
from vision_attn.diffusion.tiny import denoiser, pipeline  # noqa: E402

FILE = "pytorch_lora_weights.safetensors"
GRID = (3, 4, 4)
PATTERN = Radial(decay=0.5, block=1, thin=0, sink=False)


def call(net: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 16, *GRID, generator=generator)
    text = torch.randn(2, 5, 96, generator=generator)
    with torch.no_grad():
        return net(video, torch.tensor([300.0, 700.0]), text, return_dict=False)[0]


def randomise(layers: torch.nn.ModuleList) -> None:
    generator = torch.Generator().manual_seed(1)
    for weight in layers.parameters():
        weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator))


@pytest.fixture
def trained(tmp_path):
    """A pipeline with a LoRA that changes something, and the folder it was saved in."""
    pipe = pipeline()
    randomise(add_lora(pipe.transformer, 3))
    assert save_lora(pipe, tmp_path / "lora") == tmp_path / "lora" / FILE
    return pipe, tmp_path / "lora"


def test_a_new_lora_changes_nothing_and_alone_is_trained():
    plain, net = denoiser(), denoiser()
    net.load_state_dict(plain.state_dict())
    layers = add_lora(net, rank=3)
    assert torch.equal(call(net), call(plain))
    shapes = [tuple(weight.shape) for weight in layers.parameters()]
    assert shapes == [(3, 128), (128, 3)] * 4 * 6  # query, key, value, output of six layers
    assert {id(w) for w in net.parameters() if w.requires_grad} == {id(w) for w in layers.parameters()}
    assert not any("attn2" in name and "lora" in name for name, _ in net.named_modules())


def test_it_adds_a_product_of_two_matrices():
    net = denoiser()
    before = {name: weight.double() for name, weight in net.state_dict().items()}
    randomise(add_lora(net, rank=3))
    x = torch.randn(7, 128)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        layer = net.get_submodule(f"blocks.2.attn1.{part}")
        down, up = (getattr(layer, side)["default"].weight.double() for side in ("lora_A", "lora_B"))
        weight, bias = (before[f"blocks.2.attn1.{part}.{name}"] for name in ("weight", "bias"))
        wanted = x.double() @ (weight + up @ down).T + bias
        torch.testing.assert_close(layer(x).double(), wanted, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_by_us_and_by_diffusers(trained):
    pipe, folder = trained
    assert [path.name for path in folder.iterdir()] == [FILE]
    wanted = call(pipe.transformer)
    for path, ours in ((folder, True), (folder / FILE, True), (folder, False)):
        other = pipeline()
        plain = call(other.transformer)
        assert not torch.allclose(plain, wanted, atol=1e-3)
        load_lora(other, path, "long") if ours else other.load_lora_weights(folder)
        torch.testing.assert_close(call(other.transformer), wanted)
        if ours:
            assert other.get_active_adapters() == ["long"]
        other.unload_lora_weights()
        assert torch.equal(call(other.transformer), plain)


def test_with_a_pattern_attached_before_or_after(trained):
    pipe, folder = trained
    dense = call(pipe.transformer)
    with attach(pipe, PATTERN, strict=True):
        wanted = call(pipe.transformer)
    assert not torch.allclose(wanted, dense, atol=1e-3)
    other = pipeline()
    with attach(other, PATTERN, strict=True):
        load_lora(other, folder)
        torch.testing.assert_close(call(other.transformer), wanted)
    torch.testing.assert_close(call(other.transformer), dense)


def test_gradients_reach_it_through_the_pattern():
    """As the same attention under a dense mask gives them."""
    net = denoiser()
    layers = add_lora(net, rank=2)
    randomise(layers)
    video, text = torch.randn(1, 16, *GRID), torch.randn(1, 5, 96)

    def gradients() -> list[torch.Tensor]:
        net(video, torch.tensor([500.0]), text, return_dict=False)[0].square().mean().backward()
        out = [weight.grad.clone() for weight in layers.parameters()]
        net.zero_grad()
        return out

    with attach(net, PATTERN, strict=True):
        got = gradients()
    mask, plain = PATTERN.mask(GRID), torch.nn.functional.scaled_dot_product_attention

    def masked(query, key, value, **options):
        if key.shape[-2] == query.shape[-2] == mask.shape[0]:
            options["attn_mask"] = mask
        return plain(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        wanted = gradients()
    assert all(g.abs().sum() > 0 for g in got)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()) + 1e-8, rtol=1e-3)


def test_a_lora_of_another_model_is_refused_and_nothing_changed(trained, tmp_path):
    pipe, folder = trained
    tensors = load_file(folder / FILE)
    deeper = {key.replace("blocks.5", "blocks.17"): value for key, value in tensors.items()}
    wider = {key: torch.cat([value, value], int("lora_A" in key)) for key, value in tensors.items()}
    ranks = {key: value[:2] if "lora_A" in key and "blocks.0." in key else value for key, value in tensors.items()}
    other = pipeline()
    plain, names = call(other.transformer), list(other.transformer.state_dict())
    for changed, message in (
        (deeper, r"4 of its 24 layers do not fit this WanTransformer3DModel.*blocks.17.attn1.* is not in this model"),
        (wider, r"24 of its 24 layers .*has weights \[128, 128\] here, and the LoRA is \[256, 3\] times \[3, 256\]"),
        (ranks, r"4 of its 24 layers .*the LoRA is \[128, 3\] times \[2, 128\]"),
        ({"blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, "holds no LoRA: none of its 1 tensors"),
    ):
        save_file(changed, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=message):
            load_lora(other, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((folder / FILE).read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a LoRA"):
        load_lora(other, tmp_path / "cut.safetensors")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.safetensors"):
        with pytest.raises(ValueError, match="neither a safetensors file nor a folder"):
            load_lora(other, path)
    assert torch.equal(call(other.transformer), plain) and list(other.transformer.state_dict()) == names


def test_what_takes_no_lora():
    with pytest.raises(TypeError, match="Linear takes no LoRA"):
        add_lora(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rank must be an int of at least 1; got 0"):
        add_lora(denoiser(), 0)
    with pytest.raises(TypeError, match="object loads no LoRAs"):
        load_lora(object(), "x.safetensors")


@pytest.mark.parametrize(
    "cls", ["HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel", "FluxTransformer2DModel"]
)
def test_on_other_families(cls: str):
    model = MODELS[cls]
    net = model.build()
    plain = model.output(net(**model.inputs(1)))
    layers = add_lora(net, 2)
    assert torch.equal(model.output(net(**model.inputs(1))), plain)
    randomise(layers)
    changed = model.output(net(**model.inputs(1)))
    assert not torch.allclose(changed, plain, atol=1e-4)


# On the command line


def test_generate_with_a_lora(trained, tmp_path, capsys):
    _, folder = trained
    draw = ["generate", "a red circle", "--frames", "1", "--steps", "2", "--json"]
    assert main([*draw, "-o", str(tmp_path / "plain")]) == 0
    assert "lora" not in json.loads(capsys.readouterr().out)["results"][0]
    assert main([*draw, "-o", str(tmp_path / "changed"), "--lora", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["lora"] == str(folder)
    plain, changed = (next((tmp_path / name).glob("*.png")).read_bytes() for name in ("plain", "changed"))
    assert plain != changed
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert main([*draw, "-o", str(tmp_path / "none"), "--lora", str(tmp_path / "x.safetensors")]) == 1
    assert "holds no LoRA" in capsys.readouterr().err and not list((tmp_path / "none").iterdir())


def test_a_lora_that_is_not_there_is_missed_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vision_attn.diffusion.loading.load", lambda *args, **kwargs: pytest.fail("loaded"))
    assert main(["generate", "a red circle", "-o", str(tmp_path), "--lora", "nowhere"]) == 1
    assert "nowhere is neither a safetensors file nor a folder" in capsys.readouterr().err


# Training


def train_lora(out, *more: str) -> dict:
    train.main(["--lora", "--times", "1", "--clips", "16", "--prompts", "0", "--out", str(out), *more])
    return json.loads((out / "lora.json").read_text())


def test_training_leaves_a_lora_and_the_pattern_it_was_trained_under(tmp_path, capsys):
    record = train_lora(tmp_path, "--attention", "radial", "--steps", "2", "--rank", "2", "--dense-layers", "1")
    assert record["frames"] == 17 and record["steps"] == 2 and record["held_out_loss"]["before"] > 0
    assert str(tmp_path) not in (tmp_path / "lora.json").read_text()
    preset = Preset.load(tmp_path / "preset.json")
    assert isinstance(preset.pattern, Radial) and preset.options == {"dense_layers": 1}
    pipe = pipeline()
    plain = call(pipe.transformer)
    load_lora(pipe, tmp_path)
    assert not torch.equal(call(pipe.transformer), plain)
    weights = load_file(tmp_path / FILE)
    assert len(weights) == 48 and {min(w.shape) for w in weights.values()} == {2}

    # Again: nothing left to do, the same file. With other clips it would not be the same training.
    train_lora(tmp_path, "--attention", "radial", "--steps", "2", "--rank", "2", "--dense-layers", "1")
    assert all(torch.equal(w, weights[name]) for name, w in load_file(tmp_path / FILE).items())
    with pytest.raises(SystemExit, match="holds other clips"):
        train_lora(tmp_path, "--clips", "18", "--steps", "2")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give --lora, or one stage: vae, denoiser"),
        (["vae", "--lora"], "give --lora, or one stage"),
        (["vae"], "--out is needed"),
        (["--lora", "--times", "0"], "--times must be from 1 to 8; got 0"),
        (["--lora", "--rank", "0"], "--rank must be from 1 to 128; got 0"),
        (["--lora", "--dense-layers", "6"], "--dense-layers must be from 0 to 5; got 6"),
        (["--lora", "--clips", "8"], "--clips must be from 16"),
        (["--lora", "--attention", "circle"], "invalid choice: 'circle'"),
    ],
)
def test_what_cannot_be_trained(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_lowers_the_loss_at_twice_the_length(tmp_path):
    record = train_lora(tmp_path, "--times", "2", "--clips", "32", "--steps", "40", "--lr", "4e-3")
    assert record["held_out_loss"]["after"] < 0.9 * record["held_out_loss"]["before"]
