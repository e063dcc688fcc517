r"""
CogVLM: a frozen language model in which image tokens have weights of their own, in every layer.

    CogVLM     Wang et al. 2023, CogVLM: Visual Expert for Pretrained Language Models, arXiv 2311.03079
    CogVLM2    Hong et al. 2024, CogVLM2: Visual Language Models for Image and Video Understanding, arXiv 2408.16500

The idea. LLaVA maps patches to vectors that look like words, and the decoder reads them with weights made for words. If
the decoder stays frozen that is too shallow, and if it is trained it forgets how to talk. CogVLM gives image tokens their
own query, key, value, output and MLP matrices in every layer, the "visual expert", copied from the language weights
and then trained. Words keep theirs, frozen. Both kinds meet in one softmax: two sets of weights, one attention (deep
fusion, type B). A text without an image never touches a new weight: its logits stay what they were before training, to
the bit.

    image [n,3,H,W]                              "Question: where is the circle? Answer:"
      | EVA2-CLIP: post-norm ViT, class token      | token ids; image_token_id stands N + 2 times behind <bos>
      | dropped after the last layer               |
    [n,N,Dv]                                     ids [B,T]
      | adapter: linear, LayerNorm, GELU, SwiGLU   | embedding table
      | and learned boi, eoi around the patches    |
    [n,N+2,D] ---- put where the image ids stand ----> [B,T,D]
                                                   |
         layer:   image tokens                words
                  vision expert's QKV         language expert's QKV
                            \                /
                             one causal softmax over all of them
                            /                \
                  its dense, its SwiGLU      its dense, its SwiGLU
                                                   |
                                                 logits [B,T,V] -> "[[094,062,406,375]]"

How it is computed. Everything but the softmax happens to each token by itself. So between two softmaxes the tokens of a
batch stand in one list, those of the vision expert first: each expert works on one slice, and no token is masked. For the
softmax they go back to their rows. The index lists are made once per forward pass (Routing).

Three things that decide parity (paper 2.1, and the published code)
    positions  all patches of an image share one: text 0, boi 1, patches 2, 2, 2, eoi 3, text 4. RoPE would otherwise let a
               question attend less to the patches that are far from it; where a patch is, the tower's features say.
    experts    a token takes the vision expert when it and its right neighbour are of vision type. So boi does, and eoi,
               whose neighbour is a word, takes the language expert: it is where the image ends and language goes on.
    mask       causal over patches too, though they have no order: so a decoder without any other mask can be used.

Axis letters, here and in all seven files: B batch, T text length, S joint length, N images or patches, P patch size,
D width, H heads, K key/value heads, Dh head width, L latents or queries, F frames, V vocabulary, E shared embedding
width. Two of them, H and W, are also an image's height and width: [B,3,H,W] is always pixels.

Three conventions on which code in this field disagrees
    RoPE    half-split pairing: dimension i turns with dimension i + Dh/2 (as LLaMA checkpoints on the hub are stored).
    masks   True means "may attend" or "real token".
    labels  have the same positions as ids; the shift by one happens in one place, language_loss.

Paper / published code / this file
    - Which weights train. Paper 2.2: experts and adapter; the ViT too in the last stage, at a tenth of the rate. Here the
      ViT never moves.
    - Image ids. The vocabulary has no <image>: published code says by a second row, token_type_ids, what is vision, and
      puts the padding id there. Here image_token_id does, which is no word's id (the first one past the vocabulary) and is
      never looked up.
    - Several images. Published code reads one image per row. Here a row may hold several: each group of N + 2 image tokens
      is one image with its own boi and eoi, which stands together, whatever follows it.
    - Prompts. Published weights on the hub: "Question: ... Answer:" (chat) and "... Short answer:" (VQA); the authors' own
      training repository also knows "[INST] ... [/INST]". Here the hub's.
    - What it is held against. transformers has no CogVLM, so no published class computes beside this file: logits and words
      are compared with a second, naive implementation in double precision, written from the paper and the published code
      (test_all.py), and preprocessing with SigLIP's processor, which resizes and normalises by the same arithmetic.
    - CogVLM2. A stride-2 convolution in front of the adapter quarters the patches, Llama-3's grouped heads, and (in the
      published code alone) a bias on the vision expert's QKV.

What to try: --demo, then ask for boxes in your own image; --show-mask for who takes which expert; let eoi take the vision
expert; give each patch a position of its own; start the experts from random weights instead of copies.
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
class CogVLMConfig:
    vision: VisionConfig = field(default_factory=lambda: EVA2_CLIP_E)
    language: LanguageConfig = field(default_factory=lambda: VICUNA_7B)
    strided: bool = False  # CogVLM2: a 2 x 2 convolution of stride 2 in front of the adapter, a quarter of the tokens
    expert_bias: bool = False  # CogVLM2: biases in the vision expert's query_key_value
    image_token_id: int = 32000  # one past the vocabulary: no text can contain it, and it is never looked up
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self):
        if not self.vision.class_token or self.vision.ln_pre:
            raise ValueError("EVA2-CLIP has a class token, a bias on its patches and no LayerNorm before its blocks")


EVA2_CLIP_E = VisionConfig(
    490, 14, width=1792, layers=63, heads=16, mlp_width=15360, activation="gelu", norm_eps=1e-6, ln_pre=False, resize="squash"
)  # without its last block, of 64
VICUNA_7B = LanguageConfig(32000, context=2048)
LLAMA_3_8B = LanguageConfig(128256, kv_heads=8, mlp_width=14336, context=8192, rope_base=500000.0)

PRESETS = {
    # what train_tiny.py trains in front of you, on a toy EVA tower and a toy Vicuna
    "tiny": CogVLMConfig(
        VisionConfig(
            32, 8, width=96, layers=4, heads=4, mlp_width=384, activation="gelu", norm_eps=1e-6, ln_pre=False, resize="squash",
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        ),
        LanguageConfig(512, width=96, layers=3, heads=2, kv_heads=2, mlp_width=256, context=256),
        image_token_id=499,
        bos_token_id=497,
        eos_token_id=498,
    ),
    "cogvlm-chat-17b": CogVLMConfig(),
    "cogvlm2-llama3-19b": CogVLMConfig(
        replace(EVA2_CLIP_E, image_size=1344),
        LLAMA_3_8B,
        strided=True,
        expert_bias=True,
        image_token_id=128256,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
}  # fmt: skip


def patch_grid(height, width, config):
    """(rows, columns) of whole patches in an image of height x width pixels, patch_size taken from config. A border narrower
    than a patch is dropped, as the convolution does. Raises ValueError when not even one patch fits."""
    rows, columns = height // config.patch_size, width // config.patch_size
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {height} x {width} pixels is smaller than one patch of {config.patch_size}")
    return rows, columns


def token_grid(height, width, config):
    """(rows, columns) of tokens that the adapter makes of an image of height x width pixels (config: CogVLMConfig): one per
    patch, or one per 2 x 2 patches in CogVLM2. Raises ValueError when there is not even one."""
    rows, columns = patch_grid(height, width, config.vision)
    if config.strided:
        rows, columns = rows // 2, columns // 2
        if rows < 1 or columns < 1:
            raise ValueError(f"an image of {height} x {width} pixels has no 2 x 2 patches of {config.vision.patch_size}")
    return rows, columns


def num_image_tokens(height, width, config):
    """Tokens the decoder reads for one image of height x width pixels: its patches, and boi and eoi around them (config:
    CogVLMConfig). The one place where this is computed; 490 / 14 = 35, 35 * 35 + 2 = 1227; CogVLM2 1344 / 14 / 2 = 48,
    48 * 48 + 2 = 2306."""
    rows, columns = token_grid(height, width, config)
    return rows * columns + 2


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


class PostNormBlock(nn.Module):
    """EVA2-CLIP-E's block: what a branch says is normalised before it is added, and the branch itself reads x as it is
    ("res-post-norm", as in Swin v2): no branch can add more than its norm lets through."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x):
        x = x + self.ln_1(self.attn(x))
        return x + self.ln_2(self.mlp(x))


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


class EVATower(nn.Module):
    """EVA2-CLIP-E (Sun et al. 2023, EVA-CLIP, arXiv 2303.15389), a ViT of 4.3 billion parameters with post-norm blocks and no
    norm around the stack.

    forward(pixels [B,3,H,W]) -> [B,N+1,D], the class token first. Any H and W that hold at least one patch: the learned
    positions are interpolated to the image's own grid.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P, grid = config.width, config.patch_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=P, stride=P)  # with a bias, unlike CLIP's
        self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        self.position_embedding = nn.Embedding(grid * grid + 1, D)
        self.blocks = nn.ModuleList(PostNormBlock(config) for _ in range(config.layers))
        nn.init.normal_(self.position_embedding.weight, std=0.5)  # as large as patches: nothing else will ever say where
        init_blocks(self.blocks, D)
        for block in self.blocks:  # each branch adds as much as its norm lets through, however small it starts
            nn.init.constant_(block.ln_1.weight, (2 * config.layers) ** -0.5)
            nn.init.constant_(block.ln_2.weight, (2 * config.layers) ** -0.5)

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

    def forward(self, pixels):
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B,3,H,W], got {list(pixels.shape)}")
        rows, columns = patch_grid(*pixels.shape[2:], self.config)
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # [B,D,rows,columns]
        x = note("vision.patches", x.flatten(2).transpose(1, 2))  # [B,N,D], patches in reading order
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [B,N+1,D]
        x = note("vision.patches + positions", x + self.positions(rows, columns))
        for i, block in enumerate(self.blocks):
            x = note(f"vision.blocks.{i}", block(x))
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Connector


class Adapter(nn.Module):
    """Patch features of a grid [n,N,Dv] -> what the decoder reads, [n,N+2,D]: boi, one vector per token, eoi.

    A linear map to the decoder's width, LayerNorm and GELU, then a SwiGLU as wide as the decoder's own (paper 2.1, "MLP
    adapter"). In CogVLM2 a convolution first makes one of each 2 x 2 patches.
    """

    def __init__(self, config):
        super().__init__()
        Dv, D, mlp_width = config.vision.width, config.language.width, config.language.mlp_width
        self.conv = nn.Conv2d(Dv, Dv, kernel_size=2, stride=2) if config.strided else None
        self.linear_proj = nn.Linear(Dv, D, bias=False)
        self.norm1 = nn.LayerNorm(D)
        self.gate_proj = nn.Linear(D, mlp_width, bias=False)
        self.dense_h_to_4h = nn.Linear(D, mlp_width, bias=False)
        self.dense_4h_to_h = nn.Linear(mlp_width, D, bias=False)
        self.boi = nn.Parameter(torch.randn(D) * D**-0.5)  # begin of image
        self.eoi = nn.Parameter(torch.randn(D) * D**-0.5)  # end of image
        for linear in (self.linear_proj, self.gate_proj, self.dense_h_to_4h, self.dense_4h_to_h):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)  # so that patches come out about as large as words

    def forward(self, x, rows, columns):
        if self.conv is not None:
            x = self.conv(x.transpose(1, 2).unflatten(2, (rows, columns))).flatten(2).transpose(1, 2)  # [n,N/4,Dv]
        x = F.gelu(self.norm1(self.linear_proj(x)))
        x = self.dense_4h_to_h(F.silu(self.gate_proj(x)) * self.dense_h_to_4h(x))
        return torch.cat([self.boi.expand(len(x), 1, -1), x, self.eoi.expand(len(x), 1, -1)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Who is what: roles, positions, experts

TEXT, BOI, PATCH, EOI = range(4)  # the roles a token can have


def find_roles(is_image, each):
    """is_image [B,T] (True: an image token), `each` tokens per image (its N + 2) -> roles [B,T].

    Image tokens are taken `each` at a time, in order: the first is boi, the last eoi. Two images may stand side by side.
    Raises ValueError when the tokens of one image do not stand together in one row.
    """
    B, T = is_image.shape
    images = is_image.flatten().nonzero().view(-1, each)  # [n,each], places in the batch read row by row
    first, last = images[:, 0], images[:, -1]
    torn = (last - first >= each) | (first // T != last // T)
    if torn.any():
        row, column = divmod(int(first[torn][0]), T)
        raise ValueError(
            f"the image that begins in row {row}, column {column} is torn: its {each} tokens (boi, {each - 2} patches, eoi) must"
            " stand together in one row"
        )
    roles = TEXT + is_image.flatten() * PATCH
    roles[first], roles[last] = BOI, EOI
    return roles.view(B, T)


def position_ids(roles, mask=None, last=-1):
    """roles [B,T], mask [B,T] (None: all real) -> positions [B,T], going on after `last` (an int, or [B,1]).

    Every real token is one further than the token before it, except that a patch after a patch stays where that one is:
    2 words, an image of 3 patches, 2 words have 0 1 2 3 3 3 4 5 6. Padding stays, too.
    """
    before = F.pad(roles, (1, 0))[:, :-1]
    step = (roles != PATCH) | (before != PATCH)
    return last + (step if mask is None else step & mask).cumsum(1)


def takes_vision_expert(roles):
    """roles [B,T] -> [B,T], True for boi and patches. eoi takes the language expert: see "experts" at the top of the file."""
    return (roles == BOI) | (roles == PATCH)


class Routing:
    """Which tokens go through which expert, as index lists; made once per forward pass, used by every layer.

    Between two softmaxes the B*T tokens of a batch stand in one list [B*T,...], the `vision` many of the vision expert
    first. sort: from rows to that list; back: from the list to rows. Without an image neither moves anything.
    """

    def __init__(self, takes_vision=None):
        self.vision, self.order, self.place = 0, None, None
        if takes_vision is not None and takes_vision.any():
            self.vision = int(takes_vision.sum())
            self.order = (~takes_vision).flatten().int().argsort(stable=True)  # of the list's tokens: where in the rows
            self.place = self.order.argsort()  # of the rows' tokens: where in the list

    def sort(self, x):
        return x if self.order is None else x.index_select(0, self.order)

    def back(self, x):
        return x if self.place is None else x.index_select(0, self.place)


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
    The patches of an image share a position, so the next token's is not `length`: `last` is the last one given out.
    """

    def __init__(self, config, B, capacity, like):
        shape = (config.layers, B, config.kv_heads, capacity, config.head_width)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.segments = None  # [B,length] once a mask was given; None while every token is real
        self.length = 0
        self.last = -1  # [B,1] once there are tokens

    def append(self, layer, k, v):
        """k, v [B,K,T,Dh] of the new tokens -> those of all tokens so far, [B,K,length+T,Dh]."""
        end = self.length + k.shape[2]
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


class Expert(nn.Module):
    """One set of a layer's weights: all that a token goes through by itself, before and after the softmax."""

    def __init__(self, config, bias=False):
        super().__init__()
        D, Dh = config.width, config.head_width
        self.query_key_value = nn.Linear(D, (config.heads + 2 * config.kv_heads) * Dh, bias=bias)
        self.dense = nn.Linear(config.heads * Dh, D, bias=False)
        self.mlp = SwiGLU(D, config.mlp_width)


class ExpertBlock(nn.Module):
    """A decoder layer with two experts: one softmax, two sets of weights. The norms are shared, and frozen with the words'."""

    def __init__(self, config, expert_bias=False):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.language_expert = Expert(config)
        self.vision_expert = Expert(config, expert_bias)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def each(self, part, x, routing):
        """x [B*T,...], sorted: each token through its own expert's `part`. Without an image only one of them runs."""
        words, patches = getattr(self.language_expert, part), getattr(self.vision_expert, part)
        if not routing.vision:
            return words(x)
        return torch.cat([patches(x[: routing.vision]), words(x[routing.vision :])])

    def forward(self, x, routing, angles, mask, cache=None, layer=0):
        """x [B*T,D], sorted by expert -> the same; angles [B,T,Dh/2] and mask are those of the rows."""
        H, K, (B, T, _) = self.config.heads, self.config.kv_heads, angles.shape
        qkv = routing.back(self.each("query_key_value", self.input_layernorm(x), routing))
        q, k, v = qkv.view(B, T, H + 2 * K, -1).transpose(1, 2).split((H, K, K), dim=1)  # [B,H,T,Dh], [B,K,T,Dh] twice
        q, k = apply_rope(q, k, angles)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if trace.active is not None and trace.active.maps:
            o, weights = attention(q, k, v, **mask, return_weights=True)
            note("decoder attention weights", weights)
        else:
            o = attention(q, k, v, **mask)  # one softmax over words and patches
        o = routing.sort(o.transpose(1, 2).reshape(B * T, -1))
        x = x + self.each("dense", o, routing)
        return x + self.each("mlp", self.post_attention_layernorm(x), routing)


class ExpertDecoder(nn.Module):
    """LLaMA (Touvron et al. 2023, arXiv 2302.13971) with a visual expert beside the weights of every layer.

    forward(ids [B,T], mask [B,T] or None; True = real token) -> logits [B,T,V] of text. Padding may stand on either side.
    """

    def __init__(self, config, expert_bias=False):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(ExpertBlock(config, expert_bias) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # what writes to the residual stream starts smaller, as 2 * layers terms add up
                residual = name.endswith(("dense.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=config.width**-0.5 / (math.sqrt(2 * config.layers) if residual else 1))
        nn.init.normal_(self.lm_head.weight, std=0.02)  # small, so that the first loss is ln V: nothing is preferred
        self.copy_experts()

    @torch.no_grad()
    def copy_experts(self):
        """The vision experts begin as copies of the language weights (paper 2.1): an image is first read as words are."""
        for layer in self.layers:
            copies = dict(layer.vision_expert.named_parameters())
            for name, weight in layer.language_expert.named_parameters():
                copies[name].copy_(weight)
            if layer.vision_expert.query_key_value.bias is not None:  # CogVLM2's, which words do not have
                layer.vision_expert.query_key_value.bias.zero_()

    def hidden(self, x, mask=None, cache=None, roles=None):
        """Embeddings x [B,T,D] of new tokens, their mask and roles (None: all text) -> hidden states [B,T,D] after the last
        norm.

        With a cache, the tokens in it come first, and positions go on from the last one there. Positions count real tokens
        only, so padding shifts nothing. An image must come in one piece, not half in one call and half in the next.
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
        routing = Routing() if roles is None else Routing(takes_vision_expert(roles))
        if roles is None:
            roles = torch.full((B, T), TEXT, device=x.device)
        positions = position_ids(roles, mask, -1 if cache is None else cache.last)
        angles = rope_1d(positions.clamp(min=0), self.config.head_width, self.config.rope_base)  # [B,T,Dh/2]
        rule = dict(causal=True, q_segments=q_segments, k_segments=k_segments)
        x = routing.sort(x.flatten(0, 1))  # [B*T,D], the vision expert's tokens first
        for i, layer in enumerate(self.layers):
            x = note(f"language.layers.{i}", layer(x, routing, angles, rule, cache, i))
        if cache is not None:
            cache.length, cache.segments, cache.last = past + T, k_segments, positions[:, -1:]
        return self.norm(routing.back(x).view(B, T, -1))

    def forward(self, ids, mask=None):
        return note("logits", self.lm_head(self.hidden(self.embed_tokens(ids), mask)))


# ----------------------------------------------------------------------------------------------------------------------
# The model


class CogVLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = EVATower(config.vision)
        self.adapter = Adapter(config)
        self.language = ExpertDecoder(config.language, config.expert_bias)

    def encode_image(self, pixels):
        """pixels [n,3,H,W] -> boi, one vector per token and eoi, [n,N+2,D], ready to stand among word embeddings."""
        x = self.vision(pixels)[:, 1:]  # the class token has done its work: patches have read it in every layer
        rows, columns = patch_grid(*pixels.shape[2:], self.config.vision)
        return note("image features for the decoder", self.adapter(x, rows, columns))

    def embed(self, ids, pixels=None, mask=None):
        """ids [B,T] with one image_token_id per visual token (boi and eoi too), pixels [n,3,H,W], mask [B,T] or None
        -> embeddings [B,T,D], roles [B,T] (None without an image).

        Images are used up in the order of their placeholders, row by row. Raises ValueError when the counts differ, when
        an image is torn (see find_roles), or when the mask says that an image token is padding.
        """
        is_image = ids == self.config.image_token_id  # [B,T]
        x = self.language.embed_tokens(ids.masked_fill(is_image, 0))  # the id itself may be past the vocabulary
        found = int(is_image.sum())
        if pixels is None:
            if found:
                raise ValueError(f"{found} image tokens in the ids, but no image was given")
            return x, None
        n, _, height, width = pixels.shape
        each = num_image_tokens(height, width, self.config)
        if found != n * each:
            grid = " x ".join(map(str, token_grid(height, width, self.config)))
            raise ValueError(
                f"{found} image tokens in the ids, but {n} image(s) need {n * each}: {height} x {width} pixels in patches"
                f" of {self.config.vision.patch_size} are {grid}, with boi and eoi {each} tokens each"
            )
        if mask is not None and (is_image & ~mask).any():
            raise ValueError("the mask says that some image tokens are padding")
        roles = find_roles(is_image, each)
        x = x.clone()
        x[is_image] = self.encode_image(pixels).flatten(0, 1).to(x.dtype)
        return note("words and patches", x), roles

    def forward(self, ids, pixels=None, mask=None):
        """ids [B,T], pixels [n,3,H,W] or None, mask [B,T] or None (True = real token) -> logits [B,T,V]."""
        x, roles = self.embed(ids, pixels, mask)
        return note("logits", self.language.lm_head(self.language.hidden(x, mask, roles=roles)))

    def generate(self, ids, pixels=None, mask=None, **options):
        """Continue each row of ids; images are encoded once. Options and result: see generate below."""
        with torch.no_grad():
            x, roles = self.embed(ids, pixels, mask)
            return generate(self.language, x, mask, roles, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a published CogVLM or CogVLM2: a folder in the Hugging Face layout, or a hub id. See load_checkpoint."""
        folder = checkpoint_folder(path)
        config = config_from_published(read_config(folder), folder)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config)
        return load_checkpoint(model, folder, dtype, device)


def freeze(model):
    """Set what trains (paper 2.2): the vision experts and the adapter, with boi and eoi. Never the tower, never a weight that
    a word goes through: what the language model could do without an image, it can do afterwards, to the bit. Returns the
    parameters that train."""
    model.requires_grad_(False)
    model.adapter.requires_grad_(True)
    for layer in model.language.layers:
        layer.vision_expert.requires_grad_(True)
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
def generate(
    language, x, mask=None, roles=None, max_new_tokens=64, temperature=0.0, top_k=None, eos_id=None, generator=None
):
    """Prompts as embeddings x [B,T,D] with mask [B,T] (None: all real; padding on either side) and roles [B,T] (None: no
    image) -> new ids [B,n].

    The prompt runs once, then one token at a time against the cached keys and values: words, so no vision weight is
    touched. A row that has said eos_id is filled up with eos_id; generation ends when all rows have, or after
    max_new_tokens.
    """
    B, T, _ = x.shape
    if T + max_new_tokens > language.config.context:
        raise ValueError(f"{T} tokens and {max_new_tokens} new ones do not fit the context of {language.config.context}")
    cache = Cache(language.config, B, T + max_new_tokens, like=x)
    h = language.hidden(x, mask, cache, roles)
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
# Prompts, conversations and boxes: text to ids, and which ids count in the loss


ANSWERS = {"chat": "Answer:", "vqa": "Short answer:"}  # the published templates


def build_prompt(question, style="chat"):
    """The published template for one turn; style "vqa" asks for a word or two. Images stand before it, see prompt_row.

    >>> build_prompt("What is this?")
    'Question: What is this? Answer:'
    """
    if "<image>" in question:
        raise ValueError("leave <image> out of the prompt: the image always stands in front of the question")
    if not question.strip():
        raise ValueError("the prompt is empty: ask something, as in --prompt 'where is the red circle?'")
    return f"Question: {question} {ANSWERS[style]}"


def prompt_row(text_ids, config, images=1):
    """The ids of a prompt: <bos>, N + 2 image tokens per image, and then the text's own ids (without special tokens)."""
    side = config.vision.image_size
    return [config.bos_token_id] + [config.image_token_id] * images * num_image_tokens(side, side, config) + list(text_ids)


def conversation_row(turns, encode, config, images=1):
    """[(question, answer), ...] about the images in front -> ids, labels (two lists of equal length).

    encode: text -> list of ids. Only the answers and the end-of-sequence token after each have labels.
    """
    ids = prompt_row([], config, images)
    labels = [IGNORE_INDEX] * len(ids)
    for question, answer in turns:
        prompt, reply = encode(build_prompt(question, "vqa")), encode(" " + answer) + [config.eos_token_id]
        ids += prompt + reply
        labels += [IGNORE_INDEX] * len(prompt) + reply
    return ids, labels


def check_room(tokens, new, config):
    if tokens + new > config.language.context:
        raise ValueError(f"the prompt has {tokens} tokens, the context holds {config.language.context}: shorten it")


def pad_rows(rows, value, left=False):
    """Lists of ids of different length -> (tensor [B,T] padded with value, mask [B,T]; True = real token)."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), value), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row), True
    return ids, mask


def parse_box(text):
    """The first box `[[x0,y0,x1,y1]]` in a text, each number three digits in thousandths of the image -> four fractions in
    [0, 1), or None when there is none, or one that encloses nothing. Never raises: a model may say anything.

    >>> parse_box("it is at [[094,062,406,375]].")
    (0.094, 0.062, 0.406, 0.375)
    """
    found = re.search(r"\[\[([0-9]{3}),([0-9]{3}),([0-9]{3}),([0-9]{3})\]\]", text)
    if not found:
        return None
    x0, y0, x1, y1 = (int(number) / 1000 for number in found.groups())
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def box_iou(a, b):
    """Intersection over union of two boxes (x0, y0, x1, y1); 0 when one of them is None."""
    if a is None or b is None:
        return 0.0
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, wide) * max(0.0, tall)
    return both / (sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)) - both)


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to pixels, exactly as the published code does (bicubic, both sides to size)


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
    "patch_embedding.proj": "patch_embedding",
    "patch_embedding.cls_embedding": "class_embedding",
    "patch_embedding.position_embedding": "position_embedding",
    "transformer.layers.{}.attention.dense": "blocks.{}.attn.out_proj",
    "transformer.layers.{}.input_layernorm": "blocks.{}.ln_1",  # named as if it stood in front; it stands behind
    "transformer.layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "transformer.layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "transformer.layers.{}.post_attention_layernorm": "blocks.{}.ln_2",
}
ADAPTER_NAMES = {
    "conv": "conv",
    "linear_proj.linear_proj": "linear_proj",
    "linear_proj.norm1": "norm1",
    "linear_proj.gate_proj": "gate_proj",
    "linear_proj.dense_h_to_4h": "dense_h_to_4h",
    "linear_proj.dense_4h_to_h": "dense_4h_to_h",
    "boi": "boi",
    "eoi": "eoi",
}
DECODER_NAMES = {
    "embed_tokens": "embed_tokens",
    "layers.{}.input_layernorm": "layers.{}.input_layernorm",
    "layers.{}.self_attn.language_expert_query_key_value": "layers.{}.language_expert.query_key_value",
    "layers.{}.self_attn.language_expert_dense": "layers.{}.language_expert.dense",
    "layers.{}.self_attn.vision_expert_query_key_value": "layers.{}.vision_expert.query_key_value",
    "layers.{}.self_attn.vision_expert_dense": "layers.{}.vision_expert.dense",
    "layers.{}.post_attention_layernorm": "layers.{}.post_attention_layernorm",
    "layers.{}.mlp.language_mlp.gate_proj": "layers.{}.language_expert.mlp.gate_proj",
    "layers.{}.mlp.language_mlp.up_proj": "layers.{}.language_expert.mlp.up_proj",
    "layers.{}.mlp.language_mlp.down_proj": "layers.{}.language_expert.mlp.down_proj",
    "layers.{}.mlp.vision_mlp.gate_proj": "layers.{}.vision_expert.mlp.gate_proj",
    "layers.{}.mlp.vision_mlp.up_proj": "layers.{}.vision_expert.mlp.up_proj",
    "layers.{}.mlp.vision_mlp.down_proj": "layers.{}.vision_expert.mlp.down_proj",
    "norm": "norm",
}

TOWERS = [  # (published prefix, our prefix, table), tried in this order
    ("model.vision.", "vision.", VISION_NAMES),
    ("model.vision.", "adapter.", ADAPTER_NAMES),
    ("model.", "language.", DECODER_NAMES),
    ("", "language.", {"lm_head": "lm_head"}),
]
LEFT_OUT = [r"\.rotary_emb\.inv_freq$"]  # a buffer that the published files carry; it is computed here


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
    """The published config.json (a dict) -> CogVLMConfig. Fields it leaves out have the published class's defaults.

    It has no model_type one can rely on; `architectures` says what it is. Grouped heads make it a CogVLM2."""
    kinds = raw.get("architectures") or [raw.get("model_type")]
    if "CogVLMForCausalLM" not in kinds and raw.get("model_type") != "cogvlm":
        raise ValueError(f"{folder} holds a {raw.get('model_type') or kinds[0]!r} checkpoint; cogvlm.py reads 'CogVLMForCausalLM'")
    second = "num_multi_query_heads" in raw
    default = PRESETS["cogvlm2-llama3-19b" if second else "cogvlm-chat-17b"]
    vision = replace_published(
        default.vision,
        raw.get("vision_config") or {},
        dict(width="hidden_size", layers="num_hidden_layers", heads="num_heads", mlp_width="intermediate_size")
        | dict(activation="hidden_act", norm_eps="layer_norm_eps", image_size="image_size", patch_size="patch_size"),
    )
    heads = raw.get("num_attention_heads", default.language.heads)
    language = replace_published(
        replace(default.language, norm_eps=1e-5 if second else 1e-6),  # what the published classes mean by silence
        raw | {"num_multi_query_heads": raw.get("num_multi_query_heads", heads)},
        dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", mlp_width="intermediate_size")
        | dict(kv_heads="num_multi_query_heads", vocab_size="vocab_size", context="max_position_embeddings")
        | dict(norm_eps="rms_norm_eps", tie_embeddings="tie_word_embeddings"),
    )
    return replace(
        default,
        vision=image_config_from_published(vision, folder),
        language=language,
        image_token_id=language.vocab_size,
        bos_token_id=raw.get("bos_token_id", default.bos_token_id),
        eos_token_id=raw.get("eos_token_id", default.eos_token_id),
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
    """A tensor of a published file -> [(name of our parameter, its tensor)]. The tower's query, key and value are one
    matrix there and three here; the decoder's are one in both."""
    fused = re.fullmatch(r"model\.vision\.transformer\.layers\.(\d+)\.attention\.query_key_value\.(weight|bias)", published)
    if not fused:
        return [(our_name(published), tensor)]
    layer, kind = fused.groups()
    return [(f"vision.blocks.{layer}.attn.{name}_proj.{kind}", part) for name, part in zip("qkv", tensor.chunk(3), strict=True)]


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
    """Modules, shapes, what trains, visual tokens, FLOPs and KV-cache bytes of a preset, as text."""
    config = find_preset(name)
    with torch.device("meta"):
        model = CogVLM(config)
    side, c = config.vision.image_size, config.language
    tokens, words = num_image_tokens(side, side, config), 64
    total, trained = count_parameters(model), sum(p.numel() for p in freeze(model))
    experts = sum(count_parameters(layer.vision_expert) for layer in model.language.layers)
    pixels = torch.empty(1, 3, side, side, device="meta")
    prompt = torch.empty(1, tokens + words, c.width, device="meta")
    new = 2 * (count_parameters(model.language) - experts - c.vocab_size * c.width * (not c.tie_embeddings))
    cache = 2 * c.layers * c.kv_heads * c.head_width  # numbers per token: keys and values of every layer
    grid = " x ".join(map(str, token_grid(side, side, config)))
    return "\n".join(
        [
            f"{name}: {total:,} parameters",
            "",
            table(describe(model)),
            "",
            f"tower {count_parameters(model.vision):,} + adapter {count_parameters(model.adapter):,} + vision experts {experts:,}"
            f" + language model {count_parameters(model.language) - experts:,}",
            f"trained: {trained:,} ({100 * trained / total:.1f} %), experts and adapter; {total - trained:,} frozen",
            f"image {side} x {side} -> {tokens} tokens in the decoder ({grid}{' after the convolution' if config.strided else ''},"
            " boi and eoi), on 3 positions",
            f"FLOPs: {count_flops(lambda: model.encode_image(pixels)):,} to encode an image,"
            f" {count_flops(lambda: model.language.hidden(prompt)):,} to read it with {words} words:",
            "as many as without the experts, since each token goes through one of them; and",
            f"{new:,} for each new word, but for its attention",
            f"KV cache: {2 * cache:,} bytes a token in 16 bits, {2 * cache * tokens:,} for one image",
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_trace():
    """The shapes through one forward pass of the tiny model, with random weights."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    model = CogVLM(config)
    side = config.vision.image_size
    ids = torch.tensor([prompt_row(range(6), config)] * 2)
    with torch.no_grad(), trace() as t:
        model(ids, torch.randn(2, 3, side, side))
    tokens = num_image_tokens(side, side, config)
    return (
        f"tiny, random weights, 2 rows of <bos>, {tokens} image tokens (boi, {tokens - 2} patches, eoi) and 6 words\n"
        f"in the decoder's layers the {ids.numel()} tokens of both rows are one list, the vision expert's {2 * tokens - 2} first\n\n{t}"
    )


def show_mask():
    """Who may look at whom, which expert each token takes and at which position it stands."""
    is_image = torch.tensor([[False, False] + [True] * 5 + [False, False]])
    roles = find_roles(is_image, 5)
    padded = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0, 0]])
    names = {TEXT: "word", BOI: "boi", PATCH: "patch", EOI: "eoi"}
    lines = [f"{'token':<8}{'expert':<10}position"]
    for role, vision, position in zip(roles[0].tolist(), takes_vision_expert(roles)[0].tolist(), position_ids(roles)[0].tolist()):
        lines.append(f"{names[role]:<8}{'vision' if vision else 'language':<10}{position}")
    return "\n\n".join(
        [
            "2 words, an image of 3 patches, 2 words\n" + "\n".join(lines),
            "rows look at columns; # may, . may not",
            "vision tower: the class token and all patches see each other\n" + draw_mask(4, 4),
            "decoder: one softmax, causal over words and patches alike, whichever expert made the keys\n"
            + draw_mask(9, 9, causal=True),
            "decoder, a row with 2 tokens of padding on the left\n"
            + draw_mask(9, 9, causal=True, q_segments=padded, k_segments=padded),
            "decoder with a KV cache: 2 new words after 7 cached tokens\n" + draw_mask(2, 9, causal=True),
        ]
    )


def answer(model, images, question, encode, decode, style="chat", max_new_tokens=40):
    """One question about some images -> the model's answer as text."""
    device = model.adapter.boi.device
    pixels = preprocess(images, model.config.vision).to(device) if images else None
    row = prompt_row(encode(build_prompt(question, style)), model.config, len(images))
    check_room(len(row), 1, model.config)
    room = model.config.language.context - len(row)
    eos = model.config.eos_token_id
    ids = torch.tensor([row], device=device)
    new = model.generate(ids, pixels, max_new_tokens=min(max_new_tokens, room), eos_id=eos)[0].tolist()
    return decode([i for i in new if i != eos]).strip()


def frame(image, boxes, size):
    """The image with its longer side at `size`, and boxes on it: [(box as fractions or None, colour)]."""
    scale = size / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for box, colour in boxes:
        if box is not None:
            x0, y0, x1, y1 = (round(v * side) for v, side in zip(box, image.size * 2, strict=True))
            pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
    return image


def tell(question, text, images):
    """Print an answer; when it holds a box, draw that on the (first) image and write it to runs/cogvlm/box.png."""
    print(f"{question} -> {text}")
    if (box := parse_box(text)) and images:
        file = Path("runs") / "cogvlm" / "box.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        frame(images[0], [(box, "magenta")], max(256, *images[0].size)).save(file)
        print(f"written: {file} (the box on the image)")


def run_weights(args):
    """--weights DIR --image FILE --prompt TEXT: a published checkpoint answers about your own image."""
    if not args.prompt:
        raise ValueError("--weights needs --prompt, as in --weights DIR --image photo.jpg --prompt 'where is the dog?'")
    images = [load_image(path) for path in args.image]
    prompts = [build_prompt(question) for question in args.prompt]
    folder = checkpoint_folder(args.weights)
    config = config_from_published(read_config(folder), folder)  # another family's is found before gigabytes are read
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder / 'tokenizer.json'} is missing: CogVLM's folder comes without one, it uses lmsys/vicuna-7b-v1.5's; put a"
            " tokenizer.json of that there (CogVLM2 brings its own)"
        )
    tokenizer = load_tokenizer(folder)

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids  # <bos> stands in front of the image already

    for prompt in prompts:
        check_room(len(prompt_row(encode(prompt), config, len(images))), 1, config)
    model = CogVLM.from_pretrained(folder, getattr(torch, args.dtype), check_device(args.device))
    for question in args.prompt:
        text = answer(model, images, question, encode, tokenizer.decode)
        if parse_box(text):
            tell(question, text, images)
        else:
            print(text)


def draw_boxes(rows, file, size=128):
    """PNG: for each (image, true box or None, box answered or None, text) the image with both boxes on it, and the text."""
    page = Image.new("RGB", (2 * (size + 270), -(-len(rows) // 2) * (size + 12) + 24), "white")
    pen = ImageDraw.Draw(page)
    pen.text((4, 4), "white: true box    magenta: the model's", fill="black")
    for i, (image, true, said, text) in enumerate(rows):
        x, y = 4 + i % 2 * (size + 270), 24 + i // 2 * (size + 12)
        page.paste(frame(image, [(true, "white"), (said, "magenta")], size), (x, y))
        pen.multiline_text((x + size + 10, y + 8), text, fill="black", spacing=6)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file)


def demo(args):
    """Train the toy CogVLM in front of the reader if it is not cached, then ask it for boxes and answers, and show that its
    language model has not moved by a bit."""
    import train_tiny as tiny

    check_device(args.device)
    own = [load_image(path) for path in args.image]  # wrong input is found before the training
    for question in args.prompt:
        row = prompt_row(tiny.encode(build_prompt(question, "vqa")), PRESETS["tiny"], len(own) or 1)
        check_room(len(row), 24, PRESETS["tiny"])
    rng = tiny.rng_for("cogvlm demo")
    asked, more = tiny.box_questions(rng, 4), tiny.vqa_questions(rng, 4)
    tokens = num_image_tokens(32, 32, PRESETS["tiny"])
    print(f"In goes an image of 32 x 32 pixels and a question; the decoder reads <bos>, {tokens} image tokens (boi, {tokens - 2} patches, eoi)")
    print(f"through the vision experts' weights and {build_prompt(asked[0][1], 'vqa')!r} through its own.")
    untrained, train = tiny.demo_cogvlm(args.device)
    said = tiny.cogvlm_answers(untrained, [a[0] for a in asked[:3]], [a[1] for a in asked[:3]])
    print(f"before training it says: {', '.join(repr(text[:24]) for text in said)}")
    model = train()
    if own or args.prompt:
        for question in args.prompt or [tiny.DESCRIBE]:
            images = own or [tiny.draw(asked[0][0])]
            tell(question, answer(model, images, question, tiny.encode, tiny.decode, "vqa"), images)
        return
    print("\nafter training, about images it has never seen:")
    said, rows = tiny.cogvlm_answers(model, [a[0] for a in asked + more], [a[1] for a in asked + more]), []
    for (scene, question, right), text in zip(asked + more, said, strict=True):
        true, found = parse_box(right), parse_box(text)
        if true:
            verdict = f"IoU {box_iou(true, found):.2f}" if found else "no box"
        else:
            verdict = "right" if text == right else f"wrong, it is {right}"
        print(f"    {question} -> {text} ({verdict})")
        rows.append((tiny.draw(scene), true, found, f"{question}\n{text}\n({verdict})"))
    boxes, many = tiny.box_questions(tiny.rng_for("cogvlm demo, boxes"), 200), tiny.vqa_questions(tiny.rng_for("cogvlm demo, many"), 200)
    print(f"of 200 more boxes {tiny.grounding(model, boxes):.0%} overlap the right one by half (guessing: {tiny.guess_box(boxes):.0%});")
    print(f"of 200 more questions {tiny.cogvlm_accuracy(model, many):.0%} are answered rightly (guessing: {tiny.guess(many):.0%})")
    if not tiny.recipe_is_done("cogvlm", tiny.COGVLM_STEPS):
        print("(this model and the towers it stands on had a fraction of their training; python train_tiny.py cogvlm gives them all,")
        print("and the demo then shows that one)")
    before, after = tiny.text_logits(untrained), tiny.text_logits(model)
    trained = sum(p.numel() for p in freeze(model))
    print(f"\nforgotten: nothing. {trained:,} of {count_parameters(model):,} weights were trained, and texts without an image are read")
    print(f"as before: of {before.numel():,} logits {int((before == after).sum()):,} are equal bit for bit.")
    file = tiny.RUNS / "cogvlm" / "demo.png"
    draw_boxes(rows, file)
    print(f"written: {file} (each image, the true box and the model's, what it answered)")


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
    sys.modules.setdefault("cogvlm", sys.modules[__name__])  # train_tiny imports cogvlm: let it find this very module
    main()
