"""Turns a dataset as its owners ship it into folders that train.

    python data/prepare.py affectnet --src DOWNLOAD [--out data/affectnet] [--size 256]

and so rafdb, ferplus, sfew, and muxspace, which is public but not in the paper. DOWNLOAD is a
folder in which the unpacked archives lie, at any depth. What comes out is

    data/NAME/{train,val}/{0_neutral,1_happiness,...}/PICTURE    val is what the paper tests on
    data/NAME/stats.json                                         counts, channel means, deviations

All datasets have one naming of classes, so a classifier moves between them. Pictures are encoded
anew only where they must be cropped, drawn or shrunk. The others are hard links, or copies where
links do not work. Stopped at any moment, the same command resumes: a picture is written whole or
not at all, and none is made twice. data/README.md says where to get each dataset.

Needs Pillow, and numpy for AffectNet's .npy labels. Nothing here knows of simfle.py or torch."""

import argparse
import contextlib
import csv
import errno
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
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from PIL import Image, ImageOps, ImageStat

CLASSES = ("0_neutral", "1_happiness", "2_sadness", "3_surprise",
           "4_fear", "5_disgust", "6_anger", "7_contempt")
SPLITS = ("train", "valid", "val")  # valid: FERPlus's second one, which the paper does not use
JOURNAL = ".prepared.jsonl"
MACHINE = errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE  # no fault of the picture's

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
CLASSES_OF = {name: CLASSES[:len(counts["train"])] for name, counts in PAPER.items()}
CLASSES_OF["muxspace"] = CLASSES[:4] + CLASSES[5:7]

ARCHIVES = {".zip": "unzip -o {0} -d {1}", ".gz": "gunzip -k {0}", ".rar": "unrar x {0} {1}/",
            ".tar": "tar -xf {0} -C {1}", ".tgz": "tar -xf {0} -C {1}", ".7z": "7z x -o{1} {0}",
            ".001": "7z x -o{1} {0}"}


class Problem(Exception):
    """Something a user can mend. Its text is one sentence: what, where, what to do."""


class Skip(Exception):
    """Why one picture is left out, in a few words."""


# ===== What is there =====


class Tree:
    """The files below a folder, but for hidden ones, Thumbs.db, __MACOSX and what this made.

    Attributes:
        folders: path -> its files' names, sorted, as keys and values. By links, too, only once.
        called: a folder's name -> the paths of all folders of that name."""
    def __init__(self, src: Path):
        self.src, self.folders, self.called, seen = src, {}, defaultdict(list), set()
        if not src.is_dir():
            raise Problem(f"{src} is no folder; give --src the one that holds the download.")
        if (src / JOURNAL).exists():
            raise Problem(f"{src} was made by prepare.py; give --src the folder with the download.")

        def unreadable(error: OSError):  # os.walk would pass over it without a word
            raise error

        for parent, folders, names in os.walk(src, followlinks=True, onerror=unreadable):
            place = os.stat(parent)
            if (place.st_dev, place.st_ino) in seen or JOURNAL in names:
                folders.clear()
                continue
            seen.add((place.st_dev, place.st_ino))
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
            self.called[os.path.basename(parent)].append(Path(parent))
            self.folders[Path(parent)] = {n: n for n in sorted(names)
                                          if not n.startswith(".") and n.lower() != "thumbs.db"}

    def below(self, folder: Path) -> list[str]:
        """A folder's names from --src's own down to it, in lower case, the last first."""
        names = [self.src.resolve().name, *folder.relative_to(self.src).parts]
        return [n.lower() for n in reversed(names)]

    def one(self, *wanted: str, beside: str = "") -> Path | None:
        """The file of such a name, in any case; copies count as one. Raises Problem."""
        found = [folder / n for folder, names in self.folders.items() for n in names
                 if n.lower() in wanted and beside.lower() in ("", folder.name.lower())]
        for other in found[1:]:
            if other.read_bytes() != found[0].read_bytes():
                raise Problem(f"{found[0]} and {other} differ, and both could be meant; give --src "
                              f"a folder that holds only one of them.")
        return found[0] if found else None

    def find(self, folder: str, name: str) -> tuple[Path, str]:
        """(path, name) of the first such file in a folder of that name. Raises Skip."""
        for path in self.called.get(folder, ()):
            if name in self.folders[path]:
                return path, self.folders[path][name]
        raise Skip("file missing")

    def packed(self) -> str:
        """Archives that still wait to be unpacked, each with its command, in words; "" if none."""
        commands = []
        for folder, names in self.folders.items():
            for n in names:
                kind = ".tar" if ".tar." in n.lower() else os.path.splitext(n)[1].lower()
                command = ARCHIVES.get(kind)
                if command and not re.search(r"part0*([2-9]|[1-9]\d+)\.rar$", n.lower()):
                    commands.append(command.format(shlex.quote(str(folder / n)),
                                                   shlex.quote(str(folder))))
        more = "; and so on" if len(commands) > 6 else ""
        return f"if still packed: {'; '.join(commands[:6])}{more}; " if commands else ""

    def missing(self, wanted: str) -> Problem:
        """The sentence for a download without `wanted`: what is there instead, what to do."""
        top = [f"{f.relative_to(self.src)}/" for f in self.folders if f.parent == self.src]
        top += self.folders[self.src]
        more = f" and {len(top) - 8} more" if len(top) > 8 else ""
        there = f"what is there is {', '.join(top[:8])}{more}" if top else "it is empty"
        return Problem(f"{self.src} was searched for {wanted} and has none; {there}; "
                       f"{self.packed()}if that is all, it is no distribution of the owners: "
                       f"data/README.md says where those are, and `python simfle.py --data FOLDER` "
                       f"takes any FOLDER that has train/CLASS and val/CLASS.")


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in Image.registered_extensions()


@dataclass(slots=True)  # there are 300,000 of them
class Picture:
    """One picture to be: its place, and what it is made from."""
    split: str
    label: int
    name: str  # of its file
    folder: Path | None  # of its source; None: drawn from `grey`
    file: str
    box: tuple[int, int, int, int] | None  # left, top, right, bottom; None: all of it
    grey: bytes | None  # 48 × 48
    known: bool = False  # an earlier run has made it
    made: bool = False  # and it is still good

    @property
    def place(self) -> str:
        return f"{self.split}/{CLASSES[self.label]}/{self.name}"

    def origin(self, src: Path) -> str | None:
        """What it is made from, in short; None where that is no longer there."""
        if self.grey:
            return f"{zlib.crc32(self.grey):08x}"
        with contextlib.suppress(OSError):
            source = self.folder / self.file
            return f"{source.relative_to(src)} {source.stat().st_size} {self.box}"

    def content(self) -> bytes:
        return self.grey or (self.folder / self.file).read_bytes()


class Plan:
    """What is to be made, and what of the download is left out, by reason.

    Attributes:
        pictures: place in lower case (some disks know just one case) -> Picture.
        skipped: (split, label or None, reason) -> how many."""
    def __init__(self):
        self.pictures, self.skipped = {}, Counter()

    @contextlib.contextmanager
    def counting(self, split: str, label: int | None = None):
        """Counts what is skipped inside: of a class, or with None of none."""
        try:
            yield
        except Skip as why:
            self.skipped[split, label if label in range(8) else None, str(why)] += 1

    def add(self, split: str, label: int | None, folder: Path | None, file: str,
            box: tuple[int, int, int, int] | None = None, grey: bytes | None = None) -> None:
        """Takes one in; another of the same name in its class gets a number. Raises Skip."""
        if label not in range(8):
            raise Skip("no label" if label is None else "labelled none, uncertain or no face")
        name = file if is_picture(file) else os.path.splitext(file)[0] + ".jpg"
        new, number = Picture(split, label, name, folder, file, box, grey), 1
        while (key := new.place.lower()) in self.pictures:
            if new.box == self.pictures[key].box and new.content() == self.pictures[key].content():
                raise Skip("repeated")
            number += 1
            new.name = f"-{number}".join(os.path.splitext(name))
        self.pictures[key] = new


def integer(value) -> int | None:
    try:
        return int(value) if int(value) == float(value) else None
    except (TypeError, ValueError, OverflowError):
        return None


def read_rows(path: Path, columns: tuple[str, ...], number: int):
    """The rows of a CSV file, with or without a header, as dicts of stripped texts.

    Args:
        columns: in their usual order, for files without a header; "" is one that nobody needs.
        number: a column of integers; a first row without one is a header, of any case and blanks.
    """
    wanted = {c.lower(): c for c in columns if c}
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            first = next(filter(None, csv.reader(file)), [])
            file.seek(0)
            rows = csv.DictReader(file, columns)
            if len(first) <= number or integer(first[number]) is None:
                header = [cell.strip().lstrip("#").strip().lower() for cell in first]
                if absent := wanted.keys() - set(header):
                    raise Problem(f"{path} has no column {', '.join(sorted(absent))}; get it as "
                                  f"its owners ship it (data/README.md).")
                rows.fieldnames = [wanted.get(cell, cell) for cell in header]
                next(rows)
            for row in rows:
                yield {c: (row[c] or "").strip() for c in wanted.values()}
    except (csv.Error, OSError) as error:
        raise Problem(f"{path} cannot be read as CSV ({error}); download it again.") from None


# ===== AffectNet =====


def affectnet(tree: Tree, plan: Plan) -> str:
    """Whichever of the three distributions is there. Returns its name. Raises Problem."""
    plus = [f for f in tree.folders if "no_human_annotated" not in tree.below(f)
            and f.name == "annotations" and any(n.endswith(".json") for n in tree.folders[f])]
    npy = [f for f in tree.folders if any(n.endswith("_exp.npy") for n in tree.folders[f])]
    lists = [tree.one("training.csv"), tree.one("validation.csv")]
    lists = [] if None in lists else lists
    kinds = {"AffectNet, CSV lists": lists, "AffectNet, npy files": npy, "AffectNet+": plus}
    there = [kind for kind in kinds if kinds[kind]]
    if not there:
        raise tree.missing("AffectNet's training.csv and validation.csv, or *_exp.npy files, or "
                           "human_annotated/*/annotations/*.json")
    if len(there) > 1:
        places = " and ".join(f"{kind} ({kinds[kind][0]})" for kind in there)
        raise Problem(f"{tree.src} holds {places}; give --src the folder of one of them.")
    if lists:
        affectnet_lists(tree, plan, *lists)
    else:
        affectnet_files(tree, plan, npy or plus, "_exp.npy" if npy else ".json")
    return there[0]


def affectnet_lists(tree: Tree, plan: Plan, training: Path, validation: Path) -> None:
    """The original distribution: CSV lists, whole photographs, and a box for each face."""
    columns = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "",
               "expression")
    for split, path in (("train", training), ("val", validation)):
        for row in read_rows(path, columns, number=6):
            label, place = integer(row["expression"]), row[columns[0]].lstrip("# ")
            x, y, w, h = (integer(row[c]) for c in columns[1:5])
            with plan.counting(split, label):
                source = tree.find(*["", *re.split(r"[/\\]", place)][-2:])
                if None in (x, y, w, h):
                    raise Skip("box is no integer")
                if w <= 0 or h <= 0:
                    raise Skip("box without size")
                plan.add(split, label, *source, box=(x, y, x + w, y + h))


def label_in(path: Path) -> int | None:
    """The label in a .npy or .json file. Raises Problem where numpy is missing."""
    try:
        if path.suffix == ".json":
            return integer(json.loads(path.read_bytes())["human-label"])
        import numpy
        return integer(numpy.load(path, allow_pickle=False).reshape(()).astype(float).item())
    except ImportError:
        raise Problem("AffectNet's .npy labels need numpy, which is missing; install it with "
                      "`pip install numpy`.") from None
    except Exception:  # numpy and json raise many kinds for broken files
        return None


def affectnet_files(tree: Tree, plan: Plan, folders: list[Path], ending: str) -> None:
    """A label file for each picture: annotations/<id><ending> beside images/<id>.jpg.

    The two folders are never zipped together: a file that one of them lacks would shift the rest.
    """
    names = {"train_set": "train", "val_set": "val", "valid_set": "val", "validation_set": "val"}
    for folder in folders:
        split = next((names[p] for p in tree.below(folder) if p in names), None)
        if split is None:
            raise Problem(f"{folder} is below neither train_set nor val_set; name its folder so.")
        place = folder.parent / "images"
        images = {os.path.splitext(n)[0]: n for n in tree.folders.get(place, ())}
        labels = [n for n in tree.folders[folder] if n.endswith(ending)]
        for n in progress(labels, len(labels), f"{split} labels"):
            label = label_in(folder / n)
            with plan.counting(split, label):
                if n.removesuffix(ending) not in images:
                    raise Skip("file missing")
                plan.add(split, label, place, images[n.removesuffix(ending)])


# ===== RAF-DB =====


def rafdb(tree: Tree, plan: Plan) -> str:
    """The basic set: labels by the owners' list or Kaggle's two, aligned faces. Raises Problem."""
    ours = {1: 3, 2: 4, 3: 5, 4: 1, 5: 2, 6: 6, 7: 0}
    for folder in list(tree.folders):  # RAF-DB's other half has lists and pictures of like names
        names = str(folder.relative_to(tree.src)).lower().split(os.sep)
        if any("compound" in n and "basic" not in n for n in names):
            del tree.folders[folder]
    owners = tree.one("list_patition_label.txt", "list_partition_label.txt")  # the first is theirs
    lists = [owners] if owners else [tree.one("train_labels.csv"), tree.one("test_labels.csv")]
    if None in lists:
        raise tree.missing("RAF-DB's basic/EmoLabel/list_patition_label.txt, or Kaggle's "
                           "train_labels.csv and test_labels.csv")
    aligned = {n.rsplit("_aligned", 1)[0]: (folder, n) for folder, names in tree.folders.items()
               for n in names if "_aligned." in n}
    for path in lists:
        for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            words = re.split(r"[,\s]+", line.strip())
            stem = os.path.splitext(words[0])[0].removesuffix("_aligned")
            number, split = integer(words[-1]), "train" if stem.startswith("train") else "val"
            if number is not None and number > 7:
                raise Problem(f"{path} has the label {number}, so it is RAF-DB's compound set; "
                              f"give --src the folder of the basic set, whose labels are 1 to 7.")
            if line.strip() in ("", "image,label"):
                continue
            with plan.counting(split, ours.get(number)):
                if number not in ours or not stem.startswith(("train", "test")):
                    raise Skip("line that is no `train_00001.jpg 5`")
                if stem not in aligned:
                    raise Skip("file missing among the aligned faces")
                plan.add(split, ours[number], *aligned[stem])
    return "RAF-DB, basic, aligned"


# ===== FERPlus =====

FERPLUS_FOLDERS = {"FER2013Train": "train", "FER2013Valid": "valid", "FER2013Test": "val"}
FERPLUS_USAGES = {"Training": "train", "PublicTest": "valid", "PrivateTest": "val"}
# The order of the votes: neutral, happiness, surprise, sadness, anger, disgust, fear, contempt;
# behind them "unknown" and "not a face".
FERPLUS_ORDER = (0, 1, 3, 2, 6, 5, 4, 7)


def majority(votes: list[int | None]) -> int:
    """The label that ten votes give. Raises Skip where they give none. (Table 5)

    A class with a single vote gets none. Of what is left, "unknown" and "not a face" included, one
    of the eight classes needs more than half. This rule, over label.csv, gives the paper's counts;
    over fer2013new.csv, which has other votes, it does not."""
    if None in votes:
        raise Skip("votes that are no integers")
    votes = [v if v > 1 else 0 for v in votes]
    if 2 * max(votes) <= sum(votes):
        raise Skip("no majority")
    if max(votes) in votes[8:]:
        raise Skip("majority for unknown or no face")
    return FERPLUS_ORDER[votes.index(max(votes))]


def ferplus(tree: Tree, plan: Plan) -> str:
    """Pixels in a CSV file, or drawn pictures; votes in label.csv. Raises Problem."""
    pixels = tree.one("fer2013.csv") or tree.one("icml_face_data.csv")
    drawn = any(n.endswith(".png") for name in FERPLUS_FOLDERS
                for folder in tree.called.get(name, ()) for n in tree.folders[folder])
    if not pixels and not drawn and any(n.lower() in ("angry", "happy") for n in tree.called):
        raise Problem(f"{tree.src} holds FER2013 as folders of pictures, so row numbers are lost, "
                      f"and votes with them; get fer2013.csv (Kaggle's FER2013 challenge) and "
                      f"fer2013new.csv (github.com/microsoft/FERPlus), as data/README.md says.")
    lists = {name: tree.one("label.csv", beside=name) for name in FERPLUS_FOLDERS}
    if None in lists.values() or not pixels and not drawn:
        raise tree.missing("FERPlus's label.csv in FER2013Train, FER2013Valid and FER2013Test, and "
                           "fer2013.csv, icml_face_data.csv or FER2013Train/fer*.png")
    greys = ferplus_rows(tree, plan, pixels) if pixels else {}
    for folder, path in lists.items():
        split = FERPLUS_FOLDERS[folder]
        for row in read_rows(path, ("name", "", *map(str, range(10))), number=2):
            name = row["name"]
            with plan.counting(split):
                label = majority([integer(row[str(i)]) for i in range(10)])
                with plan.counting(split, label):
                    if pixels and (split, name) not in greys:
                        raise Skip("file missing")
                    source = (None, name) if pixels else tree.find(folder, name)
                    plan.add(split, label, *source, grey=greys.get((split, name)))
    return "FERPlus, pixels from CSV" if pixels else "FERPlus, drawn pictures"


def ferplus_rows(tree: Tree, plan: Plan, pixels: Path) -> dict[tuple[str, str], bytes]:
    """(split, name) -> its 48 × 48 pixels. Raises Problem.

    A name's number is not its row: row i of the pixels belongs to row i of fer2013new.csv, which
    has the name. Four names stand twice; the row nearest to the number is the right one."""
    path = tree.one("fer2013new.csv")
    if path is None:
        raise tree.missing("FERPlus's fer2013new.csv, which tells the pixels' names")
    apart = Problem(f"{pixels} and {path} do not have the same rows, so they do not belong "
                    f"together; download both again.")
    names = [(row["Usage"], row["Image name"])
             for row in read_rows(path, ("Usage", "Image name", "neutral"), number=2)]
    nearest, found = {}, {}
    for i, (_, name) in enumerate(names):
        number = integer(name[3:10])
        if number is not None and abs(i - number) < abs(nearest.get(name, 10**9) - number):
            nearest[name] = i
    rows = read_rows(pixels, ("emotion", "pixels", "Usage"), number=0)
    for i, (usage, name) in enumerate(progress(names, len(names), "rows")):
        row = next(rows, {})
        if row.get("Usage") != usage:
            raise apart
        with plan.counting(FERPLUS_USAGES.get(usage)):
            if nearest.get(name) != i:
                raise Skip("repeated name" if name else "row without a name")
            grey = row["pixels"].split()
            if len(grey) != 48 * 48 or not set(grey) <= set(map(str, range(256))):
                raise Skip("pixels are not 48 × 48 numbers")
            found[FERPLUS_USAGES.get(usage), name] = bytes(map(int, grey))
    if next(rows, None):
        raise apart
    return found


# ===== SFEW =====


def sfew(tree: Tree, plan: Plan) -> str:
    """Aligned faces in folders by emotion. Returns its name. Raises Problem."""
    ours = {"neutral": 0, "happy": 1, "sad": 2, "surprise": 3, "fear": 4, "disgust": 5, "angry": 6}
    for split, name in (("train", "train_aligned_faces"), ("val", "val_aligned_faces")):
        folders = [f for f in tree.folders if any(p.startswith(name) for p in tree.below(f))]
        if not any(f.name.lower() in ours for f in folders):
            raise tree.missing(f"SFEW's {split.title()}_Aligned_Faces/Angry and so on")
        for folder in folders:
            label = ours.get(folder.name.lower())
            for n in filter(is_picture, tree.folders[folder]):
                with plan.counting(split, label):
                    if label is None:
                        raise Skip(f"in a folder {folder.name}, which is no emotion of SFEW")
                    plan.add(split, label, folder, n)
    return "SFEW 2.0, aligned"


# ===== muxspace =====


def muxspace(tree: Tree, plan: Plan) -> str:
    """legend.csv and images/ of a public repository. Returns its name. Raises Problem.

    Ours: the splits, and that fear and contempt are left out, as 21 and 9 pictures are too few."""
    path = tree.one("legend.csv")
    if path is None:
        raise tree.missing("data/legend.csv and images/ of github.com/muxspace/facial_expressions")
    labels, used = {}, {c[2:]: CLASSES.index(c) for c in CLASSES_OF["muxspace"]}
    for row in read_rows(path, ("", "image", "emotion"), number=0):
        with plan.counting(""):
            if row["image"] in labels:
                raise Skip("second row of a picture")
            labels[row["image"]] = used.get(row["emotion"].lower())
            if labels[row["image"]] is None:
                raise Skip("fear, contempt or no emotion")
    tested = draw_tested({name: k for name, k in labels.items() if k is not None})
    for name, label in labels.items():
        split = "val" if name in tested else "train"
        if label is not None:
            with plan.counting(split, label):
                plan.add(split, label, *tree.find("images", name))
    names = [n for folder in tree.called["images"] for n in tree.folders[folder] if is_picture(n)]
    plan.skipped["", None, "file without a row"] += len(set(names) - labels.keys())
    return "muxspace/facial_expressions"


def draw_tested(labels: dict[str, int]) -> set[str]:
    """The pictures to test on: 1,000 each neutral and happy, 50 of each other class, at most half.

    All of Name_Surname_0001.jpg and so on are one unit, in one split; any other picture is one.
    Units are taken where they fit, those of small classes first, then in the order of a hash."""
    units, tested = defaultdict(list), set()
    for name in labels:
        units[re.sub(r"_\d{4}$", "", os.path.splitext(name)[0])].append(name)
    room = {k: min(1000 if k < 2 else 50, n // 2) for k, n in Counter(labels.values()).items()}
    for unit in sorted(units, key=lambda unit: (all(labels[name] < 2 for name in units[unit]),
                                                zlib.crc32(unit.encode()), unit)):
        count = Counter(labels[name] for name in units[unit])
        if all(count[k] <= room[k] for k in count):
            tested.update(units[unit])
            room = {k: n - count[k] for k, n in room.items()}
    return tested


DATASETS = {reader.__name__: reader for reader in (affectnet, rafdb, ferplus, sfew, muxspace)}


# ===== Making the pictures =====


def progress(items, total: int, what: str):
    """Passes items on, and tells how many, how fast, and how much longer."""
    terminal, start = sys.stdout.isatty(), time.perf_counter()
    last = start
    for count, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - last >= (0.5 if terminal else 5.0) or count == total:
            last, rate = now, count / max(now - start, 1e-9)
            left = timedelta(seconds=round((total - count) / rate))
            print(f"{what} {count:,}/{total:,}  {rate:,.0f}/s  left {left}   ",
                  end="\r" if terminal and count < total else "\n", flush=True)


def as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits; Pillow would cut 65,535 off at 255
        picture = picture.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    return picture.convert("RGB")


def moments(picture: Image.Image) -> list[float]:
    """The means of its three channels and of their squares, in units of full brightness."""
    stat = ImageStat.Stat(as_rgb(picture))
    return [v / 255 for v in stat.mean] + [(v / 255) ** 2 for v in stat.rms]


def make(picture: Picture, src: Path, target: Path, size: int) -> list:
    """Makes one picture, if it is not there. Returns its record for the journal. Raises Skip."""
    origin, content = picture.origin(src), None
    source = picture.folder / picture.file if picture.folder else None
    if target.exists():  # of a run that was killed before it could note it
        with contextlib.suppress(Exception), Image.open(target) as there:
            return [origin, target.stat().st_size, *moments(there)]
        target.unlink()  # damaged
    try:
        with (Image.open(source) if source
              else Image.frombytes("L", (48, 48), picture.grey)) as whole:
            whole.load()
            upright = True
            with contextlib.suppress(Exception):  # of broken tags, once the pixels are turned
                if picture.box:  # it counts in the stored picture; whoever reads a link turns it
                    upright = whole.getexif().get(0x0112, 1) == 1
                else:
                    ImageOps.exif_transpose(whole, in_place=True)
            cut = cropped(whole, picture.box, size)
            if cut is whole and source and upright:
                result = moments(whole)
            else:
                content, kind = io.BytesIO(), Image.registered_extensions()[target.suffix.lower()]
                how = dict(quality=95, subsampling=0) if kind == "JPEG" else {}
                as_rgb(cut).save(content, kind, **how)
                with Image.open(content) as there:  # measured as it will be read
                    result = moments(there)
    except Skip:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE:
            raise OSError(str(error) or "out of memory") from None
        raise Skip("cannot be read" if getattr(error, "errno", None) else "cannot be decoded")
    write(target, source, content)
    return [origin, target.stat().st_size, *result]


def cropped(whole: Image.Image, box: tuple | None, size: int) -> Image.Image:
    """A picture's box, clamped to it and shrunk; itself if that changes nothing. Raises Skip."""
    left, top, right, bottom = box or (0, 0, *whole.size)
    box = (max(left, 0), max(top, 0), min(right, whole.width), min(bottom, whole.height))
    w, h = box[2] - box[0], box[3] - box[1]
    if w <= 0 or h <= 0:
        raise Skip("box outside the picture")
    scale = size / min(w, h) if size else 1
    if scale >= 1:
        return whole if (w, h) == whole.size else as_rgb(whole).crop(box)
    small = max(1, round(w * scale)), max(1, round(h * scale))
    return as_rgb(whole).crop(box).resize(small, Image.Resampling.LANCZOS)


def write(target: Path, source: Path | None, content: io.BytesIO | None) -> None:
    """Puts content at target, or else a link to the source or a copy: whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        with contextlib.suppress(OSError):  # another disk, or one without links
            return os.link(os.path.realpath(source), target)
    part = target.with_name(f".{target.name}.part")  # if it stays, the next run removes it
    part.write_bytes(content.getbuffer() if content else source.read_bytes())
    part.replace(target)


class Journal:
    """A record of each picture, so that none is made twice: origin, size in bytes, six moments.

    A line of JSON each, in a hidden file. The first line tells of what the folder was made.

    Attributes:
        others: place -> whether it is good, of pictures that this download no longer has.
        totals: (split, class) -> how many there are, and the sums of their moments in 10^-12:
            integers, as the order in which they come must not change the last digit."""
    def __init__(self, out: Path, origin: dict):
        self.others, self.totals = {}, defaultdict(lambda: [0] * 7)
        self.file = open(out / JOURNAL, "a+", encoding="utf-8", buffering=1)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB) if fcntl else None
        except OSError as error:
            if isinstance(error, (BlockingIOError, PermissionError)):  # else a disk without locks
                raise Problem(f"another process prepares {out}; let it end.") from None
        self.file.seek(0)
        was, *self.lines = self.file.readlines() or [""]
        now = json.dumps(origin) + "\n"
        if not was.endswith("\n") and not any((out / split).exists() for split in SPLITS):
            was = now
            self.file.truncate(0)  # new, or killed in the midst of this line
            self.file.write(now)
            os.fsync(self.file.fileno())  # a picture on the disk without it could be of any --size
        if was != now:
            raise Problem(f"{out} was prepared from something else ({was.strip() or 'unknown'}, "
                          f"now {now.strip()}); move it away, or write elsewhere with --out.")
        self.file.write("\n")  # the last line may have been cut off

    def count(self, place: str, record: list) -> None:
        """Adds a picture that is there to the totals."""
        total = self.totals[tuple(place.split("/")[:2])]
        total[0] += 1
        for i, moment in enumerate(record[2:], 1):
            total[i] += round(moment * 10**12)

    def add(self, place: str, record: list) -> None:
        """Notes a picture that has been made."""
        record[2:] = [float(f"{m:.8g}") for m in record[2:]]
        self.file.write(json.dumps([place, *record]) + "\n")
        self.count(place, record)


def check(plan: Plan, journal: Journal, src: Path, out: Path) -> None:
    """Counts what is there of these very sources, by the last line on each.

    Removes a picture if its source has changed, or has another place now, such as another class."""
    greys = {picture.origin(src) for picture in plan.pictures.values() if picture.grey}
    for line in progress(reversed(journal.lines), len(journal.lines), "checked"):
        try:
            place, *record = json.loads(line)
        except ValueError:  # empty, or cut off
            continue
        picture, path = plan.pictures.get(place.lower()), out / place
        if picture.known if picture else place in journal.others:
            continue
        good = path.exists() and path.stat().st_size == record[1]
        if picture:
            good = good and picture.origin(src) in (None, record[0])
            picture.known, picture.made = True, good
        elif record[0] in greys or (src / re.sub(r" \d+ (None|\(.*)$", "", record[0])).exists():
            good = False
        else:
            journal.others[place] = good
        if good:
            journal.count(place, record)
        elif place not in journal.others:
            path.unlink(missing_ok=True)
    foreign = 0
    for path in (path for split in SPLITS for path in (out / split).glob("*/*")):
        place = path.relative_to(out).as_posix()
        if path.match(".*.part"):  # of a run that was killed
            path.unlink()
        elif place.lower() not in plan.pictures and not journal.others.get(place):
            foreign += not path.name.startswith(".")
    if foreign:
        print(f"{foreign:,} files lie in {out} that are not of this download; training would read "
              f"them: look at them, and remove what you do not know.")


def make_all(plan: Plan, journal: Journal, src: Path, out: Path, size: int, workers: int) -> None:
    """Makes what is not there, on all cores; what cannot be made is skipped."""
    todo = [p for p in plan.pictures.values() if not p.made]
    if len(todo) < len(plan.pictures):
        print(f"{len(plan.pictures) - len(todo):,} pictures are there already.")

    # Threads, not processes: decoding, resizing and encoding let go of Python's lock, so two
    # threads are as fast as two processes, and none is left behind where the run is killed.
    with ThreadPoolExecutor(workers) as pool:
        def started():
            for k in range(0, len(todo), 1024):
                some = todo[k:k + 1024]
                yield from zip(some, [pool.submit(make, p, src, out / p.place, size) for p in some])

        try:
            for picture, job in progress(started(), len(todo), "pictures"):
                with plan.counting(picture.split, picture.label):
                    journal.add(picture.place, job.result())
        finally:
            pool.shutdown(cancel_futures=True)


# ===== What came of it =====


def report(name: str, source: str, plan: Plan, journal: Journal, out: Path) -> None:
    """Writes stats.json and prints the table. Raises Problem where a split has come out empty."""
    classes, totals, paper = CLASSES_OF[name], journal.totals, PAPER.get(name, {})
    splits = [s for s in SPLITS if s != "valid" or any(split == s for split, _ in totals)]
    counts = {s: {c: totals[s, c][0] for c in classes} for s in splits}
    for split in ("train", "val"):
        if not any(counts[split].values()):
            raise Problem(f"no picture of {name}/{split} could be made ({reasons(plan, split)}).")
    sums = [sum(totals["train", c][i] for c in classes) for i in range(7)]
    mean, square = ([v / sums[0] / 10**12 for v in sums[k:k + 3]] for k in (1, 4))
    std = [max(q - x * x, 0) ** 0.5 for x, q in zip(mean, square)]
    stats = dict(dataset=name, source=source, counts=counts, mean=[round(v, 4) for v in mean],
                 std=[round(v, 4) for v in std], own_colours=name == "ferplus")
    write(out / "stats.json", None, io.BytesIO(f"{json.dumps(stats, indent=1)}\n".encode()))

    print(f"\n{out}: {source}")
    found = Counter((p.split, CLASSES[p.label]) for p in plan.pictures.values())
    for split in splits:
        print(f"\n{split:12} {'found':>9} {'written':>9} {'paper':>9}")
        of_paper = dict(zip(classes, paper.get(split, ())))
        for c in classes:
            print(line(c, found[split, c], counts[split][c], of_paper.get(c),
                       reasons(plan, split, CLASSES.index(c))))
        print(line("total", sum(found[split, c] for c in classes), sum(counts[split].values()),
                   sum(of_paper.values()) or None, reasons(plan, split, None)))
    kept = sum(good and place.split("/")[1] in classes for place, good in journal.others.items())
    print(f"\n{kept:,} of these were made before, of files that this download no longer has."
          if kept else "")
    if besides := reasons(plan, ""):
        print(f"Of neither split: {besides}")
    if any(2 * sum(counts[s].values()) < sum(paper[s]) for s in paper):
        print("Less than half of the paper's pictures: this is a part of the dataset, or one of "
              "the reduced copies that circulate under its name.")


def reasons(plan: Plan, split: str, *label: int | None) -> str:
    """What of a split, or of one class of it, was skipped and why."""
    count = Counter()
    for (s, k, reason), n in plan.skipped.items():
        if s == split and n and k in (label or (k,)):
            count[reason] += n
    return "; ".join(f"{n:,} skipped: {reason}" for reason, n in sorted(count.items()))


def line(name: str, found: int, written: int, paper: int | None, skipped: str) -> str:
    """A row of the table."""
    number, verdict = "-", "not in the paper"
    if paper is not None:
        number, more = f"{paper:,}", "fewer" if written < paper else "more"
        verdict = f"{abs(written - paper):,} {more} than" if written != paper else "as in"
        verdict += " the paper"
    return f"{name:12} {found:9,} {written:9,} {number:>9}  {verdict}; {skipped}".rstrip("; ")


def link_seven(out: Path, seven: Path) -> None:
    """AffectNet-7 beside AffectNet: its class folders are links to seven of the eight."""
    seven.mkdir(exist_ok=True)
    (seven / JOURNAL).touch()  # marks it as made here
    for source in [folder for name in CLASSES[:7] for folder in out.glob(f"*/{name}")]:
        target = seven / source.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            target.symlink_to(os.path.relpath(source, target.parent), True)
        if not target.is_symlink():  # no such links here: a hard link for every picture
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target,
                            copy_function=lambda a, b: write(Path(b), Path(a), None))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a Problem."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DATASETS)
    parser.add_argument("--src", type=Path, required=True, help="the folder with the download")
    parser.add_argument("--out", type=Path, help="the folder to write [data/NAME]")
    parser.add_argument("--size", type=int, default=256,
                        help="short side of a picture at most, in pixels; 0 keeps all [256]")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads [cores]")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # Pillow's, on odd pictures
    sys.stdout.reconfigure(errors="replace")
    out = Path(os.path.abspath(args.out or Path(__file__).resolve().parent / args.name))
    try:
        prepare(args.name, args.src, out, args.size, args.workers)
    except BrokenPipeError:  # nobody reads what is printed any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Problem, OSError) as error:
        resume = "" if isinstance(error, Problem) else (
            f"; mend that, or make room in {out}, and start the same command again: it resumes.")
        print(f"\nprepare: {error}{resume}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nprepare: stopped; the same command resumes here.", file=sys.stderr)
        return 130
    return 0


def prepare(name: str, src: Path, out: Path, size: int, workers: int) -> None:
    """Reads the download, makes the pictures, tells what came of it. Raises Problem."""
    if size < 0 or workers < 1 or src.resolve() == out.resolve():
        raise Problem("--size must be 0 or more, --workers 1 or more, and --out not --src.")
    print(f"looking through {src}", flush=True)
    tree, plan = Tree(src), Plan()
    source = DATASETS[name](tree, plan)
    for split in ("train", "val"):
        if not any(p.split == split for p in plan.pictures.values()):
            raise tree.missing(f"the pictures of {source}, {split} ({reasons(plan, split)})")
    outs = [out, out.with_name(out.name + "7")] if name == "affectnet" else [out]
    for folder in outs:
        if any((folder / split).exists() for split in SPLITS) and not (folder / JOURNAL).exists():
            raise Problem(f"{folder} holds other pictures; move it away, or give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out, dict(dataset=name, source=source, size=size))
    with journal.file:
        for folder in outs:
            (folder / "stats.json").unlink(missing_ok=True)  # until all is there
        check(plan, journal, src, out)
        make_all(plan, journal, src, out, size, workers)
    report(name, source, plan, journal, out)
    if name == "affectnet":
        link_seven(*outs)
        report("affectnet7", source, plan, journal, outs[1])
    if tree.packed() and any("missing" in reason for _, _, reason in plan.skipped):
        print(f"Files are missing; {tree.packed()[:-2]}.")


if __name__ == "__main__":
    sys.exit(main())
