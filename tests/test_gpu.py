"""What only a GPU can show: `make gpu` runs these and the benchmark; without one they are skipped."""

import gc
import json
import math
import os
from pathlib import Path

import pytest
import torch

from ssl_vit import config, recipes
from ssl_vit.commands import pretrain, setup
from ssl_vit.encoders.vit import Vit
from ssl_vit.model import Model
from ssl_vit.recipes import Pretrain
from ssl_vit.train.config import TrainConfig
from ssl_vit.train.launch import start_accelerator
from ssl_vit.train.loop import optimizer_step
from ssl_vit.train.prepare import check_gradients, prepare_model, set_attention_kernel
from tests.train.engines import BIN, ENGINES, run_checked
from tests.train.engines import rows as training_rows
from tests.train.test_loop import train_until_stopped
from tools.benchmarks import baselines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "ACCELERATE_USE_CPU" in os.environ or not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu"
    ),
    pytest.mark.filterwarnings("default"),  # inductor's and cuDNN's own warnings are not ours
]


def train_vit_b16(shards: Path, run: Path) -> int:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", "data.workers=4"]
    sizes = ["steps=200", "batch=64", "micro_batch=32", "log_every=50", "save_every=100", "optim.warmup_steps=20"]
    return pretrain.run(config.parse(Pretrain, ["recipe=mpp_vit_b16", *data, *sizes, "quiet=true"]))


def test_vit_b16_trains_in_bf16_with_compile_stops_and_resumes(shards: Path, tmp_path: Path):
    train_until_stopped(120, train_vit_b16, shards, tmp_path)
    assert train_vit_b16(shards, tmp_path) == 0
    rows = training_rows(tmp_path)
    assert [row["step"] for row in rows] == [50, 100, 150, 200]
    assert all(math.isfinite(row["loss"]) and row["skipped_updates"] == 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] < math.log(512)


@pytest.fixture(scope="module")
def by_launch_file(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """50 steps of ViT-B/16 in bf16 under each launch file, on all GPUs of this machine."""
    folder, rows = tmp_path_factory.mktemp("engines"), {}
    for engine in ENGINES:
        launch = ["--config_file", f"recipes/launch/{engine}.yaml", "--num_processes", torch.cuda.device_count()]
        data = [f"data.train={shards}/train", "data.val=none", f"run={folder / engine}", "data.workers=2"]
        sizes = ["steps=50", "batch=64", "log_every=5", "optim.warmup_steps=10", "quiet=true"]
        run_checked(BIN / "accelerate", "launch", *launch, "tools/pretrain.py", "recipe=mpp_vit_b16", *data, *sizes)
        rows[engine] = training_rows(folder / engine)
    return rows


@pytest.mark.parametrize("engine", ENGINES)
def test_each_launch_file_trains_as_ddp_does(by_launch_file: dict[str, list[dict]], engine: str):
    rows, ddp_rows = by_launch_file[engine], by_launch_file["ddp"]
    assert [row["step"] for row in rows] == list(range(5, 51, 5))
    assert [row["samples_digest"] for row in rows] == [row["samples_digest"] for row in ddp_rows]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in ddp_rows], rel=0.02)


@pytest.mark.parametrize("tokens", [(14, 14), (16, 16), (24, 24)])
def test_gradients_are_finite_at_vits_lengths(tokens):
    """The attention backend is pinned because cuDNN's backward gave NaN at such lengths (pytorch#169849)."""
    start_accelerator(TrainConfig(batch=1).launch_settings(1.0, world=1), "none", Path())
    encoder = Vit(size="Ti", image=(16 * tokens[0], 16 * tokens[1])).build().cuda()
    image = torch.randint(0, 256, (128, 3, *encoder.config.image_hw), dtype=torch.uint8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        encoder(image).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_compiled_blocks_learn_as_eager_ones_do(shards: Path, tmp_path: Path):
    """And so do residuals in bf16, within the spread of bf16; wrong kernels were seen (pytorch#186577)."""
    losses = {}
    for name, args in {"eager": ["compile=false"], "compiled": [], "residual": ["precision=bf16_residual"]}.items():
        data = [f"data.train={shards}/train", f"run={tmp_path / name}", "data.workers=2", "quiet=true"]
        sizes = ["encoder.size=Ti", "steps=60", "batch=32", "log_every=10", "optim.warmup_steps=10"]
        assert pretrain.run(config.parse(Pretrain, ["recipe=mpp_vit_b16", *data, *sizes, *args])) == 0
        losses[name] = [row["loss"] for row in training_rows(tmp_path / name)]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=0.01)
    assert losses["residual"] == pytest.approx(losses["eager"], rel=0.02)


@pytest.mark.parametrize("name", ["auto", "flash", "efficient", "math"])
def test_every_kernel_of_attention_gives_finite_gradients(name):
    set_attention_kernel(name)
    try:
        for tokens in (65, 196, 197, 200, 256, 257, 577):
            check_gradients(name, (12, tokens, 64), torch.device("cuda"), half=True)
    finally:
        set_attention_kernel("auto")


def test_rows_tell_the_time_on_the_devices_own_clock(shards: Path, tmp_path: Path):
    data = [f"data.train={shards}/train", f"run={tmp_path}", "data.workers=2", "profile=true", "quiet=true"]
    sizes = ["encoder.size=Ti", "steps=20", "batch=32", "log_every=10", "save_every=20"]
    assert pretrain.run(config.parse(Pretrain, ["recipe=mpp_vit_b16", *data, *sizes])) == 0
    for row in training_rows(tmp_path):
        shares = [value for name, value in row.items() if name.startswith("time_")]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        assert row["time_backward"] > row["time_forward"] > 0
        assert 0 < row["mfu"] < 1
        assert row["peak_memory_gib"] > 0
    assert (tmp_path / "profile" / "trace.json.gz").stat().st_size > 0


def test_2048_images_of_vit_b16_fit():
    if torch.cuda.mem_get_info()[1] < 130 * 2**30:
        pytest.skip("needs a GPU with 139 GiB, as an H200")
    recipe, tensors, source = recipes.resolve_recipe(config.parse(Pretrain, ["recipe=mpp_vit_b16", "batch=2048"]))
    accelerator = start_accelerator(recipe.launch_settings(recipe.optim.clip, world=1), "none", Path())
    model = setup.build_model(recipe, 0, tensors, source).cuda()
    prepare_model(model, accelerator, recipe.precision, recipe.compile, recipe.activation_checkpointing)
    state = baselines.bare_state(accelerator, recipe, model)
    image = torch.randint(0, 256, (2048, 3, 224, 224), dtype=torch.uint8, device="cuda")
    indices = torch.arange(2048, device="cuda")
    batch = {"image": image, "label": indices, "seed": indices, "valid": torch.ones_like(indices, dtype=torch.bool)}
    optimizer_step(state, iter([batch]))
    loss, norm = optimizer_step(state, iter([batch]))
    assert loss.isfinite()
    assert norm.isfinite()


def test_a_step_never_waits_for_the_device(tmp_path: Path):
    recipe = config.parse(Pretrain, ["recipe=mpp_demo"])
    accelerator = start_accelerator(recipe.launch_settings(recipe.optim.clip, world=1), "none", tmp_path)
    recipe, _, _ = recipes.resolve_recipe(recipe)
    model: Model = setup.build_model(recipe, 0).cuda()
    prepare_model(model, accelerator, recipe.precision, recipe.compile, recipe.activation_checkpointing)
    state = baselines.bare_state(accelerator, recipe, model)
    batch = {
        "image": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, device="cuda"),
        "label": torch.full((8,), -1, device="cuda"),
        "seed": torch.arange(8, device="cuda"),
        "valid": torch.ones(8, dtype=torch.bool, device="cuda"),
    }
    optimizer_step(state, iter([batch]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer_step(state, iter([batch, batch]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("words", [["compile=false"], ["compile=false", "micro_batch=32"], []], ids=" ".join)
def test_a_dry_run_foretells_memory_and_time(shards: Path, tmp_path: Path, words: list[str]):
    """Memory by formula is that of eager blocks: compiled ones keep less, which a dry run tells by trying."""
    data = [f"data.train={shards}/train", "data.val=none", f"run={tmp_path}", "data.workers=8"]
    sizes = ["recipe=mpp_vit_b16", "batch=128", "steps=60", "log_every=20", "save_every=1000", "tracker=none"]
    args = [*sizes, *data, "quiet=true", "restart=true", *words]
    assert pretrain.run(config.parse(Pretrain, [*args, "dry_run=true"])) == 0
    estimate = json.loads((tmp_path / "dry_run.json").read_text())["here"]
    gc.collect()  # the model that was tried
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert pretrain.run(config.parse(Pretrain, args)) == 0
    peak, last = torch.cuda.max_memory_allocated(), training_rows(tmp_path)[-1]
    assert estimate["peak"] == pytest.approx(peak, rel=0.15)
    if "compile=false" in words:
        assert estimate["bytes"]["sum"] == pytest.approx(peak, rel=0.15)
    assert peak < 1.15 * estimate["bytes"]["sum"]
    assert estimate["images_per_second"] == pytest.approx(last["images_per_second"], rel=0.25)
