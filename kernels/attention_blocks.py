"""Which blocks of keys a tile of queries visits, and the other way round: what a mask empties is never loaded.

Causal and prefix give two ranges by arithmetic, inside the kernels (_key_blocks, _query_blocks): blocks that every pair
may use, and blocks that some may. With segments, in whatever order the ids stand, one small kernel notes the smallest
and largest id of each block (_ranges_kernel), and a second lists for each tile the blocks whose ids overlap its own
(_plan_kernel), those that are open as a whole first: M packed images cost M small squares. (Ids that stand in no order
may overlap and share none: such a block is visited for nothing, but none is missed.) The lists are made once for a mask
and kept with it.
"""

import weakref

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary


def cdiv(n, size):
    """How many blocks of `size` hold n. (triton.cdiv does the same, but takes 4 us when called from Python.)"""
    return -(-n // size)


# ----------------------------------------------------------------------------------------------------------------------
# By arithmetic


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
# With segments: a list per tile


@triton.jit
def _ranges_kernel(SEG, RANGES, T, BLOCK: tl.constexpr):
    """Of one block of segment ids: the smallest and largest that is not padding, and whether all are the same."""
    n, b = tl.program_id(0), tl.program_id(1)
    t = n * BLOCK + tl.arange(0, BLOCK)
    seg = tl.load(SEG + b.to(tl.int64) * T + t, mask=t < T, other=-1)
    low = tl.min(tl.where(seg < 0, 2147483647, seg), 0)  # a block of padding gets low > high: it touches no other
    high = tl.max(seg, 0)
    out = RANGES + (b * tl.num_programs(0) + n) * 3
    tl.store(out, low)
    tl.store(out + 1, high)
    tl.store(out + 2, (tl.min(seg, 0) == high).to(tl.int32))


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
            whole_open = touch & (whole + c_whole == 2) & ((c >= full) if OF_KEYS else (c < full))
            take = (touch & ~whole_open) if masked else whole_open
            tl.store(INDEX + row * (n_cols + 1) + count + tl.cumsum(take.to(tl.int32), 0) - 1, c, mask=take)
            count += tl.sum(take.to(tl.int32), 0)
        tl.store(COUNT + row * 2 + masked, count)


def plan(q_seg, k_seg, prefix, BM, BN, causal, of_keys):
    """The lists of _plan_kernel, for key tiles if of_keys, else for query tiles -> INDEX [B,rows,cols+1] and
    COUNT [B,rows,2]."""
    B, Tq, Tk = len(q_seg), q_seg.shape[1], k_seg.shape[1]
    ranges = []
    for seg, block in ((q_seg, BM), (k_seg, BN)):
        n = cdiv(seg.shape[1], block)
        ranges.append(seg.new_empty(B, n, 3))
        _ranges_kernel[(n, B)](seg, ranges[-1], seg.shape[1], BLOCK=block, num_warps=1)
    rows, cols = ranges[::-1] if of_keys else ranges
    # One column more, since the kernels read the list a step ahead
    index = q_seg.new_empty(B, rows.shape[1], cols.shape[1] + 1)
    count = q_seg.new_empty(B, rows.shape[1], 2)
    _plan_kernel[(rows.shape[1], B)](
        rows, cols, prefix, index, count, cols.shape[1], Tq, Tk, BM=BM, BN=BN, OF_KEYS=of_keys, CAUSAL=causal,
        PREFIX=prefix is not None, CHUNK=128, num_warps=1)  # fmt: skip
    return index, count


class Mask:
    """The rule of one call as the kernels want it: ids as int32 [B,T], and the lists of `plan` for each tile size."""

    def __init__(self, rule, B, Tq, Tk, device):
        self.causal = rule["causal"]
        prefix, q_seg, k_seg = rule["prefix"], rule["q_segments"], rule["k_segments"]
        copy = lambda x: x.to(torch.int32, copy=True)  # a view of x would keep x alive, and x keeps this mask
        self.prefix = copy(prefix).contiguous() if self.causal and prefix is not None else None
        self.q_seg = self.k_seg = None
        if q_seg is not None or k_seg is not None:

            def ids(x, T):
                x = torch.zeros(B, 1, dtype=torch.int32, device=device) if x is None else copy(x)
                # flash_attention gives one new token of grouped heads a row for each head, and they share its id
                return x.expand(B, T).contiguous()

            self.q_seg, self.k_seg = ids(q_seg, Tq), ids(k_seg, Tk)
        self.plans = {}

    def plan(self, *tiles):
        if self.q_seg is not None and tiles not in self.plans:
            BM, BN, of_keys = tiles
            self.plans[tiles] = plan(self.q_seg, self.k_seg, self.prefix, BM, BN, self.causal, of_keys)
        return self.plans.get(tiles, (None, None))


_kept = WeakTensorKeyDictionary()  # first tensor of a rule -> key, references to all of them, Mask


def mask_of(rule, B, Tq, Tk, device):
    """The Mask of a rule, kept as long as its first tensor lives and none of them is changed in place: all layers of a
    model share one. (Not while a CUDA graph is recorded, which has to make the lists again in every replay.)"""
    given = [x for x in (rule["q_segments"], rule["k_segments"], rule["prefix"]) if x is not None]
    cuda = device.type == "cuda"
    if not given or (cuda and torch.cuda.is_current_stream_capturing()) or any(x.is_inference() for x in given):
        return Mask(rule, B, Tq, Tk, device)
    key = rule["causal"], Tq, Tk, [name for name in rule if rule[name] is not None], [x._version for x in given]
    # Tensors made in inference mode cannot be saved for a backward pass; another stream would not wait for the lists
    key += torch.is_inference_mode_enabled(), cuda and torch.cuda.current_stream(device).cuda_stream
    kept_key, refs, mask = _kept.get(given[0], (None, (), None))
    if kept_key != key or any(ref() is not x for ref, x in zip(refs, given)):
        mask = Mask(rule, B, Tq, Tk, device)
        _kept[given[0]] = key, [weakref.ref(x) for x in given], mask
    return mask
