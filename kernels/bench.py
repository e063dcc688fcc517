"""Speed and size of the kernels.

    python -m kernels.bench              times what this machine can run: without CUDA a small table in a few seconds
    python -m kernels.bench --compile    compiles every configuration for Ampere, Hopper and Blackwell (Linux, no GPU
                                         needed): registers, spilled bytes, shared memory, kind of matrix instruction
    python -m kernels.bench --tiles      on a GPU: times other tile sizes beside those of attention_triton.CONFIGS
    python -m kernels.bench --rehearse   every table of a GPU, on the CPU under Triton's interpreter at toy sizes: the
                                         figures mean nothing, but the program is seen to run through

TFLOP/s count 4 B H Tq Tk Dh for a forward pass (half of it if causal) and 2.5 times that for a backward pass, as in the
FlashAttention papers. Every fraction is of a ceiling measured in the same run.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F

from . import allowed, apply_rope, attention, backend, mrope, rope_1d, rope_2d
from .attention import _triton_installed


@dataclass
class Sizes:
    """What the tables of a GPU are made of; the defaults are those of the papers: 16k tokens, width 2048."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 16384
    width: int = 2048
    lengths: tuple = (512, 1024, 2048, 4096, 8192, 16384)
    longest_eager: int = 4096  # beyond it, scores written out take too long
    images: tuple = (64, 256)  # how many, patches of each
    keys: int = 32768  # of one query, and
    cross: tuple = (64, 4096)  # of 64 latents
    matrix: int = 8192
    rehearsal: bool = False

    def few(self, n):
        """n heads or rows of a batch; a rehearsal has a sixth."""
        return max(1, n // 6) if self.rehearsal else n

    def clock(self, f):
        """Milliseconds of one call of f."""
        return one_call_ms(f) if self.rehearsal else gpu_ms(f)

    def make(self, B, H, K, Tq, Tk, Dh):
        """Random q, k, v."""
        return make(self.few(B), self.few(H), self.few(K), Tq, Tk, Dh, self.dtype, self.device)


TOY = Sizes(device="cpu", dtype=torch.float16, tokens=64, width=128, lengths=(16, 32), longest_eager=32, images=(4, 8),
            keys=64, cross=(20, 64), matrix=64, rehearsal=True)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Timing


def median_ms(f):
    """Median time of f on the CPU, over as many calls as fit 0.15 seconds."""
    f()
    times, end = [], time.perf_counter() + 0.15
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def gpu_ms(f):
    """The GPU sleeps a millisecond while Python launches f: the time taken is then the GPU's, even of short kernels."""
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than any GPU's cache: nothing f reads is in it
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(100)]
    f()
    begin = time.perf_counter()
    for n, (start, end) in enumerate(pairs, 1):
        cache.zero_()
        torch.cuda._sleep(2_000_000)  # cycles: a millisecond, more than any launch in these tables takes
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        if n >= 10 and time.perf_counter() - begin > 0.15:
            break
    return statistics.median(start.elapsed_time(end) for start, end in pairs[:n])


def called_ms(f):
    """Time of f where calls follow each other and Python's part in them counts; the cache stays as it is."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(50):
            f()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 50)
    return statistics.median(times[1:]) * 1e3


def one_call_ms(f):
    start = time.perf_counter()
    f()
    return (time.perf_counter() - start) * 1e3


@functools.cache  # what was left out, and why, is said once
def print_once(text):
    print(text, file=sys.stderr)


def attempt(f):
    """f(), or None: whatever an alternative raises (a tile too large is no RuntimeError), the table goes on."""
    try:
        return f()
    except Exception as error:
        print_once(f"  left out: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:110]}")


def both_ways(f, inputs, grad, clock):
    """Milliseconds of the forward pass alone and of the backward pass alone; None for what f cannot do."""
    with torch.no_grad():
        forward = attempt(lambda: clock(f))

    def backward():
        out = f()
        return clock(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))

    return forward, attempt(backward) if forward else None


def make(B, H, K, Tq, Tk, Dh, dtype, device):
    shapes = (B, H, Tq, Dh), (B, K, Tk, Dh), (B, K, Tk, Dh)
    return [torch.randn(s, dtype=dtype, device=device).requires_grad_() for s in shapes]


def show(title, rows, columns):
    """rows: dicts; columns: name -> format. A dash for what could not be run."""
    print(f"\n{title}")
    cells = [[name for name in columns]]
    cells += [["-" if row.get(c) is None else format(row[c], spec) for c, spec in columns.items()] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  " + line[0].ljust(width[0]) + "".join(x.rjust(w + 2) for x, w in zip(line[1:], width[1:])))


def flop(B, H, Tq, Tk, Dh, causal=False):
    """Of a forward pass: two products of B H Tq Tk Dh multiplications and additions."""
    return 4 * B * H * Tq * Tk * Dh / (2 if causal else 1)


def ratio(a, b):
    return a / b if a and b else None


def geomean(numbers):
    numbers = [x for x in numbers if x]
    return math.exp(sum(map(math.log, numbers)) / len(numbers)) if numbers else None


# ----------------------------------------------------------------------------------------------------------------------
# What to compare with


def naive(q, k, v, mask=None):
    """What a first implementation does: scores, mask, softmax, weights."""
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


def usual_cos_sin(rotation, dtype):
    """Cosines and sines [B,T,Dh] as other code takes them: in the dtype of q, no sine negated."""
    cos, sin = (x[:, 0] for x in rotation)
    second = sin[..., sin.shape[-1] // 2 :]
    return cos.to(dtype), torch.cat((second, second), dim=-1).to(dtype)


def rotate_half_rope(q, k, cos, sin):
    """RoPE as it is usually written; cos, sin [B,T,Dh]."""
    cos, sin, half = cos[:, None], sin[:, None], q.shape[-1] // 2
    turn = lambda x: x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
    return turn(q), turn(k)


def liger_rope(q, k, positions, cos, sin, sections):
    """Liger-Kernel's RoPE, or its M-RoPE where there are sections; None if it is not installed."""
    try:
        if sections:
            from liger_kernel.transformers.qwen2vl_mrope import liger_multimodal_rotary_pos_emb as liger

            cos, sin = usual_cos_sin(rope_1d(positions.flatten(0, 1), q.shape[-1]), q.dtype)
            cos, sin = (x.unflatten(0, positions.shape[:2]) for x in (cos, sin))  # [3,B,T,Dh], one for each axis
        else:
            from liger_kernel.transformers.rope import liger_rotary_pos_emb as liger
    except ImportError:
        return None
    return lambda: liger(q, k, cos, sin, *([sections] if sections else []))


def sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def compiled(z, f, *inputs):
    """f(*inputs) as torch.compile makes it, for these shapes alone. (A rehearsal leaves it as it is: the CPU would take
    half a minute.)"""
    if z.rehearsal:
        return lambda: f(*inputs)
    torch.compiler.reset()  # after eight shapes of one function it would give up, and run it as it is
    return functools.partial(torch.compile(f, dynamic=False), *inputs)


def held_to(name):
    """`with held_to("flash"):` leaves sdpa one of torch's backends; any other name leaves it the choice."""
    from torch.nn.attention import SDPBackend as B
    from torch.nn.attention import sdpa_kernel

    kinds = dict(flash=B.FLASH_ATTENTION, cudnn=B.CUDNN_ATTENTION, efficient=B.EFFICIENT_ATTENTION)
    return sdpa_kernel(kinds[name]) if name in kinds else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------------------------
# The tables of a GPU. Each returns its rows, as dicts; `aims` at the end reads the figures we are after off them.


def ceilings(z):
    """What this device does at best, now: a large matrix product, a large copy (bytes read and bytes written)."""
    x, y = (torch.randn(z.matrix, z.matrix, device=z.device, dtype=z.dtype) for _ in range(2))
    n = 2**14 if z.rehearsal else 2**29  # 1 GiB, far beyond the cache
    big = torch.empty(n, device=z.device, dtype=torch.bfloat16)
    product, copy = z.clock(lambda: x @ y), z.clock(big.clone)
    return {"TFLOP/s": 2 * z.matrix**3 / product / 1e9, "GB/s": 2 * big.nbytes / copy / 1e6}


def attention_table(z, peak):
    """Forward and backward against everything torch ships, in TFLOP/s."""
    rows, others = [], ("flash", "cudnn", "efficient", "eager", "compiled")
    for Dh, causal, T in [(Dh, causal, T) for Dh in (64, 128) for causal in (False, True) for T in z.lengths]:
        H = max(1, z.width // Dh)
        q, k, v = make(z.tokens // T, H, H, T, T, Dh, z.dtype, z.device)  # all of the tokens, even in a rehearsal
        grad, work = torch.randn_like(q), flop(z.tokens // T, H, T, T, Dh, causal)
        mask = allowed(T, T, causal=True, device=z.device) if causal else None
        runs = {"ours": lambda: attention(q, k, v, causal=causal)}
        runs |= dict.fromkeys(others[:3], lambda: sdpa(q, k, v, is_causal=causal))
        if T <= z.longest_eager:
            runs["eager"] = lambda: naive(q, k, v, mask)
            if T in (z.lengths[0], z.longest_eager):  # compiling takes its time
                runs["compiled"] = compiled(z, naive, q, k, v, mask)
        row = {"attention": f"Dh {Dh} T {T}{' causal' * causal}", "Dh": Dh, "causal": causal, "T": T}
        for name, f in runs.items():
            with held_to(name):
                forward, backward = both_ways(f, (q, k, v), grad, z.clock)
            row |= {f"{name} fwd": ratio(work / 1e9, forward), f"{name} bwd": ratio(2.5 * work / 1e9, backward)}
        row |= {f"{d} of peak": ratio(row[f"ours {d}"], peak) for d in ("fwd", "bwd")}
        row |= {f"{d} / {x}": ratio(row[f"ours {d}"], row.get(f"{x} {d}")) for d in ("fwd", "bwd") for x in others}
        rows.append(row)
    for d in ("fwd", "bwd"):
        columns = {"attention": ""} | {f"{x} {d}": ".0f" for x in ("ours", *others)} | {f"{d} of peak": ".2f"}
        columns |= {f"{d} / {x}": ".2f" for x in others}
        show(f"TFLOP/s, {'forward' if d == 'fwd' else 'backward'}; ratios: ours / theirs", rows, columns)
    return rows


def error_table(z):
    """Largest error against float64, beside that of plain attention in the same dtype."""
    rows = []
    for Dh, causal, T in [(Dh, causal, T) for Dh in (64, 128) for causal in (False, True) for T in z.lengths[:2]]:
        inputs = make(2, 6, 2, T, T, Dh, z.dtype, z.device)
        mask, grad = allowed(T, T, causal=causal, device=z.device), torch.randn_like(inputs[0])

        def results(f, inputs):
            out = f(*inputs)
            return [x.double() for x in (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))]

        def errors(f):
            return [(a - b).abs().max().item() for a, b in zip(results(f, inputs), exact)]

        exact = results(lambda *x: naive(*x, mask), [x.detach().double().requires_grad_() for x in inputs])
        row = {"error": f"Dh {Dh} T {T}{' causal' * causal}"}
        ours, plain = errors(lambda *x: attention(*x, causal=causal)), errors(lambda *x: naive(*x, mask))
        for what, a, b in zip(("o", "dq", "dk", "dv"), ours, plain):
            row |= {what: a, f"plain {what}": b, f"{what}/plain": ratio(a, b)}
        rows.append(row)
    columns = {"error": ""}
    for what in ("o", "dq", "dk", "dv"):
        columns |= {what: ".1e", f"plain {what}": ".1e", f"{what}/plain": ".2f"}
    show("largest error against float64", rows, columns)
    return rows


def mask_table(z):
    """A mask should cost what it leaves, a shared key head nothing."""
    N, P = z.images
    T = z.lengths[-2]
    half = (torch.arange(T, device=z.device) < T // 2).int().expand(z.few(2), T) - 1  # -1: padding
    ids = torch.arange(N, device=z.device).repeat_interleave(P)[None]
    # images of several sizes, as a native-resolution encoder meets them: no border falls on that of a tile
    sizes = [4 * (P * n // 100) for n in (27, 47, 80, 230, 110, 45, 29)]
    mixed = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None].to(z.device)
    # "float32": without matrix instructions our tiles may not pay, and the choice of backend should know.
    # name; shape and rule ("anew": of a fresh tensor, whose lists have to be made); then the base's shape and rule, or
    # None and the lengths of the pieces that SDPA takes one by one
    packed, in_pieces = dict(q_segments=ids, k_segments=ids), dict(q_segments=mixed, k_segments=mixed)
    padded = dict(q_segments=half, k_segments=half)
    cases = [
        ("causal / full", (2, 16, 16, T, T, 128), dict(causal=True), (2, 16, 16, T, T, 128), {}),
        ("packed / batch", (1, 16, 16, N * P, N * P, 80), packed, (N, 16, 16, P, P, 80), {}),
        ("half padding / none", (2, 16, 16, T, T, 128), padded, (2, 16, 16, T, T, 128), {}),
        *((f"packed {Dh} / SDPA one by one", (1, 16, 16, sum(sizes), sum(sizes), Dh), in_pieces, None, sizes)
          for Dh in (80, 72)),
        ("lists made anew / kept", (1, 16, 16, N * P, N * P, 80), "anew", (1, 16, 16, N * P, N * P, 80), packed),
        ("float32 / SDPA", (2, 16, 16, z.lengths[1], z.lengths[1], 64), {}, None, [z.lengths[1]]),
        ("12 heads on 2 / on 12", (1, 12, 2, T, T, 128), dict(causal=True), (1, 12, 12, T, T, 128), dict(causal=True)),
    ]  # fmt: skip
    rows = []
    for name, shape, rule, base_shape, base_rule in cases:
        inputs, row = replace(z, dtype=torch.float32 if "float32" in name else z.dtype).make(*shape), {"mask": name}

        def run(inputs, rule):
            return attention(*inputs, **(dict.fromkeys(packed, ids.clone()) if rule == "anew" else rule))

        grad = torch.randn_like(inputs[0])
        row["case fwd"], row["case bwd"] = both_ways(lambda: run(inputs, rule), inputs, grad, z.clock)
        if base_shape is None:
            f = lambda: torch.cat([sdpa(*part) for part in zip(*(x.split(base_rule, 2) for x in inputs))], 2)
        else:
            inputs, f = z.make(*base_shape), lambda: run(inputs, base_rule)
        row["base fwd"], row["base bwd"] = both_ways(f, inputs, torch.randn_like(inputs[0]), z.clock)
        rows.append(row | {f"speed {d}": ratio(row[f"base {d}"], row[f"case {d}"]) for d in ("fwd", "bwd")})
    columns = {"mask": ""} | {f"{w} {d}": ".3f" for w in ("case", "base") for d in ("fwd", "bwd")}
    show("milliseconds: case and base; speed: base / case", rows, columns | {"speed fwd": ".2f", "speed bwd": ".2f"})
    return rows


def few_queries_table(z, bandwidth):
    """One token against a long cache, and latents that attend to an image: keys are split to fill the GPU. "called":
    with Python's time for so short a call, which a CUDA graph would save."""
    rows, names = [], ("ours", "flash", "cudnn", "efficient", "default")
    kinds = ("", " bwd", " called")
    shapes = [(1, 12, 2, 1, z.keys), (1, 32, 8, 1, z.keys), (8, 32, 8, 1, z.keys)]
    for B, H, K, Tq, Tk in shapes + [(1, 12, 12, *z.cross), (8, 12, 12, *z.cross)]:
        inputs = z.make(B, H, K, Tq, Tk, 128)
        row, grad = {"few queries": f"B {B} heads {H}/{K} {Tq} x {Tk}"}, torch.randn_like(inputs[0])
        called = one_call_ms if z.rehearsal else called_ms
        for name in names:
            f = attention if name == "ours" else sdpa
            with held_to(name):
                row[name], row[f"{name} bwd"] = both_ways(lambda: f(*inputs), inputs, grad, z.clock)
                with torch.no_grad():
                    row[f"{name} called"] = attempt(lambda: called(lambda: f(*inputs)))
        row["GB/s"] = ratio(2 * inputs[1].nbytes / 1e6, row["ours"])
        row |= {"of copy": ratio(row["GB/s"], bandwidth)}
        rows.append(row | {f"default / ours{kind}": ratio(row[f"default{kind}"], row[f"ours{kind}"]) for kind in kinds})
    for kind, title in zip(kinds, ("forward", "backward", "forward, call after call")):
        columns = {"few queries": ""} | {f"{name}{kind}": ".4f" for name in names} | {f"default / ours{kind}": ".2f"}
        show(f"milliseconds, {title}", rows, columns | ({} if kind else {"GB/s": ".0f", "of copy": ".2f"}))
    return rows


def rope_table(z, bandwidth):
    """RoPE, 1D, 2D and M-RoPE, q and k in one launch, against eager, compiled and Liger; GB/s."""
    rows, names = [], ("ours", "eager", "compiled", "liger", "cosines for free")
    lengths = z.lengths if z.rehearsal else [T for T in z.lengths if T in (1024, 8192, 16384)]
    heads = ("1D", 32, 8, 128), ("2D", 16, 16, 80), ("M", 12, 2, 128)
    for (kind, H, K, Dh), T in product(heads, lengths):
        q, k, _ = z.make(1, H, K, T, T, Dh)
        # as projections leave them, with heads innermost but one: Liger's would copy any other layout
        q, k = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k))
        p, sections = torch.arange(T, device=z.device).expand(3, 1, T), [16, 24, 24] if kind == "M" else None
        if kind == "1D":
            rotation = rope_1d(p[0], Dh)
        elif kind == "2D":
            rotation = rope_2d(p[:2], Dh)
        else:
            rotation = mrope(p, Dh, sections)
        usual, one_row = usual_cos_sin(rotation, q.dtype), [x[:, :, :1].expand_as(x) for x in rotation]
        runs = {"ours": lambda: apply_rope(q, k, rotation), "eager": lambda: rotate_half_rope(q, k, *usual)}
        # the cosines of one token for all: wrong, but the most that could be gained by reading less of them
        runs["cosines for free"] = lambda: apply_rope(q, k, one_row)
        runs["compiled"] = compiled(z, rotate_half_rope, q, k, *usual)
        if kind != "2D" and (f := liger_rope(q, k, p, *usual, sections)):
            runs["liger"] = f
        row = {"RoPE": f"{kind} heads {H}+{K} of {Dh}, T {T}", "T": T}
        moved = 2 * (q.nbytes + k.nbytes) / 1e6
        for name, f in runs.items():
            times = both_ways(f, (q, k), (torch.randn_like(q), torch.randn_like(k)), z.clock)
            row |= {f"{name} {d}": ratio(moved, ms) for d, ms in zip(("fwd", "bwd"), times)}
        row |= {f"{d} of copy": ratio(row[f"ours {d}"], bandwidth) for d in ("fwd", "bwd")}
        row |= {f"{d} / {x}": ratio(row[f"ours {d}"], row.get(f"{x} {d}")) for d in ("fwd", "bwd") for x in names[1:4]}
        rows.append(row)
    for d in ("fwd", "bwd"):
        columns = {"RoPE": ""} | {f"{x} {d}": ".0f" for x in names} | {f"{d} of copy": ".2f"}
        columns |= {f"{d} / {x}": ".2f" for x in names[1:4]}
        show(f"GB/s, {'forward' if d == 'fwd' else 'backward'}; ratios: ours / theirs", rows, columns)
    return rows


def aims(tables):
    """The figures we are after, read off the tables -> rows of name, aim, measured."""
    points, masks = tables["attention"], {r["mask"]: r for r in tables["masks"]}
    at = lambda column, rows=points: [r[column] for r in rows if r.get(column)]
    least, most = lambda x: min(x, default=None), lambda x: max(x, default=None)
    ropes, few = tables["rope"], tables["few queries"]
    both = lambda column, rows=ropes: at(f"fwd {column}", rows) + at(f"bwd {column}", rows)
    long = [r for r in ropes if r["T"] >= 8192]
    worst = {x: max(r[f"{x}/plain"] for r in tables["error"]) for x in ("o", "dq", "dk", "dv")}
    rows = [
        ("forward / flash, every point", 1.0, least(at("fwd / flash"))),
        ("forward / flash, geometric mean", 1.15, geomean(at("fwd / flash"))),
        ("forward / cuDNN, geometric mean", 0.75, geomean(at("fwd / cudnn"))),
        ("forward, best point, TFLOP/s", 450, most(at("ours fwd"))),
        ("backward / flash, geometric mean", 0.9, geomean(at("bwd / flash"))),
        ("causal against full", 1.7, masks["causal / full"]["speed fwd"]),
        ("packed images against a batch", 0.85, masks["packed / batch"]["speed fwd"]),
        ("half padding against none", 1 / 0.6, masks["half padding / none"]["speed fwd"]),
        ("packed, width 80, against SDPA", 0.9, masks["packed 80 / SDPA one by one"]["speed fwd"]),
        ("packed, width 72, against SDPA", 0.9, masks["packed 72 / SDPA one by one"]["speed fwd"]),
        ("grouped heads, forward", 0.95, masks["12 heads on 2 / on 12"]["speed fwd"]),
        ("grouped heads, backward", 0.95, masks["12 heads on 2 / on 12"]["speed bwd"]),
        ("few queries / SDPA, every row", 1.0, least(at("default / ours", few))),
        ("few queries / SDPA, every row, Python included", 1.0, least(at("default / ours called", few))),
        ("RoPE of the copy bandwidth, 8k and more", 0.8, least(both("of copy", long))),
        ("RoPE / eager, every row", 1.0, least(both("/ eager"))),
        ("RoPE / compiled, geometric mean", 1.0, geomean(both("/ compiled"))),
        ("RoPE / Liger, geometric mean", 1.0, geomean(both("/ liger"))),
        ("- error / plain, output (at most 2)", -2.0, -worst["o"]),
        ("- error / plain, gradients (at most 3)", -3.0, -max(worst["dq"], worst["dk"], worst["dv"])),
    ]  # fmt: skip
    verdict = lambda aim, x: "-" if x is None else "holds" if x >= aim else "MISSED"
    rows = [{"aim": name, "at least": aim, "measured": x, "": verdict(aim, x)} for name, aim, x in rows]
    show("what we are after", rows, {"aim": "", "at least": ".2f", "measured": ".2f", "": ""})
    return rows


def bench_gpu(z):
    top = ceilings(z)
    about = versions() | (card() if z.device == "cuda" else {"device": "a rehearsal: THE FIGURES MEAN NOTHING"})
    print(", ".join(f"{name} {value}" for name, value in about.items()) + f"; {z.dtype}, medians")
    print(f"ceilings measured now: matrix product {top['TFLOP/s']:.0f} TFLOP/s, copy {top['GB/s']:.0f} GB/s")
    tables = {"blocks": block_table(z.device), "error": error_table(z), "attention": attention_table(z, top["TFLOP/s"])}
    tables |= {"masks": mask_table(z), "few queries": few_queries_table(z, top["GB/s"])}
    tables |= {"rope": rope_table(z, top["GB/s"])}
    left_out = [] if any("liger fwd" in r for r in tables["rope"]) else ["Liger-Kernel"]
    left_out += ["torch.compile"] if z.rehearsal else []
    tables["aims"] = aims(tables)
    print(f"\nleft out: {', '.join(left_out) or 'nothing'}")
    return about | {"ceilings": top, "sizes": {k: str(v) for k, v in asdict(z).items()}} | tables


def versions():
    about = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    with contextlib.suppress(ImportError):
        import triton

        about |= {"triton": triton.__version__, "ptxas": assembler_version(90)}
    return about


def card():
    """The GPU, and what its driver says of it."""
    about = {"device": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
    asked = "driver_version", "clocks.sm", "clocks.max.sm", "power.limit"
    gpu = torch.cuda.get_device_properties().uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "-i", f"GPU-{gpu}"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        about |= zip(asked, said.strip().split(", "))
    return about


def bench_tiles(z):
    """Other tile sizes beside those of CONFIGS, in TFLOP/s: what is faster here and passes the tests belongs there."""
    from . import attention_triton as kernels

    choices = {  # direction -> tiles
        "forward": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3),
                    (64, 128, 4, 3), (64, 64, 4, 3)],
        "short": [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 3)],
        "decode": [(16, 64, 4, 3), (16, 64, 4, 2), (16, 64, 4, 4), (16, 32, 4, 4), (16, 128, 4, 2), (16, 64, 2, 3)],
        "dkdv": [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 4, 3), (64, 64, 8, 3), (32, 64, 4, 3)],
        "dq": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3)],
    }  # fmt: skip
    rows, usual = [], dict(kernels.CONFIGS)
    for Dh, direction in [(Dh, direction) for Dh in (64, 128) for direction in choices]:
        H, backwards = z.width // Dh, direction in ("dkdv", "dq")
        points = product((z.lengths[0], z.longest_eager), (False, True))
        points = {f"{T}{' causal' * causal}": (z.tokens // T, H, H, T, T) for T, causal in points}
        few = {"short": (1, z.few(H), z.few(H), *z.cross), "decode": (1, H, max(1, H // 4), 1, z.keys)}
        points = {"few queries": few[direction]} if direction in few else points
        for tiles in choices[direction]:
            in_use = tiles == usual[direction, Dh][direction == "decode"]
            row = {"kernel": direction, "Dh": Dh, "tiles": str(tiles), "in use": "*" if in_use else ""}
            kernels.CONFIGS[direction, Dh] = tiles, tiles
            for point, shape in points.items():
                inputs, causal = make(*shape, Dh, z.dtype, z.device), "causal" in point
                f, work = lambda: attention(*inputs, causal=causal), flop(shape[0], shape[1], *shape[3:], Dh, causal)
                if backwards:  # timed whole: its other kernels are the same in every row
                    row[point] = ratio(2.5 * work / 1e9, both_ways(f, inputs, torch.randn_like(inputs[0]), z.clock)[1])
                else:
                    with torch.no_grad():
                        row[point] = ratio(work / 1e9, attempt(lambda: z.clock(f)))
            rows.append(row)
            kernels.CONFIGS.update(usual)
    about = {"kernel": "", "Dh": "", "tiles": "", "in use": ""}
    points = {key: ".1f" for row in rows for key in row if key not in about}
    show("TFLOP/s of the forward pass, or of the backward pass with this tile in one of its kernels, by length;\n"
         f"few queries: {z.cross[0]} x {z.cross[1]} in short, 1 x {z.keys} in decode; * in use", rows,
         about | points)  # fmt: skip
    return {"tiles": rows} | versions() | (card() if z.device == "cuda" else {})


# ----------------------------------------------------------------------------------------------------------------------
# Counted, not timed: the blocks that a mask leaves


def block_table(device):
    """How many key blocks the query tiles visit, counted by the kernels' own planning, and the pairs a mask leaves."""
    from .attention_blocks import Mask
    from .attention_triton import CONFIGS

    T, rows, (BM, BN, *_) = 2048, [], CONFIGS["forward", 128][0]
    t, third = torch.arange(T)[None], T // 3
    cases = {
        "everything": {},
        "causal": dict(causal=True),
        "causal, prefix of a third": dict(causal=True, prefix=torch.tensor([third])),
        "half padding": dict(q_segments=(t < T // 2).int() - 1, k_segments=(t < T // 2).int() - 1),
        "8 images of equal size": dict(q_segments=t * 8 // T, k_segments=t * 8 // T),
        "7 images, not on block borders": dict(q_segments=t * 7 // T, k_segments=t * 7 // T),
        "64 images": dict(q_segments=t * 64 // T, k_segments=t * 64 // T),
    }
    for name, rule in cases.items():
        pairs = allowed(T, T, **rule).float().mean().item()
        rule = {key: x.to(device) if torch.is_tensor(x) else x for key, x in rule.items()}
        # ids of zeros stand for none: the lists then hold what _key_blocks says
        zeros = torch.zeros(1, T, dtype=torch.int32, device=device)
        rule = dict(causal=False, prefix=None, q_segments=zeros, k_segments=None) | rule
        count = Mask(rule, 1, T, T, torch.device(device)).plan(BM, BN, False)[1].sum((0, 1)).tolist()
        whole, masked = count[0], count[1] - count[0]
        total = (T // BM) * (T // BN)
        row = {"mask": name, "pairs": pairs, "visited": (whole + masked) / total}
        rows.append(row | {"open": whole, "masked": masked, "of": total})
    show(f"blocks of {BM} x {BN} that the forward pass visits, {T} x {T}; pairs and visited: fractions of all", rows,
         {"mask": "", "pairs": ".3f", "visited": ".3f", "open": "", "masked": "", "of": ""})  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Without CUDA


def bench_cpu():
    images = torch.arange(512)[None] // 128  # four images of 128 patches in one row
    cases = [  # name, shape (B, H, K, Tq, Tk, Dh), rule
        ("CLIP text, causal", (8, 8, 8, 77, 77, 64), dict(causal=True)),
        ("ViT-B/16 image", (1, 12, 12, 197, 197, 64), {}),
        ("4 packed images", (1, 8, 8, 512, 512, 64), dict(q_segments=images, k_segments=images)),
        ("prefill, grouped", (1, 14, 2, 256, 256, 64), dict(causal=True)),
        ("one token, grouped", (1, 14, 2, 1, 1024, 64), dict(causal=True)),
    ]
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    about = versions() | {"device": f"cpu, {torch.get_num_threads()} threads"}
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "; float32, medians")
    rows = []
    for name, shape, rule in cases:
        q, k, v = make(*shape, torch.float32, "cpu")
        grad, mask = torch.randn_like(q), allowed(*shape[3:5], **rule)[:, None] if rule else None
        row = {"attention": name}
        for which in ("naive", "reference", "torch"):
            f = lambda: naive(q, k, v, mask) if which == "naive" else attention(q, k, v, **rule)
            with backend("auto" if which == "naive" else which):
                row[f"{which} fwd"], row[f"{which} bwd"] = both_ways(f, (q, k, v), grad, median_ms)
        rows.append(row | {"naive/torch": row["naive fwd"] / row["torch fwd"]})
    columns = {"attention": ""} | {f"{w} {d}": ".3f" for w in ("naive", "reference", "torch") for d in ("fwd", "bwd")}
    show("milliseconds", rows, columns | {"naive/torch": ".1f"})

    ropes = []
    for shape in ((1, 14, 2, 1, 1, 64), (2, 14, 2, 256, 256, 64)):
        q, k, _ = make(*shape, torch.float32, "cpu")
        rotation = rope_1d(torch.arange(shape[3]).expand(shape[0], -1), shape[-1])
        cos, sin = usual_cos_sin(rotation, q.dtype)
        with torch.no_grad():
            ours = median_ms(lambda: apply_rope(q, k, rotation))
            usual = median_ms(lambda: rotate_half_rope(q, k, cos, sin))
        ropes.append({"RoPE": f"{[*q.shape]} + {[*k.shape]}", "usual": usual, "ours": ours, "usual/ours": usual / ours})
    show("milliseconds, forward", ropes, {"RoPE": "", "usual": ".4f", "ours": ".4f", "usual/ours": ".1f"})
    results = about | {"attention": rows, "rope": ropes}
    if _triton_installed():
        results["blocks"] = block_table("cpu")
    print("\nleft out, since this needs a CUDA GPU: the times of the Triton kernels and of what they are compared with,"
          "\nSDPA's flash, cuDNN and efficient backends, eager, torch.compile and Liger-Kernel"
          "\n(--compile shows registers and spills without a GPU)")  # fmt: skip
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Compiling without a GPU

ARCHS = {80: 163, 90: 227, 100: 227}  # compute capability -> KB of shared memory that one block may use
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Directions of CONFIGS, all of which multiply matrices; then those whose sums come in shares
MATRIX = {"forward": "_forward_kernel", "short": "_forward_kernel", "decode": "_forward_kernel", "dkdv": "_dkdv_kernel",
          "dq": "_dq_kernel", "dq short": "_dq_kernel"}  # fmt: skip
SPLIT = {"forward parts": "_forward_kernel", "short parts": "_forward_kernel", "dkdv heads": "_dkdv_kernel"}
OTHERS = {"combine": "_combine_kernel", "delta": "_delta_kernel", "ranges": "_ranges_kernel", "plan": "_plan_kernel",
          "rope": "_rope_kernel"}  # fmt: skip
MASKS = ("none", "causal", "segments", "all")
INTS = ("Q_SEG", "K_SEG", "PREFIX_LEN", "INDEX", "COUNT", "SEG", "RANGES", "ROWS", "COLS")
FLOATS = ("LSE", "DELTA", "COS", "SIN", "PART", "PART_LSE")
# Tensors fetched in tiles of so many rows
TILED = dict(Q="BM", O="BM", DO="BM", DQ="BM", K="BN", V="BN", DK="BN", DV="BN")


def compile_jobs(quick=False):
    """direction, sm, head width, dtype, mask, by descriptors?, query heads per key head."""
    tma = lambda d, arch: arch >= 90 and d != "decode"
    if quick:  # every tile size once on every generation, under one rule
        one, cases = lambda arch: "causal" if arch == 90 else "segments", product(ARCHS, (64, 128, 256), MATRIX)
        jobs = [(d, arch, Dh, "bf16", one(arch), tma(d, arch), 1) for arch, Dh, d in cases]
        jobs += [(d, 90, Dh, "fp16", "none", True, 6) for Dh in (64, 128) for d in ("forward", "dkdv", "dq")]
        jobs += [(d, arch, Dh, "bf16", "segments", tma(d, arch), 6) for arch, Dh, d in product(ARCHS, (64, 128), SPLIT)]
        return jobs + [(d, arch, 128, "bf16", "all", False, 1) for arch in ARCHS for d in OTHERS]
    cases = product(ARCHS, (64, 128, 256), MATRIX, MASKS)
    jobs = [(d, arch, Dh, "bf16", mask, tma(d, arch), 1) for arch, Dh, d, mask in cases]
    cases = product((90, 100), (64, 128, 256), MATRIX)  # rows that are no multiples of 16 bytes take pointers there too
    jobs += [(d, arch, Dh, "bf16", "causal", False, 1) for arch, Dh, d in cases if d != "decode"]
    for arch, d in product(ARCHS, ("forward", "dkdv", "dq")):
        jobs += [(d, arch, Dh, "bf16", mask, tma(d, arch), 6) for Dh, mask in product((64, 128), ("none", "causal"))]
        widths = 16, 32, 72, 80, 88
        jobs += [(d, arch, Dh, "bf16", mask, tma(d, arch), 1) for Dh, mask in product(widths, ("none", "segments"))]
        jobs += [(d, arch, Dh, "fp16", "causal", tma(d, arch), 1) for Dh in (64, 128)]
    cases = product(ARCHS, (64, 128), SPLIT, MASKS[:3])
    jobs += [(d, arch, Dh, "bf16", mask, tma(d, arch), 6) for arch, Dh, d, mask in cases]
    cases = product((64, 128), ("none", "causal"), ("forward", "dkdv", "dq"))
    jobs += [(d, 90, Dh, "fp32", mask, False, 1) for Dh, mask, d in cases]
    return jobs + [(d, arch, 128, "bf16", "all", False, 1) for arch in ARCHS for d in OTHERS]


def describe(kernel, dtype, constants, by_descriptor, in_full):
    """Types of a kernel's arguments, and which of them the launcher would find divisible by 16."""
    signature, aligned = {}, {}
    for n, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale", "sign"):
            signature[name] = "fp32"
        elif by_descriptor and name in TILED:
            kind = "fp32" if name in in_full else dtype
            signature[name] = f"tensordesc<{kind}[1, 1, {constants[TILED[name]]}, {constants['BD']}]>"
        elif name.isupper() and name not in ("G", "OWN", "H", "N", "T"):
            signature[name] = "*i32" if name in INTS else "*fp32" if name in (*FLOATS, *in_full) else f"*{dtype}"
            aligned[(n,)] = [["tt.divisibility", 16]]
        elif name.startswith("s"):  # strides of batch, head and row; cosines have no heads
            axes = 2 if name == "sc" else 3
            signature[name] = ("i32",) * axes
            aligned |= {(n, axis): [["tt.divisibility", 16]] for axis in range(axes)}
        else:
            signature[name] = "i32"
    return signature, aligned


def compile_kernel(job):
    """-> tile sizes, what Triton made."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import attention_blocks, attention_triton, rope_triton

    direction, arch, Dh, dtype, mask, by_descriptor, group = job
    BD = triton.next_power_of_2(Dh)
    first, *_ = direction.split()
    module = {"rope": rope_triton, "ranges": attention_blocks, "plan": attention_blocks}.get(first, attention_triton)
    kernel = getattr(module, (MATRIX | SPLIT | OTHERS)[direction])
    queries = {"short": 64, "short parts": 64, "dq short": 64, "decode": 16}.get(direction, 4096)
    family = first if first in ("dkdv", "dq") else "forward"
    BM, BN, warps, stages = attention_triton.config(family, BD, DTYPES[dtype], queries, by_descriptor)
    constants = dict(CAUSAL=mask in ("causal", "all"), PREFIX=mask == "all", SEGMENTS=mask in ("segments", "all"))
    constants |= dict(RAGGED=True, DH=Dh, BD=BD, BM=BM, BN=BN, OF_KEYS=False, CHUNK=128, BLOCK=BN)
    constants |= dict(HALF=Dh // 2, BH=BD // 2, BT=rope_triton.BT, HEADS=rope_triton.HEADS)
    constants |= dict(PARTS=16 if direction in ("decode", "combine", "forward parts", "short parts") else 1)
    constants |= dict(PREFIX_LEN=None) if mask != "all" else {}
    constants |= dict.fromkeys(("Q_SEG", "K_SEG", "INDEX", "COUNT")) if mask in ("none", "causal") else {}
    constants |= dict(G=1) if group == 1 else {}  # Triton compiles an argument that is 1 as a constant
    constants |= dict(OWN=1) if group == 1 or direction == "dkdv heads" else {}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    in_full = ("O",) if constants.get("PARTS", 1) > 1 else ()  # parts are kept in float32
    if direction in OTHERS:
        BM, BN, warps, stages = None, None, 1 if direction in ("ranges", "plan") else 4, 1
    signature, aligned = describe(kernel, dtype, constants, by_descriptor, in_full)
    source, target = ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", arch, 32)
    options = dict(num_warps=warps, num_stages=stages)
    return (BM, BN, warps, stages), triton.compile(source, target=target, options=options)


def compile_one(job):
    """One kernel for one GPU -> what the assembler says about it."""
    direction, arch, Dh, dtype, mask, by_descriptor, group = job
    row = dict(kernel=direction, sm=arch, Dh=Dh, dtype=dtype, mask=mask, tiles="TMA" if by_descriptor else "", G=group)
    try:
        sizes, compiled = compile_kernel(job)
        row |= dict(zip(("BM", "BN", "warps", "stages"), sizes))
        ptx = compiled.asm["ptx"]
        log = assembler_log(ptx, arch)
    except Exception as error:  # a worker reports, the table shows it
        return row | {"note": f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"}
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    row |= {"registers": int(re.search(r"Used (\d+) registers", log)[1]), "spill": int(spill[1]) + int(spill[2])}
    row["shared KB"] = compiled.metadata.shared / 1024
    kinds = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
    row["matrix unit"] = next((k for k in kinds if re.search(rf"{re.escape(k)}[.\s]", ptx)), "none")
    row["note"] = "wgmma serialized" if "serialized" in log else ""
    return row


def assembler(arch):
    """The ptxas that comes with Triton."""
    import triton

    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    newer = os.path.join(folder, "ptxas-blackwell")
    return newer if arch >= 100 and os.path.exists(newer) else os.path.join(folder, "ptxas")


def assembler_version(arch):
    with contextlib.suppress(OSError):
        said = subprocess.run([assembler(arch), "--version"], capture_output=True, text=True).stdout
        if found := re.search(r"V(\d+\.\d+\.\d+)", said):
            return found[1]


def assembler_log(ptx, arch):
    """What ptxas -v says."""
    with tempfile.TemporaryDirectory() as tmp:
        with open(os.path.join(tmp, "kernel.ptx"), "w") as f:
            f.write(ptx)
        gpu = re.search(r"\.target (\w+)", ptx)[1]
        command = [assembler(arch), "-v", f"--gpu-name={gpu}", "kernel.ptx", "-o", "kernel.cubin"]
        return subprocess.run(command, cwd=tmp, capture_output=True, text=True, check=True).stderr


def complaint(row):
    """What is not as it should be -> text, empty if all is well."""
    if "spill" not in row:
        return row["note"]
    wanted = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[row["sm"]]
    small = row["Dh"] == 256 and row["tiles"] != "TMA" and row["sm"] > 80
    if (row["kernel"] == "decode" or small) and row["matrix unit"] != "none":
        wanted = row["matrix unit"]  # any will do: the tiles have 16 or 32 rows, and a warp group's units take 64
    rare = row["mask"] == "all" or row["Dh"] == 256  # every kind of rule at once, or a width no model here has
    multiplies = row["kernel"] in MATRIX | SPLIT and row["dtype"] != "fp32"
    return "; ".join(text for text, wrong in (
        ("too much shared memory", row["shared KB"] > ARCHS[row["sm"]]),
        (row["note"], row["note"]),
        ("not on the matrix units", multiplies and row["matrix unit"] != wanted),
        ("spills", row["spill"] > 16 and not rare),
    ) if wrong)  # fmt: skip


def compile_all(jobs):
    import triton

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        rows = list(pool.map(compile_one, jobs, chunksize=4))
    rows = [row | {"wrong": complaint(row)} for row in rows]
    columns = "kernel", "sm", "Dh", "dtype", "mask", "G", "tiles", "BM", "BN", "warps", "stages", "registers", "spill"
    columns = dict.fromkeys(columns, "")
    columns |= {"shared KB": ".0f", "matrix unit": "", "wrong": ""}
    show("spill: bytes stored and loaded by one thread; G: query heads per key head", rows, columns)
    bad = [r for r in rows if r["wrong"]]
    print(f"\n{len(rows)} kernels, Triton {triton.__version__}, {time.perf_counter() - start:.0f} s; required: matrix "
          "units of the generation (mma for tiles of 16 or 32 rows), none serialized,\n"
          f"shared memory within {ARCHS}, no spills of more than 16 bytes (unless all rules meet, or at width 256): "
          f"{f'FAILED by {len(bad)}' if bad else 'holds'}")  # fmt: skip
    return versions() | {"kernels": rows}, not bad


# ----------------------------------------------------------------------------------------------------------------------
# A picture


def plot(results, path):
    """Forward and backward, TFLOP/s over T, one panel for each head width with and without causal."""
    from PIL import Image, ImageDraw

    colours = dict(ours="#d62728", flash="#1f77b4", cudnn="#2ca02c", efficient="#9467bd")
    colours |= dict(eager="#7f7f7f", compiled="#ff7f0e")
    W, H, pad, points = 380, 240, 44, results["attention"]
    panels = [(d, Dh, causal) for d in ("fwd", "bwd") for Dh in (64, 128) for causal in (False, True)]
    picture = Image.new("RGB", (4 * W, 2 * H + 30), "white")
    draw = ImageDraw.Draw(picture)
    about = ", ".join(f"{k} {results[k]}" for k in ("device", "date", "torch", "triton") if k in results)
    draw.text((8, 2 * H + 10), about, fill="black")
    for n, (d, Dh, causal) in enumerate(panels):
        left, top = n % 4 * W + pad, n // 4 * H + 30
        rows = [r for r in points if r["Dh"] == Dh and r["causal"] == causal]
        most = max((r[f"{name} {d}"] or 0 for r in rows for name in colours if r.get(f"{name} {d}")), default=1)
        x = lambda i: left + i * (W - pad - 16) / max(1, len(rows) - 1)
        y = lambda value: top + (H - 60) * (1 - value / most)
        title = f"{'forward' if d == 'fwd' else 'backward'}, Dh {Dh}{', causal' * causal}: TFLOP/s over T"
        draw.text((left, top - 22), title, fill="black")
        for part in (0, 0.5, 1):
            draw.line((left, y(part * most), left + W - pad - 16, y(part * most)), fill="#dddddd")
            draw.text((left - 36, y(part * most) - 6), f"{part * most:.3g}", fill="black")
        for i, row in enumerate(rows):
            T = f"{row['T'] // 1024}k" if row["T"] >= 1024 else str(row["T"])
            draw.text((x(i) - 8, top + H - 54), T, fill="black")
        for m, (name, colour) in enumerate(colours.items()):
            line = [(x(i), y(r[f"{name} {d}"])) for i, r in enumerate(rows) if r.get(f"{name} {d}")]
            draw.line(line, fill=colour, width=3 if name == "ours" else 1)
            if n == 0:
                draw.text((W * 2 + m * 90, 2 * H + 10), name, fill=colour)
    picture.save(path)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main():
    raw = argparse.RawTextHelpFormatter
    parser = OneLineParser("python -m kernels.bench", description=__doc__, formatter_class=raw)
    parser.add_argument("--compile", nargs="?", const="full", choices=("full", "quick"),
                        help="compile for sm_80, sm_90, sm_100 instead of timing; exit 1 if a kernel spills more than\n"
                        "16 bytes (width 256 and all rules at once excepted), needs too much shared memory or\n"
                        "misses the matrix units; quick: each configuration under one rule")  # fmt: skip
    parser.add_argument("--tiles", action="store_true", help="time other tile sizes (needs a GPU, or --rehearse)")
    parser.add_argument("--rehearse", action="store_true", help="a GPU's tables on the CPU, at toy sizes: no figures")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--plot", metavar="FILE", help="also draw the attention table (a GPU's) to FILE, a PNG")
    args = parser.parse_args()
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        folder = os.path.dirname(os.path.abspath(path or "."))
        if path and not os.path.isdir(folder):
            parser.error(f"{option}: there is no folder {folder}")
        if path and (os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK)):
            parser.error(f"{option}: cannot write to {path}")
    if args.plot and not args.plot.lower().endswith(".png"):
        parser.error(f"--plot draws a PNG, not {args.plot}")
    if (args.compile or args.rehearse or args.tiles) and not _triton_installed():
        parser.error("this needs Triton: pip install triton (there are wheels for Linux)")
    on_gpu = torch.cuda.is_available() and not args.rehearse
    if args.plot and (args.compile or args.tiles or not (on_gpu or args.rehearse)):
        parser.error("--plot draws the attention table of a GPU (or of --rehearse)")
    ok = True
    if args.compile:
        if os.environ.get("TRITON_INTERPRET") == "1":
            parser.error("--compile: unset TRITON_INTERPRET, under which nothing is compiled")
        results, ok = compile_all(compile_jobs(args.compile == "quick"))
    elif args.tiles or args.rehearse:
        if not (on_gpu or args.rehearse):
            parser.error("--tiles needs a CUDA GPU (--rehearse shows that it runs)")
        if args.rehearse:
            os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
        with backend("triton"):
            results = (bench_tiles if args.tiles else bench_gpu)(TOY if args.rehearse else Sizes())
    else:
        results = bench_gpu(Sizes()) if on_gpu else bench_cpu()
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results, f, indent=1)
    if args.plot:
        plot(results, args.plot)
    sys.exit(not ok)


if __name__ == "__main__":
    main()
