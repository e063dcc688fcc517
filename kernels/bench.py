"""Speed and size of the kernels.

    python -m kernels.bench              times what this machine can run: without CUDA a small table in a few seconds
    python -m kernels.bench --compile    compiles every kernel for Ampere, Hopper and Blackwell (Linux, no GPU needed):
                                         registers, spilled bytes, shared memory, kind of matrix instruction

TFLOP/s count 4 B H Tq Tk Dh for a forward pass (half of it if causal, the squares alone if packed) and 2.5 times that for a
backward pass, as in the FlashAttention papers. Every fraction is of a ceiling measured in the same run.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

from . import allowed, apply_rope, attention, backend, rope_1d

# ----------------------------------------------------------------------------------------------------------------------
# Timing


def median_ms(f, budget=0.15):
    """Median time of f, over as many calls as fit the budget (in seconds)."""
    if torch.cuda.is_available():
        import triton.testing

        return triton.testing.do_bench(f, return_mode="median")  # clears the cache between calls
    f()
    times, end = [], time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def forward_and_backward(f, inputs, grad):
    """Two callables, for the forward pass alone and for the backward pass alone. None where f cannot run."""
    try:
        out = f()
        torch.autograd.grad(out, inputs, grad, retain_graph=True)
    except (RuntimeError, ImportError):
        return None, None
    return f, lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


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


def naive(q, k, v, mask):
    """What a first implementation does: scores, mask, softmax, weights."""
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    s = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return s.softmax(-1) @ v


def rotate_half_rope(q, k, angles):
    """RoPE as it is usually written."""
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    half = q.shape[-1] // 2
    turn = lambda x: x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
    return turn(q), turn(k)


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
    rows = []
    for name, shape, rule in cases:
        q, k, v = make(*shape, torch.float32, "cpu")
        grad, mask = torch.randn_like(q), allowed(*shape[3:5], **rule)[:, None]
        row = {"attention": name}
        for which in ("naive", "reference", "torch"):
            f = lambda: naive(q, k, v, mask) if which == "naive" else attention(q, k, v, **rule)
            with backend("auto" if which == "naive" else which):
                with torch.no_grad():
                    row[f"{which} fwd"] = median_ms(f)
                row[f"{which} bwd"] = median_ms(forward_and_backward(f, (q, k, v), grad)[1])
        rows.append(row | {"naive/torch": row["naive fwd"] / row["torch fwd"]})
    columns = {"attention": ""} | {f"{w} {d}": ".3f" for w in ("naive", "reference", "torch") for d in ("fwd", "bwd")}
    show(f"milliseconds, median; float32, {torch.get_num_threads()} threads", rows, columns | {"naive/torch": ".1f"})

    ropes = []
    for shape in ((1, 14, 2, 1, 1, 64), (2, 14, 2, 256, 256, 64)):
        q, k, _ = make(*shape, torch.float32, "cpu")
        angles = rope_1d(torch.arange(shape[3]).expand(shape[0], -1), shape[-1])
        with torch.no_grad():
            ours, usual = median_ms(lambda: apply_rope(q, k, angles)), median_ms(lambda: rotate_half_rope(q, k, angles))
        ropes.append({"RoPE": f"{[*q.shape]} + {[*k.shape]}", "usual": usual, "ours": ours, "usual/ours": usual / ours})
    show("milliseconds, median, forward", ropes, {"RoPE": "", "usual": ".4f", "ours": ".4f", "usual/ours": ".1f"})
    print("\nleft out, for want of a CUDA GPU: the Triton kernels, and what there is to compare them with there"
          " (--compile shows their registers and spills without one)")  # fmt: skip
    return {"device": "cpu", "attention": rows, "rope": ropes}


# ----------------------------------------------------------------------------------------------------------------------
# With CUDA


def bench_cuda():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * 8192**3 / median_ms(lambda x=x, y=y: x @ y) / 1e9
    big = torch.empty(2**29, device="cuda", dtype=torch.bfloat16)  # 1 GiB, far beyond the cache
    bandwidth = 2 * big.nbytes / median_ms(big.clone) / 1e6
    device = torch.cuda.get_device_name()
    print(f"{device}, bfloat16; ceilings measured now: matmul {peak:.0f} TFLOP/s, copy {bandwidth:.0f} GB/s")
    del x, y, big

    sdpa = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip

    def compare(name, shape, share, others, **rule):
        """TFLOP/s of ours and of the others; share is the part of the Tq x Tk pairs that the rule allows."""
        B, H, K, Tq, Tk, Dh = shape
        q, k, v = make(*shape, torch.bfloat16, "cuda")
        grad = torch.randn_like(q)
        flop = 4 * B * H * Tq * Tk * Dh * share
        row = {"attention": name}
        runs = {"ours": lambda: attention(q, k, v, **rule)} | {
            other: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=rule.get("causal", False), enable_gqa=H != K)
            for other in others
        }
        for which, f in runs.items():
            with sdpa_kernel(sdpa[which]) if which in sdpa else contextlib.nullcontext():
                forward, backward = forward_and_backward(f, (q, k, v), grad)
                if forward is not None:
                    with torch.no_grad():
                        row[f"{which} fwd"] = flop / median_ms(forward) / 1e9
                    row[f"{which} bwd"] = 2.5 * flop / median_ms(backward) / 1e9
        row["of peak"] = row["ours fwd"] / peak if "ours fwd" in row else None
        for d in ("fwd", "bwd"):
            best = max((row[f"{o} {d}"] for o in others if f"{o} {d}" in row), default=None)
            row[f"ours/best {d}"] = row[f"ours {d}"] / best if best and f"ours {d}" in row else None
        return row

    rows = []
    for Dh in (64, 128):
        for causal in (False, True):
            for T in (512, 1024, 2048, 4096, 8192, 16384):  # 16k tokens, width 2048, as in the papers
                shape, name = (16384 // T, 2048 // Dh, 2048 // Dh, T, T, Dh), f"Dh {Dh} T {T}{' causal' * causal}"
                rows.append(compare(name, shape, 0.5 if causal else 1, sdpa, causal=causal))
    for T in (2048, 8192):
        rows.append(compare(f"32/8 heads T {T} causal", (16384 // T, 32, 8, T, T, 128), 0.5, sdpa, causal=True))
    for images in (1, 4, 16, 64):
        ids = (torch.arange(16384, device="cuda") // (16384 // images))[None]
        rule = dict(q_segments=ids, k_segments=ids)
        rows.append(compare(f"16k patches, {images} images", (1, 16, 16, 16384, 16384, 80), 1 / images, (), **rule))
    columns = {"attention": ""} | {f"{w} {d}": ".0f" for d in ("fwd", "bwd") for w in ("ours", *sdpa)}
    show("TFLOP/s", rows, columns | {"of peak": ".2f", "ours/best fwd": ".2f", "ours/best bwd": ".2f"})

    decode = []
    for B, H, K, T in ((1, 32, 8, 4096), (32, 32, 8, 4096), (32, 32, 32, 2048)):
        q, k, v = (x.detach() for x in make(B, H, K, 1, T, 128, torch.bfloat16, "cuda"))
        row = {"one token": f"B {B} heads {H}/{K} T {T}", "ours": 2 * k.nbytes / median_ms(lambda: attention(q, k, v)) / 1e6}
        default = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=H != K)
        row["torch"] = 2 * k.nbytes / median_ms(default) / 1e6
        decode.append(row | {"of copy": row["ours"] / bandwidth, "ours/torch": row["ours"] / row["torch"]})
    show("GB/s", decode, {"one token": "", "ours": ".0f", "torch": ".0f", "of copy": ".2f", "ours/torch": ".2f"})

    ropes, compiled = [], torch.compile(rotate_half_rope)
    for B, T in ((1, 1), (1, 1024), (4, 4096), (1, 16384)):
        q, k, _ = make(B, 32, 8, T, T, 128, torch.bfloat16, "cuda")
        angles = rope_1d(torch.arange(T, device="cuda").expand(B, T), 128)
        grads = torch.randn_like(q), torch.randn_like(k)
        runs = {"ours": lambda: apply_rope(q, k, angles), "eager": lambda: rotate_half_rope(q, k, angles),  
                "compiled": lambda: compiled(q, k, angles)}  # fmt: skip
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.rope import liger_rotary_pos_emb

            cos, sin = (torch.cat((angles, angles), -1).cos().bfloat16(), torch.cat((angles, angles), -1).sin().bfloat16())
            runs["liger"] = lambda: liger_rotary_pos_emb(q, k, cos, sin)
        row, moved = {"RoPE 32+8 heads": f"B {B} T {T}"}, 2 * (q.nbytes + k.nbytes)
        for which, f in runs.items():
            forward, backward = forward_and_backward(f, (q, k), grads)
            if forward is not None:
                with torch.no_grad():
                    row[f"{which} fwd"] = moved / median_ms(forward) / 1e6
                row[f"{which} bwd"] = moved / median_ms(backward) / 1e6
        ropes.append(row | {"of copy": row["ours fwd"] / bandwidth})
    columns = {"RoPE 32+8 heads": ""} | {
        f"{w} {d}": ".0f" for d in ("fwd", "bwd") for w in ("ours", "eager", "compiled", "liger")
    }
    show("GB/s", ropes, columns | {"of copy": ".2f"})
    return {"device": device, "peak": peak, "bandwidth": bandwidth, "attention": rows, "decode": decode, "rope": ropes}


# ----------------------------------------------------------------------------------------------------------------------
# Compiling without a GPU

ARCHS = {80: 163, 90: 227, 100: 227}  # compute capability -> KB of shared memory that one block may use
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX = {"forward": "_forward_kernel", "dkdv": "_dkdv_kernel", "dq": "_dq_kernel"}  # those that multiply matrices
OTHERS = {"delta": "_delta_kernel", "ranges": "_ranges_kernel", "plan": "_plan_kernel", "rope": "_rope_kernel"}
INTS = ("Q_SEG", "K_SEG", "PREFIX_LEN", "INDEX", "COUNT", "SEG", "RANGES", "ROWS", "COLS")


def compile_jobs():
    jobs = [(d, arch, Dh, t, "causal") for arch in ARCHS for Dh in (64, 128) for t in DTYPES for d in MATRIX]
    jobs += [(d, arch, Dh, "bf16", "segments") for arch in ARCHS for Dh in (64, 128) for d in MATRIX]
    jobs += [(d, arch, 128, "bf16", "all") for arch in ARCHS for d in (*MATRIX, *OTHERS)]
    return jobs


def describe(kernel, dtype, constants):
    """Types of a kernel's arguments, and which of them the launcher would find divisible by 16."""
    signature, aligned = {}, {}
    for n, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale", "sign"):
            signature[name] = "fp32"
        elif name.isupper() and name not in ("G", "H", "N", "T"):
            signature[name] = "*i32" if name in INTS else "*fp32" if name in ("LSE", "DELTA", "ANGLES") else f"*{dtype}"
            aligned[(n,)] = [["tt.divisibility", 16]]
        elif name.startswith("s"):  # strides of batch, head, row
            signature[name] = ("i32",) * 3
            aligned |= {(n, axis): [["tt.divisibility", 16]] for axis in range(3)}
        else:
            signature[name] = "i32"
    return signature, aligned


def compile_one(job):
    """One kernel for one GPU -> what the assembler says about it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import attention_triton, rope_triton

    direction, arch, Dh, dtype, mask = job
    kernel = getattr(rope_triton if direction == "rope" else attention_triton, (MATRIX | OTHERS)[direction])
    BM, BN, warps, stages = attention_triton.config(direction if direction in MATRIX else "forward", Dh, DTYPES[dtype], 4096)
    constants = dict(CAUSAL=mask != "segments", PREFIX=mask == "all", SEGMENTS=mask != "causal", RAGGED=True, DH=Dh, BD=Dh)
    constants |= dict(BM=BM, BN=BN, OF_KEYS=False, CHUNK=128, BLOCK=BN, INTERLEAVED=False, HALF=Dh // 2, BH=Dh // 2)
    constants |= dict(BT=rope_triton.BT, HEADS=rope_triton.HEADS)
    if mask != "all":
        constants |= dict(PREFIX_LEN=None)
    if mask == "causal":
        constants |= dict.fromkeys(("Q_SEG", "K_SEG", "INDEX", "COUNT"))
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = describe(kernel, dtype, constants)
    if direction in OTHERS:
        BM, BN, warps, stages = None, None, 4, 1
    row = dict(kernel=direction, sm=arch, Dh=Dh, dtype=dtype, mask=mask, BM=BM, BN=BN, warps=warps, stages=stages)
    try:
        source, target = ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source, target=target, options=dict(num_warps=warps, num_stages=stages))
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


def assembler_log(ptx, arch):
    """ptxas -v, with the assembler that comes with Triton."""
    import triton

    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    ptxas = os.path.join(folder, "ptxas-blackwell")
    if arch < 100 or not os.path.exists(ptxas):
        ptxas = os.path.join(folder, "ptxas")
    with tempfile.TemporaryDirectory() as tmp:
        with open(os.path.join(tmp, "kernel.ptx"), "w") as f:
            f.write(ptx)
        gpu = re.search(r"\.target (\w+)", ptx)[1]
        command = [ptxas, "-v", f"--gpu-name={gpu}", "kernel.ptx", "-o", "kernel.cubin"]
        return subprocess.run(command, cwd=tmp, capture_output=True, text=True, check=True).stderr


def compile_all(jobs):
    import triton

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        rows = list(pool.map(compile_one, jobs))
    columns = dict.fromkeys(("kernel", "sm", "Dh", "dtype", "mask", "BM", "BN", "warps", "stages", "registers", "spill"), "")
    columns |= {"shared KB": ".0f", "matrix unit": "", "note": ""}
    show("spill: bytes stored and loaded by one thread", rows, columns)
    bad = [r for r in rows if "spill" not in r or r["shared KB"] > ARCHS[r["sm"]]]
    bad += [r for r in rows if r["kernel"] in MATRIX and r.get("matrix unit") == "none"]
    bad += [r for r in rows if r["kernel"] == "forward" and r["mask"] != "all" and r.get("spill")]
    seconds = time.perf_counter() - start
    print(f"\n{len(rows)} kernels, Triton {triton.__version__}, {seconds:.0f} s; required: no spills in the forward pass, causal or with segments, "
          f"matrix instructions, shared memory within {ARCHS}: {'FAILED' if bad else 'holds'}")  # fmt: skip
    return {"triton": triton.__version__, "kernels": rows}, not bad


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main():
    parser = OneLineParser("python -m kernels.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile for sm_80, sm_90, sm_100 instead of timing; exit 1 if\n"
                        "a forward kernel spills, needs too much shared memory or no matrix unit")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args()
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
        parser.error(f"--json: there is no folder {os.path.dirname(os.path.abspath(args.json))}")
    ok = True
    if args.compile:
        from .attention import _triton_installed

        if not _triton_installed():
            parser.error("--compile needs Triton: pip install triton (there are wheels for Linux)")
        if os.environ.get("TRITON_INTERPRET") == "1":
            parser.error("--compile: unset TRITON_INTERPRET, under which nothing is compiled")
        results, ok = compile_all(compile_jobs())
    else:
        results = bench_cuda() if torch.cuda.is_available() else bench_cpu()
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results, f, indent=1)
    sys.exit(not ok)


if __name__ == "__main__":
    main()
