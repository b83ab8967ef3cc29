"""Measures what claims are checked with: a converged linear probe, and the refinement.

    python data/probe.py RUN                     what a linear classifier reads from RUN's backbone
    python data/probe.py RUN --init random       the same of an untrained net
    python data/probe.py RUN --init pixels       the same of the pictures at 16 × 16 pixels
    python data/probe.py RUN --init FILE         the same of a backbone.pt or of a classifier
    python data/probe.py RUN --refinement        whether RUN's masking keeps what is hard to guess

The probe is multinomial logistic regression. It sees whole pictures, without augmentation, through
the frozen backbone in eval mode. Its features are standardised by the training set. L-BFGS fits it
until it has converged. A fifth of the training set chooses its L2 strength, and the fit is then
repeated on the whole. So its result depends on the features alone, not on a learning rate or a
number of epochs. It reads train/CLASS/ and val/CLASS/ of --data, by default of the run's data.
"""

import argparse
import json
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simfle

STRENGTHS = [10.0**k for k in range(-5, 2)]  # of the L2 penalty, tried in this order
MOST_STEPS = 2000  # of L-BFGS: a fit that needs more is reported


def whole_pictures(paths: list[str], labels: list[int], size: int, workers: int) -> DataLoader:
    """Batches of whole pictures, `image` (B, 3, size, size) uint8, in the order of `paths`."""
    faces = simfle.Faces(paths, 0, size, 1, 0, crops=0, labels=labels)
    keys = [(0, i, 1.0) for i in range(len(faces))]
    return DataLoader(faces, batch_sampler=[keys[i:i + 256] for i in range(0, len(keys), 256)],
                      num_workers=workers)


@torch.no_grad()
def features(net: nn.Module, pictures: DataLoader, colours) -> tuple[Tensor, Tensor]:
    """What `net` makes of pictures: (N, features) float64, and their labels (N,). Raises
    Problem for a picture that cannot be read."""
    device = next(net.parameters(), torch.empty(0)).device
    xs, ys = [], []
    for batch in pictures:
        for i in batch["index"][batch["unreadable"]].tolist():
            raise simfle.Problem(f"{pictures.dataset.paths[i]} cannot be read; mend or remove it.")
        xs.append(net(simfle.normalise(batch["image"].to(device), colours)).double().cpu())
        ys.append(batch["label"])
    return torch.cat(xs), torch.cat(ys)


class Pooled(nn.Module):
    """A torchvision ResNet up to its pooled features: (B, 3, H, W) -> (B, c′)."""
    def __init__(self, resnet: nn.Module):
        super().__init__()
        self.backbone = simfle.Backbone(resnet)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)[1]


def load_net(init: str, s: simfle.Settings, pictures: DataLoader, colours) -> nn.Module:
    """The net whose features are probed, in eval mode. Raises Problem.

    An untrained net takes its BatchNorm statistics from `pictures`. With those that it starts with
    (mean 0, variance 1) nothing would be normalised in it."""
    if init == "pixels":
        return nn.Flatten()
    torch.manual_seed(s.seed)
    net = Pooled(simfle.RESNETS[s.arch]())
    net.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    if init == "random":
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over all batches, not a moving average
        features(net.train(), pictures, colours)
        return net.eval()
    path = Path(init or Path("runs", s.name, "backbone.pt"))
    saved = simfle.load_file(path)
    state = {k: v for k, v in saved.get("model", saved).items() if not k.startswith("fc.")}
    try:
        net.backbone.resnet.load_state_dict(state)
    except RuntimeError as error:
        raise simfle.Problem(f"{path} is no {s.arch} ({' '.join(str(error).split())[:150]}); give "
                             f"a backbone.pt or a classifier of that net.") from None
    return net.eval()


def fit(x: Tensor, y: Tensor, classes: int, strength: float, start=None) -> tuple[Tensor, bool]:
    """Multinomial logistic regression: the minimum of mean cross-entropy + strength/2 · ‖W‖².

    Args:
        x: (N, features) float64, standardised.
        y: (N,) labels from 0 to classes − 1.
        strength: of the L2 penalty, which leaves out the bias.
        start: weights to start from, as this returns them; zeros if not given.

    Returns:
        (classes, features + 1) weights, the bias in the last column; whether they have converged.
    """
    weights = torch.zeros(classes, x.shape[1] + 1, dtype=x.dtype) if start is None else start
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=MOST_STEPS, max_eval=2 * MOST_STEPS,
                                  tolerance_grad=1e-5, tolerance_change=1e-12, history_size=20,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (F.cross_entropy(predict(weights, x), y)
                 + strength / 2 * weights[:, :-1].square().sum())
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach(), optimizer.state[weights]["n_iter"] < MOST_STEPS


def predict(weights: Tensor, x: Tensor) -> Tensor:
    """Logits (N, classes) of features (N, features)."""
    return x @ weights[:, :-1].T + weights[:, -1]


def probe(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int) -> dict:
    """Fits on `train` and tests on `val`, each (N, features) and (N,).

    Returns:
        accuracy and mean_accuracy (of the classes) in percent, the chosen strength, converged.
    """
    (x, y), (x_val, y_val) = train, val
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-12)
    x, x_val = (x - mean) / std, (x_val - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:len(x) // 5], order[len(x) // 5:]
    right, weights = {}, None
    for strength in reversed(STRENGTHS):  # from the strongest: each start is near its minimum
        weights, _ = fit(x[rest], y[rest], classes, strength, weights)
        right[strength] = (predict(weights, x[held]).argmax(dim=1) == y[held]).double().mean()
    best = max(right, key=right.get)
    weights, converged = fit(x, y, classes, best)
    guess = predict(weights, x_val).argmax(dim=1)
    confusion = torch.bincount(y_val * classes + guess, minlength=classes**2)
    result = simfle.summary(confusion.reshape(classes, classes), [str(k) for k in range(classes)])
    return dict(accuracy=result["accuracy"], mean_accuracy=result["mean_accuracy"], strength=best,
                converged=converged)


def refinement(s: simfle.Settings, paths: list[str], colours) -> dict:
    """`measure_refinement` of a run's last checkpoint on whole pictures. Raises Problem."""
    path = Path("runs", s.name, "checkpoint.pt")
    model = simfle.build_model(s)
    simfle.load_state(path, simfle.load_file(path), model)
    faces = simfle.Faces(paths, 0, s.ffl_size, 1, 0, crops=0)
    images = torch.stack([faces[0, i, 1.0]["image"] for i in range(len(faces))])
    return simfle.measure_refinement(model, images, colours)


def run(args: argparse.Namespace) -> dict:
    """What the command line asks for. Raises Problem."""
    began, stored = time.perf_counter(), simfle.run_settings(args.run, needed=True)
    s = simfle.Settings(**{f.name: stored[f.name] for f in fields(simfle.Settings)
                           if f.name in stored})
    s = replace(s, name=args.run, seed=s.seed if args.seed is None else args.seed)
    folder = simfle.find_data(args.data or s.data)
    colours = simfle.colours_of(folder)
    classes, *train = simfle.labelled_pictures(folder / "train")
    same, *val = simfle.labelled_pictures(folder / "val")
    if classes != same:
        raise simfle.Problem(f"{folder}/train and {folder}/val have different class folders.")
    if args.refinement:
        result = refinement(s, val[0], colours)
    else:
        size = 16 if args.init == "pixels" else s.view_size
        train, val = (whole_pictures(*split, size, args.workers) for split in (train, val))
        net = load_net(args.init, s, train, colours)
        result = probe(features(net, train, colours), features(net, val, colours), len(classes))
    return result | dict(seconds=round(time.perf_counter() - began, 1))


def main(argv: list[str] | None = None) -> int:
    """Prints one line of JSON. Returns the exit code: 0, or 2 after a Problem."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="a pre-training's --name: reads runs/RUN/")
    parser.add_argument("--data", default="", help="folder, or name in data/; default: the run's")
    parser.add_argument("--init", default="", help="random, pixels or a file; default: backbone.pt")
    parser.add_argument("--seed", type=int, help="of --init random; default: the run's")
    parser.add_argument("--refinement", action="store_true",
                        help="correlate, over the patches of val/, error and frequency of keeping")
    parser.add_argument("--workers", type=int, default=2, help="loader workers [2]")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(run(args)))
    except simfle.Problem as problem:
        print(f"probe: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
