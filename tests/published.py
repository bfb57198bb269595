"""Forward passes in the names of released files: a weight comes into being, at random, when it is first used.

A plain forward pass written with this is at once the list of names and shapes of a file, and what its model computes.
"""

import torch
import torch.nn.functional as F


class Published:
    """Weights by name, in float64; every method applies one layer to its input."""

    def __init__(self, seed=0):
        self.weights = {}
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name, *shape, around=0.0, spread=0.1):
        if name not in self.weights:
            noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            self.weights[name] = around + spread * noise
        assert self.weights[name].shape == shape, f"{name}: {shape}"
        return self.weights[name]

    def _weight(self, name, *shape):
        fan_in = max(torch.Size(shape[1:]).numel(), 1)
        return self(f"{name}.weight", *shape, spread=fan_in**-0.5)

    def linear(self, name, x, out, bias=True):
        y = x @ self._weight(name, out, x.shape[-1]).T
        return y + self(f"{name}.bias", out) if bias else y

    def conv(self, name, x, out, kernel, stride=1, padding=0, groups=1, bias=True):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        weight = self._weight(name, out, x.shape[1] // groups, *kernel)
        return F.conv2d(x, weight, self(f"{name}.bias", out) if bias else None, stride, padding, 1, groups)

    def norm(self, name, x, eps):
        scale, shift = self(f"{name}.weight", x.shape[-1], around=1.0), self(f"{name}.bias", x.shape[-1])
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt() * scale + shift

    def norm2d(self, name, x, eps):
        return self.norm(name, x.movedim(1, -1), eps).movedim(-1, 1)

    def rms(self, name, x, eps=1e-6):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self(f"{name}.weight", x.shape[-1], around=1.0)

    def batch_norm(self, name, x):
        c = x.shape[1]
        mean, var = self(f"{name}.running_mean", c), self(f"{name}.running_var", c, around=1.0, spread=0.01)
        scale, shift = self(f"{name}.weight", c, around=1.0), self(f"{name}.bias", c)
        self.weights[f"{name}.num_batches_tracked"] = torch.tensor(7)
        mean, var, scale, shift = (t[:, None, None] for t in (mean, var, scale, shift))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift
