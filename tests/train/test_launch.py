"""What a launch file says against the recipe, or wrongly, is refused before anything is trained."""

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from ssl_vit import config
from ssl_vit.exits import USAGE, Refusal
from ssl_vit.recipe import FOLDER, Pretrain
from ssl_vit.train import launch
from ssl_vit.train.launch import start
from ssl_vit.train.plugins import Asked, agree
from tests.starts import free_port
from tests.train import engines

FILES = sorted((FOLDER / "launch").glob("*.yaml"))
ASKED = Asked(24, 4, 3, 0.5, precision="auto", activation_checkpointing=False, timeout=60)  # as engine_worker.py asks


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody launched these tests, and what a start changes in the environment is changed back."""
    monkeypatch.setattr(launch, "launcher_words", list)
    own = {
        name: value
        for name, value in os.environ.items()
        if name == "ACCELERATE_USE_CPU" or not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    with patch.dict(os.environ, own, clear=True):
        yield


def refused(**environment: str) -> str:
    """The line that a start ends with."""
    os.environ.update(environment)
    with pytest.raises(Refusal) as caught:
        start(ASKED, "none", Path())
    assert caught.value.code == USAGE
    assert "\n" not in caught.value.message
    return caught.value.message


CLAIMS: dict[str, tuple[Any, str, Any]] = {
    # name: (a launch file's value, what the recipe says against it, a value that agrees)
    "mixed_precision": ("bf16", "precision fp32", "FP32"),
    "gradient_accumulation_steps": ("7", "batch and micro_batch make 3", "3"),
    "gradient_clipping": ("2.5", "optim.clip 0.5", "0.50"),
    "dynamo_backend": ("INDUCTOR", "compile decides", None),
    "fsdp_activation_checkpointing": ("true", "activation_checkpointing none", "False"),
    "train_batch_size": (32, "batch 24", 24),
    "train_micro_batch_size_per_gpu": (8, "micro_batch 4", 4),
}
EXPORTED = {name: f"ACCELERATE_{name.upper()}".replace("ACCELERATE_FSDP", "FSDP") for name in list(CLAIMS)[:5]}


def contradiction(name: str) -> str:
    claim, recipe, _ = CLAIMS[name]
    return f"the launch file says {name}={claim}, the recipe {recipe}"


@pytest.mark.parametrize("name", CLAIMS)
def test_a_contradiction_is_refused_with_both_values(name: str):
    """And what agrees is not, nor what launchers always export, which counts as not given."""
    claim, _, agrees = CLAIMS[name]
    for fine in (agrees, None, "", "no", "NO", "none", "auto", "1", 1, "1.0", 1.0):
        agree(ASKED, {name: fine})
    with pytest.raises(Refusal, match=contradiction(name)):
        agree(ASKED, {name: claim})


def test_none_is_said_where_the_recipe_clips_nothing():
    with pytest.raises(Refusal, match=r"gradient_clipping=2, the recipe optim.clip none"):
        agree(Asked(24, 4, 3, None, "auto", False, 60), {"gradient_clipping": 2})


def test_accumulation_follows_from_batch_micro_batch_and_processes():
    """Which divide one another, or are refused."""

    def asked(world: int, micro: str) -> Asked:
        return config.parse(Pretrain, ["batch=24", f"micro_batch={micro}"], FOLDER).asked(0.5, world)

    for micro, wanted in {"none": (12, 1), "4": (4, 3)}.items():
        assert (asked(2, micro).micro_batch, asked(2, micro).accumulate) == wanted
    for world, micro, line in (
        (48, "none", "batch=24 cannot be shared by 48 processes; these can: 1, 2, 3, 4, 6, 8, 12, 24"),
        (2, "5", "micro_batch=5 does not divide the 12 images that each of 2 processes takes"),
    ):
        with pytest.raises(Refusal, match=line):
            asked(world, micro)


GPU = "ACCELERATE_USE_CPU=false"
ONE = "2 processes were started on this machine, which has 1 GPUs: give --num_processes"
HIDES = "DeepSpeed takes the GPUs where there are some: CUDA_VISIBLE_DEVICES= hides them"
FSDP_1 = "the launch file asks for FSDP 1: set fsdp_config.fsdp_version: 2"
STARTS = [  # on so many GPUs, with this environment
    (0, f"{GPU} WORLD_SIZE=2", "2 processes were started but accelerate sees 1: set ACCELERATE_USE_"),  # side by side
    (1, f"{GPU} LOCAL_WORLD_SIZE=2", ONE),
    (1, "ACCELERATE_USE_CPU=true ACCELERATE_USE_DEEPSPEED=true", HIDES),
    (0, "ACCELERATE_USE_FSDP=true FSDP_VERSION=1", FSDP_1),
    (0, "ACCELERATE_USE_FSDP=true", FSDP_1),
    *((0, f"{variable}={CLAIMS[name][0]}", contradiction(name)) for name, variable in EXPORTED.items()),
]


@pytest.mark.parametrize(("gpus", "given", "line"), STARTS)
def test_a_launch_that_would_train_something_else_is_refused(
    gpus: int, given: str, line: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert refused(**dict(word.split("=") for word in given.split())).startswith(line)


@pytest.mark.parametrize("missing", ["deepspeed", "transformers", "g++", "ninja"])
def test_deepspeed_names_a_package_or_a_compiler_that_is_missing(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    found = launch.importlib.util.find_spec
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    for tool in {"g++", "ninja"} - {missing}:
        (tmp_path / tool).touch(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    lines = (
        f"DeepSpeed needs the package {missing}: pip install 'ssl_vit[deepspeed]'",
        f"DeepSpeed on the CPU builds an extension: {missing} is missing, install it",
    )
    line = refused(ACCELERATE_USE_DEEPSPEED="true", PATH=str(tmp_path))
    assert line == lines[missing in ("g++", "ninja")]


def launched_with(content: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, joint: str = " ") -> Path:
    """As if accelerate's launcher had started this process with a launch file."""
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(content))
    words = f"/bin/python accelerate launch --config_file{joint}{path} tools/pretrain.py".split()
    monkeypatch.setattr(launch, "launcher_words", lambda: words)
    return path


@pytest.mark.parametrize(
    ("joint", "section", "key", "cure"),
    [
        (" ", "deepspeed_config", "zero_stag", "; did you mean zero_stage?"),
        ("=", "fsdp_config", "fsdp_versio", "; did you mean fsdp_version?"),
        (" ", "fsdp_config", "cpu_offlod", ""),
    ],
)
def test_a_misspelt_key_of_a_section_is_refused(
    joint: str, section: str, key: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = launched_with({section: {key: 1}}, tmp_path, monkeypatch, joint)
    line = refused(ACCELERATE_DYNAMO_BACKEND="inductor")  # refused next, else this test would start training
    assert line.startswith(f"{path}: {section} has a key that accelerate does not know: {key}{cure}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_our_launch_files_hold_known_keys(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """None is refused. A top-level key that is unknown accelerate refuses by name; ours would not see it."""
    from accelerate.commands.config.config_args import load_config_from_file

    content = yaml.safe_load(file.read_text())
    launched_with(content, tmp_path, monkeypatch)
    assert "dynamo_backend" in refused(ACCELERATE_DYNAMO_BACKEND="inductor")  # that is what is looked at next
    load_config_from_file(str(file))
    path = launched_with({**content, "num_procs": 2}, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"unknown keys \(\['num_procs'\]\)"):
        load_config_from_file(str(path))


@pytest.mark.process
def test_a_misspelt_key_is_refused_in_a_real_launch(shards: Path, tmp_path: Path):
    """The launcher's words are found where it is the parent."""
    content = yaml.safe_load((FOLDER / "launch" / "zero2.yaml").read_text())
    content["deepspeed_config"]["zero_stag"] = content["deepspeed_config"].pop("zero_stage")
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(content))
    options = ["--config_file", tmp_path / "launch.yaml", "--num_processes", "1", "--main_process_port", free_port()]
    words = ["tools/pretrain.py", *engines.words(shards, tmp_path / "run")]
    done = engines.process(engines.BIN / "accelerate", "launch", *options, *words)
    assert done.returncode != 0
    line = "deepspeed_config has a key that accelerate does not know: zero_stag; did you mean zero_stage?"
    assert f"{tmp_path}/launch.yaml: {line}\n" in done.stderr


@pytest.fixture(scope="module")
def started(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of starts under each of engines.CONFIGS, in the launch that trains under engines as well."""
    return json.loads((engines.together(shards, tmp_path_factory) / "configs.json").read_text())


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["plain", "no clip", "auto", "same", "batch of 1"])
def test_the_recipes_values_get_into_deepspeeds_config(started, name: str):
    """And no other batch is left: DeepSpeed itself stops where it is not micro batch x accumulation x processes."""
    values = started[name]
    assert values["train_micro_batch_size_per_gpu"] == 4
    assert values["gradient_accumulation_steps"] == 3
    assert values["gradient_clipping"] == (0.0 if name == "no clip" else 0.5)
    assert values.get("train_batch_size", 24) in (24, "auto")
    assert not {"fp16", "bf16", "torch_autocast"} & set(values)


REFUSALS = {
    "misspelt": "the DeepSpeed config has a key that is not known here: gradient_cliping; did you mean gradient_clipp",
    "misspelt in zero": "overlap_com",
    "file and section": "When using `deepspeed_config_file`, the following accelerate config variables will be ignored",
    "not a section": "bf16",
    "optimizer": "key that is not known here: optimizer; the optimizer and its schedule are the recipe's",
    "nvme": "offload to nvme is not supported: take device cpu",
    "no zero": "Please specify the ZeRO optimization config",
}
REFUSALS |= {name: f"the DeepSpeed config enables {name}: precision= decides" for name in engines.PRECISIONS}
REFUSALS |= {name: contradiction(name) for name in CLAIMS if name in engines.CONFIGS}


@pytest.mark.ranks
@pytest.mark.parametrize("name", REFUSALS)
def test_a_deepspeed_config_that_would_train_something_else_is_refused(started, name: str):
    assert started[name].get("code") == USAGE
    assert REFUSALS[name] in started[name]["message"]
    assert "\n" not in started[name]["message"]
