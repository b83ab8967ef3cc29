"""Draws a run's figures: what `simfle.py --figures` calls. (Sec. 4.4)

    python simfle.py --data affectnet --figures

The paper's figures of a run go to runs/NAME/figures/; with `--init random`, its masks and
reconstructions before training. They show pictures of val/, or where there is none, of the folder.
The ideas are in `reconstruct`, `figure_refinement` and `grad_cam`; the rest is paint.
"""

import contextlib
import json
import math
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import islice, zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.transforms import functional as TF

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
    """Pictures as (B, 3, size, size) in [0, 1]; black where one cannot be read."""
    faces = simfle.Faces(paths, 0, size, 1, 0, crops=0, labels=[0] * len(paths))
    return torch.stack([faces[0, i, 1.0]["image"] for i in range(len(paths))]) / 255


# ===== 4.4 Masks and reconstructions =====


def unpatchify(patches: Tensor, mae: simfle.MaskedAutoencoder) -> Tensor:
    """The inverse of `mae.patchify`: (B, 49, 768) -> (B, 3, 112, 112)."""
    return rearrange(patches, "b (gh gw) (p q c) -> b c (gh p) (gw q)", gh=mae.grid, p=mae.patch,
                     q=mae.patch)


@torch.no_grad()
def reconstruct(model: nn.Module, x: Tensor, u: Tensor, colours) -> tuple[Tensor, Tensor]:
    """x (B, 3, 112, 112) in [0, 1], u as in `SemanticMasking` -> x with the masked patches grey;
    what the autoencoder makes of that, the visible patches pasted back. (Fig. 4) With `norm_pix`
    it guesses a patch's pattern, not its light: mean and deviation are the original's."""
    ffl, mae, I = model.ffl, model.ffl.mae, simfle.normalise(x, colours)
    _, keep, mask = ffl.masking(ffl.grouping(model.backbone(I)[0]), u)
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
    # Semantic masking takes its group from the first number, random masking its scores from all.
    u = torch.rand(8, model.ffl.mae.grid**2, generator=simfle.stream_of("figures"))
    u[:, 0] = torch.arange(8) / 8
    above = [(face, *reconstruct(model, face.expand(8, -1, -1, -1), u, colours)[0])
             for face in x[:3]]
    below = [x, *reconstruct(model, x, u[:len(x)], colours)]
    names = (["one draw"] * 8 if model.ffl.masking.draws > 1 else
             [f"group {g}" for g in (u[:, 0] * model.ffl.groups).long().tolist()])
    light = " Mean and contrast of each patch are the original's." if model.ffl.mae.norm_pix else ""
    return {"masks": sheet("What the masking keeps, by channel group (Fig. 4 a)",
                           [[cell(p) for p in row] for row in above],
                           columns=["original", *names], note="Grey patches are masked."),
            "reconstructions": sheet("Reconstructed from what is kept (Fig. 4 b)",
                                     [[cell(p) for p in row] for row in below],
                                     ["original", "masked", "reconstructed"],
                                     note="Visible patches are pasted back." + light)}


def figure_refinement(records: list[dict]) -> Image.Image | None:
    """Reconstruction error and keep frequency over the epochs that the log holds. (Fig. 3)"""
    if not (records := [r for r in records if "refinement" in r]):
        return None
    few = [records[i] for i in torch.linspace(0, len(records) - 1, min(8, len(records))).int()]
    rows, names = [], []
    for key, name in (("error_map", "error under random masks"), ("keep_map", "share kept")):
        maps = torch.tensor([r["refinement"][key] for r in few])
        side, low, high = math.isqrt(maps.shape[1]), maps.min().item(), maps.max().item()
        rows.append([heat(m.reshape(side, side), low, high) for m in maps])
        names.append(f"{name}\ndark blue: {low:.3g}\nyellow: {high:.3g}")
    return sheet("Does the masking keep what is hard? (Fig. 3)", rows, names,
                 [f"epoch {r['epoch']}" for r in few])


# ===== 4.4 Attention and numbers =====


def grad_cam(A: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Where a classifier looks for a class. (Sec. 4.4, Grad-CAM) A (B, c′, h, w): the last map;
    gradient (B, c′): of the class's logit, summed over A's positions; behind a mean and a linear
    layer, the layer's row of the class. Returns (B, size, size) from 0 to 1."""
    cam = torch.einsum("bk,bkhw->bhw", gradient, A).relu()[:, None]
    cam = F.interpolate(cam, size=size, mode="bilinear", align_corners=False)[:, 0]
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def classifier(path: Path):
    """A saved classifier as a function: paths -> pictures (B, 3, H, W) in [0, 1], the names of the
    classes they are taken for, attention for those (B, H, W). Raises Problem."""
    if not path.exists():
        raise simfle.Problem(f"{path} is missing; with --figures, --init is random or a classifier "
                             f"that --eval has made.")
    saved = simfle.load_file(path)
    if not saved.keys() >= {"classes", "size", "arch", "mean", "std", "model"}:
        raise simfle.Problem(f"{path} is no classifier of --eval; give one with --init.")
    net = simfle.RESNETS[saved["arch"]]().eval()
    net.fc = nn.Linear(net.fc.in_features, len(saved["classes"]))
    net.load_state_dict(saved["model"])

    @torch.no_grad()
    def look(paths: list[str]) -> tuple[Tensor, list[str], Tensor]:
        x = read_faces(paths, saved["size"])
        A = simfle.feature_map(net, simfle.normalise(x, (saved["mean"], saved["std"])))
        label = net.fc(A.mean(dim=(2, 3))).argmax(dim=1)
        return (x, [saved["classes"][k] for k in label],
                grad_cam(A, net.fc.weight[label], saved["size"]))
    return look


def find_classifier(s: simfle.Settings, name: str) -> Path | None:
    """--init for the run itself; else a run's own: of this data before others, linear first."""
    if name == s.name and s.init:
        return Path(s.init)
    data, found = Path(s.data).resolve().name, []
    for path in Path("runs", name).glob("eval-*.json"):
        made = json.loads(path.read_bytes())["settings"]
        if Path(made["init"] or path).resolve().parent == path.parent.resolve():  # no other net's
            found.append((Path(made["data"]).resolve().name != data, made["eval"] != "linear",
                          path.stem, path.with_name(path.stem.removeprefix("eval-") + ".pt")))
    return min(found, default=[None])[-1]


def figure_attention(title: str, looks: dict, pictures: list[tuple]) -> Image.Image:
    """Grad-CAM for some pictures (path, class or None), a row for each run. (Figs. 1, 6, 8)"""
    paths, classes = zip(*pictures)
    seen = [look(paths) for look in looks.values()]
    rows = [[cell(x, text=f"is\n{true}" if true else "") for x, true in zip(seen[0][0], classes)]]
    rows += [[cell(x, cam, f"taken for\n{guess}") for x, guess, cam in zip(*one)] for one in seen]
    return sheet(title, rows, ["picture", *looks],
                 note="Yellow speaks most for the class it was taken for, dark blue not at all; "
                      "each picture has its own scale.")


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
    """Linear accuracy against α or β: for each value the mean over the runs that were pre-trained
    as `own` but for it and the seed; None where there is one value. (Fig. 5)"""
    points, same = defaultdict(list), own.keys() - simfle.FREE - {key, "seed", "data"}
    for path in sorted(Path("runs").glob(f"*/eval-linear-{data}.json")):
        settings = simfle.run_settings(path.parent.name)
        if all(settings.get(k) == own[k] for k in same):
            points[settings.get(key)].append(json.loads(path.read_bytes())["accuracy"])
    curve = [(x, sum(ys) / len(ys)) for x, ys in sorted(points.items())]
    return plot(f"linear accuracy, %, against {key} (Fig. 5)", curve) if len(curve) > 1 else None


def figure_curves(records: list[dict]) -> Image.Image | None:
    """What the log holds, over the steps, and the refinement's correlations, over the epochs."""
    curves = defaultdict(list)
    for r in records:
        what, by = ("correlation (Fig. 3), ", "epoch") if "refinement" in r else ("", "step")
        for k, v in r.get("refinement", r).items():
            if isinstance(v, float):
                curves[f"{what}{k}, by {by}"].append((r[by], v))
    plots = [plot(*one) for one in curves.items()]
    return sheet("The log", [plots[i:i + 2] for i in range(0, len(plots), 2)]) if plots else None


# ===== 4.4 All of them =====


def some_pictures(s: simfle.Settings, count: int) -> list[tuple[str, str | None]]:
    """Pictures with their classes from val/, class after class in turn; else any, with None."""
    folder = simfle.find_data(s.data)
    val = folder / "val" if (folder / "val").is_dir() else folder
    if val == folder or not any(p.is_dir() and p.name[0] not in "._" for p in val.iterdir()):
        return [(p, None) for p in simfle.find_pictures(val)[:count]]
    classes, paths, labels = simfle.labelled_pictures(val)
    order = torch.randperm(len(paths), generator=simfle.stream_of(s.seed, "figures")).tolist()
    turns = zip_longest(*([i for i in order if labels[i] == k] for k in range(len(classes))))
    chosen = [i for turn in turns for i in turn if i is not None]
    return [(paths[i], classes[labels[i]]) for i in chosen[:count]]


def figures_of(s: simfle.Settings, folder: Path, own: dict, records: list[dict]):
    """Names and pictures of all that there is to draw; None for what there is too little of."""
    known, data = asdict(s).keys() - {"data", "name"}, Path(s.data).resolve().name
    model = simfle.build_model(replace(s, **{k: v for k, v in own.items() if k in known})).eval()
    if records:
        yield "curves", figure_curves(records)
        yield "refinement", figure_refinement(records)
        for path in sorted(folder.glob("eval-*.json")):
            name = path.stem.removeprefix("eval-")
            yield f"confusion-{name}", figure_confusion(json.loads(path.read_bytes()), name)
        yield from ((key, figure_sweep(key, own, data)) for key in ("alpha", "beta"))
        path = folder / "checkpoint.pt"
        if not path.exists():
            raise simfle.Problem(f"{path} is not written yet, at the end of the first epoch it "
                                 f"will be; only what the log holds is drawn.")
        simfle.load_state(path, simfle.load_file(path), model)
    pictures, looks = some_pictures(s, 512), {}
    if model.ffl is not None:
        x = read_faces([p for p, _ in pictures[:8]], model.ffl.masking.image_size)
        colours = own.get("colours") or simfle.colours_of(simfle.find_data(s.data))
        yield from figures_masks(model, x, colours).items()
    for name in (s.name, *s.compare) if records else ():
        if path := find_classifier(s, name):
            looks[f"{name}\n{path.stem}"] = classifier(path)
        else:
            print(f"runs/{name} " + ("has no classifier, make one with --eval" if Path(
                "runs", name).is_dir() else "does not exist") + ": its attention is not drawn.")
    if looks:
        title, look = "Where the classifier looks (Figs. 1, 6, 8)", next(iter(looks.values()))
        yield "attention", figure_attention(title, looks, pictures[:8])
        wrong = ((path, true) for path, true in pictures if true and look([path])[1] != [true])
        if wrong := list(islice(wrong, 8)):
            yield "mistakes", figure_attention("Taken for another class (Fig. 8 b)", looks, wrong)


def draw_figures(s: simfle.Settings) -> None:
    """Draws what there is of a run into runs/NAME/figures. Raises Problem."""
    folder, records, state, suffix = Path("runs", s.name), [], "untrained", "-untrained"
    own = simfle.run_settings(s.name, needed=s.init != "random")
    if s.init != "random":
        for line in (folder / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # the run may be writing its last line
                records.append(json.loads(line))
        state, suffix = f"epoch {max(r.get('epoch', 0) for r in records)}", ""
    data = Path(s.data).resolve().name
    if data != own.get("data_name", data):  # pictures of other data beside the run's own
        suffix += f"-{data}"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, picture in figures_of(s, folder, own, records):
        if picture is not None:
            path = folder / "figures" / f"{name}{suffix}.png"
            picture = ImageOps.expand(picture, (0, 0, 0, LINE), "white")
            write(picture, GAP, picture.height - LINE, f"{s.name}, {state}", 12, "la", "grey")
            simfle.write_whole(path, lambda file: picture.save(file, "PNG"))
            print(path)
