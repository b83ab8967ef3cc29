"""Tests of simfle.py. Each is a sentence about the method or the program, with the equation.

    python -m pytest test_simfle.py

Formulas are checked against slow, obvious versions of themselves; the program is run as users run
it, with tiny nets. What takes longer is marked `slow` and runs with `-m slow`.
"""

import ast
import contextlib
import copy
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

import simfle as S

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "data"))
import baselines as M
import benchmark as B
import figures as D
import prepare as R
import probe as P
import toy as Y

TINY = ["--preset", "laptop", "--batch-size", "12", "--view-size", "32", "--ffl-size", "28",
        "--patch", "4", "--hidden", "32", "--outputs", "16", "--workers", "1", "--log-every", "1",
        "--lr", "0.4"]
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)


def not_unless_slow(request):
    """Cases that are marked slow run with `-m slow` alone."""
    if request.node.get_closest_marker("slow") and "slow" not in request.config.option.markexpr:
        pytest.skip("runs with -m slow")


torch.set_num_threads(1)  # tiny nets: a second thread would cost more than it does
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings(argv):
    return S.read_settings(S.read_arguments([str(a) for a in argv]))


def small_model(**changes):
    torch.manual_seed(0)
    own = {k: changes.pop(k) for k in ("alpha", "beta", "t") if k in changes}
    gfl = S.BYOL(S.Backbone(S.small_resnet(8)), 32, 16, changes.pop("tau", 0.99))
    ffl = S.FaceMAE(64, **dict(groups=8, image_size=28, patch=4, **S.VITS["tiny"]) | changes)
    return S.SimFLE(gfl, ffl, 32, 16, **own).to(DEVICE)


def small_inputs(B=4, seed=0):
    return [seeded(B, 3, n, n, seed=seed + i).to(DEVICE) for i, n in enumerate((32, 32, 28))]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Toy faces: 66 to train on, 16 to test on."""
    folder = tmp_path_factory.mktemp("data") / "faces"
    subprocess.run([sys.executable, HERE / "data" / "toy.py", "--out", folder, "--train", "66",
                    "--val", "16", "--size", "40"], check=True)
    return folder


def run_program(*args, cwd, processes=0, timeout=600, expect=0):
    """simfle.py as users start it; its whole output."""
    launcher = (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
                if processes else [])
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, *launcher, HERE / "simfle.py", *map(str, args)], cwd=cwd,
                          env=env, timeout=timeout, text=True, capture_output=True)
    output = done.stdout + done.stderr
    assert done.returncode == expect, output
    return output


def in_process(*args, cwd, monkeypatch):
    """The same inside this process, on the CPU: only there are runs equal to the last bit."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return S.main([*map(str, args)])


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_state(one, two):
    """Bit-equality of two checkpoints: weights, target, buffers, momentum, place."""
    one, two = (torch.load(p / "checkpoint.pt", weights_only=True) for p in (one, two))
    assert one["step"] == two["step"] and one["model"].keys() == two["model"].keys()
    different = [k for k in one["model"] if not torch.equal(one["model"][k], two["model"][k])]
    momenta = [[m for m in c["momenta"] if m is not None] for c in (one, two)]
    assert len(momenta[0]) == len(momenta[1]) > 0
    different += [i for i, pair in enumerate(zip(*momenta)) if not torch.equal(*pair)]
    return not different


def complaint(args, cwd, monkeypatch, capsys):
    """Exit code 2, one sentence, no traceback; returns the sentence."""
    capsys.readouterr()
    assert in_process(*args, cwd=cwd, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("simfle: ") and "Traceback" not in error and error.count("\n") == 0
    return error


EVAL = [*TINY[:4], "--view-size", "32", "--workers", "1", "--log-every", "1", "--arch", "small"]


def colours(folder, counts, val=5, size=36, seed=0):
    """A dataset that can be learnt in no time: classes that differ in colour. Returns it."""
    generator = torch.Generator().manual_seed(seed)
    for k, (name, count) in enumerate(counts.items()):
        for split, number in (("train", count), ("val", val)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                x = torch.rand(3, size, size, generator=generator)
                x[k % 3] += 1.5 if k < 3 else -1.0
                TF.to_pil_image(x.clamp(0, 2) / 2).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a dataset of three colours and a run that was pre-trained on it."""
    cwd = tmp_path_factory.mktemp("trained")
    colours(cwd / "colours", {"0_a": 14, "1_b": 9, "2_c": 7})
    with pytest.MonkeyPatch.context() as patch:
        args = ["--data", "colours", *TINY, "--steps", "2"]
        assert in_process(*args, cwd=cwd, monkeypatch=patch) == 0
    return cwd


def result(cwd, tag, run="colours"):
    return json.loads((cwd / "runs" / run / f"eval-{tag}.json").read_text())


# ---------------------------------------------------------------- 3.1 GFL


def test_eq1_is_the_squared_distance_of_unit_vectors():
    p, z = seeded(5, 16), seeded(5, 16, seed=1)
    slow = sum(((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(p, z)) / 5
    torch.testing.assert_close(S.similarity_loss(p, z), slow)
    assert S.similarity_loss(p, p).abs() < 1e-6
    torch.testing.assert_close(S.similarity_loss(p, -p), torch.tensor(4.0))


def test_eq1_is_added_in_both_orders_and_only_the_other_view_is_the_target():
    model = small_model().gfl
    v1, v2, _ = small_inputs()
    loss, (h1, h2), z1 = model(v1, v2)
    online = [model.predictor(model.online(v)[0]) for v in (v1, v2)]
    target = [model.target(v)[0] for v in (v1, v2)]
    expected = (S.similarity_loss(online[0], target[1]) + S.similarity_loss(online[1], target[0]))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z1, model.online(v1)[0])
    torch.testing.assert_close(h2, model.online.backbone(v2)[1])


def test_views_are_normalised_apart():
    model = small_model().gfl
    v1, v2, _ = small_inputs()
    h1 = model(v1, v2)[1][0]
    torch.testing.assert_close(h1, model(v1, 5 * v2)[1][0])


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_ema_moves_every_parameter_of_the_target_and_no_buffer(tau):
    model = small_model(tau=tau)
    model(*small_inputs())
    with torch.no_grad():
        for p in model.gfl.online.parameters():
            p.add_(torch.randn_like(p))
    before = copy.deepcopy(model.gfl.target)
    model.update()
    for new, old, online in zip(model.gfl.target.parameters(), before.parameters(),
                                model.gfl.online.parameters(), strict=True):
        torch.testing.assert_close(new, tau * old + (1 - tau) * online)
    for new, old in zip(model.gfl.target.buffers(), before.buffers(), strict=True):
        assert torch.equal(new, old)


def test_target_keeps_batchnorm_statistics_of_its_own():
    model = small_model()
    with torch.no_grad():
        for p in model.gfl.target.parameters():
            p.mul_(1.5)
    model(*small_inputs())
    online, target = (dict(m.named_buffers()) for m in (model.gfl.online, model.gfl.target))
    name = "backbone.resnet.layer1.0.bn1.running_mean"
    assert not torch.allclose(online[name], target[name])
    # Two views, and for the online backbone the face besides.
    count = "backbone.resnet.bn1.num_batches_tracked"
    assert (online[count], target[count]) == (3, 2)


def test_spread_is_0_in_a_collapse_and_near_one_over_the_root_when_healthy():
    assert S.spread(torch.ones(8, 256)) == 0
    assert abs(S.spread(seeded(512, 256)) - 1 / 16) < 0.002


# ---------------------------------------------------------------- 3.2 Channel grouping, Eq. 2


def eq2(C, groups):
    """Eq. 2 as it stands: a double loop over channels. Returns the two sums, per image."""
    B, channels = C.shape[:2]
    between, within = torch.zeros(B, dtype=C.dtype), torch.zeros(B, dtype=C.dtype)
    size = channels // groups
    for b in range(B):
        for i in range(channels):
            for j in range(channels):
                ci, cj = C[b, i].flatten(), C[b, j].flatten()
                d2 = (ci @ cj / (ci.norm() * cj.norm())) ** 2
                if i // size == j // size:
                    within[b] = within[b] + d2
                else:
                    between[b] = between[b] + d2
    return between, within


@pytest.mark.parametrize("B, channels, groups, h, w", [(3, 8, 4, 2, 3), (2, 12, 3, 4, 4),
                                                       (1, 6, 1, 2, 2), (2, 6, 6, 1, 3)])
def test_eq2_by_the_gram_identity_equals_the_double_loop_in_value_and_gradient(B, channels, groups,
                                                                               h, w):
    C = seeded(B, channels, h, w).requires_grad_()
    between, within = eq2(C, groups)
    for got, slow in zip(S.pair_sums(C, groups), (between, within)):
        torch.testing.assert_close(got, slow, rtol=1e-4, atol=1e-4)
    slow = (between - within).mean() / channels
    fast = S.grouping_loss(C, groups)[0]
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(x, C)[0] for x in (fast, slow)), rtol=1e-3,
                               atol=1e-5)


def test_eq2_example_worked_by_hand_in_the_docstring():
    C = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 1]]).reshape(1, 4, 1, 2)
    between, within = S.pair_sums(C, 2)
    torch.testing.assert_close((between.item(), within.item()), (2.0, 7.0))
    torch.testing.assert_close([v.item() for v in S.grouping_loss(C, 2)], [-1.25, 2 / 8, 3 / 4])


def test_mean_d2_is_over_pairs_of_two_channels():
    C = seeded(2, 8, 2, 3)
    between, within = eq2(C, 4)
    _, D2_between, D2_within = S.grouping_loss(C, 4)
    torch.testing.assert_close(D2_between, between.mean() / (8 * 6))
    torch.testing.assert_close(D2_within, (within.mean() - 8) / (8 * 1))  # less each with itself
    C[:, 0] = 0  # a dead channel makes no pair
    pairs = torch.stack([F.cosine_similarity(C[:, i].flatten(1), C[:, i + 1].flatten(1))
                         for i in (2, 4, 6)]).square()
    torch.testing.assert_close(S.grouping_loss(C, 4)[2], pairs.mean())
    alone = torch.stack([F.cosine_similarity(C[:, 1].flatten(1), C[:, i].flatten(1))
                         for i in range(2, 8)]).square().sum()
    torch.testing.assert_close(S.grouping_loss(C, 4)[1],
                               (eq2(C[:, 2:], 3)[0].sum() + 2 * alone) / (2 * 36))
    assert abs(S.grouping_loss(C, 8)[2]) < 1e-6 and abs(S.grouping_loss(C, 1)[1]) < 1e-6


def test_channels_that_are_almost_0_do_not_rule_the_gradient_and_count_exactly():
    norms = torch.logspace(-7, -2, 8)
    C = torch.rand(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    tiny = C.clone()
    tiny[:, ::8] = norms[:, None, None] * C[:, ::8] / C[:, ::8].norm(dim=(2, 3), keepdim=True)
    C.requires_grad_(), tiny.requires_grad_()
    losses = S.grouping_loss(C, 8), S.grouping_loss(tiny, 8)
    for one, other in zip(*losses):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(loss[0], x)[0].norm(dim=(2, 3))
             for loss, x in zip(losses, (C, tiny))]
    # Where the norm is n < 0.1, the gradient is that of the same channel at a norm of 0.1.
    expected = grads[0][:, ::8] * C[:, ::8].norm(dim=(2, 3)) / 0.1
    torch.testing.assert_close(grads[1][:, ::8], expected, rtol=1e-4, atol=0)
    alive = torch.arange(64) % 8 > 0
    torch.testing.assert_close(grads[1][:, alive], grads[0][:, alive], rtol=1e-4, atol=1e-7)


def test_dead_channels_and_bf16_leave_eq2_finite_and_in_fp32():
    C = seeded(2, 8, 2, 2)
    C[:, ::2] = 0
    C.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = S.grouping_loss(C, 4)[0]
    loss.backward()
    assert C.grad.isfinite().all() and loss.dtype == torch.float32
    torch.testing.assert_close(loss, S.grouping_loss(C, 4)[0], rtol=0, atol=0)


def test_grouping_layer_starts_with_channels_that_differ():
    C = S.ChannelGrouping(16, 4)(seeded(2, 16, 4, 4))
    assert C.flatten(2).std(dim=1).mean() > 0.1 and C.min() >= 0
    with pytest.raises(ValueError, match="5 channel groups do not divide 16"):
        S.ChannelGrouping(16, 5)


# ---------------------------------------------------------------- 3.2 Semantic masking, Eq. 3


def test_eq3_scores_equal_sums_of_channels_and_loops_over_patches():
    C, group = seeded(3, 8, 4, 4), torch.tensor([1, 0, 3])
    a = S.SemanticMasking(4, 28, 4).scores(C, group)
    for b in range(3):
        total = C[b, 2 * group[b]] + C[b, 2 * group[b] + 1]
        image = F.interpolate(total[None, None], size=(28, 28), mode="bilinear")[0, 0]
        for i in range(49):
            y, x = 4 * (i // 7), 4 * (i % 7)
            expected = sum(image[y + dy, x + dx] for dy in range(4) for dx in range(4)) / 16
            torch.testing.assert_close(a[b, i], expected)


@pytest.mark.parametrize("patches, ratio, kept", [(49, 0.75, 12), (196, 0.75, 49), (50, 0.8, 10),
                                                  (49, 0.999, 1), (4, 0.01, 3)])
def test_the_lowest_scores_are_masked_and_every_patch_is_kept_or_masked(patches, ratio, kept):
    a = seeded(5, patches)
    keep, mask = S.mask_lowest(a, ratio)
    assert keep.shape == (5, kept) and (mask.sum(1) == patches - kept).all()
    for row, k, m in zip(a, keep, mask):
        masked = m.nonzero().flatten()
        assert sorted(k.tolist() + masked.tolist()) == list(range(patches))
        assert row[k].min() > row[masked].max()


def test_every_image_draws_a_group_of_its_own_and_all_alike_often():
    masking, C = S.SemanticMasking(4, 28, 4), seeded(1, 8, 4, 4).expand(400, -1, -1, -1)
    drawn = masking(C)[0]
    counts = [(drawn == masking.scores(C, torch.full((400,), g))).all(1).sum() for g in range(4)]
    assert sum(counts) == 400 and min(counts) > 50


def test_of_equal_scores_chance_decides_and_higher_ones_are_kept_all_the_same():
    a = torch.zeros(2000, 8)
    a[:, 5] = 1.0
    torch.manual_seed(0)
    keep, mask = S.mask_lowest(a, 0.75)
    assert (keep[:, 0] == 5).all() and (mask.sum(dim=1) == 6).all()
    assert torch.equal(mask, torch.ones_like(a).scatter(1, keep, 0.0))
    counts = torch.bincount(keep[:, 1], minlength=8)
    assert counts[5] == 0 and counts[torch.arange(8) != 5].min() > 220  # 286 on average


def test_bf16_does_not_change_a_mask():
    C = seeded(64, 8, 4, 4)
    masking, grouping = S.SemanticMasking(4, 28, 4), S.ChannelGrouping(8, 4)
    group = torch.arange(64) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = masking.scores(grouping(C), group)
    assert under.dtype == torch.float32
    assert torch.equal(S.mask_lowest(under, 0.75)[1],
                       S.mask_lowest(masking.scores(grouping(C), group), 0.75)[1])


# ---------------------------------------------------------------- 3.2 Trainable refinement


def test_refinement_is_zero_and_its_gradient_is_the_formula():
    a, error = seeded(3, 49).double().requires_grad_(), seeded(3, 49, seed=1).double().square()
    _, mask = S.mask_lowest(a, 0.75)
    with torch.no_grad():  # z, and the gradient that it should get, one number at a time
        z = (a - a.mean(1, keepdim=True)) / a.std(1, keepdim=True)
        wanted = torch.zeros_like(a)
        for b in range(3):
            threshold = min(z[b, i] for i in range(49) if mask[b, i] == 0)
            masked = [i for i in range(49) if mask[b, i] == 1]
            mean = sum(error[b, i] for i in masked) / len(masked)
            for i in masked:
                s = 1 / (1 + math.exp(z[b, i] - threshold))
                slope = s * (1 - s)
                wanted[b, i] = -(error[b, i] - mean) * slope / len(masked) / 3
    a32 = a.detach().float().requires_grad_()
    term = S.refinement_term(a32, mask.float(), error.float().requires_grad_())
    assert term == 0
    term.backward()
    z = (a - a.mean(1, keepdim=True)) / a.std(1, keepdim=True)
    z.backward(wanted)  # through the standardisation, by autograd
    torch.testing.assert_close(a32.grad, a.grad.float(), rtol=1e-3, atol=1e-7)


def test_refinement_raises_hard_masked_patches_sinks_easy_ones_and_ignores_kept_ones():
    a = torch.linspace(-1, 1, 49)[None].requires_grad_()
    _, mask = S.mask_lowest(a, 0.75)
    error = torch.ones(1, 49)
    error[0, 30], error[0, 31], error[0, 45] = 3.0, 0.2, 100.0  # two masked, one kept
    S.refinement_term(a, mask, error).backward()
    step = -a.grad[0]
    assert step[30] > 0 > step[31] and step[30] == step.max() and step[31] == step.min()
    other = torch.linspace(-1, 1, 49)[None].requires_grad_()
    error[0, 45] = 1.0
    S.refinement_term(other, mask, error).backward()
    torch.testing.assert_close(other.grad, a.grad)


def test_refinement_example_worked_by_hand_in_the_docstring():
    a = torch.tensor([[3.0, 2, 1, 0]], dtype=torch.float64, requires_grad=True)
    keep, mask = S.mask_lowest(a, 0.75)
    assert keep.tolist() == [[0]]
    S.refinement_term(a, mask, torch.tensor([[9.0, 4, 1, 7]])).backward()
    assert (-a.grad[0] * 1000).round().tolist() == [24, 16, -104, 64]
    r = (a.detach() - 1.5) / a.detach().std()
    soft = torch.sigmoid(r[:, :1] - r)
    down = mask * (torch.tensor([9.0, 4, 1, 7]) - 4) * soft * (1 - soft) / 3
    assert (r[0] * 100).round().tolist() == [116, 39, -39, -116]
    assert (down[0] * 1000).round().tolist() == [0, 0, -145, 81]
    for number in ("+0.024, +0.016, −0.104, +0.064", "0, 0, −0.145, +0.081", "1.16, 0.39, −0.39"):
        assert number in S.refinement_term.__doc__


@pytest.mark.parametrize("deviation", [0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_refinement_of_an_almost_constant_map_has_a_bounded_gradient(deviation):
    def gradient(deviation):
        a = seeded(2, 49)
        a = (deviation * (a - a.mean(1, keepdim=True)) / a.std(1, keepdim=True)).requires_grad_()
        _, mask = S.mask_lowest(a, 0.75)
        S.refinement_term(a, mask, seeded(2, 49, seed=1).square()).backward()
        return a.grad.norm()

    assert gradient(deviation) <= 1.001 * gradient(0.1 / 48**0.5)  # of a map at the bound


def test_kappa_0_gives_the_grouping_layer_nothing_of_the_reconstruction():
    for kappa, trained in ((0.0, False), (0.02, True)):
        model = small_model(kappa=kappa, beta=0.0, alpha=0.0)
        model(*small_inputs())["loss"].backward()
        assert bool(model.ffl.grouping.conv.weight.grad.abs().sum() > 0) == trained


def test_the_refinement_is_as_much_stronger_as_there_are_channels(monkeypatch):
    """L_g's gradient grows with c′, and one κ has to balance it for every net."""
    monkeypatch.setattr(S, "refinement_term", lambda a, mask, error: a.sum() - a.sum().detach() + 1)
    L_r = [small_model(kappa=kappa)(*small_inputs())["L_r"] for kappa in (0.5, 0)]
    torch.testing.assert_close(L_r[0] - L_r[1], torch.tensor(0.5 * 64))


# ---------------------------------------------------------------- 3.2 FaceMAE, Eq. 4


def test_patches_equal_unfold_and_come_back():
    mae, I = S.MaskedAutoencoder(28, 4, **S.VITS["tiny"]), seeded(2, 3, 28, 28)
    patches = mae.patchify(I)
    unfolded = F.unfold(I, kernel_size=4, stride=4)  # (B, colour·row·column, 49)
    expected = unfolded.reshape(2, 3, 16, 49).permute(0, 3, 2, 1).reshape(2, 49, 48)
    assert torch.equal(patches, expected)
    assert torch.equal(D.unpatchify(patches, mae), I)


def drawing_alike(run):
    """What `run()` returns when torch's generator starts from the same seed."""
    torch.manual_seed(7)
    return run()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_eq4_is_the_mean_squared_error_of_the_masked_patches(norm_pix):
    torch.manual_seed(0)
    ffl = S.FaceMAE(16, groups=4, kappa=0.0, image_size=28, patch=4, norm_pix=norm_pix,
                    **S.VITS["tiny"])
    X, I = seeded(2, 16, 4, 4), seeded(2, 3, 28, 28)
    L_r, _, tokens, logged = drawing_alike(lambda: ffl(X, I))
    _, keep, mask = drawing_alike(lambda: ffl.masking(ffl.grouping(X)))
    guess = D.unpatchify(ffl.mae.decode(ffl.mae.encode(ffl.mae.patchify(I), keep), keep), ffl.mae)
    total = count = 0
    for b in range(2):
        for i in mask[b].nonzero().flatten().tolist():
            y, x = 4 * (i // 7), 4 * (i % 7)
            true, got = I[b, :, y:y + 4, x:x + 4], guess[b, :, y:y + 4, x:x + 4]
            if norm_pix:
                true = (true - true.mean()) / (true.var() + S.PIXEL_EPS).sqrt()
            total, count = total + ((true - got) ** 2).mean(), count + 1
    assert count == 2 * 37 and tokens.shape == (2, 12, 128)
    torch.testing.assert_close(L_r, total / count)


def test_the_encoder_sees_kept_patches_alone_and_each_in_its_place():
    mae, I = S.MaskedAutoencoder(28, 4, **S.VITS["tiny"]), seeded(1, 3, 28, 28)
    keep, mask = S.mask_lowest(seeded(1, 49), 0.75)
    patches = mae.patchify(I)
    other = torch.where(mask[:, :, None] == 1, patches + 9, patches)
    torch.testing.assert_close(mae.encode(patches, keep), mae.encode(other, keep))
    # The order in which the kept patches are listed changes nothing.
    turned = keep.flip(1)
    torch.testing.assert_close(mae.decode(mae.encode(patches, keep), keep),
                               mae.decode(mae.encode(patches, turned), turned))
    # Every patch carries the position of its own place, and masked ones are told apart by it.
    slow = torch.stack([mae.embed(patches[0, i]) + mae.position[0, 1 + i] for i in keep[0]])[None]
    torch.testing.assert_close(mae.encode(patches, keep),
                               mae.encoder(torch.cat([mae.class_token, slow], 1)))
    guess = mae.decode(mae.encode(patches, keep), keep)[0, mask[0] == 1]
    assert guess.std(dim=0).mean() > 1e-3
    # Another place does.
    moved = patches.roll(1, dims=1)
    assert not torch.allclose(mae.encode(patches, keep).mean(1),
                              mae.encode(moved, (keep + 1) % 49).mean(1), atol=1e-4)


def test_positions_are_sines_and_cosines_of_column_and_row_as_in_mae_and_never_train():
    positions = S.sincos_positions(7, 16)[0]
    assert torch.equal(positions[0], torch.zeros(16))
    for row in range(7):
        for column in range(7):
            expected = []
            for coordinate in (column, row):  # the column first
                angles = [coordinate / 10_000 ** (k / 4) for k in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(positions[1 + 7 * row + column], torch.tensor(expected))
    mae = S.MaskedAutoencoder(28, 4, **S.VITS["tiny"])
    assert not mae.position.requires_grad and not mae.decoder_position.requires_grad
    with pytest.raises(ValueError, match="is not made of patches of 5"):
        S.FaceMAE(64, image_size=28, patch=5)


def test_a_block_is_attention_written_with_softmax():
    torch.manual_seed(0)
    block, x = S.Block(8, 2), seeded(2, 5, 8)
    q, k, v = (F.layer_norm(x, (8,), eps=1e-6) @ block.qkv.weight.T + block.qkv.bias).chunk(3, -1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        weights = (q[..., part] @ k[..., part].mT / 4**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    y = x + block.out(torch.cat(heads, -1))
    torch.testing.assert_close(block(x), y + block.mlp(F.layer_norm(y, (8,), eps=1e-6)))


def test_heads_blocks_and_maps_have_the_layers_of_their_papers():
    def kinds(net):
        return [type(m).__name__ for m in net.modules() if not list(m.children())]

    assert kinds(S.mlp(4, 8, 2)) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert kinds(M.two_layers(4, 2)) == ["Linear", "ReLU", "Linear"]
    assert kinds(S.Block(8, 2).mlp) == ["Linear", "GELU", "Linear"]
    projector = gfl_of("simsiam").online.projector
    assert kinds(projector) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert not projector[-1].affine and projector[1].affine
    assert [gfl_of(n).t for n in ("moco", "mocov2", "simclr")] == [0.07, 0.2, 0.1]
    mae = small_model().ffl.mae
    weight, bound = mae.encoder[0].mlp[0].weight, (6 / (128 + 512))**0.5  # Xavier's
    assert 0.99 * bound < weight.abs().max() <= bound and not mae.encoder[0].mlp[0].bias.any()
    net, x = S.small_resnet(8).eval(), seeded(2, 3, 32, 32)
    net.fc = nn.Identity()
    torch.testing.assert_close(S.feature_map(net, x).mean((2, 3)), net(x))
    model = small_model()
    model(*small_inputs())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------- 3.3 Connection and total loss


def test_eq5_is_the_divergence_from_a_constant_mean_times_t_squared():
    zs, t = [seeded(4, 6, seed=i).requires_grad_() for i in range(3)], 4.0
    loss = S.distillation_loss(zs, t)
    slow, mean = 0.0, sum(z.detach() for z in zs) / 3
    for z in zs:
        for b in range(4):
            teacher, student = (mean[b] / t).softmax(0), (z[b] / t).softmax(0)
            slow = slow + t**2 * (teacher * (teacher / student).log()).sum() / 4
    torch.testing.assert_close(loss, slow)
    for got, expected in zip(torch.autograd.grad(loss, zs), torch.autograd.grad(slow, zs)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_eq6_weighs_the_losses():
    parts = small_model(alpha=0.5, beta=0.2)(*small_inputs())
    expected = parts["L_s"] + parts["L_r"] + 0.5 * parts["L_d"] + 0.2 * parts["L_g"]
    torch.testing.assert_close(parts["loss"].detach(), expected)


WHO = {  # the table of Part I: which losses reach which parts
    "backbone": ("L_s", "L_d"), "projector": ("L_s",), "predictor": ("L_s",),
    "grouping": ("L_r", "L_g"), "encoder": ("L_r", "L_d"), "decoder": ("L_r",),
    "distil": ("L_d",), "target": (),
}


def test_the_table_of_who_trains_whom():
    model = small_model(t=2.0)
    mae = model.ffl.mae
    parts = dict(backbone=model.backbone.parameters(),
                 projector=model.gfl.online.projector.parameters(),
                 predictor=model.gfl.predictor.parameters(),
                 grouping=model.ffl.grouping.parameters(),
                 encoder=[*mae.embed.parameters(), mae.class_token, *mae.encoder.parameters()],
                 decoder=[*mae.decoder_embed.parameters(), mae.mask_token,
                          *mae.decoder.parameters(), *mae.to_pixels.parameters()],
                 distil=[*model.distil_m.parameters(), *model.distil_v.parameters()],
                 target=model.gfl.target.parameters())
    parts = {name: list(ps) for name, ps in parts.items()}
    trained = [p for ps in parts.values() for p in ps]
    fixed = {id(p) for p in (mae.position, mae.decoder_position)}
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()} - fixed
    v1, v2, I = small_inputs()
    L_s, (h1, h2), _ = model.gfl(v1, v2)
    with torch.no_grad():
        X, _ = model.backbone(I)
    L_r, L_g, tokens, _ = drawing_alike(lambda: model.ffl(X, I))
    L_d = S.distillation_loss([model.distil_m(tokens.mean(1)), model.distil_v(h1),
                               model.distil_v(h2)], t=2.0)
    torch.testing.assert_close(L_g, S.grouping_loss(model.ffl.grouping(X), 8)[0])
    # The pieces above are what forward adds up.
    whole = drawing_alike(lambda: copy.deepcopy(model)(v1, v2, I))
    torch.testing.assert_close(whole["loss"], L_s + L_r + 0.3 * L_d + 0.03 * L_g)
    for name, loss in dict(L_s=L_s, L_r=L_r, L_d=L_d, L_g=L_g).items():
        for part, params in parts.items():
            leaves = [p for p in params if p.requires_grad]
            grads = (torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
                     if leaves else [])
            if name in WHO[part]:  # some of a part may sit behind a ReLU; the part as a whole moves
                assert sum(g.abs().sum() for g in grads if g is not None) > 0, (name, part)
            else:
                assert all(g is None for g in grads), (name, part)


def test_forward_alone_reaches_what_the_table_says():
    """The same, through SimFLE.forward: X must not carry L_r, L_g or the encoder's L_d back."""
    model = small_model(alpha=0.0)
    v1, v2, I = small_inputs()
    loss = model(v1, v2, I)["loss"]
    got = torch.autograd.grad(loss, list(model.backbone.parameters()))
    other = small_model(alpha=0.0)
    other.load_state_dict(model.state_dict())
    expected = torch.autograd.grad(other.gfl(v1, v2)[0], list(other.backbone.parameters()))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_face_moves_the_running_statistics_third():
    model = small_model()
    v1, v2, I = small_inputs()
    alone = copy.deepcopy(model.backbone)
    model(v1, v2, I)
    with torch.no_grad():
        for x in (v1, v2, I):
            alone(x)
    for (name, a), b in zip(model.backbone.named_buffers(), alone.buffers()):
        torch.testing.assert_close(a, b, msg=name)


# ---------------------------------------------------------------- Counts


def test_losses_pass_gradcheck_in_float64():
    p, z = seeded(2, 3, 5).double().requires_grad_().unbind()
    assert torch.autograd.gradcheck(S.similarity_loss, (p, z))
    C = seeded(2, 4, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda C: S.grouping_loss(C, 2)[0], C)
    # z̄ is a constant for autograd; without that its gradients would cancel, as differences do.
    zs = seeded(3, 2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda zs: S.distillation_loss(list(zs)), zs)


def test_pieces_keep_float64_and_lift_bf16_and_half_to_fp32():
    def pieces(x):
        C, a = x.reshape(2, 8, 2, 3).abs(), x.reshape(2, 48)
        _, mask = S.mask_lowest(a, 0.75)
        yield S.similarity_loss(a, a.flip(0))
        yield S.spread(a)
        yield from S.grouping_loss(C, 4)
        yield S.refinement_term(a, mask, a.square())
        yield S.distillation_loss([a, a.flip(0)])
        yield M.nt_xent(a, a.flip(0), 0.1)
        yield S.SemanticMasking(4, 28, 4)(C)[0]

    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.half, torch.float32),
                        (torch.float32, torch.float32), (torch.float64, torch.float64)):
        x = seeded(96).to(dtype)
        for piece, same in zip(pieces(x), pieces(x.double())):
            assert piece.dtype == kept
            if piece.ndim == 0:
                torch.testing.assert_close(piece.double(), same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.half])
def test_a_whole_model_in_another_precision_runs_or_says_what_it_needs(dtype):
    model = small_model().to(dtype)
    inputs = [x.to(dtype) for x in small_inputs()]
    parts = model(*inputs)
    parts["loss"].backward()
    wanted = torch.promote_types(dtype, torch.float32)
    assert parts["loss"].isfinite() and parts["loss"].dtype == wanted
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if dtype == torch.float64:
        model.update()
        expected, double = small_model(), small_model().double()
        expected = drawing_alike(lambda: expected(*small_inputs()))
        for name, value in drawing_alike(lambda: double(*inputs)).items():
            torch.testing.assert_close(value.float(), expected[name], rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="an EMA needs weights in fp32"):
            model.update()


def test_paper_model_has_the_counts_of_parameters_and_arithmetic():
    torch.manual_seed(0)
    model = S.SimFLE()

    def count(parameters):
        return sum(p.numel() for p in parameters)

    assert count(model.parameters()) == 197_601_920
    assert count(p for p in model.parameters() if p.requires_grad) == 164_580_160
    assert count(model.gfl.online.parameters()) == count(model.gfl.target.parameters())
    assert count(model.gfl.online.parameters()) == 32_957_760
    assert count(model.ffl.parameters()) == 115_920_128
    v, I = torch.zeros(2, 3, 224, 224), torch.zeros(2, 3, 112, 112)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        model(v, v, I)
    with torch.no_grad(), FlopCounterMode(display=False) as gfl:
        model.gfl(v, v)
    gmac = [c.get_total_flops() / 2 / 2 / 1e9 for c in (whole, gfl)]  # 2 flops a MAC, 2 images
    assert [round(g, 1) for g in gmac] == [20.0, 16.4]
    with torch.no_grad():
        assert model.backbone(I)[0].shape == (2, 2048, 4, 4)
        assert model.backbone(v)[0].shape == (2, 2048, 7, 7)


def test_the_laptop_preset_has_a_map_of_4_by_4_and_7_by_7_patches():
    s = settings([])
    model = S.build_model(s)
    X, pooled = model.backbone(torch.zeros(2, 3, s.ffl_size, s.ffl_size))
    assert X.shape[2:] == (4, 4) and model.ffl.mae.grid == 7 and pooled.shape[1] == X.shape[1]


def test_options_reach_the_model_and_the_defaults_are_the_papers():
    model = S.build_model(settings([
        *TINY, "--tau", 0.5, "--alpha", 0.7, "--beta", 0.2, "--temperature", 2, "--mask-ratio", 0.5,
        "--kappa", 0, "--no-norm-pix"]))
    assert (model.gfl.tau, model.alpha, model.beta, model.t) == (0.5, 0.7, 0.2, 2.0)
    ffl = model.ffl
    assert (ffl.masking.ratio, ffl.kappa, ffl.mae.norm_pix) == (0.5, 0, False)
    s = settings(["--data", "affectnet"])
    assert (s.epochs, s.batch_size, s.lr, s.momentum, s.weight_decay) == (100, 256, 0.05, 0.9, 1e-4)
    assert (s.hidden, s.outputs, s.kappa, s.steps) == (4096, 256, 0.02, 0)
    assert (s.groups, s.mask_ratio, s.patch, s.alpha, s.beta, s.temperature) == (32, 0.75, 16, 0.3,
                                                                                 0.03, 4.0)
    assert (s.view_size, s.ffl_size, s.arch, s.vit, s.crop_min) == (224, 112, "resnet50", "base",
                                                                    0.08)


def test_part_1_pasted_into_an_empty_module_runs_and_knows_nothing_of_the_rest():
    source = (HERE / "simfle.py").read_text()
    imports = source[source.index("from __future__"):source.index("# ====")]
    part = source[source.index("# ================================ Part I: "):
                  source.index("# ================================ Part II: ")]
    names = {}
    exec(compile(imports + part, "pasted", "exec"), names)
    torch.manual_seed(0)
    model = names["SimFLE"](names["BYOL"](names["Backbone"](S.small_resnet(8)), 8, 4),
                            names["FaceMAE"](64, groups=4, image_size=28, patch=4,
                                             **S.VITS["tiny"]), hidden=8, outputs=4)
    model(*(x.cpu() for x in small_inputs()))["loss"].backward()
    for word in ("Settings", "World", "dist.", "Path", "cuda", "open(", "os.", "print"):
        assert not re.search(r"\b" + re.escape(word), part), word


@functools.cache
def definitions():
    """What simfle.py defines at its top level, by name: the source, and the names it uses."""
    source, found = (HERE / "simfle.py").read_text(), {}
    for node in ast.parse(source).body:
        names = ([node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else
                 [n.id for n in ast.walk(node) if isinstance(n, ast.Name)
                  and isinstance(n.ctx, ast.Store)] if isinstance(node, ast.Assign) else [])
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        found |= dict.fromkeys(names, (ast.get_source_segment(source, node), used))
    return found


PIECES = ("similarity_loss", "ema_update", "BYOL", "ChannelGrouping", "grouping_loss",
          "SemanticMasking", "refinement_term", "FaceMAE", "distillation_loss", "augment")


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_pasted_into_an_empty_file_runs_its_example(piece):
    """With the imports and what the README says that it needs, no more and no less."""
    defined, needed = definitions(), {piece}
    example = re.findall(r"(?m)^ {8}(?! ).+$", re.search(r'"""(.*?)"""', defined[piece][0],
                                                       re.DOTALL)[1].split("\n\n")[-1])
    example = "\n".join(line[8:] for line in example)
    assert 2 <= example.count("\n") + 1 <= 4, example
    todo = [piece, *(n for n in re.findall(r"\w+", example) if n in defined)]
    while todo:
        name = todo.pop()
        needed.add(name)
        todo += [n for n in defined[name][1] if n in defined and n not in needed]
    row = re.search(rf"(?m)^\| `{piece}` \|(.*)\|$", (HERE / "README.md").read_text())
    assert set(re.findall(r"`(\w+)`", row[1])) == needed - {piece}, needed - {piece}
    source = (HERE / "simfle.py").read_text()
    imports = source[source.index("from __future__"):source.index("# ====")]
    pasted = "\n\n".join(dict.fromkeys(text for name, (text, _) in defined.items()
                                       if name in needed))
    exec(compile(f"{imports}\n{pasted}\n{example}", piece, "exec"), {})


def test_the_readmes_lines_bring_in_another_backbone_gfl_and_masking(toy, tmp_path, monkeypatch,
                                                                     capsys):
    made = []

    class MyGFL(S.BYOL):
        def __init__(self, backbone):
            made.append("gfl")
            super().__init__(backbone, 8, 4)

    class MyMasking(S.SemanticMasking):
        def forward(self, C):
            made.append("masking")
            return super().forward(C)

    for table in (S.RESNETS, S.GFLS, S.MASKINGS):
        monkeypatch.setitem(table, "mine", None)  # taken out again after the test
    code = re.search(r"```python\nimport simfle\n(.*?)```", (HERE / "README.md").read_text(),
                     re.DOTALL)[1]
    assert sum(bool(line.strip()) for line in code.split("\n")) <= 5 and "__main__" in code
    tiny = ["--steps", "1", *TINY]
    code = code.replace('"--data", "affectnet"', '"--data", data, *tiny')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(S, "leave", made.append)
    exec(code, dict(__name__="__main__", simfle=S,
                    MyResNet=lambda: (made.append("resnet"), S.small_resnet(8))[1],
                    MyGFL=MyGFL, MyMasking=MyMasking, tiny=tiny, data=str(toy)))
    assert {"resnet", "gfl", "masking", 0} == set(made)
    assert Path("runs/faces/backbone.pt").exists()
    del S.RESNETS["mine"]  # as in the plain program
    told = complaint(["--data", toy, "--eval"], tmp_path, monkeypatch, capsys)
    assert "--arch mine is not one of small, resnet101" in told and "own in its own script" in told
    assert D.main(["faces"]) == 2 and "own in its own script" in capsys.readouterr().err


# ---------------------------------------------------------------- 4.1 Pictures and augmentation


@pytest.mark.parametrize("size", [32, 64, 224])
def test_every_colour_and_blur_equals_torchvision_for_the_same_parameter(size):
    x = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    x[0, :, :4] = 0.5  # grey pixels have no hue
    level, strong, mild = 1 / 255, [0.2, 0.7, 1.0, 1.8], [1.3, 0.5, 1.1, 0.9]
    for name, factors in (("brightness", strong), ("brightness", mild), ("contrast", strong),
                          ("contrast", mild), ("saturation", strong), ("saturation", mild),
                          ("hue", [-0.2, 0.0, 0.13, 0.2])):
        got = getattr(S, f"adjust_{name}")(x, torch.tensor(factors).view(4, 1, 1, 1))
        for b in range(4):
            expected = getattr(TF, f"adjust_{name}")(x[b], factors[b])
            assert (got[b] - expected).abs().max() < level, (name, factors[b])
    kernel, sigmas = size // 10 | 1, [0.1, 0.5, 1.2, 2.0]
    got = S.gaussian_blur(x, torch.tensor(sigmas), kernel)
    for b in range(4):
        expected = TF.gaussian_blur(x[b], [kernel] * 2, [sigmas[b]] * 2)
        assert (got[b] - expected).abs().max() < level, sigmas[b]
    torch.testing.assert_close(S.gaussian_blur(x, torch.zeros(4), kernel), x)


@pytest.mark.parametrize("size, taps", [(32, 3), (224, 23)])
def test_augment_does_to_every_image_what_torchvision_does_with_the_same_draws(
        size, taps, monkeypatch):
    """SimCLR's list, image by image; the draws are repeated in augment's order."""
    B, done, kernels, gaussian_blur = 6, set(), set(), S.gaussian_blur
    monkeypatch.setattr(S, "gaussian_blur", lambda x, sigma, kernel: (
        kernels.add(kernel) or gaussian_blur(x, sigma, kernel)))
    x = torch.randint(256, (B, 3, size, size), generator=torch.Generator().manual_seed(0))
    x = x.to(torch.uint8)
    names = ("brightness", "contrast", "saturation", "hue")
    for seed in range(4):
        torch.manual_seed(seed)
        got = S.augment(x, ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1)))
        torch.manual_seed(seed)
        flip, order = torch.rand(B) < 0.5, torch.randperm(4).tolist()
        strengths = [torch.empty(B).uniform_(*((-0.2, 0.2) if names[i] == "hue" else (0.2, 1.8)))
                     for i in order]
        jitter, grey, blur = (torch.rand(B) < p for p in (0.8, 0.2, 0.5))
        sigma = torch.empty(B).uniform_(0.1, 2.0) * size / 224
        for b in range(B):
            y = x[b] / 255
            y = TF.hflip(y) if flip[b] else y
            for i, strength in zip(order, strengths) if jitter[b] else ():
                y = getattr(TF, f"adjust_{names[i]}")(y, strength[b].item())
            y = TF.rgb_to_grayscale(y, 3) if grey[b] else y
            y = TF.gaussian_blur(y, [taps] * 2, [sigma[b].item()] * 2) if blur[b] else y
            expected = TF.normalize(y, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
            torch.testing.assert_close(got[b], expected, atol=2e-3, rtol=0)
            done |= {("flip", flip[b].item()), ("jitter", jitter[b].item()),
                     ("grey", grey[b].item()), ("blur", blur[b].item())}
    assert kernels == {taps} and len(done) == 8  # each happened, and did not


def test_half_of_the_views_are_flipped_and_blurred_a_fifth_grey_and_four_fifths_jittered():
    """Read off a picture of two halves, 12 × 224: whatever else happens, each leaves its trace."""
    x = torch.zeros(400, 3, 12, 224, dtype=torch.uint8)
    x[..., :112] = torch.tensor([80, 60, 40], dtype=torch.uint8)[:, None, None]
    x[..., 112:] = torch.tensor([110, 85, 60], dtype=torch.uint8)[:, None, None]
    torch.manual_seed(0)
    y = S.augment(x, ((0, 0, 0), (1, 1, 1)))[:, :, 6]
    left, edge, right = y[..., 5], y[..., 111], y[..., -5]
    grey = (left - left[:, :1]).abs().amax(dim=1) < 1e-3
    jittered = ((left + right - 2 * S.grey(x / 255)[:, 0, 6, [5, -5]].mean(dim=1, keepdim=True))
                .abs().amax(dim=1) > 1e-3)[grey]
    coloured = ((left + right - (x[:, :, 6, 5] + 0.0 + x[:, :, 6, -5]) / 255).abs().amax(dim=1)
                > 1e-3)[~grey]
    shares = {"flip": ((left.sum(dim=1) > right.sum(dim=1)), 0.5), "grey": (grey, 0.2),
              "jitter": (torch.cat([jittered, coloured]), 0.8),
              # What blurs by less than 0.3 pixels cannot be seen.
              "blur": ((edge - left).abs().sum(dim=1) > 0.01 * (right - left).abs().sum(dim=1),
                       0.5 * 1.7 / 1.9)}
    got = {name: (seen.float().mean().item(), share) for name, (seen, share) in shares.items()}
    assert all(abs(seen - share) < 0.05 for seen, share in got.values()), got


def test_pictures_of_any_kind_are_read_at_any_depth(tmp_path):
    deep = tmp_path / "a" / "b.c" / "d"
    deep.mkdir(parents=True)
    base = Image.new("RGB", (50, 40), (200, 100, 50))
    base.save(tmp_path / "loose.JPG", "JPEG")
    base.convert("L").save(deep / "grey.png")
    base.convert("RGBA").save(deep / "alpha.webp")
    base.convert("CMYK").save(deep / "cmyk.tif")
    base.quantize(8).save(deep / "palette.gif")
    Image.new("I;16", (50, 40), 40_000).save(deep / "deep.png")
    base.convert("1").save(deep / "bits.bmp")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (deep / "Thumbs.db").write_bytes(b"x")
    (deep / "notes.txt").write_text("x")
    (deep / "circle").symlink_to(tmp_path)
    for hidden in (".cache", "__MACOSX"):
        (tmp_path / hidden).mkdir()
        base.save(tmp_path / hidden / "no.png")
    paths = S.find_pictures(tmp_path)
    assert [Path(p).name for p in paths] == ["alpha.webp", "bits.bmp", "cmyk.tif", "deep.png",
                                             "grey.png", "palette.gif", "loose.JPG"]
    faces = S.Faces(paths, 32, 2, 28, 0.08)
    for i, path in enumerate(paths):
        item = faces[0, i, i]
        assert item["views"].shape == (2, 3, 32, 32) and item["views"].dtype == torch.uint8
        assert item["image"].shape == (3, 28, 28) and item["image"].dtype == torch.uint8
        if path.endswith(("JPG", "webp", "gif")):
            colour = item["image"].float().mean(dim=(1, 2))
            assert (colour - torch.tensor([200.0, 100, 50])).abs().max() < 6, path
        if path.endswith("deep.png"):
            assert abs(item["image"].float().mean() - 40_000 / 257) < 2


def test_the_loader_crops_and_resizes_as_torchvision_does_with_pillow(tmp_path):
    """Within one grey level, smaller and larger, for the box that the key draws."""
    generator = torch.Generator().manual_seed(0)
    for i, size in enumerate(((90, 61), (40, 40), (200, 131))):
        x = F.interpolate(torch.rand(1, 3, 20, 20, generator=generator), size, mode="bicubic")
        TF.to_pil_image(x[0].clamp(0, 1)).save(tmp_path / f"{i}.png")
    paths = S.find_pictures(tmp_path)
    faces = S.Faces(paths, 48, 2, 56, 0.3, seed=7)
    for index, path in enumerate(paths):
        picture, (epoch, place) = Image.open(path), (2 * index, 11 - index)
        item = faces[epoch, place, index]
        torch.manual_seed(S.seed_of(7, "crops", epoch, place))
        draw = torchvision.transforms.RandomResizedCrop.get_params
        boxes = [draw(picture, (0.3, 1), (3 / 4, 4 / 3)) for _ in range(2)]
        expected = [TF.resized_crop(picture, *box, [48, 48]) for box in boxes]
        expected.append(TF.resize(picture, [56, 56]))
        for got, other in zip([*item["views"], item["image"]], expected, strict=True):
            assert (got.int() - TF.pil_to_tensor(other).int()).abs().max() <= 1


def test_an_images_crops_depend_on_seed_epoch_and_place_alone(toy):
    paths = S.find_pictures(toy / "train")
    faces = S.Faces(paths, 32, 2, 28, 0.08, seed=3)
    torch.manual_seed(123)
    one = faces[2, 7, 5]
    faces[0, 1, 1], torch.rand(3)
    two = S.Faces(paths, 32, 2, 28, 0.08, seed=3)[2, 7, 5]
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in ("image", "views"))
    for other in (faces[3, 7, 5], faces[2, 8, 5], S.Faces(paths, 32, 2, 28, 0.08, seed=4)[2, 7, 5]):
        assert torch.equal(one["image"], other["image"])
        assert not torch.equal(one["views"], other["views"])
    assert not torch.equal(one["views"][0], one["views"][1])


@pytest.mark.parametrize("least", [0.08, 0.5])
def test_crops_cover_the_share_of_the_picture_that_is_asked_for(tmp_path, least):
    picture = Image.new("RGB", (200, 200))  # its colours are coordinates
    picture.putdata([(x, y, 0) for y in range(200) for x in range(200)])
    picture.save(tmp_path / "map.png")
    faces = S.Faces([str(tmp_path / "map.png")], 64, 2, 64, least)
    sides = []
    for epoch in range(100):
        for view in faces[epoch, 0, 0]["views"].float():
            sides.append([view[c].max() - view[c].min() + 1 for c in range(2)])
    w, h = torch.tensor(sides).T / 200
    assert 0.9 * least < (w * h).min() < least + 0.1 and (w * h).max() > 0.9
    assert (w / h).max() > 1.2 and (w / h).min() < 0.85
    whole = faces[0, 0, 0]["image"].float()
    assert whole[0].max() - whole[0].min() > 195 and whole[1].max() - whole[1].min() > 195


def test_an_unreadable_picture_is_replaced_by_the_next_and_named_once(tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    (tmp_path / "2.png").write_text("no picture")
    faces = S.Faces(S.find_pictures(tmp_path), 32, 2, 28, 0.08)
    (tmp_path / "0.png").unlink()
    for _ in range(2):
        assert all((faces[0, i, i]["image"] == 180).all() for i in range(4))
    assert capsys.readouterr().err.splitlines() == [
        f"simfle: {tmp_path}/{i}.png cannot be read ({why})." for i, why in enumerate(
            ("FileNotFoundError", "OSError", "UnidentifiedImageError"))]
    (tmp_path / "3.png").unlink()
    with pytest.raises(S.UserError, match="named above cannot be read"):
        faces[0, 3, 3]


# ---------------------------------------------------------------- 4.1 Order of the images


def batches_of(images, batch, seed, rank=0, size=1, first=0, last=1):
    batches = S.Batches(images, batch, seed, S.World(rank, size))
    batches.first, batches.last = first, last
    return list(batches)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_every_batch_and_an_epoch_shows_each_image_once(world):
    batch, images, total = 12, 40, 7  # 3 batches an epoch, 4 images dropped
    parts = [batches_of(images, batch, 5, r, world, last=total) for r in range(world)]
    assert all(len(p) == total and {len(keys) for keys in p} == {12 // world} for p in parts)
    alone = batches_of(images, batch, 5, last=total)
    for step in range(total):
        assert sum((p[step] for p in parts), []) == alone[step]
    first = sum(alone[:3], [])
    assert len({index for _, _, index in first}) == 36 and {e for e, _, _ in first} == {0}
    assert [place for _, place, _ in first] == [*range(36)] and alone[3][0][:2] == (1, 0)
    assert [i for _, _, i in alone[0]] != [i for _, _, i in alone[3]]


def test_a_run_resumes_in_the_middle_of_an_epoch_with_another_number_of_processes():
    alone = batches_of(40, 12, 5, last=6)
    rest = [batches_of(40, 12, 5, r, 2, first=1, last=6) for r in range(2)]
    assert [one + two for one, two in zip(*rest, strict=True)] == alone[1:]


# ---------------------------------------------------------------- 4.1 Training


def test_a_fault_of_the_program_ends_it_with_a_traceback_and_no_process_left(toy, tmp_path):
    """Loading processes, deaf to SIGTERM, would be waited for until the end of time."""
    code = ("import sys, simfle; simfle.FaceMAE.forward = lambda *_: [][0]; "
            "sys.exit(simfle.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "--data", toy, *TINY, "--workers", "2"],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(HERE)}, timeout=120,
                          text=True, capture_output=True)
    assert done.returncode == 1 and "IndexError" in done.stderr, done.stderr


class Interrupted(BaseException):
    pass


def after_update(patch, number, act):
    """Calls `act` in the update that follows the `number`th step from now."""
    update, count = S.SimFLE.update, []

    def counted(model):
        update(model)
        count.append(0)
        if len(count) == number:
            act()
    patch.setattr(S.SimFLE, "update", counted)


def interrupt():
    raise Interrupted


def test_training_logs_checkpoints_and_resumes_bit_exactly(toy, tmp_path, monkeypatch, capsys):
    args = ["--data", toy, *TINY, "--save-every", "5", "--epochs", "3"]
    assert in_process(*args, "--name", "whole", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "66 pictures of" in out and "15 steps of 12 images" in out  # val/ is not trained on
    assert re.search(r"15/15  epoch 3  rate \S+  L_s \S+  L_r \S+  L_d \S+  L_g \S+  spread "
                     r"\S+  \d+ images/s  waiting \d+%  left 0:00:00\n", out)
    # The same again, stopped in the second epoch, between two checkpoints.
    whole, parts = tmp_path / "runs/whole", tmp_path / "runs/parts"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        after_update(patch, 9, interrupt)
        in_process(*args, "--name", "parts", cwd=tmp_path, monkeypatch=monkeypatch)
    assert [r["step"] for r in records(parts)] == [*range(1, 9)]  # 6 to 8 are later than 5
    with open(parts / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # half a line
    again = [a if a != toy else f"{toy.parent}/./{toy.name}/" for a in args]  # the same folder
    assert in_process(*again, "--name", "parts", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "resumes after step 5" in out and "learning rate was" not in out
    assert same_state(whole, parts) and records(whole) == records(parts)
    assert [(r["step"], r["epoch"]) for r in records(whole)] == [(i + 1, i // 5 + 1)
                                                                 for i in range(15)]
    assert json.loads((whole / "settings.json").read_text()) == asdict(
        settings([*args, "--name", "whole"]))
    # backbone.pt is torchvision's.
    weights = torch.load(whole / "backbone.pt", weights_only=True)
    net = S.small_resnet()
    assert net.load_state_dict(weights, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    assert in_process(*args, "--name", "whole", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert "complete" in capsys.readouterr().out and len(records(whole)) == 15
    # --fresh starts over, and the log with it.
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        after_update(patch, 1, interrupt)
        in_process(*args, "--name", "parts", "--fresh", cwd=tmp_path, monkeypatch=monkeypatch)
    assert not (parts / "checkpoint.pt").exists() and not records(parts)
    assert in_process(*args[:-1], "1", "--name", "whole", "--fresh", cwd=tmp_path,
                      monkeypatch=monkeypatch) == 0
    assert len(records(whole)) == 5


def test_the_status_line_keeps_the_digits_of_small_rates(capsys):
    for _ in S.watched(S.World(), [0], 0, 1, 1, {"rate": 1.25e-5, "epoch": 3}):
        pass
    assert "rate 1.25e-05  epoch 3  " in capsys.readouterr().out


def test_the_optimiser_is_sgd_on_a_cosine_of_the_rate_per_256_images(toy, tmp_path, monkeypatch):
    s = settings(["--data", toy, *TINY, "--epochs", "3"])
    model = S.build_model(s)
    t = S.set_up(s, S.World(), model, model, S.Faces(S.find_pictures(toy / "train"), image_size=8),
                 tmp_path / "checkpoint.pt")
    [group] = t.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()
                                                if p.requires_grad}
    for i in range(15):
        assert t.learning_rate(i) == pytest.approx(
            0.4 * 12 / 256 * (1 + math.cos(math.pi * i / 15)) / 2)
    rates = []
    monkeypatch.setattr(t.optimizer, "step", lambda: rates.append(group["lr"]))
    t.batches.last = 2
    S.fit(s, S.World(), t, lambda batch: {"loss": sum(p.sum() for p in group["params"])},
          lambda i: None, ())
    assert rates == [t.learning_rate(0), t.learning_rate(1)]
    assert [r["rate"] for r in records(tmp_path)] == rates


def test_the_number_of_workers_changes_nothing_and_the_seed_does(toy, tmp_path, monkeypatch):
    args = ["--data", toy, *TINY, "--steps", "2"]
    for workers, seed in ((0, 0), (1, 0), (2, 0), (0, 1)):
        assert in_process(*args, "--workers", workers, "--seed", seed, "--name",
                          f"{workers}-{seed}", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    runs = tmp_path / "runs"
    assert same_state(runs / "0-0", runs / "1-0") and same_state(runs / "0-0", runs / "2-0")
    assert records(runs / "0-0") == records(runs / "1-0") == records(runs / "2-0")
    assert not same_state(runs / "0-0", runs / "0-1")


def test_everything_drawn_depends_on_the_seed(toy, trained, monkeypatch):
    """What is drawn in a step too: there the test of two processes gives a seed of its own."""
    heads, drawn = [], []
    monkeypatch.setattr(S, "train_classifier", lambda s, world, net, *_: heads.append(
        net.fc.weight.detach().clone()))
    for seed in ("0", "1"):
        s = settings(["--data", toy, *TINY, "--seed", seed])
        drawn.append([S.build_model(s).backbone.resnet.conv1.weight,
                      torch.tensor(S.Batches(50, 5, s.seed, S.World()).order(0)),
                      S.Faces(S.find_pictures(toy), 32, 2, seed=s.seed, crop_min=0.3)[0, 0, 0]
                      ["views"], torch.tensor(S.share_of_labels([0] * 50, 0.1, s.seed))])
        assert in_process("--data", "colours", "--eval", *EVAL, "--seed", seed, "--epochs", "1",
                          cwd=trained, monkeypatch=monkeypatch) == 0
    assert not any(torch.equal(one, two) for one, two in zip(*drawn)) and len(heads) == 2
    assert not torch.equal(*heads)


@pytest.fixture(scope="session")
def stopped(toy, tmp_path_factory):
    """A run of four steps that was stopped after two."""
    cwd = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        after_update(patch, 1, S.stop_asked.set)  # the step that follows is the last
        assert in_process("--data", toy, *TINY, "--steps", "4", "--name", "run", cwd=cwd,
                          monkeypatch=patch) == 143
    return cwd


@pytest.mark.parametrize("change, rate, last", [
    (["--lr", "0.2"], 0.2 * 12 / 256 * 0.5, 4),
    (["--steps", "8"], 0.4 * 12 / 256 * (1 + math.cos(math.pi * 2 / 8)) / 2, 8),
    (["--weight-decay", "0", "--log-every", "2", "--save-every", "1"], 0.4 * 12 / 256 * 0.5, 4)])
def test_another_rate_or_length_resumes_and_a_line_names_both_rates(
        change, rate, last, toy, stopped, tmp_path, monkeypatch, capsys):
    shutil.copytree(stopped / "runs", tmp_path / "runs")
    args = ["--data", toy, *TINY, "--steps", "4", "--name", "run", *change]
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    told = [line for line in capsys.readouterr().out.split("\n") if "resumes after step 2" in line]
    assert len(told) == 1
    old = 0.4 * 12 / 256 * 0.5
    if rate == old:
        assert "learning rate was" not in told[0]
    else:
        assert f", where the learning rate was {old:.4g} and is now {rate:.4g}" in told[0]
    log = records(tmp_path / "runs/run")
    assert log[-1]["step"] == last
    assert [r["rate"] for r in log if r["step"] == 3] == ([] if "2" in change
                                                          else [pytest.approx(rate)])


def test_the_pictures_names_and_sizes_identify_the_data(toy, tmp_path, monkeypatch, capsys):
    faces = shutil.copytree(toy, tmp_path / "faces")
    args = ["--data", "faces", *TINY, "--steps"]
    assert in_process(*args, "1", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    picture = Path(S.find_pictures(faces / "train")[7])
    before = picture.read_bytes()
    picture.write_bytes(before + b"x")  # still a picture
    error = complaint([*args, "2"], tmp_path, monkeypatch, capsys)
    assert "the pictures in faces/train are not those it saw" in error
    picture.write_bytes(before)
    other = picture.rename(picture.with_stem("zzz"))
    assert "are not those it saw" in complaint([*args, "2"], tmp_path, monkeypatch, capsys)
    other.rename(picture)
    extra = shutil.copy(picture, picture.with_stem("zzz"))
    assert "are not those it saw" in complaint([*args, "2"], tmp_path, monkeypatch, capsys)
    Path(extra).unlink()
    text(faces / "stats.json", json.dumps(dict(own_colours=True, mean=[.1] * 3, std=[.2] * 3)))
    assert "colours was " in complaint([*args, "2"], tmp_path, monkeypatch, capsys)
    (faces / "stats.json").unlink()
    shutil.move(faces, tmp_path / "elsewhere")  # the same data in another place
    assert in_process("--data", "elsewhere", "--name", "faces", *args[2:], "2", cwd=tmp_path,
                      monkeypatch=monkeypatch) == 0
    assert [r["step"] for r in records(tmp_path / "runs/faces")] == [1, 2]


def test_pre_training_starts_both_streams_from_a_file_and_ignores_it_when_it_resumes(
        toy, trained, tmp_path, monkeypatch, capsys):
    start = trained / "runs/colours/backbone.pt"
    args = ["--data", toy, *TINY, "--lr", "0", "--init"]  # nothing but buffers moves

    def loaded():
        model = torch.load(tmp_path / "runs/faces/checkpoint.pt", weights_only=True)["model"]
        return all(torch.equal(model[f"gfl.{stream}.backbone.resnet.{k}"], weights[k])
                   for stream in ("online", "target") for k in names)

    weights = torch.load(start, weights_only=True)
    names = [k for k, _ in S.small_resnet().named_parameters() if k in weights]
    assert in_process(*args, "random", "--steps", "1", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert not loaded()
    missing = [*args, "nowhere.pt", "--steps", "2"]
    error = complaint([*missing, "--fresh"], tmp_path, monkeypatch, capsys)
    assert "nowhere.pt is missing" in error
    assert in_process(*args, start, "--steps", "1", "--fresh", cwd=tmp_path,
                      monkeypatch=monkeypatch) == 0
    assert loaded()
    assert in_process(*missing, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert loaded() and "resumes after step 1" in capsys.readouterr().out


def test_backbone_of_the_paper_model_loads_into_torchvisions_resnet50():
    weights = S.Backbone().resnet.state_dict()
    missing, unexpected = torchvision.models.resnet50().load_state_dict(weights, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected


@pytest.mark.parametrize("processes", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_under_torchrun_resume_bit_exactly_and_keep_their_weights_alike(
        toy, tmp_path, processes, request):
    """A run of two epochs, and one that stops in the second and resumes: equal to the last bit."""
    not_unless_slow(request)
    script = tmp_path / "check.py"
    script.write_text(CHECK_RANKS.format(here=str(HERE)))
    args = ["--data", toy, *TINY, "--batch-size", "13", "--epochs", "2", "--save-every", "5"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone",
           f"--nproc_per_node={processes}", script, *map(str, args)]  # 13 is shared by none
    done = subprocess.run(run, cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1",
                                                      CUDA_VISIBLE_DEVICES=""),
                          timeout=600, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_state(tmp_path / "runs/whole", tmp_path / "runs/parts")
    assert records(tmp_path / "runs/whole") == records(tmp_path / "runs/parts")
    assert (f"steps of 12 images ({processes} × {12 // processes} on cpu), learning rate 0.01875"
            in done.stdout)
    assert done.stdout.count("resumes after step 5") == 1


CHECK_RANKS = """
import sys
sys.path.insert(0, {here!r})
import torch, torch.distributed as dist, simfle as S
update, left = S.SimFLE.update, [0]
def same(value):
    other = value.detach().clone()
    dist.broadcast(other, 0)
    return torch.equal(other, value)
def checked(model):
    update(model)
    for p in [*model.parameters()][::7]:  # alike in all processes after every step
        assert same(p), "weights differ between processes"
    mean = model.gfl.online.backbone.resnet.bn1.running_mean  # BatchNorm is local
    assert same(mean) == (dist.get_rank() == 0)
    left[0] -= 1
    if left[0] == 0:
        raise S.UserError("stopped")
S.SimFLE.update = checked
def train(name, world):
    S.pretrain(S.read_settings(S.read_arguments(sys.argv[1:] + ["--name", name])), world)
with S.processes() as world:
    train("whole", world)
    left[0] = 8
    try:
        train("parts", world)
    except S.UserError as error:
        assert str(error) == "stopped"
    assert left[0] == 0
    train("parts", world)
"""


def test_two_processes_take_the_step_of_the_mean_gradient_and_the_target_follows(toy, tmp_path):
    """DDP's mean of what each process computes alone on its share; losses are logged as means, the
    masks as sums."""
    args = ["--data", toy, *TINY, "--steps", "1", "--seed", "3"]
    out = run_program(*args, "--name", "two", "--tau", "0", cwd=tmp_path, processes=2)
    assert "1/1  epoch 1" in out and "Warning" not in out.replace("OMP_NUM_THREADS", "")
    s = settings(args)
    paths = S.find_pictures(toy / "train")
    faces = S.Faces(paths, s.view_size, 2, s.ffl_size, s.crop_min, s.seed)
    model, parts, grads = S.build_model(s), [], []
    model.to(memory_format=torch.channels_last)
    for rank in range(2):
        [keys] = batches_of(len(paths), 12, 3, rank, 2)
        batch = torch.utils.data.default_collate([faces[k] for k in keys])
        torch.manual_seed(S.seed_of(3, "step", 0, rank))
        v1, v2 = S.augment(batch["views"][:, 0]), S.augment(batch["views"][:, 1])
        one = copy.deepcopy(model)
        parts.append(one(v1, v2, TF.normalize(batch["image"] / 255, S.MEAN, S.STD)))
        parts[-1]["loss"].backward()
        grads.append(torch.cat([p.grad.flatten() for p in one.parameters() if p.requires_grad]))
    [logged] = records(tmp_path / "runs/two")
    for name in ("loss", "L_s", "L_r", "L_d", "L_g", "spread"):
        assert logged[name] == pytest.approx(sum(float(p[name].detach()) for p in parts) / 2,
                                             rel=1e-3)
    assert logged["masked"] == (parts[0]["masked"] + parts[1]["masked"]).tolist()
    assert logged["masked_error"] == pytest.approx(
        (parts[0]["masked_error"] + parts[1]["masked_error"]).tolist(), rel=1e-3)
    assert logged["gradient"] == pytest.approx((sum(grads) / 2).norm().item(), rel=1e-3)
    saved = torch.load(tmp_path / "runs/two/checkpoint.pt", weights_only=True)
    got = torch.cat([m.flatten() for m in saved["momenta"]])
    # The first momentum is the gradient and the decay.
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    wanted = sum(grads) / 2 + 1e-4 * weights
    assert (got - wanted).norm() < 1e-2 * wanted.norm()
    for name, _ in model.gfl.online.named_parameters():  # τ = 0: the target is the online stream
        target, online = (saved["model"][f"gfl.{which}.{name}"] for which in ("target", "online"))
        assert torch.equal(target, online), name


def test_a_line_of_the_log_holds_its_steps_own_values_and_the_masks_since_the_last(
        toy, tmp_path, monkeypatch):
    args = ["--data", toy, *TINY, "--steps", "5"]
    for name, every in (("all", "1"), ("few", "3")):
        assert in_process(*args, "--name", name, "--log-every", every, cwd=tmp_path,
                          monkeypatch=monkeypatch) == 0
    each, few = records(tmp_path / "runs/all"), records(tmp_path / "runs/few")
    assert [r["step"] for r in few] == [3, 5]  # and the last step
    assert each[2].keys() >= {"step", "epoch", "rate", "loss", "L_s", "L_r", "L_d", "L_g", "spread",
                              "D2_between", "D2_within", "gradient", "masked_error", "masked"}
    for line, since in ((few[0], each[:3]), (few[1], each[3:])):
        for k, value in line.items():
            if k in ("masked", "masked_error"):
                sums = [sum(r[k][i] for r in since) for i in range(49)]
                assert value == pytest.approx(sums, rel=1e-4)
            else:
                assert value == since[-1][k], k


def test_what_fails_on_rank_0_is_one_sentence(tmp_path):
    assert S.from_rank0(S.World(), lambda: 5) == 5
    with pytest.raises(S.UserError, match="nowhere"):
        S.from_rank0(S.World(), lambda: open(tmp_path / "nowhere" / "file", "w"))


def test_a_step_tells_the_gradients_norm_and_means_over_processes(monkeypatch):
    net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(2, 2)])  # the second has no gradient
    for p in net[0].parameters():
        p.grad = seeded(*p.shape, seed=1)
    norm = torch.cat([p.grad.flatten() for p in net[0].parameters()]).norm().item()
    out = {"loss": torch.tensor(2.0), "masked": torch.ones(49)}
    expected = dict(loss=2.0, gradient=pytest.approx(norm), stop=0.0)
    assert S.reduced(S.World(), net, out) == expected
    other = torch.tensor([4.0, norm, 1.0])  # the other rank's: it has been told to stop
    monkeypatch.setattr(S.dist, "all_reduce", lambda x: x.add_(other))
    assert S.reduced(S.World(0, 2), net, out) == expected | {"loss": 3.0, "stop": 0.5}
    monkeypatch.setattr(S, "stop_asked", threading.Event())
    S.stop_asked.set()
    assert S.reduced(S.World(), net, out)["stop"] == 1


def test_loader_workers_are_a_processes_share_of_the_cores_up_to_8(monkeypatch):
    monkeypatch.setattr(S, "cores", lambda: 12)

    def workers(given, local_size):
        world = S.World(0, local_size, local_size=local_size)
        s = settings(["--data", "faces", *TINY, "--workers", given])
        return S.make_loader(s, world, [], [[]]).num_workers

    assert [workers(-1, n) for n in (1, 2, 3, 24)] == [8, 6, 4, 1]
    assert workers(0, 2) == 0 and workers(3, 2) == 3


def test_the_measure_of_refinement_sees_a_masking_that_keeps_what_is_hard():
    model = small_model().eval()
    images = torch.randint(0, 256, (20, 3, 28, 28), dtype=torch.uint8)
    hard = torch.zeros(49)
    hard[:12] = 1.0

    def errors(I, keep):
        error = hard + 0.1 * torch.rand(len(I), 49, generator=noise)
        return error.to(I.device).scatter(1, keep, 1e3), None  # kept patches must not count

    class Keeps(nn.Module):
        groups, ratio = 4, 0.75

        def __init__(self, by):
            super().__init__()
            self.by = by

        def scores(self, C, group):
            groups.add(group[0].item())
            return self.by.expand(len(C), -1).to(C.device)

    groups, noise = set(), torch.Generator().manual_seed(0)
    state = copy.deepcopy(model.state_dict())
    model.ffl.mae.forward = errors
    for scores, sign in ((hard, 1), (-hard, -1)):
        model.ffl.masking = Keeps(scores)
        got = P.measure_refinement(model, S.normalise(images), rounds=8)
        assert got["positions"] * sign > 0.3 and got["within_image"] * sign > 0.3
        assert [v > 0.5 for v in got["error_map"]] == hard.bool().tolist()
        assert sum(got["keep_map"]) == 12 and sum(got["keep_map"][:12]) == (12 if sign > 0 else 0)
    model.ffl.masking.ratio = 0.1  # four rounds would not mask every patch
    few = P.measure_refinement(model, S.normalise(images))["error_map"]
    assert min(few) > 0 and [v > 0.5 for v in few] == hard.bool().tolist()
    assert groups == {0, 1, 2, 3}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_correlation_is_pearsons():
    x, y = seeded(3, 20), seeded(3, 20, seed=1)
    expected = torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in zip(x, y)])
    torch.testing.assert_close(P.correlation(x, y), expected)
    assert P.correlation(torch.ones(5), x[0, :5]) == 0


PLAIN = ["--workers", "0", "--log-every", "1", "--eval"]  # all else is the run's: short file names


def files_of(cwd, run="colours"):
    """Every result of a run, by name."""
    return {p.name: p.read_bytes() for p in (cwd / "runs" / run).iterdir()
            if p.is_file() and p.suffix != ".lock"}


def classifier_of(cwd, tag, run="colours"):
    return torch.load(cwd / "runs" / run / f"{tag}.pt", weights_only=True)


def steps_of(cwd, tag, run="colours"):
    return [*map(json.loads, (cwd / f"runs/{run}/log-{tag}.jsonl").read_text().splitlines())]


def copied(cwd, run):
    """The pre-training alone, under another name."""
    folder = cwd / "runs" / run
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("backbone.pt", "settings.json", "checkpoint.pt"):
        shutil.copy(cwd / "runs/colours" / name, folder)
    return folder


def change(backbone):
    state = torch.load(backbone, weights_only=True)
    torch.save(state | {"conv1.weight": 2 * state["conv1.weight"].flip(0)}, backbone)


def test_linear_evaluation_trains_the_head_alone_and_tells_all(trained, monkeypatch, capsys):
    args = ["--data", "colours", *PLAIN, "--epochs", "4", "--batch-size", "8", "--lr", "0.5"]
    tag = "linear-colours-epochs-4-batch-size-8-lr-0.5"
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    got = result(trained, tag)
    assert got["images"] == 15 and got["accuracy"] > 60
    assert f"{got['accuracy']:.2f} % of 15 test images" in out and "0_a" in out
    confusion = torch.tensor(got["confusion"])
    assert confusion.sum() == 15 and (confusion.sum(1) == 5).all()
    assert got["accuracy"] == pytest.approx(100 * confusion.diag().sum().item() / 15)
    assert got["settings"]["lr"] == 0.5 and got["settings"]["weight_decay"] == 0
    digest = hashlib.sha256((trained / "runs/colours/backbone.pt").read_bytes()).hexdigest()
    assert got["start"] == digest and got["settings"]["seed"] == 0
    # 30 images in batches of 8: three full ones and a partial one, in each of four epochs.
    assert [r["epoch"] for r in steps_of(trained, tag)] == sorted([1, 2, 3, 4] * 4)
    assert {r["rate"] for r in steps_of(trained, tag)} == {0.5 * 8 / 256}  # constant
    # The classifier is a torchvision ResNet with the run's backbone, BatchNorm's statistics and
    # all, unchanged to the last bit.
    saved = classifier_of(trained, tag)
    backbone = torch.load(trained / "runs/colours/backbone.pt", weights_only=True)
    assert {k for k, v in saved["model"].items() if k not in backbone} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(saved["model"][k], v) for k, v in backbone.items())
    assert saved["classes"] == ["0_a", "1_b", "2_c"] and saved["mean"] == list(S.MEAN)
    net = S.small_resnet()
    net.fc = nn.Linear(net.fc.in_features, 3)
    net.load_state_dict(saved["model"])
    # The same predictions by hand, one picture at a time.
    net.eval()
    for label, name in enumerate(saved["classes"]):
        row = [0, 0, 0]
        for path in (trained / "colours/val" / name).iterdir():
            x = TF.to_tensor(TF.resize(Image.open(path), [32, 32]))
            x = TF.normalize(x, saved["mean"], saved["std"])
            row[net(x[None]).argmax().item()] += 1
        assert row == got["confusion"][label]


def test_the_converged_head_is_the_minimum_and_takes_features_as_they_are():
    """By an oracle: at the minimum of a convex function the gradient is 0."""
    y = torch.arange(200) % 3
    x = seeded(200, 6) + 2 * F.one_hot(y, 6)
    x = x * torch.logspace(-2, 2, 6) + 50 * torch.logspace(-2, 2, 6)  # any scale, any offset
    x[:, 5] = 7.0  # a dead feature
    mass = torch.tensor([1.0, 2.0, 0.5])
    strength = 0.02
    weight, bias = S.converged_head(x, y, mass, strength)
    assert (weight @ x.double().T).T.add(bias).argmax(1).eq(y).float().mean() > 0.8
    mean, std = x.double().mean(0), x.double().std(0)
    std[5] = 1.0
    W = (weight * std).requires_grad_()
    b = (bias + weight @ mean).requires_grad_()
    logits = ((x.double() - mean) / std) @ W.T + b
    loss = sum(mass[k].double() * -logits[i].log_softmax(0)[k] for i, k in enumerate(y.tolist()))
    loss = loss / mass[y].sum() + strength / 2 * W.square().sum()
    gradients = torch.autograd.grad(loss, (W, b))
    assert max(g.abs().max() for g in gradients) < 2e-5
    torch.testing.assert_close(S.converged_head(x * 5 - 3, y, mass, strength)[0], weight / 5,
                               rtol=0.01, atol=0.01 * weight.abs().max().item())


def test_the_laptops_linear_evaluation_is_the_converged_one_and_equals_the_probe(
        trained, monkeypatch, capsys):
    backbone = torch.load(trained / "runs/colours/backbone.pt", weights_only=True)
    for init in ([], ["--init", "runs/colours/backbone.pt"], ["--init", "random"]):
        args = ["--data", "colours", *PLAIN, *init]
        assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
        tag = "linear-colours" + {"random": "-init-random", "": ""}.get(
            init[1] if init else "", "-init-runs-colours-backbone")
        got, saved = result(trained, tag), classifier_of(trained, tag)
        assert got["settings"]["epochs"] == 0
        assert not (trained / f"runs/colours/checkpoint-{tag}.pt").exists()
        same = [torch.equal(saved["model"][k], v) for k, v in backbone.items()
                if k.endswith("weight")]
        assert all(same) if init[1:] != ["random"] else not any(same[:1])
        capsys.readouterr()
        assert P.main(["colours", "--workers", "0", *init]) == 0
        probed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert probed["accuracy"] == pytest.approx(got["accuracy"]), init
        assert probed["mean_accuracy"] == pytest.approx(got["mean_accuracy"]), init
    told = complaint(["--data", "colours", *PLAIN, "semi", "--epochs", "0"], trained, monkeypatch,
                     capsys)
    assert "--epochs 0 is for --eval linear" in told


def test_an_evaluation_without_a_run_makes_its_folder(trained, tmp_path, monkeypatch):
    args = ["--data", trained / "colours", "--preset", "laptop", "--eval", "--init", "random"]
    assert in_process(*args, "--workers", "0", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert (tmp_path / "runs/colours/linear-colours-preset-laptop-init-random.pt").exists()


def test_oversampling_weighs_the_classes_of_the_converged_head(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(S, "converged_head", lambda x, y, mass: (
        seen.append(mass), (torch.zeros(3, x.shape[1]), torch.zeros(3)))[1])
    copied(trained, "weighed")
    for more in ([], ["--oversample"]):
        in_process("--name", "weighed", *PLAIN, *more, cwd=trained, monkeypatch=monkeypatch)
    assert seen[0].tolist() == [1, 1, 1]
    torch.testing.assert_close(seen[1], 1 / torch.tensor([14.0, 9.0, 7.0]).double())


@pytest.fixture
def probed(trained, monkeypatch, capsys):
    """The JSON that data/probe.py prints of a run, or what it complains of."""
    def run(*args, name="colours", code=0):
        monkeypatch.chdir(trained)
        assert P.main([name, "--workers", "0", *map(str, args)]) == code
        out = capsys.readouterr()
        return out.err if code else json.loads(out.out.splitlines()[-1])
    return run


def test_the_probe_reads_pixels_and_untrained_nets(trained, probed, monkeypatch):
    assert probed("--init", "pixels")["accuracy"] > 90  # the classes differ in colour
    features, head = [], S.converged_head
    monkeypatch.setattr(S, "converged_head",
                        lambda x, *rest: (features.append(x), head(x, *rest))[1])
    for more in (["pixels"], ["random"], ["random", "--seed", "1"]):
        probed("--init", *more)
    assert [x.shape for x in features] == [(30, 768), (30, 256), (30, 256)]
    assert not torch.equal(features[1], features[2])
    picture = S.read_picture(sorted((trained / "colours/train/0_a").iterdir())[0])
    x = TF.normalize(S.resize(picture, 16) / 255, S.MEAN, S.STD)
    torch.testing.assert_close(features[0][0].float().cpu(), x.flatten(), rtol=1e-5, atol=1e-5)
    # Pooled features of layer4, in eval mode.
    net = S.small_resnet()
    net.load_state_dict(torch.load(trained / "runs/colours/backbone.pt", weights_only=True), False)
    probed()
    x = TF.normalize(S.resize(picture, 32) / 255, S.MEAN, S.STD)
    net.fc = nn.Identity()
    torch.testing.assert_close(features[-1][0].float().cpu(), net.eval()(x[None])[0].detach(),
                               rtol=1e-3, atol=1e-4)


def test_the_probe_measures_the_refinement_of_one_run_or_of_two(trained, probed, monkeypatch):
    measured = probed("--refinement")
    assert (measured["run"], measured["measured"]) == ("colours", "refinement")
    assert measured.keys() >= {"positions", "within_image", "error_map", "seconds"}
    assert len(measured["keep_map"]) == 49
    assert sum(measured["keep_map"]) == pytest.approx(12, abs=0.01)
    # Another run's masking, with the errors of this one.
    other = ["--data", "colours", "--name", "other", *TINY, "--steps", "1", "--seed", "5"]
    assert in_process(*other, cwd=trained, monkeypatch=monkeypatch) == 0
    crossed = probed("--refinement", "other")
    assert crossed["measured"] == "refinement, masking of other"
    assert crossed["error_map"] == measured["error_map"]
    own = probed("--refinement", name="other")
    assert crossed["keep_map"] == own["keep_map"] != measured["keep_map"]
    assert own["error_map"] != measured["error_map"]
    (trained / "classless").mkdir()  # pictures without classes
    (trained / "classless/val").symlink_to(trained / "colours/val/0_a")
    assert probed("--refinement", "--data", trained / "classless")["val_pictures"] == len(
        list((trained / "colours/val/0_a").iterdir()))
    in_process(*other, "--name", "fine", "--patch", "2", cwd=trained, monkeypatch=monkeypatch)
    assert "have other --ffl-size or --patch" in probed("--refinement", "fine", code=2)


def test_the_probe_tells_what_it_cannot_measure(trained, probed, monkeypatch):
    alone = ["--data", "colours", "--name", "alone", *TINY, "--steps", "1", "--ffl", "none"]
    assert in_process(*alone, cwd=trained, monkeypatch=monkeypatch) == 0
    assert "has no masking to measure" in probed("--refinement", name="alone", code=2)
    assert "other.pt is missing" in probed("--init", "other.pt", code=2)
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, trained / "other.pt")
    assert "other.pt does not fit this net" in probed("--init", "other.pt", code=2)
    for args in (["--seed", 1], ["--init", "random", "--seed", 10**20], ["--workers", "-2"]):
        assert "probe: --" in probed(*args, code=2)
    assert "there is no dataset nowhere" in probed("--data", "nowhere", code=2)
    assert "runs/nobody/settings.json is missing" in probed(name="nobody", code=2)
    stored = S.run_settings("alone") | {"queue": 1024}  # a setting that is no more
    (trained / "runs/older").mkdir()
    (trained / "runs/older/settings.json").write_text(json.dumps(stored))
    told = probed(name="older", code=2)
    assert "runs/older was made by another version of simfle.py" in told
    shutil.rmtree(trained / "runs/older")


def test_whole_protocols_train_everything_on_a_cosine(trained, monkeypatch):
    before = torch.load(trained / "runs/colours/backbone.pt", weights_only=True)
    for tag, args in (("semi-colours-labels-0.5", ["semi", "--labels", "0.5"]),
                      ("finetune-colours", ["finetune"]),
                      ("semi-colours-labels-1.0-init-random", ["semi", "--labels", "1.0", "--init",
                                                               "random"])):
        args = ["--data", "colours", *PLAIN, *args, "--epochs", "2", "--batch-size", "8"]
        tag += "-epochs-2-batch-size-8"
        assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
        after = classifier_of(trained, tag)["model"]
        assert all(not torch.equal(after[k], before[k]) for k in before
                   if k.endswith(("weight", "running_mean")))
        rates = [r["rate"] for r in steps_of(trained, tag)]
        assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 2
        if "0.5" in tag:
            assert len(rates) == 4  # 7 + 4 + 4 images: 8 and 7 in each epoch


def test_the_four_protocols_have_the_settings_of_supplement_b():
    for args, expected in (
            (["--eval"], (100, 1024, 2.0, 0.0)),
            (["--eval", "semi"], (100, 512, 0.05, 1e-4)),
            (["--eval", "finetune"], (100, 512, 0.001, 1e-4))):
        s = settings(["--data", "affectnet", *args])
        assert (s.epochs, s.batch_size, s.lr * s.batch_size / 256, s.weight_decay) == (
            pytest.approx(expected))
        assert s.momentum == 0.9 and s.view_size == 224 and s.crop_min == 0.08


def test_an_evaluation_takes_over_the_runs_net_and_sizes(trained, monkeypatch):
    monkeypatch.chdir(trained)
    s = settings(["--data", "colours", "--eval"])
    assert (s.preset, s.arch, s.view_size, s.crop_min) == ("laptop", "small", 32, 0.3)
    assert s.steps == 0  # the preset's are pre-training's
    assert s.tag == "" and s.data == "colours"


def test_accuracies_are_of_rows_and_their_mean():
    got = S.summary(torch.tensor([0, 1, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1]), ["a", "b"])
    assert got["confusion"] == [[3, 1], [0, 2]]
    assert got["per_class"] == {"a": 75.0, "b": 100.0} and got["mean_accuracy"] == 87.5
    assert got["accuracy"] == pytest.approx(500 / 6) and got["images"] == 6


def test_training_pictures_are_cropped_and_flipped_and_test_pictures_are_not(trained, monkeypatch):
    trains, tests = [], []
    monkeypatch.setattr(S, "normalise", lambda x, colours: (tests.append(x), x.float())[1])
    monkeypatch.setattr(S, "feature_map", lambda net, x: (
        trains.append(x), torch.zeros(len(x), 256, 1, 1))[1])
    args = ["--data", "colours", *PLAIN, "--epochs", "8", "--batch-size", "30"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    _, paths, labels = S.labelled_pictures(Path("colours/train"))
    faces = S.Faces(paths, 32, 1, crop_min=0.3, labels=labels)
    batches = S.Batches(30, 30, 0, S.World(), partial=True)
    batches.last, flips = 8, 0
    keys = [key for batch in batches for key in batch]
    assert sum(map(len, trains)) == len(keys) == 240
    for x, key in zip(torch.cat(trains), keys):
        crop = faces[key]["views"][0].float()
        flips += torch.equal(x, crop.flip(2))
        assert torch.equal(x, crop) != torch.equal(x, crop.flip(2))
    assert 90 < flips < 150 and len({x.sum().item() for x in torch.cat(trains)}) > 200
    whole = [S.resize(S.read_picture(p), 32) for p in S.labelled_pictures(Path("colours/val"))[1]]
    assert torch.equal(torch.cat(tests[8:]), torch.stack(whole)) and len(whole) == 15


def test_labels_are_shared_out_by_class_and_by_the_seed_alone():
    labels = [0] * 200 + [1] * 40 + [2] * 3
    chosen = S.share_of_labels(labels, 0.1, seed=1)
    assert [sum(labels[i] == k for i in chosen) for k in range(3)] == [20, 4, 1]
    assert chosen == S.share_of_labels(labels, 0.1, seed=1) != S.share_of_labels(labels, 0.1, 2)
    assert S.share_of_labels(labels, 1.0, 0) == list(range(243))


def test_oversampling_shows_every_class_equally_often(trained, monkeypatch):
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    weights = (1 / torch.bincount(labels).double())[labels]
    batches = S.Batches(1000, 100, 0, S.World(), partial=True, weights=weights)
    batches.last = 30
    seen = torch.bincount(labels[[i for step in batches for _, _, i in step]])
    assert seen.sum() == 3000 and ((seen - 1000).abs() < 120).all()
    assert batches.order(0) == batches.order(0) != batches.order(1)
    drawn, real = [], S.Batches
    monkeypatch.setattr(S, "Batches", lambda *args: (drawn.append(args[-1]), real(*args))[1])
    for more in ([], ["--oversample"]):
        args = ["--data", "colours", *PLAIN, "--steps", "1", *more]
        assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    assert drawn[0] is None
    counts = torch.tensor([14, 9, 7])
    torch.testing.assert_close(drawn[1], (1 / counts.double()).repeat_interleave(counts))


def test_an_image_drawn_twice_in_an_epoch_gets_two_crops(trained):
    paths = S.find_pictures(trained / "colours/train")
    weights = torch.eye(len(paths))[4]
    batches = S.Batches(len(paths), 6, 0, S.World(), weights=weights)
    batches.last = 4
    keys = [k for step in batches for k in step]
    assert {index for *_, index in keys} == {4} and len(set(keys)) == len(keys) == 24
    faces = S.Faces(paths, 32, 1, crop_min=0.08, labels=[0] * len(paths))
    assert len({faces[k]["views"].sum().item() for k in keys}) > 20
    assert torch.equal(faces[keys[3]]["views"], faces[keys[3]]["views"])


def test_the_head_starts_near_0():
    torch.manual_seed(0)
    head = S.Head(2048, 8)
    assert abs(head.weight.std() - 0.01) < 0.0005 and abs(head.weight.mean()) < 0.0005
    assert torch.equal(head.bias, torch.zeros(8))


def test_the_head_is_fp32_under_bf16():
    head, x = S.Head(8, 3), seeded(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(x)
    assert out.dtype == torch.float32 and torch.equal(out, F.linear(x, head.weight, head.bias))


@pytest.mark.parametrize("ranks, seen", [(1, [6, 5]), (2, [6, 4]), (3, [6])])
def test_the_last_batch_of_an_epoch_is_shared_equally_and_repeats_nothing(ranks, seen):
    """11 images by 6; of the last 5, three ranks would have fewer than 2 each."""
    parts = [S.Batches(11, 6, 0, S.World(r, ranks), partial=True) for r in range(ranks)]
    assert {p.per_epoch for p in parts} == {len(seen)}
    for p in parts:
        p.last = 2 * len(seen)
    for number, shares in enumerate(zip(*parts)):
        assert len({*map(len, shares)}) == 1
        keys = [key for share in shares for key in share]
        assert len({i for *_, i in keys}) == len(keys) == seen[number % len(seen)]
    for p in parts:
        p.last = len(seen)
    assert len({i for p in parts for step in p for *_, i in step}) == sum(seen)


def test_results_of_other_options_have_files_of_their_own(trained, monkeypatch):
    copied(trained, "many")
    shutil.copy(trained / "runs/colours/backbone.pt", trained / "elsewhere.pt")
    for name, args in {
            "linear-colours": [],
            "linear-colours-seed-1": ["--seed", "1"],
            "linear-colours-init-random": ["--init", "random"],
            "linear-colours-init-elsewhere": ["--init", "elsewhere.pt"],
            "linear-colours-init-random-seed-1": ["--init", "random", "--seed", "1"],
            "linear-colours-oversample": ["--oversample"],
            "linear-colours-epochs-1": ["--epochs", "1"],
            "linear-colours-steps-1": ["--steps", "1"],
            "linear-colours-steps-1-lr-0.3": ["--steps", "1", "--lr", "0.3"],
            "semi-colours-labels-0.5-steps-1": ["semi", "--steps", "1", "--labels", "0.5"],
            "semi-colours-steps-1": ["semi", "--steps", "1"],
            "finetune-colours-steps-1": ["finetune", "--steps", "1"]}.items():
        before = files_of(trained, "many")
        args = ["--name", "many", *PLAIN, *args]
        assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
        after = files_of(trained, "many")
        assert {k: after[k] for k in before} == before
        new = {f"{name}.pt", f"eval-{name}.json"}
        if "steps" in name or "epochs" in name:
            new |= {f"checkpoint-{name}.pt", f"log-{name}.jsonl"}
        assert after.keys() - before.keys() == new


@pytest.mark.parametrize("one, other", [
    ("semi", "semi --weight-decay 0"), ("linear --preset laptop", "linear --preset paper"),
    ("linear --preset paper", "linear --preset paper --epochs 0"),
    ("linear --init runs/a/backbone.pt", "linear --init runs/b/backbone.pt")])
def test_evaluations_that_differ_have_names_that_differ(one, other):
    one, other = (settings(["--data", "colours", "--eval", *args.split()]) for args in (one, other))
    assert one.tag != other.tag


def test_sizes_are_checked_with_their_preset_and_names_have_no_slash():
    assert settings(["--preset", "laptop", "--data", "d", "--ffl-size", "16"]).ffl_size == 16
    assert "/" not in settings(["--data", "d", "--eval", "--init", "/b.pt"]).tag
    assert settings(["--data", "d", "--eval", "semi", "--labels", "0.01", "--seed", "0"]).tag == ""


def test_sigterm_ends_a_converged_evaluation(trained, monkeypatch):
    real = S.normalise
    monkeypatch.setattr(S, "normalise", lambda *args: (S.stop_asked.set(), real(*args))[1])
    before = files_of(trained)
    assert in_process("--name", "colours", *PLAIN, cwd=trained, monkeypatch=monkeypatch) == 143
    assert files_of(trained) == before


def test_an_evaluation_starts_over_where_its_starting_weights_have_changed(trained, monkeypatch,
                                                                           capsys):
    """In a copy of a run's folder (cp -r), which can be evaluated and probed under its own name."""
    folder = shutil.copytree(trained / "runs/colours", trained / "runs/copy")
    before = files_of(trained)
    args, tag = ["--name", "copy", *PLAIN, "--epochs", "1"], "linear-colours-epochs-1"
    for told in ("starts\n", "complete", "starts over, since the weights", "complete"):
        if "over" in told:
            old = classifier_of(trained, tag, "copy")
            change(folder / "backbone.pt")
        assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
        assert told in capsys.readouterr().out
    new, steps = classifier_of(trained, tag, "copy"), steps_of(trained, tag, "copy")
    assert [r["step"] for r in steps] == [1] and old["start"] != new["start"]
    backbone = torch.load(folder / "backbone.pt", weights_only=True)
    assert all(torch.equal(new["model"][k], v) for k, v in backbone.items())
    assert in_process(*args, "--fresh", cwd=trained, monkeypatch=monkeypatch) == 0
    fresh = classifier_of(trained, tag, "copy")["model"]
    assert all(torch.equal(fresh[k], v) for k, v in new["model"].items())
    assert files_of(trained) == before and P.main(["copy", "--workers", "0"]) == 0


def test_finetuning_makes_a_missing_or_outdated_linear_result_first(trained, monkeypatch):
    folder = copied(trained, "tuned")
    args, made = ["--name", "tuned", *PLAIN, "finetune", "--steps", "1"], []
    for times in (0, 1, 2):
        if times == 2:
            change(folder / "backbone.pt")
        assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
        made.append((folder / "linear-colours.pt").read_bytes())
        digest = hashlib.sha256((folder / "backbone.pt").read_bytes()).hexdigest()
        assert classifier_of(trained, "linear-colours", "tuned")["start"] == digest
        got = result(trained, "finetune-colours-steps-1", "tuned")
        assert got["start"] == hashlib.sha256(made[-1]).hexdigest()
        remade = folder / "eval-linear-colours.json"
        assert remade.exists() == (times != 1)
        remade.unlink(missing_ok=True)
    assert made[0] == made[1] != made[2]


def test_finetuning_on_other_classes_is_refused_before_the_linear_result_is_made(
        trained, tmp_path, monkeypatch, capsys):
    folder = copied(trained, "early")
    colours(tmp_path / "few", {"0_a": 6, "1_b": 6}, seed=1)
    args = ["--data", tmp_path / "few", "--name", "early", *PLAIN, "finetune", "--steps", "1"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 2
    assert "would know 0_a, 1_b, 2_c, but" in (told := capsys.readouterr().err)
    assert "has 0_a, 1_b; give --init." in told and not (folder / "linear-colours.pt").exists()


def test_heads_move_between_datasets_class_by_class(trained, tmp_path, monkeypatch, capsys):
    """B.4: the classes by name, in whatever order; others are an error that lists both."""
    copied(trained, "moved")
    assert in_process("--name", "moved", *PLAIN, cwd=trained, monkeypatch=monkeypatch) == 0
    colours(tmp_path / "others", {"0_a": 6, "1_b": 6, "2_c": 6}, seed=1)
    args = ["--data", tmp_path / "others", "--name", "moved", *PLAIN, "finetune", "--steps", "1"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    linear = trained / "runs/moved/linear-colours.pt"
    got = result(trained, "finetune-others-steps-1", "moved")
    assert got["start"] == hashlib.sha256(linear.read_bytes()).hexdigest()
    assert not (trained / "runs/moved/linear-others.pt").exists()
    # A head whose classes stand in another order is turned.
    saved = torch.load(linear, weights_only=True)
    torch.save(saved | {"classes": ["2_c", "0_a", "1_b"]}, tmp_path / "turned.pt")
    net = S.small_resnet()
    net.fc, head = nn.Identity(), S.Head(net.fc.in_features, 3)
    S.start_net(net, head, S.Settings(eval="finetune"), tmp_path / "turned.pt",
                ["0_a", "1_b", "2_c"])
    net.fc = head
    for k, v in net.state_dict().items():
        assert torch.equal(v, saved["model"][k][[1, 2, 0]] if k[:3] == "fc." else saved["model"][k])
    # Other classes.
    colours(tmp_path / "more", {"0_a": 4, "1_b": 4, "2_c": 4, "3_d": 4})
    args[1] = tmp_path / "more"
    said = complaint(args, trained, monkeypatch, capsys)
    assert "0_a, 1_b, 2_c, but" in said and "0_a, 1_b, 2_c, 3_d" in said


def test_an_evaluation_resumes_from_its_last_checkpoint_bit_exactly(trained, monkeypatch, capsys):
    args = ["--data", "colours", *PLAIN, "semi", "--labels", "0.9", "--epochs", "3",
            "--batch-size", "8", "--save-every", "4"]
    tag, reduced, calls = "semi-colours-labels-0.9-epochs-3-batch-size-8", S.reduced, []
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    whole, log = classifier_of(trained, tag)["model"], steps_of(trained, tag)

    def stops(*args):
        calls.append(0)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return reduced(*args)

    with monkeypatch.context() as patch:
        patch.setattr(S, "reduced", stops)
        assert in_process(*args, "--fresh", cwd=trained, monkeypatch=monkeypatch) == 130
    capsys.readouterr()
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    assert "resumes after step 8" in capsys.readouterr().out
    parts = classifier_of(trained, tag)["model"]
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())
    assert steps_of(trained, tag) == log and len(log) == 12


def test_every_rank_tests_each_image_once_with_rank_0s_net(trained, monkeypatch):
    monkeypatch.chdir(trained)
    s, sent = settings(["--data", "colours", *PLAIN]), []
    monkeypatch.setattr(S.dist, "broadcast", lambda tensor, source: sent.append((tensor, source)))
    classes, paths, labels = S.labelled_pictures(Path("colours/val"))
    torch.manual_seed(0)
    net = S.small_resnet().eval()
    faces = S.Faces(paths, image_size=32, labels=labels)
    outputs, seen = S.outputs_of(s, S.World(), net, faces, (S.MEAN, S.STD))
    assert seen.tolist() == labels and not sent
    for i in (0, 7, 14):
        x = TF.normalize(TF.to_tensor(TF.resize(Image.open(paths[i]), [32, 32])), S.MEAN, S.STD)
        torch.testing.assert_close(outputs[i], net(x[None])[0].detach(), rtol=1e-3, atol=1e-3)
    for rank in range(2):
        torch.testing.assert_close(
            S.outputs_of(s, S.World(rank, 2), net, faces, (S.MEAN, S.STD)), (outputs, seen))
    told = {t.data_ptr() for t, source in sent if source == 0}
    assert told >= {t.data_ptr() for t in net.state_dict().values()}


def test_three_ranks_take_the_same_linear_steps_as_one_and_test_alike(trained, monkeypatch):
    """The head's gradient is a mean over the whole batch, also over the last 6 of 30 images. The
    pictures are of one pixel: ranks flip by dice of their own."""
    colours(trained / "flat", {"0_a": 14, "1_b": 9, "2_c": 7}, size=1)
    copied(trained, "three")
    args = ["--data", "flat", "--name", "three", *PLAIN, "--epochs", "2", "--batch-size", "12"]
    tag, heads, results = "linear-flat-epochs-2-batch-size-12", [], []
    for ranks in (0, 3, 0):
        if ranks:
            run_program(*args, "--fresh", cwd=trained, processes=ranks)
        else:  # the second time it tests what three have trained
            assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
        heads.append(classifier_of(trained, tag, "three")["model"]["fc.weight"])
        results.append(result(trained, tag, "three"))
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-3, atol=1e-5)
    assert torch.equal(heads[1], heads[2]) and not torch.equal(heads[0], heads[1])
    assert results[1]["confusion"] == results[2]["confusion"] and results[1]["images"] == 15


def test_two_ranks_finetune_from_the_converged_head_of_one_and_test_alike(trained, monkeypatch):
    folder = copied(trained, "two")
    assert in_process("--name", "two", *PLAIN, cwd=trained, monkeypatch=monkeypatch) == 0
    alone = classifier_of(trained, "linear-colours", "two")["model"]["fc.weight"]
    (folder / "linear-colours.pt").unlink()
    args, tag = ["--name", "two", *PLAIN, "finetune", "--steps", "2"], "finetune-colours-steps-2"
    run_program(*args, cwd=trained, processes=2)
    shared = classifier_of(trained, "linear-colours", "two")["model"]["fc.weight"]
    torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-3)
    assert result(trained, "linear-colours", "two")["images"] == 15
    tuned = result(trained, tag, "two")
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0  # one tests the same net
    assert result(trained, tag, "two")["confusion"] == tuned["confusion"]
    assert tuned["images"] == 15


def test_evaluations_that_cannot_be_get_a_sentence(trained, tmp_path, monkeypatch, capsys):
    colours(tmp_path / "new", {"0_a": 4, "1_b": 4})
    new = ["--data", tmp_path / "new", *EVAL]
    for args, words in (
            ([*new, "--eval"], "runs/new/backbone.pt is missing"),
            ([*new, "--eval", "finetune", "--name", "nothing"], "is missing, from which"),
            ([*new, "--eval", "--init", "no.pt"], "no.pt is missing, from which this starts"),
            ([*new, "--eval", "finetune", "--init", "runs/colours/backbone.pt"], "has no head"),
            ([*new, "--oversample"], "--oversample needs --eval"),
            ([*new, "--eval", "--labels", "0.5"], "--labels needs --eval semi"),
            ([*new, "--eval", "--init", "imagenet"], "no ImageNet weights for --arch small"),
            ([*new, "--eval", "cubic"], "--eval cubic is not one of"),
            ([*new, "--eval", "semi", "--labels", "1.5"], "--labels must be from 1e-06 to 1"),
            (["--data", "colours", *PLAIN, "--arch", "resnet18"], "does not fit this net")):
        assert words in complaint(args, trained, monkeypatch, capsys)
    (tmp_path / "new/val/1_b").rename(tmp_path / "new/val/1_c")
    assert "0_a, 1_b, but val has 0_a, 1_c" in complaint([*new, "--eval", "--init", "random"],
                                                        trained, monkeypatch, capsys)
    for split in ("val", "train"):
        data = colours(tmp_path / f"bad-{split}", {"0_a": 4, "1_b": 4})
        (data / split / "0_a/2.png").write_text("no picture")
        args = ["--data", data, *EVAL, "--eval", "--init", "random"]
        for more in ([], ["--epochs", "1"]):  # by converged_head, and by SGD, which takes another
            good = split == "train" and more
            assert in_process(*args, *more, "--workers", "0", cwd=trained,
                              monkeypatch=monkeypatch) == (0 if good else 2)
            assert f"{split}/0_a/2.png cannot be read" in capsys.readouterr().err


def test_the_demo_compares_the_trained_with_the_untrained_backbone(trained, monkeypatch, capsys):
    monkeypatch.setattr(S, "HERE", trained)
    (trained / "data").mkdir()
    (trained / "data/toy").symlink_to(trained / "colours")
    monkeypatch.setitem(S.PRESETS, "laptop", S.PRESETS["laptop"] | dict(
        steps=2, batch_size=12, view_size=32, ffl_size=28, patch=4))
    commands = []

    def start(command, stdout=None):
        commands.append([command[1].name, *command[2:]])
        out = io.StringIO() if stdout else sys.stdout
        with contextlib.redirect_stdout(out):
            code = command[1].name != "toy.py" and {"figures.py": D, "probe.py": P}[
                command[1].name].main(command[2:])
        return subprocess.CompletedProcess(command, code, out.getvalue() if stdout else None)

    monkeypatch.setattr(S.subprocess, "run", start)
    assert in_process("--workers", "0", cwd=trained, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert commands == [["toy.py"], [
        "probe.py", "toy", "--init", "pixels", "--workers", "0"], ["figures.py", "toy"]]
    drawn = {p.stem for p in (trained / "runs/toy/figures").iterdir()}
    assert drawn >= {"masks", "reconstructions", "attention", "curves", "confusion-linear-toy"}
    untrained, got = (result(trained, f"linear-toy{x}", "toy") for x in ("-init-random", ""))
    digest = hashlib.sha256((trained / "runs/toy/backbone.pt").read_bytes()).hexdigest()
    assert (untrained["start"], got["start"]) == ("random", digest)
    assert P.main(["toy", "--init", "pixels"]) == 0
    pixels = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = re.findall(r"(?m)^  +([\d.]+) %  (.*)$", out)
    assert [float(number) for number, _ in told] == [
        round(x, 1) for x in (100 / 3, *(r["accuracy"] for r in (pixels, untrained, got)))]
    assert [re.search("guessing|pixels|before|after it", words)[0] for _, words in told] == [
        "guessing", "pixels", "before", "after it"]
    assert "runs/toy/figures" in out and "muxspace --preset laptop" in out.splitlines()[-1]


def test_the_demo_draws_missing_faces_once_on_each_machine(tmp_path, monkeypatch):
    started, code, s = [], 0, S.Settings(eval="linear")
    monkeypatch.setattr(S, "HERE", tmp_path)
    monkeypatch.setattr(S, "evaluate", lambda *_: started.append("evaluation"))
    monkeypatch.setattr(S.subprocess, "run", lambda command, **how: (
        started.append(command[-1].name), subprocess.CompletedProcess(command, code))[1])
    S.demo(s, S.World())
    monkeypatch.setenv("LOCAL_RANK", "1")
    S.demo(s, S.World())
    monkeypatch.setenv("LOCAL_RANK", "0")
    code = 1
    with pytest.raises(S.UserError, match="toy.py ended with code 1"):
        S.demo(s, S.World())
    code = -2  # Ctrl-C reaches the program of data/ as well
    S.stop_asked.set()
    with pytest.raises(S.UserError, match="stopped; the same command") as stopped:
        S.from_rank0(S.World(), lambda: S.run_program("toy.py"))
    assert stopped.value.code == 143
    S.stop_asked.clear()
    assert started == ["toy.py", "evaluation", "evaluation", "toy.py", "toy.py"]


@pytest.mark.parametrize("args, words", [
    (["--data", "nowhere"], "no dataset nowhere"),
    (["--data", ""], "there is no dataset"),
    (["--no-such-option"], "unrecognized arguments"),
    (["--epochs", "many"], "invalid int value"),
    (["--preset", "huge"], "--preset huge is not one of paper, laptop"),
    (["--arch", "vgg"], "--arch vgg is not one of small, "),
    (["--gfl", "dino"], "--gfl dino is not one of byol"),
    (["--ffl", "some"], "--ffl some is not one of semantic, random, none"),
    (["--eval", "knn"], "--eval knn is not one of linear, semi, finetune"),
    (["--patch", "5"], "an image of 28 pixels is not made of patches of 5;"),
    (["--groups", "30"], "30 channel groups do not divide 256 channels"),
    (["--patch", "28"], "an image of 28 pixels is not made of patches of 28;"),
    (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
    (["--hidden", "4"], "--hidden must be at least 8, not 4"),
    (["--mask-ratio", "1.5"], "--mask-ratio must be from 0.01 to 0.99, not 1.5"),
    (["--alpha", "-0.1"], "--alpha must be at least 0, not -0.1"),
    (["--lr", "nan"], "--lr must be at least 0, not nan"),
    (["--epochs", "0"], "--epochs 0 is for --eval linear"),
    (["--batch-size", "1"], "must be at least 2 for each of 1 processes"),
    (["--batch-size", "1000"], "--batch-size 1000 must be at least 2 for each of 1 processes"),
    (["--labels", "0.1", "--eval"], "--labels needs --eval semi"),
    (["--oversample"], "--oversample needs --eval"),
    (["--name", "../up"], "one folder's name"),
    (["--name", ".."], "one folder's name"),
    (["--ffl", "none", "--connection", "direct"], "nothing to connect"),
    (["--init", "nofile"], "nofile is missing"),
    (["--eval", "--name", "nope"], "runs/nope/backbone.pt is missing"),
])
def test_wrong_arguments_get_a_sentence(args, words, toy, tmp_path, monkeypatch, capsys):
    assert words in complaint(["--data", toy, *TINY, *args], tmp_path, monkeypatch, capsys)


def test_an_empty_folder_gets_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    said = complaint(["--data", "empty", *TINY], tmp_path, monkeypatch, capsys)
    assert "holds no pictures" in said
    Image.new("L", (9, 9)).save(tmp_path / "empty/one.png")
    said = complaint(["--data", "empty", *TINY], tmp_path, monkeypatch, capsys)
    assert "1 pictures are too few: each of 1 processes needs two" in said


def test_unreadable_pictures_are_named_by_loader_workers(tmp_path, monkeypatch, capfd):
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(12):  # as many as a step takes
        Image.effect_noise((32, 32), 90).save(bad / f"{i:02}.png")
    for i in (3, 4, 8):  # are stepped over, and named once by all workers
        (bad / f"{i:02}.png").write_text("no picture")
    args = ["--data", "bad", *TINY, "--steps", "3", "--workers", "2"]
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    named = sorted(capfd.readouterr().err.strip().split("\n"))
    bad_one = "simfle: bad/{:02}.png cannot be read (UnidentifiedImageError)."
    assert named == [bad_one.format(i) for i in (3, 4, 8)]
    for path in bad.iterdir():
        path.write_text("no picture")
    assert in_process(*args, "--fresh", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    *named, said = filter(None, capfd.readouterr().err.split("\n"))
    assert set(named) == {bad_one.format(i) for i in range(12)}
    assert said == "simfle: the pictures named above cannot be read; mend or remove them."


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    def fails(file):
        file.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"good")
    with pytest.raises(S.UserError, match="disk full.*intact"):
        S.write_whole(path, fails)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_wrong_checkpoints_get_a_sentence_and_stay_as_they_are(toy, tmp_path, monkeypatch, capsys):
    args = ["--data", toy, *TINY, "--steps", "1", "--name", "r"]
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    path = tmp_path / "runs/r/checkpoint.pt"
    good = path.read_bytes()
    for more, words in ((["--momentum", "0.8", "--groups", "16"],
                         "groups was 32 and is now 16; momentum was 0.9 and is now 0.8"),
                        (["--alpha", "0.1"], "alpha was 0.3 and is now 0.1"),
                        (["--batch-size", "6"], "batch was 12 and is now 6"),
                        (["--seed", "7"], "seed was 0 and is now 7")):
        assert words in complaint([*args, *more], tmp_path, monkeypatch, capsys)
        assert path.read_bytes() == good
    picture = next((toy / "train").rglob("*.png"))
    content = picture.read_bytes()
    try:  # as many pictures, but not the same ones
        renamed = picture.rename(picture.with_stem("0"))
        assert "are not those it saw" in complaint(args, tmp_path, monkeypatch, capsys)
        renamed.rename(picture)
        picture.write_bytes(content + b" ")
        assert "are not those it saw" in complaint(args, tmp_path, monkeypatch, capsys)
    finally:
        picture.write_bytes(content)
    saved = torch.load(path, weights_only=True)
    missing = saved | {"model": {k: v for k, v in saved["model"].items() if "predictor" not in k}}
    for content, words in ((b"", "not a checkpoint"), (good[:1000], "not a checkpoint"),
                           (b"text", "not a checkpoint"), ([1, 2], "not a checkpoint"),
                           ({"a": 1}, "no checkpoint of this version"), (missing, "does not fit"),
                           (Evil(tmp_path), "not a checkpoint")):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        before = path.read_bytes()
        assert words in complaint(args, tmp_path, monkeypatch, capsys), words
        assert path.read_bytes() == before and not (tmp_path / "evil").exists()


class Evil:
    """A pickle that runs code when it is loaded."""

    def __init__(self, folder):
        self.command = f"touch {folder}/evil"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("what", ["L_s", "gradient"])
def test_what_is_not_finite_ends_the_run_before_the_step(what, toy, tmp_path, monkeypatch, capsys):
    args = ["--data", toy, *TINY, "--steps", "4", "--save-every", "2", "--name", "r"]
    report, set_up, calls, made = S.report, S.set_up, [], []

    def broken(loss, **parts):
        calls.append(0)
        if len(calls) == 3 and what == "L_s":
            loss = parts["L_s"] = loss * math.nan
        if len(calls) == 3 and what == "gradient":  # the root's slope at 0 is infinite
            loss = loss + (loss * 0).sqrt()
        return report(loss, **parts)

    with monkeypatch.context() as patch:
        patch.setattr(S, "set_up", lambda *a, **k: made.append(set_up(*a, **k)) or made[-1])
        patch.setattr(S, "report", broken)
        error = complaint(args, tmp_path, patch, capsys)
    assert "not finite in step 3 (" in error and f"{what} nan" in error
    assert what == "L_s" or "L_s nan" not in error
    assert all(p.isfinite().all() for p in made[0].model.parameters())  # no step was taken
    assert in_process(*args, "--lr", "0.1", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert "resumes after step 2, where the learning rate was" in capsys.readouterr().out
    saved = torch.load(tmp_path / "runs/r/checkpoint.pt")
    assert saved["step"] == 4 and all(v.isfinite().all() for v in saved["model"].values())


def test_more_processes_than_gpus_get_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(S.UserError, match="2 processes were started on a machine with 1 GPUs"):
        with S.processes():
            pass


def test_torchrun_takes_none_of_our_options_for_its_own():
    """Its parser knows abbreviations: `--run` would be an ambiguous one even behind the script."""
    from torch.distributed.run import get_args_parser
    for name in asdict(S.Settings()):
        mine = ["--" + name.replace("_", "-"), "x"]
        assert get_args_parser().parse_args(["simfle.py", *mine]).training_script_args == mine


def test_under_torchrun_a_problem_is_told_once(tmp_path):
    out = run_program("--data", "nowhere", cwd=tmp_path, processes=2, expect=1)
    assert out.count("simfle: there is no dataset nowhere") == 1
    assert "exitcode  : 2" in out and "Traceback (most recent call last):\n  File \"" + str(
        HERE / "simfle.py") not in out


# ---------------------------------------------------------------- The toy faces and the README


def test_toy_faces_are_the_same_for_the_same_seed_and_others_for_another(tmp_path):
    def draw(name, seed, said=""):
        out = subprocess.run([sys.executable, HERE / "data" / "toy.py", "--out", tmp_path / name,
                              "--train", "16", "--val", "8", "--size", "32", "--seed", str(seed)],
                             check=True, capture_output=True, text=True).stdout
        assert bool(out) == (said is not None) and ("drawn anew" in out) == (said == "anew")
        return {str(p.relative_to(tmp_path / name)): p.read_bytes()
                for p in sorted((tmp_path / name).rglob("*.png"))}

    one, two, other = draw("one", 0), draw("two", 0), draw("other", 1)
    assert one == two and one.keys() == other.keys()
    (tmp_path / "two/mine.png").touch()
    assert draw("one", 0, said=None) == one and draw("two", 1, said="anew") == other | {
        "mine.png": b""}
    (tmp_path / "one/drawn.txt").write_text("by an older version")
    assert draw("one", 0, said="anew") == one
    (tmp_path / "one/val/7_contempt/00007.png").unlink()  # interrupted, or removed
    shutil.rmtree(tmp_path / "one/train")
    assert draw("one", 0) == one and draw("one", 0, said=None) == one
    assert all(one[k] != other[k] for k in one) and len(set(one.values())) == 24
    assert {k.split("/")[1] for k in one if k.startswith("train")} == {
        "0_neutral", "1_happiness", "2_sadness", "3_surprise", "4_fear", "5_disgust", "6_anger",
        "7_contempt"}


def test_toy_tells_in_one_sentence_what_it_cannot_do_and_leaves_what_others_drew(tmp_path):
    mine = put(tmp_path / "mine/train/0_neutral/20240101.png")
    before = mine.read_bytes()
    for options, words in ((["--out", mine], "neutral/20240101.png'; mend that, and start"),
                           (["--size", "0"], "--size must be at least 8"),
                           (["--val", "-5"], "--train and --val at least 0"),
                           (["--out", tmp_path / "mine"], "mine holds what was not drawn here;")):
        done = subprocess.run([sys.executable, HERE / "data" / "toy.py", "--out", tmp_path / "new",
                               "--train", "8", "--val", "8", *options], capture_output=True,
                              text=True)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert mine.read_bytes() == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_toy_is_stopped_without_a_word(tmp_path, kind, code):
    toy = subprocess.Popen([sys.executable, HERE / "data" / "toy.py", "--out", tmp_path],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True,  # and Ctrl-C as in a terminal, not after `&`
                           preexec_fn=lambda: signal.signal(kind, signal.SIG_DFL))
    try:
        toy.stdout.readline()  # the first 500 are there
        os.killpg(toy.pid, kind) if kind == signal.SIGINT else toy.terminate()
        _, error = toy.communicate(timeout=60)
        assert (toy.returncode, error) == (code, "")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(toy.pid, signal.SIGKILL)


def test_a_drawing_process_that_is_killed_does_not_keep_the_others_waiting(tmp_path, monkeypatch):
    class Pool(contextlib.nullcontext):  # as multiprocessing's, of which a process was killed
        def __enter__(self):
            return self

        def imap_unordered(self, *args, **more):
            return self

        def next(self, timeout):
            raise multiprocessing.TimeoutError

    monkeypatch.setattr(Y.multiprocessing, "get_context",
                        lambda kind: types.SimpleNamespace(Pool=lambda *args: Pool()))
    with pytest.raises(OSError, match="has ended or hangs.*the same command goes on"):
        Y.draw_dataset(tmp_path / "faces", train=1, val=1)


# ---------------------------------------------------------------- Faults

FAULT = """
import os, signal, sys, time
import simfle as S
rank, where, when = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
S.Path(f"{os.getpid()}.pid").touch()
calls = 0
def fault(of, name, act):  # in the call number `when`
    real = getattr(of, name)
    def faulty(*a):
        global calls
        calls += 1
        if calls == when:
            act(*a)
        return real(*a)
    setattr(of, name, faulty)
def kill(*a):
    os.kill(os.getpid(), signal.SIGKILL)
def half(state, file):  # of a file is on disk
    save(state, file)
    file.flush()
    os.truncate(file.fileno(), file.tell() // 2)
    kill()
save, find, reduced = S.torch.save, S.find_pictures, S.reduced
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
if first and rank == int(os.environ.get("RANK", 0)):
    if where == "step":
        fault(S, "reduced", kill)
    if where == "write":  # backbone.pt and checkpoint.pt by turns
        fault(S.torch, "save", half)
    if where == "replace":  # the log; then backbone.pt, settings.json, checkpoint.pt by turns
        fault(S.Path, "replace", kill)
    if where == "nan":  # two calls a step
        fault(S, "similarity_loss", lambda p, z: z.fill_(float("nan")))
    if where == "pictures":  # another machine's copy lacks the last one
        S.find_pictures = lambda folder: find(folder)[:-1]
        os.environ["LOCAL_RANK"] = "0"
    if where == "sleep":
        S.reduced = lambda *a: (time.sleep(0.3), reduced(*a))[1]
sys.exit(S.main(sys.argv[4:]))
"""


def start_faulty(where, when, args, cwd, processes=0, rank=0, torchrun=(), **how):
    (cwd / "faulty.py").write_text(FAULT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun,
              f"--nproc_per_node={processes}"] if processes else [sys.executable]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(HERE))
    return subprocess.Popen([*launch, "faulty.py", str(rank), where, str(when), *map(str, args)],
                            cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **how)


def faulty_args(toy):
    return ["--data", toy, *TINY, "--epochs", "2", "--save-every", "2", "--name", "r",
            "--log-every", "3"]  # so that a checkpoint falls between two lines of the log


def wait_for(words, one):
    while words not in (line := one.stdout.readline()):
        assert line, one.stderr.read()


@pytest.fixture(scope="session")
def uninterrupted(toy, tmp_path_factory):
    """Runs of two epochs that nothing disturbed, by number of processes."""
    @functools.cache
    def make(processes=0):
        cwd = tmp_path_factory.mktemp("whole")
        if processes:
            one = start_faulty("nowhere", 0, faulty_args(toy), cwd, processes)
            out, err = one.communicate()
            assert one.returncode == 0, err
        else:
            with pytest.MonkeyPatch.context() as patch:
                assert in_process(*faulty_args(toy), cwd=cwd, monkeypatch=patch) == 0
        return cwd / "runs/r"
    return make


def logged(folder):
    """The values of each step in the log; without the sums, which begin anew with a process."""
    return {r["step"]: {k: v for k, v in r.items() if not k.startswith("masked")}
            for r in records(folder)}


def resumes_equal(step, toy, cwd, whole, monkeypatch, capsys):
    """The same command resumes after this step, and ends as if nothing had happened."""
    capsys.readouterr()
    assert in_process(*faulty_args(toy), cwd=cwd, monkeypatch=monkeypatch) == 0
    told = f"resumes after step {step}\n" if step else "; starts\n"
    assert told in capsys.readouterr().out
    assert same_state(whole, cwd / "runs/r")
    expected, lines = logged(whole), logged(cwd / "runs/r")
    assert len(expected) == 4 and expected == {k: lines[k] for k in expected}
    assert not list(cwd.rglob("*.part"))


@pytest.mark.parametrize("where, when, step", [
    ("replace", 7, 2)] + [
    pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("step", 1, 0), ("step", 3, 2), ("step", 4, 2), ("step", 6, 4), ("step", 10, 8),
        ("write", 1, 0), ("write", 2, 0), ("write", 3, 2), ("write", 4, 2), ("write", 10, 8),
        ("replace", 1, 0), ("replace", 2, 0), ("replace", 3, 0), ("replace", 4, 0),
        ("replace", 5, 2), ("replace", 6, 2))])
def test_a_killed_run_resumes_and_ends_bit_equal(where, when, step, toy, tmp_path, monkeypatch,
                                                 capsys, request, uninterrupted):
    not_unless_slow(request)
    killed = start_faulty(where, when, faulty_args(toy), tmp_path)
    killed.communicate()
    assert killed.returncode == -9
    resumes_equal(step, toy, tmp_path, uninterrupted(), monkeypatch, capsys)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others_and_a_restart_brings_the_run_back(
        processes, toy, tmp_path, request, uninterrupted):
    not_unless_slow(request)
    one = start_faulty("step", 8, faulty_args(toy), tmp_path, processes, rank=1,
                       torchrun=["--max-restarts=1"])
    out, err = one.communicate(timeout=120)
    assert one.returncode == 0, out + err
    assert out.count("resumes after step 6") == 1
    assert "rank 0 ends, because another one has ended" in err
    assert same_state(uninterrupted(processes), tmp_path / "runs/r")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_machine_that_loses_power_resumes_with_all_processes(processes, toy, tmp_path, request,
                                                               uninterrupted):
    not_unless_slow(request)
    one = start_faulty("sleep", 0, faulty_args(toy), tmp_path, processes)
    wait_for("1/10  epoch 1", one)
    while not (tmp_path / "runs/r/checkpoint.pt").exists():
        time.sleep(0.01)
    for pid in [one.pid, *(int(p.stem) for p in tmp_path.glob("*.pid"))]:
        os.kill(pid, signal.SIGKILL)
    one.communicate()
    again = start_faulty("nowhere", 0, faulty_args(toy), tmp_path, processes)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0 and re.search("resumes after step [2468]\n", out), out + err
    assert same_state(uninterrupted(processes), tmp_path / "runs/r")


def test_a_loss_that_is_not_finite_on_one_process_stops_all_before_the_step(toy, tmp_path):
    one = start_faulty("nan", 5, faulty_args(toy), tmp_path, 2, rank=1)
    out, err = one.communicate(timeout=120)
    assert one.returncode != 0 and err.count("not finite in step 3 (loss nan, L_s nan") == 1
    assert "another one has ended" not in err  # both know it, and none waits for the other
    saved = torch.load(tmp_path / "runs/r/checkpoint.pt")
    assert saved["step"] == 2 and all(v.isfinite().all() for v in saved["model"].values())


def test_machines_with_different_pictures_are_told_before_the_first_step(toy, tmp_path):
    """The order of an epoch is a permutation of the list: of other lists, other images."""
    one = start_faulty("pictures", 0, faulty_args(toy), tmp_path, 2, rank=1)
    out, err = one.communicate(timeout=120)
    assert one.returncode != 0 and "1/10  epoch 1" not in out
    assert err.count("does not hold the same pictures on all machines") == 1
    assert "Traceback (most recent call last):\n  File \"" + str(HERE / "simfle.py") not in err


@pytest.mark.parametrize("processes", [0, 2])
def test_sigterm_ends_all_after_one_step_and_nothing_is_lost(processes, toy, tmp_path, monkeypatch,
                                                             capsys, uninterrupted):
    one = start_faulty("sleep", 0, faulty_args(toy), tmp_path, processes)
    wait_for("1/10  epoch 1", one)
    start = time.perf_counter()
    one.terminate()  # torchrun, or the process itself
    out, err = one.communicate(timeout=60)
    assert time.perf_counter() - start < 30 and one.returncode != 0
    step = int(re.search(r"stopped after step (\d+) of 10", err)[1])
    assert 1 <= step < 10 and (processes or one.returncode == 143)
    assert torch.load(tmp_path / "runs/r/checkpoint.pt")["step"] == step
    if processes:  # one process can take over from two
        assert in_process(*faulty_args(toy), cwd=tmp_path, monkeypatch=monkeypatch) == 0
        assert f"resumes after step {step}\n" in capsys.readouterr().out
    else:
        resumes_equal(step, toy, tmp_path, uninterrupted(), monkeypatch, capsys)


def test_another_number_of_processes_takes_the_rest_of_an_epoch_once():
    def steps(ranks):
        """The keys of the steps 3 to 17 (an epoch has 8), all ranks' together."""
        made = [S.Batches(100, 12, 3, S.World(rank, ranks)) for rank in range(ranks)]
        for batches in made:
            batches.first, batches.last = 3, 18
        return [sum(parts, []) for parts in zip(*made, strict=True)]

    order = S.Batches(100, 12, 3, S.World()).order(0)
    whole = steps(1)
    assert [key for keys in whole[:5] for key in keys] == [(0, i, order[i]) for i in range(36, 96)]
    assert all(epoch == 1 for keys in whole[5:13] for epoch, *_ in keys)
    assert len(whole) == 15 and whole == steps(2) == steps(3) == steps(6)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rest(toy, tmp_path, monkeypatch, capsys,
                                                           uninterrupted):
    import resource

    args = faulty_args(toy)
    S.stop_asked.set()  # a checkpoint after the first step
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 143
    before = (tmp_path / "runs/r/checkpoint.pt").read_bytes()
    size = len(before) // 2
    full = start_faulty("nowhere", 0, args, tmp_path, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, size)))
    out, err = full.communicate()
    assert full.returncode == 2 and "Traceback" not in err
    assert "runs/r/checkpoint.pt could not be written" in err
    assert (tmp_path / "runs/r/checkpoint.pt").read_bytes() == before
    assert {p.name for p in (tmp_path / "runs/r").iterdir()} == {
        "checkpoint.pt", "checkpoint.lock", "backbone.pt", "settings.json", "log.jsonl"}
    resumes_equal(1, toy, tmp_path, uninterrupted(), monkeypatch, capsys)
    # The log is written more often than a checkpoint, so it may be the first to find no room.
    monkeypatch.setattr(S, "cut_log", lambda path, step: path.symlink_to("/dev/full"))
    told = complaint([*args, "--name", "full"], tmp_path, monkeypatch, capsys)
    assert "runs/full/log.jsonl could not be written ([Errno 28] No space left" in told


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    torch.save({"model": {}}, tmp_path / "whole.pt")
    for error in (OSError(errno.EIO, "Input/output error"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                  RuntimeError("DefaultCPUAllocator: not enough memory: you tried")):
        def load(*args, **more):
            raise error

        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(type(error)):
            S.load_file(tmp_path / "whole.pt")


def test_what_one_process_alone_knows_it_tells(monkeypatch, capsys):
    def told(error):
        def fails():
            raise error

        assert S.program("simfle", fails) == 2
        return capsys.readouterr().err

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not told(S.UserError("all know it."))
    text = "Caught UnreadableError in DataLoader worker process 0.\nsimfle.UnreadableError: mend."
    assert told(S.UnreadableError(text)) == "\nsimfle: mend.\n"
    wrapped = torch._utils.ExceptionWrapper((S.UnreadableError, S.UnreadableError("mend."), None))
    with pytest.raises(S.UnreadableError):  # as a loader hands it on
        wrapped.reraise()
    assert told(OSError(24, "Too many open files")) == "\nsimfle: [Errno 24] Too many open files\n"


def test_a_disk_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert S.lock(tmp_path / "new/checkpoint.pt").writable()
    R.Journal(tmp_path, {}).file.close()


def test_a_removed_log_and_a_restart_with_fresh_cost_nothing(toy, tmp_path, monkeypatch, capsys):
    args = [*faulty_args(toy), "--epochs", "1", "--fresh"]
    reduced, calls = S.reduced, []

    def interrupted(*args):
        (tmp_path / "runs/r/log.jsonl").unlink(missing_ok=True)
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return reduced(*args)

    with monkeypatch.context() as patch:
        patch.setattr(S, "reduced", interrupted)
        assert in_process(*args, cwd=tmp_path, monkeypatch=patch) == 130
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun --max-restarts does
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "resumes after step 2\n" in out and "interrupted at once" in err
    assert [*logged(tmp_path / "runs/r")] == [3, 5]


def test_sigterm_in_the_last_step_of_a_run_stops_what_would_follow_it(trained, monkeypatch, capsys):
    step, sent = torch.optim.SGD.step, []

    def told(*args):  # behind the place where the step asks for signals
        if not sent:  # while it still learns the linear result
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return step(*args)

    monkeypatch.setattr(torch.optim.SGD, "step", told)
    for path in (trained / "runs/colours").glob("*linear-colours*"):
        path.unlink()
    args = ["--data", "colours", *EVAL, "--eval", "finetune", "--batch-size", "30", "--fresh"]
    monkeypatch.setitem(S.PROTOCOLS["laptop"]["linear"], "epochs", 1)
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 143
    assert "stopped; the same command starts this evaluation again" in capsys.readouterr().err
    assert (trained / "runs/colours/checkpoint-linear-colours.pt").exists()


def test_a_second_run_in_the_same_folder_says_so_and_leaves_it_alone(toy, tmp_path, monkeypatch,
                                                                     capsys):
    args = [*faulty_args(toy), "--epochs", "1"]
    one = start_faulty("sleep", 0, args, tmp_path)
    wait_for("1/5  epoch 1", one)
    error = complaint([*args, "--fresh"], tmp_path, monkeypatch, capsys)
    assert "another run is at work on runs/r/checkpoint.pt" in error
    out, err = one.communicate()  # it goes on to its end
    assert one.returncode == 0 and "5/5  epoch 1" in out and not err
    assert [*logged(tmp_path / "runs/r")] == [3, 5]


def odd_picture(path, kind):
    picture = Image.effect_noise((40, 40), 90)
    if kind in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"):
        picture = (picture.convert("I").point(lambda v: v * 256) if kind in ("I", "I;16")
                   else picture.convert("L" if kind in ("1", "F") else "RGB"))
        suffix = ".tif" if kind in ("F", "I", "YCbCr", "CMYK") else ".png"
        picture.convert(kind).save(path.with_suffix(suffix))
        try:
            Image.open(path.with_suffix(suffix)).load()
        except OSError as error:  # up to Pillow 11.0 at least, a TIFF in YCbCr
            pytest.skip(f"this Pillow does not read what it has written: {error}")
        return True
    picture.save(path.with_suffix(".jpg"))
    whole = path.with_suffix(".jpg").read_bytes()
    if kind == "bomb":  # says that it is 60,000 × 60,000
        big = Image.new("1", (8, 8))
        big.save(path.with_suffix(".png"))
        content = bytearray(path.with_suffix(".png").read_bytes())
        content[16:24] = (60_000).to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        path.with_suffix(".png").write_bytes(content)
        path.with_suffix(".jpg").unlink()
    else:
        path.with_suffix(".jpg").write_bytes({"truncated": whole[:len(whole) // 2], "empty": b"",
                                              "text": b"no picture", "grey": whole}[kind])
    return kind == "grey"


@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16",
                                  "grey", "truncated", "empty", "text", "bomb"])
def test_odd_pictures_are_read_and_broken_ones_counted(kind, tmp_path):
    good = odd_picture(tmp_path / "0odd", kind)
    Image.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "1good.png")
    faces = S.Faces(S.find_pictures(tmp_path), 32, 2, 28)
    item, next_one = faces[0, 0, 0], faces[0, 0, 1]
    assert faces.named.tolist() == [not good, False]
    assert item["views"].shape == (2, 3, 32, 32)
    image = item["image"].float()
    if good:
        assert image.std() > 20 and 60 < image.mean() < 190  # neither black nor cut off at white
    else:
        assert torch.equal(item["image"], next_one["image"])
        assert S.Faces(faces.paths, 32, 2, 28, labels=[0, 1])[0, 0, 0]["label"] == 1  # its own
        with pytest.raises(S.UserError, match="cannot be read"):
            S.Faces(faces.paths, image_size=28, labels=[0, 1])[0, 0, 0]


def test_a_full_memory_is_no_broken_picture_and_a_closed_terminal_no_reason_to_end(
        tmp_path, monkeypatch):
    Image.effect_noise((40, 40), 90).save(tmp_path / "1.png")
    (tmp_path / "0.png").write_text("no picture")
    faces = S.Faces(S.find_pictures(tmp_path), 32, 2, 28)
    with open(os.devnull, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
    assert torch.equal(faces[0, 0, 0]["image"], faces[0, 1, 1]["image"])

    def full(path):
        raise MemoryError

    monkeypatch.setattr(S, "read_picture", full)
    with pytest.raises(MemoryError):
        faces[0, 0, 0]


def test_a_picture_that_vanishes_during_training_is_stepped_over(tmp_path, monkeypatch, capsys):
    (tmp_path / "faces").mkdir()
    for i in range(12):
        Image.effect_noise((32, 32), 90).save(tmp_path / f"faces/{i}.png")
    (tmp_path / "faces/dangling.png").symlink_to("nowhere.png")
    reduced = S.reduced

    def removes(*args):
        (tmp_path / "faces/7.png").unlink(missing_ok=True)
        return reduced(*args)

    monkeypatch.setattr(S, "reduced", removes)
    assert in_process("--data", "faces", *TINY, "--steps", "3", "--workers", "0", cwd=tmp_path,
                      monkeypatch=monkeypatch) == 0
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"simfle: faces/{name}.png cannot be read (FileNotFoundError)."
        for name in (7, "dangling")]


# ---------------------------------------------------------------- What users run into


def in_a_small_room(size, args, cwd, program="simfle.py"):
    """The program with so little shared memory, as in a container. (code, error)"""
    command = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "
               f"{sys.executable} {HERE / program} {' '.join(map(str, args))}"]
    if subprocess.run([*command[:4], f"mount -t tmpfs -o size={size} tmpfs /dev/shm"],
                      capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm needs a privileged user")
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=120)
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_too_little_shared_memory_is_one_sentence_and_hangs_nowhere(trained, tmp_path):
    told = "too little shared memory for the loader workers"
    data = ["--data", trained / "colours", *TINY, "--steps", "4", "--view-size", "224"]
    code, error = in_a_small_room("1m", data, tmp_path)
    assert code == 2 and error.startswith(f"simfle: {told}") and "--shm-size" in error
    code, error = in_a_small_room("64k", ["colours", "--workers", "2"], trained, "data/probe.py")
    assert code == 2 and error.startswith(f"probe: {told}")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 822083584 bytes"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 822083584"),
    OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_out_of_memory_names_the_batch_size(error, toy, tmp_path, monkeypatch, capsys):
    def fails(self, *args):
        raise error

    monkeypatch.setattr(S.SimFLE, "forward", fails)
    told = complaint(["--data", toy, *TINY, "--workers", "0"], tmp_path, monkeypatch, capsys)
    assert told.startswith("simfle: out of memory") and "--batch-size" in told


def test_an_environment_that_is_half_set_gets_a_sentence(toy, tmp_path, monkeypatch, capsys):
    args = ["--data", toy, *TINY]
    assert "torchrun" in complaint([*args, "--local-rank=0"], tmp_path, monkeypatch, capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = complaint(args, tmp_path, monkeypatch, capsys)
    assert "WORLD_SIZE is set without RANK" in told and "torchrun" in told
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    told = complaint(args, tmp_path, monkeypatch, capsys)
    assert "MASTER_ADDR" in told and "torchrun" in told


def test_cores_are_those_of_the_container(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    for quota, expected in (("max 100000", 12), ("250000 100000", 2), ("50000 100000", 1),
                            ("9900000 100000", 12)):
        monkeypatch.setattr(S.Path, "read_text", lambda self: quota)
        assert S.cores() == expected


def test_no_console_and_no_closed_pipe_ends_a_training(toy, tmp_path):
    args = [sys.executable, HERE / "simfle.py", "--data", toy, *TINY, "--steps", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1251"}
    one = subprocess.Popen([*args, "--name", "a"], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    assert b"1 ? 12 on" in one.stdout.readline()  # × is not in cp1251
    one.stdout.close()
    error = one.stderr.read()
    assert one.wait() in (0, 120) and b"simfle:" not in error  # 120: Python's own, at its exit
    assert json.loads((tmp_path / "runs/a/log.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_pictures_are_upright_and_other_files_are_counted(tmp_path, capsys):
    picture = Image.new("RGB", (60, 30), "white")
    picture.paste("black", (0, 0, 30, 30))  # its left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the left half belongs on top
    picture.save(tmp_path / "turned.jpg", exif=exif)
    for name in ("faces.h5", "phone.heic", "Thumbs.db", ".hidden"):
        (tmp_path / name).write_bytes(b"no picture")
    assert S.find_pictures(tmp_path) == [str(tmp_path / "turned.jpg")]
    assert "3 files that Pillow does not read are left out" in capsys.readouterr().out
    # The same with a tag of a wrong type, such as cameras write: a resolution that is no number.
    tags = struct.pack("<2sHIHHHIIHHI4sI", b"II", 42, 8, 2, 0x0112, 3, 1, 6, 0x011A, 7, 4, b"none",
                       0)
    picture.save(tmp_path / "tags.jpg", exif=b"Exif\0\0" + tags)
    for name in ("turned.jpg", "tags.jpg"):
        x = S.read_picture(tmp_path / name)
        assert x.shape == (3, 60, 30) and x[:, :28].max() < 30 and x[:, 32:].min() > 220
    # prepare.py keeps that, as a link to the whole picture and as a smaller copy.
    for size, shape, name in ((0, (3, 60, 30), "turned"), (20, (3, 40, 20), "turned"),
                              (20, (3, 40, 20), "tags")):
        target = tmp_path / f"made/{name}{size}.jpg"
        R.make(R.Picture("train", 0, target.name, tmp_path, f"{name}.jpg", None, None), tmp_path,
               target, size)
        x = S.read_picture(target)
        assert x.shape == shape and x[:, 2 * shape[2] // 5].max() < 50
    # Lists give boxes of the picture as it is stored, which are not turned, whatever their size.
    for box in ((0, 0, 60, 30), (0, 0, 59, 30)):
        target = tmp_path / f"made/{box[2]}.jpg"
        R.make(R.Picture("train", 0, target.name, tmp_path, "turned.jpg", box, None), tmp_path,
               target, 0)
        assert S.read_picture(target).shape == (3, 30, box[2])


def test_a_disk_that_fails_is_no_broken_picture(tmp_path, monkeypatch):
    put(tmp_path / "a.jpg")
    one = R.Picture("train", 0, "a.jpg", tmp_path, "a.jpg", None, None)
    for error, kind in ((OSError(errno.EIO, "Input/output error"), OSError),
                        (MemoryError(), OSError), (SyntaxError("broken PNG"), R.Skip)):
        def load(*args):
            raise error

        monkeypatch.setattr(R.Image, "open", load)
        with pytest.raises(kind):
            R.make(one, tmp_path, tmp_path / "out/a.jpg", 0)


@pytest.mark.parametrize("mode, white", [("I;16", 4095), ("I;16", 65_535), ("I;16", 255),
                                         ("F", 1.0), ("F", 255.0), ("I", 4095)])
def test_deep_grey_is_scaled_by_the_next_white(mode, white, tmp_path):
    picture = Image.new("F", (8, 4), white * 0.5)
    picture.paste(white * 0.98, (0, 0, 4, 4))
    picture = picture if mode == "F" else picture.convert("I")
    picture = picture if mode in "IF" else picture.convert(mode)
    picture.save(tmp_path / "x.tif")
    x = S.read_picture(tmp_path / "x.tif").float()
    assert x.shape == (3, 4, 8)
    assert (x[:, :, :4] - 250).abs().max() < 3 and (x[:, :, 4:] - 127).abs().max() < 3


def test_a_folder_that_cannot_be_entered_is_told(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(S.UserError, match="Permission denied.*closed'; make it readable"):
        S.find_pictures(tmp_path)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(toy, tmp_path, monkeypatch, capsys):
    args = ["--data", toy, *TINY, "--steps", "4", "--workers", "0"]
    reduced, sent = S.reduced, []

    def pressed(*args):
        for kind in sent:
            os.kill(os.getpid(), kind)
        return reduced(*args)

    monkeypatch.setattr(S, "reduced", pressed)
    kinds = (signal.SIGINT, signal.SIGHUP)  # the second is that of a terminal that closes
    before = [signal.signal(kind, signal.default_int_handler) for kind in kinds]
    for step, kind in enumerate(kinds, 1):
        sent[:] = [kind]
        assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 143
        assert f"stopped after step {step} of 4; the same command" in capsys.readouterr().err
    sent[:] = 2 * [signal.SIGINT]
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 130
    out, err = capsys.readouterr()
    assert "resumes after step 2" in out and "interrupted at once" in err
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler  # it is back
    for kind in kinds:  # as for a process that nohup has started, or a script has sent behind
        signal.signal(kind, signal.SIG_IGN)
    sent[:] = 3 * kinds
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    for kind in kinds:
        signal.signal(kind, signal.SIG_DFL)
    terminated = signal.getsignal(signal.SIGTERM)
    S.ignore_signals(0)  # a loader worker has to outlive them, until its parent has saved
    assert all(signal.getsignal(kind) == signal.SIG_IGN for kind in kinds)
    signal.signal(signal.SIGTERM, terminated)
    for kind, handler in zip(kinds, before):
        signal.signal(kind, handler)


def test_a_run_on_pictures_without_labels_is_fine_tuned_on_others(trained, toy, tmp_path,
                                                                  monkeypatch):
    assert in_process("--data", toy / "train/0_neutral", "--name", "loose", *TINY, "--batch-size",
                      "4", "--steps", "1", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    args = ["--data", trained / "colours", "--name", "loose", *PLAIN, "finetune", "--steps", "1"]
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert {p.name for p in (tmp_path / "runs/loose").glob("*.pt")} >= {
        "linear-colours.pt", "finetune-colours-steps-1.pt"}
    # A run whose data are elsewhere needs its linear result alone.
    folder = tmp_path / "runs/loose"
    stored = json.loads((folder / "settings.json").read_text())
    text(folder / "settings.json", json.dumps(stored | {"data": "gone"}))
    (folder / "linear-colours.pt").rename(folder / "linear-gone.pt")
    assert in_process(*args, "--fresh", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert not (folder / "linear-colours.pt").exists()


def test_main_takes_paths_and_numbers(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert S.main(["--data", toy, *TINY, "--steps", 1]) == 0
    assert B.main(["--data", toy, "--steps", -1]) == 2


# ---------------------------------------------------------------- Part IV: tables 3 and 4

PAPER_GMAC = {  # Tables 3 and 4: (--ffl none, with FaceMAE)
    "byol": (16.5, 20.1), "simsiam": (8.3, 11.9), "moco": (8.2, 11.8), "mocov2": (8.3, 11.8),
    "simclr": (4.1, 7.7)}  # of SimCLR the paper counts one view
ROWS_OF_TABLES = [["--gfl", g, "--ffl", f] for g in ("byol", "simsiam", "moco", "mocov2", "simclr")
                  for f in ("none", "semantic")] + [["--ffl", "random"], ["--connection", "direct"]]


@pytest.mark.parametrize("row", ROWS_OF_TABLES, ids=" ".join)
def test_every_row_of_tables_3_and_4_has_the_papers_arithmetic(row, monkeypatch):
    gfl = row[1] if row[0] == "--gfl" else "byol"
    for module in (S, M):
        monkeypatch.setattr(module, "full_precision", lambda x: contextlib.nullcontext())
    with torch.device("meta"):  # shapes without numbers, and without autocast
        model = S.build_model(settings(["--preset", "paper", *row]))
        v, I = torch.zeros(2, 3, 224, 224), torch.zeros(2, 3, 112, 112)

        def flops(*inputs, of):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                of(*inputs)
            return counter.get_total_flops()

        total = flops(v, v, I, of=model) - (flops(v, of=model.backbone) if gfl == "simclr" else 0)
    assert total / 4e9 == pytest.approx(PAPER_GMAC[gfl]["none" not in row], rel=0.02)


@pytest.mark.parametrize("row", ROWS_OF_TABLES, ids=" ".join)
def test_every_row_trains_goes_on_and_leaves_a_backbone(row, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = ["--data", str(toy), *TINY, "--workers", "0", *row, "--steps", "4", "--save-every", "2"]
    assert M.main([*args, "--name", "whole"]) == 0
    real = S.save_checkpoint

    def save_and_stop(t, done):
        real(t, done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(S, "save_checkpoint", save_and_stop)
        assert M.main([*args, "--name", "parts"]) == 130
    capsys.readouterr()
    assert M.main([*args, "--name", "parts"]) == 0
    assert "resumes after step 2" in capsys.readouterr().out
    assert same_state(Path("runs/whole"), Path("runs/parts"))
    net, start = S.small_resnet(), S.build_model(settings(args)).backbone.resnet
    missing, unexpected = net.load_state_dict(torch.load("runs/whole/backbone.pt"), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    assert not torch.equal(net.conv1.weight, start.conv1.weight)
    if {"moco", "mocov2"} & set(row):
        state = torch.load("runs/whole/checkpoint.pt")["model"]
        filled = (state["gfl.queue"] != 0).any(dim=1)
        assert state["gfl.next"] == 48 and filled[:48].all() and not filled[48:].any()


def test_simfle_alone_knows_byol_only_and_baselines_adds_the_others(toy, tmp_path, monkeypatch):
    (tmp_path / "simfle.py").write_bytes((HERE / "simfle.py").read_bytes())
    args = ["--data", str(toy), *TINY, "--workers", "0", "--steps", "1"]
    code = f"import simfle; print([simfle.main({args} + ['--gfl', g]) for g in ('byol', 'moco')])"
    env = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True,
                          capture_output=True)
    assert done.stdout.endswith("[0, 2]\n") and (tmp_path / "runs/faces/backbone.pt").exists()
    error = done.stderr.strip()
    assert error.startswith("simfle: --gfl moco is not one of byol;") and error.count("\n") == 0
    monkeypatch.chdir(tmp_path)
    assert M.main([*args, "--gfl", "moco", "--name", "moco"]) == 0


def gfl_of(name, *more):
    torch.manual_seed(0)
    s = settings([*TINY, "--gfl", name, *more])
    return S.GFLS[name](s, S.Backbone(S.small_resnet(8)))


def short_moco(**more):
    """MoCo with a queue of ten keys of eight numbers."""
    torch.manual_seed(0)
    return M.MoCo(S.Backbone(S.small_resnet(8)), outputs=8, queue=10, **more)


def test_simsiams_other_view_is_a_constant_and_its_loss_that_of_the_paper_plus_1():
    gfl = gfl_of("simsiam")
    v1, v2, _ = small_inputs()
    L_s, hs, z1 = gfl(v1.cpu(), v2.cpu())
    z2 = gfl.online(v2.cpu())[0]
    p1, p2 = gfl.predictor(z1), gfl.predictor(z2)
    D = [-F.cosine_similarity(p, z).mean() for p, z in ((p1, z2), (p2, z1))]
    torch.testing.assert_close(L_s, 1 + (D[0] + D[1]) / 2)
    # Only predictions carry gradient: with the predictor's output cut off, nothing is left.
    weight = gfl.online.projector[0].weight
    constant = [-F.cosine_similarity(p, z.detach()).mean() for p, z in ((p1, z2), (p2, z1))]
    for a, b in zip(torch.autograd.grad(L_s, [weight], retain_graph=True),
                    torch.autograd.grad((constant[0] + constant[1]) / 2, [weight])):
        torch.testing.assert_close(a, b)
    assert len(hs) == 2


def test_nt_xent_is_the_double_loop():
    z1, z2, t = seeded(5, 8), seeded(5, 8, seed=1), 0.3
    views = [*z1, *z2]
    total = 0.0
    for i, a in enumerate(views):
        others = {j: math.exp(F.cosine_similarity(a, b, dim=0).item() / t)
                  for j, b in enumerate(views) if j != i}
        total -= math.log(others[(i + 5) % 10] / sum(others.values()))
    torch.testing.assert_close(M.nt_xent(z1, z2, t), torch.tensor(total / 10))
    gfl, (v1, v2, _) = gfl_of("simclr"), (x.cpu() for x in small_inputs())
    L_s, hs, z1 = gfl(v1, v2)
    torch.testing.assert_close(L_s, M.nt_xent(z1, gfl.online(v2)[0], 0.1))
    assert len(hs) == 2 and all(h.requires_grad for h in hs)


def test_bf16_does_not_touch_the_losses_of_other_gfls():
    z, moco = 9 * seeded(5, 8), short_moco()
    moco.queue.copy_(F.normalize(seeded(10, 8, seed=1), dim=1))
    for stream in (moco.online, moco.target):
        stream.forward = lambda v: (z, v)
    for loss in (lambda: M.nt_xent(z, z.flip(0), 0.1), lambda: moco(z, z)[0]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = loss()
        assert torch.equal(half, loss())


each_part = pytest.mark.parametrize("options", [  # every GFL, masking and connection
    *(f"--gfl {name}" for name in ("byol", "simsiam", "moco", "mocov2", "simclr")),
    "--ffl none", "--ffl random", "--connection direct"])


def replaying(masks):
    """`mask_lowest` that returns what stands in `masks`, one after the other. An empty list is
    filled with what it chooses itself."""
    if masks:
        return lambda a, ratio, chosen=iter(masks): next(chosen)
    return lambda a, ratio, choose=S.mask_lowest: masks.append(choose(a, ratio)) or masks[-1]


@each_part
def test_under_autocast_every_trained_part_has_the_gradients_of_fp32(options, monkeypatch):
    """Autocast keeps a weight's bf16 copy. In PyTorch 2.8 a copy made under `no_grad` has no
    gradient. Masks are those of fp32: other patches would be another loss."""
    s, masks, gradients = settings([*TINY, *options.split()]), [], []
    views = [seeded(16, 3, n, n, seed=i) for i, n in enumerate((32, 32, 28))]
    for bf16 in (False, True):
        model = S.build_model(s)
        if "moco" in options:  # without keys there is no loss
            model.gfl.queue.copy_(F.normalize(seeded(*model.gfl.queue.shape), dim=1))
        monkeypatch.setattr(S, "mask_lowest", replaying(masks))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = drawing_alike(lambda: model(*views))["loss"]
        monkeypatch.undo()
        loss.backward()
        parts = {}
        for name, p in model.named_parameters():
            if p.requires_grad and p.grad is not None:
                parts.setdefault(re.match(r"gfl\.(online\.)?\w+|ffl\.(mae\.)?\w+|\w+", name)[0],
                                 []).append(p.grad.flatten())
        gradients.append({name: torch.cat(gs) for name, gs in parts.items()})
    fp32, half = gradients
    assert fp32.keys() == half.keys() and len(fp32) >= 2
    for name in fp32:
        assert fp32[name].shape == half[name].shape and half[name].dtype == torch.float32
        assert F.cosine_similarity(fp32[name], half[name], dim=0) > 0.85, name
        assert 0.8 < half[name].norm() / fp32[name].norm() < 1.25, name


@each_part
def test_a_step_on_a_gpu_neither_waits_nor_mixes_devices(options, monkeypatch):
    """On fake tensors, which have a device and a shape, and no values: to read one is an error, as
    is an operation on two devices. (Copies to the device do not show, and the backward pass and the
    optimiser need a real GPU.)"""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    model = S.build_model(settings([*TINY, *options.split()]))
    order = types.SimpleNamespace(tolist=lambda: [0, 1, 2, 3])  # is drawn on the CPU
    monkeypatch.setattr(torch, "randperm", lambda n: order)
    with FakeTensorMode():
        try:
            torch.empty(2, device="cuda")[0]
        except RuntimeError:  # PyTorch 2.8
            pytest.skip("this PyTorch can index a fake GPU's tensors only beside a real GPU")
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for k, old in own.items():  # a layer without bias has a parameter None
                    new = None if old is None else torch.empty(old.shape, dtype=old.dtype,
                                                               device="cuda")
                    own[k] = (nn.Parameter(new, old.requires_grad)
                              if isinstance(old, nn.Parameter) else new)
        views, I = (torch.empty(*shape, dtype=torch.uint8, device="cuda")
                    for shape in ((6, 2, 3, 32, 32), (6, 3, 28, 28)))
        v1, v2 = (S.augment(views[:, i]) for i in range(2))
        assert v1.is_contiguous(memory_format=torch.channels_last) and v1.dtype == torch.float32
        with S.mixed_precision(S.World(device=torch.device("cuda"))):
            assert (v1[0, 0] @ v1[0, 0]).dtype == torch.bfloat16
            out = model(v1, v2, S.normalise(I))
        model.update()
        assert out["loss"].dtype == torch.float32
        assert all(v.device.type == "cuda" for v in out.values())


@pytest.mark.parametrize("name, t", [("moco", 0.07), ("mocov2", 0.2)])
def test_mocos_loss_is_that_of_finding_the_key_and_only_the_query_learns(name, t):
    gfl = gfl_of(name)
    v1, v2, _ = (x.cpu() for x in small_inputs())
    assert gfl(v1, v2)[0] == 0  # nothing to be told from yet
    gfl.queue[2:9] = F.normalize(seeded(7, 8), dim=1)  # the others are still empty
    L_s, hs, z1 = gfl(v1, v2)
    q = F.normalize(z1, dim=1)
    k = F.normalize(copy.deepcopy(gfl.target)(v2)[0], dim=1)
    total = 0.0
    for i in range(4):
        positive = math.exp((q[i] @ k[i]).item() / t)
        negative = sum(math.exp((q[i] @ n).item() / t) for n in gfl.queue[2:9])
        total -= math.log(positive / (positive + negative))
    torch.testing.assert_close(L_s, torch.tensor(total / 4), rtol=1e-4, atol=1e-4)
    L_s.backward()
    assert all(p.grad is None for p in gfl.target.parameters()) and len(hs) == 1
    assert hs[0].requires_grad  # L_d trains the backbone
    assert all(p.grad.abs().sum() > 0 for p in gfl.online.projector.parameters())


@pytest.mark.parametrize("batch", [3, 4, 10, 13])
def test_mocos_queue_forgets_the_oldest_whatever_the_batch(batch):
    gfl = short_moco()
    kept = list(gfl.queue)
    for step in range(6):
        gfl.keys = seeded(batch, gfl.queue.shape[1], seed=step)
        gfl.update()
        kept = (kept + list(gfl.keys))[-10:]  # oldest first
        first = int(gfl.next)
        now = [*gfl.queue[first:], *gfl.queue[:first]]
        assert all(torch.equal(a, b) for a, b in zip(now, kept)), step


def test_mocos_target_follows_by_its_own_inertia():
    gfl = short_moco(tau=0.25)
    with torch.no_grad():
        gfl.online.projector.weight.add_(1.0)
    before = gfl.target.projector.weight.clone()
    gfl.keys = seeded(2, 8)
    gfl.update()
    torch.testing.assert_close(gfl.target.projector.weight,
                               0.25 * before + 0.75 * gfl.online.projector.weight)


@pytest.mark.parametrize("name", ["moco", "mocov2"])
def test_mocos_queue_and_inertia_are_its_papers_with_the_preset_paper_alone(name):
    paper, laptop = gfl_of(name, "--preset", "paper"), gfl_of(name, "--tau", "0.5")
    assert (len(paper.queue), paper.tau) == (65_536, 0.999)
    assert (len(laptop.queue), laptop.tau) == (1_024, 0.5)


JOINED = """
import sys
import torch, torch.distributed as dist
import baselines as M, simfle as S
with S.processes() as world:
    v1, v2, settings = torch.load(sys.argv[1])
    result = {}
    for name, s in settings.items():
        torch.manual_seed(0)
        s = S.Settings(**s)
        gfl = S.GFLS[s.gfl](s, S.Backbone(S.small_resnet(8))).eval()
        if "moco" in name:  # an empty queue would leave nothing to learn
            gfl.queue[:4] = torch.eye(4, gfl.queue.shape[1])
        n = len(v1) // world.size
        mine = slice(world.rank * n, (world.rank + 1) * n)
        L_s = gfl(v1[mine], v2[mine])[0]
        L_s.backward()
        grads = [p.grad for p in gfl.parameters() if p.grad is not None]
        L_s = L_s.detach()
        for t in [L_s, *grads] if world.size > 1 else []:
            dist.all_reduce(t)
            t /= world.size  # as DistributedDataParallel does
        gfl.update()
        queues = [gfl.queue] if "moco" in name else []
        for q in queues if world.size > 1 else []:
            others = [torch.empty_like(q) for _ in range(world.size)]
            dist.all_gather(others, q)
            assert all(torch.equal(q, o) for o in others)
        result[name] = [L_s, *grads, *queues]
    if world.rank == 0:
        torch.save(result, sys.argv[2])
    if world.size > 1:
        gfl, seen = M.MoCo(S.Backbone(S.small_resnet(8)), outputs=2, queue=4), []
        gfl.online.forward = lambda v: (torch.ones(2, 2), v)
        gfl.target.forward = lambda v: (seen.append(v.tolist()) or torch.stack([v + 1, v], 1), v)
        v = torch.arange(4.0)
        gfl(v[:2], v[2 * world.rank:2 * world.rank + 2])
        assert seen == [[[0, 2], [1, 3]][world.rank]]  # each makes the keys of every other image
        assert torch.allclose(gfl.keys, torch.nn.functional.normalize(torch.stack([v + 1, v], 1)))
"""


def test_two_processes_have_the_loss_and_the_gradients_of_one_on_the_joined_batch(
        tmp_path, monkeypatch):
    (tmp_path / "joined.py").write_text(JOINED)
    names = ("byol", "simsiam", "moco", "mocov2", "simclr")
    torch.save([seeded(4, 3, 32, 32), seeded(4, 3, 32, 32, seed=1),
                {n: asdict(settings([*TINY, "--gfl", n])) for n in names}],
               tmp_path / "in.pt")
    monkeypatch.setattr(sys, "argv", ["joined.py", tmp_path / "in.pt", tmp_path / "one.pt"])
    exec(compile(JOINED, "joined.py", "exec"), {})
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", tmp_path / "joined.py", tmp_path / "in.pt",
                    tmp_path / "two.pt"], check=True, cwd=tmp_path,
                   env=os.environ | {"PYTHONPATH": str(HERE / "data"), "OMP_NUM_THREADS": "1",
                                     "CUDA_VISIBLE_DEVICES": ""})
    results = [torch.load(tmp_path / name) for name in ("one.pt", "two.pt")]
    for name in names:
        one, two = (r[name] for r in results)
        assert len(one) == len(two) > 5 and one[1].abs().sum() > 0
        for a, b in zip(one, two):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_direct_connection_trains_the_backbone_by_the_map_and_random_masking_does_not():
    torch.manual_seed(0)
    v1, v2, I = (x.cpu() for x in small_inputs())
    for args, reached in ((["--connection", "direct"], True), (["--ffl", "random"], False)):
        model = S.build_model(settings([*TINY, *args, "--alpha", "0"]))
        model.gfl.forward = lambda v1, v2: (v1.sum() * 0, [model.backbone(v1)[1].detach()] * 2,
                                            torch.zeros(4, 8))
        out = model(v1.requires_grad_(), v2, I)
        grads = torch.autograd.grad(out["loss"], list(model.backbone.parameters()),
                                    allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads) == reached
        assert ("L_d" in out) != reached
    model = S.build_model(settings([*TINY, "--connection", "direct", "--beta", "0.5"]))
    out = model(v1, v2, I)
    torch.testing.assert_close(out["loss"], out["L_s"] + out["L_r"] + 0.5 * out["L_g"])


def test_random_masks_do_not_ask_the_channels_and_hide_all_patches_equally():
    masking, C = S.RandomMasking(4, 28, 4), seeded(3, 8, 4, 4).requires_grad_()
    torch.manual_seed(0)
    a, keep, mask = masking(C)
    assert not a.requires_grad and mask.sum(1).tolist() == [37] * 3
    assert not torch.equal(mask[0], mask[1])
    torch.manual_seed(0)
    assert torch.equal(masking(C * 2)[2], mask)
    counts = sum(1 - masking(C)[2] for _ in range(300)).sum(0)  # 900 masks keep 12 of 49
    assert counts.min() > 150 and counts.max() < 300


# ---------------------------------------------------------------- Part V: figures


def cell(picture, row, column, like, names=()):
    """The part of a sheet with names of columns where that cell lies."""
    w, h = like.size
    measure = D.ImageDraw.Draw(picture).textbbox
    left = 12 + max([round(measure((0, 0), name, D.ImageFont.load_default(13))[2])
                     for name in names], default=0)
    x, y = left + column * (w + D.GAP), 3 * D.LINE + row * (h + D.GAP)
    return picture.crop((x, y, x + w, y + h))


def same_picture(a, b):
    return a.size == b.size and a.convert("RGB").tobytes() == b.convert("RGB").tobytes()


def test_masked_patches_are_grey_and_the_scores_behind_them_stand_below(monkeypatch):
    model = small_model().cpu().eval()
    x = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    texts = Texts(monkeypatch)
    sheet = dict(D.figures_masks(model, x, (S.MEAN, S.STD)))["masks"]
    places = [texts.at(f"group {g}")[0][0] for g in range(8)]
    assert places == sorted(places)
    masked, score = ([xy[1] for xy in texts.at(name)] for name in ("masked", "score"))
    assert all(score[i] - masked[i] == 112 + D.GAP for i in range(3))
    with monkeypatch.context() as patch:
        patch.setattr(D, "sheet", lambda title, rows, *a, **k: rows)
        rows = dict(D.figures_masks(model, x, (S.MEAN, S.STD)))["reconstructions"]
    greys = [dict(c[::-1] for c in row[0].getcolors(1 << 20)).get((127,) * 3, 0) for row in rows]
    assert greys[1] >= 37 * 16**2 > 100 * greys[2] and same_picture(rows[0][0], D.cell(x[0]))
    I = S.normalise(x)
    C = model.ffl.grouping(model.backbone(I)[0])
    for face in range(3):
        original = D.cell(x[face])
        part = functools.partial(cell, sheet, like=original, names=["masked", "score"])
        assert same_picture(part(2 * face, 0), original)
        assert part(2 * face + 1, 0).getextrema() == ((255, 255),) * 3
        for column in range(8):  # eight groups, so group `column`
            scores = model.ffl.masking.scores(C, torch.full((3,), column))
            mask = S.mask_lowest(scores, 0.75)[1][face]
            got, below = (part(2 * face + i, 1 + column) for i in (0, 1))
            low, high = scores[face].min().item(), scores[face].max().item()
            for i, (masked, score) in enumerate(zip(mask.tolist(), scores[face].tolist())):
                y, x0 = 16 * (i // 7), 16 * (i % 7)  # patches of 4 pixels, enlarged fourfold
                box = (x0, y, x0 + 16, y + 16)
                patch = got.crop(box)
                if masked:
                    assert patch.getextrema() == ((127, 127),) * 3
                else:
                    assert same_picture(patch, original.crop(box))
                assert same_picture(below.crop(box), D.heat(torch.tensor([score]), low, high, 16))


def test_random_masking_is_drawn_by_eight_draws_that_are_the_same_every_time(monkeypatch):
    model, x, texts = small_model().cpu().eval(), torch.rand(8, 3, 28, 28), Texts(monkeypatch)
    model.ffl.masking = S.RandomMasking(8, 28, 4)
    one, two = (dict(D.figures_masks(model, x, (S.MEAN, S.STD)))["masks"] for _ in range(2))
    assert same_picture(one, two) and len({xy for xy in texts.at("one draw")}) == 8
    assert len({cell(one, 0, c, D.cell(x[0])).tobytes() for c in range(9)}) == 9
    assert not texts.at("score") and one.height < 4 * 112 + 100


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_guess_is_drawn_as_the_original_and_only_masked_patches_are_guessed(norm_pix):
    model = small_model(norm_pix=norm_pix).cpu().eval()
    x = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    groups, mae = [0, 2, 4, 6], model.ffl.mae
    own = ([0.3, 0.4, 0.5], [0.2, 0.3, 0.4])
    masked, whole, a = D.reconstruct(model, x, groups, own)
    kept = masked != 0.5
    assert kept.float().mean() == 12 / 49
    torch.testing.assert_close(whole[kept], x[kept])
    assert (whole - x)[~kept].abs().mean() > 0.05
    C = model.ffl.grouping(model.backbone(S.normalise(x, own))[0])
    assert torch.equal(a, model.ffl.masking.scores(C, torch.tensor(groups)))
    mae.decode = lambda tokens, keep: mae.target(mae.patchify(S.normalise(x, own)))
    torch.testing.assert_close(D.reconstruct(model, x, groups, own)[1], x, atol=1e-4, rtol=0)


def saved_classifier(path, net, classes, size, arch="small"):
    torch.save(dict(model=net.state_dict(), classes=classes, size=size, arch=arch, mean=S.MEAN,
                    std=S.STD), path)
    return D.classifier(path)


@pytest.mark.parametrize("row, column", [(0, 0), (0, 1), (1, 1)])
def test_grad_cam_lights_the_quadrant_that_the_answer_depends_on(row, column, monkeypatch,
                                                                 tmp_path):
    def one_quadrant(net, x):
        A = torch.zeros(len(x), 256, 4, 4)
        A[:, 1] = 1  # channel 0 sees the quadrant alone, channel 1 the rest
        for k in (0, 1):
            A[:, k, 2 * row:2 * row + 2, 2 * column:2 * column + 2] = 1 - k
        return A

    net = S.small_resnet()
    net.fc = nn.Linear(256, 2)
    inside = torch.zeros(112, 112, dtype=torch.bool)
    inside[56 * row:56 * row + 56, 56 * column:56 * column + 56] = True
    path = put(tmp_path / "face.png", (40, 30))
    monkeypatch.setattr(S, "feature_map", one_quadrant)
    for answer, share in ((0, inside), (1, ~inside)):
        with torch.no_grad():
            net.fc.weight.zero_()
            net.fc.weight[:, 0] = torch.tensor([9.0, -9.0]) if answer == 0 else 0
            net.fc.weight[:, 1] = torch.tensor([-1.0, 1.0])
            net.fc.bias.copy_(torch.tensor([1.0, 0.0]) if answer == 0 else torch.zeros(2))
        x, guess, cam = saved_classifier(tmp_path / "c.pt", net, ["yes", "no"], 32)([path])
        assert guess == [["yes", "no"][answer]] and x.shape == (1, 3, 32, 32)
        assert cam.amax() == 1 and cam[0][share].mean() > 5 * cam[0][~share].mean()


def test_grad_cam_weighs_the_channels_by_the_gradient_of_the_logit(tmp_path):
    torch.manual_seed(0)
    net = S.small_resnet().eval()
    net.fc = nn.Linear(256, 3)
    path = put(tmp_path / "face.png", (40, 30))
    x, guess, cam = saved_classifier(tmp_path / "c.pt", net, ["a", "b", "c"], 32)([path])
    A = S.feature_map(net, S.normalise(x)).detach().requires_grad_()
    logits = net.fc(A.mean(dim=(2, 3)))[0]
    assert guess == ["abc"[logits.argmax()]]
    weight = torch.autograd.grad(logits.max(), A)[0].mean(dim=(2, 3), keepdim=True)
    expected = (weight * A).sum(dim=1, keepdim=True).relu()
    expected = F.interpolate(expected, (112, 112), mode="bilinear")[:, 0]
    torch.testing.assert_close(cam, (expected / expected.amax()).detach())


class Texts:
    """Collects what is written into pictures, and where."""

    def __init__(self, monkeypatch):
        self.all, real = [], D.ImageDraw.ImageDraw.text
        monkeypatch.setattr(D.ImageDraw.ImageDraw, "text", lambda draw, xy, text, *a, **k: (
            self.all.append((text, xy)), real(draw, xy, text, *a, **k))[1])

    def at(self, text):
        return [xy for t, xy in self.all if t == text]


def test_the_cells_of_a_confusion_matrix_hold_its_numbers(monkeypatch):
    texts = Texts(monkeypatch)
    counts = torch.tensor([[6, 2, 0], [1, 8, 1], [0, 3, 1]])
    labels, guess = (i.repeat_interleave(counts.flatten()) for i in torch.arange(9).div(
        torch.tensor([[3], [1]]), rounding_mode="floor") % 3)
    result = S.summary(guess, labels, ["0_a", "1_b", "2_c"])
    picture = D.figure_confusion(result, "linear-x")
    for i, row in enumerate([[75.0, 25.0, 0.0], [10.0, 80.0, 10.0], [0.0, 75.0, 25.0]]):
        for j, value in enumerate(row):
            assert texts.at(f"{value:.1f}")
            like = D.heat(torch.tensor([[value]]), 0, 100, 84)
            D.write(like, 42, 42, f"{value:.1f}", 14, "mm", "black" if value > 60 else "white")
            assert same_picture(cell(picture, i, j, like, names="abc"), like)
    words = " ".join(t for t, _ in texts.all)
    assert "accuracy 68.18 %" in words and "linear-x" in words and "0_a" not in words
    assert all(len(texts.at(name)) == 2 for name in "abc")


def test_names_of_classes_lose_the_digits_that_order_them_and_no_others():
    for name, shown in (("1_happiness", "happiness"), ("10_very_happy", "very_happy"),
                        ("3d", "3d"), ("a_1_b", "a_1_b"), ("7_", "7_"), ("7", "7")):
        assert D.spoken(name) == shown


def test_figures_take_the_runs_own_classifier_of_this_data_and_linear_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for tag, data, protocol, init in (
            ("semi-a-labels-0.5", "a", "semi", ""), ("linear-b", "b", "linear", ""),
            ("linear-a-oversample", "a", "linear", ""), ("linear-a", "a", "linear", ""),
            ("finetune-a-init-linear-b", "a", "finetune", "runs/r/linear-b.pt"),
            ("linear-a-init-random", "a", "linear", "random"),
            ("linear-a-init-x", "a", "linear", "elsewhere/x.pt")):
        text(tmp_path / f"runs/r/eval-{tag}.json", json.dumps(dict(settings=dict(
            data=data, eval=protocol, init=init))))
    folder = Path("runs/r")
    for tag in ("linear-a", "linear-a-oversample", "finetune-a-init-linear-b",
                "semi-a-labels-0.5", "linear-b"):
        assert D.find_classifier("r", "a") == folder / f"{tag}.pt"
        (folder / f"eval-{tag}.json").unlink()
    assert D.find_classifier("r", "a") is None


def test_heat_rises_with_the_number_and_what_is_not_a_number_is_dark():
    greys = [D.heat(torch.tensor([[v]]), 0, 1).convert("L").getpixel((0, 0))
             for v in torch.linspace(0, 1, 20).tolist()]
    assert greys == sorted(greys) and greys[0] < 60 and greys[-1] > 200
    assert D.heat(torch.tensor([[math.nan]]), 0, 1).convert("L").getpixel((0, 0)) == greys[0]


def test_fig3_shows_errors_and_shares_of_an_epoch_by_the_sums_of_its_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text(tmp_path / "runs/r/settings.json", json.dumps(dict(mask_ratio=0.75)))
    torch.manual_seed(0)
    errors, masks = torch.rand(2, 2, 20, 49), S.mask_lowest(torch.rand(80, 49), 0.75)[1]
    masks = masks.reshape(2, 2, 20, 49)  # two epochs of two lines, of 20 masks each
    records = [dict(epoch=e + 1, masked_error=(errors * masks)[e, i].sum(0).tolist(),
                    masked=masks[e, i].sum(0).tolist()) for e in (0, 1) for i in (0, 1)]
    monkeypatch.setattr(D, "heat", lambda *args: args[:3])
    monkeypatch.setattr(D, "sheet", lambda title, rows, names: (rows, names))
    rows, names = D.figure_refinement({"none": [dict(epoch=1, L_s=1.0)], "r": records})
    assert len(rows) == len(names) == 2
    error = (errors * masks).sum((1, 2)) / masks.sum((1, 2))
    for row, name, what, maps in ((rows[0], names[0], "error where masked", error),
                                  (rows[1], names[1], "share kept", 1 - masks.mean((1, 2)))):
        low, high = maps.min().item(), maps.max().item()
        assert name == f"r: {what}\nepochs 1, 2\nblue {low:.3g}, yellow {high:.3g}"
        for (got, bottom, top), expected in zip(row, maps):
            torch.testing.assert_close(got, expected)
            assert (bottom, top) == pytest.approx((low, high))
    assert D.figure_refinement({"none": [dict(epoch=1, L_s=1.0)]}) is None


def test_a_log_with_numbers_that_are_not_finite_is_drawn():
    log = [dict(step=i, rate=0.1, L_s=v) for i, v in enumerate((math.inf, math.nan, 2.0))]
    assert D.figure_curves(log, 0.3, 0.03).width > 800
    assert D.figure_curves([dict(step=1, spread=math.nan)], 0.3, 0.03).width > 400
    assert D.figure_curves([], 0.3, 0.03) is None


@pytest.mark.parametrize("low, high, labels", [
    (0, 1.542e-06, ["0.0000000", "0.0000005", "0.0000010", "0.0000015", "0.0000020"]),
    (0.1, 0.4, ["0.1", "0.2", "0.3", "0.4"]), (0.3, 0.6, ["0.3", "0.4", "0.5", "0.6"]),
    (-3, 9, ["-5", "0", "5", "10"]), (44.03, 47.4, ["44", "45", "46", "47", "48"]),
    (20, 110_000, ["0", "50,000", "100,000", "150,000"]),
    (0.0440, 0.0474, ["0.044", "0.045", "0.046", "0.047", "0.048"])])
def test_the_numbers_on_an_axis_are_round(low, high, labels):
    assert [*D.ticks([high, low]).values()] == labels


def test_the_numbers_on_an_axis_span_the_values_at_equal_distances():
    torch.manual_seed(0)
    for size, shift in torch.randn(500, 2, dtype=torch.double).tolist():
        values = [shift, shift + abs(size) * 10**(3 * size)]
        for values in (values, values[:1], [0.0]):
            marks, labels = zip(*D.ticks(values).items())
            gap = marks[1] - marks[0]
            assert 2 <= len(marks) <= 7 and len({*labels}) == len(labels)
            assert marks[0] - 1e-5 * gap <= min(values) < marks[0] + gap + 1e-5 * gap
            assert max(values) <= marks[-1] + 1e-5 * gap
            assert [b - a for a, b in zip(marks, marks[1:])] == pytest.approx(
                [gap] * (len(marks) - 1))
            assert not any("e" in text for text in labels)
            assert [float(text.replace(",", "")) for text in labels] == pytest.approx(marks)


def test_a_plot_rises_with_its_numbers_and_leaves_out_what_is_not_finite(monkeypatch):
    texts, blue = Texts(monkeypatch), (31, 95, 168)
    picture = D.plot("title", {"": [(0, 0.0), (5, math.nan), (10, 1.0)]})
    assert {picture.getpixel(p) for p in ((70, 165), (230, 105), (390, 45))} == {blue}
    assert texts.at("0.0") == [(65, 165)] and texts.at("1.0") == [(65, 45)]
    assert texts.at("0") == [(70, 170)] and texts.at("10") == [(390, 170)]
    assert not [t for t, _ in texts.all if "nan" in t]
    D.plot("title", {"": [(0, 44.0), (1, 45.0)]}, 0)
    assert texts.at("0") == [(70, 170), (65, 165)]  # the axis of y begins at the number asked for


def test_the_colours_of_the_legend_are_those_of_the_curves(monkeypatch):
    colours, real = {}, D.ImageDraw.ImageDraw.text
    monkeypatch.setattr(D.ImageDraw.ImageDraw, "text", lambda draw, xy, text, colour, *a: (
        colours.update({text: colour}), real(draw, xy, text, colour, *a))[1])
    heights = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0}
    picture = D.plot("title", {name: [(0, y), (100, y)] for name, y in heights.items()})
    for name, y in heights.items():
        seen = picture.getpixel((230, round(165 - 120 * y / 3)))
        assert seen == ImageColor.getrgb(colours[name])
    assert len({colours[name] for name in "abcd"}) == 4 and colours["title"] == "black"


def test_the_curves_are_the_terms_as_they_enter_the_sum_and_the_rest_of_the_log(monkeypatch):
    seen = {}
    monkeypatch.setattr(D, "plot", lambda title, curves, *shown: (
        seen.update({title.removesuffix(", by step"): curves}), Image.new("RGB", (420, 190)))[1])
    model = small_model(alpha=0.2, beta=0.05)
    out = {k: v.item() for k, v in model(*small_inputs()).items() if v.ndim == 0}
    log = [dict(step=5, epoch=1, rate=0.5, **out, gradient=2.0, own=7.0, masked=[1.0]),
           dict(step=10, epoch=1, rate=0.4, L_s=2.0, own=8.0, masked=[1.0])]
    D.figure_curves(log, 0.2, 0.05)
    assert {title: [*curves] for title, curves in seen.items()} == {
        "terms of the loss (Eq. 6)": ["L_s", "L_r", "0.2 L_d", "0.05 L_g"],
        "mean squared cosine D of channels (Eq. 2)": ["between groups", "within groups"],
        "learning rate": [""], "spread of z (0: collapse)": [""], "gradient norm": [""],
        "own": [""]}
    terms = seen["terms of the loss (Eq. 6)"]
    assert sum(points[0][1] for points in terms.values()) == pytest.approx(out["loss"])
    assert terms["L_s"] == [(5, out["L_s"]), (10, 2.0)] and len(terms["0.2 L_d"]) == 1
    assert seen["own"] == {"": [(5, 7.0), (10, 8.0)]}
    D2 = seen["mean squared cosine D of channels (Eq. 2)"]
    assert D2 == {"between groups": [(5, out["D2_between"])],
                  "within groups": [(5, out["D2_within"])]}
    seen.clear()
    D.figure_curves([dict(step=1, loss=1.0, L_s=1.0)], 0.3, 0.03)  # a run without FFL
    assert seen == {"terms of the loss (Eq. 6)": {"L_s": [(1, 1.0)]}}


def test_the_font_has_all_that_is_written(trained, monkeypatch):
    monkeypatch.chdir(trained)
    texts, font = Texts(monkeypatch), D.ImageFont.load_default(13)
    assert D.main(["colours"]) == 0
    letters = {c for text, _ in texts.all for c in text} - {" ", "\n"}
    assert len(letters) > 30
    missing = bytes(font.getmask("\uffff"))  # a box
    assert not [c for c in letters if bytes(font.getmask(c)) == missing]


def test_attention_names_classes_and_lies_over_the_face(monkeypatch):
    texts, x = Texts(monkeypatch), torch.rand(2, 3, 28, 28)
    cam = torch.zeros(2, 112, 112)
    looks = {"run": lambda paths: (x, ["a", "b"], cam)}
    sheet = D.figure_attention("title", looks, [("p", "b"), ("q", None)])
    assert texts.at("is\nb") and texts.at("taken for\na") and texts.at("taken for\nb")
    assert not texts.at("is\nNone") and sheet.height > 2 * 112
    plain, under = D.cell(x[0]), D.cell(x[0], cam[0])
    assert same_picture(under, Image.blend(plain, D.heat(cam[0], 0, 1), 0.5))


def test_fig5_shows_the_runs_that_differ_in_alpha_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = asdict(S.Settings(data="faces"))
    for name, more, accuracy in (("a", dict(alpha=0.2), 40.0), ("b", dict(alpha=0.3), 44.0),
                                 ("c", dict(alpha=0.3, seed=1), 46.0),
                                 ("d", dict(alpha=0.5, beta=0.3), 90.0),
                                 ("e", dict(alpha=0.6, lr=0.1), 90.0)):
        made = base | dict(name=name) | more
        text(tmp_path / f"runs/{name}/eval-linear-faces.json",
             json.dumps(dict(accuracy=accuracy, pretraining=made)))
        if name == "a":  # trained anew since, and not evaluated again
            made["alpha"] = 0.7
        text(tmp_path / f"runs/{name}/settings.json", json.dumps(made))
    seen = {}
    monkeypatch.setattr(D, "plot", lambda title, curves: seen.update({title: curves[""]}))
    D.figure_sweep("alpha", base | dict(alpha=0.2), "faces")
    assert list(seen.values()) == [[(0.2, 40.0), (0.3, 45.0)]] and "by alpha" in str(seen)
    assert D.figure_sweep("beta", base | dict(alpha=0.2), "faces") is None


def test_figures_of_a_run_of_untrained_nets_and_of_loose_pictures(trained, tmp_path, monkeypatch,
                                                                  capsys):
    args = ["--data", "colours", "--workers", "0", "--eval"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    folder, real, sheets = trained / "runs/colours/figures", D.figure_attention, {}
    monkeypatch.setattr(D, "figure_attention", lambda title, looks, pictures: (
        sheets.update({title[:5]: pictures, "looks": [*looks]}), real(title, looks, pictures))[1])
    assert D.main(["colours", "--compare", "colours"]) == 0
    shown = sheets["Where"]
    assert len(shown) == 8 and all(Path(path).parent.name[2:] == k for path, k in shown)
    assert {k for _, k in shown[:3]} == {"a", "b", "c"}
    confusion = torch.tensor(result(trained, "linear-colours")["confusion"])
    assert len(sheets.get("Taken", [])) == min(8, 15 - confusion.diag().sum())
    names = {p.stem for p in folder.glob("*.png")}
    assert names >= {"masks", "reconstructions", "curves", "refinement", "attention",
                     "confusion-linear-colours"}
    # Another classifier, which takes all for 0_a.
    net = S.small_resnet()
    net.fc = nn.Linear(256, 3)
    nn.init.zeros_(net.fc.weight)
    net.fc.bias.data = torch.tensor([1.0, 0.0, 0.0])
    saved_classifier(trained / "constant.pt", net, ["0_a", "1_b", "2_c"], 32)
    assert D.main(["colours", "--init", "constant.pt"]) == 0
    assert {p.name for p in folder.glob("*-constant.png")} == {
        "attention-constant.png", "mistakes-constant.png"}  # beside the run's own
    assert len(sheets["Taken"]) == 8 and {k for _, k in sheets["Taken"]} == {"b", "c"}
    assert sheets["looks"] == ["colours\nconstant"]
    assert "of an earlier" not in capsys.readouterr().out
    capsys.readouterr()
    with monkeypatch.context() as patch:  # as if the run had gone on since it was evaluated
        patch.setattr(S, "load_start", lambda *args: {"start": "other"})
        assert D.main(["colours"]) == 0
    assert "linear-colours.pt is of an earlier runs/colours/backbone.pt" in capsys.readouterr().out
    assert D.main(["colours", "--init", "random"]) == 0
    untrained, own = (Image.open(folder / f"masks{x}.png") for x in ("-untrained", ""))
    box = (0, 0, own.width, own.height - D.LINE)  # without the line that tells which is which
    assert untrained.size == own.size and not same_picture(untrained.crop(box), own.crop(box))
    assert not (folder / "attention-untrained.png").exists()
    for i in range(3):
        put(trained / f"mine/deep/{i}.png", (40, 30))
    before = (folder / "masks.png").read_bytes()
    assert D.main(["colours", "--data", "mine"]) == 0
    assert (folder / "masks.png").read_bytes() == before and (folder / "masks-mine.png").exists()
    assert [Path(path).name for path, _ in sheets["Where"]] == ["0.png", "1.png", "2.png"]
    for args, words in ((["nobody"], "runs/nobody/settings.json is missing or damaged"),
                        (["colours", "--compare", "nobody"], "runs/nobody/settings.json is"),
                        (["colours", "--init", "rundom"], "rundom is missing or no classifier"),
                        (["colours", "--data", "no"], "no dataset no")):
        capsys.readouterr()
        assert D.main(args) == 2
        error = capsys.readouterr().err
        assert error.startswith("\nfigures: ") and words in error and error.count("\n") == 2


# ---------------------------------------------------------------- Benchmark


def test_the_benchmark_times_every_part_and_leaves_nothing_behind(toy, tmp_path, monkeypatch,
                                                                  capsys):
    clock = [0.0]  # every look at the clock is a second later

    def tick():
        clock[0] += 1.0
        return clock[0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(B.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(B.time, "perf_counter", tick)
    monkeypatch.setattr(B, "loader_rates", lambda *args: [(1, 100.0), (2, 150.0)])
    args = ["--data", str(toy), *TINY]
    assert B.main(args) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and "150.00 images/s" in out
    times = dict(re.findall(r"^  (\S.*?)  +([\d,.]+) ms", out, re.MULTILINE))
    assert times == dict.fromkeys(["views", "forward", "backward", "values", "optimiser, EMA"],
                                  "1,000.00")
    step = 31 / 3  # three steps of five parts, two looks each, under one clock
    assert re.search(rf"^step +{1000 * step:,.2f} ms$", out, re.MULTILINE)
    assert re.search(rf"^step +{12 / step:.2f} images/s$", out, re.MULTILINE)
    shown = {k: float(v) for k, v in re.findall(r"^(\w.*?)  +([\d.]+) [G%]", out, re.MULTILINE)}
    with FlopCounterMode(display=False) as counter:
        S.build_model(settings(args))(*(torch.zeros(4, 3, n, n) for n in (32, 32, 28)))
    forward = counter.get_total_flops() / 2 / 4 / 1e9  # the target's has no way back
    assert 2 * forward < shown["arithmetic"] < 3 * forward
    peak = 1024**3 / 1e9  # a product took one second
    assert shown["share of the peak"] == pytest.approx(
        100 * 12 * shown["arithmetic"] / step / peak, rel=0.05)
    assert B.main(["--data", "nowhere"]) == 2
    assert "benchmark: there is no dataset nowhere" in capsys.readouterr().err
    monkeypatch.setattr(S, "reduced", lambda *args: S.stop_asked.set())  # SIGTERM, in a step
    assert B.main(args) == 143 and capsys.readouterr().err == "\nbenchmark: stopped.\n"


def test_the_benchmarks_loader_counts_what_was_loaded_under_the_clock(toy, monkeypatch):
    clock = iter(range(100))  # every look at the clock is a second later
    monkeypatch.setattr(B.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(S, "cores", lambda: 3)
    batches = S.Batches(66, 12, 0, S.World())
    batches.last = 10**9
    faces = S.Faces(S.find_pictures(toy / "train"), 32, 2, 28, 0.08, 0)
    rates = B.loader_rates(settings(["--data", toy, *TINY]), S.World(), faces, batches, 1.5)
    # Two rounds of a batch for each worker, in two seconds.
    assert dict(rates) == {1: 12, 2: 24, 3: 36}
    assert batches.first == 6 + 12 + 18  # what they took, and may have fetched, is passed by


# ===== data/prepare.py =====
#
# Each format in small and made up: a tree of tiny pictures and labels, laid out as the owners do.


def prepared(*args, blocked=("torch",)):
    """Runs data/prepare.py as users do, in a process of its own without the `blocked` packages."""
    code = (f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); "
            f"sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    return subprocess.run([sys.executable, "-c", code, HERE / "data/prepare.py",
                           *map(str, args)], capture_output=True, text=True)


def put(path, size=(20, 24), colour=(200, 100, 50), mode="RGB", **how):
    """A small picture of one colour, with a bright corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, colour)
    picture.paste((255, 255, 255), (0, 0, size[0] // 4, size[1] // 4))
    picture.convert(mode).save(path, **how)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def files(folder):
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name[0] != "." and p.suffix != ".json"}


HEADER = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression"


def affectnet_lists(src, header=HEADER + ",valence,arousal\n"):
    """The CSV distribution with one of everything that occurs in it."""
    images = src / "x/Manually_Annotated/Manually_Annotated_Images"
    put(images / "1/a.jpg", (60, 40))
    put(images / "1/b.JPG", (60, 40))
    put(images / "2/a.jpg", (300, 200))  # the same name in another folder
    put(images / "2/grey.png", (30, 30), mode="L")
    put(images / "2/palette.bmp", (30, 30), mode="P")
    put(images / "2/cmyk.tif", (30, 30), mode="CMYK")
    (images / "2/broken.jpg").write_bytes(b"no picture at all")
    whole = (images / "1/a.jpg").read_bytes()
    (images / "2/cut.jpg").write_bytes(whole[:len(whole) // 2])
    (images / "2/Thumbs.db").write_bytes(b"x")
    put(src / "__MACOSX/1/a.jpg", (5, 5))
    marks = ";".join(["1.5;2"] * 68)

    def row(path, box, label):
        return f"{path},{box},{marks},{label},0.1,-0.2\n"

    text(src / "x/Manually_Annotated_file_lists/training.csv", header + "".join([
        row("1/a.jpg", "10,5,30,20", 0), row("1/b.JPG", "-5,-5,30,30", 1),
        row("2/a.jpg", "0,0,300,200", 1), row("2/grey.png", "0,0,30,30", 2),
        row("2/palette.bmp", "5,5,99,99", 3), row("2/cmyk.tif", "1,1,20,20", 4),
        row("1/a.jpg", "0,0,8,8", 5), row("1/b.JPG", "0,0,60,40", 7),
        row("1/none.jpg", "0,0,9,9", 6), row("gone.jpg", "NULL,NULL,NULL,NULL", 1),
        row("1/b.JPG", "NULL,NULL,NULL,NULL", 1),
        row("1/a.jpg", "0,0,0,5", 1), row("1/a.jpg", "100,100,5,5", 1),
        row("2/broken.jpg", "0,0,5,5", 1), row("2/cut.jpg", "0,0,60,40", 1),
        row("1/a.jpg", "10,5,30,20", 0), row("1/a.jpg", "1,1,5,5", 8),
        row("1/a.jpg", "1,1,5,5", 10), row("1/a.jpg", "1,1,5,5", "?")]))
    text(src / "x/validation.csv", row("1/a.jpg", "0,0,60,40", 0) + row("1/b.JPG", "2,2,6,6", 7))


def test_affectnet_from_lists_crops_clamps_and_tells_what_it_skips(tmp_path):
    affectnet_lists(tmp_path / "src")
    out = tmp_path / "affectnet"
    done = prepared("affectnet", "--src", tmp_path / "src", "--out", out, "--size", 24)
    assert done.returncode == 0, done.stderr
    found = files(out)
    assert sorted(found) == [
        "train/0_neutral/a.jpg", "train/1_happiness/a.jpg", "train/1_happiness/b.JPG",
        "train/2_sadness/grey.png", "train/3_surprise/palette.bmp", "train/4_fear/cmyk.tif",
        "train/5_disgust/a.jpg", "train/7_contempt/b.JPG", "val/0_neutral/a.jpg",
        "val/7_contempt/b.JPG"]
    sizes = {k: Image.open(p).size for k, p in found.items()}
    assert sizes["train/0_neutral/a.jpg"] == (30, 20)  # cropped, small enough
    assert sizes["train/1_happiness/b.JPG"] == (24, 24)  # clamped to 25 × 25, then shrunk
    assert sizes["train/1_happiness/a.jpg"] == (36, 24)  # whole, but shrunk
    assert sizes["train/3_surprise/palette.bmp"] == (24, 24)
    # [y:y+h, x:x+w]: the crop begins 10 to the right and 5 down, so the bright corner ends at 5, 5.
    crop = TF.pil_to_tensor(Image.open(found["train/0_neutral/a.jpg"])).float()
    assert crop[:, :4, :4].min() > 230 and crop[:, 8:, 8:].mean() < 150
    words = " ".join(done.stdout.split())
    for reason in ("1 skipped: file missing", "1 skipped: box is no integer", "1 skipped: no label",
                   "1 skipped: box without size", "1 skipped: box outside the picture",
                   "2 skipped: cannot be decoded", "1 skipped: repeated",
                   "2 skipped: labelled none, uncertain or no face",
                   "1_happiness 5 2 134,415 134,413 fewer than the paper"):
        assert reason in words, (reason, done.stdout)
    assert "none.jpg" not in done.stdout and "Less than half" in done.stdout


@pytest.mark.parametrize("header", ["", HEADER + ",v,a\n", " #" + HEADER + " \n",
                                    "\ufeff" + HEADER.replace(",", " , ") + "\n",
                                    "\n" + HEADER + "\n"])
def test_affectnets_lists_have_a_header_or_none_or_one_with_blanks(header, tmp_path):
    affectnet_lists(tmp_path / "src", header)
    done = prepared("affectnet", "--src", tmp_path / "src", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(files(tmp_path / "out")) == 10
    assert json.loads((tmp_path / "out/stats.json").read_text())["counts"]["train"] == dict(zip(
        ("0_neutral", "1_happiness", "2_sadness", "3_surprise", "4_fear", "5_disgust", "6_anger",
         "7_contempt"), (1, 2, 1, 1, 1, 1, 0, 1)))


def test_affectnet7_is_seven_classes_of_the_same_files(tmp_path):
    affectnet_lists(tmp_path / "src")
    out, seven = tmp_path / "affectnet", tmp_path / "affectnet7"
    mine = put(seven / "train/0_neutral/mine.jpg")  # what somebody has put there by hand
    done = prepared("affectnet", "--src", tmp_path / "src", "--out", out)
    assert done.returncode == 2 and "affectnet7 holds other pictures" in done.stderr
    assert mine.exists() and not out.exists()
    seven.rename(out)  # nor does it leave a trace that simfle.py would take for half a preparation
    done = prepared("affectnet", "--src", tmp_path / "src", "--out", out)
    assert done.returncode == 2 and "affectnet holds other pictures" in done.stderr
    assert S.colours_of(out) == (S.MEAN, S.STD) and [*files(out)] == ["train/0_neutral/mine.jpg"]
    shutil.rmtree(out)
    assert prepared("affectnet", "--src", tmp_path / "src", "--out", out).returncode == 0
    classes = S.labelled_pictures(out / "train")[0]
    assert S.labelled_pictures(seven / "train")[0] == classes[:-1]
    for name in S.find_pictures(seven / "train"):
        twin = out / Path(name).relative_to(seven)
        assert os.path.samefile(name, twin) and "contempt" not in name
    assert len(S.find_pictures(seven)) == 8
    counts = json.loads((seven / "stats.json").read_text())["counts"]
    assert len(counts["train"]) == 7 and sum(counts["train"].values()) == 7


@pytest.mark.parametrize("blocked", [("torch",), ("torch", "numpy")])
def test_affectnet_from_npy_files_walks_the_labels_not_two_lists(blocked, tmp_path):
    import numpy  # torchvision brings it

    src = tmp_path / "src/AffectNet"
    for split, count in (("train_set", 5), ("val_set/val_set", 3)):
        (src / split / "annotations").mkdir(parents=True)
        for i in range(count):
            put(src / split / f"images/{i}.jpg", (22, 22))
            value = numpy.array(str(i)) if i % 2 else numpy.array(i)
            numpy.save(src / split / f"annotations/{i}_exp.npy", value)
            numpy.save(src / split / f"annotations/{i}_val.npy", numpy.array("0.5"))
    (src / "train_set/images/1.jpg").unlink()  # zipped together, all that follow would be shifted
    (src / "train_set/annotations/2_exp.npy").write_bytes(b"\x93NUMPY")
    done = prepared("affectnet", "--src", src, "--out", tmp_path / "out", blocked=blocked)
    if "numpy" in blocked:
        assert done.returncode == 2 and "pip install numpy" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found = files(tmp_path / "out")
    assert sorted(found) == [
        "train/0_neutral/0.jpg", "train/3_surprise/3.jpg", "train/4_fear/4.jpg",
        "val/0_neutral/0.jpg", "val/1_happiness/1.jpg", "val/2_sadness/2.jpg"]
    for key, path in found.items():  # linked, not written again
        split = "train_set" if key.startswith("train") else "val_set/val_set"
        assert os.path.samefile(path, src / split / "images" / path.name)
    assert "1 skipped: file missing" in done.stdout and "1 skipped: no label" in done.stdout


def test_affectnet_plus_is_filtered_and_its_other_half_ignored(tmp_path):
    src = tmp_path / "src"
    for half in ("human_annotated", "no_human_annotated"):
        for split in ("train_set", "validation_set"):
            for i in range(11):
                put(src / half / split / f"images/{i}.jpg")
                text(src / half / split / f"annotations/{i}.json",
                     json.dumps({"human-label": i if i % 2 else str(i), "soft": [0]}))
    text(src / "human_annotated/train_set/annotations/99.json", "{")
    done = prepared("affectnet", "--src", src, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    names = [p.split("_")[0] + Path(p).stem for p in files(tmp_path / "out")]
    assert sorted(names) == [f"{s}/{i}{i}" for s in ("train", "val") for i in range(8)]
    assert done.stdout.count("3 skipped: labelled none") == 4


def rafdb(src, name="list_patition_label.txt"):
    lines = [f"train_{i:05}.jpg {i}" for i in range(1, 8)]
    lines += ["test_0001.jpg 4", "train_00009.jpg 1", "", "nonsense", "train_00001.jpg 1"]
    text(src / f"basic/EmoLabel/{name}", "\n".join(lines))
    for line in lines[:8]:
        put(src / "basic/basic/Image/aligned" / f"{line.split('.')[0]}_aligned.jpg")
    text(src / "Compound/EmoLabel/list_patition_label.txt", "train_0001.jpg 11\n")
    put(src / "Compound/aligned/test_0001_aligned.jpg", (44, 44))  # of the same name
    put(src / "__MACOSX/aligned/._train_00009_aligned.jpg")
    return src


def test_rafdb_maps_its_labels_and_needs_no_particular_place(tmp_path):
    for name in ("list_patition_label.txt", "list_partition_label.txt"):
        out = tmp_path / name / "out"
        done = prepared("rafdb", "--src", rafdb(tmp_path / name / "src", name), "--out", out)
        assert done.returncode == 0, done.stderr
        assert sorted(files(out)) == [
            "train/0_neutral/train_00007_aligned.jpg", "train/1_happiness/train_00004_aligned.jpg",
            "train/2_sadness/train_00005_aligned.jpg", "train/3_surprise/train_00001_aligned.jpg",
            "train/4_fear/train_00002_aligned.jpg", "train/5_disgust/train_00003_aligned.jpg",
            "train/6_anger/train_00006_aligned.jpg", "val/1_happiness/test_0001_aligned.jpg"]
        for words in ("1 skipped: file missing", "1 skipped: line that is", "1 skipped: repeated"):
            assert words in done.stdout


def test_what_is_still_packed_is_named_with_the_command(tmp_path):
    src = rafdb(tmp_path / "src")
    for p in (src / "basic/basic/Image/aligned").iterdir():
        p.unlink()
    (src / "basic/Image").mkdir()
    (src / "basic/Image/aligned.zip").write_bytes(b"PK")
    done = prepared("rafdb", "--src", src, "--out", tmp_path / "out")
    zipped = src / "basic/Image/aligned.zip"
    assert done.returncode == 2 and f"unzip -o {zipped} -d {zipped.parent}" in done.stderr
    assert "aligned faces" in done.stderr and not (tmp_path / "out").exists()


VOTES = {  # the file's number -> row in the lists, split, votes, what comes of it
    0: (0, "Train", (4, 0, 0, 1, 3, 2, 0, 0, 0, 0), None),  # 4 of 9: no majority
    1: (1, "Train", (6, 0, 1, 1, 0, 0, 0, 0, 2, 0), "0_neutral"),  # single votes do not count
    4: (3, "Train", (0, 0, 0, 0, 0, 8, 0, 2, 0, 0), "5_disgust"),  # its number is not its row
    5: (4, "Train", (0, 0, 0, 0, 0, 0, 7, 3, 0, 0), "4_fear"),
    6: (5, "Train", (0, 0, 0, 0, 0, 0, 0, 2, 8, 0), None),  # unknown
    7: (6, "Valid", (0, 5, 0, 5, 0, 0, 0, 0, 0, 0), None),  # half is not more than half
    8: (7, "Valid", (1, 1, 1, 1, 1, 1, 1, 1, 1, 1), None),
    9: (8, "Valid", (0, 0, 9, 1, 0, 0, 0, 0, 0, 0), "3_surprise"),
    10: (10, "Test", (0, 0, 0, 1, 9, 0, 0, 0, 0, 0), "6_anger"),
    11: (12, "Test", (0, 0, 0, 6, 0, 2, 0, 2, 0, 0), "2_sadness"),
    12: (13, "Test", (0, 9, 0, 0, 0, 0, 0, 0, 0, 0), "1_happiness"),
    13: (14, "Test", (0, 0, 0, 0, 0, 0, 0, 9, 0, 0), "7_contempt"),
}
ROWS = 15  # row 2 has no name; rows 9 and 11 repeat those of 8 and 12, further from their numbers
USAGE = {"Train": "Training", "Valid": "PublicTest", "Test": "PrivateTest"}


def ferplus(src, kind):
    names, usages, votes = {2: ""}, {2: "Train"}, {}
    for number, (row, split, given, _) in VOTES.items():
        names[row], usages[row] = f"fer{number:07}.png", split
        votes.setdefault(split, []).append(
            f'fer{number:07}.png,"(0, 0, 48, 48)",{",".join(map(str, given))}')
    names |= {9: "fer0000001.png", 11: "fer0000004.png"}
    usages |= {9: "Train", 11: "Train"}
    for split, lines in votes.items():
        text(src / f"FERPlus/data/FER2013{split}/label.csv", "\n".join(lines))
    if kind == "drawn":
        for row, name in names.items():
            if name and row not in (9, 11):
                put(src / f"FERPlus/data/FER2013{usages[row]}/{name}", (48, 48), (row,) * 3, "L")
        return src
    text(src / "FERPlus/fer2013new.csv", "Usage,Image name,neutral\n" + "".join(
        f"{USAGE[usages[i]]},{names[i]},0\n" for i in range(ROWS)))
    rows = [(USAGE[usages[i]], " ".join([str(10 * i)] * 48**2)) for i in range(ROWS)]
    if kind == "fer2013.csv":
        content = "emotion,pixels,Usage\n" + "".join(f"0,{p},{u}\n" for u, p in rows)
    elif kind == "icml_face_data.csv":
        content = "emotion, Usage, pixels\n" + "".join(f"0,{u},{p}\n" for u, p in rows)
    else:
        kind, content = "fer2013.csv", "".join(f"0,{p},{u}\n" for u, p in rows)
    text(src / "kaggle" / kind, content)
    return src


@pytest.mark.parametrize("kind", ["fer2013.csv", "icml_face_data.csv", "no header", "drawn"])
def test_ferplus_takes_the_majority_and_finds_names_by_row(kind, tmp_path):
    src, out = ferplus(tmp_path / "src", kind), tmp_path / "out"
    done = prepared("ferplus", "--src", src, "--out", out)
    assert done.returncode == 0, done.stderr
    folders = {"Train": "train", "Valid": "valid", "Test": "val"}
    expected = {f"{folders[split]}/{label}/fer{number:07}.png": row
                for number, (row, split, _, label) in VOTES.items() if label}
    found = files(out)
    assert sorted(found) == sorted(expected)
    for key, path in found.items():
        pixels = Image.open(path).convert("L")
        assert pixels.size == (48, 48)
        value = expected[key] if kind == "drawn" else 10 * expected[key]
        assert pixels.getpixel((40, 40)) == value  # row i's pixels, whatever the name's number
    assert "no majority" in done.stdout and "majority for unknown" in done.stdout
    stats = json.loads((out / "stats.json").read_text())
    assert stats["own_colours"] and "valid" in stats["counts"]
    if kind != "drawn":
        assert Image.open(found["train/0_neutral/fer0000001.png"]).mode == "RGB"
        # Three pictures of 10, 30 and 40 of 255: their mean, and the deviation over all pixels.
        assert stats["mean"] == [round(80 / 3 / 255, 4)] * 3
        assert stats["std"] == [round((2600 / 3 - (80 / 3)**2)**0.5 / 255, 4)] * 3


def test_ferplus_sources_that_do_not_belong_together_get_a_sentence(tmp_path):
    src = ferplus(tmp_path / "src", "fer2013.csv")
    lines = (src / "kaggle/fer2013.csv").read_text().splitlines()
    for change in (lines[:-1], lines + lines[-1:], [lines[0]] + lines[:0:-1]):
        text(src / "kaggle/fer2013.csv", "\n".join(change))
        done = prepared("ferplus", "--src", src, "--out", tmp_path / "out")
        assert done.returncode == 2 and "not have the same rows" in done.stderr, done.stderr
    (src / "kaggle/fer2013.csv").unlink()
    put(src / "kaggle/train/angry/Training_3908.jpg")
    done = prepared("ferplus", "--src", src, "--out", tmp_path / "out")
    assert done.returncode == 2 and "row numbers are lost" in done.stderr


def test_sfew_is_found_in_its_folders_without_the_test_set(tmp_path):
    src = tmp_path / "src"
    for emotion in ("Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise"):
        put(src / f"Train/Train_Aligned_Faces/{emotion}/one.png")
        put(src / f"Val/Val_Aligned_Faces_new/Val_Aligned_Faces/{emotion}/one.png")
        put(src / f"Val/Val_Aligned_Faces/{emotion}/one.png")  # a copy is no second picture
        put(src / f"Train/Train_Aligned_Faces/{emotion}/.two.png")
        (src / f"Train/Train_Aligned_Faces/{emotion}/Thumbs.db").write_bytes(b"x")
    put(src / "Test/Test_Aligned_Faces/three.png")
    (src / "loop").symlink_to(src)
    done = prepared("sfew", "--src", src, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(files(tmp_path / "out")) == 14 and "Thumbs" not in str(files(tmp_path / "out"))
    for name, emotion in (("0_neutral", "Neutral"), ("1_happiness", "Happy"), ("2_sadness", "Sad"),
                          ("3_surprise", "Surprise"), ("4_fear", "Fear"), ("5_disgust", "Disgust"),
                          ("6_anger", "Angry")):
        assert os.path.samefile(tmp_path / f"out/train/{name}/one.png",
                                src / f"Train/Train_Aligned_Faces/{emotion}/one.png")


@pytest.mark.parametrize("name, wanted", [("affectnet", "training.csv"), ("rafdb", "EmoLabel"),
                                          ("ferplus", "label.csv"), ("sfew", "Aligned_Faces")])
def test_a_wrong_folder_gets_what_was_looked_for_and_what_is_there(name, wanted, tmp_path):
    put(tmp_path / "src/holiday/beach.jpg")
    done = prepared(name, "--src", tmp_path / "src", "--out", tmp_path / "out")
    assert done.returncode == 2 and wanted in done.stderr and "holiday/" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_a_preparation_goes_on_and_redoes_nothing(tmp_path):
    src, out = rafdb(tmp_path / "src"), tmp_path / "out"
    order = ["rafdb", "--src", src, "--out", out, "--size", 16]
    assert prepared(*order).returncode == 0
    first = {k: (p.read_bytes(), p.stat().st_mtime_ns) for k, p in files(out).items()}
    stats = (out / "stats.json").read_text()
    # As after a kill: one picture is not there, another is but was not noted, half of one lies
    # there under a temporary name, and the last line of the journal is cut off.
    gone = sorted(first)[3]
    (out / gone).unlink()
    (out / gone).with_name(f".{Path(gone).name}.part").write_bytes(first[gone][0][:100])
    lines = (out / ".prepared.jsonl").read_text().splitlines()
    (out / ".prepared.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    done = prepared(*order)
    assert done.returncode == 0 and "6 pictures are there already" in done.stdout, done.stdout
    second = {k: (p.read_bytes(), p.stat().st_mtime_ns) for k, p in files(out).items()}
    assert second.keys() == first.keys() and second[gone][0] == first[gone][0]
    assert all(second[k] == first[k] for k in first if k != gone)
    assert (out / "stats.json").read_text() == stats and not list(out.rglob("*.part"))
    done = prepared(*order[:-1], 20)  # what is there was made with another size
    assert done.returncode == 2 and "\"size\": 16" in done.stderr
    # A picture that has another class in a new list leaves the old one.
    named = next(p for p in src.rglob("*.txt") if "train_00001" in p.read_text())
    listed = named.read_text()
    moved = re.sub(r"(?m)^(train_00001\S* )\d", r"\g<1>6", listed)
    assert moved != listed
    for wanted in (moved, listed):
        named.write_text(wanted)
        assert "files lie in" not in prepared(*order).stdout
        assert len(list(out.glob("train/*/train_00001*"))) == 1
    assert (out / "stats.json").read_text() == stats
    put(out / "train/0_neutral/stranger.jpg")
    assert "1 files lie in" in prepared(*order).stdout
    # A damaged picture is made again, one of another source too; what was made of files that are
    # gone from the download stays and counts.
    (out / gone).write_bytes(b"")
    other = src / "basic/basic/Image/aligned/train_00003_aligned.jpg"
    put(other, (33, 33), (9, 9, 200))
    for p in (src / "basic/basic/Image/aligned").glob("train_0000[245]*"):
        p.unlink()
    done = prepared(*order)
    assert "3 of these were made before" in done.stdout and "files lie in" in done.stdout
    assert (out / gone).read_bytes() == first[gone][0]
    assert Image.open(out / "train/5_disgust/train_00003_aligned.jpg").getpixel((9, 9))[2] > 150
    assert sum(json.loads((out / "stats.json").read_text())["counts"]["train"].values()) == 7


def test_rafdbs_compound_set_is_named_whatever_its_folder_is_called(tmp_path):
    src = tmp_path / "raf"
    text(src / "EmoLabel/list_patition_label.txt",
         "train_0001.jpg 3\ntrain_0002.jpg 11\ntest_0001.jpg 5\n")
    for name in ("train_0001", "train_0002", "test_0001"):
        put(src / f"Image/aligned/{name}_aligned.jpg")
    done = prepared("rafdb", "--src", src, "--out", tmp_path / "out")
    assert done.returncode == 2 and "compound set" in done.stderr and "11" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_source_of_its_own_making_and_one_called_compound_get_no_traceback(tmp_path):
    src = tmp_path / "RAF basic and compound"  # both sets, unpacked into one folder
    for given in (rafdb(src), tmp_path):
        out = tmp_path / f"out-{given.name}"
        done = prepared("rafdb", "--src", given, "--out", out)
        assert done.returncode == 0 and len(files(out)) == 8, done.stderr
    done = prepared("rafdb", "--src", out, "--out", tmp_path / "again")
    assert done.returncode == 2 and "was made by prepare.py" in done.stderr


def test_killed_within_the_first_pictures_it_resumes_and_takes_no_other_size(tmp_path):
    src, out = rafdb(tmp_path / "src"), tmp_path / "out"
    code = ("import os, runpy, sys\nfrom PIL import Image\nreal, calls = Image.Image.save, []\n"
            "def save(*args, **how):\n    calls.append(1)\n"
            "    os._exit(9) if len(calls) > 3 else real(*args, **how)\n"
            "Image.Image.save = save\n"
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    order = ["rafdb", "--src", src, "--out", out, "--workers", 1, "--size"]
    killed = subprocess.run([sys.executable, "-c", code, HERE / "data/prepare.py",
                             *map(str, [*order, 16])])
    assert killed.returncode == 9 and len(files(out)) == 3
    other = prepared(*order, 12)
    assert other.returncode == 2 and "something else" in other.stderr and len(files(out)) == 3
    assert prepared(*order, 16).returncode == 0
    whole = tmp_path / "whole"
    assert prepared("rafdb", "--src", src, "--out", whole, "--size", 16).returncode == 0
    assert {k: p.read_bytes() for k, p in files(out).items()} == {
        k: p.read_bytes() for k, p in files(whole).items()}
    assert (out / "stats.json").read_text() == (whole / "stats.json").read_text()
    (out / ".prepared.jsonl").write_text("")  # pictures of which nothing is known
    assert prepared(*order, 16).returncode == 2


def test_kaggles_copy_of_rafdb_is_read_like_the_owners(tmp_path):
    rafdb(tmp_path / "src")
    kaggle = tmp_path / "kaggle"
    for split in ("train", "test"):
        lines = ["image,label"]
        for line in (tmp_path / "src/basic/EmoLabel/list_patition_label.txt").open():
            if line.startswith(split):
                name, label = line.split()
                lines.append(f"{Path(name).stem}_aligned.jpg,{label}")
                if "00009" not in name:
                    put(kaggle / f"DATASET/{split}/{label}/{Path(name).stem}_aligned.jpg")
        text(kaggle / f"{split}_labels.csv", "\n".join(lines))
    for name in ("src", "kaggle"):
        done = prepared("rafdb", "--src", tmp_path / name, "--out", tmp_path / f"{name}-out")
        assert done.returncode == 0 and "1 skipped: file missing" in done.stdout, done.stderr
    assert {k: p.read_bytes() for k, p in files(tmp_path / "kaggle-out").items()} == {
        k: p.read_bytes() for k, p in files(tmp_path / "src-out").items()}


@pytest.mark.parametrize("name, paths", [
    ("affectnet", ["YOLO_format/train/images/1.png", "YOLO_format/train/labels/1.txt"]),
    ("affectnet", ["train/anger/1.png", "val/anger/1.png"]),
    ("sfew", ["Train/Angry/1.png", "Val/Angry/1.png"]),
    ("rafdb", ["Image/original/train_00001.jpg", "EmoLabel/list_patition_label.txt"])])
def test_copies_that_others_rearranged_get_what_can_be_done_with_them(name, paths, tmp_path):
    for path in paths:
        if path.endswith(".txt"):
            text(tmp_path / "src" / path, "train_00001.jpg 5\n")
        else:
            put(tmp_path / "src" / path)
    done = prepared(name, "--src", tmp_path / "src", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    for words in ("no distribution of the owners", "python simfle.py --data FOLDER",
                  "train/CLASS and val/CLASS", "data/README.md"):
        assert words in done.stderr


def test_fer2013_as_folders_gets_the_two_files_that_are_needed(tmp_path):
    put(tmp_path / "src/train/angry/Training_3908.jpg")
    done = prepared("ferplus", "--src", tmp_path / "src", "--out", tmp_path / "out")
    assert done.returncode == 2
    for words in ("as folders of pictures", "fer2013.csv (Kaggle", "fer2013new.csv (github.com/"
                  "microsoft/FERPlus)"):
        assert words in done.stderr


def test_what_is_left_out_is_said_and_found_counts_files(tmp_path):
    for split in ("Train", "Val"):
        for emotion in ("Angry", "Happiness"):
            put(tmp_path / f"sfew/{split}/{split}_Aligned_Faces/{emotion}/one.png")
    done = prepared("sfew", "--src", tmp_path / "sfew", "--out", tmp_path / "out")
    assert done.returncode == 0
    assert done.stdout.count("1 skipped: in a folder Happiness, which is no emotion of SFEW") == 2
    done = prepared("rafdb", "--src", rafdb(tmp_path / "raf"), "--out", tmp_path / "raf-out")
    # Three rows of surprise: one without a file, one that comes twice.
    assert re.search(r"3_surprise +1 +1 .*1 skipped: file missing.*; 1 skipped: rep", done.stdout)
    text(tmp_path / "other/training.csv", "left_eye_x,left_eye_y,Image\n1,2,3 4 5\n")
    text(tmp_path / "other/validation.csv", "left_eye_x,left_eye_y,Image\n1,2,3 4 5\n")
    done = prepared("affectnet", "--src", tmp_path / "other", "--out", tmp_path / "out")
    assert done.returncode == 2 and "has no column expression, face_height" in done.stderr


def test_muxspace_is_split_by_person_with_all_classes_in_both(tmp_path):
    rows, images = ["user.id,image,emotion"], tmp_path / "src/repository/images"
    for emotion, count in (("neutral", 24), ("HAPPINESS", 20), ("Surprise", 8), ("sadness", 8),
                           ("anger", 9), ("disgust", 8), ("fear", 3), ("contempt", 2)):
        for i in range(count):  # two pictures of each person, and single ones
            name = f"A_{emotion}{i // 2}_{i % 2 + 1:04}.jpg" if i % 8 < 6 else f"{emotion}_{i}k.jpg"
            put(images / name, (60, 50), (3 * i, 9 * i, len(rows)), "RGB" if i % 2 else "L")
            rows.append(f"1,{name},{emotion}")
    put(images / "A_neutral0_0003.jpg")  # no row
    rows += ["1,gone_0001.jpg,anger", "1,A_neutral0_0001.jpg,anger"]
    text(tmp_path / "src/repository/data/legend.csv", "\n".join(rows) + "\n")
    done = prepared("muxspace", "--src", tmp_path / "src", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "out/stats.json").read_text())["counts"]
    assert counts["val"] == {"0_neutral": 12, "1_happiness": 10, "2_sadness": 4, "3_surprise": 4,
                             "5_disgust": 4, "6_anger": 4}
    assert counts["train"] == counts["val"] | {"6_anger": 5}  # one of 5 to test on has no file
    people = [{re.sub(r"_\d{4}$", "", Path(k).stem) for k in files(tmp_path / "out" / split)}
              for split in ("train", "val")]
    assert not people[0] & people[1] and any(name.startswith("A_") for name in people[1])
    for words in ("5 skipped: fear, contempt or no emotion", "1 skipped: file without a row",
                  "1 skipped: second row of a picture", "1 skipped: file missing"):
        assert words in done.stdout, words
    # The split does not depend on which files are there.
    gone = sorted(images.glob("A_*"))[::3]
    for path in gone:
        path.unlink()
    assert prepared("muxspace", "--src", tmp_path / "src", "--out", tmp_path / "b").returncode == 0
    assert files(tmp_path / "b").keys() <= files(tmp_path / "out").keys()


def test_memory_for_300000_pictures_stays_under_400_megabytes(tmp_path, capsys):
    count, marks, lists = 3000, ";".join(["101.5;202.5"] * 68), {"training": "", "validation": ""}
    one = put(tmp_path / "one.jpg")
    for i in range(count):
        name = f"{i // 400}/{hashlib.sha256(str(i).encode()).hexdigest()[:56]}.jpg"
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(one, tmp_path / "src" / name)
        lists["training" if i % 9 else "validation"] += f"{name},-{i + 300},-400,9000,{i + 999}," \
            f"{marks},{i % 8},0.1,0.2\n"
    for name, content in lists.items():
        text(tmp_path / f"src/{name}.csv", content)
    order = ["affectnet", "--src", str(tmp_path / "src"), "--out", str(tmp_path / "out")]
    assert R.main(order) == 0
    tracemalloc.start()
    try:
        assert R.main(order) == 0  # a second time, as what has been made is read then
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert f"{count:,} pictures are there already" in capsys.readouterr().out
    assert 30e6 + peak / count * 300_000 < 400e6  # 30 MB: Python and Pillow


def test_where_links_do_not_work_pictures_are_copied_whole(tmp_path):
    code = ("import os, runpy, sys\ndef no(*a, **k): raise OSError('no links')\n"
            "os.link = os.symlink = no\n"
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    affectnet_lists(tmp_path / "src")
    done = subprocess.run([sys.executable, "-c", code, HERE / "data/prepare.py", "affectnet",
                           "--src", tmp_path / "src", "--out", tmp_path / "affectnet", "--size",
                           "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = tmp_path / "src/x/Manually_Annotated/Manually_Annotated_Images"
    copy_of = tmp_path / "affectnet/val/0_neutral/a.jpg"
    assert copy_of.read_bytes() == (images / "1/a.jpg").read_bytes()
    assert not os.path.samefile(copy_of, images / "1/a.jpg")
    assert len(S.find_pictures(tmp_path / "affectnet7")) == 8


def test_own_colours_reach_every_picture(tmp_path, monkeypatch):
    text(tmp_path / "half/.prepared.jsonl", "{}\n")  # prepare.py writes stats.json last
    with pytest.raises(S.UserError, match="half is not complete; the data/prepare.py command"):
        S.colours_of(tmp_path / "half")
    own, seen = ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]), []
    colours(tmp_path / "d", {"0_a": 12, "1_b": 12})
    text(tmp_path / "d/stats.json", json.dumps(dict(mean=own[0], std=own[1], own_colours=True)))
    real = S.normalise
    monkeypatch.setattr(S, "normalise", lambda x, colours=None: (seen.append(colours),
                                                                 real(x, colours))[1])
    args = ["--data", "d", *TINY[:2], "--workers", "0", "--batch-size", "4"]
    small = ["--view-size", "32", "--ffl-size", "28", "--patch", "4", "--hidden", "8"]
    for order in ([*small, "--steps", "1"], ["--eval", "--epochs", "1"], ["--eval"]):
        assert in_process(*args, *order, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert D.main(["d"]) == 0
    assert len(seen) > 10 and all(list(used) == list(own) for used in seen)


def test_ferplus_is_normalised_by_its_own_colours_all_else_by_affectnets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for own in (False, True):
        text(tmp_path / "d/stats.json", json.dumps(dict(mean=[.1] * 3, std=[.2] * 3,
                                                        own_colours=own)))
        assert S.colours_of(tmp_path / "d") == (([.1] * 3, [.2] * 3) if own
                                                else (S.MEAN, S.STD))
    text(tmp_path / "0/stats.json", json.dumps(dict(mean=[.1] * 3, std=[.2, 0, .2],
                                                    own_colours=True)))
    with pytest.raises(S.UserError, match="does not hold own_colours"):
        S.colours_of(tmp_path / "0")
    assert S.colours_of(tmp_path) == (S.MEAN, S.STD)
    x = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    torch.testing.assert_close(S.normalise(x, ([.1] * 3, [.2] * 3)), torch.full((1, 3, 2, 2), 0.5))
    for split in ("train", "val"):
        for c in ("0_a", "1_b"):
            for i in range(4):
                put(tmp_path / f"d/{split}/{c}/{i}.png")
    net = torchvision.models.resnet18().state_dict()
    torch.save({k: v for k, v in net.items() if not k.startswith("fc.")}, tmp_path / "b.pt")
    args = ["--data", "d", "--eval", "--init", "b.pt", "--arch", "resnet18", "--epochs", "1",
            "--batch-size", "4", "--view-size", "32", "--workers", "0"]
    assert S.main(args) == 0
    made, = Path("runs/d").glob("linear-d-*.pt")
    assert torch.load(made)["mean"] == [.1] * 3
    text(tmp_path / "d/stats.json", "{}")
    assert S.main(args + ["--fresh"]) == 2


def test_simfle_alone_in_an_empty_folder_trains_and_evaluates(toy, tmp_path):
    shutil.copy(HERE / "simfle.py", tmp_path)
    for args in ([*TINY, "--steps", "1"], ["--eval", "--workers", "0"]):
        subprocess.run([sys.executable, "simfle.py", "--data", toy, *args], cwd=tmp_path,
                       check=True)
    assert (tmp_path / "runs/faces/linear-faces.pt").exists()


def test_the_readme_names_every_departure_and_only_packages_that_are_required():
    readme, marked = (HERE / "README.md").read_text(), set()
    for name in ("simfle.py", "data/baselines.py"):
        marked |= set(re.findall(r"[Dd]eparture (\d+)\b", (HERE / name).read_text()))
    rows = readme[readme.index("## Where this parts"):readme.index("## Copying pieces")]
    listed = re.findall(r"(?m)^\| (\d+) \|", rows)
    assert listed == [str(i) for i in range(1, len(listed) + 1)] and marked == set(listed)
    packages = re.findall(r"^[a-z]+", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(packages) == ["einops", "pillow", "pytest", "torch", "torchvision"]


def test_the_readmes_map_names_what_there_is_in_the_order_of_the_file():
    readme, source = (HERE / "README.md").read_text(), (HERE / "simfle.py").read_text()
    rows = readme[readme.index("## From the paper"):readme.index("## Where this parts")]
    last = 0
    for paper, names in re.findall(r"(?m)^\| (.*?) \| (`.*) \|$", rows):
        for name in re.findall(r"`(\w+)", names):
            place = re.search(rf"(?m)^(?:(?:class|def) {name}|{name} =)", source)
            assert place or any(hasattr(module, name) for module in (D, M, P)), name
            if paper.startswith("3") and f"`{name}`" == names.split(",")[0]:
                assert place.start() > last, paper  # the rows come as the file does
                last = place.start()


def test_every_option_is_in_the_help_with_its_source(capsys):
    with pytest.raises(SystemExit) as stop:
        S.read_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, default in asdict(S.Settings()).items():
        if name == "tag":
            continue
        shown = re.search(rf"--{name.replace('_', '-')}[ ,].*?\[{re.escape(str(default))}\]", text)
        assert shown, name
        assert name in ("data", "preset") or re.search(
            r"\((ours|authors|MAE|its paper|B(\.2)?|[34](\.\d)?(, SimCLR)?|Table 2)\)",
            shown[0]), shown[0]


# ---------------------------------------------------------------- GPUs

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(*args, cwd, monkeypatch):
    monkeypatch.chdir(cwd)
    assert S.main([*map(str, args)]) == 0
    return torch.load(next(cwd.glob("runs/*/checkpoint.pt")), weights_only=True)


@GPU
def test_a_gpus_losses_and_gradients_are_those_of_the_cpu():
    model = small_model().cpu()  # its mask is random, and each device draws another
    results = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
        v1, v2, I = (x.to(device) for x in small_inputs(16))
        own.zero_grad()
        L_s, hs, _ = own.gfl(v1, v2)
        L_g = own.ffl(own.backbone(I)[0], I)[1]
        (L_s + 0.03 * L_g + S.distillation_loss([own.distil_v(h) for h in hs])).backward()
        results.append([x.cpu().flatten() for x in (L_s, L_g, *(
            p.grad for p in own.backbone.parameters()))])
    for a, b in zip(*results):  # convolutions may use TF32
        torch.testing.assert_close(b.norm(), a.norm(), rtol=0.05, atol=1e-4)
    one, two = (torch.cat(r[2:]) for r in results)  # the gradients alone
    assert F.cosine_similarity(one, two, dim=0) > 0.99


@GPU
def test_a_run_on_a_gpu_trains_in_its_precision_and_resumes(toy, tmp_path, monkeypatch, capsys):
    args, ends = ["--data", toy, *TINY, "--save-every", "2", "--steps"], []
    for name, lengths in (("whole", (4,)), ("parts", (2, 4))):
        (tmp_path / name).mkdir()
        for steps in lengths:
            ends.append(on_gpu(*args, steps, "--lr", 0.05, cwd=tmp_path / name,
                               monkeypatch=monkeypatch))
    out = capsys.readouterr().out
    precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    assert f"cuda in {precision}" in out and "resumes after step 2" in out
    first, half, again = ends
    assert (first["step"], half["step"], again["step"]) == (4, 2, 4)
    for k, v in first["model"].items():  # a GPU adds up in another order each time
        assert v.dtype == again["model"][k].dtype and v.dtype in (torch.float32, torch.long)
        difference = (v - again["model"][k]).float().norm()
        assert difference <= 0.05 * max(1, v.float().norm()), k
    kinds = {name: S.load_file(tmp_path / name / "runs/faces/checkpoint.pt")["same"]
             for name in ("whole", "parts")}
    assert kinds["whole"] == kinds["parts"]
    assert S.main(["--data", str(toy), "--eval", "--workers", "1"]) == 0


@GPU
def test_a_gpus_autocast_computes_in_bf16_where_the_gpu_has_it():
    world = S.World(device=torch.device("cuda"))
    x = torch.ones(2, 2, device="cuda")
    with S.mixed_precision(world):
        assert (x @ x).dtype == (torch.bfloat16 if S.has_bf16(world) else torch.float32)
        with S.full_precision(x):
            assert (x @ x).dtype == torch.float32


@GPU
def test_two_processes_on_one_gpu_are_refused(toy, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", HERE / "simfle.py", "--data", toy, *TINY],
                          cwd=tmp_path, env=dict(os.environ, CUDA_VISIBLE_DEVICES="0"), text=True,
                          capture_output=True, timeout=300)
    assert done.returncode and "2 processes were started on a machine with 1 GPUs" in done.stderr


def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation)
    assert not S.has_bf16(S.World(device=torch.device("cuda")))
    assert not S.has_bf16(S.World())


def test_ctrl_c_in_loader_workers_is_a_stop(monkeypatch):
    killed = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    assert S.explained(killed)[1] == 2
    monkeypatch.setattr(S.stop_asked, "is_set", lambda: True)
    assert S.explained(killed)[1] == 143


def test_a_name_that_means_two_folders_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(S, "HERE", tmp_path)
    (tmp_path / "data/faces").mkdir(parents=True)
    assert S.find_data("faces") == tmp_path / "data/faces"
    (tmp_path / "faces").symlink_to("data/faces")
    assert S.find_data("faces").samefile("data/faces")
    (tmp_path / "faces").unlink()
    (tmp_path / "faces").mkdir()
    with pytest.raises(S.UserError, match="may be the folder .*/faces or .*/data/faces; give the"):
        S.find_data("faces")
    assert S.find_data("./data/faces") == Path("data/faces")


def test_the_words_of_gloo_and_nccl_for_a_dead_peer_are_one_sentence(monkeypatch):
    monkeypatch.setattr(S.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(S.dist, "get_rank", lambda: 1)
    for words in ("[/pytorch/third_party/gloo] Connection closed by peer [127.0.0.1]:1234",
                  "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network "
                  "error\nncclRemoteError: A call failed possibly due to a network error",
                  "ncclInternalError: Internal check failed.\nCall to send failed : Broken pipe",
                  "Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLREDUCE)"):
        told, code = S.explained(RuntimeError(words))
        assert code == 1 and told.startswith("rank 1 ends, because another one has ended")
    for error in (RuntimeError("NCCL error: invalid usage"), AttributeError("no attribute reset")):
        assert "a fault of the program" in S.explained(error)[0]
