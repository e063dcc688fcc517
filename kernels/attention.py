"""Attention: the one mask rule of this repo, the plain maths, and the call that everything else goes through.

    o = attention(q, k, v, causal=..., prefix=..., q_segments=..., k_segments=...)

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

where m only guards against overflow: any m gives the same o. So the keys can come in blocks. Keep (m, l, a), with
a = sum exp(s_j - m) v_j, over the keys seen so far; a new block moves the maximum from m to m', and

    l' = exp(m - m') l + sum_{j in block} exp(s_j - m')
    a' = exp(m - m') a + sum_{j in block} exp(s_j - m') v_j      at the end  o = a / l,  lse = m + log l

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

attention_triton.py is this, in blocks. A query that sees nothing has l = 0: it returns zeros and sends no gradient.
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


def choose_backend(x):
    """The backend that works on a tensor like x: what was asked for, else triton on CUDA and torch elsewhere."""
    name = _forced
    if name == "auto":
        # B is the third axis of the grid, which has at most 2**16 - 1 programs
        fits = x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= 256 and len(x) < 2**16
        return "triton" if fits and _triton_installed() and _gpu_fits(x.device) else "torch"
    if name == "triton":
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.shape[-1] > 256:
            raise ValueError("the triton backend takes float32, float16 and bfloat16 and heads up to 256 wide, "
                             f"not {x.dtype} and {x.shape[-1]}")  # fmt: skip
        if not x.is_cuda:
            if os.environ.get("TRITON_INTERPRET") != "1":
                raise RuntimeError(f"the triton backend needs a CUDA tensor, not one on {x.device.type}; to run it on "
                                   "the CPU, slowly, set TRITON_INTERPRET=1 before the first use")  # fmt: skip
            if x.dtype == torch.bfloat16:
                raise ValueError("Triton's interpreter computes bfloat16 wrong: use float32 or float16 there")
    return name


# ----------------------------------------------------------------------------------------------------------------------
# Who may look at whom


def allowed(Tq, Tk, *, causal=False, prefix=None, q_segments=None, k_segments=None, device=None):
    """The one mask rule of the repo -> bool [B,Tq,Tk], True = query i may look at key j. B is 1 where all rows agree.

    segments [B,Tq] and [B,Tk]: both equal and not negative (negative = padding, None = everything is in segment 0);
    causal: the last query stands at the last key, j <= i + (Tk - Tq), so that a KV cache needs nothing special;
    prefix [B]: keys j < prefix[b] are open to earlier queries too: causal does not close them, segments still may.
    """
    for x in (q_segments, k_segments, prefix):
        device = x.device if x is not None else device
    if q_segments is None and k_segments is None:
        ok = torch.ones(1, Tq, Tk, dtype=torch.bool, device=device)
    else:
        q_seg = 0 if q_segments is None else q_segments[:, :, None]
        k_seg = 0 if k_segments is None else k_segments[:, None, :]
        B = (k_segments if q_segments is None else q_segments).shape[0]
        ok = ((q_seg == k_seg) & (k_seg >= 0 if q_segments is None else q_seg >= 0)).expand(B, Tq, Tk)
    if causal:
        i = torch.arange(Tq, device=device)[:, None]
        j = torch.arange(Tk, device=device)
        past = j <= i + (Tk - Tq)  # [Tq,Tk]
        if prefix is not None:
            past = past | (j < prefix[:, None, None])  # [B,Tq,Tk]
        ok = ok & past
    return ok


def draw_mask(Tq, Tk, *, causal=False, prefix=None, q_segments=None, k_segments=None):
    """The rule as text, one line per query and one sign per key: # may look, . may not.

    Segments may be lists or tensors, [T] or [B,T] (the first of the batch is drawn), prefix a number or a tensor.
    """
    as_batch = lambda x, shape: None if x is None else torch.as_tensor(x).reshape(shape)[:1]
    rule = dict(causal=causal, prefix=as_batch(prefix, -1))
    rule |= dict(q_segments=as_batch(q_segments, (-1, Tq)), k_segments=as_batch(k_segments, (-1, Tk)))
    return "\n".join(" ".join(".#"[int(x)] for x in row) for row in allowed(Tq, Tk, **rule)[0])


# ----------------------------------------------------------------------------------------------------------------------
# The plain maths


def _reference(q, k, v, rule, scale):
    """softmax(q k^T scale) v, written down -> o, lse [B,H,Tq], weights [B,H,Tq,Tk]. The yardstick of the other two."""
    G = q.shape[1] // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.to(wide).repeat_interleave(G, dim=1) for x in (k, v))  # [B,H,Tk,Dh]: G query heads share a key head
    s = q.to(wide) @ k.transpose(-1, -2) * scale  # [B,H,Tq,Tk]
    ok = allowed(*s.shape[2:], **rule, device=q.device)[:, None]  # [B or 1,1,Tq,Tk]
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
    mask, is_causal = None, False
    if rule["q_segments"] is not None or rule["k_segments"] is not None:
        mask = allowed(Tq, Tk, **rule)
    elif rule["causal"]:
        # torch aligns is_causal at the first key, we at the last: the same thing only where Tq equals Tk
        is_causal = Tq == Tk and rule["prefix"] is None
        mask = None if is_causal else allowed(Tq, Tk, **rule, device=q.device)
    seen = None
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


def attention(q, k, v, *, causal=False, prefix=None, q_segments=None, k_segments=None, scale=None, return_lse=False):
    """softmax(q k^T scale) v over the keys that `allowed` allows -> o, like q.

    q [B,H,Tq,Dh]   k, v [B,K,Tk,Dh], K divides H
    q_segments [B,Tq], k_segments [B,Tk], prefix [B]: integers of at most 31 bits
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
    if prefix is not None:
        if not causal:
            raise ValueError("prefix opens keys that causal=True would close; without causal it means nothing")
        _check_integers("prefix", prefix, (B,), q.device)
    if q_segments is not None:
        _check_integers("q_segments", q_segments, (B, Tq), q.device)
    if k_segments is not None:
        _check_integers("k_segments", k_segments, (B, Tk), q.device)
    if scale is None:
        scale = Dh**-0.5
    elif not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    causal = causal and Tq > 1  # a single query is the last one: it may look at every key
    rule = dict(causal=causal, prefix=prefix, q_segments=q_segments, k_segments=k_segments)

    name = choose_backend(q)
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


def _check_integers(name, x, shape, device):
    if x.shape != shape:
        raise ValueError(f"{name} has the shape {[*x.shape]} where {[*shape]} was expected")
    if x.dtype == torch.bool or x.is_floating_point():
        raise ValueError(f"{name} must be integers, not {x.dtype}; from a mask with True = token: mask.int() - 1")
    if x.device != device:
        raise ValueError(f"{name} lies on {x.device}, q on {device}")
