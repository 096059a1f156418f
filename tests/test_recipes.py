"""Every recipe file loads, builds, trains for two steps at reduced size, and says at its top what it is."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssl_vit import config, recipes
from ssl_vit.commands import fit_clusters, setup
from ssl_vit.convert.make_shards import MakeShards
from ssl_vit.encoders import timm_encoder
from ssl_vit.estimate import cost
from ssl_vit.evaluate.config import Evaluate
from ssl_vit.heads import clusters
from ssl_vit.heads.classifier import Classifier
from ssl_vit.heads.masked_prediction import MaskedPrediction
from ssl_vit.model import count_parameters
from ssl_vit.recipes import Finetune, Pretrain
from ssl_vit.train.optim import set_lr
from tests.test_models import TABLE

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
EVALUATION = [name for name in NAMES if name.startswith("evaluate")]
TRAINING = [name for name in NAMES if name not in EVALUATION]
STUDY_PREFIXES = ("supervised_", "shape_", "positions_", "optimizer_", "datasize_", "axial_", "finetune_bit", "mpp_")
OWN_RECIPES = ("mpp_demo", "mpp_flowers", "mpp_vit_b16")  # their headers tell what they took, or in words of their own
SCHEMAS = {"pretrain": Pretrain, "finetune": Finetune, "fit_clusters": fit_clusters.Config, "make_shards": MakeShards}
PAPER_RECIPES = [name for name in TRAINING if name.startswith(STUDY_PREFIXES) and name not in OWN_RECIPES]
LARGE = re.compile("r101|r152|r200|bit_")  # ResNets, which take long to build; by default the others of their kind
MARKED_RECIPES = [pytest.param(name, marks=pytest.mark.process if LARGE.search(name) else ()) for name in TRAINING]
NUM_CLASSES = 3
NUM_CENTERS = 8  # of the codebooks here


def recipe_schema(name: str) -> type[Pretrain] | type[Finetune]:
    return Finetune if name.startswith(("finetune", "vtab")) else Pretrain


def header_comment(name: str) -> str:
    """The comment that a recipe opens with, without its signs."""
    lines = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()
    num_lines = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:num_lines])


def write_noise_codebook(name: str, folder: Path, args: list[str]) -> list[str]:
    """A codebook of noise in the place of the recipe's: of its space, as its command fits it, for its patches."""
    recipe = read_recipe(name, *args)
    if recipe.head.kind != "clusters":
        return []
    size = 3 if "space=color" in header_comment(name) else 3 * recipe.encoder.patch**2
    centers = torch.rand(NUM_CENTERS, size, generator=torch.Generator().manual_seed(0))
    clusters.write_codebook(folder / "codebook.safetensors", centers, {})
    return [f"head.codebook={folder / 'codebook.safetensors'}"]


def read_recipe(name: str, *overrides: str) -> Any:
    return config.parse(recipe_schema(name), [f"recipe={name}", *overrides])


def small_overrides(name: str) -> list[str]:
    """Overrides that leave a recipe its parts, and take their size."""
    encoder = read_recipe(name).encoder
    if encoder.kind in ("vit", "axial"):
        grid = 2 if encoder.patch == 32 else 4
        sizes = {"width": 32, "depth": 2, "heads": 2, "mlp": 32}
        return [f"data.image_size={grid * encoder.patch}", *(f"encoder.{key}={size}" for key, size in sizes.items())]
    if encoder.kind == "bit":
        return ["data.image_size=32", "encoder.widen=1", *(["encoder.depth=50"] if encoder.depth != 50 else [])]
    return ["data.image_size=64"]


def initial_loss(head: Any) -> float | None:
    """The loss of a head that starts at zero, where it does not depend on the images."""
    if isinstance(head, Classifier) and head.loss == "sigmoid":
        return math.log1p(math.exp(-head.bias)) + (NUM_CLASSES - 1) * math.log1p(math.exp(head.bias))
    num_outputs = NUM_CLASSES
    if isinstance(head, MaskedPrediction):
        num_outputs = {"mean_color": 512, "patch_colors": 512, "clusters": NUM_CENTERS}.get(head.kind)  # type: ignore[attr-defined]
    return math.log(num_outputs) if num_outputs else None


@pytest.mark.parametrize("name", MARKED_RECIPES)
def test_a_recipe_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At full size, on the meta device."""
    models: list[Any] = []
    recipe = read_recipe(name, *write_noise_codebook(name, tmp_path, []))
    build = type(recipe.head).build
    monkeypatch.setattr(type(recipe.head), "build", lambda *args, **kwargs: models.append(build(*args, **kwargs)))
    resolved, _, _ = recipes.resolve_recipe(recipe)
    (tmp_path / "again.yaml").write_text(config.dump(recipe))  # a resume compares the two
    assert config.parse(recipe_schema(name), ["recipe=again", f"run={recipe.run}"], [tmp_path]) == recipe
    assert count_parameters(models[0]) > 0
    assert all(parameter.is_meta for parameter in models[0].parameters())
    assert resolved.run == f"runs/{name}"
    assert f"recipe={name}" in header_comment(name)
    assert "accelerate launch" in header_comment(name)


@pytest.mark.parametrize("name", MARKED_RECIPES)
def test_a_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two steps, because the first moves nothing below a layer that starts at zero."""
    monkeypatch.setitem(timm_encoder.BLOCKS_PER_STAGE, 50, (1, 1, 1, 1))
    args = [*small_overrides(name), "seed=1", "precision=fp32"]
    recipe, _, _ = recipes.resolve_recipe(read_recipe(name, *args, *write_noise_codebook(name, tmp_path, args)))
    model = setup.build_model(recipe, NUM_CLASSES).train()
    initial = {value: value.detach().clone() for value in model.parameters()}
    optimizer = recipe.optim.build(model)
    set_lr(optimizer.param_groups, recipe.optim.lr_at(recipe.optim.warmup_steps, recipe.steps))
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, *recipe.data.image_hw), generator=rng, dtype=torch.uint8)
    targets = {"label": torch.tensor([0, 2]), "seed": torch.arange(2), "valid": torch.ones(2, dtype=torch.bool)}
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model({"image": image, **targets}).loss
        loss.backward()
        if recipe.optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip)
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    expected = initial_loss(recipe.head)
    assert losses[0] == pytest.approx(expected, rel=1e-5) if expected else losses[0] > 0
    assert losses[1] != losses[0]
    for module in (model.encoder, model.head):
        assert any((value != initial[value]).any() for value in module.parameters())
    # decay by itself moves weights too
    assert sum(float(value.grad.abs().sum()) for value in model.encoder.parameters() if value.grad is not None) > 0


@pytest.mark.parametrize("name", EVALUATION)
def test_a_recipe_judges(name: str):
    recipe = config.parse(Evaluate, [f"recipe={name}"])
    assert recipe.methods == ("classifier",)
    assert recipe.metrics.label_sets or recipe.metrics.class_map
    assert (recipe.run, recipe.data.image_size, recipe.data.eval_crop) == (f"runs/{name}", 384, 0.8572)
    assert f"tools/evaluate.py recipe={name}" in header_comment(name)


@pytest.mark.parametrize("name", TRAINING)
def test_the_commands_of_a_recipe_are_taken(name: str):
    """The one at its top, and what it says in backticks to give besides, is known to the tool it is for."""
    text = re.sub(r"\\\n\s*", " ", header_comment(name))
    commands = re.findall(r"tools/(\w+)\.py ([^\n]+)", re.sub(r"`[^`]+`", "", text))
    assert any(f"recipe={name}" in arguments.split() for _, arguments in commands)
    quoted = [" ".join(args.split()) for args in re.findall(r"`([^`]+)`", text)]
    for tool, arguments in [*re.findall(r"tools/(\w+)\.py (.*)", "\n".join(quoted)), *commands]:
        quote = [word for word in arguments.split() if re.match(r"[\w.]+=.", word)]
        recipe = config.parse(SCHEMAS[tool], quote)
        if isinstance(recipe, Finetune) and recipe.init == f"runs/{name}" and recipe.encoder.kind == "vit":
            read_recipe(name).encoder.model_copy(
                update={"image": recipe.data.image_size}
            ).check_config()  # patches tile its images
    for quote in quoted:
        if re.match(r"[\w.]+=\S", quote):
            changed = read_recipe(name, *quote.split())
            assert changed != read_recipe(name)
            if "encoder." in quote:
                recipes.resolve_recipe(changed)


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_a_recipe_of_the_paper_says_what_it_costs_and_what_to_expect(name: str):
    text = " ".join(header_comment(name).split())
    assert "Hardware: not run here." in text
    assert "Expected" in text
    recipe = read_recipe(name)
    if isinstance(recipe, Finetune):
        return  # of the encoder that init brings
    assert recipe.data.image_size == recipe.encoder.image
    title = recipe.encoder.title
    macs = TABLE[title][1] * 1e9 if title.startswith(("R", "AxialR")) else cost.encoder_macs(recipe.encoder)
    if isinstance(recipe.head, MaskedPrediction):
        num_outputs = {"mean_color": 512, "patch_colors": 16 * 512, "patch_pixels": 768}.get(recipe.head.kind)  # type: ignore[attr-defined]
        num_outputs = num_outputs or int(re.findall(r"clusters=(\d+)", text)[0])
        macs += sum(recipe.head.counts(recipe.encoder.grid)) * recipe.encoder.dims[0] * num_outputs
    expected = cost.exaflops(macs, recipe.steps * recipe.batch)
    pattern = r"not run here\. ([\d.]+) exaFLOPs.*?: ([\d.]+) (hours|days) of eight H100 at an assumed 400 TFLOP/s"
    ((exaflops, length, unit),) = re.findall(pattern, text)
    assert float(exaflops) == pytest.approx(expected, rel=0.006)
    hours = float(length) * {"hours": 1, "days": 24}[unit]
    assert hours == pytest.approx(expected * 1e18 / (8 * 400e12) / 3600, rel=0.03)


@pytest.mark.parametrize(
    "path", [ROOT / "accelerate_config.yaml", *sorted((ROOT / "recipes" / "launch").glob("*.yaml"))]
)
def test_a_launch_file_is_what_accelerate_reads(path: Path):
    from accelerate.commands.config.config_args import ClusterConfig

    content = yaml.safe_load(path.read_text())
    assert path.name in path.read_text().splitlines()[0]
    assert ClusterConfig.from_yaml_file(yaml_file=str(path)).num_machines == content["num_machines"]
