# SPDX-License-Identifier: MIT
"""SimFLE in one file: self-supervised facial expression recognition in the wild.

SimFLE (Simple Facial Landmark Encoding, J. Moon and S. Park, arXiv 2303.07648) trains a ResNet, the
backbone, on face photographs without labels. Two tasks share it. Global facial feature learning
(GFL, Sec. 3.1) maps two random views of a face to similar embeddings. In fine-grained facial
feature learning (FFL, Sec. 3.2) the backbone's channels decide which patches of a face a masked
autoencoder gets to see. Distillation exchanges what both have learnt (Sec. 3.3). Only the backbone
is kept. Sections, equations and letters are the paper's, except what is "ours" or a departure.

    python data/demo.py                                       the demo, on a laptop
    python simfle.py --data affectnet                         one GPU
    torchrun --nproc_per_node=3 simfle.py --data affectnet    three GPUs, as in the paper
    python simfle.py --data affectnet --eval                  linear evaluation of that run

`--data` is a folder of pictures, or its name in data/. Results go to runs/affectnet/, or to that of
`--name`. There backbone.pt is a torchvision state dict without `fc`. From checkpoint.pt the same
command resumes. settings.json has all settings, log.jsonl the losses of every 20th step. `--eval`
adds a classifier, linear-affectnet.pt, and its accuracy, linear-affectnet.json.

One step, with B images (sg: no gradient)

    v1, v2 = augment(crop of the face), augment(another)      (B, 3, 224, 224)
    z1, h1 = online(v1);  z2, h2 = online(v2)                 (B, 256), pooled features (B, 2048)
    L_s = similarity_loss(predictor(z1), sg(target(v2)))      Eq. 1
        + similarity_loss(predictor(z2), sg(target(v1)))
    X = sg(online.backbone(I))                                (B, 2048, 4, 4), I: the whole face
    C = relu(batchnorm(conv1x1(X)))                           32 groups of 64 channels
    L_g = grouping_loss(C)                                    Eq. 2 / 2048
    a = patch_scores(C, a random group for each image)        (B, 49), Eq. 3
    keep, mask = mask_lowest(a)                               12 patches kept, 37 masked
    tokens = encoder(class token, the kept patches)           (B, 13, 768)
    error = mean squared error of decoder(tokens)             (B, 49), to normalised patches
    L_r = mean of error where mask is 1                       Eq. 4
        + 0.02 · 2048 · refinement_term(a, mask, error)       value 0; its gradient moves a
    z_m = distil_m(mean of the kept patches' tokens)          (B, 256)
    L_d = distillation_loss(z_m, distil_v(h1), distil_v(h2))  Eq. 5 · 16, FFL's only way to the
                                                              backbone's weights
    (L_s + L_r + 0.3 L_d + 0.03 L_g).backward()               Eq. 6
    optimizer.step();  target = 0.99 target + 0.01 online     the target has no predictor

Letters
    I, v1, v2   a face, and two augmented views of it
    f_θ, f_ρ    the online stream (backbone, projector, predictor), the target stream (no predictor)
    τ           the decay of the target, an exponential moving average (EMA) of the online stream
    X, c′       the backbone's map of I, its number of channels
    C_i, D, N_g channel i after grouping, the cosine of two channels, the number of groups
    a_i, γ      the score of patch i, the share of the N_p patches that is masked: N_m of them
    e_i, κ      (ours) the reconstruction error of patch i; κ c′ weighs the refinement of a (3.2)
    z_m, z_v1, z_v2, t    the three distilled vectors and the temperature of their softmax
    L_s, L_r, L_d, L_g    similarity, reconstruction, distillation (weight α), grouping (weight β)

"Authors:" says what their public code does. Departures part from it or from the paper; the README
has the list. Accuracies have not been reproduced, and nothing has run on a GPU yet.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import glob
import json
import math
import os
import signal
import sys
import time
import traceback
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns about `find_unused_parameters`
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import RandomResizedCrop, functional as TF

# ================================ Part I: the method ================================
# Nothing here knows settings, files or processes. So a piece with an example can be pasted into
# other files, with the imports above and what it needs. Shapes are for the paper's settings.


def in_fp32(function):
    """Decorator: switches autocast off, upcasts bf16 and half, leaves float64 as it is. (ours)

    bf16 has 8 significant bits. Many of the 49 scores that decide a mask would be equal in it.
    (Products and convolutions are TF32 on GPUs, with 11 bits: see `join_processes`.)"""
    def upcast(x):
        floating = torch.is_tensor(x) and x.is_floating_point()
        return x.to(torch.promote_types(x.dtype, torch.float32)) if floating else x

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*map(upcast, args), **{k: upcast(x) for k, x in kwargs.items()})
    return wrapper


def unit(x: Tensor, dim: int, floor: float = 0.1) -> Tensor:
    """Scales vectors along `dim` to unit length; a zero vector stays zero. (ours)

    The gradient through x/‖x‖ is proportional to 1/‖x‖, and a few vectors near zero would outweigh
    all others. So where ‖x‖ < floor the gradient, not the value, is multiplied by ‖x‖/floor."""
    u = F.normalize(x, dim=dim)
    share = x.detach().norm(dim=dim, keepdim=True) / floor
    return torch.lerp(u.detach(), u, share.clamp(max=1))  # value u, gradient share × u's


def mlp(inputs: int, hidden: int = 4096, outputs: int = 256) -> nn.Sequential:
    """Makes a projector, the predictor or a distillation head: (B, inputs) -> (B, outputs).
    (Sec. 4.1; the widths are the authors', as in BYOL)"""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, outputs))


def make_backbone(resnet: nn.Module) -> nn.Sequential:
    """A torchvision ResNet without pooling and `fc`: (B, 3, 224, 224) -> map (B, 2048, 7, 7), of
    112 pixels 4 × 4. Its state dict is torchvision's, without `fc.*`. (Fig. 2)"""
    backbone = nn.Sequential(OrderedDict([*resnet.named_children()][:-2]))
    backbone.channels = resnet.fc.in_features  # c′ = 2048
    return backbone


# ===== 3.1 Global facial feature learning =====
# Two views of one face, cropped and coloured at random, should get similar embeddings. That alone
# has a trivial answer: map every face to one point, a collapse. BYOL (Grill et al., 2020) avoids it
# without comparing different faces. The online stream f_θ predicts the target stream f_ρ's
# embedding of the other view. No gradient moves the target, an average of past online streams. Only
# the online stream has a predictor; BYOL's authors report a collapse without.


@in_fp32
def similarity_loss(p: Tensor, z: Tensor) -> Tensor:
    """The squared distance of prediction and target, both at unit length. (Sec. 3.1, Eq. 1)

    Args:
        p, z: predictions f_θ of one view, projections f_ρ of the other, (B, 256) each.
    Returns:
        scalar from 0 to 4: the mean of 2 − 2·cos over the batch.

        # needs in_fp32
        p, z = torch.randn(8, 256, requires_grad=True), torch.randn(8, 256)
        similarity_loss(p, z).backward()
    """
    return (2 - 2 * F.cosine_similarity(p, z, dim=1)).mean()


@in_fp32
def spread(z: Tensor) -> Tensor:
    """Standard deviation of unit vectors over the batch, mean over coordinates: (B, 256) -> 0 in a
    collapse, 1/√256 = 0.0625 over directions that are spread evenly. (ours)"""
    return F.normalize(z, dim=1).std(dim=0).mean()


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """ρ ← τ ρ + (1 − τ) θ, over all parameters. (Sec. 3.1)

    Args:
        target, online: modules of the same architecture; buffers stay as they are.
        tau: the EMA decay τ, 0 to 1.

        # needs mlp
        online = mlp(2048)
        target = copy.deepcopy(online).requires_grad_(False)
        ema_update(target, online, tau=0.99)
    """
    torch._foreach_lerp_([*target.parameters()], [*online.parameters()], 1 - tau)


class Stream(nn.Module):
    """f_ρ, or f_θ less its predictor: v (B, 3, 224, 224) -> z (B, 256), h (B, 2048). (Sec. 3.1)"""
    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        h = self.backbone(v).mean(dim=(2, 3))
        return self.projector(h), h


class BYOL(nn.Module):
    """GFL by BYOL. Call `update()` after every step of the optimiser. (Sec. 3.1, Eq. 1)

    Args:
        backbone: of `make_backbone`; it is trained.
        hidden, outputs: widths of projector and predictor.
        tau: the EMA decay τ of the target. (Authors: 0.99 throughout; paper: no value.)
    Forward:
        v1, v2: views (B, 3, 224, 224), B ≥ 2.
        Returns L_s, a scalar from 0 to 8; [h1, h2], the pooled features (B, 2048); z1 (B, 256).

        # needs in_fp32, similarity_loss, ema_update, mlp, make_backbone, Stream
        byol = BYOL(make_backbone(torchvision.models.resnet18()))
        L_s, (h1, h2), z1 = byol(torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64))
        L_s.backward()  # then a step of the optimiser, then byol.update()
    """
    def __init__(self, backbone: nn.Module, hidden: int = 4096, outputs: int = 256,
                 tau: float = 0.99):
        super().__init__()
        self.tau = tau
        self.online = Stream(backbone, mlp(backbone.channels, hidden, outputs))
        self.predictor = mlp(outputs, hidden, outputs)
        # The target is in train mode too, so its running BatchNorm statistics are never used.
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        # One forward pass a view: BatchNorm then has the statistics of one view.
        z1, h1 = self.online(v1)
        z2, h2 = self.online(v2)
        with torch.no_grad():
            target1, target2 = self.target(v1)[0], self.target(v2)[0]
        # Paper: "done again by swapping the positions of v1 and v2". The two are added.
        L_s = (similarity_loss(self.predictor(z1), target2)
               + similarity_loss(self.predictor(z2), target1))
        return L_s, [h1, h2], z1

    def update(self) -> None:
        ema_update(self.target, self.online, self.tau)


# ===== 3.2 Channel grouping =====
# Each of the backbone's c′ = 2048 channels is a small picture of where something was found, and
# many are alike. A 1 × 1 convolution mixes them into c′ new ones, in 32 groups of 64: channel k is
# in group k // 64. Eq. 2 asks channels of one group to look at the same places, and channels of
# different groups at different ones.
#
# As it stands, Eq. 2 needs the cosines of 2048² pairs for each image. There is a shorter way. Let U
# be the c′ × h′w′ matrix of the channels at unit length. U Uᵀ holds the cosines, and the sum of
# their squares is a squared Frobenius norm:
#
#     Σ_ij D(C_i, C_j)²  =  ‖U Uᵀ‖²  =  trace(U Uᵀ U Uᵀ)  =  trace(Uᵀ U Uᵀ U)  =  ‖Uᵀ U‖²
#
# Uᵀ U is only h′w′ × h′w′ = 16 × 16. The same holds for the pairs inside a group g, with its rows
# U_g, and Uᵀ U is the sum of the groups' U_gᵀ U_g. So, exactly,
#
#     Eq. 2  =  (all pairs − pairs in a group) − pairs in a group  =  ‖Uᵀ U‖² − 2 Σ_g ‖U_gᵀ U_g‖²


class ChannelGrouping(nn.Module):
    """Mixes c′ channels: X (B, 2048, 4, 4) -> C (B, 2048, 4, 4), never negative. (Sec. 3.2)

    Departure 1. Paper: "a 1 × 1 convolution layer". BatchNorm and ReLU are the authors'. Weights
    start random. Authors: one constant, with which all 32 groups give one mask at first.

        # needs in_fp32, unit, grouping_loss
        C = ChannelGrouping(2048)(torch.randn(2, 2048, 4, 4))
        L_g, D2_between, D2_within = grouping_loss(C, groups=32)
    """
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(channels)

    @in_fp32
    def forward(self, X: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(X)))


@in_fp32
def grouping_loss(C: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Channels of one group alike, channels of different groups unlike. (Sec. 3.2, Eq. 2)

    By hand, 4 channels of 2 positions in 2 groups: (1, 0), (1, 0) | (0, 1), (1, 1). As in Eq. 2
    each pair counts twice, and each channel once with itself. In the first group D² is 1 four
    times, in the second 1, ½, ½, 1: together 7. Between the groups it is 0, ½, 0, ½, each twice:
    together 2. Uᵀ U = [2.5 0.5; 0.5 1.5] has squares that sum to 9 = 2 + 7. L_g = (2 − 7)/4.

    Departure 2: divided by c′, else a channel's gradient grows with c′. Authors: (Σ_ij (D_ij −
    s_ij)²)², with D_ij the mean cosine over the batch, s_ij 1 within groups and 0 between them.

    Args:
        C: grouped channels (B, c′, h′, w′). Time and memory grow with (h′w′)².
        groups: N_g; divides c′.
    Returns:
        L_g: scalar, Eq. 2 divided by c′, mean over the batch.
        D2_between, D2_within: for the log, mean D² of two channels of different, of equal groups.

        # needs in_fp32, unit
        C = torch.rand(2, 2048, 4, 4, requires_grad=True)
        L_g, D2_between, D2_within = grouping_loss(C, groups=32)
        L_g.backward()
    """
    c, k = C.shape[1], C.shape[1] // groups
    U = unit(rearrange(C, "b (g k) h w -> b g k (h w)", g=groups), dim=3)  # (B, 32, 64, 16)
    gram = U.mT @ U  # (B, 32, 16, 16): U_gᵀ U_g
    within = gram.square().sum(dim=(1, 2, 3))
    between = gram.sum(dim=1).square().sum(dim=(1, 2)) - within
    itself = U.square().sum(dim=(1, 2, 3))  # Σ_i D(C_i, C_i)²; 0 is added where C_i is 0
    D2_between = between.detach().mean() / (c * (c - k))
    D2_within = (within - itself).detach().mean() / (c * (k - 1))
    return (between - within).mean() / c, D2_between, D2_within


# ===== 3.2 Semantic masking =====
# A masked autoencoder (MAE) masks patches at random. Here a channel group decides. Its 64 channels
# are summed to one score map, and the patches with the lowest scores are masked. So what the group
# responds to stays visible. In every step a group is drawn for each image, as the authors do. The
# paper leaves open whether for an image or a batch. Masks follow MAE: 0 is kept, 1 is masked.


@in_fp32
def patch_scores(C: Tensor, group: Tensor, groups: int, image_size: int, patch: int) -> Tensor:
    """The mean of a group's upsampled score map over every patch. C: (B, c′, h′, w′); group: the
    chosen one of each image, (B,), 0 to N_g − 1. Returns a (B, 49), row by row. (Sec. 3.2, Eq. 3)
    """
    grouped = rearrange(C, "b (g k) h w -> b g k h w", g=groups)
    score_map = grouped[torch.arange(len(C), device=C.device), group].sum(dim=1, keepdim=True)
    # Paper: "upsampled". Authors: bilinear. Eq. 3 is then average pooling.
    score_map = F.interpolate(score_map, size=(image_size,) * 2, mode="bilinear")
    return F.avg_pool2d(score_map, patch).flatten(1)


def mask_lowest(a: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Masks the patches with the lowest scores. (Sec. 3.2)

    Departure 3: between scores that ReLU made 0 chance decides. Authors: their sort's order.

    Args:
        a: scores (B, N_p), N_p ≥ 2.
        ratio: γ. Of 49 patches ⌊49 · (1 − 0.75)⌋ = 12 are kept; at least one is, and one masked.
    Returns:
        keep: indices of the kept patches (B, N_p − N_m), highest score first.
        mask: (B, N_p), 0 kept and 1 masked.

        # needs in_fp32, patch_scores
        C, group = torch.rand(2, 2048, 4, 4), torch.randint(32, (2,))
        a = patch_scores(C, group, groups=32, image_size=112, patch=16)
        keep, mask = mask_lowest(a, ratio=0.75)
    """
    N_p = a.shape[1]
    kept = min(max(1, int(N_p * (1 - ratio) + 1e-6)), N_p - 1)  # 1e-6: 50 · (1 − 0.8) is 9.99…
    order = (a + 1e-6 * torch.rand_like(a)).argsort(dim=1, descending=True)
    keep = order[:, :kept]
    return keep, torch.ones_like(a).scatter(1, keep, 0.0)


# ===== 3.2 Trainable refinement =====
# Departure 4. Paper: FaceMAE "will try to avoid masking fine-grained facial landmarks, which are
# difficult to reconstruct." How is not said: sorting has no gradient. Authors: L_r never reaches
# the scores.
#
# Ours: we write a gradient down. The hypothesis is that masks will then keep what is hard to
# reconstruct. Take the masked patches of one image. The score of a patch with more than their mean
# error ē should increase, that of one with less should decrease. The forward pass keeps its mask M
# of zeros and ones. Only the gradient uses a soft mask. It is a sigmoid of how far a score lies
# below the lowest kept score:
#
#     r = the scores, standardised per image        soft_i = sigmoid(r_thr − r_i)
#
# r_thr is the lowest r of a kept patch. A term of value 0 is added to L_r, for each image
#
#     1/N_m Σ_i M_i (e_i − ē)(soft_i − soft_i.detach())
#
# Its gradient with respect to r_i is −M_i (e_i − ē) soft_i (1 − soft_i) / N_m. Without ē the score
# of every masked patch would increase, hard or easy. A kept patch has no error in Eq. 4. Its score
# moves only because standardising ties the scores of an image together.


@in_fp32
def refinement_term(a: Tensor, mask: Tensor, error: Tensor) -> Tensor:
    """A term of value 0; descending its gradient refines the masking. (Sec. 3.2; ours)

    By hand, four patches: a = (3, 2, 1, 0), the first is kept, the others have errors 4, 1, 7. Then
    r = (1.16, 0.39, −0.39, −1.16) and ē = 4. Gradient descent moves r along (0, 0, −0.145, +0.081):
    the easy patch down, the hard one up. It moves a along (+0.024, +0.016, −0.104, +0.064).

    Args:
        a: scores (B, 49). Only they get a gradient.
        mask: (B, 49), 0 kept and 1 masked.
        error: mean squared error of every patch (B, 49); kept ones are not used.
    Returns:
        scalar 0, mean over the batch. `FaceMAE` adds it to L_r, κ c′ times.

        # needs in_fp32, unit, mask_lowest
        a, error = torch.randn(2, 49, requires_grad=True), torch.rand(2, 49)
        keep, mask = mask_lowest(a, ratio=0.75)
        refinement_term(a, mask, error).backward()
    """
    error, N_m = error.detach(), mask.sum(dim=1, keepdim=True)
    # Standardised: √(N_p − 1) / norm is 1 / standard deviation. `unit` bounds the gradient.
    r = unit(a - a.mean(dim=1, keepdim=True), dim=1) * math.sqrt(a.shape[1] - 1)
    r_thr = r.detach().masked_fill(mask.bool(), math.inf).amin(dim=1, keepdim=True)
    soft = torch.sigmoid(r_thr - r)
    mean_error = (error * mask).sum(dim=1, keepdim=True) / N_m  # ē
    return (mask * (error - mean_error) * (soft - soft.detach()) / N_m).sum(dim=1).mean()


# ===== 3.2 FaceMAE =====
# The autoencoder is the MAE of He et al. (2022) with the vision transformer ViT-B/16. The encoder
# sees the 12 kept patches alone. From its tokens a smaller transformer, the decoder, predicts all
# 49. Only the 37 masked ones enter L_r. I is the whole picture, resized and not augmented: the
# paper calls it "the input facial image", and only v1 and v2 are augmented.


def block(width: int, heads: int) -> nn.Module:
    """A pre-norm transformer block, tokens (B, N, width) -> the same shape. (Sec. 4.1, ViT)"""
    return nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                      layer_norm_eps=1e-6, batch_first=True, norm_first=True)


def sincos_positions(grid: int, width: int) -> Tensor:
    """Fixed positions of grid² patches, (1, 1 + grid², width); zeros for the class token. (MAE)

    One half tells the column, one the row: sines, then cosines, of width/4 frequencies."""
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency  # (7, 192)
    line = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (7, 384)
    row, column = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    patches = torch.cat([column, row], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), patches])[None]


@in_fp32
def patch_errors(prediction: Tensor, patches: Tensor, norm_pix: bool) -> Tensor:
    """Mean squared error of every patch, (B, 49, 768) twice -> (B, 49). (Sec. 3.2, Eq. 4)

    Departure 5: with `norm_pix` pixels are normalised patch by patch, as by the authors."""
    if norm_pix:
        var, mean = torch.var_mean(patches, dim=2, keepdim=True)
        patches = (patches - mean) / (var + 1e-6).sqrt()
    return (prediction - patches).square().mean(dim=2)


class MaskedAutoencoder(nn.Module):
    """MAE with ViT-B/16: images (B, 3, 112, 112), indices of kept patches (B, 12) -> the error of
    every patch (B, 49), the kept patches' tokens (B, 12, 768). (Sec. 3.2, Eq. 4; Sec. 4.1)"""
    def __init__(self, image_size: int = 112, patch: int = 16, width: int = 768, depth: int = 12,
                 heads: int = 12, decoder_width: int = 512, decoder_depth: int = 8,
                 decoder_heads: int = 16, norm_pix: bool = True):
        super().__init__()
        self.patch, self.grid, self.norm_pix = patch, image_size // patch, norm_pix
        self.embed = nn.Linear(3 * patch**2, width)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.encoder = nn.Sequential(*(block(width, heads) for _ in range(depth)),
                                     nn.LayerNorm(width, eps=1e-6))
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder = nn.Sequential(*(block(decoder_width, decoder_heads)
                                       for _ in range(decoder_depth)),
                                     nn.LayerNorm(decoder_width, eps=1e-6))
        self.to_pixels = nn.Linear(decoder_width, 3 * patch**2)
        self.register_buffer("position", sincos_positions(self.grid, width))
        self.register_buffer("decoder_position", sincos_positions(self.grid, decoder_width))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, I: Tensor) -> Tensor:
        """(B, 3, 112, 112) -> (B, 49, 768), row by row, and in a patch the colours last."""
        return rearrange(I, "b c (gh p) (gw q) -> b (gh gw) (p q c)", p=self.patch, q=self.patch)

    def encode(self, patches: Tensor, keep: Tensor) -> Tensor:
        """Patches (B, 49, 768), of which the encoder sees those in `keep` -> (B, 13, 768)."""
        x = self.embed(patches) + self.position[:, 1:]
        x = torch.take_along_dim(x, keep[:, :, None], dim=1)  # (B, 12, 768)
        first = (self.class_token + self.position[:, :1]).expand(len(x), -1, -1)
        return self.encoder(torch.cat([first, x], dim=1))

    def decode(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """The encoder's tokens (B, 13, 768) -> predicted pixels of every patch (B, 49, 768)."""
        y = self.decoder_embed(tokens)  # (B, 13, 512)
        x = self.mask_token.to(y.dtype).expand(len(y), self.grid**2, -1)
        x = x.scatter(1, keep[:, :, None].expand(-1, -1, y.shape[2]), y[:, 1:])  # (B, 49, 512)
        x = torch.cat([y[:, :1], x], dim=1) + self.decoder_position
        return self.to_pixels(self.decoder(x))[:, 1:]

    def forward(self, I: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patchify(I)
        tokens = self.encode(patches, keep)
        return patch_errors(self.decode(tokens, keep), patches, self.norm_pix), tokens[:, 1:]


class FaceMAE(nn.Module):
    """The whole of FFL: grouping, semantic masking, autoencoding. (Sec. 3.2, Eq. 2 to 4)

    Args:
        channels: c′ of the backbone.
        groups: N_g; divides c′.
        ratio: γ, the share of the patches that is masked.
        kappa: κ. With 0 L_r does not train the masking, as in the authors' code.
        image_size, patch: pixels a side of I and of a patch, which divides it.
        autoencoder: further arguments of `MaskedAutoencoder`.
    Forward:
        X, I: the backbone's map (B, 2048, 4, 4), without gradient; images (B, 3, 112, 112).
        Returns L_r and L_g, scalars; the kept patches' tokens (B, 12, 768), highest score first;
        and a dict for the log: D2_between, D2_within, and by patch (49,) the sum of its errors
        where it was masked and how often it was (cf. Fig. 3).

        # needs in_fp32, unit, ChannelGrouping, grouping_loss, patch_scores, mask_lowest,
        # refinement_term, block, sincos_positions, patch_errors, MaskedAutoencoder
        ffl = FaceMAE(channels=512, depth=2, decoder_depth=1)
        L_r, L_g, tokens, logged = ffl(torch.randn(2, 512, 4, 4), torch.randn(2, 3, 112, 112))
        (L_r + 0.03 * L_g).backward()
    """
    def __init__(self, channels: int = 2048, groups: int = 32, ratio: float = 0.75,
                 kappa: float = 0.02, image_size: int = 112, patch: int = 16, **autoencoder):
        super().__init__()
        self.groups, self.ratio, self.kappa = groups, ratio, kappa
        self.image_size, self.patch = image_size, patch
        self.grouping = ChannelGrouping(channels)
        self.mae = MaskedAutoencoder(image_size, patch, **autoencoder)

    def scores(self, C: Tensor) -> Tensor:
        """Draws a group for each image, and scores its patches by it: (B, 49). (Eq. 3)"""
        group = torch.randint(self.groups, (len(C),), device=C.device)
        return patch_scores(C, group, self.groups, self.image_size, self.patch)

    def forward(self, X: Tensor, I: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        C = self.grouping(X)
        L_g, D2_between, D2_within = grouping_loss(C, self.groups)
        a = self.scores(C)
        keep, mask = mask_lowest(a, self.ratio)
        error, tokens = self.mae(I, keep)
        # Paper: "We compute the loss only for the N_m masked patches".
        L_r = (error * mask).sum() / mask.sum()
        # Why c′? A channel gets 1/c′ of the term's gradient to r: its group is drawn 1 time in N_g,
        # and standardising divides by the number of similar channels that are summed, c′/N_g.
        L_r = L_r + self.kappa * C.shape[1] * refinement_term(a, mask, error)
        logged = {"D2_between": D2_between, "D2_within": D2_within,
                  "masked_error": (error * mask).sum(dim=0), "masked": mask.sum(dim=0)}
        return L_r, L_g, tokens, logged


# ===== 3.3 Connecting two branches =====
# Where both branches pull at the backbone, the paper's accuracy falls from 44.01 % to 20.98 %
# (Table 3, d and b). So the map X carries no gradient back. L_r and L_g train the grouping layer
# and the autoencoder alone. z_m is the autoencoder's vector of the face, z_v1 and z_v2 are the
# backbone's vectors of the views. Each softmax is drawn to that of their mean z̄, of which z_m is a
# third. That is FFL's only way to the backbone's weights. (By Sec. 3.2 the refinement adjusts the
# backbone too; 3.3 cuts that path.)


@in_fp32
def distillation_loss(*zs: Tensor, t: float = 4.0) -> Tensor:
    """Draws each vector's softmax ψ towards that of their mean. (Sec. 3.3, Eq. 5)

    Departure 6. Paper: KL(ψ(z_i/t), ψ(z̄/t)), with the reference and the gradient left open. As the
    authors: t² KL(ψ(z̄/t) ‖ ψ(z_i/t)), z̄ detached. t² keeps gradients' size (Hinton et al., 2015).

    Args:
        zs, t: z_m, z_v1, z_v2, (B, 256) each; the temperature.
    Returns:
        scalar, not negative: summed over the vectors, mean over the batch.

        # needs in_fp32
        zs = [torch.randn(8, 256, requires_grad=True) for _ in range(3)]
        distillation_loss(*zs, t=4.0).backward()
    """
    teacher = F.log_softmax(torch.stack(zs).mean(dim=0).detach() / t, dim=1)
    return t**2 * sum(F.kl_div(F.log_softmax(z / t, dim=1), teacher, log_target=True,
                               reduction="batchmean") for z in zs)


class SimFLE(nn.Module):
    """GFL and FFL, connected by distillation. (Sec. 3, Fig. 2, Eq. 6)

    Who trains whom (– is no gradient at all):

              backbone   projector, predictor   grouping layer   encoder   decoder   distil heads
        L_s   yes        yes                    –                –         –         –
        L_r   –          –                      if κ > 0         yes       yes       –
        L_d   yes        –                      –                yes       –         yes
        L_g   –          –                      yes              –         –         –

    Args:
        gfl: `BYOL`, or a module that has its `forward`, `update` and `online.backbone`.
        ffl: a `FaceMAE` for the channels of that backbone.
        hidden, outputs: widths of the distillation heads.
        alpha, beta, t: weights of L_d and L_g; temperature of the distillation.
    Forward:
        v1, v2, I: augmented views (B, 3, 224, 224), whole faces (B, 3, 112, 112).
        Returns a dict: the scalar `loss` to descend, its parts, and `FaceMAE`'s log.

        # needs all of Part I
        gfl = BYOL(make_backbone(torchvision.models.resnet18()))
        simfle = SimFLE(gfl, FaceMAE(channels=512, depth=2, decoder_depth=1))
        (v1, v2), I = torch.randn(2, 4, 3, 64, 64), torch.randn(4, 3, 112, 112)
        simfle(v1, v2, I)["loss"].backward()  # then a step of the optimiser, then simfle.update()
    """
    def __init__(self, gfl: nn.Module, ffl: FaceMAE, hidden: int = 4096, outputs: int = 256,
                 alpha: float = 0.3, beta: float = 0.03, t: float = 4.0):
        super().__init__()
        self.gfl, self.ffl, self.alpha, self.beta, self.t = gfl, ffl, alpha, beta, t
        self.distil_m = mlp(ffl.mae.embed.out_features, hidden, outputs)  # of the encoder's tokens
        self.distil_v = mlp(self.backbone.channels, hidden, outputs)  # of the backbone's features

    @property
    def backbone(self) -> nn.Module:
        return self.gfl.online.backbone

    def forward(self, v1: Tensor, v2: Tensor, I: Tensor) -> dict[str, Tensor]:
        # 3.1 What is the same in two views?
        L_s, hs, z1 = self.gfl(v1, v2)

        # 3.2 What must be seen to predict the rest? The pass is in train mode: I moves BatchNorm's
        # running statistics too. It comes after the views. If it came first, PyTorch 2.8's autocast
        # would cache bf16 weights without gradient, use them for the views, and never train them.
        with torch.no_grad():
            X = self.backbone(I)
        L_r, L_g, tokens, logged = self.ffl(X, I)

        # 3.3 What has each branch learnt? Authors: the mean of the tokens, without the class token.
        z_m = self.distil_m(tokens.mean(dim=1))
        L_d = distillation_loss(z_m, *map(self.distil_v, hs), t=self.t)

        # Eq. 6. Departure 7: L_g is Eq. 2 over c′, L_d is t² times Eq. 5. So β = 0.03 here is
        # 0.03/c′ in the paper's Eq. 6, and α = 0.3 is 0.3 t² = 4.8.
        loss = L_s + L_r + self.alpha * L_d + self.beta * L_g
        return dict(loss=loss, L_s=L_s, L_r=L_r, L_d=L_d, L_g=L_g, spread=spread(z1), **logged)

    def update(self) -> None:
        """Call it after every step of the optimiser: moves the target. (Sec. 3.1)"""
        self.gfl.update()


# ================================ Part II: training ================================
# The loop comes first, then its tools. torchrun starts one process for each GPU, numbered by rank.
# Each takes an equal share of a batch; DistributedDataParallel (DDP) averages their gradients.


class UserError(Exception):
    """Something that a user can fix: one sentence that says what, where and what to do."""
    code = 2  # of the program's exit


class Stopped(UserError):
    """The run was told to stop, and has saved."""
    code = 143


def seed_of(*key) -> int:
    """A seed of 32 bits from a key. All that training draws has one, so a checkpoint needs no state
    of a generator, and the number of loader workers changes nothing."""
    return zlib.crc32(repr(key).encode())


def pretrain(args, world: World) -> None:
    """SimFLE on pictures without labels. (Sec. 4.1)"""
    data, folder = find_data(args.data), Path("runs", args.name)
    paths = find_pictures(data / "train" if (data / "train").is_dir() else data)
    faces = Faces(paths, args.seed, args.ffl_size, args.view_size, 2, args.crop_min)
    colours = colours_of(data, world.device)
    torch.manual_seed(args.seed)
    model = MODELS[args.model](args).to(world.device, memory_format=torch.channels_last)

    def step(net: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        v1, v2 = (augment(batch["views"][:, k], colours) for k in (0, 1))
        return net(v1, v2, normalise(batch["image"], colours))

    def on_save(done: int) -> None:
        backbone = {k: v.cpu() for k, v in model.backbone.state_dict().items()}
        save_whole(folder / "backbone.pt", backbone)
        save_whole(folder / "settings.json", vars(args) | {"done": done, "processes": world.size})

    fit(args, world, model, model, faces, step, folder, on_save=on_save,
        colours=colours.flatten().tolist())


def fit(args, world: World, model: nn.Module, trained: nn.Module, faces: Faces, step, folder: Path,
        suffix: str = "", cosine: bool = True, weights: Tensor | None = None,
        on_save=lambda done: None, **more) -> None:
    """Trains and resumes, for pre-training and evaluation. (Sec. 4.1)

    `step(net, batch)` returns a dict of tensors with `loss`. DDP wraps `trained`: here `model`,
    other callers may pass a part. `weights` is for `batches`, `more` for the identity."""
    per_rank = min(args.batch_size, len(faces)) // world.size
    batch = per_rank * world.size  # real batch; departure 8: 255 on 3 ranks, no smaller last one
    if per_rank < 2:
        raise UserError(f"{batch} images a step are too few: BatchNorm needs two on each of "
                        f"{world.size} processes; give more pictures or a larger --batch-size")
    per_epoch = len(faces) // batch
    last = args.steps or args.epochs * per_epoch
    peak = args.lr * batch / 256  # ours: in proportion to the batch
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=peak, momentum=0.9, weight_decay=args.weight_decay,
                                fused=True)
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / f"checkpoint{suffix}.pt", folder / f"log{suffix}.jsonl"
    same = identity(args, faces, batch) | more
    first = resume(args, world, model, optimizer, same, path)
    if first > last:
        raise UserError(f"{path} has {first:,} steps, {last:,} are asked for; --fresh starts over")
    if world.rank == 0:
        print(f"{path}: {len(faces):,} pictures, steps {first:,} to {last:,} of {batch} images on "
              f"{world.size} × {world.device.type}{' in bf16' if args.bf16 else ''}", flush=True)
        if first == 0:
            log.unlink(missing_ok=True)
    # Departure 9: DDP (authors: DataParallel); BatchNorm per rank. `find_unused_parameters` keeps
    # DDP from rebuilding its buckets after a first step: resumed runs add in the same order.
    net = trained if world.size == 1 else nn.parallel.DistributedDataParallel(
        trained, find_unused_parameters=True)
    mine = batches(len(faces), per_rank, range(first, last), args.seed, world, weights)
    loader = DataLoader(faces, batch_sampler=mine, num_workers=args.workers,
                        worker_init_fn=ignore_signals, pin_memory=world.device.type == "cuda")
    with stop_signals() as stop:
        began = time.perf_counter()
        for i, inputs in enumerate(loader, first):
            torch.manual_seed(seed_of(args.seed, "step", i, world.rank))
            # Departure 10: the cosine is taken by step. (Authors: by epoch.)
            lr = peak * (0.5 * (1 + math.cos(math.pi * i / last)) if cosine else 1)
            optimizer.param_groups[0]["lr"] = lr
            inputs = {k: v.to(world.device, non_blocking=True) for k, v in inputs.items()}
            with torch.autocast(world.device.type, torch.bfloat16, enabled=args.bf16):
                out = step(net, inputs)
            out["loss"].backward()
            out["gradient"] = nn.utils.get_total_norm([p.grad for p in parameters
                                                       if p.grad is not None])
            out["stop"] = torch.full((), float(len(stop)), device=world.device)
            values = mean_over_ranks(out, world)
            if not math.isfinite(values["loss"] + values["gradient"]):
                raise UserError(f"loss or gradient of step {i + 1:,} is not finite: a lower --lr "
                                f"may help, or if it does not then a new start by --fresh")
            optimizer.step()
            optimizer.zero_grad()
            if hasattr(model, "update"):
                model.update()

            done, stopping = i + 1, values.pop("stop") > 0
            due = done == last or stopping
            if world.rank == 0 and (due or done % args.log_every == 0):
                speed = (done - first) / (time.perf_counter() - began)
                report(log, {"step": done, "epoch": i // per_epoch + 1, "lr": lr} | values,
                       f"{speed * batch:.0f} images/s, {(last - done) / speed / 60:.0f} min left")
            if world.rank == 0 and (due or done % args.save_every == 0):
                on_save(done)
                save_whole(path, dict(step=done, model=model.state_dict(), same=same,
                                      optimizer=optimizer.state_dict()))
            if stopping:
                if world.size > 1:
                    dist.barrier()  # until rank 0 has saved
                raise Stopped(f"stopped after step {done:,}; the same command (no --fresh) resumes")


def mean_over_ranks(out: dict[str, Tensor], world: World) -> dict[str, float | list[float]]:
    """Means over the ranks, as plain numbers. Only here a step waits for its device."""
    flat = torch.cat([v.detach().float().flatten() for v in out.values()])
    if world.size > 1:
        dist.all_reduce(flat)
    parts = (flat / world.size).cpu().split([v.numel() for v in out.values()])
    return {k: p.tolist() if out[k].ndim else p.item() for k, p in zip(out, parts)}


def report(log: Path, line: dict, speed: str) -> None:
    """Logs and prints a line. After a resume a step may stand in the log twice."""
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")
    shown = (f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float))
    print(f"step {line['step']:,}", *shown, speed, sep="  ", flush=True)


# ===== Checkpoints =====
# Rank 0 alone reads and writes them. On CPUs, with as many processes, a run that was killed and
# resumed ends with the same bits as one that was not.

FREE = {"data", "name", "run", "fresh", "epochs", "steps", "lr", "weight_decay", "batch_size",
        "workers", "save_every", "log_every"}  # may change, the real batch may not


def identity(args, faces: Faces, batch: int) -> dict:
    """What must be equal to resume: settings that are not FREE, the real batch, the pictures. In an
    evaluation also rate, length and decay: a result must be that of its settings."""
    free = FREE - {"epochs", "steps", "lr", "weight_decay"} if args.eval else FREE
    same = {k: v for k, v in vars(args).items() if k not in free}
    return same | {"batch": batch, "pictures": len(faces), "their names and sizes": files_of(faces)}


def files_of(faces: Faces) -> int:
    """A checksum of the pictures' names, sizes and labels, wherever their folder lies."""
    files = [(os.path.basename(p), os.path.getsize(p)) for p in faces.paths]
    return seed_of(files, faces.labels)


def resume(args, world: World, model: nn.Module, optimizer: torch.optim.SGD, same: dict,
           path: Path) -> int:
    """Fills rank 0's model (DDP sends it to all) and every rank's momentum. Returns steps done."""
    parameters = optimizer.param_groups[0]["params"]
    momentum = [torch.zeros_like(p) for p in parameters]  # zeros at the start, as in SGD itself
    told = [0, ""]  # steps and trouble, from rank 0 to all
    if world.rank == 0 and args.fresh:
        path.unlink(missing_ok=True)
    if world.rank == 0 and path.exists():
        try:
            saved = load_file(path)
            was = saved.get("same", {})
            odd = [f"{k} was {was.get(k)!r}, is {v!r}" for k, v in same.items() if was.get(k) != v]
            if odd:
                raise UserError(f"{path} is of another run ({'; '.join(odd)}): give another "
                                f"--{'tag' if args.eval else 'name'}, or --fresh to start over")
            model.load_state_dict(saved["model"])
            for k, buffer in enumerate(momentum):
                buffer.copy_(saved["optimizer"]["state"][k]["momentum_buffer"])
            told[0] = saved["step"]
        except UserError as error:
            told[1] = str(error)
        except RuntimeError as error:  # of load_state_dict
            told[1] = f"{path} does not fit the code, --fresh starts over ({error!r:.200})"
    if world.size > 1:
        dist.broadcast_object_list(told, device=world.device)
        for buffer in momentum:
            dist.broadcast(buffer, 0)
    if told[1]:
        raise UserError(told[1])
    for p, buffer in zip(parameters, momentum):
        optimizer.state[p]["momentum_buffer"] = buffer
    return told[0]


def save_whole(path: Path, content: dict) -> None:
    """Writes a .pt or .json. A crash leaves the old file or the new one, never half of one."""
    part = path.with_suffix(path.suffix + ".part")
    with open(part, "wb") as file:
        if path.suffix == ".json":
            file.write(json.dumps(content, indent=1).encode())
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load_file(path: Path) -> dict:
    """Loads a file of `torch.save` to the CPU, without running code that it may carry."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{path} is missing or cannot be read ({error}); check --init and --name")
    except Exception as error:  # zip, pickle, end of file: torch raises many kinds
        saved = error
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds no dict of weights ({type(saved).__name__}); expected is a "
                        f"state dict and nothing that needs code to load, as torch.save writes it")
    return saved


# ===== What a run starts from =====


def make_resnet(arch: str, width: int = 32) -> nn.Module:
    """A new torchvision ResNet, or `small` (ours): one block a stage, stride 16, a laptop's."""
    if arch != "small":
        return torchvision.models.get_model(arch)
    kind = torchvision.models.resnet.BasicBlock
    net = torchvision.models.ResNet(kind, [1, 1, 1, 1])
    net.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    net.bn1, net.inplanes = nn.BatchNorm2d(width), width
    for stage, stride in enumerate((1, 2, 2, 1)):
        setattr(net, f"layer{stage + 1}", net._make_layer(kind, width << stage, 1, stride))
    net.fc = nn.Linear(8 * width, 1000)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):  # as torchvision starts its own
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


def load_backbone(resnet: nn.Module, init: str | Path, arch: str) -> dict:
    """Takes off a ResNet's `fc` and fills the rest: `random`, `imagenet`, a backbone.pt or a
    classifier. Returns what the file holds."""
    resnet.fc = nn.Identity()
    if init == "random":
        return {}
    saved = (torchvision.models.get_model(arch, weights="IMAGENET1K_V1").state_dict()
             if init == "imagenet" else load_file(Path(init)))
    state = saved["model"] if isinstance(saved.get("model"), dict) else saved
    try:
        resnet.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    except (AttributeError, RuntimeError) as error:
        raise UserError(f"{init} holds {', '.join(map(str, [*state][:2]))} and so on; expected is "
                        f"the whole state dict of a torchvision {arch}, such as a run's backbone.pt"
                        f" ({' '.join(str(error).split())[:200]})") from None
    return saved


# ===== Pictures =====
# A loader worker decodes, crops and resizes. All else is done on the batch, on its device.

HERE = Path(globals().get("__file__", "simfle.py")).resolve().parent  # a notebook has no file
AFFECTNET = {"mean": (0.5795, 0.4522, 0.3957), "std": (0.2769, 0.2473, 0.2412)}  # (authors)


def find_data(name: str) -> Path:
    """The folder that --data means: a path, or a name in data/."""
    for folder in (Path(name), HERE / "data" / name):
        if folder.is_dir():
            return folder
    raise UserError(f"there is no folder {name}, here or in {HERE / 'data'}; data/README.md says "
                    f"how to make the paper's")


def find_pictures(folder: Path) -> list[str]:
    """All pictures below a folder, at any depth, sorted. (Departure 11: of all torchvision's kinds;
    AffectNet has .bmp and .tif too. Authors: some.)"""
    files = glob.iglob(f"{glob.escape(str(folder))}/**", recursive=True)
    found = sorted(f for f in files if f.lower().endswith(IMG_EXTENSIONS))
    if not found:
        raise UserError(f"{folder} holds no pictures ({', '.join(IMG_EXTENSIONS)}); put some in, "
                        f"or give another --data")
    return found


def colours_of(data: Path, device: torch.device) -> Tensor:
    """Mean and standard deviation of the channels, of pixels in [0, 1]: (2, 3, 1, 1). They are the
    dataset's own where it has a colours.json (FERPlus), else AffectNet's. (B.4)"""
    own = data / "colours.json"
    colours = json.loads(own.read_text()) if own.exists() else AFFECTNET
    return torch.tensor([colours["mean"], colours["std"]], device=device)[:, :, None, None]


def read_picture(path: str) -> Tensor:
    """Decodes a picture, upright, to RGB: (3, H, W) uint8."""
    with Image.open(path) as picture:
        return TF.pil_to_tensor(ImageOps.exif_transpose(picture).convert("RGB"))


def resize(x: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size). (Departure 12: a square of any picture, as in the paper.
    Authors: its short side.)"""
    return F.interpolate(x[None], size=(size, size), mode="bilinear", antialias=True)[0]


class Faces(Dataset):
    """What a step needs of one picture: `views`, crops at random (crops, 3, 224, 224), and `image`,
    the whole (3, 112, 112), both uint8; `label`. Size 0 or 0 crops leave one out. (Sec. 4.1)"""
    def __init__(self, paths: list[str], seed: int = 0, image_size: int = 0, view_size: int = 0,
                 crops: int = 0, crop_min: float = 0.08, labels: list[int] | None = None):
        self.paths, self.labels, self.seed, self.image_size = paths, labels, seed, image_size
        self.view_size, self.crops, self.crop_min = view_size, crops, crop_min

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Tensor, int]:
        """A picture and its index; in training one of the next 63 if it cannot be read."""
        for i in range(index, index + (64 if self.crops else 1)):
            i %= len(self)
            try:
                return read_picture(self.paths[i]), i
            except Exception as error:  # Pillow raises many kinds for broken files
                print(f"simfle: {self.paths[i]} cannot be read ({error})", file=sys.stderr)
        raise UserError("the pictures named above cannot be read: replace or remove them")

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        place, index = key  # the place among all images since the run began
        picture, index = self.read(index)
        torch.default_generator.manual_seed(seed_of(self.seed, "crops", place))
        item = {}
        if self.image_size:
            item["image"] = resize(picture, self.image_size)
        if self.crops:
            boxes = [RandomResizedCrop.get_params(picture, (self.crop_min, 1), (3 / 4, 4 / 3))
                     for _ in range(self.crops)]
            item["views"] = torch.stack([resize(picture[:, y:y + h, x:x + w], self.view_size)
                                         for y, x, h, w in boxes])
        if self.labels is not None:
            item["label"] = self.labels[index]
        return item


def batches(images: int, per_rank: int, steps: range, seed: int, world: World,
            weights: Tensor | None = None):
    """Yields this rank's keys of `Faces` for each step. An epoch is a permutation; with weights
    (images,) as many images are drawn with replacement, in proportion to them."""
    batch, order = per_rank * world.size, None
    for step in steps:
        epoch, k = divmod(step, images // batch)
        if order is None or k == 0:
            draw = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
            if weights is None:
                order = torch.randperm(images, generator=draw).tolist()
            else:
                order = torch.multinomial(weights, images, True, generator=draw).tolist()
        mine = range(k * batch + world.rank, (k + 1) * batch, world.size)
        yield [(epoch * images + i, order[i]) for i in mine]


# ===== Augmentation =====
# As torchvision's, on a batch x (B, 3, H, W) in [0, 1] with a factor f (B, 1, 1, 1) for each image.


def blend(x: Tensor, other: Tensor | float, f: Tensor) -> Tensor:
    """f · x + (1 − f) · other, cut to [0, 1]; beyond f = 1 it moves away from other."""
    return (f * x + (1 - f) * other).clamp(0, 1)


def shift_hue(x: Tensor, f: Tensor) -> Tensor:
    """Turns the hue by f of a full circle; `hue` counts sixths of one."""
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == r, (g - b) / safe,
                      torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)) + 6 * f
    k = torch.cat([hue + 5, hue + 3, hue + 1], dim=1) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Blurs each image by its own sigma (B,) in pixels, rows then columns; `taps` is odd."""
    B, c, H, W = x.shape
    t = torch.arange(taps, device=x.device) - taps // 2
    weight = torch.exp(-0.5 * (t / sigma[:, None]).square())
    weight = (weight / weight.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)[:, None, None]
    x = F.pad(x, [taps // 2] * 4, mode="reflect").reshape(1, B * c, H + taps - 1, W + taps - 1)
    return F.conv2d(F.conv2d(x, weight, groups=B * c), weight.mT, groups=B * c).reshape(B, c, H, W)


def normalise(x: Tensor, colours: Tensor) -> Tensor:
    """x (B, 3, H, W), uint8 or in [0, 1], to mean 0 and standard deviation 1 by `colours_of`."""
    x = x / 255 if x.dtype == torch.uint8 else x
    return ((x - colours[0]) / colours[1]).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@in_fp32
def augment(x: Tensor, colours: Tensor) -> Tensor:
    """SimCLR's augmentation (Chen et al., 2020) at strength 1, except the crop. (Sec. 4.1)

    Args:
        x: square crops (B, 3, H, H), uint8 or in [0, 1].
        colours: mean and standard deviation of the channels, of pixels in [0, 1]: (2, 3, 1, 1).
    Returns:
        (B, 3, H, H), normalised, fp32, channels last in memory.

        # needs in_fp32, blend, shift_hue, gaussian_blur, normalise
        x = torch.randint(256, (8, 3, 224, 224), dtype=torch.uint8)  # crops
        v1 = augment(x, colours=torch.full((2, 3, 1, 1), 0.5))
    """
    def chance(p: float) -> Tensor:
        return torch.rand(len(x), 1, 1, 1, device=x.device) < p

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)

    grey, size = TF.rgb_to_grayscale, x.shape[3]
    x = x / 255 if x.dtype == torch.uint8 else x
    x = torch.where(chance(0.5), x.flip(3), x)
    y = x
    for kind in torch.randperm(4).tolist():  # departure 13: one order for all (SimCLR: an image's)
        if kind == 0:  # brightness
            y = blend(y, 0.0, uniform(0.2, 1.8))
        elif kind == 1:  # contrast
            y = blend(y, grey(y).mean(dim=(1, 2, 3), keepdim=True), uniform(0.2, 1.8))
        elif kind == 2:  # saturation
            y = blend(y, grey(y), uniform(0.2, 1.8))
        else:
            y = shift_hue(y, uniform(-0.2, 0.2))
    x = torch.where(chance(0.8), y, x)
    x = torch.where(chance(0.2), grey(x), x)
    # Departure 14: blur with probability ½, as SimCLR. (Authors: always.) Sigma is SimCLR's at 224
    # pixels; ours: the same share of the picture at other sizes.
    sigma = uniform(0.1, 2.0).flatten() * size / 224
    x = torch.where(chance(0.5), gaussian_blur(x, sigma, taps=size // 10 | 1), x)
    return normalise(x, colours)


# ===== Processes =====


class World(NamedTuple):
    """This process among those that torchrun started: its rank, how many there are, its device."""
    rank: int
    size: int
    device: torch.device


def join_processes() -> World:
    """One process for each GPU under torchrun, else one alone."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK") or 0)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, PyTorch's default for convolutions
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
            raise UserError("srun started several tasks: let it start one torchrun a machine")
        return World(0, 1, device)
    if not dist.is_initialized():  # `main` may be called again
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return World(dist.get_rank(), dist.get_world_size(), device)


@contextlib.contextmanager
def stop_signals():
    """Yields a list that is no longer empty once SIGTERM or Ctrl-C came. A second Ctrl-C kills, but
    not under torchrun: it hands signals on, and a rank may hear one twice."""
    heard, before = [], {}

    def hear(kind: int, frame) -> None:
        heard.append(kind)
        if kind == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(kind, signal.SIG_DFL)

    with contextlib.suppress(ValueError):  # only a main thread can hear signals
        before |= {kind: signal.signal(kind, hear) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield heard
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def ignore_signals(worker: int) -> None:
    """For loader workers: signals reach them too, but their parent ends them."""
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, signal.SIG_IGN)


# ================================ Part III: evaluation ================================
# Trained on pictures in train/CLASS/, tested on val/CLASS/. B.1 trains a linear classifier on the
# frozen backbone, B.2 the whole net on a share of the labels, B.3 and B.4 the whole net from B.1's
# result (`--init`). Rates are per 256 images: B.1's is 2.0 for 1024.

PROTOCOLS = {"linear": dict(epochs=100, batch_size=1024, lr=0.5, weight_decay=0.0),
             "semi": dict(epochs=100, batch_size=512, lr=0.025, weight_decay=1e-4),
             "finetune": dict(epochs=100, batch_size=512, lr=0.0005, weight_decay=1e-4)}


def labelled(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """Classes (the folders' names), paths and labels of a split."""
    classes = sorted(p.name for p in folder.glob("[!.]*") if p.is_dir())
    if len(classes) < 2:
        raise UserError(f"{folder} needs a folder of pictures for each of two or more classes")
    found = [find_pictures(folder / name) for name in classes]
    return classes, sum(found, []), [i for i, paths in enumerate(found) for _ in paths]


def share_of_labels(labels: list[int], share: float, seed: int) -> list[int]:
    """Indices of the images that keep their labels. (B.2; departure 15: the same share of every
    class; the paper does not say.)"""
    if not 0 < share <= 1:
        raise UserError(f"--labels {share:g} is no share: 0.1 is 10 % of the labels")
    draw, chosen = torch.Generator().manual_seed(seed_of(seed, "labels")), []
    order = torch.randperm(len(labels), generator=draw).tolist()
    for label in set(labels):
        mine = [i for i in order if labels[i] == label]
        chosen += mine[:max(1, round(share * len(mine)))]
    return sorted(chosen)


def read_splits(args, data: Path) -> tuple[list[str], Faces, Faces]:
    """The classes, the pictures to train on and those to test on."""
    classes, paths, labels = labelled(data / "train")
    val_classes, val_paths, val_labels = labelled(data / "val")
    if val_classes != classes:
        raise UserError(f"{data}/train has the classes {', '.join(classes)}, {data}/val has "
                        f"{', '.join(val_classes)}: both must have the same")
    if args.eval == "semi":
        chosen = share_of_labels(labels, args.labels, args.seed)
        paths, labels = [paths[i] for i in chosen], [labels[i] for i in chosen]
    return (classes, Faces(paths, args.seed, 0, args.view_size, 1, args.crop_min, labels),
            Faces(val_paths, image_size=args.view_size, labels=val_labels))


def start_classifier(args, init: str | Path, classes: list[str]) -> nn.Module:
    """A ResNet with a new head (authors: standard deviation 0.01), or in fine-tuning the file's."""
    torch.manual_seed(args.seed)
    net = make_resnet(args.arch)
    head = nn.Linear(net.fc.in_features, len(classes))
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    saved = load_backbone(net, init, args.arch)
    net.fc, known = head, saved.get("classes", [])
    if args.eval == "finetune":
        if sorted(known) != sorted(classes):
            raise UserError(f"fine-tuning starts from a linear result (B.3) with the classes "
                            f"{', '.join(classes)}, but {init} has {', '.join(known) or 'none'}: "
                            f"make one with --eval linear, and give its .pt as --init")
        order = [known.index(c) for c in classes]
        head.load_state_dict({k: saved["model"][f"fc.{k}"][order] for k in ("weight", "bias")})
    return net


def evaluate(args, world: World) -> dict:
    """One protocol of Supplement B on one dataset. (Sec. 4.2, B)

    Departure 16: all that is trained has BatchNorm in train mode; the paper does not say for B.2 to
    B.4. Departure 17: the last epoch counts. (Authors: the best on the test pictures.)"""
    data, folder = find_data(args.data), Path("runs", args.name)
    classes, train, val = read_splits(args, data)
    init = args.init or folder / "backbone.pt"  # its checksum is part of the identity
    args.start_weights = zlib.crc32(Path(init).read_bytes()) if os.path.isfile(init) else str(init)
    net = start_classifier(args, init, classes)
    net.to(world.device, memory_format=torch.channels_last)
    colours, frozen = colours_of(data, world.device), args.eval == "linear"
    test(args, world, net, val, colours, len(classes))  # an unreadable picture ends it now
    net.train(not frozen).requires_grad_(not frozen)
    net.fc.requires_grad_()

    def step(trained: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x, label = normalise(batch["views"][:, 0], colours), batch["label"]
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        logits = trained(x).float()
        return {"loss": F.cross_entropy(logits, label),
                "accuracy": (logits.argmax(dim=1) == label).float().mean()}

    name = "-".join(filter(None, (args.eval, os.path.basename(os.path.abspath(data)), args.tag)))
    rarity = 1 / torch.bincount(torch.tensor(train.labels)).double()
    fit(args, world, net, net, train, step, folder, f"-{name}",
        cosine=not frozen, weights=rarity[train.labels] if args.oversample else None,
        classes=classes, test_pictures=files_of(val), colours=colours.flatten().tolist())
    confusion = test(args, world, net, val, colours, len(classes))
    per_class = 100 * confusion.diag() / confusion.sum(dim=1)
    result = dict(accuracy=100 * (confusion.trace() / confusion.sum()).item(),
                  mean_accuracy=per_class.mean().item(), classes=classes,
                  per_class=per_class.tolist(), confusion=confusion.tolist(), settings=vars(args))
    if world.rank == 0:
        state = {k: v.cpu() for k, v in net.state_dict().items()}
        save_whole(folder / f"{name}.pt", dict(model=state, classes=classes, arch=args.arch,
                                               size=args.view_size, colours=colours.cpu()))
        save_whole(folder / f"{name}.json", result)
        print(f"{folder / name}: {result['accuracy']:.2f} % of {len(val):,} test images, mean of "
              f"the classes {result['mean_accuracy']:.2f} %")
    return result


@torch.no_grad()
def test(args, world: World, net: nn.Module, faces: Faces, colours: Tensor, classes: int) -> Tensor:
    """The confusion matrix (classes, classes) over all ranks; rows are the true classes."""
    net.eval()
    if world.size > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)  # rank 0's BatchNorm statistics
    confusion = torch.zeros(classes**2, device=world.device)
    mine = [(0, i) for i in range(world.rank, len(faces), world.size)]
    loader = DataLoader(faces, batch_size=256, sampler=mine, num_workers=args.workers,
                        worker_init_fn=ignore_signals)
    for batch in loader:
        logits = net(normalise(batch["image"].to(world.device), colours))
        cell = batch["label"].to(world.device) * classes + logits.argmax(dim=1)
        confusion += torch.bincount(cell, minlength=classes**2)
    if world.size > 1:
        dist.all_reduce(confusion)
    return confusion.cpu().double().reshape(classes, classes)


# ================================ Settings and main ================================


def build_simfle(args) -> SimFLE:
    """The model that the settings describe."""
    resnet = make_resnet(args.arch)
    backbone = make_backbone(resnet)  # first: the next line takes `fc` off
    load_backbone(resnet, args.init or "random", args.arch)
    gfl = BYOL(backbone, args.hidden, args.outputs, args.tau)
    ffl = FaceMAE(backbone.channels, args.groups, args.mask_ratio, args.kappa, args.ffl_size,
                  args.patch, norm_pix=args.norm_pix, **VITS[args.vit])
    return SimFLE(gfl, ffl, args.hidden, args.outputs, args.alpha, args.beta, args.temperature)


# data/baselines.py adds others: args -> a module with `forward(v1, v2, I)`, which returns a dict of
# tensors with `loss`; with `backbone`, of `make_backbone`; and with `update()` if it has a target.
MODELS = {"simfle": build_simfle}
VITS = {"base": {}, "tiny": dict(width=128, depth=4, heads=4, decoder_width=64, decoder_depth=2,
                                 decoder_heads=4)}
PRESETS = {"paper": {}, "laptop": dict(
    arch="small", vit="tiny", view_size=64, ffl_size=56, patch=8, hidden=512, batch_size=32,
    lr=0.8, epochs=8, crop_min=0.3)}


def read_settings(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, on top of the protocol, the run or preset, and the paper's defaults."""
    parser = argparse.ArgumentParser(description="SimFLE (defaults: the paper's pre-training)",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", help="a folder of pictures, or its name in data/")
    add("--name", help="of the run in runs/; default: the data's")
    add("--preset", default="paper", choices=PRESETS, help="laptop: small nets and pictures (ours)")
    add("--model", default="simfle", choices=MODELS, help="what is pre-trained")
    add("--eval", nargs="?", const="linear", choices=PROTOCOLS, help="evaluate a run (B)")
    add("--fresh", action="store_true", help="start over where there is a checkpoint")
    add("--init", default="", help="random, imagenet or a file; --eval linear and semi: the run's")
    add("--epochs", type=int, default=100, help="passes over the pictures (4.1)")
    add("--steps", type=int, default=0, help="steps in place of epochs")
    add("--batch-size", type=int, default=256, help="images a step, over all processes (4.1)")
    add("--lr", type=float, default=0.05, help="learning rate per 256 images (4.1)")
    add("--weight-decay", type=float, default=1e-4, help="(4.1)")
    add("--bf16", action="store_true", help="autocast to bf16 (ours): faster, noisier gradients")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--view-size", type=int, default=224, help="pixels a side of a view (4.1)")
    add("--ffl-size", type=int, default=112, help="pixels a side of FaceMAE's image (4.1)")
    add("--crop-min", type=float, default=0.08, help="least share that a crop covers (SimCLR)")
    add("--arch", default="resnet50", help="a torchvision ResNet, or small (4.1)")
    add("--vit", default="base", choices=VITS, help="size of the autoencoder (4.1)")
    add("--hidden", type=int, default=4096, help="hidden width of the heads (authors)")
    add("--outputs", type=int, default=256, help="output width of the heads (authors)")
    add("--tau", type=float, default=0.99, help="EMA decay of the target, τ (authors)")
    add("--groups", type=int, default=32, help="channel groups, N_g (4.1)")
    add("--mask-ratio", type=float, default=0.75, help="share of masked patches, γ (4.1)")
    add("--patch", type=int, default=16, help="pixels a side of a patch, s (4.1)")
    add("--norm-pix", action=argparse.BooleanOptionalAction, default=True, help="per patch (MAE)")
    add("--kappa", type=float, default=0.02, help="weight of the refinement, κ (ours)")
    add("--alpha", type=float, default=0.3, help="weight of L_d, which is t² times Eq. 5 (4.3)")
    add("--beta", type=float, default=0.03, help="weight of L_g, which is Eq. 2 over c′ (4.3)")
    add("--temperature", type=float, default=4.0, help="of the distillation, t (3.3)")
    add("--labels", type=float, default=0.01, help="share of the labels for --eval semi (B.2)")
    add("--oversample", action="store_true", help="every class equally often (Table 2)")
    add("--tag", default="", help="added to the names of an evaluation's files")
    add("--workers", type=int, default=min(8, os.cpu_count()
        // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)), help="loader workers of a process")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--log-every", type=int, default=20, help="steps between lines of the log")
    args = parser.parse_args(argv)  # tells the run and the protocol, which set defaults for below
    if not (args.data or args.eval and args.name):
        raise UserError("--data is missing: give a folder of faces, or run `python data/demo.py`")
    name = args.name or os.path.basename(os.path.abspath(args.data))
    run = Path("runs", name, "settings.json")
    if args.eval and run.exists():  # data, net and crops are those of the run
        trained = json.loads(run.read_text())
        inherited = {k: trained[k] for k in ("data", "arch", "view_size", "crop_min")}
        parser.set_defaults(**inherited, run=trained)  # `run` goes into the result
    elif args.eval and not args.data:
        raise UserError(f"{run} is missing: pre-train first, or give --data and --init")
    else:
        parser.set_defaults(**PRESETS[args.preset])
    parser.set_defaults(name=name, **PROTOCOLS.get(args.eval, {}))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit code."""
    try:
        args, world = read_settings(argv), join_processes()
        (evaluate if args.eval else pretrain)(args, world)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        fixable = isinstance(error, UserError)
        if not fixable:
            traceback.print_exc()
        elif int(os.environ.get("LOCAL_RANK") or 0) == 0:  # loader workers add a traceback
            print(f"simfle: {str(error).strip().split('UserError: ')[-1]}", file=sys.stderr)
        else:
            time.sleep(2)  # if it ended first, torchrun would end rank 0 before that tells
        traceback.clear_frames(error.__traceback__)  # they hold loader workers, which would stay
        return error.code if fixable else 1


def leave(code: int) -> None:
    """Ends the process at once, without waiting for workers or for other ranks."""
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook
    leave(main())
