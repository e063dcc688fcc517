"""
Every test of the repo.

    python test_all.py                  everything, in as many processes as there are cores, at most four (SLOW=1
                                        trains the demos too)
    python test_all.py -k clip          a family's tests; also: kernels, rope, checkpoints, command_line, world, trainer
    python test_all.py -k "trainer and not resumed" -x
    python test_all.py -n 0 -k clip --pdb   in one process, which a debugger needs
    SEED=7 python test_all.py -k kernels    other random inputs (on a GPU they are new each time)
    compute-sanitizer python test_all.py -n 0 -k every_size_of_tiles    on a GPU: bad accesses; --tool racecheck: races

All of it runs offline and without a GPU: Triton's kernels run in its interpreter and are compiled, not run, for three
generations of GPUs. The oracles are tiny random models of `transformers`, saved in the published layout.
"""

import os

import torch

# before Triton is imported: its kernels then run on the CPU
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import ast
import contextlib
import copy
import importlib.util
import inspect
import io
import itertools
import json
import math
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

import blip2
import clip
import cogvlm
import flamingo
import llava
import qwen2vl
import train_tiny as world
import vilt
from kernels import Rule, apply_rope, attention, attention_maps, backend, draw_mask, mrope, rope_1d, rope_2d

ROOT = Path(__file__).resolve().parent
MODULES = dict(clip=clip, vilt=vilt, flamingo=flamingo, cogvlm=cogvlm, blip2=blip2, llava=llava, qwen2vl=qwen2vl)
MODELS = dict(
    clip=clip.CLIP, vilt=vilt.ViLT, flamingo=flamingo.Flamingo, cogvlm=cogvlm.CogVLM, blip2=blip2.BLIP2,
    llava=llava.LLaVA, qwen2vl=qwen2vl.Qwen2VL,
)  # fmt: skip
FAMILIES = tuple(MODULES)
pytestmark = pytest.mark.filterwarnings("ignore:.* has no preprocessor_config.json")


def chapter(word):
    """The tests above this line, up to the last chapter, are those that `-k word` asks for."""
    for name, test in list(globals().items()):
        if name.startswith("test_") and not hasattr(test, "chapter"):
            test.chapter = word
            setattr(test, word, True)


def close(ours, theirs, tolerance=1e-5):
    """Equal to within a tolerance that is relative to the largest number."""
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max().item()
    assert worst <= tolerance * max(1.0, theirs.abs().max().item()), f"differs by {worst:.2e}"


def same(ours, theirs):
    """Two models, or two lists of named tensors, are equal bit for bit."""
    ours, theirs = (dict(x.named_parameters()) if hasattr(x, "named_parameters") else dict(x) for x in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@contextlib.contextmanager
def refuses(kind, *words):
    """What runs in here must raise an exception of this kind whose message contains all these words."""
    with pytest.raises(kind) as error:
        yield
    missing = [word for word in map(str, words) if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


def run(*command, cwd=ROOT, **environment):
    """A Python command in a process of its own -> CompletedProcess with text."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=1800)


def fails_in_one_line(call, capsys, *words):
    """call() must end with status 2, one line on stderr that contains all words, and nothing on stdout."""
    with pytest.raises(SystemExit) as ended:
        call()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err.count("\n") == 1 and not out, (ended.value.code, out, err)
    missing = [word for word in map(str, words) if word not in err]
    assert not missing, f"{missing} not in: {err}"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder that the trainer writes to, empty."""
    monkeypatch.setattr(world, "RUNS", tmp_path)
    return tmp_path


def fit_nothing(name, plan, model, loss_of, code, data="world", *_, **__):
    """In the place of train_tiny.fit: everything that it does except training."""
    key = world.key_of(plan, model.config, data, getattr(model, "lineage", None), code)
    for module in model.modules():
        module.lineage = zlib.crc32(json.dumps(key).encode())
    model.folder = world.RUNS / name
    return model.eval()


@pytest.fixture
def untrained(monkeypatch, runs):
    """Recipes and demos at once: every training ends before its first step."""
    monkeypatch.setattr(world, "fit", fit_nothing)


def pictures():
    """Images of awkward shapes and modes, the same each time."""
    rng = np.random.default_rng(0)
    for width, height in [(224, 224), (640, 480), (480, 641), (37, 91), (5, 3), (1, 1), (300, 33), (1023, 767)]:
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    grey = Image.fromarray(rng.integers(0, 256, (50, 70), dtype=np.uint8))
    yield from (grey, grey.convert("RGBA"), grey.convert("RGB").quantize(16))


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: three backends, one answer

MODULE = sys.modules["kernels.attention"]  # kernels.attention itself is the function of that name
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter computes bfloat16 wrong: this needs a CUDA GPU")
SEED = int(os.environ.get("SEED") or (random.randrange(2**31) if ON_GPU else 0))  # on a GPU other inputs each time
kernels = pytest.mark.usefixtures("on_device")


@pytest.fixture
def on_device():
    """Tensors are made on the GPU where there is one, random ones from SEED on (pytest prints it with a failure)."""
    print(f"SEED={SEED}")
    torch.manual_seed(SEED)
    with torch.device(DEVICE):
        yield


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is full of NaN (of large numbers, if of integers): reading what nobody wrote shows in the result."""
    with torch.device("meta"):  # torch notes at its first use which functions make tensors: that must be the real ones,
        torch.empty(0)  # or `with torch.device("meta")` would allocate a 9B model in every test that comes after
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)
        fill = lambda x: x.fill_(torch.nan if x.is_floating_point() else 2**20)
        monkeypatch.setattr(owner, name, lambda *a, real=real, fill=fill, **kw: fill(real(*a, **kw)))


def per_backend(rows):
    """Each row of a table once per backend. Triton's interpreter computes bfloat16 wrong (attention refuses it there):
    its rows in bfloat16 are left to a GPU."""
    marks = lambda row: [needs_triton] + [needs_gpu] * ("bfloat16" in row)
    triton = [pytest.param("triton", *row, marks=marks(row)) for row in rows]
    return [(name, *row) for name in ("reference", "torch") for row in rows] + triton


ALL_BACKENDS = ["reference", "torch", pytest.param("triton", marks=needs_triton)]
DTYPES = ["float32", "float16", pytest.param("bfloat16", marks=needs_gpu)]  # Triton's


def segments(q, k=None):
    return dict(q_segments=q, k_segments=q if k is None else k)


def padded_left(ids, Tq):
    """As in a language model with a cache: the last Tq tokens are queries."""
    return dict(causal=True, **segments(ids[:, -Tq:], ids))


RULES = {  # B, Tq, Tk -> the arguments of Rule
    "everything": lambda B, Tq, Tk: {},
    "causal": lambda B, Tq, Tk: dict(causal=True),
    "prefix": lambda B, Tq, Tk: dict(causal=True, prefix=(torch.arange(2 * B).int() // 2 * (Tk - 3) + 2)[::2]),
    "scattered": lambda B, Tq, Tk: segments(torch.randint(-1, 3, (B, Tq)), torch.randint(-1, 3, (B, Tk))),
    "packed": lambda B, Tq, Tk: segments(*(torch.arange(T).expand(B, -1) // 70 for T in (Tq, Tk))),
    "padded left": lambda B, Tq, Tk: padded_left(-(torch.arange(Tk) < torch.arange(B)[:, None] * 5 + 2).int(), Tq),
    "all at once": lambda B, Tq, Tk: RULES["scattered"](B, Tq, Tk) | RULES["prefix"](B, Tq, Tk),
}


def qkv(B, H, K, Tq, Tk, Dh, dtype=torch.float32, layout="plain"):
    """Random q, k, v. The layout "strided" is that of a projection's output, [B,T,heads,Dh], with NaN behind the last
    row, and if B is 1 with a stride without meaning; in "odd" no row begins at a multiple of 16 bytes."""
    inputs = [torch.randn(B, heads, T, Dh).to(dtype) for heads, T in ((H, Tq), (K, Tk), (K, Tk))]
    if layout == "strided":
        longer = [F.pad(x, (0, 0, 0, 40), value=torch.nan).transpose(1, 2).contiguous() for x in inputs]
        inputs = [x[:, :-40].transpose(1, 2) for x in longer]
        return [x.as_strided(x.shape, (7, *x.stride()[1:])) if B == 1 else x for x in inputs]
    return [F.pad(x, (1, 0))[..., 1:] for x in inputs] if layout == "odd" else inputs


def output_and_gradients(f, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]  # where they lie: how rows are aligned is part of the test
    o = f(*inputs)
    return [x.detach().double() for x in (o, *torch.autograd.grad(o, inputs, grad.to(o.dtype)))]


def distance(a, b):
    return (a - b).abs().max().item()


def check_attention(name, shape, dtype, rule, layout="plain"):
    """Against float64: float32 to rounding; 16 bits at most 2 (output) or 3 (gradients) times as far off as attention
    written down in 16 bits. A query that sees nothing returns exactly 0 and sends no gradient."""
    B, H, K, Tq, Tk, Dh = shape
    inputs, rule, lse = qkv(*shape, getattr(torch, dtype), layout), Rule(**RULES[rule](B, Tq, Tk)), {}
    ok, grad = rule.allowed(Tq, Tk)[:, None], torch.randn(B, H, Tq, Dh).to(inputs[0].dtype)

    def plain(q, k, v):
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        s = q @ k.transpose(-1, -2) * Dh**-0.5
        lse[q.dtype] = s.detach().masked_fill(~ok, -torch.inf).logsumexp(-1)
        return s.masked_fill(~ok, -30000.0).softmax(-1) * ok @ v

    def ours(q, k, v):
        o, lse["ours"] = attention(q, k, v, rule, return_lse=True)
        assert o.dtype == q.dtype and o.requires_grad and not lse["ours"].requires_grad
        return o

    exact = output_and_gradients(plain, [x.double() for x in inputs], grad.double())
    usual = output_and_gradients(plain, inputs, grad)
    with backend(name):
        result = output_and_gradients(ours, inputs, grad)
    for what, a, b, c, factor in zip(("o", "dq", "dk", "dv"), result, exact, usual, (2, 3, 3, 3)):
        limit = 3e-6 * (1 + b.abs().max().item()) if dtype == "float32" else factor * distance(c, b) + 1e-5
        assert distance(a, b) <= limit, f"{what} is off by {distance(a, b):.1e}, {limit:.1e} is allowed"
    blind = ~ok.any(-1).expand(B, H, Tq)
    assert not result[0][blind].any() and not result[1][blind].any()
    tolerance = 2e-6 if dtype == "float32" else 2e-5
    torch.testing.assert_close(lse["ours"], lse[torch.float64].float(), atol=tolerance, rtol=tolerance)


GRID = {  # (B, H, K, Tq, Tk, Dh), rule, layout.  B is not H, H / K is 3 at times, lengths do not fit the tiles
    "float32": [
        ((2, 3, 1, 17, 17, 16), "everything", "plain"),    ((2, 3, 1, 17, 64, 16), "everything", "strided"),
        ((2, 3, 1, 17, 40, 72), "causal", "strided"),      ((2, 3, 3, 40, 17, 40), "causal", "plain"),
        ((2, 3, 1, 33, 70, 80), "prefix", "plain"),        ((2, 3, 1, 40, 40, 40), "prefix", "plain"),
        ((1, 2, 1, 90, 50, 64), "scattered", "strided"),   ((2, 3, 1, 40, 40, 40), "all at once", "strided"),
        ((1, 2, 1, 20, 20, 256), "padded left", "plain"),  ((3, 2, 1, 1, 50, 64), "padded left", "odd"),
        ((2, 6, 2, 40, 70, 64), "causal", "odd"),          ((2, 6, 2, 40, 70, 64), "all at once", "plain"),
    ],
    "float16": [
        ((2, 3, 1, 129, 200, 64), "everything", "strided"), ((1, 3, 1, 200, 200, 64), "causal", "plain"),
        ((2, 3, 1, 128, 200, 128), "causal", "strided"),   ((1, 2, 1, 129, 65, 256), "causal", "plain"),
        ((1, 2, 2, 200, 129, 128), "prefix", "strided"),   ((2, 2, 1, 129, 200, 72), "scattered", "strided"),
        ((1, 2, 1, 200, 200, 80), "packed", "strided"),    ((2, 3, 1, 150, 150, 40), "padded left", "plain"),
        ((2, 6, 2, 1, 129, 64), "all at once", "strided"), ((2, 2, 1, 200, 129, 64), "all at once", "plain"),
    ],
    "bfloat16": [
        ((2, 3, 1, 129, 200, 64), "all at once", "strided"), ((1, 2, 1, 128, 128, 128), "causal", "plain"),
    ],
}  # fmt: skip


@kernels
@pytest.mark.parametrize(
    "name,dtype,shape,rule,layout", per_backend([(dtype, *row) for dtype, rows in GRID.items() for row in rows])
)
def test_attention_its_gradients_and_lse_are_exact(poisoned, name, dtype, shape, rule, layout):
    check_attention(name, shape, dtype, rule, layout)


@kernels
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("Dh", [64, 128, 256])
@pytest.mark.parametrize("Tq", [150, 50])
def test_triton_is_exact_with_every_size_of_tiles(poisoned, monkeypatch, Tq, Dh, small, dtype):
    """They depend on how many queries there are, the width of a head, and the shared memory that the GPU has."""
    monkeypatch.setattr("kernels.attention_triton._is_small", lambda device: small)
    # each rule is a kernel of its own: on a GPU they have to be compiled, the interpreter would take a minute
    for rule in ["everything", "causal", "packed", "all at once"] if ON_GPU else ["all at once"]:
        check_attention("triton", (1, 3, 1, Tq, 200, Dh), dtype, rule, "odd")


@kernels
@pytest.mark.parametrize("name", ALL_BACKENDS)
def test_a_batch_in_which_nobody_sees_anything_gives_zeros(name):
    q, k, v = inputs = [x.requires_grad_() for x in qkv(2, 2, 1, 5, 7, 16)]
    with backend(name):
        o, lse = attention(q, k, v, Rule(k_segments=torch.full((2, 7), -1)), return_lse=True)
        grads = torch.autograd.grad(o.sum(), inputs)
        assert not o.any() and (lse == -torch.inf).all() and not any(g.any() for g in grads)
        assert attention(q, k[:, :, :0], v[:, :, :0]).shape == q.shape  # no keys at all
        assert attention(q[:, :, :0], k, v).shape == (2, 2, 0, 16)  # and no queries


@kernels
@pytest.mark.parametrize("name,dtype", per_backend([["float32"], ["float16"], ["bfloat16"]]))
def test_scores_in_the_tens_of_thousands_do_not_overflow(poisoned, name, dtype):
    """q and k of +-60. The backward pass subtracts lse from the scores: at 28800 the last bit of float32 is worth
    0.002."""
    inputs = [x.sign() * 60 for x in qkv(1, 2, 2, 40, 40, 64, getattr(torch, dtype))]
    grad = (torch.randn(1, 2, 40, 64) / 64).to(inputs[0].dtype)
    plain = lambda q, k, v: (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
    exact = output_and_gradients(plain, [x.double() for x in inputs], grad.double())
    with backend(name):
        ours = output_and_gradients(attention, inputs, grad)
    for a, b, tolerance in zip(ours, exact, (1e-3, 0.01, 0.01, 0.01)):
        assert distance(a, b) <= tolerance * b.abs().max()  # false if anything is NaN or infinite


@kernels
@pytest.mark.parametrize("name", ALL_BACKENDS)
def test_packed_rows_give_what_separate_rows_give(name):
    """Images of 9, 30 and 50 patches in one row: output and gradients are those of one image at a time."""
    sizes = [9, 30, 50]
    inputs, grad = qkv(1, 2, 1, 89, 89, 40), torch.randn(1, 2, 89, 40)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[None]
    with backend(name):
        packed = output_and_gradients(lambda *x: attention(*x, Rule(**segments(ids))), inputs, grad)
        parts = zip(*(x.split(sizes, 2) for x in (*inputs, grad)))
        separate = zip(*(output_and_gradients(attention, part[:3], part[3]) for part in parts))
    for a, b in zip(packed, separate):
        torch.testing.assert_close(a, torch.cat(b, 2), atol=2e-6, rtol=1e-5)


@kernels
@pytest.mark.parametrize(
    "name,overlapping", [*per_backend([[False]]), pytest.param("triton", True, marks=needs_triton)]
)
def test_numbers_need_not_lie_side_by_side(name, overlapping):
    """Every second number of wider rows, an axis of length 1 with an odd stride; or rows that begin one number after
    each other (of which torch's own attention on the CPU makes garbage). And gradients that are one number repeated."""
    inputs = [x[..., ::2].as_strided((1, 2, 9, 16), (7, 288, 32, 2)) for x in qkv(1, 2, 2, 9, 9, 32)]
    if overlapping:
        inputs = list(torch.randn(3, 1, 2, 24).unfold(3, 16, 1))
    rotation = rope_1d(torch.arange(9)[None], 16)
    both = lambda *x: torch.cat((attention(*x, Rule(causal=True)), *apply_rope(*x[:2], rotation)), 1)
    with backend(name):
        ours = output_and_gradients(both, inputs, torch.ones(()).expand(1, 6, 9, 16))
    with backend("torch"):
        plainly = output_and_gradients(both, [x.contiguous() for x in inputs], torch.ones(1, 6, 9, 16))
    for a, b in zip(ours, plainly):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@kernels
@pytest.mark.parametrize("name", ALL_BACKENDS)
def test_what_may_not_be_seen_leaves_no_trace(name):
    """Change one key and its value: the outputs of all queries that may not see it stay bit for bit."""
    B, T = 2, 40
    (q, k, v), rule = qkv(B, 2, 1, T, T, 16), Rule(**RULES["all at once"](B, T, T))
    ok = rule.allowed(T, T)
    with backend(name):
        before = attention(q, k, v, rule)
        for j in (0, 5, 39):
            k2, v2 = k.clone(), v.clone()
            k2[:, :, j], v2[:, :, j] = torch.randn(2, B, 1, 16)
            stays = (attention(q, k2, v2, rule) == before).all(-1).transpose(1, 2)  # [B,T,H]
            assert stays[~ok[:, :, j]].all() and not stays[ok[:, :, j]].any()


@kernels
@needs_triton
def test_triton_never_loads_blocks_that_nobody_sees_and_gives_the_same_bits_twice(poisoned):
    """NaN in keys, values and queries of foreign or padded blocks: one touched block would poison everything."""
    q, k, v = qkv(1, 2, 2, 256, 512, 64, torch.float16)
    q[:, :, 128:], k[:, :, 128:], v[:, :, 128:] = torch.nan, torch.nan, torch.nan
    q_ids, k_ids, grad = torch.arange(256)[None] // 50, torch.arange(512)[None] // 50, torch.randn_like(q)
    q_ids[:, 128:], k_ids[:, 128:384], k_ids[:, 384:] = -1, 99, -1

    def first(Tq, Tk):
        inputs, rule = (q[:, :, :Tq], k[:, :, :Tk], v[:, :, :Tk]), Rule(**segments(q_ids[:, :Tq], k_ids[:, :Tk]))
        return output_and_gradients(lambda *x: attention(*x, rule), inputs, grad[:, :, :Tq])

    with backend("triton"):
        for once, again, alone in zip(first(256, 512), first(256, 512), first(128, 128)):
            assert torch.equal(once, again) and torch.equal(once[:, :, :128], alone) and not once[:, :, 128:].any()


@kernels
@needs_triton
@pytest.mark.parametrize("of_keys", [False, True])
def test_packing_m_images_costs_m_small_squares(of_keys):
    from kernels.attention_blocks import walks

    def count(ids, causal=False):
        """How many blocks need no mask, how many are visited."""
        lo, a, z, hi = walks(ids, ids, None, causal, 64, 64, of_keys).unbind(-1)
        return (z - a).sum().item(), (hi - lo).clamp(min=0).sum().item()

    t = torch.arange(1024, dtype=torch.int32)[None]
    assert count(t * 0) == (16 * 16, 16 * 16)
    assert count(t // 128) == (8 * 2 * 2, 8 * 2 * 2)  # eight images of two blocks each
    assert count(t // 128, causal=True) == (8, 8 * 3)  # of each 2 x 2 one is empty, one needs no mask
    assert count(torch.where(t < 640, 0, -1)) == (10 * 10, 10 * 10) and count(t * 0 - 1) == (0, 0)  # padding
    assert count(t // 100)[1] < 16 * 4  # boundaries inside a block


@kernels
@needs_triton
@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("ids", ["all 0", "in order", "in no order"])
def test_a_walk_leaves_out_no_block_with_a_pair_and_opens_none_that_is_not_open_as_a_whole(ids, of_keys):
    """Wherever the borders of blocks, of the past and of the prefix meet. Where all ids are the same, a walk visits
    nothing else."""
    from kernels.attention_blocks import walks

    BM, BN, prefix = 4, 8, torch.tensor([1, 7, 8, 9, 15], dtype=torch.int32)
    lengths = (9, 9), (9, 12), (9, 15), (8, 15), (9, 16), (8, 17), (9, 7), (10, 2), (40, 70)
    for (Tq, Tk), (causal, prefix) in itertools.product(lengths, ((False, None), (True, None), (True, prefix))):
        q_ids, k_ids = (torch.randint(-1, 3, (5, T), dtype=torch.int32) * (ids != "all 0") for T in (Tq, Tk))
        if ids == "in order":
            q_ids, k_ids = q_ids.sort(1).values, k_ids.sort(1).values
        ok = Rule(causal=causal, prefix=prefix, **segments(q_ids, k_ids)).allowed(Tq, Tk)
        blocks = F.pad(ok, (0, -Tk % BN, 0, -Tq % BM)).unflatten(2, (-1, BN)).unflatten(1, (-1, BM))
        some, every = blocks.any(4).any(2), blocks.all(4).all(2)  # [B,rows,cols]
        some, every = (x.transpose(1, 2) if of_keys else x for x in (some, every))
        walked = walks(q_ids, k_ids, prefix, causal, BM, BN, of_keys)
        for walk, has, whole in zip(*(x.flatten(0, 1) for x in (walked, some, every))):
            lo, a, z, hi = walk.tolist()
            visited, opened = {*range(lo, hi)}, {*range(a, z)}
            has, whole = ({*x.nonzero()[:, 0].tolist()} for x in (has, whole))
            assert has <= visited <= {*range(some.shape[2])} and opened <= visited & whole, (Tq, Tk, causal, prefix)
            assert ids != "all 0" or (visited, opened) == (has, whole), (Tq, Tk, causal, prefix)


@kernels
@needs_triton
def test_what_a_rule_leaves_is_worked_out_once_for_all_layers(monkeypatch):
    from kernels.attention_blocks import walks

    made = []
    monkeypatch.setattr("kernels.attention_triton.walks", lambda *a: made.append(1) or walks(*a))
    rule, (q, k, v) = Rule(k_segments=torch.arange(80).view(2, 40) // 34 - 1), qkv(2, 2, 1, 40, 40, 16)
    for queries, times in ((q, 1), (q, 1), (q[:, :, 30:], 2)):
        with backend("triton"):
            ours = attention(queries, k, v, rule)
        assert len(made) == times
        with backend("reference"):
            torch.testing.assert_close(ours, attention(queries, k, v, rule), atol=1e-5, rtol=1e-5)
    assert rule.allowed(40, 40) is rule.allowed(40, 40)


def drawn(Tq, Tk, causal=False, **rule):
    return draw_mask(Tq, Tk, Rule(causal=causal, **{name: torch.tensor([x]) for name, x in rule.items()}))


def test_mask_tables_by_hand():
    hand = [
        (dict(Tq=3, Tk=3, causal=True), "#.. ##. ###"),
        (dict(Tq=2, Tk=4, causal=True), "###. ####"),  # a cache of two
        (dict(Tq=4, Tk=2, causal=True), ".. .. #. ##"),  # more queries than keys: the last ones are aligned
        (dict(Tq=3, Tk=4, causal=True, prefix=3), "###. ###. ####"),
        (dict(Tq=3, Tk=3, k_segments=[0, -1, 0]), "#.# #.# #.#"),
        (dict(Tq=3, Tk=3, q_segments=[1, -1, 0]), "... ... ###"),  # keys are all in segment 0
        (dict(Tq=3, Tk=2, q_segments=[4, -1, 2], k_segments=[2, 4]), ".# .. #."),
    ]
    for rule, table in hand:
        assert drawn(**rule) == "\n".join(" ".join(row) for row in table.split()), rule


PICTURES = {  # header in the docstring of kernels/attention.py -> what is drawn there
    "CLIP, image": dict(Tq=5, Tk=5),
    "CLIP, text": dict(Tq=5, Tk=5, causal=True),
    "SigLIP, padded text": dict(Tq=5, Tk=5, **segments([0, 0, 0, -1, -1])),
    "ViLT, words | patches": dict(Tq=6, Tk=6, **segments([0, 0, -1, 0, 0, -1])),
    "Flamingo, text to images": dict(Tq=6, Tk=4, **segments([-1, 0, 0, 1, 1, 1], [0, 0, 1, 1])),
    "BLIP-2, contrastive": dict(Tq=5, Tk=5, **segments([0, 0, 1, 1, 1])),
    "BLIP-2, matching": dict(Tq=5, Tk=5),
    "BLIP-2, generation": dict(Tq=5, Tk=5, causal=True, prefix=2),
    "LLaVA, padded left": dict(Tq=6, Tk=6, causal=True, **segments([-1, 0, 0, 0, 0, 0])),
    "LLaVA, 2 new of 6": dict(Tq=2, Tk=6, causal=True),
    "CogVLM, image as prefix": dict(Tq=6, Tk=6, causal=True, prefix=3),
    "Qwen2-VL, 3 images": dict(Tq=6, Tk=6, **segments([0, 0, 0, 1, 1, 2])),
}


@pytest.mark.parametrize("header", PICTURES)
def test_pictures_in_the_docstring_are_what_the_rule_draws(header):
    lines = MODULE.__doc__.splitlines()
    (top,) = [n for n, line in enumerate(lines) if header in line]
    left, rows = lines[top].index(header), drawn(**PICTURES[header]).split("\n")
    below = [line[left : left + 28].rstrip() for line in lines[top + 2 : top + 3 + len(rows)]]
    assert below[: len(rows)] == rows and "#" not in below[-1]


@kernels
@pytest.mark.parametrize("name", ALL_BACKENDS)
def test_attention_maps_are_the_weights_of_every_call_inside_in_order(name):
    """Three calls of different shapes: each map gives its call's output, which is that of the backend without maps.
    Other calls, before and after, leave no map, also where an error ended the recording."""
    shapes = (2, 4, 2, 5, 6, 8), (1, 2, 2, 3, 3, 16), (2, 2, 1, 1, 7, 8)
    rules = Rule(**RULES["all at once"](2, 5, 6)), Rule(causal=True), Rule()
    calls = [([x.requires_grad_() for x in qkv(*shape)], rule) for shape, rule in zip(shapes, rules)]
    with backend(name):
        expected = [attention(*x, rule) for x, rule in calls]
        with attention_maps() as outer:
            with pytest.raises(KeyError), attention_maps() as maps:
                outputs = [attention(*x, rule) for x, rule in calls]
                raise KeyError
            attention(*calls[0][0])  # an error has closed the inner one
        attention(*calls[0][0])
    assert len(outer) == 1
    for ((q, k, v), rule), o, usual, weights in zip(calls, outputs, expected, maps, strict=True):
        assert weights.shape == (*q.shape[:3], k.shape[2]) and not weights.requires_grad and o.requires_grad
        torch.testing.assert_close(o, usual, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), o)
        ok = rule.allowed(q.shape[2], k.shape[2], DEVICE)[:, None].expand_as(weights)
        assert not weights[~ok].any()
        torch.testing.assert_close(weights.sum(-1), ok.any(-1).float())  # 1, or 0 for a query that sees nothing


def test_wrong_arguments_of_attention_and_rope_are_named():
    q, k, v = qkv(2, 4, 2, 5, 6, 8)
    ids, angles = torch.zeros(2, 5).long(), lambda B, T, Dh: rope_1d(torch.zeros(B, T), Dh)
    for words, call in [
        (["prefix", "causal"], lambda: Rule(prefix=torch.tensor([1, 2]))),
        ([[2, 3, 5, 8], [2, 2, 6, 8]], lambda: attention(q[:, :3], k, v)),
        ([[2, 2, 6, 8], [2, 2, 3, 8]], lambda: attention(q, k, v[:, :, :3])),
        ([[1, 4, 5, 8]], lambda: attention(q[:1], k, v)),
        (["k_segments", [2, 5], [2, 6]], lambda: attention(q, k, v, Rule(k_segments=ids))),
        (["q_segments", "bool"], lambda: Rule(q_segments=ids == 0)),
        (["k_segments", 2**31], lambda: Rule(k_segments=ids + 2**31)),
        (["q_segments", "meta", "cpu"], lambda: attention(q, k, v, Rule(q_segments=ids.int().to("meta")))),
        (["float32", "float64"], lambda: attention(q, k, v.double())),
        (["scale", 0.0], lambda: attention(q, k, v, scale=0.0)),
        (["cuda", "auto", "reference", "torch", "triton"], lambda: backend("cuda").__enter__()),
        ([4, 6], lambda: rope_2d(torch.zeros(2, 1, 5), 6)),
        ([4, [1, 1, 1]], lambda: mrope(torch.zeros(3, 1, 5), 8, [1, 1, 1])),
        ([[1, 1, 5, 8]], lambda: apply_rope(q, q, angles(1, 5, 8))),
        ([[2, 1, 5, 6]], lambda: apply_rope(q, q, angles(2, 5, 6))),
        ([[2, 4, 3, 8]], lambda: apply_rope(q, q[:, :, :3], angles(2, 5, 8))),
    ]:
        with refuses(ValueError, *words):
            call()
    with contextlib.suppress(KeyError), backend("reference"):
        raise KeyError
    assert MODULE.choose_backend(q, k) == "torch", "no backend outlives its context, whatever failed"


@needs_triton
def test_triton_refuses_what_it_cannot_compute(monkeypatch):
    for error, word, dtype, Dh, interpreter in [
        (ValueError, "float64", torch.float64, 16, "1"),
        (ValueError, "264", torch.float32, 264, "1"),
        (ValueError, "bfloat16", torch.bfloat16, 16, "1"),
        (RuntimeError, "cpu", torch.float32, 16, "0"),
    ]:
        monkeypatch.setenv("TRITON_INTERPRET", interpreter)
        with refuses(error, word), backend("triton"):
            attention(*qkv(1, 1, 1, 4, 4, Dh, dtype))


@needs_triton
def test_on_a_gpu_the_choice_falls_on_triton_where_it_serves(monkeypatch):
    from torch._subclasses import FakeTensorMode  # tensors on a GPU that is not there

    monkeypatch.setattr(MODULE, "_gpu_fits", MODULE._gpu_fits.__wrapped__)  # it would remember the device

    def choice(B=1, Dh=64, T=9, dtype=torch.bfloat16, generation=(8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
        with FakeTensorMode():
            q, k = (torch.empty(B, 2, T, Dh, dtype=dtype, device="cuda") for T in (9, T))
            return MODULE.choose_backend(q, k)

    assert choice() == choice(Dh=256) == choice(dtype=torch.float32) == choice(B=65535) == choice(T=10**6) == "triton"
    assert choice(Dh=264) == choice(dtype=torch.float64) == choice(B=65536) == choice(T=2**20) == "torch"
    assert choice(generation=(12, 0)) == "triton" and choice(generation=(7, 5)) == "torch"


@needs_triton
def test_a_new_token_goes_to_torch_unless_triton_is_asked_for(monkeypatch):
    monkeypatch.setattr(MODULE, "choose_backend", lambda q, k: "triton")  # as on a GPU
    monkeypatch.setattr("kernels.attention_triton.flash_attention", lambda *_: ("triton", None))
    q, k, v = qkv(1, 2, 2, 5, 5, 16)
    assert torch.is_tensor(attention(q[:, :, :1], k, v)) and attention(q[:, :, :2], k, v) == "triton"
    with backend("triton"):
        assert attention(q[:, :, :1], k, v) == "triton"


def test_torch_is_given_no_mask_where_it_needs_none(monkeypatch):
    monkeypatch.setattr(Rule, "allowed", None)  # an error where a mask is made
    q, k, v = qkv(2, 4, 2, 6, 6, 8)
    with backend("torch"):
        for queries, rule in ((q, Rule()), (q, Rule(causal=True)), (q[:, :, :1], Rule(causal=True))):
            attention(queries, k, v, rule)


def test_nothing_needs_triton_until_it_is_asked_for():
    """In a fresh interpreter, with Triton hidden: everything works, and asking for it says what to install."""
    done = run("-c", """
import sys, torch, kernels
assert "triton" not in sys.modules, "import kernels must not import triton"
sys.modules["triton"] = None
q = torch.randn(1, 2, 4, 8)
kernels.apply_rope(kernels.attention(q, q, q, kernels.Rule(causal=True)), q, kernels.rope_1d(torch.arange(4)[None], 8))
print("works")
with kernels.backend("triton"):
    print("not reached")
""")  # fmt: skip
    assert done.stdout == "works\n" and "RuntimeError" in done.stderr and "pip install triton" in done.stderr, done


TRITON_PACKED = pytest.param("triton", "packed", marks=needs_triton)  # torch.compile sees no more of it than a call


@kernels
@pytest.mark.parametrize("name, rule", [*itertools.product(["reference", "torch"], RULES), TRITON_PACKED])
def test_torch_compile_takes_attention_and_rope_whole_and_goes_around_triton(name, rule):
    torch.compiler.reset()  # or each rule would count as one more recompilation of the same function
    inputs, rule = [x.requires_grad_() for x in qkv(2, 4, 2, 11, 11, 8)], RULES[rule](2, 9, 11)
    positions = torch.arange(11).expand(2, 11)

    def f(q, k, v):
        q, k = apply_rope(q * 2, k, rope_1d(positions, 8))
        return attention(q[:, :, 2:], k, v, Rule(**rule)).sin()

    with backend(name):
        results = []
        # backend="eager": traced, without half a minute of C++ compilation; fullgraph: a graph break is an error
        for call in (f, torch.compile(f, backend="eager", fullgraph=name != "triton")):
            call(*inputs)
            out = call(*inputs)  # again, from what the first call compiled
            results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_torch_compile_follows_a_change_of_backend_and_yields_maps():
    q, k, v = qkv(1, 2, 2, 5, 5, 8)
    compiled = torch.compile(lambda *x: attention(*x, Rule(causal=True)), backend="eager", fullgraph=True)
    with backend("torch"):
        usual = compiled(q, k, v)
    with backend("reference"):
        assert torch.equal(compiled(q, k, v), attention(q, k, v, Rule(causal=True)))
    with attention_maps() as maps:
        mapped = compiled(q, k, v)
    assert torch.equal(compiled(q, k, v), usual)
    (weights,) = maps
    torch.testing.assert_close(weights @ v, mapped)


chapter("kernels")


# ----------------------------------------------------------------------------------------------------------------------
# RoPE


def turned(x, rotation):
    return apply_rope(x, x, rotation)[0]


def test_rope_is_that_of_transformers():
    """Half-split (LLaMA), M-RoPE and 2D (Qwen2-VL)."""
    transformers = quiet_transformers()
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

    q, k, at = noise(2, 4, 11, 64), noise(2, 2, 11, 64, seed=2), 500 * noise(3, 2, 11).abs().int()
    parameters = dict(rope_type="default", rope_theta=5000.0, mrope_section=[8, 12, 12])
    fields = dict(hidden_size=256, num_attention_heads=4, rope_parameters=parameters)
    for theirs, at_theirs, ours in [
        (llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**fields)), at[0], rope_1d(at[0], 64, 5000.0)),
        (qwen.Qwen2VLRotaryEmbedding(transformers.Qwen2VLTextConfig(**fields)), at, mrope(at, 64, [8, 12, 12], 5000.0)),
    ]:
        expected = llama.apply_rotary_pos_emb(q, k, *theirs(q, at_theirs))
        torch.testing.assert_close(apply_rope(q, k, ours), expected, atol=2e-5, rtol=1e-5)

    tower = qwen.Qwen2VLVisionRotaryEmbedding(qwen.Qwen2VLVisionConfig(embed_dim=256, num_heads=4))
    rows = q[0].transpose(0, 1)  # [T,H,Dh], as theirs takes them
    expected = qwen.apply_rotary_pos_emb_vision(rows, rows, *tower(q, at[:2, 0].T))[0].transpose(0, 1)
    torch.testing.assert_close(turned(q[:1], rope_2d(at[:2, :1], 64))[0], expected, atol=2e-5, rtol=1e-5)


def test_rope_turns_and_does_nothing_else():
    """Position 0 is the identity, lengths stay, and scores depend on how far apart two positions are, on every axis."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 6, 32, dtype=torch.float64)
    at = torch.randint(0, 30, (3, 1, 6))
    for rotation in (lambda p: rope_1d(p[0], 32), lambda p: rope_2d(p[:2], 32), lambda p: mrope(p, 32, [4, 6, 6])):
        turn = lambda x, p: turned(x, rotation(p))
        assert torch.equal(turn(q, at * 0), q)
        torch.testing.assert_close(turn(q, at).norm(dim=-1), q.norm(dim=-1), atol=1e-6, rtol=0)
        scores = lambda shift: turn(q, at + shift) @ turn(k, at + shift).transpose(-1, -2)
        for shift in (7, torch.tensor([3, 11, 2]).view(3, 1, 1)):
            torch.testing.assert_close(scores(shift), scores(0), atol=2e-5, rtol=0)


def test_rope_by_hand():
    """A quarter turn of the first pair, which is (x[0], x[2]) in a head of width 4. And the interleaved convention, as
    multiplication of complex numbers: the same after the permutation that the docstring of rope.py gives."""
    quarter = rope_1d(torch.tensor([[torch.pi / 2]]), 4)  # the second pair turns by a hundredth of that
    hand = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]).view(1, 3, 1, 4)
    expected = [[0, 0, 1, 0], [-1, 0, 0, 0], [0, 1, 0, 0]]
    assert turned(hand, quarter)[0, :, 0].round().tolist() == expected

    x, order = noise(1, 2, 9, 16), torch.arange(16).view(-1, 2).T.flatten()
    angles = torch.arange(9)[:, None] * 10000.0 ** (-torch.arange(8) / 8)  # [T,Dh/2]
    pairs = torch.view_as_complex(x.unflatten(-1, (8, 2))) * torch.polar(torch.ones(9, 8), angles)
    interleaved = torch.view_as_real(pairs).flatten(-2)
    close(turned(x[..., order], rope_1d(torch.arange(9)[None], 16)), interleaved[..., order])


def test_mrope_with_equal_axes_is_rope_1d_and_each_axis_turns_its_run_of_pairs():
    at, x = torch.arange(9)[None], noise(1, 2, 9, 16)
    assert torch.equal(turned(x, mrope(at.expand(3, 1, 9), 16, [2, 3, 3])), turned(x, rope_1d(at, 16)))
    ours = turned(x, mrope(torch.stack((at, at * 2, at * 3)), 16, [2, 3, 3]))
    for axis, pairs in enumerate((slice(0, 2), slice(2, 5), slice(5, 8))):
        alone = turned(x, rope_1d(at * (axis + 1), 16))
        for a, b in zip(ours.split(8, -1), alone.split(8, -1)):  # the first numbers of all pairs, and the second ones
            assert torch.equal(a[..., pairs], b[..., pairs])


@kernels
@pytest.mark.parametrize(
    "name,dtype,tolerance", per_backend([("float32", 1e-6), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
)
def test_apply_rope_and_its_gradients_are_exact(name, dtype, tolerance):
    """In every backend, to one unit in the last place of its dtype, for layouts as a projection leaves them."""
    B, H, K, T, Dh = 2, 6, 5, 37, 40
    q, k, _ = qkv(B, H, K, T, T, Dh, getattr(torch, dtype), "strided")
    grads, rotation = (torch.randn(q.shape), torch.randn(k.shape)), rope_1d(torch.randint(0, 3000, (B, T)), Dh)
    results = []
    for which, wide in (("torch", torch.float64), (name, q.dtype)):
        inputs = [x.to(wide).requires_grad_() for x in (q, k)]
        with backend(which):
            out = apply_rope(*inputs, rotation)
            back = torch.autograd.grad(out, inputs, [g.to(q.dtype).to(wide) for g in grads])
        results.append((*out, *back))
    for a, b in zip(*results):
        assert b.dtype == q.dtype
        torch.testing.assert_close(b.double(), a, atol=tolerance, rtol=tolerance)


chapter("rope")


# ----------------------------------------------------------------------------------------------------------------------
# What torch.compile makes of a forward pass

# At most. A graph ends where Python needs a number that only the data contain, and with it the graph of every caller:
# the sizes of images (ViLT, Qwen2-VL), which of them are real (Flamingo), the number of each expert's tokens (CogVLM).
GRAPH_BREAKS = {"clip": 0, "llava": 0, "blip2": 0, "flamingo": 4, "vilt mlm": 10, "cogvlm": 10, "qwen2vl": 12}


@pytest.mark.parametrize("kind, limit", GRAPH_BREAKS.items())
def test_torch_compile_meets_few_graph_breaks_in_a_forward_pass_and_none_in_a_kernel(load, kind, limit):
    from torch._dynamo.backends.debugging import ExplainWithBackend

    model, given = load(kind), EXAMPLES[kind]
    given = dict(mask=torch.ones_like(given["ids"], dtype=torch.bool)) | given
    torch.compiler.reset()
    explain = ExplainWithBackend("eager")
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=explain)(**given), model(**given))
    report = explain.output()
    innermost = [reason.user_stack[-1] for reason in report.break_reasons]
    lines = sorted({f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}" for frame in innermost})
    assert not [line for line in lines if line.startswith("kernels")]
    assert report.graph_break_count <= limit, lines  # graphs, less one


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark, each time in a process of its own


def run_bench(*command):
    """`python -m kernels.bench`, or a program that uses it, on a machine without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


COMPILE_SOME = """
import json, torch, triton
from kernels.bench import CALLS, compile_job, compile_jobs
jobs = [(sm, torch.bfloat16, 128, CALLS[0]) for sm in (80, 90, 100)]
jobs += [(sm, torch.bfloat16, 64, CALLS[0]) for sm in (80, 90)] + [(90, torch.bfloat16, 128, "RoPE")]
assert set(jobs) <= set(compile_jobs())
print(json.dumps([triton.__version__, [row for job in jobs for row in compile_job(job)]]))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_for_ampere_hopper_and_blackwell():
    """Widths 64 and 128, as the launchers ask for them: with the generation's matrix instructions, within its shared
    memory, without spills. `python -m kernels.bench --compile` does it for every configuration."""
    run = run_bench("-c", COMPILE_SOME)
    assert run.returncode == 0, run.stderr
    version, rows = json.loads(run.stdout)
    rows = {(row["kernel"], row["Dh"], row["sm"]): row for row in rows}
    units, shared = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}, {80: 163, 90: 227, 100: 227}
    for kernel, (Dh, sm) in itertools.product(
        ("forward", "dkdv", "dq"), ((128, 80), (128, 90), (128, 100), (64, 80), (64, 90))
    ):
        assert rows[kernel, Dh, sm]["unit"] == units[sm] and rows[kernel, Dh, sm]["BM"], (kernel, Dh, sm)
    assert ("rope", 128, 90) in rows
    for (_, _, sm), row in rows.items():
        assert not row["note"] and row["shared KB"] <= shared[sm], row
        assert row["spilled"] == 0 or not version.startswith("3.7."), row


QUICK = """
import torch
from kernels import bench
bench.milliseconds = lambda f, called=False: 1.0 if f() is not None else None
torch.compile = lambda f, **options: f
bench.main()
"""


def test_the_benchmark_prints_six_tables_and_writes_them_to_a_file(tmp_path):
    """Every call is made once instead of being timed. The blocks visited are those that each mask leaves."""
    run = run_bench("-c", QUICK, "--json", str(tmp_path / "tables.json"))
    assert run.returncode == 0 and "left out" not in run.stderr, run.stdout + run.stderr
    assert re.findall(r"^\d \w+", run.stdout, re.M) == "1 attention,2 masks,3 few,4 RoPE,5 errors,6 blocks".split(",")
    results = json.loads((tmp_path / "tables.json").read_text())
    assert results["torch"] == torch.__version__ and results["device"] == "CPU"
    tables = [results[name] for name in ("attention", "masks", "few_queries", "rope", "errors", "blocks")]
    if importlib.util.find_spec("triton") is None:
        assert tables.pop() is None
    assert all(value is not None for table in tables for row in table for value in row.values())
    visited = {row["mask"]: row["visited"] for row in results["blocks"] or ()}
    left = {"full": 1, "causal": 17 / 32, "half padding": 1 / 4, "8 images, each of whole blocks": 1 / 8}
    assert not visited or visited.items() >= left.items()


def test_the_benchmark_refuses_a_file_it_cannot_write_before_it_measures():
    for path in ("/nowhere/at/all.json", str(ROOT)):
        run = run_bench("-m", "kernels.bench", "--json", path)
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and path in run.stderr and not run.stdout, run.stderr


chapter("compile")


# ----------------------------------------------------------------------------------------------------------------------
# Repeated parts: the family files share no code, so what they repeat is kept equal here

REPEATED = {  # what stands word for word in every family file that has it, but for these
    "IGNORE_INDEX": (),
    "quick_gelu": (),
    "RMSNorm": (),
    "SwiGLU": ("qwen2vl",),  # its bias is a switch: the tower has one, the decoder has none
    "Cache": (),
    "DecoderAttention": ("qwen2vl",),  # biases on q, k, v
    "DecoderBlock": (),
    "sample": (),
    "language_loss": (),
    "pad_rows": (),
    "load_weights": (),
    "config_from_folder": (),
    "found": (),
    "require": (),
    "part": (),
    "read_json": (),
    "processor_of": ("cogvlm",),  # the first CogVLM has no processor's file: that is not worth a warning
    "checkpoint_folder": (),
}


def definitions(family):
    """Name -> source of every top-level function, class and constant of a family file."""
    source = (ROOT / f"{family}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(source.splitlines()[start - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.get_source_segment(source, node)
    return found


def code_lines(source):
    """The lines of a piece of source without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.unparse(tree).splitlines()


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_parts_of_the_family_files_are_equal(name):
    sources = {family: definitions(family).get(name) for family in FAMILIES if family not in REPEATED[name]}
    example = r'hub id such as "[^"]+"' if name == "checkpoint_folder" else r"\Z x"  # the one thing that may differ
    texts = {family: re.sub(example, "", source) for family, source in sources.items() if source}
    assert len(texts) > 1
    for family, text in texts.items():
        assert text == texts[next(iter(texts))], f"{name} differs between {next(iter(texts))}.py and {family}.py"


@pytest.mark.parametrize("family, own", dict(blip2="-", flamingo="media", cogvlm="roles", qwen2vl="positions").items())
def test_generate_is_the_same_in_all_decoders_but_for_one_argument(family, own):
    def generate(family):
        for source in definitions(family).values():
            node = ast.parse(source).body[0]
            methods = {part.name: part for part in getattr(node, "body", ()) if isinstance(part, ast.FunctionDef)}
            if {"hidden", "generate"} <= set(methods):
                return code_lines(ast.unparse(methods["generate"]))

    ours, theirs = generate(family), generate("llava")
    assert all(own in line for line in ours if line not in theirs)
    missing = [line.strip() for line in theirs if line not in ours]
    assert all(line.startswith(("def generate", "h = self.hidden")) for line in missing), missing


def test_flamingos_language_model_is_llavas_with_media_before_its_layers():
    theirs = [line.replace(" (text and image)", "") for line in code_lines(definitions("llava")["LanguageModel"])]
    ours = code_lines(definitions("flamingo")["LanguageModel"])
    ours = [re.sub(r", media(=None)?(?=[,)])", "", line) for line in ours]  # the argument
    inserted = [line for line in ours if "media" in line]
    assert [line for line in ours if line not in inserted] == theirs and len(inserted) == 6


def test_a_family_file_imports_no_other_and_only_the_five_packages():
    known = {"torch", "numpy", "PIL", "tiktoken", "tqdm", "kernels"} | set(sys.stdlib_module_names)
    optional = {"safetensors", "tokenizers", "huggingface_hub", "train_tiny"}  # inside a function, when they are needed
    for family in FAMILIES:
        for node in ast.walk(tree := ast.parse((ROOT / f"{family}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (name.split(".")[0] for name in names):
                assert name in (known if node in tree.body else known | optional), f"{family}.py imports {name}"


chapter("repeated")


# ----------------------------------------------------------------------------------------------------------------------
# Oracles: tiny random models of `transformers` in the published layout, and what they are asked


def quiet_transformers():
    """transformers prints a page about torchvision at every import; that is not what is tested."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def randomise(model, seed=0):
    """Every weight away from its initial value: biases of zero and norms of one would hide a forgotten one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def vision_fields(**changes):
    fields = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32)
    return fields | dict(patch_size=8) | changes


def text_fields(**changes):
    fields = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    return fields | dict(max_position_embeddings=16) | changes


def make_clip(transformers, kind):
    act = "gelu" if kind == "clip with gelu" else "quick_gelu"
    end = 2 if kind == "clip with eos 2" else 99
    text = text_fields(eos_token_id=end, hidden_act=act, projection_dim=24)
    vision = vision_fields(hidden_act=act, projection_dim=24)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


def make_siglip(transformers, kind):
    text = text_fields(hidden_size=24, projection_size=32) if kind == "siglip2" else text_fields()
    config = transformers.SiglipConfig(text_config=text, vision_config=vision_fields())
    return transformers.SiglipModel(config)


def make_vilt(transformers, kind):
    heads = dict(mlm="ViltForMaskedLM", vqa="ViltForQuestionAnswering", rank="ViltForImageAndTextRetrieval")
    fields = text_fields(max_position_embeddings=14, vocab_size=110)
    fields |= vision_fields(max_image_length=-1, num_labels=7)
    return getattr(transformers, heads[kind.split()[1]])(transformers.ViltConfig(**fields))


def make_llava(transformers, kind):
    tied, full = kind == "llava with tied embeddings", kind == "llava with class token"
    text = transformers.LlamaConfig(
        **text_fields(max_position_embeddings=256, intermediate_size=80),
        num_key_value_heads=2 if kind == "llava with grouped heads" else 4,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision_fields()),
        text_config=text,
        image_token_index=98,
        vision_feature_select_strategy="full" if full else "default",
        vision_feature_layer=-1 if full else -2,
        tie_word_embeddings=tied,
    )
    return transformers.LlavaForConditionalGeneration(config)


def make_blip2(transformers, kind):
    """Four Q-Former layers, so that the image is attended to twice; 6 queries, fewer than the image has patches."""
    retrieval = kind == "blip2 retrieval"
    text = transformers.OPTConfig(
        **text_fields(max_position_embeddings=64), ffn_dim=80, word_embed_proj_dim=32, eos_token_id=2
    )
    qformer = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, vocab_size=90)
    config = transformers.Blip2Config(
        vision_config=vision_fields(),
        qformer_config=qformer | dict(max_position_embeddings=20, use_qformer_text_input=retrieval),
        text_config=text.to_dict(),
        num_query_tokens=6,
        image_text_hidden_size=16,
        image_token_index=None if retrieval else 98,
    )
    return getattr(transformers, "Blip2ForImageTextRetrieval" if retrieval else "Blip2ForConditionalGeneration")(config)


def make_flamingo(transformers, kind):
    """Four layers, every second with a block before it; image features narrower than words; gates half open, so that
    neither attention nor gates can be forgotten unseen; two new tokens, 96 and 97, in a table of their own."""
    qk_norm = kind != "flamingo without qk norms"
    perceiver = dict(
        use_resampler=True, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=3, resampler_head_dim=12
    )
    vision = vision_fields(num_hidden_layers=2)
    config = transformers.IdeficsConfig(
        vocab_size=96, additional_vocab_size=2, hidden_size=40, intermediate_size=72, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=64, cross_layer_interval=2, alpha_initializer="ones",
        alpha_type="vector" if kind == "flamingo with vectors" else "float",
        qk_layer_norms=qk_norm, use_resampler=True, eos_token_id=2, rms_norm_eps=1e-5,
        tie_word_embeddings=kind == "flamingo with tied embeddings",
        perceiver_config=perceiver | dict(qk_layer_norms_perceiver=qk_norm),
        vision_config={"embed_dim": vision.pop("hidden_size")} | vision,
    )  # fmt: skip
    return transformers.IdeficsForVisionText2Text(config)


def make_qwen2vl(transformers, kind):
    """2.5: windows of 20 pixels are 4 x 4 patches (not 5 x 5: a token is not cut in two); layer 1 of 3 looks at the
    whole frame. Rows and columns of images turn 6 of 8 frequencies; heads are grouped by two."""
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
    text = text_fields(hidden_size=64, intermediate_size=80, max_position_embeddings=256, num_key_value_heads=2)
    text |= dict(rms_norm_eps=0.02, rope_parameters=rope, bos_token_id=1, eos_token_id=2)
    ids = dict(image_token_id=98, video_token_id=97, vision_start_token_id=96, vision_end_token_id=95)
    ids |= dict(tie_word_embeddings="tied" in kind, text_config=text)
    vision = dict(depth=3, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    if kind.startswith("qwen2.5vl"):
        vision |= dict(hidden_size=48, intermediate_size=72, out_hidden_size=64, window_size=20)
        vision |= dict(fullatt_block_indexes=[1], tokens_per_second=3)
        config = transformers.Qwen2_5_VLConfig(vision_config=vision, **ids)
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    vision |= dict(embed_dim=48, hidden_size=64, mlp_ratio=2, hidden_act="quick_gelu")
    return transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(vision_config=vision, **ids))


MAKE = dict(clip=make_clip, siglip=make_siglip, siglip2=make_siglip, vilt=make_vilt, llava=make_llava,
            blip2=make_blip2, flamingo=make_flamingo, qwen2vl=make_qwen2vl)  # fmt: skip


def family_of(kind):
    """The family that a kind of checkpoint belongs to: "qwen2.5vl tied" -> "qwen2vl"."""
    name = kind.split()[0]
    return {"siglip": "clip", "siglip2": "clip", "cogvlm2": "cogvlm", "qwen2.5vl": "qwen2vl"}.get(name, name)


@pytest.fixture(scope="session")
def oracles(tmp_path_factory):
    """kind -> (the oracle, the folder it is saved in), each made once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            if family_of(kind) == "cogvlm":
                made[kind] = NaiveCogVLM(second=kind == "cogvlm2"), folder
            else:
                torch.manual_seed(0)
                make = MAKE.get(kind.split()[0], make_qwen2vl)
                made[kind] = randomise(make(quiet_transformers(), kind)), folder
            made[kind][0].save_pretrained(folder)
        return made[kind]

    return get


@pytest.fixture
def load(oracles):
    """kind -> our model with the oracle's weights."""
    return lambda kind, **options: MODELS[family_of(kind)].from_pretrained(oracles(kind)[1], **options)


def write_config(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def resave(folder, target, change):
    """A copy of a checkpoint whose tensors (a dict of name -> tensor) are changed -> its folder."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    return target


# CogVLM is not in transformers. Its oracle is a second implementation, from the paper and the published layout, which
# shares nothing with the repo.


def cogvlm_fields(second):
    """The published config.json at toy size; second: CogVLM2. No number is a default of ours: what is not read is
    noticed."""
    vision = dict(hidden_size=16, num_hidden_layers=3, num_heads=2, intermediate_size=24, patch_size=8, in_channels=3)
    vision |= dict(dropout_prob=0.0, hidden_act="gelu", layer_norm_eps=0.02)
    vision |= dict(image_size=32, num_positions=17) if second else dict(image_size=24, num_positions=10)
    fields = dict(architectures=["CogVLMForCausalLM"], vocab_size=60, hidden_size=24, intermediate_size=40)
    fields |= dict(num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, rms_norm_eps=0.05)
    fields |= dict(bos_token_id=4, eos_token_id=5, vision_config=vision)
    return fields | (dict(num_multi_query_heads=2) if second else {})


def cogvlm_tensors(raw, second):
    """Random tensors under the published names, in the published shapes, written down independently of cogvlm.py."""
    v, V, D, M = raw["vision_config"], raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"]
    Dv, Mv, P = v["hidden_size"], v["intermediate_size"], v["patch_size"]
    qkv = D + 2 * 2 * D // raw["num_attention_heads"] if second else 3 * D
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(raw["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": (D,), f"{at}post_attention_layernorm.weight": (D,)}
        for kind in ("vision", "language"):
            shapes[f"{at}self_attn.{kind}_expert_query_key_value.weight"] = (qkv, D)
            shapes[f"{at}self_attn.{kind}_expert_dense.weight"] = (D, D)
            shapes |= {f"{at}mlp.{kind}_mlp.{name}_proj.weight": (M, D) for name in ("gate", "up")}
            shapes[f"{at}mlp.{kind}_mlp.down_proj.weight"] = (D, M)
        if second:
            shapes[f"{at}self_attn.vision_expert_query_key_value.bias"] = (qkv,)
    linear = {"patch_embedding.proj": (Dv, 3, P, P), "linear_proj.norm1": (D,)}
    for i in range(v["num_hidden_layers"]):
        at = f"transformer.layers.{i}."
        linear |= {f"{at}attention.query_key_value": (3 * Dv, Dv), f"{at}attention.dense": (Dv, Dv)}
        linear |= {f"{at}mlp.fc1": (Mv, Dv), f"{at}mlp.fc2": (Dv, Mv)}
        linear |= {f"{at}input_layernorm": (Dv,), f"{at}post_attention_layernorm": (Dv,)}
    if second:
        linear["conv"] = (Dv, Dv, 2, 2)
    at = "model.vision."
    for name, shape in linear.items():
        shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
    for name, shape in {"linear_proj": (D, Dv), "gate_proj": (M, D), "dense_h_to_4h": (M, D)}.items():
        shapes[f"{at}linear_proj.{name}.weight"] = shape
    shapes |= {f"{at}linear_proj.dense_4h_to_h.weight": (D, M), f"{at}boi": (1, 1, D), f"{at}eoi": (1, 1, D)}
    shapes |= {f"{at}patch_embedding.cls_embedding": (1, Dv)}
    shapes |= {f"{at}patch_embedding.position_embedding.weight": (v["num_positions"], Dv)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t + 1 if "norm" in name and name.endswith(".weight") else t for name, t in tensors.items()}


class NaiveCogVLM:
    """CogVLM and CogVLM2 as plain as possible, in float64: one row, one head, one token's expert at a time."""

    image_id = 60  # image_token_id of the little checkpoints: one past their vocabulary

    def __init__(self, second):
        self.raw, self.second = cogvlm_fields(second), second
        self.tensors = cogvlm_tensors(self.raw, second)
        self.w = {name: t.double() for name, t in self.tensors.items()}
        self.image_tokens = 6 if second else 11  # 4 x 4 patches joined 2 x 2, or 3 x 3 patches; and boi and eoi

    def save_pretrained(self, folder, max_shard_size=None):
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, self.raw)
        if max_shard_size is None:
            return save_file(self.tensors, folder / "model.safetensors")
        names = sorted(self.tensors)
        files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: self.tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def layer_norm(self, x, name, eps):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def rms_norm(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + self.raw["rms_norm_eps"]).sqrt() * self.w[f"{name}.weight"]

    def read_image(self, pixels):
        """[3,H,W] -> [image_tokens,D], boi and eoi among them."""
        v, at = self.raw["vision_config"], "model.vision.patch_embedding."
        P, width, eps = v["patch_size"], v["hidden_size"], v["layer_norm_eps"]
        rows, columns = pixels.shape[1] // P, pixels.shape[2] // P
        kernel, tokens = self.w[f"{at}proj.weight"], [self.w[f"{at}cls_embedding"][0]]
        for y, x in itertools.product(range(rows), range(columns)):
            patch = pixels[:, y * P : y * P + P, x * P : x * P + P].double()
            tokens.append((kernel * patch).sum((1, 2, 3)) + self.w[f"{at}proj.bias"])
        x = torch.stack(tokens) + self.w[f"{at}position_embedding.weight"]
        for i in range(v["num_hidden_layers"]):
            at, size = f"model.vision.transformer.layers.{i}.", width // v["num_heads"]
            q, k, v_ = self.linear(x, f"{at}attention.query_key_value").split(width, dim=1)
            heads = [slice(h * size, (h + 1) * size) for h in range(v["num_heads"])]
            said = [torch.softmax(q[:, h] @ k[:, h].T / size**0.5, 1) @ v_[:, h] for h in heads]
            said = self.linear(torch.cat(said, 1), f"{at}attention.dense")
            x = x + self.layer_norm(said, f"{at}input_layernorm", eps)
            said = self.linear(F.gelu(self.linear(x, f"{at}mlp.fc1")), f"{at}mlp.fc2")
            x = x + self.layer_norm(said, f"{at}post_attention_layernorm", eps)
        x = x[1:]
        if self.second:
            kernel, grid, joined = self.w["model.vision.conv.weight"], x.view(rows, columns, width), []
            for y, z in itertools.product(range(0, rows, 2), range(0, columns, 2)):
                four = [kernel[:, :, dy, dx] @ grid[y + dy, z + dx] for dy in (0, 1) for dx in (0, 1)]
                joined.append(sum(four) + self.w["model.vision.conv.bias"])
            x = torch.stack(joined)
        at = "model.vision.linear_proj."
        x = F.gelu(self.layer_norm(self.linear(x, f"{at}linear_proj"), f"{at}norm1", 1e-5))
        x = F.silu(self.linear(x, f"{at}gate_proj")) * self.linear(x, f"{at}dense_h_to_4h")
        x = self.linear(x, f"{at}dense_4h_to_h")
        return torch.cat([self.w["model.vision.boi"][0], x, self.w["model.vision.eoi"][0]])

    def __call__(self, ids, pixels=None):
        """ids [B,T], pixels [images,3,H,W] -> logits [B,T,V]."""
        images, logits = iter(() if pixels is None else pixels), []
        for row in ids:
            wanted = int((row == self.image_id).sum()) // self.image_tokens
            logits.append(self.row(row.tolist(), [self.read_image(next(images)) for _ in range(wanted)]))
        assert next(images, None) is None
        return torch.stack(logits).float()

    def row(self, ids, images):
        """Ids and the features of their images -> logits [T,V]. Every image token but the last of an image takes the
        vision experts; all patches of an image share one position."""
        waiting = [vector for image in images for vector in image]
        vision = [i == self.image_id for i in ids]
        x = torch.stack([waiting.pop(0) if v else self.w["model.embed_tokens.weight"][i] for i, v in zip(ids, vision)])
        inside = [all(vision[max(0, t - 1) : t + 2]) and 0 < t < len(ids) - 1 for t in range(len(ids))]  # patches
        experts, positions = [], []
        for t in range(len(ids)):
            experts.append("vision" if vision[t] and vision[t + 1 : t + 2] == [True] else "language")
            stays = inside[t] and inside[t - 1]
            positions.append(0 if t == 0 else positions[-1] + (not stays))
        heads, size = self.raw["num_attention_heads"], self.raw["hidden_size"] // self.raw["num_attention_heads"]
        key_heads = self.raw.get("num_multi_query_heads", heads)
        angles = torch.arange(0, size, 2).double() / size
        angles = torch.tensor(positions)[:, None] / (500000.0 if self.second else 10000.0) ** angles  # [T,size / 2]
        causal = torch.ones(len(ids), len(ids)).tril().bool()

        def turn(x):
            a, b = x.chunk(2, dim=1)
            return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], 1)

        def by_expert(x, name):
            return torch.stack([self.linear(x_t, name.format(kind)) for x_t, kind in zip(x, experts)])

        for i in range(self.raw["num_hidden_layers"]):
            at = f"model.layers.{i}."
            qkv = by_expert(self.rms_norm(x, f"{at}input_layernorm"), at + "self_attn.{}_expert_query_key_value")
            parts, said = qkv.split(size, dim=1), []
            for h in range(heads):
                shared = h * key_heads // heads
                q, k, v = turn(parts[h]), turn(parts[heads + shared]), parts[heads + key_heads + shared]
                scores = (q @ k.T / size**0.5).masked_fill(~causal, -torch.inf)
                said.append(torch.softmax(scores, 1) @ v)
            x = x + by_expert(torch.cat(said, 1), at + "self_attn.{}_expert_dense")
            y, mlp = self.rms_norm(x, f"{at}post_attention_layernorm"), at + "mlp.{}_mlp."
            x = x + by_expert(
                F.silu(by_expert(y, mlp + "gate_proj")) * by_expert(y, mlp + "up_proj"), mlp + "down_proj"
            )
        return self.rms_norm(x, "model.norm") @ self.w["lm_head.weight"].T


# What they are asked


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row_with_images(length, starts, tokens, image_id=98, seed=0):
    """Random ids [length] with the placeholders of an image from each of these starts on."""
    ids = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(seed))
    for start in starts:
        ids[start : start + tokens] = image_id
    return ids


def texts_with_end(batch=3, length=12, end=99, seed=1):
    """Random ids with an end-of-text token somewhere and noise behind it, and the mask of what is real."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (batch, length), generator=generator)
    last = torch.randint(3, length, (batch,), generator=generator)
    ids[torch.arange(batch), last] = end
    return ids, torch.arange(length)[None] <= last[:, None]


def vilt_batch(seed=0):
    """Three images of different sizes (24 x 32, 40 x 16, 32 x 32 pixels, in patches of 8), padded to 40 x 32, and three
    texts of different length, padded on the right: pixels, pixel_mask, ids, mask."""
    generator = torch.Generator().manual_seed(seed)
    pixels, pixel_mask = torch.zeros(3, 3, 40, 32), torch.zeros(3, 40, 32, dtype=torch.bool)
    for i, (height, width) in enumerate([(24, 32), (40, 16), (32, 32)]):
        pixels[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        pixel_mask[i, :height, :width] = True
    ids = torch.randint(5, 90, (3, 9), generator=generator)
    mask = torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]
    return pixels, pixel_mask, ids, mask


def flamingo_rows():
    """Three rows of 18 tokens and their media_mask: text before the first of two images; two images in a row at the
    start; one image, at the end, whose second place is padding. 97 is <image>."""
    ids = torch.randint(3, 90, (3, 18), generator=torch.Generator().manual_seed(1))
    for row, places in enumerate(((4, 11), (0, 1), (15,))):
        ids[row, list(places)] = 97
    return ids, torch.tensor([[True, True], [True, True], [True, False]])


def flamingo_media(ids, media_mask):
    return noise(*media_mask.shape, 3, 32, 32, seed=2) * media_mask[..., None, None, None]


QWEN_IMAGE, QWEN_VIDEO = 98, 97
QWEN_A, QWEN_B, QWEN_C, QWEN_CLIP = (1, 8, 4), (1, 2, 2), (1, 4, 14), (2, 4, 8)  # grids of images, and of a clip

QWEN_CASES = {  # rows of pieces: so many words, or an image or a clip of this grid
    "text only": [[12]],
    "one image": [[3, (QWEN_IMAGE, QWEN_A), 5]],
    "images of several sizes": [[2, (QWEN_IMAGE, QWEN_A), 1, (QWEN_IMAGE, QWEN_B), 2, (QWEN_IMAGE, QWEN_C), 4]],
    "image at the start": [[(QWEN_IMAGE, QWEN_C), 4]],
    "image at the end": [[4, (QWEN_IMAGE, QWEN_C)]],
    "a video": [[3, (QWEN_VIDEO, QWEN_CLIP), 5]],
    "image and videos": [[3, (QWEN_VIDEO, QWEN_CLIP), 2, (QWEN_IMAGE, QWEN_B), 1, (QWEN_VIDEO, (1, 6, 4)), 3]],
    "rows of all kinds": [
        [3, (QWEN_IMAGE, QWEN_A), 2, (QWEN_IMAGE, QWEN_B), 24],
        [38],
        [1, (QWEN_VIDEO, QWEN_CLIP), 2, (QWEN_IMAGE, QWEN_C), 5],
    ],
}


def qwen_row(*pieces, seed=0):
    """A row of ids: numbers are so many random words, (id, grid) the tokens of an image or a clip, 2 x 2 patches
    each."""
    generator, row = torch.Generator().manual_seed(seed), []
    for piece in pieces:
        if isinstance(piece, int):
            row += torch.randint(3, 90, (piece,), generator=generator).tolist()
        else:
            row += [piece[0]] * (math.prod(piece[1]) // 4)
    return row


def qwen_patches(*grids, seed=1, width=96):
    """Random patches and the grids of these images: what preprocess gives. A patch is 3 x 2 x 4 x 4 numbers here, 384
    in the tiny preset."""
    return noise(sum(math.prod(grid) for grid in grids), width, seed=seed), torch.tensor(grids)


def qwen_case(name):
    """-> the arguments of our model."""
    rows = QWEN_CASES[name]
    given = dict(ids=torch.tensor([qwen_row(*pieces, seed=i) for i, pieces in enumerate(rows)]))
    if grids := [piece[1] for pieces in rows for piece in pieces if not isinstance(piece, int)]:
        given["patches"], given["grid_thw"] = qwen_patches(*grids)
    return given


def qwen_published(ids, patches=None, grid_thw=None, mask=None, seconds=None):
    """The arguments of our model -> those of the published classes, where images and clips come apart."""
    given = dict(input_ids=ids, mm_token_type_ids=(ids == QWEN_IMAGE).int() + 2 * (ids == QWEN_VIDEO).int())
    if mask is not None:
        given["attention_mask"] = mask.int()
    if seconds is not None:  # theirs are of a step of two frames, ours from one frame to the next
        given["second_per_grid_ts"] = 2 * torch.tensor(seconds)
    found, flat, at = {QWEN_IMAGE: [], QWEN_VIDEO: []}, ids.flatten().tolist(), 0
    for i, grid in enumerate([] if grid_thw is None else grid_thw.tolist()):
        while flat[at] not in found:
            at += 1
        found[flat[at]].append(i)
        at += math.prod(grid) // 4
    for token, names in {
        QWEN_IMAGE: ("pixel_values", "image_grid_thw"),
        QWEN_VIDEO: ("pixel_values_videos", "video_grid_thw"),
    }.items():
        if found[token]:
            apart = patches.split(grid_thw.prod(1).tolist())
            given |= dict(zip(names, (torch.cat([apart[i] for i in found[token]]), grid_thw[found[token]])))
    return given


def published_logits(oracle, kind, ids, mask=None, **given):
    """What the oracle gives for the arguments of our model."""
    if family_of(kind) == "cogvlm":
        return oracle(ids, **given)
    if family_of(kind) == "qwen2vl":
        return oracle(**qwen_published(ids, mask=mask, **given)).logits
    if family_of(kind) != "flamingo":
        return oracle(input_ids=ids, pixel_values=given.get("pixels")).logits
    media = given.get("media", torch.zeros(len(ids), 1, 3, 32, 32))  # the published class asks for images all the same
    latest = (ids == 97).cumsum(1) - 1  # the published processor spells out which image each token attends to
    sees = latest[..., None] == torch.arange(media.shape[1])  # [B,T,media]
    return oracle(input_ids=ids, pixel_values=media, image_attention_mask=sees.long()).logits


def is_image(kind, ids):
    """Which ids are placeholders, or other tokens that announce an image or a clip."""
    return ids >= (60 if family_of(kind) == "cogvlm" else 95)


LLAVAS = ["llava", "llava with grouped heads", "llava with class token", "llava with tied embeddings"]
FLAMINGOS = ["flamingo", "flamingo with vectors", "flamingo without qk norms", "flamingo with tied embeddings"]
COGVLMS = ["cogvlm", "cogvlm2"]
QWENS = ["qwen2vl", "qwen2vl tied", "qwen2.5vl", "qwen2.5vl tied"]
DECODERS = [*LLAVAS, "blip2", *FLAMINGOS, *COGVLMS, *QWENS]


def inputs(kind):
    """A kind of checkpoint with a decoder -> {what: the arguments of our model}; the first is the richest."""
    if kind in LLAVAS:
        n = 17 if kind == "llava with class token" else 16
        rows = [row_with_images(45, [3, 24], n, seed=1), row_with_images(45, [6], n), row_with_images(45, [], n)]
        several = dict(ids=torch.stack(rows), pixels=noise(3, 3, 32, 32))
        one = dict(ids=row_with_images(30, [4], n)[None], pixels=noise(1, 3, 32, 32))
        return {"rows of images": several, "one image": one, "text only": dict(ids=several["ids"][2:])}
    if kind == "blip2":
        ids = torch.stack([row_with_images(22, [4], 6, seed=1), row_with_images(22, [0], 6, seed=2)])
        several = dict(ids=ids, pixels=noise(2, 3, 32, 32))
        return {"two rows": several, "one row": dict(ids=ids[:1], pixels=several["pixels"][:1])}
    if kind in FLAMINGOS:
        ids, media_mask = flamingo_rows()
        media = flamingo_media(ids, media_mask)
        one = dict(ids=ids[2:], media=media[2:, :1])
        text = dict(ids=ids.masked_fill(ids == 97, 5))
        return {"rows of media": dict(ids=ids, media=media, media_mask=media_mask), "one": one, "text only": text}
    if kind in COGVLMS:
        n, side = (6, 32) if kind == "cogvlm2" else (11, 24)
        starts = [[2, n + 3], [1], [0], [29 - n], []]  # the last: an image that ends one word before the row does
        rows = torch.stack([row_with_images(30, at, n, 60, seed=i) for i, at in enumerate(starts)])
        one = dict(ids=rows[1:2], pixels=noise(1, 3, side, side))
        return {"rows of images": dict(ids=rows, pixels=noise(5, 3, side, side)), "one image": one,
                "text only": dict(ids=rows[4:])}  # fmt: skip
    cases = {name: qwen_case(name) for name in reversed(QWEN_CASES)}
    if kind.startswith("qwen2.5vl"):
        cases |= {f"{s} seconds a frame": qwen_case("a video") | dict(seconds=[s]) for s in (0.15, 0.25, 0.35)}
    return cases


# ----------------------------------------------------------------------------------------------------------------------
# What all of them must do

CASES = [(kind, what) for kind in DECODERS for what in inputs(kind)]
RICHEST = {kind: next(iter(inputs(kind).values())) for kind in DECODERS}
EXAMPLES = RICHEST | {  # every kind of model, and arguments that use all it has
    "clip": dict(ids=texts_with_end()[0], pixels=noise(3, 3, 32, 32)),
    "siglip": dict(ids=texts_with_end()[0], pixels=noise(3, 3, 32, 32)),
    "vilt mlm": dict(zip(("pixels", "pixel_mask", "ids", "mask"), vilt_batch())),
}


@pytest.mark.parametrize("kind, what", CASES)
@torch.no_grad()
def test_logits_equal_those_of_the_published_model(oracles, load, kind, what):
    given = inputs(kind)[what]
    theirs = published_logits(oracles(kind)[0], kind, **given)
    close(load(kind)(**given), theirs)
    assert theirs.abs().max() > 0.5  # of a size at which 1e-5 means something


def watch_steps(monkeypatch, kind):
    """The logits of every step of `generate` -> a list that fills; no placeholder is chosen, which would announce an
    image."""
    steps, module = [], MODULES[family_of(kind)]

    def sample(logits, *options, choose=module.sample):
        steps.append(logits)
        return choose(logits.masked_fill(is_image(kind, torch.arange(logits.shape[-1])), -torch.inf), *options)

    monkeypatch.setattr(module, "sample", sample)
    return steps


@pytest.mark.parametrize("kind, what", CASES)
@torch.no_grad()
def test_greedy_tokens_equal_those_of_the_published_model(oracles, load, monkeypatch, kind, what):
    """The published model runs without its cache: its own `generate` miscounts positions after an image at the end."""
    watch_steps(monkeypatch, kind)
    given = dict(inputs(kind)[what])
    ours = load(kind).generate(**given, max_new_tokens=8)
    for _ in range(8):
        logits = published_logits(oracles(kind)[0], kind, **given)[:, -1]
        words = logits.masked_fill(is_image(kind, torch.arange(logits.shape[-1])), -torch.inf).argmax(-1)
        given["ids"] = torch.cat([given["ids"], words[:, None]], 1)
    assert torch.equal(ours, given["ids"][:, -8:])


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_padding_on_either_side_changes_no_logit_and_prompts_are_padded_on_the_left(load, kind):
    """The first row is padded; in the others the same columns contain words."""
    model, given = load(kind), RICHEST[kind]
    expected, words = model(**given), model.generate(**given, max_new_tokens=9)
    for left in (True, False):
        space = (5, 0) if left else (0, 5)
        longer = given | dict(ids=F.pad(given["ids"], space, value=7))
        mask = torch.ones_like(longer["ids"], dtype=torch.bool)
        mask[0] = F.pad(torch.ones_like(mask[0, 5:]), space)
        logits = model(**longer, mask=mask)
        close(logits[0][mask[0]], expected[0])
        close(logits[1:], model(**longer)[1:])
        if left:
            padded = model.generate(**longer, mask=mask, max_new_tokens=9)
            assert torch.equal(padded[0], words[0])
            assert torch.equal(padded[1:], model.generate(**longer, max_new_tokens=9)[1:])
        else:
            with refuses(ValueError, "left"):
                model.generate(**longer, mask=mask)


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_logits_with_the_cache_equal_those_without(load, monkeypatch, kind):
    """On logits: a wrong cache still picks mostly the right words. Without padding and with the first row padded."""
    model, given, steps = load(kind), RICHEST[kind], watch_steps(monkeypatch, kind)
    for columns in (0, 3):
        prompt = F.pad(given["ids"], (columns, 0), value=7)
        mask = torch.ones_like(prompt, dtype=torch.bool)
        mask[0, :columns] = False
        words = model.generate(**given | dict(ids=prompt, mask=mask), max_new_tokens=9)
        full = given | dict(ids=torch.cat([prompt, words], 1), mask=F.pad(mask, (0, 9), value=True))
        close(torch.stack(steps, 1), model(**full)[:, -10:-1])
        steps.clear()


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_a_later_token_or_another_image_changes_only_what_follows(load, kind):
    model, given = load(kind), RICHEST[kind]
    images = is_image(kind, given["ids"])
    ids = given["ids"].clone()
    ids[:, -1] = torch.where(images[:, -1], ids[:, -1], 7)  # an image at the end of a row stays
    before, after = model(**given), model(**given | dict(ids=ids))
    assert torch.equal(after[:, :-1], before[:, :-1]) and not torch.equal(after[:, -1], before[:, -1])
    after = model(**{name: x + 1 if x.is_floating_point() else x for name, x in given.items()})
    follows = images.cumsum(1) > 0
    assert torch.equal(after[~follows], before[~follows])
    assert not (after == before)[:, -1].all(-1)[follows[:, -1]].any()


@pytest.mark.parametrize("kind", DECODERS)
def test_generate_encodes_the_images_once_and_remembers_nothing(load, kind):
    model, given, calls = load(kind), RICHEST[kind], []
    parts = [model.vision, getattr(model, "connector", None), getattr(model, "qformer", None)]  # Flamingo's, BLIP-2's
    for part in filter(None, parts):
        part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    first = model.generate(**given, max_new_tokens=8)
    assert calls and len(calls) == len(set(calls))
    assert torch.equal(model.generate(**given, max_new_tokens=8), first)


@pytest.mark.parametrize("kind", ["llava", "blip2", *COGVLMS])
@torch.no_grad()
def test_without_an_image_a_model_is_its_language_model(load, kind):
    model, ids = load(kind), row_with_images(13, [], 0)[None]
    assert torch.equal(model(ids=ids, pixels=None), model.language(ids))


@pytest.mark.parametrize("kind", [*LLAVAS, "blip2", *COGVLMS])
def test_placeholders_that_do_not_fit_the_images_are_an_error_with_both_counts(load, kind):
    model, given = load(kind), RICHEST[kind]
    ids, image_id = given["ids"], model.config.image_token_id
    need, first = int((ids == image_id).sum()), int((ids[0] == image_id).nonzero()[0])
    too_few, too_many = ids.clone(), ids.clone()
    too_few[0, first], too_many[0, -1] = 5, image_id
    wrong = [(too_few, given["pixels"], need - 1), (too_many, given["pixels"], need + 1), (ids, None, need)]
    for ids, pixels, found in wrong + [(ids[:, -1:], given["pixels"], 0)]:
        for call in (model, model.generate):
            with refuses(ValueError, found, 0 if pixels is None else need):
                call(ids=ids, pixels=pixels)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("kind", EXAMPLES)
@torch.no_grad()
def test_sixteen_bits_stay_near_float32_and_finite_for_bright_images(load, kind, dtype, tolerance):
    half, given = load(kind, dtype=dtype), EXAMPLES[kind]
    assert {p.dtype for p in half.parameters()} == {dtype}
    close(half(**given).float(), load(kind)(**given), tolerance)
    bright = {name: 30 * x if x.is_floating_point() else x for name, x in given.items()}
    assert half(**bright).isfinite().all()
    if kind in DECODERS:
        assert half.generate(**bright, max_new_tokens=4).shape == (len(given["ids"]), 4)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_model_learns_and_generates_under_autocast(load, kind):
    """Linear maps then give bfloat16, norms float32: what meets in attention and in the cache must have one dtype."""
    model, given = load(kind), EXAMPLES[kind]
    plain = model(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**given)
        if kind in DECODERS:
            assert model.generate(**given, max_new_tokens=4).shape == (len(given["ids"]), 4)
    close(mixed.float(), plain, 0.1)
    mixed.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["clip", "flamingo", "cogvlm", "blip2", "llava"])
def test_a_batch_of_nothing_gives_nothing(family):
    model = tiny_model(family)
    given, _ = tiny_batch(model, family, stage=2)
    assert model(**given).numel() and model(**{name: x[:0] for name, x in given.items()}).shape[0] == 0


IMPOSSIBLE = (dict(top_k=0), dict(top_k=-1), dict(temperature=-1.0), dict(temperature=math.nan))


@pytest.mark.parametrize("kind", ["llava", "blip2", "flamingo", "cogvlm", "qwen2vl"])
def test_options_that_mean_nothing_and_an_empty_prompt_are_errors_that_name_them(load, kind):
    model, given = load(kind), RICHEST[kind]
    for options in (*IMPOSSIBLE, dict(max_new_tokens=-1)):
        with refuses(ValueError, *[f"{name}={value}" for name, value in options.items()]):
            model.generate(**given, **dict(temperature=1.0) | options)
    for ids in (given["ids"][:0], given["ids"][:, :0]):
        with refuses(ValueError, list(ids.shape)):
            model.generate(**given | dict(ids=ids))
        with refuses(ValueError, list(ids.shape)):
            model.generate(ids)


# The tiny presets, which the toys are


def tiny_model(family):
    torch.manual_seed(0)
    changes = dict(tasks=("mlm", "vqa"), answers=4) if family == "vilt" else {}
    return MODELS[family](replace(MODULES[family].PRESETS["tiny"], **changes))


def tiny_batch(model, family, stage=None):
    """Four images with the same words but one, the last: only the image tells which -> arguments of the model, labels
    of that word."""
    config, words, pixels = model.config, torch.tensor([[10, 11, 12, 13, 14]] * 4), noise(4, 3, 32, 32)
    words[:, -1] = torch.arange(20, 24)
    labels = torch.full_like(words, -100)
    labels[:, -1] = words[:, -1]
    if family == "clip":
        return dict(ids=F.pad(words, (0, 1), value=world.EOS_ID), pixels=pixels), None
    if family == "vilt":
        return dict(ids=words.masked_fill(labels > 0, world.MASK_ID), pixels=pixels), labels
    if family == "blip2" and stage == 1:
        ids = F.pad(F.pad(words, (1, 0), value=world.CLS_ID), (0, 1), value=world.SEP_ID)
        return dict(ids=ids, pixels=pixels), None
    given = dict(pixels=pixels)
    if family == "qwen2vl":
        given = dict(zip(("patches", "grid_thw"), qwen_patches(*[(1, 4, 4)] * 4, width=384)))
    if family == "flamingo":
        given = dict(media=pixels[:, None])
    tokens = dict(flamingo=1, qwen2vl=4).get(family) or MODULES[family].num_image_tokens(32, 32, config)
    image = torch.full((4, tokens), config.image_token_id)
    given["ids"] = torch.cat([words[:, :1], image, words[:, 1:]], 1)
    return given, F.pad(labels, (tokens, 0), value=-100)


def tiny_loss(model, family, stage, given, labels, step=0):
    """The loss that a family trains with -> loss, metrics."""
    if family == "clip":
        return model.loss(model.encode_image(given["pixels"]), model.encode_text(given["ids"]))
    if family == "vilt":
        hidden = model(**given)
        mlm, metrics = vilt.mlm_loss(model.mlm_logits(hidden[:, : labels.shape[1]]), labels)
        vqa, score = vilt.vqa_loss(model.vqa_logits(hidden), torch.eye(4))
        return mlm + vqa, metrics | score
    if family == "blip2" and stage == 1:
        return model.stage1_loss(**given, generator=torch.Generator().manual_seed(step))
    return MODULES[family].language_loss(model(**given), labels)


FROZEN_TEXT = r"word_embeddings|position_embeddings|layers\.\d\.(mlp|ln)_text"  # the half that stage 2 does not use
TRAINS = {  # family, stage -> what the names of the parameters look like that train
    ("clip", None): ".*",
    ("vilt", None): ".*",
    ("flamingo", None): r"connector|gated_blocks|language\.(embed_tokens|lm_head)",  # of the tables the new rows only
    ("cogvlm", None): r"adapter|.*\.vision_expert\.",
    ("blip2", 1): r"query_tokens|qformer|vision\.ln_post|(vision|text)_projection|itm_head",
    ("blip2", 2): rf"query_tokens|qformer\.(?!{FROZEN_TEXT})|vision\.ln_post|language_projection",
    ("llava", 1): "mm_projector",
    ("llava", 2): "mm_projector|language",
    ("qwen2vl", 1): "vision|merger",
    ("qwen2vl", 2): "vision|merger|language",
    ("qwen2vl", 3): "language",
}


def tiny_parameters(model, family, stage):
    """What trains, from the family's freeze where it has one."""
    if family in ("clip", "vilt"):
        return list(model.parameters())
    return MODULES[family].freeze(model, *[stage] * (stage is not None))


@pytest.mark.parametrize("family, stage", [key for key in TRAINS if key[0] not in ("clip", "vilt")])
def test_training_moves_what_freeze_says_and_not_one_bit_else(family, stage):
    model = tiny_model(family)
    parameters, before = tiny_parameters(model, family, stage), copy.deepcopy(model.state_dict())
    given, labels = tiny_batch(model, family, stage)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(2):  # behind Flamingo's closed gates nothing moves at the first step
        optimizer.zero_grad()
        tiny_loss(model, family, stage, given, labels)[0].backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trains = {name for name, _ in model.named_parameters() if re.match(TRAINS[family, stage], name)}
    # what CogVLM's last layer computes from an image token is read by no word: its experts there get no gradient
    unread = r"language\.layers\.2\.vision_expert\.(?!query_key_value)" if family == "cogvlm" else "$"
    assert moved == {name for name in trains if not re.match(unread, name)}
    assert len(parameters) == len(trains)
    if stage is not None:
        with refuses(KeyError, 9):
            MODULES[family].freeze(model, 9)


BY_HEART = [key for key in TRAINS if key[0] not in ("llava", "qwen2vl") or key[1] == 2]


@pytest.mark.parametrize("family, stage", BY_HEART)
def test_a_batch_is_learned_by_heart_from_the_images_alone(family, stage):
    model = tiny_model(family)
    if family in ("flamingo", "cogvlm") or (family, stage) == ("blip2", 2):
        table = model.language.embed_tokens if family == "blip2" else model.language.lm_head
        table.weight.data *= 20  # a frozen decoder of small numbers cannot be sure of a word
    given, labels = tiny_batch(model, family, stage)
    optimizer = torch.optim.AdamW(tiny_parameters(model, family, stage), lr=3e-3, weight_decay=0.0)
    for step in range(150):
        loss, metrics = tiny_loss(model, family, stage, given, labels, step)
        if loss < 0.5 and all(value == 1 for name, value in metrics.items() if re.search("accuracy|score", name)):
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"not learned: {loss} {metrics}")


def test_a_model_starts_at_the_log_of_the_vocabulary():
    torch.manual_seed(0)
    model, ids = llava.LanguageModel(llava.PRESETS["tiny"].language), torch.randint(0, 512, (4, 50))
    assert llava.language_loss(model(ids), ids)[0].item() == pytest.approx(math.log(512), abs=0.1)


def test_language_loss_shifts_labels_once_and_ignores_what_does_not_count():
    logits, labels = torch.randn(2, 5, 11), torch.tensor([[1, 2, 3, -100, 4], [-100, -100, 5, 6, -100]])
    counted = [(b, t) for b in range(2) for t in range(1, 5) if labels[b, t] >= 0]
    expected = torch.stack([logits[b, t - 1].log_softmax(-1)[labels[b, t]] for b, t in counted])
    assert llava.language_loss(logits, labels)[0].item() == pytest.approx(-expected.mean().item(), abs=1e-6)
    with refuses(ValueError, "label"):
        llava.language_loss(logits, torch.full((2, 5), -100))


def test_generation_options():
    """top_k = 1 and a tiny temperature are argmax, a seed repeats a draw, eos ends a row and fills it, no new tokens is
    an empty answer."""
    torch.manual_seed(0)
    model, ids = llava.LLaVA(llava.PRESETS["tiny"]), torch.randint(0, 400, (3, 9))
    greedy = model.generate(ids, max_new_tokens=12)
    assert torch.equal(model.generate(ids, max_new_tokens=12, temperature=1.3, top_k=1), greedy)
    assert torch.equal(model.generate(ids, max_new_tokens=12, temperature=1e-40), greedy)
    draw = lambda seed: model.generate(ids, temperature=2.0, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(5), draw(5)) and not torch.equal(draw(5), draw(6))
    eos = int(greedy[0, 3])
    for ends in (eos, [eos], (eos, int(greedy[1, 2])), torch.tensor([450, eos])):  # the first of several fills the row
        ended = model.generate(ids, max_new_tokens=12, eos_id=ends)
        ends = torch.as_tensor(ends).view(-1).tolist()
        for row, full in zip(ended.tolist(), greedy.tolist()):
            stop = min([full.index(i) + 1 for i in ends if i in full], default=len(row))
            assert row[:stop] == full[:stop] and set(row[stop:]) <= {ends[0]}
    assert model.generate(ids, max_new_tokens=0).shape == (3, 0)
    for call in (lambda: model.generate(ids, max_new_tokens=300), lambda: model(ids[:, :1].repeat(1, 300))):
        with refuses(ValueError, 256):
            call()


def test_sampling_draws_from_the_k_most_likely_in_proportion():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20000, 1)
    drawn = llava.sample(logits, 2.0, 3, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    close(drawn, F.pad(torch.softmax(torch.tensor([0.5, 1.0, 1.5]), 0), (1, 0)), 0.02)


def test_rms_norm_does_not_overflow_in_half_precision():
    norm, x = llava.RMSNorm(64, 1e-5).half(), 500 * torch.randn(7, 64)
    assert norm(torch.full((1, 64), 60000.0).half()).isfinite().all()
    close(norm(x.half()).float(), llava.RMSNorm(64, 1e-5)(x), 2e-3)


def test_pad_rows_puts_padding_where_it_is_told():
    ids, mask = llava.pad_rows([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[True] * 3, [True, False, False]]
    ids, mask = llava.pad_rows([[1, 2, 3], [4]], 9, left=True)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[True] * 3, [False, False, True]]


# Images become squares of numbers as the published processors make them


PROCESSORS = {  # family, preset -> the published processor, its options, and a change of our config
    ("clip", "clip-vit-base-patch32"): ("CLIP", {}, {}),
    ("clip", "siglip-base-patch16-224"): ("Siglip", {}, {}),
    ("flamingo", "idefics-9b"): ("Idefics", {}, {}),
    ("blip2", "blip2-opt-2.7b"): ("Blip", dict(size={"height": 224, "width": 224}), {}),
    ("llava", "llava-1.5-7b"): ("CLIP", dict(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}), {}),
    ("llava", "llava-1.5-13b"): ("Llava", dict(do_pad=True), dict(image_size=224, resize="pad")),
    ("cogvlm", "cogvlm-chat-17b"): ("Siglip", dict(size={"height": 490, "width": 490}, resample=3), {}),
}


@pytest.mark.parametrize("family, preset", PROCESSORS)
def test_preprocessing_equals_the_published_processor(family, preset):
    (name, options, changes), module = PROCESSORS[family, preset], MODULES[family]
    config = replace(module.PRESETS[preset].vision, **changes)
    if family == "cogvlm":  # which has no processor of its own: SigLIP's, with CLIP's colours
        options = options | dict(image_mean=config.mean, image_std=config.std)
    processor = getattr(quiet_transformers(), f"{name}ImageProcessorPil")(**options)
    for image in pictures():
        theirs = processor(image.convert("RGB"), return_tensors="pt")
        theirs = theirs if torch.is_tensor(theirs) else theirs["pixel_values"]
        assert torch.equal(module.preprocess([image], config), theirs.view(1, *theirs.shape[-3:])), image


chapter("all_seven")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a published one is loaded exactly, or refused with a reason


def sizes(width, mlp_width, layers, heads, **more):
    names = dict(hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers, num_attention_heads=heads)
    return names | more


CLIP_L = sizes(1024, 4096, 24, 16, patch_size=14)
CLIP_L_TEXT = sizes(768, 3072, 12, 12)
SO400M = sizes(1152, 4304, 27, 16)
LLAVA = dict(architectures=["LlavaForConditionalGeneration"], model_type="llava", image_token_index=32000)
LLAVA_TEXT = dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-05, vocab_size=32064)
LLAVA_VISION = CLIP_L | dict(model_type="clip_vision_model", image_size=336)
OPT = dict(model_type="opt", eos_token_id=50118)
QFORMER_TEXT = dict(vocab_size=30523, use_qformer_text_input=True)
BLIP2 = dict(architectures=["Blip2ForConditionalGeneration"], model_type="blip-2", vision_config={}, qformer_config={})
IDEFICS = dict(architectures=["IdeficsForVisionText2Text"], model_type="idefics", additional_vocab_size=2)
IDEFICS |= dict(cross_layer_interval=4, qk_layer_norms=True, use_resampler=True, rms_norm_eps=1e-6)
IDEFICS |= dict(perceiver_config={"qk_layer_norms_perceiver": True}, vision_config={"embed_dim": 1280})
COGVLM = dict(architectures=["CogVLMForCausalLM"], rms_norm_eps=1e-5, hidden_act="silu")
COGVLM_VISION = dict(num_hidden_layers=63, hidden_size=1792, patch_size=14, num_heads=16, intermediate_size=15360)
COGVLM_VISION |= dict(hidden_act="gelu", in_channels=3, dropout_prob=0.0, layer_norm_eps=1e-06)
QWEN = dict(rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}, eos_token_id=151645)
QWEN |= dict(rms_norm_eps=1e-6)
QWEN_VISION = dict(depth=32, num_heads=16, patch_size=14, in_chans=3, spatial_merge_size=2)
QWEN2 = dict(architectures=["Qwen2VLForConditionalGeneration"], model_type="qwen2_vl", max_position_embeddings=32768)
QWEN2_5 = dict(architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl")
QWEN2_5 |= dict(max_position_embeddings=128000)
QWEN2_5_VISION = dict(hidden_size=1280, intermediate_size=3420, tokens_per_second=2, window_size=112)
QWEN2_5_VISION |= dict(fullatt_block_indexes=[7, 15, 23, 31], hidden_act="silu")
VILT = dict(model_type="vilt")

PUBLISHED_CONFIGS = {  # preset -> what its config.json on the hub says; what equals the class's default is left out
    "clip-vit-base-patch32": dict(architectures=["CLIPModel"], model_type="clip"),
    "clip-vit-base-patch16": dict(architectures=["CLIPModel"], model_type="clip", vision_config={"patch_size": 16}),
    "clip-vit-large-patch14": dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=768, text_config=CLIP_L_TEXT,
        vision_config=CLIP_L,
    ),
    "clip-vit-large-patch14-336": dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=768, text_config=CLIP_L_TEXT,
        vision_config=CLIP_L | {"image_size": 336},
    ),
    "siglip-base-patch16-224": dict(architectures=["SiglipModel"], model_type="siglip"),
    "siglip2-giant-opt-patch16-384": dict(
        architectures=["SiglipModel"], model_type="siglip",
        text_config=SO400M | dict(vocab_size=256000, projection_size=1536),
        vision_config=sizes(1536, 6144, 40, 16, image_size=384, patch_size=16),
    ),
    "siglip-so400m-patch14-384": dict(
        architectures=["SiglipModel"], model_type="siglip", text_config=SO400M,
        vision_config=SO400M | dict(image_size=384, patch_size=14),
    ),
    "vilt-b32-mlm": VILT | {"architectures": ["ViltForMaskedLM"]},
    "vilt-b32-finetuned-vqa": VILT | {
        "architectures": ["ViltForQuestionAnswering"], "id2label": {str(i): f"answer {i}" for i in range(3129)},
    },
    "vilt-b32-finetuned-coco": VILT | {"architectures": ["ViltForImageAndTextRetrieval"], "max_image_length": None},
    "blip2-itm-vit-g": dict(
        architectures=["Blip2ForImageTextRetrieval"], model_type="blip-2", qformer_config=QFORMER_TEXT
    ),
    "blip2-opt-2.7b": BLIP2 | dict(
        image_token_index=50265, text_config=OPT | dict(
            hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=2560,
        )),
    "blip2-opt-6.7b": BLIP2 | dict(
        image_token_index=50265, text_config=OPT | dict(
            hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096,
        )),
    "llava-1.5-7b": LLAVA | dict(text_config=LLAVA_TEXT, vision_config=LLAVA_VISION),
    "llava-1.5-13b": LLAVA | dict(text_config=LLAVA_TEXT | sizes(5120, 13824, 40, 40), vision_config=LLAVA_VISION),
    "idefics-9b": IDEFICS,
    "idefics-80b": IDEFICS | sizes(8192, 22016, 80, 64, rms_norm_eps=1e-5),
    "cogvlm-chat-17b": COGVLM | sizes(4096, 11008, 32, 32) | dict(
        max_position_embeddings=2048, vocab_size=32000,
        vision_config=COGVLM_VISION | dict(image_size=490, num_positions=1226),
    ),
    "cogvlm2-llama3-19b": COGVLM | sizes(4096, 14336, 32, 32) | dict(
        max_position_embeddings=8192, vocab_size=128256, num_multi_query_heads=8, bos_token_id=128000,
        eos_token_id=[128001, 128009], vision_config=COGVLM_VISION | dict(image_size=1344, num_positions=9217),
    ),
    "qwen2-vl-2b": QWEN | QWEN2 | sizes(1536, 8960, 28, 12) | dict(
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
        vision_config=QWEN_VISION | dict(embed_dim=1280, mlp_ratio=4, hidden_size=1536),
    ),
    "qwen2-vl-7b": QWEN | QWEN2 | sizes(3584, 18944, 28, 28) | dict(
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
        vision_config=QWEN_VISION | dict(embed_dim=1280, mlp_ratio=4, hidden_size=3584),
    ),
    "qwen2.5-vl-3b": QWEN | QWEN2_5 | sizes(2048, 11008, 36, 16) | dict(
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
        vision_config=QWEN_VISION | QWEN2_5_VISION | dict(out_hidden_size=2048),
    ),
    "qwen2.5-vl-7b": QWEN | QWEN2_5 | sizes(3584, 18944, 28, 28) | dict(
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
        vision_config=QWEN_VISION | QWEN2_5_VISION | dict(out_hidden_size=3584),
    ),
}  # fmt: skip
PUBLISHED_COUNTS = {
    ("clip", "clip-vit-base-patch32"): 151_277_313,
    ("clip", "clip-vit-base-patch16"): 149_620_737,
    ("clip", "clip-vit-large-patch14"): 427_616_513,
    ("clip", "clip-vit-large-patch14-336"): 427_944_193,
    ("clip", "siglip-base-patch16-224"): 203_155_970,
    ("clip", "siglip-so400m-patch14-384"): 877_960_498,
    ("clip", "siglip2-giant-opt-patch16-384"): 1_871_885_426,
    ("vilt", "vilt-b32-mlm"): 112_217_658,
    ("vilt", "vilt-b32-finetuned-vqa"): 117_588_537,
    ("vilt", "vilt-b32-finetuned-coco"): 111_595_777,
    ("flamingo", "idefics-9b"): 8_929_679_632,
    ("flamingo", "idefics-80b"): 79_967_843_624,
    ("cogvlm", "cogvlm-chat-17b"): 17_639_685_376,
    ("cogvlm", "cogvlm2-llama3-19b"): 19_503_105_280,  # derived: the sum of the published layout's shapes
    ("blip2", "blip2-itm-vit-g"): 1_172_032_258,
    ("blip2", "blip2-opt-2.7b"): 3_744_679_936,
    ("blip2", "blip2-opt-6.7b"): 7_752_738_304,
    ("llava", "llava-1.5-7b"): 7_063_427_072,
    ("llava", "llava-1.5-13b"): 13_351_494_656,
    ("qwen2vl", "qwen2-vl-2b"): 2_208_985_600,
    ("qwen2vl", "qwen2-vl-7b"): 8_291_375_616,
    ("qwen2vl", "qwen2.5-vl-3b"): 3_754_622_976,
    ("qwen2vl", "qwen2.5-vl-7b"): 8_292_166_656,
}


@pytest.mark.parametrize("family, preset", PUBLISHED_COUNTS)
def test_a_preset_has_the_published_config_and_exactly_the_published_parameters(tmp_path, family, preset):
    """Name by name and shape by shape, on the meta device. CogVLM has no published class here, only a count."""
    module, raw = MODULES[family], PUBLISHED_CONFIGS[preset]
    beside = {"eos_token_id": [151645, 151643]} if family == "qwen2vl" else {}
    (tmp_path / "generation_config.json").write_text(json.dumps(beside))
    beside = {"resample": 2} if preset.startswith("siglip2") else {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(beside))
    config = module.config_from_published(write_config(tmp_path, raw))
    expected = module.PRESETS[preset]
    if preset.startswith("blip2-opt"):  # without a text side nothing reads its [DEC]
        expected = replace(expected, qformer=replace(expected.qformer, dec_token_id=config.qformer.dec_token_id))
    assert config == expected
    with torch.device("meta"):
        ours = {name: p.shape for name, p in MODELS[family](config).named_parameters()}
        assert sum(map(math.prod, ours.values())) == PUBLISHED_COUNTS[family, preset]
        if family == "cogvlm":
            return
        transformers, fields = quiet_transformers(), {name: x for name, x in raw.items() if x is not None}
        published = getattr(transformers, raw["architectures"][0])(transformers.AutoConfig.for_model(**fields))
        theirs = dict(published.named_parameters())
        if family == "llava":  # its files have other names than its modules
            inside = (r"^model\.language_model\.", "language_model.model."), (r"^lm_head", "language_model.lm_head")
            theirs = renamed(theirs, *inside, (r"^model\.", ""))
        weights = dict(pair for name, p in theirs.items() for pair in module.our_tensors(name, p))
        if family == "flamingo":
            module.fold_vocabulary(MODELS[family](config), weights)
    assert ours == {name: tensor.shape for name, tensor in weights.items()}


KINDS = ["clip", "siglip", "siglip2", "vilt mlm", "vilt vqa", "blip2 retrieval", *DECODERS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_in_shards_is_the_same_checkpoint(oracles, load, tmp_path, kind):
    oracle, _ = oracles(kind)
    oracle.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = MODELS[family_of(kind)].from_pretrained(tmp_path)
    same(model, load(kind))
    if hasattr(model, "language") and family_of(kind) != "blip2":
        assert (model.language.lm_head.weight is model.language.embed_tokens.weight) == ("tied" in kind)


def renamed(tensors, *changes):
    """The names of a checkpoint's tensors changed: (pattern, new) each."""
    names = {name: name for name in tensors}
    for pattern, new in changes:
        names = {name: re.sub(pattern, new, now) for name, now in names.items()}
    return {names[name]: tensor for name, tensor in tensors.items()}


OPT_TABLE = "language_model.model.decoder.embed_tokens.weight"
VILT_TABLE = "vilt.embeddings.text_embeddings.word_embeddings.weight"
LAYOUTS = {  # other layouts that a family's checkpoints have had: buffers, tied matrices saved twice, other names
    "clip, with buffers": lambda t: (
        t | {f"{side}_model.embeddings.position_ids": torch.arange(16)[None] for side in ("text", "vision")}
    ),
    "vilt mlm, with buffers and the output matrix twice": lambda t: t | {
        "mlm_score.decoder.weight": t[VILT_TABLE].clone(), "mlm_score.bias": t["mlm_score.decoder.bias"].clone(),
        "vilt.embeddings.text_embeddings.position_ids": torch.arange(14)[None],
    },
    "llava, the first, with buffers": lambda t: renamed(t, (r"^vision_tower\.", "vision_tower.vision_model.")) | {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    },
    "llava, a later one": lambda t: renamed(
        t, (r"language_model\.model\.", "language_model."), (r"language_model\.lm_head", "lm_head")
    ),
    "llava, what state_dict() calls it": lambda t: renamed(
        t, (r"language_model\.model\.", "language_model."), (r"language_model\.lm_head", "lm_head"),
        (r"^(?!lm_head)", "model."),
    ),
    "blip2, with buffers and the output matrix twice": lambda t: t | {
        "language_model.lm_head.weight": t[OPT_TABLE].clone(), "embeddings.position_ids": torch.arange(20)[None],
    },
    "flamingo, with buffers": lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)},
    "cogvlm, with buffers": lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
    "qwen2vl, a later one": lambda t: renamed(
        t, (r"^visual\.", "model.visual."), (r"^model\.(?!visual)", "model.language_model.")
    ),
    "qwen2.5vl, a later one, with buffers": lambda t: renamed(
        t, (r"^visual\.", "model.visual."), (r"^model\.(?!visual)", "model.language_model.")
    ) | {"model.visual.rotary_pos_emb.inv_freq": torch.ones(4)},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_that_checkpoints_have_had_is_read(oracles, load, tmp_path, layout):
    kind = layout.split(",")[0]
    folder = resave(oracles(kind)[1], tmp_path / "other", LAYOUTS[layout])
    same(MODELS[family_of(kind)].from_pretrained(folder), load(kind))


def test_flamingos_new_tokens_are_rows_of_one_table(oracles, load):
    oracle, model = oracles("flamingo")[0], load("flamingo")
    table, new = oracle.model.embed_tokens.weight, oracle.model.embed_tokens.additional_embedding.weight
    assert torch.equal(model.language.embed_tokens.weight, torch.cat([table, new]))
    assert model.language.lm_head.weight.shape == (98, 40) and model.config.new_token_ids == (96, 97)


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def also(name, *shape):
    return lambda tensors: tensors | {name: torch.ones(shape)}


BROKEN = [  # a kind of checkpoint, what is wrong with its tensors, what the error must name
    ("clip", without("visual_projection"), ["visual_projection.weight"]),
    ("clip", also("vision_model.gate", 2), ["gate"]),
    ("clip", also("vision_model.encoder.layers.7.mlp.fc1.bias", 64), ["blocks.7.mlp.fc1.bias"]),
    ("clip", also("visual_projection.weight", 24, 31), ["visual_projection.weight", "[24, 31]", "[24, 32]"]),
    ("siglip", also("vision_model.head.attention.in_proj_bias", 93), ["vision_head.q_proj.bias", "[31]", "[32]"]),
    ("vilt mlm", also("vilt.gate", 2), ["gate"]),
    ("vilt mlm", without("vilt.pooler.dense.bias"), ["pooler.bias"]),
    ("vilt mlm", also("vilt.encoder.layer.0.intermediate.dense.bias", 63), ["blocks.0.mlp.fc1.bias", "[63]", "[64]"]),
    ("llava", without("multi_modal_projector.linear_2.bias"), ["mm_projector", "bias"]),
    ("llava", also("language_model.lm_head.weight", 101, 32), ["lm_head.weight", "[101, 32]", "[100, 32]"]),
    ("blip2", without("query_tokens"), ["query_tokens"]),
    ("blip2", without("layers.1.self_attn.qkv.weight"), [f"vision.blocks.1.attn.{x}_proj.weight" for x in "qkv"]),
    ("blip2", also("qformer.gate", 2), ["qformer.gate"]),
    ("blip2", also("qformer.encoder.layer.0.output.dense.bias", 24), ["qformer.layers.0.mlp_text.fc2.bias"]),
    ("blip2", also("qformer.encoder.layer.1.crossattention.output.dense.bias", 24), ["layers.1.cross_attn"]),
    ("blip2", also("query_tokens", 1, 5, 24), ["query_tokens", "[1, 5, 24]", "[1, 6, 24]"]),
    ("flamingo", without("gated_cross_attn_layers.1.alpha_dense"), ["gated_blocks.1.ffw_gate"]),
    ("flamingo", without("additional_fc"), ["language.lm_head.weight", "[96,", "[98,"]),
    ("cogvlm", without("model.vision.boi"), ["adapter.boi"]),
    ("cogvlm", without("layers.1.attention.query_key_value.weight"), [f"blocks.1.attn.{x}_proj.weight" for x in "qkv"]),
    ("cogvlm", without("layers.1.mlp.vision_mlp.up_proj"), ["language.layers.1.vision_expert.mlp.up_proj.weight"]),
    ("cogvlm", also("model.vision.gate", 2), ["adapter.gate"]),
    ("cogvlm", also("model.vision.conv.bias", 16), ["adapter.conv.bias"]),  # CogVLM2's
    ("cogvlm", also("model.layers.2.input_layernorm.weight", 24), ["language.layers.2.input_layernorm.weight"]),
    ("cogvlm", also("lm_head.weight", 61, 24), ["lm_head.weight", "[61, 24]", "[60, 24]"]),
    ("qwen2.5vl", without("blocks.1.attn.qkv.bias"), ["vision.blocks.1.attn.k_proj.bias"]),
    ("qwen2.5vl", without("lm_head"), ["language.lm_head.weight"]),
    ("qwen2.5vl", also("visual.blocks.0.attn.rel_pos", 2), ["vision.blocks.0.attn.rel_pos"]),
    ("qwen2.5vl", also("visual.patch_embed.proj.weight", 48, 3, 1, 4, 4), ["patch_embedding", "[48, 48]", "[48, 96]"]),
]


@pytest.mark.parametrize("kind, change, words", BROKEN, ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_a_tensor_that_is_missing_unknown_or_of_another_shape_is_named(oracles, tmp_path, kind, change, words):
    with refuses(RuntimeError, *words):
        MODELS[family_of(kind)].from_pretrained(resave(oracles(kind)[1], tmp_path / "broken", change))


NOT_FOLLOWED = [  # a kind of checkpoint, the part of config.json, a change that would change results, what is named
    ("clip", "vision_config", dict(hidden_act="silu"), ["hidden_act", "'silu'"]),
    ("clip", "text_config", dict(hidden_act="silu"), ["hidden_act", "'silu'"]),
    ("siglip", "text_config", dict(projection_size=24), ["projection_size", 24, 32]),
    ("clip", None, dict(model_type="metaclip_2"), ["'metaclip_2'", "'clip'", "'siglip'"]),
    ("vilt mlm", None, dict(model_type="vit"), ["'vit'", "'vilt'"]),
    ("vilt mlm", None, dict(architectures=["ViltForImagesAndTextClassification"]), ["ViltForImagesAndTextClassif"]),
    ("vilt mlm", None, dict(modality_type_vocab_size=3), ["modality_type_vocab_size", 3]),
    ("vilt mlm", None, dict(type_vocab_size=1), ["type_vocab_size", 1]),
    ("vilt mlm", None, dict(qkv_bias=False), ["qkv_bias", False]),
    ("vilt mlm", None, dict(hidden_act="swish"), ["hidden_act", "'swish'"]),
    ("vilt mlm", None, dict(max_image_length=0), ["max_image_length", 0]),
    ("llava", "text_config", dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), ["linear"]),
    ("llava", "text_config", dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    ("llava", "text_config", dict(attention_bias=True), ["attention_bias", True]),
    ("llava", None, dict(projector_hidden_act="relu"), ["projector_hidden_act", "relu"]),
    ("blip2", "text_config", dict(model_type="t5"), ["model_type", "t5"]),
    ("blip2", "text_config", dict(do_layer_norm_before=False), ["do_layer_norm_before", False]),
    ("blip2", "text_config", dict(word_embed_proj_dim=16), ["word_embed_proj_dim", 16]),
    ("blip2", "text_config", dict(tie_word_embeddings=False), ["tie_word_embeddings", False]),
    ("blip2", "text_config", dict(activation_function="gelu"), ["activation_function", "gelu"]),
    ("blip2", "qformer_config", dict(hidden_act="relu"), ["hidden_act", "relu"]),
    ("flamingo", None, dict(use_resampler=False), ["use_resampler"]),
    ("flamingo", None, dict(hidden_act="gelu"), ["'gelu'", "'silu'"]),
    ("flamingo", None, dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), ["'linear'"]),
    ("flamingo", None, dict(alpha_type="matrix"), ["alpha_type", "'matrix'"]),
    ("flamingo", "vision_config", dict(hidden_act="swish"), ["hidden_act", "'swish'"]),
    ("cogvlm", None, dict(hidden_act="relu"), ["hidden_act", "'relu'"]),
    ("cogvlm", None, dict(template_version="poem"), ["template_version", "'poem'", "'chat'"]),
    ("cogvlm", "vision_config", dict(hidden_act="quick_gelu"), ["hidden_act", "'quick_gelu'"]),
    ("qwen2.5vl", "text_config", dict(use_sliding_window=True), ["use_sliding_window"]),
    ("qwen2.5vl", "text_config", dict(rope_parameters={"rope_type": "yarn"}), ["yarn"]),
    ("qwen2.5vl", "text_config", dict(rope_parameters=None, rope_scaling={"type": "yarn"}), ["yarn"]),
    ("qwen2.5vl", "vision_config", dict(out_hidden_size=32), ["out_hidden_size", 32, 64]),
    ("qwen2.5vl", "vision_config", dict(hidden_act="gelu"), ["'gelu'", "'silu'"]),
    ("qwen2vl", "vision_config", dict(hidden_act="gelu"), ["'gelu'", "'quick_gelu'"]),
    ("qwen2vl", "vision_config", dict(rope_parameters={"rope_theta": 30000.0}), ["rope_theta", "30000.0"]),
    ("qwen2.5vl", "vision_config", dict(rope_parameters={"rope_theta": 30000.0}), ["rope_theta", "30000.0"]),
    ("qwen2vl", "text_config", dict(hidden_act="gelu"), ["'gelu'", "'silu'"]),
    ("llava", None, dict(vision_feature_select_strategy="mean"), ["vision_feature_select_strategy", "'mean'"]),
]


@pytest.mark.parametrize("kind, part, change, words", NOT_FOLLOWED, ids=lambda x: str(x)[:40])
def test_a_config_field_that_changes_results_and_is_not_followed_is_refused(
    oracles, tmp_path, kind, part, change, words
):
    raw = read_config(oracles(kind)[1])
    changed = raw | change if part is None else raw | {part: raw[part] | change}
    with refuses(ValueError, *words):
        MODULES[family_of(kind)].config_from_published(write_config(tmp_path, changed))


def places(fields, path=()):
    """The path of every field in nested dicts."""
    for name, value in fields.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


@pytest.mark.parametrize("kind", [*KINDS[:6], "llava", "blip2", "flamingo", *COGVLMS, "qwen2vl", "qwen2.5vl"])
def test_json_of_another_type_than_expected_works_or_is_an_error_that_names_the_field(oracles, tmp_path, kind):
    raw, source = read_config(oracles(kind)[1]), (ROOT / f"{family_of(kind)}.py").read_text()
    for *outer, name in (path for path in places(raw) if f'"{path[-1]}"' in source or f"{path[-1]}=" in source):
        for value in ([-2], "x", 0.5, None):
            fields = changed = copy.deepcopy(raw)
            for step in outer:
                fields = fields[step]
            fields[name] = value
            try:
                MODULES[family_of(kind)].config_from_published(write_config(tmp_path, changed))
            except ValueError as error:
                assert value is None or name in str(error), (name, value)  # null: the default may contradict the rest


@pytest.mark.parametrize("kind", ["llava", "flamingo", "cogvlm", "qwen2vl", "qwen2.5vl"])
def test_two_different_tables_in_a_file_stay_apart_even_if_the_config_calls_them_tied(oracles, load, tmp_path, kind):
    shutil.copytree(oracles(kind)[1], folder := tmp_path / "other")
    write_config(folder, read_config(folder) | dict(tie_word_embeddings=True))
    same(MODELS[family_of(kind)].from_pretrained(folder), load(kind))


def test_the_older_names_of_clips_two_parts_count_more_as_a_whole(oracles, tmp_path):
    raw = read_config(oracles("clip with gelu")[1])
    for new in ("vision_config", "text_config"):
        raw[f"{new}_dict"] = dict(hidden_act="gelu", num_hidden_layers=3)
        raw[new]["hidden_act"] = "quick_gelu"
    published = quiet_transformers().CLIPConfig.from_pretrained(write_config(tmp_path, raw))
    config = clip.config_from_published(tmp_path)
    for ours, theirs in ((config.vision, published.vision_config), (config.text, published.text_config)):
        assert ours.activation == theirs.hidden_act == "gelu" and ours.layers == theirs.num_hidden_layers == 3
        assert ours.width == theirs.hidden_size and ours.mlp_width == theirs.intermediate_size


@pytest.mark.parametrize("layer", [-4, -1, 1, 3, [-2], [0], [2]])
@torch.no_grad()
def test_llava_takes_the_features_of_any_one_layer_however_it_is_written(oracles, tmp_path, layer):
    shutil.copytree(oracles("llava")[1], folder := tmp_path / "other")
    write_config(folder, read_config(folder) | dict(vision_feature_layer=layer))
    oracle = quiet_transformers().LlavaForConditionalGeneration.from_pretrained(folder)
    given = RICHEST["llava"]
    close(llava.LLaVA.from_pretrained(folder)(**given), published_logits(oracle, "llava", **given))
    for wrong in (4, -5, [-2, -1], []):
        write_config(folder, read_config(folder) | dict(vision_feature_layer=wrong))
        with refuses(ValueError, "vision_feature_layer", wrong):
            llava.config_from_published(folder)


def test_a_checkpoint_of_another_family_is_refused_by_name(oracles):
    kinds = ["clip", "siglip", "vilt mlm", "flamingo", "blip2", "llava", "qwen2vl", "qwen2.5vl", "cogvlm"]
    for kind, family in itertools.product(kinds, FAMILIES):
        folder = oracles(kind)[1]
        if family != family_of(kind):
            with refuses((ValueError, RuntimeError), read_config(folder).get("model_type", "")):
                MODELS[family].from_pretrained(folder)


SQUASH, CROP = {"size": {"height": 32, "width": 32}}, {"size": {"shortest_edge": 32}, "do_center_crop": True}
NOT_DONE = {  # kind -> what its processor's own file may not ask for
    "clip": dict(crop_size=24, size=40, resample=6),
    "siglip": dict(size=40),
    "vilt mlm": dict(resample=2, size_divisor=16, size=224),
    "llava": dict(resample=2, do_center_crop=False, crop_size={"height": 24, "width": 24}, size={"shortest_edge": 40}),
    "blip2": dict(resample=2, do_center_crop=True, size={"height": 40, "width": 32}),
    "flamingo": dict(resample=2, do_center_crop=True, image_size=24),
    "cogvlm": dict(resample=2, do_pad=True, do_center_crop=True, size=32),
    "qwen2vl": dict(patch_size=14, resample=2, size=40),
}
ALWAYS_DONE = dict(do_resize=False, do_rescale=False, do_normalize=False, rescale_factor=1.0)


@pytest.mark.parametrize("kind", NOT_DONE)
def test_the_processors_own_file_decides_about_colours_and_what_is_not_done_is_refused(oracles, tmp_path, kind):
    read = MODULES[family_of(kind)].config_from_published
    write_config(tmp_path, read_config(oracles(kind)[1]))
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(dict(image_mean=[0.1, 0.2, 0.3], image_std=[1, 1, 2])))
    config = read(tmp_path)
    config = getattr(config, "vision", config)
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (1, 1, 2))
    for field, value in (NOT_DONE[kind] | ALWAYS_DONE).items():
        file.write_text(json.dumps({field: value}))
        with refuses(ValueError, field, value):
            read(tmp_path)


def test_the_processors_own_file_decides_how_an_image_becomes_a_square(tmp_path):
    older = {"size": 32, "do_center_crop": True, "crop_size": 32}
    for says in (CROP, SQUASH, older, {}):
        write_config(tmp_path, {"model_type": "clip", "vision_config": {"image_size": 32}})
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
        assert clip.config_from_published(tmp_path).vision.resize == ("squash" if says == SQUASH else "crop")
    write_config(tmp_path, LLAVA | dict(text_config=LLAVA_TEXT, vision_config=LLAVA_VISION | {"image_size": 32}))
    for says in ({"do_pad": True}, CROP):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
        assert llava.config_from_published(tmp_path).vision.resize == ("crop" if says == CROP else "pad")


BOTH_SIDES, ONE_SIDE = {"height": 32, "width": 32}, {"shortest_edge": 32}
HAS_PROCESSOR = {  # name -> a kind of checkpoint, its published processor and the options it is saved with
    "clip": ("clip", "CLIP", dict(size=ONE_SIDE, crop_size=BOTH_SIDES)),
    "clip, squashed": ("clip", "CLIP", dict(size=BOTH_SIDES, crop_size=BOTH_SIDES)),
    "siglip": ("siglip", "Siglip", dict(size=BOTH_SIDES)),
    "vilt": ("vilt mlm", "Vilt", dict(size=ONE_SIDE, size_divisor=8)),
    "flamingo": ("flamingo", "Idefics", dict(image_size=32)),
    "blip2": ("blip2", "Blip", dict(size=BOTH_SIDES)),
    "llava": ("llava", "CLIP", dict(size=ONE_SIDE, crop_size=BOTH_SIDES)),
    "llava, padded": ("llava", "Llava", dict(size=ONE_SIDE, crop_size=BOTH_SIDES, do_pad=True)),
    "qwen2vl": ("qwen2vl", "Qwen2VL", dict(size={"shortest_edge": 64, "longest_edge": 400}, patch_size=4)),
}
SWITCHES = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad", "do_convert_rgb")
SAID = dict.fromkeys(SWITCHES, (True, False, None)) | {  # field -> what a file may say; the rest of it stays as saved
    "resample": range(6), "rescale_factor": (1 / 127.5,), "image_mean": ([0.1, 0.2, 0.3],), "image_std": ([1, 1, 2],),
    "crop_size": (24, 32, {"height": 24, "width": 24}), "image_size": (40,), "size_divisor": (16,), "max_pixels": (9,),
    "size": (40, 32, ONE_SIDE, BOTH_SIDES, {"shortest_edge": 40}, {"shortest_edge": 32, "longest_edge": 40}),
}  # fmt: skip


@pytest.mark.parametrize("name", HAS_PROCESSOR)
def test_whatever_a_processors_file_says_pixels_are_those_of_the_published_processor_or_the_file_is_refused(
    oracles, tmp_path, name
):
    """In processor_config.json, as transformers 5 saves it, which counts more than the older file."""
    kind, processor, options = HAS_PROCESSOR[name]
    processor, module = getattr(quiet_transformers(), f"{processor}ImageProcessorPil"), MODULES[family_of(kind)]
    processor(**options).save_pretrained(write_config(tmp_path, read_config(oracles(kind)[1])))
    saved, image, equal = json.loads((tmp_path / "preprocessor_config.json").read_text()), [*pictures()][3], 0
    legacy = {"processor_class": "CLIPProcessor"}  # what older versions write into the same file
    said = [{field: value} for field in SAID for value in SAID[field]]
    for says, file in [(saved, legacy)] + [(saved | field, {"image_processor": saved | field}) for field in said]:
        (tmp_path / "processor_config.json").write_text(json.dumps(file))
        try:
            config = module.config_from_published(tmp_path)
        except ValueError as error:
            assert any(field in str(error) for field in says if says[field] != saved.get(field)), says
            continue
        ours = module.preprocess([image], getattr(config, "vision", config))
        ours = ours[0] if isinstance(ours, tuple) else ours
        with contextlib.suppress(ValueError):  # what the published processor refuses may be anything here
            theirs = processor.from_dict(says)(image, return_tensors="pt")
            theirs = theirs if torch.is_tensor(theirs) else theirs["pixel_values"]
            assert theirs.numel() == ours.numel() and torch.equal(ours, theirs.view(ours.shape)), says
            equal += 1
    assert equal > 8


def test_a_folder_that_does_not_say_how_images_are_prepared_is_named(oracles, tmp_path):
    for kind in ("clip", "vilt mlm", "flamingo", "blip2", "llava", "qwen2vl"):
        write_config(tmp_path, read_config(oracles(kind)[1]))
        with pytest.warns(UserWarning, match=f"{tmp_path} has no preprocessor_config.json"):
            MODULES[family_of(kind)].config_from_published(tmp_path)


def test_qwen2vl_reads_how_large_images_and_clips_may_be(oracles, tmp_path):
    write_config(tmp_path, read_config(oracles("qwen2.5vl")[1]))
    image, video = tmp_path / "preprocessor_config.json", tmp_path / "video_preprocessor_config.json"
    image.write_text(json.dumps({"min_pixels": 784, "max_pixels": 7840, "merge_size": 2, "patch_size": 4}))
    vision = qwen2vl.config_from_published(tmp_path).vision
    assert (vision.min_pixels, vision.max_pixels) == (784, 7840)
    image.write_text(json.dumps({"size": {"min_pixels": 98, "max_pixels": 998}}))
    video.write_text(json.dumps({"size": {"shortest_edge": 99, "longest_edge": 999}}))
    vision = qwen2vl.config_from_published(tmp_path).vision
    assert (vision.min_pixels, vision.max_pixels) == (98, 998)
    assert (vision.video_min_pixels, vision.video_max_pixels) == (99, 999)
    for says, words in (({"patch_size": 14}, ["patch_size", 14, 4]), ({"image_mean": [0, 0, 0]}, ["image_mean"])):
        video.write_text(json.dumps(says))
        with refuses(ValueError, *words):
            qwen2vl.config_from_published(tmp_path)
    size = lambda least, most: {"size": {"shortest_edge": least, "longest_edge": most}}
    both = {"image_processor": size(97, 997), "video_processor": size(96, 996)}  # as transformers 5 writes it
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    vision = qwen2vl.config_from_published(tmp_path).vision
    assert (vision.min_pixels, vision.max_pixels) == (97, 997)
    assert (vision.video_min_pixels, vision.video_max_pixels) == (96, 996)


@pytest.mark.parametrize("version", ["Qwen2VL", "Qwen2_5_VL"])
def test_what_a_qwen2vl_config_leaves_out_is_the_published_classs_default(version, tmp_path):
    """And the forms that ties and rotary positions have had."""
    published = getattr(quiet_transformers(), f"{version}Config")()
    text, tower = published.text_config, published.vision_config
    merged = "out_hidden_size" if version == "Qwen2_5_VL" else "hidden_size"
    base = {"model_type": published.model_type, "vision_config": {merged: text.hidden_size}}
    read = lambda **changes: qwen2vl.config_from_published(write_config(tmp_path, base | changes))
    ours, c = read(), read().language
    assert (c.width, c.layers, c.heads, c.kv_heads) == (
        text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads
    )  # fmt: skip
    assert (c.mlp_width, c.vocab_size, c.context, c.norm_eps) == (
        text.intermediate_size, text.vocab_size, text.max_position_embeddings, text.rms_norm_eps
    )  # fmt: skip
    vision = ours.vision
    assert (vision.layers, vision.heads, vision.patch_size, vision.merge) == (
        tower.depth, tower.num_heads, tower.patch_size, tower.spatial_merge_size
    )  # fmt: skip
    assert (ours.image_token_id, ours.video_token_id) == (published.image_token_id, published.video_token_id)
    if version == "Qwen2_5_VL":
        assert ours.tokens_per_second == tower.tokens_per_second and vision.window_size == tower.window_size
        assert (vision.width, vision.full_layers) == (tower.hidden_size, tuple(tower.fullatt_block_indexes))
    assert read(eos_token_id=7).eos_token_ids == (7,) and ours.eos_token_ids == (151645, 151643)
    assert read(num_key_value_heads=None).language.kv_heads == c.heads, "null: no groups"
    for tied in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}):
        assert read(**tied).language.tie_embeddings and not c.tie_embeddings
    for turns in ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 24, 32]}},
                  {"text_config": {"rope_parameters": {"mrope_section": [8, 24, 32]}}}):  # fmt: skip
        assert read(**turns).language.mrope_sections == (8, 24, 32)


@pytest.mark.parametrize("kind", ["llava", "blip2", "flamingo", "cogvlm", "cogvlm2", "qwen2vl", "qwen2.5vl"])
def test_any_of_the_end_tokens_of_a_checkpoint_ends_an_answer(oracles, tmp_path, kind):
    """generation_config.json counts more than config.json, whose language model has them at the top in older files."""
    raw = read_config(oracles(kind)[1])
    text = raw.get("text_config", raw)
    for said in ([5, 6], 7, [9]):
        text["eos_token_id"] = said
        folder, said = write_config(tmp_path, raw), said if isinstance(said, list) else [said]
        assert MODULES[family_of(kind)].config_from_published(folder).eos_token_ids == tuple(said)
    for said in ({"eos_token_id": [3, 2]}, {"eos_token_id": 4}, {"do_sample": True}):
        (folder / "generation_config.json").write_text(json.dumps(said))
        published = quiet_transformers().GenerationConfig.from_pretrained(folder).eos_token_id or 9
        published = published if isinstance(published, list) else [published]
        assert MODULES[family_of(kind)].config_from_published(folder).eos_token_ids == tuple(published)


def test_what_a_cogvlm_config_says_is_read_and_silence_means_the_first_models_defaults(tmp_path):
    raw = cogvlm_fields(second=False)
    read = lambda raw: cogvlm.config_from_published(write_config(tmp_path, raw))
    for field in ("rms_norm_eps", "bos_token_id", "eos_token_id", "architectures"):
        raw.pop(field)
    silent = read(raw | {"model_type": "cogvlm"})
    assert (silent.language.norm_eps, silent.bos_token_id, silent.eos_token_ids) == (1e-6, 1, (2,))
    said = read(cogvlm_fields(second=False) | {"tie_word_embeddings": True, "template_version": "base"})
    assert (said.style, silent.style) == ("base", "chat")
    assert said.language.tie_embeddings and not silent.language.tie_embeddings
    assert (said.image_token_id, said.bos_token_id, said.eos_token_ids, said.language.context) == (60, 4, (5,), 64)


def test_flamingo_reads_old_flat_configs_and_chats_third_new_token(oracles, tmp_path):
    read = lambda raw: flamingo.config_from_published(write_config(tmp_path, raw))
    nested = read_config(oracles("flamingo")[1])
    flat = dict(nested)
    flat |= {f"vision_{name}": value for name, value in flat.pop("vision_config").items()}
    assert read(flat.pop("perceiver_config") | flat) == read(nested)
    old = {"model_type": "idefics", "use_resampler": True, "vision_embed_dim": 1280, "resampler_n_latents": 48,
           "vision_num_hidden_layers": 30, "qk_layer_norms_perceiver": True, "alpha_type": "vector"}  # fmt: skip
    config = read(old)
    assert (config.vision.width, config.vision.layers, config.resampler.latents) == (1280, 30, 48)
    assert config.resampler.qk_norm and not config.qk_norm and config.gate == "vector" and config.new_token_ids == ()
    chat = read(old | dict(additional_vocab_size=3, eos_token_id=[2, 3]))  # the third ends an utterance
    assert (chat.image_token_id, chat.eos_token_ids, chat.language.vocab_size) == (32001, (32002, 2, 3), 32003)
    plain = read(old | dict(additional_vocab_size=None, eos_token_id=[2, 3]))
    assert (plain.eos_token_ids, plain.language.vocab_size) == ((2, 3), 32000)


def test_a_damaged_checkpoint_folder_costs_one_line_that_names_it(oracles, tmp_path, capsys):
    folder = tmp_path / "cut"
    shutil.copytree(oracles("clip")[1], folder)
    save_tokenizer(folder, word_list({"<s>": 1, "</s>": 2}), "<s> $A </s>")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    ask = lambda: world.workbench(
        "clip", ["--weights", str(folder), "--image", str(tmp_path / "a.png"), "--prompt", "a circle"]
    )
    weights, config = folder / "model.safetensors", folder / "config.json"
    data = weights.read_bytes()
    for keep in (len(data) // 2, 100, 4, 0):
        weights.write_bytes(data[:keep])
        fails_in_one_line(ask, capsys, folder)
    weights.unlink()
    fails_in_one_line(ask, capsys, "model.safetensors")
    config.write_text("{")
    fails_in_one_line(ask, capsys, folder)
    config.unlink()
    with refuses(FileNotFoundError, "config.json"):
        clip.CLIP.from_pretrained(folder)
    with refuses(ValueError, "nowhere"):
        clip.CLIP.from_pretrained(tmp_path / "nowhere")


def test_loading_holds_one_tensor_of_the_file_at_a_time(oracles, monkeypatch):
    """Beside the model's own weights, which have another dtype."""
    import safetensors

    alive, most, real_open = [], 0, safetensors.safe_open

    @contextlib.contextmanager
    def safe_open(*args, **options):
        class Reader:
            def keys(self):
                return file.keys()

            def get_tensor(self, name):
                nonlocal most
                tensor = file.get_tensor(name)
                alive.append(weakref.ref(tensor))
                most = max(most, sum(ref() is not None for ref in alive))
                return tensor

        with real_open(*args, **options) as file:
            yield Reader()

    monkeypatch.setattr(safetensors, "safe_open", safe_open)
    clip.CLIP.from_pretrained(oracles("clip")[1], dtype=torch.bfloat16)
    assert len(alive) == 94 and most <= 2  # the one being read, and the one before it


chapter("checkpoints")


# ----------------------------------------------------------------------------------------------------------------------
# CLIP and SigLIP


@pytest.mark.parametrize("batch, height, width", [(1, 32, 32), (3, 32, 32), (2, 48, 48), (2, 32, 64), (2, 43, 27)])
@pytest.mark.parametrize("kind", ["clip", "clip with eos 2", "clip with gelu", "siglip", "siglip2"])
@torch.no_grad()
def test_clip_logits_and_features_equal_those_of_the_published_model(oracles, load, kind, batch, height, width):
    """Positions are interpolated for images that are not 32 x 32."""
    (ids, mask), pixels = texts_with_end(batch), noise(batch + 1, 3, height, width)
    ours, given = load(kind), dict(input_ids=ids, pixel_values=pixels, interpolate_pos_encoding=True)
    theirs = oracles(kind)[0](**given)
    close(ours(pixels, ids), theirs.logits_per_image)
    close(ours.encode_image(pixels), theirs.image_embeds)
    close(ours.encode_text(ids), theirs.text_embeds)
    if kind.startswith("clip"):  # SigLIP is published without a mask: it attends to its padding
        theirs = oracles(kind)[0](**given, attention_mask=mask.int())
        close(ours(pixels, ids, mask), theirs.logits_per_image)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_the_loss_of_clip_equals_the_published_loss(oracles, load, kind, batch):
    ids, pixels, ours = texts_with_end(batch)[0], noise(batch, 3, 32, 32), load(kind)
    theirs = oracles(kind)[0](input_ids=ids, pixel_values=pixels, return_loss=True).loss
    loss, _ = ours.loss(ours.encode_image(pixels), ours.encode_text(ids))
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_losses_of_clip_count_right_pairs_and_are_ln_b_where_nothing_can_be_told_apart():
    image = F.normalize(noise(9, 16), dim=-1)
    for text, right in ((image, 1), (image.roll(1, 0), 0)):
        assert clip.contrastive_loss(image, text, 0.0)[0].item() == pytest.approx(math.log(9))
        assert clip.contrastive_loss(image, text, 5.0)[1]["accuracy"] == right
        assert clip.sigmoid_loss(image, text, 5.0, -2.0)[1]["accuracy"] == right


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_where_texts_are_equal_each_belongs_to_the_images_of_all_and_without_them_no_bit_changes(loss):
    image, text = (F.normalize(noise(4, 8, seed=seed), dim=-1) for seed in (0, 1))
    model = clip.CLIP(replace(clip.PRESETS["tiny"], loss=loss))
    for names in (torch.arange(4), torch.tensor([2**31, 5, 0, 9])):
        assert torch.equal(model.loss(image, text, names)[0], model.loss(image, text)[0])
    names, text = torch.tensor([7, 3, 7, 1]), text[[0, 1, 0, 3]]
    logits = model.logits(image, text).detach().double()
    alike = names[:, None] == names
    if loss == "softmax":  # of the images and the texts of the same name only its own is left
        others = alike & ~torch.eye(4, dtype=torch.bool)
        chosen = [x.masked_fill(others, -torch.inf).log_softmax(1).diagonal().mean() for x in (logits, logits.T)]
        wanted = -sum(chosen) / 2
    else:
        wanted = -torch.where(alike, F.logsigmoid(logits), F.logsigmoid(-logits)).sum() / 4
    assert model.loss(image, text, names)[0].item() == pytest.approx(wanted.item(), rel=1e-5)
    for best in (text, text.roll(1, 0)):
        accuracy = model.loss(best, text, names)[1]["accuracy"].item()
        assert accuracy == sum(torch.equal(a, b) for a, b in zip(best, text)) / 4


@pytest.mark.parametrize("loss, limit", [("softmax", math.log(100)), ("sigmoid", 9.0)])
def test_clip_limits_its_logit_scale_to_one_hundred_and_siglip_does_not(loss, limit):
    model = clip.CLIP(replace(clip.PRESETS["tiny"], loss=loss))
    model.logit_scale.data.fill_(9.0)
    model.clip_logit_scale()
    assert model.logit_scale.item() == pytest.approx(limit)


@pytest.mark.parametrize("kind", ["clip", "clip with eos 2", "siglip"])
@torch.no_grad()
def test_clip_texts_are_padded_on_the_right_which_changes_nothing(load, kind):
    model, ids = load(kind), texts_with_end(1, 7)[0]
    ids[0, -1] = 99
    padded, mask = F.pad(ids, (0, 4), value=99), F.pad(torch.ones(1, 7, dtype=torch.bool), (0, 4))
    close(model.encode_text(padded, mask), model.encode_text(ids))
    with refuses(ValueError, "right"):
        model.encode_text(padded.flip(1), mask.flip(1))
    if kind != "siglip":  # what stands behind the end-of-text token has no influence even without a mask
        assert torch.equal(model.encode_text(F.pad(ids, (0, 4), value=5)), model.encode_text(padded))


def test_clip_texts_are_padded_as_in_training():
    """CLIP's to the longest of the batch, SigLIP's to the context, with the end-of-text token or SigLIP 2's own."""
    assert clip.pad_texts([[1, 99], [1, 2, 3, 99]], clip.TextConfig()).tolist() == [[1, 99, 99, 99], [1, 2, 3, 99]]
    assert clip.pad_texts([[5, 1]], clip.SIGLIP_TEXT).tolist() == [[5] + [1] * 63]
    assert clip.pad_texts([[5, 1]], clip.SIGLIP_TEXT, pad_id=0).tolist() == [[5, 1] + [0] * 62]


def test_a_clip_text_that_is_too_long_or_has_no_end_is_an_error(load):
    model = load("clip")
    with refuses(ValueError, 17, 16):
        model.encode_text(torch.full((1, 17), 99))
    with refuses(ValueError, "text 1", 99):
        model.encode_text(torch.tensor([[5, 99], [5, 6]]))


@torch.no_grad()
def test_a_zero_shot_class_of_clip_is_the_mean_direction_of_its_prompts(load):
    model, pixels = load("clip"), noise(4, 3, 32, 32)
    tokenize = lambda texts: (torch.tensor([[3 + len(text), 7 + text.count("a"), 99] for text in texts]), None)
    given = ["cat", "horse"], ["a {}", "a big {}"], tokenize
    classes = clip.zero_shot_classifier(model, *given)
    horse = model.encode_text(tokenize(["a horse", "a big horse"])[0]).mean(0)
    close(classes[1], horse / horse.norm())
    close(clip.zero_shot(model, pixels, *given), model.logits(model.encode_image(pixels), classes))


@torch.no_grad()
def test_a_long_thin_image_looks_to_clip_as_the_published_processor_makes_it():
    """Beyond 16:1 we resize only what survives the crop. Pillow may then take its two passes in the other order, each
    of which rounds and clips: away from black and white that is two grey levels at most."""
    config, rng = replace(clip.PRESETS["clip-vit-base-patch32"].vision, image_size=32), np.random.default_rng(0)
    options = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = quiet_transformers().CLIPImageProcessorPil(**options)
    for width, height in [(200, 7), (7, 200), (900, 40), (1, 300)]:
        image = Image.fromarray(rng.integers(80, 176, (height, width, 3), dtype=np.uint8))
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        assert (clip.preprocess([image], config) - theirs).abs().max() <= 2.001 / 255 / min(config.std)


@torch.no_grad()
def test_num_image_tokens_of_clip_is_what_the_tower_makes_and_of_others_what_is_published():
    model = clip.CLIP(clip.PRESETS["tiny"])
    for height, width in [(32, 32), (365, 211), (8, 15), (9, 40)]:
        tokens = model.vision(torch.zeros(1, 3, height, width)).shape[1]
        assert tokens == clip.num_image_tokens(height, width, model.config)
    assert clip.num_image_tokens(224, 224, clip.PRESETS["siglip-base-patch16-224"]) == 14 * 14  # no class token
    assert clip.num_image_tokens(384, 384, clip.PRESETS["siglip-so400m-patch14-384"]) == 27 * 27
    assert vilt.num_image_tokens(384, 512, vilt.PRESETS["vilt-b32-mlm"]) == 1 + 12 * 16
    assert llava.num_image_tokens(336, 336, llava.PRESETS["llava-1.5-7b"]) == 24 * 24
    assert blip2.num_image_tokens(8, 90, blip2.PRESETS["blip2-opt-2.7b"]) == 32  # whatever the size of the image


# ----------------------------------------------------------------------------------------------------------------------
# ViLT

VILT_HEADS = {  # kind of checkpoint -> logits from hidden states, of texts of 9 tokens
    "vilt mlm": lambda model, hidden: model.mlm_logits(hidden[:, :9]),
    "vilt vqa": lambda model, hidden: model.vqa_logits(hidden),
    "vilt rank": lambda model, hidden: model.rank_score(hidden)[:, None],
}


@pytest.mark.parametrize("kind", VILT_HEADS)
@torch.no_grad()
def test_vilt_logits_equal_those_of_the_published_model(oracles, load, kind):
    """For one pair, for three images of different sizes with three padded texts, for images without padding."""
    oracle, ours, (pixels, pixel_mask, ids, mask) = oracles(kind)[0], load(kind), vilt_batch()
    for rows in (slice(0, 1), slice(0, 3), slice(2, 3)):
        p, pm, i, m = pixels[rows], pixel_mask[rows], ids[rows], mask[rows]
        theirs = oracle(input_ids=i, attention_mask=m.int(), pixel_values=p, pixel_mask=pm.int()).logits
        logits = VILT_HEADS[kind](ours, ours(p, i, m, pm))
        close(logits[m], theirs[m]) if kind == "vilt mlm" else close(logits, theirs)
    square = noise(2, 3, 32, 32)
    theirs = oracle(input_ids=ids[:2], pixel_values=square).logits
    close(VILT_HEADS[kind](ours, ours(square, ids[:2])), theirs)


@torch.no_grad()
def test_vilt_hidden_states_equal_those_of_the_published_model_patch_by_patch(oracles, load):
    ours, (pixels, pixel_mask, ids, mask) = load("vilt mlm"), vilt_batch()
    given = dict(input_ids=ids, attention_mask=mask.int(), pixel_values=pixels, pixel_mask=pixel_mask.int())
    theirs = oracles("vilt mlm")[0].vilt(**given)
    hidden, (_, real, place) = ours(pixels, ids, mask, pixel_mask), ours.embed(pixels, ids, mask, pixel_mask)
    assert hidden.shape == theirs.last_hidden_state.shape == (3, 9 + 1 + 16, 32)
    expected = theirs.last_hidden_state.clone()
    order = torch.cdist(hidden[2, 10:], expected[2, 10:]).argmin(1)  # the published code shuffles the largest image
    assert sorted(order.tolist()) == list(range(16))
    expected[2, 10:] = expected[2, 10:][order]
    close(hidden[real], expected[real])
    assert real[:, 10:].sum(1).tolist() == [12, 10, 16]
    assert place[1, :10].tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17]  # two columns of a grid of four


def test_vilt_preprocessing_equals_the_published_processor():
    config, processor = vilt.PRESETS["vilt-b32-mlm"], quiet_transformers().ViltImageProcessorPil()
    images = [image.convert("RGB") for image in pictures() if max(image.size) < 9 * min(image.size)]
    sizes = [(640, 384), (384, 640), (641, 384), (500, 375), (1000, 500), (379, 350)]  # 379: 415.8 becomes 416
    images += [Image.new("RGB", size, "red") for size in sizes]
    assert len({vilt.target_size(*image.size, config) for image in images}) > 4
    for batch in [*([image] for image in images), images]:
        theirs, (pixels, mask) = processor(batch, return_tensors="pt"), vilt.preprocess(batch, config)
        assert torch.equal(pixels, theirs["pixel_values"]) and torch.equal(mask, theirs["pixel_mask"].bool()), batch


def test_a_thin_image_keeps_one_patch_in_vilt_where_the_published_processor_fails():
    config = vilt.PRESETS["vilt-b32-mlm"]
    assert vilt.target_size(1, 5000, config) == (32, 608) and vilt.target_size(5000, 1, config) == (608, 32)
    pixels, mask = vilt.preprocess([Image.new("RGB", (1, 5000)), Image.new("RGB", (640, 480))], config)
    assert pixels.shape == (2, 3, 608, 512) and mask[0].sum() == 608 * 32


@torch.no_grad()
def test_vilt_padding_of_words_and_patches_changes_nothing(load):
    """Three pairs of different sizes in a batch, with noise in the padding, and each of them alone."""
    model, (pixels, pixel_mask, ids, mask) = load("vilt mlm"), vilt_batch()
    hidden = model(pixels + noise(3, 3, 40, 32) * ~pixel_mask[:, None], ids, mask, pixel_mask)
    for i, (height, width) in enumerate([(24, 32), (40, 16), (32, 32)]):
        words, patches = int(mask[i].sum()), height * width // 64
        alone = model(pixels[i : i + 1, :, :height, :width], ids[i : i + 1, :words])[0]
        close(hidden[i, :words], alone[:words])
        close(hidden[i, 9 : 10 + patches], alone[words:])  # the class token and the patches


@torch.no_grad()
def test_vilt_reads_as_many_patches_as_its_limit_allows():
    """At random while it trains, otherwise evenly spaced; a patch keeps its position."""
    config = replace(vilt.PRESETS["tiny"], max_patches=5)
    model, pixels, ids = vilt.ViLT(config).eval(), noise(2, 3, 32, 48), torch.full((2, 4), 7)
    assert vilt.num_image_tokens(32, 48, config) == 6 and vilt.num_image_tokens(16, 16, config) == 5
    _, real, place = model.embed(pixels, ids)
    assert place.tolist() == [[0, 4, 9, 14, 19]] * 2 and real.shape == (2, 4 + 6)
    assert model.image(pixels[:, :, :, :8])[0].shape[1] == 5  # four patches: all of them
    unlimited = vilt.ViLT(vilt.PRESETS["tiny"])
    unlimited.load_state_dict(model.state_dict())
    assert torch.equal(model.image(pixels)[0][:, 1:], unlimited.image(pixels)[0][:, 1:][:, place[0]])
    model.train()
    drawn = [row for _ in range(30) for row in model.embed(pixels, ids)[2].tolist()]
    assert all(len(set(row)) == 5 and row == sorted(row) for row in drawn)
    assert set(sum(drawn, [])) == set(range(24))  # every patch has its turn


def test_bad_input_to_vilt_is_an_error_that_names_what_is_wrong():
    model, pixels, ids = vilt.ViLT(vilt.PRESETS["tiny"]), noise(2, 3, 32, 32), torch.full((2, 7), 9)
    with refuses(ValueError, 41, 40):
        model(pixels, torch.zeros(2, 41, dtype=torch.long))
    with refuses(ValueError, "pixel_mask", [2, 32, 32], [2, 4, 4]):
        model(pixels, ids, pixel_mask=torch.ones(2, 4, 4))
    with refuses(ValueError, "right"):
        model(pixels, ids, torch.arange(7) >= torch.tensor([[0], [3]]))
    nothing, hole, corner, moved = torch.ones(4, 2, 32, 32, dtype=torch.bool)
    nothing[1], hole[1, 8:16, 8:16], corner[1, :8], moved[1] = False, False, False, False
    moved[1, :8, :16] = moved[1, :16, :8] = moved[1, 16:24, 16:24] = True  # four patches, but no two by two
    for pixel_mask in (nothing, hole, corner, moved):
        with refuses(ValueError, "image 1 "):
            model(pixels, ids, pixel_mask=pixel_mask)
    with refuses(AttributeError, "vqa_head"):
        model.vqa_logits(model(pixels, ids))
    with refuses(RuntimeError):
        model(pixels, ids[:1])  # one text for two images


def test_whole_word_masking_for_vilt_never_splits_a_word_and_hides_what_it_says():
    config, rng = vilt.PRESETS["tiny"], random.Random(0)
    ids, numbers = [504, 10, 11, 12, 13, 14, 15, 505], [None, 0, 1, 1, 1, 2, 3, None]
    words, seen = 0, []
    for _ in range(4000):
        masked, labels = vilt.mask_whole_words(ids, numbers, config, rng)
        hidden = {n for n, label in zip(numbers, labels, strict=True) if label != vilt.IGNORE_INDEX}
        assert hidden and None not in hidden  # at least one word, never a special token
        words += len(hidden)
        for i, n in enumerate(numbers):
            assert labels[i] == (ids[i] if n in hidden else vilt.IGNORE_INDEX)  # all tokens of a word, or none
            assert n in hidden or masked[i] == ids[i]
            if n in hidden:
                seen.append("mask" if masked[i] == 503 else "same" if masked[i] == ids[i] else "random")
    # each of 4 words with 0.15; if none was drawn (0.85 ** 4) one is taken
    assert words / 4000 == pytest.approx(4 * 0.15 + 0.85**4, abs=0.03)
    for kind, share in (("mask", 0.8), ("random", 0.1), ("same", 0.1)):
        assert seen.count(kind) / len(seen) == pytest.approx(share, abs=0.02)
    with refuses(ValueError, "no word"):
        vilt.mask_whole_words([504, 505], [None, None], config, rng)


def test_swapped_images_for_vilt_are_wrong_ones_and_none_is_swapped_where_none_is_wrong():
    rng, captions = random.Random(0), ["a", "b", "a", "c"] * 50
    index, labels = vilt.swap_images(captions, rng)
    for i, (j, label) in enumerate(zip(index, labels, strict=True)):
        assert (j == i) if label else captions[j] != captions[i]
    assert 70 < sum(labels) < 130
    for size in (1, 5):
        assert vilt.swap_images(["a"] * size, rng) == (list(range(size)), [1] * size)


def test_ipot_in_vilt_finds_the_cheapest_plan_by_hand():
    """Between equally many words and patches with equal shares the best plan is a permutation (Birkhoff): try all."""
    cost, every = 2 * torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0)), torch.ones(4, 6).bool()
    plans = vilt.ipot(cost, every, every, iterations=200)
    for c, plan in zip(cost.tolist(), plans):
        cheapest = min(sum(c[i][j] for i, j in enumerate(order)) / 6 for order in itertools.permutations(range(6)))
        assert (plan * torch.tensor(c)).sum().item() == pytest.approx(cheapest, abs=0.01)


def test_ipot_in_vilt_moves_equal_shares_of_words_and_nothing_of_padding():
    cost = torch.rand(3, 5, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    words = torch.tensor([5, 2, 1])[:, None] > torch.arange(5)
    patches = torch.tensor([9, 4, 7])[:, None] > torch.arange(9)
    plan = vilt.ipot(cost, words, patches)
    supply, demand = words / words.sum(1, keepdim=True), patches / patches.sum(1, keepdim=True)
    assert not plan.requires_grad
    assert (plan >= 0).all() and (plan[~words] == 0).all() and (plan.transpose(1, 2)[~patches] == 0).all()
    close(plan.sum(2), supply)
    close(plan.sum(1), demand, 5e-3)
    anywhere = supply[:, :, None] * demand[:, None]
    assert ((plan * cost).sum((1, 2)) < (anywhere * cost).sum((1, 2)))[:2].all()  # of one word there is one plan
    assert not vilt.ipot(cost, torch.zeros_like(words), patches).any()  # no words, no transport
    assert vilt.ipot(cost.half(), words, patches, iterations=500).isfinite().all()  # computed in float32


def test_the_wpa_loss_of_vilt_pulls_matches_together_and_pushes_mismatches_apart():
    text, image, labels = noise(2, 3, 8).requires_grad_(), noise(2, 5, 8, seed=2), torch.tensor([1, 0])
    real = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    (match, mismatch), _ = vilt.transport(text, image, *real)
    loss, metrics = vilt.wpa_loss(text, image, *real, labels)
    assert loss.item() == pytest.approx((match + 2 - mismatch).item() / 2, abs=1e-6)  # as published, but for the 2
    assert metrics["transport distance"].item() == pytest.approx(match.item(), abs=1e-6)
    loss.backward()
    (match_after, mismatch_after), _ = vilt.transport((text - 0.1 * text.grad).detach(), image, *real)
    assert match_after < match and mismatch_after > mismatch
    assert vilt.wpa_loss(text, image, *real, labels, near=match + 0.1, far=mismatch - 0.1)[0] == 0  # enough is enough


@pytest.mark.parametrize("pairs", [1, 8])
def test_the_losses_of_vilt_start_where_nothing_is_known_also_for_a_batch_of_one(pairs):
    """MLM at ln V, ITM at ln 2, VQA at ln 2 for each answer, ranking at ln C for C candidates, WPA between 0 and 2."""
    torch.manual_seed(0)
    model = vilt.ViLT(replace(vilt.PRESETS["tiny"], tasks=("mlm", "itm", "vqa", "rank"), answers=5))
    ids, labels = torch.tensor([[504, 10, 11, 505, 496]] * pairs), torch.tensor([[-100, 10, 11, -100, -100]] * pairs)
    words = vilt.text_words(ids, model.config)
    assert words[0].tolist() == [False, True, True, False, False]  # neither [CLS] nor [SEP] nor padding
    hidden, some = model(noise(pairs, 3, 32, 32), ids, ids != 496), torch.arange(pairs) % 2
    starts = [
        (vilt.mlm_loss(model.mlm_logits(hidden[:, :5]), labels), math.log(512)),
        (vilt.itm_loss(model.itm_logits(hidden), some), math.log(2)),
        (vilt.vqa_loss(model.vqa_logits(hidden), torch.rand(pairs, 5)), 5 * math.log(2)),
        (vilt.rank_loss(model.rank_score(hidden)[None]), math.log(pairs)),
        (vilt.wpa_loss(hidden[:, :5], hidden[:, 6:], words, torch.ones(pairs, 16).bool(), some), 1),
    ]
    for (loss, _), expected in starts:
        assert loss.item() == pytest.approx(expected, abs=0.3)
    sum(loss for (loss, _), _ in starts).backward()
    assert all(p.grad is not None for p in model.parameters())
    with refuses(ValueError, "label"):
        vilt.mlm_loss(model.mlm_logits(hidden[:, :5]), torch.full((pairs, 5), -100))


@torch.no_grad()
def test_the_losses_of_vilt_by_hand_and_as_published(oracles, load):
    yes_no_no = torch.tensor([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
    loss, metrics = vilt.itm_loss(yes_no_no, torch.tensor([1, 0, 0]))
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in (2, 1, 3)) / 3)
    assert metrics["itm accuracy"] == 1
    loss, metrics = vilt.rank_loss(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))  # the first candidate is the right one
    assert loss.item() == pytest.approx((math.log1p(math.exp(2)) + math.log1p(math.exp(-3))) / 2)
    assert metrics["rank accuracy"] == 0.5
    ours, ids, pixels = load("vilt vqa"), vilt_batch()[2], noise(3, 3, 32, 32)
    targets = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    theirs = oracles("vilt vqa")[0](input_ids=ids, pixel_values=pixels, labels=targets).loss
    loss, metrics = vilt.vqa_loss(logits := ours.vqa_logits(ours(pixels, ids)), targets)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert metrics["vqa score"] == targets[torch.arange(3), logits.argmax(1)].mean()


@pytest.mark.parametrize("height, width", [(384, 608), (70, 333)])
def test_the_costs_of_vilt_and_of_a_resnet_are_those_that_torch_counts(height, width):
    transformers, config = quiet_transformers(), vilt.PRESETS["vilt-b32-mlm"]
    with torch.device("meta"):
        model, resnet = vilt.ViLT(config), transformers.ResNetModel(transformers.ResNetConfig(depths=[3, 4, 23, 3]))
        pixels = torch.empty(1, 3, height, width)
        x = torch.empty(1, 40 + vilt.num_image_tokens(height, width, config), config.width)
    patches = world.count_flops(lambda: model.image.patch_embedding(pixels))
    encoder = world.count_flops(lambda: [block(x, None) for block in model.blocks])
    expected = (patches, encoder, world.count_flops(lambda: resnet(pixels)))
    assert world.embedding_costs(config, height, width) == expected


# ----------------------------------------------------------------------------------------------------------------------
# LLaVA


def test_only_the_assistants_words_have_labels_in_llava():
    config, pieces = llava.PRESETS["tiny"], []

    def encode(text):
        pieces.append(text)
        return [config.image_token_id if mark else ord(c) for mark, c in re.findall("(<image>)|(.)", text, re.DOTALL)]

    ids, labels = llava.encode_conversation([("how many?", "two"), ("what?", "a ring")], encode, config)
    expected = []
    for prompt, reply in (pieces[:2], pieces[2:]):
        expected += [(i, llava.IGNORE_INDEX) for i in encode(prompt)]
        expected += [(i, i) for i in [*encode(reply), *config.eos_token_ids]]
    assert list(zip(ids, labels, strict=True)) == expected
    assert pieces[0] == "USER: " + "<image>" * 16 + "\nhow many? ASSISTANT:" and pieces[1] == " two"
    assert pieces[2:4] == ["USER: what? ASSISTANT:", " a ring"]


def test_llava_prompts_have_one_placeholder_per_image():
    assert llava.build_prompt("What?", 2) == "USER: <image>\n<image>\nWhat? ASSISTANT:"
    assert llava.build_prompt("Is <image> like <image>?", 2) == "USER: Is <image> like <image>? ASSISTANT:"
    assert llava.build_prompt("What?", 0) == "USER: What? ASSISTANT:"
    for question, placed, images in (("<image> what?", 1, 2), ("<image><image> what?", 2, 1), ("<image> what?", 1, 0)):
        with refuses(ValueError, f"{placed} <image>", f"{images} image"):
            llava.build_prompt(question, images)


# ----------------------------------------------------------------------------------------------------------------------
# BLIP-2


def blip2_texts():
    """Three random texts that begin with [CLS] = 1, of different length, and their mask (padding on the right)."""
    ids = torch.randint(3, 80, (3, 9), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 1
    return ids, torch.arange(9) < torch.tensor([[9], [4], [6]])


def blip2_tiny(pairs):
    """The toy before training, random pixels, and random texts that begin with <cls> and end with <sep>."""
    torch.manual_seed(0)
    ids = torch.randint(0, 400, (pairs, 7))
    ids[:, 0], ids[:, -1] = world.CLS_ID, world.SEP_ID
    return blip2.BLIP2(blip2.PRESETS["tiny"]), noise(pairs, 3, 32, 32), ids


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.05)])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_blip2_retrieval_equals_the_published_model_in_both_modes(oracles, load, batch, dtype, tolerance):
    ours, pixels, (ids, mask) = load("blip2 retrieval", dtype=dtype), noise(batch, 3, 32, 32), blip2_texts()
    ids = ids[-batch:]
    for mask in (mask[-batch:], None):
        given = dict(input_ids=ids, pixel_values=pixels, attention_mask=(ids > 0 if mask is None else mask).int())
        matching = oracles("blip2 retrieval")[0](**given, use_image_text_matching_head=True)
        contrast = oracles("blip2 retrieval")[0](**given, use_image_text_matching_head=False)
        close(ours.itm(pixels, ids, mask).float(), matching.logits_per_image, tolerance)
        close(ours.image_features(ours.encode_image(pixels)).float(), contrast.image_embeds, tolerance)
        close(ours.text_features(ids, mask).float(), contrast.text_embeds, tolerance)
        close(ours.itc(pixels, ids, mask).float(), contrast.logits_per_image, tolerance)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_in_the_qformer_of_blip2_and_on_the_left_is_an_error(load):
    model, pixels, (ids, mask) = load("blip2 retrieval"), noise(3, 3, 32, 32), blip2_texts()
    image = model.encode_image(pixels)
    for i in range(3):
        one, alone = slice(i, i + 1), ids[i : i + 1, : int(mask[i].sum())]
        close(model.itc(pixels, ids, mask)[:, one], model.itc(pixels, alone))
        close(model.itm(pixels, ids, mask)[one], model.itm(pixels[one], alone))
        close(model.write(image, ids, mask)[i][mask[i]], model.write(image[one], alone)[0])
        close(model.itg_loss(pixels[one], ids[one], mask[one])[0], model.itg_loss(pixels[one], alone)[0])
    for reads in (model.itc, model.itm, model.itg_loss, model.stage1_loss):
        with refuses(ValueError, "right"):
            reads(pixels, ids, mask.flip(1))


QFORMER_MASKS = {  # 2 queries and 3 words (# is a real word, . is padding); rows attend to columns
    ("contrastive", "###"): "##... ##... ..### ..### ..###",
    ("matching", "###"): "##### ##### ##### ##### #####",
    ("generation", "###"): "##... ##... ###.. ####. #####",
    ("contrastive", ".##"): "##... ##... ..... ...## ...##",
    ("matching", "##."): "####. ####. ####. ####. .....",
    ("generation", ".##"): "##... ##... ..... ##.#. ##.##",
    ("generation", "##."): "##... ##... ###.. ####. .....",
}


def test_qformer_masks_of_blip2_against_tables_by_hand():
    for (attends, words), table in QFORMER_MASKS.items():
        rule = blip2.qformer_rule(attends, 2, torch.tensor([[c == "#" for c in words]]))
        assert rule.allowed(5, 5)[0].tolist() == [[c == "#" for c in row] for row in table.split()], (attends, words)
    with refuses(KeyError, "causal"):
        blip2.qformer_rule("causal", 2, torch.ones(1, 3, dtype=torch.bool))
    # the docstring shows the same
    rows = re.findall(r"^ +((?:[#.] ){4}[#.]) +((?:[#.] ){4}[#.]) +((?:[#.] ){4}[#.])", blip2.__doc__, re.MULTILINE)
    for attends, column in zip(("contrastive", "matching", "generation"), zip(*rows), strict=True):
        assert QFORMER_MASKS[attends, "###"] == " ".join(row.replace(" ", "") for row in column)


@pytest.mark.parametrize("attends", ["contrastive", "matching", "generation"])
@torch.no_grad()
def test_what_a_mask_of_blip2_hides_changes_not_one_bit(load, attends):
    """The words never attend to the image themselves: they see it through the queries."""
    model, pixels, (ids, _) = load("blip2 retrieval"), noise(3, 3, 32, 32), blip2_texts()
    image, other, changed = model.encode_image(pixels), model.encode_image(pixels + 1), ids.clone()
    changed[:, 5] = 81
    queries = model.query_tokens.expand(3, -1, -1)
    outputs = lambda image, ids: model.qformer(queries, model.qformer.embed(ids), image, attends=attends)
    before, later_word, other_image = outputs(image, ids), outputs(image, changed), outputs(other, ids)
    assert torch.equal(before[0], later_word[0]) == (attends != "matching")
    assert torch.equal(before[1], other_image[1]) == (attends == "contrastive")
    assert torch.equal(before[1][:, :5], later_word[1][:, :5]) == (attends == "generation")
    assert not (before[1][:, 5:] == later_word[1][:, 5:]).all(-1).any()
    if attends == "contrastive":  # queries and words together give what each gives alone, which is how the code runs it
        words = model.qformer.embed(ids)
        close(before[0], model.query(image))
        close(before[1], model.qformer(words[:, :0], words, image[:, :0], attends=attends)[1])


@torch.no_grad()
def test_every_second_layer_of_the_qformer_of_blip2_attends_to_the_image():
    model, _, ids = blip2_tiny(1)
    picture = next(pictures())
    image = model.encode_image(blip2.preprocess([picture], model.config.vision))
    with attention_maps() as maps:
        model.match(image, ids)
    itself, to_image = [16 + 7, 16 + 7], [16, 1 + 16]  # queries and words; the class token and the patches
    assert [list(x.shape[2:]) for x in maps] == [itself, to_image, itself] * 2
    with attention_maps() as maps:
        model.query(image)
    heats = (maps[1] + maps[4]).mean(1)[0] / 2  # of the two layers and of the heads: [16,17]
    close(world.query_attention(model, picture).flatten(1), heats[:, 1:])


def test_blip2_refuses_what_it_has_no_part_or_no_room_for(load):
    generative, retrieval, pixels, ids = load("blip2"), load("blip2 retrieval"), noise(1, 3, 32, 32), blip2_texts()[0]
    for call in (generative.itc, generative.itm, generative.itg_loss, generative.stage1_loss, retrieval.forward):
        with refuses(AttributeError):
            call(pixels, ids[:1])
    with refuses(AttributeError, "language"):
        retrieval.generate(ids[:1], pixels)
    with refuses(RuntimeError, 1, 3):
        retrieval.itm(pixels, ids)  # one image and three texts are no pairs
    retrieval.itc(pixels, torch.ones(1, 20, dtype=torch.long))
    with refuses(ValueError, 21, 20):
        retrieval.itc(pixels, torch.ones(1, 21, dtype=torch.long))
    with refuses(ValueError, 65, 64):
        generative(None, torch.ones(1, 65, dtype=torch.long))


@torch.no_grad()
def test_the_two_losses_of_blip2_that_write_start_at_the_log_of_the_vocabulary():
    model, pixels, ids = blip2_tiny(8)
    both = F.pad(ids, (16, 0), value=model.config.image_token_id)
    for loss, _ in (model.itg_loss(pixels, ids), blip2.language_loss(model(pixels, both), both)):
        assert loss.item() == pytest.approx(math.log(512), abs=0.2)


def test_hard_negatives_of_blip2_are_drawn_in_proportion_to_similarity_and_never_the_same_text():
    cosines = torch.tensor([[0.9, 0.1, 0.2, 0.2], [0.3, 0.9, 0.3, 0.9], [0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    ids = torch.tensor([[1, 5, 6, 9], [1, 7, 9, 9], [1, 8, 9, 9], [1, 7, 9, 0]])  # 1 and 3 are equal, but for padding
    same = blip2.same_text(ids, torch.arange(4) < torch.tensor([[4], [3], [4], [3]]))
    assert same.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1]]
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(4, 4)
    for _ in range(4000):
        counts[torch.arange(4), blip2.draw_hard_negatives(cosines, same, generator)] += 1
    expected = (cosines / blip2.ITC_TEMPERATURE).masked_fill(same, -torch.inf).softmax(-1)
    assert not counts[same].any() and (counts / 4000 - expected).abs().max() < 0.03


@pytest.mark.parametrize("pairs", [1, 4])
def test_stage_1_of_blip2_works_for_a_batch_of_one_and_for_equal_captions(pairs):
    """No text can be told apart and none is wrong: ITM has its positives alone."""
    model, pixels, ids = blip2_tiny(pairs)
    ids, parameters = ids[:1].expand(pairs, -1), blip2.freeze(model, 1)
    loss, metrics = model.stage1_loss(pixels, ids)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in parameters)
    assert metrics["itc"] == 0 if pairs == 1 else metrics["itc"] >= math.log(pairs) - 1e-4
    close(metrics["itm"], F.cross_entropy(model.itm(pixels, ids), torch.ones(pairs, dtype=torch.long)))


def test_stage_1_of_blip2_judges_every_pair_and_its_hard_negatives(monkeypatch):
    """3B rows: the pairs, each image with a wrong text, each text with a wrong image. Texts 0 and 3 say the same, so
    neither is wrong beside the other's image."""
    model, pixels, ids = blip2_tiny(5)
    ids[3], mask = ids[0], torch.ones(5, 7, dtype=torch.bool)
    ids[3, 6], mask[[0, 3], 6] = 8, False  # what stands under the padding differs: here the two can be told apart
    image, match, judged = model.encode_image(pixels), model.match, []
    monkeypatch.setattr(model, "match", lambda *rows: judged.extend(rows) or match(*rows))
    for seed in range(8):
        judged.clear()
        _, metrics = model.stage1_loss(pixels, ids, mask, torch.Generator().manual_seed(seed))
        which_image = (judged[0][:, None] == image[None]).all(-1).all(-1).int().argmax(1)
        which_text = (judged[1][:, None] == ids[None]).all(-1).int().argmax(1)
        pairs = list(zip(which_image.tolist(), which_text.tolist(), strict=True))
        assert len(pairs) == 15 and pairs[:5] == [(i, i) for i in range(5)]
        assert [i for i, _ in pairs[5:10]] == [t for _, t in pairs[10:]] == list(range(5))
        assert all(i != t and {i, t} != {0, 3} for i, t in pairs[5:])
        assert torch.equal(judged[2], mask[which_text])
        logits, belongs = match(*judged), torch.tensor([1] * 5 + [0] * 10)
        close(metrics["itm"], F.cross_entropy(logits, belongs))
        assert metrics["itm_accuracy"] == (logits.argmax(1) == belongs).float().mean()
    logits, own = model.itc(pixels, ids, mask) / blip2.ITC_TEMPERATURE, torch.arange(5)
    close(metrics["itc"], (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)


@torch.no_grad()
def test_the_own_caption_of_the_qformer_of_blip2_is_greedy_and_ends_with_sep():
    model, pixels, _ = blip2_tiny(3)
    for name, parameter in model.qformer.named_parameters():
        if re.search(r"position|cross_attn\.(v|out)_proj\.weight", name):
            parameter *= 10  # before training the same word would be written all the time
    words, image, config = model.caption(pixels, 6), model.encode_image(pixels), model.config
    ids = F.pad(words[:, :-1], (1, 0), value=config.qformer.dec_token_id)  # [DEC] says that text is to be written
    queries, before = model.query_tokens.expand(3, -1, -1), model.qformer.embed(ids)
    hidden = model.qformer(queries, before, image, attends="generation")[1]
    assert words.shape == (3, 6) and torch.equal((hidden @ model.qformer.word_embeddings.weight.T).argmax(-1), words)
    ids[:, 0] = world.CLS_ID  # whose place [DEC] takes
    assert torch.equal(model.write(image, ids).argmax(-1), words)
    end = int(words[1, 1])  # let a word be the end that only one row has, and that once
    assert (words == end).sum() == 1
    model.config = replace(config, qformer=replace(config.qformer, sep_token_id=end))
    for row, full in zip(model.caption(pixels, 6).tolist(), words.tolist()):
        stop = full.index(end) + 1 if end in full else 6
        assert row[:stop] == full[:stop] and set(row[stop:]) <= {end}


def test_blip2_prompts_are_those_of_the_paper():
    assert blip2.build_prompt("what is this?") == "Question: what is this? Answer:"
    assert blip2.build_prompt(" a photo of ") == "a photo of" and blip2.build_prompt("") == ""
    with refuses(ValueError, "<image>"):
        blip2.build_prompt("<image> what is this?")
    assert blip2.prompt_ids([2, 7], blip2.PRESETS["blip2-opt-2.7b"]) == [50265] * 32 + [2, 7]


# ----------------------------------------------------------------------------------------------------------------------
# Flamingo


def test_flamingo_with_closed_gates_is_its_language_model_bit_for_bit(load):
    model, given = load("flamingo"), inputs("flamingo")["rows of media"]
    assert not torch.equal(model(**given), model.language(given["ids"]))  # open gates do change something
    for block in model.gated_blocks:
        block.attn_gate.data.zero_()
        block.ffw_gate.data.zero_()
    assert torch.equal(model(**given), model.language(given["ids"]))
    for gate in ("scalar", "vector"):  # and so a new model starts
        new, ids = flamingo.Flamingo(replace(flamingo.PRESETS["tiny"], gate=gate)), torch.tensor([[5, 499, 6]])
        assert torch.equal(new(ids, noise(1, 1, 3, 32, 32)), new.language(ids))


def test_a_word_of_flamingo_attends_to_the_last_image_before_it_and_to_no_other(load):
    """Two images, at 4 and 11 of 18 tokens. Another image moves, in the first inserted block, the words that attend to
    it and no others; later words follow through self-attention, and earlier ones stay as they are in every layer."""
    model, (ids, media_mask) = load("flamingo"), flamingo_rows()
    ids, media = ids[:1], flamingo_media(ids, media_mask)[:1]

    def states(media):
        with world.trace(model) as rows:
            model(ids, media)
        return {name: x for name, x in rows if re.match(r"gated_blocks\.|language\.layers|the whole", name)}

    before = states(media)
    for image, first, last in ((0, 4, 10), (1, 11, 17)):
        after = states(media + (torch.arange(2) == image).view(1, 2, 1, 1, 1))
        moved = (after["gated_blocks.0"] != before["gated_blocks.0"]).any(-1)[0]
        assert moved.tolist() == [first <= t <= last for t in range(18)]
        for name in before:
            assert torch.equal(after[name][:, :first], before[name][:, :first]), name
            assert not (after[name] == before[name])[:, last].all(), name


def test_media_segments_of_flamingo_are_as_its_docstring_draws_them():
    ids = torch.tensor([[1, 499, 2, 3, 499, 4, 5], [499, 499, 1, 1, 1, 1, 1], [1] * 7])
    segments = flamingo.media_segments(ids, flamingo.PRESETS["tiny"])
    assert segments.tolist() == [[-1, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [-1] * 7]
    padded = flamingo.media_segments(ids[:1], flamingo.PRESETS["tiny"], torch.arange(7)[None] > 1)
    assert padded.tolist() == [[-1, -1, -1, -1, 0, 0, 0]]  # an <image> in the padding is none
    drawn = re.findall(r"^ +((?:[#.] ){3}[#.])", flamingo.__doc__, re.MULTILINE)
    sees = Rule(q_segments=segments[:1], k_segments=torch.tensor([[0, 0, 1, 1]])).allowed(7, 4)[0]
    assert [[c == "#" for c in row.split()] for row in drawn] == sees.tolist()


def test_a_video_for_flamingo_may_have_any_length_and_becomes_as_many_latents_as_an_image():
    torch.manual_seed(0)
    model, batches = flamingo.Flamingo(flamingo.PRESETS["tiny"]).requires_grad_(False), []
    model.vision.register_forward_hook(lambda module, args, out: batches.append(len(out)))
    for frames in (1, 3, 200):
        video = noise(1, 1, frames, 3, 32, 32)
        latents = model.encode_media(video)
        assert latents.shape == (1, 1, 4, 96) and latents.isfinite().all()
        assert torch.equal(model.encode_media(video.flip(2)), latents) == (frames == 1)  # frames have an order
    assert max(batches) == 64 and sum(batches) == 2 * 204  # the tower never runs on a whole long video
    table, times = model.connector.time_embeddings, model.connector.times
    assert torch.equal(times(3), table[:3]) and torch.equal(times(8), table)
    close(times(15)[::2], table)  # of more frames than were trained the ends are the same
    close(times(15)[1::2], (table[1:] + table[:-1]) / 2)
    unordered, x = flamingo.PerceiverResampler(96, replace(model.config.resampler, frames=0)), noise(1, 5, 17, 96)
    close(unordered(x.flip(1)), unordered(x))


def test_padding_of_flamingos_media_changes_nothing_whatever_stands_in_it():
    """Videos of different lengths and images in one batch, padded in front, behind and in between."""
    torch.manual_seed(0)
    model, ids = flamingo.Flamingo(flamingo.PRESETS["tiny"]), torch.tensor([[5, 499, 6, 7], [8, 5, 499, 9]])
    for block in model.gated_blocks:
        block.attn_gate.data.fill_(1.0)
    video, image = noise(1, 1, 5, 3, 32, 32), noise(1, 1, 3, 32, 32, seed=2)
    expected = torch.cat([model(ids[:1], video), model(ids[1:], image)])
    assert torch.equal(model(ids[1:], image[:, :, None]), expected[1:])  # an image is a video of one frame
    media, mask = torch.full((2, 3, 12, 3, 32, 32), torch.nan), torch.zeros(2, 3, 12, dtype=torch.bool)
    media[0, 2, 7:], mask[0, 2, 7:] = video[0, 0], True  # beside more frames than there are times for
    media[1, 1, 3], mask[1, 1, 3] = image[0, 0], True
    for given in (mask, mask.long()):  # a published mask is of numbers
        close(model(ids, media, media_mask=given), expected)


def test_the_resampler_of_flamingo_is_what_the_paper_says_in_double_precision():
    """Time embeddings, frames that are padding, norms on queries and keys: row by row and head by head."""
    torch.manual_seed(1)
    config = flamingo.ResamplerConfig(3, 2, 2, 4, 20, "relu", qk_norm=True, frames=4)
    ours = randomise(flamingo.PerceiverResampler(12, config)).double()
    x, frame_mask = noise(2, 4, 5, 12).double(), torch.tensor([[True] * 4, [True, False, True, False]])
    norm = lambda layer, y: F.layer_norm(y, y.shape[-1:], layer.weight, layer.bias)
    for n in range(2):
        real = x[n, frame_mask[n]]  # the i-th real frame has the i-th time
        media, latents = (real + ours.time_embeddings[: len(real), None]).flatten(0, 1), ours.latents
        for layer in ours.layers:
            asks, attn, heads = norm(layer.norm_latents, latents), layer.attn, []
            seen = torch.cat([norm(layer.norm_media, media), asks])
            for h in (slice(0, 4), slice(4, 8)):
                q = norm(attn.q_norm, asks @ attn.q_proj.weight[h].T)
                k = norm(attn.k_norm, seen @ attn.k_proj.weight[h].T)
                heads.append(torch.softmax(q @ k.T / 2, 1) @ seen @ attn.v_proj.weight[h].T)
            latents = latents + torch.cat(heads, 1) @ attn.o_proj.weight.T
            latents = latents + (norm(layer.norm_mlp, latents) @ layer.fc1.weight.T).relu() @ layer.fc2.weight.T
        close(ours(x, frame_mask)[n], norm(ours.norm, latents), 1e-10)


def test_the_gated_block_of_the_flamingo_paper_by_hand():
    """LayerNorm and an MLP of 4 D instead of the decoder's parts. One word attends to three latents, one to none."""
    torch.manual_seed(0)
    config = replace(flamingo.PRESETS["tiny"], dense="gelu", qk_norm=False, gate="vector")
    config = replace(config, language=flamingo.LanguageConfig(50, 8, 2, 2, 2, 32, norm_eps=1e-5))
    block = randomise(flamingo.GatedBlock(replace(config, vision=replace(config.vision, width=12))))
    w, x, latents, said = block.state_dict(), noise(1, 2, 8), noise(1, 3, 12, seed=2), []
    norm = lambda y, name: F.layer_norm(y, (8,), w[f"{name}.weight"], w[f"{name}.bias"])
    q = norm(x, "input_layernorm")[0, 1] @ w["cross_attn.q_proj.weight"].T
    for h in (slice(0, 4), slice(4, 8)):
        k, v = ((latents[0] @ w[f"cross_attn.{kind}_proj.weight"].T)[:, h] for kind in "kv")
        said.append(torch.softmax(k @ q[h] / 2, 0) @ v)
    said = torch.stack([torch.zeros(8), torch.cat(said) @ w["cross_attn.o_proj.weight"].T])
    rule = Rule(q_segments=torch.tensor([[-1, 0]]), k_segments=torch.zeros(1, 3, dtype=torch.int32))
    given = *block.cross_attn.keys_values(latents), rule
    assert not block.cross_attn(x, *given)[0, 0].any()  # exactly zero
    y = x + w["attn_gate"].tanh() * said
    inner = F.gelu(norm(y, "post_attention_layernorm") @ w["mlp.0.weight"].T)
    close(block(x, *given), y + w["ffw_gate"].tanh() * (inner @ w["mlp.2.weight"].T))


@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_of_flamingos_new_tokens_train_and_the_old_rows_do_not(tied):
    """So what the language model says of its own words is bit-identical after training."""
    torch.manual_seed(0)
    config = flamingo.PRESETS["tiny"]
    model = flamingo.Flamingo(replace(config, language=replace(config.language, tie_embeddings=tied)))
    new, text, ids = list(config.new_token_ids), torch.randint(0, 400, (2, 9)), torch.tensor([[5, 499, 507, 499, 7, 0]])
    old, tables = [i for i in range(512) if i not in new], (model.language.embed_tokens, model.language.lm_head)
    before, logits = [table.weight.detach().clone() for table in tables], model.language(text)[..., old]
    labels = flamingo.text_labels(ids, ids > 0, config)
    assert labels.tolist() == [[5, -100, 507, -100, 7, -100]]  # all real tokens but images
    optimizer = torch.optim.AdamW(flamingo.freeze(model), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        flamingo.language_loss(model(ids, noise(1, 2, 3, 32, 32)), labels)[0].backward()
        optimizer.step()
    for table, was in zip(tables, before):
        assert torch.equal(table.weight[old], was[old]) and not (table.weight[new] == was[new]).all(1).any()
    assert torch.equal(model.language(text)[..., old], logits)


def test_flamingos_prompts_have_one_placeholder_per_image():
    assert flamingo.build_prompt("<image> a dog<|endofchunk|><image>", 2) == "<image> a dog<|endofchunk|><image>"
    for text, images in (("A photo of", 2), ("Once upon", 0), ("", 1)):
        assert flamingo.build_prompt(text, images) == "<image>" * images + text
    for text, placed, images in (("<image> a", 1, 2), ("<image><image> a", 2, 1), ("<image> a", 1, 0)):
        with refuses(ValueError, f"{placed} <image>", f"for {images}"):
            flamingo.build_prompt(text, images)
    for text, expected in (("Dog: *?", "Dog: |*|?"), ("** two", "|*|*| two"), ("* and *", "|*| and |*|"), ("no", "no")):
        expected = expected.replace("|", "<fake_token_around_image>").replace("*", "<image>")
        assert flamingo.surround_images(text.replace("*", "<image>")) == expected


def test_media_that_do_not_fit_flamingos_ids_are_an_error_with_the_counts_of_each_row(load):
    model, (ids, media_mask) = load("flamingo"), flamingo_rows()
    media, text = flamingo_media(ids, media_mask), ids.masked_fill(ids == 97, 5)
    for ids, placed, given, images in (
        (ids, [2, 2, 1], dict(media=media), [2, 2, 2]),
        (ids, [2, 2, 1], dict(media=media[:, :1]), [1, 1, 1]),
        (ids, [2, 2, 1], dict(media=media, media_mask=media_mask & False), [0, 0, 0]),
        (ids, [2, 2, 1], dict(media=media, media_mask=media_mask[[0, 2, 1]]), [2, 1, 2]),  # as many in all
        (ids, [2, 2, 1], dict(), [0, 0, 0]),
        (text, [0, 0, 0], dict(media=media, media_mask=media_mask), [2, 2, 1]),
    ):
        for call in (model, model.generate):
            with refuses(ValueError, f"{placed} <image>", f"{images} images"):
                call(ids=ids, **given)


def test_a_connector_of_flamingo_makes_as_many_vectors_as_num_image_tokens_says():
    for connector, count in (("resampler", 4), ("mlp", 17)):
        model = flamingo.Flamingo(replace(flamingo.PRESETS["tiny"], connector=connector))
        assert model.encode_media(noise(1, 2, 1, 3, 32, 32)).shape == (1, 2, count, 96)
        assert flamingo.num_image_tokens(32, 32, model.config) == count
    with refuses(ValueError, "resampler"):  # which alone can leave frames out
        model.encode_media(noise(1, 1, 2, 3, 32, 32), torch.ones(1, 1, 2, dtype=torch.bool))
    for field, value in (("gate", "ajar"), ("dense", "relu"), ("connector", "wire")):
        with refuses(AssertionError, value):
            flamingo.Flamingo(replace(flamingo.PRESETS["tiny"], **{field: value}))


# ----------------------------------------------------------------------------------------------------------------------
# CogVLM

COGVLM_ROLES = {  # ids with I an image token -> (tokens of each image, expert of each token, position of each token)
    "w w I I I I I w w": (5, "l l v v v v l l l", "0 1 2 3 3 3 4 5 6"),
    "I I I w": (3, "v v l l", "0 1 2 3"),
    "w I I I I": (4, "l v v v l", "0 1 2 2 3"),
    "w I I I I w I I I I w": (4, "l v v v l l v v v l l", "0 1 2 2 3 4 5 6 6 7 8"),
    "w I I I I I I I I w": (4, "l v v v l v v v l l", "0 1 2 2 3 4 5 5 6 7"),  # side by side: still two images
    "w w w": (4, "l l l", "0 1 2"),
}


@pytest.mark.parametrize("tokens", COGVLM_ROLES)
def test_experts_and_positions_of_cogvlm_against_tables_by_hand(tokens):
    each, experts, positions = COGVLM_ROLES[tokens]
    is_image = torch.tensor([[token == "I" for token in tokens.split()]])
    for padding in ((0, 0), (2, 0), (0, 2)):  # on either side it shifts nothing
        mask, roles = F.pad(torch.ones_like(is_image), padding), cogvlm.find_roles(F.pad(is_image, padding), each)
        assert ["lv"[v] for v in cogvlm.takes_vision_expert(roles)[mask].int()] == experts.split()
        assert cogvlm.position_ids(roles, mask)[mask].tolist() == [int(p) for p in positions.split()]


def cogvlm_tiny(**changes):
    """A new model, and two rows of <bos>, an image and six words."""
    torch.manual_seed(0)
    model = cogvlm.CogVLM(replace(cogvlm.PRESETS["tiny"], **changes)).requires_grad_(False)
    return model, torch.stack([row_with_images(25, [1], 18, 499, seed) for seed in (0, 1)]), noise(2, 3, 32, 32)


def test_a_torn_image_of_cogvlm_is_an_error_that_says_where():
    (model, _, pixels), I = cogvlm_tiny(), 499
    for row, column, ids in (
        (0, 1, [[5] + [I] * 9 + [6] + [I] * 9 + [7]]),  # a word in its middle
        (0, 19, [[5] + [I] * 19 + [6] + [I] * 17]),  # as many as two images have
        (0, 11, [[5] * 11 + [I] * 9, [I] * 9 + [5] * 11]),  # in two rows
    ):
        with refuses(ValueError, f"row {row}, column {column} ", 18):
            model(torch.tensor(ids), pixels[: sum(row.count(I) for row in ids) // 18])
    with refuses(ValueError, 257, 256):
        model(torch.tensor([[5] + [I] * 18 + [6] * 238]), pixels[:1])
    with refuses(ValueError, [1, 3, 16, 64], [2, 8], "4 x 4"):
        model.vision(noise(1, 3, 16, 64))


def test_a_new_cogvlm_is_its_language_model_but_for_the_positions_of_patches():
    """One softmax over all tokens, and vision experts that start as copies, with a bias of zero where they have one."""
    model, ids, pixels = cogvlm_tiny(expert_bias=True)
    x, roles = model.embed(ids, model.image_tokens(pixels))
    as_words, one_by_one = model.language.hidden(x), torch.where(roles == cogvlm.PATCH, cogvlm.BOI, roles)
    close(model.language.hidden(x, roles=one_by_one), as_words)
    assert (model.language.hidden(x, roles=roles) - as_words).abs().max() > 1e-3


def test_text_of_cogvlm_touches_no_vision_weight():
    """With every vision weight NaN the logits of a text are bit-identical, in one piece, padded, and word by word."""
    (model, ids, pixels), text, calls = cogvlm_tiny(), torch.randint(0, 400, (3, 9)), []
    mask = torch.arange(9) >= torch.tensor([[0], [5], [2]])
    say = lambda: (model(text), model(text, mask=mask), model.generate(text, mask=mask, max_new_tokens=5))
    before, vision = say(), re.compile(r"vision|adapter|.*vision_expert")
    for name, module in model.named_modules():
        if vision.match(name):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.generate(ids, pixels, max_new_tokens=6)  # runs each part once, for the prompt
    assert len(calls) == len(set(calls)) and sum(name.endswith("vision_expert.mlp") for name in calls) == 3
    calls.clear()
    for name, p in model.named_parameters():
        if vision.match(name):
            p.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, say(), strict=True)) and before[0].isfinite().all()
    assert not calls
    assert model(ids, pixels)[:, 1:].isnan().all()


def test_prompts_and_conversations_of_cogvlm_are_the_published_ones():
    assert cogvlm.build_prompt("what is this?") == "Question: what is this? Answer:"
    assert cogvlm.build_prompt("what is this?", "vqa") == "Question: what is this? Short answer:"
    assert cogvlm.build_prompt("a photo of {", "base") == "a photo of {"
    (model, *_), asked = cogvlm_tiny(style="base"), []
    cogvlm.answer(model, [], "a dog", lambda text: asked.append(text) or [7], str, max_new_tokens=1)
    cogvlm.answer(model, [], "a dog", lambda text: asked.append(text) or [7], str, style="vqa", max_new_tokens=1)
    assert asked == ["a dog", "Question: a dog Short answer:"]  # its own style, and one that is asked for
    with refuses(ValueError, "<image>"):
        cogvlm.build_prompt("<image> what is this?")
    first, second = cogvlm.PRESETS["cogvlm-chat-17b"], cogvlm.PRESETS["cogvlm2-llama3-19b"]
    assert cogvlm.prompt_row([7, 8], first, images=0) == [1, 7, 8]
    assert cogvlm.prompt_row([7, 8], first) == [1] + [32000] * (35 * 35 + 2) + [7, 8]
    assert cogvlm.prompt_row([7], second, images=2) == [128000] + [128256] * 2 * (48 * 48 + 2) + [7]
    say, config = lambda text: list(text.encode()), cogvlm.PRESETS["tiny"]
    ids, labels = cogvlm.conversation_row([("a?", "b"), ("c?", "d")], say, config)
    asks = [say(f"Question: {question} Short answer:") for question in ("a?", "c?")]
    assert ids == [497] + [499] * 18 + asks[0] + say(" b") + [498] + asks[1] + say(" d") + [498]
    assert [i for i, label in zip(ids, labels, strict=True) if i == label] == say(" b") + [498] + say(" d") + [498]
    assert labels.count(-100) == 19 + len(asks[0]) + len(asks[1])


COGVLM_NO_BOXES = [
    "", " ", "no box", "[[", "[[]]", "[[,,,]]", "[[1,2,3,4]]", "[[0001,000,100,100]]", "[[000,000,100]]",
    "[[000,000,100,100,200]]", "[[100,100,100,200]]", "[[100,100,200,100]]", "[[300,100,200,200]]",
    "[[100,300,200,200]]", "[[-10,000,100,100]]", "[[1e3,000,100,100]]", "[[000,000,100,100]", "[000,000,100,100]]",
    "((000,000,100,100))", "[[000 000 100 100]]", "[[000,,100,100]]", "[[0x1,000,100,100]]",
    "[[٠٠٠,٠٠٠,١٠٠,١٠٠]]",  # digits, but not ours
    "[[000,000,100,1 0]]", "[[000,000,100,\n100]]", "\0" * 50, "[" * 100_000, "[[000," * 50_000, "9" * 200_000,
]  # fmt: skip


def test_malformed_boxes_of_cogvlm_are_no_boxes_and_never_an_exception():
    assert not [text[:50] for text in COGVLM_NO_BOXES if cogvlm.parse_box(text) is not None]
    rng = random.Random(0)
    for _ in range(3000):
        box = cogvlm.parse_box("".join(rng.choice("[],0123456789 x-") for _ in range(rng.randrange(40))))
        assert box is None or (0 <= box[0] < box[2] < 1 and 0 <= box[1] < box[3] < 1)
    assert cogvlm.parse_box("it is [[000,010,999,500]], and [[100,100,200,200]]") == (0.0, 0.01, 0.999, 0.5)
    for thing in world.make_scene(random.Random(1)).things:  # what the world writes is read back, to a thousandth
        box = world.normalised_box(thing, 32, 32)
        assert cogvlm.parse_box(world.box_text(thing, 32, 32)) == pytest.approx(box, abs=1e-3)


def test_intersection_over_union_of_cogvlms_boxes_by_hand():
    unit = (0.0, 0.0, 0.5, 0.5)
    assert cogvlm.box_iou(unit, unit) == 1 and cogvlm.box_iou(unit, None) == cogvlm.box_iou(None, None) == 0
    assert cogvlm.box_iou(unit, (0.25, 0.0, 0.75, 0.5)) == pytest.approx(1 / 3)
    assert cogvlm.box_iou(unit, (0.5, 0.5, 1.0, 1.0)) == cogvlm.box_iou(unit, (0.7, 0.0, 1.0, 0.2)) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Qwen2-VL and Qwen2.5-VL


@pytest.mark.parametrize("kind", ["qwen2vl", "qwen2.5vl"])
def test_rope_index_of_qwen2vl_equals_the_published_one_on_random_mixes(oracles, load, kind):
    """Rows of words, images and clips in any order, padded on either side. No clip moves further in time than in rows
    or columns: there the class in transformers 5 goes on after rows and columns alone, the paper does not."""
    published, config, rng = oracles(kind)[0].model.get_rope_index, load(kind).config, random.Random(0)
    for _ in range(150):
        rows, grids, clips, seconds = [], [], [], []
        for _ in range(rng.randint(1, 3)):
            pieces = [rng.randint(0, 4)]
            for moving in rng.choices([False, True], k=rng.randint(0, 3)):
                h, w = 2 * rng.randint(1, 5), 2 * rng.randint(1, 5)
                grids.append((rng.randint(1, 1 + (max(h, w) // 2 - 1) // 3) if moving else 1, h, w))
                clips.append(moving)
                seconds.append(rng.choice((0.5, 0.25, 0.45)))
                pieces += [(QWEN_VIDEO if moving else QWEN_IMAGE, grids[-1]), rng.randint(1, 4)]
            rows.append(qwen_row(*pieces, 1, seed=rng.randint(0, 99)))
        if not grids:
            continue  # text alone
        (ids, mask), grids, clips = qwen2vl.pad_rows(rows, 0, rng.random() < 0.5), torch.tensor(grids), np.array(clips)
        given = dict(mm_token_type_ids=(ids == QWEN_IMAGE).int() + 2 * (ids == QWEN_VIDEO).int())
        given |= dict(image_grid_thw=grids[~clips], video_grid_thw=grids[clips], attention_mask=mask.int())
        if kind == "qwen2.5vl":  # theirs are of a step of two frames
            given["second_per_grid_ts"] = 2 * np.array(seconds)[clips]
        theirs, delta = published(ids, **given)
        ours = qwen2vl.rope_index(ids, config, grids, mask, seconds)
        assert torch.equal(ours, theirs), (ids, grids)
        # where generate puts the first new word: behind the largest position; theirs, counted from the real tokens
        assert torch.equal(ours.amax((0, 2)) + 1, delta[:, 0] + mask.sum(1))


def test_rope_index_examples_of_qwen2vl_by_hand():
    """Those of the docstring, number by number, and a clip that is longer than it is wide."""
    I, V = QWEN_IMAGE, QWEN_VIDEO
    frames = replace(qwen2vl.PRESETS["tiny"], image_token_id=I, video_token_id=V)
    seconds, one_by_one = replace(frames, tokens_per_second=2), replace(frames, mrope=False)

    def index(row, grids=None, mask=None, config=frames):
        return qwen2vl.rope_index(torch.tensor([row]), config, grids and torch.tensor(grids), mask)[:, 0].tolist()

    assert index([3, 4, 5]) == [[0, 1, 2]] * 3  # text alone: RoPE-1D
    image, clip_row = [3, 4] + 4 * [I] + [5], [3] + 8 * [V] + [5]
    assert index(image, [(1, 4, 4)]) == [[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]]
    assert index([I] * 3 + [3], [(1, 2, 6)]) == [[0, 0, 0, 3], [0, 0, 0, 3], [0, 1, 2, 3]]
    rows = [[0, 1, 1, 2, 2, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 1, 2, 1, 2, 3]]
    assert index(clip_row, [(2, 4, 4)]) == [[0, 1, 1, 1, 1, 2, 2, 2, 2, 3], *rows]
    rows = [row[:-1] + [4] for row in rows]
    assert index(clip_row, [(2, 4, 4)], config=seconds) == [[0, 1, 1, 1, 1, 3, 3, 3, 3, 4], *rows]
    long, grids = [3] + 3 * [V] + [4] + 2 * [I] + [5], [(3, 2, 2), (1, 2, 4)]
    assert index(long, grids) == [[0, 1, 2, 3, 4, 5, 5, 7], [0, 1, 1, 1, 4, 5, 5, 7], [0, 1, 1, 1, 4, 5, 6, 7]]
    assert index(long, grids, config=seconds)[0] == [0, 1, 3, 5, 6, 7, 7, 9]
    for row, mask, expected in (([I, I, 3, 4], [0, 0, 1, 1], [0, 0, 0, 1]), ([3, 4, I, I], [1, 1, 0, 0], [0, 1, 0, 0])):
        for mask in (torch.tensor([mask]), torch.tensor([mask]).bool()):  # in the padding an image is none
            assert index(row, mask=mask) == [expected] * 3
    assert index(image, [(1, 4, 4)], config=one_by_one) == [list(range(7))] * 3, "the ablation numbers all tokens"
    doc = " ".join(qwen2vl.rope_index.__doc__.split())
    assert "time 0 1 2 2 2 2 4 row 0 1 2 2 3 3 4 column 0 1 2 3 2 3 4" in doc
    assert "time 0 0 0 3" in doc and "column 0 1 2 3" in doc and "1 1 1 1 3 3 3 3, and b at 4" in doc
    assert "time 0 1 1 1 1 2 2 2 2 3 row 0 1 1 2 2 1 1 2 2 3 column 0 1 2 1 2 1 2 1 2 3" in doc


@pytest.mark.parametrize("kind", ["qwen2vl", "qwen2.5vl"])
def test_packed_images_equal_one_image_at_a_time_in_qwen2vl(load, kind):
    model, grids = load(kind), [QWEN_A, QWEN_B, QWEN_CLIP, QWEN_C, QWEN_B, (3, 2, 10), QWEN_A]
    patches, grid = qwen_patches(*grids)
    each = [model.image_tokens(x, g[None]) for x, g in zip(patches.split(grid.prod(1).tolist()), grid)]
    packed = model.image_tokens(patches, grid)
    close(packed, torch.cat(each))
    alone = model.image_tokens(patches[:68], torch.tensor([QWEN_A, QWEN_B, (1, 4, 8)]))  # of the clip its first step
    close(alone, packed[: len(alone)])
    assert qwen2vl.Packing(torch.arange(12) // 4, "cpu").shapes == [(3, 4)]  # images of one size are one batch


def test_learned_positions_of_qwen2vl_stand_where_their_patches_do():
    """The ablation's table, in the packed row's order: as it is on its own grid, stretched on others."""
    tower = world.LearnedGrid(replace(qwen2vl.PRESETS["tiny"].vision, layers=0), 6)
    tower.position_embedding.data[:, :2] = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
    grid = torch.tensor([[1, 6, 6], [1, 4, 12], [2, 6, 6]])
    places = qwen2vl.patch_places(grid, 2)[1:].T
    own, wide, clip_ = tower(torch.zeros(len(places), 384), grid)[:, :2].split([36, 48, 72])
    assert torch.equal(own, places[:36].float()) and torch.equal(clip_, own.repeat(2, 1))
    middles = (places[36:84] + 0.5) * torch.tensor([6 / 4, 6 / 12]) - 0.5
    inside = ((middles > 1) & (middles < 4)).all(1)  # at the edges there is nothing to interpolate with
    close(wide[inside], middles[inside], 0.1)


def test_what_does_not_fit_in_qwen2vl_is_an_error_with_both_numbers(load):
    model, row = load("qwen2vl"), lambda *pieces: torch.tensor([qwen_row(*pieces)])
    A, B, clip_ = ((QWEN_IMAGE, grid) for grid in (QWEN_A, QWEN_B, QWEN_CLIP))
    half, grid = (QWEN_IMAGE, (1, 4, 4)), torch.tensor([QWEN_A])
    for ids, (patches, grid), words in (
        (row(2, A, 2)[:, 3:], qwen_patches(QWEN_A, QWEN_B), [7, [1, 8, 4], [1, 2, 2], 9]),  # a token too few
        (row(2, A, B, 2), qwen_patches(QWEN_A), [9, [1, 8, 4], 8]),  # one too many
        (row(2, half, 1, half, 2), qwen_patches(QWEN_A), ["8 tokens", "grid 1"]),  # an image in two pieces
        # in two rows, at 7 to 10 and 11 to 14: from the first to the last as many columns as an image has tokens
        (torch.cat([row(7, half, 4), row(11, half)]), qwen_patches(QWEN_A), ["8 tokens", "grid 1"]),
        (row(2, A, 2), (None, None), [8, 0]),  # no image
        (row(3), qwen_patches(QWEN_A), [0, 8]),  # nothing but an image
        (row(2, A, 2), (noise(31, 96), grid), [31, [[1, 8, 4]], 32]),  # a patch too few
        (row(2, A, 2), (None, grid), [8, 0]),  # a grid, and nothing encoded
        (row(2, clip_, 2), qwen_patches(QWEN_CLIP), ["grid 1", [2, 4, 8]]),  # a clip where an image stands
        (row(2, A, clip_, 2), qwen_patches(QWEN_A, QWEN_CLIP), ["grid 2", [2, 4, 8]]),
        (row(257), (None, None), [257, 256]),
    ):
        for call in (model, model.generate):
            with refuses(ValueError, *words):
                call(ids, patches, grid)


def test_preprocessing_of_qwen2vl_equals_the_published_processor():
    config, images = replace(qwen2vl.VisionConfig(), max_pixels=600 * 600), [*pictures(), Image.new("RGB", (3, 2))]
    processor = quiet_transformers().Qwen2VLImageProcessorPil(size=dict(shortest_edge=56 * 56, longest_edge=600 * 600))
    for batch in [*([image] for image in images), images]:
        theirs = processor([image.convert("RGB") for image in batch], return_tensors="pt")
        patches, grid = qwen2vl.preprocess(batch, config)
        assert torch.equal(patches, theirs["pixel_values"]) and torch.equal(grid, theirs["image_grid_thw"]), batch
        tokens = [qwen2vl.num_image_tokens(x.height, x.width, qwen2vl.Qwen2VLConfig(config)) for x in batch]
        assert (grid.prod(1) // 4).tolist() == tokens


def test_smart_resize_of_qwen2vl_equals_the_published_one():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng, cases = random.Random(0), [(20, 4000, 28, 3136, 10**7), (10, 2000, 28, 3136, 10**7)]
    cases += [(28 * i + 14, 28 * j + 14, 28, 1, 10**7) for i in range(1, 9) for j in range(1, 9)]  # halves go to even
    for _ in range(3000):
        height = int(2 ** rng.uniform(0, 12))
        width = min(max(1, int(height * 2 ** rng.uniform(-7.5, 7.5))), 200 * height)
        factor, least = rng.choice(((28, 3136), (28, 100352), (8, 256), (32, 1)))
        cases.append((height, width, factor, least, rng.choice((least * 2, 10**6, 10**7))))
    assert not [
        case for case in cases if 200 * case[1] >= case[0] and qwen2vl.smart_resize(*case) != smart_resize(*case)
    ]
    for height, width in ((10, 2001), (4000, 19)):
        with refuses(ValueError, f"{height} x {width}", 200):
            qwen2vl.smart_resize(height, width, 28, 56 * 56, 10**7)


def test_clips_of_qwen2vl_are_cut_as_the_published_code_cuts_them():
    """Frames are resized one by one as images are, then cut by the published class's own method. To import that class
    takes torchvision, which is not here; the text of the method does not."""
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as published

    source = ast.parse((Path(published.__file__).parent / "video_processing_qwen2_vl.py").read_text())
    scope = dict(torch=torch)
    exec(next(ast.unparse(node) for node in ast.walk(source) if getattr(node, "name", "") == "patchify"), scope)
    config = replace(qwen2vl.VisionConfig(), video_min_pixels=84 * 84, video_max_pixels=100 * 100)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    rng = np.random.default_rng(0)
    for count, (width, height) in ((1, (90, 70)), (2, (64, 64)), (5, (30, 200)), (6, (191, 157))):
        size = published.smart_resize(height, width, 28, 84 * 84, 100 * 100)
        frames = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]
        resized = [np.asarray(frame.resize(size[::-1], Image.Resampling.BICUBIC)) for frame in frames]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)[None] / 255
        theirs, *grid = scope["patchify"](None, (pixels - mean) / std, 14, 2, 2)
        patches, ours = qwen2vl.preprocess([frames], config)
        close(patches, theirs[0], 1e-6)
        assert ours.tolist() == [grid]
        assert qwen2vl.num_image_tokens(height, width, qwen2vl.Qwen2VLConfig(config), count) * 4 == len(patches)
    # an image is a clip that shows it twice, with limits of its own, and may stand among clips
    both = qwen2vl.preprocess([frames, frames[0]], replace(config, min_pixels=84 * 84, max_pixels=100 * 100))
    assert torch.equal(both[0], torch.cat([patches, qwen2vl.preprocess([frames[:1] * 2], config)[0]]))
    assert both[1].tolist() == [grid, [1, *grid[1:]]]
    assert qwen2vl.preprocess([frames, frames[0]], config)[1].tolist() == [grid, [1, 12, 14]]


def test_what_is_no_image_and_no_clip_is_an_error_in_qwen2vl():
    new = lambda *size: Image.new("RGB", size)
    wrong = [([[]], [[]]), ([[new(60, 60), new(60, 50)]], [(60, 60), (60, 50)])]
    wrong += [([new(1, 300)], ["300 x 1", 200]), ([[new(300, 1)] * 2], ["1 x 300", 200])]
    for images, words in wrong:
        with refuses(ValueError, *words):
            qwen2vl.preprocess(images, qwen2vl.VisionConfig())


def test_prompts_of_qwen2vl_are_the_published_template():
    turn = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turn += "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    see, watch = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    both = ["image", "video"]
    for question, kinds, expected in (
        ("What?", ["image", *both], see + see + watch + "What?"),
        ("What?", ["video", "image"], watch + see + "What?"),  # in the order in which they are given
        ("In <image> and <video>?", both, f"In {see} and {watch}?"),
        ("In <image>?", both, f"{watch}In {see}?"),  # what is not placed stands in front
        ("<image>?", both, f"{watch}{see}?"),
        ("In <video>?", both, f"{see}In {watch}?"),
        ("{} braces", [], "{} braces"),
    ):
        assert qwen2vl.build_prompt(question, kinds) == turn.format(expected)
    for question, kinds, words in (("<image>", ["image"] * 2, ["1 <image>", 2]), ("<video>", [], ["1 <video>", 0])):
        with refuses(ValueError, *words):
            qwen2vl.build_prompt(question, kinds)


def test_a_turn_of_qwen2vl_has_a_token_for_each_merged_patch_and_labels_for_the_answer_and_its_end():
    config, grid = qwen2vl.PRESETS["tiny"], torch.tensor([(1, 4, 6), (2, 4, 4)])
    prompt = world.encode("<boi>" + "<image>" * 6 + "<eoi><boi>" + "<video>" * 8 + "<eoi>what? ASSISTANT:")
    reply = world.encode(" red") + [world.EOS_ID]
    row = qwen2vl.encode_turn("what?", " red", world.encode, config, ["image", "video"], grid)
    assert row == (prompt + reply, [-100] * len(prompt) + reply)
    for grids, count in ((grid[:1], 1), (None, 0)):
        with refuses(ValueError, 2, count):
            qwen2vl.expand_visuals("<image><video>", config, grids)


def test_a_question_to_qwen2vl_gets_its_images_and_clips_in_the_order_of_its_words():
    config, new = qwen2vl.PRESETS["tiny"], lambda *size: Image.new("RGB", size)
    images, wide, clip_, tall = [new(64, 32), [new(32, 32)] * 2, new(32, 80)], [1, 4, 8], [1, 4, 4], [1, 10, 4]
    for question, grids, seconds, kinds in (
        ("in <image> <video> <image>?", [wide, clip_, tall], [0.0, 0.2, 0.1], "i" * 8 + "v" * 4 + "i" * 10),
        ("what is new in <image> <image>?", [clip_, wide, tall], [0.2, 0.0, 0.1], "v" * 4 + "i" * 18),
    ):
        asked = qwen2vl.encode_question(question, images, world.encode, config, [0.0, 0.2, 0.1])
        assert asked["grid_thw"].tolist() == grids and asked["seconds"] == seconds
        names = {world.IMAGE_ID: "i", world.VIDEO_ID: "v"}
        assert "".join(names.get(i, "") for i in asked["ids"][0].tolist()) == kinds
        assert qwen2vl.Qwen2VL(config).generate(**asked, max_new_tokens=1).shape == (1, 1)
    assert qwen2vl.encode_question("what?", [], world.encode, config)["patches"] is None


@pytest.mark.parametrize("family", ["llava", "blip2", "flamingo", "cogvlm", "qwen2vl"])
def test_an_answer_ends_with_its_turn_and_fits_the_context(family):
    torch.manual_seed(0)
    module, model = MODULES[family], MODELS[family](MODULES[family].PRESETS["tiny"])
    images, context = [Image.new("RGB", (32, 32))], model.config.language.context
    question = "<image>what?" if family == "flamingo" else "what?"

    def answer(words, **options):
        """The new ids after a prompt with an image and so many words."""
        encode = lambda text: [model.config.image_token_id] * text.count("<image>") + [7] * words
        return json.loads(module.answer(model, images, question, encode, lambda ids: f" {ids} ", **options))

    with pytest.raises(ValueError, match=rf"(\d+) tokens.* {context}") as error:
        answer(context)
    front = int(re.search(r"\d+", str(error.value))[0]) - context  # what stands in front of the words
    assert front > 0 and len(answer(context - front - 1)) == 1
    said = answer(5, max_new_tokens=30)
    for ends in ((said[-1],), (9, said[-1], said[-2]), (said[-2], said[-1])):  # any of them ends it
        model.config = replace(model.config, eos_token_ids=ends)
        assert answer(5, max_new_tokens=30) == said[: min(said.index(i) for i in ends if i in said)] and len(said) == 30


def test_videos_for_qwen2vl_are_read_from_folders_and_gifs_with_the_seconds_between_their_frames(tmp_path):
    frames, durations = [Image.new("RGB", (20, 10), (80 * i, 0, 0)) for i in range(3)], [200, [100, 300, 500], 0]
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / ".hidden").write_text("what file managers leave behind")
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{i}.png")
        frames[0].save(tmp_path / f"{i}.gif", save_all=True, append_images=frames[1:], duration=durations[i])
    for name, seconds in (("frames", 0.5), ("0.gif", 0.2), ("1.gif", 0.3), ("2.gif", 0.1)):  # without any, a tenth
        read, between = world.load_video(tmp_path / name)
        assert [frame.getpixel((0, 0))[0] for frame in read] == [0, 80, 160] and between == pytest.approx(seconds), name
    assert world.load_video(tmp_path / "frames" / "0.png")[1] == pytest.approx(0.1)


chapter("own")


# ----------------------------------------------------------------------------------------------------------------------
# The command lines, as a user types them


def typed(family, *options):
    """What a user types, to be run: typed("llava", "--demo")()."""
    return lambda: world.workbench(family, [str(option) for option in options])


def about(line):
    """ "a.png b.png/what?/where?" -> --image a.png --image b.png --prompt what? --prompt where?"""
    files, *prompts = line.split("/")
    asked = [("--image", file) for file in files.split()] + [("--prompt", prompt) for prompt in prompts]
    return [word for pair in asked for word in pair]


TRACED = {  # family -> lines, as regular expressions: ids and their words, then modules and the shapes of their outputs
    "clip": [r"1 +257 +' a'", r"11 +498 +'<eos>'", r"vision +\[2, 17, 96\]", r"the whole model +\[2, 2\]"],
    "vilt": [r"0 +504 +'<cls>'", r"10 +503 +'<mask>'", r"ids +\[2, 25\]", r"blocks.3 +\[2, 42, 96\]"],  # 25 + 17
    "flamingo": [r"2 +499 +'<image>'", r"vision +\[6, 17, 96\]", r"connector +\[6, 4, 96\]"],  # three images a row
    "cogvlm": [r"2 to 19 +499 +'<image>'", r"vision +\[2, 17, 96\]", r"adapter +\[2, 18, 96\]"],  # with boi and eoi
    "blip2": [r"4 to 19 +499 +'<image>'", r"qformer +\[2, 16, 96\]", r"the whole model +\[2, 29, 512\]"],
    "llava": [r"4 to 19 +499 +'<image>'", r"27 +277 +' ASSISTANT'", r"mm_projector +\[2, 16, 96\]"],
    "qwen2vl": [r"1 to 12 +499 +'<image>'", r"vision +\[80, 96\]", r"merger +\[20, 96\]"],  # 2 x 2 patches are a token
}
DRAWN = {  # family -> one of the masks that it shows, row by row
    "clip": "#..... ##.... ###... ####.. #####. ######",
    "vilt": "##.###.. ##.###.. ........ ##.###.. ##.###.. ##.###.. ........ ........",  # padding in words and patches
    "flamingo": ".... ##.. ##.. ##.. ..## ..## ..##",  # words attend to the latents of the last image before them
    "cogvlm": "......... ......... ..#...... ..##..... ..###.... ..####... ..#####.. ..######. ..#######",
    "blip2": "##... ##... ###.. ####. #####",  # two queries and three words, while the Q-Former writes
    "llava": "#######. ########",  # two new tokens, six in the cache
    "qwen2vl": " ".join(["####........"] * 4 + ["....####...."] * 4 + ["........####"] * 4),  # three frames in one row
}


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_and_show_mask_print_what_is_true(family, capsys):
    typed(family, "--trace")()
    out = capsys.readouterr().out
    assert [line for line in TRACED[family] if not re.search(rf"^ *{line}", out, re.MULTILINE)] == []
    typed(family, "--show-mask")()
    out = capsys.readouterr().out
    rows = r"(?:   .*)?\n".join(re.escape(" ".join(row)) for row in DRAWN[family].split())  # Flamingo's end in words
    assert re.search(rf"^.*[a-z].*\n{rows}(?:   .*)?\n(?:\n|\Z)", out, re.MULTILINE), out
    if family == "cogvlm":
        lines = [tuple(line.split()) for line in out.splitlines()]
        table = lines[lines.index(("token", "expert", "position")) + 1 :]
        assert table[2:7] == [("boi", "vision", "2"), *[("patch", "vision", "3")] * 3, ("eoi", "language", "4")]


ANATOMY = {  # family, preset -> what must be said of shapes, what trains, tokens, FLOPs and the cache
    ("clip", "clip-vit-base-patch32"): [
        "blocks x 12", "softmax", "50 tokens", "8,816,836,608 for an image, 5,959,016,448 for a text"],
    ("clip", "siglip-base-patch16-224"): ["sigmoid", "196 tokens -> 1 vector of 768;  text of 64 tokens"],
    ("vilt", "vilt-b32-mlm"): [  # in whole patches, beside the costs of a ResNet-101
        "384 x 576: 217", "1,019,215,872 to embed", "46,091,243,520 in the encoder", "68,761,681,920"],
    ("flamingo", "idefics-9b"): [
        "gated_blocks x 8", "1,560,497,936 (17.5 %)", "64 latents beside the text, 1 token in it",
        "334,587,658,240 to encode", "28,990,242,816 to resample", "1,015,222,894,592 to read",
        "524,288 bytes a token", "8,388,608 for the latents of one image"],
    ("cogvlm", "cogvlm-chat-17b"): [  # the last part is Vicuna-7B, as published
        "tower 4,282,641,664 + adapter 142,622,720 + vision experts 6,476,005,376 + language model 6,738,415,616",
        "6,618,628,096 (37.5 %)", "1227 tokens", "524,288 bytes a token", "643,301,376 for one image"],
    ("blip2", "blip2-opt-2.7b"): [  # nothing of stage 1
        "\n\nstage 2: 107,133,696 trained (2.9 %)", "257 features -> 32 queries", "327,680 bytes a token"],
    ("blip2", "blip2-itm-vit-g"): ["\n\nstage 1: 186,082,818 trained (15.9 %), 985,949,440 frozen\nthe Q-Former"],
    ("llava", "llava-1.5-7b"): [
        "stage 1: 20,979,712 trained (0.3 %)", "stage 2: 6,759,919,616 trained", "576 tokens", "524,288 bytes a token"],
    ("llava", "tiny"): ["blocks x 4", "16 tokens"],
    ("qwen2vl", "qwen2.5-vl-7b"): [
        "stage 1: 676,550,144 trained", "stage 2: 8,292,166,656 trained", "stage 3: 7,615,616,512 trained",
        "from 3,136 to 12,845,056 pixels, windows of 112 pixels but in layers 7, 15, 23, 31", "57,344 bytes a token",
        " 224 x 224         64 ", " 476 x 1288       782 ", f" {64 * 57344:,}\n"],
    ("qwen2vl", "tiny"): ["any resolution from 256 to 16,384 pixels\n", "576 bytes a token"],
}  # fmt: skip


@pytest.mark.parametrize("family, preset", ANATOMY)
def test_anatomy_says_what_trains_and_what_images_and_words_cost(family, preset, capsys):
    """FLOPs for a new word against a counter that watches one go through; biases, norms and its attention are the
    difference, and whether the table of words is multiplied (a tied head) is not."""
    typed(family, "--anatomy", preset)()
    out = capsys.readouterr().out
    assert [fact for fact in ANATOMY[family, preset] if fact not in out] == []
    if preset != "tiny":
        assert out.startswith(f"{preset}: {PUBLISHED_COUNTS[family, preset]:,} parameters\n")
    if said := re.search(r"([\d,]+)(?: FLOPs)? for each new word", out):
        with torch.device("meta"):
            language = MODELS[family](MODULES[family].PRESETS[preset]).language
            word, position = torch.zeros(1, 1, dtype=torch.long), torch.zeros(3, 1, 1)
        read = lambda: language(word)
        if family == "qwen2vl":  # which is told the position
            read = lambda: language.lm_head(language.hidden(language.embed_tokens(word), position))
        assert int(said[1].replace(",", "")) == pytest.approx(world.count_flops(read), rel=0.01)


def test_a_vision_encoder_with_windows_costs_what_the_area_costs():
    """Twice the area in one image, two images, two frames: the same work, digit for digit. With full layers more."""
    config = qwen2vl.PRESETS["tiny"]
    windows = replace(config, vision=replace(config.vision, window_size=32))
    mixed = replace(config, vision=replace(windows.vision, full_layers=(1,)))
    with torch.device("meta"):
        windows, mixed = qwen2vl.Qwen2VL(windows), qwen2vl.Qwen2VL(mixed)

    def cost(model, *grids):
        patches = torch.empty(sum(math.prod(grid) for grid in grids), 384, device="meta")
        return world.count_flops(lambda: model.image_tokens(patches, torch.tensor(grids, device="cpu")))

    twice = 2 * cost(windows, (1, 8, 8))
    assert cost(windows, (1, 8, 16)) == cost(windows, (1, 8, 8), (1, 8, 8)) == cost(windows, (2, 8, 8)) == twice
    assert cost(mixed, (1, 8, 16)) > cost(mixed, (2, 8, 8)) == 2 * cost(mixed, (1, 8, 8))


@pytest.fixture
def desk(monkeypatch, runs):
    """The current folder, with files that somebody gives as --image or --video. Training is a TypeError."""
    monkeypatch.setattr(world, "fit", None)
    monkeypatch.chdir(runs)
    frames = [Image.fromarray(frame) for frame in np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), np.uint8)]
    for ending in ("gif", "png"):
        frames[0].save(f"moving.{ending}", save_all=True, append_images=frames[1:], duration=200)
        whole = Path(f"moving.{ending}").read_bytes()
        Path(f"cut.{ending}").write_bytes(whole[: len(whole) // 2])
    for name, height in (("one.png", 1), ("two.png", 2), ("thin.png", 5000)):
        Image.new("RGB", (1, height), "red").save(name)
    Path("text.png").write_text("I am no image")
    Path("empty.png").touch()
    Path("folder.png").mkdir()
    return runs


WRONG_USE = [  # what is typed, and what the line must contain
    ("", ["--demo"]),
    ("--nonsense", ["--nonsense"]),
    ("--anatomy gpt-5", ["gpt-5", "tiny"]),
    ("--demo --device abacus", ["abacus", "cpu"]),
    ("--demo --dtype float8", ["float8", "bfloat16"]),
    ("--weights /no/where --image one.png --prompt [MASK]", ["/no/where"]),
]
NO_IMAGES = ("no.png", "text.png", "empty.png", "folder.png")  # found before anything is trained or a checkpoint opened


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_use_costs_one_line_and_status_2_and_nothing_is_trained_or_written(family, capsys, desk):
    before = sorted(desk.rglob("*"))
    for line, words in WRONG_USE:
        fails_in_one_line(typed(family, *line.split()), capsys, *words)
    for mode, name in itertools.product(("", "--demo ", "--weights no/where "), NO_IMAGES):
        fails_in_one_line(typed(family, *f"{mode}--image {name} --prompt [MASK]".split()), capsys, name)
    assert sorted(desk.rglob("*")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are those of libgomp on Linux only")
def test_threads_that_wait_do_not_spin_long():
    """Two trainings at once on two cores were 13 times slower each. What the library read when it was loaded counts."""
    for program in (*FAMILIES, "train_tiny"):
        source = (ROOT / f"{program}.py").read_text()
        assert 0 < source.find('setdefault("GOMP_SPINCOUNT", "3000")') < source.find("\nimport torch"), program
    assert "GOMP_SPINCOUNT = '3000'" in run(str(ROOT / "llava.py"), "--help", OMP_DISPLAY_ENV="VERBOSE").stderr


def test_a_mistake_in_a_real_shell_leaves_no_traceback_and_no_files(tmp_path):
    done = run(str(ROOT / "llava.py"), "--demo", "--image", "missing.png", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "llava.py: no such image: missing.png\n" and not done.stdout
    assert list(tmp_path.iterdir()) == []


LONGEST = [  # family, images, how often "red" fits beside them and the template, of how many tokens in all
    ("clip", "", 30, 32), ("vilt", "one.png", 38, 40), ("blip2", "one.png two.png", 217, 240),
    ("cogvlm", "one.png", 206, 232), ("cogvlm", "one.png two.png", 188, 232),
    ("flamingo", "", 247, 248), ("flamingo", "one.png two.png", 245, 248),
    ("llava", "", 217, 240), ("llava", "one.png two.png", 200, 240),
    ("qwen2vl", "", 487, 496), ("qwen2vl", "one.png two.png", 486, 496),
]  # fmt: skip
NOT_ASKED = [  # family, images and a prompt that cannot be asked about them, what the line must contain
    *((family, "one.png/ ", ["empty"]) for family in FAMILIES), ("cogvlm", "one.png/<image> where?", ["<image>"]),
    ("blip2", "one.png/<image> what?", ["<image>"]), ("flamingo", "/<image>", ["1 <image>", "0 image"]),
    ("flamingo", "one.png/<image> dax <image>", ["2 <image>", "1 image"]),
    ("flamingo", "one.png two.png/<image> dax", ["1 <image>", "2 image"]),
    ("llava", "one.png/<image><image> ?", ["2 <image>", "1 image"]), ("qwen2vl", "one.png/<video>?", ["1 <video>", 0]),
    ("qwen2vl", "one.png two.png/<image>?", ["1 <image>", 2]), ("qwen2vl", "thin.png/what?", ["5000 x 1", 200]),
]  # fmt: skip


def test_toys_refuse_a_prompt_that_is_empty_too_long_or_names_other_images_before_they_train(desk, capsys):
    """The image and the room for an answer are counted. One word fewer, and it trains."""
    for family, images, words, tokens in LONGEST:
        prompt = f"{images}/red{' red' * (words - 1)}"
        with pytest.raises(TypeError, match="NoneType.*not callable"):
            typed(family, "--demo", *about(prompt))()
        fails_in_one_line(typed(family, "--demo", *about(f"{prompt} red")), capsys, tokens + 1, tokens)
    for family, line, words in NOT_ASKED:
        fails_in_one_line(typed(family, "--demo", *about(line)), capsys, *words)


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_the_prompt_the_toy_answers_or_refuses_in_one_line(family, desk, untrained, capsys):
    special = " ".join(token for token in world.SPECIAL if token not in ("<image>", "<video>"))
    odd = ["<image>", "<video>", "<image><image> what?", special]
    for prompt in [*odd, "<|image_pad|> [MASK] {} {0} %s \\1 \0 \u00e9 \U0001f600"]:
        try:
            typed(family, "--image", "one.png", "--prompt", prompt)()
        except SystemExit as ended:
            out, err = capsys.readouterr()
            assert ended.code == 2 and err.count("\n") == 1 and not out, (prompt, out, err)
        else:
            assert capsys.readouterr().out.strip(), prompt


ANSWERED = {  # family, what is typed: a regular expression of all answers
    ("clip", "one.png cut.gif/a red ring/a ball"): r"(\w+\.\w+\n(  [ \d]\d\d?\.\d %  a (red ring|ball)\n){2}){2}",
    ("clip", "/a red ring"): r"\[.* a .*\]\n  100\.0 %  a red ring\n",  # about a scene, which is named
    ("vilt", "one.png cut.gif/a [MASK] ring/a <mask>/a ring"):
        r"(\w+\.\w+\n    a \[[^\n]*\] ring\n    a \[[^\n]*\]\n     ?\d+% yes: a ring\n){2}",
    ("flamingo", "one.png cut.gif/<image> dax<|endofchunk|><image>"): r"<image> dax<\|endofchunk\|><image> -> .*",
    ("flamingo", "one.png cut.gif/what?"): r"<image><image>what\? -> .*",
    ("flamingo", "one.png cut.gif"): r"<image><image> -> .*",
    ("flamingo", "/circle dax"): r"circle dax -> .*",  # text alone, for the language model
    ("vilt", "/a [MASK] ring"): r"\[.* a .*\]\n    a \[[^\n]*\] ring\n",
    ("cogvlm", "/what?"): r"\[.* a .*\]\nwhat\? -> [^\n]*\n",
    ("cogvlm", "one.png/what?/where?"): r"what\? -> .*\nwhere\? -> .*",
    ("blip2", "one.png cut.gif/what?/where?"): r"(what\? -> [^?]*\n){2}(where\? -> [^?]*\n){2}",  # one image at a time
    ("llava", "one.png cut.gif/what?/where?"): r"what\? -> .*\nwhere\? -> .*",
    ("qwen2vl", "one.png/what?/where?"): r"what\? -> .*\nwhere\? -> .*",
}  # fmt: skip


UNREAD = dict(clip="ball", flamingo="what", blip2="what, where", llava="where", qwen2vl="where")  # of those questions


@pytest.mark.parametrize("family, line", ANSWERED)
def test_own_questions_to_the_toy_are_answered_and_below_it_says_what_it_got_and_was_taught(
    family, line, desk, untrained, capsys
):
    """At most three lines, and nothing else."""
    typed(family, *about(line))()
    out, below = capsys.readouterr().out, ""
    if line[0] != "/":
        below = rf"written: {re.escape(str(desk))}\S+seen\.png\ntaught: [^\n]*\n"
        if family in UNREAD and ("what" in line or "ball" in line):
            below += rf"never read [^\n]*: {UNREAD[family]}\n"
    assert re.fullmatch(ANSWERED[family, line] + below, out, re.DOTALL) and "In go" not in out, out
    assert ("no example" in out) == (family == "flamingo" and "endofchunk" not in line)  # a hint


@pytest.mark.parametrize("family", FAMILIES)
def test_words_of_a_prompt_that_no_training_has_beside_a_picture_are_named(family, untrained, capsys):
    recipe = world.RECIPES[family]()

    def unread(*prompts):
        recipe.explain(None, [], prompts)
        return re.sub("^never.*: ", "", capsys.readouterr().out).strip()

    for plan in recipe.stages:
        assert unread(*world.strings(recipe.batch(plan, plan.steps - 1))) == "", "what is trained later"
    assert unread(*world.SPECIAL, "[MASK]? ring!") == ""
    assert unread("<image> Cat ring zebra-fish", "Cat scene") == "Cat, zebra-fish, scene", "capitals are other tokens"
    fewer = {"cogvlm": "", "clip": "where", "llava": "where", "qwen2vl": "where", "blip2": "where, is"}
    assert unread("where is the circle?") == fewer.get(family, "where, is, the")
    recipe.given = "a model that was trained on who knows what"
    assert unread("zebra") == ""


TAUGHT = {  # family -> words that the line about it has, and words that it has not; then of demos that teach less
    "clip": ("red circle ring", "what"), "vilt": ("red circle ring", "what"), "flamingo": ("circle ring", "red what"),
    "blip2": ("red circle describe", "what"), "llava": ("red circle size many describe", "where"),
    "cogvlm": ("red circle size where", "number"), "qwen2vl": ("red circle size way number", "where"),
}  # fmt: skip


TAUGHT |= {
    ("llava", "demo"): ("red circle many describe", "where size"),
    ("qwen2vl", "demo"): ("red circle size describe", "where many way number"),
}


@pytest.mark.parametrize("family, done", [*itertools.product(FAMILIES, [False]), ("llava", True), ("qwen2vl", True)])
def test_own_images_are_drawn_as_the_toy_gets_them_in_patches_and_with_where_it_looked(
    family, done, desk, untrained, monkeypatch, capsys
):
    """Of several images without the heat map, which belongs to one."""
    monkeypatch.setattr(world.RECIPES[family], "done", lambda *_: done)
    page_of = lambda: Image.open(desk / family / "seen.png").convert("RGB")
    prompt, orange = "<image>" if family == "flamingo" else "a red ring", (255, 136, 0)
    Image.new("RGB", (90, 60), (9, 99, 199)).save("my.png")
    typed(family, "--image", "my.png", "--prompt", prompt)()
    taught = re.findall(r"\w+", re.search("taught: (.*)", capsys.readouterr().out)[1])
    words, others = (text.split() for text in TAUGHT.get((family, done or "demo"), TAUGHT[family]))
    assert {*words} <= {*taught} and not {*others} & {*taught}
    width, height, scale, side = dict(vilt=(48, 32, 5, 8), qwen2vl=(96, 64, 2, 16)).get(family, (32, 32, 8, 8))
    page, corner, end = page_of(), 10 + side * scale, 10 + width * scale
    assert page.getpixel((12, 12)) == (9, 99, 199) and page.getpixel((end, 12)) == (255, 255, 255)
    assert page.getpixel((corner, 12)) == page.getpixel((12, corner)) == orange, "lines between the patches"
    assert page.height < 10 + height * scale + 60 and (page.width > 2 * end) == (family != "flamingo")
    typed(family, "--image", "my.png", "--image", "my.png", "--prompt", prompt * (1 + (family == "flamingo")))()
    page = page_of()
    assert page.getpixel(((page.width - 10) // 2 + corner, 12)) == orange, "two pictures, each with its lines"


def test_a_video_is_drawn_frame_by_frame_as_qwen2vl_gets_it(desk, untrained):
    sizes = []
    for option, times in (("--video", 1), ("--image", 3), ("--image", 20)):
        typed("qwen2vl", *[option, "moving.gif"] * times, "--prompt", "what moves?")()
        sizes.append(Image.open(desk / "qwen2vl" / "seen.png").width)
    assert sizes[0] == sizes[1] < sizes[2] < 3 * sizes[0], "eight at most"


@torch.no_grad()
def test_where_an_answer_looks_is_the_attention_of_the_token_before_it_to_each_patch(monkeypatch):
    """Made-up attention, from which its place can be read: 1000 * query + key."""

    @contextlib.contextmanager
    def numbered():
        with attention_maps() as maps:
            yield maps
        for i, x in enumerate(maps):
            queries, keys = (torch.arange(float(n)) for n in x.shape[2:])
            maps[i] = (1000 * queries[:, None] + keys).expand_as(x)

    monkeypatch.setattr(world, "attention_maps", numbered)
    picture = Image.new("RGB", (64, 48))
    for family, text, asks, first, rows, columns in (  # first: of the patches, behind words, boi or the class token
        ("llava", "what is red?", -1, 3, 4, 4), ("cogvlm", "what is red?", -1, 2, 4, 4),
        ("qwen2vl", "what is red?", -1, 1, 3, 4), ("vilt", "a <mask> ring", 2, 6, 4, 5), ("vilt", "a ring", 0, 5, 4, 5),
    ):  # fmt: skip
        recipe, model = world.RECIPES[family](), fresh(family).eval()
        length = recipe.prompt(model, [(picture, text)])["ids"].shape[1]
        patches = torch.arange(float(rows * columns)).view(rows, columns)
        close(recipe.look(model, picture, text), 1000 * (asks % length) + first + patches, 1e-6)
    recipe, model, heats = world.BLIP2Recipe(), fresh("blip2").eval(), torch.rand(16, 4, 4)
    monkeypatch.setattr(world, "query_attention", lambda *_: heats)
    last = recipe.prompt(model, [(picture, "what?")])["ids"].shape[1] - 1
    queries = 1000 * last + 3 + torch.arange(16.0)
    close(recipe.look(model, picture, "what?"), torch.einsum("q,qrc->rc", queries, heats))


def test_of_a_wrong_answer_a_demo_says_what_most_of_the_attention_was_on_if_that_was_another_thing():
    pairs = (("red", "ring"), "top-right"), (("blue", "square"), "bottom-left")
    red, blue = (world.place_thing(pair, "small", place, random.Random(0)) for pair, place in pairs)
    scene = world.Scene((red, blue))
    for rows, columns in ((4, 4), (2, 5), (3, 3), (5, 2)):
        heat = torch.full((rows, columns), 0.01)
        heat[-1, 0] += 1
        place, thing, share = world.looked_at(heat, scene)
        assert (place, thing) == ("bottom-left", blue) and share > 0.8
    assert world.looked_at(torch.tensor([[1.0, 4.0, 5.0], [0.0, 4.0, 0.0]]), scene) == ("top-right", red, 0.5)
    there = "; 70% of its attention to the image was bottom-left, at the blue square"
    most, half = torch.tensor([[0.1, 0.1], [0.7, 0.1]]), torch.tensor([[0.25, 0.25], [0.5, 0]])
    for heat, question, why in (
        (most, "what shape is the red thing?", there),
        (most, "where is the ring?", there),
        (most, "what is top-left?", there),
        (most.flip(0), "what size is the ring?", "; 70% of its attention to the image was top-left, where nothing is"),
        (most, "what shape is the blue thing?", ""),  # it is where it should be
        (most, "how many red things are there?", ""),  # about the whole image
        (most, "is there a red thing?", ""),
        (most, "what colour is the cross?", ""),  # there is none
        (half, "what shape is the red thing?", ""),
    ):
        assert world.distraction(heat, scene, question) == why, question


def test_the_place_that_a_question_is_about():
    rng = random.Random(0)
    for kind in world.QUESTIONS * 40:
        scene = world.make_scene(rng)
        if asked := world.question(kind, scene, rng):
            place = world.asked_place(scene, asked[0])
            if kind in ("colour", "shape", "size", "where", "colour at", "shape at"):
                [thing] = world.only(scene, place=place)
                assert asked[1] in (*thing.pair, thing.size, place)
            else:
                assert place == (asked[0][8:-1] if kind == "what" else None), asked


ASKED_IN_DEMOS = {  # family, is there a standard training? -> the kinds of its examples
    ("llava", False): (*world.PLACE_KINDS, "what", "colour at", "shape at"),
    ("llava", True): world.KINDS,
    ("cogvlm", False): ("box",) * 4 + ("colour", "shape", "size", "what"),
    ("cogvlm", True): ("box",) * 4 + world.PLACE_KINDS,
    ("qwen2vl", False): ("colour", "shape", "size", "what", "colour", "shape"),
    ("qwen2vl", True): world.KINDS[:6],
}


@pytest.mark.parametrize("family, done", ASKED_IN_DEMOS)
def test_examples_of_a_demo_are_each_of_another_kind(family, done, untrained, monkeypatch, capsys):
    """Of the kinds that were taught, and what is counted below them too. Here all are answered rightly."""
    shown = []
    monkeypatch.setattr(world.RECIPES[family], "done", lambda *_: done)

    def answers(recipe, model, asked, longest=8):
        shown.append([item[1:] for item in asked])
        return [right for *_, right in asked]

    monkeypatch.setattr(world.RECIPES[family], "answers", answers)
    monkeypatch.setattr(world, "range", lambda *of: range(12) if of == (200,) else range(*of), raising=False)
    typed(family, "--demo")()
    out = capsys.readouterr().out.split("the same picture")[0]
    asked = shown[1]  # after the first three of them, which the untrained model is asked
    assert tuple(kind_of(text) for text, _ in asked) == ASKED_IN_DEMOS[family, done]
    if family == "cogvlm":
        boxes, asked = asked[:4], asked[4:]
        assert out.count("(IoU 1.00)") == 4
        for names in (world.SHAPES, world.PLACES):
            assert len({name for name in names for _, box in boxes if name in box}) == 4
    [many] = [texts for texts in shown if len(texts) == 12 and kind_of(texts[0][0]) != "box"]
    taught = {*ASKED_IN_DEMOS[family, done]} - {"box"} if not done else {*world.KINDS}
    assert {kind_of(text) for text, _ in many} <= taught
    assert out.count("(right)") >= len(asked) and "wrong" not in out and "its attention" not in out
    if family == "qwen2vl":
        films = [[item[-1] for item in asked] for asked in shown]
        assert (["left", "right", "up", "down"] in films) == done and ("a movie of" in out) == done


def test_the_words_hidden_in_vilts_demo_are_each_of_another_kind(untrained, capsys):
    typed("vilt", "--demo")()
    colour, shape, place, size = re.findall(r"wrong, it is (.*)\)", capsys.readouterr().out)
    assert colour in world.COLOURS and shape in world.SHAPES and place in world.PLACES and size in world.SIZES


def test_videos_are_read_and_odd_ones_cost_one_line_that_names_them(desk, untrained, capsys):
    for folder in ("nothing", "folders", "texts"):
        Path(folder).mkdir()
    Path("folders/a.png").mkdir()
    Path("texts/0.png").write_text("no frame")
    ask = lambda name: typed("qwen2vl", "--video", name, "--prompt", "what moves?")
    for name in ("nothing", "folders", "texts", "text.png", "empty.png", "cut.gif", "cut.png", "none.gif"):
        fails_in_one_line(ask(name), capsys, name)
    for name in ("moving.gif", "moving.png", "one.png"):
        ask(name)()
        assert capsys.readouterr().out.startswith("what moves? -> ")
    frames, seconds = world.load_video("moving.gif")
    assert len(frames) == 3 and seconds == pytest.approx(0.2)
    whole = Path("moving.gif").read_bytes()
    for cut in range(len(whole) // 3 + 20, len(whole) - 20, len(whole) // 9):  # of some Pillow raises an IndexError
        Path("cut.gif").write_bytes(whole[:cut])
        with refuses(ValueError, "cut.gif"):
            world.load_video("cut.gif")


def test_frames_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    for n in (1, 2, 9, 10, 11, 100):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{n} of 7.png")
    assert [frame.getpixel((0, 0))[0] for frame in world.load_video(tmp_path)[0]] == [1, 2, 9, 10, 11, 100]


@pytest.mark.parametrize("ending", ["webp", "png"])
def test_a_clip_turned_by_exif_is_turned_in_every_frame(ending, tmp_path):
    file, exif = tmp_path / f"a.{ending}", Image.Exif()
    frames = [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue")]
    exif[0x0112] = 6
    frames[0].save(file, save_all=True, append_images=frames[1:], exif=exif)
    assert [frame.size for frame in world.load_video(file)[0]] == [(20, 40)] * 2


GREYS = dict(bits16=(65535, np.uint16), bits32=(255, np.int32), more=(65535, np.int32), most=(10**8, np.int32))
GREYS |= dict(fractions=(1, np.float32), levels=(255, np.float32), a_mask=(1, np.int32))


@pytest.mark.parametrize("white, dtype", GREYS.values(), ids=GREYS)
def test_grey_pictures_and_stacks_of_more_than_8_bits_keep_their_greys(white, dtype, tmp_path):
    grey = np.linspace(0, white, 800).reshape(20, 40).astype(dtype)
    Image.fromarray(grey).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(grey)])
    wanted = np.rint(grey / white * 255)
    for read in (world.load_image(tmp_path / "a.tif"), *world.load_video(tmp_path / "a.tif")[0]):
        assert np.abs(np.asarray(read)[..., 1] - wanted).max() <= 1


def test_grey_numbers_that_are_none_cost_their_pixels_only(tmp_path):
    Image.fromarray(np.float32([[0, 0.5, 1, np.nan, np.inf, -np.inf]])).save(tmp_path / "a.tif")
    assert np.asarray(world.load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255, 0, 0, 0]


def test_a_sound_picture_with_damaged_exif_is_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 4\nzzzz")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png", pnginfo=info)
    assert world.load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_a_film_is_told_what_a_video_is(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + b"\0" * 100)
    with refuses(ValueError, "film.mp4", "folder", "GIF", "WebP", "PNG"):
        world.load_video(tmp_path / "film.mp4")


def test_what_the_terminal_cannot_write_is_replaced(desk, untrained, monkeypatch):
    """By families and by the trainer: as in a terminal of Windows, an animal in Chinese and half an emoji."""
    Image.new("RGB", (9, 9)).save("\u732b.png")
    monkeypatch.setattr(world.CLIPRecipe, "own_data", lambda self, args: world.say("\u732b\ud83d.png") or [])
    for command in (
        typed("clip", "--image", "\u732b.png", "--prompt", "a ring"), lambda: world.main(["clip", "--data", "."])
    ):  # fmt: skip
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
        command()
        sys.stdout.flush()
        assert b"?.png" in sys.stdout.buffer.getvalue().replace(b"??", b"?")


def test_images_of_every_kind_are_read_and_others_refused_by_name(desk):
    """One pixel, 1 x 5000, palette, alpha, 16 bits, animated, turned by EXIF."""
    rgb = Image.new("RGB", (40, 20), (250, 10, 10))
    rgb.paste((10, 10, 250), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    deep = Image.fromarray(np.linspace(0, 65535, 800).reshape(20, 40).astype(np.uint16))
    rgb.save("turned.jpg", exif=exif)
    rgb.quantize(8).save("palette.png", transparency=0)
    rgb.convert("RGBA").save("alpha.png")
    deep.save("deep.png")
    for name in ("one.png", "thin.png", "palette.png", "alpha.png", "deep.png", "moving.gif", "cut.gif", "turned.jpg"):
        image = world.load_image(name)
        assert image.mode == "RGB"
        assert clip.preprocess([image], clip.PRESETS["tiny"].vision).isfinite().all(), name
    assert world.load_image("turned.jpg").size == (20, 40)
    grey = np.asarray(world.load_image("deep.png"))[..., 0].reshape(-1)
    assert grey[0] == 0 and grey[-1] == 255 and abs(int(grey[400]) - 127) < 3
    rgb.save("cut.jpg")
    Path("cut.jpg").write_bytes(Path("cut.jpg").read_bytes()[:600])
    for name in ("cut.jpg", *NO_IMAGES):
        with refuses(ValueError, name):
            world.load_image(name)


def test_a_box_in_cogvlms_answer_is_drawn_on_the_image(desk, untrained, monkeypatch, capsys):
    Image.new("RGB", (70, 50)).save("photo.png")
    monkeypatch.setattr(cogvlm, "answer", lambda *_, **__: "at [[100,200,500,400]]")
    typed("cogvlm", "--image", "photo.png", "--prompt", "where?")()
    out = capsys.readouterr().out
    assert "where? -> at [[100,200,500,400]]\n" in out and str(Path("cogvlm/box.png")) in out
    drawn = Image.open(desk / "cogvlm" / "box.png")
    assert drawn.size == (256, 183) and drawn.getpixel((26, 60)) == (255, 0, 255)  # on the left edge of the box


@torch.no_grad()
def test_a_patch_is_as_important_as_the_similarity_lost_without_it():
    torch.manual_seed(0)
    model, picture = clip.CLIP(clip.PRESETS["tiny"]).eval(), world.draw(world.make_scene(random.Random(0)))
    text = F.normalize(torch.randn(96), dim=0)
    heat = world.patch_importance(model, picture, text)
    pixels = clip.preprocess([picture], model.config.vision)
    whole = model.encode_image(pixels) @ text
    pixels[:, :, 8:16, 16:24] = pixels.mean()
    lost = whole - model.encode_image(pixels) @ text
    assert heat.shape == (4, 4) and heat[1, 2].item() == pytest.approx(lost.item(), rel=1e-3)


DEMOS = {  # family -> what is said, in this order, and the size of the picture
    "clip": (r"before training, the right text .*after training, for \d+%.*(\n( +-?\d+\.\d){4}){4}\n", (596, 596)),
    "vilt": (r"random weights \d+%.*after training, \d+%; with a wrong image.* yellow +triangle", (728, 280)),
    "flamingo": (r"bit-identical\? True.*after training, \d+% of the new names.*identical: 100%", (760, 396)),
    "cogvlm": (r"before training.*after training.*\d+% are.*: of ([\d,]+) logits \1 are bit-identical", (796, 584)),
    "blip2": (
        r"(stage 1: .*stage 2: .*){3}after stage 1, of 200 .*after stage 2, of 200 .*where the queries look",
        (892, 456),
    ),
    "llava": (r"before training.*after training.*\d+% are.*(\n( +\d+\.\d){8}){4}\n", (648, 752)),
    "qwen2vl": (r"before training.*after training.*\d+% are.*the same picture.* \d tokens: ", (840, 480)),
}


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_demo_says_what_it_shows_and_draws_it(family, done, untrained, runs, monkeypatch, capsys):
    """Of toys that nobody trained, and of 12 examples where it measures 200; about scenes that no claim is measured
    on. Qwen2-VL's projection is scaled by training scenes; what has an unseen pair, or one thing, has no split."""
    monkeypatch.setattr(world, "range", lambda *of: range(12) if of == (200,) else range(*of), raising=False)
    world.world_fingerprint()  # draws, but only once
    shown, draw = [], world.draw
    monkeypatch.setattr(world, "draw", lambda scene, *size: shown.append(scene) or draw(scene, *size))
    monkeypatch.setattr(world.RECIPES[family], "done", lambda *_: done)
    log = runs / ("flamingo" if done else "flamingo-demo") / "log.jsonl"
    log.parent.mkdir()
    log.write_text("".join(json.dumps({"step": step, "gate": step / 10}) + "\n" for step in range(4)))
    typed(family, "--demo")()
    out = capsys.readouterr().out
    assert re.search(DEMOS[family][0], out, re.DOTALL), out
    assert (f"python train_tiny.py {family}" in out) == (not done and family != "clip"), "which shows more"
    smaller = {("qwen2vl", False): (840, 240), ("vilt", False): (728, 144)}
    assert Image.open(runs / family / "demo.png").size == smaller.get((family, done), DEMOS[family][1])
    scenes = [scene for scene in shown if isinstance(scene, world.Scene) and len(scene.things) > 1]
    if not done and family in ("vilt", "blip2", "cogvlm"):  # what they were not taught is not shown
        assert max((len(scene.things) for scene in scenes), default=1) == (2 if family == "blip2" else 1)
    splits = {scene.split for scene in scenes if not {thing.pair for thing in scene.things} & {*world.UNSEEN_PAIRS}}
    few = family == "flamingo" or not done and family in ("cogvlm", "vilt", "qwen2vl")  # one thing in each
    assert splits == (set() if few else {"validation"}) | ({"train"} if family == "qwen2vl" else set())
    if family == "blip2":
        numbers = re.search("look in the first image.*\n((?:.*\n){4})", out)[1]  # 4 x 4 patches
        assert sorted(map(int, re.findall(r"\d+", numbers))) == list(range(16)), "each query once"


@pytest.mark.skipif("CI" not in os.environ and "SLOW" not in os.environ, reason="trains for minutes; set SLOW=1")
@pytest.mark.parametrize("family, least", [
    ("clip", 90), ("vilt", 65), ("flamingo", 60), ("llava", 90), ("qwen2vl", 75), ("cogvlm", 80), ("blip2", 75),
])  # fmt: skip
def test_a_demo_trains_and_answers(tmp_path_factory, family, least):
    folder = tmp_path_factory.getbasetemp()  # one for all of them, which share towers
    done = run(str(ROOT / f"{family}.py"), "--demo", cwd=folder)
    assert done.returncode == 0, done.stderr
    forms = "of 200 more questions (%)|after training, (?:for )?(%)|after stage 2, .* (%) of the things"
    shares = re.search(forms.replace("%", r"\d+%"), done.stdout).groups()
    assert max(int(share.rstrip("%")) for share in shares if share) >= least, done.stdout
    assert (folder / "runs" / family / "demo.png").exists()
    if family == "clip":  # trained already: only the claims are measured
        done = run(str(ROOT / "train_tiny.py"), "clip", cwd=folder)
        verdicts = re.findall(r"\| (holds|does not hold) +\|", done.stdout)
        assert len(verdicts) == 3 and done.returncode == ("does not hold" in verdicts), done.stdout
        if done.returncode:
            pytest.xfail("CLIP's demo is as it should be, but not all of its claims hold after 300 steps")


# Published checkpoints, end to end: config.json, tensors in several files, tokenizer.json, the processor's own file,
# image files and a question -> the printed answer is the oracle's


def word_list(specials, size=100):
    """The words of a small vocabulary, each special token at its id."""
    common = "USER : ASSISTANT Question Answer what is this a red circle blue square ? in the image".split()
    words = ["<unk>", *(f"w{i}" for i in range(5)), *common]
    words += [f"w{i}" for i in range(len(words), size)]
    for word, i in specials.items():
        words[i] = word
    return words


def save_tokenizer(folder, words, template):
    """A small tokenizer.json in the published form: whole words, special tokens, a template around each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([word for word in words if word.startswith(("<", "["))])
    pieces = [(word, vocabulary[word]) for word in template.split() if word.startswith("<")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pieces)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


CROP32 = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
SQUARE32 = dict(size={"height": 32, "width": 32})
VILT32 = dict(size={"shortest_edge": 32}, size_divisor=8)
VILT_WORDS = {"<cls>": 71, "<sep>": 72, "[MASK]": 103}
QWEN_WORDS = {"<|im_start|>": 1, "<|im_end|>": 2, "<|vision_end|>": 95, "<|vision_start|>": 96, "<|video_pad|>": 97}
FOLDERS = {  # kind -> special tokens, size of the vocabulary, what stands around a text, the processor and its options
    "clip": ({"<start>": 97, "<end>": 99}, 100, "<start> $A <end>", "CLIP", CROP32),
    "siglip": ({"<end>": 1}, 100, "$A <end>", "CLIP", CROP32),
    "siglip2": ({"<pad>": 0, "<end>": 1, "<unk>": 3}, 100, "$A <end>", "Siglip", SQUARE32 | dict(resample=2)),
    **{f"vilt {head}": (VILT_WORDS, 110, "<cls> $A <sep>", "Vilt", VILT32) for head in ("mlm", "vqa", "rank")},
    "flamingo": ({"<s>": 1, "</s>": 2, "<fake_token_around_image>": 96, "<image>": 97}, 98, "<s> $A", "Idefics",
                 dict(image_size=32)),
    "cogvlm": ({"<s>": 4, "</s>": 5}, 60, "<s> $A", "Siglip", dict(size={"height": 24, "width": 24}, resample=3)),
    "blip2": ({"</s>": 2, "<image>": 98}, 100, "</s> $A", "Blip", SQUARE32),
    "blip2 retrieval": ({"<cls>": 71, "<sep>": 72}, 90, "<cls> $A <sep>", "Blip", SQUARE32),
    "llava": ({"<s>": 1, "</s>": 2, "<image>": 98}, 100, "<s> $A", "CLIP", CROP32),
    "qwen2.5vl": (QWEN_WORDS | {"<|image_pad|>": 98}, 100, "$A", "Qwen2VL",
                  dict(size={"shortest_edge": 64, "longest_edge": 400}, patch_size=4)),
}  # fmt: skip


@pytest.fixture
def published(oracles, runs, monkeypatch):
    """kind -> a published folder, which becomes the current one -> oracle, tokenizer, processor."""

    def make(kind):
        specials, size, template, processor, options = FOLDERS[kind]
        monkeypatch.chdir(runs)
        oracle = copy.deepcopy(oracles(kind)[0])
        if kind == "qwen2.5vl":  # which writes the same word again and again, or placeholders
            randomise(oracle, seed=8).lm_head.weight.data[95:] = 0.0
        oracle.save_pretrained(runs, max_shard_size="50KB")
        processor = getattr(quiet_transformers(), f"{processor}ImageProcessorPil")(
            image_mean=[0.4, 0.5, 0.6], **options
        )
        processor.save_pretrained(runs)
        limits = {"size": {"shortest_edge": 64, "longest_edge": 1100}, "image_mean": [0.4, 0.5, 0.6]}
        Path("video_preprocessor_config.json").write_text(json.dumps(limits))
        tokenizer = save_tokenizer(runs, word_list(specials, size), template)
        if kind == "siglip2":  # whose tokenizer pads, and knows no capitals
            from tokenizers import normalizers

            tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=16)
            tokenizer.normalizer = normalizers.Lowercase()
            tokenizer.save("tokenizer.json")
        return oracle, tokenizer, processor

    return make


FAKE, SEE, QUESTION = "<fake_token_around_image>", "<|vision_start|>{}<|vision_end|>", "Question: what is this? Answer:"
TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n"
CHATS = {  # kind -> the ids in front, and prompts with what the published processor makes of them
    "llava": ([1], {"what is in it ?": f"USER: {'<image>' * 16}\nwhat is in it ? ASSISTANT:"}),
    "flamingo": ([1], {"a <image> is <image> ?": f"a {FAKE}<image>{FAKE} is {FAKE}<image>{FAKE} ?"}),
    "blip2": ([98] * 6 + [2], {"": "", "what is this?": QUESTION, "a red circle in": "a red circle in"}),
    "cogvlm": ([4] + [60] * 11, {"what is this?": QUESTION}),  # boi, 3 x 3 patches, eoi
    "qwen2.5vl": ([], {"what is this ?": f"{TURN}<|im_start|>assistant\n" % f"{SEE}{SEE}what is this ?",
                       "is <image> in <video> ?": f"{TURN}<|im_start|>assistant\n" % f"is {SEE} in {SEE} ?"}),
}  # fmt: skip


@torch.no_grad()
def published_lines(kind, oracle, tokenizer, prompts, seen):
    """What the published model says to prompts about images -> lines as they are printed, without names of files."""
    if kind in CHATS:  # greedily, without a cache, until the end of the text
        front, spelled = CHATS[kind]
        pads = ["<|image_pad|>" * 4, "<|video_pad|>" * 16] if kind == "qwen2.5vl" else []
        answers, end = [], 5 if kind == "cogvlm" else 2
        for prompt in prompts:
            new, ids = [], front + tokenizer.encode(spelled[prompt].format(*pads), add_special_tokens=False).ids
            while len(new) < (40 if kind == "cogvlm" else 32) and end not in new:
                new.append(int(published_logits(oracle, kind, torch.tensor([ids + new]), **seen)[0, -1].argmax()))
            answers.append(tokenizer.decode([i for i in new if i != end]).strip())
        return answers
    rows, scores = [torch.tensor([tokenizer.encode(prompt).ids]) for prompt in prompts], [0] * len(prompts)
    ask = lambda ids, **options: oracle(input_ids=ids, attention_mask=torch.ones_like(ids), **seen, **options)
    if family_of(kind) == "clip":  # which are padded to the full context
        ids = torch.cat([F.pad(row, (0, 16 - row.shape[1]), value=int(row[0, -1])) for row in rows])
        logits = ask(ids).logits_per_image[0]
        scores = (logits.softmax(-1) if kind == "clip" else logits.sigmoid()).tolist()
        lines = [f"  {100 * score:5.1f} %  {prompt}" for score, prompt in zip(scores, prompts)]
    elif kind == "blip2 retrieval":
        match, cosine = (
            [ask(ids, use_image_text_matching_head=head).logits_per_image for ids in rows] for head in (1, 0)
        )
        scores = [x.softmax(-1)[0, 1].item() for x in match]
        lines = [f"  {100 * m:5.1f} %  {c.item():6.3f}  {prompt}" for m, c, prompt in zip(scores, cosine, prompts)]
    elif kind == "vilt rank":
        scores = [ask(ids).logits.item() for ids in rows]
        lines = [f"    {score:7.2f}  {prompt}" for score, prompt in zip(scores, prompts)]
    elif kind == "vilt vqa":
        best = [zip(*(x[0].tolist() for x in ask(ids).logits.sigmoid().topk(3))) for ids in rows]
        said = [", ".join(f"LABEL_{i} ({share:.0%})" for share, i in answers) for answers in best]
        lines = [f"    {prompt} -> {answers}" for prompt, answers in zip(prompts, said)]
    else:
        found = [ask(ids).logits[ids == 103].softmax(-1)[0].max(0) for ids in rows]
        texts = [tokenizer.decode(ids[0].masked_fill(ids[0] == 103, i).tolist()) for ids, (_, i) in zip(rows, found)]
        lines = [f"    {text}  ({share:.0%} sure)" for text, (share, _) in zip(texts, found)]
    return [lines[i] for i in sorted(range(len(lines)), key=lambda i: -scores[i])]


@pytest.mark.parametrize("kind", FOLDERS)
def test_weights_say_on_the_command_line_what_the_published_model_says(published, capsys, kind):
    """Questions answered, texts continued, prompts ranked, [MASK] filled in: by the head that a checkpoint has."""
    oracle, tokenizer, processor = published(kind)
    picture, other = (Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in ((70, 50), (32, 16)))
    images, options = "a.png b.png" if kind == "flamingo" else "a.png", ["--weights", "."]
    picture.save("a.png")
    other.save("b.png")
    if kind == "flamingo":
        seen = dict(media=processor([[picture, other]], return_tensors="pt").view(1, 2, 3, 32, 32))
    elif kind == "qwen2.5vl":  # an image and a video, two frames a second
        film, options = [other.rotate(angle) for angle in (0, 90, 180)], [*options, "--video", "film"]
        Path("film").mkdir()
        for i, frame in enumerate(film):
            frame.save(f"film/{i}.png")
        config, still = qwen2vl.config_from_published(Path()).vision, processor([picture], return_tensors="pt")
        assert (config.max_pixels, config.video_max_pixels) == (400, 1100)
        patches, grid_thw = qwen2vl.preprocess([film], config)
        patches, grid_thw = torch.cat([still["pixel_values"], patches]), torch.cat([still["image_grid_thw"], grid_thw])
        seen = dict(patches=patches, grid_thw=grid_thw, seconds=[0.5])
    else:
        seen = {"pixels" if kind in CHATS else k: x for k, x in processor([picture], return_tensors="pt").items()}
    prompts = [*CHATS[kind][1]] if kind in CHATS else ["what is this [MASK]", "a red [MASK] in the image", "a [MASK] ?"]
    expected = published_lines(kind, oracle, tokenizer, prompts, seen)
    assert min(map(len, expected)) > 17 and len(set(expected)) == len(prompts)
    capsys.readouterr()
    typed(family_of(kind), *options, *about("/".join([images, *prompts])))()
    lines = capsys.readouterr().out.splitlines()
    if kind not in CHATS:
        assert "a.png" in lines.pop(0)
    if kind == "blip2":
        for images, said in (("a.png", f"{expected[0]}\n"), ("a.png a.png", f"a.png:  -> {expected[0]}\n" * 2)):
            typed(kind, "--weights", ".", *about(images))()  # without a question it describes
            assert capsys.readouterr().out == said
        expected = [f"a.png: {text} -> {answer}" for text, answer in zip(CHATS[kind][1].values(), expected)]
    assert lines == expected


TOO_LONG = {  # kind -> how often "what" is too often, how many tokens that is, how many the context holds
    "clip": (15, 17, 16), "siglip": (16, 17, 16), "siglip2": (16, 17, 16), "vilt mlm": (13, 15, 14),
    "vilt vqa": (13, 15, 14),
    "flamingo": (60, 64, 64), "cogvlm": (48, 64, 64), "blip2": (58, 65, 64), "blip2 retrieval": (19, 21, 20),
    "llava": (235, 256, 256), "qwen2.5vl": (239, 256, 256),
}  # fmt: skip


ONLY_OF_WEIGHTS = [  # kind, images and prompts that cannot be asked, what the line must contain
    *((kind, "one.png", ["--prompt"]) for kind in TOO_LONG if kind != "blip2"), ("clip", "/red", ["--image"]),
    ("vilt mlm", "/[MASK]", ["--image"]), ("vilt mlm", "one.png/a red circle", ["'a red circle'", "[MASK]"]),
    ("blip2", "/what?", ["--image"]), ("blip2 retrieval", "one.png/red/ ", ["--prompt"]),
    ("llava", "/<image> ?", ["1 <image>", "0 image"]),
]  # fmt: skip


@pytest.mark.parametrize("kind", TOO_LONG)
def test_what_weights_cannot_be_asked_costs_one_line_before_they_are_read(published, desk, capsys, kind):
    """Three families count the tokens of a prompt only once the model is there."""
    published(kind)
    family, (times, tokens, context) = family_of(kind), TOO_LONG[kind]
    refused = lambda line, *words: fails_in_one_line(typed(family, "--weights", ".", *about(line)), capsys, *words)
    refused("one.png/" + "what " * times, f"{tokens} tokens", context)
    for file in desk.glob("*.safetensors"):
        file.unlink()
    if family not in ("cogvlm", "llava", "qwen2vl"):
        refused("one.png/" + "what " * times, f"{tokens} tokens", context)
    for who, line, words in NOT_ASKED + ONLY_OF_WEIGHTS:
        if who in (family, kind) and (family, line) != ("blip2", "one.png/ "):  # which asks for a caption
            refused(line, *words)
    (desk / "tokenizer.json").unlink()
    refused("one.png/[MASK]", "tokenizer.json", "lmsys/vicuna-7b-v1.5" if family == "cogvlm" else "")


def test_the_readme_shows_only_commands_that_exist():
    found = re.findall(r"^ +python (\w+)\.py(.*?)(?:  .*)?$", (ROOT / "README.md").read_text(), re.MULTILINE)
    for script, options in found:
        if script != "test_all":
            parser = world.trainer_command_line() if script == "train_tiny" else world.command_line(script)
            parser.parse_args(re.findall(r'"[^"]*"|\S+', options))
    assert {script for script, _ in found} >= {*FAMILIES, "train_tiny"}


chapter("command_line")


# ----------------------------------------------------------------------------------------------------------------------
# The toy world and its tokenizer


def many_scenes(n=300, **options):
    rng = random.Random(1)
    return [world.make_scene(rng, **options) for _ in range(n)]


def fresh(family):
    """A tiny model that is not trained, the same each time: in the place of towers and toys that would take minutes."""
    torch.manual_seed(0)
    return MODELS[family](MODULES[family].PRESETS["tiny"])


def test_a_fifth_of_the_pairs_is_neither_drawn_nor_named_in_training():
    assert len(world.PAIRS) == 30 and len(world.UNSEEN_PAIRS) == 6
    assert {colour for colour, _ in world.UNSEEN_PAIRS} == set(world.COLOURS), "one per colour"
    assert [set(seen) for seen in zip(*world.SEEN_PAIRS)] == [set(world.COLOURS), set(world.SHAPES)]
    rng, scenes = random.Random(2), many_scenes(1000)
    texts = [world.text_line(rng) for _ in range(2000)] + [world.caption(scene, rng) for scene in scenes]
    for scene in scenes:
        assert {thing.pair for thing in scene.things} <= set(world.SEEN_PAIRS)
        texts += [" ".join(world.question(kind, scene, rng) or "") for kind in world.QUESTIONS]
    assert not [text for text in texts if any(" ".join(pair) in text for pair in world.UNSEEN_PAIRS)]
    for _ in range(200):
        assert sum(thing.pair in world.UNSEEN_PAIRS for thing in world.unseen_pair_scene(rng).things) == 1


SPLITS = {"train": 6 / 8, "validation": 1 / 8, "test": 1 / 8}


def test_the_splits_share_no_content_and_scenes_of_one_thing_are_all_trained_on():
    content = lambda scene: frozenset((thing.pair, thing.size, thing.place) for thing in scene.things)
    contents = [{*map(content, many_scenes(2000, split=split))} for split in SPLITS]
    assert not any(one & other for one, other in itertools.combinations(contents, 2))
    assert [min(map(len, scenes)) for scenes in contents] == [1, 2, 2]
    scenes = [scene for scene in many_scenes(4000, split="any") if len(scene.things) > 1]
    for split, share in SPLITS.items():
        assert [scene.split for scene in scenes].count(split) == pytest.approx(share * len(scenes), rel=0.15)
        words = [world.split_of(f"{i}") for i in range(4000)]
        assert words.count(split) == pytest.approx(share * 4000, rel=0.15)
    for split in ("validation", "test"):
        with refuses(ValueError, "one thing"):
            world.make_scene(random.Random(0), 1, split=split)


SCENES = {  # every function of the world that makes one
    "make_scene": lambda rng: world.make_scene(rng, pairs=world.PAIRS, split="any"),
    "change_one": lambda rng: world.change_one(world.make_scene(rng), rng, split="any"),
    "unseen_pair_scene": lambda rng: world.unseen_pair_scene(rng),
    "movie": lambda rng: world.movie(rng)[0][-1],
    "one_thing": lambda rng: world.one_thing(rng, rng.choice(world.SHAPES), world.PAIRS),
}


@pytest.mark.parametrize("make", SCENES)
def test_backgrounds_are_dark_or_light_and_dark_behind_white_things(make):
    rng = random.Random(5)
    for scene in (scenes := [SCENES[make](rng) for _ in range(300)]):
        white = any(thing.colour == "white" for thing in scene.things)
        assert 0 <= scene.grey < 60 or (200 <= scene.grey < 256 and not white)
    assert len({scene.grey for scene in scenes}) > 50 and 60 < sum(scene.grey < 128 for scene in scenes) < 240
    assert any(thing.colour == "white" for scene in scenes for thing in scene.things)


@pytest.mark.parametrize("grey", [0, 59, 200, 255])
def test_digits_and_things_stand_out_from_their_background(grey):
    """Some channel differs by more than 100 of 255."""
    assert np.ptp(np.asarray(world.draw_number("7", grey=grey)).astype(int)) > 180
    for name, colour in world.COLOURS.items():
        assert max(abs(level - grey) for level in colour) > 100 or (name == "white" and grey > 128)


def truth(scene, question):
    """An independent reader of questions: the answer, worked out from the scene with other code than the world's."""
    things = scene.things

    def the(words):
        words = [w for w in words.split() if w != "thing"]
        found = [t for t in things if all(w in (t.colour, t.shape, t.place) for w in words)]
        assert len(found) == 1, f"{question!r} is ambiguous"
        return found[0]

    if match := re.fullmatch(r"what (colour|shape|size) is the (.*)\?", question):
        return getattr(the(match[2]), match[1])
    if match := re.fullmatch(r"where is the (.*)\?", question):
        return the(match[1]).place
    if match := re.fullmatch(r"what is (\S*)\?", question):
        found = [t for t in things if t.place == match[1]]
        return f"a {found[0].size} {found[0].colour} {found[0].shape}" if found else "nothing"
    if match := re.fullmatch(r"is the (.*) left or right of the (.*)\?", question):
        return "left" if the(match[1]).x < the(match[2]).x else "right"
    if match := re.fullmatch(r"is there a (.*)\?", question):
        words = [w for w in match[1].split() if w != "thing"]
        return "yes" if any(all(w in (t.colour, t.shape) for w in words) for t in things) else "no"
    if match := re.fullmatch(r"how many (?:of the things are a )?(\w+)(?: things)?(?: are there)?\?", question):
        return world.NUMBERS[sum(match[1] in ("things", t.colour, t.shape) for t in things)]
    raise AssertionError(f"unknown question {question!r}")


def kind_of(question):
    """Which of world.KINDS it is, by its words; or what else training asks beside a picture."""
    if match := re.fullmatch(r"what (colour|shape|size) is the (.*)\?", question):
        return f"{match[1]} at" if re.match("|".join(world.PLACES), match[2]) else match[1]
    if question == "how many things are there?":
        return "count"
    others = {"what number is it?": "number", world.DESCRIBE: "describe"}
    others |= dict.fromkeys(("which way does it move?", "what colour is it?", "what shape is it?"), "movie")
    others |= {f"what is {place}?": "what" for place in world.PLACES}
    return others.get(question) or {"where": "box", "which": "list"}[question.split()[0]]


@pytest.mark.parametrize("kind", world.QUESTIONS)
def test_answers_are_true_differ_and_are_yes_as_often_as_no(kind):
    """And a thing is asked for by what it is or by where it is, as the kind says."""
    rng, answers = random.Random(4), []
    for scene in many_scenes(600):
        if pair := world.question(kind, scene, rng):
            assert pair[1] == truth(scene, pair[0]), (world.caption(scene), pair)
            assert kind not in world.KINDS or kind_of(pair[0]) == kind
            answers.append(pair[1])
    assert len(answers) > 200 and len(set(answers)) > 1
    assert kind not in ("there", "pair") or 240 < answers.count("yes") < 360


def test_a_caption_says_everything_once_and_fits_the_context_of_the_toy_clip():
    rng = random.Random(9)
    for scene in many_scenes(1000):
        parts = [f"{thing.place} a {thing.size} {thing.colour} {thing.shape}" for thing in scene.things]
        assert world.caption(scene).split(", ") == parts and len({thing.place for thing in scene.things}) == len(parts)
        assert len(world.text_rows([world.caption(scene, rng)])[0]) <= clip.PRESETS["tiny"].text.context


def test_a_canvas_needs_16_pixels_a_side_and_a_box_is_written_in_thousandths():
    thing = world.Thing("red", "ring", "large", 0.5, 1.0)
    assert world.pixel_box(thing, 100, 50) == (40, 29, 61, 50)
    assert world.box_text(thing, 100, 50) == "[[400,580,610,999]]"
    with refuses(ValueError, "32 x 15", 16):
        world.draw(world.Scene((thing,)), 32, 15)
    with refuses(ValueError, "9 digits", "37 x 7", "16 x 16"):
        world.draw_number("123456789", 16, 16)


def test_a_scene_depends_on_its_key_alone():
    look = lambda *key: world.draw(world.make_scene(world.rng_for(*key))).tobytes()
    first = look(7, "a")
    assert look(8, "a") != first == look(7, "a") != look(7, "b")


def test_a_changed_scene_differs_in_one_property():
    rng = random.Random(6)
    for scene in many_scenes(200):
        things = zip(scene.things, world.change_one(scene, rng).things, strict=True)
        ((a, b),) = [(a, b) for a, b in things if a != b]
        assert sum(getattr(a, key) != getattr(b, key) for key in ("colour", "shape", "size")) == 1


def test_the_tokenizer_returns_every_text_and_has_one_token_for_each_word_of_the_world():
    tokenizer, rng = world.tokenizer(), random.Random(8)
    assert tokenizer.n_vocab == world.VOCAB_SIZE == 512
    for text in [world.text_line(rng) for _ in range(200)] + ["Grüße, 你好 🙂\t\n  two  spaces", "", "<image"]:
        assert tokenizer.decode(world.encode(text)) == text
    for word in (*world.COLOURS, *world.SHAPES, *world.SIZES, *world.PLACES, "USER", "ASSISTANT"):
        assert 1 in (len(world.encode(word)), len(world.encode(f" {word}"))), word


def test_special_tokens_are_the_last_ids_and_plain_text_in_texts_that_are_not_ours():
    names = "PAD BOS EOS IMAGE VIDEO BOI EOI MASK CLS SEP DEC CHUNK".split()
    ids = [getattr(world, f"{name}_ID") for name in names]
    assert world.encode("".join(world.SPECIAL[:12])) == ids == list(range(496, 508))
    assert world.text_rows(["<eos> is text here"])[0].count(world.EOS_ID) == 1
    assert world.decode([world.PAD_ID, *world.encode("a ring<eos>never read")]) == "a ring"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_preset_has_the_special_tokens_of_the_tokenizer(family):
    config = repr(MODULES[family].PRESETS["tiny"])
    assert set(re.findall(r"vocab_size=(\d+)", config)) == {str(world.VOCAB_SIZE)}
    ids = {name: int(i) for name, i in re.findall(r"\b(?!new)(\w+)_token_ids?=\(?(\d+)", config)}
    marks = {name: f"<{name}>" for name in ids} | ({"eos": "<|endofchunk|>"} if family == "flamingo" else {})
    assert ids and ids == {name: world.SPECIAL_IDS[mark] for name, mark in marks.items()}
    assert flamingo.PRESETS["tiny"].new_token_ids == (world.IMAGE_ID, world.CHUNK_ID)


def test_byte_pair_encoding_by_hand():
    assert world.merge((b"a", b"b", b"a", b"b", b"c"), (b"a", b"b")) == (b"ab", b"ab", b"c")
    assert world.merge((b"a", b"a", b"a"), (b"a", b"a")) == (b"aa", b"a"), "left to right, without overlap"
    ranks = world.train_bpe("low low low lower", 3)
    assert [symbol for symbol, rank in ranks.items() if rank >= 256] == [b"ow", b"low", b" low"]


def test_the_world_sheet_is_drawn(runs):
    assert world.main(["world"]) == 0
    page = np.asarray(Image.open(runs / "world.png"))
    wide = (page.shape[1] - 10) // 4
    assert wide > 125 and all((page[:, n * wide : n * wide + 9] == 255).all() for n in range(4)), "a caption runs over"


chapter("world")


# ----------------------------------------------------------------------------------------------------------------------
# The loop of the trainer


class Line(torch.nn.Linear):
    """The smallest thing that can be trained: a 4 x 4 matrix that should become the identity."""

    config = "a line"

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(4, 4, bias=False)

    def loss_of(self, step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (self(x) - x).square().mean()
        return loss, {"twice": 2 * loss.detach()}


def fit_line(model=None, loss_of=None, name="line", code="of a line", data="world", **plan):
    model, plan = model or Line(), world.Plan("", **dict(steps=5, batch=8, lr=0.1) | plan)
    return world.fit(name, plan, model, loss_of or model.loss_of, code, data, expected=("about", 2.0))


log_of = lambda folder: [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
checkpoint_of = lambda folder: torch.load(folder / "checkpoint.pt", weights_only=True)


@contextlib.contextmanager
def ends(status, capsys, *words):
    """What runs in here must end the program with this status and one line on stderr that contains these words."""
    with pytest.raises(SystemExit) as ended:
        yield
    err = capsys.readouterr().err
    assert ended.value.code == status and len(err.strip().splitlines()) == 1, err
    assert all(word in err for word in words), err


def test_the_loss_falls_the_rate_rises_and_falls_and_the_log_says_so(runs, capsys):
    model, log = fit_line(steps=100, warmup=10), log_of(runs / "line")
    assert [row["step"] for row in log] == [*range(1, 100, 10), 100] and log[-1]["loss"] < 0.3 * log[0]["loss"]
    rates = [row["lr"] / 0.1 for row in log]
    assert rates[0] == pytest.approx(0.1, rel=0.01) and max(rates) == rates[1] == pytest.approx(1, rel=0.03)
    assert rates == [rates[0], *sorted(rates[1:], reverse=True)] and 0.05 < rates[-1] < 0.06
    assert all(row["twice"] == pytest.approx(2 * row["loss"]) for row in log)
    assert "about = 2.000" in capsys.readouterr().out
    assert not model.training and model.folder == runs / "line"


def test_muon_takes_the_hidden_matrices_and_vectors_do_not_decay():
    parts = dict(embed_tokens=torch.nn.Embedding(6, 4), up=torch.nn.Linear(4, 5), norm=torch.nn.LayerNorm(5))
    model = torch.nn.ModuleDict(parts | dict(frozen=torch.nn.Linear(5, 5), lm_head=torch.nn.Linear(5, 6)))
    model.frozen.requires_grad_(False)
    name_of = {p: name for name, p in model.named_parameters()}
    for muon, hidden in ((0.02, ["up.weight"]), (0, [])):
        optimizers = world.make_optimizers(world.Plan("", 5, 8, lr=0.1, weight_decay=0.3, muon=muon), model)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        names = [[name_of[p] for p in group["params"]] for group in groups]
        others = [name for name in ("embed_tokens.weight", "up.weight", "lm_head.weight") if name not in hidden]
        assert names == [others, ["up.bias", "norm.weight", "norm.bias", "lm_head.bias"], hidden][: 3 if muon else 2]
        found = [(group["weight_decay"], group["peak"]) for group in groups]
        assert found == [(0.3, 0.1), (0, 0.1), (0.3, 0.02)][: len(groups)]
        assert isinstance(optimizers[-1], world.Muon if muon else torch.optim.AdamW)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_muon_is_torchs_in_full_precision(shape):
    start = torch.randn(shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    options = dict(momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    optimizers = world.Muon([ours], 0.05, 0.3), torch.optim.Muon([theirs], 0.05, **options)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    assert distance(ours, theirs) < 0.02 * distance(ours, start)  # torch's rounds to 8 bits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_interrupted_in_every_stage_and_resumed_is_bit_identical(family, runs, monkeypatch, capsys):
    """What comes before a stage is taken from the cache then, and was just trained in the other run."""
    stages = [replace(plan, steps=2) for plan in world.RECIPES[family].stages]
    monkeypatch.setattr(world.RECIPES[family], "stages", stages)
    monkeypatch.setattr(world.RECIPES[family], "start", lambda *_: fresh(family))
    recipe, handler, steps = world.RECIPES[family](), signal.getsignal(signal.SIGINT), []
    whole, loss = recipe.train(name="whole"), recipe.loss

    def interrupting(model, samples, plan, step):
        steps.append(step)
        if step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(model, samples, plan, step)

    recipe.loss = interrupting
    folders = sorted(runs.iterdir(), reverse=True)  # of a first stage whole-stage1, of the last one whole
    for folder in folders:
        halves = runs / folder.name.replace("whole", "halves")
        with ends(130, capsys, "1 of 2"):
            recipe.train(name="halves")
        assert checkpoint_of(halves)["step"] == 1 and signal.getsignal(signal.SIGINT) is handler
        with (halves / "log.jsonl").open("a") as log:  # of steps after the last save, before the plug was pulled
            log.write('{"step": 2, "loss": 0.5, "lr": 0.01}\n')
    same(recipe.train(name="halves"), whole)
    assert steps == [0, 1] * len(stages), "no step twice, none left out"
    for folder in folders:
        assert log_of(runs / folder.name.replace("whole", "halves")) == log_of(folder)


def test_a_second_ctrl_c_ends_at_once(runs, monkeypatch, capsys):
    steps = []

    def update(*_):
        steps.append(len(steps))
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(world, "update", update)
    with ends(130, capsys):
        world.main(["clip"])
    assert steps == [0]
    assert not (runs / "clip/checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_stops_at_its_step_and_is_not_saved(runs, monkeypatch, capsys):
    monkeypatch.setattr(world, "SAVE_SECONDS", -1)  # after every step
    model = Line()
    with ends(2, capsys, "nan at step 3"):
        fit_line(model, lambda step: (model.loss_of(step)[0] * (float("nan") if step == 3 else 1), {}))
    saved = checkpoint_of(runs / "line")
    assert saved["step"] == 3 and saved["model"]["weight"].isfinite().all()


def test_a_damaged_checkpoint_is_named_and_trained_again(runs, capsys):
    model, file = fit_line(), runs / "line/checkpoint.pt"
    for damaged in (b"", b"not a checkpoint", file.read_bytes()[:700]):
        file.write_bytes(damaged)
        same(fit_line(), model)
        assert f"{file} is damaged" in capsys.readouterr().out


def test_runs_that_cannot_be_written_stop_before_training(runs, capsys):
    (runs / "line").write_text("a file where a folder should be")
    with ends(2, capsys, "line/log.jsonl"):
        fit_line(loss_of="is not called")


def test_a_full_disk_ends_in_one_line_and_leaves_the_old_checkpoint_and_no_half_file(runs, monkeypatch, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    fit_line()
    before, limits = (runs / "line/checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room, file in ((1500, "checkpoint.pt"), (40, "log.jsonl")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with ends(2, capsys, file):
                fit_line(steps=6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(file.name for file in (runs / "line").iterdir()) == ["checkpoint.pt", "log.jsonl"]
        assert (runs / "line/checkpoint.pt").read_bytes() == before


WRITER = """
import sys
from pathlib import Path
import torch
import train_tiny as world
for _ in range(200):
    world.save_checkpoint({"log": [], "model": torch.full((5000,), float(sys.argv[1]))}, Path("checkpoint.pt"))
"""


def test_two_runs_in_one_folder_never_tear_a_checkpoint(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, n], cwd=tmp_path, env=env) for n in "12"]
    found = set()
    while any(writer.poll() is None for writer in writers):
        with contextlib.suppress(FileNotFoundError):
            found |= set(checkpoint_of(tmp_path)["model"].tolist())
    assert [writer.returncode for writer in writers] == [0, 0] and found and found <= {1, 2}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]


# The cache


CHANGES = [("plan", dict(steps=6)), ("plan", dict(seed=1)), ("data", dict(data="another")), ("code", dict(code="new"))]
CHANGES += [("config", dict(config="another box")), ("towers", dict(tower=6)), ("world", {})]


@pytest.mark.parametrize("what, changes", CHANGES)
def test_a_finished_training_is_cached_until_something_it_depends_on_changes(runs, monkeypatch, capsys, what, changes):
    def train(loss_of=None, tower=5, config="a box", **changes):
        part, model = (torch.nn.ModuleDict({"line": Line()}) for _ in range(2))
        part.config, model.config = "a box", config
        part = fit_line(part, part.line.loss_of, "tower", steps=tower)
        same(world.assemble(model, "cpu", line=part.line), part)
        return fit_line(model, loss_of or model.line.loss_of, **changes)

    trained = train()
    capsys.readouterr()
    again = train(loss_of="is not called")
    same(again, trained)
    assert again.lineage == trained.lineage and not capsys.readouterr().out
    if what == "world":
        monkeypatch.setattr(world, "UNSEEN_PAIRS", world.UNSEEN_PAIRS[:5])
        monkeypatch.setattr(world, "world_fingerprint", world.world_fingerprint.__wrapped__)  # is computed once
    assert train(**changes).lineage != trained.lineage
    assert re.search(rf"line/checkpoint\.pt: (towers and )?{what} changed", capsys.readouterr().out)


@pytest.mark.parametrize("what, left", [("all", ["lm"]), ("llava", ["clip", "lm", "qwen2vl-part1"])])
def test_fresh_forgets_the_families_that_are_trained_and_no_tower_of_theirs(what, left, runs, monkeypatch):
    for name in ("clip", "lm", "llava", "llava-stage1", "qwen2vl-part1"):
        (runs / name).mkdir()
        (runs / name / "checkpoint.pt").touch()
    for recipe in world.RECIPES.values():
        monkeypatch.setattr(recipe, "run", lambda *_: [])
    assert world.main([what, "--fresh"]) == 0
    assert sorted(file.parent.name for file in runs.glob("*/checkpoint.pt")) == left


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip"])
def test_towers_trained_otherwise_give_another_model(family, untrained, monkeypatch):
    lineage = lambda: world.RECIPES[family]().start("cpu", 0).lineage
    before, plan = lineage(), world.CLIPRecipe.stages[-1]
    assert before == lineage()
    monkeypatch.setattr(world.CLIPRecipe, "stages", (replace(plan, lr=2 * plan.lr),))
    assert before != lineage()


EDITS = dict(clip=dict(embed_dim=64), vilt=dict(max_patches=9), flamingo=dict(cross_every=2), blip2=dict(embed_dim=32))
EDITS |= dict(cogvlm=dict(strided=True), llava=dict(projector="linear"), qwen2vl=dict(mrope=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_the_tiny_preset_reaches_the_recipe(family, untrained, monkeypatch):
    presets = MODULES[family].PRESETS
    edited = replace(presets["tiny"], **EDITS[family])
    assert edited != presets["tiny"]
    monkeypatch.setitem(presets, "tiny", edited)
    assert world.RECIPES[family]().start("cpu", 0).config == edited


def test_the_cache_notices_what_a_training_uses_and_nothing_else(tmp_path, monkeypatch):
    """Qwen2-VL's, which uses most. A change of docstrings, demos or pictures costs no training."""
    recipe, syntax_tree, file = world.Qwen2VLRecipe(), world.syntax_tree, tmp_path / "edited.py"
    before = recipe.code()
    used = {"QWEN_SHOWS": {}, "FRAMES": (2,), "TOKENS": (9,), "GLYPHS": {}, "JITTER": 0.5, "KINDS": ("what",)}
    others = {"__name__": "__main__", "__file__": os.path.relpath(world.__file__), "NEW_CANVASES": (), "RANK": 1}
    for name, value in (used | others).items():
        with monkeypatch.context() as patch:
            patch.setattr(world, name, value)
            assert (recipe.code() != before) == (name in used), name
    edits = [  # a file, text that stands there once, another text, and whether that makes another training
        (qwen2vl, '"""Set what trains in a stage and return it', '"""Another docstring', False),
        (qwen2vl, '3: ("language.",)', '3: ("merger.",)', True),
        (world, 'encode_turn(asked, f" {right}"', 'encode_turn(asked, f"{right}"', True),  # a method that loss uses
        (world, "for kind in rng.sample(kinds, len(kinds)):", "for kind in kinds:", True),  # ask: not the method
        (world, "x = self.patch_embedding(patches) + ", "x = self.patch_embedding(patches) - ", True),  # a class
        (world, "In goes a picture as it is", "other words", False),
        (world, "cut into tokens, at three resolutions", "other words", False),
    ]
    for module, old, new, counts in edits:
        source = Path(module.__file__).read_text()
        assert source.count(old) == 1, old
        file.write_text(source.replace(old, new))
        with monkeypatch.context() as patch:
            tree_of = lambda path: syntax_tree.__wrapped__(file if path == module.__file__ else path)
            patch.setattr(world, "syntax_tree", tree_of)
            assert (recipe.code() != before) == counts, old


@pytest.mark.parametrize("family", [*FAMILIES, "siglip"])
def test_the_gradients_of_two_processes_add_up_to_those_of_one(family, monkeypatch):
    """In every stage. AdamW hardly minds a gradient of the wrong size, so training two ways would not show it."""
    recipe = world.RECIPES[family if family in FAMILIES else "clip"]()
    model = fresh(family) if family in FAMILIES else recipe.start("cpu", 0, loss="sigmoid")
    monkeypatch.setattr(world.Muon, "step", lambda *_: None)
    monkeypatch.setattr(world.torch.optim.AdamW, "step", lambda *_: None)
    monkeypatch.setattr(world.torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    for plan in recipe.stages:
        model.zero_grad()
        recipe.freeze(model, plan)
        samples, optimizers, sent = recipe.batch(plan, 0), world.make_optimizers(plan, model), ([], [])

        def gradient(processes=1, rank=0, all_gather=None):
            for name, value in dict(WORLD_SIZE=processes, RANK=rank).items():
                monkeypatch.setattr(world, name, value)
            monkeypatch.setattr(world.dist, "all_gather", all_gather)
            world.update(model, optimizers, recipe.loss(model, samples, plan, 0)[0], 1.0)
            return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

        def send(parts, mine):
            sent[world.RANK].append(mine)
            [part.copy_(mine) for part in parts]

        def receive(parts, mine):
            for part, theirs in zip(parts, next(received), strict=True):
                part.copy_(theirs)

        wanted, total = gradient(), 0
        for rank in range(2):
            gradient(2, rank, send)
        for rank in range(2):
            received = zip(*sent, strict=True)
            total = total + gradient(2, rank, receive)
        close(total / wanted.abs().max(), wanted / wanted.abs().max())


SHORT = """
import sys
from dataclasses import replace
import train_tiny as world
for recipe in world.RECIPES.values():
    recipe.stages = tuple(replace(plan, steps=3) for plan in recipe.stages)
    recipe.claims = lambda *_: [world.Claim("measured", 0, 1, 1)]
world.LM_STEPS = 3
sys.exit(world.main(sys.argv[1:]))
"""


def test_two_processes_train_like_one(tmp_path):
    """A contrastive tower, a language model, both stages of a LLaVA that is made of them; then own data, of which
    texts are equal."""
    (tmp_path / "short.py").write_text(SHORT)
    for i, scene in enumerate(many_scenes(20)):
        world.draw(scene).save(tmp_path / f"{i}.png")
    rows = [json.dumps(dict(file_name=f"{i}.png", text=f"{'a' * (i % 5)} thing")) for i in range(20)]  # 18 train
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    for folder, launcher in (("one", ""), ("two", "-m torch.distributed.run --standalone --nproc-per-node 2")):
        (tmp_path / folder).mkdir()
        for command, ending in (("llava", "| claim"), ("clip --data .. --steps 3", "guessing is right")):
            done = run(*launcher.split(), str(tmp_path / "short.py"), *command.split(), cwd=tmp_path / folder)
            assert done.returncode == 0 and done.stdout.count(ending) == 1, f"{done.stdout}{done.stderr}"
    for name in ("clip", "lm", "llava-stage1", "llava", "clip-own-steps3"):
        one, two = (tmp_path / folder / "runs" / name for folder in ("one", "two"))
        for ours, theirs in zip(log_of(one), log_of(two), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4), "the log shows the joint loss"
        for weight, parameter in checkpoint_of(one)["model"].items():
            close(checkpoint_of(two)["model"][weight], parameter, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_recipe_shows_a_scene_of_another_split_or_an_unseen_pair_in_training(family, monkeypatch):
    """Nor a near miss that is one: of the scenes that differ from a training scene in one word, a quarter belong to
    other splits."""
    shown, draw, recipe = [], world.draw, world.RECIPES[family]()
    monkeypatch.setattr(world, "draw", lambda scene, *size: shown.append(scene) or draw(scene, *size))
    rival = [world.near_miss_pairs] if family == "vilt" else []  # what the CLIP beside it is shown
    for plan, batch in itertools.product(recipe.stages, [recipe.batch, *rival]):
        for step in range(20):
            batch(plan, step)
    assert len(shown) >= 320 * len(recipe.stages)
    assert {scene.split for scene in shown} == {"train"}
    assert not any(set(world.UNSEEN_PAIRS) & {thing.pair for thing in scene.things} for scene in shown)


@pytest.mark.parametrize("line", [world.lm_line, world.told_scene])
def test_no_language_model_reads_of_a_scene_of_another_split(line, monkeypatch):
    scenes, make_scene = [], world.make_scene
    monkeypatch.setattr(world, "make_scene", lambda *given: scenes.append(make_scene(*given)) or scenes[-1])
    for seed in range(50):
        line(random.Random(seed))
    assert len(scenes) == 50 and {scene.split for scene in scenes} == {"train"}


@pytest.mark.parametrize("family", ["llava", "blip2", "cogvlm", "qwen2vl"])
def test_answers_come_in_the_order_of_the_questions_and_are_compared_word_for_word(family, monkeypatch):
    """More questions than go into one batch, of different lengths: each prompt ends its row, and each answer keeps its
    place."""
    model, recipe, scene = fresh(family).eval(), world.RECIPES[family](), many_scenes(1)[0]

    def echo(self, ids, **_):
        assert (ids[:, -1] != world.PAD_ID).all()
        return ids[:, -12:]

    monkeypatch.setattr(type(model), "generate", echo)
    shown = world.draw(scene) if family == "qwen2vl" else scene
    asked = [(shown, f"what {'is ' * (i % 3)}{i}") for i in range(140)]
    said = recipe.answers(model, asked)
    assert [re.findall(r"\d+", text) for text in said] == [[str(i)] for i in range(140)]
    rows = [(*one, text + " more" * (i % 4 == 0)) for i, (one, text) in enumerate(zip(asked, said))]
    assert recipe.accuracy(model, rows) == 0.75


def test_the_finished_training_is_touched_by_no_other_and_is_done_until_its_plan_changes(runs, monkeypatch):
    plan, file = replace(world.CLIPRecipe.stages[0], steps=3, batch=4), runs / "clip/checkpoint.pt"
    monkeypatch.setattr(world.CLIPRecipe, "stages", (plan,))
    monkeypatch.setattr(world.CLIPRecipe, "claims", lambda *_: [])
    recipe = world.CLIPRecipe()
    assert not recipe.done() and world.main(["clip"]) == 0 and recipe.done()
    before = file.read_bytes()
    for option, value in (("--steps", "2"), ("--seed", "1")):
        world.main(["clip", option, value])
        assert (runs / f"clip-{option[2:]}{value}/checkpoint.pt").exists() and file.read_bytes() == before
    recipe.stages = (replace(plan, lr=2 * plan.lr),)
    assert not recipe.done(), "another plan"
    recipe.stages = (plan,)
    torch.save(checkpoint_of(runs / "clip") | {"step": 2}, file)
    assert not recipe.done(), "stopped before its end"
    file.write_bytes(b"torn")
    assert not recipe.done()


def test_the_table_of_claims_and_the_exit_status(runs, monkeypatch, capsys):
    row_of = r"\| (\w+)'s *\| +(\S+) \| +(\S+) \| +([.\d]*) \| +(\S+) \| (.+) \|"
    for measured, verdict in ((0.84, "holds"), (0.83, "does not hold")):
        for family, recipe in world.RECIPES.items():
            claim = world.Claim(f"{family}'s", 0.5, measured if family == "vilt" else 0.9, 0.8, 400)
            monkeypatch.setattr(recipe, "run", lambda *_, claim=claim: [claim])
        assert world.main(["clip"]) == 0
        for what in ("vilt", "all"):
            assert world.main([what]) == (verdict != "holds")
            rows = re.findall(row_of, capsys.readouterr().out)
            error = "0.037" if measured == 0.84 else "0.038"
            assert ("vilt", "0.500", f"{measured:.3f}", error, "0.800", verdict) in rows
        assert [row[0] for row in rows] == list(FAMILIES)


def test_a_share_of_a_sample_holds_by_two_standard_errors_and_everything_else_without():
    claim = world.Claim("a share", 0.5, 0.9, 0.84, 100)
    assert claim.error == pytest.approx(0.06) and claim.holds and not replace(claim, target=0.841).holds
    assert replace(claim, sample=10000, target=0.893).holds, "a larger sample"
    assert replace(claim, sample=0, target=0.9).holds and not replace(claim, sample=0, target=0.901).holds
    assert "| 0.100 |" not in world.claims_table([replace(claim, sample=0)])


# Results


class TinyRecipe(world.Recipe):
    """A recipe that trains a 4 x 4 matrix, and whose claims and ablations are made up."""

    module, variants, figures = clip, {"long": dict(length=5), "short": dict(length=2)}, ("right", "loss")
    family, beats = "clip", (("long better than short", "long", "short"),)
    shares = {0: 0.9, 1: 0.7, 2: 0.9}

    def train(self, device, seed, steps, name="clip", length=3):
        fit_line(name="lm")  # a tower
        self.seed, self.length = seed, length
        return fit_line(name=f"{name}-seed{seed}", seed=seed, steps=length)

    def options(self, args):
        return dict(name="clip-sigmoid") if args.loss == "sigmoid" else {}

    def save(self, model):
        return "saved"

    def claims(self, model, args):
        return [
            world.Claim("clip: a share", 0.5, self.shares[args.seed], 0.8, 400),
            world.Claim("clip: a no worse than b", 0.1, 0.5, 0.4 + args.seed / 10),
        ]

    def measure(self, model):
        return [self.length / 10 + self.seed / 100, 1.5]

    def code(self, *more):
        return "its code"


@pytest.fixture
def tiny(runs, monkeypatch):
    monkeypatch.setitem(world.RECIPES, "clip", TinyRecipe)
    monkeypatch.setattr(world.CLIPRecipe, "code", lambda self: "that of the tower")  # takes longer than all the rest
    return lambda words: world.main(["clip", *words.split()])


cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]


def rows_in(page, first):
    """{the first cell: the others} of the rows below the header that starts with `first`."""
    lines = page.read_text(encoding="utf-8").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
    assert len({line.count("|") for line in table}) == 1, "not a table"
    return {row[0]: row[1:] for row in map(cells, table) if "---" not in row}


def test_results_are_kept_for_every_seed_and_written_as_tables(tiny, runs, monkeypatch):
    page, clock = runs / "results.md", itertools.count()
    monkeypatch.setattr(world.time, "time", lambda: next(clock))  # a second passes when somebody asks
    for words, status in (("--seed 2", 1), ("--seed 1", 1), ("--seed 0", 0), ("--ablations", 0)):
        assert tiny(words) == status
    claims = rows_in(page, "claim")
    assert claims["claim"] == ["chance", "seed 0", "seed 1", "seed 2", "±", "target", "verdict"]
    assert claims["clip: a share"] == "0.500 0.900 0.700 0.900 0.046 0.800".split() + ["holds at seeds 0, 2"]
    targets = ["0.400, 0.500, 0.600", "holds at seeds 0, 1"]
    assert claims["clip: a no worse than b"] == ["0.100", *["0.500"] * 3, "", *targets]
    assert tiny("--loss sigmoid") == 0
    claims = rows_in(page, "claim")
    assert claims["clip-sigmoid: a share"] == ["0.500", "0.900", "", "", "0.030", "0.800", "holds"]
    assert claims["clip: a share"][2] == "0.700", "another training"
    assert tiny("--loss sigmoid --seed 1") == 1
    assert rows_in(page, "claim")["clip-sigmoid: a share"][-1] == "holds at seed 0"

    ablations = rows_in(page, "variant")
    assert ablations["clip: long"] == ["loss", "1.500", "1.500", "1.500", "1.500"], "the last of two rows"
    assert "| clip: long | right | 0.500 | 0.510 | 0.520 | 0.510 |" in page.read_text(encoding="utf-8")
    compared = rows_in(page, "comparison of means")["clip: long better than short"]
    assert compared == ["0.510", "0.210", "holds"]

    kept = json.loads((runs / "results" / "clip-seed1.json").read_text())
    assert kept["split"] == "test" and kept["date"].startswith("20") and kept["memory"] > 100
    own, tower = kept["seconds"]["clip-seed1"], kept["seconds"]["lm"]
    assert len(kept["seconds"]) == 2 and 0 < own < tower, "3 steps and 5"
    assert f"threads: {torch.get_num_threads()}, torch {torch.__version__}" in kept["machine"]
    assert f"On {kept['machine']}:" in page.read_text(encoding="utf-8")
    costs = rows_in(page, "training")
    named = "training clip-ablations clip-seed0 clip-seed1 clip-seed2 clip-sigmoid-seed0 clip-sigmoid-seed1"
    assert [*costs] == named.split()
    assert costs["clip-seed1"] == [str(own), f"lm {tower}", str(kept["memory"]), kept["date"][:10]]


def test_other_steps_are_not_recorded_and_the_validation_split_is_kept_apart(tiny, runs):
    tiny("--steps 3")
    tiny("--steps 3 --ablations")
    assert not (runs / "results").exists() and not (runs / "results.md").exists()
    tiny("--split validation")
    assert not (runs / "results.md").exists() and "validation" in (runs / "results-validation.md").read_text("utf-8")
    assert [file.name for file in (runs / "results-validation").iterdir()] == ["clip-seed0.json"]


def test_a_seed_of_another_code_is_left_out_of_the_tables_and_said(tiny, runs, monkeypatch, capsys):
    tiny("--seed 1")
    date = json.loads((runs / "results" / "clip-seed1.json").read_text())["date"]
    capsys.readouterr()
    monkeypatch.setattr(world.time, "strftime", lambda form: date[:-1] + ":")  # the next second at the earliest
    monkeypatch.setattr(TinyRecipe, "code", lambda self, *more: "another code")
    tiny("--seed 0")
    assert rows_in(runs / "results.md", "claim")["claim"][1] == "seed 0"
    assert rows_in(runs / "results.md", "claim")["claim"][2] == "±"
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 1 and "clip-seed1" in said[0] and date in said[0]
    (runs / "results" / ".77.clip-seed3.json").write_text('{"half')  # what another process is writing
    tiny("--seed 0")


@pytest.mark.parametrize("what", ["stages", "variants", "claims", "tower"])
def test_results_know_what_has_trained_and_measured_them(what, tiny, runs, monkeypatch):
    """The code and plans of the recipe and of the toy CLIP, on which all families stand."""
    monkeypatch.setattr(TinyRecipe, "code", lambda self, *more: repr([more]))

    def code():
        tiny("--seed 0")
        return json.loads((runs / "results" / "clip-seed0.json").read_text())["code"]

    before = code()
    assert before == code()
    if what == "tower":
        monkeypatch.setattr(world.CLIPRecipe, "stages", (replace(world.CLIPRecipe.stages[0], lr=9.0),))
    elif what == "claims":
        monkeypatch.setattr(TinyRecipe, "code", lambda self, *more: repr([more]) + "edited" * ("claims" in more))
    else:
        monkeypatch.setattr(TinyRecipe, what, (1,) if what == "stages" else {"other": {}})
    assert before != code()


def test_seconds_and_memory_of_a_training_are_kept_with_it(runs, monkeypatch):
    """Also of one that was interrupted, and of one from the cache."""
    clock = itertools.count(100)
    monkeypatch.setattr(world.time, "time", lambda: next(clock))
    monkeypatch.setattr(world, "SAVE_SECONDS", 0)

    def interrupting(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return model.loss_of(step)

    model = Line()
    with pytest.raises(SystemExit):
        fit_line(model, interrupting)
    first = checkpoint_of(runs / "line")["seconds"]
    fit_line(Line())
    seconds, memory = world.SPENT["line"]
    assert 0 < first < seconds == checkpoint_of(runs / "line")["seconds"] and memory > 100
    world.SPENT.clear()
    fit_line(Line(), "is not called")
    assert world.SPENT["line"] == (seconds, memory)


# The command line and own data


MISTAKES = {  # the arguments, and what the error must name
    "": ["WHAT"], "clup": ["clup", "clip"], "clip --steps 0": ["'0'", "steps"], "clip --steps few": ["'few'", "steps"],
    "clip --seed x": ["'x'", "seed"], "clip --seed 12345678901234567890": ["12345678901234567890", "nine"],
    "clip --device toaster": ["toaster", "cpu"], "clip --loss l2": ["l2", "sigmoid"],
    "llava --loss sigmoid": ["--loss", "clip"], "all --data .": ["--data", "one family"],
    "clip --data . --ablations": ["--data", "--ablations"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_in_the_command_of_the_trainer_costs_one_line(arguments, capsys, runs):
    fails_in_one_line(lambda: world.main(arguments.split()), capsys, *MISTAKES[arguments])


@pytest.mark.parametrize("alone", [dict(RANK="1"), dict(RANK=""), dict(WORLD_SIZE="two"), dict(RANK="-1")])
def test_a_rank_without_a_world_of_that_size_costs_one_line(alone, tmp_path):
    done = run(str(ROOT / "train_tiny.py"), "world", cwd=tmp_path, **alone)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "RANK" in done.stderr and not done.stdout


def own_data(monkeypatch, folder, family, rows):
    """Trains a family on two pictures and rows about them (or lines that are no rows), from random weights."""
    for name, size in (("a.png", (40, 30)), ("b.png", (90, 20))):
        world.draw(many_scenes(1)[0], *size).save(folder / name)
    lines = [row if isinstance(row, str) else json.dumps({"file_name": "a.png"} | row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(world.Recipe, "train", lambda *_: fresh(family).eval())
    return world.main([family, "--data", str(folder), "--steps", "1"])


@pytest.mark.parametrize("family", FAMILIES)
def test_own_data_names_bad_rows_and_measures_a_tenth_kept_back_before_and_after(
    family, runs, tmp_path, monkeypatch, capsys
):
    recipe, shown = world.RECIPES[family], []
    note = lambda self, rows, *options, collect=recipe.collect: shown.append(rows) or collect(self, rows, *options)
    monkeypatch.setattr(recipe, "collect", note)  # of rows as they were read
    row = lambda text, name="a.png": dict(file_name=name, text=text, question=f"what is {name}?", answer=text)
    rows = [row(f"thing {i % 20}", ("a.png", "b.png")[i >= 20]) for i in range(24)]
    bad = [dict(question="what?"), row("  "), row("<image>"), "not json", '["a"]', row("word " * 500)]
    bad += [row("x", "missing.png"), row("x", "torn.png")]
    (tmp_path / "torn.png").write_bytes(b"\x89PNG nothing")
    assert own_data(monkeypatch, tmp_path, family, [*rows, "", *bad]) == 0
    out = capsys.readouterr().out
    assert "24 rows, 8 left out" in out and re.findall(r"line (\d+):", out) == [str(i) for i in range(26, 34)]
    assert out.count(f"no {recipe.fields[-1]}\n") == 3 and "missing.png" in out and "torn.png" in out
    held, *steps, held_again = [{id(row) for row in rows} for rows in shown]
    assert held == held_again and len(held) == 3 and not held & set().union(*steps)
    before, after = map(float, re.search(r"3 rows kept back: loss ([\d.]+) before, ([\d.]+) after", out).groups())
    folder = runs / f"{family}-own-steps1"
    trained, used = checkpoint_of(folder), MODELS[family].from_pretrained(folder).state_dict()
    assert before != after and trained["step"] == 1 and f"{family}.py --weights {folder} --image" in out
    assert all(torch.equal(weight, trained["model"][name]) for name, weight in used.items())
    guess = ("1.7", "2.0")[len(recipe.fields) - 1]  # two texts of the three are equal, or of the two that ask the same
    assert re.search(rf"for \d before, \d after; guessing is right for {guess}\n", out)
    assert f"{family} is not trained yet" in out and f"about {recipe.minutes} min" in out


@pytest.mark.parametrize("family", FAMILIES)
def test_own_data_is_right_where_the_text_is_written_word_for_word_or_chosen_among_all_and_equal(family, monkeypatch):
    recipe, model = world.RECIPES[family](), fresh(family)
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    said = {id(red): "red", id(blue): "blue ones"}
    rows = [(red, "red"), (blue, "blue ones"), (blue, "red"), (red, "red"), (blue, "blue")]
    fits = lambda pairs: torch.tensor([[0.0, said[id(picture)] == text] for picture, text in pairs])
    if family == "clip":
        of_texts = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]
        of_images = [[float(picture is red), float(picture is blue)] for picture, _ in rows]
        features = torch.tensor(of_images), torch.tensor(of_texts)
        monkeypatch.setattr(recipe, "features", lambda *_: features)
    elif family == "vilt":
        monkeypatch.setattr(recipe, "read", lambda model, pairs: (fits(pairs), None))
        model.itm_logits = lambda scores: scores
    else:
        end = world.CHUNK_ID if family == "flamingo" else world.EOS_ID
        texts = [[*world.encode(" " + said[id(picture)]), end] for picture, _ in rows]
        monkeypatch.setattr(type(model), "generate", lambda *_, **__: world.pad(texts, end)[0])
    if len(recipe.fields) == 2:
        rows = [(picture, "what?", text) for picture, text in rows]
    assert recipe.right(model, rows) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_is_taken_by_from_pretrained_and_answers_with_weights_as_the_toy_does(
    family, untrained, monkeypatch, capsys
):
    """By the command that the training ends with; the other families refuse the folder in one line."""
    monkeypatch.setattr(world.RECIPES[family], "claims", lambda *_: [])
    assert world.main([family]) == 0
    command = re.search(r"python (\w+)\.py (--weights (\S+) --image) my.png(.*)", capsys.readouterr().out)
    picture = world.RUNS / "my.png"
    world.draw(many_scenes(1)[0], 60, 40).save(picture)
    ask = [str(picture), *(["--prompt", "what is red?"] if command[4] else [])]
    world.workbench(command[1], ["--image", *ask])
    only_of_the_world = r" \(a made-up name.*|(taught|never read).*\n"  # a folder may be of own data
    said = re.sub(only_of_the_world, "", capsys.readouterr().out)
    monkeypatch.setattr(world, "fit", None)
    (checkpoint := Path(command[3], "checkpoint.pt")).touch()
    world.workbench(family, [*command[2].split(), *ask, "--fresh"])
    assert capsys.readouterr().out == said != "" and checkpoint.exists()
    model = MODELS[family].from_pretrained(command[3])
    assert model.config == MODULES[family].PRESETS["tiny"] and hash(model.config) and not model.training
    other = "clip" if family == "llava" else "llava"
    line = lambda: world.workbench(other, [*command[2].split(), *ask, "--prompt", "what?"])
    fails_in_one_line(line, capsys, command[3], type(model.config).__name__)


def test_without_safetensors_a_training_ends_all_the_same_and_says_what_to_install(untrained, monkeypatch, capsys):
    monkeypatch.setattr(world.CLIPRecipe, "claims", lambda *_: [])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert world.main(["clip"]) == 0 and "pip install safetensors" in capsys.readouterr().out


def readme_python(word):
    """Runs the one piece of Python in the README that has this word."""
    blocks = re.findall(r"(?:^    .*\n|^\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    [piece] = [block for block in blocks if "import" in block and word in block]
    exec(inspect.cleandoc("\n" + piece), {})
    return piece


def test_the_session_in_the_readme_asks_what_was_trained(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    Image.new("RGB", (50, 40), "red").save("my.png")
    model = fresh("llava").eval()
    model.folder = Path("runs/llava")
    world.LLaVARecipe().save(model)
    question = re.search(r'"([^"]+\?)"', readme_python("from_pretrained"))[1]
    said = llava.answer(model, [Image.open("my.png")], question, world.encode, world.decode)
    assert said and capsys.readouterr().out == f"{said}\n"


def test_the_digits_in_the_readme_become_rows_of_own_data(tmp_path, monkeypatch):
    """scikit-learn need not be there: its images have numbers from 0 to 16."""
    monkeypatch.chdir(tmp_path)
    digits = SimpleNamespace(images=np.full((10, 8, 8), 16.0), target=np.arange(10)[::-1])
    datasets = SimpleNamespace(load_digits=lambda: digits)
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    readme_python("load_digits")
    rows, _ = world.read_folder("digits", world.CLIPRecipe())
    assert [text for _, text in rows][::6] == ["the number nine", "the number three"] and len(rows) == 10
    assert all(picture.getextrema() == ((255, 255),) * 3 for picture, _ in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_own_text_may_be_as_long_as_the_context_of_the_toy_and_no_longer(family):
    recipe, context = world.RECIPES[family](), dict(clip=32, vilt=40, qwen2vl=512).get(family, 256)
    row = lambda words: (Image.new("RGB", (32, 32)), *["what?"] * (len(recipe.fields) - 1), " red" * words)
    with pytest.raises(ValueError) as error:
        recipe.own(*row(context))
    words = 2 * context - int(re.search(r"\d+", str(error.value))[0])
    rows = recipe.collect([row(words)] * 2, recipe.stages[-1], 0)
    assert recipe.loss(fresh(family), rows, recipe.stages[-1], 0)[0].isfinite()
    with refuses(ValueError, context + 1, context):
        recipe.own(*row(words + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_an_own_photo_only_what_the_toy_sees_is_kept(family, tmp_path):
    recipe, module = world.RECIPES[family](), MODULES[family]
    config = getattr(module.PRESETS["tiny"], "vision", module.PRESETS["tiny"])
    photos = [picture.convert("RGB") for picture in (*pictures(), Image.linear_gradient("L").resize((900, 9)))]
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    rows = [dict(file_name=f"{i}.png", text="red", question="what?", answer="red") for i in range(len(photos))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read, key = world.read_folder(tmp_path, recipe)
    for photo, (kept, *_) in zip(photos, read, strict=True):
        assert kept.width * kept.height <= 128 * 128
        for seen, before in zip(module.preprocess([kept], config), module.preprocess([photo], config)):
            assert torch.equal(seen, before)
    read[0][0].transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "0.png")
    assert world.read_folder(tmp_path, recipe)[1] != key, "another picture is another training"


@pytest.mark.parametrize("family", ["flamingo", "blip2", "cogvlm", "llava", "qwen2vl"])
def test_own_texts_are_learned_as_words_without_the_places_of_pictures(family, runs, tmp_path, monkeypatch, capsys):
    """Other data sets write <image> and <video> into their texts, once, twice, or nothing else."""
    learned, module = set(), MODULES[family]
    language_loss = module.language_loss

    def listen(logits, labels):
        for row in labels:
            *words, end = row[row >= 0].tolist()
            learned.add(world.tokenizer().decode([*words, end]))
            plain = max(words) < world.PAD_ID <= end
            assert plain or family in ("llava", "qwen2vl")  # their rows do not tell special tokens from words
        return language_loss(logits, labels)

    monkeypatch.setattr(module, "language_loss", listen)
    marked = ("<image> {}", "{}<image><image>", "<video>{}", "<ima<image>ge>{}", "<image>")
    rows = [dict(question=text.format("what?"), answer=f"{text} it", text=f"{text} it") for text in marked]
    rows.append(dict(question="<eos> <pad>", answer="<spare1><eos>", text="<spare1><eos>"))
    assert own_data(monkeypatch, tmp_path, family, rows) == 0
    end = "<|endofchunk|>" if family == "flamingo" else "<eos>"
    assert learned == {f" {text}{end}" for text in ("{} it", "it", "<spare1><eos>")}
    assert "6 rows trained on" in capsys.readouterr().out, "too few to keep any back"
    own_data(monkeypatch, tmp_path, family, rows[1:])
    assert "data changed" in capsys.readouterr().out


def test_a_folder_without_data_costs_one_line_before_anything_is_trained(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world.Recipe, "train", None)
    file, row = tmp_path / "metadata.jsonl", json.dumps(dict(file_name="a.png", text="Grüße"), ensure_ascii=False)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    main = lambda: world.main(["clip", "--data", str(tmp_path)])
    fails_in_one_line(main, capsys, file, "FileNotFoundError")
    file.mkdir()
    fails_in_one_line(main, capsys, file, "IsADirectoryError")
    file.rmdir()
    for content, *words in [
        (b"", "empty"), (b"not json", "line 1"), (b'{"file_name": "no.png", "text": "x"}', "line 1", "no.png"),
        (row.encode("latin-1"), "UnicodeDecodeError"), (b"[" * 100_000, "line 1", "recursion"),
    ]:  # fmt: skip
        file.write_bytes(content)
        fails_in_one_line(main, capsys, file, *words)
    file.write_text(row, encoding="utf-8-sig")  # as some editors save it
    assert [words for _, words in world.read_folder(tmp_path, world.CLIPRecipe())[0]] == ["Grüße"]
    for rows in ([row], [row] * 30):
        file.write_text("\n".join(rows), encoding="utf-8")
        with ends(2, capsys, "two texts", "1"):
            main()


chapter("trainer")


# ----------------------------------------------------------------------------------------------------------------------
# Recipes: what the training of each family shows, where it starts, and what its claims measure
#
# Pictures are read here by other code than that which drew them, from what reaches a model: so the words beside them
# are known to be true, and to arrive with them.


def scene_in(picture, moving=False):
    """What pixels show. Each thing has a quarter of the picture, but for the one thing of a movie."""
    pixels, things = np.asarray(picture), []
    height, width = pixels.shape[:2]
    for down, right in [(0, 0)] if moving else itertools.product((0, 1), repeat=2):
        y, x = down * (height // 2), right * (width // 2)
        area = pixels if moving else pixels[y : y + height // 2, x : x + width // 2]
        filled = (area != pixels[0, 0]).any(-1)
        if not filled.any():
            continue
        rows, columns = filled.any(1).nonzero()[0], filled.any(0).nonzero()[0]
        box, side = filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], len(rows)
        if not box[side // 2, side // 2]:
            shape = "ring"
        elif box[0, 0]:
            shape = "square"
        elif box[-1, 0]:
            shape = "triangle"
        else:
            shape = "circle" if box[side // 5, side // 5] else "cross"
        colour = {value: name for name, value in world.COLOURS.items()}[tuple(area[filled][0].tolist())]
        size = "large" if side > 0.36 * min(height, width) else "small"
        place = (x + columns[0]) / (width - side), (y + rows[0]) / (height - side)
        things.append(world.Thing(colour, shape, size, *place))
    return world.Scene(tuple(things), int(pixels[0, 0, 0]))


def scene_told(text):
    """What a language model is told in words."""
    found = re.findall(r"(top|bottom)-(left|right) a (\w+) (\w+) (\w+)", text)
    things = [world.Thing(c, s, size, float(x == "right"), float(y == "bottom")) for y, x, size, c, s in found]
    return world.Scene(tuple(sorted(things, key=lambda thing: (thing.y, thing.x))))


def number_in(picture):
    """Two digits, each cell of a glyph 3 x 3 pixels; None for a picture of fewer pixels, which nobody could read."""
    bright = np.asarray(picture)[..., 0] > 128
    lit = bright != bright[0, 0]  # the digits are white on a dark background, black on a light one
    cells = lit[lit.any(1).argmax() + 1 :: 3, lit.any(0).argmax() + 1 :: 3][:5, :7].astype(int)
    glyphs = {f"{glyph:015b}": digit for digit, glyph in world.GLYPHS.items()}
    codes = ["".join(map(str, digit.flatten())) for digit in (cells[:, :3], cells[:, 4:])]
    return "".join(glyphs[code] for code in codes) if lit.shape == (48, 48) else None


def right_answer(shown, question, boxes=False):
    """To a question about a picture, the frames of a movie, or a scene told in words. boxes: "where" asks for one."""
    if question == "what number is it?":
        return number_in(shown)
    if question in ("which way does it move?", "what colour is it?", "what shape is it?"):
        first, last = (scene_in(frame, moving=True).things[0] for frame in (shown[0], shown[-1]))
        x, y = last.x - first.x, last.y - first.y
        way = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
        return {"way": way, "colour": first.colour, "shape": first.shape}[question.split()[1]]
    scene = shown if isinstance(shown, world.Scene) else scene_in(shown)
    if question == world.DESCRIBE:
        return ", ".join(f"{thing.place} a {thing.full_name}" for thing in scene.things)
    if question == "what is it?":
        return f"a {scene.things[0].full_name}"
    if boxes and (match := re.fullmatch(r"where is the (.*)\?", question)):
        named = [t for t in scene.things if match[1] in (t.name, t.shape, f"{t.colour} thing")]
        return " ".join(f"{t.name} {t.place} {world.box_text(t, 32, 32)}" for t in named) or "nothing"
    if match := re.fullmatch(r"which (shape|colour) has which (shape|colour)\?", question):
        return ", ".join(f"{getattr(t, match[1])} {getattr(t, match[2])} {t.size} {t.place}" for t in scene.things)
    return truth(scene, question)


def describes(text, scene):
    """Is every phrase of a caption true, each of a thing of its own?"""
    first, *more = re.split("(, | and | left of | right of | above | below )", text)
    known = {*world.COLOURS, *world.SHAPES, *world.SIZES, *world.PLACES}
    said = [known & {*phrase.split()} for phrase in (first, *more[1::2])]
    beside = lambda a, b: (a.x < 0.5) != (b.x < 0.5)
    from_left = lambda a, b: "left of" if a.x < b.x else "right of"
    seen_from = lambda a, b: from_left(a, b) if beside(a, b) else "above" if a.y < b.y else "below"
    return any(
        all(words <= {t.colour, t.shape, t.size, t.place} for words, t in zip(said, things))
        and all(word in (", ", " and ", f" {seen_from(a, b)} ") for word, a, b in zip(more[::2], things, things[1:]))
        for things in itertools.permutations(scene.things, len(said))
    )


def pictures_in(given):
    """The arguments of a model -> what each row shows, as it was before preprocess: a picture, the frames of a movie,
    or (Flamingo) a list of pictures."""
    as_pictures = lambda x: list(((x + 1) * 127.5).round().byte().numpy())  # [n,H,W,3]; tiny presets: mean, std 1/2
    if "media" in given:
        rows = zip(given["media"], given["media_mask"])
        return [as_pictures(media[real, 0].permute(0, 2, 3, 1)) for media, real in rows]
    if "patches" not in given:
        return as_pictures(given["pixels"].permute(0, 2, 3, 1))
    grids, rows = given["grid_thw"], []
    for (t, h, w), x in zip(grids.tolist(), given["patches"].split(grids.prod(1).tolist())):
        x = x.view(t, h // 2, w // 2, 2, 2, 3, 2, 8, 8)  # which token, which patch of it | colour, frame, pixel
        frames = as_pictures(x.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * t, 8 * h, 8 * w, 3))
        still = t == 1 and (frames[0] == frames[1]).all()  # a picture is repeated
        rows.append(frames[0] if still else frames)
    return rows


text_of = lambda ids: world.tokenizer().decode(ids.tolist()).split("<pad>")[0]


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (33, 47), (20, 90), (224, 224), *world.LARGE_CANVASES])
def test_a_picture_shows_its_scene_on_any_canvas(size):
    content = lambda scene: [(t.full_name, t.place, world.pixel_box(t, *size)) for t in scene.things] + [scene.grey]
    for i in range(60):
        scene = world.make_scene(random.Random(i), pairs=world.PAIRS, split="any")
        assert content(scene_in(world.draw(scene, *size))) == content(scene)


# What is trained, from where, and what it is shown


TRAININGS = {  # family -> what `train_tiny.py FAMILY` trains, towers first, and the names of the parameters that train
    "clip": {"clip": ".*"},
    "vilt": {"clip": ".*", "vilt": ".*"},
    "flamingo": {"clip": ".*", "chinchilla": ".*", "flamingo": TRAINS["flamingo", None]},
    "cogvlm": {"eva": ".*", "vicuna": r"(?!.*\.vision_expert\.)", "cogvlm": TRAINS["cogvlm", None]},
    "blip2": {"clip": ".*", "opt": ".*", "blip2-stage1": TRAINS["blip2", 1], "blip2": TRAINS["blip2", 2]},
    "llava": {"clip": ".*", "lm": ".*", "llava-stage1": TRAINS["llava", 1], "llava": TRAINS["llava", 2]},
    "qwen2vl": {"clip": ".*", "lm": ".*", "qwen2vl-part1": TRAINS["qwen2vl", 2], "qwen2vl": TRAINS["qwen2vl", 2]},
}
DEMO_TRAININGS = {  # family -> what its demo trains while there is no standard training
    "clip": ["clip"],
    "vilt": ["clip", "vilt-demo"],
    "flamingo": ["clip", "chinchilla", "flamingo-demo"],
    "cogvlm": [f"eva-steps{world.DEMO_TOWERS[0]}", f"vicuna-steps{world.DEMO_TOWERS[1]}", "cogvlm-demo"],
    "blip2": ["clip", "opt", "blip2-demo-stage1", "blip2-demo"],
    "llava": ["clip", "lm", "llava-demo-stage1", "llava-demo"],
    "qwen2vl": ["clip", "lm", "qwen2vl-demo"],
}
FAMILY_OF = {name: family for family in reversed(TRAININGS) for name in TRAININGS[family]}
FAMILY_OF |= {name: family for family, names in DEMO_TRAININGS.items() for name in names if name not in FAMILY_OF}
STARTS = {  # family -> where weights come from: our part, the training, its part
    "clip": (),
    "vilt": [("blocks.", "clip", "vision.blocks.")],
    "flamingo": [("vision.", "clip", "vision."), ("language.", "chinchilla", "")],
    "cogvlm": [("vision.", "eva", "vision."), ("language.", "vicuna", "")],
    "blip2": [("vision.", "clip", "vision."), ("language.", "opt", "")],
    "llava": [("vision.", "clip", "vision."), ("language.", "lm", "")],
    "qwen2vl": [("vision.blocks.", "clip", "vision.blocks."), ("language.", "lm", "")],
}
NEW = {"blip2": r"vision\.ln_post", "qwen2vl": r"language\..*\.bias"}  # in these parts, but not from there


class Trainings(list):
    """What is to be trained, in order. Nothing is: instead every parameter that would be moves a little."""

    watch = staticmethod(lambda one: None)  # called with each training before anything in it moves

    def fit(self, name, plan, model, loss_of, code, data="world", expected=None, after_step=None):
        start, lineage = copy.deepcopy(model.state_dict()), getattr(model, "lineage", None)
        key = json.dumps(world.key_of(plan, model.config, data, lineage, code))
        one = SimpleNamespace(name=name, plan=plan, model=model, loss_of=loss_of, expected=expected, start=start)
        one.lineage, one.key = lineage, key
        one.trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
        self.append(one)
        self.watch(one)
        for weight in model.parameters():
            weight.data += 0.01 * len(self) * weight.requires_grad
        one.end = copy.deepcopy(model.state_dict())
        return fit_nothing(name, plan, model, loss_of, code, data)


@pytest.fixture
def trainings(monkeypatch, runs):
    asked = Trainings()
    monkeypatch.setattr(world, "fit", asked.fit)
    monkeypatch.setattr(world, "code_of", lambda *what: repr(what))  # which takes longer than all the rest
    return asked


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_trains_its_stages_in_order_each_from_the_right_start(family, trainings):
    recipe = world.RECIPES[family]()
    recipe.train(seed=1)
    count = len(recipe.stages)
    towers, own = {one.name: one for one in trainings[:-count]}, trainings[-count:]
    assert [*towers] + [one.name.removesuffix("-seed1") for one in own] == [*TRAININGS[family]]
    assert [one.plan for one in own] == [replace(plan, seed=1) for plan in recipe.stages]
    assert not any(tower.plan.seed for tower in towers.values()), "every seed stands on the same towers"
    for one, pattern in zip(trainings, TRAININGS[family].values()):
        assert one.trains == {name: bool(re.match(pattern, name)) for name in one.trains}, one.name
    for part, whose, of in STARTS[family]:
        lineage = towers[whose].model.get_submodule(of[:-1]).lineage
        assert own[0].lineage[part.split(".")[0]] == lineage, "the cache knows where it comes from"
        for name, weight in own[0].start.items():
            source = of + name.removeprefix(part).replace("vision_expert", "language_expert")  # CogVLM's are copies
            if re.match(NEW.get(family, "$"), name):
                assert set(weight.tolist()) == {float(name.endswith("weight"))}, "a norm or a bias that does nothing"
            elif name.startswith(part):
                assert torch.equal(weight, towers[whose].end[source]), name
    for before, after in zip(own, own[1:]):
        same(before.end, after.start)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_demo_trains_less_until_the_standard_training_is_there(family, trainings, monkeypatch):
    recipe, names_of = world.RECIPES[family](), lambda: [one.name for one in trainings]
    recipe.train(demo=True)
    assert names_of() == DEMO_TRAININGS[family] and recipe.short == bool(recipe.demo_stages)
    own = [one.plan for one in trainings if one.name.startswith(family)]
    assert own == [*(recipe.demo_stages or recipe.stages)]
    towers = [one for one in trainings if "-steps" in one.name]
    assert all(one.plan.steps == int(one.name.split("-steps")[1]) for one in towers)
    less = sum(one.plan.steps for one in trainings)
    trainings.clear()
    monkeypatch.setattr(recipe, "done", lambda: True)
    recipe.train(demo=True)
    assert names_of() == [*TRAININGS[family]] and not recipe.short
    assert family == "clip" or less < sum(one.plan.steps for one in trainings)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip"])
def test_a_demo_and_a_standard_training_of_equal_steps_do_not_take_each_others_checkpoint(
    family, trainings, monkeypatch
):
    """Whichever comes first; nor does what is built on them."""
    recipe, own = world.RECIPES[family](), {}
    recipe.demo_stages = recipe.stages
    monkeypatch.setattr(world, "DEMO_TOWERS", (world.EVA_STEPS, world.VICUNA_STEPS))
    for demo in (True, False):
        recipe.train(demo=demo)
        own[demo] = trainings[-len(recipe.stages) :]
    for ours, theirs in itertools.product(own[True], own[False]):
        assert ours.name != theirs.name and ours.key != theirs.key
    assert own[True][-1].model.lineage != own[False][-1].model.lineage
    assert [one.plan for one in own[True]] == [one.plan for one in own[False]]


def watch_training(name, trainings, watch):
    """Calls watch with the training of this name, a standard one or a demo's, before anything in it moves."""
    trainings.watch = lambda one: watch(one) if one.name == name else None
    world.RECIPES[FAMILY_OF[name]]().train(demo=name not in TRAININGS[FAMILY_OF[name]])
    assert name in [one.name for one in trainings]


@pytest.mark.parametrize("name", "clip eva vilt chinchilla flamingo vicuna opt blip2-stage1 lm".split())
def test_the_first_loss_is_what_the_recipe_says_and_all_that_trains_has_a_gradient(name, trainings):
    def watch(one):
        loss = one.loss_of(0)[0]
        loss.backward()
        # ViLT's WPA; and EVA's random features differ so much from picture to picture that their similarities do too
        on_top, tolerance = {"vilt": 0.6, "eva": 0.4}.get(name, 0), 1e-5 if name == "flamingo" else 0.3
        assert loss.item() - on_top == pytest.approx(one.expected[1], abs=tolerance)
        assert one.trains == {name: weight.grad is not None for name, weight in one.model.named_parameters()}

    watch_training(name, trainings, watch)


def overheard(one, step, *functions):
    """A step of a training -> for each (owner, name) the arguments of its calls, by their names."""
    heard = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in functions:
            calls, function = [], getattr(owner, name)

            def listen(*given, calls=calls, function=function, **options):
                calls.append(inspect.signature(function).bind(*given, **options).arguments)
                return function(*given, **options)

            patch.setattr(owner, name, listen)
            heard.append(calls)
        with torch.no_grad():
            one.loss_of(step)
    return heard


def rows_of_step(one, step):
    """A step of a training, from what reaches the model and its losses -> [(what is shown or told, [(question,
    answer)], do they belong together?)]."""
    model, family, B, name = one.model, FAMILY_OF[one.name], one.plan.batch, standard_name(one.name)
    if isinstance(model, clip.CLIP):
        [images], [texts] = overheard(one, step, (model, "encode_image"), (model, "encode_text"))
        form, given, fits = "(.*)<eos>", images | texts, [True] * B
    elif isinstance(model, vilt.ViLT):
        losses = (vilt, "mlm_loss"), (vilt, "itm_loss")
        [given], [words], [pairs] = overheard(one, step, (model, "embed"), *losses)
        given["ids"][:B][words["labels"] >= 0] = words["labels"][words["labels"] >= 0]  # back where they were hidden
        form, fits = "<cls> (.*)<sep>", [True] * B + pairs["labels"].bool().tolist()
    elif name == "blip2-stage1":
        [[given]] = overheard(one, step, (model, "stage1_loss"))
        assert torch.equal(given["mask"], given["ids"] != world.PAD_ID)
        form, fits = "<cls>(.*)<sep>", [True] * B
    else:
        [given], losses = overheard(one, step, (model, "forward"), (MODULES[family], "language_loss"))
        labels = torch.cat([loss["labels"] for loss in losses])
        shown = pictures_in(given) if len(given) > 1 else [None] * B
        return [turns_of_row(name, *row) for row in zip(given["ids"], labels, shown, strict=True)]
    said = [re.fullmatch(form, text_of(row))[1] for row in given["ids"]]
    question = world.DESCRIBE if family == "blip2" else ""
    return [(shown, [(question, text)], fit) for shown, text, fit in zip(pictures_in(given), said, fits, strict=True)]


def standard_name(name):
    """Of a demo's training: the name of the standard training that it is in the place of."""
    return re.sub(r"-demo|-steps\d+", "", name)


def turns_of_row(name, ids, labels, shown):
    text, counts = text_of(ids), labels != -100
    turns = re.findall(r"(?s)(.*?) (?:ASSISTANT|Short answer): (.*?)<eos>", text)
    answers = "".join(f" {said}<eos>" for _, said in turns)
    if name in ("lm", "chinchilla"):  # all of it is learned
        turns, answers = turns or [("", text)], text
    elif name == "flamingo":
        turns, answers = re.findall(r"(<image>) (.*?)<\|endofchunk\|>", text), text.replace("<image>", "")
    assert torch.equal(ids[counts], labels[counts]) and text_of(labels[counts]) == answers
    turns = [(re.split(r"[\n:>]", before)[-1].strip(), said) for before, said in turns]
    return scene_told(re.split("\n|Question", text)[0]) if shown is None else shown, turns, True


def check_names(pairs):
    """One name for each kind, one kind for each name; names kept for other splits do not occur."""
    kinds, names = zip(*pairs)
    assert len(set(pairs)) == len(set(kinds)) == len(set(names))
    assert all(re.fullmatch("[a-z]{3}", name) and world.split_of(name) == "train" for name in names)


def check_turns(rows, boxes, told):
    for shown, turns, fits in rows:
        for question, said in turns:
            if not question:  # a caption; the toy lm reads some of scenes that it is not told of
                assert told or describes(said, scene_in(shown)) == fits
                continue
            right = right_answer(shown, question, boxes)
            if told:  # without coordinates
                said, right = (re.sub(r"\d\d\d", "", text) for text in (said, right))
            if question.startswith("which"):  # a list in any order
                said, right = ({*text.split(", ")} for text in (said, right))
            assert right in (said, None), question


@pytest.mark.parametrize("name, family", FAMILY_OF.items())
def test_what_a_step_shows_is_true_and_its_labels_are_the_answers(name, family, trainings):
    turns_each = {"llava": {5}, "cogvlm": {5}, "flamingo": {9}, "vicuna": {8, 9}, "qwen2vl-part1": {3, 5}}
    training, name = name, standard_name(name)

    def watch(one):
        for step in (0, one.plan.steps // 2):
            rows = rows_of_step(one, step)
            assert len(rows) == one.plan.batch * (2 if name == "vilt" else 1)
            if name in turns_each:
                assert {len(turns) for _, turns, _ in rows} == turns_each[name]
            if name in ("clip", "eva", "vilt", "cogvlm"):  # so that counting tells nothing apart
                assert len({len(scene_in(shown).things) for shown, _, _ in rows}) == 1
            if name == "blip2-stage1":  # the last four are near misses of the first four
                for (_, [(_, text)], _), (_, [(_, other)], _) in zip(rows, rows[-4:]):
                    assert sum(a != b for a, b in zip(text.split(), other.split(), strict=True)) == 1
            if name == "vicuna":
                assert {scene.split for scene, _, _ in rows} == {"train"}
            if name == "chinchilla":
                for _, [(_, text)], _ in rows:
                    check_names([tuple(line.split()) for line in text.splitlines()])
            elif name == "flamingo":
                for i, (pictures, turns, _) in enumerate(rows):
                    pairs = [(scene_in(picture).things[0].shape, said) for picture, (_, said) in zip(pictures, turns)]
                    assert all(kind == said for kind, said in pairs) if i < world.CAPTIONS else not check_names(pairs)
            else:
                check_turns(rows, boxes=family == "cogvlm", told=isinstance(rows[0][0], world.Scene))

    watch_training(training, trainings, watch)


ANY = {1, 2, 3, 4}
TASKS = {  # training -> how many things the scenes have, the kinds of what is asked, and the sizes of the scenes
    "vilt": (ANY, (), [(32, 32)]),
    "vilt-demo": ({1}, (), [(32, 32)]),
    "blip2-stage1": (ANY, ("describe",), [(32, 32)]),
    "blip2": (ANY, ("describe",), [(32, 32)]),
    "blip2-demo-stage1": ({1, 2}, ("describe",), [(32, 32)]),
    "blip2-demo": ({1, 2}, ("describe",), [(32, 32)]),
    "llava": (ANY, ("describe", *world.KINDS), [(32, 32)]),
    "llava-demo": (ANY, ("describe", "what", "colour at", "shape at", "count"), [(32, 32)]),
    "cogvlm": (ANY, ("describe", "box", *world.KINDS), [(32, 32)]),
    "cogvlm-demo": ({1}, ("describe", "box", "colour", "shape", "size", "what"), [(32, 32)]),
    "vicuna": (ANY, ("describe", "box", "list", *world.KINDS), []),
    f"vicuna-steps{world.DEMO_TOWERS[1]}": ({1}, ("describe", "box", "list", *world.KINDS), []),
    "qwen2vl-part1": (ANY, ("describe", "movie", *world.KINDS), world.SMALL_CANVASES),
    "qwen2vl": (ANY, ("describe", "movie", "number", *world.KINDS), world.CANVASES),
    "qwen2vl-demo": ({1}, ("describe", *world.KINDS[:4]), world.DEMO_CANVASES),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_demo_shows_only_what_its_smaller_task_has_and_the_standard_training_all_of_it(name, trainings):
    things, kinds, sizes, seen = set(), set(), set(), []

    def watch(one):
        for step in range(one.plan.steps // 2, one.plan.steps // 2 + 24):
            seen.append(step)
            for shown, turns, _ in rows_of_step(one, step):
                asked = {kind_of(question) for question, _ in turns if question}
                kinds.update(asked)
                if isinstance(shown, world.Scene):  # told in words
                    things.add(len(shown.things))
                elif not asked & {"number", "movie"}:
                    things.add(len(scene_in(shown).things))
                    sizes.add(shown.shape[1::-1])

    watch_training(name, trainings, watch)
    assert len(seen) == 24 and (things, kinds, sizes) == (TASKS[name][0], {*TASKS[name][1]}, {*TASKS[name][2]})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_stage_and_seed_shows_something_else(family):
    recipe = world.RECIPES[family]()
    plan, shown = recipe.stages[-1], lambda plan, step: pickle.dumps(recipe.batch(plan, step))
    others = [(plan, 701), (replace(plan, seed=1), 700), *((stage, 700) for stage in recipe.stages[:-1])]
    assert shown(plan, 700) == shown(plan, 700) not in [shown(*other) for other in others]


# What is measured


def seer(recipe):
    """A model of random weights that looks at what it is shown, reads what it is asked, and answers the truth."""
    model, family, slots = recipe.start("cpu", 0).eval(), recipe.family, {}
    model.shown = []
    names = lambda scene: " and ".join(f"a {thing.name}" for thing in scene.things)

    def generate(ids, mask, max_new_tokens, eos_id, **given):
        said = []
        for row, real, shown in zip(ids, mask, pictures_in(given), strict=True):
            model.shown.append(shown)
            text = text_of(row[real])
            if family == "flamingo":  # it looks for an example of the same shape
                examples = re.findall("<image> (.*?)<.endofchunk.>", text)
                *shapes, asked = (scene_in(picture).things[0].shape for picture in shown)
                assert len(shapes) == len(examples) and text.endswith("<image>")
                said.append(dict(zip(shapes, examples)).get(asked, "nothing"))
            else:
                question = re.search(r"([^\n:>]*) (?:ASSISTANT|Short answer):$", text)[1].strip()
                said.append(right_answer(shown, question, boxes=family == "cogvlm") or "?")
        rows = [(world.encode(f" {text}") + [eos_id])[:max_new_tokens] for text in said]
        return llava.pad_rows(rows, eos_id)[0]

    def direction(*texts):
        """Of CLIP's features: one for every caption, and one for a pair, in whatever words it is named."""
        texts = [text if "-" in text else " ".join(text.split()[-2:]) for text in texts]
        return sum(F.one_hot(torch.tensor(slots.setdefault(text, len(slots))), 2048).float() for text in texts)

    def encode_image(pixels):
        model.shown += (pictures := pictures_in(dict(pixels=pixels)))
        return torch.stack([direction(right_answer(x, world.DESCRIBE), names(scene_in(x))) for x in pictures])

    def masked_tokens(model, asked):
        model.shown += [picture for picture, _ in asked]
        words_of = lambda text: text.replace(",", "").split()
        pairs = [(words_of(text), words_of(right_answer(picture, world.DESCRIBE))) for picture, text in asked]
        return [dict(zip(*pair)).get("<mask>") for pair in pairs]

    def itm_logits(asked):
        return torch.tensor([[0.0, text == names(scene_in(picture))] for picture, text in asked]) - 0.5

    def alignment(model, scene):
        """Each word of ViLT's on the patch in the middle of its thing; those that fit two things elsewhere."""
        words, plan = names(scene).split(), torch.zeros(4 * len(scene.things) - 1, 4, 4)
        for i, word in enumerate(words):
            x0, y0, x1, y1 = world.pixel_box(scene.things[i // 4], 32, 32)
            plan[(i, (y0 + y1) // 16, (x0 + x1) // 16) if words.count(word) == 1 else (i, 0, 0)] = 1
        return words, plan

    if family == "clip":
        model.encode_image = encode_image
        model.encode_text = lambda ids, mask: torch.stack([direction(text_of(row)[: -len("<eos>")]) for row in ids])
    elif family == "vilt":
        recipe.read, model.itm_logits = lambda model, asked: (asked, None), itm_logits
        recipe.masked_tokens, recipe.alignment = masked_tokens, alignment
    else:
        model.generate = generate
    return model


SEEN = {  # family -> what the claims measure of a model that sees and reads everything
    "clip": [1, 1, 1],
    "vilt": [1, 0.755, 1, 1, 1.501],  # beside a wrong image a masked word is found by luck
    "flamingo": [1, 0.2, 1, 1],  # one more example in five
    "cogvlm": [1, 1, 1],
    "blip2": [1, 0.75, 0.971],
    "llava": [1, 1, 1],
    "qwen2vl": [1, 0, 1, 1, 0, 0.986],  # numbers of fewer pixels cannot be read at all
}


SAMPLES = {  # family -> how many are asked for each claim; 0: it is about no sample, or a comparison
    "clip": [512, 300, 0],
    "vilt": [400, 400, 800, 818, 0],
    "flamingo": [400, 0, 400, 0],
    "cogvlm": [0, 400, 400],
    "blip2": [400, 0, 0],
    "llava": [400, 200, 300],
    "qwen2vl": [300, 0, 300, 200, 0, 0],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_sees_and_reads_meets_every_claim_about_what_was_never_shown(family, untrained, monkeypatch):
    recipe = world.RECIPES[family]()
    model, recipe.split = seer(recipe), "test"
    of_stage1 = lambda model, split: (0.5, 0.75) if (model.folder.name, split) == ("blip2-stage1", "test") else None
    monkeypatch.setattr(world, "reranking", of_stage1)  # is measured by hand below
    claims = recipe.claims(model, SimpleNamespace(device="cpu", seed=0))
    assert [claim.measured for claim in claims] == pytest.approx(SEEN[family], abs=0.03)
    assert all(claim.holds for claim in claims)
    assert [claim.sample for claim in claims] == SAMPLES[family]
    if family == "qwen2vl":  # whose scenes are looked at below
        sizes = {shown.shape[1::-1] for shown in model.shown if not isinstance(shown, list)}
        assert sizes > {*world.CANVASES, *world.NEW_CANVASES, *world.LARGE_CANVASES}
        return
    for shown in model.shown:
        scene = scene_in(shown[-1] if family == "flamingo" else shown)
        assert scene.split == "test" or {thing.pair for thing in scene.things} & {*world.UNSEEN_PAIRS}
    assert set(recipe.measure(model)[:2]) == {1}


GUESSED = {  # family -> claims by their number, and how far from their chance a guess may be
    "clip": {0: 0, 1: 0.04},
    "vilt": {2: 0},
    "flamingo": {0: 0.05, 2: 0.03},
    "cogvlm": {1: 0.06, 2: 0},
    "llava": {0: 0, 1: 0, 2: 0},
    "qwen2vl": {0: 0, 2: 0.06, 3: 0.02},
}


@pytest.mark.parametrize("family", GUESSED)
def test_who_guesses_gets_what_is_printed_as_chance_and_meets_no_claim(family, untrained, monkeypatch):
    """As well as can be guessed without a look at the picture: the commonest answer to such a question. Boxes are
    guessed by somebody who sees all things and cannot read, names by somebody who reads and sees nothing."""
    recipe, rng = world.RECIPES[family](), random.Random(0)
    model, like = seer(recipe), "|".join((*world.COLOURS, *world.SHAPES, *world.PLACES))

    def answers(model, asked, longest=8):
        if family == "flamingo":
            return [rng.choice(sorted({name for _, name in one[:-1]} or {"nothing"})) for one in asked]
        if "[[" in asked[0][-1]:
            return [world.box_text(rng.choice(scene.things), 32, 32) for scene, *_ in asked]
        alike = {}
        for item in asked:
            alike.setdefault(re.sub(like, "_", item[1]), []).append(item[-1])
        guesses = {question: max(given, key=given.count) for question, given in alike.items()}
        return [guesses[re.sub(like, "_", item[1])] for item in asked]

    monkeypatch.setattr(recipe, "answers", answers)
    if family == "clip":
        model.encode_image = model.encode_text = lambda x, mask=None: torch.ones(len(x), 1)
    elif family == "vilt":
        model.itm_logits = lambda asked: torch.tensor([0.0, 1.0]).expand(len(asked), 2)
    claims = recipe.claims(model, SimpleNamespace(device="cpu", seed=0))
    for i, tolerance in GUESSED[family].items():
        assert claims[i].measured == pytest.approx(claims[i].chance, abs=tolerance + 1e-9) and not claims[i].holds


ABLATIONS = {  # family -> figures of its variants if the paper is right; in what they differ; how, variant by variant
    "clip": (
        [[0.5], [0.6], [0.8], [0.78]], lambda recipe, one: (one.model.config.loss, one.plan.batch),
        [("softmax", 16), ("sigmoid", 16), ("softmax", 128), ("sigmoid", 128)]),
    "vilt": (
        [[0.9, 0.8], [0.6, 0.5], [0.7]],
        lambda recipe, one: (type(one.model), [*one.lineage], one.plan.batch, recipe.wpa_weight),
        [(vilt.ViLT, ["blocks"], 32, 1.5), (vilt.ViLT, ["blocks"], 32, 0), (clip.CLIP, ["vision"], 64, 0)]),
    "flamingo": (
        [[0.8], [0.5], [0.7], [0.3]],
        lambda recipe, one: (one.model.config.gate, one.model.config.connector, recipe.captions),
        [("scalar", "resampler", 2), ("none", "resampler", 2), ("scalar", "mlp", 2), ("scalar", "resampler", 0)]),
    "cogvlm": (  # have patches weights of their own, do these train, do the words' weights
        [[0.9, 0.8, 1.5], [0.5, 0.4, 1.5], [0.6, 0.5, 1.9]],
        lambda recipe, one: (
            one.model.language.layers[0].vision_expert is not one.model.language.layers[0].language_expert,
            any(does for name, does in one.trains.items() if ".vision_expert." in name),
            one.trains["language.embed_tokens.weight"]),
        [(True, True, False), (False, False, False), (False, False, True)]),
    "blip2": ([[0.9], [0.4]], lambda recipe, one: one.after_stage1, [True, False]),
    "llava": (
        [[0.9], [0.5], [0.8]], lambda recipe, one: (one.model.config.projector, one.after_stage1),
        [("mlp", True), ("mlp", False), ("linear", True)]),
    "qwen2vl": (
        [[0.9, 0.8], [0.95, 0.6], [0.9, 0.7], [0.9, 0.4]],
        lambda recipe, one: (one.plan.stage, type(one.model.vision), one.model.config.mrope),
        [("things", qwen2vl.VisionTower, True), ("things of one size", world.LearnedGrid, True),
         ("large movies", qwen2vl.VisionTower, True), ("large movies", qwen2vl.VisionTower, False)]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_ablations_train_what_they_say_and_the_better_variant_wins(family, trainings, monkeypatch):
    figures, differ, expected = ABLATIONS[family]
    recipe, variants = world.RECIPES[family](), []

    def watch(one):
        one.after_stage1 = len(trainings) > 1 and "stage1" in trainings[-2].name
        if re.match(f"{family}-ablations/.*-steps2$", one.name):
            variants.append((one, differ(recipe, one)))

    trainings.watch = watch
    scores = iter([[x + d for x in row] for row in figures for d in (-0.1, 0.1, 0)])  # their mean decides
    monkeypatch.setattr(recipe, "measure", lambda *_: next(scores))
    claims = recipe.ablations(SimpleNamespace(device="cpu", steps=2, split="test"))
    assert all(claim.holds for claim in claims)
    turned = recipe.compare({variant: [1 - x for x in row] for variant, row in zip(recipe.variants, figures)})
    assert [claim.holds for claim in turned] == [family == "clip" and i == 1 for i in range(len(claims))]  # as even
    assert [how for _, how in variants] == [how for how in expected for _ in range(3)]
    assert [(one.plan.seed, one.plan.steps) for one, _ in variants] == [(0, 2), (1, 2), (2, 2)] * len(expected)
    for what in ("name", "key"):  # a folder of its own for each, and the cache knows them apart
        assert len({getattr(one, what) for one, _ in variants}) == len(variants)


# What is one family's own


def test_siglip_starts_from_one_match_in_a_batch_and_has_a_folder_of_its_own(trainings, monkeypatch):
    recipe, texts = world.CLIPRecipe(), ["a circle", "a red circle"]
    model = recipe.start("cpu", 0, loss="sigmoid")
    assert model.logit_bias.item() == pytest.approx(-math.log(64)) and recipe.expected(model, recipe.stages[0]) is None
    assert not model.config.vision.class_token and not model.config.text.causal
    assert recipe.tokenizer_of(model)(texts)[1].tolist() == [[True] * 3 + [False], [True] * 4], "its text sees padding"
    assert recipe.tokenizer_of(fresh("clip"))(texts)[1] is None
    monkeypatch.setattr(recipe, "claims", lambda *_: [])
    for other in (0.7, 0.9):
        assert not recipe.compare(dict(zip("abcd", [[0.5], [0.6], [0.8], [other]])))[1].holds, "they are not even"
    recipe.run(SimpleNamespace(device="cpu", seed=2, steps=7, loss="sigmoid", split="test"))
    assert [one.name for one in trainings] == ["clip-sigmoid-seed2-steps7"]


def test_vilt_reads_a_text_word_by_word_and_aligns_its_words():
    ids, numbers = world.vilt_words("top-left a small <mask> circle")
    assert (ids[0], ids.count(world.MASK_ID), ids[-1]) == (world.CLS_ID, 1, world.SEP_ID)
    assert numbers == [None, 0, 1, 2, 3, 4, None], "every word here is one token"
    ids, numbers = world.vilt_words("extraordinary <image>")
    assert numbers.count(0) > 1 and world.IMAGE_ID not in ids
    recipe, model, scene = world.ViLTRecipe(), fresh("vilt").eval(), world.make_scene(random.Random(1), 2)
    words, plan = recipe.alignment(model, scene)
    assert words == world.short_caption(scene).split() and plan.shape == (7, 4, 4)
    close(plan.sum((1, 2)), torch.full((7,), 1 / 7))
    said = recipe.masked_tokens(model, [(world.draw(scene), text) for text in ("a <mask> <mask>", "<mask> a", "a")])
    assert len(said) == 3 and not any("<" in word for word in said)


def test_half_of_what_vilt_must_not_match_are_near_misses_and_own_texts_meet_pictures_of_others():
    recipe, near = world.ViLTRecipe(), []
    for picture, text, label in [row for step in range(12) for row in recipe.batch(recipe.stages[0], step)[1]]:
        words = zip(text.split(), " and ".join(f"a {thing.name}" for thing in scene_in(picture).things).split())
        near += [sum(a != b for a, b in words) == 1] * (not label)
    assert 150 < len(near) < 234 and 0.4 < sum(near) / len(near) < 0.7
    rows = [(Image.new("RGB", (i + 1, 5)), f"text {i // 2}") for i in range(40)]
    masking, matching = recipe.collect(rows, recipe.stages[0], 0)
    assert masking == rows and [text for _, text, _ in matching] == [text for _, text in rows]
    assert all((rows[picture.width - 1][1] == text) == label for picture, text, label in matching)
    assert 10 < sum(label for *_, label in matching) < 30 and recipe.collect(rows, recipe.stages[0], 1)[1] != matching


def test_the_loss_of_vilt_is_the_sum_of_three_each_of_its_half_of_the_batch():
    """Both halves go through the model together; here each goes through by itself."""
    recipe, model, total = world.ViLTRecipe(), fresh("vilt").eval(), []
    plan, recipe.wpa_weight = replace(recipe.stages[0], batch=8), 0.7
    samples = recipe.batch(plan, 1)
    one = SimpleNamespace(loss_of=lambda step: total.append(recipe.loss(model, samples, plan, step)[0].item()))
    [given], [words], [pairs] = overheard(one, 1, (model, "embed"), (vilt, "mlm_loss"), (vilt, "itm_loss"))
    masked, matched = ({name: x[half] for name, x in given.items()} for half in (slice(8), slice(8, None)))
    (hidden, real), T = (model(**matched), masked["mask"]), given["ids"].shape[1]
    close(words["logits"][real], model.mlm_logits(model(**masked)[:, :T])[real])
    close(pairs["logits"], model.itm_logits(hidden))
    said, labels = vilt.text_words(matched["ids"], model.config), torch.tensor([label for *_, label in samples[1]])
    near_and_far = world.WPA_NEAR, world.WPA_FAR
    wpa = vilt.wpa_loss(hidden[:, :T], hidden[:, T + 1 :], said, torch.ones(8, 16).bool(), labels, *near_and_far)[0]
    assert wpa > 0.1 and 0 < labels.sum() < 8
    close(torch.tensor(total), (vilt.mlm_loss(**words)[0] + vilt.itm_loss(**pairs)[0] + 0.7 * wpa)[None])


def test_possible_words_are_those_that_leave_a_scene_of_the_world():
    scene = lambda *things: world.Scene(tuple(world.Thing(c, s, "small", x, y) for c, s, x, y in things))
    two = scene(("red", "circle", 0.1, 0.1), ("blue", "ring", 0.9, 0.9))
    assert world.possible_words(two, two.things[0], "colour") == sum(shape == "circle" for _, shape in world.SEEN_PAIRS)
    assert [world.possible_words(two, thing, "place") for thing in two.things] == [3, 3]
    corners = itertools.product((0.1, 0.9), repeat=2)
    full = scene(*((colour, "square", x, y) for colour, (y, x) in zip(("red", "green", "blue", "white"), corners)))
    assert world.possible_words(full, full.things[1], "place") == 1, "four things have no choice"
    assert world.possible_words(full, full.things[0], "colour") == 2, "red and yellow"
    for one, text, word, ways in world.masked_words(random.Random(0), 100):
        assert text.replace("<mask>", word) == world.caption(one) and ways >= 1


def test_captions_to_be_found_are_true_and_what_is_right_in_others_is_counted():
    assert all(
        text == right_answer(shown, world.DESCRIBE) for shown, text in world.unseen_samples(random.Random(0), 20)
    )
    scenes = [world.make_scene(random.Random(i), count) for i, count in enumerate((1, 2, 4, 3))]
    said = [world.caption(scene) for scene in scenes]
    said[2] = ", ".join(said[2].split(", ")[:2])  # two of ten things are not mentioned
    said[3] += ", bottom-right a small red ring"  # one too many: all things are right, the caption is not
    assert (world.things_right(said, scenes), world.exactly_right(said, scenes)) == (0.8, 0.5)


def test_reranking_lets_matching_choose_among_what_contrast_finds():
    """By a judge that reads pictures and texts. Contrast puts a wrong text above the right one of images 1, 3 and 5,
    and finds every text likelier than that of image 0; matching errs for image 8 only."""
    judge, right = fresh("blip2"), []

    def encode_image(pixels):
        right.extend(right_answer(shown, world.DESCRIBE) for shown in pictures_in(dict(pixels=pixels)))
        return torch.arange(len(pixels))[:, None, None]

    def text_features(ids, mask):
        texts = [text_of(row)[len("<cls>") : -len("<sep>")] for row in ids]
        likely = torch.tensor([[float(text == caption) for text in texts] for caption in right])
        likely[1:6:2, texts.index(right[0])], likely[0, texts.index(right[0])] = 2, -1
        return likely.T  # whose dot product with row i of the unit matrix is the similarity to image i

    def match(image, ids, mask):
        i = int(image[0])
        yes = torch.tensor([(text_of(row)[len("<cls>") : -len("<sep>")] == right[i]) != (i == 8) for row in ids])
        return torch.stack([~yes, yes], 1).float()

    judge.encode_image, judge.text_features, judge.match = encode_image, text_features, match
    judge.image_features = lambda image: torch.eye(len(image))[:, None]
    contrast, matching = world.reranking(judge, "validation", count=9, top=4)
    assert contrast == 5 / 9, "images 2, 4, 6, 7 and 8"
    assert matching == 7 / 9, "1, 3 and 5 are mended, 8 is spoilt, and the text of 0 is not among the four"


def test_an_episode_of_flamingo_tells_what_names_mean_and_asks_about_what_was_never_shown():
    names, asked = ({split: set() for split in SPLITS} for _ in range(2))
    for split, seed in itertools.product(names, range(200)):
        one = world.episode(world.rng_for("episode", seed), seed % 9, split=split)
        (*shown, last), called = zip(*((scene.things[0], name) for scene, name in one))
        meaning = {*zip([thing.shape for thing in (*shown, last)], called)}
        assert len({*dict(meaning)}) == len({*called}) == len(meaning) <= min(seed % 9 + 1, world.WAYS)
        assert all(thing.pair in world.SEEN_PAIRS for thing in shown) and len(shown) == seed % 9
        names[split] |= {*called}
        asked[split].add(last.pair)
        other = world.swap_names(one)
        assert [scene for scene, _ in other] == [scene for scene, _ in one]
        swapped = {(scene.things[0].shape, name) for scene, name in other}
        assert len({*dict(swapped)}) == len(swapped) == len(meaning) and (len(meaning) == 1 or not swapped & meaning)
        *order, _ = world.in_turn(random.Random(seed), 8, 5)
        assert sorted(map(order.count, range(5))) == [1, 1, 2, 2, 2], "every kind once before any a second time"
    assert not any(names[one] & names[other] for one, other in itertools.combinations(SPLITS, 2))
    assert min(map(len, names.values())) > 50 and asked["train"] <= {*world.SEEN_PAIRS}
    assert asked["validation"] == asked["test"] == {*world.UNSEEN_PAIRS}


def test_real_steps_of_flamingo_open_its_gates_and_leave_what_its_language_model_knew(runs, monkeypatch):
    recipe, model, before = world.FlamingoRecipe(), fresh("flamingo"), fresh("flamingo").language
    recipe.fit("three", model, replace(recipe.stages[0], steps=3))
    new = list(model.config.new_token_ids)  # two rows of each table
    for name, weight in model.language.named_parameters():
        old = [i for i in range(len(weight)) if i not in new or len(weight) != world.VOCAB_SIZE]
        assert torch.equal(weight[old], before.get_parameter(name)[old]), name
    first, *_, last = log_of(runs / "three")
    assert first["attn_gate 2"] == 0 < last["attn_gate 2"] and last["ffw_gate 0"] > 0
    monkeypatch.setattr(world, "toy_chinchilla", lambda device: before)
    same_logits, loss, loss_after = recipe.text_untouched(model)
    assert same_logits == 1 and loss == pytest.approx(math.log(512), abs=0.3) and loss_after != loss
    model.language.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert recipe.text_untouched(model)[0] < 0.9


@pytest.mark.parametrize("split", ["validation", "test"])
def test_what_cogvlm_forgets_is_measured_on_scenes_of_a_split_and_seen(split, untrained):
    model, heard = fresh("cogvlm"), []
    model.language.register_forward_pre_hook(lambda module, given: heard.extend(given[0]))
    assert world.text_loss(model, split) == pytest.approx(math.log(512), abs=0.3)
    model.register_forward_pre_hook(lambda module, given: heard.extend(given[0]))
    world.text_logits(model, split)
    assert len(heard) == 128 and {scene_told(text_of(row).split("Question")[0]).split for row in heard} == {split}
    recipe, asked = world.CogVLMRecipe(), SimpleNamespace(device="cpu", seed=0)
    model = seer(recipe)
    model.language.layers[1].input_layernorm.weight.data[0] += 0.1
    assert not recipe.claims(model, asked)[0].holds


def test_qwen_sees_a_still_picture_as_the_toy_clip_did(trainings):
    """But for the scale: that of CLIP's norm before its first block."""

    def watch(one):
        if one.name == "clip":
            torch.nn.init.uniform_(one.model.vision.ln_pre.weight, 0.5, 1.5)

    trainings.watch, image = watch, world.draw(world.make_scene(random.Random(0)))
    vision = world.Qwen2VLRecipe().start("cpu", 0).vision
    tower, (patches, grid_thw) = trainings[0].model.vision, qwen2vl.preprocess([image], vision.config)
    _, rows, columns = qwen2vl.patch_places(grid_thw, 2)
    theirs = tower.patch_embedding(clip.preprocess([image], tower.config))[0, :, rows, columns].T * tower.ln_pre.weight
    ours = vision.patch_embedding(patches)
    close(ours, theirs * (ours.norm() / theirs.norm()))
    assert 0.6 < (ours / tower.ln_pre.weight).std(dim=1).mean() < 1.4


def test_qwen_is_asked_about_sizes_lengths_and_scenes_that_its_training_does_not_show():
    recipe, size = world.Qwen2VLRecipe(), lambda shown: shown[0].size if isinstance(shown, list) else shown.size
    part1, part2 = recipe.stages

    def sizes(plan, *steps):
        samples = [sample for step in range(*steps) for sample in recipe.batch(plan, step)]
        assert [kind for *_, kind in samples[: plan.batch]] == list(world.QWEN_SHOWS[plan.stage][0])
        assert {len(shown) for shown, *_ in samples if isinstance(shown, list)} <= {*world.FRAMES}
        return {size(shown) for shown, _, kind in samples if kind != "number"}

    assert sizes(part1, 0, 135, 134) == {(32, 32)} and sizes(part1, 135, 145) == {*world.SMALL_CANVASES}
    assert sizes(part2, 20) == {*world.CANVASES} and part2.lr < part1.lr and part2.muon < part1.muon
    [demo], recipe.short = recipe.demo_stages, True
    sizes_of = lambda *steps: {shown.size for step in range(*steps) for shown, *_ in recipe.batch(demo, step)}
    assert sizes_of(75) == {(32, 32)} and sizes_of(75, 95) == {*world.DEMO_CANVASES}
    assert not {*world.DEMO_CANVASES} & {*world.NEW_IN_DEMO}
    recipe.short = False
    for stage, shown in (("things", world.CANVASES), ("things of one size", [(48, 48)]), ("large movies", [(48, 48)])):
        assert sizes(replace(part1, stage=stage, batch=8), 20) == {*shown}
    shapes = lambda sizes: {width / height for width, height in sizes}
    assert not shapes(world.CANVASES) & shapes(world.NEW_CANVASES) and max(world.FRAMES) < min(world.LONG_MOVIES)
    assert max(map(max, world.NEW_CANVASES)) == max(map(max, world.CANVASES)) < min(map(max, world.LARGE_CANVASES))
    recipe.accuracy = lambda model, asked: {
        len(shown) if isinstance(shown, list) else shown.size for shown, *_ in asked
    }
    for variant, seen, new in (
        ("any size", world.CANVASES, world.NEW_CANVASES),
        ("one size, learned positions", [(48, 48)], world.NEW_CANVASES),
        ("M-RoPE", world.FRAMES, world.LONG_MOVIES),
    ):
        recipe.shows, _ = recipe.variants[variant]["shows"]
        assert recipe.measure(None) == [{*seen}, {*new}]
    usual, new = (world.size_questions(60, sizes, "test") for sizes in (world.CANVASES, world.NEW_CANVASES))
    assert [asked for _, *asked in usual] == [asked for _, *asked in new], "the same scenes and questions in both"
    assert {size(shown) for shown, *_ in new} == {*world.NEW_CANVASES}
    for split in ("validation", "test"):
        shown = [shown for shown, *_ in world.size_questions(60, world.NEW_CANVASES, split)]
        assert {scene_in(picture).split for picture in shown} == {split}


def test_a_number_for_qwen_is_the_same_with_fewer_tokens():
    numbers = {tokens: world.qwen_numbers(20, tokens, "test") for tokens in world.TOKENS}
    for tokens, asked in numbers.items():
        assert [answer for *_, answer in asked] == [number_in(shown) for shown, *_ in numbers[9]]
        sizes = [qwen2vl.num_image_tokens(shown.height, shown.width, qwen2vl.PRESETS["tiny"]) for shown, *_ in asked]
        assert sizes == [tokens] * 20
    assert world.shrink(Image.new("RGB", (96, 48)), 2).size == (32, 16)


def test_qwen_locks_its_tower_late_in_part_1_and_in_a_demo_and_weighs_kinds_by_their_samples():
    recipe, model, kinds = world.Qwen2VLRecipe(), fresh("qwen2vl"), ["scene", "scene", "number", "movie"]
    part1, part2 = recipe.stages
    rngs = map(random.Random, range(4))
    samples = [(*world.qwen_sample(kind, rng, ((32, 32),)), kind) for kind, rng in zip(kinds, rngs)]
    whole, each = recipe.loss(model, samples, part2, 0)
    alone = [recipe.loss(model, part, part2, 0)[0] for part in (samples[:2], samples[2:3], samples[3:])]
    close(torch.stack([*each.values(), whole]), torch.stack([*alone, (2 * alone[0] + alone[1] + alone[2]) / 4]))
    for plan, recipe.short in ((part1, False), (recipe.demo_stages[0], True)):
        late = plan.steps * 3 // 5
        for step, trains in ((0, True), (late - 1, True), (late, False), (plan.steps - 1, False)):
            recipe.loss(model, samples[:1], plan, step)
            locked = {name.split(".")[0] for name, weight in model.named_parameters() if not weight.requires_grad}
            assert locked == (set() if trains else {"vision", "merger"}), step


def test_the_only_thing_of_a_picture_is_guessed_by_the_commonest_box_not_by_finding_it():
    asked = world.box_questions(random.Random(0), 60, things=1, split="any")
    boxes = [cogvlm.parse_box(answer) for *_, answer in asked]
    most = max(sum(cogvlm.box_iou(box, other) >= 0.5 for other in boxes) for box in boxes)
    assert world.guess_box(asked) == most / 60 < 0.6


@pytest.mark.parametrize("short", [True, False])
def test_flamingos_demo_asks_about_pairs_of_training_and_its_claims_about_others(short, monkeypatch):
    recipe, shown = world.FlamingoRecipe(), []
    monkeypatch.setattr(recipe, "answers", lambda model, episodes: shown.extend(episodes) or ["?"] * len(episodes))
    recipe.short = short
    recipe.few_shot(None, 4, 30)
    last = {one[-1][0].things[0].pair for one in shown}
    assert len(shown) == 30 and last <= {*(world.SEEN_PAIRS if short else world.UNSEEN_PAIRS)}


chapter("trainer")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are so small that a second thread only gets in the way
    processes = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    sys.exit(pytest.main([__file__, "-q", *processes, *sys.argv[1:]]))
