"""The built-in vision-language model: its words, its losses, and a training that goes on where it stopped."""

import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from vision_attn import fit as training  # noqa: E402
from vision_attn.mllm import tiny, train  # noqa: E402
from vision_attn.shapes.crowd import CONTEXTS, KINDS, Crowd, describe  # noqa: E402

FEW = ["--steps", "2", "1", "2", "--batch", "2"]


class Partly(nn.Module):
    """One part never gets a gradient, so AdamW keeps nothing about it."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)


def fitted(out, stop=None):
    torch.manual_seed(0)
    module, calls = Partly(), 0

    def loss_of(rng, progress):
        nonlocal calls
        calls += 1
        if stop and calls > stop:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((8, 3))).float()
        return (module.used(x) - x[:, :2]).square().mean()

    training.fit("toy", module, loss_of, out=out, steps=6, lr=0.05, seed=0, decay=0.9, every=2)
    return [p.detach().clone() for p in module.parameters()]


def test_a_weight_without_a_gradient_does_not_keep_training_from_going_on(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = fitted(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, stop=5)
    resumed = fitted(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_every_question_and_caption_is_made_of_known_words():
    words = tiny.tokenizer()
    caption = describe(Crowd({0: 3, 5: 7, 6: 1}, {0: 1.0, 5: 1.0, 6: 0.5}, None))
    for text in (tiny.prompt(tiny.DESCRIBE), *map(tiny.ask, range(len(KINDS))), caption):
        assert words.unk_token_id not in words(text).input_ids
    typed = words("Is there a red circle in the image?").input_ids
    assert typed == words(tiny.ask(0)).input_ids
    assert words("a red dog").input_ids[-1] == words.unk_token_id


def test_messages_give_the_prompt_that_was_trained():
    content = [{"type": "image"}, {"type": "text", "text": tiny.ask(3)}]
    processor = tiny.processor()
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == tiny.prompt(tiny.ask(3))
    given = processor(text=text, images=np.zeros((32, 32, 3), np.uint8), return_tensors="pt")
    assert (given["input_ids"] == tiny.SPECIAL.index("<image>")).sum() == 64
    assert given["input_ids"][0, 0] == processor.tokenizer.bos_token_id


def test_pixels_are_those_of_the_processor():
    picture = rng().integers(0, 256, (32, 32, 3), dtype=np.uint8)
    given = tiny.processor()(text=tiny.prompt(tiny.DESCRIBE), images=picture, return_tensors="pt")
    torch.testing.assert_close(tiny.pixels([picture]), given["pixel_values"], atol=1e-5, rtol=0)


def rng():
    return np.random.default_rng(0)


def test_answers_are_averaged_sample_by_sample():
    """The loss from single rows without padding: each answer's own mean first."""
    model, words = tiny.model(1).eval(), tiny.tokenizer()
    with torch.no_grad():
        loss = train.text_loss(model, words, rng(), 8, 4, image=True)
        draw, rows = rng(), []
        crowds = [train.sample_crowd(draw) for _ in range(4)]
        said = [train.conversation(each, draw, i % 2 == 0) for i, each in enumerate(crowds)]
        shown = train.pictures(crowds, draw, 8)
        for (question, answer), picture in zip(said, shown, strict=True):
            before = words(tiny.prompt(question).replace("<image>", " ".join(["<image>"] * 64))).input_ids
            after = words(answer + " </s>", add_special_tokens=False).input_ids
            logits = model(input_ids=torch.tensor([before + after]), pixel_values=picture[None]).logits[0]
            wanted = logits[len(before) - 1 : -1].log_softmax(-1)[range(len(after)), after]
            rows.append(-wanted.mean())
    assert {len(answer.split()) > 1 for _, answer in said} == {True, False}
    torch.testing.assert_close(loss, torch.stack(rows).mean(), atol=1e-5, rtol=1e-5)


def test_the_tower_learns_the_kind_of_every_patch():
    """A tower loss from perfect heads is near zero: labels and patches agree about what lies where."""
    heads = nn.ModuleDict({"whole": nn.Linear(96, 24), "patch": nn.Linear(96, 25)})
    draw = rng()
    crowds = [train.sample_crowd(draw, None) for _ in range(2)]
    hidden = torch.zeros(2, 65, 96)
    for i, each in enumerate(crowds):
        hidden[i, 1:, 24] = 1
        for place, kind in each.places.items():
            hidden[i, 0, kind] = 1
            for row in (0, 1):
                for column in (0, 1):
                    patch = 1 + (2 * (place // 4) + row) * 8 + 2 * (place % 4) + column
                    hidden[i, patch, 24], hidden[i, patch, kind] = 0, 1
    with torch.no_grad():
        heads["whole"].weight.copy_(40 * torch.eye(24, 96))
        heads["whole"].bias.fill_(-20)
        heads["patch"].weight.copy_(40 * torch.eye(25, 96))
        heads["patch"].bias.zero_()

    class Known(nn.Module):
        def vision_tower(self, pixels):
            return type("Output", (), {"last_hidden_state": hidden})

    model = nn.Module()
    model.model = Known()
    assert train.tower_loss(model, heads, rng(), 8, 2) < 1e-6


def test_negative_questions():
    """A quarter of them, where there is one, asks for an absent partner of the anchor; none for what is there."""
    anchor, *partners = CONTEXTS[0].tolist()
    here = Crowd({0: anchor, 1: partners[0]}, {0: 1.0, 1: 0.5}, 0)
    draw = rng()
    asked = [train.negative(here, draw) for _ in range(4000)]
    assert not {anchor, partners[0]} & set(asked)
    share = np.mean([kind in partners for kind in asked])
    assert abs(share - (0.25 + 0.75 * 2 / 22)) < 0.03


def test_training_from_nothing_and_from_a_model_of_smaller_pictures(tmp_path, capsys):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    train.main(["--out", str(tmp_path / "a"), *FEW])
    record = json.loads((tmp_path / "a" / "model" / "training.json").read_text())
    assert record["parameters"] == 759072 and [s["steps"] for s in record["stages"].values()] == [2, 1, 2]
    small = LlavaForConditionalGeneration.from_pretrained(tmp_path / "a" / "model", dtype=torch.float32).eval()
    assert len(AutoProcessor.from_pretrained(tmp_path / "a" / "model").tokenizer) == 31
    fresh = tiny.model(0, 24)
    train.start_from(fresh, tmp_path / "a" / "model")
    name = next(name for name in small.state_dict() if name.endswith("position_embedding.weight"))
    for key, value in small.state_dict().items():
        if key != name:
            assert torch.equal(value, fresh.state_dict()[key]), key
    places, wide = small.state_dict()[name], fresh.state_dict()[name]
    assert torch.equal(wide[0], places[0])
    middles = wide[1:].view(24, 24, 96)[1::3, 1::3]  # the middle of three by three new places is the old one
    torch.testing.assert_close(middles.flatten(0, 1), places[1:], atol=1e-6, rtol=0)

    more = ["--cell", "24", "--start", str(tmp_path / "a" / "model"), "--steps", "1", "0", "1", "--batch", "1"]
    train.main(["--out", str(tmp_path / "b"), *more])
    long = LlavaForConditionalGeneration.from_pretrained(tmp_path / "b" / "model")
    assert long.config.vision_config.image_size == 96
    record = json.loads((tmp_path / "b" / "model" / "training.json").read_text())
    assert list(record["stages"]) == ["tower", "together"]


def test_the_tower_is_frozen_while_answers_are_learned(tmp_path):
    from safetensors.torch import load_file

    train.main(["--out", str(tmp_path), *FEW])
    kept = load_file(tmp_path / "model" / "model.safetensors")
    seen = load_file(tmp_path / "tower.checkpoint.safetensors")
    names = [name for name in kept if "vision_tower" in name]
    assert len(names) > 40
    for name in names:
        average = seen["average.0." + name.split("vision_tower.")[-1].removeprefix("vision_model.")]
        assert torch.equal(kept[name], average.half()), name
