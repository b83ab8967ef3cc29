"""Draws a run's figures. (Sec. 4.4)

    python data/figures.py RUN                       what there is of it, to runs/RUN/figures/
    python data/figures.py RUN --compare RUN RUN     rows for other runs (Figs. 1 and 3)
    python data/figures.py RUN --init random         masks and reconstructions of the untrained net
    python data/figures.py RUN --init FILE           attention of another classifier of --eval
    python data/figures.py RUN --data FOLDER         pictures of another folder

The pictures are those of val/, or where there is none, of the folder. The ideas are in
`reconstruct`, `figure_refinement` and `grad_cam`; the rest is paint.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import fields
from itertools import chain, islice, zip_longest
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simfle
from probe import settings_of  # which knows the baselines too

# ===== 4.4 Drawing =====

# Pixels between cells, and of a line of text; the colours of curves.
GAP, LINE, COLOURS = 6, 18, ("#1f5fa8", "#d55e00", "#009e73", "#b0409a")


def write(on: Image.Image, x: float, y: float, text: str, size=13, anchor="la", colour="black"):
    """Text at a place of a picture; anchor as in Pillow."""
    ImageDraw.Draw(on).text((x, y), text, colour, ImageFont.load_default(size), anchor)


def width(lines: list[str], size: int) -> int:
    """Of the longest line, in pixels."""
    return round(max(map(ImageFont.load_default(size).getlength, "\n".join(lines).split("\n"))))


def heat(values: Tensor, low: float, high: float, size: int = 112) -> Image.Image:
    """h·h numbers as squares: dark blue is low or NaN, yellow is high. (ours)"""
    share = ((values.float() - low) / max(high - low, 1e-12)).clamp(0, 1).nan_to_num()
    share = share.reshape(math.isqrt(values.numel()), -1)
    picture = ImageOps.colorize(TF.to_pil_image(share), "#28145a", "#fae63c", mid="#28968c")
    return picture.resize((size, size), Image.Resampling.NEAREST)


def cell(x: Tensor, cam: Tensor | None = None, text: str | None = None) -> Image.Image:
    """A face (3, H, W) in [0, 1], under its attention (112, 112), over two lines of text if any."""
    face = TF.to_pil_image(x).resize((112, 112), Image.Resampling.BOX)
    if cam is not None:
        face = Image.blend(face, heat(cam, 0, 1), 0.5)
    if text is not None:
        face = ImageOps.expand(face, (0, 0, 0, 2 * LINE), "white")
        write(face, 0, 114, text, 12)
    return face


def sheet(title: str, rows: list[list[Image.Image]], names: list[str] = (),
          columns: list[str] = (), note: str = "") -> Image.Image:
    """Pictures of one size in rows with names, columns with names, and a note."""
    (w, h), top, left = rows[0][0].size, (2 + bool(columns)) * LINE, 2 * GAP + width(names, 13)
    wide = max(left + max(map(len, rows)) * (w + GAP), 2 * GAP + width([title, note], 17))
    picture = Image.new("RGB", (wide, top + len(rows) * (h + GAP) + 2 * LINE * bool(note)), "white")
    write(picture, GAP, GAP, title, 17)
    write(picture, GAP, picture.height - LINE, note, 12)
    for c, name in enumerate(columns):
        write(picture, left + c * (w + GAP) + w / 2, top - LINE, name, 12, "ma")
    for r, (row, name) in enumerate(zip_longest(rows, names, fillvalue="")):
        write(picture, GAP, top + r * (h + GAP) + h / 2, name, anchor="lm")
        for c, one in enumerate(row):
            picture.paste(one, (left + c * (w + GAP), top + r * (h + GAP)))
    return picture


def ticks(values: list[float]) -> dict[float, str]:
    """Round numbers that span the values, at most seven at equal distances, with their labels."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1
    p, step = next((p, m * 10.0**p) for p in range(-99, 99) for m in (1, 2, 5)
                   if 5 * m * 10.0**p >= span)
    first, last = math.floor(round(low / step, 6)), math.ceil(round((low + span) / step, 6))
    return {k * step: f"{k * step:,.{max(0, -p)}f}" for k in range(first, last + 1)}


def plot(title: str, curves: dict[str, list[tuple[float, float]]], *shown: float) -> Image.Image:
    """Up to four curves through points (x, y), with a legend of their names. What is not finite is
    left out. shown: numbers that the axis of y must reach."""
    curves = {name: [p for p in points if math.isfinite(p[1])] for name, points in curves.items()}
    x, y = zip(*sum(curves.values(), []) or [(0, 0.0)])
    below, beside = ticks(x), ticks([*y, *shown])
    picture = Image.new("RGB", (420, 190), "white")
    draw, (u0, *_, u1), (v0, *_, v1) = ImageDraw.Draw(picture), below, beside

    def at(u: float, v: float) -> tuple[float, float]:
        return 70 + 320 * (u - u0) / (u1 - u0), 165 - 120 * (v - v0) / (v1 - v0)

    write(picture, GAP, GAP, title, 14)
    for v, text in beside.items():
        draw.line([at(u0, v), at(u1, v)], "#dddddd")
        write(picture, 65, at(u0, v)[1], text, 12, "rm")
    for u, text in below.items():
        write(picture, at(u, v0)[0], 170, text, 12, "ma")
    for i, ((name, points), colour) in enumerate(zip(curves.items(), COLOURS)):
        write(picture, 70 + i * 320 / len(curves), 26, name, 12, colour=colour)
        draw.line([at(*p) for p in points], colour, 2)
        for u, v in map(at, *zip(*points)) if 0 < len(points) < 20 else ():
            draw.ellipse([u - 3, v - 3, u + 3, v + 3], colour)
    return picture


def read_faces(paths: list[str], size: int) -> Tensor:
    """Pictures as (B, 3, size, size) in [0, 1]. Raises UserError where one cannot be read."""
    faces = simfle.Faces(paths, image_size=size)
    return torch.stack([faces[0, i, i]["image"] for i in range(len(paths))]) / 255


# ===== 4.4 Masks and reconstructions =====


def unpatchify(patches: Tensor, mae: simfle.MaskedAutoencoder) -> Tensor:
    """The inverse of `mae.patchify`: (B, 49, 768) -> (B, 3, 112, 112)."""
    return rearrange(patches, "b (g h) (p q c) -> b c (g p) (h q)", g=mae.grid, p=mae.patch, c=3)


@torch.no_grad()
def reconstruct(model: nn.Module, x: Tensor, groups: list[int], colours) -> tuple[Tensor, ...]:
    """Masks faces and guesses what is masked. (Fig. 4)

    With `norm_pix` the autoencoder guesses a patch's pattern, not its light. Mean and standard
    deviation are then the original's.

    Args:
        x: faces (B, 3, 112, 112) in [0, 1].
        groups: the channel group of each image; empty for masking at random.
        colours: mean and standard deviation for `simfle.normalise`.
    Returns:
        x with the masked patches grey; what the autoencoder makes of that, the visible patches
        pasted back; the scores a (B, 49) that chose the mask."""
    ffl, mae, I = model.ffl, model.ffl.mae, simfle.normalise(x, colours)
    C = ffl.grouping(model.backbone(I)[0])
    torch.manual_seed(0)  # random masks are the same in every drawing
    a = ffl.masking.scores(C, torch.tensor(groups)) if groups else ffl.masking(C)[0]
    keep, mask = simfle.mask_lowest(a, ffl.masking.ratio)
    masked, patches = mask[:, :, None] > 0, mae.patchify(I)
    guess = mae.decode(mae.encode(patches, keep), keep)
    if mae.norm_pix:
        var, mean = torch.var_mean(patches, dim=2, keepdim=True)
        guess = guess * (var + simfle.PIXEL_EPS).sqrt() + mean
    mean, std = (torch.tensor(c)[:, None, None] for c in colours)
    whole = unpatchify(torch.where(masked, guess, patches), mae) * std + mean
    return unpatchify(torch.where(masked, 0.5, mae.patchify(x)), mae), whole.clamp(0, 1), a


def figures_masks(model: nn.Module, x: Tensor, colours):
    """Names and sheets: three faces masked eight times each, with the scores behind a semantic
    mask; and eight faces with their reconstructions. (Fig. 4 a, b)"""
    semantic = type(model.ffl.masking) is simfle.SemanticMasking
    groups = [i * model.ffl.groups // 8 for i in range(8)] if semantic else []
    above, columns = [], [f"group {g}" for g in groups] or ["one draw"] * 8
    for face in x[:3]:
        masked, _, scores = reconstruct(model, face.expand(8, -1, -1, -1), groups, colours)
        above.append([cell(p) for p in (face, *masked)])
        if semantic:
            above.append([cell(torch.ones_like(face)), *(heat(a, *a.aminmax()) for a in scores)])
    yield "masks", sheet("What the masking keeps (Fig. 4 a)", above,
                         ["masked", "score"] * len(x[:3]) * semantic, ["original", *columns],
                         "Grey patches are masked." + " Yellow: a map's highest score." * semantic)
    below = [x, *reconstruct(model, x, groups[:len(x)], colours)[:2]]
    light = " Mean and contrast of each patch are the original's." * model.ffl.mae.norm_pix
    yield "reconstructions", sheet("Reconstructed from what is kept (Fig. 4 b)",
                                   [[cell(p) for p in row] for row in below],
                                   ["original", "masked", "reconstructed"],
                                   note="Visible patches are pasted back." + light)


def figure_refinement(logs: dict[str, list[dict]]) -> Image.Image | None:
    """The error of masked patches by position, and how often a patch is kept, over the epochs that
    the logs hold. (Fig. 3: its upper row is a run with random masking, its lower one a semantic
    one's)"""
    rows, names = [], []
    logs = {run: some for run, log in logs.items() if (some := [r for r in log if "masked" in r])}
    for run, records in logs.items():
        epochs = sorted({r["epoch"] for r in records})
        few = [epochs[i] for i in torch.linspace(0, len(epochs) - 1, min(8, len(epochs))).int()]
        sums = [torch.tensor([(r["masked_error"], r["masked"]) for r in records
                              if r["epoch"] == epoch]).sum(dim=0) for epoch in few]
        error, masked = torch.stack(sums, dim=1)  # (8, 49) each
        # The share of the patches that is masked, over the mean of the counts.
        hidden = simfle.mask_lowest(masked[:1], simfle.run_settings(run)["mask_ratio"])[1].mean()
        for name, maps in (("error where masked", error / masked),
                           ("share kept", 1 - hidden * masked / masked.mean(dim=1, keepdim=True))):
            seen = maps[maps.isfinite()]  # a patch that was never masked has no error
            low, high = seen.min().item(), seen.max().item()
            rows.append([heat(m, low, high) for m in maps])
            names += [f"{run}: {name}\nepochs {str(few)[1:-1]}\nblue {low:.3g}, yellow {high:.3g}"]
    return sheet("What is hard, and what is kept (Fig. 3)", rows, names) if rows else None


# ===== 4.4 Attention and numbers =====


def spoken(name: str) -> str:
    """A class's name without the digits that order the folders: 1_happiness -> happiness."""
    return re.sub(r"^\d+_(?=.)", "", name)


def grad_cam(A: Tensor, gradient: Tensor, size: int = 112) -> Tensor:
    """Where a classifier looks for a class. (Sec. 4.4, Grad-CAM) A (B, c′, h, w): the last map;
    gradient (B, c′): of the class's logit, summed over A's positions; behind a mean and a linear
    layer, the layer's row of the class. Returns (B, size, size) from 0 to 1."""
    cam = torch.einsum("bk,bkhw->bhw", gradient, A).relu()[:, None]
    cam = nn.functional.interpolate(cam, size=size, mode="bilinear")[:, 0]
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def classifier(path: Path):
    """A saved classifier as a function: paths -> pictures (B, 3, H, W) in [0, 1], the names of the
    classes they are taken for, attention for those (B, 112, 112). Raises UserError."""
    saved = simfle.load_file(path) if path.exists() else {}
    if not saved.keys() >= {"classes", "size", "arch", "mean", "std", "model"}:
        raise simfle.UserError(f"{path} is missing or no classifier; --init is random or "
                               f"one of --eval.")
    net = simfle.RESNETS[saved["arch"]]().eval()
    net.fc = nn.Linear(net.fc.in_features, len(saved["classes"]))
    simfle.load_weights(path, net, saved["model"])

    @torch.no_grad()
    def look(paths: list[str]) -> tuple[Tensor, list[str], Tensor]:
        x = read_faces(paths, saved["size"])
        A = simfle.feature_map(net, simfle.normalise(x, (saved["mean"], saved["std"])))
        label = net.fc(A.mean(dim=(2, 3))).argmax(dim=1)
        return x, [spoken(saved["classes"][k]) for k in label], grad_cam(A, net.fc.weight[label])
    return look


def find_classifier(name: str, data: str) -> Path | None:
    """A run's own classifier: of this data before others, linear before others."""
    found = []
    for path in Path("runs", name).glob("eval-*.json"):
        made = json.loads(path.read_bytes())["settings"]
        if not made["init"] or Path(made["init"]).resolve().parent == path.parent.resolve():
            found.append((simfle.data_name(made["data"]) != data, made["eval"] != "linear",
                          path.stem, path.with_name(path.stem.removeprefix("eval-") + ".pt")))
    return min(found, default=[None])[-1]


def figure_attention(title: str, looks: dict, pictures: list[tuple]) -> Image.Image:
    """Grad-CAM for some pictures (path, class or None), a row for each run. (Figs. 1, 6, 8)"""
    paths, classes = zip(*pictures)
    seen = [look(paths) for look in looks.values()]
    rows = [[cell(x, text=f"is\n{true}" if true else "") for x, true in zip(seen[0][0], classes)]]
    rows += [[cell(x, cam, f"taken for\n{guess}") for x, guess, cam in zip(*one)] for one in seen]
    return sheet(title, rows, ["picture", *looks],
                 note="Yellow speaks for the class that was named; each picture has its own scale.")


def figure_confusion(result: dict, name: str) -> Image.Image:
    """Rows are what pictures are, columns what they were taken for, in percent. (Fig. 7)"""
    names, rows = [spoken(name) for name in result["per_class"]], []
    for row in 100 * nn.functional.normalize(torch.tensor(result["confusion"]).float(), 1, dim=1):
        rows.append([heat(v, 0, 100, 84) for v in row])
        for one, v in zip(rows[-1], row.tolist()):
            write(one, 42, 42, f"{v:.1f}", 14, "mm", "black" if v > 60 else "white")
    return sheet(f"{name}: rows are the class, columns what it was taken for, % (Fig. 7)", rows,
                 names, [n[:14] for n in names], f"accuracy {result['accuracy']:.2f} %, mean of "
                 f"the classes {result['mean_accuracy']:.2f} %, {result['images']} images")


def figure_sweep(key: str, own: dict, data: str) -> Image.Image | None:
    """Linear accuracy on `data` against α or β: for each value the mean over the runs that were
    pre-trained as `own` but for it and the seed; None where there is one value. (Fig. 5)"""
    points = {}
    same = {f.name for f in fields(simfle.Settings) if not f.metadata["free"]} - {key, "seed"}
    same |= {"data", "lr", "weight_decay", "batch_size", "epochs", "steps", "init"}
    for path in sorted(Path("runs").glob(f"*/eval-linear-{data}.json")):
        result = json.loads(path.read_bytes())
        settings = result["pretraining"]  # of the net that was evaluated
        if settings and all(settings.get(k) == own.get(k) for k in same):
            points.setdefault(settings[key], []).append(result["accuracy"])
    curve = [(x, sum(ys) / len(ys)) for x, ys in sorted(points.items())]
    return plot(f"linear accuracy, %, by {key} (Fig. 5)", {"": curve}) if len(curve) > 1 else None


def figure_curves(records: list[dict], alpha: float, beta: float) -> Image.Image | None:
    """What the log holds, over the steps. One plot has the terms of Eq. 6 as they enter the sum:
    alpha times L_d and beta times L_g."""
    eq6, eq2 = "terms of the loss (Eq. 6)", "mean squared cosine D of channels (Eq. 2)"
    known = {"L_s": (eq6, "L_s", 1), "L_r": (eq6, "L_r", 1), "L_d": (eq6, f"{alpha:g} L_d", alpha),
             "L_g": (eq6, f"{beta:g} L_g", beta), "D2_between": (eq2, "between groups", 1),
             "D2_within": (eq2, "within groups", 1), "rate": ("learning rate", "", 1),
             "spread": ("spread of z (0: collapse)", "", 1), "gradient": ("gradient norm", "", 1)}
    curves = {}
    for key in dict.fromkeys([*known, *(k for r in records for k in r if k != "loss")]):
        title, name, w = known.get(key, (key, "", 1))
        if points := [(r["step"], w * r[key]) for r in records if isinstance(r.get(key), float)]:
            curves.setdefault(f"{title}, by step", {})[name] = points
    plots = [plot(*curve, 0) for curve in curves.items()]
    return sheet("The log", [plots[i:i + 2] for i in range(0, len(plots), 2)]) if plots else None


# ===== 4.4 All of them =====


def some_pictures(folder: Path, seed: int, count: int) -> list[tuple[str, str | None]]:
    """Pictures with their classes from val/, class after class in turn; else any, with None."""
    val = folder / "val" if (folder / "val").is_dir() else folder
    if val == folder or not any(p.is_dir() and p.name[0] not in "._" for p in val.iterdir()):
        return [(p, None) for p in simfle.find_pictures(val)[:count]]
    classes, paths, labels = simfle.labelled_pictures(val)
    order = torch.randperm(len(paths), generator=simfle.generator_of(seed, "figures")).tolist()
    turns = zip_longest(*([i for i in order if labels[i] == k] for k in range(len(classes))))
    return [(paths[i], spoken(classes[labels[i]])) for i in chain(*turns) if i is not None][:count]


def read_log(run: str) -> list[dict]:
    """The lines of a run's log that are whole."""
    lines = Path("runs", run, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line[:1] + line[-1:] == "{}"]


def figures_of(args: argparse.Namespace, s: simfle.Settings, folder: Path):
    """Names and pictures of all that there is to draw; None for what there is too little of."""
    run, untrained = Path("runs", args.run), args.init == "random"
    model, pictures, looks = simfle.build_model(s).eval(), some_pictures(folder, s.seed, 512), {}
    if not args.init and not args.data:  # what depends on neither
        logs = {name: read_log(name) for name in (args.run, *args.compare)}
        yield "curves", figure_curves(logs[args.run], s.alpha, s.beta)
        yield "refinement", figure_refinement(logs)
        for path in sorted(run.glob("eval-*.json")):
            name, result = path.stem.removeprefix("eval-"), json.loads(path.read_bytes())
            yield f"confusion-{name}", figure_confusion(result, name)
            data = simfle.data_name(result["settings"]["data"])
            for key in ("alpha", "beta") if name == f"linear-{data}" else ():
                yield f"{key}-{data}", figure_sweep(key, vars(s), data)
    if not untrained:
        path = run / "checkpoint.pt"
        simfle.load_weights(path, model, simfle.load_file(path)["model"])
    if model.ffl is not None and args.init in ("", "random"):
        x = read_faces([p for p, _ in pictures[:8]], s.ffl_size)
        yield from figures_masks(model, x, simfle.colours_of(folder))
    for name in () if untrained else (args.run, *args.compare):
        own = find_classifier(name, simfle.data_name(str(folder)))
        path = Path(args.init) if args.init and name == args.run else own
        if path:
            looks[f"{name}\n{path.stem}"] = classifier(path)
            net = Path("runs", name, "backbone.pt")
            if path == own and path.stem == f"linear-{simfle.data_name(str(folder))}" and (
                    net.exists() and simfle.load_start(net, s.arch)["start"]
                    != simfle.load_file(path).get("start")):
                print(f"{path} is of an earlier {net}; evaluate again.")
        else:
            print(f"runs/{name} has no classifier to draw the attention of; make one with --eval.")
    if looks:
        title, look = "Where the classifier looks (Figs. 1, 6, 8)", next(iter(looks.values()))
        yield "attention", figure_attention(title, looks, pictures[:8])
        wrong = ((path, true) for path, true in pictures if true and look([path])[1] != [true])
        if wrong := list(islice(wrong, 8)):
            yield "mistakes", figure_attention("Taken for another class (Fig. 8 b)", looks, wrong)


def draw(args: argparse.Namespace) -> None:
    """Draws what there is of a run into runs/RUN/figures. Raises UserError."""
    s, *_ = [settings_of(name) for name in (args.run, *args.compare)]
    folder, target = simfle.find_data(args.data or s.data), Path("runs", args.run, "figures")
    suffix = "-untrained" if args.init == "random" else f"-{Path(args.init).stem}" * bool(args.init)
    suffix += f"-{simfle.data_name(args.data)}" if args.data else ""  # beside the run's own
    for name, picture in figures_of(args, s, folder):
        if picture is not None:
            path = target / f"{name}{suffix}.png"
            picture = ImageOps.expand(picture, (0, 0, 0, LINE), "white")
            write(picture, GAP, picture.height - LINE, args.run + suffix, 12, "la", "grey")
            simfle.write_whole(path, lambda file: picture.save(file, "PNG"))
            print(path)


def main(argv: list[str] | None = None) -> int:
    """Draws. Returns the exit code, see `simfle.program`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     usage="%(prog)s RUN [options]")
    parser.add_argument("run", metavar="RUN", help="a pre-training's --name: reads runs/RUN/")
    parser.add_argument("--compare", nargs="+", default=[], help="other runs (Figs. 1 and 3)")
    parser.add_argument("--init", default="", help="random, or a classifier; default: the run's")
    parser.add_argument("--data", default="", help="folder, or name in data/; default: the run's")
    args = parser.parse_args(argv)
    return simfle.program("figures", lambda: draw(args))


if __name__ == "__main__":
    sys.exit(main())
