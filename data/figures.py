"""Draws a run: Figs. 1 and 3 to 8 of the paper, and its training curves. (Sec. 4.4)

    python data/figures.py RUN [--compare RUN RUN] [--init random | FILE] [--data FOLDER]
"""

import argparse
import json
import math
import re
from itertools import chain, zip_longest
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.transforms import functional as TF

import probe  # which knows the baselines too
from probe import simfle

GAP, LINE = 6, 18  # pixels between cells, and of a line of text
COLOURS = "#1f5fa8", "#d55e00", "#009e73", "#b0409a"  # of curves
ORDER = re.compile(r"^\d+_(?=.)")  # what orders the folders of classes, as in 1_happiness


def write(on: Image.Image, x: float, y: float, text: str, size=13, anchor="la", colour="black"):
    """Writes text; anchor as in Pillow."""
    ImageDraw.Draw(on).text((x, y), text, colour, ImageFont.load_default(size), anchor)


def heat(values: Tensor, low: float, high: float, size: int = 112) -> Image.Image:
    """h·h numbers as squares: dark blue is low or NaN, yellow is high."""
    share = ((values - low) / max(high - low, 1e-12)).clamp(0, 1).nan_to_num()
    grey = TF.to_pil_image(share.reshape(math.isqrt(values.numel()), -1)).resize((size, size), 0)
    return ImageOps.colorize(grey, "#28145a", "#fae63c", mid="#28968c")


def cell(x: Tensor, cam: Tensor | None = None, text: str | None = None, colour="black"):
    """A face (3, H, W) in [0, 1], under its attention (112, 112), above a line of text if any."""
    face = TF.to_pil_image(x).resize((112, 112), Image.Resampling.BOX)
    if cam is not None:
        face = Image.blend(face, heat(cam, 0, 1), 0.5)
    if text is not None:
        face = ImageOps.expand(face, (0, 0, 0, LINE), "white")
        write(face, 56, 114, text[:16], 12, "ma", colour)
    return face


def sheet(title: str, rows: list[list[Image.Image]], names=(), columns=(), note="") -> Image.Image:
    """Pictures of one size in rows with names, columns with names, and a note."""
    (w, h), top, font = rows[0][0].size, (2 + bool(columns)) * LINE, ImageFont.load_default(13)
    left = 2 * GAP + round(max(map(font.getlength, "\n".join(names).split("\n"))))
    picture = Image.new("RGB", (max(left + max(map(len, rows)) * (w + GAP), 620),
                                top + len(rows) * (h + GAP) + 2 * LINE), "white")
    write(picture, GAP, GAP, title, 17)
    write(picture, GAP, picture.height - 2 * LINE, note, 12)
    for c, name in enumerate(columns):
        write(picture, left + c * (w + GAP) + w / 2, top - LINE, name, 12, "ma")
    for r, (row, name) in enumerate(zip_longest(rows, names[:len(rows)], fillvalue="")):
        write(picture, GAP, top + r * (h + GAP) + h / 2, name, anchor="lm")
        for c, one in enumerate(row):
            picture.paste(one, (left + c * (w + GAP), top + r * (h + GAP)))
    return picture


def ticks(values: list[float]) -> dict[float, str]:
    """Round numbers that span the values, at most seven at equal distances, with their labels."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1
    step = next(m * 10.0**p for p in range(-99, 99) for m in (1, 2, 5) if 5 * m * 10.0**p >= span)
    first, last = math.floor(low / step + 1e-6), math.ceil((low + span) / step - 1e-6)
    return {k * step: f"{k * step:,.9g}" for k in range(first, last + 1)}


def plot(title: str, curves: dict, shown=(), below=None) -> Image.Image:
    """Up to four curves {name: [(x, y), ...]}. shown: y must reach these; below: labels of x."""
    def at(u: float, v: float) -> tuple[float, float]:
        return 70 + 320 * (u - u0) / (u1 - u0), 165 - 120 * (v - v0) / (v1 - v0)

    x, y = zip(*chain(*curves.values()))
    below, beside = below or ticks(x), ticks([*y, *shown])
    picture, (u0, *_, u1), (v0, *_, v1) = Image.new("RGB", (420, 190), "white"), below, beside
    draw = ImageDraw.Draw(picture)
    write(picture, GAP, GAP, title, 14)
    for v, text in beside.items():
        draw.line([at(u0, v), at(u1, v)], "#dddddd")
        write(picture, 65, at(u0, v)[1], text, 12, "rm")
    for u, text in below.items():
        write(picture, at(u, v0)[0], 170, text, 12, "ma")
    for i, ((name, points), colour) in enumerate(zip(curves.items(), COLOURS)):
        write(picture, 70 + i * 320 / len(curves), 26, name, 12, colour=colour)
        draw.line([at(*p) for p in points], colour, 2)
        for u, v in [at(*p) for p in points] if len(points) < 9 else ():
            draw.ellipse((u - 3, v - 3, u + 3, v + 3), colour)
    return picture


def read_log(run: str) -> list[dict]:
    """The lines of a run's log; of a step that stands there twice the last counts."""
    probe.settings_of(run)  # tells if there is no such run
    lines = map(json.loads, Path("runs", run, "log.jsonl").read_text().splitlines())
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


def read_faces(paths: list[str], size: int) -> Tensor:
    """Pictures as (B, 3, size, size) in [0, 1]."""
    return torch.stack([simfle.Faces([p], image_size=size)[0, 0]["image"] for p in paths]) / 255


def reconstruct(model: nn.Module, x: Tensor, groups: list[int], colours: Tensor):
    """Masks faces x (B, 3, 112, 112) in [0, 1] by a channel group each, or without `groups` by the
    model's draw. Returns x with masked patches grey, x with predicted ones, the scores. (Fig. 4)"""
    ffl, mae, I = model.ffl, model.ffl.mae, simfle.normalise(x, colours)
    torch.manual_seed(0)  # for random scores, and for the order of equal ones
    C = ffl.grouping(model.backbone(I))
    a = (simfle.patch_scores(C, torch.tensor(groups), ffl.groups, ffl.image_size, ffl.patch)
         if groups else ffl.scores(C))
    keep, mask = simfle.mask_lowest(a, ffl.ratio)
    masked, patches = mask[:, :, None] > 0, mae.patchify(I)
    whole = mae.decode(mae.encode(patches, keep), keep)
    if mae.norm_pix:
        var, mean = torch.var_mean(patches, dim=2, keepdim=True)
        whole = whole * (var + 1e-6).sqrt() + mean
    grey, whole = torch.where(masked, 0.5, mae.patchify(x)), torch.where(masked, whole, patches)
    grey, whole = (rearrange(p, "b (g h) (p q c) -> b c (g p) (h q)", g=mae.grid, p=mae.patch, c=3)
                   for p in (grey, whole))
    return grey, (whole * colours[1] + colours[0]).clamp(0, 1), a


def figures_masks(model: nn.Module, x: Tensor, colours: Tensor) -> dict[str, Image.Image]:
    """Three faces masked eight times, with the scores; eight reconstructions. (Fig. 4 a, b)"""
    drawn = getattr(model.ffl.scores, "__func__", None) is not simfle.FaceMAE.scores  # not by group
    groups, above = [] if drawn else [i * model.ffl.groups // 8 for i in range(8)], []
    for face in x[:3]:
        masked, _, scores = reconstruct(model, face.expand(8, -1, -1, -1), groups, colours)
        above.append([cell(p) for p in (face, *masked)])
        above.append([cell(torch.ones_like(face)), *(heat(a, *a.aminmax()) for a in scores)])
    below = [[*map(cell, p)] for p in (x, *reconstruct(model, x, groups[:len(x)], colours)[:2])]
    too = ", means and contrasts" * model.ffl.mae.norm_pix
    return {"masks": sheet("What the masking keeps (Fig. 4 a)", above, ["masked", "score"] * 3,
                           ["original", *([f"group {g}" for g in groups] or ["one draw"] * 8)],
                           "Grey: masked. Yellow: a map's highest score. All blue: all are equal."),
            "reconstructions": sheet("Reconstructed from what is kept (Fig. 4 b)", below,
                                     ["original", "masked", "reconstructed"], (),
                                     f"Visible patches{too} are the original's.")}


def figure_refinement(logs: dict[str, list[dict]]) -> Image.Image | None:
    """By patch the error where it was masked, and the share of images that kept it. (Fig. 3)"""
    rows, names = [], []
    for run, log in logs.items():
        if lines := [(line["masked_error"], line["masked"]) for line in log if "masked" in line]:
            parts = torch.tensor(lines).tensor_split(min(8, 1 + len(lines) // 10))
            error, masked = torch.stack([part.sum(dim=0) for part in parts], dim=1)  # (parts, 49)
            N_m = simfle.mask_lowest(masked[:1], probe.settings_of(run)["mask_ratio"])[1].sum()
            kept = 1 - N_m * masked / masked.sum(dim=1, keepdim=True)
            for name, maps in (("error where masked", error / masked), ("share kept", kept)):
                low, high = maps[maps.isfinite()].aminmax()  # a patch never masked has no error
                rows.append([heat(m, low, high) for m in maps])
                names.append(f"{run}: {name}\nblue {low:.3g}, yellow {high:.3g}")
    return rows and sheet("What is hard, and what is kept (Fig. 3)", rows, names, (),
                          "From left to right: equal parts of the run.")


def figure_curves(log: list[dict], alpha: float, beta: float) -> Image.Image:
    """The log by step. The terms of Eq. 6 are drawn as they enter the sum."""
    weights, plots = {"L_d": alpha, "L_g": beta}, []
    for title, *keys in (("terms of the loss (Eq. 6)", "L_d", "L_s", "L_r", "L_g"),
                         ("L_d again, on its own scale", "L_d"), ("learning rate", "lr"),
                         ("mean squared cosine of channels (Eq. 2)", "D2_between", "D2_within"),
                         ("spread of z (0: collapse)", "spread"), ("gradient norm", "gradient")):
        curves = {f"{weights[key]:g} {key}" if key in weights else key:
                  [(line["step"], weights.get(key, 1) * line[key]) for line in log]
                  for key in keys if key in log[0]}
        if curves:
            plots.append(plot(f"{title}, by step", curves, [0]))
    return sheet("The log", [plots[i:i + 2] for i in range(0, len(plots), 2)])


def figure_sweep(path: Path) -> Image.Image | None:
    """Accuracy by α or β, over results that differ in it and the seed alone. (Fig. 5)"""
    results, plots = [json.loads(p.read_text()) for p in Path("runs").glob(f"*/{path.name}")], []
    own, free = json.loads(path.read_text())["settings"], {
        "name", "seed", "fresh", "workers", "save_every", "log_every", "start_weights", "run"}
    for key in ("alpha", "beta") if "run" in own and not own["init"] else ():  # a run's own net
        points = {}
        for s, accuracy in [(result["settings"], result["accuracy"]) for result in results]:
            pairs = (s, own), (s.get("run", {}), own["run"])
            if all(a.get(k) == b.get(k) for a, b in pairs for k in (a | b).keys() - free - {key}):
                points.setdefault(s["run"][key], []).append(accuracy)
        if len(points) > 1:
            curve = [(i, sum(points[v]) / len(points[v])) for i, v in enumerate(sorted(points))]
            plots.append(plot(f"{path.stem}, %, by {key}", {"": curve}, (),
                              {i: f"{v:g}" for i, v in enumerate(sorted(points))}))
    return plots and sheet("Accuracy by the weights of Eq. 6 (Fig. 5)", [plots])


def figure_confusion(result: dict, name: str) -> Image.Image:
    """Rows are what pictures are, columns what they were taken for, in percent. (Fig. 7)"""
    counts, rows = torch.tensor(result["confusion"]), []
    names = [ORDER.sub("", name)[:14] for name in result["classes"]]
    for row in 100 * nn.functional.normalize(counts, p=1, dim=1):
        rows.append([heat(v, 0, 100, 84) for v in row])
        for one, v in zip(rows[-1], row.tolist()):
            write(one, 42, 42, f"{v:.1f}", 14, "mm", "black" if v > 60 else "white")
    return sheet("Rows: the class; columns: what it was taken for; % (Fig. 7)", rows, names, names,
                 f"{name}: accuracy {result['accuracy']:.2f} %, mean of the classes "
                 f"{result['mean_accuracy']:.2f} %, {counts.sum():,.0f} images")


def grad_cam(path: Path, paths: list[str]) -> tuple[Tensor, list[str], Tensor]:
    """A classifier's pictures (B, 3, H, W), its predictions, and where it looks for these (B, 112,
    112) in [0, 1]: its map, weighted by the logit's gradient, which is `fc`'s row. (Sec. 4.4)"""
    saved = simfle.load_file(path)
    if "classes" not in saved:
        raise simfle.UserError(f"{path} is no classifier of simfle.py --eval or data/probe.py")
    net = simfle.make_resnet(saved["arch"])
    backbone = simfle.make_backbone(net)
    net.fc = nn.Linear(backbone.channels, len(saved["classes"]))
    net.load_state_dict(saved["model"])
    x = read_faces(paths, saved["size"])
    A = backbone.eval()(simfle.normalise(x, saved["colours"]))
    label = net.fc(A.mean(dim=(2, 3))).argmax(dim=1)
    cam = TF.resize(torch.einsum("bk,bkhw->bhw", net.fc.weight[label], A).relu(), [112, 112])
    cam = cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return x, [ORDER.sub("", saved["classes"][k]) for k in label], cam


def figure_attention(seen: dict, classes: list[str]) -> Image.Image:
    """`grad_cam` by classifier: five pictures that the first gets right, five wrong."""
    (x, guess, _), *_ = seen.values()
    wrong = [i for i, true in enumerate(classes) if true not in ("", guess[i])]
    some = [i for i in range(len(x)) if i not in wrong][:5] + wrong[:5]
    rows = [[cell(x[i], text=classes[i]) for i in some]]
    rows += [[cell(x[i], cam[i], guess[i], COLOURS[classes[i] not in ("", guess[i])]) for i in some]
             for x, guess, cam in seen.values()]
    return sheet("Where the classifier looks (Figs. 1, 6, 8)", rows,
                 ["picture" + "\nand its class" * any(classes), *seen], (),
                 "Below: the prediction, orange if wrong. Yellow: what speaks for it.")


def some_pictures(data: Path, count: int) -> list[tuple[str, str]]:
    """Pictures and classes from val/, class by class in turn; without classes, pictures and ""."""
    folders = {ORDER.sub("", p.name): p for p in sorted(data.glob("val/[!.]*/"))} or {"": data}
    found = [(path, name) for name in folders for path in simfle.find_pictures(folders[name])]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    each = [[found[i] for i in order if found[i][1] == name] for name in folders]
    return [*filter(None, chain(*zip_longest(*each)))][:count]


@torch.no_grad()
def draw(argv: list[str] | None) -> None:
    """Draws what the command line asks for and the run has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", metavar="RUN", help="the --name of a pre-training")
    add("--compare", nargs="+", default=[], metavar="RUN", help="other runs (Figs. 1, 3 and 6)")
    add("--init", default="", help="random, or a classifier; default: the run's linear, or probe")
    add("--data", default="", help="a folder, or its name in data/; default: the run's")
    args = parser.parse_args(argv)
    runs, folder, figures, seen = [args.name, *args.compare], Path("runs", args.name), {}, {}
    s = argparse.Namespace(**probe.settings_of(args.name))
    data = simfle.find_data(args.data or s.data)
    paths, classes = zip(*some_pictures(data, 64))
    logs = {run: read_log(run) for run in runs}
    if not args.init and not args.data:  # what depends on neither
        figures["curves"] = figure_curves(logs[args.name], s.alpha, s.beta)
        figures["refinement"] = figure_refinement(logs)
        for path in sorted(folder.glob("*.json")):
            if "confusion" in (result := json.loads(path.read_text())):
                figures[f"confusion-{path.stem}"] = figure_confusion(result, path.stem)
                figures[f"sweep-{path.stem}"] = figure_sweep(path)
    if args.init in ("", "random") and "masked" in logs[args.name][0]:
        model = probe.model_of(args.name, torch.device("cpu"), args.init == "random")
        x, colours = read_faces(paths[:8], s.ffl_size), simfle.colours_of(data, torch.device("cpu"))
        figures |= figures_masks(model, x, colours)
    for run in runs if args.init != "random" else ():
        found = [path for d in (data, s.data) for kind in ("linear", "probe")
                 if (path := Path("runs", run, f"{kind}-{Path(d).absolute().name}.pt")).exists()]
        for path in ([Path(args.init)] if args.init and run == args.name else found)[:1]:
            seen[f"{path.absolute().parent.name}\n{path.stem}"] = grad_cam(path, paths)
    figures["attention"] = seen and figure_attention(seen, classes)
    of = "-".join(filter(None, (Path(args.init).stem, args.data and data.absolute().name)))
    (folder / "figures" / of).mkdir(exist_ok=True, parents=True)
    for name, picture in figures.items():
        if picture:
            write(picture, GAP, picture.height - LINE, f"{args.name} {of}", 12, colour="grey")
            picture.save(path := folder / "figures" / of / f"{name}.png")
            print(path)


def main(argv: list[str] | None = None) -> int:
    return probe.main(argv, draw)


if __name__ == "__main__":
    simfle.leave(main())
