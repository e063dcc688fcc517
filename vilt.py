"""
ViLT: one transformer encoder reads words and image patches together.

    ViLT    Kim et al. 2021, ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision,
            arXiv 2102.03334

The idea. Before ViLT, an image first went through a deep ResNet, often with an object detector behind it. That cost
more than the transformer which then related the image to the text. ViLT leaves both out: a patch is embedded as cheaply
as a word, by one linear map, and a single encoder does the rest. From the first layer on, every word attends to every
patch and every patch to every word (early fusion, single stream).

    "a red circle"  ids [B,T]                        image [B,3,H,W], any aspect ratio
      | word + position + segment, LayerNorm           | patches of P x P pixels, one linear map for all of them
      |                                                | + position, interpolated to the grid of this image
    [B,T,D]                                          [B,N,D], with a class token in front [B,1+N,D]
      | + modality embedding 0 (text)                  | + modality embedding 1 (image)
      +------------------- joined ---------------------+
                             |
                        [B,S,D]    S = T + 1 + N
                             | blocks: every token attends to every token that is not padding
                        hidden [B,S,D]
                             |
        first text token, pooled ---- itm_logits [B,2]     do image and text match?              (ITM)
                             |------- rank_score [B]       how well, against other candidates?   (retrieval)
                             |------- vqa_logits [B,A]     which of A answers is right?          (VQA)
        every text token ------------ mlm_logits [B,T,V]   which word was masked here?           (MLM)
        words against patches ------- ipot: the cheapest way to move the words onto the patches  (WPA)

Three losses train all parameters together (paper 3.2). MLM: masked words are predicted; "a [MASK] circle" has one
answer only when the image is used. ITM: half of the images are exchanged, and the model has to detect which. WPA: the
words of a matching text have to lie close to the patches under an optimal transport plan, which `ipot` computes.

Letters. B batch, T text length, N patches of one image, S joint length, P patch size, D width, H heads, Dh head width,
V vocabulary, A answers. H and W are also height and width of an image: [B,3,H,W] is always pixels.

Conventions
    masks   True means "real token" or "pixel of the image"; texts are padded on the right, images at right and bottom.
    labels  have the same positions as ids and are not shifted: a masked word is predicted where it stands.

Paper / published code / this file
    - Image size. The paper gives shorter side 384, longer side at most 640. The published processor limits the longer
      side to int(1333 / 800 * 384) = 639 and rounds down to multiples of 32, so at most 608. This file does the same.
    - Number of patches. Pretraining reads at most 200 patches of an image, drawn anew each time (max_patches). The
      published checkpoints read all of them. The published code draws at random outside of training too. This file
      takes evenly spaced patches there, so that the same image gives the same answer.
    - Token type is the name of two things. BERT's segments (sentence A or B; here always A) are added before its
      LayerNorm, the modality (text or image) after it. Checkpoints contain both.
    - WPA. The paper adds the transport distance of a pair to the loss. The published code subtracts it for pairs that
      do not match, and so does this file. The two bounds of wpa_loss, near and far, are this file's own.
    - Whole words are chosen for masking. Whether one of their tokens becomes [MASK], a random token, or stays as it is
      (0.8, 0.1, 0.1) is drawn for each token separately, in the published code and here.
    - RandAugment, and the second image of NLVR2 (a third modality embedding), are left out.

What to try: --show-mask; --demo --prompt "top-left a small [MASK] circle"; train without WPA and compare the plans;
mask single tokens instead of whole words; set `beta` in ipot to 0.05 and to 5 and explain the plans.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: its threads spin 0.2 ms when they wait, not 10

import json
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from kernels import Rule, attention

IGNORE_INDEX = -100  # a label that does not count; cross_entropy's own default

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class ViLTConfig:
    image_size: int = 384  # the shorter side of an image; the learned positions are those of a square of this size
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    norm_eps: float = 1e-12
    vocab_size: int = 30522  # BERT's, uncased
    context: int = 40  # text tokens; captions are short
    max_patches: int = -1  # -1: all; the paper's pretraining: 200
    tasks: tuple = ("mlm",)  # which heads there are: "mlm", "itm", "vqa", "rank"
    answers: int = 3129  # of VQAv2, those given at least nine times
    pad_token_id: int = 0
    cls_token_id: int = 101
    sep_token_id: int = 102
    mask_token_id: int = 103
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)


PRESETS = {
    # what train_tiny.py trains in front of you: 16 patches of a square image, ids from its 512-token vocabulary
    "tiny": ViLTConfig(
        image_size=32, patch_size=8, width=96, layers=4, heads=4, mlp_width=384, norm_eps=1e-5, vocab_size=512,
        tasks=("mlm", "itm"), pad_token_id=496, cls_token_id=504, sep_token_id=505, mask_token_id=503,
    ),
    "vilt-b32-mlm": ViLTConfig(),
    "vilt-b32-finetuned-vqa": ViLTConfig(tasks=("vqa",)),
    "vilt-b32-finetuned-coco": ViLTConfig(tasks=("rank",)),
}  # fmt: skip


def num_image_tokens(height, width, config):
    """Tokens the encoder reads for one image of height x width pixels, as preprocess leaves it: the class token, and
    one per patch, at most max_patches. 384 x 512 pixels are 12 * 16 patches, 193 tokens."""
    patches = (height // config.patch_size) * (width // config.patch_size)
    if config.max_patches > 0:
        patches = min(patches, config.max_patches)
    return 1 + patches


# ----------------------------------------------------------------------------------------------------------------------
# Encoder block: ViT's


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention. rule: which token attends to which, see kernels.attention."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x, rule):
        B, S, D = x.shape
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,S,Dh]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out_proj(attention(q, k, v, rule).transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    """Pre-norm transformer block: the residual stream x is only ever added to. Published: ViltLayer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rule):
        x = x + self.attn(self.ln_1(x), rule)
        return x + self.mlp(self.ln_2(x))


def init_blocks(blocks, width):
    """Initial weights of a stack of blocks, after CLIP's code. What writes to the residual stream starts smaller, by
    1/sqrt(2 * layers), because that many terms are added up in it."""
    residual_std = width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in blocks:
        nn.init.normal_(block.attn.q_proj.weight, std=width**-0.5)
        nn.init.normal_(block.attn.k_proj.weight, std=width**-0.5)
        nn.init.normal_(block.attn.v_proj.weight, std=width**-0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
        nn.init.normal_(block.mlp.fc2.weight, std=residual_std)
        for linear in (*block.attn.children(), *block.mlp.children()):
            nn.init.zeros_(linear.bias)


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings: all that happens to words and to patches before they meet


class TextEmbedding(nn.Module):
    """BERT's (Devlin et al. 2019, arXiv 1810.04805): forward(ids [B,T]) -> [B,T,D]. Published: TextEmbeddings."""

    def __init__(self, config):
        super().__init__()
        self.context = config.context
        self.word_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.segment_embedding = nn.Embedding(2, config.width)  # BERT's sentence A and sentence B
        self.ln = nn.LayerNorm(config.width, eps=config.norm_eps)
        nn.init.normal_(self.word_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        nn.init.normal_(self.segment_embedding.weight, std=0.02)

    def forward(self, ids):
        T = ids.shape[1]
        if T > self.context:
            raise ValueError(f"the text has {T} tokens, the context holds {self.context}: shorten the text")
        positions = torch.arange(T, device=ids.device).expand_as(ids)  # [B,T]
        x = self.word_embedding(ids) + self.position_embedding(positions)
        return self.ln(x + self.segment_embedding.weight[0])  # one sentence: always segment A


class ImageEmbedding(nn.Module):
    """forward(pixels [B,3,H,W], pixel_mask [B,H,W] or None) -> (x [B,1+N,D], real [B,1+N], place [B,N]).

    An image fills the top left corner of its pixels, and pixel_mask is True there. In x the class token comes first,
    then the patches of the image in reading order, then padding, where `real` is False. `place` is the index of each
    patch in the padded grid, row by row; it is needed to draw a patch. N is that of the largest image in the batch.
    Published: ViltEmbeddings.visual_embed.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P, grid = config.width, config.patch_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=P, stride=P)  # one linear map for every patch
        self.position_embedding = nn.Embedding(1 + grid * grid, D)
        self.class_embedding = nn.Parameter(0.02 * torch.randn(D))
        nn.init.normal_(self.position_embedding.weight, std=0.3)  # patches are not normalised: 0.02 would drown in them

    def positions(self, rows, columns):
        """Position embeddings [rows,columns,D] for an image of rows x columns patches: the learned square, stretched
        bilinearly with corners on corners, as in the published code."""
        grid = self.config.image_size // self.config.patch_size
        square = self.position_embedding.weight[1:].T.reshape(1, -1, grid, grid)
        return F.interpolate(square, size=(rows, columns), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)

    def chosen(self, patches, device):
        """Which of an image's patches are read, as rising indices: all of them, or max_patches. Training draws these at
        random (paper 4.2: at most 200); otherwise they are evenly spaced."""
        limit = self.config.max_patches
        if limit < 0 or patches <= limit:
            return torch.arange(patches, device=device)
        if self.training:
            return torch.randperm(patches, device=device)[:limit].sort().values
        return torch.arange(limit, device=device) * patches // limit

    def forward(self, pixels, pixel_mask=None):
        B, _, H, W = pixels.shape
        P, device = self.config.patch_size, pixels.device
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).permute(0, 2, 3, 1)  # [B,rows,columns,D]
        rows, columns = x.shape[1:3]
        if pixel_mask is None:
            pixel_mask = torch.ones(B, H, W, dtype=torch.bool, device=device)
        elif pixel_mask.shape != (B, H, W):
            raise ValueError(f"pixel_mask must be {[B, H, W]}, one value per pixel, got {list(pixel_mask.shape)}")
        # images are padded by whole patches, so the first pixel of a patch decides for all of it
        inside = pixel_mask.bool()[:, : rows * P : P, : columns * P : P]  # [B,rows,columns]
        heights, widths = inside[:, :, 0].sum(1).tolist(), inside[:, 0].sum(1).tolist()
        patches, places = [], []
        for i, (h, w) in enumerate(zip(heights, widths)):  # each image has its own grid, so each has its own positions
            place = inside[i].flatten().nonzero()[:, 0]  # [h*w]
            if len(place) == 0 or len(place) != h * w or not inside[i, :h, :w].all():
                raise ValueError(f"pixel_mask of image {i} is no rectangle at the top left ({len(place)} patches)")
            own = (x[i, :h, :w] + self.positions(h, w)).flatten(0, 1)  # [h*w,D]
            chosen = self.chosen(h * w, device)
            patches.append(own[chosen])
            places.append(place[chosen])
        real = [torch.ones_like(place, dtype=torch.bool) for place in places]
        class_token = (self.class_embedding + self.position_embedding.weight[0]).expand(B, 1, -1)
        x = torch.cat([class_token, pad_sequence(patches, batch_first=True)], dim=1)  # [B,1+N,D]
        real = F.pad(pad_sequence(real, batch_first=True), (1, 0), value=True)  # [B,1+N]
        return x, real, pad_sequence(places, batch_first=True)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class MLMHead(nn.Module):
    """BERT's: one more layer, then the word embeddings as output matrix. They are passed in, so that there is no second
    copy to keep equal. forward(x [...,D], word_embeddings [V,D]) -> logits [...,V]. Published: ViltMLMHead."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.ln = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x, word_embeddings):
        return F.linear(self.ln(F.gelu(self.dense(x))), word_embeddings, self.bias)


class ViLT(nn.Module):
    """Embeddings, encoder, and the heads that config.tasks names. Published: ViltModel, ViltForMaskedLM,
    ViltForQuestionAnswering, ViltForImageAndTextRetrieval."""

    def __init__(self, config):
        super().__init__()
        assert config.width % config.heads == 0, f"width {config.width} is not divisible by {config.heads} heads"
        assert config.image_size % config.patch_size == 0, f"{config.image_size} pixels are no whole patches"
        self.config = config
        D, A = config.width, config.answers
        self.text = TextEmbedding(config)
        self.image = ImageEmbedding(config)
        self.modality_embedding = nn.Embedding(2, D)  # 0: text, 1: image
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(D, eps=config.norm_eps)
        self.pooler = nn.Linear(D, D)
        nn.init.normal_(self.modality_embedding.weight, std=0.02)
        init_blocks(self.blocks, D)
        if "mlm" in config.tasks:
            self.mlm_head = MLMHead(config)
        if "itm" in config.tasks:
            self.itm_head = nn.Linear(D, 2)
        if "vqa" in config.tasks:  # answering means choosing one of the commonest answers
            self.vqa_head = nn.Sequential(nn.Linear(D, 2 * D), nn.LayerNorm(2 * D), nn.GELU(), nn.Linear(2 * D, A))
        if "rank" in config.tasks:
            self.rank_head = nn.Linear(D, 1)

    def embed(self, pixels, ids, mask=None, pixel_mask=None):
        """-> (x [B,S,D], real [B,S], place [B,N]): words and patches in one row, where real is True if a token is not
        padding, and place is that of ImageEmbedding. Raises ValueError for a text padded on the left."""
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        elif not mask[:, 0].all():
            raise ValueError("texts are padded on the right: the first column of mask must be True")
        words = self.text(ids) + self.modality_embedding.weight[0]  # [B,T,D]
        patches, real, place = self.image(pixels, pixel_mask)
        patches = patches + self.modality_embedding.weight[1]  # [B,1+N,D]
        return torch.cat([words, patches], dim=1), torch.cat([mask.bool(), real], dim=1), place

    def encode(self, x, real):
        """x [B,S,D], real [B,S] (True = no padding) -> hidden [B,S,D]. Modality and position are known from the
        embeddings alone: in another order the same tokens give the same hidden states."""
        rule = None  # every token attends to every token
        if not real.all():
            segments = real.int() - 1  # 0 for a real token, -1 for padding, to which nothing attends
            rule = Rule(q_segments=segments, k_segments=segments)
        for block in self.blocks:
            x = block(x, rule)
        return self.ln_post(x)

    def forward(self, pixels, ids, mask=None, pixel_mask=None):
        """pixels [B,3,H,W] and pixel_mask [B,H,W] (see preprocess), ids [B,T], mask [B,T] (True = real token)
        -> hidden [B,T+1+N,D]: the words, the class token of the image, its patches.

        Raises ValueError for a text that is longer than the context or padded on the left, and for a pixel_mask that is
        not one rectangle in the top left corner.
        """
        x, real, _ = self.embed(pixels, ids, mask, pixel_mask)
        return self.encode(x, real)

    def pooled(self, hidden):
        """hidden [B,S,D] -> [B,D], from the first token: [CLS] has attended to words and patches in every layer."""
        return torch.tanh(self.pooler(hidden[:, 0]))

    def mlm_logits(self, hidden):
        """hidden [...,D] of words -> logits [...,V] for the word that stood there."""
        return self.mlm_head(hidden, self.text.word_embedding.weight)

    def itm_logits(self, hidden):
        """hidden [B,S,D] -> [B,2]: index 1 is the logit for a pair that matches, index 0 for one that does not."""
        return self.itm_head(self.pooled(hidden))

    def vqa_logits(self, hidden):
        """hidden [B,S,D] -> [B,A]. Each answer is judged on its own (sigmoid), since several people were asked."""
        return self.vqa_head(self.pooled(hidden))

    def rank_score(self, hidden):
        """hidden [B,S,D] -> [B]: the higher, the better the pair matches. Only differences between candidates count."""
        return self.rank_head(self.pooled(hidden))[:, 0]

    @torch.no_grad()
    def start_rank_head(self):
        """Retrieval starts from pretraining: the weights of the matching head for "these match" (paper 4.4)."""
        self.rank_head.weight.copy_(self.itm_head.weight[1:])
        self.rank_head.bias.copy_(self.itm_head.bias[1:])

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """A published ViLT: a folder in the Hugging Face layout or of train_tiny.py, or a hub id."""
        folder = checkpoint_folder(path)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config_from_folder(folder))
        return load_weights(model, folder, dtype, device).eval()


@torch.no_grad()
def fill_masks(model, pixels, ids, pixel_mask=None):
    """Replace each [MASK] in ids [B,T] by the most likely token -> (ids [B,T], probability of each such token)."""
    hole = ids == model.config.mask_token_id  # [B,T]
    words = model(pixels, ids, None, pixel_mask)[:, : ids.shape[1]]  # [B,T,D]
    best = model.mlm_logits(words[hole]).float().softmax(-1).max(-1)  # values and indices, [number of masks]
    filled = ids.clone()
    filled[hole] = best.indices
    return filled, best.values


# ----------------------------------------------------------------------------------------------------------------------
# What is hidden in training: words for MLM, the right image for ITM


def mask_whole_words(ids, word_numbers, config, rng, probability=0.15):
    """Hide whole words (paper 3.3): of "gir ##af ##fe" the last piece alone could be guessed from the first two,
    without the image. -> (ids with masked words, labels), two lists as long as ids.

    ids: one text. word_numbers: for each token the number of its word, None for special tokens, which are never hidden.
    rng: a random.Random. At least one word is hidden, so that a batch of one also has something to learn from. A hidden
    token becomes [MASK] (0.8), a random token (0.1) or stays (0.1), so that no word can be trusted blindly.
    """
    words = sorted({number for number in word_numbers if number is not None})
    if not words:
        raise ValueError("the text has no word that could be masked")
    hidden = {number for number in words if rng.random() < probability}
    if not hidden:
        hidden = {rng.choice(words)}
    masked, labels = list(ids), [IGNORE_INDEX] * len(ids)
    for i, number in enumerate(word_numbers):
        if number in hidden:
            labels[i] = ids[i]
            dice = rng.random()
            if dice < 0.8:
                masked[i] = config.mask_token_id
            elif dice < 0.9:
                masked[i] = rng.randrange(config.vocab_size)
            else:
                masked[i] = ids[i]
    return masked, labels


def swap_images(captions, rng, probability=0.5):
    """Draw pairs for matching -> (index, labels), two lists of length B: which image each text gets, and whether it is
    the right one.

    With `probability` a text gets another image of the batch, label 0. An image with the same caption would not be
    wrong, so it is never taken. A text for which the batch has no wrong image keeps its own, label 1.
    """
    index, labels = list(range(len(captions))), [1] * len(captions)
    for i, caption in enumerate(captions):
        wrong = [j for j, other in enumerate(captions) if other != caption]
        if wrong and rng.random() < probability:
            index[i] = rng.choice(wrong)
            labels[i] = 0
    return index, labels


def text_words(ids, config):
    """Which tokens are words, [B,T]: neither [CLS] nor [SEP] nor padding. These take part in the transport."""
    special = torch.tensor([config.pad_token_id, config.cls_token_id, config.sep_token_id], device=ids.device)
    return ~torch.isin(ids, special)


# ----------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of tensors -> loss, metrics


def mlm_loss(logits, labels):
    """Cross-entropy of the hidden tokens: logits [B,T,V], labels [B,T], IGNORE_INDEX where nothing was hidden. Before
    training about ln V. Raises ValueError when nothing was hidden."""
    counted = labels != IGNORE_INDEX
    if not counted.any():
        raise ValueError("no label to learn from: nothing was masked")
    logits, labels = logits[counted].float(), labels[counted]  # [counted,V]
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"mlm accuracy": accuracy}


def itm_loss(logits, labels):
    """Image-text matching: logits [B,2], labels [B] (1: the pair matches). Before training about ln 2."""
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits.float(), labels), {"itm accuracy": accuracy}


def vqa_loss(logits, targets):
    """Binary cross-entropy of each answer: logits and targets [B,A]. A target between 0 and 1 grows with the number of
    people who gave this answer. Summed over answers and averaged over questions."""
    score = targets.gather(1, logits.argmax(1, keepdim=True)).mean()
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum") / len(logits)
    return loss, {"vqa score": score}


def rank_loss(scores):
    """Retrieval (paper 4.4): scores [B,C] of C candidate texts for each image, the right one first, the others drawn at
    random (15 in the paper). Before training about ln C."""
    right = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    accuracy = (scores.argmax(1) == right).float().mean()
    return F.cross_entropy(scores.float(), right), {"rank accuracy": accuracy}


@torch.no_grad()
def ipot(cost, words, patches, beta=0.5, iterations=50):
    """The cheapest way to move words onto patches: cost [B,T,N], words [B,T] and patches [B,N] (True = takes part)
    -> plan [B,T,N], the mass that goes from each word to each patch.

    Every word sends the same mass and every patch receives the same mass: the rows of a plan add up to 1/T and its
    columns to 1/N, counting what takes part. Among all such plans we want the one with the least sum(plan * cost); this
    sum is the Wasserstein or earth mover's distance. Solving it as a linear programme is slow. IPOT (Xie et al. 2018,
    arXiv 1802.04307) approaches it in equal, simple steps, each of which stays near the last plan ("proximal"):

        next plan = argmin  sum(plan * cost) + beta * KL(plan || last plan)

    The solution has the form a[:,None] * (exp(-cost / beta) * last plan) * b[None,:], where the factors a and b make
    rows and columns add up. One Sinkhorn update of each is enough, as the next step corrects the rest ("inexact").
    After n steps the cost has been counted n times, so the plan gets sharper and sharper. Plain Sinkhorn would need
    exp(-n cost / beta) itself, in which whole rows can underflow. Here it is never formed: only entries that the best
    plan does not use fade to zero, and rows and columns are corrected at every step.

    Why no gradient flows: at the best plan the distance has a minimum with respect to the plan (envelope theorem), so
    the gradient of the loss flows through the cost only, and fifty iterations need not be stored. Computed in float32,
    because products of small factors need its range.
    """
    words, patches = words.float(), patches.float()
    supply = words / words.sum(1, keepdim=True).clamp(min=1)  # [B,T] 1/T for a word, 0 for padding
    demand = patches / patches.sum(1, keepdim=True).clamp(min=1)  # [B,N]
    plan = words[:, :, None] * patches[:, None, :]  # [B,T,N]
    kernel = torch.exp(-cost.float() / beta) * plan  # zero for padding, so that nothing is ever moved there
    a = supply
    for _ in range(iterations):
        step = kernel * plan
        b = demand / torch.einsum("btn,bt->bn", step, a).clamp(min=1e-30)
        a = supply / torch.einsum("btn,bn->bt", step, b).clamp(min=1e-30)
        plan = a[:, :, None] * step * b[:, None, :]
    return plan


def transport(text, image, words, patches):
    """Hidden states text [B,T,D] and image [B,N,D]; words [B,T] and patches [B,N] are True for those that take part
    -> (distance [B], plan [B,T,N]). Moving a word onto a patch costs one minus the cosine of their hidden states."""
    cost = 1 - F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).transpose(1, 2)  # [B,T,N], 0 to 2
    plan = ipot(cost.detach(), words, patches)
    return (plan * cost).sum((1, 2)), plan


def wpa_loss(text, image, words, patches, labels, near=0.0, far=2.0):
    """Word-patch alignment (paper 3.2): the distance of matching pairs (labels 1) has to fall, that of the others
    (labels 0) to grow. Shapes as in transport, labels [B]. -> loss, metrics. The paper weighs this loss with 0.1.

    A distance is between 0 and 2. With near 0 and far 2 this is the published loss up to a constant, with the same
    gradient. It never vanishes: a model that can tell matches from mismatches can bring all words near all patches of
    a match, and then the plan has no meaning. Matches nearer than `near`, mismatches further than `far` add no loss.
    """
    distance, _ = transport(text, image, words, patches)
    matched = labels.bool()
    loss = torch.where(matched, F.relu(distance - near), F.relu(far - distance)).mean()
    return loss, {"transport distance": ((distance * matched).sum() / matched.sum().clamp(min=1)).detach()}


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to pixels, exactly as the published processor does


def target_size(width, height, config):
    """(width, height) an image is resized to: shorter side image_size, longer side at most 1333/800 of that (a limit
    inherited from detectors), then both rounded down to whole patches. The aspect ratio is kept up to this rounding."""
    P, short, longest = config.patch_size, config.image_size, int(1333 / 800 * config.image_size)
    scale = short / min(width, height)
    if height < width:
        width, height = scale * width, short
    else:
        width, height = short, scale * height
    if max(width, height) > longest:
        scale = longest / max(width, height)
        width, height = scale * width, scale * height
    # at least one patch: the published code fails for an image so thin that its short side rounds down to 0
    return max(P, int(width + 0.5) // P * P), max(P, int(height + 0.5) // P * P)


def preprocess(images, config):
    """PIL images of any size -> (pixels [B,3,H,W] float32, pixel_mask [B,H,W] bool), equal to those of transformers'
    ViltImageProcessor.

    Each image is resized as target_size says and lies in the top left corner. The rest is padding, zero in pixels and
    False in pixel_mask.
    """
    arrays = []
    for image in images:
        image = image.convert("RGB")
        image = image.resize(target_size(*image.size, config), Image.Resampling.BICUBIC)
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.asarray(image, dtype=np.float64) * (1 / 255)).astype(np.float32)
        arrays.append((pixels - np.float32(config.mean)) / np.float32(config.std))  # [height,width,3]
    height, width = max(len(array) for array in arrays), max(array.shape[1] for array in arrays)
    batch = np.zeros((len(arrays), height, width, 3), dtype=np.float32)
    mask = np.zeros((len(arrays), height, width), dtype=bool)
    for i, array in enumerate(arrays):
        batch[i, : array.shape[0], : array.shape[1]] = array
        mask[i, : array.shape[0], : array.shape[1]] = True
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(mask)


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

RENAMED = (  # published names to ours, as regular expressions, all applied in this order
    (r"^vilt\.embeddings\.text_embeddings\.", "text."),
    (r"^text\.(word|position)_embeddings\.", r"text.\1_embedding."),
    (r"^text\.token_type_embeddings\.", "text.segment_embedding."),
    (r"^text\.LayerNorm\.", "text.ln."),
    (r"^vilt\.embeddings\.patch_embeddings\.projection\.", "image.patch_embedding."),
    (r"^vilt\.embeddings\.position_embeddings$", "image.position_embedding.weight"),
    (r"^vilt\.embeddings\.cls_token$", "image.class_embedding"),
    (r"^vilt\.embeddings\.token_type_embeddings\.", "modality_embedding."),
    (r"^vilt\.encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".ln_1."),
    (r"\.attention\.attention\.query\.", ".attn.q_proj."),
    (r"\.attention\.attention\.key\.", ".attn.k_proj."),
    (r"\.attention\.attention\.value\.", ".attn.v_proj."),
    (r"\.attention\.output\.dense\.", ".attn.out_proj."),
    (r"\.layernorm_after\.", ".ln_2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^vilt\.layernorm\.", "ln_post."),
    (r"^vilt\.pooler\.dense\.", "pooler."),
    (r"^mlm_score\.decoder\.weight$", "text.word_embedding.weight"),  # tied: files may hold it under both names
    (r"^mlm_score\.(decoder\.)?bias$", "mlm_head.bias"),  # older files call it so, or hold it under both names
    (r"^mlm_score\.transform\.dense\.", "mlm_head.dense."),
    (r"^mlm_score\.transform\.LayerNorm\.", "mlm_head.ln."),
    (r"^classifier\.", "vqa_head."),
    (r"^rank_output\.", "rank_head."),
)


def our_tensors(name, tensor):
    """A published tensor -> the pairs (our name, tensor) that it becomes."""
    if name.endswith((".position_ids", ".text_embeddings.token_type_ids")):
        return []  # buffers of older files; both are computed here
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    if name in ("image.position_embedding.weight", "image.class_embedding"):
        tensor = tensor.squeeze()  # published with axes of length one, [1,1+N,D] and [1,1,D]
    return [(name, tensor)]


def checkpoint_folder(path):
    """A local folder as it is. A hub id such as "dandelin/vilt-b32-mlm" is downloaded first."""
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


HEADS = {  # the published class -> the heads it has
    "ViltForMaskedLM": ("mlm",),
    "ViltForQuestionAnswering": ("vqa",),
    "ViltForImageAndTextRetrieval": ("rank",),
}

FIELDS = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads")
FIELDS |= dict(mlp_width="intermediate_size", norm_eps="layer_norm_eps", vocab_size="vocab_size")
FIELDS |= dict(context="max_position_embeddings", image_size="image_size", patch_size="patch_size")
FIELDS |= dict(max_patches="max_image_length")


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
    """config.json and preprocessor_config.json -> ViLTConfig. What they leave out has the published class's defaults,
    which are those of the dataclass. The heads follow from "architectures", since the layout is otherwise the same."""
    raw = json.loads((folder / "config.json").read_text())
    require(folder, raw, model_type="vilt", hidden_act="gelu", qkv_bias=True)
    require(folder, raw, type_vocab_size=2, modality_type_vocab_size=2)
    kind = (found(raw, dict(tasks="architectures"), ViLTConfig).get("tasks") or ["none"])[0]
    if kind not in HEADS:
        raise ValueError(f"{folder} has architectures = [{kind!r}]; vilt.py reads {', '.join(HEADS)}")
    config = ViLTConfig(**found(raw, FIELDS, ViLTConfig), tasks=HEADS[kind])
    if config.max_patches == 0 or config.max_patches < -1:
        raise ValueError(f"{folder} has max_image_length = {config.max_patches}: it must be positive, or -1 for all")
    if "vqa" in config.tasks:
        config = replace(config, answers=len(part(raw, "id2label")) or raw.get("num_labels", 2))
    return replace(config, **pixels_from_published(folder, config))


def pixels_from_published(folder, config):
    """The statistics in the processor's file, as fields of ViLTConfig. Its size must be that of the model."""
    processor = processor_of(folder)
    require(folder, processor, size_divisor=config.patch_size, resample=3, do_resize=True, do_normalize=True)
    require(folder, processor, do_rescale=True, rescale_factor=1 / 255)
    require(folder, processor, size=(config.image_size, {"shortest_edge": config.image_size}))
    return found(processor, dict(mean="image_mean", std="image_std"), config)


if __name__ == "__main__":
    from train_tiny import workbench

    workbench("vilt")  # --demo, --image, --prompt, --weights, --anatomy, --trace, --show-mask: see --help
