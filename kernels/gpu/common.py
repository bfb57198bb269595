"""What the box kernels and the block-list kernels share: products that are right everywhere, and the softmax step."""

from __future__ import annotations

import triton
import triton.language as tl

# True when the kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before this module is imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b`, summed in float32.

    float32 goes through the tensor cores as three products of tf32, which keeps about 21 of the 24 bits: one product
    keeps 11, too few for the float32 budgets, and plain float32 ("ieee") leaves the tensor cores idle. The interpreter
    multiplies the bit patterns of bfloat16 as integers, so there both operands become float32 first.
    """
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def softmax_step(s, m, total, acc, factor, GUARD: tl.constexpr):
    """One tile of online softmax: the weights of `s`, and the running maximum, sum and output after it.

    Args:
        s: scores `[BM, BN]` in float32; minus infinity where a pair is not allowed.
        m: largest score so far times `factor`, `[BM]`, minus infinity at first.
        total: sum of weights so far, `[BM]`.
        acc: weighted sum of values so far, `[BM, DV]`.
        factor: from the unit of `s` to base 2, above 0: `scale * LOG2E`, or LOG2E when `s` is scaled.
        GUARD: whether a row may have seen nothing yet, this tile included; then its weights are 0, not NaN.
    """
    top = tl.maximum(m, tl.max(s, 1) * factor)
    base = tl.where(top == float("-inf"), 0.0, top) if GUARD else top
    p = tl.exp2(s * factor - base[:, None])
    fade = tl.exp2(m - base)
    return p, top, total * fade + tl.sum(p, 1), acc * fade[:, None]


@triton.jit
def softmax_end(m, total, acc):
    """Output `[BM, DV]` and lse `[BM]` (natural log); a row that saw nothing gets 0 and minus infinity."""
    seen = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (m + tl.log2(seen)) * LN2)
    return acc / seen[:, None], lse
