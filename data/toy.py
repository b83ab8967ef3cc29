"""Draws the toy faces: small coloured drawings in the paper's eight expressions.

    python data/toy.py [--out data/toy] [--train 4000] [--val 1600] [--size 96] [--seed 0]

They stand in for photographs where none can be shipped: in the demo and in the README's pictures.
A face is an expression (brows, eyes, nose, mouth) worn by an identity (head, skin, hair, glasses,
beard) in a pose, under a light, before a background. Only the expression is the label. Everything
else is independent of it, so a net has to look at the face. What a picture shows depends on (seed,
split, number) alone. Needs Pillow; nothing here knows of simfle.py."""

import argparse
import math
import multiprocessing
import random
import signal
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

VERSION = 2  # one more where the same seed gives other pictures

# What each expression does to a face; 0 is at rest, + is up or wide. `brow`: the brows. `tilt`:
# their inner ends. `eye`: the lids. `curve`: corners of the mouth. `open`, `width`: the mouth.
# `sneer`: upper lip and nose. `side`: one corner of the mouth and one brow alone.
EXPRESSIONS = {
    "0_neutral": {},
    "1_happiness": dict(curve=1.0, open=0.35, width=0.35, eye=-0.25),
    "2_sadness": dict(curve=-0.8, tilt=0.9, eye=-0.3, width=-0.1),
    "3_surprise": dict(brow=1.0, eye=0.8, open=1.0, width=-0.55),
    "4_fear": dict(brow=0.7, tilt=0.7, eye=0.7, open=0.45, width=0.3, curve=-0.35),
    "5_disgust": dict(brow=-0.5, tilt=-0.3, eye=-0.5, sneer=1.0, curve=-0.4, open=0.2),
    "6_anger": dict(brow=-0.7, tilt=-1.0, eye=0.1, curve=-0.5, width=0.1),
    "7_contempt": dict(side=1.0, eye=-0.15),
}
CLASSES = tuple(EXPRESSIONS)
SKINS = ((255, 224, 196), (241, 194, 150), (224, 172, 120), (198, 134, 82), (141, 85, 46),
         (92, 56, 36))
HAIRS = ((30, 24, 22), (74, 46, 28), (130, 84, 40), (205, 164, 92), (150, 60, 30), (150, 150, 155),
         (90, 60, 140))


class Face:
    """A face in the making, drawn from back to front.

    The order of the random numbers decides what a seed looks like, so it has to stay."""
    def __init__(self, expression: str, rng: random.Random, scale: int):
        self.rng, self.scale, uniform = rng, scale, rng.uniform
        strength = uniform(0.75, 1.25)
        self.e = {k: strength * EXPRESSIONS[expression].get(k, 0.0) + rng.gauss(0, 0.08)
                  for k in ("brow", "tilt", "eye", "curve", "open", "width", "sneer", "side")}
        self.mirrored = rng.choice((-1, 1))  # which side of the face a contemptuous smile takes
        self.skin = skin = tuple(round(c * uniform(0.9, 1.08)) for c in rng.choice(SKINS))
        self.hair = tuple(round(c * uniform(0.8, 1.2)) for c in rng.choice(HAIRS))
        self.head_w, self.head_h = uniform(0.72, 0.82), uniform(0.92, 1.0)
        self.eye_x, self.eye_y = uniform(0.32, 0.38), uniform(-0.18, -0.10)
        self.eye_w = uniform(0.19, 0.24)
        self.brow_y, self.brow_thick = self.eye_y - uniform(0.26, 0.31), uniform(0.05, 0.09)
        self.mouth_y, self.mouth_w, self.nose_y = map(uniform, (.46, .32, .14), (.54, .40, .22))
        self.lips = rng.choice((shade(skin, 0.7), (190, 70, 80), (150, 60, 70), shade(skin, 0.8)))
        # Pose, distance and place differ as in the crops of a face detector: of aligned faces a
        # linear classifier of raw pixels would recognise too many.
        self.roll, self.yaw, self.pitch = rng.gauss(0, 0.15), rng.gauss(0, 0.25), rng.gauss(0, 0.10)
        self.zoom = scale * uniform(0.36, 0.62)
        self.cx, self.cy = scale * uniform(0.38, 0.62), scale * uniform(0.36, 0.60)
        self.image = background(rng, scale)
        self.draw, self.line = ImageDraw.Draw(self.image), round(self.zoom * 0.035)

    def at(self, x, y, depth=None):
        """Face coordinates (x right, y down, the head about -1..1) as pixels; without a depth the
        point lies on a ball that turns with the head."""
        z = math.sqrt(max(0.0, 1.0 - x * x - y * y)) if depth is None else depth
        x = x * math.cos(self.yaw) + z * math.sin(self.yaw) * 0.6
        y = y * math.cos(self.pitch) + z * math.sin(self.pitch)
        return (self.cx + self.zoom * (x * math.cos(self.roll) - y * math.sin(self.roll)),
                self.cy + self.zoom * (x * math.sin(self.roll) + y * math.cos(self.roll)))

    def oval(self, x, y, w, h, depth=None, first=0, last=360, steps=32):
        """An ellipse around (x, y), or its arc between two angles, as points in pixels."""
        angles = [math.radians(first + (last - first) * i / steps) for i in range(steps + 1)]
        return [self.at(x + w * math.cos(a), y + h * math.sin(a), depth) for a in angles]

    def draw_head(self) -> None:
        """What is behind the head, then the head, then hair, a cap or a beard on it."""
        at, oval, draw, rng = self.at, self.oval, self.draw, self.rng
        skin, hair, head_w, head_h = self.skin, self.hair, self.head_w, self.head_h
        hairstyle = rng.choice(("short", "long", "bald", "fringe", "cap"))
        if hairstyle in ("long", "fringe"):
            draw.polygon(oval(0, 0.15, head_w * 1.25, head_h * 1.15, 0), fill=hair)
        draw.polygon([at(-0.3, 0.6, 0), at(0.3, 0.6, 0), at(0.34, 1.5, 0), at(-0.34, 1.5, 0)],
                     fill=shade(skin, 0.8))
        draw.polygon(oval(0, 1.85, 1.15, 0.62, 0), fill=random_colour(rng))
        for side in (-1, 1):
            draw.polygon(oval(side * head_w, 0.0, 0.12, 0.2, 0), fill=shade(skin, 0.88))
        draw.polygon(oval(0, 0, head_w, head_h, 0), fill=skin)
        if hairstyle != "bald":
            top = random_colour(rng) if hairstyle == "cap" else hair
            low = {"short": -0.55, "long": -0.6, "fringe": -0.4, "cap": -0.45}[hairstyle]
            arc = oval(0, 0, head_w * 1.06, head_h * 1.06, 0, 205, 335, 24)
            parting = at(0.1 * rng.choice((-1, 1)), low - 0.12, 0)
            draw.polygon([*arc, at(head_w * 0.8, low, 0), parting, at(-head_w * 0.8, low, 0)], top)
        if rng.random() < 0.1:  # a beard, a moustache or stubble, under the mouth drawn over it
            draw.polygon(oval(0, 0.45, head_w * 0.62, head_h * 0.5, None, 0, 180),
                         fill=mix(skin, hair, rng.uniform(0.3, 0.9)))

    def draw_eyes(self) -> None:
        """Eyes that look somewhere, their lids, and the brows."""
        at, oval, draw, rng, e = self.at, self.oval, self.draw, self.rng, self.e
        eye_x, eye_y, eye_w = self.eye_x, self.eye_y, self.eye_w
        iris = rng.choice(((70, 45, 25), (60, 100, 160), (70, 120, 70), (40, 30, 25)))
        gaze_x, gaze_y = rng.uniform(-0.3, 0.3) * eye_w, rng.uniform(-0.15, 0.15) * eye_w
        h = max(0.02, eye_w * (0.52 + 0.42 * e["eye"] - 0.1 * e["sneer"]))
        r = min(eye_w * 0.5, h * 0.95)
        brow, thick = mix(self.hair, (20, 15, 10), 0.4), max(2, round(self.zoom * self.brow_thick))
        for side in (-1, 1):
            x, y = side * eye_x + gaze_x, eye_y + gaze_y * h / eye_w
            draw.polygon(oval(side * eye_x, eye_y, eye_w, h), fill=(245, 243, 238))
            draw.polygon(oval(x, y, r, r), fill=iris)
            draw.polygon(oval(x, y, r / 2, r / 2), fill=(10, 10, 10))
            draw.line(oval(side * eye_x, eye_y, eye_w * 1.05, h, None, 180, 360),
                      fill=shade(self.skin, 0.35), width=self.line)
            alone = e["side"] if side == self.mirrored else 0.0
            y = self.brow_y - 0.13 * e["brow"] - 0.16 * alone + 0.04 * e["sneer"]
            inner = at(side * (eye_x - eye_w * 1.05), y - 0.13 * e["tilt"])
            outer = at(side * (eye_x + eye_w * 1.15), y + 0.09 * e["tilt"] + 0.01)
            draw.line([inner, at(side * eye_x, y - 0.04), outer], brow, thick, joint="curve")

    def draw_nose_and_mouth(self) -> None:
        """The nose, the folds beside it that a sneer or a smile deepens, the lips, the teeth."""
        at, draw, e, skin, line = self.at, self.draw, self.e, self.skin, self.line
        tip = self.nose_y - 0.05 * e["sneer"]
        draw.line([at(-0.03, self.eye_y + 0.05), at(-0.09, tip), at(0.07, tip + 0.01)],
                  fill=shade(skin, 0.65), width=line, joint="curve")
        fold = max(e["sneer"], 0.6 * e["curve"], 0.0)
        for side in (-1, 1):
            draw.line([at(side * 0.12, tip - 0.06), at(side * 0.26, tip + 0.14)], width=line,
                      fill=mix(skin, shade(skin, 0.55), min(1.0, fold)))
        if e["sneer"] > 0.4:
            for y in (self.eye_y, self.eye_y + 0.06):
                draw.line([at(-0.07, y), at(0.07, y)], fill=shade(skin, 0.6), width=line)
        # The mouth: a middle line that bends, opened by lips that move apart.
        mouth_y, w = self.mouth_y, self.mouth_w * (1 + 0.45 * e["width"])
        gape = max(0.0, e["open"]) * 0.26
        upper, lower = [], []
        for i in range(25):
            t = -1 + i / 12
            bend = -0.24 * e["curve"] * (t * t - 0.4)
            bend -= 0.28 * e["side"] * max(0.0, t * self.mirrored) ** 2
            lift = 0.09 * max(0.0, e["sneer"]) * (1 - t * t)
            upper.append(at(t * w, mouth_y + bend - gape * 0.6 * (1 - t * t) - lift))
            lower.append(at(t * w, mouth_y + bend + gape * 1.1 * (1 - t * t) + 0.012))
        draw.polygon(upper + lower[::-1], fill=(90, 25, 30))
        if gape + 0.06 * max(0.0, e["sneer"]) > 0.03:  # teeth, under the upper lip
            teeth = [(x0 * 0.65 + x1 * 0.35, y0 * 0.65 + y1 * 0.35)
                     for (x0, y0), (x1, y1) in zip(upper, lower)]
            draw.polygon(upper[3:-3] + teeth[3:-3][::-1], fill=(240, 238, 230))
        thick = round(self.zoom * self.rng.uniform(0.03, 0.055))
        draw.line(upper, fill=self.lips, width=thick, joint="curve")
        draw.line(lower, fill=self.lips, width=thick, joint="curve")

    def draw_things(self) -> None:
        """Now and then glasses, and something in front of the picture: a hand, a microphone."""
        at, draw, rng, scale, line = self.at, self.draw, self.rng, self.scale, self.line
        if rng.random() < 0.15:
            x, y, w, frame = self.eye_x, self.eye_y, self.eye_w * 1.4, random_colour(rng)
            for side in (-1, 1):
                draw.line(self.oval(side * x, y, w, self.eye_w * 1.15), fill=frame, width=line)
            draw.line([at(-x + w, y), at(x - w, y)], fill=frame, width=line)
        if rng.random() < 0.05:
            angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.45, 0.6) * scale
            x, y = self.cx + far * math.cos(angle), self.cy + far * math.sin(angle)
            r = scale * rng.uniform(0.1, 0.2)
            draw.ellipse([x - r, y - r, x + r, y + r], fill=random_colour(rng))


def draw_face(expression: str, rng: random.Random, size: int = 96) -> Image.Image:
    """One face of class `expression` (a key of EXPRESSIONS), RGB, size x size pixels."""
    face = Face(expression, rng, 3 * size)  # three times too large, then shrunk: smooth edges
    for draw in (face.draw_head, face.draw_eyes, face.draw_nose_and_mouth, face.draw_things):
        draw()
    return light(face.image.resize((size, size), Image.Resampling.BOX), rng)


def background(rng: random.Random, scale: int) -> Image.Image:
    """Two colours that run into each other, and at times a shape."""
    one, two = (Image.new("RGB", (scale, scale), random_colour(rng)) for _ in range(2))
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((scale, scale))
    image = Image.composite(one, two, ramp)
    draw = ImageDraw.Draw(image)
    if rng.randint(0, 1):
        x, y = rng.uniform(-0.1, 0.9) * scale, rng.uniform(-0.1, 0.9) * scale
        box = [x, y, x + rng.uniform(0.1, 0.5) * scale, y + rng.uniform(0.1, 0.5) * scale]
        rng.choice((draw.rectangle, draw.ellipse))(box, fill=random_colour(rng))
    return image


def light(image: Image.Image, rng: random.Random) -> Image.Image:
    """A lamp from one side, its colour and strength, and the grain of the film."""
    turned = Image.linear_gradient("L").rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
    dark = rng.uniform(0.6, 1.0)  # how much of the light reaches the far side
    ramp = turned.crop((40, 40, 216, 216)).resize(image.size)
    ramp = ramp.point([round(255 * (dark + (1 - dark) * v / 255)) for v in range(256)])
    image = ImageChops.multiply(image, Image.merge("RGB", (ramp,) * 3))
    gain = rng.uniform(0.75, 1.2)
    gains = [gain * rng.uniform(0.9, 1.1) for _ in range(3)]
    image = image.point([min(255, round(v * g)) for g in gains for v in range(256)])
    grain = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height))
    return Image.blend(image, Image.merge("RGB", (grain,) * 3), rng.uniform(0.0, 0.1))


def random_colour(rng: random.Random) -> tuple[int, int, int]:
    """Any colour that is neither black nor white."""
    return tuple(rng.randint(20, 245) for _ in range(3))


def shade(colour, factor):
    """A colour made darker by a factor below 1."""
    return tuple(round(c * factor) for c in colour)


def mix(one, two, share):
    """`one` where share is 0, `two` where it is 1."""
    return tuple(round(a + (b - a) * share) for a, b in zip(one, two))


def draw_file(job: tuple[Path, str, int]) -> None:
    """Draws one file of a dataset; it appears whole or not at all."""
    path, seed, size = job
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    draw_face(path.parent.name, random.Random(seed), size).save(part, "PNG")
    part.replace(path)


def draw_dataset(out="data/toy", train=4000, val=1600, size=96, seed=0) -> None:
    """Draws what is missing of out/{train,val}/<k_class>/<number>.png, the classes in turn. Raises
    OSError where other pictures are there: none is ever removed."""
    told = Path(out, "drawn.txt")
    wanted = f"{train} + {val} faces, {size} pixels, seed {seed}, version {VERSION}\n"
    if not told.exists() or told.read_text() != wanted:
        if any(Path(out).glob("*/*/*")):
            raise OSError(f"{out} holds other pictures: give another --out, or remove that folder")
        told.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(wanted)
    jobs = [(path, f"{seed}/{split}/{i}", size)
            for split, count in (("train", train), ("val", val)) for i in range(count)
            if not (path := Path(out, split, CLASSES[i % 8], f"{i:05d}.png")).exists()]
    if not jobs:
        return
    ignore = signal.SIGINT, signal.SIG_IGN  # Ctrl-C: this process ends the others
    with multiprocessing.get_context("spawn").Pool(None, signal.signal, ignore) as pool:
        for done, _ in enumerate(pool.imap_unordered(draw_file, jobs, 50), 1):
            if done % 500 == 0 or done == len(jobs):
                print(f"toy faces in {out}: {done} of {len(jobs)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws the toy faces.")
    for name, default, what in (("train", 4000, "faces to train on"), ("val", 1600, "to test on"),
                                ("size", 96, "pixels a side"), ("seed", 0, "of the faces")):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--out", default=str(Path(__file__).parent / "toy"), help="folder")
    try:
        draw_dataset(**vars(parser.parse_args()))
    except OSError as error:
        parser.error(f"{error}")
