"""
BLIP-2: a handful of learned queries asks a frozen vision tower what a frozen language model wants to know.

    BLIP-2  Li et al. 2023, Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
            Models, arXiv 2301.12597

The idea. The best vision towers and the best language models are too big to train together, and do not speak each
other's language. So leave both frozen and train only what stands between: the Q-Former, a small BERT whose input is not
text but L = 32 learned vectors, the queries. They talk to each other (self-attention), look at the image
(cross-attention in every second layer), and come out as 32 vectors: all that the language model ever gets, however
large the image is (a bottleneck of queries, type C).

    image [B,3,H,W]
      | vision tower, frozen                       text ids [B,T]
    [B,N,Dv]                                         | word + position embedding
      |  keys and values                           [B,T,D]
      v                                              |
    queries [L,D] ------> Q-Former: queries and text share the self-attention, each has a feed-forward of its own;
                            |       only queries look at the image          |
                          [B,L,D]                                         [B,T,D]        stage 1 trains on these two
                            | language_projection
                          [B,L,Dt] put where the <image> ids stand: [B,S,Dt] -- OPT, frozen --> logits [B,S,V]    stage 2

Stage 1 (paper 3.2) teaches the queries to pull out of the image what a text would say. One network, three losses, and
what differs is who may look at whom (rows look at columns; here 2 queries, then 3 words):

    ITC, contrastive      ITM, matching         ITG, generation
    # # . . .             # # # # #             # # . . .      ITC: queries and words must not meet, or the answer
    # # . . .             # # # # #             # # . . .           could be read off; image and text are compared after
    . . # # #             # # # # #             # # # . .      ITM: all see all; do image and text belong together?
    . . # # #             # # # # #             # # # # .      ITG: a word sees the queries and the words before it:
    . . # # #             # # # # #             # # # # #           only through the queries can the image help to write

ITC needs no mask in the code: queries alone and words alone, in two passes, are the same as that picture, and then any
image can be held against any text.

Stage 2 (paper 3.3) puts the queries' outputs in front of the frozen language model, as a prompt made of vectors, and
trains Q-Former and projection on the loss of the text that follows.

Axis letters, here and in all seven files: B batch, T text length, S joint length, N images or patches, P patch size,
D width, H heads, K key/value heads, Dh head width, L latents or queries, F frames, V vocabulary, E shared embedding
width. Two of them, H and W, are also an image's height and width: [B,3,H,W] is always pixels. Here D is the Q-Former's
width, Dv the vision tower's, Dt the decoder's; Bi and Bt count images and texts where they may differ.

Three conventions on which code in this field disagrees
    masks   True means "may attend" or "real token".
    labels  have the same positions as ids; the shift by one happens in one place, language_loss.
    norms   the towers normalise before a layer (pre-norm), the Q-Former after it, because BERT did.

Paper / published code / this file
    - Where the Q-Former begins. It starts as BERT-base, cross-attention new (paper 3.1), the queries' feed-forward a copy of
      the text's (the authors' code). Here it starts from random weights: the toy world has no BERT.
    - What is frozen. The LayerNorm on top of the vision tower (ln_post) is new and does train, as in the authors' code,
      though the paper says "frozen image encoder"; their ViT-g stops one layer early (39 of 40, paper 3.4).
    - The temperature of ITC is learned in the authors' code and missing in the published checkpoint. Here it is a
      constant, and `itc` returns plain cosines, as the published model does.
    - The ITG head. The authors put BERT's transform before the tied output matrix; the published checkpoint has no ITG
      head at all. Here it is the word embedding matrix itself, so ITG costs no parameter.
    - Hard negatives. The authors exclude only the pair itself, so that an equal caption can be called wrong, and add 1e-4 to
      every chance. Here equal texts are never drawn, and nothing is added.
    - Left out: label smoothing (0.1 in ITC and ITG in the authors' code), and beam search (they write captions with 5 beams;
      decoding here is greedy or sampled). BLIP's momentum queue was dropped by BLIP-2 itself.
    - Left out: the encoder-decoder language model (FlanT5). It would get the queries' outputs in front of the *encoder's*
      input, bidirectionally, and only the decoder would be causal; loss on the decoder's side. And OPT-350m, the one OPT
      with its norms after the layers.

What to try: --show-mask; give the tiny model 2 queries instead of 16; let ITC's queries and words go through the Q-Former
together, pair by pair, with the matching mask, and watch the loss collapse (why?); leave out ITG and look at the captions
(the cache does not notice a changed loss: train with --fresh); skip stage 1 (train_tiny.py blip2 --ablations), or make
it half as long: how alike are the queries' outputs after stage 1, and after stage 2?
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

from kernels import attention, draw_mask

IGNORE_INDEX = -100  # a label that does not count; cross_entropy's own default
ITC_TEMPERATURE = 0.07  # where the authors' learned one starts, which is where CLIP's does

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
class QFormerConfig:
    queries: int = 32
    vocab_size: int = 30523  # BERT's 30522 and [DEC]
    context: int = 512
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    cross_every: int = 2  # layers 0, 2, 4 ... look at the image
    activation: str = "gelu"
    norm_eps: float = 1e-12
    text: bool = True  # False: stage 2 needs queries only, and its checkpoints have no text side
    dec_token_id: int = 30522  # takes the place of [CLS] when text is to be generated
    sep_token_id: int = 102  # ends a text
    pad_token_id: int = 0

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"Q-Former width {self.width} is not divisible by {self.heads} heads")
        if self.queries < 1 or self.cross_every < 1:
            raise ValueError(f"at least one query and a cross-attention every n >= 1 layers, not {self.queries} and {self.cross_every}")


@dataclass(frozen=True)
class OPTConfig:
    vocab_size: int = 50272
    width: int = 2560
    layers: int = 32
    heads: int = 32
    mlp_width: int = 10240
    context: int = 2048
    activation: str = "relu"
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"language width {self.width} is not divisible by {self.heads} heads")

    @property
    def head_width(self):
        return self.width // self.heads

    @property
    def kv_heads(self):
        return self.heads  # OPT has no grouped heads


@dataclass(frozen=True)
class BLIP2Config:
    vision: VisionConfig = field(default_factory=lambda: VIT_G)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    language: OPTConfig | None = None  # None: a model of stage 1 only, for retrieval and matching
    embed_dim: int = 256  # E, where ITC compares
    image_token_id: int = 50265
    eos_token_id: int = 50118  # "\n": an answer is one line

    def __post_init__(self):
        if self.language is None and not self.qformer.text:
            raise ValueError("neither a text side in the Q-Former nor a language model: nothing to train on")


# EVA's ViT-g/14 without its last layer. Patches have a bias, there is no LayerNorm before the blocks.
VIT_G = VisionConfig(
    224, 14, width=1408, layers=39, heads=16, mlp_width=6144, activation="gelu", norm_eps=1e-6, ln_pre=False, resize="squash"
)
QUERIES_ONLY = QFormerConfig(text=False)
OPT_6_7B = OPTConfig(width=4096, mlp_width=16384)

PRESETS = {
    # what train_tiny.py trains in front of you: the toy CLIP's tower without its last block, 16 queries, a toy OPT
    "tiny": BLIP2Config(
        VisionConfig(32, 8, width=96, layers=3, heads=4, mlp_width=384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        QFormerConfig(
            16, 512, 64, width=96, layers=4, heads=2, mlp_width=256, dec_token_id=506, sep_token_id=505, pad_token_id=496
        ),
        OPTConfig(512, width=96, layers=3, heads=4, mlp_width=256, context=256),
        embed_dim=64,
        image_token_id=499,
        eos_token_id=498,
    ),
    "blip2-itm-vit-g": BLIP2Config(),
    "blip2-opt-2.7b": BLIP2Config(qformer=QUERIES_ONLY, language=OPTConfig()),
    "blip2-opt-6.7b": BLIP2Config(qformer=QUERIES_ONLY, language=OPT_6_7B),
}


def patch_grid(height, width, config):
    """(rows, columns) of whole patches in an image of height x width pixels, patch_size taken from config. A border narrower
    than a patch is dropped, as the convolution does. Raises ValueError when not even one patch fits."""
    rows, columns = height // config.patch_size, width // config.patch_size
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {height} x {width} pixels is smaller than one patch of {config.patch_size}")
    return rows, columns


def num_image_tokens(height, width, config):
    """Tokens the decoder reads for one image of height x width pixels: one per query, whatever the size, which is the
    point of the bottleneck (config: BLIP2Config). The one place where this is computed. Raises ValueError when not even
    one patch fits."""
    patch_grid(height, width, config.vision)
    return config.qformer.queries


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
# Attention and block of the vision tower


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
# Connector: the Q-Former


ATTENDS = ("contrastive", "matching", "generation")


def qformer_rule(attends, L, T, mask=None):
    """Who may look at whom among L queries and T words behind them (paper 3.2, Figure 2) -> arguments of kernels.attention.

    attends: "contrastive", "matching" or "generation"; mask [B,T], True = real word; without a mask all words are real and
    B is 1. Padding is in segment -1, which nobody looks at and which looks at nobody.
    """
    if attends not in ATTENDS:
        raise ValueError(f"unknown attention {attends!r}; known: {', '.join(ATTENDS)}")
    if mask is None:
        mask = torch.ones(1, T, dtype=torch.bool)
    B, device = len(mask), mask.device
    queries = torch.zeros(B, L, dtype=torch.long, device=device)
    words = torch.full((B, T), 1 if attends == "contrastive" else 0, device=device)  # two segments do not meet
    segments = torch.cat([queries, words.masked_fill(~mask, -1)], dim=1)  # [B,L+T]
    rule = dict(q_segments=segments, k_segments=segments)
    if attends == "generation":  # causal, but for the queries: they stand in front, and all may see all of them
        rule |= dict(causal=True, prefix=torch.full((B,), L, device=device))
    return rule


class QFormerAttention(nn.Module):
    """Multi-head attention of x [B,T,D] to itself, or (Dv given) to a context [B,N,Dv], the features of the image."""

    def __init__(self, width, heads, Dv=None):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(Dv or width, width)
        self.v_proj = nn.Linear(Dv or width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, context=None, **rule):
        B, T, D = x.shape
        keys, name = (x, "self-attention weights") if context is None else (context, "cross-attention weights")
        q = self.q_proj(x).view(B, T, self.heads, -1).transpose(1, 2)  # [B,H,T,Dh]
        k = self.k_proj(keys).view(B, keys.shape[1], self.heads, -1).transpose(1, 2)  # [B,H,T or N,Dh]
        v = self.v_proj(keys).view(B, keys.shape[1], self.heads, -1).transpose(1, 2)
        if trace.active is not None and trace.active.maps:
            o, weights = attention(q, k, v, **rule, return_weights=True)
            note(name, weights)
        else:
            o = attention(q, k, v, **rule)
        return self.out_proj(o.transpose(1, 2).reshape(B, T, D))


class QFormerBlock(nn.Module):
    """BERT's block: add, then normalise (post-norm). Queries and words share the self-attention; after it they part:
    queries look at the image (in every second block), and either kind has a feed-forward layer of its own."""

    def __init__(self, config, Dv, cross):
        super().__init__()
        D, heads, norm = config.width, config.heads, lambda: nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn, self.ln_self = QFormerAttention(D, heads), norm()
        self.cross_attn, self.ln_cross = (QFormerAttention(D, heads, Dv), norm()) if cross else (None, None)
        self.mlp_query, self.ln_query = MLP(D, config.mlp_width, config.activation), norm()
        self.mlp_text, self.ln_text = (MLP(D, config.mlp_width, config.activation), norm()) if config.text else (None, None)

    def forward(self, x, L, image, rule):
        """x [B,L+T,D], of which the first L are queries; image [B,N,Dv], needed only where there are queries."""
        x = self.ln_self(x + self.self_attn(x, **rule))
        queries, words = x[:, :L], x[:, L:]
        if L:
            if self.cross_attn is not None:
                queries = self.ln_cross(queries + self.cross_attn(queries, image))
            queries = self.ln_query(queries + self.mlp_query(queries))
        if words.shape[1]:
            words = self.ln_text(words + self.mlp_text(words))
        return torch.cat([queries, words], dim=1)


class QFormer(nn.Module):
    """The querying transformer (paper 3.1): BERT with cross-attention, over queries, words, or both.

    forward(queries [B,L,D] or None, image [B,N,Dv], ids [B,T] or None, mask [B,T], attends) -> outputs of the queries
    [B,L,D] and of the words [B,T,D]. Positions count real words, so padding may stand on either side.
    Raises ValueError on a text longer than the context, and on text where the config has no text side.
    """

    def __init__(self, config, Dv):
        super().__init__()
        self.config = config
        D = config.width
        if config.text:
            self.word_embeddings = nn.Embedding(config.vocab_size, D)
            self.position_embeddings = nn.Embedding(config.context, D)
        self.layernorm = nn.LayerNorm(D, eps=config.norm_eps)
        self.layers = nn.ModuleList(QFormerBlock(config, Dv, i % config.cross_every == 0) for i in range(config.layers))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # BERT's 0.02, at its width of 768; kept for embeddings, so that ITG's first loss is ln V
                nn.init.normal_(parameter, std=0.02 if "embeddings" in name else 0.02 * (768 / D) ** 0.5)
            elif name.endswith("proj.bias") or ".fc" in name:
                nn.init.zeros_(parameter)

    def check_text(self):
        if not self.config.text:
            raise ValueError("this Q-Former has no text side (a checkpoint of stage 2): no ITC, ITM or ITG with it")

    def embed(self, ids, mask=None):
        """ids [B,T], mask [B,T] -> word and position embeddings [B,T,D]."""
        self.check_text()
        if ids.shape[1] > self.config.context:
            raise ValueError(f"a text of {ids.shape[1]} tokens does not fit the Q-Former's context of {self.config.context}")
        positions = torch.arange(ids.shape[1], device=ids.device)
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B,T]
        return self.word_embeddings(ids) + self.position_embeddings(positions)

    def forward(self, queries=None, image=None, ids=None, mask=None, attends="contrastive"):
        if queries is None and ids is None or queries is not None and image is None:
            raise ValueError("the Q-Former needs queries with the features of an image, or ids, or both")
        if queries is not None and ids is not None and len(queries) != len(ids):
            raise ValueError(f"{len(queries)} images and {len(ids)} texts: matching and generation read pairs, one text per image")
        L, T = 0 if queries is None else queries.shape[1], 0 if ids is None else ids.shape[1]
        parts = ([] if queries is None else [queries]) + ([] if ids is None else [self.embed(ids, mask)])
        x = self.layernorm(torch.cat(parts, dim=1))  # [B,L+T,D]
        if mask is None:
            mask = torch.ones(len(x), T, dtype=torch.bool, device=x.device)
        rule = qformer_rule(attends, L, T, mask) if T else {}  # queries alone all see each other, whatever is asked for
        for i, layer in enumerate(self.layers):
            x = note(f"qformer.layers.{i}", layer(x, L, image, rule))
        return x[:, :L], x[:, L:]


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


class OPTAttention(nn.Module):
    """Causal self-attention with biases; positions are in the embeddings, so there is nothing to turn here."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x, mask, cache=None, layer=0):
        B, T, D = x.shape
        q, k, v = (  # each [B,H,T,Dh]
            proj(x).view(B, T, self.heads, -1).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if trace.active is not None and trace.active.maps:
            o, weights = attention(q, k, v, **mask, return_weights=True)
            note("decoder attention weights", weights)
        else:
            o = attention(q, k, v, **mask)
        return self.out_proj(o.transpose(1, 2).reshape(B, T, D))


class OPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn = OPTAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)

    def forward(self, x, mask, cache=None, layer=0):
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache, layer)
        return x + self.mlp(self.final_layer_norm(x))


class OPT(nn.Module):
    """OPT (Zhang et al. 2022, arXiv 2205.01068), a GPT: learned positions, ReLU, biases, norms before the layers.

    forward(ids [B,T], mask [B,T] or None; True = real token) -> logits [B,T,V]. Padding may stand on either side.
    """

    OFFSET = 2  # the first two rows of the position table are never used: OPT's code began to count behind its padding id

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.context + self.OFFSET, config.width)
        self.layers = nn.ModuleList(OPTBlock(config) for _ in range(config.layers))
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        for name, parameter in self.named_parameters():
            if "embed" in name:
                nn.init.normal_(parameter, std=0.02)  # small, so that the first loss is ln V: nothing is preferred
            elif parameter.ndim == 2:  # what writes to the residual stream starts smaller, as 2 * layers terms add up
                residual = name.endswith(("out_proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=config.width**-0.5 / (math.sqrt(2 * config.layers) if residual else 1))
            elif name.endswith("proj.bias") or ".fc" in name:
                nn.init.zeros_(parameter)

    def lm_head(self, h):
        """Hidden states [...,D] -> logits [...,V]. The output matrix is the embedding table: one parameter, used twice."""
        return F.linear(h, self.embed_tokens.weight)

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
        x = x + self.embed_positions(positions + self.OFFSET)
        rule = dict(causal=True, q_segments=q_segments, k_segments=k_segments)
        for i, layer in enumerate(self.layers):
            x = note(f"language.layers.{i}", layer(x, rule, cache, i))
        if cache is not None:
            cache.length, cache.segments = past + T, k_segments
        return self.final_layer_norm(x)

    def forward(self, ids, mask=None):
        return note("logits", self.lm_head(self.hidden(self.embed_tokens(ids), mask)))


# ----------------------------------------------------------------------------------------------------------------------
# The model


class BLIP2(nn.Module):
    """Vision tower, queries, Q-Former, and what the config asks for: heads for text (stage 1), a language model (stage 2)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, E = config.qformer.width, config.embed_dim
        self.vision = VisionTower(config.vision)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.qformer.queries, D))
        self.qformer = QFormer(config.qformer, config.vision.width)
        if config.qformer.text:
            self.vision_projection = nn.Linear(D, E)
            self.text_projection = nn.Linear(D, E)
            self.itm_head = nn.Linear(D, 2)  # logits of "do not belong together" and "belong together"
        if config.language is not None:
            self.language_projection = nn.Linear(D, config.language.width)
            self.language = OPT(config.language)

    def encode_image(self, pixels):
        """pixels [B,3,H,W] (see preprocess) -> features of the class token and all patches, [B,N+1,Dv]."""
        return note("image features", self.vision.ln_post(self.vision(pixels)))

    def query(self, image):
        """image [B,N+1,Dv] -> what the queries have found in it, [B,L,D]; no text is involved."""
        return self.qformer(self.query_tokens.expand(len(image), -1, -1), image)[0]

    # Stage 1: three ways to hold an image against a text

    def image_features(self, image):
        """image [B,N+1,Dv] -> one vector per query, [B,L,E], of length one."""
        self.qformer.check_text()
        return note("image features to compare", F.normalize(self.vision_projection(self.query(image)), dim=-1))

    def text_features(self, ids, mask=None):
        """ids [B,T] that begin with [CLS], mask [B,T] -> the vector of [CLS], [B,E], of length one."""
        words = self.qformer(None, None, ids, mask)[1]  # [B,T,D]
        rows = torch.arange(len(ids), device=ids.device)
        return F.normalize(self.text_projection(words[rows, first_real(ids, mask)]), dim=-1)

    def itc(self, pixels, ids, mask=None):
        """Image-text contrast: pixels [Bi,3,H,W], ids [Bt,T] -> cosines [Bi,Bt], the best query speaking for its image."""
        self.qformer.check_text()  # before the vision tower runs
        return note("ITC cosines", similarity(self.image_features(self.encode_image(pixels)), self.text_features(ids, mask)))

    def match(self, image, ids, mask=None):
        """image [B,N+1,Dv], ids [B,T] -> ITM logits [B,2]: every query votes with all words in view, the mean decides."""
        queries = self.query_tokens.expand(len(image), -1, -1)
        queries, _ = self.qformer(queries, image, ids, mask, attends="matching")
        return note("ITM logits", self.itm_head(queries).mean(1))

    def itm(self, pixels, ids, mask=None):
        """Image-text matching: pixels [B,3,H,W], ids [B,T] -> logits [B,2]; column 1 says that they belong together."""
        return self.match(self.encode_image(pixels), ids, mask)

    def write(self, image, ids, mask=None):
        """image [B,N+1,Dv], ids [B,T] -> logits [B,T,V] of the next word; the first one ([CLS]) is replaced by [DEC]."""
        ids = ids.clone()
        ids[torch.arange(len(ids), device=ids.device), first_real(ids, mask)] = self.config.qformer.dec_token_id
        queries = self.query_tokens.expand(len(image), -1, -1)
        _, words = self.qformer(queries, image, ids, mask, attends="generation")
        return note("ITG logits", F.linear(words, self.qformer.word_embeddings.weight))

    def itg_loss(self, pixels, ids, mask=None):
        """Image-grounded text generation: the loss of writing ids [B,T] in view of pixels [B,3,H,W]. -> loss, metrics."""
        return language_loss(self.write(self.encode_image(pixels), ids, mask), itg_labels(ids, mask))

    def stage1_loss(self, pixels, ids, mask=None, generator=None):
        """The sum of the three losses (paper 3.2) for B pairs; the image is encoded once. -> loss, metrics.

        generator: a torch.Generator on the CPU, from which the hard negatives are drawn. ITM judges up to 3B pairs: each image with its
        text, with a wrong text that ITC finds similar, and each text with such a wrong image. What has no wrong partner
        (a batch of one, or of equal texts) goes without.
        """
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        image = self.encode_image(pixels)
        cosines = similarity(self.image_features(image), self.text_features(ids, mask))  # [B,B]
        itc, itc_metrics = itc_loss(cosines)
        same = same_text(ids, mask)
        wrong_text, has_text = draw_hard_negatives(cosines, same, generator)
        wrong_image, has_image = draw_hard_negatives(cosines.T, same, generator)
        judged = torch.cat([image, image[has_text], image[wrong_image[has_image]]])
        words = torch.cat([ids, ids[wrong_text[has_text]], ids[has_image]])
        real = torch.cat([mask, mask[wrong_text[has_text]], mask[has_image]])
        itm, itm_metrics = itm_loss(self.match(judged, words, real), len(ids))
        itg, itg_metrics = language_loss(self.write(image, ids, mask), itg_labels(ids, mask))
        metrics = {"itc": itc.detach(), "itm": itm.detach(), "itg": itg.detach(), "itc_accuracy": itc_metrics["accuracy"]}
        metrics |= {"itm_accuracy": itm_metrics["accuracy"], "itg_accuracy": itg_metrics["accuracy"]}
        return itc + itm + itg, metrics

    @torch.no_grad()
    def caption(self, pixels, max_new_tokens=32):
        """What the Q-Former alone writes about pixels [B,3,H,W] (ITG): ids [B,n], greedy, filled up with [SEP].

        All of the text goes through the Q-Former again for each new word: it is short, and this is a look into stage 1.
        """
        image, c = self.encode_image(pixels), self.config.qformer
        ids = torch.full((len(image), 1), c.dec_token_id, device=image.device)
        done = torch.zeros(len(image), dtype=torch.bool, device=image.device)
        for _ in range(max_new_tokens):
            next_ids = self.write(image, ids)[:, -1].argmax(-1).masked_fill(done, c.sep_token_id)
            ids = torch.cat([ids, next_ids[:, None]], dim=1)
            done |= next_ids == c.sep_token_id
            if done.all():
                break
        return ids[:, 1:]

    # Stage 2: the queries' outputs as a prompt

    def embed(self, ids, pixels=None):
        """ids [B,S] with L image_token_ids per image, pixels [n,3,H,W] -> embeddings [B,S,Dt].

        Images are used up in the order of their placeholders, row by row. Raises ValueError when the counts differ.
        """
        if self.config.language is None:
            raise ValueError("this model has no language model (a checkpoint for retrieval): it compares, see itc and itm")
        is_image = ids == self.config.image_token_id  # [B,S]
        x = self.language.embed_tokens(ids)
        found = int(is_image.sum())
        if pixels is None:
            if found:
                raise ValueError(f"{found} image tokens in the ids, but no image was given")
            return x
        if pixels.ndim != 4:
            raise ValueError(f"pixels must be [n,3,H,W], got {list(pixels.shape)}")
        n, _, height, width = pixels.shape
        each = num_image_tokens(height, width, self.config)
        if found != n * each:
            raise ValueError(
                f"{found} image tokens in the ids, but {n} image(s) need {n * each}: {each} queries each,"
                f" for {height} x {width} pixels as for any other size"
            )
        x = x.clone()
        queries = self.language_projection(self.query(self.encode_image(pixels)))  # [n,L,Dt]
        x[is_image] = queries.flatten(0, 1).to(x.dtype)
        return note("queries and words", x)

    def forward(self, pixels, ids, mask=None):
        """pixels [n,3,H,W] or None, ids [B,S], mask [B,S] or None (True = real token) -> logits [B,S,V]."""
        x = self.embed(ids, pixels)
        return note("logits", self.language.lm_head(self.language.hidden(x, mask)))

    def generate(self, ids, pixels=None, mask=None, **options):
        """Continue each row of ids; images are encoded once. Options and result: see generate below."""
        with torch.no_grad():
            x = self.embed(ids, pixels)
            return generate(self.language, x, mask, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a published BLIP-2: a folder in the Hugging Face layout, or a hub id. See load_checkpoint."""
        folder = checkpoint_folder(path)
        config = config_from_published(read_config(folder), folder)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config)
        return load_checkpoint(model, folder, dtype, device)


def freeze(model, stage):
    """Set what trains (paper 3.2 and 3.3). Stage 1: queries, Q-Former and the heads of its losses. Stage 2: queries, the
    Q-Former without its text side, and the projection to the language model. In both also ln_post, the vision tower's
    last LayerNorm, as in the authors' code. Never anything else: the towers' knowledge is what is borrowed, and at the
    published sizes relearning it would cost too much. Returns the parameters that train."""
    if stage not in (1, 2):
        raise ValueError(f"BLIP-2 trains in stages 1 and 2, not {stage!r}")
    c = model.config
    if stage == 1 and not c.qformer.text:
        raise ValueError("this model cannot train in stage 1: it has no text side")
    if stage == 2 and c.language is None:
        raise ValueError("this model cannot train in stage 2: it has no language model")
    model.requires_grad_(False)
    model.query_tokens.requires_grad_(True)
    trained = [model.vision.ln_post, model.qformer]
    trained += [model.vision_projection, model.text_projection, model.itm_head] if stage == 1 else [model.language_projection]
    for module in trained:
        module.requires_grad_(True)
    if stage == 2 and c.qformer.text:
        for block in model.qformer.layers:
            block.mlp_text.requires_grad_(False)
            block.ln_text.requires_grad_(False)
        model.qformer.word_embeddings.requires_grad_(False)
        model.qformer.position_embeddings.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def similarity(image, text):
    """image [Bi,L,E], text [Bt,E], of length one -> cosines [Bi,Bt]: of the L queries the most similar one counts, so
    that a query may care for one thing only and need not suit every text."""
    return torch.einsum("ile,te->itl", image, text).amax(-1)


def itc_loss(cosines, temperature=ITC_TEMPERATURE):
    """Symmetric cross-entropy over cosines [B,B]: image i belongs to text i. -> loss, metrics.

    Where nothing is learned yet, all cosines are alike and the loss is ln B. With B = 1 there is nothing to tell apart
    and the loss is 0. Equal texts in a batch cannot be told apart either: each costs its image the log of their number.
    """
    target = torch.arange(len(cosines), device=cosines.device)
    logits = cosines.float() / temperature
    accuracy = (logits.argmax(1) == target).float().mean()
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, {"accuracy": accuracy.detach()}


def same_text(ids, mask):
    """ids, mask [B,T], padded on one side -> [B,B], True where row i and row j say the same."""
    ids = ids.masked_fill(~mask, -1)  # what stands under the padding does not matter
    return (ids[:, None] == ids[None]).all(-1)


def draw_hard_negatives(cosines, same, generator=None, temperature=ITC_TEMPERATURE):
    """For each row of cosines [B,B] a wrong column, drawn in proportion to the softmax of its similarity (BLIP, Li et al.
    2022, 3.2), columns of the same text excluded. -> index [B], found [B]; where all texts are the same, found is False
    and the index means nothing."""
    found = ~same.all(1)
    logits = (cosines.detach().float() / temperature).masked_fill(same, -torch.inf)
    chances = logits.masked_fill(~found[:, None], 0.0).softmax(-1)  # (a row of -inf alone would be NaN)
    return torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(cosines.device), found


def itm_loss(logits, matching):
    """Cross-entropy of logits [R,2], whose first `matching` rows are pairs that belong together, and the others not.
    -> loss, metrics. Undecided, it is ln 2; always "no" is right for two thirds of the 3B pairs of stage 1."""
    target = (torch.arange(len(logits), device=logits.device) < matching).long()
    accuracy = (logits.argmax(-1) == target).float().mean()
    return F.cross_entropy(logits.float(), target), {"accuracy": accuracy.detach()}


def first_real(ids, mask=None):
    """Column of the first real token of each row, [B]: where [CLS] stands, also behind padding on the left."""
    return torch.zeros(len(ids), dtype=torch.long, device=ids.device) if mask is None else mask.int().argmax(1)


def itg_labels(ids, mask=None):
    """ids, mask [B,T] -> labels [B,T] for language_loss: all words but the first, since nobody is asked to write [CLS]."""
    labels = ids.clone() if mask is None else ids.masked_fill(~mask, IGNORE_INDEX)
    labels[torch.arange(len(ids), device=ids.device), first_real(ids, mask)] = IGNORE_INDEX
    return labels


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
# Prompts: text to ids


def build_prompt(question):
    """The paper's form of a question to OPT (4.1); any other text is continued as it stands; none asks for a caption.

    >>> build_prompt("what is this?")
    'Question: what is this? Answer:'
    """
    question = question.strip()
    if "<image>" in question:
        raise ValueError("the image stands in front of every BLIP-2 prompt: leave <image> out")
    return f"Question: {question} Answer:" if question.endswith("?") else question


def prompt_ids(ids, config):
    """The ids of a prompt, as the tokenizer gives them (with its begin-of-text token), behind the image's placeholders."""
    side = config.vision.image_size
    return [config.image_token_id] * num_image_tokens(side, side, config) + list(ids)


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
    "encoder.layers.{}.self_attn.qkv": "blocks.{}.attn.qkv",  # three in one; split in our_tensors
    "encoder.layers.{}.self_attn.projection": "blocks.{}.attn.out_proj",
    "encoder.layers.{}.layer_norm2": "blocks.{}.ln_2",
    "encoder.layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "encoder.layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "patch_embedding",
    "embeddings.position_embedding": "position_embedding.weight",
    "post_layernorm": "ln_post",
}
QFORMER_NAMES = {  # "output" is the way out of the layer before it: of the attention, or of the feed-forward
    "layernorm": "layernorm",
    "encoder.layer.{}.attention.attention.query": "layers.{}.self_attn.q_proj",
    "encoder.layer.{}.attention.attention.key": "layers.{}.self_attn.k_proj",
    "encoder.layer.{}.attention.attention.value": "layers.{}.self_attn.v_proj",
    "encoder.layer.{}.attention.output.dense": "layers.{}.self_attn.out_proj",
    "encoder.layer.{}.attention.output.LayerNorm": "layers.{}.ln_self",
    "encoder.layer.{}.crossattention.attention.query": "layers.{}.cross_attn.q_proj",
    "encoder.layer.{}.crossattention.attention.key": "layers.{}.cross_attn.k_proj",
    "encoder.layer.{}.crossattention.attention.value": "layers.{}.cross_attn.v_proj",
    "encoder.layer.{}.crossattention.output.dense": "layers.{}.cross_attn.out_proj",
    "encoder.layer.{}.crossattention.output.LayerNorm": "layers.{}.ln_cross",
    "encoder.layer.{}.intermediate_query.dense": "layers.{}.mlp_query.fc1",
    "encoder.layer.{}.output_query.dense": "layers.{}.mlp_query.fc2",
    "encoder.layer.{}.output_query.LayerNorm": "layers.{}.ln_query",
    "encoder.layer.{}.intermediate.dense": "layers.{}.mlp_text.fc1",
    "encoder.layer.{}.output.dense": "layers.{}.mlp_text.fc2",
    "encoder.layer.{}.output.LayerNorm": "layers.{}.ln_text",
}
OPT_NAMES = {  # our names are OPT's own, but for the MLP, which stands in a module of its own
    "embed_tokens": "embed_tokens",
    "embed_positions": "embed_positions",
    "layers.{}.self_attn.q_proj": "layers.{}.self_attn.q_proj",
    "layers.{}.self_attn.k_proj": "layers.{}.self_attn.k_proj",
    "layers.{}.self_attn.v_proj": "layers.{}.self_attn.v_proj",
    "layers.{}.self_attn.out_proj": "layers.{}.self_attn.out_proj",
    "layers.{}.self_attn_layer_norm": "layers.{}.self_attn_layer_norm",
    "layers.{}.fc1": "layers.{}.mlp.fc1",
    "layers.{}.fc2": "layers.{}.mlp.fc2",
    "layers.{}.final_layer_norm": "layers.{}.final_layer_norm",
    "final_layer_norm": "final_layer_norm",
}
HEAD_NAMES = {name: name for name in ("query_tokens", "vision_projection", "text_projection", "itm_head", "language_projection")}

TOWERS = [  # (published prefix, our prefix, table), tried in this order
    ("vision_model.", "vision.", VISION_NAMES),
    ("embeddings.", "qformer.", {name: name for name in ("word_embeddings", "position_embeddings")}),
    ("qformer.", "qformer.", QFORMER_NAMES),
    ("language_model.model.decoder.", "language.", OPT_NAMES),
    ("language_model.lm_head", "language.embed_tokens", {"": ""}),  # the same matrix once more, in older files
    ("", "", HEAD_NAMES),
]
LEFT_OUT = [r"\.position_ids$"]  # a buffer 0, 1, 2, ... that older files carry


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
    """The published config.json (a dict) -> BLIP2Config. Fields it leaves out have the published classes' defaults."""
    if raw.get("model_type") != "blip-2":
        raise ValueError(f"{folder} holds a {raw.get('model_type')!r} checkpoint; blip2.py reads 'blip-2'")
    shape = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads")
    shape |= dict(mlp_width="intermediate_size", activation="hidden_act", norm_eps="layer_norm_eps")
    vision = replace_published(VIT_G, raw.get("vision_config") or {}, shape | dict(image_size="image_size", patch_size="patch_size"))
    published = raw.get("qformer_config") or {}
    qformer = replace_published(
        QFormerConfig(vocab_size=30522, text=False),  # what Blip2QFormerConfig means by silence
        published,
        shape | dict(vocab_size="vocab_size", context="max_position_embeddings", cross_every="cross_attention_frequency")
        | dict(text="use_qformer_text_input", pad_token_id="pad_token_id"),
    )
    # [DEC] was added to BERT's vocabulary, at its end
    qformer = replace(qformer, queries=raw.get("num_query_tokens", 32), dec_token_id=qformer.vocab_size - 1)
    published_text = raw.get("text_config") or {}
    return BLIP2Config(
        image_config_from_published(vision, folder),
        qformer,
        # whether the Q-Former reads text is what tells the two kinds of checkpoints apart: retrieval, or generation
        None if qformer.text else opt_from_published(published_text, folder),
        embed_dim=raw.get("image_text_hidden_size", 256),
        image_token_id=raw.get("image_token_index") or raw.get("image_token_id") or 50265,
        eos_token_id=published_text.get("eos_token_id", 2),
    )


def opt_from_published(published, folder):
    """The text_config of a published config.json (a dict) -> OPTConfig. Raises ValueError on what OPT is not here."""
    if published.get("model_type", "opt") != "opt":
        raise ValueError(f"{folder} has a {published['model_type']!r} language model; blip2.py reads 'opt'")
    names = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", mlp_width="ffn_dim")
    names |= dict(vocab_size="vocab_size", context="max_position_embeddings", activation="activation_function")
    config = replace_published(OPTConfig(width=768, layers=12, heads=12, mlp_width=3072), published, names)
    if not published.get("do_layer_norm_before", True):
        raise ValueError(f"{folder} has an OPT with its norms after the layers (as OPT-350m), which blip2.py does not build")
    if published.get("word_embed_proj_dim") not in (None, config.width):
        raise ValueError(f"{folder} has word embeddings of width {published['word_embed_proj_dim']} in an OPT of {config.width}")
    if not published.get("tie_word_embeddings", True):
        raise ValueError(f"{folder} has an OPT whose output matrix is not its word embedding, which blip2.py does not build")
    return config


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
    """A tensor of a published file -> [(name of our parameter, its tensor)]. The vision tower's file fuses query, key and
    value into one matrix of three times the height, and their biases too."""
    name = our_name(published)
    if name is None or ".attn.qkv." not in name:
        return [(name, tensor)]
    return [(name.replace("qkv", f"{kind}_proj"), part) for kind, part in zip("qkv", tensor.chunk(3), strict=True)]


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
        model = BLIP2(config)
    side, c = config.vision.image_size, config.language
    tokens, words = num_image_tokens(side, side, config), 64
    pixels = torch.empty(1, 3, side, side, device="meta")
    rows, columns = patch_grid(side, side, config.vision)
    image = torch.empty(1, rows * columns + int(config.vision.class_token), config.vision.width, device="meta")
    total = count_parameters(model)
    lines = [f"{name}: {total:,} parameters", "", table(describe(model)), ""]
    for stage, possible in ((1, config.qformer.text), (2, c is not None)):
        if possible:
            trained = sum(p.numel() for p in freeze(model, stage))
            lines.append(f"stage {stage}: {trained:,} trained ({100 * trained / total:.1f} %), {total - trained:,} frozen")
    model.requires_grad_(False)
    lines += [
        f"the Q-Former's layers 0, {config.qformer.cross_every}, ... look at the image; the one shown above does",
        f"image {side} x {side} -> {image.shape[1]} features -> {tokens} queries, as for an image of any size",
        f"FLOPs: {count_flops(lambda: model.encode_image(pixels)):,} to encode an image,"
        f" {count_flops(lambda: model.query(image)):,} for the queries to read it",
    ]
    if c is not None:
        prompt = torch.empty(1, tokens + words, c.width, device="meta")
        cache = 2 * c.layers * c.kv_heads * c.head_width  # numbers per token: keys and values of every layer
        lines += [
            f"FLOPs: {count_flops(lambda: model.language.hidden(prompt)):,} for the decoder to read them with {words} words,",
            f"{2 * (count_parameters(model.language) - (c.context + OPT.OFFSET) * c.width):,} for each new word, but for its attention",
            f"KV cache: {2 * cache:,} bytes a token in 16 bits, {2 * cache * tokens:,} for one image",
        ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_trace():
    """The shapes through one forward pass of each stage of the tiny model, with random weights."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    model = BLIP2(config)
    side = config.vision.image_size
    tokens = num_image_tokens(side, side, config)
    text, ids = torch.randint(0, 400, (2, 5)), torch.randint(0, 400, (2, tokens + 6))
    ids[:, :tokens] = config.image_token_id
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        with trace() as stage1:
            model.itm(pixels, text)
        with trace() as stage2:
            model(pixels, ids)
    return (
        f"tiny, random weights, 2 images and 2 texts of 5 tokens; stage 1, matching: {tokens} queries and 5 words\n\n{stage1}"
        f"\n\nstage 2: {tokens} queries alone, then the decoder with their outputs and 6 words\n\n{stage2}"
    )


def show_mask():
    """Who may look at whom, drawn from the same rule that the attention kernels follow."""
    draw = lambda attends, mask=None: draw_mask(5, 5, **qformer_rule(attends, 2, 3, mask))
    padded = torch.tensor([[True, True, False]])
    return "\n\n".join(
        [
            "rows look at columns; # may, . may not",
            "vision tower: the class token and all patches see each other\n" + draw_mask(5, 5),
            "Q-Former, 2 queries and 3 words, contrastive (ITC): queries and words do not meet\n" + draw("contrastive"),
            "Q-Former, matching (ITM): all see all\n" + draw("matching"),
            "Q-Former, generation (ITG): a word sees the queries and the words before it\n" + draw("generation"),
            "the same with 2 words and 1 of padding\n" + draw("generation", padded),
            "every query sees every patch in the cross-attention; words never do\n" + draw_mask(2, 5),
            "decoder: causal, here 2 query outputs and 4 words\n" + draw_mask(6, 6, causal=True),
        ]
    )


def check_room(tokens, new, config):
    if tokens + new > config.language.context:
        raise ValueError(f"the prompt has {tokens} tokens, the context holds {config.language.context}: shorten it")


def answer(model, image, ids, decode, max_new_tokens=32):
    """A PIL image and the ids of a prompt, placeholders included -> what the model goes on to say."""
    config, device = model.config, model.query_tokens.device
    check_room(len(ids), 1, config)
    pixels = preprocess([image], config.vision).to(device)
    room = min(max_new_tokens, config.language.context - len(ids))
    new = model.generate(torch.tensor([ids], device=device), pixels, max_new_tokens=room, eos_id=config.eos_token_id)
    return decode([i for i in new[0].tolist() if i != config.eos_token_id]).strip()


@torch.no_grad()
def judge_prompts(model, image, rows):
    """How well each text (a list of ids that begins with [CLS]) fits a PIL image: ITM's probability and ITC's cosine, [n] each."""
    device = model.query_tokens.device
    features = model.encode_image(preprocess([image], model.config.vision).to(device))
    ids, mask = (x.to(device) for x in pad_rows(rows, model.config.qformer.pad_token_id))
    belongs = model.match(features.expand(len(rows), -1, -1), ids, mask).float().softmax(-1)[:, 1]
    return belongs.cpu(), similarity(model.image_features(features), model.text_features(ids, mask))[0].float().cpu()


def run_weights(args):
    """--weights DIR --image FILE [--prompt TEXT]: a published checkpoint describes your image, answers about it, or (a
    checkpoint for retrieval) judges how well each prompt fits."""
    if not args.image:
        raise ValueError("--weights needs --image, as in --weights DIR --image photo.jpg --prompt 'how many cats are there?'")
    images = [load_image(path) for path in args.image]
    prompts = [build_prompt(prompt) for prompt in args.prompt]
    folder = checkpoint_folder(args.weights)
    config = config_from_published(read_config(folder), folder)  # a checkpoint of another family is found before gigabytes are read
    tokenizer = load_tokenizer(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if config.language is None:
        if not prompts or not all(prompt.strip() for prompt in args.prompt):
            raise ValueError("a checkpoint for retrieval needs texts to judge, as in --prompt 'a cat' --prompt 'a dog'")
        rows = [tokenizer.encode(prompt).ids for prompt in args.prompt]
        for row in rows:
            if len(row) > config.qformer.context:
                raise ValueError(f"the prompt has {len(row)} tokens, the context holds {config.qformer.context}: shorten it")
    else:
        rows = [prompt_ids(tokenizer.encode(prompt).ids, config) for prompt in prompts or [""]]  # "" asks for a caption
        for row in rows:
            check_room(len(row), 1, config)
    model = BLIP2.from_pretrained(folder, getattr(torch, args.dtype), check_device(args.device))
    for path, image in zip(args.image, images, strict=True):
        if config.language is not None:
            for prompt, row in zip(prompts or [""], rows, strict=True):
                asked = f"{path}: {prompt} -> " if len(images) * len(rows) > 1 else ""  # one answer needs no label
                print(asked + answer(model, image, row, tokenizer.decode))
            continue
        belongs, cosines = judge_prompts(model, image, rows)
        print(f"{path}: do they belong together (ITM), and their cosine (ITC)")
        for i in belongs.argsort(descending=True).tolist():
            print(f"  {100 * belongs[i]:5.1f} %  {cosines[i]:6.3f}  {args.prompt[i]}")


@torch.no_grad()
def query_attention(model, pixels):
    """What each query looks at: its cross-attention to the patches, mean over heads and layers, [L,rows,columns].
    pixels [1,3,H,W]; the share that goes to the class token is left out."""
    with trace(maps=True) as t:
        model.query(model.encode_image(pixels))
    maps = torch.stack([x for name, x in t.rows if name == "cross-attention weights"])  # [layers,1,H,L,N+1]
    maps = maps.mean((0, 2))[0, :, int(model.config.vision.class_token) :]  # [L,N]
    return maps.view(-1, *patch_grid(*pixels.shape[2:], model.config.vision)).cpu()


def heat_picture(image, heat, size):
    """The image, darkened where little attention falls."""
    shade = (255 * heat / heat.max()).to(torch.uint8).numpy()
    shade = Image.fromarray(shade).resize((size, size), Image.Resampling.NEAREST)
    image = image.resize((size, size), Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size), shade)


def draw_queries(rows, file, size=64):
    """PNG: for each (image, heat of every query [L,rows,columns], text) the image, what each query looks at, the text."""
    across = 1 + min(8, len(rows[0][1]))
    deep = -(-len(rows[0][1]) // (across - 1))  # lines of queries per image
    page = Image.new("RGB", (across * (size + 4) + 280, len(rows) * (deep * (size + 4) + 8) + 24), "white")
    pen = ImageDraw.Draw(page)
    pen.text((4, 4), "image", fill="black")
    pen.text((size + 8, 4), "what query 0, 1, 2 ... looks at", fill="black")
    for i, (image, heats, text) in enumerate(rows):
        y = 24 + i * (deep * (size + 4) + 8)
        page.paste(image.resize((size, size), Image.Resampling.NEAREST), (4, y))
        for q, heat in enumerate(heats):
            line, column = divmod(q, across - 1)
            page.paste(heat_picture(image, heat, size), ((column + 1) * (size + 4) + 4, y + line * (size + 4)))
        pen.multiline_text((across * (size + 4) + 12, y + 4), text.replace(", ", ",\n"), fill="black", spacing=4)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file)


def demo(args):
    """Train the toy BLIP-2 in front of the reader if it is not cached, then show what each stage has taught it."""
    import train_tiny as tiny

    device, config = check_device(args.device), PRESETS["tiny"]
    own = [load_image(path) for path in args.image]  # wrong input is found before the training
    for prompt in args.prompt:
        if not prompt.strip() or "<image>" in prompt:
            raise ValueError("the prompt must be words, as in --prompt 'describe the picture.'; the image stands in front by itself")
        check_room(len(tiny.blip2_prompt(config, prompt)), 16, config)
    L, rng = config.qformer.queries, tiny.rng_for("blip2 demo")
    scenes = [tiny.make_scene(rng, split="test") for _ in range(3)]
    print(f"In goes an image of 32 x 32 pixels, 17 features. {L} queries look at them, and OPT, which never saw an image, reads")
    print(f"their outputs as if they were words:\n    'USER: ({L} vectors)\\n{tiny.DESCRIBE} ASSISTANT:'")
    untrained = tiny.untrained_blip2(args.device)
    print(f"before training OPT says: {tiny.blip2_captions(untrained, scenes[:1])[0]!r}")
    stage1, model = tiny.demo_blip2(args.device)
    if own or args.prompt:
        for prompt in args.prompt or [tiny.DESCRIBE]:
            for image in own or [tiny.draw(scenes[0])]:
                print(f"{prompt} -> {answer(model, image, tiny.blip2_prompt(config, prompt), tiny.decode)}")
        return
    written, said, rows = tiny.qformer_captions(stage1, scenes), tiny.blip2_captions(model, scenes), []
    print("\nthree images it has never seen; after stage 1 the Q-Former can write by itself, after stage 2 OPT writes:")
    for scene, first, second in zip(scenes, written, said, strict=True):
        right = tiny.caption(scene)
        print(f"    [{right}]")
        for stage, text in ((1, first), (2, second)):
            print(f"        stage {stage}: {text if text != right else 'exactly that'}")
        heats = query_attention(model, preprocess([tiny.draw(scene)], config.vision).to(device))
        rows.append((tiny.draw(scene), heats, second))
    many = [tiny.make_scene(rng, split="test") for _ in range(200)]
    for stage, texts in ((1, tiny.qformer_captions(stage1, many)), (2, tiny.blip2_captions(model, many))):
        things, whole = tiny.things_right(texts, many), tiny.exactly_right(texts, many)
        print(f"after stage {stage}, of 200 more images: {things:.0%} of the things described rightly, {whole:.0%} of the images")
    if not tiny.recipe_is_done("blip2", tiny.BLIP2_STEPS):
        print("(both stages were cut short, for you; python train_tiny.py blip2 trains them fully, and the demo then shows that)")
    print("\nwhere the queries look in the first image (a query's number stands on the patch it looks at most):")
    heats = rows[0][1]
    busiest = heats.flatten(1).argmax(1).tolist()
    for r in range(heats.shape[1]):
        cells = [",".join(str(q) for q, at in enumerate(busiest) if at == r * heats.shape[2] + c) for c in range(heats.shape[2])]
        print("    " + " ".join(f"{cell or '.':^14}" for cell in cells))
    file = tiny.RUNS / "blip2" / "demo.png"
    draw_queries(rows, file)
    print(f"written: {file} (three images, and what each query looks at)")


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
    sys.modules.setdefault("blip2", sys.modules[__name__])  # train_tiny imports blip2: let it find this very module
    main()
