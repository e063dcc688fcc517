"""
ViLT: one transformer reads words and patches together, and nothing is done to either beforehand.

    ViLT    Kim et al. 2021, ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision,
            arXiv 2102.03334

The idea. Before ViLT an image first went through a deep ResNet, and often an object detector behind it, which cost more
than the transformer that then compared it with the text. ViLT leaves all of that out: a patch is embedded as cheaply as
a word, by one linear map, and a single encoder does all the rest -- seeing, reading, and relating the two. From the
first layer on, every word looks at every patch and every patch at every word (early fusion, single stream).

    "a red circle"  ids [B,T]                        image [B,3,H,W], any aspect ratio
      | word + position + segment, LayerNorm           | PxP patches, one linear map each
      |                                                | + position, interpolated to this image's own grid
    [B,T,D]                                          [B,N,D], with a class token in front [B,1+N,D]
      | + "I am text"                                  | + "I am image"
      +------------------- joined ---------------------+
                             |
                        [B,S,D]    S = T + 1 + N
                             | blocks: everything that is not padding sees everything
                        hidden [B,S,D]
                             |
        first text token, pooled ---- itm_logits [B,2]     do the two belong together?    (ITM)
                             |------- rank_score [B]       how well, against others       (retrieval)
                             |------- vqa_logits [B,A]     which of A answers             (VQA)
        every text token ------------ mlm_logits [B,T,V]   which word was masked here     (MLM)
        words against patches ------- ipot: the cheapest way to move one onto the other   (WPA)

Three losses train it (paper 3.2): masked words are to be guessed (MLM; with the image in sight, "a [MASK] circle" has an
answer); an image is swapped for another half of the time, and the model must notice (ITM); and words and patches are to
lie close together under an optimal transport plan (WPA), which is what `ipot` below computes, and the demo draws.

Axis letters, here and in all seven files: B batch, T text length, S joint length, N images or patches, P patch size,
D width, H heads, K key/value heads, Dh head width, L latents or queries, F frames, V vocabulary, E shared embedding
width. Two of them, H and W, are also an image's height and width: [B,3,H,W] is always pixels.

Paper / published code / this file
    - Image size. The paper says shorter side 384, longer side under 640. The published processor's limit is
      int(1333 / 800 * 384) = 639, and it rounds down to multiples of 32: at most 608. So do we.
    - Number of patches. In pretraining at most 200 of an image's patches are read, drawn anew each time (max_patches);
      the published checkpoints read all. Outside of training we take evenly spaced ones: the same image, the same answer.
    - Two things are called token type. BERT's segments (sentence A or B; always A here) are added before its LayerNorm,
      the modality (text or image) after it. Both are in the checkpoints, so both are here.
    - WPA. The paper adds the transport distance of the pair to the loss. The published code subtracts it for mismatched
      pairs, and so do we: the words of another image's caption should be *far* from this image's patches. How far is far
      enough is ours (wpa_loss: near, far); without it the toy's plans lose their meaning as soon as it matches well.
    - Whole words are chosen for masking, but whether a token of one becomes [MASK], a random token, or stays (0.8, 0.1, 0.1)
      is drawn for each token by itself, in the published code and here.
    - RandAugment, and the second image of NLVR2 (a third modality embedding), are left out.

What to try: --show-mask; --demo --prompt "top-left a small [MASK] circle"; train without WPA and look at the plan again;
mask single tokens instead of whole words (number them 1, 2, 3 ... in vilt_words; own data has longer words); set `beta` to
0.05 and to 5 and explain the plans.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn

from kernels import attention, draw_mask

IGNORE_INDEX = -100  # a label that does not count; cross_entropy's own default

# ----------------------------------------------------------------------------------------------------------------------
# Configuration

TASKS = ("mlm", "itm", "vqa", "rank")  # what a head can be for


@dataclass(frozen=True)
class ViLTConfig:
    image_size: int = 384  # an image's shorter side; the learned positions are for a square of this size
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu"  # see ACTIVATIONS
    norm_eps: float = 1e-12
    vocab_size: int = 30522  # BERT's, uncased
    context: int = 40  # text tokens; captions are short
    segments: int = 2  # BERT's sentence A and sentence B; ViLT uses A only
    max_patches: int = -1  # -1: all; the paper's pretraining: 200
    tasks: tuple = ("mlm",)  # which heads there are, see TASKS
    answers: int = 3129  # of VQAv2, those given at least nine times
    pad_token_id: int = 0
    cls_token_id: int = 101
    sep_token_id: int = 102
    mask_token_id: int = 103
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if unknown := set(self.tasks) - set(TASKS):
            raise ValueError(f"unknown task {min(unknown)!r}; known: {', '.join(TASKS)}")
        if self.max_patches == 0 or self.max_patches < -1:
            raise ValueError(f"max_patches is {self.max_patches}; a number of patches, or -1 for all")


PRESETS = {
    # what train_tiny.py trains in front of you: 16 patches of a square image, ids from its 512-token vocabulary
    "tiny": ViLTConfig(
        32, 8, width=96, layers=4, heads=4, mlp_width=384, norm_eps=1e-5, vocab_size=512, tasks=("mlm", "itm"),
        pad_token_id=496, cls_token_id=504, sep_token_id=505, mask_token_id=503,
    ),
    "vilt-b32-mlm": ViLTConfig(),
    "vilt-b32-finetuned-vqa": ViLTConfig(tasks=("vqa",)),
    "vilt-b32-finetuned-coco": ViLTConfig(tasks=("rank",)),
}  # fmt: skip


def patch_grid(height, width, config):
    """(rows, columns) of whole patches in an image of height x width pixels, patch_size taken from config. A border narrower
    than a patch is dropped, as the convolution does. Raises ValueError when not even one patch fits."""
    rows, columns = height // config.patch_size, width // config.patch_size
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {height} x {width} pixels is smaller than one patch of {config.patch_size}")
    return rows, columns


def num_image_tokens(height, width, config):
    """Tokens the encoder reads for one image of height x width pixels (as preprocess leaves it): the class token, and a
    token per patch, max_patches at most (config: ViLTConfig). The one place where this is computed."""
    rows, columns = patch_grid(height, width, config)
    patches = rows * columns
    return 1 + (patches if config.max_patches < 0 else min(patches, config.max_patches))


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
# Embeddings: all that is done to a word or to a patch before they meet


class TextEmbedding(nn.Module):
    """BERT's (Devlin et al. 2019, arXiv 1810.04805): forward(ids [B,T], mask [B,T] or None) -> [B,T,D]."""

    def __init__(self, config):
        super().__init__()
        self.context = config.context
        self.word_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.segment_embedding = nn.Embedding(config.segments, config.width)
        self.ln = nn.LayerNorm(config.width, eps=config.norm_eps)
        for embedding in (self.word_embedding, self.position_embedding, self.segment_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids, mask=None):
        T = ids.shape[1]
        if T > self.context:
            raise ValueError(f"the text has {T} tokens, the context holds {self.context}: shorten the text")
        positions = torch.arange(T, device=ids.device)
        if mask is not None:  # count real tokens only, so that padding on the left shifts nothing
            positions = (mask.bool().cumsum(1) - 1).clamp(min=0)  # [B,T]
        x = self.word_embedding(ids) + self.position_embedding(positions)
        return self.ln(x + self.segment_embedding.weight[0])  # one sentence: always segment A


class ImageEmbedding(nn.Module):
    """forward(pixels [B,3,H,W], pixel_mask [B,H,W] or None) -> (x [B,1+N,D], real [B,1+N], place [B,N]).

    The class token comes first, then each image's own patches in reading order, then padding. An image fills the top
    left corner of its pixels and pixel_mask is True there. `place` is where a patch stands in the padded grid, counted
    in reading order: what one needs to draw it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P, grid = config.width, config.patch_size, config.image_size // config.patch_size
        # A convolution whose stride is its kernel is a linear map applied to every patch.
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=P, stride=P)
        self.position_embedding = nn.Embedding(grid * grid + 1, D)
        self.class_embedding = nn.Parameter(0.02 * torch.randn(D))
        nn.init.normal_(self.position_embedding.weight, std=0.3)  # patches are not normalised: 0.02 would drown in them

    def positions(self, rows, columns):
        """Position embeddings [rows,columns,D] for an image of rows x columns patches: the learned square, stretched
        bilinearly, corners on corners (as in the published code; CLIP's files do it bicubically)."""
        grid = self.config.image_size // self.config.patch_size
        square = self.position_embedding.weight[1:].T.reshape(1, -1, grid, grid)
        return F.interpolate(square, size=(rows, columns), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)

    def forward(self, pixels, pixel_mask=None):
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B,3,H,W], got {list(pixels.shape)}")
        B, P, (rows, columns) = len(pixels), self.config.patch_size, patch_grid(*pixels.shape[2:], self.config)
        if pixel_mask is not None and pixel_mask.shape != (B, *pixels.shape[2:]):
            raise ValueError(f"pixel_mask must be {[B, *pixels.shape[2:]]}, one value per pixel, got {list(pixel_mask.shape)}")
        if pixel_mask is None:
            real = torch.ones(B, rows, columns, dtype=torch.bool, device=pixels.device)
        else:  # images are padded by whole patches, so the first pixel of a patch speaks for all of it
            real = pixel_mask.bool()[:, : rows * P : P, : columns * P : P]  # [B,rows,columns]
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).permute(0, 2, 3, 1)  # [B,rows,columns,D]
        x = note("image.patches", x)
        positions = torch.zeros_like(x)
        for i in range(B):  # each image has its own grid, so each has its own positions
            r, c = int(real[i, :, 0].sum()), int(real[i, 0].sum())
            if not r * c:
                raise ValueError(f"pixel_mask leaves no patch of image {i}: it must be True in the top left corner")
            positions[i, :r, :c] = self.positions(r, c)
        place, real = choose_patches(real.flatten(1), self.config.max_patches, self.training)  # both [B,N]
        x = (x + positions).flatten(1, 2)
        x = x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))  # [B,N,D]
        first = (self.class_embedding + self.position_embedding.weight[0]).expand(B, 1, -1)
        return torch.cat([first, x], dim=1), F.pad(real, (1, 0), value=True), place


def choose_patches(real, limit, training):
    """Which patches are read: real [B,grid] (True = part of the image) -> place [B,N], real [B,N].

    Row i of `place` holds the indices of image i's patches in rising order, and 0 where `real` says padding; N is the
    largest number needed. Above `limit` (-1: none) patches are drawn at random while training (paper 4.2: at most 200), and
    taken at even distances otherwise.

    >>> choose_patches(torch.tensor([[True, True, False], [True, True, True]]), 2, training=False)[0].tolist()
    [[0, 1], [0, 1]]
    """
    rows = []
    for row in real:
        place = row.nonzero()[:, 0]
        if 0 < limit < len(place):
            if training:
                chosen = torch.randperm(len(place), device=place.device)[:limit].sort().values
            else:
                chosen = torch.arange(limit, device=place.device) * len(place) // limit
            place = place[chosen]
        rows.append(place)
    places = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B,N]
    lengths = torch.tensor([len(row) for row in rows], device=real.device)
    return places, torch.arange(places.shape[1], device=real.device) < lengths[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# Heads


class MLMHead(nn.Module):
    """BERT's: one more layer, then the word embeddings themselves as output matrix (they are passed in: one matrix, two
    uses, and no second copy to keep equal). forward(x [...,D], word_embeddings [V,D]) -> logits [...,V]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]
        self.ln = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x, word_embeddings):
        return F.linear(self.ln(self.activation(self.dense(x))), word_embeddings, self.bias)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class ViLT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.width
        self.text = TextEmbedding(config)
        self.image = ImageEmbedding(config)
        self.modality_embedding = nn.Embedding(2, D)  # 0: I am text, 1: I am image
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(D, eps=config.norm_eps)
        self.pooler = nn.Linear(D, D)
        nn.init.normal_(self.modality_embedding.weight, std=0.02)
        init_blocks(self.blocks, D)
        if "mlm" in config.tasks:
            self.mlm_head = MLMHead(config)
        if "itm" in config.tasks:
            self.itm_head = nn.Linear(D, 2)
        if "vqa" in config.tasks:
            self.vqa_head = nn.Sequential(  # answering is choosing one of the commonest answers
                nn.Linear(D, 2 * D), nn.LayerNorm(2 * D), nn.GELU(), nn.Linear(2 * D, config.answers)
            )
        if "rank" in config.tasks:
            self.rank_head = nn.Linear(D, 1)

    def embed(self, pixels, ids, mask=None, pixel_mask=None):
        """-> (x [B,S,D], real [B,S], place [B,N]): words and patches in one row, and which of them are no padding."""
        if len(pixels) != len(ids):
            raise ValueError(f"{len(pixels)} images and {len(ids)} texts: ViLT reads them in pairs, one image per text")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"mask must be {list(ids.shape)} like ids (True = real token), got {list(mask.shape)}")
        words = self.text(ids, mask) + self.modality_embedding.weight[0]
        patches, real, place = self.image(pixels, pixel_mask)
        patches = patches + self.modality_embedding.weight[1]
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return note("words and patches", torch.cat([words, patches], dim=1)), torch.cat([mask, real], dim=1), place

    def encode(self, x, real):
        """x [B,S,D], real [B,S] (True = no padding) -> hidden [B,S,D]. The encoder does not know what is word and what is
        patch, or in which order they come: that is in the embeddings alone."""
        segments = None if bool(real.all()) else real.int() - 1  # -1 for padding, which nobody may look at
        for i, block in enumerate(self.blocks):
            x = note(f"blocks.{i}", block(x, segments=segments))
        return note("hidden", self.ln_post(x))

    def forward(self, pixels, ids, mask=None, pixel_mask=None):
        """pixels [B,3,H,W] and pixel_mask [B,H,W] (see preprocess), ids [B,T], mask [B,T] (True = real token)
        -> hidden [B,T+1+N,D]: the words, the image's class token, its patches (N: of the largest image in the batch).

        Raises ValueError when the text is longer than the context, or texts and images are not equally many.
        """
        x, real, _ = self.embed(pixels, ids, mask, pixel_mask)
        return self.encode(x, real)

    def pooled(self, hidden, mask=None):
        """tanh(linear(first token)) -> [B,D]: [CLS] has gathered both sides. mask [B,T] is needed if text is padded on the
        left, where the first token is not the first column."""
        first = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device) if mask is None else mask.int().argmax(1)
        return torch.tanh(self.pooler(hidden[torch.arange(len(hidden), device=hidden.device), first]))

    def head(self, task):
        if task not in self.config.tasks:
            raise ValueError(f"this model has no {task} head; it has: {', '.join(self.config.tasks) or 'none'}")
        return getattr(self, f"{task}_head")

    def mlm_logits(self, hidden):
        """hidden [...,D] of words -> logits [...,V] for the word that stood there."""
        return note("mlm logits", self.head("mlm")(hidden, self.text.word_embedding.weight))

    def itm_logits(self, hidden, mask=None):
        """hidden [B,S,D] -> [B,2]: index 1 says that image and text belong together, index 0 that they do not."""
        return note("itm logits", self.head("itm")(self.pooled(hidden, mask)))

    def vqa_logits(self, hidden, mask=None):
        """hidden [B,S,D] -> [B,answers]; each answer is judged on its own (sigmoid), since several people were asked."""
        return note("vqa logits", self.head("vqa")(self.pooled(hidden, mask)))

    def rank_score(self, hidden, mask=None):
        """hidden [B,S,D] -> [B]: the higher, the better the two fit. Only differences mean something (softmax over candidates)."""
        return note("rank score", self.head("rank")(self.pooled(hidden, mask))[:, 0])

    @torch.no_grad()
    def start_rank_head(self):
        """Retrieval begins where pretraining ended: the row of the matching head that says "yes" (paper 4.4)."""
        rank, itm = self.head("rank"), self.head("itm")
        rank.weight.copy_(itm.weight[1:])
        rank.bias.copy_(itm.bias[1:])

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a published ViLT: a folder in the Hugging Face layout, or a hub id. See load_checkpoint."""
        folder = checkpoint_folder(path)
        config = config_from_published(read_config(folder), folder)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config)
        return load_checkpoint(model, folder, dtype, device)


# ----------------------------------------------------------------------------------------------------------------------
# What is hidden from the model: words for MLM, the right image for ITM


def mask_whole_words(ids, word_numbers, config, rng, probability=0.15):
    """Hide words, whole ones (paper 3.3): of "gir ##af ##fe" the last piece alone would be guessed from the first two,
    without a look at the image. -> (ids with holes, labels), two lists as long as ids.

    ids: one text; word_numbers: for each token the number of its word, None for special tokens, which are never hidden.
    rng: a random.Random. At least one word is hidden, so that even a batch of one has something to learn from. A hidden
    token becomes [MASK] (0.8), a random token (0.1) or stays as it is (0.1): the model must doubt what it reads.
    """
    words = sorted({number for number in word_numbers if number is not None})
    if not words:
        raise ValueError("the text has no word that could be masked")
    hidden = {number for number in words if rng.random() < probability} or {rng.choice(words)}
    masked, labels = list(ids), [IGNORE_INDEX] * len(ids)
    for i, number in enumerate(word_numbers):
        if number in hidden:
            dice = rng.random()
            labels[i] = ids[i]
            masked[i] = config.mask_token_id if dice < 0.8 else rng.randrange(config.vocab_size) if dice < 0.9 else ids[i]
    return masked, labels


def swap_images(captions, rng, probability=0.5):
    """For matching: which image each text gets, and whether that is right. -> (index, label), two lists of B.

    With `probability` a text gets another image of the batch, label 0. An image whose caption is the same would not be
    wrong, so it is never taken; a text for which there is no wrong image (a batch of one, all captions equal) keeps its
    own, label 1.
    """
    index, labels = list(range(len(captions))), [1] * len(captions)
    for i, caption in enumerate(captions):
        wrong = [j for j, other in enumerate(captions) if other != caption]
        if wrong and rng.random() < probability:
            index[i], labels[i] = rng.choice(wrong), 0
    return index, labels


# ----------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of tensors, returning the loss and its metrics


def mlm_loss(logits, labels):
    """Cross-entropy of the hidden tokens: logits [B,T,V], labels [B,T], IGNORE_INDEX where nothing was hidden (no shift:
    a hole is filled where it is). Before training about ln V. Raises ValueError when nothing was hidden."""
    counted = labels != IGNORE_INDEX
    if not counted.any():
        raise ValueError("no label to learn from: nothing was masked")
    logits, labels = logits[counted].float(), labels[counted]  # [counted,V]
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"mlm accuracy": accuracy.detach()}


def itm_loss(logits, labels):
    """Image-text matching: logits [B,2], labels [B] (1: they belong together). Before training about ln 2."""
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits.float(), labels), {"itm accuracy": accuracy.detach()}


def vqa_loss(logits, targets):
    """Binary cross-entropy of each answer, logits and targets [B,answers]; a target between 0 and 1 says how many people
    gave this answer. Summed over answers and averaged over questions."""
    right = targets.gather(1, logits.argmax(1, keepdim=True)).mean()
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum") / len(logits)
    return loss, {"vqa score": right.detach()}


def rank_loss(scores):
    """Retrieval (paper 4.4): scores [B,C] of C candidate texts for each image, the right one first; the others were drawn
    at random (15 in the paper). Before training about ln C. With one candidate there is nothing to choose: the loss is 0."""
    accuracy = (scores.argmax(1) == 0).float().mean()
    return F.cross_entropy(scores.float(), torch.zeros(len(scores), dtype=torch.long, device=scores.device)), {"rank accuracy": accuracy}


@torch.no_grad()
def ipot(cost, words, patches, beta=0.5, iterations=50):
    """The cheapest way to move words onto patches: cost [B,T,N], words [B,T] and patches [B,N] (True = takes part)
    -> plan [B,T,N], how much of each word goes to each patch.

    Every word has the same amount to give and every patch the same room, so the rows of a plan add up to 1/T and its
    columns to 1/N (counting what takes part). Among all such plans the one with the least sum(plan * cost) is wanted: the
    distance of Wasserstein, of the earth mover. As a linear programme that is slow; IPOT (Xie et al. 2018, arXiv
    1802.04307) approaches it in equal, simple steps, each a small problem of its own:

        next plan = argmin  sum(plan * cost) + beta * KL(plan || last plan)      (stay near the last one: "proximal")

    whose solution has the form a[:,None] * (exp(-cost / beta) * last plan) * b[None,:]. The factors a and b make rows and
    columns add up; one Sinkhorn update of each is enough, as the next step corrects the rest ("inexact"). After n steps
    the cost has been counted n times: the plan gets sharper and sharper. exp(-n cost / beta) itself, which plain Sinkhorn
    would need and in which whole rows could vanish, is never formed: only entries that the best plan does not use fade
    to zero, and rows and columns are put right at every step.

    Why inside no_grad: at the best plan the distance's derivative with respect to the plan is nothing to follow (it is a
    minimum already; the envelope theorem), so the gradient of the loss flows through the cost only, and fifty iterations
    need not be remembered. In float32 always: the products of small factors need its range.
    """
    words, patches = words.float(), patches.float()
    supply = words / words.sum(1, keepdim=True).clamp(min=1)  # [B,T] 1/T for a word, 0 for padding
    demand = patches / patches.sum(1, keepdim=True).clamp(min=1)  # [B,N]
    plan = words[:, :, None] * patches[:, None, :]
    kernel = torch.exp(-cost.float() / beta) * plan  # no way leads to padding
    a = supply
    for _ in range(iterations):
        step = kernel * plan
        b = demand / torch.einsum("btn,bt->bn", step, a).clamp(min=1e-30)
        a = supply / torch.einsum("btn,bn->bt", step, b).clamp(min=1e-30)
        plan = a[:, :, None] * step * b[:, None, :]
    return plan


def transport(text, image, words, patches):
    """Hidden states text [B,T,D] and image [B,N,D], and which of them take part -> (distance [B], plan [B,T,N]). Moving a
    word onto a patch costs one minus the cosine of the two."""
    cost = 1 - F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).transpose(1, 2)  # [B,T,N], 0 to 2
    plan = ipot(cost.detach(), words, patches)
    return (plan * cost).sum((1, 2)), plan


def wpa_loss(text, image, words, patches, labels, near=0.0, far=2.0):
    """Word-patch alignment (paper 3.2): the distance of pairs that match (labels 1) shall fall, that of pairs that do
    not (labels 0) shall grow. Shapes as in transport, labels [B]. -> loss, metrics. The paper weighs it with 0.1.

    A distance is between 0 and 2. With near 0 and far 2 this is the published loss up to a constant (2 for a mismatch),
    with the same gradient, and it never has enough: once the model can tell matches from mismatches, it may move *all*
    words onto *all* patches of a match, and the plan no longer says anything. Matches nearer than `near`, and mismatches
    further than `far`, are left in peace.
    """
    distance, _ = transport(text, image, words, patches)
    matched = labels.bool()
    loss = torch.where(matched, F.relu(distance - near), F.relu(far - distance)).mean()
    return loss, {"transport distance": ((distance * matched).sum() / matched.sum().clamp(min=1)).detach()}


def text_words(ids, config):
    """Which tokens are words, [B,T]: neither [CLS] nor [SEP] nor padding. These take part in the transport."""
    special = torch.tensor([config.pad_token_id, config.cls_token_id, config.sep_token_id], device=ids.device)
    return ~torch.isin(ids, special)


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


def target_size(width, height, config):
    """(width, height) an image is resized to: shorter side image_size, but the longer at most 1333/800 of that (the
    proportions detectors had used), then both rounded down to whole patches. The aspect ratio survives, roughly."""
    short, longest = config.image_size, int(1333 / 800 * config.image_size)
    scale = short / min(width, height)
    new_width, new_height = (scale * width, short) if height < width else (short, scale * height)
    if max(new_width, new_height) > longest:
        scale = longest / max(new_width, new_height)
        new_width, new_height = scale * new_width, scale * new_height
    P = config.patch_size  # at least one patch: a thin image would otherwise vanish (the published code fails there)
    return tuple(max(P, int(side + 0.5) // P * P) for side in (new_width, new_height))


def preprocess(images, config):
    """PIL images of any size -> (pixels [B,3,H,W] float32, pixel_mask [B,H,W] bool), equal to the published processor's.

    Each image keeps its aspect ratio, as target_size says, and lies in the top left corner; the rest is padding, zero in
    pixels and False in the mask.
    """
    if not images:
        raise ValueError("preprocess needs at least one image")
    arrays = []
    for image in images:
        image = image.convert("RGB")
        image = image.resize(target_size(*image.size, config), Image.Resampling.BICUBIC)
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.asarray(image, dtype=np.float64) * (1 / 255)).astype(np.float32)
        arrays.append((pixels - np.float32(config.mean)) / np.float32(config.std))
    height, width = max(a.shape[0] for a in arrays), max(a.shape[1] for a in arrays)
    batch = np.zeros((len(arrays), height, width, 3), dtype=np.float32)
    mask = np.zeros((len(arrays), height, width), dtype=bool)
    for i, a in enumerate(arrays):
        batch[i, : a.shape[0], : a.shape[1]], mask[i, : a.shape[0], : a.shape[1]] = a, True
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(mask)


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

EMBEDDING_NAMES = {  # published name -> ours; {} is the number of the layer; .weight and .bias follow by themselves
    "text_embeddings.word_embeddings": "text.word_embedding",
    "text_embeddings.position_embeddings": "text.position_embedding",
    "text_embeddings.token_type_embeddings": "text.segment_embedding",
    "text_embeddings.LayerNorm": "text.ln",
    "patch_embeddings.projection": "image.patch_embedding",
    "position_embeddings": "image.position_embedding.weight",
    "cls_token": "image.class_embedding",
    "token_type_embeddings": "modality_embedding",
}
LAYER_NAMES = {
    "encoder.layer.{}.layernorm_before": "blocks.{}.ln_1",
    "encoder.layer.{}.attention.attention.query": "blocks.{}.attn.q_proj",
    "encoder.layer.{}.attention.attention.key": "blocks.{}.attn.k_proj",
    "encoder.layer.{}.attention.attention.value": "blocks.{}.attn.v_proj",
    "encoder.layer.{}.attention.output.dense": "blocks.{}.attn.out_proj",
    "encoder.layer.{}.layernorm_after": "blocks.{}.ln_2",
    "encoder.layer.{}.intermediate.dense": "blocks.{}.mlp.fc1",
    "encoder.layer.{}.output.dense": "blocks.{}.mlp.fc2",
    "layernorm": "ln_post",
    "pooler.dense": "pooler",
}
HEAD_NAMES = {
    "mlm_score.transform.dense": "mlm_head.dense",
    "mlm_score.transform.LayerNorm": "mlm_head.ln",
    "mlm_score.decoder.weight": "text.word_embedding.weight",  # tied: files may hold it twice
    "mlm_score.decoder.bias": "mlm_head.bias",
    "mlm_score.bias": "mlm_head.bias",  # older files call it so, or hold it under both names
    "classifier.{}": "vqa_head.{}",
    "rank_output": "rank_head",
}

TOWERS = [  # (published prefix, our prefix, table), tried in this order
    ("vilt.embeddings.", "", EMBEDDING_NAMES),
    ("vilt.", "", LAYER_NAMES),
    ("", "", HEAD_NAMES),
]
LEFT_OUT = [r"\.position_ids$", r"\.text_embeddings\.token_type_ids$"]  # buffers that older files carry


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


HEADS = {  # the published class -> the heads it has
    "ViltForMaskedLM": ("mlm",),
    "ViltForQuestionAnswering": ("vqa",),
    "ViltForImageAndTextRetrieval": ("rank",),
}


def config_from_published(raw, folder):
    """The published config.json (a dict) -> ViLTConfig. Fields it leaves out have the published class's defaults. Which
    heads there are is told by "architectures", since the layout is otherwise the same."""
    if raw.get("model_type") != "vilt":
        raise ValueError(f"{folder} holds a {raw.get('model_type')!r} checkpoint; vilt.py reads 'vilt'")
    if raw.get("max_image_length") is None:  # some files write null for "all of them"
        raw = raw | {"max_image_length": -1}
    kind = (raw.get("architectures") or ["none"])[0]
    if kind not in HEADS:
        raise ValueError(f"{folder} holds a {kind}; vilt.py reads {', '.join(HEADS)}")
    config = replace_published(
        ViLTConfig(tasks=HEADS[kind]),
        raw,
        dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", mlp_width="intermediate_size")
        | dict(activation="hidden_act", norm_eps="layer_norm_eps", image_size="image_size", patch_size="patch_size")
        | dict(vocab_size="vocab_size", context="max_position_embeddings", segments="type_vocab_size")
        | dict(max_patches="max_image_length"),
    )
    if raw.get("modality_type_vocab_size", 2) != 2 or not raw.get("qkv_bias", True):
        raise ValueError(f"{folder} needs a third modality or maps without bias, which vilt.py does not have")
    answers = len(raw.get("id2label") or {}) or raw.get("num_labels", 2)  # the published class's default
    return replace(config, answers=answers) if "vqa" in config.tasks else config


def image_config_from_published(config, folder):
    """ViLTConfig with what preprocessor_config.json says of size and normalising, if the folder has one."""
    file = Path(folder) / "preprocessor_config.json"
    if not file.is_file():
        return config
    raw = read_json(file)
    changes = {ours: tuple(raw[theirs]) for ours, theirs in (("mean", "image_mean"), ("std", "image_std")) if theirs in raw}
    if raw.get("size_divisor", config.patch_size) != config.patch_size:
        raise ValueError(f"{file} rounds to multiples of {raw['size_divisor']}; vilt.py to whole patches of {config.patch_size}")
    size = raw.get("size", config.image_size)
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    if size != config.image_size:
        raise ValueError(f"{file} resizes to {size} pixels; the model was made for {config.image_size}")
    return replace(config, **changes)


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


class ResNetStem(nn.Module):
    """What ViLT left out: a ResNet-101 (He et al. 2015, arXiv 1512.03385, Table 1), on whose features region detectors and
    grid models stood. Never trained here; it is only asked what it costs. forward(pixels [B,3,H,W]) -> [B,2048,H/32,W/32].
    """

    def __init__(self, blocks=(3, 4, 23, 3)):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
        )
        self.main, self.shortcut, channels = nn.ModuleList(), nn.ModuleList(), 64
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride, inner = 2 if stage and not i else 1, 64 * 2**stage
                self.main.append(
                    nn.Sequential(  # a bottleneck: narrow, 3x3, wide again
                        nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
                        nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
                        nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner),
                    )
                )  # fmt: skip
                reshape = nn.Sequential(nn.Conv2d(channels, 4 * inner, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * inner))
                self.shortcut.append(nn.Identity() if i else reshape)
                channels = 4 * inner

    def forward(self, pixels):
        x = self.first(pixels)
        for main, shortcut in zip(self.main, self.shortcut, strict=True):
            x = F.relu(main(x) + shortcut(x))
        return x


def embedding_costs(config, height, width, words=40):
    """FLOPs for one image and one text, on the meta device: {"patches": the projection, "encoder": all blocks, "resnet": a
    ResNet-101 on the same image}. The paper's point (Figure 1): the transformer should be the larger part."""
    with torch.device("meta"):
        model, stem = ViLT(config).eval(), ResNetStem().eval()
        pixels = torch.empty(1, 3, height, width)
        x = torch.empty(1, words + num_image_tokens(height, width, config), config.width)

    def encoder():
        for block in model.blocks:
            block(x)

    return {
        "patches": count_flops(lambda: model.image.patch_embedding(pixels)),
        "encoder": count_flops(encoder),
        "resnet": count_flops(lambda: stem(pixels)),
    }


def anatomy(name):
    """Modules, shapes, parameters, visual tokens and FLOPs of a preset, as text."""
    config = find_preset(name)
    with torch.device("meta"):
        model = ViLT(config)
    P = config.patch_size
    sizes = [target_size(*size, config)[::-1] for size in ((1000, 1000), (1500, 1000), (3000, 1000))]  # height, width
    tokens = ", ".join(f"{h} x {w}: {num_image_tokens(h, w, config)}" for h, w in sizes)
    costs = embedding_costs(config, *sizes[1], config.context)
    return "\n".join(
        [
            f"{name}: {count_parameters(model):,} parameters, all of them trained; heads: {', '.join(config.tasks)}",
            "",
            table(describe(model)),
            "",
            f"tokens of an image ({P} x {P} pixels each, and the class token): {tokens}",
            f"FLOPs for {sizes[1][0]} x {sizes[1][1]} pixels and {config.context} words: {costs['patches']:,} to embed the patches,",
            f"{costs['encoder']:,} in the encoder; a ResNet-101 on the same image would cost {costs['resnet']:,}.",
            "No KV cache: nothing is generated word by word. A pair must be read together, so ranking B images against",
            "B texts costs B * B passes (CLIP: B + B): the price of fusing early.",
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_trace():
    """The shapes through one forward pass of the tiny model, with random weights."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    model = ViLT(config).eval()
    ids = torch.randint(0, 400, (2, 7))
    with torch.no_grad(), trace() as t:
        hidden = model(torch.randn(2, 3, config.image_size, config.image_size), ids)
        model.mlm_logits(hidden[:, :7])
        model.itm_logits(hidden)
    return f"tiny, random weights, 2 pairs of an image and 7 words; 7 words + 1 class token + 16 patches = 24\n\n{t}"


def show_mask():
    """Who may look at whom, drawn from the same rule that the attention kernels follow."""
    padded = torch.tensor([[0, 0, -1, 0, 0, 0, -1, -1]])
    return "\n\n".join(
        [
            "rows look at columns; # may, . may not",
            "one encoder: 3 words, the class token and 4 patches; every one sees every one\n" + draw_mask(8, 8),
            "the same with padding: 2 words and 1 of padding, the class token, 2 patches and 2 of padding\n"
            + draw_mask(8, 8, q_segments=padded, k_segments=padded),
        ]
    )


def check_prompt(prompt, tokens, context):
    if not prompt.strip():
        raise ValueError("the prompt is empty: write what to look for, as in --prompt 'a red circle'")
    if tokens > context:
        raise ValueError(f"the prompt has {tokens} tokens, the context holds {context}: shorten it")


@torch.no_grad()
def fill_masks(model, pixels, ids, pixel_mask=None):
    """Each [MASK] in ids [1,T] becomes the likeliest token there -> (ids [1,T], how sure [number of masks])."""
    hole = ids == model.config.mask_token_id
    share = model.mlm_logits(model(pixels, ids, None, pixel_mask)[:, : ids.shape[1]][hole]).float().softmax(-1)  # [masks,V]
    filled = ids.clone()
    filled[hole] = share.argmax(-1)
    return filled, share.max(-1).values


def run_weights(args):
    """--weights DIR --image FILE --prompt TEXT: a published checkpoint fills [MASK], answers, or ranks, as its heads can."""
    if not args.image or not args.prompt:
        raise ValueError("--weights needs --image and --prompt, as in --image photo.jpg --prompt 'a [MASK] on a couch'")
    images = [load_image(path) for path in args.image]
    folder = checkpoint_folder(args.weights)
    raw = read_config(folder)
    config = image_config_from_published(config_from_published(raw, folder), folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = [tokenizer.encode(prompt).ids for prompt in args.prompt]
    for prompt, row in zip(args.prompt, rows, strict=True):  # wrong prompts are found before gigabytes are read
        check_prompt(prompt, len(row), config.context)
        if "mlm" in config.tasks and config.mask_token_id not in row:
            raise ValueError(f"this checkpoint fills in words, and {prompt!r} has no [MASK]; as in 'a [MASK] on a couch'")
    device = check_device(args.device)
    model = ViLT.from_pretrained(folder, getattr(torch, args.dtype), device)
    for file, image in zip(args.image, images, strict=True):
        pixels, pixel_mask = preprocess([image], config)
        pixels, pixel_mask, found = pixels.to(device), pixel_mask.to(device), []
        for prompt, row in zip(args.prompt, rows, strict=True):
            ids = torch.tensor([row], device=device)
            with torch.no_grad():
                if "mlm" in config.tasks:
                    filled, sure = fill_masks(model, pixels, ids, pixel_mask)
                    text = tokenizer.decode(filled[0].tolist(), skip_special_tokens=True)
                    found.append(f"{text}  ({', '.join(f'{s:.0%}' for s in sure.tolist())} sure)")
                elif "vqa" in config.tasks:
                    share = model.vqa_logits(model(pixels, ids, None, pixel_mask))[0].float().sigmoid()
                    best = share.topk(min(3, len(share)))
                    names = [raw.get("id2label", {}).get(str(i), f"answer {i}") for i in best.indices.tolist()]
                    found.append(f"{prompt} -> " + ", ".join(f"{n} ({s:.0%})" for n, s in zip(names, best.values.tolist())))
                else:
                    found.append((model.rank_score(model(pixels, ids, None, pixel_mask)).item(), prompt))
        if "rank" in config.tasks:
            found = [f"{score:7.2f}  {prompt}" for score, prompt in sorted(found, reverse=True)]
        print("\n  ".join([str(file), *found]))


def draw_plan(image, words, plan, grid, file, size=112):
    """PNG: the image, then once per word, darkened where little of the word lands. plan [words,N], grid (rows, columns)."""
    page = Image.new("RGB", (6 * (size + 8) + 8, (len(words) // 6 + 1) * (size + 24) + 8), "white")
    pen = ImageDraw.Draw(page)
    image = image.resize((size, size * grid[0] // grid[1]), Image.Resampling.NEAREST)
    for i, (word, row) in enumerate(zip(["", *words], [None, *plan], strict=True)):
        x, y = 8 + i % 6 * (size + 8), 8 + i // 6 * (size + 24)
        picture = image
        if row is not None:
            shade = (255 * row / row.max()).to(torch.uint8).view(grid).numpy()
            shade = Image.fromarray(shade).resize(image.size, Image.Resampling.NEAREST)
            picture = Image.composite(image, Image.new("RGB", image.size), shade)
        page.paste(picture, (x, y))
        pen.text((x, y + image.height + 2), word, fill="black")
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file)


def demo(args):
    """Train the toy ViLT in front of the reader if it is not cached, then show what one encoder for both does."""
    import train_tiny as tiny

    device = check_device(args.device)
    images = [load_image(path) for path in args.image]  # wrong input is found before the training
    config = PRESETS["tiny"]
    prompts = [prompt.replace("[MASK]", "<mask>") for prompt in args.prompt]
    for prompt in prompts:
        check_prompt(prompt, len(tiny.vilt_ids(prompt)), config.context)
    rng = tiny.rng_for("vilt demo")
    scenes = [tiny.make_scene(rng, count, split="test") for count in (2, 3, 2)]
    gflops = {part: f"{flops / 1e9:.0f}" for part, flops in embedding_costs(PRESETS["vilt-b32-mlm"], 384, 608).items()}
    print("In go 16 patches of an image and the words of a text, in one row, to one encoder. At published size an image costs")
    print("{patches} GFLOP to embed and {encoder} to read together with the text; a ResNet-101 before it, {resnet} more.".format(**gflops))
    torch.manual_seed(0)
    untrained = ViLT(config).to(device).eval()
    holes = tiny.masked_words(rng, 200)
    print(f"with random weights {tiny.recovered(untrained, holes):.0%} of masked colours, shapes and places are guessed")
    model = tiny.demo_vilt(args.device)
    if not tiny.recipe_is_done("vilt", tiny.VILT_STEPS):
        print("(this model has had a third of the training; python train_tiny.py vilt gives it all, and the demo then uses that)")
    if images or prompts:
        for name, image in zip(args.image or ["a scene of ours"], images or [tiny.draw(scenes[0])], strict=True):
            print(name)
            for prompt in prompts or ["a <mask> <mask>"]:
                print(f"    {tiny.vilt_respond(model, image, prompt)}")
        return
    wrong = tiny.recovered(model, holes, wrong_image=True)
    print(f"after training, {tiny.recovered(model, holes):.0%}; with a wrong image beside the text, {wrong:.0%}")
    print("\nhidden words of images it has never seen:")
    for scene in scenes[:2]:
        text = tiny.caption(scene)
        for word in (scene.things[0].colour, scene.things[-1].shape):
            print(f"    {tiny.vilt_respond(model, tiny.draw(scene), tiny.hide(text, word))}")
    print("does the text belong to the image? One word changed:")
    scene = scenes[2]
    for text in (tiny.short_caption(scene), tiny.short_caption(tiny.near_miss(scene, rng))):
        print(f"    {tiny.vilt_respond(model, tiny.draw(scene), text)}")
    words, plan = tiny.vilt_plan(model, scene)
    grid = patch_grid(32, 32, config)
    print("\nword-patch alignment: where each word of the right text lands (share of the word on 16 patches, in 1/100)")
    chosen = [i for i, word in enumerate(words) if word in (*tiny.COLOURS, *tiny.SHAPES)]
    print("    " + "".join(f"{words[i]:<21}" for i in chosen))
    for row in range(grid[0]):
        print("    " + " ".join("".join(f"{100 * v:4.0f} " for v in plan[i].view(grid)[row].tolist()) for i in chosen))
    file = tiny.RUNS / "vilt" / "demo.png"
    draw_plan(tiny.draw(scene), words, plan, grid, file)
    print(f"written: {file} (the image, and for each word of its text the patches it lands on)")


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
    sys.modules.setdefault("vilt", sys.modules[__name__])  # train_tiny imports vilt: let it find this very module
    main()
