"""The demo: what `python simfle.py` does before and after its pre-training. (ours)"""

import os
import subprocess
import sys
from dataclasses import replace

import torch.distributed as dist

import simfle


def draw_toy_faces(world: simfle.World) -> None:
    """Draws data/toy; what is there already is not drawn again. Raises Problem."""
    toy = simfle.HERE / "data" / "toy"
    mine = int(os.environ.get("LOCAL_RANK", 0)) == 0  # each machine has its own disk
    if mine and not (toy / "complete").exists():
        if subprocess.run([sys.executable, toy.with_name("toy.py")]).returncode:
            raise simfle.Problem("data/toy.py could not draw the toy faces; it says above why.")
    if world.size > 1:
        dist.barrier()


def compare_with_untrained(s: simfle.Settings, world: simfle.World) -> None:
    """Linear evaluation of the untrained and the trained backbone, and the figures of both."""
    results = []
    for init in ("random", ""):
        results.append(simfle.evaluate(replace(s, **simfle.as_linear(s), init=init), world))
        simfle.agree(world, lambda: simfle.helper("draw").draw_figures(replace(s, init=init)))
    if world.rank == 0:
        untrained, trained = (result["accuracy"] for result in results)
        print(f"Linear accuracy on {results[1]['images']} held-out toy faces of "
              f"{len(results[1]['per_class'])} expressions: {untrained:.1f} % with the untrained "
              f"backbone, {trained:.1f} % with the trained one.")
