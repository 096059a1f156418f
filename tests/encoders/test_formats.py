"""Weights of every known origin come in: what their own programs compute from a file is what load_encoder computes.

They are fine-tuned, judged and predicted with by the tools; damaged and foreign files are refused.
"""

import json
import os
import pickle
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from ssl_vit import config, recipes
from ssl_vit.commands import setup
from ssl_vit.encoders import weights
from ssl_vit.encoders.export import export_encoder
from ssl_vit.encoders.timm_encoder import TimmZoo
from ssl_vit.encoders.vit import Vit
from ssl_vit.encoders.weights import load_encoder
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.recipes import Finetune, Pretrain
from tests.encoders import foreign_weights as foreign
from tests.encoders.foreign_weights import DEPTH, HEADS, HF, MLP, PATCH, SIDE, TIMM, WIDTH, random_images, randomize
from tests.evaluate_cases import find_value, read_predictions, read_results
from tests.processes import call_tool


def timm_vit(name: str = "vit_base_patch16_224", seed: int = 0, **arguments: Any) -> Any:
    return randomize(timm.create_model(name, **TIMM | arguments), seed)


@torch.no_grad()
def check_same_tokens(encoder: Any, timm_model: Any, height: int = SIDE, width: int = SIDE, atol: float = 1e-5) -> None:
    """Equal tokens, for an image of noise, of an encoder and timm's model."""
    images = random_images(height, width, channels=encoder.channels)
    expected = timm_model.forward_features(encoder.normalize(images))
    assert expected.std() > 0.3
    torch.testing.assert_close(encoder(images), expected, atol=atol, rtol=0)


def write_weights(path: Path) -> None:
    """A good file, of Google's or of a plain ViT."""
    if path.suffix == ".npz":
        foreign.write_google(path)
    elif path.suffix == ".pth":
        torch.save(foreign.headless_state_dict(narrow()), path)
    else:
        save_file(foreign.headless_state_dict(narrow()), path)


def expect_refusal(path: Path) -> str:
    with pytest.raises(ExitError) as error:
        load_encoder(path)
    assert error.value.code == ExitCode.DATA
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


LARGER = ({"stem": (3, 4, 6, 3), "side": 64}, "vit_large_r50_s32_224", {"img_size": 64})


@pytest.mark.parametrize(
    ("how", "name", "more"),
    [
        ({}, "vit_base_patch16_224", {}),
        ({"classes": 0, "pre_logits": False}, "vit_base_patch16_224", {}),
        ({"stem": (3, 4, 9), "side": 32}, "vit_base_r50_s16_224", {"img_size": 32}),
        pytest.param(*LARGER, marks=pytest.mark.process),
    ],
    ids=["head", "trunk", "r50 3-4-9", "r50 3-4-6-3"],
)
def test_googles_file_gives_what_timm_makes_of_it(tmp_path: Path, how, name, more):
    foreign.write_google(tmp_path / "w.npz", **how)
    arguments = {key: value for key, value in (TIMM | more).items() if "stem" not in how or key != "patch_size"}
    timm_model: Any = timm.create_model(name, **arguments).eval()
    timm_model.load_pretrained(str(tmp_path / "w.npz"))
    encoder: Any = load_encoder(tmp_path / "w.npz")
    side = how.get("side", SIDE)
    check_same_tokens(encoder, timm_model, side, side)
    assert (encoder.config.kind, encoder.config.dims) == ("vit", (WIDTH, DEPTH, HEADS, MLP))
    settings = "class", (0.5,), "r50" if "stem" in how else "patch"
    assert (encoder.config.pool, encoder.config.mean, encoder.config.stem) == settings


def test_googles_file_without_a_class_token(tmp_path: Path):
    """As with gap: as many positions as patches; timm's loader asks for a class token, so its tensors are put in."""
    foreign.write_google(tmp_path / "gap.npz", token=False, pre_logits=False)
    with_token = foreign.google_arrays(token=True, pre_logits=False)
    bare = foreign.google_arrays(token=False, pre_logits=False)
    np.savez(tmp_path / "w.npz", **{**with_token, **{k: v for k, v in bare.items() if "pos_embedding" not in k}})  # type: ignore[arg-type]
    timm_model: Any = timm.create_model("vit_base_patch16_224", **TIMM).eval()
    timm_model.load_pretrained(str(tmp_path / "w.npz"))
    positions = torch.from_numpy(bare["Transformer/posembed_input/pos_embedding"])
    timm_model.cls_token, timm_model.pos_embed, timm_model.num_prefix_tokens = None, torch.nn.Parameter(positions), 0
    encoder: Any = load_encoder(tmp_path / "gap.npz")
    check_same_tokens(encoder, timm_model)
    assert (encoder.prefix, encoder.config.pool, encoder(random_images()).shape) == (0, "mean", (2, 16, WIDTH))


def save_hf_model(model: Any, folder: Path, mean: Any = (0.2, 0.3, 0.4)) -> Any:
    """A model of Hugging Face's in a folder, with the preparation of its images."""
    randomize(model).save_pretrained(folder)
    preprocessing = {"size": {"height": SIDE, "width": SIDE}, "image_mean": list(mean), "image_std": [0.2, 0.25, 0.3]}
    transformers.ViTImageProcessor(**preprocessing).save_pretrained(folder)
    return model


@torch.no_grad()
def check_same_as_hf(encoder: Any, hf_model: Any, **options: Any) -> None:
    images = random_images()
    expected = hf_model(encoder.normalize(images), **options).last_hidden_state
    assert expected.std() > 0.3
    torch.testing.assert_close(encoder(images), expected, atol=1e-4, rtol=0)  # its epsilon is 1e-12, the authors' 1e-6


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"])
def test_hugging_faces_folder(tmp_path: Path, kind):
    model = getattr(transformers, kind)(transformers.ViTConfig(**HF, encoder_stride=PATCH))
    hf_model = save_hf_model(model, tmp_path)
    hf_model = hf_model if kind == "ViTModel" else hf_model.vit
    encoder = load_encoder(tmp_path)
    check_same_as_hf(encoder, hf_model)
    assert encoder.config.dims == (WIDTH, DEPTH, HEADS, MLP)  # type: ignore[union-attr]
    assert (encoder.config.mean, encoder.config.std) == ((0.2, 0.3, 0.4), (0.2, 0.25, 0.3))
    file, old = tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"
    on_disk = load_file(file)
    assert any("encoder.layer.0.attention.attention.query.weight" in name for name in on_disk)  # transformers 5 as well
    save_file(hf_model.state_dict(), file)  # under the names that it has in memory
    check_same_as_hf(load_encoder(tmp_path), hf_model)
    file.unlink()  # as the hub has them since 2021: another file, a config that says less
    torch.save(on_disk, old)
    config = {"model_type": "vit", "hidden_act": "gelu", "image_size": SIDE, "num_attention_heads": HEADS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (tmp_path, old):
        check_same_as_hf(load_encoder(source), hf_model)


def test_hugging_faces_autoencoder(tmp_path: Path):
    small: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {f"decoder_{name}": value for name, value in small.items()}
    mae_config = transformers.ViTMAEConfig(**HF, **decoder, mask_ratio=0.0)
    hf_model = save_hf_model(transformers.ViTMAEForPreTraining(mae_config), tmp_path)
    order = torch.arange(16, dtype=torch.float32).expand(2, 16)  # of patches: none is left out or moved
    check_same_as_hf(load_encoder(tmp_path), hf_model.vit, noise=order)


NOT_PLAIN: list[dict[str, Any]] = [{"hidden_act": "gelu_new"}, {"model_type": "deit"}, {"model_type": "vit_msn"}]
NOT_PLAIN += [{"layer_norm_eps": 1e-3}, {"qkv_bias": False}]


def test_hugging_faces_settings_decide(tmp_path: Path):
    """What is no plain ViT is refused; an image processor that does not normalize, or has one number for all."""
    save_hf_model(transformers.ViTModel(transformers.ViTConfig(**HF)), tmp_path)
    hf_config = json.loads((tmp_path / "config.json").read_text())
    for change in NOT_PLAIN:
        (tmp_path / "config.json").write_text(json.dumps(hf_config | change))
        ((key, value),) = change.items()
        assert f"{key}={value}" in (content := expect_refusal(tmp_path))
        assert "is another model than a plain ViT" in content
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    for content, expected in (
        ({"do_normalize": False, "image_mean": [0.2] * 3, "image_std": [0.2] * 3}, ((0.0,), (1.0,))),
        ({"image_mean": 0.3, "image_std": 0.4}, ((0.3,), (0.4,))),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        encoder_config = load_encoder(tmp_path).config
        assert (encoder_config.mean, encoder_config.std) == expected


NARROW: dict[str, Any] = {"embed_dim": 64, "num_heads": 1}
"""What MAE's and DINO's files, which do not tell heads, are taken for at this width: one head for each 64."""


def narrow(seed: int = 0) -> Any:
    return timm_vit(seed=seed, **NARROW, mlp_ratio=4)


@pytest.mark.parametrize("kind", ["MAE", "DINO, full checkpoint", "DINO, backbone"])
def test_files_of_mae_and_dino(tmp_path: Path, kind, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(foreign, "WIDTH", 64)
    timm_model = narrow()  # of DINO the teacher
    content, unused = {
        "MAE": lambda: (foreign.mae_checkpoint(timm_model), {"mask", "decoder"}),
        "DINO, full checkpoint": lambda: (foreign.dino_checkpoint(timm_model, narrow(seed=1)), {"head"}),
        "DINO, backbone": lambda: (foreign.headless_state_dict(timm_model), set()),
    }[kind]()
    torch.save(content, tmp_path / "w.pth")
    source, tensors = weights.read_source(str(tmp_path / "w.pth"))
    encoder = source.build().eval()
    report = weights.load_weights(encoder, source, tensors, "w.pth")
    check_same_tokens(encoder, timm_model)
    assert report.missing == report.mismatched == report.resized == []
    assert {name.split(".")[0].split("_")[0] for name in report.unused} == unused


def test_what_would_be_another_model_or_no_numbers_is_refused(tmp_path: Path):
    """MAE's fine-tuned file: its norm follows the mean over the patches, and before there is none; a scaled layer."""
    tensors = timm_vit(global_pool="avg", num_classes=7).state_dict()
    assert {"fc_norm.weight", "norm.weight"} & tensors.keys() == {"fc_norm.weight"}
    torch.save({"model": tensors}, tmp_path / "w.pth")
    assert "2 tensors missing (norm.weight, norm.bias" in expect_refusal(tmp_path / "w.pth")
    state_dict = foreign.headless_state_dict(narrow())
    for name, value in {"norm.bias": torch.full((64,), torch.nan), "norm.weight": torch.ones(64).int()}.items():
        save_file({**state_dict, name: value}, tmp_path / "w.safetensors")
        expected = f"{name} has numbers that are not finite, or whole numbers"
        assert expected in expect_refusal(tmp_path / "w.safetensors")
    encoder = Vit.model_validate({"width": 64, "depth": 1, "patch": 4, "image": 8}).build()
    parts = {"head.weight": torch.ones(1), "blocks.0.ls1.gamma": torch.ones(64)}
    with pytest.raises(ExitError, match=r"1 tensors that it has no place for \(blocks\.0\.ls1\.gamma"):
        weights.load_weights(encoder, encoder.config, encoder.state_dict() | parts, "here")


def timm_folder(folder: Path, name: str, **arguments: Any) -> Any:
    """A model as timm writes it for its hub; returns what timm itself opens there."""
    folder.mkdir(exist_ok=True)
    model = randomize(timm.create_model(name, **arguments))
    hub_config = {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}}
    timm.models.save_for_hf(model, str(folder), hub_config, arguments, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {**TIMM, "embed_dim": 96, "num_heads": 4}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 96}),  # heads: those of its name
        ("vit_tiny_patch16_224", {"img_size": (16, 48), "depth": 1}),
        ("vit_base_patch16_gap_224", {"img_size": 32, "depth": 1, "embed_dim": 96}),  # 16 heads: no shape tells
        pytest.param("vit_base_r50_s16_224", {"img_size": 32, "depth": 1, "embed_dim": 96}, marks=pytest.mark.process),
        ("test_vit", {"img_size": 32, "num_classes": 3}),
        ("vit_base_patch16_siglip_gap_224", {"img_size": 32, "depth": 1, "embed_dim": 96}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(item) for item in value.values()),
)
def test_timms_plain_folders_become_our_own_vit(tmp_path: Path, name, arguments):
    timm_model = timm_folder(tmp_path, name, **arguments)
    for source in (str(tmp_path), f"timm:local-dir:{tmp_path}"):
        encoder: Any = load_encoder(source)
        assert isinstance(encoder.config, Vit)
        assert encoder.config.dims[2] == timm_model.blocks[0].attn.num_heads
        assert (encoder.config.pool == "class") == (timm_model.global_pool == "token")
        check_same_tokens(encoder, timm_model, *encoder.config.image_hw)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vit_xsmall_patch16_clip_224", marks=pytest.mark.process),  # pre-norm
        "test_vit2",  # layer scale, a register, pooling before the norm
        "test_vit3",  # layer scale, registers without positions, attention pooling
        "test_convnext",
        "test_resnet",
    ],
)
def test_other_models_are_taken_as_timms(tmp_path: Path, name):
    timm_model = timm_folder(tmp_path, name, num_classes=4, **({"img_size": 32} if "vit" in name else {}))
    config, tensors = weights.read_source(str(tmp_path))
    assert isinstance(config, TimmZoo)
    encoder = config.build().eval()
    report = weights.load_weights(encoder, config, tensors, name, min_fraction=0.999)
    assert report.fraction == 1
    images = random_images(*config.image_hw)
    with torch.no_grad():
        expected = encoder._to_tokens(timm_model.forward_features(encoder.normalize(images)))
        torch.testing.assert_close(encoder(images), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


BARE_TOO = [{"init_values": 0.1}, {"qk_norm": True}, {"reg_tokens": 2}, {"pre_norm": True}, {"no_embed_class": True}]
BARE_TOO += [{"qkv_bias": False}, {"global_pool": "avg", "fc_norm": True}]
BY_NAME = [{"act_layer": "quick_gelu"}, {"act_layer": "gelu_tanh"}, {"class_token": False, "global_pool": "map"}]


@pytest.mark.parametrize("change", [*BARE_TOO, *BY_NAME, {"block_fn": "no such"}], ids=lambda change: "-".join(change))
def test_arguments_that_make_another_model_are_never_taken_for_a_plain_vit(tmp_path: Path, change):
    """The shapes may be a plain ViT's; by name alone timm would not build them again, so they are refused."""
    unknown = "no such" in change.values()
    model = timm_folder(tmp_path, "vit_tiny_patch16_224", **TIMM | ({} if unknown else change))
    if unknown:
        content = json.loads((tmp_path / "config.json").read_text())
        content["model_args"] |= change
        (tmp_path / "config.json").write_text(json.dumps(content))
    expect_refusal(tmp_path)
    if change in BARE_TOO:  # nor where there are but tensors
        (tmp_path / "bare").mkdir()
        torch.save(model.state_dict(), tmp_path / "bare" / "w.pth")
        expect_refusal(tmp_path / "bare" / "w.pth")


def test_a_bare_file_tells_its_architecture_but_for_heads(tmp_path: Path):
    """Of 64 for each, as of a model in DataParallel; timm's config beside it says how many there are."""
    timm_model = narrow()
    tensors = timm_model.state_dict() | {"head.weight": torch.ones(2)}
    torch.save({"model": {f"module.{name}": value for name, value in tensors.items()}, "epoch": 3}, tmp_path / "w.pth")
    check_same_tokens(load_encoder(tmp_path / "w.pth"), timm_model)
    save_file(timm_model.state_dict(), tmp_path / "model.safetensors")
    timm_config = {"mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}
    timm_config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"num_heads": 4},
        "pretrained_cfg": timm_config,
    }
    (tmp_path / "config.json").write_text(json.dumps(timm_config))
    config: Any = load_encoder(tmp_path).config
    assert (config.dims[2], config.mean, config.std) == (4, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))


def test_what_timm_or_its_hub_would_be_needed_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as offline:
        offline.setattr(timm, "create_model", Mock(side_effect=OSError("Network is unreachable")))
        with pytest.raises(ExitError, match=r"cannot be had .*Network is unreachable.*give a local file") as error:
            weights.read_source("timm:vit_tiny_patch16_224.augreg_in21k")
    assert error.value.code == ExitCode.DATA
    timm_model = timm_folder(tmp_path / "plain", "vit_tiny_patch16_224", **TIMM)
    timm_folder(tmp_path / "other", "test_vit", img_size=32)
    monkeypatch.setitem(sys.modules, "timm", None)
    check_same_tokens(load_encoder(tmp_path / "plain"), timm_model)  # its name says it all
    with pytest.raises(ExitError, match=r"only timm knows what test_vit is; pip install"):
        load_encoder(tmp_path / "other")


# --- the report


def test_the_report_says_what_became_of_every_tensor(tmp_path: Path):
    foreign.write_google(tmp_path / "google.npz")
    source, tensors = weights.read_source(str(tmp_path / "google.npz"))
    del tensors["norm.bias"]
    tensors["blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    encoder = source.model_copy(update={"image": 24}).build()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ExitError) as error:
        weights.load_weights(encoder, source, tensors, "w.npz")
    missing, mismatched = "1 tensors missing (norm.bias)", "1 tensors of another shape (blocks.0.mlp.fc1.bias)"
    assert str(error.value) == f"w.npz: does not fit the encoder: {missing}; {mismatched}"
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    total = sum(value.numel() for value in before.values())
    fraction = (total - WIDTH - MLP) / total
    with pytest.raises(
        ExitError, match=rf"\({fraction:.1%} of it can be filled, init_min_fraction={fraction + 1e-6:g}"
    ):
        weights.load_weights(encoder, source, tensors, "w.npz", fraction + 1e-6)
    report = weights.load_weights(encoder, source, tensors, "w.npz", fraction - 1e-6)
    assert str(report) == (
        f"w.npz: {fraction:.1%} of the encoder; {len(before) - 2} matched, 1 resized (pos_embed), 1 of another shape "
        "(blocks.0.mlp.fc1.bias), 1 missing (norm.bias), "
        "4 left over (pre_logits.weight, pre_logits.bias, head.weight ...)"
    )
    unchanged = {name for name, value in encoder.state_dict().items() if torch.equal(value, before[name])}
    assert unchanged == {"norm.bias", "blocks.0.mlp.fc1.bias"}  # these alone stay as they were


@pytest.mark.parametrize("schema", [Pretrain, Finetune])
def test_what_a_training_says_of_its_source(tmp_path: Path, schema, capsys: pytest.CaptureFixture[str]):
    foreign.write_google(tmp_path / "google.npz")
    save_hf_model(transformers.ViTForImageClassification(transformers.ViTConfig(**HF)), tmp_path / "hf")
    for path in (tmp_path / "google.npz", tmp_path / "hf"):
        args = [f"init={path}", "data.train=x", "data.image_size=24", "init_min_fraction=0.9"]
        parsed, tensors, source = recipes.resolve_recipe(config.parse(schema, args))
        model = setup.build_model(parsed, 3, tensors, source, say=print)
        output = capsys.readouterr().out
        count = len(model.encoder.state_dict())
        assert output.startswith(f"{path}: 100.0% of the encoder; {count} matched, 1 resized (pos_embed), ")
        assert ("left over (pre_logits.weight, pre_logits.bias" in output) == (path.name == "google.npz")
        assert ("2 left over (classifier." in output) == (path.name == "hf")
        assert model.encoder.grid == (6, 6)


# --- damaged and foreign files


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "w.pth"])
def test_a_file_that_was_cut_short_is_refused_wherever_it_was(tmp_path: Path, name):
    write_weights(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for fraction in (0.0, 0.01, 0.3, 0.9, 0.9999):
        (tmp_path / name).write_bytes(content[: int(len(content) * fraction)])
        expect_refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_flipped_bits_are_refused_or_are_in_the_numbers(tmp_path: Path, name):
    """Zip has a checksum of every array. Safetensors has none: what flips outside of its header cannot be told."""
    write_weights(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    offsets = range(100, len(content), len(content) // 40) if name == "w.npz" else range(0, 2000, 41)
    num_refused = 0
    for offset in offsets:
        (tmp_path / name).write_bytes(content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :])
        with suppress(ExitError):
            load_encoder(tmp_path / name)
            continue
        expect_refusal(tmp_path / name)
        num_refused += 1
    assert num_refused > 0.8 * len(offsets)  # the rest hit what nobody reads, such as a time in the zip


class Evil:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_nothing_is_executed_and_nothing_foreign_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 64)
    arrays = foreign.google_arrays()
    arrays["cls"] = np.array([Evil()], dtype=object)
    np.savez(tmp_path / "object.npz", **arrays)  # type: ignore[arg-type]
    np.save(tmp_path / "array.npy", arrays["cls"])
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("pickle.npz", "pickle.pth", "pickle.bin", "pickle.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": Evil()}))
    checkpoint = foreign.dino_checkpoint(timm_vit(), timm_vit(seed=1))
    checkpoint["args"].hook = Evil()
    torch.save(checkpoint, tmp_path / "args.pth")
    torch.save({"teacher": {"x": Evil()}}, tmp_path / "teacher.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "teacher.pth").rename(tmp_path / "folder" / "pytorch_model.bin")
    torch.save({"x": Evil()}, tmp_path / "bare.pth")
    for path in [*tmp_path.glob("*.*"), tmp_path / "folder" / "pytorch_model.bin", tmp_path / "none.pth"]:
        expect_refusal(path)
    assert not list(tmp_path.rglob("canary"))
    (tmp_path / "config.json").write_text(json.dumps({"ssl_vit": {"size": "XXL"}}))
    with pytest.raises(ExitError, match=r"config\.json"):
        load_encoder(tmp_path / "other.safetensors")


# --- in the tools

QUIET = ["data.workers=0", "batch=4", "micro_batch=4", "tracker=none", "steps=2", "log_every=1", "save_every=2"]
QUIET += ["optim.warmup_steps=0", "optim.lr=0.001", "seed=0"]


def run_tool(tool: str, args: list[str], codes: tuple[int, ...] = (0,)) -> str:
    result = call_tool(tool, args)
    assert result.code in codes, result.output
    return result.output


def training_args(shards: Path, run: Path) -> list[str]:
    return [*QUIET, f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}"]


def test_googles_file_is_fine_tuned_at_another_size(shards: Path, tmp_path: Path):
    foreign.write_google(tmp_path / "w.npz")
    args = [*training_args(shards, tmp_path / "run"), f"init={tmp_path}/w.npz", "data.image_size=24"]
    output = run_tool("finetune", args)
    unused = "4 left over (pre_logits.weight, pre_logits.bias, head.weight ...)"
    assert f"w.npz: 100.0% of the encoder; 30 matched, 1 resized (pos_embed), {unused}\n" in output
    tuned = load_encoder(tmp_path / "run")
    assert tuned.grid == (6, 6)
    start = load_encoder(tmp_path / "w.npz").state_dict()["blocks.0.mlp.fc1.weight"]
    change = (tuned.state_dict()["blocks.0.mlp.fc1.weight"] - start).abs().max()
    assert 0 < change < 0.1  # from where the file left it, two steps on
    (tmp_path / "cut.npz").write_bytes((tmp_path / "w.npz").read_bytes()[:-100])
    cut_args = [*training_args(shards, tmp_path / "other"), f"init={tmp_path}/cut.npz", "data.image_size=24"]
    assert "cut.npz" in run_tool("finetune", cut_args, (ExitCode.USAGE, ExitCode.DATA))


def test_hugging_faces_folder_is_judged_frozen(shards: Path, tmp_path: Path):
    randomize(transformers.ViTModel(transformers.ViTConfig(**HF))).save_pretrained(tmp_path / "hf")
    args = [f"encoder={tmp_path}/hf", f"data.train={shards}/train", f"data.val={shards}/val", f"run={tmp_path}/run"]
    args += ["few_shot.shots=1,2", "linear.l2=0.01", "metrics.bootstrap=20", "random=false", "batch=3"]
    run_tool("evaluate", [*args, "data.workers=0"])
    evaluation = read_results(tmp_path / "run")
    assert evaluation["encoder"] == f"{tmp_path}/hf"
    assert find_value(evaluation, "classes") == ["blue", "green", "red"]


@pytest.mark.long
def test_a_bit_is_pretrained_fine_tuned_and_predicts(squares: Path, shards: Path, tmp_path: Path):
    args = [*training_args(shards, tmp_path / "pre"), "encoder.kind=bit", "encoder.pool=mean", "head.kind=classifier"]
    run_tool("pretrain", [*args, "data.image_size=32"])
    content = json.loads((tmp_path / "pre" / "encoder" / "config.json").read_text())
    assert content["architecture"] == "resnetv2_50x1_bit"
    finetune_args = [*training_args(shards, tmp_path / "fine"), f"init={tmp_path}/pre", "data.image_size=32"]
    output = run_tool("finetune", finetune_args)
    assert "100.0% of the encoder" in output
    run_tool("predict", [f"encoder={tmp_path}/fine", f"input={squares}", f"output={tmp_path}/out.csv"])
    columns, rows = read_predictions(tmp_path / "out.csv")
    assert columns == ["file"] + [f"{prefix}{i}" for i in (1, 2, 3) for prefix in ("top", "score")]
    assert len(rows) == 36
    assert all(row[0] in ("blue", "green", "red") for row in rows.values())
    masked_args = [*training_args(shards, tmp_path / "masked"), f"init={tmp_path}/pre", "data.image_size=32"]
    assert "replaces patch embeddings" in run_tool("pretrain", masked_args, (ExitCode.USAGE, ExitCode.DATA))
    assert not torch.isnan(load_encoder(tmp_path / "fine").state_dict()["model.stem.conv.weight"]).any()


def test_a_class_token_that_the_source_lacks_is_not_read_out(tmp_path: Path):
    """The first patch would be taken for it."""
    export_encoder(Vit(size="Ti", depth=1, patch=8, image=16, class_token=False, pool="mean").build(), tmp_path)
    args = [f"init={tmp_path}", "data.image_size=16", "encoder.pool=class"]
    with pytest.raises(ExitError, match=r"no class token to read out; set encoder\.pool=mean") as error:
        recipes.resolve_recipe(config.parse(recipes.Finetune, args))
    assert error.value.code == ExitCode.USAGE
