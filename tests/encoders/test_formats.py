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
from ssl_vit.encoders.export import export
from ssl_vit.encoders.timm_encoder import TimmZoo
from ssl_vit.encoders.vit import Vit
from ssl_vit.encoders.weights import load_encoder
from ssl_vit.errors import DATA, USAGE, Refusal
from ssl_vit.recipes import Finetune, Pretrain
from tests.encoders import foreign_weights as foreign
from tests.encoders.foreign_weights import DEPTH, HEADS, HF, MLP, PATCH, SIDE, TIMM, WIDTH, image, loud
from tests.frozen import find, read, results
from tests.starts import call


def vit(name: str = "vit_base_patch16_224", seed: int = 0, **arguments: Any) -> Any:
    return loud(timm.create_model(name, **TIMM | arguments), seed)


@torch.no_grad()
def same(ours: Any, theirs: Any, height: int = SIDE, width: int = SIDE, atol: float = 1e-5) -> None:
    """Equal tokens, for an image of noise, of an encoder and timm's model."""
    one = image(height, width, channels=ours.channels)
    want = theirs.forward_features(ours.normalise(one))
    assert want.std() > 0.3
    torch.testing.assert_close(ours(one), want, atol=atol, rtol=0)


def write(path: Path) -> None:
    """A good file, of Google's or of a plain ViT."""
    if path.suffix == ".npz":
        foreign.write_google(path)
    elif path.suffix == ".pth":
        torch.save(foreign.plain(narrow()), path)
    else:
        save_file(foreign.plain(narrow()), path)


def refused(path: Path) -> str:
    with pytest.raises(Refusal) as end:
        load_encoder(path)
    assert end.value.code == DATA
    assert path.name in str(end.value)
    assert "\n" not in str(end.value)
    return str(end.value)


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
    theirs: Any = timm.create_model(name, **arguments).eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    ours: Any = load_encoder(tmp_path / "w.npz")
    side = how.get("side", SIDE)
    same(ours, theirs, side, side)
    assert (ours.config.kind, ours.config.numbers) == ("vit", (WIDTH, DEPTH, HEADS, MLP))
    settings = "class", (0.5,), "r50" if "stem" in how else "patch"
    assert (ours.config.pool, ours.config.mean, ours.config.stem) == settings


def test_googles_file_without_a_class_token(tmp_path: Path):
    """As with gap: as many positions as patches; timm's loader asks for a class token, so its tensors are put in."""
    foreign.write_google(tmp_path / "gap.npz", token=False, pre_logits=False)
    with_token = foreign.google(token=True, pre_logits=False)
    bare = foreign.google(token=False, pre_logits=False)
    np.savez(tmp_path / "w.npz", **{**with_token, **{k: v for k, v in bare.items() if "pos_embedding" not in k}})  # type: ignore[arg-type]
    theirs: Any = timm.create_model("vit_base_patch16_224", **TIMM).eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    positions = torch.from_numpy(bare["Transformer/posembed_input/pos_embedding"])
    theirs.cls_token, theirs.pos_embed, theirs.num_prefix_tokens = None, torch.nn.Parameter(positions), 0
    ours: Any = load_encoder(tmp_path / "gap.npz")
    same(ours, theirs)
    assert (ours.prefix, ours.config.pool, ours(image()).shape) == (0, "mean", (2, 16, WIDTH))


def saved(model: Any, folder: Path, mean: Any = (0.2, 0.3, 0.4)) -> Any:
    """A model of Hugging Face's in a folder, with the preparation of its images."""
    loud(model).save_pretrained(folder)
    said = {"size": {"height": SIDE, "width": SIDE}, "image_mean": list(mean), "image_std": [0.2, 0.25, 0.3]}
    transformers.ViTImageProcessor(**said).save_pretrained(folder)
    return model


@torch.no_grad()
def same_as_hugging_face(ours: Any, theirs: Any, **options: Any) -> None:
    one = image()
    want = theirs(ours.normalise(one), **options).last_hidden_state
    assert want.std() > 0.3
    torch.testing.assert_close(ours(one), want, atol=1e-4, rtol=0)  # its epsilon is 1e-12, the authors' 1e-6


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"])
def test_hugging_faces_folder(tmp_path: Path, kind):
    model = getattr(transformers, kind)(transformers.ViTConfig(**HF, encoder_stride=PATCH))
    theirs = saved(model, tmp_path)
    theirs = theirs if kind == "ViTModel" else theirs.vit
    ours = load_encoder(tmp_path)
    same_as_hugging_face(ours, theirs)
    assert ours.config.numbers == (WIDTH, DEPTH, HEADS, MLP)  # type: ignore[union-attr]
    assert (ours.config.mean, ours.config.std) == ((0.2, 0.3, 0.4), (0.2, 0.25, 0.3))
    file, old = tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"
    on_disk = load_file(file)
    assert any("encoder.layer.0.attention.attention.query.weight" in name for name in on_disk)  # transformers 5 as well
    save_file(theirs.state_dict(), file)  # under the names that it has in memory
    same_as_hugging_face(load_encoder(tmp_path), theirs)
    file.unlink()  # as the hub has them since 2021: another file, a config that says less
    torch.save(on_disk, old)
    config = {"model_type": "vit", "hidden_act": "gelu", "image_size": SIDE, "num_attention_heads": HEADS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (tmp_path, old):
        same_as_hugging_face(load_encoder(source), theirs)


def test_hugging_faces_autoencoder(tmp_path: Path):
    small: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {f"decoder_{name}": value for name, value in small.items()}
    made = transformers.ViTMAEConfig(**HF, **decoder, mask_ratio=0.0)
    theirs = saved(transformers.ViTMAEForPreTraining(made), tmp_path)
    order = torch.arange(16, dtype=torch.float32).expand(2, 16)  # of patches: none is left out or moved
    same_as_hugging_face(load_encoder(tmp_path), theirs.vit, noise=order)


NOT_PLAIN: list[dict[str, Any]] = [{"hidden_act": "gelu_new"}, {"model_type": "deit"}, {"model_type": "vit_msn"}]
NOT_PLAIN += [{"layer_norm_eps": 1e-3}, {"qkv_bias": False}]


def test_hugging_faces_settings_decide(tmp_path: Path):
    """What is no plain ViT is refused; an image processor that does not normalise, or has one number for all."""
    saved(transformers.ViTModel(transformers.ViTConfig(**HF)), tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    for change in NOT_PLAIN:
        (tmp_path / "config.json").write_text(json.dumps(plain | change))
        ((key, value),) = change.items()
        assert f"{key}={value}" in (said := refused(tmp_path))
        assert "is another model than a plain ViT" in said
    (tmp_path / "config.json").write_text(json.dumps(plain))
    for said, wanted in (
        ({"do_normalize": False, "image_mean": [0.2] * 3, "image_std": [0.2] * 3}, ((0.0,), (1.0,))),
        ({"image_mean": 0.3, "image_std": 0.4}, ((0.3,), (0.4,))),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        found = load_encoder(tmp_path).config
        assert (found.mean, found.std) == wanted


NARROW: dict[str, Any] = {"embed_dim": 64, "num_heads": 1}
"""What MAE's and DINO's files, which do not tell heads, are taken for at this width: one head for each 64."""


def narrow(seed: int = 0) -> Any:
    return vit(seed=seed, **NARROW, mlp_ratio=4)


@pytest.mark.parametrize("kind", ["MAE", "DINO, full checkpoint", "DINO, backbone"])
def test_files_of_mae_and_dino(tmp_path: Path, kind, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(foreign, "WIDTH", 64)
    theirs = narrow()  # of DINO the teacher
    content, left = {
        "MAE": lambda: (foreign.mae(theirs), {"mask", "decoder"}),
        "DINO, full checkpoint": lambda: (foreign.dino(theirs, narrow(seed=1)), {"head"}),
        "DINO, backbone": lambda: (foreign.plain(theirs), set()),
    }[kind]()
    torch.save(content, tmp_path / "w.pth")
    source, tensors = weights.read(str(tmp_path / "w.pth"))
    encoder = source.build().eval()
    report = weights.fill(encoder, source, tensors, "w.pth")
    same(encoder, theirs)
    assert report.missing == report.unlike == report.resized == []
    assert {name.split(".")[0].split("_")[0] for name in report.left} == left


def test_what_would_be_another_model_or_no_numbers_is_refused(tmp_path: Path):
    """MAE's fine-tuned file: its norm follows the mean over the patches, and before there is none; a scaled layer."""
    tensors = vit(global_pool="avg", num_classes=7).state_dict()
    assert {"fc_norm.weight", "norm.weight"} & tensors.keys() == {"fc_norm.weight"}
    torch.save({"model": tensors}, tmp_path / "w.pth")
    assert "2 tensors missing (norm.weight, norm.bias" in refused(tmp_path / "w.pth")
    plain = foreign.plain(narrow())
    for name, value in {"norm.bias": torch.full((64,), torch.nan), "norm.weight": torch.ones(64).int()}.items():
        save_file({**plain, name: value}, tmp_path / "w.safetensors")
        said = f"{name} has numbers that are not finite, or whole numbers"
        assert said in refused(tmp_path / "w.safetensors")
    encoder = Vit.model_validate({"width": 64, "depth": 1, "patch": 4, "image": 8}).build()
    parts = {"head.weight": torch.ones(1), "blocks.0.ls1.gamma": torch.ones(64)}
    with pytest.raises(Refusal, match=r"1 tensors that it has no place for \(blocks\.0\.ls1\.gamma"):
        weights.fill(encoder, encoder.config, encoder.state_dict() | parts, "here")


def timm_folder(folder: Path, name: str, **arguments: Any) -> Any:
    """A model as timm writes it for its hub; returns what timm itself opens there."""
    folder.mkdir(exist_ok=True)
    model = loud(timm.create_model(name, **arguments))
    given = {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}}
    timm.models.save_for_hf(model, str(folder), given, arguments, safe_serialization=True)
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
    ids=lambda value: value if isinstance(value, str) else "-".join(str(one) for one in value.values()),
)
def test_timms_plain_folders_become_our_own_vit(tmp_path: Path, name, arguments):
    theirs = timm_folder(tmp_path, name, **arguments)
    for source in (str(tmp_path), f"timm:local-dir:{tmp_path}"):
        encoder: Any = load_encoder(source)
        assert isinstance(encoder.config, Vit)
        assert encoder.config.numbers[2] == theirs.blocks[0].attn.num_heads
        assert (encoder.config.pool == "class") == (theirs.global_pool == "token")
        same(encoder, theirs, *encoder.config.image_hw)


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
    theirs = timm_folder(tmp_path, name, num_classes=4, **({"img_size": 32} if "vit" in name else {}))
    config, tensors = weights.read(str(tmp_path))
    assert isinstance(config, TimmZoo)
    encoder = config.build().eval()
    report = weights.fill(encoder, config, tensors, name, share=0.999)
    assert report.share == 1
    one = image(*config.image_hw)
    with torch.no_grad():
        want = encoder._tokens(theirs.forward_features(encoder.normalise(one)))
        torch.testing.assert_close(encoder(one), want, atol=1e-5 * float(want.abs().max()), rtol=0)


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
    refused(tmp_path)
    if change in BARE_TOO:  # nor where there are but tensors
        (tmp_path / "bare").mkdir()
        torch.save(model.state_dict(), tmp_path / "bare" / "w.pth")
        refused(tmp_path / "bare" / "w.pth")


def test_a_bare_file_tells_its_architecture_but_for_heads(tmp_path: Path):
    """Of 64 for each, as of a model in DataParallel; timm's config beside it says how many there are."""
    theirs = narrow()
    tree = theirs.state_dict() | {"head.weight": torch.ones(2)}
    torch.save({"model": {f"module.{name}": value for name, value in tree.items()}, "epoch": 3}, tmp_path / "w.pth")
    same(load_encoder(tmp_path / "w.pth"), theirs)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    said = {"mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}
    said = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 4}, "pretrained_cfg": said}
    (tmp_path / "config.json").write_text(json.dumps(said))
    config: Any = load_encoder(tmp_path).config
    assert (config.numbers[2], config.mean, config.std) == (4, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))


def test_what_timm_or_its_hub_would_be_needed_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as offline:
        offline.setattr(timm, "create_model", Mock(side_effect=OSError("Network is unreachable")))
        with pytest.raises(Refusal, match=r"cannot be had .*Network is unreachable.*give a local file") as end:
            weights.read("timm:vit_tiny_patch16_224.augreg_in21k")
    assert end.value.code == DATA
    theirs = timm_folder(tmp_path / "plain", "vit_tiny_patch16_224", **TIMM)
    timm_folder(tmp_path / "other", "test_vit", img_size=32)
    monkeypatch.setitem(sys.modules, "timm", None)
    same(load_encoder(tmp_path / "plain"), theirs)  # its name says it all
    with pytest.raises(Refusal, match=r"only timm knows what test_vit is; pip install"):
        load_encoder(tmp_path / "other")


# --- the report


def test_the_report_says_what_became_of_every_tensor(tmp_path: Path):
    foreign.write_google(tmp_path / "google.npz")
    source, tensors = weights.read(str(tmp_path / "google.npz"))
    del tensors["norm.bias"]
    tensors["blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    encoder = source.model_copy(update={"image": 24}).build()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(Refusal) as end:
        weights.fill(encoder, source, tensors, "w.npz")
    missing, unlike = "1 tensors missing (norm.bias)", "1 tensors of another shape (blocks.0.mlp.fc1.bias)"
    assert str(end.value) == f"w.npz: does not fit the encoder: {missing}; {unlike}"
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    total = sum(value.numel() for value in before.values())
    share = (total - WIDTH - MLP) / total
    with pytest.raises(Refusal, match=rf"\({share:.1%} of it can be filled, init_share={share + 1e-6:g}"):
        weights.fill(encoder, source, tensors, "w.npz", share + 1e-6)
    report = weights.fill(encoder, source, tensors, "w.npz", share - 1e-6)
    assert str(report) == (
        f"w.npz: {share:.1%} of the encoder; {len(before) - 2} matched, 1 resized (pos_embed), 1 of another shape "
        "(blocks.0.mlp.fc1.bias), 1 missing (norm.bias), "
        "4 left over (pre_logits.weight, pre_logits.bias, head.weight ...)"
    )
    drawn = {name for name, value in encoder.state_dict().items() if torch.equal(value, before[name])}
    assert drawn == {"norm.bias", "blocks.0.mlp.fc1.bias"}  # these alone stay as they were


@pytest.mark.parametrize("schema", [Pretrain, Finetune])
def test_what_a_training_says_of_its_source(tmp_path: Path, schema, capsys: pytest.CaptureFixture[str]):
    foreign.write_google(tmp_path / "google.npz")
    saved(transformers.ViTForImageClassification(transformers.ViTConfig(**HF)), tmp_path / "hf")
    for path in (tmp_path / "google.npz", tmp_path / "hf"):
        words = [f"init={path}", "data.train=x", "data.image_size=24", "init_share=0.9"]
        parsed, tensors, source = recipes.resolve(config.parse(schema, words, recipes.FOLDER))
        model = setup.build(parsed, 3, tensors, source, say=print)
        said = capsys.readouterr().out
        count = len(model.encoder.state_dict())
        assert said.startswith(f"{path}: 100.0% of the encoder; {count} matched, 1 resized (pos_embed), ")
        assert ("left over (pre_logits.weight, pre_logits.bias" in said) == (path.name == "google.npz")
        assert ("2 left over (classifier." in said) == (path.name == "hf")
        assert model.encoder.grid == (6, 6)


# --- damaged and foreign files


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "w.pth"])
def test_a_file_that_was_cut_short_is_refused_wherever_it_was(tmp_path: Path, name):
    write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0.0, 0.01, 0.3, 0.9, 0.9999):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        refused(tmp_path / name)


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_flipped_bits_are_refused_or_are_in_the_numbers(tmp_path: Path, name):
    """Zip has a checksum of every array. Safetensors has none: what flips outside of its header cannot be told."""
    write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    places = range(100, len(whole), len(whole) // 40) if name == "w.npz" else range(0, 2000, 41)
    changed = 0
    for place in places:
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with suppress(Refusal):
            load_encoder(tmp_path / name)
            continue
        refused(tmp_path / name)
        changed += 1
    assert changed > 0.8 * len(places)  # the rest hit what nobody reads, such as a time in the zip


class Evil:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_nothing_is_executed_and_nothing_foreign_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 64)
    arrays = foreign.google()
    arrays["cls"] = np.array([Evil()], dtype=object)
    np.savez(tmp_path / "object.npz", **arrays)  # type: ignore[arg-type]
    np.save(tmp_path / "array.npy", arrays["cls"])
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("pickle.npz", "pickle.pth", "pickle.bin", "pickle.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": Evil()}))
    checkpoint = foreign.dino(vit(), vit(seed=1))
    checkpoint["args"].hook = Evil()
    torch.save(checkpoint, tmp_path / "args.pth")
    torch.save({"teacher": {"x": Evil()}}, tmp_path / "teacher.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "teacher.pth").rename(tmp_path / "folder" / "pytorch_model.bin")
    torch.save({"x": Evil()}, tmp_path / "bare.pth")
    for path in [*tmp_path.glob("*.*"), tmp_path / "folder" / "pytorch_model.bin", tmp_path / "none.pth"]:
        refused(path)
    assert not list(tmp_path.rglob("canary"))
    (tmp_path / "config.json").write_text(json.dumps({"ssl_vit": {"size": "XXL"}}))
    with pytest.raises(Refusal, match=r"config\.json"):
        load_encoder(tmp_path / "other.safetensors")


# --- in the tools

QUIET = ["data.workers=0", "batch=4", "micro_batch=4", "tracker=none", "steps=2", "log_every=1", "save_every=2"]
QUIET += ["optim.warmup_steps=0", "optim.lr=0.001", "seed=0"]


def run_tool(tool: str, words: list[str], codes: tuple[int, ...] = (0,)) -> str:
    ended = call(tool, words)
    assert ended.code in codes, ended.said
    return ended.said


def on(shards: Path, run: Path) -> list[str]:
    return [*QUIET, f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}"]


def test_googles_file_is_fine_tuned_at_another_size(shards: Path, tmp_path: Path):
    foreign.write_google(tmp_path / "w.npz")
    words = [*on(shards, tmp_path / "run"), f"init={tmp_path}/w.npz", "data.image_size=24"]
    said = run_tool("finetune", words)
    left = "4 left over (pre_logits.weight, pre_logits.bias, head.weight ...)"
    assert f"w.npz: 100.0% of the encoder; 30 matched, 1 resized (pos_embed), {left}\n" in said
    tuned = load_encoder(tmp_path / "run")
    assert tuned.grid == (6, 6)
    start = load_encoder(tmp_path / "w.npz").state_dict()["blocks.0.mlp.fc1.weight"]
    moved = (tuned.state_dict()["blocks.0.mlp.fc1.weight"] - start).abs().max()
    assert 0 < moved < 0.1  # from where the file left it, two steps on
    (tmp_path / "cut.npz").write_bytes((tmp_path / "w.npz").read_bytes()[:-100])
    cut = [*on(shards, tmp_path / "other"), f"init={tmp_path}/cut.npz", "data.image_size=24"]
    assert "cut.npz" in run_tool("finetune", cut, (USAGE, DATA))


def test_hugging_faces_folder_is_judged_frozen(shards: Path, tmp_path: Path):
    loud(transformers.ViTModel(transformers.ViTConfig(**HF))).save_pretrained(tmp_path / "hf")
    words = [f"encoder={tmp_path}/hf", f"data.train={shards}/train", f"data.val={shards}/val", f"run={tmp_path}/run"]
    words += ["few_shot.shots=1,2", "linear.l2=0.01", "metrics.bootstrap=20", "random=false", "batch=3"]
    run_tool("evaluate", [*words, "data.workers=0"])
    found = results(tmp_path / "run")
    assert found["encoder"] == f"{tmp_path}/hf"
    assert find(found, "classes") == ["blue", "green", "red"]


@pytest.mark.long
def test_a_bit_is_pretrained_fine_tuned_and_predicts(squares: Path, shards: Path, tmp_path: Path):
    words = [*on(shards, tmp_path / "pre"), "encoder.kind=bit", "encoder.pool=mean", "head.kind=classifier"]
    run_tool("pretrain", [*words, "data.image_size=32"])
    content = json.loads((tmp_path / "pre" / "encoder" / "config.json").read_text())
    assert content["architecture"] == "resnetv2_50x1_bit"
    tune = [*on(shards, tmp_path / "fine"), f"init={tmp_path}/pre", "data.image_size=32"]
    said = run_tool("finetune", tune)
    assert "100.0% of the encoder" in said
    run_tool("predict", [f"encoder={tmp_path}/fine", f"input={squares}", f"output={tmp_path}/out.csv"])
    columns, rows = read(tmp_path / "out.csv")
    assert columns == ["file"] + [f"{what}{i}" for i in (1, 2, 3) for what in ("top", "score")]
    assert len(rows) == 36
    assert all(row[0] in ("blue", "green", "red") for row in rows.values())
    masked = [*on(shards, tmp_path / "masked"), f"init={tmp_path}/pre", "data.image_size=32"]
    assert "replaces patch embeddings" in run_tool("pretrain", masked, (USAGE, DATA))
    assert not torch.isnan(load_encoder(tmp_path / "fine").state_dict()["model.stem.conv.weight"]).any()


def test_a_class_token_that_the_source_lacks_is_not_read_out(tmp_path: Path):
    """The first patch would be taken for it."""
    export(Vit(size="Ti", depth=1, patch=8, image=16, class_token=False, pool="mean").build(), tmp_path)
    words = [f"init={tmp_path}", "data.image_size=16", "encoder.pool=class"]
    with pytest.raises(Refusal, match=r"no class token to read out; set encoder\.pool=mean") as end:
        recipes.resolve(config.parse(recipes.Finetune, words, recipes.FOLDER))
    assert end.value.code == USAGE
