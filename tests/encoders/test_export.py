"""Weights go out: what timm, transformers and onnxruntime compute from an export is what the encoder computes."""

import json
import logging
import re
import runpy
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

from ssl_vit import errors
from ssl_vit.encoders import export, weights
from ssl_vit.encoders.weights import Classifier, load_encoder
from ssl_vit.errors import CANNOT_CREATE, DATA, USAGE, Refusal
from ssl_vit.model import read_out
from tests.encoders import foreign_weights as foreign
from tests.encoders.foreign_weights import image, loud
from tests.starts import TOOLS

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
    "relative, shared": {"positions": "relative", "positions_at": "shared", "image": (16, 24)},
    "every": {"positions_at": "every"},
    "shared": {"positions_at": "shared"},
    "2d, every": {"positions": "2d", "positions_at": "every"},
    "axial, relative": AXIAL | {"positions": "relative"},
    "axial resnet": {"kind": "axial_resnet", "image": 64, "heads": 4},
    "R50x2": {"kind": "bit", "image": 32, "widen": 2},
}


def later(kind: str) -> Any:
    """In the `process` tier: it takes seconds, and others stand for it."""
    return pytest.param(kind, marks=pytest.mark.process)


def made(given: dict[str, Any]) -> Any:
    """An encoder with loud random weights; those of deep ResNets as they are, which are chaotic at loud ones."""
    torch.manual_seed(0)
    config = weights.CONFIG.validate_python(given if "kind" in given else SMALL | given)
    encoder = config.build().eval()
    return encoder if config.kind in ("bit", "axial_resnet") else loud(encoder)


def source(folder: Path, given: dict[str, Any]) -> Any:
    """The encoder, and a run's encoder/ folder of it."""
    encoder = made(given)
    export.export(encoder, folder / "run" / "encoder")
    return encoder


def tool(*words: object) -> None:
    """tools/export.py, in this process."""
    module = runpy.run_path(str(TOOLS / "export.py"), run_name="export")
    assert module["main"]([str(word) for word in words]) == 0


def exported(folder: Path, given: dict[str, Any], *words: str) -> Any:
    """The encoder, which the tool has exported from folder/run to folder/out."""
    encoder = source(folder, given)
    tool(f"encoder={folder}/run", f"output={folder}/out", *words)
    return encoder


def timms(folder: Path) -> Any:
    return timm.create_model(f"local-dir:{folder}/out", pretrained=True).eval()


def refused(code: int, *words: object) -> str:
    """What the tool says when it refuses; always one line."""
    with pytest.raises(Refusal) as end:
        tool(*words)
    assert end.value.code == code, end.value
    assert "\n" not in str(end.value)
    return str(end.value)


def names_under(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@torch.no_grad()
def same(encoder: Any, other: Any, atol: float = 0.0) -> None:
    one = image(*encoder.config.image_hw, channels=encoder.channels)
    want = encoder(one)
    assert want.std() > 0.1
    torch.testing.assert_close(other(one), want, atol=atol, rtol=0)


def resized(encoder: Any, size: Any) -> Any:
    """The encoder for another image size, as loading makes it."""
    other = encoder.config.model_copy(update={"image": size}).build().eval()
    weights.fill(other, encoder.config, export.tensors(encoder), "x")
    return other


# --- timm's folder and our own


@pytest.mark.parametrize("kind", [later(kind) if kind in ("bit", "zoo, a map") else kind for kind in KINDS])
def test_timm_opens_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind):
    encoder = exported(tmp_path, KINDS[kind])
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said[0].endswith(f"run: 100.0% of the encoder; {len(encoder.state_dict())} matched")
    assert said[1] == f"{tmp_path}/out: opened by timm and load_encoder"
    theirs, as_tokens = timms(tmp_path), getattr(encoder, "_tokens", lambda found: found)
    at_once = 1e-6 if kind == "2d" else 0.0  # x + (row, column) from a table or from its parts
    same(encoder, lambda one: as_tokens(theirs.forward_features(encoder.normalise(one))), at_once)
    same(encoder, load_encoder(tmp_path / "out"), at_once)
    mean = encoder.config.mean * (encoder.channels if len(encoder.config.mean) == 1 else 1)
    assert tuple(theirs.pretrained_cfg["mean"]) == mean
    assert tuple(theirs.pretrained_cfg["input_size"]) == (encoder.channels, *encoder.config.image_hw)
    if encoder.config.kind == "vit":
        one = image(*encoder.config.image_hw, channels=encoder.channels)
        with torch.no_grad():
            want = read_out(encoder(one), encoder.pool, encoder.prefix)
            torch.testing.assert_close(theirs(encoder.normalise(one)), want, atol=1e-6, rtol=0)


SLOW = {"R50x2": pytest.mark.long, "axial resnet": pytest.mark.process}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in ONLY_OURS])
def test_our_folder_takes_what_timm_cannot_express(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind):
    encoder = source(tmp_path, ONLY_OURS[kind])
    words = [f"encoder={tmp_path}/run", f"output={tmp_path}/out"]
    assert re.search("timm cannot express this encoder.*format=safetensors takes any", refused(USAGE, *words))
    assert "format=hf: Hugging Face's ViTModel cannot express this encoder: it" in refused(USAGE, *words, "format=hf")
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    tool(*words, "format=safetensors")
    assert "timm has no such model: opened by load_encoder only" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "architecture" not in content
    assert content["ssl_vit"]["kind"] == encoder.config.kind
    again = load_encoder(tmp_path / "out")
    assert again.config == encoder.config
    same(encoder, again)
    height, width = (96, 64) if kind in SLOW else (20, 28)  # and so it does positions of every form of another size
    tool(*words, "format=safetensors", f"image_size={height},{width}")
    again = load_encoder(tmp_path / "out")
    assert again.config.image_hw == (height, width)
    same(resized(encoder, (height, width)), again)


def test_an_export_loads_back_from_every_name_is_readable_by_all_and_replaces_what_was_there(tmp_path: Path):
    encoder = source(tmp_path, KINDS["oblong"])
    run = tmp_path / "run"
    for path in (run, run / "encoder", run / "encoder" / "model.safetensors", f"timm:local-dir:{run}/encoder"):
        again = load_encoder(path)
        assert (again.training, again.config) == (False, encoder.config)
        same(encoder, again)
    tool(f"encoder={run}", f"output={run}/encoder")  # onto its own source
    (run / "encoder" / "notes.txt").write_text("mine")
    tool(f"encoder={run}", f"output={run}/encoder", "format=safetensors")
    same(encoder, load_encoder(run))
    assert names_under(run) == ["config.json", "encoder", "model.safetensors", "notes.txt"]
    assert (run / "encoder" / "model.safetensors").stat().st_mode & 0o044 == 0o044


# --- Hugging Face


@pytest.mark.parametrize("kind", ["vit", "oblong", "odd numbers", "2d", "four channels"])
def test_hugging_face_opens_its_folder(tmp_path: Path, kind):
    encoder = exported(tmp_path, KINDS[kind], "format=hf")
    options: dict[str, Any] = {"add_pooling_layer": False, "output_loading_info": True}
    theirs, report = transformers.ViTModel.from_pretrained(tmp_path / "out", **options)  # type: ignore[misc]
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(encoder, lambda one: theirs.eval()(encoder.normalise(one)).last_hidden_state, 1e-5)
    same(encoder, load_encoder(tmp_path / "out"), 1e-5)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "encoder.layer.1.attention.attention.query.weight" in names  # what older transformers look for
    assert transformers.ViTConfig.from_pretrained(tmp_path / "out").layer_norm_eps == 1e-6
    if encoder.channels == 3:  # its image processor prepares as the encoder does
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
        one = image(*encoder.config.image_hw)
        for given in ([*one.permute(0, 2, 3, 1).numpy()], [*one]):
            found = processor(given, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(found, encoder.normalise(one), atol=1e-6, rtol=0)


NOT_HF = {"no class token": "no class token", "no positions": "no table at the stem", "hybrid": "from a ResNet"}
NOT_HF |= {"zoo": "no ViT"}


@pytest.mark.parametrize("kind", NOT_HF)
def test_hugging_face_has_no_such_model(tmp_path: Path, kind):
    source(tmp_path, KINDS[kind])
    assert NOT_HF[kind] in refused(USAGE, f"encoder={tmp_path}/run", f"output={tmp_path}/out", "format=hf")
    assert not (tmp_path / "out").exists()


# --- ONNX

ONNX = {"vit": {}, "oblong, no class token": KINDS["oblong"] | {"pool": "mean", "class_token": False}}
ONNX |= {kind: KINDS[kind] for kind in ("2d", "no positions")}
ONNX |= {kind: ONLY_OURS[kind] for kind in ("relative, shared", "2d, every", "axial, relative")}
LONG = {"axial resnet": ONLY_OURS["axial resnet"]}
LONG |= {kind: KINDS[kind] for kind in ("hybrid", "bit", "zoo", "zoo, a map")}


def runner(path: Path) -> Any:
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
    encoder = made((ONNX | LONG)[kind])
    head = None
    if classes:
        head = Classifier(torch.randn(classes, encoder.width), torch.randn(classes), [str(i) for i in range(classes)])
    export.onnx(encoder, tmp_path / "model.onnx", head)
    run = runner(tmp_path / "model.onnx")
    for count in (1, 3):
        one = image(*encoder.config.image_hw, count=count, channels=encoder.channels)
        tokens, result = run(["tokens", "logits" if classes else "features"], {"image": one.numpy()})
        with torch.no_grad():
            want = encoder(one)
        features = read_out(want, encoder.pool, encoder.prefix)
        right = features @ head.weight.T + head.bias if head else features
        for found, value in ((tokens, want), (result, right)):
            np.testing.assert_allclose(np.asarray(found), value, atol=5e-4 * float(value.abs().max()), rtol=0)
    assert (tmp_path / "model.onnx").stat().st_size > 4 * sum(one.numel() for one in encoder.parameters())
    logging.disable(logging.NOTSET)


def test_without_the_extra_onnx_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source(tmp_path, {})
    for name in ("onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            said = refused(USAGE, f"encoder={tmp_path}/run", f"output={tmp_path}/x.onnx", "format=onnx")
        assert said == f"format=onnx: {name} is missing; pip install 'ssl_vit[onnx]'"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.filterwarnings("ignore")
def test_the_tool_writes_onnx_with_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    encoder, head = run_with_classifier(tmp_path)
    tool(f"encoder={tmp_path}/run", f"output={tmp_path}/deep/x.onnx", "format=onnx", "classifier=true", "image_size=24")
    said = capsys.readouterr().out
    assert "image uint8 in, tokens and logits out; onnxruntime differs by " in said
    assert "more than rounding" not in said
    larger = resized(encoder, 24)
    (found,) = runner(tmp_path / "deep" / "x.onnx")(["logits"], {"image": image(24, 24).numpy()})
    with torch.no_grad():
        want = larger(image(24, 24))[:, 0] @ head.weight.T + head.bias
    np.testing.assert_allclose(np.asarray(found), want, atol=1e-4)
    assert names_under(tmp_path / "deep") == ["x.onnx"]


# --- with a classifier


def run_with_classifier(folder: Path, given: dict[str, Any] | None = None) -> tuple[Any, Classifier]:
    encoder = source(folder, given or {})
    head = Classifier(torch.randn(3, encoder.width), torch.randn(3), ["a|b", "<script>", "ü\n,"], 0.9)
    export.export(encoder, folder / "run" / "classifier", head)
    return encoder, head


@pytest.mark.parametrize("kind", ["vit", "mean", "2d", later("hybrid")])
def test_timm_opens_a_classifier(tmp_path: Path, kind):
    encoder, head = run_with_classifier(tmp_path, KINDS[kind])
    tool(f"encoder={tmp_path}/run", f"output={tmp_path}/out", "classifier=true")
    theirs, one = timms(tmp_path), image(*encoder.config.image_hw)
    with torch.no_grad():
        want = read_out(encoder(one), encoder.pool, encoder.prefix) @ head.weight.T + head.bias
        torch.testing.assert_close(theirs(encoder.normalise(one)), want, atol=1e-5, rtol=0)
    assert theirs.pretrained_cfg["label_names"] == head.names
    assert theirs.pretrained_cfg["crop_pct"] == 0.9
    again, its = weights.read_classifier(str(tmp_path / "out"))
    same(encoder, again, 1e-6)
    assert torch.equal(its.weight, head.weight)
    assert again.config == encoder.config or kind not in ("vit", "mean")
    assert (its.names, its.crop) == (head.names, 0.9)


@pytest.mark.parametrize("given", [AXIAL, KINDS["2d"]])
def test_a_classifier_of_any_encoder_goes_into_our_own_folder(tmp_path: Path, given):
    encoder, head = run_with_classifier(tmp_path, given)
    tool(f"encoder={tmp_path}/run", f"output={tmp_path}/out", "classifier=true", "format=safetensors")
    again, its = weights.read_classifier(str(tmp_path / "out"))
    assert again.config == encoder.config  # positions of rows and columns as well, which timm has as a table
    same(encoder, again)
    assert torch.equal(its.bias, head.bias)


def test_a_classifier_where_none_can_go(tmp_path: Path):
    run_with_classifier(tmp_path / "vit")
    run_with_classifier(tmp_path / "zoo", {"kind": "timm", "name": "test_vit", "image": 32})
    source(tmp_path / "bare", {})
    foreign.write_google(tmp_path / "w.npz")
    none, only = "no classifier/model.safetensors in it (tools/finetune.py makes one)", "format=safetensors"
    for code, name, words, wanted in (
        (USAGE, "vit/run", ["format=hf"], "format=hf has no place for it"),
        (USAGE, "zoo/run", [], f"of kind=timm there is only our own folder with it, {only}"),
        (DATA, "bare/run", [], none),
        (DATA, "w.npz", [], "its classifier is not linear on what the encoder gives: pre_logits comes between"),
    ):
        said = refused(code, f"encoder={tmp_path}/{name}", f"output={tmp_path}/out", "classifier=true", *words)
        assert wanted in said
        assert said.endswith(wanted) or name != "w.npz"
    assert not (tmp_path / "out").exists()


def test_googles_linear_classifier_is_taken(tmp_path: Path):
    arrays = foreign.write_google(tmp_path / "w.npz", pre_logits=False)
    encoder, head = weights.read_classifier(str(tmp_path / "w.npz"))
    numbers: dict[str, Any] = foreign.TIMM | {"num_classes": 5}
    theirs: Any = timm.create_model("vit_base_patch16_224", **numbers).eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    with torch.no_grad():
        found = encoder(image())[:, 0] @ head.weight.T + head.bias
        torch.testing.assert_close(found, theirs(encoder.normalise(image())), atol=1e-5, rtol=0)
    assert head.names == [str(number) for number in range(len(arrays["head/bias"]))]


# --- at another size


@pytest.mark.parametrize("form", ["timm", "hf", "safetensors"])
@pytest.mark.parametrize("size", ["24", "16,32", "8"])
def test_positions_of_another_size_are_baked_in(tmp_path: Path, capsys: pytest.CaptureFixture[str], form, size):
    encoder = exported(tmp_path, {}, f"image_size={size}", f"format={form}")
    assert ", 1 resized (pos_embed)" in capsys.readouterr().out
    again: Any = load_encoder(tmp_path / "out")
    height, width = again.config.image_hw
    assert [height, width] == [int(one) for one in (size.split(",") * 2)[:2]]
    same(resized(encoder, (height, width)), again, 1e-5)
    if form == "timm":
        theirs = timms(tmp_path)
        same(again, lambda one: theirs.forward_features(again.normalise(one)))
    if form == "hf":
        his = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
        same(again, lambda one: his(again.normalise(one)).last_hidden_state, 1e-5)


# --- refusals


def test_what_the_tool_refuses(tmp_path: Path):
    source(tmp_path, {})
    given, output = f"encoder={tmp_path}/run", f"output={tmp_path}/x"
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "file").write_text("")
    places = [f"output={place}" for place in (tmp_path / "file", tmp_path / "file" / "x", "/proc/nowhere/x")]
    for code, wanted, *words in (
        (USAGE, "encoder: it must be given"),
        (DATA, "no such run, folder or weights file", "encoder=/nowhere", output),
        (DATA, "no encoder/model.safetensors in it", f"encoder={tmp_path}", output),
        (DATA, "w.safetensors", f"encoder={tmp_path}/w.safetensors", output),
        *((USAGE, "image_size", given, f"image_size={size}", output) for size in ("0", "16,0")),
        (USAGE, "cannot be cut into patches of 4; 16 x 16 can", given, "image_size=17", output),
        (USAGE, "format", given, "format=flax", output),
        *((CANNOT_CREATE, "name another place", given, place) for place in places),
        (CANNOT_CREATE, "is a folder", given, "format=onnx", f"output={tmp_path}/run"),
    ):
        assert wanted in refused(code, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "w.safetensors"]


def test_less_than_all_of_it_only_where_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    foreign.write_google(tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as arrays:
        kept = {name: arrays[name] for name in arrays.files if name != "Transformer/encoder_norm/bias"}
    np.savez(tmp_path / "less.npz", **kept)  # type: ignore[arg-type]
    words = [f"encoder={tmp_path}/less.npz", f"output={tmp_path}/out"]
    assert "1 tensors missing (norm.bias)" in refused(DATA, *words)
    tool(*words, "init_share=0.9")
    assert "1 missing (norm.bias), 4 left over (pre_logits.weight, " in capsys.readouterr().out


def test_a_disk_that_is_full_ends_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source(tmp_path, {})
    monkeypatch.setattr(export, "save_file", Mock(side_effect=OSError(28, "No space left on device", "x")))
    with pytest.raises(OSError, match="No space left") as end:
        tool(f"encoder={tmp_path}/run", f"output={tmp_path}/out")
    assert errors.verdict(end.value).code == errors.DISK
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
