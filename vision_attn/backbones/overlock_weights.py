"""The published names of OverLoCK weights."""

from __future__ import annotations

from torch import nn

from vision_attn.backbones.checkpoints import by_rules, renamed, unwrapped
from vision_attn.modules.large_kernel import LargeKernel

__all__ = ["checkpoint_filter_fn"]

_STAGES = (
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed([234])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"^blocks(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^sub_blocks(\d)\.", lambda m: f"focus.{int(m[1]) - 3}.blocks."),
    (r"^patch_embedx\.x_proj\.", "focus.1.down."),
    (r"^patch_embedx\.h_proj\.", "focus.1.down_context."),
    (r"^high_level_proj\.", "context."),
    (r"^head\.0\.", "head.conv."),
    (r"^head\.1\.", "head.norm."),
    (r"^head\.4\.", "head.fc."),
)
_ANY_BLOCK = (
    (r"\.lk_origin\.", ".conv."),
    (r"\.origin_bn\.", ".norm."),
    (r"\.dil_conv_(k\d+_\d+)\.", r".branches.\1.0."),
    (r"\.dil_bn_(k\d+_\d+)\.", r".branches.\1.1."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)
_BLOCK = (
    (r"\.proj\.3\.proj\.1\.", ".se.fc1."),
    (r"\.proj\.3\.proj\.3\.", ".se.fc2."),
    (r"\.proj\.0\.", ".norm1."),
    (r"\.proj\.1\.", ".conv."),
    (r"\.proj\.2\.", ".norm2."),
    (r"\.proj\.4\.", ".mlp.fc1."),
    (r"\.proj\.6\.", ".mlp.conv."),
    (r"\.proj\.7\.", ".mlp.grn."),
    (r"\.proj\.8\.", ".mlp.fc2."),
    (r"\.ls\.", ".scale."),
)
_CONTEXT_BLOCK = (
    (r"\.x_scale\.", ".old_scale."),
    (r"\.h_scale\.", ".new_scale."),
    (r"\.weight_query\.", ".mix.query."),
    (r"\.weight_key\.([12])\.", lambda m: f".mix.key.{int(m[1]) - 1}."),
    (r"\.weight_proj\.", ".mix.kernels."),
    (r"\.(rpb[12])$", r".mix.\1"),
    (r"\.dyconv_proj\.", ".mix_proj."),
    (r"\.se_layer\.proj\.1\.", ".se.fc1."),
    (r"\.se_layer\.proj\.3\.", ".se.fc2."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.conv."),
    (r"\.mlp\.3\.", ".mlp.grn."),
    (r"\.mlp\.4\.", ".mlp.fc2."),
    (r"\.ls([12])\.", r".scale\1."),
)


def _rename(key: str) -> str:
    """A published name under ours."""
    own = _CONTEXT_BLOCK if key.startswith("sub_blocks") else _BLOCK if key[:6] == "blocks" else ()
    return by_rules(key, (*own, *_ANY_BLOCK, *_STAGES))


def _merged(weights: dict) -> dict:
    """Published weights of the trained form as those of the `deploy=True` form."""
    out = dict(weights)
    for key in weights:
        if not key.endswith("origin_bn.weight"):
            continue
        prefix = key.removesuffix("origin_bn.weight")
        part = {name: out.pop(name) for name in weights if name.startswith(prefix)}
        dim, _, kernel, _ = part[f"{prefix}lk_origin.weight"].shape
        large = LargeKernel(dim, kernel, deploy=False).to(part[key].dtype)
        large.load_state_dict({_rename(f".{name.removeprefix(prefix)}")[1:]: value for name, value in part.items()})
        large.merge()
        out[f"{prefix}lk_origin.weight"], out[f"{prefix}lk_origin.bias"] = large.conv.weight.data, large.conv.bias.data
    return out


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout, under our names; a model with `deploy=True` gets the kernels merged.

    Raises:
        ValueError: weights of another family or size, incomplete ones, or merged ones for a model that is not.
    """
    weights = dict(unwrapped(state_dict))
    deploy = isinstance(model.stages[0].blocks[0].conv.norm, nn.Identity)
    if deploy:
        weights = _merged(weights)
    elif any(key.endswith("lk_origin.bias") for key in weights):
        raise ValueError("this file has merged kernels; build the model with deploy=True")
    if model.aux_head is None:
        weights = {key: value for key, value in weights.items() if not key.startswith("aux_head.")}
    weights = renamed(weights, model, _rename, "OverLoCK")
    wanted = model.state_dict()
    for key, value in weights.items():  # 1 x 1 convolutions that are linear layers here, and vectors
        if value.ndim > wanted[key].ndim:
            weights[key] = value.flatten(wanted[key].ndim - 1) if wanted[key].ndim > 1 else value.flatten()
    return weights
