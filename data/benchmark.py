"""Measures a step of pre-training, and the loader, on this machine.

    python data/benchmark.py --data affectnet
    torchrun --nproc_per_node=3 data/benchmark.py --data affectnet

It takes simfle.py's options, and every `--model`. It trains nothing and keeps nothing.
"""

import itertools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import probe
import simfle

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode


def seconds_of(function, repeats: int) -> float:
    """The mean time of a call, after two to warm up, the device's work included."""
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return timer.timeit(repeats).mean


def loader_rate(workers: int, faces: simfle.Faces, batches, seconds: float = 5) -> float:
    """The images that this many loader workers hand over in a second."""
    loading = iter(DataLoader(faces, batch_sampler=batches, num_workers=workers,
                              worker_init_fn=simfle.ignore_signals))
    list(itertools.islice(loading, 2 * workers))  # what may be ready before the clock starts
    began, images = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:  # in rounds, whose batches come almost at once
        images += sum(len(batch["image"]) for batch in itertools.islice(loading, workers))
    return images / (time.perf_counter() - began)


def measure(argv: list[str] | None) -> None:
    """Prints what step and loader do."""
    args, world = simfle.read_settings(argv), simfle.join_processes()
    data, device, cores = simfle.find_data(args.data), world.device, os.cpu_count()
    paths = simfle.find_pictures(data / "train" if (data / "train").is_dir() else data)
    faces = simfle.Faces(paths, args.seed, args.ffl_size, args.view_size, 2, args.crop_min)
    colours = simfle.colours_of(data, device)
    per_rank = min(args.batch_size, len(faces)) // world.size
    images = per_rank * world.size
    model = simfle.MODELS[args.model](args).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
    net = model if world.size == 1 else nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=True)
    batch = default_collate([faces[0, i] for i in range(per_rank)])
    batch = {k: v.to(device) for k, v in batch.items()}

    def step() -> None:  # that of `simfle.fit`, without its files
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            v1, v2 = (simfle.augment(batch["views"][:, k], colours) for k in (0, 1))
            out = net(v1, v2, simfle.normalise(batch["image"], colours))
        out["loss"].backward()
        simfle.mean_over_ranks(out, world)
        optimizer.step()
        optimizer.zero_grad()
        model.update()

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = seconds_of(step, args.steps or 10)
    if world.rank > 0:
        return
    n, kind = 8192 if device.type == "cuda" else 1024, torch.bfloat16 if args.bf16 else torch.float
    a = torch.randn(n, n, device=device, dtype=kind)
    macs, peak = counter.get_total_flops() / 2, n**3 / seconds_of(lambda: a @ a, 20)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{world.size} × {name}, PyTorch {torch.__version__}, {'bf16' if args.bf16 else 'fp32'}, "
          f"{args.model}, {images} images a step\n"
          f"step     {images / seconds:,.1f} images/s, {1000 * seconds:,.1f} ms\n"
          f"         {macs / per_rank / 1e9:,.2f} G multiply-adds an image, "
          f"{100 * macs / seconds / peak:.0f} % of the {peak / 1e12:,.2f} T/s of a matrix product")
    if device.type == "cuda":
        print(f"memory   {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
    for workers in [2**i for i in range(12) if 2**i < cores] + [cores]:
        # Each time in another order: pictures that are not yet in memory.
        order = simfle.batches(len(faces), per_rank, range(10**6), seed=workers, world=world)
        rate = loader_rate(workers, faces, order)
        print(f"loader   {rate:,.1f} images/s in one process, workers: {workers}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see `probe.main`."""
    return probe.main(argv, measure)


if __name__ == "__main__":
    simfle.leave(main())
