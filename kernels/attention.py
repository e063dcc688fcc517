"""Attention: the one mask rule of this repo, the plain maths, and the call that everything else goes through.

    rule = Rule(causal=..., prefix=..., q_segments=..., k_segments=...)      once, for all layers of a model
    o = attention(q, k, v, rule)

Query i may look at key j if both are in the same segment (a negative one is padding), and, when causal, if
j <= i + (Tk - Tq) or j < prefix. There is no other rule: every mask of the seven families is one of these (rows look at
columns, # may, . may not).

    CLIP, image                 CLIP, text                  SigLIP, padded text         ViLT, words | patches
                                causal                      segments 0 0 0 -1 -1        segments 0 0 -1 0 0 -1
    # # # # #                   # . . . .                   # # # . .                   # # . # # .
    # # # # #                   # # . . .                   # # # . .                   # # . # # .
    # # # # #                   # # # . .                   # # # . .                   . . . . . .
    # # # # #                   # # # # .                   . . . . .                   # # . # # .
    # # # # #                   # # # # #                   . . . . .                   # # . # # .
                                                                                        . . . . . .

    Flamingo, text to images    BLIP-2, contrastive         BLIP-2, matching            BLIP-2, generation
    q -1 0 0 1 1 1, k 0 0 1 1   segments 0 0 1 1 1                                      causal, prefix 2
    . . . .                     # # . . .                   # # # # #                   # # . . .
    # # . .                     # # . . .                   # # # # #                   # # . . .
    # # . .                     . . # # #                   # # # # #                   # # # . .
    . . # #                     . . # # #                   # # # # #                   # # # # .
    . . # #                     . . # # #                   # # # # #                   # # # # #
    . . # #

    LLaVA, padded left          LLaVA, 2 new of 6           CogVLM, image as prefix     Qwen2-VL, 3 images
    causal, segments -1 0 ..    causal, with a KV cache     causal, prefix 3            segments 0 0 0 1 1 2
    . . . . . .                 # # # # # .                 # # # . . .                 # # # . . .
    . # . . . .                 # # # # # #                 # # # . . .                 # # # . . .
    . # # . . .                                             # # # . . .                 # # # . . .
    . # # # . .                                             # # # # . .                 . . . # # .
    . # # # # .                                             # # # # # .                 . . . # # .
    . # # # # #                                             # # # # # #                 . . . . . #

The Q-Former's rows are 2 queries and 3 words; its generation mask is "words see all queries and the words before".
Flamingo's rows are words, its columns 2 latents for each of 2 images: a word sees the image just before it. CogVLM is
plain causal, image and all (the picture with a prefix is the variation people ask for).

Softmax without holding the scores (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682;
Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691). For one query with scores s_j = scale q.k_j,

    o = sum_j exp(s_j - m) v_j / l      l = sum_j exp(s_j - m)      m = max_j s_j

where m only guards against overflow: any m gives the same o. So the keys can come in blocks. Keep (m, l, acc), with
acc = sum exp(s_j - m) v_j, over the keys seen so far; a new block moves the maximum from m to m', and

    l'   = exp(m - m') l   + sum_{j in block} exp(s_j - m')
    acc' = exp(m - m') acc + sum_{j in block} exp(s_j - m') v_j  at the end  o = acc / l,  lse = m + log l

One number per query, lse, is kept for the way back, since p_j = exp(s_j - lse) is then the weight itself: the backward
pass computes the scores a second time rather than reading Tq x Tk of them from memory. With g = dL/do,

    dv_j = sum_i p_ij g_i                     from o_i = sum_j p_ij v_j
    dp_ij = g_i . v_j
    ds_ij = p_ij (dp_ij - D_i)                the softmax's derivative, D_i = sum_j p_ij dp_ij
    dq_i = scale sum_j ds_ij k_j
    dk_j = scale sum_i ds_ij q_i

D_i runs over all keys of row i, which no block has at hand. But sum_j p_ij (g_i . v_j) = g_i . sum_j p_ij v_j, which is
g_i . o_i: D_i is the dot product of two rows that are there already. Each block can then be dealt with alone, in any
order.

attention_triton.py is this, in blocks, under the same names. A query that sees nothing has l = 0: it returns zeros and
sends no gradient.
"""

import contextlib
import functools
import importlib.util
import os

import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------------
# Which backend

BACKENDS = ("auto", "reference", "torch", "triton")
_forced = "auto"  # set by backend(). A module variable, not a ContextVar: torch.compile reads it without a graph break


@contextlib.contextmanager
def backend(name):
    """`with backend("reference"): ...` runs every attention and RoPE inside on that backend; "auto" is the default."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    if name == "triton" and not _triton_installed():
        raise RuntimeError("the triton backend needs Triton: pip install triton (there are wheels for Linux)")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _triton_installed():
    return importlib.util.find_spec("triton") is not None  # looks without importing: the import takes 0.3 s


@functools.cache
def _gpu_fits(device):
    return torch.cuda.get_device_capability(device) >= (8, 0)  # older ones have no bf16 matrix instructions


def choose_backend(q, k):
    """The backend that works on q and k: what was asked for, else triton on CUDA and torch elsewhere."""
    # The axes of a grid have at most 2**16 - 1 programs: one for each row of the batch, one for each 16 or more tokens
    fits = q.dtype in (torch.float32, torch.float16, torch.bfloat16) and q.shape[3] <= 256
    fits = fits and len(q) < 2**16 and max(q.shape[2], k.shape[2]) < 2**20 - 16
    if _forced == "auto":
        return "triton" if q.is_cuda and fits and _triton_installed() and _gpu_fits(q.device) else "torch"
    if _forced == "triton":
        if not fits:
            raise ValueError("the triton backend takes float32, float16 and bfloat16, heads up to 256 wide, batches "
                             f"below 2**16 and about 2**20 tokens at most, not {q.dtype} and q {[*q.shape]}, "
                             f"k {[*k.shape]}")  # fmt: skip
        if not q.is_cuda:
            if os.environ.get("TRITON_INTERPRET") != "1":
                raise RuntimeError(f"the triton backend needs a CUDA tensor, not one on {q.device.type}; to run it on "
                                   "the CPU, slowly, set TRITON_INTERPRET=1 before the first use")  # fmt: skip
            if q.dtype == torch.bfloat16:
                raise ValueError("Triton's interpreter computes bfloat16 wrong: use float32 or float16 there")
    return _forced


# ----------------------------------------------------------------------------------------------------------------------
# Who may look at whom


class Rule:
    """Who may look at whom. A model makes one for each forward pass and passes it to all of its layers: what a backend
    works out from it is worked out once.

    q_segments [B,Tq] and k_segments [B,Tk]: both equal and not negative (negative = padding, None = all in segment 0);
    causal: the last query stands at the last key, j <= i + (Tk - Tq), so that a KV cache needs nothing special;
    prefix [B]: keys j < prefix[b] are open to earlier queries too: causal does not close them, segments still may.
    The tensors are integers of at most 31 bits and must not change afterwards; the values of int32 need no check, for
    which Python would wait for a GPU. Raises ValueError for others.
    """

    def __init__(self, *, causal=False, prefix=None, q_segments=None, k_segments=None):
        if prefix is not None and not causal:
            raise ValueError("prefix opens keys that causal=True would close; without causal it means nothing")
        self.causal, self.prefix = causal, _int32("prefix", prefix)
        self.q_segments, self.k_segments = _int32("q_segments", q_segments), _int32("k_segments", k_segments)
        self._kept = {}

    def once(self, key, make):
        """make(), the first time that this key is asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def allowed(self, Tq, Tk, device=None):
        """-> bool [B,Tq,Tk], True = query i may look at key j. B is 1 where all rows agree."""
        return self.once((Tq, Tk, device), lambda: self._allowed(Tq, Tk, device))

    def _allowed(self, Tq, Tk, device):
        for x in (self.q_segments, self.k_segments, self.prefix):
            device = x.device if x is not None else device
        ok = torch.ones(1, Tq, Tk, dtype=torch.bool, device=device)
        if self.q_segments is not None or self.k_segments is not None:
            q_seg = 0 if self.q_segments is None else self.q_segments[:, :, None]
            k_seg = 0 if self.k_segments is None else self.k_segments[:, None, :]
            ok = ok & (q_seg == k_seg) & (k_seg >= 0 if self.q_segments is None else q_seg >= 0)  # [B,Tq,Tk]
        if self.causal:
            i = torch.arange(Tq, device=device)[:, None]
            j = torch.arange(Tk, device=device)
            past = j <= i + (Tk - Tq)  # [Tq,Tk]
            if self.prefix is not None:
                past = past | (j < self.prefix[:, None, None])  # [B,Tq,Tk]
            ok = ok & past
        return ok

    def check(self, B, Tq, Tk, device):
        """Raises ValueError unless the tensors have these sizes and lie there."""
        shapes = dict(prefix=(B,), q_segments=(B, Tq), k_segments=(B, Tk))
        for name, shape in shapes.items():
            x = getattr(self, name)
            if x is not None and x.shape != shape:
                raise ValueError(f"{name} has the shape {[*x.shape]} where {[*shape]} was expected")
            if x is not None and x.device != device:
                raise ValueError(f"{name} lies on {x.device}, q on {device}")


def _int32(name, x):
    if x is None or x.dtype == torch.int32:
        return x
    if x.dtype == torch.bool or x.is_floating_point():
        raise ValueError(f"{name} must be integers, not {x.dtype}; from a mask with True = token: mask.int() - 1")
    ids = x.int()
    if not torch.compiler.is_compiling() and (ids != x).any():
        raise ValueError(f"{name} must be integers of at most 31 bits, not {x[ids != x][0]}")
    return ids


def draw_mask(Tq, Tk, rule=None):
    """The rule as text, one line per query and one sign per key: # may look, . may not. Of a batch the first row."""
    table = (rule or Rule()).allowed(Tq, Tk)[0]
    return "\n".join(" ".join(".#"[int(x)] for x in row) for row in table)


# ----------------------------------------------------------------------------------------------------------------------
# The plain maths


def _reference(q, k, v, rule, scale):
    """softmax(q k^T scale) v, written down -> o, lse [B,H,Tq], weights [B,H,Tq,Tk]. The yardstick of the other two."""
    G = q.shape[1] // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.to(wide).repeat_interleave(G, dim=1) for x in (k, v))  # [B,H,Tk,Dh]: G query heads share a key head
    s = q.to(wide) @ k.transpose(-1, -2) * scale  # [B,H,Tq,Tk]
    ok = rule.allowed(*s.shape[2:], q.device)[:, None]  # [B or 1,1,Tq,Tk]
    seen = ok.any(-1, keepdim=True)
    # softmax of a row of -inf alone would be NaN: a query that sees nothing gets scores 0 here and weights 0 below
    s = s.masked_fill(~ok, -torch.inf).masked_fill(~seen, 0.0)
    weights = s.softmax(-1) * seen
    lse = s.detach().logsumexp(-1).masked_fill(~seen[..., 0], -torch.inf)
    return (weights @ v).to(q.dtype), lse.float(), weights.to(q.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# What torch ships


def _torch(q, k, v, rule, scale):
    """scaled_dot_product_attention under our rule; builds no mask where none is needed."""
    Tq, Tk = q.shape[2], k.shape[2]
    mask, is_causal, seen = None, False, None
    if rule.q_segments is not None or rule.k_segments is not None:
        mask = rule.allowed(Tq, Tk)
    elif rule.causal and Tq > 1:  # a single query is the last one: it may look at every key
        # torch aligns is_causal at the first key, we at the last: the same thing only where Tq equals Tk
        is_causal = Tq == Tk and rule.prefix is None
        mask = None if is_causal else rule.allowed(Tq, Tk, q.device)
    if mask is not None:
        mask = mask[:, None]  # [B or 1,1,Tq,Tk]
        if q.device.type != "cpu":
            # On the CPU a row without keys gives 0 and sends no gradient. Not every GPU kernel promises that, so there
            # such a row looks at all keys and its answer is thrown away.
            seen = mask.any(-1, keepdim=True)
            mask = mask | ~seen
    # enable_gqa reads the shared key heads in place: half the time of repeating them for one query on the CPU. But
    # there its backward pass adds up the heads' shares of dk and dv in 16 bits, with up to twice the error.
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.element_size() == 2 and q.device.type == "cpu" and (k.requires_grad or v.requires_grad):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return o if seen is None else torch.where(seen, o, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# The one call

_maps = None  # the list that an open attention_maps() fills


@contextlib.contextmanager
def attention_maps():
    """`with attention_maps() as maps: model(...)` appends the weights [B,H,Tq,Tk] of every attention call to maps, in
    the order of the calls. These calls use the reference maths, since the other backends never hold the weights."""
    global _maps
    before, _maps = _maps, []
    try:
        yield _maps
    finally:
        _maps = before


def attention(q, k, v, rule=None, *, scale=None, return_lse=False):
    """softmax(q k^T scale) v over the keys that the rule allows (None: all of them) -> o, like q.

    q [B,H,Tq,Dh]   k, v [B,K,Tk,Dh], K divides H
    scale is Dh ** -0.5 unless given. A query with no key to look at returns zeros and sends no gradient.
    return_lse adds lse [B,H,Tq] float32, the natural log of the sum of exp(scores), -inf for a query that sees nothing;
    no gradient flows through it. Raises ValueError for shapes, dtypes and devices that do not go together.
    """
    B, H, Tq, Dh = q.shape
    _, K, Tk, _ = k.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != Dh or H % K:
        raise ValueError(f"q [B,H,Tq,Dh] {[*q.shape]}, k {[*k.shape]} and v {[*v.shape]} [B,K,Tk,Dh] do not go "
                         "together: same B and Dh, k and v alike, K divides H")  # fmt: skip
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    rule = Rule() if rule is None else rule
    rule.check(B, Tq, Tk, q.device)
    if scale is None:
        scale = Dh**-0.5
    elif not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")

    name = choose_backend(q, k)
    if name == "triton" and _forced == "auto" and Tq == 1:
        name = "torch"  # a new token and its cache: torch shares the keys out among programs, our kernels do not
    if _maps is not None or name == "reference" or not q.numel() or not k.numel():
        o, lse, weights = _reference(q, k, v, rule, scale)
        if _maps is not None:
            _maps.append(weights.detach())
    elif name == "torch":
        o = _torch(q, k, v, rule, scale)
        if return_lse:  # torch keeps its own to itself
            with torch.no_grad():
                lse = _reference(q, k, v, rule, scale)[1]
    else:
        from .attention_triton import flash_attention

        o, lse = flash_attention(q, k, v, rule, scale)
    return (o, lse) if return_lse else o
