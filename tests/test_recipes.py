"""Every recipe file loads, builds, and says at its top what it is."""

from pathlib import Path

import pytest
import torch
import yaml

from ssl_vit import config, recipe
from ssl_vit.bench import Evaluate
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.model import Model, count_parameters
from ssl_vit.recipe import Finetune, Pretrain

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in recipe.FOLDER.glob("*.yaml"))
JUDGING = [name for name in NAMES if name.startswith("evaluate")]


def schema(name: str) -> type[Pretrain] | type[Finetune]:
    return Finetune if name.startswith(("finetune", "vtab")) else Pretrain


@pytest.mark.parametrize("name", [name for name in NAMES if name not in JUDGING])
def test_a_recipe_builds(name):
    made, _, _ = recipe.resolve(config.parse(schema(name), [f"recipe={name}"], recipe.FOLDER))
    with torch.device("meta"):
        encoder = made.encoder.build()
        model = Model(encoder, made.head.build(encoder, 10))
    assert count_parameters(model) > 0
    assert made.run == f"runs/{name}"
    opening = (recipe.FOLDER / f"{name}.yaml").read_text().split("\nsteps")[0]
    assert f"recipe={name}" in opening
    assert "accelerate launch" in opening


@pytest.mark.parametrize("name", JUDGING)
def test_a_recipe_judges(name):
    made = config.parse(Evaluate, [f"recipe={name}"], recipe.FOLDER)
    assert made.methods == ("classifier",)
    assert made.metrics.label_sets or made.metrics.class_map
    assert (made.run, made.data.image_size, made.data.eval_crop) == (f"runs/{name}", 384, 0.8572)
    assert f"tools/evaluate.py recipe={name}" in (recipe.FOLDER / f"{name}.yaml").read_text().split("\nmethods")[0]


def test_the_papers_recipe_is_the_papers():
    made = config.parse(Pretrain, ["recipe=mpp_vit_b16"], recipe.FOLDER)
    assert isinstance(made.head, MeanColor)
    assert (made.batch, made.steps, made.optim.lr, made.optim.warmup_steps) == (4096, 100_000, 2e-4, 10_000)
    assert (made.optim.schedule, made.head.ratio, made.head.mix) == ("cosine", 0.5, (0.8, 0.1, 0.1))
    assert (made.encoder.title, made.data.image_size) == ("ViT-B/16", 224)


@pytest.mark.parametrize("path", [ROOT / "accelerate_config.yaml", *sorted((recipe.FOLDER / "launch").glob("*.yaml"))])
def test_a_launch_file_is_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import ClusterConfig

    content = yaml.safe_load(path.read_text())
    assert path.name in path.read_text().splitlines()[0]
    assert ClusterConfig.from_yaml_file(yaml_file=str(path)).num_machines == content["num_machines"]
