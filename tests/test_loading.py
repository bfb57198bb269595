"""Opening pipelines: what is read, what is refused, and what sizes mean in tokens."""

import json
import shutil

import pytest
import torch

from vision_attn.diffusion import families, sizes
from vision_attn.diffusion.loading import LoadError, SizeError, inspect_model, load, resolve_device, resolve_dtype
from vision_attn.diffusion.tiny import pipeline

# Pipeline class, denoiser class, VAE config, denoiser config, (frames, height, width), grid; as published.
PUBLISHED = {
    "Wan": ("WanPipeline", "WanTransformer3DModel", {}, {"patch_size": [1, 2, 2]}, (81, 720, 1280), (21, 45, 80)),
    "Wan 480p": ("WanPipeline", "WanTransformer3DModel", {}, {}, (81, 480, 832), (21, 30, 52)),
    "Hunyuan": ("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", {}, {}, (117, 768, 1280), (30, 48, 80)),
    "CogVideoX": (
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {"block_out_channels": [1] * 4, "temporal_compression_ratio": 4.0},
        {"patch_size_t": None},
        (49, 480, 720),
        (13, 30, 45),
    ),
    "CogVideoX 1.5": (
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {"block_out_channels": [1] * 4},
        {"patch_size_t": 2},
        (81, 768, 1360),
        (11, 48, 85),
    ),
    "LTX": ("LTXPipeline", "LTXVideoTransformer3DModel", {}, {}, (161, 512, 704), (21, 16, 22)),
    "Mochi": ("MochiPipeline", "MochiTransformer3DModel", {}, {}, (163, 480, 848), (28, 30, 53)),
    "Cosmos": ("CosmosTextToWorldPipeline", "CosmosTransformer3DModel", {}, {}, (121, 704, 1280), (16, 44, 80)),
    "Flux": ("FluxPipeline", "FluxTransformer2DModel", {"block_out_channels": [1] * 4}, {}, (1, 1024, 768), (64, 48)),
    "SD3": (
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {"block_out_channels": [1] * 4},
        {"patch_size": 2},
        (1, 1024, 1024),
        (64, 64),
    ),
    "PixArt": (
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        {"block_out_channels": [1] * 4},
        {"patch_size": 2},
        (1, 512, 1024),
        (32, 64),
    ),
    "QwenImage": ("QwenImagePipeline", "QwenImageTransformer2DModel", {}, {}, (1, 1328, 1328), (83, 83)),
    "SDXL": (
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {"block_out_channels": [1] * 4},
        {},
        (1, 1024, 1024),
        (128, 128),
    ),
}


def write_json_only(folder, pipeline, denoiser, vae=None, net=None, **index):
    """The JSON files of a pipeline, as they are before any weights are fetched."""
    part = "unet" if denoiser.startswith("UNet") else "transformer"
    parts = {part: ["diffusers", denoiser], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / part).mkdir(parents=True)
    (folder / "vae").mkdir()
    (folder / part / "config.json").write_text(json.dumps(net or {}))
    (folder / "vae" / "config.json").write_text(json.dumps(vae or {}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **parts, **index}))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_in_tokens_are_those_of_the_published_models(name, tmp_path):
    pipe, denoiser, vae, net, size, grid = PUBLISHED[name]
    info = inspect_model(write_json_only(tmp_path / "m", pipe, denoiser, vae, net))
    assert info.grid(*size) == grid
    assert info.video == (len(grid) == 3)
    assert info.defaults.get("steps", 1) >= 1


def test_every_family_that_can_be_attached_can_be_loaded():
    attachable = {name for name, family in families.FAMILIES.items() if not family.refuse}
    assert set(sizes.FAMILIES) == attachable


def test_load_gives_the_saved_pipeline(saved):
    loaded = load(saved, device="cpu")
    assert loaded.device == torch.device("cpu") and loaded.dtype == torch.float32
    assert loaded.info.grid(17, 48, 48) == (5, 6, 6)
    assert loaded.defaults["steps"] == 50 and loaded.defaults["fps"] == 16  # the pipeline's and the family's own
    expected = pipeline().transformer.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.pipe.transformer.state_dict().items())
    assert not loaded.pipe.transformer.training and not loaded.pipe.vae.training


def test_dtype_reaches_the_denoiser_but_not_the_vae_of_wan(saved):
    pipe = load(saved, device="cpu", dtype="bfloat16").pipe
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32


def test_defaults_of_the_folder_win(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "defaults.json").write_text('{"steps": 7, "attention": {"radial": {"block": 4}}}')
    defaults = inspect_model(folder).defaults
    assert defaults["steps"] == 7 and defaults["attention"] == {"radial": {"block": 4}} and defaults["guidance"] == 5.0


@pytest.mark.parametrize(
    "size, option, wanted",
    [
        ((16, 48, 48), "frames", "13 and 17"),
        ((0, 48, 48), "frames", "1 and 5"),
        ((-3, 48, 48), "frames", "1 and 5"),
        ((17, 50, 48), "height", "48 and 64"),
        ((17, 48, 8), "width", "16"),
        ((17, 48, -16), "width", "16"),
    ],
)
def test_sizes_the_model_cannot_draw(saved, size, option, wanted):
    with pytest.raises(SizeError, match=wanted) as caught:
        inspect_model(saved).grid(*size)
    assert caught.value.option == option


def test_an_image_model_has_no_frames(tmp_path):
    info = inspect_model(write_json_only(tmp_path / "m", *PUBLISHED["Flux"][:4]))
    with pytest.raises(SizeError, match="single images"):
        info.grid(17, 1024, 1024)


def test_missing_folder():
    with pytest.raises(LoadError, match="there is no folder ./nowhere"):
        inspect_model("./nowhere")


def test_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(LoadError, match="no model_index.json"):
        inspect_model(tmp_path)


def test_single_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="single file"):
        inspect_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff"])
def test_broken_index(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text, encoding="latin-1")
    with pytest.raises(LoadError, match="model_index.json"):
        inspect_model(tmp_path)


def test_unsupported_family_names_the_supported_ones(tmp_path):
    with pytest.raises(LoadError, match="SanaTransformer2DModel is not supported.*linear.*Wan.*Flux"):
        inspect_model(write_json_only(tmp_path / "m", "SanaPipeline", "SanaTransformer2DModel"))


def test_pipeline_that_needs_an_image(tmp_path):
    with pytest.raises(LoadError, match="more than a prompt .image"):
        inspect_model(write_json_only(tmp_path / "m", "WanImageToVideoPipeline", "WanTransformer3DModel"))


def test_pipeline_class_this_diffusers_does_not_have(tmp_path):
    with pytest.raises(LoadError, match="no WanNextPipeline; update diffusers"):
        inspect_model(write_json_only(tmp_path / "m", "WanNextPipeline", "WanTransformer3DModel"))


def test_custom_code_is_never_run(tmp_path):
    index = {"extra": ["my_module", "Thing"]}
    with pytest.raises(LoadError, match="my_module.Thing"):
        inspect_model(write_json_only(tmp_path / "m", "WanPipeline", "WanTransformer3DModel", **index))
    with pytest.raises(LoadError, match="its own pipeline code"):
        inspect_model(write_json_only(tmp_path / "n", ["pipeline.py", "Mine"], "WanTransformer3DModel"))


def test_config_that_does_not_fit(tmp_path):
    with pytest.raises(LoadError, match="does not fit Stable Diffusion 3"):
        inspect_model(write_json_only(tmp_path / "m", "StableDiffusion3Pipeline", "SD3Transformer2DModel"))


def test_pickles_are_refused_unopened(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(b"not even a pickle")
    with pytest.raises(LoadError, match="only as pickles .diffusion_pytorch_model.bin"):
        inspect_model(folder)


def test_incomplete_and_damaged_folders(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadError, match="cannot load"):
        load(folder, device="cpu")
    weights.unlink()
    with pytest.raises(LoadError, match="cannot load"):
        load(folder, device="cpu")
    shutil.rmtree(folder / "vae")
    with pytest.raises(LoadError, match="no folder vae"):
        inspect_model(folder)


def test_a_hub_id_is_asked_only_when_it_looks_like_one(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def unreachable(hub_id, name):
        asked.append(hub_id)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    for name in ("nowhere", "/no/where", "./org/name", "a/b/c", "org/na me"):
        with pytest.raises(LoadError, match="there is no folder"):
            inspect_model(name)
    assert asked == []
    with pytest.raises(LoadError, match="Hub cannot be reached"):
        inspect_model("org/name")
    assert asked == ["org/name"]


def test_json_files_of_a_hub_id_are_read_before_its_weights(monkeypatch, tmp_path):
    import huggingface_hub

    folder = write_json_only(tmp_path / "m", *PUBLISHED["Wan"][:4])
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub_id, name: asked.append(name) or folder / name)
    assert inspect_model("org/name").grid(81, 720, 1280) == (21, 45, 80)
    assert sorted(asked) == ["model_index.json", "transformer/config.json", "vae/config.json"]


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for device, message in (
        ("cuda", "no CUDA GPU"),
        ("tpu", "allowed: auto, cpu"),
        ("cuda:x", "allowed"),
        ("", "allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="2 GPUs"):
        resolve_device("cuda:2")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert resolve_dtype(None, gpu, built_in=False) == torch.bfloat16
    assert resolve_dtype(None, gpu, built_in=True) == resolve_dtype(None, cpu, built_in=False) == torch.float32
    assert (
        resolve_dtype("float16", gpu, built_in=True)
        == resolve_dtype(torch.float16, gpu, built_in=True)
        == torch.float16
    )
    for wrong in ("float8", torch.int32, "half"):
        with pytest.raises(ValueError, match="allowed: float32, bfloat16, float16"):
            resolve_dtype(wrong, cpu, built_in=False)
