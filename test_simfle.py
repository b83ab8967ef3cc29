"""Tests of simfle.py and of the programs in data/. Each name is a short sentence.

    python -m pytest test_simfle.py

Formulas are checked against slow, obvious versions of themselves. Programs run as users run them,
with tiny nets. What takes longer is marked `slow` and runs with `-m slow`."""

import argparse
import ast
import contextlib
import copy
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "data")]
import simfle as S

import baselines as B
import benchmark
import demo
import figures
import prepare
import probe as P

TINY = ["--preset", "laptop", "--batch-size", "12", "--view-size", "32", "--ffl-size", "28",
        "--patch", "4", "--hidden", "32", "--outputs", "16", "--workers", "1", "--log-every", "1",
        "--lr", "0.4"]
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)
torch.set_num_threads(1)  # tiny nets: a second thread would cost more than it does
CPU = S.World(0, 1, torch.device("cpu"))
COLOURS = torch.tensor([S.AFFECTNET["mean"], S.AFFECTNET["std"]])[:, :, None, None]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def not_unless_slow(request):
    """Cases that are marked slow run with `-m slow` alone."""
    if request.node.get_closest_marker("slow") and "slow" not in request.config.option.markexpr:
        pytest.skip("runs with -m slow")


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_model(**changes):
    """A SimFLE of 64 channels in 8 groups, for views of 32 pixels and faces of 28."""
    torch.manual_seed(0)
    own = {k: changes.pop(k) for k in ("alpha", "beta", "t") if k in changes}
    gfl = S.BYOL(S.make_backbone(S.make_resnet("small", 8)), 32, 16, changes.pop("tau", 0.99))
    ffl = S.FaceMAE(64, **dict(groups=8, image_size=28, patch=4, **S.VITS["tiny"]) | changes)
    return S.SimFLE(gfl, ffl, 32, 16, **own)


def small_inputs(B=4, seed=0):
    return [seeded(B, 3, n, n, seed=seed + i) for i, n in enumerate((32, 32, 28))]


def draw_colours(folder, counts, val=5, size=36, seed=0):
    """A dataset that can be learnt in no time: classes that differ in colour. Returns it."""
    generator = torch.Generator().manual_seed(seed)
    for k, (name, count) in enumerate(counts.items()):
        for split, number in (("train", count), ("val", val)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                x = torch.rand(3, size, size, generator=generator)
                x[k % 3] += 1.5 if k < 3 else -1.0
                TF.to_pil_image(x.clamp(0, 2) / 2).save(folder / split / name / f"{name}{i}.png")
    return folder


def run_program(*args, cwd, processes=0, program="simfle.py", expect=0, timeout=300):
    """A program as users start it, under torchrun if asked for; its whole output."""
    launcher = (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
                if processes else [])
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, *launcher, HERE / program, *map(str, args)], cwd=cwd,
                          env=env, timeout=timeout, text=True, capture_output=True)
    output = done.stdout + done.stderr
    assert done.returncode == expect, output
    return output


def in_process(*args, cwd, monkeypatch, main=S.main):
    """The same inside this process, on the CPU: only there are runs equal to the last bit."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return main([*map(str, args)])


def complaint(*args, cwd, monkeypatch, capsys, main=S.main):
    """Exit code 2, one sentence, no traceback; returns the sentence."""
    capsys.readouterr()
    assert in_process(*args, cwd=cwd, monkeypatch=monkeypatch, main=main) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error and error.count("\n") == 0, error
    return error


def log_of(folder, name="log"):
    """The log by step; where a step stands twice, the last line counts."""
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


def same_checkpoint(one, two, name="checkpoint"):
    """Whether two runs' checkpoints are equal to the last bit: steps, weights, momentum."""
    one, two = (torch.load(p / f"{name}.pt", weights_only=True) for p in (one, two))
    momentum = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()]
                for c in (one, two)]
    assert one["model"].keys() == two["model"].keys() and len(momentum[0]) == len(momentum[1]) > 0
    pairs = [*zip(one["model"].values(), two["model"].values()), *zip(*momentum)]
    return one["step"] == two["step"] and all(torch.equal(a, b) for a, b in pairs)


def text(path, *lines, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding=encoding)


def contents(folder):
    paths = map(Path, glob.iglob(f"{folder}/**", recursive=True, include_hidden=True))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths if p.is_file()}


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A dataset of three classes with 30 pictures to train on and 15 to test on."""
    return draw_colours(tmp_path_factory.mktemp("data") / "faces", {"0_a": 14, "1_b": 9, "2_c": 7})


@pytest.fixture(scope="session")
def trained(faces, tmp_path_factory):
    """A folder with a run `faces` that was pre-trained on them for two steps."""
    cwd = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        assert in_process("--data", faces, *TINY, "--steps", "2", cwd=cwd, monkeypatch=patch) == 0
    return cwd


# ===== The method =====


def grads(loss, *xs):
    return torch.autograd.grad(loss, xs, retain_graph=True, allow_unused=True)


def drawing_alike(run):
    """What `run()` returns when torch's generator starts from the same seed."""
    torch.manual_seed(7)
    return run()


def test_eq1_and_the_spread_are_those_of_unit_vectors():
    p, z = seeded(5, 16), 3 * seeded(5, 16, seed=1)
    slow = sum(((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(p, z)) / 5
    torch.testing.assert_close(S.similarity_loss(p, z), slow)
    assert S.spread(torch.ones(8, 256)) == 0
    assert abs(S.spread(9 * seeded(512, 256)) - 1 / 16) < 0.002


def test_eq1_is_added_in_both_orders_for_views_normalised_apart():
    gfl, views = small_model().gfl, small_inputs()[:2]
    torch._foreach_add_([p.data for p in gfl.target.parameters()], 0.1)
    L_s, hs, z1 = gfl(*views)
    online, target = ([stream(v) for v in views] for stream in (gfl.online, gfl.target))
    expected = sum(S.similarity_loss(gfl.predictor(online[i][0]), target[1 - i][0]) for i in (0, 1))
    pooled = [gfl.online.backbone(v).flatten(2).mean(2) for v in views]
    torch.testing.assert_close([L_s, z1, *hs], [expected, online[0][0], *pooled])


def test_ema_moves_every_parameter_and_no_buffer():
    model = small_model(tau=0.75)
    model(*small_inputs())
    torch._foreach_add_([p.data for p in model.gfl.online.parameters()], 0.1)
    before = copy.deepcopy(model.gfl.target)
    model.update()
    old, online = (dict(m.named_parameters()) for m in (before, model.gfl.online))
    expected = {k: 0.75 * old[k] + 0.25 * online[k] for k in online} | dict(before.named_buffers())
    got = dict(model.gfl.target.named_parameters()) | dict(model.gfl.target.named_buffers())
    torch.testing.assert_close(got, expected)
    assert not any(p.requires_grad for p in got.values())


def test_batchnorm_statistics_are_the_targets_own_and_the_face_comes_after_the_views():
    model, (v1, v2, I) = small_model(), small_inputs()
    torch._foreach_add_([p.data for p in model.gfl.target.parameters()], 0.1)
    alone = copy.deepcopy(model).gfl
    model(v1, v2, I)
    for x in (v1, v2):
        alone.online(x), alone.target(x)
    alone.online.backbone(I)
    for got, expected in ((model.gfl.online, alone.online), (model.gfl.target, alone.target)):
        torch.testing.assert_close(*(dict(m.named_buffers()) for m in (got, expected)))


def eq2(C, groups):
    """Eq. 2 as it stands, a double loop over channels: the sums between and within groups."""
    channels, size = [*C.flatten(2).unbind(dim=1)], C.shape[1] // groups
    between, within = [torch.zeros(())], [torch.zeros(())]
    for i, Ci in enumerate(channels):
        for j, Cj in enumerate(channels):
            D = (Ci * Cj).sum(1) / (Ci.norm(dim=1) * Cj.norm(dim=1))
            (within if i // size == j // size else between).append((D**2).mean())
    return sum(between), sum(within)


@pytest.mark.parametrize("c, N_g, h, w", [(12, 3, 4, 4), (8, 4, 2, 3), (6, 1, 2, 2), (6, 6, 1, 3)])
def test_eq2_equals_the_double_loop_in_value_and_gradient(c, N_g, h, w):
    C, k = seeded(2, c, h, w).double().requires_grad_(), c // N_g
    between, within = eq2(C, N_g)
    slow, (fast, D2_between, D2_within) = (between - within) / c, S.grouping_loss(C, N_g)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(grads(fast, C), grads(slow, C))
    if N_g > 1:  # the mean over pairs of channels of different groups
        torch.testing.assert_close(D2_between, between.detach() / (c * (c - k)))
    if k > 1:  # and over pairs of different channels of one group
        torch.testing.assert_close(D2_within, (within.detach() - c) / (c * (k - 1)))


def test_a_norm_below_a_tenth_counts_as_a_tenth_in_the_gradient_alone():
    """Scaling a vector by n changes none of the three. So their gradient is that at scale 1, over
    n, or over 0.1 where n is smaller."""
    x = seeded(2, 6, 9)
    x = F.normalize(x - x.mean(dim=2, keepdim=True), dim=2)
    mask = S.mask_lowest(x[:, 0], 0.75)[1]
    for piece in (lambda x: (S.unit(x, 2) * seeded(2, 6, 9, seed=2)).sum(),
                  lambda x: S.grouping_loss(x.view(2, 6, 3, 3), 2)[0],
                  lambda x: S.refinement_term(x[:, 0], mask, seeded(2, 9, seed=3))):
        one = x.clone().requires_grad_()
        for n in (1e-7, 1e-4, 0.09, 0.2, 30.0):
            scaled = (n * x).requires_grad_()
            torch.testing.assert_close(piece(scaled), piece(one))
            torch.testing.assert_close(grads(piece(scaled), scaled)[0], rtol=1e-3, atol=1e-5,
                                       expected=grads(piece(one), one)[0] / max(n, 0.1))
    zero = torch.zeros(2, 6, 9, requires_grad=True)
    assert not S.unit(zero, 2).any() and grads(S.unit(zero, 2).sum(), zero)[0].isfinite().all()


def test_eq3_sums_a_groups_channels_upsamples_and_averages_over_patches():
    C, group = seeded(3, 8, 4, 4), torch.tensor([1, 0, 3])
    a = S.patch_scores(C, group, 4, 28, 4)
    place = ((torch.arange(28) + 0.5) * 4 / 28 - 0.5).clamp(0, 3)  # of a pixel, in the map
    weight = (1 - (place[:, None] - torch.arange(4)).abs()).clamp(min=0)  # bilinear, (28, 4)
    for b in range(3):
        image = weight @ (C[b, 2 * group[b]] + C[b, 2 * group[b] + 1]) @ weight.T
        means = [image[y:y + 4, x:x + 4].mean() for y in range(0, 28, 4) for x in range(0, 28, 4)]
        torch.testing.assert_close(a[b], torch.stack(means))


def test_the_lowest_scores_are_masked_and_chance_decides_between_equal_ones_alone():
    for N_p, ratio, kept in ((49, 0.75, 12), (50, 0.8, 10), (49, 0.999, 1), (4, 0.0, 3)):
        a = seeded(5, N_p)
        keep, mask = S.mask_lowest(a, ratio)
        assert torch.equal(keep, a.argsort(1, descending=True)[:, :kept])
        assert mask.tolist() == [[float(i not in k) for i in range(N_p)] for k in keep.tolist()]
    a = torch.zeros(2000, 8)
    a[:, 5] = 1.0
    keep = drawing_alike(lambda: S.mask_lowest(a, 0.75))[0]
    counts = torch.bincount(keep[:, 1], minlength=8).tolist()
    assert (keep[:, 0] == 5).all() and counts.pop(5) == 0 and min(counts) > 220  # 286 on average


def test_a_group_is_drawn_for_each_image_and_all_are_equally_likely():
    ffl, C = small_model(groups=4).ffl, seeded(1, 64, 4, 4).expand(400, -1, -1, -1)
    drawn = drawing_alike(lambda: ffl.scores(C))
    counts = [(drawn == S.patch_scores(C, torch.full((400,), g), 4, 28, 4)).all(1).sum()
              for g in range(4)]
    assert sum(counts) == 400 and min(counts) > 70


def test_bf16_does_not_change_a_mask():
    ffl, X = small_model().ffl, seeded(64, 64, 4, 4)
    a = drawing_alike(lambda: ffl.scores(ffl.grouping(X)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(drawing_alike(lambda: ffl.scores(ffl.grouping(X))), a)


def test_refinement_has_value_0_and_the_gradient_that_is_written_down():
    a, error = seeded(3, 49).double().requires_grad_(), seeded(3, 49, seed=1).double().square()
    mask = S.mask_lowest(a, 0.75)[1]
    r = (a - a.mean(1, keepdim=True)) / a.std(1, keepdim=True)
    written, closed = 0, torch.zeros_like(a)
    for b in range(3):
        masked = mask[b].bool()
        soft = 1 / (1 + (r[b, masked] - min(r[b, ~masked]).detach()).exp())
        pull = (error[b, masked] - error[b, masked].mean()) / masked.sum() / 3
        written = written + (pull * soft).sum()
        closed[b, masked] = -pull * soft * (1 - soft)
    torch.testing.assert_close(grads(written, r)[0], closed)
    error = torch.where(mask == 0, 99.0, error).requires_grad_()  # kept patches' are not used
    term = S.refinement_term(a, mask, error)
    assert term == 0 and grads(term, error) == (None,)
    torch.testing.assert_close(grads(term, a), grads(written, a))


def test_the_examples_worked_by_hand_are_right():
    C = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 1]]).reshape(1, 4, 1, 2)
    torch.testing.assert_close([v.item() for v in eq2(C, 2)], [2.0, 7.0])
    torch.testing.assert_close([v.item() for v in S.grouping_loss(C, 2)], [-1.25, 2 / 8, 3 / 4])
    assert "L_g = (2 − 7)/4" in S.grouping_loss.__doc__
    a = torch.tensor([[3.0, 2, 1, 0]], dtype=torch.float64, requires_grad=True)
    mask, error = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[9.0, 4, 1, 7]])
    r = (a - a.mean()) / a.std()
    soft = torch.sigmoid(r[0, 0].detach() - r)
    along_r = -grads((mask * (error - 4) * soft).sum() / 3, r)[0]
    along_a = -grads(S.refinement_term(a, mask, error), a)[0]
    told = re.sub(r"[()+]", "", S.refinement_term.__doc__.replace("−", "-"))
    for digits, values in ((2, r), (3, along_r), (3, along_a)):
        assert ", ".join(f"{v:.{digits}f}" if v else "0" for v in values[0]) in told


@pytest.mark.parametrize("norm_pix", [True, False])
def test_eq4_is_the_mean_squared_error_of_masked_patches_plus_the_refinement(norm_pix, monkeypatch):
    def term(a, mask, error):
        return (a * mask + error).sum() / 100

    monkeypatch.setattr(S, "refinement_term", term)
    ffl = small_model(norm_pix=norm_pix, kappa=0.5).ffl
    X, I = seeded(2, 64, 4, 4), seeded(2, 3, 28, 28)
    L_r, _, tokens, logged = drawing_alike(lambda: ffl(X, I))
    a = drawing_alike(lambda: ffl.scores(ffl.grouping(X)))
    keep, mask = S.mask_lowest(a, 0.75)
    patches = F.unfold(I, kernel_size=4, stride=4).reshape(2, 3, 16, 49)
    patches = patches.permute(0, 3, 2, 1).reshape(2, 49, 48)
    assert torch.equal(ffl.mae.patchify(I), patches)
    whole = ffl.mae.encode(patches, keep)
    if norm_pix:
        patches = torch.stack([(p - p.mean()) / (p.var() + 1e-6).sqrt()
                               for p in patches.flatten(0, 1)]).view(2, 49, 48)
    errors = (ffl.mae.decode(whole, keep) - patches).square().mean(2)
    torch.testing.assert_close(L_r, errors[mask == 1].mean() + 0.5 * 64 * term(a, mask, errors))
    torch.testing.assert_close(logged["masked_error"], (errors * mask).sum(0))
    assert torch.equal(logged["masked"], mask.sum(0)) and torch.equal(tokens, whole[:, 1:])


def test_encoder_and_decoder_see_kept_patches_alone_and_each_in_its_place():
    mae, patches = small_model().ffl.mae, seeded(1, 49, 48)
    keep, mask = S.mask_lowest(seeded(1, 49, seed=1), 0.75)
    tokens = mae.encode(patches, keep)
    seen = [mae.class_token[0, 0]]
    seen += [mae.embed(patches[0, i]) + mae.position[0, 1 + i] for i in keep[0]]
    torch.testing.assert_close(tokens, mae.encoder(torch.stack(seen)[None]))
    y = mae.decoder_embed(tokens)[0]
    seen = [y[0]] + 49 * [mae.mask_token[0, 0]]
    for j, i in enumerate(keep[0].tolist()):
        seen[1 + i] = y[1 + j]
    seen = torch.stack(seen)[None] + mae.decoder_position
    torch.testing.assert_close(mae.decode(tokens, keep), mae.to_pixels(mae.decoder(seen))[:, 1:])


def test_positions_are_maes_and_never_trained():
    expected = [[0.0] * 16]  # the class token's
    for row in range(7):
        for column in range(7):
            angles = [[x / 10_000 ** (k / 4) for k in range(4)] for x in (column, row)]
            expected.append([f(a) for half in angles for f in (math.sin, math.cos) for a in half])
    torch.testing.assert_close(S.sincos_positions(7, 16)[0], torch.tensor(expected))
    buffers = dict(small_model().ffl.mae.named_buffers())
    assert torch.equal(buffers["position"], S.sincos_positions(7, 128))
    assert torch.equal(buffers["decoder_position"], S.sincos_positions(7, 64))


def test_a_block_is_pre_norm_attention_and_starts_as_in_mae():
    torch.manual_seed(0)
    block, x = S.block(8, 2), seeded(2, 5, 8)
    attention, normed = block.self_attn, F.layer_norm(x, (8,), eps=1e-6)
    q, k, v = (y.split(4, dim=2) for y in (normed @ attention.in_proj_weight.T).chunk(3, dim=2))
    heads = [(q[i] @ k[i].mT / 2).softmax(-1) @ v[i] for i in (0, 1)]
    y = x + attention.out_proj(torch.cat(heads, dim=2))
    hidden = F.gelu(block.linear1(F.layer_norm(y, (8,), eps=1e-6)))
    torch.testing.assert_close(block(x), y + block.linear2(hidden))
    for linear in (m for m in small_model().ffl.mae.modules() if isinstance(m, nn.Linear)):
        bound = (6 / sum(linear.weight.shape)) ** 0.5  # Xavier's
        assert 0.98 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()


def test_eq5_is_t_squared_times_the_divergence_from_the_mean():
    """The mean is not detached here: that changes no gradient."""
    zs, t = [seeded(4, 6, seed=i).double().requires_grad_() for i in range(3)], 3.0
    teacher = (sum(zs) / 3 / t).softmax(1)
    slow = sum(t**2 * (teacher * (teacher / (z / t).softmax(1)).log()).sum() / 4 for z in zs)
    loss = S.distillation_loss(*zs, t=t)
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(grads(loss, *zs), grads(slow, *zs))


def test_eq6_weighs_the_losses_and_the_mean_token_and_both_views_are_distilled():
    model, (v1, v2, I) = small_model(alpha=0.5, beta=0.2, t=2.0), small_inputs()
    out = drawing_alike(lambda: model(v1, v2, I))
    L_s, hs, z1 = model.gfl(v1, v2)
    L_r, L_g, tokens, _ = drawing_alike(lambda: model.ffl(model.backbone(I), I))
    zs = [model.distil_m(sum(tokens.unbind(1)) / 12), *map(model.distil_v, hs)]
    L_d = S.distillation_loss(*zs, t=2.0)
    expected = dict(L_s=L_s, L_r=L_r, L_d=L_d, L_g=L_g, spread=S.spread(z1),
                    loss=L_s + L_r + 0.5 * L_d + 0.2 * L_g)
    torch.testing.assert_close({k: out[k] for k in expected}, expected)


@pytest.mark.parametrize("kappa", [0.02, 0.0])
def test_the_table_of_who_trains_whom(kappa):
    model, parts = small_model(kappa=kappa), []
    for part in ("gfl.online.backbone", "gfl.online.projector|gfl.predictor", "ffl.grouping",
                 "ffl.mae.(embed|class|encoder)", "ffl.mae.(decoder|mask|to_pixels)", "distil_"):
        parts.append([p for name, p in model.named_parameters() if re.match(part, name)])
    trained = sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert trained == sorted(id(p) for part in parts for p in part)
    out, rows = model(*small_inputs()), re.findall(r"(?m)^ +(L_[srdg]) +(.+)$", S.SimFLE.__doc__)
    assert [name for name, _ in rows] == ["L_s", "L_r", "L_d", "L_g"]
    for name, row in rows:
        for part, told in zip(parts, re.split(" {2,}", row), strict=True):
            got = grads(out[name], *part)
            if told == "yes" or (told == "if κ > 0" and kappa > 0):
                assert all(g is not None for g in got) and any(g.any() for g in got), (name, told)
            else:
                assert not any(g.any() for g in got if g is not None), (name, told)


def test_losses_pass_gradcheck_and_keep_float64_and_upcast_bf16_and_half():
    C = seeded(2, 8, 2, 3).double().requires_grad_()
    mask, group = seeded(2, 48, seed=1) > 0, torch.tensor([3, 0])
    pieces = [lambda C: S.similarity_loss(*C.flatten(2).unbind()),
              lambda C: S.grouping_loss(C, 4)[0], lambda C: S.patch_scores(C, group, 4, 6, 2),
              lambda C: S.patch_errors(C[:1].flatten(2), C[1:].flatten(2), True),
              lambda C: S.distillation_loss(*C.flatten(2).unbind(1)),
              lambda C: S.spread(C.flatten(1))]
    assert all(torch.autograd.gradcheck(piece, C) for piece in pieces)
    pieces.append(lambda C: S.refinement_term(C.flatten(1), mask.to(C.dtype), C.flatten(1)))
    for dtype in (torch.bfloat16, torch.half, torch.float64):
        x, wanted = C.to(dtype), torch.promote_types(dtype, torch.float32)
        for piece in pieces:
            assert piece(x).dtype == wanted
            torch.testing.assert_close(piece(x), piece(x.double()).to(wanted), rtol=1e-4, atol=1e-5)
    loss, exact = (drawing_alike(lambda: small_model().to(dtype)(
        *(x.to(dtype) for x in small_inputs())))["loss"] for dtype in (torch.float, torch.double))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device, bf16", [("cpu", True), pytest.param("cuda", False, marks=GPU)])
def test_gradients_are_the_same_under_autocast_and_on_a_gpu(device, bf16, monkeypatch):
    """With the groups and masks of fp32 on the CPU: other patches would be another loss. Autocast
    keeps a weight's bf16 copy; in PyTorch 2.8 one made under `no_grad` passes no gradient."""
    masks, parts, losses, choose = [], {}, [], S.mask_lowest
    def mask_lowest(a, ratio):
        if not masks:
            masks.extend(choose(a, ratio))
        return [x.to(a.device) for x in masks]

    monkeypatch.setattr(S, "mask_lowest", mask_lowest)
    monkeypatch.setattr(S.FaceMAE, "scores", lambda self, C: S.patch_scores(
        C, torch.arange(len(C), device=C.device) % 8, 8, 28, 4))
    torch.set_float32_matmul_precision("highest")
    for run, (place, half) in enumerate((("cpu", False), (device, bf16))):
        model = small_model().to(place)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            with torch.autocast(place, torch.bfloat16, enabled=half):
                out = model(*(x.to(place) for x in small_inputs(16)))
            out["loss"].backward()
        losses.append({k: out[k].cpu() for k in ("L_s", "L_r", "L_d", "L_g")})
        for name, p in model.named_parameters():
            if p.requires_grad:
                part = re.match(r"gfl\.(online\.)?\w+|ffl\.(mae\.)?\w+|\w+", name)[0]
                parts.setdefault(part, ([], []))[run].append(p.grad.flatten().cpu())
    torch.testing.assert_close(*losses, rtol=0.05 if bf16 else 1e-3, atol=1e-4)
    for part, pair in parts.items():
        expected, got = map(torch.cat, pair)
        assert (got - expected).norm() < (0.6 if bf16 else 0.02) * expected.norm(), part


def test_the_papers_model_has_its_counts_and_a_step_reads_no_value(monkeypatch):
    """On meta tensors, which have shapes alone: to read a value, so to wait for it, is an error."""
    monkeypatch.setattr(torch, "randperm", functools.partial(torch.arange, device="cpu"))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    with torch.device("meta"):
        model = S.build_simfle(S.read_settings(["--data", "x"]))
        assert sum(p.numel() for p in model.parameters()) == 197_537_920
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 164_580_160
        v, I = torch.zeros(2, 3, 224, 224), torch.zeros(2, 3, 112, 112)
        for net, inputs, gmac in ((model, (v, v, I), 20.0), (model.gfl, (v, v), 16.4)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                net(*inputs)
            assert round(counter.get_total_flops() / 2 / 2 / 1e9, 1) == gmac  # 2 images, 2 a MAC

        args = S.read_settings(["--data", "x", "--preset", "laptop"])
        laptop, I = S.build_simfle(args), torch.zeros(2, 3, args.ffl_size, args.ffl_size)
        assert laptop.backbone(I).shape[2:] == (4, 4) and laptop.ffl.mae.grid == 7
        x = torch.zeros(2, 3, args.view_size, args.view_size, dtype=torch.uint8)
        v1, v2 = (S.augment(x, torch.zeros(2, 3, 1, 1)) for _ in range(2))
        laptop(v1, v2, I)["loss"].backward()
        laptop.update()


SOURCE = (HERE / "simfle.py").read_text()
PART_1 = SOURCE[SOURCE.index("# ====="):SOURCE.index("# ================================ Part II")]


@pytest.mark.parametrize("piece", [
    "similarity_loss", "ema_update", "BYOL", "ChannelGrouping", "grouping_loss", "mask_lowest",
    "refinement_term", "FaceMAE", "distillation_loss", "SimFLE", "augment"])
def test_a_piece_pasted_into_an_empty_file_runs_its_example(piece):
    """With the imports and what its example says that it needs, no more and no less."""
    defined = {node.name: node for node in ast.parse(SOURCE).body if hasattr(node, "name")}
    example = re.sub(r"(?m)^ {8}", "", getattr(S, piece).__doc__.split("\n\n")[-1]).strip()
    needs = re.findall(r"\w+", "".join(re.findall(r"(?m)^# .*", example)))[1:]
    if needs == "all of Part I".split():
        needs = re.findall(r"(?m)^(?:def|class) (\w+)", PART_1)
    used, todo = {piece}, [defined[piece], ast.parse(example)]
    while todo:
        names = {n.id for n in ast.walk(todo.pop()) if isinstance(n, ast.Name)}
        todo += [defined[name] for name in names & defined.keys() - used]
        used |= names & defined.keys()
    assert {*needs, piece} == used
    pasted = [ast.unparse(node) for name, node in defined.items() if name in used]
    imports = SOURCE[SOURCE.index("from __future__"):SOURCE.index("# =====")]
    exec(compile("\n".join([imports, *pasted, example]), piece, "exec"), {})


def test_part_1_knows_nothing_of_settings_files_and_processes():
    for word in ("args.", "World", "UserError", "dist.", "Path", "cuda", "open(", "os.", "print("):
        assert not re.search(r"\b" + re.escape(word), PART_1), word


# ===== Augmentation =====


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("size", [32, 64, 224])
def test_every_colour_and_blur_equals_torchvision_within_a_grey_level(size, device):
    x = drawing_alike(lambda: torch.rand(4, 3, size, size))
    x[0, :, :4] = 0.5  # grey pixels have no hue
    grey, taps, strengths = TF.rgb_to_grayscale(x).to(device), size // 10 | 1, [0.2, 0.7, 1.3, 1.8]
    for own, torchvisions, factors in (
            (lambda x, f: S.blend(x, 0.0, f), TF.adjust_brightness, strengths),
            (lambda x, f: S.blend(x, grey.mean((1, 2, 3), True), f), TF.adjust_contrast, strengths),
            (lambda x, f: S.blend(x, grey, f), TF.adjust_saturation, strengths),
            (S.shift_hue, TF.adjust_hue, [-0.2, 0.0, 0.13, 0.2]),
            (lambda x, f: S.gaussian_blur(x, f.flatten(), taps),
             lambda x, f: TF.gaussian_blur(x, taps, f), [0.1, 0.5, 1.2, 2.0])):
        got = own(x.to(device), torch.tensor(factors, device=device).view(4, 1, 1, 1)).cpu()
        expected = torch.stack([torchvisions(x[b], f) for b, f in enumerate(factors)])
        assert (got - expected).abs().max() < 1 / 255, torchvisions


@pytest.mark.parametrize("size, taps", [(32, 3), (64, 7), (224, 23)])
def test_augment_does_to_every_image_what_torchvision_does_with_the_same_draws(size, taps):
    """So it also flips, jitters and blurs as often: 144 images a size tell 0.5 from 0.52."""
    B, kinds = 24, ("brightness", "contrast", "saturation", "hue")
    x = drawing_alike(lambda: torch.randint(256, (B, 3, size, size), dtype=torch.uint8))
    for seed in range(size, size + 6):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=seed % 2 == 1):  # changes nothing
            got = S.augment(x / 255 if seed % 3 else x, COLOURS)
        assert got.dtype == torch.float32 and got.is_contiguous(memory_format=torch.channels_last)
        torch.manual_seed(seed)
        flip, order = torch.rand(B) < 0.5, torch.randperm(4).tolist()
        factors = [torch.empty(B).uniform_(*((-0.2, 0.2) if kinds[i] == "hue" else (0.2, 1.8)))
                   for i in order]
        jitter, grey = torch.rand(B) < 0.8, torch.rand(B) < 0.2
        sigma = torch.empty(B).uniform_(0.1, 2.0) * size / 224
        blur = torch.rand(B) < 0.5
        for b in range(B):
            y = TF.hflip(x[b] / 255) if flip[b] else x[b] / 255
            for i, f in zip(order, factors) if jitter[b] else ():
                y = getattr(TF, f"adjust_{kinds[i]}")(y, f[b].item())
            y = TF.rgb_to_grayscale(y, 3) if grey[b] else y
            y = TF.gaussian_blur(y, taps, sigma[b].item()) if blur[b] else y
            expected = TF.normalize(y, *COLOURS.flatten(1).tolist())
            torch.testing.assert_close(got[b], expected, atol=2e-3, rtol=0)


# ===== Part II: training =====


@pytest.fixture
def simfle(tmp_path, monkeypatch):
    """`simfle(*args)` runs it in an empty folder, and returns its exit code."""
    return functools.partial(in_process, cwd=tmp_path, monkeypatch=monkeypatch)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(*args)` is the sentence that it ends with."""
    return functools.partial(complaint, cwd=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def run(trained, tmp_path):
    """The folder of a copy of the run `faces`, which nobody has evaluated."""
    return shutil.copytree(trained / "runs/faces", tmp_path / "runs/faces",
                           ignore=shutil.ignore_patterns("*-*"))


FAULTS = f"""
import itertools, json, multiprocessing, os, signal, sys, time
sys.path.insert(0, {str(HERE)!r})
import torch, torch.distributed as dist, simfle as S
save = torch.save

def at(of, name, when, act):  # before call number `when`
    real, calls = getattr(of, name), itertools.count(1)
    setattr(of, name, lambda *a, **k: (next(calls) == when and act(*a), real(*a, **k))[1])

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(content, file):
    save(content, file)
    kill(file.flush(), os.truncate(file.fileno(), file.tell() // 2))

def serve():  # one import for many processes
    for line in sys.stdin:
        cwd, code, args = json.loads(line)
        if not (pid := os.fork()):
            os.chdir(cwd), os.setpgrp(), signal.alarm(60)
            out = os.open("out.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            exec(code, globals() | {{"args": args}})
            S.leave(S.main(args))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
LONG = [*TINY, "--epochs", "3", "--save-every", "3", "--log-every", "2", "--name", "r"]  # 6 steps
SEND = "at(S, 'mean_over_ranks', 4, lambda *_: [os.killpg(0, signal.{}) for _ in range({})])"
EVALUATE = ["--name", "faces", "--workers", "0", "--log-every", "1", "--batch-size", "8",
            "--epochs", "2", "--eval"]  # 6 steps, or 2 with half of the labels


@pytest.fixture(scope="session")
def forked():
    """`forked(code, *args, cwd=folder)` runs code, then simfle; returns exit code and output."""
    server = subprocess.Popen([sys.executable, "-c", FAULTS + "serve()"], stdin=subprocess.PIPE,
                              env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
                              stdout=subprocess.PIPE, text=True)

    def forked(code, *args, cwd):
        print(json.dumps([str(cwd), code, [*map(str, args)]]), file=server.stdin, flush=True)
        return int(server.stdout.readline()), (cwd / "out.txt").read_text()
    yield forked
    server.communicate()  # ends its input


def test_pictures_are_found_at_any_depth_and_read_upright_in_rgb(tmp_path):
    deep, turned = tmp_path / "[1]/b.c/d", Image.Exif()
    deep.mkdir(parents=True)
    base = Image.new("RGB", (50, 40), (200, 100, 50))
    base.paste((0, 0, 0), (0, 0, 10, 40))  # black on the left
    turned[0x0112] = 6  # a camera that was held upright
    base.save(tmp_path / "[1]/upright.JPG", "JPEG", exif=turned)
    modes = {"c.tif": "CMYK", "l.png": "L", "p.bmp": "P", "r.webp": "RGBA"}
    for name, mode in modes.items():
        base.convert(mode).save(deep / name)
    (deep / "notes.txt").touch()
    paths = S.find_pictures(tmp_path / "[1]")
    assert [Path(p).name for p in paths] == [*modes, "upright.JPG"]
    for path in paths:
        x = S.read_picture(path).rot90(path.count("upright"), dims=(1, 2))
        assert x.shape == (3, 40, 50) and x.dtype == torch.uint8 and x[:, :, :9].max() < 12, path
        expected = torch.tensor([124.0] * 3 if "l.png" in path else [200.0, 100, 50])
        difference = (x[:, :, 12:].float().mean(dim=(1, 2)) - expected).abs().max()
        assert difference < (27 if "p.bmp" in path else 6), path  # P has 216 colours


def test_the_loader_crops_and_resizes_as_torchvision_does_with_pillow(tmp_path):
    """In boxes by its seed and the place alone, of at least the share that is asked for."""
    for i, size in enumerate(((90, 61), (40, 40), (200, 131))):
        x = F.interpolate(seeded(1, 3, 20, 20, seed=i).sigmoid(), size, mode="bicubic")
        TF.to_pil_image(x[0].clamp(0, 1)).save(tmp_path / f"{i}.png")
    faces = S.Faces(S.find_pictures(tmp_path), 7, 56, 48, 2, 0.3)
    for place, index, seed in ((11, 0, 7), (10, 1, 7), (10, 2, 7), (10, 2, 8)):
        faces.seed, picture = seed, Image.open(faces.paths[index])
        torch.manual_seed(S.seed_of(seed, "crops", place))
        expected = [TF.resized_crop(picture, *S.RandomResizedCrop.get_params(
            picture, (0.3, 1), (3 / 4, 4 / 3)), [48, 48]) for _ in range(2)]
        expected.append(TF.resize(picture, [56, 56]))
        item = faces[place, index]
        for got, other in zip([*item["views"], item["image"]], expected, strict=True):
            assert (got.int() - TF.pil_to_tensor(other).int()).abs().max() <= 1


def test_an_unreadable_picture_is_replaced_in_training_and_an_error_in_a_test_set(tmp_path, forked):
    data = draw_colours(tmp_path / "d", {"0_a": 3, "1_b": 3}, val=2)
    broken = data / "train/0_a/0_a2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    _, paths, labels = S.labelled(data / "train")
    assert S.Faces(paths, 0, 0, 8, 1, labels=labels)[0, 2]["label"] == 1  # the next one's
    args = ["--data", data, "--eval", "--init", "random", *TINY, "--batch-size", 6, "--steps", 1]
    code, out = forked("", *args, cwd=tmp_path)
    assert code == 0 and f"simfle: {broken} cannot be read" in out
    (data / "val/1_b/1_b0.png").write_text("no picture")
    for workers in (0, 1):  # in a loader worker, too
        code, out = forked("", *args, "--workers", workers, "--fresh", cwd=tmp_path)
        assert code == 2 and "Traceback" not in out and "steps 0" not in out and re.search(
            r"1_b0.png cannot be read.*\nsimfle: the pictures named above cannot be.*\n$", out)


def test_ranks_share_every_batch_and_an_epoch_shows_each_image_once():
    def steps(first, size, seed=5, weights=None):  # 40 images, 3 batches of 12 an epoch, 4 dropped
        ranks = [S.batches(40, 12 // size, range(first, 7), seed, S.World(r, size, "cpu"), weights)
                 for r in range(size)]
        return [sorted(sum(parts, [])) for parts in zip(*ranks, strict=True)]

    alone = steps(0, 1)
    assert alone == steps(0, 2) == steps(0, 3) and alone[1:] == steps(1, 2)  # resumes in mid-epoch
    for epoch in (0, 1):
        keys = sum(alone[3 * epoch:3 * epoch + 3], [])
        assert [place for place, _ in keys] == [*range(40 * epoch, 40 * epoch + 36)]
        assert len({index for _, index in keys}) == 36
    orders = [[i for _, i in keys] for keys in (alone[0], alone[3], steps(0, 1, seed=6)[0])]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    drawn = [i for _, i in sum(steps(0, 2, weights=torch.tensor([3.0, 1] + [0] * 38)), [])]
    assert {*drawn} == {0, 1} and 0.6 < drawn.count(0) / len(drawn) < 0.9


def test_the_optimiser_is_sgd_with_momentum_on_a_cosine_of_the_rate_per_256_images(faces, tmp_path):
    """A line of the log has its own step's values. An infinite gradient ends before the step."""
    net, means, after, momentum = nn.Linear(2, 1, bias=False), [], [], 0
    w, net.update = net.weight.detach().clone(), lambda: after.append(net.weight.detach().clone())
    def step(net, batch):
        means.append(batch["image"].float().mean() / 255)
        bad = (0 * net.weight.abs()).sqrt().sum() if len(means) == 6 else 0  # 0, of infinite slope
        return {"loss": net.weight.square().sum() * means[-1] + bad}

    args = S.read_settings("--data d --steps 6 --lr 20 --weight-decay 0.1 --batch-size 12 "
                           "--workers 0 --log-every 2".split())
    pictures = S.Faces(S.find_pictures(faces / "train"), image_size=8)
    with pytest.raises(S.UserError, match="of step 6 is not finite.*lower --lr"):
        S.fit(args, CPU, net, net, pictures, step, tmp_path)
    log = log_of(tmp_path)
    assert [*log] == [2, 4] and len(after) == 5 and torch.equal(after[-1], net.weight)
    for i, mean in enumerate(means[:5]):
        rate, gradient = 20 * 12 / 256 * (1 + math.cos(math.pi * i / 6)) / 2, 2 * w * mean
        if i + 1 in log:
            assert log[i + 1] == pytest.approx(dict(
                step=i + 1, epoch=i // 2 + 1, lr=rate, gradient=gradient.norm().item(),
                loss=(w.square().sum() * mean).item()), rel=1e-4)
        momentum = 0.9 * momentum + gradient + 0.1 * w
        w = w - rate * momentum
        torch.testing.assert_close(after[i], w)


def test_a_run_leaves_log_settings_checkpoint_and_a_backbone_that_others_start_from(trained, faces):
    folder = trained / "runs/faces"
    log, saved = log_of(folder), torch.load(folder / "checkpoint.pt")
    assert [*log] == [1, 2] and {*log[2]} == {
        "step", "epoch", "lr", "loss", "L_s", "L_r", "L_d", "L_g", "spread", "D2_between",
        "D2_within", "masked_error", "masked", "gradient"}
    assert len(log[2]["masked"]) == 49 and sum(log[2]["masked"]) == pytest.approx(12 * 37)
    assert saved["step"] == 2 and {*saved} == {"step", "model", "same", "optimizer"}
    args = vars(S.read_settings(["--data", str(faces), *TINY, "--steps", "2"]))
    assert json.loads((folder / "settings.json").read_text()) == args | dict(done=2, processes=1)
    backbone = torch.load(folder / "backbone.pt")
    assert not {*S.make_resnet("small").state_dict()} ^ {*backbone, "fc.weight", "fc.bias"}
    assert all(torch.equal(v, saved["model"][f"gfl.online.backbone.{k}"])
               for k, v in backbone.items())
    args = ["--data", "d", *TINY, "--init", str(folder / "backbone.pt")]
    gfl = S.build_simfle(S.read_settings(args)).gfl.state_dict()
    assert all(torch.equal(v, gfl[f"{stream}.backbone.{k}"])
               for k, v in backbone.items() for stream in ("online", "target"))


@pytest.mark.parametrize("fault, code, after", [
    ("at(S, 'mean_over_ranks', 5, kill)", -9, 3), ("at(torch, 'save', 4, half)", -9, 3),
    (SEND.format("SIGTERM", 2), 143, 5), (SEND.format("SIGINT", 1), 143, 5),
    (SEND.format("SIGINT", 2), -2, 3), ("S.resize = lambda *_: [][0]", 1, 0),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("at(S.SimFLE, 'update', 2, kill)", -9, 0), ("at(torch, 'save', 3, half)", -9, 3),
        ("at(S.Path, 'replace', 3, kill)", -9, 0), ("at(S.Path, 'replace', 5, kill)", -9, 3)))])
def test_a_run_that_ends_at_any_moment_resumes_bit_equal(fault, code, after, forked, faces,
                                                         tmp_path, simfle, capsys):
    """Killed in a step, with half of a file, before a rename; stopped by signals, of which loader
    workers hear too; by a bug. With any number of workers. A second Ctrl-C kills."""
    got, out = forked(fault, "--data", faces, *LONG, "--workers", 2, cwd=tmp_path)
    assert got == code and ("Traceback" in out) == (code == 1), out
    sentence = f"simfle: stopped after step {after}; the same command (no --fresh) resumes\n"
    assert out.endswith(sentence) == (code == 143)
    assert simfle("--data", faces, *LONG) == 0
    assert f"steps {after} to 6 of 12 images on 1 × cpu" in capsys.readouterr().out
    assert simfle("--data", faces, *LONG, "--name", "whole", "--workers", 0) == 0
    whole, parts = tmp_path / "runs/whole", tmp_path / "runs/r"
    assert same_checkpoint(whole, parts) and not [*tmp_path.rglob("*.part")]
    assert [*log_of(whole)] == [2, 4, 6] and log_of(whole).items() <= log_of(parts).items()


def test_a_checkpoint_of_another_run_is_refused(faces, run, refused, simfle, monkeypatch):
    before, data = (run / "checkpoint.pt").read_bytes(), run.parents[1] / "faces"
    args = ["--data", shutil.copytree(faces, data), *TINY, "--steps", "4"]
    for *change, words in (
            ("--tau", 0, "tau was 0.99, is 0.0"), ("--init", run / "backbone.pt", "init was"),
            ("--batch-size", 10, "batch was 12, is 10"), ("--bf16", "bf16 was")):
        error = refused(*args, *change)
        assert re.search("checkpoint.pt is of another run.*another --name, or --fresh", error)
        assert words in error and error.count(" was ") == 1, error
    assert "has 2 steps, 1 are asked for; --fresh" in refused(*args, "--steps", "1")
    picture, colours = Path(S.find_pictures(data / "train")[7]), data / "colours.json"
    content = picture.read_bytes()
    for name, length in ((picture.name, 9), (f"{picture.stem}x.png", 0)):  # longer; renamed
        picture.unlink()
        (other := picture.with_name(name)).write_bytes(content + bytes(length))
        assert "their names and sizes" in refused(*args)
        other.rename(picture).write_bytes(content)
    colours.write_text(json.dumps(dict(mean=[0.1] * 3, std=[0.2] * 3)))
    assert "colours was" in refused(*args)
    colours.unlink()
    assert (run / "checkpoint.pt").read_bytes() == before
    # What is free may change, and the data may lie elsewhere.
    assert simfle(*args, *"--lr .2 --weight-decay 0 --save-every 1 --log-every 2".split()) == 0
    rate = 0.2 * 12 / 256 * (1 + math.cos(math.pi * 0.75)) / 2
    assert [*log_of(run)] == [1, 2, 4] and log_of(run)[4]["lr"] == pytest.approx(rate)
    monkeypatch.setattr(S.SimFLE, "update", lambda model: [][0])
    assert simfle(*args, "--fresh") == 1  # removes the checkpoint and the log
    assert {p.name for p in run.iterdir()} == {"backbone.pt", "settings.json"}


@pytest.mark.parametrize("kind, holds", [
    ("namespace", "UnpicklingError"), ("tensor", "Tensor"), ("prefix", "module.conv1.weight"),
    ("part", "conv1.weight, bn1.weight"), ("checkpoint", "gfl.online.backbone.conv1.weight")])
def test_a_file_that_is_no_backbone_is_one_sentence(kind, holds, faces, run, refused, tmp_path):
    weights = torch.load(run / "backbone.pt")
    torch.save(dict(namespace=weights | {"args": argparse.Namespace(a=1)}, tensor=torch.ones(3),
                    prefix={f"module.{k}": v for k, v in weights.items()},
                    part={k: v for k, v in weights.items() if "layer4" not in k},
                    checkpoint=torch.load(run / "checkpoint.pt"))[kind], tmp_path / "b.pt")
    for more in ([], ["--eval"]):
        error = refused("--data", faces, *TINY, "--name", "new", "--init", "b.pt", *more)
        assert re.search(rf"b\.pt holds .*{holds}.*expected is .*state dict", error), error


def test_what_cannot_be_is_one_sentence(faces, run, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    few, broken = draw_colours(tmp_path / "few", {"0_a": 3, "1_b": 3}), run.with_name("broken")
    (few / "val/1_b").rename(few / "val/1_c")
    (tmp_path / "empty").mkdir(), broken.mkdir()
    (broken / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:9999])
    for args, words in (([], "--data is missing.*python data/demo.py"),
            (["--data", "nowhere"], "there is no folder nowhere"),
            (["--data", "empty"], "empty holds no pictures"),
            (["--data", faces, *TINY, "--batch-size", "1"], "too few.*two on each"),
            (["--data", faces, *TINY, "--name", "broken"], "broken/checkpoint.pt holds no dict"),
            (["--data", "few", "--eval", "--init", "random"], "0_a, 1_b, few/val has 0_a, 1_c"),
            (["--data", "few/train/0_a", "--eval"], "0_a/train needs a folder"),
            (["--name", "none", "--eval"], "none/settings.json is missing.*pre-train first"),
            (["--data", faces, "--eval", "--init", "no.pt", *TINY], "no.pt is missing"),
            (["--name", "faces", "--eval", "semi", "--labels", "10"], "--labels 10 is no share"),
            (["--name", "faces", "--eval", "finetune"], "backbone.pt has none: .*--eval linear")):
        assert re.search(words, refused(*args)), words
    torch.save(torch.load(run / "checkpoint.pt") | {"model": {}}, run / "checkpoint.pt")
    assert "does not fit the code, --fresh" in refused("--data", faces, *TINY)  # which has changed
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "srun started several tasks" in refused("--data", faces)


RANKS = """
rank, update, args = int(os.environ["RANK"]), S.SimFLE.update, sys.argv[1:]
def checked(model):
    update(model)
    first = [p.detach().clone() for p in model.parameters()][::7]
    [dist.broadcast(p, 0) for p in first]
    all(map(torch.equal, first, [*model.parameters()][::7])) or kill(print("weights differ"))
S.SimFLE.update, time.sleep = checked, lambda seconds: None  # no rank need wait for the other
one = ["--name", "one", "--steps", "1", "--tau", "0", "--weight-decay", "0", "--seed", "3"]
codes = [S.main([*args, "--name", name]) for name in ("whole", "killed", "stopped")]
codes += [S.main([*args, *one]), S.main(["--data", "nowhere"]),
          S.main(["--name", "whole", "--eval", "--batch-size", "6", "--epochs", "2"])]
if rank == 1:
    at(S, "similarity_loss", 5, lambda p, z: z.fill_(float("nan")))  # two calls a step
codes.append(S.main([*args, "--name", "nan", "--save-every", "2"]))
S.Path(f"codes{rank}").write_text(str(codes))
S.leave(0)"""
FAULTY = """if os.environ["RANK"] == "{}":
    at(S, "mean_over_ranks", {}, lambda *_: (S.Path("when").write_text(str(time.time())), {}))
else:  # other ranks are deaf
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
S.leave(S.main())"""
STOP = "[os.kill(p, signal.SIGINT) for p in (os.getpid(), os.getppid())]"  # torchrun sends it on


@pytest.fixture(scope="session")
def ranks(faces, tmp_path_factory):
    """The folder and output of RANKS, after a rank of `killed` died and `stopped` got SIGTERM."""
    @functools.cache
    def ranks(processes):
        cwd = tmp_path_factory.mktemp("ranks")

        def start(code, *more, expect):
            (cwd / "program.py").write_text(FAULTS + code)
            return run_program("--data", faces, *TINY, "--batch-size", 13, "--steps", 6,
                               "--save-every", 3, *more, cwd=cwd, processes=processes,
                               program=cwd / "program.py", expect=expect)

        for name, fault in (("killed", (1, 5, "kill()")), ("stopped", (0, 4, STOP))):
            start(FAULTY.format(*fault), "--name", name, expect=1)
            assert time.time() - float((cwd / "when").read_text()) < 25, "they waited for a rank"
        return cwd, start(RANKS, expect=0)
    return ranks


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_end_together_and_the_same_command_resumes_bit_equal(processes, ranks, monkeypatch):
    cwd, out = ranks(processes)
    for name, step in (("killed", 3), ("stopped", 5)):
        assert f"{name}/checkpoint.pt: 30 pictures, steps {step} to 6 of 12 images on" in out
        assert same_checkpoint(cwd / "runs/whole", cwd / "runs" / name)
        assert log_of(cwd / "runs/whole") == log_of(cwd / "runs" / name)
    # `main` can be called again and again. What fails is told once; a loss of one rank ends all.
    assert {(cwd / f"codes{r}").read_text() for r in range(processes)} == {"[0, 0, 0, 0, 2, 0, 2]"}
    assert out.count("simfle: there is no folder nowhere") == 1 and "Traceback" not in out
    assert out.count("simfle: loss or gradient of step 3 is not finite") == 1
    saved, result = torch.load(cwd / "runs/nan/checkpoint.pt"), cwd / "runs/whole/linear-faces.json"
    assert saved["step"] == 2 and all(v.isfinite().all() for v in saved["model"].values())
    # Every test image is counted once: one process finds the same.
    cells = json.loads(result.read_text())["confusion"]
    assert in_process("--name", "whole", "--eval", "--batch-size", 6, "--epochs", 2, "--workers", 0,
                      cwd=cwd, monkeypatch=monkeypatch) == 0
    assert json.loads(result.read_text())["confusion"] == cells and sum(sum(cells, [])) == 15


def test_two_processes_take_the_step_of_the_mean_gradient_and_the_target_follows(faces, ranks):
    """DDP's mean of what each rank computes alone on its share; values are logged as means."""
    folder, parts, grads = ranks(2)[0] / "runs/one", [], []
    args = S.read_settings(["--data", str(faces), *TINY])
    pictures = S.Faces(S.find_pictures(faces / "train"), 3, 28, 32, 2, args.crop_min)
    torch.manual_seed(3)
    model = S.build_simfle(args).to(memory_format=torch.channels_last)
    for rank in range(2):
        [keys] = S.batches(30, 6, range(1), 3, S.World(rank, 2, "cpu"))
        batch = torch.utils.data.default_collate([pictures[k] for k in keys])
        torch.manual_seed(S.seed_of(3, "step", 0, rank))
        v1, v2 = (S.augment(batch["views"][:, k], COLOURS) for k in (0, 1))
        own = copy.deepcopy(model)
        parts.append(own(v1, v2, S.normalise(batch["image"], COLOURS)))
        parts[-1]["loss"].backward()
        grads.append(torch.cat([p.grad.flatten() for p in own.parameters() if p.requires_grad]))
    line, mean, saved = log_of(folder)[1], sum(grads) / 2, torch.load(folder / "checkpoint.pt")
    assert line["gradient"] == pytest.approx(mean.norm().item(), rel=1e-3)
    for name, one in parts[0].items():
        expected = (one + parts[1][name]).detach() / 2
        assert line[name] == pytest.approx(expected.tolist(), rel=2e-3, abs=1e-6), name
    momentum = [s["momentum_buffer"].flatten() for s in saved["optimizer"]["state"].values()]
    assert (torch.cat(momentum) - mean).norm() < 1e-2 * mean.norm()
    for name, _ in model.gfl.online.named_parameters():  # τ = 0
        assert torch.equal(*(saved["model"][f"gfl.{of}.{name}"] for of in ("target", "online")))


def test_main_leaves_a_script_as_it_was_and_lets_it_end(forked, faces, tmp_path):
    code = """pool, before = multiprocessing.Pool(2), signal.getsignal(signal.SIGTERM)
mine, cell = iter(torch.utils.data.DataLoader(range(9), num_workers=1)), {"__name__": "__main__"}
exec(compile(open(S.__file__).read(), "cell", "exec"), cell)  # as pasted into a notebook
assert next(mine) == 0 == S.main(args) == cell["main"]([*args, "--steps", "2"])
S.resize = lambda *_: [][0]  # its loader worker fails, and must not stay
assert S.main([*args, "--steps", "3"]) == 1
assert pool.map(abs, [-1, 2]) == [1, 2] and len([*mine]) == 8
assert signal.getsignal(signal.SIGTERM) == before
sys.exit(print("fine"))"""
    got, out = forked(code, "--data", faces, *TINY, "--steps", "1", cwd=tmp_path)
    assert got == 0 and out.endswith("fine\n") and "steps 1 to 2 of" in out, out


def test_simfle_alone_in_an_empty_folder_trains_and_evaluates(faces, tmp_path):
    """And a run is named after the link that --data is."""
    shutil.copy(HERE / "simfle.py", tmp_path)
    (tmp_path / "linked").symlink_to(faces)
    for args in ([*TINY, "--steps", "1"], ["--eval", "--workers", "0", "--epochs", "1"]):
        run_program("--data", "linked/", *args, cwd=tmp_path, program=tmp_path / "simfle.py")
    assert (tmp_path / "runs/linked/linear-linked.json").exists()


def test_git_ignores_data_and_runs_where_they_are_links_too(tmp_path):
    paths = ["data/x", "runs", "data/faces/a.png", "data/toy.py", "data/a.md", "data/figures/a.png"]
    (tmp_path / "data").mkdir()
    [(tmp_path / link).symlink_to(tmp_path) for link in paths[:2]]
    shutil.copy(HERE / ".gitignore", tmp_path)
    git = functools.partial(subprocess.run, cwd=tmp_path, text=True, stdout=subprocess.PIPE)
    git(["git", "init", "-q"], check=True)
    assert git(["git", "check-ignore", *paths]).stdout.split() == paths[:3]


# ===== Part III: evaluation =====


@pytest.fixture
def evaluate(run, simfle):
    """`evaluate(protocol, *args)` evaluates that run; its result, classifier and log."""
    def evaluate(protocol, *args, tag=""):
        assert simfle(*EVALUATE, protocol, *args, "--tag", tag) == 0
        name = f"{protocol}-faces-{tag}".strip("-")
        return (json.loads((run / f"{name}.json").read_text()), torch.load(run / f"{name}.pt"),
                log_of(run, f"log-{name}"))
    return evaluate


def test_the_protocols_have_the_settings_of_supplement_b_and_labels_are_shared_out_by_class():
    for protocol, expected in (("linear", (100, 1024, 2.0, 0.0)), ("semi", (100, 512, 0.05, 1e-4)),
                               ("finetune", (100, 512, 0.001, 1e-4))):
        s = S.read_settings(["--data", "affectnet", "--eval", protocol])
        assert (s.epochs, s.batch_size, s.lr * s.batch_size / 256, s.weight_decay) == (
            pytest.approx(expected))
        assert (s.view_size, s.crop_min, s.labels, s.arch) == (224, 0.08, 0.01, "resnet50")
    labels = [0] * 200 + [1] * 40 + [2] * 3
    one, same, two = (S.share_of_labels(labels, 0.1, seed) for seed in (1, 1, 2))
    assert [sum(labels[i] == k for i in one) for k in range(3)] == [20, 4, 1] and one == same != two


def test_linear_evaluation_trains_the_head_alone_and_tells_all(evaluate, run, faces, monkeypatch):
    got, saved, log = evaluate("linear", "--epochs", "4")
    assert got["accuracy"] > 60 and {r["lr"] for r in log.values()} == {0.5 * 8 / 256}  # constant
    assert got["settings"]["run"] == json.loads((run / "settings.json").read_text())
    for name, value in dict(data=str(faces), arch="small", view_size=32, crop_min=0.3, lr=0.5,
                            weight_decay=0, preset="paper", epochs=4).items():  # the run's or B.1's
        assert got["settings"][name] == value
    backbone, net = torch.load(run / "backbone.pt"), S.make_resnet("small")
    assert {*saved["model"]} - {*backbone} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(saved["model"][k], v) for k, v in backbone.items())
    assert (saved["classes"], saved["arch"], saved["size"]) == (["0_a", "1_b", "2_c"], "small", 32)
    # The same predictions by hand, of a head that was not trained.
    got, saved, _ = evaluate("linear", "--lr", "0", tag="start")
    net.fc, (_, paths, labels) = nn.Linear(net.fc.in_features, 3), S.labelled(faces / "val")
    net.eval().load_state_dict(saved["model"])
    x = torch.stack([TF.to_tensor(TF.resize(Image.open(p), [32, 32])) for p in paths])
    answers = net((x - saved["colours"][0]) / saved["colours"][1]).argmax(dim=1).tolist()
    cells = [[[*zip(labels, answers)].count((i, j)) for j in range(3)] for i in range(3)]
    assert got["confusion"] == cells and got["accuracy"] < 100
    # The accuracy is of images, its mean of classes.
    monkeypatch.setattr(S, "test", lambda *_: torch.tensor([[3., 1, 0], [0, 2, 0], [0, 0, 2]]))
    got = evaluate("linear", "--epochs", "4")[0]
    assert got["accuracy"] == 87.5 and got["per_class"] == [75, 100, 100]
    assert got["mean_accuracy"] == pytest.approx(275 / 3) and got["confusion"][0] == [3, 1, 0]


def test_whole_protocols_train_everything_on_a_cosine(evaluate, run):
    start = evaluate("linear")[1]["model"]
    for steps, *args in ([2, "semi", "--labels", "0.5"],  # 7 + 4 + 4 images of 30
                         [6, "finetune", "--init", run / "linear-faces.pt", "--lr", "0.1"]):
        _, after, log = evaluate(*args)
        assert all(not torch.equal(after["model"][k], v) for k, v in start.items()
                   if k.endswith(("weight", "running_mean")))
        rates = [r["lr"] for r in log.values()]
        assert rates == pytest.approx([rates[0] * (1 + math.cos(math.pi * i / steps)) / 2
                                       for i in range(steps)])
    assert F.cosine_similarity(after["model"]["fc.weight"], start["fc.weight"]).min() > 0.9


def test_training_pictures_are_cropped_and_flipped_test_pictures_not(evaluate, faces, monkeypatch):
    trains, tests, normalise = [], [], S.normalise
    monkeypatch.setattr(S, "normalise", lambda x, c: (tests.append(x), normalise(x, c))[1])
    start = S.start_classifier
    def watched(*args):
        net = start(*args)
        net.register_forward_pre_hook(
            lambda _, x: trains.append(x[0]) if torch.is_grad_enabled() else None)
        return net
    monkeypatch.setattr(S, "start_classifier", watched)
    evaluate("linear", "--epochs", "8", "--batch-size", "30", "--oversample")
    _, paths, labels = S.labelled(faces / "train")
    weights = 1 / torch.tensor([14] * 14 + [9] * 9 + [7] * 7).double()  # every class equally often
    keys, pictures = sum(S.batches(30, 30, range(8), 0, CPU, weights), []), S.Faces(
        paths, 0, 0, 32, 1, 0.3, labels)
    crops = normalise(torch.cat([pictures[key]["views"] for key in keys]), COLOURS)
    kept, flipped = ((torch.cat(trains) == x).flatten(1).all(1) for x in (crops, crops.flip(3)))
    assert len(keys) == 240 and (kept ^ flipped).all() and 90 < flipped.sum() < 150
    whole = [S.resize(S.read_picture(p), 32) for p in S.labelled(faces / "val")[1]]
    assert torch.equal(torch.cat(tests[9:]), torch.stack(whole))


def test_the_head_starts_near_0_and_moves_between_datasets_class_by_class(evaluate, tmp_path):
    args = ["--data", "d", "--preset", "laptop", "--eval", "--seed"]
    one, two = (S.start_classifier(S.read_settings([*args, seed]), "random", "abcdefgh").fc
                for seed in "01")
    assert abs(one.weight.std() - 0.01) < 0.001 and not one.bias.any()
    assert not torch.equal(one.weight, two.weight)
    saved, turned = evaluate("linear")[1], tmp_path / "turned.pt"
    torch.save(saved | {"classes": ["2_c", "0_a", "1_b"]}, turned)
    args = S.read_settings(["--name", "faces", "--eval", "finetune"])
    state = S.start_classifier(args, turned, ["0_a", "1_b", "2_c"]).state_dict()
    assert all(torch.equal(state[k], v[[1, 2, 0]] if k.startswith("fc.") else v)
               for k, v in saved["model"].items())
    with pytest.raises(S.UserError, match="classes 0_a, 1_b, .* has 2_c, 0_a, 1_b: make"):
        S.start_classifier(args, turned, ["0_a", "1_b"])
    S.start_classifier(S.read_settings(["--name", "faces", "--eval"]), turned, ["0_a", "1_b"])


def test_each_step_draws_anew_from_its_own_seed(simfle, faces, monkeypatch):
    real, seeds = torch.manual_seed, []
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
    assert simfle("--data", faces, *TINY, "--workers", "0", "--steps", "3", "--seed", "4") == 0
    assert [s for s in seeds if s != 4] == [S.seed_of(4, "step", i, 0) for i in range(3)]


def test_a_result_is_never_that_of_others(evaluate, run, faces, refused, simfle):
    evaluate("linear")
    files = [(p, p.read_bytes()) for p in (run / "linear-faces.json", run / "linear-faces.pt")]
    other = draw_colours(run / "other/faces", {"0_a": 14, "1_b": 9, "2_c": 7}, seed=1)
    for args, words in ((["--lr", "0.1"], "lr was 0.5, is 0.1"), (["--epochs", "3"], "epochs was"),
                        (["--seed", "1"], "seed was"), (["--init", "random"], "start_weights was"),
                        (["--data", other], "names and sizes was")):
        error = refused(*EVALUATE, "linear", *args)
        assert words in error and "give another --tag, or --fresh" in error
    fewer = shutil.copytree(faces, run / "fewer/faces")
    (fewer / "val/0_a/0_a0.png").unlink()
    assert "test_pictures was" in refused(*EVALUATE, "linear", "--data", fewer)
    assert simfle("--data", faces, *TINY, "--steps", 3) == 0
    assert "start_weights was" in refused(*EVALUATE, "linear")
    evaluate("linear", "--data", other, tag="b")
    assert all(path.read_bytes() == content for path, content in files)
    evaluate("linear", "--fresh")
    assert all(path.read_bytes() != content for path, content in files)


def test_an_evaluation_resumes_bit_equal(evaluate, forked, tmp_path, capsys):
    args = ["semi", "--labels", "0.9", "--save-every", "2", "--epochs", "3"]
    whole = evaluate(*args, tag="whole")
    code = "at(S, 'mean_over_ranks', 6, kill)"
    assert forked(code, *EVALUATE, *args, "--tag", "parts", cwd=tmp_path)[0] == -9
    parts = evaluate(*args, tag="parts")
    assert "steps 4 to 9" in capsys.readouterr().out
    assert whole[2] == parts[2] and whole[0]["confusion"] == parts[0]["confusion"]
    assert all(torch.equal(v, parts[1]["model"][k]) for k, v in whole[1]["model"].items())


def test_every_option_is_in_the_help_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        S.read_settings(["--help"])
    blocks = re.split(r"\n  (?=--)", capsys.readouterr().out)
    for flag in (f"--{name.replace('_', '-')}" for name in vars(S.read_settings(["--data", "d"]))):
        assert any(re.match(rf"(?s){flag}\b.*\(default:", block) for block in blocks), flag


@GPU
@pytest.mark.parametrize("more", [[], ["--bf16"]])
def test_a_gpu_trains_resumes_and_evaluates(more, faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--data", str(faces), *TINY, "--steps", "4", "--save-every", "2", *more, "--name"]
    with monkeypatch.context() as patch:
        patch.setattr(S, "report", lambda log, line, speed: 1 // (3 - line["step"]))
        assert S.main([*args, "parts"]) == 1  # in the third step
    assert S.main([*args, "parts"]) == S.main([*args, "whole"]) == 0
    out = capsys.readouterr().out
    assert ("cuda in bf16" in out) == bool(more) and "steps 2 to 4 of 12 images on 1 × cuda" in out
    assert S.main(["--name", "whole", "--eval", "--workers", "1", *more]) == 0
    whole, parts, backbone, saved = (torch.load(tmp_path / f"runs/{name}.pt") for name in (
        "whole/checkpoint", "parts/checkpoint", "whole/backbone", "whole/linear-faces"))
    for k, v in whole["model"].items():  # a GPU adds up in another order each time
        assert (v - parts["model"][k]).float().norm() <= 0.05 * max(1, v.float().norm()), k
    kept = [*backbone.values(), *saved["model"].values(), saved["colours"]]
    assert {t.device.type for t in kept} == {"cpu"}  # without map_location


# ===== data/baselines.py, data/probe.py, data/benchmark.py =====

PAPER_GMAC = {"byol": 16.5, "direct": 20.1, "random": 20.1, "simsiam": 8.3, "moco": 8.2,
              "mocov2": 8.3, "simclr": 4.1 + 4.1, "simfle-simsiam": 11.9, "simfle-moco": 11.8,
              "simfle-mocov2": 11.8, "simfle-simclr": 7.7 + 4.1}  # it counts one view of SimCLR
WIDTHS = {"simsiam": [2048, 2048, 2048, 512, 2048], "moco": [128, 128],
          "mocov2": [2048, 128, 2048, 128], "simclr": [2048, 128]}  # of MoCo two streams


def tiny(row, *more):
    torch.manual_seed(0)
    return S.MODELS[row](S.read_settings(["--data", "x", *TINY, "--model", row, *more]))


@pytest.mark.parametrize("row", PAPER_GMAC)
def test_every_row_of_tables_3_and_4_has_the_papers_arithmetic(row, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    args = S.read_settings(["--data", "x", "--model", row])
    with torch.device("meta"), torch.no_grad():  # shapes without numbers
        model = S.MODELS[row](args)
        v, I = torch.zeros(2, 3, 224, 224), torch.zeros(2, 3, 112, 112)
        with FlopCounterMode(display=False) as counter:
            model(v, v, I)
    assert counter.get_total_flops() / 4e9 == pytest.approx(PAPER_GMAC[row], rel=0.02)
    widths = [m.out_features for m in model.gfl.modules() if isinstance(m, nn.Linear)]
    assert widths == WIDTHS.get(row.removeprefix("simfle-"), widths)
    if "moco" in row:
        assert (len(model.gfl.queue), model.gfl.tau, args.tau) == (65_536, 0.999, 0.999)


@pytest.mark.parametrize("row", PAPER_GMAC)
def test_every_row_trains_resumes_and_is_evaluated_by_simfle(row, faces, tmp_path, monkeypatch):
    args = ["--data", faces, *TINY, "--workers", "0", "--model", row, "--steps", "2"]
    run, save = functools.partial(in_process, cwd=tmp_path, monkeypatch=monkeypatch), S.save_whole
    def save_and_copy(path, content):
        save(path, content)
        if path.name == "checkpoint.pt" and content["step"] == 1:
            shutil.copytree(path.parent, tmp_path / "runs/parts")

    monkeypatch.setattr(S, "save_whole", save_and_copy)
    for name in ("whole", "parts"):
        assert run(*args, "--save-every", "1", "--name", name, main=B.main) == 0
    assert same_checkpoint(tmp_path / "runs/parts", tmp_path / "runs/whole")
    trained = torch.load(tmp_path / "runs/whole/backbone.pt")["conv1.weight"]
    assert not torch.equal(trained, tiny(row).backbone.conv1.weight)
    assert run("--name", "whole", "--eval", "--steps", "1", "--workers", "0") == 0


def test_the_direct_connection_trains_the_backbone_by_the_map_and_random_masks_do_not():
    v1, v2, I = small_inputs()
    for row, reached in (("direct", True), ("random", False)):
        model = tiny(row, "--alpha", "0")
        model.gfl.forward = lambda v1, v2: (v1.sum() * 0, [seeded(4, 256)] * 2, seeded(4, 8))
        model(v1.requires_grad_(), v2, I)["loss"].backward()
        assert any(p.grad is not None for p in model.backbone.parameters()) == reached
    out = tiny("direct", "--beta", "0.5")(v1, v2, I)
    torch.testing.assert_close(out["loss"], out["L_s"] + out["L_r"] + 0.5 * out["L_g"])
    scores, C = tiny("random").ffl.scores, seeded(3, 256, 2, 2)
    torch.manual_seed(0)
    a, other = scores(C), scores(C)
    torch.manual_seed(0)
    assert torch.equal(a, scores(2 - C)) and not torch.equal(a, other) and a.shape == (3, 49)


def test_simsiams_other_view_is_a_constant_and_its_loss_that_of_the_paper_plus_1():
    gfl, (v1, v2, _) = tiny("simsiam").gfl, small_inputs()
    z1, z2 = gfl.online(v1)[0], gfl.online(v2)[0]
    D = [-F.cosine_similarity(gfl.predictor(a), b.detach()).mean() for a, b in ((z1, z2), (z2, z1))]
    losses = gfl(v1, v2)[0], 1 + (D[0] + D[1]) / 2
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(L, gfl.online.projector[0].weight)
                                 for L in losses))


def test_nt_xent_is_the_double_loop():
    z1, z2, t = seeded(5, 8), seeded(5, 8, seed=1), 0.3
    views, total = [*z1, *z2], 0.0
    for i, a in enumerate(views):
        others = {j: math.exp(F.cosine_similarity(a, b, dim=0).item() / t)
                  for j, b in enumerate(views) if j != i}
        total -= math.log(others[(i + 5) % 10] / sum(others.values()))
    torch.testing.assert_close(B.nt_xent(z1, z2, t), torch.tensor(total / 10))


@pytest.mark.parametrize("name, t", [("moco", 0.07), ("mocov2", 0.2)])
def test_mocos_loss_is_that_of_finding_the_key_and_only_the_query_learns(name, t):
    gfl, (v1, v2, _) = tiny(name).gfl, small_inputs()
    assert gfl(v1, v2)[0] == 0 and len(gfl.queue) == 1024 and gfl.tau == 0.99  # no negatives yet
    gfl.queue[:7], gfl.seen[...] = F.normalize(seeded(7, 8), dim=1), 7
    L_s, hs, z1 = gfl(v1, v2)
    q, k = (F.normalize(z, dim=1) for z in (z1, copy.deepcopy(gfl.target)(v2)[0]))
    total = 0.0
    for i in range(4):
        positive = math.exp((q[i] @ k[i]).item() / t)
        negative = sum(math.exp((q[i] @ n).item() / t) for n in gfl.queue[:7])
        total -= math.log(positive / (positive + negative)) / 4
    torch.testing.assert_close(L_s, torch.tensor(total), rtol=1e-4, atol=1e-4)
    assert len(hs) == 1 and L_s.requires_grad and not any(
        p.requires_grad for p in gfl.target.parameters())


@pytest.mark.parametrize("batch", [3, 10, 13])
def test_mocos_queue_forgets_the_oldest_and_its_target_follows(batch):
    gfl = B.MoCo(S.make_backbone(S.make_resnet("small", 8)), outputs=8, queue=10, tau=0.25)
    online, target = (stream.projector.weight for stream in (gfl.online, gfl.target))
    before, kept = target.clone(), []
    online.data.add_(1.0)
    for step in range(6):
        gfl.keys = seeded(batch, 8, seed=step)
        gfl.update()
        kept = (kept + gfl.keys.tolist())[-10:]
        assert sorted(gfl.queue[:len(kept)].tolist()) == sorted(kept)
    torch.testing.assert_close(target, 0.25**6 * before + (1 - 0.25**6) * online)


TWO = """
import sys, torch, torch.distributed as dist
sys.path[:0] = {}
import baselines, benchmark, simfle as S
world, result = S.join_processes(), dict()
v1, v2 = (v.chunk(world.size)[world.rank] for v in torch.load("in.pt"))
for name in ("simclr", "mocov2"):
    torch.manual_seed(0)
    gfl = S.MODELS[name](S.read_settings([*sys.argv[1:], "--model", name])).gfl.eval()
    if name == "mocov2":
        gfl.queue[:4], gfl.seen[...] = torch.eye(4, 8), 4
    L_s = gfl(v1, v2)[0]
    L_s.backward()
    result[name] = [L_s.detach(), *(p.grad for p in gfl.parameters() if p.grad is not None)]
    for x in result[name] if world.size > 1 else []:
        dist.all_reduce(x)  # as DistributedDataParallel does
        x /= world.size
    gfl.update()
    result[name] += [*gfl.buffers()]
torch.save(result, f"out{{world.size}}-{{world.rank}}.pt")
benchmark.loader_rate = lambda *args: 1.0
sys.exit(benchmark.main([*sys.argv[1:], "--model", "simclr"]))
"""


def test_two_processes_have_the_loss_and_gradients_of_one_on_the_joined_batch(faces, tmp_path):
    (tmp_path / "two.py").write_text(TWO.format([str(HERE), str(HERE / "data")]))
    torch.save([seeded(4, 3, 32, 32), seeded(4, 3, 32, 32, seed=1)], tmp_path / "in.pt")
    for processes in (0, 2):
        assert re.search(f"{processes or 1} × CPU.* 12 images a step", run_program(
            "--data", faces, *TINY, cwd=tmp_path, processes=processes, program=tmp_path / "two.py"))
    one, *two = (torch.load(tmp_path / f"out{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert all(values[1].abs().sum() > 0 for values in one.values())
    torch.testing.assert_close(one, two[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*two, rtol=0, atol=0)


@pytest.fixture
def probed(trained, monkeypatch, capsys):
    """Runs data/probe.py on a run: its last line, and the file that the line names."""
    def run(*args, name="faces", code=0):
        assert in_process(name, "--workers", "0", *args, cwd=trained, monkeypatch=monkeypatch,
                          main=P.main) == code
        told = capsys.readouterr()[code > 0].strip().splitlines()[-1]
        return told if code else (told, json.loads(Path(told.split(":")[0] + ".json").read_text()))
    return run


def test_the_converged_head_is_the_minimum_whatever_the_scale_of_features():
    y = torch.arange(200) % 3
    x = (seeded(200, 40) + 2 * F.one_hot(y, 40)) * torch.logspace(-2, 2, 40) + 50
    x[:, 4], x[:, 5] = x[:, 0] + 0.01 * x[:, 4], 7.0  # almost collinear; constant
    weight, bias = P.converged_head(x, y, 3)
    std, mean = torch.std_mean(x.double(), dim=0)
    W, b = (weight * std).requires_grad_(), (bias + weight @ mean).requires_grad_()
    logits = (x.double() - mean) / std.where(std > 0, 1.0) @ W.T + b
    loss = F.cross_entropy(logits, y) + 1e-3 / 2 * W.square().sum()
    assert max(g.abs().max() for g in torch.autograd.grad(loss, (W, b))) < 2e-5 and loss < 0.7


def test_the_probe_writes_a_result_in_the_form_of_eval_for_each_start(trained, probed, monkeypatch):
    folder, heads = trained / "runs/faces", []
    for name, args in {"": [], "-faces-backbone": ["--init", folder / "backbone.pt"],
                       "-random": ["--init", "random"], "-pixels": ["--init", "pixels"],
                       "-random-1": ["--init", "random", "--seed", "1"]}.items():
        told, result = probed(*args)
        assert told.startswith(f"runs/faces/probe-faces{name}: {result['accuracy']:.2f} % of 15 ")
        if name != "-pixels":
            heads.append(torch.load(folder / f"probe-faces{name}.pt")["model"]["fc.weight"])
    assert [torch.equal(a, b) for a, b in zip(heads, heads[1:])] == [True, False, False]
    in_process("--name", "faces", "--eval", "--steps", "1", "--workers", "0", cwd=trained,
               monkeypatch=monkeypatch)
    linear, (_, result) = json.loads((folder / "linear-faces.json").read_text()), probed()
    assert result.keys() == linear.keys() and result["settings"]["run"] == linear["settings"]["run"]
    saved, linear = (torch.load(folder / f"{name}-faces.pt") for name in ("probe", "linear"))
    assert saved.keys() == linear.keys() and saved["model"].keys() == linear["model"].keys()
    # The head is that of whole pictures' features, from the run's net in eval mode.
    net, data = S.make_resnet("small").eval(), Path(result["settings"]["data"])
    S.load_backbone(net, folder / "backbone.pt", "small")
    _, paths, labels = S.labelled(data / "train")
    x = S.normalise(torch.stack([S.resize(S.read_picture(path), 32) for path in paths]), COLOURS)
    weight = P.converged_head(net(x).detach(), torch.tensor(labels), 3)[0].float()
    torch.testing.assert_close(heads[0], weight, rtol=1e-2, atol=1e-2)


def test_a_result_is_not_replaced_by_that_of_other_pictures(probed, tmp_path):
    draw_colours(tmp_path / "faces", {"0_a": 4, "1_b": 4})
    for more in ([], ["--refinement"]):
        probed(*more)
        assert "pictures: give a --tag" in probed("--data", tmp_path / "faces", *more, code=2)
        assert "-2: " in probed("--data", tmp_path / "faces", "--tag", "2", *more)[0]


def test_the_measure_of_refinement_sees_a_masking_that_keeps_what_is_hard(monkeypatch):
    model, hard = small_model().eval(), (torch.arange(49) < 12).float()
    model.ffl.mae.forward = lambda I, keep: (  # kept patches must not count
        (hard + 0.1 * torch.rand(len(I), 49)).scatter(1, keep, 1e3), None)
    for sign in (1, -1):
        monkeypatch.setattr(S, "patch_scores", lambda C, *more: sign * hard.expand(len(C), -1))
        got = P.measure_refinement(model, model, seeded(20, 3, 28, 28))
        assert got["positions"] * sign > 0.3 and got["within_image"] * sign > 0.3
        assert [v > 0.5 for v in got["error_map"]] == hard.bool().tolist()
        assert sum(got["keep_map"]) == pytest.approx(12)
        assert sum(got["keep_map"][:12]) == pytest.approx(12 if sign > 0 else 0)


def test_the_probe_measures_the_refinement_of_one_or_two_runs(faces, trained, probed, monkeypatch):
    for more in (["other"], ["alone", "--model", "byol"]):
        in_process("--data", faces, *TINY, "--steps", "1", "--seed", "5", "--name", *more,
                   cwd=trained, monkeypatch=monkeypatch, main=B.main)
    own, crossed = probed("--refinement")[1], probed("--refinement", "other")[1]
    other = probed("--refinement", name="other")[1]
    assert crossed["error_map"] == own["error_map"] != other["error_map"]
    assert crossed["keep_map"] == other["keep_map"] != own["keep_map"]
    assert "probe-faces-random:" in probed("--init", "random", name="other")[0]  # its own seed
    saved = torch.load(trained / "runs/faces/checkpoint.pt")["model"]["ffl.mae.mask_token"]
    assert torch.equal(P.model_of("faces", CPU.device).ffl.mae.mask_token, saved)
    assert "byol, which has no masking" in probed("--refinement", "alone", code=2)


def test_the_benchmark_tells_rates_and_leaves_nothing_behind(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "seconds_of", lambda f, n: (f(), 2.0)[1])
    monkeypatch.setattr(time, "perf_counter", iter(range(99)).__next__)  # a second a look
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert in_process("--data", faces, *TINY, cwd=tmp_path, monkeypatch=monkeypatch,
                      main=benchmark.main) == 0
    out = capsys.readouterr().out
    assert "step     6.0 images/s, 2,000.0 ms" in out
    assert "loader   16.0 images/s in one process, workers: 2" in out  # 4 rounds of 2 · 12 in 6 s
    macs = float(re.search(r"([\d.]+) G multiply-adds an image", out)[1])
    with FlopCounterMode(display=False) as counter:
        S.build_simfle(S.read_settings(["--data", "x", *TINY]))(*small_inputs())
    forward = counter.get_total_flops() / 2 / 4 / 1e9  # the target's has no backward pass
    assert 2 * forward < macs < 3 * forward and not list(tmp_path.iterdir())


# ===== Figures, the demo, the README =====


@pytest.fixture(scope="module")
def evaluated(faces, tmp_path_factory):
    """A folder with a run `faces` and its linear result."""
    cwd = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        for args in ([*TINY, "--steps", "2"], ["--eval", "--epochs", "1", "--workers", "0"]):
            assert in_process("--data", faces, *args, cwd=cwd, monkeypatch=patch) == 0
    return cwd


def test_every_figure_of_a_run_is_drawn(evaluated, faces, monkeypatch):
    drawn = functools.partial(in_process, cwd=evaluated, monkeypatch=monkeypatch, main=figures.main)
    folder = evaluated / "runs/faces/figures"
    for args, names in (([], "attention confusion-linear-faces curves masks reconstructions "
                             "refinement"), (["--init", "random"], "masks reconstructions"),
                        (["--data", faces / "val/0_a"], "attention masks reconstructions")):
        assert drawn("faces", *args) == 0
        where = folder / Path(args[-1]).name if args else folder
        assert sorted(p.stem for p in where.glob("*.png")) == names.split()
    sheets = [Image.open(p).crop((0, 0, 999, 400)) for p in folder.glob("**/reconstructions.png")]
    assert len({sheet.tobytes() for sheet in sheets}) == 3  # trained, untrained, other pictures


def test_a_run_without_facemae_has_no_masks(evaluated, faces, monkeypatch, capsys):
    args = "--data", faces, *TINY, "--steps", "1", "--model", "byol", "--name", "alone"
    assert in_process(*args, cwd=evaluated, monkeypatch=monkeypatch, main=B.main) == 0
    assert figures.main(["alone"]) == 0
    assert [p.stem for p in Path("runs/alone/figures").glob("*.png")] == ["curves"]
    for args in (["nosuch"], ["alone", "--compare", "nosuch"], ["alone", "--init", "nosuch"]):
        assert "nosuch" in complaint(*args, cwd=evaluated, monkeypatch=monkeypatch, capsys=capsys,
                                     main=figures.main)


def test_a_cell_of_the_confusion_matrix_holds_its_number(monkeypatch):
    texts = []
    monkeypatch.setattr(figures, "write", lambda on, x, y, text, *more, **how: texts.append(text))
    figures.figure_confusion(dict(confusion=[[3.0, 1.0], [0.0, 2.0]], classes=["0_calm", "1_glad"],
                                  accuracy=83.3, mean_accuracy=87.5), "linear-faces")
    assert [t for t in texts if re.fullmatch(r"[\d.]+", t)] == ["75.0", "25.0", "0.0", "100.0"]
    assert texts.count("calm") == texts.count("glad") == 2


@pytest.mark.parametrize("row, column", [(0, 0), (1, 0), (0, 1)])
def test_grad_cam_lights_what_the_answer_depends_on(row, column, monkeypatch, tmp_path):
    """A net whose map is the picture; its class 0 is what is red."""
    paths = [str(tmp_path / "face.png")]
    x = torch.full((3, 32, 32), 0.4)
    x[0, 16 * row:, 16 * column:][:16, :16] = 1
    x[1:] = 0.9  # what does not speak for the answer
    TF.to_pil_image(x).save(paths[0])
    state = {"fc.weight": torch.tensor([[1.0, 0, 0], [-1, 0, 0]]),
             "fc.bias": torch.tensor([9.0, 0])}
    monkeypatch.setattr(S, "make_resnet", lambda arch: nn.Sequential(S.OrderedDict(
        map=nn.AvgPool2d(8), avgpool=nn.Identity(), fc=nn.Linear(3, 2))))
    torch.save(dict(model=state, classes=["0_red", "1_not"], arch="", size=32, colours=COLOURS),
               tmp_path / "c.pt")
    _, predicted, cam = figures.grad_cam(tmp_path / "c.pt", paths)
    assert predicted == ["red"] and cam.shape == (1, 112, 112)
    quadrants = F.avg_pool2d(cam[:, None], 56)[0, 0]
    assert quadrants.argmax().item() == 2 * row + column
    assert quadrants.max() > 2 * quadrants.median()


def test_fig4_greys_the_masked_patches_and_leaves_the_visible_ones():
    x, model = seeded(2, 3, 28, 28).sigmoid(), small_model().eval()
    grey, whole, a = figures.reconstruct(model, x, [0, 5], COLOURS)
    seen = torch.zeros(2, 49).scatter(1, a.argsort(descending=True)[:, :12], 1).view(2, 1, 7, 7)
    seen = seen.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3) > 0
    assert torch.equal(grey, torch.where(seen, x, 0.5))
    close = (whole - x).abs() < 1e-5
    assert close[seen.expand_as(x)].all() and close[~seen.expand_as(x)].float().mean() < 0.1
    before = figures.figures_masks(model, x, COLOURS)["masks"]
    model.ffl.scores = lambda C: torch.arange(49.0).expand(len(C), -1)  # a rule of one's own
    assert figures.figures_masks(model, x, COLOURS)["masks"] != before


def test_fig3_adds_up_lines_and_the_last_line_of_a_step_counts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("runs/r").mkdir(parents=True)
    lines = [dict(step=s, masked_error=[e, 1.0, 0, 0], masked=[m, 1.0, 2.0, 2.0])
             for s, e, m in ((1, 99.0, 99.0), (1, 2.0, 1.0), (2, 6.0, 3.0))]
    Path("runs/r/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Path("runs/r/settings.json").write_text(json.dumps({"mask_ratio": 0.75, "name": "r"}))
    shown = []
    monkeypatch.setattr(figures, "heat", lambda v, *more: shown.append(v) or Image.new("L", (9, 9)))
    figures.figure_refinement({"r": figures.read_log("r")})
    assert shown[0].tolist() == [2, 1, 0, 0]  # (2 + 6) / (1 + 3), ...
    assert torch.allclose(shown[1], 1 - 3 * torch.tensor([4, 2, 4, 4]) / 14)


def test_fig5_shows_the_runs_that_differ_in_alpha_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, alpha, kappa, epochs, accuracy in (
            ("a", 0.3, 1, 9, 40), ("b", 0.2, 1, 9, 30), ("c", 0.2, 1, 9, 50), ("d", 0.5, 2, 9, 60),
            ("d2", 0.6, 2, 9, 60), ("e", 0.4, 1, 8, 60)):  # other runs, another evaluation
        run = dict(alpha=alpha, beta=1, kappa=kappa, name=name, seed=0)
        settings = dict(run=run, init="random" * (kappa == 2), epochs=epochs, start_weights=name)
        text(Path(f"runs/{name}/x.json"), json.dumps(dict(accuracy=accuracy, settings=settings)))
    assert not figures.figure_sweep(Path("runs/d/x.json"))  # an untrained net has no α
    plots = []
    monkeypatch.setattr(figures, "plot", lambda *a: plots.append(a) or Image.new("RGB", (9, 9)))
    figures.figure_sweep(Path("runs/a/x.json"))
    (_, curves, _, below), = plots
    assert curves == {"": [(0, 40.0), (1, 40.0)]} and below == {0: "0.2", 1: "0.3"}


def test_a_curve_rises_and_a_wrong_answer_is_orange(monkeypatch):
    for points in ([(3, 4)], [(0, 0), (1, 10)]):  # a single one is a dot
        pixels = TF.pil_to_tensor(figures.plot("", {"": points}))
        y, x = (pixels == torch.tensor([31, 95, 168])[:, None, None]).all(dim=0).nonzero().T
        left, right = y[x == x.min()].min(), y[x == x.max()].max()
    assert right < 50 < 160 < left
    cells, seen = [], {"c": (torch.zeros(3, 3, 4, 4), ["calm", "glad", "calm"], torch.zeros(3, 9))}
    monkeypatch.setattr(figures, "cell", lambda *a, text="", colour="": (
        cells.append(a[2:]), Image.new("RGB", (9, 9)))[1])
    figures.figure_attention(seen, ["calm", "calm", ""])
    assert cells[3:] == [("calm", "#1f5fa8"), ("calm", "#1f5fa8"), ("glad", "#d55e00")]


def test_the_curves_are_the_terms_as_they_enter_the_sum(monkeypatch):
    plots = {}
    monkeypatch.setattr(figures, "plot", lambda title, curves, *a, **k: (
        plots.update({title: curves}), Image.new("RGB", (9, 9)))[1])
    log = [dict(step=s, L_s=s, L_r=1, L_d=0.01 * s, L_g=10, lr=1, spread=1, gradient=1)
           for s in (1, 2)]
    figures.figure_curves(log, 0.3, 0.03)
    first, second, *_ = plots.values()
    assert first["0.03 L_g"] == [(1, 0.3), (2, 0.3)] and first["L_s"] == [(1, 1), (2, 2)]
    assert list(second) == ["0.3 L_d"] and second["0.3 L_d"] == first["0.3 L_d"]
    assert not any("cosine" in title for title in plots)  # which a run without FaceMAE lacks


def test_the_demo_tells_pixels_untrained_and_trained(monkeypatch, tmp_path, capsys):
    small = dict(epochs=1, batch_size=12, view_size=32, ffl_size=28, patch=4, hidden=32, outputs=16)
    monkeypatch.setitem(S.PRESETS, "laptop", S.PRESETS["laptop"] | small)
    monkeypatch.setattr(demo, "HERE", tmp_path)
    draw_colours(tmp_path / "toy", {"0_a": 14, "1_b": 12})
    text(tmp_path / "toy.py")  # draws nothing
    assert in_process(cwd=tmp_path, monkeypatch=monkeypatch, main=demo.main) == 0
    told = capsys.readouterr().out
    assert re.search(r"(?s)of 2 expr.* 50.0 %  by chance.*%  from raw.*%  from .*before training.*%"
                     r"  from .*after it.*--data muxspace", told), told
    made = [tmp_path / "runs/toy" / name for name in (
        "probe-toy-pixels.json", "probe-toy-random.json", "probe-toy.json", "figures/masks.png")]
    backbone = tmp_path / "runs/toy/backbone.pt"  # touched: trained on since
    for change, again in ((made[1].unlink, [0, 1, 0, 0]), (backbone.touch, [1, 1, 1, 1])):
        before = [path.stat().st_mtime_ns for path in made]
        change()
        assert demo.main([]) == 0 and told.split("\n\n")[-1] in capsys.readouterr().out
        assert [path.stat().st_mtime_ns != time for path, time in zip(made, before)] == again
    text(tmp_path / "toy.py", "raise SystemExit(2)")
    assert demo.main([]) == 2


README = (HERE / "README.md").read_text()


def test_departures_are_numbered_in_the_order_of_reading_and_all_in_the_readme():
    sources = [(HERE / name).read_text() for name in ("simfle.py", "data/baselines.py")]
    found = [int(n) for source in sources for n in re.findall(r"[Dd]eparture (\d+)[.:,]", source)]
    assert [*dict.fromkeys(found)] == [int(n) for n in re.findall(r"(?m)^\| (\d+) \|", README)]


def test_the_readme_names_what_there_is():
    table = README[README.index("## From the paper"):README.index("## Where this parts")]
    for name in re.findall(r"`(\w+)`", table):
        assert hasattr(S, name), name
    options = S.read_settings(["--data", "x"])
    for texts in re.findall(r"simfle\.py([^\n`]*)|`(--[^`]*)`", README):
        for word in re.findall(r"--([a-z][a-z0-9-]+)", " ".join(texts)):
            assert hasattr(options, word.replace("no-", "").replace("-", "_")), word
    for name in re.findall(r"\((data/[\w./]+)\)", README):
        assert (HERE / name).exists(), name


def test_the_readmes_classifier_answers(evaluated, faces, monkeypatch, capsys):
    monkeypatch.chdir(evaluated)
    code = re.search(r"```python\n(import torch, simfle.*?)```", README, re.DOTALL)[1]
    code = code.replace("affectnet", "faces").replace("face.jpg", str(faces / "val/1_b/1_b0.png"))
    exec(code, {})
    assert capsys.readouterr().out.strip() in ("0_a", "1_b", "2_c")


def test_the_readmes_example_trains_ones_own_model_and_backbone(faces, monkeypatch, tmp_path):
    code, made = re.search(r"```python\n(import simfle\n.*?)```", README, re.DOTALL)[1], []
    monkeypatch.setattr(S, "make_resnet", S.make_resnet)  # put back after the test
    monkeypatch.setattr(S, "MODELS", dict(S.MODELS))
    monkeypatch.setattr(S, "leave", made.append)
    monkeypatch.chdir(tmp_path)

    def my_scores(C):
        made.append("scores")
        return C.mean(dim=(1, 2, 3))[:, None] * torch.rand(len(C), 49)
    own = dict(__name__="__main__", my_scores=my_scores, make_mine=lambda arch: (
        made.append("resnet"), torchvision.models.resnet18())[1], tiny=TINY, faces=str(faces))
    exec(code.replace('"--data", "affectnet",', '*tiny, "--steps", "1", "--data", faces,'), own)
    assert made == ["resnet", "scores", 0] and Path("runs/faces/backbone.pt").exists()


# ===== data/prepare.py: each format small and made up, laid out as the owners do =====


def put(path, size=(20, 24), colour=(200, 100, 50), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, colour)
    picture.paste((255, 255, 255), (0, 0, size[0] // 4, size[1] // 4))
    picture.convert(mode).save(path)
    return path


@pytest.fixture
def prepared(tmp_path, monkeypatch, capsys):
    """Runs prepare.py on tmp_path/src: what it says, and the files of tmp_path/OUT by path."""
    def run(name, *args, out="out", expect=0):
        args = name, "--src", "src", "--out", out, *args
        how = dict(cwd=tmp_path, monkeypatch=monkeypatch, main=prepare.main)
        if expect:
            return complaint(*args, capsys=capsys, **how)
        assert in_process(*args, **how) == 0
        return " ".join(capsys.readouterr().out.split()), contents(tmp_path / out)
    return run


HEADER = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression"
ROWS = {"training": "1/a.jpg 10,5,30,20 0|1/b.JPG -5,-5,30,30 1|2/a.jpg 0,0,90,60 1|"
        "2/grey.png 0,0,45,30 2|2/palette.bmp 5,5,99,99 3|2/cmyk.tif 1,1,20,20 4|"
        "1/b.JPG 0,0,60,40 7|1/none.jpg 0,0,9,9 6|gone.jpg NULL,NULL,NULL,NULL 1|1/a.jpg 0,0,0,5 1|"
        "1/a.jpg 99,9,5,5 1|2/broken.jpg 0,0,5,5 1|2/cut.jpg 0,0,60,40 1|1/a.jpg 10,5,30,20 0|"
        "1/a.jpg 2,3,30,20 0|1/a.jpg 1,1,5,5 8|1/a.jpg 9,9,5,5 ?",
        "validation": "1/a.jpg 0,0,60,40 5|1/b.JPG 2,2,6,6 7"}


def affectnet_csv(src, *header, encoding="utf-8"):
    images = src / "x/Manually_Annotated/Manually_Annotated_Images"
    for name, height, mode in map(str.split, (
            "1/a.jpg 40 RGB", "1/b.JPG 40 RGB", "2/a.jpg 60 RGB", "2/grey.png 30 L",
            "2/cmyk.tif 30 CMYK", "2/palette.bmp 30 P", "../../../__MACOSX/1/a.jpg 6 RGB")):
        put(images / name, (int(height) * 3 // 2, int(height)), mode=mode)
    text(images / "2/broken.jpg", "no picture at all")
    (images / "2/cut.jpg").write_bytes((images / "1/a.jpg").read_bytes()[:-20])
    for name, rows in ROWS.items():
        lines = [f"{path},{box},{';'.join(['1.5;2'] * 68)},{label},0.1,-0.2"
                 for path, box, label in map(str.split, rows.split("|"))]
        for folder in ("x", "x/file_lists"):  # a copy is no second list
            text(src / folder / f"{name}.csv", *header, *lines, encoding=encoding)
    return images


@pytest.mark.parametrize("header, encoding, links", [
    ([HEADER], "utf-8", True), ([" #" + HEADER + " "], "utf-8", False), ([], "utf-16", True),
    (["", HEADER], "utf-16", True), ([HEADER.replace(",", " , ")], "utf-8-sig", True)])
def test_affectnet_lists_are_cropped(header, encoding, links, tmp_path, prepared, monkeypatch):
    images = affectnet_csv(tmp_path / "src", *header, encoding=encoding)
    for name in () if links else ("link", "symlink"):
        monkeypatch.setattr(os, name, mock.Mock(side_effect=OSError))
    said, found = prepared("affectnet", "--size", 40)
    assert {k[:-4]: Image.open(io.BytesIO(content)).size for k, content in found.items()} == {
        "train/0_neutral/a": (30, 20), "train/0_neutral/a-2": (30, 20),  # cropped: two faces in one
        "train/1_happiness/b": (25, 25), "train/1_happiness/a": (60, 40),  # clamped; shrunk
        "train/2_sadness/grey": (45, 30), "train/3_surprise/palette": (40, 25),
        "train/4_fear/cmyk": (20, 20), "train/7_contempt/b": (60, 40), "val/5_disgust/a": (60, 40),
        "val/7_contempt/b": (6, 6)}
    assert found["val/5_disgust/a.jpg"] == (images / "1/a.jpg").read_bytes()
    assert os.path.samefile(tmp_path / "out/val/5_disgust/a.jpg", images / "1/a.jpg") == links
    # [y:y+h, x:x+w]: the crop begins 10 to the right and 5 down, so the bright corner ends at 5, 5.
    assert Image.open(tmp_path / "out/train/4_fear/cmyk.tif").mode == "RGB"
    crop = TF.pil_to_tensor(Image.open(tmp_path / "out/train/0_neutral/a.jpg")).float()
    assert crop[:, :4, :4].min() > 230 and crop[:, 8:, 8:].mean() < 150
    for words in ("0_neutral 2 74,874 -74,872 1 skipped: repeated", "1_happiness 2 134,415 -134,413"
                  " 1 skipped: box is no integer; 1 skipped: box outside the picture; 1 skipped: "
                  "box without size; 2 skipped: cannot be decoded", "6_anger 0 24,882 -24,882 1 "
                  "skipped: file missing", "total 8 287,651 -287,643 2 skipped", "13 of 13, "):
        assert words in said
    assert contents(tmp_path / "out7") == {k: v for k, v in found.items() if "contempt" not in k}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out7", "src"]


@pytest.mark.parametrize("ending, train, val", [
    ("_exp.npy", "AffectNet/train_set", "AffectNet/val_set/val_set"),
    (".json", "human_annotated/train_set", "human_annotated/validation_set")])
def test_affectnets_label_files_are_walked_not_two_lists(ending, train, val, tmp_path, prepared):
    import numpy  # torchvision brings it
    src = tmp_path / "src"
    for split, i in itertools.product((train, val, "no_human_annotated/train_set"), range(10)):
        value = str(i) if i % 2 else i
        label = put(src / split / f"images/{i}.jpg").parents[1] / f"annotations/{i}{ending}"
        text(label, json.dumps({"human-label": value}))
        if ending == "_exp.npy":
            numpy.save(label, value)
            numpy.save(label.with_name(f"{i}_val.npy"), 0.5)
    (src / train / "images/1.jpg").unlink()  # zipped together, all that follow would be shifted
    (src / train / f"annotations/2{ending}").write_bytes(b"\x93NUMPY")
    said, found = prepared("affectnet")
    assert found.keys() == {f"{split}/{c}/{i}.jpg" for i, c in enumerate(prepare.CLASSES)
                            for split in ("train", "val") if split == "val" or i not in (1, 2)}
    assert all(os.path.samefile(tmp_path / "out" / name, src / (  # linked, not written again
        train if name[0] == "t" else val) / "images" / name[-5:]) for name in found)
    text(src / "training.csv")
    assert "1 skipped: file missing" in said and "3 skipped: none of the labels" in said
    assert "has .csv and ." in prepared("affectnet", out="other", expect=2)


@pytest.mark.parametrize("name, encoding", [
    ("list_patition_label.txt", "utf-16"), ("list_partition_label.txt", "utf-8"), ("", "utf-8")])
def test_rafdb_maps_its_labels_and_kaggles_copy_is_read_too(name, encoding, tmp_path, prepared):
    src, lines = tmp_path / "src", [*(f"train_{i:05}.jpg {i}" for i in range(1, 8)),
                                    "test_0001.jpg 4", "train_00009.jpg 1", "train_00001.jpg 1"]
    for line in lines[:8]:
        put(src / "basic/aligned" / line.replace(".", "_aligned.")[:-2])
    text(src / "basic/EmoLabel" / (name or "x"), *lines, "", "nonsense", encoding=encoding)
    for split in () if name else ("train", "test"):  # Kaggle's
        text(src / f"{split}_labels.csv", "image,label", *(
            line.replace(".jpg ", "_aligned.jpg,") for line in lines if split in line))
    text(src / "Compound/EmoLabel/list_patition_label.txt", "train_0001.jpg 11")
    for place in ("Compound/aligned", "made here/val/1_happiness"):  # not to be looked into
        put(src / place / "test_0001_aligned.jpg", (44, 44))
    said, found = prepared("rafdb")
    assert {name[:-12] for name in found} == {"val/1_happiness/test_0001"} | {
        f"train/{prepare.CLASSES[k]}/train_0000{i}" for i, k in enumerate((3, 4, 5, 1, 2, 6, 0), 1)}
    assert "3_surprise 1 1,290 -1,289 1 skipped: file missing; 1 skipped: repeated" in said
    assert Image.open(io.BytesIO(found["val/1_happiness/test_0001_aligned.jpg"])).size == (20, 24)


@pytest.mark.parametrize("kind", ["icml_face_data.csv", "drawn", "fer2013.csv"])
def test_ferplus_takes_the_majority_and_finds_names_by_row(kind, tmp_path, prepared):
    src, expected, rows, order = tmp_path / "src", {}, [], (0, 1, 3, 2, 6, 5, 4, 7)
    for i in range(120):
        folder, split, usage = (("Train", "train", "Training"), ("Valid", "valid", "PublicTest"),
                                ("Test", "val", "PrivateTest"))[i // 50]
        likely = (3 * seeded(10, seed=i)).softmax(dim=0).cumsum(dim=0)
        votes = [int((likely < k / 10).sum()) for k in range(10)]  # of ten people
        heard = [v for v in votes if votes.count(v) > 1]  # a class with a single vote gets none
        winners = [order[k] for k in range(8) if 2 * heard.count(k) > len(heard)]
        # A number is not the row. One row has no name, two repeat one that is nearer to its number.
        false = {2: "fer0000047.png", 5: "", 30: "fer0000001.png"}
        name = false.get(i, f"fer{i + i // 10:07}.png")
        if i not in false:
            picture = put(src / f"FER2013{folder}/{name}", (48, 48), (2 * i,) * 3, "L")
            with open(picture.with_name("label.csv"), "a") as file:
                print(name, '"(0, 0, 48, 48)"', *map(votes.count, range(10)), sep=",", file=file)
            expected |= {f"{split}/{prepare.CLASSES[k]}/{name}": 2 * i for k in winners}
        rows.append((usage, name, " ".join([str(2 * i)] * 2304)))
    text(src / "fer2013new.csv", "Usage,Image name,neutral", *(f"{u},{n},0" for u, n, _ in rows))
    lines = ["emotion, Usage, pixels", *(f"0,{usage},{grey}" for usage, _, grey in rows)]
    lines = lines if kind[0] != "f" else [f"0,{grey},{usage}" for usage, _, grey in rows]
    text(src / kind, *lines)
    said, found = prepared("ferplus")
    own = json.loads(found.pop("colours.json"))
    assert {name: Image.open(io.BytesIO(content)).convert("L").getpixel((40, 40))
            for name, content in found.items()} == expected
    assert len({name.split("/")[1] for name in found}) == 8 and "skipped: none of the" in said
    if kind != "drawn":
        x = torch.tensor([v / 255 for name, v in expected.items() if name[0] == "t"])
        std, mean = torch.std_mean(x.double(), correction=0)
        assert own == {"mean": [round(mean.item(), 4)] * 3, "std": [round(std.item(), 4)] * 3}
        for change in (lines[:-1], lines + lines[-1:], lines[:40] + lines[:39:-1]):
            text(src / kind, *change)  # sources that do not belong together
            assert "with the same rows" in prepared("ferplus", out="other", expect=2)


def test_sfew_is_found_in_its_folders_without_the_test_set(tmp_path, prepared):
    emotions = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Angry", "Bored")
    for emotion, folder in itertools.product(emotions, (
            "Train_Aligned_Faces", "Val/Val_Aligned_Faces_new/Val_Aligned_Faces",
            "Val/Val_Aligned_Faces", "Test/Test_Aligned_Faces")):
        put(put(tmp_path / "src" / folder / emotion / f"{emotion}.png").with_name(".hidden.png"))
    said, found = prepared("sfew")  # Val has a copy, which is no second picture
    assert found.keys() == {f"{split}/{c}/{emotion}.png" for split in ("train", "val")
                            for c, emotion in zip(prepare.CLASSES[:7], emotions)}
    assert "6_anger 1 77 -76 1 skipped: repeated" in said and "1 skipped: none of the" in said


def test_muxspace_is_split_by_person_with_all_classes_in_both(tmp_path, prepared):
    rows, images = [], tmp_path / "src/repository/images"
    for emotion, count in (("neutral", 24), ("HAPPINESS", 20), ("Surprise", 8), ("sadness", 8),
                           ("anger", 9), ("disgust", 8), ("fear", 3), ("contempt", 2)):
        for i in range(count):  # two pictures of each person, and single ones
            name = f"A_{emotion}{i // 2}_{i % 2 + 1:04}.jpg" if i % 8 < 6 else f"{emotion}_{i}k.jpg"
            rows.append(f"1,{put(images / name).name},{emotion}")
    put(images / "A_neutral0_0003.jpg")  # no row
    text(images.parent / "legend.csv", "user.id,image,emotion", *rows, "1,gone_0001.jpg,anger")
    said, found = prepared("muxspace")
    counts = Counter(os.path.dirname(name) for name in found)
    assert [[counts[f"{split}/{c}"] for c in prepare.CLASSES] for split in ("train", "val")] == [
        [12, 10, 4, 4, 0, 4, 5, 0], [12, 10, 4, 4, 0, 4, 4, 0]]  # one angry one has no file
    people = [{os.path.basename(name)[:-9] for name in found if name.startswith(f"{split}/")
               and "/A_" in name} for split in ("train", "val")]
    assert people[0] and people[1] and not people[0] & people[1]
    assert "1 skipped: file without a row" in said and "1 skipped: file missing" in said
    for path in sorted(images.glob("A_*"))[::3]:  # the split does not depend on what is there
        path.unlink()
    assert prepared("muxspace", out="less")[1].keys() < found.keys()


@pytest.mark.parametrize("name, wanted, line, words", [
    ("affectnet", "training.csv", "left_eye_x,Image", "has no column expression, face_height"),
    ("rafdb", "list_patition_label.txt", "train_0002.jpg 11", "RAF-DB's compound set"),
    ("rafdb", "list_patition_label.txt", "train_0002.jpg 1", "1 skipped: file missing); unpack"),
    ("ferplus", "label.csv", "", "fer2013new.csv"), ("sfew", "Val_Aligned_Faces", "", "Angry"),
    ("muxspace", "legend.csv", "", "has no column emotion, image")])
def test_a_wrong_or_packed_folder_gets_a_sentence(name, wanted, line, words, tmp_path, prepared):
    assert wanted in prepared(name, expect=2)  # there is no such folder
    put(tmp_path / "src/Train_Aligned_Faces/Angry/half of it.jpg")
    text(tmp_path / "src/aligned.zip")
    assert re.search(rf"{wanted}.*unpack aligned.zip", prepared(name, expect=2))
    text(tmp_path / "src" / wanted, line)
    assert words in prepared(name, expect=2) and not [*tmp_path.glob("out*")]


KILLED = """
import os, pathlib, signal, sys
sys.modules["torch"] = None  # nothing here may need it
import prepare
kind, last, calls = sys.argv[1], int(sys.argv[2]), []
real = getattr(pathlib.Path, kind)
setattr(pathlib.Path, kind, lambda *args: calls.append(1) or real(*args) if len(calls) < last
        else os.kill(os.getpid(), signal.SIGKILL))
prepare.main(["affectnet", "--src=src", "--out=out", "--workers=1", "--size=" + sys.argv[3]])"""


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tmp_path, prepared, monkeypatch):
    affectnet_csv(tmp_path / "src")
    for owner, function in ((Path, "write_bytes"), (Image, "open")):  # no reasons to skip a picture
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, mock.Mock(side_effect=OSError(5, "Broken disk")))
            assert "Broken disk" in prepared("affectnet", out="no", expect=2)
    whole = prepared("affectnet", "--size", 16, out="whole")[1]
    # In pictures, one run with another size, in the links, before and between the last renames.
    for when in ("replace 3 16", "replace 4 12", "symlink_to 2 16", "rename 0 16", "rename 1 16"):
        done = subprocess.run([sys.executable, "-c", KILLED, *when.split()], cwd=tmp_path,
                              env=dict(os.environ, PYTHONPATH=str(HERE / "data")))
        assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    put(tmp_path / "out.part-16/train/0_neutral/of_another_download.jpg")
    said, found = prepared("affectnet", "--size", 16)
    assert found == whole and "10 of 13 pictures are there already" in said
    assert "out is there already" in prepared("affectnet", "--size", 16, expect=2)
    (tmp_path / "out").rename(tmp_path / "other")  # another's AffectNet-7 is left alone
    assert "out7 is there already" in prepared("affectnet", "--size", 16, expect=2)
    text(tmp_path / "src/training.csv")
    assert "training.csv differ" in prepared("affectnet", out="no", expect=2)


def test_memory_for_300000_pictures_stays_under_400_megabytes(tmp_path, prepared):
    names, peaks = [f"{i // 400}/{f'{i:08}' * 7}.jpg" for i in range(2400)], []
    rows = [f"{put(tmp_path / 'src' / name).parent.name}/{name[-60:]},-300,-400,9000,{i + 999},"
            f"{'101.5;202.5;' * 68},{i % 8},0.1,0.2" for i, name in enumerate(names)]
    text(tmp_path / "src/validation.csv", *rows[:9])
    for count in (1200, 2400):
        text(tmp_path / "src/training.csv", *rows[9:count])
        tracemalloc.start()
        assert len(prepared("affectnet", "--workers", 1, out=f"{count}")[1]) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 30e6 + peaks[0] + (peaks[1] - peaks[0]) * 250 < 400e6  # Python and Pillow have 30 MB


def test_toy_draws_what_is_missing_by_its_seed_and_leaves_what_others_drew(tmp_path):
    def draw(folder, seed, **how):
        args = "--out", folder, "--train", 16, "--val", 8, "--size", 32, "--seed", seed
        return (run_program(*args, cwd=tmp_path, program="data/toy.py", **how),
                contents(tmp_path / folder))

    one, other = draw("one", 0)[1], draw("other", 1)[1]
    assert one.keys() == other.keys() and len({*one.values(), *other.values()}) == 2 * (24 + 1)
    (tmp_path / "one/val/7_contempt/00007.png").unlink()  # stopped, or removed
    shutil.rmtree(tmp_path / "one/train")
    said, again = draw("one", 0)
    assert again == one and "17 of 17" in said and draw("one", 0) == ("", one)  # recognised
    other.pop("drawn.txt"), (tmp_path / "other/drawn.txt").unlink()
    for folder, files in (("one", one), ("other", other)):
        assert f"{folder} holds other pictures" in draw(folder, 1, expect=2)[0]
        assert contents(tmp_path / folder) == files
