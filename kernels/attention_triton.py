"""Flash attention in Triton, forward and backward; the equations stand in attention.py.

    program of                owns            walks over                       computes
    _forward_kernel           BM queries      the key blocks they see          o, lse
    _combine_kernel           one query       the parts of its keys            o, lse, where the keys were split
    _delta_kernel             BM queries      -                                D_i = dO_i . O_i
    _dkdv_kernel              BN keys         query heads x the query tiles    dK, dV
    _dq_kernel                BM queries      the key blocks they see          dQ

Each output tile has one owner that adds up in registers and stores once: no atomics, so two runs give the same bits.
The price is that both backward kernels compute the scores: 7 matrix products where a kernel with atomics needs 5.

Skipping. A tile walks over two ranges: blocks that every pair may use, where no mask is computed, and blocks that some
may; all others are never loaded. attention_blocks.py says which those are.

Loading. Hopper and Blackwell fetch a whole tile by one instruction that takes a descriptor of the tensor (TMA): no
thread computes addresses, which frees 30 to 60 of the 255 registers a thread can have, and rows or columns outside come
as zeros. Older GPUs, GeForce Blackwell, float32, tensors whose rows are no multiples of 16 bytes, and the forward pass
of at most 16 queries take pointers; _load and _store hide the difference.

Names. Tensors and constants are in capitals. sq, sk ..: strides of batch, head and length. DH the head width, BD the
same padded to a power of two; BM and BN rows and columns of a tile. INDEX and COUNT: the lists of
attention_blocks.plan. RAGGED: the last block walked over is not full, of keys in the forward pass and for dQ, of
queries for dK and dV.

Features that are off (CAUSAL, PREFIX, SEGMENTS are constexpr) leave no code behind. Head widths that are no power of
two (72, 80, 88) are padded inside with zeros. Scores are in powers of two: exp(x) = exp2(x log2 e), which the hardware
does in one step.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_blocks import _key_blocks, _query_blocks, cdiv, mask_of

LOG2E = tl.constexpr(1.4426950408889634)  # log2 e

# Triton compiles a kernel anew for lengths that are 1 or multiples of 16; a cache that grows by one would meet them all
jit_for_any_length = triton.jit(do_not_specialize=("Tq", "Tk"))


# ----------------------------------------------------------------------------------------------------------------------
# The rule for pairs (i, j), and how tiles are fetched and stored


@triton.jit
def _may_look(i, j, q_seg, k_seg, prefix, Tq, Tk, CAUSAL, PREFIX, SEGMENTS):
    """kernels.allowed for a tile; i and j broadcast against each other, so that it serves S and S^T alike."""
    ok = (i < Tq) & (j < Tk)
    if SEGMENTS:
        ok &= (q_seg == k_seg) & (q_seg >= 0)
    if CAUSAL:
        past = j <= i + (Tk - Tq)
        if PREFIX:
            past |= j < prefix
        ok &= past
    return ok


@triton.jit
def _at(X, strides, b, h, t0, ROWS: tl.constexpr, BD: tl.constexpr):
    """Pointers to rows t0 .. t0+ROWS of head h in batch row b; 64-bit, for tensors of more than 2**31 numbers."""
    start = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + t0.to(tl.int64) * strides[2]
    return X + start + (tl.arange(0, ROWS)[:, None] * strides[2] + tl.arange(0, BD)[None, :])


@triton.jit
def _inside(t0, T, ROWS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr):
    """Which of them exist: rows before T, and columns before DH where the head width is no power of two."""
    rows = (t0 + tl.arange(0, ROWS) < T)[:, None]
    return rows if DH == BD else rows & (tl.arange(0, BD) < DH)[None, :]


@triton.jit
def _load(X, strides, b, h, t0, T, ROWS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, CHECK: tl.constexpr):
    """Rows t0 .. t0+ROWS of a head, zeros outside. X: a descriptor or a pointer; CHECK=False: all rows exist."""
    if isinstance(X, tl.tensor_descriptor):
        return X.load([b, h, t0, 0]).reshape(ROWS, BD)
    elif CHECK:
        return tl.load(_at(X, strides, b, h, t0, ROWS, BD), mask=_inside(t0, T, ROWS, DH, BD), other=0.0)
    elif DH == BD:
        return tl.load(_at(X, strides, b, h, t0, ROWS, BD))
    else:
        return tl.load(_at(X, strides, b, h, t0, ROWS, BD), mask=(tl.arange(0, BD) < DH)[None, :], other=0.0)


@triton.jit
def _store(X, strides, b, h, t0, T, x, ROWS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr):
    """The other way round: what lies outside is not written."""
    if isinstance(X, tl.tensor_descriptor):
        X.store([b, h, t0, 0], x.to(X.dtype).reshape(1, 1, ROWS, BD))
    else:
        tl.store(_at(X, strides, b, h, t0, ROWS, BD), x.to(X.dtype.element_ty), mask=_inside(t0, T, ROWS, DH, BD))


# ----------------------------------------------------------------------------------------------------------------------
# Forward


@jit_for_any_length
def _forward_kernel(Q, K, V, O, LSE, Q_SEG, K_SEG, PREFIX_LEN, INDEX, COUNT, sq, sk, sv, so, scale, G, Tq, Tk,
                    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, SEGMENTS: tl.constexpr, RAGGED: tl.constexpr,
                    PARTS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr):  # fmt: skip
    """One program: BM queries of one head, over all their keys or one of PARTS parts of them.

    Heads run fastest, so that those which share keys find them in the cache."""
    h, n_heads, n_tiles, B = tl.program_id(0), tl.num_programs(0), tl.num_programs(1), tl.num_programs(2) // PARTS
    part, b = tl.program_id(2) // B, tl.program_id(2) % B
    tile = n_tiles - 1 - tl.program_id(1) if CAUSAL else tl.program_id(1)  # the longest rows start first
    q0 = tile * BM
    i = q0 + tl.arange(0, BM)
    q = _load(Q, sq, b, h, q0, Tq, BM, DH, BD, True)
    # (where there are no segments nobody reads their ids, and i stands in for them: what is passed on has to be a tile)
    q_seg = tl.load(Q_SEG + b.to(tl.int64) * Tq + i, mask=i < Tq, other=-1) if SEGMENTS else i
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    if SEGMENTS:
        row = b * n_tiles + tile
        INDEX += row.to(tl.int64) * (tl.cdiv(Tk, BN) + 1)
        full, stop = tl.load(COUNT + row * 2), tl.load(COUNT + row * 2 + 1)
    else:
        full, stop = _key_blocks(q0, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX)
    first = 0
    if PARTS > 1:  # of the blocks 0 .. stop only this program's share
        share = tl.cdiv(stop, PARTS)
        first, stop = part * share, min(stop, (part + 1) * share)
        full = min(full, stop)

    c = scale * LOG2E
    m = tl.full([BM], float("-inf"), tl.float32)  # the largest score so far, times c
    l = tl.zeros([BM], tl.float32)  # sum of exp2(c score - m) so far
    acc = tl.zeros([BM, BD], tl.float32)  # sum of exp2(c score - m) v so far
    for masked in tl.static_range(2):  # first the blocks that need no mask, then those that do
        if masked == 0 or (CAUSAL or SEGMENTS or RAGGED):
            lo, hi = (max(first, full), stop) if masked else (first, full)
            ahead = tl.load(INDEX + lo) if SEGMENTS else lo
            for n in range(lo, hi):
                j0 = (ahead if SEGMENTS else n) * BN
                if SEGMENTS:  # a step ahead: a load of tiles that waits for its index loses a stage of the pipeline
                    ahead = tl.load(INDEX + n + 1)
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
    out = part * B + b  # with parts, O and LSE have a row for each part of each b
    _store(O, so, out, h, q0, Tq, acc / l_safe[:, None], BM, DH, BD)
    tl.store(LSE + (out.to(tl.int64) * n_heads + h) * Tq + i, (m + tl.log2(l_safe)) / LOG2E, mask=i < Tq)


@triton.jit
def _combine_kernel(PART, PART_LSE, O, LSE, so, PARTS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr):
    """One program: one query, whose parts weigh exp(lse_part) / sum of exp(lse_part), which is exp(lse_part - lse)."""
    t, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    Tq, n_heads, B = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    row, d = (b * n_heads + h) * Tq + t, tl.arange(0, BD)
    rows = row + tl.arange(0, PARTS) * (B * n_heads * Tq)
    lse = tl.load(PART_LSE + rows)
    m = tl.max(lse, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    w = tl.exp(lse - m)
    l = tl.sum(w, 0)
    l_safe = tl.where(l == 0.0, 1.0, l)
    part = tl.load(PART + rows.to(tl.int64)[:, None] * DH + d[None, :], mask=(d < DH)[None, :], other=0.0)  # [PARTS,BD]
    o = tl.sum(w[:, None] * part, 0) / l_safe
    O += b.to(tl.int64) * so[0] + h.to(tl.int64) * so[1] + t.to(tl.int64) * so[2]
    tl.store(O + d, o.to(O.dtype.element_ty), mask=d < DH)
    tl.store(LSE + row, tl.where(l == 0.0, float("-inf"), m + tl.log(l_safe)))


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
def _dkdv_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, Q_SEG, K_SEG, PREFIX_LEN, INDEX, COUNT, sq, sk, sv, sdo, sdk, sdv,
                 scale, G, OWN, Tq, Tk, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, SEGMENTS: tl.constexpr,
                 RAGGED: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr):  # fmt: skip
    """One program: BN keys of one key head, over OWN of the G query heads that share it and all query tiles that see
    it. OWN is G; or 1 where programs would be few, and then the G shares of dK and dV are added up afterwards.

    Everything is computed transposed (S^T = K Q^T), so that P^T and dS^T, the left factors of dV = P^T dO and
    dK = dS^T Q, come out of the matrix units ready to use. To transpose P and dS in registers instead spills, and
    Triton 3.4 to 3.6 were reported to compile it wrong on Hopper (flash-linear-attention, issue 640).
    """
    group, tile, b, n_tiles = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    first_head, n_heads = group * OWN, tl.num_programs(0) * OWN
    kh, k0 = first_head // G, tile * BN
    j = k0 + tl.arange(0, BN)
    k = _load(K, sk, b, kh, k0, Tk, BN, DH, BD, True)
    v = _load(V, sv, b, kh, k0, Tk, BN, DH, BD, True)
    k_seg = tl.load(K_SEG + b.to(tl.int64) * Tk + j, mask=j < Tk, other=-1) if SEGMENTS else j
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    if SEGMENTS:
        row = b * n_tiles + tile
        INDEX += row.to(tl.int64) * (tl.cdiv(Tq, BM) + 1)
        n_full, n_all = tl.load(COUNT + row * 2), tl.load(COUNT + row * 2 + 1)
    else:
        start, full, stop = _query_blocks(k0, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX)

    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    # RAGGED needs no rule here: queries past Tq have lse = inf, so p = 0, and what keys past Tk gather is never stored
    for masked in tl.static_range(2):
        if masked == 0 or (CAUSAL or SEGMENTS):
            if SEGMENTS:
                lo, hi = (n_full, n_all) if masked else (0, n_full)
            else:  # the other way round than for queries: tiles start .. full need the rule, those behind see all keys
                lo, hi = (start, full) if masked else (full, stop)
            ahead = tl.load(INDEX + lo) if SEGMENTS else lo
            for step in range((hi - lo) * OWN):  # one loop over tiles and heads: two nested ones need more registers
                h, n = first_head + step % OWN, lo + step // OWN
                i0 = (ahead if SEGMENTS else n) * BM
                if SEGMENTS:
                    ahead = tl.load(INDEX + lo + (step + 1) // OWN)
                i = i0 + tl.arange(0, BM)
                per_row = (b.to(tl.int64) * n_heads + h) * Tq
                q = _load(Q, sq, b, h, i0, Tq, BM, DH, BD, masked or RAGGED)
                lse = tl.load(LSE + per_row + i, mask=i < Tq, other=float("inf"))  # inf: p is 0 there
                sT = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN,BM]
                # a query that sees nothing has lse = -inf, so p = inf: all of its blocks are masked ones, where ok
                # makes p 0
                pT = tl.exp2(sT * (scale * LOG2E) - (lse * LOG2E)[None, :])
                if masked:
                    q_seg = tl.load(Q_SEG + b.to(tl.int64) * Tq + i, mask=i < Tq, other=-1) if SEGMENTS else i
                    ok = _may_look(i[None, :], j[:, None], q_seg[None, :], k_seg[:, None], prefix, Tq, Tk,
                                   CAUSAL, PREFIX, SEGMENTS)  # fmt: skip
                    pT = tl.where(ok, pT, 0.0)
                do = _load(DO, sdo, b, h, i0, Tq, BM, DH, BD, masked or RAGGED)
                dv = tl.dot(pT.to(do.dtype), do, dv, input_precision="ieee")
                dpT = tl.dot(v, tl.trans(do), input_precision="ieee")
                delta = tl.load(DELTA + per_row + i, mask=i < Tq, other=0.0)
                dsT = pT * (dpT - delta[None, :])
                dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision="ieee")
    _store(DK, sdk, b, group, k0, Tk, dk * scale, BN, DH, BD)
    _store(DV, sdv, b, group, k0, Tk, dv, BN, DH, BD)


@jit_for_any_length
def _dq_kernel(Q, K, V, DO, LSE, DELTA, DQ, Q_SEG, K_SEG, PREFIX_LEN, INDEX, COUNT, sq, sk, sv, sdo, sdq, scale, G,
               Tq, Tk, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, SEGMENTS: tl.constexpr, RAGGED: tl.constexpr,
               DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One program: BM queries of one head, over the key blocks they see, as in the forward pass."""
    h, b, n_heads, n_tiles = tl.program_id(0), tl.program_id(2), tl.num_programs(0), tl.num_programs(1)
    tile = n_tiles - 1 - tl.program_id(1) if CAUSAL else tl.program_id(1)
    q0 = tile * BM
    i = q0 + tl.arange(0, BM)
    q = _load(Q, sq, b, h, q0, Tq, BM, DH, BD, True)
    do = _load(DO, sdo, b, h, q0, Tq, BM, DH, BD, True)
    per_row = (b.to(tl.int64) * n_heads + h) * Tq
    lse = tl.load(LSE + per_row + i, mask=i < Tq, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + per_row + i, mask=i < Tq, other=0.0)
    q_seg = tl.load(Q_SEG + b.to(tl.int64) * Tq + i, mask=i < Tq, other=-1) if SEGMENTS else i
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    if SEGMENTS:
        row = b * n_tiles + tile
        INDEX += row.to(tl.int64) * (tl.cdiv(Tk, BN) + 1)
        full, stop = tl.load(COUNT + row * 2), tl.load(COUNT + row * 2 + 1)
    else:
        full, stop = _key_blocks(q0, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX)

    dq = tl.zeros([BM, BD], tl.float32)
    for masked in tl.static_range(2):
        if masked == 0 or (CAUSAL or SEGMENTS or RAGGED):
            lo, hi = (full, stop) if masked else (0, full)
            ahead = tl.load(INDEX + lo) if SEGMENTS else lo
            for n in range(lo, hi):
                j0 = (ahead if SEGMENTS else n) * BN
                if SEGMENTS:
                    ahead = tl.load(INDEX + n + 1)
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
    _store(DQ, sdq, b, h, q0, Tq, dq * scale, BM, DH, BD)


# ----------------------------------------------------------------------------------------------------------------------
# Tile sizes: (queries BM, keys BN, warps, stages of the load pipeline)

# Direction, padded head width -> tiles for descriptors (Hopper, Blackwell), tiles for pointers (all other calls).
# Chosen by compiling for sm_80, sm_90 and sm_100 (`python -m kernels.bench --compile` lists registers and spills); on a
# GeForce no tile takes more by pointers than the 99 KB of shared memory that it has. Which of those that fit is fastest
# is for a GPU to say. Beside each: what speaks against its neighbours, in registers, bytes spilled and KB shared, the
# worst of no mask, causal and packed on any of the three, in bf16.
# Eight warps are two warp groups of 64 rows each; with three stages a tile is fetched two steps before it is needed.
CONFIGS = {
    # at most 128 registers: two programs fit a multiprocessor, one's exp under the other's products (BN 128: 244)
    ("forward", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
    # one program fits in any case, so the widest products; by pointers BN 128 spills 80, BN 64 32
    ("forward", 128): ((128, 128, 8, 3), (128, 32, 8, 3)),
    # shared memory is the limit: a third stage would take 257 KB; BM 128 by pointers takes 129 and spills 272
    ("forward", 256): ((128, 64, 8, 2), (64, 32, 8, 2)),
    # forward of at most 64 queries: the 64 rows of one warp group, for padding costs as much as real rows
    ("short", 64): ((64, 64, 4, 3), (64, 64, 4, 2)),  # by pointers BN 128 spills 52
    ("short", 128): ((64, 64, 4, 3), (64, 32, 4, 2)),  # by pointers BN 64 spills 24
    ("short", 256): ((64, 64, 4, 2), (64, 32, 8, 2)),  # by pointers four warps spill 156
    # at most 16 queries, the least that matrix units take: all else is keys under way, 64 rows twice over. By pointers
    # alone: four descriptors take Python 33 us to make, as long as the rest of so short a call
    ("decode", 64): (None, (16, 64, 4, 3)),
    ("decode", 128): (None, (16, 64, 4, 3)),  # 146 registers and 70 KB: three programs fit (BN 128: 189 and 137, one)
    ("decode", 256): (None, (16, 32, 4, 3)),  # rows of 512 bytes: 32 of them are as much as 64 above
    # 192 registers; by pointers BM 64 takes all 255, and spills 12 at three stages
    ("dkdv", 64): ((64, 128, 8, 3), (32, 128, 8, 2)),
    # two accumulators of BN x 128: BM 64 spills 144 at two stages, 184 at three; BN 128 by pointers 56
    ("dkdv", 128): ((32, 128, 8, 3), (32, 64, 8, 2)),
    # of BN x 256: BM 32 spills 76; by pointers BN 64 spills 2296 at one stage, 128 at two
    ("dkdv", 256): ((16, 64, 8, 2), (16, 32, 8, 1)),
    # at most 128 registers, as in the forward pass; by pointers two stages, as in the rest of the way back
    ("dq", 64): ((128, 64, 8, 3), (128, 64, 8, 2)),
    # BN 128 leaves no room for a third stage (289 KB); BM 128 by pointers spills 172
    ("dq", 128): ((128, 64, 8, 3), (64, 64, 8, 2)),
    ("dq", 256): ((64, 64, 8, 2), (32, 32, 4, 2)),  # BM 128 takes 289 KB and spills 180; BM 64 by pointers takes 145 KB
    # dq of at most 64 queries
    ("dq short", 64): ((64, 64, 4, 3), (64, 64, 4, 2)),
    ("dq short", 128): ((64, 64, 4, 3), (64, 32, 4, 2)),  # by pointers BN 64 spills 80
    ("dq short", 256): ((64, 32, 4, 2), (32, 32, 4, 2)),  # BN 64 spills 260, BM 64 by pointers 316
}


def config(direction, BD, dtype, Tq, tma):
    """Tile sizes for a padded head width BD and Tq queries."""
    if dtype == torch.float32:  # full precision has no matrix instructions, every factor sits in registers: small tiles
        return (32, 32, 8, 1) if BD <= 64 else (16, 16, 8, 1)
    if direction == "forward" and Tq <= 64:
        direction = "decode" if Tq <= 16 else "short"
    elif direction == "dq" and Tq <= 64:
        direction = "dq short"
    return CONFIGS[direction, max(64, BD)][0 if tma else 1]


# ----------------------------------------------------------------------------------------------------------------------
# Launching


@functools.cache
def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _has_tma(device):
    if device.type == "cpu":  # the interpreter
        return True
    # Hopper and data-centre Blackwell; a GeForce (sm_120) has descriptors, but not the shared memory that the tiles
    # above count on
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _rows(x):
    """The kernels step through batch, heads and length by strides, but read a head's numbers side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fits_tma(*tensors):
    """Descriptors need rows that start and end at multiples of 16 bytes. (In float32 they make registers spill.)"""
    steps = lambda x: [x.shape[3]] + [s for s, n in zip(x.stride()[:3], x.shape) if n > 1]
    aligned = lambda x: x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in steps(x))
    return tensors[0].dtype != torch.float32 and _has_tma(tensors[0].device) and all(map(aligned, tensors))


def _tiled(x, rows, BD, tma):
    """What _load and _store take: a descriptor of x [B,H,T,Dh] in tiles of rows x BD, or x itself."""
    # The stride of an axis of length 1 may be anything: take one that is wide enough
    strides = [s if n > 1 else x.shape[1:].numel() for s, n in zip(x.stride()[:3], x.shape)]
    return TensorDescriptor(x, [*x.shape], [*strides, 1], [1, 1, rows, BD]) if tma else x


def parts(programs, blocks, device):
    """Into how many parts to split the keys, so that few queries with many keys still fill the GPU. A power of four:
    each number of parts is a kernel of its own, and a cache that grows meets them all."""
    n = 1
    while programs * n < _processors(device) and blocks >= 16 * n:  # at least 4 blocks to each
        n *= 4
    return n


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        q, k, v = _rows(q), _rows(k), _rows(v)
        B, H, Tq, Dh = q.shape
        G, Tk, BD = H // k.shape[1], k.shape[2], max(16, 1 << (Dh - 1).bit_length())
        o = _rows(torch.empty_like(q))  # in the memory order of q, so that transpose(1, 2).reshape needs no copy
        lse = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
        tma = Tq > 16 and _fits_tma(q, k, v, o)
        BM, BN, warps, stages = config("forward", BD, q.dtype, Tq, tma)
        tiles = cdiv(Tq, BM)
        n = parts(B * H * tiles, cdiv(Tk, BN), q.device)
        out, out_lse = o, lse
        if n > 1:
            out, out_lse = (torch.empty(n * B, *x.shape[1:], dtype=torch.float32, device=q.device) for x in (o, lse))
        flags = dict(CAUSAL=mask.causal, PREFIX=mask.prefix is not None, SEGMENTS=mask.q_seg is not None, DH=Dh, BD=BD)
        _forward_kernel[(H, tiles, n * B)](
            _tiled(q, BM, BD, tma), _tiled(k, BN, BD, tma), _tiled(v, BN, BD, tma), _tiled(out, BM, BD, tma), out_lse,
            mask.q_seg, mask.k_seg, mask.prefix, *mask.plan(BM, BN, False), q.stride()[:3], k.stride()[:3],
            v.stride()[:3], out.stride()[:3], scale, G, Tq, Tk, **flags, RAGGED=Tk % BN != 0, PARTS=n, BM=BM, BN=BN,
            num_warps=warps, num_stages=stages)  # fmt: skip
        if n > 1:
            _combine_kernel[(Tq, H, B)](out, out_lse, o, lse, o.stride()[:3], PARTS=n, DH=Dh, BD=BD)
        ctx.save_for_backward(q, k, v, o, lse, mask.q_seg, mask.k_seg, mask.prefix)
        ctx.mask, ctx.scale, ctx.flags = mask, scale, flags
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or every backward pass would get zeros for the gradient of lse
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, _):
        (q, k, v, o, lse, *ids), mask = ctx.saved_tensors, ctx.mask
        do = _rows(do)
        B, H, Tq, Dh = q.shape
        K, G, Tk, BD = k.shape[1], H // k.shape[1], k.shape[2], ctx.flags["BD"]
        delta = torch.empty_like(lse)
        _delta_kernel[(H, cdiv(Tq, 64), B)](o, do, delta, o.stride()[:3], do.stride()[:3], Tq, DH=Dh, BD=BD, BM=64)

        dq, dk, dv = (_rows(torch.empty_like(x)) for x in (q, k, v))
        tma = _fits_tma(q, k, v, do, dq, dk, dv)

        def launch(kernel, direction, grid, outputs, **more):
            BM, BN, warps, stages = config(direction, BD, q.dtype, Tq, tma)
            of_keys = direction == "dkdv"
            tensors = (q, BM), (k, BN), (v, BN), (do, BM)
            written = [(x, BN if of_keys else BM) for x in outputs]
            ragged = Tq % BM != 0 if of_keys else Tk % BN != 0
            kernel[grid(BM, BN)](
                *(_tiled(x, rows, BD, tma) for x, rows in tensors), lse, delta,
                *(_tiled(x, rows, BD, tma) for x, rows in written), *ids, *mask.plan(BM, BN, of_keys),
                *(x.stride()[:3] for x, _ in (*tensors, *written)), scale=ctx.scale, G=G, Tq=Tq, Tk=Tk, **ctx.flags,
                **more, RAGGED=ragged, BM=BM, BN=BN, num_warps=warps, num_stages=stages)  # fmt: skip

        # With causal, programs differ in length: three to a multiprocessor even that out. Where that many tiles of keys
        # (of 128 at most) are not there, each query head gets programs of its own
        own, shares = G, (dk, dv)
        if G > 1 and B * K * cdiv(Tk, 128) < 3 * _processors(q.device):
            # in the dtype of q: in float32 the sm_90 compiler would serialize wgmma
            own, shares = 1, [q.new_empty(B, H, Tk, Dh) for _ in range(2)]
        launch(_dkdv_kernel, "dkdv", lambda BM, BN: (H // own, cdiv(Tk, BN), B), shares, OWN=own)
        if own < G:
            for x, share in zip((dk, dv), shares):
                x.copy_(share.view(B, K, G, Tk, Dh).sum(2))
        launch(_dq_kernel, "dq", lambda BM, BN: (H, cdiv(Tq, BM), B), [dq])
        return dq, dk, dv, None, None


@torch.compiler.disable  # torch.compile cannot trace the launches
def flash_attention(q, k, v, rule, scale):
    """What `attention` calls -> o, lse."""
    B, H, Tq, Dh = q.shape
    K, Tk = k.shape[1], k.shape[2]
    with torch.cuda.device_of(q):  # Triton starts kernels on the current device, wherever the tensors are
        if Tq > 1 or H == K:
            return FlashAttention.apply(q, k, v, mask_of(rule, B, Tq, Tk, q.device), scale)
        # decoding: the query heads that share a key head become the rows of one tile, so that the keys are read once
        rows = q.reshape(B, K, H // K, Dh)
        o, lse = FlashAttention.apply(rows, k, v, mask_of(rule, B, H // K, Tk, q.device), scale)
        return o.reshape(B, H, 1, Dh), lse.view(B, H, 1)
