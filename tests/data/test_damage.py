"""Damaged shards of ours: good + bad = total, no good sample is lost, every bad shard is named, nothing is run.

One table of damage against training, evaluation, the verifier and the check before training.
"""

import errno
import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_vit import config, errors, recipes
from ssl_vit.commands import setup
from ssl_vit.convert.index_shards import (
    IndexShards,
    ShardStatus,
    VerifyShards,
    count_readable,
    index_tars,
    verify_all_shards,
)
from ssl_vit.data import dataset as module
from ssl_vit.data.dataset import Data, Fault, SampleDataset
from ssl_vit.data.loader import EvaluationStream, ProcessShard, TrainingStream
from ssl_vit.data.manifest import Manifest, join_manifests, load
from ssl_vit.model import Batch
from ssl_vit.rng import sample_seed
from tests.conftest import TINY
from tests.data.damage import CPU, KINDS, SAMPLES, SHARDS, SMALL, TOTAL, damage_shard, flip_bits, flip_file_bits
from tests.data.pictures import build_shards, build_splits, contents, write_pictures
from tests.data.servers import assert_refused
from tests.processes import call_tool


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test works in an empty folder, and leaves it empty."""
    monkeypatch.setattr(module, "PAUSE", 0.0)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    yield
    assert contents(tmp_path / "empty") == {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Four shards of six samples in three classes."""
    folder = tmp_path_factory.mktemp("whole")
    names = [f"{'abc'[number % 3]}/{number}.{'png' if number % 4 else 'jpg'}" for number in range(TOTAL)]
    return build_shards(write_pictures(folder / "in", names), folder / "out", shard_samples=SAMPLES)


@pytest.fixture
def made(whole: Manifest, tmp_path: Path) -> Manifest:
    """A copy of them, to damage."""
    shutil.copytree(whole.folder, tmp_path / "set")
    return load(tmp_path / "set")


Cell = tuple[bytes, int, int, bool]


def list_cells(batches: list[Batch]) -> list[Cell]:
    """Pixels, label, seed and validity of every slot, in their order."""
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in ("image", "label", "seed", "valid")}
    pixels = [image.contiguous().numpy().tobytes() for image in columns["image"]]
    return list(zip(pixels, *(columns[name].tolist() for name in ("label", "seed", "valid")), strict=True))


def run_training(manifest: Manifest, **options: Any) -> tuple[dict[int, Cell], list[Fault]]:
    """Every sample of the first epoch of training, and the faults."""
    stream, share = TrainingStream(manifest, Data(**SMALL | options), seed=5, batch=TOTAL), ProcessShard(0, 1, TOTAL)
    batch, keys = next(stream.batches(0, share, CPU)), next(stream.keys(0, share))
    return dict(zip([sample for _, sample in keys], list_cells([batch]), strict=True)), stream.faults.drain()


def run_evaluation(manifest: Manifest) -> tuple[list[Cell], list[Fault]]:
    """Every sample as evaluation takes it, and the faults."""
    stream = EvaluationStream(manifest, Data(**SMALL), batch=TOTAL)
    return list_cells(list(stream.batches(ProcessShard(), CPU))), stream.faults.drain()


def shard_path(manifest: Manifest, number: int = 1) -> Path:
    return manifest.folder / manifest.shards[number].name


def drop_samples(lost: set[int], cells: dict[int, Cell]) -> dict[int, Cell]:
    return {sample: cell for sample, cell in cells.items() if sample not in lost}


def image_spans(manifest: Manifest, number: int = 1) -> list[tuple[int, int]]:
    """From where to where the image of each sample of a shard reaches."""
    return [(int(row["offset"]), int(row["offset"]) + int(row["size"])) for row in manifest.index(number)]


def shard_states(manifest: Manifest, full: bool = True, **options: Any) -> list[ShardStatus]:
    return verify_all_shards(
        VerifyShards(shards=(str(manifest.folder),), full=full, quiet=True, **{"workers": 1} | options)
    )


def bad_shards(manifest: Manifest, full: bool = True, **options: Any) -> list[tuple[str, int, str | None]]:
    """Name, readable samples and fault of the shards that are not whole."""
    return [
        (Path(status.shard).name, status.readable, status.fault)
        for status in shard_states(manifest, full, **options)
        if status.fault
    ]


def flip_images(manifest: Manifest, number: int, *samples: int) -> None:
    """Flip a bit in the image of each of these samples."""
    flip_file_bits(
        shard_path(manifest, number), *(sum(image_spans(manifest, number)[sample]) // 2 for sample in samples)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_a_shard_costs_exactly_the_samples_that_it_hits(whole: Manifest, made: Manifest, kind: str):
    lost, message = damage_shard(kind, shard_path(made), whole.index(1))
    num_left, lost = SAMPLES - len(lost), {SAMPLES + number for number in lost}
    expected, no_faults = run_training(whole)
    actual, faults = run_training(made)
    assert no_faults == []
    assert sorted(fault.sample for fault in faults) == sorted(lost)  # each once: good + bad = total
    assert all(str(made.folder / "000001") in fault.reason for fault in faults)
    assert drop_samples(lost, actual) == drop_samples(lost, expected)
    candidates = TrainingStream(whole, Data(**SMALL), seed=5, batch=TOTAL).substitutes
    for fault in faults:  # another sample with its own label under the seed of the one that is lost
        seed, candidate = sample_seed(5, 0, fault.sample), candidates(0, fault.sample)
        substitute = next(sample for sample in candidate if sample not in lost)
        assert fault.substitute == substitute
        image, label = SampleDataset(whole, Data(**SMALL), 5, True).load_sample(substitute, seed)
        assert actual[fault.sample] == (image.contiguous().numpy().tobytes(), label, seed, True)

    slots, faults = run_evaluation(made)
    assert {(fault.sample, fault.substitute) for fault in faults} == {(sample, None) for sample in lost}
    assert {s: cell for s, cell in enumerate(slots) if cell[3]} == drop_samples(
        lost, dict(enumerate(run_evaluation(whole)[0]))
    )

    fault = ("000001.tar", num_left, message)
    assert bad_shards(made) == [fault]
    assert bad_shards(made, full=False) == ([] if message.endswith("altered") else [fault])  # which only a digest tells
    for full in [True] if message.endswith("altered") else [True, False]:
        line = assert_refused(lambda full=full: made.check_shards(full), errors.ExitCode.DATA)
        assert line == f"{made.folder}: 1 of 4 shards are bad: 000001.tar ({message})"


def test_wherever_a_shard_is_cut_all_before_the_cut_is_evaluated(whole: Manifest, made: Manifest):
    expected, size = run_evaluation(whole)[0], whole.shards[1].bytes
    edges = {edge + delta for span in image_spans(whole) for edge in span for delta in (-1, 0, 1)}
    for cut in sorted({*range(0, size, 311), *edges}):
        shutil.copyfile(shard_path(whole), shard_path(made))
        os.truncate(shard_path(made), cut)
        lost = {SAMPLES + number for number, (_, end) in enumerate(image_spans(whole)) if end > cut}
        actual, faults = run_evaluation(made)
        assert {fault.sample for fault in faults} == lost
        assert all(cell == expected[sample] for sample, cell in enumerate(actual) if sample not in lost)
        assert count_readable(made, 1) == SAMPLES - len(lost)


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bits_cost_exactly_the_samples_that_they_hit(whole: Manifest, made: Manifest, seed: int, bits: int):
    data = shard_path(whole).read_bytes()
    spots = random.Random(seed).sample(range(len(data)), bits)
    shard_path(made).write_bytes(flip_bits(data, *spots, bit=seed % 8))
    hit_samples = [n for n, (start, end) in enumerate(image_spans(whole)) if any(start <= spot < end for spot in spots)]
    assert count_readable(made, 1) == SAMPLES - len(hit_samples)
    assert {fault.sample for fault in run_evaluation(made)[1]} == {SAMPLES + number for number in hit_samples}


def test_a_flipped_bit_of_an_index_brings_no_wrong_sample(whole: Manifest, made: Manifest):
    """Neither a wrong image nor a wrong label, nor the end of the training; the samples of the shard may be lost."""
    expected, path = run_training(whole)[0], shard_path(made).with_suffix(".npy")
    original = path.read_bytes()
    for spot in range(0, len(original), 7):
        path.write_bytes(original)
        flip_file_bits(path, spot)
        actual, faults = run_training(made)
        lost = {fault.sample for fault in faults}
        assert lost <= set(range(SAMPLES, 2 * SAMPLES))
        assert drop_samples(lost, actual) == drop_samples(lost, expected), spot


@pytest.fixture
def riddled(made: Manifest) -> Manifest:
    """One shard gone, one cut, and bits flipped in the two others: 14 of 24 samples are left."""
    shard_path(made, 0).unlink()
    os.truncate(shard_path(made, 1), image_spans(made, 1)[4][0] + 5)
    flip_images(made, 2, 2)
    flip_images(made, 3, 3)
    return made


def train_steps(
    manifest: Manifest, first: int, steps: int, share: ProcessShard, **options: Any
) -> tuple[list[Any], set[Any]]:
    """The cells of each step from `first` on, in batches of 8, and what took the place of what."""
    stream = TrainingStream(manifest, Data(**SMALL | options), seed=5, batch=8)
    micro = 8 // share.world // share.micro_batch
    batches = list(itertools.islice(stream.batches(first * 8, share, CPU), steps * micro))
    substitutions = {(fault.epoch, fault.sample, fault.substitute) for fault in stream.faults.drain()}
    return [list_cells(batches[step * micro : (step + 1) * micro]) for step in range(steps)], substitutions


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has
@pytest.mark.parametrize("options", [{}, {"subset": 0.5}])
def test_substitutes_are_the_same_on_any_number_of_processes_and_after_a_resumption(riddled: Manifest, options: dict):
    """Pixels, labels and seeds of eight steps, which pass the end of an epoch."""
    expected, substitutions = train_steps(riddled, 0, 8, ProcessShard(0, 1, 8), **options)
    assert len(substitutions) > 5
    assert any(not cell[3] for step in expected for cell in step) == any(
        substitute is None for *_, substitute in substitutions
    )
    for world, micro, workers in ((1, 4, 2), (2, 2, 0), (4, 1, 0), (2, 4, 1)):
        shares = [ProcessShard(rank, world, micro) for rank in range(world)]
        ranks = [train_steps(riddled, 0, 8, share, workers=workers, **options) for share in shares]
        assert [list(itertools.chain(*parts)) for parts in zip(*(cells for cells, _ in ranks), strict=True)] == expected
        assert set.union(*(substitutions for _, substitutions in ranks)) == substitutions
    assert train_steps(riddled, 3, 5, ProcessShard(0, 1, 8), **options)[0] == expected[3:]
    subset_ids = TrainingStream(riddled, Data(**SMALL | options), seed=5, batch=8).ids
    assert (subset_ids is None) == (options == {})
    assert subset_ids is None or {substitute for *_, substitute in substitutions if substitute is not None} <= set(
        subset_ids.tolist()
    )


def test_where_nothing_is_left_batches_keep_their_shape(made: Manifest):
    for path in made.folder.glob("*.tar"):
        path.unlink()
    actual, faults = run_training(made)
    assert len(actual) == len(faults) == TOTAL
    assert {fault.substitute for fault in faults} == {None}
    assert not any(valid for *_, valid in [*actual.values(), *run_evaluation(made)[0]])


def test_substitutes_come_from_the_same_shuffle_window_first(whole: Manifest):
    """So that a node which holds its own shards only need not fetch another for each bad sample."""
    stream = TrainingStream(whole, Data(**dict(SMALL, lanes=4)), seed=5, batch=TOTAL)  # a shard is a lane and a window
    shards = set()
    for sample, epoch in itertools.product(range(TOTAL), (0, 1, 7)):
        candidates = list(stream.substitutes(epoch, sample))
        assert len(candidates) == 6
        assert {candidate // SAMPLES for candidate in candidates[:3]} == {sample // SAMPLES}
        assert candidates == list(stream.substitutes(epoch, sample))
        shards |= {candidate // SAMPLES for candidate in candidates[3:]} if epoch == 0 else set()
    assert shards == set(range(SHARDS))


@pytest.mark.parametrize("kind", ["altered once", "short once", "failing four times"])
def test_what_fails_once_is_read_again_and_is_no_fault(whole: Manifest, monkeypatch: pytest.MonkeyPatch, kind: str):
    expected, num_reads, pread = run_training(whole)[0], Counter[tuple[int, int]](), os.pread

    def unreliable_pread(handle: int, size: int, offset: int) -> bytes:
        num_reads[size, offset] += 1
        if kind == "failing four times" and num_reads[size, offset] < 5:
            raise OSError(errno.EIO, "Input/output error")
        data = pread(handle, size, offset)
        if num_reads[size, offset] > 1:
            return data
        return bytes([data[0] ^ 1]) + data[1:] if kind == "altered once" else data[:-1]

    monkeypatch.setattr(module.os, "pread", unreliable_pread)
    assert run_training(whole) == (expected, [])


def test_a_disk_that_keeps_failing_costs_what_it_cannot_read(whole: Manifest, monkeypatch: pytest.MonkeyPatch):
    row, pread = whole.index(2)[3], os.pread

    def failing_pread(handle: int, size: int, offset: int) -> bytes:
        if (size, offset) == (row["size"], row["offset"]):
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, size, offset)

    monkeypatch.setattr(module.os, "pread", failing_pread)
    (fault,) = run_training(whole)[1]
    reason = f"{shard_path(whole, 2)}: sample 3 cannot be read: Input/output error"
    assert (fault.sample, fault.reason) == (2 * SAMPLES + 3, reason)
    assert count_readable(whole, 2) == SAMPLES - 1


def test_a_shard_that_is_gone_is_waited_for_once(made: Manifest):
    """Not for each of its samples: that would be an hour for a shard of a thousand."""
    shard_path(made).unlink()
    with patch.object(module.os, "open", wraps=os.open) as open_mock:
        assert len(run_training(made)[1]) == SAMPLES
    assert [str(call.args[0]) for call in open_mock.call_args_list].count(str(shard_path(made))) == module.TRIES


@pytest.mark.parametrize("error", [MemoryError, SystemError, ImportError])
def test_a_fault_of_the_machine_is_no_bad_sample(whole: Manifest, error: type[Exception]):
    """Passed over, it would drop good samples, and others on every machine."""
    with patch.object(module.SampleDataset, "crop", side_effect=error("of the machine")), pytest.raises(error):
        run_training(whole)


@pytest.mark.parametrize("kind", ["gone", "replaced"])
def test_shards_that_change_while_they_are_read_cost_what_was_not_open(whole: Manifest, made: Manifest, kind: str):
    share = ProcessShard(0, 1, 4)
    reference, stream = (
        TrainingStream(manifest, Data(**dict(SMALL, lanes=1)), seed=5, batch=4) for manifest in (whole, made)
    )
    expected = list_cells(list(itertools.islice(reference.batches(0, share, CPU), 6)))
    keys = [sample for batch in itertools.islice(stream.keys(0, share), 6) for _, sample in batch]
    opened_shards = {sample // SAMPLES for sample in keys[:8]}
    batches = stream.batches(0, share, CPU)
    received = [next(batches) for _ in range(2)]
    for number in range(SHARDS):
        if kind == "replaced":
            (made.folder / "new").write_bytes(bytes(made.shards[number].bytes))
            os.replace(made.folder / "new", shard_path(made, number))
        else:
            shard_path(made, number).unlink()
    received += [next(batches) for _ in range(4)]
    faults = stream.faults.drain()
    lost = {fault.sample for fault in faults}
    assert 0 < len(lost) == len(faults) < TOTAL
    assert lost == {sample for sample in keys if sample // SAMPLES not in opened_shards}
    assert all(f"{made.folder}/0000" in fault.reason for fault in faults)
    assert all(
        cell == expected_cell or key in lost
        for cell, expected_cell, key in zip(list_cells(received), expected, keys, strict=True)
    )


def test_shards_are_told_in_order_by_any_number_of_workers(whole: Manifest, made: Manifest, tmp_path: Path):
    """And of all splits and sets, where they lie."""
    for full in (False, True):
        assert shard_states(whole, full) == [
            ShardStatus(str(shard_path(whole, n)), SAMPLES, SAMPLES, None) for n in range(SHARDS)
        ]
    damage_shard("cut in an image", shard_path(made, 0), made.index(0))
    damage_shard("gone", shard_path(made, 1), made.index(1))
    flip_images(made, 3, 0, 3, 4)
    sizes = shard_path(made, 0).stat().st_size, made.shards[0].bytes
    expected = [("000000.tar", 3, "{} bytes, not {}".format(*sizes)), ("000001.tar", 0, "missing")]
    assert bad_shards(made, full=False) == expected
    for workers in (1, 2):
        assert bad_shards(made, workers=workers) == [*expected, ("000003.tar", 3, "altered")]

    names = [f"{split}/{n}.png" for split in ("train", "val") for n in range(4)]
    manifests = build_splits(write_pictures(tmp_path / "in", names), tmp_path / "split", shard_samples=2)
    flip_images(manifests["val"], 1, 0)
    paths = (str(tmp_path / "split"), str(whole.folder))
    statuses = verify_all_shards(VerifyShards(shards=paths, full=True, workers=1, quiet=True))
    tars = [*(f"split/{split}/00000{n}.tar" for split in ("train", "val") for n in range(2))]
    assert [status.shard for status in statuses] == [
        *(str(tmp_path / tar) for tar in tars),
        *map(whole.describe_shard, range(SHARDS)),
    ]
    assert [(status.samples, status.readable) for status in statuses if status.fault] == [(2, 1)]


def test_shards_of_others_are_verified_where_they_lie(made: Manifest, tmp_path: Path):
    with pytest.raises(errors.ExitError, match=r"has no manifest\.json"):
        verify_all_shards(VerifyShards(shards=(str(tmp_path / "empty"),), quiet=True))
    (made.folder / "manifest.json").unlink()
    indexed = index_tars(IndexShards(shards=str(made.folder), output=str(tmp_path / "index"), workers=1, quiet=True))
    assert shard_states(indexed) == [
        ShardStatus(str(shard_path(made, n)), SAMPLES, SAMPLES, None) for n in range(SHARDS)
    ]
    os.truncate(shard_path(made, 2), int(indexed.index(2)[5]["offset"]))
    assert [(status.shard, status.readable) for status in shard_states(indexed) if status.fault] == [
        (str(shard_path(made, 2)), 5)
    ]


def test_all_bad_shards_are_named_at_once_before_training_begins(whole: Manifest, made: Manifest):
    def prepare(verify: bool) -> None:
        args = [f"data.train={made.folder}", f"data.val={whole.folder}", f"data.verify={verify}"]
        setup.prepare_data(config.parse(recipes.Pretrain, [*TINY, *args]))

    flip_images(made, 3, 0)
    prepare(False)  # sizes only
    assert (
        assert_refused(lambda: prepare(True), errors.ExitCode.DATA)
        == f"{made.folder}: 1 of 4 shards are bad: 000003.tar (altered)"
    )
    os.truncate(shard_path(made, 0), 100)
    shard_path(made, 2).unlink()
    bad_names = f"000000.tar (100 bytes, not {made.shards[0].bytes}), 000002.tar (missing)"
    verdict = "shards are bad"
    for full, message in (
        (False, f"2 of 4 {verdict}: {bad_names}"),
        (True, f"3 of 4 {verdict}: {bad_names}, 000003.tar (altered)"),
    ):
        assert assert_refused(lambda full=full: prepare(full), errors.ExitCode.DATA) == f"{made.folder}: {message}"
    with pytest.raises(errors.ExitError, match="2 of 8 shards are bad"):
        join_manifests([whole, made]).check_shards()
    whole.check_shards(full=True)


def test_the_tool_says_so_in_lines_and_in_its_exit_code(made: Manifest):
    flip_images(made, 1, 0, 1, 2)
    args = [f"shards={made.folder}", "quiet=true"]
    output = "4 of 4 shards are whole by size (full=true compares every byte), 24 of 24 samples readable\n"
    assert call_tool("verify_shards", args) == (0, output)
    output = (
        f"{shard_path(made)}: altered: 3 of 6 samples readable\nverify_shards.py: 3 of 4 shards are whole by sha256, "
    )
    output += "21 of 24 samples readable; make or fetch the 1 others again\n"
    assert call_tool("verify_shards", [*args, "full=true"]) == (errors.ExitCode.DATA, output)
