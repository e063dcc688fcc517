"""
CLIP and SigLIP: two towers, and a loss between them.

    CLIP    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020
    SigLIP  Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343

The idea. Nobody has to label images: the web already pairs them with text. Encode a batch of B images and their B
texts into one space, and ask each image to pick out its own text among all B (and each text its image). Whatever
helps at that game -- colours, objects, style, writing -- is learned, and a class can afterwards be named in words
("a photo of a {dog}") and recognised without one labelled example. Vision and language meet only in the last dot
product (late fusion), so either side can be encoded once, stored and searched.

    image [B,3,H,W]                                    text ids [B,T]
      | PxP patches, one linear map each                 | token embedding + position
    [B,N,D]                                            [B,T,D]
      | + class token, + position, LayerNorm             |
    [B,N+1,D]                                            |
      | blocks: every patch sees every patch             | blocks: causal, a word sees the words before it
      | class token                                      | end-of-text token (it has seen them all)
    [B,D] -- linear, unit length --> [B,E]    [B,E] <-- linear, unit length -- [B,D]
                                        \\      /
                       logits [B,B] = scale * image @ text.T         row i: which text belongs to image i?

    CLIP    softmax over each row and each column: every pair is judged against the whole batch.
    SigLIP  sigmoid of every entry on its own: B*B yes/no questions. No class token (a learned probe attends to the
            patches instead), text that looks both ways, a bias because almost every answer is "no".

Axis letters, here and in all seven files: B batch, T text length, S joint length, N images or patches, P patch size,
D width, H heads, K key/value heads, Dh head width, L latents or queries, F frames, V vocabulary, E shared embedding
width. Two of them, H and W, are also an image's height and width: [B,3,H,W] is always pixels.

Paper / published code / this file
    - Dropout, gradient checkpointing and mixed-precision machinery are left out.
    - Padding. CLIP pads after the end-of-text token, where the causal mask hides it. SigLIP was trained on text padded
      to 64 and *looks at* its padding; pass no mask (and 64 ids) to reproduce it. With a `mask` both towers give the
      answer for the unpadded text, whichever side the padding is on.
    - The published config says eos_token_id 2 for the first CLIP checkpoints and means "the highest id in the row".

What to try: --show-mask, --trace, --anatomy siglip-so400m-patch14-384; swap the loss with train_tiny.py clip --loss
sigmoid; set logit_scale to 0 and explain the first loss; make the text tower bidirectional and see what changes.
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
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn

from kernels import attention, draw_mask

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
class TextConfig:
    vocab_size: int = 49408
    context: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_width: int = 2048
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    causal: bool = True  # CLIP: so that the tower could also be trained as a language model. SigLIP: False
    eos_token_id: int = 49407  # where CLIP reads the text feature; 2 means "at the highest id" (see above)
    pad_token_id: int = 49407

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not divisible by {self.heads} heads")


@dataclass(frozen=True)
class CLIPConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 512
    loss: str = "softmax"  # "softmax" is CLIP; "sigmoid" is SigLIP: a bias, a pooling probe, no projections

    def __post_init__(self):
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown loss {self.loss!r}; known: softmax, sigmoid")


def _clip(image_size, patch_size, width, layers, text_width, embed_dim):
    """The family of CLIP paper, Table 20: heads are 64 wide, an MLP is four times the width."""
    vision = VisionConfig(image_size, patch_size, width, layers, width // 64, 4 * width)
    text = TextConfig(width=text_width, heads=text_width // 64, mlp_width=4 * text_width)
    return CLIPConfig(vision, text, embed_dim)


def _siglip(image_size, patch_size, width, layers, heads, mlp_width):
    """SigLIP: both towers have the same shape, tanh-GELU, epsilon 1e-6, pixels scaled to [-1, 1]."""
    shape = dict(width=width, layers=layers, heads=heads, mlp_width=mlp_width, activation="gelu_tanh", norm_eps=1e-6)
    half = (0.5, 0.5, 0.5)
    vision = VisionConfig(image_size, patch_size, class_token=False, ln_pre=False, resize="squash", mean=half, std=half, **shape)
    text = TextConfig(vocab_size=32000, context=64, causal=False, eos_token_id=1, pad_token_id=1, **shape)
    return CLIPConfig(vision, text, width, loss="sigmoid")


PRESETS = {
    # what train_tiny.py trains in front of you: 16 patches, 32 tokens of text, ids from its 512-token vocabulary
    "tiny": CLIPConfig(
        VisionConfig(32, 8, width=96, layers=4, heads=4, mlp_width=384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        TextConfig(512, 32, width=96, layers=3, heads=4, mlp_width=384, eos_token_id=498, pad_token_id=496),
        embed_dim=96,
    ),
    "clip-vit-base-patch32": _clip(224, 32, 768, 12, 512, 512),
    "clip-vit-base-patch16": _clip(224, 16, 768, 12, 512, 512),
    "clip-vit-large-patch14": _clip(224, 14, 1024, 24, 768, 768),
    "clip-vit-large-patch14-336": _clip(336, 14, 1024, 24, 768, 768),
    "siglip-base-patch16-224": _siglip(224, 16, 768, 12, 12, 3072),
    "siglip-so400m-patch14-384": _siglip(384, 14, 1152, 27, 16, 4304),
}


def patch_grid(height, width, config):
    """(rows, columns) of whole patches in an image of height x width pixels, patch_size taken from config. A border narrower
    than a patch is dropped, as the convolution does. Raises ValueError when not even one patch fits."""
    rows, columns = height // config.patch_size, width // config.patch_size
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {height} x {width} pixels is smaller than one patch of {config.patch_size}")
    return rows, columns


def num_image_tokens(height, width, config):
    """Tokens in CLIP's vision tower for an image of height x width pixels: its patches, and the class token if it has
    one (config: CLIPConfig). The one place where this is computed."""
    rows, columns = patch_grid(height, width, config.vision)
    return rows * columns + int(config.vision.class_token)


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


class AttentionPool(nn.Module):
    """SigLIP's image feature: one learned probe asks the patches a question (Set Transformer, arXiv 1810.00825, 3.2).

    forward(x [B,N,D]) -> [B,D]. in_proj holds the maps for query, key and value in one matrix, as published.
    """

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.probe = nn.Parameter(torch.randn(1, 1, D) * D**-0.5)
        self.in_proj = nn.Linear(D, 3 * D)
        self.out_proj = nn.Linear(D, D)
        self.ln = nn.LayerNorm(D, eps=config.norm_eps)
        self.mlp = MLP(D, config.mlp_width, config.activation)

    def forward(self, x):
        B, N, D = x.shape
        weight, bias = self.in_proj.weight, self.in_proj.bias
        q = F.linear(self.probe, weight[:D], bias[:D]).expand(B, 1, D)
        k, v = F.linear(x, weight[D:], bias[D:]).chunk(2, dim=-1)
        q, k, v = (t.reshape(B, -1, self.heads, D // self.heads).transpose(1, 2) for t in (q, k, v))
        x = self.out_proj(attention(q, k, v).transpose(1, 2).reshape(B, D))
        return x + self.mlp(self.ln(x))


# ----------------------------------------------------------------------------------------------------------------------
# Text tower


class TextTower(nn.Module):
    """forward(ids [B,T], mask [B,T] or None; True = real token) -> hidden states [B,T,D] after the last LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_final = nn.LayerNorm(config.width, eps=config.norm_eps)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        init_blocks(self.blocks, config.width)

    def forward(self, ids, mask=None):
        B, T = ids.shape
        if T > self.config.context:
            raise ValueError(f"the text has {T} tokens, the context holds {self.config.context}: shorten the text")
        if mask is None:
            positions, segments = torch.arange(T, device=ids.device), None
        else:  # count real tokens only, so that padding on the left shifts nothing
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B,T]
            segments = mask.int() - 1  # 0 for a real token, -1 for padding, which nobody may look at
        x = note("text.tokens + positions", self.token_embedding(ids) + self.position_embedding(positions))
        for i, block in enumerate(self.blocks):
            x = note(f"text.blocks.{i}", block(x, self.config.causal, segments))
        return self.ln_final(x)

    def feature_index(self, ids, mask=None):
        """Which position carries the feature of the whole text, [B]: CLIP's end-of-text token, SigLIP's last token."""
        B, T = ids.shape
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if not self.config.causal:
            return T - 1 - real.flip(1).int().argmax(1)
        if self.config.eos_token_id == 2:  # the first published configs; the end-of-text token has the highest id
            return ids.masked_fill(~real, -1).argmax(1)
        is_end = (ids == self.config.eos_token_id) & real
        if not is_end.any(1).all():
            row = int((~is_end.any(1)).nonzero()[0])
            raise ValueError(f"text {row} has no end-of-text token (id {self.config.eos_token_id}): was it cut off?")
        return is_end.int().argmax(1)  # the first one; CLIP pads with the same id


# ----------------------------------------------------------------------------------------------------------------------
# The model


class CLIP(nn.Module):
    """Two towers into one space. `config.loss` chooses CLIP ("softmax") or SigLIP ("sigmoid")."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.text = TextTower(config.text)
        E, Dv, Dt = config.embed_dim, config.vision.width, config.text.width
        if config.loss == "softmax":
            self.visual_projection = nn.Linear(Dv, E, bias=False)
            self.text_projection = nn.Linear(Dt, E, bias=False)
            nn.init.normal_(self.visual_projection.weight, std=Dv**-0.5)
            nn.init.normal_(self.text_projection.weight, std=Dt**-0.5)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP 2.5; learned as a log, stays > 0
        else:
            self.vision_head = AttentionPool(config.vision)
            self.text_head = nn.Linear(Dt, Dt)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # SigLIP 3.2: t' = log 10, b = -10:
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # at the start nearly all pairs are rightly negative

    def encode_image(self, pixels):
        """pixels [B,3,H,W] (see preprocess) -> features [B,E] of length one."""
        x = self.vision(pixels)
        if self.config.loss == "softmax":
            x = self.visual_projection(self.vision.ln_post(x[:, 0]))  # the class token has gathered the image
        else:
            x = self.vision_head(self.vision.ln_post(x))
        return note("image features", F.normalize(x, dim=-1))

    def encode_text(self, ids, mask=None):
        """ids [B,T], mask [B,T] (True = real token) -> features [B,E] of length one.

        Raises ValueError when the text is longer than the context or (CLIP) lacks its end-of-text token.
        """
        x = self.text(ids, mask)
        x = x[torch.arange(len(x), device=x.device), self.text.feature_index(ids, mask)]  # [B,D]
        x = self.text_projection(x) if self.config.loss == "softmax" else self.text_head(x)
        return note("text features", F.normalize(x, dim=-1))

    def logits(self, image, text):
        """image [Bi,E], text [Bt,E], both of length one -> logits_per_image [Bi,Bt]."""
        logits = self.logit_scale.exp() * image @ text.T
        return note("logits", logits if self.config.loss == "softmax" else logits + self.logit_bias)

    def forward(self, pixels, ids, mask=None):
        """pixels [Bi,3,H,W], ids [Bt,T] -> logits_per_image [Bi,Bt]; its transpose is logits_per_text."""
        return self.logits(self.encode_image(pixels), self.encode_text(ids, mask))

    def loss(self, image, text, ranks=False):
        """The loss this model is trained with, of features [B,E]; ranks=True inside torchrun. -> loss, metrics."""
        scale = self.logit_scale.exp()
        if self.config.loss == "softmax":
            return (contrastive_loss_ranks if ranks else contrastive_loss)(image, text, scale)
        return (sigmoid_loss_ranks if ranks else sigmoid_loss)(image, text, scale, self.logit_bias)

    @torch.no_grad()
    def clip_logit_scale(self):
        """Call after each optimizer step: CLIP 2.5, no logit is scaled by more than 100, "necessary for stability"."""
        if self.config.loss == "softmax":
            self.logit_scale.clamp_(max=math.log(100.0))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a published CLIP or SigLIP: a folder in the Hugging Face layout, or a hub id. See load_checkpoint."""
        folder = checkpoint_folder(path)
        config = config_from_published(read_config(folder), folder)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config)
        return load_checkpoint(model, folder, dtype, device)


# ----------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of features [B,E] of length one. logit_scale is the factor itself, not its log.


def contrastive_loss(image, text, logit_scale):
    """CLIP's symmetric cross-entropy, Figure 3 of the paper: image i belongs to text i. -> loss, metrics.

    At logit_scale 0 all texts are equally likely, and the loss is ln B: the value to expect before training. With B = 1
    there is nothing to tell apart and the loss is 0, whatever the model does.
    """
    return _contrastive_rows(image, text, image, text, 0, logit_scale)


def _contrastive_rows(image, text, all_images, all_texts, first, logit_scale):
    """The part of the loss that belongs to the b pairs first .. first+b-1 of a joint batch of B: rows of the matrix for
    the images, columns for the texts, divided by B, so that the parts of a joint batch add up to its loss."""
    target = torch.arange(first, first + len(image), device=image.device)
    per_image = logit_scale * image @ all_texts.T  # [b,B]
    per_text = logit_scale * text @ all_images.T  # [b,B]
    entropies = F.cross_entropy(per_image, target, reduction="sum") + F.cross_entropy(per_text, target, reduction="sum")
    accuracy = (per_image.argmax(1) == target).float().mean()
    return entropies / (2 * len(all_images)), {"accuracy": accuracy.detach()}


def sigmoid_loss(image, text, logit_scale, logit_bias, chunk=None):
    """SigLIP's loss, Algorithm 1: each of the B*B pairs is a yes/no question of its own. -> loss, metrics.

    There is no sum over the batch inside a logarithm, so the matrix can be cut anywhere: `chunk` texts at a time.
    """
    B, chunk, total = len(image), chunk or len(image), 0.0
    for start in range(0, B, chunk):
        total = total + _sigmoid_block(image, text[start : start + chunk], -start, logit_scale, logit_bias)
    return total / B, {"accuracy": ((image @ text.T).argmax(1) == torch.arange(B, device=image.device)).float().mean()}


def _sigmoid_block(image, text, offset, logit_scale, logit_bias):
    """Sum of the losses of a block of pairs; image i and text j match where j == i + offset (None: nowhere)."""
    logits = logit_scale * image @ text.T + logit_bias
    sign = -torch.ones_like(logits)  # +1 for "belongs together", -1 for "does not"
    if offset is not None and -len(image) < offset < len(text):
        sign.diagonal(offset).fill_(1.0)
    return -F.logsigmoid(sign * logits).sum()


class _GatherRanks(torch.autograd.Function):
    """All ranks' [b,E] -> the joint [W*b,E] on each of the W ranks; backward: what all ranks want of *my* rows, summed.
    (torch's plain all_gather sends no gradient back, the usual reason why a large batch does not help.)"""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class _RingShift(torch.autograd.Function):
    """Pass x on to the next rank and return what the rank before passed; backward sends the gradient home."""

    @staticmethod
    def shift(x, step):
        rank, size = dist.get_rank(), dist.get_world_size()
        received = torch.empty_like(x)
        send = dist.P2POp(dist.isend, x.contiguous(), (rank + step) % size)
        receive = dist.P2POp(dist.irecv, received, (rank - step) % size)
        for request in dist.batch_isend_irecv([send, receive]):
            request.wait()
        return received

    @staticmethod
    def forward(ctx, x):
        return _RingShift.shift(x, +1)

    @staticmethod
    def backward(ctx, grad):
        return _RingShift.shift(grad, -1)


def contrastive_loss_ranks(image, text, logit_scale):
    """contrastive_loss across processes. Each rank gives its b pairs and receives its *share* of the joint loss: the
    shares sum to contrastive_loss of the joint batch, so parameter gradients are to be summed (not averaged)."""
    all_images, all_texts = _GatherRanks.apply(image), _GatherRanks.apply(text)
    return _contrastive_rows(image, text, all_images, all_texts, dist.get_rank() * len(image), logit_scale)


def sigmoid_loss_ranks(image, text, logit_scale, logit_bias):
    """sigmoid_loss across processes, SigLIP 3.3: no all-gather; the texts travel round the ring and no rank ever holds
    more than one block [b,b] of the matrix. Shares as in contrastive_loss_ranks."""
    total, visitor = 0.0, text
    for step in range(dist.get_world_size()):
        if step:
            visitor = _RingShift.apply(visitor)
        total = total + _sigmoid_block(image, visitor, None if step else 0, logit_scale, logit_bias)
    return total / (dist.get_world_size() * len(image)), {}


# ----------------------------------------------------------------------------------------------------------------------
# Zero-shot classification


@torch.no_grad()
def zero_shot_classifier(model, class_names, templates, tokenize):
    """CLIP 3.1.4: a class is the mean direction of its prompts. -> [number of classes, E], rows of length one.

    templates: strings with one {} for the name. tokenize: list of strings -> (ids [B,T], mask [B,T] or None).
    """
    device = model.logit_scale.device
    rows = []
    for name in class_names:
        ids, mask = tokenize([template.format(name) for template in templates])
        features = model.encode_text(ids.to(device), None if mask is None else mask.to(device))  # [templates,E]
        rows.append(F.normalize(features.mean(0), dim=-1))
    return torch.stack(rows)


@torch.no_grad()
def zero_shot(model, pixels, class_names, templates, tokenize):
    """Logits [B, number of classes] of images [B,3,H,W] for classes that are given by name only."""
    return model.logits(model.encode_image(pixels), zero_shot_classifier(model, class_names, templates, tokenize))


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

ENCODER_NAMES = {  # published name -> ours; {} is the number of the layer; .weight and .bias follow by themselves
    "encoder.layers.{}.layer_norm1": "blocks.{}.ln_1",
    "encoder.layers.{}.self_attn.q_proj": "blocks.{}.attn.q_proj",
    "encoder.layers.{}.self_attn.k_proj": "blocks.{}.attn.k_proj",
    "encoder.layers.{}.self_attn.v_proj": "blocks.{}.attn.v_proj",
    "encoder.layers.{}.self_attn.out_proj": "blocks.{}.attn.out_proj",
    "encoder.layers.{}.layer_norm2": "blocks.{}.ln_2",
    "encoder.layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "encoder.layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
}
VISION_NAMES = ENCODER_NAMES | {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "patch_embedding",
    "embeddings.position_embedding": "position_embedding",
    "pre_layrnorm": "ln_pre",  # the published spelling
    "post_layernorm": "ln_post",
}
TEXT_NAMES = ENCODER_NAMES | {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "position_embedding",
    "final_layer_norm": "ln_final",
}
POOL_NAMES = {
    "probe": "probe",
    "attention.in_proj_weight": "in_proj.weight",
    "attention.in_proj_bias": "in_proj.bias",
    "attention.out_proj": "out_proj",
    "layernorm": "ln",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TOP_NAMES = {name: name for name in ("visual_projection", "text_projection", "logit_scale", "logit_bias")}

TOWERS = [  # (published prefix, our prefix, table), tried in this order
    ("vision_model.head.", "vision_head.", POOL_NAMES),
    ("vision_model.", "vision.", VISION_NAMES),
    ("text_model.head", "text_head", {"": ""}),
    ("text_model.", "text.", TEXT_NAMES),
    ("", "", TOP_NAMES),
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
    """The published config.json (a dict) -> CLIPConfig. Fields it leaves out have the published classes' defaults."""
    kind = raw.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ValueError(f"{folder} holds a {kind!r} checkpoint; clip.py reads 'clip' and 'siglip'")
    siglip = kind == "siglip"
    preset = PRESETS["siglip-base-patch16-224" if siglip else "clip-vit-base-patch32"]

    shape = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads")
    shape |= dict(mlp_width="intermediate_size", activation="hidden_act", norm_eps="layer_norm_eps")
    vision_fields = shape | dict(image_size="image_size", patch_size="patch_size")
    vision = replace_published(preset.vision, raw.get("vision_config") or {}, vision_fields)
    text_fields = shape | dict(vocab_size="vocab_size", context="max_position_embeddings")
    if not siglip:  # (SigLIP configs inherit CLIP's ids by mistake; it reads the last token, and pads with 1)
        text_fields |= dict(eos_token_id="eos_token_id")
    text = replace_published(preset.text, raw.get("text_config") or {}, text_fields)
    embed_dim = text.width if siglip else raw.get("projection_dim", 512)
    vision = image_config_from_published(vision, folder)
    return CLIPConfig(vision, text, embed_dim, loss="sigmoid" if siglip else "softmax")


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
    """Modules, shapes, parameters, visual tokens and FLOPs of a preset, as text."""
    config = find_preset(name)
    with torch.device("meta"):
        model = CLIP(config)
    side, T = config.vision.image_size, config.text.context
    pixels, ids = torch.empty(1, 3, side, side, device="meta"), torch.zeros(1, T, dtype=torch.long, device="meta")
    image_flops, text_flops = count_flops(lambda: model.vision(pixels)), count_flops(lambda: model.text(ids))
    total, tokens = count_parameters(model), num_image_tokens(side, side, config)
    return "\n".join(
        [
            f"{name}: {total:,} parameters, all of them trained (one stage, {config.loss} loss)",
            "",
            table(describe(model)),
            "",
            f"image {side} x {side} -> {tokens} tokens{' (one is the class token)' if config.vision.class_token else ''}"
            f" -> 1 vector of {config.embed_dim};  text of {T} tokens -> 1 vector of {config.embed_dim}",
            f"FLOPs: {image_flops:,} for an image, {text_flops:,} for a text; B pairs cost B times the sum,",
            f"and the similarity matrix 2 * B * B * {config.embed_dim}. No KV cache: nothing is generated.",
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_trace():
    """The shapes through one forward pass of the tiny model, with random weights."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    model = CLIP(config)
    ids = torch.randint(0, 400, (2, 7))
    ids[:, -1] = config.text.eos_token_id
    with torch.no_grad(), trace() as t:
        model(torch.randn(2, 3, config.vision.image_size, config.vision.image_size), ids)
    return f"tiny, random weights, 2 images and 2 texts of 7 tokens\n\n{t}"


def show_mask():
    """Who may look at whom, drawn from the same rule that the attention kernels follow."""
    padded = torch.tensor([[0, 0, 0, 0, -1, -1]])  # 4 tokens, 2 of padding
    return "\n\n".join(
        [
            "rows look at columns; # may, . may not",
            "image tower: the class token and all patches see each other\n" + draw_mask(5, 5),
            "CLIP's text tower: causal, so the end-of-text token is the only one that has seen everything\n"
            + draw_mask(6, 6, causal=True),
            "SigLIP's text tower: both ways (here with a mask: 4 tokens and 2 of padding)\n"
            + draw_mask(6, 6, q_segments=padded, k_segments=padded),
        ]
    )


def rank_prompts(model, images, prompts, tokenize):
    """How well each prompt fits each image, [images, prompts]: CLIP shares 1 out among the prompts, SigLIP judges each
    prompt alone. Raises ValueError on a prompt that is empty or too long."""
    pixels = preprocess(images, model.config.vision).to(model.logit_scale.device)
    ids, mask = tokenize(prompts)
    ids, mask = ids.to(pixels.device), None if mask is None else mask.to(pixels.device)
    with torch.no_grad():
        logits = model(pixels, ids, mask)
    share = logits.softmax(-1) if model.config.loss == "softmax" else logits.sigmoid()
    return share.cpu()


def published_tokenize(folder, config):
    """-> tokenize(texts) -> (ids, None), padded as the published processors do. Raises ValueError on an overlong text."""
    tokenizer = load_tokenizer(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def tokenize(texts):
        rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        for text, row in zip(texts, rows, strict=True):
            check_prompt(text, len(row), config.context)
        longest = max(len(row) for row in rows) if config.causal else config.context  # SigLIP always sees 64 tokens
        # both pad with their end-of-text token, which the tokenizer has just put at the end of each row
        return torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows]), None

    return tokenize


def check_prompt(prompt, tokens, context):
    if not prompt.strip():
        raise ValueError("the prompt is empty: write what to look for, as in --prompt 'a red circle'")
    if tokens > context:
        raise ValueError(f"the prompt has {tokens} tokens, the context holds {context}: shorten it")


def run_weights(args):
    """--weights DIR --image FILE --prompt TEXT --prompt TEXT ...: a published checkpoint ranks the prompts."""
    if not args.image or not args.prompt:
        raise ValueError("--weights needs --image and --prompt, as in --image photo.jpg --prompt 'a cat' --prompt 'a dog'")
    images = [load_image(path) for path in args.image]
    folder = checkpoint_folder(args.weights)
    config = config_from_published(read_config(folder), folder)
    tokenize = published_tokenize(folder, config.text)
    tokenize(args.prompt)  # a prompt too long is found before gigabytes are read
    model = CLIP.from_pretrained(folder, getattr(torch, args.dtype), check_device(args.device))
    print(table_of_shares(args.image, args.prompt, rank_prompts(model, images, args.prompt, tokenize)))


def table_of_shares(files, prompts, shares):
    """shares [images, prompts] as text, the best prompt of each image first."""
    lines = []
    for file, row in zip(files, shares, strict=True):
        lines.append(str(file))
        lines += [f"  {100 * row[i]:5.1f} %  {prompts[i]}" for i in row.argsort(descending=True).tolist()]
    return "\n".join(lines)


@torch.no_grad()
def patch_importance(model, pixels, text):
    """How much of the similarity each patch carries, [rows, columns]: what is lost when it alone is painted grey.

    pixels [1,3,H,W], text [1,E]. Works for any tower, since it only asks the model again, once per patch.
    """
    P = model.config.vision.patch_size
    rows, columns = patch_grid(*pixels.shape[2:], model.config.vision)
    hidden = pixels.repeat(rows * columns, 1, 1, 1)
    for i in range(rows * columns):
        y, x = P * (i // columns), P * (i % columns)
        hidden[i, :, y : y + P, x : x + P] = pixels.mean()
    similarity = model.encode_image(torch.cat([pixels, hidden])) @ text.T  # [1 + N,1]
    return (similarity[0] - similarity[1:, 0]).view(rows, columns)


def draw_similarity(images, logits, heat, file, cell=64):
    """PNG: the images beside their row of the similarity matrix (white: as similar as it gets), and the last image
    with the patches that carry its similarity."""
    B = len(images)
    page = Image.new("RGB", ((B + 1) * cell + 20, (B + 1) * cell + 20), "white")
    pen = ImageDraw.Draw(page)
    share = logits.softmax(-1)
    for i, image in enumerate(images):
        page.paste(image.resize((cell - 4, cell - 4), Image.Resampling.NEAREST), (2, i * cell + 2))
        for j in range(B):
            level = int(255 * share[i, j])
            x, y = (j + 1) * cell + 20, i * cell
            pen.rectangle((x, y, x + cell - 4, y + cell - 4), fill=(level,) * 3, outline="red" if i == j else "grey")
    heat = (heat.clamp(min=0) / heat.max().clamp(min=1e-6)).numpy()
    shade = Image.fromarray((255 * heat).astype(np.uint8)).resize((cell - 4, cell - 4), Image.Resampling.NEAREST)
    small = images[-1].resize((cell - 4, cell - 4), Image.Resampling.NEAREST)
    page.paste(Image.composite(small, Image.new("RGB", small.size), shade), (2, B * cell + 12))
    pen.text((cell + 20, B * cell + 12), "the last image again: bright patches carry its similarity", fill="black")
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file)


def demo(args):
    """Train the toy CLIP in front of the reader if it is not cached, then show what a dual encoder does."""
    import train_tiny as tiny

    device = check_device(args.device)
    images = [load_image(path) for path in args.image]  # wrong input is found before the training
    for prompt in args.prompt:
        check_prompt(prompt, len(tiny.encode(prompt)) + 1, PRESETS["tiny"].text.context)
    rng = tiny.rng_for("clip demo")
    scenes = [tiny.make_scene(rng, split="test") for _ in range(256)]
    fresh = [tiny.unseen_pair_scene(rng, 1) for _ in range(120)]
    print("A world of coloured shapes. An image of 32 x 32 pixels is 16 patches; its text is, for example:")
    print(f"    {tiny.caption(scenes[0])}")
    torch.manual_seed(0)
    untrained = CLIP(PRESETS["tiny"]).to(device).eval()
    print(f"before training, the right text among 256 is found for {tiny.retrieval(untrained, scenes):.0%} (guessing: 0.4 %)")
    model = tiny.toy_clip(args.device)
    print(f"after training, for {tiny.retrieval(model, scenes):.0%} of images it has never seen")
    named = tiny.naming(model, fresh, tiny.TEMPLATES)
    pairs = ", ".join(" ".join(pair) for pair in tiny.UNSEEN_PAIRS)
    print(f"pairs never shown in training ({pairs}):\n    named rightly, out of 30, {named:.0%} (guessing: 3 %)")
    tokenize = tiny.clip_tokenize(model)
    if images:
        prompts = args.prompt or ["a red circle", "a blue square", "a green triangle"]
        print(table_of_shares(args.image, prompts, rank_prompts(model, images, prompts, tokenize)))
        return
    shown = [tiny.draw(scene) for scene in scenes[:7]] + [tiny.draw(fresh[0])]
    texts = [tiny.caption(scene) for scene in scenes[:7]] + [tiny.caption(fresh[0])]
    ids, mask = tokenize(texts)
    pixels = preprocess(shown, model.config.vision).to(device)
    with torch.no_grad():
        text = model.encode_text(ids.to(device), None if mask is None else mask.to(device))
        logits = model.logits(model.encode_image(pixels), text).cpu()
    heat = patch_importance(model, pixels[-1:], text[-1:]).cpu()
    print(f"\nwhich patches carry the similarity to {texts[-1]!r}? Lost when one patch is painted grey, in 1/100:")
    print("\n".join("    " + " ".join(f"{100 * value:5.1f}" for value in row) for row in heat.tolist()))
    file = tiny.RUNS / "clip" / "demo.png"
    draw_similarity(shown, logits, heat, file)
    print(f"written: {file} (the similarity matrix: 8 images by 8 texts, the diagonal should be bright)")


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
    sys.modules.setdefault("clip", sys.modules[__name__])  # train_tiny imports clip: let it find this very module
    main()
