"""Checkpoints are there whole or not at all, and a damaged one is never believed."""

import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from ssl_vit.exits import DISK, INTEGRITY, Refusal
from ssl_vit.train import checkpoint


def tensors(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights and the optimizer's state of some model."""
    torch.manual_seed(step)
    return {"weight": torch.randn(2, 3)}, {"weight/exp_avg": torch.randn(2, 3), "weight/step": torch.tensor(step)}


def save(parent: Path, step: int, keep: int = 9) -> Path:
    return checkpoint.save(parent, step, keep, *tensors(step), {"step": step, "window.loss": torch.tensor(0.1)})


def names(parent: Path) -> list[str]:
    """What lies in the folder, without the hint."""
    return sorted(path.name for path in parent.iterdir() if path.name != "latest")


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path):
    *found, state = checkpoint.load(save(tmp_path, 3))
    assert state == {"step": 3, "window.loss": torch.tensor(0.1)}
    for mine, theirs in zip(tensors(3), found, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_last_few_are_kept_and_a_draft_is_none_of_them(tmp_path: Path):
    assert checkpoint.newest(tmp_path / "none") is None
    for step in range(1, 5):
        save(tmp_path, step, keep=2)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / ".step-00000005.tmp")  # of a killed process
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000004"
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_damaged_one_is_not_believed_and_where_none_verifies_the_run_does_not_start_over(tmp_path: Path):
    """All that can be wrong with a checkpoint is in test_hostile_checkpoints.py."""
    for step in (1, 2):
        file = save(tmp_path, step) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(Refusal, match=r"step-00000002\.corrupt-.*step-00000001\.corrupt-") as end:
        checkpoint.newest(tmp_path)
    assert end.value.code == INTEGRITY
    with pytest.raises(Refusal, match="put aside before"):  # nor when it is started once more
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "a full disk"])
def test_a_save_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    """A full disk is seen before anything is written."""
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}
    full = shutil._ntuple_diskusage(10, 9, 1)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        if call == "a full disk":
            patch.setattr(shutil, "disk_usage", lambda path: full)
        else:
            patch.setattr(os, call, Mock(side_effect=OSError(5, "Input/output error")))
        said = r"needs .* bytes, 1 are free" if call == "a full disk" else "Input/output"
        with pytest.raises(Refusal, match=said) as end:
            save(tmp_path, 2)
        assert end.value.code == DISK
    assert names(tmp_path) == ["step-00000001"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}
    assert save(tmp_path, 2).is_dir()  # and the next one goes well
