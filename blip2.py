"""
BLIP-2: 32 learned queries extract from a frozen vision encoder what a frozen language model needs.

    BLIP-2  Li et al. 2023, Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
            Models, arXiv 2301.12597

The idea. Large vision encoders and large language models exist already, and training them again together is expensive.
BLIP-2 keeps both frozen and trains a small network between them, the Q-Former. The Q-Former is a BERT whose input is
not text but L = 32 learned vectors, the queries. The queries attend to each other (self-attention) and to the image
(cross-attention, in every second layer). Their 32 outputs are all that the language model receives, whatever the size
of the image (a bottleneck of queries, type C).

    image [B,3,H,W]
      | vision encoder, frozen                     text ids [B,T]
    [B,N,Dv]                                         | word + position embedding
      |  keys and values                           [B,T,D]
      v                                              |
    queries [L,D] ------> Q-Former: one self-attention for queries and words, a feed-forward layer for each;
                            |       only the queries attend to the image    |
                          [B,L,D]                                         [B,T,D]        the three losses of stage 1
                            | language_projection
                          [B,L,Dt] in the place of the <image> ids: [B,S,Dt] -- OPT, frozen --> logits [B,S,V]   stage 2

Stage 1 (paper 3.2) trains the queries to extract from the image what a text would say about it. One network has three
losses, which differ in who may attend to whom (rows attend to columns; here 2 queries, then 3 words):

    ITC, contrastive      ITM, matching         ITG, generation
    # # . . .             # # # # #             # # . . .      ITC: queries and words are kept apart, because image and
    # # . . .             # # # # #             # # . . .           text are compared afterwards.
    . . # # #             # # # # #             # # # . .      ITM: all attend to all; do image and text fit together?
    . . # # #             # # # # #             # # # # .      ITG: a word attends to the queries and to earlier words,
    . . # # #             # # # # #             # # # # #           so the image can help only through the queries.

The code runs ITC in two passes, queries alone and words alone. The result is the same, and every image can be compared
with every text.

Stage 2 (paper 3.3) puts the outputs of the queries in front of the frozen language model, as a prompt made of vectors.
It trains the Q-Former and the projection with the loss of the text that follows.

Letters. B batch, T text length, S length of queries and words together, N image features, P patch size, L queries,
D width (of the Q-Former; Dv of the vision encoder and Dt of the decoder where they meet it), H heads, Dh head width,
V vocabulary, E width of the space in which ITC compares. n images, or Bi images and Bt texts, where they may differ
from B. [B,3,H,W] is always pixels.

Conventions on which code in this field disagrees
    masks    True means "may attend" or "real token".
    padding  Texts for the Q-Former are padded on the right, so words[:, 0] is [CLS]; prompts of generate on the left.
    labels   have the same positions as ids; the shift by one happens in one place, language_loss.
    norms    Vision encoder and OPT normalise before a layer (pre-norm), the Q-Former after it, because BERT did.

Paper / published code (LAVIS, lavis/models/blip2_models) / this file
    - Initial weights. The Q-Former starts as BERT-base with new cross-attention (paper 3.1); the published code copies
      the text's feed-forward layers for the queries. Here it starts from random weights: the toy world has no BERT.
    - What is frozen. The LayerNorm on top of the vision encoder (ln_post) is new and does train, as in the published
      code, though the paper calls the encoder frozen. ViT-g is used without its last layer: 39 of 40 (paper 3.4).
    - Temperature. The published code learns the temperature of ITC, but the published checkpoints do not contain it.
      Here it is a constant, and `itc` returns plain cosines, as the published model does.
    - ITG head. The published code has BERT's transform before the tied output matrix; the checkpoints have no ITG head.
      Here the output matrix is the word embedding matrix itself, so ITG needs no parameters of its own.
    - Hard negatives. The published code excludes only the pair itself, so that an equal caption can be called wrong,
      and adds 1e-4 to every probability. Here equal texts are never drawn and nothing is added.
    - Left out: label smoothing (0.1 in ITC and ITG), beam search (published captions use 5 beams), the encoder-decoder
      FlanT5, and OPT-350m, the one OPT with post-norm.

What to try: --show-mask; give the tiny model 2 queries instead of 16; send queries and words of ITC through the
Q-Former together under the matching mask, and explain why the loss collapses; leave out ITG and read the captions;
leave out stage 1 (train_tiny.py blip2 --ablations); compare the queries' outputs with each other after each stage.
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

from kernels import Rule, attention

IGNORE_INDEX = -100  # a label that does not count; cross_entropy's own default
ITC_TEMPERATURE = 0.07  # where the published code's learned temperature starts, and CLIP's

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class VisionConfig:  # EVA-CLIP's ViT-g/14 without its last layer
    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    layers: int = 39
    heads: int = 16
    mlp_width: int = 6144
    norm_eps: float = 1e-6
    clip: bool = False  # the toy's encoder is CLIP's: QuickGELU, a LayerNorm before the blocks, no bias for the patches
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the pixels CLIP was trained on
    std: tuple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class QFormerConfig:  # BERT-base
    queries: int = 32
    vocab_size: int = 30522
    context: int = 512
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    cross_every: int = 2  # layers 0, 2, 4 ... attend to the image
    norm_eps: float = 1e-12
    text: bool = False  # checkpoints of stage 2 have no text side: there the queries are alone
    dec_token_id: int = 30522  # [DEC] takes the place of [CLS] when text is to be generated
    sep_token_id: int = 102  # [SEP] ends a text
    pad_token_id: int = 0


@dataclass(frozen=True)
class OPTConfig:  # OPT-125m
    vocab_size: int = 50272
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    context: int = 2048
    norm_eps: float = 1e-5

    @property
    def kv_heads(self):
        return self.heads  # OPT has no grouped heads

    @property
    def head_width(self):
        return self.width // self.heads


@dataclass(frozen=True)
class BLIP2Config:
    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    language: OPTConfig | None = None  # None: a model of stage 1 only, for retrieval and matching
    embed_dim: int = 256  # E, where ITC compares
    image_token_id: int = 50265
    eos_token_ids: tuple = (2,)


OPT_2_7B = OPTConfig(width=2560, layers=32, heads=32, mlp_width=10240)
OPT_6_7B = OPTConfig(width=4096, layers=32, heads=32, mlp_width=16384)

HALF = (0.5, 0.5, 0.5)
NEWLINE = 50118  # ends an answer, which is one line

PRESETS = {
    # what train_tiny.py trains in front of you: the toy CLIP's encoder without its last block, 16 queries, a toy OPT
    "tiny": BLIP2Config(
        VisionConfig(32, 8, width=96, layers=3, heads=4, mlp_width=384, norm_eps=1e-5, clip=True, mean=HALF, std=HALF),
        QFormerConfig(
            16, 512, 64, width=96, layers=4, heads=2, mlp_width=256, text=True,
            dec_token_id=506, sep_token_id=505, pad_token_id=496,
        ),
        OPTConfig(512, width=96, layers=3, heads=4, mlp_width=256, context=256),
        embed_dim=64,
        image_token_id=499,
        eos_token_ids=(498,),
    ),
    "blip2-itm-vit-g": BLIP2Config(qformer=QFormerConfig(vocab_size=30523, text=True)),  # BERT's vocabulary and [DEC]
    "blip2-opt-2.7b": BLIP2Config(language=OPT_2_7B, eos_token_ids=(NEWLINE,)),
    "blip2-opt-6.7b": BLIP2Config(language=OPT_6_7B, eos_token_ids=(NEWLINE,)),
}  # fmt: skip


def num_image_tokens(height, width, config):
    """Tokens the decoder reads for one image: one per query, whatever the size of the image."""
    return config.qformer.queries


# ----------------------------------------------------------------------------------------------------------------------
# Parts that the transformers share


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)  # Hendrycks & Gimpel 2016, the sigmoid approximation of GELU


class MLP(nn.Module):
    def __init__(self, width, mlp_width, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.activation = activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head attention of x [B,T,D] to a context [B,N,Dc]: x itself in self-attention, the features of the image in
    cross-attention. rule: which position attends to which, see kernels.attention."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(context_width, width)
        self.v_proj = nn.Linear(context_width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, context, rule=None):
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,T,Dh]
        k = self.k_proj(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,N,Dh]
        v = self.v_proj(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        o = attention(q, k, v, rule)  # [B,H,T,Dh]
        return self.out_proj(o.transpose(1, 2).flatten(2))


# ----------------------------------------------------------------------------------------------------------------------
# Vision encoder


class Block(nn.Module):
    """Pre-norm transformer block: the residual stream x is only ever added to. Published: eva_vit.py, Block."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads, config.width)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, quick_gelu if config.clip else F.gelu)

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h, h)
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """ViT (Dosovitskiy et al. 2021, arXiv 2010.11929): an image is read as a sequence of patches.

    forward(pixels [B,3,H,W]) -> [B,N,Dv], the class token first: N = 1 + (H / P) * (W / P). The weights are those of a
    trained encoder: EVA-CLIP's, or in the toy CLIP's. Published: LAVIS, lavis/models/eva_vit.py, VisionTransformer.
    """

    def __init__(self, config):
        super().__init__()
        D, P, grid = config.width, config.patch_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=P, stride=P, bias=not config.clip)  # one map for every patch
        self.position_embedding = nn.Embedding(1 + grid * grid, D)
        self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        self.ln_pre = nn.LayerNorm(D, eps=config.norm_eps) if config.clip else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(D, eps=config.norm_eps)  # new in BLIP-2, applied in BLIP2.encode_image
        nn.init.normal_(self.position_embedding.weight, std=D**-0.5)  # torch's default, 1, would drown the patches

    def forward(self, pixels):
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # [B,Dv,H/P,W/P]
        x = x.flatten(2).transpose(1, 2)  # [B,N-1,Dv], patches in reading order
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [B,N,Dv]
        x = self.ln_pre(x + self.position_embedding.weight)
        for block in self.blocks:
            x = block(x)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Connector: the Q-Former


def qformer_rule(attends, L, mask):
    """Who may attend to whom among L queries and the T words behind them -> a Rule of kernels.attention.

    attends: "contrastive", "matching" or "generation" (paper 3.2, Figure 2); mask [B,T], True = real word. Queries and
    words attend within their segment. Padding is in segment -1, which attends to nothing and is attended to by nothing.
    """
    B = len(mask)
    segment_of_words = {"contrastive": 1, "matching": 0, "generation": 0}[attends]  # the queries are in segment 0
    queries = torch.zeros(B, L, dtype=torch.int32, device=mask.device)
    words = torch.where(mask, segment_of_words, -1).int()
    segments = torch.cat([queries, words], dim=1)  # [B,L+T]
    if attends != "generation":
        return Rule(q_segments=segments, k_segments=segments)
    prefix = torch.full((B,), L, dtype=torch.int32, device=mask.device)  # causal, but the L queries are open to all
    return Rule(causal=True, prefix=prefix, q_segments=segments, k_segments=segments)


class QFormerBlock(nn.Module):
    """BERT's block: add, then normalise (post-norm). Queries and words share the self-attention. After it the queries
    attend to the image (in every second block), and queries and words have a feed-forward layer each. Published: LAVIS,
    lavis/models/blip2_models/Qformer.py, BertLayer."""

    def __init__(self, config, Dv, cross):
        super().__init__()
        D, heads, eps = config.width, config.heads, config.norm_eps
        self.self_attn = Attention(D, heads, D)
        self.ln_self = nn.LayerNorm(D, eps=eps)
        self.cross_attn = Attention(D, heads, Dv) if cross else None
        self.ln_cross = nn.LayerNorm(D, eps=eps) if cross else None
        self.mlp_query = MLP(D, config.mlp_width, F.gelu)
        self.ln_query = nn.LayerNorm(D, eps=eps)
        self.mlp_text = MLP(D, config.mlp_width, F.gelu) if config.text else None
        self.ln_text = nn.LayerNorm(D, eps=eps) if config.text else None

    def forward(self, x, L, image, rule):
        """x [B,L+T,D], of which the first L are queries; image [B,N,Dv]."""
        x = self.ln_self(x + self.self_attn(x, x, rule))
        queries, words = x[:, :L], x[:, L:]
        if self.cross_attn is not None:
            queries = self.ln_cross(queries + self.cross_attn(queries, image))
        queries = self.ln_query(queries + self.mlp_query(queries))
        if self.mlp_text is not None:
            words = self.ln_text(words + self.mlp_text(words))
        return torch.cat([queries, words], dim=1)


class QFormer(nn.Module):
    """The querying transformer (paper 3.1): BERT with cross-attention. Published: Qformer.py, BertModel.

    forward(queries [B,L,D], words [B,T,D], image [B,N,Dv], attends, mask [B,T] or None) -> outputs [B,L,D] and [B,T,D].
    words: see `embed`. L or T may be 0: words alone, or queries alone. mask: True = real word, None = all are; padding
    stands on the right, else ValueError.
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
            if "embeddings" in name:
                nn.init.normal_(parameter, std=0.02)  # as BERT; small, so that the first loss of ITG is ln V
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 * (768 / D) ** 0.5)  # BERT's 0.02 at its width of 768
            elif name.endswith("proj.bias") or ".fc" in name:
                nn.init.zeros_(parameter)

    def embed(self, ids):
        """ids [B,T] -> word and position embeddings [B,T,D]. Raises ValueError if a text is longer than the context."""
        T, context = ids.shape[1], self.config.context
        if T > context:
            raise ValueError(f"a text of {T} tokens does not fit the Q-Former's context of {context}")
        positions = torch.arange(T, device=ids.device).expand_as(ids)  # [B,T]
        return self.word_embeddings(ids) + self.position_embeddings(positions)

    def forward(self, queries, words, image, attends, mask=None):
        L = queries.shape[1]
        if mask is None:
            mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        elif not mask[:, 0].all():
            raise ValueError("texts for the Q-Former are padded on the right: here a text begins with padding")
        rule = qformer_rule(attends, L, mask)
        x = self.layernorm(torch.cat([queries, words], dim=1))  # [B,L+T,D]
        for layer in self.layers:
            x = layer(x, L, image, rule)
        return x[:, :L], x[:, L:]


# ----------------------------------------------------------------------------------------------------------------------
# Language model: OPT


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


class OPTAttention(nn.Module):
    """Causal self-attention with biases. The positions are in the embeddings, so nothing is rotated here."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x, rule, cache=None, layer=0):
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,T,Dh]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # [B,H,length+T,Dh]
        o = attention(q, k, v, rule)  # [B,H,T,Dh]
        return self.out_proj(o.transpose(1, 2).flatten(2))


class OPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn = OPTAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, F.relu)

    def forward(self, x, rule, cache=None, layer=0):
        x = x + self.self_attn(self.self_attn_layer_norm(x), rule, cache, layer)
        return x + self.mlp(self.final_layer_norm(x))


class OPT(nn.Module):
    """OPT (Zhang et al. 2022, arXiv 2205.01068): a GPT with learned positions, ReLU, biases and pre-norm. Published:
    transformers, OPTForCausalLM.

    forward(ids [B,T], mask [B,T] or None; True = real token) -> logits [B,T,V]. Padding may stand on either side.
    """

    OFFSET = 2  # the first two positions are never used: OPT's code counts from behind its padding id

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
            elif name.endswith(("out_proj.weight", "fc2.weight")):  # 2 * layers of these add up in the residual stream
                nn.init.normal_(parameter, std=config.width**-0.5 / math.sqrt(2 * config.layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.width**-0.5)
            elif name.endswith("proj.bias") or ".fc" in name:
                nn.init.zeros_(parameter)

    def lm_head(self, h):
        """h [...,Dt] -> logits [...,V]. The output matrix is the embedding table: one parameter, used twice."""
        return F.linear(h, self.embed_tokens.weight)

    def hidden(self, x, mask=None, cache=None):
        """Embeddings x [B,T,D] of new tokens, behind those in the cache -> hidden states [B,T,D] after the last norm.

        mask [B,length+T] covers the cached tokens too. Positions count real tokens only, so padding shifts nothing.
        """
        B, T, _ = x.shape
        past = 0 if cache is None else cache.length
        if past + T > self.config.context:
            raise ValueError(f"{past + T} tokens (text and image) do not fit the context of {self.config.context}")
        rule = Rule(causal=True)
        positions = torch.arange(past, past + T, device=x.device).expand(B, T)
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
            segments = mask.int() - 1  # 0 for a real token, -1 for padding, to which nothing attends
            rule = Rule(causal=True, q_segments=segments[:, past:], k_segments=segments)
        x = x + self.embed_positions(positions + self.OFFSET)
        for i, layer in enumerate(self.layers):
            x = layer(x, rule, cache, i)
        if cache is not None:
            cache.length += T
        return self.final_layer_norm(x)

    def forward(self, ids, mask=None):
        return self.lm_head(self.hidden(self.embed_tokens(ids), mask))

    @torch.no_grad()
    def generate(self, x, mask=None, max_new_tokens=64, temperature=0.0, top_k=None, eos_id=None, generator=None):
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
            h = self.hidden(x, mask, cache)[:, -1]  # [B,D]
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


class BLIP2(nn.Module):
    """Vision encoder, queries and Q-Former; then the heads of stage 1, the language model of stage 2, or both.

    Without a text side (qformer.text) there is no stage 1, without a language model no stage 2: what needs it raises
    AttributeError. Published: LAVIS, lavis/models/blip2_models, Blip2Qformer (stage 1) and Blip2OPT (stage 2).
    """

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
        """pixels [B,3,H,W] (see preprocess) -> features of the class token and all patches, [B,N,Dv]."""
        return self.vision.ln_post(self.vision(pixels))

    def query(self, image):
        """image [B,N,Dv] -> what the queries extract from it, [B,L,D]. No text is involved."""
        queries = self.query_tokens.expand(len(image), -1, -1)
        no_words = queries[:, :0]  # queries alone attend to each other under each of the three rules
        queries, _ = self.qformer(queries, no_words, image, attends="contrastive")
        return queries

    # Stage 1: three ways to relate an image to a text

    def image_features(self, image):
        """image [B,N,Dv] -> one vector per query, [B,L,E], of length one."""
        return F.normalize(self.vision_projection(self.query(image)), dim=-1)

    def text_features(self, ids, mask=None):
        """ids [B,T] that begin with [CLS], mask [B,T] -> the vector of [CLS], [B,E], of length one."""
        words = self.qformer.embed(ids)
        no_queries = words[:, :0]
        no_image = words.new_zeros(len(words), 0, self.config.vision.width)
        _, words = self.qformer(no_queries, words, no_image, attends="contrastive", mask=mask)
        return F.normalize(self.text_projection(words[:, 0]), dim=-1)

    def match(self, image, ids, mask=None):
        """image [B,N,Dv], ids [B,T] -> logits [B,2] of ITM, the mean over the queries; each attends to all words."""
        queries = self.query_tokens.expand(len(image), -1, -1)
        queries, _ = self.qformer(queries, self.qformer.embed(ids), image, attends="matching", mask=mask)
        return self.itm_head(queries).mean(1)

    def write(self, image, ids, mask=None):
        """image [B,N,Dv], ids [B,T] -> logits [B,T,V] of the next word (ITG). [DEC] takes the place of [CLS]."""
        ids = ids.clone()
        ids[:, 0] = self.config.qformer.dec_token_id
        queries = self.query_tokens.expand(len(image), -1, -1)
        _, words = self.qformer(queries, self.qformer.embed(ids), image, attends="generation", mask=mask)
        return F.linear(words, self.qformer.word_embeddings.weight)

    def itc(self, pixels, ids, mask=None):
        """Image-text contrast: pixels [Bi,3,H,W], ids [Bt,T] -> cosines [Bi,Bt] (see similarity)."""
        return similarity(self.image_features(self.encode_image(pixels)), self.text_features(ids, mask))

    def itm(self, pixels, ids, mask=None):
        """Image-text matching: pixels [B,3,H,W], ids [B,T] -> logits [B,2]; column 1 means "belong together"."""
        return self.match(self.encode_image(pixels), ids, mask)

    def itg_loss(self, pixels, ids, mask=None):
        """Image-grounded text generation: the loss of writing ids [B,T] about pixels [B,3,H,W]. -> loss, metrics."""
        return language_loss(self.write(self.encode_image(pixels), ids, mask), itg_labels(ids, mask))

    def stage1_loss(self, pixels, ids, mask=None, generator=None):
        """The sum of the three losses (paper 3.2) for B pairs; the image is encoded once. -> loss, metrics.

        ITM judges 3B pairs: each image with its own text, each image with a wrong text that ITC finds similar, and each
        text with such a wrong image. If all texts are equal (as in a batch of one), it judges the B pairs only.
        generator: a torch.Generator on the CPU, from which the hard negatives are drawn.
        """
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        image = self.encode_image(pixels)

        cosines = similarity(self.image_features(image), self.text_features(ids, mask))  # [B,B]
        itc, itc_metrics = itc_loss(cosines)

        same = same_text(ids, mask)  # [B,B]
        wrong_text = draw_hard_negatives(cosines, same, generator)  # [B], for each image
        wrong_image = draw_hard_negatives(cosines.T, same, generator)  # [B], for each text
        has_wrong = ~same.all(1)  # [B], all False if all texts are equal
        images = torch.cat([image, image[has_wrong], image[wrong_image[has_wrong]]])  # [R,N,Dv], R is B or 3B
        texts = torch.cat([ids, ids[wrong_text[has_wrong]], ids[has_wrong]])  # [R,T]
        masks = torch.cat([mask, mask[wrong_text[has_wrong]], mask[has_wrong]])  # [R,T]
        itm, itm_metrics = itm_loss(self.match(images, texts, masks), matching=len(ids))

        itg, itg_metrics = language_loss(self.write(image, ids, mask), itg_labels(ids, mask))

        metrics = {"itc": itc.detach(), "itm": itm.detach(), "itg": itg.detach()}
        metrics |= {"itc_accuracy": itc_metrics["accuracy"], "itm_accuracy": itm_metrics["accuracy"]}
        metrics |= {"itg_accuracy": itg_metrics["accuracy"]}
        return itc + itm + itg, metrics

    @torch.no_grad()
    def caption(self, pixels, max_new_tokens=32):
        """What the Q-Former alone writes about pixels [B,3,H,W] (ITG): ids [B,n], greedy, filled up with [SEP]. It has
        no cache: the whole text runs again for each new word, because it is short."""
        image, c = self.encode_image(pixels), self.config.qformer
        ids = torch.full((len(image), 1), c.dec_token_id, device=image.device)
        done = torch.zeros(len(image), dtype=torch.bool, device=image.device)
        while ids.shape[1] <= max_new_tokens and not done.all():
            next_ids = self.write(image, ids)[:, -1].argmax(-1)  # [B]
            next_ids = next_ids.masked_fill(done, c.sep_token_id)
            done |= next_ids == c.sep_token_id
            ids = torch.cat([ids, next_ids[:, None]], dim=1)
        return ids[:, 1:]

    # Stage 2: the outputs of the queries as a prompt

    def image_tokens(self, pixels):
        """pixels [n,3,H,W] -> what the language model reads for each image, [n,L,Dt]."""
        return self.language_projection(self.query(self.encode_image(pixels)))

    def embed(self, ids, image_tokens=None):
        """ids [B,S] with L image_token_ids per image, image_tokens [n,L,Dt] -> embeddings [B,S,Dt]. Images are used up
        in the order of their placeholders, row by row. Raises ValueError if the counts differ."""
        is_image = ids == self.config.image_token_id  # [B,S]
        x = self.language.embed_tokens(ids)
        image_tokens = x[:0, :0] if image_tokens is None else image_tokens
        n, L, _ = image_tokens.shape
        if not torch.compiler.is_compiling() and is_image.sum() != n * L:  # a value that torch.compile does not know
            raise ValueError(f"{int(is_image.sum())} image tokens in the ids, but {n} image(s) need {n * L}: {L} each")
        x = x.clone()
        x[is_image] = image_tokens.flatten(0, 1).to(x.dtype)
        return x

    def forward(self, pixels, ids, mask=None):
        """pixels [n,3,H,W] or None, ids [B,S], mask [B,S] or None (True = real token) -> logits [B,S,V]."""
        x = self.embed(ids, None if pixels is None else self.image_tokens(pixels))
        return self.language.lm_head(self.language.hidden(x, mask))

    @torch.no_grad()
    def generate(self, ids, pixels=None, mask=None, **options):
        """Continue each row of ids [B,S], padded on the left -> new ids [B,n]. Images are encoded once. options: see
        OPT.generate."""
        if not ids.numel():
            raise ValueError(f"nothing to continue: the ids have the shape {list(ids.shape)}")
        x = self.embed(ids, None if pixels is None else self.image_tokens(pixels))
        return self.language.generate(x, mask, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """A published BLIP-2: a folder in the Hugging Face layout or of train_tiny.py, or a hub id."""
        folder = checkpoint_folder(path)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config_from_folder(folder))
        return load_weights(model, folder, dtype, device).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Training: what moves, and what is counted


TRAINED = {  # stage -> how the names of the parameters begin that train in it (paper 3.2 and 3.3)
    1: ("query_tokens", "qformer.", "vision.ln_post.", "vision_projection.", "text_projection.", "itm_head."),
    2: ("query_tokens", "qformer.", "vision.ln_post.", "language_projection."),
}
TEXT_SIDE = re.compile(r"^qformer\.(word_embeddings|position_embeddings|layers\.\d+\.(mlp_text|ln_text))\.")


def freeze(model, stage):
    """Set what trains in a stage and return it. Stage 2 has no text in the Q-Former, so the text side stays as it is.
    The vision encoder (except ln_post) and the language model never train: they are what BLIP-2 builds on."""
    for name, parameter in model.named_parameters():
        trains = name.startswith(TRAINED[stage])
        if stage == 2 and TEXT_SIDE.match(name):
            trains = False
        parameter.requires_grad_(trains)
    return [p for p in model.parameters() if p.requires_grad]


def similarity(image, text):
    """image [Bi,L,E], text [Bt,E], of length one -> cosines [Bi,Bt]. Of the L queries the one most similar to the text
    counts, so that a query may specialise and need not suit every text."""
    return torch.einsum("ile,te->itl", image, text).amax(-1)


def itc_loss(cosines, temperature=ITC_TEMPERATURE):
    """Symmetric cross-entropy over cosines [B,B]: image i belongs to text i. -> loss, metrics.

    Before training all cosines are alike and the loss is ln B. Equal texts in a batch cannot be told apart: each of m
    equal texts costs its image ln m.
    """
    target = torch.arange(len(cosines), device=cosines.device)
    logits = cosines.float() / temperature
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, {"accuracy": (logits.argmax(1) == target).float().mean()}


def same_text(ids, mask):
    """ids, mask [B,T] -> [B,B], True where row i and row j are the same text, whatever stands under the padding."""
    ids = ids.masked_fill(~mask, -1)
    return (ids[:, None] == ids[None]).all(-1)


def draw_hard_negatives(cosines, same, generator=None, temperature=ITC_TEMPERATURE):
    """For each row of cosines [B,B] a wrong column -> index [B], drawn with the probability that ITC gives it (BLIP, Li
    et al. 2022, 3.2); the same text is never drawn. Where all texts are the same, the index means nothing."""
    logits = (cosines.detach().float() / temperature).masked_fill(same, -torch.inf)
    logits = logits.masked_fill(same.all(1, keepdim=True), 0.0)  # the softmax of a row of -inf would be NaN
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(cosines.device)


def itm_loss(logits, matching):
    """Cross-entropy of logits [R,2], whose first `matching` rows are pairs that belong together. -> loss, metrics.

    A model that guesses has a loss of ln 2. One that always answers "no" is right for two thirds of the 3B pairs.
    """
    target = (torch.arange(len(logits), device=logits.device) < matching).long()
    return F.cross_entropy(logits.float(), target), {"accuracy": (logits.argmax(-1) == target).float().mean()}


def itg_labels(ids, mask=None):
    """ids, mask [B,T] -> labels [B,T]. The shift in language_loss leaves out the first one, which is [CLS]."""
    return ids if mask is None else ids.masked_fill(~mask, IGNORE_INDEX)


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
# Prompts: text to ids, and what the model says


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
    """The ids of a prompt (with the tokenizer's begin-of-text token) behind the image's placeholders."""
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


def answer(model, images, question, encode, decode, max_new_tokens=32):
    """A question about one image, the beginning of a text, or "" for a caption -> what the model writes next, as text.

    images: a list of one PIL image; encode: text -> list of ids, with the begin-of-text token in front; decode: the
    other way. Raises ValueError if the prompt leaves no room in the context.
    """
    config, device = model.config, model.query_tokens.device
    pixels = preprocess(images, config.vision).to(device)
    ids = torch.tensor([prompt_ids(encode(build_prompt(question)), config)], device=device)
    room = config.language.context - ids.shape[1]
    if room < 1:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, the context holds {config.language.context}")
    new = model.generate(ids, pixels, max_new_tokens=min(max_new_tokens, room), eos_id=config.eos_token_ids)
    return decode([i for i in new[0].tolist() if i not in config.eos_token_ids]).strip()


@torch.no_grad()
def judge(model, image, texts, encode):
    """How well each of n texts fits a PIL image: the probability of "belong together" (ITM) and the cosine (ITC), [n]
    each. encode: text -> list of ids, from [CLS] to [SEP]. Raises ValueError if a text is longer than the context."""
    device = model.query_tokens.device
    features = model.encode_image(preprocess([image], model.config.vision).to(device))  # [1,N,Dv]
    ids, mask = pad_rows([encode(text) for text in texts], model.config.qformer.pad_token_id)
    ids, mask = ids.to(device), mask.to(device)
    logits = model.match(features.expand(len(texts), -1, -1), ids, mask)  # [n,2]
    cosines = similarity(model.image_features(features), model.text_features(ids, mask))  # [1,n]
    return logits.float().softmax(-1)[:, 1].cpu(), cosines[0].float().cpu()


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to pixels, exactly as the published processor does


def preprocess(images, config):
    """PIL images -> pixels [n,3,image_size,image_size], float32, equal to those of transformers' BlipImageProcessor.

    Both sides are resized to image_size and nothing is cut off. CLIP's encoder has another way to a square: the shorter
    side is resized to image_size and the centre cut out.
    """
    size, batch = config.image_size, []
    for image in images:
        image = image.convert("RGB")
        width, height = size, size
        if config.clip:
            short = min(image.size)
            width, height = size * image.width // short, size * image.height // short
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.asarray(image, dtype=np.float64) * (1 / 255)).astype(np.float32)
        batch.append((pixels - np.float32(config.mean)) / np.float32(config.std))
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

RENAMED = (  # published names to ours, as regular expressions, all applied in this order
    (r"^vision_model\.(embeddings|encoder)\.", "vision."),
    (r"^vision_model\.post_layernorm\.", "vision.ln_post."),
    (r"^vision\.position_embedding$", "vision.position_embedding.weight"),
    (r"^vision\.layers\.", "vision.blocks."),
    (r"^(vision\.blocks\.\d+)\.layer_norm(\d)\.", r"\1.ln_\2."),
    (r"^(vision\.blocks\.\d+)\.self_attn\.", r"\1.attn."),
    (r"\.attn\.projection\.", ".attn.out_proj."),
    (r"^embeddings\.", "qformer."),
    (r"^qformer\.encoder\.layer\.", "qformer.layers."),  # below, "output" is BERT's name for the way out of a layer
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.attention\.output\.LayerNorm\.", ".ln_self."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".self_attn.\1_proj."),
    (r"\.crossattention\.output\.dense\.", ".cross_attn.out_proj."),
    (r"\.crossattention\.output\.LayerNorm\.", ".ln_cross."),
    (r"\.crossattention\.attention\.(q|k|v)(uery|ey|alue)\.", r".cross_attn.\1_proj."),
    (r"\.intermediate_query\.dense\.", ".mlp_query.fc1."),
    (r"\.output_query\.dense\.", ".mlp_query.fc2."),
    (r"\.output_query\.LayerNorm\.", ".ln_query."),
    (r"\.intermediate\.dense\.", ".mlp_text.fc1."),
    (r"\.output\.dense\.", ".mlp_text.fc2."),
    (r"\.output\.LayerNorm\.", ".ln_text."),
    (r"^language_model\.lm_head\.", "language.embed_tokens."),  # the same matrix once more, in older files
    (r"^language_model\.model\.decoder\.", "language."),
    (r"^(language\.layers\.\d+)\.fc", r"\1.mlp.fc"),
)


def our_tensors(name, tensor):
    """A published tensor -> the pairs (our name, tensor) that it becomes."""
    if name.endswith("position_ids"):
        return []  # a buffer 0, 1, 2, ... of older files
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    if name in ("vision.class_embedding", "vision.position_embedding.weight"):
        tensor = tensor.squeeze()  # published as [1,1,Dv] and [1,N,Dv]
    if ".attn.qkv." not in name:
        return [(name, tensor)]
    q, k, v = tensor.chunk(3)  # published as one matrix of three times the height
    return [(name.replace("qkv", "q_proj"), q), (name.replace("qkv", "k_proj"), k), (name.replace("qkv", "v_proj"), v)]


def checkpoint_folder(path):
    """A local folder as it is. A hub id such as "Salesforce/blip2-opt-2.7b" is downloaded first."""
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


SHAPE = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads")
BERT_SHAPE = SHAPE | dict(mlp_width="intermediate_size", norm_eps="layer_norm_eps")
TEXT_SHAPE = dict(vocab_size="vocab_size", context="max_position_embeddings")
VISION_FIELDS = BERT_SHAPE | dict(image_size="image_size", patch_size="patch_size")
QFORMER_FIELDS = BERT_SHAPE | TEXT_SHAPE | dict(cross_every="cross_attention_frequency", pad_token_id="pad_token_id")
QFORMER_FIELDS |= dict(text="use_qformer_text_input")
OPT_FIELDS = SHAPE | TEXT_SHAPE | dict(mlp_width="ffn_dim")
BLIP2_FIELDS = dict(image_token_id="image_token_index", embed_dim="image_text_hidden_size")
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
    """config.json and preprocessor_config.json -> BLIP2Config. What they leave out has the published classes' defaults,
    which are those of the dataclasses."""
    raw = json.loads((folder / "config.json").read_text())
    require(folder, raw, model_type="blip-2")
    qformer, text = part(raw, "qformer_config"), part(raw, "text_config")
    require(folder, qformer, hidden_act="gelu", position_embedding_type="absolute")
    connector = QFormerConfig(**found(qformer, QFORMER_FIELDS, QFormerConfig))
    connector = replace(connector, **found(raw, dict(queries="num_query_tokens"), QFormerConfig))
    connector = replace(connector, dec_token_id=connector.vocab_size - 1)  # [DEC] was added behind BERT's vocabulary
    return BLIP2Config(
        vision_from_published(folder, part(raw, "vision_config")),
        connector,
        # a checkpoint for retrieval has a Q-Former that reads text, and no language model
        None if connector.text else opt_from_published(folder, text),
        **found(raw, dict(image_token_id="image_token_id"), BLIP2Config) | found(raw, BLIP2_FIELDS, BLIP2Config),
        **found(text, ENDS, BLIP2Config) | found(read_json(folder / "generation_config.json"), ENDS, BLIP2Config),
    )


def vision_from_published(folder, vision):
    """vision_config of config.json, and what preprocessor_config.json contains about pixels -> VisionConfig."""
    require(folder, vision, hidden_act="gelu", qkv_bias=True)
    config = VisionConfig(**found(vision, VISION_FIELDS, VisionConfig))
    processor = processor_of(folder)
    require(folder, processor, resample=3, rescale_factor=1 / 255, do_center_crop=False)  # 3: bicubic
    require(folder, processor, do_resize=True, do_rescale=True, do_normalize=True)
    S = config.image_size
    require(folder, processor, size=(S, {"height": S, "width": S}))
    return replace(config, **found(processor, dict(mean="image_mean", std="image_std"), config))


def opt_from_published(folder, text):
    """text_config of config.json -> OPTConfig."""
    config = OPTConfig(**found(text, OPT_FIELDS, OPTConfig))
    require(folder, text, model_type="opt", activation_function="relu", tie_word_embeddings=True)
    require(folder, text, do_layer_norm_before=True, word_embed_proj_dim=config.width, _remove_final_layer_norm=False)
    require(folder, text, enable_bias=True, layer_norm_elementwise_affine=True)
    return config


if __name__ == "__main__":
    from train_tiny import workbench

    workbench("blip2")  # --demo, --image, --prompt, --weights, --anatomy, --trace, --show-mask: see --help
