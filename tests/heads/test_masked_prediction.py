"""The masked objectives, their losses and pictures, against plain loops (C2.x, C8.x), over every kind and encoder."""

import copy
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_vit import config, recipes
from ssl_vit.encoders.axial import Axial
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.heads import Head
from ssl_vit.heads.corruption import KEEP, MASK
from ssl_vit.heads.masked_prediction import MaskedPrediction, neighbor_baseline_loss
from ssl_vit.heads.mean_color import label_colors, labels
from ssl_vit.heads.visualize import MIN_SIDE, image_grid, split_grid
from tests.encoders.kinds import gather_tokens
from tests.heads import masked
from tests.heads.masked import (
    KINDS,
    MASKINGS,
    PATCH,
    PIXELS,
    SIDE,
    color_class,
    expected_targets,
    make_batch,
    make_encoder_and_head,
    patches_of,
    vit,
)

# targets


def flat_patch(*rgb: int) -> Tensor:
    return torch.tensor(rgb, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)


LABELS = {(0, 0, 0): 0, (255, 255, 255): 511, (255, 0, 0): 448, (0, 255, 0): 56, (0, 0, 255): 7, (31, 31, 31): 0}
LABELS |= {(32, 32, 32): 73, (127, 127, 127): 219, (128, 128, 128): 292, (200, 100, 50): 409}
LABELS |= {(gray, gray, gray): 73 * (gray >> 5) for gray in range(256)}


def test_known_labels():
    """Of flat patches; a mean exactly on an edge goes up."""
    assert {rgb: labels(flat_patch(*rgb), 4).item() for rgb in LABELS} == LABELS
    for patch in (4, 8, 16):
        board = 127 + (torch.arange(patch)[:, None] + torch.arange(patch)) % 2
        assert labels(board.to(torch.uint8).expand(1, 3, patch, patch), patch).item() == 4 * 73


@pytest.mark.parametrize(("bits", "channels"), [(3, 3), (2, 3), (3, 1)])
def test_labels_agree_with_a_plain_loop(bits, channels):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, channels, 8, 12), dtype=np.uint8))
    expected = [[color_class(patch, bits) for patch in row] for row in patches_of(image, 4)]
    assert labels(image, 4, bits).tolist() == expected


def test_labels_commute_with_a_flip_and_decode_to_their_bin():
    image = make_batch()["image"]
    columns = labels(image, 4).view(-1, 4, 4)
    assert torch.equal(labels(image.flip(3), 4).view(-1, 4, 4), columns.flip(2))
    all_labels = torch.arange(512)
    assert torch.equal(labels(label_colors(all_labels).view(512, 3, 1, 1).expand(-1, -1, 4, 4), 4)[:, 0], all_labels)


def test_cells_of_a_patch_are_area_means_in_raster_order(tmp_path):
    """C2.12: of 16 cells each, of 2 x 2 pixels; a patch that four does not divide has none."""
    encoder, head = make_encoder_and_head("patch_colors", tmp_path, vit(depth=1, patch=8, image=(8, 16)))
    color = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 4, 8), dtype=np.uint8))
    image = color.repeat_interleave(2, 2).repeat_interleave(2, 3)
    levels = (color[0].numpy().astype(int) * 8 // 255).clip(max=7)
    flat_cells = np.tensordot([64, 8, 1], levels, 1).reshape(4, 2, 4).transpose(1, 0, 2).reshape(2, 16)
    assert head.target.targets(encoder, image)[0].tolist() == flat_cells.tolist()
    noise = image ^ torch.randint(0, 2, image.shape, dtype=torch.uint8)  # a cell is its mean, not one of its pixels
    tops = [(row, column) for row in range(0, 8, 2) for column in range(0, 8, 2)]
    by_mean = [[color_class(patch[:, r : r + 2, c : c + 2]) for r, c in tops] for patch in patches_of(noise, 8)[0]]
    assert head.target.targets(encoder, noise)[0].tolist() == by_mean
    with pytest.raises(ValueError, match="6 is no multiple"):
        make_encoder_and_head("patch_colors", tmp_path, vit(depth=1, patch=6, image=12))


@pytest.mark.parametrize("normalize", [False, True])
def test_predicting_the_pixels_costs_nothing(normalize, tmp_path):
    """C2.13, C8.5"""
    encoder_config = vit(depth=1, patch=16, image=32)
    encoder, head = make_encoder_and_head("normalized" if normalize else "pixels", tmp_path, encoder_config)
    assert head.linear.out_features == 768
    image = make_batch(3, side=32)["image"]
    image[0, :, :16, :16] = 77  # flat: nothing to divide by
    image[1, 0, 0, :2] = torch.tensor([0, 255])
    target = head.target.targets(encoder, image)
    assert target.shape == (3, 4, 768)
    assert head.target.loss(target, target).tolist() == [0, 0, 0]
    if normalize:
        assert target[0, 0].abs().max() < 1e-3
        normalized = target.flatten(0, 1)[1:].double()
        assert normalized.mean(1).abs().max() < 1e-6
        assert (normalized.std(1, unbiased=False) - 1).abs().max() < 1e-5
    else:
        assert target.aminmax() == (-1, 1)
    loss = head.target.loss(target + 0.5, target)
    torch.testing.assert_close(loss, torch.full((3,), 0.25))


# losses


CLASSES = {"mean_color": 512, "patch_colors": 512, "colors": 7, "patches": 7}


@pytest.mark.parametrize("way", MASKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_target_loss_and_report_by_hand(kind, way, tmp_path):
    """Over all corrupted patches of valid images: the loss, accuracy, and label entropy and top label by numpy."""
    encoder, head = make_encoder_and_head(kind, tmp_path, **MASKINGS[way])
    batch = make_batch()
    target, values = expected_targets(kind, head, batch["image"]), head.target.targets(encoder, batch["image"]).numpy()
    if kind in PIXELS:
        np.testing.assert_allclose(values, target, atol=2e-5)
    else:  # its first loss is that of a blind guess: C2.7, after averaging over cells; ln K of K clusters
        assert len(np.unique(target)) > 3  # they do not say the same of all
        np.testing.assert_array_equal(values, target)
        output, uniform = head(encoder, batch, log_metrics=True), math.log(CLASSES[kind])
        report = head.report(output.sums, float(output.weight))
        assert output.loss.item() == pytest.approx(uniform, abs=1e-5)
        assert report["loss"] == pytest.approx(uniform, abs=1e-5)
        assert report["uniform"] == uniform
    nn.init.normal_(head.linear.weight, std=0.3)
    batch["valid"][3] = False
    plan = head.draw(batch["seed"])
    with torch.no_grad():
        output = head(encoder, batch, log_metrics=True)
        predictions = encoder(batch["image"], edit=lambda patches: plan.apply(patches, head.mask_token))
        predictions = head.linear(predictions[:, 1:]).double().numpy()
    loss, correct, values = [], [], []
    for b in (0, 1, 2, 4):
        for i in plan.index[b].tolist():
            if kind in PIXELS:
                loss.append(((predictions[b, i] - target[b, i]) ** 2).mean())
                values.extend(target[b, i].tolist())
                continue
            for logits, label in zip(predictions[b, i].reshape(target.shape[2], -1), target[b, i], strict=True):
                loss.append(np.log(np.exp(logits).sum()) - logits[label])
                correct.append(logits.argmax() == label)
                values.append(label)
    report = head.report(output.sums, float(output.weight))
    assert output.weight == 4
    assert output.loss.item() == pytest.approx(np.mean(loss), rel=1e-5)
    assert report["loss"] == pytest.approx(np.mean(loss), rel=1e-5)
    if kind in PIXELS:
        assert report["variance"] == pytest.approx(np.var(values), rel=1e-4)
        return
    assert output.sums["histogram"].sum() == len(values)
    share = np.unique(values, return_counts=True)[1] / len(values)
    assert report["accuracy"] == pytest.approx(np.mean(correct), rel=1e-5)
    assert report["unigram_entropy"] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-5)
    assert report["top_label"] == pytest.approx(share.max(), rel=1e-6)


def test_overfits_one_batch(tmp_path):
    """C2.10: eight images of noise under one fixed mask are learned by heart."""
    encoder, head = make_encoder_and_head("mean_color", tmp_path)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    noise = torch.randint(0, 256, (8, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    batch, loss = make_batch(8) | {"image": noise}, torch.tensor(0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head(encoder, batch, log_metrics=True).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# in every encoder


def gather_all_tokens(encoder: Any) -> Any:
    """The encoder, which computes all tokens and gathers."""
    wrapper = copy.copy(encoder)
    wrapper.forward = lambda image, edit=None, select=None: (
        encoder(image, edit=edit) if select is None else gather_tokens(encoder(image, edit=edit), select)
    )
    return wrapper


ENCODERS: dict[str, Any] = {
    "vit": vit(),
    "vit without class token": vit(class_token=False, pool="mean", position_placement="every"),
    "relative": vit(positions="relative"),
    "axial": Axial.model_validate(masked.SIZES | {"depth": 1}),
}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_learns_the_same_of_selected_tokens(kind: str, name: str, recomputed: bool, tmp_path):
    encoder, head = make_encoder_and_head(kind, tmp_path, ENCODERS[name])
    encoder.activation_checkpointing = recomputed
    nn.init.normal_(head.linear.weight, std=0.1)
    batch = make_batch()
    parameters = [*encoder.parameters(), *head.parameters()]
    selected, full = head(encoder, batch, log_metrics=True), head(gather_all_tokens(encoder), batch)
    gradients, expected_gradients = (
        torch.autograd.grad(output.loss, parameters, allow_unused=True) for output in (selected, full)
    )
    torch.testing.assert_close(selected.loss, full.loss, atol=1e-6, rtol=1e-6)
    max_norm = max(float(gradient.norm()) for gradient in expected_gradients if gradient is not None)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None and expected is not None:
            assert (gradient - expected).norm() <= 1e-5 * (expected.norm() + 0.1 * max_norm)
    assert torch.equal(head.visualize(encoder, batch), head.visualize(gather_all_tokens(encoder), batch))


NAMES = [
    kind.model_fields["kind"].default for kind in get_args(get_args(Head)[0]) if issubclass(kind, MaskedPrediction)
]
BARE = [["kind=timm", "name=test_resnet"], ["kind=bit"], ["kind=axial_resnet"], ["kind=timm", "name=levit_128s"]]
DEFAULT_CASES = [(NAMES[0], encoder) for encoder in BARE] + [(head, BARE[0]) for head in NAMES[1:]]
PROCESS_CASES = [pytest.param(head, encoder, marks=pytest.mark.process) for head in NAMES[1:] for encoder in BARE[1:]]


@pytest.mark.parametrize(("head", "encoder"), DEFAULT_CASES + PROCESS_CASES)
def test_masked_objectives_refuse_what_has_no_patches(head, encoder):
    side = 224 if "name=levit_128s" in encoder else 64  # a LeViT has patches that are not its tokens
    args = [f"encoder.{word}" for word in encoder] + [f"head.kind={head}", f"data.image_size={side}"]
    with pytest.raises(ExitError) as error:
        recipes.resolve_recipe(config.parse(recipes.Pretrain, args))
    assert error.value.code == ExitCode.USAGE
    message = str(error.value)
    assert f"head.kind={head} replaces patch embeddings, and this encoder has none" in message
    assert f"encoder.{encoder[0]}" in message
    assert "\n" not in message
    supervised = [*args[:-2], "head.kind=classifier", args[-1]]
    recipes.resolve_recipe(config.parse(recipes.Pretrain, supervised))


# pictures


@pytest.mark.parametrize("way", MASKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_panel_shows_what_it_says(kind, way, tmp_path):
    encoder, head = make_encoder_and_head(kind, tmp_path, **MASKINGS[way])
    nn.init.normal_(head.linear.weight, std=0.1)
    batch = make_batch(3)
    panel = head.visualize(encoder, batch)
    assert panel.dtype == torch.uint8
    image, seen, guess, truth, error = split_grid(panel, SIDE, SIDE).unbind(1)
    assert torch.equal(image, batch["image"])
    patches = [torch.from_numpy(patches_of(column, PATCH)) for column in (image, seen, truth, guess)]
    target = expected_targets(kind, head, image)
    for b in range(3):
        for i in range(16):
            expected = {
                "mean_color": lambda t: label_colors(torch.tensor(t[0])).view(3, 1, 1).expand(3, 4, 4),
                "patch_colors": lambda t: label_colors(torch.tensor(t)).view(4, 4, 3).permute(2, 0, 1),
                "colors": lambda t: (255 * head.target.centers[t[0]]).round().view(3, 1, 1).expand(3, 4, 4),
                "patches": lambda t: (255 * head.target.centers[t[0]]).round().view(3, 4, 4),
            }.get(kind, lambda _, own=patches[0][b, i]: own)(target[b, i])
            assert torch.equal(patches[2][b, i], expected.to(torch.uint8)), (b, i)
    plan = head.draw(batch["seed"])
    edge = torch.ones(4, 4, dtype=torch.bool)
    edge[1:3, 1:3] = False
    for b in range(3):
        clean = sorted(set(range(16)) - set(plan.index[b].tolist()))
        assert torch.equal(patches[1][b, clean], patches[0][b, clean])
        assert torch.equal(patches[3][b, clean], patches[2][b, clean])
        for i, fate, source in zip(plan.index[b].tolist(), plan.fate[b].tolist(), plan.source[b].tolist(), strict=True):
            patch = patches[1][b, i]
            if fate == MASK:
                assert (patch == 128).all()
                continue
            assert torch.equal(patch[:, ~edge], patches[0][b, source][:, ~edge])
            frame = (255, 255, 255) if fate == KEEP else (255, 0, 0)
            assert torch.equal(patch[:, edge], torch.tensor(frame, dtype=torch.uint8)[:, None].expand(3, 12))
    assert not torch.equal(guess, truth)
    expected_error = (guess.float() - truth.float()).abs().mean(1, keepdim=True).expand_as(error)
    assert (error.float() - expected_error).abs().max() <= 1.0  # of pixels, which are rounded after the difference
    assert error.max() > 0


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (40, 12), (100, 30)])
def test_what_was_put_side_by_side_comes_apart_again(height: int, width: int):
    columns = [torch.randint(256, (2, 3, height, width), dtype=torch.uint8) for _ in range(3)]
    picture = image_grid(columns)
    times = max(1, MIN_SIDE // max(height, width))
    assert picture.shape == (3, 2 * (2 + times * height), 3 * (2 + times * width))
    assert torch.equal(split_grid(picture, height, width), torch.stack(columns, dim=1))
    first = columns[0][0].repeat_interleave(times, 1).repeat_interleave(times, 2)  # each pixel is a square
    assert torch.equal(picture[:, 2 : 2 + times * height, 2 : 2 + times * width], first)


# the baseline that copies


def fill_from_neighbors(image: np.ndarray, corrupted: set[int], rounds: int, side: int) -> np.ndarray:
    """[3, rows, columns]: of a corrupted patch the mean over known ones around it, in so many rounds; else over all."""
    mean = image.astype(float).reshape(3, side, PATCH, side, PATCH).mean((2, 4))
    known = {(i // side, i % side): mean[:, i // side, i % side] for i in range(side**2) if i not in corrupted}
    visible, cells = list(known.values()), [(row, column) for row in range(side) for column in range(side)]
    for _ in range(rounds):
        fresh = {}
        for row, column in cells:
            neighbors = [(r, c) for r in range(row - 1, row + 2) for c in range(column - 1, column + 2)]
            if (row, column) not in known and any(cell in known for cell in neighbors):
                fresh[row, column] = np.mean([known[cell] for cell in neighbors if cell in known], axis=0)
        known |= fresh
    fallback = np.mean(visible, axis=0) if visible else np.full(3, 127.5)
    return np.stack([known.get(cell, fallback) for cell in cells], 1).reshape(3, side, side)


COPIED = [({}, 1, 4), ({"ratio": 0.9}, 1, 4), ({"ratio": 1.0}, 1, 4), ({"mask_unit": 2}, 2, 4)]
COPIED += [({"mask_blockwise": True, "ratio": 0.9}, 2, 4), ({"mask_blockwise": True}, 7, 14)]


@pytest.mark.parametrize(("way", "rounds", "side"), COPIED)
def test_the_neighbors_of_a_corrupted_patch(way, rounds, side, tmp_path):
    """Rectangles are filled up to their middle."""
    _encoder, head = make_encoder_and_head("mean_color", tmp_path, vit(depth=1, image=side * PATCH), **way)
    batch = make_batch(6, side * PATCH)
    index = head.draw(batch["seed"]).index
    if side == 14:  # a rectangle of 12 x 12
        index = torch.arange(196).view(14, 14)[1:13, 1:13].reshape(1, -1).expand(6, -1)
    colors = head.neighbor_colors(batch["image"], index)
    for b in range(6):
        expected = fill_from_neighbors(batch["image"][b].numpy(), set(index[b].tolist()), rounds, side)
        difference = (colors[b].numpy() - expected).reshape(3, -1)[:, index[b]]
        assert np.abs(difference).max() <= 0.51, b


def test_what_copying_costs_is_the_best_mixture_with_frequencies():
    """A scan of a thousand probabilities over single patches, and the two ends."""
    random = np.random.default_rng(0)
    label = random.integers(0, 5, 3000)
    guess = np.where(random.random(3000) < 0.6, label, random.integers(0, 5, 3000))
    share = np.bincount(label, minlength=5) / 3000
    right = np.bincount(label[guess == label], minlength=5) / 3000
    p = np.linspace(0, 0.999, 1000)[:, None]
    log_likelihood = np.log(np.where(guess == label, p, 0) + (1 - p) * share[label])
    assert neighbor_baseline_loss(torch.tensor(share), torch.tensor(right)) == pytest.approx(
        -log_likelihood.mean(1).max(), abs=1e-4
    )
    entropy = -(share * np.log(share)).sum()
    assert neighbor_baseline_loss(torch.tensor(share), torch.zeros(5)) == pytest.approx(entropy)
    assert neighbor_baseline_loss(torch.tensor(share), torch.tensor(share)) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_copying_is_perfect_on_flat_images_and_reported_by_every_target(kind, tmp_path):
    encoder, head = make_encoder_and_head(kind, tmp_path)
    batch = make_batch(4)
    flat_batch = {**batch, "image": batch["image"][:, :, :1, :1].expand_as(batch["image"]).contiguous()}
    for case_batch, perfect in ((flat_batch, True), (batch, False)):
        output = head(encoder, case_batch, log_metrics=True)
        report = head.report(output.sums, float(output.weight))
        if "neighbor_accuracy" in report:
            assert (report["neighbor_accuracy"] == 1.0) == perfect
            assert report["neighbor_loss"] <= report["unigram_entropy"] + 1e-9
        else:
            unnormalized = not head.target.normalize
            assert report["neighbor_loss"] == pytest.approx(0, abs=1e-3) or not perfect
            assert report["neighbor_loss"] > 0.01 or perfect, unnormalized


@pytest.mark.parametrize("kind", KINDS)
def test_flat_patches_have_the_targets_of_flat_images(kind, tmp_path):
    """Each patch, at its own place, what an image of its color alone would have."""
    encoder, head = make_encoder_and_head(kind, tmp_path, **({"bits": 2} if kind == "mean_color" else {}))
    color = torch.randint(256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    targets = head.targets_of_flat_color(encoder, color)
    for index in range(16):
        image = color[:, :, index // 4, index % 4, None, None].expand(-1, -1, SIDE, SIDE).contiguous()
        assert torch.equal(targets[:, index], head.target.targets(encoder, image)[:, index]), index


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_is_compared_with_its_own_patches(kind, tmp_path):
    """Images of padding do not count, nor do steps without a row, in which it is not tried; evaluation always tries."""
    encoder, head = make_encoder_and_head(kind, tmp_path)
    batch = make_batch(4)
    half = {**batch, "valid": torch.tensor([True, True, False, False])}
    first = {name: value[:2] for name, value in batch.items()}
    expected = head(encoder, first, log_metrics=True)
    expected = head.report(expected.sums, 2.0)["neighbor_loss"]
    output = head(encoder, half, log_metrics=True)
    assert head.report(output.sums, 2.0)["neighbor_loss"] == pytest.approx(expected, rel=1e-5)
    unlogged = head(encoder, batch)
    assert output.sums.keys() - unlogged.sums.keys() == {"copied", "compared"}
    summed = {name: value + unlogged.sums.get(name, 0) for name, value in output.sums.items()}
    assert head.report(summed, 6.0)["neighbor_loss"] == pytest.approx(expected, rel=1e-5)
    head.eval()
    assert head(encoder, batch).sums.keys() == output.sums.keys()
