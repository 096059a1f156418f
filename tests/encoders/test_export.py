"""Weights go out: what timm, transformers and onnxruntime compute from an export is what the encoder computes."""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

from ssl_vit import commands, errors
from ssl_vit.commands import export as command
from ssl_vit.encoders import export, weights
from ssl_vit.encoders.weights import PretrainedClassifier, load_encoder
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import pool_tokens
from tests.encoders import foreign_weights as foreign
from tests.encoders.foreign_weights import random_images, randomize

SMALL: dict[str, Any] = {"kind": "vit", "width": 48, "heads": 3, "depth": 2, "mlp": 80, "patch": 4, "image": 16}
AXIAL: dict[str, Any] = {"kind": "axial", "width": 48, "heads": 3, "depth": 1, "patch": 4, "image": (16, 24)}
KINDS: dict[str, dict[str, Any]] = {
    "vit": {},
    "mean": {"pool": "mean"},
    "no class token": {"pool": "mean", "class_token": False},
    "no positions": {"pool": "mean", "positions": "none"},
    "oblong": {"image": (16, 24), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3)},
    "one channel": {"channels": 1},
    "four channels": {"channels": 4},
    "odd numbers": {"width": 44, "heads": 2, "mlp": 15},  # 15 / 44 * 44 is less than 15 for a computer
    "huge": {"size": "H", "patch": 14, "image": 28},
    "2d": {"positions": "2d"},
    "hybrid": {"stem": "r50", "patch": 16, "image": 32},
    "bit": {"kind": "bit", "image": 32},
    "zoo": {"kind": "timm", "name": "test_vit2", "image": 32, "pool": "class"},
    "zoo, a map": {"kind": "timm", "name": "test_convnext", "image": 64},
}
ONLY_OURS: dict[str, dict[str, Any]] = {
    "relative": {"positions": "relative"},
    "relative, shared": {"positions": "relative", "position_placement": "shared", "image": (16, 24)},
    "every": {"position_placement": "every"},
    "shared": {"position_placement": "shared"},
    "2d, every": {"positions": "2d", "position_placement": "every"},
    "axial, relative": AXIAL | {"positions": "relative"},
    "axial resnet": {"kind": "axial_resnet", "image": 64, "heads": 4},
    "R50x2": {"kind": "bit", "image": 32, "widen": 2},
}


def in_process_tier(kind: str) -> Any:
    """In the `process` tier: it takes seconds, and others stand for it."""
    return pytest.param(kind, marks=pytest.mark.process)


def make_encoder(settings: dict[str, Any]) -> Any:
    """An encoder with loud random weights; those of deep ResNets as they are, which are chaotic at loud ones."""
    torch.manual_seed(0)
    config = weights.CONFIG_ADAPTER.validate_python(settings if "kind" in settings else SMALL | settings)
    encoder = config.build().eval()
    return encoder if config.kind in ("bit", "axial_resnet") else randomize(encoder)


def make_run(folder: Path, settings: dict[str, Any]) -> Any:
    """The encoder, and a run's encoder/ folder of it."""
    encoder = make_encoder(settings)
    export.export_encoder(encoder, folder / "run" / "encoder")
    return encoder


def run_export(*args: object) -> None:
    """tools/export.py, in this process."""
    assert commands.call(command, [str(arg) for arg in args]) == 0


def make_and_export(folder: Path, settings: dict[str, Any], *args: str) -> Any:
    """The encoder, which the tool has exported from folder/run to folder/out."""
    encoder = make_run(folder, settings)
    run_export(f"encoder={folder}/run", f"output={folder}/out", *args)
    return encoder


def load_in_timm(folder: Path) -> Any:
    return timm.create_model(f"local-dir:{folder}/out", pretrained=True).eval()


def expect_refusal(code: int, *args: object) -> str:
    """What the tool says when it refuses; always one line."""
    with pytest.raises(ExitError) as error:
        run_export(*args)
    assert error.value.code == code, error.value
    assert "\n" not in str(error.value)
    return str(error.value)


def names_under(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@torch.no_grad()
def check_same_tokens(encoder: Any, model: Any, atol: float = 0.0) -> None:
    images = random_images(*encoder.config.image_hw, channels=encoder.channels)
    expected = encoder(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(images), expected, atol=atol, rtol=0)


def resize_encoder(encoder: Any, size: Any) -> Any:
    """The encoder for another image size, as loading makes it."""
    target = encoder.config.model_copy(update={"image": size}).build().eval()
    weights.load_weights(target, encoder.config, export.export_tensors(encoder), "x")
    return target


# --- timm's folder and our own


@pytest.mark.parametrize("kind", [in_process_tier(kind) if kind in ("bit", "zoo, a map") else kind for kind in KINDS])
def test_timm_opens_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind):
    encoder = make_and_export(tmp_path, KINDS[kind])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].endswith(f"run: 100.0% of the encoder; {len(encoder.state_dict())} matched")
    assert lines[1] == f"{tmp_path}/out: opened by timm and load_encoder"
    timm_model, to_tokens = load_in_timm(tmp_path), getattr(encoder, "_to_tokens", lambda x: x)
    atol = 1e-6 if kind == "2d" else 0.0  # x + (row, column) from a table or from its parts
    check_same_tokens(encoder, lambda x: to_tokens(timm_model.forward_features(encoder.normalize(x))), atol)
    check_same_tokens(encoder, load_encoder(tmp_path / "out"), atol)
    mean = encoder.config.mean * (encoder.channels if len(encoder.config.mean) == 1 else 1)
    assert tuple(timm_model.pretrained_cfg["mean"]) == mean
    assert tuple(timm_model.pretrained_cfg["input_size"]) == (encoder.channels, *encoder.config.image_hw)
    if encoder.config.kind == "vit":
        images = random_images(*encoder.config.image_hw, channels=encoder.channels)
        with torch.no_grad():
            expected = pool_tokens(encoder(images), encoder.pool, encoder.prefix)
            torch.testing.assert_close(timm_model(encoder.normalize(images)), expected, atol=1e-6, rtol=0)


SLOW = {"R50x2": pytest.mark.long, "axial resnet": pytest.mark.process}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in ONLY_OURS])
def test_our_folder_takes_what_timm_cannot_express(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind):
    encoder = make_run(tmp_path, ONLY_OURS[kind])
    args = [f"encoder={tmp_path}/run", f"output={tmp_path}/out"]
    assert re.search(
        "timm cannot express this encoder.*format=safetensors takes any", expect_refusal(ExitCode.USAGE, *args)
    )
    assert "format=hf: Hugging Face's ViTModel cannot express this encoder: it" in expect_refusal(
        ExitCode.USAGE, *args, "format=hf"
    )
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    run_export(*args, "format=safetensors")
    assert "timm has no such model: opened by load_encoder only" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "architecture" not in content
    assert content["ssl_vit"]["kind"] == encoder.config.kind
    loaded = load_encoder(tmp_path / "out")
    assert loaded.config == encoder.config
    check_same_tokens(encoder, loaded)
    height, width = (96, 64) if kind in SLOW else (20, 28)  # and so it does positions of every form of another size
    run_export(*args, "format=safetensors", f"image_size={height},{width}")
    loaded = load_encoder(tmp_path / "out")
    assert loaded.config.image_hw == (height, width)
    check_same_tokens(resize_encoder(encoder, (height, width)), loaded)


def test_an_export_loads_back_from_every_name_is_readable_by_all_and_replaces_what_was_there(tmp_path: Path):
    encoder = make_run(tmp_path, KINDS["oblong"])
    run = tmp_path / "run"
    for path in (run, run / "encoder", run / "encoder" / "model.safetensors", f"timm:local-dir:{run}/encoder"):
        loaded = load_encoder(path)
        assert (loaded.training, loaded.config) == (False, encoder.config)
        check_same_tokens(encoder, loaded)
    run_export(f"encoder={run}", f"output={run}/encoder")  # onto its own source
    (run / "encoder" / "notes.txt").write_text("mine")
    run_export(f"encoder={run}", f"output={run}/encoder", "format=safetensors")
    check_same_tokens(encoder, load_encoder(run))
    assert names_under(run) == ["config.json", "encoder", "model.safetensors", "notes.txt"]
    assert (run / "encoder" / "model.safetensors").stat().st_mode & 0o044 == 0o044


# --- Hugging Face


@pytest.mark.parametrize("kind", ["vit", "oblong", "odd numbers", "2d", "four channels"])
def test_hugging_face_opens_its_folder(tmp_path: Path, kind):
    encoder = make_and_export(tmp_path, KINDS[kind], "format=hf")
    options: dict[str, Any] = {"add_pooling_layer": False, "output_loading_info": True}
    hf_model, loading_info = transformers.ViTModel.from_pretrained(tmp_path / "out", **options)  # type: ignore[misc]
    assert not any(loading_info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check_same_tokens(encoder, lambda x: hf_model.eval()(encoder.normalize(x)).last_hidden_state, 1e-5)
    check_same_tokens(encoder, load_encoder(tmp_path / "out"), 1e-5)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "encoder.layer.1.attention.attention.query.weight" in names  # what older transformers look for
    assert transformers.ViTConfig.from_pretrained(tmp_path / "out").layer_norm_eps == 1e-6
    if encoder.channels == 3:  # its image processor prepares as the encoder does
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
        images = random_images(*encoder.config.image_hw)
        for processor_input in ([*images.permute(0, 2, 3, 1).numpy()], [*images]):
            pixels = processor(processor_input, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(pixels, encoder.normalize(images), atol=1e-6, rtol=0)


NOT_HF = {"no class token": "no class token", "no positions": "no table at the stem", "hybrid": "from a ResNet"}
NOT_HF |= {"zoo": "no ViT"}


@pytest.mark.parametrize("kind", NOT_HF)
def test_hugging_face_has_no_such_model(tmp_path: Path, kind):
    make_run(tmp_path, KINDS[kind])
    assert NOT_HF[kind] in expect_refusal(
        ExitCode.USAGE, f"encoder={tmp_path}/run", f"output={tmp_path}/out", "format=hf"
    )
    assert not (tmp_path / "out").exists()


# --- ONNX

ONNX = {"vit": {}, "oblong, no class token": KINDS["oblong"] | {"pool": "mean", "class_token": False}}
ONNX |= {kind: KINDS[kind] for kind in ("2d", "no positions")}
ONNX |= {kind: ONLY_OURS[kind] for kind in ("relative, shared", "2d, every", "axial, relative")}
LONG = {"axial resnet": ONLY_OURS["axial resnet"]}
LONG |= {kind: KINDS[kind] for kind in ("hybrid", "bit", "zoo", "zoo, a map")}


def onnx_runner(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run


QUICK = {("relative, shared", 0): (), ("vit", 5): pytest.mark.process, ("axial, relative", 3): pytest.mark.process}
CASES = [*QUICK, *((kind, classes) for kind in ONNX | LONG for classes in (0, 3) if (kind, classes) not in QUICK)]


@pytest.mark.filterwarnings("ignore")  # of the exporter, of its own making
@pytest.mark.parametrize(
    ("kind", "classes"), [pytest.param(*case, marks=QUICK.get(case, pytest.mark.long)) for case in CASES]
)
def test_onnxruntime_computes_the_same_at_any_batch(tmp_path: Path, kind, classes):
    logging.disable(logging.WARNING)
    encoder = make_encoder((ONNX | LONG)[kind])
    head = None
    if classes:
        head = PretrainedClassifier(
            torch.randn(classes, encoder.width), torch.randn(classes), [str(i) for i in range(classes)]
        )
    export.export_onnx(encoder, tmp_path / "model.onnx", head)
    run = onnx_runner(tmp_path / "model.onnx")
    for count in (1, 3):
        images = random_images(*encoder.config.image_hw, count=count, channels=encoder.channels)
        tokens, result = run(["tokens", "logits" if classes else "features"], {"image": images.numpy()})
        with torch.no_grad():
            expected_tokens = encoder(images)
        features = pool_tokens(expected_tokens, encoder.pool, encoder.prefix)
        expected_result = features @ head.weight.T + head.bias if head else features
        for actual, expected in ((tokens, expected_tokens), (result, expected_result)):
            np.testing.assert_allclose(np.asarray(actual), expected, atol=5e-4 * float(expected.abs().max()), rtol=0)
    assert (tmp_path / "model.onnx").stat().st_size > 4 * sum(parameter.numel() for parameter in encoder.parameters())
    logging.disable(logging.NOTSET)


def test_without_the_extra_onnx_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path, {})
    for name in ("onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            message = expect_refusal(
                ExitCode.USAGE, f"encoder={tmp_path}/run", f"output={tmp_path}/x.onnx", "format=onnx"
            )
        assert message == f"format=onnx: {name} is missing; pip install 'ssl_vit[onnx]'"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.filterwarnings("ignore")
def test_the_tool_writes_onnx_with_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    encoder, head = run_with_classifier(tmp_path)
    run_export(
        f"encoder={tmp_path}/run", f"output={tmp_path}/deep/x.onnx", "format=onnx", "classifier=true", "image_size=24"
    )
    output = capsys.readouterr().out
    assert "image uint8 in, tokens and logits out; onnxruntime differs by " in output
    assert "more than rounding" not in output
    larger = resize_encoder(encoder, 24)
    (logits,) = onnx_runner(tmp_path / "deep" / "x.onnx")(["logits"], {"image": random_images(24, 24).numpy()})
    with torch.no_grad():
        expected = larger(random_images(24, 24))[:, 0] @ head.weight.T + head.bias
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4)
    assert names_under(tmp_path / "deep") == ["x.onnx"]


# --- with a classifier


def run_with_classifier(folder: Path, settings: dict[str, Any] | None = None) -> tuple[Any, PretrainedClassifier]:
    encoder = make_run(folder, settings or {})
    head = PretrainedClassifier(torch.randn(3, encoder.width), torch.randn(3), ["a|b", "<script>", "ü\n,"], 0.9)
    export.export_encoder(encoder, folder / "run" / "classifier", head)
    return encoder, head


@pytest.mark.parametrize("kind", ["vit", "mean", "2d", in_process_tier("hybrid")])
def test_timm_opens_a_classifier(tmp_path: Path, kind):
    encoder, head = run_with_classifier(tmp_path, KINDS[kind])
    run_export(f"encoder={tmp_path}/run", f"output={tmp_path}/out", "classifier=true")
    timm_model, images = load_in_timm(tmp_path), random_images(*encoder.config.image_hw)
    with torch.no_grad():
        expected = pool_tokens(encoder(images), encoder.pool, encoder.prefix) @ head.weight.T + head.bias
        torch.testing.assert_close(timm_model(encoder.normalize(images)), expected, atol=1e-5, rtol=0)
    assert timm_model.pretrained_cfg["label_names"] == head.names
    assert timm_model.pretrained_cfg["crop_pct"] == 0.9
    loaded, loaded_head = weights.read_classifier(str(tmp_path / "out"))
    check_same_tokens(encoder, loaded, 1e-6)
    assert torch.equal(loaded_head.weight, head.weight)
    assert loaded.config == encoder.config or kind not in ("vit", "mean")
    assert (loaded_head.names, loaded_head.crop) == (head.names, 0.9)


@pytest.mark.parametrize("given", [AXIAL, KINDS["2d"]])
def test_a_classifier_of_any_encoder_goes_into_our_own_folder(tmp_path: Path, given):
    encoder, head = run_with_classifier(tmp_path, given)
    run_export(f"encoder={tmp_path}/run", f"output={tmp_path}/out", "classifier=true", "format=safetensors")
    loaded, loaded_head = weights.read_classifier(str(tmp_path / "out"))
    assert loaded.config == encoder.config  # positions of rows and columns as well, which timm has as a table
    check_same_tokens(encoder, loaded)
    assert torch.equal(loaded_head.bias, head.bias)


def test_a_classifier_where_none_can_go(tmp_path: Path):
    run_with_classifier(tmp_path / "vit")
    run_with_classifier(tmp_path / "zoo", {"kind": "timm", "name": "test_vit", "image": 32})
    make_run(tmp_path / "bare", {})
    foreign.write_google(tmp_path / "w.npz")
    no_classifier, format_arg = (
        "no classifier/model.safetensors in it (tools/finetune.py makes one)",
        "format=safetensors",
    )
    for code, name, args, expected in (
        (ExitCode.USAGE, "vit/run", ["format=hf"], "format=hf has no place for it"),
        (ExitCode.USAGE, "zoo/run", [], f"of kind=timm there is only our own folder with it, {format_arg}"),
        (ExitCode.DATA, "bare/run", [], no_classifier),
        (
            ExitCode.DATA,
            "w.npz",
            [],
            "its classifier is not linear on what the encoder gives: pre_logits comes between",
        ),
    ):
        message = expect_refusal(code, f"encoder={tmp_path}/{name}", f"output={tmp_path}/out", "classifier=true", *args)
        assert expected in message
        assert message.endswith(expected) or name != "w.npz"
    assert not (tmp_path / "out").exists()


def test_googles_linear_classifier_is_taken(tmp_path: Path):
    arrays = foreign.write_google(tmp_path / "w.npz", pre_logits=False)
    encoder, head = weights.read_classifier(str(tmp_path / "w.npz"))
    timm_args: dict[str, Any] = foreign.TIMM | {"num_classes": 5}
    timm_model: Any = timm.create_model("vit_base_patch16_224", **timm_args).eval()
    timm_model.load_pretrained(str(tmp_path / "w.npz"))
    with torch.no_grad():
        logits = encoder(random_images())[:, 0] @ head.weight.T + head.bias
        torch.testing.assert_close(logits, timm_model(encoder.normalize(random_images())), atol=1e-5, rtol=0)
    assert head.names == [str(number) for number in range(len(arrays["head/bias"]))]


# --- at another size


@pytest.mark.parametrize("form", ["timm", "hf", "safetensors"])
@pytest.mark.parametrize("size", ["24", "16,32", "8"])
def test_positions_of_another_size_are_baked_in(tmp_path: Path, capsys: pytest.CaptureFixture[str], form, size):
    encoder = make_and_export(tmp_path, {}, f"image_size={size}", f"format={form}")
    assert ", 1 resized (pos_embed)" in capsys.readouterr().out
    loaded: Any = load_encoder(tmp_path / "out")
    height, width = loaded.config.image_hw
    assert [height, width] == [int(side) for side in (size.split(",") * 2)[:2]]
    check_same_tokens(resize_encoder(encoder, (height, width)), loaded, 1e-5)
    if form == "timm":
        timm_model = load_in_timm(tmp_path)
        check_same_tokens(loaded, lambda x: timm_model.forward_features(loaded.normalize(x)))
    if form == "hf":
        hf_model = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
        check_same_tokens(loaded, lambda x: hf_model(loaded.normalize(x)).last_hidden_state, 1e-5)


# --- refusals


def test_what_the_tool_refuses(tmp_path: Path):
    make_run(tmp_path, {})
    encoder_arg, output_arg = f"encoder={tmp_path}/run", f"output={tmp_path}/x"
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "file").write_text("")
    bad_outputs = [f"output={path}" for path in (tmp_path / "file", tmp_path / "file" / "x", "/proc/nowhere/x")]
    for code, expected, *args in (
        (ExitCode.USAGE, "encoder: it must be given"),
        (ExitCode.DATA, "no such run, folder or weights file", "encoder=/nowhere", output_arg),
        (ExitCode.DATA, "no encoder/model.safetensors in it", f"encoder={tmp_path}", output_arg),
        (ExitCode.DATA, "w.safetensors", f"encoder={tmp_path}/w.safetensors", output_arg),
        *((ExitCode.USAGE, "image_size", encoder_arg, f"image_size={size}", output_arg) for size in ("0", "16,0")),
        (ExitCode.USAGE, "cannot be cut into patches of 4; 16 x 16 can", encoder_arg, "image_size=17", output_arg),
        (ExitCode.USAGE, "format", encoder_arg, "format=flax", output_arg),
        *((ExitCode.CANNOT_CREATE, "name another place", encoder_arg, bad_output) for bad_output in bad_outputs),
        (ExitCode.CANNOT_CREATE, "is a folder", encoder_arg, "format=onnx", f"output={tmp_path}/run"),
    ):
        assert expected in expect_refusal(code, *args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "w.safetensors"]


def test_less_than_all_of_it_only_where_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    foreign.write_google(tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as arrays:
        remaining = {name: arrays[name] for name in arrays.files if name != "Transformer/encoder_norm/bias"}
    np.savez(tmp_path / "less.npz", **remaining)  # type: ignore[arg-type]
    args = [f"encoder={tmp_path}/less.npz", f"output={tmp_path}/out"]
    assert "1 tensors missing (norm.bias)" in expect_refusal(ExitCode.DATA, *args)
    run_export(*args, "init_min_fraction=0.9")
    assert "1 missing (norm.bias), 4 left over (pre_logits.weight, " in capsys.readouterr().out


def test_a_disk_that_is_full_ends_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path, {})
    monkeypatch.setattr(export, "save_file", Mock(side_effect=OSError(28, "No space left on device", "x")))
    with pytest.raises(OSError, match="No space left") as error:
        run_export(f"encoder={tmp_path}/run", f"output={tmp_path}/out")
    assert errors.to_exit_error(error.value).code == errors.ExitCode.DISK
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
