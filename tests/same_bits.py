"""Whether two revisions train to the same bits, on this machine: python -m tests.same_bits REVISION [runs=FOLDER]

The command lines of five short runs (one of two processes) go to the revision, built in a worktree, and to this
checkout. Tensors of the last checkpoint and of the exported encoder are compared as a sorted list of shape, dtype and
sha256 of the bytes, so that a tensor may change its name; rows of metrics through RENAMED. Exit code 1: they differ.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
RENAMED: dict[str, str] = {
    f"{prefix}neighbour_{metric}": f"{prefix}neighbor_{metric}"
    for prefix in ("", "val_")
    for metric in ("loss", "accuracy")
}  # old name of a metric: new name
RENAMED_KEYS: dict[str, str] = {}  # new name of a key: the name that the revision knows
# words in metrics that the clock gives
CLOCK_TERMS = ("second", "wait", "mfu", "eta", "memory", "time", "utilization", "tflops")

TINY = ["encoder.width=48", "encoder.depth=2", "encoder.heads=3", "encoder.mlp=96", "encoder.patch=8", "data.workers=1"]
TINY += ["batch=32", "log_every=5", "save_every=10", "data.train=shards/train", "data.val=shards/val"]
SHORT = ["steps=20", "optim.warmup_steps=4"]
RUNS: dict[str, tuple[int, list[str]]] = {  # folder: processes, command line
    "mean_color": (1, ["pretrain", "recipe=mpp_demo", "eval_every=10", *SHORT]),
    "pixels": (1, ["pretrain", "recipe=mpp_demo", "head.kind=patch_pixels", "micro_batch=16", *SHORT]),
    "clusters": (1, ["pretrain", "recipe=mpp_demo", "head.kind=clusters", "head.codebook=words.safetensors", *SHORT]),
    "classifier": (2, ["pretrain", "recipe=mpp_demo", "head.kind=classifier", "data.crop_area=0.3,1.0", *SHORT]),
    "finetune": (1, ["finetune", "recipe=finetune_demo", "init=runs/mean_color", *SHORT]),
}


def main(arguments: list[str]) -> int:
    revision, *options = arguments
    folder = Path(options[0].removeprefix("runs=") if options else "/tmp/same_bits").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    make_images(folder / "images")
    worktree = folder / "before"
    subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(worktree), revision], cwd=ROOT, check=True)
    num_differing = 0
    try:
        for checkout, key_names in ((worktree, RENAMED_KEYS), (ROOT, {})):
            run_all(checkout, folder / ("old" if key_names is RENAMED_KEYS else "new"), folder / "images", key_names)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(worktree)], cwd=ROOT, check=True)
    for name in RUNS:
        old, new = (folder / side / "runs" / name for side in ("old", "new"))
        for label, before, after in (
            ("tensors of the checkpoint", checkpoint_tensors(old), checkpoint_tensors(new)),
            ("tensors of the encoder", tensor_digests(old / "encoder"), tensor_digests(new / "encoder")),
            ("values in metrics.jsonl", metric_values(old, RENAMED), metric_values(new, {})),
        ):
            assert before, f"{old}: no {label}"
            is_equal = before == after
            num_differing += not is_equal
            print(f"{name:12} {len(before):5} {label:26} {'equal' if is_equal else 'DIFFER'}")
            if not is_equal:
                print(*sorted(map(str, set(before) ^ set(after)))[:10], sep="\n")
    return int(num_differing > 0)


def make_images(folder: Path) -> None:
    """96 noisy squares of three colors in three classes, split/CLASS/NUMBER.png."""
    rng = np.random.default_rng(0)
    for number in range(96):
        pixels = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
        pixels[8:32, 8:40, number % 3] += 150
        path = folder / ("val" if number % 4 == 3 else "train") / f"class{number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def run_all(checkout: Path, folder: Path, images: Path, key_names: dict[str, str]) -> None:
    """Convert, fit clusters and run RUNS under `folder`, with this code; a failure raises CalledProcessError."""
    folder.mkdir(parents=True)
    env = os.environ | {"PYTHONPATH": str(checkout), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}

    def start(processes: int, tool: str, *args: str) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        tool_args = [
            f"{key_names.get(key, key)}={value}" for key, _, value in (argument.partition("=") for argument in args)
        ]
        command = [
            sys.executable,
            *(launcher if processes > 1 else []),
            str(checkout / "tools" / f"{tool}.py"),
            *tool_args,
        ]
        subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)

    start(1, "make_shards", f"input={images}", "output=shards", "shard_samples=16", "workers=1", "quiet=true")
    cluster_args = ["clusters=16", "patch=8", "space=patch", "images=64", "points=500", "data.image_size=32"]
    start(1, "fit_clusters", "data.train=shards/train", "output=words.safetensors", *cluster_args)
    for name, (processes, (tool, recipe, *args)) in RUNS.items():
        start(processes, tool, recipe, f"run=runs/{name}", "quiet=true", *TINY, *args)


def checkpoint_tensors(run: Path) -> list[tuple[str, str, str]]:
    return tensor_digests(sorted((run / "checkpoints").glob("step-*"))[-1])


def tensor_digests(folder: Path) -> list[tuple[str, str, str]]:
    """Sorted (shape, dtype, sha256) of all tensors in the safetensors files of a folder."""
    rows = []
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                data = tensor.contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes()
                rows.append((str(tuple(tensor.shape)), str(tensor.dtype), hashlib.sha256(data).hexdigest()))
    return sorted(rows)


def metric_values(run: Path, renamed: dict[str, str]) -> list[tuple[int, str, float | str]]:
    """(row, name, value) of metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (number, str(renamed.get(name, name)), value if isinstance(value, float | str) else json.dumps(value))
        for number, row in enumerate(rows)
        for name, value in sorted(row.items())
        if not any(term in name for term in CLOCK_TERMS)
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
