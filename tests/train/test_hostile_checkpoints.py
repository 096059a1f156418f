"""Damaged and hostile checkpoints: each flaw is seen, the one before counts, and nothing is run or opened."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.train import checkpoint
from ssl_vit.train.checkpoint import MANIFEST, VERSION
from tests.conftest import build_once
from tests.train.scenarios import Scenario, Stage

SEED = 7
SECONDS, MB = 60, 1 << 20  # after which a test hangs
OLD, NEW = "step-00000001", "step-00000002"
FILES = ["model.safetensors", "optimizer.safetensors", "metrics.safetensors", "train.json", MANIFEST]


@dataclass
class Payload:
    """Says that it was unpickled, by a file."""

    canary: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """What would wait for ever, at a FIFO, ends the test."""
    previous_handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous_handler)


def save(parent: Path, step: int) -> Path:
    torch.manual_seed(step)
    model = {"weight": torch.randn(4, 6), "bias": torch.randn(4)}
    optimizer = {"weight/exp_avg": torch.randn(4, 6)}
    metrics = {"loss": torch.tensor(0.1)}
    parts = {"model": model, "optimizer": optimizer, "metrics": metrics, "train": {"step": step}}
    return checkpoint.save(parent, step, parts, keep=2)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("origin")
    for step in (1, 2):
        save(parent, step)
    return parent


@pytest.fixture
def parent(origin: Path, tmp_path: Path) -> Path:
    """A folder of two checkpoints, of which the newer is to be damaged."""
    return shutil.copytree(origin, tmp_path / "checkpoints")


def names(parent: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in parent.glob(pattern))


def quarantined(parent: Path) -> list[str]:
    return names(parent, "*.corrupt-*")


def assert_falls_back(parent: Path) -> str:
    """The newer one is put aside and the older one counts; returns what is wrong with the newer."""
    reason = checkpoint.find_corruption(parent / NEW)
    assert reason is not None
    assert "\n" not in reason
    assert checkpoint.newest_valid(parent) == parent / OLD
    assert [name.split(".corrupt-")[0] for name in quarantined(parent)] == [NEW]
    assert not os.path.lexists(parent / NEW)
    return reason


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_every_flipped_bit_is_seen(parent: Path, count: int):
    """One after another, in each file in turn."""
    signal.alarm(max(SECONDS, count // 10))
    contents = {name: (parent / NEW / name).read_bytes() for name in FILES}
    rng = random.Random(SEED)
    for i in range(count):
        name = FILES[i % len(FILES)]
        offset, bit = rng.randrange(len(contents[name])), rng.randrange(8)
        data = bytearray(contents[name])
        data[offset] ^= 1 << bit
        (parent / NEW / name).write_bytes(data)
        flip_description = f"seed {SEED}, flip {i}: bit {bit} of byte {offset} of {name}"
        with redirect_stdout(io.StringIO()):
            assert checkpoint.find_corruption(parent / NEW), flip_description
            reason = assert_falls_back(parent)
        assert name in reason or name == MANIFEST, f"{flip_description}: {reason}"
        (parent / quarantined(parent)[0]).rename(parent / NEW)
        (parent / NEW / name).write_bytes(contents[name])
    assert checkpoint.newest_valid(parent) == parent / NEW
    print(f"\n{count:,} flipped bits in checkpoints: {count:,} seen, {count:,} right fall-backs")


def truncate_to(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": truncate_to(0),
    "a byte": truncate_to(1),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "the last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte more": lambda path: os.truncate(path, path.stat().st_size + 1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a terabyte": truncate_to(1 << 40),
    "another's": lambda path: path.write_bytes((path.parent.parent / OLD / path.name).read_bytes()),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to the like": lambda path: (path.rename(path.parent.parent / "moved"), path.symlink_to("../moved")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a link to a pipe": lambda path: (path.unlink(), os.mkfifo(path.parents[2] / "p"), path.symlink_to("../../p")),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("/nowhere/at/all")),
    "a link to zeros": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_as_it_was_written(origin: Path, tmp_path: Path, damage: str):
    """In every file of a checkpoint; without a wait at what never ends."""
    for name in FILES:
        if damage == "another's" and name == "metrics.safetensors":
            continue  # the same in both
        parent = shutil.copytree(origin, tmp_path / name / "checkpoints")
        DAMAGES[damage](parent / NEW / name)
        reason = assert_falls_back(parent)
        assert name in reason or name == MANIFEST, reason


@pytest.mark.parametrize("link", ["", OLD, NEW])
def test_a_checkpoint_that_is_no_folder_of_its_own(parent: Path, link: str):
    """But a file, or a link to another one or to itself."""
    shutil.rmtree(parent / NEW)
    (parent / NEW).symlink_to(link) if link else (parent / NEW).touch()
    assert_falls_back(parent)
    assert (parent / OLD / MANIFEST).exists()  # what a link led to has stayed


def test_pickles_beside_or_in_place_of_tensors_are_not_opened(origin: Path, tmp_path: Path):
    """As extra files, and under the name of a file that the manifest vouches for."""
    canary = tmp_path / "canary"
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", ".metadata", "x.pt", "latest"):
        parent = shutil.copytree(origin, tmp_path / name)
        (parent / NEW / name).write_bytes(pickle.dumps(Payload(canary)))
        assert name in assert_falls_back(parent)
    for name in FILES[:4]:
        parent = shutil.copytree(origin, tmp_path / f"as {name}")
        torch.save(Payload(canary), parent / NEW / name)
        reseal(parent / NEW)
        assert checkpoint.newest_valid(parent) == parent / NEW  # it is what the manifest says; but no tensors
        with pytest.raises(ExitError, match=name) as excinfo:
            checkpoint.load(parent / NEW)
        assert excinfo.value.code == ExitCode.INTEGRITY
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload(canary)))  # as it would have been
    assert canary.exists()


def reseal(folder: Path, **changes: Any) -> None:
    """Have the manifest vouch for what is in the folder now, and say something else where asked."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size, "sha256": checkpoint.sha256(folder / name)}
    manifest |= changes
    (folder / MANIFEST).write_text(checkpoint._encode_manifest(manifest))


CHANGED_FILES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "none": lambda files: {},
    "null": lambda files: None,
    "a list": lambda files: list(files),
    "one less": lambda files: {name: files[name] for name in list(files)[1:]},
    "a path up": lambda files: files | {f"../{OLD}/train.json": files["train.json"]},
    "a path from the root": lambda files: files | {"/etc/passwd": files["train.json"]},
    "no name": lambda files: files | {"": files["train.json"]},
    "a point": lambda files: files | {".": files["train.json"]},
    "a zero in a name": lambda files: files | {"state\0.json": files["train.json"]},
    "a name of a megabyte": lambda files: files | {"x" * MB: files["train.json"]},
    "itself": lambda files: files | {MANIFEST: files["train.json"]},
    "sizes below zero": lambda files: {name: entry | {"bytes": -1} for name, entry in files.items()},
    "sizes of an exabyte": lambda files: {name: entry | {"bytes": 1 << 60} for name, entry in files.items()},
    "sizes as text": lambda files: {name: entry | {"bytes": "9"} for name, entry in files.items()},
    "no digest": lambda files: {name: {"bytes": entry["bytes"]} for name, entry in files.items()},
    "another digest": lambda files: {name: entry | {"sha256": "0" * 64} for name, entry in files.items()},
    "digests that are lists": lambda files: {name: entry | {"sha256": [[]]} for name, entry in files.items()},
    "entries that are text": lambda files: dict.fromkeys(files, "x"),
}


@pytest.mark.parametrize("change", CHANGED_FILES)
def test_a_manifest_that_lies_about_its_files(parent: Path, change: str):
    """With a digest that is right for what it says, as whoever forges it would write."""
    files = json.loads((parent / NEW / MANIFEST).read_text())["files"]
    reseal(parent / NEW, files=CHANGED_FILES[change](files))
    assert_falls_back(parent)


TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"hello",
    "null": b"null",
    "a number": b"2",
    "a list": b"[]",
    "an empty one": b"{}",
    "only a version": b'{"version": %d}' % VERSION,
    "a newer version, not sealed": b'{"version": 999, "files": {}, "digest": "0"}',
    "deep": b"[" * 1_000_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "deep in a value": b'{"version": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of many digits": b'{"version": ' + b"9" * 1_000_000 + b"}",
    "not UTF-8": b'{"version": "\xff\xfe"}',
    "UTF-16": '{"version": 2}'.encode("utf-16"),
    "zeros": bytes(700),
    "a million objects": b"[" + b"{}," * (5 * MB) + b"{}]",
    "a key of 15 MB": b'{"' + b"x" * (15 * MB) + b'": 1}',
}


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1, 10**9, -1, None, "", f"{VERSION}", [], {}])
def test_a_manifest_of_another_version_is_not_called_damaged(parent: Path, version: Any):
    """76 with the version, and everything stays as it is."""
    reseal(parent / NEW, version=version)
    before = sorted(parent.rglob("*"))
    with pytest.raises(ExitError, match="version") as excinfo:
        checkpoint.newest_valid(parent)
    assert excinfo.value.code == ExitCode.INTEGRITY
    assert f"{version}" in excinfo.value.message
    assert sorted(parent.rglob("*")) == before


def header(content: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if size is None else size % (1 << 64)) + content + data


def tensor_header(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), name: str = "weight") -> bytes:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


TENSORS: dict[str, bytes] = {
    "nothing": b"",
    "half a size": b"\0\0\0",
    "a header of 2^63": header(b"{}", size=1 << 63),
    "a header of 2^64 - 1": header(b"{}", size=-1),
    "a header of 90 MB that is not there": header(b"{}", size=90 * MB),
    "a header of 15 MB of blanks": header(b" " * (15 * MB)),
    "an empty name": header(b""),
    "no JSON": header(b"hello, you"),
    "deep": header(b"[" * 100_000),
    "deep in a name": header(b'{"a":' * 100_000),
    "offsets below zero": header(tensor_header(offsets=(-8, 0)), bytes(8)),
    "offsets backwards": header(tensor_header(offsets=(8, 0)), bytes(8)),
    "offsets of an exabyte": header(tensor_header(offsets=(0, 1 << 60)), bytes(8)),
    "a shape of an exabyte": header(tensor_header(shape=(1 << 30, 1 << 28)), bytes(8)),
    "a shape that overflows": header(tensor_header(shape=(1 << 62, 1 << 62)), bytes(8)),
    "a shape below zero": header(tensor_header(shape=(-2,)), bytes(8)),
    "overlapping": header(tensor_header()[:-1] + b", " + tensor_header(name="bias")[1:], bytes(8)),
    "a gap": header(tensor_header(offsets=(8, 16)), bytes(16)),
    "the same name twice": header(tensor_header()[:-1] + b", " + tensor_header(offsets=(8, 16))[1:], bytes(16)),
    "a type that is none": header(tensor_header(dtype="NaN"), bytes(8)),
    "a type NaN": header(tensor_header().replace(b'"F32"', b"NaN"), bytes(8)),
    "more than it says": header(tensor_header(), bytes(80)),
    "less than it says": header(tensor_header(), bytes(4)),
    "not UTF-8": header(b'{"\xff": 1}'),
}


VALID_VALUES = {"an empty one", "only a version", "a newer version, not sealed", "UTF-16"}  # are values
HOSTILE = {f"{MANIFEST}, {name}": (MANIFEST, content) for name, content in TEXTS.items()}
HOSTILE |= {f"tensors, {name}": ("model.safetensors", content) for name, content in TENSORS.items()}
HOSTILE |= {f"values, {name}": ("train.json", content) for name, content in TEXTS.items() if name not in VALID_VALUES}


@contextmanager
def limited_memory() -> Iterator[io.StringIO]:
    """What is done takes less than 50 MB at its peak, and does not fill the screen, which is given."""

    def kilobytes(name: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak is today's use again
    before = kilobytes("VmRSS")
    with redirect_stdout(io.StringIO()) as output:
        yield output
    assert kilobytes("VmHWM") - before < 50 << 10
    assert len(output.getvalue()) < 2000


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_content(parent: Path, kind: str):
    """A bad manifest is put aside; else, though the manifest vouches for it: 76 with the name. In little memory."""
    name, content = HOSTILE[kind]
    (parent / NEW / name).write_bytes(content)
    if name == MANIFEST:
        with limited_memory():
            assert_falls_back(parent)
        return
    reseal(parent / NEW)
    with limited_memory(), pytest.raises(ExitError, match=name) as excinfo:
        checkpoint.load(parent / NEW)
    assert excinfo.value.code == ExitCode.INTEGRITY
    assert len(excinfo.value.message) < 2000


def test_the_same_step_may_be_bad_again_and_again(parent: Path):
    """Each is put aside under a name of its own, and none is lost."""
    for count in (1, 2, 3):
        os.truncate(parent / NEW / "train.json", 1)
        assert checkpoint.newest_valid(parent) == parent / OLD
        assert len(quarantined(parent)) == count
        save(parent, 2)


HINTS: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "to nothing": lambda path: path.write_text("step-00000077\n"),
    "to the older": lambda path: path.write_text(OLD),
    "up and out": lambda path: path.write_text("../../x"),
    "to the root": lambda path: path.write_text("/etc"),
    "not text": lambda path: path.write_bytes(bytes(range(256))),
    "a link out": lambda path: (path.unlink(), path.symlink_to("../victim")),
    "a link to a checkpoint": lambda path: (path.unlink(), path.symlink_to(OLD)),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to("latest")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a terabyte": truncate_to(1 << 40),
}


@pytest.mark.parametrize("kind", HINTS)
def test_the_hint_is_never_believed(parent: Path, tmp_path: Path, kind: str):
    """Nor read; it is written anew, and not through a link."""
    (tmp_path / "victim").write_text("whole")
    HINTS[kind](parent / "latest")
    assert checkpoint.newest_valid(parent) == parent / NEW
    checkpoint.clean_up(parent, 2)
    if kind != "a folder":
        assert (parent / "latest").read_text().strip() == NEW
        assert not (parent / "latest").is_symlink()
        HINTS[kind](parent / "latest")
    save(parent, 3)
    assert checkpoint.newest_valid(parent) == parent / "step-00000003"
    assert (tmp_path / "victim").read_text() == "whole"
    assert names(parent) == ["latest", NEW, "step-00000003"]


def test_the_order_is_of_steps(parent: Path):
    """Not of times; and what is almost called a checkpoint is neither chosen, nor pruned, nor swept."""
    odd_names = [
        "step-1",
        "step-000000003",
        "step-0000000x",
        "step-00000003 ",
        "step-00000009.old",
        "notes",
        "STEP-00000009",
    ]
    for name in odd_names:
        shutil.copytree(parent / NEW, parent / name)
    for folder, mtime in ((parent / OLD, 2e9), (parent / NEW, 1e6)):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (mtime, mtime))
    assert checkpoint.newest_valid(parent) == parent / NEW
    checkpoint.clean_up(parent, 2)
    save(parent, 3)
    assert names(parent) == sorted([*odd_names, NEW, "step-00000003", "latest"])


def test_leftovers_are_swept_and_lead_nowhere(parent: Path, tmp_path: Path):
    """Of a draft of the same step (A14) and of another, of a deletion; a link in their place takes nothing with it."""
    victim = shutil.copytree(parent / OLD, tmp_path / "victim")
    for name in (".step-00000003.tmp", ".step-00000002.tmp", ".step-00000001.trash", ".step-00000000.trash"):
        shutil.copytree(parent / OLD, parent / name)
        (parent / name / "half").write_bytes(b"x")
    (parent / ".latest.tmp-host-1").touch()
    (parent / ".step-00000003.tmp" / "out").symlink_to(victim)
    assert checkpoint.newest_valid(parent) == parent / NEW
    save(parent, 3)  # with all of it there
    assert checkpoint.newest_valid(parent) == parent / "step-00000003"
    checkpoint.clean_up(parent, 2)
    assert names(parent) == ["latest", NEW, "step-00000003"]
    for name in (".step-00000004.tmp", ".step-00000001.trash"):
        (parent / name).symlink_to(victim)
    checkpoint.clean_up(parent, 2)
    save(parent, 4)
    assert names(parent) == ["latest", "step-00000003", "step-00000004"]
    assert len(list(victim.iterdir())) == len(FILES)


# commands


@pytest.fixture
def stopped(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A run that was stopped after its fourth checkpoint, all of which were kept."""
    signal.alarm(10 * SECONDS)
    make_run = lambda folder: replace(stage, folder=folder).stop("loss:step=29", "keep=9")  # noqa: E731
    shutil.copytree(build_once(tmp_path_factory, "stopped-after-28", make_run) / "run", stage.run)
    return stage


def test_a_training_goes_on_from_the_newest_that_is_whole(stopped: Stage, tmp_path: Path):
    """With a pickle in one, a flipped bit in the next, a link in the third; the bits of its end are the same."""
    _, linked, flipped, extra = checkpoint.list_checkpoints(stopped.run / "checkpoints")
    (extra / "x.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    data = (flipped / "optimizer.safetensors").read_bytes()
    (flipped / "optimizer.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (linked / "train.json").unlink()
    (linked / "train.json").symlink_to("../step-00000007/train.json")
    start = stopped.start()  # the default tier's real process that meets hostile checkpoints
    assert start.wait() == [0], start.output()
    assert all(f"step-{step:08d}" in start.output() for step in (28, 21, 14))
    assert not (tmp_path / "canary").exists()
    stopped.assert_same_run(stopped.tiny_run(1))


def test_a_training_none_of_whose_checkpoints_is_whole_stops(stopped: Stage):
    """76 at each start, one line that names them all; restart=true begins anew and puts the old aside."""
    for folder in checkpoint.list_checkpoints(stopped.run / "checkpoints"):
        os.truncate(folder / "model.safetensors", 9)
    pattern = "".join(f"(?=.*step-{step:08d})" for step in (7, 14, 21, 28))
    for patterns in (("model.safetensors differs",), ()):  # what is wrong with each is said once
        stopped.play(Scenario((ExitCode.INTEGRITY,), "", f"{pattern}.*restart=true", patterns=patterns, saved=0))
    (folder,) = (stopped.run / "checkpoints").glob("step-00000007.corrupt-*")
    save(folder.parent, 7)  # one is brought back
    assert checkpoint.newest_valid(folder.parent) == folder.with_name("step-00000007")
    shutil.rmtree(folder.with_name("step-00000007"))
    stopped.finish(1, "restart=true")
    (before,) = stopped.run.glob("before-*")
    assert len(list((before / "checkpoints").glob("step-*.corrupt-*"))) == 4
    assert (before / "metrics.jsonl").exists()
    stopped.assert_same_run(stopped.tiny_run(1))
