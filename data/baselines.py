# SPDX-License-Identifier: MIT
"""The other rows of Tables 1, 3 and 4: ablations of SimFLE, and other methods in the place of BYOL.

    python data/baselines.py --data affectnet --name simclr --model simclr
    python simfle.py --name simclr --eval

It is simfle.py with its own command line, and with more names for `--model`:

    byol, direct, random                                        Table 3 a, b, c (d is simfle)
    simsiam, byol, moco, mocov2, simclr                         Table 1: a method alone
    simfle-simsiam, simfle-moco, simfle-mocov2, simfle-simclr   Table 4: with FaceMAE

A run leaves the same files as SimFLE's, so simfle.py evaluates it. The widths of the methods'
papers, SimSiam's 2048 and 512 and the others' 128, are fractions of `--hidden` and `--outputs`.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simfle  # before torch, whose log it sets
from simfle import BYOL, FaceMAE, SimFLE, Stream, ema_update, in_fp32, mlp, similarity_loss, spread

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# ===== Table 3: ablations =====


class GFLAlone(nn.Module):
    """`BYOL` or another method without FFL. Views (B, 3, 224, 224) -> a dict of scalars: `loss`,
    L_s, spread. The image I is not used. (Table 3 a, Table 1)"""
    def __init__(self, gfl: nn.Module):
        super().__init__()
        self.gfl = gfl

    @property
    def backbone(self) -> nn.Module:
        """The one network that is kept in the end."""
        return self.gfl.online.backbone

    def forward(self, v1: Tensor, v2: Tensor, I: Tensor) -> dict[str, Tensor]:
        L_s, _, z1 = self.gfl(v1, v2)
        return dict(loss=L_s, L_s=L_s, spread=spread(z1))

    def update(self) -> None:
        """Call it after every step of the optimiser."""
        self.gfl.update()


class DirectSimFLE(GFLAlone):
    """Both branches train the backbone, without distillation. (Table 3 b, as we read it)

    The map X keeps its gradient. So L_g and the refinement train the backbone too, through the
    grouping layer. With κ = 0 only L_g does. Inputs and result are `SimFLE`'s, without L_d."""
    def __init__(self, gfl: nn.Module, ffl: FaceMAE, beta: float = 0.03):
        super().__init__(gfl)
        self.ffl, self.beta = ffl, beta

    def forward(self, v1: Tensor, v2: Tensor, I: Tensor) -> dict[str, Tensor]:
        L_s, _, z1 = self.gfl(v1, v2)
        L_r, L_g, _, logged = self.ffl(self.backbone(I), I)
        loss = L_s + L_r + self.beta * L_g
        return dict(loss=loss, L_s=L_s, L_r=L_r, L_g=L_g, spread=spread(z1), **logged)


class RandomFaceMAE(FaceMAE):
    """FaceMAE with random masks. The grouping layer and L_g stay, since Table 3 gives rows c and d
    the same arithmetic. (Table 3 c)"""
    def scores(self, C: Tensor) -> Tensor:
        return torch.rand(len(C), self.mae.grid**2, device=C.device)


# ===== Tables 1 and 4: other methods =====
# SimSiam is BYOL without a target of its own. In the others a view must find its face's other view,
# the positive, among views of other faces, the negatives. MoCo keeps those in a queue, SimCLR takes
# the batch of all W ranks. Each method has the interface of `BYOL`. On several ranks BatchNorm is
# local (departure 9; SimSiam, SimCLR: synchronised).


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and the number W of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x: Tensor) -> Tensor:
    """Concatenates the ranks' batches: (B, ...) -> (W·B, ...).

    Its own rows carry a rank's gradient, W times. Each rank computes the same loss of the whole,
    and DDP takes the mean over the ranks: together that is the gradient of this loss."""
    r, W = rank_and_size()
    if W == 1:
        return x
    own = x.detach().contiguous()  # as all_gather needs it
    parts = [torch.empty_like(own) for _ in range(W)]
    dist.all_gather(parts, own)
    parts[r] = own + W * (x - own)
    return torch.cat(parts)


def two_layers(inputs: int, outputs: int) -> nn.Sequential:
    """The head of MoCo v2 and SimCLR: (B, inputs) -> (B, outputs), without BatchNorm."""
    return nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(inplace=True),
                         nn.Linear(inputs, outputs))


class SimSiam(nn.Module):
    """A prediction aims at the online stream's own projection of the other view, as a constant.
    L_s is 1 − cos, mean over both orders. (Chen and He, 2021)

    Departure 18: the predictor's learning rate decays with the others'. (SimSiam: constant.)"""
    def __init__(self, backbone: nn.Module, width: int = 2048, bottleneck: int = 512):
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
        """There is no target to move."""


@in_fp32
def info_nce(z: Tensor, keys: Tensor, queue: Tensor, empty: Tensor, t: float) -> Tensor:
    """A query z_i must find its own key among it and the queue. (MoCo, Eq. 1)

    z: (B, 128); keys (B, 128) and queue (K, 128) at unit length; empty: (K,). Returns a scalar."""
    q = F.normalize(z, dim=1)
    positive = (q * keys).sum(dim=1, keepdim=True)
    negative = (q @ queue.T).masked_fill(empty, -math.inf)  # (B, 65536)
    return -F.log_softmax(torch.cat([positive, negative], dim=1) / t, dim=1)[:, 0].mean()


class MoCo(nn.Module):
    """The online stream makes the query of v1, the target the key of v2. The negatives are keys of
    earlier batches, in a queue that is the same in every rank. (He et al., 2020)

    v2 has `head=two_layers` and t = 0.2. Departure 19: only v1 is seen with gradient, so Eq. 5 has
    two vectors, z_m and z_v1."""
    def __init__(self, backbone: nn.Module, head=nn.Linear, outputs: int = 128,
                 queue: int = 65_536, t: float = 0.07, tau: float = 0.999):
        super().__init__()
        self.t, self.tau = t, tau
        self.online = Stream(backbone, head(backbone.channels, outputs))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        # Departure 20: the queue is empty at first. MoCo's authors fill it with random directions,
        # which no face resembles: the loss then falls fastest where all faces map to one point.
        self.register_buffer("queue", torch.zeros(queue, outputs))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # keys so far

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        z1, h1 = self.online(v1)
        (r, W), B = rank_and_size(), len(v1)
        with torch.no_grad():
            # Rank r makes the keys of every W-th image from the r-th on. Query and key would else
            # share BatchNorm statistics, which tell that they belong together. (MoCo) Departure 21:
            # on one process nothing is shuffled.
            keys = gather(self.target(gather(v2)[r::W])[0])
            keys = rearrange(keys, "(w b) d -> (b w) d", w=W)  # (W·B, 128), as in the batch
            self.keys = in_fp32(F.normalize)(keys, dim=1)  # for `update`
        empty = torch.arange(len(self.queue), device=v1.device) >= self.seen
        return info_nce(z1, self.keys[r * B:][:B], self.queue, empty, self.t), [h1], z1

    @torch.no_grad()
    def update(self) -> None:
        """Moves the target. This step's keys, of all ranks, replace the oldest."""
        ema_update(self.target, self.online, self.tau)
        size, keys = len(self.queue), self.keys
        place = (self.seen + torch.arange(len(keys), device=keys.device)) % size
        self.queue[place[-size:]] = keys[-size:]
        self.seen += len(keys)


@in_fp32
def nt_xent(z1: Tensor, z2: Tensor, t: float) -> Tensor:
    """Each of 2B views must find its other one among 2B − 1. z1, z2: (B, 128), row i of both of one
    face. Returns a scalar, the mean over the views. (SimCLR, Eq. 1)"""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    other = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy((z @ z.T / t).masked_fill(itself, -math.inf), other)


class SimCLR(nn.Module):
    """The loss is `nt_xent` of the batch of all ranks, the same on each. (Chen et al., 2020)"""
    def __init__(self, backbone: nn.Module, outputs: int = 128, t: float = 0.1):
        super().__init__()
        self.t = t
        self.online = Stream(backbone, two_layers(backbone.channels, outputs))

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        (z1, h1), (z2, h2) = self.online(v1), self.online(v2)
        return nt_xent(gather(z1), gather(z2), self.t), [h1, h2], z1

    def update(self) -> None:
        """There is no target to move."""


# ===== The names for --model =====


def build_gfl(args, backbone: nn.Module) -> nn.Module:
    """The method that `--model` names, or BYOL."""
    method = args.model.removeprefix("simfle-")
    if method == "simsiam":
        return SimSiam(backbone, args.hidden // 2, args.hidden // 8)
    if method == "simclr":
        return SimCLR(backbone, args.outputs // 2)
    if method not in ("moco", "mocov2"):
        return BYOL(backbone, args.hidden, args.outputs, args.tau)
    if args.preset == "paper" and args.tau == 0.99:  # BYOL's; settings.json then has MoCo's. Over
        args.tau = 0.999  # the laptop's 1,000 steps a target with 0.999 would hardly move.
    head, t = (nn.Linear, 0.07) if method == "moco" else (two_layers, 0.2)
    queue = 65_536 if args.preset == "paper" else 1_024
    return MoCo(backbone, head, args.outputs // 2, queue, t, args.tau)


def build(args) -> nn.Module:
    """The model that `--model` names: `simfle.build_simfle` with other parts."""
    resnet = simfle.make_resnet(args.arch)
    backbone = simfle.make_backbone(resnet)
    simfle.load_backbone(resnet, args.init or "random", args.arch)
    gfl = build_gfl(args, backbone)
    if args.model in ALONE:
        return GFLAlone(gfl)
    kind = RandomFaceMAE if args.model == "random" else FaceMAE
    ffl = kind(backbone.channels, args.groups, args.mask_ratio, args.kappa, args.ffl_size,
               args.patch, norm_pix=args.norm_pix, **simfle.VITS[args.vit])
    if args.model == "direct":
        return DirectSimFLE(gfl, ffl, args.beta)
    return SimFLE(gfl, ffl, args.hidden, args.outputs, args.alpha, args.beta, args.temperature)


ALONE = ["byol", "simsiam", "moco", "mocov2", "simclr"]
ROWS = [*ALONE, "direct", "random", *(f"simfle-{method}" for method in ALONE[1:])]
simfle.MODELS |= dict.fromkeys(ROWS, build)


def main(argv: list[str] | None = None) -> int:
    """`simfle.main`, which knows these models now."""
    return simfle.main(argv)


if __name__ == "__main__":
    simfle.leave(main())
