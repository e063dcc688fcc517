"""
Flamingo and IDEFICS: a frozen language model learns to look, through doors that start closed.

    Flamingo  Alayrac et al. 2022, a Visual Language Model for Few-Shot Learning, arXiv 2204.14198
    IDEFICS   Laurencon et al. 2023, arXiv 2306.16527: the open reproduction, on LLaMA and CLIP's ViT-H

The idea. A large language model learns a new task from a few examples in its context. To give that gift eyes without
breaking it, leave it frozen, and insert new layers between its layers: in each, words look at an image by
cross-attention, and what they see is added through a gate, tanh(alpha) with alpha = 0 at first. On the first day of
training the model is the language model, bit for bit; then the gates open as far as it pays (deep fusion, type A).

    image or video [F,3,H,W]                      "<image> dax<|endofchunk|><image> wug<|endofchunk|><image>"
      | vision tower, frozen                        | token ids [B,T], one <image> per image or video
    [F,N,Dv]                                        | embedding table, frozen but for the new tokens' rows
      | + time embedding of each frame            [B,T,D]
    [F*N,Dv]                                        |
      | PerceiverResampler: L learned latents       |        +- GATED XATTN-DENSE, new ------------------------+
      | look at all of it, a few times over         v        |  x = x + tanh(attn_gate) * cross_attn(x, latents)|
    [L,Dv] --- keys and values of every ------> before every |  x = x + tanh(ffw_gate)  * ffw(x)                |
               inserted layer                   n-th layer:  +--------------------------------------------------+
                                                    |  layer of the language model, frozen
                                                  logits [B,T,V] -> " dax"

A word looks at one image only, the last one before it, and knows of the earlier ones through the language model's own
self-attention (paper 2.3). So any number of images and videos may stand between the words, more than in training too.
Words before the first image look at nothing, and cross-attention gives them exactly zero.

    words            Look  <image>  a  dog  <image>  a  cat        rows are words, columns the latents of image 0 and 1
    segments           -1        0  0    0        1  1    1        which image a word looks at: cumsum(ids == <image>) - 1

                     . . . .
                     # # . .        that is the whole mask: the query's segment must equal the key's,
                     # # . .        attention(..., q_segments=[-1 0 0 0 1 1 1], k_segments=[0 0 1 1])
                     # # . .
                     . . # #
                     . . # #
                     . . # #

Axis letters, here and in all seven files: B batch, T text length, S joint length, N images or patches, P patch size,
D width, H heads, K key/value heads, Dh head width, L latents or queries, F frames, V vocabulary, E shared embedding
width. Two of them, H and W, are also an image's height and width: [B,3,H,W] is always pixels. Here Dv is the vision
tower's width, and M counts the images and videos of one row.

Three conventions on which code in this field disagrees
    RoPE    half-split pairing: dimension i turns with dimension i + Dh/2 (as LLaMA checkpoints on the hub are stored).
    masks   True means "may attend" or "real token".
    labels  have the same positions as ids; the shift by one happens in one place, language_loss.

Paper / published code / this file
    - The language model is Chinchilla in the paper, LLaMA in IDEFICS and here; the tower an NFNet, CLIP's ViT.
    - What an inserted layer is made of: the paper has LayerNorm and an MLP of 4 D; OpenFlamingo the same, with GELU;
      IDEFICS its decoder's own parts, RMSNorm and SwiGLU. FlamingoConfig.dense chooses.
    - IDEFICS normalises queries and keys per head (qk_norm), has one layer in four, and no time embeddings.
    - Words that see no image. Cross-attention gives them zero, but the inserted ffw runs on every word, here as in all
      published code. So what model(ids) says of text alone does change in training. The language model inside does not:
      model.language(ids) skips the inserted layers, and its logits of all words it knew stay, bit for bit. Only the new
      tokens' rows are new, and whoever asks for probabilities over the whole table sees them take their share.
    - <image> itself already looks at its image, as in IDEFICS and OpenFlamingo.
    - Documents. IDEFICS stops looking after an end-of-sequence token, for several documents in a row; here a row is one.
    - Time embeddings of more frames than in training are interpolated linearly, as the paper does from 8 to 30. IDEFICS has
      none: to it a video is a bag of frames. The toy is trained on images, so that its own are random but for the first.
    - A generated <image> opens no picture: the words after it go on looking where the prompt's last word looked.

What to try: --demo, and watch the gates open; --show-mask; gate="none" in the tiny preset (what is the first loss then?);
one latent instead of 4; subtract 1 in media_segments, so that every word looks at the wrong image (what can still be
learned?); train_tiny.py flamingo --ablations; a toy with videos (train_tiny.movie draws them).
"""

import argparse
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn

from kernels import apply_rope, attention, draw_mask, rope_1d

IGNORE_INDEX = -100  # a label that does not count; cross_entropy's own default

# ----------------------------------------------------------------------------------------------------------------------
# Configuration

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's own data


@dataclass(frozen=True)
class VisionConfig:
    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"  # see ACTIVATIONS
    norm_eps: float = 1e-5
    class_token: bool = True  # one more token, which gathers the image; SigLIP has none
    ln_pre: bool = True  # CLIP: a LayerNorm before the blocks, and patches without a bias. SigLIP, EVA: the other way
    resize: str = "crop"  # how an image becomes a square: "crop", "squash" or "pad", see preprocess
    mean: tuple = CLIP_MEAN
    std: tuple = CLIP_STD

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} is not divisible by {self.heads} heads")
        if self.image_size < self.patch_size:
            raise ValueError(f"image size {self.image_size} is smaller than a patch of {self.patch_size}")


@dataclass(frozen=True)
class LanguageConfig:
    vocab_size: int = 32064  # Vicuna's 32000, <image>, <pad>, and padding to a multiple of 64
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32  # fewer than heads: grouped-query attention (LLaMA-2-70B, not LLaVA-1.5)
    mlp_width: int = 11008  # 8/3 of the width: three matrices of SwiGLU cost what two of a 4x MLP do
    context: int = 4096
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"language width {self.width} is not divisible by {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads evenly")

    @property
    def head_width(self):
        return self.width // self.heads


@dataclass(frozen=True)
class ResamplerConfig:
    latents: int = 64  # what an image or a video of any length becomes
    layers: int = 6
    heads: int = 16
    head_width: int = 96
    mlp_width: int = 5120
    activation: str = "relu"  # IDEFICS; the paper squares it, OpenFlamingo has GELU
    norm_eps: float = 1e-5
    qk_norm: bool = True
    frames: int = 0  # learned time embeddings; 0: none, as in IDEFICS, which saw no videos


VIT_H = VisionConfig(224, 14, width=1280, layers=32, heads=16, mlp_width=5120, activation="gelu", resize="squash")
# LLaMA's 32000 words, and IDEFICS' two: <fake_token_around_image>, <image>
LLAMA_7B = LanguageConfig(32002, context=2048, norm_eps=1e-6)
LLAMA_65B = LanguageConfig(32002, width=8192, layers=80, heads=64, kv_heads=64, mlp_width=22016, context=2048)


@dataclass(frozen=True)
class FlamingoConfig:
    vision: VisionConfig = VIT_H
    language: LanguageConfig = LLAMA_7B
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    connector: str = "resampler"  # "mlp": every patch on its own, as LLaVA does; for comparison
    cross_every: int = 4  # an inserted layer before layers 0, 4, 8 ...
    gate: str = "scalar"  # one alpha per layer; "vector": one per channel; "none": ungated, for comparison
    dense: str = "swiglu"  # with RMSNorm, as in the decoder (IDEFICS); "gelu": LayerNorm and an MLP of 4 D (OpenFlamingo)
    qk_norm: bool = True
    image_token_id: int = 32001
    new_token_ids: tuple = (32000, 32001)  # tokens the language model did not know: their rows do train
    eos_token_id: int = 2

    def __post_init__(self):
        for name, known in (("connector", ("resampler", "mlp")), ("gate", ("scalar", "vector", "none")), ("dense", ("swiglu", "gelu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.cross_every < 1:
            raise ValueError(f"cross_every must be 1 or more, not {self.cross_every}")


PRESETS = {
    # what train_tiny.py trains in front of you, on the toy CLIP's vision tower and a toy language model
    "tiny": FlamingoConfig(
        VisionConfig(32, 8, width=96, layers=4, heads=4, mlp_width=384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        LanguageConfig(512, width=96, layers=3, heads=2, kv_heads=1, mlp_width=256, context=256, tie_embeddings=True),
        ResamplerConfig(latents=4, layers=1, heads=2, head_width=48, mlp_width=192, frames=8),
        cross_every=1,
        image_token_id=499,
        new_token_ids=(499, 507),
        eos_token_id=507,
    ),
    "idefics-9b": FlamingoConfig(),
    "idefics-80b": FlamingoConfig(language=LLAMA_65B),
}


def patch_grid(height, width, config):
    """(rows, columns) of whole patches in an image of height x width pixels, patch_size taken from config. A border narrower
    than a patch is dropped, as the convolution does. Raises ValueError when not even one patch fits."""
    rows, columns = height // config.patch_size, width // config.patch_size
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {height} x {width} pixels is smaller than one patch of {config.patch_size}")
    return rows, columns


def num_image_tokens(height, width, config):
    """Vectors the decoder can look at for one image of height x width pixels, or one video: the L latents, whatever the
    size (config: FlamingoConfig). In the row of words it takes up one place. With the "mlp" connector: one per patch,
    and the class token. The one place where this is computed."""
    rows, columns = patch_grid(height, width, config.vision)
    return config.resampler.latents if config.connector == "resampler" else rows * columns + int(config.vision.class_token)


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


# ----------------------------------------------------------------------------------------------------------------------
# Attention and block


class Attention(nn.Module):
    """Multi-head self-attention; who may look at whom is said by `causal` and `segments` (see kernels.attention)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False, segments=None):
        B, T, D = x.shape
        q, k, v = (  # each [B,H,T,Dh]
            proj(x).view(B, T, self.heads, -1).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = dict(causal=causal, q_segments=segments, k_segments=segments)
        if trace.active is not None and trace.active.maps:
            o, weights = attention(q, k, v, **mask, return_weights=True)
            note("attention weights", weights)
        else:
            o = attention(q, k, v, **mask)
        return self.out_proj(o.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm transformer block: the residual stream x is only ever added to."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)

    def forward(self, x, causal=False, segments=None):
        x = x + self.attn(self.ln_1(x), causal, segments)
        return x + self.mlp(self.ln_2(x))


def init_blocks(blocks, width):
    """Initial weights of a stack of blocks, after CLIP's own code: what writes to the residual stream starts smaller,
    by 1/sqrt(2 * layers), because that many terms are added up in it."""
    residual_std = width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in blocks:
        for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
        nn.init.normal_(block.mlp.fc2.weight, std=residual_std)
        for linear in (*block.attn.children(), *block.mlp.children()):
            nn.init.zeros_(linear.bias)


# ----------------------------------------------------------------------------------------------------------------------
# Vision tower


class VisionTower(nn.Module):
    """ViT (Dosovitskiy et al. 2021, arXiv 2010.11929): an image is a sentence of patches.

    forward(pixels [B,3,H,W], depth=None) -> [B,N(+1),D], the class token first; `depth` blocks are run (None: all).
    Any H and W that hold at least one patch: the learned positions are interpolated to the image's own grid.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P, grid = config.width, config.patch_size, config.image_size // config.patch_size
        # A convolution whose stride is its kernel is a linear map applied to every patch.
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=P, stride=P, bias=not config.ln_pre)
        self.position_embedding = nn.Embedding(grid * grid + int(config.class_token), D)
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        if config.ln_pre:
            self.ln_pre = nn.LayerNorm(D, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(D, eps=config.norm_eps)
        nn.init.normal_(self.position_embedding.weight, std=D**-0.5)
        init_blocks(self.blocks, D)

    def positions(self, rows, columns):
        """Position embeddings [N(+1),D] for a grid of rows x columns patches; bicubic when it is not the trained one
        (as CLIP did to go from 224 to 336 pixels)."""
        table = self.position_embedding.weight
        grid = self.config.image_size // self.config.patch_size
        if (rows, columns) == (grid, grid):
            return table
        extra = int(self.config.class_token)  # the class token has no place in the grid
        square = table[extra:].T.reshape(1, -1, grid, grid)
        resized = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([table[:extra], resized.flatten(2)[0].T])

    def forward(self, pixels, depth=None):
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B,3,H,W], got {list(pixels.shape)}")
        rows, columns = patch_grid(*pixels.shape[2:], self.config)
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # [B,D,rows,columns]
        positions = self.positions(rows, columns)
        x = note("vision.patches", x.flatten(2).transpose(1, 2))  # [B,N,D], patches in reading order
        if self.config.class_token:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [B,N+1,D]
        x = note("vision.patches + positions", x + positions)
        if self.config.ln_pre:
            x = self.ln_pre(x)
        for i, block in enumerate(self.blocks[:depth]):
            x = note(f"vision.blocks.{i}", block(x))
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Connector


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another; no biases.

    keys_values and forward are apart, so that what many words look at is projected once. qk_norm: None, or a function of
    the head width that makes a norm for queries and one for keys: dot products then cannot grow with the activations.
    """

    def __init__(self, width, context_width, heads, head_width, qk_norm=None):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, heads * head_width, bias=False)
        self.k_proj = nn.Linear(context_width, heads * head_width, bias=False)
        self.v_proj = nn.Linear(context_width, heads * head_width, bias=False)
        self.o_proj = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm, self.k_norm = (qk_norm(head_width), qk_norm(head_width)) if qk_norm else (None, None)

    def keys_values(self, context):
        """context [B,S,Dc], what is looked at -> k, v [B,H,S,Dh]."""
        B, S, _ = context.shape
        k, v = (proj(context).view(B, S, self.heads, -1).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        return (k if self.k_norm is None else self.k_norm(k)), v

    def forward(self, x, k, v, q_segments=None, k_segments=None):
        """x [B,T,D] looks at k, v [B,H,S,Dh] where the segments agree -> [B,T,D]; exactly 0 for who sees nothing."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, -1).transpose(1, 2)
        q = q if self.q_norm is None else self.q_norm(q)
        mask = dict(q_segments=q_segments, k_segments=k_segments)
        if trace.active is not None and trace.active.maps:
            o, weights = attention(q, k, v, **mask, return_weights=True)
            note("cross attention weights", weights)
        else:
            o = attention(q, k, v, **mask)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


class PerceiverLayer(nn.Module):
    """The latents look at the features and at themselves, in one attention (paper 2.1), then think; no gates."""

    def __init__(self, width, config):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=config.norm_eps)
        self.norm_media, self.norm_latents, self.norm_mlp = norm(width), norm(width), norm(width)
        self.attn = CrossAttention(width, width, config.heads, config.head_width, norm if config.qk_norm else None)
        self.fc1 = nn.Linear(width, config.mlp_width, bias=False)
        self.fc2 = nn.Linear(config.mlp_width, width, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, latents, x, q_segments=None, k_segments=None):
        q = self.norm_latents(latents)
        k, v = self.attn.keys_values(torch.cat([self.norm_media(x), q], dim=1))
        latents = latents + self.attn(q, k, v, q_segments, k_segments)
        return latents + self.fc2(self.activation(self.fc1(self.norm_mlp(latents))))


class PerceiverResampler(nn.Module):
    """Features of an image or a video, of any size and length -> always L latents (paper 2.1).

    forward(x [n,F,N,Dv], frame_mask [n,F] or None; True = real frame) -> [n,L,Dv]. Cost and memory grow with F * N, not
    with its square, since only the L latents ask.
    """

    def __init__(self, width, config):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.time_embeddings = nn.Parameter(torch.randn(config.frames, width)) if config.frames else None
        self.layers = nn.ModuleList(PerceiverLayer(width, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def times(self, frame_mask):
        """Time embeddings [n,F,Dv] of the real frames in frame_mask [n,F]: the i-th has the i-th. A video of more frames
        than the table has rows is spread over all of it, linearly interpolated."""
        table, last = self.time_embeddings, len(self.time_embeddings) - 1
        count, rank = frame_mask.sum(1, keepdim=True), (frame_mask.cumsum(1) - 1).clamp(min=0)
        place = torch.where(count > last + 1, rank * last / (count - 1).clamp(min=1), rank.float())
        low = place.long().clamp(max=last)
        return torch.lerp(table[low], table[(low + 1).clamp(max=last)], (place - low).unsqueeze(-1).to(table.dtype))

    def forward(self, x, frame_mask=None):
        n, frames, N, _ = x.shape
        L = len(self.latents)
        if self.time_embeddings is not None:
            real = x.new_ones(n, frames, dtype=torch.bool) if frame_mask is None else frame_mask
            x = x + self.times(real)[:, :, None]  # all patches of a frame get the frame's time
        x = x.flatten(1, 2)  # [n,F*N,Dv]: time and space in one row
        segments = ()
        if frame_mask is not None:  # nobody looks at a padding frame
            keys = (frame_mask.int() - 1).repeat_interleave(N, dim=1)
            segments = (keys.new_zeros(n, L), F.pad(keys, (0, L)))
        latents = self.latents.expand(n, L, -1)
        for layer in self.layers:
            latents = layer(latents, x, *segments)
        return self.norm(latents)


# ----------------------------------------------------------------------------------------------------------------------
# Language model


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
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202): an MLP whose hidden units are gated by others."""

    def __init__(self, width, mlp_width):
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width, bias=False)
        self.up_proj = nn.Linear(width, mlp_width, bias=False)
        self.down_proj = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        D, Dh = config.width, config.head_width
        self.q_proj = nn.Linear(D, config.heads * Dh, bias=False)
        self.k_proj = nn.Linear(D, config.kv_heads * Dh, bias=False)
        self.v_proj = nn.Linear(D, config.kv_heads * Dh, bias=False)
        self.o_proj = nn.Linear(config.heads * Dh, D, bias=False)

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
    """LLaMA (Touvron et al. 2023, arXiv 2302.13971), the decoder under Vicuna.

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

    def hidden(self, x, mask=None, cache=None, look=None):
        """Embeddings x [B,T,D] of new tokens (and their mask) -> hidden states [B,T,D] after the last norm.

        With a cache, the tokens in it come first. Positions count real tokens only, so padding shifts nothing.
        look(i, x) -> x, if given, is applied before layer i: the place of Flamingo's inserted blocks.
        """
        B, T, _ = x.shape
        past = 0 if cache is None else cache.length
        if past + T > self.config.context:
            raise ValueError(f"{past + T} tokens (text and image) do not fit the context of {self.config.context}")
        q_segments = k_segments = None
        positions = torch.arange(past, past + T, device=x.device).expand(B, T)
        if cache is not None and cache.segments is not None and mask is None:
            mask = torch.ones(B, T, dtype=torch.bool, device=x.device)
        if mask is not None:
            q_segments = k_segments = mask.int() - 1  # 0 for a real token, -1 for padding, which nobody may look at
            if past:
                before = cache.segments if cache.segments is not None else q_segments.new_zeros(B, past)
                k_segments = torch.cat([before, q_segments], dim=1)  # [B,past+T]
            positions = ((k_segments == 0).cumsum(1) - 1)[:, past:].clamp(min=0)
        angles = rope_1d(positions, self.config.head_width, self.config.rope_base)  # [B,T,Dh/2]
        rule = dict(causal=True, q_segments=q_segments, k_segments=k_segments)
        for i, layer in enumerate(self.layers):
            x = x if look is None else look(i, x)
            x = note(f"language.layers.{i}", layer(x, angles, rule, cache, i))
        if cache is not None:
            cache.length, cache.segments = past + T, k_segments
        return self.norm(x)

    def forward(self, ids, mask=None):
        return note("logits", self.lm_head(self.hidden(self.embed_tokens(ids), mask)))


# ----------------------------------------------------------------------------------------------------------------------
# Inserted blocks


class GatedBlock(nn.Module):
    """GATED XATTN-DENSE (paper 2.2): words look at latents, then think, each through a gate of its own.

    tanh(0) = 0: a new block adds nothing, and the language model around it still is what it was. The gradient of tanh at 0
    is 1, so a gate can open; what is behind a closed one gets no gradient until it has begun to.
    """

    def __init__(self, config):
        super().__init__()
        c = config.language
        norm = partial(RMSNorm if config.dense == "swiglu" else nn.LayerNorm, eps=c.norm_eps)
        self.input_layernorm = norm(c.width)
        self.cross_attn = CrossAttention(c.width, config.vision.width, c.heads, c.head_width, norm if config.qk_norm else None)
        self.post_attention_layernorm = norm(c.width)
        if config.dense == "swiglu":
            self.mlp = SwiGLU(c.width, c.mlp_width)
        else:
            up, down = nn.Linear(c.width, 4 * c.width, bias=False), nn.Linear(4 * c.width, c.width, bias=False)
            self.mlp = nn.Sequential(up, nn.GELU(), down)
        if config.gate == "none":
            self.attn_gate = self.ffw_gate = None
        else:
            size = 1 if config.gate == "scalar" else c.width
            self.attn_gate, self.ffw_gate = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x, segments, media=None):
        """x [B,T,D]; segments [B,T] and media (k, v [B,H,M*L,Dh], their segments [B,M*L]) say who sees what."""
        attn_gate, ffw_gate = (1.0 if alpha is None else alpha.tanh() for alpha in (self.attn_gate, self.ffw_gate))
        if media is not None:
            k, v, k_segments = media
            x = x + attn_gate * self.cross_attn(self.input_layernorm(x), k, v, segments, k_segments)
        return x + ffw_gate * self.mlp(self.post_attention_layernorm(x))


class ConditionedLM:
    """The frozen language model while it looks at given media: to `generate` and to a loss a decoder like any other.

    It holds what stays the same from word to word: which image each word of the prompt looks at, and the keys and values of
    the latents for every inserted layer. Made for one call and thrown away; nothing is remembered on the model.
    """

    def __init__(self, model, segments, latents=None, media_mask=None):
        """segments [B,T] of the prompt; latents [B,M,L,Dv] or None; media_mask [B,M] or None (True = real)."""
        self.language, self.config = model.language, model.config.language
        self.embed_tokens, self.lm_head = model.language.embed_tokens, model.language.lm_head
        self.gated_blocks, self.every = model.gated_blocks, model.config.cross_every
        self.segments, self.media = segments, [None] * len(model.gated_blocks)
        if latents is not None:
            B, M, L, _ = latents.shape
            number = torch.arange(M, device=latents.device).expand(B, M)
            if media_mask is not None:  # the i-th real one is image i, wherever the padding stands
                number = (media_mask.cumsum(1) - 1).masked_fill(~media_mask, -1)
            k_segments, row = number.repeat_interleave(L, dim=1), latents.flatten(1, 2)  # [B,M*L], [B,M*L,Dv]
            self.media = [(*block.cross_attn.keys_values(row), k_segments) for block in model.gated_blocks]

    def hidden(self, x, mask=None, cache=None):
        """As LanguageModel.hidden. New words after the prompt look where its last word looked."""
        segments = self.segments
        if cache is not None and cache.length:
            segments = segments[:, -1:].expand(-1, x.shape[1])

        def look(i, x):
            if i % self.every:
                return x
            n = i // self.every
            return note(f"gated_blocks.{n}", self.gated_blocks[n](x, segments, self.media[n]))

        return self.language.hidden(x, mask, cache, look)


# ----------------------------------------------------------------------------------------------------------------------
# The model


def media_segments(ids, config, mask=None):
    """Which image or video each token looks at: the last one at or before it; -1 before the first, and for padding before
    it. ids [B,T], mask [B,T] or None (True = real token) -> [B,T].

    Look <image> a dog <image> a cat  ->  -1 0 0 0 1 1 1
    """
    is_image = ids == config.image_token_id
    return (is_image if mask is None else is_image & mask).cumsum(1) - 1


class Flamingo(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        Dv = config.vision.width
        if config.connector == "resampler":
            self.connector = PerceiverResampler(Dv, config.resampler)
        else:
            self.connector = MLP(Dv, 4 * Dv, "gelu")
        self.language = LanguageModel(config.language)
        self.gated_blocks = nn.ModuleList(GatedBlock(config) for _ in range(0, config.language.layers, config.cross_every))

    def encode_media(self, media, media_mask=None):
        """media [B,M,F,3,H,W] (an image is a video of one frame) -> latents [B,M,L,Dv], L whatever F, H and W are.

        media_mask [B,M], or [B,M,F] where videos have different lengths; True = real. Padding is not encoded. Frames go
        through the tower 64 at a time, so that its memory does not grow with the video; that of the features, N * Dv
        numbers a frame, does. As in IDEFICS they are those of the last block, class token first; ln_post is not applied.
        """
        B, M, frames = media.shape[:3]
        if self.config.connector != "resampler" and media_mask is not None and media_mask.ndim == 3:
            raise ValueError("videos of different lengths in one batch need the resampler: it can leave frames out")
        real = torch.ones(B, M, frames, dtype=torch.bool, device=media.device)
        if media_mask is not None:
            real = real & (media_mask[..., None] if media_mask.ndim == 2 else media_mask)
        if not real.any():
            raise ValueError(f"media {list(media.shape)} [B,M,F,3,H,W] hold no image and no frame")
        some = torch.cat([self.vision(part) for part in media[real].split(64)])  # [n,N,Dv]
        x = some.new_zeros(B, M, frames, *some.shape[1:])
        x[real] = some
        x = note("image features", x.flatten(0, 1))  # [B*M,F,N,Dv]
        if self.config.connector == "resampler":
            latents = self.connector(x, None if media_mask is None else real.flatten(0, 1))
        else:
            latents = self.connector(x.flatten(1, 2))
        return note("latents", latents.unflatten(0, (B, M)))

    def look(self, ids, media=None, mask=None, media_mask=None):
        """A ConditionedLM that looks at the media of ids [B,T]. Raises ValueError when a row has more or fewer <image>
        than media: a model that looks at the wrong picture gives no other sign of it."""
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"ids must be [B,T] with at least one token, got {list(ids.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != ids.shape):
            raise ValueError(f"mask must be bool [B,T] as ids {list(ids.shape)}, got {mask.dtype} {list(mask.shape)}")
        segments = media_segments(ids, self.config, mask)
        placed = (segments[:, -1] + 1).tolist()  # the last token looks at the last image
        if media is None:
            if any(placed) or media_mask is not None:
                raise ValueError(f"{sum(placed)} <image> in the ids, but no image was given")
            return ConditionedLM(self, segments)
        media = media.unsqueeze(2) if media.ndim == 5 else media
        if media.ndim != 6 or media.shape[3] != 3 or len(media) != len(ids):
            raise ValueError(f"media must be [B,M,F,3,H,W] with B = {len(ids)} as in ids, got {list(media.shape)}")
        if media_mask is not None and (media_mask.dtype != torch.bool or media_mask.shape not in (media.shape[:2], media.shape[:3])):
            got = f"{media_mask.dtype} {list(media_mask.shape)}"
            raise ValueError(f"media_mask must be bool [B,M] or [B,M,F] as in media {list(media.shape)}, got {got}")
        there = media_mask if media_mask is None or media_mask.ndim == 2 else media_mask.any(2)  # [B,M]
        given = [media.shape[1]] * len(ids) if there is None else there.sum(1).tolist()
        for row, (words, images) in enumerate(zip(placed, given, strict=True)):
            if words != images:
                raise ValueError(f"row {row} has {words} <image> in its ids, but {images} image(s) or video(s) were given")
        latents = self.encode_media(media, media_mask) if any(given) else None
        return ConditionedLM(self, segments, latents, there)

    def forward(self, ids, media=None, mask=None, media_mask=None):
        """ids [B,T], media [B,M,F,3,H,W] or None, masks (True = real) -> logits [B,T,V]. Which image a token sees is
        derived from ids; the i-th <image> of a row is its i-th real medium."""
        decoder = self.look(ids, media, mask, media_mask)
        return note("logits", decoder.lm_head(decoder.hidden(decoder.embed_tokens(ids), mask)))

    def generate(self, ids, media=None, mask=None, media_mask=None, **options):
        """Continue each row of ids; media are encoded once. Options and result: see generate below."""
        with torch.no_grad():
            decoder = self.look(ids, media, mask, media_mask)
            return generate(decoder, decoder.embed_tokens(ids), mask, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a published IDEFICS: a folder in the Hugging Face layout, or a hub id. See load_checkpoint.

        Its file keeps the rows of the new tokens apart from LLaMA's; once loaded, they are folded into one table.
        """
        folder = checkpoint_folder(path)
        config, new = config_from_published(read_config(folder), folder)
        old = replace(config, language=replace(config.language, vocab_size=config.language.vocab_size - new))
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(old)
            if new:
                model.new_embeddings = nn.Embedding(new, config.language.width)
                model.new_head = nn.Linear(config.language.width, new, bias=False)
                if config.language.tie_embeddings:
                    model.new_head.weight = model.new_embeddings.weight
        load_checkpoint(model, folder, dtype, device)
        return fold_vocabulary(model, config) if new else model


def fold_vocabulary(model, config):
    """LLaMA's tables and the new tokens' rows, loaded apart -> one table each, as config says."""
    language = model.language
    for table, rows in ((language.embed_tokens, model.new_embeddings), (language.lm_head, model.new_head)):
        table.weight = nn.Parameter(torch.cat([table.weight.data, rows.weight.data]))
    if config.language.tie_embeddings:
        language.lm_head.weight = language.embed_tokens.weight
    language.embed_tokens.num_embeddings = language.lm_head.out_features = config.language.vocab_size
    del model.new_embeddings, model.new_head
    model.config, language.config = config, config.language
    return model


def freeze(model):
    """Set what trains (paper 2.2): the connector, the inserted blocks, and the rows of the new tokens. Never the vision
    tower, never the language model. Returns the parameters that train.

    The rows are part of a frozen table. Their gradient is let through, that of all others is set to zero, by a hook: a
    copy.deepcopy of the model has none, so call freeze on the copy. And give the table no weight decay, which would move
    the other rows without a gradient.
    """
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    model.gated_blocks.requires_grad_(True)
    new = torch.tensor(model.config.new_token_ids)

    def new_rows_only(grad):
        kept = torch.zeros_like(grad)
        kept[new] = grad[new]
        return kept

    for table in {model.language.embed_tokens.weight, model.language.lm_head.weight}:  # a set: tied ones are one
        table.requires_grad_(True)
        table.register_hook(new_rows_only)
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


def text_labels(ids, mask, config):
    """Labels for language_loss: every real token of text, ids [B,T] and mask [B,T] -> [B,T]. That an image comes next is
    nothing to learn: the likelihood is the text's (paper 2, equation 1)."""
    return ids.masked_fill(~mask | (ids == config.image_token_id), IGNORE_INDEX)


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
# Interleaved prompts


def build_prompt(text, images=1):
    """A prompt with one <image> per image: where the text places them, else all of them in front.

    >>> build_prompt("<image> a dog<|endofchunk|><image>", images=2)
    '<image> a dog<|endofchunk|><image>'
    >>> build_prompt("A photo of")
    '<image>A photo of'
    """
    placed = text.count("<image>")
    if placed not in (0, images):
        raise ValueError(f"the prompt has {placed} <image> placeholder(s) for {images} image(s): write one each, or none")
    if not placed and not text.strip():
        raise ValueError("the prompt is empty: ask something, as in --prompt '<image> this is'")
    return text if placed else "<image>" * images + text


def surround_images(prompt):
    """IDEFICS' way of writing images: a <fake_token_around_image> before, between and after them.

    >>> surround_images("<image><image> two dogs")
    '<fake_token_around_image><image><fake_token_around_image><image><fake_token_around_image> two dogs'
    """
    fake = "<fake_token_around_image>"
    return re.sub("(?:<image>)+", lambda found: fake + found[0].replace("<image>", "<image>" + fake), prompt)


def pad_rows(rows, value, left=False):
    """Lists of ids of different length -> (tensor [B,T] padded with value, mask [B,T]; True = real token)."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), value), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row), True
    return ids, mask


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to pixels, exactly as the published processors do


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


def resize_and_crop(image, size):
    """Shorter side to `size`, then the central square. Long, thin images would become huge in between (1 x 5000 pixels:
    a gigabyte), so beyond 16:1 only the part that survives the crop is resized."""
    width, height = image.size
    short = min(width, height)
    new_width, new_height = (size * width // short, size * height // short)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if max(width, height) > 16 * short:
        x, y = width / new_width, height / new_height  # source pixels per resized pixel
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def pad_to_square(image, color):
    """Centre the image on a square of one colour: nothing is cut off, as the original LLaVA-1.5 code does."""
    width, height = image.size
    square = Image.new("RGB", (max(width, height),) * 2, color)
    square.paste(image, ((square.width - width) // 2, (square.height - height) // 2))
    return square


def preprocess(images, config):
    """PIL images -> pixels [B,3,image_size,image_size], float32, equal to the published processor's.

    config: VisionConfig; its `resize` says how an image becomes a square: "crop" (CLIP: shorter side to size, centre
    cut out), "squash" (SigLIP: both sides to size), "pad" (LLaVA-1.5: a border in the mean colour).
    """
    if not images:
        raise ValueError("preprocess needs at least one image")
    size, batch = config.image_size, []
    for image in images:
        image = image.convert("RGB")
        if config.resize == "pad":
            image = pad_to_square(image, tuple(int(255 * m) for m in config.mean))
        if config.resize == "squash":
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            image = resize_and_crop(image, size)
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.asarray(image, dtype=np.float64) * (1 / 255)).astype(np.float32)
        batch.append((pixels - np.float32(config.mean)) / np.float32(config.std))
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

VISION_NAMES = {  # published name -> ours; {} is the number of the layer; .weight and .bias follow by themselves
    "encoder.layers.{}.layer_norm1": "blocks.{}.ln_1",
    "encoder.layers.{}.self_attn.q_proj": "blocks.{}.attn.q_proj",
    "encoder.layers.{}.self_attn.k_proj": "blocks.{}.attn.k_proj",
    "encoder.layers.{}.self_attn.v_proj": "blocks.{}.attn.v_proj",
    "encoder.layers.{}.self_attn.out_proj": "blocks.{}.attn.out_proj",
    "encoder.layers.{}.layer_norm2": "blocks.{}.ln_2",
    "encoder.layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "encoder.layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "patch_embedding",
    "embeddings.position_embedding": "position_embedding",
    "pre_layrnorm": "ln_pre",  # the published spelling
    "post_layernorm": "ln_post",
}
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
GATED_NAMES = {
    "gated_cross_attn_layers.{}.input_layernorm": "gated_blocks.{}.input_layernorm",
    "gated_cross_attn_layers.{}.cross_attn.q_proj": "gated_blocks.{}.cross_attn.q_proj",
    "gated_cross_attn_layers.{}.cross_attn.k_proj": "gated_blocks.{}.cross_attn.k_proj",
    "gated_cross_attn_layers.{}.cross_attn.v_proj": "gated_blocks.{}.cross_attn.v_proj",
    "gated_cross_attn_layers.{}.cross_attn.o_proj": "gated_blocks.{}.cross_attn.o_proj",
    "gated_cross_attn_layers.{}.cross_attn.q_layer_norm": "gated_blocks.{}.cross_attn.q_norm",
    "gated_cross_attn_layers.{}.cross_attn.k_layer_norm": "gated_blocks.{}.cross_attn.k_norm",
    "gated_cross_attn_layers.{}.post_attention_layernorm": "gated_blocks.{}.post_attention_layernorm",
    "gated_cross_attn_layers.{}.mlp.gate_proj": "gated_blocks.{}.mlp.gate_proj",
    "gated_cross_attn_layers.{}.mlp.up_proj": "gated_blocks.{}.mlp.up_proj",
    "gated_cross_attn_layers.{}.mlp.down_proj": "gated_blocks.{}.mlp.down_proj",
    "gated_cross_attn_layers.{}.alpha_cross_attn": "gated_blocks.{}.attn_gate",  # [1], or [1,1,D] where every channel has its own
    "gated_cross_attn_layers.{}.alpha_dense": "gated_blocks.{}.ffw_gate",
}
RESAMPLER_NAMES = {  # a published block is a pair: 0 is the attention, 1 the MLP
    "latents": "latents",
    "blocks.{}.0.context_layer_norm": "layers.{}.norm_media",
    "blocks.{}.0.latents_layer_norm": "layers.{}.norm_latents",
    "blocks.{}.0.q_layer_norm": "layers.{}.attn.q_norm",
    "blocks.{}.0.k_layer_norm": "layers.{}.attn.k_norm",
    "blocks.{}.0.q_proj": "layers.{}.attn.q_proj",
    "blocks.{}.0.k_proj": "layers.{}.attn.k_proj",
    "blocks.{}.0.v_proj": "layers.{}.attn.v_proj",
    "blocks.{}.0.output_proj": "layers.{}.attn.o_proj",
    "blocks.{}.1.ln": "layers.{}.norm_mlp",
    "blocks.{}.1.fc": "layers.{}.fc1",
    "blocks.{}.1.c_proj": "layers.{}.fc2",
    "layer_norm": "norm",
}
NEW_NAMES = {  # the rows of the new tokens, folded into the tables by fold_vocabulary
    "model.embed_tokens.additional_embedding": "new_embeddings",
    "lm_head.additional_fc": "new_head",
}

TOWERS = [  # (published prefix, our prefix, table), tried in this order
    ("", "", NEW_NAMES),
    ("model.vision_model.", "vision.", VISION_NAMES),
    ("model.perceiver_resampler.", "connector.", RESAMPLER_NAMES),
    ("model.", "", GATED_NAMES),
    ("model.", "language.", LANGUAGE_NAMES),
    ("", "language.", {"lm_head": "lm_head"}),
]
LEFT_OUT = [r"\.position_ids$", r"\.rotary_emb\.inv_freq$"]  # buffers that older files carry; both are computed here


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
    """VisionConfig with what preprocessor_config.json says of resizing and normalising, if the folder has one."""
    file = Path(folder) / "preprocessor_config.json"
    if not file.is_file():
        return vision
    raw = read_json(file)
    changes = {ours: tuple(raw[theirs]) for ours, theirs in (("mean", "image_mean"), ("std", "image_std")) if theirs in raw}
    size = raw.get("size", {})
    size = {"shortest_edge": size} if isinstance(size, int) else size  # as older files write it
    if raw.get("do_pad"):
        changes["resize"] = "pad"
    elif "height" in size and not raw.get("do_center_crop"):
        changes["resize"] = "squash"
    elif "shortest_edge" in size:
        changes["resize"] = "crop"
    return replace(vision, **changes)


def config_from_published(raw, folder):
    """The published config.json (a dict) -> (FlamingoConfig, number of new tokens kept in tables of their own). Fields it
    leaves out have the published classes' defaults."""
    if raw.get("model_type") != "idefics":
        raise ValueError(f"{folder} holds a {raw.get('model_type')!r} checkpoint; flamingo.py reads 'idefics'")
    if not raw.get("use_resampler", False):
        raise ValueError(f"{folder} has no resampler (use_resampler is false), which flamingo.py needs")
    # older files say vision_embed_dim where newer ones say vision_config: {embed_dim}
    published_vision = {k.removeprefix("vision_"): v for k, v in raw.items() if k.startswith("vision_")}
    published_vision |= raw.get("vision_config") or {}
    published_resampler = raw | (raw.get("perceiver_config") or {})
    vision = replace_published(
        replace(VIT_H, width=768),
        published_vision,
        dict(width="embed_dim", layers="num_hidden_layers", heads="num_attention_heads", mlp_width="intermediate_size")
        | dict(activation="hidden_act", norm_eps="layer_norm_eps", image_size="image_size", patch_size="patch_size"),
    )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{folder} scales its rotary positions ({rope}), which flamingo.py does not")
    new, old = raw.get("additional_vocab_size") or 0, raw.get("vocab_size", 32000)
    eos = raw.get("eos_token_id", 2)
    if raw.get("alpha_type", "float") not in ("float", "vector"):
        raise ValueError(f"{folder} has gates of an unknown type {raw['alpha_type']!r}; known: float, vector")
    language = replace_published(
        LLAMA_7B,
        raw | {"vocab_size": old + new, "rope_theta": rope.get("rope_theta", 10000.0)},
        dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", mlp_width="intermediate_size")
        | dict(kv_heads="num_attention_heads", vocab_size="vocab_size", context="max_position_embeddings")
        | dict(norm_eps="rms_norm_eps", rope_base="rope_theta", tie_embeddings="tie_word_embeddings"),
    )
    resampler = replace_published(
        ResamplerConfig(qk_norm=False, mlp_width=4 * vision.width),
        published_resampler,
        dict(latents="resampler_n_latents", layers="resampler_depth", heads="resampler_n_heads")
        | dict(head_width="resampler_head_dim", qk_norm="qk_layer_norms_perceiver"),
    )
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder} has {raw['hidden_act']!r} in its decoder, flamingo.py has 'silu'")
    return (
        FlamingoConfig(
            image_config_from_published(vision, folder),
            language,
            resampler,
            cross_every=raw.get("cross_layer_interval", 1),
            gate="vector" if raw.get("alpha_type", "float") == "vector" else "scalar",
            qk_norm=raw.get("qk_layer_norms", False),
            # the new tokens: <fake_token_around_image>, <image>, and where the model was taught to chat <end_of_utterance>
            image_token_id=old + min(1, new - 1),
            new_token_ids=tuple(range(old, old + new)),
            eos_token_id=old + 2 if new > 2 else eos[0] if isinstance(eos, list) else eos,
        ),
        new,
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
    """A tensor of a published file -> [(name of our parameter, its tensor)]. Here one is always one; where a file fuses
    query, key and value into one matrix, or splits what we keep whole, this is the place that says how."""
    return [(our_name(published), tensor)]


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
    """Modules, shapes, what trains, what an image costs, FLOPs and KV-cache bytes of a preset, as text."""
    config = find_preset(name)
    with torch.device("meta"):
        model = Flamingo(config).requires_grad_(False)  # the counter of FLOPs stumbles over a parameter that is expanded
    side, c = config.vision.image_size, config.language
    L, words = num_image_tokens(side, side, config), 64
    total = count_parameters(model)
    trained = sum(count_parameters(part) for part in (model.connector, model.gated_blocks))
    rows = len(config.new_token_ids) * c.width * (1 if c.tie_embeddings else 2)
    media = torch.empty(1, 1, 1, 3, side, side, device="meta")
    prompt = torch.empty(1, words, c.width, device="meta")
    segments = torch.zeros(1, words, dtype=torch.long, device="meta")
    latents = torch.empty(1, 1, L, config.vision.width, device="meta")
    features = torch.empty(1, 1, math.prod(patch_grid(side, side, config.vision)) + int(config.vision.class_token), config.vision.width, device="meta")
    cache = 2 * c.layers * c.kv_heads * c.head_width  # numbers per token: keys and values of every layer
    cross = 2 * len(model.gated_blocks) * c.width * L  # numbers per image: its latents' keys and values
    return "\n".join(
        [
            f"{name}: {total:,} parameters, an inserted block before every {config.cross_every}. layer"
            f" ({len(model.gated_blocks)} of them), gate {config.gate}",
            "",
            table(describe(model)),
            "",
            f"trained: {trained + rows:,} ({100 * (trained + rows) / total:.1f} %): resampler, inserted blocks,"
            f" {len(config.new_token_ids)} rows of new tokens; {total - trained - rows:,} frozen",
            f"image {side} x {side}, or a video of any length -> {L} latents beside the text, 1 token in it",
            f"FLOPs: {count_flops(lambda: model.vision(media[:, 0, 0])):,} to encode an image or a frame,"
            f" {count_flops(lambda: model.connector(features)):,} to resample it,",
            f"{count_flops(lambda: ConditionedLM(model, segments, latents).hidden(prompt)):,} to read {words} words with it",
            f"KV cache: {2 * cache:,} bytes a token in 16 bits, {2 * cross:,} for the latents of one image",
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_trace():
    """The shapes through one forward pass of the tiny model, with random weights."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    model = Flamingo(config)
    side = config.vision.image_size
    ids = torch.randint(0, 400, (1, 12))
    ids[0, [2, 7]] = config.image_token_id
    with torch.no_grad(), trace() as t:
        model(ids, torch.randn(1, 2, 1, 3, side, side))
    return f"tiny, random weights, 1 row of 12 tokens, two of them images\n\n{t}"


def show_mask():
    """Who may look at whom, drawn from the same rule that the attention kernels follow."""
    config = PRESETS["tiny"]
    words = "Look <image> a dog <image> a cat".split()
    ids = torch.tensor([[config.image_token_id if word == "<image>" else 0 for word in words]])
    segments = media_segments(ids, config)
    images = torch.tensor([[0, 0, 1, 1]])
    rows = draw_mask(len(words), 4, q_segments=segments, k_segments=images).splitlines()
    return "\n\n".join(
        [
            "rows look at columns; # may, . may not",
            "inserted blocks: words look at the latents (2 each) of the last of 2 images before them\n"
            + "\n".join(f"{row}   {word}" for row, word in zip(rows, words, strict=True)),
            "language model: causal; images before the last are known through the words that saw them\n"
            + draw_mask(len(words), len(words), causal=True),
            "resampler: 2 latents look at 4 features and at themselves\n" + draw_mask(2, 6),
            "vision tower: the class token and all patches see each other\n" + draw_mask(5, 5),
        ]
    )


def room_after(ids, config):
    """How many tokens may follow a prompt; raises ValueError when none."""
    if len(ids) >= config.language.context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the context holds {config.language.context}: shorten it")
    return config.language.context - len(ids)


def answer(model, images, prompt, encode, decode, max_new_tokens=32):
    """Continue a prompt with <image> placeholders, about as many images -> the model's words."""
    device = model.language.embed_tokens.weight.device
    media = preprocess(images, model.config.vision).to(device)[None, :, None] if images else None  # [1,M,1,3,H,W]
    ids = torch.tensor([encode(prompt)], device=device)
    room = room_after(ids[0], model.config)
    eos = model.config.eos_token_id
    new = model.generate(ids, media, max_new_tokens=min(max_new_tokens, room), eos_id=eos)[0].tolist()
    return decode([i for i in new if i != eos]).strip()


def run_weights(args):
    """--weights DIR --image FILE --prompt TEXT: a published checkpoint goes on writing about your own images."""
    if not args.prompt:
        raise ValueError("--weights needs --prompt, as in --weights DIR --image photo.jpg --prompt 'User: <image>What is it?'")
    images = [load_image(path) for path in args.image]
    prompts = [surround_images(build_prompt(text, len(images))) for text in args.prompt]  # wrong ones are found before
    folder = checkpoint_folder(args.weights)  # gigabytes are read, and so is a checkpoint of another family
    config, _ = config_from_published(read_config(folder), folder)
    tokenizer = load_tokenizer(folder)
    for prompt in prompts:
        room_after(tokenizer.encode(prompt).ids, config)
    model = Flamingo.from_pretrained(folder, getattr(torch, args.dtype), check_device(args.device))
    for prompt in prompts:
        print(answer(model, images, prompt, lambda text: tokenizer.encode(text).ids, tokenizer.decode))


CURVE_COLOURS = ("#c0392b", "#e67e22", "#27ae60", "#16a085", "#2980b9", "#8e44ad")


def draw_curves(pen, box, title, curves, labels, top=1.0):
    """Lines into a box (left, upper, width, height): curves {name: [y from 0 to top]}, labels along the x axis."""
    left, upper, width, height = box
    pen.text((left, upper - 20), title, fill="black")
    for y in (0, 0.5, 1):
        pen.line((left, upper + height * (1 - y), left + width, upper + height * (1 - y)), fill="#dddddd")
        pen.text((left - 28, upper + height * (1 - y) - 6), f"{y * top:.2f}", fill="gray")
    for i, label in enumerate(labels):
        pen.text((left + i * width / max(1, len(labels) - 1) - 4, upper + height + 4), str(label), fill="gray")
    for n, ((name, values), colour) in enumerate(zip(curves.items(), itertools.cycle(CURVE_COLOURS))):  # noqa: B905
        step = width / max(1, len(values) - 1)
        pen.line([(left + i * step, upper + height * (1 - min(1, y / top))) for i, y in enumerate(values)], fill=colour, width=2)
        pen.text((left + n % 3 * 100, upper + height + 20 + 14 * (n // 3)), name, fill=colour)


def draw_demo(episode, said, log, shots, curve, ceiling, file, size=96):
    """PNG: an interleaved prompt with its answer, the gates over training, and the few-shot curve."""
    page = Image.new("RGB", (max(760, len(episode) * (size + 8) + 8), size + 300), "white")
    pen = ImageDraw.Draw(page)
    for n, (image, name) in enumerate(episode):
        last = n + 1 == len(episode)
        page.paste(image.resize((size, size), Image.Resampling.NEAREST), (8 + n * (size + 8), 8))
        pen.text((12 + n * (size + 8), size + 12), f"? {said}" if last else name, fill="red" if last else "black")
    gates = {name: [abs(row[name]) for row in log] for name in log[0] if "gate" in name}
    upper, steps = size + 70, [log[0]["step"], log[-1]["step"]]
    top = 0.5 if max(map(max, gates.values())) <= 0.5 else 1.0
    draw_curves(pen, (40, upper, 300, 160), "how far the gates are open, |tanh(alpha)|, over training", gates, steps, top)
    measured = {"named rightly": curve, "what the examples tell": ceiling}
    draw_curves(pen, (420, upper, 300, 160), "new names, by number of examples", measured, shots)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file)


def demo(args):
    """Train what is inserted into the toy language model if it is not cached, then let it learn words from examples."""
    import train_tiny as tiny

    check_device(args.device)
    own = [load_image(path) for path in args.image]  # wrong input is found before the training
    if own or args.prompt:
        prompts = [build_prompt(text, len(own)) if text or not own else "<image>" * len(own) for text in args.prompt or [""]]
        for prompt in prompts:
            if (tokens := len(tiny.encode(prompt))) + 8 > PRESETS["tiny"].language.context:
                raise ValueError(f"the prompt has {tokens} tokens, the context holds {PRESETS['tiny'].language.context}: shorten it")
    rng = tiny.rng_for("flamingo demo")
    episodes = [tiny.episode(rng, 5, split="test") for _ in range(4)]
    text = "".join(f"{scene.things[0].shape} {name}\n" for scene, name in episodes[0][:-1]) + episodes[0][-1][0].things[0].shape
    row = "".join(f"<image> {name}<|endofchunk|>" for _, name in episodes[0][:-1]) + "<image>"
    print(f"In goes an interleaved row, images of 32 x 32 pixels as {PRESETS['tiny'].resampler.latents} latents beside it:\n    {row}")
    model = tiny.untrained_flamingo(args.device)
    ids = torch.tensor([tiny.encode(text)], device=args.device)
    said = tiny.decode(generate(model.language, model.language.embed_tokens(ids), max_new_tokens=5)[0]).split("\n")[0]
    print("the language model, frozen, can look things up in what it reads:")
    print(f"    {text!r} ->{said!r}")
    first = tiny.interleave([[(tiny.draw(scene), f" {name}") for scene, name in episodes[0]]])
    with torch.no_grad():
        ids, mask, _, media, media_mask = (x.to(args.device) for x in first)
        same = torch.equal(model(ids, media, mask, media_mask), model.language(ids, mask))
    print(f"before training, gates closed: its logits, bit for bit, with images in the row? {same}")
    print(f"    and so it says: {', '.join(map(repr, tiny.named(model, episodes[:3])))}")
    model, log = tiny.demo_flamingo(args.device)
    if own or args.prompt:
        for prompt in prompts:
            print(f"{prompt} -> {answer(model, own, prompt, tiny.encode, tiny.decode) or '(it stops at once)'}")
            if "<|endofchunk|>" not in prompt:
                print("(no example in it, as in '<image> dax<|endofchunk|><image>': it makes up a name)")
        return
    print("\nwhat a name means differs from row to row; these names, and what each row asks about, were never in training:")
    said = tiny.named(model, episodes)
    for one, word in zip(episodes, said, strict=True):
        shown = ", ".join(f"[{scene.things[0].name}] {name}" for scene, name in one[:-1])
        print(f"    {shown},\n        [{one[-1][0].things[0].name}] -> {word} ({'right' if word == one[-1][1] else f'it is {one[-1][1]}'})")
    curve = [tiny.few_shot(model, shots, 200)[0] for shots in tiny.SHOTS]
    ceiling = [min(1.0, shots / tiny.WAYS) for shots in tiny.SHOTS]  # the kinds that so many examples show
    print("examples          " + "".join(f"{shots:>8}" for shots in tiny.SHOTS))
    print("named rightly     " + "".join(f"{share:>8.0%}" for share in curve) + f"   (among {tiny.WAYS} names guessing gives {1 / tiny.WAYS:.0%})")
    print("the examples tell " + "".join(f"{share:>8.0%}" for share in ceiling))
    print(f"after training, {curve[-1]:.0%} of the new names are learned from 8 examples")
    names = [name for name in log[0] if "gate" in name]
    if not tiny.recipe_is_done("flamingo", tiny.FLAMINGO_STEPS):
        print("(this model had part of the training; python train_tiny.py flamingo gives it all, and the demo then shows that one)")
    print("how far the gates are open, |tanh(alpha)|:\n    step " + "".join(f"{name:>13}" for name in names))
    for line in (log[0], log[len(log) // 8], log[len(log) // 3], log[-1]):
        print(f"    {line['step']:>4} " + "".join(f"{abs(line[name]):>13.3f}" for name in names))
    print(f"the language model's logits for the words it knew, the same bit for bit: {tiny.text_untouched(model)[0]:.0%}")
    file = tiny.RUNS / "flamingo" / "demo.png"
    draw_demo([(tiny.draw(scene), name) for scene, name in episodes[0]], said[0], log, tiny.SHOTS, curve, ceiling, file)
    print(f"written: {file} (the row above with its answer, the gates over training, the few-shot curve)")


class CommandLine(argparse.ArgumentParser):
    """argparse, except that a mistake costs one line and exit status 2, not a page of usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def command_line(description):
    """The options that every family file has."""
    parser = CommandLine(description=description)
    parser.add_argument("--demo", action="store_true", help="train the toy model if it is not cached, then show what it does")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="your own image (may be repeated)")
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
    sys.modules.setdefault("flamingo", sys.modules[__name__])  # train_tiny imports flamingo: let it find this very module
    main()
