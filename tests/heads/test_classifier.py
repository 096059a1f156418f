"""The contract of every head; the supervised heads' own promises; mixing, and going on from a classifier."""

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ssl_vit.commands.setup import build_model
from ssl_vit.data.dataset import Data
from ssl_vit.encoders import weights
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.heads import Head, clusters
from ssl_vit.heads.classifier import Classifier, Transfer
from ssl_vit.model import Model
from ssl_vit.recipes import Finetune, resolve_recipe
from tests.heads import masked
from tests.heads.masked import make_codebook, vit

CONFIGS = get_args(get_args(Head)[0])


def make_batch(count: int = 6, classes: int = 5) -> dict[str, torch.Tensor]:
    return masked.make_batch(count, classes=classes)


def make_model(config: Any = None, pool: str = "class", classes: int = 5) -> Model:
    torch.manual_seed(0)
    encoder = vit(pool=pool).build()
    return Model(encoder, (config or Transfer()).build(encoder, classes))


def make_guessing_model(**options: float) -> Model:
    """A model of three classes whose head guesses something."""
    model = make_model(Transfer(**options), classes=3)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.layers[0].weight)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_head_steps_and_reports(kind, tmp_path):
    """A loss that moves every parameter (C2.8), sums that add over a split batch, a report; padding counts nothing."""
    is_clusters = kind is clusters.Clusters
    model = make_model(kind(codebook=make_codebook(tmp_path, "patch")) if is_clusters else kind())
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch()
    assert torch.equal(model(batch, tokens=True), model.encoder(batch["image"]))
    output = model(batch, log_metrics=True)
    halves = ({name: value[half] for name, value in batch.items()} for half in (slice(0, 3), slice(3, 6)))
    parts = [model(half, log_metrics=True) for half in halves]
    for name, value in output.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value)
    torch.testing.assert_close((parts[0].loss + parts[1].loss) / 2, output.loss)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.head.parameters())
    report = model.head.report(output.sums, float(output.weight))
    assert all(isinstance(value, float) and math.isfinite(value) for value in report.values())
    assert math.isclose(report["loss"], output.loss.item(), rel_tol=1e-5)
    padded = model(batch | {"valid": torch.arange(6) < 3}, log_metrics=True)
    torch.testing.assert_close(padded.loss, parts[0].loss)
    assert padded.weight == parts[0].weight == 3
    for name, value in parts[0].sums.items():
        torch.testing.assert_close(padded.sums[name], value)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (Transfer(), math.log(5)),
        (Classifier(hidden=9), math.log(5)),
        (Classifier(loss="sigmoid"), 5 * math.log(2)),  # it sums over classes
        (Classifier(bias=-10), math.log(5)),
        (Classifier(loss="sigmoid", bias=-10), 10 + 5 * math.log1p(math.exp(-10))),  # no to all: one of them is wrong
    ],
)
def test_a_fresh_head_guesses_uniformly(config, want):
    """C1.4; its last bias starts where it is told; before that a classifier has one layer of tanh."""
    model = make_model(config)
    assert math.isclose(model(make_batch()).loss.item(), want, abs_tol=1e-6, rel_tol=0 if want < 9 else 1e-6)
    *hidden_layers, last = model.head.layers
    assert last.bias.unique().tolist() == [getattr(config, "bias", 0)]
    assert not last.weight.any()
    if isinstance(config, Classifier):
        assert [type(layer).__name__ for layer in hidden_layers] == ["Linear", "Tanh"]
        assert hidden_layers[0].out_features == (config.hidden or model.encoder.width)
        assert hidden_layers[0].bias.abs().max() < 1


def test_a_zero_head_leaves_the_trunk_alone_in_its_first_step():
    """C1.5: bit-identical after one step of plain SGD."""
    model = make_model()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(make_batch()).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert model.head.layers[0].weight.abs().sum() > 0


def test_top1_and_top5_count_like_a_sort_and_unlabeled_images_carry_no_loss():
    model, batch = make_model(pool="mean"), make_batch()
    torch.nn.init.normal_(model.head.layers[0].weight)
    logits = model.head.layers(model.encoder(batch["image"])[:, 1:].mean(1))
    output = model(batch)
    assert output.sums["top1"] == (logits.argmax(1) == batch["label"]).sum()
    assert output.sums["top5"] == output.weight == 6  # five classes
    labeled = model({name: value[:2] for name, value in batch.items()})
    output = model(batch | {"label": batch["label"].where(torch.arange(6) < 2, -1)})
    torch.testing.assert_close(output.loss, labeled.loss)
    assert output.weight == 2
    torch.nn.init.constant_(model.head.layers[0].bias, float("nan"))
    sums = model(batch).sums
    assert sums["top1"] == sums["top5"] == 0  # what is no number is right for none


# smoothing and mixing


def test_smoothing_is_torchs_in_training_and_none_in_evaluation():
    model, batch = make_guessing_model(smoothing=0.1), make_batch(classes=3)
    logits = model.eval()(batch).logits
    expected = F.cross_entropy(logits, batch["label"], label_smoothing=0.1)
    torch.testing.assert_close(model.train()(batch).loss, expected)
    torch.testing.assert_close(model.eval()(batch).loss, F.cross_entropy(logits, batch["label"]))


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}])
def test_mixing_is_drawn_from_the_steps_seed_and_only_in_training(options: dict[str, float]):
    model, batch = make_guessing_model(**options), make_batch(classes=3)
    before = batch["image"].clone()
    evaluated = model.eval()(batch).loss
    model.train()
    state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(batch).loss.item())
    assert losses[0] == losses[1] != losses[2]
    assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]
    assert torch.equal(batch["image"], before)
    assert model.eval()(batch).loss.item() == evaluated.item() == make_guessing_model().eval()(batch).loss.item()


def test_mixed_targets_are_the_shares_of_both_images():
    mix = make_guessing_model(mixup=0.8).head.mix
    assert mix is not None
    batch = make_batch(classes=3)
    torch.manual_seed(3)
    image, target = mix(batch["image"], batch["label"])
    share = target[0, 0]  # the first is of class 0, the last of class 2
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    torch.testing.assert_close(target[0], torch.stack([share, 0 * share, 1 - share]))
    expected = batch["image"][0].float() * share + batch["image"][5].float() * (1 - share)
    torch.testing.assert_close(image[0], expected, atol=1e-3, rtol=1e-5)
    with pytest.raises(ExitError) as error:  # an odd batch cannot be paired
        make_guessing_model(mixup=0.8).train()(make_batch(5, classes=3))
    assert error.value.code == ExitCode.USAGE


# classifiers of others


def test_fine_tuning_a_timm_classifier_begins_with_timms_logits(tmp_path: Path):
    """head.keep: at step 0 the logits are those of the timm model."""
    torch.manual_seed(1)
    options: Any = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    timm_model: Any = timm.create_model("vit_tiny_patch16_224", **options).eval()
    torch.nn.init.normal_(timm_model.head.weight)
    save_file(timm_model.state_dict(), tmp_path / "model.safetensors")
    config = '{"global_pool": "token", "model_args": {"num_heads": 2}, "pretrained_cfg": {"mean": [0.5], "std": [0.5]}}'
    (tmp_path / "config.json").write_text(config)
    recipe, tensors, source = resolve_recipe(
        Finetune(init=str(tmp_path), head=Transfer(keep=True), data=Data(image_size=32))
    )
    model = build_model(recipe, 5, tensors, source)
    head = weights.read_classifier(str(tmp_path))[1]
    head.load_into_layer(model.head.layers[0], list("abcde"), "it")
    batch = masked.make_batch(6, side=32, classes=3)
    with torch.no_grad():
        expected = timm_model((batch["image"].float() / 255 - 0.5) / 0.5)
        actual = model.eval()(batch).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ExitError) as error:
        head.load_into_layer(torch.nn.Linear(64, 4), list("abcd"), "it")
    assert error.value.code == ExitCode.DATA
    assert "5 classes there, 4 here" in error.value.message
