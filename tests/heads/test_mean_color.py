"""Masked mean-colour prediction against hand-computed values and the paper's definition (checks C2.x)."""

import math

import numpy as np
import pytest
import torch

from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.heads.corruption import KEEP, MASK, SWAP, counts, draw
from ssl_vit.heads.mean_color import MeanColor, MeanColorHead, colors, labels

ENCODER = Vit(size="Ti", width=32, depth=2, heads=2, patch=4, image=16)


def make() -> tuple[VitEncoder, MeanColorHead]:
    torch.manual_seed(0)
    encoder = ENCODER.build()
    return encoder, MeanColor().build(encoder, classes=0)


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        "image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=random),
        "label": torch.full((count,), -1),
        "seed": torch.arange(count) * 977 + 5,
        "valid": torch.ones(count, dtype=torch.bool),
    }


def flat(*rgb: int) -> torch.Tensor:
    return torch.tensor(rgb, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("rgb", "label"),
    [
        ((0, 0, 0), 0),
        ((255, 255, 255), 511),
        ((255, 0, 0), 448),
        ((0, 255, 0), 56),
        ((0, 0, 255), 7),
        ((31, 31, 31), 0),
        ((32, 32, 32), 73),
        ((127, 127, 127), 219),
        ((128, 128, 128), 292),
        ((200, 100, 50), 409),
    ],
)
def test_known_labels(rgb, label):
    assert labels(flat(*rgb), 4).tolist() == [[label]]


def test_every_flat_grey_has_its_bin():
    for grey in range(256):
        assert labels(flat(grey, grey, grey), 4).item() == 73 * (grey >> 5)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_a_mean_exactly_on_an_edge_goes_up(patch):
    board = 127 + (torch.arange(patch)[:, None] + torch.arange(patch)) % 2
    image = board.to(torch.uint8).expand(1, 3, patch, patch)
    assert labels(image, patch).item() == 4 * 73


@pytest.mark.parametrize(("bits", "channels"), [(3, 3), (2, 3), (3, 1)])
def test_labels_agree_with_a_plain_loop(bits, channels):
    image = np.random.default_rng(0).integers(0, 256, (2, channels, 8, 12), dtype=np.uint8)
    want = []
    for picture in image:
        for row in range(2):
            for column in range(3):
                cell = picture[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
                level = [min(2**bits - 1, int(c.astype(int).sum()) * 2**bits // (255 * 16)) for c in cell]
                want.append(sum(v << bits * (channels - 1 - i) for i, v in enumerate(level)))
    assert labels(torch.from_numpy(image), 4, bits).flatten().tolist() == want


def test_labels_commute_with_a_flip_and_decode_to_their_bin():
    image = batch()["image"]
    columns = labels(image, 4).view(-1, 4, 4)
    assert torch.equal(labels(image.flip(3), 4).view(-1, 4, 4), columns.flip(2))
    every = torch.arange(512)
    assert torch.equal(labels(colors(every).view(512, 3, 1, 1).expand(-1, -1, 4, 4), 4)[:, 0], every)


@pytest.mark.parametrize(
    ("patches", "want", "at_15"),
    [
        (16, (6, 1, 1), 2),
        (36, (14, 2, 2), 5),
        (49, (20, 3, 2), 7),
        (64, (26, 3, 3), 10),
        (144, (58, 7, 7), 22),
        (196, (78, 10, 10), 29),
        (256, (102, 13, 13), 38),
        (576, (230, 29, 29), 86),
    ],
)
def test_counts_are_the_references(patches, want, at_15):
    assert counts(patches, 0.5, (0.8, 0.1, 0.1)) == want
    assert sum(counts(patches, 0.15, (0.8, 0.1, 0.1))) == at_15


def test_a_draw_has_its_counts_and_sources():
    plan = draw(torch.arange(500), 36)
    assert plan.index.shape == plan.fate.shape == plan.source.shape == (500, 18)
    assert all(len(set(row)) == 18 for row in plan.index.tolist())
    for fate, count in ((MASK, 14), (SWAP, 2), (KEEP, 2)):
        assert (plan.fate == fate).sum(1).unique().tolist() == [count]
    swapped = plan.fate == SWAP
    assert (plan.source != plan.index)[swapped].all()
    assert torch.equal(plan.source[~swapped], plan.index[~swapped])
    assert plan.source.min() >= 0
    assert plan.source.max() < 36


def test_positions_and_sources_are_uniform():
    """C2.3: each position's frequency is within 5 standard errors over 10,000 draws."""
    plan = draw(torch.arange(10_000), 16)
    frequency = plan.index.flatten().bincount(minlength=16) / 10_000
    assert (frequency - 0.5).abs().max() < 5 * math.sqrt(0.25 / 10_000)
    offsets = ((plan.source - plan.index) % 16)[plan.fate == SWAP].bincount(minlength=16) / 10_000
    assert offsets[0] == 0
    assert (offsets[1:] - 1 / 15).abs().max() < 5 * math.sqrt(1 / 15 / 10_000)


def test_a_draw_depends_on_its_own_seed_alone():
    together, alone = draw(torch.tensor([5, -3, 9]), 49), draw(torch.tensor([-3]), 49)
    assert torch.equal(together.index[1:2], alone.index)
    assert torch.equal(together.source[1:2], alone.source)
    assert together.index[0].tolist() != together.index[1].tolist()
    assert draw(torch.tensor([7]), 16).index.tolist() == [[15, 3, 14, 13, 2, 12, 11, 1]]  # golden


def test_corruption_replaces_what_it_says_and_nothing_else():
    patches = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.full((8,), 7.0)
    plan = draw(torch.arange(4), 16)
    got = plan.apply(patches, mask)
    for b in range(4):
        want = patches[b].clone()
        for index, fate, source in zip(plan.index[b], plan.fate[b], plan.source[b], strict=True):
            want[index] = {MASK: mask, SWAP: patches[b, source], KEEP: patches[b, index]}[int(fate)]
        assert torch.equal(got[b], want)


def test_the_first_loss_is_ln_512():
    encoder, head = make()
    output = head(encoder, batch())
    assert math.isclose(output.loss.item(), math.log(512), abs_tol=1e-5)
    report = head.report(output.sums, float(output.weight))
    assert math.isclose(report["loss"], report["uniform"], abs_tol=1e-5)


def test_loss_is_on_every_corrupted_patch_and_on_no_other():
    """C2.6: gradients reach swapped and kept slots; the loss equals one written out by hand over the K slots."""
    encoder, head = make()
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    given = batch()
    plan = draw(given["seed"], 16)
    tokens = encoder(given["image"], edit=lambda patches: plan.apply(patches, head.mask_token))
    logits = head.linear(tokens[:, 1:]).log_softmax(2)
    target = labels(given["image"], 4)
    want = [-logits[b, i, target[b, i]] for b in range(4) for i in plan.index[b]]
    output = head(encoder, given)
    torch.testing.assert_close(output.loss, torch.stack(want).mean())
    assert output.sums["histogram"].sum() == 4 * 8


def test_a_masked_patch_is_hidden_and_a_kept_one_is_not():
    """C2.9"""
    encoder, head = make()
    given = batch(1)
    plan = draw(given["seed"], 16)
    masked = next(int(i) for i in plan.index[0, :6] if i not in plan.source[0, 6:7])
    kept = int(plan.index[0, 7])
    for patch, changes in ((masked, False), (kept, True)):
        image = given["image"].clone()
        row, column = divmod(patch, 4)
        image[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] ^= 255
        seen = [encoder(x, edit=lambda p: plan.apply(p, head.mask_token)) for x in (given["image"], image)]
        assert torch.equal(seen[0], seen[1]) != changes


def test_the_mask_embedding_learns():
    """C2.8"""
    encoder, head = make()
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    head(encoder, batch()).loss.backward()
    assert head.mask_token.grad is not None
    assert head.mask_token.grad.abs().sum() > 0


def test_padding_counts_for_nothing():
    encoder, head = make()
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    given = batch()
    short = {name: value[:3] for name, value in given.items()}
    given["valid"] = torch.tensor([True, True, True, False])
    padded, plain = head(encoder, given), head(encoder, short)
    torch.testing.assert_close(padded.loss, plain.loss)
    assert padded.weight == plain.weight == 3
    for name, value in plain.sums.items():
        torch.testing.assert_close(padded.sums[name], value)


def test_overfits_one_batch():
    """C2.10: eight images under one fixed mask are learned by heart."""
    encoder, head = make()
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    given, loss = batch(8), torch.tensor(0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head(encoder, given).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_the_panel_shows_input_corruption_guess_truth_and_error():
    encoder, head = make()
    given = batch(2)
    panel = head.panel(encoder, given)
    assert panel.dtype == torch.uint8
    assert panel.shape == (3, 2 * 98, 5 * 98)  # six times as large, and a gap of 2
    assert torch.equal(panel[:, 2:98:6, 2:98:6], given["image"][0])
    plan = draw(given["seed"], 16)
    row, column = divmod(int(plan.index[0, 0]), 4)  # a masked patch is grey in the second column
    assert (panel[:, 2 + row * 24 : 26 + row * 24, 100 + column * 24 : 124 + column * 24] == 128).all()
