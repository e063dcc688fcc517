"""The toy world, its tokenizer, one training loop, and a recipe per family: everything the seven files are trained on;
and the workbench, the command line that the seven files share.

What. A seeded world of coloured shapes, drawn with Pillow, nothing stored: scenes, captions, questions with answers,
boxes, short videos, numbers to read. A fifth of the colour-shape pairs is never shown in training, neither drawn nor
named. A model that gets those right has learned to compose colour with shape. Scenes come in three splits: models are
trained on one, steps and settings are chosen on another (validation), and claims are measured on the third (test).

How.    python train_tiny.py world              a sheet of samples, to see what the models see
        python train_tiny.py clip               train, then print the paper's claims at toy scale: hold or not
        python train_tiny.py all                all seven families; tables of all results are in runs/results.md
        python train_tiny.py clip --ablations   "a beats b", three seeds, equal steps, in minutes
        python train_tiny.py clip --data DIR    your own pictures: DIR/metadata.jsonl with file_name and text
        torchrun --nproc-per-node 2 train_tiny.py clip    each process takes its share of every batch

What to try. Hide another pair (UNSEEN_PAIRS) and see whether zero-shot naming survives. Leave "something red" out of
`caption` and watch it fall. Train with batch 8: why does the contrastive loss start at ln 8? Interrupt with Ctrl-C,
start again, and compare the weights with those of a training that was not interrupted: not one bit differs. Why must
data be a function of the step for that?

Sections: the world - the tokenizer - the loop - what all recipes share - seven recipes - the workbench - command line.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: its threads spin 0.2 ms when they wait, not 10

import argparse
import ast
import contextlib
import json
import math
import platform
import random
import re
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import blip2
import clip
import cogvlm
import flamingo
import llava
import qwen2vl
import vilt
from kernels import Rule, attention_maps, draw_mask, rope_2d

# ----------------------------------------------------------------------------------------------------------------------
# The world: things on a canvas


COLOURS = {  # that show on dark backgrounds and, but for white, on light ones
    "red": (235, 45, 45),
    "green": (45, 185, 75),
    "blue": (55, 100, 245),
    "yellow": (250, 220, 40),
    "purple": (175, 70, 205),
    "white": (250, 250, 250),
}
DARK, LIGHT = range(0, 60), range(200, 256)  # grey levels of backgrounds
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 0.30, "large": 0.42}  # side, as a fraction of the canvas's shorter side; below a half
JITTER = 0.25  # 1: anywhere in its quarter of the canvas; 0: always in the middle
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
NUMBERS = ("zero", "one", "two", "three", "four")

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)  # 30
UNSEEN_PAIRS = (  # a fifth of all: each colour once, each shape at most twice
    ("red", "triangle"),
    ("green", "circle"),
    ("blue", "cross"),
    ("yellow", "ring"),
    ("purple", "square"),
    ("white", "circle"),
)
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)


@dataclass(frozen=True)
class Thing:
    """One object. x, y in [0, 1] say where its box lies between the far left (top) and the far right (bottom), so that
    the same thing fits on a canvas of any size and aspect ratio."""

    colour: str
    shape: str
    size: str
    x: float
    y: float

    @property
    def pair(self):
        return self.colour, self.shape

    @property
    def place(self):
        return ("top-" if self.y < 0.5 else "bottom-") + ("left" if self.x < 0.5 else "right")

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self):
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One to four things, each in its own quarter of the canvas, in reading order; `grey` is the background's level."""

    things: tuple
    grey: int = 20

    @property
    def split(self):
        """By what is in it. Scenes of one thing are all trained on, since they are few: 24 pairs x 2 sizes x 4
        places."""
        return split_of("; ".join(f"{t.full_name} {t.place}" for t in self.things)) if len(self.things) > 1 else "train"


def split_of(content):
    """An eighth of everything is for "test", an eighth for "validation"; neither is trained on."""
    return ("test", "validation", *["train"] * 6)[zlib.crc32(content.encode()) % 8]


def background(things, rng):
    """A grey level on which these things show: dark or, if none of them is white, light."""
    dark = rng.random() < 0.5 or any(thing.colour == "white" for thing in things)
    return rng.choice(DARK if dark else LIGHT)


def place_thing(pair, size, place, rng):
    """A thing near the middle of its quarter of the canvas, which it must not leave: x (1 - side) + side <= 1/2."""
    reach = (0.5 - SIZES[size]) / (1 - SIZES[size])
    x, y = (reach * (0.5 + JITTER * (rng.random() - 0.5)) for _ in range(2))
    return Thing(*pair, size, 1 - x if "right" in place else x, 1 - y if "bottom" in place else y)


def make_scene(rng, count=None, pairs=SEEN_PAIRS, split="train"):
    """A random scene. rng: random.Random; count: how many things (None: one to four, most often two);
    split: "train", "validation", "test" or "any". Things of one scene are different pairs."""
    if split in ("validation", "test") and count == 1:
        raise ValueError("scenes of one thing are all trained on; others have two to four")
    counts = (count,) if count else (1, 1, 2, 2, 2, 3, 3, 4) if split in ("train", "any") else (2, 2, 2, 3, 3, 4)
    while True:
        number = rng.choice(counts)
        places = sorted(rng.sample(PLACES, number), key=PLACES.index)
        chosen = rng.sample(pairs, number)
        things = tuple(
            place_thing(pair, rng.choice(("small", "large")), place, rng) for pair, place in zip(chosen, places)
        )
        scene = Scene(things, background(things, rng))
        if split in (scene.split, "any"):
            return scene


def change_one(scene, rng, split="train"):
    """The same scene but for one property of one thing (shape, colour or size): a hard negative for whoever must tell
    the two captions apart."""
    while True:
        which = rng.randrange(len(scene.things))
        old = scene.things[which]
        key, values = rng.choice((("shape", SHAPES), ("colour", tuple(COLOURS)), ("size", tuple(SIZES))))
        new = replace(old, **{key: rng.choice(values)})
        things = scene.things[:which] + (new,) + scene.things[which + 1 :]
        other = replace(scene, things=things)
        shows = new.colour != "white" or scene.grey in DARK
        other_pairs = {t.pair for t in things if t is not new}
        if new != old and shows and new.pair in SEEN_PAIRS and new.pair not in other_pairs:
            if split in (other.split, "any"):
                return other


def unseen_pair_scene(rng, count=None):
    """A scene with one thing of a pair never seen in training, and seen ones around it."""
    scene = make_scene(rng, count, split="any")
    which = rng.randrange(len(scene.things))
    colour, shape = rng.choice(UNSEEN_PAIRS)
    things = list(scene.things)
    things[which] = replace(things[which], colour=colour, shape=shape)
    return Scene(tuple(things), background(things, rng))


def rng_for(*key):
    """A random.Random that depends on the key alone: data is a function of (seed, step), never of history."""
    return random.Random(repr(key))


# ----------------------------------------------------------------------------------------------------------------------
# The world: drawing


def pixel_box(thing, width, height):
    """(x0, y0, x1, y1) in pixels, x1 and y1 exclusive: exactly the pixels the thing touches."""
    side = max(5, round(SIZES[thing.size] * min(width, height)))
    x0, y0 = round(thing.x * (width - side)), round(thing.y * (height - side))
    return x0, y0, x0 + side, y0 + side


def normalised_box(thing, width, height):
    """The box as fractions of the canvas, as detectors and `[[x0,y0,x1,y1]]` prompts want it."""
    x0, y0, x1, y1 = pixel_box(thing, width, height)
    return x0 / width, y0 / height, x1 / width, y1 / height


def box_text(thing, width, height):
    """CogVLM's way of writing a box: `[[x0,y0,x1,y1]]`, thousandths of the canvas in three digits."""
    return "[[" + ",".join(f"{min(999, round(1000 * v)):03d}" for v in normalised_box(thing, width, height)) + "]]"


def draw_thing(pen, thing, box):
    x0, y0, x1, y1 = box[0], box[1], box[2] - 1, box[3] - 1  # Pillow's corners are inclusive
    fill, third = COLOURS[thing.colour], (x1 - x0 + 1) // 3
    if thing.shape == "circle":
        pen.ellipse((x0, y0, x1, y1), fill=fill)
    elif thing.shape == "square":
        pen.rectangle((x0, y0, x1, y1), fill=fill)
    elif thing.shape == "triangle":
        pen.polygon(((x0, y1), ((x0 + x1) // 2, y0), (x1, y1)), fill=fill)
    elif thing.shape == "cross":
        pen.rectangle((x0 + third, y0, x1 - third, y1), fill=fill)
        pen.rectangle((x0, y0 + third, x1, y1 - third), fill=fill)
    else:  # a ring shows the background through its hole
        pen.ellipse((x0, y0, x1, y1), outline=fill, width=max(1, third * 2 // 3))


def draw(scene, width=32, height=32):
    """The scene as a PIL image (own data have images already). Any canvas of at least 16 pixels a side; raises
    ValueError below."""
    if isinstance(scene, Image.Image):
        return scene
    if min(width, height) < 16:
        raise ValueError(f"a canvas of {width} x {height} is too small for four things: at least 16 pixels a side")
    image = Image.new("RGB", (width, height), (scene.grey,) * 3)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        draw_thing(pen, thing, pixel_box(thing, width, height))
    return image


# Numbers to read: three columns by five rows per digit, one bit per pixel, rows from the top, written in octal.
GLYPHS = dict(
    zip("0123456789", (0o75557, 0o26227, 0o71747, 0o71717, 0o55711, 0o74717, 0o74757, 0o71222, 0o75757, 0o75717))
)


def draw_number(text, width=32, height=32, grey=20):
    """Digits as large as the canvas allows, white on a dark background, black on a light one. Raises ValueError when
    they cannot fit."""
    scale = min((width - 2) // (4 * len(text) - 1), (height - 2) // 5)
    if scale < 1:
        raise ValueError(f"{len(text)} digits need at least {4 * len(text) + 1} x 7 pixels, not {width} x {height}")
    image = Image.new("RGB", (width, height), (grey,) * 3)
    pen = ImageDraw.Draw(image)
    left, top = (width - scale * (4 * len(text) - 1)) // 2, (height - scale * 5) // 2
    for n, digit in enumerate(text):
        for i in range(15):
            if GLYPHS[digit] >> (14 - i) & 1:
                x, y = left + scale * (4 * n + i % 3), top + scale * (i // 3)
                pen.rectangle((x, y, x + scale - 1, y + scale - 1), fill=(250,) * 3 if grey in DARK else (10,) * 3)
    return image


# ----------------------------------------------------------------------------------------------------------------------
# The world: words


TEMPLATES = ("a {}", "a picture of a {}", "there is a {}", "this is a {}")  # prompts for zero-shot naming


def caption(scene, rng=None):
    """What the scene shows. Without rng the one full caption: every thing with size, colour, shape and place, in
    reading order. With rng one of several ways to say it, some of which leave something out."""
    things, dice = scene.things, 1.0 if rng is None else rng.random()
    if dice < 0.12:  # names only, in any order
        return rng.choice(TEMPLATES).format(" and a ".join(t.name for t in rng.sample(things, len(things))))
    if dice < (0.40 if len(things) == 1 else 0.24):  # one property: what "red" or "ring" means by itself
        thing = rng.choice(things)
        return rng.choice((f"something {thing.colour}", f"a {thing.shape}", f"something {thing.size}"))
    if dice < 0.32 and len(things) == 2:
        a, b = rng.sample(things, 2)
        return f"a {a.name} {relation(a, b)} a {b.name}"
    if dice < 0.38 and len(things) < 3:
        return " and ".join(f"a {t.full_name} at the {t.place}" for t in things)
    if dice < 0.44:
        return ", ".join(f"a {t.full_name} {t.place}" for t in things)
    return ", ".join(f"{t.place} a {t.full_name}" for t in things)


def relation(a, b):
    """Where a is, seen from b: "left of", "right of", "above" or "below"; left and right win over above and below."""
    if (a.x < 0.5) != (b.x < 0.5):
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


def only(scene, **wanted):
    """The things with these properties: only(scene, colour="red")."""
    return [t for t in scene.things if all(getattr(t, k) == v for k, v in wanted.items())]


def refer(scene, thing):
    """The shortest name that is this thing's alone: "red thing", else "circle", else "red circle"."""
    if len(only(scene, colour=thing.colour)) == 1:
        return f"{thing.colour} thing"
    return thing.shape if len(only(scene, shape=thing.shape)) == 1 else thing.name


PLACE_KINDS = ("what", "colour at", "shape at", "count")  # these name a place, or nothing at all: soon learned
KINDS = ("colour", "shape", "size", *PLACE_KINDS)  # what is taught beside pictures; the first three: find a thing first
QUESTIONS = (*KINDS, "where", "count of", "there", "pair", "side")  # "where" and the others take longer: try them


def question(kind, scene, rng):
    """A (question, answer) of this kind about the scene, or None where it makes no sense. Yes and no are equally
    likely."""
    things = scene.things
    if kind == "colour" and (named := [t for t in things if len(only(scene, shape=t.shape)) == 1]):
        thing = rng.choice(named)
        return f"what colour is the {thing.shape}?", thing.colour
    if kind == "shape" and (named := [t for t in things if len(only(scene, colour=t.colour)) == 1]):
        thing = rng.choice(named)
        return f"what shape is the {thing.colour} thing?", thing.shape
    if kind in ("colour at", "shape at"):
        thing, key = rng.choice(things), kind.split()[0]
        return f"what {key} is the {thing.place} thing?", getattr(thing, key)
    if kind == "size":
        thing = rng.choice(things)
        return f"what size is the {refer(scene, thing)}?", thing.size
    if kind == "where":
        thing = rng.choice(things)
        return f"where is the {refer(scene, thing)}?", thing.place
    if kind == "what":
        place = rng.choice(PLACES)
        found = only(scene, place=place)
        return f"what is {place}?", f"a {found[0].full_name}" if found else "nothing"
    if kind == "count":
        return "how many things are there?", NUMBERS[len(things)]
    if kind == "count of":
        thing = rng.choice(things)
        if rng.random() < 0.5:
            return f"how many {thing.colour} things are there?", NUMBERS[len(only(scene, colour=thing.colour))]
        return f"how many of the things are a {thing.shape}?", NUMBERS[len(only(scene, shape=thing.shape))]
    if kind == "there":
        key, values = rng.choice((("colour", tuple(COLOURS)), ("shape", SHAPES)))
        here, yes = {getattr(t, key) for t in things}, rng.random() < 0.5
        word = rng.choice([v for v in values if (v in here) == yes])
        return f"is there a {word}{' thing' if key == 'colour' else ''}?", "yes" if yes else "no"
    if kind == "pair":  # the "no" is a hard one: the colour or the shape is there, the pair is not
        thing = rng.choice(things)
        if rng.random() < 0.5:
            return f"is there a {thing.name}?", "yes"
        near = [
            p for p in SEEN_PAIRS if (p[0] == thing.colour or p[1] == thing.shape) and p not in [t.pair for t in things]
        ]
        return "is there a {} {}?".format(*rng.choice(near)), "no"
    if (
        kind == "side" and len({t.x < 0.5 for t in things}) == 2
    ):  # the only one about two things: find both, and compare
        a = rng.choice(things)
        b = rng.choice([t for t in things if (t.x < 0.5) != (a.x < 0.5)])
        return f"is the {refer(scene, a)} left or right of the {refer(scene, b)}?", relation(a, b).split()[0]


def ask(scene, rng, kinds=QUESTIONS):
    """A (question, answer) about the scene, of one of these kinds, among those that make sense for it."""
    for kind in rng.sample(kinds, len(kinds)):
        if asked := question(kind, scene, rng):
            return asked
    raise ValueError(f"no question of {kinds} makes sense for: {caption(scene)}")


def movie(rng, frames=4, pairs=SEEN_PAIRS):
    """One thing moving over the canvas: (list of scenes, question, answer in left, right, up, down)."""
    way = rng.choice(("left", "right", "up", "down"))
    thing = Thing(*rng.choice(pairs), rng.choice(tuple(SIZES)), rng.random(), rng.random())
    scenes, grey = [], background([thing], rng)
    for step in np.linspace(0.05, 0.95, frames):
        along = float(1 - step if way in ("left", "up") else step)
        moved = replace(thing, x=along) if way in ("left", "right") else replace(thing, y=along)
        scenes.append(Scene((moved,), grey))
    return scenes, "which way does it move?", way


def read_number(rng, digits=2):
    """(text, question, answer) for `draw_number(text)`."""
    text = "".join(rng.choice("0123456789") for _ in range(digits))
    return text, "what number is it?", text


def chat(opening, turns):
    """LLaVA's conversation: USER: opening, newline, question ASSISTANT: answer<eos>USER: question ..., as (text,
    is_answer) pieces, so that the loss can be put on the assistant's words only."""
    pieces = []
    for n, (question, answer) in enumerate(turns):
        pieces.append((f"USER: {opening}\n{question} ASSISTANT:" if n == 0 else f"USER: {question} ASSISTANT:", False))
        pieces.append((f" {answer}<eos>", True))
    return pieces


DESCRIBE = "describe the picture."


def text_line(rng):
    """A line for a language model that never sees a picture: a caption, or questions about a scene told in words."""
    scene = make_scene(rng)
    if rng.random() < 0.2:
        return caption(scene, rng) + "<eos>"
    turns = [(DESCRIBE, caption(scene))] if rng.random() < 0.3 else []
    turns += [ask(scene, rng) for _ in range(3 - len(turns))]
    told = ", ".join(f"{t.place} a {t.full_name}" for t in rng.sample(scene.things, len(scene.things)))
    return "".join(text for text, _ in chat(told, turns))


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer: byte-pair encoding, trained on the world's own text


VOCAB_SIZE = 512  # 256 bytes + 240 merges + 16 special tokens, which come last
SPECIAL = "<pad> <bos> <eos> <image> <video> <boi> <eoi> <mask> <cls> <sep> <dec> <|endofchunk|>".split()
SPECIAL += ["<spare1>", "<spare2>", "<spare3>", "<spare4>"]
MERGES = VOCAB_SIZE - 256 - len(SPECIAL)
SPECIAL_IDS = {token: 256 + MERGES + i for i, token in enumerate(SPECIAL)}
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, VIDEO_ID, BOI_ID, EOI_ID, MASK_ID, CLS_ID, SEP_ID, DEC_ID, CHUNK_ID = range(496, 508)
SPLIT = r" ?[A-Za-z]+(?:-[A-Za-z]+)?|[0-9]| ?[^A-Za-z0-9\s]|\s"  # words with the space before them; single digits


OTHER_WORDS = """Question: which words can you read? Short answer: a photo of a person, a man, a woman, a child, a cat,
a dog, a bird, a fish, a horse, a car, a house, a tree, a flower, the sun in the sky; five six seven eight nine ten;
black, grey, orange, brown, pink; find the biggest one in the video, please."""  # of CogVLM's prompt, and of own data


def merge(word, pair):
    """Every neighbouring `pair` in the tuple `word` becomes one symbol: merge((a, b, c), (a, b)) = (ab, c)."""
    out, i = [], 0
    while i < len(word):
        both = word[i : i + 2] == pair
        out.append(word[i] + word[i + 1] if both else word[i])
        i += 2 if both else 1
    return tuple(out)


def train_bpe(text, merges):
    """Byte-pair encoding: start from the 256 bytes; again and again make the most frequent neighbours one new symbol.
    Returns {bytes: id}, ids in order of invention, which is also the order in which an encoder must apply them."""
    counts = {}
    for word in re.findall(SPLIT, text):
        key = tuple(bytes([b]) for b in word.encode())
        counts[key] = counts.get(key, 0) + 1
    ranks = {bytes([i]): i for i in range(256)}
    while len(ranks) < 256 + merges:
        pairs = {}
        for word, count in counts.items():
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties by bytes: the same on every machine
        ranks[best[0] + best[1]] = len(ranks)
        counts = {merge(word, best): count for word, count in counts.items()}
    return ranks


@lru_cache(maxsize=1)
def tokenizer():
    """The world's tiktoken.Encoding: byte-pair encoding learned from 2000 lines of its text, special tokens registered.
    Always the same one, whatever the seed of a training: models could not share a vocabulary otherwise."""
    rng = rng_for("tokenizer")
    lines = [text_line(rng) for _ in range(1400)] + [caption(make_scene(rng), rng) for _ in range(400)]
    lines += [" ".join(movie(rng)[1:]) for _ in range(100)] + [" ".join(read_number(rng)[1:]) for _ in range(50)]
    lines += [OTHER_WORDS] * 50
    ranks = train_bpe("\n".join(lines).replace("<eos>", "\n"), MERGES)
    return tiktoken.Encoding("toy-world", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=SPECIAL_IDS)


def encode(text):
    """Text -> list of ids. Special tokens written out, like <image>, become their one id."""
    return tokenizer().encode(text, allowed_special="all")


def decode(ids):
    """Ids -> text, up to the first <eos>; padding is left out."""
    ids = [int(i) for i in ids]
    ids = ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids
    return tokenizer().decode([i for i in ids if i != PAD_ID])


# ----------------------------------------------------------------------------------------------------------------------
# The loop: one for every model here

RUNS = Path("runs")  # everything that is written goes here
SPENT = {}  # what a command has trained or taken from the cache: {name: (seconds of training, peak memory)}
SAVE_SECONDS = 20  # between two checkpoints
try:  # torchrun sets these
    RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
    assert 0 <= RANK < WORLD_SIZE
except (ValueError, AssertionError):
    print("RANK and WORLD_SIZE do not fit together: unset them, or leave them to torchrun", file=sys.stderr)
    sys.exit(2)


def stop(message, status=2):
    """Ends the program with one line on stderr: status 2 for wrong input, 130 after Ctrl-C (both as shells expect)."""
    if RANK == 0:
        print(message, file=sys.stderr)
    raise SystemExit(status)


def say(*lines):
    if RANK == 0:
        tqdm.write("\n".join(lines))


@dataclass(frozen=True)
class Plan:
    """What decides the outcome of a training, besides the model's config, its code and the data."""

    stage: str  # "" for the last or only one
    steps: int
    batch: int  # pictures (or lines of text) per step, over all processes
    lr: float
    seed: int = 0
    warmup: int = 30
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.98  # 0.999 is too slow a memory for a few hundred steps
    muon: float = 0.0  # > 0: Muon at this learning rate for hidden matrices
    same: bool = False  # contrastive losses: do equal texts belong to each other's images? The papers': no

    def rate(self, step):
        """The fraction of the highest learning rate: linear warm-up, then half a cosine down to 5 % at the last
        step."""
        cosine = (1 + math.cos(math.pi * step / max(1, self.steps))) / 2
        return min(1, (step + 1) / self.warmup) * (0.05 + 0.95 * cosine)


class Muon(torch.optim.Optimizer):
    """Momentum M = U S V^T, applied as U V^T (Jordan et al. 2024; the scale that matches AdamW's is from Moonlight,
    2502.16982). All directions of the update are then equally long, so that a rare but decisive one, such as "look
    where the circle is", is not drowned by the common ones: a few hundred steps are enough.

    torch.optim.Muon does the same in bfloat16, which takes twenty times as long on a CPU that has no instructions for
    it.
    """

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 0.1)
                    update = orthogonal(p.grad.lerp(momentum, 0.9))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update, alpha=0.2 * group["lr"] * max(p.shape) ** 0.5)


def orthogonal(matrix):
    """U S V^T -> about U V^T, by matrix products alone: an odd polynomial of a matrix is that of its singular values s,
    and five rounds of a s + b s^3 + c s^5 bring all s of 0.002 .. 1 to between 0.68 and 1.21."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix  # the smaller square
    x = x / x.norm().clamp(min=1e-7)
    square, one = x @ x.T, torch.eye(len(x), device=x.device)
    product = one  # of the rounds' factors, all of them polynomials of the small square
    for _ in range(5):
        factor = a * one + b * square + c * square @ square
        square, product = factor @ square @ factor, factor @ product
    x = product @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def make_optimizers(plan, model):
    """A list of optimizers for the parameters that train. AdamW for all; biases, norms and scales do not decay. With
    plan.muon the matrices between embedding and output go to Muon instead. Each parameter group remembers its own
    highest learning rate as `peak`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = {name for name, p in named if plan.muon and p.ndim == 2 and not re.search("embed|head", name)}
    rest = [p for name, p in named if name not in hidden]
    matrices = {"params": [p for p in rest if p.ndim >= 2], "weight_decay": plan.weight_decay, "peak": plan.lr}
    others = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "peak": plan.lr}
    optimizers = [torch.optim.AdamW([matrices, others], lr=plan.lr, betas=(0.9, plan.beta2), fused=True)]
    if hidden:
        group = {"params": [p for name, p in named if name in hidden], "peak": plan.muon}
        optimizers.append(Muon([group], plan.muon, plan.weight_decay))
    return optimizers


@lru_cache(maxsize=1)
def world_fingerprint():
    """A number that changes when the world does, so that a model trained in another world is not taken from the
    cache."""
    rng = rng_for("fingerprint")
    scenes = [make_scene(rng) for _ in range(100)]
    content = repr((UNSEEN_PAIRS, TEMPLATES, [caption(s, rng) for s in scenes], [text_line(rng) for _ in range(100)]))
    return zlib.crc32(content.encode() + b"".join(draw(s).tobytes() for s in scenes))


@lru_cache
def syntax_tree(path):
    """The syntax tree of a Python file without its docstrings; comments and layout are not in it anyway."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def code_of(module, names, owner=None):
    """A number that changes with the code of a training: a module (a family file), and of this file the functions
    `names` (of the class `owner`, or outside of classes) with every function and constant of this file that they
    use."""
    top = {node.name: node for node in syntax_tree(__file__).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own = [node for cls in ("Recipe", owner) if cls for node in top[cls].body if hasattr(node, "name")]
    top |= {f".{node.name}": node for node in own}  # a method is used as an attribute: another thing than a function
    found, todo = {}, [f".{name}" if owner else name for name in names]
    while todo:
        name = todo.pop()
        node = top.get(name)
        # train and fit make no difference between trainings, the rank must make none, a demo only shows, and a tower's
        # recipe is in its own key; __file__ and __name__ differ with how the program was started
        aside = name.strip(".") in ("train", "fit", "demo", "RANK", "WORLD_SIZE")
        if name in found or aside or name.endswith("Recipe") or "__" in name:
            continue
        if node is None:
            constant = isinstance(globals().get(name), (int, float, str, tuple, dict))
            found[name] = repr(globals()[name]) if constant else ""
        else:
            found[name] = ast.dump(node)
            todo += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
            todo += [f".{part.attr}" for part in ast.walk(node) if isinstance(part, ast.Attribute)]
    return zlib.crc32((ast.dump(syntax_tree(module.__file__)) + repr(sorted(found.items()))).encode())


def key_of(plan, config, data, towers, code):
    """Everything a checkpoint must agree with to be the result of this training: {what: value}."""
    plan = {name: value for name, value in asdict(plan).items() if name != "stage"}
    key = {"plan": plan, "config": repr(config), "data": data, "towers": towers, "code": code}
    return json.loads(json.dumps(key | {"world": world_fingerprint()}))


def load_checkpoint(path, key):
    """The checkpoint at `path` if it is whole and belongs to this training, else {}, with a line that says why not."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = [what for what in key if state["key"].get(what) != key[what]]
        if not changed:
            return state
        say(f"{path}: {' and '.join(changed)} changed since it was trained: training again")
    except FileNotFoundError:
        pass
    except Exception as error:  # a torn file can raise nearly anything
        say(f"{path} is damaged ({type(error).__name__}): training again")
    return {}


def write_file(path, write):
    """write(file) to a file of this process's own beside `path`, then rename it: after a crash, on a full disk or
    with two runs at once there is the old file or a new one, never half of one."""
    beside = path.with_name(f".{os.getpid()}.{path.name}")  # Pillow goes by the ending
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch's is a RuntimeError
        stop(f"cannot write {path} ({' '.join(str(error).split())}): make room, or start from another directory")


def save_checkpoint(state, path):
    write_log(state["log"], path.parent)
    write_file(path, lambda file: torch.save(state, file))


def write_log(rows, folder):
    write_file(folder / "log.jsonl", lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in rows)))


@contextlib.contextmanager
def ctrl_c():
    """While this is open, the first Ctrl-C only asks: the loop stops between two steps, where model and optimizer
    agree. The second one interrupts at once."""
    asked = []

    def ask(*_):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def sum_over_ranks(*tensors):
    """Add the tensors up over all processes, in place and in one message. Alone: nothing to do."""
    if WORLD_SIZE > 1 and dist.is_initialized():
        together = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(together)
        for t, total in zip(tensors, together.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


def update(model, optimizers, loss, rate):
    """One update at this fraction of the highest learning rate. With torchrun each process has the loss of the whole
    batch and counts its W-th part, so gradients are summed (see joint)."""
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
    (loss / WORLD_SIZE).backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        sum_over_ranks(*(p.grad for p in parameters))
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()


def fit(name, plan, model, loss_of, code, data="world", expected=None, after_step=None):
    """Train the parameters of `model` that require a gradient, or take the finished result from runs/NAME.

    loss_of(step) -> (loss, metrics) must be a function of the step alone (and of the seed): then a training that was
    interrupted and resumed ends with the same bits. code: see code_of. expected: (text, value) of the loss at
    initialisation. after_step(): called after every update. Returns the model, in eval mode. Ends the program when the
    loss is no longer finite (status 2) or on Ctrl-C (saved, status 130).
    """
    path = RUNS / name / "checkpoint.pt"
    key = key_of(plan, model.config, data, getattr(model, "lineage", None), code)
    state = {"key": key, "step": 0, "log": []} | load_checkpoint(path, key)
    if "model" in state:
        model.load_state_dict(state["model"])
    if state["step"] < plan.steps:
        train(name, plan, model, loss_of, state, path, expected, after_step)
    SPENT[name] = state.get("seconds", 0), state.get("memory", 0)
    for module in model.modules():  # what is built on this model, or on a part of it, has this in its own key
        module.lineage = zlib.crc32(json.dumps(key).encode())
    model.folder = path.parent
    return model.eval()


def train(name, plan, model, loss_of, state, path, expected, after_step):
    """The part of `fit` that runs when there is something left to do."""
    model.zero_grad()  # what an earlier stage left where nothing trains now would count in the clipped norm
    optimizers, start, log = make_optimizers(plan, model), state["step"], state["log"]
    for optimizer, saved in zip(optimizers, state.get("optimizers", ())):
        optimizer.load_state_dict(saved)

    if RANK == 0:
        write_log(log, path.parent)  # a directory that cannot be written is found before the training
    saved = time.time()
    began = saved - state.get("seconds", 0)
    show = dict(unit=" samples", desc=name, mininterval=0.3, disable=None if RANK == 0 else True)
    bar = tqdm(total=plan.steps * plan.batch, initial=start * plan.batch, **show)
    model.train()
    with ctrl_c() as asked, bar:
        for step in range(start, plan.steps):
            loss, metrics = loss_of(step)
            interrupted = torch.tensor(float(len(asked)))
            sum_over_ranks(interrupted)  # all processes stop at the same step
            value, last = float(loss.detach()), step + 1 == plan.steps
            if not math.isfinite(value):
                stop(f"{name}: the loss is {value} at step {step}; try a smaller learning rate than {plan.lr}")
            if step == 0 and expected:
                say(f"{name}: first loss {value:.3f}; expected at initialisation: {expected[0]} = {expected[1]:.3f}")
            update(model, optimizers, loss, plan.rate(step))
            if after_step:
                after_step()
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update(plan.batch)
            if step % 10 == 0 or last:
                row = {"step": step + 1, "loss": value, "lr": plan.lr * plan.rate(step)}
                log.append(row | {metric: float(number) for metric, number in metrics.items()})
            if RANK == 0 and (last or interrupted or time.time() - saved > SAVE_SECONDS):
                states = [optimizer.state_dict() for optimizer in optimizers]
                state |= {"step": step + 1, "log": log, "model": model.state_dict(), "optimizers": states}
                state |= {"seconds": time.time() - began, "memory": peak_memory()}
                save_checkpoint(state, path)
                saved = time.time()
            if last or interrupted:
                sum_over_ranks(interrupted)  # no process goes on, or ends, before the first one has saved
            if interrupted and not last:
                bar.close()
                stop(f"stopped after step {step + 1} of {plan.steps}; the same command again goes on from there", 130)


# ----------------------------------------------------------------------------------------------------------------------
# Recipes: what all families share


@dataclass(frozen=True)
class Claim:
    """A sentence from a paper with a number of ours: it holds when `measured` is at least `target`, by two standard
    errors if it is a share of a sample."""

    name: str
    chance: float  # what guessing would give; for "a beats b": what b gives
    measured: float
    target: float
    sample: int = 0  # how many were asked; 0: all there are, or a comparison

    @property
    def error(self):
        """Two standard errors of a share."""
        return 2 * math.sqrt(self.measured * (1 - self.measured) / self.sample) if self.sample else 0.0

    @property
    def holds(self):
        return self.measured - self.error >= self.target

    @property
    def verdict(self):
        return "holds" if self.holds else "does not hold"


def claims_table(claims):
    """The claims as a markdown table, which reads well in a terminal too. After ±: two standard errors."""
    width = max(len(claim.name) for claim in claims)
    lines = [f"| {'claim':{width}} | chance | measured |   ±   | target |   |"]
    lines.append(f"|-{'-' * width}-|-------:|---------:|------:|-------:|---|")
    for c in claims:
        error = f"{c.error:.3f}" if c.sample else ""
        numbers = f"{c.chance:6.3f} | {c.measured:8.3f} | {error:5} | {c.target:6.3f}"
        lines.append(f"| {c.name:{width}} | {numbers} | {c.verdict} |")
    return "\n".join(lines)


def peak_memory():
    """Of this process so far, in MiB; 0 on Windows, where Python cannot tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


def machine(device):
    """What decides how long a training takes: the processor, if its name can be read, threads, torch."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    found = re.search("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device.replace("cpu", "")
    cpu = found[1] if found else platform.processor() or platform.machine()
    return ", ".join(filter(None, (name, cpu, f"threads: {torch.get_num_threads()}", f"torch {torch.__version__}")))


def record(recipe, args, name, **found):
    """Keep what a standard training or its ablations have shown in runs/results/NAME.json, and write runs/results.md
    anew from all that is kept. Each family and seed has a file of its own, so runs side by side lose nothing. Results
    on the validation split are kept apart, in runs/results-validation."""
    folder = RUNS / ("results" if recipe.split == "test" else f"results-{recipe.split}")
    trained = world_fingerprint(), CLIPRecipe.stages, CLIPRecipe().code(), type(recipe).stages, recipe.variants
    code = zlib.crc32(repr((trained, recipe.code("claims", "measure", "compare"))).encode())
    row = {"name": name, "family": recipe.family, "code": code, "machine": machine(args.device)}
    row["split"], row["date"] = recipe.split, time.strftime("%Y-%m-%d %H:%M:%S")
    row["seconds"] = {training: seconds for training, (seconds, _) in SPENT.items()}
    row["memory"] = max([peak_memory(), *(memory for _, memory in SPENT.values())])
    text = json.dumps(row | found, indent=1)
    write_file(folder / f"{name}.json", lambda file: file.write_text(text))

    rows = [json.loads(file.read_text()) for file in folder.glob("[!.]*.json")]
    newest = {row["family"]: row["code"] for row in sorted(rows, key=lambda row: row["date"])}
    kept = [row for row in rows if row["code"] == newest[row["family"]]]
    for row in rows:
        if row not in kept:
            say(f"{row['name']}, of {row['date']}, is left out: the code has changed since")
    kept.sort(key=lambda row: ([*RECIPES].index(row["family"]), row["name"]))
    page = results_page(kept)
    write_file(RUNS / f"{folder.name}.md", lambda file: file.write_text(page, encoding="utf-8"))
    say(f"written: {RUNS / folder.name}.md")


def results_page(rows):
    """What `record` has kept, as markdown."""
    runs = [row for row in rows if "seed" in row]
    page = [
        f"## Claims, on the {rows[0]['split']} split",
        "A share of a sample (one with ±) holds if it is above its target by two standard errors.",
    ]
    page += [claims_by_seed(runs), "## Ablations", *ablations_by_seed(row for row in rows if row not in runs)]
    page.append("## Times and memory")
    for where in dict.fromkeys(row["machine"] for row in rows):
        page += [f"On {where}:", times_and_memory([row for row in rows if row["machine"] == where])]
    return "\n\n".join(page) + "\n"


def markdown(head, rows):
    """A table whose lines are as short as they can be."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def decimals(numbers):
    return [f"{number:.3f}" for number in numbers]


def claims_by_seed(rows):
    claims, lines = {}, []
    for row in rows:
        for claim in row["claims"]:
            text = claim["name"].replace(row["family"], row["name"].split("-seed")[0], 1)  # clip-sigmoid's are others
            claims.setdefault(text, {})[row["seed"]] = Claim(**claim)
    seeds = sorted({row["seed"] for row in rows})
    for text, each in claims.items():
        chance = ", ".join(dict.fromkeys(decimals(claim.chance for claim in each.values())))
        target = ", ".join(dict.fromkeys(decimals(claim.target for claim in each.values())))  # may differ by seed
        measured = [f"{each[seed].measured:.3f}" if seed in each else "" for seed in seeds]
        error = max(claim.error for claim in each.values())
        held = [str(seed) for seed in each if each[seed].holds]
        verdict = f"holds at seed{'s' * (len(held) > 1)} {', '.join(held)}" if held else "does not hold"
        verdict = "holds" if len(held) == len(each) else verdict
        lines.append([text, chance, *measured, f"{error:.3f}" if error else "", target, verdict])
    return markdown(["claim", "chance", *(f"seed {seed}" for seed in seeds), "±", "target", "verdict"], lines)


def ablations_by_seed(rows):
    variants, comparisons = [], []
    for row in rows:
        for variant, figures in row["figures"].items():
            for figure, each in figures.items():
                variants.append([f"{row['family']}: {variant}", figure, *decimals([*each, sum(each) / len(each)])])
        for claim in [Claim(**claim) for claim in row["claims"]]:
            comparisons.append([claim.name, *decimals([claim.measured, claim.target]), claim.verdict])
    head = ["variant", "figure", "seed 0", "seed 1", "seed 2", "mean"]
    return markdown(head, variants), markdown(["comparison of means", "measured", "target", "verdict"], comparisons)


def times_and_memory(rows):
    lines = []
    for row in rows:
        own = [seconds for name, seconds in row["seconds"].items() if name.split("-")[0] == row["family"]]
        towers = [f"{name} {s:.0f}" for name, s in row["seconds"].items() if name.split("-")[0] != row["family"]]
        lines.append([row["name"], f"{sum(own):.0f}", ", ".join(towers), row["memory"], row["date"][:10]])
    return markdown(["training", "seconds", "towers, seconds", "peak MiB", "date"], lines)


def run_name(name, seed=0, steps=None):
    """runs/FAMILY holds the standard training, which other families build on; other seeds or steps live beside it."""
    return name + (f"-seed{seed}" if seed else "") + (f"-steps{steps}" if steps else "")


def batch_rngs(seed, step, batch):
    """One random.Random per sample of a batch."""
    return [rng_for(seed, step, i) for i in range(batch)]


def share(rows):
    """With torchrun: what the model of this process is given of the rows of a batch (a list or a tensor), which every
    process draws in full. Measuring is not shared: then no gradient is wanted, and all rows are given."""
    size = len(rows) // WORLD_SIZE
    return rows[RANK * size : (RANK + 1) * size] if torch.is_grad_enabled() else rows


def joint(mine):
    """What the model made of its share [b,...] -> the same of the whole batch [W*b,...], in the order of the ranks.

    Each process computes the loss of the whole batch from it, whatever that loss compares or averages, and counts 1/W
    of that loss (see update). all_gather sends no gradient back, so each process has one for its own rows only: the
    factor W below makes up for it.
    """
    if WORLD_SIZE == 1 or not torch.is_grad_enabled():
        return mine
    parts = [torch.empty_like(mine) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, mine.detach().contiguous())
    parts[RANK] = parts[RANK] + WORLD_SIZE * (mine - mine.detach())  # adds zeros, which carry the gradient
    return torch.cat(parts)


def text_rows(texts, context=None):
    """Texts -> rows of ids, each with <eos> at its end, cut to `context` ids. Special tokens in texts are plain
    text."""
    return [tokenizer().encode_ordinary(text)[: context and context - 1] + [EOS_ID] for text in texts]


def pad(rows, value=PAD_ID):
    """Rows of ids -> (ids [B,T], mask [B,T]; True = real token), padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [value] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])


def pretrain(model, family, name, plan, line):
    """A language model on the world's text alone, cached in runs/NAME. line(rng) -> [(text, does the loss count
    it?)]."""
    device = next(model.parameters()).device

    def loss_of(step):
        rngs = batch_rngs(0, (name, step), plan.batch)
        lines = [[(encode(text), counts) for text, counts in line(rng)] for rng in rngs]
        rows = [sum((ids for ids, _ in row), []) for row in lines]
        labels = [sum((ids if counts else [-100] * len(ids) for ids, counts in row), []) for row in lines]
        logits = model(share(pad(rows)[0]).to(device))
        return family.language_loss(joint(logits), pad(labels, -100)[0].to(device))

    code = code_of(family, ["pretrain", line.__name__])
    return fit(run_name(name), plan, model, loss_of, code, expected=("ln V", math.log(VOCAB_SIZE)))


def assemble(model, device, **parts):
    """The model with weights of others in its parts; the cache will know which training those came from."""
    for name, part in parts.items():
        getattr(model, name).load_state_dict(part.state_dict())
    model.lineage = {name: part.lineage for name, part in parts.items()}
    return model.to(device).eval()


class Recipe:
    """How one family is trained, measured and shown: what is the same for all. A family says what differs, in this
    order: what it starts from, what a step shows it, its loss, how it is asked, its claims, what its ablations change,
    its demo.

    A `stage` is a Plan, the last one without a name: its directory is runs/FAMILY. A `sample` is what `batch` makes a
    list of and `loss` takes a list of: a picture and what belongs to it.
    """

    module = model_class = None  # the family file, and its model
    stages = demo_stages = ()  # the latter when somebody waits for the demo; if there are none, as always
    fields = ("text",)  # what a row of own data needs besides file_name
    variants, beats, ablation_steps = {}, (), 300  # {variant: changes}, (claim, better variant, worse variant)
    figures = ("questions",)  # what `measure` returns, in words; the first decides
    asked = ' --prompt "..."'  # what the command that asks a model has besides --image
    rightly = "the right text is written"  # what `right` counts
    given = None  # a trained model, which is asked instead of training one
    minutes = 3  # that all of its training takes on two CPU cores, towers included
    split = "validation"  # of what is shown and measured; claims are measured on another
    heat_shows = "attention of the answer to\nthe first prompt (light: much)"  # in seen.png; "": nothing
    new_words = ""  # a regular expression of words that a prompt may have although training has not
    short, demo_kinds = False, PLACE_KINDS  # is somebody waiting for the demo (see train)? what is asked then
    special_tokens = True  # does a published tokenizer add those of its own to a prompt?
    no_tokenizer = ""  # what to do when a published folder has none

    @property
    def kinds(self):
        """The kinds of question that are taught and shown."""
        return self.demo_kinds if self.short else KINDS

    # A family has start(device, seed, **changes), batch(plan, step), loss(model, samples, plan, step), and perhaps

    def freeze(self, model, plan):
        """Set what trains in a stage."""

    def expected(self, model, plan):
        """(text, value) of the first loss, or None."""

    def after_step(self, model):
        """What follows each update."""

    def collect(self, rows, plan, step):
        """Rows of own data -> what `loss` takes; `own` makes a sample of a row, or refuses it with a ValueError."""
        return [self.own(*row) for row in rows]

    # Training

    @property
    def family(self):
        return self.module.__name__

    def code(self, *more):
        names = ("start", "freeze", "batch", "loss", "collect", "after_step", *more)
        return code_of(self.module, names, type(self).__name__)

    def train(self, device="cpu", seed=0, steps=None, demo=False, name=None, skip=(), until=None, **changes):
        """Through all stages, each from the cache if it is there. steps: of the last stage; demo: somebody is waiting,
        so fewer steps, and perhaps an easier task, if the standard training is not there; skip: stages left out;
        until: the last stage to run; changes: see start."""
        if self.given:
            return self.given
        self.short = demo and bool(self.demo_stages) and not self.done()
        model = self.start(device, seed, **changes)
        for plan in self.demo_stages if self.short else self.stages:
            if plan.stage not in skip:
                length = plan.steps if plan.stage else steps or plan.steps
                full = "-".join(filter(None, (name or self.family, self.short and "demo", plan.stage)))
                full = run_name(full, seed, length if steps and length != plan.steps else None)
                data = " ".join(filter(None, ("world", self.short and "demo", changes and str(changes))))
                self.fit(full, model, replace(plan, steps=length, seed=seed), data=data)
            if plan.stage == until:
                break
        return model

    def fit(self, name, model, plan, draw_batch=None, data="world"):
        """One stage, on batches of the world or of draw_batch(step)."""
        self.freeze(model, plan)
        show = draw_batch or (lambda step: self.batch(plan, step))
        expected = self.expected(model, plan) if not draw_batch else None
        loss_of = lambda step: self.loss(model, show(step), plan, step)
        return fit(name, plan, model, loss_of, self.code(), data, expected, lambda: self.after_step(model))

    def save(self, model):
        """config.json and model.safetensors beside the checkpoint, which make its folder one for from_pretrained and
        --weights -> a line that tells how to use it."""
        try:
            from safetensors.torch import save_file
        except ImportError:
            return f"{model.folder} cannot be asked yet: pip install safetensors, then the same command again"
        if RANK == 0:
            raw = {"model_type": type(model.config).__name__} | asdict(model.config)
            weights = {name: weight.detach().cpu() for name, weight in model.named_parameters()}  # tied ones are one
            try:
                model.folder.mkdir(parents=True, exist_ok=True)
                (model.folder / "config.json").write_text(json.dumps(raw, indent=1))
                save_file(weights, model.folder / "model.safetensors")
            except Exception as error:  # safetensors has exceptions of its own
                stop(f"cannot write {model.folder}/model.safetensors ({error})")
        return f"ask it: python {self.family}.py --weights {model.folder} --image my.png{self.asked}"

    def done(self):
        """Is there a standard training, finished, with today's plan, config, code and world? (Its towers are not asked
        for.)"""
        plan = self.stages[-1]
        key = key_of(plan, self.module.PRESETS["tiny"], "world", None, self.code())
        try:
            state = torch.load(RUNS / self.family / "checkpoint.pt", weights_only=True, mmap=True)
        except Exception:  # not there, or torn
            return False
        same = [what for what in key if what not in ("towers", "config") and state["key"].get(what) == key[what]]
        return state["step"] == plan.steps and len(same) == len(key) - 2

    # Asking

    @torch.no_grad()
    def answers(self, model, asked, longest=8):
        """What the model says to each of [(scene, question, ...)], as text."""
        said = []
        for start in range(0, len(asked), 128):
            inputs = self.prompt(model, [item[:2] for item in asked[start : start + 128]])
            new = model.generate(**inputs, max_new_tokens=longest, eos_id=EOS_ID)
            said += [decode(row).strip() for row in new.tolist()]
        return said

    def accuracy(self, model, asked):
        """The share of [(scene, question, answer)] that is answered word for word."""
        said = self.answers(model, asked)
        return sum(text == right for text, (_, _, right) in zip(said, asked)) / len(asked)

    # The workbench: a family says demo(args), masks() and costs(model), and what is different about the rest

    def example(self, model):
        """What the model is given in --trace: two questions about scenes."""
        rng = rng_for("trace")
        return self.prompt(model, [item[:2] for item in questions(rng, 2)])

    def check_question(self, question, images, toy):
        """Raise ValueError for a question that cannot be asked about these images, before anything is trained or
        loaded. toy: the toy will be asked, not a published checkpoint."""

    def load_images(self, args):
        return [load_image(path) for path in args.image]

    def answer(self, model, images, question, encode, decode):
        return self.module.answer(model, images, question, encode, decode)

    def ask(self, args):
        """--image and --prompt: your own questions, to a published checkpoint or to the toy, and only their answers."""
        images = self.load_images(args)
        if args.weights and not args.prompt:
            raise ValueError("--weights needs --prompt, as in --weights DIR --image photo.jpg --prompt 'What is this?'")
        for question in args.prompt:
            if not words_only(question):
                raise ValueError("the prompt is empty: ask something, as in --prompt 'what colour is the circle?'")
            self.check_question(question, images, toy=not args.weights)
        if args.weights:
            model, tokenizer = load_published(self, args)
            ids_of = lambda text: tokenizer.encode(text, add_special_tokens=self.special_tokens).ids
            for question in args.prompt:
                say(self.answer(model, images, question, ids_of, tokenizer.decode))
        else:
            if args.fresh:
                forget(self.family)
            model = self.train(args.device, demo=True)
            own, prompts = images, args.prompt or [DESCRIBE]
            if not images:
                scene = make_scene(rng_for(f"{self.family} demo"), split="validation")
                images = [draw(scene)]
                say(f"[{caption(scene)}]")
            for question in prompts:
                say(f"{question} -> {self.answer(model, images, question, encode, decode)}")
            self.explain(model, own, prompts)

    def explain(self, model, own, prompts):
        """Below the answers of the toy: what it got of own images, and what it was taught. Of a toy that was trained on
        own data nobody knows what it has read."""
        if own:
            self.draw_seen(model, own, prompts[0])
        if self.given:
            return
        texts = self.texts()
        read = {word for text in texts for word in words_in(text)}
        if own:
            asked = [" ".join(text.split()[:2]) + " ..." for text in texts if text.endswith(("?", "."))]
            forms = asked or [f'"{text.strip()}"' for text in (texts[0], texts[-1])]
            names = [word for word in (*COLOURS, *SHAPES) if word in read]
            say(f"taught: {', '.join(names)}; {', '.join(dict.fromkeys(forms))}")
        words = [word for word in words_in(" ".join(prompts)) if not re.fullmatch(self.new_words, word)]
        if unread := [word for word in dict.fromkeys(words) if word not in read]:
            say(f"never read beside a picture in training: {', '.join(unread)}")

    def texts(self):
        """The texts that training shows beside pictures; a few steps of each stage have all of its words."""
        return [text for plan in self.stages for step in range(8) for text in strings(self.batch(plan, step))]

    # Attention, and own images as the model gets them

    @torch.no_grad()
    def image_attention(self, model, picture, question):
        """The attention from the last token of a prompt, which predicts the first token of the answer, to the image
        tokens; mean over heads and layers of the decoder, [N]."""
        inputs = self.prompt(model, [(picture, question)])
        with attention_maps() as maps:  # those of the decoder [1,H,T,T] come last
            model(**inputs)
        weights = torch.stack(maps[-model.config.language.layers :]).mean((0, 2))[0, -1]
        return weights[inputs["ids"][0] == IMAGE_ID].cpu()

    def look(self, model, picture, question):
        """Where the answer looks, [rows,columns]."""
        rows, columns = (side // self.token_side for side in reversed(self.seen(picture).size))
        weights = self.image_attention(model, picture, question)
        others = (len(weights) - rows * columns) // 2  # CogVLM's boi in front of the patches, and eoi behind them
        return weights[others : others + rows * columns].view(rows, columns)

    def verdict(self, model, scene, picture, question, said, right):
        """Is the answer right? Of a wrong one: what is, and why it may be wrong."""
        return "right" if said == right else f"wrong, it is {right}{self.why(model, scene, picture, question)}"

    def why(self, model, scene, picture, question):
        return distraction(self.look(model, picture, question), scene, question)

    @property
    def token_side(self):
        """How many pixels along one side become one token."""
        vision = getattr(self.module.PRESETS["tiny"], "vision", self.module.PRESETS["tiny"])
        return getattr(vision, "factor", vision.patch_size)  # Qwen2-VL merges patches

    def draw_seen(self, model, images, prompt, size=256):
        """PNG: own images (eight at most, of a video its frames) as the model gets them, cut into patches; and where
        it looked, if there is one image."""
        frames = [frame for image in images for frame in (image if isinstance(image, list) else [image])][:8]
        pictures = []
        for frame in map(self.seen, frames):
            cut = cut_picture(frame, self.token_side, max(1, size // max(frame.size)))
            pictures.append((cut, f"the model gets\n{frame.width} x {frame.height} pixels"))
        if len(frames) == 1 and self.heat_shows:
            heat = self.look(model, frames[0], prompt)
            pictures.append((heat_picture(self.seen(frames[0]), heat, max(pictures[0][0].size)), self.heat_shows))
        sheet(pictures, RUNS / self.family / "seen.png", columns=len(pictures), scale=1)

    # `train_tiny.py FAMILY`, `--ablations` and `--data`

    def options(self, args):
        """What the command line changes about the training, as arguments of train."""
        return {}

    def run(self, args):
        self.split, options = args.split, self.options(args)
        SPENT.clear()
        model = self.train(args.device, args.seed, args.steps, **options)
        say(self.save(model))
        if RANK:
            return []
        claims = self.claims(model, args)
        if not args.steps:  # other lengths say nothing about the recipe
            name = f"{options.get('name', self.family)}-seed{args.seed}"
            record(self, args, name, seed=args.seed, claims=[asdict(claim) for claim in claims])
        return claims

    def ablations(self, args):
        """Every variant with seeds 0, 1, 2 and equal steps; claims about the means."""
        self.split, steps, figures = args.split, args.steps or self.ablation_steps, {}
        SPENT.clear()
        for variant, changes in self.variants.items():
            name = f"{self.family}-ablations/{variant.replace(' ', '-').replace(',', '')}"
            each = [self.measure(self.train(args.device, seed, steps, name=name, **changes)) for seed in (0, 1, 2)]
            figures[variant] = dict(zip(self.figures, zip(*each)))
            shares = [f"{what} {' '.join(f'{x:.3f}' for x in shown)}" for what, shown in figures[variant].items()]
            say(f"{variant}: {'; '.join(shares)}")
        claims = self.compare({variant: [sum(x) / 3 for x in shown.values()] for variant, shown in figures.items()})
        if not args.steps:
            record(self, args, f"{self.family}-ablations", figures=figures, claims=[asdict(claim) for claim in claims])
        return claims

    def compare(self, means):
        """{variant: its figures, means over the seeds} -> claims."""
        return [Claim(f"{self.family}: {text}", means[b][0], means[a][0], means[b][0]) for text, a, b in self.beats]

    def own_data(self, args):
        """The toy learns from your rows; of twenty or more every tenth is kept back."""
        rows, fingerprint = read_folder(args.data, self)
        held = rows[::10][:200] if len(rows) >= 20 else rows  # more would take longer to measure than to train on
        rest = [row for i, row in enumerate(rows) if i % 10] if len(rows) >= 20 else rows
        plan = self.stages[-1]
        batch = min(plan.batch, len(rest)) // WORLD_SIZE * WORLD_SIZE
        if not batch:
            stop(f"{len(rest)} rows cannot be shared by {WORLD_SIZE} processes")
        plan = replace(plan, steps=args.steps or 100, batch=batch, seed=args.seed, same=True)
        self.check_own(rest, plan)
        if not self.done():
            say(f"the toy {self.family} is not trained yet: first that (about {self.minutes} min on two free cores)")
        model = self.train(args.device, **self.options(args))

        def draw_batch(step):
            return self.collect(rng_for(args.seed, ("own", step)).sample(rest, batch), plan, step)

        @torch.no_grad()
        def measured():
            return float(self.loss(model, self.collect(held[:64], plan, 0), plan, 0)[0]), self.right(model, held)

        before = measured()
        self.fit(run_name(f"{self.family}-own", args.seed, args.steps), model, plan, draw_batch, fingerprint)
        after, words = measured(), [row[1:] for row in held]
        asked = [row[:-1] for row in words]  # guessing: for each row the text of any row that asks the same
        guessed = sum(words.count(row) / asked.count(row[:-1]) for row in words)
        which = "kept back" if rest is not rows else "trained on (too few to keep any back)"
        say(
            f"of {len(held)} rows {which}: loss {before[0]:.3f} before, {after[0]:.3f} after;",
            f"{self.rightly} for {before[1]} before, {after[1]} after; guessing is right for {guessed:.1f}",
        )
        say(f"the trained model is in {model.folder}", self.save(model))
        return []

    def right(self, model, rows):
        """For how many rows of own data is the last text written word for word?"""
        longest = 1 + max(len(ids) for ids in text_rows([row[-1] for row in rows]))
        said = self.answers(model, [(row[0], "".join(row[1:-1]) or DESCRIBE) for row in rows], longest)
        return sum(text == row[-1] for text, row in zip(said, rows))

    def shrink(self, picture):
        """What is kept of a picture of own data, so that no step has to resize it: of a photo of 12 megapixels 3 KB
        instead of 36 MB. To preprocess it again changes nothing."""
        return self.seen(picture)

    def seen(self, picture):
        """What preprocessing leaves of a picture, as a picture."""
        config = self.module.PRESETS["tiny"]
        config = getattr(config, "vision", config)
        pixels = self.module.preprocess([picture], config)[0].squeeze(0).permute(1, 2, 0).numpy()  # [H,W,3]
        pixels = 255 * (pixels * np.float32(config.std) + np.float32(config.mean))
        return Image.fromarray(pixels.round().astype(np.uint8))

    def check_own(self, rows, plan):
        """Stop before the training if own data cannot be trained on."""


def as_seen(image):
    """An image that Pillow has opened, at its present frame -> RGB, the way a person sees it: turned as its EXIF data
    say, numbers of more than 8 bits scaled."""
    image.load()  # decodes the whole file, so a truncated one is found here
    with contextlib.suppress(Exception):  # damaged EXIF data: the picture is sound, and stays as it is stored
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # grey; convert("RGB") alone would clip everything bright to white
        grey = np.nan_to_num(np.asarray(image, np.float64), posinf=0).clip(min=0)
        # only modes like I;16 have a known white; in the others it is the first of these that is large enough
        white = next(top for top in (1, 255, 65535, grey.max()) if grey.max() <= top) if len(image.mode) == 1 else 65535
        image = Image.fromarray((grey / white * 255).round().astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def load_image(path):
    """An image file, or the first frame of an animation, as_seen. Raises ValueError in one line when it cannot."""
    try:
        with Image.open(path) as image:
            return as_seen(image)
    except FileNotFoundError:
        raise ValueError(f"no such image: {path}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, DecompressionBombError, struct.error ...
        raise ValueError(f"{path} is not an image that Pillow can read ({error})") from None


def words_only(text):
    """A text without the <image> and <video> that other data sets write into it: here pictures stand in front
    anyway."""
    while (rest := re.sub("<image>|<video>", "", text)) != text:
        text = rest
    return text.strip()


def read_row(folder, line, fields):
    """One line of metadata.jsonl -> (PIL image, the words of its fields ...). Raises ValueError saying what is
    wrong."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError('not an object like {"file_name": "a.png", "text": "..."}')
    for field in ("file_name", *fields):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"no {field}")
    words = [words_only(row[field]) for field in fields]
    if not words[-1]:  # a question of nothing but <image> asks for a description; an answer must have words
        raise ValueError(f"no {fields[-1]}")
    return load_image(folder / row["file_name"]), *words


def read_folder(folder, recipe):
    """FOLDER/metadata.jsonl -> ([(image, words of its fields ...)], what the cache calls this data). Of each image only
    what the recipe's toy sees of it is kept.

    Bad rows and rows that `recipe.own` refuses are named by their line and left out; the program ends (status 2) when
    the file is missing or no row is good.
    """
    path, good, bad, fingerprint = Path(folder) / "metadata.jsonl", [], [], 0
    need = ", ".join(("file_name", *recipe.fields))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read {path} ({type(error).__name__}): --data needs a metadata.jsonl with lines of {need}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                image, *words = read_row(Path(folder), line, recipe.fields)
                image = recipe.shrink(image)
                recipe.own(image, *words)
                good.append((image, *words))
                fingerprint = zlib.crc32(image.tobytes() + repr((image.size, words)).encode(), fingerprint)
            except (ValueError, OSError, RecursionError) as error:  # the last of very many brackets
                bad.append(f"line {number}: {' '.join(str(error).split())}")
    if not good:
        stop(f"{path} has no usable row ({bad[0] if bad else 'it is empty'}): each line needs {need}")
    say(
        f"{path}: {len(good)} rows" + (f", {len(bad)} left out" if bad else ""), *(f"  {reason}" for reason in bad[:10])
    )
    if len(bad) > 10:
        say(f"  and {len(bad) - 10} more")
    return good, f"own {fingerprint}"


def check_fits(ids, context):
    """Refuse a text that is too long for the toy."""
    if len(ids) > context:
        reason = "the toy vocabulary spells words it does not know"
        raise ValueError(f"{len(ids)} tokens do not fit the context of {context} ({reason})")


def questions(rng, count, split="validation", kinds=KINDS, things=None):
    """[(scene, question, answer)] about scenes never trained on; things: how many in each."""
    scenes = [make_scene(rng, things, split=split) for _ in range(count)]
    return [(scene, *ask(scene, rng, kinds)) for scene in scenes]


def one_of_each(kinds, draw_one, *key):
    """Examples for a demo: what draw_one(rng, kind) draws for each kind, again if it is None. They depend on the kinds
    and the key alone; whether a model is right about them plays no part."""
    shown = []
    for n, kind in enumerate(kinds):
        rng, example = rng_for(*key, n), None
        while example is None:
            example = draw_one(rng, kind)
        shown.append(example)
    return shown


def question_example(rng, kind, things=None, split="validation"):
    """(scene, question, answer) of this kind about a scene never trained on, or None where it makes no sense."""
    scene = make_scene(rng, things, split=split)
    asked = question(kind, scene, rng)
    return asked and (scene, *asked)


def strings(sample):
    """All texts in lists and tuples. The third of a tuple is its kind or its label, no text."""
    if isinstance(sample, str):
        return [sample]
    parts = sample[:2] if isinstance(sample, tuple) else sample if isinstance(sample, list) else ()
    return [text for part in parts for text in strings(part)]


def words_in(text):
    """The words and the digits of a text, without special tokens. Capitals count: they are other tokens."""
    return re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*|\d", re.sub(r"<[^<>]*>|\[MASK\]", " ", text))


def asked_place(scene, question):
    """The place that a question with "what" or "where" is about: the one it names, or that of the only thing with the
    colour and shape it names. Otherwise None."""
    words = question.rstrip("?").split()
    if words[0] not in ("what", "where"):
        return None
    named = [word for word in words if word in (*COLOURS, *SHAPES, *PLACES)]
    places = [thing.place for thing in scene.things if all(word in (*thing.pair, thing.place) for word in named)]
    places = [word for word in named if word in PLACES] or places
    return places[0] if len(places) == 1 else None


def looked_at(heat, scene):
    """Attention to the patches [rows,columns] -> (the place with most of it, the thing there or None, its share of it
    all). Each quarter of the canvas has one thing of the scene or none."""
    rows, columns = heat.shape
    halves = heat.repeat_interleave(2, 0).repeat_interleave(2, 1).view(2, rows, 2, columns)  # a middle row is in both
    quarters = halves.sum((1, 3)).flatten()  # in the order of PLACES
    place = PLACES[quarters.argmax()]
    return place, next(iter(only(scene, place=place)), None), float(quarters.max() / quarters.sum())


def distraction(heat, scene, question):
    """What may explain a wrong answer, or "": more than half of the attention was at another place than the question is
    about. Less than half proves little, since with many right answers the largest share is elsewhere too."""
    place, thing, share = looked_at(heat, scene)
    if share <= 0.5 or asked_place(scene, question) in (None, place):
        return ""
    there = f"at the {thing.name}" if thing else "where nothing is"
    return f"; {share:.0%} of its attention to the image was {place}, {there}"


def guess(asked):
    """The accuracy of a model that knows the questions but not the pictures: always the commonest answer to such a
    question, where questions are alike that differ in colours, shapes and places only. asked: [(..., question,
    answer)]."""
    words, kinds = {*COLOURS, *SHAPES, *PLACES}, {}
    for _, question, answer in asked:
        kind = " ".join("_" if word in words else word for word in question.rstrip("?").split())
        kinds.setdefault(kind, []).append(answer)
    return sum(max(given.count(a) for a in set(given)) for given in kinds.values()) / len(asked)


def sheet(pictures, path, columns=4, scale=4):
    """Write a PNG of pictures with lines of text below each: pictures is a list of (PIL image, text)."""
    font = ImageFont.load_default(14)
    tall = max(image.height * scale + 18 * (text.count("\n") + 1) + 10 for image, text in pictures)
    rows = -(-len(pictures) // columns)
    wide_of = lambda text: max(font.getlength(line) for line in text.split("\n"))
    wide = 20 + math.ceil(max(max(image.width * scale, wide_of(text)) for image, text in pictures))
    page = Image.new("RGB", (columns * wide + 10, rows * tall + 10), "white")
    pen = ImageDraw.Draw(page)
    for n, (image, text) in enumerate(pictures):
        x, y = 10 + n % columns * wide, 10 + n // columns * tall
        page.paste(image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + image.height * scale + 2), text, fill="black", font=font, spacing=2)
    save_picture(page, path)


def save_picture(page, path, what=""):
    write_file(path, page.save)
    say(f"written: {path}" + (f" ({what})" if what else ""))


def world_sheet():
    """`python train_tiny.py world`: a page of samples of everything the world can show and ask."""
    rng = rng_for("a look at the world")
    pictures = []
    for size in ((32, 32),) * 6 + ((48, 32), (32, 40)):
        scene = make_scene(rng)
        asked, answer = ask(scene, rng)
        pictures.append((draw(scene, *size), f"{caption(scene, rng)}\n{asked} {answer}".replace(", ", ",\n")))
    frames, asked, answer = movie(rng)
    pictures += [(draw(frame), f"frame {i + 1}\n{asked} {answer}") for i, frame in enumerate(frames)]
    number, asked, answer = read_number(rng)
    pictures.append((draw_number(number), f"{asked} {answer}"))
    scene = unseen_pair_scene(rng, 2)
    pictures.append((draw(scene), f"only in tests:\n{caption(scene)}".replace(", ", ",\n")))
    sheet(pictures, RUNS / "world.png")
    say("in text only, for a language model:\n" + text_line(rng))


def cut_picture(image, side, scale):
    """The image `scale` times as large, with a line around every square of side x side pixels: a patch or a token."""
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, side = ImageDraw.Draw(image), side * scale
    for x in range(0, image.width, side):
        for y in range(0, image.height, side):
            pen.rectangle((x, y, x + side - 1, y + side - 1), outline="#ff8800")
    return image


def heat_picture(image, heat, size):
    """The image with its longer side at `size`, darkened where little attention falls. heat [rows,columns]."""
    image = framed(image, (), size)
    shade = Image.fromarray((255 * heat / heat.max().clamp(min=1e-9)).to(torch.uint8).numpy())
    shade = shade.resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size), shade)


# ----------------------------------------------------------------------------------------------------------------------
# CLIP and SigLIP


def toy_clip(device="cpu"):
    """The standard toy CLIP: the frozen vision tower of the other families. Trained on the first call, then cached."""
    return CLIPRecipe().train(device)


class CLIPRecipe(Recipe):
    module, model_class = clip, clip.CLIP
    minutes, rightly = 1, "the right text is found among theirs"
    heat_shows = "the patches that carry\nthe best text's similarity"
    stages = (Plan("", 300, 64, lr=1e-3, muon=2e-3, weight_decay=1.0),)
    variants = {f"{loss} {B}": dict(loss=loss, batch=B) for B in (16, 128) for loss in ("softmax", "sigmoid")}
    ablation_steps = 500
    figures = ("right captions found",)

    def train(self, *args, batch=None, **changes):
        """batch: an ablation's, instead of the plan's."""
        if batch:
            self.stages = tuple(replace(plan, batch=batch) for plan in self.stages)
        return super().train(*args, **changes)

    def options(self, args):
        return dict(name=f"clip-{args.loss}", loss=args.loss) if args.loss != "softmax" else {}

    def start(self, device, seed, loss="softmax", tower=None, vision=None):
        """tower: a trained vision tower to start from. vision: one of another kind, whose class token comes first."""
        torch.manual_seed(seed)
        config = clip.PRESETS["tiny"]
        if loss == "sigmoid":  # SigLIP: no class token, text that is not causal
            without = replace(config.vision, class_token=False, ln_pre=False)
            config = replace(config, loss=loss, vision=without, text=replace(config.text, causal=False))
        model = clip.CLIP(config)
        if loss == "sigmoid":  # one pair in B matches: SigLIP's -10 suits its B of 32 thousand
            torch.nn.init.constant_(model.logit_bias, -math.log(self.stages[-1].batch))
        assemble(model, device, **({"vision": tower} if tower else {}))
        if vision:
            model.vision = vision.to(device)
            model.vision.ln_post = torch.nn.Identity()  # where CLIP normalises its class token
            model.lineage = {"vision": [repr(vision.config), code_of(sys.modules[vision.__module__], ())]}
        return model

    def batch(self, plan, step):
        """[(picture, caption)]. All scenes of a step have equally many things: counting them does not help."""
        count = rng_for(plan.seed, step).choice((1, 2, 2, 3, 4))
        scenes = [(make_scene(rng, count), rng) for rng in batch_rngs(plan.seed, step, plan.batch)]
        return [(draw(scene), caption(scene, rng)) for scene, rng in scenes]

    def features(self, model, samples):
        """[(picture, text)] -> image and text features [B,E] of length one."""
        pixels = clip.preprocess([picture for picture, _ in samples], model.config.vision)
        image = model.encode_image(pixels.to(model.logit_scale.device))
        return image, clip.encode_prompts(model, [text for _, text in samples], self.tokenizer_of(model))

    def tokenizer_of(self, model):
        """The toy's `tokenize` (see clip.encode_prompts). Causal text needs no mask: padding comes after it."""

        def tokenize(texts):
            ids, mask = pad(text_rows(texts, model.config.text.context))
            return ids, None if model.config.text.causal else mask

        return tokenize

    def loss(self, model, samples, plan, step):
        features = [joint(x) for x in self.features(model, share(samples))]
        if plan.same:
            names = [zlib.crc32(text.encode()) for _, text in samples]
            features.append(torch.tensor(names, device=features[0].device))
        return model.loss(*features)

    def expected(self, model, plan):
        return ("ln B", math.log(plan.batch)) if model.config.loss == "softmax" else None

    def after_step(self, model):
        model.clip_logit_scale()

    def own(self, picture, text):
        check_fits(text_rows([text])[0], clip.PRESETS["tiny"].text.context)
        return picture, text

    def check_own(self, rows, plan):
        texts = len({text for _, text in rows})
        if min(plan.batch, texts) < 2:
            stop(f"a contrastive loss tells at least two texts apart, the data have {texts}")

    def right(self, model, rows):
        return round(self.retrieval(model, rows) * len(rows))

    @torch.no_grad()
    def retrieval(self, model, samples):
        """The share of pictures for which the most similar text of all is a right one: two may share theirs."""
        image, text = self.features(model, samples)
        best = (image @ text.T).argmax(1).tolist()
        return sum(samples[i][1] == samples[j][1] for i, j in enumerate(best)) / len(samples)

    def naming(self, model, scenes, templates):
        """The share of one-thing scenes whose pair is the best of the 30, each given by name only (zero-shot)."""
        pixels = clip.preprocess([draw(scene) for scene in scenes], model.config.vision).to(model.logit_scale.device)
        names = [" ".join(pair) for pair in PAIRS]
        best = clip.zero_shot(model, pixels, names, templates, self.tokenizer_of(model)).argmax(1).tolist()
        return sum(PAIRS[i] == scene.things[0].pair for i, scene in zip(best, scenes)) / len(scenes)

    def claims(self, model, args):
        rng = rng_for("clip claims", self.split)
        right = self.retrieval(model, unseen_samples(rng, 512, self.split))
        pairs = [unseen_pair_scene(rng, 1) for _ in range(300)]
        bare, ensemble = self.naming(model, pairs, ("{}",)), self.naming(model, pairs, TEMPLATES)
        return [
            Claim("clip: retrieval, right caption among 512 unseen scenes", 1 / 512, right, 0.95, 512),
            Claim("clip: naming pairs never seen in training, 30 ways", 1 / 30, ensemble, 0.80, len(pairs)),
            Claim("clip: template ensemble no worse than the bare name", 1 / 30, ensemble, bare),
        ]

    def measure(self, model):
        return [self.retrieval(model, unseen_samples(rng_for("clip ablations"), 512, self.split))]

    def compare(self, means):
        (softmax16,), (sigmoid16,), (softmax128,), (sigmoid128,) = means.values()
        even = softmax128 - abs(sigmoid128 - softmax128)
        return [
            Claim("clip: sigmoid no worse than softmax at batch 16", softmax16, sigmoid16, softmax16),
            Claim("clip: sigmoid and softmax within 0.03 at batch 128", softmax128, even, softmax128 - 0.03),
        ]

    # The workbench

    def example(self, model):
        pictures, texts = zip(*unseen_samples(rng_for("trace"), 2))
        ids, _ = self.tokenizer_of(model)(texts)
        return dict(pixels=clip.preprocess(pictures, model.config.vision), ids=ids)

    def ask(self, args):
        """--image and --prompt: how well each of your prompts fits each of your images, the best first."""
        images, prompts = self.load_images(args), args.prompt
        if args.weights and not (images and prompts):
            raise ValueError("--weights needs images and prompts: --image photo.jpg --prompt 'a cat' --prompt 'a dog'")
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("the prompt is empty: write what to look for, as in --prompt 'a red circle'")
        if args.weights:
            model, tokenize = self.published(args)
        else:
            prompts = prompts or ["a red circle", "a blue square", "a green triangle"]
            for ids in text_rows(prompts):
                check_fits(ids, clip.PRESETS["tiny"].text.context)
            if args.fresh:
                forget("clip")
            model = self.train(args.device)
            tokenize = self.tokenizer_of(model)
        [(picture, text)] = unseen_samples(rng_for("clip demo"), 1)
        shares = clip.rank_prompts(model, images or [picture], prompts, tokenize)
        for name, row in zip(args.image or [f"[{text}]"], shares):
            order = row.argsort(descending=True).tolist()
            say(name, *(f"  {100 * row[i]:5.1f} %  {prompts[i]}" for i in order))
        if not args.weights:
            self.explain(model, images, [prompts[i] for i in shares[0].argsort(descending=True)])

    def look(self, model, picture, text):
        return patch_importance(model, picture, clip.encode_prompts(model, [text], self.tokenizer_of(model))[0]).relu()

    def published(self, args):
        """--weights -> (model, tokenize for args.prompt). Prompts that are too long are found before loading."""
        rows, padding = [], {}

        def check(config, tokenizer):
            padding.update(tokenizer.padding or {})  # SigLIP 2 pads with a word of its own, and attends to it
            tokenizer.no_padding()
            tokenizer.no_truncation()
            rows.extend(tokenizer.encode(prompt).ids for prompt in args.prompt)
            longest, context = max(map(len, rows)), config.text.context
            if longest > context:
                stop(f"clip.py: a prompt has {longest} tokens, the context holds {context}: shorten it")

        model, _ = load_published(self, args, check)
        return model, lambda prompts: (clip.pad_texts(rows, model.config.text, padding.get("pad_id")), None)

    def demo(self, args):
        rng = rng_for("clip demo")
        samples, unseen = unseen_samples(rng, 256), [unseen_pair_scene(rng, 1) for _ in range(120)]
        say("A world of coloured shapes. An image of 32 x 32 pixels is 16 patches; its text is, for example:")
        say(f"    {samples[0][1]}")
        before = self.retrieval(self.start(args.device, seed=0), samples)
        say(f"before training, the right text among 256 is found for {before:.0%} (guessing: 0.4 %)")
        model = self.train(args.device)
        say(f"after training, for {self.retrieval(model, samples):.0%} of images it has never seen")
        say(f"pairs never shown in training ({', '.join(' '.join(pair) for pair in UNSEEN_PAIRS)}):")
        say(f"    named rightly, out of 30, {self.naming(model, unseen, TEMPLATES):.0%} (guessing: 3 %)")
        few = one_of_each((2, 3, 4) * 2 + (2,), lambda rng, n: make_scene(rng, n, split="validation"), "clip demo")
        pictures, texts = zip(*((draw(scene), caption(scene)) for scene in (*few, unseen[0])))
        similarity = clip.rank_prompts(model, pictures, texts, self.tokenizer_of(model))
        text = clip.encode_prompts(model, texts, self.tokenizer_of(model))[-1]
        heat = patch_importance(model, pictures[-1], text)
        say(f"\nwhich patches carry the similarity to {texts[-1]!r}? Lost when one patch is painted grey, in 1/100:")
        say(*("    " + " ".join(f"{100 * value:5.1f}" for value in row) for row in heat.tolist()))
        draw_similarity(pictures, similarity, heat, RUNS / "clip" / "demo.png")

    def masks(self):
        padded = torch.tensor([[0, 0, 0, 0, -1, -1]])
        siglip = draw_mask(6, 6, Rule(q_segments=padded, k_segments=padded))
        return [
            ("image tower: the class token and all patches attend to each other", draw_mask(5, 5)),
            ("CLIP's text tower: causal; only the end of the text attends to all", draw_mask(6, 6, Rule(causal=True))),
            ("SigLIP's text tower: both ways (here with a mask: 4 tokens and 2 of padding)", siglip),
        ]

    def costs(self, model):
        """Visual tokens and FLOPs, as lines of text."""
        config, side = model.config, model.config.vision.image_size
        T, E = config.text.context, config.embed_dim
        image = count_flops(lambda: model.vision(torch.empty(1, 3, side, side)))
        text = count_flops(lambda: model.text(torch.zeros(1, T, dtype=torch.long)))
        tokens = f"{clip.num_image_tokens(side, side, config)} tokens"
        if config.vision.class_token:
            tokens += " (one is the class token)"
        return [
            f"one stage, {config.loss} loss: all parameters are trained",
            f"image {side} x {side} -> {tokens} -> 1 vector of {E};  text of {T} tokens -> 1 vector of {E}",
            f"FLOPs: {image:,} for an image, {text:,} for a text; B pairs cost B times the sum,",
            f"and the similarity matrix 2 * B * B * {E}. No KV cache: nothing is generated.",
        ]


def unseen_samples(rng, count, split="validation"):
    """[(picture, full caption)] of scenes never trained on."""
    scenes = [make_scene(rng, split=split) for _ in range(count)]
    return [(draw(scene), caption(scene)) for scene in scenes]


@torch.no_grad()
def patch_importance(model, picture, text):
    """The similarity to a text [E] that is lost when one patch is painted grey, for each patch, [rows,columns]."""
    P, grid = model.config.vision.patch_size, model.config.vision.image_size // model.config.vision.patch_size
    pixels = clip.preprocess([picture], model.config.vision).to(text.device)
    hidden = pixels.repeat(grid * grid, 1, 1, 1)
    for i in range(grid * grid):
        y, x = P * (i // grid), P * (i % grid)
        hidden[i, :, y : y + P, x : x + P] = pixels.mean()
    similarity = model.encode_image(torch.cat([pixels, hidden])) @ text  # [1+N]
    return (similarity[0] - similarity[1:]).view(grid, grid).cpu()


def draw_similarity(pictures, similarity, heat, file):
    """PNG: each picture beside its row of similarity [B,B], where 1 is white; below, the last picture and its heat."""
    B, cell, side = len(pictures), 64, 60
    left, below = cell + 20, B * cell + 12
    page = Image.new("RGB", (left + B * cell,) * 2, "white")
    pen = ImageDraw.Draw(page)
    for i, picture in enumerate(pictures):
        page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (2, i * cell + 2))
        for j, share in enumerate(similarity[i].tolist()):
            x, y, level = left + j * cell, i * cell, int(255 * share)
            pen.rectangle((x, y, x + side, y + side), fill=(level,) * 3, outline="red" if i == j else "grey")
    page.paste(heat_picture(pictures[-1], heat.clamp(min=0), side), (2, below))
    pen.text((left, below), "the last image again: bright patches carry its similarity", fill="black")
    save_picture(page, file, f"the similarity matrix: {B} images by {B} texts, the diagonal should be bright")


# ----------------------------------------------------------------------------------------------------------------------
# ViLT


WPA_WEIGHT, WPA_NEAR, WPA_FAR = 1.5, 0.3, 1.0  # the paper's weight is 0.1, over 100 times the steps


def short_caption(scene):
    """Names only, in reading order: "a red circle and a blue square"."""
    return " and ".join(f"a {t.name}" for t in scene.things)


def near_miss(scene, rng, split="any"):
    """The scene with another colour or shape of one thing: its short caption differs in one word."""
    while short_caption(other := change_one(scene, rng, split)) == short_caption(scene):
        pass
    return other


def near_misses(rng, count, split="validation"):
    """[(picture, right text, text with one word changed)] of unseen scenes."""
    scenes = [make_scene(rng, split=split) for _ in range(count)]
    return [(draw(scene), short_caption(scene), short_caption(near_miss(scene, rng))) for scene in scenes]


def vilt_words(text):
    """A text as ViLT reads it, [CLS] words [SEP] -> (ids, for each id the number of its word or None). "<mask>" may
    stand for a word; other special tokens in the text are plain text."""
    ids, numbers = [CLS_ID], [None]
    for number, piece in enumerate(re.findall(f" ?<mask>|{SPLIT}", " " + text)):
        piece_ids = [MASK_ID] if piece.strip() == "<mask>" else tokenizer().encode_ordinary(piece)
        ids += piece_ids
        numbers += [number] * len(piece_ids)
    return ids + [SEP_ID], numbers + [None]


def hide(text, word):
    """The text with the first occurrence of a word masked."""
    return re.sub(rf"\b{word}\b", "<mask>", text, count=1)


def possible_words(scene, thing, key):
    """How many words could stand for a hidden colour, shape or place if only the rest of the text is known: pairs that
    training never shows do not occur, no pair occurs twice, and places come in reading order. Sizes are free."""
    if key == "size":
        return len(SIZES)
    i, others = scene.things.index(thing), [t.pair for t in scene.things if t is not thing]
    if key == "place":
        before = PLACES.index(scene.things[i - 1].place) if i else -1
        after = PLACES.index(scene.things[i + 1].place) if i + 1 < len(scene.things) else len(PLACES)
        return after - before - 1
    values = COLOURS if key == "colour" else SHAPES
    pairs = [replace(thing, **{key: value}).pair for value in values]
    return sum(pair in SEEN_PAIRS and pair not in others for pair in pairs)


def masked_words(rng, count, split="validation", keys=("colour", "shape", "place"), things=None):
    """[(scene, its caption with one colour, shape or place hidden, the hidden word, its possible_words)]; things: how
    many in each scene."""
    items = []
    for _ in range(count):
        scene = make_scene(rng, things, split=split)
        thing, key = rng.choice(scene.things), rng.choice(keys)
        word = getattr(thing, key)
        said = [f"{t.place} a {t.full_name}" for t in scene.things]
        i = scene.things.index(thing)
        said[i] = hide(said[i], word)
        items.append((scene, ", ".join(said), word, possible_words(scene, thing, key)))
    return items


def resnet101_flops(height, width):
    """FLOPs of the convolutions of a ResNet-101 (He et al. 2015, arXiv 1512.03385, Table 1) on one image, 2 per
    multiply-add: what ViLT leaves out."""
    area = [-(-height // 2**n) * -(-width // 2**n) for n in range(6)]  # positions after n strides of 2, rounded up
    flops, channels = area[1] * 3 * 64 * 7 * 7, 64
    for stage, blocks in enumerate((3, 4, 23, 3)):
        inner, before, after = 64 * 2**stage, area[max(2, stage + 1)], area[stage + 2]
        flops += before * channels * inner + (blocks - 1) * after * 4 * inner * inner  # 1 x 1, to fewer channels
        flops += blocks * after * (9 * inner * inner + inner * 4 * inner)  # 3 x 3, and 1 x 1 to four times as many
        flops += after * channels * 4 * inner  # the first block's shortcut changes its width
        channels = 4 * inner
    return 2 * flops


def embedding_costs(config, height, width, words=40):
    """FLOPs for one image of height x width pixels and one text: to embed the patches, in the encoder, and in a
    ResNet-101 on the same image. The paper's point (Figure 1): the encoder should be the larger part."""
    D, S = config.width, words + vilt.num_image_tokens(height, width, config)
    patches = (height // config.patch_size) * (width // config.patch_size)
    block = 2 * S * (4 * D * D + 2 * D * config.mlp_width) + 4 * S * S * D  # linear maps; scores and their sums
    return 2 * patches * 3 * config.patch_size**2 * D, config.layers * block, resnet101_flops(height, width)


def near_miss_pairs(plan, step):
    """[(picture, text)] for a CLIP that is to learn what ViLT's matching learns: half a batch of scenes, each beside
    its near miss."""
    count, rng = rng_for(plan.seed, step).choice((1, 2, 2, 3, 4)), rng_for(plan.seed, ("swap", step))
    scenes = [make_scene(one, count) for one in batch_rngs(plan.seed, ("vilt", step), plan.batch // 2)]
    pairs = [one for scene in scenes for one in (scene, near_miss(scene, rng, "train"))]
    return [(draw(scene), short_caption(scene)) for scene in pairs]


class ViLTRecipe(Recipe):
    module, model_class = vilt, vilt.ViLT
    rightly = "the right text is found among theirs"
    stages = (Plan("", 1300, 32, lr=3e-3, muon=3e-3, warmup=60, weight_decay=0.02),)
    demo_stages = (replace(stages[0], steps=800),)
    variants = {"with WPA": {}, "without WPA": dict(wpa_weight=0.0), "clip": dict(rival=True)}
    ablation_steps = 700
    figures = ("right text preferred", "words land")
    wpa_weight = WPA_WEIGHT

    def train(self, device="cpu", seed=0, steps=None, rival=False, **options):
        """rival: an ablation's CLIP. It has equally many steps and images a step, near misses of the same kind (more of
        them), the same tower to start from, and a text side that starts from nothing, like ViLT's."""
        if not rival:
            return super().train(device, seed, steps, **options)
        recipe = CLIPRecipe()
        plan = replace(recipe.stages[-1], steps=steps, batch=2 * self.stages[-1].batch, seed=seed)
        model = recipe.start(device, seed, tower=toy_clip(device).vision)
        data = f"near misses {code_of(clip, ['near_miss_pairs'])}"
        name = run_name(options["name"], seed, steps)
        return recipe.fit(name, model, plan, lambda step: near_miss_pairs(plan, step), data)

    def start(self, device, seed, wpa_weight=WPA_WEIGHT):
        """The paper starts from a ViT pretrained on images (3.1), not from BERT; this from the blocks of the toy CLIP's
        tower. They were trained with QuickGELU and go on with GELU, which is close enough."""
        torch.manual_seed(seed)
        self.wpa_weight = wpa_weight
        model = vilt.ViLT(vilt.PRESETS["tiny"])
        return assemble(model, device, blocks=toy_clip(device).vision.blocks)

    def batch(self, plan, step):
        """([(picture, text)] for masking, mostly full captions; [(picture, text, label)] for matching, short ones).

        For matching, half of the pictures are of another scene: one of the batch (as in the paper), or, so that there
        is something left to learn, one in which a single word would be another. All scenes of a step have equally many
        things."""
        counts, rng = (1,) if self.short else (1, 2, 2, 3, 4), rng_for(plan.seed, ("swap", step))
        count = rng_for(plan.seed, step).choice(counts)
        scenes = [make_scene(one, count) for one in batch_rngs(plan.seed, ("vilt", step), plan.batch)]
        told = [(short_caption if rng.random() < 0.3 else caption)(scene) for scene in scenes]
        texts = [short_caption(scene) for scene in scenes]
        matching = []
        for scene, text, i, label in zip(scenes, texts, *vilt.swap_images(texts, rng)):
            near = not label and rng.random() < 0.5
            shown = near_miss(scene, rng, split="train") if near else scenes[i]
            matching.append((draw(shown), text, label))
        return [(draw(scene), text) for scene, text in zip(scenes, told)], matching

    def loss(self, model, samples, plan, step):
        """The three losses of pretraining, in one pass over both halves of the batch."""
        (masking, matching), config, device = samples, model.config, model.pooler.weight.device
        rng, B = rng_for(plan.seed, ("mask", step)), len(masking)
        rows = [vilt.mask_whole_words(*vilt_words(text), config, rng) for _, text in masking]
        for _, text, _ in matching:
            ids, _ = vilt_words(text)
            rows.append((ids, [vilt.IGNORE_INDEX] * len(ids)))  # nothing is hidden
        ids, mask = (x.to(device) for x in pad([ids for ids, _ in rows]))
        words, _ = pad([labels for _, labels in rows], vilt.IGNORE_INDEX)
        pixels, pixel_mask = (x.to(device) for x in vilt.preprocess([one[0] for one in masking + matching], config))
        labels = torch.tensor([label for _, _, label in matching], device=device)
        x, real, _ = model.embed(pixels, ids, mask, pixel_mask)
        hidden, T = joint(model.encode(share(x), share(real))), ids.shape[1]
        mlm, metrics = vilt.mlm_loss(model.mlm_logits(hidden[:B, :T]), words[:B].to(device))
        itm, itm_metrics = vilt.itm_loss(model.itm_logits(hidden[B:]), labels)
        text, image, patches = hidden[B:, :T], hidden[B:, T + 1 :], real[B:, T + 1 :]  # without the class token
        said = vilt.text_words(ids[B:], config)
        wpa, wpa_metrics = vilt.wpa_loss(text, image, said, patches, labels, WPA_NEAR, WPA_FAR)
        return mlm + itm + self.wpa_weight * wpa, metrics | itm_metrics | wpa_metrics

    def expected(self, model, plan):
        return "ln V + ln 2, and WPA on top", math.log(2 * VOCAB_SIZE)

    def own(self, picture, text):
        check_fits(vilt_words(text)[0], vilt.PRESETS["tiny"].context)
        return picture, text

    def collect(self, rows, plan, step):
        """The same rows for masking and, half of them beside another picture, for matching."""
        texts = [text for _, text in rows]
        index, labels = vilt.swap_images(texts, rng_for(plan.seed, ("swap", step)))
        return rows, [(rows[i][0], text, label) for i, text, label in zip(index, texts, labels)]

    def right(self, model, rows):
        """For how many pictures does the right one of all texts match best?"""
        texts, found = sorted({text for _, text in rows}), 0
        for picture, right in rows:
            logits = model.itm_logits(self.read(model, [(picture, text) for text in texts])[0])
            found += texts[(logits[:, 1] - logits[:, 0]).argmax()] == right
        return found

    def prompt(self, model, asked):
        """[(picture, text)] -> what the model takes."""
        ids, mask = pad([vilt_words(text)[0] for _, text in asked])
        pixels, pixel_mask = vilt.preprocess([picture for picture, _ in asked], model.config)
        inputs = dict(pixels=pixels, ids=ids, mask=mask, pixel_mask=pixel_mask)
        return {name: x.to(model.pooler.weight.device) for name, x in inputs.items()}

    @torch.no_grad()
    def read(self, model, asked):
        """[(picture, text)] -> (hidden [B,T+1+N,D], ids [B,T])."""
        inputs = self.prompt(model, asked)
        return model(**inputs), inputs["ids"]

    @torch.no_grad()
    def masked_tokens(self, model, asked):
        """The most likely word for each "<mask>", in the order of the texts."""
        hidden, ids = self.read(model, asked)
        best = model.mlm_logits(hidden[:, : ids.shape[1]][ids == MASK_ID]).argmax(-1)
        return [tokenizer().decode([token]).strip() for token in best.tolist()]

    def recovered(self, model, items, wrong_image=False):
        """The share of masked_words that is filled in rightly; wrong_image: each beside the picture of another."""
        pictures = [draw(scene) for scene, _, _, _ in items]
        if wrong_image:
            pictures = pictures[1:] + pictures[:1]
        found = self.masked_tokens(model, [(picture, text) for picture, (_, text, _, _) in zip(pictures, items)])
        return sum(said == word for said, (_, _, word, _) in zip(found, items)) / len(items)

    @torch.no_grad()
    def match_scores(self, model, items):
        """Two lists for near_misses: the log odds that picture and text match, of the right texts and the wrong
        ones."""
        scores = []
        for which in (1, 2):
            logits = model.itm_logits(self.read(model, [(item[0], item[which]) for item in items])[0])
            scores.append((logits[:, 1] - logits[:, 0]).tolist())
        return scores

    def matching_accuracy(self, model, items):
        """Of near_misses, right texts and wrong ones alike: the share that is judged rightly."""
        right, wrong = self.match_scores(model, items)
        return (sum(score > 0 for score in right) + sum(score <= 0 for score in wrong)) / (2 * len(items))

    @torch.no_grad()
    def alignment(self, model, scene):
        """The transport plan between the words of a scene's short caption and its patches -> (words, plan
        [words,rows,columns])."""
        hidden, ids = self.read(model, [(draw(scene), short_caption(scene))])
        T, words = ids.shape[1], vilt.text_words(ids, model.config)
        image = hidden[:, T + 1 :]
        _, plan = vilt.transport(hidden[:, :T], image, words, torch.ones(image.shape[:2], device=image.device))
        side = model.config.image_size // model.config.patch_size
        said = [tokenizer().decode([token]).strip() for token in ids[words].tolist()]
        return said, plan[words].cpu().unflatten(1, (side, side))

    def words_landing(self, model, scenes):
        """(share of colour and shape words whose largest mass lies on a patch that their thing touches, share of the
        patches that it touches: what a random patch would give, how many words). Words that fit two things of a scene
        are left out."""
        hits, chance = [], []
        for scene in scenes:
            words, plan = self.alignment(model, scene)
            P = 32 // plan.shape[1]  # pixels of a drawing along one side of a patch
            for thing in scene.things:
                x0, y0, x1, y1 = pixel_box(thing, 32, 32)
                touched = torch.zeros_like(plan[0])
                touched[y0 // P : (y1 - 1) // P + 1, x0 // P : (x1 - 1) // P + 1] = 1
                for key in ("colour", "shape"):
                    if len(only(scene, **{key: getattr(thing, key)})) == 1:  # so that index finds the one word
                        best = plan[words.index(getattr(thing, key))].argmax()
                        hits.append(touched.flatten()[best].item())
                        chance.append(touched.mean().item())
        return sum(hits) / len(hits), sum(chance) / len(chance), len(hits)

    def claims(self, model, args):
        words = masked_words(rng_for("vilt words"), 400, self.split)
        misses = near_misses(rng_for("vilt matching"), 400, self.split)
        rng = rng_for("vilt landing")
        landing, darts, landed = self.words_landing(model, [make_scene(rng, split=self.split) for _ in range(200)])
        text_only = sum(1 / ways for _, _, _, ways in words) / len(words)
        recovered, missed = self.recovered(model, words), 1 - self.recovered(model, words, wrong_image=True)
        matching = self.matching_accuracy(model, misses)
        patches, encoder, resnet = embedding_costs(vilt.PRESETS["vilt-b32-mlm"], 384, 608)
        say(f"a ResNet-101 takes {resnet / patches:.0f} times the FLOPs of the patch projection on the same image")
        return [
            Claim("vilt: masked colour, shape or place recovered", text_only, recovered, 0.95, len(words)),
            Claim("vilt: masked word missed beside a wrong image", 1 - text_only, missed, 0.9 - text_only, len(words)),
            Claim("vilt: matching, colour or shape changed", 0.5, matching, 0.95, 2 * len(misses)),
            Claim("vilt: colour and shape words land on their thing", darts, landing, 0.80, landed),
            Claim("vilt-b32: FLOPs of a ResNet-101 stem / of the encoder", 0.0, resnet / encoder, 1.0),
        ]

    @torch.no_grad()
    def measure(self, model):
        """[how often the right one of two texts is preferred that are one word apart; where words land]; of a CLIP,
        which has no words to land, the first alone."""
        rng = rng_for("vilt ablations")
        scenes = [make_scene(rng, split=self.split) for _ in range(200)]
        misses = near_misses(rng, 400, self.split)
        if isinstance(model, vilt.ViLT):
            right, wrong = self.match_scores(model, misses)
            return [sum(r > w for r, w in zip(right, wrong)) / len(misses), self.words_landing(model, scenes)[0]]
        features = [CLIPRecipe().features(model, [(item[0], item[which]) for item in misses]) for which in (1, 2)]
        right, wrong = ((image * text).sum(1) for image, text in features)
        return [(right > wrong).float().mean().item()]

    def compare(self, means):
        (prefers, landing), (_, without), (dot_product,) = means.values()
        return [
            Claim("vilt: words land better with WPA than without", without, landing, without),
            Claim("vilt: right text preferred, above CLIP's dot product", dot_product, prefers, dot_product),
        ]

    # The workbench

    def example(self, model):
        """Two captions with a hidden word, beside their pictures."""
        items = masked_words(rng_for("trace"), 2)
        return self.prompt(model, [(draw(scene), text) for scene, text, _, _ in items])

    def check_question(self, question, images, toy):
        if not question.strip():
            raise ValueError("the prompt is empty: write what to look for, as in --prompt 'a red circle'")
        if toy:
            check_fits(vilt_words(question)[0], vilt.PRESETS["tiny"].context)

    def respond(self, model, picture, text):
        """A text with <mask> filled in, or the probability that a text without belongs to the picture; as a line."""
        if "<mask>" in text:
            for word in self.masked_tokens(model, [(picture, text)]):
                text = text.replace("<mask>", f"[{word}]", 1)
            return text
        with torch.no_grad():
            matches = model.itm_logits(self.read(model, [(picture, text)])[0]).softmax(-1)[0, 1]
        return f"{matches:4.0%} yes: {text}"

    def ask(self, args):
        """--image and --prompt: what fits behind each [MASK], or how well the prompts fit, for each of your images."""
        images = [load_image(path) for path in args.image]
        if args.weights and not (args.image and args.prompt):
            example = "--image photo.jpg --prompt 'a [MASK] on a couch'"
            raise ValueError(f"--weights needs --image and --prompt, as in {example}")
        prompts = [prompt if args.weights else prompt.replace("[MASK]", "<mask>") for prompt in args.prompt]
        for prompt in prompts:
            self.check_question(prompt, images, toy=not args.weights)
        if args.weights:
            lines_about = self.published(args)
        else:
            if args.fresh:
                forget("vilt")
            model, prompts = self.train(args.device, demo=True), prompts or ["a <mask> <mask>"]
            lines_about = lambda image: [self.respond(model, image, prompt) for prompt in prompts]
        scene = make_scene(rng_for("vilt demo"), 2, split="validation")
        for name, image in zip(args.image or [f"[{caption(scene)}]"], images or [draw(scene)]):
            say(name, *(f"    {line}" for line in lines_about(image)))
        if not args.weights:
            self.explain(model, images, prompts)

    @torch.no_grad()
    def image_attention(self, model, picture, text):
        """From the first hidden word or, if none is hidden, from [CLS], by which text and image are matched."""
        inputs = self.prompt(model, [(picture, text)])
        with attention_maps() as maps:  # of each layer [1,H,T+1+N,T+1+N]
            model(**inputs)
        ids = inputs["ids"][0].tolist()
        return torch.stack(maps).mean((0, 2))[0, ids.index(MASK_ID) if MASK_ID in ids else 0, len(ids) + 1 :].cpu()

    def published(self, args):
        """--weights -> a function from a picture to lines of text: masks filled in, questions answered or texts ranked,
        by the head that the checkpoint has. Wrong prompts are found before the weights are read."""
        rows = []

        def check(config, tokenizer):
            tokenizer.no_padding()
            tokenizer.no_truncation()
            rows.extend(tokenizer.encode(prompt).ids for prompt in args.prompt)
            for prompt, ids in zip(args.prompt, rows):
                if len(ids) > config.context:
                    stop(f"vilt.py: the prompt has {len(ids)} tokens, the context holds {config.context}: shorten it")
                if "mlm" in config.tasks and config.mask_token_id not in ids:
                    stop(f"vilt.py: this checkpoint fills in words; {prompt!r} has no [MASK], as in 'a [MASK] car'")

        model, tokenizer = load_published(self, args, check)
        folder, tasks = vilt.checkpoint_folder(args.weights), model.config.tasks
        answers = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label", {})

        @torch.no_grad()
        def line_about(pixels, pixel_mask, prompt, ids):
            """A number to sort by, and a line."""
            if "mlm" in tasks:
                filled, sure = vilt.fill_masks(model, pixels, ids, pixel_mask)
                shares = ", ".join(f"{share:.0%}" for share in sure.tolist())
                return 0, f"{tokenizer.decode(filled[0].tolist(), skip_special_tokens=True)}  ({shares} sure)"
            hidden = model(pixels, ids, None, pixel_mask)
            if "rank" in tasks:
                score = model.rank_score(hidden).item()
                return score, f"{score:7.2f}  {prompt}"
            best = model.vqa_logits(hidden)[0].float().sigmoid().topk(min(3, model.config.answers))
            said = [(answers.get(str(i), f"answer {i}"), share) for share, i in zip(*map(torch.Tensor.tolist, best))]
            return 0, f"{prompt} -> " + ", ".join(f"{answer} ({share:.0%})" for answer, share in said)

        def lines_about(picture):
            inputs = [x.to(args.device) for x in vilt.preprocess([picture], model.config)]
            ids = [torch.tensor([row], device=args.device) for row in rows]
            found = [line_about(*inputs, prompt, row) for prompt, row in zip(args.prompt, ids)]
            return [line for _, line in sorted(found, key=lambda one: one[0], reverse=True)]

        return lines_about

    def demo(self, args):
        self.short = not self.done()
        rng, few = rng_for("vilt demo"), dict(things=1, split="any") if self.short else {}
        scene = make_scene(rng, 1, split="any") if self.short else make_scene(rng, 2, split="validation")
        costs = embedding_costs(vilt.PRESETS["vilt-b32-mlm"], 384, 608)
        patches, encoder, resnet = (f"{flops / 1e9:.0f}" for flops in costs)
        say("In go 16 patches of an image and the words of a text, in one row, to one encoder.")
        say(f"At published size an image costs {patches} GFLOP to embed and {encoder} to read together with the text;")
        say(f"a ResNet-101 in front would cost {resnet} more.")
        torch.manual_seed(0)
        untrained, holes = vilt.ViLT(vilt.PRESETS["tiny"]).to(args.device).eval(), masked_words(rng, 200, **few)
        guessed = self.recovered(untrained, holes)
        say(f"with random weights {guessed:.0%} of masked colours, shapes and places are guessed")
        model = self.train(args.device, demo=True)
        if self.short:
            say("(in this short training it learned pictures of one thing; after python train_tiny.py vilt the demo")
            say("shows those of up to four)")
        wrong = self.recovered(model, holes, wrong_image=True)
        say(f"after training, {self.recovered(model, holes):.0%}; with a wrong image beside the text, {wrong:.0%}")
        say("\nhidden words of new images:")
        hidden_word = lambda rng, key: masked_words(rng, 1, keys=(key,), **few)[0]
        for shown, text, word, _ in one_of_each(("colour", "shape", "place", "size"), hidden_word, "vilt demo"):
            said = self.respond(model, draw(shown), text)
            say(f"    {said} ({'right' if f'[{word}]' in said else f'wrong, it is {word}'})")
        say("does the text belong to the image? One word changed:")
        for text in (short_caption(scene), short_caption(near_miss(scene, rng))):
            say(f"    {self.respond(model, draw(scene), text)}")
        words, plan = self.alignment(model, scene)
        say("\nword-patch alignment: where each word of the right text lands (its share on 16 patches, in 1/100)")
        chosen = [i for i, word in enumerate(words) if word in (*COLOURS, *SHAPES)]
        say("    " + "".join(f"{words[i]:<21}" for i in chosen))
        for rows in zip(*plan[chosen].tolist()):
            say("    " + " ".join("".join(f"{100 * share:4.0f} " for share in row) for row in rows))
        draw_alignment(draw(scene), words, plan, RUNS / "vilt" / "demo.png")

    def masks(self):
        padded = torch.tensor([[0, 0, -1, 0, 0, 0, -1, -1]])
        return [
            ("one encoder: 3 words, the class token, 4 patches; every token attends to every token", draw_mask(8, 8)),
            (
                "the same with padding: 2 words and 1 of padding, the class token, 2 patches and 2 of padding",
                draw_mask(8, 8, Rule(q_segments=padded, k_segments=padded)),
            ),
        ]

    def costs(self, model):
        """Visual tokens and FLOPs, as lines of text."""
        config, P = model.config, model.config.patch_size
        sizes = [vilt.target_size(*size, config)[::-1] for size in ((1000, 1000), (1500, 1000), (3000, 1000))]
        tokens = ", ".join(f"{h} x {w}: {vilt.num_image_tokens(h, w, config)}" for h, w in sizes)
        patches, encoder, resnet = embedding_costs(config, *sizes[1], config.context)
        return [
            f"all parameters are trained; heads: {', '.join(config.tasks)}",
            f"tokens of an image ({P} x {P} pixels each, and the class token): {tokens}",
            f"FLOPs for {sizes[1][0]} x {sizes[1][1]} pixels and {config.context} words: {patches:,} to embed the",
            f"patches, {encoder:,} in the encoder; a ResNet-101 on the same image would cost {resnet:,}.",
            "No KV cache: nothing is generated word by word. A pair must be read together, so ranking B images against",
            "B texts costs B * B passes (CLIP: B + B): the price of fusing early.",
        ]


def draw_alignment(picture, words, plan, file, size=112):
    """PNG: the picture, then once per word, darkened where little of the word lands. plan [words,rows,columns]."""
    page = Image.new("RGB", (6 * (size + 8) + 8, (len(words) // 6 + 1) * (size + 24) + 8), "white")
    pen = ImageDraw.Draw(page)
    shown = [picture.resize((size, size), Image.Resampling.NEAREST)]
    shown += [heat_picture(picture, heat, size) for heat in plan]
    for i, (word, one) in enumerate(zip(["", *words], shown)):
        x, y = 8 + i % 6 * (size + 8), 8 + i // 6 * (size + 24)
        page.paste(one, (x, y))
        pen.text((x, y + size + 2), word, fill="black")
    save_picture(page, file, "the image, and for each word of its text the patches it lands on")


# ----------------------------------------------------------------------------------------------------------------------
# LLaVA

LM_STEPS = 100


def lm_line(rng):
    return [(text_line(rng), True)]


def toy_lm(device="cpu"):
    """A decoder pretrained on the world's text alone: it knows the grammar and how questions are answered, and has
    never seen a picture. Trained on the first call, then cached in runs/lm."""
    torch.manual_seed(0)
    model = llava.LanguageModel(llava.PRESETS["tiny"].language).to(device)
    return pretrain(model, llava, "lm", Plan("", LM_STEPS, 32, lr=2e-3, muon=3e-3), lm_line)


class LLaVARecipe(Recipe):
    module, model_class, fields = llava, llava.LLaVA, ("question", "answer")
    stages = (
        Plan("stage1", 60, 16, lr=5e-3),
        Plan("", 1500, 16, lr=2e-3, muon=3e-3, warmup=100, weight_decay=0.02),
    )
    demo_stages = (stages[0], replace(stages[1], steps=500, warmup=50))
    variants = {"recipe": {}, "no stage 1": dict(skip=("stage1",)), "linear": dict(projector="linear")}
    beats = (
        ("with stage 1 better than without", "recipe", "no stage 1"),
        ("MLP projector no worse than linear", "recipe", "linear"),
    )

    def start(self, device, seed, **changes):
        """As stage 1 finds it: the toy CLIP's tower, the toy language model, and a random projector between them."""
        torch.manual_seed(seed)
        model = llava.LLaVA(replace(llava.PRESETS["tiny"], **changes))
        return assemble(model, device, vision=toy_clip(device).vision, language=toy_lm(device))

    def freeze(self, model, plan):
        llava.freeze(model, 1 if plan.stage else 2)

    def batch(self, plan, step):
        """[(picture, turns)]. Stage 1: the caption of a scene. Stage 2: four questions, and the caption in between."""
        samples, count = [], rng_for(plan.seed, "llava", step).choice((1, 2, 2, 3, 3, 4))  # things in each scene
        for rng in batch_rngs(plan.seed, (1 if plan.stage else 2, step), plan.batch):
            scene = make_scene(rng, count)
            turns = [] if plan.stage else [ask(scene, rng, self.kinds) for _ in range(4)]
            turns.insert(0 if plan.stage else rng.randrange(5), (DESCRIBE, caption(scene)))
            samples.append((draw(scene), turns))
        return samples

    def row(self, turns):
        return llava.encode_conversation(turns, encode, llava.PRESETS["tiny"])

    def loss(self, model, samples, plan, step):
        """Only the answers count; padding is to the right of all labels."""
        device = next(model.parameters()).device
        rows = [self.row(turns) for _, turns in samples]
        ids, _ = pad([ids for ids, _ in rows])
        labels, _ = pad([labels for _, labels in rows], llava.IGNORE_INDEX)
        pixels = llava.preprocess([picture for picture, _ in share(samples)], model.config.vision).to(device)
        return llava.language_loss(joint(model(share(ids).to(device), pixels)), labels.to(device))

    def own(self, picture, question, answer):
        turns = [(question or DESCRIBE, answer)]
        check_fits(self.row(turns)[0], llava.PRESETS["tiny"].language.context)
        return picture, turns

    def prompt(self, model, asked):
        """[(scene, question)] -> what model.generate takes."""
        device, side = next(model.parameters()).device, model.config.vision.image_size
        tokens = llava.num_image_tokens(side, side, model.config)
        rows = [encode(llava.expand_images(llava.build_prompt(question), tokens)) for _, question in asked]
        ids, mask = llava.pad_rows(rows, PAD_ID, left=True)
        pixels = llava.preprocess([draw(scene) for scene, _ in asked], model.config.vision)
        return dict(ids=ids.to(device), pixels=pixels.to(device), mask=mask.to(device))

    def claims(self, model, args):
        vqa = questions(rng_for("llava claims"), 400, self.split)
        unseen = unseen_pair_questions(rng_for("llava unseen", self.split), 300)
        swaps = swapped_questions(rng_for("llava swaps"), 200, self.split)
        one = self.answers(model, [(scene, question) for scene, _, question, _, _ in swaps])
        two = self.answers(model, [(other, question) for _, other, question, _, _ in swaps])
        swapped = sum(a == right and b == other for a, b, (*_, right, other) in zip(one, two, swaps)) / len(swaps)
        new = self.accuracy(model, unseen)
        return [
            Claim("llava: questions about unseen scenes", guess(vqa), self.accuracy(model, vqa), 0.90, len(vqa)),
            Claim("llava: another image, another answer", 0.0, swapped, 0.90, len(swaps)),
            Claim("llava: questions about pairs never seen in training", guess(unseen), new, 0.80, len(unseen)),
        ]

    def measure(self, model):
        return [self.accuracy(model, questions(rng_for("llava ablations"), 400, self.split))]

    # The workbench

    def check_question(self, question, images, toy):
        prompt = llava.build_prompt(question, max(len(images), int(toy)))
        if toy:
            tokens = llava.num_image_tokens(32, 32, llava.PRESETS["tiny"])
            check_fits(encode(llava.expand_images(prompt, tokens)), llava.PRESETS["tiny"].language.context - 16)

    def demo(self, args):
        self.short = not self.done()
        asked = one_of_each((*self.kinds, *self.kinds)[:7], question_example, "llava demo")
        say("In goes an image of 32 x 32 pixels, 16 patches, and a question; the decoder reads both as one row of 16")
        say(f"vectors and words:\n    {llava.build_prompt(asked[0][1])!r}")
        untrained = self.start(args.device, seed=0)
        said = self.answers(untrained, asked[:3], 40)
        say(f"before training it says: {', '.join(repr(text[:24]) for text in said)}")
        model, pictures = self.train(args.device, demo=True), []
        say("\nafter training, about images it has never seen:")
        for (scene, question, right), text in zip(asked, self.answers(model, asked, 40)):
            verdict = self.verdict(model, scene, draw(scene), question, text, right)
            say(f"    [{caption(scene)}]\n        {question} -> {text} ({verdict})")
            maps = [self.look(m, draw(scene), question) for m in (untrained, model)]
            pictures.append((draw(scene), *maps, f"{question}\n{text}\n({verdict.split(';')[0]})"))
        many = questions(rng_for("llava demo, many"), 200, kinds=self.kinds)
        say(
            f"of 200 more questions {self.accuracy(model, many):.0%} are answered rightly (guessing: {guess(many):.0%})"
        )
        if self.short:
            say("(in this short training it learned to answer about places; to find a thing by its colour or shape")
            say("takes longer: after python train_tiny.py llava the demo shows that too)")
        say("\nattention from the first answer to the 16 patches, untrained and trained, in 1/100:")
        for rows in zip(*(heat.tolist() for heat in pictures[0][1:3])):
            say("    " + "      ".join(" ".join(f"{100 * value:5.1f}" for value in row) for row in rows))
        draw_attention(pictures, RUNS / "llava" / "demo.png")

    def masks(self):
        padded = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0]])
        return [
            ("vision tower: the class token and all patches see each other", draw_mask(5, 5)),
            (
                "decoder: causal over words and patches alike, here 2 words, 4 patches, 2 words",
                draw_mask(8, 8, Rule(causal=True)),
            ),
            (
                "decoder, a row with 2 tokens of padding on the left",
                draw_mask(8, 8, Rule(causal=True, q_segments=padded, k_segments=padded)),
            ),
            ("decoder with a KV cache: 2 new tokens after 6 cached ones", draw_mask(2, 8, Rule(causal=True))),
        ]

    def costs(self, model, words=64):
        """What trains in which stage, visual tokens, FLOPs and KV cache, as lines of text; of a model on the meta
        device."""
        config, language, side = model.config, model.config.language, model.config.vision.image_size
        tokens, pixels = llava.num_image_tokens(side, side, config), torch.empty(1, 3, side, side, device="meta")
        prompt = torch.empty(1, tokens + words, language.width, device="meta")
        weights = count_parameters(model.language)
        if not language.tie_embeddings:
            weights -= language.vocab_size * language.width  # looked up, not multiplied
        cache = 2 * language.layers * language.kv_heads * language.head_width  # numbers per token: keys and values
        encode_image = count_flops(lambda: model.image_tokens(pixels))
        read = count_flops(lambda: model.language.hidden(prompt))
        return [
            *(trained_share(model, llava.freeze, stage) for stage in (1, 2)),
            f"image {side} x {side} -> {tokens} tokens in the decoder ({side} // {config.vision.patch_size} squared"
            f"{', and the class token' if config.keep_class_token else ''})",
            f"FLOPs: {encode_image:,} to encode an image, {read:,} to read it with {words} words,",
            f"{2 * weights:,} for each new word, but for its attention",
            f"KV cache: {2 * cache:,} bytes a token in 16 bits, {2 * cache * tokens:,} for one image",
        ]


def draw_attention(pictures, file, size=96):
    """PNG: for each (picture, heat before, heat after, text) the picture, where the answer looked, and the text."""
    page = Image.new("RGB", (3 * size + 360, len(pictures) * (size + 8) + 24), "white")
    pen = ImageDraw.Draw(page)
    for x, title in ((4, "image"), (size + 8, "looks, untrained"), (2 * size + 12, "looks, trained")):
        pen.text((x, 4), title, fill="black")
    for i, (picture, before, after, text) in enumerate(pictures):
        y = 24 + i * (size + 8)
        page.paste(picture.resize((size, size), Image.Resampling.NEAREST), (4, y))
        page.paste(heat_picture(picture, before, size), (size + 8, y))
        page.paste(heat_picture(picture, after, size), (2 * size + 12, y))
        pen.multiline_text((3 * size + 24, y + 8), text, fill="black", spacing=6)
    save_picture(page, file, "each image, its answer, and where the answer looked")


def swapped_questions(rng, count, split):
    """[(scene, other scene, question, answer, other answer)]: the same question with different answers."""
    pairs = []
    while len(pairs) < count:
        one, two = make_scene(rng, split=split), make_scene(rng, split=split)
        place = rng.choice(PLACES)
        first, second = only(one, place=place), only(two, place=place)
        if first and second and first[0].full_name != second[0].full_name:
            pairs.append((one, two, f"what is {place}?", f"a {first[0].full_name}", f"a {second[0].full_name}"))
    return pairs


def unseen_pair_questions(rng, count):
    """[(scene, question, answer)] whose answer is about a thing of a pair never seen in training."""
    asked = []
    while len(asked) < count:
        scene = unseen_pair_scene(rng)
        thing = next(t for t in scene.things if t.pair in UNSEEN_PAIRS)
        text, answer = ask(scene, rng, [kind for kind in KINDS if kind != "count"])
        if any(word in text.rstrip("?").split() for word in (thing.shape, thing.colour, thing.place)):
            asked.append((scene, text, answer))
    return asked


# ----------------------------------------------------------------------------------------------------------------------
# BLIP-2

OPT_STEPS = 500


def told_scene(rng):
    """A scene told in words, in any order, then described in reading order, as (text, does the loss count it?): a
    language model learns to find what it needs in what it is told. In stage 2 the queries tell it, by vectors."""
    scene = make_scene(rng)
    told = ", ".join(f"{t.place} a {t.full_name}" for t in rng.sample(scene.things, len(scene.things)))
    return chat(told, [(DESCRIBE, caption(scene))])


def toy_opt(device="cpu"):
    """A decoder pretrained on text alone to describe what it is told; BLIP-2 never changes it. Cached in runs/opt. What
    it is told is random and cannot be predicted, so the loss counts only what it answers."""
    torch.manual_seed(0)
    model = blip2.OPT(blip2.PRESETS["tiny"].language).to(device)
    return pretrain(model, blip2, "opt", Plan("", OPT_STEPS, 32, lr=3e-3, muon=6e-3), told_scene)


class BLIP2Recipe(Recipe):
    module, model_class = blip2, blip2.BLIP2
    minutes = 4
    asked = ""  # the images alone, as own data teach it
    stages = (
        Plan("stage1", 800, 16, lr=3e-3, muon=6e-3),
        Plan("", 1200, 16, lr=3e-3, muon=1.2e-2, weight_decay=0.02),
    )
    demo_stages = (replace(stages[0], steps=100), replace(stages[1], steps=800))
    variants = {"both stages": {}, "stage 2 alone": dict(skip=("stage1",))}  # the paper's Figure 5
    beats = (("stage 1 then stage 2 better than stage 2 alone", "both stages", "stage 2 alone"),)
    ablation_steps = 150
    figures = ("captions exactly right",)

    def start(self, device, seed):
        """As stage 1 finds it: the toy CLIP's tower without its last block, the toy OPT, and between them a random
        Q-Former. The LayerNorm on top of the tower is new too."""
        torch.manual_seed(seed)
        model = blip2.BLIP2(blip2.PRESETS["tiny"])
        tower = toy_clip(device).vision
        del tower.blocks[len(model.vision.blocks) :]
        tower.ln_post = model.vision.ln_post
        return assemble(model, device, vision=tower, language=toy_opt(device))

    def freeze(self, model, plan):
        blip2.freeze(model, 1 if plan.stage else 2)

    def batch(self, plan, step):
        """[(picture, caption)]. Stage 1: the last four are near misses of scenes, so that contrast and matching do not
        run out of things to learn. Stage 2: many scenes of three and four things, where the vectors must say most."""
        rngs = batch_rngs(plan.seed, (1 if plan.stage else 2, step), plan.batch)
        counts = (1, 2, 2) if self.short else (None,) if plan.stage else (1, 2, 3, 3, 4, 4)
        scenes = [make_scene(rng, rng.choice(counts)) for rng in rngs]
        if plan.stage:
            scenes[-4:] = [change_one(scene, rng) for scene, rng in zip(scenes, rngs[-4:])]
        return [(draw(scene), caption(scene)) for scene in scenes]

    def texts(self):
        return [DESCRIBE, *super().texts()]  # which the prompt of stage 2 has (see row)

    def prompt_row(self, question):
        """The ids of a question about an image: as in told_scene, but told by queries in the place of words."""
        return encode(f"USER: {'<image>' * blip2.PRESETS['tiny'].qformer.queries}\n{question} ASSISTANT:")

    def row(self, text):
        """A description behind the prompt -> ids and labels. Only the description counts."""
        prompt, reply = self.prompt_row(DESCRIBE), text_rows([f" {text}"])[0]
        return prompt + reply, [blip2.IGNORE_INDEX] * len(prompt) + reply

    def loss(self, model, samples, plan, step):
        """Stage 1: contrast, matching, generation. It is not shared by processes, since wrong pairs are chosen from the
        whole batch. Stage 2: OPT writes the text; padding is to the right of it."""
        device, pictures, texts = model.query_tokens.device, *zip(*samples)
        pixels = blip2.preprocess(pictures, model.config.vision).to(device)
        if plan.stage:
            ids, mask = qformer_rows(texts)
            hard_negatives = torch.Generator().manual_seed(1_000_003 * plan.seed + step)
            return model.stage1_loss(pixels, ids.to(device), mask.to(device), hard_negatives)
        rows = [self.row(text) for text in texts]
        ids, _ = pad([ids for ids, _ in rows])
        labels, _ = pad([labels for _, labels in rows], blip2.IGNORE_INDEX)
        return blip2.language_loss(joint(model(share(pixels), share(ids).to(device))), labels.to(device))

    def expected(self, model, plan):
        """Of the three losses of stage 1 together."""
        return ("ln B + ln 2 + ln V", math.log(2 * plan.batch * VOCAB_SIZE)) if plan.stage else None

    def own(self, picture, text):
        check_fits(self.row(text)[0], blip2.PRESETS["tiny"].language.context)
        return picture, text

    def inputs(self, model, pictures, questions):
        """A question about each picture -> what model.generate takes."""
        device = model.query_tokens.device
        ids, mask = blip2.pad_rows([self.prompt_row(question) for question in questions], PAD_ID, left=True)
        pixels = blip2.preprocess(pictures, model.config.vision)
        return dict(ids=ids.to(device), pixels=pixels.to(device), mask=mask.to(device))

    def prompt(self, model, asked):
        """[(scene, question)] -> what model.generate takes."""
        return self.inputs(model, [draw(scene) for scene, _ in asked], [question for _, question in asked])

    def captions(self, model, scenes):
        """What OPT writes about each scene."""
        return self.answers(model, [(scene, DESCRIBE) for scene in scenes], 40)

    def claims(self, model, args):
        """Contrast and matching are measured after stage 1, because stage 2 is free to forget them."""
        rng = rng_for("blip2 claims")
        scenes = [make_scene(rng, split=self.split) for _ in range(400)]
        contrast, matching = reranking(self.train(args.device, args.seed, until="stage1"), self.split)
        right, frozen = exactly_right(self.captions(model, scenes), scenes), frozen_share("blip2-opt-2.7b", 2)
        return [
            Claim("blip2: captions of unseen scenes, exactly right", 0.0, right, 0.90, len(scenes)),
            Claim("blip2: recall@1, matching above contrast alone", contrast, matching, contrast + 0.005),
            Claim("blip2-opt-2.7b: share that stage 2 leaves frozen", 0.0, frozen, 0.95),
        ]

    def measure(self, model):
        rng = rng_for("blip2 ablations")
        scenes = [make_scene(rng, split=self.split) for _ in range(400)]
        return [exactly_right(self.captions(model, scenes), scenes)]

    # The workbench

    def check_question(self, question, images, toy):
        blip2.build_prompt(question)  # refuses <image>
        if toy:
            check_fits(self.prompt_row(question), blip2.PRESETS["tiny"].language.context - 16)

    def look(self, model, picture, question):
        """OPT attends to the queries and these attend to the patches: the product of both."""
        heats = query_attention(model, picture)  # [L,rows,columns]
        return (self.image_attention(model, picture, question)[:, None, None] * heats).sum(0)

    def answer(self, model, images, question, encode, decode):
        """The toy's prompt has the placeholders inside. Each image gets an answer, behind the question again: BLIP-2
        reads one image at a time."""
        inputs = self.inputs(model, images, [question] * len(images))
        longest = min(32, model.config.language.context - inputs["ids"].shape[1])
        new = model.generate(**inputs, max_new_tokens=longest, eos_id=EOS_ID)
        return f"\n{question} -> ".join(decode(row).strip() for row in new.tolist())

    def ask(self, args):
        """Of a published checkpoint: it describes each image, answers about it, or (one for retrieval) judges how well
        each prompt fits."""
        if not args.weights:
            return super().ask(args)
        images, prompts = [load_image(path) for path in args.image], args.prompt or [""]  # "" asks for a caption
        if not images:
            raise ValueError("--weights needs --image, as in --weights DIR --image photo.jpg --prompt 'what is this?'")
        for prompt in prompts:
            self.check_question(prompt, images, toy=False)

        def check(config, tokenizer):
            """Before the weights are read: are there words to judge, does each prompt fit?"""
            tokenizer.no_padding()
            tokenizer.no_truncation()
            judges = config.language is None
            if judges and not all(prompt.strip() for prompt in prompts):
                stop("blip2.py: a checkpoint for retrieval judges texts, as in --prompt 'a cat' --prompt 'a dog'")
            for prompt in prompts:
                ids = tokenizer.encode(prompt if judges else blip2.build_prompt(prompt)).ids
                ids = ids if judges else blip2.prompt_ids(ids, config)
                context = (config.qformer if judges else config.language).context
                if len(ids) > context:
                    stop(f"blip2.py: the prompt has {len(ids)} tokens, the context holds {context}: shorten it")

        model, tokenizer = load_published(self, args, check)
        ids_of = lambda text: tokenizer.encode(text).ids
        for path, image in zip(args.image, images):
            if model.config.language is None:
                belongs, cosines = blip2.judge(model, image, prompts, ids_of)
                say(f"{path}: do they belong together (ITM), and their cosine (ITC)")
                for i in belongs.argsort(descending=True).tolist():
                    say(f"  {100 * belongs[i]:5.1f} %  {cosines[i]:6.3f}  {prompts[i]}")
            else:
                for prompt in prompts:
                    asked = f"{path}: {blip2.build_prompt(prompt)} -> " if len(images) * len(prompts) > 1 else ""
                    say(asked + blip2.answer(model, [image], prompt, ids_of, tokenizer.decode))

    def demo(self, args):
        rng, queries = rng_for("blip2 demo"), blip2.PRESETS["tiny"].qformer.queries
        self.short = not self.done()
        counts = (2, 2, 2) if self.short else (2, 3, 4)  # things in the scenes that are shown
        scenes = one_of_each(counts, lambda rng, count: make_scene(rng, count, split="validation"), "blip2 demo")
        say(f"In goes an image of 32 x 32 pixels, 17 features. {queries} queries attend to them. OPT, which was never")
        say("trained on an image, reads their outputs as if they were words:")
        say(f"    'USER: ({queries} vectors)\\n{DESCRIBE} ASSISTANT:'")
        untrained = self.start(args.device, seed=0)
        say(f"before training OPT writes: {self.captions(untrained, scenes[:1])[0]!r}")
        stage1, model = (self.train(args.device, demo=True, until=until) for until in ("stage1", None))
        say("\nthree images it has never seen; after stage 1 the Q-Former writes by itself, after stage 2 OPT writes:")
        written, said, rows = qformer_captions(stage1, scenes), self.captions(model, scenes), []
        for scene, first, second in zip(scenes, written, said):
            right = caption(scene)
            say(f"    [{right}]")
            say(f"        stage 1: {'exactly that' if first == right else first}")
            say(f"        stage 2: {'exactly that' if second == right else second}")
            rows.append((draw(scene), query_attention(model, draw(scene)), second))
        many = [make_scene(rng, rng.choice(counts), split="validation") for _ in range(200)]
        for stage, texts in ((1, qformer_captions(stage1, many)), (2, self.captions(model, many))):
            share = f"{things_right(texts, many):.0%} of the things described rightly, {exactly_right(texts, many):.0%}"
            say(f"after stage {stage}, of 200 more images: {share} of the images")
        if self.short:
            say("(in this short training it learned scenes of two things at most; after python train_tiny.py blip2")
            say("the demo shows those of up to four)")
        say("\nwhere the queries look in the first image (a query's number stands on the patch it attends to most):")
        heats = rows[0][1]
        busiest, columns = heats.flatten(1).argmax(1).tolist(), heats.shape[2]
        for start in range(0, heats[0].numel(), columns):
            cells = [[str(q) for q, at in enumerate(busiest) if at == start + c] for c in range(columns)]
            say("    " + " ".join(f"{','.join(cell) or '.':^14}" for cell in cells))
        draw_queries(rows, RUNS / "blip2" / "demo.png")

    def masks(self):
        rule = lambda attends, *real: draw_mask(5, 5, blip2.qformer_rule(attends, 2, torch.tensor([real])))
        return [
            ("vision tower: the class token and all patches see each other", draw_mask(5, 5)),
            (
                "Q-Former, 2 queries and 3 words, contrastive (ITC): queries and words do not meet",
                rule("contrastive", True, True, True),
            ),
            ("Q-Former, matching (ITM): all see all", rule("matching", True, True, True)),
            (
                "Q-Former, generation (ITG): a word sees the queries and the words before it",
                rule("generation", True, True, True),
            ),
            ("the same with 2 words and 1 of padding", rule("generation", True, True, False)),
            ("every query sees every patch in the cross-attention; words never do", draw_mask(2, 5)),
            ("decoder: causal, here 2 query outputs and 4 words", draw_mask(6, 6, Rule(causal=True))),
        ]

    def costs(self, model, words=64):
        """What trains in which stage, visual tokens, FLOPs and KV cache, as lines of text; of a model on the meta
        device."""
        config, side, language = model.config, model.config.vision.image_size, model.config.language
        pixels, tokens = torch.empty(1, 3, side, side, device="meta"), blip2.num_image_tokens(side, side, config)
        image = torch.empty(1, 1 + (side // config.vision.patch_size) ** 2, config.vision.width, device="meta")
        lines = [trained_share(model, blip2.freeze, 1)] if config.qformer.text else []
        lines += [trained_share(model, blip2.freeze, 2)] if language else []
        model.requires_grad_(False)  # the counter does not take views of what trains
        to_encode, to_query = count_flops(lambda: model.encode_image(pixels)), count_flops(lambda: model.query(image))
        lines += [
            f"the Q-Former's layers 0, {config.qformer.cross_every}, ... attend to the image; the one shown above does",
            f"image {side} x {side} -> {image.shape[1]} features -> {tokens} queries, as for an image of any size",
            f"FLOPs: {to_encode:,} to encode an image, {to_query:,} for the queries to read it",
        ]
        if language:
            prompt = torch.empty(1, tokens + words, language.width, device="meta")
            read = count_flops(lambda: model.language.hidden(prompt))
            looked_up = count_parameters(model.language.embed_positions)  # not multiplied
            cache = 2 * language.layers * language.kv_heads * language.head_width  # numbers per token: keys and values
            lines += [
                f"FLOPs: {read:,} for the decoder to read them with {words} words,",
                f"{2 * (count_parameters(model.language) - looked_up):,} for each new word, but for its attention",
                f"KV cache: {2 * cache:,} bytes a token in 16 bits, {2 * cache * tokens:,} for one image",
            ]
        return lines


def qformer_rows(texts):
    """Texts -> (ids, mask) in BERT's form: <cls> text <sep>."""
    return pad([[CLS_ID] + tokenizer().encode_ordinary(text) + [SEP_ID] for text in texts])


@torch.no_grad()
def qformer_captions(model, scenes, longest=40):
    """What the Q-Former itself writes about each scene (ITG)."""
    pixels = blip2.preprocess([draw(scene) for scene in scenes], model.config.vision).to(model.query_tokens.device)
    rows = model.caption(pixels, longest).tolist()
    return [decode(row[: row.index(SEP_ID)] if SEP_ID in row else row).strip() for row in rows]


def exactly_right(said, scenes):
    return sum(text == caption(scene) for text, scene in zip(said, scenes)) / len(scenes)


def things_right(said, scenes):
    """The share of the things that are described rightly, at their place in the caption. Too many words cost
    nothing."""
    pairs = [(text.split(", "), caption(scene).split(", ")) for text, scene in zip(said, scenes)]
    right = sum(a == b for text, wanted in pairs for a, b in zip(text, wanted))
    return right / sum(len(wanted) for _, wanted in pairs)


@torch.no_grad()
def reranking(model, split, count=400, top=16):
    """(recall@1 by contrast alone, recall@1 when matching reorders its first `top`): unseen scenes, each to be found by
    its caption among those of all, and of three scenes each that differ from one of them in a single property."""
    rng = rng_for("blip2 reranking")
    scenes = [make_scene(rng, split=split) for _ in range(count)]
    near = [change_one(scene, rng, split="any") for scene in scenes for _ in range(3)]
    texts = list(dict.fromkeys(caption(scene) for scene in scenes + near))
    ids, mask = (x.to(model.query_tokens.device) for x in qformer_rows(texts))
    image = model.encode_image(blip2.preprocess([draw(scene) for scene in scenes], model.config.vision).to(ids.device))
    first = blip2.similarity(model.image_features(image), model.text_features(ids, mask)).topk(top, dim=1).indices
    contrast = matching = 0
    for scene, features, chosen in zip(scenes, image, first):
        best = model.match(features.expand(top, -1, -1), ids[chosen], mask[chosen]).softmax(-1)[:, 1].argmax()
        contrast += texts[chosen[0]] == caption(scene)
        matching += texts[chosen[best]] == caption(scene)
    return contrast / count, matching / count


def frozen_share(preset, stage):
    """The share of a published model's parameters that a stage leaves as they are, from its shapes."""
    with torch.device("meta"):
        model = blip2.BLIP2(blip2.PRESETS[preset])
    return 1 - sum(p.numel() for p in blip2.freeze(model, stage)) / count_parameters(model)


@torch.no_grad()
def query_attention(model, picture):
    """The attention of each query to the patches, mean over heads and layers, [L,rows,columns]. The share of the class
    token is left out."""
    config, device = model.config, model.query_tokens.device
    image = model.encode_image(blip2.preprocess([picture], config.vision).to(device))  # [1,N,Dv]
    with attention_maps() as maps:  # of self-attention [1,H,L,L] and, in every second layer, of cross-attention
        model.query(image)
    crosses = [x for x in maps if x.shape[2:] == (config.qformer.queries, image.shape[1])]  # [1,H,L,N] each
    to_patches = torch.stack(crosses).mean((0, 2))[0, :, 1:]  # [L,N-1]
    return to_patches.unflatten(-1, (config.vision.image_size // config.vision.patch_size, -1)).cpu()


def draw_queries(rows, file, size=64):
    """PNG: for each (picture, attention of every query [L,rows,columns], text) the picture, where each query looks, and
    the text."""
    across = min(8, len(rows[0][1]))  # queries in a line
    deep = -(-len(rows[0][1]) // across)  # lines of queries per picture
    page = Image.new("RGB", ((1 + across) * (size + 4) + 280, len(rows) * (deep * (size + 4) + 8) + 24), "white")
    pen = ImageDraw.Draw(page)
    pen.text((4, 4), "image", fill="black")
    pen.text((size + 8, 4), "what query 0, 1, 2 ... looks at", fill="black")
    for i, (picture, heats, text) in enumerate(rows):
        y = 24 + i * (deep * (size + 4) + 8)
        page.paste(picture.resize((size, size), Image.Resampling.NEAREST), (4, y))
        for q, heat in enumerate(heats):
            line, column = divmod(q, across)
            page.paste(heat_picture(picture, heat, size), ((column + 1) * (size + 4) + 4, y + line * (size + 4)))
        text = text.replace(", ", ",\n")
        pen.multiline_text(((1 + across) * (size + 4) + 12, y + 4), text, fill="black", spacing=4)
    save_picture(page, file, "three images, and what each query looks at")


# ----------------------------------------------------------------------------------------------------------------------
# Flamingo

CHINCHILLA_STEPS = 800  # of the language model
CAPTIONS = 2  # of the four rows of a step; the others are episodes
WAYS, SHOTS = 5, (0, 1, 2, 4, 8)  # the kinds of things in an episode; the numbers of examples that are measured


def invented_names(rng, count, split="train"):
    """Words that mean nothing yet: consonant, vowel, consonant. A quarter of them is never used in training."""
    names = []
    while len(names) < count:
        name = rng.choice("bdfgklmnprstvwz") + rng.choice("aeiou") + rng.choice("bdfgklmnprstvwz")
        if name not in (*names, *COLOURS) and split_of(name) == split:  # "red" has this form too
            names.append(name)
    return names


def in_turn(rng, shots, ways):
    """Which of `ways` kinds each of `shots` examples shows: every kind once before any a second time, in random order;
    and at the end which kind is asked about, perhaps one that no example has shown."""
    order = []
    while len(order) < shots:
        order += rng.sample(range(ways), ways)
    return rng.sample(order[:shots], shots) + [rng.randrange(ways)]


def lookup_text(rng):
    """Lines of text of which the later ones follow from the earlier: "circle dax", "ring wug", "circle dax" ... A
    language model that reads much of this learns to look things up in its context. The names are new in every text."""
    ways, kinds = rng.choice((2, 3, 4, 5)), rng.choice((SHAPES, tuple(COLOURS), None, None))
    words = rng.sample(kinds, ways) if kinds else invented_names(rng, ways)
    names = invented_names(rng, ways)
    return "".join(f"{words[i]} {names[i]}\n" for i in in_turn(rng, 10, ways))


def chinchilla_line(rng):
    return [(lookup_text(rng), True)]


def toy_chinchilla(device="cpu"):
    """The language model of the toy Flamingo, pretrained on `lookup_text` alone; it has never seen a picture. Trained
    on the first call, then cached in runs/chinchilla."""
    torch.manual_seed(0)
    model = flamingo.LanguageModel(flamingo.PRESETS["tiny"].language).to(device)
    plan = Plan("", CHINCHILLA_STEPS, 16, lr=2e-3, muon=3e-3)
    return pretrain(model, flamingo, "chinchilla", plan, chinchilla_line)


def one_thing(rng, shape, pairs):
    """A scene of one thing of this shape; its colour, size and place have nothing to do with its name."""
    pair = rng.choice([pair for pair in pairs if pair[1] == shape])
    thing = place_thing(pair, rng.choice(tuple(SIZES)), rng.choice(PLACES), rng)
    return Scene((thing,), background([thing], rng))


def episode(rng, shots, ways=WAYS, split="train", pairs=None):
    """[(scene, name)]: `shots` examples of what invented names mean, and one more to be named. A name means a shape,
    and in the next episode another one: only the examples tell which. Other splits than "train" have names
    never used in training, and the scene to be named shows a colour-shape pair never drawn in it, or one of `pairs`."""
    shapes, names = rng.sample(SHAPES, ways), invented_names(rng, ways, split)
    *examples, asked = in_turn(rng, shots, ways)
    scenes = [(one_thing(rng, shapes[i], SEEN_PAIRS), names[i]) for i in examples]
    last = one_thing(rng, shapes[asked], pairs or (SEEN_PAIRS if split == "train" else UNSEEN_PAIRS))
    return [*scenes, (last, names[asked])]


def swap_names(one):
    """The same episode, but every name means what another of its names meant: the right answer is another one."""
    names = sorted({name for _, name in one})
    return [(scene, names[names.index(name) - 1]) for scene, name in one]


class FlamingoRecipe(Recipe):
    """A sample is a row [(picture, text)], read as <image> text <|endofchunk|> <image> text <|endofchunk|> ..."""

    module, model_class = flamingo, flamingo.Flamingo
    # No weight decay: it would move the frozen rows of the table, of which only the new ones train. A large lr for what
    # is no matrix, such as the gates: while they are nearly closed, what is behind them learns next to nothing.
    asked = ""  # the images alone, as own data teach it
    heat_shows = ""  # the prompt ends behind an image or without one: there is no one heat map
    new_words = "[b-z][aeiou][b-z]"  # names
    stages = (Plan("", 800, 4, lr=1.5e-2, muon=6e-3, weight_decay=0.0),)
    demo_stages = (replace(stages[0], steps=700),)
    variants = {
        "recipe": {},
        "ungated": dict(gate="none"),
        "mlp": dict(connector="mlp"),
        "no captions": dict(captions=0),
    }
    beats = (
        ("tanh gates better than ungated insertion", "recipe", "ungated"),
        ("resampler no worse than an MLP on each patch", "recipe", "mlp"),
        ("captions in the mixture better than none", "recipe", "no captions"),
    )
    ablation_steps = 800
    figures = ("named after 8 examples",)
    captions = CAPTIONS

    def start(self, device, seed, captions=CAPTIONS, **changes):
        """The toy CLIP's tower, the toy language model, both frozen from now on, and new layers between them, with
        closed gates."""
        self.captions = captions
        torch.manual_seed(seed)
        model = flamingo.Flamingo(replace(flamingo.PRESETS["tiny"], **changes))
        return assemble(model, device, vision=toy_clip(device).vision, language=toy_chinchilla(device))

    def freeze(self, model, plan):
        flamingo.freeze(model)

    def batch(self, plan, step):
        """The paper's mixture (section 2.4): rows of captions (of one word, nine in a row), which teach what a picture
        shows, and interleaved episodes, which teach to learn a name from its examples."""
        rows, ways = [], rng_for(plan.seed, ("ways", step)).choice((2, 3, 4, 5))
        for i, rng in enumerate(batch_rngs(plan.seed, ("flamingo", step), plan.batch)):
            shown = episode(rng, 8, ways)
            texts = [f" {scene.things[0].shape if i < self.captions else name}" for scene, name in shown]
            rows.append([(draw(scene), text) for (scene, _), text in zip(shown, texts)])
        return rows

    def row_ids(self, row):
        """[(picture, text)] -> ids; special tokens in texts are plain text."""
        return [i for _, text in row for i in (IMAGE_ID, *tokenizer().encode_ordinary(text), CHUNK_ID)]

    def inputs(self, model, rows):
        """Rows of [(picture, text)], perhaps of different lengths -> what the model takes."""
        device = next(model.parameters()).device
        ids, mask = pad([self.row_ids(row) for row in rows])
        pixels = flamingo.preprocess([picture for row in rows for picture, _ in row], model.config.vision)
        media_mask = torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])  # [B,M]
        media = pixels.new_zeros(*media_mask.shape, 1, *pixels.shape[1:])  # [B,M,1,3,H,W]: an image is one frame
        media[media_mask] = pixels[:, None]
        inputs = dict(ids=ids, media=media, mask=mask, media_mask=media_mask)
        return {name: x.to(device) for name, x in inputs.items()}

    def loss(self, model, samples, plan, step):
        """Text counts, images do not; padding is to the right of all labels. Metrics: how far the gates are open."""
        inputs = self.inputs(model, samples)
        labels = flamingo.text_labels(inputs["ids"], inputs.pop("mask"), model.config)
        logits = joint(model(**{name: share(x) for name, x in inputs.items()}))
        loss, metrics = flamingo.language_loss(logits, labels)
        for i, block in enumerate(model.gated_blocks):
            if block.attn_gate is not None:
                metrics[f"attn_gate {i}"] = block.attn_gate.detach().tanh().abs().mean()
                metrics[f"ffw_gate {i}"] = block.ffw_gate.detach().tanh().abs().mean()
        return loss, metrics

    @torch.no_grad()
    def expected(self, model, plan):
        """With closed gates the first loss is that of the language model alone."""
        if model.config.gate == "none":
            return None
        inputs = self.inputs(model, self.batch(plan, 0))
        labels = flamingo.text_labels(inputs["ids"], inputs["mask"], model.config)
        return "the frozen language model's", float(flamingo.language_loss(model.language(inputs["ids"]), labels)[0])

    def own(self, picture, text):
        row = [(picture, f" {text}")]
        check_fits(self.row_ids(row), flamingo.PRESETS["tiny"].language.context)
        return row

    def prompt(self, model, episodes):
        """Episodes -> what model.generate takes: all pictures, and all names but the last."""
        rows = []
        for *examples, (asked, _) in episodes:
            rows.append([*((draw(scene), f" {name}") for scene, name in examples), (draw(asked), "")])
        inputs = self.inputs(model, rows)
        begun = [self.row_ids(row)[:-1] for row in rows]  # the last chunk has no end yet
        ids, mask = flamingo.pad_rows(begun, PAD_ID, left=True)
        device = inputs["media"].device
        return inputs | dict(ids=ids.to(device), mask=mask.to(device))

    def right(self, model, rows):
        longest = 1 + max(len(ids) for ids in text_rows([text for _, text in rows]))
        return sum(said == text for said, (_, text) in zip(self.answers(model, [[row] for row in rows], longest), rows))

    def answers(self, model, episodes, longest=6):
        """What the model calls the last scene of each episode, after the others with their names."""
        said = []
        for start in range(0, len(episodes), 64):
            inputs = self.prompt(model, episodes[start : start + 64])
            new = model.generate(**inputs, max_new_tokens=longest, eos_id=CHUNK_ID)
            said += [tokenizer().decode([i for i in row if i != CHUNK_ID]).strip() for row in new.tolist()]
        return said

    def few_shot(self, model, shots, count=400):
        """The share of episodes of this many examples whose last scene is given its name, letter by letter; and the
        same share of those in which an example has shown its kind (of WAYS kinds, k examples show k)."""
        rng, pairs = rng_for("few shot", shots), SEEN_PAIRS if self.short else None
        episodes = [episode(rng, shots, split=self.split, pairs=pairs) for _ in range(count)]
        right = [text == one[-1][1] for text, one in zip(self.answers(model, episodes), episodes)]
        told = [r for r, one in zip(right, episodes) if one[-1][1] in [name for _, name in one[:-1]]]
        return sum(right) / count, sum(told) / max(1, len(told))

    def follows_the_examples(self, model, shots=8, count=400):
        """The share of episodes answered rightly both as they are and with swapped names: the same pictures, in the
        same order, and two different answers."""
        rng = rng_for("swapped names", shots)
        episodes = [episode(rng, shots, split=self.split) for _ in range(count)]
        swapped = [swap_names(one) for one in episodes]
        both = zip(episodes, self.answers(model, episodes), swapped, self.answers(model, swapped))
        return sum(a == one[-1][1] and b == other[-1][1] for one, a, other, b in both) / count

    @torch.no_grad()
    def text_untouched(self, model):
        """What training did to the language model inside: (the share of its logits for the words it knew that are
        bit-identical, the loss of text before, after). The new tokens, which are trained, join in the losses."""
        device = next(model.parameters()).device
        rows = [encode(lookup_text(rng)) for rng in batch_rngs(0, "text untouched", 32)]
        ids, mask = (x.to(device) for x in pad(rows))
        before, after = toy_chinchilla(device)(ids), model.language(ids)
        known = [i for i in range(VOCAB_SIZE) if i not in model.config.new_token_ids]
        labels = ids.masked_fill(~mask, flamingo.IGNORE_INDEX)
        losses = [float(flamingo.language_loss(logits, labels)[0]) for logits in (before, after)]
        return float((after == before)[mask][:, known].float().mean()), *losses

    def claims(self, model, args):
        count = 400  # episodes
        shares = {shots: self.few_shot(model, shots, count) for shots in SHOTS}
        curve = [right for right, _ in shares.values()]
        least = min(b - a for a, b in zip(curve, curve[1:]))
        follows = self.follows_the_examples(model, count=count)
        same, before, after = self.text_untouched(model)
        say(
            f"named rightly after {', '.join(f'{k}: {right:.3f}' for k, (right, _) in shares.items())} examples",
            f"and if its kind was among them {', '.join(f'{k}: {told:.3f}' for k, (_, told) in shares.items() if k)}",
            f"loss of text of the language model inside, with the new tokens: {before:.3f} before, {after:.3f} after",
        )
        return [
            Claim("flamingo: new names from 8 examples", 1 / WAYS, curve[-1], 0.80, count),
            Claim("flamingo: least gain from more examples, 0 1 2 4 8", 0.0, least, 0.05),
            Claim("flamingo: names swapped, the answer follows", 1 / WAYS**2, follows, 0.80, count),
            Claim("flamingo: frozen logits of known words, same to the bit", 0.0, same, 1.0),
        ]

    def measure(self, model):
        return [self.few_shot(model, 8)[0]]

    # The workbench

    def example(self, model):
        rng = rng_for("trace")
        return self.prompt(model, [episode(rng, 2, split="validation") for _ in range(2)])

    def check_question(self, question, images, toy):
        prompt = flamingo.build_prompt(question, len(images))
        if not question.strip():
            raise ValueError("the prompt is empty: ask something, as in --prompt '<image> this is'")
        if toy:
            check_fits(encode(prompt), flamingo.PRESETS["tiny"].language.context - 8)

    def ask(self, args):
        """--image and --prompt: rows of images and text to be continued. Without an image it is text alone; without a
        prompt it is the images alone."""
        images, texts = self.load_images(args), args.prompt
        if args.weights and not texts:
            example = "--weights DIR --image photo.jpg --prompt 'User: <image>What is it?'"
            raise ValueError(f"--weights needs --prompt, as in {example}")
        texts = texts or ["<image>" * len(images)]
        for text in texts:
            self.check_question(text, images, toy=not args.weights)
        prompts = [flamingo.build_prompt(text, len(images)) for text in texts]
        if args.weights:
            prompts = [flamingo.surround_images(prompt) for prompt in prompts]

            def check(config, words):
                longest = max(len(words.encode(prompt).ids) for prompt in prompts)
                if longest >= config.language.context:
                    raise ValueError(f"the prompt has {longest} tokens, the context holds {config.language.context}")

            model, words = load_published(self, args, check)
            for prompt in prompts:
                say(flamingo.answer(model, images, prompt, lambda text: words.encode(text).ids, words.decode))
            return
        if args.fresh:
            forget(self.family)
        model = self.train(args.device, demo=True)
        for prompt in prompts:
            new = flamingo.answer(model, images, prompt, encode, decode) or "(it stops at once)"
            made_up = "(a made-up name: no example in the prompt, as in '<image> dax<|endofchunk|><image>')"
            say(f"{prompt} -> {new}" + ("" if self.given or "<|endofchunk|>" in prompt else f" {made_up}"))
        self.explain(model, images, prompts)

    def demo(self, args):
        self.short = not self.done()
        rng, config, pairs = rng_for("flamingo demo"), flamingo.PRESETS["tiny"], SEEN_PAIRS if self.short else None
        episodes = [episode(rng, 5, split="validation", pairs=pairs) for _ in range(4)]
        first, (asked, _) = episodes[0][:-1], episodes[0][-1]
        row = "".join(f"<image> {name}<|endofchunk|>" for _, name in first) + "<image>"
        say(f"In goes an interleaved row, images of 32 x 32 pixels as {config.resampler.latents} latents beside it:")
        say(f"    {row}")
        model = self.start(args.device, seed=0)
        text = "".join(f"{scene.things[0].shape} {name}\n" for scene, name in first) + asked.things[0].shape
        ids = torch.tensor([encode(text)], device=args.device)
        new = model.language.generate(model.language.embed_tokens(ids), max_new_tokens=5)[0]
        new = decode(new).split("\n")[0]
        say(f"the language model, frozen, can look things up in what it reads:\n    {text!r} ->{new!r}")
        inputs = self.inputs(model, [[(draw(scene), f" {name}") for scene, name in episodes[0]]])
        with torch.no_grad():
            same = torch.equal(model(**inputs), model.language(inputs["ids"], inputs["mask"]))
        say(f"before training, gates closed, with images in the row: are its logits bit-identical? {same}")
        said = self.answers(model, episodes[:3])
        say(f"    and so it says: {', '.join(map(repr, said))}")
        model = self.train(args.device, demo=True)
        say("\nwhat a name means differs from row to row; none of these names was in training:")
        said = self.answers(model, episodes)
        for one, word in zip(episodes, said):
            shown = ", ".join(f"[{scene.things[0].name}] {name}" for scene, name in one[:-1])
            scene, name = one[-1]
            verdict = "right" if word == name else f"it is {name}"
            say(f"    {shown},\n        [{scene.things[0].name}] -> {word} ({verdict})")
        curve = [self.few_shot(model, shots, 200)[0] for shots in SHOTS]
        ceiling = [min(1.0, shots / WAYS) for shots in SHOTS]  # the share of kinds that so many examples show
        say("examples          " + "".join(f"{shots:>8}" for shots in SHOTS))
        guessing = f"(among {WAYS} names guessing gives {1 / WAYS:.0%})"
        say("named rightly     " + "".join(f"{share:>8.0%}" for share in curve) + f"   {guessing}")
        say("the examples tell " + "".join(f"{share:>8.0%}" for share in ceiling))
        say(f"after training, {curve[-1]:.0%} of the new names are learned from 8 examples")
        if self.short:
            say("(after python train_tiny.py flamingo the demo asks about colour-shape pairs that were")
            say("never drawn in training)")
        log = [json.loads(line) for line in (model.folder / "log.jsonl").read_text().splitlines()]
        gates = [name for name in log[0] if "gate" in name]
        say("how far the gates are open, |tanh(alpha)|:\n    step " + "".join(f"{name:>13}" for name in gates))
        for line in (log[0], log[len(log) // 8], log[len(log) // 3], log[-1]):
            say(f"    {line['step']:>4} " + "".join(f"{line[name]:>13.3f}" for name in gates))
        same = self.text_untouched(model)[0]
        say(f"the language model's logits for the words it knew that are still bit-identical: {same:.0%}")
        measured = {"named rightly": curve, "what the examples tell": ceiling}
        draw_few_shot(episodes[0], said[0], log, measured, RUNS / "flamingo" / "demo.png")

    def masks(self):
        words = "Look <image> a dog <image> a cat".split()
        ids = torch.tensor([[IMAGE_ID if word == "<image>" else 0 for word in words]])
        segments = flamingo.media_segments(ids, flamingo.PRESETS["tiny"])
        images = torch.tensor([[0, 0, 1, 1]])
        rows = draw_mask(len(words), 4, Rule(q_segments=segments, k_segments=images)).splitlines()
        return [
            (
                "inserted blocks: words attend to the latents (2 each) of the last of 2 images before them",
                "\n".join(f"{row}   {word}" for row, word in zip(rows, words)),
            ),
            (
                "language model: causal; images before the last are known through the words that attended to them",
                draw_mask(len(words), len(words), Rule(causal=True)),
            ),
            ("resampler: 2 latents attend to 4 features and to themselves", draw_mask(2, 6)),
            ("vision tower: the class token and all patches see each other", draw_mask(5, 5)),
        ]

    def costs(self, model, words=64):
        """What trains, latents, FLOPs and KV cache, as lines of text; of a model on the meta device."""
        config, language, side = model.config, model.config.language, model.config.vision.image_size
        inserted, L = len(model.gated_blocks), flamingo.num_image_tokens(side, side, config)
        new = len(config.new_token_ids)
        trained = count_parameters(model.connector) + count_parameters(model.gated_blocks)
        trained += new * language.width * (1 if language.tie_embeddings else 2)
        total, Dv = count_parameters(model), config.vision.width
        pixels = torch.empty(1, 3, side, side, device="meta")
        features = torch.empty(1, 1, 1 + (side // config.vision.patch_size) ** 2, Dv, device="meta")
        latents = torch.empty(1, 1, L, Dv, device="meta")
        prompt = torch.empty(1, words, language.width, device="meta")
        segments = torch.zeros(1, words, dtype=torch.int32, device="meta")
        real = torch.ones(1, 1, dtype=torch.bool, device="meta")
        cache = 2 * language.layers * language.kv_heads * language.head_width  # numbers per token: keys and values
        cross = 2 * inserted * language.width * L  # numbers per image: keys and values of its latents
        model.requires_grad_(False)  # the counter of FLOPs stumbles over a parameter that is expanded: the latents
        encode_image = count_flops(lambda: model.vision(pixels))
        resample = count_flops(lambda: model.connector(features))
        read = count_flops(lambda: model.language.hidden(prompt, media=model.project(latents, segments, real)))
        return [
            f"an inserted block before every {config.cross_every}. layer ({inserted} of them), gate {config.gate}",
            f"trained: {trained:,} ({100 * trained / total:.1f} %): connector, inserted blocks, embeddings of {new} new"
            f" tokens; {total - trained:,} frozen",
            f"image {side} x {side}, or a video of any length -> {L} latents beside the text, 1 token in it",
            f"FLOPs: {encode_image:,} to encode an image or a frame, {resample:,} to resample it,",
            f"{read:,} to read {words} words with it",
            f"KV cache: {2 * cache:,} bytes a token in 16 bits, {2 * cross:,} for the latents of one image",
        ]


CURVE_COLOURS = ("#c0392b", "#e67e22", "#27ae60", "#16a085", "#2980b9", "#8e44ad")


def draw_curves(pen, box, title, curves, labels, top=1.0):
    """Lines into a box (left, upper, width, height): curves {name: [y from 0 to top]}, labels along the x axis."""
    left, upper, width, height = box
    pen.text((left, upper - 20), title, fill="black")
    for y in (0, 0.5, 1):
        pen.line((left, upper + height * (1 - y), left + width, upper + height * (1 - y)), fill="#dddddd")
        pen.text((left - 28, upper + height * (1 - y) - 6), f"{y * top:.2f}", fill="gray")
    for i, label in enumerate(labels):
        pen.text((left + i * width / max(1, len(labels) - 1) - 4, upper + height + 4), str(label), fill="gray")
    for n, (name, values) in enumerate(curves.items()):
        colour, step = CURVE_COLOURS[n % len(CURVE_COLOURS)], width / max(1, len(values) - 1)
        points = [(left + i * step, upper + height * (1 - min(1, y / top))) for i, y in enumerate(values)]
        pen.line(points, fill=colour, width=2)
        pen.text((left + n % 3 * 100, upper + height + 20 + 14 * (n // 3)), name, fill=colour)


def draw_few_shot(one, said, log, measured, file, size=96):
    """PNG: an episode and what its last picture was called, the gates over training, and the few-shot curve."""
    page = Image.new("RGB", (max(760, len(one) * (size + 8) + 8), size + 300), "white")
    pen = ImageDraw.Draw(page)
    for n, (scene, name) in enumerate(one):
        last, x = n + 1 == len(one), 8 + n * (size + 8)
        page.paste(draw(scene).resize((size, size), Image.Resampling.NEAREST), (x, 8))
        pen.text((x + 4, size + 12), f"? {said}" if last else name, fill="red" if last else "black")
    gates = {name: [row[name] for row in log] for name in log[0] if "gate" in name}
    upper, steps = size + 70, [log[0]["step"], log[-1]["step"]]
    top = 0.5 if max(map(max, gates.values()), default=0) <= 0.5 else 1.0
    title = "how far the gates are open, |tanh(alpha)|, over training"
    draw_curves(pen, (40, upper, 300, 160), title, gates, steps, top)
    draw_curves(pen, (420, upper, 300, 160), "new names, by number of examples", measured, SHOTS)
    save_picture(page, file, "the row above with its answer, the gates over training, the few-shot curve")


# ----------------------------------------------------------------------------------------------------------------------
# CogVLM


EVA_STEPS, VICUNA_STEPS = 400, 1500  # of the towers
DEMO_TOWERS = (200, 300)  # when somebody waits for the demo


def ask_box(scene, rng):
    """A referring expression, answered as in grounded captions: the thing's name, its place in words, its box. The
    words in front make the box easier to learn. One question in eight asks for a thing that is not there."""
    if rng.random() < 0.125:
        absent = [pair for pair in SEEN_PAIRS if pair not in [t.pair for t in scene.things]]
        return "where is the {} {}?".format(*rng.choice(absent)), "nothing"
    thing = rng.choice(scene.things)
    asked = thing.name if rng.random() < 0.5 else refer(scene, thing)
    return f"where is the {asked}?", f"{thing.name} {thing.place} {box_text(thing, 32, 32)}"


def cogvlm_turns(scene, rng, kinds):
    """What is asked about a scene: two boxes, two questions, and its description, in any order."""
    boxes = [ask_box(scene, rng), ask_box(scene, rng)]
    turns = [*boxes, ask(scene, rng, kinds), ask(scene, rng, kinds), (DESCRIBE, caption(scene))]
    return rng.sample(turns, len(turns))


def vicuna_turns(scene, rng):
    """What the toy Vicuna is asked about a scene that is described in words: what CogVLM will be asked, and a list of
    all things, shape first or colour first. The list trains looking up a word by its neighbour at every position, a
    question only once. Boxes are few: the description has no coordinates, so only their form can be learned."""
    things = rng.sample(scene.things, len(scene.things))
    turns = [ask(scene, rng, KINDS) for _ in range(6)] + [(DESCRIBE, caption(scene))]
    if rng.random() < 0.5:
        told = ", ".join(f"{t.shape} {t.colour} {t.size} {t.place}" for t in things)
        turns.append(("which shape has which colour?", told))
    else:
        told = ", ".join(f"{t.colour} {t.shape} {t.size} {t.place}" for t in things)
        turns.append(("which colour has which shape?", told))
    if rng.random() < 0.15:
        turns.append(ask_box(scene, rng))
    return rng.sample(turns, len(turns))


def vicuna_rows(scenes):
    """[(scene, rng)] -> ids, labels [B,T]: each scene described in words, its things in any order, in the place of a
    picture; then questions and answers, of which the answers count."""
    rows = []
    for scene, rng in scenes:
        turns = vicuna_turns(scene, rng)
        ids, labels = cogvlm.conversation_row(turns, encode, cogvlm.PRESETS["tiny"], images=0)
        told = encode(", ".join(f"{t.place} a {t.full_name}" for t in rng.sample(scene.things, len(scene.things))))
        rows.append((ids[:1] + told + ids[1:], [cogvlm.IGNORE_INDEX] * len(told) + labels))
    return pad([ids for ids, _ in rows])[0], pad([labels for _, labels in rows], cogvlm.IGNORE_INDEX)[0]


def toy_eva(device="cpu", steps=None):
    """CogVLM's tower at toy size: a toy CLIP is trained with it in the place of CLIP's own. Cached in runs/eva."""
    torch.manual_seed(0)
    recipe, tower = CLIPRecipe(), cogvlm.EVATower(cogvlm.PRESETS["tiny"].vision)
    plan = replace(recipe.stages[-1], steps=steps or EVA_STEPS)
    return recipe.fit(run_name("eva", steps=steps), recipe.start(device, 0, vision=tower), plan).vision


def toy_vicuna(device="cpu", steps=None):
    """CogVLM's decoder at toy size, pretrained on text alone to look up what it is told. Cached in runs/vicuna.
    steps: for the demo, where no scene has more than one thing."""
    torch.manual_seed(0)
    model = cogvlm.ExpertDecoder(cogvlm.PRESETS["tiny"].language).to(device)
    for layer in model.layers:
        layer.vision_expert.requires_grad_(False)  # text never passes through it
    plan = Plan("", steps or VICUNA_STEPS, 32, lr=3e-3, muon=6e-3)

    def loss_of(step):  # things in each scene of a step: rows are about as long
        count = 1 if steps else rng_for("vicuna", step).choice((1, 2, 2, 3, 3, 4))
        scenes = [(make_scene(rng, count), rng) for rng in batch_rngs(0, ("vicuna", step), plan.batch)]
        ids, labels = vicuna_rows(scenes)
        return cogvlm.language_loss(joint(model(share(ids).to(device))), labels.to(device))

    code, expected = code_of(cogvlm, ["toy_vicuna"]), ("ln V", math.log(VOCAB_SIZE))
    fit(run_name("vicuna", steps=steps), plan, model, loss_of, code, expected=expected)
    model.copy_experts()  # image tokens are first processed as words are
    return model


class CogVLMRecipe(Recipe):
    module, model_class, fields = cogvlm, cogvlm.CogVLM, ("question", "answer")
    minutes = 9
    stages = (Plan("", 1700, 16, lr=3e-3, muon=1.2e-2, warmup=50, weight_decay=0.02),)
    demo_stages = (replace(stages[0], steps=300),)
    variants = {  # deep fusion; shallow, as LLaVA's, with the language model frozen; shallow, and it trains too
        "visual experts": {},
        "adapter alone": dict(experts=False),
        "all trained": dict(experts=False, frozen=False),
    }
    ablation_steps = 400
    figures = ("questions", "boxes found", "text loss")
    demo_kinds = KINDS[:4]  # about a picture of one thing
    frozen = True  # does the language model stay frozen?
    special_tokens = False  # prompt_row writes <bos>
    no_tokenizer = ": CogVLM's folder comes without one, put that of lmsys/vicuna-7b-v1.5 there (CogVLM2 has its own)"

    def start(self, device, seed, experts=True, frozen=True):
        """The toy EVA tower, the toy Vicuna with copies of its weights in the vision experts, and a random adapter.
        experts=False: image tokens use the words' own weights, in every layer the same module."""
        torch.manual_seed(seed)
        model = cogvlm.CogVLM(cogvlm.PRESETS["tiny"])
        eva_steps, vicuna_steps = DEMO_TOWERS if self.short else (None, None)
        assemble(model, device, vision=toy_eva(device, eva_steps), language=toy_vicuna(device, vicuna_steps))
        if not experts:
            for layer in model.language.layers:
                layer.vision_expert = layer.language_expert
        self.frozen = frozen
        return model

    def freeze(self, model, plan):
        cogvlm.freeze(model)  # of a model without experts it trains the adapter only
        if not self.frozen:
            model.language.requires_grad_(True)

    def batch(self, plan, step):
        """[(picture, turns)]. All scenes of a step have equally many things: rows about as long."""
        count = 1 if self.short else rng_for(plan.seed, "cogvlm", step).choice((1, 2, 2, 3, 3, 4))
        scenes = [(make_scene(rng, count), rng) for rng in batch_rngs(plan.seed, ("cogvlm", step), plan.batch)]
        return [(draw(scene), cogvlm_turns(scene, rng, self.kinds)) for scene, rng in scenes]

    def row(self, turns):
        """What looks like a special token in own data is plain text."""
        return cogvlm.conversation_row(turns, tokenizer().encode_ordinary, cogvlm.PRESETS["tiny"])

    def loss(self, model, samples, plan, step):
        """Only the answers count; padding is to the right of all labels."""
        device = next(model.parameters()).device
        rows = [self.row(turns) for _, turns in samples]
        ids, _ = pad([ids for ids, _ in rows])
        labels, _ = pad([labels for _, labels in rows], cogvlm.IGNORE_INDEX)
        pixels = cogvlm.preprocess([picture for picture, _ in share(samples)], model.config.vision).to(device)
        return cogvlm.language_loss(joint(model(share(ids).to(device), pixels)), labels.to(device))

    def own(self, picture, question, answer):
        turns = [(question or DESCRIBE, answer)]
        check_fits(self.row(turns)[0], cogvlm.PRESETS["tiny"].language.context)
        return picture, turns

    def prompt(self, model, asked):
        """[(scene, question)] -> what model.generate takes."""
        device = next(model.parameters()).device
        texts = [cogvlm.build_prompt(question, "vqa") for _, question in asked]
        rows = [cogvlm.prompt_row(encode(text), model.config) for text in texts]
        ids, mask = cogvlm.pad_rows(rows, PAD_ID, left=True)
        pixels = cogvlm.preprocess([draw(scene) for scene, _ in asked], model.config.vision)
        return dict(ids=ids.to(device), pixels=pixels.to(device), mask=mask.to(device))

    def grounding(self, model, asked):
        """The share of [(scene, question, box)] answered with a box of IoU 0.5 or more: the paper's measure."""
        boxes = [cogvlm.parse_box(text) for text in self.answers(model, asked, 40)]
        ious = [cogvlm.box_iou(box, cogvlm.parse_box(right)) for box, (_, _, right) in zip(boxes, asked)]
        return sum(iou >= 0.5 for iou in ious) / len(asked)

    def claims(self, model, args):
        before = self.start(args.device, args.seed)
        vqa = questions(rng_for("cogvlm claims"), 400, self.split)
        boxes = box_questions(rng_for("cogvlm boxes"), 400, self.split)
        same = float((text_logits(before, self.split) == text_logits(model, self.split)).double().mean())
        found = self.grounding(model, boxes)
        return [
            Claim("cogvlm: text-only logits equal to the bit, before and after", 0.0, same, 1.0),
            Claim("cogvlm: things found in unseen scenes, IoU >= 0.5", guess_box(boxes), found, 0.80, len(boxes)),
            Claim("cogvlm: questions about unseen scenes", guess(vqa), self.accuracy(model, vqa), 0.90, len(vqa)),
        ]

    def measure(self, model):
        """What a variant has learned about images, and the loss on texts, which shows what it has forgotten."""
        vqa = questions(rng_for("cogvlm ablations"), 400, self.split)
        boxes = box_questions(rng_for("cogvlm ablations, boxes"), 200, self.split)
        return [self.accuracy(model, vqa), self.grounding(model, boxes), text_loss(model, self.split)]

    def compare(self, means):
        """The text loss of a frozen language model is what it was before training."""
        deep, shallow, trained = (means[variant] for variant in self.variants)
        return [
            Claim("cogvlm: visual experts answer more than an adapter alone", shallow[0], deep[0], shallow[0]),
            Claim("cogvlm: visual experts find more than an adapter alone", shallow[1], deep[1], shallow[1]),
            Claim("cogvlm: text loss saved by not training the language model", 0.0, trained[2] - deep[2], 0.01),
        ]

    # The workbench

    def check_question(self, question, images, toy):
        prompt = cogvlm.build_prompt(question, "vqa")
        if toy:
            config = cogvlm.PRESETS["tiny"]
            check_fits(cogvlm.prompt_row(encode(prompt), config, len(images) or 1), config.language.context - 24)

    def answer(self, model, images, question, encode, decode):
        """A box in the answer is drawn on the (first) image. The toy is asked in the style it was trained in."""
        toy = dict(style="vqa", max_new_tokens=24) if model.config == cogvlm.PRESETS["tiny"] else {}
        text = cogvlm.answer(model, images, question, encode, decode, **toy)
        if images and (box := cogvlm.parse_box(text)):
            page = framed(images[0], [(box, "magenta")], max(256, *images[0].size))
            save_picture(page, RUNS / "cogvlm" / "box.png", "the box on the image")
        return text

    def demo(self, args):
        self.short = not self.done()
        few = dict(things=1, split="any") if self.short else {}
        asked = one_of_each(zip(SHAPES, PLACES), lambda *of: box_example(*of, **few), "cogvlm demo, boxes")
        asked += one_of_each(self.kinds[-4:], lambda *of: question_example(*of, **few), "cogvlm demo")
        tokens = cogvlm.num_image_tokens(32, 32, cogvlm.PRESETS["tiny"])
        say(
            f"In goes an image of 32 x 32 pixels and a question; the decoder reads <bos>, {tokens} image tokens (boi,"
            f" {tokens - 2} patches, eoi)",
            f"through the vision experts' weights and {cogvlm.build_prompt(asked[0][1], 'vqa')!r}",
            "through its own.",
        )
        untrained = self.start(args.device, seed=0)
        said = self.answers(untrained, asked[:3], 40)
        say(f"before training it says: {', '.join(repr(text[:24]) for text in said)}")
        model, pictures = self.train(args.device, demo=True), []
        say("\nafter training, about new images:")
        for (scene, question, right), text in zip(asked, self.answers(model, asked, 40)):
            true, found = cogvlm.parse_box(right), cogvlm.parse_box(text)
            verdict = self.verdict(model, scene, draw(scene), question, text, right)
            if true:
                iou = cogvlm.box_iou(true, found)
                verdict = f"IoU {iou:.2f}" if found else "no box"
                verdict += self.why(model, scene, draw(scene), question) if iou < 0.5 else ""
            say(f"    {question} -> {text} ({verdict})")
            pictures.append((draw(scene), true, found, f"{question}\n{text}\n({verdict.split(';')[0]})"))
        boxes = box_questions(rng_for("cogvlm demo, boxes"), 200, **few)
        many = questions(rng_for("cogvlm demo, many"), 200, kinds=self.kinds, **few)
        found, right = self.grounding(model, boxes), self.accuracy(model, many)
        say(f"of 200 more boxes {found:.0%} overlap the right one by half (guessing: {guess_box(boxes):.0%});")
        say(f"of 200 more questions {right:.0%} are answered rightly (guessing: {guess(many):.0%})")
        if self.short:
            say("(this model and the towers it is built on had a short training, on pictures of one thing; after")
            say("python train_tiny.py cogvlm the demo shows pictures of up to four)")
        before, after = text_logits(untrained), text_logits(model)
        same, trained = int((before == after).sum()), sum(p.numel() for p in cogvlm.freeze(model))
        say(f"\nforgotten: nothing. {trained:,} of {count_parameters(model):,} weights were trained, and texts without")
        say(f"an image use none of these: of {before.numel():,} logits {same:,} are bit-identical.")
        draw_boxes(pictures, RUNS / "cogvlm" / "demo.png")

    def masks(self):
        is_image = torch.tensor([[False] * 2 + [True] * 5 + [False] * 2])
        roles, padded = cogvlm.find_roles(is_image, 5), torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0, 0]])
        names = {cogvlm.TEXT: "word", cogvlm.BOI: "boi", cogvlm.PATCH: "patch", cogvlm.EOI: "eoi"}
        table = [f"{'token':<8}{'expert':<10}position"]
        columns = roles[0], cogvlm.takes_vision_expert(roles)[0], cogvlm.position_ids(roles)[0]
        for role, vision, position in zip(*(column.tolist() for column in columns)):
            table.append(f"{names[role]:<8}{'vision' if vision else 'language':<10}{position}")
        return [
            ("2 words, an image of 3 patches, 2 words: the expert and the position of each token", "\n".join(table)),
            ("vision tower: the class token and all patches see each other", draw_mask(4, 4)),
            (
                "decoder: one softmax, causal over words and patches alike, whichever expert made the keys",
                draw_mask(9, 9, Rule(causal=True)),
            ),
            (
                "decoder, a row with 2 tokens of padding on the left",
                draw_mask(9, 9, Rule(causal=True, q_segments=padded, k_segments=padded)),
            ),
            ("decoder with a KV cache: 2 new words after 7 cached tokens", draw_mask(2, 9, Rule(causal=True))),
        ]

    def costs(self, model, words=64):
        """Where the parameters are, what trains, visual tokens, FLOPs and KV cache, as lines of text; of a model on the
        meta device."""
        config, language, side = model.config, model.config.language, model.config.vision.image_size
        tokens, pixels = cogvlm.num_image_tokens(side, side, config), torch.empty(1, 3, side, side, device="meta")
        prompt = torch.empty(1, tokens + words, language.width, device="meta")
        total, trained = count_parameters(model), sum(p.numel() for p in cogvlm.freeze(model))
        experts = sum(count_parameters(layer.vision_expert) for layer in model.language.layers)
        of_words = count_parameters(model.language) - experts
        looked_up = 0 if language.tie_embeddings else language.vocab_size * language.width  # not multiplied
        cache = 2 * language.layers * language.kv_heads * language.head_width  # numbers per token: keys and values
        grid = math.isqrt(tokens - 2)
        encode_image = count_flops(lambda: model.image_tokens(pixels))
        read = count_flops(lambda: model.language.hidden(prompt))
        return [
            f"tower {count_parameters(model.vision):,} + adapter {count_parameters(model.adapter):,}"
            f" + vision experts {experts:,} + language model {of_words:,}",
            f"trained: {trained:,} ({100 * trained / total:.1f} %), experts and adapter; {total - trained:,} frozen",
            f"image {side} x {side} -> {tokens} tokens in the decoder ({grid} x {grid}"
            f"{' after the convolution' if config.strided else ''}, boi and eoi), on 3 positions",
            f"FLOPs: {encode_image:,} to encode an image, {read:,} to read it with {words} words:",
            "as many as without the experts, since each token takes one of them; and",
            f"{2 * (of_words - looked_up):,} for each new word, but for its attention",
            f"KV cache: {2 * cache:,} bytes a token in 16 bits, {2 * cache * tokens:,} for one image",
        ]


def box_questions(rng, count, split="validation", things=None):
    """[(scene, question, answer with a box)]: things to be found in scenes never trained on; things: how many in
    each."""
    asked = []
    while len(asked) < count:
        scene = make_scene(rng, things, split=split)
        text, answer = ask_box(scene, rng)
        if answer != "nothing":
            asked.append((scene, text, answer))
    return asked


def box_example(rng, kind, **scene):
    """One of box_questions about a thing of this (shape, place), or None."""
    [(scene, text, answer)] = box_questions(rng, 1, **scene)
    return (scene, text, answer) if " ".join(kind) in answer else None


def guess_box(asked):
    """The grounding of a model that guesses as well as it can: always the one box that is right most often, or (if that
    is better) the true box of any thing in the scene, as a perfect detector that cannot read would. Where a scene has
    only one thing, there is nothing to read, and finding it is what is measured."""
    boxes = [cogvlm.parse_box(right) for _, _, right in asked]
    constant = max(sum(cogvlm.box_iou(box, other) >= 0.5 for other in boxes) for box in set(boxes))
    things = [[cogvlm.parse_box(box_text(t, 32, 32)) for t in scene.things] for scene, _, _ in asked]
    detector = sum(sum(cogvlm.box_iou(box, t) >= 0.5 for t in found) / len(found) for box, found in zip(boxes, things))
    return max(constant, detector if max(map(len, things)) > 1 else 0) / len(asked)


@torch.no_grad()
def text_logits(model, split="validation"):
    """The logits of 32 conversations without an image: scenes described in words, and questions about them."""
    ids, _ = vicuna_rows([(make_scene(rng, 3, split=split), rng) for rng in batch_rngs(0, "text only", 32)])
    return model(ids.to(model.adapter.boi.device)).cpu()


@torch.no_grad()
def text_loss(model, split):
    """The loss on questions about scenes described in words, in nats per token."""
    device, losses = model.adapter.boi.device, []
    for count in (2, 3, 4):
        rngs = batch_rngs(0, ("text loss", count), 32)
        ids, labels = vicuna_rows([(make_scene(rng, count, split=split), rng) for rng in rngs])
        losses.append(float(cogvlm.language_loss(model.language(ids.to(device)), labels.to(device))[0]))
    return sum(losses) / len(losses)


def framed(image, boxes, size):
    """The image with its longer side at `size`, and boxes on it: [(box as fractions or None, colour)]."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for box, colour in boxes:
        if box is not None:
            x0, y0, x1, y1 = (round(v * side) for v, side in zip(box, image.size * 2))
            pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
    return image


def draw_boxes(pictures, file, size=128):
    """PNG: for each (picture, true box or None, box answered or None, text) the picture with both boxes on it, and the
    text."""
    page = Image.new("RGB", (2 * (size + 270), -(-len(pictures) // 2) * (size + 12) + 24), "white")
    pen = ImageDraw.Draw(page)
    pen.text((4, 4), "white: true box    magenta: the model's", fill="black")
    for i, (picture, true, said, text) in enumerate(pictures):
        x, y = 4 + i % 2 * (size + 270), 24 + i // 2 * (size + 12)
        page.paste(framed(picture, [(true, "white"), (said, "magenta")], size), (x, y))
        pen.multiline_text((x + size + 10, y + 8), text, fill="black", spacing=6)
    save_picture(page, file, "each image, the true box and the model's, and what it answered")


# ----------------------------------------------------------------------------------------------------------------------
# Qwen2-VL

# (width, height) of pictures. What takes longest to learn, to find a thing and read off its property, comes first, on
# small ones and nearly alone.
SMALL_CANVASES = ((32, 32), (48, 48), (48, 32), (32, 48), (64, 32), (32, 64))
LARGER_CANVASES = ((64, 64), (80, 80), (80, 48), (48, 80))
CANVASES = SMALL_CANVASES + LARGER_CANVASES
DEMO_CANVASES, NEW_IN_DEMO = SMALL_CANVASES[:3] + SMALL_CANVASES[-1:], SMALL_CANVASES[3:5]  # what a demo has time for
NEW_CANVASES = ((80, 32), (32, 80), (64, 48), (48, 64), (80, 64), (64, 80))  # of shapes never trained on
LARGE_CANVASES = ((96, 96), (112, 64), (64, 112), (128, 48))  # larger than any in training
FRAMES, LONG_MOVIES = (2, 4, 6), (8, 12, 16, 24)  # lengths of movies in training, and longer ones
NUMBER_SIZE = (48, 48)  # of a picture with a number in it: 3 x 3 tokens
TOKENS = (1, 4, 9)  # how many tokens it may have when it is read

QWEN_SHOWS = {  # stage: the kind of each sample of a step, equal ones together, and the sizes of scenes and things
    "part1": (("scene",) * 14 + ("movie",) * 2, SMALL_CANVASES),
    "": (("scene",) * 7 + ("number",) * 9 + ("movie",) * 2, CANVASES + LARGER_CANVASES),  # the larger ones twice
    "demo": (("scene",) * 16, DEMO_CANVASES),
    "things": (("thing",) * 8, CANVASES),
    "things of one size": (("thing",) * 8, ((48, 48),)),
    "large movies": (("large movie",) * 8, CANVASES),
}


class Qwen2VLRecipe(Recipe):
    """Part 1: small pictures, first with everything that trains, then with the vision encoder locked. Part 2: all sizes
    and numbers to read; everything trains once more, at a lower rate, so that what was learned is kept."""

    module, model_class, fields = qwen2vl, qwen2vl.Qwen2VL, ("question", "answer")
    minutes = 4
    stages = (
        Plan("part1", 900, 16, lr=2e-3, muon=3e-3, warmup=50, weight_decay=0.02),
        Plan("", 560, 18, lr=0.67 * 2e-3, muon=0.67 * 3e-3, warmup=50, weight_decay=0.02),
    )
    demo_stages = (replace(stages[0], stage="", steps=600),)
    variants = {  # shows: what its only stage shows, and its steps
        "any size": dict(shows=("things", 300)),
        "one size, learned positions": dict(shows=("things of one size", 300), learned=6),
        "M-RoPE": dict(shows=("large movies", 1000)),
        "RoPE-1D": dict(shows=("large movies", 1000), mrope=False),
    }
    ablation_steps = None  # as `shows` says
    figures = ("as in training", "new sizes or lengths")
    demo_kinds = KINDS[:4]  # about a picture of one thing
    seconds = ()  # see load_images

    def train(self, device="cpu", seed=0, steps=None, shows=None, **options):
        """shows: of an ablation. On pictures of one thing: many sizes as they are, against an encoder of one resolution
        with learned positions, which are stretched to other sizes. On movies: M-RoPE against all tokens numbered one by
        one, on movies longer than those of training, whose numbers run past those trained."""
        if not shows:
            return super().train(device, seed, steps, **options)
        self.shows, usual = shows
        size, name = len(QWEN_SHOWS[self.shows][0]), run_name(options.pop("name"), seed, steps)
        plan = replace(self.stages[0], stage=self.shows, steps=steps or usual, batch=size, seed=seed)
        data = f"world {self.shows} {options or ''}".strip()
        return self.fit(name, self.start(device, seed, **options), plan, data=data)

    def start(self, device, seed, learned=None, **changes):
        """What the paper starts from: the toy language model (biases of 0 added), and a vision encoder trained by
        contrast, the toy CLIP's blocks, whose learned positions are left out for RoPE-2D. learned: see LearnedGrid.

        Each of the two frames of a patch gets half of CLIP's patch projection, so a still picture gives what it gave
        there. CLIP's norm before the first block is missing here: its average effect is put into the projection.
        """
        torch.manual_seed(seed)
        model = qwen2vl.Qwen2VL(replace(qwen2vl.PRESETS["tiny"], **changes))
        if learned:
            model.vision = LearnedGrid(model.config.vision, learned)
        tower, language, frames = toy_clip(device).vision, toy_lm(device), model.config.vision.frames
        scenes = [make_scene(rng) for rng in batch_rngs(0, "scale", 32)]
        pixels = clip.preprocess([draw(scene) for scene in scenes], tower.config).to(device)
        with torch.no_grad():
            spread = tower.patch_embedding(pixels).std(dim=1).mean()
            scaled = tower.patch_embedding.weight * (tower.ln_pre.weight / spread)[:, None, None, None]  # [D,3,P,P]
            model.vision.patch_embedding.weight.copy_(torch.stack([scaled] * frames, dim=2).flatten(1) / frames)
        model.vision.blocks.load_state_dict(tower.blocks.state_dict())
        missing = model.language.load_state_dict(language.state_dict(), strict=False)
        assert all(name.endswith("proj.bias") for name in missing.missing_keys) and not missing.unexpected_keys
        model.lineage = {"vision": tower.lineage, "language": language.lineage}
        return model.to(device).eval()

    def freeze(self, model, plan):
        qwen2vl.freeze(model, 2)

    def batch(self, plan, step):
        """[(picture or frames, turns, kind)]. In the first 15 % of part 1 all scenes have the toy CLIP's size."""
        kinds, sizes = QWEN_SHOWS["demo" if self.short else plan.stage]
        if (plan.stage == "part1" or self.short) and step < plan.steps * 3 // 20:
            sizes = sizes[:1]
        data = "world" if plan.stage else "world, part 2"  # not the samples of part 1 again
        rngs = batch_rngs(plan.seed, ("qwen", data, step), len(kinds))
        asked = dict(questions=self.kinds, things=1 if self.short else None)
        return [(*qwen_sample(kind, rng, sizes, **asked), kind) for kind, rng in zip(kinds, rngs)]

    def row(self, config, turns, shown, grid):
        """A conversation about a picture or a clip, which stands in front -> ids, labels."""
        ids, labels = [], []
        for n, (asked, right) in enumerate(turns):
            visual = dict(kinds=qwen2vl.kinds_of([shown]), grid_thw=grid[None]) if n == 0 else {}
            more = qwen2vl.encode_turn(asked, f" {right}", encode, config, **visual)
            ids, labels = ids + more[0], labels + more[1]
        return ids, labels

    def rows(self, model, samples):
        """[(picture or frames, turns, kind)] -> the arguments of the model, for its share, and labels, for all. Grids
        stay on the CPU: their sizes are numbers for Python. Padding is to the right of all labels, so nothing attends
        to it."""
        device = model.language.norm.weight.device
        patches, grids = qwen2vl.preprocess([shown for shown, _, _ in samples], model.config.vision)
        rows = [self.row(model.config, turns, shown, grid) for (shown, turns, _), grid in zip(samples, grids)]
        ids, _ = pad([ids for ids, _ in rows])
        labels, _ = pad([labels for _, labels in rows], qwen2vl.IGNORE_INDEX)
        patches = torch.cat(share(patches.split(grids.prod(1).tolist())))
        inputs = dict(ids=share(ids).to(device), patches=patches.to(device), grid_thw=share(grids))
        return inputs, labels.to(device)

    def loss(self, model, samples, plan, step):
        """A kind counts by its samples, not by its words: captions have many. In the last 40 % of part 1 the vision
        encoder is locked (the paper's stage 3)."""
        if plan.stage == "part1" or self.short:
            qwen2vl.freeze(model, 2 if step < plan.steps * 3 // 5 else 3)
        inputs, labels = self.rows(model, samples)
        logits, kinds = joint(model(**inputs)), [kind for _, _, kind in samples]
        counts = [kinds.count(kind) for kind in dict.fromkeys(kinds)]
        each, total = {}, 0
        for kind, part, rows in zip(dict.fromkeys(kinds), logits.split(counts), labels.split(counts)):
            loss, _ = qwen2vl.language_loss(part, rows)
            each[kind] = loss.detach()
            total = total + loss * len(rows) / len(labels)
        return total, each

    def shrink(self, picture):
        """Beyond 64:1 a picture is kept as it is, since to resize it twice would change it twice."""
        small = self.seen(picture)
        return small if self.seen(small).size == small.size else picture

    def seen(self, picture):
        config = qwen2vl.PRESETS["tiny"].vision
        _, h, w = qwen2vl.image_grid(picture.height, picture.width, config)
        return picture.resize((w * config.patch_size, h * config.patch_size), Image.Resampling.BICUBIC)

    def own(self, picture, question, answer):
        config, turns = qwen2vl.PRESETS["tiny"], [(question or DESCRIBE, answer)]
        grid = torch.tensor(qwen2vl.image_grid(picture.height, picture.width, config.vision))
        check_fits(self.row(config, turns, picture, grid)[0], config.language.context)
        return picture, turns, "own"

    def prompt(self, model, asked):
        """[(picture or frames, question)] -> what model.generate takes."""
        config, device = model.config, model.language.norm.weight.device
        patches, grids = qwen2vl.preprocess([shown for shown, _ in asked], config.vision)
        rows = []
        for (shown, question), grid in zip(asked, grids):
            prompt = qwen2vl.build_prompt(question, qwen2vl.kinds_of([shown]), config.template)
            rows.append(encode(qwen2vl.expand_visuals(prompt, config, grid[None])))
        ids, mask = qwen2vl.pad_rows(rows, PAD_ID, left=True)
        return dict(ids=ids.to(device), patches=patches.to(device), grid_thw=grids, mask=mask.to(device))

    def claims(self, model, args):
        asked = [size_questions(300, sizes, self.split) for sizes in (CANVASES, NEW_CANVASES, LARGE_CANVASES)]
        seen, new, large = (self.accuracy(model, questions) for questions in asked)
        guessed = guess(asked[0])
        numbers = [qwen_numbers(200, tokens, self.split) for tokens in TOKENS]
        curve = [self.accuracy(model, items) for items in numbers]
        movies = {frames: qwen_movies(100, frames, self.split) for frames in FRAMES + LONG_MOVIES}
        of_length = [one for frames in FRAMES for one in movies[frames]]
        ways = self.accuracy(model, of_length)
        longer = [f"{frames} frames: {self.accuracy(model, movies[frames]):.3f}" for frames in LONG_MOVIES]
        read = ", ".join(f"{tokens}: {share:.3f}" for tokens, share in zip(TOKENS, curve))
        say(
            f"questions answered: {seen:.3f} in sizes of training, {new:.3f} in shapes never seen, {large:.3f} in "
            "larger ones",
            f"numbers read with {read} tokens",
            f"longer movies: {', '.join(longer)}",
        )
        least = min(b - a for a, b in zip(curve, curve[1:]))
        return [
            Claim("qwen2vl: questions about unseen scenes", guessed, seen, 0.80, len(asked[0])),
            Claim("qwen2vl: gain by sizes and shapes never seen", guessed - seen, new - seen, -0.05),
            Claim("qwen2vl: which way does it move", 0.25, ways, 0.90, len(of_length)),
            Claim("qwen2vl: numbers read with all their tokens", 0.01, curve[-1], 0.90, len(numbers[-1])),
            Claim("qwen2vl: least gain from more tokens, 1 4 9", 0.0, least, 0.0),
            Claim("qwen2vl: tokens grow with the area (correlation)", 0.0, tokens_per_area(), 0.98),
        ]

    def measure(self, model):
        """The share that is answered, of what a variant's stage shows and of what is new."""
        if self.shows == "large movies":
            of_length = lambda frames: qwen_movies(50, frames, self.split, 48)
            asked = [[one for frames in some for one in of_length(frames)] for some in (FRAMES, LONG_MOVIES)]
        else:
            seen = QWEN_SHOWS[self.shows][1]
            asked = [size_questions(300, sizes, self.split, qwen_thing) for sizes in (seen, NEW_CANVASES)]
        return [self.accuracy(model, questions) for questions in asked]

    def compare(self, means):
        any_size, one_size = (means[v][1] - means[v][0] for v in ("any size", "one size, learned positions"))
        mrope, rope = means["M-RoPE"][1], means["RoPE-1D"][1]
        return [
            Claim("qwen2vl: any size loses less by new sizes than one size does", one_size, any_size, one_size),
            Claim("qwen2vl: M-RoPE better than RoPE-1D on longer movies", rope, mrope, rope),
        ]

    # The workbench

    def example(self, model):
        """A picture of 48 x 64 pixels and a movie of four frames, with a question about each."""
        rng = rng_for("trace")
        scene, (frames, asked, _) = make_scene(rng), movie(rng)
        picture, film = draw(scene, 64, 48), [draw(frame) for frame in frames]
        return self.prompt(model, [(picture, ask(scene, rng, KINDS)[0]), (film, asked)])

    def load_images(self, args):
        """The files of --image, then those of --video."""
        images, videos = super().load_images(args), [load_video(path) for path in args.video]
        self.seconds = [0.0] * len(images) + [between for _, between in videos]  # an image has no time
        return images + [frames for frames, _ in videos]

    def check_question(self, question, images, toy):
        if toy:
            config = qwen2vl.PRESETS["tiny"]
            ids = qwen2vl.encode_question(question, images or [Image.new("RGB", (32, 32))], encode, config)["ids"]
            check_fits(ids[0], config.language.context - 16)
        else:  # which sizes and how many words a published checkpoint takes stands in its folder; its shapes do not
            qwen2vl.build_prompt(question, qwen2vl.kinds_of(images))
            for image in images:
                picture = image[0] if isinstance(image, list) else image
                qwen2vl.image_grid(picture.height, picture.width, qwen2vl.VisionConfig())

    def answer(self, model, images, question, encode, decode):
        return qwen2vl.answer(model, images, question, encode, decode, seconds=self.seconds or None)

    def demo(self, args):
        config = qwen2vl.PRESETS["tiny"]
        tokens = lambda picture: qwen2vl.num_image_tokens(picture.height, picture.width, config)
        self.short = not self.done()
        sizes = NEW_IN_DEMO * 3 if self.short else NEW_CANVASES
        few = dict(things=1, split="any") if self.short else {}
        kinds, example = (*self.kinds, *self.kinds)[: len(sizes)], lambda *of: question_example(*of, **few)
        examples = one_of_each(kinds, example, "qwen demo")
        asked = [(draw(scene, *size), *turn) for (scene, *turn), size in zip(examples, sizes)]
        picture, question, _ = asked[0]
        _, h, w = qwen2vl.image_grid(picture.height, picture.width, config.vision)
        m = config.vision.merge
        say(
            f"In goes a picture as it is, {picture.height} x {picture.width} pixels: {h} x {w} patches, merged {m} x"
            f" {m} to {tokens(picture)} tokens, and a question:",
            f"    {qwen2vl.build_prompt(question, template=config.template)!r}",
        )
        said = self.answers(self.start(args.device, seed=0), asked[:3], 12)
        say(f"before training it says: {', '.join(repr(text[:24]) for text in said)}")
        model = self.train(args.device, demo=True)
        say("\nafter training, about pictures of sizes and shapes it was never trained on:")
        for (scene, *_), (picture, question, right), text in zip(examples, asked, self.answers(model, asked, 12)):
            verdict = self.verdict(model, scene, picture, question, text, right)
            size = f"{picture.height} x {picture.width}"
            say(f"    {size:>8} = {tokens(picture):>2} tokens: {question} -> {text} ({verdict})")
        many = questions(rng_for("qwen demo, many"), 200, kinds=self.kinds, **few)
        many = [(draw(scene, *sizes[i % len(sizes)]), *turn) for i, (scene, *turn) in enumerate(many)]
        say(
            f"of 200 more questions {self.accuracy(model, many):.0%} are answered rightly (guessing: {guess(many):.0%})"
        )
        films = [] if self.short else zip(("left", "right", "up", "down"), (2, 6, 12, 16))
        films = one_of_each(films, movie_example, "qwen demo, movies")
        for (frames, question, right), text in zip(films, self.answers(model, films, 12)):
            verdict = "right" if text == right else f"wrong, it is {right}"
            say(f"    a movie of {len(frames):>2} frames: {question} -> {text} ({verdict})")
        if self.short:
            say("(in this short training it learned about one thing in a small picture; after")
            say("python train_tiny.py qwen2vl the demo shows up to four, larger pictures, movies, and numbers")
            say("that it reads)")
        say("\nthe same picture with fewer and with more pixels, which is fewer and more tokens:")
        rows = []
        number = first_turn(qwen_number(rng_for("qwen demo, number"), TOKENS[-1]))
        for picture, question, right in asked[1:2] if self.short else (number, asked[3]):
            budgets = [max(1, tokens(picture) * part // 9) for part in TOKENS]  # at most so many tokens
            shrunk = [(shrink(picture, budget), question) for budget in budgets]
            rows.append([])
            for (small, _), text in zip(shrunk, self.answers(model, shrunk, 12)):
                size = f"{small.height} x {small.width} pixels, {tokens(small)} tokens"
                rows[-1].append((small, f"{size}\n{question}\n{text}" + ("" if text == right else f" (it is {right})")))
                verdict = "" if text == right else f" (wrong, it is {right})"
                say(f"    {size:>26}: {question} -> {text}{verdict}")
        draw_resolutions(rows, RUNS / "qwen2vl" / "demo.png", config.vision)

    def masks(self):
        grid = torch.tensor([[1, 2, 2], [2, 2, 2]])
        frames = qwen2vl.patch_places(grid, 2)[:1]
        small = replace(qwen2vl.VISION_2_5, window_size=28)
        windows = qwen2vl.window_segments(qwen2vl.patch_places(torch.tensor([[1, 4, 4]]), 2), small)[None]
        padded = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0]])
        return [
            (
                "vision encoder, one packed row: an image of 2 x 2 patches, a clip of two frame pairs of 2 x 2",
                draw_mask(12, 12, Rule(q_segments=frames, k_segments=frames)),
            ),
            (
                "Qwen2.5-VL's windows, here of 2 x 2 patches in an image of 4 x 4; in 4 of 32 layers all see all",
                draw_mask(16, 16, Rule(q_segments=windows, k_segments=windows)),
            ),
            (
                "decoder: causal over words and image tokens alike, here 2 words, 4 tokens, 2 words",
                draw_mask(8, 8, Rule(causal=True)),
            ),
            (
                "decoder, a row with 2 tokens of padding on the left",
                draw_mask(8, 8, Rule(causal=True, q_segments=padded, k_segments=padded)),
            ),
            ("decoder with a KV cache: 2 new tokens after 6 cached ones", draw_mask(2, 8, Rule(causal=True))),
        ]

    def costs(self, model, words=64):
        v, language = model.config.vision, model.config.language
        cache = 2 * language.layers * language.kv_heads * language.head_width  # numbers per token: keys and values
        weights = count_parameters(model.language)
        if not language.tie_embeddings:
            weights -= language.vocab_size * language.width  # looked up, not multiplied
        rows = []
        for across, down in ((8, 8), (16, 8), (16, 16), (46, 17)):  # in tokens of the decoder
            height, width = down * v.factor, across * v.factor
            grid = torch.tensor([qwen2vl.image_grid(height, width, v)])
            tokens = qwen2vl.num_image_tokens(height, width, model.config)
            patches = torch.empty(int(grid.prod()), v.patch_width, device="meta")
            prompt = torch.empty(1, tokens + words, language.width, device="meta")
            positions = torch.empty(3, 1, tokens + words, device="meta")
            encode_image = count_flops(lambda: model.image_tokens(patches, grid))
            read = count_flops(lambda: model.language.hidden(prompt, positions))
            size = f"{height:>6} x {width:<6}{tokens:>8,}"
            rows.append(f"{size}{encode_image:>22,}{read:>22,}{2 * cache * tokens:>18,}")
        layers = ", ".join(map(str, v.full_layers))
        windows = f", windows of {v.window_size} pixels but in layers {layers}" if v.window_size else ""
        return [
            f"any resolution from {v.min_pixels:,} to {v.max_pixels:,} pixels{windows}",
            *(trained_share(model, qwen2vl.freeze, stage) for stage in (1, 2, 3)),
            "",
            f"  an image of    tokens  FLOPs to encode it {f'... to read it with {words} words':>32}   KV cache, bytes",
            *rows,
            f"{2 * weights:,} FLOPs for each new word, but for its attention",
            f"KV cache: {2 * cache:,} bytes a token in 16 bits; a token is {v.factor} x {v.factor} pixels, of a clip"
            f" {v.frames} frames too",
        ]


class LearnedGrid(qwen2vl.VisionTower):
    """For an ablation: the vision encoder with a table of learned positions for side x side patches in the place of
    RoPE-2D. As in CLIP the table is stretched to the grid of each image."""

    def __init__(self, config, side):
        super().__init__(config)
        self.side = side
        self.position_embedding = torch.nn.Parameter(torch.randn(side**2, config.width) * config.width**-0.5)

    def learned_positions(self, places, grid_thw):
        """-> [N,D], in the order of the packed row."""
        square = self.position_embedding.T.unflatten(1, (self.side, self.side))[None]  # [1,D,side,side]
        parts, pieces = [], places.split(grid_thw.prod(1).tolist(), dim=1)
        for (_, h, w), (_, row, column) in zip(grid_thw.tolist(), pieces):
            image = square
            if (h, w) != (self.side, self.side):
                image = torch.nn.functional.interpolate(square, (h, w), mode="bicubic", align_corners=False)
            parts.append(image[0, :, row, column].T)
        return torch.cat(parts)

    def forward(self, patches, grid_thw):
        c, grid_thw = self.config, grid_thw.cpu()
        places = qwen2vl.patch_places(grid_thw, c.merge)
        x = self.patch_embedding(patches) + self.learned_positions(places.to(patches.device), grid_thw)
        rotation = rope_2d(torch.zeros_like(places[1:, None], device=x.device), c.width // c.heads)  # 0 turns nothing
        frames = qwen2vl.Packing(places[0], x.device)
        for block in self.blocks:
            x = block(x, rotation, frames)
        return x


def shrink(image, tokens):
    """The image with so few pixels that it becomes at most this many tokens: what a smaller max_pixels does to it."""
    factor = qwen2vl.PRESETS["tiny"].vision.factor
    height, width = qwen2vl.smart_resize(image.height, image.width, factor, factor**2, tokens * factor**2)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def qwen_sample(kind, rng, sizes, **asked):
    """(picture or frames, turns) of this kind; scenes and things in one of these sizes. asked: see qwen_scene."""
    if kind == "scene":
        return qwen_scene(rng, sizes, **asked)
    if kind == "thing":
        return qwen_thing(rng, sizes)
    if kind == "number":
        return qwen_number(rng)
    return qwen_movie(rng, side=48 if kind == "large movie" else 32)  # 9 tokens for two frames, or 4


def qwen_scene(rng, sizes=CANVASES, split="train", questions=KINDS, things=None):
    """A picture with its description among four questions of these kinds; a scene that is not trained on, with one
    question. things: how many in it."""
    scene = make_scene(rng, things, split=split)
    turns = [ask(scene, rng, questions) for _ in range(4 if split == "train" else 1)]
    if split == "train":
        turns.insert(rng.randrange(5), (DESCRIBE, caption(scene)))
    return draw(scene, *rng.choice(sizes)), turns


def qwen_thing(rng, sizes=CANVASES, split=None):
    """A picture of one thing, and what it is. For comparisons that must be quick. One thing is too little for scenes of
    its own in a split, whatever `split` is: what is new in a test is the size of the picture."""
    (thing,) = (scene := make_scene(rng, 1, split="any")).things
    return draw(scene, *rng.choice(sizes)), [("what is it?", f"a {thing.full_name}")]


def qwen_number(rng, tokens=None):
    """A small number, its strokes 3 pixels wide, about in the middle of a picture that is then given so few pixels that
    it makes at most `tokens` tokens (None: any of TOKENS, three times in five the most)."""
    text, question, answer = read_number(rng)
    grey = background([], rng)
    number, image = draw_number(text, 24, 18, grey), Image.new("RGB", NUMBER_SIZE, (grey,) * 3)
    corner = [(whole - part) // 2 + rng.randrange(-2, 3) for whole, part in zip(NUMBER_SIZE, number.size)]
    image.paste(number, tuple(corner))
    return shrink(image, tokens or rng.choice(TOKENS + TOKENS[-1:] * 2)), [(question, answer)]


def qwen_movie(rng, frames=None, side=32):
    """A movie as a list of frames, and which way its thing moves; in training also what it is."""
    scenes, question, way = movie(rng, frames or rng.choice(FRAMES))
    thing, turns = scenes[0].things[0], [(question, way)]
    if frames is None:
        turns = rng.sample([*turns, ("what colour is it?", thing.colour), ("what shape is it?", thing.shape)], 3)
    return [draw(scene, side, side) for scene in scenes], turns


def movie_example(rng, kind):
    """(frames, question, answer) of a movie that goes this way and has so many frames, or None."""
    way, frames = kind
    film = first_turn(qwen_movie(rng, frames))
    return film if film[2] == way else None


def first_turn(sample):
    """(picture or frames, turns) -> (picture or frames, question, answer), as it is asked."""
    shown, turns = sample
    return shown, *turns[0]


def size_questions(count, sizes, split, sample=qwen_scene):
    """[(picture, question, answer)] in these sizes, the same scenes and questions whatever the sizes. Those of
    qwen_scene were never trained on; those of qwen_thing may have been, in other sizes."""
    chosen = [[sizes[i % len(sizes)]] for i in range(count)]
    return [first_turn(sample(rng_for("qwen size", split, i), size, split)) for i, size in enumerate(chosen)]


def qwen_movies(count, frames, split, side=32):
    rng = rng_for("qwen movies", split, frames)
    return [first_turn(qwen_movie(rng, frames, side)) for _ in range(count)]


def qwen_numbers(count, tokens, split):
    rng = rng_for("qwen numbers", split)  # the same numbers whatever the tokens
    return [first_turn(qwen_number(rng, tokens)) for _ in range(count)]


def tokens_per_area():
    """The correlation of visual tokens with the area of pictures of random sizes and shapes, as preprocess makes
    them."""
    rng, vision = rng_for("qwen areas"), qwen2vl.PRESETS["tiny"].vision
    sizes = [(rng.randrange(32, 129), rng.randrange(32, 129)) for _ in range(200)]
    tokens = [len(qwen2vl.preprocess([Image.new("RGB", size)], vision)[0]) / vision.merge**2 for size in sizes]
    return float(np.corrcoef([w * h for w, h in sizes], tokens)[0, 1])


def load_video(path):
    """A folder of frames, in the order of the numbers in their names (2 before 10), or an animated GIF, WebP or PNG
    -> list of PIL images, seconds from one frame to the next. A folder has no times: two frames a second are assumed,
    the published default. Raises ValueError."""
    kinds = "a video is a folder of images, or an animated GIF, WebP or PNG"
    if Path(path).is_dir():
        files = [file for file in Path(path).iterdir() if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise ValueError(f"{path} has no frames in it: {kinds}")
        words_and_numbers = lambda file: [int(w) if w.isdecimal() else w for w in re.split(r"(\d+)", file.name)]
        return [load_image(file) for file in sorted(sorted(files), key=words_and_numbers)], 0.5
    try:
        load_image(path)  # finds what is wrong with the file or with its first frame
    except ValueError as error:
        raise ValueError(f"{error}: {kinds}") from None
    frames, seconds = [], []
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                frames.append(as_seen(frame))
                seconds.append((frame.info.get("duration") or 100) / 1000)  # none or 0: a tenth, as browsers show it
    except Exception as error:  # Pillow raises many kinds; a file cut short is found in one of its later frames
        raise ValueError(f"{path} is broken behind frame {len(frames)} ({error}): save it again") from None
    return frames, sum(seconds) / len(seconds)


def draw_resolutions(rows, file, config, wide=280, tall=240):
    """PNG: rows of (image, text) cut into tokens; the same picture at more and more pixels, and what is read there."""
    page = Image.new("RGB", (max(map(len, rows)) * wide, len(rows) * tall), "white")
    pen = ImageDraw.Draw(page)
    for y, row in enumerate(rows):
        for x, (image, text) in enumerate(row):
            cut = cut_picture(image, config.factor, max(1, 180 // max(image.size)))
            page.paste(cut, (x * wide + 8, y * tall + 8))
            pen.multiline_text((x * wide + 8, y * tall + 16 + cut.height), text, fill="black", spacing=4)
    what = "a picture" if len(rows) == 1 else "pictures"
    save_picture(page, file, f"{what} cut into tokens, at three resolutions")


# ----------------------------------------------------------------------------------------------------------------------
# The workbench: the command line of all seven family files

RECIPES = {
    "clip": CLIPRecipe,
    "vilt": ViLTRecipe,
    "flamingo": FlamingoRecipe,
    "cogvlm": CogVLMRecipe,
    "blip2": BLIP2Recipe,
    "llava": LLaVARecipe,
    "qwen2vl": Qwen2VLRecipe,
}


class CommandLine(argparse.ArgumentParser):
    """argparse, except that a mistake costs one line and exit status 2, not a page of usage."""

    def parse_args(self, *args):
        sys.stdout.reconfigure(errors="replace")  # a word that the terminal cannot write costs a "?", not the training
        return super().parse_args(*args)

    def error(self, message):
        stop(f"{self.prog}: {' '.join(message.split())} (--help lists the options)")


def check_device(name):
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):  # torch's own message is a page about CUDA installations
        raise ValueError(f"device {name!r} is not available here; --device cpu always is") from None
    if name.startswith("mps"):
        print("note: mps has given wrong numbers in some releases of torch; compare with --device cpu", file=sys.stderr)


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def count_flops(run):
    """Floating-point operations of run() on the meta device: matrix products, convolutions, attention; 2 per
    multiply-add."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def trained_share(model, freeze, stage):
    total, trained = count_parameters(model), sum(p.numel() for p in freeze(model, stage))
    return f"stage {stage}: {trained:,} trained ({100 * trained / total:.1f} %), {total - trained:,} frozen"


def describe(module, indent=0):
    """The modules of a model as (name, shape of the weight, parameters); a stack of blocks is shown once."""
    name_of = lambda name: "  " * indent + name
    shape_of = lambda weight: " x ".join(map(str, weight.shape)) or "scalar"
    lines = [(name_of(name), shape_of(p), p.numel()) for name, p in module.named_parameters(recurse=False)]
    for name, child in module.named_children():
        number = count_parameters(child)
        if not number:
            continue
        if isinstance(child, torch.nn.ModuleList):
            lines.append((name_of(f"{name} x {len(child)}"), "", number))
            lines += describe(child[0], indent + 1)
        elif not list(child.children()) and hasattr(child, "weight"):
            bias = " + bias" if getattr(child, "bias", None) is not None else ""
            lines.append((name_of(name), shape_of(child.weight) + bias, number))
        else:
            lines.append((name_of(name), "", number))
            lines += describe(child, indent + 1)
    return lines


def anatomy(recipe, preset):
    """Modules, shapes, what trains, visual tokens, FLOPs and KV cache of a preset, without memory for its weights."""
    with torch.device("meta"):
        model = recipe.model_class(recipe.module.PRESETS[preset])
    lines = describe(model)
    width = max(len(name) for name, _, _ in lines) + 2
    say(f"{preset}: {count_parameters(model):,} parameters", "")
    say(*(f"{name:<{width}}{shape:<26}{number:>18,}" for name, shape, number in lines))
    say("", *recipe.costs(model))


@contextlib.contextmanager
def trace(model):
    """`with trace(model) as rows: model(...)`: (name, output) of every part of the model and of every block, by
    hooks."""
    rows, hooks = [], []

    def watch(name, module):
        def note(module, inputs, output):
            tensors = output if isinstance(output, tuple) else (output,)
            rows.extend((name, x) for x in tensors if torch.is_tensor(x) and x.numel())

        hooks.append(module.register_forward_hook(note))

    for name, module in model.named_modules():
        if name.count(".") < 2 or name.count(".") == 2 and name.split(".")[-1].isdigit():
            watch(name or "the whole model", module)
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def show_trace(recipe):
    """The shapes through one forward pass of the tiny model, with random weights, about a real picture and real
    words."""
    torch.manual_seed(0)
    model = recipe.model_class(recipe.module.PRESETS["tiny"]).eval()
    inputs = recipe.example(model)
    with torch.no_grad(), trace(model) as rows:
        model(**inputs)
    say("tiny, random weights", "", *words_of(inputs["ids"][0].tolist()), "")
    say(*(f"{name:<34}{str(list(x.shape)):<24}" for name, x in inputs.items() if torch.is_tensor(x)), "")
    say(f"{'module':<34}{'shape of its output':<24}{'mean':>9}{'std':>9}")
    for name, x in rows:
        say(f"{name:<34}{str(list(x.shape)):<24}{x.float().mean():>9.3f}{x.float().std(correction=0):>9.3f}")


def words_of(ids):
    """A row of ids as lines of text: position, id and word of each, runs of the same id in one line."""
    lines, start = ["the first row of ids:"], 0
    while start < len(ids):
        end = start
        while end < len(ids) and ids[end] == ids[start]:
            end += 1
        where = f"{start}" if end == start + 1 else f"{start} to {end - 1}"
        lines.append(f"    {where:<12}{ids[start]:>5}  {tokenizer().decode([ids[start]])!r}")
        start = end
    return lines


def load_published(recipe, args, check=None, own=False):
    """--weights -> (model, tokenizer). check(config, tokenizer): called before the weights are read. own: the folder is
    one of train_tiny.py, with the toy's tokenizer, which is no file. Raises ValueError in one line, whatever is wrong
    with the files."""
    try:
        folder, tokenizer = recipe.module.checkpoint_folder(args.weights), None
        config = recipe.module.config_from_folder(folder)  # another family's is found before gigabytes are read
        if not own:
            from tokenizers import Tokenizer

            if not (folder / "tokenizer.json").is_file():
                raise ValueError(f"{folder / 'tokenizer.json'} is missing{recipe.no_tokenizer}")
            tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if check:
            check(config, tokenizer)
        return recipe.model_class.from_pretrained(folder, getattr(torch, args.dtype), args.device), tokenizer
    except ImportError as error:
        raise ValueError(f"{error}: pip install tokenizers safetensors huggingface_hub") from None
    except Exception as error:  # each of the libraries has exception classes of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"{args.weights} cannot be loaded: {reason[:600]}") from None


def command_line(family):
    recipe = RECIPES[family]
    parser = CommandLine(prog=f"{family}.py", description=recipe.module.__doc__.strip().splitlines()[0])
    show = parser.add_argument
    show("--demo", action="store_true", help="train the toy model if it is not cached, then show what it does")
    show("--image", action="append", default=[], metavar="FILE", help="your own image (may be repeated)")
    if family == "qwen2vl":
        show("--video", action="append", default=[], metavar="PATH", help="a GIF, or a folder of frames")
    show("--prompt", action="append", default=[], metavar="TEXT", help="what to ask about it (may be repeated)")
    show("--weights", metavar="DIR_OR_HUB_ID", help="a published checkpoint, or a folder of train_tiny.py")
    presets = recipe.module.PRESETS
    show("--anatomy", nargs="?", const="tiny", choices=presets, metavar="PRESET", help="modules, parameters, FLOPs")
    show("--trace", action="store_true", help="the shapes through one forward pass")
    show("--show-mask", action="store_true", help="which token attends to which")
    show("--fresh", action="store_true", help="with --demo: train again, whatever is cached for this family")
    show("--device", default="cpu", help="cpu (default), cuda, mps")
    show("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="with --weights")
    return parser


def workbench(family, argv=None):
    """What `python llava.py ...` does, for each of the seven. Bad input ends in one line and status 2."""
    parser = command_line(family)
    args = parser.parse_args(argv)
    recipe = RECIPES[family]()
    if WORLD_SIZE > 1:
        parser.error("torchrun is for train_tiny.py")
    try:
        check_device(args.device)
        if args.anatomy:
            anatomy(recipe, args.anatomy)
        elif args.trace:
            show_trace(recipe)
        elif args.show_mask:
            say("rows look at columns; # may, . may not", *(f"\n{what}\n{mask}" for what, mask in recipe.masks()))
        elif args.weights or args.image or args.prompt or getattr(args, "video", None):
            file = Path(args.weights or "") / "config.json"
            if args.weights and file.is_file() and f'"{recipe.model_class.__name__}Config"' in file.read_text():
                recipe.given, _ = load_published(recipe, args, own=True)  # and is asked as the toy is
                args.weights, args.fresh = None, False
            recipe.ask(args)
        elif args.demo:
            if args.fresh:
                forget(family)
            recipe.demo(args)
        else:
            parser.error("nothing to do; try --demo, --trace, --show-mask or --anatomy")
    except (ValueError, OSError) as error:
        stop(f"{parser.prog}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        stop(f"\n{parser.prog}: stopped", 130)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def steps_number(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps, like 200")
    return int(text)


def seed_number(text):
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed, a number of at most nine digits")
    return int(text)


def trainer_command_line():
    parser = CommandLine(prog="train_tiny.py", description=__doc__.splitlines()[0])
    families = ", ".join(RECIPES)
    what = f"world (a sheet of samples), all, or a family: {families}"
    parser.add_argument("what", choices=("world", "all", *RECIPES), metavar="WHAT", help=what)
    parser.add_argument("--ablations", action="store_true", help='"a beats b" at three seeds and equal steps')
    parser.add_argument("--data", metavar="FOLDER", help="train on your own images: FOLDER/metadata.jsonl")
    parser.add_argument(
        "--loss", choices=("softmax", "sigmoid"), default="softmax", help="clip only: CLIP's or SigLIP's"
    )
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="what claims are measured on (default: test)"
    )
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--steps", type=steps_number, help="of the family's last stage (default: the recipe's own)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")
    parser.add_argument("--fresh", action="store_true", help="forget what is cached for this family, towers excepted")
    return parser


def check(args):
    """Wrong combinations end here, before anything is trained."""
    if args.data and (args.what not in RECIPES or args.ablations):
        stop(f"--data goes with one family ({', '.join(RECIPES)}) and without --ablations")
    if args.loss != "softmax" and args.what != "clip":
        stop("--loss is clip's option")
    if WORLD_SIZE > 1 and (args.what not in RECIPES or args.ablations):
        stop("torchrun is for one family, without --ablations: torchrun --nproc-per-node 2 train_tiny.py clip")
    for plan in RECIPES[args.what].stages if WORLD_SIZE > 1 else ():
        if plan.batch % WORLD_SIZE:
            stop(f"a batch of {plan.batch} cannot be shared by {WORLD_SIZE} processes: use a divisor")
    if WORLD_SIZE > 1 and args.device == "cuda":
        args.device = f"cuda:{LOCAL_RANK}"
    try:
        check_device(args.device)
    except ValueError as error:
        stop(str(error))


def forget(family):
    """--fresh: remove the checkpoints of one family, so that it is trained again."""
    for path in [*RUNS.glob(f"{family}/checkpoint.pt"), *RUNS.glob(f"{family}-*/**/checkpoint.pt")]:
        path.unlink(missing_ok=True)  # another process may have been faster


def main(argv=None):
    """Returns the exit status: 0, or 1 when a claim does not hold."""
    args = trainer_command_line().parse_args(argv)
    check(args)
    if WORLD_SIZE > 1:
        dist.init_process_group()  # gloo between CPUs, nccl between GPUs
    claims = []
    try:
        if args.what == "world":
            world_sheet()
        for family in {"world": (), "all": RECIPES}.get(args.what, (args.what,)):
            if args.fresh:
                forget(family)
            recipe = RECIPES[family]()
            claims += (recipe.own_data if args.data else recipe.ablations if args.ablations else recipe.run)(args)
    except KeyboardInterrupt:
        stop("\nstopped; the same command again takes what is finished from the cache", 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if claims:
        say("", claims_table(claims))
    return int(any(not claim.holds for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
