r"""
CogVLM: a frozen language model in which image tokens have weights of their own, in every layer.

    CogVLM   Wang et al. 2023, CogVLM: Visual Expert for Pretrained Language Models, arXiv 2311.03079
    CogVLM2  Hong et al. 2024, CogVLM2: Visual Language Models for Image and Video Understanding, arXiv 2408.16500

The idea. LLaVA maps image patches to vectors of the width of word embeddings, and the decoder processes them with
weights made for words. If the decoder stays frozen, this fusion is shallow. If the decoder is trained, it forgets part
of its language. CogVLM gives image tokens their own query, key, value, output and MLP matrices in every layer, the
"visual expert". These start as copies of the language weights and are trained; the weights of words stay frozen. All
tokens meet in one softmax: two sets of weights, one attention (deep fusion, type B). A text without an image uses none
of the new weights, so its logits after training are bit-identical to those before.

    image [n,3,H,W]                              "Question: where is the circle? Answer:"
      | EVA2-CLIP: post-norm ViT, class token      | token ids; image_token_id is repeated N + 2 times behind <bos>
      | dropped after the last layer               |
    [n,N,Dv]                                     ids [B,T]
      | adapter: linear, LayerNorm, GELU, SwiGLU,  | embedding table
      | and learned boi, eoi around the patches    |
    [n,N+2,D] --- put where the image ids stand ---> [B,T,D]
                                                   |
         layer:   image tokens                words
                  vision expert's QKV         language expert's QKV
                            \                /
                             one causal softmax over all tokens
                            /                \
                  its dense, its SwiGLU      its dense, its SwiGLU
                                                   |
                                                 logits [B,T,V] -> "[[094,062,406,375]]"

How it is computed. Outside the softmax every token is processed by itself. There the tokens of a batch form one list,
those of the vision expert first. Each expert works on one slice of it, so no token is computed twice or masked out. For
the softmax the tokens return to their rows. The index lists are made once per forward pass (Routing).

Three rules that decide parity (paper 2.1, and the published code)
    positions  All patches of an image share one: text 0, boi 1, patches 2, 2, 2, eoi 3, text 4. With consecutive ones,
               RoPE would weaken attention from a question to the patches far from it. Where a patch lies in the image
               is known from the tower's features.
    experts    A token takes the vision expert if it and its right neighbour are image tokens. So boi takes it, but eoi,
               whose neighbour is a word, takes the language expert: there the image ends and language goes on.
    mask       Causal, over patches too, although they have no natural order: the decoder needs no other mask.

Letters. B batch, T text length, n images, N patches of one (after CogVLM2's convolution), P patch size, Dv and D widths
of tower and decoder, H heads, K key/value heads, Dh head width, V vocabulary. [n,3,H,W] is always pixels.

Three conventions on which code in this field disagrees
    RoPE    half-split pairing: dimension i turns with dimension i + Dh/2 (as LLaMA checkpoints on the hub are stored).
    masks   True means "may attend" or "real token".
    labels  have the same positions as ids; the shift by one happens in one place, language_loss.

Paper / published code (THUDM/cogvlm-chat-hf, modeling_cogvlm.py and visual.py) / this file
    - Which weights train. Paper 2.2: experts and adapter; the ViT too in the last stage, at a tenth of the rate. Here
      the ViT stays frozen.
    - Image ids. The vocabulary has no <image>: the published code marks image tokens in a second row, token_type_ids,
      and puts the padding id in their place. Here they have an id of their own, image_token_id. For published weights
      it is the first id past the vocabulary; it is never looked up.
    - Several images. The published code takes one image per row. Here a row may contain several: each group of N + 2
      image tokens is one image with its own boi and eoi.
    - Prompts. The code on the hub writes "Question: ... Answer:" (chat) and "Question: ... Short answer:" (VQA); the
      authors' training repository also has "[INST] ... [/INST]". This file follows the hub.
    - CogVLM2 has a stride-2 convolution in front of the adapter (a quarter of the tokens), Llama-3's grouped heads and,
      in the published code only, a bias on the vision expert's QKV.

What to try: --demo, then ask for boxes in your own image; --show-mask prints which expert each token takes; let eoi
take the vision expert; give each patch a position of its own; start the experts from random weights, not from copies.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: its threads spin 0.2 ms when they wait, not 10

import json
import math
import re
from dataclasses import dataclass, field, replace
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
class VisionConfig:  # EVA2-CLIP-E/14 without the last of its 64 layers
    image_size: int = 490
    patch_size: int = 14
    width: int = 1792
    layers: int = 63
    heads: int = 16
    mlp_width: int = 15360
    norm_eps: float = 1e-6
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the pixels CLIP was trained on
    std: tuple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LanguageConfig:  # LLaMA-7B
    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32  # fewer than heads: grouped-query attention (CogVLM2)
    mlp_width: int = 11008  # 8/3 of the width: three matrices of SwiGLU cost what two of a 4x MLP do
    context: int = 2048
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    tie_embeddings: bool = False

    @property
    def head_width(self):
        return self.width // self.heads


@dataclass(frozen=True)
class CogVLMConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    strided: bool = False  # CogVLM2: a 2 x 2 convolution of stride 2 in front of the adapter, a quarter of the tokens
    expert_bias: bool = False  # CogVLM2: biases in the vision expert's query_key_value
    image_token_id: int = 32000  # one past the vocabulary: no text can contain it
    bos_token_id: int = 1
    eos_token_ids: tuple = (2,)
    style: str = "chat"  # one of TEMPLATES: how it was taught to read a question


VICUNA_7B = LanguageConfig(norm_eps=1e-5)
LLAMA_3_8B = LanguageConfig(128256, kv_heads=8, mlp_width=14336, context=8192, norm_eps=1e-5, rope_base=500000.0)

PRESETS = {
    # what train_tiny.py trains in front of you, on a toy EVA tower and a toy Vicuna
    "tiny": CogVLMConfig(
        VisionConfig(32, 8, width=96, layers=4, heads=4, mlp_width=384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        LanguageConfig(512, 96, layers=3, heads=2, kv_heads=2, mlp_width=256, context=256, norm_eps=1e-5),
        image_token_id=499,
        bos_token_id=497,
        eos_token_ids=(498,),
    ),
    "cogvlm-chat-17b": CogVLMConfig(language=VICUNA_7B),
    "cogvlm2-llama3-19b": CogVLMConfig(
        VisionConfig(1344),
        LLAMA_3_8B,
        strided=True,
        expert_bias=True,
        image_token_id=128256,
        bos_token_id=128000,
        eos_token_ids=(128001, 128009),  # <|end_of_text|>, <|eot_id|>
    ),
}


def num_image_tokens(height, width, config):
    """Tokens the decoder reads for one image: boi, one per patch (CogVLM2: one per 2 x 2 patches), eoi.
    490 / 14 = 35, 35 * 35 + 2 = 1227; CogVLM2 1344 / 28 = 48, 48 * 48 + 2 = 2306."""
    P = config.vision.patch_size * (2 if config.strided else 1)
    return (height // P) * (width // P) + 2


# ----------------------------------------------------------------------------------------------------------------------
# Vision tower: EVA2-CLIP's ViT


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention; every patch sees every patch."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x):
        B, N, D = x.shape
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,N,Dh]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out_proj(attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class PostNormBlock(nn.Module):
    """EVA2-CLIP-E's block. The output of a branch is normalised before it is added ("res-post-norm", as in Swin v2), so
    the norm limits how much a branch can add. Published: visual.py, TransformerLayer."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x):
        x = x + self.ln_1(self.attn(x))
        return x + self.ln_2(self.mlp(x))


class EVATower(nn.Module):
    """EVA2-CLIP-E (Sun et al. 2023, EVA-CLIP, arXiv 2303.15389): a ViT of 4.3 billion parameters with post-norm blocks
    and no norm around the stack. Published: visual.py, PatchEmbedding and Transformer.

    forward(pixels [n,3,H,W]) -> [n,1+N,Dv], the class token first. Raises ValueError if the patches do not form the
    square grid of image_size, for which there are positions.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P, grid = config.width, config.patch_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=P, stride=P)  # with a bias, unlike CLIP's
        self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        self.position_embedding = nn.Embedding(1 + grid * grid, D)
        self.blocks = nn.ModuleList(PostNormBlock(config) for _ in range(config.layers))
        nn.init.normal_(self.position_embedding.weight, std=0.5)  # as large as patches: only this tells where they lie
        residual = (2 * config.layers) ** -0.5  # 2 * layers branches add up in the residual stream
        for block in self.blocks:
            for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
                nn.init.normal_(linear.weight, std=D**-0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * D) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.fc2):
                nn.init.normal_(linear.weight, std=D**-0.5 * residual)
            for linear in (*block.attn.children(), *block.mlp.children()):
                nn.init.zeros_(linear.bias)
            nn.init.constant_(block.ln_1.weight, residual)  # the norms undo the scale of their branches,
            nn.init.constant_(block.ln_2.weight, residual)  # so they have to be small themselves

    def forward(self, pixels):
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # [n,Dv,rows,columns]
        grid = self.config.image_size // self.config.patch_size
        if x.shape[2:] != (grid, grid):
            raise ValueError(f"pixels {list(pixels.shape)} give {list(x.shape[2:])} patches, not {grid} x {grid}")
        x = x.flatten(2).transpose(1, 2)  # [n,N,Dv], patches in reading order
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [n,1+N,Dv]
        x = x + self.position_embedding.weight
        for block in self.blocks:
            x = block(x)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Connector


class Adapter(nn.Module):
    """Patch features of a square grid [n,N,Dv] -> what the decoder reads, [n,N+2,D]: boi, one vector per patch, eoi.

    A linear map to the decoder's width, LayerNorm and GELU, then a SwiGLU as wide as the decoder's own (paper 2.1, "MLP
    adapter"). In CogVLM2 a convolution first joins each 2 x 2 patches. Published: visual.py, GLU and EVA2CLIPModel.
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
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)  # the output is about as large as embeddings

    def forward(self, x):
        if self.conv is not None:
            grid = math.isqrt(x.shape[1])
            x = x.transpose(1, 2).unflatten(2, (grid, grid))  # [n,Dv,rows,columns]
            x = self.conv(x).flatten(2).transpose(1, 2)  # [n,N,Dv], N a quarter of what it was
        x = F.gelu(self.norm1(self.linear_proj(x)))  # [n,N,D]
        x = self.dense_4h_to_h(F.silu(self.gate_proj(x)) * self.dense_h_to_4h(x))
        return torch.cat([self.boi.expand(len(x), 1, -1), x, self.eoi.expand(len(x), 1, -1)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# What each token is: roles, positions, experts

TEXT, BOI, PATCH, EOI = range(4)  # the roles a token can have


def find_roles(is_image, each):
    """is_image [B,T] (True: an image token), `each` tokens per image (its N + 2) -> roles [B,T].

    Raises ValueError if the tokens of one image do not stand together in one row.
    """
    T = is_image.shape[1]
    # The batch is read row by row, and its image tokens are taken `each` at a time: one line of `images` holds the
    # places of one image, so two images may stand side by side. The first token of an image is boi, the last eoi.
    images = is_image.flatten().nonzero().view(-1, max(1, each))  # [n,each]; without an image `each` is 0
    first = images[:, 0]
    last = images[:, -1]
    torn = (last - first >= each) | (first // T != last // T)  # a word between them, or the end of a row
    if torn.any():
        row, column = divmod(int(first[torn][0]), T)
        raise ValueError(
            f"the image that begins in row {row}, column {column} is torn: its {each} tokens (boi, {each - 2} patches,"
            " eoi) must stand together in one row"
        )
    roles = torch.where(is_image.flatten(), PATCH, TEXT)
    roles[first] = BOI
    roles[last] = EOI
    return roles.view_as(is_image)


def position_ids(roles, mask=None):
    """roles [B,T], mask [B,T] (None: all real) -> positions [B,T]. Published: build_position_ids.

    Every real token is one further than the token before it, except that a patch after a patch has the same position:
    2 words, an image of 3 patches, 2 words have 0 1 2 3 3 3 4 5 6. Padding does not count.
    """
    before = F.pad(roles, (1, 0))[:, :-1]  # the role of the token on the left
    step = (roles != PATCH) | (before != PATCH)
    if mask is not None:
        step = step & mask
    return (step.cumsum(1) - 1).clamp(min=0)


def takes_vision_expert(roles):
    """roles [B,T] -> [B,T], True for boi and patches: eoi takes the language expert. Published: get_expert_mask."""
    return (roles == BOI) | (roles == PATCH)


class Routing:
    """Which tokens take which expert, as index lists: made once per forward pass, used by every layer.

    rows: (B, T). takes_vision: [B,T], or None if all tokens are words. Outside the softmax the tokens of all rows form
    one list [B*T,D], in which those of the vision expert come first.
    """

    def __init__(self, rows, takes_vision=None):
        self.rows = rows
        self.vision = 0 if takes_vision is None else int(takes_vision.sum())  # how many take the vision expert
        if self.vision:
            self.order = (~takes_vision).flatten().int().argsort(stable=True)  # for each of the list: its place in rows
            self.place = self.order.argsort()  # the inverse; for each of the rows: its place in the list

    def sort(self, x):
        """Rows [B,T,D] -> the list [B*T,D]."""
        x = x.flatten(0, 1)
        return x.index_select(0, self.order) if self.vision else x

    def back(self, x):
        """The list [B*T,D] -> rows [B,T,D]."""
        x = x.index_select(0, self.place) if self.vision else x
        return x.unflatten(0, self.rows)

    def route(self, x, patches, words):
        """Apply to each token of the list [B*T,D] the module of its own expert. Without an image only `words` runs."""
        if not self.vision:
            return words(x)
        return torch.cat([patches(x[: self.vision]), words(x[self.vision :])])


# ----------------------------------------------------------------------------------------------------------------------
# Language model: LLaMA with two experts in each layer


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


class Expert(nn.Module):
    """One set of a layer's weights: all that is applied to a token by itself, before and after the softmax.
    Published: one half of VisionExpertAttention and of VisionExpertMLP."""

    def __init__(self, config, bias=False):
        super().__init__()
        D, Dh = config.width, config.head_width
        self.query_key_value = nn.Linear(D, (config.heads + 2 * config.kv_heads) * Dh, bias=bias)
        self.dense = nn.Linear(config.heads * Dh, D, bias=False)
        self.mlp = SwiGLU(D, config.mlp_width)


class ExpertBlock(nn.Module):
    """A decoder layer with two experts: one softmax, two sets of weights. The experts share the norms, which stay
    frozen like the weights of words. Published: CogVLMDecoderLayer."""

    def __init__(self, config, expert_bias=False):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.language_expert = Expert(config)
        self.vision_expert = Expert(config, expert_bias)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x, routing, rotation, rule, cache=None, layer=0):
        """x [B*T,D], the list sorted by expert -> the same; rotation and rule are those of the rows."""
        vision, language = self.vision_expert, self.language_expert
        h = self.input_layernorm(x)
        h = routing.route(h, patches=vision.query_key_value, words=language.query_key_value)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        h = routing.back(h).unflatten(-1, (sum(heads), -1)).transpose(1, 2)  # [B,H+2K,T,Dh]
        q, k, v = h.split(heads, dim=1)
        q, k = apply_rope(q, k, rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        o = attention(q, k, v, rule)  # [B,H,T,Dh], one softmax over words and patches
        o = routing.sort(o.transpose(1, 2).flatten(2))  # [B*T,H*Dh]
        x = x + routing.route(o, patches=vision.dense, words=language.dense)
        h = self.post_attention_layernorm(x)
        return x + routing.route(h, patches=vision.mlp, words=language.mlp)


class ExpertDecoder(nn.Module):
    """LLaMA (Touvron et al. 2023, arXiv 2302.13971) with a visual expert beside the weights of every layer. Published:
    CogVLMModel and its lm_head.

    forward(ids [B,T], mask [B,T] or None; True = real token) -> logits [B,T,V] of a text without images.
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
            if name.endswith(("dense.weight", "down_proj.weight")):  # 2 * layers of these add up in the residual
                nn.init.normal_(parameter, std=config.width**-0.5 / math.sqrt(2 * config.layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.width**-0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # small, so that the first loss is ln V: nothing is preferred
        self.copy_experts()

    @torch.no_grad()
    def copy_experts(self):
        """The vision experts start as copies of the language weights (paper 2.1): image tokens are first processed as
        words are."""
        for layer in self.layers:
            copies = dict(layer.vision_expert.named_parameters())
            for name, weight in layer.language_expert.named_parameters():
                copies[name].copy_(weight)
            if layer.vision_expert.query_key_value.bias is not None:  # CogVLM2's, which the language expert lacks
                layer.vision_expert.query_key_value.bias.zero_()

    def hidden(self, x, mask=None, cache=None, roles=None):
        """Embeddings x [B,T,D] of new tokens, behind those in the cache -> hidden states [B,T,D] after the last norm.

        mask and roles [B,length+T] cover the cached tokens too; without roles all tokens are words. Positions count
        real tokens only, so padding shifts nothing.
        """
        B, T, _ = x.shape
        past = 0 if cache is None else cache.length
        if past + T > self.config.context:
            raise ValueError(f"{past + T} tokens (text and image) do not fit the context of {self.config.context}")
        rule = Rule(causal=True)
        if mask is not None:
            segments = mask.int() - 1  # 0 for a real token, -1 for padding, to which nothing attends
            rule = Rule(causal=True, q_segments=segments[:, past:], k_segments=segments)
        if roles is None:
            routing = Routing((B, T))
            roles = torch.full((B, past + T), TEXT, device=x.device)
        else:
            routing = Routing((B, T), takes_vision_expert(roles[:, past:]))
        positions = position_ids(roles, mask)[:, past:]
        rotation = rope_1d(positions, self.config.head_width, self.config.rope_base)  # cosines and sines
        x = routing.sort(x)  # [B*T,D], the tokens of the vision expert first
        for i, layer in enumerate(self.layers):
            x = layer(x, routing, rotation, rule, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(routing.back(x))

    def forward(self, ids, mask=None):
        return self.lm_head(self.hidden(self.embed_tokens(ids), mask))

    @torch.no_grad()
    def generate(
        self, x, mask=None, roles=None, max_new_tokens=64, temperature=0.0, top_k=None, eos_id=None, generator=None
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
            h = self.hidden(x, mask, cache, roles)[:, -1]  # [B,D]
            next_ids = sample(self.lm_head(h), temperature, top_k, generator)  # [B]
            if len(ends):
                next_ids = next_ids.masked_fill(done, ends[0])
                done |= torch.isin(next_ids, ends)
            new = torch.cat([new, next_ids[:, None]], dim=1)
            x = self.embed_tokens(next_ids[:, None])  # [B,1,D]
            mask = None if mask is None else F.pad(mask, (0, 1), value=True)
            roles = None if roles is None else F.pad(roles, (0, 1), value=TEXT)
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


class CogVLM(nn.Module):
    """Tower, adapter and language model with experts. Published: CogVLMForCausalLM."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = EVATower(config.vision)
        self.adapter = Adapter(config)
        self.language = ExpertDecoder(config.language, config.expert_bias)

    def image_tokens(self, pixels):
        """pixels [n,3,H,W] -> what the decoder reads for each image, [n,N+2,D]: boi, one vector per patch, eoi."""
        return self.adapter(self.vision(pixels)[:, 1:])  # without the class token, which patches attended to all along

    def embed(self, ids, image_tokens=None):
        """ids [B,T] with N + 2 image_token_ids per image (boi and eoi count), image_tokens [n,N+2,D] -> embeddings
        [B,T,D], roles [B,T]. Images are used up in the order of their placeholders, row by row. Raises ValueError if
        the counts differ or an image is torn (see find_roles)."""
        is_image = ids == self.config.image_token_id  # [B,T]
        x = self.language.embed_tokens(ids.masked_fill(is_image, 0))  # the id itself may be past the vocabulary
        image_tokens = x[:0, :0] if image_tokens is None else image_tokens
        n, each, _ = image_tokens.shape
        if is_image.sum() != n * each:
            raise ValueError(
                f"{int(is_image.sum())} image tokens in the ids, but {n} image(s) need {n * each}: {each} each, boi and"
                " eoi included"
            )
        x = x.clone()
        x[is_image] = image_tokens.flatten(0, 1).to(x.dtype)
        return x, find_roles(is_image, each)

    def forward(self, ids, pixels=None, mask=None):
        """ids [B,T], pixels [n,3,H,W] or None, mask [B,T] or None (True = real token) -> logits [B,T,V]."""
        x, roles = self.embed(ids, None if pixels is None else self.image_tokens(pixels))
        return self.language.lm_head(self.language.hidden(x, mask, roles=roles))

    @torch.no_grad()
    def generate(self, ids, pixels=None, mask=None, **options):
        """Continue each row of ids [B,T], padded on the left -> new ids [B,n]. Images are encoded once. options: see
        ExpertDecoder.generate."""
        if not ids.numel():
            raise ValueError(f"nothing to continue: the ids have the shape {list(ids.shape)}")
        x, roles = self.embed(ids, None if pixels is None else self.image_tokens(pixels))
        return self.language.generate(x, mask, roles, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """A published CogVLM or CogVLM2: a folder in the Hugging Face layout or of train_tiny.py, or a hub id. CogVLM's
        folder has no tokenizer; it uses that of lmsys/vicuna-7b-v1.5."""
        folder = checkpoint_folder(path)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config_from_folder(folder))
        return load_weights(model, folder, dtype, device).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Training: what moves, and what is counted


TRAINED = ("adapter.", ".vision_expert.")  # what the names of the parameters contain that train (paper 2.2)


def freeze(model):
    """Set what trains and return it: the adapter with boi and eoi, and the vision experts. No weight that a word uses
    ever trains, so the language model keeps all it can do without an image."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
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
# Prompts, conversations and boxes: text to ids, and which ids count in the loss

TEMPLATES = {"chat": "Question: {} Answer:", "vqa": "Question: {} Short answer:", "base": "{}"}  # the published ones


def build_prompt(question, style="chat"):
    """A published template for one turn; style "vqa" asks for a word or two. Images stand before it, see prompt_row.

    >>> build_prompt("What is this?")
    'Question: What is this? Answer:'
    """
    if "<image>" in question:
        raise ValueError("leave <image> out of the prompt: the image always stands in front of the question")
    return TEMPLATES[style].format(question)


def prompt_row(text_ids, config, images=1):
    """The ids of a prompt: <bos>, N + 2 image tokens per image, and the text's own ids (without special tokens)."""
    tokens = num_image_tokens(config.vision.image_size, config.vision.image_size, config)
    return [config.bos_token_id] + [config.image_token_id] * images * tokens + list(text_ids)


def conversation_row(turns, encode, config, images=1):
    """[(question, answer), ...] about the images in front -> ids, labels (two lists of equal length).

    encode: text -> list of ids, without special tokens. Only the answers and the end-of-sequence token after each have
    labels: a model should learn to answer, not to ask.
    """
    ids = prompt_row([], config, images)
    labels = [IGNORE_INDEX] * len(ids)
    for question, answer in turns:
        prompt = encode(build_prompt(question, "vqa"))
        reply = encode(" " + answer) + [config.eos_token_ids[0]]
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


def answer(model, images, question, encode, decode, style=None, max_new_tokens=40):
    """One question about some PIL images -> the model's answer as text. encode: text -> list of ids without special
    tokens, since <bos> stands in front of the images already. style: None is the model's own, see build_prompt."""
    config, device = model.config, model.language.norm.weight.device
    pixels = preprocess(images, config.vision).to(device) if images else None
    text_ids = encode(build_prompt(question, style or config.style))
    ids = torch.tensor([prompt_row(text_ids, config, len(images))], device=device)
    room = config.language.context - ids.shape[1]
    if room < 1:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, the context holds {config.language.context}")
    new = model.generate(ids, pixels, max_new_tokens=min(max_new_tokens, room), eos_id=config.eos_token_ids)
    return decode([i for i in new[0].tolist() if i not in config.eos_token_ids]).strip()


def parse_box(text):
    """The first box `[[x0,y0,x1,y1]]` in a text, each number three digits in thousandths of the image -> four fractions
    in [0, 1). None if there is no box, or one without an area. Never raises, whatever text a model generates.

    >>> parse_box("it is at [[094,062,406,375]].")
    (0.094, 0.062, 0.406, 0.375)
    """
    match = re.search(r"\[\[([0-9]{3}),([0-9]{3}),([0-9]{3}),([0-9]{3})\]\]", text)
    if match is None:
        return None
    x0, y0, x1, y1 = (int(number) / 1000 for number in match.groups())
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def box_iou(a, b):
    """Intersection over union of two boxes (x0, y0, x1, y1); 0 when one of them is None."""
    if a is None or b is None:
        return 0.0
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return both / (area_a + area_b - both)


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to pixels, exactly as the published code does


def preprocess(images, config):
    """PIL images -> pixels [n,3,image_size,image_size], float32. Both sides are resized to image_size (bicubic),
    whatever the shape of the image: nothing is cut off, and boxes are fractions of the whole image."""
    size, batch = config.image_size, []
    for image in images:
        image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.asarray(image, dtype=np.float64) * (1 / 255)).astype(np.float32)
        batch.append((pixels - np.float32(config.mean)) / np.float32(config.std))
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

RENAMED = (  # published names to ours, as regular expressions, all applied in this order
    (r"^lm_head\.", "language.lm_head."),
    (r"^model\.vision\.patch_embedding\.proj\.", "vision.patch_embedding."),
    (r"^model\.vision\.patch_embedding\.cls_embedding$", "vision.class_embedding"),
    (r"^model\.vision\.patch_embedding\.", "vision."),
    (r"^model\.vision\.transformer\.layers\.", "vision.blocks."),
    (r"^model\.vision\.(linear_proj\.)?", "adapter."),  # boi, eoi and CogVLM2's convolution stand beside linear_proj
    (r"^model\.", "language."),
    (r"^(vision\.blocks\.\d+)\.attention\.dense\.", r"\1.attn.out_proj."),
    (r"^(vision\.blocks\.\d+)\.attention\.", r"\1.attn."),
    (r"^(vision\.blocks\.\d+)\.input_layernorm\.", r"\1.ln_1."),  # the published name; it stands behind the attention
    (r"^(vision\.blocks\.\d+)\.post_attention_layernorm\.", r"\1.ln_2."),
    (r"\.self_attn\.(vision|language)_expert_", r".\1_expert."),
    (r"\.mlp\.(vision|language)_mlp\.", r".\1_expert.mlp."),
)


def our_tensors(name, tensor):
    """A published tensor -> the pairs (our name, tensor) that it becomes."""
    if name.endswith("rotary_emb.inv_freq"):
        return []  # a buffer that is computed here
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    if name in ("vision.class_embedding", "adapter.boi", "adapter.eoi"):
        return [(name, tensor.flatten())]  # published as [1,Dv] and [1,1,D]
    block, fused, kind = name.partition("query_key_value.")
    if name.startswith("vision.") and fused:  # one matrix in the published tower; in the decoder it is one here too
        q, k, v = tensor.chunk(3)
        return [(f"{block}q_proj.{kind}", q), (f"{block}k_proj.{kind}", k), (f"{block}v_proj.{kind}", v)]
    return [(name, tensor)]


def checkpoint_folder(path):
    """A local folder as it is. A hub id such as "THUDM/cogvlm-chat-hf" is downloaded first."""
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


SHAPE = dict(width="hidden_size", layers="num_hidden_layers", mlp_width="intermediate_size")
VISION_FIELDS = SHAPE | dict(heads="num_heads", image_size="image_size", patch_size="patch_size")
VISION_FIELDS |= dict(norm_eps="layer_norm_eps")
LANGUAGE_FIELDS = SHAPE | dict(heads="num_attention_heads", kv_heads="num_multi_query_heads", vocab_size="vocab_size")
LANGUAGE_FIELDS |= dict(context="max_position_embeddings", norm_eps="rms_norm_eps")
LANGUAGE_FIELDS |= dict(tie_embeddings="tie_word_embeddings")
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
    processor = nested or read_json(folder / "preprocessor_config.json")  # the first CogVLM has neither
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
    """config.json, and preprocessor_config.json if there is one -> CogVLMConfig. What they leave out has the published
    class's defaults, which are those of the dataclasses and, for CogVLM2, of its preset."""
    raw = json.loads((folder / "config.json").read_text())
    kinds = {name: raw.get(name) for name in ("architectures", "model_type")}  # a published CogVLM has no model_type
    if kinds["architectures"] != ["CogVLMForCausalLM"] and kinds["model_type"] != "cogvlm":
        raise ValueError(f"{folder} has {kinds}; cogvlm.py reads 'CogVLMForCausalLM'")
    second = raw.get("num_multi_query_heads") is not None  # grouped heads: a CogVLM2
    default = PRESETS["cogvlm2-llama3-19b"] if second else CogVLMConfig()
    require(folder, raw, hidden_act="silu", template_version=tuple(TEMPLATES))
    tower = part(raw, "vision_config")
    require(folder, tower, hidden_act="gelu")
    vision = replace(default.vision, **found(tower, VISION_FIELDS, default.vision))
    processor = processor_of(folder)
    require(folder, processor, do_center_crop=False, do_pad=False, resample=3, rescale_factor=1 / 255)  # 3: bicubic
    require(folder, processor, do_resize=True, do_rescale=True, do_normalize=True)
    S = vision.image_size
    require(folder, processor, size=(S, {"height": S, "width": S}))
    language = replace(default.language, **found(raw, LANGUAGE_FIELDS, default.language))
    if not second:
        language = replace(language, kv_heads=language.heads)
    return replace(
        default,
        vision=replace(vision, **found(processor, dict(mean="image_mean", std="image_std"), vision)),
        language=language,
        image_token_id=language.vocab_size,
        **found(raw, dict(bos_token_id="bos_token_id", style="template_version"), default),
        **found(raw, ENDS, default) | found(read_json(folder / "generation_config.json"), ENDS, default),
    )


if __name__ == "__main__":
    from train_tiny import workbench

    workbench("cogvlm")  # --demo, --image, --prompt, --weights, --anatomy, --trace, --show-mask: see --help
