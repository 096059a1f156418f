"""Label smoothing, mixup and CutMix in fine-tuning; going on from a classifier."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl_vit.data.samples import Data
from ssl_vit.encoders import classified, export
from ssl_vit.encoders.vit import Vit
from ssl_vit.exits import DATA, USAGE, Refusal
from ssl_vit.heads.transfer import Transfer
from ssl_vit.model import Model
from ssl_vit.recipe import Finetune, build, resolve

ENCODER = Vit(size="Ti", width=16, depth=2, heads=2, patch=4, image=16)


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    label = torch.arange(count) % 3
    return {"image": image, "label": label, "seed": label.clone(), "valid": torch.ones(count, dtype=torch.bool)}


def model(**options: float) -> Model:
    torch.manual_seed(0)
    encoder = ENCODER.build()
    made = Model(encoder, Transfer(**options).build(encoder, 3))  # type: ignore[arg-type]
    torch.nn.init.normal_(made.head.layers[0].weight)
    return made


def test_smoothing_is_torchs_in_training_and_none_in_evaluation():
    made, given = model(smoothing=0.1), batch()
    logits = made.eval()(given).logits
    want = F.cross_entropy(logits, given["label"], label_smoothing=0.1)
    torch.testing.assert_close(made.train()(given).loss, want)
    torch.testing.assert_close(made.eval()(given).loss, F.cross_entropy(logits, given["label"]))


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}])
def test_mixing_is_drawn_from_the_steps_seed_and_only_in_training(options: dict[str, float]):
    made, given = model(**options), batch()
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
    assert made.eval()(given).loss.item() == evaluated.item() == model().eval()(given).loss.item()


def test_mixed_targets_are_the_shares_of_both_images():
    mix = Transfer(mixup=0.8).build(ENCODER.build(), 3).mix
    assert mix is not None
    given = batch()
    torch.manual_seed(3)
    image, target = mix(given["image"], given["label"])
    share = target[0, 0]  # the first is of class 0, the last of class 2
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    torch.testing.assert_close(target[0], torch.stack([share, 0 * share, 1 - share]))
    want = given["image"][0].float() * share + given["image"][5].float() * (1 - share)
    torch.testing.assert_close(image[0], want, atol=1e-3, rtol=1e-5)


def test_an_odd_batch_cannot_be_paired():
    with pytest.raises(Refusal) as end:
        model(mixup=0.8).train()(batch(5))
    assert end.value.code == USAGE


def test_fine_tuning_a_timm_classifier_begins_with_timms_logits(tmp_path: Path):
    """head.keep: at step 0 the logits are those of the timm model (issue 6)."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    options: Any = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    theirs: Any = timm.create_model("vit_tiny_patch16_224", **options).eval()
    torch.nn.init.normal_(theirs.head.weight)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = '{"global_pool": "token", "model_args": {"num_heads": 2}, "pretrained_cfg": {"mean": [0.5], "std": [0.5]}}'
    (tmp_path / "config.json").write_text(config)
    recipe, tensors, source = resolve(Finetune(init=str(tmp_path), head=Transfer(keep=True), data=Data(image_size=32)))
    mine = build(recipe, 5, tensors, source)
    head = classified.read_classifier(str(tmp_path))[1]
    head.fill(mine.head.layers[0], list("abcde"), "it")
    given = batch()
    given["image"] = F.interpolate(given["image"], size=32)
    with torch.no_grad():
        want = theirs((given["image"].float() / 255 - 0.5) / 0.5)
        got = mine.eval()(given).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(Refusal) as end:
        head.fill(torch.nn.Linear(64, 4), list("abcd"), "it")
    assert end.value.code == DATA
    assert "5 classes there, 4 here" in end.value.message


def test_an_exported_classifier_is_timms_and_comes_back(tmp_path: Path):
    import timm

    made = model().eval()
    layer = made.head.layers[0]
    names = ["a|b", "<script>", "ü\n,"]
    head = classified.Classifier(layer.weight.detach(), layer.bias.detach(), names, 0.9)
    export.export(made.encoder, tmp_path / "classifier", head)
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'classifier'}", pretrained=True).eval()
    given = batch()
    with torch.no_grad():
        want = made(given).logits
        torch.testing.assert_close(theirs((given["image"].float() / 255 - 0.5) / 0.5), want, atol=1e-5, rtol=1e-5)
    encoder, again = classified.read_classifier(str(tmp_path))
    assert (again.names, again.crop) == (names, 0.9)
    assert torch.equal(again.weight, layer.weight)
    assert encoder.config == made.encoder.config
    assert theirs.pretrained_cfg["label_names"] == names
