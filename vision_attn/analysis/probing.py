"""Efficient probing: a small attentive head on frozen tokens, its training, and the maps it learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn


class EfficientProbing(nn.Module):
    """Learned queries pool frozen tokens, each its own share of the channels; then a linear classifier.

    `weights = softmax(dim ** -0.5 * queries @ tokens.T)`, without a projection of the keys. The values are one linear
    map of the tokens to `dim // reduce` channels; query j pools part j of them. Input `[batch, tokens, dim]`, output
    `[batch, num_classes]`. Without the classifier it has `queries * dim + dim ** 2 / reduce` parameters.

    Args:
        dim: channels of the tokens, a multiple of `queries * reduce`.
        num_classes: 0 for none: the output is then the pooled `[batch, dim // reduce]`.
        queries: how many attention maps it learns.
        reduce: divides the channels of the values.

    >>> probe = EfficientProbing(192, num_classes=10, queries=16)
    >>> probe(torch.randn(2, 196, 192)).shape, probe.attention(torch.randn(2, 196, 192)).shape
    (torch.Size([2, 10]), torch.Size([2, 16, 196]))

    Paper: Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency.
    """

    def __init__(self, dim: int, num_classes: int, queries: int = 32, reduce: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        if min(dim, queries, reduce) < 1 or dim % (queries * reduce):
            raise ValueError(f"dim {dim} must be a multiple of queries * reduce, which is {queries * reduce}")
        dd = {"device": device, "dtype": dtype}
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, queries, dim, **dd))
        self.v = nn.Linear(dim, dim // reduce, bias=False, **dd)
        self.norm = nn.BatchNorm1d(dim // reduce, affine=False, eps=1e-6, **dd)
        self.fc = nn.Linear(dim // reduce, num_classes, **dd) if num_classes else nn.Identity()

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where the queries look, `[batch, queries, tokens]`, rows that sum to 1."""
        return (tokens.shape[-1] ** -0.5 * self.cls_token @ tokens.mT).softmax(-1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        queries = self.cls_token.shape[1]
        values = self.v(tokens).unflatten(2, (queries, -1)).transpose(1, 2)  # [batch, queries, tokens, share]
        pooled = (self.attention(tokens)[:, :, None] @ values).flatten(1)
        return self.fc(self.norm(pooled))


@dataclasses.dataclass(frozen=True)
class Probed:
    """What `fit_probe` found: the head, and the loss and accuracy on its training images after every epoch."""

    probe: EfficientProbing
    losses: list[float]
    accuracies: list[float]


def fit_probe(
    features: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_classes: int,
    *,
    queries: int = 32,
    reduce: int = 1,
    epochs: int = 20,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    batch: int = 256,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Probed:
    """Train an efficient probing head on the tokens of a frozen model, which are computed once and kept on the CPU.

    AdamW with a cosine schedule and a warm-up of a tenth of the steps.

    Args:
        features: images to tokens `[batch, tokens, dim]` or a map; `frozen_tokens(model)` for timm models.
        batches: pairs of images and classes `[batch]`, for example a data loader, read once.
        epochs, lr, weight_decay, batch: of the training of the head.
        seed: of the head's weights and of the order of the images.
        progress: wrapped around the epochs, for example `tqdm.tqdm`.

    Raises:
        ValueError: no images, or classes outside 0 ... num_classes - 1.

    >>> images, classes = torch.randn(16, 9, 32), torch.arange(16) % 2  # already tokens
    >>> fit_probe(lambda x: x, [(images, classes)], num_classes=2, queries=4, epochs=3).probe.fc.out_features
    2
    """
    with torch.no_grad():
        kept = [(features(images).cpu(), classes.cpu()) for images, classes in batches]
    if not kept:
        raise ValueError("batches is empty; give pairs of images and classes")
    tokens, classes = torch.cat([t for t, _ in kept]), torch.cat([c for _, c in kept])
    if tokens.ndim != 3:
        raise ValueError(f"features must give tokens [batch, tokens, dim]; got {list(tokens.shape)}")
    if not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(f"classes run from {classes.min()} to {classes.max()}; allowed: 0 to {num_classes - 1}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = EfficientProbing(tokens.shape[2], num_classes, queries, reduce)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    per_epoch = max(1, len(tokens) // batch)  # a last short batch is left out: batch norm needs several images
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    losses, accuracies = [], []
    for _ in progress(range(epochs)):
        order = torch.randperm(len(tokens), generator=generator)
        loss_sum = right = seen = 0
        for index in order.split(batch)[:per_epoch]:
            logits = probe(tokens[index].float())
            loss = F.cross_entropy(logits, classes[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += float(loss.detach()) * len(index)
            right += int((logits.argmax(1) == classes[index]).sum())
            seen += len(index)
        losses.append(loss_sum / seen)
        accuracies.append(right / seen)
    return Probed(probe.eval(), losses, accuracies)


def frozen_tokens(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from images to the model's last patch tokens `[batch, tokens, dim]`, in eval mode, without gradients.

    Class and register tokens are left out; maps become tokens row by row.

    >>> import timm
    >>> frozen_tokens(timm.create_model("vit_tiny_patch16_224", img_size=96))(torch.randn(1, 3, 96, 96)).shape
    torch.Size([1, 36, 192])
    """
    if not hasattr(model, "forward_features"):
        raise TypeError(f"model: got {type(model).__name__}; allowed: a timm model, which has forward_features")

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        training = model.training
        try:
            x = model.eval().forward_features(images)
        finally:
            model.train(training)
        if x.ndim == 4:
            return (x if getattr(model, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)).flatten(1, 2)
        return x[:, getattr(model, "num_prefix_tokens", 0) :]

    return features
