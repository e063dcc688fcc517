"""Attention and rotary positions, each behind one signature with backends that a test holds equal.

    reference   attention's plain maths in float32 (float64 stays float64): a page to read
    torch       what torch ships: scaled_dot_product_attention; RoPE in torch, which serves as its reference too
    triton      flash attention and RoPE written here, forward and backward (attention_triton.py, attention_blocks.py
                with what a mask leaves to do, rope_triton.py); the default on CUDA from Ampere on, except for float64
                and heads wider than 256

    from kernels import Rule, attention, backend
    with backend("reference"):
        o = attention(q, k, v, Rule(causal=True))

Axis letters, everywhere in this folder: B batch, T length (Tq of the queries, Tk of the keys), H query heads, K
key/value heads (K divides H, G = H // K query heads share one), Dh head width.
"""

from .attention import Rule, attention, attention_maps, backend, draw_mask
from .rope import apply_rope, mrope, rope_1d, rope_2d

__all__ = ["Rule", "attention", "attention_maps", "backend", "draw_mask"]
__all__ += ["apply_rope", "mrope", "rope_1d", "rope_2d"]
