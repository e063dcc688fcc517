"""
Qwen2-VL and Qwen2.5-VL: images and videos of any size, read as they are.

    Qwen2-VL    Wang et al. 2024, Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution,
                arXiv 2409.12191
    Qwen2.5-VL  Bai et al. 2025, Qwen2.5-VL Technical Report, arXiv 2502.13923

The idea. LLaVA squeezes every picture into one square of 336 pixels: a receipt becomes unreadable, a stamp is blown up.
Here a picture keeps its size and shape and becomes as many tokens as it has pixels for. That takes three things. The
vision tower knows no size: no table of learned positions, a patch says where it stands by rotation (RoPE-2D). Pictures
of all sizes stand behind one another in one row of patches, each looking at itself only: nothing is padded. And the
decoder reads positions in three dimensions, time, row and column (M-RoPE), so that it knows what lies beside what,
and a long film does not use up the positions that it was trained with.

    images, clips (any sizes)            "<|vision_start|><|image_pad|>...<|vision_end|>What does the receipt say?"
      | smart_resize: multiples of 28       | token ids; <|image_pad|> is repeated once per visual token
      | 14 x 14 x 2 frames per patch      ids [B,T], image_grid_thw [n,3]
    patches [N,1176], grid_thw [n,3]        |                     | rope_index
      | linear map, RoPE-2D                 | embedding table     |
      | blocks, one packed row:             |                   positions [3,B,T]
      | each frame (2.5: window) by itself  |                     |
    [N,Dv]                                  |                     |
      | merger: LayerNorm, 2 x 2 patches joined, MLP              |
    [N/4,D] ---- put where the <|image_pad|> ids stand ----> [B,T,D]
                                            | Qwen2 blocks: causal; RMSNorm, M-RoPE, SwiGLU
                                          logits [B,T,V] -> "41.50"

Three stages (paper 2.2): the tower alone learns from captioned pictures, then all learns together, then the tower is
locked and the language model learns from conversations. Qwen2.5-VL changes the tower: RMSNorm, SwiGLU, and windows. A
grid of squares of 112 pixels is laid over the image from its upper left corner, and in all but four layers a patch sees
only the square it stands in: neighbours on two sides of a line of the grid do not meet there. In those layers cost grows
with the area of the image; in the four that see all of it still with the square of the area. And the decoder's time axis
counts seconds, not frames.

Axis letters, here and in all seven files: B batch, T text length, S joint length, N images or patches, P patch size,
D width, H heads, K key/value heads, Dh head width, L latents or queries, F frames, V vocabulary, E shared embedding
width. Two of them, H and W, are also an image's height and width. Here n counts images (or clips), N patches of all of
them together, and a grid (t, h, w) counts patches: pairs of frames, rows, columns.

Three conventions on which code in this field disagrees
    RoPE    half-split pairing: dimension i turns with dimension i + Dh/2 (as LLaMA checkpoints on the hub are stored).
    masks   True means "may attend" or "real token".
    labels  have the same positions as ids; the shift by one happens in one place, language_loss.

Paper / published code / this file
    - Attention over a clip. The paper speaks of 3-D convolutions that let the model "process 3D tubes"; in the published
      code frames meet only there, two by two: each pair of frames is a segment of its own in the tower's attention.
    - After a clip. Text goes on after the largest of the three axes (paper 2.1, original code, this file). The classes in
      transformers 5.23 forget the time axis there: text after a long clip shares positions with the clip's end; and their
      generate, after a prompt that ends with an image, counts on from its last token, which their forward does not.
    - The merger. The paper calls it a simple MLP. Published code normalises each patch by itself, then joins four and maps them,
      and so does this file. With what it trains the paper does not say: there it belongs to the tower (visual.merger), so
      here it trains and is locked with it.
    - Length of clips. The paper reads two frames a second and shrinks them until a clip has at most 16384 tokens (2.1). Here every
      frame given is read, up to 768 tokens for two of them: of a long film, give some frames only.
    - Windows. Published code reorders the patches so that windows are contiguous, and back. Here a window is a segment like
      a frame is, and Packing sorts either.
    - Frames are resized one by one by Pillow, as images are; the published video path has torchvision resize them.

What to try: --demo, then your own pictures, tall ones and wide ones; --anatomy qwen2.5-vl-7b; --show-mask; set mrope to
False and ask about long films; python train_tiny.py qwen2vl --ablations.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, ImageSequence
from torch import nn

from kernels import apply_rope, attention, draw_mask, mrope, rope_1d, rope_2d

IGNORE_INDEX = -100  # a label that does not count; cross_entropy's own default

# ----------------------------------------------------------------------------------------------------------------------
# Configuration

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's own data


@dataclass(frozen=True)
class VisionConfig:
    patch_size: int = 14
    frames: int = 2  # that share a patch; a still picture fills both
    merge: int = 2  # merge x merge patches become one token of the decoder
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    activation: str = "quick_gelu"  # see ACTIVATIONS
    norm: str = "layer"  # LayerNorm; Qwen2.5-VL: "rms", as in the decoder
    gated: bool = False  # Qwen2.5-VL: SwiGLU, with biases
    window_size: int = 0  # pixels; 0: every layer looks at the whole frame. Qwen2.5-VL: 112, that is 8 x 8 patches
    full_layers: tuple = ()  # the layers that look at the whole frame in spite of a window
    norm_eps: float = 1e-6
    learned_grid: int = 0  # an ablation: n > 0 replaces RoPE-2D by a table of learned positions for n x n patches, stretched
    min_pixels: int = 56 * 56  # of an image after smart_resize
    max_pixels: int = 16384 * 28 * 28
    video_min_pixels: int = 128 * 28 * 28  # of a frame of a clip
    video_max_pixels: int = 768 * 28 * 28
    mean: tuple = CLIP_MEAN
    std: tuple = CLIP_STD

    def __post_init__(self):
        if self.width % (4 * self.heads):
            raise ValueError(f"vision width {self.width}: {self.heads} heads need a multiple of 4 each, for rows and columns")
        if self.norm not in ("layer", "rms"):
            raise ValueError(f"unknown norm {self.norm!r}; known: layer, rms")
        if self.window_size and self.window_size < self.factor:
            raise ValueError(f"a window of {self.window_size} pixels is smaller than a token, {self.factor} pixels wide")

    @property
    def factor(self):
        return self.patch_size * self.merge  # pixels along the side of one token of the decoder: 28

    @property
    def patch_width(self):
        return 3 * self.frames * self.patch_size**2  # numbers in one patch: 1176


@dataclass(frozen=True)
class LanguageConfig:
    vocab_size: int = 151936
    width: int = 1536
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2  # fewer than heads: grouped-query attention
    mlp_width: int = 8960
    context: int = 32768
    norm_eps: float = 1e-6
    rope_base: float = 1000000.0
    mrope_sections: tuple = (16, 24, 24)  # frequencies of a head that turn with time, row, column; the fast ones are time's
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"language width {self.width} is not divisible by {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads evenly")
        if 2 * sum(self.mrope_sections) != self.head_width:
            raise ValueError(f"mrope sections {self.mrope_sections} must add up to half the head width {self.head_width}")

    @property
    def head_width(self):
        return self.width // self.heads


@dataclass(frozen=True)
class Template:
    """How a conversation is written; the documented form of the published checkpoints unless told otherwise."""

    turn: str = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    system: str = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    image: str = "<|image_pad|>"
    video: str = "<|video_pad|>"
    start: str = "<|vision_start|>"
    end: str = "<|vision_end|>"


@dataclass(frozen=True)
class Qwen2VLConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    template: Template = field(default_factory=Template)
    image_token_id: int = 151655
    video_token_id: int = 151656
    eos_token_id: int = 151645  # <|im_end|>
    # How fast the time axis of a clip runs. Qwen2.5-VL: so many positions a second. 0, as in Qwen2-VL: one position for
    # each pair of frames, however long it lasts.
    tokens_per_second: int = 0
    mrope: bool = True  # an ablation: False numbers all tokens one after another, whatever they are


TOWER_2_5 = VisionConfig(mlp_width=3420, norm="rms", gated=True, window_size=112, full_layers=(7, 15, 23, 31))
QWEN_2B = LanguageConfig(tie_embeddings=True)
QWEN_3B = LanguageConfig(width=2048, layers=36, heads=16, mlp_width=11008, context=128000, tie_embeddings=True)
QWEN_7B = LanguageConfig(152064, width=3584, heads=28, kv_heads=4, mlp_width=18944)

PRESETS = {
    # what train_tiny.py trains in front of you, from the toy CLIP's blocks and a toy language model, on pictures of many sizes
    "tiny": Qwen2VLConfig(
        VisionConfig(
            8, width=96, layers=4, heads=4, mlp_width=384, min_pixels=16 * 16, max_pixels=128 * 128,
            video_min_pixels=16 * 16, video_max_pixels=128 * 128, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        ),
        LanguageConfig(
            512, width=96, layers=3, heads=2, kv_heads=1, mlp_width=256, context=512, rope_base=10000.0,
            mrope_sections=(8, 8, 8), tie_embeddings=True,
        ),
        Template("{} ASSISTANT:", "", "<image>", "<video>", "<boi>", "<eoi>"),
        image_token_id=499,
        video_token_id=500,
        eos_token_id=498,
    ),
    "qwen2-vl-2b": Qwen2VLConfig(language=QWEN_2B),
    "qwen2-vl-7b": Qwen2VLConfig(language=QWEN_7B),
    "qwen2.5-vl-3b": Qwen2VLConfig(TOWER_2_5, QWEN_3B, tokens_per_second=2),
    "qwen2.5-vl-7b": Qwen2VLConfig(TOWER_2_5, replace(QWEN_7B, context=128000), tokens_per_second=2),
}  # fmt: skip


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """The size that an image of height x width pixels is given: multiples of factor on both sides, between min_pixels and
    max_pixels in all, with nearly the same shape. An image smaller than one token is enlarged. Raises ValueError beyond
    200:1, as the published code does: no multiple of factor is near such a shape.

    >>> smart_resize(480, 641, 28, 56 * 56, 16384 * 28 * 28)
    (476, 644)
    """
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {height} x {width} pixels is more than 200 times as long as it is wide: crop it")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def image_grid(height, width, config, frames=None):
    """(t, h, w): pairs of frames, rows and columns of patches, of an image of height x width pixels, or of a clip if the
    number of its frames is given. config: VisionConfig."""
    if frames is None:
        steps, pixels = 1, (config.min_pixels, config.max_pixels)
    elif frames < 1:
        raise ValueError(f"a clip needs at least one frame, not {frames}")
    else:
        steps, pixels = -(-frames // config.frames), (config.video_min_pixels, config.video_max_pixels)
    height, width = smart_resize(height, width, config.factor, *pixels)
    return steps, height // config.patch_size, width // config.patch_size


def num_image_tokens(height, width, config, frames=None):
    """Tokens the decoder reads for one image of height x width pixels (or a clip of so many frames): the one place where
    this is computed. config: Qwen2VLConfig. 480 x 640 is resized to 476 x 644, 34 x 46 patches, 17 x 23 = 391 tokens."""
    steps, rows, columns = image_grid(height, width, config.vision, frames)
    return steps * rows * columns // config.vision.merge**2


def check_grid(patches, grid_thw, config, what="image"):
    """Raises ValueError unless patches [N,patch_width] are those that grid_thw [n,3] counts. config: VisionConfig."""
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point() or (grid_thw < 1).any():
        raise ValueError(f"the {what} grid must be integers [n,3] (time, rows, columns), all positive: {grid_thw.tolist()}")
    for t, h, w in grid_thw.tolist():
        if h % config.merge or w % config.merge:
            raise ValueError(f"a grid of {h} x {w} patches cannot be merged {config.merge} x {config.merge}")
    if patches is None:
        raise ValueError(f"there is a grid for {len(grid_thw)} {what}(s), but no patches")
    need = int(grid_thw.prod(1).sum())
    if patches.shape != (need, config.patch_width):
        raise ValueError(
            f"{what} patches are {list(patches.shape)}, but the grid {grid_thw.tolist()} needs {need} patches of"
            f" {config.patch_width} numbers (3 x {config.frames} x {config.patch_size} x {config.patch_size})"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Small parts


class trace:
    """Look inside a forward pass: `with trace() as t: model(...)`, then `t.rows` holds (name, tensor) of every stage.

    maps=True also records attention weights [B,H,Tq,Tk], which only the reference backend can give.
    When no trace is open, a stage costs one comparison with None.
    """

    active = None

    def __init__(self, maps=False):
        self.maps, self.rows = maps, []

    def __enter__(self):
        trace.active = self
        return self

    def __exit__(self, *_):
        trace.active = None

    def __str__(self):
        lines = [f"{'stage':<34}{'shape':<24}{'mean':>9}{'std':>9}"]
        for name, x in self.rows:
            x32 = x.float()
            lines.append(f"{name:<34}{str(list(x.shape)):<24}{x32.mean():>9.3f}{x32.std(correction=0):>9.3f}")
        return "\n".join(lines)


def note(name, x):
    """Record x under name if a trace is open; returns x, so that it can be wrapped around any expression."""
    if trace.active is not None:
        trace.active.rows.append((name, x.detach()))
    return x


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)  # Hendrycks & Gimpel 2016, the sigmoid approximation of GELU


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "gelu": F.gelu, "relu": F.relu}


class MLP(nn.Module):
    def __init__(self, width, mlp_width, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv 1910.07467): LayerNorm without the mean, without the bias.
    The mean of squares is taken in float32, since squares of fp16 activations overflow."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202): an MLP whose hidden units are gated by others.
    Without biases in the decoder, with them in Qwen2.5-VL's vision tower."""

    def __init__(self, width, mlp_width, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width, bias=bias)
        self.up_proj = nn.Linear(width, mlp_width, bias=bias)
        self.down_proj = nn.Linear(mlp_width, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ----------------------------------------------------------------------------------------------------------------------
# One packed row: where patches stand, and who they see


def patch_places(grid_thw, merge):
    """Where each patch of the packed row stands -> [3,N]: number of its frame pair (counted through all images and clips),
    row, column. The four patches that the merger joins follow each other (merge = 2):

        a grid of 2 x 4 patches     0 1 4 5      places in the packed row; 0 1 2 3 become the first token
                                    2 3 6 7
    """
    places, before = [], 0
    for t, h, w in grid_thw.tolist():  # on the CPU, whatever the default: anatomy's is "meta", where numbers have no values
        row, column = torch.meshgrid(torch.arange(h, device="cpu"), torch.arange(w, device="cpu"), indexing="ij")
        blocks = (h // merge, merge, w // merge, merge)
        row, column = (x.reshape(blocks).transpose(1, 2).flatten().repeat(t) for x in (row, column))  # each [t*h*w]
        frame = torch.arange(before, before + t, device="cpu").repeat_interleave(h * w)
        places.append(torch.stack([frame, row, column]))
        before += t
    return torch.cat(places, dim=1)


def window_segments(places, config):
    """Number of the window in which each patch stands, [N]: windows of Qwen2.5-VL are cut from the upper left corner of a
    frame, 112 pixels or 8 x 8 patches each, and what is left over at the right and at the bottom is smaller."""
    side = config.window_size // config.factor * config.merge  # in patches, and no token is cut in two
    frame, row, column = places
    across = int(column.max()) // side + 1  # of the widest and (down) of the tallest image here: no two windows share a number
    down = int(row.max()) // side + 1
    number = (frame * down + row // side) * across + column // side
    return torch.unique(number, return_inverse=True)[1]  # 0 1 2 ... without gaps: Packing counts them


class Packing:
    """How to attend within the segments of a packed row at the cost of the sum of their squares.

    Segments of the same length are one batch: patches are brought into the order of (length of their segment, segment),
    then cut into [m,n], m segments of n patches. `shapes` holds those (m, n), at most one for each different length.
    `order` and `back` are the way there and back; None where the row is in order already, as images of one size are.
    The same scores as one call with q_segments and k_segments, without the squares between images that a mask throws
    away. A loop over different lengths, none over segments or patches.
    """

    def __init__(self, segments, device):
        sizes = segments.bincount()  # [number of segments]
        order = (sizes[segments] * len(sizes) + segments).argsort(stable=True)
        lengths, counts = sizes[sizes > 0].unique(return_counts=True)
        self.shapes = list(zip(counts.tolist(), lengths.tolist(), strict=True))
        in_order = torch.equal(order, torch.arange(len(order), device=order.device))
        self.order, self.back = (None, None) if in_order else (order.to(device), order.argsort().to(device))
        self.segments = segments.to(device)[None]  # [1,N], for who wants to see the weights

    def attend(self, q, k, v):
        """q, k, v [N,H,Dh] -> [N,H*Dh]."""
        if trace.active is not None and trace.active.maps:
            rule = dict(q_segments=self.segments, k_segments=self.segments)
            o, weights = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), **rule, return_weights=True)
            note("attention weights", weights)
            return o[0].transpose(0, 1).flatten(1)
        if self.order is not None:
            q, k, v = (x.index_select(0, self.order) for x in (q, k, v))
        parts = []
        for (m, n), *qkv in zip(self.shapes, *(x.split([m * n for m, n in self.shapes]) for x in (q, k, v)), strict=True):
            o = attention(*(x.reshape(m, n, *x.shape[1:]).transpose(1, 2) for x in qkv))  # [m,H,n,Dh]
            parts.append(o.transpose(1, 2).reshape(m * n, -1))
        o = parts[0] if len(parts) == 1 else torch.cat(parts)
        return o if self.back is None else o.index_select(0, self.back)


# ----------------------------------------------------------------------------------------------------------------------
# Attention and block of the vision tower


class VisionAttention(nn.Module):
    """Multi-head self-attention over a packed row x [N,D]; the published file has q, k and v in one matrix."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, angles, packing):
        q, k, v = (proj(x).view(len(x), self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))  # each [N,H,Dh]
        if angles is not None:
            q, k = apply_rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], angles)  # each [1,H,N,Dh]
            q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)
        return self.out_proj(packing.attend(q, k, v))


class VisionBlock(nn.Module):
    """Pre-norm transformer block: the residual stream x is only ever added to."""

    def __init__(self, config):
        super().__init__()
        norm = RMSNorm if config.norm == "rms" else nn.LayerNorm
        self.ln_1 = norm(config.width, eps=config.norm_eps)
        self.attn = VisionAttention(config.width, config.heads)
        self.ln_2 = norm(config.width, eps=config.norm_eps)
        if config.gated:
            self.mlp = SwiGLU(config.width, config.mlp_width, bias=True)
        else:
            self.mlp = MLP(config.width, config.mlp_width, config.activation)

    def forward(self, x, angles, packing):
        x = x + self.attn(self.ln_1(x), angles, packing)
        return x + self.mlp(self.ln_2(x))


# ----------------------------------------------------------------------------------------------------------------------
# Vision tower


class VisionTower(nn.Module):
    """ViT for any resolution (paper 2.1): forward(patches [N,patch_width], grid_thw [n,3]) -> [N,D].

    All images and clips stand in one row. Rows and columns turn the queries and keys (RoPE-2D); time is not told: frame
    pairs do not see each other, and it is the decoder that puts them in order.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.width
        # The paper's 3-D convolution, whose stride is its kernel: a linear map applied to every patch.
        self.patch_embedding = nn.Linear(config.patch_width, D, bias=False)
        if config.learned_grid:
            self.position_embedding = nn.Parameter(torch.randn(config.learned_grid**2, D) * D**-0.5)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2:  # what writes to the residual stream starts smaller, as 2 * layers terms add up
                residual = name.endswith(("out_proj.weight", "fc2.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 / (math.sqrt(2 * config.layers) if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def learned_positions(self, places, grid_thw):
        """The ablation: a table of learned positions, stretched to each image's grid as CLIP's tower does -> [N,D]."""
        side, parts = self.config.learned_grid, []
        square = self.position_embedding.T.reshape(1, -1, side, side)
        for (t, h, w), place in zip(grid_thw.tolist(), places.split(grid_thw.prod(1).tolist(), dim=1), strict=True):
            image = square if (h, w) == (side, side) else F.interpolate(square, (h, w), mode="bicubic", align_corners=False)
            parts.append(image[0, :, place[1].to(square.device), place[2].to(square.device)].T)
        return torch.cat(parts)

    def forward(self, patches, grid_thw):
        c = self.config
        check_grid(patches, grid_thw, c)  # the tower may be called without the model around it
        grid_thw = grid_thw.cpu()  # sizes are numbers for Python: who works on the GPU keeps them here
        places = patch_places(grid_thw, c.merge)
        x = note("vision.patches", self.patch_embedding(patches.to(self.patch_embedding.weight.dtype)))  # [N,D]
        within_frames, angles = Packing(places[0], x.device), None
        if c.learned_grid:
            x = x + self.learned_positions(places, grid_thw)
        else:
            angles = rope_2d(places[1:, None].to(x.device), c.width // c.heads)  # [1,N,Dh/2]
        within_windows = Packing(window_segments(places, c), x.device) if c.window_size else within_frames
        for i, block in enumerate(self.blocks):
            x = note(f"vision.blocks.{i}", block(x, angles, within_frames if i in c.full_layers else within_windows))
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Connector


class Merger(nn.Module):
    """Patch features [N,Dv] -> word-like vectors [N/4,D]: 2 x 2 patches, which follow each other in the row, side by side
    in one vector, and an MLP. A quarter of the tokens, and nothing is thrown away to get there."""

    def __init__(self, config):
        super().__init__()
        Dv, self.together = config.vision.width, config.vision.merge**2 * config.vision.width
        norm = RMSNorm if config.vision.norm == "rms" else nn.LayerNorm
        self.ln_q = norm(Dv, eps=config.vision.norm_eps)
        self.mlp = nn.Sequential(nn.Linear(self.together, self.together), nn.GELU(), nn.Linear(self.together, config.language.width))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.together))


# ----------------------------------------------------------------------------------------------------------------------
# Language model


class Cache:
    """Keys and values of all layers, so that a new token costs one token's work; made by generate, passed along.

    Room for `capacity` positions is taken once; `length` of them are filled. Padding stays in it, marked in `segments`.
    """

    def __init__(self, config, B, capacity, like):
        shape = (config.layers, B, config.kv_heads, capacity, config.head_width)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.segments = None  # [B,length] once a mask was given; None while every token is real
        self.length = 0

    def append(self, layer, k, v):
        """k, v [B,K,T,Dh] of the new tokens -> those of all tokens so far, [B,K,length+T,Dh]."""
        end = self.length + k.shape[2]
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


class DecoderAttention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads. Qwen2 has biases on q, k and v."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        D, Dh = config.width, config.head_width
        self.q_proj = nn.Linear(D, config.heads * Dh)
        self.k_proj = nn.Linear(D, config.kv_heads * Dh)
        self.v_proj = nn.Linear(D, config.kv_heads * Dh)
        self.o_proj = nn.Linear(config.heads * Dh, D, bias=False)
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.zeros_(proj.bias)

    def forward(self, x, angles, mask, cache=None, layer=0):
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, self.heads, -1).transpose(1, 2)  # [B,H,T,Dh]
        k = self.k_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)  # [B,K,T,Dh]
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)
        q, k = apply_rope(q, k, angles)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if trace.active is not None and trace.active.maps:
            o, weights = attention(q, k, v, **mask, return_weights=True)
            note("decoder attention weights", weights)
        else:
            o = attention(q, k, v, **mask)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


class DecoderBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(self, x, angles, mask, cache=None, layer=0):
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Qwen2 (Yang et al. 2024, arXiv 2407.10671) with positions in three dimensions.

    forward(ids [B,T], mask [B,T] or None; True = real token) -> logits [B,T,V]. Padding may stand on either side.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # what writes to the residual stream starts smaller, as 2 * layers terms add up
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=config.width**-0.5 / (math.sqrt(2 * config.layers) if residual else 1))
        nn.init.normal_(self.lm_head.weight, std=0.02)  # small, so that the first loss is ln V: nothing is preferred

    def hidden(self, x, mask=None, cache=None, positions=None):
        """Embeddings x [B,T,D] of new tokens (and their mask) -> hidden states [B,T,D] after the last norm.

        With a cache, the tokens in it come first. positions [3,B,T] say where the new tokens stand (see rope_index), or [B,T]
        where the three axes are equal, as they are for text; None: one after another. Padding is not counted.
        """
        B, T, _ = x.shape
        past = 0 if cache is None else cache.length
        if past + T > self.config.context:
            raise ValueError(f"{past + T} tokens (text and image) do not fit the context of {self.config.context}")
        q_segments = k_segments = None
        if cache is not None and cache.segments is not None and mask is None:
            mask = torch.ones(B, T, dtype=torch.bool, device=x.device)
        if mask is not None:
            q_segments = k_segments = mask.int() - 1  # 0 for a real token, -1 for padding, which nobody may look at
            if past:
                before = cache.segments if cache.segments is not None else q_segments.new_zeros(B, past)
                k_segments = torch.cat([before, q_segments], dim=1)  # [B,past+T]
        if positions is None:
            positions = torch.arange(past, past + T, device=x.device).expand(B, T)
            if mask is not None:
                positions = ((k_segments == 0).cumsum(1) - 1)[:, past:].clamp(min=0)
        c = self.config
        if positions.ndim == 2:  # M-RoPE with equal axes is RoPE-1D
            angles = rope_1d(positions, c.head_width, c.rope_base)  # [B,T,Dh/2]
        else:
            angles = mrope(positions, c.head_width, c.mrope_sections, c.rope_base)
        rule = dict(causal=True, q_segments=q_segments, k_segments=k_segments)
        for i, layer in enumerate(self.layers):
            x = note(f"language.layers.{i}", layer(x, angles, rule, cache, i))
        if cache is not None:
            cache.length, cache.segments = past + T, k_segments
        return self.norm(x)

    def forward(self, ids, mask=None):
        return note("logits", self.lm_head(self.hidden(self.embed_tokens(ids), mask)))


class PositionedLM:
    """The language model with the positions of one prompt, as `generate` wants one: positions belong to the prompt, not to
    the model, so that nothing of one call is left for the next.

    A picture of 391 tokens moves the text behind it by 23 positions only. New words go on where the prompt's positions end:
    delta = largest position + 1 - length of the prompt, one number per row, added to the place in the cache.
    """

    def __init__(self, language, positions):
        self.config, self.embed_tokens, self.lm_head = language.config, language.embed_tokens, language.lm_head
        self.language, self.positions = language, positions
        self.delta = positions.amax((0, 2)) + 1 - positions.shape[2]  # [B]

    def hidden(self, x, mask=None, cache=None):
        """As LanguageModel.hidden: first the prompt, then what comes after it."""
        positions = self.positions
        if cache is not None and cache.length:
            places = torch.arange(cache.length, cache.length + x.shape[1], device=x.device)
            positions = places + self.delta[:, None]  # [B,T]: words move all three axes alike
        return self.language.hidden(x, mask, cache, positions)


# ----------------------------------------------------------------------------------------------------------------------
# Positions


def find_placeholders(ids, grid_thw, token_id, config, mask=None, what="image"):
    """Where the tokens of all images (or videos) stand -> bool [B,T]. They are used up in order, row by row. Raises
    ValueError when their number is not what grid_thw [n,3] asks for, or when those of one image do not stand together."""
    here = ids == token_id
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != ids.shape:
            raise ValueError(f"mask must be bool like ids {list(ids.shape)}, got {mask.dtype} {list(mask.shape)}")
        here = here & mask
    found = int(here.sum())
    if grid_thw is None:
        if found:
            raise ValueError(f"{found} {what} tokens in the ids, but no {what} was given")
        return here
    m = config.vision.merge
    sizes = grid_thw.to(ids.device).prod(1) // m**2  # [n] tokens of each
    if found != int(sizes.sum()):
        grids = ", ".join(f"{t} x {h} x {w}" for t, h, w in grid_thw.tolist())
        raise ValueError(
            f"{found} {what} tokens in the ids, but {len(sizes)} {what}(s) need {int(sizes.sum())}: grids of {grids} patches,"
            f" {m} x {m} of which are a token"
        )
    row, column = here.nonzero(as_tuple=True)
    first, last = sizes.cumsum(0) - sizes, sizes.cumsum(0) - 1
    apart = (row[first] != row[last]) | (column[last] - column[first] + 1 != sizes)
    if apart.any():
        i = int(apart.int().argmax())
        raise ValueError(f"the {int(sizes[i])} tokens of {what} {i + 1} do not stand side by side in one row of the ids")
    return here


def rope_index(ids, config, image_grid_thw=None, video_grid_thw=None, mask=None, seconds=None):
    """Where each token stands in time, row and column -> positions [3,B,T] (paper 2.1, M-RoPE).

    ids [B,T] with placeholders, grids [n,3] in patches, mask [B,T] (True = real token), config: Qwen2VLConfig. seconds:
    of each video, how long one step of its grid lasts (None: one second); Qwen2.5-VL counts its time axis in them.

    Text moves all three axes by one a token, so that for text alone this is RoPE-1D. An image does not move in time; its
    tokens are told apart by row and column, both counted from where the image begins:

        a b [image of 2 x 2 tokens] c       time     0 1  2 2 2 2  4
                                            row      0 1  2 2 3 3  4
                                            column   0 1  2 3 2 3  4

    The text behind goes on at the largest position of any axis, plus one. With less, some word would share a position
    with a part of the picture; so an image costs max(rows, columns) positions, not rows x columns: 391 tokens of a photo
    cost 23, and a long document full of pictures stays among the positions that the decoder was trained with.

        [image of 1 x 3] a                  time     0 0 0  3       an image at the very start stands at 0
                                            row      0 0 0  3
                                            column   0 1 2  3

    A clip moves in time as well, one step for each pair of frames. Four frames of 2 x 2 tokens are two steps, and cost 2,
    the largest of 2 steps, 2 rows and 2 columns:

        a [clip, 2 steps] b                 time     0  1 1 1 1 2 2 2 2  3
                                            row      0  1 1 2 2 1 1 2 2  3
                                            column   0  1 2 1 2 1 2 1 2  3

    (With tokens_per_second 2 and 1 second a step time would be 1 1 1 1 3 3 3 3, and b at 4.) Padding moves nothing and
    stands at 0, on either side:

        . . a b    time, row, column   0 0 0 1
        a b . .                        0 1 0 0
    """
    advance = torch.ones_like(ids) if mask is None else mask.long()  # [B,T]: how far a token moves what is behind it
    within = torch.zeros(3, *ids.shape, dtype=torch.long, device=ids.device)  # where a token stands in its image
    m = config.vision.merge
    kinds = (("image", image_grid_thw, config.image_token_id), ("video", video_grid_thw, config.video_token_id))
    for what, grid_thw, token_id in kinds:
        here = find_placeholders(ids, grid_thw, token_id, config, mask, what)
        if grid_thw is None or not config.mrope:
            continue
        places, moves = [], []
        for i, (t, h, w) in enumerate(grid_thw.tolist()):
            time = torch.arange(t)
            if what == "video" and config.tokens_per_second:
                time = (time * (config.tokens_per_second * (1.0 if seconds is None else float(seconds[i])))).long()
            axes = torch.meshgrid(time, torch.arange(h // m), torch.arange(w // m), indexing="ij")
            places.append(torch.stack(axes).flatten(1))  # [3, tokens of this image]
            moves.append(torch.zeros_like(places[-1][0]))
            moves[-1][-1] = places[-1].max() + 1  # its last token moves what follows, the others nothing
        within[:, here] = torch.cat(places, dim=1).to(ids.device)
        advance[here] = torch.cat(moves).to(ids.device)
    positions = within + (advance.cumsum(1) - advance)  # how far all tokens before this one have moved it
    return positions if mask is None else positions * mask


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Qwen2VL(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.merger = Merger(config)
        self.language = LanguageModel(config.language)

    def encode_image(self, patches, grid_thw):
        """patches [N,patch_width] of n images or clips, grid_thw [n,3] -> one vector per token, [N/4,D]."""
        return note("image features for the decoder", self.merger(self.vision(patches, grid_thw)))

    def embed(self, ids, patches=None, grid_thw=None, mask=None, video_patches=None, video_grid_thw=None):
        """Embeddings [B,T,D] with what the tower sees in the places of the placeholders; see forward."""
        c, here, seen = self.config, [], []
        kinds = (("image", patches, grid_thw, c.image_token_id), ("video", video_patches, video_grid_thw, c.video_token_id))
        for what, given, grids, token_id in kinds:
            if given is not None and grids is None:
                raise ValueError(f"{what} patches without their grid: preprocess returns both")
            if grids is not None:
                check_grid(given, grids, c.vision, what)
                seen.append((given, grids))
            here.append(find_placeholders(ids, grids, token_id, c, mask, what))
        x = self.language.embed_tokens(ids)
        if not seen:
            return x
        features = self.encode_image(*(torch.cat(parts) for parts in zip(*seen, strict=True)))  # images first, one row
        x = x.clone()
        images = int(here[0].sum())
        x[here[0]], x[here[1]] = features[:images].to(x.dtype), features[images:].to(x.dtype)
        return note("words and patches", x)

    def embed_and_position(self, ids, patches, grid_thw, mask, video_patches, video_grid_thw, seconds, positions):
        """What both forward and generate begin with -> embeddings [B,T,D], positions [3,B,T]."""
        x = self.embed(ids, patches, grid_thw, mask, video_patches, video_grid_thw)
        if positions is None:
            positions = rope_index(ids, self.config, grid_thw, video_grid_thw, mask, seconds)
        elif positions.shape != (3, *ids.shape):
            raise ValueError(f"positions are {list(positions.shape)}, ids {list(ids.shape)} need [3, {ids.shape[0]}, {ids.shape[1]}]")
        return x, positions

    def forward(
        self, ids, patches=None, grid_thw=None, mask=None, *, video_patches=None, video_grid_thw=None, seconds=None, positions=None
    ):  # fmt: skip
        """ids [B,T] with one image_token_id (video_token_id) per visual token; patches [N,patch_width] and grid_thw [n,3] of
        all images of all rows in order, as preprocess gives them, and the same of all videos; mask [B,T] (True = real
        token); seconds and positions [3,B,T]: see rope_index -> logits [B,T,V]."""
        x, positions = self.embed_and_position(ids, patches, grid_thw, mask, video_patches, video_grid_thw, seconds, positions)
        return note("logits", self.language.lm_head(self.language.hidden(x, mask, positions=positions)))

    def generate(
        self, ids, patches=None, grid_thw=None, mask=None, *, video_patches=None, video_grid_thw=None, seconds=None, positions=None,
        **options,
    ):  # fmt: skip
        """Continue each row of ids; the tower runs once. Arguments as in forward; options and result: see generate below."""
        with torch.no_grad():
            x, positions = self.embed_and_position(ids, patches, grid_thw, mask, video_patches, video_grid_thw, seconds, positions)
            return generate(PositionedLM(self.language, positions), x, mask, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a published Qwen2-VL or Qwen2.5-VL: a folder in the Hugging Face layout, or a hub id. See load_checkpoint."""
        folder = checkpoint_folder(path)
        config = config_from_published(read_config(folder), folder)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config)
        return load_checkpoint(model, folder, dtype, device)


def freeze(model, stage):
    """Set what trains (paper 2.2). Stage 1: the tower and its merger, on captions; stage 2: everything; stage 3: the
    language model, on conversations, with the tower locked. Returns the parameters that train."""
    if stage not in (1, 2, 3):
        raise ValueError(f"Qwen2-VL trains in stages 1, 2 and 3, not {stage!r}")
    model.vision.requires_grad_(stage < 3)
    model.merger.requires_grad_(stage < 3)
    model.language.requires_grad_(stage > 1)
    return [p for p in model.parameters() if p.requires_grad]


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def language_loss(logits, labels):
    """Next-token cross-entropy: logits [B,T,V] at position t predict labels [B,T] at t + 1. -> loss, metrics.

    Labels of IGNORE_INDEX do not count. Before training the loss is about ln V: every word is equally likely.
    Raises ValueError when no label counts: the mean of nothing is NaN, and means that the prompt took all the room.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORE_INDEX
    if not counted.any():
        raise ValueError("no label to learn from: every position is IGNORE_INDEX (were the answers cut off?)")
    logits, labels = logits[counted].float(), labels[counted]  # [counted,V]
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy.detach()}


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def sample(logits, temperature, top_k, generator=None):
    """logits [B,V] -> next ids [B]. Temperature 0 takes the most likely; top_k draws among the k most likely only."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(language, x, mask=None, max_new_tokens=64, temperature=0.0, top_k=None, eos_id=None, generator=None):
    """Prompts as embeddings x [B,T,D] with mask [B,T] (None: all real; padding on either side) -> new ids [B,n].

    The prompt runs once, then one token at a time against the cached keys and values. A row that has said eos_id is
    filled up with eos_id; generation ends when all rows have, or after max_new_tokens.
    """
    B, T, _ = x.shape
    if T + max_new_tokens > language.config.context:
        raise ValueError(f"{T} tokens and {max_new_tokens} new ones do not fit the context of {language.config.context}")
    cache = Cache(language.config, B, T + max_new_tokens, like=x)
    h = language.hidden(x, mask, cache)
    if mask is None:
        h = h[:, -1]
    else:  # with padding on the right, the last real token is not the last column
        last = T - 1 - mask.flip(1).int().argmax(1)
        h = h[torch.arange(B, device=x.device), last]  # [B,D]
    ids, done = [], torch.zeros(B, dtype=torch.bool, device=x.device)
    for step in range(max_new_tokens):
        next_ids = sample(language.lm_head(h), temperature, top_k, generator)  # [B]
        if eos_id is not None:
            next_ids = next_ids.masked_fill(done, eos_id)
            done |= next_ids == eos_id
        ids.append(next_ids)
        if done.all() or step + 1 == max_new_tokens:
            break
        h = language.hidden(language.embed_tokens(next_ids[:, None]), None, cache)[:, 0]
    return torch.stack(ids, dim=1) if ids else torch.empty(B, 0, dtype=torch.long, device=x.device)


# ----------------------------------------------------------------------------------------------------------------------
# Conversations: text to ids, and which ids count in the loss


def build_prompt(question, images=1, videos=0, template=None):
    """One turn in the published form, images and then videos in front unless the question places all of them itself, by
    <image> and <video>. One placeholder each: see expand_visuals.

    >>> build_prompt("What is this?").split("user\\n")[1]
    '<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\\n<|im_start|>assistant\\n'
    """
    t = template or Template()
    if not question.replace("<image>", "").replace("<video>", "").strip():
        raise ValueError("the prompt is empty: ask something, as in --prompt 'what colour is the circle?'")
    for what, count in (("image", images), ("video", videos)):
        placed = question.count(f"<{what}>")
        if placed not in (0, count):
            raise ValueError(f"the prompt has {placed} <{what}> placeholder(s) for {count} {what}(s): write one each, or none")
        if not placed and what == "image":
            question = "<image>" * count + question
        elif not placed:  # behind the images that were put in front, if there are any
            front = len("<image>") * (images if question.startswith("<image>" * images) else 0)
            question = question[:front] + "<video>" * count + question[front:]
    marked = {f"<{what}>": t.start + pad + t.end for what, pad in (("image", t.image), ("video", t.video))}
    return t.system + t.turn.format(re.sub("<image>|<video>", lambda found: marked[found[0]], question))


def expand_visuals(prompt, config, image_grid_thw=None, video_grid_thw=None):
    """Repeat each placeholder of a prompt once per visual token, since each of them needs a position of its own."""
    t, m = config.template, config.vision.merge
    for pad, grids in ((t.image, image_grid_thw), (t.video, video_grid_thw)):
        tokens = [] if grids is None else (grids.prod(1) // m**2).tolist()
        pieces = prompt.split(pad)
        if len(pieces) - 1 != len(tokens):
            raise ValueError(f"the prompt has {len(pieces) - 1} {pad} for {len(tokens)} grid(s)")
        prompt = pieces[0] + "".join(pad * n + piece for n, piece in zip(tokens, pieces[1:], strict=True))
    return prompt


def encode_turn(question, answer, encode, config, image_grid_thw=None, video_grid_thw=None):
    """A question about images and videos and its answer -> ids, labels (two lists of equal length). Only the answer and the
    end-of-turn token after it have labels: a model should learn to answer, not to ask. encode: text -> list of ids."""
    counts = (0 if grids is None else len(grids) for grids in (image_grid_thw, video_grid_thw))
    prompt = build_prompt(question, *counts, config.template)
    prompt = encode(expand_visuals(prompt, config, image_grid_thw, video_grid_thw))
    reply = encode(answer) + [config.eos_token_id]
    return prompt + reply, [IGNORE_INDEX] * len(prompt) + reply


def pad_rows(rows, value, left=False):
    """Lists of ids of different length -> (tensor [B,T] padded with value, mask [B,T]; True = real token)."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), value), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row), True
    return ids, mask


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to patches, exactly as the published processor does


def load_image(path):
    """Open an image file as RGB, the way a person sees it: EXIF rotation applied, 16 bits scaled to 8, first frame of
    an animation. Raises ValueError in one line when it cannot."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # decodes the whole file, so a truncated one is found here
    except FileNotFoundError:
        raise ValueError(f"no such image: {path}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, DecompressionBombError, struct.error ...
        raise ValueError(f"{path} is not an image that Pillow can read ({error})") from None
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") alone would clip everything bright to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def load_video(path):
    """A folder of frames (in the order of their names) or an animated GIF -> (list of PIL images, seconds from one frame to
    the next). A folder says nothing about time: two frames a second are assumed, the published default."""
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise ValueError(f"{path} has no frames in it: a video is a folder of images, or an animated GIF")
        return [load_image(file) for file in files], 0.5
    load_image(path)  # whatever is wrong with the file or its first frame is said there
    frames, seconds = [], []
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                frames.append(frame.convert("RGB"))
                seconds.append((frame.info.get("duration") or 100) / 1000)  # none, or 0: a tenth, as browsers show it
    except Exception as error:  # see load_image; a file cut short is found in one of its later frames
        raise ValueError(f"{path} is broken behind frame {len(frames)} ({error}): save it again") from None
    return frames, sum(seconds) / len(seconds)


def preprocess(images, config):
    """Images and clips -> patches [N,patch_width] float32, grid_thw [n,3], equal to the published processor's.

    images: a list whose items are PIL images, or lists of PIL images of one size, which are clips; config: VisionConfig.
    Each is resized to a size of its own (smart_resize) and cut into patches in the order of patch_places. A patch spans
    two frames: an image is shown twice, and of an odd number of frames the last is. Raises ValueError for what is no image.
    """
    if not images:
        raise ValueError("preprocess needs at least one image or clip")
    P, m, patches, grids = config.patch_size, config.merge, [], []
    for item in images:
        clip = isinstance(item, (list, tuple))
        frames = [frame.convert("RGB") for frame in (item if clip else [item])]
        if not frames:
            raise ValueError("a clip of no frames: at least one is needed")
        for i, frame in enumerate(frames):
            if frame.size != frames[0].size:
                sizes = f"{frame.height} x {frame.width} pixels, frame 1 has {frames[0].height} x {frames[0].width}"
                raise ValueError(f"the frames of a clip must have one size: frame {i + 1} has {sizes}")
        t, h, w = image_grid(frames[0].height, frames[0].width, config, len(frames) if clip else None)
        frames = [frame.resize((w * P, h * P), Image.Resampling.BICUBIC) for frame in frames]
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.stack([np.asarray(frame) for frame in frames]).astype(np.float64) * (1 / 255)).astype(np.float32)
        pixels = torch.from_numpy((pixels - np.float32(config.mean)) / np.float32(config.std))  # [F,H,W,3]
        repeats = t * config.frames - len(frames)
        pixels = torch.cat([pixels, pixels[-1:].expand(repeats, -1, -1, -1)])
        blocks = pixels.view(t, config.frames, h // m, m, P, w // m, m, P, 3)
        # which token, which patch of it | colour, frame, and place within the patch
        patches.append(blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, config.patch_width))
        grids.append((t, h, w))
    return torch.cat(patches), torch.tensor(grids)


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

VISION_NAMES = {  # published name -> ours; {} is the number of the layer; .weight and .bias follow by themselves
    "patch_embed.proj": "patch_embedding",
    "blocks.{}.norm1": "blocks.{}.ln_1",
    "blocks.{}.attn.qkv": "blocks.{}.attn.qkv",  # three in one, see our_tensors
    "blocks.{}.attn.proj": "blocks.{}.attn.out_proj",
    "blocks.{}.norm2": "blocks.{}.ln_2",
    "blocks.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "blocks.{}.mlp.gate_proj": "blocks.{}.mlp.gate_proj",  # Qwen2.5-VL
    "blocks.{}.mlp.up_proj": "blocks.{}.mlp.up_proj",
    "blocks.{}.mlp.down_proj": "blocks.{}.mlp.down_proj",
}
MERGER_NAMES = {"ln_q": "ln_q", "mlp.{}": "mlp.{}"}
LANGUAGE_NAMES = {  # our names are LLaMA's own
    "embed_tokens": "embed_tokens",
    "layers.{}.input_layernorm": "layers.{}.input_layernorm",
    "layers.{}.self_attn.q_proj": "layers.{}.self_attn.q_proj",
    "layers.{}.self_attn.k_proj": "layers.{}.self_attn.k_proj",
    "layers.{}.self_attn.v_proj": "layers.{}.self_attn.v_proj",
    "layers.{}.self_attn.o_proj": "layers.{}.self_attn.o_proj",
    "layers.{}.post_attention_layernorm": "layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate_proj": "layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up_proj": "layers.{}.mlp.up_proj",
    "layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
    "norm": "norm",
}

TOWERS = [  # (published prefix, our prefix, table), tried in this order; the layout has been renamed once on the hub
    ("visual.merger.", "merger.", MERGER_NAMES),
    ("visual.", "vision.", VISION_NAMES),
    ("model.visual.merger.", "merger.", MERGER_NAMES),
    ("model.visual.", "vision.", VISION_NAMES),
    ("model.language_model.", "language.", LANGUAGE_NAMES),
    ("model.", "language.", LANGUAGE_NAMES),
    ("", "language.", {"lm_head": "lm_head"}),
]
LEFT_OUT = [r"\.rotary_emb\.inv_freq$", r"\.rotary_pos_emb\.inv_freq$"]  # buffers that older files carry; computed here


def read_json(file):
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: --weights needs a folder in the Hugging Face layout") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from None


def read_config(folder):
    return read_json(Path(folder) / "config.json")


def replace_published(default, published, names):
    """A config with the fields that a published one (a dict) also has; names: our field -> theirs."""
    found = {ours: published[theirs] for ours, theirs in names.items() if theirs in published}
    if found.get("activation", "gelu") not in ACTIVATIONS:
        raise ValueError(f"unknown activation {found['activation']!r}; known: {', '.join(ACTIVATIONS)}")
    return replace(default, **found)


def image_config_from_published(vision, folder):
    """VisionConfig with what preprocessor_config.json (and for clips video_preprocessor_config.json) says of sizes and
    normalising, where the folder has them."""
    for prefix, name in (("", "preprocessor_config.json"), ("video_", "video_preprocessor_config.json")):
        file = Path(folder) / name
        if not file.is_file():
            continue
        raw = read_json(file)
        size, changes = raw.get("size") or {}, {}
        for which, other in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            found = raw.get(which) or size.get(which) or size.get(other)
            changes |= {prefix + which: found} if found else {}
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            changes |= {ours: tuple(raw[theirs])} if theirs in raw else {}
        for ours, theirs in (("patch_size", "patch_size"), ("merge", "merge_size"), ("frames", "temporal_patch_size")):
            if raw.get(theirs, getattr(vision, ours)) != getattr(vision, ours):
                raise ValueError(f"{file} says {theirs} {raw[theirs]}, config.json {getattr(vision, ours)}")
        vision = replace(vision, **changes)
    return vision


def config_from_published(raw, folder):
    """The published config.json (a dict) -> Qwen2VLConfig. Fields it leaves out have the published classes' defaults. Older
    files have the fields of the language model at the top, newer ones under text_config."""
    if raw.get("model_type") not in ("qwen2_vl", "qwen2_5_vl"):
        raise ValueError(f"{folder} holds a {raw.get('model_type')!r} checkpoint; qwen2vl.py reads 'qwen2_vl' and 'qwen2_5_vl'")
    newer = raw["model_type"] == "qwen2_5_vl"
    text, published_vision = raw.get("text_config") or raw, raw.get("vision_config") or {}
    names = dict(layers="depth", heads="num_heads", patch_size="patch_size", merge="spatial_merge_size")
    names |= dict(frames="temporal_patch_size", activation="hidden_act")
    if newer:
        default = replace(TOWER_2_5, width=3584)  # the published class's own, which no checkpoint has
        names |= dict(width="hidden_size", mlp_width="intermediate_size", window_size="window_size", full_layers="fullatt_block_indexes")
        names.pop("activation")
        if published_vision.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{folder}: a gated tower with {published_vision['hidden_act']!r}; qwen2vl.py knows 'silu'")
    else:
        default = VisionConfig()
        names |= dict(width="embed_dim")
    vision = replace_published(default, published_vision, names)
    vision = replace(vision, full_layers=tuple(vision.full_layers))
    if not newer:
        vision = replace(vision, mlp_width=int(vision.width * published_vision.get("mlp_ratio", 4)))
    heads = text.get("num_attention_heads", 64)
    # null, as older files have it, means that no two heads share their keys
    text = text | {"num_key_value_heads": text.get("num_key_value_heads", 8) or heads}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
        raise ValueError(f"{folder} scales its rotary positions ({rope}), which qwen2vl.py does not")
    if text.get("use_sliding_window"):
        raise ValueError(f"{folder} has a sliding window in its language model, which qwen2vl.py does not")
    biggest = dict(vocab_size=152064, width=8192, layers=80, heads=64, kv_heads=8, mlp_width=29568)
    language = replace_published(
        LanguageConfig(**biggest, norm_eps=1e-5),  # what the published text config means by silence
        {"rope_theta": 1e6, "mrope_section": (16, 24, 24)} | rope | text,
        dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", mlp_width="intermediate_size")
        | dict(kv_heads="num_key_value_heads", vocab_size="vocab_size", context="max_position_embeddings")
        | dict(norm_eps="rms_norm_eps", rope_base="rope_theta", mrope_sections="mrope_section"),
    )
    language = replace(
        language,
        mrope_sections=tuple(language.mrope_sections),
        tie_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )
    out = published_vision.get("out_hidden_size" if newer else "hidden_size", 3584)
    if out != language.width:
        raise ValueError(f"{folder}: the vision tower ends in {out} numbers, the language model has {language.width}")
    eos = raw.get("eos_token_id", text.get("eos_token_id", 151645))
    return Qwen2VLConfig(
        image_config_from_published(vision, folder),
        language,
        image_token_id=raw.get("image_token_id", 151655),
        video_token_id=raw.get("video_token_id", 151656),
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        tokens_per_second=published_vision.get("tokens_per_second", 4) if newer else 0,
    )


def our_name(published):
    """Name of a tensor in a published file -> name of our parameter, or None if there is no such thing here."""
    for prefix, ours, table in TOWERS:
        if not published.startswith(prefix):
            continue
        rest = published[len(prefix) :]
        layer = re.search(r"(?<=\.)\d+(?=\.)", rest)
        template = re.sub(r"(?<=\.)\d+(?=\.)", "{}", rest, count=1)
        stem, _, kind = template.rpartition(".")
        for name, ending in ((template, ""), (stem, "." + kind)):
            if name in table and ending in ("", ".weight", ".bias"):
                return ours + table[name].format(layer[0] if layer else "") + ending
    return None


def our_tensors(published, tensor):
    """A tensor of a published file -> [(name of our parameter, its tensor)]. One matrix there holds query, key and value of
    the tower; and what is a convolution there is a linear map here."""
    name = our_name(published)
    if name and ".attn.qkv." in name:
        return [(name.replace("qkv", f"{part}_proj"), x) for part, x in zip("qkv", tensor.chunk(3), strict=True)]
    return [(name, tensor.flatten(1) if tensor.ndim == 5 else tensor)]


def checkpoint_folder(path):
    """A local folder as it is; a hub id ("openai/clip-vit-base-patch32") is downloaded first. Raises ValueError."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) or Path(path).exists():
        raise ValueError(f"no such folder: {path} (a folder in the Hugging Face layout, or a hub id such as NAME/MODEL)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{path} is no folder here, and fetching hub ids needs: pip install tokenizers safetensors") from None
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # no network, no such repository, no permission: the hub's own first line says which
        raise ValueError(f"{path} is no folder here, and the hub gave: {str(error).strip().splitlines()[0]}") from None


def checkpoint_files(folder):
    """The safetensors files of a checkpoint: the shards its index names, or the single file."""
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (Path(folder) / name).is_file():
            raise ValueError(f"{Path(folder) / name} is missing: --weights needs config.json and *.safetensors")
    return [Path(folder) / name for name in names]


def materialise(model, dtype, device):
    """Give a model made on the meta device memory, not yet values. Two names for one parameter (tied embeddings) stay two
    names for one, which torch's own to_empty would undo."""
    made = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(p) not in made:
                made[id(p)] = nn.Parameter(torch.empty_like(p, dtype=dtype, device=device))
            setattr(module, name, made[id(p)])


@torch.no_grad()
def load_checkpoint(model, folder, dtype, device):
    """Fill a model made on the meta device, tensor by tensor: peak memory stays near one copy of the weights.

    Strict. A tensor that is missing, unknown (and not in LEFT_OUT), of another shape, or there twice with different
    values raises ValueError with its name: a checkpoint that loads half-way would still run, and be quietly wrong.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise ValueError("reading checkpoints needs: pip install safetensors tokenizers") from None
    materialise(model, dtype, device)
    parameters, filled = dict(model.named_parameters(remove_duplicate=False)), set()
    for file in checkpoint_files(folder):
        try:
            reader = safe_open(file, framework="pt")
        except Exception as error:  # safetensors has an exception class of its own for a broken header
            raise ValueError(f"{file} is no complete safetensors file ({error}): download it again") from None
        with reader:
            for key in reader.keys():
                if any(re.search(pattern, key) for pattern in LEFT_OUT):
                    continue
                for name, tensor in our_tensors(key, reader.get_tensor(key)):
                    if name not in parameters:
                        raise ValueError(f"{file}: unknown tensor {key!r}: not a checkpoint of this architecture?")
                    parameter = parameters[name]
                    if tensor.squeeze().shape == parameter.squeeze().shape:
                        tensor = tensor.reshape(parameter.shape)  # axes of length one come and go: [], [1], [1,1]
                    if tensor.shape != parameter.shape:
                        shapes = f"{list(tensor.shape)}, config.json asks for {list(parameter.shape)}"
                        raise ValueError(f"{file}: {key!r} has shape {shapes}")
                    if id(parameter) in filled and not torch.equal(parameter, tensor.to(parameter)):
                        raise ValueError(f"{file}: {key!r} should equal the tensor it is tied to, and does not")
                    parameter.copy_(tensor)
                    filled.add(id(parameter))
    missing = sorted(name for name, parameter in parameters.items() if id(parameter) not in filled)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is the one for {missing[0]!r}")
    return model.eval()


def load_tokenizer(folder):
    """The checkpoint's own tokenizer.json, through the `tokenizers` package."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("published tokenizers need: pip install tokenizers") from None
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: --weights needs the checkpoint's tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a tokenizer ({error})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Anatomy: everything that follows from the shapes alone, on the meta device (a 17B model takes seconds and no memory)


def find_preset(name):
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def describe(module, indent=0):
    """The modules of a model as lines of text: name, shape of the weight, parameters; a stack of blocks is shown once."""
    lines = []
    for name, parameter in module.named_parameters(recurse=False):
        lines.append((f"{'  ' * indent}{name}", " x ".join(map(str, parameter.shape)) or "scalar", parameter.numel()))
    for name, child in module.named_children():
        if not count_parameters(child):
            continue
        if isinstance(child, nn.ModuleList):
            lines.append((f"{'  ' * indent}{name} x {len(child)}", "", count_parameters(child)))
            lines += describe(child[0], indent + 1)
        elif not list(child.children()) and hasattr(child, "weight"):
            shape = " x ".join(map(str, child.weight.shape))
            bias = " + bias" if getattr(child, "bias", None) is not None else ""
            lines.append((f"{'  ' * indent}{name}", shape + bias, count_parameters(child)))
        else:
            lines.append((f"{'  ' * indent}{name}", "", count_parameters(child)))
            lines += describe(child, indent + 1)
    return lines


def table(lines):
    width = max(len(name) for name, _, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{shape:<26}{number:>18,}" for name, shape, number in lines)


def count_flops(run):
    """Floating-point operations of run() on the meta device: matrix products, convolutions, attention; 2 per multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def anatomy(name):
    """Modules, shapes, what trains in which stage, visual tokens, FLOPs and KV-cache bytes of a preset, as text."""
    config = find_preset(name)
    with torch.device("meta"):
        model = Qwen2VL(config)
    v, c, words = config.vision, config.language, 64
    total, cache = count_parameters(model), 2 * c.layers * c.kv_heads * c.head_width  # numbers per token in the cache
    stages = []
    for stage in (1, 2, 3):
        trained = sum(p.numel() for p in freeze(model, stage))
        stages.append(f"stage {stage}: {trained:,} trained ({100 * trained / total:.1f} %), {total - trained:,} frozen")
    rows = []
    for across, down in ((8, 8), (16, 8), (16, 16), (46, 17)):  # in tokens of the decoder
        height, width = down * v.factor, across * v.factor
        grid = torch.tensor([image_grid(height, width, v)])
        tokens = num_image_tokens(height, width, config)
        patches = torch.empty(int(grid.prod()), v.patch_width, device="meta")
        prompt = torch.empty(1, tokens + words, c.width, device="meta")
        flops = count_flops(lambda p=patches, g=grid: model.encode_image(p, g)), count_flops(lambda p=prompt: model.language.hidden(p))
        rows.append(f"{height:>6} x {width:<6}{tokens:>8,}{flops[0]:>22,}{flops[1]:>22,}{2 * cache * tokens:>18,}")
    of_windows = f", windows of {v.window_size} pixels but in layers {', '.join(map(str, v.full_layers))}" if v.window_size else ""
    return "\n".join(
        [
            f"{name}: {total:,} parameters, any resolution from {v.min_pixels:,} to {v.max_pixels:,} pixels{of_windows}",
            "",
            table(describe(model)),
            "",
            *stages,
            "",
            f"  an image of    tokens  FLOPs to encode it {f'... to read it with {words} words':>32}   KV cache, bytes",
            *rows,
            f"{2 * (count_parameters(model.language) - c.vocab_size * c.width * (not c.tie_embeddings)):,} FLOPs for each new word,"
            " but for its attention",
            f"KV cache: {2 * cache:,} bytes a token in 16 bits; a token is {v.factor} x {v.factor} pixels, of a clip {v.frames} frames too",
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_trace():
    """The shapes through one forward pass of the tiny model, with random weights."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    model, grid = Qwen2VL(config), torch.tensor([[1, 8, 8], [1, 4, 12]])
    ids = torch.randint(0, 400, (2, 22))
    ids[0, 4:20] = ids[1, 6:18] = config.image_token_id
    with torch.no_grad(), trace() as t:
        model(ids, torch.randn(64 + 48, config.vision.patch_width), grid)
    return f"tiny, random weights, 2 rows of 22 tokens: an image of 64 x 64 pixels in one, of 32 x 96 in the other\n\n{t}"


def show_mask():
    """Who may look at whom, drawn from the same rule that the attention kernels follow."""
    grid = torch.tensor([[1, 2, 2], [2, 2, 2]])
    frame_of = patch_places(grid, 2)[0]
    window_of = window_segments(patch_places(torch.tensor([[1, 4, 4]]), 2), replace(TOWER_2_5, window_size=28))
    padded = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0]])
    return "\n\n".join(
        [
            "rows look at columns; # may, . may not",
            "vision tower, one packed row: an image of 2 x 2 patches, a clip of two frame pairs of 2 x 2\n"
            + draw_mask(12, 12, q_segments=frame_of, k_segments=frame_of),
            "Qwen2.5-VL's windows, here of 2 x 2 patches in an image of 4 x 4; in 4 of 32 layers all see all\n"
            + draw_mask(16, 16, q_segments=window_of, k_segments=window_of),
            "decoder: causal over words and image tokens alike, here 2 words, 4 tokens, 2 words\n" + draw_mask(8, 8, causal=True),
            "decoder, a row with 2 tokens of padding on the left\n"
            + draw_mask(8, 8, causal=True, q_segments=padded, k_segments=padded),
            "decoder with a KV cache: 2 new tokens after 6 cached ones\n" + draw_mask(2, 8, causal=True),
        ]
    )


def read_visuals(images, videos, config):
    """PIL images, and videos as [(frames, seconds between them)] -> the keyword arguments of forward and generate."""
    given = {}
    if images:
        given["patches"], given["grid_thw"] = preprocess(images, config)
    if videos:
        given["video_patches"], given["video_grid_thw"] = preprocess([frames for frames, _ in videos], config)
        given["seconds"] = [config.frames * between for _, between in videos]
    return given


def question_ids(question, given, encode, config, room=1):
    """One question about what read_visuals gave -> ids. Raises ValueError when the context has no room for an answer."""
    grids = given.get("grid_thw"), given.get("video_grid_thw")
    prompt = build_prompt(question, *(0 if grid is None else len(grid) for grid in grids), config.template)
    ids = encode(expand_visuals(prompt, config, *grids))
    if len(ids) + room > config.language.context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the context holds {config.language.context}: shorten it")
    return ids


def answer(model, images, videos, question, encode, decode, max_new_tokens=32):
    """One question about images and videos (see read_visuals) -> the model's answer as text."""
    device, config = model.language.norm.weight.device, model.config
    given = read_visuals(images, videos, config.vision)
    ids = torch.tensor([question_ids(question, given, encode, config)], device=device)
    room = config.language.context - ids.shape[1]
    given |= {name: given[name].to(device) for name in ("patches", "video_patches") if name in given}
    new = model.generate(ids, **given, max_new_tokens=min(max_new_tokens, room), eos_id=config.eos_token_id)[0].tolist()
    return decode([i for i in new if i != config.eos_token_id]).strip()


def run_weights(args):
    """--weights DIR --image FILE --video FOLDER --prompt TEXT: a published checkpoint answers about your own images."""
    if not args.prompt:
        raise ValueError("--weights needs --prompt, as in --weights DIR --image photo.jpg --prompt 'What is unusual here?'")
    images, videos = [load_image(path) for path in args.image], [load_video(path) for path in args.video]
    for question in args.prompt:
        build_prompt(question, len(images), len(videos))  # a placeholder too many is found before gigabytes are read
    folder = checkpoint_folder(args.weights)
    config = config_from_published(read_config(folder), folder)  # so is a checkpoint of another family
    given, tokenizer = read_visuals(images, videos, config.vision), load_tokenizer(folder)  # and an impossible shape

    def encode(text):
        return tokenizer.encode(text).ids

    for question in args.prompt:
        question_ids(question, given, encode, config)  # and a prompt too long
    model = Qwen2VL.from_pretrained(folder, getattr(torch, args.dtype), check_device(args.device))
    for question in args.prompt:
        print(answer(model, images, videos, question, encode, tokenizer.decode))


def cut_picture(image, config, scale):
    """The image as the tower gets it, `scale` times as large, with a line around every token of the decoder."""
    _, rows, columns = image_grid(image.height, image.width, config)
    image = image.resize((columns * config.patch_size, rows * config.patch_size), Image.Resampling.BICUBIC)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, side = ImageDraw.Draw(image), config.factor * scale
    for x in range(0, image.width, side):
        for y in range(0, image.height, side):
            pen.rectangle((x, y, x + side - 1, y + side - 1), outline="#ff8800")
    return image


def draw_resolutions(rows, file, config, wide=280, tall=240):
    """PNG: rows of (image, text) cut into tokens; the same picture at more and more pixels, and what is read there."""
    page = Image.new("RGB", (max(map(len, rows)) * wide, len(rows) * tall), "white")
    pen = ImageDraw.Draw(page)
    for y, row in enumerate(rows):
        for x, (image, text) in enumerate(row):
            _, h, w = image_grid(image.height, image.width, config)
            cut = cut_picture(image, config, max(1, 180 // (max(h, w) * config.patch_size)))
            page.paste(cut, (x * wide + 8, y * tall + 8))
            pen.multiline_text((x * wide + 8, y * tall + 16 + cut.height), text, fill="black", spacing=4)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file)


def demo(args):
    """Train the toy Qwen2-VL in front of the reader if it is not cached, then show it pictures of sizes it never saw."""
    import train_tiny as tiny

    device, config = check_device(args.device), PRESETS["tiny"]
    images, videos = [load_image(path) for path in args.image], [load_video(path) for path in args.video]
    asked = [tiny.qwen_scene(tiny.rng_for("qwen demo", i), [size], "test") for i, size in enumerate(tiny.NEW_CANVASES)]
    own = images or videos
    pictures = images if own else [asked[0][0]]  # what the reader's questions are about
    given = read_visuals(pictures, videos, config.vision)  # wrong input is found before the training
    for question in args.prompt or [tiny.DESCRIBE]:
        question_ids(question, given, tiny.encode, config, room=16)  # what the longest answers of the toy world take
    image, turns = asked[0]
    t, h, w = image_grid(image.height, image.width, config.vision)
    print(f"In goes a picture as it is, {image.height} x {image.width} pixels: {h} x {w} patches, merged {config.vision.merge} x"
          f" {config.vision.merge} to {num_image_tokens(image.height, image.width, config)} tokens, and a question:\n"
          f"    {build_prompt(turns[0][0], 1, 0, config.template)!r}")  # fmt: skip
    untrained = tiny.untrained_qwen(args.device)
    print(f"before training it says: {', '.join(repr(text[:24]) for text in tiny.qwen_answers(untrained, asked[:3]))}")
    model = tiny.demo_qwen(args.device)
    if own or args.prompt:
        for question in args.prompt or [tiny.DESCRIBE]:
            print(f"{question} -> {answer(model.to(device), pictures, videos, question, tiny.encode, tiny.decode)}")
        return
    print("\nafter training, about pictures of sizes and shapes it was never trained on:")
    for (picture, turns), text in zip(asked, tiny.qwen_answers(model, asked), strict=True):
        verdict = "right" if text == turns[0][1] else f"wrong, it is {turns[0][1]}"
        size = f"{picture.height} x {picture.width}"
        print(f"    {size:>8} = {num_image_tokens(picture.height, picture.width, config):>2} tokens: {turns[0][0]} -> {text} ({verdict})")
    many = [tiny.qwen_scene(tiny.rng_for("qwen demo, many", i), tiny.NEW_CANVASES, "test") for i in range(200)]
    chance = tiny.guess([(None, *turns[0]) for _, turns in many])
    print(f"of 200 more questions {tiny.qwen_accuracy(model, many):.0%} are answered rightly (guessing: {chance:.0%})")
    films = [tiny.qwen_movie(tiny.rng_for("qwen demo, movie", i), frames) for i, frames in enumerate((2, 6, 12, 16))]
    for (frames, turns), text in zip(films, tiny.qwen_answers(model, films), strict=True):
        verdict = "right" if text == turns[0][1] else f"wrong, it is {turns[0][1]}"
        print(f"    a movie of {len(frames):>2} frames: {turns[0][0]} -> {text} ({verdict})")
    if not tiny.recipe_is_done("qwen2vl", tiny.QWEN_STEPS):
        print("(this model had part of the training; python train_tiny.py qwen2vl gives it all, and the demo then shows that one)")
    rows = []
    scene, number = asked[3], tiny.qwen_number(tiny.rng_for("qwen demo, number"), tiny.TOKENS[-1])
    print("\nthe same picture with fewer and with more pixels, which is fewer and more tokens:")
    for (picture, turns), budgets in ((number, tiny.TOKENS), (scene, (2, 6, 12))):  # at most so many tokens
        shrunk = [(tiny.shrink(picture, tokens), turns) for tokens in budgets]
        rows.append([])
        for (small, _), text in zip(shrunk, tiny.qwen_answers(model, shrunk), strict=True):
            size = f"{small.height} x {small.width} pixels, {num_image_tokens(small.height, small.width, config)} tokens"
            rows[-1].append((small, f"{size}\n{turns[0][0]}\n{text}" + ("" if text == turns[0][1] else f" (it is {turns[0][1]})")))
            print(f"    {size:>26}: {turns[0][0]} -> {text}" + ("" if text == turns[0][1] else f" (wrong, it is {turns[0][1]})"))
    file = tiny.RUNS / "qwen2vl" / "demo.png"
    draw_resolutions(rows, file, config.vision)
    print(f"written: {file} (two pictures cut into their tokens, at three resolutions each)")


class CommandLine(argparse.ArgumentParser):
    """argparse, except that a mistake costs one line and exit status 2, not a page of usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def command_line(description):
    """The options that every family file has."""
    parser = CommandLine(description=description)
    parser.add_argument("--demo", action="store_true", help="train the toy model if it is not cached, then show what it does")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="your own image (may be repeated)")
    parser.add_argument("--video", action="append", default=[], metavar="PATH", help="a folder of frames, or an animated GIF")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to ask about it")
    parser.add_argument("--weights", metavar="DIR_OR_HUB_ID", help="a published checkpoint in the Hugging Face layout")
    parser.add_argument("--anatomy", nargs="?", const="tiny", metavar="PRESET", help="modules, parameters, FLOPs of a preset")
    parser.add_argument("--trace", action="store_true", help="the shapes through one forward pass")
    parser.add_argument("--show-mask", action="store_true", help="who may look at whom")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="with --weights")
    return parser


def check_device(name):
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):  # torch's own message is a page about CUDA installations
        raise ValueError(f"device {name!r} is not available here; --device cpu always is") from None
    if device.type == "mps":
        print("note: mps has given wrong numbers in some releases of torch; compare with --device cpu", file=sys.stderr)
    return device


def run(args):
    """What the command line asks for; bad input is a ValueError with one clear line."""
    if args.anatomy:
        print(anatomy(args.anatomy))
    elif args.trace:
        print(show_trace())
    elif args.show_mask:
        print(show_mask())
    elif args.weights:
        run_weights(args)
    elif args.demo:
        demo(args)
    else:
        raise ValueError("nothing to do; try --demo, --trace, --show-mask or --anatomy (--help lists the options)")


def main(argv=None):
    parser = command_line(__doc__.strip().splitlines()[0])
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped\n")


if __name__ == "__main__":
    sys.modules.setdefault("qwen2vl", sys.modules[__name__])  # train_tiny imports qwen2vl: let it find this very module
    main()
