"""
Flamingo and IDEFICS: a frozen language model with gated cross-attention blocks inserted; the gates start at zero.

    Flamingo  Alayrac et al. 2022, Flamingo: a Visual Language Model for Few-Shot Learning, arXiv 2204.14198
    IDEFICS   Laurencon et al. 2023, OBELICS, arXiv 2306.16527: the open reproduction, on LLaMA and CLIP's ViT-H

The idea. A large language model learns a new task from a few examples in its context. To add images without losing
this ability, keep the model frozen and insert new blocks between its layers. In each of them the words attend to an
image by cross-attention, and the result is added through a gate, tanh(alpha) with alpha = 0 at initialisation. Before
training the whole model is therefore the language model, bit for bit. Training opens the gates as far as it helps
(deep fusion, type A).

    image or video [F,3,H,W]                      "<image> dax<|endofchunk|><image> wug<|endofchunk|><image>"
      | vision encoder (tower), frozen              | token ids [B,T], one <image> per image or video
    [F,N,Dv]                                        | embedding table, frozen but for the new tokens
      | + time embedding of each frame            [B,T,D]
    [F*N,Dv]                                        |        +- GATED XATTN-DENSE, new ------------------------+
      | PerceiverResampler: L learned latents       v        |  x = x + tanh(attn_gate) * cross_attn(x, latents)|
      | attend to all of it, in a few layers      before every |  x = x + tanh(ffw_gate)  * ffw(x)                |
    [L,Dv] --- keys and values of every ------>   n-th layer:+--------------------------------------------------+
               inserted block                       |  layer of the language model, frozen
                                                  logits [B,T,V] -> " dax"

A word attends to one image only, the last one before it. It knows of earlier images through the language model's own
self-attention (paper 2.3). So any number of images and videos may stand between the words, more than in training too.
Words before the first image attend to nothing, and cross-attention returns exactly zero for them.

    words            Look  <image>  a  dog  <image>  a  cat      queries are words, keys the latents of images 0 and 1
    segments           -1        0  0    0        1  1    1      the image a word attends to: cumsum(ids == <image>) - 1

                     . . . .
                     # # . .        that is the whole mask: the segments of query and key must be equal,
                     # # . .        Rule(q_segments=[-1 0 0 0 1 1 1], k_segments=[0 0 1 1])
                     # # . .
                     . . # #
                     . . # #
                     . . # #

Letters. B batch, T text length, M images and videos of one row, F frames, N features of one frame (its patches and the
class token), P patch size, L latents, Dv and D widths of tower and decoder, H heads, K key/value heads, Dh head width,
V vocabulary. In [F,3,H,W], H and W are the height and width of the pixels.

Three conventions on which code in this field disagrees
    RoPE    half-split pairing: dimension i turns with dimension i + Dh/2 (as LLaMA checkpoints on the hub are stored).
    masks   True means "may attend" or "real token".
    labels  have the same positions as ids; the shift by one happens in one place, language_loss.

Paper / published code / this file
    - The language model is Chinchilla in the paper, LLaMA in IDEFICS and here; the tower is an NFNet there, CLIP's ViT
      here.
    - Inside an inserted block the paper has LayerNorm and an MLP of 4 D with squared ReLU; OpenFlamingo has the same
      with GELU; IDEFICS has the parts of its decoder, RMSNorm and SwiGLU. FlamingoConfig.dense chooses.
    - IDEFICS normalises queries and keys per head (qk_norm), inserts a block before one layer in four, and has no time
      embeddings: to it a video is a set of frames without order.
    - Words before the first image. Cross-attention adds zero to them, but the inserted ffw runs on every word, here as
      in all published code. So model(ids) of text alone changes in training. The language model inside does not:
      model.language(ids) skips the inserted blocks, and its logits of all old tokens are bit-identical after training.
      Probabilities change, because the new tokens join the softmax.
    - The token <image> itself already attends to its image, as in IDEFICS and OpenFlamingo.
    - Documents. IDEFICS packs several into a row: after an end-of-sequence token no word attends to an earlier image.
      Here a row is one document.
    - Time embeddings of more frames than in training are interpolated linearly, as the paper does from 8 to 30. The toy
      is trained on images, so only its first time embedding is trained.
    - A generated <image> opens no image: the words after it attend to the image of the prompt's last token.
    "Published" in a docstring names the class of transformers, models/idefics.

What to try: --demo, and watch the gates open; --show-mask; gate="none" in the tiny preset (what is the first loss
then?); one latent instead of 4; subtract 1 in media_segments, so that every word attends to the wrong image (what can
still be learned?); train_tiny.py flamingo --ablations; a toy with videos (train_tiny.movie draws them).
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: its threads spin 0.2 ms when they wait, not 10

import json
import math
import re
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from kernels import Rule, apply_rope, attention, rope_1d

IGNORE_INDEX = -100  # a label that does not count; cross_entropy's own default

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class VisionConfig:
    image_size: int = 224
    patch_size: int = 14
    width: int = 768
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    activation: str = "gelu"  # "quick_gelu" in the toy, as in most of CLIP's own models
    norm_eps: float = 1e-5
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the pixels CLIP was trained on
    std: tuple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LanguageConfig:  # LLaMA-7B
    vocab_size: int = 32000  # with the new tokens
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32  # fewer than heads: grouped-query attention, only in the toy
    mlp_width: int = 11008  # 8/3 of the width: three matrices of SwiGLU cost what two of a 4x MLP do
    context: int = 2048
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    tie_embeddings: bool = False

    @property
    def head_width(self):
        return self.width // self.heads


@dataclass(frozen=True)
class ResamplerConfig:
    latents: int = 64  # the number of vectors that an image or a video of any length becomes
    layers: int = 6
    heads: int = 16
    head_width: int = 96
    mlp_width: int = 3072  # 4 times the width of the tower
    activation: str = "relu"  # IDEFICS; the paper squares it, OpenFlamingo has "gelu"
    qk_norm: bool = False
    frames: int = 0  # learned time embeddings; 0: none, as in IDEFICS, which was trained without videos


@dataclass(frozen=True)
class FlamingoConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    connector: str = "resampler"  # "mlp": every patch by itself, as in LLaVA; for comparison
    cross_every: int = 1  # 4: an inserted block before layers 0, 4, 8 ...
    gate: str = "scalar"  # one alpha per gate; "vector": one per channel; "none": no gates, for comparison
    dense: str = "swiglu"  # the parts of the decoder (IDEFICS); "gelu": LayerNorm and an MLP of 4 D (OpenFlamingo)
    qk_norm: bool = False
    image_token_id: int = 32001
    new_token_ids: tuple = (32000, 32001)  # tokens that the language model did not know: their embeddings are trained
    eos_token_ids: tuple = (2,)


# CLIP's ViT-H/14; LLaMA's 32000 words and two new ones, <fake_token_around_image> and <image>
VIT_H = VisionConfig(width=1280)
RESAMPLER = ResamplerConfig(mlp_width=5120, qk_norm=True)
LLAMA_7B = LanguageConfig(32002)
LLAMA_65B = LanguageConfig(32002, width=8192, layers=80, heads=64, kv_heads=64, mlp_width=22016, norm_eps=1e-5)
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of the toy's pixels

PRESETS = {
    # what train_tiny.py trains in front of you, on the toy CLIP's vision tower and a toy language model
    "tiny": FlamingoConfig(
        VisionConfig(32, 8, 96, layers=4, heads=4, mlp_width=384, activation="quick_gelu", mean=HALF, std=HALF),
        LanguageConfig(
            512, 96, layers=3, heads=2, kv_heads=1, mlp_width=256, context=256, norm_eps=1e-5, tie_embeddings=True
        ),
        ResamplerConfig(latents=4, layers=1, heads=2, head_width=48, mlp_width=192, qk_norm=True, frames=8),
        qk_norm=True,
        image_token_id=499,
        new_token_ids=(499, 507),
        eos_token_ids=(507,),
    ),
    "idefics-9b": FlamingoConfig(VIT_H, LLAMA_7B, RESAMPLER, cross_every=4, qk_norm=True),
    "idefics-80b": FlamingoConfig(VIT_H, LLAMA_65B, RESAMPLER, cross_every=4, qk_norm=True),
}


def num_image_tokens(height, width, config):
    """Vectors the decoder attends to for one image, or one video: L latents, whatever its size and length. With the
    "mlp" connector one per patch of each frame, and the class token. In the row of words an image is one token."""
    P = config.vision.patch_size
    if config.connector == "resampler":
        return config.resampler.latents
    return (height // P) * (width // P) + 1


# ----------------------------------------------------------------------------------------------------------------------
# Vision tower: CLIP's ViT


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)  # Hendrycks & Gimpel 2016, the sigmoid approximation of GELU


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu, "relu": F.relu}


class MLP(nn.Module):
    def __init__(self, width, mlp_width, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention; every patch attends to every patch."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x):
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,N,Dh]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: the residual stream x is only ever added to."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """ViT (Dosovitskiy et al. 2021, arXiv 2010.11929): an image is a sentence of patches.

    forward(pixels [n,3,H,W]) -> [n,N,Dv] after the last block, the class token first. The weights are always CLIP's.
    Published: IdeficsVisionTransformer.
    """

    def __init__(self, config):
        super().__init__()
        D, P, grid = config.width, config.patch_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=P, stride=P, bias=False)  # one linear map for every patch
        self.position_embedding = nn.Embedding(1 + grid * grid, D)
        self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        self.ln_pre = nn.LayerNorm(D, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(D, eps=config.norm_eps)  # CLIP's own, which IDEFICS does not apply to patches
        nn.init.normal_(self.position_embedding.weight, std=D**-0.5)

    def forward(self, pixels):
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # [n,Dv,rows,columns]
        x = x.flatten(2).transpose(1, 2)  # [n,N-1,Dv], patches in reading order
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [n,N,Dv]
        x = self.ln_pre(x + self.position_embedding.weight)
        for block in self.blocks:
            x = block(x)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Connector


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another; no biases. Published: IdeficsAttention.

    keys_values and forward are apart, so that what many words attend to is projected once. norm(Dh) makes a norm for
    the queries of each head and one for the keys: dot products then cannot grow with the activations.
    """

    def __init__(self, width, context_width, heads, head_width, norm=nn.Identity):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, heads * head_width, bias=False)
        self.k_proj = nn.Linear(context_width, heads * head_width, bias=False)
        self.v_proj = nn.Linear(context_width, heads * head_width, bias=False)
        self.o_proj = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm = norm(head_width)
        self.k_norm = norm(head_width)

    def keys_values(self, context):
        """context [B,S,Dc] -> k, v [B,H,S,Dh]."""
        k = self.k_proj(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.k_norm(k).to(v.dtype), v  # under torch.autocast a norm gives float32

    def forward(self, x, k, v, rule=None):
        """x [B,T,D] attends to k, v [B,H,S,Dh] as the rule says -> [B,T,D]; exactly 0 where it attends to nothing."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,T,Dh]
        o = attention(self.q_norm(q).to(v.dtype), k, v, rule)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class PerceiverLayer(nn.Module):
    """The latents attend to the features and to each other, in one attention (paper 2.1), then to an MLP; no gates.
    Published: IdeficsPerceiverAttention and IdeficsMLP."""

    def __init__(self, width, config):
        super().__init__()
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        norm = nn.LayerNorm if config.qk_norm else nn.Identity
        self.attn = CrossAttention(width, width, config.heads, config.head_width, norm)
        self.fc1 = nn.Linear(width, config.mlp_width, bias=False)
        self.fc2 = nn.Linear(config.mlp_width, width, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, latents, x, rule=None):
        q = self.norm_latents(latents)
        k, v = self.attn.keys_values(torch.cat([self.norm_media(x), q], dim=1))
        latents = latents + self.attn(q, k, v, rule)
        return latents + self.fc2(self.activation(self.fc1(self.norm_mlp(latents))))


class PerceiverResampler(nn.Module):
    """Features of an image or a video, of any length -> always L latents (paper 2.1).

    forward(x [n,F,N,Dv], frame_mask [n,F] or None; True = real frame) -> [n,L,Dv]. Cost and memory grow with F * N, not
    with its square, since only the L latents are queries. Published: IdeficsPerceiverResampler.
    """

    def __init__(self, width, config):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.time_embeddings = nn.Parameter(torch.randn(config.frames, width)) if config.frames else None
        self.layers = nn.ModuleList(PerceiverLayer(width, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def times(self, frames):
        """Time embeddings [frames,Dv] of one video. If it has more frames than the table, the table is interpolated."""
        table = self.time_embeddings
        if frames <= len(table):
            return table[:frames]
        return F.interpolate(table.T[None], size=frames, mode="linear", align_corners=True)[0].T

    def forward(self, x, frame_mask=None):
        n, frames, N, _ = x.shape
        L = len(self.latents)
        if self.time_embeddings is not None and frame_mask is None:
            x = x + self.times(frames)[:, None]  # all patches of a frame have the time of the frame
        elif self.time_embeddings is not None:
            times = x.new_zeros(n, frames, x.shape[-1])
            times[frame_mask] = torch.cat([self.times(count) for count in frame_mask.sum(1).tolist()])
            x = x + times[:, :, None]
        x = x.flatten(1, 2)  # [n,F*N,Dv]: time and space in one row
        rule = None
        if frame_mask is not None:
            segments = (frame_mask.int() - 1).repeat_interleave(N, dim=1)  # -1 for padding, to which nothing attends
            rule = Rule(k_segments=F.pad(segments, (0, L)))  # [n,F*N+L], the latents themselves are keys too
        latents = self.latents.expand(n, L, -1)
        for layer in self.layers:
            latents = layer(latents, x, rule)
        return self.norm(latents)


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the language model: LLaMA's


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
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        D, Dh = config.width, config.head_width
        self.q_proj = nn.Linear(D, config.heads * Dh, bias=False)
        self.k_proj = nn.Linear(D, config.kv_heads * Dh, bias=False)
        self.v_proj = nn.Linear(D, config.kv_heads * Dh, bias=False)
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


# ----------------------------------------------------------------------------------------------------------------------
# Inserted blocks


class GatedBlock(nn.Module):
    """GATED XATTN-DENSE (paper 2.2): words attend to latents, then an MLP follows, each behind a gate of its own.

    tanh(0) = 0: a new block adds nothing. The gradient of tanh at 0 is 1, so a gate can open; what is behind a closed
    gate has no gradient until the gate has begun to open. Published: IdeficsGatedCrossAttentionLayer.
    """

    def __init__(self, config):
        super().__init__()
        c = config.language
        if config.dense == "swiglu":
            norm = partial(RMSNorm, eps=c.norm_eps)
            mlp = SwiGLU(c.width, c.mlp_width)
        else:
            norm = partial(nn.LayerNorm, eps=c.norm_eps)
            up = nn.Linear(c.width, 4 * c.width, bias=False)
            down = nn.Linear(4 * c.width, c.width, bias=False)
            mlp = nn.Sequential(up, nn.GELU(), down)
        head_norm = norm if config.qk_norm else nn.Identity
        self.input_layernorm = norm(c.width)
        self.cross_attn = CrossAttention(c.width, config.vision.width, c.heads, c.head_width, head_norm)
        self.post_attention_layernorm = norm(c.width)
        self.mlp = mlp
        size = c.width if config.gate == "vector" else 1
        self.attn_gate = nn.Parameter(torch.zeros(size)) if config.gate != "none" else None
        self.ffw_gate = nn.Parameter(torch.zeros(size)) if config.gate != "none" else None

    def forward(self, x, k, v, rule):
        """x [B,T,D] attends to k, v [B,H,M*L,Dh], the projected latents, each word to those of its image -> [B,T,D]."""
        attn_gate = 1.0 if self.attn_gate is None else self.attn_gate.tanh()
        ffw_gate = 1.0 if self.ffw_gate is None else self.ffw_gate.tanh()
        x = x + attn_gate * self.cross_attn(self.input_layernorm(x), k, v, rule)
        return x + ffw_gate * self.mlp(self.post_attention_layernorm(x))


@dataclass
class Media:
    """What the inserted blocks attend to: computed once per call, then passed to every layer and for every new word."""

    inserted: dict  # layer -> (the block inserted before it, its keys, its values), keys and values [B,H,M*L,Dh]
    q_segments: torch.Tensor  # [B,T], the image that each token of the prompt attends to: see media_segments
    k_segments: torch.Tensor  # [B,M*L], the image that each latent belongs to


# ----------------------------------------------------------------------------------------------------------------------
# Language model


class LanguageModel(nn.Module):
    """LLaMA (Touvron et al. 2023, arXiv 2302.13971), with a place for the inserted blocks. Published: IdeficsModel.

    forward(ids [B,T], mask [B,T] or None; True = real token) -> logits [B,T,V], without the inserted blocks.
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
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # 2 * layers of these add up in the residual
                nn.init.normal_(parameter, std=config.width**-0.5 / math.sqrt(2 * config.layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.width**-0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # small, so that the first loss is ln V: nothing is preferred

    def hidden(self, x, mask=None, cache=None, media=None):
        """Embeddings x [B,T,D] of new tokens, behind those in the cache -> hidden states [B,T,D] after the last norm.

        mask [B,length+T] covers the cached tokens too. Positions count real tokens only, so padding shifts nothing.
        media: a Media, or None to skip the inserted blocks. Tokens after the prompt attend to the image of its last.
        """
        B, T, _ = x.shape
        past = 0 if cache is None else cache.length
        if past + T > self.config.context:
            raise ValueError(f"{past + T} tokens do not fit the context of {self.config.context}")
        rule = Rule(causal=True)
        positions = torch.arange(past, past + T, device=x.device).expand(B, T)
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
            segments = mask.int() - 1  # 0 for a real token, -1 for padding, to which nothing attends
            rule = Rule(causal=True, q_segments=segments[:, past:], k_segments=segments)
        rotation = rope_1d(positions, self.config.head_width, self.config.rope_base)  # cosines and sines
        if media is not None:
            images = media.q_segments if past == 0 else media.q_segments[:, -1:].expand(B, T)
            to_media = Rule(q_segments=images, k_segments=media.k_segments)
        for i, layer in enumerate(self.layers):
            if media is not None and i in media.inserted:
                block, k, v = media.inserted[i]
                x = block(x, k, v, to_media)
            x = layer(x, rotation, rule, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, ids, mask=None):
        return self.lm_head(self.hidden(self.embed_tokens(ids), mask))

    @torch.no_grad()
    def generate(
        self, x, mask=None, max_new_tokens=64, temperature=0.0, top_k=None, eos_id=None, generator=None, media=None
    ):
        """Continue prompts, given as embeddings x [B,T,D] and padded on the left -> new ids [B,n].

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
            h = self.hidden(x, mask, cache, media)[:, -1]  # [B,D]
            next_ids = sample(self.lm_head(h), temperature, top_k, generator)  # [B]
            if len(ends):
                next_ids = next_ids.masked_fill(done, ends[0])
                done |= torch.isin(next_ids, ends)
            new = torch.cat([new, next_ids[:, None]], dim=1)
            x = self.embed_tokens(next_ids[:, None])  # [B,1,D]
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
# The model


def media_segments(ids, config, mask=None):
    """The image or video that each token attends to, the last one at or before it; -1 before the first, and for padding
    before it. ids [B,T], mask [B,T] or None (True = real token) -> [B,T].

    Look <image> a dog <image> a cat  ->  -1 0 0 0 1 1 1
    """
    is_image = ids == config.image_token_id
    if mask is not None:
        is_image = is_image & mask
    return is_image.cumsum(1, dtype=torch.int32) - 1


def real_frames(media, media_mask=None):
    """media [B,M,F,3,H,W], media_mask [B,M] or [B,M,F] or None -> [B,M,F], True = real frame."""
    if media_mask is None:
        return torch.ones(media.shape[:3], dtype=torch.bool, device=media.device)
    if media_mask.ndim == 2:
        media_mask = media_mask.unsqueeze(2)
    return media_mask.bool().expand(media.shape[:3])


class Flamingo(nn.Module):
    """Tower, connector, language model and the blocks inserted in it. Published: IdeficsForVisionText2Text."""

    def __init__(self, config):
        super().__init__()
        assert config.connector in ("resampler", "mlp"), config.connector
        assert config.gate in ("scalar", "vector", "none"), config.gate
        assert config.dense in ("swiglu", "gelu"), config.dense
        self.config = config
        self.vision = VisionTower(config.vision)
        Dv = config.vision.width
        if config.connector == "resampler":
            self.connector = PerceiverResampler(Dv, config.resampler)
        else:
            self.connector = MLP(Dv, 4 * Dv, "gelu")
        self.language = LanguageModel(config.language)
        blocks = range(0, config.language.layers, config.cross_every)
        self.gated_blocks = nn.ModuleList(GatedBlock(config) for _ in blocks)

    def encode_media(self, media, media_mask=None):
        """media [B,M,F,3,H,W] (an image is a video of one frame) -> latents [B,M,L,Dv], L whatever M and F are.

        media_mask [B,M], or [B,M,F] where videos have different lengths; True = real. Padding is not encoded. Frames
        are encoded 64 at a time, so that the memory of the tower does not grow with the length of a video.
        """
        real = real_frames(media, media_mask)  # [B,M,F]
        frames = media.flatten(0, 2) if media_mask is None else media[real]  # [real frames,3,H,W]
        features = torch.cat([self.vision(part) for part in frames.split(64)])  # [real frames,N,Dv]
        x = features.new_zeros(*real.shape, *features.shape[1:])  # [B,M,F,N,Dv]
        x[real] = features
        x = x.flatten(0, 1)  # [B*M,F,N,Dv]
        if self.config.connector == "resampler":
            latents = self.connector(x, None if media_mask is None else real.flatten(0, 1))
        elif media_mask is None or media_mask.ndim == 2:
            latents = self.connector(x.flatten(1, 2))
        else:
            raise ValueError("videos of different lengths in one batch need the resampler: it can leave frames out")
        return latents.unflatten(0, media.shape[:2])

    def project(self, latents, q_segments, real):
        """latents [B,M,L,Dv], q_segments [B,T] of the words, real [B,M] (False = padding) -> Media for `hidden`."""
        number = (real.cumsum(1, dtype=torch.int32) - 1).masked_fill(~real, -1)  # [B,M]: the i-th real one is image i
        k_segments = number.repeat_interleave(latents.shape[2], dim=1)  # [B,M*L]
        row = latents.flatten(1, 2)  # [B,M*L,Dv]
        inserted = {}
        for n, block in enumerate(self.gated_blocks):
            k, v = block.cross_attn.keys_values(row)
            inserted[n * self.config.cross_every] = (block, k, v)
        return Media(inserted, q_segments, k_segments)

    def read_media(self, ids, media=None, mask=None, media_mask=None):
        """What the words ids [B,T] attend to, as Media; arguments as in forward. Raises ValueError if a row has more or
        fewer <image> than images: a model that attends to the wrong one gives no other sign of it."""
        if media is None:
            side = self.config.vision.image_size
            media = torch.empty(len(ids), 0, 1, 3, side, side, device=ids.device)
        if media.ndim == 5:  # [B,M,3,H,W], images: videos of one frame
            media = media.unsqueeze(2)
        q_segments = media_segments(ids, self.config, mask)
        real = real_frames(media, media_mask).any(2)  # [B,M]
        placed, given = q_segments[:, -1] + 1, real.sum(1)  # the last token attends to the last image
        if not torch.compiler.is_compiling() and placed.tolist() != given.tolist():
            counts = f"{placed.tolist()} <image> in their ids, but {given.tolist()} images or videos were given"
            raise ValueError(f"the rows have {counts}")
        return self.project(self.encode_media(media, media_mask), q_segments, real)

    def forward(self, ids, media=None, mask=None, media_mask=None):
        """ids [B,T], media [B,M,F,3,H,W] or None, masks (True = real) -> logits [B,T,V]. Which image a token attends to
        follows from ids: the i-th <image> of a row is its i-th real medium."""
        read = self.read_media(ids, media, mask, media_mask)
        return self.language.lm_head(self.language.hidden(self.language.embed_tokens(ids), mask, media=read))

    @torch.no_grad()
    def generate(self, ids, media=None, mask=None, media_mask=None, **options):
        """Continue each row of ids [B,T], padded on the left -> new ids [B,n]. Media are encoded once. options: see
        LanguageModel.generate."""
        if not ids.numel():
            raise ValueError(f"nothing to continue: the ids have the shape {list(ids.shape)}")
        read = self.read_media(ids, media, mask, media_mask)
        return self.language.generate(self.language.embed_tokens(ids), mask, media=read, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """A published IDEFICS: a folder in the Hugging Face layout or of train_tiny.py, or a hub id."""
        folder = checkpoint_folder(path)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config_from_folder(folder))
        model.register_load_state_dict_pre_hook(fold_vocabulary)
        return load_weights(model, folder, dtype, device).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Training: what moves, and what is counted


TRAINED = (  # how the names of the parameters begin that train (paper 2.2); of the two tables only the new tokens' rows
    "connector.",
    "gated_blocks.",
    "language.embed_tokens.",
    "language.lm_head.",
)


def freeze(model):
    """Set what trains and return it: never the tower, never the language model, but for the new tokens.

    Their embeddings are rows of a frozen table. A hook on the table sets the gradient of all other rows to zero. A
    copy.deepcopy of the model has no hooks: call freeze on the copy. And give the table no weight decay, which would
    move the other rows without a gradient.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    new = torch.tensor(model.config.new_token_ids)

    def new_rows_only(grad):
        kept = torch.zeros_like(grad)
        kept[new] = grad[new]
        return kept

    for table in {model.language.embed_tokens.weight, model.language.lm_head.weight}:  # a set: tied ones are one
        table.register_hook(new_rows_only)
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


def text_labels(ids, mask, config):
    """ids and mask [B,T] -> labels for language_loss [B,T]: every real token but <image>. Where an image comes next is
    not predicted: the likelihood is that of the text (paper 2, equation 1)."""
    return ids.masked_fill(~mask | (ids == config.image_token_id), IGNORE_INDEX)


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
        raise ValueError(f"the prompt has {placed} <image> for {images} image(s): write one each, or none")
    return text if placed else "<image>" * images + text


def surround_images(prompt):
    """The form of images in an IDEFICS prompt: a <fake_token_around_image> before, between and after them.

    >>> surround_images("<image><image> two dogs")
    '<fake_token_around_image><image><fake_token_around_image><image><fake_token_around_image> two dogs'
    """
    fake = "<fake_token_around_image>"
    return re.sub("(?:<image>)+", lambda run: fake + run[0].replace("<image>", "<image>" + fake), prompt)


def pad_rows(rows, value, left=False):
    """Lists of ids of different length -> (tensor [B,T] padded with value, mask [B,T]; True = real token)."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), value), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row), True
    return ids, mask


def answer(model, images, prompt, encode, decode, max_new_tokens=32):
    """Continue a prompt that has one <image> for each of some PIL images -> the new text. IDEFICS needs surround_images
    first. encode: text -> list of ids, with the begin-of-text token in front if the language model has one."""
    config, device = model.config, model.language.norm.weight.device
    media = preprocess(images, config.vision).to(device)[None, :, None] if images else None  # [1,M,1,3,H,W]
    ids = torch.tensor([encode(prompt)], device=device)
    room = config.language.context - ids.shape[1]
    if room < 1:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, the context holds {config.language.context}")
    new = model.generate(ids, media, max_new_tokens=min(max_new_tokens, room), eos_id=config.eos_token_ids)
    return decode([i for i in new[0].tolist() if i not in config.eos_token_ids]).strip()


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to pixels, exactly as the published processor does


def preprocess(images, config):
    """PIL images -> pixels [n,3,image_size,image_size], float32, equal to those of transformers' IdeficsImageProcessor:
    both sides are resized to image_size, nothing is cut off."""
    size, batch = config.image_size, []
    for image in images:
        image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.asarray(image, dtype=np.float64) * (1 / 255)).astype(np.float32)
        batch.append((pixels - np.float32(config.mean)) / np.float32(config.std))
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

RENAMED = (  # published names to ours, as regular expressions, all applied in this order; LLaMA's own names are ours
    (r"^model\.vision_model\.((embeddings|encoder)\.)?", "vision."),
    (r"^vision\.pre_layrnorm\.", "vision.ln_pre."),  # the published spelling
    (r"^vision\.post_layernorm\.", "vision.ln_post."),
    (r"^vision\.layers\.(\d+)\.self_attn\.", r"vision.blocks.\1.attn."),
    (r"^vision\.layers\.(\d+)\.layer_norm(\d)\.", r"vision.blocks.\1.ln_\2."),
    (r"^vision\.layers\.", "vision.blocks."),
    (r"^model\.perceiver_resampler\.", "connector."),
    (r"^connector\.layer_norm\.", "connector.norm."),
    (r"^connector\.blocks\.", "connector.layers."),  # a published block is a pair: 0 is the attention, 1 the MLP
    (r"\.0\.context_layer_norm\.", ".norm_media."),
    (r"\.0\.latents_layer_norm\.", ".norm_latents."),
    (r"^(connector\.layers\.\d+)\.0\.", r"\1.attn."),
    (r"\.output_proj\.", ".o_proj."),
    (r"^(connector\.layers\.\d+)\.1\.ln\.", r"\1.norm_mlp."),
    (r"^(connector\.layers\.\d+)\.1\.fc\.", r"\1.fc1."),
    (r"^(connector\.layers\.\d+)\.1\.c_proj\.", r"\1.fc2."),
    (r"^model\.gated_cross_attn_layers\.", "gated_blocks."),
    (r"\.alpha_cross_attn$", ".attn_gate"),
    (r"\.alpha_dense$", ".ffw_gate"),
    (r"\.([qk])_layer_norm\.", r".\1_norm."),  # of both kinds of cross-attention
    (r"^(model|lm_head)\b", r"language.\1"),
    (r"^language\.model\.", "language."),
    (r"\.additional_(embedding|fc)\.weight$", ".additional"),  # the new tokens, see fold_vocabulary
)


def our_tensors(name, tensor):
    """A published tensor -> the pairs (our name, tensor) that it becomes."""
    if name.endswith(("position_ids", "rotary_emb.inv_freq")):
        return []  # buffers of older files; both are computed here
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    if name.endswith("_gate"):
        tensor = tensor.flatten()  # published as [1], or as [1,1,D] where every channel has its own
    return [(name, tensor)]


def fold_vocabulary(model, weights, *_):
    """A hook of load_state_dict. Published files keep the embeddings of the new tokens in tables of their own. Here
    they are the last rows of the language model's tables."""
    # where a file has only one of two tied tables, load_weights gives it both names
    tied = weights.get("language.lm_head.weight") is weights.get("language.embed_tokens.weight")
    for table in ("language.embed_tokens", "language.lm_head"):
        old, new = f"{table}.weight", f"{table}.additional"
        if old in weights and new in weights:
            weights[old] = nn.Parameter(torch.cat([weights[old], weights.pop(new)]))
    if tied:
        weights["language.lm_head.weight"] = weights["language.embed_tokens.weight"]


def checkpoint_folder(path):
    """A local folder as it is. A hub id such as "HuggingFaceM4/idefics-9b" is downloaded first."""
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


SHAPE = dict(layers="num_hidden_layers", heads="num_attention_heads", mlp_width="intermediate_size")
VISION_FIELDS = SHAPE | dict(width="embed_dim", image_size="image_size", patch_size="patch_size")
VISION_FIELDS |= dict(activation="hidden_act", norm_eps="layer_norm_eps")
LANGUAGE_FIELDS = SHAPE | dict(width="hidden_size", kv_heads="num_attention_heads", vocab_size="vocab_size")
LANGUAGE_FIELDS |= dict(context="max_position_embeddings", norm_eps="rms_norm_eps", rope_base="rope_theta")
LANGUAGE_FIELDS |= dict(tie_embeddings="tie_word_embeddings")
RESAMPLER_FIELDS = dict(latents="resampler_n_latents", layers="resampler_depth", heads="resampler_n_heads")
RESAMPLER_FIELDS |= dict(head_width="resampler_head_dim", qk_norm="qk_layer_norms_perceiver")
GATES = dict(float="scalar", vector="vector")  # alpha_type -> gate
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
    """config.json and preprocessor_config.json -> FlamingoConfig. What they leave out has the published classes'
    defaults, which are those of the dataclasses."""
    raw = json.loads((folder / "config.json").read_text())
    require(folder, raw, model_type="idefics", hidden_act="silu", alpha_type=tuple(GATES))
    if not raw.get("use_resampler"):
        raise ValueError(f"{folder} has no resampler (use_resampler is false), which flamingo.py needs")
    # older files have vision_embed_dim where newer ones have vision_config: {embed_dim}
    tower = {name.removeprefix("vision_"): value for name, value in raw.items() if name.startswith("vision_")}
    tower |= part(raw, "vision_config")
    require(folder, tower, hidden_act=tuple(ACTIVATIONS))
    vision = VisionConfig(**found(tower, VISION_FIELDS, VisionConfig))
    perceiver = raw | part(raw, "perceiver_config")
    resampler = ResamplerConfig(**found(perceiver, RESAMPLER_FIELDS, ResamplerConfig))
    rope = part(raw, "rope_parameters") or part(raw, "rope_scaling")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{folder} scales its rotary positions ({rope}), which flamingo.py does not")
    language = LanguageConfig(**found(raw | rope, LANGUAGE_FIELDS, LanguageConfig))
    old = language.vocab_size
    new = found(raw, dict(vocab_size="additional_vocab_size"), LanguageConfig).get("vocab_size", 0)
    ends = found(raw, ENDS, FlamingoConfig) | found(read_json(folder / "generation_config.json"), ENDS, FlamingoConfig)
    ends = ends.get("eos_token_ids", FlamingoConfig.eos_token_ids)
    if new > 2:  # a model taught to chat has a third new token, <end_of_utterance>
        ends = (old + 2, *ends)
    return FlamingoConfig(
        replace(vision, **pixels_from_published(folder, vision)),
        replace(language, vocab_size=old + new),
        replace(resampler, mlp_width=4 * vision.width),
        gate=GATES[raw.get("alpha_type") or "float"],
        **found(raw, dict(cross_every="cross_layer_interval", qk_norm="qk_layer_norms"), FlamingoConfig),
        image_token_id=old + min(1, new - 1),  # the new tokens are <fake_token_around_image>, <image>
        new_token_ids=tuple(range(old, old + new)),
        eos_token_ids=ends,
    )


def pixels_from_published(folder, vision):
    """What the processor's file says of normalising, as fields of VisionConfig."""
    processor = processor_of(folder)
    require(folder, processor, do_center_crop=False, resample=3, rescale_factor=1 / 255)  # 3: bicubic
    require(folder, processor, do_resize=True, do_rescale=True, do_normalize=True, image_size=vision.image_size)
    return found(processor, dict(mean="image_mean", std="image_std"), vision)


if __name__ == "__main__":
    from train_tiny import workbench

    workbench("flamingo")  # --demo, --image, --prompt, --weights, --anatomy, --trace, --show-mask: see --help
