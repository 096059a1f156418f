"""Weights travel to timm and back, and what does not fit is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ssl_vit import load_encoder
from ssl_vit.encoders import export, weights
from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.exits import DATA, Refusal


def small(**update) -> VitEncoder:
    torch.manual_seed(0)
    config = {"size": "Ti", "width": 64, "depth": 2, "heads": 4, "patch": 4, "image": (16, 24), "pool": "mean"}
    return Vit.model_validate(config | update).build().eval()


def image(height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("pool", "positions"), [("mean", "1d"), ("class", "1d"), ("mean", "none")])
def test_timm_opens_the_export(tmp_path: Path, pool, positions):
    import timm

    ours = small(pool=pool, positions=positions)
    export.export(ours, tmp_path)
    theirs: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = ours.normalise(image())
    with torch.no_grad():
        tokens = ours(image())
        assert torch.equal(theirs.forward_features(pixels), tokens)
        want = tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(1)
        torch.testing.assert_close(theirs(pixels), want, atol=1e-6, rtol=0)
    assert list(theirs.pretrained_cfg["mean"]) == [0.5, 0.5, 0.5]


def test_the_export_loads_back_from_every_name(tmp_path: Path):
    ours = small()
    export.export(ours, tmp_path / "encoder")
    with torch.no_grad():
        want = ours(image())
        for path in (tmp_path, tmp_path / "encoder", tmp_path / "encoder" / "model.safetensors"):
            again = load_encoder(path)
            assert not again.training
            assert again.config == ours.config
            assert torch.equal(again(image()), want)


def test_a_timm_model_is_a_source(tmp_path: Path):
    ours = small(image=16)
    export.export(ours, tmp_path)
    config, tensors = weights.read(f"timm:local-dir:{tmp_path}")
    assert isinstance(config, Vit)
    assert config.numbers == ours.config.numbers
    encoder = config.build()
    weights.fill(encoder, config, tensors, "timm")
    with torch.no_grad():
        assert torch.equal(encoder(image(16, 16)), ours(image(16, 16)))


def test_a_bare_weights_file_tells_its_architecture(tmp_path: Path):
    ours = small(image=16, heads=1)  # heads leave no trace in the shapes: 64 wide means one
    tree = {f"module.{name}": value for name, value in ours.state_dict().items()} | {
        "module.head.weight": torch.ones(2)
    }
    torch.save({"model": tree, "epoch": 3}, tmp_path / "w.pth")
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "w.pth")(image(16, 16)), ours(image(16, 16)))


def test_another_resolution_interpolates_positions(tmp_path: Path):
    ours = small()
    export.export(ours, tmp_path)
    config, tensors = weights.read(str(tmp_path))
    larger = config.model_copy(update={"image": (32, 36)}).build()
    weights.fill(larger, config, tensors, "x")
    assert larger(image(32, 36)).shape == (2, 1 + 8 * 9, 64)
    assert torch.equal(larger.blocks[0].attn.qkv.weight, ours.blocks[0].attn.qkv.weight)  # type: ignore[union-attr]


def test_what_does_not_fit_is_listed(tmp_path: Path):
    ours = small()
    tensors = ours.state_dict()
    del tensors["norm.bias"]
    tensors["blocks.1.attn.proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(Refusal, match=r"1 tensors missing \(norm.bias\); 1 tensors of another shape") as end:
        weights.fill(small(), ours.config, tensors, "here")
    assert end.value.code == DATA


def test_parts_of_another_architecture_are_not_dropped_in_silence():
    ours = small()
    tensors = ours.state_dict() | {"head.weight": torch.ones(1), "blocks.0.ls1.gamma": torch.ones(64)}
    with pytest.raises(Refusal, match=r"1 tensors that it has no place for \(blocks\.0\.ls1\.gamma"):
        weights.fill(small(), ours.config, tensors, "here")


def test_timms_own_config_says_what_shapes_do_not(tmp_path: Path):
    save_file(
        {name: value.contiguous() for name, value in small(image=16).state_dict().items()},
        tmp_path / "model.safetensors",
    )
    said = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"num_heads": 4},
        "pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = load_encoder(tmp_path).config
    assert (config.numbers[2], config.mean, config.std) == (4, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))


class Evil:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_nothing_is_executed_and_nothing_foreign_is_believed(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Evil()}))
    torch.save({"x": Evil()}, tmp_path / "evil2.pth")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 64)
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("evil.pth", "evil2.pth", "junk.safetensors", "list.pth", "other.safetensors", "none.pth"):
        with pytest.raises(Refusal) as end:
            load_encoder(tmp_path / name)
        assert end.value.code == DATA
        assert name in str(end.value)
    assert not (tmp_path / "canary").exists()
    (tmp_path / "config.json").write_text(json.dumps({"ssl_vit": {"size": "XXL"}}))
    with pytest.raises(Refusal, match=r"config\.json"):
        load_encoder(tmp_path / "other.safetensors")
