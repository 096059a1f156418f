"""Every recipe file loads, builds, trains for two steps at reduced size, and says at its top what it is."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssl_vit import config, cost, recipe
from ssl_vit.bench import Evaluate
from ssl_vit.codebook import FitClusters
from ssl_vit.heads import clusters
from ssl_vit.heads.classifier import Classifier
from ssl_vit.heads.masked import Masked
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.model import Batch, Model, count_parameters
from ssl_vit.recipe import Finetune, Pretrain
from ssl_vit.train.optim import set_rate

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in recipe.FOLDER.glob("*.yaml"))
JUDGING = [name for name in NAMES if name.startswith("evaluate")]
TRAINING = [name for name in NAMES if name not in JUDGING]
STUDIES = ("supervised_", "shape_", "positions_", "optimizer_", "datasize_", "axial_", "finetune_bit", "mpp_")
OURS = ("mpp_demo", "mpp_flowers", "mpp_vit_b16")  # their headers tell what they took, or in words of their own
SCHEMAS = {"pretrain": Pretrain, "finetune": Finetune, "fit_clusters": FitClusters}
CLASSES = 3
CENTERS = 8  # of the codebooks here


def schema(name: str) -> type[Pretrain] | type[Finetune]:
    return Finetune if name.startswith(("finetune", "vtab")) else Pretrain


def opening(name: str) -> str:
    """The comment that a recipe opens with, without its signs."""
    lines = (recipe.FOLDER / f"{name}.yaml").read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def codebook(name: str, folder: Path, words: list[str]) -> list[str]:
    """A codebook of noise in the place of the recipe's: of its space, as its command fits it, for its patches."""
    made = read(name, *words)
    if made.head.kind != "clusters":
        return []
    size = 3 if "space=color" in opening(name) else 3 * made.encoder.patch**2
    centers = torch.rand(CENTERS, size, generator=torch.Generator().manual_seed(0))
    clusters.write(folder / "codebook.safetensors", centers, {})
    return [f"head.codebook={folder / 'codebook.safetensors'}"]


def read(name: str, *more: str) -> Any:
    return config.parse(schema(name), [f"recipe={name}", *more], recipe.FOLDER)


def small(name: str) -> list[str]:
    """Overrides that leave a recipe its parts, and take their size."""
    encoder = read(name).encoder
    if encoder.kind in ("vit", "axial"):
        grid = 2 if encoder.patch == 32 else 4
        numbers = {"width": 32, "depth": 2, "heads": 2, "mlp": 32}
        return [f"data.image_size={grid * encoder.patch}", *(f"encoder.{key}={n}" for key, n in numbers.items())]
    if encoder.kind == "bit":
        return ["data.image_size=32", "encoder.depth=50", "encoder.widen=1"]
    return ["data.image_size=64"]


def noise(side: tuple[int, int]) -> Batch:
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, *side), generator=random, dtype=torch.uint8)
    label, seed = torch.tensor([0, 1, 2, 1]), torch.arange(4)
    return {"image": image, "label": label, "seed": seed, "valid": torch.ones(4, dtype=torch.bool)}


def blind(head: Any) -> float | None:
    """The loss of a head that starts at zero, where it does not depend on the images."""
    if isinstance(head, Classifier) and head.loss == "sigmoid":
        return math.log1p(math.exp(-head.bias)) + (CLASSES - 1) * math.log1p(math.exp(head.bias))
    if isinstance(head, Masked):
        answers = {"mean_color": 512, "patch_colors": 512, "clusters": CENTERS}.get(head.kind)  # type: ignore[attr-defined]
        return math.log(answers) if answers else None
    return math.log(CLASSES)


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_builds(name: str, tmp_path: Path):
    made, _, _ = recipe.resolve(read(name, *codebook(name, tmp_path, [])))
    with torch.device("meta"):
        encoder = made.encoder.build()
        model = Model(encoder, made.head.build(encoder, 10))
    assert count_parameters(model) > 0
    assert made.run == f"runs/{name}"
    assert f"recipe={name}" in opening(name)
    assert "accelerate launch" in opening(name)


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_trains(name: str, tmp_path: Path):
    """Two steps, because the first moves nothing below a layer that starts at zero."""
    words = [*small(name), "seed=1", "precision=fp32"]
    made, _, _ = recipe.resolve(read(name, *words, *codebook(name, tmp_path, words)))
    model = recipe.build(made, CLASSES).train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = made.optim.build(model)
    set_rate(optimizer.param_groups, made.optim.rate(made.optim.warmup_steps, made.steps))
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(noise(made.data.image_hw)).loss
        loss.backward()
        if made.optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), made.optim.clip)
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    expected = blind(made.head)
    assert losses[0] == pytest.approx(expected, rel=1e-5) if expected else losses[0] > 0
    assert losses[1] != losses[0]
    for part in ("encoder.", "head."):
        moved = [key for key, value in model.named_parameters() if key.startswith(part) and (value != before[key]).any()]
        assert moved, part
    reached = [p.grad for key, p in model.named_parameters() if key.startswith("encoder.") and p.grad is not None]
    assert sum(float(grad.abs().sum()) for grad in reached) > 0  # decay by itself moves weights too


@pytest.mark.parametrize("name", JUDGING)
def test_a_recipe_judges(name: str):
    made = config.parse(Evaluate, [f"recipe={name}"], recipe.FOLDER)
    assert made.methods == ("classifier",)
    assert made.metrics.label_sets or made.metrics.class_map
    assert (made.run, made.data.image_size, made.data.eval_crop) == (f"runs/{name}", 384, 0.8572)
    assert f"tools/evaluate.py recipe={name}" in opening(name)


@pytest.mark.parametrize("name", TRAINING)
def test_the_commands_of_a_recipe_are_taken(name: str):
    """The one at its top, and what it says in backticks to give besides, is known to the tool it is for."""
    text = re.sub(r"\\\n\s*", " ", opening(name))
    commands = re.findall(r"tools/(\w+)\.py ([^\n`]+)", text)
    assert any(f"recipe={name}" in rest.split() for _, rest in commands)
    quoted = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]
    for tool, rest in [*re.findall(r"tools/(\w+)\.py (.*)", "\n".join(quoted)), *commands]:
        words = [word for word in rest.split() if re.match(r"[\w.]+=.", word)]
        config.parse(SCHEMAS[tool], words, recipe.FOLDER)
    for words in quoted:
        if re.match(r"[\w.]+=\S", words):
            recipe.resolve(read(name, *words.split()))


@pytest.mark.parametrize("name", [name for name in TRAINING if name.startswith(STUDIES) and name not in OURS])
def test_a_recipe_of_the_paper_says_what_it_costs_and_what_to_expect(name: str, tmp_path: Path):
    text = " ".join(opening(name).split())
    assert "Hardware: not run here." in text
    assert "Expected" in text
    made = read(name)
    if isinstance(made, Finetune):
        return  # of the encoder that init brings
    made, _, _ = recipe.resolve(read(name, *codebook(name, tmp_path, [])))
    macs = cost.encoder_macs(made.encoder)
    if isinstance(made.head, Masked):
        classes = {"clusters": re.findall(r"clusters=(\d+)", text), "patch_colors": [16 * 512], "patch_pixels": [768]}
        corrupted = sum(made.head.counts(made.encoder.grid))
        macs += corrupted * made.encoder.numbers[0] * int((classes.get(made.head.kind) or [512])[0])
    wanted = cost.exaflops(macs, made.steps * made.batch)
    said = re.search(r"not run here\. ([\d.]+) exaFLOPs.*?: ([\d.]+) (hours|days) of eight H100 at an assumed 400", text)
    assert said is not None
    assert float(said[1]) == pytest.approx(wanted, rel=0.006)
    hours = float(said[2]) * {"hours": 1, "days": 24}[said[3]]
    assert hours == pytest.approx(wanted * 1e18 / (8 * 400e12) / 3600, rel=0.03)


def test_the_papers_recipe_is_the_papers():
    made = config.parse(Pretrain, ["recipe=mpp_vit_b16"], recipe.FOLDER)
    assert isinstance(made.head, MeanColor)
    assert (made.batch, made.steps, made.optim.lr, made.optim.warmup_steps) == (4096, 100_000, 2e-4, 10_000)
    assert (made.optim.schedule, made.head.ratio, made.head.mix) == ("cosine", 0.5, (0.8, 0.1, 0.1))
    assert (made.encoder.title, made.data.image_size) == ("ViT-B/16", 224)


@pytest.mark.parametrize("path", [ROOT / "accelerate_config.yaml", *sorted((recipe.FOLDER / "launch").glob("*.yaml"))])
def test_a_launch_file_is_what_accelerate_reads(path: Path):
    from accelerate.commands.config.config_args import ClusterConfig

    content = yaml.safe_load(path.read_text())
    assert path.name in path.read_text().splitlines()[0]
    assert ClusterConfig.from_yaml_file(yaml_file=str(path)).num_machines == content["num_machines"]
