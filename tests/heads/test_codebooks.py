"""Codebooks: fitted to shards, kept in a run, refused where they do not fit; and a run whose labels collapse."""

import io
import json
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ssl_vit import config
from ssl_vit.commands import fit_clusters
from ssl_vit.commands import pretrain as command
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.data.manifest import load
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.heads import clusters
from ssl_vit.recipes import Pretrain
from ssl_vit.train import loop
from tests.conftest import TINY
from tests.heads.masked import make_codebook, patches_of, vit
from tests.tiny_runs import metric_rows
from tests.train.test_loop import StopAfter


def pretrain(data: Path, run: Path, *arguments: str) -> None:
    base_args = [
        *TINY,
        f"data.train={data}/train",
        f"run={run}",
        "tracker=none",
        "steps=6",
        "log_every=2",
        "save_every=3",
    ]
    try:
        command.run(config.parse(Pretrain, [*base_args, *arguments]))
    finally:  # the next one is a start of its own
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def expect_refusal(code: int, data: Path, run: Path, *arguments: str, match: str | None = None) -> None:
    with pytest.raises(ExitError, match=match) as error:
        pretrain(data, run, *arguments)
    assert error.value.code == code


def test_a_collapse_is_told_once(tiny_run: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of images on which there is nothing to see; of colors none is told."""
    (log,) = (tiny_run(1).parent / "logs").iterdir()
    assert "the same label" not in log.read_text()
    assert all(row["top_label"] < 0.9 for row in metric_rows(tiny_run(1)))
    (tmp_path / "images" / "all").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "images" / "all" / f"{number:02d}.png")
    options = {"val_fraction": 0.3, "shard_samples": 7, "workers": 1, "quiet": True}
    convert_images(MakeShards(input=str(tmp_path / "images"), output=str(tmp_path / "shards"), **options))
    pretrain(tmp_path / "shards", tmp_path / "run")
    warning_lines = [line for line in capsys.readouterr().out.splitlines() if "the same label" in line]
    assert len(warning_lines) == 1
    assert warning_lines[0].startswith("warning: step 2: 100% of the patches have the same label")
    assert [row["top_label"] for row in metric_rows(tmp_path / "run")] == [1, 1, 1]


# fitted to shards


def fit_codebook(shards: Path, output: Path, *arguments: str) -> str:
    base_args = [f"data.train={shards}/train", f"output={output}", "patch=4", "clusters=5", "data.image_size=16"]
    with redirect_stdout(io.StringIO()) as output_text:
        assert fit_clusters.run(config.parse(fit_clusters.Config, [*base_args, "data.workers=0", *arguments])) == 0
    return output_text.getvalue()


@pytest.mark.parametrize("space", ["color", "patch"])
def test_clusters_are_fitted_to_shards(space, shards: Path, tmp_path: Path):
    """K centers that leave less of the variance than chance would, for a seed the same file; what it tells holds."""
    extra_args = {"a": [], "b": [], "c": ["seed=1"]}
    messages = {
        name: fit_codebook(shards, tmp_path / name, f"space={space}", *args) for name, args in extra_args.items()
    }
    with safe_open(str(tmp_path / "a"), framework="pt") as file:
        centers, metadata = file.get_tensor("centers"), json.loads(file.metadata()["codebook"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not torch.equal(centers, load_file(tmp_path / "c")["centers"])
    assert centers.shape == (5, 3 if space == "color" else 48)
    assert 0 <= float(centers.min()) <= float(centers.max()) <= 1
    assert metadata["data"]
    assert {key: metadata[key] for key in ("space", "patch", "seed")} == {"space": space, "patch": "4", "seed": "0"}
    assert f"5 clusters of {16 * load(shards / 'train').samples:,} {space} vectors" in messages["a"]
    # squares of three colors: some center is near each
    means = centers.unflatten(1, (3, -1)).mean(2)
    for color in ((20, 40, 220), (30, 200, 60), (220, 30, 40)):
        assert (means - torch.tensor(color) / 255).norm(dim=1).min() < 0.1


def test_centers_are_those_of_the_patches_themselves(shards: Path, tmp_path: Path):
    """Each is about the mean of the training patches that are nearest to it, seen as training sees them."""
    fit_codebook(shards, tmp_path / "file", "space=color", "clusters=3", "data.crop_area=1,1")
    centers = clusters.read_codebook(str(tmp_path / "file"), vit().build())
    manifest = load(shards / "train")
    data = Data(train=(str(shards / "train"),), image_size=16, workers=0, crop_area=(1, 1))
    image = SampleDataset(manifest, data, seed=0, training=True).batch([(0, i) for i in range(manifest.samples)])[0][
        "image"
    ]
    points = patches_of(image.contiguous(), 4).mean((3, 4)).reshape(-1, 3) / 255
    nearest = ((points[:, None] - centers.numpy()) ** 2).sum(2).argmin(1)
    for number, center in enumerate(centers):
        np.testing.assert_allclose(points[nearest == number].mean(0), center, atol=0.02)


@pytest.mark.parametrize(
    ("output", "arguments", "code", "message"),
    [
        ("file", ["data.train=none"], ExitCode.USAGE, "data.train: it must be given"),
        ("file", ["patch=5"], ExitCode.USAGE, "patch=5 does not divide data.image_size=16,16"),
        ("file", ["clusters=5000"], ExitCode.DATA, "clusters=5000: "),
        (".", [], ExitCode.CANNOT_CREATE, "output="),
    ],
)
def test_what_cannot_be_fitted_is_one_line(output, arguments, code, message, shards: Path, tmp_path: Path):
    with pytest.raises(ExitError) as error:
        fit_codebook(shards, tmp_path / output, *arguments)
    assert error.value.code == code
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# in a run


def test_a_run_keeps_its_codebook(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is copied into the run, which goes on bit for bit with it and with no other, unless it begins afresh."""
    run, copy = tmp_path / "run", tmp_path / "run" / "codebook.safetensors"
    codebook, other_codebook = make_codebook(tmp_path / "a", "patch"), make_codebook(tmp_path / "b", "patch", seed=3)
    content, args = Path(codebook).read_bytes(), ["head.kind=clusters", f"head.codebook={codebook}"]
    pretrain(shards, tmp_path / "straight", *args)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopSignal", lambda accelerator: StopAfter(4))
        expect_refusal(ExitCode.PREEMPTED, shards, run, *args)
    assert copy.read_bytes() == content
    Path(codebook).write_bytes(Path(other_codebook).read_bytes())  # the same name, other centers
    expect_refusal(ExitCode.MISMATCH, shards, run, *args, match="not the one that the run was begun with")
    expect_refusal(ExitCode.MISMATCH, shards, run, "head.kind=clusters", f"head.codebook={other_codebook}")
    assert copy.read_bytes() == content
    Path(codebook).unlink()  # the copy does in its place
    pretrain(shards, run, "head.kind=clusters", f"head.codebook={copy}")
    losses = [metric_rows(folder)[-1]["loss"] for folder in (tmp_path / "straight", run)]
    assert losses[0] == losses[1]
    assert metric_rows(run)[-1]["uniform"] == math.log(7)
    pretrain(shards, run, "head.kind=clusters", f"head.codebook={other_codebook}", "restart=true")
    assert copy.read_bytes() == Path(other_codebook).read_bytes()


@pytest.mark.parametrize(
    ("make_file", "message"),
    [
        (lambda path: path.write_bytes(b"nonsense"), "cannot be read as a codebook"),
        (lambda path: clusters.write_codebook(path, torch.rand(7, 192), {}), "nor of patches of 4 pixels"),
        (
            lambda path: clusters.write_codebook(path, torch.full((7, 48), float("nan")), {}),
            "nor of patches of 4 pixels",
        ),
        (None, r"head\.codebook: it must be given"),
    ],
)
def test_a_codebook_of_something_else_is_refused(make_file, message, shards: Path, tmp_path: Path):
    args = ["head.kind=clusters"]
    if make_file is not None:
        make_file(tmp_path / "file")
        args.append(f"head.codebook={tmp_path / 'file'}")
    expect_refusal(ExitCode.USAGE, shards, tmp_path / "run", *args, match=message)
