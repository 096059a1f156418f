"""The benchmarks of a step and of the loop, at tiny sizes: that contestants compute the same; no speed is judged.

Turns, ratios and tables of all benchmarks are those of a clock that the test holds.
"""

import json
import math
import sys
from functools import partial
from importlib import import_module
from itertools import repeat
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from ssl_vit import config, recipe
from ssl_vit.exits import Refusal
from ssl_vit.model import Model
from ssl_vit.recipe import Pretrain

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
benchmark, contestants, levers, products, racing = (
    import_module(name) for name in ("benchmark", "contestants", "levers", "products", "racing")
)
TINY = ["recipe=mpp_demo", "data.image_size=16", "encoder.patch=4", "encoder.width=32", "encoder.depth=2", "batch=4"]
TINY += ["encoder.heads=2", "encoder.mlp=64"]


def built() -> tuple[recipe.Recipe, Model, dict[str, torch.Tensor]]:
    made, tensors, source = recipe.resolve(config.parse(Pretrain, TINY, recipe.FOLDER))
    model = recipe.build(made, 1000, tensors, source)
    torch.nn.init.normal_(model.head.linear.weight, std=0.02)
    return made, model, racing.images(made.batch, made.encoder, torch.device("cpu"))


def test_a_step_is_measured_beside_rivals_levers_and_bare_products(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["step", *TINY, "levers=true", "rounds=2", "round_steps=1", f"output={tmp_path}"]
    assert benchmark.main(words) == 0
    rows = {row["who"]: row for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert rows.keys() >= {"ssl_vit", "timm", "timm, fused AdamW", "Hugging Face", "products", "one thread"}
    assert rows["ssl_vit"]["first_loss"] == pytest.approx(rows["timm"]["first_loss"], rel=1e-6)
    assert rows["ssl_vit"]["first_loss"] != pytest.approx(math.log(512), abs=1e-3)  # else a zero head
    assert rows["Hugging Face"]["tokens_off"] < 1e-5
    assert {row["kind"] for row in rows.values()} == {"step", "lever", "products"}
    for row in rows.values():
        assert row["ratio_spread"][0] <= row["ratio"] <= row["ratio_spread"][1]
        assert row["tflops"] > 0
    assert rows["ssl_vit"]["ratio"] == rows["products"]["of_products"]["products"] == 1
    shown = capsys.readouterr().out
    assert "ViT-32x2x2x64/4 16x16 batch 4 fp32 cpu" in shown
    assert all(who in shown for who in rows)


def test_without_a_lever_a_step_is_the_same_step(tmp_path: Path):
    made, model, batch = built()
    step = contestants.ours(made, model, batch, tmp_path)
    wanted = [float(step()[0]) for _ in range(3)]
    assert wanted[0] != wanted[1] != wanted[2]
    _, model, _ = built()
    steps = levers.levers(made, model, batch, tmp_path)
    assert len(steps) >= 7
    for who, build in steps.items():
        step = build()
        answers = [step() for _ in range(3)]
        found = [answer if isinstance(answer, float) else float(answer[0]) for answer in answers]
        assert found == pytest.approx(wanted, rel=1e-4), who


def test_rivals_take_the_same_steps(tmp_path: Path):
    """timm's: the same losses as ours, step by step; both in the plain loop, where AdamW decays alike."""
    made, model, batch = built()
    theirs = contestants.rivals(made, model, batch)
    assert theirs.keys() == {"timm", "timm, fused AdamW", "Hugging Face", "Hugging Face, fused AdamW"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.optim.lr)
    cast = contestants.autocast(made, torch.device("cpu"))
    ours = contestants.simple(contestants.Loss(model), repeat(batch), optimizer, cast)
    slow, fast = theirs["timm"](), theirs["timm, fused AdamW"]()
    for _ in range(3):
        wanted = float(ours())
        assert slow() == pytest.approx(wanted, rel=1e-5)
        assert float(fast()) == pytest.approx(wanted, rel=1e-5)


def test_the_products_are_the_steps():
    """Their FLOPs are the formula's, but for the gradient of the pixels, which only the products compute."""
    made, model, _ = built()
    counted = sum(6 * rows * given * out * count for rows, given, out, count in products.layers(made))
    heads, tokens, width = products.attention(made)
    counted += made.encoder.numbers[1] * 12 * heads * tokens**2 * width  # type: ignore[union-attr]
    pixels = 2 * made.batch * 16 * 48 * 32
    assert counted - pixels == made.batch * recipe.flops(model)
    ways = products.products(made, torch.device("cpu"), half=False)
    with patch.object(torch, "mm", wraps=torch.mm) as mm:
        ways["products"]()
    assert mm.call_count == 3 * sum(count for *_, count in products.layers(made))


def test_the_loop_is_measured_beside_the_bare_step_and_from_shards(shards: Path, tmp_path: Path):
    words = ["loop", *TINY, f"data.train={shards}/train", "data.workers=0", "rounds=2", "round_steps=2"]
    assert benchmark.main([*words, f"output={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "loop.json").read_text())["rows"]
    assert [(row["who"], row["against"]) for row in rows] == [
        ("bare step", "bare step"),
        ("fit() on tensors", "bare step"),
        ("fit() from shards", "fit() on tensors"),
    ]
    assert rows[0]["ratio"] == 1
    assert all(row["images_per_second"] > 0 for row in rows)


def test_other_encoders_have_no_rivals():
    with pytest.raises(Refusal, match="rivals are plain ViTs, and the encoder is Axial-ViT"):
        benchmark.main(["step", "recipe=mpp_demo", "encoder.kind=axial", "rounds=1"])


def test_contestants_take_turns_each_begins_a_round_and_speed_is_a_median_of_ratios_within_rounds():
    takes, order = {"a": 1.0, "b": 2.0, "c": 4.0}, []
    contestants = {who: partial(order.append, who) for who in takes}
    seconds = racing.race(contestants, 3, steps=2, warm_up=1, clock=lambda: sum(takes[who] for who in order))
    assert seconds == {who: [each] * 3 for who, each in takes.items()}
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    seconds = {"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}
    row = racing.speed(seconds, "a", 10, "b")
    assert row == {"images_per_second": 5.0, "milliseconds": 2000.0, "ratio": 1.0, "ratio_spread": [0.5, 2.0]}
    assert racing.speed(seconds, "b", 10, None)["ratio"] is None
    assert racing.between(row["ratio_spread"]) == "0.50-2.00"
    lines = racing.grid(["who", "speed"], [["ours", "10.5"], ["theirs alone", "9"]]).splitlines()
    assert lines == ["who             speed", "ours             10.5", "theirs alone        9"]


@pytest.mark.long
def test_the_gpu_preset_tries_itself_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert benchmark.main(["step", "preset=gpu", "rounds=1", "round_steps=1", f"output={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert {row["benchmark"] for row in rows} == {"product", "attention", "step", "loop", "memory"}
    assert "preset=gpu without a GPU: the same at a small size" in capsys.readouterr().out
