"""Rotary position embedding in one, two and three dimensions.

The idea (RoFormer, Su et al. 2021, arXiv:2104.09864). Take the head's numbers two by two and read each pair as a point in
the plane. At position p turn pair i by the angle p f_i, where f_i = base ** (-2 i / Dh): the first pair turns fast, the last
hardly at all. Let R(a) be the rotation by a. What attention compares is then

    (R(p f) q) . (R(r f) k)  =  q . R(-p f) R(r f) k  =  q . R((r - p) f) k

because R(a) transposed is R(-a) and rotations in the plane add up. So:
  - a score depends on the distance r - p alone, though each side was turned without knowing the other;
  - position 0 changes nothing, and no position changes a vector's length;
  - the gradient of a rotation is the rotation back: dq = R(-p f) dq', which is all there is to the backward pass.

More than one axis: every pair still turns by one number; the axes just share the pairs out among themselves.

    rope_1d   every pair turns with the position in the text                       LLaMA, LLaVA, CogVLM
    rope_2d   half of the pairs turn with the row, half with the column            Qwen2-VL's ViT, Pixtral
    mrope     three runs of pairs: time, row, column (Wang et al. 2024,            Qwen2-VL's decoder
              arXiv:2409.12191). Text has the three equal, which is rope_1d again.

    pair              0 1 2 3 4 5 6 7      of a head of width 16
    rope_1d           p p p p p p p p
    rope_2d halves    r r r r c c c c      the frequencies of width 8, once for the rows and again for the columns
    rope_2d altern.   r r r r c c c c      the frequencies 0 2 4 6 for the rows, 1 3 5 7 for the columns
    mrope [2,3,3]     t t r r r c c c

Which two numbers make a pair? Published weights disagree, and a wrong choice gives fluent nonsense, not an error:
    half-split (here unless told otherwise; LLaMA as published on the hub, `rotate_half`):   pair i is (x[i], x[i + Dh/2])
    interleaved (the paper, Meta's LLaMA, GPT-J):                                            pair i is (x[2i], x[2i + 1])
With order = torch.arange(Dh).view(-1, 2).T.flatten(), that is 0 2 4 .. 1 3 5 .., x[..., order] turned half-split is x turned
interleaved, [..., order]. Permuting the rows of the q and k projections by `order` therefore converts a checkpoint.

Axis letters: B batch, T length, H query heads, K key heads, Dh head width.
"""

import torch

from .attention import choose_backend


def _frequencies(n, dim, base, device):
    """base ** (-2 i / dim) for i < n: radians per step, falling from 1 to about 1/base -> [n] float32."""
    return 1.0 / base ** (torch.arange(0, 2 * n, 2, device=device).float() / dim)


def rope_1d(positions, dim, base=10000.0):
    """positions [B,T] -> angles [B,T,dim/2] in float32. The base 10000 is the paper's (section 3.2.2)."""
    _check(dim, 2)
    return positions[..., None].float() * _frequencies(dim // 2, dim, base, positions.device)


def rope_2d(positions, dim, base=10000.0, layout="halves"):
    """positions [2,B,T] (row, column) -> angles [B,T,dim/2]: first those that turn with the row, then with the column.

    "halves" (Qwen2-VL's ViT): each axis has the frequencies of a head of width dim/2, so both see the same scales.
    "alternating" (Pixtral): the frequencies of width dim are dealt out in turn, even ones to rows, odd ones to columns.
    """
    _check(dim, 4)
    row, col = positions[..., None].float()  # each [B,T,1]
    if layout == "halves":
        f = g = _frequencies(dim // 4, dim // 2, base, positions.device)
    elif layout == "alternating":
        f, g = _frequencies(dim // 2, dim, base, positions.device).view(-1, 2).T  # each [dim/4]
    else:
        raise ValueError(f"unknown layout {layout!r}; there are halves, alternating")
    return torch.cat((row * f, col * g), dim=-1)


def mrope(positions, dim, sections, base=10000.0):
    """positions [3,B,T] (time, row, column) -> angles [B,T,dim/2]: of the dim/2 frequencies the first sections[0] turn
    with time, the next sections[1] with the row, the last sections[2] with the column. Qwen2-VL: dim 128, [16,24,24]."""
    _check(dim, 2)
    if len(sections) != 3 or sum(sections) != dim // 2:
        raise ValueError(f"three sections that add up to dim/2 = {dim // 2} are needed, not {list(sections)}")
    f = _frequencies(dim // 2, dim, base, positions.device).split(list(sections))
    return torch.cat([p[..., None].float() * g for p, g in zip(positions, f)], dim=-1)


def _check(dim, multiple):
    if dim % multiple:
        raise ValueError(f"the head width must be a multiple of {multiple} here, not {dim}")


def apply_rope(q, k, angles, interleaved=False):
    """Turn the pairs of q [B,H,T,Dh] and of k [B,K,T,Dh] by angles [B,T,Dh/2] -> q, k in their own dtype.

    Computed in float32 (float64 stays, but for the angles): in bfloat16 a cosine near 1 loses all but 8 bits. Angles get no gradient.
    """
    B, _, T, Dh = q.shape
    if k.shape[0] != B or k.shape[2:] != q.shape[2:] or angles.shape != (B, T, Dh // 2):
        raise ValueError(f"q [B,H,T,Dh] {[*q.shape]}, k [B,K,T,Dh] {[*k.shape]} and angles [B,T,Dh/2] "
                         f"{[*angles.shape]} do not go together")  # fmt: skip
    if choose_backend(q) == "triton":
        from .rope_triton import rope

        return rope(q, k, angles, interleaved)
    turn = _interleaved if interleaved else _half_split
    cos, sin = _cos_sin(angles, interleaved)
    return turn(q, cos, sin), turn(k, cos, sin)


def _cos_sin(angles, interleaved):
    """Cosines and sines in the shape that the two functions below want. All layers of a model turn by the same angles, and
    these took 6 of 18 us per layer and token: they are worked out once and stay on the tensor until it changes."""
    key = None if angles.is_inference() else (interleaved, torch.is_inference_mode_enabled(), angles._version)
    kept = getattr(angles, "_kept_cos_sin", None)
    if kept is not None and kept[0] == key:
        return kept[1]
    cos, sin = angles.detach().cos()[:, None], angles.detach().sin()[:, None]  # [B,1,T,Dh/2]
    if not interleaved:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # [B,1,T,Dh]
    if key is not None and not torch.compiler.is_compiling():
        angles._kept_cos_sin = key, (cos, sin)
    return cos, sin


def _half_split(x, cos, sin):
    """(a, b) -> (a cos - b sin, b cos + a sin); a is the first half of x, b the second, and a roll swaps them."""
    y = x if x.dtype == torch.float64 else x.float()
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def _interleaved(x, cos, sin):
    y = x if x.dtype == torch.float64 else x.float()
    a, b = y[..., 0::2], y[..., 1::2]  # each [B,H,T,Dh/2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
