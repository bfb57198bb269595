"""Which parts of the image an output depends on: NormGrad and Grad-CAM, from activations and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from vision_attn.analysis.geometry import place

# Activations and gradients `[batch, places, channels]` to a map `[batch, places]`.
KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "normgrad": lambda a, g: a.norm(dim=-1) * g.norm(dim=-1),  # the norm of the outer product of a and g
    "normgrad-scaling": lambda a, g: (a * g).norm(dim=-1),
    "normgrad-positive": lambda a, g: (a * g).clamp(min=0).norm(dim=-1),
    "normgrad-bias": lambda a, g: g.norm(dim=-1),
    "gradcam": lambda a, g: (a * g.mean(1, keepdim=True)).sum(-1).clamp(min=0),
}


def saliency(
    model: nn.Module,
    x: torch.Tensor,
    kind: str = "normgrad",
    layers: Sequence[str] | None = None,
    target: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """How much every place of the image matters to a class, `[batch, rows, columns]`, each image from 0 to 1.

    Maps of several layers are scaled to 0 ... 1, brought to the size of the largest, and multiplied. The model is
    called once, with gradients; its parameters' gradients stay as they were.

    Args:
        x: images `[batch, channels, height, width]`.
        kind: "normgrad", its variants "normgrad-scaling", "normgrad-positive", "normgrad-bias", or "gradcam".
        layers: names of modules that return a map or tokens; where the last map of the model is made when None.
        target: classes, one for all or `[batch]`; those the model chooses when None.

    Raises:
        ValueError: an unknown kind or layer, a layer without a map, or one whose places do not reach the output.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=96).eval()
    >>> saliency(model, torch.randn(1, 3, 96, 96), "gradcam").shape
    torch.Size([1, 6, 6])

    Papers: There and Back Again: Revisiting Backpropagation Saliency Methods; Grad-CAM.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}; allowed: {', '.join(KINDS)}")
    layers = [_last_map(model)] if layers is None else list(layers)
    named = dict(model.named_modules())
    unknown = [name for name in layers if name not in named]
    if unknown or not layers:
        raise ValueError(f"{type(model).__name__} has no module {', '.join(unknown)}; see model.named_modules()")
    kept: dict[str, torch.Tensor] = {}
    hooks = [named[name].register_forward_hook(_keeper(kept, name)) for name in layers]
    try:
        with torch.enable_grad():
            out = model(x if x.requires_grad else x.detach().requires_grad_())
            if out.ndim != 2:
                raise ValueError(f"{type(model).__name__} must return [batch, classes]; got {list(out.shape)}")
            classes = out.argmax(1) if target is None else torch.as_tensor(target, device=out.device).expand(len(out))
            if not 0 <= int(classes.min()) <= int(classes.max()) < out.shape[1]:
                raise ValueError(f"target: got {classes.tolist()}; allowed: 0 to {out.shape[1] - 1}")
            chosen = out.gather(1, classes[:, None]).sum()
            missing = [name for name in layers if name not in kept]
            if missing:
                raise ValueError(f"{', '.join(missing)} did not run, or returns no tensor")
            gradients = torch.autograd.grad(chosen, [kept[name] for name in layers], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    for name, gradient in zip(layers, gradients, strict=True):
        activation = _on_places(model, kept[name].detach(), x, name)
        if gradient is None or not (g := _on_places(model, gradient, x, name)).any():
            raise ValueError(
                f"the places of {name} do not reach the output (only the class token is used after it, perhaps); "
                "choose an earlier layer"
            )
        grid = activation.shape[1:3]
        maps.append(KINDS[kind](activation.flatten(1, 2).float(), g.flatten(1, 2).float()).unflatten(1, grid))
    size = max((m.shape[1:] for m in maps), key=math.prod)
    product = torch.ones(len(x), *size, device=x.device)
    for m in maps:
        product = product * _unit(nn.functional.interpolate(m[:, None], size, mode="bilinear")[:, 0])
    return _unit(product)


def _keeper(kept: dict[str, torch.Tensor], name: str):
    def keep(module: nn.Module, args: tuple, out: object) -> None:
        if isinstance(out, torch.Tensor):
            kept[name] = out

    return keep


def _unit(x: torch.Tensor) -> torch.Tensor:
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-30)


def _last_map(model: nn.Module) -> str:
    """The module after which places still reach the output."""
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential) and len(blocks) > 1 and getattr(model, "num_prefix_tokens", 0):
        return f"blocks.{len(blocks) - 2}"  # of the last block, perhaps only the class token is used
    info = getattr(model, "feature_info", None)
    if not info:
        raise ValueError(f"{type(model).__name__} does not say where its maps are; give layers, names of modules")
    return list(info)[-1]["module"]


def _on_places(model: nn.Module, x: torch.Tensor, image: torch.Tensor, name: str) -> torch.Tensor:
    """`[batch, rows, columns, channels]` of tokens or a map in either layout."""
    if x.ndim == 4:
        height, width = image.shape[2:]
        if getattr(model, "output_fmt", None) == "NHWC":
            return x
        first, last = (abs(math.log(r * width / max(c * height, 1))) for r, c in (x.shape[2:4], x.shape[1:3]))
        return x.permute(0, 2, 3, 1) if first <= last else x
    found = place(x.shape[1], tuple(image.shape[2:]), getattr(model, "num_prefix_tokens", None), None)
    if x.ndim != 3 or found.grid is None:
        raise ValueError(f"{name} returns {list(x.shape)}, which is no map and no sequence of known grid")
    return x[:, found.prefix :].unflatten(1, found.grid)
