# SPDX-License-Identifier: MIT
"""SimFLE in one file: self-supervised facial expression recognition in the wild.

SimFLE (Simple Facial Landmark Encoding, J. Moon and S. Park) trains a ResNet on face photographs
without labels. Two tasks share the backbone: two random views of a face must look alike to it
(GFL, Section 3.1), and its channels decide which patches of a face a masked autoencoder gets to see
(FFL, Section 3.2); what both have learnt is exchanged by distillation (Section 3.3). Afterwards
only the backbone is kept. Read this file from the top with the paper beside it; sections, equations
and letters are the paper's.

    python simfle.py                                               the demo, on a laptop
    python simfle.py --data affectnet                              one GPU
    torchrun --nproc_per_node=3 simfle.py --data affectnet         three GPUs, as in the paper
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
             --rdzv_endpoint=HOST:29500 simfle.py --data affectnet        two nodes: on each, this
    python simfle.py --data affectnet --eval                       linear evaluation of that run

`--data NAME` is a folder, or the folder of that name in data/. Results go to runs/NAME/ (`--name`
gives another name): checkpoint.pt holds everything, and a run that finds it goes on from it;
backbone.pt is a torchvision state dict without `fc`, its running statistics those of process 0, by
default of two views and the plain face of every image; log.jsonl is the log.

Letters
    I, v1, v2     a face, and two augmented views of it
    f_θ, f_ρ      online stream: backbone, projector, predictor; target: backbone, projector
    τ             the target's inertia
    X             the backbone's map of I: c′ channels of h′ × w′
    C_i, D, N_g   channel i after grouping; the cosine of two; the number of channel groups
    a_i, γ        the score of patch i; the share of the N_p patches that is masked (N_m of them)
    e_i, κ        (ours) the reconstruction error of patch i; the strength of the refinement
    z_m, z_v1, z_v2, t    the three distilled vectors and the temperature of their softmax
    L_s, L_r, L_d, L_g    similarity, reconstruction, distillation (weighed by α), grouping loss (β)

Departures: where this file parts from the paper (P) or from the authors' code (A)
     1  PA L_r trains the masking by a straight-through term, which the paper does not define. It
           trains the grouping layer alone: 3.2 has the backbone refined too, 3.3 cuts it off. In
           the authors' code L_r never reaches the scores (here: `--mask-gradient 0`).
     2  PA Eq. 2 is exact and divided by c′; the authors take a distance to a block identity.
     3  PA The grouping layer starts random, not constant (A); behind it BatchNorm and ReLU (P).
     4  A  Blur with probability 0.5, SimCLR's own, in place of always.
     5  A  The learning rate follows the cosine with every step, not with every epoch.
     6  A  Pictures are squeezed to a square; the authors resize by the short side.
     7  P  Eq. 5 gets a factor t², is read as KL(z̄ ‖ z_i), and its z̄ is a constant.
     8  P  The autoencoder's pixels are normalised patch by patch, as in MAE (`--no-norm-pix`).
     9  P  The four colour jitters come in one random order per batch, not per image.
    10  P  255 images a step on three processes, not 256; pre-training drops partial batches.
    11  A  DistributedDataParallel, not DataParallel; in both, BatchNorm sees one GPU's images.
    12  A  Any picture that Pillow reads is taken: grey, palette, CMYK, any extension, any depth.
    13  P  A few hundred training images are set aside to measure the refinement (Fig. 3).
    14  P  On GPUs the nets run in bf16; `full_precision`, the weights and the EMA are fp32.
    15  –  MoCo's queue is empty at first; with random keys, as MoCo's, all faces fell to a point.
    16  P  With MoCo, L_d is of z_m and z_v1: only the target sees v2, and it gets no gradient.

Map
    Part I: the method       3.1 GFL · 3.2 Channel grouping · 3.2 Semantic masking · 3.2 FaceMAE ·
                             3.3 Connecting two branches · 3.3 Total loss
    Settings
    Part II: training        4.1 Pictures · 4.1 Augmentation · 4.1 Order of the images ·
                             4.1 Processes · 4.1 Checkpoints · 4.1 What is watched · 4.1 The loop ·
                             4.1 Pre-training
    Part III: evaluation
    Part IV: other rows of the tables    Table 3: parts taken away · Table 4: other methods for GFL
    main
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF

fcntl = None if os.name == "nt" else importlib.import_module("fcntl")  # Windows has none

# ================================ Part I: the method ================================
# Plain tensors in, plain tensors out: no settings object, device, process group or file, so that
# each piece can be pasted elsewhere with the imports above and the helpers that it names. The
# numbers in the shapes are those of the paper's setting: ResNet-50, views of 224 pixels, I of 112;
# B is the batch.

def full_precision(x: Tensor):
    """A context that switches `torch.autocast` off on x's device. (ours)

    Norms, cosines, softmax, Eq. 2 and the scores need fp32: in bf16's 8 significant bits many of 49
    scores would be equal, and which patch is masked an accident."""
    return torch.autocast(x.device.type, enabled=False)

def promote(x: Tensor) -> Tensor:
    """x in fp32 if it is bf16 or half; fp32 and float64 as they are. (ours)"""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def unit(x: Tensor, dim: int, floor: float = 0.1) -> Tensor:
    """x at unit length along `dim`; a zero vector stays zero. x is fp32 or float64. (ours)

    The gradient of a direction is proportional to 1/‖x‖, so a few vectors that are almost zero
    would outweigh all others. In the gradient alone, a norm below `floor` counts as `floor`."""
    u = F.normalize(x, dim=dim)
    share = x.detach().norm(dim=dim, keepdim=True) / floor  # of the gradient that passes
    return torch.lerp(u.detach(), u, share.clamp(max=1))

class Backbone(nn.Module):
    """A torchvision ResNet that gives its last feature map and the map's mean. (Sec. 3, Fig. 2)

    Its `fc` is taken off: `resnet.state_dict()` is torchvision's, but for `fc.*`. forward: (B, 3,
    224, 224) -> map (B, 2048, 7, 7), pooled (B, 2048). Of 112 pixels the map is 4 × 4."""
    def __init__(self, resnet: nn.Module | None = None):
        super().__init__()
        self.resnet = torchvision.models.resnet50() if resnet is None else resnet
        self.channels = self.resnet.fc.in_features  # c′ = 2048
        self.resnet.fc = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = feature_map(self.resnet, x)
        return x, x.mean(dim=(2, 3))

def feature_map(r: nn.Module, x: Tensor) -> Tensor:
    """All of a torchvision ResNet but its pooling and `fc`. (B, 3, 224, 224) -> (B, 2048, 7, 7)."""
    x = r.maxpool(r.relu(r.bn1(r.conv1(x))))  # (B, 64, 56, 56)
    return r.layer4(r.layer3(r.layer2(r.layer1(x))))

def mlp(inputs: int, hidden: int = 4096, outputs: int = 256) -> nn.Sequential:
    """Every head of the method: the projectors, the predictor, the distillation heads. (Sec. 4.1)

    Paper: "a fully connected layer with a batch normalization and a ReLU activation, followed by
    another fully connected layer". The widths are BYOL's and the authors'; the paper gives none."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, outputs))

# ===== 3.1 GFL: global facial feature learning =====
# Two views of one face, cropped and coloured at random, should mean the same. Asking just that has
# a trivial answer: map every face to one point, a collapse. BYOL avoids it without ever comparing
# two different faces. The online stream f_θ (backbone, projector, predictor) predicts what the
# target stream f_ρ (backbone, projector) says of the other view. No gradient ever moves the target
# towards the prediction; it follows the online stream slowly, so that each step moves f_θ towards
# an older and, by averaging, steadier self.
#
# Whether it worked can be seen: `spread`, the deviation of the normalised projections over the
# batch, falls to 0 in a collapse; 256 numbers that share a unit length evenly have 1/√256 = 0.0625.

def similarity_loss(p: Tensor, z: Tensor) -> Tensor:
    """How far a prediction is from the target's projection. (Sec. 3.1, Eq. 1)

    p: (B, 256) f_θ of one view, with gradient. z: (B, 256) f_ρ of the other. Returns (): the mean
    of 2 − 2·cos over the batch, the squared distance of the two as unit vectors, from 0 to 4.

        p, z = torch.randn(2, 8, 256, requires_grad=True)
        L_s = similarity_loss(p, z.detach())
        L_s.backward()
    """
    with full_precision(p):
        return (2 - 2 * F.cosine_similarity(promote(p), promote(z), dim=1)).mean()

def spread(z: Tensor) -> Tensor:
    """How much projections z (B, 256) at unit length deviate over the batch, (): the mean of their
    dimensions, 0 when all faces are one point, near 1/√256 when healthy. (ours)"""
    with full_precision(z):
        return F.normalize(promote(z), dim=1).std(dim=0).mean()

@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """ρ ← τ ρ + (1 − τ) θ, over all parameters in one fused call. (Sec. 3.1)

    target, online: modules of the same shape. Buffers stay (see `BYOL`). Raises ValueError for
    weights in bf16 or half: with τ = 0.99 a step moves ρ by a hundredth of the difference, which
    their few digits would often round to nothing.

        online = mlp(2048)
        target = copy.deepcopy(online).requires_grad_(False)
        ema_update(target, online, tau=0.99)
    """
    weights = list(target.parameters())
    if any(w.dtype in (torch.bfloat16, torch.half) for w in weights):
        raise ValueError("an EMA needs weights in fp32: keep them so, and use torch.autocast")
    torch._foreach_lerp_(weights, list(online.parameters()), 1 - tau)

class Stream(nn.Module):
    """f_ρ, or f_θ without its predictor: view (B, 3, 224, 224) -> z (B, 256), pooled (B, 2048).
    (Sec. 3.1, Fig. 2)"""
    def __init__(self, backbone: Backbone, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.backbone(v)[1]
        return self.projector(pooled), pooled

class BYOL(nn.Module):
    """GFL by BYOL. (Sec. 3.1, Eq. 1)

    forward: v1, v2 (B, 3, 224, 224) each -> L_s (); the pooled features (B, 2048) of the views that
    the online stream has seen, here [h1, h2]; and z1 (B, 256), the online projection of v1, for
    `spread`. Call `update()` once after every step of the optimiser. Needs B ≥ 2 in train mode
    (BatchNorm). τ = 0.99 throughout, as in the authors' code; the paper gives no value. What has
    this interface and an `online.backbone` can take BYOL's place (Part IV).

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
        # The target starts as a copy. Its BatchNorm normalises by the batch at hand, as the online
        # one's does, and keeps running statistics of its own: they belong to weights that lag
        # behind, and since in train mode nothing reads them, averaging them would change nothing.
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        # One forward per view. Concatenated they would run a little faster, but BatchNorm would
        # then normalise both by one common mean, and each would see the other through it.
        z1, h1 = self.online(v1)
        z2, h2 = self.online(v2)
        with torch.no_grad():
            target1, target2 = self.target(v1)[0], self.target(v2)[0]
        # Paper: "The same process can be done again by swapping the positions of v1 and v2." The
        # two are added, not averaged: L_s runs from 0 to 8.
        L_s = (similarity_loss(self.predictor(z1), target2)
               + similarity_loss(self.predictor(z2), target1))
        return L_s, [h1, h2], z1

    def update(self) -> None:
        """Moves the target after the optimiser's step."""
        ema_update(self.target, self.online, self.tau)

# ===== 3.2 Channel grouping =====
# FFL wants the backbone to say which parts of a face matter. What it has are c′ = 2048 channels,
# each a small picture of where something was found, many of them alike. A 1 × 1 convolution mixes
# them into c′ new ones, of which channel k belongs to group k // (c′/N_g): 32 groups of 64. Eq. 2
# asks channels of one group to look at the same places, those of different groups at different
# ones, and so makes of 2048 channels 32 opinions on where to look.
#
# Written as it stands, Eq. 2 needs the cosines of all 2048² pairs for each image. They need not be
# made. Let U be the c′ × h′w′ matrix whose rows are the channels at unit length. Then U Uᵀ holds
# the cosines, and the sum of their squares, a matrix's ‖·‖², is
#
#     Σ_ij D(C_i, C_j)²  =  ‖U Uᵀ‖²  =  trace(U Uᵀ U Uᵀ)  =  trace(Uᵀ U Uᵀ U)  =  ‖Uᵀ U‖²,
#
# where Uᵀ U is only h′w′ × h′w′ = 16 × 16. Likewise for the pairs inside one group g, with U_g, its
# 64 rows. So, exactly and for 1/128 of the arithmetic,
#
#     L_g  =  (all pairs − pairs in a group) − pairs in a group  =  ‖Uᵀ U‖² − 2 Σ_g ‖U_gᵀ U_g‖²,
#
# and Uᵀ U is just the sum of the groups' U_gᵀ U_g.

class ChannelGrouping(nn.Module):
    """Mixes c′ channels into c′ channels that lie in groups. (Sec. 3.2)

    Paper: "Channel grouping can be implemented through a 1 × 1 convolution layer"; BatchNorm and
    ReLU behind it are the authors'. forward: X (B, 2048, 4, 4) -> C (B, 2048, 4, 4), fp32, never
    negative. Raises ValueError where `groups` does not divide `channels`.

        grouping = ChannelGrouping(2048, groups=32)
        C = grouping(torch.randn(2, 2048, 4, 4))
        L_g, D2_between, D2_within = grouping_loss(C, groups=32)
    """
    def __init__(self, channels: int = 2048, groups: int = 32):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{groups} channel groups do not divide {channels} channels")
        # Departure 3: PyTorch's own random start. With the authors' constant all channels, and all
        # their gradients, are equal until rounding noise takes them apart, 45 steps of SGD later.
        self.conv = nn.Conv2d(channels, channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, X: Tensor) -> Tensor:
        with full_precision(X):
            return F.relu(self.norm(self.conv(X.to(self.conv.weight.dtype))))

def pair_sums(C: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The two sums of Eq. 2: of D(C_i, C_j)² over pairs in different groups, and in one group.

    C: (B, c′, h′, w′). Returns two (B,). As in Eq. 2, i and j run over all channels: each pair
    counts twice, and each channel pairs with itself. (Sec. 3.2, Eq. 2)

    By hand, 4 channels of 2 positions in 2 groups: (1, 0), (1, 0) | (0, 1), (1, 1). In the first
    group D² is 1 four times; in the second 1, ½, ½, 1: 7 in all. Between the groups D² is 0, ½, 0,
    ½, each twice: 2. By the identity: Uᵀ U = [2.5 0.5; 0.5 1.5], whose squares sum to 9 = 2 + 7."""
    with full_precision(C):
        U = rearrange(promote(C), "b (g k) h w -> b g k (h w)", g=groups)  # (B, 32, 64, 16)
        U = unit(U, dim=3)
        gram = torch.einsum("bgkp,bgkq->bgpq", U, U)  # (B, 32, 16, 16): U_gᵀ U_g
        within = gram.square().sum(dim=(1, 2, 3))
        all_pairs = gram.sum(dim=1).square().sum(dim=(1, 2))
    return all_pairs - within, within

def grouping_loss(C: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Channels of a group alike, of different groups unlike. (Sec. 3.2, Eq. 2)

    C: (B, c′, h′, w′) as `ChannelGrouping` gives it. Returns L_g (), which is Eq. 2 divided by c′
    (departure 2), averaged over the batch; and mean D² of two channels of different groups and of
    one group, () each, without gradient, over the channels that are not 0 on the whole image. In
    the example of `pair_sums`: (2 − 7)/4 = −1.25, 2/8, and 3/4, the mean of 1 and ½, since a
    channel's pair with itself does not count here.

    Eq. 2 weighs all pairs alike. With 2,048 channels one has 63 partners and 1,984 strangers, so
    Eq. 2 mostly makes channels unlike. On toy faces (preset laptop, 256 channels, 500 steps, seeds
    0 to 2) mean D² between groups falls from 0.15 to 0.06, 0.07, 0.07. Within groups it rises from
    0.15 to 0.61, 0.40, 0.37.

        C = torch.rand(2, 2048, 4, 4, requires_grad=True)
        L_g, D2_between, D2_within = grouping_loss(C, groups=32)
        L_g.backward()
    """
    between, within = pair_sums(C, groups)
    channels = C.shape[1]
    # The means are over pairs of two channels that are not 0 everywhere in the image.
    alive = C.detach().flatten(2).any(dim=2)  # (B, 2048)
    n = rearrange(alive, "b (g k) -> b g k", g=groups).sum(dim=2)  # (B, 32), up to 64
    inside, outside = (n * (n - 1)).sum(), (n.sum(dim=1)**2 - (n**2).sum(dim=1)).sum()
    D2_between = between.detach().sum() / outside.clamp(min=1)
    D2_within = (within.detach().sum() - n.sum()) / inside.clamp(min=1)  # D(C_i, C_i)² is 1
    return (between - within).mean() / channels, D2_between, D2_within

# ===== 3.2 Semantic masking =====
# MAE masks patches at random. Here a channel group decides: its 64 channels are summed to one score
# map, and the patches with the lowest scores are masked. What the backbone finds interesting stays
# visible. Each image draws its own group, anew in every epoch, so all groups have their say.
#
# Masks follow MAE's convention: 0 is kept, 1 is masked.

class SemanticMasking(nn.Module):
    """Chooses the patches to mask from the grouped channels. (Sec. 3.2, Eq. 3)

    forward: C (B, 2048, 4, 4); u (B, 1) in [0, 1) picks the group, ⌊u·N_g⌋, drawn if it is not
    given -> a (B, 49) the scores, with gradient; keep (B, 12) the indices of the kept patches, best
    first; mask (B, 49), 0 kept and 1 masked. Patches are counted row by row. Has no parameters.
    Raises ValueError where `patch` does not divide `image_size`.

        C = torch.rand(2, 2048, 4, 4)
        masking = SemanticMasking(groups=32, image_size=112, patch=16, ratio=0.75)
        a, keep, mask = masking(C)
    """
    def __init__(self, groups: int = 32, image_size: int = 112, patch: int = 16,
                 ratio: float = 0.75):
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patches of {patch} do not divide an image of {image_size} pixels")
        self.groups, self.image_size, self.patch, self.ratio = groups, image_size, patch, ratio
        self.draws = 1  # how many numbers u has for an image; RandomMasking's: 49

    def scores(self, C: Tensor, group: Tensor) -> Tensor:
        """a_i of Eq. 3 for the given group of each image, (B,) -> (B, 49)."""
        with full_precision(C):
            per_group = rearrange(promote(C), "b (g k) h w -> b g k h w", g=self.groups).sum(dim=2)
            image = torch.arange(len(C), device=C.device)
            score_map = per_group[image, group]  # (B, 4, 4): X_g̃, the channel-wise sum
            # The paper says "upsampled"; bilinear is the authors'. Then Eq. 3 is average pooling.
            score_map = F.interpolate(score_map[:, None], size=(self.image_size,) * 2,
                                      mode="bilinear", align_corners=False)  # (B, 1, 112, 112)
            return F.avg_pool2d(score_map, self.patch).flatten(1)  # (B, 49)

    def forward(self, C: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        u = torch.rand(len(C), 1, device=C.device) if u is None else u
        a = self.scores(C, (u[:, 0] * self.groups).long())
        return a, *mask_lowest(a, self.ratio)

def mask_lowest(a: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Paper: "the patches are masked in ascending order". (Sec. 3.2)

    a: (B, N_p) scores. Returns keep (B, N_p − N_m), the indices of the highest, and mask (B, N_p),
    0 kept and 1 masked. Of 49 at γ = 0.75, ⌊49 · 0.25⌋ = 12 are kept, 37 masked. At least one of
    each, or there is nothing to see or nothing to learn. Of equal scores the first is kept."""
    B, N_p = a.shape
    kept = min(max(1, math.floor(N_p * (1 - ratio) + 1e-6)), N_p - 1)  # 1e-6: (1 − 0.8)·50 is 9.99…
    keep = a.argsort(dim=1, descending=True, stable=True)[:, :kept]
    return keep, torch.ones_like(a).scatter(1, keep, 0.0)

# Trainable refinement. Paper: "FaceMAE has to minimize the reconstruction loss, it will try to
# avoid masking fine-grained facial landmarks, which are difficult to reconstruct." Nothing so far
# lets it try: a sort has no gradient, so L_r does not know that other scores would have given it
# another mask. What the gradient ought to say is plain, though: a masked patch that was harder than
# the others should rise in score, an easier one sink. So the mask is made soft at its threshold,
#
#     r = the scores standardised per image,    soft_i = sigmoid(r_thr − r_i),
#
# near 1 for what is surely masked, ½ at the threshold r_thr, which is the last score that was kept.
# A term is added to L_r whose value is 0 (soft_i minus itself) and whose gradient is that of soft_i
# weighed by the error: straight through, as if the mask were the soft one,
#
#     1/N_m Σ_i M_i (e_i − ē)(soft_i − const),      ∂/∂r_i = −M_i (e_i − ē) σ′_i / N_m,
#
# where const is soft_i as a plain number and σ′_i the sigmoid's slope there; r_thr is a constant.
# Errors are constants too. ē is their mean over the image's masked patches; without it every r_i
# of a masked patch would rise, hard or easy. M_i is the hard mask: L_r never scores the "error" of
# a kept patch. Standardising couples the patches of an image, so single raw scores may move
# against their r_i. (Departure 1.)

def refinement_term(a: Tensor, mask: Tensor, error: Tensor) -> Tensor:
    """A zero whose gradient raises the scores of patches that are hard to reconstruct. (Sec. 3.2)

    a, mask, error: (B, 49) each; only `a` gets a gradient. Returns (), which `FaceMAE` adds to L_r,
    κ c′ times.
    Measured with `FaceMAE`'s default, as the correlation of error and keep frequency over the 49
    positions, preset laptop, 500 steps, seeds 0 to 2: +0.56, +0.77, +0.76 on toy faces, +0.37,
    +0.69, +0.44 on photographs. What it does to accuracy has not been measured.

        a, error = torch.randn(2, 49, requires_grad=True), torch.rand(2, 49)
        keep, mask = mask_lowest(a, ratio=0.75)
        refinement_term(a, mask, error).backward()
    """
    with full_precision(a):
        a, error = promote(a), promote(error.detach())
        # The deviation of N_p numbers is the norm of their differences to the mean / √(N_p − 1).
        r = unit(a - a.mean(dim=1, keepdim=True), dim=1) * math.sqrt(a.shape[1] - 1)
        r_thr = r.detach().masked_fill(mask.bool(), math.inf).amin(dim=1, keepdim=True)
        soft = torch.sigmoid(r_thr - r)
        N_m = mask.sum(dim=1, keepdim=True)
        mean_error = (error * mask).sum(dim=1, keepdim=True) / N_m  # ē
        term = mask * (error - mean_error) * (soft - soft.detach()) / N_m
        return term.sum(dim=1).mean()

# ===== 3.2 FaceMAE =====
# A masked autoencoder: a ViT encodes the 12 visible patches, a smaller one guesses the 37 others
# from them, which takes knowing how faces hang together. Its image is the whole picture, resized
# and not augmented: the paper calls I "the input facial image", and only v1 and v2 augmented.

PIXEL_EPS = 1e-6  # added to a patch's variance, which could be 0

class Block(nn.Module):
    """A pre-norm transformer block: x (B, tokens, width) -> the same shape. (Sec. 4.1, ViT)"""
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
    """Fixed 2-D positions: (1, 1 + grid², width), zeros for the class token. (Sec. 4.1, MAE)

    The first half of the numbers tells the column, the second the row, as in MAE; each as sines,
    then cosines of the coordinate at width/4 frequencies from 1 down to almost 1/10,000. 4 must
    divide width."""
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency  # (7, 192)
    line = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (7, 384)
    row = line[:, None].expand(-1, grid, -1)
    column = line[None].expand(grid, -1, -1)
    patches = rearrange(torch.cat([column, row], dim=2), "h w d -> (h w) d")
    return torch.cat([torch.zeros(1, width), patches])[None]

class MaskedAutoencoder(nn.Module):
    """MAE with ViT-B/16 on small images. (Sec. 3.2, Eq. 4; Sec. 4.1)

    forward: I (B, 3, 112, 112), normalised; keep (B, 12) indices of the visible patches -> error
    (B, 49), the mean squared error of every patch, visible ones too; tokens (B, 12, 768), the
    encoder's output for the visible patches without its class token."""
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
        """(B, 3, 112, 112) -> (B, 49, 768): row by row, and in a patch the colours last."""
        return rearrange(I, "b c (gh p) (gw q) -> b (gh gw) (p q c)", p=self.patch, q=self.patch)

    def encode(self, patches: Tensor, keep: Tensor) -> Tensor:
        """(B, 49, 768), (B, 12) -> (B, 13, 768): the class token, then the visible patches."""
        x = self.embed(patches) + self.position[:, 1:]
        x = torch.take_along_dim(x, keep[:, :, None], dim=1)  # (B, 12, 768)
        first = (self.class_token + self.position[:, :1]).expand(len(x), -1, -1)
        return self.encoder(torch.cat([first, x], dim=1))

    def decode(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """(B, 13, 768), (B, 12) -> (B, 49, 768): every patch's pixels, as in `target`."""
        y = self.decoder_embed(tokens)  # (B, 13, 512)
        B, _, width = y.shape
        # A mask token everywhere, then what was seen in its place.
        x = self.mask_token.to(y.dtype).expand(B, self.grid**2, -1)
        x = x.scatter(1, keep[:, :, None].expand(-1, -1, width), y[:, 1:])  # (B, 49, 512)
        x = torch.cat([y[:, :1], x], dim=1) + self.decoder_position
        return self.to_pixels(self.decoder(x))[:, 1:]

    def target(self, patches: Tensor) -> Tensor:
        """What is to be guessed: pixels at mean 0 and deviation 1 in every patch. (Departure 8.)

        What is left is pattern and hue: otherwise light and contrast decide what is hard."""
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

    forward: X (B, 2048, 4, 4), the backbone's map of I; I (B, 3, 112, 112); u (B, 1) in [0, 1)
    picks the group of each image, drawn if it is not given -> L_r (), tokens (B, 12, 768) for the
    distillation, L_g (), and mean D² between and within groups, two () without gradient.

        ffl = FaceMAE(channels=512, depth=2, decoder_depth=1)
        X, I = torch.randn(2, 512, 4, 4), torch.randn(2, 3, 112, 112)
        L_r, tokens, L_g, D2_between, D2_within = ffl(X, I)
    """
    def __init__(self, channels: int = 2048, groups: int = 32, ratio: float = 0.75,
                 kappa: float = 0.02, image_size: int = 112, patch: int = 16, **autoencoder):
        super().__init__()
        self.groups, self.kappa = groups, kappa
        self.grouping = ChannelGrouping(channels, groups)
        self.masking = SemanticMasking(groups, image_size, patch, ratio)
        self.mae = MaskedAutoencoder(image_size, patch, **autoencoder)

    def forward(self, X: Tensor, I: Tensor, u: Tensor | None = None):
        C = self.grouping(X)
        L_g, D2_between, D2_within = grouping_loss(C, self.groups)
        a, keep, mask = self.masking(C, u)
        error, tokens = self.mae(I, keep)
        # Eq. 4. Paper: "We compute the loss only for the N_m masked patches" (mask is 1 there).
        L_r = (error * mask).sum() / mask.sum()
        # L_g and the refinement both train the grouping layer, and neither may drown the other. The
        # ratio of their gradients grows with the number of channels c′: like √c′ for random
        # channels, like c′ for groups whose channels agree. So the refinement is multiplied by c′.
        L_r = L_r + self.kappa * C.shape[1] * refinement_term(a, mask, error)
        return L_r, tokens, L_g, D2_between, D2_within

# ===== 3.3 Connecting two branches =====
# FFL wants easy reconstruction, GFL wants views alike; if both pull at the backbone, it breaks:
# 20.98 % in place of 44.01 % (Table 3, b and d). So the map X that makes the scores carries no
# gradient back, and the branches only compare notes: the autoencoder's vector of the face and the
# backbone's of its views, each through a projector, should give the distribution of their mean.

def distillation_loss(zs: list[Tensor], t: float = 4.0) -> Tensor:
    """Each vector's softmax towards that of their mean. (Sec. 3.3, Eq. 5)

    zs: z_m, z_v1, z_v2, each (B, 256). Returns (): summed over them, averaged over the batch.

    Departure 7. The paper writes KL(ψ(z_i/t), ψ(z̄/t)), its order and gradient left open. As in the
    authors' code, z̄ teaches: KL(ψ(z̄/t) ‖ ψ(z_i/t)), the order in which all that the teacher finds
    likely must be covered, with z̄ a constant. (Which changes nothing in this order: the gradients
    by z̄ cancel, as Σ_i (z̄ − z_i) = 0.) t² is Hinton's: the softmax's gradient shrinks by 1/t, the
    difference of the distributions by another, and t² makes the size independent of t.

        zs = list(torch.randn(3, 8, 256, requires_grad=True))
        L_d = distillation_loss(zs, t=4.0)
        L_d.backward()
    """
    with full_precision(zs[0]):
        zs = [promote(z) for z in zs]
        teacher = F.log_softmax(torch.stack(zs).mean(dim=0).detach() / t, dim=1)
        return t**2 * sum(F.kl_div(F.log_softmax(z / t, dim=1), teacher, log_target=True,
                                   reduction="batchmean") for z in zs)

# ===== 3.3 Total loss =====
# Who trains whom ("–" is no gradient at all; a test holds this table):
#
#           backbone   projector, predictor   grouping layer   encoder   decoder   distil heads
#     L_s   yes        yes                    –                –         –         –
#     L_r   –          –                      by κ alone       yes       yes       –
#     L_d   yes        –                      –                yes       –         yes
#     L_g   –          –                      yes              –         –         –

class SimFLE(nn.Module):
    """SimFLE. Without arguments, of the paper's sizes. (Sec. 3, Fig. 2, Eq. 6)

    gfl: `BYOL`, or another of Part IV. ffl: a `FaceMAE` for the channels of gfl's backbone.
    forward: v1, v2 (B, 3, 224, 224), the augmented views; I (B, 3, 112, 112), the whole face, not
    augmented; u, what `SemanticMasking` draws from -> a dict of scalars: `loss` with gradient, and
    without it L_s, L_r, L_d, L_g, spread, D2_between, D2_within. `update()` follows each step."""
    def __init__(self, gfl: nn.Module | None = None, ffl: FaceMAE | None = None,
                 hidden: int = 4096, outputs: int = 256, alpha: float = 0.3, beta: float = 0.03,
                 t: float = 4.0):
        super().__init__()
        self.alpha, self.beta, self.t = alpha, beta, t
        self.gfl = BYOL(Backbone()) if gfl is None else gfl
        channels = self.backbone.channels
        self.ffl = FaceMAE(channels) if ffl is None else ffl
        width = self.ffl.mae.embed.out_features
        self.distil_m = mlp(width, hidden, outputs)  # of the encoder's tokens
        self.distil_v = mlp(channels, hidden, outputs)  # of the backbone's features

    @property
    def backbone(self) -> Backbone:
        """The one network that is kept in the end."""
        return self.gfl.online.backbone

    def forward(self, v1: Tensor, v2: Tensor, I: Tensor,
                u: Tensor | None = None) -> dict[str, Tensor]:
        # 3.1 What is the same in two views?
        L_s, hs, z1 = self.gfl(v1, v2)

        # 3.2 What must be seen to guess the rest? The backbone looks at I in train mode (its
        # running statistics move for the third time), but no gradient comes back to it from here.
        with torch.no_grad():
            X, _ = self.backbone(I)
        L_r, tokens, L_g, D2_between, D2_within = self.ffl(X, I, u)

        # 3.3 The two compare notes. The face's vector is the mean over its visible patches; the
        # class token is left out, as with the authors.
        z_m = self.distil_m(tokens.mean(dim=1))
        L_d = distillation_loss([z_m] + [self.distil_v(h) for h in hs], self.t)

        # Eq. 6
        loss = L_s + L_r + self.alpha * L_d + self.beta * L_g
        return report(loss, L_s=L_s, L_r=L_r, L_d=L_d, L_g=L_g, spread=spread(z1),
                      D2_between=D2_between, D2_within=D2_within)

    def update(self) -> None:
        """What changes without gradient, after every step: the target. (Sec. 3.1)"""
        self.gfl.update()

def report(loss: Tensor, **parts: Tensor) -> dict[str, Tensor]:
    """The loss, with gradient, and its parts, without. (ours)"""
    return {"loss": loss} | {name: value.detach() for name, value in parts.items()}

# ================================ Settings ================================

def setting(default, help: str):
    """A field of `Settings` with the text that --help shows for it."""
    return field(default=default, metadata={"help": help})

@dataclass
class Settings:
    """All settings, and the command line (`batch_size` is `--batch-size`). Each says its unit and
    its source: a section of the paper, "authors" for their public code, "ours" for what neither
    gives. The defaults are the preset `paper`."""
    data: str = setting("toy", "a folder of pictures, or a name in data/; toy: the demo (ours)")
    name: str = setting("", "of the run: results go to runs/NAME; default: the data's name (ours)")
    preset: str = setting("", "paper or laptop; default: laptop for toy, else paper (ours)")
    fresh: bool = setting(False, "start over, even where runs/NAME has a checkpoint (ours)")
    # Length and rate
    epochs: int = setting(100, "passes over the pictures (4.1); 0: linear, converged (ours)")
    steps: int = setting(0, "steps in place of epochs; 0: epochs decide (ours)")
    batch_size: int = setting(256, "images a step, over all processes (4.1)")
    lr: float = setting(0.05, "learning rate per 256 images of a step (4.1)")
    momentum: float = setting(0.9, "of SGD (4.1)")
    weight_decay: float = setting(1e-4, "of SGD (4.1)")
    seed: int = setting(0, "of the weights, the order and every augmentation (ours)")
    # Pictures
    view_size: int = setting(224, "pixels a side of a view (4.1)")
    ffl_size: int = setting(112, "pixels a side of the image that FaceMAE sees (4.1)")
    crop_min: float = setting(0.08, "least share of a picture that a crop covers (4.1, SimCLR)")
    # The method
    arch: str = setting("resnet50", "backbone: a torchvision ResNet, or small (4.1)")
    hidden: int = setting(4096, "hidden width of the heads (authors); SimSiam's are shares of it")
    outputs: int = setting(256, "output width of the heads (authors); of MoCo and SimCLR half")
    gfl: str = setting("byol", "byol, simsiam, moco, mocov2 or simclr (4.3)")
    ffl: str = setting("semantic", "masking of FaceMAE: semantic or random; none: GFL alone (4.3)")
    connection: str = setting("distil", "of the branches: distil, or direct: no L_d (4.3)")
    tau: float = setting(0.99, "inertia of the target (authors); MoCo in preset paper: 0.999")
    queue: int = setting(65_536, "keys that MoCo remembers (its paper)")
    groups: int = setting(32, "channel groups N_g (4.1)")
    mask_ratio: float = setting(0.75, "share of the patches that is masked (4.1)")
    mask_gradient: float = setting(0.02, "refinement of the masking, per channel; 0: none (ours)")
    patch: int = setting(16, "pixels a side of a patch (4.1)")
    vit: str = setting("base", "the autoencoder: base as in MAE (4.1), or tiny (ours)")
    norm_pix: bool = setting(True, "normalise the autoencoder's pixels patch by patch (MAE)")
    alpha: float = setting(0.3, "weight of L_d (4.3)")
    beta: float = setting(0.03, "weight of L_g (4.3)")
    temperature: float = setting(4.0, "of the distillation's softmax (3.3)")
    # What to do, if not pre-training
    eval: str = setting("", "evaluate a run by linear (if nothing is said), semi or finetune (B)")
    labels: float = setting(0.01, "share of the labels that --eval semi uses (B.2)")
    init: str = setting("", "start from random, imagenet or a file; by default the run (4.2)")
    oversample: bool = setting(False, "see every class equally often (Table 2)")
    figures: bool = setting(False, "draw a run's figures (4.4)")
    compare: tuple = setting((), "other runs whose attention --figures shows (Fig. 1)")
    benchmark: bool = setting(False, "time the loader and the parts of a step (ours)")
    # Machine
    workers: int = setting(-1, "loading processes a process; -1: its share of the cores (ours)")
    sync_bn: bool = setting(False, "BatchNorm over all processes; GPUs only (ours)")
    compile: bool = setting(False, "torch.compile the model (ours)")
    save_every: int = setting(0, "steps between checkpoints within an epoch; 0: at its end (ours)")
    log_every: int = setting(20, "steps between two lines of log.jsonl, which holds means (ours)")

# laptop was found by measurement on the toy faces: 64-pixel views, 7 × 7 patches of 8 pixels.
PRESETS = {"paper": {},
           "laptop": dict(arch="small", vit="tiny", view_size=64, ffl_size=56, patch=8, hidden=512,
                          batch_size=64, lr=0.4, steps=400, crop_min=0.3, queue=1024)}
VITS = {"base": {}, "tiny": dict(  # base: `MaskedAutoencoder` as it stands
    width=128, depth=4, heads=4, decoder_width=64, decoder_depth=2, decoder_heads=4)}
# Supplement B. Rates are per 256 images: 2.0 at 1024; 0.05 and 0.001 at 512.
PROTOCOLS = {"paper": {"linear": dict(epochs=100, batch_size=1024, lr=0.5, weight_decay=0.0),
                       "semi": dict(epochs=100, batch_size=512, lr=0.025, weight_decay=1e-4),
                       "finetune": dict(epochs=100, batch_size=512, lr=0.0005, weight_decay=1e-4)},
             "laptop": {"linear": dict(epochs=0, batch_size=256, lr=0.1, weight_decay=0.0),
                        "semi": dict(epochs=20, batch_size=64, lr=0.025, weight_decay=1e-4),
                        "finetune": dict(epochs=10, batch_size=64, lr=0.0005, weight_decay=1e-4)}}
FREE = {"fresh", "data", "name", "workers", "log_every", "save_every", "compile", "figures",
        "compare", "benchmark"}  # may differ when a run goes on; data: but not its list of pictures
RANGES = {  # of numbers; those that are not here may be anything
    "above 0": (lambda v: v > 0, "batch_size lr view_size ffl_size queue groups "
                                 "patch temperature log_every"),
    "8 or more": (lambda v: v >= 8, "hidden outputs"),  # GFLS divides them by up to 8
    "from 0": (lambda v: v >= 0, "epochs steps save_every momentum weight_decay mask_gradient "
                                 "alpha beta"),
    "above 0 and up to 1": (lambda v: 0 < v <= 1, "crop_min labels"),
    "between 0 and 1": (lambda v: 0 < v < 1, "mask_ratio"),
    "from 0 to 1": (lambda v: 0 <= v <= 1, "tau")}
HERE = Path(__file__).resolve().parent
# AffectNet's colours, as the authors publish them: mean and deviation of the three channels.
MEAN, STD = (0.5795, 0.4522, 0.3957), (0.2769, 0.2473, 0.2412)

class Problem(Exception):
    """Something a user can mend: a sentence that says what, where and what to do."""
    def __init__(self, sentence: str, code: int = 2):
        super().__init__(sentence)
        self.code = code  # that the program ends with

class Parts(dict):
    """Parts that go by a name on the command line. Raises Problem for a name that is not there."""
    def __missing__(self, name: str):
        raise Problem(f"there is no part {name} in this script, only {', '.join(self)}; give these "
                      f"options to the script that adds it.")

def read_orders(argv: list[str] | None = None) -> dict:
    """What the command line says, and no more. Raises Problem."""
    def complain(message: str):  # as a Problem, so that three processes do it once
        raise Problem(f"{message}; `python simfle.py --help` lists the options.")

    parser = argparse.ArgumentParser(allow_abbrev=False, description="SimFLE: self-supervised "
        "facial expression recognition. Defaults in brackets: the paper's pre-training.")
    parser.error = complain
    choices = dict(preset=PRESETS, arch=RESNETS, gfl=GFLS, ffl=(*MASKINGS, "none"), vit=VITS,
                   connection=("distil", "direct"), eval=PROTOCOLS["paper"])
    for f in fields(Settings):
        kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else
                dict(nargs="+") if f.default == () else
                dict(type=type(f.default), choices=choices.get(f.name), metavar=f.name.upper()))
        if f.name == "eval":
            kind |= dict(nargs="?", const="linear")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} [{f.default}]", **kind)
    return vars(parser.parse_args(argv))

def read_settings(orders: dict) -> Settings:
    """The orders, on top of the preset, the protocol and the evaluated run. Raises Problem."""
    if orders.keys() & {"figures", "eval"} and "name" in orders and "data" not in orders:
        orders = orders | {"data": run_settings(orders["name"], needed=True)["data"]}
    data, protocol = orders.get("data", "toy"), orders.get("eval", "")
    name = orders.get("name") or Path(data).resolve().name
    trained = run_settings(name) if protocol or orders.get("figures") else {}
    preset = orders.get("preset") or trained.get("preset") or (
        "laptop" if Path(data).name == "toy" else "paper")
    base = dict(PRESETS[preset])
    if protocol:
        base |= {"steps": 0} | PROTOCOLS[preset][protocol]
        base |= {k: trained[k] for k in ("arch", "view_size", "crop_min") if k in trained}
    if orders.get("gfl", "").startswith("moco") and preset == "paper":
        base["tau"] = 0.999  # over the laptop's 400 steps the target would hardly move
    if "epochs" in orders:
        base["steps"] = 0  # asked for in epochs, a preset's steps do not count
    return checked(Settings(**base | orders | {"preset": preset, "name": name}))

def checked(s: Settings) -> Settings:
    """The same settings. Raises Problem for what cannot work, before anything is loaded."""
    for words, (within, names) in RANGES.items():
        for name in names.split():
            if not within(value := getattr(s, name)):
                raise Problem(f"--{name.replace('_', '-')} must be {words}, not {value}.")
    trains = not (s.eval or s.figures)
    for name, where, there in (
            ("init", "--eval or --figures", not trains), ("oversample", "--eval", s.eval),
            ("labels", "--eval semi", s.eval == "semi"), ("compare", "--figures", s.figures),
            ("sync_bn", "pre-training", trains), ("benchmark", "pre-training", trains)):
        if getattr(s, name) != getattr(Settings, name) and not there:
            raise Problem(f"--{name.replace('_', '-')} is for {where}: give it there only.")
    if not s.epochs and not s.steps and s.eval != "linear" and not s.figures:
        raise Problem("--epochs 0 is for --eval linear; give 1 or more.")
    if s.eval and s.figures:
        raise Problem("--eval and --figures are two commands: give one, then the other.")
    if Path(s.name).name != s.name or s.name == "..":
        raise Problem(f"--name {s.name} must be one folder's name, without / or ..")
    if (s.ffl, s.connection) == ("none", "direct"):
        raise Problem("--connection direct has nothing to connect with --ffl none; leave one out.")
    if s.ffl_size == s.patch and s.ffl != "none":
        raise Problem("--patch must be smaller than --ffl-size: one patch leaves none to guess.")
    return s

def small_resnet(width: int = 32) -> nn.Module:
    """A ResNet for laptops: one block a stage, `width` channels in the first. With its stride of 16
    the map of 56 pixels is 4 × 4; with 32, four numbers would have to draw 49 patches. (ours)"""
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

RESNETS = Parts({"small": small_resnet} | {
    name: functools.partial(torchvision.models.get_model, name)
    for name in torchvision.models.list_models(torchvision.models, include="*resn*")})

def build_model(s: Settings, world=None) -> nn.Module:
    """The model that the settings describe, its weights drawn from the seed. Raises Problem."""
    torch.manual_seed(s.seed)
    backbone = Backbone(RESNETS[s.arch]())
    try:
        gfl = GFLS[s.gfl](s, backbone, world or ALONE)
        if s.ffl == "none":
            return GFLAlone(gfl)
        ffl = FaceMAE(backbone.channels, groups=s.groups, ratio=s.mask_ratio,
                      kappa=s.mask_gradient, image_size=s.ffl_size, patch=s.patch,
                      norm_pix=s.norm_pix, **VITS[s.vit])
    except ValueError as error:
        raise Problem(f"{error}; change --groups, --patch or --ffl-size.") from None
    ffl.masking = MASKINGS[s.ffl](s.groups, s.ffl_size, s.patch, s.mask_ratio)  # or one's own
    if s.connection == "direct":
        return DirectSimFLE(gfl, ffl, s.beta)
    return SimFLE(gfl, ffl, s.hidden, s.outputs, s.alpha, s.beta, s.temperature)

# ================================ Part II: training ================================

# ===== 4.1 Pictures =====
# A loading process decodes a picture, cuts and resizes its two crops and the whole face, and hands
# them over as bytes. Colours, blur and normalisation follow on the whole batch, on its device: in
# Pillow they cost several times the decoding. Randomness is a function, not a state: what happens
# to an image is drawn from (seed, epoch, index), the order of a batch's jitters from (seed, epoch,
# images done). So the number of workers changes nothing, and a run that goes on needs no state.

def stream_of(*key) -> torch.Generator:
    """A generator for this key alone, the same in every process, on every machine. (ours)"""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).hexdigest()
    return torch.Generator().manual_seed(int(digest, 16))

def find_data(name: str) -> Path:
    """The folder that --data means. Raises Problem, with the folders that there are."""
    for folder in (Path(name), HERE / "data" / name):
        if name and folder.is_dir():
            return folder
    there = {p.name for p in (HERE / "data").glob("[!._]*") if p.is_dir()} - {"figures"}
    raise Problem(f"there is no dataset {name}, as a path or in data/, which has "
                  f"{', '.join(sorted(there)) or 'none'}; `python data/prepare.py NAME --src "
                  f"DOWNLOAD` makes the paper's, `python data/toy.py` draws toy faces.")

def colours_of(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels, by which a dataset is normalised: its own where
    data/prepare.py says so (FERPlus), else AffectNet's. (Sec. B.4) Raises Problem."""
    path = folder / "stats.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        stats = json.loads(path.read_bytes()) if path.exists() else {"own_colours": False}
        mean, std = (stats["mean"], stats["std"]) if stats["own_colours"] else (MEAN, STD)
        if len(mean) == len(std) == 3 and min(std) > 0:
            return list(mean), list(std)
    raise Problem(f"{path} does not hold own_colours with mean and std of three channels; make it "
                  f"again with data/prepare.py, or remove it.")

def find_pictures(folder: Path) -> list[str]:
    """All pictures below a folder, at any depth, with any extension Pillow reads, in fixed order;
    hidden files and folders are skipped. Raises Problem if there are none."""
    readable = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent) + os.sep
        folders[:] = [f for f in folders if not f.startswith((".", "__MACOSX"))
                      and not here.startswith(os.path.realpath(here + f) + os.sep)]  # no circles
        found += [os.path.join(parent, f) for f in files
                  if not f.startswith(".") and os.path.splitext(f)[1].lower() in readable]
    if not found:
        raise Problem(f"{folder} holds no pictures; put some there or give another --data.")
    return sorted(found)

def read_picture(path: str) -> Image.Image:
    """A picture of any mode as RGB (departure 12): 16-bit grey is scaled, transparency dropped."""
    with Image.open(path) as picture:
        if picture.mode.startswith("I"):  # 16 bits; Pillow would cut 65,535 off at 255
            picture = picture.convert("I").point(lambda v: v * (1 / 256)).convert("L")
        return picture.convert("RGB")

def throw(picture: Image.Image, crops: int, dice: int, crop_min: float, *key):
    """Boxes (top, left, height, width) of random crops, and dice in [0, 1), from this key alone."""
    with torch.random.fork_rng(devices=[]):  # torchvision's crop draws from the global stream
        torch.default_generator.set_state(stream_of(*key).get_state())
        box = torchvision.transforms.RandomResizedCrop.get_params
        return [box(picture, (crop_min, 1), (3 / 4, 4 / 3)) for _ in range(crops)], torch.rand(dice)

DICE_PER_VIEW = 9  # flip, jitter or not, 4 strengths, grey, blur or not, its width

class Faces(Dataset):
    """What a step needs of one image. faces[epoch, index, weight] -> a dict of tensors. (Sec. 4.1)

    views (2, 3, 224, 224) uint8, random crops; image (3, 112, 112) uint8, the whole picture; dice
    (19,) uniform in [0, 1), for what happens on the device; index (); weight (); label (), where
    there are labels; unreadable (), 1 where the picture could not be read: the next one that can
    takes its place or, as that may have another label, a black one."""
    def __init__(self, paths: list[str], view_size: int, image_size: int, crop_min: float,
                 seed: int, crops: int = 2, dice: int = 19, labels: list[int] | None = None):
        self.paths, self.crop_min, self.seed, self.labels = paths, crop_min, seed, labels
        self.view_size, self.image_size, self.crops, self.dice = view_size, image_size, crops, dice
        self.tries = 64 if labels is None else 1

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Image.Image, bool]:
        """The picture, or what takes its place; and whether it could not be read."""
        for bad in range(self.tries):
            with contextlib.suppress(Exception):  # Pillow raises many kinds for broken files
                return read_picture(self.paths[(index + bad) % len(self)]), bad > 0
        return Image.new("RGB", (8, 8)), True

    def __getitem__(self, key: tuple[int, int, float]) -> dict[str, Tensor]:
        epoch, index, weight = key
        picture, unreadable = self.read(index)
        boxes, dice = throw(picture, self.crops, self.dice, self.crop_min, self.seed, epoch, index)
        item = dict(index=index, weight=weight, unreadable=unreadable)
        if self.labels is not None:
            item["label"] = self.labels[index]
        item = {k: torch.tensor(v) for k, v in item.items()} | {"dice": dice}
        if self.crops:
            item["views"] = torch.stack([TF.pil_to_tensor(TF.resized_crop(
                picture, *box, [self.view_size] * 2)) for box in boxes])
        if self.image_size:  # departure 6: a square, whatever the picture's shape
            item["image"] = TF.pil_to_tensor(TF.resize(picture, [self.image_size] * 2))
        return item

# ===== 4.1 Augmentation =====
# SimCLR's list at strength 1: crop (above), flip with probability ½, with 0.8 a jitter of
# brightness, contrast and saturation by factors from 0.2 to 1.8 and of the hue by up to 0.2 of a
# turn, grey with 0.2, blur with ½. Each function does to a batch x (B, 3, H, W) in [0, 1] what
# torchvision's does to one picture, with a parameter for each image, f or sigma (B,).

def blend(x: Tensor, other: Tensor | float, f: Tensor) -> Tensor:
    """f of x and 1 − f of the other, cut to [0, 1]: at f = 1 x itself, beyond 1 away from other."""
    f = f[:, None, None, None]
    return (f * x + (1 - f) * other).clamp(0, 1)

def adjust_hue(x: Tensor, f: Tensor) -> Tensor:
    """Turns the hue by f of a circle, -0.5 to 0.5. (Sec. 4.1, SimCLR)"""
    value, _ = x.max(dim=1)
    chroma = value - x.min(dim=1).values
    r, g, b = x.unbind(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    # The hue in sixths of a turn, counted from the primary colour that is largest.
    hue = torch.where(value == r, (g - b) / safe,
                      torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * f[:, None, None]
    # Back: each colour is the value less as much of the chroma as its distance on the circle asks.
    k = (torch.stack([hue + 5, hue + 3, hue + 1], dim=1)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)

grey = TF.rgb_to_grayscale  # (B, 3, H, W) -> (B, 1, H, W)
JITTER = (lambda x, f: blend(x, 0.0, f),  # brightness: to or from black
          lambda x, f: blend(x, grey(x).mean(dim=(1, 2, 3), keepdim=True), f),  # contrast
          lambda x, f: blend(x, grey(x), f),  # saturation
          adjust_hue)

def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blurs image b by sigma[b] pixels; 0 leaves it as it is. (Sec. 4.1, SimCLR)

    kernel: taps, odd. A blur of the rows is a matrix K (H × H), mirrored borders and all, so the
    whole is K x Kᵀ: two batched products with one matrix per image, whatever each one's sigma."""
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
    """uint8 or [0, 1] pixels (B, 3, H, W) to mean 0 and deviation 1 over the data. (Sec. B.1)"""
    x = x / 255 if x.dtype == torch.uint8 else x
    mean, std = colours  # plain numbers: a tensor of them would be copied, and waited for
    x = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    return x.contiguous(memory_format=torch.channels_last)

def augment(x: Tensor, dice: Tensor, order: list[int], colours=(MEAN, STD)) -> Tensor:
    """All of SimCLR's list but the crop. (Sec. 4.1)

    x: (B, 3, H, W) uint8. dice: (B, 9) uniform in [0, 1). order: a permutation of 0 to 3, in which
    the jitters come (departure 9: one for the batch). Returns (B, 3, H, W), normalised.

        x = torch.randint(256, (8, 3, 224, 224), dtype=torch.uint8)  # crops, as they were cut
        v1 = augment(x, torch.rand(8, 9), order=torch.randperm(4).tolist())
        v2 = augment(x, torch.rand(8, 9), order=torch.randperm(4).tolist())
    """
    flip, jitter, *strengths, to_grey, blur, width = dice.unbind(dim=1)
    x = x / 255
    x = torch.where((flip < 0.5)[:, None, None, None], x.flip(3), x)
    for which in order:  # by 1 ± 0.8, the hue by ± 0.2; where there is no jitter, by 1 and 0
        hue = JITTER[which] is adjust_hue
        f = (2 * strengths[which] - 1) * (0.2 if hue else 0.8)
        x = JITTER[which](x, torch.where(jitter < 0.8, f, 0.0) + (0 if hue else 1))
    x = torch.where((to_grey < 0.2)[:, None, None, None], grey(x), x)
    # Departure 4: blur with probability ½. At 224 pixels SimCLR's 0.1 to 2, elsewhere the same
    # share of the picture; over a tenth of the picture, made odd: 23 taps at 224.
    size = x.shape[3]
    sigma = torch.where(blur < 0.5, (0.1 + 1.9 * width) * size / 224, 0.0)
    return normalise(gaussian_blur(x, sigma, kernel=size // 10 | 1), colours)

def prepare(batch: dict[str, Tensor], key: tuple,
            colours=(MEAN, STD)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of `Faces`, on its device -> v1, v2, I, u of `SimFLE`. key: (seed, epoch, done)."""
    orders = stream_of(*key)  # drawn for each of the two views
    views, dice = batch["views"], batch["dice"]
    v1, v2 = (augment(views[:, i], dice[:, i * DICE_PER_VIEW:(i + 1) * DICE_PER_VIEW],
                      torch.randperm(4, generator=orders).tolist(), colours) for i in range(2))
    return v1, v2, normalise(batch["image"], colours), dice[:, 2 * DICE_PER_VIEW:]

# ===== 4.1 Order of the images =====

class Batches:
    """Which images each process gets in each step. A batch sampler for DataLoader. (Sec. 4.1)

    An epoch is one permutation, drawn from (seed, epoch), or with `weights` (images,) as many draws
    with replacement. A step takes the next `batch` images, process `rank` its run of batch/world of
    them. What does not fill a batch is dropped; with `partial` it makes a smaller one, filled up by
    repeats of weight 0 until processes share it evenly. A place is (epoch, done): done counts
    images, so that another number of processes can go on. Yields lists of keys of `Faces`."""
    def __init__(self, images: int, batch: int, total: int, seed: int, rank: int = 0,
                 world: int = 1, epoch: int = 0, done: int = 0, partial: bool = False,
                 weights: Tensor | None = None):
        self.images, self.batch, self.total, self.seed = images, batch, total, seed
        self.rank, self.world, self.epoch, self.done = rank, world, epoch, done
        self.partial, self.weights = partial, weights
        self.per_epoch = math.ceil(images / batch) if partial else images // batch

    def step(self, epoch: int, done: int) -> int:
        """How many steps lie before this place."""
        if self.ends(done):  # also where `done` was counted in batches of another size
            epoch, done = epoch + 1, 0
        return epoch * self.per_epoch + done // self.batch

    def ends(self, done: int) -> bool:
        """Whether no step of this epoch is left after `done` images."""
        return done >= self.images if self.partial else done + self.batch > self.images

    def places(self):
        """The (epoch, done) of every step that is left."""
        epoch, done = self.epoch, self.done
        while self.step(epoch, done) < self.total:
            if self.ends(done):
                epoch, done = epoch + 1, 0
            yield epoch, done
            done += self.batch

    def order(self, epoch: int) -> list[int]:
        draw = stream_of(self.seed, epoch)
        if self.weights is None:
            return torch.randperm(self.images, generator=draw).tolist()
        return torch.multinomial(self.weights, self.images, True, generator=draw).tolist()

    def __iter__(self):
        drawn = None
        for epoch, done in self.places():
            if drawn != epoch:
                order, drawn = self.order(epoch), epoch
            # Drawn with replacement, an image may come twice: its place tells the two apart.
            step = [(epoch if self.weights is None else (epoch, place), index, 1.0) for place, index
                    in enumerate(order[done:done + self.batch], done)]
            share = math.ceil(len(step) / self.world)
            step += [(epoch, order[done], 0.0)] * (share * self.world - len(step))
            yield step[self.rank * share:(self.rank + 1) * share]

# ===== 4.1 Processes =====

@dataclass
class World:
    """All that the rest of the file knows of processes: this one's rank, how many, its device."""
    rank: int
    size: int
    device: torch.device
    local_size: int = 1  # processes on this machine

ALONE = World(0, 1, torch.device("cpu"))

@contextlib.contextmanager
def processes():
    """Joins the group that torchrun started, or is one process without a group. Raises Problem."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    size, local_size = (int(os.environ.get(n, 1)) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    cuda = torch.cuda.is_available()
    if cuda and local_size > torch.cuda.device_count():
        raise Problem(f"{local_size} processes were started on a machine with "
                      f"{torch.cuda.device_count()} GPUs; start no more with --nproc_per_node.")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # bf16 is fast enough; what is left in fp32 is there for its precision, so no TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    world = World(rank, size, device, local_size)
    if "RANK" not in os.environ:
        yield world
        return
    # After `torchrun --max-restarts` the store still holds the addresses of those that have died.
    store, *_ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                            device_id=device if cuda else None)
    yield world
    # With PyTorch 2.6 and 2.7, gloo and Python wait for each other if nobody holds the last tensor.
    dist.all_reduce(held := torch.zeros(1, device=device))
    dist.destroy_process_group()  # not in a `finally`: after a failure this would wait for ever

def gather(world: World, x: Tensor) -> Tensor:
    """(B, ...) of each process -> (W·B, ...), by rank; x gets W times the gradient of its rows,
    as if each process sent back its own, where all compute the same loss of the whole."""
    if world.size == 1:
        return x
    own = x.detach().contiguous()  # NCCL sends memory as it lies
    parts = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(parts, own)
    parts[world.rank] = own + world.size * (x - own)
    return torch.cat(parts)

def agree(world: World, make):
    """What `make()` returns in process 0, in all; its Problem or OSError is a Problem in all."""
    result = [None, None]
    if world.rank == 0:
        try:
            result[0] = make()
        except Problem as problem:
            result[1] = str(problem)
        except OSError as error:
            result[1] = f"{error}; give this program a folder that it may write to."
    if world.size > 1:
        dist.broadcast_object_list(result, device=world.device)
    if result[1]:
        raise Problem(result[1])
    return result[0]

# ===== 4.1 Checkpoints =====

def write_whole(path: Path, write) -> None:
    """Lets `write(file)` fill a temporary file, which takes path's place once it is safe on disk:
    a crash leaves the old file or the new one, never half of one. Raises Problem."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into the latter
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise Problem(f"{path} could not be written ({error}); what stood there before is intact: "
                      f"make room or mend the disk, and start the same command again.") from None

def keep_others_away(path: Path):
    """A lock that holds as long as its file is open and this process lives. Raises Problem."""
    file = open(path, "a")
    try:  # loading processes do not inherit it: SIGKILL ends it. (Windows has none of the kind.)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB) if fcntl else None
    except (BlockingIOError, PermissionError):
        raise Problem(f"another run is at work on {path.with_suffix('.pt')}; let it end, or give "
                      f"this one another name with --name.") from None
    return file

def load_file(path: Path) -> dict:
    """A file of torch.save, without running code that it may carry. Raises Problem."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            return content
        reason = "no dict"
    except Exception as error:  # zip, pickle, unicode, end of file: torch raises many kinds
        reason = re.split(r"\n|\. ", str(error).strip())[0]
    raise Problem(f"{path} is not a checkpoint that can be loaded ({reason}); make it again, or "
                  f"move it away.")

def load_state(path: Path, saved: dict, model: nn.Module, optimizer=None) -> None:
    """Fills model and optimiser from a checkpoint. Raises Problem if they do not fit."""
    try:
        model.load_state_dict(saved["model"])
        if optimizer is not None:
            optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise Problem(f"{path} does not fit this model ({' '.join(str(error).split())[:300]}); "
                      f"move it away or start over with --fresh.") from None

# ===== 4.1 What is watched =====

def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, over the last dimension; 0 where one of them is constant. (ours)"""
    x, y = x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)

@torch.no_grad()
def measure_refinement(model: SimFLE, images: Tensor, colours=(MEAN, STD), rounds: int = 4) -> dict:
    """Does the masking keep what is hard to reconstruct? (Sec. 3.2, Fig. 3)

    images: (N, 3, 112, 112) uint8, held out. `error_map`: the error of every patch where a random
    mask hides it; `keep_map`: the share of the groups that keep it; (49,) each, means over the
    images. `positions` correlates these maps, `within_image` each image's own two, on average. With
    random masking, `keep_map` is what the scores would keep."""
    device, masking = next(model.parameters()).device, model.ffl.masking
    draw, was_training = stream_of("measure"), model.training
    model.eval()
    errors, keeps = [], []
    for chunk in images.split(64):
        I = normalise(chunk.to(device), colours)
        C = model.ffl.grouping(model.backbone(I)[0])
        keeps.append(sum(1 - mask_lowest(masking.scores(C, group), masking.ratio)[1]
                         for group in torch.arange(masking.groups, device=device)
                         [:, None].expand(-1, len(I))) / masking.groups)
        turn = torch.rand(keeps[-1].shape, generator=draw).argsort(dim=1).to(device)
        error = times = shift = 0
        for _ in range(max(rounds, math.ceil(1 / masking.ratio))):  # until each has been masked:
            keep, mask = mask_lowest(((turn + shift) % turn.shape[1]).float(), masking.ratio)
            error, times = error + model.ffl.mae(I, keep)[0] * mask, times + mask
            shift += keep.shape[1]  # the next few of one random order are kept
        errors.append(error / times.clamp(min=1))
    model.train(was_training)
    error, kept = torch.cat(errors), torch.cat(keeps)
    return dict(positions=correlation(error.mean(0), kept.mean(0)).item(),
                within_image=correlation(error, kept).mean().item(),
                error_map=[round(v, 4) for v in error.mean(0).tolist()],
                keep_map=[round(v, 4) for v in kept.mean(0).tolist()])

class Log:
    """A status line for people, which rewrites itself on a terminal and elsewhere comes every 5 s,
    and log.jsonl with one JSON object a line. Process 0 alone shows and writes."""
    def __init__(self, path: Path, total: int, active: bool):
        self.path, self.total, self.active, self.terminal = path, total, active, sys.stdout.isatty()
        self.sums, self.count = {}, 0  # of the values since the last line of log.jsonl

    def start(self, step: int) -> None:
        """Clocks start here: what came before counts for no rate."""
        self.first_step, self.first_time, self.last = step, time.perf_counter(), 0.0
        self.waited = self.images = 0

    def show(self, step: int, text: str) -> None:
        """`text` with speed and time left, after `step` steps, if it is time for it."""
        now, ends = time.perf_counter(), step in (self.first_step + 1, self.total)
        if not self.active or not ends and now - self.last < (0.5 if self.terminal else 5.0):
            return
        self.last, spent = now, max(now - self.first_time, 1e-9)
        left = timedelta(seconds=round(spent / (step - self.first_step) * (self.total - step)))
        line = (f"step {step}/{self.total}  {text}  {self.images / spent:.0f} images/s  "
                f"waiting {self.waited / spent:.0%}  left {left}")
        if self.terminal:
            line = "\r\033[K" + line[:max(1, os.get_terminal_size().columns - 1)]
        print(line, end="" if self.terminal and step < self.total else "\n", flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.active:
            print(("\r\033[K" if self.terminal else "") + text, flush=True)

    def add(self, step: int, epoch: int, rate: float, values: dict[str, float], due: bool) -> None:
        """Adds a step's values; where a line is due, the means since the last one are written."""
        self.sums = {k: self.sums.get(k, 0.0) + v for k, v in values.items()}
        self.count += 1
        if due:
            means = {k: float(f"{v / self.count:.6g}") for k, v in self.sums.items()}
            self.write(dict(step=step, epoch=epoch + 1, rate=float(f"{rate:.6g}")) | means)
            self.sums, self.count = {}, 0

    def write(self, record: dict) -> None:
        """Adds a line to log.jsonl. Raises Problem where the disk does."""
        try:
            if self.active:
                with open(self.path, "a") as file:
                    file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise Problem(f"{self.path} could not be written ({error}); make room, and start the "
                          f"same command again: it goes on.") from None

    def restore(self, bytes: int, sums: dict[str, float], count: int) -> None:
        """To where a checkpoint was written: what came after it is cut off."""
        self.path.touch()
        os.truncate(self.path, min(bytes, self.path.stat().st_size))
        self.sums, self.count = sums, count

# ===== 4.1 The loop =====

def leave_signals(worker: int) -> None:
    """SIGTERM and Ctrl-C reach loading processes too; their parent handles them, and ends both."""
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, signal.SIG_IGN)

class Run:
    """The loop over steps, with its checkpoints, log and status line. (Sec. 4.1)

    Pre-training and evaluation are two of these, with a model, pictures and `losses` of their own:
    the scalars of a step, "loss" with gradient. trained: the part of the model that learns. suffix:
    tells files in one folder apart. more: what else must be equal for a run to go on."""
    shown: tuple[str, ...]  # what of a step's values the status line shows
    ignored = frozenset()  # settings that mean nothing to this kind of run
    partial = False  # whether an epoch's last, smaller batch is used
    told_to_stop = False

    def __init__(self, s: Settings, world: World, faces: Faces, model: nn.Module,
                 trained: nn.Module, suffix: str = "", weights: Tensor | None = None, **more):
        self.s, self.world, self.faces, self.trained = s, world, faces, trained
        self.warned, self.data, self.folder = set(), find_data(s.data), Path("runs", s.name)
        self.checkpoint = self.folder / f"checkpoint{suffix}.pt"
        self.colours = agree(world, lambda: colours_of(self.data))
        # An epoch permutes the list of pictures: of another list, other images would be taken.
        listed = stream_of(*(p[len(str(self.data)):] for p in faces.paths)).initial_seed()
        if len(gather(world, torch.tensor([listed], device=world.device)).unique()) > 1:
            raise Problem(f"{self.data} does not hold the same pictures for all processes; copy it "
                          f"whole to every machine.")
        self.settings = {k: v for k, v in asdict(s).items() if k not in self.ignored} | dict(
            pictures=len(faces), listed=listed, colours=list(self.colours), **more)
        # Departure 10: ⌊256/W⌋ images a process, 255 on three. The rate follows what is true.
        self.share = s.batch_size // world.size
        batch = self.share * world.size
        if self.share < 2:
            raise Problem(f"--batch-size {s.batch_size} leaves fewer than 2 images to each of "
                          f"{world.size} processes, and BatchNorm needs 2; raise it.")
        if len(faces) < batch and not self.partial:
            raise Problem(f"{self.data} has {len(faces)} pictures to train on, fewer than a batch "
                          f"of {batch}; lower --batch-size or add pictures.")
        self.rate = s.lr * batch / 256
        self.model = model.to(world.device, memory_format=torch.channels_last)
        fused = world.device.type == "cuda"
        self.optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad],
                                         lr=self.rate, momentum=s.momentum,
                                         weight_decay=s.weight_decay, fused=fused)
        self.batches = Batches(len(faces), batch, 0, s.seed, world.rank, world.size,
                               partial=self.partial, weights=weights)
        total = self.batches.total = s.steps or s.epochs * self.batches.per_epoch
        self.log = Log(self.folder / f"log{suffix}.jsonl", total, world.rank == 0)
        saved = agree(world, self.find_checkpoint)  # process 0 alone sees the disk
        if saved:
            load_state(self.checkpoint, saved, self.model, self.optimizer)
            self.batches.epoch, self.batches.done = saved["place"]
            for group in self.optimizer.param_groups:  # whatever the checkpoint's machine was
                group["fused"] = fused
        agree(world, lambda: self.start_log(saved))
        self.wrapped = trained
        if world.size > 1:
            warnings.filterwarnings("ignore", ".*broadcast_buffers")  # newer PyTorch renames it
            self.wrapped = DistributedDataParallel(trained, gradient_as_bucket_view=True,
                                                   broadcast_buffers=False)  # departure 11: local
        if s.compile:
            self.wrapped = torch.compile(self.wrapped)

    def find_checkpoint(self) -> dict | None:
        """The checkpoint to go on from, if there is one. Raises Problem."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = keep_others_away(self.checkpoint.with_suffix(".lock"))
        if self.s.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self.checkpoint.unlink(missing_ok=True)  # at once: beside a new log it would deceive
            if not self.s.eval:
                (self.folder / "backbone.pt").unlink(missing_ok=True)
        if not self.checkpoint.exists():
            return None
        saved, now = load_file(self.checkpoint), self.settings
        if not saved.keys() >= {"settings", "model", "optimizer", "place", "share", "log"}:
            raise Problem(f"{self.checkpoint} is no checkpoint of this program; move it away or "
                          f"start over with --fresh.")
        old = saved["settings"]
        differ = [f"{k} was {old.get(k)!r} and is now {now.get(k)!r}"
                  for k in sorted(old.keys() | now) if k not in FREE and old.get(k) != now.get(k)]
        if differ:
            raise Problem(f"{self.checkpoint} comes from other settings ({'; '.join(differ)}); "
                          f"repeat them, {'' if self.s.eval else 'give this run another --name, '}"
                          f"or start over with --fresh.")
        return saved

    def start_log(self, saved: dict | None) -> None:
        """Begins the log, or goes on with it. Raises Problem."""
        self.log.restore(*saved["log"] if saved else (0, {}, 0))
        if not saved:
            self.log.write({"settings": self.settings})
        elif saved["share"] != self.share:
            print(f"simfle: each process now sees {self.share} images of a step, where it saw "
                  f"{saved['share']}; BatchNorm's statistics are of that many.", flush=True)

    def save(self, place: tuple[int, int]) -> None:
        """Writes the checkpoint: process 0 alone. Raises Problem."""
        self.log.path.touch()  # it may have been removed
        log = self.log.path.stat().st_size, self.log.sums, self.log.count
        state = dict(settings=self.settings, place=list(place), model=self.model.state_dict(),
                     optimizer=self.optimizer.state_dict(), share=self.share, log=log)
        write_whole(self.checkpoint, lambda file: torch.save(state, file))

    def rehearse(self, batch: dict[str, Tensor], place: tuple[int, int]) -> None:
        """Throws the first gradients away, and takes back what their forward pass changed. After
        its first backward pass DDP lays its buckets anew; with three processes this changes the
        order of sums, so that a run that goes on would not be bit-equal. (On GPUs it never is.)"""
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        self.backward(batch, place)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def backward(self, batch: dict[str, Tensor], place: tuple[int, int]) -> dict[str, Tensor]:
        """The gradients of a step, and its scalars."""
        batch = {k: v.to(self.world.device, non_blocking=True) for k, v in batch.items()}
        with self.mixed_precision():  # departure 14
            parts = self.losses(batch, place)
        parts["loss"].backward()
        return parts | {"unreadable": batch["unreadable"].sum() * self.world.size}

    def schedule(self, progress: float) -> float:
        """The share of the rate after this share of the way, by a cosine. Departure 5."""
        return 0.5 * (1 + math.cos(math.pi * progress))

    def epoch_ends(self, epoch: int, step: int) -> None:
        """Before an epoch's checkpoint, and the last one's: process 0 alone."""

    def mixed_precision(self):
        """bf16 where it is fast; Part I takes itself out of it where fp32 is needed."""
        kind = self.world.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")

    def cores(self) -> int:
        """The processor cores that this process may use."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def loader(self, dataset: Dataset, batches) -> DataLoader:
        workers = (self.s.workers if self.s.workers >= 0
                   else max(1, self.cores() // self.world.local_size))
        return DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                          pin_memory=self.world.device.type == "cuda",
                          prefetch_factor=4 if workers else None, worker_init_fn=leave_signals)

    def step(self, batch: dict[str, Tensor], place: tuple[int, int], rate: float) -> dict:
        """One step. Returns what `losses` does as numbers, means over all processes; `gradient`,
        its norm; and as sums `unreadable` and `stop`, the processes told to stop. Raises Problem
        for what is not finite, in every process and before any weight moves."""
        parts = self.backward(batch, place)
        gradients = [p.grad for p in self.trained.parameters() if p.grad is not None]
        parts["gradient"] = torch.stack(torch._foreach_norm(gradients)).norm()
        parts["stop"] = torch.full_like(parts["gradient"], self.told_to_stop * self.world.size)
        # The one place where the host waits for the device; the sum spreads a NaN to all processes.
        values = torch.stack([v.detach().float() for v in parts.values()])
        if self.world.size > 1:
            dist.all_reduce(values)
        values = dict(zip(parts, (values / self.world.size).tolist()))
        if not math.isfinite(values["loss"] + values["gradient"]):
            shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items()
                              if k in (*self.shown, "gradient"))
            raise Problem(f"loss or gradient not finite in step {self.batches.step(*place) + 1}, "
                          f"epoch {place[0] + 1} ({shown}): it was not taken, and the last "
                          f"checkpoint is good; a lower --lr may help.")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        getattr(self.model, "update", lambda: None)()  # of the target; a classifier has none
        return values

    def check_pictures(self, faces: Faces, batch: dict[str, Tensor], unreadable: float) -> None:
        """Names this batch's unreadable pictures, each once. Raises Problem for too many in an
        epoch: more than one in a hundred where another takes the place, any where none does."""
        for path in {faces.paths[i] for i in batch["index"][batch["unreadable"] > 0]} - self.warned:
            self.warned.add(path)
            print(f"\nsimfle: {path} cannot be read.", file=sys.stderr, flush=True)
        if unreadable > (max(1, len(faces) / 100) if faces.tries > 1 else 0):
            raise Problem(f"{unreadable:.0f} pictures of {self.data} cannot be read, too many to "
                          f"go on; mend or remove those that are named above.")

    def go(self) -> None:
        """From where the run stands to its end. Raises Problem."""
        # A cluster takes the machine back by SIGTERM: all processes end after the same step.
        before_us = signal.signal(signal.SIGTERM, lambda *_: setattr(Run, "told_to_stop", True))
        try:
            self.take_steps()
        finally:
            signal.signal(signal.SIGTERM, before_us)
            if self.world.rank == 0:
                self.lock.close()

    def take_steps(self) -> None:
        batches, log, world = self.batches, self.log, self.world
        step, unreadable = batches.step(batches.epoch, batches.done), 0.0
        log.say(f"{self.checkpoint}: {len(self.faces):,} pictures of {self.data}, "
                f"{batches.total:,} steps of {batches.batch} images ({world.size} × {self.share} "
                f"on {world.device.type}), rate {self.rate:g}" + (
                    "; complete, --fresh would start over" if step >= batches.total else
                    f"; goes on after step {step:,}" if step else ""))
        loading = iter(self.loader(self.faces, batches))
        self.wrapped.train(self.model.training)
        log.start(step)
        for epoch, done in batches.places():
            step, before = batches.step(epoch, done), time.perf_counter()
            batch = next(loading)
            log.waited += time.perf_counter() - before
            if world.size > 1 and step == log.first_step:
                self.rehearse(batch, (epoch, done))
            rate = self.rate * self.schedule(step / batches.total)
            values = self.step(batch, (epoch, done), rate)
            step, log.images = step + 1, log.images + len(batch["index"]) * world.size
            unreadable = values.pop("unreadable") + (unreadable if done else 0)
            self.check_pictures(self.faces, batch, unreadable)
            stop, last = values.pop("stop") > 0, step == batches.total
            log.add(step, epoch, rate, values, step % self.s.log_every == 0 or last)
            log.show(step, f"epoch {epoch + 1}  rate {rate:.4f}  " + "  ".join(
                f"{k} {values[k]:.3f}" for k in self.shown if k in values))
            done += batches.batch
            ends = batches.ends(done) or last
            if ends and world.rank == 0:
                self.epoch_ends(epoch, step)
            due = self.s.save_every and step % self.s.save_every == 0
            if world.rank == 0 and (ends or stop or due):
                self.save((epoch, done))
            if stop and not last:
                if world.size > 1:
                    dist.barrier()  # torchrun kills process 0, still saving, once others have ended
                raise Problem(f"stopped after step {step:,} of {batches.total:,}; the same command "
                              f"(without --fresh) goes on from there.", code=143)

# ===== 4.1 Pre-training =====

def split_pictures(s: Settings) -> tuple[list[str], list[str]]:
    """The pictures to train on (those in train/, where there is one), and a few set aside for
    `measure_refinement`: one in twenty, at most 256 (departure 13). Raises Problem."""
    folder = find_data(s.data)
    paths = find_pictures(folder / "train" if (folder / "train").is_dir() else folder)
    order = torch.randperm(len(paths), generator=stream_of(s.seed, "aside")).tolist()
    aside = set(order[:min(256, len(paths) // 20)])
    return ([p for i, p in enumerate(paths) if i not in aside], [paths[i] for i in sorted(aside)])

class Pretraining(Run):
    """SimFLE on pictures without labels. (Sec. 4.1)"""
    shown = ("L_s", "L_r", "L_d", "L_g", "spread")

    def __init__(self, s: Settings, world: World):
        paths, self.aside = split_pictures(s)
        model = build_model(s, world)
        if s.sync_bn:
            if world.device.type != "cuda":
                raise Problem("--sync-bn works on GPUs only; leave it out.")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        dice = 2 * DICE_PER_VIEW + (model.ffl.masking.draws if model.ffl is not None else 0)
        faces = Faces(paths, s.view_size, s.ffl_size, s.crop_min, s.seed, dice=dice)
        super().__init__(s, world, faces, model, trained=model)

    def losses(self, batch: dict[str, Tensor], place: tuple[int, int]) -> dict[str, Tensor]:
        with torch.no_grad(), full_precision(batch["dice"]):
            inputs = prepare(batch, (self.s.seed, *place), self.colours)
        return self.wrapped(*inputs)

    def epoch_ends(self, epoch: int, step: int) -> None:
        if not self.aside or self.model.ffl is None:
            return
        faces = Faces(self.aside, 0, self.s.ffl_size, 1, 0, crops=0)
        images = torch.stack([faces[0, i, 1.0]["image"] for i in range(len(faces))])
        measured = measure_refinement(self.model, images, self.colours)
        self.log.write(dict(step=step, epoch=epoch + 1, refinement=measured))
        self.log.say(f"epoch {epoch + 1} done; error and keep frequency correlate by "
                     f"{measured['positions']:+.2f} over positions, "
                     f"{measured['within_image']:+.2f} within an image")

    def save(self, place: tuple[int, int]) -> None:
        backbone = {k: v.cpu() for k, v in self.model.backbone.resnet.state_dict().items()}
        write_whole(self.folder / "backbone.pt", lambda file: torch.save(backbone, file))
        super().save(place)  # last: where this is complete, so is the other

# ================================ Part III: evaluation ================================
# Supplement B. Only the backbone is left, with a linear layer on top: a torchvision ResNet.
#
#     linear      B.1        trains the layer alone; backbone and BatchNorm statistics are frozen
#     semi        B.2        trains everything, on a share of the labels
#     finetune    B.3, B.4   trains everything from the linear result, on its data or on other data

def labelled_pictures(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """The classes (a split's folders, sorted), all pictures, their labels. Raises Problem."""
    if not folder.is_dir():
        raise Problem(f"{folder} is missing; an evaluation reads train/CLASS/ and val/CLASS/.")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._")
    if len(classes) < 2:
        raise Problem(f"{folder} needs two class folders or more, not {len(classes)}.")
    found = [find_pictures(folder / name) for name in classes]
    return classes, sum(found, []), [label for label, one in enumerate(found) for _ in one]

def share_of_labels(labels: list[int], share: float, seed: int) -> list[int]:
    """The images that keep their labels: the same share of every class, at least one. (B.2)"""
    chosen = []
    for label in set(labels):
        mine = [i for i, one in enumerate(labels) if one == label]
        order = torch.randperm(len(mine), generator=stream_of(seed, "labels", label)).tolist()
        chosen += [mine[i] for i in order[:max(1, round(share * len(mine)))]]
    return sorted(chosen)

class Head(nn.Linear):
    """A linear layer in fp32, whatever comes before it: bf16 would make logits equal. (ours)

    Its weights start at N(0, 0.01), its bias at 0, as the authors' do."""
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))

def run_settings(name: str, needed: bool = False) -> dict:
    """A run's settings and `data_name`; {} where there is no such run. Raises Problem if needed."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(Path("runs", name, "log.jsonl")) as log:
            settings = json.loads(log.readline())["settings"]
        return settings | {"data_name": Path(settings["data"]).resolve().name}
    if needed:
        there = ", ".join(sorted(p.parent.name for p in Path("runs").glob("*/log.jsonl")))
        raise Problem(f"there is no run {name}; runs/ has {there or 'none'}: choose one with "
                      f"--name, or take an untrained net of --data NAME with --init random.")
    return {}

def with_digest(path: Path) -> str:
    """A file's path and the beginning of its SHA-256."""
    return f"{path} ({hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"

def starting_weights(s: Settings, net: nn.Module, classes: list[str]) -> tuple[str, dict]:
    """Where the weights come from, and the state of `net` with them. A saved head is matched by
    class names; without one, `net` keeps its random head. (Sec. B) Raises Problem."""
    run, tune, origin, saved = run_settings(s.name), s.eval == "finetune", s.init, net.state_dict()
    if s.init == "imagenet":
        try:
            saved = torchvision.models.get_model(s.arch, weights="IMAGENET1K_V1").state_dict()
        except Exception as error:  # an unknown net, no network, no space
            raise Problem(f"no ImageNet weights for --arch {s.arch} could be had ({error}); give "
                          f"another, or put them into torch's hub folder.") from None
    elif s.init != "random":
        linear = f"linear-{run.get('data_name', s.name)}.pt"
        own = Path("runs", s.name, linear if tune else "backbone.pt")
        path, backbone = Path(s.init or own), own.with_name("backbone.pt")
        if not path.exists():
            raise Problem(f"{path} is missing, from which this starts; " + (
                "check --init, or make it by --eval." if s.init else f"give an --init, or make it: "
                f"`python simfle.py --data {run.get('data', s.data)} --name {s.name}"
                f"{' --eval' * tune}`."))
        saved, origin = load_file(path), with_digest(path)
        newer = tune and not s.init and backbone.exists()
        if newer and saved.get("start") != with_digest(backbone):
            raise Problem(f"{path} is of an older {backbone}; repeat it with --eval --fresh.")
    state, head = saved.get("model", saved), {f"fc.{k}": v for k, v in net.fc.state_dict().items()}
    if "classes" in saved:
        if sorted(saved["classes"]) != sorted(classes):
            raise Problem(f"{origin} knows {', '.join(saved['classes'])}, but {s.data} has "
                          f"{', '.join(classes)}; name the classes alike, or give another --init.")
        head = {k: state[k][[saved["classes"].index(name) for name in classes]] for k in head}
    elif tune:
        raise Problem(f"{origin} has no head to fine-tune; make one with --eval, or use --eval "
                      f"semi --labels 1.0.")
    try:
        net.load_state_dict(state | head)
    except RuntimeError as error:
        raise Problem(f"{origin} is no {s.arch} ({' '.join(str(error).split())[:150]}); give a "
                      f"backbone.pt or classifier, and the --arch it was trained with.") from None
    return origin, net.state_dict()

@torch.enable_grad()
def converged_head(x: Tensor, y: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, float]:
    """Multinomial logistic regression on frozen features, until its gradient is small. (ours)

    What it finds does not depend on a rate or a number of epochs. Features are standardised; L-BFGS
    minimises mean cross-entropy + λ/2 ‖W‖², without the bias in ‖W‖, until no entry of the gradient
    is above 1e-5, or for 5,000 iterations. λ falls from 10 to 1e-4, or until the cross-entropy on a
    fifth of the images rises, the same fifth in every call; then all of them are fitted.

    x: (N, c′). y: (N,) labels. mass: (classes,) weight of an image of each class. Returns weights
    (classes, c′) and bias (classes,), float64, for features as they are; and λ. Raises Problem."""
    x, mass = x.double(), mass.double()
    if not x.isfinite().all():
        raise Problem("the backbone's features are not finite; give one whose training went well.")
    mean, std = x.mean(dim=0), x.std(dim=0)
    std = std.clamp(min=1e-4 * std.mean().item() + 1e-12)  # of a feature that is dead
    x = F.pad((x - mean) / std, (0, 1), value=1.0)  # the last column of W is the bias

    def loss(W: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x @ W.T, y, mass)

    def fit(x: Tensor, y: Tensor, strength: float, start: Tensor) -> Tensor:
        W = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([W], max_iter=5000, tolerance_grad=1e-5, tolerance_change=0,
                                      history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(W, x, y) + strength / 2 * W[:, :-1].square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        return W.detach()

    order = torch.randperm(len(x), generator=stream_of("held out")).to(x.device)
    held, rest = order[:max(1, len(x) // 5)], order[max(1, len(x) // 5):]
    x_rest, y_rest = x[rest], y[rest]
    W, least = x.new_zeros(len(mass), x.shape[1]), math.inf
    for tried in (10, 3, 1, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4):
        W = fit(x_rest, y_rest, tried, W)  # from where the stronger penalty ended
        if (now := loss(W, x[held], y[held]).item()) > least:
            break
        strength, least, best = tried, now, W
    W = fit(x, y, strength, best)
    return W[:, :-1] / std, W[:, -1] - W[:, :-1] @ (mean / std), strength

class Evaluation(Run):
    """One protocol on one dataset: leaves a classifier, PROTOCOL-DATA.pt, and its accuracy,
    eval-PROTOCOL-DATA.json, in the run's folder. (Sec. 4.2, B)"""
    shown, partial = ("loss", "accuracy"), True
    ignored = frozenset(
        "ffl_size hidden outputs gfl ffl connection queue tau groups mask_ratio "
        "mask_gradient patch vit norm_pix alpha beta temperature sync_bn".split())

    def __init__(self, s: Settings, world: World):
        folder, self.frozen = find_data(s.data), s.eval == "linear"
        self.classes, paths, labels = labelled_pictures(folder / "train")
        val_classes, *self.val = labelled_pictures(folder / "val")
        if val_classes != self.classes:
            raise Problem(f"{folder}/train has the classes {', '.join(self.classes)}, but val has "
                          f"{', '.join(val_classes)}; both need the same.")
        if s.eval == "semi":
            chosen = share_of_labels(labels, s.labels, s.seed)
            paths, labels = [paths[i] for i in chosen], [labels[i] for i in chosen]
        mass = 1 / torch.bincount(torch.tensor(labels)).double()  # Table 2: every class alike
        self.mass = mass if s.oversample else torch.ones_like(mass)
        torch.manual_seed(s.seed)
        net = RESNETS[s.arch]()
        net.fc = Head(net.fc.in_features, len(self.classes))
        origin, state = agree(world, lambda: starting_weights(s, net, self.classes))
        net.load_state_dict(state)
        net.train(not self.frozen)
        self.tag = "-".join(filter(None, (
            s.eval, s.eval == "semi" and f"{s.labels:g}", Path(s.data).resolve().name,
            Path(s.init).stem, s.oversample and "oversample")))
        faces = Faces(paths, s.view_size, 0, s.crop_min, s.seed, crops=1, dice=1, labels=labels)
        super().__init__(s, world, faces, net, trained=net.fc if self.frozen else net,
                         suffix="-" + self.tag, weights=mass[labels] if s.oversample else None,
                         start=origin)
        self.before = {k: v.clone() for k, v in net.state_dict().items()
                       if self.frozen and k[:3] != "fc."}

    def predict(self, wrapped: nn.Module, x: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, classes)."""
        return wrapped(self.features(x) if self.frozen else normalise(x, self.colours))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, c′), what the frozen backbone makes of it."""
        return feature_map(self.model, normalise(x, self.colours)).mean(dim=(2, 3))

    def losses(self, batch: dict[str, Tensor], place: tuple[int, int]) -> dict[str, Tensor]:
        label, weight, x = batch["label"], batch["weight"], batch["views"][:, 0]
        x = torch.where((batch["dice"] > 0.5)[:, :, None, None], x.flip(3), x)
        logits = self.predict(self.wrapped, x)
        # The mean count over processes: so DDP's mean of gradients is that of the whole batch.
        count = min(self.batches.batch, len(self.faces) - place[1]) / self.world.size
        loss = (weight * F.cross_entropy(logits, label, reduction="none")).sum() / count
        return {"loss": loss, "accuracy": (weight * (logits.argmax(dim=1) == label)).sum() / count}

    def schedule(self, progress: float) -> float:
        return 1.0 if self.frozen else super().schedule(progress)

    def epoch_ends(self, epoch: int, step: int) -> None:
        now = self.model.state_dict()  # B.1's trap: statistics may not have moved either
        moved = [k for k, v in self.before.items() if not torch.equal(v, now[k])]
        assert not moved, f"a frozen backbone has changed: {moved[:3]}"

    def whole_pictures(self, paths: list[str], labels: list[int], mine: list):
        """Batches of whole pictures on this process's device: `mine` are keys of `Faces`."""
        faces = Faces(paths, 0, self.s.view_size, 1, 0, crops=0, labels=labels)
        size = min(256, self.s.batch_size)
        for batch in self.loader(faces, [mine[i:i + size] for i in range(0, len(mine), size)]):
            self.check_pictures(faces, batch, 0)
            yield {k: v.to(self.world.device) for k, v in batch.items()}

    def take_steps(self) -> None:
        super().take_steps() if self.batches.total else self.fit_head()

    @torch.no_grad()
    def fit_head(self) -> None:
        """In place of the loop: the head by `converged_head`, in process 0, for all."""
        paths, labels = self.faces.paths, self.faces.labels

        def fit() -> tuple[Tensor, Tensor]:
            self.log.say(f"{self.folder}: fits a linear head to {len(paths):,} pictures")
            found = []
            mine = [(0, i, 1.0) for i in range(len(paths))]
            for batch in self.whole_pictures(paths, labels, mine):
                if batch["unreadable"].any():
                    raise Problem(f"a picture of {self.data} cannot be read; mend or remove it.")
                with self.mixed_precision():
                    found.append(self.features(batch["image"]).float())
            y = torch.tensor(labels, device=self.world.device)
            W, b, _ = converged_head(torch.cat(found), y, self.mass.to(y.device))
            return W.cpu(), b.cpu()

        W, b = agree(self.world, fit)
        self.trained.weight.copy_(W)
        self.trained.bias.copy_(b)

    @torch.no_grad()
    def confusion(self) -> Tensor:
        """(classes, classes): how many test images of class i (row) were taken for class j. Each
        counts once, whatever the number of processes. Raises Problem."""
        world, K, paths = self.world, len(self.classes), self.val[0]
        # Every W-th image is this process's; where there is none, one that weighs nothing.
        mine = [(0, i, 1.0) for i in range(world.rank, len(paths), world.size)] or [(0, 0, 0.0)]
        counts = torch.zeros(K * K + 1, device=world.device)  # and how many cannot be read
        if world.size > 1:  # one network is tested, the one that is saved: process 0's statistics
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.model.eval()
        for batch in self.whole_pictures(*self.val, mine):
            with self.mixed_precision():
                guess = self.predict(self.trained, batch["image"]).argmax(dim=1)
            pair = (batch["label"] * K + guess).masked_fill(batch["unreadable"], K * K)
            counts += torch.bincount(pair, batch["weight"], K * K + 1)
        if world.size > 1:
            dist.all_reduce(counts)
        if counts[-1]:
            raise Problem(f"{counts[-1].item():.0f} pictures of {self.data} cannot be read, too "
                          f"many to go on; mend or remove those that are named above.")
        return counts[:-1].long().cpu().reshape(K, K)

    def go(self) -> dict:
        """Trains, tests the last epoch's weights, writes the files and tells. Raises Problem."""
        super().go()
        s, (mean, std), path = self.s, self.colours, self.folder / f"{self.tag}.pt"
        result = summary(self.confusion(), self.classes) | dict(
            protocol=s.eval, settings=self.settings,
            reported="last epoch" if self.batches.total else "converged")
        if self.world.rank == 0:
            saved = dict(model={k: v.cpu() for k, v in self.model.state_dict().items()},
                         classes=self.classes, mean=mean, std=std, arch=s.arch, size=s.view_size,
                         start=self.settings["start"])
            write_whole(path, lambda file: torch.save(saved, file))
            write_whole(path.with_name(f"eval-{self.tag}.json"),
                        lambda file: file.write(json.dumps(result, indent=1).encode()))
            right, wide = result["per_class"], max(map(len, self.classes))
            self.log.say(
                f"{path}: {result['accuracy']:.2f} % of {result['images']} test images right; "
                f"mean of the classes {result['mean_accuracy']:.2f} %\n"
                f"{'':{wide}}    right   taken for: " + "  ".join(f"{k[:8]:>8}" for k in right))
            for (name, share), row in zip(right.items(), result["confusion"]):
                row = "  ".join(f"{n:8}" for n in row)
                self.log.say(f"{name:{wide}}  {share:5.1f} %{'':14}{row}")
        return result

def summary(confusion: Tensor, classes: list[str]) -> dict:
    """Accuracy over images, per class, and the mean over classes, in percent. (Sec. 4.2)"""
    per_class = 100 * confusion.diag() / confusion.sum(dim=1).clamp(min=1)
    return dict(accuracy=100 * confusion.diag().sum().item() / confusion.sum().item(),
                mean_accuracy=per_class.mean().item(), images=confusion.sum().item(),
                per_class=dict(zip(classes, per_class.tolist())), confusion=confusion.tolist())

def as_linear(s: Settings) -> dict:
    """What --eval alone would have set."""
    return dict(eval="linear", steps=0, oversample=False, labels=Settings.labels,
                **PROTOCOLS[s.preset]["linear"])

def evaluate(s: Settings, world: World) -> dict:
    """Runs the protocol; before fine-tuning on a run's own data, the linear one if need be."""
    data = Path(s.data).resolve().name
    if s.eval == "finetune" and not s.init and agree(world, lambda: (
            run_settings(s.name).get("data_name", s.name) == data
            and not Path("runs", s.name, f"linear-{data}.pt").exists())):
        Evaluation(replace(s, **as_linear(s)), world).go()
    return Evaluation(s, world).go()

# ================================ Part IV: other rows of the tables =============================
# Each class has the interface of what it replaces in Part I; all else stays Section 4.1's.

# ===== Table 3: parts taken away =====

class GFLAlone(nn.Module):
    """One branch only; I and u are not used. (Table 3 a, Table 1)"""
    backbone, update = SimFLE.backbone, SimFLE.update

    def __init__(self, gfl: nn.Module, ffl: FaceMAE | None = None, beta: float = 0.03):
        super().__init__()
        self.gfl, self.ffl, self.beta = gfl, ffl, beta

    def forward(self, v1: Tensor, v2: Tensor, *_: Tensor) -> dict[str, Tensor]:
        L_s, _, z1 = self.gfl(v1, v2)
        return report(L_s, L_s=L_s, spread=spread(z1))

class DirectSimFLE(GFLAlone):
    """No distillation: the map X keeps its gradient instead, so that L_g and the refinement train
    the backbone too, through the grouping layer. (Table 3 b, as we read it)"""
    def forward(self, v1: Tensor, v2: Tensor, I: Tensor, u=None) -> dict[str, Tensor]:
        L_s, _, z1 = self.gfl(v1, v2)
        L_r, _, L_g, D2_between, D2_within = self.ffl(self.backbone(I)[0], I, u)
        return report(L_s + L_r + self.beta * L_g, L_s=L_s, L_r=L_r, L_g=L_g, spread=spread(z1),
                      D2_between=D2_between, D2_within=D2_within)

class RandomMasking(SemanticMasking):
    """Masks at random: u (B, 49) are the scores. The grouping layer and L_g stay, as in the paper's
    arithmetic; nothing else learns from them. (Table 3 c)"""
    def __init__(self, *settings):
        super().__init__(*settings)
        self.draws = (self.image_size // self.patch)**2

    def forward(self, C: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        a = torch.rand(len(C), self.draws, device=C.device) if u is None else u
        return a, *mask_lowest(a, self.ratio)

MASKINGS = Parts(semantic=SemanticMasking, random=RandomMasking)

# ===== Table 4: other methods for GFL =====
# SimSiam is BYOL without a target of its own: the stopped gradient alone prevents a collapse. In
# the others a view must find its face's other view (the positive) among those of other faces (the
# negatives), which MoCo has in a queue, SimCLR in the batch of all W processes.

def two_layers(inputs: int, outputs: int) -> nn.Sequential:
    """The head of SimCLR and MoCo v2: without BatchNorm. (Table 4)"""
    return nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(True), nn.Linear(inputs, outputs))

class SimSiam(nn.Module):
    """GFL by SimSiam (Chen and He, 2021). A prediction aims at the online stream's own projection
    of the other view, a constant. L_s is 1 − cos, the mean of both orders. (Table 4)"""
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
    """GFL by MoCo (He et al., 2020); v2 has the head `two_layers` and t = 0.2. (Table 4)

    The online stream makes of v1 the query q, the target of v2 its key; the negatives are the keys
    of earlier batches, in a queue that is the same in every process. Only v1 is seen with gradient,
    so L_d has two vectors, z_m and z_v1, and none for the target's (departure 16)."""
    def __init__(self, backbone: Backbone, head=nn.Linear, outputs: int = 128, queue: int = 65_536,
                 t: float = 0.07, tau: float = 0.999, world: World = ALONE):
        super().__init__()
        self.t, self.tau, self.world = t, tau, world
        self.online = Stream(backbone, head(backbone.channels, outputs))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        # Departure 15: empty at first. No face is like the random directions of MoCo's authors, and
        # the quickest way to the positive is then to map all faces to one point. (v2, toy faces,
        # 1,024 keys, one seed: spread 0.0008 after 140 steps; when empty 0.025 after 150.)
        self.register_buffer("queue", torch.zeros(queue, outputs))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))  # the queue's oldest key

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        z1, h1 = self.online(v1)
        with torch.no_grad():
            # Shuffling BatchNorm: process r makes the keys of every W-th image from the r-th on.
            # Statistics that normalise query and key alike would give away which belong together.
            W, r, B = self.world.size, self.world.rank, len(v1)
            mixed = self.target(gather(self.world, v2)[r::W])[0]
            keys = rearrange(gather(self.world, mixed), "(w b) d -> (b w) d", w=W)  # (W·B, 128)
            self.keys = F.normalize(promote(keys), dim=1)  # see `update`
        with full_precision(z1):
            q, k = F.normalize(promote(z1), dim=1), self.keys[r * B:][:B]
            positive, empty = (q * k).sum(dim=1, keepdim=True), (self.queue == 0).all(dim=1)
            negative = (q @ self.queue.T).masked_fill(empty, -math.inf)  # (B, 65536)
            logits = torch.cat([positive, negative], dim=1) / self.t
            return -F.log_softmax(logits, dim=1)[:, 0].mean(), [h1], z1

    @torch.no_grad()
    def update(self) -> None:
        """Moves the target; this step's keys of all processes take the place of the oldest."""
        ema_update(self.target, self.online, self.tau)
        keys, size = self.keys, len(self.queue)
        place = self.next + torch.arange(len(keys), device=keys.device)
        self.queue[place[-size:] % size] = keys[-size:]  # round and round, whatever the batch
        self.next.copy_((self.next + len(keys)) % size)

class SimCLR(nn.Module):
    """GFL by SimCLR (Chen et al., 2020). Each process has the loss of the whole batch; by `gather`
    W times the gradient of its own images, which DDP's mean divides by W again. (Table 4)"""
    update = SimSiam.update

    def __init__(self, backbone: Backbone, outputs: int = 128, t: float = 0.1,
                 world: World = ALONE):
        super().__init__()
        self.t, self.world = t, world
        self.online = Stream(backbone, two_layers(backbone.channels, outputs))

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        (z1, h1), (z2, h2) = self.online(v1), self.online(v2)
        return nt_xent(gather(self.world, z1), gather(self.world, z2), self.t), [h1, h2], z1

def nt_xent(z1: Tensor, z2: Tensor, t: float) -> Tensor:
    """SimCLR's loss, (): every view must find its other one among all 2B − 1, averaged over the 2B
    views. z1, z2: (B, 128), row i of both of one face. (Table 4)"""
    with full_precision(z1):
        z = F.normalize(promote(torch.cat([z1, z2])), dim=1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        other = torch.arange(len(z), device=z.device).roll(len(z1))
        return F.cross_entropy((z @ z.T / t).masked_fill(itself, -math.inf), other)

# SimSiam's 2048 and 512 follow from `hidden`, the others' 128 from `outputs`, to shrink with them.
GFLS = Parts(
    byol=lambda s, b, world: BYOL(b, s.hidden, s.outputs, s.tau),
    simsiam=lambda s, b, world: SimSiam(b, s.hidden // 2, s.hidden // 8),
    moco=lambda s, b, world: MoCo(b, nn.Linear, s.outputs // 2, s.queue, 0.07, s.tau, world),
    mocov2=lambda s, b, world: MoCo(b, two_layers, s.outputs // 2, s.queue, 0.2, s.tau, world),
    simclr=lambda s, b, world: SimCLR(b, s.outputs // 2, 0.1, world))

# ================================ main ================================

@functools.cache
def helper(name: str):
    """data/NAME.py, which imports this file: demo, drawing and timing are no part of the method."""
    path = Path(__file__).resolve().with_name("data") / f"{name}.py"
    if not path.exists():
        raise Problem(f"{path} is missing; copy the folder data/ along with this file.")
    sys.modules.setdefault("simfle", sys.modules[__name__])  # this very module, not a second one
    spec = importlib.util.spec_from_file_location(f"simfle_{name}", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

def run(orders: dict) -> None:
    """Decides what to do; the only place that does. Raises Problem."""
    with processes() as world:
        s = agree(world, lambda: read_settings(orders))
        demo = helper("demo") if s.data == "toy" else None
        if demo:
            demo.draw_toy_faces(world)
        if s.benchmark:
            helper("benchmark").benchmark(s, world)
        elif s.figures:
            agree(world, lambda: helper("draw").draw_figures(s))
        elif s.eval:
            evaluate(s, world)
        else:
            Pretraining(s, world).go()
            if demo:
                demo.compare_with_untrained(s, world)

def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 after a Problem, 143 when stopped, 130 after a Ctrl-C; 1 when
    another process has failed, or for a fault of the program itself, with its traceback."""
    try:
        run(read_orders(argv))
    except Problem as told:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once on every machine
            print(f"\nsimfle: {told}", file=sys.stderr, flush=True)
        return told.code
    except KeyboardInterrupt:
        print("\nsimfle: interrupted; the same command (without --fresh) goes on from the last "
              "checkpoint, if there is one (--save-every N).", file=sys.stderr, flush=True)
        return 130
    except Exception as error:  # not left to Python, which would wait for the loading processes
        lost = dist.is_initialized() and isinstance(error, RuntimeError) and re.search(
            "closed|reset|peer|timed out", str(error), re.IGNORECASE)
        told = (f"\nsimfle: process {dist.get_rank()} ends, because another one has ended; the "
                f"same command (without --fresh) goes on." if lost else traceback.format_exc())
        print(told, file=sys.stderr, flush=True)
        return 1
    return 0

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()  # a group that a failure left open may abort at Python's own exit
    (os._exit if code and dist.is_initialized() else sys.exit)(code)
