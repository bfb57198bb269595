"""Opening vision-language models: what is read, what is refused, and the models that ship."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
from vlm_models import VLMS  # noqa: E402

from vision_attn.mllm import families, loading, tiny  # noqa: E402
from vision_attn.mllm.loading import BUILT_IN, WEIGHTS, LoadError, load  # noqa: E402
from vision_attn.shapes.crowd import KINDS, draw_crowd, sample_crowd  # noqa: E402


@pytest.fixture(scope="module")
def shipped():
    return load()


@pytest.fixture
def folder(tmp_path):
    """A copy of the built-in model that may be broken."""
    return shutil.copytree(WEIGHTS / BUILT_IN[0], tmp_path / "copy")


def crowds(count, partners=0.5):
    return [sample_crowd(np.random.default_rng((5, i)), partners) for i in range(count)]


def test_the_built_in_model_sees(shipped):
    """Questions with capitals about what is there and what is not; chance is one half."""
    right = []
    for i, crowd in enumerate(crowds(12)):
        picture = draw_crowd(crowd, np.random.default_rng(i))
        there, not_there = crowd.kinds[0], next(k for k in range(24) if k not in crowd.kinds)
        right.append(shipped.answer(picture, f"Is there a {KINDS[there]} in the image?") == "yes")
        right.append(shipped.answer(picture, f"Is there a {KINDS[not_there]} in the image?") == "no")
    assert np.mean(right) > 0.8 and shipped.built_in
    caption = shipped.answer(picture, tiny.DESCRIBE)
    assert caption.startswith("there is a") and caption.endswith(".")


def test_inputs_are_the_prompts_that_were_trained(shipped):
    picture = draw_crowd(crowds(1)[0], np.random.default_rng(0))
    given = shipped.inputs(picture, "Is there a red circle in the image?")
    words = tiny.tokenizer()(tiny.prompt(tiny.ask(0)).replace("<image>", "<image> " * 64)).input_ids
    assert given["input_ids"].tolist() == [words]
    torch.testing.assert_close(given["pixel_values"], tiny.pixels([picture]), atol=1e-5, rtol=0)


def test_pictures_of_other_kinds(shipped):
    picture = draw_crowd(crowds(1)[0], np.random.default_rng(0))
    wanted = shipped.inputs(picture, tiny.DESCRIBE)["pixel_values"]
    for held in (Image.fromarray(picture), Image.fromarray(picture).convert("RGBA")):
        assert torch.equal(shipped.inputs(held, tiny.DESCRIBE)["pixel_values"], wanted)
    for wrong, got in ((picture / 255, r"float64 \[\d+, \d+, 3\]"), (picture[..., 0], "uint8"), ("a.png", "str")):
        with pytest.raises(TypeError, match=f"or a PIL image; got {got}"):
            shipped.inputs(wrong, tiny.DESCRIBE)


def test_a_template_that_writes_the_first_token(shipped):
    """Some templates write `<s>` themselves; it must not come twice."""
    shipped = load()
    picture = np.zeros((32, 32, 3), np.uint8)
    plain = shipped.inputs(picture, "describe the image")["input_ids"]
    shipped.processor.chat_template = "<s> " + tiny.CHAT
    assert torch.equal(shipped.inputs(picture, "describe the image")["input_ids"], plain)


def test_the_answer_alone(shipped):
    """Models that return the prompt with the answer, and those that do not, give the same."""
    picture = draw_crowd(crowds(1)[0], np.random.default_rng(0))
    inputs = shipped.inputs(picture, tiny.DESCRIBE)
    ids = shipped.generate(inputs, 20).sequences
    whole = shipped.model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(ids, whole[:, inputs["input_ids"].shape[1] :])
    assert "user" not in shipped.text(ids)


def test_dtype_and_device(folder):
    loaded = load(folder, device="cpu", dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training and not loaded.built_in
    assert load(folder).model.dtype == torch.float32  # on a CPU, though stored in half precision
    assert loaded.answer(np.zeros((50, 40, 3), np.uint8), "describe the image")
    with pytest.raises(ValueError, match="dtype: got 'int8', allowed: float32"):
        load(dtype="int8")
    with pytest.raises(ValueError, match="device: got 'tpu'"):
        load(device="tpu")


def test_every_family_is_recognised():
    for vlm in VLMS.values():
        assert loading.check_config("x", {"architectures": [vlm.cls]}) == vlm.cls
    assert {vlm.cls for vlm in VLMS.values()} == set(families.FAMILIES)


REFUSED = {
    "nowhere": (lambda f: f / "nowhere", "there is no folder"),
    "a file": (lambda f: f / "config.json", "single file"),
    "no config": (lambda f: (f / "config.json").unlink() or f, "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{") and f, "cannot be read as JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]") and f, "holds a list"),
    "other family": (lambda f: edit(f, architectures=["BertModel"]), "BertModel is not supported. Supported: Llava"),
    "own code": (lambda f: edit(f, auto_map={"AutoModel": "x.Y"}), "own code .* never run"),
    "pickles": (lambda f: (f / "model.safetensors").rename(f / "model.bin") and f, r"only as pickles \(model.bin\)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink() or f, "has no weights"),
    "cut off": (lambda f: (f / "model.safetensors").write_bytes(b"123456789") and f, "cannot load"),
    "other shapes": (lambda f: edit(f, text={"intermediate_size": 280}), "cannot load"),
    "a weight missing": (lambda f: drop(f, "lm_head.weight"), "1 weights of its config are not there"),
    "no processor": (
        lambda f: remove(f, "processor_config.json", "tokenizer_config.json", "tokenizer.json"),
        "cannot|no processor",
    ),  # noqa: E501
}


def edit(folder, text=None, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text or {}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    (key,) = (key for key in tensors if key.endswith(name))
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, folder):
    change, message = REFUSED[case]
    with pytest.raises(LoadError, match=message) as error:
        load(change(folder))
    assert "\n" not in str(error.value)


def test_a_hub_id_is_asked_for_its_config_first(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: asked.append(a) or str(tmp_path / "config.json"))
    with pytest.raises(LoadError, match="org/name: BertModel is not supported"):
        load("org/name")
    assert asked == [("org/name", "config.json")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(LoadError, match="cannot load org/name: no network"):
        load("org/name")


def fail(*_):
    raise OSError("no network\nsecond line")
