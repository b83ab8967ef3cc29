"""Times the loader and the parts of a step: what `simfle.py --benchmark` calls. (ours)

    python simfle.py --data affectnet --benchmark
    torchrun --nproc_per_node=3 simfle.py --data affectnet --benchmark

Any preset, any device. Trains nothing and keeps nothing.
"""

import contextlib
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch.utils.flop_counter import FlopCounterMode

import simfle

try:
    import resource
except ImportError:  # Windows
    resource = None


@contextlib.contextmanager
def timed(seconds: dict[str, list[float]], device: torch.device, name: str):
    """Appends to seconds[name] the time of the `with` block, or of each call of the function that
    it decorates."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    seconds[name].append(time.perf_counter() - start)


def loader_rates(run: simfle.Run, seconds: float) -> dict[int, float]:
    """Images a second that loading processes hand over, by their number: 1, 2, 4 to all cores."""
    rates = {}
    for workers in sorted({min(2**i, run.cores()) for i in range(12)}):
        run.s = replace(run.s, workers=workers)
        loading, images, spent = iter(run.loader(run.faces, run.batches)), 0, 0.0
        list(islice(loading, 4 * workers))  # what may stand ready before the clock starts
        start = time.perf_counter()
        while spent < seconds:  # whole rounds: the batches of one come almost at once
            images += sum(len(batch["index"]) for batch in islice(loading, workers))
            spent = time.perf_counter() - start
        rates[workers] = images / spent
        del loading
    return rates


def benchmark(s: simfle.Settings, world: simfle.World) -> None:
    """Prints what loader and step do in a second, part by part. Trains nothing, keeps nothing.

    Means of as many steps as fit five seconds, the first left out: whole steps as in training, then
    their parts, the device waited for before and after each."""
    s = replace(s, name=f".benchmark-{os.getpid()}", epochs=10**6, steps=0)
    run = simfle.Pretraining(s, world)
    batch = torch.utils.data.default_collate([run.faces[k] for k in next(iter(run.batches))])
    model, seconds, cuda = run.model.train(), defaultdict(list), world.device.type == "cuda"
    clock, take = partial(timed, seconds, world.device), partial(run.step, batch, (0, 0), 0.0)
    with FlopCounterMode(display=False) as counter:  # without --compile; so once more, with it
        take()
    take()
    with clock("trial"):
        take()
    # The same number for all processes.
    steps = simfle.agree(world, lambda: max(3, int(5 / seconds["trial"][0])))
    with clock("whole"):
        for _ in range(steps):
            take()
    step = seconds["whole"][0] / steps
    for name, module in (("target", getattr(model.gfl, "target", None)), ("FaceMAE", model.ffl)):
        if module is not None:
            module.forward = clock(f"of forward: {name}")(module.forward)
    for taken in range(steps + 1):
        if taken == 1:
            seconds.clear()  # with --compile, the modules that got a clock were compiled anew
        moved = {k: v.to(world.device) for k, v in batch.items()}
        with clock("views"), torch.no_grad():
            inputs = simfle.prepare(moved, (s.seed, 0, 0), run.colours)
        with clock("forward"), run.mixed_precision():
            loss = run.wrapped(*inputs)["loss"]
        with clock("backward"):
            loss.backward()
        with clock("optimiser, EMA"):
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.model.update()
    if world.rank == 0:
        images, macs = run.batches.batch, counter.get_total_flops() / 2
        memory = (torch.cuda.max_memory_allocated() if cuda else math.nan if resource is None else
                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                  * (1 if sys.platform == "darwin" else 1024))
        parts = {f"  {part}": 1000 * sum(v) / steps for part, v in seconds.items()}
        kind, n = (torch.bfloat16, 8192) if cuda else (torch.float32, 1024)
        a = torch.randn(n, n, device=world.device, dtype=kind)
        for _ in range(20):
            with clock("product"):
                a @ a
        peak = n**3 / min(seconds["product"])  # multiply-adds a second, in training's precision
        name = torch.cuda.get_device_name() if cuda else f"{run.cores()} CPU cores"
        print(f"\n{world.size} × {name}, {torch.get_num_threads()} threads a process, torch "
              f"{torch.__version__}; preset {s.preset}, {images} images a step\n")
        rows = [(f"loader, {n} loading", v, "images/s") for n, v in loader_rates(run, 5).items()]
        rows += [("step", images / step, "images/s"), ("step", 1000 * step, "ms")]
        rows += [(part, v, "ms") for part, v in parts.items()]
        rows += [("memory of a process", memory / 2**30, "GB at most"),
                 ("arithmetic", macs / run.share / 1e9, "G multiply-adds an image, both ways"),
                 ("share of the peak", 100 * macs / step / peak, f"% of the {peak / 1e12:.2f} T/s "
                  f"that a large matrix product reaches in one process")]
        for what, number, unit in rows:
            print(f"{what:24}{number:14,.2f} {unit}")
        run.lock.close()
        shutil.rmtree(run.folder)
