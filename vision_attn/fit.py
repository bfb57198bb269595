"""Training that can be stopped at any moment and goes on to the same bits: one loop for every built-in model."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers, not copied; unlike `state_dict`, shared weights are named once."""
    stored = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in stored}
    return dict(module.named_parameters()) | buffers


class Checkpoint:
    """Weights, AdamW moments and moving averages of a module in one safetensors file, written atomically."""

    def __init__(self, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]):
        self.path, self.module, self.optimizer, self.average = path, module, optimizer, average

    def save(self, step: int, seconds: float) -> None:
        tensors = {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {f"model.{name}": value.detach() for name, value in weights_of(self.module).items()}
        for name, parameter in self.module.named_parameters():
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        partial = self.path.with_suffix(".partial")
        meta = {"step": str(step), "seconds": str(seconds)}
        save_file({key: value.contiguous() for key, value in tensors.items()}, partial, meta)
        partial.replace(self.path)

    def load(self) -> tuple[int, float]:
        """Steps done and seconds spent; zeros where there is no checkpoint."""
        if not self.path.exists():
            return 0, 0.0
        with safe_open(self.path, "pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}
            meta = file.metadata()
        self.average.update({n: stored[f"average.{n}"].to(a.device) for n, a in self.average.items()})
        for name, value in weights_of(self.module).items():
            value.data.copy_(stored[f"model.{name}"])
        for name, parameter in self.module.named_parameters():
            if f"adam.step.{name}" not in stored:  # it never had a gradient
                continue
            moments = {key: stored[f"adam.{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": stored[f"adam.step.{name}"], **moments}
        return int(meta["step"]), float(meta["seconds"])


def fit(
    name: str,
    module: nn.Module,
    loss_of: Callable[[np.random.Generator, float], Tensor],
    *,
    out: Path,
    steps: int,
    lr: float,
    seed: int,
    decay: float,
    every: int = 200,
) -> dict[str, float]:
    """AdamW with warm-up and cosine; `loss_of(rng, progress)` makes a batch. Leaves the moving average in `module`."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    weights = weights_of(module)
    average = {n: w.detach().clone() for n, w in weights.items()}
    checkpoint = Checkpoint(out / f"{name}.checkpoint.safetensors", module, optimizer, average)
    first, before = checkpoint.load()
    start, smooth = time.perf_counter(), None
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps)
    for step in bar:
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))
        torch.manual_seed(seed * 1_000_003 + step)  # every step has its own noise, so that resuming changes nothing
        loss = loss_of(np.random.default_rng((seed, step)), step / steps)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate = min(decay, (1 + step) / (10 + step))
        for n, w in weights.items():
            if w.is_floating_point():
                average[n].lerp_(w.detach(), 1 - rate)
            else:  # a counter, such as that of BatchNorm
                average[n].copy_(w)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            checkpoint.save(step + 1, before + time.perf_counter() - start)
            with (out / f"{name}.log.jsonl").open("a") as log:
                seconds = round(before + time.perf_counter() - start)
                log.write(json.dumps({"step": step + 1, "loss": round(smooth, 5), "seconds": seconds}) + "\n")
    with torch.no_grad():
        for n, w in weights.items():
            w.copy_(average[n])
    return {"steps": steps, "seconds": round(before + (time.perf_counter() - start if first < steps else 0))}
