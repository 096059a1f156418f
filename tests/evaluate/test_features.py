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
from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.data.loader import EvaluationStream, ProcessShard
from ssl_vit.distributed import Distributed
from ssl_vit.encoders import export
from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.evaluate import features
from ssl_vit.evaluate.evaluators import HeadEvaluator
from ssl_vit.evaluate.features import FeatureName, Features, Split
from ssl_vit.heads.classifier import Transfer
from ssl_vit.model import Model, Sums
from tests import evaluate_cases

SMALL = Vit(size="Ti", width=16, depth=3, heads=2, patch=4, image=(16, 24))


@pytest.fixture(scope="module")
def encoder() -> VitEncoder:
    """Weights of a scale at which blocks, norm and positions all show."""
    torch.manual_seed(0)
    vit = SMALL.build().eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randint(256, (5, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_dense_features_equal_timms(encoder: VitEncoder, image: torch.Tensor, tmp_path: Path):
    """[B, D, rows, columns] after any block, through the final norm, in the order asked for."""
    export.export_encoder(encoder, tmp_path)
    timm_model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = encoder.normalize(image)
    with torch.no_grad():
        expected = timm_model.forward_intermediates(pixels, indices=[0, 1, 2], norm=True, intermediates_only=True)
    actual = features.dense(encoder, image, (1, 2, 3))
    assert [tuple(feature.shape) for feature in actual] == [(5, 16, 4, 6)] * 3
    for feature, expected_feature in zip(actual, expected, strict=True):
        torch.testing.assert_close(feature, expected_feature, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual[0], actual[2], atol=1e-2)
    torch.testing.assert_close(features.dense(encoder, image, (3, 1))[1], actual[0])
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
    single_block = Vit(size="Ti", width=16, depth=1, heads=2, patch=4, image=(16, 24)).build().eval()
    torch.nn.init.zeros_(single_block.blocks[0].attn.proj.weight)  # type: ignore[union-attr, arg-type]
    changed = image.clone()
    changed[:, :, 4:8, 20:24] = 255 - changed[:, :, 4:8, 20:24]
    (before,), (after,) = features.dense(single_block, image), features.dense(single_block, changed)
    moved = (before - after).abs().amax((0, 1)) > 1e-4
    assert moved.nonzero().tolist() == [[1, 5]]


NAMES: list[FeatureName] = [(1, "class"), (3, "mean"), (3, "class")]
DATA = Data(image_size=(16, 24), workers=0)
CPU = torch.device("cpu")


def make_stream(shards: Path, batch: int = 4) -> EvaluationStream:
    return EvaluationStream(manifest.load(shards / "val"), DATA, batch)


class Alone(Distributed):
    """One process of several, which is sent nothing by the others."""

    def all_reduce(self, sums: Sums) -> Sums:
        return sums


def extract_parts(encoder: VitEncoder, stream: EvaluationStream, rank: int = 0, world: int = 1) -> Iterator:
    """One process's parts; what it would be sent by the others stays 0."""
    share = ProcessShard(rank, world, stream.batch)
    return features.extract_features(encoder, NAMES, stream, share, Alone(rank, world))


def features_by_loop(encoder: VitEncoder, stream: EvaluationStream) -> tuple[dict[FeatureName, np.ndarray], list[int]]:
    """The same, an image at a time: the block's tokens through the final norm, then read out."""
    rows: dict[FeatureName, list[np.ndarray]] = {name: [] for name in NAMES}
    labels = []
    for i in range(stream.count):
        sample, faults = stream.samples.batch([(0, i)])
        assert not faults
        with torch.no_grad():
            x = encoder.embed(sample["image"])
            for number, block in enumerate(encoder.blocks, start=1):
                x = block(x)
                for name in NAMES:
                    if name[0] == number:
                        tokens = encoder.norm(x)[0].numpy()
                        rows[name].append(tokens[0] if name[1] == "class" else tokens[1:].mean(0))
        labels.append(int(sample["label"]))
    return {name: np.stack(value) for name, value in rows.items()}, labels


def check_same_features(actual: Split | None, expected: tuple[dict[FeatureName, np.ndarray], list[int]]) -> Split:
    assert actual is not None
    for name in NAMES:
        np.testing.assert_allclose(actual.features[name], expected[0][name], atol=1e-5)
        assert actual.features[name].dtype == np.float32
    assert actual.labels.tolist() == expected[1]
    return actual


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 3), (3, 4), (16, 2)])
def test_features_equal_a_plain_loop_from_any_number_of_processes_and_come_back_from_the_disk(
    encoder: VitEncoder, shards: Path, tmp_path: Path, world: int, batch: int
):
    stream = make_stream(shards, batch)
    assert stream.count % (world * batch), "the last batch is to be padded"
    assert features.load_features(tmp_path / "a", NAMES) is None
    ranks = [list(extract_parts(encoder, make_stream(shards, batch), rank, world)) for rank in range(world)]
    summed: Any = [
        (steps[0][0], {name: sum(part[name] for _, part in steps) for name in steps[0][1]})
        for steps in zip(*ranks, strict=True)
    ]
    features.write_features(tmp_path / "a", iter(summed), stream.count)
    split = check_same_features(features.load_features(tmp_path / "a", NAMES), features_by_loop(encoder, stream))
    assert split.bad_samples == 0
    assert isinstance(split.features[NAMES[0]], np.memmap), "larger than memory is fine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def flip_bits(folder: Path, name: str = "3-mean.npy") -> None:
    with (folder / name).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\x7f\x7f")


INDEX_FILE = "features.json"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a file is shorter": lambda folder: os.truncate(folder / "3-mean.npy", (folder / "3-mean.npy").stat().st_size - 8),
    "a bit is another": flip_bits,
    "labels are others": lambda folder: flip_bits(folder, "label.npy"),
    "an array is gone": lambda folder: (folder / "1-class.npy").unlink(),
    "the list is gone": lambda folder: (folder / INDEX_FILE).unlink(),
    "the list is half": lambda folder: os.truncate(folder / INDEX_FILE, 40),
    "the list is another thing": lambda folder: (folder / INDEX_FILE).write_text("[]"),
    "the list lists no digests": lambda folder: (folder / INDEX_FILE).write_text('{"files": []}'),
    "the list is empty and an array another": lambda folder: (
        flip_bits(folder),
        (folder / INDEX_FILE).write_text('{"files": {}}'),
    ),
}


@pytest.mark.parametrize("what", [*DAMAGE, "it was interrupted"])
def test_a_damaged_cache_is_not_used_and_is_written_anew(what: str, encoder: VitEncoder, shards: Path, tmp_path: Path):
    stream, folder = make_stream(shards), tmp_path / "a"

    def interrupted_parts() -> Iterator:
        yield next(extract_parts(encoder, stream))
        raise KeyboardInterrupt

    if what in DAMAGE:
        features.write_features(folder, extract_parts(encoder, stream), stream.count)
        DAMAGE[what](folder)
    else:
        with pytest.raises(KeyboardInterrupt):
            features.write_features(folder, interrupted_parts(), stream.count)
    assert features.load_features(folder, NAMES) is None
    features.write_features(folder, extract_parts(encoder, make_stream(shards)), stream.count)
    check_same_features(features.load_features(folder, NAMES), features_by_loop(encoder, stream))


def test_the_digest_is_of_everything_that_features_depend_on(encoder: VitEncoder, shards: Path, tmp_path: Path):
    """Also of the images themselves: other pixels under the same names, labels and counts."""
    shard_folders = [
        evaluate_cases.write_shards(tmp_path / f"{seed}", [f"{c}/{i}.png" for c in "ab" for i in range(3)], seed)
        for seed in (0, 1)
    ]
    streams = [EvaluationStream(manifest.load(folder), DATA, 4) for folder in shard_folders]
    assert features.features_digest(encoder, NAMES, streams[0]) != features.features_digest(encoder, NAMES, streams[1])
    stream = make_stream(shards)
    base = features.features_digest(encoder, NAMES, stream)
    assert base == features.features_digest(encoder, NAMES, make_stream(shards, batch=7)), "a batch is not part of it"
    split = manifest.load(shards / "val")
    variants = {
        "another split": (encoder, NAMES, EvaluationStream(manifest.load(shards / "train"), DATA, 4)),
        "a part of it": (encoder, NAMES, EvaluationStream(split, DATA, 4, np.arange(5))),
        "another part": (encoder, NAMES, EvaluationStream(split, DATA, 4, np.arange(1, 6))),
        "another size": (encoder, NAMES, EvaluationStream(split, DATA.model_copy(update={"image_size": 16}), 4)),
        "another crop": (encoder, NAMES, EvaluationStream(split, DATA.model_copy(update={"eval_crop": 0.5}), 4)),
        "other features": (encoder, NAMES[:2], stream),
    }
    copied = SMALL.build().eval()
    copied.load_state_dict(encoder.state_dict())
    assert features.features_digest(copied, NAMES, stream) == base, "the same weights, whichever object holds them"
    with torch.no_grad():
        copied.blocks[1].mlp.fc1.bias[3] += 1e-6  # type: ignore[index, union-attr]
    variants["a weight"] = (copied, NAMES, stream)
    gray = SMALL.model_copy(update={"mean": (0.4,)}).build().eval()
    gray.load_state_dict(encoder.state_dict())
    variants["another normalization"] = (gray, NAMES, stream)
    digests = {case: features.features_digest(*args) for case, args in variants.items()}
    assert len({base, *digests.values()}) == len(digests) + 1, digests


# --- accuracy: each sample of a split counts once, whatever the processes and the padding

SQUARE = Data(image_size=16, workers=0)


def make_classifier() -> Model:
    """A model whose answers are mixed: right for some, wrong for others."""
    torch.manual_seed(0)
    encoder = Vit(size="Ti", width=32, depth=1, heads=2, patch=4, image=16).build()
    model = Model(encoder, Transfer().build(encoder, 3)).eval()
    torch.nn.init.normal_(model.head.layers[0].weight)
    return model


@pytest.mark.parametrize(("world", "batch"), [(1, 5), (2, 3), (3, 4), (16, 2)])
def test_accuracy_equals_a_plain_loop_over_the_split(shards: Path, world: int, batch: int):
    split, model = manifest.load(shards / "val"), make_classifier()
    samples = SampleDataset(split, SQUARE, seed=0, training=False)
    num_correct, loss = 0, 0.0
    for i in range(split.samples):
        sample, faults = samples.batch([(0, i)])
        assert not faults
        with torch.no_grad():
            logits = model.head.layers(model.encoder(sample["image"])[:, 0])
        num_correct += int(logits.argmax()) == int(sample["label"])
        loss += float(torch.nn.functional.cross_entropy(logits, sample["label"]))
    assert 0 < num_correct < split.samples

    stream, all_sums = EvaluationStream(split, SQUARE, batch), []

    class Recorder(Distributed):
        def all_reduce(self, sums: Sums) -> Sums:
            all_sums.append(sums)
            return {**sums, "_weight": torch.tensor(1)}  # what one process has alone is of no interest here

    with torch.no_grad():
        for rank in range(world):
            shard, processes = ProcessShard(rank, world, batch), Recorder(rank, world)
            list(HeadEvaluator(stream, shard, processes, model.head.report).run(model))
    total = reduce(lambda a, b: {name: a[name] + b[name] for name in a}, all_sums)
    assert total["_weight"] == split.samples
    assert total["top1"] == num_correct
    assert total["top5"] == split.samples
    assert float(total["loss"]) == pytest.approx(loss, rel=1e-5)
