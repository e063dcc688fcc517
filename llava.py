"""
LLaVA and LLaVA-1.5: a language model that reads image patches as if they were words.

    LLaVA      Liu et al. 2023, Visual Instruction Tuning, arXiv 2304.08485
    LLaVA-1.5  Liu et al. 2023, Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744

The idea. Take a vision encoder (here called the tower) that already represents images well, CLIP's ViT, and a language
model that already talks, Vicuna. Both are pretrained. Join them by the smallest thing that could work: a projector that
maps the features of each patch to a vector of the width of a word embedding. The decoder then reads these vectors where
the word <image> stood, and answers. Neither model changes inside (early fusion by projection, type C).

    image [n,3,H,W]                             "USER: <image>\\nWhat colour is the circle? ASSISTANT:"
      | CLIP ViT, last-but-one layer,             | token ids; <image> is repeated once per patch
      | class token dropped                       |
    [n,N,Dv]                                    ids [B,T]
      | mm_projector: linear (LLaVA) or           | embedding table
      | linear, GELU, linear (1.5)                |
    [n,N,D] ----- put where the <image> ids stand ----> [B,T,D]
                                                  | LLaMA blocks: causal; RMSNorm, RoPE, SwiGLU
                                                logits [B,T,V] -> "red"

Two stages (paper 4.2). Stage 1 trains the projector alone, on captions. Everything else is frozen, so that a random
projector cannot damage the decoder. Stage 2 trains projector and decoder on instructions. The tower is never trained.
The loss counts the assistant's words only.

Letters. B batch, T text length, n images, N patches of one, P patch size, Dv and D widths of tower and decoder,
H heads, K key/value heads, Dh head width, V vocabulary.

Three conventions on which code in this field disagrees
    RoPE    half-split pairing: dimension i turns with dimension i + Dh/2 (as LLaMA checkpoints on the hub are stored).
    masks   True means "may attend" or "real token".
    labels  have the same positions as ids; the shift by one happens in one place, language_loss.

Paper / published code / this file
    - Which layer. The paper's ablation takes features "before" the last layer; the published config says -2: the last
      block is not run and ln_post is not applied, although the checkpoint contains both.
    - Squares. The original 1.5 code pads an image to a square, the published processor config crops: see
      VisionConfig.resize.
    - System prompt. The original conversation template starts with a sentence about a curious user. The published
      processor's template leaves it out, and so does this file.

What to try: --demo, then ask about your own image; set projector="linear" in PRESETS["tiny"]; keep the class token; let
the language model train in stage 1 and compare; --anatomy llava-1.5-7b shows where seven billion parameters are.
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

from kernels import Rule, apply_rope, attention, rope_1d

IGNORE_INDEX = -100  # a label that does not count; cross_entropy's own default

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class VisionConfig:  # CLIP's ViT-L/14
    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    norm_eps: float = 1e-5
    resize: str = "crop"  # how an image becomes a square: the centre is cut out; or "pad", see preprocess
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the pixels CLIP was trained on
    std: tuple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LanguageConfig:  # LLaMA-7B
    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32  # fewer than heads: grouped-query attention (LLaMA-2-70B, not LLaVA-1.5)
    mlp_width: int = 11008  # 8/3 of the width: three matrices of SwiGLU cost what two of a 4x MLP do
    context: int = 2048
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    tie_embeddings: bool = False

    @property
    def head_width(self):
        return self.width // self.heads


@dataclass(frozen=True)
class LLaVAConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    projector: str = "mlp"  # LLaVA-1.5; "linear" is LLaVA
    feature_layer: int = -2  # -1: after the last block; -2: one earlier, less committed to CLIP's one-vector summary
    keep_class_token: bool = False
    image_token_id: int = 32000
    eos_token_ids: tuple = (2,)


# Vicuna-1.5: LLaMA's 32000 words, <image>, <pad>, and padding to a multiple of 64
VICUNA_7B = LanguageConfig(32064, context=4096, norm_eps=1e-5)
VICUNA_13B = replace(VICUNA_7B, width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824)

PRESETS = {
    # what train_tiny.py trains in front of you, on the toy CLIP's vision tower and a toy language model
    "tiny": LLaVAConfig(
        VisionConfig(32, 8, width=96, layers=4, heads=4, mlp_width=384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        LanguageConfig(
            512, 96, layers=3, heads=2, kv_heads=1, mlp_width=256, context=256, norm_eps=1e-5, tie_embeddings=True
        ),
        image_token_id=499,
        eos_token_ids=(498,),
    ),
    "llava-7b": LLaVAConfig(VisionConfig(224), replace(VICUNA_7B, context=2048), projector="linear"),
    "llava-1.5-7b": LLaVAConfig(VisionConfig(), VICUNA_7B),
    "llava-1.5-13b": LLaVAConfig(VisionConfig(), VICUNA_13B),
}


def num_image_tokens(height, width, config):
    """Tokens the decoder reads for one image: one per patch. 336 / 14 = 24, 24 * 24 = 576."""
    P = config.vision.patch_size
    return (height // P) * (width // P) + int(config.keep_class_token)


# ----------------------------------------------------------------------------------------------------------------------
# Vision tower: CLIP's ViT


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)  # Hendrycks & Gimpel 2016, the sigmoid approximation of GELU


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x):
        return self.fc2(quick_gelu(self.fc1(x)))


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


class Block(nn.Module):
    """Pre-norm transformer block: the residual stream x is only ever added to."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """ViT (Dosovitskiy et al. 2021, arXiv 2010.11929): an image is a sentence of patches.

    forward(pixels [n,3,H,W], depth) -> [n,1+N,Dv] after `depth` blocks, the class token first. The weights are always
    CLIP's, so nothing is initialised here. Published: transformers, CLIPVisionModel.
    """

    def __init__(self, config):
        super().__init__()
        D, P, grid = config.width, config.patch_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=P, stride=P, bias=False)  # one linear map for every patch
        self.position_embedding = nn.Embedding(1 + grid * grid, D)
        self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        self.ln_pre = nn.LayerNorm(D, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(D, eps=config.norm_eps)  # CLIP's own, which LLaVA does not apply

    def forward(self, pixels, depth):
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # [n,Dv,rows,columns]
        x = x.flatten(2).transpose(1, 2)  # [n,N,Dv], patches in reading order
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [n,1+N,Dv]
        x = self.ln_pre(x + self.position_embedding.weight)
        for block in self.blocks[:depth]:
            x = block(x)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Connector


class Projector(nn.Module):
    """Patch features [n,N,Dv] -> vectors of the width of word embeddings, [n,N,D]. LLaVA has one linear map, LLaVA-1.5
    two with a GELU between them. Published: LlavaMultiModalProjector."""

    def __init__(self, config):
        super().__init__()
        assert config.projector in ("linear", "mlp"), config.projector
        Dv, D = config.vision.width, config.language.width
        self.linear_1 = nn.Linear(Dv, D)
        self.linear_2 = nn.Linear(D, D) if config.projector == "mlp" else None

    def forward(self, x):
        x = self.linear_1(x)
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))


# ----------------------------------------------------------------------------------------------------------------------
# Language model: LLaMA


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


class LanguageModel(nn.Module):
    """LLaMA (Touvron et al. 2023, arXiv 2302.13971), the decoder inside Vicuna. Published: LlamaForCausalLM.

    forward(ids [B,T], mask [B,T] or None; True = real token) -> logits [B,T,V].
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
        rotation = rope_1d(positions, self.config.head_width, self.config.rope_base)  # cosines and sines
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, rule, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x)

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


class LLaVA(nn.Module):
    """Tower, projector and language model. Published: LlavaForConditionalGeneration."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.mm_projector = Projector(config)
        self.language = LanguageModel(config.language)

    def image_tokens(self, pixels):
        """pixels [n,3,H,W] -> what the decoder reads for each image, [n,N,D]."""
        depth = self.config.vision.layers + 1 + self.config.feature_layer  # -2 leaves the last block out
        x = self.vision(pixels, depth)  # [n,1+N,Dv]
        return self.mm_projector(x if self.config.keep_class_token else x[:, 1:])

    def embed(self, ids, image_tokens=None):
        """ids [B,T] with N image_token_ids per image, image_tokens [n,N,D] -> embeddings [B,T,D]. Images are used up in
        the order of their placeholders, row by row. Raises ValueError if the counts differ."""
        is_image = ids == self.config.image_token_id  # [B,T]
        x = self.language.embed_tokens(ids)
        image_tokens = x[:0, :0] if image_tokens is None else image_tokens
        n, N, _ = image_tokens.shape
        if not torch.compiler.is_compiling() and is_image.sum() != n * N:  # a value that torch.compile does not know
            raise ValueError(f"{int(is_image.sum())} image tokens in the ids, but {n} image(s) need {n * N}: {N} each")
        x = x.clone()
        x[is_image] = image_tokens.flatten(0, 1).to(x.dtype)
        return x

    def forward(self, ids, pixels=None, mask=None):
        """ids [B,T], pixels [n,3,H,W] or None, mask [B,T] or None (True = real token) -> logits [B,T,V]."""
        x = self.embed(ids, None if pixels is None else self.image_tokens(pixels))
        return self.language.lm_head(self.language.hidden(x, mask))

    @torch.no_grad()
    def generate(self, ids, pixels=None, mask=None, **options):
        """Continue each row of ids [B,T], padded on the left -> new ids [B,n]. Images are encoded once. options: see
        LanguageModel.generate."""
        if not ids.numel():
            raise ValueError(f"nothing to continue: the ids have the shape {list(ids.shape)}")
        x = self.embed(ids, None if pixels is None else self.image_tokens(pixels))
        return self.language.generate(x, mask, **options)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """A published LLaVA: a folder in the Hugging Face layout or of train_tiny.py, or a hub id."""
        folder = checkpoint_folder(path)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config_from_folder(folder))
        return load_weights(model, folder, dtype, device).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Training: what moves, and what is counted


TRAINED = {  # stage -> how the names of the parameters begin that train in it (paper 4.2)
    1: ("mm_projector.",),
    2: ("mm_projector.", "language."),
}


def freeze(model, stage):
    """Set what trains in a stage and return it. The tower never trains: both stages build on its features."""
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


def build_prompt(question, images=1):
    """The published template for one turn, with one <image> per image in front unless the question places them itself.

    >>> build_prompt("What is this?")
    'USER: <image>\\nWhat is this? ASSISTANT:'
    """
    placed = question.count("<image>")
    if placed not in (0, images):
        raise ValueError(f"the prompt has {placed} <image> for {images} image(s): write one each, or none")
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
    tokens = num_image_tokens(config.vision.image_size, config.vision.image_size, config)
    ids, labels = [], []
    for turn, (question, answer) in enumerate(turns):
        prompt = encode(expand_images(build_prompt(question, images if turn == 0 else 0), tokens))
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


def answer(model, images, question, encode, decode, max_new_tokens=32):
    """One question about some PIL images -> the model's answer as text."""
    config, device = model.config, model.language.norm.weight.device
    pixels = preprocess(images, config.vision).to(device) if images else None
    tokens = num_image_tokens(config.vision.image_size, config.vision.image_size, config)
    ids = torch.tensor([encode(expand_images(build_prompt(question, len(images)), tokens))], device=device)
    room = config.language.context - ids.shape[1]
    if room < 1:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, the context holds {config.language.context}")
    new = model.generate(ids, pixels, max_new_tokens=min(max_new_tokens, room), eos_id=config.eos_token_ids)
    return decode([i for i in new[0].tolist() if i not in config.eos_token_ids]).strip()


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to pixels, exactly as the published processors do


def preprocess(images, config):
    """PIL images -> pixels [n,3,image_size,image_size], float32, equal to those of transformers' CLIPImageProcessor.

    The shorter side is resized to image_size and the centre cut out. With resize="pad" (the original LLaVA-1.5) the
    image is first centred on a square of the mean colour, so that nothing is cut off.
    """
    size, batch = config.image_size, []
    for image in images:
        image = image.convert("RGB")
        if config.resize == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in config.mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        short = min(image.size)
        # what lies beyond 16:1 would be cut off anyway, and an image of 1 x 5000 pixels would need gigabytes in between
        x, y = max(0, image.width - 16 * short) // 2, max(0, image.height - 16 * short) // 2
        image = image.crop((x, y, image.width - x, image.height - y))
        width, height = size * image.width // short, size * image.height // short
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.asarray(image, dtype=np.float64) * (1 / 255)).astype(np.float32)
        batch.append((pixels - np.float32(config.mean)) / np.float32(config.std))
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

RENAMED = (  # published names to ours, as regular expressions, all applied in this order; LLaMA's own names are ours
    (r"^model\.", ""),  # the layout has been renamed three times on the hub
    (r"^vision_tower\.(vision_model\.)?", "vision."),
    (r"^multi_modal_projector\.", "mm_projector."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(model\.)?", "language."),
    (r"^vision\.(embeddings|encoder)\.", "vision."),
    (r"^vision\.pre_layrnorm\.", "vision.ln_pre."),  # the published spelling
    (r"^vision\.post_layernorm\.", "vision.ln_post."),
    (r"^vision\.layers\.(\d+)\.self_attn\.", r"vision.blocks.\1.attn."),
    (r"^vision\.layers\.(\d+)\.layer_norm(\d)\.", r"vision.blocks.\1.ln_\2."),
    (r"^vision\.layers\.", "vision.blocks."),
)


def our_tensors(name, tensor):
    """A published tensor -> the pairs (our name, tensor) that it becomes."""
    if name.endswith(("position_ids", "rotary_emb.inv_freq")):
        return []  # buffers of older files; both are computed here
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return [(name, tensor)]


def checkpoint_folder(path):
    """A local folder as it is. A hub id such as "llava-hf/llava-1.5-7b-hf" is downloaded first."""
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
SHAPE |= dict(mlp_width="intermediate_size")
VISION_FIELDS = SHAPE | dict(image_size="image_size", patch_size="patch_size", norm_eps="layer_norm_eps")
LANGUAGE_FIELDS = SHAPE | dict(kv_heads="num_key_value_heads", vocab_size="vocab_size")
LANGUAGE_FIELDS |= dict(context="max_position_embeddings", norm_eps="rms_norm_eps", rope_base="rope_theta")
LANGUAGE_FIELDS |= dict(tie_embeddings="tie_word_embeddings")
LLAVA_FIELDS = dict(image_token_id="image_token_index")
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
    """config.json and preprocessor_config.json -> LLaVAConfig. What they leave out has the published classes' defaults,
    which are those of the dataclasses."""
    raw = json.loads((folder / "config.json").read_text())
    tower, text = part(raw, "vision_config"), part(raw, "text_config")
    require(folder, raw, model_type="llava", projector_hidden_act="gelu")
    require(folder, raw, vision_feature_select_strategy=("default", "full"), multimodal_projector_bias=True)
    require(folder, tower, model_type="clip_vision_model", hidden_act="quick_gelu")
    require(folder, text, model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope = part(text, "rope_parameters") or part(text, "rope_scaling")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{folder} scales its rotary positions ({rope}), which llava.py does not")
    language = LanguageConfig(**found(text | rope, LANGUAGE_FIELDS, LanguageConfig))
    if text.get("num_key_value_heads") is None:
        language = replace(language, kv_heads=language.heads)
    if raw.get("tie_word_embeddings"):  # it has stood in both places
        language = replace(language, tie_embeddings=True)
    vision = VisionConfig(**found(tower, VISION_FIELDS, VisionConfig))
    layer = raw.get("vision_feature_layer", -2)
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    if layer not in range(-vision.layers - 1, vision.layers + 1):
        raise ValueError(f"{folder} has vision_feature_layer = {layer!r}; one of {vision.layers} layers was expected")
    return LLaVAConfig(
        replace(vision, **pixels_from_published(folder, vision)),
        language,
        feature_layer=layer if layer < 0 else layer - vision.layers - 1,  # as counted from the end
        keep_class_token=raw.get("vision_feature_select_strategy") == "full",
        **found(raw, dict(image_token_id="image_token_id"), LLaVAConfig) | found(raw, LLAVA_FIELDS, LLaVAConfig),
        **found(text, ENDS, LLaVAConfig) | found(read_json(folder / "generation_config.json"), ENDS, LLaVAConfig),
    )


def pixels_from_published(folder, vision):
    """What the processor's file says of squares and normalising, as fields of VisionConfig."""
    processor = processor_of(folder)
    require(folder, processor, do_resize=True, do_rescale=True, do_normalize=True, do_center_crop=True)
    require(folder, processor, resample=3, rescale_factor=1 / 255)  # 3: bicubic
    S = vision.image_size
    require(folder, processor, size=(S, {"shortest_edge": S}), crop_size=(S, {"height": S, "width": S}))
    pads = processor.get("do_pad") and "CLIP" not in str(processor.get("image_processor_type"))  # which ignores it
    return dict(resize="pad" if pads else "crop") | found(processor, dict(mean="image_mean", std="image_std"), vision)


if __name__ == "__main__":
    from train_tiny import workbench

    workbench("llava")  # --demo, --image, --prompt, --weights, --anatomy, --trace, --show-mask: see --help
