"""Turns a dataset as its owners ship it into folders that train.

    python data/prepare.py affectnet --src DOWNLOAD [--out data/affectnet] [--size 256]

and so rafdb, ferplus, sfew, and muxspace, which is public but not in the paper. DOWNLOAD holds the
unpacked archives, at any depth. What comes out is data/NAME/{train,val}/CLASS/PICTURE: val is what
the paper tests on, and all datasets have one naming of classes. Pictures are encoded anew only
where they must be cropped, drawn or shrunk. The others are hard links, or copies where links do not
work. All is built in data/NAME.part-SIZE/ and renamed in the end: the same command resumes.
Needs Pillow, numpy for one distribution of AffectNet, and not torch."""

import argparse
import csv
import io
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, zip_longest
from pathlib import Path

from PIL import Image, ImageOps, ImageStat

CLASSES = ("0_neutral", "1_happiness", "2_sadness", "3_surprise",
           "4_fear", "5_disgust", "6_anger", "7_contempt")
# Table 5: pictures of every class, to train on and to test on.
PAPER = {
    ("affectnet", "train"): (74_874, 134_415, 25_459, 14_090, 6_378, 3_803, 24_882, 3_750),
    ("affectnet", "val"): (500,) * 8,
    ("rafdb", "train"): (2_524, 4_772, 1_982, 1_290, 281, 717, 705),
    ("rafdb", "val"): (680, 1_185, 478, 329, 74, 160, 162),
    ("ferplus", "train"): (8_733, 7_284, 3_022, 3_136, 536, 116, 2_098, 120),
    ("ferplus", "val"): (1_083, 892, 382, 394, 86, 16, 269, 15),
    ("sfew", "train"): (144, 184, 161, 94, 78, 52, 178),
    ("sfew", "val"): (84, 72, 73, 56, 46, 23, 77)}
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF",
           ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".webp": "WEBP"}
# Folders that are passed over: hidden ones, halves that the paper does not use, what is made here.
PASSED = re.compile(r"\.|__macosx|no_human_annotated|(?!.*basic).*compound|[0-7]_[a-z]+$", re.I)


class Problem(Exception):
    """Something a user can fix. Its text is one sentence: what, where, what to do."""


# One to be made, from `source`: a path, or 48 × 48 grey pixels, or None where the file is missing.
# `box` is left, top, width, height; None takes all of it.
Picture = namedtuple("Picture", "split label name source box", defaults=[None])


class Download:
    """Folders by name, lists of labels, and archives below --src, at any depth."""
    def __init__(self, src: Path):
        self.src, self.called, self.lists, self.packed = src, defaultdict(list), [], []
        for parent, folders, names in os.walk(src, followlinks=True):
            folders[:] = sorted(f for f in folders if not PASSED.match(f))
            self.called[os.path.basename(parent)].append(Path(parent))
            self.lists += [Path(parent, n) for n in sorted(names) if n.endswith((".csv", ".txt"))]
            self.packed += [n for n in names if re.search(r"\.(zip|rar|7z|t?gz|tar|001)$", n)]

    def one(self, name: str, beside: str = "") -> Path | None:
        """The list of that name; copies count as one."""
        found = [p for p in self.lists if p.name == name and beside in ("", p.parent.name)]
        if len(found) > 1 and len({p.read_bytes() for p in found}) > 1:
            raise Problem(f"{found[0]} and {found[1]} differ; give --src a folder with only one.")
        return found[0] if found else None

    def find(self, folder: str, name: str) -> str | None:
        """The path of the first such file in a folder of that name."""
        paths = (os.path.join(path, name) for path in self.called.get(folder, ()))
        return next(filter(os.path.isfile, paths), None)


def names_in(folder: Path, endings: tuple[str, ...] = tuple(FORMATS)) -> list[str]:
    """The names of a folder's pictures, or of files with other endings, sorted."""
    return sorted(n for n in os.listdir(folder) if n.lower().endswith(endings) and n[0] != ".")


def split_of(folder: Path, ending: str) -> str | None:
    """train or val, by the last folder on the path that is called so, as in validation_<ending>."""
    found = re.findall(rf"(train|val)(?:id|idation)?_{ending}", str(folder).lower())
    return found[-1] if found else None


def integer(value) -> int | None:
    return int(float(value)) if re.fullmatch(r"\s*-?\d+(\.0*)?\s*", str(value)) else None


def read_rows(path: Path | None, columns: tuple[str, ...], number: int):
    """The rows of a label list in UTF-8 or UTF-16, without columns that are called "" here. Their
    order is this one, unless the first row has no integer in column `number`: it is a header."""
    if path is None:
        return
    with open(path, "rb") as file:
        code = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with open(path, newline="", encoding=code, errors="replace") as file:
        rows = filter(None, csv.reader(file, delimiter=" " if path.suffix == ".txt" else ","))
        header, wanted = next(rows, []), [c.lower() for c in columns]
        if len(header) > number and integer(header[number]) is not None:
            rows, header = chain([header], rows), wanted
        header = [cell.strip(" #").lower() for cell in header]
        if absent := {*wanted} - {*header, ""}:
            raise Problem(f"{path} has no column {', '.join(sorted(absent))}; download it again.")
        places = [header.index(c) for c in wanted if c]
        for row in rows:
            yield [row[i].strip() if i < len(row) else "" for i in places]


# ===== The datasets =====
# A generator each. It yields all pictures; `collect` counts those without a label or a file.


def affectnet(tree: Download):
    """One of three: CSV lists with boxes in whole photographs; or annotations/<id>_exp.npy beside
    images/<id>.jpg; or annotations/<id>.json."""
    lists = {"train": tree.one("training.csv"), "val": tree.one("validation.csv")}
    files = {f: names_in(f, ("_exp.npy", ".json")) for f in tree.called["annotations"]}
    kinds = {os.path.splitext(p)[1] for p in chain(filter(None, lists.values()), *files.values())}
    if len(kinds) > 1:
        raise Problem(f"{tree.src} has {' and '.join(sorted(kinds))} labels; give --src one kind.")
    if ".npy" in kinds:
        import numpy
    columns = ("subDirectory_filePath", *(f"face_{x}" for x in ("x", "y", "width", "height")), "",
               "expression")
    for split, path in lists.items():
        for place, *box, label in read_rows(path, columns, number=6):
            folder, name = ["", *re.split(r"[/\\]", place.lstrip("# "))][-2:]
            yield Picture(split, integer(label), name, tree.find(folder, name),
                          tuple(map(integer, box)))
    for folder, names in files.items():
        images, split = folder.parent / "images", split_of(folder, "set")
        for n in progress(names, len(names), f"labels in {folder}") if split else ():
            source = images / re.sub(r"(_exp\.npy|\.json)$", ".jpg", n)
            try:
                label = (numpy.load(folder / n).item() if n.endswith("npy") else
                         json.loads((folder / n).read_bytes())["human-label"])
            except Exception:  # numpy and json raise many kinds for broken files
                label = None
            yield Picture(split, integer(label), source.name,
                          str(source) if source.is_file() else None)


def rafdb(tree: Download):
    """The basic set: labels by the owners' list (spelt so) or Kaggle's two, aligned faces."""
    ours = {1: 3, 2: 4, 3: 5, 4: 1, 5: 2, 6: 6, 7: 0}
    owners = tree.one("list_patition_label.txt") or tree.one("list_partition_label.txt")
    lists = [owners] if owners else [tree.one("train_labels.csv"), tree.one("test_labels.csv")]
    folders = chain(*tree.called.values())
    aligned = {n: os.path.join(f, n) for f in folders for n in names_in(f) if "_aligned." in n}
    for name, number in chain(*(read_rows(path, ("image", "label"), number=1) for path in lists)):
        name, number = re.sub(r"(_aligned)?\.\w+$", "_aligned.jpg", name), integer(number)
        if (number or 0) > 7:
            raise Problem(f"{tree.src} has the label {number}, so it is RAF-DB's compound set; "
                          f"give --src the basic set, with labels from 1 to 7.")
        if name.startswith(("train", "test")):
            yield Picture("train" if name.startswith("train") else "val", ours.get(number), name,
                          aligned.get(name))


def majority(votes: list[str]) -> int | None:
    """The label that ten votes of label.csv give, as in Table 5. A single vote counts as none;
    of the rest, "unknown" and "no face" included, one of the eight classes needs more than half."""
    votes = [0 if v in ("0", "1") else integer(v) or 0 for v in votes]
    best = max(range(10), key=lambda i: votes[i])
    return (0, 1, 3, 2, 6, 5, 4, 7, None, None)[best] if 2 * votes[best] > sum(votes) else None


def ferplus(tree: Download):
    """Pixels in a CSV file, or drawn pictures; votes in label.csv."""
    pixels = tree.one("fer2013.csv") or tree.one("icml_face_data.csv")
    greys = ferplus_rows(tree, pixels) if pixels else {}
    for name, split in (("Train", "train"), ("Valid", "valid"), ("Test", "val")):
        path = tree.one("label.csv", beside=f"FER2013{name}")
        for n, *votes in read_rows(path, ("name", "", *"0123456789"), number=2):
            source = greys.get(n) if pixels else tree.find(path.parent.name, n)
            yield Picture(split, majority(votes), n, source)


def ferplus_rows(tree: Download, pixels: Path) -> dict[str, bytes]:
    """Name -> 48 × 48 pixels. Row i of them is row i of fer2013new.csv, which has the name; the
    name's number is not its row. Four names stand twice: the row nearest to the number is right."""
    nearest, found = {}, {}
    names = [*read_rows(tree.one("fer2013new.csv"), ("Usage", "Image name", "neutral"), number=2)]
    for i, (_, name, _) in enumerate(names):
        nearest[name] = min(nearest.get(name, i), i, key=lambda j: abs(j - int(name[3:10] or 0)))
    rows = zip_longest(names, read_rows(pixels, ("emotion", "pixels", "Usage"), number=0),
                       fillvalue=("",) * 3)
    for i, ((usage, name, _), (_, grey, same)) in enumerate(progress(rows, len(names), "rows")):
        if usage != same:
            raise Problem(f"{pixels} needs a fer2013new.csv with the same rows; download both.")
        if name and nearest[name] == i:
            found[name] = bytes(min(int(v), 255) for v in re.findall(r"\d+", grey))
    return found


def sfew(tree: Download):
    """Aligned faces in folders by emotion."""
    ours = dict(neutral=0, happy=1, sad=2, surprise=3, fear=4, disgust=5, angry=6)
    for folder in chain(*tree.called.values()):
        if split := split_of(folder, "aligned_faces"):
            for n in names_in(folder):
                yield Picture(split, ours.get(folder.name.lower()), n, os.path.join(folder, n))


def muxspace(tree: Download):
    """legend.csv and images/ of a public repository. Ours: the splits, and that fear and contempt
    are left out, as 21 and 9 pictures are too few."""
    path, labels = tree.one("legend.csv"), {}
    used = {c[2:]: k for k, c in enumerate(CLASSES) if k not in (4, 7)}
    for name, emotion in read_rows(path, ("", "image", "emotion"), number=0):
        labels.setdefault(name, used.get(emotion.lower()))
    tested = draw_tested({name: k for name, k in labels.items() if k is not None})
    for name, label in labels.items():
        yield Picture("val" if name in tested else "train", label, name, tree.find("images", name))
    for name in {n for f in tree.called["images"] for n in names_in(f)} - labels.keys():
        yield Picture("", None, name, None)  # a file without a row


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


DATASETS = {
    "affectnet": (affectnet, "training.csv and validation.csv, or */annotations/*_exp.npy, or "
                  "human_annotated/*/annotations/*.json, and the pictures"),
    "rafdb": (rafdb, "basic/EmoLabel/list_patition_label.txt, or Kaggle's train_labels.csv and "
              "test_labels.csv, and aligned faces such as train_00001_aligned.jpg"),
    "ferplus": (ferplus, "label.csv in FER2013Train, FER2013Valid and FER2013Test, and fer2013.csv "
                "(or icml_face_data.csv) with fer2013new.csv, or FER2013Train/fer*.png (FER2013 in "
                "folders by emotion has lost the row numbers by which votes are found)"),
    "sfew": (sfew, "Train_Aligned_Faces/Angry, Val_Aligned_Faces/Angry and so on"),
    "muxspace": (muxspace, "legend.csv and images/")}


def collect(name: str, tree: Download) -> tuple[dict[str, Picture], Counter]:
    """What is to be made, with the file in its folder as name, by that name in lower case as some
    disks know just one; and how much is left out: (split, label or None, why) -> number."""
    pictures, skipped = {}, Counter()
    for p in DATASETS[name][0](tree):
        label, why = p.label if p.label in range(8) else None, ""
        if label is None:
            why = "none of the labels that are used" if p.split else "file without a row"
        elif p.box and (None in p.box or min(p.box[2:]) <= 0):
            why = "box is no integer" if None in p.box else "box without size"
        elif p.source is None:
            why = "file missing"
        else:
            stem, ending = os.path.splitext(f"{p.split}/{CLASSES[label]}/{p.name}")
            number, p = 1, p._replace(name=stem + ending)
            while (twin := pictures.setdefault(p.name.lower(), p)).box != p.box:
                number += 1  # another face of the same name gets a number
                p = p._replace(name=f"{stem}-{number}{ending}")
            why = "" if twin is p else "repeated"
        if why:
            skipped[p.split, label, why] += 1
    return pictures, skipped


def progress(items, total: int, what: str):
    """Passes items on, and tells how many, how fast, and how much longer."""
    start = last = time.perf_counter()
    for count, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - last >= 5 or count == total:
            last, rate = now, count / (now - start)
            print(f"{what}: {count:,} of {total:,}, {rate:,.0f} a second, "
                  f"{(total - count) / rate / 60:.1f} minutes left", flush=True)


def make(p: Picture, target: Path, size: int) -> str:
    """Makes one picture. Returns why it cannot be made, or "". Raises OSError if the disk fails."""
    drawn, content = isinstance(p.source, bytes), io.BytesIO()
    try:
        with Image.frombytes("L", (48, 48), p.source) if drawn else Image.open(p.source) as whole:
            whole.load()
            kind = FORMATS[target.suffix.lower()]
            if not p.box:  # a box counts in the picture as it is stored; all else is turned upright
                ImageOps.exif_transpose(whole, in_place=True)
            x, y, w, h = p.box or (0, 0, *whole.size)
            box = max(x, 0), max(y, 0), min(x + w, whole.width), min(y + h, whole.height)
            w, h = box[2] - box[0], box[3] - box[1]
            if w <= 0 or h <= 0:
                return "box outside the picture"
            scale = min(1, size / min(w, h)) if size > 0 else 1
            if scale == 1 and (w, h) == whole.size and not drawn and (
                    not p.box or whole.getexif().get(0x0112, 1) == 1):
                link(p.source, target)
                return ""
            cut = whole.convert("RGB").crop(box)
            if scale < 1:
                small = [max(1, round(v * scale)) for v in (w, h)]
                cut = cut.resize(small, Image.Resampling.LANCZOS)
            cut.save(content, kind, **dict(quality=95, subsampling=0) if kind == "JPEG" else {})
    except Exception as error:  # Pillow raises many kinds for broken files
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        return "cannot be decoded"
    write_whole(target, content.getvalue())
    return ""


def write_whole(target: Path, content: bytes) -> None:
    """A file appears whole or not at all."""
    part = target.with_name(f".{target.name}.part")
    part.write_bytes(content)
    part.replace(target)


def link(source: str, target: str | Path) -> None:
    """A hard link, or a copy where the disk is another one, or has no links."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        write_whole(Path(target), Path(source).read_bytes())


def make_all(pictures: dict, skipped: Counter, part: Path, size: int, workers: int) -> None:
    """Makes what is not there. Takes from `pictures` what cannot be made."""
    for folder in {os.path.dirname(p.name) for p in pictures.values()}:
        (part / folder).mkdir(parents=True, exist_ok=True)
    todo = [p for p in pictures.values() if not (part / p.name).exists()]
    print(f"{len(pictures) - len(todo):,} of {len(pictures):,} pictures are there already")
    # Threads, not processes: decoding, resizing and encoding let go of Python's lock.
    with ThreadPoolExecutor(workers) as pool:
        parts = (todo[k:k + 1024] for k in range(0, len(todo), 1024))
        made = (pair for some in parts for pair in zip(some, pool.map(
            lambda p: make(p, part / p.name, size), some)))
        for p, why in progress(made, len(todo), "pictures"):
            if why:
                skipped[p.split, p.label, why] += 1
                del pictures[p.name.lower()]
    for path in part.glob("*/*/*"):  # of a start on another download
        if path.relative_to(part).as_posix().lower() not in pictures:
            path.unlink()


def write_colours(part: Path) -> None:
    """colours.json: mean and standard deviation of the training pictures' channels."""
    counts = [0] * 768
    for path in part.glob("train/*/*"):
        counts = [a + b for a, b in zip(counts, Image.open(path).convert("RGB").histogram())]
    stat = ImageStat.Stat(counts)
    own = [[round(v / 255, 4) for v in values] for values in (stat.mean, stat.stddev)]
    (part / "colours.json").write_text(json.dumps(dict(zip(("mean", "std"), own))))


def link_seven(part: Path, out: Path, seven: Path) -> None:
    """AffectNet-7: its class folders are links to seven of `out`, which `part` will become."""
    half = seven.with_name(f"{seven.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    for folder in [f for f in part.glob("*/*") if f.name != CLASSES[7]]:
        target = half / folder.relative_to(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.symlink_to(Path("../..", out.name, folder.relative_to(part)), True)
        except OSError:  # no such links here: a hard link or a copy of every picture
            shutil.copytree(folder, target, copy_function=link)
    half.rename(seven)


def reasons(skipped: Counter, split: str, *labels: int | None) -> str:
    """What of a split, or of some classes of it, was left out and why."""
    count = Counter()
    for (s, k, why), n in skipped.items():
        count[why] += n * (s == split and (not labels or k in labels))
    return "; ".join(f"{n:,} skipped: {why}" for why, n in sorted(count.items()) if n)


def report(name: str, out: Path, pictures: dict[str, Picture], skipped: Counter) -> None:
    """Prints what was written and left out, class by class, beside Table 5."""
    written = Counter((p.split, p.label) for p in pictures.values())
    for split in sorted({split for split, _ in written}):
        paper = [*PAPER.get((name, split), ()), *[0] * 8][:8]
        counts = [written[split, k] for k in range(8)]
        print(f"\n{split:12} {'written':>9} {'Table 5':>9} {'more':>9}")
        for k, c, n, m in zip((*range(8), None), (*CLASSES, "total"), (*counts, sum(counts)),
                              (*paper, sum(paper))):
            beside = f"{m:9,} {n - m:+9,}" if m else f"{'-':>9} {'-':>9}"
            print(f"{c:12} {n:9,} {beside}  {reasons(skipped, split, k)}".rstrip())
    print(f"\n{out}: {len(pictures):,} pictures. {reasons(skipped, '')}")


def prepare(name: str, src: Path, out: Path, size: int, workers: int) -> None:
    """Reads the download, makes the pictures, tells what came of it."""
    part, seven = out.with_name(f"{out.name}.part-{size}"), out.with_name(f"{out.name}7")
    for folder in [out, seven] if name == "affectnet" else [out]:
        if folder.exists() and (folder == out or not part.exists()):
            raise Problem(f"{folder} is there already; move it away, or give another --out.")
    print(f"looking through {src}", flush=True)
    tree = Download(src)
    pictures, skipped = collect(name, tree)

    def check() -> None:
        for split in sorted({"train", "val"} - {p.split for p in pictures.values()}):
            packed = f"; unpack {', '.join(tree.packed[:4])} first" if tree.packed else ""
            raise Problem(f"{src} was searched for {DATASETS[name][1]}; no picture of {split} came "
                          f"of it ({reasons(skipped, split) or 'none found'}){packed}; "
                          f"data/README.md says what the owners ship.")

    check()
    make_all(pictures, skipped, part, size, workers)
    check()
    if name == "ferplus":
        write_colours(part)
    if name == "affectnet" and not seven.exists():
        link_seven(part, out, seven)
    part.rename(out)
    report(name, out, pictures, skipped)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a Problem."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DATASETS)
    parser.add_argument("--src", type=Path, required=True, help="the folder with the download")
    parser.add_argument("--out", type=Path, help="the folder to write [data/NAME]")
    parser.add_argument("--size", type=int, default=256, help="short side at most; 0: any [256]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads [cores]")
    args = parser.parse_args(argv)
    out = (args.out or Path(__file__).resolve().with_name(args.name)).absolute()
    try:
        prepare(args.name, args.src, out, args.size, args.workers)
    except (Problem, OSError, ImportError, csv.Error) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
