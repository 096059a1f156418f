"""The same mathematics under every engine: DDP, FSDP2 and ZeRO-1/2/3 against one process that knows none of them.

Each launch file is launched for real, on two processes of this machine; all else shares one launch (engine_worker.py).
`docs/scaling.md` has the table of these cells.
"""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.processes import free_port
from tests.train import engines
from tests.train.engines import DEFAULT_ENGINES, ENGINES, LAST_CHECKPOINT, STEPS, assert_same_training, rows, train_args

pytestmark = pytest.mark.ranks
ENGINE_PARAMS = [
    engine if engine in DEFAULT_ENGINES else pytest.param(engine, marks=pytest.mark.process) for engine in ENGINES
]


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run by one process in this one, made when it is first asked for."""

    @cache
    def train_once(*overrides: str) -> Path:
        run = tmp_path_factory.mktemp("alone")
        engines.train(train_args(shards, run, *overrides))
        return run

    return train_once


@pytest.fixture(scope="module")
def together(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.run_shared_jobs(shards, tmp_path_factory)


def train_with_launch_file(engine: str, args: list[str], processes: int = 2) -> None:
    """Train as a user does."""
    options = ["--config_file", f"recipes/launch/{engine}.yaml", "--num_processes", processes]
    options += ["--main_process_port", free_port(), "tools/pretrain.py"]
    engines.run_checked(engines.BIN / "accelerate", "launch", *options, *args)


@pytest.fixture(scope="module")
def launches(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by two processes for each launch file."""
    folder = tmp_path_factory.mktemp("launched")
    for engine in ENGINES:
        train_with_launch_file(engine, train_args(shards, folder / engine))
    return folder


@pytest.mark.parametrize("engine", DEFAULT_ENGINES)
def test_two_processes_train_as_one_does(alone, together: Path, engine: str):
    """With micro batches of 1, 4 a step, and activations computed again."""
    assert_same_training(alone(), together / engine)


@pytest.mark.process
@pytest.mark.parametrize("engine", ENGINES)
def test_a_launch_file_trains_as_one_process_does(alone, launches: Path, engine: str):
    assert_same_training(alone(), launches / engine)


NEXT_ENGINE = dict(zip(ENGINES, [*ENGINES[1:], ENGINES[0]], strict=True))
DROPOUT = ["encoder.dropout=0.2"]
SGD = ["optim.kind=sgd", "optim.lr=0.01", "optim.clip=none"]
ENCODERS = {  # what each asks of an engine: a root's parameter inside of blocks, other blocks, blocks in another module
    "relative": ["encoder.positions=relative", "encoder.position_placement=shared"],
    "axial": ["encoder.kind=axial", "encoder.positions=2d", "encoder.position_placement=every", *engines.ACCUMULATED],
    "timm": ["encoder.kind=timm", "encoder.name=test_vit3", "data.image_size=32"],  # some of it learns nothing
}
SHARDING_ENGINES = ("zero2", "zero3", "fsdp2")  # parameters or gradients; DDP knows no modules
EQUIVALENT: dict[
    str, tuple[list[str], list[str]]
] = {  # of the runs below: their engines, and the words of one process's run
    "accumulated": (
        [engine for engine in ENGINES if engine not in DEFAULT_ENGINES],
        [],
    ),  # of two the default tier has it
    "halves": (ENGINES, []),  # two micro batches
    "sgd": (ENGINES, SGD),  # without clipping
    "from": (ENGINES, []),  # on from a checkpoint of the engine before
    "offload": (["zero2", "zero3"], []),  # an optimizer on the CPU
    **{name: (list(SHARDING_ENGINES), keys) for name, keys in ENCODERS.items()},
}


def average_args(shards: Path) -> list[str]:
    args = ["ema_decay=0.9", "optim.layer_decay=0.7", "encoder.pool=mean", "online.shots=1,2"]
    return [*args, *(f"online.{split}={shards}/{split}" for split in ("train", "val"))]


@pytest.fixture(scope="module")
def worked(shards: Path, launches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of the one launch that carries many."""
    folder = tmp_path_factory.mktemp("worked")
    jobs: list[dict[str, Any]] = []

    def add_job(name: str, engine: str, *overrides: str, **options: Any) -> None:
        jobs.append(engines.job(engine, train_args(shards, folder / name, *overrides), **options))

    for engine in ENGINES:
        if engine not in DEFAULT_ENGINES:
            add_job(f"accumulated-{engine}", engine, *engines.ACCUMULATED)
        add_job(f"halves-{engine}", engine, "micro_batch=2")
        add_job(f"sgd-{engine}", engine, *SGD)
        add_job(f"dropout-{engine}", engine, *DROPOUT)
        if engine != "zero3":
            add_job(f"averaged-{engine}", engine, *average_args(shards))
        jobs.append({"copy": [str(launches / engine), str(folder / f"from-{engine}")]})
        add_job(f"from-{engine}", NEXT_ENGINE[engine])
        jobs.append({"copy": [str(folder / f"dropout-{engine}"), str(folder / f"dropout-again-{engine}")]})
        add_job(f"dropout-again-{engine}", engine, *DROPOUT)
        add_job(f"poisoned-{engine}", engine, "log_every=4", poisoned=True)
        add_job(f"bf16-{engine}", engine, "precision=bf16", "micro_batch=2")
        for name, keys in ENCODERS.items() if engine in SHARDING_ENGINES else ():
            add_job(f"{name}-{engine}", engine, *keys)
        if engine in EQUIVALENT["offload"][0]:
            add_job(f"offload-{engine}", engine, offload_optimizer={"device": "cpu"})
    engines.run_jobs(folder, jobs)
    return folder


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "engine"), [(name, engine) for name, (engine_names, _) in EQUIVALENT.items() for engine in engine_names]
)
def test_every_engine_trains_the_same(alone, worked: Path, name: str, engine: str):
    first = STEPS // 2 + 1 if name == "from" else 1
    assert_same_training(alone(*EQUIVALENT[name][1]), worked / f"{name}-{engine}", first)


@pytest.mark.process
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "zero3"])
def test_averages_layer_decay_and_online_probes(alone, shards: Path, worked: Path, engine: str):
    """Polyak averages are judged and exported; probes see every sample once, on however many processes."""
    single_run, averaged_run = alone(*average_args(shards)), worked / f"averaged-{engine}"
    assert_same_training(single_run, averaged_run)
    for a, b in zip(rows(single_run), rows(averaged_run), strict=True):
        a, b = ({k: v for k, v in row.items() if "knn" in k or "few" in k} for row in (a, b))
        assert a == b
    assert "val_few_shot_2" in rows(single_run)[-1]
    single_state, averaged_state = (
        load_file(run / LAST_CHECKPOINT / "ema.safetensors") for run in (single_run, averaged_run)
    )
    assert len(single_state) == len(load_file(single_run / LAST_CHECKPOINT / "model.safetensors"))
    engines.assert_near(averaged_state, single_state, 2e-4)


@pytest.mark.process
@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_autocast_under_every_engine(alone, worked: Path, engine: str):
    """Not fp32, and near it."""
    bf16_rows, fp32_rows = rows(worked / f"bf16-{engine}"), rows(alone())
    assert [row["loss"] for row in bf16_rows] == pytest.approx([row["loss"] for row in fp32_rows], rel=1e-3)
    assert [row["grad_norm"] for row in bf16_rows] != pytest.approx([row["grad_norm"] for row in fp32_rows], rel=2e-4)


@pytest.mark.process
@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_loss_of_one_rank_is_skipped_by_all(alone, worked: Path, engine: str):
    """Step 3 changes nothing, whichever engine: what follows is the same as under DDP."""
    engine_rows, ddp_rows = rows(worked / f"poisoned-{engine}"), rows(worked / "poisoned-ddp")
    assert {row["step"]: row["skipped_updates"] for row in engine_rows} == {4: 1, 5: 0, 8: 0, 10: 0}
    assert [row["grad_norm"] for row in engine_rows] == pytest.approx([row["grad_norm"] for row in ddp_rows], rel=2e-5)
    assert [row["loss"] for row in engine_rows[1:]] == pytest.approx([row["loss"] for row in ddp_rows[1:]], rel=2e-6)
    assert engine_rows[-1]["val_loss"] != pytest.approx(rows(alone())[-1]["val_loss"], rel=1e-5)


def copy_half(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy, dirs_exist_ok=True)
    shutil.rmtree(copy / LAST_CHECKPOINT)
    assert (copy / engines.HALF_CHECKPOINT).exists()


@pytest.mark.parametrize("engine", ENGINE_PARAMS)
def test_one_process_goes_on_from_two(shards: Path, alone, request: pytest.FixtureRequest, tmp_path: Path, engine: str):
    """And nothing of an engine is needed to read what it wrote."""
    copy_half(request.getfixturevalue("together" if engine in DEFAULT_ENGINES else "launches") / engine, tmp_path)
    engines.train(train_args(shards, tmp_path, *(engines.ACCUMULATED if engine in DEFAULT_ENGINES else [])))
    assert_same_training(alone(), tmp_path, first_step=STEPS // 2 + 1)


@pytest.mark.process
@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_differs_by_rank_and_repeats_on_resume(alone, worked: Path, engine: str):
    """Resumed at half time the losses come again; and they are not those of one process, which draws other masks."""
    straight_rows, resumed_rows = rows(worked / f"dropout-{engine}"), rows(worked / f"dropout-again-{engine}")
    assert [row["loss"] for row in resumed_rows] == pytest.approx([row["loss"] for row in straight_rows], rel=2e-6)
    assert straight_rows[-1]["loss"] != pytest.approx(rows(alone(*DROPOUT))[-1]["loss"], rel=1e-4)


@pytest.mark.process
def test_four_processes_go_on_from_two(shards: Path, alone, launches: Path, tmp_path: Path):
    """Four by DDP go on from what two by ZeRO-3 left; one from two is the test above."""
    copy_half(launches / "zero3", tmp_path)
    args = ["tools/pretrain.py", *train_args(shards, tmp_path)]
    engines.run_checked(engines.BIN / "torchrun", "--standalone", "--nproc_per_node", 4, *args, ACCELERATE_USE_CPU="1")
    assert_same_training(alone(), tmp_path, first_step=STEPS // 2 + 1)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_under_every_launch_file(shards: Path, alone, tmp_path: Path, engine: str):
    train_with_launch_file(engine, train_args(shards, tmp_path), processes=4)
    assert_same_training(alone(), tmp_path)
