"""The toy world, its tokenizer, one training loop, and a recipe per family: everything the seven files are trained on;
and the workbench, the command line that the seven files share.

What. A seeded world of coloured shapes, drawn with Pillow, nothing stored: scenes, captions, questions with answers,
boxes, comparisons of two pictures, short videos, numbers to read. A fifth of the colour-shape pairs is never shown in
training, neither drawn nor named. A model that gets those right has learned to compose colour with shape.

How.    python train_tiny.py world              a sheet of samples, to see what the models see
        python train_tiny.py clip               train, then print the paper's claims at toy scale: hold or not
        python train_tiny.py all                all seven families, and the table of their claims
        python train_tiny.py clip --ablations   "a beats b", three seeds, equal steps, in minutes
        python train_tiny.py clip --data DIR    your own pictures: DIR/metadata.jsonl with file_name and text
        torchrun --nproc-per-node 2 train_tiny.py clip

What to try. Hide another pair (UNSEEN_PAIRS) and see whether zero-shot naming survives. Leave "something red" out of
`caption` and watch it fall. Train with batch 8: why does the contrastive loss start at ln 8? Interrupt with Ctrl-C,
start again, and compare the weights with those of a training that was not interrupted: not one bit differs. Why must
data be a function of the step for that?

Sections: the world - the tokenizer - the loop - what all recipes share - seven recipes - the workbench - command line.
"""

import argparse
import ast
import contextlib
import json
import math
import os
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
from PIL import Image, ImageDraw, ImageOps, ImageSequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import blip2
import clip
import cogvlm
import flamingo
import llava
import qwen2vl
import vilt
from kernels import attention_maps, draw_mask, rope_2d

# ----------------------------------------------------------------------------------------------------------------------
# The world: things on a canvas


COLOURS = {
    "red": (255, 70, 60),
    "green": (60, 220, 90),
    "blue": (80, 140, 255),  # all bright, since a shape that
    "yellow": (255, 225, 60),
    "purple": (205, 90, 245),
    "white": (250, 250, 250),
}  # hardly shows teaches little
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 0.30, "large": 0.42}  # side, as a fraction of the canvas's shorter side; below a half
JITTER = 0.25  # 1: anywhere in its quarter of the canvas; 0: always in the middle
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
NUMBERS = ("zero", "one", "two", "three", "four")
NAMES = (
    "blick",
    "dax",
    "fep",
    "gazzer",
    "kiki",
    "lorp",
    "modi",
    "pilk",
    "rif",
    "tufa",
    "wug",
    "zibo",
    "tepa",
    "mip",
    "nax",
    "sorb",
)  # words without a meaning, to be given one in a few examples

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)  # 30
UNSEEN_PAIRS = (
    ("red", "triangle"),
    ("green", "circle"),
    ("blue", "cross"),  # a fifth: each colour once, each shape
    ("yellow", "ring"),
    ("purple", "square"),
    ("white", "circle"),
)  # at most twice
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
    def is_test(self):
        """An eighth of the scenes of two things and more, chosen by what is in them, is never trained on. Scenes of one
        thing are too few for that: 24 pairs x 2 sizes x 4 places."""
        content = "; ".join(f"{t.full_name} {t.place}" for t in self.things)
        return len(self.things) > 1 and zlib.crc32(content.encode()) % 8 == 0


def place_thing(pair, size, place, rng):
    """A thing near the middle of its quarter of the canvas, which it must not leave: x (1 - side) + side <= 1/2."""
    reach = (0.5 - SIZES[size]) / (1 - SIZES[size])
    x, y = (reach * (0.5 + JITTER * (rng.random() - 0.5)) for _ in range(2))
    return Thing(*pair, size, 1 - x if "right" in place else x, 1 - y if "bottom" in place else y)


def make_scene(rng, count=None, pairs=SEEN_PAIRS, split="train"):
    """A random scene. rng: random.Random; count: how many things (None: one to four, most often two);
    split: "train", "test" (content never trained on) or "any". Things of one scene are different pairs."""
    if split == "test" and count == 1:
        raise ValueError("scenes of one thing are all trained on; test scenes have two to four")
    counts = (count,) if count else (2, 2, 2, 3, 3, 4) if split == "test" else (1, 1, 2, 2, 2, 3, 3, 4)
    while True:
        number = rng.choice(counts)
        places = sorted(rng.sample(PLACES, number), key=PLACES.index)
        chosen = rng.sample(pairs, number)
        things = tuple(
            place_thing(pair, rng.choice(("small", "large")), place, rng) for pair, place in zip(chosen, places)
        )
        scene = Scene(things, grey=rng.randrange(0, 60))
        if split == "any" or scene.is_test == (split == "test"):
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
        if (
            new != old
            and new.pair in SEEN_PAIRS
            and len({t.pair for t in things}) == len(things)
            and (split == "any" or other.is_test == (split == "test"))
        ):
            return other


def unseen_pair_scene(rng, count=None):
    """A scene with one thing of a pair never seen in training, and seen ones around it."""
    scene = make_scene(rng, count, split="any")
    which = rng.randrange(len(scene.things))
    colour, shape = rng.choice(UNSEEN_PAIRS)
    things = list(scene.things)
    things[which] = replace(things[which], colour=colour, shape=shape)
    return replace(scene, things=tuple(things))


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
    """The scene as a PIL image. Any canvas of at least 16 pixels a side; raises ValueError below."""
    if min(width, height) < 16:
        raise ValueError(f"a canvas of {width} x {height} is too small for four things: at least 16 pixels a side")
    image = Image.new("RGB", (width, height), (scene.grey,) * 3)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        draw_thing(pen, thing, pixel_box(thing, width, height))
    return image


# Numbers to read: three columns by five rows per digit, one bit per pixel, rows from the top.
GLYPHS = {
    digit: bits
    for digit, bits in zip(
        "0123456789",
        (
            0b111101101101111,
            0b010110010010111,
            0b111001111100111,
            0b111001111001111,
            0b101101111001001,
            0b111100111001111,
            0b111100111101111,
            0b111001010010010,
            0b111101111101111,
            0b111101111001111,
        ),
    )
}


def draw_number(text, width=32, height=32, colour="white", grey=20):
    """Digits as large as the canvas allows, for reading tests. Raises ValueError when they cannot fit."""
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
                pen.rectangle((x, y, x + scale - 1, y + scale - 1), fill=COLOURS[colour])
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


QUESTIONS = ("colour", "shape", "size", "where", "what", "count", "count of", "there", "pair", "side")


def question(kind, scene, rng):
    """A (question, answer) of this kind about the scene, or None where it makes no sense. Yes and no are equally
    likely."""
    things = scene.things
    if kind == "colour":
        thing = rng.choice(things)
        by_shape = len(only(scene, shape=thing.shape)) == 1 and rng.random() < 0.7
        return f"what colour is the {thing.shape if by_shape else f'{thing.place} thing'}?", thing.colour
    if kind == "shape":
        thing = rng.choice(things)
        by_colour = len(only(scene, colour=thing.colour)) == 1 and rng.random() < 0.7
        return f"what shape is the {thing.colour if by_colour else thing.place} thing?", thing.shape
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


def compare(rng, split="train"):
    """Two pictures and a question about both: (scene, scene, question, answer)."""
    one, two = make_scene(rng, split=split), make_scene(rng, split=split)
    if rng.random() < 0.5 and len(one.things) != len(two.things):
        return one, two, "which picture has more things?", "first" if len(one.things) > len(two.things) else "second"
    if rng.random() < 0.5:
        two = replace(one, grey=two.grey)
    return one, two, "are the pictures the same?", "yes" if one.things == two.things else "no"


def movie(rng, frames=4, pairs=SEEN_PAIRS):
    """One thing moving over the canvas: (list of scenes, question, answer in left, right, up, down)."""
    way = rng.choice(("left", "right", "up", "down"))
    thing = Thing(*rng.choice(pairs), rng.choice(tuple(SIZES)), rng.random(), rng.random())
    scenes = []
    for step in np.linspace(0.05, 0.95, frames):
        along = float(1 - step if way in ("left", "up") else step)
        moved = replace(thing, x=along) if way in ("left", "right") else replace(thing, y=along)
        scenes.append(Scene((moved,)))
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
SPECIAL = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<image>",
    "<video>",
    "<boi>",
    "<eoi>",
    "<mask>",
    "<cls>",
    "<sep>",
    "<dec>",
    "<|endofchunk|>",
    "<spare1>",
    "<spare2>",
    "<spare3>",
    "<spare4>",
)
MERGES = VOCAB_SIZE - 256 - len(SPECIAL)
SPECIAL_IDS = {token: 256 + MERGES + i for i, token in enumerate(SPECIAL)}
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, VIDEO_ID, BOI_ID, EOI_ID, MASK_ID, CLS_ID, SEP_ID, DEC_ID, CHUNK_ID = range(496, 508)
SPLIT = r" ?[A-Za-z]+(?:-[A-Za-z]+)?|[0-9]| ?[^A-Za-z0-9\s]|\s"  # words with the space before them; single digits


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
    lines += [" ".join(compare(rng)[2:]) for _ in range(100)] + [" ".join(movie(rng)[1:]) for _ in range(100)]
    lines += [" ".join(read_number(rng)[1:]) for _ in range(50)] + [f"this is a {name}." for name in 5 * NAMES]
    lines += [
        "Question: which words can you read? Short answer: none",
        "find the biggest thing in the video, please.",
    ] * 50
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
SAVE_SECONDS = 20  # between two checkpoints
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these


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
    muon: float = 0.0  # > 0: Muon at this learning rate for hidden matrices; see make_optimizers
    demo: int = 0  # the number of steps when somebody waits for the demo; 0: as many as always

    def rate(self, step):
        """The fraction of the highest learning rate: linear warm-up, then half a cosine down to 5 % at the last
        step."""
        cosine = (1 + math.cos(math.pi * step / max(1, self.steps))) / 2
        return min(1, (step + 1) / self.warmup) * (0.05 + 0.95 * cosine)


def make_optimizers(plan, model):
    """A list of optimizers for the parameters that train. AdamW for all; biases, norms and scales do not decay.

    With plan.muon the matrices between embedding and output go to Muon instead (Jordan et al. 2024; the scale that
    matches AdamW's is from Moonlight, 2502.16982). Muon makes every direction of an update equally long, so that a rare
    but decisive direction, such as "look where the circle is", is not drowned by the common ones. A few hundred steps
    are then enough. Each parameter group remembers its own highest learning rate as `peak`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = {name for name, p in named if plan.muon and p.ndim == 2 and not re.search("embed|head", name)}
    rest = [p for name, p in named if name not in hidden]
    matrices = {"params": [p for p in rest if p.ndim >= 2], "weight_decay": plan.weight_decay, "peak": plan.lr}
    others = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "peak": plan.lr}
    optimizers = [torch.optim.AdamW([matrices, others], lr=plan.lr, betas=(0.9, plan.beta2), fused=True)]
    if hidden:
        group = {"params": [p for name, p in named if name in hidden], "peak": plan.muon}
        options = dict(momentum=0.9, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(torch.optim.Muon([group], lr=plan.muon, **options))
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
    plan = {name: value for name, value in asdict(plan).items() if name not in ("stage", "demo")}
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


def save_checkpoint(state, path):
    """Write beside, then rename: after a crash there is the old file or the new one, never half of one."""
    write_log(state["log"], path.parent)
    try:
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:
        stop(f"cannot write {path} ({error})")


def write_log(rows, folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        stop(f"cannot write {folder}/log.jsonl ({error}): remove it, or start from a directory you may write to")


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
    """One update at this fraction of the highest learning rate. With torchrun the loss of each process is its share of
    the joint one, so gradients are summed."""
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
    loss.backward()
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
    for module in model.modules():  # what is built on this model, or on a part of it, has this in its own key
        module.lineage = zlib.crc32(json.dumps(key).encode())
    model.folder = path.parent
    return model.eval()


def train(name, plan, model, loss_of, state, path, expected, after_step):
    """The part of `fit` that runs when there is something left to do."""
    optimizers, start, log = make_optimizers(plan, model), state["step"], state["log"]
    for optimizer, saved in zip(optimizers, state.get("optimizers", ())):
        optimizer.load_state_dict(saved)

    if RANK == 0:
        write_log(log, path.parent)  # a directory that cannot be written is found before the training
    saved = time.time()
    show = dict(unit=" samples", desc=name, mininterval=0.3, disable=None if RANK == 0 else True)
    bar = tqdm(total=plan.steps * plan.batch, initial=start * plan.batch, **show)
    model.train()
    with ctrl_c() as asked, bar:
        for step in range(start, plan.steps):
            loss, metrics = loss_of(step)
            total = torch.tensor([float(loss.detach()), float(len(asked))])
            sum_over_ranks(total)  # all processes see the same loss, and stop at the same step
            value, last = float(total[0]), step + 1 == plan.steps
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
            if RANK == 0 and (last or total[1] or time.time() - saved > SAVE_SECONDS):
                states = [optimizer.state_dict() for optimizer in optimizers]
                new = {"step": step + 1, "log": log, "model": model.state_dict(), "optimizers": states}
                save_checkpoint({"key": state["key"]} | new, path)
                saved = time.time()
            if total[1] and not last:
                bar.close()
                stop(f"stopped after step {step + 1} of {plan.steps}; the same command again goes on from there", 130)


# ----------------------------------------------------------------------------------------------------------------------
# Recipes: what all families share


@dataclass(frozen=True)
class Claim:
    """A sentence from a paper with a number of ours: it holds when `measured` is at least `target`."""

    name: str
    chance: float  # what guessing would give; for "a beats b": what b gives
    measured: float
    target: float

    @property
    def holds(self):
        return self.measured >= self.target


def claims_table(claims):
    """The claims as a markdown table, which reads well in a terminal too."""
    width = max(len(claim.name) for claim in claims)
    lines = [f"| {'claim':{width}} | chance | measured | target |   |"]
    lines.append(f"|-{'-' * width}-|-------:|---------:|-------:|---|")
    for c in claims:
        verdict = "holds" if c.holds else "DOES NOT HOLD"
        lines.append(f"| {c.name:{width}} | {c.chance:6.3f} | {c.measured:8.3f} | {c.target:6.3f} | {verdict} |")
    return "\n".join(lines)


def run_name(name, seed=0, steps=None):
    """runs/FAMILY holds the standard training, which other families build on; other seeds or steps live beside it."""
    return name + (f"-seed{seed}" if seed else "") + (f"-steps{steps}" if steps else "")


def batch_rngs(seed, step, batch):
    """One random.Random per sample of this process's slice of the joint batch: the union is always the same."""
    share = batch // WORLD_SIZE
    return [rng_for(seed, step, i) for i in range(RANK * share, (RANK + 1) * share)]


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
        logits = model(pad(rows)[0].to(device))
        return family.language_loss(logits, pad(labels, -100)[0].to(device))

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
    stages = ()
    fields = ("text",)  # what a row of own data needs besides file_name
    variants, beats, ablation_steps = {}, (), 300  # {variant: changes}, (claim, better variant, worse variant)

    # A family has start(device, seed, **changes), batch(plan, step), loss(model, samples, plan, step), and perhaps

    def freeze(self, model, plan):
        """Set what trains in a stage."""

    def expected(self, model, plan):
        """(text, value) of the first loss, or None."""

    def after_step(self, model):
        """What follows each update."""

    def collect(self, rows, plan, step):
        """Rows of own data, as `own` made them -> what `loss` takes."""
        return rows

    # Training

    @property
    def family(self):
        return self.module.__name__

    def code(self):
        return code_of(self.module, ("start", "freeze", "batch", "loss", "collect", "after_step"), type(self).__name__)

    def train(self, device="cpu", seed=0, steps=None, demo=False, name=None, skip=(), until=None, **changes):
        """Through all stages, each from the cache if it is there. steps: of the last stage; demo: somebody is waiting,
        so fewer steps if the standard training is not there; skip: stages left out; until: the last stage to run;
        changes: see start."""
        self.short = demo and not self.done()
        model = self.start(device, seed, **changes)
        for plan in self.stages:
            if plan.stage not in skip:
                length = (plan.demo if self.short else None if plan.stage else steps) or plan.steps
                full = "-".join(filter(None, (name or self.family, plan.stage)))
                full = run_name(full, seed, length if length != plan.steps else None)
                self.fit(full, model, replace(plan, steps=length, seed=seed), data=f"world {changes or ''}".strip())
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
            for question in args.prompt:
                say(self.answer(model, images, question, lambda text: tokenizer.encode(text).ids, tokenizer.decode))
        else:
            if args.fresh:
                forget(self.family)
            model = self.train(args.device, demo=True)
            images = images or [draw(make_scene(rng_for(f"{self.family} demo"), split="test"))]
            for question in args.prompt or [DESCRIBE]:
                say(f"{question} -> {self.answer(model, images, question, encode, decode)}")

    # `train_tiny.py FAMILY`, `--ablations` and `--data`

    def options(self, args):
        """What the command line changes about the training, as arguments of train."""
        return {}

    def run(self, args):
        model = self.train(args.device, args.seed, args.steps, **self.options(args))
        return self.claims(model, args) if RANK == 0 else []

    def ablations(self, args):
        """Every variant with seeds 0, 1, 2 and equal steps; claims about the means."""
        means, steps = {}, args.steps or self.ablation_steps
        for variant, changes in self.variants.items():
            name = f"{self.family}-ablations/{variant.replace(' ', '-').replace(',', '')}"
            each = [self.measure(self.train(args.device, seed, steps, name=name, **changes)) for seed in (0, 1, 2)]
            columns = list(zip(*each))
            say(f"{variant}: " + "; ".join(" ".join(f"{x:.3f}" for x in column) for column in columns))
            means[variant] = [sum(column) / 3 for column in columns]
        return self.compare(means)

    def compare(self, means):
        """{variant: its figures, means over the seeds} -> claims. The first figure decides."""
        return [Claim(f"{self.family}: {text}", means[b][0], means[a][0], means[b][0]) for text, a, b in self.beats]

    def own_data(self, args):
        """The toy learns from your rows; of twenty or more every tenth is kept back."""
        rows, fingerprint = read_folder(args.data, self.fields, self.own)
        held = rows[::10] if len(rows) >= 20 else rows
        rest = [row for i, row in enumerate(rows) if i % 10] if len(rows) >= 20 else rows
        plan = self.stages[-1]
        batch = min(plan.batch, len(rest)) // WORLD_SIZE * WORLD_SIZE
        plan = replace(plan, steps=args.steps or 100, batch=batch, seed=args.seed)
        self.check_own(rest, plan)
        model = self.train(args.device, **self.options(args))
        share = batch // WORLD_SIZE

        def draw_batch(step):
            chosen = rng_for(args.seed, ("own", step)).sample(rest, batch)[RANK * share : (RANK + 1) * share]
            return self.collect(chosen, plan, step)

        @torch.no_grad()
        def loss():
            return float(self.loss(model, self.collect(held[:64], plan, 0), plan, 0)[0])

        before = loss()
        self.fit(run_name(f"{self.family}-own", args.seed, args.steps), model, plan, draw_batch, fingerprint)
        which = "kept back" if rest is not rows else "trained on (too few to keep any back)"
        say(f"loss of {len(held[:64])} rows {which}: {before:.3f} before, {loss():.3f} after")
        say(f"the trained model is in {model.folder}")
        return []

    def check_own(self, rows, plan):
        """Stop before the training if own data cannot be trained on."""


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


def read_folder(folder, fields, make):
    """FOLDER/metadata.jsonl -> ([make(image, words of its fields ...)], what the cache calls this data).

    Bad rows and rows that `make` refuses with a ValueError are named by their line and left out; the program ends
    (status 2) when the file is missing or no row is good. fields: what a row needs besides file_name.
    """
    path, good, bad, fingerprint = Path(folder) / "metadata.jsonl", [], [], 0
    need = ", ".join(("file_name", *fields))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read {path} ({type(error).__name__}): --data needs a metadata.jsonl with lines of {need}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                image, *words = read_row(Path(folder), line, fields)
                good.append(make(image, *words))
                fingerprint = zlib.crc32(image.tobytes() + repr(words).encode(), fingerprint)
            except (ValueError, OSError) as error:
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


def questions(rng, count, kinds=None):
    """[(scene, question, answer)] about scenes never trained on."""
    asked = []
    for _ in range(count):
        scene = make_scene(rng, split="test")
        asked.append((scene, *ask(scene, rng, kinds or KINDS)))
    return asked


def guess(asked):
    """The accuracy of a model that knows the questions but not the pictures: always the commonest answer to such a
    question, where questions are alike that differ in colours, shapes and places only. asked: [(..., question,
    answer)]."""
    words, kinds = {*COLOURS, *SHAPES, *PLACES}, {}
    for _, question, answer in asked:
        kind = " ".join("_" if word in words else word for word in question.rstrip("?").split())
        kinds.setdefault(kind, []).append(answer)
    return sum(max(given.count(a) for a in set(given)) for given in kinds.values()) / len(asked)


def sheet(pictures, path, columns=4, scale=4, wide=230):
    """Write a PNG of pictures with lines of text below each: pictures is a list of (PIL image, text)."""
    tall = max(image.height * scale + 14 * (text.count("\n") + 1) + 10 for image, text in pictures)
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * wide + 10, rows * tall + 10), "white")
    pen = ImageDraw.Draw(page)
    for n, (image, text) in enumerate(pictures):
        x, y = 10 + n % columns * wide, 10 + n // columns * tall
        page.paste(image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + image.height * scale + 2), text, fill="black", spacing=2)
    save_picture(page, path)


def save_picture(page, path, what=""):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path)
    except OSError as error:
        stop(f"cannot write {path} ({error})")
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
    one, two, asked, answer = compare(rng)
    pictures += [(draw(one), f"{asked}\n{answer}"), (draw(two), "(second picture)")]
    number, asked, answer = read_number(rng)
    pictures.append((draw_number(number), f"{asked} {answer}"))
    scene = unseen_pair_scene(rng, 2)
    pictures.append((draw(scene), f"only in tests:\n{caption(scene)}".replace(", ", ",\n")))
    sheet(pictures, RUNS / "world.png")
    say("in text only, for a language model:\n" + text_line(rng))
    return []


def heat_picture(image, heat, size):
    """The image, darkened where little attention falls. heat [rows,columns]."""
    shade = Image.fromarray((255 * heat / heat.max()).to(torch.uint8).numpy())
    shade = shade.resize((size, size), Image.Resampling.NEAREST)
    image = image.resize((size, size), Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size), shade)


# ----------------------------------------------------------------------------------------------------------------------
# CLIP and SigLIP


def toy_clip(device="cpu"):
    """The standard toy CLIP: the frozen vision tower of the other families. Trained on the first call, then cached."""
    return CLIPRecipe().train(device)


def gather_features(features):
    """Features [b,E] of this process -> those of the joint batch [W*b,E], in the order of the ranks.

    Every process then computes the whole loss, and its share is 1/W of it. all_gather sends no gradient back, so that
    each process gets one for its own rows only: W times the gradient there makes up for the share of 1/W.
    """
    parts = [torch.empty_like(features) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, features.detach().contiguous())
    parts[RANK] = parts[RANK] + WORLD_SIZE * (features - features.detach())  # adds zeros, which carry the gradient
    return torch.cat(parts)


class CLIPRecipe(Recipe):
    module, model_class = clip, clip.CLIP
    stages = (Plan("", 700, 64, lr=1e-3, weight_decay=0.5, warmup=60),)
    variants = {
        f"{loss} {batch}": dict(loss=loss, batch=batch) for batch in (16, 128) for loss in ("softmax", "sigmoid")
    }
    ablation_steps = 500

    def train(self, *args, batch=None, **changes):
        """batch: an ablation's, in the place of the plan's."""
        if batch:
            self.stages = tuple(replace(plan, batch=batch) for plan in self.stages)
        return super().train(*args, **changes)

    def options(self, args):
        return dict(name=f"clip-{args.loss}", loss=args.loss) if args.loss != "softmax" else {}

    def start(self, device, seed, loss="softmax", tower=None, vision=None):
        """CLIP, or with SigLIP's switches: no class token, text that is not causal. tower: a trained vision tower to
        start from. vision: a tower of another kind in the place of CLIP's; its class token comes first."""
        torch.manual_seed(seed)
        config = clip.PRESETS["tiny"]
        if loss == "sigmoid":
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
        """[(picture, caption)]. All scenes of a step have equally many things, so that counting them tells nothing
        apart, and the captions are about equally long."""
        count = rng_for(plan.seed, step).choice((1, 2, 2, 3, 4))
        scenes = [(make_scene(rng, count), rng) for rng in batch_rngs(plan.seed, step, plan.batch)]
        return [(draw(scene), caption(scene, rng)) for scene, rng in scenes]

    def features(self, model, samples):
        """[(picture, text)] -> image and text features [B,E] of length one."""
        pixels = clip.preprocess([picture for picture, _ in samples], model.config.vision)
        image = model.encode_image(pixels.to(model.logit_scale.device))
        return image, clip.encode_prompts(model, [text for _, text in samples], self.tokenizer_of(model))

    def tokenizer_of(self, model):
        """What clip.py calls tokenize: texts -> ids and, where padding would be seen, mask."""

        def tokenize(texts):
            ids, mask = pad(text_rows(texts, model.config.text.context))
            return ids, None if model.config.text.causal else mask

        return tokenize

    def loss(self, model, samples, plan, step):
        """Each pair is compared with all others of the joint batch."""
        image, text = self.features(model, samples)
        if WORLD_SIZE == 1 or not image.requires_grad:  # alone, or own data are measured
            return model.loss(image, text)
        loss, metrics = model.loss(gather_features(image), gather_features(text))
        return loss / WORLD_SIZE, metrics  # the share of this process: losses and gradients are summed over all

    def expected(self, model, plan):
        return ("ln B", math.log(plan.batch)) if model.config.loss == "softmax" else None

    def after_step(self, model):
        model.clip_logit_scale()

    def own(self, picture, text):
        check_fits(text_rows([text])[0], clip.PRESETS["tiny"].text.context)
        return picture, text

    def check_own(self, rows, plan):
        if plan.batch < 2:
            stop(f"a contrastive loss tells at least two pairs apart, the data have {len(rows)}")

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
        rng = rng_for("clip claims")
        unseen = [make_scene(rng, split="test") for _ in range(512)]
        pairs = [unseen_pair_scene(rng, 1) for _ in range(300)]
        right = self.retrieval(model, [(draw(scene), caption(scene)) for scene in unseen])
        bare, ensemble = self.naming(model, pairs, ("{}",)), self.naming(model, pairs, TEMPLATES)
        return [
            Claim("clip: retrieval, right caption among 512 unseen scenes", 1 / 512, right, 0.95),
            Claim("clip: naming pairs never seen in training, 30 ways", 1 / 30, ensemble, 0.80),
            Claim("clip: template ensemble no worse than the bare name", 1 / 30, ensemble, bare),
        ]

    def measure(self, model):
        rng = rng_for("clip ablations")
        scenes = [make_scene(rng, split="test") for _ in range(512)]
        return [self.retrieval(model, [(draw(scene), caption(scene)) for scene in scenes])]

    def compare(self, means):
        (softmax16,), (sigmoid16,), (softmax128,), (sigmoid128,) = means.values()
        even = softmax128 - abs(sigmoid128 - softmax128)
        return [
            Claim("clip: sigmoid no worse than softmax at batch 16", softmax16, sigmoid16, softmax16),
            Claim("clip: sigmoid and softmax within 0.03 at batch 128", softmax128, even, softmax128 - 0.03),
        ]


# ----------------------------------------------------------------------------------------------------------------------
# ViLT


class ViLTRecipe(Recipe):
    module = vilt


# ----------------------------------------------------------------------------------------------------------------------
# LLaVA

LM_STEPS = 100
KINDS = ("colour", "shape", "size", "what", "count")  # what LLaVA is taught to answer; more in QUESTIONS
# "where" is left out: after these few steps it is still answered by guessing. Add it, and see how many it takes.


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
        Plan("", 1500, 16, lr=2e-3, muon=3e-3, warmup=100, weight_decay=0.02, demo=700),
    )
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
        samples = []
        for rng in batch_rngs(plan.seed, (1 if plan.stage else 2, step), plan.batch):
            scene = make_scene(rng)
            turns = [] if plan.stage else [ask(scene, rng, KINDS) for _ in range(4)]
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
        pixels = llava.preprocess([picture for picture, _ in samples], model.config.vision).to(device)
        return llava.language_loss(model(ids.to(device), pixels), labels.to(device))

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
        vqa, unseen = questions(rng_for("llava claims"), 400), unseen_pair_questions(rng_for("llava unseen"), 300)
        swaps = swapped_questions(rng_for("llava swaps"), 200)
        one = self.answers(model, [(scene, question) for scene, _, question, _, _ in swaps])
        two = self.answers(model, [(other, question) for _, other, question, _, _ in swaps])
        swapped = sum(a == right and b == other for a, b, (*_, right, other) in zip(one, two, swaps)) / len(swaps)
        of_unseen_pairs = self.accuracy(model, unseen)
        return [
            Claim("llava: questions about unseen scenes", guess(vqa), self.accuracy(model, vqa), 0.90),
            Claim("llava: another image, another answer", 0.0, swapped, 0.90),
            Claim("llava: questions about pairs never seen in training", guess(unseen), of_unseen_pairs, 0.80),
        ]

    def measure(self, model):
        return [self.accuracy(model, questions(rng_for("llava ablations"), 400))]

    # The workbench

    def check_question(self, question, images, toy):
        prompt = llava.build_prompt(question, max(len(images), int(toy)))
        if toy:
            tokens = llava.num_image_tokens(32, 32, llava.PRESETS["tiny"])
            check_fits(encode(llava.expand_images(prompt, tokens)), llava.PRESETS["tiny"].language.context - 16)

    def demo(self, args):
        asked = questions(rng_for("llava demo"), 6)
        say("In goes an image of 32 x 32 pixels, 16 patches, and a question; the decoder reads both as one row of 16")
        say(f"vectors and words:\n    {llava.build_prompt(asked[0][1])!r}")
        untrained = self.start(args.device, seed=0)
        said = self.answers(untrained, asked[:3], 40)
        say(f"before training it says: {', '.join(repr(text[:24]) for text in said)}")
        model, pictures = self.train(args.device, demo=True), []
        say("\nafter training, about images it has never seen:")
        for (scene, question, right), text in zip(asked, self.answers(model, asked, 40)):
            verdict = "right" if text == right else f"wrong, it is {right}"
            say(f"    [{caption(scene)}]\n        {question} -> {text} ({verdict})")
            maps = [llava_attention(m, draw(scene), question) for m in (untrained, model)]
            pictures.append((draw(scene), *maps, f"{question}\n{text}\n({verdict})"))
        many = questions(rng_for("llava demo, many"), 200)
        say(
            f"of 200 more questions {self.accuracy(model, many):.0%} are answered rightly (guessing: {guess(many):.0%})"
        )
        if self.short:
            say("(this model had half the training; after python train_tiny.py llava the demo shows the whole one)")
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
                draw_mask(8, 8, causal=True),
            ),
            (
                "decoder, a row with 2 tokens of padding on the left",
                draw_mask(8, 8, causal=True, q_segments=padded, k_segments=padded),
            ),
            ("decoder with a KV cache: 2 new tokens after 6 cached ones", draw_mask(2, 8, causal=True)),
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


@torch.no_grad()
def llava_attention(model, picture, question):
    """Where the decoder looks when it is about to answer: attention from the last token of the prompt to the patches,
    mean over heads and layers, [rows,columns]."""
    pixels = llava.preprocess([picture], model.config.vision).to(model.language.norm.weight.device)
    tokens = llava.num_image_tokens(*pixels.shape[2:], model.config)
    ids = torch.tensor([encode(llava.expand_images(llava.build_prompt(question), tokens))], device=pixels.device)
    x = model.embed(ids, model.image_tokens(pixels))
    with attention_maps() as maps:  # one map [1,H,T,T] per layer
        model.language.hidden(x)
    to_patches = torch.stack(maps)[:, 0, :, -1][..., ids[0] == model.config.image_token_id]  # [layers,H,N]
    return to_patches.mean((0, 1)).view(pixels.shape[2] // model.config.vision.patch_size, -1).cpu()


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


def swapped_questions(rng, count):
    """[(scene, other scene, question, answer, other answer)]: the same question with different answers."""
    pairs = []
    while len(pairs) < count:
        one, two = make_scene(rng, split="test"), make_scene(rng, split="test")
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
# BLIP2


class BLIP2Recipe(Recipe):
    module = blip2


# ----------------------------------------------------------------------------------------------------------------------
# Flamingo


class FlamingoRecipe(Recipe):
    module = flamingo


# ----------------------------------------------------------------------------------------------------------------------
# CogVLM


class CogVLMRecipe(Recipe):
    module = cogvlm


# ----------------------------------------------------------------------------------------------------------------------
# Qwen2-VL

# (width, height) of pictures. What takes longest to learn, to find a thing and read off its property, comes first, on
# small ones and nearly alone.
SMALL_CANVASES = ((32, 32), (48, 48), (48, 32), (32, 48), (64, 32), (32, 64))
LARGER_CANVASES = ((64, 64), (80, 80), (80, 48), (48, 80))
CANVASES = SMALL_CANVASES + LARGER_CANVASES
NEW_CANVASES = ((80, 32), (32, 80), (64, 48), (48, 64), (80, 64), (64, 80))  # of shapes never trained on
LARGE_CANVASES = ((96, 96), (112, 64), (64, 112), (128, 48))  # larger than any in training
FRAMES, LONG_MOVIES = (2, 4, 6), (8, 12, 16, 24)  # lengths of movies in training, and longer ones
NUMBER_SIZE = (48, 48)  # of a picture with a number in it: 3 x 3 tokens
TOKENS = (1, 4, 9)  # how many tokens it may have when it is read

QWEN_SHOWS = {  # stage: the kind of each sample of a step, equal ones together, and the sizes of scenes and things
    "part1": (("scene",) * 14 + ("movie",) * 2, SMALL_CANVASES),
    "": (("scene",) * 7 + ("number",) * 9 + ("movie",) * 2, CANVASES + LARGER_CANVASES),  # the larger ones twice
    "things": (("thing",) * 8, CANVASES),
    "things of one size": (("thing",) * 8, ((48, 48),)),
    "large movies": (("large movie",) * 8, CANVASES),
}


class Qwen2VLRecipe(Recipe):
    """Part 1: small pictures, first with everything that trains, then with the vision encoder locked. Part 2: all sizes
    and numbers to read; everything trains once more, at a lower rate, so that what was learned is kept."""

    module, model_class, fields = qwen2vl, qwen2vl.Qwen2VL, ("question", "answer")
    stages = (
        Plan("part1", 900, 16, lr=2e-3, muon=3e-3, warmup=50, weight_decay=0.02, demo=350),
        Plan("", 560, 18, lr=0.67 * 2e-3, muon=0.67 * 3e-3, warmup=50, weight_decay=0.02, demo=100),
    )
    variants = {  # (what its only stage shows, steps, changes)
        "any size": ("things", 300, {}),
        "one size, learned positions": ("things of one size", 300, dict(learned=6)),
        "M-RoPE": ("large movies", 1000, {}),
        "RoPE-1D": ("large movies", 1000, dict(mrope=False)),
    }
    short, seconds = False, ()  # see train, and load_images

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
        kinds, sizes = QWEN_SHOWS[plan.stage]
        if plan.stage == "part1" and step < plan.steps * 3 // 20:
            sizes = sizes[:1]
        part1 = self.stages[0].demo if self.short else self.stages[0].steps
        data = "world" if plan.stage else f"world, after {part1} steps of part 1"  # not the samples of part 1 again
        rngs = batch_rngs(plan.seed, ("qwen", data, step), len(kinds))
        return [(*qwen_sample(kind, rng, sizes), kind) for kind, rng in zip(kinds, rngs)]

    def row(self, config, turns, shown, grid):
        """A conversation about a picture or a clip, which stands in front -> ids, labels."""
        ids, labels = [], []
        for n, (asked, right) in enumerate(turns):
            visual = dict(kinds=qwen2vl.kinds_of([shown]), grid_thw=grid[None]) if n == 0 else {}
            more = qwen2vl.encode_turn(asked, f" {right}", encode, config, **visual)
            ids, labels = ids + more[0], labels + more[1]
        return ids, labels

    def rows(self, model, samples):
        """[(picture or frames, turns, kind)] -> the arguments of the model, and labels. Grids stay on the CPU: their
        sizes are numbers for Python. Padding is to the right of all labels, so nothing attends to it."""
        device = model.language.norm.weight.device
        patches, grids = qwen2vl.preprocess([shown for shown, _, _ in samples], model.config.vision)
        rows = [self.row(model.config, turns, shown, grid) for (shown, turns, _), grid in zip(samples, grids)]
        ids, _ = pad([ids for ids, _ in rows])
        labels, _ = pad([labels for _, labels in rows], qwen2vl.IGNORE_INDEX)
        return dict(ids=ids.to(device), patches=patches.to(device), grid_thw=grids), labels.to(device)

    def loss(self, model, samples, plan, step):
        """A kind counts by its samples, not by its words: captions have many. In the last 40 % of part 1 the vision
        encoder is locked (the paper's stage 3)."""
        if plan.stage == "part1":
            qwen2vl.freeze(model, 2 if step < plan.steps * 3 // 5 else 3)
        inputs, labels = self.rows(model, samples)
        logits, kinds = model(**inputs), [kind for _, _, kind in samples]
        counts = [kinds.count(kind) for kind in dict.fromkeys(kinds)]
        each, total = {}, 0
        for kind, part, rows in zip(dict.fromkeys(kinds), logits.split(counts), labels.split(counts)):
            loss, _ = qwen2vl.language_loss(part, rows)
            each[kind] = loss.detach()
            total = total + loss * len(rows) / len(labels)
        return total, each

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
        asked = [size_questions(300, sizes) for sizes in (CANVASES, NEW_CANVASES, LARGE_CANVASES)]
        seen, new, large = (self.accuracy(model, questions) for questions in asked)
        guessed = guess(asked[0])
        curve = [self.accuracy(model, qwen_numbers(200, tokens)) for tokens in TOKENS]
        ways = self.accuracy(model, [one for frames in FRAMES for one in qwen_movies(100, frames)])
        longer = [f"{frames} frames: {self.accuracy(model, qwen_movies(100, frames)):.3f}" for frames in LONG_MOVIES]
        read = ", ".join(f"{tokens}: {share:.3f}" for tokens, share in zip(TOKENS, curve))
        say(
            f"questions answered: {seen:.3f} in sizes of training, {new:.3f} in shapes never seen, {large:.3f} in "
            "larger ones",
            f"numbers read with {read} tokens",
            f"longer movies: {', '.join(longer)}",
        )
        least = min(b - a for a, b in zip(curve, curve[1:]))
        return [
            Claim("qwen2vl: questions about unseen scenes", guessed, seen, 0.80),
            Claim("qwen2vl: gain by sizes and shapes never seen", guessed - seen, new - seen, -0.05),
            Claim("qwen2vl: which way does it move", 0.25, ways, 0.90),
            Claim("qwen2vl: numbers read with all their tokens", 0.01, curve[-1], 0.90),
            Claim("qwen2vl: least gain from more tokens, 1 4 9", 0.0, least, 0.0),
            Claim("qwen2vl: tokens grow with the area (correlation)", 0.0, tokens_per_area(), 0.98),
        ]

    def ablations(self, args):
        """On pictures of one thing: many sizes as they are, against an encoder of one resolution with learned
        positions, which are stretched to other sizes. On movies: M-RoPE against all tokens numbered one by one, on
        movies longer than those of training, whose numbers run past those trained."""
        means = {}
        for variant, (shows, steps, changes) in self.variants.items():
            name = f"{self.family}-ablations/{variant.replace(' ', '-').replace(',', '')}"
            plan = replace(self.stages[0], stage=shows, steps=args.steps or steps, batch=len(QWEN_SHOWS[shows][0]))
            each = []
            for seed in (0, 1, 2):
                model = self.start(args.device, seed, **changes)
                data = f"world {shows} {changes or ''}".strip()
                self.fit(run_name(name, seed, args.steps), model, replace(plan, seed=seed), data=data)
                each.append(self.measure(model, shows))
            what = "of lengths in training / longer" if "movies" in shows else "of sizes in training / of new ones"
            say(f"{shows}, {what}, {variant}: " + ", ".join(f"{own:.3f} / {new:.3f}" for own, new in each))
            means[variant] = [sum(column) / 3 for column in zip(*each)]
        return self.compare(means)

    def measure(self, model, shows):
        """The share that is answered, of what the stage `shows` and of what is new."""
        if shows == "large movies":
            asked = [[one for frames in some for one in qwen_movies(50, frames, 48)] for some in (FRAMES, LONG_MOVIES)]
        else:
            asked = [size_questions(300, sizes, qwen_thing) for sizes in (QWEN_SHOWS[shows][1], NEW_CANVASES)]
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
        asked = [first_turn(qwen_scene(rng_for("qwen demo", i), [size], "test")) for i, size in enumerate(NEW_CANVASES)]
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
        for (picture, question, right), text in zip(asked, self.answers(model, asked, 12)):
            verdict = "right" if text == right else f"wrong, it is {right}"
            size = f"{picture.height} x {picture.width}"
            say(f"    {size:>8} = {tokens(picture):>2} tokens: {question} -> {text} ({verdict})")
        many = [first_turn(qwen_scene(rng_for("qwen demo, many", i), NEW_CANVASES, "test")) for i in range(200)]
        say(
            f"of 200 more questions {self.accuracy(model, many):.0%} are answered rightly (guessing: {guess(many):.0%})"
        )
        films = [qwen_movie(rng_for("qwen demo, movie", i), frames) for i, frames in enumerate((2, 6, 12, 16))]
        films = [first_turn(film) for film in films]
        for (frames, question, right), text in zip(films, self.answers(model, films, 12)):
            verdict = "right" if text == right else f"wrong, it is {right}"
            say(f"    a movie of {len(frames):>2} frames: {question} -> {text} ({verdict})")
        if self.short:
            say("(this model had part of the training; after python train_tiny.py qwen2vl the demo shows all of it)")
        say("\nthe same picture with fewer and with more pixels, which is fewer and more tokens:")
        rows = []
        number = first_turn(qwen_number(rng_for("qwen demo, number"), TOKENS[-1]))
        for (picture, question, right), budgets in ((number, TOKENS), (asked[3], (2, 6, 12))):  # at most so many tokens
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
        frames = qwen2vl.patch_places(grid, 2)[0]
        small = replace(qwen2vl.VISION_2_5, window_size=28)
        windows = qwen2vl.window_segments(qwen2vl.patch_places(torch.tensor([[1, 4, 4]]), 2), small)
        padded = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0]])
        return [
            (
                "vision encoder, one packed row: an image of 2 x 2 patches, a clip of two frame pairs of 2 x 2",
                draw_mask(12, 12, q_segments=frames, k_segments=frames),
            ),
            (
                "Qwen2.5-VL's windows, here of 2 x 2 patches in an image of 4 x 4; in 4 of 32 layers all see all",
                draw_mask(16, 16, q_segments=windows, k_segments=windows),
            ),
            (
                "decoder: causal over words and image tokens alike, here 2 words, 4 tokens, 2 words",
                draw_mask(8, 8, causal=True),
            ),
            (
                "decoder, a row with 2 tokens of padding on the left",
                draw_mask(8, 8, causal=True, q_segments=padded, k_segments=padded),
            ),
            ("decoder with a KV cache: 2 new tokens after 6 cached ones", draw_mask(2, 8, causal=True)),
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


def qwen_sample(kind, rng, sizes):
    """(picture or frames, turns) of this kind; scenes and things in one of these sizes."""
    if kind == "scene":
        return qwen_scene(rng, sizes)
    if kind == "thing":
        return qwen_thing(rng, sizes)
    if kind == "number":
        return qwen_number(rng)
    return qwen_movie(rng, side=48 if kind == "large movie" else 32)  # 9 tokens for two frames, or 4


def qwen_scene(rng, sizes=CANVASES, split="train"):
    """A picture with its description among four questions; a test scene with one question."""
    scene = make_scene(rng, split=split)
    turns = [ask(scene, rng, KINDS) for _ in range(4 if split == "train" else 1)]
    if split == "train":
        turns.insert(rng.randrange(5), (DESCRIBE, caption(scene)))
    return draw(scene, *rng.choice(sizes)), turns


def qwen_thing(rng, sizes=CANVASES, split=None):
    """A picture of one thing, and what it is. For comparisons that must be quick. One thing is too little for scenes of
    its own in the test split, whatever `split` is: what is new in a test is the size of the picture."""
    (thing,) = (scene := make_scene(rng, 1, split="any")).things
    return draw(scene, *rng.choice(sizes)), [("what is it?", f"a {thing.full_name}")]


def qwen_number(rng, tokens=None):
    """A small number, its strokes 3 pixels wide, about in the middle of a picture that is then given so few pixels that
    it makes at most `tokens` tokens (None: any of TOKENS, three times in five the most)."""
    text, question, answer = read_number(rng)
    number, image = draw_number(text, 24, 18), Image.new("RGB", NUMBER_SIZE, (20,) * 3)
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


def first_turn(sample):
    """(picture or frames, turns) -> (picture or frames, question, answer), as it is asked."""
    shown, turns = sample
    return shown, *turns[0]


def size_questions(count, sizes, sample=qwen_scene):
    """[(picture, question, answer)] in these sizes, the same scenes and questions whatever the sizes. Those of
    qwen_scene were never trained on; those of qwen_thing may have been, in other sizes."""
    chosen = [[sizes[i % len(sizes)]] for i in range(count)]
    return [first_turn(sample(rng_for("qwen size", i), size, "test")) for i, size in enumerate(chosen)]


def qwen_movies(count, frames, side=32):
    rng = rng_for("qwen movies", frames)
    return [first_turn(qwen_movie(rng, frames, side)) for _ in range(count)]


def qwen_numbers(count, tokens):
    rng = rng_for("qwen numbers")  # the same numbers whatever the tokens
    return [first_turn(qwen_number(rng, tokens)) for _ in range(count)]


def tokens_per_area():
    """The correlation of visual tokens with the area of pictures of random sizes and shapes, as preprocess makes
    them."""
    rng, vision = rng_for("qwen areas"), qwen2vl.PRESETS["tiny"].vision
    sizes = [(rng.randrange(32, 129), rng.randrange(32, 129)) for _ in range(200)]
    tokens = [len(qwen2vl.preprocess([Image.new("RGB", size)], vision)[0]) / vision.merge**2 for size in sizes]
    return float(np.corrcoef([w * h for w, h in sizes], tokens)[0, 1])


def load_video(path):
    """A folder of frames, in the order of their names, or an animated GIF -> list of PIL images, seconds from one frame
    to the next. A folder has no times: two frames a second are assumed, the published default. Raises ValueError."""
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise ValueError(f"{path} has no frames in it: a video is a folder of images, or an animated GIF")
        return [load_image(file) for file in files], 0.5
    load_image(path)  # reports what is wrong with the file or with its first frame
    frames, seconds = [], []
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                frames.append(frame.convert("RGB"))
                seconds.append((frame.info.get("duration") or 100) / 1000)  # none or 0: a tenth, as browsers show it
    except Exception as error:  # Pillow raises many kinds; a file cut short is found in one of its later frames
        raise ValueError(f"{path} is broken behind frame {len(frames)} ({error}): save it again") from None
    return frames, sum(seconds) / len(seconds)


def cut_picture(image, config, scale):
    """The image as the vision encoder gets it, `scale` times as large, with a line around every token of the
    decoder."""
    _, rows, columns = qwen2vl.image_grid(image.height, image.width, config)
    image = image.resize((columns * config.patch_size, rows * config.patch_size), Image.Resampling.BICUBIC)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, side = ImageDraw.Draw(image), config.factor * scale
    for x in range(0, image.width, side):
        for y in range(0, image.height, side):
            pen.rectangle((x, y, x + side - 1, y + side - 1), outline="#ff8800")
    return image


def draw_resolutions(rows, file, config, wide=280, tall=240):
    """PNG: rows of (image, text) cut into tokens; the same picture at more and more pixels, and what is read there."""
    page = Image.new("RGB", (max(map(len, rows)) * wide, len(rows) * tall), "white")
    pen = ImageDraw.Draw(page)
    for y, row in enumerate(rows):
        for x, (image, text) in enumerate(row):
            _, h, w = qwen2vl.image_grid(image.height, image.width, config)
            cut = cut_picture(image, config, max(1, 180 // (max(h, w) * config.patch_size)))
            page.paste(cut, (x * wide + 8, y * tall + 8))
            pen.multiline_text((x * wide + 8, y * tall + 16 + cut.height), text, fill="black", spacing=4)
    save_picture(page, file, "two pictures cut into their tokens, at three resolutions each")


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
            rows.extend((name, x) for x in tensors if torch.is_tensor(x))

        hooks.append(module.register_forward_hook(note))

    for name, module in model.named_modules():
        if name.count(".") < 2 or name.count(".") == 2 and name[-1].isdigit():
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


def load_published(recipe, args):
    """--weights -> (model, tokenizer). Raises ValueError in one line, whatever is wrong with the files."""
    try:
        from tokenizers import Tokenizer

        folder = recipe.module.checkpoint_folder(args.weights)
        recipe.module.config_from_published(folder)  # a checkpoint of another family is found before gigabytes are read
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
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
    show("--weights", metavar="DIR_OR_HUB_ID", help="a published checkpoint in the Hugging Face layout")
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
    try:
        check_device(args.device)
        if args.anatomy:
            anatomy(recipe, args.anatomy)
        elif args.trace:
            show_trace(recipe)
        elif args.show_mask:
            say("rows look at columns; # may, . may not", *(f"\n{what}\n{mask}" for what, mask in recipe.masks()))
        elif args.weights or args.image or args.prompt or getattr(args, "video", None):
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
    parser.add_argument("--seed", type=int, default=0)
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
    if WORLD_SIZE > 1 and (args.what != "clip" or args.ablations):
        stop("torchrun is for the contrastive loss: torchrun --nproc-per-node 2 train_tiny.py clip")
    if args.what == "clip" and CLIPRecipe.stages[-1].batch % WORLD_SIZE:
        stop(f"a batch of {CLIPRecipe.stages[-1].batch} cannot be shared by {WORLD_SIZE} processes: use a divisor")
    try:
        check_device(args.device)
    except ValueError as error:
        stop(str(error))


def run_all(args):
    """All families, one after the other, and the table of their claims in runs/claims.md."""
    claims = []
    for recipe in RECIPES.values():
        claims += recipe().ablations(args) if args.ablations else recipe().run(args)
    table = RUNS / (run_name("ablations" if args.ablations else "claims", steps=args.steps) + ".md")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(f"Seed {args.seed}, {time.strftime('%Y-%m-%d')}\n\n{claims_table(claims)}\n")
    say(f"written: {table}")
    return claims


def forget(family):
    """--fresh: remove the checkpoints of one family, so that it is trained again."""
    for path in [*RUNS.glob(f"{family}/checkpoint.pt"), *RUNS.glob(f"{family}-*/**/checkpoint.pt")]:
        path.unlink()


def main(argv=None):
    """Returns the exit status: 0, or 1 when a claim does not hold."""
    args = trainer_command_line().parse_args(argv)
    check(args)
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo")
    try:
        if args.fresh:
            forget(args.what)
        if args.what == "world":
            claims = world_sheet()
        elif args.what == "all":
            claims = run_all(args)
        else:
            recipe = RECIPES[args.what]()
            claims = (recipe.own_data if args.data else recipe.ablations if args.ablations else recipe.run)(args)
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
