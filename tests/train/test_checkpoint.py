"""Checkpoints are there whole or not at all, and a damaged one is never believed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from ssl_vit.exits import DISK, INTEGRITY, Refusal
from ssl_vit.train import checkpoint


def tensors(step: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights and the optimizer's state of some model."""
    torch.manual_seed(step)
    return {"weight": torch.randn(2, 3)}, {"weight/exp_avg": torch.randn(2, 3), "weight/step": torch.tensor(step)}


def save(parent: Path, step: int, keep: int = 9) -> Path:
    return checkpoint.save(parent, step, keep, *tensors(step), {"step": step, "window.loss": torch.tensor(0.1)})


def names(parent: Path) -> list[str]:
    """What lies in the folder, without the hint and without times."""
    found = sorted(path.name for path in parent.iterdir())
    return [name.split("-2")[0] if "corrupt" in name else name for name in found if name != "latest"]


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path):
    *found, state = checkpoint.load(save(tmp_path, 3))
    assert state == {"step": 3, "window.loss": torch.tensor(0.1)}
    for mine, theirs in zip(tensors(3), found, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_last_few_are_kept(tmp_path: Path):
    for step in range(1, 5):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000004"


def test_there_is_nothing_to_resume_from_in_a_new_run(tmp_path: Path):
    assert checkpoint.newest(tmp_path / "none") is None


def damage_bit(folder: Path, file: str) -> None:
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"]


@pytest.mark.parametrize("file", [*FILES, "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "empty"])
def test_a_damaged_file_makes_the_previous_checkpoint_count(tmp_path: Path, file, damage):
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    if damage == "bit":
        damage_bit(bad, file)
    elif damage == "gone":
        (bad / file).unlink()
    else:
        os.truncate(bad / file, 0 if damage == "empty" else 10)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"
    assert names(tmp_path) == ["step-00000001", "step-00000002.corrupt"]


def test_where_none_verifies_the_run_does_not_start_over(tmp_path: Path):
    for step in (1, 2):
        damage_bit(save(tmp_path, step), "model.safetensors")
    with pytest.raises(Refusal, match=r"step-00000002\.corrupt-.*step-00000001\.corrupt-") as end:
        checkpoint.newest(tmp_path)
    assert end.value.code == INTEGRITY
    with pytest.raises(Refusal, match="put aside before"):  # nor when it is started once more
        checkpoint.newest(tmp_path)


def test_foreign_files_and_paths_are_not_believed(tmp_path: Path):
    save(tmp_path, 1)
    pickled = save(tmp_path, 2)
    (pickled / "extra.pkl").write_bytes(b"x")
    outside = save(tmp_path, 3)
    content = json.loads((outside / "MANIFEST.json").read_text())
    content["files"]["../step-00000001/state.json"] = content["files"]["state.json"]
    (outside / "MANIFEST.json").write_text(json.dumps(content))
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_save_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch, call):
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}

    def refuse(*args, **kwargs):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(Refusal, match="Input/output") as end:
            save(tmp_path, 2)
        assert end.value.code == DISK
    assert names(tmp_path) == ["step-00000001"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}
    assert save(tmp_path, 2).is_dir()  # and the next one goes well


def test_a_draft_left_by_a_killed_process_is_no_checkpoint(tmp_path: Path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.tmp")
    (tmp_path / ".step-00000002.tmp" / "half").write_bytes(b"x")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(Refusal, match=r"needs .* bytes, 1 are free") as end:
        save(tmp_path, 2)
    assert end.value.code == DISK
    assert names(tmp_path) == ["step-00000001"]
