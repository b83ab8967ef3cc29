"""Measures what claims are checked with: a converged linear probe, and the refinement.

    python data/probe.py RUN                     what a linear classifier reads from RUN's backbone
    python data/probe.py RUN --init random       the same of an untrained net
    python data/probe.py RUN --init pixels       the same of the pictures at 16 × 16 pixels
    python data/probe.py RUN --init FILE         the same of a backbone.pt or of a classifier
    python data/probe.py RUN --refinement        whether RUN's masking keeps what is hard to guess

The probe is multinomial logistic regression (`simfle.converged_head`). It sees whole pictures,
without augmentation, through the frozen backbone in eval mode. It reads train/CLASS/ and val/CLASS/
of --data, by default of the run's data. RUN is a pre-training: from it come net, sizes and data,
for pixels and for an untrained net too. Everything is printed as one line of JSON.
"""

import argparse
import json
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simfle


def whole_pictures(paths: list[str], labels: list[int], size: int, workers: int) -> DataLoader:
    """Batches of whole pictures, `image` (B, 3, size, size) uint8, in the order of `paths`."""
    faces = simfle.Faces(paths, 0, size, 1, 0, crops=0, labels=labels)
    keys = [(0, i, 1.0) for i in range(len(faces))]
    return DataLoader(faces, batch_sampler=[keys[i:i + 256] for i in range(0, len(keys), 256)],
                      num_workers=workers)


@torch.no_grad()
def features(net: nn.Module, pictures: DataLoader, colours) -> tuple[Tensor, Tensor]:
    """What `net` makes of pictures: (N, features) and their labels (N,), on the CPU. Raises
    Problem for a picture that cannot be read."""
    device = next(net.parameters(), torch.empty(0)).device
    xs, ys = [], []
    for batch in pictures:
        for i in batch["index"][batch["unreadable"]].tolist():
            raise simfle.Problem(f"{pictures.dataset.paths[i]} cannot be read; mend or remove it.")
        xs.append(net(simfle.normalise(batch["image"].to(device), colours)).cpu())
        ys.append(batch["label"])
    return torch.cat(xs), torch.cat(ys)


class Pooled(nn.Module):
    """A torchvision ResNet up to its pooled features: (B, 3, H, W) -> (B, c′)."""
    def __init__(self, resnet: nn.Module):
        super().__init__()
        self.backbone = simfle.Backbone(resnet)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)[1]


def load_net(init: str, s: simfle.Settings, pictures: DataLoader, colours, calibrate: bool):
    """The net whose features are probed, in eval mode. Raises Problem.

    An untrained net has the BatchNorm statistics that it starts with, mean 0 and variance 1, as it
    has in `simfle.py --eval --init random`; with `calibrate`, those of `pictures`."""
    if init == "pixels":
        return nn.Flatten()
    torch.manual_seed(s.seed)
    net = Pooled(simfle.RESNETS[s.arch]())
    net.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    if init != "random":
        path = Path(init or Path("runs", s.name, "backbone.pt"))
        if not path.is_file():
            raise simfle.Problem(f"there is no file {path}; give random, pixels or a file.")
        saved = simfle.load_file(path)
        try:
            state = {k: v for k, v in saved.get("model", saved).items() if k[:3] != "fc."}
            net.backbone.resnet.load_state_dict(state)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise simfle.Problem(f"{path} is no {s.arch} ({' '.join(str(error).split())[:150]}); "
                                 f"give a backbone.pt or a classifier of that net.") from None
    elif calibrate:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over all batches, not a moving average
        features(net.train(), pictures, colours)
    return net.eval()


def probe(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: list[str]) -> dict:
    """Fits on `train` and tests on `val`, each features (N, c′) and labels (N,).

    Returns accuracy, mean_accuracy (of the classes) and per_class in percent, and the strength of
    the L2 penalty that was chosen."""
    K = len(classes)
    weight, bias, strength = simfle.converged_head(*train, torch.ones(K))
    guess = (val[0].double() @ weight.T + bias).argmax(dim=1)
    confusion = torch.bincount(val[1] * K + guess, minlength=K**2)
    result = simfle.summary(confusion.reshape(K, K), classes)
    return {k: result[k] for k in ("accuracy", "mean_accuracy", "per_class")} | {
        "strength": strength}


def refinement(s: simfle.Settings, paths: list[str], colours) -> dict:
    """`measure_refinement` of a run's last checkpoint on whole pictures. Raises Problem."""
    path = Path("runs", s.name, "checkpoint.pt")
    if s.ffl == "none":
        raise simfle.Problem(f"{s.name} was trained with --ffl none: it has no masking to measure.")
    if not path.exists():
        raise simfle.Problem(f"{path} is missing; it is written at the end of the first epoch.")
    model = simfle.build_model(s)
    simfle.load_state(path, simfle.load_file(path), model)
    faces = simfle.Faces(paths, 0, s.ffl_size, 1, 0, crops=0)
    items = [faces[0, i, 1.0] for i in range(len(faces))]
    for path in (path for path, item in zip(paths, items) if item["unreadable"]):
        raise simfle.Problem(f"{path} cannot be read; mend or remove it.")
    images = torch.stack([item["image"] for item in items])
    return simfle.measure_refinement(model, images, colours)


def run(args: argparse.Namespace) -> dict:
    """What the command line asks for. Raises Problem."""
    if (args.calibrate or args.seed is not None) and args.init != "random":
        raise simfle.Problem("--calibrate and --seed are for --init random: give them there only.")
    if not 0 <= (args.seed or 0) < 2**32:
        raise simfle.Problem(f"--seed must be from 0 to 4294967295, not {args.seed}.")
    if args.workers < 0:
        raise simfle.Problem(f"--workers must be 0 or more, not {args.workers}.")
    began, stored = time.perf_counter(), simfle.run_settings(args.run)
    if not stored:
        there = ", ".join(sorted(p.parent.name for p in Path("runs").glob("*/log.jsonl")))
        raise simfle.Problem(f"there is no run {args.run} with a log in {Path.cwd()}/runs, "
                             f"which has {there or 'none'}: choose one "
                             f"of these, or pre-train one with simfle.py.")
    s = simfle.Settings(**{f.name: stored[f.name] for f in fields(simfle.Settings)
                           if f.name in stored})
    s = replace(s, name=args.run, seed=s.seed if args.seed is None else args.seed)
    folder = simfle.find_data(args.data or s.data)
    colours = simfle.colours_of(folder)
    classes, *train = simfle.labelled_pictures(folder / "train")
    same, val_paths, val_labels = simfle.labelled_pictures(folder / "val")
    if classes != same:
        raise simfle.Problem(f"{folder}/train and {folder}/val have different class folders.")
    if args.refinement:
        result = refinement(s, val_paths, colours)
    else:
        size = 16 if args.init == "pixels" else s.view_size
        train = whole_pictures(*train, size, args.workers)
        val = whole_pictures(val_paths, val_labels, size, args.workers)
        net = load_net(args.init, s, train, colours, args.calibrate)
        result = probe(features(net, train, colours), features(net, val, colours), classes)
    measured = "refinement" if args.refinement else args.init or "backbone"
    measured += ", calibrated" if args.calibrate else ""
    return dict(run=args.run, measured=measured, data=str(folder), seed=s.seed,
                val_pictures=len(val_paths)) | result | dict(
                    seconds=round(time.perf_counter() - began, 1))


def main(argv: list[str] | None = None) -> int:
    """Prints one line of JSON. Returns the exit code: 0, 2 after a Problem, 130 after Ctrl-C."""
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
    except simfle.Problem as problem:
        print(f"probe: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nprobe: interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
