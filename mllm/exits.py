"""Routers that say after which layer a picture is no longer needed, and fitting them to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vision_attn.mllm.attachment import attach
from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import LayerPrune
from vision_attn.mllm.methods.visualexit import VisualExit, router_input


class ExitRouters(nn.Module):
    """One router per layer: states of `[mean of the words but the last, last word]` to logits of (stay, leave).

    The released routers have one linear layer of `2 width x hidden` first; here it is a product of two of a low rank.

    Args:
        width: of the text model.
        layers: the layers at whose entry a router speaks, at least 1.
        rank: of the first linear layer.
        hidden: its outputs.
    """

    def __init__(self, width: int, layers: tuple[int, ...], rank: int = 64, hidden: int = 2048) -> None:
        super().__init__()
        self.width, self.layers = width, tuple(layers)
        self.routers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2 * width, rank, bias=False),
                nn.Linear(rank, hidden, bias=False),
                nn.GELU(),
                nn.Linear(hidden, 2, bias=False),
            )
            for _ in self.layers
        )

    def check(self, model: Any) -> None:
        """Raise ValueError for a model of another width or with fewer layers."""
        width, count = model.config.get_text_config().hidden_size, len(model.get_decoder().layers)
        if width != self.width or max(self.layers) >= count:
            raise ValueError(
                f"these routers are for a text model of width {self.width} and more than {max(self.layers)} layers; "
                f"{type(model).__name__} has width {width} and {count} layers"
            )

    @torch.no_grad()
    def leave(self, layer: Layer) -> torch.Tensor:
        """Bool `[batch]`: what enters a layer says that the picture may go."""
        router = self.routers[self.layers.index(layer.number)].to(layer.hidden.device)
        stay, leave = router(router_input(layer)).unbind(-1)
        return leave > stay

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        save_file(self.state_dict(), path, {"layers": " ".join(map(str, self.layers))})

    @classmethod
    def load(cls, path: str | Path) -> ExitRouters:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            state, layers = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["layers"]
        down, up = state["routers.0.0.weight"], state["routers.0.1.weight"]
        made = cls(down.shape[1] // 2, tuple(map(int, layers.split())), *up.T.shape)
        made.load_state_dict(state)
        return made.eval()


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Routers fitted to a model.

    Args:
        method: to attach.
        leave: layer -> share of the samples without which the answer is the same from there on.
        right: layer -> share of the samples that the router puts where they belong, of those it was fitted to.
    """

    method: VisualExit
    leave: dict[int, float]
    right: dict[int, float]


def fit_exit(
    model: Any,
    samples: Iterable[tuple[dict[str, Any], torch.Tensor]],
    *,
    layers: tuple[int, ...] | None = None,
    agree: float = 0.99,
    worse: float = 1.03,
    steps: int = 300,
    lr: float = 1e-3,
    rank: int = 64,
    hidden: int = 2048,
    seed: int = 0,
) -> Fitted:
    """Train the routers of `VisualExit(rule="router")`; the model itself does not change.

    Each sample is read once as it is, and once per layer without its picture from there on. The picture may go where
    the most probable tokens of the answer agree and its loss is hardly worse. The paper trains on a stream of samples,
    one random layer each; here all layers see all samples, by AdamW on what was read, all samples in every step.

    Args:
        samples: inputs as for `model(**inputs)`, one row each, the answer at the end of `input_ids`; and the labels,
            long `[1, length]`, -100 outside of the answer.
        layers: at whose entry a picture may go; None is every one from 1, after what deep visual features are added.
        agree: share of the tokens of the answer that have to be the same, more than this.
        worse: the loss may be less than so many times what it is.
        steps, lr: of the training.
        rank, hidden: of the routers.

    Raises:
        ValueError: no samples, or one without an answer or with several rows.

    Paper: Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings.
    """
    if layers is None:
        deep = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
        layers = tuple(range(max(1, deep), len(model.get_decoder().layers)))
    states, labels = [], []
    for number, (inputs, target) in enumerate(samples):
        if target.shape != inputs["input_ids"].shape or len(target) != 1 or not (target != -100).any():
            raise ValueError(
                f"sample {number} has ids {tuple(inputs['input_ids'].shape)} and labels {tuple(target.shape)}; give "
                "one row, and labels of the same shape that are not -100 at the answer"
            )
        with torch.no_grad():
            states.append(_states(model, inputs, target, layers))
            said, loss = _answer(model, inputs, target)
            goes = []
            for layer in layers:
                with attach(model, VisualExit(layer=layer)):
                    blind, more = _answer(model, inputs, target)
                goes.append((blind == said).float().mean().item() > agree and more < worse * loss)
            labels.append(goes)
    if not states:
        raise ValueError("fit_exit needs at least one sample")
    x = torch.stack(states, 1)  # [layers, samples, 2 width]
    y = torch.tensor(labels, device=x.device).T.long()  # [layers, samples]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        routers = ExitRouters(x.shape[-1] // 2, layers, rank, hidden).to(x.device)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            logits = torch.stack([router(part) for router, part in zip(routers.routers, x, strict=True)])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    routers.eval().requires_grad_(False)
    right = (logits.argmax(-1) == y).float().mean(1).tolist()
    leave = y.float().mean(1).tolist()
    exit_ = VisualExit(rule="router", routers=routers)
    return Fitted(exit_, dict(zip(layers, leave, strict=True)), dict(zip(layers, right, strict=True)))


@dataclasses.dataclass(frozen=True)
class _Record(LayerPrune):
    """Drops nothing, and notes what the routers of some layers would get."""

    layers: tuple[int, ...] = ()
    seen: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return self.layers

    def select(self, layer: Layer, notes: dict[str, Any]) -> torch.Tensor:
        self.seen[layer.number] = router_input(layer)[0]
        return layer.tokens.visual


def _states(model: Any, inputs: dict[str, Any], target: torch.Tensor, layers: tuple[int, ...]) -> torch.Tensor:
    """What the routers get of the prompt without its answer, `[layers, 2 width]`."""
    length, start = target.shape[1], int((target[0] != -100).nonzero()[0])
    prompt = {
        name: value[:, :start] if torch.is_tensor(value) and value.shape == (1, length) else value
        for name, value in inputs.items()
    }
    record = _Record(layers)
    with attach(model, record):
        model(**prompt)
    return torch.stack([record.seen[layer] for layer in layers])


def _answer(model: Any, inputs: dict[str, Any], target: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The most probable tokens where an answer is, and its loss."""
    target = target[0, int((target[0] != -100).nonzero()[0]) :].to(model.device)
    logits = model(**inputs).logits[0, -len(target) - 1 : -1].float()  # counted from the end: there may be fewer tokens
    said = target != -100
    return logits[said].argmax(-1), nn.functional.cross_entropy(logits[said], target[said]).item()
