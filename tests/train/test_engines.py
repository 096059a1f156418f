"""The same mathematics under every engine: DDP, FSDP2 and ZeRO-1/2/3 against one process that knows none of them.

Each launch file is launched for real, on two processes of this machine; all else shares one launch (engine_worker.py).
`docs/scaling.md` has the table of these cells.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssl_vit import config, load_encoder, recipe, session
from ssl_vit.recipe import Pretrain
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
CUT = {"zero3": {"stage3_param_persistence_threshold": 0}}  # else ZeRO-3 keeps a model this small whole
WORDS = ["steps=20", "log_every=1", "save_every=10", "eval_every=10", "optim.lr=3e-3", "optim.warmup_steps=2"]


def words(shards: Path, run: Path, *more: str) -> list[str]:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", "tracker=none"]
    own = "encoder.kind=timm" in more
    return [*(word for word in TINY if not (own and word.startswith("encoder."))), *WORDS, *data, *more]


def environment(**more: str) -> dict[str, str]:
    """For a launcher: none of this process's own launch."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return {**mine, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **more}


def launched(*command: Any, **more: str) -> None:
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one: Path, other: Path, first: int = 1) -> None:
    """The same batches, and losses, norms, optimizer and exported encoder equal to rounding."""
    mine, theirs = rows(one), rows(other)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == list(range(1, 21))
    for a, b in zip(mine[first - 1 :], theirs[first - 1 :], strict=True):
        assert a["samples_digest"] == b["samples_digest"]
        assert a["skipped_updates"] == b["skipped_updates"]
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-5)
        assert b["neighbour_loss"] == pytest.approx(a["neighbour_loss"], rel=1e-6)
        for kind in ("gradient_norm_by_layer", "weight_norm_by_layer"):
            assert b.get(kind, a[kind]) == pytest.approx(a[kind], rel=2e-3, abs=1e-7)  # of gradients not under ZeRO
        assert "weight_norm_by_layer" in b
    assert theirs[-1]["val_loss"] == pytest.approx(mine[-1]["val_loss"], rel=2e-6)
    assert theirs[-1]["val_samples"] == mine[-1]["val_samples"]
    for name, atol in {"model": 2e-4, "optimizer": 1e-6}.items():
        left, right = (load_file(run / "checkpoints" / "step-00000020" / f"{name}.safetensors") for run in (one, other))
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(
                right[key], left[key], rtol=1e-3, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert load_encoder(other).config == load_encoder(one).config
    left, right = (load_file(run / "encoder" / "model.safetensors") for run in (one, other))
    assert all(torch.allclose(left[key], right[key], atol=2e-4) for key in left)


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run by one process in this one, made when it is first asked for."""
    made: dict[tuple[str, ...], Path] = {}

    def get(*more: str) -> Path:
        if more not in made:
            from accelerate.state import AcceleratorState, GradientState

            made[more] = tmp_path_factory.mktemp("alone")
            session.run(config.parse(Pretrain, words(shards, made[more], *more), recipe.FOLDER))
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
        return made[more]

    return get


@pytest.fixture(scope="module")
def by_launch_file(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run by two processes for each launch file, as a user starts it."""
    folder = tmp_path_factory.mktemp("launched")
    for number, engine in enumerate(ENGINES):
        launch = ["--config_file", f"recipes/launch/{engine}.yaml", "--num_processes", 2]
        port = ["--main_process_port", 29610 + number]
        launched(BIN / "accelerate", "launch", *launch, *port, "tools/pretrain.py", *words(shards, folder / engine))
    return {engine: folder / engine for engine in ENGINES}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_launch_file_trains_as_one_process_does(alone, by_launch_file, engine: str):
    assert_same_training(alone(), by_launch_file[engine])


NEXT = dict(zip(ENGINES, [*ENGINES[1:], ENGINES[0]], strict=True))
ACCUMULATED = ["micro_batch=1", "activation_checkpointing=true"]
HALVES = ["micro_batch=2"]
DROPOUT = ["encoder.dropout=0.2"]
SGD = ["optim.kind=sgd", "optim.lr=0.01", "optim.clip=none"]
ENCODERS = {  # what each asks of an engine: a root's parameter inside of blocks, other blocks, blocks in another module
    "relative": ["encoder.positions=relative", "encoder.positions_at=shared"],
    "axial": ["encoder.kind=axial", "encoder.positions=2d", "encoder.positions_at=every", *ACCUMULATED],
    "timm": [
        "encoder.kind=timm",
        "encoder.name=test_vit3",
        "data.image_size=32",
    ],  # some of whose parameters learn nothing
}
AVERAGED = ["average=0.9", "optim.layer_decay=0.7", "encoder.pool=mean"]


@pytest.fixture(scope="module")
def worked(shards: Path, by_launch_file, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of the one launch that carries many."""
    folder = tmp_path_factory.mktemp("worked")
    jobs: list[dict[str, Any]] = []

    def job(name: str, engine: str, *more: str, poisoned: bool = False, **zero: Any) -> None:
        told = {"engine": engine, "words": words(shards, folder / name, *more), "poisoned": poisoned}
        jobs.append({**told, "zero": {**CUT.get(engine, {}), **zero}})

    for engine in ENGINES:
        job(f"accumulated-{engine}", engine, *ACCUMULATED)
        job(f"halves-{engine}", engine, *HALVES)
        job(f"sgd-{engine}", engine, *SGD)
        job(f"dropout-{engine}", engine, *DROPOUT)
        if engine != "zero3":
            probed = [f"online.{split}={shards}/{split}" for split in ("train", "val")]
            job(f"averaged-{engine}", engine, *AVERAGED, *probed, "online.shots=1,2")
        continued = folder / f"from-{engine}"
        start = by_launch_file[engine]
        shutil.copytree(start / "checkpoints" / "step-00000010", continued / "checkpoints" / "step-00000010")
        for file in ("metrics.jsonl", "recipe.yaml"):
            shutil.copy(start / file, continued)
        job(f"from-{engine}", NEXT[engine])
        again = folder / f"dropout-again-{engine}"
        jobs.append({"copy": [str(folder / f"dropout-{engine}"), str(again)]})
        job(f"dropout-again-{engine}", engine, *DROPOUT)
        job(f"poisoned-{engine}", engine, "log_every=4", poisoned=True)
        job(f"bf16-{engine}", engine, "precision=bf16", "micro_batch=2")
    for engine in ("zero2", "zero3", "fsdp2"):
        for name, keys in ENCODERS.items():
            job(f"{name}-{engine}", engine, *keys)
    for engine in ("zero2", "zero3"):
        job(f"offload-{engine}", engine, offload_optimizer={"device": "cpu"})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = Path(__file__).with_name("engine_worker.py")
    launched(BIN / "torchrun", "--standalone", "--nproc_per_node", 2, worker, folder / "jobs.json")
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "more"), [("accumulated", []), ("halves", []), ("sgd", SGD)])
def test_accumulation_recomputation_and_sgd(alone, worked: Path, engine: str, name: str, more: list[str]):
    """Micro batches of 1 (4 a step) with activation checkpointing, of 2 (2 a step), and SGD without clipping."""
    assert_same_training(alone(*more), worked / f"{name}-{engine}")


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("name", ENCODERS)
def test_other_encoders(alone, worked: Path, engine: str, name: str):
    """Under the engines that cut parameters or gradients; DDP knows no modules."""
    assert_same_training(alone(*ENCODERS[name]), worked / f"{name}-{engine}")


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "zero3"])
def test_averages_layer_decay_and_online_probes(alone, shards: Path, worked: Path, engine: str):
    """Polyak averages are judged and exported; probes see every sample once, on however many processes."""
    probed = [f"online.{split}={shards}/{split}" for split in ("train", "val")]
    one, other = alone(*AVERAGED, *probed, "online.shots=1,2"), worked / f"averaged-{engine}"
    assert_same_training(one, other)
    for a, b in zip(rows(one), rows(other), strict=True):
        assert {k: v for k, v in a.items() if "knn" in k or "few" in k} == {
            k: v for k, v in b.items() if "knn" in k or "few" in k
        }
    assert "val_few_shot_2" in rows(one)[-1]
    left, right = (load_file(run / "checkpoints" / "step-00000020" / "state.safetensors") for run in (one, other))
    names = [name for name in left if name.startswith("average.")]
    assert len(names) == len(load_file(one / "checkpoints" / "step-00000020" / "model.safetensors"))
    for name in names:
        torch.testing.assert_close(right[name], left[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_an_offloaded_optimizer(alone, worked: Path, engine: str):
    assert_same_training(alone(), worked / f"offload-{engine}")


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_autocast_under_every_engine(alone, worked: Path, engine: str):
    """Not fp32, and near it."""
    mine, exact = rows(worked / f"bf16-{engine}"), rows(alone())
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in exact], rel=1e-3)
    assert [row["grad_norm"] for row in mine] != pytest.approx([row["grad_norm"] for row in exact], rel=2e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_loss_of_one_rank_is_skipped_by_all(alone, worked: Path, engine: str):
    """Step 5 changes nothing, whichever engine: what follows is the same as under DDP."""
    mine, ddp = rows(worked / f"poisoned-{engine}"), rows(worked / "poisoned-ddp")
    assert {row["step"]: row["skipped_updates"] for row in mine} == {4: 0, 8: 1, 10: 0, 12: 0, 16: 0, 20: 0}
    assert [row["grad_norm"] for row in mine] == pytest.approx([row["grad_norm"] for row in ddp], rel=2e-5)
    assert [row["loss"] for row in mine[2:]] == pytest.approx([row["loss"] for row in ddp[2:]], rel=2e-6)
    assert mine[-1]["val_loss"] != pytest.approx(rows(alone())[-1]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_one_engine_goes_on_under_another(alone, worked: Path, engine: str):
    assert_same_training(alone(), worked / f"from-{engine}", first=11)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_goes_on_from_two(shards: Path, alone, by_launch_file, tmp_path: Path, engine: str):
    """And nothing of an engine is needed to read what it wrote."""
    from accelerate.state import AcceleratorState, GradientState

    shutil.copytree(by_launch_file[engine], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000020")
    session.run(config.parse(Pretrain, words(shards, tmp_path), recipe.FOLDER))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert_same_training(alone(), tmp_path, first=11)


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_differs_by_rank_and_repeats_on_resume(alone, worked: Path, engine: str):
    """Resumed at step 10 the losses come again; and they are not those of one process, which draws other masks."""
    whole, again = rows(worked / f"dropout-{engine}"), rows(worked / f"dropout-again-{engine}")
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in whole], rel=2e-6)
    assert whole[-1]["loss"] != pytest.approx(rows(alone(*DROPOUT))[-1]["loss"], rel=1e-4)


def test_four_processes_go_on_from_two(shards: Path, alone, by_launch_file, tmp_path: Path):
    """Four by DDP go on from what two by ZeRO-3 left; one from two is the test above."""
    shutil.copytree(by_launch_file["zero3"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000020")
    launched(
        *(BIN / "torchrun", "--standalone", "--nproc_per_node", 4, "tools/pretrain.py", *words(shards, tmp_path)),
        ACCELERATE_USE_CPU="1",
    )
    assert_same_training(alone(), tmp_path, first=11)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_under_every_launch_file(shards: Path, alone, tmp_path: Path, engine: str):
    launch = ["--config_file", f"recipes/launch/{engine}.yaml", "--num_processes", 4, "--main_process_port", 29630]
    launched(BIN / "accelerate", "launch", *launch, "tools/pretrain.py", *words(shards, tmp_path))
    assert_same_training(alone(), tmp_path)
