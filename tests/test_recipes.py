"""Every recipe file loads, builds, trains for two steps at reduced size, and says at its top what it is."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssl_vit import config, recipes
from ssl_vit.commands import setup
from ssl_vit.commands.fit_clusters import FitClusters
from ssl_vit.convert.make_shards import MakeShards
from ssl_vit.encoders import timm_encoder
from ssl_vit.estimate import cost
from ssl_vit.evaluate.config import Evaluate
from ssl_vit.heads import clusters
from ssl_vit.heads.classifier import Classifier
from ssl_vit.heads.masked_prediction import Masked
from ssl_vit.model import count_parameters
from ssl_vit.recipes import Finetune, Pretrain
from ssl_vit.train.optim import set_rate
from tests.test_models import TABLE

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in recipes.FOLDER.glob("*.yaml"))
JUDGING = [name for name in NAMES if name.startswith("evaluate")]
TRAINING = [name for name in NAMES if name not in JUDGING]
STUDIES = ("supervised_", "shape_", "positions_", "optimizer_", "datasize_", "axial_", "finetune_bit", "mpp_")
OURS = ("mpp_demo", "mpp_flowers", "mpp_vit_b16")  # their headers tell what they took, or in words of their own
SCHEMAS = {"pretrain": Pretrain, "finetune": Finetune, "fit_clusters": FitClusters, "make_shards": MakeShards}
PAPERS = [name for name in TRAINING if name.startswith(STUDIES) and name not in OURS]
LARGE = re.compile("r101|r152|r200|bit_")  # ResNets, which take long to build; by default the others of their kind
TIERED = [pytest.param(name, marks=pytest.mark.process if LARGE.search(name) else ()) for name in TRAINING]
CLASSES = 3
CENTERS = 8  # of the codebooks here


def schema(name: str) -> type[Pretrain] | type[Finetune]:
    return Finetune if name.startswith(("finetune", "vtab")) else Pretrain


def opening(name: str) -> str:
    """The comment that a recipe opens with, without its signs."""
    lines = (recipes.FOLDER / f"{name}.yaml").read_text().splitlines()
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
    return config.parse(schema(name), [f"recipe={name}", *more], recipes.FOLDER)


def small(name: str) -> list[str]:
    """Overrides that leave a recipe its parts, and take their size."""
    encoder = read(name).encoder
    if encoder.kind in ("vit", "axial"):
        grid = 2 if encoder.patch == 32 else 4
        numbers = {"width": 32, "depth": 2, "heads": 2, "mlp": 32}
        return [f"data.image_size={grid * encoder.patch}", *(f"encoder.{key}={n}" for key, n in numbers.items())]
    if encoder.kind == "bit":
        return ["data.image_size=32", "encoder.widen=1", *(["encoder.depth=50"] if encoder.depth != 50 else [])]
    return ["data.image_size=64"]


def blind(head: Any) -> float | None:
    """The loss of a head that starts at zero, where it does not depend on the images."""
    if isinstance(head, Classifier) and head.loss == "sigmoid":
        return math.log1p(math.exp(-head.bias)) + (CLASSES - 1) * math.log1p(math.exp(head.bias))
    answers = CLASSES
    if isinstance(head, Masked):
        answers = {"mean_color": 512, "patch_colors": 512, "clusters": CENTERS}.get(head.kind)  # type: ignore[attr-defined]
    return math.log(answers) if answers else None


@pytest.mark.parametrize("name", TIERED)
def test_a_recipe_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At full size, on the meta device."""
    built: list[Any] = []
    given = read(name, *codebook(name, tmp_path, []))
    build = type(given.head).build
    monkeypatch.setattr(type(given.head), "build", lambda *what, **more: built.append(build(*what, **more)))
    made, _, _ = recipes.resolve(given)
    (tmp_path / "again.yaml").write_text(config.dump(given))  # a resume compares the two
    assert config.parse(schema(name), ["recipe=again", f"run={given.run}"], tmp_path) == given
    assert count_parameters(built[0]) > 0
    assert all(parameter.is_meta for parameter in built[0].parameters())
    assert made.run == f"runs/{name}"
    assert f"recipe={name}" in opening(name)
    assert "accelerate launch" in opening(name)


@pytest.mark.parametrize("name", TIERED)
def test_a_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two steps, because the first moves nothing below a layer that starts at zero."""
    monkeypatch.setitem(timm_encoder.LAYERS, 50, (1, 1, 1, 1))
    words = [*small(name), "seed=1", "precision=fp32"]
    made, _, _ = recipes.resolve(read(name, *words, *codebook(name, tmp_path, words)))
    model = setup.build(made, CLASSES).train()
    before = {value: value.detach().clone() for value in model.parameters()}
    optimizer = made.optim.build(model)
    set_rate(optimizer.param_groups, made.optim.rate(made.optim.warmup_steps, made.steps))
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, *made.data.image_hw), generator=random, dtype=torch.uint8)
    ones = {"label": torch.tensor([0, 2]), "seed": torch.arange(2), "valid": torch.ones(2, dtype=torch.bool)}
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model({"image": image, **ones}).loss
        loss.backward()
        if made.optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), made.optim.clip)
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    expected = blind(made.head)
    assert losses[0] == pytest.approx(expected, rel=1e-5) if expected else losses[0] > 0
    assert losses[1] != losses[0]
    for part in (model.encoder, model.head):
        assert any((value != before[value]).any() for value in part.parameters())
    # decay by itself moves weights too
    assert sum(float(value.grad.abs().sum()) for value in model.encoder.parameters() if value.grad is not None) > 0


@pytest.mark.parametrize("name", JUDGING)
def test_a_recipe_judges(name: str):
    made = config.parse(Evaluate, [f"recipe={name}"], recipes.FOLDER)
    assert made.methods == ("classifier",)
    assert made.metrics.label_sets or made.metrics.class_map
    assert (made.run, made.data.image_size, made.data.eval_crop) == (f"runs/{name}", 384, 0.8572)
    assert f"tools/evaluate.py recipe={name}" in opening(name)


@pytest.mark.parametrize("name", TRAINING)
def test_the_commands_of_a_recipe_are_taken(name: str):
    """The one at its top, and what it says in backticks to give besides, is known to the tool it is for."""
    text = re.sub(r"\\\n\s*", " ", opening(name))
    commands = re.findall(r"tools/(\w+)\.py ([^\n]+)", re.sub(r"`[^`]+`", "", text))
    assert any(f"recipe={name}" in rest.split() for _, rest in commands)
    quoted = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]
    for tool, rest in [*re.findall(r"tools/(\w+)\.py (.*)", "\n".join(quoted)), *commands]:
        words = [word for word in rest.split() if re.match(r"[\w.]+=.", word)]
        made = config.parse(SCHEMAS[tool], words, recipes.FOLDER)
        if isinstance(made, Finetune) and made.init == f"runs/{name}" and made.encoder.kind == "vit":
            read(name).encoder.model_copy(update={"image": made.data.image_size}).check()  # patches tile its images
    for words in quoted:
        if re.match(r"[\w.]+=\S", words):
            other = read(name, *words.split())
            assert other != read(name)
            if "encoder." in words:
                recipes.resolve(other)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_of_the_paper_says_what_it_costs_and_what_to_expect(name: str):
    text = " ".join(opening(name).split())
    assert "Hardware: not run here." in text
    assert "Expected" in text
    made = read(name)
    if isinstance(made, Finetune):
        return  # of the encoder that init brings
    assert made.data.image_size == made.encoder.image
    title = made.encoder.title
    macs = TABLE[title][1] * 1e9 if title.startswith(("R", "AxialR")) else cost.encoder_macs(made.encoder)
    if isinstance(made.head, Masked):
        answers = {"mean_color": 512, "patch_colors": 16 * 512, "patch_pixels": 768}.get(made.head.kind)  # type: ignore[attr-defined]
        answers = answers or int(re.findall(r"clusters=(\d+)", text)[0])
        macs += sum(made.head.counts(made.encoder.grid)) * made.encoder.numbers[0] * answers
    wanted = cost.exaflops(macs, made.steps * made.batch)
    pattern = r"not run here\. ([\d.]+) exaFLOPs.*?: ([\d.]+) (hours|days) of eight H100 at an assumed 400 TFLOP/s"
    ((exaflops, length, unit),) = re.findall(pattern, text)
    assert float(exaflops) == pytest.approx(wanted, rel=0.006)
    hours = float(length) * {"hours": 1, "days": 24}[unit]
    assert hours == pytest.approx(wanted * 1e18 / (8 * 400e12) / 3600, rel=0.03)


@pytest.mark.parametrize("path", [ROOT / "accelerate_config.yaml", *sorted((recipes.FOLDER / "launch").glob("*.yaml"))])
def test_a_launch_file_is_what_accelerate_reads(path: Path):
    from accelerate.commands.config.config_args import ClusterConfig

    content = yaml.safe_load(path.read_text())
    assert path.name in path.read_text().splitlines()[0]
    assert ClusterConfig.from_yaml_file(yaml_file=str(path)).num_machines == content["num_machines"]
