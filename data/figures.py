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
import sys
from collections import defaultdict
from dataclasses import fields
from itertools import islice, zip_longest
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import baselines
import simfle

# ===== 4.4 Drawing =====

GAP, LINE = 6, 18  # pixels between cells, and of a line of text


def write(picture: Image.Image, x: float, y: float, text: str, size: int = 13, anchor: str = "la",
          colour: str = "black") -> None:
    """Text at a place; anchor as in Pillow."""
    ImageDraw.Draw(picture).text((x, y), text, colour, ImageFont.load_default(size), anchor)


def heat(values: Tensor, low: float, high: float, scale: int = 16) -> Image.Image:
    """(h, w) numbers as a picture of squares: dark blue is low or NaN, yellow is high. (ours)"""
    share = ((values.float() - low) / max(high - low, 1e-12)).clamp(0, 1).nan_to_num()
    picture = ImageOps.colorize(TF.to_pil_image(share), "#28145a", "#fae63c", mid="#28968c")
    return ImageOps.scale(picture, scale, Image.Resampling.NEAREST)


def cell(x: Tensor, cam: Tensor | None = None, text: str | None = None) -> Image.Image:
    """A face (3, H, W) in [0, 1], under its attention (H, W), over two lines of text if any."""
    face = TF.to_pil_image(x).resize((112, 112), Image.Resampling.BOX)
    if cam is not None:
        face = Image.blend(face, heat(cam, 0, 1, 1).resize(face.size), 0.5)
    if text is not None:
        face = ImageOps.expand(face, (0, 0, 0, 2 * LINE), "white")
        write(face, 0, 114, text, 12)
    return face


def sheet(title: str, rows: list[list[Image.Image]], names: list[str] = (),
          columns: list[str] = (), note: str = "") -> Image.Image:
    """Pictures of one size in rows with names, columns with names, and a note."""
    draw, (w, h), top = ImageDraw.Draw(rows[0][0]), rows[0][0].size, (2 + bool(columns)) * LINE
    left, wide = (round(2 * GAP + draw.textbbox((0, 0), "\n".join(lines),
                                                ImageFont.load_default(size))[2])
                  for lines, size in ((names, 13), ((title, note), 17)))
    picture = Image.new("RGB", (max(left + max(map(len, rows)) * (w + GAP), wide),
                                top + len(rows) * (h + GAP) + 2 * LINE * bool(note)), "white")
    write(picture, GAP, GAP, title, 17)
    write(picture, GAP, picture.height - LINE, note, 12)
    for c, name in enumerate(columns):
        write(picture, left + c * (w + GAP) + w / 2, top - LINE, name, 12, "ma")
    for r, (row, name) in enumerate(zip_longest(rows, names, fillvalue="")):
        write(picture, GAP, top + r * (h + GAP) + h / 2, name, anchor="lm")
        for c, one in enumerate(row):
            picture.paste(one, (left + c * (w + GAP), top + r * (h + GAP)))
    return picture


def plot(title: str, points: list[tuple[float, float]]) -> Image.Image:
    """A curve through points (x, y) at equal distances; what is not finite is left out."""
    x, y = zip(*[p for p in points if math.isfinite(p[1])] or [(0, 0.0)])
    last, low, high = len(x) - 1, min(y), max(y)
    at = [(70 + 320 * i / max(1, last), 160 - 120 * (v - low) / (high - low or 1))
          for i, v in enumerate(y)]
    picture = Image.new("RGB", (420, 190), "white")
    draw = ImageDraw.Draw(picture)
    write(picture, GAP, GAP, title, 14)
    for k in range(5):
        i, height = round(k / 4 * last), 160 - 30 * k
        draw.line([(70, height), (390, height)], "#dddddd")
        write(picture, 65, height, f"{low + k / 4 * (high - low):.4g}", 12, "rm")
        write(picture, at[i][0], 165, f"{x[i]:,}", 12, "ma")
    draw.line(at, "#1f5fa8", 2)
    for u, v in at if last < 20 else ():
        draw.ellipse([u - 3, v - 3, u + 3, v + 3], "#1f5fa8")
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
def reconstruct(model: nn.Module, x: Tensor, draws: list[int], colours) -> tuple[Tensor, Tensor]:
    """x (B, 3, 112, 112) in [0, 1]; draws: the channel group of each image (for other maskings than
    the semantic one, draws[0] is the seed of all) -> x with the masked patches grey; what the
    autoencoder makes of that, the visible patches pasted back. (Fig. 4) With `norm_pix` it guesses
    a patch's pattern, not its light: mean and standard deviation are the original's."""
    ffl, mae, I = model.ffl, model.ffl.mae, simfle.normalise(x, colours)
    C = ffl.grouping(model.backbone(I)[0])
    semantic = type(ffl.masking) is simfle.SemanticMasking
    torch.manual_seed(draws[0])
    a = ffl.masking.scores(C, torch.tensor(draws)) if semantic else ffl.masking(C)[0]
    keep, mask = simfle.mask_lowest(a, ffl.masking.ratio)
    masked, patches = mask[:, :, None] > 0, mae.patchify(I)
    guess = mae.decode(mae.encode(patches, keep), keep)
    if mae.norm_pix:
        var, mean = torch.var_mean(patches, dim=2, keepdim=True)
        guess = guess * (var + simfle.PIXEL_EPS).sqrt() + mean
    mean, std = (torch.tensor(c)[:, None, None] for c in colours)
    whole = unpatchify(torch.where(masked, guess, patches), mae) * std + mean
    return unpatchify(torch.where(masked, 0.5, mae.patchify(x)), mae), whole.clamp(0, 1)


def figures_masks(model: nn.Module, x: Tensor, colours) -> dict[str, Image.Image]:
    """Three faces masked eight times each, and eight with their reconstructions. (Fig. 4 a, b)"""
    semantic = type(model.ffl.masking) is simfle.SemanticMasking
    draws = [i * model.ffl.groups // 8 for i in range(8)] if semantic else list(range(8))
    above = [(face, *reconstruct(model, face.expand(8, -1, -1, -1), draws, colours)[0])
             for face in x[:3]]
    below = [[cell(p) for p in row] for row in (x, *reconstruct(model, x, draws[:len(x)], colours))]
    names = [f"group {g}" for g in draws] if semantic else ["one draw"] * 8
    light = " Mean and contrast of each patch are the original's." if model.ffl.mae.norm_pix else ""
    return {"masks": sheet("What the masking keeps, by channel group (Fig. 4 a)",
                           [[cell(p) for p in row] for row in above],
                           columns=["original", *names], note="Grey patches are masked."),
            "reconstructions": sheet("Reconstructed from what is kept (Fig. 4 b)", below,
                                     ["original", "masked", "reconstructed"],
                                     note="Visible patches are pasted back." + light)}


def figure_refinement(logs: dict[str, list[dict]]) -> Image.Image | None:
    """The error of masked patches by position, and how often a patch is kept, over the epochs that
    the logs hold. (Fig. 3: its upper row is a run with random masking, its lower one a semantic
    one's)"""
    rows, names = [], []
    for run, records in logs.items():
        records = [r for r in records if "masked" in r]
        epochs = sorted({r["epoch"] for r in records})
        if not epochs:
            continue
        few = [epochs[i] for i in torch.linspace(0, len(epochs) - 1, min(8, len(epochs))).int()]
        sums = [torch.tensor([(r["masked_error"], r["masked"]) for r in records
                              if r["epoch"] == epoch]).sum(dim=0) for epoch in few]
        error, masked = torch.stack(sums, dim=1)  # (8, 49) each
        # The share of the patches that is masked, over the mean of the counts.
        hidden = simfle.mask_lowest(masked[:1], simfle.run_settings(run)["mask_ratio"])[1].mean()
        for name, maps in (("error where masked", error / masked.clamp(min=1)),
                           ("share kept", 1 - hidden * masked / masked.mean(dim=1, keepdim=True))):
            low, high, side = maps.min().item(), maps.max().item(), math.isqrt(maps.shape[1])
            rows.append([heat(m.reshape(side, side), low, high, 112 // side) for m in maps])
            names.append(f"{run}: {name}\nepochs {', '.join(map(str, few))}\ndark blue: {low:.3g}"
                         f"\nyellow: {high:.3g}")
    return sheet("What is hard, and what is kept (Fig. 3)", rows, names) if rows else None


# ===== 4.4 Attention and numbers =====


def grad_cam(A: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Where a classifier looks for a class. (Sec. 4.4, Grad-CAM) A (B, c′, h, w): the last map;
    gradient (B, c′): of the class's logit, summed over A's positions; behind a mean and a linear
    layer, the layer's row of the class. Returns (B, size, size) from 0 to 1."""
    cam = torch.einsum("bk,bkhw->bhw", gradient, A).relu()[:, None]
    cam = nn.functional.interpolate(cam, size=size, mode="bilinear")[:, 0]
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def classifier(path: Path):
    """A saved classifier as a function: paths -> pictures (B, 3, H, W) in [0, 1], the names of the
    classes they are taken for, attention for those (B, H, W). Raises UserError."""
    saved = simfle.load_file(path) if path.exists() else {}
    if not saved.keys() >= {"classes", "size", "arch", "mean", "std", "model"}:
        fault = "no classifier" if path.exists() else "missing"
        raise simfle.UserError(f"{path} is {fault}; --init is random or a classifier of --eval.")
    net = simfle.RESNETS[saved["arch"]]().eval()
    net.fc = nn.Linear(net.fc.in_features, len(saved["classes"]))
    simfle.load_weights(path, net, saved["model"])

    @torch.no_grad()
    def look(paths: list[str]) -> tuple[Tensor, list[str], Tensor]:
        x = read_faces(paths, saved["size"])
        A = simfle.feature_map(net, simfle.normalise(x, (saved["mean"], saved["std"])))
        label = net.fc(A.mean(dim=(2, 3))).argmax(dim=1)
        return (x, [saved["classes"][k] for k in label],
                grad_cam(A, net.fc.weight[label], saved["size"]))
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
    counts, names, rows = torch.tensor(result["confusion"]).float(), list(result["per_class"]), []
    for row in 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1):
        rows.append([heat(v.reshape(1, 1), 0, 100, 84) for v in row])
        for one, v in zip(rows[-1], row.tolist()):
            write(one, 42, 42, f"{v:.1f}", 14, "mm", "black" if v > 60 else "white")
    return sheet(f"{name}: rows are the class, columns what it was taken for, % (Fig. 7)", rows,
                 names, [n[:14] for n in names],
                 note=f"accuracy {result['accuracy']:.2f} %, mean of the classes "
                      f"{result['mean_accuracy']:.2f} %, {result['images']} images")


def figure_sweep(key: str, own: dict, data: str) -> Image.Image | None:
    """Linear accuracy on `data` against α or β: for each value the mean over the runs that were
    pre-trained as `own` but for it and the seed; None where there is one value. (Fig. 5)"""
    points = defaultdict(list)
    same = {f.name for f in fields(simfle.Settings) if not f.metadata["free"]} - {key, "seed"}
    same |= {"lr", "weight_decay", "batch_size", "epochs", "steps", "init"}
    for path in sorted(Path("runs").glob(f"*/eval-linear-{data}.json")):
        settings = simfle.run_settings(path.parent.name)
        if settings and all(settings.get(k) == own.get(k) for k in same):
            points[settings.get(key)].append(json.loads(path.read_bytes())["accuracy"])
    curve = [(x, sum(ys) / len(ys)) for x, ys in sorted(points.items())]
    return plot(f"linear accuracy, %, against {key} (Fig. 5)", curve) if len(curve) > 1 else None


def figure_curves(records: list[dict]) -> Image.Image | None:
    """What the log holds, over the steps."""
    keys = dict.fromkeys(k for r in records for k, v in r.items() if isinstance(v, float))
    plots = [plot(f"{k}, by step", [(r["step"], r[k]) for r in records if k in r]) for k in keys]
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
    return [(paths[i], classes[labels[i]]) for turn in turns for i in turn if i is not None][:count]


def read_log(run: str) -> list[dict]:
    """The lines of a run's log that are whole."""
    lines = Path("runs", run, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line[:1] + line[-1:] == "{}"]


def figures_of(args: argparse.Namespace, s: simfle.Settings, folder: Path):
    """Names and pictures of all that there is to draw; None for what there is too little of."""
    run, untrained = Path("runs", args.run), args.init == "random"
    model, pictures, looks = simfle.build_model(s).eval(), some_pictures(folder, s.seed, 512), {}
    if not untrained and not args.data:  # what does not depend on the pictures
        logs = {name: read_log(name) for name in (args.run, *args.compare)}
        yield "curves", figure_curves(logs[args.run])
        yield "refinement", figure_refinement(logs)
        for path in sorted(run.glob("eval-*.json")):
            name, result = path.stem.removeprefix("eval-"), json.loads(path.read_bytes())
            yield f"confusion-{name}", figure_confusion(result, name)
            data = simfle.data_name(result["settings"]["data"])
            if name == f"linear-{data}":
                for key in ("alpha", "beta"):
                    yield f"{key}-{data}", figure_sweep(key, vars(s), data)
    if not untrained:
        path = run / "checkpoint.pt"
        simfle.load_weights(path, model, simfle.load_file(path)["model"])
    if model.ffl is not None:
        x = read_faces([p for p, _ in pictures[:8]], s.ffl_size)
        yield from figures_masks(model, x, simfle.colours_of(folder)).items()
    for name in () if untrained else (args.run, *args.compare):
        own = find_classifier(name, simfle.data_name(str(folder)))
        path = Path(args.init) if args.init and name == args.run else own
        if path:
            looks[f"{name}\n{path.stem}"] = classifier(path)
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
    for name in (args.run, *args.compare):
        if not simfle.run_settings(name):
            there = ", ".join(sorted(p.parent.name for p in Path("runs").glob("*/settings.json")))
            raise simfle.UserError(f"no run {name} with a checkpoint; runs/ has {there or 'none'}.")
    s = simfle.checked(simfle.Settings(**simfle.run_settings(args.run)))
    folder, target = simfle.find_data(args.data or s.data), Path("runs", args.run, "figures")
    suffix = "-untrained" if args.init == "random" else f"-{Path(args.init).stem}" * bool(args.init)
    suffix += f"-{simfle.data_name(args.data)}" if args.data else ""  # beside the run's own
    target.mkdir(parents=True, exist_ok=True)
    for name, picture in figures_of(args, s, folder):
        if picture is not None:
            path = target / f"{name}{suffix}.png"
            picture = ImageOps.expand(picture, (0, 0, 0, LINE), "white")
            write(picture, GAP, picture.height - LINE, args.run + suffix, 12, "la", "grey")
            simfle.write_whole(path, lambda file: picture.save(file, "PNG"))
            print(path)


def main(argv: list[str] | None = None) -> int:
    """Draws. Returns the exit code, see `simfle.program`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a pre-training's --name: reads runs/RUN/")
    parser.add_argument("--compare", nargs="+", default=[], help="other runs (Figs. 1 and 3)")
    parser.add_argument("--init", default="", help="random, or a classifier; default: the run's")
    parser.add_argument("--data", default="", help="folder, or name in data/; default: the run's")
    args = parser.parse_args(argv)
    return simfle.program("figures", lambda: draw(args))


if __name__ == "__main__":
    sys.exit(main())
