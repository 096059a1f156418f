"""What a launch file says against the recipe, or wrongly, is refused before anything is trained."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssl_vit import config
from ssl_vit.exits import USAGE, Refusal
from ssl_vit.recipe import FOLDER, Pretrain
from ssl_vit.train import launch
from ssl_vit.train.launch import start
from ssl_vit.train.plugins import Asked, agree

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILES = sorted((FOLDER / "launch").glob("*.yaml"))
ASKED = Asked(
    batch=24, micro_batch=4, accumulate=3, clip=0.5, precision="auto", activation_checkpointing=False, timeout=60
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody launched these tests, and what a start changes in the environment is changed back."""
    monkeypatch.setattr(launch, "launcher_words", list)
    before = dict(os.environ)
    for name in before:
        if name.startswith(("ACCELERATE_", "FSDP_")) and name != "ACCELERATE_USE_CPU":
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


def refused(**environment: str) -> str:
    """The line that a start ends with."""
    os.environ.update(environment)
    with pytest.raises(Refusal) as caught:
        start(ASKED, "none", Path())
    assert caught.value.code == USAGE
    assert "\n" not in caught.value.message
    return caught.value.message


CONTRADICTIONS = {  # name: (the launch file's value, what the recipe says)
    "mixed_precision": ("bf16", "precision fp32"),
    "gradient_accumulation_steps": ("7", "batch and micro_batch make 3"),
    "gradient_clipping": ("2.5", "optim.clip 0.5"),
    "dynamo_backend": ("INDUCTOR", "compile decides"),
    "fsdp_activation_checkpointing": ("true", "activation_checkpointing none"),
    "train_batch_size": (32, "batch 24"),
    "train_micro_batch_size_per_gpu": (8, "micro_batch 4"),
}
AGREEMENTS = {
    "mixed_precision": "FP32",
    "gradient_accumulation_steps": "3",
    "gradient_clipping": "0.50",
    "fsdp_activation_checkpointing": "False",
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 4,
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_refused_with_both_values(name: str):
    claim, recipe = CONTRADICTIONS[name]
    with pytest.raises(Refusal, match=f"the launch file says {name}={claim}, the recipe {recipe}"):
        agree(ASKED, {name: claim})


@pytest.mark.parametrize("name", CONTRADICTIONS)
@pytest.mark.parametrize("claim", [None, "", "no", "NO", "none", "auto", "1", 1, "1.0", 1.0])
def test_what_launchers_always_export_counts_as_not_given(name: str, claim: Any):
    agree(ASKED, {name: claim})


@pytest.mark.parametrize("name", AGREEMENTS)
def test_the_recipes_own_values_agree(name: str):
    agree(ASKED, {name: AGREEMENTS[name]})


def test_none_is_said_where_the_recipe_clips_nothing():
    with pytest.raises(Refusal, match=r"gradient_clipping=2, the recipe optim.clip none"):
        agree(Asked(24, 4, 3, None, "auto", False, 60), {"gradient_clipping": 2})


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps"),
        ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping"),
        ("ACCELERATE_DYNAMO_BACKEND", "dynamo_backend"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing"),
    ],
)
def test_the_launchers_variables_are_read(variable: str, name: str):
    claim, recipe = CONTRADICTIONS[name]
    assert f"says {name}={claim}, the recipe {recipe}" in refused(**{variable: str(claim)})


def asked(world: int, *words: str) -> Asked:
    return config.parse(Pretrain, ["batch=24", *words], FOLDER).asked(0.5, world)


def test_accumulation_follows_from_batch_micro_batch_and_processes():
    assert (asked(2).micro_batch, asked(2).accumulate) == (12, 1)
    assert (asked(2, "micro_batch=4").micro_batch, asked(2, "micro_batch=4").accumulate) == (4, 3)


@pytest.mark.parametrize(
    ("world", "micro", "line"),
    [
        (5, "none", "batch=24 cannot be shared by 5 processes; these can: 1, 2, 3, 4, 6, 8, 12"),
        (48, "none", "batch=24 cannot be shared by 48 processes; these can: 1, 2, 3, 4, 6, 8, 12, 24"),
        (2, "5", "micro_batch=5 does not divide the 12 images that each of 2 processes takes"),
    ],
)
def test_processes_and_micro_batches_divide_the_batch(world: int, micro: str, line: str):
    with pytest.raises(Refusal) as caught:
        asked(world, f"micro_batch={micro}")
    assert caught.value.message.startswith(line)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_processes_that_accelerate_does_not_see_are_refused(monkeypatch: pytest.MonkeyPatch):
    """They would train side by side, each for itself."""
    from accelerate.state import AcceleratorState, GradientState

    with_gpus(monkeypatch, 0)
    try:
        assert refused(WORLD_SIZE="2", ACCELERATE_USE_CPU="false").startswith(
            "2 processes were started but accelerate sees 1: set ACCELERATE_USE_"
        )
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 1)
    line = refused(ACCELERATE_USE_CPU="false", LOCAL_WORLD_SIZE="2")
    assert line.startswith("2 processes were started on this machine, which has 1 GPUs: give --num_processes")


def test_deepspeed_is_not_kept_from_gpus(monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 1)
    line = refused(ACCELERATE_USE_CPU="true", ACCELERATE_USE_DEEPSPEED="true")
    assert line == "DeepSpeed takes the GPUs where there are some: CUDA_VISIBLE_DEVICES= hides them"


@pytest.mark.parametrize("version", ["1", ""])
def test_fsdp_1_is_refused(version: str):
    line = refused(ACCELERATE_USE_FSDP="true", **({"FSDP_VERSION": version} if version else {}))
    assert line == "the launch file asks for FSDP 1: set fsdp_config.fsdp_version: 2"


@pytest.mark.parametrize("package", ["deepspeed", "transformers"])
def test_deepspeed_names_a_package_that_is_missing(package: str, monkeypatch: pytest.MonkeyPatch):
    found = launch.importlib.util.find_spec
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    line = refused(ACCELERATE_USE_DEEPSPEED="true")
    assert line == f"DeepSpeed needs the package {package}: pip install 'ssl_vit[deepspeed]'"


@pytest.mark.parametrize("tool", ["g++", "ninja"])
def test_deepspeed_names_a_compiler_that_is_missing(tool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    other = tmp_path / ({"g++", "ninja"} - {tool}).pop()
    other.touch()
    other.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    line = refused(ACCELERATE_USE_DEEPSPEED="true", PATH=str(tmp_path))
    assert line == f"DeepSpeed on the CPU builds an extension: {tool} is missing, install it"


def launched_with(content: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, joint: str = " ") -> Path:
    """As if accelerate's launcher had started this process with a launch file."""
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(content))
    words = f"/bin/python accelerate launch --config_file{joint}{path} tools/pretrain.py".split()
    monkeypatch.setattr(launch, "launcher_words", lambda: words)
    return path


@pytest.mark.parametrize(
    ("section", "key", "cure"),
    [
        ("deepspeed_config", "zero_stag", "; did you mean zero_stage?"),
        ("deepspeed_config", "ofload_optimizer_device", "; did you mean offload_optimizer_device?"),
        ("fsdp_config", "fsdp_versio", "; did you mean fsdp_version?"),
        ("fsdp_config", "cpu_offlod", ""),
    ],
)
def test_a_misspelt_key_of_a_section_is_refused(
    section: str, key: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = launched_with({section: {key: 1}}, tmp_path, monkeypatch)
    assert refused().startswith(f"{path}: {section} has a key that accelerate does not know: {key}{cure}")


def test_a_misspelt_key_is_refused_in_either_way_of_giving_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    launched_with({"deepspeed_config": {"zero_stag": 1}}, tmp_path, monkeypatch, joint="=")
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "inductor"  # refused next, else this test would start training
    assert "zero_stag" in refused()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_our_launch_files_hold_known_keys(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """None is refused; and accelerate reads them, top-level keys too."""
    from accelerate.commands.config.config_args import load_config_from_file

    launched_with(yaml.safe_load(file.read_text()), tmp_path, monkeypatch)
    assert "dynamo_backend" in refused(ACCELERATE_DYNAMO_BACKEND="inductor")  # that is what is looked at next
    load_config_from_file(str(file))


def test_a_top_level_key_is_refused_by_accelerate(tmp_path: Path):
    """By name, before any process is started; ours would not see it."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    content = yaml.safe_load((FOLDER / "launch" / "ddp.yaml").read_text())
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump({**content, "num_procs": 2}))
    with pytest.raises(ValueError, match=r"unknown keys \(\['num_procs'\]\)"):
        launch_command(launch_command_parser().parse_args(["--config_file", str(path), "tools/pretrain.py"]))


Z = {"zero_optimization": {"stage": 2}}
CONFIGS: dict[str, dict[str, Any]] = {
    "file and section": Z,  # the first, while what the launch file says is still there
    "plain": Z,
    "no clip": Z,
    "auto": {**Z, "train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}},
    "same": {**Z, "train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5},
    "misspelt": {**Z, "gradient_cliping": 1.0},
    "misspelt in zero": {"zero_optimization": {"stage": 2, "overlap_com": True}},
    "optimizer": {**Z, "optimizer": {"type": "Adam"}},
    "fp16": {**Z, "fp16": {"enabled": True}},
    "bf16": {**Z, "bf16": {"enabled": True}},
    "torch_autocast": {**Z, "torch_autocast": {"enabled": True}},
    "train_micro_batch_size_per_gpu": {**Z, "train_micro_batch_size_per_gpu": 8},
    "train_batch_size": {**Z, "train_batch_size": 32},
    "gradient_accumulation_steps": {**Z, "gradient_accumulation_steps": 7},
    "gradient_clipping": {**Z, "gradient_clipping": 2.5},
    "batch of 1": {**Z, "train_batch_size": 1},
    "nvme": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
    "no zero": {"gradient_clipping": 0.5},
    "not a section": {**Z, "bf16": True},
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of starts under DeepSpeed, all in one real launch with a misspelt launch file (launch_worker.py)."""
    folder = tmp_path_factory.mktemp("deepspeed")
    content = yaml.safe_load((FOLDER / "launch" / "zero2.yaml").read_text())
    content["num_processes"] = 1
    content["deepspeed_config"]["zero_stag"] = content["deepspeed_config"].pop("zero_stage")
    (folder / "launch.yaml").write_text(yaml.safe_dump(content))
    (folder / "configs.json").write_text(json.dumps(CONFIGS))
    words = ["launch", "--config_file", folder / "launch.yaml", "--main_process_port", "0", HERE / "launch_worker.py"]
    command = [Path(sys.executable).parent / "accelerate", *words, folder / "found.json", folder / "configs.json"]
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(word) for word in command], env=mine | more, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_a_misspelt_key_is_refused_in_a_real_launch(started):
    line = started["launch file"]["message"]
    assert line.endswith(
        "deepspeed_config has a key that accelerate does not know: zero_stag; did you mean zero_stage?"
    )


@pytest.mark.parametrize("name", ["plain", "no clip", "auto", "same", "batch of 1"])
def test_the_recipes_values_get_into_deepspeeds_config(started, name: str):
    values = started[name]
    assert values["train_micro_batch_size_per_gpu"] == 4
    assert values["gradient_accumulation_steps"] == 3
    assert values["gradient_clipping"] == (0.0 if name == "no clip" else 0.5)
    assert not {"fp16", "bf16", "torch_autocast"} & set(values)


def test_no_other_batch_is_left_in_deepspeeds_config(started):
    """DeepSpeed itself stops where it is not micro batch x accumulation x processes."""
    assert started["batch of 1"].get("train_batch_size", 24) in (24, "auto")


REFUSALS = {
    "misspelt": "the DeepSpeed config has a key that is not known here: gradient_cliping; did you mean gradient_clipp",
    "misspelt in zero": "overlap_com",
    "file and section": "When using `deepspeed_config_file`, the following accelerate config variables will be ignored",
    "not a section": "bf16",
    "optimizer": "key that is not known here: optimizer; the optimizer and its schedule are the recipe's",
    "fp16": "the DeepSpeed config enables fp16: precision= decides",
    "bf16": "the DeepSpeed config enables bf16: precision= decides",
    "torch_autocast": "the DeepSpeed config enables torch_autocast: precision= decides",
    "nvme": "offload to nvme is not supported: take device cpu",
    "no zero": "Please specify the ZeRO optimization config",
} | {
    name: f"the launch file says {name}={claim}, the recipe {recipe}"
    for name, (claim, recipe) in CONTRADICTIONS.items()
    if name in CONFIGS
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_deepspeed_config_that_would_train_something_else_is_refused(started, name: str):
    assert started[name].get("code") == USAGE
    assert REFUSALS[name] in started[name]["message"]
    assert "\n" not in started[name]["message"]
