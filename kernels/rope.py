"""Rotary position embedding in one, two and three dimensions.

The idea (RoFormer, Su et al. 2021, arXiv:2104.09864). Take the head's numbers two by two and read each pair as a point
in the plane. At position p turn pair i by the angle p f_i, where f_i = base ** (-2 i / Dh): the first pair turns fast,
the last hardly at all. Let R(a) be the rotation by a. Attention then compares

    (R(p f) q) . (R(r f) k)  =  q . R(-p f) R(r f) k  =  q . R((r - p) f) k

because R(a) transposed is R(-a) and rotations in the plane add up. So:
  - a score depends on the distance r - p alone, though each side was turned without knowing the other;
  - position 0 changes nothing, and no position changes a vector's length;
  - the gradient of a rotation is the rotation back: dq = R(-p f) dq', which is all there is to the backward pass.

More than one axis: every pair still turns by one number; the axes just share the pairs out among themselves.

    rope_1d   every pair turns with the position in the text                       LLaMA, LLaVA, CogVLM
    rope_2d   half of the pairs turn with the row, half with the column            Qwen2-VL's ViT
    mrope     three runs of pairs: time, row, column (Wang et al. 2024,            Qwen2-VL's decoder
              arXiv:2409.12191). Text has the three equal, which is rope_1d again.

    pair              0 1 2 3 4 5 6 7      of a head of width 16
    rope_1d           p p p p p p p p
    rope_2d           r r r r c c c c      the frequencies of width 8, once for the rows and again for the columns
    mrope [2,3,3]     t t r r r c c c

Which two numbers make a pair? Published weights disagree, and a wrong choice gives fluent nonsense, not an error:
    half-split   pair i is (x[i], x[i + Dh/2])    here, and LLaMA as published on the hub (`rotate_half`)
    interleaved  pair i is (x[2i], x[2i + 1])     the paper, Meta's LLaMA, GPT-J
With order = torch.arange(Dh).view(-1, 2).T.flatten(), that is 0 2 4 .. 1 3 5 .., x[..., order] turned half-split is
x turned interleaved, [..., order]. Permuting the rows of the q and k projections by `order` therefore converts a
checkpoint.

A rotation, in this file, is a pair of float32 tensors: cosines and sines, each [B,1,T,Dh]. A model computes it once per
forward pass and passes it to all of its layers, since they all turn by the same angles.

Axis letters: B batch, T length, H query heads, K key heads, Dh head width.
"""

import torch

from .attention import choose_backend


def _frequencies(n, dim, base, device):
    """base ** (-2 i / dim) for i < n: radians per step, falling from 1 to about 1/base -> [n] float32."""
    return 1.0 / base ** (torch.arange(0, 2 * n, 2, device=device).float() / dim)


def rope_1d(positions, dim, base=10000.0):
    """positions [B,T] -> a rotation. The base 10000 is the paper's (section 3.2.2)."""
    _check(dim, 2)
    return _rotation(positions[..., None].float() * _frequencies(dim // 2, dim, base, positions.device))


def rope_2d(positions, dim, base=10000.0):
    """positions [2,B,T] (row, column) -> a rotation: half of the pairs turn with the row, half with the column. Each
    axis has the frequencies of a head of width dim/2, so both see the same scales (Qwen2-VL's ViT)."""
    _check(dim, 4)
    row, col = positions[..., None].float()  # each [B,T,1]
    f = _frequencies(dim // 4, dim // 2, base, positions.device)
    return _rotation(torch.cat((row * f, col * f), dim=-1))


def mrope(positions, dim, sections, base=10000.0):
    """positions [3,B,T] (time, row, column) -> a rotation: of the dim/2 frequencies the first sections[0] turn with
    time, the next sections[1] with the row, the last sections[2] with the column. Qwen2-VL: dim 128, [16,24,24]."""
    _check(dim, 2)
    if len(sections) != 3 or sum(sections) != dim // 2:
        raise ValueError(f"three sections that add up to dim/2 = {dim // 2} are needed, not {list(sections)}")
    time, row, col = positions[..., None].float()  # each [B,T,1]
    f, g, h = _frequencies(dim // 2, dim, base, positions.device).split(list(sections))
    return _rotation(torch.cat((time * f, row * g, col * h), dim=-1))


def _check(dim, multiple):
    if dim % multiple:
        raise ValueError(f"the head width must be a multiple of {multiple} here, not {dim}")


def _rotation(angles):
    """angles [B,T,Dh/2] -> cosines, sines, each [B,1,T,Dh]: both halves of the last axis contain the same Dh/2 pairs,
    with the sines negated in the first half. _turn below shows why."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [B,1,T,Dh/2]
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(q, k, rotation):
    """Turn the pairs of q [B,H,T,Dh] and of k [B,K,T,Dh] -> q, k in their own dtype. rotation: what rope_1d, rope_2d or
    mrope return. Computed in float32 (float64 stays): in bfloat16 a cosine near 1 loses all but 8 bits."""
    cos, sin = rotation
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:] or cos.shape != (len(q), 1, *q.shape[2:]):
        raise ValueError(f"q [B,H,T,Dh] {[*q.shape]}, k [B,K,T,Dh] {[*k.shape]} and cosines [B,1,T,Dh] "
                         f"{[*cos.shape]} do not go together")  # fmt: skip
    if choose_backend(q, k) == "triton":
        from .rope_triton import rope

        return rope(q, k, cos, sin)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x, cos, sin):
    """x = (a, b), two halves -> (a cos - b sin, b cos + a sin). The roll turns (a, b) into (b, a)."""
    y = x if x.dtype == torch.float64 else x.float()
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
