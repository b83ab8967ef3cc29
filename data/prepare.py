"""Turns a dataset as its owners ship it into folders that train.

    python data/prepare.py affectnet --src DOWNLOAD [--out data/affectnet] [--size 256]
    python data/prepare.py rafdb     --src DOWNLOAD
    python data/prepare.py ferplus   --src DOWNLOAD
    python data/prepare.py sfew      --src DOWNLOAD

DOWNLOAD is a folder in which the unpacked archives lie, at any depth. What comes out is

    data/NAME/{train,val}/{0_neutral,1_happiness,...}/PICTURE    val is what the paper tests on
    data/NAME/stats.json                                         counts, channel means, deviations

with one naming of classes for all datasets, so that a classifier moves between them. Pictures are
encoded anew only where they must be cropped, drawn or shrunk; the others are hard links (copies
where links do not work). Stopped at any moment, the same command goes on: every picture is written
whole or not at all, and what is there is not made again. data/README.md says where to ask for each
dataset and what its archives look like.

Needs Pillow, and numpy for AffectNet's .npy labels. Nothing here knows of simfle.py or torch.
"""

import argparse
import contextlib
import csv
import filecmp
import io
import json
import os
import re
import shlex
import shutil
import sys
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from PIL import Image, ImageStat

CLASSES = ("0_neutral", "1_happiness", "2_sadness", "3_surprise",
           "4_fear", "5_disgust", "6_anger", "7_contempt")
SPLITS = ("train", "valid", "val")  # valid: FERPlus's second one, which the paper does not use

# Table 5: pictures of every class, to train on and to test on.
PAPER = {
    "affectnet": {"train": (74_874, 134_415, 25_459, 14_090, 6_378, 3_803, 24_882, 3_750),
                  "val": (500,) * 8},
    "rafdb": {"train": (2_524, 4_772, 1_982, 1_290, 281, 717, 705),
              "val": (680, 1_185, 478, 329, 74, 160, 162)},
    "ferplus": {"train": (8_733, 7_284, 3_022, 3_136, 536, 116, 2_098, 120),
                "val": (1_083, 892, 382, 394, 86, 16, 269, 15)},
    "sfew": {"train": (144, 184, 161, 94, 78, 52, 178), "val": (84, 72, 73, 56, 46, 23, 77)},
}
PAPER["affectnet7"] = {split: counts[:7] for split, counts in PAPER["affectnet"].items()}

ARCHIVES = {".zip": "unzip -o {0} -d {1}", ".tar": "tar -xf {0} -C {1}",
            ".tgz": "tar -xf {0} -C {1}", ".tar.gz": "tar -xf {0} -C {1}", ".gz": "gunzip -k {0}",
            ".rar": "unrar x {0} {1}/", ".7z": "7z x -o{1} {0}", ".001": "7z x -o{1} {0}"}


class Problem(Exception):
    """Something a user can mend. Its text is one sentence: what, where, what to do."""


# ===== What is there =====


class Tree:
    """The files below a folder, but for hidden ones, Thumbs.db, __MACOSX and what this made.

    folders: path -> the names of its files, both in a fixed order; each folder once, by whatever
    links it can be reached. Raises Problem.
    """

    def __init__(self, src: Path):
        if not src.is_dir():
            raise Problem(f"{src} is no folder; give --src the one that holds the download.")
        self.src, self.folders, seen = src, {}, set()

        def unreadable(error: OSError):
            raise Problem(f"{error.filename} cannot be read ({error.strerror}); mend that, or give "
                          f"--src another folder.")

        for parent, folders, names in os.walk(src, followlinks=True, onerror=unreadable):
            place = os.stat(parent)
            if (place.st_dev, place.st_ino) in seen or JOURNAL in names:
                folders.clear()
                continue
            seen.add((place.st_dev, place.st_ino))
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
            self.folders[Path(parent)] = sorted(
                n for n in names if not n.startswith(".") and n.lower() != "thumbs.db")

    def below(self, folder: Path) -> list[str]:
        """A folder's names from --src's own down to it, in lower case, the last first."""
        names = (self.src.resolve().name, *folder.relative_to(self.src).parts)
        return [n.lower() for n in reversed(names)]

    def named(self, *wanted: str, beside: str = "") -> list[Path]:
        """Files of these names, in any case; with `beside`, only in folders of that name."""
        return [folder / n for folder, names in self.folders.items() for n in names
                if n.lower() in wanted and beside.lower() in ("", folder.name.lower())]

    def one(self, *wanted: str, beside: str = "") -> Path | None:
        """The file of such a name. Copies are one; Raises Problem where two differ."""
        found = self.named(*wanted, beside=beside)
        for other in found[1:]:
            if other.read_bytes() != found[0].read_bytes():
                raise Problem(f"{found[0]} and {other} differ, and both could be meant; give --src "
                              f"a folder that holds only one of them.")
        return found[0] if found else None

    def pictures(self) -> dict[tuple[str, str], Path]:
        """(folder's name, file's name) -> path; of copies, the first."""
        found = {}
        for folder, names in self.folders.items():
            for n in names:
                found.setdefault((folder.name, n), folder / n)
        return found

    def packed(self) -> str:
        """Archives that still wait to be unpacked, each with its command, in words; "" if none."""
        orders = []
        for folder, names in self.folders.items():
            for n in names:
                kind = next((k for k in (".tar.gz", Path(n).suffix.lower())
                             if k in ARCHIVES and n.lower().endswith(k)), None)
                later_part = re.search(r"part0*([2-9]|[1-9]\d+)\.rar$", n.lower())
                if kind and not later_part:
                    orders.append(ARCHIVES[kind].format(shlex.quote(str(folder / n)),
                                                        shlex.quote(str(folder))))
        more = f"; and {len(orders) - 6} more" if len(orders) > 6 else ""
        text = f"there are archives; if still packed: {'; '.join(orders[:6])}{more}"
        return text if orders else ""

    def missing(self, wanted: str) -> Problem:
        """What was looked for, and what was found instead."""
        top = [f"{f.relative_to(self.src)}/" for f in self.folders if f.parent == self.src]
        top += self.folders[self.src]
        there = f"what is there is {', '.join(top[:8])}" if top else "it is empty"
        there += f" and {len(top) - 8} more" if len(top) > 8 else ""
        return Problem(f"{self.src} was searched for {wanted} and has none; {there}"
                       + (f"; {self.packed()}" if self.packed() else "") + ".")


@dataclass(frozen=True)
class Picture:
    """One picture to be: its place, and what it is made from."""

    split: str
    label: int
    name: str  # of its file
    source: Path | None  # None: drawn from `grey`
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom; None: all of it
    grey: bytes | None = None  # 48 × 48

    @property
    def place(self) -> str:
        return f"{self.split}/{CLASSES[self.label]}/{self.name}"

    def origin(self, src: Path) -> str | None:
        """What it is made from, in short; None where that is no longer there."""
        if self.grey:
            return f"{zlib.crc32(self.grey):08x}"
        try:
            return f"{self.source.relative_to(src)} {self.source.stat().st_size} {self.box}"
        except OSError:
            return None


class Plan:
    """What is to be made, and what of the download is left out, by reason."""

    def __init__(self):
        self.pictures, self.found, self.skipped = [], Counter(), Counter()
        self.names, self.rows = {}, set()

    def skip(self, split: str, label: int | None, reason: str) -> None:
        """Leaves one out: of a class, or with None of none."""
        self.skipped[split, label, reason] += 1
        self.found[split, label] += label is not None

    def add(self, split: str, label: int, source: Path | None, name: str = "", **how) -> None:
        """Takes one in. Another picture of the same name in a class gets a number behind it; the
        same once more, or a copy of it, is skipped."""
        name, row = name or source.name, (split, label, source, how.get("box"))
        if source and row in self.rows:
            return self.skip(split, label, "repeated")
        self.rows.add(row)
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in Image.registered_extensions():
            suffix = ".jpg"
        name, number = stem + suffix, 1
        while (key := (split, label, name.lower())) in self.names:  # some disks know just one case
            other, box = self.names[key]
            if source and box == how.get("box") and filecmp.cmp(source, other, shallow=False):
                return self.skip(split, label, "repeated")
            number += 1
            name = f"{stem}-{number}{suffix}"
        self.names[key] = source, how.get("box")
        self.found[split, label] += 1
        self.pictures.append(Picture(split, label, name, source, **how))


def integer(text) -> int | None:
    try:
        return int(text)
    except (TypeError, ValueError):
        return None


def read_rows(path: Path, columns: tuple[str, ...], number: int, needed: tuple[str, ...] = ()):
    """The rows of a CSV file as dicts, with or without a header. Raises Problem.

    columns: its columns in their usual order. number: the one that holds an integer in every row,
    so that a first row without one is a header; blanks, case and a leading # in it do not count.
    needed: those that a header must have, all unless told.
    """
    needed, first = {c.lower() for c in needed or columns}, True
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            for row in filter(None, csv.reader(file)):
                if first and (len(row) <= number or integer(row[number]) is None):
                    header = [cell.strip().lstrip("#").strip().lower() for cell in row]
                    if needed <= set(header):
                        order = {c.lower(): c for c in columns}
                        columns = tuple(order.get(cell, cell) for cell in header)
                    elif len(needed & set(header)) > 1:
                        raise Problem(f"{path} has no column {', '.join(needed - set(header))}; "
                                      f"get it as its owners ship it.")
                else:
                    yield dict(zip(columns, (cell.strip() for cell in row)))
                first = False
    except (csv.Error, OSError) as error:
        raise Problem(f"{path} cannot be read as CSV ({error}); download it again.") from None


# ===== AffectNet =====


def affectnet(tree: Tree, plan: Plan) -> str:
    """Whichever of the three distributions is there. Returns its name. Raises Problem."""
    plus = [f for f in tree.folders if "no_human_annotated" not in tree.below(f)
            and f.name == "annotations" and any(n.endswith(".json") for n in tree.folders[f])]
    npy = [f for f in tree.folders if any(n.endswith("_exp.npy") for n in tree.folders[f])]
    lists = tree.named("training.csv") + tree.named("validation.csv")
    if bool(plus) + bool(npy) + bool(lists) > 1:
        places = [str(found[0]) for found in (lists, npy, plus) if found]
        raise Problem(f"{tree.src} holds AffectNet in more than one distribution "
                      f"({' and '.join(places)}); give --src the folder of one.")
    if lists:
        affectnet_lists(tree, plan)
        return "AffectNet, CSV lists"
    if npy:
        affectnet_files(tree, plan, npy, "_exp.npy", npy_label())
        return "AffectNet, npy files"
    if plus:
        affectnet_files(tree, plan, plus, ".json",
                        lambda path: json.loads(path.read_bytes())["human-label"])
        return "AffectNet+"
    raise tree.missing("AffectNet's training.csv and validation.csv, or *_exp.npy files, or "
                       "human_annotated/*/annotations/*.json")


def affectnet_lists(tree: Tree, plan: Plan) -> None:
    """The original distribution: CSV lists, whole photographs, and a box for each face."""
    columns = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
               "facial_landmarks", "expression", "valence", "arousal")
    pictures = tree.pictures()
    for split, name in (("train", "training.csv"), ("val", "validation.csv")):
        path = tree.one(name)
        if path is None:
            raise tree.missing(f"AffectNet's {name}")
        for row in read_rows(path, columns, 6, needed=columns[:5] + columns[6:7]):
            label = integer(row.get("expression"))
            if not in_classes(plan, split, label):
                continue
            x, y, w, h = box = [integer(row.get(c)) for c in columns[1:5]]
            file = PurePosixPath(row.get(columns[0], "").lstrip("#").strip().replace("\\", "/"))
            source = pictures.get((file.parent.name, file.name))
            if None in box:
                plan.skip(split, label, "box is no integer")
            elif w <= 0 or h <= 0:
                plan.skip(split, label, "box without size")
            elif source is None:
                plan.skip(split, label, "file missing")
            else:
                plan.add(split, label, source, box=(x, y, x + w, y + h))


def in_classes(plan: Plan, split: str, label: int | None) -> bool:
    """Whether AffectNet's label is one of the eight; counts it among the skipped otherwise."""
    if label in range(8):
        return True
    plan.skip(split, None, "no label" if label is None else "labelled none, uncertain or no face")
    return False


def npy_label():
    """A function from a .npy file to the one value in it. Raises Problem where numpy is missing."""
    try:
        import numpy
    except ImportError:
        raise Problem("AffectNet's .npy labels need numpy, which is missing; install it with "
                      "`pip install numpy`.") from None
    return lambda path: numpy.load(path, allow_pickle=False).reshape(()).astype(str).item()


def affectnet_files(tree: Tree, plan: Plan, folders: list[Path], ending: str, label_of) -> None:
    """A label file for each picture: annotations/<id><ending> beside images/<id>.jpg.

    The two folders are never zipped together: a file that one of them lacks would shift the rest.
    """
    names = {"train_set": "train", "val_set": "val", "valid_set": "val", "validation_set": "val"}
    todo = [(folder, n) for folder in folders for n in tree.folders[folder] if n.endswith(ending)]
    images = {folder: {os.path.splitext(n)[0]: n for n in tree.folders.get(
        folder.parent / "images", ())} for folder in folders}
    for folder, n in progress(todo, len(todo), "labels"):
        parts = [p for p in tree.below(folder) if p in names]
        if not parts:
            raise Problem(f"{folder} lies below neither train_set nor val_set, so its pictures' "
                          f"split is unknown; name its folder so.")
        split, stem = names[parts[0]], n.removesuffix(ending)
        try:
            value = float(label_of(folder / n))
            label = int(value) if value == int(value) else None
        except Exception:  # numpy and json raise many kinds for broken files
            label = None
        if not in_classes(plan, split, label):
            continue
        if stem not in images[folder]:
            plan.skip(split, label, "file missing")
        else:
            plan.add(split, label, folder.parent / "images" / images[folder][stem])


# ===== RAF-DB =====


def rafdb(tree: Tree, plan: Plan) -> str:
    """The basic set: a list of labels, aligned faces. Returns its name. Raises Problem."""
    ours = {1: 3, 2: 4, 3: 5, 4: 1, 5: 2, 6: 6, 7: 0}
    for folder in [f for f in tree.folders if "compound" in "/".join(tree.below(f))]:
        del tree.folders[folder]  # RAF-DB's other half has lists and pictures of like names
    path = tree.one("list_patition_label.txt", "list_partition_label.txt")  # the first is theirs
    if path is None:
        raise tree.missing("RAF-DB's basic/EmoLabel/list_patition_label.txt")
    aligned = {}
    for (_, name), source in tree.pictures().items():
        if "_aligned." in name:
            aligned.setdefault(name.rsplit("_aligned", 1)[0], source)
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        name, label = (line.split() + ["", ""])[:2]
        stem, label = os.path.splitext(name)[0], ours.get(integer(label))
        split = "train" if stem.startswith("train") else "val"
        if not name:
            continue
        if not stem.startswith(("train", "test")) or label is None:
            plan.skip(split, None, "line that is no `train_00001.jpg 5`")
        elif stem not in aligned:
            plan.skip(split, label, "file missing")
        else:
            plan.add(split, label, aligned[stem])
    return "RAF-DB, basic, aligned"


# ===== FERPlus =====

FERPLUS_FOLDERS = {"FER2013Train": "train", "FER2013Valid": "valid", "FER2013Test": "val"}
FERPLUS_USAGES = {"Training": "train", "PublicTest": "valid", "PrivateTest": "val"}
# The order of the votes: neutral, happiness, surprise, sadness, anger, disgust, fear, contempt;
# behind them "unknown" and "not a face".
FERPLUS_ORDER = (0, 1, 3, 2, 6, 5, 4, 7)


def majority(votes: list[int]) -> tuple[int | None, str]:
    """The label that ten votes give, or None and why there is none. (Table 5)

    A class with a single vote gets none. Of what is left, "unknown" and "not a face" included, one
    of the eight classes needs more than half. This rule, over label.csv, gives the paper's counts;
    over fer2013new.csv, which has other votes, it does not.
    """
    votes = [v if v > 1 else 0 for v in votes]
    most = max(votes)
    if 2 * most <= sum(votes):
        return None, "no majority"
    winner = votes.index(most)
    return (FERPLUS_ORDER[winner], "") if winner < 8 else (None, "majority for unknown or no face")


def ferplus(tree: Tree, plan: Plan) -> str:
    """Pixels in a CSV file, or drawn pictures; votes in label.csv. Raises Problem."""
    votes = {}
    for folder, split in FERPLUS_FOLDERS.items():
        path = tree.one("label.csv", beside=folder)
        if path is None:
            raise tree.missing(f"FERPlus's {folder}/label.csv")
        columns = ("name", "box", *map(str, range(10)))
        for row in read_rows(path, columns, number=2):
            numbers = [integer(row.get(str(i))) for i in range(10)]
            if None in numbers:
                plan.skip(split, None, "votes that are no integers")
            elif (split, row["name"]) in votes:
                plan.skip(split, None, "repeated")
            else:
                votes[split, row["name"]] = majority(numbers)
    pixels = tree.one("fer2013.csv") or tree.one("icml_face_data.csv")
    pictures = {(FERPLUS_FOLDERS[folder], name): path for (folder, name), path
                in tree.pictures().items() if folder in FERPLUS_FOLDERS and name.endswith(".png")}
    if pixels is None and not pictures:
        if any(f.name.lower() in ("angry", "happy") for f in tree.folders):
            raise Problem(f"{tree.src} holds FER2013 as folders of pictures, which have lost their "
                          f"row numbers, so no vote can be matched to them; get fer2013.csv or "
                          f"icml_face_data.csv.")
        raise tree.missing("fer2013.csv, icml_face_data.csv or FER2013Train/fer*.png")
    drawn = ferplus_rows(tree, plan, pixels) if pixels else {}
    for (split, name), (label, reason) in votes.items():
        if label is None:
            plan.skip(split, None, reason)
        elif pixels is None and (split, name) in pictures:
            plan.add(split, label, pictures[split, name])
        elif isinstance(drawn.get((split, name)), bytes):
            plan.add(split, label, None, name, grey=drawn[split, name])
        else:
            plan.skip(split, label, drawn.get((split, name), "file missing"))
    return "FERPlus, pixels from CSV" if pixels else "FERPlus, drawn pictures"


def ferplus_rows(tree: Tree, plan: Plan, pixels: Path) -> dict[tuple[str, str], bytes | str]:
    """(split, name) -> 48 × 48 pixels, or why there are none. Raises Problem.

    A name's number is not its row: row i of the pixels belongs to row i of fer2013new.csv, which
    has the name. Four names stand twice; the row nearest to the number is the right one.
    """
    path = tree.one("fer2013new.csv")
    if path is None:
        raise tree.missing("FERPlus's fer2013new.csv, which tells the pixels' names")
    order = (("emotion", "Usage", "pixels") if pixels.name.lower().startswith("icml")
             else ("emotion", "pixels", "Usage"))
    names = [(row.get("Usage"), row.get("Image name"))
             for row in read_rows(path, ("Usage", "Image name", "neutral"), number=2)]
    nearest = {}
    for i, (_, name) in enumerate(names):
        number = integer((name or "")[3:10])
        if number is not None and (name not in nearest
                                   or abs(i - number) < abs(nearest[name] - number)):
            nearest[name] = i
    found, i = {}, -1
    for i, row in enumerate(progress(read_rows(pixels, order, number=0), len(names), "rows")):
        usage, name = names[i] if i < len(names) else (None, None)
        if row.get("Usage") != usage:
            raise Problem(f"row {i + 1} of {pixels} is {row.get('Usage')}, but {usage} in {path}: "
                          f"these two do not belong together; download both again.")
        split = FERPLUS_USAGES.get(usage)
        if not name:
            plan.skip(split, None, "row without a name")
        elif nearest.get(name) != i:
            plan.skip(split, None, "repeated name")
        else:
            try:
                grey = bytes(map(int, row["pixels"].split()))
            except (KeyError, ValueError):
                grey = b""
            found[split, name] = grey if len(grey) == 48 * 48 else "pixels are not 48 × 48 numbers"
    if i + 1 != len(names):
        raise Problem(f"{pixels} has {i + 1:,} rows and {path} {len(names):,}: these two do not "
                      f"belong together; download both again.")
    return found


# ===== SFEW =====


def sfew(tree: Tree, plan: Plan) -> str:
    """Aligned faces in folders by emotion. Returns its name. Raises Problem."""
    ours = {"neutral": 0, "happy": 1, "sad": 2, "surprise": 3, "fear": 4, "disgust": 5, "angry": 6}
    for split, name in (("train", "train_aligned_faces"), ("val", "val_aligned_faces")):
        folders = [f for f in tree.folders if f.name.lower() in ours
                   and any(p.startswith(name) for p in tree.below(f))]
        if not folders:
            raise tree.missing(f"SFEW's {split.title()}_Aligned_Faces/Angry and so on")
        readable = Image.registered_extensions()
        for folder in folders:
            for n in tree.folders[folder]:
                if os.path.splitext(n)[1].lower() in readable:
                    plan.add(split, ours[folder.name.lower()], folder / n)
    return "SFEW 2.0, aligned"


DATASETS = {"affectnet": affectnet, "rafdb": rafdb, "ferplus": ferplus, "sfew": sfew}


# ===== Making the pictures =====


def progress(items, total: int, what: str):
    """Passes items on, and tells how many, how fast, and how much longer."""
    terminal, start = sys.stdout.isatty(), time.perf_counter()
    last, count = start, 0
    for count, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - last >= (0.5 if terminal else 5.0) or count == total:
            last, rate = now, count / max(now - start, 1e-9)
            left = round((total - count) / rate)
            print(("\r\033[K" if terminal else "") + f"{what} {count:,}/{total:,}  {rate:,.0f}/s  "
                  f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}",
                  end="" if terminal else "\n", flush=True)
    if terminal and count:
        print()


def as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits; Pillow would cut 65,535 off at 255
        picture = picture.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    return picture.convert("RGB")


def moments(picture: Image.Image) -> list[float]:
    """The means of its three channels and of their squares, in units of full brightness."""
    stat = ImageStat.Stat(as_rgb(picture))
    means = [v / n / 255 for v, n in zip(stat.sum, stat.count)]
    return means + [v / n / 255**2 for v, n in zip(stat.sum2, stat.count)]


def make(picture: Picture, target: Path, size: int) -> list[float] | str:
    """Makes one picture, if it is not there. Returns its moments, or why it cannot be made.

    size: the short side at most, in pixels; 0 keeps all. Raises Problem where writing fails.
    """
    content = None
    try:
        if target.exists():
            with contextlib.suppress(Exception), Image.open(target) as there:
                return moments(there)
            target.unlink()  # damaged
        if picture.grey:
            content = encoded(Image.frombytes("L", (48, 48), picture.grey).convert("RGB"), target)
        else:
            with Image.open(picture.source) as whole:
                whole.load()
                left, top, right, bottom = picture.box or (0, 0, *whole.size)
                box = (max(left, 0), max(top, 0), min(right, whole.width),
                       min(bottom, whole.height))
                w, h = box[2] - box[0], box[3] - box[1]
                if w <= 0 or h <= 0:
                    return "box outside the picture"
                scale = size / min(w, h) if size else 1
                if scale < 1 or (w, h) != whole.size:
                    cut = as_rgb(whole).crop(box)
                    if scale < 1:
                        cut = cut.resize((max(1, round(w * scale)), max(1, round(h * scale))),
                                         Image.Resampling.LANCZOS)
                    content = encoded(cut, target)
                else:
                    result = moments(whole)
        if content:  # measured as it will be read
            with Image.open(content) as there:
                result = moments(there)
    except Exception as error:  # Pillow raises many kinds for broken files
        return "cannot be read" if getattr(error, "errno", None) else "cannot be decoded"
    try:
        write(target, picture.source, content)
    except OSError as error:
        raise Problem(f"{target} could not be written ({error}); make room or mend the disk, and "
                      f"start the same command again: it goes on.") from None
    return result


def encoded(picture: Image.Image, target: Path) -> io.BytesIO:
    """The picture as a file in memory, in the format of target's extension."""
    content = io.BytesIO()
    kind = Image.registered_extensions()[target.suffix.lower()]
    picture.save(content, kind, **(dict(quality=95, subsampling=0) if kind == "JPEG" else {}))
    return content


def write(target: Path, source: Path | None, content: io.BytesIO | None) -> None:
    """Puts the content, or a link to the source, or a copy of it, at target: whole or not at all.

    Raises OSError.
    """
    if content is None:
        try:
            return os.link(os.path.realpath(source), target)
        except OSError:  # another disk, or one without links
            pass
    part = target.with_name(f".{target.name}.part")
    try:
        if content is None:
            shutil.copyfile(source, part)
        else:
            part.write_bytes(content.getbuffer())
        part.replace(target)
    except OSError:
        part.unlink(missing_ok=True)
        raise


JOURNAL = ".prepared.jsonl"


class Journal:
    """What each picture was made from, its size in bytes and its moments: nothing is made or
    measured twice.

    A line of JSON each, in a hidden file beside them; the first line tells of what the folder was
    made. Raises Problem where that was something else, or another process is at work there.
    """

    def __init__(self, out: Path, origin: dict):
        self.done, path = {}, out / JOURNAL
        self.file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB) if fcntl else None
        except OSError:
            raise Problem(f"another process prepares {out}; let it end.") from None
        self.file.seek(0)
        for i, line in enumerate(self.file.read().splitlines()):
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if i == 0 and record != origin:
                was, now = (", ".join(f"{k} {v}" for k, v in o.items()) for o in (record, origin))
                raise Problem(f"{out} was prepared from something else ({was}; now {now}); remove "
                              f"that folder, or write to another with --out.")
            if i > 0:
                self.done[record[0]] = record[1:]
        if not self.file.tell():
            self.file.write(json.dumps(origin))
        self.file.write("\n")

    def add(self, place: str, origin: str, size: int, result: list[float]) -> None:
        self.done[place] = [origin, size, *(float(f"{m:.8g}") for m in result)]
        self.file.write(json.dumps([place, *self.done[place]]) + "\n")


def make_all(plan: Plan, journal: Journal, src: Path, out: Path, size: int, workers: int) -> None:
    """Makes what is not there, on all cores; what cannot be made is skipped. Raises Problem."""
    folders = {(out / p.place).parent for p in plan.pictures}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.part"):  # of a run that was killed
            part.unlink()
    there = {f"{path.parent.parent.name}/{path.parent.name}/{path.name}": path.stat().st_size
             for split in SPLITS for path in (out / split).glob("*/[!.]*")}
    # Done is what was made from this very source and still has the size it had then.
    journal.done = {k: v for k, v in journal.done.items() if there.get(k) == v[1]}
    todo = []
    for p in plan.pictures:
        origin, old = p.origin(src), journal.done.get(p.place)
        if old is None or origin not in (None, old[0]):
            if old is not None:
                (out / p.place).unlink()
            todo.append((p, origin))
    if len(todo) < len(plan.pictures):
        print(f"{len(plan.pictures) - len(todo):,} pictures are there already.")

    # Threads, not processes: decoding, resizing and encoding let go of Python's lock, so two
    # threads are as fast as two processes, and none is left behind where the run is killed.
    def results():
        with ThreadPoolExecutor(workers) as pool:
            try:
                for k in range(0, len(todo), 1024):
                    some = todo[k:k + 1024]
                    yield from zip(some, pool.map(
                        lambda one: make(one[0], out / one[0].place, size), some))
                    journal.file.flush()
            finally:
                pool.shutdown(cancel_futures=True)

    for (picture, origin), result in progress(results(), len(todo), "pictures"):
        if isinstance(result, str):
            plan.found[picture.split, picture.label] -= 1  # skip counts it again
            plan.skip(picture.split, picture.label, result)
            journal.done.pop(picture.place, None)
        else:
            journal.add(picture.place, origin, (out / picture.place).stat().st_size, result)
    journal.file.flush()
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where all of a class has failed
    foreign = len(there.keys() - {p.place for p in plan.pictures} - journal.done.keys())
    if foreign:
        print(f"{foreign:,} files lie in {out} that are not of this download; training would read "
              f"them: look at them, and remove what you do not know.")


# ===== What came of it =====


def report(name: str, source: str, plan: Plan, done: dict[str, list], out: Path) -> None:
    """Writes stats.json and prints the table. Raises Problem where a split has come out empty."""
    names = CLASSES[:len(PAPER[name]["train"])]
    own = {place: record[2:] for place, record in done.items() if place.split("/")[1] in names}
    written = Counter(tuple(place.split("/")[:2]) for place in own)
    splits = [s for s in SPLITS if s != "valid" or any(k[0] == s for k in written)]
    counts = {s: {c: written[s, c] for c in names} for s in splits}
    m = [moments for place, moments in own.items() if place.startswith("train/")]
    if not m:
        raise Problem(f"no training picture of {name} could be made ({reasons(plan, 'train')}).")
    mean, square = ([sum(v[c] for v in m) / len(m) for c in range(k, k + 3)] for k in (0, 3))
    std = [max(q - x * x, 0) ** 0.5 for x, q in zip(mean, square)]
    stats = dict(dataset=name, source=source, counts=counts, mean=[round(v, 4) for v in mean],
                 std=[round(v, 4) for v in std], own_colours=name == "ferplus")
    part = out / "stats.json.part"
    part.write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
    part.replace(out / "stats.json")

    print(f"\n{out}: {source}")
    for split in splits:
        paper = PAPER[name].get(split)
        print(f"\n{split:12} {'found':>9} {'written':>9} {'paper':>9}")
        for k, c in enumerate(names):
            print(line(c, plan.found[split, k], counts[split][c], paper and paper[k],
                       reasons(plan, split, k)))
        print(line("total", sum(plan.found[split, k] for k in range(len(names))),
                   sum(counts[split].values()), paper and sum(paper), ""))
        if besides := reasons(plan, split, None):
            print(f"  besides: {besides}")
    kept = len(own.keys() - {p.place for p in plan.pictures})
    print(f"\n{kept:,} of these were made before, of files that this download no longer has."
          if kept else "")
    if any(2 * sum(counts[s].values()) < sum(PAPER[name][s]) for s in ("train", "val")):
        print("Less than half of the paper's pictures: this is a part of the dataset, or one of "
              "the reduced copies that circulate under its name.")
    if source == "AffectNet, npy files" and counts["val"].get(CLASSES[7]) == 499:
        print("This distribution of AffectNet has 499 pictures of contempt to test on; the paper's "
              "500 are those of the CSV lists.")
    if not sum(counts["val"].values()):
        raise Problem(f"no test picture of {name} could be made ({reasons(plan, 'val')}).")


def reasons(plan: Plan, split: str, *label: int | None) -> str:
    """What of a split, or of one class of it, was skipped and why."""
    count = Counter()
    for (s, k, reason), n in plan.skipped.items():
        if s == split and k in (label or (k,)):
            count[reason] += n
    return "; ".join(f"{n:,} skipped: {reason}" for reason, n in sorted(count.items()))


def line(name: str, found: int, written: int, paper: int | None, skipped: str) -> str:
    """A row of the table."""
    verdict = ("the paper does not use it" if paper is None else "as in the paper"
               if written == paper else f"{abs(written - paper):,} "
               f"{'fewer' if written < paper else 'more'} than the paper")
    number = "-" if paper is None else f"{paper:,}"
    return (f"{name:12} {found:9,} {written:9,} {number:>9}  {verdict}"
            + (f"; {skipped}" if skipped else ""))


def link_seven(out: Path) -> Path:
    """AffectNet-7 beside AffectNet: its class folders are links to seven of the eight."""
    seven = out.with_name(out.name + "7")
    seven.mkdir(exist_ok=True)
    (seven / JOURNAL).touch()  # marks it as made here
    for split in ("train", "val"):
        (seven / split).mkdir(parents=True, exist_ok=True)
        for name in CLASSES[:7]:
            source, target = out / split / name, seven / split / name
            if not source.is_dir():
                continue
            try:
                if not target.is_symlink() and not target.exists():
                    target.symlink_to(os.path.relpath(source, target.parent), True)
            except OSError:  # no such links here: a hard link for every picture
                target.mkdir()
            if target.is_dir() and not target.is_symlink():
                for picture in target.iterdir():
                    if not (source / picture.name).exists():
                        picture.unlink()
                for picture in source.glob("[!.]*"):
                    if not (target / picture.name).exists():
                        write(target / picture.name, picture, None)
    return seven


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a Problem."""
    text, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=text, epilog=rest, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DATASETS)
    parser.add_argument("--src", type=Path, required=True, help="the folder with the download")
    parser.add_argument("--out", type=Path, help="the folder to write [data/NAME]")
    parser.add_argument("--size", type=int, default=256,
                        help="short side of a picture at most, in pixels; 0 keeps all [256]")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                        help="threads [as many as cores]")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # Pillow's, on odd pictures
    sys.stdout.reconfigure(errors="replace")
    out = Path(os.path.abspath(args.out or Path(__file__).resolve().parent / args.name))
    try:
        prepare(args.name, args.src, out, args.size, args.workers)
    except Problem as problem:
        print(f"\nprepare: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads what is printed any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"\nprepare: {error}; mend that and start the same command again: it goes on.",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nprepare: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def prepare(name: str, src: Path, out: Path, size: int, workers: int) -> None:
    """Reads the download, makes the pictures, tells what came of it. Raises Problem."""
    if size < 0 or workers < 1:
        raise Problem("--size must not be negative, and --workers must be 1 or more.")
    if src.resolve() == out.resolve():
        raise Problem(f"{src} is where the result would go; give another folder with --out.")
    print(f"looking through {src}", flush=True)
    tree, plan = Tree(src), Plan()
    source = DATASETS[name](tree, plan)
    for split in ("train", "val"):
        if not any(p.split == split for p in plan.pictures):
            raise tree.missing(f"the pictures of {source}, {split} ({reasons(plan, split)})")
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out, dict(dataset=name, source=source, size=size))
    try:
        make_all(plan, journal, src, out, size, workers)
    finally:
        with contextlib.suppress(OSError):  # on a full disk: that has been said already
            journal.file.close()
    report(name, source, plan, journal.done, out)
    if name == "affectnet":
        report("affectnet7", source, plan, journal.done, link_seven(out))
    if tree.packed() and any("missing" in reason for _, _, reason in plan.skipped):
        print(f"Files are missing, and {tree.packed()}.")


if __name__ == "__main__":
    sys.exit(main())
