"""Measures what claims are checked with: a converged linear probe, and the refinement.

    python data/probe.py RUN                     what a linear classifier reads from RUN's backbone
    python data/probe.py RUN --init random       the same of an untrained net
    python data/probe.py RUN --init pixels       the same of the pictures at 16 × 16 pixels
    python data/probe.py RUN --init FILE         the same of a backbone.pt or of a classifier
    python data/probe.py RUN --refinement        whether RUN's masking keeps what is hard to guess

The probe is multinomial logistic regression (`simfle.converged_head`). It sees whole pictures,
without augmentation, through the frozen backbone in eval mode. It reads train/CLASS/ and val/CLASS/
of --data, by default of the run's data. RUN is a pre-training: from it come net, sizes and data,
for pixels and for an untrained net too. The last line that is printed is JSON.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import baselines  # noqa: F401  (their runs can be measured too)
import simfle


def load_net(init: str, s: simfle.Settings, world: simfle.World, pictures: simfle.Faces, colours,
             calibrate: bool) -> nn.Module:
    """The ResNet whose features are probed, in eval mode. Raises UserError.

    An untrained net has the BatchNorm statistics that it starts with, mean 0 and variance 1, as it
    has in `simfle.py --eval --init random`; with `calibrate`, those of `pictures`."""
    torch.manual_seed(s.seed)
    net = simfle.RESNETS[s.arch]().to(world.device, memory_format=torch.channels_last)
    if init != "random":
        path = init or Path("runs", s.name, "backbone.pt")
        state = simfle.load_start(path, s.arch)["model"]
        state = {k: v for k, v in state.items() if not k.startswith("fc.")}
        simfle.load_weights(path, net, state | simfle.head_state(net))
    elif calibrate:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over all batches, not a moving average
        simfle.features_of(s, world, net.train(), pictures, colours)
    return net.eval()


def pixels_of(s: simfle.Settings, world: simfle.World, faces: simfle.Faces,
              colours) -> tuple[Tensor, Tensor]:
    """As `simfle.features_of`: the pictures themselves, (N, 3 · 16 · 16)."""
    items = [faces[0, i, i] for i in range(len(faces))]
    for path in (path for path, item in zip(faces.paths, items) if item["unreadable"]):
        raise simfle.UserError(f"{path} cannot be read; mend or remove it.")
    x = simfle.normalise(torch.stack([item["image"] for item in items]), colours)
    return x.flatten(1), torch.tensor(faces.labels)


def probe(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: list[str]) -> dict:
    """Fits on `train` and tests on `val`, each features (N, c′) and labels (N,).

    Returns accuracy, mean_accuracy (of the classes) and per_class in percent, and the strength of
    the L2 penalty that was chosen."""
    K = len(classes)
    weight, bias, strength = simfle.converged_head(*train, torch.ones(K, device=train[0].device))
    guess = (val[0].double() @ weight.T + bias).argmax(dim=1)
    confusion = torch.bincount(val[1] * K + guess, minlength=K**2).cpu()
    result = simfle.summary(confusion.reshape(K, K), classes)
    return {k: result[k] for k in ("accuracy", "mean_accuracy", "per_class")} | {
        "strength": strength}


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, over the last dimension; 0 where one of them is constant. (ours)"""
    x, y = x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)


@torch.no_grad()
def measure_refinement(model: simfle.SimFLE, images: Tensor,
                       colours=(simfle.MEAN, simfle.STD), rounds: int = 4) -> dict:
    """Does the masking keep what is hard to reconstruct? (Sec. 3.2, Fig. 3)

    images: (N, 3, 112, 112) uint8, held out. `error_map`: the error of every patch where a random
    mask hides it; `keep_map`: the share of the groups that keep it; (49,) each, means over the
    images. `positions` correlates these maps, `within_image` each image's own two, on average. With
    random masking, `keep_map` is what the scores would keep."""
    device, masking = next(model.parameters()).device, model.ffl.masking
    draw, was_training = simfle.generator_of("measure"), model.training
    model.eval()
    errors, keeps = [], []
    for chunk in images.split(64):
        I = simfle.normalise(chunk.to(device), colours)
        C = model.ffl.grouping(model.backbone(I)[0])
        keeps.append(sum(1 - simfle.mask_lowest(masking.scores(C, group), masking.ratio)[1]
                         for group in torch.arange(masking.groups, device=device)
                         [:, None].expand(-1, len(I))) / masking.groups)
        turn = torch.rand(keeps[-1].shape, generator=draw).argsort(dim=1).to(device)
        error = times = shift = 0
        for _ in range(max(rounds, math.ceil(1 / masking.ratio))):  # until each has been masked:
            keep, mask = simfle.mask_lowest(((turn + shift) % turn.shape[1]).float(), masking.ratio)
            error, times = error + model.ffl.mae(I, keep)[0] * mask, times + mask
            shift += keep.shape[1]  # the next few of one random order are kept
        errors.append(error / times.clamp(min=1))
    model.train(was_training)
    error, kept = torch.cat(errors), torch.cat(keeps)
    return dict(positions=correlation(error.mean(0), kept.mean(0)).item(),
                within_image=correlation(error, kept).mean().item(),
                error_map=[round(v, 4) for v in error.mean(0).tolist()],
                keep_map=[round(v, 4) for v in kept.mean(0).tolist()])


def refinement(s: simfle.Settings, paths: list[str], colours) -> dict:
    """`measure_refinement` of a run's last checkpoint on whole pictures. Raises UserError."""
    if s.ffl == "none":
        raise simfle.UserError(f"{s.name} was trained with --ffl none: it has no masking to "
                               f"measure.")
    path = Path("runs", s.name, "checkpoint.pt")
    model = simfle.build_model(s)
    simfle.load_weights(path, model, simfle.load_file(path)["model"])
    faces = simfle.Faces(paths, image_size=s.ffl_size, labels=[0] * len(paths))
    items = [faces[0, i, i] for i in range(len(faces))]
    for path in (path for path, item in zip(paths, items) if item["unreadable"]):
        raise simfle.UserError(f"{path} cannot be read; mend or remove it.")
    return measure_refinement(model, torch.stack([item["image"] for item in items]), colours)


def run(args: argparse.Namespace) -> dict:
    """What the command line asks for. Raises UserError."""
    if (args.calibrate or args.seed is not None) and args.init != "random":
        raise simfle.UserError("--calibrate and --seed are for --init random: give them there "
                               "only.")
    stored, began = simfle.run_settings(args.run), time.perf_counter()
    if not stored:
        there = ", ".join(sorted(p.parent.name for p in Path("runs").glob("*/settings.json")))
        raise simfle.UserError(f"there is no run {args.run} with a checkpoint in "
                               f"{Path.cwd()}/runs, which has {there or 'none'}: choose one of "
                               f"these, or pre-train one.")
    s = simfle.Settings(**stored)
    s = simfle.checked(replace(s, name=args.run, workers=args.workers,
                               seed=s.seed if args.seed is None else args.seed))
    folder, world = simfle.find_data(args.data or s.data), simfle.World()
    if torch.cuda.is_available():
        world = simfle.World(device=torch.device("cuda"))
    colours = simfle.colours_of(folder)
    classes, *train = simfle.labelled_pictures(folder / "train")
    same, *val = simfle.labelled_pictures(folder / "val")
    if classes != same:
        raise simfle.UserError(f"{folder}/train and {folder}/val have different class folders.")
    if args.refinement:
        result = refinement(s, val[0], colours)
    else:
        size = 16 if args.init == "pixels" else s.view_size
        splits = [simfle.Faces(paths, image_size=size, labels=labels) for paths, labels in
                  (train, val)]
        if args.init == "pixels":
            found = [pixels_of(s, world, faces, colours) for faces in splits]
        else:
            net = load_net(args.init, s, world, splits[0], colours, args.calibrate)
            found = [simfle.features_of(s, world, net, faces, colours) for faces in splits]
        result = probe(*found, classes)
    measured = "refinement" if args.refinement else args.init or "backbone"
    measured += ", calibrated" if args.calibrate else ""
    return dict(run=args.run, measured=measured, data=str(folder), seed=s.seed,
                val_pictures=len(val[0])) | result | dict(
                    seconds=round(time.perf_counter() - began, 1))


def main(argv: list[str] | None = None) -> int:
    """Prints one line of JSON. Returns the exit code: 0, 2 after a UserError, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a pre-training's --name: reads runs/RUN/")
    parser.add_argument("--data", default="", help="folder, or name in data/; default: the run's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--init", default="", help="random, pixels or a file; default: backbone.pt")
    what.add_argument("--refinement", action="store_true",
                      help="correlate, over the patches of val/, error and frequency of keeping")
    parser.add_argument("--calibrate", action="store_true",
                        help="with --init random: BatchNorm statistics of the training pictures")
    parser.add_argument("--seed", type=int, help="of --init random; default: the run's")
    parser.add_argument("--workers", type=int, default=2, help="loader workers [2]")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(run(args)))
    except simfle.UserError as error:
        print(f"probe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nprobe: interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
