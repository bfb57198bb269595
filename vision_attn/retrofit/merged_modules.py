"""What modules do instead of their own while tokens are merged in them; their state is in `merged`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vision_attn.hosts import AttachError
from vision_attn.retrofit.interception import MultiheadAttention, SelfAttention


class MergingBlock:
    """In front of a block that has attention, then an MLP."""

    def forward(self, x: torch.Tensor, attn_mask: Any = None, is_causal: bool = False, **options: Any) -> torch.Tensor:
        state = self._vision_attn
        if not state.active:
            return super().forward(x, attn_mask=attn_mask, **({"is_causal": True} if is_causal else {}), **options)
        if attn_mask is not None or is_causal:
            raise AttachError("a mask is about places, and merged tokens have none; call without one")
        x = state.merge(x + self._attend(x))
        return x + self._mix(x)


class PreNorm(MergingBlock):
    """`Block` of timm."""

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(x))))

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PostNorm(MergingBlock):
    """`ResPostBlock` of timm."""

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop_path1(self.norm1(self.attn(x)))

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop_path2(self.norm2(self.mlp(x)))


class OpenClip(MergingBlock):
    """`ResidualAttentionBlock` of open_clip."""

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.ls_1(self.attention(q_x=self.ln_1(x)))

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.ls_2(self.mlp(self.ln_2(x)))


BLOCKS = {"Block": PreNorm, "ResPostBlock": PostNorm, "ResidualAttentionBlock": OpenClip}


class Restored:
    """In front of a module that comes after the last block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self._vision_attn.restore(x))


class RestoredAfter:
    """In front of the module that has all blocks."""

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        _no_checkpoints(self)
        return self._vision_attn.restore(super().forward(x, *args, **options))


class Root:
    """In front of the tower."""

    def forward_features(self, *args: Any, **options: Any) -> Any:
        _no_checkpoints(self)
        return super().forward_features(*args, **options)

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        if self._vision_attn.active:
            raise AttachError(
                "between layers merged tokens are no map; use partition 'grid', or forward_features for the last one"
            )
        return super().forward_intermediates(*args, **options)


def _no_checkpoints(module: nn.Module) -> None:
    if module._vision_attn.active and torch.is_grad_enabled() and module.grad_checkpointing:
        raise AttachError(
            "a checkpointed block runs again later, when what it merged is gone; set_grad_checkpointing(False)"
        )


class Around:
    """In front of an attention layer."""

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        state = self._vision_attn
        if not state.active:
            return super().forward(x, *args, **options)
        layer = super().forward
        return state.around(x, lambda y: layer(y, *args, **options), options)


class MultiheadAround:
    """In front of `nn.MultiheadAttention`."""

    def forward(self, query, key, value, *args: Any, **options: Any) -> tuple[torch.Tensor, None]:
        state, layer = self._vision_attn, super().forward
        if not state.active:
            return layer(query, key, value, *args, **options)
        if query is not key or key is not value or options.get("need_weights", True):
            raise AttachError(f"{state.name} was called as cross-attention or with need_weights")
        return state.around(query, lambda y: layer(y, y, y, *args, **options)[0], options), None


class Inside(SelfAttention):
    """In front of an attention layer."""

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self._vision_attn.x = x
        try:
            return super().forward(x, *args, **options)
        finally:
            self._vision_attn.x = None


class MultiheadInside(MultiheadAttention):
    """In front of `nn.MultiheadAttention`."""

    def forward(self, query, *args: Any, **options: Any):
        self._vision_attn.x = query if self.batch_first else query.transpose(0, 1)
        try:
            return super().forward(query, *args, **options)
        finally:
            self._vision_attn.x = None
