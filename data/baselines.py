"""The other methods of Tables 1 and 4 in the place of BYOL: SimSiam, MoCo, MoCo v2 and SimCLR.

    python data/baselines.py --data affectnet --name simclr --ffl none --gfl simclr        Table 1
    python data/baselines.py --data affectnet --name with-simclr --gfl simclr              Table 4
    python data/baselines.py --data affectnet --name simclr --eval

Everything else is simfle.py with its own command line: this program adds four names to `--gfl`, as
a reader's own part would be added. `--gfl` is byol, simsiam, moco, mocov2 or simclr. The widths of
their papers, SimSiam's 2048 and 512 and the others' 128, are shares of `--hidden` and `--outputs`,
so that they shrink with them.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simfle  # before torch, whose log it quietens

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simfle import Backbone, Stream, ema_update, full_precision, mlp, promote, similarity_loss


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """Joins a tensor's rows over the ranks. (SimCLR, MoCo)

    Args:
        x: (B, ...), with gradient.
    Returns:
        (W·B, ...), by rank. x gets W times the gradient of its rows. That is what each rank would
        send back, if all of them compute the same loss of the whole."""
    if world_size() == 1:
        return x
    own = x.detach().contiguous()  # NCCL sends memory as it lies
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    parts[rank()] = own + world_size() * (x - own)
    return torch.cat(parts)


# SimSiam is BYOL without a target of its own. The stopped gradient and the predictor together
# prevent a collapse; its authors report one without either. In the others a view must find its
# face's other view (the positive) among views of other faces (the negatives). MoCo has these in a
# queue, SimCLR in the batch of all W ranks.


def two_layers(inputs: int, outputs: int) -> nn.Sequential:
    """The head of SimCLR and MoCo v2: (B, inputs) -> (B, outputs), without BatchNorm. (Table 4)"""
    return nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(True), nn.Linear(inputs, outputs))


class SimSiam(nn.Module):
    """GFL by SimSiam (Chen and He, 2021). (Table 4)

    A prediction aims at the online stream's own projection of the other view, as a constant.
    Departure 22: the predictor's learning rate falls with the others, since `fit` has one for all.
    (SimSiam: constant.) On several ranks BatchNorm is local (departure 11). (SimSiam:
    synchronised.)

    Args:
        backbone: the `Backbone` that is trained.
        width, bottleneck: widths of the projector and of the predictor's middle.
    Forward:
        v1, v2: see `BYOL`.
        Returns L_s, a scalar: the mean of 1 − cos over both orders; [h1, h2]; z1."""
    def __init__(self, backbone: Backbone, width: int = 2048, bottleneck: int = 512):
        super().__init__()
        self.online = Stream(backbone, nn.Sequential(
            *mlp(backbone.channels, width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True),
            nn.Linear(width, width), nn.BatchNorm1d(width, affine=False)))
        self.predictor = mlp(width, bottleneck, width)

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        (z1, h1), (z2, h2) = self.online(v1), self.online(v2)
        L_s = (similarity_loss(self.predictor(z1), z2.detach())
               + similarity_loss(self.predictor(z2), z1.detach())) / 4
        return L_s, [h1, h2], z1

    def update(self) -> None:
        """There is no target."""


class MoCo(nn.Module):
    """GFL by MoCo (He et al., 2020). (Table 4)

    The online stream makes the query q of v1, the target makes its key of v2. The negatives are the
    keys of earlier batches, in a queue that is the same in every rank. Only v1 is seen with
    gradient. So L_d has two vectors, z_m and z_v1 (departure 15).

    Args:
        backbone: the `Backbone` that is trained.
        head: `nn.Linear`, or `two_layers` for v2.
        outputs: width of keys.
        queue: how many keys it holds.
        t: temperature; 0.2 for v2.
        tau: the EMA decay of the target.
    Forward:
        v1, v2: see `BYOL`.
        Returns L_s, a scalar; [h1]; z1."""
    def __init__(self, backbone: Backbone, head=nn.Linear, outputs: int = 128, queue: int = 65_536,
                 t: float = 0.07, tau: float = 0.999):
        super().__init__()
        self.t, self.tau = t, tau
        self.online = Stream(backbone, head(backbone.channels, outputs))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        # Departure 14: empty at first. No face is like the random directions of MoCo's authors. To
        # map all faces to one point is then the quickest way to the positive. (MoCo v2, toy faces,
        # 1,024 keys, one seed: spread 0.0008 after 140 steps; with this 0.025 after 150.)
        self.register_buffer("queue", torch.zeros(queue, outputs))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))  # the queue's oldest key

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        z1, h1 = self.online(v1)
        with torch.no_grad():
            # Shuffling BatchNorm: rank r makes the keys of every W-th image from the r-th on.
            # Statistics that query and key share would give away which belong together.
            # Departure 18: on one rank this changes nothing.
            W, r, B = world_size(), rank(), len(v1)
            mixed = self.target(gather(v2)[r::W])[0]
            keys = rearrange(gather(mixed), "(w b) d -> (b w) d", w=W)  # (W·B, 128)
            self.keys = F.normalize(promote(keys), dim=1)  # see `update`
        with full_precision(z1):
            q, k = F.normalize(promote(z1), dim=1), self.keys[r * B:][:B]
            positive, empty = (q * k).sum(dim=1, keepdim=True), (self.queue == 0).all(dim=1)
            negative = (q @ self.queue.T).masked_fill(empty, -math.inf)  # (B, 65536)
            logits = torch.cat([positive, negative], dim=1) / self.t
            return -F.log_softmax(logits, dim=1)[:, 0].mean(), [h1], z1

    @torch.no_grad()
    def update(self) -> None:
        """Moves the target; this step's keys of all ranks take the place of the oldest."""
        ema_update(self.target, self.online, self.tau)
        keys, size = self.keys, len(self.queue)
        place = self.next + torch.arange(len(keys), device=keys.device)
        self.queue[place[-size:] % size] = keys[-size:]  # round and round, whatever the batch
        self.next.copy_((self.next + len(keys)) % size)


class SimCLR(nn.Module):
    """GFL by SimCLR (Chen et al., 2020). (Table 4)

    Each rank has the loss of the whole batch. By `gather` it has W times the gradient of its own
    images, which DDP's mean divides by W again. BatchNorm is local (departure 11). (SimCLR:
    synchronised.)

    Args:
        backbone: the `Backbone` that is trained.
        outputs: width of the projections.
        t: temperature.
    Forward:
        v1, v2: see `BYOL`.
        Returns L_s, a scalar; [h1, h2]; z1."""
    def __init__(self, backbone: Backbone, outputs: int = 128, t: float = 0.1):
        super().__init__()
        self.t = t
        self.online = Stream(backbone, two_layers(backbone.channels, outputs))

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        (z1, h1), (z2, h2) = self.online(v1), self.online(v2)
        return nt_xent(gather(z1), gather(z2), self.t), [h1, h2], z1

    def update(self) -> None:
        """There is no target."""


def nt_xent(z1: Tensor, z2: Tensor, t: float) -> Tensor:
    """SimCLR's loss: every view must find its other one among all 2B − 1. (Table 4)

    Args:
        z1, z2: projections (B, 128); row i of both is of one face.
        t: temperature.
    Returns:
        scalar, mean over the 2B views."""
    with full_precision(z1):
        z = F.normalize(promote(torch.cat([z1, z2])), dim=1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        other = torch.arange(len(z), device=z.device).roll(len(z1))
        return F.cross_entropy((z @ z.T / t).masked_fill(itself, -math.inf), other)


def moco(s: simfle.Settings, backbone: Backbone, head, t: float) -> MoCo:
    """MoCo, or with `two_layers` MoCo v2, of the settings' size.

    With the preset `paper`, queue and EMA decay are MoCo's own. A --tau other than 0.99, BYOL's,
    replaces the decay. (Without it settings.json says 0.99 all the same.) Over the laptop's 1,000
    steps a target with a decay of 0.999 would hardly move."""
    own = s.preset == "paper"
    tau = 0.999 if own and s.tau == simfle.Settings.tau else s.tau
    return MoCo(backbone, head, s.outputs // 2, 65_536 if own else 1_024, t, tau)


simfle.GFLS |= {
    "simsiam": lambda s, backbone: SimSiam(backbone, s.hidden // 2, s.hidden // 8),
    "moco": lambda s, backbone: moco(s, backbone, nn.Linear, 0.07),
    "mocov2": lambda s, backbone: moco(s, backbone, two_layers, 0.2),
    "simclr": lambda s, backbone: SimCLR(backbone, s.outputs // 2)}


def main(argv: list[str] | None = None) -> int:
    """`simfle.main`, which knows these methods now."""
    return simfle.main(argv)


if __name__ == "__main__":
    simfle.leave(main())
