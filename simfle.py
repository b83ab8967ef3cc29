# SPDX-License-Identifier: MIT
"""SimFLE in one file: self-supervised facial expression recognition in the wild.

SimFLE (Simple Facial Landmark Encoding, J. Moon and S. Park) trains a ResNet on face photographs
without labels. Two tasks share the backbone. Global facial feature learning (GFL, Section 3.1) must
find two random views of a face alike. In fine-grained facial feature learning (FFL, Section 3.2)
the backbone's channels decide which patches of a face a masked autoencoder gets to see.
Distillation exchanges what both have learnt (Section 3.3). Afterwards only the backbone is kept.
Read this file from the top with the paper beside it. Section numbers, letters and equations are the
paper's, except where the text says "ours" or names a departure by its number.

    python simfle.py                                               the demo, on a laptop
    python simfle.py --data affectnet                              one GPU
    torchrun --nproc_per_node=3 simfle.py --data affectnet         three GPUs, as in the paper
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 ...
                                                                   two nodes, on each of them
    python simfle.py --data affectnet --eval                       linear evaluation of that run

`--data NAME` is a folder, or the folder of that name in data/. Results go to runs/NAME/ (`--name`
gives another name). There checkpoint.pt holds all that is needed: the same command resumes from it.
Beside it, backbone.pt is a torchvision state dict without `fc`, and log.jsonl the log.

One step, with B images (sg: no gradient)

    v1, v2 = augment(crop of the face), augment(another)   (B, 3, 224, 224)
    z1, h1 = online(v1);  z2, h2 = online(v2)              (B, 256), and pooled features (B, 2048)
    L_s = eq1(predictor(z1), sg(target(v2))) + eq1(predictor(z2), sg(target(v1)))
    X = sg(backbone(I))                                    (B, 2048, 4, 4), I: the whole face
    C = relu(batchnorm(conv1x1(X)))                        32 groups of 64 channels
    L_g = eq2(C) / 2048                                    alike in a group, unlike between groups
    a = patch means of upsample(sum of C over a group)     (B, 49) scores; each image draws a group
    mask = the 37 patches with the lowest scores           (B, 49) 0 kept, 1 masked
    tokens = encoder(class token, the 12 kept patches)     (B, 13, 768)
    L_r = mean squared error of decoder(tokens) on the masked patches
        + 0.02 · 2048 · refinement(a, errors)              its value is 0; its gradient moves a
    z_m, z_v1, z_v2 = distil_m(mean of the patches' tokens), distil_v(h1), distil_v(h2)   (B, 256)
    z̄ = sg(mean of z_m, z_v1, z_v2);  L_d = t² · sum of KL(softmax(z̄/t) ‖ softmax(z_i/t))
    (L_s + L_r + 0.3 L_d + 0.03 L_g).backward(); optimizer.step()
    target = 0.99 target + 0.01 online                     without the predictor

Letters
    I, v1, v2     a face, and two augmented views of it
    f_θ           the online stream: backbone, projector, predictor (in code: online, predictor)
    f_ρ           the target stream: backbone, projector
    τ             the decay of the target, an exponential moving average (EMA) of online
    X             the backbone's map of I: c′ channels of h′ × w′
    C_i, D, N_g   channel i after grouping; the cosine of two channels; the number of groups
    a_i, γ        the score of patch i; the share of the N_p patches that is masked
    N_m           the number of masked patches
    e_i, κ        (ours) the reconstruction error of patch i; κ c′ is the refinement's weight
    z_m, z_v1, z_v2, t    the three distilled vectors and the temperature of their softmax
    L_s, L_r, L_d, L_g    similarity, reconstruction, distillation (weight α), grouping (weight β)

MAE is the masked autoencoder of He et al. (2022). ViT is the transformer for images that it uses.
DDP is PyTorch's DistributedDataParallel. "Authors:" stands before what the public code of the
paper's authors does. Departures from the paper and from that code are numbered at their line; the
README has the table. The paper's accuracies have not been reproduced: that takes AffectNet and
GPUs. Nothing has run on a GPU yet.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warning of `find_unused_parameters`

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

# AffectNet's colours, as published by the paper's authors: mean and deviation of three channels.
MEAN, STD = (0.5795, 0.4522, 0.3957), (0.2769, 0.2473, 0.2412)

# ================================ Part I: the method ================================
# Plain tensors in, plain tensors out: no settings object, device, process group or file. So each
# piece can be pasted elsewhere, with the imports above and the helpers that it names. Shapes are
# those of the paper's setting: ResNet-50, views of 224 pixels, I of 112; B is the batch.


def full_precision(x: Tensor):
    """Switches `torch.autocast` off where fp32 matters, such as in norms and cosines. (ours)

    bf16 has 8 significant bits. Many of the 49 scores of `SemanticMasking` would be equal in it,
    and chance would decide between them. Inputs that are bf16 already are cast up by `promote`.

    Args:
        x: any tensor; autocast is switched off on its device.
    Returns:
        a context manager."""
    return torch.autocast(x.device.type, enabled=False)


def promote(x: Tensor) -> Tensor:
    """Lifts bf16 and half to fp32, and leaves fp32 and float64 as they are. (ours)"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor, dim: int, floor: float = 0.1) -> Tensor:
    """Scales vectors to unit length; a zero vector stays zero. (ours)

    The gradient that passes through x/‖x‖ is proportional to 1/‖x‖. A few vectors that are almost
    zero would outweigh all others. So in the gradient, and only there, 1/‖x‖ is at most 1/floor. An
    exactly zero vector gets no gradient.

    Args:
        x: vectors along `dim`, fp32 or float64.
        dim: the dimension of their coordinates.
        floor: the least norm in the gradient.
    Returns:
        the shape of x."""
    u = F.normalize(x, dim=dim)
    share = x.detach().norm(dim=dim, keepdim=True) / floor
    return torch.lerp(u.detach(), u, share.clamp(max=1))  # the value is u, its gradient share × u's


class Backbone(nn.Module):
    """A torchvision ResNet that returns its last feature map and the map's mean. (Sec. 3, Fig. 2)

    Its `fc` is taken off. So `backbone.resnet.state_dict()` is torchvision's without `fc.*`.

    Args:
        resnet: a torchvision ResNet; by default a new ResNet-50.
    Forward:
        x: images (B, 3, 224, 224).
        Returns the map (B, 2048, 7, 7) and the pooled features (B, 2048). At 112 pixels the map is
        4 × 4."""
    def __init__(self, resnet: nn.Module | None = None):
        super().__init__()
        self.resnet = torchvision.models.resnet50() if resnet is None else resnet
        self.channels = self.resnet.fc.in_features  # c′ = 2048
        self.resnet.fc = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = feature_map(self.resnet, x)
        return x, x.mean(dim=(2, 3))


def feature_map(r: nn.Module, x: Tensor) -> Tensor:
    """Runs a torchvision ResNet without its pooling and `fc`: (B, 3, 224, 224) images in, a map
    (B, 2048, 7, 7) out. (Fig. 2)"""
    x = r.maxpool(r.relu(r.bn1(r.conv1(x))))  # (B, 64, 56, 56)
    return r.layer4(r.layer3(r.layer2(r.layer1(x))))


def mlp(inputs: int, hidden: int = 4096, outputs: int = 256) -> nn.Sequential:
    """Makes a head: each projector, the predictor, each distillation head. (Sec. 4.1)

    Paper: "a fully connected layer with a batch normalization and a ReLU activation, followed by
    another fully connected layer". It gives no widths. Authors: 4096 and 256, as in BYOL.

    Args:
        inputs, hidden, outputs: widths of the layers.
    Returns:
        a module, (B, inputs) -> (B, outputs)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, outputs))


# ===== 3.1 GFL: global facial feature learning =====
# Two views of one face, cropped and coloured at random, should mean the same. Asking just that has
# a trivial answer: map every face to one point, a collapse. BYOL avoids it without comparing two
# different faces. The online stream f_θ (backbone, projector, predictor) predicts what the target
# stream f_ρ (backbone, projector) says of the other view. No gradient moves the target. It is an
# average of past online streams. Only the online stream has a predictor; BYOL's authors report a
# collapse without it.
#
# `spread` shows whether it worked. (The table before `SimFLE` has its values in a training.)


def similarity_loss(p: Tensor, z: Tensor) -> Tensor:
    """The squared distance of prediction and target, both at unit length. (Sec. 3.1, Eq. 1)

    Args:
        p: predictions f_θ of one view, (B, 256).
        z: projections f_ρ of the other view, (B, 256).
    Returns:
        scalar from 0 to 4: the mean of 2 − 2·cos over the batch.

        p, z = torch.randn(8, 256, requires_grad=True), torch.randn(8, 256)
        L_s = similarity_loss(p, z)
        L_s.backward()
    """
    with full_precision(p):
        return (2 - 2 * F.cosine_similarity(promote(p), promote(z), dim=1)).mean()


def spread(z: Tensor) -> Tensor:
    """Measures whether projections have collapsed to one point. (ours)

    Args:
        z: projections (B, 256).
    Returns:
        scalar: the standard deviation of the normalised projections over the batch, averaged over
        the dimensions. 0 in a collapse. Over evenly spread directions in 256 dimensions each
        coordinate's standard deviation is 1/√256 = 0.0625."""
    with full_precision(z):
        return F.normalize(promote(z), dim=1).std(dim=0).mean()


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """ρ ← τ ρ + (1 − τ) θ, over all parameters in one fused call. (Sec. 3.1)

    Args:
        target, online: modules of the same shape. Their buffers stay as they are (see `BYOL`).
        tau: the EMA decay τ, 0 to 1.
    Raises:
        ValueError: weights in bf16 or half. With τ = 0.99 a step moves ρ by a hundredth of the
            difference. These types have so few digits that it would often round to nothing.

        online = mlp(2048)
        target = copy.deepcopy(online).requires_grad_(False)
        ema_update(target, online, tau=0.99)
    """
    weights = list(target.parameters())
    if any(w.dtype in (torch.bfloat16, torch.half) for w in weights):
        raise ValueError("an EMA needs weights in fp32: keep them so, and use torch.autocast")
    torch._foreach_lerp_(weights, list(online.parameters()), 1 - tau)


class Stream(nn.Module):
    """f_ρ, or f_θ without its predictor. (Sec. 3.1, Fig. 2)

    Args:
        backbone: a `Backbone`.
        projector: maps its pooled features to z.
    Forward:
        v: views (B, 3, 224, 224).
        Returns z (B, 256) and the pooled features (B, 2048)."""
    def __init__(self, backbone: Backbone, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.backbone(v)[1]
        return self.projector(pooled), pooled


class BYOL(nn.Module):
    """GFL by BYOL. (Sec. 3.1, Eq. 1)

    Call `update()` once after every step of the optimiser. A module with the same `forward` and
    `update`, and with an `online.backbone`, can take its place (data/baselines.py).

    Args:
        backbone: the `Backbone` that is trained.
        hidden, outputs: widths of projector and predictor.
        tau: the EMA decay τ of the target. The paper gives no value; authors: 0.99 throughout.
    Forward:
        v1, v2: views (B, 3, 224, 224); B ≥ 2 in train mode (BatchNorm).
        Returns L_s, a scalar from 0 to 8; [h1, h2], the online stream's pooled features (B, 2048)
        of the views (a list, since another GFL may have those of v1 alone); and z1 (B, 256), its
        projection of v1.

        byol, (v1, v2) = BYOL(Backbone(torchvision.models.resnet18())), torch.randn(2, 4, 3, 64, 64)
        L_s, (h1, h2), z1 = byol(v1, v2); L_s.backward()  # and a step of the optimiser
        byol.update()
    """
    def __init__(self, backbone: Backbone, hidden: int = 4096, outputs: int = 256,
                 tau: float = 0.99):
        super().__init__()
        self.tau = tau
        self.online = Stream(backbone, mlp(backbone.channels, hidden, outputs))
        self.predictor = mlp(outputs, hidden, outputs)
        # The target starts as a copy. In train mode its BatchNorm layers normalise by the batch.
        # Their running statistics are not averaged with the online ones: no training reads them.
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        # One forward pass per view: the statistics of BatchNorm are then those of one view.
        z1, h1 = self.online(v1)
        z2, h2 = self.online(v2)
        with torch.no_grad():
            target1, target2 = self.target(v1)[0], self.target(v2)[0]
        # Paper: "The same process can be done again by swapping the positions of v1 and v2." The
        # two are added, not averaged.
        L_s = (similarity_loss(self.predictor(z1), target2)
               + similarity_loss(self.predictor(z2), target1))
        return L_s, [h1, h2], z1

    def update(self) -> None:
        """Moves the target after the optimiser's step. (Sec. 3.1)"""
        ema_update(self.target, self.online, self.tau)


class GFLAlone(nn.Module):
    """One branch alone. (Table 3 a, Table 1)

    Call `update()` once after every step of the optimiser.

    Args:
        gfl: `BYOL`, or a module with its interface.
    Forward:
        v1, v2: views (B, 3, 224, 224).
        I: not used here.
        Returns a dict: `loss`, with gradient; L_s and spread, without."""
    def __init__(self, gfl: nn.Module):
        super().__init__()
        self.gfl, self.ffl = gfl, None

    @property
    def backbone(self) -> Backbone:
        """The one network that is kept in the end."""
        return self.gfl.online.backbone

    def forward(self, v1: Tensor, v2: Tensor, I: Tensor | None = None) -> dict[str, Tensor]:
        L_s, _, z1 = self.gfl(v1, v2)
        return report(L_s, L_s=L_s, spread=spread(z1))

    def update(self) -> None:
        """What changes without gradient, after every step: the target. (Sec. 3.1)"""
        self.gfl.update()


def report(loss: Tensor, **parts: Tensor) -> dict[str, Tensor]:
    """A dict of the loss, with its gradient, and of its parts, detached. (ours)"""
    return {"loss": loss} | {name: value.detach() for name, value in parts.items()}


# ===== 3.2 Channel grouping =====
# FFL wants the backbone to say which parts of a face matter. Each of its c′ = 2048 channels is a
# small picture of where something was found, and many are alike. A 1 × 1 convolution mixes them
# into c′ new ones, of which channel k belongs to group k // (c′/N_g): 32 groups of 64. Eq. 2 asks
# channels of one group to look at the same places, and channels of different groups at different
# ones.
#
# Written as it stands, Eq. 2 needs the cosines of all 2048² pairs for each image. There is a
# shorter way. Let U be the c′ × h′w′ matrix whose rows are the channels at unit length. U Uᵀ holds
# the cosines. The sum of squared cosines is the squared Frobenius norm ‖U Uᵀ‖²:
#
#     Σ_ij D(C_i, C_j)²  =  ‖U Uᵀ‖²  =  trace(U Uᵀ U Uᵀ)  =  trace(Uᵀ U Uᵀ U)  =  ‖Uᵀ U‖²
#
# Uᵀ U is only h′w′ × h′w′ = 16 × 16. The same holds for the pairs inside one group g, with U_g, its
# 64 rows. So, exactly and for 1/128 of the arithmetic,
#
#     Eq. 2  =  (all pairs − pairs in a group) − pairs in a group  =  ‖Uᵀ U‖² − 2 Σ_g ‖U_gᵀ U_g‖²
#
# and Uᵀ U is the sum of the groups' U_gᵀ U_g.


class ChannelGrouping(nn.Module):
    """Mixes c′ channels into c′ channels that lie in groups. (Sec. 3.2)

    Paper: "Channel grouping can be implemented through a 1 × 1 convolution layer". As the authors
    do, we add BatchNorm and ReLU, which the paper does not mention (departure 3).

    Args:
        channels: c′.
        groups: N_g; channel k is in group k // (c′/N_g).
    Forward:
        X: the backbone's map (B, 2048, 4, 4).
        Returns C (B, 2048, 4, 4), never negative, in the weights' precision.
    Raises:
        ValueError: `groups` does not divide `channels`.

        grouping = ChannelGrouping(2048, groups=32)
        C = grouping(torch.randn(2, 2048, 4, 4))
        L_g, D2_between, D2_within = grouping_loss(C, groups=32)
    """
    def __init__(self, channels: int = 2048, groups: int = 32):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{groups} channel groups do not divide {channels} channels")
        # Departure 3: PyTorch's own random start. Authors: one constant, from which all channels
        # are equal, and so are their gradients.
        self.conv = nn.Conv2d(channels, channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, X: Tensor) -> Tensor:
        with full_precision(X):
            return F.relu(self.norm(self.conv(X.to(self.conv.weight.dtype))))


def pair_sums(C: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The two sums of Eq. 2: D(C_i, C_j)² over pairs in different groups, and in one group.
    (Sec. 3.2, Eq. 2)

    As in Eq. 2, i and j run over all channels. Each pair counts twice, and each channel is paired
    with itself once.

    By hand, 4 channels of 2 positions in 2 groups: (1, 0), (1, 0) | (0, 1), (1, 1). In the first
    group D² is 1 four times. In the second it is 1, ½, ½, 1. Together that is 7. Between the groups
    D² is 0, ½, 0, ½, each twice. Together that is 2. All pairs are ‖Uᵀ U‖²: Uᵀ U = [2.5 0.5;
    0.5 1.5], whose squares sum to 9 = 2 + 7.

    Args:
        C: grouped channels (B, c′, h′, w′); channel k is in group k // (c′/N_g). Time and memory
            grow with (h′w′)².
        groups: N_g; divides c′.
    Returns:
        the sum between groups and the sum within groups, (B,) each."""
    with full_precision(C):
        U = rearrange(promote(C), "b (g k) h w -> b g k (h w)", g=groups)  # (B, 32, 64, 16)
        U = unit(U, dim=3)
        gram = torch.einsum("bgkp,bgkq->bgpq", U, U)  # (B, 32, 16, 16): U_gᵀ U_g
        within = gram.square().sum(dim=(1, 2, 3))
        all_pairs = gram.sum(dim=1).square().sum(dim=(1, 2))
    return all_pairs - within, within


def grouping_loss(C: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Channels of one group alike, channels of different groups unlike. (Sec. 3.2, Eq. 2)

    Each of 2,048 channels has 63 partners in its group and 1,984 strangers, and Eq. 2 weighs all
    pairs alike. So it mostly asks for unlike channels. Still those of a group become alike. Mean D²
    in the demo's log, at step 20 and over the last 100 of 1,000 steps (a small net with 256
    channels in 32 groups, seeds 0, 1, 2):

        between groups    0.13, 0.12, 0.13  →  0.05, 0.06, 0.06
        within groups     0.14, 0.14, 0.15  →  0.77, 0.49, 0.59

    Departure 2. Authors average each pair's cosine over the batch. Their loss is, but for a factor,
    the fourth power of the distance of these c′ × c′ means to a matrix with ones inside the groups
    and zeros elsewhere. Ours is Eq. 2, divided by c′. With that L_g's gradient to one channel does
    not grow with c′. So one β serves nets of all widths. (Channels that are almost 0 have a bounded
    gradient: see `unit`.)

    Args:
        C: grouped channels (B, c′, h′, w′); channel k is in group k // (c′/N_g).
        groups: N_g; divides c′.
    Returns:
        L_g: scalar, Eq. 2 divided by c′, mean over the batch.
        D2_between: scalar without gradient, mean D² over the batch's pairs of channels in
            different groups. Channels that are 0 everywhere on an image do not count there.
        D2_within: the same of two different channels in one group.
        In the example of `pair_sums` these are (2 − 7)/4 = −1.25; 2/8; and 3/4, the mean of 1
        and ½.

        C = torch.rand(2, 2048, 4, 4, requires_grad=True)
        L_g, D2_between, D2_within = grouping_loss(C, groups=32)
        L_g.backward()
    """
    between, within = pair_sums(C, groups)
    channels = C.shape[1]
    alive = C.detach().flatten(2).any(dim=2)  # (B, 2048): not 0 everywhere
    n = rearrange(alive, "b (g k) -> b g k", g=groups).sum(dim=2)  # (B, 32), up to 64
    inside = (n * (n - 1)).sum()  # how many pairs there are, each counted twice
    outside = (n.sum(dim=1)**2 - (n**2).sum(dim=1)).sum()
    D2_between = between.detach().sum() / outside.clamp(min=1)
    D2_within = (within.detach().sum() - n.sum()) / inside.clamp(min=1)  # D(C_i, C_i)² is 1
    L_g = (between - within).mean() / channels
    return L_g, D2_between, D2_within


# ===== 3.2 Semantic masking =====
# MAE masks patches at random. Here a channel group decides. Its 64 channels are summed to one score
# map, and the patches with the lowest scores are masked. So what the group responds to stays
# visible. Each image draws a group of its own in every step. (The paper does not say whether an
# image or a batch draws. Authors: an image.)
#
# The 49 scores are interpolated from the score map's 4 × 4 = 16 values. Neighbouring patches have
# similar scores. So a mask is made of coherent regions. (Chance decides between equal scores, such
# as 0.)
#
# Masks follow MAE's convention: 0 is kept, 1 is masked. (The paper's Fig. 3 draws 1 for kept.)


class SemanticMasking(nn.Module):
    """Chooses the patches to mask from the grouped channels. (Sec. 3.2, Eq. 3)

    The group and the order of equal scores are random, in eval mode too.

    Args:
        groups: N_g.
        image_size: pixels a side of I.
        patch: pixels a side of a patch. Patches are counted row by row.
        ratio: γ, the share of the patches that is masked.
    Forward:
        C: grouped channels (B, 2048, 4, 4).
        Returns the scores a (B, 49), with gradient; the indices of the kept patches (B, 12),
        highest score first; and the mask (B, 49), 0 kept and 1 masked.
    Raises:
        ValueError: the image is not made of several patches of this size.

        C = torch.rand(2, 2048, 4, 4)
        masking = SemanticMasking(groups=32, image_size=112, patch=16, ratio=0.75)
        a, keep, mask = masking(C)
    """
    def __init__(self, groups: int = 32, image_size: int = 112, patch: int = 16,
                 ratio: float = 0.75):
        super().__init__()
        if image_size % patch or patch == image_size:
            raise ValueError(f"an image of {image_size} pixels is not made of patches of {patch}")
        self.groups, self.image_size, self.patch, self.ratio = groups, image_size, patch, ratio

    def scores(self, C: Tensor, group: Tensor) -> Tensor:
        """a_i of Eq. 3. C: (B, c′, h′, w′); group: the chosen group of each image, (B,). Returns
        (B, 49). (Sec. 3.2, Eq. 3)"""
        with full_precision(C):
            grouped = rearrange(promote(C), "b (g k) h w -> b g k h w", g=self.groups)
            image = torch.arange(len(C), device=C.device)
            score_map = grouped[image, group].sum(dim=1)  # (B, 4, 4): the paper's X_g̃
            # Paper: "upsampled". Authors: bilinear. The mean of Eq. 3 is then average pooling.
            score_map = F.interpolate(score_map[:, None], size=(self.image_size,) * 2,
                                      mode="bilinear", align_corners=False)  # (B, 1, 112, 112)
            return F.avg_pool2d(score_map, self.patch).flatten(1)  # (B, 49)

    def forward(self, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.scores(C, torch.randint(self.groups, (len(C),), device=C.device))
        return a, *mask_lowest(a, self.ratio)


def mask_lowest(a: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Masks the patches with the lowest scores. (Sec. 3.2)

    Paper: "the patches are masked in ascending order". Departure 21: between equal scores chance
    decides. Authors: the order in which their sort leaves them. Many scores are 0, since a group
    finds nothing in much of a face. Measured on photographs (--preset laptop --steps 2000, seed 0,
    after training): in 26 % of the masks fewer than 12 patches scored above 0. Of equal ones a
    stable sort alone would keep those that are nearest to the top left.

    Args:
        a: scores (B, N_p), N_p ≥ 2.
        ratio: γ. Of 49 patches at γ = 0.75, ⌊49 · 0.25⌋ = 12 are kept and 37 masked. At least one
            is kept and one is masked.
    Returns:
        keep: indices of the kept patches (B, N_p − N_m), highest score first.
        mask: (B, N_p), 0 kept and 1 masked."""
    B, N_p = a.shape
    kept = min(max(1, math.floor(N_p * (1 - ratio) + 1e-6)), N_p - 1)  # 1e-6: (1 − 0.8)·50 is 9.99…
    mixed = torch.rand_like(a).argsort(dim=1)  # equals keep this random order below
    best = a.gather(1, mixed).argsort(dim=1, descending=True, stable=True)[:, :kept]
    keep = mixed.gather(1, best)
    return keep, torch.ones_like(a).scatter(1, keep, 0.0)


# ===== 3.2 Trainable refinement =====
# Departure 1. Paper: FaceMAE "will try to avoid masking fine-grained facial landmarks, which are
# difficult to reconstruct." The paper does not say how. A sort has no gradient, and in the authors'
# code L_r never reaches the scores.
#
# Ours: we write a gradient down ourselves. Our hypothesis is that masks will then keep what is hard
# to reconstruct. Take the masked patches of an image. The score of one that is harder than their
# mean should increase, that of an easier one should decrease. The forward pass keeps its mask M of
# zeros and ones. Only the gradient uses a soft mask, which goes from 0, kept, to 1, masked. It is a
# sigmoid of how far a patch's score lies below the lowest kept score.
#
#     r = the scores standardised per image,    soft_i = sigmoid(r_thr − r_i)
#
# r_thr is the lowest standardised score among the kept patches, detached. soft_i is ½ where r_i is
# r_thr, and comes nearer to 1 the lower r_i is. A term of value 0 is added to L_r, for one image
#
#     1/N_m Σ_i M_i (e_i − ē)(soft_i − soft_i.detach())
#
# ē is the mean error of the masked patches. The last bracket is zero but has soft_i's gradient. So
# the gradient with respect to r_i is
#
#     −M_i (e_i − ē) soft_i (1 − soft_i) / N_m
#
# Without ē, every r_i of a masked patch would increase, hard or easy. A kept patch has no error in
# Eq. 4, so M_i leaves it out. Its raw score a_i moves all the same, since standardising ties the
# scores of an image together. A score of 0 does not move: the ReLU of the grouping layer passes no
# gradient there. If all masked scores of an image are 0, their r_i are equal, and the gradients to
# these r_i add up to 0. Then standardising passes nothing on to the kept scores: nothing moves.


def refinement_term(a: Tensor, mask: Tensor, error: Tensor) -> Tensor:
    """A term of value 0; descending its gradient refines the masking. (Sec. 3.2; ours)

    By hand, four patches: a = (3, 2, 1, 0), the first is kept, the others have errors 4, 1, 7. Then
    r = (1.16, 0.39, −0.39, −1.16) and ē = 4. Gradient descent moves r along (0, 0, −0.145, +0.081):
    the easy patch down, the hard one up. It moves a along (+0.024, +0.016, −0.104, +0.064), since
    standardising couples the scores.

    Does it work? On held-out pictures, over the 49 positions, a patch's error under random masks
    and the share of the groups that keep it should correlate. With seeds 0, 1, 2 they did by

                       trained                with κ = 0             masks of an untrained net
        toy faces      +0.81, +0.78, +0.80    +0.68, +0.56, +0.69    +0.54, +0.37, +0.42
        photographs    +0.41, +0.31, +0.29    −0.05, −0.15, −0.16    −0.04, +0.22, −0.01

    So it adds to what comes without it. (The last column has an untrained net's masks and the
    trained net's errors. --preset laptop, toy faces 1,000 steps, photographs 5,000. The README's
    Results have the commands, and what the term did to accuracy.)

    Args:
        a: scores (B, 49). Only they get a gradient.
        mask: (B, 49), 0 kept and 1 masked.
        error: mean squared error of every patch (B, 49); kept ones are not used.
    Returns:
        scalar 0, mean over the batch. `FaceMAE` adds it to L_r, κ c′ times.

        a, error = torch.randn(2, 49, requires_grad=True), torch.rand(2, 49)
        keep, mask = mask_lowest(a, ratio=0.75)
        refinement_term(a, mask, error).backward()
    """
    with full_precision(a):
        a, error = promote(a), promote(error.detach())
        # The standard deviation of N_p numbers is the norm of their differences to the mean, over
        # √(N_p − 1). `unit` bounds the gradient where the scores are almost equal.
        r = unit(a - a.mean(dim=1, keepdim=True), dim=1) * math.sqrt(a.shape[1] - 1)
        r_thr = r.detach().masked_fill(mask.bool(), math.inf).amin(dim=1, keepdim=True)
        soft = torch.sigmoid(r_thr - r)
        N_m = mask.sum(dim=1, keepdim=True)
        mean_error = (error * mask).sum(dim=1, keepdim=True) / N_m  # ē
        term = mask * (error - mean_error) * (soft - soft.detach()) / N_m
        return term.sum(dim=1).mean()


# ===== 3.2 FaceMAE =====
# A masked autoencoder. A ViT, the encoder, sees the 12 visible patches alone. From its tokens a
# smaller one, the decoder, guesses all 49 patches. Only the 37 masked ones enter L_r. For that the
# encoder's tokens must tell how the parts of a face belong together. The image I is the whole
# picture, resized and not augmented: the paper calls it "the input facial image", and only v1 and
# v2 are augmented.


class Block(nn.Module):
    """A pre-norm transformer block. (Sec. 4.1, ViT)

    Args:
        width: numbers of a token.
        heads: attention heads; they divide `width`.
    Forward:
        x: tokens (B, N, width). Returns the same shape."""
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3,
                            h=self.heads)
        x = x + self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


def sincos_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D positions, as in MAE. (Sec. 4.1, MAE)

    The first half of the numbers tells the column, the second half the row. Each half has sines,
    then cosines, of the coordinate at width/4 frequencies from 1 down to almost 1/10,000.

    Args:
        grid: patches a side.
        width: numbers of a token; a multiple of 4.
    Returns:
        (1, 1 + grid², width); the first row is the class token's and is zero."""
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency  # (7, 192)
    line = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (7, 384)
    row = line[:, None].expand(-1, grid, -1)
    column = line[None].expand(grid, -1, -1)
    patches = rearrange(torch.cat([column, row], dim=2), "h w d -> (h w) d")
    return torch.cat([torch.zeros(1, width), patches])[None]


PIXEL_EPS = 1e-6  # added to a patch's variance, which could be 0


class MaskedAutoencoder(nn.Module):
    """MAE with ViT-B/16 on small images. (Sec. 3.2, Eq. 4; Sec. 4.1)

    Args:
        image_size: pixels a side of I.
        patch: pixels a side of a patch.
        width, depth, heads: of the encoder (ViT-B).
        decoder_width, decoder_depth, decoder_heads: of the decoder (MAE).
        norm_pix: whether the target's pixels are normalised patch by patch (departure 8).
    Forward:
        I: images (B, 3, 112, 112), normalised.
        keep: indices of the visible patches (B, 12).
        Returns the mean squared error of every patch (B, 49), visible ones too; and the encoder's
        tokens of the visible patches (B, 12, 768), in the order of `keep`, without the class
        token."""
    def __init__(self, image_size: int = 112, patch: int = 16, width: int = 768, depth: int = 12,
                 heads: int = 12, decoder_width: int = 512, decoder_depth: int = 8,
                 decoder_heads: int = 16, norm_pix: bool = True):
        super().__init__()
        self.patch, self.grid, self.norm_pix = patch, image_size // patch, norm_pix
        pixels = 3 * patch**2  # 768 numbers a patch
        self.embed = nn.Linear(pixels, width)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.encoder = nn.Sequential(*(Block(width, heads) for _ in range(depth)),
                                     nn.LayerNorm(width, eps=1e-6))
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder = nn.Sequential(*(Block(decoder_width, decoder_heads)
                                       for _ in range(decoder_depth)),
                                     nn.LayerNorm(decoder_width, eps=1e-6))
        self.to_pixels = nn.Linear(decoder_width, pixels)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        # Saved and counted with the rest, never trained, as in MAE.
        self.position = nn.Parameter(sincos_positions(self.grid, width), requires_grad=False)
        self.decoder_position = nn.Parameter(sincos_positions(self.grid, decoder_width),
                                             requires_grad=False)

    def patchify(self, I: Tensor) -> Tensor:
        """(B, 3, 112, 112) -> (B, 49, 768), row by row, and in a patch the colours last. (MAE)"""
        return rearrange(I, "b c (gh p) (gw q) -> b (gh gw) (p q c)", p=self.patch, q=self.patch)

    def encode(self, patches: Tensor, keep: Tensor) -> Tensor:
        """Encodes the visible patches behind the class token. patches: (B, 49, 768); keep: (B, 12).
        Returns (B, 13, 768). (MAE)"""
        x = self.embed(patches) + self.position[:, 1:]
        x = torch.take_along_dim(x, keep[:, :, None], dim=1)  # (B, 12, 768)
        first = (self.class_token + self.position[:, :1]).expand(len(x), -1, -1)
        return self.encoder(torch.cat([first, x], dim=1))

    def decode(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Guesses every patch's pixels, as in `target`. tokens: (B, 13, 768); keep: (B, 12).
        Returns (B, 49, 768). (MAE)"""
        y = self.decoder_embed(tokens)  # (B, 13, 512)
        B, _, width = y.shape
        # A mask token everywhere, then the visible patches in their places.
        x = self.mask_token.to(y.dtype).expand(B, self.grid**2, -1)
        x = x.scatter(1, keep[:, :, None].expand(-1, -1, width), y[:, 1:])  # (B, 49, 512)
        x = torch.cat([y[:, :1], x], dim=1) + self.decoder_position
        return self.to_pixels(self.decoder(x))[:, 1:]

    def target(self, patches: Tensor) -> Tensor:
        """What is to be guessed, (B, 49, 768): with `norm_pix`, pixels with mean 0 and standard
        deviation 1 in every patch. Without it, brightness and contrast dominate the error.
        (Departure 8)"""
        if not self.norm_pix:
            return promote(patches)
        var, mean = torch.var_mean(promote(patches), dim=2, keepdim=True)
        return (promote(patches) - mean) / (var + PIXEL_EPS).sqrt()

    def forward(self, I: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patchify(I)
        tokens = self.encode(patches, keep)
        guess = self.decode(tokens, keep)
        error = (promote(guess) - self.target(patches)).square().mean(dim=2)  # (B, 49)
        return error, tokens[:, 1:]


class FaceMAE(nn.Module):
    """The whole of FFL: grouping, semantic masking, autoencoding. (Sec. 3.2, Eq. 2 to 4)

    `SimFLE` adds L_r + β L_g to its loss.

    Args:
        channels: c′ of the backbone.
        groups: N_g.
        ratio: γ, the share of the patches that is masked.
        kappa: κ; the refinement's weight is κ times the number of channels c′. With 0 L_r does not
            train the masking, as in the authors' code.
        image_size, patch: pixels a side of I and of a patch.
        autoencoder: further arguments of `MaskedAutoencoder`.
    Forward:
        X: the backbone's map of I, (B, 2048, 4, 4), without gradient. (With it, the losses would
            train the backbone: Sec. 3.3, Table 3 b.)
        I: images (B, 3, 112, 112), normalised.
        Returns L_r, the mean over masked patches with the refinement, a scalar;
        L_g, a scalar;
        the encoder's tokens (B, 12, 768), highest score first;
        and a dict to be logged, without gradient. It has D2_between and D2_within (see
        `grouping_loss`). By patch position, (49,) each, it has masked_error, the summed error of
        masked patches, and masked, how often each was masked (Fig. 3).
    Raises:
        ValueError: see `ChannelGrouping` and `SemanticMasking`.

        ffl = FaceMAE(channels=512, depth=2, decoder_depth=1)
        X, I = torch.randn(2, 512, 4, 4), torch.randn(2, 3, 112, 112)
        L_r, L_g, tokens, logged = ffl(X, I)
    """
    def __init__(self, channels: int = 2048, groups: int = 32, ratio: float = 0.75,
                 kappa: float = 0.02, image_size: int = 112, patch: int = 16, **autoencoder):
        super().__init__()
        self.groups, self.kappa = groups, kappa
        self.grouping = ChannelGrouping(channels, groups)
        self.masking = SemanticMasking(groups, image_size, patch, ratio)
        self.mae = MaskedAutoencoder(image_size, patch, **autoencoder)

    def forward(self, X: Tensor, I: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        C = self.grouping(X)
        L_g, D2_between, D2_within = grouping_loss(C, self.groups)
        a, keep, mask = self.masking(C)
        error, tokens = self.mae(I, keep)
        # Eq. 4. Paper: "We compute the loss only for the N_m masked patches" (mask is 1 there).
        L_r = (error * mask).sum() / mask.sum()
        # L_g and the refinement both train the grouping layer, and neither may drown the other. A
        # score sums the c′/N_g channels of a group and is standardised. Where these channels are
        # alike, one of them gets N_g/c′ of the gradient that it would get alone. A group is drawn
        # 1 time in N_g. Both together make 1/c′. L_g's gradient does not shrink with c′. Hence the
        # factor c′.
        # With κ = 0.02 and β = 0.03 both gradients stayed within a factor of three of each other.
        # (The paper's sizes, 60 steps of 16 photographs, one seed.)
        L_r = L_r + self.kappa * C.shape[1] * refinement_term(a, mask, error)
        logged = {"D2_between": D2_between, "D2_within": D2_within,
                  "masked_error": (error.detach() * mask).sum(dim=0), "masked": mask.sum(dim=0)}
        return L_r, L_g, tokens, logged


# ===== 3.3 Connecting two branches =====
# FFL wants easy reconstruction, GFL wants views alike. Where both pull at the backbone, the paper's
# accuracy falls from 44.01 % to 20.98 % (Table 3, d and b). So the map X that makes the scores
# carries no gradient back. Sec. 3.2 says that the refinement adjusts the backbone too; here, as in
# the authors' code, FFL trains the grouping layer and the autoencoder alone. The branches only
# exchange what they know: the autoencoder's vector of the face and the backbone's vectors of the
# two views, each through a head. The softmax of each should come near the softmax of their mean.


def distillation_loss(zs: list[Tensor], t: float = 4.0) -> Tensor:
    """Draws each vector's softmax towards that of their mean. (Sec. 3.3, Eq. 5)

    Departure 7. Paper: KL(ψ(z_i/t), ψ(z̄/t)), without t²; which of the two is the reference, and
    what carries a gradient, are open. Authors: z̄ is the teacher, KL(ψ(z̄/t) ‖ ψ(z_i/t)), times t².
    The gradient shrinks by 1/t in the softmax and by another 1/t in the difference of the
    distributions. With t² its size hardly depends on t (Hinton et al., 2015). Detaching z̄ changes
    nothing: the mean of the three log-softmaxes and the log-softmax of z̄ differ by one number, the
    same in every coordinate. So through z̄ the gradients of the three KL terms cancel.

    Args:
        zs: z_m, z_v1, z_v2, (B, 256) each.
        t: temperature.
    Returns:
        scalar: summed over the vectors, mean over the batch.

        zs = [torch.randn(8, 256, requires_grad=True) for _ in range(3)]
        L_d = distillation_loss(zs, t=4.0)
        L_d.backward()
    """
    with full_precision(zs[0]):
        zs = [promote(z) for z in zs]
        teacher = F.log_softmax(torch.stack(zs).mean(dim=0).detach() / t, dim=1)
        return t**2 * sum(F.kl_div(F.log_softmax(z / t, dim=1), teacher, log_target=True,
                                   reduction="batchmean") for z in zs)


# ===== 3.3 Total loss =====
# Who trains whom; "–" is no gradient at all. (A test holds this table.)
#
#           backbone   projector, predictor   grouping layer   encoder   decoder   distil heads
#     L_s   yes        yes                    –                –         –         –
#     L_r   –          –                      if κ > 0         yes       yes       –
#     L_d   yes        –                      –                yes       –         yes
#     L_g   –          –                      yes              –         –         –
#
# The log of a run that learns, its first step and the mean of its last ten. (ResNet-50, photographs
# of muxspace, batch 16, 60 steps, learning rate from 0.003 to 0, seed 0, fp32.)
#
#               L_s     L_r     L_d      L_g    spread
#     step 1    3.79    1.77    0.131    287    0.047
#     the end   1.67    0.61    0.061    280    0.047
#
# L_s starts near 4: for two unrelated directions 2 − 2·cos is about 2, and L_s adds two such terms.
# β L_g is 8.6 at first, more than all other terms together. It trains the grouping layer alone, so
# it takes nothing from the backbone's losses. In a collapse `spread` falls to 0, and L_s with it.


class SimFLE(GFLAlone):
    """GFL and FFL; without arguments, of the paper's sizes. (Sec. 3, Fig. 2, Eq. 6)

    `backbone` and `update` are those of `GFLAlone`.

    Args:
        gfl: `BYOL`, or a module with its interface (data/baselines.py).
        ffl: a `FaceMAE` for the channels of its backbone.
        hidden, outputs: widths of the distillation heads.
        alpha, beta: weights of L_d and L_g.
        t: temperature of the distillation.
    Forward:
        v1, v2: augmented views (B, 3, 224, 224).
        I: whole faces (B, 3, 112, 112), not augmented.
        Returns a dict: `loss`, scalar with gradient; without gradient L_s, L_r, L_d, L_g, spread
        (scalars) and what `FaceMAE` logs."""
    def __init__(self, gfl: nn.Module | None = None, ffl: FaceMAE | None = None,
                 hidden: int = 4096, outputs: int = 256, alpha: float = 0.3, beta: float = 0.03,
                 t: float = 4.0):
        super().__init__(BYOL(Backbone()) if gfl is None else gfl)
        self.alpha, self.beta, self.t = alpha, beta, t
        channels = self.backbone.channels
        self.ffl = FaceMAE(channels) if ffl is None else ffl
        width = self.ffl.mae.embed.out_features
        self.distil_m = mlp(width, hidden, outputs)  # of the encoder's tokens
        self.distil_v = mlp(channels, hidden, outputs)  # of the backbone's features

    def forward(self, v1: Tensor, v2: Tensor, I: Tensor) -> dict[str, Tensor]:
        # 3.1 What is the same in two views?
        L_s, hs, z1 = self.gfl(v1, v2)

        # 3.2 What must be seen to guess the rest? The backbone sees I in train mode, as it sees the
        # views: the running statistics of its BatchNorm move by I too. No gradient comes back.
        # The views must come first. In PyTorch 2.8 autocast would otherwise use the weights' bf16
        # copies that it made under `no_grad`, and the views would not train the backbone's
        # convolutions. (Seen on the CPU.)
        with torch.no_grad():
            X, _ = self.backbone(I)
        L_r, L_g, tokens, logged = self.ffl(X, I)

        # 3.3 What has each branch learnt? Authors: z_m is made from the mean of the visible
        # patches' tokens, without the class token.
        z_m = self.distil_m(tokens.mean(dim=1))
        L_d = distillation_loss([z_m] + [self.distil_v(h) for h in hs], self.t)

        # Eq. 6. Departure 17: as L_g is Eq. 2 divided by c′, our β = 0.03 corresponds to 0.03/c′ in
        # the paper. As L_d is t² times Eq. 5 (departure 7), α = 0.3 corresponds to 0.3 t² = 4.8.
        loss = L_s + L_r + self.alpha * L_d + self.beta * L_g
        return report(loss, L_s=L_s, L_r=L_r, L_d=L_d, L_g=L_g, spread=spread(z1), **logged)


# ===== Table 3: parts taken away =====


class DirectSimFLE(GFLAlone):
    """Both branches train the backbone, without distillation. (Table 3 b, as we read it)

    The map X keeps its gradient. So L_g and the refinement train the backbone too, through the
    grouping layer. With κ = 0 only L_g does: L_r does not reach the map then.

    Args:
        gfl, ffl, beta: see `SimFLE`.
    Forward:
        v1, v2, I: see `SimFLE`.
        Returns the same dict without L_d."""
    def __init__(self, gfl: nn.Module, ffl: FaceMAE, beta: float = 0.03):
        super().__init__(gfl)
        self.ffl, self.beta = ffl, beta

    def forward(self, v1: Tensor, v2: Tensor, I: Tensor) -> dict[str, Tensor]:
        L_s, _, z1 = self.gfl(v1, v2)
        L_r, L_g, _, logged = self.ffl(self.backbone(I)[0], I)
        return report(L_s + L_r + self.beta * L_g, L_s=L_s, L_r=L_r, L_g=L_g, spread=spread(z1),
                      **logged)


class RandomMasking(SemanticMasking):
    """Masks at random, with the interface of `SemanticMasking`. (Table 3 c)

    The grouping layer and L_g stay, because Table 3 gives rows c and d the same arithmetic. The
    mask does not depend on them. The scores are random numbers, without gradient."""
    def forward(self, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = torch.rand(len(C), (self.image_size // self.patch)**2, device=C.device)
        return a, *mask_lowest(a, self.ratio)


# ================================ Part II: training ================================
# Sec. 4.1 gives the data, the optimiser, its schedule and the augmentation. The rest is ours:
# how pictures are read, how processes share a batch, how a run survives being killed.


class UserError(Exception):
    """Something that a user can mend.

    Args:
        sentence: says what, where and what to do.
        code: the exit code of the program."""
    def __init__(self, sentence: str, code: int = 2):
        super().__init__(sentence)
        self.code = code


class UnreadableError(UserError):
    """A UserError that one rank alone may have: pictures that cannot be read."""


def seed_of(*key) -> int:
    """A seed of 32 bits from a key, the same on every machine. torch's CPU generator uses no more
    than 32 bits of a seed. (ours)"""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


def generator_of(*key) -> torch.Generator:
    """A generator of the CPU that starts from `seed_of` this key. (ours)"""
    return torch.Generator().manual_seed(seed_of(*key))


# ===== Pictures =====
# A loader worker decodes a picture, crops and resizes it, and hands over uint8. Flip, colours, blur
# and normalisation follow on the whole batch, on its device.
#
# Every random choice is seeded. Weights are by the seed, the order of pictures by (seed, epoch).
# Crops are by (seed, epoch, place in the epoch), what a step draws by (seed, step, rank). So the
# number of workers changes nothing, and a checkpoint needs no state of a generator. Another number
# of ranks draws other colours and masks. (A rank is one of the W processes of a run.)


NO_PICTURES = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow knows them, but decodes none


def find_data(name: str) -> Path:
    """The folder that --data means: a path, or a folder of that name in data/.

    Raises UserError: there is none, and it tells which there are; or there are two."""
    found = [f for f in (Path(name), HERE / "data" / name) if name and f.is_dir()]
    if len(found) == 2 and not found[0].samefile(found[1]):
        raise UserError(f"--data {name} may be the folder {found[0].resolve()} or {found[1]}; give "
                        f"the whole path.")
    if found:
        return found[0]
    there = {p.name for p in (HERE / "data").glob("[!._]*") if p.is_dir()} - {"figures"}
    raise UserError(f"there is no dataset {name}, as a path or in data/, which has "
                    f"{', '.join(sorted(there)) or 'none'}; `python data/prepare.py NAME --src "
                    f"DOWNLOAD` makes the paper's, `python data/toy.py` draws toy faces.")


def colours_of(folder: Path) -> tuple[list[float], list[float]]:
    """The colours by which a dataset is normalised. (Sec. B.4)

    They are its own where its stats.json says so (FERPlus), else AffectNet's.

    Args:
        folder: of the dataset.
    Returns: mean and standard deviation of the three channels, of pixels in [0, 1].
    Raises UserError: stats.json does not hold them, or data/prepare.py has not ended."""
    path = folder / "stats.json"
    if not path.exists():
        if (folder / ".prepared.jsonl").exists():
            raise UserError(f"{folder} is not complete; the data/prepare.py command that began it "
                            f"resumes.")
        return MEAN, STD
    with contextlib.suppress(ValueError, LookupError, TypeError):
        stats = json.loads(path.read_bytes())
        mean, std = (stats["mean"], stats["std"]) if stats["own_colours"] else (MEAN, STD)
        if len(mean) == len(std) == 3 and min(std) > 0:
            return mean, std
    raise UserError(f"{path} does not hold own_colours, mean and std of three channels; mend it, "
                    f"or make it again with data/prepare.py.")


def find_pictures(folder: Path) -> list[str]:
    """All pictures below a folder, at any depth, sorted.

    A picture is a file with an extension that Pillow reads. Hidden files and folders are skipped.
    Rank 0 says how many other files there are.

    Raises UserError: there are none, or a folder cannot be entered."""
    readable = {e for e, kind in Image.registered_extensions().items()
                if kind in Image.OPEN and kind not in NO_PICTURES}
    found, others = [], 0

    def refuse(error: OSError):
        raise UserError(f"{error}; make it readable, or move it out of {folder}.")

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = os.path.realpath(parent) + os.sep
        folders[:] = [f for f in folders if not f.startswith((".", "__MACOSX"))
                      and not here.startswith(os.path.realpath(here + f) + os.sep)]  # no circles
        files = [f for f in files if not f.startswith(".")]
        pictures = [f for f in files if os.path.splitext(f)[1].lower() in readable]
        found += [os.path.join(parent, f) for f in pictures]
        others += len(files) - len(pictures)
    if not found:
        raise UserError(f"{folder} holds no pictures; put some in, remove it, or give another "
                        f"--data.")
    if others and int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(OSError, ValueError):  # as in `say`
            print(f"{folder}: {others:,} files that Pillow does not read are left out", flush=True)
    return sorted(found)


def read_picture(path: str) -> Tensor:
    """Decodes any picture that Pillow reads, upright, to RGB, (3, H, W) uint8. (Departure 12:
    AffectNet has .bmp and .tif too.)

    In deep and floating-point grey, white is the next of 1, 255, 4,095 and 65,535 above the largest
    value."""
    with Image.open(path) as picture:
        picture.load()
        with contextlib.suppress(Exception):  # of broken tags, once the pixels have been turned
            ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode[0] in "IF":
            x = TF.pil_to_tensor(picture.convert("I" if picture.mode[0] == "I" else "F"))
            x = x.double().nan_to_num()
            white = next((w for w in (1, 255, 4095) if x.max() <= w), 65_535)
            return (x * (255 / white)).clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
        return TF.pil_to_tensor(picture if picture.mode == "RGB" else picture.convert("RGB"))


def resize(x: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size), a square whatever the picture's shape. (Departure 6: so
    nothing of a face is cut off.)"""
    return F.interpolate(x[None], size=(size, size), mode="bilinear", antialias=True)[0]


class Faces(Dataset):
    """What a step needs of one picture. (Sec. 4.1)

    A picture that cannot be read is told on stderr, once by each rank. In training the next one
    takes its place, with its own label. Without crops, as in a test set, it is an error.

    Args:
        paths: the pictures.
        view_size: pixels a side of a crop.
        crops: random crops a picture; 0 for none.
        image_size: pixels a side of the whole picture, resized; 0 for none.
        crop_min: the least share of the picture that a crop covers.
        seed: of the crops, which depend on (seed, epoch, place in the epoch) alone.
        labels: one for each picture, if there are any.
    Item:
        faces[epoch, place, index] is a dict: views (crops, 3, 224, 224) uint8; image (3, 112, 112)
        uint8; label."""
    def __init__(self, paths: list[str], view_size: int = 0, crops: int = 0, image_size: int = 0,
                 crop_min: float = 1, seed: int = 0, labels: list[int] | None = None):
        self.paths, self.labels, self.seed = paths, labels, seed
        self.view_size, self.crops, self.crop_min = view_size, crops, crop_min
        self.image_size = image_size
        self.named = torch.zeros(len(paths), dtype=torch.bool).share_memory_()  # by any worker

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Tensor, int]:
        """A picture (3, H, W) uint8, this one or the next that can be read, and its index.

        Raises UnreadableError: 64 in a row cannot be read; without crops, this one cannot."""
        for i in range(index, index + (64 if self.crops else 1)):
            i %= len(self)
            try:
                return read_picture(self.paths[i]), i
            except MemoryError:
                raise
            except Exception as error:  # Pillow raises many kinds for broken files
                if not self.named[i]:
                    self.named[i] = True
                    with contextlib.suppress(OSError, ValueError):  # as in `say`
                        print(f"simfle: {self.paths[i]} cannot be read ({type(error).__name__}).",
                              file=sys.stderr, flush=True)
        raise UnreadableError("the pictures named above cannot be read; mend or remove them.")

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Tensor]:
        epoch, place, index = key
        picture, index = self.read(index)
        item = {"image": resize(picture, self.image_size)} if self.image_size else {}
        if self.labels is not None:
            item["label"] = self.labels[index]
        if self.crops:
            torch.default_generator.manual_seed(seed_of(self.seed, "crops", epoch, place))
            views = []
            for _ in range(self.crops):
                top, left, height, width = RandomResizedCrop.get_params(
                    picture, (self.crop_min, 1), (3 / 4, 4 / 3))
                crop = picture[:, top:top + height, left:left + width]
                views.append(resize(crop, self.view_size))
            item["views"] = torch.stack(views)
        return item


class Batches:
    """Which pictures one rank gets in each step: a batch sampler for DataLoader. (Sec. 4.1)

    An epoch is one permutation of the images, drawn from (seed, epoch). A step takes the next
    `batch` of it, and each rank an equal share of them. What is left at an epoch's end, too few for
    a batch, is dropped. `set_up` fills in which steps are to be done: `first`, ..., `last` − 1.

    Args:
        images: how many there are.
        batch: images a step, over all ranks.
        seed: of the permutations.
        world: see `World`.
        partial: for evaluations, whether what is left makes a smaller batch instead. It is cut so
            that all ranks get equal shares, and dropped if these are below two.
        weights: (images,), for oversampling: an epoch then draws `images` pictures with
            replacement, in proportion to the weights.
    Yields: lists of keys of `Faces`."""
    def __init__(self, images: int, batch: int, seed: int, world: World, partial: bool = False,
                 weights: Tensor | None = None):
        self.images, self.batch, self.seed, self.world = images, batch, seed, world
        self.weights, self.first, self.last = weights, 0, 0
        rest = images % batch
        self.per_epoch = images // batch + (partial and rest // world.size >= 2)

    def order(self, epoch: int) -> list[int]:
        """The images of an epoch, by place."""
        draw = generator_of(self.seed, epoch)
        if self.weights is None:
            return torch.randperm(self.images, generator=draw).tolist()
        return torch.multinomial(self.weights, self.images, True, generator=draw).tolist()

    def __iter__(self):
        drawn = None
        for step in range(self.first, self.last):
            epoch, number = divmod(step, self.per_epoch)
            if epoch != drawn:
                order, drawn = self.order(epoch), epoch
            places = range(number * self.batch, min((number + 1) * self.batch, self.images))
            share = len(places) // self.world.size
            mine = places[self.world.rank * share:(self.world.rank + 1) * share]
            yield [(epoch, place, order[place]) for place in mine]


# ===== Augmentation =====
# Each function does to a batch what torchvision's does to one picture. It takes x (B, 3, H, W) in
# [0, 1] and a factor f for each image, (B, 1, 1, 1), and returns the shape of x.

grey = TF.rgb_to_grayscale  # (B, 3, H, W) -> (B, 1, H, W)


def blend(x: Tensor, other: Tensor | float, f: Tensor) -> Tensor:
    """f · x + (1 − f) · other, cut to [0, 1]. At f = 1 it is x; beyond 1 it moves away from other.
    (torchvision)"""
    return (f * x + (1 - f) * other).clamp(0, 1)


def adjust_hue(x: Tensor, f: Tensor) -> Tensor:
    """Turns the hue by f of a full circle, −0.5 to 0.5. (Sec. 4.1, SimCLR)"""
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    # The hue in sixths of a turn, counted from the primary colour that is largest.
    hue = torch.where(value == r, (g - b) / safe,
                      torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)) + 6 * f
    # Back: a colour is the value, less the chroma times its distance on the circle of hues.
    k = torch.cat([hue + 5, hue + 3, hue + 1], dim=1) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def adjust_brightness(x: Tensor, f: Tensor) -> Tensor:
    """Towards black, or for f above 1 away from it. (Sec. 4.1, SimCLR)"""
    return blend(x, 0.0, f)


def adjust_contrast(x: Tensor, f: Tensor) -> Tensor:
    """Towards the image's mean grey, or away from it. (Sec. 4.1, SimCLR)"""
    return blend(x, grey(x).mean(dim=(1, 2, 3), keepdim=True), f)


def adjust_saturation(x: Tensor, f: Tensor) -> Tensor:
    """Towards each pixel's grey, or away from it. (Sec. 4.1, SimCLR)"""
    return blend(x, grey(x), f)


ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blurs each image by its own sigma. (Sec. 4.1, SimCLR)

    A blur of the rows is a matrix K (H × H), mirrored borders included. So the whole is K x Kᵀ: two
    batched products, whatever each image's sigma.

    Args:
        x: (B, 3, H, W).
        sigma: standard deviation in pixels, (B,); 0 leaves an image as it is.
        kernel: taps, odd.
    Returns: the shape of x."""
    tap = torch.arange(kernel, device=x.device) - kernel // 2
    weight = torch.exp(-0.5 * (tap / sigma.clamp(min=1e-3)[:, None]).square())  # (B, 23)
    weight = weight / weight.sum(dim=1, keepdim=True)

    def matrix(n: int) -> Tensor:
        position = (torch.arange(n, device=x.device)[:, None] + tap).abs()  # mirrored at 0 ...
        position = n - 1 - (n - 1 - position).abs()  # ... and at n − 1, without the edge itself
        return torch.einsum("bk,hkw->bhw", weight, F.one_hot(position, n).to(x.dtype))

    rows, columns = matrix(x.shape[2])[:, None], matrix(x.shape[3])[:, None]
    return rows @ x @ columns.mT


def normalise(x: Tensor, colours=(MEAN, STD)) -> Tensor:
    """Brings pixels to mean 0 and standard deviation 1. (Sec. B.1)

    Args:
        x: (B, 3, H, W), uint8 or floating point in [0, 1].
        colours: mean and standard deviation of the three channels, of pixels in [0, 1].
    Returns: (B, 3, H, W), floating point, channels last in memory."""
    x = x / 255 if x.dtype == torch.uint8 else x
    mean, std = colours  # plain numbers: a tensor of them would be copied, and waited for
    x = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def augment(x: Tensor, colours=(MEAN, STD)) -> Tensor:
    """SimCLR's augmentation at strength 1, but for the crop, with torch's generator. (Sec. 4.1)

    A flip with probability ½. With probability 0.8 a jitter of brightness, contrast and saturation
    by factors from 0.2 to 1.8, and of the hue by up to 0.2 of a turn. Grey with probability 0.2. A
    blur with probability ½.

    Args:
        x: square crops (B, 3, H, H), uint8.
        colours: mean and standard deviation of the three channels, of pixels in [0, 1].
    Returns: (B, 3, H, H), normalised, fp32, channels last in memory, without gradient.

        x = torch.randint(256, (8, 3, 224, 224), dtype=torch.uint8)  # crops, as they were cut
        v1, v2 = augment(x), augment(x)
    """
    def happens(probability: float) -> Tensor:
        return torch.rand(len(x), 1, 1, 1, device=x.device) < probability

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)

    with full_precision(x):
        x = x / 255
        x = torch.where(happens(0.5), x.flip(3), x)
        jittered = x
        for i in torch.randperm(4).tolist():  # departure 9: one order, for all at once
            strength = uniform(-0.2, 0.2) if ADJUST[i] is adjust_hue else uniform(0.2, 1.8)
            jittered = ADJUST[i](jittered, strength)
        x = torch.where(happens(0.8), jittered, x)
        x = torch.where(happens(0.2), grey(x), x)
        # Departure 4: blur with probability ½, as in SimCLR. (Authors: always.) At 224 pixels
        # SimCLR's sigma of 0.1 to 2 and 23 taps; at other sizes the same shares of the picture.
        size = x.shape[3]
        sigma = torch.where(happens(0.5), uniform(0.1, 2.0) * size / 224, 0.0).flatten()
        return normalise(gaussian_blur(x, sigma, kernel=size // 10 | 1), colours)


# ===== Processes =====
# torchrun starts a process for each GPU. Each has an equal share of every batch, and
# DistributedDataParallel averages their gradients. Rank 0 alone reads and writes checkpoints.


@dataclass
class World:
    """This process among those of the run.

    Args:
        rank: this process, from 0.
        size: the world size, how many there are.
        device: this rank's.
        local_size: how many there are on this machine."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    local_size: int = 1


@contextlib.contextmanager
def processes():
    """Joins the group that torchrun started; without torchrun it is one process without a group.

    Yields: a `World`.
    Raises UserError: more processes than GPUs, or a group that was not started by torchrun."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    size, local_size = (int(os.environ.get(n, 1)) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size > 1 and "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set without RANK; start several processes with torchrun.")
    cuda = torch.cuda.is_available()
    if cuda and local_size > torch.cuda.device_count():
        raise UserError(f"{local_size} processes were started on a machine with "
                        f"{torch.cuda.device_count()} GPUs; start no more with --nproc_per_node.")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    world = World(rank, size, device, local_size)
    if "RANK" not in os.environ:
        yield world
        return
    try:
        store, *_ = next(dist.rendezvous("env://"))
    except ValueError as error:  # an environment that is half set
        raise UserError(f"{error}; start several processes with torchrun.") from None
    # After `torchrun --max-restarts` the store still holds the addresses of those that have died.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                            device_id=device if cuda else None, timeout=timedelta(minutes=30))
    yield world
    dist.destroy_process_group()  # not in a `finally`: after a failure this would wait for ever


def from_rank0(world: World, make):
    """Lets rank 0 alone do something, such as reading a file.

    Args:
        make: a function without arguments; rank 0 calls it.
    Returns: what it returned, in all ranks.
    Raises UserError: in all ranks, where `make` raised a UserError or an OSError."""
    result = [None, None]
    if world.rank == 0:
        try:
            result[0] = make()
        except (UserError, OSError) as error:
            result[1] = str(error), getattr(error, "code", 2)
    if world.size > 1:
        dist.broadcast_object_list(result, device=world.device)
    if result[1]:
        raise UserError(*result[1])
    return result[0]


def broadcast(world: World, tensors) -> None:
    """Copies rank 0's values into the tensors of all ranks, one tensor after the other."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def add_up(world: World, x: Tensor) -> Tensor:
    """Replaces x by its sum over the ranks, and returns it."""
    if world.size > 1:
        dist.all_reduce(x)
    return x


def in_parallel(world: World, module: nn.Module) -> nn.Module:
    """Wraps a module in DistributedDataParallel, where there are several ranks. (Departure 11)

    BatchNorm stays local to each rank. With `find_unused_parameters` DDP keeps its buckets from the
    first step on. So a resumed run sums gradients in the same order."""
    if world.size == 1:
        return module
    # Two warnings that mean nothing here. One is of `broadcast_buffers`. The other, of GPUs (not
    # seen here), is of the strides of 1 × 1 convolutions: either format is one order in memory.
    warnings.filterwarnings("ignore", ".*broadcast_buffers.*|Grad strides do not match.*")
    return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)


def has_bf16(world: World) -> bool:
    """Whether the device is a GPU with bf16 of its own. V100, T4 and RTX 20 only emulate it."""
    return world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision(world: World):
    """Autocast to bf16 where the GPU has it, else fp32. (Departure 13: it needs less memory, see
    the README.) Part I leaves it where fp32 is needed."""
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=has_bf16(world))


def cores() -> int:
    """The processor cores that this process may use, by affinity and by its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # "max 100000", or "200000 100000" for two cores
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def make_loader(s: Settings, world: World, faces: Faces, batches) -> DataLoader:
    """A loader of pictures.

    Args:
        s: its `workers`; −1 is this rank's share of the cores, up to 8.
        faces, batches: the dataset and its batch sampler.
    Returns: a DataLoader of dicts, as `Faces` makes them."""
    workers = s.workers if s.workers >= 0 else min(8, max(1, cores() // world.local_size))
    return DataLoader(faces, batch_sampler=batches, num_workers=workers,
                      pin_memory=world.device.type == "cuda", worker_init_fn=ignore_signals)


# What asks a run to stop: a cluster that takes the machine back, Ctrl-C, a terminal that closes.
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP")
         if hasattr(signal, name)]  # Windows has no SIGHUP


def ignore_signals(worker: int) -> None:
    """Signals reach loader workers too. Their parent handles them, and ends both."""
    for kind in STOPS:
        signal.signal(kind, signal.SIG_IGN)


# ===== Checkpoints =====
# A run may be killed at any moment. With the same number of ranks its weights are, once resumed, as
# if nothing had happened, on CPUs to the last bit. So files are written whole, and lines of the log
# that are later than the checkpoint are taken back. `identity` says what must be equal to resume:
# the pictures and their colours, the images of a step (ranks × ⌊batch size/ranks⌋), and all
# settings not marked `free`. An evaluation also needs the weights that it started from. Settings
# marked `free` may change: learning rate, weight decay, length, workers, for example.


@contextlib.contextmanager
def told_of(path: Path):
    """Says of a failure to write which file it was. Raises UserError: the disk is full, or not to
    be written to."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into the latter
        raise UserError(f"{path} could not be written ({error}); what stood there before is "
                        f"intact: make room or mend that, and repeat the command (without "
                        f"--fresh).") from None


def write_whole(path: Path, write) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never half of one.

    Args:
        path: the file. A temporary file takes its place once it is safe on disk.
        write: a function that fills an open binary file.
    Raises UserError: see `told_of`."""
    part = path.with_name(path.name + ".part")
    with told_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Writes `content` as a whole file. Raises UserError, as `write_whole` does."""
    write_whole(path, lambda file: file.write(f"{json.dumps(content, indent=1)}\n".encode()))


def lock(path: Path):
    """Locks a checkpoint for this process. A disk without locks is no reason to stop.

    Args:
        path: of the checkpoint; the lock is a file beside it.
    Returns: an open file; the lock holds until it is closed or the process ends.
    Raises UserError: another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path.with_suffix(".lock"), "a")
    try:
        import fcntl  # Windows has none
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another run is at work on {path}; let it end, or give this one another "
                        f"name with --name.") from None
    except (ImportError, OSError):
        pass
    return file


OUT_OF_MEMORY = "MemoryError|out of memory|not enough memory|allocate memory|ALLOC_FAILED"


def load_file(path: Path) -> dict:
    """Loads a file of torch.save, without running code that it may carry.

    Returns: a dict; its `model`, if it has one, is a dict too.
    Raises UserError: it is damaged, or something else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and isinstance(content.get("model", {}), dict):
            return content
        reason = "it holds no weights"
    except (OSError, MemoryError):
        raise  # the file may be whole
    except Exception as error:  # zip, pickle, unicode, end of file: torch raises many kinds
        if re.search(OUT_OF_MEMORY, str(error)):
            raise
        reason = type(error).__name__
    raise UserError(f"{path} is not a checkpoint ({reason}); give another, or move it away.")


def load_weights(path: str | Path, module: nn.Module, state: dict[str, Tensor]) -> None:
    """Fills a module with weights.

    Args:
        path: the file that they come from, for the message.
        module: all its parameters and buffers are replaced.
        state: a state dict.
    Raises UserError: names or shapes do not fit."""
    try:
        module.load_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit this net; give another file, or the --arch and sizes "
                        f"it was made with ({' '.join(str(error).split())[:300]}).") from None


def save_checkpoint(t: Training, done: int) -> None:
    """Writes all that a run needs to resume.

    That is `identity`, the steps done, the weights, and the momenta in the order of the parameters.
    The optimiser's own state dict would overwrite a newly given weight decay. The next learning
    rate is saved too. So a change of it can be told to the user.

    Args:
        t: see `Training`.
        done: steps that have been taken.
    Raises UserError: see `write_whole`."""
    content = {"same": t.same, "step": done, "rate": t.learning_rate(done),
               "model": t.model.state_dict(), "momenta": t.momenta}
    write_whole(t.path, lambda file: torch.save(content, file))


def load_checkpoint(t: Training, fresh: bool) -> tuple[int, str]:
    """Locks a run, and fills model and momenta from its checkpoint. For rank 0 alone.

    Args:
        t: see `Training`.
        fresh: remove the checkpoint first.
    Returns:
        the steps done, 0 where the run starts; and what to tell the user. An evaluation starts over
        if the file with its initial weights (`start`, see `evaluate`) has changed.
    Raises UserError: another process has the checkpoint, it is damaged, or it comes from another
            version, other settings or other pictures."""
    t.lock = lock(t.path)
    if fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        t.path.unlink(missing_ok=True)  # but not when torchrun has started all ranks anew
    if not t.path.exists():
        return 0, "starts"
    saved = load_file(t.path)
    if not saved.keys() >= {"same", "step", "rate", "model", "momenta"}:
        raise UserError(f"{t.path} is no checkpoint of this version of the program; move it away "
                        f"or start over with --fresh.")
    old, now = saved["same"], t.same
    differ = {k for k in old.keys() | now if old.get(k) != now.get(k)}
    if differ == {"start"}:
        return 0, "starts over, since the weights that it began with have changed"
    others = differ & {"pictures", "names", "sizes"}
    differ = [f"{k} was {old.get(k)!r} and is now {now.get(k)!r}" for k in sorted(differ - others)]
    if others:
        folder = os.path.commonpath(t.faces.paths) or "."
        differ.append(f"the pictures in {folder} are not those it saw")
    if differ:
        raise UserError(f"{t.path} comes from another run ({'; '.join(differ)}); repeat that, give "
                        f"this run another --name, or start over with --fresh.")
    load_weights(t.path, t.model, saved["model"])
    for own, momentum in zip(t.momenta, saved["momenta"], strict=True):
        own.copy_(momentum)
    told, rate = f"resumes after step {saved['step']:,}", t.learning_rate(saved["step"])
    if not math.isclose(rate, saved["rate"], rel_tol=1e-6, abs_tol=1e-12):
        told += f", where the learning rate was {saved['rate']:.4g} and is now {rate:.4g}"
    return saved["step"], told


def identity(s: Settings, world: World, data: Path, paths: list[str], batch: int, **more) -> dict:
    """What must be equal for a run to be resumed.

    Args:
        s: the settings that are not `free` count.
        world: see `World`.
        data: the dataset's folder.
        paths: its pictures. They are known by their relative names, which must agree over the
            ranks, and by their sizes on rank 0's machine.
        batch: the real batch, over all ranks: 255 for --batch-size 256 on three.
        more: what else must be equal.
    Returns: a dict of plain values.
    Raises UserError: the machines hold different pictures."""
    names = seed_of([os.path.relpath(p, data) for p in paths])
    if from_rank0(world, lambda: names) != names:
        raise UserError(f"{data} does not hold the same pictures on all machines; copy it whole "
                        f"to each of them.")
    there = filter(os.path.exists, paths)  # a dangling link has no size
    sizes = from_rank0(world, lambda: seed_of([os.path.getsize(p) for p in there]))
    same = {f.name: getattr(s, f.name) for f in fields(s) if not f.metadata["free"]}
    return same | {"batch": batch, "pictures": len(paths), "names": names, "sizes": sizes} | more


# ===== What is shown and logged =====


def watched(world: World, loading: DataLoader, first: int, last: int, images: int, status: dict):
    """Yields a loader's batches. Rank 0 prints a line after the first and the last of them, and
    every ten seconds.

    The line has what stands in `status`, the mean speed, the share of the time that was spent
    waiting for the loader, and the time left.

    Args:
        loading: the loader.
        first, last: its batches are those of the steps `first` to `last` − 1.
        images: images a step, over all ranks.
        status: numbers by name; the caller changes them."""
    batches, began, shown, waited = iter(loading), time.perf_counter(), 0.0, 0.0
    for done in range(first + 1, last + 1):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        yield batch
        now = time.perf_counter()
        if done in (first + 1, last) or now - shown > 10:
            shown, spent = now, now - began
            told = [f"{done:,}/{last:,}", *(f"{k} {v:.4g}" for k, v in status.items())]
            told += [f"{images * (done - first) / spent:.0f} images/s",
                     f"waiting {waited / spent:.0%}",
                     f"left {timedelta(seconds=round(spent / (done - first) * (last - done)))}"]
            say(world, "  ".join(told))


def cut_log(path: Path, step: int) -> None:
    """Leaves those lines of a log that are whole and not later than this step."""
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [re.match(r'{"step": (\d+),.*}$', line) for line in lines]
    kept = [found[0] + "\n" for found in steps if found and int(found[1]) <= step]
    write_whole(path, lambda file: file.write("".join(kept).encode()))


def say(world: World, text: str) -> None:
    """Prints, on rank 0. A line that cannot be printed does not end a training."""
    with contextlib.suppress(OSError, ValueError):
        if world.rank == 0:
            print(text, flush=True)


# ===== The loop =====
# `set_up` makes the parts, `fit` takes the steps. Pre-training and evaluation hand it a `step` and
# a `save` of their own.

stop_asked = threading.Event()  # set by the signals of STOPS


def ask_to_stop(kind: int, frame) -> None:
    """A signal handler: the run ends after this step; at a second Ctrl-C it ends at once."""
    if kind == signal.SIGINT and stop_asked.is_set():
        raise KeyboardInterrupt
    stop_asked.set()


@dataclass
class Training:
    """What `fit` works on; `set_up` makes it.

    Args:
        path: of the checkpoint.
        same: see `identity`.
        model: all that is saved.
        net: `model`, or the part of it that is trained, in DDP where there are several ranks.
        optimizer: SGD over the parameters of `net` that are not frozen.
        momenta: the optimiser's, in the order of its parameters.
        faces, batches: the pictures and their order.
        learning_rate: a function of the step's number, which counts from 0.
        lock: see `lock`."""
    path: Path
    same: dict
    model: nn.Module
    net: nn.Module
    optimizer: torch.optim.SGD
    momenta: list[Tensor]
    faces: Faces
    batches: Batches
    learning_rate: Callable[[int], float]
    lock: object = None


def fit(s: Settings, world: World, t: Training, step, save, shown: tuple[str, ...]) -> None:
    """The loop over steps, for pre-training and evaluation. (Sec. 4.1)

    Args:
        step: the forward pass. It takes a batch on the device and returns a dict of tensors: the
            scalar `loss`, with gradient; other scalars; vectors. A line of the log has its step's
            scalars, as means over the ranks. Vectors are summed over the ranks, and over the steps
            since the line before, or since resuming.
        save: writes the checkpoint; takes the number of steps done.
        shown: which scalars the status line shows.
    Raises UserError: loss or gradient are not finite, or the run was told to stop."""
    first, last, sums, status = t.batches.first, t.batches.last, {}, {}
    log = t.path.with_name(t.path.stem.replace("checkpoint", "log", 1) + ".jsonl")
    from_rank0(world, lambda: cut_log(log, first))
    loading = make_loader(s, world, t.faces, t.batches)
    steps = watched(world, loading, first, last, t.batches.batch, status)
    for i, batch in enumerate(steps, first):
        torch.manual_seed(seed_of(s.seed, "step", i, world.rank))
        rate, epoch = t.learning_rate(i), i // t.batches.per_epoch + 1
        t.optimizer.param_groups[0]["lr"] = rate

        batch = {k: v.to(world.device, non_blocking=True) for k, v in batch.items()}
        with mixed_precision(world):
            out = step(batch)
        out["loss"].backward()
        values = reduced(world, t.net, out)
        stop = values.pop("stop") > 0
        if not math.isfinite(values["loss"] + values["gradient"]):
            numbers = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
            raise UserError(f"loss or gradient not finite in step {i + 1:,} ({numbers}): the step "
                            f"was not taken. The same command with a lower --lr (without --fresh) "
                            f"resumes from the last checkpoint, or starts over without one.")
        t.optimizer.step()
        t.optimizer.zero_grad(set_to_none=False)  # the gradients' memory is kept for the next step
        if hasattr(t.model, "update"):
            t.model.update()  # the target; a classifier has none

        done = i + 1
        status |= {"epoch": epoch, "rate": rate} | {k: values[k] for k in shown if k in values}
        sums = {k: sums.get(k, 0) + v for k, v in out.items() if v.ndim}
        if done % s.log_every == 0 or done == last or stop:
            maps = {k: [round(x, 4) for x in add_up(world, v).tolist()] for k, v in sums.items()}
            sums, line = {}, {"step": done, "epoch": epoch, "rate": rate} | values | maps
            if world.rank == 0:
                with told_of(log), open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")
        if world.rank == 0 and (done % s.save_every == 0 or done == last or stop):
            save(done)
        if stop:
            if world.size > 1:
                dist.barrier()  # for rank 0's save: once one process ends, torchrun kills the rest
            raise UserError(f"stopped after step {done:,} of {last:,}; the same command (without "
                            f"--fresh) resumes from there.", code=143)


def reduced(world: World, net: nn.Module, out: dict[str, Tensor]) -> dict[str, float]:
    """The scalars of a step as plain numbers, means over the ranks.

    The host waits for the device here, in most steps only here. A NaN of one rank reaches all.

    Args:
        net: the module that was trained; with DDP its gradients are means over the ranks.
        out: what the step returned.
    Returns:
        the scalars of `out`; `gradient`, the norm of the gradient that the optimiser uses; `stop`,
        above 0 if a rank has been told to stop."""
    scalars = {k: v.detach().float() for k, v in out.items() if v.ndim == 0}
    scalars["gradient"] = nn.utils.get_total_norm(
        p.grad for p in net.parameters() if p.grad is not None)
    scalars["stop"] = torch.full_like(scalars["loss"], stop_asked.is_set())
    values = add_up(world, torch.stack(list(scalars.values()))) / world.size
    return dict(zip(scalars, values.tolist()))


def set_up(s: Settings, world: World, model: nn.Module, trained: nn.Module, faces: Faces,
           path: Path, partial: bool = False, weights: Tensor | None = None, cosine: bool = True,
           **more) -> Training:
    """Makes what `fit` works on, and resumes from the checkpoint where there is one.

    Args:
        model: all that is saved.
        trained: the part of it that is trained.
        faces: the pictures.
        path: of the checkpoint.
        partial, weights: see `Batches`.
        cosine: the learning rate falls towards 0 on a cosine; else it is constant.
        more: see `identity`, which says what must be equal to resume.
    Raises:
        UserError: the batch is larger than the data or too small; see also `load_checkpoint`."""
    data = find_data(s.data)
    # Departure 10: ⌊256/W⌋ images for each of W ranks, so that all have equal shares. On three
    # ranks a step has 255 in all.
    wanted = min(s.batch_size, len(faces)) if partial else s.batch_size
    per_rank_batch = wanted // world.size
    batch = per_rank_batch * world.size
    if len(faces) < 2 * world.size:
        raise UserError(f"{len(faces)} pictures are too few: each of {world.size} processes needs "
                        f"two (BatchNorm); give more, or more --labels, or start fewer processes.")
    if per_rank_batch < 2 or batch > len(faces):
        raise UserError(f"--batch-size {s.batch_size} must be at least 2 for each of {world.size} "
                        f"processes (BatchNorm), and at most the {len(faces)} pictures of {data}.")
    batches = Batches(len(faces), batch, s.seed, world, partial, weights)
    batches.last = s.steps or s.epochs * batches.per_epoch

    def learning_rate(i: int) -> float:  # departure 5: by steps, since short runs have few epochs
        factor = 0.5 * (1 + math.cos(math.pi * i / batches.last)) if cosine else 1.0
        return s.lr * batch / 256 * factor  # authors: in proportion to the batch

    model.to(world.device, memory_format=torch.channels_last)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=s.lr, momentum=s.momentum,
                                weight_decay=s.weight_decay, fused=True)
    # SGD would make these in its first step. `load_checkpoint` has to fill them before that.
    momenta = [torch.zeros_like(p) for p in parameters]
    for p, momentum in zip(parameters, momenta):
        optimizer.state[p]["momentum_buffer"] = momentum
    t = Training(path, identity(s, world, data, faces.paths, batch, **more), model,
                 in_parallel(world, trained), optimizer, momenta, faces, batches, learning_rate)
    batches.first, told = from_rank0(world, lambda: load_checkpoint(t, s.fresh))
    broadcast(world, [*model.state_dict().values(), *momenta])  # rank 0's, to all ranks
    if batches.first >= batches.last:
        told = f"complete after {batches.first:,}; --fresh would start over"
    if batches.first and s.init and not s.eval:
        told += "; --init is ignored"
    device = "cpu" if world.device.type == "cpu" else "cuda in " + (
        "bf16" if has_bf16(world) else "fp32, as this GPU has no bf16")
    say(world, f"{path}: {len(faces):,} pictures of {data}, {batches.last:,} steps of {batch} "
               f"images ({world.size} × {per_rank_batch} on {device}), learning rate "
               f"{s.lr * batch / 256:g}; {told}")
    return t


# ===== Pre-training =====


def pretrain(s: Settings, world: World) -> None:
    """SimFLE on pictures without labels. (Sec. 4.1)

    Leaves checkpoint.pt, backbone.pt, settings.json and log.jsonl in runs/NAME/.

    Raises UserError: see `set_up`, `fit` and `load_start`."""
    data, folder = find_data(s.data), Path("runs", s.name)
    paths = find_pictures(data / "train" if (data / "train").is_dir() else data)
    faces = Faces(paths, s.view_size, 2, s.ffl_size, s.crop_min, s.seed)
    colours = from_rank0(world, lambda: colours_of(data))
    path, start = folder / "checkpoint.pt", {}

    def read_start() -> None:  # a run that is resumed has its own weights
        if s.init not in ("", "random") and (s.fresh or not path.exists()):
            start.update(load_start(s.init, s.arch))

    from_rank0(world, read_start)  # not returned: that would send the weights to all ranks as well
    model = build_model(s, start.get("model"))  # `set_up` copies rank 0's weights to all ranks
    t = set_up(s, world, model, model, faces, path, colours=colours)

    def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        v1, v2 = (augment(batch["views"][:, i], colours) for i in range(2))
        return t.net(v1, v2, normalise(batch["image"], colours))

    def save(done: int) -> None:
        backbone = {k: v.cpu() for k, v in model.backbone.resnet.state_dict().items()}
        write_whole(folder / "backbone.pt", lambda file: torch.save(backbone, file))
        write_json(folder / "settings.json", asdict(s))
        save_checkpoint(t, done)  # last: if this file is complete, so are the two above

    fit(s, world, t, step, save, shown=("L_s", "L_r", "L_d", "L_g", "spread"))


# ================================ Part III: evaluation ================================
# Supplement B. Only the backbone is left, a torchvision ResNet, with a linear layer on top.
#
#     linear      B.1        It trains the layer alone. All else is frozen, BatchNorm too.
#     semi        B.2        It trains everything, on a share of the labels.
#     finetune    B.3, B.4   It trains everything, and starts from a linear result.
#
# Fine-tuning needs a head for the same classes. So the seven classes of RAF-DB and SFEW start from
# a linear result on AffectNet-7, given by --init (B.4). The preset laptop's linear protocol is our
# own: 0 epochs, and in their place `converged_head`.


def labelled_pictures(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """The pictures of a split, whose class is their folder.

    Args:
        folder: train/ or val/ of a dataset.
    Returns: the names of the classes, sorted; the paths; the labels, indices of the names.
    Raises UserError: fewer than two classes, or one without pictures."""
    classes = sorted(p.name for p in folder.glob("[!._]*") if p.is_dir())
    if len(classes) < 2:
        raise UserError(f"{folder} needs folders of pictures for two or more classes; give --data "
                        f"a folder with train/CLASS/ and val/CLASS/.")
    found = [find_pictures(folder / name) for name in classes]
    labels = [label for label, paths in enumerate(found) for _ in paths]
    return classes, sum(found, []), labels


def share_of_labels(labels: list[int], share: float, seed: int) -> list[int]:
    """The images that keep their labels: the same share of every class, at least one, so that none
    is left out. (Sec. B.2; departure 19)

    Args:
        labels: of all images.
        share: from 0 to 1.
        seed: of the draw.
    Returns: indices of the images, sorted."""
    order = torch.randperm(len(labels), generator=generator_of(seed, "labels")).tolist()
    chosen = []
    for label in set(labels):
        mine = [i for i in order if labels[i] == label]
        chosen += mine[:max(1, round(share * len(mine)))]
    return sorted(chosen)


class Head(nn.Linear):
    """A linear layer in fp32: in bf16 the logits of several classes would often be equal. (ours)

    Authors: weights with standard deviation 0.01, bias 0."""
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


def run_settings(name: str) -> dict:
    """The settings.json of a run, or {}."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(Path("runs", name, "settings.json").read_bytes())
    return {}


def data_name(data: str) -> str:
    """The folder's own name, by which results are called."""
    return Path(data).resolve().name


def load_start(init: str | Path, arch: str) -> dict:
    """The weights that a run or an evaluation starts from.

    Args:
        init: `imagenet`, or the path of a backbone.pt or a classifier.
        arch: the net, for ImageNet's weights.
    Returns: a dict: `model`, a ResNet's state dict without `fc`; `fc`, that of its head; `classes`,
        of the head, or None; `start`, the file's SHA-256, or "imagenet".
    Raises UserError: there are no such weights."""
    if init == "imagenet":
        try:
            saved = torchvision.models.get_model(arch, weights="IMAGENET1K_V1").state_dict()
        except Exception as error:  # an unknown net, no network, no space
            raise UserError(f"no ImageNet weights for --arch {arch} could be had ({error}); give "
                            f"another, or put them into torch's hub folder.") from None
        start = "imagenet"
    elif Path(init).is_file():
        saved, start = load_file(Path(init)), hashlib.sha256(Path(init).read_bytes()).hexdigest()
    else:
        raise UserError(f"{init} is missing, from which this starts; check --init and --name, or "
                        f"pre-train first. --init random takes an untrained net.")
    state = saved.get("model", saved)
    fc = {k[3:]: state.pop(k) for k in list(state) if k.startswith("fc.")}
    return {"model": state, "fc": fc, "classes": saved.get("classes"), "start": start}


def start_net(net: nn.Module, head: Head, s: Settings, init: str | Path,
              classes: list[str]) -> str:
    """Fills a net with the weights it starts from. A saved head's classes are matched by name.

    Args:
        net: a ResNet without `fc`.
        head: its head, which keeps its own weights where the file has none.
        s: its `arch`, `data` and `eval`.
        init: `random`, or see `load_start`.
        classes: names of the dataset's classes.
    Returns: what the weights are known by.
    Raises UserError: they do not fit, their classes differ, or finetune's file has no head."""
    if init == "random":
        return "random"
    saved = load_start(init, s.arch)
    known = saved["classes"]
    if known and sorted(known) != sorted(classes):
        raise UserError(f"{init} knows {', '.join(known)}, but {s.data} has {', '.join(classes)}; "
                        f"name the classes alike, or give another --init.")
    if not known and s.eval == "finetune":
        raise UserError(f"{init} has no head to fine-tune; make one with --eval, or use --eval "
                        f"semi --labels 1.0.")
    load_weights(init, net, saved["model"])
    if known:
        order = [known.index(name) for name in classes]
        load_weights(init, head, {k: v[order] for k, v in saved["fc"].items()})
    return saved["start"]


@torch.no_grad()
def outputs_of(s: Settings, world: World, net: nn.Module, faces: Faces,
               colours) -> tuple[Tensor, Tensor]:
    """What rank 0's net returns for whole pictures.

    Every rank sees all of them, so nothing has to be gathered.

    Args:
        net: in eval mode, a module of images.
        faces: pictures with labels; their `image` is used.
        colours: see `colours_of`.
    Returns: the outputs (N, ·), fp32, and the labels (N,), on the device.
    Raises UserError: a picture cannot be read, or the run was told to stop."""
    batches, found = BatchSampler([(0, i, i) for i in range(len(faces))], 256, False), []
    loading = make_loader(s, world, faces, batches)
    say(world, f"{len(faces):,} pictures of {os.path.commonpath(faces.paths)} go through the net")
    broadcast(world, net.state_dict().values())
    for batch in watched(world, loading, 0, len(batches), 256, {}):
        batch = {k: v.to(world.device) for k, v in batch.items()}
        with mixed_precision(world):
            output = net(normalise(batch["image"], colours))
        found.append((output.float(), batch["label"]))
        if stop_asked.is_set():
            raise UserError("stopped; the same command starts this evaluation again.", code=143)
    outputs, labels = zip(*found)
    return torch.cat(outputs), torch.cat(labels)


def converged_head(x: Tensor, y: Tensor, mass: Tensor,
                   strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on frozen features, until its gradient is small. (ours)

    What it finds does not depend on a learning rate or a number of epochs. Features are
    standardised. L-BFGS minimises mean cross-entropy + strength/2 ‖W‖², without the bias in ‖W‖. It
    ends when no entry of the gradient is above 1e-5, or after 5,000 iterations (or 6,250
    evaluations of the loss).

    Compare results of one strength only: from 3e-4 to 1e-2, accuracies changed by 0.4 to 3.1
    points. (Of pixels, an untrained net and one trained with --ffl none. Preset laptop, toy faces
    and photographs, one seed each.)

    Args:
        x: features (N, c′).
        y: labels (N,).
        mass: the weight of an image of each class, (classes,).
        strength: of the L2 penalty.
    Returns: weights (classes, c′) and bias (classes,), float64, for features as they are.
    Raises UserError: features are not finite."""
    x, mass = x.double(), mass.double()
    if not x.isfinite().all():
        raise UserError("the backbone's features are not finite; give one that is trained well.")
    mean, std = x.mean(dim=0), x.std(dim=0)
    std = std.clamp(min=1e-4 * std.mean().item() + 1e-12)  # of a feature that is dead
    x = F.pad((x - mean) / std, (0, 1), value=1.0)  # the last column of W is the bias
    W = x.new_zeros(len(mass), x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=5000, tolerance_grad=1e-5, tolerance_change=0,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W.T, y, mass) + strength / 2 * W[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    W = W.detach()
    return W[:, :-1] / std, W[:, -1] - W[:, :-1] @ (mean / std)


def summary(guess: Tensor, labels: Tensor, classes: list[str]) -> dict:
    """Accuracies and the confusion matrix. (Sec. 4.2)

    Args:
        guess, labels: classes (N,).
        classes: their names.
    Returns:
        a dict: accuracy over images, per_class, mean_accuracy over classes, in percent; images, N;
        confusion, how many pictures of class i (row) were taken for class j."""
    K = len(classes)
    confusion = torch.bincount(labels * K + guess, minlength=K**2).cpu().reshape(K, K)
    per_class = 100 * confusion.diag().double() / confusion.sum(dim=1).clamp(min=1)
    return dict(accuracy=100 * (guess == labels).double().mean().item(),
                mean_accuracy=per_class.mean().item(), images=len(labels),
                per_class=dict(zip(classes, per_class.tolist())), confusion=confusion.tolist())


def linear_result(s: Settings, world: World, classes: list[str]) -> Path:
    """The run's linear classifier, for fine-tuning. (Sec. B.3)

    It is of the data that the run was pre-trained on or, if that has no labels, of the given data.
    It is made first where it is missing or of another backbone.

    Args:
        classes: of the given data.
    Returns: its path.
    Raises UserError: it would have to be made, and of other classes; see also `evaluate`."""
    folder = Path("runs", s.name)

    def look() -> tuple[str, bool]:
        """Of which data it is, and whether it is there."""
        data = run_settings(s.name).get("data", s.data)
        path = folder / f"linear-{data_name(data)}.pt"
        if not path.exists() and not (find_data(data) / "val").is_dir():
            data = s.data
            path = folder / f"linear-{data_name(data)}.pt"
        if path.exists() and load_file(path).get("start") == load_start(
                folder / "backbone.pt", s.arch)["start"]:
            return data, True
        known = classes if data == s.data else labelled_pictures(find_data(data) / "train")[0]
        if known != classes:  # told before hours of training: `start_net` would refuse the result
            raise UserError(f"{path} would know {', '.join(known)}, but {s.data} has "
                            f"{', '.join(classes)}; give --init.")
        return data, False

    data, there = from_rank0(world, look)
    if not there:
        own = dict(eval="linear", name=s.name, workers=s.workers, data=data)
        evaluate(from_rank0(world, lambda: read_settings(own)), world)
    return folder / f"linear-{data_name(data)}.pt"


def evaluate(s: Settings, world: World) -> dict:
    """One protocol on one dataset. (Sec. 4.2, B)

    Leaves a classifier, PROTOCOL-DATA.pt, and its result, eval-PROTOCOL-DATA.json, in the run's
    folder, and where it has been trained by steps a checkpoint and a log. Options that differ from
    the protocol's are added to the names.

    Returns: `summary` of the test pictures, and how it came about.
    Raises UserError: see `labelled_pictures`, `start_net`, `set_up`, `fit` and `outputs_of`."""
    data, folder = find_data(s.data), Path("runs", s.name)
    classes, paths, labels = labelled_pictures(data / "train")
    same, val_paths, val_labels = labelled_pictures(data / "val")
    if same != classes:
        raise UserError(f"{data}/train has the classes {', '.join(classes)}, but val has "
                        f"{', '.join(same)}; both need the same.")
    if s.eval == "semi":
        chosen = share_of_labels(labels, s.labels, s.seed)
        paths, labels = [paths[i] for i in chosen], [labels[i] for i in chosen]
    init = s.init or folder / "backbone.pt"
    if s.eval == "finetune" and not s.init:
        init = linear_result(s, world, classes)
    torch.manual_seed(s.seed)
    net = RESNETS[s.arch]()
    head = Head(net.fc.in_features, len(classes))
    net.fc = nn.Identity()
    start = from_rank0(world, lambda: start_net(net, head, s, init, classes))
    name = "-".join(filter(None, (s.eval, data_name(s.data), s.tag)))
    path, colours = folder / f"checkpoint-{name}.pt", from_rank0(world, lambda: colours_of(data))
    mass = 1 / torch.bincount(torch.tensor(labels)).double()  # Table 2: every class alike
    mass = mass if s.oversample else torch.ones_like(mass)
    if s.steps or s.epochs:
        net.fc = head
        faces = Faces(paths, s.view_size, 1, 0, s.crop_min, s.seed, labels)
        train_classifier(s, world, net, faces, colours, path, mass[labels], start)
    else:
        faces = Faces(paths, image_size=s.view_size, labels=labels)
        net.to(world.device, memory_format=torch.channels_last).eval()
        x, y = outputs_of(s, world, net, faces, colours)
        W, b = converged_head(x, y, mass.to(world.device))
        head.load_state_dict({"weight": W, "bias": b})
        net.fc = head.to(world.device)
    faces = Faces(val_paths, image_size=s.view_size, labels=val_labels)
    logits, truth = outputs_of(s, world, net.eval(), faces, colours)
    # Departure 16: after the last epoch. The best one would be chosen on the test pictures.
    result = summary(logits.argmax(dim=1), truth, classes) | dict(
        protocol=s.eval, settings=asdict(s), start=start, pretraining=run_settings(s.name))

    def save() -> None:
        state = {k: v.cpu() for k, v in net.state_dict().items()}
        content = dict(model=state, classes=classes, mean=list(colours[0]), std=list(colours[1]),
                       arch=s.arch, size=s.view_size, start=start)
        write_whole(folder / f"{name}.pt", lambda file: torch.save(content, file))
        write_json(folder / f"eval-{name}.json", result)

    from_rank0(world, save)
    say(world, f"{folder / name}.pt: {result['accuracy']:.2f} % of {len(truth)} test images right; "
               f"mean of the classes {result['mean_accuracy']:.2f} %: "
               + ", ".join(f"{k} {v:.1f}" for k, v in result["per_class"].items()))
    return result


def train_classifier(s: Settings, world: World, net: nn.Module, faces: Faces, colours, path: Path,
                     weights: Tensor, start: str) -> None:
    """The training of a protocol: of the head alone (linear) or of the whole net. (Sec. B)

    Args:
        net: a ResNet with its head.
        faces: pictures with labels.
        colours: see `colours_of`.
        path: of the checkpoint.
        weights: of the images, used with --oversample.
        start: what the net's weights are known by."""
    frozen = s.eval == "linear"
    net.train(not frozen)  # departure 20: where all is trained, BatchNorm adapts to the pictures
    t = set_up(s, world, net, net.fc if frozen else net, faces, path, partial=True,
               weights=weights if s.oversample else None, cosine=not frozen, colours=colours,
               start=start, protocol=(s.eval, s.labels, s.oversample))

    def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x, label = normalise(batch["views"][:, 0], colours), batch["label"]
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        if frozen:
            with torch.no_grad():
                x = feature_map(net, x).mean(dim=(2, 3))
        logits = t.net(x)
        return {"loss": F.cross_entropy(logits, label),
                "accuracy": (logits.argmax(dim=1) == label).float().mean()}

    fit(s, world, t, step, functools.partial(save_checkpoint, t), shown=("loss", "accuracy"))


# ================================ Settings and main ================================
# A setting is a field of `Settings` and an option of the command line. Its value is the one given,
# else the evaluation protocol's, else the preset's, else the default, which is the paper's.

HERE = Path(__file__).resolve().parent


def small_resnet(width: int = 32) -> nn.Module:
    """A ResNet for laptops, with one block a stage. (ours)

    Its stride is 16, so the map of 56 pixels is 4 × 4. With 32 it would be 2 × 2, too few values to
    tell 49 patches apart.

    Args:
        width: channels of the first stage."""
    block = torchvision.models.resnet.BasicBlock
    net = torchvision.models.ResNet(block, [1, 1, 1, 1])
    net.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    net.bn1, net.inplanes = nn.BatchNorm2d(width), width
    for stage, stride in enumerate((1, 2, 2, 1)):
        setattr(net, f"layer{stage + 1}", net._make_layer(block, width << stage, 1, stride))
    net.fc = nn.Linear(8 * width, 1000)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):  # as torchvision starts its own
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


# A reader's own parts are entered here, under a name for the command line (see the README).
RESNETS = {"small": small_resnet} | {
    name: functools.partial(torchvision.models.get_model, name)
    for name in torchvision.models.list_models(torchvision.models, include="*resn*")}


GFLS = {"byol": lambda s, backbone: BYOL(backbone, s.hidden, s.outputs, s.tau)}
MASKINGS = {"semantic": SemanticMasking, "random": RandomMasking, "none": None}
CONNECTIONS = ("distil", "direct")
VITS = {"base": {}, "tiny": dict(  # base: `MaskedAutoencoder` as it stands
    width=128, depth=4, heads=4, decoder_width=64, decoder_depth=2, decoder_heads=4)}


# Ours: laptop, for two cores. Views of 64 pixels, and 7 × 7 patches of 8 pixels. After 1,000 steps
# of 32 images a linear probe was right in 39.2 % of the demo's test faces, after 500 of 64 in 34.8.
# (--ffl none, peak rate 0.1 in both, seed 0. Seeds differ by a deviation of 2.8: README, Results.)
PRESETS = {"paper": {},
           "laptop": dict(arch="small", vit="tiny", view_size=64, ffl_size=56, patch=8, hidden=512,
                          batch_size=32, lr=0.8, steps=1000, crop_min=0.3)}


# Supplement B. Rates are per 256 images: 2.0 at 1024; 0.05 and 0.001 at 512.
PROTOCOLS = {"paper": {"linear": dict(epochs=100, batch_size=1024, lr=0.5, weight_decay=0.0),
                       "semi": dict(epochs=100, batch_size=512, lr=0.025, weight_decay=1e-4),
                       "finetune": dict(epochs=100, batch_size=512, lr=0.0005, weight_decay=1e-4)},
             "laptop": {"linear": dict(epochs=0, batch_size=256, lr=0.1, weight_decay=0.0),
                        "semi": dict(epochs=20, batch_size=64, lr=0.025, weight_decay=1e-4),
                        "finetune": dict(epochs=10, batch_size=64, lr=0.0005, weight_decay=1e-4)}}


def setting(default, help: str, low: float | None = None, high: float = math.inf,
            free: bool = False, choices=None):
    """A field of `Settings`.

    Args:
        default: its default.
        help: its text in --help.
        low, high: its bounds.
        free: whether it is left out of `identity`.
        choices: the names that it can have."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, free=free,
                                                choices=choices))


@dataclass
class Settings:
    """All settings, and the command line (`batch_size` is `--batch-size`). Each says its unit and
    its source: a section of the paper, "authors" for their public code, "ours" for what neither
    gives. The defaults are the preset `paper`."""
    data: str = setting("toy", "a folder, or a name in data/; toy: the demo (ours)", free=True)
    name: str = setting("", "of the run, in runs/; default: the data's name (ours)", free=True)
    preset: str = setting("", "paper, or laptop: toy's default (ours)", choices=PRESETS)
    fresh: bool = setting(False, "start over, even where there is a checkpoint (ours)", free=True)
    # Length and rate
    epochs: int = setting(100, "passes (4.1); 0: linear, converged (ours)", 0, free=True)
    steps: int = setting(0, "steps in place of epochs; 0: epochs decide (ours)", 0, free=True)
    batch_size: int = setting(256, "images a step, over all processes (4.1)", 1, free=True)
    lr: float = setting(0.05, "learning rate per 256 images of a step (4.1)", 0, free=True)
    momentum: float = setting(0.9, "of SGD (4.1)", 0, 1)
    weight_decay: float = setting(1e-4, "of SGD (4.1)", 0, free=True)
    seed: int = setting(0, "of the weights, the order and every augmentation (ours)", 0, 2**32 - 1)
    init: str = setting("", "start from random, imagenet or a file; by default: pre-training from "
                            "random, an evaluation from the run (4.2)", free=True)
    # Pictures
    view_size: int = setting(224, "pixels a side of a view (4.1)", 1)
    ffl_size: int = setting(112, "pixels a side of the image that FaceMAE sees (4.1)", 1)
    crop_min: float = setting(0.08, "least share that a crop covers (4.1, SimCLR)", 1e-3, 1)
    # The method
    arch: str = setting("resnet50", "a torchvision ResNet, or small (4.1)", choices=RESNETS)
    hidden: int = setting(4096, "hidden width of the heads (authors)", 8)
    outputs: int = setting(256, "output width of the heads (authors)", 8)
    gfl: str = setting("byol", "byol; data/baselines.py has others (4.3)", choices=GFLS)
    ffl: str = setting("semantic", "semantic or random masking, or none (4.3)", choices=MASKINGS)
    connection: str = setting("distil", "distil, or direct: no L_d (4.3)", choices=CONNECTIONS)
    tau: float = setting(0.99, "EMA decay of the target (authors)", 0, 1)
    groups: int = setting(32, "channel groups N_g (4.1)", 1)
    mask_ratio: float = setting(0.75, "share of the patches that is masked (4.1)", 0.01, 0.99)
    kappa: float = setting(0.02, "refinement of the masking, per channel; 0: none (ours)", 0)
    patch: int = setting(16, "pixels a side of a patch (4.1)", 1)
    vit: str = setting("base", "autoencoder: base as in MAE (4.1), or tiny (ours)", choices=VITS)
    norm_pix: bool = setting(True, "normalise the autoencoder's pixels patch by patch (MAE)")
    alpha: float = setting(0.3, "weight of L_d, t² times Eq. 5 (4.3)", 0)
    beta: float = setting(0.03, "weight of L_g, Eq. 2 over c′ (4.3)", 0)
    temperature: float = setting(4.0, "of the distillation's softmax (3.3)", 1e-3)
    # Evaluation
    eval: str = setting("", "evaluate by linear (the default), semi or finetune (B)", free=True,
                        choices=PROTOCOLS["paper"])
    labels: float = setting(0.01, "share that --eval semi uses (B.2)", 1e-6, 1, free=True)
    oversample: bool = setting(False, "see every class equally often (Table 2)", free=True)
    # Machine
    workers: int = setting(-1, "loader workers; -1: share of the cores (ours)", -1, free=True)
    save_every: int = setting(500, "steps between checkpoints (ours)", 1, free=True)
    log_every: int = setting(20, "steps between two lines of log.jsonl (ours)", 1, free=True)
    tag: str = field(default="", metadata={"free": True})  # what tells an evaluation's files apart


IN_NAMES = ("preset", "labels", "init", "oversample", "seed", "epochs", "steps", "batch_size", "lr",
            "momentum", "weight_decay", "arch", "view_size", "crop_min")


def read_arguments(argv: list[str] | None = None) -> dict:
    """Reads the command line.

    Returns: the options that were given, and no more.
    Raises UserError: an option is unknown or no number."""
    def complain(message: str):
        launch = "start several processes with torchrun" if "--local" in message else (
            "`python simfle.py --help` lists the options")
        raise UserError(f"{message}; {launch}.")

    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="SimFLE: self-supervised facial expression recognition. "
        "Defaults in brackets: the paper's pre-training.")
    parser.error = complain
    for f in fields(Settings)[:-1]:  # all but `tag`
        kind = {"type": type(f.default), "metavar": f.name.upper()}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        if f.name == "eval":
            kind |= {"nargs": "?", "const": "linear"}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} [{f.default}]", **kind)
    return vars(parser.parse_args(argv if argv is None else [str(a) for a in argv]))


def read_settings(args: dict) -> Settings:
    """The arguments, on top of the preset, the protocol and the evaluated run.

    Raises UserError: see `checked`."""
    protocol, name = args.get("eval", ""), args.get("name", "")
    trained = run_settings(name or data_name(args.get("data", "toy"))) if protocol else {}
    data = args["data"] if "data" in args else trained.get("data", "toy")
    usual = trained.get("preset") or ("laptop" if Path(data).name == "toy" else "paper")
    preset = checked(Settings(preset=args.get("preset") or usual, eval=protocol)).preset
    base = {"data": data, "preset": preset} | PRESETS[preset]
    if protocol:
        base |= {"steps": 0} | PROTOCOLS[preset][protocol]
        base |= {k: trained[k] for k in ("arch", "view_size", "crop_min") if k in trained}
        base["tag"] = tag_of(asdict(Settings()) | base | {"preset": usual}, args)
    if "epochs" in args:
        base["steps"] = 0  # asked for in epochs, a preset's steps do not count
    return checked(Settings(**base | args | {"name": name or data_name(data)}))


def checked(s: Settings) -> Settings:
    """Returns the same settings.

    Raises UserError: they cannot work; nothing has been loaded yet."""
    for f in fields(s)[:-1]:
        option, value = "--" + f.name.replace("_", "-"), getattr(s, f.name)
        low, high, names = (f.metadata[k] for k in ("low", "high", "choices"))
        if names and value and value not in names:
            hint = ("; other methods are in data/baselines.py, a part of your own in its own script"
                    if f.name in ("arch", "gfl", "ffl") else "")
            raise UserError(f"{option} {value} is not one of {', '.join(names)}{hint}.")
        if low is not None and not low <= value <= high:
            bounds = f"at least {low:,}" if high == math.inf else f"from {low:,} to {high:,}"
            raise UserError(f"{option} must be {bounds}, not {value}.")
    if s.labels != Settings.labels and s.eval != "semi" or s.oversample and not s.eval:
        raise UserError("--labels needs --eval semi, and --oversample needs --eval.")
    if not s.epochs and not s.steps and s.eval != "linear":
        raise UserError("--epochs 0 is for --eval linear; give 1 or more.")
    if Path(s.name).name != s.name or s.name == "..":
        raise UserError(f"--name {s.name} must be one folder's name, without / or ..")
    if (s.ffl, s.connection) == ("none", "direct"):
        raise UserError("--connection direct has nothing to connect with --ffl none; drop one.")
    return s


def tag_of(usual: dict, args: dict) -> str:
    """What tells results apart: the options that were given and differ from the usual ones."""
    given = [f"{k}-{args[k]}" for k in IN_NAMES if args.get(k, usual[k]) != usual[k]]
    return re.sub(r"[^\w.]|_", "-", "-".join(given).replace(".pt", "").replace("-True", ""))


def build_model(s: Settings, start: dict | None = None) -> nn.Module:
    """The model that the settings describe, its weights drawn from the seed.

    Args:
        s: see `Settings`.
        start: a ResNet's state dict without `fc`, for the backbone.
    Raises UserError: sizes do not fit together, or `start` does not fit the net."""
    torch.manual_seed(s.seed)
    backbone = Backbone(RESNETS[s.arch]())
    if start:  # before the target is copied
        load_weights(s.init, backbone.resnet, start)
    gfl = GFLS[s.gfl](s, backbone)
    if s.ffl == "none":
        return GFLAlone(gfl)
    try:
        ffl = FaceMAE(backbone.channels, groups=s.groups, ratio=s.mask_ratio, kappa=s.kappa,
                      image_size=s.ffl_size, patch=s.patch, norm_pix=s.norm_pix, **VITS[s.vit])
    except ValueError as error:
        raise UserError(f"{error}; change --groups, --patch or --ffl-size.") from None
    ffl.masking = MASKINGS[s.ffl](s.groups, s.ffl_size, s.patch, s.mask_ratio)
    if s.connection == "direct":
        return DirectSimFLE(gfl, ffl, s.beta)
    return SimFLE(gfl, ffl, s.hidden, s.outputs, s.alpha, s.beta, s.temperature)


# ===== The demo =====


def run_program(name: str, *args: str, stdout=None) -> bytes | None:
    """Runs a program of data/.

    Args:
        name: its file's name.
        args: its command line.
        stdout: subprocess.PIPE asks for its output.
    Returns: its output, if that was asked for.
    Raises UserError: it failed, or this process was told to stop meanwhile."""
    done = subprocess.run([sys.executable, HERE / "data" / name, *args], stdout=stdout)
    if stop_asked.is_set():
        raise UserError("stopped; the same command goes on.", code=143)
    if done.returncode:
        raise UserError(f"data/{name} ended with code {done.returncode}; it says above why, unless "
                        f"a signal killed it.")
    return done.stdout


def demo(s: Settings, world: World) -> None:
    """Pre-trains on toy faces, which it draws first, and evaluates and draws what came out.

    Raises UserError: see `pretrain` and `evaluate`."""
    local_rank0 = int(os.environ.get("LOCAL_RANK", 0)) == 0  # each machine has its own disk
    if local_rank0:
        run_program("toy.py")  # draws nothing if they are there
    if world.size > 1:
        dist.barrier()
    if s.eval:
        evaluate(s, world)
        return
    pretrain(s, world)

    def linear(**more) -> dict:
        own = dict(eval="linear", name=s.name, workers=s.workers)
        return evaluate(from_rank0(world, lambda: read_settings(own | more)), world)

    def raw_pixels() -> dict:  # without loader workers, since this process needs memory meanwhile
        out = run_program("probe.py", s.name, "--init", "pixels", "--workers", "0",
                          stdout=subprocess.PIPE)
        return json.loads(out.splitlines()[-1])

    untrained, trained = linear(init="random", seed=s.seed), linear()
    pixels = from_rank0(world, raw_pixels)
    from_rank0(world, lambda: run_program("figures.py", s.name))
    say(world, f"""
Which of {len(trained["per_class"])} expressions does a toy face wear? A linear classifier, on \
{trained["images"]:,} new faces, is right in
  {100 / len(trained["per_class"]):5.1f} %  by guessing
  {pixels["accuracy"]:5.1f} %  from raw pixels, 16 × 16
  {untrained["accuracy"]:5.1f} %  from the backbone before training
  {trained["accuracy"]:5.1f} %  from the backbone after it; the training saw no labels
In the demo's own setting the masked autoencoder adds nothing measurable (README, Results).
Pictures of what it has learnt: {Path("runs", s.name, "figures")}
Next, on photographs: git clone https://github.com/muxspace/facial_expressions
  python {HERE / "data" / "prepare.py"} muxspace --src facial_expressions
  python {HERE / "simfle.py"} --data muxspace --preset laptop --steps 5000""")


def run(argv: list[str] | None) -> None:
    """Decides what to do. Raises UserError."""
    args = read_arguments(argv)
    with processes() as world:
        s = from_rank0(world, lambda: read_settings(args))
        if s.data == "toy":
            demo(s, world)
        elif s.eval:
            evaluate(s, world)
        else:
            pretrain(s, world)


def explained(error: Exception) -> tuple[str, int]:
    """What to tell of an error that is no UserError, and the exit code: a sentence where a user can
    mend it, else its traceback."""
    text = f"{type(error).__name__} {error}"
    if stop_asked.is_set() and re.search("worker.*(exited|killed)", text):  # by Ctrl-C, as we were
        return "stopped; the same command goes on.", 143
    if re.search(OUT_OF_MEMORY, text):
        return ("out of memory: give a smaller --batch-size, or more GPUs. In bf16 the paper's "
                "setting needs an estimated 27 GiB for 256 images a process, and 11 GiB for 85.", 2)
    if re.search(r"shared memory|Bus error|/torch_\d|worker.*(exited|killed)", text):
        return ("too little shared memory for the loader workers, or one was killed: give fewer "
                "--workers (0 needs none), or the container more memory, such as docker's "
                "--shm-size=8g.", 2)
    lost = "closed|reset|broken pipe|peer|timed out|timeout|remote process"  # gloo's words, NCCL's
    if dist.is_initialized() and isinstance(error, RuntimeError) and re.search(lost, text, re.I):
        return (f"rank {dist.get_rank()} ends, because another one has ended; the same command "
                f"(without --fresh) resumes.", 1)
    if isinstance(error, OSError):
        return str(error), 2
    return "a fault of the program itself:\n" + traceback.format_exc(), 1


def program(name: str, run: Callable[[], None]) -> int:
    """Runs a program, tells what ended it, and ends its loader workers.

    Args:
        name: of the program, for its messages.
        run: what it does.
    Returns: the exit code. 0; 2 after a UserError. 143 when stopped by a signal, 130 by a second
        Ctrl-C. 1 when another process has failed, or for a fault of the program itself."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console without × is no reason to stop
    kinds = [kind for kind in STOPS  # except those that nohup, or `&` in a script, made it ignore
             if signal.getsignal(kind) != signal.SIG_IGN]
    before = [signal.signal(kind, ask_to_stop) for kind in kinds]
    told, code = "", 0
    try:
        run()
    except UserError as error:
        told = re.split("(?:User|Unreadable)Error: ", str(error).rstrip())[-1]  # after a traceback
        code = error.code
        if int(os.environ.get("LOCAL_RANK", 0)) and not isinstance(error, UnreadableError):
            told = ""  # all ranks know it; once on every machine is enough
    except KeyboardInterrupt:
        told, code = ("interrupted at once; a run resumes from its last checkpoint, if it has one, "
                      "by the same command (without --fresh).", 130)
    except Exception as error:
        told, code = explained(error)
    with contextlib.suppress(OSError, ValueError):
        if told:
            print(f"\n{name}: {told}", file=sys.stderr, flush=True)
    for kind, handler in zip(kinds, before):
        signal.signal(kind, handler)
    stop_asked.clear()
    # Loader workers ignore SIGTERM, and Python would wait for them. Their end is no news any more.
    if hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
    return code


def main(argv: list[str] | None = None) -> int:
    """The program.

    Args:
        argv: the command line, without the program's name; by default that of this process.
    Returns: the exit code, see `program`."""
    return program("simfle", lambda: run(argv))


def leave(code: int) -> None:
    """Ends the process: at once where its group is still open, since Python's own exit may abort
    then."""
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
