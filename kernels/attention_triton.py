"""Flash attention in Triton, forward and backward; the equations stand in attention.py.

    program of                owns            walks over                       computes
    _forward_kernel           BM queries      the key blocks they see          o, lse
    _delta_kernel             BM queries      -                                D_i = dO_i . O_i
    _dkdv_kernel              BN keys         G heads x the query tiles        dK, dV
    _dq_kernel                BM queries      the key blocks they see          dQ

Each output tile has one owner that adds up in registers and stores once: no atomics, so two runs give the same bits. The price
is that the scores are computed in both backward kernels, 7 matrix products where a kernel with atomics needs 5.

Skipping. A tile walks over two ranges: blocks that every pair may use, where no mask is computed, and blocks that some may;
all others are never loaded. Causal and prefix give these ranges by arithmetic (_key_blocks, _query_blocks). With segments, in
whatever order the ids stand, one small kernel notes the smallest and largest id of each block (_ranges_kernel), a second
lists for each tile the blocks whose ids overlap its own (_plan_kernel): M packed images cost M small squares.

Features that are off (CAUSAL, PREFIX, SEGMENTS are constexpr) leave no code behind. Head widths that are no power of two (72,
80, 88) are padded inside with zeros. Scores are in powers of two: exp(x) = exp2(x log2 e), which the hardware does in one step.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2 ** (x LOG2E): the hardware has exp2, not exp


# ----------------------------------------------------------------------------------------------------------------------
# The rule, once for pairs (i, j) and once for whole blocks


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
def _head(PTR, strides, b, h):
    """Where head h of batch row b starts; 64-bit, for tensors of more than 2**31 numbers."""
    return PTR + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]


@triton.jit
def _at(t0, strides, ROWS: tl.constexpr, BD: tl.constexpr):
    """Offsets of the tile of rows t0 .. t0+ROWS."""
    return t0.to(tl.int64) * strides[2] + (tl.arange(0, ROWS)[:, None] * strides[2] + tl.arange(0, BD)[None, :])


@triton.jit
def _inside(t0, T, ROWS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr):
    """Which of them exist: rows before T, and columns before DH where the head width is no power of two."""
    rows = (t0 + tl.arange(0, ROWS) < T)[:, None]
    return rows if DH == BD else rows & (tl.arange(0, BD) < DH)[None, :]


@triton.jit
def _load(HEAD, t0, T, strides, ROWS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, CHECK: tl.constexpr):
    """The tile of rows t0 .. t0+ROWS of a head, zeros outside; CHECK=False promises that all rows exist."""
    x = HEAD + _at(t0, strides, ROWS, BD)
    if CHECK:
        return tl.load(x, mask=_inside(t0, T, ROWS, DH, BD), other=0.0)
    elif DH == BD:
        return tl.load(x)
    else:
        return tl.load(x, mask=(tl.arange(0, BD) < DH)[None, :], other=0.0)


@triton.jit
def _key_blocks(q0, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX):
    """The queries q0 .. q0+BM look at key blocks 0 .. stop; those before `full` are open to all of them."""
    stop = Tk
    full = Tk
    if CAUSAL:
        stop = min(Tk, q0 + BM + Tk - Tq)  # where the last query's past ends
        full = min(Tk, q0 + 1 + Tk - Tq)  # where the first query's past ends
        if PREFIX:
            stop = max(stop, min(prefix, Tk))
            full = max(full, min(prefix, Tk))
    return max(full, 0) // BN, tl.cdiv(max(stop, 0), BN)


@triton.jit
def _query_blocks(k0, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX):
    """The keys k0 .. k0+BN are seen from query blocks start .. n; those from `full` on see all of them."""
    n = tl.cdiv(Tq, BM)
    start = 0
    full = 0
    if CAUSAL:
        start = max(0, k0 - (Tk - Tq)) // BM
        full = tl.cdiv(max(0, k0 + BN - 1 - (Tk - Tq)), BM)
        if PREFIX:
            start = tl.where(k0 < prefix, 0, start)
            full = tl.where(k0 + BN <= prefix, 0, full)
    return min(start, n), min(full, n), n


# ----------------------------------------------------------------------------------------------------------------------
# Which blocks a tile visits when there are segments: a list per tile, blocks open to everyone first


@triton.jit
def _ranges_kernel(SEG, RANGES, T, BLOCK: tl.constexpr):
    """Of one block of segment ids: the smallest and largest that is not padding, and whether all of them are the same."""
    n, b = tl.program_id(0), tl.program_id(1)
    t = n * BLOCK + tl.arange(0, BLOCK)
    seg = tl.load(SEG + b.to(tl.int64) * T + t, mask=t < T, other=-1)
    low = tl.min(tl.where(seg < 0, 2147483647, seg), 0)
    high = tl.max(seg, 0)
    out = RANGES + (b * tl.num_programs(0) + n) * 3
    tl.store(out, low)
    tl.store(out + 1, high)
    tl.store(out + 2, ((tl.min(seg, 0) == high) & (high >= 0)).to(tl.int32))


@triton.jit
def _plan_kernel(ROWS, COLS, PREFIX_LEN, INDEX, COUNT, n_cols, Tq, Tk, BM: tl.constexpr, BN: tl.constexpr,
                 OF_KEYS: tl.constexpr, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One row tile's list: INDEX holds first the column blocks that are open as a whole, then those that need the rule;
    COUNT holds how many of the first kind and how many in all. Rows are query tiles, or key tiles if OF_KEYS."""
    r, b = tl.program_id(0), tl.program_id(1)
    row = b * tl.num_programs(0) + r
    low, high, whole = tl.load(ROWS + row * 3), tl.load(ROWS + row * 3 + 1), tl.load(ROWS + row * 3 + 2)
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    if OF_KEYS:
        start, full, stop = _query_blocks(r * BN, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX)
    else:
        full, stop = _key_blocks(r * BM, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX)
        start = 0
    count = 0
    for masked in tl.static_range(2):
        for c0 in range(0, n_cols, CHUNK):
            c = c0 + tl.arange(0, CHUNK)
            col = COLS + (b * n_cols + c) * 3
            c_low = tl.load(col, mask=c < n_cols, other=2147483647)
            c_high = tl.load(col + 1, mask=c < n_cols, other=-1)
            c_whole = tl.load(col + 2, mask=c < n_cols, other=0)
            touch = (c >= start) & (c < stop) & (low <= c_high) & (c_low <= high)
            whole_open = touch & (whole + c_whole == 2) & (low == c_low) & ((c >= full) if OF_KEYS else (c < full))
            take = (touch & ~whole_open) if masked else whole_open
            tl.store(INDEX + row * n_cols + count + tl.cumsum(take.to(tl.int32), 0) - 1, c, mask=take)
            count += tl.sum(take.to(tl.int32), 0)
        tl.store(COUNT + row * 2 + masked, count)


# ----------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _forward_kernel(Q, K, V, O, LSE, Q_SEG, K_SEG, PREFIX_LEN, INDEX, COUNT, sq, sk, sv, so, scale, G, Tq, Tk,
                    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, SEGMENTS: tl.constexpr, RAGGED: tl.constexpr,
                    DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One program: BM queries of one head. Heads run fastest, so that those which share keys find them in the cache."""
    h, b, n_heads, n_tiles = tl.program_id(0), tl.program_id(2), tl.num_programs(0), tl.num_programs(1)
    tile = n_tiles - 1 - tl.program_id(1) if CAUSAL else tl.program_id(1)  # the longest rows start first
    q0 = tile * BM
    i = q0 + tl.arange(0, BM)
    K, V = _head(K, sk, b, h // G), _head(V, sv, b, h // G)
    q = _load(_head(Q, sq, b, h), q0, Tq, sq, BM, DH, BD, True)
    q_seg = tl.load(Q_SEG + b.to(tl.int64) * Tq + i, mask=i < Tq, other=-1) if SEGMENTS else i
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    if SEGMENTS:
        row = b * n_tiles + tile
        INDEX += row.to(tl.int64) * tl.cdiv(Tk, BN)
        full, stop = tl.load(COUNT + row * 2), tl.load(COUNT + row * 2 + 1)
    else:
        full, stop = _key_blocks(q0, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX)

    c = scale * LOG2E
    m = tl.full([BM], float("-inf"), tl.float32)  # the largest score so far, times c
    l = tl.zeros([BM], tl.float32)  # sum of exp2(c score - m) so far
    acc = tl.zeros([BM, BD], tl.float32)  # sum of exp2(c score - m) v so far
    for masked in tl.static_range(2):  # first the blocks that need no mask, then those that do
        if masked == 0 or (CAUSAL or SEGMENTS or RAGGED):
            for n in range(full if masked else 0, stop if masked else full):
                j0 = (tl.load(INDEX + n) if SEGMENTS else n) * BN
                k = _load(K, j0, Tk, sk, BN, DH, BD, masked)
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
                v = _load(V, j0, Tk, sv, BN, DH, BD, masked)
                acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
                m = m_new

    l_safe = tl.where(l == 0.0, 1.0, l)  # l is 0 for a query that saw nothing: o = 0, lse = -inf + log 1
    o = (acc / l_safe[:, None]).to(O.dtype.element_ty)
    tl.store(_head(O, so, b, h) + _at(q0, so, BM, BD), o, mask=_inside(q0, Tq, BM, DH, BD))
    tl.store(LSE + (b.to(tl.int64) * n_heads + h) * Tq + i, (m + tl.log2(l_safe)) / LOG2E, mask=i < Tq)


# ----------------------------------------------------------------------------------------------------------------------
# Backward


@triton.jit
def _delta_kernel(O, DO, DELTA, so, sdo, Tq, DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """D_i = sum over d of dO_id O_id: all that a score's gradient needs to know about the other keys of its row."""
    h, b, i0 = tl.program_id(0), tl.program_id(2), tl.program_id(1) * BM
    o = _load(_head(O, so, b, h), i0, Tq, so, BM, DH, BD, True).to(tl.float32)
    do = _load(_head(DO, sdo, b, h), i0, Tq, sdo, BM, DH, BD, True).to(tl.float32)
    i = i0 + tl.arange(0, BM)
    tl.store(DELTA + (b.to(tl.int64) * tl.num_programs(0) + h) * Tq + i, tl.sum(o * do, 1), mask=i < Tq)


@triton.jit
def _dkdv_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, Q_SEG, K_SEG, PREFIX_LEN, INDEX, COUNT, sq, sk, sv, sdo, sdk, sdv,
                 scale, G, Tq, Tk, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, SEGMENTS: tl.constexpr,
                 RAGGED: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One program: BN keys of one key head, over all query heads that share it and all query tiles that see it.

    Everything is computed transposed (S^T = K Q^T), so that P^T and dS^T, the left factors of dV = P^T dO and dK = dS^T Q,
    come out of the matrix units ready to use. To transpose P and dS in registers instead spills, and Triton 3.4 to 3.6
    compile it wrong on Hopper.
    """
    kh, tile, b, n_tiles = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    k0 = tile * BN
    j = k0 + tl.arange(0, BN)
    k = _load(_head(K, sk, b, kh), k0, Tk, sk, BN, DH, BD, True)
    v = _load(_head(V, sv, b, kh), k0, Tk, sv, BN, DH, BD, True)
    k_seg = tl.load(K_SEG + b.to(tl.int64) * Tk + j, mask=j < Tk, other=-1) if SEGMENTS else j
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    if SEGMENTS:
        row = b * n_tiles + tile
        INDEX += row.to(tl.int64) * tl.cdiv(Tq, BM)
        n_full, n_all = tl.load(COUNT + row * 2), tl.load(COUNT + row * 2 + 1)
    else:
        start, full, stop = _query_blocks(k0, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX)

    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for g in range(G):
        h = kh * G + g
        Qh, DOh = _head(Q, sq, b, h), _head(DO, sdo, b, h)
        per_row = (b.to(tl.int64) * tl.num_programs(0) * G + h) * Tq
        for masked in tl.static_range(2):
            if masked == 0 or (CAUSAL or SEGMENTS):
                if SEGMENTS:
                    lo, hi = n_full if masked else 0, n_all if masked else n_full
                else:
                    lo, hi = start if masked else full, full if masked else stop
                for n in range(lo, hi):
                    i0 = (tl.load(INDEX + n) if SEGMENTS else n) * BM
                    i = i0 + tl.arange(0, BM)
                    q = _load(Qh, i0, Tq, sq, BM, DH, BD, masked or RAGGED)
                    lse = tl.load(LSE + per_row + i, mask=i < Tq, other=float("inf"))  # inf: p is 0 there
                    sT = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN,BM]
                    pT = tl.exp2(sT * (scale * LOG2E) - (lse * LOG2E)[None, :])
                    if masked:
                        q_seg = tl.load(Q_SEG + b.to(tl.int64) * Tq + i, mask=i < Tq, other=-1) if SEGMENTS else i
                        ok = _may_look(i[None, :], j[:, None], q_seg[None, :], k_seg[:, None], prefix, Tq, Tk,
                                       CAUSAL, PREFIX, SEGMENTS)  # fmt: skip
                        pT = tl.where(ok, pT, 0.0)
                    do = _load(DOh, i0, Tq, sdo, BM, DH, BD, masked or RAGGED)
                    dv = tl.dot(pT.to(do.dtype), do, dv, input_precision="ieee")
                    dpT = tl.dot(v, tl.trans(do), input_precision="ieee")
                    delta = tl.load(DELTA + per_row + i, mask=i < Tq, other=0.0)
                    dsT = pT * (dpT - delta[None, :])
                    dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision="ieee")
    inside = _inside(k0, Tk, BN, DH, BD)
    tl.store(_head(DK, sdk, b, kh) + _at(k0, sdk, BN, BD), (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(_head(DV, sdv, b, kh) + _at(k0, sdv, BN, BD), dv.to(DV.dtype.element_ty), mask=inside)


@triton.jit
def _dq_kernel(Q, K, V, DO, LSE, DELTA, DQ, Q_SEG, K_SEG, PREFIX_LEN, INDEX, COUNT, sq, sk, sv, sdo, sdq, scale, G,
               Tq, Tk, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, SEGMENTS: tl.constexpr, RAGGED: tl.constexpr,
               DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One program: BM queries of one head, over the key blocks they see, as in the forward pass."""
    h, b, n_heads, n_tiles = tl.program_id(0), tl.program_id(2), tl.num_programs(0), tl.num_programs(1)
    tile = n_tiles - 1 - tl.program_id(1) if CAUSAL else tl.program_id(1)
    q0 = tile * BM
    i = q0 + tl.arange(0, BM)
    K, V = _head(K, sk, b, h // G), _head(V, sv, b, h // G)
    q = _load(_head(Q, sq, b, h), q0, Tq, sq, BM, DH, BD, True)
    do = _load(_head(DO, sdo, b, h), q0, Tq, sdo, BM, DH, BD, True)
    per_row = (b.to(tl.int64) * n_heads + h) * Tq
    lse = tl.load(LSE + per_row + i, mask=i < Tq, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + per_row + i, mask=i < Tq, other=0.0)
    q_seg = tl.load(Q_SEG + b.to(tl.int64) * Tq + i, mask=i < Tq, other=-1) if SEGMENTS else i
    prefix = tl.load(PREFIX_LEN + b) if PREFIX else 0
    if SEGMENTS:
        row = b * n_tiles + tile
        INDEX += row.to(tl.int64) * tl.cdiv(Tk, BN)
        full, stop = tl.load(COUNT + row * 2), tl.load(COUNT + row * 2 + 1)
    else:
        full, stop = _key_blocks(q0, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX)

    dq = tl.zeros([BM, BD], tl.float32)
    for masked in tl.static_range(2):
        if masked == 0 or (CAUSAL or SEGMENTS or RAGGED):
            for n in range(full if masked else 0, stop if masked else full):
                j0 = (tl.load(INDEX + n) if SEGMENTS else n) * BN
                k = _load(K, j0, Tk, sk, BN, DH, BD, masked)
                s = tl.dot(q, tl.trans(k), input_precision="ieee")
                p = tl.exp2(s * (scale * LOG2E) - lse[:, None])
                if masked:
                    j = j0 + tl.arange(0, BN)
                    k_seg = tl.load(K_SEG + b.to(tl.int64) * Tk + j, mask=j < Tk, other=-1) if SEGMENTS else j
                    ok = _may_look(i[:, None], j[None, :], q_seg[:, None], k_seg[None, :], prefix, Tq, Tk,
                                   CAUSAL, PREFIX, SEGMENTS)  # fmt: skip
                    p = tl.where(ok, p, 0.0)
                v = _load(V, j0, Tk, sv, BN, DH, BD, masked)
                dp = tl.dot(do, tl.trans(v), input_precision="ieee")
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq = (dq * scale).to(DQ.dtype.element_ty)
    tl.store(_head(DQ, sdq, b, h) + _at(q0, sdq, BM, BD), dq, mask=_inside(q0, Tq, BM, DH, BD))


# ----------------------------------------------------------------------------------------------------------------------
# Tile sizes: (queries BM, keys BN, warps, stages of the load pipeline)

# Chosen by compiling (python -m kernels.bench --compile): nothing spilled in the forward pass from Ampere to Blackwell, and
# less than 99 KB of shared memory where a block has no more (GeForce cards). Not yet tuned by the clock.
CONFIGS = {
    ("forward", 64): (128, 64, 8, 3),  # with 4 warps 255 registers and spills, with BN = 128 the same
    ("forward", 128): (128, 64, 8, 2),  # a third stage needs 128 KB
    ("forward", 256): (64, 32, 8, 2),
    ("dkdv", 64): (32, 128, 8, 2),  # BM = 64 spills 84 bytes on sm_80 and sm_100
    ("dkdv", 128): (32, 64, 8, 2),  # two accumulators of BN x 128: BN = 128 spills 100 to 270 bytes, this one 8 to 88
    ("dkdv", 256): (32, 32, 8, 1),
    ("dq", 64): (128, 64, 8, 2),
    ("dq", 128): (64, 64, 8, 2),  # BM = 128, or 4 warps, spills on sm_80 or sm_90
    ("dq", 256): (32, 32, 4, 2),
}


def config(direction, BD, dtype, Tq):
    """Tile sizes for a padded head width BD."""
    BM, BN, warps, stages = CONFIGS[direction, max(64, BD)]
    if dtype == torch.float32:  # full precision has no matrix instructions, every factor sits in registers: small tiles
        BM = BN = 16 if BD == 256 else 32
        warps, stages = 8, 1
    if direction == "forward" and Tq <= 16:  # decoding: rows of padding would cost as much as real ones
        BM, warps = 16, 4
    return BM, BN, warps, stages


# ----------------------------------------------------------------------------------------------------------------------
# Launching


def _rows(x):
    """The kernels step through batch, heads and length by strides, but read a head's numbers side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def plan(q_seg, k_seg, prefix, BM, BN, causal, of_keys):
    """The lists of _plan_kernel for query tiles, or for key tiles if of_keys -> INDEX [B,rows,cols], COUNT [B,rows,2]."""
    B, Tq, Tk = len(q_seg), q_seg.shape[1], k_seg.shape[1]
    ranges = []
    for seg, block in ((q_seg, BM), (k_seg, BN)):
        n = triton.cdiv(seg.shape[1], block)
        ranges.append(seg.new_empty(B, n, 3))
        _ranges_kernel[(n, B)](seg, ranges[-1], seg.shape[1], BLOCK=block, num_warps=1)
    rows, cols = ranges[::-1] if of_keys else ranges
    index = q_seg.new_empty(B, rows.shape[1], cols.shape[1])
    count = q_seg.new_empty(B, rows.shape[1], 2)
    _plan_kernel[(rows.shape[1], B)](
        rows, cols, prefix, index, count, cols.shape[1], Tq, Tk, BM=BM, BN=BN, OF_KEYS=of_keys, CAUSAL=causal,
        PREFIX=prefix is not None, CHUNK=128, num_warps=1)  # fmt: skip
    return index, count


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, prefix, q_seg, k_seg, scale):
        q, k, v = _rows(q), _rows(k), _rows(v)
        B, H, Tq, Dh = q.shape
        G, Tk, BD = H // k.shape[1], k.shape[2], max(16, triton.next_power_of_2(Dh))
        o = torch.empty_like(q)  # keeps the order of q's axes in memory: transpose(1, 2).reshape costs nothing after us
        lse = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
        BM, BN, warps, stages = config("forward", BD, q.dtype, Tq)
        flags = dict(CAUSAL=causal, PREFIX=prefix is not None, SEGMENTS=q_seg is not None, DH=Dh, BD=BD)
        index = count = None
        if q_seg is not None:
            index, count = plan(q_seg, k_seg, prefix, BM, BN, causal, of_keys=False)
        _forward_kernel[(H, triton.cdiv(Tq, BM), B)](
            q, k, v, o, lse, q_seg, k_seg, prefix, index, count, q.stride()[:3], k.stride()[:3], v.stride()[:3],
            o.stride()[:3], scale, G, Tq, Tk, **flags, RAGGED=Tk % BN != 0, BM=BM, BN=BN, num_warps=warps,
            num_stages=stages)  # fmt: skip
        ctx.save_for_backward(q, k, v, o, lse, prefix, q_seg, k_seg)
        ctx.causal, ctx.scale, ctx.flags = causal, scale, flags
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, _):
        q, k, v, o, lse, prefix, q_seg, k_seg = ctx.saved_tensors
        do = _rows(do)
        B, H, Tq, Dh = q.shape
        K, Tk, BD = k.shape[1], k.shape[2], ctx.flags["BD"]
        delta = torch.empty_like(lse)
        _delta_kernel[(H, triton.cdiv(Tq, 64), B)](o, do, delta, o.stride()[:3], do.stride()[:3], Tq, DH=Dh, BD=BD, BM=64)

        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        index = count = None
        BM, BN, warps, stages = config("dkdv", BD, q.dtype, Tq)
        if q_seg is not None:
            index, count = plan(q_seg, k_seg, prefix, BM, BN, ctx.causal, of_keys=True)
        _dkdv_kernel[(K, triton.cdiv(Tk, BN), B)](
            q, k, v, do, lse, delta, dk, dv, q_seg, k_seg, prefix, index, count, q.stride()[:3], k.stride()[:3],
            v.stride()[:3], do.stride()[:3], dk.stride()[:3], dv.stride()[:3], ctx.scale, H // K, Tq, Tk, **ctx.flags,
            RAGGED=Tq % BM != 0, BM=BM, BN=BN, num_warps=warps, num_stages=stages)  # fmt: skip
        BM, BN, warps, stages = config("dq", BD, q.dtype, Tq)
        if q_seg is not None:
            index, count = plan(q_seg, k_seg, prefix, BM, BN, ctx.causal, of_keys=False)
        _dq_kernel[(H, triton.cdiv(Tq, BM), B)](
            q, k, v, do, lse, delta, dq, q_seg, k_seg, prefix, index, count, q.stride()[:3], k.stride()[:3],
            v.stride()[:3], do.stride()[:3], dq.stride()[:3], ctx.scale, H // K, Tq, Tk, **ctx.flags,
            RAGGED=Tk % BN != 0, BM=BM, BN=BN, num_warps=warps, num_stages=stages)  # fmt: skip
        return dq, dk, dv, None, None, None, None, None


def flash_attention(q, k, v, rule, scale):
    """What `attention` calls -> o, lse."""
    B, H, Tq, Dh = q.shape
    K, Tk = k.shape[1], k.shape[2]
    if Dh > 256 or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"the triton backend takes head widths up to 256 and one dtype, not {Dh} and "
                         f"{q.dtype}, {k.dtype}, {v.dtype}")  # fmt: skip
    causal, prefix, q_seg, k_seg = rule["causal"] and Tq > 1, rule["prefix"], rule["q_segments"], rule["k_segments"]
    prefix = prefix.int().contiguous() if causal and prefix is not None else None
    if q_seg is not None or k_seg is not None:
        zeros = lambda T: torch.zeros(B, T, dtype=torch.int32, device=q.device)
        q_seg = zeros(Tq) if q_seg is None else q_seg.int().contiguous()
        k_seg = zeros(Tk) if k_seg is None else k_seg.int().contiguous()
    with torch.cuda.device_of(q):  # Triton starts kernels on the current device, wherever the tensors are
        if Tq > 1 or H == K:
            return FlashAttention.apply(q, k, v, causal, prefix, q_seg, k_seg, scale)
        # decoding: the query heads that share a key head become the rows of one tile, so that the keys are read once
        rows = q.reshape(B, K, H // K, Dh)
        q_seg = None if q_seg is None else q_seg.expand(B, H // K).contiguous()
        o, lse = FlashAttention.apply(rows, k, v, False, None, q_seg, k_seg, scale)
        return o.reshape(B, H, 1, Dh), lse.view(B, H, 1)
