"""What a launch file says against the recipe, or machines against one another, is refused before the first step."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import yaml

import ssl_vit
from ssl_vit import config, errors, recipes
from ssl_vit.commands import pretrain
from ssl_vit.distributed import raise_first
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.recipes import Pretrain
from ssl_vit.train import launch, preflight
from ssl_vit.train.launch import LaunchSettings, check_conflicts, start_accelerator
from ssl_vit.train.preflight import compare_processes, wait_for_rendezvous
from tests.conftest import TINY
from tests.processes import Start, free_port
from tests.train import engines

FILES = sorted((engines.ROOT / "recipes" / "launch").glob("*.yaml"))
SETTINGS = LaunchSettings(
    24, 4, 3, 0.5, precision="auto", activation_checkpointing=False, timeout=60
)  # as engine_worker.py asks


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody launched these tests, and what a start changes in the environment is changed back."""
    monkeypatch.setattr(launch, "launcher_argv", list)
    clean_environment = {
        name: value
        for name, value in os.environ.items()
        if name == "ACCELERATE_USE_CPU" or not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    with patch.dict(os.environ, clean_environment, clear=True):
        yield


def refusal_message(**environment: str) -> str:
    """The line that a start ends with."""
    os.environ.update(environment)
    with pytest.raises(ExitError) as excinfo:
        start_accelerator(SETTINGS, "none", Path())
    assert excinfo.value.code == ExitCode.USAGE
    assert "\n" not in excinfo.value.message
    return excinfo.value.message


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


def conflict_message(name: str) -> str:
    claim, recipe, _ = CLAIMS[name]
    return f"the launch file says {name}={claim}, the recipe {recipe}"


@pytest.mark.parametrize("name", CLAIMS)
def test_a_contradiction_is_refused_with_both_values(name: str):
    """And what agrees is not, nor what launchers always export, which counts as not given."""
    claim, _, agrees = CLAIMS[name]
    for value in (agrees, None, "", "no", "NO", "none", "auto", "1", 1, "1.0", 1.0):
        check_conflicts(SETTINGS, {name: value})
    with pytest.raises(ExitError, match=conflict_message(name)):
        check_conflicts(SETTINGS, {name: claim})


def test_none_is_said_where_the_recipe_clips_nothing():
    with pytest.raises(ExitError, match=r"gradient_clipping=2, the recipe optim.clip none"):
        check_conflicts(LaunchSettings(24, 4, 3, None, "auto", False, 60), {"gradient_clipping": 2})


def test_accumulation_follows_from_batch_micro_batch_and_processes():
    """Which divide one another, or are refused."""

    def launch_settings(world: int, micro: str) -> LaunchSettings:
        return config.parse(Pretrain, ["batch=24", f"micro_batch={micro}"]).launch_settings(0.5, world)

    for micro, expected in {"none": (12, 1), "4": (4, 3)}.items():
        assert (launch_settings(2, micro).micro_batch, launch_settings(2, micro).accumulate) == expected
    for world, micro, line in (
        (48, "none", "batch=24 cannot be shared by 48 processes; these can: 1, 2, 3, 4, 6, 8, 12, 24"),
        (2, "5", "micro_batch=5 does not divide the 12 images that each of 2 processes takes"),
    ):
        with pytest.raises(ExitError, match=line):
            launch_settings(world, micro)


GPU = "ACCELERATE_USE_CPU=false"
GPUS_HERE = "2 processes were started on this machine, which has 1 GPUs: give --num_processes"
GPUS_HINT = "DeepSpeed takes the GPUs where there are some: CUDA_VISIBLE_DEVICES= hides them"
FSDP_1 = "the launch file asks for FSDP 1: set fsdp_config.fsdp_version: 2"
STARTS = [  # on so many GPUs, with this environment
    (0, f"{GPU} WORLD_SIZE=2", "2 processes were started but accelerate sees 1: set ACCELERATE_USE_"),  # side by side
    (1, f"{GPU} LOCAL_WORLD_SIZE=2", GPUS_HERE),
    (1, "ACCELERATE_USE_CPU=true ACCELERATE_USE_DEEPSPEED=true", GPUS_HINT),
    (0, "ACCELERATE_USE_FSDP=true FSDP_VERSION=1", FSDP_1),
    (0, "ACCELERATE_USE_FSDP=true", FSDP_1),
    *((0, f"{variable}={CLAIMS[name][0]}", conflict_message(name)) for name, variable in EXPORTED.items()),
]


@pytest.mark.parametrize(("gpus", "given", "line"), STARTS)
def test_a_launch_that_would_train_something_else_is_refused(gpus: int, given: str, line: str, monkeypatch: Any):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert refusal_message(**dict(pair.split("=") for pair in given.split())).startswith(line)


@pytest.mark.parametrize("missing", ["deepspeed", "transformers", "g++", "ninja"])
def test_deepspeed_names_a_package_or_a_compiler_that_is_missing(missing: str, monkeypatch: Any, tmp_path: Path):
    original_find_spec = launch.importlib.util.find_spec
    monkeypatch.setattr(
        launch.importlib.util, "find_spec", lambda name: None if name == missing else original_find_spec(name)
    )
    for tool in {"g++", "ninja"} - {missing}:
        (tmp_path / tool).touch(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    line = f"DeepSpeed needs the package {missing}: pip install 'ssl_vit[deepspeed]'"
    if missing in ("g++", "ninja"):
        line = f"DeepSpeed on the CPU builds an extension: {missing} is missing, install it"
    assert refusal_message(ACCELERATE_USE_DEEPSPEED="true", PATH=str(tmp_path)) == line


def fake_launcher(content: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, separator: str = " ") -> Path:
    """As if accelerate's launcher had started this process with a launch file."""
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(content))
    argv = f"/bin/python accelerate launch --config_file{separator}{path} tools/pretrain.py".split()
    monkeypatch.setattr(launch, "launcher_argv", lambda: argv)
    return path


@pytest.mark.parametrize(
    ("joint", "key", "cure"),
    [
        (" ", "deepspeed_config zero_stag", "; did you mean zero_stage?"),
        ("=", "fsdp_config fsdp_versio", "; did you mean fsdp_version?"),
        (" ", "fsdp_config cpu_offlod", ""),
    ],
)
def test_a_misspelt_key_of_a_section_is_refused(joint: str, key: str, cure: str, tmp_path: Path, monkeypatch: Any):
    section, name = key.split()
    path = fake_launcher({section: {name: 1}}, tmp_path, monkeypatch, joint)
    line = refusal_message(ACCELERATE_DYNAMO_BACKEND="inductor")  # refused next, else this test would start training
    assert line.startswith(f"{path}: {section} has a key that accelerate does not know: {name}{cure}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_our_launch_files_hold_known_keys(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """None is refused. A top-level key that is unknown accelerate refuses by name; ours would not see it."""
    from accelerate.commands.config.config_args import load_config_from_file

    content = yaml.safe_load(file.read_text())
    fake_launcher(content, tmp_path, monkeypatch)
    assert "dynamo_backend" in refusal_message(ACCELERATE_DYNAMO_BACKEND="inductor")  # that is what is looked at next
    load_config_from_file(str(file))
    path = fake_launcher({**content, "num_procs": 2}, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"unknown keys \(\['num_procs'\]\)"):
        load_config_from_file(str(path))


@pytest.mark.process
def test_a_misspelt_key_is_refused_in_a_real_launch(shards: Path, tmp_path: Path):
    """The launcher's words are found where it is the parent."""
    content = yaml.safe_load((engines.ROOT / "recipes" / "launch" / "zero2.yaml").read_text())
    content["deepspeed_config"]["zero_stag"] = content["deepspeed_config"].pop("zero_stage")
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(content))
    options = ["--config_file", tmp_path / "launch.yaml", "--num_processes", "1", "--main_process_port", free_port()]
    args = ["tools/pretrain.py", *engines.train_args(shards, tmp_path / "run")]
    result = engines.run_process(engines.BIN / "accelerate", "launch", *options, *args)
    assert result.returncode != 0
    line = "deepspeed_config has a key that accelerate does not know: zero_stag; did you mean zero_stage?"
    assert f"{tmp_path}/launch.yaml: {line}\n" in result.stderr


@pytest.fixture(scope="module")
def started(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of starts under each of engines.CONFIGS, in the launch that trains under engines as well."""
    return json.loads((engines.run_shared_jobs(shards, tmp_path_factory) / "configs.json").read_text())


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
REFUSALS |= {name: conflict_message(name) for name in CLAIMS if name in engines.CONFIGS}


@pytest.mark.ranks
@pytest.mark.parametrize("name", REFUSALS)
def test_a_deepspeed_config_that_would_train_something_else_is_refused(started, name: str):
    assert started[name].get("code") == ExitCode.USAGE
    assert REFUSALS[name] in started[name]["message"]
    assert "\n" not in started[name]["message"]


# --- what differs between processes, or is not there, is named with its rank, in one line on all of them

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """By rank how each start ended, all in the same three processes (startup_worker.py)."""
    folder = tmp_path_factory.mktemp("startup")
    for machine in "ab":
        shutil.copytree(shards, folder / machine / "shards")
    (folder / "b" / "shards" / "train" / "000001.tar").unlink()
    (folder / "b" / "shards" / "train" / "000002.tar").write_bytes(b"short")
    shutil.copytree(Path(ssl_vit.__file__).parent, folder / "ssl_vit", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ssl_vit" / "rng.py").write_text("# another version")
    args = [*TINY, f"data.train={shards}/train", f"data.val={shards}/val", "tracker=none"]
    args += ["batch=9", "steps=2", "optim.warmup_steps=1"]
    worker = "../tests/train/startup_worker"
    start = Start([str(folder), *args], folder / "logs", 3, tool=worker, GLOO_SOCKET_IFNAME="lo")
    assert start.wait(200) == [0, 0, 0], start.output()
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(3)]


PROCESSES_SUFFIX = " (processes: 2)"
RANK_1, RANK_0 = f"rank 1 on {HOST}", f"rank 0 on {HOST}"
INSTALL_HINT, SLOW_HINT = "install the same", "the slowest would set the pace; start on machines that are alike"
CODE_DIFF, SHARE_HINT = "ssl_vit/rng.py differs (1 in all)", "name one on a file system that all machines share"
RECIPE_DIFF = "seed: 0 -> 7; optim.lr: 0.001 -> 1.0: give all the same command"
TORCH_DIFF = f"has torch 2.0.0, {RANK_0} has {preflight.version('torch')}"
EXPECTED_ENDS = {
    "batch": (ExitCode.USAGE, "batch=8 cannot be shared by 3 processes; these can: 1, 2, 4, 8"),
    "code": (
        ExitCode.MISMATCH,
        f"{RANK_1} runs other code than {RANK_0}: {CODE_DIFF}: {INSTALL_HINT} version on all "
        f"machines{PROCESSES_SUFFIX}",
    ),
    "library": (ExitCode.MISMATCH, f"{RANK_1} {TORCH_DIFF}: {INSTALL_HINT} on all machines{PROCESSES_SUFFIX}"),
    "gpu": (ExitCode.USAGE, f"{RANK_1} has NVIDIA L4 of 22 GiB, {RANK_0} has no GPU: {SLOW_HINT}{PROCESSES_SUFFIX}"),
    "recipe": (ExitCode.MISMATCH, f"{RANK_1} was given another recipe than rank 0: {RECIPE_DIFF}{PROCESSES_SUFFIX}"),
    "no data": (ExitCode.DATA, "/nowhere: no such folder"),
    "held": (ExitCode.CANNOT_CREATE, "; wait for it, or name another"),
    "folder": (
        ExitCode.CANNOT_CREATE,
        f"{RANK_1} does not see the run folder run of rank 0: {SHARE_HINT}{PROCESSES_SUFFIX}",
    ),
    "shards": (
        ExitCode.DATA,
        f"{RANK_1}: shards/train: 2 of 4 shards are bad: 000001.tar (missing), 000002.tar (5 bytes, not ",
    ),
    "good": (0, ""),
}


@pytest.mark.ranks
@pytest.mark.parametrize("scenario", EXPECTED_ENDS)
def test_all_processes_end_alike(found, scenario: str):
    """With one code and line, which is marked as shared, so that only rank 0 prints it."""
    code, message = EXPECTED_ENDS[scenario]
    for result in (results[scenario] for results in found):
        assert result["code"] == code, result
        assert message in result["message"]
        if scenario == "batch":  # each finds out by itself
            assert result["message"] == message
        else:
            assert result["shared"]


@pytest.mark.parametrize(("rank", "shared", "lines"), [(0, True, 1), (1, True, 0), (0, False, 1), (1, False, 1)])
def test_only_the_first_of_many_says_what_all_share(rank: int, shared: bool, lines: int, monkeypatch: Any, capfd):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(errors, "_install_signal_handlers", lambda: None)
    with pytest.raises(SystemExit) as excinfo:
        errors.run_main(Mock(side_effect=ExitError(ExitCode.DATA, "shards: gone", shared)))
    assert excinfo.value.code == ExitCode.DATA
    assert capfd.readouterr().err.count("shards: gone") == lines


def process_info(**changes: Any) -> dict[str, Any]:
    info = {"host": "a", "recipe": "seed: 0\n", "code": {"model.py": "1", "config.py": "2"}, "gpu": "H100 of 79 GiB"}
    return info | {"libraries": {"torch": "2.14.1", "deepspeed": "missing"}} | changes


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (process_info(code={"model.py": "1", "config.py": "2", "b.py": "3"}), "ssl_vit/b.py differs (1 in all)"),
        (process_info(code={"model.py": "9"}), "ssl_vit/config.py differs (2 in all)"),
        # another version, which may not have told what is compared next
        ({"code": {}, "since": 3}, "runs other code than rank 0 on a: ssl_vit/config.py differs (2 in all)"),
        (process_info(libraries={"torch": "2.14.1", "deepspeed": "0.19.8"}), "has deepspeed 0.19.8, rank 0 on a has"),
        (process_info(recipe="seed: 0\nworld: 3\n"), "world"),
    ],
)
def test_a_difference_is_named_with_its_rank(other: dict[str, Any], line: str):
    assert compare_processes([process_info(), process_info(host="b"), process_info(host="c")]) == [None, None, None]
    first, second = compare_processes([process_info(), other | {"host": "b"}])
    assert first is None
    assert second is not None
    assert (second.code, second.message.split(" on b ")[0]) == (ExitCode.MISMATCH, "rank 1")
    assert line in second.message


def test_the_first_of_many_findings_stands_for_all():
    raise_first([None, None])
    with pytest.raises(ExitError) as excinfo:
        raise_first([None, (ExitCode.DATA, "rank 1: bad"), ExitError(ExitCode.USAGE, "rank 2: worse")])
    assert (excinfo.value.code, excinfo.value.message, excinfo.value.shared) == (
        ExitCode.DATA,
        f"rank 1: bad{PROCESSES_SUFFIX}",
        True,
    )
    with pytest.raises(ExitError, match=r"^rank 2: worse$"):
        raise_first([None, None, ExitError(ExitCode.USAGE, "rank 2: worse")])


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A port of this machine that nobody else gets, where nobody listens until `listen` is called."""
    with socket.socket() as server_socket:
        server_socket.bind(("127.0.0.1", 0))
        yield server_socket


def rendezvous_error(rank: int, port: object, start: Any = lambda: wait_for_rendezvous(0), **extra: str) -> str:
    """What a process of two, started without a launcher of torch's, is refused with, or nothing."""
    environment = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **extra}
    with patch.dict(os.environ, environment):
        for name in {"TORCHELASTIC_USE_AGENT_STORE"} - set(extra) | {
            name for name in environment if not environment[name]
        }:
            os.environ.pop(name, None)
        try:
            start()
        except ExitError as refusal:
            return refusal.message if refusal.code == ExitCode.USAGE else repr(refusal)
    return ""


def test_a_busy_port_ends_a_start_before_anything_is_made(server: socket.socket, shards: Path, tmp_path: Path):
    """Unless a launcher has it, where both ranks find it; a free one is left free."""
    server.listen()
    busy_port = server.getsockname()[1]
    line = rendezvous_error(0, busy_port)
    assert line.startswith(f"rank 0: port {busy_port} of this machine cannot be had (Address already in use")
    assert line.endswith("): set another MASTER_PORT on all machines")
    args = [*TINY, f"data.train={shards}/train", f"run={tmp_path}/run"]
    assert f"port {busy_port}" in rendezvous_error(
        0, busy_port, lambda: pretrain.run(config.parse(recipes.Pretrain, args))
    )
    assert not (tmp_path / "run").exists()
    for rank in (0, 1):
        assert rendezvous_error(rank, busy_port, TORCHELASTIC_USE_AGENT_STORE="True") == ""
    port = free_port()
    assert rendezvous_error(0, port) == ""
    socket.create_server(("", port)).close()


def test_a_master_that_is_not_there_is_named_or_waited_for(server: socket.socket, monkeypatch: pytest.MonkeyPatch):
    port = server.getsockname()[1]
    line = rendezvous_error(1, port)
    assert line.startswith(f"rank 1 on {HOST}: no answer from the master at 127.0.0.1:{port} (")
    assert line.endswith("in 0 s: is rank 0 running there, the address right, the port open?")
    monkeypatch.setattr(preflight.time, "sleep", lambda seconds: server.listen())  # it comes later
    assert rendezvous_error(1, port, lambda: wait_for_rendezvous(60)) == ""


def test_half_an_environment_is_named_and_one_process_meets_nobody():
    assert "MASTER_PORT=auto" in rendezvous_error(1, "auto")  # which is no number
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        line = f"WORLD_SIZE=2 but {name} not set: use accelerate launch, or set them"
        assert rendezvous_error(1, "auto", **{name: ""}) == line
    assert rendezvous_error(0, "", WORLD_SIZE="1") == ""


HELP = """
import io, runpy, sys
from contextlib import redirect_stdout
import torch
torch.cuda.is_available = None
before = set(sys.modules)
for tool in ("pretrain", "finetune", "evaluate"):
    sys.argv = [f"tools/{tool}.py", "--help"]
    with redirect_stdout(io.StringIO()) as said:
        try: runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end: assert not end.code, end.code
    assert sys.argv[0] in said.getvalue()
print(*sorted(set(sys.modules) - before))
import ssl_vit.train.metrics, ssl_vit.train.prepare
"""


def test_help_loads_nothing_heavy_and_imports_ask_no_gpu():
    """What takes long to import, beside torch: --help takes at most 1.5 times as long as `import torch`."""
    result = subprocess.run([sys.executable, "-c", HELP], cwd=engines.ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    loaded = result.stdout.split()
    heavy_modules = (
        "accelerate timm torchvision webdataset tensorboard transformers deepspeed sklearn scipy pandas matplotlib "
    )
    heavy_modules += "fsspec aiohttp onnx onnxruntime datasets huggingface_hub markdown"
    assert "ssl_vit" in loaded
    assert {name.split(".")[0] for name in loaded} & set(heavy_modules.split()) == set()
    heavy_submodules = {
        "torch._dynamo",
        "torch._inductor",
        "torch.onnx",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
    }
    assert heavy_submodules & set(loaded) == set()
