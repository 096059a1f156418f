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
from ssl_vit.convert.index_shards import Found, IndexShards, VerifyShards, index, readable, verify
from ssl_vit.data import dataset as module
from ssl_vit.data.dataset import Data, Fault, Samples
from ssl_vit.data.loader import EvaluationStream, Share, TrainingStream
from ssl_vit.data.manifest import Manifest, join, load
from ssl_vit.model import Batch
from ssl_vit.rng import sample_seed
from tests.conftest import TINY
from tests.data.damage import CPU, KINDS, SAMPLES, SHARDS, SMALL, TOTAL, damage, flip, flipped
from tests.data.pictures import contents, make, one, write_pictures
from tests.data.servers import refused
from tests.starts import call


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
    return one(write_pictures(folder / "in", names), folder / "out", shard_samples=SAMPLES)


@pytest.fixture
def made(whole: Manifest, tmp_path: Path) -> Manifest:
    """A copy of them, to damage."""
    shutil.copytree(whole.folder, tmp_path / "set")
    return load(tmp_path / "set")


Cell = tuple[bytes, int, int, bool]


def cells(batches: list[Batch]) -> list[Cell]:
    """Pixels, label, seed and validity of every slot, in their order."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in ("image", "label", "seed", "valid")}
    pixels = [image.contiguous().numpy().tobytes() for image in whole["image"]]
    return list(zip(pixels, *(whole[name].tolist() for name in ("label", "seed", "valid")), strict=True))


def trained(made: Manifest, **options: Any) -> tuple[dict[int, Cell], list[Fault]]:
    """Every sample of the first epoch of training, and the faults."""
    stream, share = TrainingStream(made, Data(**SMALL | options), seed=5, batch=TOTAL), Share(0, 1, TOTAL)
    batch, keys = next(stream.batches(0, share, CPU)), next(stream.keys(0, share))
    return dict(zip([sample for _, sample in keys], cells([batch]), strict=True)), stream.faults.take()


def evaluated(made: Manifest) -> tuple[list[Cell], list[Fault]]:
    """Every sample as evaluation takes it, and the faults."""
    stream = EvaluationStream(made, Data(**SMALL), batch=TOTAL)
    return cells(list(stream.batches(Share(), CPU))), stream.faults.take()


def shard(made: Manifest, number: int = 1) -> Path:
    return made.folder / made.shards[number].name


def without(lost: set[int], whole: dict[int, Cell]) -> dict[int, Cell]:
    return {sample: cell for sample, cell in whole.items() if sample not in lost}


def places(made: Manifest, number: int = 1) -> list[tuple[int, int]]:
    """From where to where the image of each sample of a shard reaches."""
    return [(int(row["offset"]), int(row["offset"]) + int(row["size"])) for row in made.index(number)]


def states(made: Manifest, full: bool = True, **options: Any) -> list[Found]:
    return verify(VerifyShards(shards=(str(made.folder),), full=full, quiet=True, **{"workers": 1} | options))


def bad(made: Manifest, full: bool = True, **options: Any) -> list[tuple[str, int, str | None]]:
    """Name, readable samples and fault of the shards that are not whole."""
    return [(Path(one.shard).name, one.readable, one.fault) for one in states(made, full, **options) if one.fault]


def spoil(made: Manifest, number: int, *samples: int) -> None:
    """Flip a bit in the image of each of these samples."""
    flip(shard(made, number), *(sum(places(made, number)[sample]) // 2 for sample in samples))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_a_shard_costs_exactly_the_samples_that_it_hits(whole: Manifest, made: Manifest, kind: str):
    lost, says = damage(kind, shard(made), whole.index(1))
    left, lost = SAMPLES - len(lost), {SAMPLES + number for number in lost}
    wanted, none = trained(whole)
    got, faults = trained(made)
    assert none == []
    assert sorted(fault.sample for fault in faults) == sorted(lost)  # each once: good + bad = total
    assert all(str(made.folder / "000001") in fault.reason for fault in faults)
    assert without(lost, got) == without(lost, wanted)
    candidates = TrainingStream(whole, Data(**SMALL), seed=5, batch=TOTAL).substitutes
    for fault in faults:  # another sample with its own label under the seed of the one that is lost
        seed, candidate = sample_seed(5, 0, fault.sample), candidates(0, fault.sample)
        substitute = next(sample for sample in candidate if sample not in lost)
        assert fault.substitute == substitute
        image, label = Samples(whole, Data(**SMALL), 5, True).sample(substitute, seed)
        assert got[fault.sample] == (image.contiguous().numpy().tobytes(), label, seed, True)

    slots, faults = evaluated(made)
    assert {(fault.sample, fault.substitute) for fault in faults} == {(sample, None) for sample in lost}
    assert {s: cell for s, cell in enumerate(slots) if cell[3]} == without(lost, dict(enumerate(evaluated(whole)[0])))

    fault = ("000001.tar", left, says)
    assert bad(made) == [fault]
    assert bad(made, full=False) == ([] if says.endswith("altered") else [fault])  # which only a digest tells
    for full in [True] if says.endswith("altered") else [True, False]:
        line = refused(lambda full=full: made.check(full), errors.DATA)
        assert line == f"{made.folder}: 1 of 4 shards are bad: 000001.tar ({says})"


def test_wherever_a_shard_is_cut_all_before_the_cut_is_evaluated(whole: Manifest, made: Manifest):
    right, size = evaluated(whole)[0], whole.shards[1].bytes
    edges = {edge + near for place in places(whole) for edge in place for near in (-1, 0, 1)}
    for cut in sorted({*range(0, size, 311), *edges}):
        shutil.copyfile(shard(whole), shard(made))
        os.truncate(shard(made), cut)
        lost = {SAMPLES + number for number, (_, end) in enumerate(places(whole)) if end > cut}
        left, faults = evaluated(made)
        assert {fault.sample for fault in faults} == lost
        assert all(cell == right[sample] for sample, cell in enumerate(left) if sample not in lost)
        assert readable(made, 1) == SAMPLES - len(lost)


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bits_cost_exactly_the_samples_that_they_hit(whole: Manifest, made: Manifest, seed: int, bits: int):
    data = shard(whole).read_bytes()
    spots = random.Random(seed).sample(range(len(data)), bits)
    shard(made).write_bytes(flipped(data, *spots, bit=seed % 8))
    hit = [n for n, (start, end) in enumerate(places(whole)) if any(start <= spot < end for spot in spots)]
    assert readable(made, 1) == SAMPLES - len(hit)
    assert {fault.sample for fault in evaluated(made)[1]} == {SAMPLES + number for number in hit}


def test_a_flipped_bit_of_an_index_brings_no_wrong_sample(whole: Manifest, made: Manifest):
    """Neither a wrong image nor a wrong label, nor the end of the training; the samples of the shard may be lost."""
    wanted, path = trained(whole)[0], shard(made).with_suffix(".npy")
    right = path.read_bytes()
    for spot in range(0, len(right), 7):
        path.write_bytes(right)
        flip(path, spot)
        got, faults = trained(made)
        lost = {fault.sample for fault in faults}
        assert lost <= set(range(SAMPLES, 2 * SAMPLES))
        assert without(lost, got) == without(lost, wanted), spot


@pytest.fixture
def riddled(made: Manifest) -> Manifest:
    """One shard gone, one cut, and bits flipped in the two others: 14 of 24 samples are left."""
    shard(made, 0).unlink()
    os.truncate(shard(made, 1), places(made, 1)[4][0] + 5)
    spoil(made, 2, 2)
    spoil(made, 3, 3)
    return made


def steps_of(made: Manifest, first: int, steps: int, share: Share, **options: Any) -> tuple[list[Any], set[Any]]:
    """The cells of each step from `first` on, in batches of 8, and what took the place of what."""
    stream = TrainingStream(made, Data(**SMALL | options), seed=5, batch=8)
    micro = 8 // share.world // share.micro_batch
    batches = list(itertools.islice(stream.batches(first * 8, share, CPU), steps * micro))
    told = {(fault.epoch, fault.sample, fault.substitute) for fault in stream.faults.take()}
    return [cells(batches[step * micro : (step + 1) * micro]) for step in range(steps)], told


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has
@pytest.mark.parametrize("options", [{}, {"subset": 0.5}])
def test_substitutes_are_the_same_on_any_number_of_processes_and_after_a_resumption(riddled: Manifest, options: dict):
    """Pixels, labels and seeds of eight steps, which pass the end of an epoch."""
    wanted, told = steps_of(riddled, 0, 8, Share(0, 1, 8), **options)
    assert len(told) > 5
    assert any(not cell[3] for step in wanted for cell in step) == any(taken is None for *_, taken in told)
    for world, micro, workers in ((1, 4, 2), (2, 2, 0), (4, 1, 0), (2, 4, 1)):
        shares = [Share(rank, world, micro) for rank in range(world)]
        ranks = [steps_of(riddled, 0, 8, share, workers=workers, **options) for share in shares]
        assert [list(itertools.chain(*parts)) for parts in zip(*(cells for cells, _ in ranks), strict=True)] == wanted
        assert set.union(*(told for _, told in ranks)) == told
    assert steps_of(riddled, 3, 5, Share(0, 1, 8), **options)[0] == wanted[3:]
    chosen = TrainingStream(riddled, Data(**SMALL | options), seed=5, batch=8).ids
    assert (chosen is None) == (options == {})
    assert chosen is None or {taken for *_, taken in told if taken is not None} <= set(chosen.tolist())


def test_where_nothing_is_left_batches_keep_their_shape(made: Manifest):
    for path in made.folder.glob("*.tar"):
        path.unlink()
    got, faults = trained(made)
    assert len(got) == len(faults) == TOTAL
    assert {fault.substitute for fault in faults} == {None}
    assert not any(valid for *_, valid in [*got.values(), *evaluated(made)[0]])


def test_substitutes_come_from_the_same_shuffle_window_first(whole: Manifest):
    """So that a node which holds its own shards only need not fetch another for each bad sample."""
    stream = TrainingStream(whole, Data(**dict(SMALL, lanes=4)), seed=5, batch=TOTAL)  # a shard is a lane and a window
    everywhere = set()
    for sample, epoch in itertools.product(range(TOTAL), (0, 1, 7)):
        others = list(stream.substitutes(epoch, sample))
        assert len(others) == 6
        assert {other // SAMPLES for other in others[:3]} == {sample // SAMPLES}
        assert others == list(stream.substitutes(epoch, sample))
        everywhere |= {other // SAMPLES for other in others[3:]} if epoch == 0 else set()
    assert everywhere == set(range(SHARDS))


@pytest.mark.parametrize("kind", ["altered once", "short once", "failing four times"])
def test_what_fails_once_is_read_again_and_is_no_fault(whole: Manifest, monkeypatch: pytest.MonkeyPatch, kind: str):
    wanted, asked, pread = trained(whole)[0], Counter[tuple[int, int]](), os.pread

    def unreliable(handle: int, size: int, offset: int) -> bytes:
        asked[size, offset] += 1
        if kind == "failing four times" and asked[size, offset] < 5:
            raise OSError(errno.EIO, "Input/output error")
        data = pread(handle, size, offset)
        if asked[size, offset] > 1:
            return data
        return bytes([data[0] ^ 1]) + data[1:] if kind == "altered once" else data[:-1]

    monkeypatch.setattr(module.os, "pread", unreliable)
    assert trained(whole) == (wanted, [])


def test_a_disk_that_keeps_failing_costs_what_it_cannot_read(whole: Manifest, monkeypatch: pytest.MonkeyPatch):
    row, pread = whole.index(2)[3], os.pread

    def failing(handle: int, size: int, offset: int) -> bytes:
        if (size, offset) == (row["size"], row["offset"]):
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, size, offset)

    monkeypatch.setattr(module.os, "pread", failing)
    (fault,) = trained(whole)[1]
    said = f"{shard(whole, 2)}: sample 3 cannot be read: Input/output error"
    assert (fault.sample, fault.reason) == (2 * SAMPLES + 3, said)
    assert readable(whole, 2) == SAMPLES - 1


def test_a_shard_that_is_gone_is_waited_for_once(made: Manifest):
    """Not for each of its samples: that would be an hour for a shard of a thousand."""
    shard(made).unlink()
    with patch.object(module.os, "open", wraps=os.open) as opened:
        assert len(trained(made)[1]) == SAMPLES
    assert [str(call.args[0]) for call in opened.call_args_list].count(str(shard(made))) == module.TRIES


@pytest.mark.parametrize("error", [MemoryError, SystemError, ImportError])
def test_a_fault_of_the_machine_is_no_bad_sample(whole: Manifest, error: type[Exception]):
    """Passed over, it would drop good samples, and others on every machine."""
    with patch.object(module.Samples, "crop", side_effect=error("of the machine")), pytest.raises(error):
        trained(whole)


@pytest.mark.parametrize("kind", ["gone", "replaced"])
def test_shards_that_change_while_they_are_read_cost_what_was_not_open(whole: Manifest, made: Manifest, kind: str):
    share = Share(0, 1, 4)
    before, stream = (TrainingStream(part, Data(**dict(SMALL, lanes=1)), seed=5, batch=4) for part in (whole, made))
    wanted = cells(list(itertools.islice(before.batches(0, share, CPU), 6)))
    keys = [sample for batch in itertools.islice(stream.keys(0, share), 6) for _, sample in batch]
    opened = {sample // SAMPLES for sample in keys[:8]}
    batches = stream.batches(0, share, CPU)
    got = [next(batches) for _ in range(2)]
    for number in range(SHARDS):
        if kind == "replaced":
            (made.folder / "new").write_bytes(bytes(made.shards[number].bytes))
            os.replace(made.folder / "new", shard(made, number))
        else:
            shard(made, number).unlink()
    got += [next(batches) for _ in range(4)]
    faults = stream.faults.take()
    lost = {fault.sample for fault in faults}
    assert 0 < len(lost) == len(faults) < TOTAL
    assert lost == {sample for sample in keys if sample // SAMPLES not in opened}
    assert all(f"{made.folder}/0000" in fault.reason for fault in faults)
    assert all(cell == right or key in lost for cell, right, key in zip(cells(got), wanted, keys, strict=True))


def test_shards_are_told_in_order_by_any_number_of_workers(whole: Manifest, made: Manifest, tmp_path: Path):
    """And of all splits and sets, where they lie."""
    for full in (False, True):
        assert states(whole, full) == [Found(str(shard(whole, n)), SAMPLES, SAMPLES, None) for n in range(SHARDS)]
    damage("cut in an image", shard(made, 0), made.index(0))
    damage("gone", shard(made, 1), made.index(1))
    spoil(made, 3, 0, 3, 4)
    sizes = shard(made, 0).stat().st_size, made.shards[0].bytes
    wanted = [("000000.tar", 3, "{} bytes, not {}".format(*sizes)), ("000001.tar", 0, "missing")]
    assert bad(made, full=False) == wanted
    for workers in (1, 2):
        assert bad(made, workers=workers) == [*wanted, ("000003.tar", 3, "altered")]

    names = [f"{split}/{n}.png" for split in ("train", "val") for n in range(4)]
    parts = make(write_pictures(tmp_path / "in", names), tmp_path / "split", shard_samples=2)
    spoil(parts["val"], 1, 0)
    paths = (str(tmp_path / "split"), str(whole.folder))
    found = verify(VerifyShards(shards=paths, full=True, workers=1, quiet=True))
    tars = [*(f"split/{split}/00000{n}.tar" for split in ("train", "val") for n in range(2))]
    assert [one.shard for one in found] == [*(str(tmp_path / tar) for tar in tars), *map(whole.where, range(SHARDS))]
    assert [(one.samples, one.readable) for one in found if one.fault] == [(2, 1)]


def test_shards_of_others_are_verified_where_they_lie(made: Manifest, tmp_path: Path):
    with pytest.raises(errors.Refusal, match=r"has no manifest\.json"):
        verify(VerifyShards(shards=(str(tmp_path / "empty"),), quiet=True))
    (made.folder / "manifest.json").unlink()
    theirs = index(IndexShards(shards=str(made.folder), output=str(tmp_path / "index"), workers=1, quiet=True))
    assert states(theirs) == [Found(str(shard(made, n)), SAMPLES, SAMPLES, None) for n in range(SHARDS)]
    os.truncate(shard(made, 2), int(theirs.index(2)[5]["offset"]))
    assert [(one.shard, one.readable) for one in states(theirs) if one.fault] == [(str(shard(made, 2)), 5)]


def test_all_bad_shards_are_named_at_once_before_training_begins(whole: Manifest, made: Manifest):
    def start(verify: bool) -> None:
        words = [f"data.train={made.folder}", f"data.val={whole.folder}", f"data.verify={verify}"]
        setup.sources(config.parse(recipes.Pretrain, [*TINY, *words], recipes.FOLDER))

    spoil(made, 3, 0)
    start(False)  # sizes only
    assert refused(lambda: start(True), errors.DATA) == f"{made.folder}: 1 of 4 shards are bad: 000003.tar (altered)"
    os.truncate(shard(made, 0), 100)
    shard(made, 2).unlink()
    named = f"000000.tar (100 bytes, not {made.shards[0].bytes}), 000002.tar (missing)"
    are = "shards are bad"
    for full, says in ((False, f"2 of 4 {are}: {named}"), (True, f"3 of 4 {are}: {named}, 000003.tar (altered)")):
        assert refused(lambda full=full: start(full), errors.DATA) == f"{made.folder}: {says}"
    with pytest.raises(errors.Refusal, match="2 of 8 shards are bad"):
        join([whole, made]).check()
    whole.check(full=True)


def test_the_tool_says_so_in_lines_and_in_its_exit_code(made: Manifest):
    spoil(made, 1, 0, 1, 2)
    words = [f"shards={made.folder}", "quiet=true"]
    said = "4 of 4 shards are whole by size (full=true compares every byte), 24 of 24 samples readable\n"
    assert call("verify_shards", words) == (0, said)
    said = f"{shard(made)}: altered: 3 of 6 samples readable\nverify_shards.py: 3 of 4 shards are whole by sha256, "
    said += "21 of 24 samples readable; make or fetch the 1 others again\n"
    assert call("verify_shards", [*words, "full=true"]) == (errors.DATA, said)
