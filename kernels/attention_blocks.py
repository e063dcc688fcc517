"""Which blocks of keys a tile of queries visits, and the other way round: what a mask empties is never loaded.

A walk is four block numbers. From `lo` to `hi` some pair may look; from `a` to `z`, which lies in between, every pair
may, and no mask has to be computed. Causal and prefix give them by arithmetic, inside the kernels (_key_blocks,
_query_blocks). With segments a few lines of torch compare the smallest and the largest id of each block (walks): M
packed images cost M small squares. Ids that stand in no order give walks that are too long, never too short: the rule
for pairs has the last word.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


def cdiv(n, size):
    """How many blocks of `size` hold n. (triton.cdiv does the same, but takes 4 us when called from Python.)"""
    return -(-n // size)


@triton.jit
def _key_blocks(WALKS, b, tile, n_tiles, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX, SEGMENTS):
    """The walk of the queries tile * BM .. over blocks of BN keys -> lo, a, z, hi."""
    if SEGMENTS:
        walk = WALKS + (b * n_tiles + tile) * 4
        return tl.load(walk), tl.load(walk + 1), tl.load(walk + 2), tl.load(walk + 3)
    else:
        full, stop = Tk, Tk
        if CAUSAL:
            full = min(Tk, max(0, tile * BM + 1 + Tk - Tq))  # where the first query's past ends
            stop = min(Tk, max(0, tile * BM + BM + Tk - Tq))  # where the last query's past ends
            if PREFIX:
                full = max(full, min(prefix, Tk))
                stop = max(stop, min(prefix, Tk))
        return 0, 0, full // BN, tl.cdiv(stop, BN)


@triton.jit
def _query_blocks(WALKS, b, tile, n_tiles, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX, SEGMENTS):
    """The walk of the keys tile * BN .. over blocks of BM queries -> lo, a, z, hi."""
    if SEGMENTS:
        return _key_blocks(WALKS, b, tile, n_tiles, prefix, Tq, Tk, BM, BN, CAUSAL, PREFIX, SEGMENTS)
    else:
        k0, n = tile * BN, tl.cdiv(Tq, BM)
        start, full = 0, 0
        if CAUSAL:
            start = min(n, max(0, k0 - (Tk - Tq)) // BM)
            full = min(n, tl.cdiv(max(0, k0 + BN - 1 - (Tk - Tq)), BM))
            if PREFIX:
                start = tl.where(k0 < prefix, 0, start)
                full = tl.where(k0 + BN <= prefix, 0, full)
        return start, full, n, n  # the last block counts as open: queries past Tq add nothing


@triton.jit
def _block(step, lo, a, z, masked: tl.constexpr):
    """The block at which a walk is after so many steps: of the open ones, a .. z, or of the others.

    The loops begin at 0 and find their block here. With a first block that is read from memory (range(a, z)), ptxas
    serializes the matrix units of _dkdv_kernel: it no longer knows that nothing else writes their accumulators."""
    return tl.where(lo + step < a, lo + step, lo + step + (z - a)) if masked else a + step


def rule_tensors(rule, B, Tq, Tk, device):
    """The tensors of a rule, in memory row by row -> q_seg [B,Tq] and k_seg [B,Tk], or None and None; prefix [B] or
    None."""

    def make():
        ids = [None, None]
        if rule.q_segments is not None or rule.k_segments is not None:
            given = (rule.q_segments, Tq), (rule.k_segments, Tk)
            ids = [
                torch.zeros(B, T, dtype=torch.int32, device=device) if x is None else x.contiguous() for x, T in given
            ]
        return *ids, None if rule.prefix is None else rule.prefix.contiguous()

    return rule.once(("tensors", Tq, Tk), make)


def walks(q_seg, k_seg, prefix, causal, BM, BN, of_keys):
    """lo, a, z, hi for each tile of queries, or of keys -> int32 [B,tiles,4]."""
    q_low, q_high, q_whole = (x[:, :, None] for x in _span(q_seg, BM))  # each [B,rows,1]
    k_low, k_high, k_whole = (x[:, None, :] for x in _span(k_seg, BN))  # each [B,1,cols]
    some = (q_low <= k_high) & (k_low <= q_high)  # [B,rows,cols]
    every = some & q_whole & k_whole
    if causal:
        Tq, Tk, device = q_seg.shape[1], k_seg.shape[1], q_seg.device
        last = torch.arange(0, Tq, BM, device=device)[:, None] + (Tk - Tq)  # where the first query of a tile stands
        k0 = torch.arange(0, Tk, BN, device=device)
        prefix = 0 if prefix is None else prefix[:, None, None]
        some = some & ((k0 < last + BM) | (k0 < prefix))
        every = every & ((k0 + BN - 1 <= last) | (k0 + BN <= prefix))
    if of_keys:
        some, every = some.transpose(1, 2), every.transpose(1, 2)
    c = torch.arange(some.shape[2], device=some.device)
    first = lambda x: torch.where(x, c, len(c)).amin(-1)
    a = first(every)
    z = first(~every & (c >= a[..., None]))
    return torch.stack((first(some), a, z, torch.where(some, c + 1, 0).amax(-1)), -1).int()


def _span(seg, size):
    """Of each block of ids: the smallest that is no padding, the largest, and whether all are the same -> 3 x [B,n].
    In a block of padding the smallest is larger than the largest: it touches no other."""
    x = F.pad(seg, (0, -seg.shape[1] % size), value=-1).unflatten(1, (-1, size))  # [B,n,size]
    high = x.amax(-1)
    return torch.where(x < 0, 2**31 - 1, x).amin(-1), high, x.amin(-1) == high
