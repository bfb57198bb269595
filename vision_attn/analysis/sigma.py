"""Sigma-reparametrisation: weights divided by their largest singular value, times a learned number; and back again."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize


class SigmaWeight(nn.Module):
    """`gamma * weight / sigma(weight)`, with sigma by one step of power iteration per training step.

    sigma is `v^T W u` with u and v constants, so the gradient runs through W and not through the iteration. The
    state keeps `gamma`, a number, and `u`; weights of convolutions are flattened to a matrix.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1).double()
        _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
        if not values[0] > 0:
            raise ValueError("a weight of zeros has no largest singular value to divide by")
        self.gamma = nn.Parameter(values[0].to(weight.dtype))
        self.register_buffer("u", rows[0].to(weight.dtype))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        matrix = weight.flatten(1)
        with torch.no_grad():
            v = nn.functional.normalize(matrix @ self.u, dim=0)
            if self.training:
                self.u.copy_(nn.functional.normalize(matrix.mT @ v, dim=0))
            u = self.u.clone()  # the next step changes the buffer, and this one's backward still needs it
        return weight * (self.gamma / (v @ matrix @ u))


def to_sigma(model: nn.Module, reinitialise: bool = False, remove_norms: bool = False) -> list[str]:
    """Reparametrise every Linear and Conv2d of a model in place, and the joint projection of `nn.MultiheadAttention`.

    Unless weights are drawn anew the outputs stay what they were, up to rounding, because gamma starts as the largest
    singular value. `merge_sigma` takes it out again.

    Args:
        reinitialise: draw the weights from a normal distribution of deviation 0.02 first, for training from scratch.
        remove_norms: also replace every LayerNorm by nothing, as the paper does for vision transformers that train
            without; this is not undone by `merge_sigma`.

    Returns:
        Names of the converted parameters.

    Raises:
        ValueError: nothing to convert, or the model is converted already.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=1)
    >>> len(to_sigma(model)), merge_sigma(model)[0]
    (6, 'patch_embed.proj.weight')

    Paper: Stabilizing Transformer Training by Preventing Attention Entropy Collapse.
    """
    if any(True for _ in _converted(model)):
        raise ValueError("the model is reparametrised already; merge_sigma(model) first")
    found = [
        (f"{name}.{kind}".lstrip("."), module, kind)
        for name, module in model.named_modules()
        for kind in ("weight", "in_proj_weight")
        if isinstance(module, (nn.Linear, nn.Conv2d) if kind == "weight" else nn.MultiheadAttention)
        and getattr(module, kind, None) is not None
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no Linear and no Conv2d")
    zero = [name for name, module, kind in found if not reinitialise and not getattr(module, kind).any()]
    if zero:
        raise ValueError(f"{', '.join(zero)}: all zeros, with no largest singular value; use reinitialise=True")
    for _, module, kind in found:
        weight = getattr(module, kind)
        if reinitialise:
            nn.init.trunc_normal_(weight, std=0.02)
        sigma = SigmaWeight(weight).train(module.training)
        parametrize.register_parametrization(module, kind, sigma)
    if remove_norms:
        for parent in model.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.LayerNorm):
                    setattr(parent, name, nn.Identity())
    return [name for name, _, _ in found]


def merge_sigma(model: nn.Module) -> list[str]:
    """Put plain weights back in place, equal to the reparametrised ones; keys of the state dict are as before.

    Returns:
        Names of the parameters.

    Raises:
        ValueError: nothing is reparametrised.
    """
    found = list(_converted(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has nothing that to_sigma has converted")
    for _, module, kind in found:
        training = module.parametrizations[kind][0].training
        module.parametrizations[kind].eval()  # without another step of the iteration
        cls = type(module)  # shared with copies of the model, from which the next call would take the weight away
        module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
        parametrize.remove_parametrizations(module, kind, leave_parametrized=True)
        module.train(training)
        others = {name: value for name, value in module._parameters.items() if name != kind}
        for name in others:  # the weight comes first again
            del module._parameters[name]
        module._parameters.update(others)
    return [name for name, _, _ in found]


def _converted(model: nn.Module):
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for kind, chain in module.parametrizations.items():
                if isinstance(chain[0], SigmaWeight):
                    yield f"{name}.{kind}".lstrip("."), module, kind
