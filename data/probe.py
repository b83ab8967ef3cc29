"""Measures what claims are checked with: a converged linear probe, and the refinement.

    python data/probe.py RUN                     what a linear classifier reads from RUN's backbone
    python data/probe.py RUN --init random       the same of an untrained net
    python data/probe.py RUN --init pixels       the same of the pictures at 16 × 16 pixels
    python data/probe.py RUN --init FILE         the same of a backbone.pt or of a classifier
    python data/probe.py RUN --refinement        whether RUN's masking keeps what is hard to guess
    python data/probe.py RUN --refinement OTHER  whether OTHER's masking keeps what is hard for RUN

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
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import baselines  # noqa: F401  (their runs can be measured too)
import simfle


def load_net(init: str, s: simfle.Settings, world: simfle.World) -> nn.Module:
    """The ResNet whose pooled features are probed, without `fc` and in eval mode. Raises UserError.

    An untrained net has the BatchNorm statistics that it starts with: mean 0 and variance 1, as in
    `simfle.py --eval --init random`. (With those of the pictures it is a weaker baseline.)"""
    if init == "pixels":
        return nn.Flatten()
    torch.manual_seed(s.seed)
    net = simfle.RESNETS[s.arch]().to(world.device, memory_format=torch.channels_last)
    net.fc = nn.Identity()
    if init != "random":
        path = init or Path("runs", s.name, "backbone.pt")
        simfle.load_weights(path, net, simfle.load_start(path, s.arch)["model"])
    return net.eval()


def probe(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: list[str]) -> dict:
    """Fits on `train` and tests on `val`, each features (N, c′) and labels (N,). Returns accuracy,
    mean_accuracy (of the classes) and per_class, in percent."""
    weight, bias = simfle.converged_head(*train, torch.ones(len(classes), device=train[0].device))
    guess = (val[0].double() @ weight.T + bias).argmax(dim=1)
    result = simfle.summary(guess, val[1], classes)
    return {k: result[k] for k in ("accuracy", "mean_accuracy", "per_class")}


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, over the last dimension; 0 where one of them is constant. (ours)"""
    x, y = x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)


@torch.no_grad()
def measure_refinement(model: simfle.SimFLE, images: Tensor, rounds: int = 4,
                       other: simfle.SimFLE | None = None) -> dict:
    """Does the masking keep what is hard to reconstruct? (Sec. 3.2, Fig. 3)

    images: (N, 3, 112, 112), normalised, held out, on the model's device. `error_map`: the error of
    every patch where a random mask hides it; `keep_map`: the share of the groups that keep it;
    (49,) each, means over the images. `positions` correlates these maps, `within_image` each
    image's own two, on average. With random masking, `keep_map` is what the scores would keep.
    `other`: the model whose masking is asked, by default the same. Both are in eval mode."""
    asked, draw = other or model, simfle.generator_of("measure")
    masking, ratio = asked.ffl.masking, model.ffl.masking.ratio
    errors, keeps = [], []
    for I in images.split(64):
        C = asked.ffl.grouping(asked.backbone(I)[0])
        keeps.append(sum(1 - simfle.mask_lowest(masking.scores(C, group), masking.ratio)[1]
                         for group in torch.arange(masking.groups, device=I.device)
                         [:, None].expand(-1, len(I))) / masking.groups)
        turn = torch.rand(keeps[-1].shape, generator=draw).argsort(dim=1).to(I.device)
        error = times = shift = 0
        for _ in range(max(rounds, math.ceil(1 / ratio))):  # until each has been masked:
            keep, mask = simfle.mask_lowest(((turn + shift) % turn.shape[1]).float(), ratio)
            error, times = error + model.ffl.mae(I, keep)[0] * mask, times + mask
            shift += keep.shape[1]  # the next few of one random order are kept
        errors.append(error / times.clamp(min=1))
    error, kept = torch.cat(errors), torch.cat(keeps)
    return dict(positions=correlation(error.mean(0), kept.mean(0)).item(),
                within_image=correlation(error, kept).mean().item(),
                error_map=[round(v, 4) for v in error.mean(0).tolist()],
                keep_map=[round(v, 4) for v in kept.mean(0).tolist()])


def model_of(s: simfle.Settings, world: simfle.World) -> simfle.SimFLE:
    """The model of a run's last checkpoint, in eval mode. Raises UserError."""
    if s.ffl == "none":
        raise simfle.UserError(f"{s.name} was trained with --ffl none: it has no masking to "
                               f"measure.")
    path = Path("runs", s.name, "checkpoint.pt")
    model = simfle.build_model(s).to(world.device)
    simfle.load_weights(path, model, simfle.load_file(path)["model"])
    return model.eval()


def settings_of(run: str, **changes) -> simfle.Settings:
    """The settings of a run, with changes. Raises UserError: there is no such run."""
    stored = simfle.run_settings(run)
    if stored.keys() - vars(simfle.Settings()).keys():
        raise simfle.UserError(f"runs/{run} was made by another version of simfle.py; pre-train "
                               f"anew, under another --name.")
    if not stored:
        there = ", ".join(sorted(p.parent.name for p in Path("runs").glob("*/settings.json")))
        raise simfle.UserError(f"runs/{run}/settings.json is missing or damaged; {Path.cwd()}/runs "
                               f"has those of {there or 'no run'}: choose one, or pre-train.")
    return simfle.checked(simfle.Settings(**stored | {"name": run} | changes))


def refinement(s: simfle.Settings, other: simfle.Settings, world: simfle.World, paths: list[str],
               colours) -> dict:
    """`measure_refinement` of two runs' last checkpoints on whole pictures. Raises UserError."""
    if (s.ffl_size, s.patch) != (other.ffl_size, other.patch):
        raise simfle.UserError(f"{s.name} and {other.name} have other --ffl-size or --patch: "
                               f"compare runs with the same patches.")
    model, asked = model_of(s, world), None if other.name == s.name else model_of(other, world)
    faces = simfle.Faces(paths, image_size=s.ffl_size, labels=[0] * len(paths))
    images, _ = simfle.outputs_of(s, world, nn.Identity(), faces, colours)
    return measure_refinement(model, images, other=asked)


def run(args: argparse.Namespace) -> dict:
    """What the command line asks for. Raises UserError."""
    if args.seed is not None and args.init != "random":
        raise simfle.UserError("--seed is for --init random: give it there only.")
    began = time.perf_counter()
    s = settings_of(args.run, workers=args.workers,
                    **{} if args.seed is None else {"seed": args.seed})
    world = simfle.World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    folder = simfle.find_data(args.data or s.data)
    colours = simfle.colours_of(folder)
    if args.refinement is not None:
        other, val = args.refinement or args.run, simfle.find_pictures(folder / "val")
        measured = "refinement" + (f", masking of {other}" if args.refinement else "")
        result = refinement(s, settings_of(other), world, val, colours)
    else:
        classes, *train = simfle.labelled_pictures(folder / "train")
        same, val, labels = simfle.labelled_pictures(folder / "val")
        if classes != same:
            raise simfle.UserError(f"{folder}/train and {folder}/val have different class folders.")
        measured = args.init or "backbone"
        size = 16 if args.init == "pixels" else s.view_size
        splits = [simfle.Faces(paths, image_size=size, labels=which)
                  for paths, which in (train, (val, labels))]
        net = load_net(args.init, s, world)
        result = probe(*(simfle.outputs_of(s, world, net, faces, colours) for faces in splits),
                       classes)
    return dict(run=args.run, measured=measured, data=str(folder), seed=s.seed,
                val_pictures=len(val)) | result | dict(
                    seconds=round(time.perf_counter() - began, 1))


def main(argv: list[str] | None = None) -> int:
    """Prints one line of JSON. Returns the exit code, see `simfle.program`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     usage="%(prog)s RUN [options]")
    parser.add_argument("run", metavar="RUN", help="a pre-training's --name: reads runs/RUN/")
    parser.add_argument("--data", default="", help="folder, or name in data/; default: the run's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--init", default="", help="random, pixels or a file; default: backbone.pt")
    what.add_argument("--refinement", nargs="?", const="", metavar="OTHER",
                      help="correlate, over the patches of val/, RUN's error and how often OTHER's "
                           "masking keeps (after RUN; default: RUN's own)")
    parser.add_argument("--seed", type=int, help="of --init random; default: the run's")
    parser.add_argument("--workers", type=int, default=-1,
                        help="loader workers [share of the cores]")
    args = parser.parse_args(argv)
    return simfle.program("probe", lambda: print(json.dumps(run(args))))


if __name__ == "__main__":
    sys.exit(main())
