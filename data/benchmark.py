"""Times the loader and the parts of a pre-training step, on any device.

    python data/benchmark.py --data affectnet
    torchrun --nproc_per_node=3 data/benchmark.py --data affectnet

Takes the options of simfle.py. Trains nothing and keeps nothing.
"""

import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import baselines  # noqa: F401  (its methods can be timed too)
import simfle  # before torch, whose log it quietens

import torch
from torch.utils.flop_counter import FlopCounterMode


def leave_if_told() -> None:
    """Raises UserError: the program has been told to stop."""
    if simfle.stop_asked.is_set():
        raise simfle.UserError("stopped.", code=143)


@contextlib.contextmanager
def timed(seconds: dict[str, list[float]], device: torch.device, name: str):
    """Appends to seconds[name] how long the `with` block takes, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    leave_if_told()
    wait()
    start = time.perf_counter()
    yield
    wait()
    seconds[name].append(time.perf_counter() - start)


def loader_rates(s: simfle.Settings, world: simfle.World, faces: simfle.Faces,
                 batches: simfle.Batches, seconds: float):
    """Yields how many loader workers there are, 1, 2, 4 to all cores, and the images a second that
    they hand over."""
    for workers in sorted({min(2**i, simfle.cores()) for i in range(12)}):
        leave_if_told()
        loading = iter(simfle.make_loader(replace(s, workers=workers), world, faces, batches))
        images, spent = 0, 0.0
        list(islice(loading, 2 * workers))  # what may stand ready before the clock starts
        start = time.perf_counter()
        while spent < seconds:  # whole rounds: the batches of one come almost at once
            images += sum(len(batch["image"]) for batch in islice(loading, workers))
            spent = time.perf_counter() - start
        del loading
        batches.first += images * world.size // batches.batch + 4 * workers  # to unread pictures
        yield workers, images / spent


def peak_rate(world: simfle.World) -> float:
    """Multiply-adds a second of a large matrix product, in the precision of training."""
    kind = torch.bfloat16 if simfle.has_bf16(world) else torch.float32
    n, seconds = 8192 if world.device.type == "cuda" else 1024, defaultdict(list)
    a = torch.randn(n, n, device=world.device, dtype=kind)
    for _ in range(20):
        with timed(seconds, world.device, "product"):
            a @ a
    return n**3 / min(seconds["product"])


def benchmark(s: simfle.Settings, world: simfle.World) -> None:
    """Prints what loader and step do in a second, part by part.

    Means of as many steps as fit five seconds, the first two left out. The device is waited for
    before and after each part, so that on a GPU a step takes a little longer than in training."""
    data, seconds = simfle.find_data(s.data), defaultdict(list)
    paths = simfle.find_pictures(data / "train" if (data / "train").is_dir() else data)
    faces = simfle.Faces(paths, s.view_size, 2, s.ffl_size, s.crop_min, s.seed)
    model, clock = simfle.build_model(s), partial(timed, seconds, world.device)
    with tempfile.TemporaryDirectory() as nowhere:  # there is nothing to resume from
        t = simfle.set_up(s, world, model, model, faces, Path(nowhere, "checkpoint.pt"))
    t.batches.last = 10**9
    batch = torch.utils.data.default_collate([faces[k] for k in next(iter(t.batches))])
    batch = {k: v.to(world.device) for k, v in batch.items()}

    def take() -> None:
        """A step of `simfle.fit`, in parts."""
        with clock("views"):
            views = [simfle.augment(batch["views"][:, i]) for i in range(2)]
            views.append(simfle.normalise(batch["image"]))
        with clock("forward"), simfle.mixed_precision(world):
            out = t.net(*views)
        with clock("backward"):
            out["loss"].backward()
        with clock("values"):
            simfle.reduced(world, t.net, out)
        with clock("optimiser, EMA"):
            t.optimizer.step()
            t.optimizer.zero_grad(set_to_none=False)
            model.update()

    with FlopCounterMode(display=False) as counter:
        take()
    with clock("trial"):
        take()
    steps = simfle.from_rank0(world, lambda: max(3, int(5 / seconds["trial"][0])))
    seconds.clear()
    with clock("whole"):
        for _ in range(steps):
            take()
    step = seconds.pop("whole")[0] / steps
    if world.rank == 0:
        report(s, world, t, step, {part: sum(v) / steps for part, v in seconds.items()},
               counter.get_total_flops() / 2)


def report(s: simfle.Settings, world: simfle.World, t: simfle.Training, step: float,
           parts: dict[str, float], macs: float) -> None:
    """Prints the table: a step's seconds, those of its parts, and a rank's multiply-adds."""
    images, name, memory = t.batches.batch, f"{simfle.cores()} CPU cores", []
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name()
        memory = [("GPU memory", torch.cuda.max_memory_allocated() / 2**30, "GiB at most")]
    peak = peak_rate(world)
    print(f"\n{world.size} × {name}, {torch.get_num_threads()} threads a process, torch "
          f"{torch.__version__}; preset {s.preset}, {images} images a step\n")
    for what, number, unit in (
            ("step", images / step, "images/s"), ("step", 1000 * step, "ms"),
            *((f"  {part}", 1000 * v, "ms") for part, v in parts.items()),
            *memory,
            ("arithmetic", macs * world.size / images / 1e9, "G multiply-adds an image, forward "
             "and backward"),
            ("share of the peak", 100 * macs / step / peak, f"% of the {peak / 1e12:.2f} T/s that "
             f"a large matrix product reaches in one process")):
        print(f"{what:24}{number:14,.2f} {unit}")
    for n, rate in loader_rates(s, world, t.faces, t.batches, 5):
        print(f"{f'loader, {n} workers':24}{rate:14,.2f} images/s", flush=True)


def run(argv: list[str] | None) -> None:
    """Reads the command line and measures. Raises UserError."""
    args = simfle.read_arguments(argv)
    with simfle.processes() as world:
        benchmark(simfle.read_settings(args), world)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see `simfle.program`."""
    return simfle.program("benchmark", lambda: run(argv))


if __name__ == "__main__":
    simfle.leave(main())
