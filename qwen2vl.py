"""
Qwen2-VL and Qwen2.5-VL: images and videos of any size, read at their own resolution.

    Qwen2-VL    Wang et al. 2024, Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution,
                arXiv 2409.12191
    Qwen2.5-VL  Bai et al. 2025, Qwen2.5-VL Technical Report, arXiv 2502.13923

The idea. LLaVA resizes every image to one square of 336 pixels: a receipt becomes unreadable, a stamp is enlarged. Here
an image keeps its size and shape, and the number of its tokens grows with its area. Three things make this work. The
vision encoder has no table of learned positions: a patch is located by rotation (RoPE-2D). Images of all sizes are
packed into one row of patches, where attention stays within an image, so nothing is padded. And the decoder has
positions in three dimensions, time, row and column (M-RoPE): they describe what lies beside what, and a long video
does not use up the positions that the decoder was trained with.

    images and clips (any sizes)            "<|vision_start|><|image_pad|>...<|vision_end|>What does the receipt say?"
      | smart_resize: multiples of 28       | token ids; <|image_pad|> is repeated once per visual token
      | 14 x 14 x 2 frames per patch      ids [B,T], grid_thw [n,3]
    patches [N,1176], grid_thw [n,3]        |                     | rope_index
      | linear map, RoPE-2D                 | embedding table   positions [3,B,T]
      | blocks: attention within a          |                     | mrope
      | frame (Qwen2.5-VL: a window)        |                   cosines and sines for all layers
    [N,Dv]                                  |                     |
      | merger: LayerNorm, 2 x 2 patches joined, MLP              |
    [N/4,D] --- replace the <|image_pad|> embeddings --->  [B,T,D]
                                            | Qwen2 blocks: causal; RMSNorm, M-RoPE, SwiGLU
                                          logits [B,T,V] -> "41.50"

Three stages (paper 2.2). The vision encoder learns alone from captioned images. Then everything learns together. Then
the encoder is locked, and the language model learns from conversations.

Qwen2.5-VL changes the encoder: RMSNorm, SwiGLU, and windows. A grid of squares of 112 pixels is laid over the image
from its upper left corner. In all but four layers a patch attends only within its square, so the cost of those layers
grows with the area of the image; in the four others it grows with the square of the area. And the decoder's time axis
counts seconds instead of frames.

Letters. B batch, T text length, n images and clips, N patches of all of them together, Dv and D widths of encoder and
decoder, H heads, K key/value heads, Dh head width, V vocabulary. A grid (t, h, w) counts the patches of one image or
clip: pairs of frames, rows, columns. An image has t = 1.

Three conventions on which code in this field disagrees
    RoPE    half-split pairing: dimension i turns with dimension i + Dh/2 (as LLaMA checkpoints on the hub are stored).
    masks   True means "may attend" or "real token".
    labels  have the same positions as ids; the shift by one happens in one place, language_loss.

Paper / published code / this file
    - Images and clips. Published code takes them as two lists. Here they are one, in the order of their placeholders.
    - Attention over a clip. The paper has 3-D convolutions that "process 3D tubes". In the published code two frames
      meet in a patch, and that is all: every pair of frames is a segment of its own in the encoder's attention.
    - After a clip. Text continues behind the largest position of the three axes (paper 2.1, original code, this file).
      The classes in transformers 5.23 ignore the time axis there: text after a long clip shares positions with its end.
      Their generate, after a prompt that ends in an image, counts on from its last token; their forward does not.
    - The merger. The paper calls it a simple MLP. Published code normalises each patch, then joins four and maps them,
      and so does this file. Its training stage is not in the paper: it is a part of the encoder there (visual.merger),
      so here it trains and is locked with the encoder.
    - Length of clips. The paper reads two frames a second and shrinks them until a clip has at most 16384 tokens (2.1).
      Here every frame given is read, up to 768 tokens for two of them: give a few frames of a long video only.
    - Windows. Published code reorders the patches so that windows are contiguous. Here a window is a segment, like a
      frame, and Packing sorts either.
    - Frames are resized one by one by Pillow, as images are; the published video path uses torchvision.
    "Published" in a docstring names the class or function of transformers, models/qwen2_vl and qwen2_5_vl.

What to try: --demo, then your own images, tall ones and wide ones; --anatomy qwen2.5-vl-7b; --show-mask; set mrope to
False and ask about long videos; python train_tiny.py qwen2vl --ablations.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: its threads spin 0.2 ms when they wait, not 10

import json
import math
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from kernels import Rule, apply_rope, attention, mrope, rope_2d

IGNORE_INDEX = -100  # a label that does not count; cross_entropy's own default

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class VisionConfig:  # Qwen2-VL's
    patch_size: int = 14
    frames: int = 2  # share a patch; an image fills both
    merge: int = 2  # merge x merge patches become one token of the decoder
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    norm_eps: float = 1e-6
    gated: bool = False  # Qwen2.5-VL: RMSNorm and SwiGLU as in the decoder, for LayerNorm and a plain MLP
    window_size: int = 0  # in pixels; Qwen2.5-VL: 112, that is 8 x 8 patches. 0: attention within the whole frame
    full_layers: tuple = ()  # these layers attend within the whole frame in spite of a window
    min_pixels: int = 56 * 56  # of an image after smart_resize
    max_pixels: int = 16384 * 28 * 28
    video_min_pixels: int = 128 * 28 * 28  # of a frame of a clip
    video_max_pixels: int = 768 * 28 * 28
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the pixels CLIP was trained on
    std: tuple = (0.26862954, 0.26130258, 0.27577711)

    @property
    def factor(self):
        return self.patch_size * self.merge  # pixels along the side of one token of the decoder: 28

    @property
    def patch_width(self):
        return 3 * self.frames * self.patch_size**2  # numbers in one patch: 1176


@dataclass(frozen=True)
class LanguageConfig:  # Qwen2-72B, the published class's defaults
    vocab_size: int = 152064
    width: int = 8192
    layers: int = 80
    heads: int = 64
    kv_heads: int = 8  # fewer than heads: grouped-query attention
    mlp_width: int = 29568
    context: int = 32768
    norm_eps: float = 1e-5
    rope_base: float = 1000000.0
    mrope_sections: tuple = (16, 24, 24)  # frequencies of a head that turn with time, row, column; the fast ones first
    tie_embeddings: bool = False

    @property
    def head_width(self):
        return self.width // self.heads


@dataclass(frozen=True)
class Template:  # how a question is written
    system: str = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turn: str = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
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
    eos_token_ids: tuple = (151645, 151643)  # <|im_end|>, <|endoftext|>
    tokens_per_second: int = 0  # positions a second of a clip takes (Qwen2.5-VL); 0: each pair of frames takes one
    mrope: bool = True  # an ablation: False numbers all tokens one after another, whatever they are


VISION_2_5 = VisionConfig(gated=True, mlp_width=3420, window_size=112, full_layers=(7, 15, 23, 31))
QWEN_2B = LanguageConfig(
    151936, width=1536, layers=28, heads=12, kv_heads=2, mlp_width=8960, norm_eps=1e-6, tie_embeddings=True
)
QWEN_3B = replace(QWEN_2B, width=2048, layers=36, heads=16, mlp_width=11008, context=128000)
QWEN_7B = LanguageConfig(width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944, norm_eps=1e-6)

PRESETS = {
    # what train_tiny.py trains in front of you, from the toy CLIP's blocks and a toy language model
    "tiny": Qwen2VLConfig(
        VisionConfig(
            patch_size=8, width=96, layers=4, heads=4, mlp_width=384, min_pixels=16 * 16, max_pixels=128 * 128,
            video_min_pixels=16 * 16, video_max_pixels=128 * 128, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        ),
        LanguageConfig(
            512, width=96, layers=3, heads=2, kv_heads=1, mlp_width=256, context=512, norm_eps=1e-6, rope_base=10000.0,
            mrope_sections=(8, 8, 8), tie_embeddings=True,
        ),
        Template(system="", turn="{} ASSISTANT:", image="<image>", video="<video>", start="<boi>", end="<eoi>"),
        image_token_id=499,
        video_token_id=500,
        eos_token_ids=(498,),
    ),
    "qwen2-vl-2b": Qwen2VLConfig(language=QWEN_2B),
    "qwen2-vl-7b": Qwen2VLConfig(language=QWEN_7B),
    "qwen2.5-vl-3b": Qwen2VLConfig(VISION_2_5, QWEN_3B, tokens_per_second=2),
    "qwen2.5-vl-7b": Qwen2VLConfig(VISION_2_5, replace(QWEN_7B, context=128000), tokens_per_second=2),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Sizes: from pixels to patches to tokens


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """The size to which an image is resized: multiples of factor on both sides, between min_pixels and max_pixels in
    all, with nearly the same shape. Beyond 200:1 no multiple of factor is near the shape. Published: smart_resize.

    >>> smart_resize(480, 641, 28, 56 * 56, 16384 * 28 * 28)
    (476, 644)
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {height} x {width} pixels is more than 200 times as long as it is wide: crop it")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def image_grid(height, width, config, frames=None):
    """(t, h, w): pairs of frames, rows and columns of patches of an image of height x width pixels, or of a clip if the
    number of its frames is given. config: VisionConfig."""
    c = config
    if frames is None:
        t = 1
        height, width = smart_resize(height, width, c.factor, c.min_pixels, c.max_pixels)
    else:
        t = math.ceil(frames / c.frames)
        height, width = smart_resize(height, width, c.factor, c.video_min_pixels, c.video_max_pixels)
    return t, height // c.patch_size, width // c.patch_size


def num_image_tokens(height, width, config, frames=None):
    """Tokens the decoder reads for one image of height x width pixels, or for a clip of so many frames.
    480 x 640 is resized to 476 x 644, that is 34 x 46 patches, 17 x 23 = 391 tokens. config: Qwen2VLConfig."""
    t, h, w = image_grid(height, width, config.vision, frames)
    return t * h * w // config.vision.merge**2


# ----------------------------------------------------------------------------------------------------------------------
# One packed row: where patches stand, and which of them attend to each other


def patch_places(grid_thw, merge):
    """Where each patch of the packed row stands -> [3,N]: number of its frame pair, counted through all images and
    clips, its row, its column. The four patches that the merger joins follow each other (merge = 2):

        a grid of 2 x 4 patches     0 1 4 5      numbers in the packed row; 0 1 2 3 become the first token
                                    2 3 6 7
    """
    places, before = [], 0
    for t, h, w in grid_thw.tolist():
        frame = torch.arange(before, before + t, device=grid_thw.device)
        row = torch.arange(h, device=grid_thw.device)
        column = torch.arange(w, device=grid_thw.device)
        place = torch.stack(torch.meshgrid(frame, row, column, indexing="ij"))  # [3,t,h,w]
        place = place.unflatten(3, (-1, merge)).unflatten(2, (-1, merge))  # [3,t,h/merge,merge,w/merge,merge]
        places.append(place.transpose(3, 4).flatten(1))  # [3,t*h*w]
        before += t
    return torch.cat(places, dim=1)


def window_segments(places, config):
    """Number of the window in which each patch stands, [N]. Windows of Qwen2.5-VL are cut from the upper left corner of
    a frame, 112 pixels or 8 x 8 patches each; what is left over at the right and at the bottom is smaller."""
    side = config.window_size // config.factor * config.merge  # in patches; no token is cut in two
    frame, row, column = places
    down = int(row.max()) // side + 1  # windows from top to bottom of the tallest frame here,
    across = int(column.max()) // side + 1  # and from left to right of the widest: no two windows share a number
    return (frame * down + row // side) * across + column // side


class Packing:
    """Attention within the segments of a packed row, at the cost of the sum of their squares.

    One call of `attention` with q_segments and k_segments gives the same, but on a CPU it also computes the scores
    between segments, only to mask them. So the patches are sorted by the length of their segment, and the m segments of
    length n become a batch [m,n]. The only loop is over the different lengths: one for images of one size.
    """

    def __init__(self, segments, device):
        sizes = segments.bincount()  # patches in each segment
        order = (sizes[segments] * len(sizes) + segments).argsort(stable=True)  # by length of segment, then by segment
        self.order = order.to(device)
        self.back = order.argsort().to(device)
        lengths, counts = sizes[sizes > 0].unique(return_counts=True)
        self.shapes = list(zip(counts.tolist(), lengths.tolist(), strict=True))  # (m, n) of each batch

    def attend(self, q, k, v):
        """q, k, v [N,H,Dh] -> [N,H,Dh]."""
        q, k, v = q[self.order], k[self.order], v[self.order]
        sizes = [m * n for m, n in self.shapes]
        batches = zip(self.shapes, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        outputs = []
        for (m, n), q, k, v in batches:
            q = q.unflatten(0, (m, n)).transpose(1, 2)  # [m,H,n,Dh]
            k = k.unflatten(0, (m, n)).transpose(1, 2)
            v = v.unflatten(0, (m, n)).transpose(1, 2)
            o = attention(q, k, v).transpose(1, 2)  # [m,n,H,Dh]
            outputs.append(o.flatten(0, 1))
        return torch.cat(outputs)[self.back]


# ----------------------------------------------------------------------------------------------------------------------
# Vision encoder


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)  # Hendrycks & Gimpel 2016, the sigmoid approximation of GELU


class MLP(nn.Module):
    def __init__(self, width, mlp_width):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x):
        return self.fc2(quick_gelu(self.fc1(x)))


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
    It has no biases in the decoder, and biases in Qwen2.5-VL's vision encoder."""

    def __init__(self, width, mlp_width, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width, bias=bias)
        self.up_proj = nn.Linear(width, mlp_width, bias=bias)
        self.down_proj = nn.Linear(mlp_width, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionAttention(nn.Module):
    """Multi-head self-attention within the segments of a packed row x [N,Dv]. Published: VisionAttention."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x, rotation, packing):
        q = self.q_proj(x).unflatten(1, (self.heads, -1))  # [N,H,Dh]
        k = self.k_proj(x).unflatten(1, (self.heads, -1))
        v = self.v_proj(x).unflatten(1, (self.heads, -1))
        q, k = apply_rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], rotation)  # [1,H,N,Dh]
        o = packing.attend(q[0].transpose(0, 1), k[0].transpose(0, 1), v)  # [N,H,Dh]
        return self.out_proj(o.flatten(1))


class VisionBlock(nn.Module):
    """Pre-norm transformer block: the residual stream x is only ever added to. Published: Qwen2VLVisionBlock."""

    def __init__(self, config):
        super().__init__()
        norm = RMSNorm if config.gated else nn.LayerNorm
        self.ln_1 = norm(config.width, eps=config.norm_eps)
        self.attn = VisionAttention(config)
        self.ln_2 = norm(config.width, eps=config.norm_eps)
        if config.gated:
            self.mlp = SwiGLU(config.width, config.mlp_width, bias=True)
        else:
            self.mlp = MLP(config.width, config.mlp_width)

    def forward(self, x, rotation, packing):
        x = x + self.attn(self.ln_1(x), rotation, packing)
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """ViT for any resolution (paper 2.1): forward(patches [N,patch_width], grid_thw [n,3]) -> [N,Dv].

    All images and clips are packed into one row. Rows and columns turn the queries and keys (RoPE-2D). Time does not:
    pairs of frames do not attend to each other, and the decoder's positions put them in order.
    Published: Qwen2VisionTransformerPretrainedModel.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # The paper's 3-D convolution has a stride equal to its kernel: it is a linear map applied to every patch.
        self.patch_embedding = nn.Linear(config.patch_width, config.width, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))

    def forward(self, patches, grid_thw):
        c = self.config
        places = patch_places(grid_thw.cpu(), c.merge)  # [3,N]
        if len(patches) != places.shape[1]:
            raise ValueError(f"{len(patches)} patches, but the grids {grid_thw.tolist()} need {places.shape[1]}")
        x = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))  # [N,Dv]
        rotation = rope_2d(places[1:, None].to(x.device), c.width // c.heads)  # cosines and sines, for all layers
        frames = Packing(places[0], x.device)
        windows = Packing(window_segments(places, c), x.device) if c.window_size else frames
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, frames if i in c.full_layers else windows)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Connector


class Merger(nn.Module):
    """Patch features [N,Dv] -> word-like vectors [N/4,D]. The features of 2 x 2 patches, which follow each other in the
    row, are joined to one vector and mapped by an MLP: a quarter of the tokens, and no feature is dropped.
    Published: PatchMerger."""

    def __init__(self, config):
        super().__init__()
        Dv, D = config.vision.width, config.language.width
        self.joined = config.vision.merge**2 * Dv
        norm = RMSNorm if config.vision.gated else nn.LayerNorm
        self.ln_q = norm(Dv, eps=config.vision.norm_eps)
        self.mlp = nn.Sequential(nn.Linear(self.joined, self.joined), nn.GELU(), nn.Linear(self.joined, D))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.joined))


# ----------------------------------------------------------------------------------------------------------------------
# Language model: Qwen2


class Cache:
    """Keys and values of all layers, so that a new token costs one token's work: `length` of `capacity` are filled."""

    def __init__(self, config, B, capacity, like):
        shape = (config.layers, B, config.kv_heads, capacity, config.head_width)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
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

    def forward(self, x, rotation, rule, cache=None, layer=0):
        B, T, _ = x.shape
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,T,Dh]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # [B,K,T,Dh]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        q, k = apply_rope(q, k, rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        o = attention(q, k, v, rule)  # [B,H,T,Dh]; rule: which query attends to which key, see kernels.attention
        return self.o_proj(o.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(self, x, rotation, rule, cache=None, layer=0):
        x = x + self.self_attn(self.input_layernorm(x), rotation, rule, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Qwen2 (Yang et al. 2024, arXiv 2407.10671) with positions in three dimensions. Published: Qwen2VLTextModel."""

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
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # 2 * layers of these add up in the residual
                nn.init.normal_(parameter, std=config.width**-0.5 / math.sqrt(2 * config.layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.width**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # small, so that the first loss is ln V: nothing is preferred

    def hidden(self, x, positions, mask=None, cache=None):
        """Embeddings x [B,T,D] of new tokens, behind those in the cache -> hidden states [B,T,D] after the last norm.

        positions [3,B,T] of the new tokens: see rope_index. mask [B,length+T] covers the cached tokens too.
        """
        c = self.config
        T = x.shape[1]
        past = 0 if cache is None else cache.length
        if past + T > c.context:
            raise ValueError(f"{past + T} tokens (text and image) do not fit the context of {c.context}")
        rule = Rule(causal=True)
        if mask is not None:
            segments = mask.int() - 1  # 0 for a real token, -1 for padding, to which nothing attends
            rule = Rule(causal=True, q_segments=segments[:, past:], k_segments=segments)
        rotation = mrope(positions, c.head_width, c.mrope_sections, c.rope_base)  # cosines and sines, for all layers
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, rule, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    @torch.no_grad()
    def generate(
        self, x, positions, mask=None, max_new_tokens=64, temperature=0.0, top_k=None, eos_id=None, generator=None
    ):
        """Continue prompts, given as embeddings x [B,T,D] at positions [3,B,T] and padded on the left -> new ids [B,n].

        The prompt runs once, then one token at a time against the cached keys and values. eos_id: an id, or several.
        Once a row contains one of them, the rest of it is filled with the first. Raises ValueError for wrong options.
        """
        B, T, _ = x.shape
        if not temperature >= 0 or max_new_tokens < 0 or (top_k is not None and top_k < 1):
            options = f"temperature={temperature}, max_new_tokens={max_new_tokens}, top_k={top_k}"
            raise ValueError(f"{options}: the first two cannot be negative, and top_k must be at least 1")
        if mask is not None and not mask[:, -1].all():
            raise ValueError("prompts are padded on the left: the new tokens stand behind the last column")
        # under torch.autocast keys and values have the dtype of a linear map's output, which is not that of x
        cache = Cache(self.config, B, T + max_new_tokens, like=self.lm_head(x[:, :0]))
        ends = torch.as_tensor([] if eos_id is None else eos_id, dtype=torch.long, device=x.device).view(-1)
        new = torch.empty(B, 0, dtype=torch.long, device=x.device)
        done = torch.zeros(B, dtype=torch.bool, device=x.device)
        while new.shape[1] < max_new_tokens and not done.all():
            h = self.hidden(x, positions, mask, cache)[:, -1]  # [B,D]
            next_ids = sample(self.lm_head(h), temperature, top_k, generator)  # [B]
            if len(ends):
                next_ids = next_ids.masked_fill(done, ends[0])
                done |= torch.isin(next_ids, ends)
            new = torch.cat([new, next_ids[:, None]], dim=1)
            x = self.embed_tokens(next_ids[:, None])  # [B,1,D]
            largest = positions.amax((0, 2), keepdim=True)  # [1,B,1], of all axes: a new word stands behind it on each
            positions = largest.expand(3, -1, -1) + 1
            mask = None if mask is None else F.pad(mask, (0, 1), value=True)
        return new


def sample(logits, temperature, top_k, generator=None):
    """logits [B,V] -> next ids [B]. Temperature 0 takes the most likely; top_k draws among the k most likely only."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    logits = (logits - logits.amax(-1, keepdim=True)).float()  # at most 0: no temperature, however small, overflows
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Positions


def find_visuals(ids, config, mask=None):
    """bool [B,T]: which ids are tokens of an image or a clip. Padding is none, whatever its id."""
    visual = (ids == config.image_token_id) | (ids == config.video_token_id)
    return visual if mask is None else visual & mask.bool()


def check_visuals(ids, visual, grid_thw, config):
    """Raises ValueError unless visual [B,T] marks the tokens of the grids, those of each one side by side."""
    m = config.vision.merge
    grids = [] if grid_thw is None else grid_thw.tolist()
    sizes = [t * (h // m) * (w // m) for t, h, w in grids]
    if visual.sum() != sum(sizes):
        raise ValueError(f"{int(visual.sum())} visual tokens in the ids, but the grids {grids} need {sum(sizes)}")
    places = visual.nonzero().tolist()  # [row, column] of each token
    start = 0
    for i, size in enumerate(sizes):
        row, column = places[start]
        if places[start + size - 1] != [row, column + size - 1]:
            raise ValueError(f"the {size} tokens of grid {i + 1} do not stand side by side in one row of the ids")
        if grids[i][0] > 1 and ids[row, column] == config.image_token_id:
            raise ValueError(f"grid {i + 1} is that of a clip, {grids[i]}, but the ids have an image there")
        start += size


def rope_index(ids, config, grid_thw=None, mask=None, seconds=None):
    """Where each token stands in time, row and column -> positions [3,B,T] (paper 2.1, M-RoPE).

    ids [B,T] with placeholders, grid_thw [n,3] in patches, mask [B,T] (True = real token), config: Qwen2VLConfig.
    seconds: of each image or clip, from one of its frames to the next (None: 0.5). Qwen2.5-VL's time axis counts them.
    Raises ValueError if ids and grids do not fit. Published: get_rope_index.

    Text moves all three axes by one a token, so that for text alone this is RoPE-1D. An image does not move in time;
    its tokens differ in row and column, both counted from where the image begins:

        a b [image of 2 x 2 tokens] c       time     0 1  2 2 2 2  4
                                            row      0 1  2 2 3 3  4
                                            column   0 1  2 3 2 3  4

    The text behind continues at the largest position of any axis, plus one. With less, some word would share a position
    with a part of the image. So an image takes max(rows, columns) positions, not rows x columns: the 391 tokens of a
    photo take 23, and a long document full of images stays within the positions that the decoder was trained with.

        [image of 1 x 3] a                  time     0 0 0  3       an image at the very start stands at 0
                                            row      0 0 0  3
                                            column   0 1 2  3

    A clip moves in time as well, one step for each pair of frames. Four frames of 2 x 2 tokens are two steps, and take
    2 positions, the largest of 2 steps, 2 rows and 2 columns:

        a [clip, 2 steps] b                 time     0  1 1 1 1 2 2 2 2  3
                                            row      0  1 1 2 2 1 1 2 2  3
                                            column   0  1 2 1 2 1 2 1 2  3

    (With tokens_per_second 2 and 0.5 seconds a frame, time would be 1 1 1 1 3 3 3 3, and b at 4.) Padding moves nothing
    and stands at 0:

        . . a b    time, row, column   0 0 0 1
    """
    m = config.vision.merge
    visual = find_visuals(ids, config, mask)  # [B,T]
    check_visuals(ids, visual, grid_thw, config)
    within = torch.zeros(3, *ids.shape, dtype=torch.long, device=ids.device)  # where a token stands in its image
    advance = torch.ones_like(ids)  # by how much a token moves those behind it
    if mask is not None:
        advance = advance * mask
    if grid_thw is not None and config.mrope:
        places, moves = [], []
        for i, (t, h, w) in enumerate(grid_thw.tolist()):
            time = torch.arange(t)
            if config.tokens_per_second:
                step = config.vision.frames * (0.5 if seconds is None else float(seconds[i]))
                time = (time * (config.tokens_per_second * step)).long()
            axes = torch.meshgrid(time, torch.arange(h // m), torch.arange(w // m), indexing="ij")
            place = torch.stack(axes).flatten(1)  # [3, tokens of this image]
            move = torch.zeros_like(place[0])
            move[-1] = place.max() + 1  # the last token of an image moves what follows, the others do not
            places.append(place)
            moves.append(move)
        within[:, visual] = torch.cat(places, dim=1).to(ids.device)
        advance[visual] = torch.cat(moves).to(ids.device)
    start = advance.cumsum(1) - advance  # [B,T]: how far all tokens before this one have moved it
    positions = within + start
    return positions if mask is None else positions * mask


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Qwen2VL(nn.Module):
    """Vision encoder, merger and language model. Published: Qwen2VLForConditionalGeneration, and the same for 2.5.

    Arguments of forward and generate: ids [B,T] with one image_token_id or video_token_id per visual token. patches
    [N,patch_width] and grid_thw [n,3], as preprocess gives them, of all images and clips of all rows, in the order of
    their placeholders. mask [B,T]: True = real token. seconds [n]: see rope_index.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.merger = Merger(config)
        self.language = LanguageModel(config.language)

    def image_tokens(self, patches, grid_thw):
        """patches [N,patch_width] of n images and clips -> what the decoder reads for all of them, [N/4,D]."""
        return self.merger(self.vision(patches, grid_thw))

    def embed(self, ids, image_tokens=None, mask=None):
        """ids [B,T] with a placeholder for each of image_tokens [N/4,D] -> embeddings [B,T,D]. Image tokens are used up
        in the order of their placeholders, row by row. Raises ValueError if the counts differ."""
        is_visual = find_visuals(ids, self.config, mask)  # [B,T]
        x = self.language.embed_tokens(ids)
        image_tokens = x[0, :0] if image_tokens is None else image_tokens
        if is_visual.sum() != len(image_tokens):
            raise ValueError(f"{int(is_visual.sum())} visual tokens in the ids, but {len(image_tokens)} were encoded")
        x = x.clone()
        x[is_visual] = image_tokens.to(x.dtype)
        return x

    def forward(self, ids, patches=None, grid_thw=None, mask=None, seconds=None):
        """-> logits [B,T,V]."""
        positions = rope_index(ids, self.config, grid_thw, mask, seconds)
        x = self.embed(ids, None if patches is None else self.image_tokens(patches, grid_thw), mask)
        return self.language.lm_head(self.language.hidden(x, positions, mask))

    @torch.no_grad()
    def generate(self, ids, patches=None, grid_thw=None, mask=None, seconds=None, **options):
        """Continue each row of ids [B,T], padded on the left -> new ids [B,n]. Images are encoded once. options: see
        LanguageModel.generate."""
        if not ids.numel():
            raise ValueError(f"nothing to continue: the ids have the shape {list(ids.shape)}")
        positions = rope_index(ids, self.config, grid_thw, mask, seconds)
        x = self.embed(ids, None if patches is None else self.image_tokens(patches, grid_thw), mask)
        return self.language.generate(x, positions, mask, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """A published Qwen2-VL or Qwen2.5-VL: a folder in the Hugging Face layout or of train_tiny.py, or a hub id."""
        folder = checkpoint_folder(path)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config_from_folder(folder))
        return load_weights(model, folder, dtype, device).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Training: what moves, and what is counted


TRAINED = {  # stage -> how the names of the parameters begin that train in it (paper 2.2)
    1: ("vision.", "merger."),
    2: ("vision.", "merger.", "language."),
    3: ("language.",),
}


def freeze(model, stage):
    """Set what trains in a stage and return it. Stage 1 learns from captions, 2 from all data, 3 from conversations."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[stage]))
    return [p for p in model.parameters() if p.requires_grad]


def language_loss(logits, labels):
    """Next-token cross-entropy: logits [B,T,V] at position t predict labels [B,T] at t + 1. -> loss, metrics.

    Labels of IGNORE_INDEX do not count. Before training the loss is about ln V: every word is equally likely.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORE_INDEX
    if not counted.any():
        raise ValueError("no label to learn from: every position is IGNORE_INDEX (were the answers cut off?)")
    logits, labels = logits[counted].float(), labels[counted]  # [counted,V]
    return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(-1) == labels).float().mean()}


# ----------------------------------------------------------------------------------------------------------------------
# Conversations: text to ids, and which ids count in the loss


def kinds_of(images):
    """The kind of each item: a list of frames is a video."""
    return ["video" if isinstance(item, (list, tuple)) else "image" for item in images]


def place_visuals(question, kinds):
    """Where images and clips stand in a question -> the question with a placeholder for each, their numbers in order.

    kinds: "image" or "video" for each of them, in any order. By <image> a question places all images, by <video> all
    clips; a kind that it does not place stands in front. Raises ValueError if it places too many or too few.

    >>> place_visuals("What is new in <image>?", ["image", "video"])
    ('<video>What is new in <image>?', [1, 0])
    """
    placed = re.findall("<(image|video)>", question)
    for kind in ("image", "video"):
        there, shown = placed.count(kind), kinds.count(kind)
        if there not in (0, shown):
            raise ValueError(f"the prompt has {there} <{kind}> for {shown} {kind}(s): write one each, or none")
    front = [kind for kind in kinds if kind not in placed]
    order = []
    for wanted in front + placed:
        order.append(next(i for i, kind in enumerate(kinds) if kind == wanted and i not in order))
    return "".join(f"<{kind}>" for kind in front) + question, order


def build_prompt(question, kinds=("image",), template=Template()):
    """The published template for one turn. kinds: see place_visuals. One placeholder each: see expand_visuals.

    >>> build_prompt("What is this?").split("user\\n")[1]
    '<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\\n<|im_start|>assistant\\n'
    """
    t = template
    question, _ = place_visuals(question, kinds)
    published = {"<image>": t.start + t.image + t.end, "<video>": t.start + t.video + t.end}
    question = re.sub("<image>|<video>", lambda placed: published[placed[0]], question)
    return t.system + t.turn.format(question)


def expand_visuals(prompt, config, grid_thw=None):
    """Repeat each placeholder of a prompt once per visual token, since each of them needs a position of its own.
    grid_thw [n,3] in the order of the placeholders. Raises ValueError if there are more of them, or fewer."""
    t = config.template
    tokens = [] if grid_thw is None else (grid_thw.prod(1) // config.vision.merge**2).tolist()
    placeholder = f"({re.escape(t.image)}|{re.escape(t.video)})"
    pieces = re.split(placeholder, prompt)  # text, placeholder, text, placeholder, text
    if len(pieces) // 2 != len(tokens):
        raise ValueError(f"the prompt has {len(pieces) // 2} placeholders for {len(tokens)} images and clips")
    for i, count in enumerate(tokens):
        pieces[2 * i + 1] *= count
    return "".join(pieces)


def encode_turn(question, answer, encode, config, kinds=(), grid_thw=None):
    """A question and its answer -> ids, labels (two lists of equal length). Only the answer and the end-of-turn token
    after it have labels: a model should learn to answer, not to ask. encode: text -> list of ids."""
    prompt = encode(expand_visuals(build_prompt(question, kinds, config.template), config, grid_thw))
    reply = encode(answer) + [config.eos_token_ids[0]]
    return prompt + reply, [IGNORE_INDEX] * len(prompt) + reply


def pad_rows(rows, value, left=False):
    """Lists of ids of different length -> (tensor [B,T] padded with value, mask [B,T]; True = real token)."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), value), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row), True
    return ids, mask


def encode_question(question, images, encode, config, seconds=None):
    """A question about images and clips (see preprocess; seconds: see rope_index) -> the arguments of generate.

    It takes no model, so that a question can be refused before one is loaded or trained. Raises ValueError if the
    question places more or fewer images than there are, if an image is too long (200:1), or if the prompt leaves no
    room for an answer in the context.
    """
    _, order = place_visuals(question, kinds_of(images))
    images = [images[i] for i in order]
    if seconds is not None:
        seconds = [seconds[i] for i in order]
    patches, grid_thw = preprocess(images, config.vision) if images else (None, None)
    prompt = build_prompt(question, kinds_of(images), config.template)
    ids = torch.tensor([encode(expand_visuals(prompt, config, grid_thw))])
    if ids.shape[1] >= config.language.context:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, the context holds {config.language.context}")
    return dict(ids=ids, patches=patches, grid_thw=grid_thw, seconds=seconds)


def answer(model, images, question, encode, decode, max_new_tokens=32, seconds=None):
    """One question about some images and clips -> the model's answer as text. Arguments: see encode_question."""
    config, device = model.config, model.language.norm.weight.device
    inputs = encode_question(question, images, encode, config, seconds)
    inputs["ids"] = inputs["ids"].to(device)
    if images:
        inputs["patches"] = inputs["patches"].to(device)
    room = config.language.context - inputs["ids"].shape[1]
    new = model.generate(**inputs, max_new_tokens=min(max_new_tokens, room), eos_id=config.eos_token_ids)
    return decode([i for i in new[0].tolist() if i not in config.eos_token_ids]).strip()


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to patches, exactly as the published processor does


def preprocess(images, config):
    """Images and clips -> patches [N,patch_width] float32, grid_thw [n,3], equal to the published processor's.

    images: a list whose items are PIL images, or lists of PIL images of one size, which are clips. Each is resized to a
    size of its own (smart_resize) and cut into patches in the order of patch_places. A patch spans two frames: an image
    is repeated, and so is the last of an odd number of frames. config: VisionConfig. Raises ValueError for an image
    longer than 200:1, and for frames of different sizes.
    """
    P, m = config.patch_size, config.merge
    patches, grids = [], []
    for item, kind in zip(images, kinds_of(images), strict=True):
        frames = [frame.convert("RGB") for frame in (item if kind == "video" else [item])]
        if len({frame.size for frame in frames}) != 1:
            raise ValueError(f"the frames of a clip must have one size, not {[frame.size for frame in frames]}")
        width, height = frames[0].size
        t, h, w = image_grid(height, width, config, len(frames) if kind == "video" else None)
        frames = [frame.resize((w * P, h * P), Image.Resampling.BICUBIC) for frame in frames]
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.stack([np.asarray(frame) for frame in frames]).astype(np.float64) * (1 / 255)).astype(np.float32)
        pixels = torch.from_numpy((pixels - np.float32(config.mean)) / np.float32(config.std))  # [frames,H,W,3]
        missing = t * config.frames - len(frames)
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        pixels = pixels.view(t, config.frames, h // m, m, P, w // m, m, P, 3)
        # which token, which patch of it | colour, frame, and place within the patch
        patches.append(pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, config.patch_width))
        grids.append((t, h, w))
    return torch.cat(patches), torch.tensor(grids)


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

RENAMED = (  # published names to ours, as regular expressions, all applied in this order; Qwen2's own names are ours
    (r"^model\.visual\.", "visual."),  # the layout has been renamed once on the hub
    (r"^visual\.merger\.", "merger."),
    (r"^visual\.patch_embed\.proj\.", "vision.patch_embedding."),
    (r"^visual\.(blocks\.\d+)\.norm(\d)\.", r"vision.\1.ln_\2."),
    (r"^visual\.(blocks\.\d+)\.attn\.proj\.", r"vision.\1.attn.out_proj."),
    (r"^visual\.", "vision."),
    (r"^model\.(language_model\.)?", "language."),
    (r"^lm_head\.", "language.lm_head."),
)


def our_tensors(name, tensor):
    """A published tensor -> the pairs (our name, tensor) that it becomes."""
    if name.endswith("inv_freq"):
        return []  # a buffer of older files; computed here
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    if name == "vision.patch_embedding.weight":
        tensor = tensor.flatten(1)  # published as a 3-D convolution
    if ".attn.qkv." not in name:
        return [(name, tensor)]
    q, k, v = tensor.chunk(3)  # published as one matrix of three times the height
    return [(name.replace("qkv", "q_proj"), q), (name.replace("qkv", "k_proj"), k), (name.replace("qkv", "v_proj"), v)]


def checkpoint_folder(path):
    """A local folder as it is. A hub id such as "Qwen/Qwen2-VL-2B-Instruct" is downloaded first."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download  # pip install tokenizers safetensors huggingface_hub

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))


def config_from_folder(folder):
    """config.json -> our config. A folder of train_tiny.py has our own fields there, and the name of their class as
    model_type; any other one is a published checkpoint's."""
    tuples = lambda part: {name: tuple(v) if isinstance(v, list) else v for name, v in part.items()}  # JSON has none
    raw, tiny = json.loads((folder / "config.json").read_text(), object_hook=tuples), PRESETS["tiny"]
    if raw.pop("model_type", None) != type(tiny).__name__:
        return config_from_published(folder)
    parts = {name: replace(getattr(tiny, name), **part) for name, part in raw.items() if isinstance(part, dict)}
    return replace(tiny, **raw | parts)


def load_weights(model, folder, dtype, device):
    """Fill a model made on the meta device. Strict: load_state_dict raises RuntimeError, which names every tensor that
    is missing, unknown or of another shape."""
    from safetensors import safe_open  # pip install safetensors

    index = folder / "model.safetensors.index.json"  # which names the files if there are several
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    weights = {}
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as tensors:
            for published in tensors.keys():
                for name, tensor in our_tensors(published, tensors.get_tensor(published)):
                    weights[name] = nn.Parameter(tensor.to(device, dtype))
    names = dict(model.named_parameters(remove_duplicate=False))  # a tied matrix has two names, a file may use only one
    tied = {id(names[name]): weight for name, weight in weights.items() if name in names}
    weights = {name: tied[id(parameter)] for name, parameter in names.items() if id(parameter) in tied} | weights
    model.load_state_dict(weights, assign=True)
    return model


PATCH_FIELDS = dict(patch_size="patch_size", merge="spatial_merge_size", frames="temporal_patch_size")
VISION_FIELDS = PATCH_FIELDS | dict(layers="depth", heads="num_heads", width="embed_dim")
VISION_2_5_FIELDS = PATCH_FIELDS | dict(layers="depth", heads="num_heads", width="hidden_size")
VISION_2_5_FIELDS |= dict(mlp_width="intermediate_size", window_size="window_size", full_layers="fullatt_block_indexes")
LANGUAGE_FIELDS = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads")
LANGUAGE_FIELDS |= dict(kv_heads="num_key_value_heads", mlp_width="intermediate_size", vocab_size="vocab_size")
LANGUAGE_FIELDS |= dict(context="max_position_embeddings", norm_eps="rms_norm_eps", rope_base="rope_theta")
ENDS = dict(eos_token_ids="eos_token_id")  # all that is read of generation_config.json: answers are greedy


def part(published, name):
    """The dict under a name in a published config; empty where there is none, or null."""
    fields = {} if published.get(name) is None else published[name]
    if not isinstance(fields, dict):
        raise ValueError(f"{name} = {fields!r}: fields with names were expected")
    return fields


def read_json(file):
    return part({file.name: json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}}, file.name)


def processor_of(folder):
    """What a checkpoint says of pixels: transformers 5 writes it into processor_config.json, and reads that first."""
    nested = part(read_json(folder / "processor_config.json"), "image_processor")
    processor = nested or read_json(folder / "preprocessor_config.json")
    if not processor:
        warnings.warn(f"{folder} has no preprocessor_config.json: images are prepared as its family's first model did")
    return {name: bool(value) if name.startswith("do_") else value for name, value in processor.items()}  # null is off


def found(published, fields, default):
    """The fields of ours that a published config also has, as keyword arguments. A published null means the default.
    Raises ValueError for a value of another type than the default's."""
    values = {}
    for ours, theirs in fields.items():
        usual, value = getattr(default, ours), published.get(theirs)
        several = isinstance(usual, tuple)  # for which JSON has a list, or one value
        items = value if several and isinstance(value, list) else [value]
        if value is not None and {type(item) for item in items} <= {int, type(usual[0] if several else usual)}:
            values[ours] = tuple(items) if several else value
        elif value is not None:
            raise ValueError(f"{theirs} = {value!r}: a value like {usual!r} was expected")
    return values


def require(folder, published, **values):
    """Refuse a config field that changes results and that this file does not follow. A tuple: any of these values."""
    for name, value in values.items():
        known = value if isinstance(value, tuple) else (value,)
        if published.get(name) not in (None, *known):
            only = " and ".join(map(repr, known))
            raise ValueError(f"{folder} has {name} = {published[name]!r}; only {only} is implemented here")


def config_from_published(folder):
    """config.json and the processors' files -> Qwen2VLConfig. What they leave out has the published classes' defaults,
    which are those of the dataclasses. Older files have the language model's fields at the top, not in text_config."""
    raw = json.loads((folder / "config.json").read_text())
    kind = raw.get("model_type")
    if kind not in ("qwen2_vl", "qwen2_5_vl"):
        raise ValueError(f"{folder} has model_type = {kind!r}; only 'qwen2_vl' and 'qwen2_5_vl' are implemented here")
    tower, text = part(raw, "vision_config"), part(raw, "text_config") or raw
    require(folder, text, hidden_act="silu", use_sliding_window=False)
    rope = part(text, "rope_parameters") or part(text, "rope_scaling") or part(raw, "rope_scaling")
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
        raise ValueError(f"{folder} scales its rotary positions ({rope}), which qwen2vl.py does not")
    require(folder, part(tower, "rope_parameters"), rope_theta=10000.0, rope_type=("axial", "default"))
    language = LanguageConfig(
        **found(text | rope, LANGUAGE_FIELDS | dict(mrope_sections="mrope_section"), LanguageConfig),
        tie_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),  # it has stood in both
    )
    if text.get("num_key_value_heads", 8) is None:
        language = replace(language, kv_heads=language.heads)
    if kind == "qwen2_vl":
        require(folder, tower, hidden_act="quick_gelu", hidden_size=language.width)  # what the merger gives
        vision = VisionConfig(**found(tower, VISION_FIELDS, VisionConfig))
        ratio = found(tower, dict(mlp_width="mlp_ratio"), VisionConfig).get("mlp_width", 4)
        vision = replace(vision, mlp_width=ratio * vision.width)
    else:
        require(folder, tower, hidden_act="silu", out_hidden_size=language.width)
        tower = dict(hidden_size=3584, tokens_per_second=4) | tower  # defaults, which no checkpoint has
        vision = replace(VISION_2_5, **found(tower, VISION_2_5_FIELDS, VISION_2_5))
    ends = found(raw, ENDS, Qwen2VLConfig) | found(text, ENDS, Qwen2VLConfig)
    ends |= found(read_json(folder / "generation_config.json"), ENDS, Qwen2VLConfig)
    return Qwen2VLConfig(
        replace(vision, **pixels_from_published(folder, vision)),
        language,
        **found(raw, dict(image_token_id="image_token_id", video_token_id="video_token_id"), Qwen2VLConfig),
        **ends | (found(tower, dict(tokens_per_second="tokens_per_second"), Qwen2VLConfig) if vision.gated else {}),
    )


def pixels_from_published(folder, vision):
    """What the processors' own files say of sizes and normalising, as fields of VisionConfig. Refuses patches that are
    not those of vision, which is what config.json says."""
    image, nested = processor_of(folder), read_json(folder / "processor_config.json")
    video = part(nested, "video_processor") or read_json(folder / "video_preprocessor_config.json")
    fields = found(image, dict(mean="image_mean", std="image_std"), vision)
    colours = replace(vision, **fields)
    require(folder, video, image_mean=[*colours.mean], image_std=[*colours.std])
    for prefix, processor in (("", image), ("video_", video)):
        require(folder, processor, patch_size=vision.patch_size, merge_size=vision.merge)
        require(folder, processor, temporal_patch_size=vision.frames, resample=3, rescale_factor=1 / 255)  # 3: bicubic
        require(folder, processor, do_resize=True, do_rescale=True, do_normalize=True)
        size = part(processor, "size")  # the limits have stood there under two names, and beside it
        for limit, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            for published, name in ((size, edge), (size, limit), (processor, limit)):
                fields |= found(published, {prefix + limit: name}, vision)
    return fields


if __name__ == "__main__":
    from train_tiny import workbench

    workbench("qwen2vl")  # --demo, --image, --video, --prompt, --weights, --anatomy, --trace, --show-mask: see --help
