"""apply_rope as one Triton kernel for q and k together, forward and backward.

A rotation does six operations on two numbers, so all that counts is memory: read q and k once, write them once, and read
an angle once for many heads. One program takes BT tokens and up to HEADS heads (of q, then of k), works out the cosines and
sines of its tokens, and turns head after head. The backward pass is the same kernel with the angles negated: the inverse of
a rotation is the rotation back. Nothing but the angles is kept for it.
"""

import torch
import triton
import triton.language as tl

BT, HEADS = 32, 8  # tokens and heads per program; 8 heads share the sines, more would leave a GPU idle at short lengths


@triton.jit
def _turn(X, Y, x_at, y_at, gap, cos, sin, ok):
    a = tl.load(X + x_at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(X + x_at + gap, mask=ok, other=0.0).to(tl.float32)
    tl.store(Y + y_at, (a * cos - b * sin).to(Y.dtype.element_ty), mask=ok)
    tl.store(Y + y_at + gap, (b * cos + a * sin).to(Y.dtype.element_ty), mask=ok)


@triton.jit
def _rope_kernel(Q, K, OQ, OK, ANGLES, sq, sk, soq, sok, sa, H, N, T, sign, INTERLEAVED: tl.constexpr,
                 HALF: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    t0, h0, b = tl.program_id(0) * BT, tl.program_id(1) * HEADS, tl.program_id(2).to(tl.int64)
    t, i = (t0 + tl.arange(0, BT)).to(tl.int64)[:, None], tl.arange(0, BH)[None, :]
    ok = (t < T) & (i < HALF)
    angle = tl.load(ANGLES + b * sa[0] + t * sa[1] + i * sa[2], mask=ok, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle) * sign
    x = 2 * i if INTERLEAVED else i  # where the first number of pair i lies, and how far behind it the second
    gap = 1 if INTERLEAVED else HALF
    # heads h0 .. h0+HEADS of q and k laid end to end: first those that are q's, then those that are k's
    Q, OQ = Q + b * sq[0] + h0.to(tl.int64) * sq[1], OQ + b * soq[0] + h0.to(tl.int64) * soq[1]
    for _ in range(h0, min(h0 + HEADS, H)):
        _turn(Q, OQ, t * sq[2] + x, t * soq[2] + x, gap, cos, sin, ok)
        Q += sq[1]
        OQ += soq[1]
    k0 = max(h0, H) - H
    K, OK = K + b * sk[0] + k0.to(tl.int64) * sk[1], OK + b * sok[0] + k0.to(tl.int64) * sok[1]
    for _ in range(k0, min(h0 + HEADS, N) - H):
        _turn(K, OK, t * sk[2] + x, t * sok[2] + x, gap, cos, sin, ok)
        K += sk[1]
        OK += sok[1]


def _rotate(q, k, angles, sign, interleaved):
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    oq, ok = torch.empty_like(q), torch.empty_like(k)  # in the memory order of q and k, so that views stay free
    (B, H, T, Dh), N = q.shape, q.shape[1] + k.shape[1]
    _rope_kernel[(triton.cdiv(T, BT), triton.cdiv(N, HEADS), B)](
        q, k, oq, ok, angles, q.stride()[:3], k.stride()[:3], oq.stride()[:3], ok.stride()[:3], angles.stride(), H, N,
        T, sign, INTERLEAVED=interleaved, HALF=Dh // 2, BH=triton.next_power_of_2(Dh // 2), BT=BT, HEADS=HEADS,
        num_warps=4)  # fmt: skip
    return oq, ok


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, angles, interleaved):
        ctx.save_for_backward(angles)
        ctx.interleaved = interleaved
        return _rotate(q, k, angles, 1.0, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        (angles,) = ctx.saved_tensors
        return *_rotate(dq, dk, angles, -1.0, ctx.interleaved), None, None
