"""Flash attention in Triton, forward and backward; the equations stand in attention.py.

    program of                owns            walks over                       computes
    _forward_kernel           BM queries      the key blocks they see          o, lse
    _delta_kernel             BM queries      -                                D_i = dO_i . O_i
    _dkdv_kernel              BN keys         the query blocks that see them   one query head's share of dK, dV
    _dq_kernel                BM queries      the key blocks they see          dQ

Each output tile has one owner that adds up in registers and stores once: no atomics, so two runs give the same bits.
The price is that both backward kernels compute the scores: 7 matrix products where a kernel with atomics needs 5.

Skipping. A tile walks over the blocks that every pair may use, where no mask is computed, and then over those that some
may; all others are never loaded. attention_blocks.py says which those are.

Names. Tensors and constants are in capitals. sq, sk ..: strides of batch, head and length. DH the head width, BD the
same padded to a power of two, with zeros; BM and BN rows and columns of a tile; G query heads share a key head. CAUSAL,
PREFIX and SEGMENTS are known when a kernel is compiled: what is off leaves no code behind. Scores are in powers of two:
exp(x) = exp2(x log2 e), which the hardware does in one step.

What to try, on a GPU and with `python -m kernels.bench` before and after. Hopper can fetch a whole tile by one
instruction that takes a descriptor of the tensor (TMA): that frees the registers that hold addresses in _load. And one
query with a long cache keeps only H programs busy: split its keys among more, then combine the parts by their lse.
"""

import functools

import torch
import triton
import triton.language as tl

from .attention_blocks import _block, _key_blocks, _query_blocks, cdiv, rule_tensors, walks

LOG2E = tl.constexpr(1.4426950408889634)  # log2 e

# Triton compiles a kernel anew for lengths that are 1 or multiples of 16; a cache that grows by one would meet them all
jit_for_any_length = triton.jit(do_not_specialize=("Tq", "Tk"))


@triton.jit
def _at(X, strides, b, h, t0, ROWS: tl.constexpr, BD: tl.constexpr):
    """Pointers to rows t0 .. t0+ROWS of head h in batch row b; 64-bit, for tensors of more than 2**31 numbers."""
    start = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + t0.to(tl.int64) * strides[2]
    return X + start + (tl.arange(0, ROWS)[:, None] * strides[2] + tl.arange(0, BD)[None, :])


@triton.jit
def _load(X, strides, b, h, t0, T, ROWS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, CHECK: tl.constexpr):
    """Those rows, zeros outside the tensor -> [ROWS,BD]. CHECK=False promises that all rows exist."""
    if CHECK or DH < BD:
        ok = (t0 + tl.arange(0, ROWS) < T)[:, None] & (tl.arange(0, BD) < DH)[None, :]
        return tl.load(_at(X, strides, b, h, t0, ROWS, BD), mask=ok, other=0.0)
    else:
        return tl.load(_at(X, strides, b, h, t0, ROWS, BD))


@triton.jit
def _store(X, strides, b, h, t0, T, x, ROWS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr):
    """The other way round: what lies outside is not written."""
    ok = (t0 + tl.arange(0, ROWS) < T)[:, None] & (tl.arange(0, BD) < DH)[None, :]
    tl.store(_at(X, strides, b, h, t0, ROWS, BD), x.to(X.dtype.element_ty), mask=ok)


@triton.jit
def _may_look(i, j, q_seg, k_seg, prefix, Tq, Tk, CAUSAL, PREFIX, SEGMENTS):
    """Rule.allowed for a tile; i and j broadcast against each other, so that it serves S and S^T alike."""
    ok = (i < Tq) & (j < Tk)
    if SEGMENTS:
        ok &= (q_seg == k_seg) & (q_seg >= 0)
    if CAUSAL:
        past = j <= i + (Tk - Tq)
        if PREFIX:
            past |= j < prefix
        ok &= past
    return ok


# ----------------------------------------------------------------------------------------------------------------------
# Forward


@jit_for_any_length
def _forward_kernel(Q, K, V, LSE, O, Q_SEG, K_SEG, PREFIX_LEN, WALKS, sq, sk, sv, so, scale, G, Tq, Tk,
                    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, SEGMENTS: tl.constexpr, DH: tl.constexpr,
                    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One program: BM queries of one head. Heads run fastest, so that those which share keys find them in the cache."""
    h, n_heads, n_tiles, b = tl.program_id(0), tl.num_programs(0), tl.num_programs(1), tl.program_id(2)
    tile = n_tiles - 1 - tl.program_id(1) if CAUSAL else tl.program_id(1)  # the longest rows start first
    i = tile * BM + tl.arange(0, BM)
    q = _load(Q, sq, b, h, tile * BM, Tq, BM, DH, BD, True)
    # (where there are no segments nobody reads their ids, and i stands in for them: what is passed on has to be a tile)
    q_seg = tl.load(Q_SEG + b.to(tl.int64) * Tq + i, mask=i < Tq, other=-1) if SEGMENTS else i
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    lo, a, z, hi = _key_blocks(WALKS, b, tile, n_tiles, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX, SEGMENTS)

    c = scale * LOG2E
    m = tl.full([BM], float("-inf"), tl.float32)  # the largest score so far, times c
    l = tl.zeros([BM], tl.float32)  # sum of exp2(c score - m) so far
    acc = tl.zeros([BM, BD], tl.float32)  # sum of exp2(c score - m) v so far
    for masked in tl.static_range(2):  # first the blocks that need no mask, then those that do
        for step in range(hi - lo - (z - a) if masked else z - a):
            j0 = _block(step, lo, a, z, masked) * BN
            k = _load(K, sk, b, h // G, j0, Tk, BN, DH, BD, masked)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM,BN]
            if masked:
                j = j0 + tl.arange(0, BN)
                k_seg = tl.load(K_SEG + b.to(tl.int64) * Tk + j, mask=j < Tk, other=-1) if SEGMENTS else j
                ok = _may_look(i[:, None], j[None, :], q_seg[:, None], k_seg[None, :], prefix, Tq, Tk,
                               CAUSAL, PREFIX, SEGMENTS)  # fmt: skip
                s = tl.where(ok, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * c)
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if masked else m_new  # -inf - -inf is NaN
            p = tl.exp2(s * c - m_safe[:, None])
            shrink = tl.exp2(m - m_safe)
            l = l * shrink + tl.sum(p, 1)
            v = _load(V, sv, b, h // G, j0, Tk, BN, DH, BD, masked)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            m = m_new

    l_safe = tl.where(l == 0.0, 1.0, l)  # l is 0 for a query that saw nothing: o = 0, lse = -inf + log 1
    _store(O, so, b, h, tile * BM, Tq, acc / l_safe[:, None], BM, DH, BD)
    tl.store(LSE + (b.to(tl.int64) * n_heads + h) * Tq + i, (m + tl.log2(l_safe)) / LOG2E, mask=i < Tq)


# ----------------------------------------------------------------------------------------------------------------------
# Backward


@jit_for_any_length
def _delta_kernel(O, DO, DELTA, so, sdo, Tq, DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """D_i = sum over d of dO_id O_id: all that a score's gradient needs to know about the other keys of its row."""
    h, b, i0 = tl.program_id(0), tl.program_id(2), tl.program_id(1) * BM
    o = _load(O, so, b, h, i0, Tq, BM, DH, BD, True).to(tl.float32)
    do = _load(DO, sdo, b, h, i0, Tq, BM, DH, BD, True).to(tl.float32)
    i = i0 + tl.arange(0, BM)
    tl.store(DELTA + (b.to(tl.int64) * tl.num_programs(0) + h) * Tq + i, tl.sum(o * do, 1), mask=i < Tq)


@jit_for_any_length
def _dkdv_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, Q_SEG, K_SEG, PREFIX_LEN, WALKS, sq, sk, sv, sdo, sdk, sdv, scale, G,
                 Tq, Tk, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, SEGMENTS: tl.constexpr, DH: tl.constexpr,
                 BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One program: BN keys, over the queries of one head that see them.

    Everything is computed transposed (S^T = K Q^T), so that P^T and dS^T, the left factors of dV = P^T dO and
    dK = dS^T Q, come out of the matrix units ready to use. To transpose P and dS in registers instead spills, and
    Triton 3.4 to 3.6 were reported to compile it wrong on Hopper (flash-linear-attention, issue 640).
    """
    h, n_heads, b = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    tile, n_tiles = tl.program_id(1), tl.num_programs(1)
    j = tile * BN + tl.arange(0, BN)
    k = _load(K, sk, b, h // G, tile * BN, Tk, BN, DH, BD, True)
    v = _load(V, sv, b, h // G, tile * BN, Tk, BN, DH, BD, True)
    k_seg = tl.load(K_SEG + b.to(tl.int64) * Tk + j, mask=j < Tk, other=-1) if SEGMENTS else j
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    lo, a, z, hi = _query_blocks(WALKS, b, tile, n_tiles, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX, SEGMENTS)
    row = (b.to(tl.int64) * n_heads + h) * Tq

    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for masked in tl.static_range(2):
        if masked == 0 or (CAUSAL or SEGMENTS):
            for step in range(hi - lo - (z - a) if masked else z - a):
                i0 = _block(step, lo, a, z, masked) * BM
                i = i0 + tl.arange(0, BM)
                q = _load(Q, sq, b, h, i0, Tq, BM, DH, BD, True)
                lse = tl.load(LSE + row + i, mask=i < Tq, other=float("inf"))  # inf: p is 0 there
                sT = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN,BM]
                # a query that sees nothing has lse = -inf, so p = inf: all of its blocks are masked ones, where ok
                # makes p 0
                pT = tl.exp2(sT * (scale * LOG2E) - (lse * LOG2E)[None, :])
                if masked:
                    q_seg = tl.load(Q_SEG + b.to(tl.int64) * Tq + i, mask=i < Tq, other=-1) if SEGMENTS else i
                    ok = _may_look(i[None, :], j[:, None], q_seg[None, :], k_seg[:, None], prefix, Tq, Tk,
                                   CAUSAL, PREFIX, SEGMENTS)  # fmt: skip
                    pT = tl.where(ok, pT, 0.0)
                do = _load(DO, sdo, b, h, i0, Tq, BM, DH, BD, True)
                dv = tl.dot(pT.to(do.dtype), do, dv, input_precision="ieee")
                dpT = tl.dot(v, tl.trans(do), input_precision="ieee")
                delta = tl.load(DELTA + row + i, mask=i < Tq, other=0.0)
                dsT = pT * (dpT - delta[None, :])
                dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision="ieee")
    _store(DK, sdk, b, h, tile * BN, Tk, dk * scale, BN, DH, BD)
    _store(DV, sdv, b, h, tile * BN, Tk, dv, BN, DH, BD)


@jit_for_any_length
def _dq_kernel(Q, K, V, DO, LSE, DELTA, DQ, Q_SEG, K_SEG, PREFIX_LEN, WALKS, sq, sk, sv, sdo, sdq, scale, G, Tq, Tk,
               CAUSAL: tl.constexpr, PREFIX: tl.constexpr, SEGMENTS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One program: BM queries of one head, over the key blocks they see, as in the forward pass."""
    h, n_heads, n_tiles, b = tl.program_id(0), tl.num_programs(0), tl.num_programs(1), tl.program_id(2)
    tile = n_tiles - 1 - tl.program_id(1) if CAUSAL else tl.program_id(1)
    i = tile * BM + tl.arange(0, BM)
    q = _load(Q, sq, b, h, tile * BM, Tq, BM, DH, BD, True)
    do = _load(DO, sdo, b, h, tile * BM, Tq, BM, DH, BD, True)
    row = (b.to(tl.int64) * n_heads + h) * Tq
    lse = tl.load(LSE + row + i, mask=i < Tq, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + row + i, mask=i < Tq, other=0.0)
    q_seg = tl.load(Q_SEG + b.to(tl.int64) * Tq + i, mask=i < Tq, other=-1) if SEGMENTS else i
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    lo, a, z, hi = _key_blocks(WALKS, b, tile, n_tiles, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX, SEGMENTS)

    dq = tl.zeros([BM, BD], tl.float32)
    for masked in tl.static_range(2):
        for step in range(hi - lo - (z - a) if masked else z - a):
            j0 = _block(step, lo, a, z, masked) * BN
            k = _load(K, sk, b, h // G, j0, Tk, BN, DH, BD, masked)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            p = tl.exp2(s * (scale * LOG2E) - lse[:, None])
            if masked:
                j = j0 + tl.arange(0, BN)
                k_seg = tl.load(K_SEG + b.to(tl.int64) * Tk + j, mask=j < Tk, other=-1) if SEGMENTS else j
                ok = _may_look(i[:, None], j[None, :], q_seg[:, None], k_seg[None, :], prefix, Tq, Tk,
                               CAUSAL, PREFIX, SEGMENTS)  # fmt: skip
                p = tl.where(ok, p, 0.0)
            v = _load(V, sv, b, h // G, j0, Tk, BN, DH, BD, masked)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store(DQ, sdq, b, h, tile * BM, Tq, dq * scale, BM, DH, BD)


# ----------------------------------------------------------------------------------------------------------------------
# Launching

# Direction, padded head width -> queries BM, keys BN, warps, stages of the load pipeline. Eight warps are two warp
# groups of 64 rows each. Chosen by compiling: nothing spills at widths 64 and 128 on sm_90. Which of those that fit is
# fastest is for a GPU to say.
CONFIGS = {
    ("forward", 64): (128, 64, 8, 3), ("forward", 128): (128, 64, 8, 3), ("forward", 256): (64, 32, 8, 2),
    ("dkdv", 64): (64, 128, 8, 2), ("dkdv", 128): (32, 128, 8, 2), ("dkdv", 256): (16, 32, 8, 1),
    ("dq", 64): (128, 64, 8, 2), ("dq", 128): (128, 64, 8, 2), ("dq", 256): (32, 32, 4, 2),
}  # fmt: skip
# Where it differs on GPUs with less shared memory than an H100's 227 KB: an A100 has 163, a GeForce 99. Nothing spills
# on sm_80.
SMALL = {
    ("forward", 128): (128, 32, 8, 3), ("dkdv", 64): (64, 64, 8, 2), ("dkdv", 128): (32, 64, 8, 2),
    ("dq", 128): (64, 64, 8, 2),
}  # fmt: skip


@functools.cache
def _is_small(device):
    return device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 200 * 1024


def config(direction, BD, dtype, Tq, device):
    """Tile sizes for a padded head width BD and Tq queries."""
    if dtype == torch.float32:  # full precision has no matrix instructions, every factor sits in registers: small tiles
        return (32, 32, 8, 1) if BD <= 64 else (16, 16, 8, 1)
    if direction != "dkdv" and Tq <= 64 and BD <= 128:  # the 64 rows of one warp group: padding costs as much as rows
        return (64, 64, 4, 2) if BD <= 64 else (64, 32, 4, 2)
    return (CONFIGS | SMALL if _is_small(device) else CONFIGS)[direction, max(64, BD)]


def _rows(x):
    """The kernels step through batch, heads and length by strides, but read a head's numbers side by side, and count
    the numbers from the first row of a tile to its last in 31 bits."""
    return x if x.stride(-1) == 1 and x.stride(2) < 2**24 else x.contiguous()


def _launch(kernel, direction, inputs, rows, outputs, rule, ids, scale):
    """inputs: q, k and others [B,heads,T,Dh]; rows: numbers for each query, [B,H,Tq]; ids: see rule_tensors."""
    q, k, (q_seg, _, prefix), of_keys = inputs[0], inputs[1], ids, direction == "dkdv"
    (B, H, Tq, Dh), (_, K, Tk, _) = q.shape, k.shape
    BD = max(16, triton.next_power_of_2(Dh))
    BM, BN, warps, stages = config(direction, BD, q.dtype, Tq, q.device)
    tile_walks = None
    if q_seg is not None:
        make = lambda: walks(*ids, rule.causal, BM, BN, of_keys)
        tile_walks = rule.once((Tq, Tk, BM, BN, of_keys), make)
    kernel[(H, cdiv(Tk, BN) if of_keys else cdiv(Tq, BM), B)](
        *inputs, *rows, *outputs, *ids, tile_walks, *(x.stride()[:3] for x in (*inputs, *outputs)), scale, H // K,
        Tq, Tk, CAUSAL=rule.causal, PREFIX=prefix is not None, SEGMENTS=q_seg is not None, DH=Dh, BD=BD, BM=BM, BN=BN,
        num_warps=warps, num_stages=stages)  # fmt: skip


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rule, scale):
        q, k, v = _rows(q), _rows(k), _rows(v)
        o = _rows(torch.empty_like(q))  # in the memory order of q, so that transpose(1, 2).reshape needs no copy
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ids = rule_tensors(rule, len(q), q.shape[2], k.shape[2], q.device)
        _launch(_forward_kernel, "forward", (q, k, v), (lse,), (o,), rule, ids, scale)
        ctx.save_for_backward(q, k, v, o, lse, *ids)
        ctx.rule, ctx.scale = rule, scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or every backward pass would get zeros for the gradient of lse
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, _):
        q, k, v, o, lse, *ids = ctx.saved_tensors
        (B, H, Tq, Dh), (_, K, Tk, _), do = q.shape, k.shape, _rows(do)
        delta = torch.empty_like(lse)
        _delta_kernel[(H, cdiv(Tq, 64), B)](
            o, do, delta, o.stride()[:3], do.stride()[:3], Tq, DH=Dh, BD=max(16, triton.next_power_of_2(Dh)), BM=64
        )
        # Query heads that share a key head each write a share of its gradient, in the dtype of k: more programs, and no
        # loop over heads in them
        dk, dv = (_rows(torch.empty_like(x)) if H == K else x.new_empty(B, H, Tk, Dh) for x in (k, v))
        dq = _rows(torch.empty_like(q))
        inputs, rows = (q, k, v, do), (lse, delta)
        _launch(_dkdv_kernel, "dkdv", inputs, rows, (dk, dv), ctx.rule, ids, ctx.scale)
        _launch(_dq_kernel, "dq", inputs, rows, (dq,), ctx.rule, ids, ctx.scale)
        if H > K:
            dk, dv = (x.view(B, K, H // K, Tk, Dh).sum(2) for x in (dk, dv))
        return dq, dk, dv, None, None


@torch.compiler.disable  # torch.compile cannot trace the launches
def flash_attention(q, k, v, rule, scale):
    """What `attention` calls -> o, lse."""
    with torch.cuda.device_of(q):  # Triton starts kernels on the current device, wherever the tensors are
        return FlashAttention.apply(q, k, v, rule, scale)
