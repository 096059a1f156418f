"""Foreign weights in the tools: fine-tuned, judged and predicted with."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from ssl_vit import config, load_encoder, recipe
from ssl_vit.encoders import Vit
from ssl_vit.encoders.export import export
from ssl_vit.exits import DATA, USAGE, Refusal
from tests.encoders import foreign_weights as foreign
from tests.encoders.foreign_weights import HF, loud
from tests.evaluate.test_predict import read
from tests.frozen import find, results
from tests.starts import call

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
        recipe.resolve(config.parse(recipe.Finetune, words, recipe.FOLDER))
    assert end.value.code == USAGE
