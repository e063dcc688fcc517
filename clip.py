"""
CLIP and SigLIP: an image encoder and a text encoder that map into one space, and a loss over all pairs of a batch.

    CLIP    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020
    SigLIP  Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343

The idea. The web already pairs images with text, so nobody has to label them. Encode a batch of B images and their B
texts into one space, and train the encoders (here called towers) to find the right text for each image among all B, and
the right image for each text. The towers learn whatever helps to tell the pairs apart: colours, objects, style,
writing. Afterwards a class can be named in words ("a photo of a dog") and recognised without one labelled example.
Image and text meet only in the last dot product (late fusion), so that each can be encoded once, stored and searched.

    image [B,3,H,W]                                    ids [B,T]
      | patches of PxP pixels, one linear map            | token embedding + position
    [B,N,D]                                            [B,T,D]
      | class token in front, + position, LayerNorm      |
    [B,1+N,D]                                            |
      | blocks: every patch attends to every patch       | blocks: causal, a token attends to those before it
      | the class token, LayerNorm                       | LayerNorm, the end-of-text token: it has attended to all
    [B,D] -- linear, unit length --> [B,E]    [B,E] <-- linear, unit length -- [B,D]
                                        \\      /
                       logits [B,B] = scale * image @ text.T         row i: which text belongs to image i?

    CLIP    softmax over each row and each column: a pair is judged against the whole batch.
    SigLIP  sigmoid of each entry: B*B independent yes/no questions, with a bias, because almost every answer is "no".
            No class token: a learned probe attends to the patches. The text tower is bidirectional.

Letters. B batch, T text length, N patches, P patch size, D width of a tower, E width of the shared space, H heads, Dh
head width. In [B,3,H,W], which is always pixels, H and W are the height and width of the image.

Conventions
    masks     True means "real token". Texts are padded on the right.
    features  have length one, so that a dot product is the cosine of the angle between an image and a text.

Paper / published code / this file
    - Padding. CLIP pads after the end-of-text token, where the causal mask hides it. SigLIP was trained on texts padded
      to 64 tokens and attends to the padding: to reproduce it, pass 64 ids and no mask (see pad_texts). SigLIP 2 (of a
      fixed resolution) is the same model; its tokenizer pads with another token and resizing is bilinear.
    - End of text. The first published configs have eos_token_id 2 by mistake and mean the highest id of the text.
    - Left out: dropout and gradient checkpointing.

What to try: --demo, then --show-mask; python train_tiny.py clip --loss sigmoid; set logit_scale to 0 and explain the
first loss; make the text tower bidirectional and see what changes; --anatomy siglip-so400m-patch14-384.
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
from torch import nn

from kernels import Rule, attention

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class VisionConfig:  # CLIP's ViT-B/32
    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"  # one of ACTIVATIONS
    norm_eps: float = 1e-5
    class_token: bool = True  # one more token, which gathers the image; SigLIP has none
    ln_pre: bool = True  # a LayerNorm before the blocks and patches without a bias; SigLIP: no LayerNorm and a bias
    resize: str = "crop"  # how an image becomes a square: the centre is cut out; or "squash" (SigLIP), see preprocess
    resample: int = 3  # Pillow's number of a filter: 3 is bicubic, 2 bilinear (SigLIP 2)
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the pixels CLIP was trained on
    std: tuple = (0.26862954, 0.26130258, 0.27577711)


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
    causal: bool = True  # as in a language model, which the tower could also be trained as; SigLIP: False
    eos_token_id: int = 49407  # the token whose hidden state represents the text; 2: the highest id, see above


@dataclass(frozen=True)
class CLIPConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 512
    loss: str = "softmax"  # CLIP; "sigmoid" is SigLIP: a bias, a probe that pools the patches, no projections


LARGE_VISION = VisionConfig(patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)
LARGE_TEXT = TextConfig(width=768, heads=12, mlp_width=3072)

SIGLIP_VISION = VisionConfig(
    patch_size=16,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    class_token=False,
    ln_pre=False,
    resize="squash",
    mean=(0.5, 0.5, 0.5),  # pixels between -1 and 1
    std=(0.5, 0.5, 0.5),
)
SIGLIP_TEXT = TextConfig(
    vocab_size=32000,
    context=64,
    width=768,
    heads=12,
    mlp_width=3072,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    causal=False,
    eos_token_id=1,
)
SO400M = dict(width=1152, layers=27, heads=16, mlp_width=4304)  # both towers, about 400 million parameters each

PRESETS = {
    # what train_tiny.py trains in front of you: 16 patches, 32 tokens of text, ids from its 512-token vocabulary
    "tiny": CLIPConfig(
        VisionConfig(32, 8, width=96, layers=4, heads=4, mlp_width=384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        TextConfig(512, 32, width=96, layers=2, heads=4, mlp_width=384, eos_token_id=498),
        embed_dim=96,
    ),
    # CLIP paper, Table 20
    "clip-vit-base-patch32": CLIPConfig(),
    "clip-vit-base-patch16": CLIPConfig(VisionConfig(patch_size=16)),
    "clip-vit-large-patch14": CLIPConfig(LARGE_VISION, LARGE_TEXT, embed_dim=768),
    "clip-vit-large-patch14-336": CLIPConfig(replace(LARGE_VISION, image_size=336), LARGE_TEXT, embed_dim=768),
    "siglip-base-patch16-224": CLIPConfig(SIGLIP_VISION, SIGLIP_TEXT, embed_dim=768, loss="sigmoid"),
    "siglip-so400m-patch14-384": CLIPConfig(
        replace(SIGLIP_VISION, image_size=384, patch_size=14, **SO400M),
        replace(SIGLIP_TEXT, **SO400M),
        embed_dim=1152,
        loss="sigmoid",
    ),
    "siglip2-giant-opt-patch16-384": CLIPConfig(
        replace(SIGLIP_VISION, image_size=384, width=1536, layers=40, heads=16, mlp_width=6144, resample=2),
        replace(SIGLIP_TEXT, vocab_size=256000, **SO400M),
        embed_dim=1536,
        loss="sigmoid",
    ),
}


def num_image_tokens(height, width, config):
    """Tokens in the vision tower for one image: one per patch, and the class token. 224 / 32 = 7, 7 * 7 + 1 = 50."""
    P = config.vision.patch_size
    return (height // P) * (width // P) + int(config.vision.class_token)


# ----------------------------------------------------------------------------------------------------------------------
# The transformer block of both towers


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)  # Hendrycks & Gimpel 2016, the sigmoid approximation of GELU


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_pytorch_tanh": gelu_tanh, "gelu": F.gelu}  # under their published names


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention. rule: which token attends to which, see kernels.attention; without one, all to all."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x, rule=None):
        B, T, D = x.shape
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,T,Dh]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        o = attention(q, k, v, rule)  # [B,H,T,Dh]
        return self.out_proj(o.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm transformer block: the residual stream x is only ever added to. Published: CLIPEncoderLayer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rule=None):
        x = x + self.attn(self.ln_1(x), rule)
        return x + self.mlp(self.ln_2(x))


def init_blocks(blocks, width):
    """Initial weights of a stack of blocks, as in CLIP's own code. The two matrices whose outputs are added to the
    residual stream start smaller by 1/sqrt(2 * layers), because the stream is a sum of that many terms."""
    residual_std = width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in blocks:
        nn.init.normal_(block.attn.q_proj.weight, std=width**-0.5)
        nn.init.normal_(block.attn.k_proj.weight, std=width**-0.5)
        nn.init.normal_(block.attn.v_proj.weight, std=width**-0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
        nn.init.normal_(block.mlp.fc2.weight, std=residual_std)
        for name, parameter in block.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)


# ----------------------------------------------------------------------------------------------------------------------
# Vision tower


class VisionTower(nn.Module):
    """ViT (Dosovitskiy et al. 2021, arXiv 2010.11929): an image is a sentence of patches.

    forward(pixels [B,3,H,W]) -> [B,1+N,D], the class token first (SigLIP: [B,N,D]). H and W may differ from image_size:
    the learned positions are interpolated. Published: transformers, CLIPVisionModel and SiglipVisionModel.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P, grid = config.width, config.patch_size, config.image_size // config.patch_size
        # a convolution whose stride is its kernel size is one linear map, applied to every patch
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=P, stride=P, bias=not config.ln_pre)
        self.position_embedding = nn.Embedding(int(config.class_token) + grid * grid, D)
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        self.ln_pre = nn.LayerNorm(D, eps=config.norm_eps) if config.ln_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(D, eps=config.norm_eps)  # applied by CLIP.encode_image
        nn.init.normal_(self.position_embedding.weight, std=D**-0.5)
        init_blocks(self.blocks, D)

    def positions(self, rows, columns):
        """Position embeddings [1+N,D] for a grid of rows x columns patches. A grid other than the trained one gets them
        by bicubic interpolation, as CLIP did to go from 224 to 336 pixels."""
        table = self.position_embedding.weight
        grid = self.config.image_size // self.config.patch_size
        if (rows, columns) == (grid, grid):
            return table
        first = int(self.config.class_token)  # the class token has no place in the grid
        square = table[first:].T.reshape(1, -1, grid, grid)  # [1,D,grid,grid], as if it were an image of D channels
        resized = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([table[:first], resized.flatten(2)[0].T])

    def embed(self, pixels):
        """pixels [B,3,H,W] -> what the first block gets, [B,1+N,D]."""
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # [B,D,rows,columns]
        positions = self.positions(*x.shape[2:])
        x = x.flatten(2).transpose(1, 2)  # [B,N,D], patches in reading order
        if self.config.class_token:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [B,1+N,D]
        return self.ln_pre(x + positions)

    def forward(self, pixels):
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return x


class AttentionPool(nn.Module):
    """SigLIP's image feature: attention with one learned query, the probe (Set Transformer, arXiv 1810.00825, 3.2).

    forward(x [B,N,D]) -> [B,D]. Published: SiglipMultiheadAttentionPoolingHead.
    """

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.probe = nn.Parameter(torch.randn(1, 1, D) * D**-0.5)
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)
        self.ln = nn.LayerNorm(D, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        B, N, D = x.shape
        q = self.q_proj(self.probe).expand(B, 1, D).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,1,Dh]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,N,Dh]
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        o = attention(q, k, v)  # [B,H,1,Dh]
        x = self.out_proj(o.transpose(1, 2).reshape(B, D))
        return x + self.mlp(self.ln(x))


# ----------------------------------------------------------------------------------------------------------------------
# Text tower


class TextTower(nn.Module):
    """forward(ids [B,T], mask [B,T] or None; True = real token) -> hidden states [B,T,D] after the last LayerNorm.

    Raises ValueError if the text is longer than the context or padded on the left. Published: CLIPTextModel and
    SiglipTextModel.
    """

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
        T = ids.shape[1]
        if T > self.config.context:
            raise ValueError(f"the text has {T} tokens, the context holds {self.config.context}: shorten the text")
        rule = Rule(causal=self.config.causal)
        if mask is not None:
            if not torch.compiler.is_compiling() and not mask[:, 0].all():  # a value that torch.compile does not know
                raise ValueError("texts are padded on the right: the first column of the mask must be True")
            segments = mask.int() - 1  # 0 for a real token, -1 for padding, to which nothing attends
            rule = Rule(causal=self.config.causal, q_segments=segments, k_segments=segments)
        x = self.token_embedding(ids) + self.position_embedding.weight[:T]  # [B,T,D]
        for block in self.blocks:
            x = block(x, rule)
        return self.ln_final(x)

    def feature_index(self, ids, mask=None):
        """The position whose hidden state represents the whole text, [B]: CLIP's end-of-text token, which is the first
        that has attended to all of the text, or SigLIP's last token. Raises ValueError if CLIP's is missing."""
        B, T = ids.shape
        if not self.config.causal:
            return torch.full((B,), T - 1, device=ids.device) if mask is None else mask.sum(1) - 1
        if self.config.eos_token_id == 2:  # the first published configs; the end-of-text token has the highest id
            return ids.argmax(1)
        is_end = ids == self.config.eos_token_id
        missing = ~is_end.any(1)  # [B]
        if not torch.compiler.is_compiling() and missing.any():
            text, end = int(missing.int().argmax()), self.config.eos_token_id
            raise ValueError(f"text {text} has no end-of-text token (id {end}): was it cut off?")
        return is_end.int().argmax(1)  # the first one, since CLIP pads with the same id


# ----------------------------------------------------------------------------------------------------------------------
# The model


class CLIP(nn.Module):
    """Two towers into one space. config.loss chooses CLIP ("softmax") or SigLIP ("sigmoid"). Published: CLIPModel and
    SiglipModel."""

    def __init__(self, config):
        super().__init__()
        assert config.loss in ("softmax", "sigmoid"), config.loss
        self.config = config
        self.vision = VisionTower(config.vision)
        self.text = TextTower(config.text)
        E, Dv, Dt = config.embed_dim, config.vision.width, config.text.width
        if config.loss == "softmax":
            self.visual_projection = nn.Linear(Dv, E, bias=False)
            self.text_projection = nn.Linear(Dt, E, bias=False)
            nn.init.normal_(self.visual_projection.weight, std=Dv**-0.5)
            nn.init.normal_(self.text_projection.weight, std=Dt**-0.5)
            # CLIP 2.5: a temperature of 0.07 at first; learned as a log, so that the scale stays positive
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        else:
            self.vision_head = AttentionPool(config.vision)
            self.text_head = nn.Linear(Dt, E)  # the pooled patches have the width E already
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # SigLIP 3.2: with these two nearly all pairs
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # are judged "no" before training, which is right

    def encode_image(self, pixels):
        """pixels [B,3,H,W] (see preprocess) -> features [B,E] of length one."""
        x = self.vision(pixels)  # [B,1+N,D]
        if self.config.loss == "softmax":
            x = self.visual_projection(self.vision.ln_post(x[:, 0]))  # the class token has attended to all patches
        else:
            x = self.vision_head(self.vision.ln_post(x))
        return F.normalize(x, dim=-1)

    def encode_text(self, ids, mask=None):
        """ids [B,T], mask [B,T] or None (True = real token) -> features [B,E] of length one.

        Raises ValueError when a text is longer than the context, padded on the left or (CLIP) lacks its end-of-text
        token.
        """
        x = self.text(ids, mask)  # [B,T,D]
        x = x[torch.arange(len(x), device=x.device), self.text.feature_index(ids, mask)]  # [B,D]
        if self.config.loss == "softmax":
            x = self.text_projection(x)
        else:
            x = self.text_head(x)
        return F.normalize(x, dim=-1)

    def logits(self, image, text):
        """Features image [Bi,E] and text [Bt,E] -> logits_per_image [Bi,Bt]."""
        logits = self.logit_scale.exp() * image @ text.T
        if self.config.loss == "sigmoid":
            logits = logits + self.logit_bias
        return logits

    def forward(self, pixels, ids, mask=None):
        """pixels [Bi,3,H,W], ids [Bt,T], mask [Bt,T] or None -> logits_per_image [Bi,Bt]; its transpose is
        logits_per_text."""
        return self.logits(self.encode_image(pixels), self.encode_text(ids, mask))

    def loss(self, image, text, names=None):
        """The loss this model is trained with, of the features [B,E] of B pairs. -> loss, metrics. names: see below."""
        scale = self.logit_scale.exp()
        if self.config.loss == "softmax":
            return contrastive_loss(image, text, scale, names)
        return sigmoid_loss(image, text, scale, self.logit_bias, names)

    @torch.no_grad()
    def clip_logit_scale(self):
        """Call after each optimizer step. CLIP 2.5: no logit is scaled by more than 100, for stability."""
        if self.config.loss == "softmax":
            self.logit_scale.clamp_(max=math.log(100.0))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """A published CLIP or SigLIP: a folder in the Hugging Face layout or of train_tiny.py, or a hub id."""
        folder = checkpoint_folder(path)
        with torch.device("meta"):  # shapes only; memory comes with the weights
            model = cls(config_from_folder(folder))
        return load_weights(model, folder, dtype, device).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Training: everything trains, in one stage. The losses are functions of the features [B,E] of B pairs (image i belongs
# to text i); logit_scale is the factor itself, not its log. Each pair is compared with all others of the batch, so with
# several processes train_tiny.py first gathers the features of all of them. names [B] has a number for each text: where
# two are equal, each text belongs to both images. Without names it is wrong for the other's image, as in the papers.


def contrastive_loss(image, text, logit_scale, names=None):
    """CLIP's symmetric cross-entropy, Figure 3 of the paper. -> loss, metrics.

    Before training all texts are about equally likely and the loss is about ln B; at logit_scale 0 it is exactly that.
    With B = 1 there is nothing to tell apart and the loss is 0, whatever the features are.
    """
    per_image = logit_scale * image @ text.T  # [B,B], row i: which text belongs to image i?
    per_text = logit_scale * text @ image.T  # [B,B], row i: which image belongs to text i?
    target = torch.arange(len(image), device=image.device)
    if names is not None:  # equal texts have equal features, so to be drawn to one is to be drawn to all: none competes
        others = (names[:, None] == names) & (target[:, None] != target)
        per_image, per_text = per_image.masked_fill(others, -math.inf), per_text.masked_fill(others, -math.inf)
    loss = (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2
    return loss, {"accuracy": (per_image.argmax(1) == target).float().mean()}


def sigmoid_loss(image, text, logit_scale, logit_bias, names=None):
    """SigLIP's loss, Algorithm 1 of the paper: each of the B*B pairs is a yes/no question of its own. -> loss, metrics.

    No sum over the batch stands inside a logarithm, so that many devices can compute the matrix block by block (3.3).
    """
    logits = logit_scale * image @ text.T + logit_bias  # [B,B]
    belongs = torch.eye(len(image), device=image.device) if names is None else (names[:, None] == names).float()
    sign = 2 * belongs - 1  # +1 for "belongs together", -1 for "does not"
    loss = -F.logsigmoid(sign * logits).sum() / len(image)
    return loss, {"accuracy": belongs.gather(1, logits.argmax(1, keepdim=True)).mean()}


# ----------------------------------------------------------------------------------------------------------------------
# Prompts: classes and descriptions that are given in words only


def pad_texts(rows, config, pad_id=None):
    """Lists of ids, each with its end-of-text token -> ids [B,T], padded as in training. config: TextConfig.

    CLIP's padding is hidden by the causal mask, so the longest text decides T. SigLIP attends to its padding, so T is
    always the context, and pad_id matters. None: the end-of-text token, as in CLIP and SigLIP; SigLIP 2 has its own.
    """
    length = max(map(len, rows)) if config.causal else config.context
    return torch.tensor([row + [row[-1] if pad_id is None else pad_id] * (length - len(row)) for row in rows])


def encode_prompts(model, prompts, tokenize):
    """Strings -> text features [B,E]. tokenize: list of strings -> (ids [B,T], mask [B,T] or None)."""
    ids, mask = tokenize(prompts)
    device = model.logit_scale.device
    return model.encode_text(ids.to(device), None if mask is None else mask.to(device))


@torch.no_grad()
def zero_shot_classifier(model, class_names, templates, tokenize):
    """CLIP 3.1.4: a class is the mean direction of its prompts. -> [number of classes, E], rows of length one.

    templates: strings with one {} for the name. tokenize: see encode_prompts.
    """
    rows = []
    for name in class_names:
        features = encode_prompts(model, [template.format(name) for template in templates], tokenize)  # [templates,E]
        rows.append(F.normalize(features.mean(0), dim=-1))
    return torch.stack(rows)


@torch.no_grad()
def zero_shot(model, pixels, class_names, templates, tokenize):
    """Logits [B, number of classes] of pixels [B,3,H,W] for classes that are given by name only."""
    return model.logits(model.encode_image(pixels), zero_shot_classifier(model, class_names, templates, tokenize))


@torch.no_grad()
def rank_prompts(model, images, prompts, tokenize):
    """PIL images and strings -> the probability that each prompt fits each image, [images, prompts]. With CLIP they sum
    to 1 over the prompts; SigLIP judges each prompt on its own. tokenize: see encode_prompts."""
    pixels = preprocess(images, model.config.vision).to(model.logit_scale.device)
    logits = model.logits(model.encode_image(pixels), encode_prompts(model, prompts, tokenize))
    if model.config.loss == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid()


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing: images to pixels, exactly as the published processors do


def resize_and_crop(image, size, resample):
    """The shorter side is resized to `size`, then the central square is cut out."""
    short = min(image.size)
    # what lies beyond 16:1 would be cut off anyway, and an image of 1 x 5000 pixels would need gigabytes in between
    x, y = max(0, image.width - 16 * short) // 2, max(0, image.height - 16 * short) // 2
    image = image.crop((x, y, image.width - x, image.height - y))
    width, height = size * image.width // short, size * image.height // short
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def preprocess(images, config):
    """PIL images -> pixels [B,3,image_size,image_size], float32, equal to those of transformers' CLIPImageProcessor and
    SiglipImageProcessor. config: VisionConfig, whose `resize` is "crop" (CLIP) or "squash" (SigLIP: both sides are
    resized to image_size)."""
    size, batch = config.image_size, []
    for image in images:
        image = image.convert("RGB")
        if config.resize == "squash":
            image = image.resize((size, size), config.resample)
        else:
            image = resize_and_crop(image, size, config.resample)
        # scaling in double, then normalising in single precision: the last bit of the published values depends on it
        pixels = (np.asarray(image, dtype=np.float64) * (1 / 255)).astype(np.float32)
        batch.append((pixels - np.float32(config.mean)) / np.float32(config.std))
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

RENAMED = (  # published names to ours, as regular expressions, all applied in this order
    (r"^(vision|text)_model\.((embeddings|encoder)\.)?", r"\1."),
    (r"\.layers\.(\d+)\.self_attn\.", r".blocks.\1.attn."),
    (r"\.layers\.(\d+)\.layer_norm(\d)\.", r".blocks.\1.ln_\2."),
    (r"\.layers\.", ".blocks."),
    (r"^vision\.pre_layrnorm\.", "vision.ln_pre."),  # the published spelling
    (r"^vision\.post_layernorm\.", "vision.ln_post."),
    (r"^text\.final_layer_norm\.", "text.ln_final."),
    (r"^(vision|text)\.head\.", r"\1_head."),
    (r"^vision_head\.attention\.", "vision_head."),
    (r"^vision_head\.layernorm\.", "vision_head.ln."),
)


def our_tensors(name, tensor):
    """A published tensor -> the pairs (our name, tensor) that it becomes."""
    if name.endswith("position_ids"):
        return []  # a buffer of older files: 0, 1, 2, ...
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    if name.startswith("vision_head.in_proj_"):  # the maps for query, key and value in one matrix
        q, k, v = tensor.chunk(3)
        kind = name.removeprefix("vision_head.in_proj_")  # "weight" or "bias"
        return [(f"vision_head.q_proj.{kind}", q), (f"vision_head.k_proj.{kind}", k), (f"vision_head.v_proj.{kind}", v)]
    if name in ("logit_scale", "logit_bias"):
        tensor = tensor.squeeze()  # SigLIP's have the shape [1]
    return [(name, tensor)]


def checkpoint_folder(path):
    """A local folder as it is. A hub id such as "openai/clip-vit-base-patch32" is downloaded first."""
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
SHAPE |= dict(mlp_width="intermediate_size", activation="hidden_act", norm_eps="layer_norm_eps")
VISION_FIELDS = SHAPE | dict(image_size="image_size", patch_size="patch_size")
TEXT_FIELDS = SHAPE | dict(vocab_size="vocab_size", context="max_position_embeddings")


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
    """config.json and preprocessor_config.json -> CLIPConfig. What they leave out has the published classes' defaults,
    which are those of the presets clip-vit-base-patch32 and siglip-base-patch16-224."""
    raw = json.loads((folder / "config.json").read_text())
    kind = raw.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ValueError(f"{folder} has model_type = {kind!r}; clip.py reads 'clip' and 'siglip'")
    config = PRESETS["clip-vit-base-patch32" if kind == "clip" else "siglip-base-patch16-224"]
    names = {name: f"{name}_dict" for name in ("vision_config", "text_config")}  # of older CLIPs: where both are given,
    parts = [part(raw, new if kind == "siglip" or raw.get(old) is None else old) for new, old in names.items()]
    vision_published, text_published = parts  # transformers takes the older one as a whole
    require(folder, vision_published, hidden_act=tuple(ACTIVATIONS))
    require(folder, text_published, hidden_act=tuple(ACTIVATIONS))
    vision = replace(config.vision, **found(vision_published, VISION_FIELDS, config.vision))
    vision = replace(vision, **pixels_from_published(folder, vision))
    text = replace(config.text, **found(text_published, TEXT_FIELDS, config.text))
    if kind == "siglip":  # its configs contain CLIP's eos_token_id by mistake, and E is the width of an image's feature
        projection = text_published.get("projection_size") or text.width
        require(folder, vision_published, vision_use_head=True)
        require(folder, dict(projection_size=projection), projection_size=vision.width)
        return replace(config, vision=vision, text=text, embed_dim=vision.width)
    text = replace(text, **found(text_published, dict(eos_token_id="eos_token_id"), text))
    return replace(config, vision=vision, text=text, **found(raw, dict(embed_dim="projection_dim"), config))


def pixels_from_published(folder, vision):
    """What the processor's file says of squares and normalising, as fields of VisionConfig."""
    processor = processor_of(folder)
    require(folder, processor, do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255)
    require(folder, processor, resample=tuple(range(6)))  # Pillow's filters
    fields = found(processor, dict(mean="image_mean", std="image_std", resample="resample"), vision)
    S, crops = vision.image_size, processor.get("do_center_crop", vision.resize == "crop")
    square = {"height": S, "width": S}
    require(folder, processor, size=(S, {"shortest_edge": S}, square))
    if crops:
        require(folder, processor, crop_size=(S, square))
    if processor.get("size") is not None:
        fields["resize"] = "squash" if processor["size"] == square else "crop"
    if not crops and fields.get("resize") == "crop":
        raise ValueError(f"{folder} has do_center_crop = False and size = {processor['size']}: that gives no squares")
    return fields


if __name__ == "__main__":
    from train_tiny import workbench

    workbench("clip")  # --demo, --image, --prompt, --weights, --anatomy, --trace, --show-mask: see --help
