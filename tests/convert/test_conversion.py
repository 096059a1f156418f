"""The work of converting: the same bytes by any number of workers and after any break, and clear refusals."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ssl_vit.convert import make_shards, worker_pool
from ssl_vit.convert.shard_writer import write_shard
from ssl_vit.data import manifest
from ssl_vit.errors import ExitCode
from tests.data.pictures import NAMES, build_shards, build_splits, contents, encode_pil, picture, write_pictures
from tests.data.servers import assert_refused
from tests.processes import call_tool


@pytest.mark.parametrize("options", [{}, {"resize": 8, "quality": 70}, {"val_fraction": 0.4}])
def test_the_same_job_gives_the_same_bytes_on_any_number_of_workers(source: Path, tmp_path: Path, options: dict):
    (source / "plants" / "bad.jpg").write_bytes(b"")
    for workers in (1, 2):
        build_splits(source, tmp_path / str(workers), workers=workers, shard_samples=3, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_second_run_touches_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifests = [build_splits(source, tmp_path / "out", shard_samples=3, val_fraction=0.4)]
    stamps = [{path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").rglob("*")}]
    monkeypatch.setattr(make_shards, "write_shard", None)
    manifests += [build_splits(source, tmp_path / "out", shard_samples=3, val_fraction=0.4, workers=2)]
    stamps += [{path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").rglob("*")}]
    assert (manifests[0], stamps[0]) == (manifests[1], stamps[1])


def fail_at_shard_two(job: make_shards.Job, number: int, *args: Any) -> dict:
    """`write_shard` on a machine that breaks at shard 2; at the module's top, so that a worker finds it."""
    if number == 2:
        raise RuntimeError("power cut")
    return write_shard(job, number, *args)


def interrupt_conversion(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "write_shard", fail_at_shard_two)
        with pytest.raises(RuntimeError, match="power cut"):
            build_splits(source, output, **options)


def test_a_broken_conversion_goes_on_to_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (source / "plants" / "bad.jpg").write_bytes(b"")
    straight_run, output = tmp_path / "whole", tmp_path / "out"
    build_splits(source, straight_run, shard_samples=2)
    interrupt_conversion(source, output, monkeypatch, shard_samples=2)
    assert not (output / "manifest.json").exists()
    assert_refused(lambda: manifest.load(output), ExitCode.DATA)
    done = {p: p.stat().st_mtime_ns for p in output.glob("00000[01].tar")}
    assert len(done) == 2
    (output / "000003.tar").write_bytes(b"a leftover of half a shard")
    (output / ".000004.tar.tmp-99999999").write_bytes(b"the draft of a process that was killed")
    assert "seed" in assert_refused(
        lambda: build_splits(source, output, shard_samples=2, seed=1), ExitCode.CANNOT_CREATE
    )  # another job
    build_splits(source, output, shard_samples=2)
    assert {p: p.stat().st_mtime_ns for p in done} == done  # what was done is not done again
    assert contents(output) == contents(straight_run)

    interrupt_conversion(source, tmp_path / "damaged", monkeypatch, shard_samples=2)
    (tmp_path / "damaged" / "000000.tar").write_bytes(b"short")
    (tmp_path / "damaged" / "000001.npy").unlink()
    build_splits(source, tmp_path / "damaged", shard_samples=2)
    assert contents(tmp_path / "damaged") == contents(straight_run)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({}, {"seed": 1}, "seed"),
        ({}, {"shard_samples": 3}, "shard_samples"),
        ({}, {"resize": 8}, "resize"),
        ({"resize": 8}, {"resize": 8, "quality": 50}, "quality"),
        ({"val_fraction": 0.4}, {"val_fraction": 0.5}, "val_fraction"),
        ({"val_fraction": 0.4}, {}, "val_fraction"),
        ({}, {"val_fraction": 0.4}, "val_fraction"),
        ({}, {}, "input"),  # one image more
    ],
)
def test_an_output_of_another_job_is_refused(source: Path, tmp_path: Path, before: dict, after: dict, named: str):
    build_splits(source, tmp_path / "out", **before)
    if named == "input":
        write_pictures(source, ["plants/new.png"])
    files = contents(tmp_path / "out")
    assert named in assert_refused(lambda: build_splits(source, tmp_path / "out", **after), ExitCode.CANNOT_CREATE)
    assert contents(tmp_path / "out") == files


def test_an_output_in_other_use_is_refused(source: Path, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for output, precious in (("folder", "folder/thesis.tex"), ("file", "file")):
        (tmp_path / precious).write_text("precious")
        assert_refused(lambda output=output: build_splits(source, tmp_path / output), ExitCode.CANNOT_CREATE)
        assert (tmp_path / precious).read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("input=images output=out", 0, "out: 12 samples, 3 classes, 1 shards"),
        ("input=nowhere output=out", ExitCode.DATA, "nowhere: no such folder"),
        ("input=empty output=out", ExitCode.DATA, "no images"),
        ("input=bad output=out", ExitCode.DATA, "not one image could be decoded"),
        ("input=splits output=out val_fraction=0.5", ExitCode.DATA, "val_fraction"),
        ("input=images output=images/out", ExitCode.USAGE, "inside the input"),
        ("input=images", ExitCode.USAGE, "output"),
        ("input=images output=out resizes=8", ExitCode.USAGE, "resize"),
        ("input=images output=out quality=high", ExitCode.USAGE, "quality"),
        ("input=images output=out val_fraction=1", ExitCode.USAGE, "val_fraction"),
    ],
)
@pytest.mark.usefixtures("source")
def test_the_command_ends_with_its_code_in_one_line(words: str, code: int, says: str, tmp_path: Path, monkeypatch: Any):
    for name in ("empty/below/readme.txt", "bad/0.jpg", "splits/train/x/0.png", "splits/val/x/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    result = call_tool("make_shards", [*words.split(), "workers=1", "quiet=true"])
    assert result.code == code
    assert says in result.output
    assert result.output.count("\n") == 1


def test_images_of_other_formats_are_not_left_out_in_silence(source: Path, tmp_path: Path, capsys: Any):
    (source / "plants" / "scan.tiff").write_bytes(encode_pil(picture(), "TIFF"))
    assert build_shards(source, tmp_path / "out", quiet=False).samples == len(NAMES)
    assert "scan.tiff" in capsys.readouterr().out


def test_a_piece_of_work_does_not_grow_with_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sent with the whole listing, the 1,281 shards of ImageNet cost over an hour of pickling alone."""
    weights: list[int] = []

    class WeighingExecutor(ProcessPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            weights.append(len(pickle.dumps((args, kwargs))))
            return super().submit(fn, *args, **kwargs)

    monkeypatch.setattr(worker_pool, "ProcessPoolExecutor", WeighingExecutor)
    heaviest = []
    for count in (10, 100):
        source = write_pictures(tmp_path / f"in{count}", [f"{i:03d}.png" for i in range(count)], height=2, width=2)
        build_splits(source, tmp_path / f"out{count}", shard_samples=5)
        heaviest.append(max(weights))
        weights.clear()
    assert heaviest[1] < 1.5 * heaviest[0]
