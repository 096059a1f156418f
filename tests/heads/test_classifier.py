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

from ssl_vit.commands.setup import build
from ssl_vit.data.dataset import Data
from ssl_vit.encoders import weights
from ssl_vit.errors import DATA, USAGE, Refusal
from ssl_vit.heads import Head, clusters
from ssl_vit.heads.classifier import Classifier, Transfer
from ssl_vit.model import Model
from ssl_vit.recipes import Finetune, resolve
from tests.heads import masked
from tests.heads.masked import codebook_of, vit

CONFIGS = get_args(get_args(Head)[0])


def batch(count: int = 6, classes: int = 5) -> dict[str, torch.Tensor]:
    return masked.batch(count, classes=classes)


def model(config: Any = None, pool: str = "class", classes: int = 5) -> Model:
    torch.manual_seed(0)
    encoder = vit(pool=pool).build()
    return Model(encoder, (config or Transfer()).build(encoder, classes))


def loud(**options: float) -> Model:
    """A model of three classes whose head guesses something."""
    made = model(Transfer(**options), classes=3)  # type: ignore[arg-type]
    torch.nn.init.normal_(made.head.layers[0].weight)
    return made


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_head_steps_and_reports(kind, tmp_path):
    """A loss that moves every parameter (C2.8), sums that add over a split batch, a report; padding counts nothing."""
    is_clusters = kind is clusters.Clusters
    made = model(kind(codebook=codebook_of(tmp_path, "patch")) if is_clusters else kind())
    for parameter in made.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = batch()
    assert torch.equal(made(given, tokens=True), made.encoder(given["image"]))
    whole = made(given)
    parts = [made({name: value[half] for name, value in given.items()}) for half in (slice(0, 3), slice(3, 6))]
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value)
    torch.testing.assert_close((parts[0].loss + parts[1].loss) / 2, whole.loss)
    whole.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in made.head.parameters())
    report = made.head.report(whole.sums, float(whole.weight))
    assert all(isinstance(value, float) and math.isfinite(value) for value in report.values())
    assert math.isclose(report["loss"], whole.loss.item(), rel_tol=1e-5)
    padded = made(given | {"valid": torch.arange(6) < 3})
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
    made = model(config)
    assert math.isclose(made(batch()).loss.item(), want, abs_tol=1e-6, rel_tol=0 if want < 9 else 1e-6)
    *others, last = made.head.layers
    assert last.bias.unique().tolist() == [getattr(config, "bias", 0)]
    assert not last.weight.any()
    if isinstance(config, Classifier):
        assert [type(layer).__name__ for layer in others] == ["Linear", "Tanh"]
        assert others[0].out_features == (config.hidden or made.encoder.width)
        assert others[0].bias.abs().max() < 1


def test_a_zero_head_leaves_the_trunk_alone_in_its_first_step():
    """C1.5: bit-identical after one step of plain SGD."""
    made = model()
    before = {name: value.clone() for name, value in made.encoder.state_dict().items()}
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(batch()).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in made.encoder.state_dict().items())
    assert made.head.layers[0].weight.abs().sum() > 0


def test_top1_and_top5_count_like_a_sort_and_unlabelled_images_carry_no_loss():
    made, given = model(pool="mean"), batch()
    torch.nn.init.normal_(made.head.layers[0].weight)
    logits = made.head.layers(made.encoder(given["image"])[:, 1:].mean(1))
    output = made(given)
    assert output.sums["top1"] == (logits.argmax(1) == given["label"]).sum()
    assert output.sums["top5"] == output.weight == 6  # five classes
    some = made({name: value[:2] for name, value in given.items()})
    output = made(given | {"label": given["label"].where(torch.arange(6) < 2, -1)})
    torch.testing.assert_close(output.loss, some.loss)
    assert output.weight == 2
    torch.nn.init.constant_(made.head.layers[0].bias, float("nan"))
    sums = made(given).sums
    assert sums["top1"] == sums["top5"] == 0  # what is no number is right for none


# smoothing and mixing


def test_smoothing_is_torchs_in_training_and_none_in_evaluation():
    made, given = loud(smoothing=0.1), batch(classes=3)
    logits = made.eval()(given).logits
    want = F.cross_entropy(logits, given["label"], label_smoothing=0.1)
    torch.testing.assert_close(made.train()(given).loss, want)
    torch.testing.assert_close(made.eval()(given).loss, F.cross_entropy(logits, given["label"]))


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}])
def test_mixing_is_drawn_from_the_steps_seed_and_only_in_training(options: dict[str, float]):
    made, given = loud(**options), batch(classes=3)
    before = given["image"].clone()
    evaluated = made.eval()(given).loss
    made.train()
    state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(made(given).loss.item())
    assert losses[0] == losses[1] != losses[2]
    assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]
    assert torch.equal(given["image"], before)
    assert made.eval()(given).loss.item() == evaluated.item() == loud().eval()(given).loss.item()


def test_mixed_targets_are_the_shares_of_both_images():
    mix = loud(mixup=0.8).head.mix
    assert mix is not None
    given = batch(classes=3)
    torch.manual_seed(3)
    image, target = mix(given["image"], given["label"])
    share = target[0, 0]  # the first is of class 0, the last of class 2
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    torch.testing.assert_close(target[0], torch.stack([share, 0 * share, 1 - share]))
    want = given["image"][0].float() * share + given["image"][5].float() * (1 - share)
    torch.testing.assert_close(image[0], want, atol=1e-3, rtol=1e-5)
    with pytest.raises(Refusal) as end:  # an odd batch cannot be paired
        loud(mixup=0.8).train()(batch(5, classes=3))
    assert end.value.code == USAGE


# classifiers of others


def test_fine_tuning_a_timm_classifier_begins_with_timms_logits(tmp_path: Path):
    """head.keep: at step 0 the logits are those of the timm model."""
    torch.manual_seed(1)
    options: Any = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    theirs: Any = timm.create_model("vit_tiny_patch16_224", **options).eval()
    torch.nn.init.normal_(theirs.head.weight)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = '{"global_pool": "token", "model_args": {"num_heads": 2}, "pretrained_cfg": {"mean": [0.5], "std": [0.5]}}'
    (tmp_path / "config.json").write_text(config)
    recipe, tensors, source = resolve(Finetune(init=str(tmp_path), head=Transfer(keep=True), data=Data(image_size=32)))
    mine = build(recipe, 5, tensors, source)
    head = weights.read_classifier(str(tmp_path))[1]
    head.fill(mine.head.layers[0], list("abcde"), "it")
    given = masked.batch(6, side=32, classes=3)
    with torch.no_grad():
        want = theirs((given["image"].float() / 255 - 0.5) / 0.5)
        got = mine.eval()(given).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(Refusal) as end:
        head.fill(torch.nn.Linear(64, 4), list("abcd"), "it")
    assert end.value.code == DATA
    assert "5 classes there, 4 here" in end.value.message
