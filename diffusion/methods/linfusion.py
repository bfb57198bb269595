"""LinFusion: the self-attention of a Stable Diffusion U-Net as normalised linear attention."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from vision_attn.diffusion.attachment import denoisers, self_attention
from vision_attn.diffusion.families import family_of
from vision_attn.diffusion.installed import SELF_ATTENTION, Installed, refuse_or_replace
from vision_attn.diffusion.method import Method
from vision_attn.diffusion.methods import stored
from vision_attn.kernels.linear import linear_attention


@dataclasses.dataclass(frozen=True)
class LinFusion(Method):
    """Every self-attention of a U-Net replaced by linear attention, whose cost grows with the pixels, not their square.

    The new modules sit under the names of the old ones, so LoRA, ControlNet and image prompts go on working. They start
    from the pretrained projections and have to be distilled (`python -m vision_attn.diffusion.distill linfusion`):
    without `weights` the pictures are not those of the model.

    Args:
        weights: file that `LinearLayers.save` wrote.
        reduce: the middle of the new feature maps has `channels / reduce` channels; -1 leaves them out, and then the
            input is doubled. LinFusion uses 16 for SDXL and 1 for Stable Diffusion 1.5 and 2.1; None chooses between
            them by whether the U-Net takes SDXL's text and size conditions.

    Raises:
        TypeError, ValueError: not a U-Net with text-conditioned blocks, or weights of another model.

    >>> from diffusers import UNet2DConditionModel
    >>> small = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=16)
    >>> blocks = dict(down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2)
    >>> unet = UNet2DConditionModel(**small, **blocks, attention_head_dim=2)
    >>> layers = LinFusion.from_unet(unet)
    >>> with layers.mount() as run:
    ...     print(run.report)
    LinFusion in UNet2DConditionModel: 7 linear attention modules of 2828 parameters, 1568 of them new
    warning: not distilled; without weights the pictures are not those of the model

    Paper: LinFusion: 1 GPU, 1 Minute, 16K Image (arXiv 2409.02097).
    """

    weights: str | os.PathLike | None = None
    reduce: int | None = None
    name: ClassVar[str] = "linfusion"

    def __post_init__(self) -> None:
        if self.weights is not None and not isinstance(self.weights, (str, os.PathLike)):
            raise TypeError(f"weights must be the path of a file, or None; got {self.weights!r}")
        if self.reduce is not None and (type(self.reduce) is not int or (self.reduce < 1 and self.reduce != -1)):
            raise ValueError(f"reduce must be an int of at least 1, -1 or None; got {self.reduce!r}")

    def attach(self, target: Any, *, replace: bool = False) -> Mounted:
        unets = list(denoisers(target)[1].values())
        if len(unets) > 1:
            raise ValueError(f"{type(target).__name__} has two denoisers, and neither is a U-Net")
        refuse_or_replace(unets[0], SELF_ATTENTION, label=Mounted.label, replace=replace)
        layers = self.from_unet(unets[0], self.reduce)
        if self.weights is not None:
            layers.load(self.weights)
        return layers.mount()

    @staticmethod
    def from_unet(unet: nn.Module, reduce: int | None = None) -> LinearLayers:
        """Make the linear modules of a U-Net, from copies of its projections; `mount()` puts them in."""
        return LinearLayers(unet, LinFusion(reduce=reduce).reduce)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "weights": None if self.weights is None else os.fspath(self.weights)}


class LinearAttention(Attention):
    """Linear attention with the name and the projections of the attention it replaces.

    `x` of shape `[batch, tokens, channels]` becomes `Q (K^T V / N) / (Q . mean K + 1e-4)` with `Q = elu(to_q(x +
    map_q(x))) + 1`, K likewise and `V = to_v(x)`, split in heads, then `to_out`.
    """

    @classmethod
    def like(cls, attention: Attention, reduce: int) -> LinearAttention:
        """A linear one from a softmax one, whose weights are copied."""
        new = copy.deepcopy(attention)
        new.__class__ = cls
        weight = attention.to_q.weight
        for name in ("map_q", "map_k"):
            setattr(new, name, _feature_map(weight.shape[1], reduce).to(weight))
        return new

    def forward(self, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, **kwargs: Any) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("linear self-attention takes neither a second sequence nor a mask; detach LinFusion first")
        x = hidden_states

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1))

        q = F.elu(heads(self.to_q(x + self.map_q(x)))) + 1
        k = F.elu(heads(self.to_k(x + self.map_k(x)))) + 1
        out = linear_attention(q, k, heads(self.to_v(x)), eps=1e-4).flatten(-2)
        for layer in self.to_out:
            out = layer(out)
        return out


def _feature_map(channels: int, reduce: int) -> nn.Module:
    if reduce == -1:
        return nn.Identity()
    middle = channels // reduce
    if not middle:
        raise ValueError(f"reduce={reduce} leaves nothing of {channels} channels")
    return nn.Sequential(
        nn.Linear(channels, middle), nn.LayerNorm(middle), nn.LeakyReLU(0.01), nn.Linear(middle, channels)
    )


class LinearLayers(nn.ModuleDict):
    """The linear modules of one U-Net: to train, save, load, `mount()` and `unmount()`."""

    def __init__(self, unet: nn.Module, reduce: int | None = None) -> None:
        if not isinstance(unet, nn.Module):
            raise TypeError(f"LinFusion.from_unet needs a U-Net; got {type(unet).__name__}")
        family = family_of(unet, None)
        if family.name != "UNet2DConditionModel":
            raise ValueError(f"LinFusion is for UNet2DConditionModel (Stable Diffusion); got {type(unet).__name__}")
        refuse_or_replace(unet, SELF_ATTENTION, label=Mounted.label)
        stored.refuse_offload(unet, "LinFusion")
        if reduce is None:
            reduce = 16 if getattr(unet.config, "addition_embed_type", None) == "text_time" else 1
        super().__init__()
        self.reduce, self.loaded, self.mounted = reduce, False, None
        self.unet = (unet,)  # in a tuple, so that it is no part of this module
        with torch.random.fork_rng(devices=[]):  # new layers are the same every time, and disturb nobody's noise
            torch.manual_seed(0)
            for name in self_attention(unet, family):
                attention = unet.get_submodule(name)
                hooked = [m for m in attention.modules() if hasattr(m, "_diffusers_hook") or hasattr(m, "_hf_hook")]
                if hooked or attention.is_cross_attention:
                    why = "carries hooks of diffusers or accelerate" if hooked else "is cross-attention"
                    raise ValueError(
                        f"{name} {why}, and a copy of it would not work; mount LinFusion on the plain U-Net"
                    )
                self[name.replace(".", "/")] = LinearAttention.like(attention, reduce)

    def mount(self) -> Mounted:
        """Put the modules into the U-Net; what is returned is a context manager and has `detach()`.

        Raises:
            ValueError: something is attached to its self-attention.
        """
        self.mounted = Mounted(self)
        return self.mounted

    def unmount(self) -> None:
        """Put the original modules back. Safe to call twice."""
        if self.mounted is not None:
            self.mounted.detach()

    @property
    def settings(self) -> dict[str, Any]:
        return {"method": LinFusion.name, "model": type(self.unet[0]).__name__, "reduce": self.reduce}

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights of these modules, and nothing else of the U-Net."""
        stored.write(path, {_dots(name): tensor for name, tensor in self.state_dict().items()}, self.settings)

    def load(self, path: str | os.PathLike) -> LinearLayers:
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, or belongs to another model.
        """
        own = self.state_dict()
        found = stored.read(path, self.settings, {_dots(name): tensor.shape for name, tensor in own.items()})
        self.load_state_dict({name: found[_dots(name)] for name in own})
        self.loaded = True
        return self


def _dots(name: str) -> str:
    return name.replace("/", ".")  # names in a module dict have no dots


class Mounted(Installed):
    """LinFusion in a U-Net: a context manager, `report` and `detach()`."""

    label = "LinFusion"

    def __init__(self, layers: LinearLayers) -> None:
        super().__init__()
        self.layers = layers
        (unet,) = layers.unet
        with self.installing():
            self.claim(unet, SELF_ATTENTION)
            for name, module in layers.items():
                parent, _, last = _dots(name).rpartition(".")
                self._swap(unet.get_submodule(parent), last, module)

    def _swap(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        before = parent._modules[name]

        def restore() -> None:
            before.to(module.to_q.weight.device, module.to_q.weight.dtype)  # the model may have been moved meanwhile
            before.train(parent.training)
            parent._modules[name] = before

        module.to(before.to_q.weight.device, before.to_q.weight.dtype).train(before.training)
        self.later(restore)
        parent._modules[name] = module

    @property
    def report(self) -> LinearReport:
        layers = self.layers
        new = sum(p.numel() for name, p in layers.named_parameters() if ".map_" in name)
        count = sum(p.numel() for p in layers.parameters())
        return LinearReport(
            type(layers.unet[0]).__name__, list(map(_dots, layers)), layers.reduce, count, new, layers.loaded
        )


@dataclasses.dataclass
class LinearReport:
    """What LinFusion put into a U-Net.

    Args:
        model: class of the U-Net.
        modules: names of the attention modules that are linear.
        reduce: as in `LinFusion`.
        parameters: of the linear modules.
        new: those of them that the softmax modules did not have.
        distilled: whether weights were loaded.
    """

    model: str
    modules: list[str]
    reduce: int
    parameters: int
    new: int
    distilled: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"method": LinFusion.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        line = (
            f"LinFusion in {self.model}: {len(self.modules)} linear attention modules of {self.parameters} parameters, "
            f"{self.new} of them new"
        )
        warning = "\nwarning: not distilled; without weights the pictures are not those of the model"
        return line + ("" if self.distilled else warning)
