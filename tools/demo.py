"""The main job on pictures that this file makes: folder -> shards -> pretraining -> fine-tuning, and one table.

Handwritten digits in random colors lie on crops of two photographs; both ship with scikit-learn. Everything is
written under runs/demo, and the commands are the ones a user would type.
"""

import colorsys
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RUNS = Path("runs/demo")
SIDE = 32  # of a picture, pixels
DIGIT = 28


def main(arguments: list[str]) -> int:
    """Arguments are key=value overrides for both trainings, such as steps=20."""
    start = time.monotonic()
    images = RUNS / "images"
    if not images.exists():
        make_images(images)
    data = [f"data.train={RUNS}/shards/train", f"data.val={RUNS}/shards/val"]
    run_tool("make_shards", f"input={images}", f"output={RUNS}/shards", "val_fraction=0.2", "shard_samples=256")
    launch_tool("pretrain", "recipe=mpp_demo", f"run={RUNS}/pretrain", *data, *arguments)
    for name, init in {"finetune": f"{RUNS}/pretrain", "scratch": "none"}.items():
        launch_tool("finetune", "recipe=finetune_demo", f"run={RUNS}/{name}", f"init={init}", *data, *arguments)
    print(results_table())
    picture = RUNS / "pretrain" / "reconstruction.png"
    print(f"\npicture (input, corrupted, predicted and true colors, error): {picture}")
    run_tool("analyze", f"encoder={RUNS}/pretrain", f"data={RUNS}/shards", f"run={RUNS}/inside", "quiet=true")
    print(f"what the encoder has learned, in pictures: {RUNS / 'inside' / 'report.html'}")
    print(f"the whole demo took {time.monotonic() - start:.0f} s")
    return 0


def make_images(folder: Path) -> None:
    """Write the class folder: `folder`/DIGIT/NNNN.png, 32 x 32, complete or not there at all."""
    from sklearn.datasets import load_digits, load_sample_images

    draft = folder.with_name("images.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    digits: Any = load_digits()
    photographs: Any = load_sample_images().images  # type: ignore[attr-defined]
    random = np.random.default_rng(0)
    for number, (shape, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        photograph = photographs[random.integers(len(photographs))]
        top, left = (random.integers(0, size - SIDE) for size in photograph.shape[:2])
        crop = photograph[top : top + SIDE, left : left + SIDE] // 2  # dim, so that any ink can be seen on it
        color = 255 * np.array(colorsys.hsv_to_rgb(random.random(), random.uniform(0.3, 1), 1))
        picture = Image.fromarray(crop)
        stroke = Image.fromarray((shape * 255 / 16).astype(np.uint8)).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
        x, y = (int(c) for c in random.integers(0, SIDE - DIGIT + 1, 2))
        picture.paste(Image.new("RGB", stroke.size, tuple(map(int, color))), (x, y), stroke)
        path = draft / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    draft.rename(folder)


def results_table() -> str:
    """What came out: accuracy from the pretrained encoder and from scratch, and the loss beside its baselines."""
    results, speed = {}, {}
    for name in ("pretrain", "finetune", "scratch"):
        results[name] = json.loads((RUNS / name / "results.json").read_text())
        rows = [json.loads(line) for line in (RUNS / name / "metrics.jsonl").read_text().splitlines()]
        speed[name] = np.median([row["images_per_second"] for row in rows])
    pretrain, line = results["pretrain"], "{:<16}{:>12}{:>20}{:>20}{:>9}{:>10}".format
    numbers = [f"{pretrain[key]:.3f}" for key in ("loss", "neighbor_loss", "unigram_entropy", "uniform")]
    lines = [
        line("pretraining", "masked loss", "copying neighbors", "by label frequency", "uniform", "images/s"),
        line("", *numbers, f"{speed['pretrain']:.0f}"),
        line("fine-tuning", "top-1", "top-5", "", "samples", "images/s"),
    ]
    for name, label in {"finetune": "  pretrained", "scratch": "  from scratch"}.items():
        row = results[name]
        lines.append(line(label, f"{row['top1']:.1%}", f"{row['top5']:.1%}", "", row["samples"], f"{speed[name]:.0f}"))
    return "\n" + "\n".join(lines)


def run_tool(tool: str, *arguments: str) -> None:
    """Run a tool in this interpreter's environment; its failure is ours."""
    run_command([sys.executable, f"tools/{tool}.py", *arguments])


def launch_tool(tool: str, *arguments: str) -> None:
    """Run a training tool by `accelerate launch`, as the README does."""
    accelerate = Path(sys.executable).with_name("accelerate")
    threads = ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))]
    config = ["--config_file", "recipes/launch/cpu.yaml", *threads]
    run_command([str(accelerate), "launch", *config, f"tools/{tool}.py", *arguments])


def run_command(parts: list[str]) -> None:
    print("\n$ " + " ".join([Path(parts[0]).name, *parts[1:]]), flush=True)
    code = subprocess.run(parts).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
