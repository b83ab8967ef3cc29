"""Tests of simfle.py. Each is a sentence about the method or the program, with the equation.

    python -m pytest test_simfle.py

Formulas are checked against slow, obvious versions of themselves; the program is run as users run
it, with tiny nets. What takes longer is marked `slow` and runs with `-m slow`.
"""

import ast
import contextlib
import copy
import errno
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

import simfle as S

B, D, P = S.helper("benchmark"), S.helper("draw"), S.helper("probe")

HERE = Path(__file__).resolve().parent
TINY = ["--preset", "laptop", "--batch-size", "12", "--view-size", "32", "--ffl-size", "28",
        "--patch", "4", "--hidden", "32", "--outputs", "16", "--workers", "1", "--log-every", "1"]
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
    return S.read_settings(S.read_orders([str(a) for a in argv]))


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


def test_u_picks_the_group_and_groups_are_drawn_where_it_is_missing():
    masking, C = S.SemanticMasking(4, 28, 4), seeded(4, 8, 4, 4)
    a, _, _ = masking(C, torch.tensor([[0.0], [0.26], [0.5], [0.999]]))
    torch.testing.assert_close(a, masking.scores(C, torch.tensor([0, 1, 2, 3])))
    one = C[:1].expand(400, -1, -1, -1)
    drawn = masking(one)[0]
    counts = [(drawn == masking.scores(one, torch.full((400,), g))).all(1).sum() for g in range(4)]
    assert sum(counts) == 400 and min(counts) > 50


def test_bf16_does_not_change_a_mask():
    C = seeded(64, 8, 4, 4)
    masking, grouping = S.SemanticMasking(4, 28, 4), S.ChannelGrouping(8, 4)
    u = torch.arange(64)[:, None] / 64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = masking(grouping(C), u)
    assert under[0].dtype == torch.float32
    assert torch.equal(under[2], masking(grouping(C), u)[2])


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


@pytest.mark.parametrize("norm_pix", [True, False])
def test_eq4_is_the_mean_squared_error_of_the_masked_patches(norm_pix):
    torch.manual_seed(0)
    ffl = S.FaceMAE(16, groups=4, kappa=0.0, image_size=28, patch=4, norm_pix=norm_pix,
                    **S.VITS["tiny"])
    X, I, u = seeded(2, 16, 4, 4), seeded(2, 3, 28, 28), torch.tensor([[0.1], [0.6]])
    L_r, tokens, *_ = ffl(X, I, u)
    _, keep, mask = ffl.masking(ffl.grouping(X), u)
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
    with pytest.raises(ValueError, match="patches of 5 do not divide"):
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
    assert kinds(S.two_layers(4, 2)) == ["Linear", "ReLU", "Linear"]
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
    u = torch.full((4, 1), 0.3, device=DEVICE)
    parts = small_model(alpha=0.5, beta=0.2)(*small_inputs(), u)
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
    u = torch.tensor([[0.1], [0.4], [0.6], [0.9]], device=DEVICE)
    L_s, (h1, h2), _ = model.gfl(v1, v2)
    with torch.no_grad():
        X, _ = model.backbone(I)
    L_r, tokens, L_g, *_ = model.ffl(X, I, u)
    L_d = S.distillation_loss([model.distil_m(tokens.mean(1)), model.distil_v(h1),
                               model.distil_v(h2)], t=2.0)
    torch.testing.assert_close(L_g, S.grouping_loss(model.ffl.grouping(X), 8)[0])
    whole = copy.deepcopy(model)(v1, v2, I, u)  # the pieces above are what forward adds up
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
        yield S.nt_xent(a, a.flip(0), 0.1)
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
        u = torch.full((4, 1), 0.3, device=DEVICE)  # the same groups as in fp32
        expected = small_model()(*small_inputs(), u)
        for name, value in small_model().double()(*inputs, u).items():
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
        "--mask-gradient", 0, "--no-norm-pix"]))
    assert (model.gfl.tau, model.alpha, model.beta, model.t) == (0.5, 0.7, 0.2, 2.0)
    ffl = model.ffl
    assert (ffl.masking.ratio, ffl.kappa, ffl.mae.norm_pix) == (0.5, 0, False)
    s = settings(["--data", "affectnet"])
    assert (s.epochs, s.batch_size, s.lr, s.momentum, s.weight_decay) == (100, 256, 0.05, 0.9, 1e-4)
    assert (s.hidden, s.outputs, s.queue, s.steps) == (4096, 256, 65_536, 0)
    assert (s.groups, s.mask_ratio, s.patch, s.alpha, s.beta, s.temperature) == (32, 0.75, 16, 0.3,
                                                                                 0.03, 4.0)
    assert (s.view_size, s.ffl_size, s.arch, s.vit, s.crop_min) == (224, 112, "resnet50", "base",
                                                                    0.08)


def test_part_1_pasted_into_an_empty_module_runs_and_knows_nothing_of_the_rest():
    source = (HERE / "simfle.py").read_text()
    imports = source[source.index('"""\n\nimport'):source.index("# ====")].removeprefix('"""')
    part = source[source.index("# ================================ Part I: "):
                  source.index("# ================================ Settings")]
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
    assert 3 <= example.count("\n") + 1 <= 4, example
    todo = [piece, *(n for n in re.findall(r"\w+", example) if n in defined)]
    while todo:
        name = todo.pop()
        needed.add(name)
        todo += [n for n in defined[name][1] if n in defined and n not in needed]
    row = re.search(rf"(?m)^\| `{piece}` \|(.*)\|$", (HERE / "README.md").read_text())
    assert set(re.findall(r"`(\w+)`", row[1])) == needed - {piece}, needed - {piece}
    source = (HERE / "simfle.py").read_text()
    imports = source[source.index('"""\n\nimport') + 3:source.index("# ====")]
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
        def forward(self, C, u=None):
            made.append("masking")
            return super().forward(C, u)

    for table in ("RESNETS", "GFLS", "MASKINGS"):
        monkeypatch.setattr(S, table, S.Parts(getattr(S, table)))
    code = re.search(r"```python\nimport simfle\n(.*?)```", (HERE / "README.md").read_text(),
                     re.DOTALL)[1]
    assert sum(bool(line.strip()) for line in code.split("\n")) <= 5 and "__main__" in code
    tiny = ["--steps", "1", *TINY]
    code = code.replace('"--data", "toy"', '"--data", data, *tiny')
    monkeypatch.chdir(tmp_path)
    exec(code, dict(__name__="__main__", simfle=S,
                    MyResNet=lambda: (made.append("resnet"), S.small_resnet(8))[1],
                    MyGFL=MyGFL, MyMasking=MyMasking, tiny=tiny, data=str(toy)))
    assert {"resnet", "gfl", "masking"} == set(made)
    assert Path("runs/faces/backbone.pt").exists()
    del S.RESNETS["mine"]  # as in the plain program
    for mode in ("--eval", "--figures"):
        told = complaint(["--data", toy, mode], tmp_path, monkeypatch, capsys)
        assert "no part mine in this script, only small, resnet101" in told
    S.RESNETS["mine"] = lambda: S.small_resnet(8)
    for table in (S.MASKINGS, S.GFLS):
        del table["mine"]
        assert "no part mine in" in complaint(["--data", toy, "--figures"], tmp_path, monkeypatch,
                                                capsys)


# ---------------------------------------------------------------- 4.1 Pictures and augmentation


def batch_of(values, B=6):
    return torch.tensor([values[i % len(values)] for i in range(B)])


@pytest.mark.parametrize("size", [32, 64, 224])
def test_every_colour_and_blur_equals_torchvision_for_the_same_parameter(size):
    x = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    x[0, :, :4] = 0.5  # grey pixels have no hue
    level = 1 / 255
    for f in ([0.2, 0.7, 1.0, 1.8], [1.3, 0.5, 1.1, 0.9]):
        for jitter, name in zip(S.JITTER, ("brightness", "contrast", "saturation")):
            got = jitter(x, torch.tensor(f))
            for b in range(4):
                expected = getattr(TF, f"adjust_{name}")(x[b], f[b])
                assert (got[b] - expected).abs().max() < level, (name, f[b])
    hues = [-0.2, 0.0, 0.13, 0.2]
    got = S.adjust_hue(x, torch.tensor(hues))
    for b in range(4):
        assert (got[b] - TF.adjust_hue(x[b], hues[b])).abs().max() < level, hues[b]
    kernel, sigmas = size // 10 | 1, [0.1, 0.5, 1.2, 2.0]
    got = S.gaussian_blur(x, torch.tensor(sigmas), kernel)
    for b in range(4):
        expected = TF.gaussian_blur(x[b], [kernel] * 2, [sigmas[b]] * 2)
        assert (got[b] - expected).abs().max() < level, sigmas[b]
    assert kernel % 2 == 1 and (size != 224 or kernel == 23)
    torch.testing.assert_close(S.gaussian_blur(x, torch.zeros(4), kernel), x)


def test_the_dice_of_an_image_decide_alone_what_happens_to_it():
    x = (255 * torch.rand(3, 3, 32, 32)).to(torch.uint8)
    nothing = [0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9, 0.5]  # no flip, jitter, grey, blur
    flipped, greyed, blurred = nothing.copy(), nothing.copy(), nothing.copy()
    flipped[0], greyed[6], blurred[7] = 0.1, 0.1, 0.1
    order = [0, 1, 2, 3]
    plain = S.normalise(x)
    torch.testing.assert_close(S.augment(x, torch.tensor([nothing] * 3), order), plain, atol=1e-4,
                               rtol=0)
    out = S.augment(x, torch.tensor([flipped, greyed, blurred]), order)
    torch.testing.assert_close(out[0], plain[0].flip(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[1], S.normalise(TF.rgb_to_grayscale(x / 255, 3))[1],
                               atol=1e-4, rtol=0)
    expected = TF.gaussian_blur(x[2] / 255, [3, 3], [(0.1 + 1.9 * 0.5) * 32 / 224] * 2)
    torch.testing.assert_close(out[2], S.normalise(expected[None])[0], atol=1e-2, rtol=0)


def test_blur_at_224_pixels_has_23_taps():
    x = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    dice = torch.tensor([[0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.9, 0.1, 1.0]])
    expected = TF.gaussian_blur(x / 255, [23, 23], [2.0, 2.0])
    torch.testing.assert_close(S.augment(x, dice, [0, 1, 2, 3]), S.normalise(expected), atol=1e-3,
                               rtol=0)


def test_jitters_come_in_the_given_order_each_with_its_own_strength():
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x, order = (255 * x).to(torch.uint8), [2, 0, 3, 1]
    dice = [0.9, 0.1, 0.75, 0.2, 0.9, 0.8, 0.9, 0.9, 0.5]
    factors = [1 + 0.8 * 0.5, 1 - 0.8 * 0.6, 1 + 0.8 * 0.8, 0.2 * 0.6]
    y = x / 255
    for which in order:
        name = ("brightness", "contrast", "saturation", "hue")[which]
        y = getattr(TF, f"adjust_{name}")(y, factors[which])
    torch.testing.assert_close(S.augment(x, torch.tensor([dice]), order),
                               TF.normalize(y, S.MEAN, S.STD), atol=5e-2, rtol=0)


def test_half_of_the_views_are_flipped_and_blurred_a_fifth_grey_and_four_fifths_jittered():
    x = torch.randint(0, 256, (1, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    x = x.to(torch.uint8).expand(2000, -1, -1, -1)
    dice = torch.rand(2000, 9, generator=torch.Generator().manual_seed(1))
    nothing = torch.tensor([0.99, 0.99, 0.9, 0.9, 0.9, 0.9, 0.99, 0.99, 0.99])
    shares = {}
    for name, column, share in (("flip", 0, 0.5), ("jitter", 1, 0.8), ("grey", 6, 0.2),
                                ("blur", 7, 0.5)):
        thrown = nothing.repeat(2000, 1)
        thrown[:, column] = dice[:, column]
        out = S.augment(x, thrown, [0, 1, 2, 3])
        changed = (out - S.normalise(x)).abs().amax(dim=(1, 2, 3)) > 1e-3
        shares[name] = (changed.float().mean().item(), share)
    assert all(abs(got - share) < 0.03 for got, share in shares.values()), shares


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
    faces = S.Faces(paths, 32, 28, 0.08, seed=0)
    for i, path in enumerate(paths):
        item = faces[0, i, 1.0]
        assert item["views"].shape == (2, 3, 32, 32) and item["views"].dtype == torch.uint8
        assert item["image"].shape == (3, 28, 28) and item["unreadable"] == 0
        if path.endswith(("JPG", "webp", "gif")):
            colour = item["image"].float().mean(dim=(1, 2))
            assert (colour - torch.tensor([200.0, 100, 50])).abs().max() < 6, path
        if path.endswith("deep.png"):
            assert abs(item["image"].float().mean() - 40_000 / 257) < 2


def test_what_happens_to_an_image_depends_on_seed_epoch_and_index_alone(toy):
    paths = S.find_pictures(toy / "train")
    faces = S.Faces(paths, 32, 28, 0.08, seed=3)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    one = faces[2, 5, 1.0]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random stream is left alone
    faces[0, 1, 1.0], torch.rand(3)
    two = S.Faces(paths, 32, 28, 0.08, seed=3)[2, 5, 1.0]
    assert all(torch.equal(one[k], two[k]) for k in one)
    for other in (faces[3, 5, 1.0], faces[2, 6, 1.0],
                  S.Faces(paths, 32, 28, 0.08, seed=4)[2, 5, 1.0]):
        assert not torch.equal(one["dice"], other["dice"])
    assert not torch.equal(one["views"][0], one["views"][1])


@pytest.mark.parametrize("least", [0.08, 0.5])
def test_crops_cover_the_share_of_the_picture_that_is_asked_for(tmp_path, least):
    picture = Image.new("RGB", (200, 200))  # its colours are coordinates
    picture.putdata([(x, y, 0) for y in range(200) for x in range(200)])
    picture.save(tmp_path / "map.png")
    faces = S.Faces([str(tmp_path / "map.png")], 64, 64, least, seed=0)
    sides = []
    for epoch in range(100):
        item = faces[epoch, 0, 1.0]
        for view in item["views"].float():
            sides.append([view[c].max() - view[c].min() + 1 for c in range(2)])
    w, h = torch.tensor(sides).T / 200
    assert 0.9 * least < (w * h).min() < least + 0.1 and (w * h).max() > 0.9
    assert (w / h).max() > 1.2 and (w / h).min() < 0.85
    whole = faces[0, 0, 1.0]["image"].float()
    assert whole[0].max() - whole[0].min() > 195 and whole[1].max() - whole[1].min() > 195


def test_an_unreadable_picture_is_replaced_by_the_next_and_counted(tmp_path):
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    (tmp_path / "2.png").write_text("no picture")
    faces = S.Faces(S.find_pictures(tmp_path), 32, 28, 0.08, seed=0)
    item = faces[0, 1, 1.0]
    assert item["unreadable"] and (item["image"] == 180).all()
    (tmp_path / "0.png").unlink()
    assert [int(faces[0, i, 1.0]["unreadable"]) for i in range(4)] == [1, 1, 1, 0]


# ---------------------------------------------------------------- 4.1 Order of the images


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_every_batch_and_an_epoch_shows_each_image_once(world):
    batch, images, total = 12, 40, 7  # 3 batches an epoch, 4 images dropped
    parts = [list(S.Batches(images, batch, total, 5, r, world)) for r in range(world)]
    assert all(len(p) == total for p in parts)
    alone = list(S.Batches(images, batch, total, 5))
    for step in range(total):
        assert sum((p[step] for p in parts), []) == alone[step]
    first = [index for step in alone[:3] for _, index, _ in step]
    assert len(set(first)) == 36 and {e for step in alone[:3] for e, _, _ in step} == {0}
    assert alone[3][0][0] == 1
    assert [i for _, i, _ in alone[0]] != [i for _, i, _ in alone[3]]


def test_a_run_goes_on_in_the_middle_of_an_epoch_with_another_number_of_processes():
    alone = list(S.Batches(40, 12, 6, 5))
    rest = [S.Batches(40, 12, 6, 5, r, 2, epoch=0, done=12) for r in range(2)]
    assert list(rest[0].places()) == [(0, 12), (0, 24), (1, 0), (1, 12), (1, 24)]
    for step, parts in enumerate(zip(*rest, strict=True)):
        assert sum(parts, []) == alone[step + 1]


# ---------------------------------------------------------------- 4.1 The program


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


def test_a_fault_of_the_program_ends_it_with_a_traceback_and_no_process_left(toy, tmp_path):
    """Loading processes, deaf to SIGTERM, would be waited for until the end of time."""
    code = ("import sys, simfle; simfle.FaceMAE.forward = lambda *_: [][0]; "
            "sys.exit(simfle.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "--data", toy, *TINY, "--workers", "2"],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(HERE)}, timeout=120,
                          text=True, capture_output=True)
    assert done.returncode == 1 and "IndexError" in done.stderr, done.stderr


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_state(one, two):
    """Bit-equality of two checkpoints: weights, target, buffers, momentum, place."""
    one, two = (torch.load(p / "checkpoint.pt", weights_only=True) for p in (one, two))
    assert one["place"] == two["place"] and one["model"].keys() == two["model"].keys()
    different = [k for k in one["model"] if not torch.equal(one["model"][k], two["model"][k])]
    momenta = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (one, two)]
    assert len(momenta[0]) == len(momenta[1]) > 0
    different += [i for i, pair in enumerate(zip(*momenta)) if not torch.equal(*pair)]
    return not different


class Interrupted(BaseException):
    pass


def test_training_logs_checkpoints_and_goes_on_bit_exactly(toy, tmp_path, monkeypatch, capsys):
    args = ["--data", toy, *TINY, "--epochs", "3"]
    assert in_process(*args, "--name", "whole", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert re.search(r"step 15/15  epoch 3  rate \S+  L_s \S+  L_r \S+  L_d \S+  L_g \S+  spread "
                     r"\S+  \d+ images/s  waiting \d+%  left 0:00:00", out)
    # The same again, stopped in the second epoch, between two checkpoints.
    step = S.Pretraining.step

    def stops(self, batch, place, rate):
        if place == (1, 24):
            raise Interrupted
        return step(self, batch, place, rate)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(S.Pretraining, "step", stops)
        in_process(*args, "--name", "parts", cwd=tmp_path, monkeypatch=monkeypatch)
    assert len(records(tmp_path / "runs/parts")) > 6
    assert in_process(*args, "--name", "parts", "--workers", "0", cwd=tmp_path,
                      monkeypatch=monkeypatch) == 0
    assert "goes on after step 5" in capsys.readouterr().out
    again = [a if a != toy else f"{toy.parent}/./{toy.name}/" for a in args]  # the same folder
    assert in_process(*again, "--name", "parts", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    whole, parts = tmp_path / "runs/whole", tmp_path / "runs/parts"
    assert same_state(whole, parts)
    assert records(whole)[1:] == records(parts)[1:]
    steps = [r for r in records(whole) if "L_s" in r]
    assert [r["step"] for r in steps] == list(range(1, 16))
    assert steps[0]["rate"] == pytest.approx(0.4 * 12 / 256)
    assert steps[9]["rate"] == pytest.approx(0.4 * 12 / 256 * (1 + math.cos(math.pi * 9 / 15)) / 2,
                                             rel=1e-5)
    group = torch.load(whole / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx(0.4 * 12 / 256 * (1 + math.cos(math.pi * 14 / 15)) / 2)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    measured = [r["refinement"] for r in records(whole) if "refinement" in r]
    assert len(measured) == 3 and len(measured[0]["error_map"]) == 49
    # backbone.pt is torchvision's.
    weights = torch.load(whole / "backbone.pt", weights_only=True)
    net = S.small_resnet()
    assert net.load_state_dict(weights, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    assert in_process(*args, "--name", "whole", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert "complete" in capsys.readouterr().out
    # --fresh starts over, and the log with it.
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(S.Pretraining, "step", lambda *_: (_ for _ in ()).throw(Interrupted))
        in_process(*args, "--name", "parts", "--fresh", cwd=tmp_path, monkeypatch=monkeypatch)
    assert {p.name for p in parts.iterdir()} == {"checkpoint.lock", "log.jsonl"}
    assert in_process(*args[:-1], "1", "--name", "whole", "--fresh", cwd=tmp_path,
                      monkeypatch=monkeypatch) == 0
    assert len(records(whole)) == 7  # the settings, five steps, one measure


def test_backbone_of_the_paper_model_loads_into_torchvisions_resnet50():
    weights = S.Backbone().resnet.state_dict()
    missing, unexpected = torchvision.models.resnet50().load_state_dict(weights, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected


@pytest.mark.parametrize("processes", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_under_torchrun_go_on_bit_exactly_and_keep_their_weights_alike(
        toy, tmp_path, processes, request):
    """A run of two epochs, and one that stops in the second and goes on: equal to the last bit."""
    not_unless_slow(request)
    script = tmp_path / "check.py"
    script.write_text(CHECK_RANKS.format(here=str(HERE)))
    args = ["--data", toy, *TINY, "--batch-size", "13", "--epochs", "2"]  # 13 is shared by none
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone",
           f"--nproc_per_node={processes}", script, *map(str, args)]
    done = subprocess.run(run, cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1",
                                                      CUDA_VISIBLE_DEVICES=""),
                          timeout=600, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_state(tmp_path / "runs/whole", tmp_path / "runs/parts")
    assert records(tmp_path / "runs/whole")[1:] == records(tmp_path / "runs/parts")[1:]
    assert (f"steps of 12 images ({processes} × {12 // processes} on cpu), rate 0.01875"
            in done.stdout)


CHECK_RANKS = """
import sys
sys.path.insert(0, {here!r})
import torch, torch.distributed as dist, simfle as S
args, step, stop = sys.argv[1:], S.Pretraining.step, [False]
def settings(argv):
    return S.read_settings(S.read_orders(argv))
def steps(self, batch, place, rate):
    if stop[0] and place == (1, 24):
        raise S.Problem("stopped")
    values = step(self, batch, place, rate)
    for p in [*self.model.parameters()][::7]:  # alike in all processes after every step
        other = p.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, p), "weights differ between processes"
    mean = self.model.gfl.online.backbone.resnet.bn1.running_mean  # BatchNorm is local
    other = mean.clone()
    dist.broadcast(other, 0)
    assert torch.equal(other, mean) == (self.world.rank == 0)
    return values
S.Pretraining.step = steps
with S.processes() as world:
    S.Pretraining(settings(args + ["--name", "whole"]), world).go()
    stop[0] = True
    try:
        S.Pretraining(settings(args + ["--name", "parts"]), world).go()
    except S.Problem:
        stop[0] = False
    assert not stop[0]
    S.Pretraining(settings(args + ["--name", "parts"]), world).go()
"""


def test_two_processes_take_the_step_of_the_mean_gradient_and_the_target_follows(toy, tmp_path):
    """DDP's mean of what each process computes alone on its share; losses are logged as means."""
    out = run_program("--data", toy, *TINY, "--steps", "1", "--name", "two", "--tau", "0",
                      cwd=tmp_path, processes=2)
    assert "step 1/1" in out and "Warning" not in out.replace("OMP_NUM_THREADS", "")
    s = settings(["--data", toy, *TINY, "--steps", "1"])
    paths, _ = S.split_pictures(s)
    faces = S.Faces(paths, s.view_size, s.ffl_size, s.crop_min, s.seed)
    model, parts, grads = S.build_model(s), [], []
    model.to(memory_format=torch.channels_last)
    for rank in range(2):
        keys = next(iter(S.Batches(len(paths), 12, 1, s.seed, rank, 2)))
        batch = torch.utils.data.default_collate([faces[k] for k in keys])
        one = copy.deepcopy(model)
        parts.append(one(*S.prepare(batch, (s.seed, 0, 0))))
        parts[-1]["loss"].backward()
        grads.append(torch.cat([p.grad.flatten() for p in one.parameters() if p.requires_grad]))
    logged = records(tmp_path / "runs/two")[1]
    for name in ("L_s", "L_r", "L_d", "L_g"):
        assert logged[name] == pytest.approx(sum(float(p[name].detach()) for p in parts) / 2,
                                             rel=1e-3)
    saved = torch.load(tmp_path / "runs/two/checkpoint.pt", weights_only=True)
    state = saved["optimizer"]["state"]
    got = torch.cat([state[i]["momentum_buffer"].flatten() for i in sorted(state)])
    # The first momentum is the gradient and the decay.
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    wanted = sum(grads) / 2 + 1e-4 * weights
    assert (got - wanted).norm() < 1e-2 * wanted.norm()
    for name, _ in model.gfl.online.named_parameters():  # τ = 0: the target is the online stream
        target, online = (saved["model"][f"gfl.{which}.{name}"] for which in ("target", "online"))
        assert torch.equal(target, online), name


def test_prepare_hands_each_view_its_own_crop_and_dice(toy):
    faces = S.Faces(S.find_pictures(toy / "val"), 32, 28, 0.08, seed=0)
    batch = torch.utils.data.default_collate([faces[0, i, 1.0] for i in range(4)])
    (v1, v2, I, u), draw = S.prepare(batch, (0, 0, 0)), S.stream_of(0, 0, 0)
    for i, v in enumerate((v1, v2)):
        order = torch.randperm(4, generator=draw).tolist()
        dice = batch["dice"][:, 9 * i:9 * i + 9]
        assert torch.equal(v, S.augment(batch["views"][:, i], dice, order))
    assert torch.equal(u, batch["dice"][:, 18:])
    torch.testing.assert_close(I, TF.normalize(batch["image"] / 255, S.MEAN, S.STD))


def test_pictures_set_aside_are_not_trained_on_and_val_is_not_read(toy):
    train, aside = S.split_pictures(settings(["--data", toy]))
    assert (len(train), len(aside)) == (63, 3) and not set(train) & set(aside)
    assert all("/train/" in p for p in train + aside)


def test_everything_drawn_depends_on_the_seed(toy, trained, monkeypatch):
    one, two = ([S.build_model(s).backbone.resnet.conv1.weight, S.split_pictures(s)[1],
                 S.Batches(50, 5, 1, s.seed).order(0)] for s in (
                     settings(["--data", toy, *TINY, "--seed", seed]) for seed in (0, 1)))
    assert not torch.equal(one[0], two[0]) and one[1] != two[1] and one[2] != two[2]
    monkeypatch.chdir(trained)
    with S.processes() as world:
        heads = [S.Evaluation(settings(["--data", "colours", "--eval", *EVAL, "--seed", seed,
                                        "--fresh"]), world).model.fc.weight for seed in (0, 1)]
    assert not torch.equal(*heads)


def test_the_log_holds_means_and_agree_tells_what_the_disk_says(tmp_path):
    log = S.Log(tmp_path / "log.jsonl", 4, True)
    for step, value in enumerate((1.0, 2.0, 6.0, 8.0), 1):
        log.add(step, 0, 0.1, {"x": value}, due=step % 2 == 0)
    assert [r["x"] for r in records(tmp_path)] == [1.5, 7.0]
    with pytest.raises(S.Problem, match="may write to"):
        S.agree(S.ALONE, lambda: open(tmp_path / "nowhere" / "file", "w"))


def test_a_step_tells_the_gradients_norm_and_counts_over_processes(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with S.processes() as world:
        run = S.Pretraining(settings(["--data", toy, *TINY, "--workers", "-1"]), world)
    monkeypatch.setattr(S.Run, "cores", lambda self: 4)
    run.world = S.World(0, 2, torch.device("cpu"), local_size=2)
    assert run.loader(run.faces, run.batches).num_workers == 2
    batch = torch.utils.data.default_collate([run.faces[k] for k in next(iter(run.batches))])
    batch["unreadable"][:3] = True
    assert run.backward(batch, (0, 0))["unreadable"] == 6  # the mean over two processes is taken
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    norm = torch.cat([g.flatten() for g in gradients]).double().norm().item()
    run.optimizer.zero_grad()
    run.world = world
    assert run.step(batch, (0, 0), 0.1)["gradient"] == pytest.approx(norm, rel=1e-4)


def test_two_unreadable_pictures_in_different_steps_are_two(toy, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "faces"
    for i in range(60):
        put(folder / f"{i:02}.png")
    paths, _ = S.split_pictures(settings(["--data", folder]))
    for place in (0, 30):  # in the first and in the third step
        Path(paths[S.Batches(len(paths), 12, 1, 0).order(0)[place]]).write_text("no picture")
    args = ["--data", folder, *TINY, "--workers", "0", "--steps", "4"]
    assert "2 pictures of" in complaint_last(args, tmp_path, monkeypatch, capsys)


def complaint_last(args, cwd, monkeypatch, capsys):
    assert in_process(*args, cwd=cwd, monkeypatch=monkeypatch) == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


def test_the_measure_of_refinement_sees_a_masking_that_keeps_what_is_hard():
    model = small_model()
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
        got = S.measure_refinement(model, images, rounds=8)
        assert got["positions"] * sign > 0.3 and got["within_image"] * sign > 0.3
        assert [v > 0.5 for v in got["error_map"]] == hard.bool().tolist()
    model.ffl.masking.ratio = 0.1  # four rounds would not mask every patch
    few = S.measure_refinement(model, images)["error_map"]
    assert min(few) > 0 and [v > 0.5 for v in few] == hard.bool().tolist()
    assert model.training and groups == {0, 1, 2, 3}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_correlation_is_pearsons():
    x, y = seeded(3, 20), seeded(3, 20, seed=1)
    expected = torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in zip(x, y)])
    torch.testing.assert_close(S.correlation(x, y), expected)
    assert S.correlation(torch.ones(5), x[0, :5]) == 0


# ---------------------------------------------------------------- Supplement B: evaluation


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


def test_linear_evaluation_trains_the_head_alone_and_tells_all(trained, monkeypatch, capsys):
    args = ["--data", "colours", "--eval", *EVAL, "--epochs", "4", "--batch-size", "8", "--lr",
            "0.5", "--fresh"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    got = result(trained, "linear-colours")
    assert got["images"] == 15 and got["accuracy"] > 60 and got["reported"] == "last epoch"
    assert f"{got['accuracy']:.2f} % of 15 test images" in out and "0_a" in out
    confusion = torch.tensor(got["confusion"])
    assert confusion.sum() == 15 and (confusion.sum(1) == 5).all()
    assert got["accuracy"] == pytest.approx(100 * confusion.diag().sum().item() / 15)
    assert got["settings"]["lr"] == 0.5 and got["settings"]["weight_decay"] == 0
    assert "backbone.pt (" in got["settings"]["start"] and got["settings"]["seed"] == 0
    rates = {r["rate"] for r in records_of(trained, "log-linear-colours.jsonl")}
    assert rates == {0.5 * 8 / 256}  # constant
    # 30 images in batches of 8: three full ones and a partial one, in each of four epochs.
    assert len(records_of(trained, "log-linear-colours.jsonl")) == 16
    # The classifier is a torchvision ResNet that holds the run's backbone unchanged.
    saved = torch.load(trained / "runs/colours/linear-colours.pt", weights_only=True)
    backbone = torch.load(trained / "runs/colours/backbone.pt", weights_only=True)
    assert all(torch.equal(saved["model"][k], v) for k, v in backbone.items())
    assert saved["classes"] == ["0_a", "1_b", "2_c"] and saved["mean"] == list(S.MEAN)
    net = S.small_resnet()
    net.fc = nn.Linear(net.fc.in_features, 3)
    net.load_state_dict(saved["model"])
    # The same predictions by hand, one picture at a time.
    net.eval()
    wrong = 0
    for label, name in enumerate(saved["classes"]):
        row = [0, 0, 0]
        for path in sorted((trained / "colours/val" / name).iterdir()):
            x = TF.to_tensor(TF.resize(Image.open(path), [32, 32]))
            x = TF.normalize(x, saved["mean"], saved["std"])
            row[net(x[None]).argmax().item()] += 1
        wrong += row != got["confusion"][label]
    assert not wrong


def test_the_converged_head_is_the_minimum_and_takes_features_as_they_are():
    """By an oracle: at the minimum of a convex function the gradient is 0."""
    y = torch.arange(200) % 3
    x = seeded(200, 6) + 2 * F.one_hot(y, 6)
    x = x * torch.logspace(-3, 3, 6) + 50 * torch.logspace(-3, 3, 6)  # any scale, any offset
    x[:, 5] = 7.0  # a dead feature
    mass = torch.tensor([1.0, 2.0, 0.5])
    weight, bias, strength = S.converged_head(x, y, mass)
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
    torch.testing.assert_close(S.converged_head(x * 5 - 3, y, mass)[0], weight / 5, rtol=0.01,
                               atol=0.01 * weight.abs().max().item())


def test_the_strength_of_the_penalty_grows_with_the_noise():
    y = torch.arange(300) % 2
    noise, signal = seeded(300, 40), seeded(300, 40) + 3 * y[:, None]
    assert S.converged_head(noise, y, torch.ones(2))[2] > S.converged_head(signal, y,
                                                                           torch.ones(2))[2]


def test_the_laptops_linear_evaluation_is_the_converged_one_and_equals_the_probe(
        trained, monkeypatch, capsys):
    args = ["--data", "colours", "--eval", *EVAL, "--fresh"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    got = result(trained, "linear-colours")
    assert got["reported"] == "converged" and got["settings"]["epochs"] == 0
    saved = torch.load(trained / "runs/colours/linear-colours.pt", weights_only=True)
    backbone = torch.load(trained / "runs/colours/backbone.pt", weights_only=True)
    assert all(torch.equal(saved["model"][k], v) for k, v in backbone.items())
    for init in ([], ["--init", "runs/colours/backbone.pt"], ["--init", "random"]):
        if init:
            assert in_process(*args, *init, cwd=trained, monkeypatch=monkeypatch) == 0
            got = result(trained, f"linear-colours-{Path(init[1]).stem}")
        capsys.readouterr()
        assert P.main(["colours", "--workers", "0", *init]) == 0
        probed = json.loads(capsys.readouterr().out)
        assert probed["accuracy"] == pytest.approx(got["accuracy"]), init
        assert probed["mean_accuracy"] == pytest.approx(got["mean_accuracy"]), init
    run_program(*args, cwd=trained, processes=2)  # two processes have the same head
    shared = torch.load(trained / "runs/colours/linear-colours.pt", weights_only=True)
    torch.testing.assert_close(shared["model"]["fc.weight"], saved["model"]["fc.weight"], rtol=1e-3,
                               atol=1e-3)
    assert result(trained, "linear-colours")["images"] == 15
    told = complaint([*args[:2], *EVAL, "--eval", "semi", "--epochs", "0"], trained, monkeypatch,
                     capsys)
    assert "--epochs 0 is for --eval linear" in told


def test_oversampling_weighs_the_classes_of_the_converged_head(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(S, "converged_head", lambda x, y, mass: (
        seen.append(mass), (torch.zeros(3, x.shape[1]), torch.zeros(3), 1.0))[1])
    for more in ([], ["--oversample"]):
        in_process("--data", "colours", "--eval", *EVAL, "--fresh", *more, cwd=trained,
                   monkeypatch=monkeypatch)
    assert seen[0].tolist() == [1, 1, 1]
    torch.testing.assert_close(seen[1], 1 / torch.tensor([14.0, 9.0, 7.0]).double())


def test_the_probe_reads_pixels_untrained_nets_and_the_refinement(trained, monkeypatch, capsys):
    def probed(*args, code=0):
        monkeypatch.chdir(trained)
        assert P.main(["colours", "--workers", "0", *args]) == code
        out = capsys.readouterr()
        return out.err if code else json.loads(out.out)

    assert probed("--init", "pixels")["accuracy"] > 90  # the classes differ in colour
    shapes = []
    head = S.converged_head
    monkeypatch.setattr(S, "converged_head", lambda x, *rest: (shapes.append(x), head(x, *rest))[1])
    for more in (["pixels"], ["random"], ["random", "--seed", "1"], ["random", "--calibrate"]):
        probed("--init", *more)
    assert [x.shape for x in shapes] == [(30, 768)] + 3 * [(30, 256)]
    assert not torch.equal(shapes[1], shapes[2]) and not torch.equal(shapes[1], shapes[3])
    picture = Image.open(sorted((trained / "colours/train/0_a").iterdir())[0])
    x = TF.normalize(TF.to_tensor(TF.resize(picture, [16, 16])), S.MEAN, S.STD)
    torch.testing.assert_close(shapes[0][0].float(), x.flatten(), rtol=1e-5, atol=1e-5)
    # Pooled features of layer4, in eval mode.
    net = S.small_resnet()
    net.load_state_dict(torch.load(trained / "runs/colours/backbone.pt", weights_only=True), False)
    probed()
    x = TF.normalize(TF.to_tensor(TF.resize(picture, [32, 32])), S.MEAN, S.STD)
    net.fc = nn.Identity()
    torch.testing.assert_close(shapes[-1][0].float(), net.eval()(x[None])[0].detach(), rtol=1e-3,
                               atol=1e-4)

    measured = probed("--refinement")
    assert (measured["run"], measured["measured"]) == ("colours", "refinement")
    assert measured.keys() >= {"positions", "within_image", "error_map", "keep_map", "seconds"}
    assert len(measured["keep_map"]) == 49 and sum(measured["keep_map"]) == pytest.approx(12,
                                                                                          abs=0.01)
    alone = ["--data", "colours", "--name", "alone", *TINY, "--steps", "1", "--ffl", "none"]
    assert in_process(*alone, cwd=trained, monkeypatch=monkeypatch) == 0
    assert P.main(["alone", "--refinement"]) == 2
    assert "has no masking to measure" in capsys.readouterr().err
    (trained / "other.pt").unlink(missing_ok=True)
    assert "there is no file other.pt" in probed("--init", "other.pt", code=2)
    for broken in ({"conv1.weight": torch.zeros(1)}, torch.zeros(1)):
        torch.save({"model": broken}, trained / "other.pt")
        assert "other.pt is no small" in probed("--init", "other.pt", code=2)
    for args in (["--calibrate"], ["--init", "random", "--seed", 10**20], ["--workers", "-1"]):
        assert "probe: --" in probed(*map(str, args), code=2)
    assert "there is no dataset nowhere" in probed("--data", "nowhere", code=2)
    assert P.main(["nobody"]) == 2
    assert "there is no run nobody" in capsys.readouterr().err


def records_of(cwd, name, run="colours"):
    lines = (cwd / "runs" / run / name).read_text().splitlines()
    return [r for r in map(json.loads, lines) if "step" in r]


def test_a_frozen_backbone_that_moves_is_noticed(trained, monkeypatch):
    monkeypatch.chdir(trained)
    s = settings(["--data", "colours", "--eval", *EVAL, "--epochs", "1", "--fresh"])
    with S.processes() as world:
        run = S.Evaluation(s, world)
        assert not run.model.training
        run.epoch_ends(0, 0)
        run.model.bn1.running_mean.add_(1e-3)
        with pytest.raises(AssertionError, match="bn1.running_mean"):
            run.epoch_ends(0, 0)


def test_whole_protocols_train_everything_on_a_cosine(trained, monkeypatch):
    args = ["--data", "colours", *EVAL, "--epochs", "2", "--batch-size", "8"]
    before = torch.load(trained / "runs/colours/backbone.pt", weights_only=True)
    for path in (trained / "runs/colours").glob("*linear-colours*"):
        path.unlink()
    for tag, order in (("semi-0.5-colours", ["--eval", "semi", "--labels", "0.5"]),
                       ("finetune-colours", ["--eval", "finetune"]),
                       ("semi-1-colours-random", ["--eval", "semi", "--labels", "1.0", "--init",
                                                  "random"])):
        assert in_process(*args, *order, cwd=trained, monkeypatch=monkeypatch) == 0
        after = torch.load(trained / f"runs/colours/{tag}.pt", weights_only=True)["model"]
        assert all(not torch.equal(after[k], before[k]) for k in before
                   if k.endswith(("weight", "running_mean")))
        rates = [r["rate"] for r in records_of(trained, f"log-{tag}.jsonl")]
        assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 2
    assert len(records_of(trained, "log-semi-0.5-colours.jsonl")) == 4  # 7 + 4 + 4 images
    origin = result(trained, "finetune-colours")["settings"]["start"]
    assert "linear-colours.pt (" in origin  # which was made first


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
    tuned = settings(["--data", "colours", "--eval", "finetune", "--oversample"])
    assert not S.as_linear(tuned)["oversample"] and tuned.oversample


def test_accuracies_are_of_rows_and_their_mean():
    got = S.summary(torch.tensor([[3, 1], [0, 2]]), ["a", "b"])
    assert got["per_class"] == {"a": 75.0, "b": 100.0} and got["mean_accuracy"] == 87.5
    assert got["accuracy"] == pytest.approx(500 / 6) and got["images"] == 6


def test_training_pictures_are_cropped_and_flipped_and_test_pictures_are_not(trained, monkeypatch):
    monkeypatch.chdir(trained)
    with S.processes() as world:
        run = S.Evaluation(settings(["--data", "colours", "--eval", *EVAL, "--fresh"]), world)
    seen, flips = [], 0
    monkeypatch.setattr(run, "predict", lambda wrapped, x: (seen.append(x),
                                                            torch.zeros(len(x), 3))[1])
    picture = S.read_picture(run.faces.paths[0])
    run.losses(torch.utils.data.default_collate([run.faces[e, 0, 1.0] for e in range(200)]), (0, 0))
    for epoch, image in enumerate(seen[0]):
        (box,), _ = S.throw(picture, 1, 1, run.s.crop_min, 0, epoch, 0)
        crop = TF.pil_to_tensor(TF.resized_crop(picture, *box, [32, 32]))
        flips += torch.equal(image, crop.flip(2))
        assert torch.equal(image, crop) != torch.equal(image, crop.flip(2))
    assert 70 < flips < 130 and not torch.equal(seen[0][0], seen[0][1])
    run.confusion()
    whole = [TF.pil_to_tensor(TF.resize(Image.open(path), [32, 32])) for path in run.val[0]]
    assert torch.equal(torch.cat(seen[1:]), torch.stack(whole)) and len(whole) == 15
    logits = torch.eye(3)[1].expand(6, 3)  # all are taken for class 1
    monkeypatch.setattr(run, "predict", lambda wrapped, x: logits[0].expand(len(x), 3))
    assert run.confusion().tolist() == [[0, 5, 0]] * 3
    run.batches.batch = 12  # of 30 pictures the last 6 make a smaller batch
    rest = torch.utils.data.default_collate([run.faces[0, i, 1.0] for i in range(24, 30)])
    torch.testing.assert_close(run.losses(rest, (0, 24))["loss"],
                               F.cross_entropy(logits, rest["label"]))


def test_labels_are_shared_out_by_class_and_by_the_seed_alone():
    labels = [0] * 200 + [1] * 40 + [2] * 3
    chosen = S.share_of_labels(labels, 0.1, seed=1)
    assert [sum(labels[i] == k for i in chosen) for k in range(3)] == [20, 4, 1]
    assert chosen == S.share_of_labels(labels, 0.1, seed=1) != S.share_of_labels(labels, 0.1, 2)
    assert S.share_of_labels(labels, 1.0, 0) == list(range(243))


def test_oversampling_shows_every_class_equally_often(trained, monkeypatch):
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    weights = (1 / torch.bincount(labels).double())[labels]
    batches = S.Batches(1000, 100, 30, 0, partial=True, weights=weights)
    seen = torch.bincount(labels[[i for step in batches for _, i, _ in step]])
    assert seen.sum() == 3000 and ((seen - 1000).abs() < 120).all()
    assert batches.order(0) == batches.order(0) != batches.order(1)
    monkeypatch.chdir(trained)
    with S.processes() as world:
        run = S.Evaluation(settings(["--data", "colours", "--eval", *EVAL, "--oversample",
                                     "--fresh"]), world)
    assert run.tag == "linear-colours-oversample"
    mass = torch.bincount(torch.tensor(run.faces.labels), run.batches.weights)
    assert (mass - 1).abs().max() < 1e-6  # 14, 9 and 7 pictures: equal mass


def test_an_image_drawn_twice_in_an_epoch_gets_two_crops(trained):
    paths = S.find_pictures(trained / "colours/train")
    weights = torch.tensor([0.0] * 4 + [1.0] + [0.0] * (len(paths) - 5)).double()
    keys = [k for step in S.Batches(len(paths), 6, 4, 0, weights=weights) for k in step]
    assert {index for _, index, _ in keys} == {4} and len(set(keys)) == len(keys) == 24
    faces = S.Faces(paths, 32, 0, 0.08, 0, crops=1, dice=1, labels=[0] * len(paths))
    thrown = {tuple(map(tuple, S.throw(S.read_picture(paths[4]), 1, 1, 0.08, 0, e, i)[0]))
              for e, i, _ in keys}
    assert len(thrown) > 20 and torch.equal(faces[keys[3]]["views"], faces[keys[3]]["views"])


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


def test_an_epoch_that_ended_with_other_batches_has_ended():
    """Saved after a batch of 64, gone on with batches of 63: the next epoch is next."""
    assert S.Batches(40, 63, 3, 0, partial=True).step(0, 64) == 1
    assert list(S.Batches(40, 63, 3, 0, epoch=1, done=64, partial=True).places()) == [(2, 0)]
    assert S.Batches(511, 256, 4, 0).step(0, 510) == 1
    # Begun in batches of 255, an epoch of 256 ends where it must, and no step is counted twice.
    steps = S.Batches(1023, 256, 6, 0, done=255)
    assert [steps.step(*place) for place in steps.places()] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_partial_batches_are_shared_and_repeated_images_weigh_nothing(world):
    parts = [list(S.Batches(10, 6, 4, 0, r, world, partial=True)) for r in range(world)]
    for step in range(4):
        shares = [p[step] for p in parts]
        assert len({len(share) for share in shares}) == 1
        counted = [i for share in shares for _, i, weight in share if weight]
        assert len(counted) == (6, 4)[step % 2]
    epoch = [i for step in (0, 1) for p in parts for _, i, weight in p[step] if weight]
    assert sorted(epoch) == list(range(10))


def test_heads_move_between_datasets_class_by_class(trained, tmp_path, monkeypatch, capsys):
    """B.4: the classes by name, in whatever order; others are an error that lists both."""
    monkeypatch.chdir(trained)
    if not Path("runs/colours/linear-colours.pt").exists():
        in_process("--data", "colours", "--eval", *EVAL, "--epochs", "1", cwd=trained,
                   monkeypatch=monkeypatch)
    colours(tmp_path / "others", {"0_a": 6, "1_b": 6, "2_c": 6}, seed=1)
    others = ["--data", tmp_path / "others", "--name", "colours", *EVAL, "--epochs", "1"]
    assert in_process(*others, "--eval", "finetune", cwd=trained, monkeypatch=monkeypatch) == 0
    assert "linear-colours.pt (" in result(trained, "finetune-others")["settings"]["start"]
    # A linear result of another backbone is not fine-tuned.
    backbone = Path("runs/colours/backbone.pt")
    good, told = backbone.read_bytes(), S.with_digest(backbone)
    torch.save({k: v + 1 for k, v in torch.load(backbone).items()}, backbone)
    assert S.with_digest(backbone) != told
    assert "is of an older runs/colours/backbone.pt" in complaint([*others, "--eval", "finetune",
                                                                  "--seed", "3"], trained,
                                                                  monkeypatch, capsys)
    backbone.write_bytes(good)
    # A head whose classes stand in another order is turned.
    saved = torch.load("runs/colours/linear-colours.pt", weights_only=True)
    turned = saved | {"classes": ["2_c", "0_a", "1_b"]}
    torch.save(turned, tmp_path / "turned.pt")
    net = S.small_resnet()
    net.fc = nn.Linear(net.fc.in_features, 3)
    s = settings(["--data", "colours", "--eval", "finetune", "--init", tmp_path / "turned.pt"])
    origin, state = S.starting_weights(s, net, ["0_a", "1_b", "2_c"])
    assert "turned.pt (" in origin and state.keys() == net.state_dict().keys()
    assert torch.equal(state["fc.weight"], saved["model"]["fc.weight"][[1, 2, 0]])
    # Other classes.
    colours(tmp_path / "more", {"0_a": 4, "1_b": 4, "2_c": 4, "3_d": 4})
    more = ["--data", tmp_path / "more", "--name", "colours", *EVAL, "--eval", "finetune"]
    said = complaint(more, trained, monkeypatch, capsys)
    assert "0_a, 1_b, 2_c" in said and "0_a, 1_b, 2_c, 3_d" in said


def test_an_evaluation_goes_on_from_its_last_epoch_bit_exactly(trained, monkeypatch, capsys):
    args = ["--data", "colours", *EVAL, "--eval", "semi", "--labels", "0.9", "--epochs", "3",
            "--batch-size", "8", "--fresh"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    path = trained / "runs/colours/semi-0.9-colours.pt"
    whole = torch.load(path, weights_only=True)["model"]
    step = S.Evaluation.step

    def stops(self, batch, place, rate):
        if place == (2, 8):
            raise Interrupted
        return step(self, batch, place, rate)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(S.Evaluation, "step", stops)
        in_process(*args, cwd=trained, monkeypatch=monkeypatch)
    capsys.readouterr()
    assert in_process(*args[:-1], cwd=trained, monkeypatch=monkeypatch) == 0
    assert "goes on after step 8" in capsys.readouterr().out
    parts = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


def test_two_processes_test_each_image_once_with_the_same_predictions(trained, monkeypatch):
    """15 test images; what one process trained is tested by two as well."""
    args = ["--data", "colours", "--name", "colours", *EVAL, "--eval", "semi", "--labels", "0.8",
            "--batch-size", "12", "--epochs", "1"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    alone = result(trained, "semi-0.8-colours")
    assert "complete" in run_program(*args, cwd=trained, processes=2)  # what remains is the test
    shared = result(trained, "semi-0.8-colours")
    assert shared["confusion"] == alone["confusion"] and shared["images"] == 15


def test_all_processes_test_with_the_statistics_of_process_0(trained, monkeypatch):
    monkeypatch.chdir(trained)
    s = settings(["--data", "colours", "--eval", *EVAL, "--fresh", "--batch-size", "8"])
    sent = []
    with S.processes() as world:
        run = S.Evaluation(s, world)
    run.world = S.World(0, 2, torch.device("cpu"))
    monkeypatch.setattr(S.dist, "broadcast", lambda tensor, source: sent.append((tensor, source)))
    monkeypatch.setattr(S.dist, "all_reduce", lambda tensor: None)
    assert run.confusion().sum() == 8  # process 0's share of 15
    for rank, share in ((1, 7), (14, 1), (15, 0)):  # the last of 16 has no image to count
        run.world = S.World(rank, 2 if rank < 2 else 16, torch.device("cpu"))
        sent.clear()
        assert run.confusion().sum() == share
    assert [id(t) for t, source in sent if source == 0] == [id(b) for b in run.model.buffers()]


def test_four_processes_take_the_same_linear_steps_as_one_and_test_alike(trained, monkeypatch):
    """The head's gradient is a mean over the whole batch, also of the last 6 images, of which four
    processes make shares of 2: two repeats that weigh nothing."""
    args = ["--data", "colours", *EVAL, "--eval", "--epochs", "2", "--batch-size", "12"]

    def head():
        return torch.load(trained / "runs/colours/linear-colours.pt")["model"]["fc.weight"]

    assert in_process(*args, "--fresh", cwd=trained, monkeypatch=monkeypatch) == 0
    alone = head()
    run_program(*args, "--fresh", cwd=trained, processes=4)
    torch.testing.assert_close(alone, head(), rtol=1e-3, atol=1e-5)
    four = result(trained, "linear-colours")
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0  # one tests the same head
    one = result(trained, "linear-colours")
    assert one["confusion"] == four["confusion"] and four["images"] == 15


def test_evaluations_that_cannot_be_get_a_sentence(trained, tmp_path, monkeypatch, capsys):
    colours(tmp_path / "new", {"0_a": 4, "1_b": 4})
    new = ["--data", tmp_path / "new", *EVAL]
    for args, words in (
            ([*new, "--eval"], "runs/new/backbone.pt is missing"),
            ([*new, "--eval", "finetune", "--name", "nothing"], "is missing, from which"),
            ([*new, "--eval", "--init", "no.pt"], "no.pt is missing, from which this starts"),
            ([*new, "--eval", "finetune", "--init", "random"], "random has no head"),
            ([*new, "--init", "random"], "--init is for --eval or --figures"),
            ([*new, "--oversample"], "--oversample is for --eval:"),
            ([*new, "--eval", "--init", "imagenet"], "no ImageNet weights for --arch small"),
            ([*new, "--eval", "cubic"], "--eval: invalid choice: 'cubic'"),
            ([*new, "--eval", "semi", "--labels", "0"], "--labels must be above 0 and up to 1"),
            (["--data", "colours", *EVAL[:-1], "resnet18", "--eval", "--name", "colours"],
             "is no resnet18")):
        assert words in complaint(args, trained, monkeypatch, capsys)
    (tmp_path / "new/val/1_b").rename(tmp_path / "new/val/1_c")
    assert "0_a, 1_b, but val has 0_a, 1_c" in complaint([*new, "--eval", "--init", "random"],
                                                        trained, monkeypatch, capsys)
    colours(tmp_path / "bad", {"0_a": 4, "1_b": 4})
    (tmp_path / "bad/val/0_a/2.png").write_text("no picture")
    args = ["--data", tmp_path / "bad", *EVAL, "--eval", "--init", "random", "--epochs", "1"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert "val/0_a/2.png cannot be read" in error and "1 pictures of" in error


def test_the_demo_compares_the_trained_with_the_untrained_backbone(trained, monkeypatch, capsys):
    monkeypatch.setattr(S, "HERE", trained)
    (trained / "data").mkdir(exist_ok=True)
    (trained / "data/toy").symlink_to(trained / "colours")
    (trained / "colours/complete").touch()
    monkeypatch.setitem(S.PRESETS, "laptop", S.PRESETS["laptop"] | dict(
        steps=2, batch_size=12, view_size=32, ffl_size=28, patch=4, workers=1))
    monkeypatch.setitem(S.PROTOCOLS["laptop"], "linear",
                        dict(epochs=1, batch_size=12, lr=0.1, weight_decay=0.0))
    assert in_process(cwd=trained, monkeypatch=monkeypatch) == 0
    last = capsys.readouterr().out.strip().split("\n")[-1]
    drawn = {p.stem for p in (trained / "runs/toy/figures").iterdir()}
    assert drawn >= {"masks", "masks-untrained", "reconstructions", "attention", "curves"}
    untrained, got = (result(trained, f"linear-toy{x}", "toy") for x in ("-random", ""))
    assert untrained["settings"]["start"] == "random"
    assert "runs/toy/backbone.pt (" in got["settings"]["start"]
    assert last == (f"Linear accuracy on 15 held-out toy faces of 3 expressions: "
                    f"{untrained['accuracy']:.1f} % with the untrained backbone, "
                    f"{got['accuracy']:.1f} % with the trained one.")


def test_the_demo_draws_missing_faces_once_on_each_machine(tmp_path, monkeypatch):
    demo, started, code = S.helper("demo"), [], 0
    monkeypatch.setattr(S, "HERE", tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", lambda command: (
        started.append(command[-1].name), subprocess.CompletedProcess(command, code))[1])
    demo.draw_toy_faces(S.ALONE)
    monkeypatch.setenv("LOCAL_RANK", "1")
    demo.draw_toy_faces(S.ALONE)
    monkeypatch.setenv("LOCAL_RANK", "0")
    code = 1
    with pytest.raises(S.Problem, match="could not draw"):
        demo.draw_toy_faces(S.ALONE)
    text(tmp_path / "data/toy/complete", "")
    demo.draw_toy_faces(S.ALONE)
    assert started == ["toy.py"] * 2


# ---------------------------------------------------------------- Bad input


def complaint(args, cwd, monkeypatch, capsys):
    """Exit code 2, one sentence, no traceback; returns the sentence."""
    capsys.readouterr()
    assert in_process(*args, cwd=cwd, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("simfle: ") and "Traceback" not in error and error.count("\n") == 0
    return error


@pytest.mark.parametrize("args, words", [
    (["--data", "nowhere"], "no dataset nowhere"),
    (["--no-such-option"], "unrecognized arguments"),
    (["--epochs", "many"], "invalid int value"),
    (["--preset", "huge"], "--preset: invalid choice: 'huge'"),
    (["--arch", "vgg"], "--arch: invalid choice: 'vgg'"),
    (["--gfl", "dino"], "--gfl: invalid choice: 'dino'"),
    (["--ffl", "some"], "--ffl: invalid choice: 'some'"),
    (["--patch", "5", "--preset", "laptop"], "patches of 5 do not divide an image of 28 pixels"),
    (["--groups", "30", "--batch-size", "8"], "30 channel groups do not divide 256 channels"),
    (["--batch-size", "0"], "--batch-size must be above 0"),
    (["--hidden", "4", "--gfl", "simsiam"], "--hidden must be 8 or more, not 4"),
    (["--eval", "--name", "nope"], "there is no run nope; runs/ has none"),
    (["--figures", "--init", "random", "--name", "nope"], "there is no run nope"),
    (["--eval", "--figures"], "--eval and --figures are two commands"),
    (["--mask-ratio", "1.5"], "--mask-ratio must be between 0 and 1"),
    (["--alpha", "-0.1"], "--alpha must be from 0, not -0.1"),
    (["--patch", "28"], "--patch must be smaller than --ffl-size"),
    (["--batch-size", "1"], "BatchNorm needs 2"),
    (["--batch-size", "1000"], "fewer than a batch of 1000"),
    (["--sync-bn"], "--sync-bn works on GPUs only"),
    (["--sync-bn", "--eval"], "--sync-bn is for pre-training"),
    (["--benchmark", "--eval"], "--benchmark is for pre-training"),
    (["--labels", "0.1", "--eval"], "--labels is for --eval semi"),
    (["--name", "../up"], "one folder's name"),
    (["--data", ""], "there is no dataset"),
    (["--name", ".."], "one folder's name"),
    (["--ffl", "none", "--connection", "direct"], "nothing to connect"),
])
def test_wrong_orders_get_a_sentence(args, words, toy, tmp_path, monkeypatch, capsys):
    if "--sync-bn" in args and torch.cuda.is_available():
        pytest.skip("it works here")
    data = [] if {"--data", "nope"} & {*args} else ["--data", toy]
    preset = TINY[2:] if "--preset" in args else TINY
    assert words in complaint([*data, *preset, *args], tmp_path, monkeypatch, capsys)


def test_empty_folders_and_unreadable_data_get_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    said = complaint(["--data", "empty", *TINY], tmp_path, monkeypatch, capsys)
    assert "holds no pictures" in said
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(60):
        Image.new("RGB", (32, 32)).save(bad / f"{i}.png")
    for i in range(1, 60, 2):
        (bad / f"{i}.png").write_text("no picture")
    args = ["--data", "bad", *TINY, "--epochs", "2"]
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert "pictures of bad cannot be read, too many to go on" in error
    assert error.count(".png cannot be read.") == len(set(re.findall(r"\d+\.png", error))) >= 2
    # One alone is stepped over, and named once for all epochs.
    for i in range(3, 60, 2):
        Image.new("RGB", (32, 32)).save(bad / f"{i}.png")
    assert in_process(*args, "--fresh", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().err.split() == ["simfle:", "bad/1.png", "cannot", "be", "read."]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    def fails(file):
        file.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"good")
    with pytest.raises(S.Problem, match="disk full.*intact"):
        S.write_whole(path, fails)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_wrong_checkpoints_get_a_sentence_and_stay_as_they_are(toy, tmp_path, monkeypatch, capsys):
    args = ["--data", toy, *TINY, "--steps", "1", "--name", "r"]
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    path = tmp_path / "runs/r/checkpoint.pt"
    good = path.read_bytes()
    for more, words in ((["--lr", "0.3", "--groups", "16"],
                         "groups was 32 and is now 16; lr was 0.4 and is now 0.3"),
                        (["--alpha", "0.1"], "alpha was 0.3 and is now 0.1"),
                        (["--seed", "7"], "seed was 0 and is now 7")):
        assert words in complaint([*args, *more], tmp_path, monkeypatch, capsys)
        assert path.read_bytes() == good
    picture = next((toy / "train").rglob("*.png"))
    renamed = picture.rename(picture.with_stem("0"))  # as many pictures, in another order
    assert "listed was" in complaint(args, tmp_path, monkeypatch, capsys)
    renamed.rename(picture)
    saved = torch.load(path, weights_only=True)
    missing = saved | {"model": {k: v for k, v in saved["model"].items() if "predictor" not in k}}
    for content, words in ((b"", "not a checkpoint"), (good[:1000], "not a checkpoint"),
                           (b"text", "not a checkpoint"), ([1, 2], "not a checkpoint"),
                           ({"a": 1}, "no checkpoint of this program"), (missing, "does not fit"),
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


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(toy, tmp_path, monkeypatch, capsys):
    args = ["--data", toy, *TINY, "--epochs", "2", "--name", "r"]
    prepare, calls = S.prepare, []

    def broken(batch, key, colours):
        calls.append(key)
        v1, *rest = prepare(batch, key, colours)
        return (v1 * (math.nan if len(calls) == 7 else 1), *rest)

    runs, go = [], S.Run.go
    monkeypatch.setattr(S.Run, "go", lambda self: (runs.append(self), go(self))[1])
    monkeypatch.setattr(S, "prepare", broken)
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "not finite in step 7, epoch 2 (L_s nan" in capsys.readouterr().err
    assert all(p.isfinite().all() for p in runs[0].model.parameters())  # no step was taken
    saved = torch.load(tmp_path / "runs/r/checkpoint.pt", weights_only=True)
    assert saved["place"] == [0, 60]
    assert all(v.isfinite().all() for v in saved["model"].values())


def test_more_processes_than_gpus_get_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(S.Problem, match="2 processes were started on a machine with 1 GPUs"):
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
    def draw(name, seed):
        subprocess.run([sys.executable, HERE / "data" / "toy.py", "--out", tmp_path / name,
                        "--train", "16", "--val", "8", "--size", "32", "--seed", str(seed)],
                       check=True)
        return {str(p.relative_to(tmp_path / name)): p.read_bytes()
                for p in sorted((tmp_path / name).rglob("*.png"))}

    one, two, other = draw("one", 0), draw("two", 0), draw("other", 1)
    assert one == two and one.keys() == other.keys()
    assert all(one[k] != other[k] for k in one) and len(set(one.values())) == 24
    assert {k.split("/")[1] for k in one if k.startswith("train")} == {
        "0_neutral", "1_happiness", "2_sadness", "3_surprise", "4_fear", "5_disgust", "6_anger",
        "7_contempt"}


# ---------------------------------------------------------------- Part IV: tables 3 and 4

PAPER_GMAC = {  # Tables 3 and 4: (--ffl none, with FaceMAE)
    "byol": (16.5, 20.1), "simsiam": (8.3, 11.9), "moco": (8.2, 11.8), "mocov2": (8.3, 11.8),
    "simclr": (4.1, 7.7)}  # of SimCLR the paper counts one view


@pytest.mark.parametrize("ffl", ["none", "semantic", "random", "direct"])
@pytest.mark.parametrize("gfl", PAPER_GMAC)
def test_every_row_of_tables_3_and_4_has_the_papers_arithmetic(gfl, ffl, monkeypatch):
    if ffl in ("random", "direct") and gfl != "byol":
        return  # rows c and b of Table 3 are BYOL's
    args = ["--preset", "paper", "--gfl", gfl] + (
        ["--connection", "direct"] if ffl == "direct" else ["--ffl", ffl])
    monkeypatch.setattr(S, "full_precision", lambda x: contextlib.nullcontext())
    with torch.device("meta"):  # shapes without numbers, and without autocast
        model = S.build_model(settings(args))
        v, I = torch.zeros(2, 3, 224, 224), torch.zeros(2, 3, 112, 112)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(v, v, I)
        with FlopCounterMode(display=False) as view, torch.no_grad():
            model.backbone(v)
    gmac = (counter.get_total_flops() - (gfl == "simclr") * view.get_total_flops()) / 4e9
    assert gmac == pytest.approx(PAPER_GMAC[gfl][ffl != "none"], rel=0.02)


ROWS_OF_TABLES = [["--gfl", g, "--ffl", f] for g in ("byol", "simsiam", "moco", "mocov2", "simclr")
                  for f in ("none", "semantic")] + [["--ffl", "random"], ["--connection", "direct"]]


@pytest.mark.parametrize("row", ROWS_OF_TABLES, ids=" ".join)
def test_every_row_trains_goes_on_and_leaves_a_backbone(row, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--data", str(toy), *TINY, "--workers", "0", "--queue", "40", *row]
    assert S.main(args + ["--steps", "6", "--name", "whole"]) == 0
    ends = []
    real = S.Run.save
    monkeypatch.setattr(S.Run, "save", lambda self, place: (real(self, place), ends.append(place),
                                                            stop() if len(ends) == 1 else None))

    def stop():
        raise KeyboardInterrupt

    assert S.main(args + ["--steps", "6", "--name", "parts"]) == 130
    assert S.main(args + ["--steps", "6", "--name", "parts"]) == 0
    one, two = (torch.load(f"runs/{n}/checkpoint.pt")["model"] for n in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    missing, unexpected = S.small_resnet().load_state_dict(torch.load("runs/whole/backbone.pt"),
                                                           strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    if {"moco", "mocov2"} & set(row):  # 72 keys have gone round a queue of 40
        assert one["gfl.next"] == 6 * 12 % 40 and (one["gfl.queue"] != 0).any(1).all()


def gfl_of(name, **more):
    torch.manual_seed(0)
    s = settings([*TINY, "--gfl", name, *[str(a) for k, v in more.items() for a in (f"--{k}", v)]])
    return S.GFLS[name](s, S.Backbone(S.small_resnet(8)), S.ALONE)


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
    torch.testing.assert_close(S.nt_xent(z1, z2, t), torch.tensor(total / 10))


def test_bf16_does_not_touch_the_losses_of_other_gfls():
    z, moco = 9 * seeded(5, 8), gfl_of("moco", queue=10)
    moco.queue.copy_(F.normalize(seeded(10, 8, seed=1), dim=1))
    for stream in (moco.online, moco.target):
        stream.forward = lambda v: (z, v)
    for loss in (lambda: S.nt_xent(z, z.flip(0), 0.1), lambda: moco(z, z)[0]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = loss()
        assert torch.equal(half, loss())


def test_mocos_loss_is_that_of_finding_the_key_and_only_the_query_learns():
    gfl = gfl_of("moco", queue=10)
    v1, v2, _ = (x.cpu() for x in small_inputs())
    assert gfl(v1, v2)[0] == 0  # nothing to be told from yet
    gfl.queue[2:9] = F.normalize(seeded(7, 8), dim=1)  # three places are still empty
    L_s, hs, z1 = gfl(v1, v2)
    q = F.normalize(z1, dim=1)
    k = F.normalize(copy.deepcopy(gfl.target)(v2)[0], dim=1)
    total = 0.0
    for i in range(4):
        positive = math.exp((q[i] @ k[i]).item() / 0.07)
        negative = sum(math.exp((q[i] @ n).item() / 0.07) for n in gfl.queue[2:9])
        total -= math.log(positive / (positive + negative))
    torch.testing.assert_close(L_s, torch.tensor(total / 4), rtol=1e-4, atol=1e-4)
    L_s.backward()
    assert all(p.grad is None for p in gfl.target.parameters()) and len(hs) == 1
    assert hs[0].requires_grad  # L_d trains the backbone
    assert gfl.online.projector.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("batch", [3, 4, 10, 13])
def test_mocos_queue_forgets_the_oldest_whatever_the_batch(batch):
    gfl = gfl_of("moco", queue=10)
    kept = list(gfl.queue)
    for step in range(6):
        gfl.keys = seeded(batch, gfl.queue.shape[1], seed=step)
        gfl.update()
        kept = (kept + list(gfl.keys))[-10:]  # oldest first
        first = int(gfl.next)
        now = [*gfl.queue[first:], *gfl.queue[:first]]
        assert all(torch.equal(a, b) for a, b in zip(now, kept)), step


def test_mocos_target_follows_by_its_own_inertia():
    gfl = gfl_of("moco", tau=0.25)
    with torch.no_grad():
        gfl.online.projector.weight.add_(1.0)
    before = gfl.target.projector.weight.clone()
    gfl.keys = seeded(2, gfl.queue.shape[1])
    gfl.update()
    torch.testing.assert_close(gfl.target.projector.weight,
                               0.25 * before + 0.75 * gfl.online.projector.weight)
    assert settings(["--preset", "paper", "--gfl", "moco"]).tau == 0.999
    assert settings(["--preset", "paper", "--gfl", "moco", "--tau", "0.5"]).tau == 0.5
    assert settings(["--preset", "paper"]).tau == 0.99


JOINED = """
import sys
import torch, torch.distributed as dist
import simfle as S
with S.processes() as world:
    v1, v2, settings = torch.load(sys.argv[1])
    result = {}
    for name, s in settings.items():
        torch.manual_seed(0)
        s = S.Settings(**s)
        gfl = S.GFLS[s.gfl](s, S.Backbone(S.small_resnet(8)), world).eval()
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
        gfl, seen = S.MoCo(S.Backbone(S.small_resnet(8)), outputs=2, queue=4, world=world), []
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
                {n: asdict(settings([*TINY, "--gfl", n, "--queue", "6"])) for n in names}],
               tmp_path / "in.pt")
    monkeypatch.setattr(sys, "argv", ["joined.py", tmp_path / "in.pt", tmp_path / "one.pt"])
    exec(compile(JOINED, "joined.py", "exec"), {})
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", tmp_path / "joined.py", tmp_path / "in.pt",
                    tmp_path / "two.pt"], check=True, cwd=tmp_path,
                   env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    results = [torch.load(tmp_path / name) for name in ("one.pt", "two.pt")]
    for name in names:
        one, two = (r[name] for r in results)
        assert len(one) == len(two) > 5
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


def test_random_masks_come_from_u_alone_and_leave_no_gradient_to_the_scores():
    masking, C = S.RandomMasking(4, 28, 4), seeded(3, 8, 4, 4).requires_grad_()
    u = torch.rand(3, 49, generator=torch.Generator().manual_seed(0))
    a, keep, mask = masking(C, u)
    assert torch.equal(a, u) and not a.requires_grad and mask.sum(1).tolist() == [37] * 3
    assert torch.equal(masking(C * 2, u)[2], mask)
    counts = sum(1 - masking(C)[2] for _ in range(300)).sum(0)  # 900 masks keep 12 of 49
    assert counts.min() > 150 and counts.max() < 300


# ---------------------------------------------------------------- Part V: figures


def cell(picture, row, column, like, left=12):
    """The part of a sheet with names of columns where that cell lies."""
    w, h = like.size
    x, y = left + column * (w + D.GAP), 3 * D.LINE + row * (h + D.GAP)
    return picture.crop((x, y, x + w, y + h))


def same_picture(a, b):
    return a.size == b.size and a.convert("RGB").tobytes() == b.convert("RGB").tobytes()


def test_masked_patches_are_grey_in_the_picture_and_kept_ones_the_originals(monkeypatch):
    model = small_model().cpu().eval()
    x = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    texts = Texts(monkeypatch)
    sheet = D.figures_masks(model, x, (S.MEAN, S.STD))["masks"]
    places = [texts.at(f"group {g}")[0][0] for g in range(8)]
    assert places == sorted(places)
    with monkeypatch.context() as patch:
        patch.setattr(D, "sheet", lambda title, rows, *a, **k: rows)
        rows = D.figures_masks(model, x, (S.MEAN, S.STD))["reconstructions"]
    greys = [dict(c[::-1] for c in row[0].getcolors(1 << 20)).get((127,) * 3, 0) for row in rows]
    assert greys[1] >= 37 * 16**2 > 100 * greys[2] and same_picture(rows[0][0], D.cell(x[0]))
    I = S.normalise(x)
    C = model.ffl.grouping(model.backbone(I)[0])
    for face in range(3):
        original = D.cell(x[face])
        assert same_picture(cell(sheet, face, 0, original), original)
        for column in range(8):  # eight groups, so group `column`
            mask = model.ffl.masking(C, torch.full((3, 1), (column + 0.5) / 8))[2][face]
            got = cell(sheet, face, 1 + column, original)
            for i, masked in enumerate(mask.tolist()):
                y, x0 = 16 * (i // 7), 16 * (i % 7)  # patches of 4 pixels, enlarged fourfold
                box = (x0, y, x0 + 16, y + 16)
                patch = got.crop(box)
                if masked:
                    assert patch.getextrema() == ((127, 127),) * 3
                else:
                    assert same_picture(patch, original.crop(box))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_guess_is_drawn_as_the_original_and_only_masked_patches_are_guessed(norm_pix):
    model = small_model(norm_pix=norm_pix).cpu().eval()
    x = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    u, mae = torch.arange(4)[:, None] / 4, model.ffl.mae
    own = ([0.3, 0.4, 0.5], [0.2, 0.3, 0.4])
    masked, whole = D.reconstruct(model, x, u, own)
    kept = masked != 0.5
    assert kept.float().mean() == 12 / 49
    torch.testing.assert_close(whole[kept], x[kept])
    assert (whole - x)[~kept].abs().mean() > 0.05
    mae.decode = lambda tokens, keep: mae.target(mae.patchify(S.normalise(x, own)))
    torch.testing.assert_close(D.reconstruct(model, x, u, own)[1], x, atol=1e-4, rtol=0)


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
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[16 * row:16 * row + 16, 16 * column:16 * column + 16] = True
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
    expected = F.interpolate(expected, (32, 32), mode="bilinear")[:, 0]
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
    result = S.summary(torch.tensor([[6, 2, 0], [1, 8, 1], [0, 3, 1]]), ["0_a", "1_b", "2_c"])
    picture = D.figure_confusion(result, "linear-x")
    measure = D.ImageDraw.Draw(Image.new("RGB", (1, 1)))
    font = D.ImageFont.load_default(13)
    left = round(max(measure.textbbox((0, 0), name, font=font)[2] for name in result["per_class"])
                 + 2 * D.GAP)
    for i, row in enumerate([[75.0, 25.0, 0.0], [10.0, 80.0, 10.0], [0.0, 75.0, 25.0]]):
        for j, value in enumerate(row):
            assert texts.at(f"{value:.1f}")
            like = D.heat(torch.tensor([[value]]), 0, 100, 84)
            D.write(like, 42, 42, f"{value:.1f}", 14, "mm", "black" if value > 60 else "white")
            assert same_picture(cell(picture, i, j, like, left=left), like)
    words = " ".join(t for t, _ in texts.all)
    assert "accuracy 68.18 %" in words and "0_a" in words and "linear-x" in words


def test_figures_take_the_runs_own_classifier_of_this_data_and_linear_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for tag, data, protocol, init in (
            ("semi-1-a", "a", "semi", ""), ("linear-b", "b", "linear", ""),
            ("linear-a-oversample", "a", "linear", ""), ("linear-a", "a", "linear", ""),
            ("linear-a-x", "a", "linear", "elsewhere/x.pt")):
        text(tmp_path / f"runs/r/eval-{tag}.json", json.dumps(dict(settings=dict(
            data=data, eval=protocol, init=init))))
    s, folder = S.Settings(data="a", name="r"), Path("runs/r")
    for tag in ("linear-a", "linear-a-oversample", "semi-1-a", "linear-b"):
        assert D.find_classifier(s, "r") == folder / f"{tag}.pt"
        (folder / f"eval-{tag}.json").unlink()
    assert D.find_classifier(s, "r") is None


def test_heat_rises_with_the_number_and_fig3_shows_the_maps_of_the_log():
    greys = [D.heat(torch.tensor([[v]]), 0, 1).convert("L").getpixel((0, 0))
             for v in torch.linspace(0, 1, 20).tolist()]
    assert greys == sorted(greys) and greys[0] < 60 and greys[-1] > 200
    assert D.heat(torch.tensor([[math.nan]]), 0, 1).convert("L").getpixel((0, 0)) == greys[0]
    maps = [torch.rand(49, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    records = [dict(epoch=e + 1, refinement=dict(
        error_map=maps[e].tolist(), keep_map=maps[3 + e].tolist(), positions=0.1 * e,
        within_image=0.2)) for e in range(3)]
    picture, low, high = D.figure_refinement(records), 1, 0
    like = Image.new("RGB", (112, 112))
    measure = D.ImageDraw.Draw(like).textbbox((0, 0), "error under random masks",
                                              font=D.ImageFont.load_default(13))[2]
    for row in range(2):
        some = torch.stack(maps[3 * row:3 * row + 3])
        low, high = some.min().item(), some.max().item()
        for e in range(3):
            expected = D.heat(some[e].reshape(7, 7), low, high)
            got = cell(picture, row, e, like, left=round(measure + 2 * D.GAP))
            assert same_picture(got, expected)


def test_a_log_with_numbers_that_are_not_finite_is_drawn():
    log = [dict(step=i, rate=0.1, L_s=v) for i, v in enumerate((math.inf, math.nan, 2.0))]
    log += [dict(step=9, epoch=1, refinement=dict(positions=math.nan, error_map=[]))]
    assert D.figure_curves(log).width > 800


def test_a_plot_rises_with_its_numbers_and_leaves_out_what_is_not_finite(monkeypatch):
    texts, blue = Texts(monkeypatch), (31, 95, 168)
    picture = D.plot("title", [(1, 0.0), (2, math.nan), (3, 1.0)])
    assert {picture.getpixel(p) for p in ((70, 160), (230, 100), (390, 40))} == {blue}
    assert texts.at("0") == [(65, 160)] and (65, 40) in texts.at("1")
    assert not [t for t, _ in texts.all if "nan" in t]
    seen = {}
    monkeypatch.setattr(D, "plot", lambda title, points: (seen.update({title: points}),
                                                          Image.new("RGB", (420, 190)))[1])
    D.figure_curves([dict(step=1, epoch=1, rate=0.5, L_s=3.0),
                     dict(step=2, epoch=1, rate=0.4, L_s=2.0),
                     dict(step=2, epoch=1, refinement=dict(positions=0.25, error_map=[1.0]))])
    assert seen == {"rate, by step": [(1, 0.5), (2, 0.4)], "L_s, by step": [(1, 3.0), (2, 2.0)],
                    "correlation (Fig. 3), positions, by epoch": [(1, 0.25)]}


def test_attention_names_classes_and_lies_over_the_face(monkeypatch):
    texts, x = Texts(monkeypatch), torch.rand(2, 3, 28, 28)
    cam = torch.zeros(2, 28, 28)
    looks = {"run": lambda paths: (x, ["0_a", "1_b"], cam)}
    sheet = D.figure_attention("title", looks, [("p", "1_b"), ("q", None)])
    assert texts.at("is\n1_b") and texts.at("taken for\n0_a") and texts.at("taken for\n1_b")
    assert not texts.at("is\nNone") and sheet.height > 2 * 112
    plain, under = D.cell(x[0]), D.cell(x[0], cam[0])
    assert same_picture(under, Image.blend(plain, D.heat(cam[0], 0, 1, 1).resize((112, 112)), 0.5))


def test_fig5_shows_the_runs_that_differ_in_alpha_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {k: v for k, v in asdict(S.Settings(data="faces")).items() if k not in S.FREE - {"data"}}
    for name, more, accuracy in (("a", dict(alpha=0.2), 40.0), ("b", dict(alpha=0.3), 44.0),
                                 ("c", dict(alpha=0.3, seed=1), 46.0),
                                 ("d", dict(alpha=0.5, beta=0.3), 90.0)):
        text(tmp_path / f"runs/{name}/log.jsonl", json.dumps({"settings": base | more}) + "\n")
        text(tmp_path / f"runs/{name}/eval-linear-faces.json", json.dumps(dict(accuracy=accuracy)))
    seen = {}
    monkeypatch.setattr(D, "plot", lambda title, curve: seen.update({title: curve}))
    D.figure_sweep("alpha", base | dict(alpha=0.2), "faces")
    assert list(seen.values()) == [[(0.2, 40.0), (0.3, 45.0)]] and "against alpha" in str(seen)
    assert D.figure_sweep("beta", base | dict(alpha=0.2), "faces") is None


def test_figures_of_a_run_of_untrained_nets_and_of_loose_pictures(trained, tmp_path, monkeypatch,
                                                                  capsys):
    args = ["--data", "colours", "--eval", *EVAL, "--epochs", "1", "--batch-size", "8", "--fresh"]
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    folder = trained / "runs/colours/figures"
    real, sheets = D.figure_attention, {}
    monkeypatch.setattr(D, "figure_attention", lambda title, looks, pictures: (
        sheets.update({title[:5]: pictures}), real(title, looks, pictures))[1])
    assert in_process("--data", "colours", "--figures", "--compare", "colours", "nobody",
                      cwd=trained, monkeypatch=monkeypatch) == 0
    shown = [picture for pictures in sheets.values() for picture in pictures]
    assert len(sheets["Where"]) == 8 and all(Path(path).parent.name == k for path, k in shown)
    confusion = torch.tensor(result(trained, "linear-colours")["confusion"])
    assert len(sheets.get("Taken", [])) == min(8, 15 - confusion.diag().sum())
    out = capsys.readouterr().out
    assert "runs/nobody does not exist" in out
    names = {p.stem for p in folder.glob("*.png")}
    assert names >= {"masks", "reconstructions", "curves", "confusion-linear-colours", "attention"}
    typo = complaint(["--data", "colours", "--figures", "--init", "rundom"], trained, monkeypatch,
                     capsys)
    assert "rundom" in typo
    assert in_process("--data", "colours", "--figures", "--init", "random", cwd=trained,
                      monkeypatch=monkeypatch) == 0
    args = [*args, "--init", "random"]  # a classifier of another net is not the run's
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 0
    chosen = D.find_classifier(S.Settings(data="colours", name="colours"), "colours")
    assert chosen == Path("runs/colours/linear-colours.pt")
    assert settings(["--figures", "--name", "colours"]).data == "colours"  # the run's own
    untrained, own = (Image.open(folder / f"masks{x}.png") for x in ("-untrained", ""))
    box = (0, 0, own.width, own.height - D.LINE)  # without the line that tells which is which
    assert untrained.size == own.size and not same_picture(untrained.crop(box), own.crop(box))
    for i in range(3):
        put(trained / f"mine/deep/{i}.png", (40, 30))
    before = (folder / "masks.png").read_bytes()
    assert in_process("--data", "mine", "--name", "colours", "--figures", cwd=trained,
                      monkeypatch=monkeypatch) == 0
    assert (folder / "masks.png").read_bytes() == before and (folder / "masks-mine.png").exists()
    assert "colours" in complaint(["--data", "mine", "--figures"], trained, monkeypatch, capsys)
    missing = complaint(["--data", "colours", "--figures", "--init", "no.pt"], trained, monkeypatch,
                        capsys)
    assert "no.pt is missing; with --figures, --init is" in missing


# ---------------------------------------------------------------- Faults

FAULT = """
import os, signal, sys
import simfle as S
rank, where, when = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count = 0
def die(now):
    global count
    count += 1
    if count == when:
        now()
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
step, save, replace = S.Run.step, S.torch.save, S.Path.replace
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
if first and rank == int(os.environ.get("RANK", 0)):
    if where == "step":
        S.Run.step = lambda *a: (die(kill), step(*a))[1]
    if where == "write":  # half of a checkpoint is on disk
        def half(state, file):
            save(state, file)
            file.flush()
            die(lambda: (os.truncate(file.fileno(), file.tell() // 2), kill()))
        S.torch.save = half
    if where == "replace":
        S.Path.replace = lambda *a: (die(kill), replace(*a))[1]
    if where == "nan":
        prepare = S.prepare
        def poisoned(*a):
            v1, *rest = prepare(*a)
            die(lambda: v1.fill_(float("nan")))
            return (v1, *rest)
        S.prepare = poisoned
    if where == "pictures":  # another machine's copy lacks the last one
        find = S.find_pictures
        S.find_pictures = lambda folder: find(folder)[:-1]
    if where == "sleep":
        S.Run.step = lambda *a: (__import__("time").sleep(0.3), step(*a))[1]
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


@pytest.fixture(scope="session")
def uninterrupted(toy, tmp_path_factory):
    """Runs of two epochs that nothing disturbed, by number of processes."""
    made = {}

    def make(processes=0):
        if processes not in made:
            cwd = tmp_path_factory.mktemp("whole")
            if processes:
                one = start_faulty("nowhere", 0, faulty_args(toy), cwd, processes)
                out, err = one.communicate()
                assert one.returncode == 0, err
            else:
                with pytest.MonkeyPatch.context() as patch:
                    assert in_process(*faulty_args(toy), cwd=cwd, monkeypatch=patch) == 0
            made[processes] = cwd / "runs/r"
        return made[processes]
    return make


def faulty_args(toy):
    return ["--data", toy, *TINY, "--epochs", "2", "--save-every", "2", "--name", "r",
            "--log-every", "3"]  # so that a checkpoint falls between two lines of the log


def goes_on_equal(toy, cwd, whole, monkeypatch):
    assert in_process(*faulty_args(toy), cwd=cwd, monkeypatch=monkeypatch) == 0
    assert same_state(whole, cwd / "runs/r")
    assert records(whole)[1:] == records(cwd / "runs/r")[1:]
    assert not list(cwd.rglob("*.part"))


@pytest.mark.parametrize("where, when", [
    ("step", 4), ("write", 3)] + [pytest.param(w, k, marks=pytest.mark.slow) for w, k in (
        ("step", 1), ("step", 6), ("step", 7), ("step", 10), ("write", 1), ("write", 2),
        ("write", 4), ("replace", 1), ("replace", 2), ("replace", 3), ("replace", 4))])
def test_a_killed_run_goes_on_and_ends_bit_equal(where, when, toy, tmp_path, monkeypatch, request,
                                                 uninterrupted):
    not_unless_slow(request)
    killed = start_faulty(where, when, faulty_args(toy), tmp_path)
    killed.communicate()
    assert killed.returncode == -9
    goes_on_equal(toy, tmp_path, uninterrupted(), monkeypatch)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others_and_a_restart_brings_the_run_back(
        processes, toy, tmp_path, request, uninterrupted):
    not_unless_slow(request)
    one = start_faulty("step", 8, faulty_args(toy), tmp_path, processes, rank=1,
                       torchrun=["--max-restarts=1"])
    out, err = one.communicate(timeout=120)
    assert one.returncode == 0, out + err
    assert out.count("goes on after step 6") == 1
    assert "process 0 ends, because another one has ended" in err
    assert same_state(uninterrupted(processes), tmp_path / "runs/r")


def test_a_loss_that_is_not_finite_on_one_process_stops_all_before_the_step(toy, tmp_path,
                                                                            uninterrupted):
    one = start_faulty("nan", 5, faulty_args(toy), tmp_path, 2, rank=1)
    out, err = one.communicate(timeout=120)
    assert one.returncode != 0 and err.count("not finite in step 4, epoch 1 (L_s nan") == 1
    saved = torch.load(tmp_path / "runs/r/checkpoint.pt")
    assert saved["place"] == [0, 24] and all(v.isfinite().all() for v in saved["model"].values())


def test_machines_with_different_pictures_are_told_before_the_first_step(toy, tmp_path):
    """The order of an epoch is a permutation of the list: of other lists, other images."""
    one = start_faulty("pictures", 0, faulty_args(toy), tmp_path, 2, rank=1)
    out, err = one.communicate(timeout=120)
    assert one.returncode != 0 and "step 1/" not in out
    assert err.count("does not hold the same pictures for all processes") == 1
    assert "Traceback (most recent call last):\n  File \"" + str(HERE / "simfle.py") not in err


def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_the_run_too(toy, tmp_path,
                                                                             monkeypatch, capsys):
    real = S.Pretraining.losses

    def losses(self, batch, place):
        parts = real(self, batch, place)
        if place == (0, 24):  # the root's slope at 0 is infinite
            nothing = next(p for p in self.model.parameters() if p.requires_grad).sum() * 0
            parts["loss"] = parts["loss"] + nothing.sqrt()
        return parts

    monkeypatch.setattr(S.Pretraining, "losses", losses)
    error = complaint(faulty_args(toy), tmp_path, monkeypatch, capsys)
    assert "step 3, epoch 1" in error and "gradient nan" in error
    saved = torch.load(tmp_path / "runs/r/checkpoint.pt")["model"]
    assert all(v.isfinite().all() for v in saved.values())


@pytest.mark.parametrize("processes", [0, 2])
def test_sigterm_ends_all_after_one_step_and_nothing_is_lost(processes, toy, tmp_path, monkeypatch,
                                                             uninterrupted):
    one = start_faulty("sleep", 0, faulty_args(toy), tmp_path, processes)
    while "step 1/10" not in (line := one.stdout.readline()):
        assert line, one.stderr.read()
    start = time.perf_counter()
    one.terminate()  # torchrun, or the process itself
    out, err = one.communicate(timeout=60)
    assert time.perf_counter() - start < 30 and one.returncode != 0
    step = int(re.search(r"stopped after step (\d+) of 10", err)[1])
    assert 1 <= step < 10 and (processes or one.returncode == 143)
    saved = torch.load(tmp_path / "runs/r/checkpoint.pt")
    assert saved["place"] == [(step - 1) // 5, 12 * ((step - 1) % 5 + 1)]
    if processes == 0:
        goes_on_equal(toy, tmp_path, uninterrupted(), monkeypatch)


def test_another_number_of_processes_takes_the_rest_of_an_epoch_once():
    images, done = 100, 36
    order = S.Batches(images, 12, 99, seed=3).order(0)
    for world, batch in ((2, 12), (3, 12), (5, 10), (7, 7)):
        seen = []
        steps = [list(S.Batches(images, batch, 99, 3, rank, world, 0, done)) for rank in
                 range(world)]
        left = (images - done) // batch
        for k in range(left):
            seen += [index for process in steps for epoch, index, _ in process[k] if epoch == 0]
        assert seen == order[done:done + left * batch]
        assert all(epoch == 1 for process in steps for epoch, *_ in process[left])


def test_a_run_that_goes_on_with_another_share_says_so(toy, tmp_path, monkeypatch, capsys):
    args = ["--data", toy, *TINY, "--epochs", "1", "--name", "r", "--save-every", "2"]
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    saved = torch.load(tmp_path / "runs/r/checkpoint.pt")
    torch.save(saved | {"place": [0, 24], "share": 6}, tmp_path / "runs/r/checkpoint.pt")
    capsys.readouterr()
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "sees 12 images of a step, where it saw 6" in out and "goes on after step 2" in out


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rest(toy, tmp_path, monkeypatch,
                                                           uninterrupted):
    import resource

    args = faulty_args(toy)
    with monkeypatch.context() as patch:
        patch.setattr(S.Run, "told_to_stop", True)  # a checkpoint after the first step
        assert in_process(*args, cwd=tmp_path, monkeypatch=patch) == 143
    before = (tmp_path / "runs/r/checkpoint.pt").read_bytes()
    size = len(before) // 2
    full = start_faulty("nowhere", 0, args, tmp_path, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, size)))
    out, err = full.communicate()
    assert full.returncode == 2 and "could not be written" in err and "Traceback" not in err
    assert (tmp_path / "runs/r/checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))
    assert len(list((tmp_path / "runs/r").glob("checkpoint*.pt"))) == 1
    goes_on_equal(toy, tmp_path, uninterrupted(), monkeypatch)


def test_a_disk_without_locks_says_so(toy, tmp_path, monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(S.fcntl, "lockf", no_locks)
    assert "No locks available" in complaint(faulty_args(toy), tmp_path, monkeypatch, capsys)


def test_a_removed_log_and_a_restart_with_fresh_cost_nothing(toy, tmp_path, monkeypatch, capsys):
    args = [*faulty_args(toy), "--epochs", "1", "--fresh"]
    step = S.Run.step

    def steps(self, batch, place, rate):
        self.log.path.unlink(missing_ok=True)
        if place == (0, 36):
            raise Interrupted
        return step(self, batch, place, rate)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(S.Run, "step", steps)
        in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun --max-restarts does
    assert in_process(*args, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert "goes on after step 2" in capsys.readouterr().out


def test_sigterm_in_the_last_step_of_a_run_stops_what_would_follow_it(trained, monkeypatch):
    monkeypatch.setattr(S.Run, "told_to_stop", False)
    step = S.Evaluation.step

    def steps(self, batch, place, rate):
        os.kill(os.getpid(), signal.SIGTERM)  # while it still learns the linear result
        return step(self, batch, place, rate)

    monkeypatch.setattr(S.Evaluation, "step", steps)
    for path in (trained / "runs/colours").glob("*linear-colours*"):
        path.unlink()
    args = ["--data", "colours", *EVAL, "--eval", "finetune", "--batch-size", "30", "--fresh"]
    monkeypatch.setitem(S.PROTOCOLS["laptop"]["linear"], "epochs", 1)
    assert in_process(*args, cwd=trained, monkeypatch=monkeypatch) == 143
    assert (trained / "runs/colours/linear-colours.pt").exists()


def test_a_second_run_in_the_same_folder_says_so_and_leaves_it_alone(toy, tmp_path, monkeypatch,
                                                                     capsys):
    args = [*faulty_args(toy), "--epochs", "1"]
    one = start_faulty("sleep", 0, args, tmp_path)
    while "step 1/5" not in one.stdout.readline():
        assert one.poll() is None
    error = complaint([*args, "--fresh"], tmp_path, monkeypatch, capsys)
    assert "another run is at work on runs/r/checkpoint.pt" in error
    while "step 5/5" not in (line := one.stdout.readline()):
        assert line  # it goes on to its end
    one.kill()
    one.communicate()


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
    put(tmp_path / "1good.png", (40, 40), (10, 200, 30))
    faces = S.Faces(S.find_pictures(tmp_path), 32, 28, 0.08, 0)
    item = faces[0, 0, 1.0]
    assert item["unreadable"] == (not good) and item["views"].shape == (2, 3, 32, 32)
    if good:
        image = item["image"].float()
        assert image.std() > 20 and 60 < image.mean() < 190  # neither black nor cut off at white


def test_a_picture_that_vanishes_during_training_is_stepped_over(toy, tmp_path, monkeypatch,
                                                                 capsys):
    folder = tmp_path / "faces/train"
    for i, name in enumerate(S.find_pictures(toy / "train")[:60]):
        put(folder / f"{i}.png")
    real = S.Pretraining.epoch_ends
    monkeypatch.setattr(S.Pretraining, "epoch_ends", lambda self, *a: (
        os.path.exists(self.faces.paths[7]) and os.remove(self.faces.paths[7]), real(self, *a))[1])
    assert in_process("--data", "faces", *TINY, "--epochs", "3", "--workers", "0", cwd=tmp_path,
                      monkeypatch=monkeypatch) == 0
    assert "cannot be read" in capsys.readouterr().err


# ---------------------------------------------------------------- Benchmark


def test_the_benchmark_times_every_part_and_leaves_nothing_behind(toy, tmp_path, monkeypatch,
                                                                  capsys):
    clock = [0.0]  # every look at the clock is a second later

    def tick():
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(S.time, "perf_counter", tick)
    monkeypatch.setattr(B, "loader_rates", lambda run, seconds: {1: 100.0, 2: 150.0})
    assert in_process("--data", toy, *TINY, "--benchmark", cwd=tmp_path,
                      monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.glob("runs/.*")) and "150.00 images/s" in out
    times = dict(re.findall(r"^  (?:of forward: )?(\S.*?)  +([\d,.]+) ms", out, re.MULTILINE))
    # The target looks twice (two views), FaceMAE once; each takes one second of the forward pass.
    assert {k: v for k, v in times.items()} == {
        "target": "2,000.00", "FaceMAE": "1,000.00", "views": "1,000.00", "forward": "7,000.00",
        "backward": "1,000.00", "optimiser, EMA": "1,000.00"}
    assert re.search(r"^step +200.00 ms$", out, re.MULTILINE)  # five of them under one clock
    assert re.search(r"^step +60.00 images/s$", out, re.MULTILINE)
    shown = {k: float(v) for k, v in re.findall(r"^(\w.*?)  +([\d.]+) [G%]", out, re.MULTILINE)}
    model = S.build_model(settings(["--data", toy, *TINY]))
    with FlopCounterMode(display=False) as counter:
        model(*(torch.zeros(4, 3, n, n) for n in (32, 32, 28)))
    forward = counter.get_total_flops() / 2 / 4 / 1e9  # the target's has no way back
    assert 2 * forward < shown["arithmetic"] < 3 * forward
    peak = 1024**3 / 1e9  # a product took one second
    assert shown["share of the peak"] == pytest.approx(100 * 12 * shown["arithmetic"] / 0.2 / peak,
                                                       rel=0.05)
    assert 0.1 < shown["memory of a process"] < 30


def test_the_benchmarks_loader_counts_what_was_loaded_under_the_clock(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with S.processes() as world:
        run = S.Pretraining(settings(["--data", toy, *TINY, "--epochs", "9999"]), world)
        monkeypatch.setattr(S.Run, "cores", lambda self: 2)
        rates = B.loader_rates(run, 0.5)
    assert rates.keys() == {1, 2} and all(20 < r < 50_000 for r in rates.values())


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
                   "1_happiness 7 2 134,415 134,413 fewer than the paper"):
        assert reason in words, (reason, done.stdout)
    assert "none.jpg" not in done.stdout and "Less than half" in done.stdout


@pytest.mark.parametrize("header", ["", HEADER + ",v,a\n", " #SubDirectory_filePath , x\n",
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
    assert "file missing" in done.stderr and not (tmp_path / "out").exists()


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
    for change, words in ((lines[:-1], "14 rows"), (lines + lines[-1:], "row 16"),
                          ([lines[0]] + lines[:0:-1], "row 1 of")):
        text(src / "kaggle/fer2013.csv", "\n".join(change))
        done = prepared("ferplus", "--src", src, "--out", tmp_path / "out")
        assert done.returncode == 2 and words in done.stderr, done.stderr
    (src / "kaggle/fer2013.csv").unlink()
    put(src / "kaggle/train/angry/Training_3908.jpg")
    done = prepared("ferplus", "--src", src, "--out", tmp_path / "out")
    assert done.returncode == 2 and "lost their row numbers" in done.stderr


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
    assert done.returncode == 2 and "size 16; now" in done.stderr
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
    own, seen = ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]), []
    colours(tmp_path / "d", {"0_a": 12, "1_b": 12})
    text(tmp_path / "d/stats.json", json.dumps(dict(mean=own[0], std=own[1], own_colours=True)))
    for name, at in (("prepare", 2), ("measure_refinement", 2), ("normalise", 1)):
        real = getattr(S, name)
        monkeypatch.setattr(S, name, lambda *a, real=real, name=name, at=at, **k: (
            seen.append((name, a[1], a[at] if len(a) > at else None)), real(*a, **k))[1])
    args = ["--data", "d", *TINY[:2], "--workers", "0", "--batch-size", "4", "--seed", "7"]
    small = ["--view-size", "32", "--ffl-size", "28", "--patch", "4", "--hidden", "8"]
    for order in ([*small, "--steps", "1"], ["--eval", "--epochs", "1"], ["--figures"]):
        assert in_process(*args, *order, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert all(list(used) == list(own) for *_, used in seen)
    assert {name for name, *_ in seen} == {"prepare", "measure_refinement", "normalise"}
    assert next(key for name, key, _ in seen if name == "prepare") == (7, 0, 0)


def test_ferplus_is_normalised_by_its_own_colours_all_else_by_affectnets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for own in (False, True):
        text(tmp_path / "d/stats.json", json.dumps(dict(mean=[.1] * 3, std=[.2] * 3,
                                                        own_colours=own)))
        assert S.colours_of(tmp_path / "d") == (([.1] * 3, [.2] * 3) if own
                                                else (list(S.MEAN), list(S.STD)))
    text(tmp_path / "0/stats.json", json.dumps(dict(mean=[.1] * 3, std=[.2, 0, .2],
                                                    own_colours=True)))
    with pytest.raises(S.Problem, match="does not hold own_colours"):
        S.colours_of(tmp_path / "0")
    assert S.colours_of(tmp_path) == (list(S.MEAN), list(S.STD))
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
    assert torch.load("runs/d/linear-d-b.pt")["mean"] == [.1] * 3
    text(tmp_path / "d/stats.json", "{}")
    assert S.main(args + ["--fresh"]) == 2


def test_without_the_folder_data_what_needs_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "__file__", str(tmp_path / "simfle.py"))
    with pytest.raises(S.Problem, match="data/absent.py is missing; copy the folder data/"):
        S.helper("absent")


def test_the_readme_names_every_departure_and_only_packages_that_are_required():
    readme = (HERE / "README.md").read_text()
    header = S.__doc__
    numbers = re.findall(r"^ +(\d+)  ", header[header.index("Departures:"):], re.MULTILINE)
    assert numbers == [str(i) for i in range(1, len(numbers) + 1)] and len(numbers) >= 13
    assert all(re.search(rf"^\| {n} \|", readme, re.MULTILINE) for n in numbers)
    source = (HERE / "simfle.py").read_text()
    for n in numbers:
        marked = re.search(rf"[Dd]eparture {n}\b", source.split('"""', 2)[2])
        assert marked, f"departure {n} is not marked at its line"
    packages = re.findall(r"^[a-z]+", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(packages) == ["einops", "pillow", "pytest", "torch", "torchvision"]


def test_the_map_in_the_header_matches_the_banners():
    source = (HERE / "simfle.py").read_text()
    banners = re.findall(r"^# =+ (.*?) =+$", source, re.MULTILINE)
    header = S.__doc__[S.__doc__.index("\nMap\n") + 5:]
    entries = [e.strip() for e in re.split(r"·|\n|   +", header)]
    assert [e for e in entries if e] == [b.split(": global")[0] for b in banners]


def test_the_readmes_map_names_what_stands_in_these_sections_in_this_order():
    readme, source = (HERE / "README.md").read_text(), (HERE / "simfle.py").read_text()
    rows = readme[readme.index("## From the paper"):readme.index("## Where this parts")]
    last, seen = 0, 0
    for paper, names in re.findall(r"(?m)^\| (.*?) \| (`.*) \|$", rows):
        places = [re.search(rf"(?m)^(?:(?:class|def) {name}|{name} =)", source).start()
                  for name in re.findall(r"`(\w+)", names) if name != "simfle"]
        if paper == "paper":
            continue
        if not paper.startswith(("4.1 aug", "4.1 opt", "4.2")):  # whose names lie in two places
            assert places[0] > last, paper
            last = places[0]
        section = re.match(r"[34]\.[1-4]", paper)
        if section and section[0] != "4.2" and section[0] != "4.3":
            banners = re.findall(r"(?m)^# =+ (.*?) =+$", source[:places[0]])
            assert banners[-1].startswith(section[0]), (paper, banners[-1])
            seen += 1
    assert seen >= 8
    drawn = re.search(r"(?m)^\| 4\.4.*?\| in .*?draw\.py\): (.*) \|$", rows)[1]
    assert all(hasattr(D, name) for name in re.findall(r"`(\w+)`", drawn)) and "`grad_cam`" in drawn


def test_every_option_is_in_the_help_with_its_source(capsys):
    with pytest.raises(SystemExit) as stop:
        S.read_orders(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, default in asdict(S.Settings()).items():
        shown = re.search(rf"--{name.replace('_', '-')}[ ,].*?\[{re.escape(str(default))}\]", text)
        assert shown, name
        assert name in ("data", "preset") or re.search(
            r"\((ours|authors|MAE|its paper|B(\.2)?|[34](\.\d)?(, SimCLR)?|Fig\. 1|Table 2)\)",
            shown[0]), shown[0]
