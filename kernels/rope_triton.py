"""apply_rope as one Triton kernel for q and k together, forward and backward.

A rotation does six operations on two numbers, so all that counts is memory: read q and k once, write them once, and have
enough of both under way. One program takes BT tokens of HEADS heads, of q or of k, as a single block of HEADS x BT x BH pairs
(BH: half the head width, padded to a power of two): all of its loads start before the first is needed, and the heads share
its cosines and sines. The backward pass is the same kernel with the sines negated: the inverse of a rotation is the rotation
back. Nothing but the angles is kept for it.

Sines and cosines are worked out here, in float32, from angles that all layers share. Positions instead of angles would be
3 numbers a token rather than Dh/2; but the angles are 4 Dh/2 of the 4 Dh (H + K) bytes that a token's q and k move in 16 bits: 1 in
80 for 40 heads, 1 in 28 for the 14 of Qwen2-VL-2B. `python -m kernels.bench` measures that bound on a GPU ("angles for free").
"""

import torch
import triton
import triton.language as tl

from .attention_blocks import cdiv

BT, HEADS = 16, 4  # tokens and heads per program: at width 128 it keeps 16 KB under way, several of which share a multiprocessor


@triton.jit
def _turn(X, Y, sx, sy, b, h0, H, t, T, angle, sign, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
          HEADS: tl.constexpr):  # fmt: skip
    h, t = (h0 + tl.arange(0, HEADS)).to(tl.int64)[:, None, None], t[None, :, None]
    x, y = X + b * sx[0] + h * sx[1] + t * sx[2], Y + b * sy[0] + h * sy[1] + t * sy[2]  # [HEADS,BT,1]
    i = tl.arange(0, 2 * BH if INTERLEAVED else BH)[None, None, :]
    ok = (h < H) & (t < T) & (i < (2 * HALF if INTERLEAVED else HALF))
    # All loads come before the cosines: those branch for large angles, and no load is started ahead of a branch
    first = tl.load(x + i, mask=ok, other=0.0)
    second = first if INTERLEAVED else tl.load(x + i + HALF, mask=ok, other=0.0)
    cos, sin = tl.cos(angle)[None], (tl.sin(angle) * sign)[None]  # [1,BT,BH]
    if INTERLEAVED:  # pairs lie side by side: fetched as they lie, then dealt out
        first, second = first.to(tl.float32).reshape(HEADS, cos.shape[1], BH, 2).split()
        pairs = tl.join(first * cos - second * sin, second * cos + first * sin).reshape(HEADS, cos.shape[1], 2 * BH)
        tl.store(y + i, pairs.to(Y.dtype.element_ty), mask=ok)
    else:
        first, second = first.to(tl.float32), second.to(tl.float32)
        tl.store(y + i, (first * cos - second * sin).to(Y.dtype.element_ty), mask=ok)
        tl.store(y + i + HALF, (second * cos + first * sin).to(Y.dtype.element_ty), mask=ok)


@triton.jit
def _rope_kernel(Q, K, OQ, OK, ANGLES, sq, sk, soq, sok, sa, H, N, T, sign, INTERLEAVED: tl.constexpr,
                 HALF: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)  # heads run fastest: they find their angles in the cache
    t, i = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BH)
    angle = ANGLES + b * sa[0] + t[:, None] * sa[1] + i[None, :]
    angle = tl.load(angle, mask=(t < T)[:, None] & (i < HALF)[None, :], other=0.0)
    groups = tl.cdiv(H, HEADS)
    if group < groups:
        _turn(Q, OQ, sq, soq, b, group * HEADS, H, t, T, angle, sign, INTERLEAVED, HALF, BH, HEADS)
    else:
        _turn(K, OK, sk, sok, b, (group - groups) * HEADS, N, t, T, angle, sign, INTERLEAVED, HALF, BH, HEADS)


def _rotate(q, k, angles, sign, interleaved):
    rows = lambda x: x if x.stride(-1) == 1 else x.contiguous()
    q, k, angles = rows(q), rows(k), rows(angles.float())
    oq, ok = rows(torch.empty_like(q)), rows(torch.empty_like(k))  # in the memory order of q and k, so that views stay free
    (B, H, T, Dh), N = q.shape, k.shape[1]  # N key heads: K is the tensor
    _rope_kernel[(cdiv(H, HEADS) + cdiv(N, HEADS), cdiv(T, BT), B)](
        q, k, oq, ok, angles, q.stride()[:3], k.stride()[:3], oq.stride()[:3], ok.stride()[:3], angles.stride()[:2], H,
        N, T, sign, INTERLEAVED=interleaved, HALF=Dh // 2, BH=1 << (Dh // 2 - 1).bit_length(), BT=BT, HEADS=HEADS,
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


@torch.compiler.disable  # torch.compile has to go around it
def rope(q, k, angles, interleaved):
    """What `apply_rope` calls -> q, k."""
    with torch.cuda.device_of(q):  # Triton starts kernels on the current device, wherever the tensors are
        return Rope.apply(q, k, angles, interleaved)
