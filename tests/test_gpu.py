"""What only a GPU can show: `make gpu` runs these and the benchmark; without one they are skipped."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from ssl_vit import config, recipe, session
from ssl_vit.encoders.vit import Vit
from ssl_vit.exits import PREEMPTED, Refusal
from ssl_vit.model import Model
from ssl_vit.recipe import Pretrain
from ssl_vit.train import loop
from ssl_vit.train.engine import prepare
from ssl_vit.train.launch import start
from ssl_vit.train.loop import Loop, Task, Window, update
from ssl_vit.train.outfit import outfit
from tests.train.test_engines import BIN, ENGINES, launched
from tests.train.test_engines import rows as training_rows
from tests.train.test_loop import StopAfter, fresh_accelerate  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "ACCELERATE_USE_CPU" in os.environ or not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu"
    ),
    pytest.mark.filterwarnings("default"),  # inductor's and cuDNN's own warnings are not ours
]


def vit_b16(shards: Path, run: Path) -> int:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", "data.workers=4"]
    sizes = ["steps=200", "batch=64", "micro_batch=32", "log_every=50", "save_every=100", "optim.warmup_steps=20"]
    return session.run(config.parse(Pretrain, ["recipe=mpp_vit_b16", *data, *sizes, "quiet=true"], recipe.FOLDER))


def test_vit_b16_trains_in_bf16_with_compile_stops_and_resumes(shards: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "StopSignal", lambda accelerator: StopAfter(120))
    with pytest.raises(Refusal) as end:
        vit_b16(shards, tmp_path)
    assert end.value.code == PREEMPTED
    monkeypatch.undo()
    assert vit_b16(shards, tmp_path) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100, 150, 200]
    assert all(math.isfinite(row["loss"]) and row["skipped_updates"] == 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] < math.log(512)


@pytest.fixture(scope="module")
def by_launch_file(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """50 steps of ViT-B/16 in bf16 under each launch file, on all GPUs of this machine."""
    folder, found = tmp_path_factory.mktemp("engines"), {}
    for engine in ENGINES:
        launch = ["--config_file", f"recipes/launch/{engine}.yaml", "--num_processes", torch.cuda.device_count()]
        data = [f"data.train={shards}/train", "data.val=none", f"run={folder / engine}", "data.workers=2"]
        sizes = ["steps=50", "batch=64", "log_every=5", "optim.warmup_steps=10", "quiet=true"]
        launched(BIN / "accelerate", "launch", *launch, "tools/pretrain.py", "recipe=mpp_vit_b16", *data, *sizes)
        found[engine] = training_rows(folder / engine)
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_each_launch_file_trains_as_ddp_does(by_launch_file: dict[str, list[dict]], engine: str):
    mine, ddp = by_launch_file[engine], by_launch_file["ddp"]
    assert [row["step"] for row in mine] == list(range(5, 51, 5))
    assert [row["samples_digest"] for row in mine] == [row["samples_digest"] for row in ddp]
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in ddp], rel=0.02)


@pytest.mark.parametrize("tokens", [(14, 14), (16, 16), (24, 24)])
def test_gradients_are_finite_at_vits_lengths(tokens):
    """The attention backend is pinned because cuDNN's backward gave NaN at such lengths (pytorch#169849)."""
    start(Loop(batch=1).asked(1.0, world=1), "none", Path())
    encoder = Vit(size="Ti", image=(16 * tokens[0], 16 * tokens[1])).build().cuda()
    image = torch.randint(0, 256, (128, 3, *encoder.config.image_hw), dtype=torch.uint8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        encoder(image).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_a_step_never_waits_for_the_device(tmp_path: Path):
    made = config.parse(Pretrain, ["recipe=mpp_demo"], recipe.FOLDER)
    accelerator = start(made.asked(made.optim.clip, world=1), "none", tmp_path)
    made, _, _ = recipe.resolve(made)
    model: Model = recipe.build(made, 0).cuda()
    outfit(model, accelerator, made.precision, made.compile, made.activation_checkpointing)
    engine = prepare(accelerator, model, made.optim, {})
    batch = {
        "image": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, device="cuda"),
        "label": torch.full((8,), -1, device="cuda"),
        "seed": torch.arange(8, device="cuda"),
        "valid": torch.ones(8, dtype=torch.bool, device="cuda"),
    }
    task = Task(model, stream=None, optim=made.optim)  # type: ignore[arg-type]  # a step asks no stream
    window = Window()
    update(accelerator, made, task, engine, iter([batch]), window, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(accelerator, made, task, engine, iter([batch, batch]), window, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
