"""Text becomes typed, and what is wrong is said in one line."""

from pathlib import Path
from typing import Literal

import pytest
import yaml

from ssl_vit import config
from ssl_vit.encoders.vit import Vit
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.heads.classifier import Classifier
from ssl_vit.recipes import Finetune, Pretrain


def parse_pretrain(*arguments: str) -> Pretrain:
    return config.parse(Pretrain, list(arguments))


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("steps=1_000", "steps", 1000),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("data.flip=on", "data.flip", True),
        ("data.val=none", "data.val", None),
        ("data.val=on", "data.val", ("on",)),
        ("run=007", "run", "007"),
        ("optim.clip=none", "optim.clip", None),
        ("head.mix=1,0,0", "head.mix", (1.0, 0.0, 0.0)),
        ("data.image_size=64", "data.image_size", 64),
        ("data.image_size=64,96", "data.image_size", (64, 96)),
        ("data.train=a, b/{c,d}.tar", "data.train", ("a", "b/{c,d}.tar")),
    ],
)
def test_a_value_means_the_same_on_the_command_line_and_in_a_file(argument, key, value, tmp_path: Path):
    path, text = argument.split("=", 1)
    tree: dict = {}
    config.set_key(tree, path.split("."), text, Pretrain)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tree).replace(f"'{text}'", text))  # unquoted, as one writes it
    for parsed in (parse_pretrain(argument), parse_pretrain(f"recipe={file}")):
        for name in key.split("."):
            parsed = getattr(parsed, name)
        assert parsed == value
        assert type(parsed) is type(value)


BAD_RECIPES = {
    "a: [": "is not YAML: ",
    "- 1": "is not a set of keys",
    "# empty": "is not a set of keys",
    "x: !!python/object/apply:os.system ['true']": "unknown key x",
    "base: mpp_15": "one level",  # which has a base itself
}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("lr=1", "unknown key lr; did you mean optim.lr?"),
        ("steps=many", "steps: 'many': give a whole number, like 256"),
        ("steps=0", "steps: '0': it should be greater than or equal to 1"),
        ("optim.lr=fast", "optim.lr: 'fast': give a number, like 1e-3"),
        ("data.flip=maybe", "data.flip: 'maybe': give true or false"),
        ("precision=fp64", "precision: 'fp64': it should be 'auto', 'fp32', 'bf16' or 'bf16_residual'"),
        ("head.kind=color", "head.kind: 'color' is not one of 'mean_color', 'patch_colors',"),
        ("head.mix=0.5,0.1,0.1", "head: mix (0.5, 0.1, 0.1) does not add up to 1"),
        ("data=x", "data: 'x': it is a group of keys, give one of them"),
        ("steps", "'steps' is not key=value; try --help"),
        ("head.mix=0.5,0.5", "head.mix: give more values, with commas between them"),
        ("optim.betas=2,3", "optim.betas: '2': it should be less than 1"),
        ("encoder.width=10 encoder.heads=3", "encoder: width 10 is not a multiple of heads"),
        ("recipe=mpp_vit_b61", "; did you mean mpp_vit_b16?"),
        *((f"{key}={number}", key) for key in ("optim.lr", "head.ratio") for number in ("nan", "inf")),
        *BAD_RECIPES.items(),
    ],
)
def test_what_is_wrong_is_said_in_one_line(argument: str, message: str, tmp_path: Path):
    arguments = argument.split()
    if argument in BAD_RECIPES:
        (tmp_path / "bad.yaml").write_text(argument)
        arguments = [f"recipe={tmp_path}/bad.yaml"]
    with pytest.raises(ExitError) as end:
        parse_pretrain(*arguments)
    assert end.value.code == ExitCode.USAGE
    assert message in str(end.value)
    assert "\n" not in str(end.value)


def test_a_kind_that_changes_drops_the_keys_of_the_old_one():
    assert parse_pretrain("recipe=mpp_vit_b16", "head.kind=classifier").head == Classifier()
    assert parse_pretrain("head.hidden=9", "head.kind=classifier").head == Classifier(hidden=9)  # in any order
    assert parse_pretrain("optim.lr=5", "optim.kind=adamw").optim.lr == 5


def test_overrides_win_over_the_recipe_and_the_recipe_over_its_base(tmp_path: Path):
    (tmp_path / "low.yaml").write_text("steps: 5\nbatch: 6\nhead: {kind: mean_color, ratio: 0.3}\n")
    (tmp_path / "high.yaml").write_text("base: low\nbatch: 7\nhead: {kind: classifier}\n")
    recipe = config.parse(Pretrain, ["recipe=high", "steps=8"], [tmp_path])
    assert (recipe.steps, recipe.batch, recipe.head, recipe.run) == (8, 7, Classifier(), "runs/high")


def test_a_dump_reads_back_to_the_same_object(tmp_path: Path):
    for schema, name in [(Pretrain, "mpp_vit_b16"), (Finetune, "finetune_flowers")]:
        recipe = config.parse(schema, [f"recipe={name}", "optim.clip=none", "data.image_size=32,64"])
        (tmp_path / "again.yaml").write_text(config.dump(recipe))
        assert config.parse(schema, ["recipe=again"], [tmp_path]) == recipe


def test_help_names_every_key_with_its_meaning():
    text = config.format_help(Pretrain)
    for name, field in config.keys(Pretrain):
        assert f"{name}  (" in text or name.endswith(".kind")
        assert field.description or name.endswith(".kind"), f"{name} has no description"


# the surface is a promise: adding a key is a decision, and is written down here
KEYS = """
restart allow_recipe_change on_save_error replica_check_every verify_step
on_loss_spike data.timeout
steps batch micro_batch seed log_every save_every eval_every keep precision compile tracker quiet run dry_run init
activation_checkpointing attention profile visualize_every timeout world hardware.tflops hardware.memory_gb
hardware.gpus_per_node
hardware.gpu hardware.mfu hardware.network_gbps hardware.cores hardware.storage_gbs
data.train data.val data.image_size data.crop_area data.flip data.eval_crop data.subset data.workers data.lanes
data.reader data.cache data.cache_gb data.verify data.max_bad_samples
data.shuffle_window encoder.kind encoder.size encoder.patch encoder.image encoder.channels encoder.width encoder.depth
encoder.heads encoder.mlp encoder.positions encoder.pool encoder.dropout encoder.mean encoder.std head.kind
optim.kind optim.lr optim.warmup_steps optim.schedule
optim.weight_decay optim.clip optim.betas optim.momentum
init_min_fraction optim.drops encoder.position_placement encoder.class_token encoder.stem encoder.name encoder.widen
ema_decay best data.holdout data.auto_augment data.crop encoder.drop_path head.keep head.smoothing head.mixup
head.cutmix optim.layer_decay data.empty_classes
"""
SCHEMA_KEYS = {
    Pretrain: """head.ratio head.mix head.bits head.mask_unit head.mask_blockwise
    head.normalize head.codebook head.hidden head.loss head.bias online.train online.val online.samples online.k
    online.shots""",
    Finetune: """sweep.lr sweep.fraction sweep.val seeds tasks tasks_root metrics.label_sets metrics.class_map
    metrics.bootstrap metrics.predictions benchmark.name benchmark.classes benchmark.train benchmark.test benchmark.get
    benchmark.paper""",
}


@pytest.mark.parametrize("schema", [Pretrain, Finetune])
def test_the_keys_are_these(schema):
    assert {name for name, _ in config.keys(schema)} == set((KEYS + SCHEMA_KEYS[schema]).split())


def test_python_values_do_as_well_as_text_and_a_choice_of_numbers_is_made_in_text(tmp_path: Path):
    assert Vit(size="S", patch=8, image=(32, 64)).grid == (4, 8)

    class Deep(config.Config):
        depth: Literal[50, 101] = 50

    assert config.parse(Deep, ["depth=101"]).depth == 101
    with pytest.raises(ExitError, match=r"depth: '51': it should be 50 or 101"):
        config.parse(Deep, ["depth=51"])
