"""Two measurements of a pre-training: a converged linear probe, and the refinement. (ours)

    python data/probe.py RUN                        a linear classifier on RUN's backbone
    python data/probe.py RUN --init random          the same on an untrained net
    python data/probe.py RUN --init pixels          the same on the pictures, at 16 × 16 pixels
    python data/probe.py RUN --init FILE            the same on another backbone.pt or classifier
    python data/probe.py RUN --refinement [OTHER]   does RUN's (OTHER's) masking keep hard patches?

The probe fits multinomial logistic regression to whole pictures' features, until it converges. The
backbone is frozen, in eval mode. RUN, the --name of a pre-training, gives net, sizes and data. Its
result has the form of `simfle.py --eval`'s: runs/RUN/probe-DATA.json and .pt. `--init` adds to the
name: -random (-random-SEED, if not RUN's seed), -pixels (without .pt), or -FOLDER-FILE.
"""

import argparse
import json
import math
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import baselines  # noqa: F401  (their runs can be measured too)
import simfle
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader


def converged_head(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: features (N, c′) and labels (N,) -> weights (classes, c′)
    and bias (classes,), float64, for the features as they are.

    Features are standardised. L-BFGS minimises mean cross-entropy + 0.0005 ‖W‖², without the bias
    in ‖W‖, until no entry of the gradient is above 1e-5."""
    x = x.double()
    mean, std = x.mean(dim=0), x.std(dim=0)
    std = std.clamp(min=1e-4 * std.mean().item() + 1e-12)  # some features may be constant
    x = F.pad((x - mean) / std, (0, 1), value=1.0)  # the last column of W is the bias
    W = x.new_zeros(classes, x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=5000, tolerance_grad=1e-5, tolerance_change=0,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W.T, y) + 0.0005 * W[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    W = W.detach()
    return W[:, :-1] / std, W[:, -1] - W[:, :-1] @ (mean / std)


@torch.no_grad()
def outputs_of(args, world, net: nn.Module, faces: simfle.Faces, colours: Tensor) -> Tensor:
    """What a net returns for whole pictures: (N, ...)."""
    loader = DataLoader(faces, batch_size=256, sampler=[(0, i) for i in range(len(faces))],
                        num_workers=args.workers, worker_init_fn=simfle.ignore_signals)
    return torch.cat([net(simfle.normalise(batch["image"].to(world.device), colours))
                      for batch in loader])


def probe(args, world: simfle.World) -> None:
    """Fits a head on train/, tests it on val/, writes the result and prints it."""
    data, pixels, what = simfle.find_data(args.data), args.init == "pixels", args.init
    args.eval, args.arch, args.crop_min = "probe", args.run["arch"], args.run["crop_min"]
    args.view_size = 16 if pixels else args.run["view_size"]
    if what == "random" and args.seed != args.run["seed"]:
        what = f"random-{args.seed}"
    elif what not in ("", "random", "pixels", "imagenet"):
        file = Path(what).absolute()
        what, args.init = f"{file.parent.name}-{file.stem}", str(file)
    classes, train, val = simfle.read_splits(args, data)
    train = simfle.Faces(train.paths, image_size=args.view_size, labels=train.labels)  # no crops
    args.pictures, args.test_pictures = simfle.files_of(train), simfle.files_of(val)
    path = result_path(args, "probe", os.path.basename(os.path.abspath(data)), what)
    torch.manual_seed(args.seed)
    net = nn.Sequential(nn.Flatten()) if pixels else simfle.make_resnet(args.arch)
    if not pixels:
        simfle.load_backbone(net, args.init or path.with_name("backbone.pt"), args.arch)
    net.to(world.device, memory_format=torch.channels_last).eval()
    colours = simfle.colours_of(data, world.device)
    x = outputs_of(args, world, net, train, colours)
    weight, bias = converged_head(x, torch.tensor(train.labels, device=x.device), len(classes))
    net.fc = nn.Linear(x.shape[1], len(classes), device=x.device)  # an nn.Sequential runs it too
    net.fc.load_state_dict(dict(weight=weight, bias=bias))
    confusion = simfle.test(args, world, net, val, colours, len(classes))
    per_class = 100 * confusion.diag() / confusion.sum(dim=1)
    accuracy, mean = 100 * (confusion.trace() / confusion.sum()).item(), per_class.mean().item()
    if not pixels:
        simfle.save_whole(path.with_suffix(".pt"), dict(
            model={k: v.cpu() for k, v in net.state_dict().items()}, classes=classes,
            arch=args.arch, size=args.view_size, colours=colours.cpu()))
    simfle.save_whole(path, dict(
        accuracy=accuracy, mean_accuracy=mean, classes=classes, per_class=per_class.tolist(),
        confusion=confusion.tolist(), settings=vars(args)))
    print(f"{path.with_suffix('')}: {accuracy:.2f} % of {len(val):,} test images, mean of the "
          f"classes {mean:.2f} %")


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, over the last dimension; 0 where one of them is constant."""
    x, y = (z - z.mean(dim=-1, keepdim=True) for z in (x, y))
    return F.cosine_similarity(x, y, dim=-1)


@torch.no_grad()
def measure_refinement(model: nn.Module, asked: nn.Module, images: Tensor) -> dict:
    """Does the masking of `asked` keep what is hard for `model`? Images (N, 3, 112, 112) -> a dict.

    `error_map` is the error of a patch where random masks hide it, `keep_map` the share of the
    groups that keep it: (49,) each, mean over the images. `positions` is the correlation of these
    two, `within_image` the mean of each image's own. (Sec. 3.2, Fig. 3)"""
    draw = torch.Generator().manual_seed(simfle.seed_of("measure"))
    torch.manual_seed(0)  # for the order of equal scores
    ratio, ffl, found = model.ffl.ratio, asked.ffl, []
    for I in images.split(64):
        C, kept = ffl.grouping(asked.backbone(I)), 0
        for k in range(ffl.groups):
            group = torch.full((len(I),), k, device=I.device)
            a = simfle.patch_scores(C, group, ffl.groups, ffl.image_size, ffl.patch)
            kept = kept + (1 - simfle.mask_lowest(a, ffl.ratio)[1]) / ffl.groups
        turn = torch.rand(kept.shape, generator=draw).argsort(dim=1).to(I.device)
        error = times = shift = 0
        for _ in range(max(4, math.ceil(1 / ratio))):  # until each patch has been masked
            keep, mask = simfle.mask_lowest(((turn + shift) % turn.shape[1]).float(), ratio)
            error, times = error + model.ffl.mae(I, keep)[0] * mask, times + mask
            shift += keep.shape[1]  # the next ones of one random order are kept
        found.append((error / times, kept))
    error, kept = map(torch.cat, zip(*found))
    return dict(positions=correlation(error.mean(0), kept.mean(0)).item(),
                within_image=correlation(error, kept).mean().item(),
                error_map=error.mean(0).tolist(), keep_map=kept.mean(0).tolist())


def model_of(run: str, device: torch.device, untrained: bool = False) -> nn.Module:
    """The model of a run's last checkpoint, or as it was before training, in eval mode."""
    args = argparse.Namespace(**settings_of(run) | {"init": "random"})
    torch.manual_seed(args.seed)
    model = simfle.MODELS[args.model](args).to(device)
    if not hasattr(model, "ffl"):
        raise simfle.UserError(f"runs/{run} is of --model {args.model}, which has no masking")
    if not untrained:
        model.load_state_dict(simfle.load_file(Path("runs", run, "checkpoint.pt"))["model"])
    return model.eval()


def refinement(args, world: simfle.World) -> None:
    """Measures the refinement on val/, writes the result and prints it."""
    other, data = args.refinement or args.name, simfle.find_data(args.data)
    model, asked = (model_of(name, world.device) for name in (args.name, other))
    size, grid = model.ffl.image_size, model.ffl.mae.grid
    if (size, grid) != (asked.ffl.image_size, asked.ffl.mae.grid):
        raise simfle.UserError(f"{args.name} and {other} have other --ffl-size or --patch")
    faces = simfle.Faces(simfle.find_pictures(data / "val"), image_size=size)
    args.test_pictures = simfle.files_of(faces)
    path = result_path(args, "refinement", args.refinement)
    colours = simfle.colours_of(data, world.device)
    images = outputs_of(args, world, nn.Identity(), faces, colours)
    result = measure_refinement(model, asked, images)
    simfle.save_whole(path, result | dict(settings=vars(args)))
    print(f"{path.with_suffix('')}: how often {other} keeps a patch, and its error in {args.name}, "
          f"correlate by {result['positions']:+.2f} in the means of {len(faces):,} test images, by "
          f"{result['within_image']:+.2f} in one image")


def settings_of(run: str) -> dict:
    """The settings of a pre-training."""
    path = Path("runs", run, "settings.json")
    if not path.exists():
        raise simfle.UserError(f"{path} is missing: pre-train first, or give another RUN")
    return json.loads(path.read_text())


def result_path(args, *name: str) -> Path:
    """Where a result goes. It does not replace that of other pictures or of another --init."""
    path = Path("runs", args.name, "-".join(filter(None, (*name, args.tag))) + ".json")
    was = json.loads(path.read_text())["settings"] if path.exists() else vars(args)
    for k in ("init", "refinement", "pictures", "test_pictures"):
        if was.get(k) != vars(args).get(k):
            raise simfle.UserError(f"{path} is of other {k.replace('_', ' ')}: give a --tag")
    return path


def run(argv: list[str] | None) -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", metavar="RUN", help="the --name of a pre-training")
    add("--data", help="a folder, or its name in data/; default: the run's")
    add("--init", default="", help="random, pixels, imagenet or a file; default: the run's")
    add("--refinement", nargs="?", const="", metavar="OTHER", help="masking by groups, of OTHER")
    add("--seed", type=int, help="of --init random; default: the run's")
    add("--tag", default="", help="added to the name of the result")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="loader workers")
    own = settings_of(parser.parse_args(argv).name)
    parser.set_defaults(run=own, data=own["data"], seed=own["seed"])
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (probe if args.refinement is None else refinement)(args, simfle.World(0, 1, device))


def main(argv: list[str] | None = None, run=run) -> int:
    """Returns the exit code. Errors are reported as by `simfle.main`."""
    try:
        run(argv)
        return 0
    except simfle.UserError as error:  # a loader worker's comes with a traceback
        print(f"error: {str(error).strip().split('UserError: ')[-1]}", file=sys.stderr)
        return error.code
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    simfle.leave(main())
