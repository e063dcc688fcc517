"""The kernels in figures: six tables, or what the compiler says.

    python -m kernels.bench                 the tables; on a CPU the same program at small sizes, in a minute or two
    python -m kernels.bench --json FILE     the same, and all of it as data in FILE
    python -m kernels.bench --compile       compile every configuration for three generations of GPUs; needs Triton
                                            (Linux), but no GPU

    1 attention     TFLOP/s by length. A forward pass counts 4 B H Tq Tk Dh operations (half of them if causal) and a
                    backward pass 2.5 times as many, as in the FlashAttention papers.
    2 masks         Milliseconds of a masked call and of the call beside it. Their quotient should come near the last
                    column, the quotient of the pairs (query, key) that the two leave. What a Rule keeps for all
                    layers of a model is there before the timing starts.
    3 few queries   Microseconds: one new token against a long cache, 64 latents against an image. "called": with
                    Python's part, which counts where such short calls follow each other.
    4 RoPE          GB/s: q and k, read once and written once, divided by the time (cosines and sines are not counted),
                    beside the copy of a large tensor. On a CPU, tensors that fit its cache are faster than that.
    5 errors        The largest error against float64 of the output and of each gradient, and that error divided by the
                    one of attention written down in the same precision.
    6 blocks        Blocks of scores that the forward pass visits (attention_blocks.walks), beside the pairs that the
                    mask leaves. Nothing is timed.
    --compile       Registers and spilled bytes (stored and loaded) of a thread, shared memory of a program, the matrix
                    instruction. One line for each configuration, all under one mask, that of a padded causal batch.

Times are medians. On a GPU triton.testing.do_bench clears the cache before each call; Python prepares the call
meanwhile, and its part shows only where it takes longer than that, about 0.1 ms. On a CPU and in the columns "called"
torch.utils.benchmark.Timer makes one call after the other. A backward pass is timed alone: torch.autograd.grad for q, k
and v (RoPE: q and k), of a graph that is kept. What is compared has tensors of the same layout (that of projections,
[B,T,H,Dh] in memory), the same mask and a gradient of the same kind. A dash: it could not be run, and stderr says why.

What would bring back what was left out of the kernels, since nobody had measured that it pays: tiles by descriptor
(TMA), if they are 8 % faster at width 128, the geometric mean of table 1's two longest lengths in both passes; a split
of the keys, if torch answers one token against 8k keys more than twice as fast as triton; lists of blocks in the place
of walks, if 7 images in a row of 16k take 10 % more than a batch of them.

    triton          this folder's kernels, timed on a GPU only; on a CPU `torch` takes their place
    torch           the torch backend, where torch chooses how
    reference       the reference backend, in float32
    flash, cudnn    scaled_dot_product_attention, held to that backend
    eager, compile  the steps written down in the precision of q, as they are and through torch.compile
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from itertools import product
from types import SimpleNamespace
from unittest import mock

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from . import Rule, apply_rope, attention, backend, rope_1d
from .attention import _triton_installed

ON_GPU = torch.cuda.is_available() and _triton_installed()
DEVICE = "cuda" if ON_GPU else "cpu"
OURS = "triton" if ON_GPU else "torch"  # the backend that is timed
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
LLAMA, QWEN_VIT, QWEN = (32, 8, 128), (16, 16, 80), (12, 2, 128)  # H, K, Dh: LLaMA-3-8B, the two parts of Qwen2-VL-2B

# ----------------------------------------------------------------------------------------------------------------------
# Measuring and printing


def milliseconds(f, called=False):
    """Of one call of f; called=True: with Python's part."""
    if ON_GPU and not called:
        from triton.testing import do_bench

        return do_bench(f, return_mode="median")
    timer = Timer("f()", globals=dict(f=f), num_threads=torch.get_num_threads())
    return timer.blocked_autorange().median * 1e3


print_once = functools.cache(print)  # it does nothing when it is called with the same text again


def attempt(f):
    """f(), or None: where a backend refuses, memory runs out or a compiler is missing, the tables go on."""
    try:
        return f()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:110]
        print_once(f"  left out: {type(error).__name__}: {reason}", file=sys.stderr)


def both_ways(f, inputs, grad):
    """Milliseconds of a forward pass without gradients, and of the backward pass alone."""
    with torch.no_grad():
        forward = attempt(lambda: milliseconds(f))
    backward = lambda out: milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    return forward, forward and attempt(lambda: backward(f()))


def ratio(a, b):
    return a / b if a and b else None


def rates(row, times, work):
    """times: name -> (forward, backward); work likewise -> two rows: work / time, and ours divided by the others'."""
    rows = []
    for n, name in enumerate(("forward", "backward")):
        found = {x: ratio(work[n], ms[n]) for x, ms in times.items()}
        rows.append(row | {"pass": name} | found | {f"/{x}": ratio(found[OURS], found[x]) for x in found if x != OURS})
    return rows


def show(title, rows):
    """Print rows, dicts with the same keys -> rows."""
    text = lambda x: "-" if x is None else f"{x:.3g}" if isinstance(x, float) and x < 999.5 else f"{x:.0f}"
    cells = [[*rows[0]]] + [[x if isinstance(x, str) else text(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for line in cells:
        words = zip(line, widths, rows[0].values())
        print("  " + "  ".join(x.ljust(n) if isinstance(first, str) else x.rjust(n) for x, n, first in words).rstrip())
    sys.stdout.flush()
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# What is compared


def make(B, H, K, Tq, Tk, Dh, dtype):
    """Random q, k, v in the memory order of projections."""
    shapes = (B, Tq, H, Dh), (B, Tk, K, Dh), (B, Tk, K, Dh)
    return [torch.randn(s, dtype=dtype, device=DEVICE).transpose(1, 2).requires_grad_() for s in shapes]


def flop(B, H, Tq, Tk, Dh, causal=False):
    """Of a forward pass, two products. (torch's FlopCounterMode does not see into a Triton kernel.)"""
    return 4 * B * H * Tq * Tk * Dh / (2 if causal else 1)


def eager(q, k, v, mask=None):
    """Scores, mask, softmax, weights."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


def sdpa(q, k, v, causal=False):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def held_to(name):
    """A context in which attention and sdpa take the backend of that name."""
    kinds = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(kinds[name]) if name in kinds else backend(name)


def rotate_half(q, k, cos, sin):
    """RoPE as it is usually written; cos, sin [B,1,T,Dh] in the precision of q."""
    half = q.shape[-1] // 2
    turn = lambda x: x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
    return turn(q), turn(k)


# ----------------------------------------------------------------------------------------------------------------------
# The six tables -> rows


def attention_table():
    # all heads together are `width` wide; the shorter the rows, the larger the batch
    tokens, width, lengths = (16384, 2048, [2**n for n in range(9, 15)]) if ON_GPU else (1024, 256, [128, 512])
    rows = []
    for causal, Dh, T in product((False, True), (64, 128), lengths):
        B, H = tokens // T, width // Dh
        q, k, v = make(B, H, H, T, T, Dh, DTYPE)
        grad, rule = torch.randn_like(q), Rule(causal=causal)
        mask = rule.allowed(T, T, DEVICE) if causal else None
        ours, theirs = (lambda: attention(q, k, v, rule)), (lambda: sdpa(q, k, v, causal))
        runs = dict(triton=ours, flash=theirs, cudnn=theirs, eager=lambda: eager(q, k, v, mask))
        times = {}
        for name, f in (runs if ON_GPU else dict(torch=ours, reference=ours)).items():
            with held_to("auto" if name == "eager" else name):
                times[name] = both_ways(f, (q, k, v), grad)
        work = flop(B, H, T, T, Dh, causal) / 1e9
        rows += rates({"mask": "causal" if causal else "full", "Dh": Dh, "T": T}, times, (work, 2.5 * work))
    rows.sort(key=lambda row: row["pass"] == "backward")
    return show(f"1 attention: TFLOP/s; /x: {OURS} divided by x. {tokens} tokens in all, H Dh = {width}", rows)


def mask_table():
    # N images of P patches in a row, and seven of S, which is no multiple of a tile's length
    H, T, N, P, S = (16, 8192, 64, 256, 585) if ON_GPU else (4, 256, 8, 32, 45)
    same = lambda ids: Rule(q_segments=ids[None].to(DEVICE), k_segments=ids[None].to(DEVICE))
    images = lambda n, patches: same(torch.arange(n).repeat_interleave(patches))
    half, causal, full = same((torch.arange(T) < T // 2).int() - 1), Rule(causal=True), Rule()  # -1 is padding
    seven = lambda Dh: ((1, H, H, 7 * S, Dh), images(7, S), "torch, a batch", (7, H, H, S, Dh), full)
    cases = {  # what: shape (B, H, K, T, Dh), rule, what stands beside it: shape, rule
        "causal": ((1, H, H, T, 128), causal, "full", (1, H, H, T, 128), full),
        "half padding": ((1, H, H, T, 128), half, "full", (1, H, H, T, 128), full),
        f"{N} images in a row": ((1, H, H, N * P, 80), images(N, P), "a batch", (N, H, H, P, 80), full),
        "7 images in a row, width 72": seven(72),
        "7 images in a row, width 80": seven(80),
        "12 heads on 2, causal": ((1, 12, 2, T, 128), causal, "12 on 12", (1, 12, 12, T, 128), causal),
    }

    def measure(shape, rule, name):
        """-> milliseconds forward and backward, pairs that the rule leaves."""
        B, H, K, T, Dh = shape
        q, k, v = make(B, H, K, T, T, Dh, DTYPE)
        with held_to(name):
            times = both_ways(lambda: attention(q, k, v, rule), (q, k, v), torch.randn_like(q))
        return *times, B * T * T * rule.allowed(T, T, DEVICE).float().mean().item()

    rows = []
    for name, (shape, rule, beside, other_shape, other_rule) in cases.items():
        a, b = measure(shape, rule, OURS), measure(other_shape, other_rule, "torch" if "torch" in beside else OURS)
        for n, way in enumerate(("forward", "backward")):
            row = {"mask": name, "beside": beside, "pass": way, "ms": a[n], "ms beside": b[n]}
            rows.append(row | {"quotient": ratio(a[n], b[n]), "pairs": a[2] / b[2]})
    return show(f"2 masks: milliseconds, {OURS}", rows)


def few_queries_table():
    rows, (H, *calls) = [], (16, (1, 32768), (64, 4096)) if ON_GPU else (4, (1, 4096), (64, 512))
    for (Tq, Tk), B, K in product(calls, (1, 8), (H // 4, H)):
        q, k, v = make(B, H, K, Tq, Tk, 128, DTYPE)
        row = {"queries x keys": f"{Tq} x {Tk}", "B": B, "heads": f"{H} on {K}"}
        for name in (OURS, "flash", "cudnn", "torch") if ON_GPU else (OURS, "reference"):
            f = sdpa if name in ("flash", "cudnn") else attention
            with held_to(name), torch.no_grad():
                for called in (False, True) if ON_GPU else (True,):
                    ms = attempt(lambda: milliseconds(lambda: f(q, k, v), called))
                    row[name + " called" * called] = ms and ms * 1e3
        rows.append(row)
    return show("3 few queries, forward: microseconds; called: with Python's part", rows)


def rope_table():
    sizes = product((1024, 16384), (LLAMA, QWEN_VIT, QWEN)) if ON_GPU else [(256, QWEN_VIT), (256, QWEN)]
    torch._functorch.config.donated_buffer = False  # or a compiled backward pass refuses to keep its graph
    large, other = torch.ones(2, 2**30 if ON_GPU else 2**26, dtype=torch.int8, device=DEVICE)
    copy, rows = 2 * large.nbytes / milliseconds(lambda: other.copy_(large)) / 1e6, []
    for T, (H, K, Dh) in sizes:
        q, k, _ = make(1, H, K, T, T, Dh, DTYPE)
        rotation = rope_1d(torch.arange(T, device=DEVICE)[None], Dh)
        usual = [x[..., Dh // 2 :].repeat(1, 1, 1, 2).to(DTYPE) for x in rotation]  # no sine negated
        torch.compiler.reset()  # after eight shapes of one function torch.compile would give it up
        fused = torch.compile(rotate_half, dynamic=False)
        runs = {OURS: lambda: apply_rope(q, k, rotation), "eager": lambda: rotate_half(q, k, *usual)}
        runs["compile"] = lambda: fused(q, k, *usual)
        grads = torch.randn_like(q), torch.randn_like(k)
        with held_to(OURS):
            times = {name: both_ways(f, (q, k), grads) for name, f in runs.items()}
        found = rates({"heads": f"{H} + {K}", "Dh": Dh, "T": T}, times, [2 * (q.nbytes + k.nbytes) / 1e6] * 2)
        rows += [row | {"/copy": ratio(row[OURS], copy)} for row in found]
    return show(f"4 RoPE: GB/s; /x: {OURS} divided by x; copy: {copy:.3g} GB/s", rows)


def error_table():
    torch.manual_seed(0)
    T = 1000 if ON_GPU else 40  # no multiple of a tile's length
    kinds = [("triton", torch.float16), ("triton", DTYPE)] if _triton_installed() else []
    kinds += [] if ON_GPU else [("torch", torch.bfloat16), ("torch", torch.float32)]
    rows = []
    for (name, dtype), causal, Dh in product(kinds, (False, True), (64, 128)):
        inputs = make(1, 3, 1, T, T, Dh, dtype)
        rule, grad = Rule(causal=causal), torch.randn_like(inputs[0])
        mask = rule.allowed(T, T, DEVICE)

        def results(f, inputs):
            out = f(*inputs)
            return [x.double() for x in (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))]

        exact = results(lambda *x: eager(*x, mask), [x.detach().double().requires_grad_() for x in inputs])
        errors = lambda f: [(x - e).abs().max().item() for x, e in zip(results(f, inputs), exact)]
        plain = errors(lambda *x: eager(*x, mask))
        with held_to(name):
            ours = attempt(lambda: errors(lambda *x: attention(*x, rule))) or [None] * 4
        row = {"backend": name, "dtype": str(dtype)[6:], "mask": "causal" if causal else "full", "Dh": Dh}
        for what, x, y in zip(("o", "dq", "dk", "dv"), ours, plain):
            row |= {what: x, f"{what} /eager": ratio(x, y)}
        rows.append(row)
    return show(f"5 errors, the largest; /eager: divided by that of eager in the same precision. T = {T}", rows)


def block_table():
    if not _triton_installed():
        return print("\n6 blocks: left out, since the planning needs Triton")
    from .attention_blocks import walks
    from .attention_triton import CONFIGS

    (BM, BN, *_), T, rows = CONFIGS["forward", 128], 2048, []
    t = torch.arange(T, device=DEVICE)[None]
    same = lambda ids: dict(q_segments=ids, k_segments=ids)
    cases = {
        "full": {},
        "causal": dict(causal=True),
        "causal, prefix of a third": dict(causal=True, prefix=torch.tensor([T // 3], device=DEVICE)),
        "half padding": same((t < T // 2).int() - 1),
        "8 images, each of whole blocks": same(t * 8 // T),
        "7 images": same(t * 7 // T),
    }
    for name, rule in cases.items():
        rule = dict(same(torch.zeros_like(t)), causal=False, prefix=None) | rule  # ids that are all one mask nothing
        walk = walks(rule["q_segments"], rule["k_segments"], rule["prefix"], rule["causal"], BM, BN, False)
        lo, a, z, hi = walk.unbind(-1)
        visited, unmasked = (hi - lo).clamp(min=0).sum().item(), (z - a).sum().item()
        total, pairs = (T // BM) * (T // BN), Rule(**rule).allowed(T, T).float().mean().item()
        row = {"mask": name, "pairs left": pairs, "visited": visited / total, "blocks": visited}
        rows.append(row | {"masked": visited - unmasked, "of": total})
    return show(f"6 blocks of {BM} x {BN} visited at {T} x {T}; masked: those where the mask is computed", rows)


TABLES = dict(attention=attention_table, masks=mask_table, few_queries=few_queries_table, rope=rope_table)
TABLES |= dict(errors=error_table, blocks=block_table)

# ----------------------------------------------------------------------------------------------------------------------
# Compiling without a GPU

GENERATIONS = {80: 163, 90: 227, 100: 227}  # compute capability -> KB of shared memory that one program may use
# B, H, K, Tq, Tk of two calls, which between them take every direction of attention_triton.CONFIGS. They have what
# makes a kernel large: grouped heads, lengths that no tile divides, two rules in one mask
CALLS = (8, 16, 4, 4000, 4000), (1, 16, 4, 64, 4000)


def compile_jobs():
    """-> what compile_job takes: compute capability, dtype, Dh, call."""
    jobs = [*product(GENERATIONS, [torch.bfloat16], (64, 128, 256), CALLS)]
    jobs += product(GENERATIONS, [torch.float32], (64, 128), CALLS[:1])
    jobs += product(GENERATIONS, [torch.bfloat16], [128], ["RoPE"])
    return sorted(jobs, key=lambda job: job[0])


def compile_job(job):
    """Call attention or RoPE, forward and backward, where a launch ends as soon as its kernel is compiled -> rows.

    The tensors have no data (device "meta"), and Triton gets a driver that only names the GPU to compile for. So the
    launchers themselves decide what is compiled, as on that GPU. The driver stays: this needs a process of its own.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from . import attention_triton, rope_triton

    sm, dtype, Dh, call = job
    rows, launch = [], JITFunction.run

    def compile_only(kernel, *args, **options):
        row = {"sm": sm, "kernel": kernel.__name__.strip("_").removesuffix("_kernel")}
        row |= {"Dh": Dh, "dtype": str(dtype)[6:], "BM": options.get("BM"), "BN": options.get("BN")}
        row |= dict.fromkeys(("warps", "stages", "registers", "spilled", "shared KB")) | {"unit": "", "note": ""}
        try:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                made = launch(kernel, *args, **options | {"warmup": True})
        except Exception as error:
            reason = str(error).strip().rpartition("\n")[2][:80]
            return rows.append(row | {"note": f"failed: {type(error).__name__}: {reason}"})
        if not (log := printed.getvalue()):  # ptxas -v: nothing if this process has compiled the kernel before
            return
        row |= {"warps": made.metadata.num_warps, "stages": made.metadata.num_stages}
        row |= {"registers": int(re.search(r"Used (\d+) registers", log)[1])}
        row |= {"spilled": sum(map(int, re.findall(r"(\d+) bytes spill", log)))}
        row |= {"shared KB": made.metadata.shared / 1024, "note": "wgmma serialized" if "serialized" in log else ""}
        row |= {"unit": next((x for x in ("wgmma", "tcgen05.mma", "mma.sync") if x in made.asm["ptx"]), "")}
        if row["shared KB"] > GENERATIONS[sm]:
            row["note"] = f"failed: a program may use {GENERATIONS[sm]} KB of shared memory"
        rows.append(row)

    target = GPUTarget("cuda", sm, 32)
    driver.set_active(SimpleNamespace(get_current_device=lambda: sm, get_current_stream=lambda device: 0,
                                      get_current_target=lambda: target))  # fmt: skip
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True  # for the log
    small = mock.patch.object(attention_triton, "_is_small", lambda device: GENERATIONS[sm] < 200)
    with small, mock.patch.object(JITFunction, "run", compile_only), torch.device("meta"):
        B, H, K, Tq, Tk = CALLS[0] if call == "RoPE" else call
        shapes = (B, Tq, H, Dh), (B, Tk, K, Dh), (B, Tk, K, Dh)
        q, k, v = (torch.empty(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes)
        if call == "RoPE":
            out = rope_triton.rope(q, k, *torch.empty(2, B, 1, Tq, Dh))
        else:
            q_seg, k_seg = (torch.empty(B, T, dtype=torch.int32) for T in (Tq, Tk))
            rule = Rule(causal=True, q_segments=q_seg, k_segments=k_seg)
            out = attention_triton.flash_attention(q, k, v, rule, Dh**-0.5)[:1]
        torch.autograd.grad(out, (q, k, v), [torch.empty_like(x) for x in out], allow_unused=True)
    return rows


def compile_all():
    """-> rows; of several kernels with one configuration the one that spills most, then has most registers."""
    os.environ.pop("TRITON_INTERPRET", None)  # under which nothing is compiled
    size = lambda row: (row["note"].startswith("failed"), row["spilled"] or 0, row["registers"] or 0)
    jobs, rows = compile_jobs(), []
    with multiprocessing.get_context("spawn").Pool() as pool:
        results = pool.imap(compile_job, jobs)
        for sm in GENERATIONS:
            largest = {}
            for row in [row for job in jobs if job[0] == sm for row in next(results)]:
                key = (*row.values(),)[:8]  # up to the stages
                largest[key] = max(row, largest.get(key, row), key=size)
            ordered = sorted(largest.values(), key=lambda row: (row["kernel"], row["dtype"], row["Dh"] or 0))
            rows += show(f"sm_{sm}: of a thread, registers and bytes spilled; of a program, shared memory", ordered)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def about():
    """What the figures depend on."""
    found = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    if _triton_installed():
        import triton

        found |= {"triton": triton.__version__, "ptxas": triton.knobs.nvidia.ptxas.version}
    if not ON_GPU:
        return found | {"device": "CPU", "threads": torch.get_num_threads()}
    driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader").partition("\n")[0]
    return found | {"device": torch.cuda.get_device_name(), "driver": driver, "CUDA": torch.version.cuda}


def main():
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("python -m kernels.bench", description=__doc__, formatter_class=raw)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see --help\n")
    parser.add_argument("--compile", action="store_true", help="compile instead of measuring; the exit status is 1 if\n"
                        "something does not compile or needs too much shared memory")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the results to FILE as well")
    args = parser.parse_args()
    if args.compile and not _triton_installed():
        parser.error("--compile needs Triton: pip install triton (there are wheels for Linux)")
    if not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    results = about()

    def save():
        if args.json:
            with open(args.json, "w") as f:
                json.dump(results, f, indent=1)

    try:
        save()  # now, to see that it can be written; later, to keep what has been measured
    except OSError as error:
        parser.error(f"--json: {args.json}: {error.strerror}")
    print(", ".join(f"{name} {value}" for name, value in results.items()))
    for name, table in (dict(kernels=compile_all) if args.compile else TABLES).items():
        results[name] = table()
        save()
    sys.exit(any(row["note"].startswith("failed") for row in results.get("kernels", ())))


if __name__ == "__main__":
    main()
