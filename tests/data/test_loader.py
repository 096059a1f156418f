"""The promise of the stream, by what reaches the model: the augmented pixels and the masks, not names of samples.

Every epoch brings every sample once; neither processes nor loader workers nor a resumption change a bit of it; and a
picture is cut and flipped by its seed alone, as Pillow would.
"""

import errno
import hashlib
import io
import itertools
import os
import random
import re
import tarfile
import threading
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import Dataset

from ssl_vit.convert.index_shards import VerifyShards, verify_all_shards
from ssl_vit.convert.sample_names import read_sample_names
from ssl_vit.data import manifest, workers
from ssl_vit.data.augment import should_flip
from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.data.loader import EvaluationStream, ProcessShard, TrainingStream, split_holdout
from ssl_vit.data.manifest import ENTRY, Manifest, Shard
from ssl_vit.errors import ExitCode
from ssl_vit.heads.corruption import draw
from ssl_vit.model import Batch
from ssl_vit.rng import sample_seed
from tests.conftest import COLORS
from tests.data.pictures import build_shards, encode_pil, picture, write_pictures
from tests.data.servers import assert_refused

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has
CPU = torch.device("cpu")
SIDE, PATCHES = 12, 9  # of the input; of it in patches of 4 x 4
MAX_SHARDS, MAX_SAMPLES = 5, 6  # shards of a set, samples of a shard
SIZES = st.lists(st.integers(0, MAX_SAMPLES), min_size=1, max_size=MAX_SHARDS).filter(any)
SEED, LANES, WINDOW = st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 3)
BATCH = st.integers(1, 12)


light_settings = partial(settings, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def write_tar(path: Path, images: list[bytes]) -> np.ndarray:
    """A tar of images, and the index of it, which is also saved beside it: image i of class i % 3."""
    rows = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, data in enumerate(images):
            member = tarfile.TarInfo(f"{number:09d}.img")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            rows.append((archive.offset - -(-len(data) // 512) * 512, len(data), number % 3, zlib.crc32(data)))
    index = np.array(rows, ENTRY)
    np.save(path.with_suffix(".npy"), index)
    return index


def make_manifest(folder: Path, *shards: tuple[str, int]) -> Manifest:
    """A data set of these tars and sizes."""
    entries = [Shard(name=f"{stem}.tar", samples=n, bytes=0, sha256=stem, index_sha256="") for stem, n in shards]
    return Manifest(folder, {}, ["a", "b", "c"], entries)


Sets = Callable[[list[int]], Manifest]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """Data sets by the sizes of their shards: no two images alike, JPEG (some decoded at half size) and PNG."""
    folder = tmp_path_factory.mktemp("sets")
    for shard in range(MAX_SHARDS):
        images = []
        for number in range(MAX_SAMPLES):
            kind = "PNG" if number % 3 == 2 else "JPEG"
            side = 90 if number == 1 else 12 + number
            images.append(encode_pil(picture(100 * shard + number, side, side + 3), kind))
        rows = write_tar(folder / f"{shard}.tar", images)
        for size in range(MAX_SAMPLES + 1):
            os.link(folder / f"{shard}.tar", folder / f"{shard}-{size}.tar")
            np.save(folder / f"{shard}-{size}.npy", rows[:size])

    return lambda sizes: make_manifest(folder, *((f"{shard}-{size}", size) for shard, size in enumerate(sizes)))


def data_config(lanes: int = 3, window: int = 1, workers: int = 0, **options: Any) -> Data:
    return Data(image_size=SIDE, lanes=lanes, shuffle_window=window, workers=workers, **options)


def batch_digests(batch: Batch) -> list[bytes]:
    """A digest of all that each sample of a batch means to the model."""
    assert batch["valid"].all()
    mask = draw(batch["seed"], PATCHES)
    parts = [batch["image"], batch["label"], batch["seed"], mask.index, mask.fate, mask.source]
    rows = zip(*(part.contiguous().numpy() for part in parts), strict=True)
    return [hashlib.sha256(b"".join(value.tobytes() for value in row)).digest() for row in rows]


def global_batches(
    dataset: Manifest,
    config: Data,
    seed: int,
    batch: int,
    samples_seen: int,
    steps: int,
    world: int = 1,
    micro: int | None = None,
) -> list[list[bytes]]:
    """The samples of each step, of all processes one after the other."""
    share = batch // world
    micro, ranks = micro or share, []
    for rank in range(world):
        stream = TrainingStream(dataset, config, seed, batch)
        with closing(stream.batches(samples_seen, ProcessShard(rank, world, micro), CPU)) as batches:  # type: ignore[type-var]
            micro_batches = itertools.islice(batches, steps * share // micro)
            ranks.append([digest for micro_batch in micro_batches for digest in batch_digests(micro_batch)])
        assert not stream.faults.drain()
    return [[n for digests in ranks for n in digests[step * share : (step + 1) * share]] for step in range(steps)]


def reference_pairs(dataset: Manifest, seed: int, epochs: int) -> dict[bytes, tuple[int, int]]:
    """What each (epoch, sample) must be, made one by one without any stream."""
    samples = SampleDataset(dataset, data_config(), seed, training=True)
    pairs = {}
    for pair in itertools.product(range(epochs), range(dataset.samples)):
        own_seed = sample_seed(seed, *pair)
        image, label = samples.load_sample(pair[1], own_seed)
        fields = dict(zip(("label", "seed", "valid"), map(torch.tensor, ([label], [own_seed], [True])), strict=True))
        pairs[batch_digests({"image": image[None], **fields})[0]] = pair
    assert len(pairs) == epochs * dataset.samples  # nothing is like another, in another epoch neither
    return pairs


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@light_settings()
@given(SIZES, SEED, LANES, WINDOW, st.sampled_from([4, 6, 8, 12, 24]), st.integers(0, 40), st.data())
def test_every_world_size_gives_the_same_global_batches(
    sets: Sets, sizes: list[int], seed: int, lanes: int, window: int, batch: int, seen: int, choose: st.DataObject
):
    """In micro batches of any size, from any position, also where there are fewer shards or samples than processes."""
    dataset, config = sets(sizes), data_config(lanes, window)
    expected = global_batches(dataset, config, seed, batch, seen, 2)
    for world in divisors(batch)[1:]:
        micro = choose.draw(st.sampled_from(divisors(batch // world)))
        assert global_batches(dataset, config, seed, batch, seen, 2, world, micro) == expected


@light_settings()
@given(SIZES, SEED, LANES, WINDOW, BATCH)
def test_every_epoch_is_the_data_set(sets: Sets, sizes: list[int], seed: int, lanes: int, window: int, batch: int):
    """Batches that span epochs, or are larger than one, included."""
    dataset = sets(sizes)
    steps = max(1, -(-2 * dataset.samples // batch))
    num_epochs, num_begun = divmod(steps * batch, dataset.samples)
    pair_of = reference_pairs(dataset, seed, num_epochs + bool(num_begun))
    step_digests = global_batches(dataset, data_config(lanes, window), seed, batch, 0, steps)
    pairs = [pair_of[digest] for digests in step_digests for digest in digests]
    assert len(set(pairs)) == len(pairs) == steps * batch
    assert {pair for pair in pairs if pair[0] < num_epochs} == set(
        itertools.product(range(num_epochs), range(dataset.samples))
    )
    assert sum(epoch == num_epochs for epoch, _ in pairs) == num_begun


@light_settings()
@given(SIZES, SEED, LANES, WINDOW, BATCH, st.integers(0, 5), st.lists(BATCH, min_size=1, max_size=4))
def test_a_run_goes_on_exactly_from_any_cut(
    sets: Sets, sizes: list[int], seed: int, lanes: int, window: int, batch: int, steps: int, others: list[int]
):
    """With its batch size the very same batches follow; with others, one after the other, the very same samples."""
    dataset, config = sets(sizes), data_config(lanes, window)
    straight_run = global_batches(dataset, config, seed, batch, 0, steps + 3)
    assert global_batches(dataset, config, seed, batch, steps * batch, 3) == straight_run[steps:]
    sequence = [n for (n,) in global_batches(dataset, config, seed, 1, 0, steps * batch + sum(others))]  # one by one
    samples_seen = 0
    for size in [batch] * steps + others:
        (actual,) = global_batches(dataset, config, seed, size, samples_seen, 1)
        assert Counter(actual) == Counter(sequence[samples_seen : samples_seen + size])
        samples_seen += size


@light_settings(max_examples=8)
@given(
    SIZES, SEED, LANES, st.integers(1, 3), st.sampled_from([1, 2]), st.integers(0, 30), st.sampled_from([1, 2, 3, 6])
)
def test_loader_workers_change_no_bit(
    sets: Sets, sizes: list[int], seed: int, lanes: int, workers: int, world: int, seen: int, micro: int
):
    """More of them than shards, than samples, or than micro batches, in one process or several."""
    dataset = sets(sizes)
    expected = global_batches(dataset, data_config(lanes), seed, 12, seen, 3)
    assert global_batches(dataset, data_config(lanes, workers=workers), seed, 12, seen, 3, world, micro) == expected


@light_settings(max_examples=15)
@given(SIZES.filter(lambda sizes: sum(sizes) > 3), SEED, LANES, st.floats(0.2, 0.9))
def test_an_epoch_of_a_subset_is_the_subset(sets: Sets, sizes: list[int], seed: int, lanes: int, share: float):
    dataset, config = sets(sizes), data_config(lanes, subset=share)
    count = TrainingStream(dataset, config, seed, 1).epoch_samples
    assert count == max(1, round(dataset.samples * share))
    pair_of, subset = reference_pairs(dataset, seed, 2), sorted(split_holdout(dataset.samples, config)[0].tolist())
    for epoch, digests in enumerate(global_batches(dataset, config, seed, count, 0, 2)):
        assert sorted(pair_of[digest] for digest in digests) == [(epoch, sample) for sample in subset]


def test_other_settings_of_the_loader_give_another_stream(sets: Sets):
    """So that the equalities above are not those of a stream that never changes."""
    dataset, default = sets([6, 5, 6, 3]), data_config()
    cases = [(default, 0, 0), (default, 1, 0), (default, 0, 4)]
    changes: list[Any] = [{"lanes": 1}, {"window": 3}, {"flip": False}, {"crop_area": (0.5, 1.0)}]
    cases += [(data_config(**change), 0, 0) for change in changes]
    streams = {str(global_batches(dataset, config, seed, 4, seen, 3)) for config, seed, seen in cases}
    assert len(streams) == len(cases)


GOLDEN = [
    [(0, 8), (0, 0), (0, 7), (0, 3), (0, 5), (0, 4)],
    [(0, 1), (0, 2), (1, 0), (1, 1), (0, 6), (1, 5)],
    [(1, 2), (1, 4), (1, 3), (1, 6), (1, 7), (1, 8)],
]
SEEDS = [618074419465792334, 2454421176976838069, 2687984551716291499]  # of the first three
MASK = [4, 0, 3, 2, 1]  # the corrupted patches of the first
DIGEST = "984bc9949f3f3202302bc4eea7f2cf0db41bad2a067e0da15b3f8e4c8c5b3bfa"  # of all that reaches the model


def test_the_stream_of_a_small_set_is_pinned(tmp_path: Path):
    """Plain colors, which no version of a decoder or a resizer changes: order, seeds, labels, pixels and masks.

    A change here breaks the resuming of every run, and is a new version of the plan.
    """
    shards, classes = [], []
    for number, size in enumerate((3, 4, 2)):
        colors = [(10 * i, 200 - 10 * i, i) for i in range(len(classes), len(classes) + size)]
        write_tar(tmp_path / f"{number}.tar", [encode_pil(Image.new("RGB", (9, 7), c), "PNG") for c in colors])
        shards.append((str(number), size))
        classes += [i % 3 for i in range(size)]
    stream = TrainingStream(make_manifest(tmp_path, *shards), data_config(lanes=2), seed=0, batch=6)
    batches = list(itertools.islice(stream.batches(0, ProcessShard(0, 1, 6), CPU), 3))
    for batch, pairs in zip(batches, GOLDEN, strict=True):
        assert batch["seed"].tolist() == [sample_seed(0, *pair) for pair in pairs]
        assert batch["image"][:, :, 0, 0].tolist() == [[10 * i, 200 - 10 * i, i] for _, i in pairs]
        assert (batch["image"] == batch["image"][:, :, :1, :1]).all()
        assert batch["label"].tolist() == [classes[i] for _, i in pairs]
    assert batches[0]["seed"].tolist()[:3] == SEEDS
    assert draw(batches[0]["seed"], PATCHES).index[0].tolist() == MASK
    assert (
        hashlib.sha256(b"".join(digest for batch in batches for digest in batch_digests(batch))).hexdigest() == DIGEST
    )


def test_ten_thousand_shards_are_begun_with_little_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """12.8 M samples: from the manifest on disk to the first batch, and to one in the middle of a later epoch.

    Neither an order of all samples is made, which alone would take 100 MB, nor more indexes read than a batch needs.
    All shards are the same file here.
    """
    (row,) = write_tar(tmp_path / "0.tar", [encode_pil(picture(1), "JPEG")])
    np.save(tmp_path / "0.npy", np.array([row] * 1280, ENTRY))
    digests = {"sha256": "0" * 64, "index_sha256": hashlib.sha256((tmp_path / "0.npy").read_bytes()).hexdigest()}
    shard = Shard(name="0.tar", samples=1280, bytes=(tmp_path / "0.tar").stat().st_size, **digests)
    manifest.save_manifest(Manifest(tmp_path, {}, ["a"], [shard] * 10_000))
    index, index_reads = Manifest.index, list[int]()
    monkeypatch.setattr(Manifest, "index", lambda self, shard: (index_reads.append(shard), index(self, shard))[1])
    for rank, samples_seen in ((0, 0), (7, 3 * 12_800_000 + 4_567_890)):
        index_reads.clear()
        tracemalloc.start()
        dataset = manifest.load(tmp_path)
        stream = TrainingStream(dataset, Data(image_size=32, workers=0), seed=1, batch=1024)
        batch = next(stream.batches(samples_seen, ProcessShard(rank, 8, 128), CPU))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (dataset.samples, int(batch["valid"].sum()), len(set(batch["seed"].tolist()))) == (12_800_000, 128, 128)
        assert peak < 50e6
        assert len(index_reads) == len(set(index_reads)) <= 16


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_memory_does_not_grow_with_epochs(tmp_path: Path, workers: int):
    """By the slope of each process's memory over 400 epochs, of its own alone: 30 bytes a sample would be seen."""
    for size in (3, 4, 5):
        write_tar(tmp_path / f"{size}.tar", [encode_pil(picture(i, 6, 6), "PNG") for i in range(size)])
    config = Data(image_size=4, workers=workers, lanes=2, shuffle_window=1)
    stream = TrainingStream(
        make_manifest(tmp_path, *((str(size), size) for size in (3, 4, 5))), config, seed=0, batch=12
    )
    assert stream.epoch_samples == 12
    parent = psutil.Process()
    other_pids, history = {process.pid for process in parent.children()}, []  # of other tests
    with closing(stream.batches(0, ProcessShard(0, 1, 12), CPU)) as batches:  # type: ignore[type-var]
        for epoch, batch in enumerate(itertools.islice(batches, 601)):
            del batch
            if epoch >= 200 and epoch % 20 == 0:
                memory = {process.pid: process.memory_info() for process in (parent, *parent.children())}
                history.append({pid: info.rss - info.shared for pid, info in memory.items()})
    pids = set.intersection(*map(set, history)) - other_pids
    assert len(pids) == 1 + workers
    for process in pids:
        series = [usage[process] for usage in history]
        slope = float(np.polyfit(range(len(series)), series, 1)[0]) * len(series)
        assert slope < 150_000, f"process {process}: {series}"


def distance(actual: torch.Tensor, expected: Image.Image) -> float:
    return float((actual.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()).abs().float().mean())


def test_a_batch_is_what_the_contract_says(sets: Sets):
    dataset = sets([6, 5])
    stream = TrainingStream(dataset, Data(image_size=(16, 24), workers=0, lanes=3, shuffle_window=1), seed=5, batch=8)
    keys, batch = next(stream.keys(0, ProcessShard(0, 1, 8))), next(stream.batches(0, ProcessShard(0, 1, 8), CPU))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "image": (torch.uint8, (8, 3, 16, 24)),
        "label": (torch.int64, (8,)),
        "seed": (torch.int64, (8,)),
        "valid": (torch.bool, (8,)),
    }
    assert keys == stream.plan.batch(0)
    assert batch["seed"].tolist() == [sample_seed(5, epoch, sample) for epoch, sample in keys]
    assert batch["label"].tolist() == [int(dataset.labels[sample]) for _, sample in keys]
    assert batch["valid"].all()


def test_evaluation_takes_each_sample_once(sets: Sets):
    dataset = sets([MAX_SAMPLES] * MAX_SHARDS)
    stream = EvaluationStream(dataset, data_config(), batch=4)
    for world in (1, 2, 3):
        ranks = [list(stream.batches(ProcessShard(rank, world, 4), CPU)) for rank in range(world)]
        batches = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert [len(batch["image"]) for batch in batches] == [4] * (-(-dataset.samples // (4 * world)) * world)
        valid, label = (torch.cat([batch[name] for batch in batches]) for name in ("valid", "label"))
        assert label[valid].tolist() == dataset.labels.tolist()
        assert (label[~valid] == -1).all()


def test_evaluation_sees_the_upright_center_and_never_changes(sets: Sets):
    samples = SampleDataset(sets([MAX_SAMPLES] * MAX_SHARDS), data_config(eval_crop=0.5), seed=0, training=False)
    for sample in range(MAX_SAMPLES * MAX_SHARDS):
        image_bytes, _ = samples.read_sample(sample)
        image = Image.open(io.BytesIO(image_bytes)).convert("RGB")
        side = round(min(image.size) * 0.5)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        center = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        assert all(distance(samples.crop(image_bytes, seed), center) < 6 for seed in (0, 1))


@pytest.mark.parametrize(("size", "bound"), [((130, 150), 0.7), ((20, 24), 5)], ids=["full scale", "half scale"])
def test_a_crop_is_what_pillow_makes_of_the_same_box(size: tuple[int, int], bound: float):
    """A large JPEG is decoded at half its size, where the box is rounded by at most a pixel."""
    samples = SampleDataset(Manifest(Path(), {}, [], []), Data(image_size=size), seed=0, training=True)
    image = picture(1, 211, 303)
    data = encode_pil(image, "JPEG", quality=95)
    for seed in range(40):
        box = samples.crop_box(211, 303, seed)
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        expected = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, edges)
        if should_flip(seed):
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert distance(samples.crop(data, seed), expected) < bound


@pytest.mark.parametrize("samples", [1, 2, 10, 1000])
def test_subsets_are_nested_and_of_the_right_size(samples: int):
    shares = [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0]
    nested = [split_holdout(samples, Data(subset=share))[0].tolist() for share in shares]
    assert [len(part) for part in nested] == [max(1, round(samples * share)) for share in shares]
    assert all(part == sorted(set(part)) for part in nested)
    assert all(set(small) <= set(large) for small, large in itertools.pairwise(nested))
    assert nested[-1] == list(range(samples))


def test_values_that_mean_nothing_are_refused():
    invalid: dict[str, list[Any]] = {"crop_area": [(0.5, 0.1), (0.0, 0.0), (0.5, 2.0)], "image_size": [0, (32, -1)]}
    invalid |= {"subset": [0], "eval_crop": [0], "workers": [-1]}
    for name, value in ((name, value) for name, values in invalid.items() for value in values):
        with pytest.raises(ValidationError, match=name):
            Data(**{name: value})


@given(st.integers(200, 3000), st.floats(0.05, 0.95), st.floats(0.1, 1))
def test_what_is_held_out_and_what_is_trained_on_are_all_and_disjoint(samples: int, hold_out: float, share: float):
    """C5.2a"""
    train_ids, held_out_ids = split_holdout(samples, Data(holdout=hold_out, subset=share))
    subset_ids = split_holdout(samples, Data(subset=share))[0]
    assert sorted([*train_ids, *held_out_ids]) == subset_ids.tolist()
    assert len(held_out_ids) == round(len(subset_ids) * hold_out)
    assert not set(train_ids) & set(held_out_ids)


def test_a_stream_trains_on_the_one_part_and_is_judged_on_the_other(shards: Path):
    dataset = manifest.load(shards / "train")
    config = Data(image_size=16, workers=0, holdout=0.3)
    stream = TrainingStream(dataset, config, seed=1, batch=4)
    epoch = [next(stream.keys(4 * i, ProcessShard(micro_batch=4))) for i in range(stream.epoch_samples // 4 + 1)]
    train_ids = {sample for keys in epoch for _, sample in keys}
    held_out = split_holdout(dataset.samples, config)[1]

    def evaluation_stream(batch: int) -> EvaluationStream:
        return EvaluationStream(dataset, config, batch, held_out)

    held_out_ids = {sample for keys in evaluation_stream(4).keys(ProcessShard(micro_batch=4)) for _, sample in keys} - {
        -1
    }
    assert train_ids | held_out_ids == set(range(dataset.samples))
    assert not train_ids & held_out_ids
    assert sum(
        int(batch["valid"].sum()) for batch in evaluation_stream(4).batches(ProcessShard(micro_batch=4), CPU)
    ) == len(held_out_ids)
    rank_keys = [evaluation_stream(2).keys(ProcessShard(r, 2, 2)) for r in range(2)]
    assert sorted(s for rank in rank_keys for keys in rank for _, s in keys if s >= 0) == sorted(held_out_ids)


@pytest.mark.parametrize(("samples", "hold_out"), [(4, 0.1), (1, 0.5), (3, 0.9)])
def test_a_part_that_would_be_empty_is_refused(samples: int, hold_out: float):
    assert_refused(lambda: split_holdout(samples, Data(holdout=hold_out)), ExitCode.DATA)


def test_samples_are_called_what_their_images_were(shards: Path):
    dataset = manifest.load(shards / "val")
    names = read_sample_names(dataset)
    assert len(names) == len(set(names)) == dataset.samples
    assert [name.split("/")[0] for name in names] == [sorted(COLORS)[label] for label in dataset.labels]
    joined = read_sample_names(manifest.join_manifests([dataset, manifest.load(shards / "train")]))
    assert joined[: dataset.samples] == names
    assert len(set(joined)) == len(joined)


# loader workers that end in the midst of handing a batch over (issue 17); sick ones of a run: tests/train


class LostBatch:
    """A batch whose memory cannot be handed over: its worker ends a little later, which torch has not noticed yet."""

    def __reduce__(self) -> Any:
        threading.Timer(0.2, os._exit, [1]).start()
        return raise_connection_reset, ("Connection reset by peer",)


def raise_connection_reset(message: str) -> None:
    raise ConnectionResetError(errno.ECONNRESET, message)


class UnreliableDataset(Dataset):
    """Batches that are lost on the way, or an error of the data set."""

    def __init__(self, fails: bool):
        self.fails = fails

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> LostBatch | None:
        return raise_connection_reset("the bucket's server hung up") if self.fails else LostBatch()

    def describe_sample(self, sample: int) -> str:
        return f"sample {sample}"


def test_a_worker_that_ends_while_it_hands_over_is_named_and_an_error_of_the_data_stays_what_it_is():
    load = lambda fails: next(workers.worker_batches(UnreliableDataset(fails), 1, timeout=60, size=1, device=CPU))  # noqa: E731
    with pytest.raises(RuntimeError, match="exited unexpectedly") as caught:
        load(False)
    exit_error = workers.diagnose_worker_failure(caught.value)
    assert exit_error is not None
    assert exit_error.code == ExitCode.INTERNAL
    assert re.match(r"loader worker 0 \(pid .*exited unexpectedly", str(exit_error))
    with pytest.raises(ConnectionResetError, match="the bucket's server hung up"):
        load(True)


# what takes minutes: `make test-long`; each prints its figure


@pytest.mark.long
def test_ten_thousand_flipped_bits(tmp_path: Path):
    """Anywhere in a shard: what the flip does not touch is delivered as it was, what it touches is named."""
    dataset = build_shards(
        write_pictures(tmp_path / "in", [f"{i}.jpg" for i in range(10)]), tmp_path / "out", shard_samples=10
    )
    path, rows = dataset.tar(0), dataset.index(0)
    original, rng, num_hit = path.read_bytes(), random.Random(5), 0

    def load_images() -> dict[int, torch.Tensor]:
        """Sample id -> pixels of those that can be had."""
        (batch,) = EvaluationStream(dataset, Data(image_size=16, workers=0), 10).batches(ProcessShard(), CPU)
        return {i: batch["image"][i] for i in range(10) if batch["valid"][i]}

    expected = load_images()
    for _ in range(10_000):
        position = rng.randrange(len(original))
        flipped = bytearray(original)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        touched = [i for i, row in enumerate(rows) if row["offset"] <= position < row["offset"] + row["size"]]
        num_hit += len(touched)
        actual = load_images()
        assert [i for i in range(10) if i not in actual] == touched
        assert all(torch.equal(actual[i], expected[i]) for i in actual)
    path.write_bytes(original)
    assert load_images().keys() == expected.keys()
    print(f"\n10,000 flipped bits: {num_hit} samples hit, {num_hit} named, 0 others lost or changed")


@pytest.mark.long
def test_a_cut_at_every_block_of_a_shard(tmp_path: Path):
    dataset = build_shards(
        write_pictures(tmp_path / "in", [f"{i}.jpg" for i in range(40)]), tmp_path / "out", shard_samples=40
    )
    original, rows = dataset.tar(0).read_bytes(), dataset.index(0)
    for cut in range(0, len(original), 512):
        dataset.tar(0).write_bytes(original[:cut])
        (state,) = verify_all_shards(VerifyShards(shards=(str(tmp_path / "out"),), full=True, workers=1, quiet=True))
        assert state.fault
        assert state.readable == sum(int(row["offset"]) + int(row["size"]) <= cut for row in rows)
    print(f"\n{len(original) // 512} cuts: good + bad = 40 each time")


@pytest.mark.long
def test_a_hundred_epochs_on_real_workers_bring_every_sample_once(tmp_path: Path):
    pictures = write_pictures(tmp_path / "in", [f"{i}.png" for i in range(60)], height=8)
    dataset = build_shards(pictures, tmp_path / "out", shard_samples=7)
    stream = TrainingStream(dataset, Data(image_size=8, workers=2, lanes=3, shuffle_window=1), seed=1, batch=12)
    key_batches = itertools.islice(stream.keys(0, ProcessShard(0, 1, 12)), 500)
    assert len({pair for keys in key_batches for pair in keys}) == 6000
    batches = itertools.islice(stream.batches(0, ProcessShard(0, 1, 12), CPU), 500)
    assert len({seed for batch in batches for seed in batch["seed"].tolist()}) == 6000
    print("\n100 epochs of 60 samples with 2 workers: 6,000 different (epoch, sample) pairs")
