"""
LLaVA and LLaVA-1.5: a language model that reads image patches as if they were words.

    LLaVA      Liu et al. 2023, Visual Instruction Tuning, arXiv 2304.08485
    LLaVA-1.5  Liu et al. 2023, Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744

The idea. Take a vision tower that already knows images (CLIP's ViT) and a language model that already knows how to
talk (Vicuna), both pretrained, and join them by the smallest thing that could work: a projector that maps each patch
feature to a vector of the width of a word embedding. The decoder then reads a row of such vectors where the word
<image> stood, and answers. Nothing inside either model changes shape (early fusion by projection, type C).

    image [n,3,H,W]                             "USER: <image>\\nWhat colour is the circle? ASSISTANT:"
      | CLIP ViT, last-but-one layer,             | token ids; <image> is repeated once per patch
      | class token dropped                       |
    [n,N,Dv]                                    ids [B,T]
      | mm_projector: linear (LLaVA) or           | embedding table
      | linear, GELU, linear (1.5)                |
    [n,N,D] ----- put where the <image> ids stand ----> [B,T,D]
                                                  | LLaMA blocks: causal; RMSNorm, RoPE, SwiGLU
                                                logits [B,T,V] -> "red"

Two stages (paper 4.2). Stage 1 teaches the projector alone to speak the decoder's language, on captions: everything
else is frozen, so that a random projector cannot damage the decoder. Stage 2 trains projector and decoder on
instructions. The vision tower never moves. The loss counts the assistant's words only.

Axis letters, here and in all seven files: B batch, T text length, S joint length, N images or patches, P patch size,
D width, H heads, K key/value heads, Dh head width, L latents or queries, F frames, V vocabulary, E shared embedding
width. Two of them, H and W, are also an image's height and width: [B,3,H,W] is always pixels.

Three conventions on which code in this field disagrees
    RoPE    half-split pairing: dimension i turns with dimension i + Dh/2 (as LLaMA checkpoints on the hub are stored).
    masks   True means "may attend" or "real token".
    labels  have the same positions as ids; the shift by one happens in one place, language_loss.

Paper / published code / this file
    - Which layer. The paper's ablation takes features "before" the last layer; the published config says -2: one block
      is not run and ln_post is not applied, though the checkpoint carries both.
    - Squares. The original 1.5 code pads an image to a square, the published processor config crops: VisionConfig.resize.
    - System prompt. The original conversation template starts with a sentence about a curious user; the published
      processor's template leaves it out, and so do we.

What to try: --demo, then ask your own image; swap the projector for "linear"; keep the class token; freeze nothing in
stage 1 and watch the text loss; --anatomy llava-1.5-7b to see where seven billion parameters are.
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
class LLaVAConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    projector: str = "mlp"  # "linear" is LLaVA; "mlp" is LLaVA-1.5
    feature_layer: int = -2  # -1: after the last block; -2: one earlier, less committed to CLIP's one-vector summary
    keep_class_token: bool = False
    image_token_id: int = 32000
    eos_token_id: int = 2

    def __post_init__(self):
        if self.projector not in ("linear", "mlp"):
            raise ValueError(f"unknown projector {self.projector!r}; known: linear, mlp")
        if not -self.vision.layers - 1 <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer {self.feature_layer} is outside of -1 .. {-self.vision.layers - 1}")


VIT_L = VisionConfig(224, 14, width=1024, layers=24, heads=16, mlp_width=4096)
VICUNA_13B = LanguageConfig(width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824)

PRESETS = {
    # what train_tiny.py trains in front of you, on the toy CLIP's vision tower and a toy language model
    "tiny": LLaVAConfig(
        VisionConfig(32, 8, width=96, layers=4, heads=4, mlp_width=384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        LanguageConfig(512, width=96, layers=3, heads=2, kv_heads=1, mlp_width=256, context=256, tie_embeddings=True),
        image_token_id=499,
        eos_token_id=498,
    ),
    "llava-7b": LLaVAConfig(VIT_L, LanguageConfig(context=2048), projector="linear"),
    "llava-1.5-7b": LLaVAConfig(replace(VIT_L, image_size=336), LanguageConfig()),
    "llava-1.5-13b": LLaVAConfig(replace(VIT_L, image_size=336), VICUNA_13B),
}

def patch_grid(height, width, config):
    """(rows, columns) of whole patches in an image of height x width pixels, patch_size taken from config. A border narrower
    than a patch is dropped, as the convolution does. Raises ValueError when not even one patch fits."""
    rows, columns = height // config.patch_size, width // config.patch_size
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {height} x {width} pixels is smaller than one patch of {config.patch_size}")
    return rows, columns


def num_image_tokens(height, width, config):
    """Tokens the decoder reads for one image of height x width pixels: one per patch, the class token dropped unless
    the config keeps it (config: LLaVAConfig). The one place where this is computed; 336 / 14 = 24, 24 * 24 = 576."""
    rows, columns = patch_grid(height, width, config.vision)
    return rows * columns + int(config.keep_class_token)


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


class Projector(nn.Module):
    """Patch features [n,N,Dv] -> word-like vectors [n,N,D]. LLaVA: one linear map; LLaVA-1.5: two with a GELU between."""

    def __init__(self, config):
        super().__init__()
        Dv, D = config.vision.width, config.language.width
        self.linear_1 = nn.Linear(Dv, D)
        self.linear_2 = nn.Linear(D, D) if config.projector == "mlp" else None

    def forward(self, x):
        x = self.linear_1(x)
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))


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

    def hidden(self, x, mask=None, cache=None):
        """Embeddings x [B,T,D] of new tokens (and their mask) -> hidden states [B,T,D] after the last norm.

        With a cache, the tokens in it come first. Positions count real tokens only, so padding shifts nothing.
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
            x = note(f"language.layers.{i}", layer(x, angles, rule, cache, i))
        if cache is not None:
            cache.length, cache.segments = past + T, k_segments
        return self.norm(x)

    def forward(self, ids, mask=None):
        return note("logits", self.lm_head(self.hidden(self.embed_tokens(ids), mask)))


# ----------------------------------------------------------------------------------------------------------------------
# The model


class LLaVA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.mm_projector = Projector(config)
        self.language = LanguageModel(config.language)

    def encode_image(self, pixels):
        """pixels [n,3,H,W] -> one vector per visual token, [n,N,D], ready to stand among word embeddings."""
        depth = self.config.vision.layers + 1 + self.config.feature_layer  # -2 leaves the last block out
        x = self.vision(pixels, depth)
        if self.config.vision.class_token and not self.config.keep_class_token:
            x = x[:, 1:]
        return note("image features for the decoder", self.mm_projector(x))

    def embed(self, ids, pixels=None):
        """ids [B,T] with one image_token_id per visual token, pixels [n,3,H,W] -> embeddings [B,T,D].

        Images are used up in the order of their placeholders, row by row. Raises ValueError when the counts differ.
        """
        is_image = ids == self.config.image_token_id  # [B,T]
        x = self.language.embed_tokens(ids)
        found = int(is_image.sum())
        if pixels is None:
            if found:
                raise ValueError(f"{found} image tokens in the ids, but no image was given")
            return x
        n, _, height, width = pixels.shape
        each = num_image_tokens(height, width, self.config)
        if found != n * each:
            grid = " x ".join(map(str, patch_grid(height, width, self.config.vision)))
            raise ValueError(
                f"{found} image tokens in the ids, but {n} image(s) need {n * each}: {height} x {width} pixels in patches"
                f" of {self.config.vision.patch_size} are {grid}, {each} tokens each"
            )
        x = x.clone()
        x[is_image] = self.encode_image(pixels).flatten(0, 1).to(x.dtype)
        return note("words and patches", x)

    def forward(self, ids, pixels=None, mask=None):
        """ids [B,T], pixels [n,3,H,W] or None, mask [B,T] or None (True = real token) -> logits [B,T,V]."""
        return note("logits", self.language.lm_head(self.language.hidden(self.embed(ids, pixels), mask)))

    def generate(self, ids, pixels=None, mask=None, **options):
        """Continue each row of ids; images are encoded once. Options and result: see generate below."""
        with torch.no_grad():
            return generate(self.language, self.embed(ids, pixels), mask, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a published LLaVA: a folder in the Hugging Face layout, or a hub id. See load_checkpoint."""
        folder = checkpoint_folder(path)
        config = config_from_published(read_config(folder), folder)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config)
        return load_checkpoint(model, folder, dtype, device)


def freeze(model, stage):
    """Set what trains (paper 4.2). Stage 1: the projector alone. Stage 2: projector and language model. Never the
    vision tower: its features are what both stages build on. Returns the parameters that train."""
    if stage not in (1, 2):
        raise ValueError(f"LLaVA trains in stages 1 and 2, not {stage!r}")
    model.requires_grad_(False)
    model.mm_projector.requires_grad_(True)
    if stage == 2:
        model.language.requires_grad_(True)
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


def build_prompt(question, images=1):
    """The published template for one turn, with one <image> per image in front unless the question places them itself.

    >>> build_prompt("What is this?")
    'USER: <image>\\nWhat is this? ASSISTANT:'
    """
    if not question.replace("<image>", "").strip():
        raise ValueError("the prompt is empty: ask something, as in --prompt 'what colour is the circle?'")
    placed = question.count("<image>")
    if placed not in (0, images):
        raise ValueError(f"the prompt has {placed} <image> placeholder(s) for {images} image(s): write one each, or none")
    front = "" if placed else "<image>\n" * images
    return f"USER: {front}{question} ASSISTANT:"


def expand_images(prompt, tokens):
    """Repeat each <image> in a prompt once per visual token, since each of them needs a position of its own."""
    return prompt.replace("<image>", "<image>" * tokens)


def encode_conversation(turns, encode, config, images=1):
    """[(question, answer), ...] about the images of the first turn -> ids, labels (two lists of equal length).

    encode: text -> list of ids, which knows <image>. Only the assistant's words and the end-of-sequence token after
    them have labels: a model should learn to answer, not to ask.
    """
    side = config.vision.image_size
    tokens = num_image_tokens(side, side, config)
    ids, labels = [], []
    for turn, (question, answer) in enumerate(turns):
        prompt = encode(expand_images(build_prompt(question, images if turn == 0 else 0), tokens))
        reply = encode(" " + answer) + [config.eos_token_id]
        ids += prompt + reply
        labels += [IGNORE_INDEX] * len(prompt) + reply
    return ids, labels


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
PROJECTOR_NAMES = {"linear_1": "linear_1", "linear_2": "linear_2"}

TOWERS = [  # (published prefix, our prefix, table), tried in this order; the layout has been renamed twice on the hub
    ("vision_tower.vision_model.", "vision.", VISION_NAMES),
    ("vision_tower.", "vision.", VISION_NAMES),
    ("multi_modal_projector.", "mm_projector.", PROJECTOR_NAMES),
    ("language_model.model.", "language.", LANGUAGE_NAMES),
    ("language_model.", "language.", LANGUAGE_NAMES | {"lm_head": "lm_head"}),
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
    """The published config.json (a dict) -> LLaVAConfig. Fields it leaves out have the published classes' defaults."""
    if raw.get("model_type") != "llava":
        raise ValueError(f"{folder} holds a {raw.get('model_type')!r} checkpoint; llava.py reads 'llava'")
    published_vision, published_text = raw.get("vision_config") or {}, raw.get("text_config") or {}
    kinds = (published_vision.get("model_type", "clip_vision_model"), published_text.get("model_type", "llama"))
    if kinds != ("clip_vision_model", "llama"):
        raise ValueError(f"{folder} joins {kinds[0]!r} and {kinds[1]!r}; llava.py reads 'clip_vision_model' and 'llama'")
    heads = published_text.get("num_attention_heads", 32)
    published_text = published_text | {"num_key_value_heads": published_text.get("num_key_value_heads") or heads}
    default = PRESETS["llava-1.5-7b"]
    vision = replace_published(
        default.vision,
        published_vision,
        dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", mlp_width="intermediate_size")
        | dict(activation="hidden_act", norm_eps="layer_norm_eps", image_size="image_size", patch_size="patch_size"),
    )
    language = replace_published(
        replace(default.language, vocab_size=32000, context=2048, norm_eps=1e-6),  # what LlamaConfig means by silence
        published_text,
        dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", mlp_width="intermediate_size")
        | dict(kv_heads="num_key_value_heads", vocab_size="vocab_size", context="max_position_embeddings")
        | dict(norm_eps="rms_norm_eps", rope_base="rope_theta"),
    )
    rope = published_text.get("rope_parameters") or published_text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{folder} scales its rotary positions ({rope}), which llava.py does not")
    language = replace(
        language,
        rope_base=rope.get("rope_theta", language.rope_base),
        tie_embeddings=raw.get("tie_word_embeddings", False) or published_text.get("tie_word_embeddings", False),
    )
    return LLaVAConfig(
        image_config_from_published(vision, folder),
        language,
        feature_layer=raw.get("vision_feature_layer", -2),
        keep_class_token=raw.get("vision_feature_select_strategy", "default") == "full",
        image_token_id=raw.get("image_token_index", raw.get("image_token_id", 32000)),
        eos_token_id=published_text.get("eos_token_id", 2),
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
    """Modules, shapes, what trains in which stage, visual tokens, FLOPs and KV-cache bytes of a preset, as text."""
    config = find_preset(name)
    with torch.device("meta"):
        model = LLaVA(config)
    side, c = config.vision.image_size, config.language
    tokens, words = num_image_tokens(side, side, config), 64
    pixels = torch.empty(1, 3, side, side, device="meta")
    prompt = torch.empty(1, tokens + words, c.width, device="meta")
    total = count_parameters(model)
    stages = []
    for stage in (1, 2):
        trained = sum(p.numel() for p in freeze(model, stage))
        stages.append(f"stage {stage}: {trained:,} trained ({100 * trained / total:.1f} %), {total - trained:,} frozen")
    cache = 2 * c.layers * c.kv_heads * c.head_width  # numbers per token: keys and values of every layer
    return "\n".join(
        [
            f"{name}: {total:,} parameters, projector {config.projector}",
            "",
            table(describe(model)),
            "",
            *stages,
            f"image {side} x {side} -> {tokens} tokens in the decoder ({side} // {config.vision.patch_size} squared"
            f"{', and the class token' if config.keep_class_token else ''})",
            f"FLOPs: {count_flops(lambda: model.encode_image(pixels)):,} to encode an image,"
            f" {count_flops(lambda: model.language.hidden(prompt)):,} to read it with {words} words,",
            f"{2 * (count_parameters(model.language) - c.vocab_size * c.width * (not c.tie_embeddings)):,} for each new word, but for its attention",
            f"KV cache: {2 * cache:,} bytes a token in 16 bits, {2 * cache * tokens:,} for one image",
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_trace():
    """The shapes through one forward pass of the tiny model, with random weights."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    model = LLaVA(config)
    side = config.vision.image_size
    tokens = num_image_tokens(side, side, config)
    ids = torch.randint(0, 400, (2, 4 + tokens + 6))
    ids[:, 4 : 4 + tokens] = config.image_token_id
    with torch.no_grad(), trace() as t:
        model(ids, torch.randn(2, 3, side, side))
    return f"tiny, random weights, 2 rows of 4 words, {tokens} image tokens and 6 words\n\n{t}"


def show_mask():
    """Who may look at whom, drawn from the same rule that the attention kernels follow."""
    padded = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0]])
    return "\n\n".join(
        [
            "rows look at columns; # may, . may not",
            "vision tower: the class token and all patches see each other\n" + draw_mask(5, 5),
            "decoder: causal over words and patches alike, here 2 words, 4 patches, 2 words\n"
            + draw_mask(8, 8, causal=True),
            "decoder, a row with 2 tokens of padding on the left\n"
            + draw_mask(8, 8, causal=True, q_segments=padded, k_segments=padded),
            "decoder with a KV cache: 2 new tokens after 6 cached ones\n" + draw_mask(2, 8, causal=True),
        ]
    )


def answer(model, images, question, encode, decode, max_new_tokens=32):
    """One question about some images -> the model's answer as text."""
    device = model.mm_projector.linear_1.weight.device
    pixels = preprocess(images, model.config.vision).to(device) if images else None
    side = model.config.vision.image_size
    prompt = expand_images(build_prompt(question, len(images)), num_image_tokens(side, side, model.config))
    ids = torch.tensor([encode(prompt)], device=device)
    room = model.config.language.context - ids.shape[1]
    if room < 1:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, the context holds {room + ids.shape[1]}: shorten it")
    eos = model.config.eos_token_id
    new = model.generate(ids, pixels, max_new_tokens=min(max_new_tokens, room), eos_id=eos)[0].tolist()
    return decode([i for i in new if i != eos]).strip()


def run_weights(args):
    """--weights DIR --image FILE --prompt TEXT: a published checkpoint answers about your own image."""
    if not args.prompt:
        raise ValueError("--weights needs --prompt, as in --weights DIR --image photo.jpg --prompt 'What is unusual here?'")
    images = [load_image(path) for path in args.image]
    for question in args.prompt:
        build_prompt(question, len(images))  # a placeholder too many is found before gigabytes are read
    folder = checkpoint_folder(args.weights)
    config_from_published(read_config(folder), folder)  # so is a checkpoint of another family
    tokenizer = load_tokenizer(folder)
    model = LLaVA.from_pretrained(folder, getattr(torch, args.dtype), check_device(args.device))
    for question in args.prompt:
        print(answer(model, images, question, lambda text: tokenizer.encode(text).ids, tokenizer.decode))


@torch.no_grad()
def answer_attention(model, pixels, ids):
    """Where the decoder looks when it is about to answer: attention from the last token of the prompt to the patches,
    mean over heads and layers, [rows, columns]. pixels [1,3,H,W], ids [1,T] with one image, no class token kept."""
    with trace(maps=True) as t:
        model(ids, pixels)
    maps = torch.stack([x for name, x in t.rows if name == "decoder attention weights"])  # [layers,1,H,T,T]
    is_image = ids[0] == model.config.image_token_id
    return maps[:, 0, :, -1][..., is_image].mean((0, 1)).view(patch_grid(*pixels.shape[2:], model.config.vision)).cpu()


def heat_picture(image, heat, size):
    """The image, darkened where little attention falls."""
    shade = (255 * heat / heat.max()).to(torch.uint8).numpy()
    shade = Image.fromarray(shade).resize((size, size), Image.Resampling.NEAREST)
    image = image.resize((size, size), Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size), shade)


def draw_answers(rows, file, size=96):
    """PNG: for each (image, heat before, heat after, text) the image, where the answer looked, and the text."""
    page = Image.new("RGB", (3 * size + 360, len(rows) * (size + 8) + 24), "white")
    pen = ImageDraw.Draw(page)
    for x, title in ((4, "image"), (size + 8, "looks, untrained"), (2 * size + 12, "looks, trained")):
        pen.text((x, 4), title, fill="black")
    for i, (image, before, after, text) in enumerate(rows):
        y = 24 + i * (size + 8)
        page.paste(image.resize((size, size), Image.Resampling.NEAREST), (4, y))
        page.paste(heat_picture(image, before, size), (size + 8, y))
        page.paste(heat_picture(image, after, size), (2 * size + 12, y))
        pen.multiline_text((3 * size + 24, y + 8), text, fill="black", spacing=6)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file)


def demo(args):
    """Train the toy LLaVA in front of the reader if it is not cached, then let it answer about images it never saw."""
    import train_tiny as tiny

    device = check_device(args.device)
    own = [load_image(path) for path in args.image]  # wrong input is found before the training
    side = PRESETS["tiny"].vision.image_size
    for question in args.prompt:
        prompt = expand_images(build_prompt(question, len(own) or 1), num_image_tokens(side, side, PRESETS["tiny"]))
        tokens = len(tiny.encode(prompt))
        if tokens + 16 > PRESETS["tiny"].language.context:
            raise ValueError(f"the prompt has {tokens} tokens, the context holds {PRESETS['tiny'].language.context}: shorten it")
    rng = tiny.rng_for("llava demo")
    asked = tiny.vqa_questions(rng, 6)
    print("In goes an image of 32 x 32 pixels, 16 patches, and a question; the decoder reads both as one row of 16 vectors")
    print(f"and words:\n    {build_prompt(asked[0][1])!r}")
    untrained = tiny.untrained_llava(args.device)
    said = tiny.answers(untrained, [scene for scene, _, _ in asked[:3]], [question for _, question, _ in asked[:3]])
    print(f"before training it says: {', '.join(repr(text[:24]) for text in said)}")
    model = tiny.demo_llava(args.device)
    if own or args.prompt:
        for question in args.prompt or [tiny.DESCRIBE]:
            images = own or [tiny.draw(asked[0][0])]
            print(f"{question} -> {answer(model, images, question, tiny.encode, tiny.decode)}")
        return
    said, rows = tiny.answers(model, [a[0] for a in asked], [a[1] for a in asked]), []
    print("\nafter training, about images it has never seen:")
    for (scene, question, right), text in zip(asked, said, strict=True):
        verdict = "right" if text == right else f"wrong, it is {right}"
        print(f"    [{tiny.caption(scene)}]\n        {question} -> {text} ({verdict})")
        pixels = preprocess([tiny.draw(scene)], model.config.vision).to(device)
        prompt = expand_images(build_prompt(question), num_image_tokens(*pixels.shape[2:], model.config))
        ids = torch.tensor([tiny.encode(prompt)], device=device)
        heats = [answer_attention(m, pixels, ids) for m in (untrained, model)]
        rows.append((tiny.draw(scene), *heats, f"{question}\n{text}\n({verdict})"))
    many = tiny.vqa_questions(tiny.rng_for("llava demo, many"), 200)
    print(f"of 200 more questions {tiny.accuracy(model, many):.0%} are answered rightly (guessing: {tiny.guess(many):.0%})")
    if not tiny.recipe_is_done("llava", tiny.STAGE2_STEPS):
        print("(this model had half the training; python train_tiny.py llava gives it all, and the demo then shows that one)")
    print("\nwhere the answer to the first question looked, untrained and trained (attention on 16 patches, in 1/100):")
    for left, right in zip(rows[0][1].tolist(), rows[0][2].tolist(), strict=True):
        print("    " + " ".join(f"{100 * v:5.1f}" for v in left) + "      " + " ".join(f"{100 * v:5.1f}" for v in right))
    file = tiny.RUNS / "llava" / "demo.png"
    draw_answers(rows, file)
    print(f"written: {file} (each image, its answer, and where the answer looked)")


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
    sys.modules.setdefault("llava", sys.modules[__name__])  # train_tiny imports llava: let it find this very module
    main()
