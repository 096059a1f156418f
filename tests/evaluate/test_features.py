"""Features against a plain loop and against timm's of the same weights; a cache that is whole or unused; accuracy."""

import os
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from ssl_vit.data import manifest
from ssl_vit.data.dataset import Data, Samples
from ssl_vit.data.loader import EvaluationStream, Share
from ssl_vit.encoders import export
from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.evaluate import features
from ssl_vit.evaluate.evaluators import HeldOut
from ssl_vit.evaluate.features import Features, Name, Split
from ssl_vit.heads.classifier import Transfer
from ssl_vit.model import Model, Sums
from tests import frozen

SMALL = Vit(size="Ti", width=16, depth=3, heads=2, patch=4, image=(16, 24))


@pytest.fixture(scope="module")
def encoder() -> VitEncoder:
    """Weights of a scale at which blocks, norm and positions all show."""
    torch.manual_seed(0)
    made = SMALL.build().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randint(256, (5, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_dense_features_equal_timms(encoder: VitEncoder, image: torch.Tensor, tmp_path: Path):
    """[B, D, rows, columns] after any block, through the final norm, in the order asked for."""
    export.export(encoder, tmp_path)
    twin: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = encoder.normalise(image)
    with torch.no_grad():
        want = twin.forward_intermediates(pixels, indices=[0, 1, 2], norm=True, intermediates_only=True)
    got = features.dense(encoder, image, (1, 2, 3))
    assert [tuple(one.shape) for one in got] == [(5, 16, 4, 6)] * 3
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got[0], got[2], atol=1e-2)
    torch.testing.assert_close(features.dense(encoder, image, (3, 1))[1], got[0])
    (last,) = features.dense(encoder, image)  # the default: the encoder's output
    with torch.no_grad():
        torch.testing.assert_close(last.flatten(2).transpose(1, 2), encoder(image)[:, 1:])
    assert not last.requires_grad


def test_the_layers_asked_for_are_the_encoders(encoder: VitEncoder, image: torch.Tensor):
    """One that it has not is named."""
    assert Features().names(encoder) == [(3, "mean"), (3, "class")]
    assert Features(layers=(1, 3), readouts=("class",)).names(encoder) == [(1, "class"), (3, "class")]
    for layer in (0, 4, -1):
        with pytest.raises(Exception, match=f"features.layers={layer}.*1 to 3"):
            Features(layers=(layer,)).names(encoder)
    for layer in (0, 4, -4, 99):
        with pytest.raises(Exception, match=f"{layer}"):
            features.dense(encoder, image, (layer,))


def test_a_feature_belongs_to_its_patch(encoder: VitEncoder, image: torch.Tensor):
    """Without blocks that mix them, a change in one patch changes the feature at its row and column only."""
    lone = Vit(size="Ti", width=16, depth=1, heads=2, patch=4, image=(16, 24)).build().eval()
    torch.nn.init.zeros_(lone.blocks[0].attn.proj.weight)  # type: ignore[union-attr, arg-type]
    changed = image.clone()
    changed[:, :, 4:8, 20:24] = 255 - changed[:, :, 4:8, 20:24]
    (before,), (after,) = features.dense(lone, image), features.dense(lone, changed)
    moved = (before - after).abs().amax((0, 1)) > 1e-4
    assert moved.nonzero().tolist() == [[1, 5]]


NAMES: list[Name] = [(1, "class"), (3, "mean"), (3, "class")]
DATA = Data(image_size=(16, 24), workers=0)
CPU = torch.device("cpu")


def drawn(shards: Path, batch: int = 4) -> EvaluationStream:
    return EvaluationStream(manifest.load(shards / "val"), DATA, batch)


def parts(encoder: VitEncoder, stream: EvaluationStream, rank: int = 0, world: int = 1) -> Iterator:
    """One process's parts; what it would be sent by the others stays 0."""
    share = Share(rank, world, stream.batch)
    return features.extract(encoder, NAMES, stream, share, CPU, lambda sums: sums)


def loop(encoder: VitEncoder, stream: EvaluationStream) -> tuple[dict[Name, np.ndarray], list[int]]:
    """The same, an image at a time: the block's tokens through the final norm, then read out."""
    rows: dict[Name, list[np.ndarray]] = {name: [] for name in NAMES}
    labels = []
    for i in range(stream.count):
        one, faults = stream.samples.batch([(0, i)])
        assert not faults
        with torch.no_grad():
            x = encoder.embed(one["image"])
            for number, block in enumerate(encoder.blocks, start=1):
                x = block(x)
                for name in NAMES:
                    if name[0] == number:
                        tokens = encoder.norm(x)[0].numpy()
                        rows[name].append(tokens[0] if name[1] == "class" else tokens[1:].mean(0))
        labels.append(int(one["label"]))
    return {name: np.stack(value) for name, value in rows.items()}, labels


def same(found: Split | None, want: tuple[dict[Name, np.ndarray], list[int]]) -> Split:
    assert found is not None
    for name in NAMES:
        np.testing.assert_allclose(found.features[name], want[0][name], atol=1e-5)
        assert found.features[name].dtype == np.float32
    assert found.labels.tolist() == want[1]
    return found


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 3), (3, 4), (16, 2)])
def test_features_equal_a_plain_loop_from_any_number_of_processes_and_come_back_from_the_disk(
    encoder: VitEncoder, shards: Path, tmp_path: Path, world: int, batch: int
):
    stream = drawn(shards, batch)
    assert stream.count % (world * batch), "the last batch is to be padded"
    assert features.load(tmp_path / "a", NAMES) is None
    ranks = [list(parts(encoder, drawn(shards, batch), rank, world)) for rank in range(world)]
    whole: Any = [
        (steps[0][0], {name: sum(part[name] for _, part in steps) for name in steps[0][1]})
        for steps in zip(*ranks, strict=True)
    ]
    features.write(tmp_path / "a", iter(whole), stream.count)
    found = same(features.load(tmp_path / "a", NAMES), loop(encoder, stream))
    assert found.bad_samples == 0
    assert isinstance(found.features[NAMES[0]], np.memmap), "larger than memory is fine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def flip(folder: Path, name: str = "3-mean.npy") -> None:
    with (folder / name).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\x7f\x7f")


LIST = "features.json"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a file is shorter": lambda folder: os.truncate(folder / "3-mean.npy", (folder / "3-mean.npy").stat().st_size - 8),
    "a bit is another": flip,
    "labels are others": lambda folder: flip(folder, "label.npy"),
    "an array is gone": lambda folder: (folder / "1-class.npy").unlink(),
    "the list is gone": lambda folder: (folder / LIST).unlink(),
    "the list is half": lambda folder: os.truncate(folder / LIST, 40),
    "the list is another thing": lambda folder: (folder / LIST).write_text("[]"),
    "the list lists no digests": lambda folder: (folder / LIST).write_text('{"files": []}'),
    "the list is empty and an array another": lambda folder: (
        flip(folder),
        (folder / LIST).write_text('{"files": {}}'),
    ),
}


@pytest.mark.parametrize("what", [*DAMAGE, "it was interrupted"])
def test_a_damaged_cache_is_not_used_and_is_written_anew(what: str, encoder: VitEncoder, shards: Path, tmp_path: Path):
    stream, folder = drawn(shards), tmp_path / "a"

    def cut() -> Iterator:
        yield next(parts(encoder, stream))
        raise KeyboardInterrupt

    if what in DAMAGE:
        features.write(folder, parts(encoder, stream), stream.count)
        DAMAGE[what](folder)
    else:
        with pytest.raises(KeyboardInterrupt):
            features.write(folder, cut(), stream.count)
    assert features.load(folder, NAMES) is None
    features.write(folder, parts(encoder, drawn(shards)), stream.count)
    same(features.load(folder, NAMES), loop(encoder, stream))


def test_the_digest_is_of_everything_that_features_depend_on(encoder: VitEncoder, shards: Path, tmp_path: Path):
    """Also of the images themselves: other pixels under the same names, labels and counts."""
    made = [
        frozen.shards(tmp_path / f"{seed}", [f"{c}/{i}.png" for c in "ab" for i in range(3)], seed) for seed in (0, 1)
    ]
    streams = [EvaluationStream(manifest.load(one), DATA, 4) for one in made]
    assert features.digest(encoder, NAMES, streams[0]) != features.digest(encoder, NAMES, streams[1])
    stream = drawn(shards)
    base = features.digest(encoder, NAMES, stream)
    assert base == features.digest(encoder, NAMES, drawn(shards, batch=7)), "a batch is not part of it"
    split = manifest.load(shards / "val")
    changed = {
        "another split": (encoder, NAMES, EvaluationStream(manifest.load(shards / "train"), DATA, 4)),
        "a part of it": (encoder, NAMES, EvaluationStream(split, DATA, 4, np.arange(5))),
        "another part": (encoder, NAMES, EvaluationStream(split, DATA, 4, np.arange(1, 6))),
        "another size": (encoder, NAMES, EvaluationStream(split, DATA.model_copy(update={"image_size": 16}), 4)),
        "another crop": (encoder, NAMES, EvaluationStream(split, DATA.model_copy(update={"eval_crop": 0.5}), 4)),
        "other features": (encoder, NAMES[:2], stream),
    }
    other = SMALL.build().eval()
    other.load_state_dict(encoder.state_dict())
    assert features.digest(other, NAMES, stream) == base, "the same weights, whichever object holds them"
    with torch.no_grad():
        other.blocks[1].mlp.fc1.bias[3] += 1e-6  # type: ignore[index, union-attr]
    changed["a weight"] = (other, NAMES, stream)
    grey = SMALL.model_copy(update={"mean": (0.4,)}).build().eval()
    grey.load_state_dict(encoder.state_dict())
    changed["another normalisation"] = (grey, NAMES, stream)
    found = {what: features.digest(*given) for what, given in changed.items()}
    assert len({base, *found.values()}) == len(found) + 1, found


# --- accuracy: each sample of a split counts once, whatever the processes and the padding

SQUARE = Data(image_size=16, workers=0)


def judge() -> Model:
    """A model whose answers are mixed: right for some, wrong for others."""
    torch.manual_seed(0)
    encoder = Vit(size="Ti", width=32, depth=1, heads=2, patch=4, image=16).build()
    model = Model(encoder, Transfer().build(encoder, 3)).eval()
    torch.nn.init.normal_(model.head.layers[0].weight)
    return model


@pytest.mark.parametrize(("world", "batch"), [(1, 5), (2, 3), (3, 4), (16, 2)])
def test_accuracy_equals_a_plain_loop_over_the_split(shards: Path, world: int, batch: int):
    split, model = manifest.load(shards / "val"), judge()
    samples = Samples(split, SQUARE, seed=0, training=False)
    right, loss = 0, 0.0
    for i in range(split.samples):
        one, faults = samples.batch([(0, i)])
        assert not faults
        with torch.no_grad():
            logits = model.head.layers(model.encoder(one["image"])[:, 0])
        right += int(logits.argmax()) == int(one["label"])
        loss += float(torch.nn.functional.cross_entropy(logits, one["label"]))
    assert 0 < right < split.samples

    stream, taken = EvaluationStream(split, SQUARE, batch), []

    def collect(sums: Sums) -> Sums:
        taken.append(sums)
        return {**sums, "_weight": torch.tensor(1)}  # what one process has alone is of no interest here

    with torch.no_grad():
        for rank in range(world):
            list(HeldOut(stream, Share(rank, world, batch), CPU, collect, model.head.report).run(model))
    whole = reduce(lambda a, b: {name: a[name] + b[name] for name in a}, taken)
    assert whole["_weight"] == split.samples
    assert whole["top1"] == right
    assert whole["top5"] == split.samples
    assert float(whole["loss"]) == pytest.approx(loss, rel=1e-5)
