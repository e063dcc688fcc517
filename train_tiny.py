"""The toy world, its tokenizer, one training loop, and one recipe per family: everything the seven files are trained on.

What. A seeded world of coloured shapes, drawn with Pillow, nothing stored: scenes, captions, questions with answers,
boxes, comparisons of two pictures, short videos, numbers to read. A fifth of the colour-shape pairs is never shown in
training, neither drawn nor named: whoever gets those right has learned to compose colour with shape.

How.    python train_tiny.py world              a sheet of samples, to see what the models see
        python train_tiny.py clip               train, then print the paper's claims at toy scale: hold or not
        python train_tiny.py all                all seven families, and the table for the README
        python train_tiny.py clip --ablations   "a beats b", three seeds, equal steps, in minutes
        python train_tiny.py clip --data DIR    your own pictures: DIR/metadata.jsonl with file_name and text
        torchrun --nproc-per-node 2 train_tiny.py clip

What to try. Hide another pair (UNSEEN_PAIRS) and see whether zero-shot naming survives. Leave "something red" out of
`caption` and watch it fall. Train with batch 8: why does the contrastive loss start at ln 8? Interrupt with Ctrl-C, start
again, and compare the weights with those of a run left in peace: not one bit differs. Why must data be a function of the
step for that?

Sections: the world - the tokenizer - the loop - recipes and claims - own data - command line.
"""

import argparse
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
from PIL import Image, ImageDraw
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------------
# The world: things on a canvas
# ------------------------------------------------------------------------------------------------------------------

COLOURS = {"red": (255, 70, 60), "green": (60, 220, 90), "blue": (80, 140, 255),       # all bright, since a shape that
           "yellow": (255, 225, 60), "purple": (205, 90, 245), "white": (250, 250, 250)}  # hardly shows teaches little
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 0.30, "large": 0.42}              # side, as a fraction of the canvas's shorter side; below a half
JITTER = 0.25                                       # 1: anywhere in its quarter of the canvas; 0: always in the middle
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
NUMBERS = ("zero", "one", "two", "three", "four")
NAMES = ("blick", "dax", "fep", "gazzer", "kiki", "lorp", "modi", "pilk", "rif", "tufa", "wug", "zibo", "tepa", "mip",
         "nax", "sorb")                             # words without a meaning, to be given one in a few examples

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)        # 30
UNSEEN_PAIRS = (("red", "triangle"), ("green", "circle"), ("blue", "cross"),    # a fifth: each colour once, each shape
                ("yellow", "ring"), ("purple", "square"), ("white", "circle"))  # at most twice
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)


@dataclass(frozen=True)
class Thing:
    """One object. x, y in [0, 1] say where its box lies between the far left (top) and the far right (bottom), so that the
    same thing fits on a canvas of any size and aspect ratio."""
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
        things = tuple(place_thing(pair, rng.choice(("small", "large")), place, rng)
                       for pair, place in zip(chosen, places))
        scene = Scene(things, grey=rng.randrange(0, 60))
        if split == "any" or scene.is_test == (split == "test"):
            return scene


def change_one(scene, rng, split="train"):
    """The same scene but for one property of one thing (shape, colour or size): a hard negative for whoever must tell the
    two captions apart."""
    while True:
        which = rng.randrange(len(scene.things))
        old = scene.things[which]
        key, values = rng.choice((("shape", SHAPES), ("colour", tuple(COLOURS)), ("size", tuple(SIZES))))
        new = replace(old, **{key: rng.choice(values)})
        things = scene.things[:which] + (new,) + scene.things[which + 1:]
        other = replace(scene, things=things)
        if new != old and new.pair in SEEN_PAIRS and len({t.pair for t in things}) == len(things) \
                and (split == "any" or other.is_test == (split == "test")):
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


# ------------------------------------------------------------------------------------------------------------------
# The world: drawing
# ------------------------------------------------------------------------------------------------------------------

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
    x0, y0, x1, y1 = box[0], box[1], box[2] - 1, box[3] - 1         # Pillow's corners are inclusive
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
    else:                                                           # a ring shows the background through its hole
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
GLYPHS = {digit: bits for digit, bits in zip("0123456789", (
    0b111101101101111, 0b010110010010111, 0b111001111100111, 0b111001111001111, 0b101101111001001,
    0b111100111001111, 0b111100111101111, 0b111001010010010, 0b111101111101111, 0b111101111001111))}


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


# ------------------------------------------------------------------------------------------------------------------
# The world: words
# ------------------------------------------------------------------------------------------------------------------

TEMPLATES = ("a {}", "a picture of a {}", "there is a {}", "this is a {}")      # prompts for zero-shot naming


def caption(scene, rng=None):
    """What the scene shows. Without rng the one full caption: every thing with size, colour, shape and place, in reading
    order. With rng one of several ways to say it, some of which leave something out."""
    things, dice = scene.things, 1.0 if rng is None else rng.random()
    if dice < 0.12:                                                 # names only, in any order
        return rng.choice(TEMPLATES).format(" and a ".join(t.name for t in rng.sample(things, len(things))))
    if dice < (0.40 if len(things) == 1 else 0.24):                 # one property: what "red" or "ring" means by itself
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


def ask_colour(scene, rng):
    thing = rng.choice(scene.things)
    by_shape = len(only(scene, shape=thing.shape)) == 1 and rng.random() < 0.7
    return f"what colour is the {thing.shape if by_shape else f'{thing.place} thing'}?", thing.colour


def ask_shape(scene, rng):
    thing = rng.choice(scene.things)
    by_colour = len(only(scene, colour=thing.colour)) == 1 and rng.random() < 0.7
    return f"what shape is the {thing.colour if by_colour else thing.place} thing?", thing.shape


def ask_size(scene, rng):
    thing = rng.choice(scene.things)
    return f"what size is the {refer(scene, thing)}?", thing.size


def ask_where(scene, rng):
    thing = rng.choice(scene.things)
    return f"where is the {refer(scene, thing)}?", thing.place


def ask_what(scene, rng):
    place = rng.choice(PLACES)
    found = only(scene, place=place)
    return f"what is {place}?", f"a {found[0].full_name}" if found else "nothing"


def ask_count(scene, rng):
    return "how many things are there?", NUMBERS[len(scene.things)]


def ask_count_of(scene, rng):
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        return f"how many {thing.colour} things are there?", NUMBERS[len(only(scene, colour=thing.colour))]
    return f"how many of the things are a {thing.shape}?", NUMBERS[len(only(scene, shape=thing.shape))]


def ask_there(scene, rng):
    """Yes and no equally often, for a colour or a shape."""
    key, values = rng.choice((("colour", tuple(COLOURS)), ("shape", SHAPES)))
    here = {getattr(t, key) for t in scene.things}
    yes = rng.random() < 0.5
    word = rng.choice([v for v in values if (v in here) == yes])
    return f"is there a {word}{' thing' if key == 'colour' else ''}?", "yes" if yes else "no"


def ask_pair(scene, rng):
    """Yes and no equally often; the "no" is a hard one: the colour or the shape is there, the pair is not."""
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        return f"is there a {thing.name}?", "yes"
    near = [p for p in SEEN_PAIRS if (p[0] == thing.colour or p[1] == thing.shape)
            and p not in [t.pair for t in scene.things]]
    return "is there a {} {}?".format(*rng.choice(near)), "no"


def ask_side(scene, rng):
    """The only question about two things: whoever answers must find both, and compare."""
    if len({t.x < 0.5 for t in scene.things}) == 2:
        a = rng.choice(scene.things)
        b = rng.choice([t for t in scene.things if (t.x < 0.5) != (a.x < 0.5)])
        return f"is the {refer(scene, a)} left or right of the {refer(scene, b)}?", relation(a, b).split()[0]


QUESTIONS = {"colour": ask_colour, "shape": ask_shape, "size": ask_size, "where": ask_where, "what": ask_what,
             "count": ask_count, "count of": ask_count_of, "there": ask_there, "pair": ask_pair, "side": ask_side}


def ask(scene, rng, kinds=tuple(QUESTIONS)):
    """A (question, answer) about the scene, of one of these kinds, among those that make sense for it."""
    for kind in rng.sample(kinds, len(kinds)):
        pair = QUESTIONS[kind](scene, rng)
        if pair:
            return pair
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
    """LLaVA's conversation: USER: opening, newline, question ASSISTANT: answer<eos>USER: question ..., as (text, is_answer)
    pieces, so that the loss can be put on the assistant's words only."""
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


# ------------------------------------------------------------------------------------------------------------------
# The tokenizer: byte-pair encoding, trained on the world's own text
# ------------------------------------------------------------------------------------------------------------------

VOCAB_SIZE = 512                                    # 256 bytes + 240 merges + 16 special tokens, which come last
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<video>", "<boi>", "<eoi>", "<mask>", "<cls>", "<sep>", "<dec>",
           "<|endofchunk|>", "<spare1>", "<spare2>", "<spare3>", "<spare4>")
MERGES = VOCAB_SIZE - 256 - len(SPECIAL)
SPECIAL_IDS = {token: 256 + MERGES + i for i, token in enumerate(SPECIAL)}
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, VIDEO_ID, BOI_ID, EOI_ID, MASK_ID, CLS_ID, SEP_ID, DEC_ID, CHUNK_ID = range(496, 508)
SPLIT = r" ?[A-Za-z]+(?:-[A-Za-z]+)?|[0-9]| ?[^A-Za-z0-9\s]|\s"    # words with the space before them; single digits


def merge(word, pair):
    """Every neighbouring `pair` in the tuple `word` becomes one symbol: merge((a, b, c), (a, b)) = (ab, c)."""
    out, i = [], 0
    while i < len(word):
        both = word[i:i + 2] == pair
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
        best = max(pairs, key=lambda pair: (pairs[pair], pair))             # ties by bytes: the same on every machine
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
    lines += ["Question: which words can you read? Short answer: none", "find the biggest thing in the video, please."] * 50
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


# ------------------------------------------------------------------------------------------------------------------
# The loop: one for every model here
# ------------------------------------------------------------------------------------------------------------------

RUNS = Path("runs")                                 # everything that is written goes here
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))         # torchrun sets these


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
    """What decides the outcome of a training, besides the model's config and the data."""
    name: str                                       # its directory under runs/
    steps: int
    batch: int                                      # pictures (or lines of text) per step, over all ranks
    lr: float
    seed: int = 0
    warmup: int = 30
    weight_decay: float = 0.1                       # on matrices only
    beta2: float = 0.98                             # 0.999 is too slow a memory for a few hundred steps
    muon: float = 0.0                               # > 0: Muon at this learning rate for hidden matrices; see make_optimizers
    save_seconds: float = 20


def schedule(plan, step):
    """The fraction of the highest learning rate: linear warm-up, then half a cosine down to 5 % at the last step."""
    done = step / max(1, plan.steps)
    return min(1, (step + 1) / plan.warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def make_optimizers(plan, model):
    """A list of optimizers for the parameters that are trained. AdamW for all; biases, norms and scales do not decay.

    With plan.muon the matrices between embedding and output go to Muon instead (Jordan et al. 2024; the scale that matches
    AdamW's is from Moonlight, 2502.16982): it makes every direction of an update equally long, so that a rare but decisive
    one, such as "look where the circle is", is not drowned by the common ones. A few hundred steps are then enough.
    Each parameter group remembers its own highest learning rate as `peak`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = {name for name, p in named if plan.muon and p.ndim == 2 and not re.search("embed|head", name)}
    rest = [p for name, p in named if name not in hidden]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": plan.weight_decay, "peak": plan.lr},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "peak": plan.lr}]
    optimizers = [torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, plan.beta2), fused=True)]
    if hidden:
        matrices = [{"params": [p for name, p in named if name in hidden], "peak": plan.muon}]
        optimizers.append(torch.optim.Muon(matrices, lr=plan.muon, momentum=0.9, weight_decay=plan.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


@lru_cache(maxsize=1)
def world_fingerprint():
    """A number that changes when the world does, so that a model trained in another world is not taken from the cache."""
    rng = rng_for("fingerprint")
    scenes = [make_scene(rng) for _ in range(100)]
    content = repr((UNSEEN_PAIRS, TEMPLATES, [caption(s, rng) for s in scenes], [text_line(rng) for _ in range(100)]))
    return zlib.crc32(content.encode() + b"".join(draw(s).tobytes() for s in scenes))


def cache_key(plan, model, data):
    """Everything a checkpoint must agree with to be the result of this run."""
    plan = {k: v for k, v in asdict(plan).items() if k not in ("name", "save_seconds")}
    return json.dumps({"plan": plan, "model": repr(model.config), "data": data, "world": world_fingerprint()}, sort_keys=True)


def save_atomically(content, path):
    """Write beside, then rename: whoever pulls the plug finds the old file or the new one, never half of one."""
    beside = path.with_suffix(".tmp")
    torch.save(content, beside)
    os.replace(beside, path)


def load_checkpoint(path, key):
    """The checkpoint at `path` if it is whole and belongs to this run, else None, with a line saying why not."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["key"] == key:
            return state
        say(f"{path} was trained with other settings (or in another world): training again")
    except Exception as error:                      # a torn file can raise nearly anything
        say(f"{path} is damaged ({type(error).__name__}): training again")


def open_log(folder, step):
    """log.jsonl, opened for appending, without the lines that a run interrupted after `step` steps will write again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() and step else []
        path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))
        return path.open("a")
    except (OSError, ValueError, KeyError) as error:
        stop(f"cannot write {folder}/log.jsonl ({error}): remove it, or start from a directory you may write to")


class CtrlC:
    """While this is open Ctrl-C only asks: the loop stops between two steps, where model and optimizer agree."""
    asked = False

    def __enter__(self):
        try:
            self.before = signal.signal(signal.SIGINT, self.ask)
        except ValueError:                          # not in the main thread: Ctrl-C is somebody else's business
            self.before = None
        return self

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt                 # the second time we mean it
        self.asked = True

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def sum_over_ranks(*tensors):
    """Add the tensors up over all processes, in place and in one message. Alone: nothing to do."""
    if WORLD_SIZE > 1 and dist.is_initialized():
        together = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(together)
        for t, total in zip(tensors, together.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


def train_step(model, optimizers, loss, fraction):
    """One update, at this fraction of the highest learning rate. With torchrun every rank's loss is its share of the joint
    one, so gradients are summed."""
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * fraction
    loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        sum_over_ranks(*(p.grad for p in parameters))
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()


def progress(plan, start, bar=None):
    """A tqdm bar that counts samples; `bar`, if given, is one that somebody else shows for several runs."""
    return bar or tqdm(total=plan.steps * plan.batch, initial=start * plan.batch, unit=" samples", desc=plan.name,
                       mininterval=0.3, disable=None if RANK == 0 else True)


def fit(plan, model, loss_of, expected=None, data="world", after_step=None, bar=None):
    """Train the parameters of `model` that require a gradient, or take the finished result from runs/NAME.

    loss_of(step) -> (loss, metrics) must be a function of the step alone (and of the seed): then a run that was
    interrupted and resumed ends with the same bits. expected: (text, value) of the loss at random initialisation.
    after_step(): called after every update. bar: see `progress`. Returns the model, in eval mode.
    Ends the program when the loss is no longer finite (status 2) or on Ctrl-C (saved, status 130).
    """
    folder = RUNS / plan.name
    path, key = folder / "checkpoint.pt", cache_key(plan, model, data)
    state = load_checkpoint(path, key) or {"step": 0}
    if "model" in state:
        model.load_state_dict(state["model"])
    if state["step"] < plan.steps:
        train(plan, model, loss_of, state, path, key, expected, after_step, bar)
    elif bar is not None:
        bar.update(plan.steps * plan.batch)
    return model.eval()


def train(plan, model, loss_of, state, path, key, expected, after_step, bar):
    """The part of `fit` that runs when there is something left to do."""
    optimizers = make_optimizers(plan, model)
    for optimizer, saved_state in zip(optimizers, state.get("optimizers", ())):
        optimizer.load_state_dict(saved_state)
    start, saved, own_bar = state["step"], time.time(), bar is None
    log = open_log(path.parent, start) if RANK == 0 else None
    bar = progress(plan, start, bar)
    model.train()
    with CtrlC() as ctrl_c:
        for step in range(start, plan.steps):
            loss, metrics = loss_of(step)
            total = torch.tensor([float(loss.detach()), float(ctrl_c.asked)])
            sum_over_ranks(total)                   # all ranks see the same loss, and stop at the same step
            value = float(total[0])
            if not math.isfinite(value):
                stop(f"{plan.name}: the loss is {value} at step {step}; try a smaller learning rate than {plan.lr}")
            if step == 0 and expected and own_bar:
                say(f"{plan.name}: first loss {value:.3f}; expected at random initialisation: {expected[0]} = {expected[1]:.3f}")
            train_step(model, optimizers, loss, schedule(plan, step))
            if after_step:
                after_step()
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update(plan.batch)
            last, asked = step + 1 == plan.steps, float(total[1]) > 0
            if RANK == 0 and (step % 10 == 0 or last):
                row = {"step": step + 1, "loss": value, "lr": plan.lr * schedule(plan, step)}
                log.write(json.dumps(row | {k: float(v) for k, v in metrics.items()}) + "\n")
            if RANK == 0 and (last or asked or time.time() - saved > plan.save_seconds):
                log.flush()
                save_atomically({"key": key, "step": step + 1, "model": model.state_dict(),
                                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, path)
                saved = time.time()
            if asked and not last:
                bar.close()
                stop(f"stopped after step {step + 1} of {plan.steps}; the same command again goes on from there", 130)
    if own_bar:
        bar.close()
    if log:
        log.close()


# ------------------------------------------------------------------------------------------------------------------
# Recipes and claims: what all families share
# ------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Claim:
    """A sentence from a paper with a number of ours: it holds when `measured` is at least `target`."""
    name: str
    chance: float                                   # what guessing would give; for "a beats b": what b gives
    measured: float
    target: float

    @property
    def holds(self):
        return self.measured >= self.target


def claims_table(claims):
    """The claims as a markdown table, which reads well in a terminal too."""
    width = max(len(c.name) for c in claims)
    lines = [f"| {'claim':{width}} | chance | measured | target |   |", f"|-{'-' * width}-|-------:|---------:|-------:|---|"]
    lines += [f"| {c.name:{width}} | {c.chance:6.3f} | {c.measured:8.3f} | {c.target:6.3f} | {'holds' if c.holds else 'DOES NOT HOLD'} |"
              for c in claims]
    return "\n".join(lines)


def run_name(family, seed=0, steps=None, **options):
    """runs/FAMILY holds the standard run, which other families build on; other seeds or steps live beside it."""
    options = {"seed": seed or None, "steps": steps} | options
    return "-".join([family] + [f"{k}{v}" for k, v in options.items() if v])


def recipe_is_done(family, steps):
    """Has the standard run been trained to its last step? The checkpoint alone may be half a one; its log says."""
    try:
        lines = (RUNS / family / "log.jsonl").read_text().splitlines()
        return (RUNS / family / "checkpoint.pt").exists() and json.loads(lines[-1])["step"] == steps
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return False                                # no log, or a torn one: whoever asks is about to train anyway


def batch_rngs(seed, step, batch):
    """One random.Random per sample of this rank's slice of the joint batch: the union over ranks is always the same."""
    share = batch // WORLD_SIZE
    return [rng_for(seed, step, i) for i in range(RANK * share, (RANK + 1) * share)]


def text_rows(texts, context=None):
    """Texts -> rows of ids, each with <eos> at its end, cut to `context` ids. Special tokens in the texts are plain text."""
    return [tokenizer().encode_ordinary(text)[: context and context - 1] + [EOS_ID] for text in texts]


def pad(rows, value=PAD_ID):
    """Rows of ids -> (ids [B,T], mask [B,T]; True = real token), padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [value] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path)
    except OSError as error:
        stop(f"cannot write {path} ({error})")
    say(f"written: {path}")


def world_sheet():
    """`python train_tiny.py world`: a page of samples of everything the world can show and ask."""
    rng = rng_for("a look at the world")
    pictures = []
    for size in ((32, 32),) * 6 + ((48, 32), (32, 40)):
        scene = make_scene(rng)
        question, answer = ask(scene, rng)
        pictures.append((draw(scene, *size), f"{caption(scene, rng)}\n{question} {answer}".replace(", ", ",\n")))
    frames, question, answer = movie(rng)
    pictures += [(draw(frame), f"frame {i + 1}\n{question} {answer}") for i, frame in enumerate(frames)]
    one, two, question, answer = compare(rng)
    pictures += [(draw(one), f"{question}\n{answer}"), (draw(two), "(second picture)")]
    number, question, answer = read_number(rng)
    pictures.append((draw_number(number), f"{question} {answer}"))
    scene = unseen_pair_scene(rng, 2)
    pictures.append((draw(scene), f"only in tests:\n{caption(scene)}".replace(", ", ",\n")))
    sheet(pictures, RUNS / "world.png")
    say("in text only, for a language model:\n" + text_line(rng))
    return []


# ------------------------------------------------------------------------------------------------------------------
# CLIP and SigLIP
# ------------------------------------------------------------------------------------------------------------------

CLIP_STEPS, CLIP_BATCH = 700, 64


def clip_config(loss="softmax"):
    """The tiny preset with CLIP's switches, or SigLIP's: no class token, text that looks both ways."""
    import clip
    config = clip.PRESETS["tiny"]
    if loss == "softmax":
        return config
    return replace(config, loss=loss, vision=replace(config.vision, class_token=False, ln_pre=False), text=replace(config.text, causal=False))


def clip_batch(seed, step, batch):
    """(scenes, captions) of a step. All scenes of a step have equally many things: counting them tells nothing apart,
    and the captions are about equally long."""
    count = rng_for(seed, step).choice((1, 2, 2, 3, 4))
    rngs = batch_rngs(seed, step, batch)
    scenes = [make_scene(rng, count) for rng in rngs]
    return scenes, [caption(scene, rng) for scene, rng in zip(scenes, rngs)]


def clip_features(model, images, texts):
    """PIL images and strings -> image and text features [B,E] of length one."""
    import clip
    device = model.logit_scale.device
    ids, mask = pad(text_rows(texts, model.config.text.context))
    mask = None if model.config.text.causal else mask.to(device)        # causal: padding comes after what is looked at
    return (model.encode_image(clip.preprocess(images, model.config.vision).to(device)),
            model.encode_text(ids.to(device), mask))


def train_clip(name=None, seed=0, steps=None, batch=CLIP_BATCH, loss="softmax", device="cpu", bar=None, draw_batch=None,
               data="world", tower=None, vision=None):
    """A toy CLIP (loss "softmax") or SigLIP ("sigmoid"), from the cache if it is there.

    draw_batch(step) -> (images, texts) replaces the world by other data, whose name is `data`. tower: a vision tower to start from;
    vision: another kind of tower, in the place of CLIP's own."""
    import clip
    name = name or run_name("clip", seed, steps, **({} if loss == "softmax" else {"": loss}))
    plan = Plan(name, steps or CLIP_STEPS, batch, lr=1e-3, seed=seed, weight_decay=0.5, warmup=60)
    torch.manual_seed(seed)
    model = clip.CLIP(clip_config(loss)).to(device)
    if tower is not None:
        model.vision.load_state_dict(tower.state_dict())
    if vision is not None:
        model.vision = vision.to(device)
        model.vision.ln_post = torch.nn.Identity()  # where CLIP would normalise its class token
    if loss == "sigmoid":                           # one pair in B matches. SigLIP's -10 suits its B of 32 thousand, ln B = 10.4;
        torch.nn.init.constant_(model.logit_bias, -math.log(batch))     # from there a few hundred steps would not bring it back

    def from_world(step):
        scenes, captions = clip_batch(seed, step, batch)
        return [draw(scene) for scene in scenes], captions

    def loss_of(step):
        return model.loss(*clip_features(model, *(draw_batch or from_world)(step)), ranks=WORLD_SIZE > 1)

    expected = ("ln B", math.log(batch)) if loss == "softmax" else None
    return fit(plan, model, loss_of, expected, data, model.clip_logit_scale, bar)


def toy_clip(device="cpu"):
    """The standard toy CLIP: the frozen vision tower of the other families. Trained on the first call, then cached."""
    return train_clip(device=device)


@torch.no_grad()
def retrieval(model, scenes):
    """Fraction of the scenes for which the most similar caption of all is a right one (two scenes may share theirs)."""
    captions = [caption(scene) for scene in scenes]
    image, text = clip_features(model, [draw(scene) for scene in scenes], captions)
    best = (image @ text.T).argmax(1).tolist()
    return sum(captions[i] == captions[j] for i, j in enumerate(best)) / len(scenes)


def naming(model, scenes, templates):
    """Fraction of one-thing scenes whose pair is the best of the 30, each given by name only (zero-shot)."""
    import clip
    pixels = clip.preprocess([draw(scene) for scene in scenes], model.config.vision).to(model.logit_scale.device)
    logits = clip.zero_shot(model, pixels, [" ".join(pair) for pair in PAIRS], templates, clip_tokenize(model))
    return sum(PAIRS[i] == scene.things[0].pair for i, scene in zip(logits.argmax(1).tolist(), scenes)) / len(scenes)


def clip_tokenize(model):
    """-> tokenize(texts) -> (ids, mask), as `clip.zero_shot` wants it."""
    def tokenize(texts):
        ids, mask = pad(text_rows(texts, model.config.text.context))
        return ids, None if model.config.text.causal else mask
    return tokenize


def clip_claims(model):
    rng = rng_for("clip claims")
    unseen_scenes = [make_scene(rng, split="test") for _ in range(512)]
    unseen_pairs = [unseen_pair_scene(rng, 1) for _ in range(300)]
    bare, ensemble = naming(model, unseen_pairs, ("{}",)), naming(model, unseen_pairs, TEMPLATES)
    return [Claim("clip: retrieval, right caption among 512 unseen scenes", 1 / 512, retrieval(model, unseen_scenes), 0.95),
            Claim("clip: naming pairs never seen in training, 30 ways", 1 / 30, ensemble, 0.80),
            Claim("clip: template ensemble no worse than the bare name", 1 / 30, ensemble, bare)]


@torch.no_grad()
def clip_samples(model, folder):
    """A picture of eight unseen scenes, each with the caption that the model finds for it among 64."""
    rng = rng_for("clip samples")
    scenes = [make_scene(rng, split="test") for _ in range(64)]
    captions = [caption(scene) for scene in scenes]
    image, text = clip_features(model, [draw(scene) for scene in scenes], captions)
    found = (image @ text.T).argmax(1).tolist()
    verdicts = ["right" if captions[i] == captions[j] else "WRONG" for i, j in enumerate(found)]
    sheet([(draw(scenes[i]), f"{verdicts[i]}: {captions[found[i]]}".replace(", ", ",\n")) for i in range(8)],
          folder / "samples.png")


def clip_recipe(args):
    """`python train_tiny.py clip`: train, print the level claims, draw samples."""
    if CLIP_BATCH % WORLD_SIZE:
        stop(f"a batch of {CLIP_BATCH} cannot be shared by {WORLD_SIZE} processes: use a divisor of {CLIP_BATCH}")
    model = train_clip(seed=args.seed, steps=args.steps, loss=args.loss, device=args.device)
    if RANK > 0:
        return []
    clip_samples(model, RUNS / "clip")
    return clip_claims(model)


def clip_ablations(args):
    """SigLIP's claim: at batch 16 the sigmoid loss is no worse than the softmax loss, at 128 they are even."""
    steps, batches, seeds = args.steps or 500, (16, 128), (0, 1, 2)
    rng, score = rng_for("clip ablations"), {}
    scenes = [make_scene(rng, split="test") for _ in range(512)]
    with tqdm(total=2 * len(seeds) * steps * sum(batches), unit=" samples", desc="clip ablations", disable=None) as bar:
        for batch in batches:
            for loss in ("softmax", "sigmoid"):
                models = (train_clip(f"clip-ablations/{loss}{batch}-seed{seed}-steps{steps}", seed, steps, batch, loss,
                                     args.device, bar) for seed in seeds)
                score[loss, batch] = sum(retrieval(model, scenes) for model in models) / len(seeds)
    say(*(f"retrieval, batch {batch}, {loss}: {score[loss, batch]:.3f}" for loss, batch in sorted(score)))
    return [Claim("clip: sigmoid no worse than softmax at batch 16", score["softmax", 16], score["sigmoid", 16],
                  score["softmax", 16]),
            Claim("clip: sigmoid and softmax within 0.03 at batch 128", score["softmax", 128],
                  score["softmax", 128] - abs(score["sigmoid", 128] - score["softmax", 128]), score["softmax", 128] - 0.03)]


# ------------------------------------------------------------------------------------------------------------------
# ViLT
# ------------------------------------------------------------------------------------------------------------------

VILT_STEPS, VILT_BATCH = 1300, 32
WPA_WEIGHT, WPA_NEAR, WPA_FAR = 1.5, 0.3, 1.0                       # (the paper's weight is 0.1, over 100 times the steps)
DEMO_VILT_STEPS, VILT_ABLATION_STEPS = 450, 700


def short_caption(scene):
    """Names only, in reading order: "a red circle and a blue square"."""
    return " and ".join(f"a {t.name}" for t in scene.things)


def near_miss(scene, rng, split="any"):
    """The scene with another colour or shape of one thing: its short caption differs in one word."""
    while short_caption(other := change_one(scene, rng, split)) == short_caption(scene):
        pass
    return other


def vilt_words(text, context=40):
    """A text as ViLT reads it -> (ids, for each id the number of its word or None): [CLS] words [SEP], cut to the context.
    "<mask>" may stand for a word; other special tokens in the text are plain text."""
    ids, numbers = [CLS_ID], [None]
    for number, piece in enumerate(re.findall(f" ?<mask>|{SPLIT}", " " + text)):
        piece_ids = [MASK_ID] if piece.strip() == "<mask>" else tokenizer().encode_ordinary(piece)
        ids, numbers = ids + piece_ids, numbers + [number] * len(piece_ids)
    return ids[: context - 1] + [SEP_ID], numbers[: context - 1] + [None]


def vilt_ids(text):
    return vilt_words(text, context=10**6)[0]       # uncut, so that a prompt too long is found


def vilt_world_batch(seed, step, batch):
    """What a step sees: (images, texts) for masking, mostly full captions; and (images, texts, labels) for matching, short
    ones, where half of the images are of another scene: one of the batch (as in the paper), or, so that there is something
    left to learn, one in which a single word would be another. All scenes of a step have equally many things."""
    import vilt
    count, rng = rng_for(seed, step).choice((1, 2, 2, 3, 4)), rng_for(seed, ("swap", step))
    scenes = [make_scene(one, count) for one in batch_rngs(seed, ("vilt", step), batch)]
    told = [(short_caption if rng.random() < 0.3 else caption)(scene) for scene in scenes]
    texts = [short_caption(scene) for scene in scenes]
    index, labels = vilt.swap_images(texts, rng)
    shown = [near_miss(scene, rng, split="train") if not label and rng.random() < 0.5 else scenes[i]
             for scene, i, label in zip(scenes, index, labels)]
    return ([draw(scene) for scene in scenes], told), ([draw(scene) for scene in shown], texts, labels)


def vilt_loss(model, masking, matching, rng, wpa_weight):
    """The three losses of pretraining, in one pass over both halves of the batch (see vilt_world_batch). WPA begins at 0.3
    to 0.4, times its weight."""
    import vilt
    (images, told), (shown, texts, labels) = masking, matching
    config, device = model.config, model.pooler.weight.device
    rows, words = [vilt_words(text, config.context) for text in told], [vilt_words(text, config.context)[0] for text in texts]
    masked = [vilt.mask_whole_words(*row, config, rng) for row in rows]
    ids, mask = (x.to(device) for x in pad([ids for ids, _ in masked] + words))
    pixels, pixel_mask = (x.to(device) for x in vilt.preprocess(images + shown, config))
    x, real, _ = model.embed(pixels, ids, mask, pixel_mask)
    hidden, B, T = model.encode(x, real), len(images), ids.shape[1]
    hidden_words = torch.full((B, T), vilt.IGNORE_INDEX)
    for row, (_, wanted) in zip(hidden_words, masked):
        row[: len(wanted)] = torch.tensor(wanted)
    labels = torch.tensor(labels, device=device)
    mlm, metrics = vilt.mlm_loss(model.mlm_logits(hidden[:B, :T]), hidden_words.to(device))
    itm, itm_metrics = vilt.itm_loss(model.itm_logits(hidden[B:]), labels)
    wpa, wpa_metrics = vilt.wpa_loss(hidden[B:, :T], hidden[B:, T + 1:], vilt.text_words(ids[B:], config), real[B:, T + 1:],
                                     labels, WPA_NEAR, WPA_FAR)
    return mlm + itm + wpa_weight * wpa, metrics | itm_metrics | wpa_metrics


def untrained_vilt(device="cpu", seed=0):
    """The paper starts from a ViT pretrained on images (3.1), not from BERT; ours from the blocks of the toy CLIP's tower, which
    is trained first if it is not cached. (They learned with QuickGELU and go on with GELU: close enough.)"""
    import vilt
    torch.manual_seed(seed)
    model = vilt.ViLT(vilt.PRESETS["tiny"])
    model.blocks.load_state_dict(toy_clip(device).vision.blocks.state_dict())
    return model.to(device).eval()


def train_vilt(name=None, seed=0, steps=None, wpa_weight=WPA_WEIGHT, device="cpu", bar=None, draw_batch=None, batch=VILT_BATCH, data="world"):
    """A toy ViLT, from the cache if it is there. draw_batch(step) -> (masking, matching) replaces the world by other data."""
    model = untrained_vilt(device, seed)
    plan = Plan(name or run_name("vilt", seed, steps), steps or VILT_STEPS, batch, lr=3e-3, muon=3e-3, seed=seed, warmup=60, weight_decay=0.02)

    def loss_of(step):
        masking, matching = draw_batch(step) if draw_batch else vilt_world_batch(seed, step, batch)
        return vilt_loss(model, masking, matching, rng_for(seed, ("mask", step)), wpa_weight)

    return fit(plan, model, loss_of, ("ln V + ln 2, and WPA on top", math.log(2 * VOCAB_SIZE)), f"{data}, wpa {wpa_weight} {WPA_NEAR} {WPA_FAR}", bar=bar)


def demo_vilt(device="cpu"):
    """For the demo: the recipe's result if it has been trained, else that of fewer steps, since somebody is waiting."""
    return train_vilt(steps=None if recipe_is_done("vilt", VILT_STEPS) else DEMO_VILT_STEPS, device=device)


@torch.no_grad()
def vilt_read(model, images, texts):
    """-> (hidden [B,T+1+N,D], ids [B,T]) of images (PIL) and texts (str), on the CPU."""
    import vilt
    ids, mask = pad([vilt_words(text, model.config.context)[0] for text in texts])
    pixels, pixel_mask = vilt.preprocess(images, model.config)
    device = model.pooler.weight.device
    return model(*(x.to(device) for x in (pixels, ids, mask, pixel_mask))), ids


def hide(text, word):
    """The text with the first occurrence of a word masked."""
    return re.sub(rf"\b{word}\b", "<mask>", text, count=1)


def vilt_respond(model, image, text):
    """A text with <mask> filled in, or the chance that a text without belongs to the image; as a line to print."""
    hidden, ids = vilt_read(model, [image], [text])
    if MASK_ID in ids:
        found = model.mlm_logits(hidden[:, : ids.shape[1]][ids == MASK_ID]).argmax(-1).tolist()
        for token in found:
            text = text.replace("<mask>", f"[{tokenizer().decode([token]).strip()}]", 1)
        return text
    return f"{model.itm_logits(hidden).softmax(-1)[0, 1]:4.0%} yes: {text}"


def possible_words(scene, thing, key):
    """How many words could stand for a hidden colour, shape or place, for whoever sees the rest of the text only: pairs
    never occur that training never shows, no pair occurs twice, and places come in reading order."""
    i, others = scene.things.index(thing), [t.pair for t in scene.things if t is not thing]
    if key == "place":
        before = PLACES.index(scene.things[i - 1].place) if i else -1
        after = PLACES.index(scene.things[i + 1].place) if i + 1 < len(scene.things) else len(PLACES)
        return after - before - 1
    values = COLOURS if key == "colour" else SHAPES
    pairs = [replace(thing, **{key: value}).pair for value in values]
    return sum(pair in SEEN_PAIRS and pair not in others for pair in pairs)


def masked_words(rng, count):
    """[(scene, its caption with one colour, shape or place hidden, the hidden word, in how many ways it could be filled)]."""
    items = []
    for _ in range(count):
        scene = make_scene(rng, split="test")
        thing, key = rng.choice(scene.things), rng.choice(("colour", "shape", "place"))
        word = getattr(thing, key)
        said = [f"{t.place} a {t.full_name}" for t in scene.things]
        i = scene.things.index(thing)
        said[i] = hide(said[i], word)
        items.append((scene, ", ".join(said), word, possible_words(scene, thing, key)))
    return items


@torch.no_grad()
def recovered(model, items, wrong_image=False):
    """The share of masked_words that is filled in rightly; wrong_image: each beside the image of another."""
    images = [draw(scene) for scene, _, _, _ in items]
    hidden, ids = vilt_read(model, images[1:] + images[:1] if wrong_image else images, [text for _, text, _, _ in items])
    found = model.mlm_logits(hidden[:, : ids.shape[1]][ids == MASK_ID]).argmax(-1).tolist()
    return sum(tokenizer().decode([token]).strip() == word for token, (_, _, word, _) in zip(found, items)) / len(items)


def near_misses(rng, count):
    """[(image, right text, text with one word changed)] of unseen scenes."""
    scenes = [make_scene(rng, split="test") for _ in range(count)]
    return [(draw(scene), short_caption(scene), short_caption(near_miss(scene, rng))) for scene in scenes]


@torch.no_grad()
def match_scores(model, items):
    """Two lists for near_misses: ViLT's log odds of "they belong together" for the right texts, and for the wrong ones."""
    scores = []
    for which in (1, 2):
        logits = model.itm_logits(vilt_read(model, [item[0] for item in items], [item[which] for item in items])[0])
        scores.append((logits[:, 1] - logits[:, 0]).tolist())
    return scores


def matching_accuracy(model, items):
    """Of near_misses, right texts and wrong ones alike: the share that is judged rightly."""
    right, wrong = match_scores(model, items)
    return (sum(score > 0 for score in right) + sum(score <= 0 for score in wrong)) / (2 * len(items))


@torch.no_grad()
def vilt_plan(model, scene):
    """The transport plan between the words of a scene's short caption and its patches -> (words, plan [words,N])."""
    import vilt
    hidden, ids = vilt_read(model, [draw(scene)], [short_caption(scene)])
    T, words = ids.shape[1], vilt.text_words(ids, model.config)
    image = hidden[:, T + 1:]
    _, plan = vilt.transport(hidden[:, :T], image, words.to(image.device), torch.ones(image.shape[:2], device=image.device))
    return [tokenizer().decode([token]).strip() for token in ids[words].tolist()], plan[0].cpu()[words[0]]


def words_landing(model, scenes):
    """(share of colour and shape words whose largest mass lies on a patch that their thing touches, share of the patches
    that it touches: what throwing darts would give). Words that fit two things of a scene are left out."""
    P = model.config.patch_size
    columns, hits, chance = 32 // P, [], []
    for scene in scenes:
        words, plan = vilt_plan(model, scene)
        for thing in scene.things:
            x0, y0, x1, y1 = pixel_box(thing, 32, 32)
            touched = {row * columns + column for row in range(y0 // P, (y1 - 1) // P + 1) for column in range(x0 // P, (x1 - 1) // P + 1)}
            for key in ("colour", "shape"):
                if len(only(scene, **{key: getattr(thing, key)})) == 1:     # (so that index finds the one word)
                    hits.append(int(plan[words.index(getattr(thing, key))].argmax()) in touched)
                    chance.append(len(touched) / plan.shape[1])
    return sum(hits) / len(hits), sum(chance) / len(chance)


def embedding_ratio():
    """How many times the FLOPs of ViLT's whole encoder, and of its patch projection, a ResNet-101 takes on the same image of
    384 x 608 pixels, at published scale; and the second ratio again in seconds, measured here."""
    import vilt
    config = vilt.PRESETS["vilt-b32-mlm"]
    flops = vilt.embedding_costs(config, 384, 608)
    pixels, seconds = torch.zeros(1, 3, 384, 608), []
    with torch.no_grad():
        for part in (torch.nn.Conv2d(3, config.width, config.patch_size, config.patch_size), vilt.ResNetStem().eval()):
            times = []
            for _ in range(4):                      # the first one warms up
                start = time.perf_counter()
                part(pixels)
                times.append(time.perf_counter() - start)
            seconds.append(min(times[1:]))
    return flops["resnet"] / flops["encoder"], flops["resnet"] / flops["patches"], seconds[1] / seconds[0]


def vilt_claims(model):
    words, misses = masked_words(rng_for("vilt words"), 400), near_misses(rng_for("vilt matching"), 400)
    rng = rng_for("vilt landing")
    landing, darts = words_landing(model, [make_scene(rng, split="test") for _ in range(200)])
    text_only = sum(1 / ways for _, _, _, ways in words) / len(words)
    missed = 1 - recovered(model, words, wrong_image=True)
    of_encoder, of_patches, seconds = embedding_ratio()
    say(f"a ResNet-101 takes {of_patches:.0f} times the FLOPs of the patch projection on the same image; {seconds:.0f} times the seconds, here")
    return [Claim("vilt: masked colour, shape or place recovered", text_only, recovered(model, words), 0.95),
            Claim("vilt: masked word missed beside a wrong image", 1 - text_only, missed, 0.9 - text_only),
            Claim("vilt: matching, colour or shape changed", 0.5, matching_accuracy(model, misses), 0.95),
            Claim("vilt: colour and shape words land on their thing", darts, landing, 0.80),
            Claim("vilt-b32: FLOPs of a ResNet-101 stem / of the encoder", 0.0, of_encoder, 1.0)]


def vilt_samples(model, folder):
    rng = rng_for("vilt samples")
    pictures = []
    for _ in range(8):
        scene = make_scene(rng, split="test")
        text = hide(caption(scene), rng.choice(scene.things).colour)
        pictures.append((draw(scene), vilt_respond(model, draw(scene), text).replace(", ", ",\n")))
    sheet(pictures, folder / "samples.png")


def vilt_recipe(args):
    model = train_vilt(seed=args.seed, steps=args.steps, device=args.device)
    vilt_samples(model, RUNS / "vilt")
    return vilt_claims(model)


def clip_near_misses(seed, batch):
    """draw_batch for a CLIP that is to learn what ViLT's matching learns: half a batch of scenes, and their near misses."""
    def draw_batch(step):
        count, rng = rng_for(seed, step).choice((1, 2, 2, 3, 4)), rng_for(seed, ("swap", step))
        scenes = [make_scene(one, count) for one in batch_rngs(seed, ("vilt", step), batch // 2)]
        pairs = [one for scene in scenes for one in (scene, near_miss(scene, rng, "train"))]
        return [draw(scene) for scene in pairs], [short_caption(scene) for scene in pairs]
    return draw_batch


@torch.no_grad()
def clip_prefers(model, items):
    """Of near_misses, the share where CLIP's dot product is larger for the right text."""
    right, wrong = ((image * text).sum(1) for image, text in
                    (clip_features(model, [item[0] for item in items], [item[which] for item in items]) for which in (1, 2)))
    return (right > wrong).float().mean().item()


def vilt_ablations(args):
    """With WPA and without: where words land. ViLT's matching and CLIP's dot product: which of two texts fits, one word
    apart. Equal steps, equally many images a step, near misses of the same kind in training (CLIP sees more of them), and
    both have the toy CLIP's vision tower to start from, and a text side that starts from nothing. Mean of 3 seeds."""
    steps, seeds, images = args.steps or VILT_ABLATION_STEPS, (0, 1, 2), 2 * VILT_BATCH
    rng, score = rng_for("vilt ablations"), dict.fromkeys(("with WPA", "without WPA", "vilt", "clip"), 0.0)
    scenes, misses = [make_scene(rng, split="test") for _ in range(200)], near_misses(rng, 400)
    tower = toy_clip(args.device).vision            # before the bar starts
    with tqdm(total=len(seeds) * steps * (2 * VILT_BATCH + images), unit=" samples", desc="vilt ablations", disable=None) as bar:
        for seed in seeds:
            for weight, which in ((WPA_WEIGHT, "with WPA"), (0.0, "without WPA")):
                model = train_vilt(f"vilt-ablations/wpa{weight}-seed{seed}-steps{steps}", seed, steps, weight, args.device, bar)
                score[which] += words_landing(model, scenes)[0] / len(seeds)
                if weight:
                    right, wrong = match_scores(model, misses)
                    score["vilt"] += sum(r > w for r, w in zip(right, wrong)) / len(misses) / len(seeds)
            model = train_clip(f"vilt-ablations/clip-seed{seed}-steps{steps}", seed, steps, images, device=args.device, bar=bar,
                               draw_batch=clip_near_misses(seed, images), data="near misses, with a tower", tower=tower)
            score["clip"] += clip_prefers(model, misses) / len(seeds)
    say(*(f"{which}: {value:.3f}" for which, value in score.items()))
    return [Claim("vilt: words land better with WPA than without", score["without WPA"], score["with WPA"], score["without WPA"]),
            Claim("vilt: right text preferred, above CLIP's dot product", score["clip"], score["vilt"], score["clip"])]


# ------------------------------------------------------------------------------------------------------------------
# LLaVA
# ------------------------------------------------------------------------------------------------------------------

LM_STEPS, STAGE1_STEPS, STAGE2_STEPS, LLAVA_BATCH = 100, 60, 1500, 16
DEMO_STEPS, ABLATION_STEPS = 700, 300                               # of stage 2, for the demo and for comparisons
KINDS = ("colour", "shape", "size", "what", "count")                # what LLaVA is taught to answer; more in QUESTIONS.
# "where" is left out: after these few steps it is still answered by guessing. Add it, and see how many it takes.


def llava_config(projector="mlp"):
    import llava
    return replace(llava.PRESETS["tiny"], projector=projector)


def toy_lm(device="cpu"):
    """A decoder pretrained on the world's text alone: it knows the grammar and how questions are answered, and has never
    seen a picture. The language model of the other families. Trained on the first call, then cached in runs/lm."""
    import llava
    torch.manual_seed(0)
    model = llava.LanguageModel(llava_config().language).to(device)

    def loss_of(step):
        ids, mask = pad([encode(text_line(rng)) for rng in batch_rngs(0, ("lm", step), 32)])
        return llava.language_loss(model(ids.to(device)), ids.masked_fill(~mask, llava.IGNORE_INDEX).to(device))

    return fit(Plan("lm", LM_STEPS, 32, lr=2e-3, muon=3e-3), model, loss_of, ("ln V", math.log(VOCAB_SIZE)))


def untrained_llava(device="cpu", seed=0, projector="mlp"):
    """LLaVA as stage 1 finds it: the toy CLIP's tower, the toy language model, and a random projector between them."""
    import llava
    torch.manual_seed(seed)
    model = llava.LLaVA(llava_config(projector))
    model.vision.load_state_dict(toy_clip(device).vision.state_dict())
    model.language.load_state_dict(toy_lm(device).state_dict())
    return model.to(device).eval()


def llava_turns(scene, rng, stage):
    """What is said about a picture. Stage 1: its caption. Stage 2: four questions, and the caption in between."""
    if stage == 1:
        return [(DESCRIBE, caption(scene))]
    turns = [ask(scene, rng, KINDS) for _ in range(4)]
    return [*turns[: (where := rng.randrange(5))], (DESCRIBE, caption(scene)), *turns[where:]]


def conversation_loss(model, images, turns, to_row=None):
    """The loss of a batch: images [PIL], turns [[(question, answer), ...] per image]; it counts the answers only.
    to_row: the turns about an image -> ids, labels; LLaVA's unless told otherwise. Loss and pixels are the same in all families."""
    import llava
    device = next(model.parameters()).device
    rows = [to_row(said) if to_row else llava.encode_conversation(said, encode, model.config) for said in turns]
    ids, labels = pad([ids for ids, _ in rows])[0], pad([labels for _, labels in rows], llava.IGNORE_INDEX)[0]
    pixels = llava.preprocess(images, model.config.vision).to(device)
    return llava.language_loss(model(ids.to(device), pixels), labels.to(device))    # padding is to the right of all labels


def llava_stage(model, stage, name, steps, seed=0, bar=None, draw_batch=None, data="world"):
    """One of the paper's two stages. draw_batch(step) -> (images, turns) replaces the world by other data."""
    import llava
    llava.freeze(model, stage)
    if stage == 1:
        plan = Plan(name, steps, LLAVA_BATCH, lr=5e-3, seed=seed)
    else:
        plan = Plan(name, steps, LLAVA_BATCH, lr=2e-3, muon=3e-3, warmup=100, weight_decay=0.02, seed=seed)

    def from_world(step):
        rngs = batch_rngs(seed, (stage, step), plan.batch)
        scenes = [make_scene(rng) for rng in rngs]
        return [draw(scene) for scene in scenes], [llava_turns(s, rng, stage) for s, rng in zip(scenes, rngs)]

    if stage == 2:                                  # a longer stage 1 gives another stage 2: the cache must know
        data = f"{data}, stage 1 of {STAGE1_STEPS} steps"
    return fit(plan, model, lambda step: conversation_loss(model, *(draw_batch or from_world)(step)), data=data, bar=bar)


def toy_llava(device="cpu", seed=0, steps=None):
    """The standard toy LLaVA, through both stages; towers, stages and result are cached."""
    name = run_name("llava", seed, steps)
    model = untrained_llava(device, seed)
    if (RUNS / name / "checkpoint.pt").exists():    # stage 2 is (perhaps half) done: stage 1 is in it
        return llava_stage(model, 2, name, steps or STAGE2_STEPS, seed)
    llava_stage(model, 1, f"{run_name('llava', seed)}-stage1", STAGE1_STEPS, seed)
    return llava_stage(model, 2, name, steps or STAGE2_STEPS, seed)


def demo_llava(device="cpu"):
    """For the demo: the recipe's result if it has been trained, else that of fewer steps, since somebody is waiting."""
    return toy_llava(device, steps=None if recipe_is_done("llava", STAGE2_STEPS) else DEMO_STEPS)


@torch.no_grad()
def answers(model, scenes, questions, longest=40):
    """What the model says to one question about each scene, as text."""
    import llava
    device, side, said = next(model.parameters()).device, model.config.vision.image_size, []
    tokens = llava.num_image_tokens(side, side, model.config)
    for start in range(0, len(scenes), 128):
        part = slice(start, start + 128)
        prompts = [encode(llava.expand_images(llava.build_prompt(question), tokens)) for question in questions[part]]
        ids, mask = llava.pad_rows(prompts, PAD_ID, left=True)
        pixels = llava.preprocess([draw(scene) for scene in scenes[part]], model.config.vision).to(device)
        new = model.generate(ids.to(device), pixels, mask.to(device), max_new_tokens=longest, eos_id=EOS_ID)
        said += [decode(row).strip() for row in new.tolist()]
    return said


def vqa_questions(rng, count):
    """[(scene, question, answer)] about scenes never trained on."""
    asked = []
    for _ in range(count):
        scene = make_scene(rng, split="test")
        asked.append((scene, *ask(scene, rng, KINDS)))
    return asked


def accuracy(model, asked, respond=answers):
    """Fraction of [(scene, question, answer)] that is answered word for word. respond: as `answers`, of another family."""
    said = respond(model, [scene for scene, _, _ in asked], [question for _, question, _ in asked], longest=8)
    return sum(text == right for text, (_, _, right) in zip(said, asked)) / len(asked)


def guess(asked):
    """The accuracy of whoever knows the questions but not the pictures: always the commonest answer to such a question,
    where questions are alike that differ in colours, shapes and places only."""
    words, kinds = {w for w in (*COLOURS, *SHAPES, *PLACES)}, {}
    for _, question, answer in asked:
        kind = " ".join("_" if word in words else word for word in question.rstrip("?").split())
        kinds.setdefault(kind, []).append(answer)
    return sum(max(given.count(a) for a in set(given)) for given in kinds.values()) / len(asked)


def swapped_questions(rng, count):
    """[(scene, other scene, question, answer, other answer)]: the same question, true of both, with different answers."""
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
        question, answer = ask(scene, rng, [kind for kind in KINDS if kind != "count"])
        if any(word in question.rstrip("?").split() for word in (thing.shape, thing.colour, thing.place)):
            asked.append((scene, question, answer))
    return asked


def llava_claims(model):
    vqa, unseen = vqa_questions(rng_for("llava claims"), 400), unseen_pair_questions(rng_for("llava unseen"), 300)
    swaps = swapped_questions(rng_for("llava swaps"), 200)
    one = answers(model, [s[0] for s in swaps], [s[2] for s in swaps], longest=8)
    two = answers(model, [s[1] for s in swaps], [s[2] for s in swaps], longest=8)
    swapped = sum(a == s[3] and b == s[4] for a, b, s in zip(one, two, swaps)) / len(swaps)
    return [Claim("llava: questions about unseen scenes", guess(vqa), accuracy(model, vqa), 0.90),
            Claim("llava: another image, another answer", 0.0, swapped, 0.90),
            Claim("llava: questions about pairs never seen in training", guess(unseen), accuracy(model, unseen), 0.80)]


def llava_samples(model, folder):
    asked = vqa_questions(rng_for("llava samples"), 8)
    said = answers(model, [a[0] for a in asked], [a[1] for a in asked])
    sheet([(draw(scene), f"{question}\n{text}" + ("" if text == right else f"\n(WRONG: {right})"))
           for (scene, question, right), text in zip(asked, said)], folder / "samples.png")


def llava_recipe(args):
    model = toy_llava(args.device, args.seed, args.steps)
    llava_samples(model, RUNS / "llava")
    return llava_claims(model)


def llava_ablations(args):
    """Stage 1 skipped, and a linear projector, against both: equal stage-2 steps, fewer than the recipe's, mean of 3 seeds."""
    steps, seeds, score = args.steps or ABLATION_STEPS, (0, 1, 2), {}
    asked = vqa_questions(rng_for("llava ablations"), 400)
    variants = {"recipe": ("mlp", True), "no stage 1": ("mlp", False), "linear": ("linear", True)}
    untrained_llava(args.device)                    # the towers, before the bar starts
    total = len(seeds) * LLAVA_BATCH * (3 * steps + 2 * STAGE1_STEPS)
    with tqdm(total=total, unit=" samples", desc="llava ablations", disable=None) as bar:
        for variant, (projector, aligned) in variants.items():
            for seed in seeds:
                model = untrained_llava(args.device, seed, projector)
                name = f"llava-ablations/{variant.replace(' ', '-')}-seed{seed}-steps{steps}"
                if aligned:
                    llava_stage(model, 1, f"{name}-stage1", STAGE1_STEPS, seed, bar)
                llava_stage(model, 2, name, steps, seed, bar)
                score[variant] = score.get(variant, 0) + accuracy(model, asked) / len(seeds)
    say(*(f"questions answered, {variant}: {value:.3f}" for variant, value in score.items()))
    return [Claim("llava: with stage 1 better than without", score["no stage 1"], score["recipe"], score["no stage 1"]),
            Claim("llava: MLP projector no worse than linear", score["linear"], score["recipe"], score["linear"])]


# ------------------------------------------------------------------------------------------------------------------
# BLIP-2
# ------------------------------------------------------------------------------------------------------------------

OPT_STEPS, QFORMER_STEPS, BLIP2_STEPS, BLIP2_BATCH = 500, 800, 1200, 16
DEMO_BLIP2_STEPS, BLIP2_ABLATION_STEPS = (100, 300), 150            # of both stages for the demo; of stage 2, to compare


def told_scene(rng):
    """A scene told in words, in any order, then described in reading order, as (text, is_answer) pieces: for a language
    model that must find what it needs in what it is told. In stage 2 it is told by vectors, and does the same with them."""
    scene = make_scene(rng)
    told = ", ".join(f"{t.place} a {t.full_name}" for t in rng.sample(scene.things, len(scene.things)))
    return chat(told, [(DESCRIBE, caption(scene))])


def toy_opt(device="cpu"):
    """A decoder pretrained to describe what it is told, on text alone; BLIP-2 never changes it. In runs/opt. The loss counts
    what it answers: what it is told is random, and to guess at it would be time lost."""
    import blip2
    torch.manual_seed(0)
    model = blip2.OPT(blip2.PRESETS["tiny"].language).to(device)

    def loss_of(step):
        lines = [[(encode(text), is_answer) for text, is_answer in told_scene(rng)] for rng in batch_rngs(0, ("opt", step), 32)]
        ids = pad([sum((part for part, _ in line), []) for line in lines])[0]
        labels = [sum((part if answer else [blip2.IGNORE_INDEX] * len(part) for part, answer in line), []) for line in lines]
        return blip2.language_loss(model(ids.to(device)), pad(labels, blip2.IGNORE_INDEX)[0].to(device))

    return fit(Plan("opt", OPT_STEPS, 32, lr=3e-3, muon=6e-3), model, loss_of, ("ln V", math.log(VOCAB_SIZE)))


def untrained_blip2(device="cpu", seed=0):
    """BLIP-2 as stage 1 finds it: the toy CLIP's tower without its last block, the toy OPT, between them a fresh Q-Former
    and a fresh LayerNorm on top of the tower."""
    import blip2
    torch.manual_seed(seed)
    model = blip2.BLIP2(blip2.PRESETS["tiny"])
    tower, fresh = toy_clip(device).vision.state_dict(), model.vision.state_dict()
    model.vision.load_state_dict({name: p if name.startswith("ln_post") else tower[name] for name, p in fresh.items()})
    model.language.load_state_dict(toy_opt(device).state_dict())
    return model.to(device).eval()


def qformer_rows(texts):
    """Texts -> (ids, mask) in BERT's form: <cls> text <sep>."""
    return pad([[CLS_ID] + tokenizer().encode_ordinary(text) + [SEP_ID] for text in texts])


def blip2_prompt(config, question=DESCRIBE):
    """The ids of a question about an image: as in told_scene, but told by queries in the place of words."""
    return encode(f"USER: {'<image>' * config.qformer.queries}\n{question} ASSISTANT:")


def blip2_loss(model, stage, images, texts, generator=None):
    """The loss of a batch of pairs. Stage 1: contrast, matching, generation. Stage 2: OPT writes the text; only that counts."""
    import blip2
    device = model.query_tokens.device
    pixels = blip2.preprocess(images, model.config.vision).to(device)
    if stage == 1:
        ids, mask = qformer_rows(texts)
        return model.stage1_loss(pixels, ids.to(device), mask.to(device), generator)
    prompt = blip2_prompt(model.config)
    replies = [tokenizer().encode_ordinary(" " + text) + [EOS_ID] for text in texts]    # a text may say <image>
    ids = pad([prompt + reply for reply in replies])[0]
    labels = pad([[blip2.IGNORE_INDEX] * len(prompt) + reply for reply in replies], blip2.IGNORE_INDEX)[0]
    return blip2.language_loss(model(pixels, ids.to(device)), labels.to(device))    # padding is to the right of all labels


def blip2_stage(model, stage, name, steps, seed=0, bar=None, draw_batch=None, data="world"):
    """One of the paper's two stages. draw_batch(step) -> (images, texts) replaces the world by other data."""
    import blip2
    blip2.freeze(model, stage)
    plan = Plan(name, steps, BLIP2_BATCH, lr=3e-3, muon=6e-3 if stage == 1 else 1.2e-2, weight_decay=0.1 if stage == 1 else 0.02, seed=seed)

    def from_world(step):
        rngs = batch_rngs(seed, (stage, step), plan.batch)
        # stage 2: many scenes of three and four things, for which 16 vectors must say the most
        scenes = [make_scene(rng, None if stage == 1 else rng.choice((1, 2, 3, 3, 4, 4))) for rng in rngs]
        if stage == 1:                              # four near misses, or contrast and matching would soon have nothing to learn
            scenes[-4:] = [change_one(scene, rng) for scene, rng in zip(scenes, rngs[-4:])]
        return [draw(scene) for scene in scenes], [caption(scene) for scene in scenes]

    def loss_of(step):
        images, texts = (draw_batch or from_world)(step)
        return blip2_loss(model, stage, images, texts, torch.Generator().manual_seed(1_000_003 * seed + step))

    expected = ("ln B + ln 2 + ln V", math.log(2 * BLIP2_BATCH * VOCAB_SIZE)) if stage == 1 else None     # of ITC, ITM, ITG
    if stage == 2:                                  # a longer stage 1 gives another stage 2: the cache must know
        data = f"{data}, stage 1 of {QFORMER_STEPS} steps"
    return fit(plan, model, loss_of, expected, data, bar=bar)


def toy_qformer(device="cpu", seed=0, steps=None, bar=None):
    """The toy BLIP-2 after stage 1: it compares, matches and writes a caption by itself."""
    return blip2_stage(untrained_blip2(device, seed), 1, run_name("blip2-stage1", seed, steps), steps or QFORMER_STEPS, seed, bar)


def toy_blip2(device="cpu", seed=0, steps=None):
    """The standard toy BLIP-2, through both stages; towers, stages and result are cached."""
    return blip2_stage(toy_qformer(device, seed), 2, run_name("blip2", seed, steps), steps or BLIP2_STEPS, seed)


def demo_blip2(device="cpu"):
    """For the demo, the models after stage 1 and after stage 2: the recipe's if it has been trained, else those of fewer
    steps, since somebody is waiting."""
    if recipe_is_done("blip2", BLIP2_STEPS):
        return toy_qformer(device), toy_blip2(device)
    first, second = DEMO_BLIP2_STEPS
    return toy_qformer(device, 0, first), blip2_stage(toy_qformer(device, 0, first), 2, f"blip2-steps{second}", second)


@torch.no_grad()
def blip2_captions(model, scenes, longest=40):
    """What OPT says about each scene, told by the queries."""
    import blip2
    said = []
    for start in range(0, len(scenes), 128):
        part = scenes[start:start + 128]
        pixels = blip2.preprocess([draw(scene) for scene in part], model.config.vision).to(model.query_tokens.device)
        ids = torch.tensor([blip2_prompt(model.config)] * len(part), device=pixels.device)
        said += [decode(row).strip() for row in model.generate(ids, pixels, max_new_tokens=longest, eos_id=EOS_ID).tolist()]
    return said


@torch.no_grad()
def qformer_captions(model, scenes, longest=40):
    """What the Q-Former itself says about each scene (ITG)."""
    import blip2
    pixels = blip2.preprocess([draw(scene) for scene in scenes], model.config.vision).to(model.query_tokens.device)
    rows = model.caption(pixels, longest).tolist()
    return [decode(row[:row.index(SEP_ID)] if SEP_ID in row else row).strip() for row in rows]


def exactly_right(said, scenes):
    return sum(text == caption(scene) for text, scene in zip(said, scenes)) / len(scenes)


def things_right(said, scenes):
    """The share of the things that are described rightly, at their place in the caption. Too many words cost nothing."""
    pairs = [(text.split(", "), caption(scene).split(", ")) for text, scene in zip(said, scenes)]
    return sum(a == b for text, right in pairs for a, b in zip(text, right)) / sum(len(right) for _, right in pairs)


@torch.no_grad()
def reranking(model, count=400, top=16):
    """(recall@1 by contrast alone, recall@1 when matching reorders its first `top`): unseen scenes, each to be found by its
    caption among those of all, and of three scenes each that differ from one of them in a single property."""
    import blip2
    rng = rng_for("blip2 reranking")
    scenes = [make_scene(rng, split="test") for _ in range(count)]
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
    """The share of a published model's parameters that a stage leaves alone, from its shapes."""
    import blip2
    with torch.device("meta"):
        model = blip2.BLIP2(blip2.PRESETS[preset])
    return 1 - sum(p.numel() for p in blip2.freeze(model, stage)) / blip2.count_parameters(model)


def blip2_claims(stage1, model):
    """stage1: the model after stage 1; it compares and matches, which stage 2 is free to forget."""
    rng = rng_for("blip2 claims")
    scenes = [make_scene(rng, split="test") for _ in range(400)]
    contrast, matching = reranking(stage1)
    return [Claim("blip2: captions of unseen scenes, exactly right", 0.0, exactly_right(blip2_captions(model, scenes), scenes), 0.90),
            Claim("blip2: recall@1, matching above contrast alone", contrast, matching, contrast + 0.005),
            Claim("blip2-opt-2.7b: share that stage 2 leaves frozen", 0.0, frozen_share("blip2-opt-2.7b", 2), 0.95)]


def blip2_samples(model, folder):
    rng = rng_for("blip2 samples")
    scenes = [make_scene(rng, split="test") for _ in range(8)]
    sheet([(draw(scene), ("" if text == caption(scene) else "WRONG: ") + text.replace(", ", ",\n"))
           for scene, text in zip(scenes, blip2_captions(model, scenes))], folder / "samples.png")


def blip2_recipe(args):
    stage1, model = toy_qformer(args.device, args.seed), toy_blip2(args.device, args.seed, args.steps)
    blip2_samples(model, RUNS / "blip2")
    return blip2_claims(stage1, model)


def blip2_ablations(args):
    """The paper's Figure 5: stage 2 after stage 1, and stage 2 alone; equal stage-2 steps, mean of 3 seeds.

    It takes a stage 1 that is long enough. Contrast asks for one good vector per image, matching for the mean of all
    queries' votes, and both make the queries' outputs alike; only when ITG has learned to write does stage 1 know more
    than a fresh Q-Former (with 450 steps instead of 800 it was a burden: 0.25 against 0.36 after 200 steps of stage 2). With
    800 it is no burden, but what it gains is within the noise of three seeds (README)."""
    steps, seeds, score = args.steps or BLIP2_ABLATION_STEPS, (0, 1, 2), {}
    rng = rng_for("blip2 ablations")
    scenes = [make_scene(rng, split="test") for _ in range(400)]
    untrained_blip2(args.device)                    # the towers, before the bar starts
    with tqdm(total=len(seeds) * BLIP2_BATCH * (2 * steps + QFORMER_STEPS), unit=" samples", desc="blip2 ablations", disable=None) as bar:
        for variant in ("both stages", "stage 2 alone"):
            for seed in seeds:
                both = variant == "both stages"
                model = toy_qformer(args.device, seed, bar=bar) if both else untrained_blip2(args.device, seed)
                blip2_stage(model, 2, f"blip2-ablations/{variant.replace(' ', '-')}-seed{seed}-steps{steps}", steps, seed, bar)
                score[variant] = score.get(variant, 0) + exactly_right(blip2_captions(model, scenes), scenes) / len(seeds)
    say(*(f"captions exactly right, {variant}: {value:.3f}" for variant, value in score.items()))
    return [Claim("blip2: stage 1 then stage 2 better than stage 2 alone", score["stage 2 alone"], score["both stages"],
                  score["stage 2 alone"])]


# ------------------------------------------------------------------------------------------------------------------
# Flamingo
# ------------------------------------------------------------------------------------------------------------------

CHINCHILLA_STEPS, FLAMINGO_STEPS, FLAMINGO_BATCH = 800, 800, 4      # of the language model; of what is inserted into it
DEMO_FLAMINGO_STEPS = 500
WAYS, SHOTS = 5, (0, 1, 2, 4, 8)                    # kinds of things in an episode; examples before the question


def invented_name(rng, split="train"):
    """A word that means nothing yet: consonant, vowel, consonant. An eighth of them is never used in training."""
    name = "red"                                    # the one word of this form that the world has already
    while name in COLOURS or (zlib.crc32(name.encode()) % 8 == 0) != (split == "test"):
        name = rng.choice("bdfgklmnprstvwz") + rng.choice("aeiou") + rng.choice("bdfgklmnprstvwz")
    return name


def invented_names(rng, count, split="train"):
    names = []
    while len(names) < count:
        names.append(invented_name(rng, split))
        names = list(dict.fromkeys(names))          # no name twice
    return names


def in_turn(rng, shots, ways):
    """Which of `ways` kinds each of `shots` examples shows: every kind once before any a second time, in random order; and
    at the end which kind is asked about, perhaps one that no example has shown."""
    order = []
    while len(order) < shots:
        order += rng.sample(range(ways), ways)
    return rng.sample(order[:shots], shots) + [rng.randrange(ways)]


def lookup_text(rng):
    """Lines of text of which the later ones can be told from the earlier: "circle dax", "ring wug", "circle dax" ... A
    language model that reads much of this learns to look things up in its context. The names are new in every text."""
    ways, kinds = rng.choice((2, 3, 4, 5)), rng.choice((SHAPES, tuple(COLOURS), None, None))
    words = rng.sample(kinds, ways) if kinds else invented_names(rng, ways)
    names = invented_names(rng, ways)
    return "".join(f"{words[i]} {names[i]}\n" for i in in_turn(rng, 10, ways))


def toy_chinchilla(device="cpu"):
    """The language model of the toy Flamingo, pretrained on `lookup_text` alone; it has never seen a picture. Cached."""
    import flamingo
    torch.manual_seed(0)
    model = flamingo.LanguageModel(flamingo.PRESETS["tiny"].language).to(device)

    def loss_of(step):
        ids, mask = pad([encode(lookup_text(rng)) for rng in batch_rngs(0, ("chinchilla", step), 16)])
        return flamingo.language_loss(model(ids.to(device)), ids.masked_fill(~mask, flamingo.IGNORE_INDEX).to(device))

    return fit(Plan("chinchilla", CHINCHILLA_STEPS, 16, lr=2e-3, muon=3e-3), model, loss_of, ("ln V", math.log(VOCAB_SIZE)))


def one_thing(rng, shape, pairs=SEEN_PAIRS):
    """A scene of one thing of this shape; its colour, size and place say nothing about its name."""
    pair = rng.choice([pair for pair in pairs if pair[1] == shape])
    return Scene((place_thing(pair, rng.choice(tuple(SIZES)), rng.choice(PLACES), rng),), grey=rng.randrange(0, 60))


def episode(rng, shots, ways=WAYS, split="train"):
    """[(scene, name)]: `shots` examples of what invented names mean, and one more to be named. A name means a shape, and in
    the next episode another one: only the examples can tell. split "test": names never used in training, and the scene
    asked about shows a colour-shape pair never drawn in it."""
    shapes, names, order = rng.sample(SHAPES, ways), invented_names(rng, ways, split), in_turn(rng, shots, ways)
    pairs = [SEEN_PAIRS] * shots + [UNSEEN_PAIRS if split == "test" else SEEN_PAIRS]
    return [(one_thing(rng, shapes[i], which), names[i]) for i, which in zip(order, pairs)]


def flamingo_batch(seed, step, batch, captions):
    """The paper's mixture (section 2.4) as rows of [(image, text)]: pictures with captions (of one word, nine in a row), which
    teach what a picture shows, and interleaved episodes, which teach what to do with that. captions: how many of the rows
    are of the first kind."""
    rows = []
    ways = rng_for(seed, ("ways", step)).choice((2, 3, 4, 5))
    for i, rng in enumerate(batch_rngs(seed, ("flamingo", step), batch)):
        said = episode(rng, 8, ways)
        rows.append([(draw(scene), f" {scene.things[0].shape}" if i < captions else f" {name}") for scene, name in said])
    return rows


def interleave(rows):
    """Rows of [(image, text)] -> ids [B,T], mask [B,T], labels [B,T], media [B,M,1,3,32,32], media_mask [B,M]; in ids
    <image> text <|endofchunk|> <image> text ..., text as plain text."""
    import flamingo
    config = flamingo.PRESETS["tiny"]
    ids, mask = pad([[i for _, text in row for i in (IMAGE_ID, *tokenizer().encode_ordinary(text), CHUNK_ID)] for row in rows])
    pixels = flamingo.preprocess([image for row in rows for image, _ in row], config.vision)
    media_mask = torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])
    media = pixels.new_zeros(*media_mask.shape, 1, *pixels.shape[1:])
    media[media_mask] = pixels[:, None]
    return ids, mask, flamingo.text_labels(ids, mask, config), media, media_mask


def gates(model):
    """How far the gates are open: {"attn_gate 0": |tanh(alpha)| of the first inserted block, mean over channels, ...}."""
    return {f"{name} {i}": float(getattr(block, name).detach().tanh().abs().mean())
            for i, block in enumerate(model.gated_blocks) for name in ("attn_gate", "ffw_gate") if getattr(block, name) is not None}


def untrained_flamingo(device="cpu", seed=0, **changes):
    """The toy CLIP's tower, the toy language model, both frozen from now on, and new layers between them, gates closed."""
    import flamingo
    torch.manual_seed(seed)
    model = flamingo.Flamingo(replace(flamingo.PRESETS["tiny"], **changes))
    model.vision.load_state_dict(toy_clip(device).vision.state_dict())
    model.language.load_state_dict(toy_chinchilla(device).state_dict())
    return model.to(device).eval()


def train_flamingo(model, name, steps, seed=0, captions=FLAMINGO_BATCH // 2, bar=None, draw_batch=None, data="world"):
    """Train what is inserted. draw_batch(step) -> rows of [(image, text)] replaces the world by other data."""
    import flamingo
    flamingo.freeze(model)
    device = next(model.parameters()).device

    def read(step):
        rows = draw_batch(step) if draw_batch else flamingo_batch(seed, step, FLAMINGO_BATCH, captions)
        return [x.to(device) for x in interleave(rows)]

    def loss_of(step):
        ids, _, labels, media, media_mask = read(step)      # padding is behind all labels
        loss, metrics = flamingo.language_loss(model(ids, media, media_mask=media_mask), labels)
        return loss, metrics | gates(model)

    # no weight decay: it would move the frozen rows of the table whose new rows train. A large lr for what is not a matrix:
    # as long as the gates are nearly closed, what is behind them learns next to nothing
    plan = Plan(name, steps, FLAMINGO_BATCH, lr=1.5e-2, muon=6e-3, weight_decay=0.0, seed=seed)
    data = f"{data}, {captions} captions, language model of {CHINCHILLA_STEPS} steps"
    ids, _, labels, *_ = read(0)
    with torch.no_grad():                           # gates closed, the first loss is that of the language model alone
        expected = ("the frozen language model's", float(flamingo.language_loss(model.language(ids), labels)[0]))
    return fit(plan, model, loss_of, expected if model.config.gate != "none" else None, data=data, bar=bar)


def toy_flamingo(device="cpu", seed=0, steps=None):
    """The standard toy Flamingo; towers and result are cached."""
    return train_flamingo(untrained_flamingo(device, seed), run_name("flamingo", seed, steps), steps or FLAMINGO_STEPS, seed)


def demo_flamingo(device="cpu"):
    """For the demo, with the rows of its log: the recipe's result if it has been trained, else that of fewer steps, since
    somebody is waiting."""
    steps = None if recipe_is_done("flamingo", FLAMINGO_STEPS) else DEMO_FLAMINGO_STEPS
    model = toy_flamingo(device, steps=steps)
    lines = (RUNS / run_name("flamingo", steps=steps) / "log.jsonl").read_text().splitlines()
    return model, [json.loads(line) for line in lines]


def named(model, episodes):
    """What the model calls the last scene of each episode, having seen the others with their names."""
    import flamingo
    device, said = next(model.parameters()).device, []
    for start in range(0, len(episodes), 64):
        rows = [[(draw(scene), f" {name}") for scene, name in one] for one in episodes[start:start + 64]]
        prompts = [[(image, "" if n == len(row) - 1 else text) for n, (image, text) in enumerate(row)] for row in rows]
        ids, mask, _, media, media_mask = interleave(prompts)
        ids, mask = flamingo.pad_rows([row[keep][:-1].tolist() for row, keep in zip(ids, mask)], PAD_ID, left=True)   # no last chunk
        new = model.generate(ids.to(device), media.to(device), mask.to(device), media_mask.to(device), max_new_tokens=6, eos_id=CHUNK_ID)
        said += [tokenizer().decode([i for i in row if i != CHUNK_ID]).strip() for row in new.tolist()]
    return said


def few_shot(model, shots, count=400, split="test"):
    """The share of episodes of this many examples whose last scene is given its name, letter by letter; and the same share of
    those episodes only in which an example has shown its kind (of WAYS kinds, k examples show k)."""
    rng = rng_for("few shot", shots)
    episodes = [episode(rng, shots, split=split) for _ in range(count)]
    right = [said == one[-1][1] for said, one in zip(named(model, episodes), episodes)]
    told = [r for r, one in zip(right, episodes) if one[-1][1] in [name for _, name in one[:-1]]]
    return sum(right) / count, sum(told) / max(1, len(told))


def swap_names(one):
    """The same episode, but every name means what another of its names meant: whoever reads the examples answers otherwise."""
    names = sorted({name for _, name in one})
    return [(scene, names[names.index(name) - 1]) for scene, name in one]


def follows_the_examples(model, shots=8, count=400):
    """The share of episodes answered rightly as they are and with their names swapped: the same pictures, in the same
    order, and two different answers. Nothing but the examples can tell."""
    rng = rng_for("swapped names", shots)
    episodes = [episode(rng, shots, split="test") for _ in range(count)]
    both = zip(named(model, episodes), named(model, [swap_names(one) for one in episodes]), episodes)
    return sum(a == one[-1][1] and b == swap_names(one)[-1][1] for a, b, one in both) / count


@torch.no_grad()
def text_untouched(model):
    """What training did to the language model inside: (the share of its logits for the words it knew that are the same to
    the bit; the loss of text before; after). The losses count the new tokens too, whose rows did train."""
    import flamingo
    device = next(model.parameters()).device
    ids, mask = (x.to(device) for x in pad([encode(lookup_text(rng)) for rng in batch_rngs(0, "text untouched", 32)]))
    before, after = toy_chinchilla(device)(ids), model.language(ids)
    old = torch.tensor([i for i in range(VOCAB_SIZE) if i not in model.config.new_token_ids])
    losses = [float(flamingo.language_loss(x, ids.masked_fill(~mask, flamingo.IGNORE_INDEX))[0]) for x in (before, after)]
    return (after == before)[mask][:, old].float().mean().item(), *losses


def flamingo_claims(model):
    shares = [few_shot(model, shots) for shots in SHOTS]
    curve, same = [share for share, _ in shares], text_untouched(model)
    say("named rightly after " + ", ".join(f"{k}: {share:.3f}" for k, share in zip(SHOTS, curve)) + " examples",
        "and if its kind was among them " + ", ".join(f"{k}: {told:.3f}" for k, (_, told) in zip(SHOTS, shares) if k),
        f"loss of text under the language model inside, new tokens in the table: {same[1]:.3f} before, {same[2]:.3f} after")
    least = min(b - a for a, b in zip(curve, curve[1:]))
    return [Claim("flamingo: new names from 8 examples", 1 / WAYS, curve[-1], 0.80),
            Claim("flamingo: least gain from more examples, 0 1 2 4 8", 0.0, least, 0.05),
            Claim("flamingo: names swapped, the answer follows", 1 / WAYS ** 2, follows_the_examples(model), 0.80),
            Claim("flamingo: frozen logits of known words, same to the bit", 0.0, same[0], 1.0)]


def flamingo_samples(model, folder):
    rng = rng_for("flamingo samples")
    episodes = [episode(rng, 4, split="test") for _ in range(3)]
    pictures = []
    for one, said in zip(episodes, named(model, episodes)):
        pictures += [(draw(scene), name) for scene, name in one[:-1]]
        pictures.append((draw(one[-1][0]), f"? {said}" + ("" if said == one[-1][1] else f"\n(it is {one[-1][1]})")))
    sheet(pictures, folder / "samples.png", columns=5, wide=150)


def flamingo_recipe(args):
    model = toy_flamingo(args.device, args.seed, args.steps)
    flamingo_samples(model, RUNS / "flamingo")
    return flamingo_claims(model)


def flamingo_ablations(args):
    """Gates that start closed against none; resampler against an MLP on every patch (4 vectors per image against 17);
    captions in the mixture against interleaved episodes alone. Equal steps, 8 examples, mean of 3 seeds."""
    steps, seeds, score = args.steps or FLAMINGO_STEPS, (0, 1, 2), {}
    variants = {"recipe": {}, "ungated": {"gate": "none"}, "mlp": {"connector": "mlp"}, "no captions": {}}
    untrained_flamingo(args.device)                 # the towers, before the bar starts
    with tqdm(total=len(seeds) * len(variants) * steps * FLAMINGO_BATCH, unit=" samples", desc="flamingo ablations", disable=None) as bar:
        for variant, changes in variants.items():
            captions = 0 if variant == "no captions" else FLAMINGO_BATCH // 2
            for seed in seeds:
                name = f"flamingo-ablations/{variant.replace(' ', '-')}-seed{seed}-steps{steps}"
                model = train_flamingo(untrained_flamingo(args.device, seed, **changes), name, steps, seed, captions, bar)
                score.setdefault(variant, []).append(few_shot(model, 8)[0])
    say(*(f"named rightly after 8 examples, {variant}: " + ", ".join(f"{x:.3f}" for x in each) for variant, each in score.items()))
    mean = {variant: sum(each) / len(seeds) for variant, each in score.items()}
    return [Claim("flamingo: tanh gates better than ungated insertion", mean["ungated"], mean["recipe"], mean["ungated"]),
            Claim("flamingo: resampler no worse than an MLP on each patch", mean["mlp"], mean["recipe"], mean["mlp"]),
            Claim("flamingo: captions in the mixture better than none", mean["no captions"], mean["recipe"], mean["no captions"])]


# ------------------------------------------------------------------------------------------------------------------
# CogVLM
# ------------------------------------------------------------------------------------------------------------------

EVA_STEPS, VICUNA_STEPS, COGVLM_STEPS, COGVLM_BATCH = 400, (1500, 500, 450), 1700, 16
DEMO_COGVLM_STEPS, COGVLM_ABLATION_STEPS = 300, 400                 # for the demo, and for comparisons
TOWERS, DEMO_TOWERS = (None, None), (200, 300)                      # steps of both towers: all of them; the demo's


def ask_box(scene, rng):
    """A referring expression, answered as in grounded captions: the thing's words, its place in a word, its box. With the words in
    front more boxes are right than without (README). A guess why: while "circle" is the last token read, the frozen queries ask
    for circles by themselves, and the experts need only make keys that answer. One in eight asks for what is not there."""
    if rng.random() < 0.125:
        absent = [pair for pair in SEEN_PAIRS if pair not in [t.pair for t in scene.things]]
        return "where is the {} {}?".format(*rng.choice(absent)), "nothing"
    thing = rng.choice(scene.things)
    asked = thing.name if rng.random() < 0.5 else refer(scene, thing)
    return f"where is the {asked}?", f"{thing.name} {thing.place} {box_text(thing, 32, 32)}"


def cogvlm_turns(scene, rng):
    """What is asked about a scene: two boxes, two questions, and its description, in any order."""
    turns = [ask_box(scene, rng), ask_box(scene, rng), ask(scene, rng, KINDS), ask(scene, rng, KINDS), (DESCRIBE, caption(scene))]
    return rng.sample(turns, len(turns))


def vicuna_turns(scene, rng, part=3):
    """What the toy Vicuna is asked about a scene it is told in words. In parts 1 and 2, besides what CogVLM will be asked, all it
    was told once more, shape first or colour first: that asks at every word for another by its neighbour, where a question asks
    but once. In part 3 what is still answered badly. Words do not say a box to the pixel: what can only be guessed is noise to
    the rest, so boxes are few, no more than their form needs."""
    if part == 3:
        turns = [ask(scene, rng, (kind,)) for kind in ("colour", "shape", rng.choice(KINDS), rng.choice(KINDS))]
        turns.append(ask_box(scene, rng) if rng.random() < 0.75 else (DESCRIBE, caption(scene)))
        return rng.sample(turns, len(turns))
    things = rng.sample(scene.things, len(scene.things))
    turns = [ask(scene, rng, KINDS) for _ in range(6)] + [(DESCRIBE, caption(scene))]
    if rng.random() < 0.5:
        turns.append(("which shape has which colour?", ", ".join(f"{t.shape} {t.colour} {t.size} {t.place}" for t in things)))
    else:
        turns.append(("which colour has which shape?", ", ".join(f"{t.colour} {t.shape} {t.size} {t.place}" for t in things)))
    turns += [ask_box(scene, rng)] if rng.random() < (0.15 if part == 1 else 0.6) else []
    return rng.sample(turns, len(turns))


def vicuna_rows(rngs, part=3):
    """Scenes told in words, in any order, and asked about -> ids, labels [B,T]: [(scene, rng)] in the place of pictures."""
    import cogvlm
    rows = []
    for scene, rng in rngs:
        turns = vicuna_turns(scene, rng, part)
        ids, labels = cogvlm.conversation_row(turns, encode, cogvlm.PRESETS["tiny"], images=0)
        told = encode(", ".join(f"{t.place} a {t.full_name}" for t in rng.sample(scene.things, len(scene.things))))
        rows.append((ids[:1] + told + ids[1:], [cogvlm.IGNORE_INDEX] * len(told) + labels))
    return pad([ids for ids, _ in rows])[0], pad([labels for _, labels in rows], cogvlm.IGNORE_INDEX)[0]


def toy_eva(device="cpu", steps=None):
    """CogVLM's tower at toy size, pretrained as CLIP's is, in its place. In runs/eva."""
    import cogvlm
    torch.manual_seed(0)
    tower = cogvlm.EVATower(cogvlm.PRESETS["tiny"].vision)
    return train_clip(run_name("eva", steps=steps), steps=steps or EVA_STEPS, device=device, vision=tower, data=f"world, {tower.config}").vision


def toy_vicuna(device="cpu", steps=None):
    """CogVLM's decoder at toy size, pretrained on text alone to look up what it is told; its language weights never change
    again. Three parts, in runs/vicuna-part1, -part2 and runs/vicuna; given `steps`, the first alone, and so many of it."""
    import cogvlm
    torch.manual_seed(0)
    model = cogvlm.ExpertDecoder(cogvlm.PRESETS["tiny"].language).to(device)
    for layer in model.layers:
        layer.vision_expert.requires_grad_(False)   # text never goes through it

    def loss_of(part, step):
        key = f"vicuna {part}"
        count = rng_for(key, step).choice((1, 2, 2, 3, 3, 4))           # equally many things: rows about as long
        ids, labels = vicuna_rows([(make_scene(rng, count), rng) for rng in batch_rngs(0, (key, step), 32)], part)
        return cogvlm.language_loss(model(ids.to(device)), labels.to(device))

    for part, length in enumerate((steps,) if steps else VICUNA_STEPS, 1):
        name = f"vicuna-steps{steps}" if steps else "vicuna" if part == 3 else f"vicuna-part{part}"
        expected = ("ln V", math.log(VOCAB_SIZE)) if part == 1 else None
        plan = Plan(name, length, 32, lr=3e-3, muon=6e-3)
        fit(plan, model, lambda step, part=part: loss_of(part, step), expected, f"world, part {part}, after {VICUNA_STEPS[:part - 1]} steps")
    model.copy_experts()                            # an image is first read as words are
    return model


def untrained_cogvlm(device="cpu", seed=0, towers=TOWERS):
    """CogVLM before it has seen an image with a text: the toy EVA tower, the toy Vicuna with its weights copied into the
    vision experts, and a random adapter."""
    import cogvlm
    torch.manual_seed(seed)
    model = cogvlm.CogVLM(cogvlm.PRESETS["tiny"])
    model.vision.load_state_dict(toy_eva(device, towers[0]).state_dict())
    model.language.load_state_dict(toy_vicuna(device, towers[1]).state_dict())
    return model.to(device).eval()


def cogvlm_loss(model, images, turns):
    """`conversation_loss` of rows in CogVLM's form; what looks like a special token in a text is plain text."""
    import cogvlm
    return conversation_loss(model, images, turns, lambda said: cogvlm.conversation_row(said, tokenizer().encode_ordinary, model.config))


def train_cogvlm(model, name, steps, seed=0, bar=None, draw_batch=None, data="world", towers=TOWERS, freeze=None):
    """The paper's split: experts, adapter, boi and eoi learn, nothing else (or what freeze(model) leaves free).
    draw_batch(step) -> (images, turns) replaces the world by other data."""
    import cogvlm
    (freeze or cogvlm.freeze)(model)
    plan = Plan(name, steps, COGVLM_BATCH, lr=3e-3, muon=1.2e-2, warmup=50, weight_decay=0.02, seed=seed)

    def from_world(step):
        rngs = batch_rngs(seed, ("cogvlm", step), plan.batch)
        count = rng_for(seed, "cogvlm", step).choice((1, 2, 2, 3, 3, 4))        # equally many things: rows about as long
        scenes = [make_scene(rng, count) for rng in rngs]
        return [draw(scene) for scene in scenes], [cogvlm_turns(scene, rng) for scene, rng in zip(scenes, rngs)]

    data = f"{data}, towers of {towers[0] or EVA_STEPS} and {towers[1] or VICUNA_STEPS} steps"    # other towers give another model: the cache must know
    return fit(plan, model, lambda step: cogvlm_loss(model, *(draw_batch or from_world)(step)), data=data, bar=bar)


def toy_cogvlm(device="cpu", seed=0, steps=None, towers=TOWERS):
    """The standard toy CogVLM; towers and result are cached."""
    model = untrained_cogvlm(device, seed, towers)
    return train_cogvlm(model, run_name("cogvlm", seed, steps), steps or COGVLM_STEPS, seed, towers=towers)


def demo_cogvlm(device="cpu"):
    """For the demo, the model before its training and a function that gives it after: the recipe's if it has been trained, else
    one of fewer steps on towers of fewer steps, since somebody is waiting."""
    done = recipe_is_done("cogvlm", COGVLM_STEPS)
    steps, towers = (None, TOWERS) if done else (DEMO_COGVLM_STEPS, DEMO_TOWERS)
    return untrained_cogvlm(device, towers=towers), lambda: toy_cogvlm(device, steps=steps, towers=towers)


@torch.no_grad()
def cogvlm_answers(model, scenes, questions, longest=40):
    """What the model says to one question about each scene, as text."""
    import cogvlm
    device, said = model.adapter.boi.device, []
    for start in range(0, len(scenes), 128):
        part = slice(start, start + 128)
        rows = [cogvlm.prompt_row(encode(cogvlm.build_prompt(question, "vqa")), model.config) for question in questions[part]]
        ids, mask = cogvlm.pad_rows(rows, PAD_ID, left=True)
        pixels = cogvlm.preprocess([draw(scene) for scene in scenes[part]], model.config.vision).to(device)
        new = model.generate(ids.to(device), pixels, mask.to(device), max_new_tokens=longest, eos_id=EOS_ID)
        said += [decode(row).strip() for row in new.tolist()]
    return said


def cogvlm_accuracy(model, asked):
    return accuracy(model, asked, cogvlm_answers)


def box_questions(rng, count):
    """[(scene, question, box as text)]: things to be found in scenes never trained on."""
    asked = []
    while len(asked) < count:
        scene = make_scene(rng, split="test")
        question, answer = ask_box(scene, rng)
        if answer != "nothing":
            asked.append((scene, question, answer))
    return asked


def grounding(model, asked):
    """The share of [(scene, question, box)] whose answer is a box with an IoU of 0.5 or more: the paper's measure."""
    import cogvlm
    said = cogvlm_answers(model, [scene for scene, _, _ in asked], [question for _, question, _ in asked])
    return sum(cogvlm.box_iou(cogvlm.parse_box(text), cogvlm.parse_box(right)) >= 0.5 for text, (_, _, right) in zip(said, asked)) / len(asked)


def guess_box(asked):
    """The same share for whoever guesses as well as one can without understanding: always the one box that is right most
    often, or (if that is better) the true box of any thing in the scene, as a perfect detector that cannot read would."""
    import cogvlm
    boxes = [cogvlm.parse_box(right) for _, _, right in asked]
    constant = max(sum(cogvlm.box_iou(box, other) >= 0.5 for other in boxes) for box in set(boxes))
    things = [[cogvlm.parse_box(box_text(t, 32, 32)) for t in scene.things] for scene, _, _ in asked]
    detector = sum(sum(cogvlm.box_iou(box, t) >= 0.5 for t in found) / len(found) for box, found in zip(boxes, things))
    return max(constant, detector) / len(asked)


@torch.no_grad()
def text_logits(model):
    """The logits of 32 conversations without an image: scenes told in words, and questions about them."""
    ids, _ = vicuna_rows([(make_scene(rng, 3, split="test"), rng) for rng in batch_rngs(0, "text only", 32)])
    return model(ids.to(model.adapter.boi.device)).cpu()


def cogvlm_claims(before, model):
    """before: the model untrained, whose texts the trained one must read in the same way."""
    vqa, boxes = vqa_questions(rng_for("cogvlm claims"), 400), box_questions(rng_for("cogvlm boxes"), 400)
    same = float((text_logits(before) == text_logits(model)).double().mean())
    return [Claim("cogvlm: text-only logits equal to the bit, before and after", 0.0, same, 1.0),
            Claim("cogvlm: things found in unseen scenes, IoU >= 0.5", guess_box(boxes), grounding(model, boxes), 0.80),
            Claim("cogvlm: questions about unseen scenes", guess(vqa), cogvlm_accuracy(model, vqa), 0.90)]


def cogvlm_samples(model, folder):
    import cogvlm
    rng, pictures = rng_for("cogvlm samples"), []
    asked = [question for pair in zip(box_questions(rng, 4), vqa_questions(rng, 4)) for question in pair]
    said = cogvlm_answers(model, [a[0] for a in asked], [a[1] for a in asked])
    for (scene, question, right), text in zip(asked, said):
        true, found = cogvlm.parse_box(right), cogvlm.parse_box(text)
        verdict = f"IoU {cogvlm.box_iou(true, found):.2f}" if true else "" if text == right else f"WRONG: {right}"
        pictures.append((cogvlm.frame(draw(scene), [(true, "white"), (found, "magenta")], 128), f"{question}\n{text}\n{verdict}"))
    sheet(pictures, folder / "samples.png", scale=1)


def cogvlm_recipe(args):
    before, model = untrained_cogvlm(args.device, args.seed), toy_cogvlm(args.device, args.seed, args.steps)
    cogvlm_samples(model, RUNS / "cogvlm")
    return cogvlm_claims(before, model)


def shallow(model):
    """LLaVA's way, to compare with: image tokens go through the words' own weights, in every layer the same module."""
    for layer in model.language.layers:
        layer.vision_expert = layer.language_expert
    return model


def freeze_all_but_adapter(model):
    model.requires_grad_(False)
    model.adapter.requires_grad_(True)


def freeze_the_tower_only(model):
    model.requires_grad_(True)
    model.vision.requires_grad_(False)


@torch.no_grad()
def text_loss(model):
    """How well the model still answers questions about what it is told in words: its loss on text, in nats per token."""
    import cogvlm
    device, losses = next(model.parameters()).device, []
    for count in (2, 3, 4):
        rngs = batch_rngs(0, ("text loss", count), 32)
        ids, labels = (x.to(device) for x in vicuna_rows([(make_scene(rng, count, split="test"), rng) for rng in rngs]))
        losses.append(float(cogvlm.language_loss(model.language(ids), labels)[0]))
    return sum(losses) / len(losses)


def cogvlm_ablations(args):
    """The expert against an adapter alone (deep against shallow) with the language model frozen, and against LLaVA's way, in
    which all of it trains, no weight being for images only: what each learns about images, and what it forgets about texts.
    Equal steps, mean of 3 seeds."""
    steps, seeds, score = args.steps or COGVLM_ABLATION_STEPS, (0, 1, 2), {}
    vqa, boxes = vqa_questions(rng_for("cogvlm ablations"), 400), box_questions(rng_for("cogvlm ablations, boxes"), 200)
    start = text_loss(untrained_cogvlm(args.device))                    # the towers, before the bar starts
    with tqdm(total=9 * COGVLM_BATCH * steps, unit=" samples", desc="cogvlm ablations", disable=None) as bar:
        for variant, freeze in (("visual experts", None), ("adapter alone", freeze_all_but_adapter), ("all trained", freeze_the_tower_only)):
            for seed in seeds:
                model = untrained_cogvlm(args.device, seed)
                model = model if variant == "visual experts" else shallow(model)
                name = f"cogvlm-ablations/{variant.replace(' ', '-')}-seed{seed}-steps{steps}"
                train_cogvlm(model, name, steps, seed, bar, freeze=freeze)
                score.setdefault(variant, []).append((cogvlm_accuracy(model, vqa), grounding(model, boxes), text_loss(model)))
    for variant, values in score.items():
        say(f"{variant}: " + "; ".join(f"{what} {' '.join(f'{v[i]:.3f}' for v in values)}"
                                       for i, what in enumerate(("questions answered", "things found", "text loss"))))
    say(f"text loss before: {start:.3f}")
    mean = {variant: [sum(column) / len(seeds) for column in zip(*values)] for variant, values in score.items()}
    deep, flat, llava = mean["visual experts"], mean["adapter alone"], mean["all trained"]
    return [Claim("cogvlm: visual experts answer more than an adapter alone", flat[0], deep[0], flat[0]),
            Claim("cogvlm: visual experts find more than an adapter alone", flat[1], deep[1], flat[1]),
            Claim("cogvlm: text loss saved by not training the language model", 0.0, llava[2] - deep[2], 0.01)]


# ------------------------------------------------------------------------------------------------------------------
# Qwen2-VL
# ------------------------------------------------------------------------------------------------------------------

QWEN_PART1_STEPS, QWEN_STEPS = 900, 560             # QWEN_STEPS are those of the second and last part
DEMO_QWEN_STEPS, QWEN_ABLATION_STEPS = (350, 100), (300, 1000)      # of both parts, for the demo; of comparisons on things, on movies
# What a step is made of. What takes longest to learn (find a thing, then read off its property) comes first and nearly alone.
PART1_MIX, QWEN_MIX = ("scene",) * 14 + ("movie",) * 2, ("scene",) * 7 + ("number",) * 9 + ("movie",) * 2
SMALL_CANVASES = ((32, 32), (48, 48), (48, 32), (32, 48), (64, 32), (32, 64))   # (width, height) of scenes in part 1 ...
LARGER_CANVASES = ((64, 64), (80, 80), (80, 48), (48, 80))             # ... and with these in part 2
CANVASES = SMALL_CANVASES + LARGER_CANVASES
NEW_CANVASES = ((80, 32), (32, 80), (64, 48), (48, 64), (80, 64), (64, 80))     # of shapes never trained on
LARGE_CANVASES = ((96, 96), (112, 64), (64, 112), (128, 48))           # and larger than any in training
FRAMES, LONG_MOVIES = (2, 4, 6), (8, 12, 16, 24)    # frames of movies in training, and of longer ones
NUMBER_SIZE = (48, 48)                              # pixels of the picture with a number in it: 3 x 3 tokens
TOKENS = (1, 4, 9)                                  # how many it may have when it is read


def untrained_qwen(device="cpu", seed=0, mrope=True, **vision):
    """What the paper starts from, at toy scale: a decoder that knows its language (the toy language model, biases of 0 added),
    and a tower trained by contrast (the toy CLIP's blocks) whose learned positions are left out for RoPE-2D. One frame of a
    patch gets half of CLIP's patch projection, so that a still picture gives what it gave there, and the scale that CLIP's
    norm before the first block, which this tower has not, gave it on average. vision: changes."""
    import clip
    import qwen2vl
    torch.manual_seed(seed)
    config = replace(qwen2vl.PRESETS["tiny"], mrope=mrope)
    model = qwen2vl.Qwen2VL(replace(config, vision=replace(config.vision, **vision)))
    tower, frames = toy_clip(device).vision, config.vision.frames
    with torch.no_grad():
        pictures = clip.preprocess([draw(make_scene(rng)) for rng in batch_rngs(0, "scale", 32)], tower.config).to(device)
        spread = tower.patch_embedding(pictures).std(dim=1).mean()
        scaled = tower.patch_embedding.weight * (tower.ln_pre.weight / spread)[:, None, None, None]
        model.vision.patch_embedding.weight.copy_(torch.stack([scaled] * frames, dim=2).flatten(1) / frames)    # [D,3*frames*P*P]
    model.vision.blocks.load_state_dict(tower.blocks.state_dict())
    missing = model.language.load_state_dict(toy_lm(device).state_dict(), strict=False)
    assert all(name.endswith("proj.bias") for name in missing.missing_keys) and not missing.unexpected_keys
    return model.to(device).eval()


def shrink(image, tokens):
    """The image with so few pixels that it becomes at most this many tokens: what a smaller max_pixels does to it."""
    import qwen2vl
    factor = qwen2vl.PRESETS["tiny"].vision.factor
    height, width = qwen2vl.smart_resize(image.height, image.width, factor, factor**2, tokens * factor**2)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def qwen_scene(rng, sizes=CANVASES, split="train"):
    """A picture of one of these sizes with its description among four questions; a test scene with one question."""
    scene = make_scene(rng, split=split)
    turns = [ask(scene, rng, KINDS) for _ in range(4 if split == "train" else 1)]
    if split == "train":
        turns.insert(rng.randrange(5), (DESCRIBE, caption(scene)))
    return draw(scene, *rng.choice(sizes)), turns


def qwen_number(rng, tokens=None):
    """A small number, its strokes 3 pixels wide, about in the middle of a picture that is then given so few pixels that it
    makes at most `tokens` tokens (None: any of TOKENS, three times in five the most)."""
    text, question, answer = read_number(rng)
    number, image = draw_number(text, 24, 18), Image.new("RGB", NUMBER_SIZE, (20,) * 3)
    image.paste(number, tuple((whole - part) // 2 + rng.randrange(-2, 3) for whole, part in zip(NUMBER_SIZE, number.size)))
    return shrink(image, tokens or rng.choice(TOKENS + TOKENS[-1:] * 2)), [(question, answer)]


def qwen_movie(rng, frames=None, side=32):
    """A movie as a list of frames, and which way its thing moves; in training also what it is."""
    scenes, question, way = movie(rng, frames or rng.choice(FRAMES))
    thing, turns = scenes[0].things[0], [(question, way)]
    if frames is None:
        turns = rng.sample([*turns, ("what colour is it?", thing.colour), ("what shape is it?", thing.shape)], 3)
    return [draw(scene, side, side) for scene in scenes], turns


def qwen_thing(rng, sizes=CANVASES, split=None):
    """A picture of one thing, and what it is. For comparisons that must be quick. One thing is too little for a scene of its
    own in the test split, whatever `split` says: what is new in a test is the size of the picture."""
    (thing,) = (scene := make_scene(rng, 1, split="any")).things
    return draw(scene, *rng.choice(sizes)), [("what is it?", f"a {thing.full_name}")]


QWEN_SAMPLES = {"scene": qwen_scene, "thing": qwen_thing, "number": qwen_number, "movie": qwen_movie,
                "large movie": lambda rng: qwen_movie(rng, side=48)}        # 9 tokens for two frames, not 4


def qwen_inputs(samples, config, device, answers=True):
    """[(picture or frames, turns)] -> the arguments of the model, and labels. Without answers the rows end where the first
    answer would begin, padding is on the left, and labels are None. Grids stay on the CPU: their sizes are numbers for Python."""
    import qwen2vl
    given, grids, rows = {}, [(None, None)] * len(samples), []
    for prefix, is_movie in (("", False), ("video_", True)):
        chosen = [i for i, (item, _) in enumerate(samples) if isinstance(item, list) == is_movie]
        if chosen:
            patches, grid = qwen2vl.preprocess([samples[i][0] for i in chosen], config.vision)
            given |= {f"{prefix}patches": patches.to(device), f"{prefix}grid_thw": grid}
            for i, row in zip(chosen, grid):
                grids[i] = (None, row[None]) if is_movie else (row[None], None)
    for (_, turns), grid in zip(samples, grids):
        ids, labels = [], []
        for n, (question, answer) in enumerate(turns if answers else turns[:1]):
            more = qwen2vl.encode_turn(question, f" {answer}", encode, config, *(grid if n == 0 else ()))
            ids, labels = ids + more[0], labels + more[1]
        prompt = labels.count(qwen2vl.IGNORE_INDEX)  # of a single turn all that is not the answer, which comes last
        rows.append((ids, labels) if answers else (ids[:prompt], None))
    if answers:                                     # padding is to the right of all labels: nothing looks at it
        labels = pad([labels for _, labels in rows], qwen2vl.IGNORE_INDEX)[0]
        return given | dict(ids=pad([ids for ids, _ in rows])[0].to(device)), labels.to(device)
    ids, mask = qwen2vl.pad_rows([ids for ids, _ in rows], PAD_ID, left=True)
    return given | dict(ids=ids.to(device), mask=mask.to(device)), None


def train_qwen(model, name, steps, seed, mix, bar=None, draw_batch=None, data="world", sizes=CANVASES, first=0, lock=None, rate=1.0):
    """The paper's stage 2, in which everything trains, and after `lock` steps (None: never) its stage 3: the tower is locked,
    which makes a step cheaper by a third. mix: the kind of each sample of a step, equal ones together; sizes: of its scenes, in
    the first `first` steps only that of the toy CLIP's images; rate: a factor of the learning rates. draw_batch(step) -> samples
    replaces the world by other data."""
    import qwen2vl
    qwen2vl.freeze(model, 2)
    device, counts = next(model.parameters()).device, [mix.count(kind) for kind in dict.fromkeys(mix)]

    def from_world(step):
        rngs = batch_rngs(seed, ("qwen", data, step), len(mix))    # part 2 shows other samples than part 1
        drawn = sizes[:1] if step < first else sizes
        return [QWEN_SAMPLES[kind](rng, *([drawn] if kind in ("scene", "thing") else ())) for kind, rng in zip(mix, rngs)]

    def loss_of(step):
        if lock is not None:
            qwen2vl.freeze(model, 2 if step < lock else 3)
        inputs, labels = qwen_inputs((draw_batch or from_world)(step), model.config, device)
        logits = model(**inputs)
        each, total = {}, 0                         # a kind counts by its samples, not by its words: captions have many
        for kind, part, rows in zip(dict.fromkeys(mix), logits.split(counts), labels.split(counts)):
            each[kind] = qwen2vl.language_loss(part, rows)[0]
            total = total + each[kind] * len(rows) / len(labels)
        return total, {kind: loss.detach() for kind, loss in each.items()}

    plan = Plan(name, steps, len(mix), lr=2e-3 * rate, muon=3e-3 * rate, warmup=50, weight_decay=0.02, seed=seed)
    key = f"{data}, {mix} {sizes} {first} {lock}, towers of {CLIP_STEPS} and {LM_STEPS} steps"     # other towers give another model: the cache must know
    return fit(plan, model, loss_of, data=key, bar=bar)


def toy_qwen(device="cpu", seed=0, steps=None, part1=None):
    """The standard toy Qwen2-VL; towers, both parts and result are cached. Part 1, on small pictures: to see, then with the tower
    locked to look things up. Part 2, in which everything trains once more, at a lower rate, so that this is not lost: pictures of
    all sizes (the larger ones twice as often), and numbers to read."""
    model, part1 = untrained_qwen(device, seed), part1 or QWEN_PART1_STEPS
    name = run_name("qwen2vl-part1", seed, part1 if part1 != QWEN_PART1_STEPS else None)
    first, lock = part1 * 3 // 20, part1 * 3 // 5   # 15 % of the steps on one size alone, the last 40 % with the tower locked
    train_qwen(model, name, part1, seed, PART1_MIX, sizes=SMALL_CANVASES, first=first, lock=lock)
    name, sizes = run_name("qwen2vl", seed, steps), CANVASES + LARGER_CANVASES
    return train_qwen(model, name, steps or QWEN_STEPS, seed, QWEN_MIX, data=f"world, after {part1} steps of part 1", sizes=sizes, rate=0.67)


def demo_qwen(device="cpu"):
    """For the demo: the recipe's result if it has been trained, else that of fewer steps, since somebody is waiting."""
    if recipe_is_done("qwen2vl", QWEN_STEPS):
        return toy_qwen(device)
    part1, steps = DEMO_QWEN_STEPS
    return toy_qwen(device, steps=steps, part1=part1)


@torch.no_grad()
def qwen_answers(model, samples, longest=12):
    """What the model says to the first question of each (picture or frames, turns), as text."""
    device, said = next(model.parameters()).device, []
    for start in range(0, len(samples), 64):
        inputs, _ = qwen_inputs(samples[start:start + 64], model.config, device, answers=False)
        said += [decode(row).strip() for row in model.generate(**inputs, max_new_tokens=longest, eos_id=EOS_ID).tolist()]
    return said


def qwen_accuracy(model, samples):
    """The share of first questions that is answered word for word."""
    return sum(said == turns[0][1] for said, (_, turns) in zip(qwen_answers(model, samples), samples)) / len(samples)


def size_questions(count, sizes, ask_about=qwen_scene):
    """Questions about scenes drawn in these sizes, the same scenes and questions whatever the sizes. Those of qwen_scene were
    never trained on; those of qwen_thing may have been, in other sizes."""
    return [ask_about(rng_for("qwen size", i), [sizes[i % len(sizes)]], "test") for i in range(count)]


def qwen_movies(count, frames, side=32):
    rng = rng_for("qwen movies", frames)
    return [qwen_movie(rng, frames, side) for _ in range(count)]


def qwen_numbers(count, tokens):
    rng = rng_for("qwen numbers")                   # the same numbers whatever the tokens
    return [qwen_number(rng, tokens) for _ in range(count)]


def tokens_per_area():
    """The correlation of visual tokens with the area of pictures of random sizes and shapes, as preprocess makes them."""
    import qwen2vl
    rng, vision = rng_for("qwen areas"), qwen2vl.PRESETS["tiny"].vision
    sizes = [(rng.randrange(32, 129), rng.randrange(32, 129)) for _ in range(200)]
    tokens = [len(qwen2vl.preprocess([Image.new("RGB", size)], vision)[0]) / vision.merge**2 for size in sizes]
    return float(np.corrcoef([w * h for w, h in sizes], tokens)[0, 1])


def qwen_claims(model):
    asked = [size_questions(300, sizes) for sizes in (CANVASES, NEW_CANVASES, LARGE_CANVASES)]
    seen, new, large = (qwen_accuracy(model, questions) for questions in asked)
    guessed = guess([(None, *turns[0]) for _, turns in asked[0]])
    curve = [qwen_accuracy(model, qwen_numbers(200, tokens)) for tokens in TOKENS]
    ways = qwen_accuracy(model, [one for frames in FRAMES for one in qwen_movies(100, frames)])
    say(f"questions answered: {seen:.3f} in sizes of training, {new:.3f} in shapes never seen, {large:.3f} in larger ones",
        "numbers read with " + ", ".join(f"{tokens}: {share:.3f}" for tokens, share in zip(TOKENS, curve)) + " tokens",
        "longer movies: " + ", ".join(f"{frames} frames: {qwen_accuracy(model, qwen_movies(100, frames)):.3f}" for frames in LONG_MOVIES))
    return [Claim("qwen2vl: questions about unseen scenes", guessed, seen, 0.80),
            Claim("qwen2vl: gain by sizes and shapes never seen", guessed - seen, new - seen, -0.05),
            Claim("qwen2vl: which way does it move", 0.25, ways, 0.90),
            Claim("qwen2vl: numbers read with all their tokens", 0.01, curve[-1], 0.90),
            Claim("qwen2vl: least gain from more tokens, 1 4 9", 0.0, min(b - a for a, b in zip(curve, curve[1:])), 0.0),
            Claim("qwen2vl: tokens grow with the area (correlation)", 0.0, tokens_per_area(), 0.98)]


def qwen_samples(model, folder):
    rng = rng_for("qwen samples")
    samples = [qwen_scene(rng, [size], "test") for size in (*CANVASES[1:3], *NEW_CANVASES[:4])]
    samples += [qwen_number(rng, tokens) for tokens in TOKENS[-2:]]
    said = qwen_answers(model, samples)
    sheet([(item, f"{turns[0][0]}\n{text}" + ("" if text == turns[0][1] else f"\n(WRONG: {turns[0][1]})"))
           for (item, turns), text in zip(samples, said)], folder / "samples.png", scale=2)


def qwen_recipe(args):
    model = toy_qwen(args.device, args.seed, args.steps)
    qwen_samples(model, RUNS / "qwen2vl")
    return qwen_claims(model)


def qwen_ablations(args):
    """On pictures of one thing: many sizes as they are, against a tower of one resolution with learned positions, trained on
    48 x 48 and stretched to other sizes. On movies: M-RoPE against all tokens numbered one by one, on movies longer than those of
    training, whose numbers run past those trained. Equal steps, mean of 3 seeds."""
    seeds, score, batch = (0, 1, 2), {}, 8
    of_things, of_movies = (args.steps,) * 2 if args.steps else QWEN_ABLATION_STEPS
    variants = {"any size": ("thing", of_things, {}), "one size, learned positions": ("thing", of_things, dict(learned_grid=6)),
                "M-RoPE": ("large movie", of_movies, {}), "RoPE-1D": ("large movie", of_movies, dict(mrope=False))}
    untrained_qwen(args.device)                     # the towers, before the bar starts
    trained, longer = ([one for frames in lengths for one in qwen_movies(50, frames, 48)] for lengths in (FRAMES, LONG_MOVIES))
    with tqdm(total=len(seeds) * 2 * (of_things + of_movies) * batch, unit=" samples", desc="qwen2vl ablations", disable=None) as bar:
        for variant, (kind, steps, changes) in variants.items():
            sizes = ((48, 48),) if "learned_grid" in changes else CANVASES
            for seed in seeds:
                name = f"qwen2vl-ablations/{variant.replace(' ', '-').replace(',', '')}-seed{seed}-steps{steps}"
                model = train_qwen(untrained_qwen(args.device, seed, **changes), name, steps, seed, (kind,) * batch, bar, sizes=sizes)
                asked = (trained, longer) if kind == "large movie" else (size_questions(300, which, qwen_thing) for which in (sizes, NEW_CANVASES))
                score.setdefault(variant, []).append([qwen_accuracy(model, questions) for questions in asked])
    for variant, each in score.items():
        what = "movies, of lengths in training / longer" if "RoPE" in variant else "pictures, of sizes in training / of new ones"
        say(f"{what}, {variant}: " + ", ".join(f"{own:.3f} / {new:.3f}" for own, new in each))
    own, new = ({variant: sum(pair[i] for pair in each) / len(seeds) for variant, each in score.items()} for i in (0, 1))
    any_size, one_size = (new[v] - own[v] for v in ("any size", "one size, learned positions"))
    return [Claim("qwen2vl: any size loses less by new sizes than one size does", one_size, any_size, one_size),
            Claim("qwen2vl: M-RoPE better than RoPE-1D on longer movies", new["RoPE-1D"], new["M-RoPE"], new["RoPE-1D"])]


# ------------------------------------------------------------------------------------------------------------------
# Your own data: a folder of images with a metadata.jsonl, the layout the ecosystem calls imagefolder
# ------------------------------------------------------------------------------------------------------------------

def words_only(text):
    """A text without the <image> and <video> that other data sets write into it: here pictures stand in front by themselves."""
    while (rest := re.sub("<image>|<video>", "", text)) != text:
        text = rest
    return text.strip()


def read_row(folder, line, fields):
    """One line of metadata.jsonl -> (PIL image, row). Raises ValueError saying what is wrong with it."""
    import clip
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError('not an object like {"file_name": "a.png", "text": "..."}')
    for field in ("file_name", *fields):
        text = row.get(field)
        if not isinstance(text, str) or not (words_only(text) if field == "answer" else text.strip()):
            raise ValueError(f"no {field}")
    return clip.load_image(folder / row["file_name"]), row


def read_folder(folder, fields):
    """All good rows of FOLDER/metadata.jsonl as [(PIL image, row)]. Bad rows are counted and named; the program ends
    (status 2) when the file is missing or no row is good. fields: what a row needs besides file_name."""
    path = Path(folder) / "metadata.jsonl"
    need = ", ".join(("file_name", *fields))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read {path} ({type(error).__name__}): --data wants a folder with a metadata.jsonl, a line with {need} per image")
    good, bad = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                good.append(read_row(Path(folder), line, fields))
            except (ValueError, OSError) as error:
                bad.append(f"line {number}: {' '.join(str(error).split())}")
    if not good:
        stop(f"{path} has no usable row ({bad[0] if bad else 'it is empty'}): each line needs {need}")
    say(f"{path}: {len(good)} rows" + (f", {len(bad)} left out" if bad else ""), *(f"  {reason}" for reason in bad[:10]))
    if len(bad) > 10:
        say(f"  and {len(bad) - 10} more")
    return good


def short_enough(folder, rows, tokens, context):
    """Those of [(PIL image, row)] that fit the context, tokens(image, row) being how many they take with their picture and all
    that is written around a text. The others are counted; the program ends (status 2) when none is left."""
    fits = [(image, row) for image, row in rows if tokens(image, row) <= context]
    if len(fits) < len(rows):
        say(f"{len(rows) - len(fits)} rows do not fit the context of {context} tokens and are left out")
    if not fits:
        stop(f"no row of {folder} is short enough: {context} tokens with its picture, and the toy vocabulary spells words it does not know")
    return fits


def own_batch(fits, seed, step, batch):
    """The rows of one step, drawn anew for each: the same again after an interruption."""
    return [rng.choice(fits) for rng in batch_rngs(seed, ("own", step), batch)]


def question_and_answer(row):
    """[(question, answer)] of a row, as words; a question of nothing but <image> asks for a description."""
    return [(words_only(row["question"]) or DESCRIBE, words_only(row["answer"]))]


def fingerprint(rows):
    """What own data is called in a cache key: a number that changes with any image or word."""
    return f"own {zlib.crc32(b''.join(image.tobytes() + json.dumps(row, sort_keys=True).encode() for image, row in rows))}"


def clip_own_data(args):
    """`python train_tiny.py clip --data FOLDER`. Every tenth row is kept for a test, if there are twenty or more."""
    rows = read_folder(args.data, ("text",))
    context = clip_config().text.context
    cut = sum(len(ids) > context for ids in text_rows([row["text"] for _, row in rows]))
    if cut:
        say(f"{cut} texts are longer than {context} tokens and are cut: the toy vocabulary spells words it does not know")
    held = rows[::10] if len(rows) >= 20 else []
    rest = [row for i, row in enumerate(rows) if i % 10] if held else rows
    batch = min(CLIP_BATCH, len(rest)) // WORLD_SIZE * WORLD_SIZE
    if batch < 2:
        stop(f"a contrastive loss needs at least two pairs in a batch to tell apart, {args.data} has {len(rest)}")

    def draw_batch(step):
        chosen = rng_for(args.seed, step).sample(rest, batch)[RANK * batch // WORLD_SIZE:(RANK + 1) * batch // WORLD_SIZE]
        return [image for image, _ in chosen], [row["text"] for _, row in chosen]

    model = train_clip(run_name("clip-own", args.seed, args.steps), args.seed, args.steps, batch, args.loss, args.device,
                       draw_batch=draw_batch, data=fingerprint(rows))
    report_own_retrieval(model, held or rest[:512], "kept back from training" if held else "trained on (too few to keep any back)")
    return []


@torch.no_grad()
def report_own_retrieval(model, rows, which):
    texts = [row["text"] for _, row in rows]
    image, text = clip_features(model, [image for image, _ in rows], texts)
    right = sum(texts[i] == texts[j] for i, j in enumerate((image @ text.T).argmax(1).tolist()))
    say(f"right text found for {right} of {len(rows)} images {which}; guessing finds about 1")


def vilt_own_data(args):
    """`python train_tiny.py vilt --data FOLDER`: rows with a text; images of any aspect ratio. Every tenth row is kept for
    a test, if there are twenty or more."""
    import vilt
    rows, config = read_folder(args.data, ("text",)), vilt.PRESETS["tiny"]
    cut = sum(len(vilt_ids(row["text"])) > config.context for _, row in rows)
    if cut:
        say(f"{cut} texts are longer than {config.context} tokens and are cut: the toy vocabulary spells words it does not know")
    held = rows[::10] if len(rows) >= 20 else []
    rest = [row for i, row in enumerate(rows) if i % 10] if held else rows
    batch = min(VILT_BATCH, len(rest))

    def draw_batch(step):
        rng = rng_for(args.seed, ("own", step))
        chosen = rng.sample(rest, batch)
        images, texts = [image for image, _ in chosen], [row["text"] for _, row in chosen]
        index, labels = vilt.swap_images(texts, rng)
        return (images, texts), ([images[i] for i in index], texts, labels)

    model = train_vilt(run_name("vilt-own", args.seed, args.steps), args.seed, args.steps, device=args.device,
                       draw_batch=draw_batch, batch=batch, data=fingerprint(rows))
    tested = held or rest[:512]
    images, texts = zip(*((image, row["text"]) for image, row in tested))
    wrong, labels = vilt.swap_images(texts, rng_for(args.seed, "own wrong"), probability=1.0)

    def believed(index):
        return sum(int(model.itm_logits(vilt_read(model, [images[i]], [text])[0]).argmax()) for i, text in zip(index, texts))

    which = "kept back from training" if held else "trained on (too few to keep any back)"
    say(f"{len(texts)} texts {which}: {believed(range(len(texts)))} are judged to belong to their own image")
    if not any(labels):
        say(f"and {believed(wrong)} to an image of another text; whoever guesses judges both alike")
    return []


def llava_own_data(args):
    """`python train_tiny.py llava --data FOLDER`: rows with question and answer too; stage 2 on them, from the toy LLaVA."""
    import llava
    rows, config = read_folder(args.data, ("question", "answer")), llava_config()
    fits = short_enough(args.data, rows, lambda _, row: len(llava.encode_conversation(question_and_answer(row), encode, config)[0]),
                        config.language.context)
    model = toy_llava(args.device)

    def draw_batch(step):
        chosen = own_batch(fits, args.seed, step, LLAVA_BATCH)
        return [image for image, _ in chosen], [question_and_answer(row) for _, row in chosen]

    llava_stage(model, 2, run_name("llava-own", args.seed, args.steps), args.steps or 100, args.seed,
                draw_batch=draw_batch, data=fingerprint(rows))
    return []


def blip2_own_data(args):
    """`python train_tiny.py blip2 --data FOLDER`: rows with a text; stage 2 on them, from the toy BLIP-2."""
    import blip2
    rows = read_folder(args.data, ("text",))
    config = blip2.PRESETS["tiny"]
    prompt = len(blip2_prompt(config))              # behind the text stands <eos>
    fits = short_enough(args.data, rows, lambda _, row: prompt + len(tokenizer().encode_ordinary(f" {row['text']}")) + 1, config.language.context)
    model = toy_blip2(args.device)

    def draw_batch(step):
        chosen = own_batch(fits, args.seed, step, BLIP2_BATCH)
        return [image for image, _ in chosen], [row["text"] for _, row in chosen]

    name = run_name("blip2-own", args.seed, args.steps)
    blip2_stage(model, 2, name, args.steps or 100, args.seed, draw_batch=draw_batch, data=fingerprint(rows))
    say(f"the trained model is in {RUNS / name}")
    return []


def flamingo_own_data(args):
    """`python train_tiny.py flamingo --data FOLDER`: rows with a text; the toy Flamingo learns them as captions."""
    import flamingo
    rows, context = read_folder(args.data, ("text",)), flamingo.PRESETS["tiny"].language.context
    fits = short_enough(args.data, rows, lambda _, row: 1 + len(tokenizer().encode_ordinary(f" {row['text']}")) + 1, context)
    model = toy_flamingo(args.device)               # <image> in front, <|endofchunk|> behind

    def draw_batch(step):
        chosen = own_batch(fits, args.seed, step, FLAMINGO_BATCH)
        return [[(image, f" {row['text']}")] for image, row in chosen]

    name = run_name("flamingo-own", args.seed, args.steps)
    train_flamingo(model, name, args.steps or 100, args.seed, draw_batch=draw_batch, data=fingerprint(rows))
    say(f"the trained model is in {RUNS / name}")
    return []


def cogvlm_own_data(args):
    """`python train_tiny.py cogvlm --data FOLDER`: rows with question and answer too; the experts on them, from the toy CogVLM."""
    import cogvlm
    rows, config = read_folder(args.data, ("question", "answer")), cogvlm.PRESETS["tiny"]
    ordinary = tokenizer().encode_ordinary
    fits = short_enough(args.data, rows, lambda _, row: len(cogvlm.conversation_row(question_and_answer(row), ordinary, config)[0]),
                        config.language.context)
    model = toy_cogvlm(args.device)

    def draw_batch(step):
        chosen = own_batch(fits, args.seed, step, COGVLM_BATCH)
        return [image for image, _ in chosen], [question_and_answer(row) for _, row in chosen]

    name = run_name("cogvlm-own", args.seed, args.steps)
    train_cogvlm(model, name, args.steps or 100, args.seed, draw_batch=draw_batch, data=fingerprint(rows))
    say(f"the trained model is in {RUNS / name}")
    return []


def qwen_own_data(args):
    """`python train_tiny.py qwen2vl --data FOLDER`: rows with question and answer, pictures of any size, from the toy Qwen2-VL."""
    import qwen2vl
    rows, config = read_folder(args.data, ("question", "answer")), qwen2vl.PRESETS["tiny"]

    def tokens(image, row):
        try:
            grid = torch.tensor([qwen2vl.image_grid(image.height, image.width, config.vision)])
        except ValueError as error:                 # longer than 200 : 1
            say(f"  {row['file_name']}: {error}")
            return math.inf
        return len(qwen2vl.encode_turn(*question_and_answer(row)[0], encode, config, grid)[0])

    fits = short_enough(args.data, rows, tokens, config.language.context)
    model, batch = toy_qwen(args.device), 8

    def draw_batch(step):
        chosen = own_batch(fits, args.seed, step, batch)
        return [(image, question_and_answer(row)) for image, row in chosen]

    name = run_name("qwen2vl-own", args.seed, args.steps)
    train_qwen(model, name, args.steps or 100, args.seed, ("own",) * batch, draw_batch=draw_batch, data=fingerprint(rows))
    say(f"the trained model is in {RUNS / name}")
    return []


# ------------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------------

RECIPES = {                                         # family: (level claims, ablations, own data)
    "clip": (clip_recipe, clip_ablations, clip_own_data),
    "vilt": (vilt_recipe, vilt_ablations, vilt_own_data),
    "flamingo": (flamingo_recipe, flamingo_ablations, flamingo_own_data),
    "cogvlm": (cogvlm_recipe, cogvlm_ablations, cogvlm_own_data),
    "blip2": (blip2_recipe, blip2_ablations, blip2_own_data),
    "llava": (llava_recipe, llava_ablations, llava_own_data),
    "qwen2vl": (qwen_recipe, qwen_ablations, qwen_own_data),
}


class CommandLine(argparse.ArgumentParser):
    """argparse, except that a mistake costs one line and exit status 2, not a page of usage."""

    def error(self, message):
        stop(f"{self.prog}: {' '.join(message.split())} (--help lists the options)")


def steps_number(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps, like 200")
    return int(text)


def command_line():
    parser = CommandLine(prog="train_tiny.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("world", "all", *RECIPES), metavar="WHAT",
                        help=f"world (a sheet of samples), all, or a family: {', '.join(RECIPES)}")
    parser.add_argument("--ablations", action="store_true", help='"a beats b" at three seeds and equal steps, in minutes')
    parser.add_argument("--data", metavar="FOLDER", help="train on your own images: FOLDER/metadata.jsonl")
    parser.add_argument("--loss", choices=("softmax", "sigmoid"), default="softmax", help="clip only: CLIP's or SigLIP's")
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
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        stop(f"device {args.device!r} is not available here; --device cpu always is")


def run_all(args):
    """All families, one after the other; the table for the README in runs/claims.md."""
    claims = [claim for recipes in RECIPES.values() for claim in recipes[int(args.ablations)](args)]
    table = RUNS / ("ablations.md" if args.ablations else "claims.md")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(f"Seed {args.seed}, {time.strftime('%Y-%m-%d')}\n\n{claims_table(claims)}\n")
    say(f"written: {table}")
    return claims


def forget(family):
    """--fresh: remove the checkpoints of one family, so that it is trained again."""
    for path in [*RUNS.glob(f"{family}/checkpoint.pt"), *RUNS.glob(f"{family}[-/]*/checkpoint.pt")]:
        path.unlink()


def main(argv=None):
    """Returns the exit status: 0, or 1 when a claim does not hold."""
    args = command_line().parse_args(argv)
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
            recipe, ablations, own_data = RECIPES[args.what]
            claims = (own_data if args.data else ablations if args.ablations else recipe)(args)
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
