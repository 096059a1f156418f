"""tools/analyze.py as a user has it: what it writes for every kind of encoder, and what it refuses."""

import csv
import gc
import re
import shutil
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit import config
from ssl_vit.analyze import collect, figures, sections
from ssl_vit.commands import analyze as command
from ssl_vit.data import manifest
from ssl_vit.data.dataset import Data, Samples
from ssl_vit.data.loader import EvaluationStream, Share
from ssl_vit.encoders import export
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.encoders.weights import load_encoder
from ssl_vit.evaluate import attention
from ssl_vit.recipes import FOLDER, Pretrain
from tests import frozen

ALL = {"rollout", "distance", "filters", "positions", "features", "neighbours"}
SMALL: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image": 16}
TABLES = {"attention_distance.csv", "position_similarity.csv", "features.csv", "neighbours.csv"}
FIGURES = ("tiles", "filter_tiles", "similarity_tiles", "scatter", "distance_dots")


class Sketch:
    """Stands for a figure where nobody looks at it: drawing takes most of the time."""

    def savefig(self, buffer: Any, **options: Any) -> None:
        del options
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")


def exported(folder: Path, shape: Any) -> Path:
    """An encoder of any kind."""
    torch.manual_seed(0)
    export.export(shape.build().eval(), folder)
    return folder


def analyze(
    given: Path, out: Path, *words: str, encoder: Path | str = "", data: Path | str = "", drawn: bool = False
) -> dict[str, Any]:
    """The numbers of an analysis in this process; what it wrote is whole, though sketched unless it is `drawn`."""
    named = [f"encoder={encoder or given / 'run'}", f"data={data or given / 'shards' / 'val'}", f"run={out}"]
    asked = [*named, "workers=0", "quiet=true", "batch=3", "images=2", *words]
    parsed = config.parse(sections.Analyze, asked, FOLDER)
    sketched = {} if drawn else dict.fromkeys(FIGURES, lambda *_, **__: Sketch())
    with patch.multiple(figures, **sketched) if sketched else nullcontext():
        assert command.run(parsed) == 0
    return written(out)


def written(out: Path) -> dict[str, Any]:
    """What is in analysis.json, after a look at everything beside it."""
    page, told = (out / "report.html").read_text(), (out / "report.md").read_text()
    for path in (out / "report").iterdir():
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 1, f"{path} shows nothing"
        assert f"report/{path.name}" in told
    assert page.count('src="data:image/png;base64,') == len(list((out / "report").iterdir())) == page.count("<img")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "nan" not in told.lower().split()
    return frozen.results(out, "analysis.json")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def placed(out: Path) -> np.ndarray:
    """Where features lie in two dimensions, by features.csv."""
    return np.array([[float(row["x"]), float(row["y"])] for row in table(out / "features.csv")])


def pictures(out: Path) -> set[str]:
    return {path.stem for path in (out / "report").iterdir()}


def images_of(shards: Path, numbers: list[int]) -> tuple[Tensor, list[str]]:
    """The images of these samples as evaluations crop them, and their classes as the tars have them, in their order."""
    whole, named = manifest.load(shards), []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            texts = [tar.extractfile(member) for member in tar if member.name.endswith(".cls")]
            named += [whole.classes[int(text.read())] for text in texts if text is not None]
    samples = Samples(whole, Data(image_size=frozen.SIDE), seed=0, training=False)
    return torch.stack([samples.sample(number, 0)[0] for number in numbers]), [named[number] for number in numbers]


@torch.no_grad()
def seen(encoder: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens, and maps [layers, B, heads, T, T]."""
    maps: list[Tensor] = []
    with attention.watched(encoder, lambda _, found: maps.append(found)):
        return encoder(image), torch.stack(maps)


@pytest.mark.parametrize("kind", ["class", "no class", "axial"])
def test_numbers_are_those_that_one_computes_oneself(given: Path, tmp_path: Path, kind: str):
    shape = {"no class": Vit(**SMALL, class_token=False, pool="mean"), "axial": Axial(**SMALL)}.get(kind)
    place = given / "run" / "encoder" if shape is None else exported(tmp_path / kind, shape)
    more, drawn = ["images=3", "distance_images=5"], shape is None
    found = analyze(given, tmp_path / "out", *more, encoder=place, drawn=drawn)
    encoder: Any = load_encoder(place)
    assert pictures(tmp_path / "out") >= ALL
    assert sorted(found["samples"]) == list(range(8))
    image, classes = images_of(given / "shards" / "val", found["samples"])
    tokens, maps = seen(encoder, image)
    # attention distance: JSON, CSV and one's own agree
    wanted = attention.mean_distance(maps[:, :5], (4, 4), 4).numpy()
    layers = found["attention_distance"]["layers"]
    assert found["attention_distance"]["images"] == 5
    assert found["attention_distance"]["equal_attention"] == pytest.approx(2.008015 * 4, abs=1e-4)
    np.testing.assert_allclose([layers[number] for number in sorted(layers, key=int)], wanted, rtol=1e-5)
    rows = table(tmp_path / "out" / "attention_distance.csv")
    every = [(i, j) for i in range(1, len(wanted) + 1) for j in (1, 2)]
    assert [(int(row["layer"]), int(row["head"])) for row in rows] == every
    np.testing.assert_allclose([float(row["pixels"]) for row in rows], wanted.ravel(), rtol=1e-5)
    # rollout of those that are drawn
    assert set(found["rollout"]) == ({"class", "mean"} if encoder.prefix else {"mean"})
    for query, value in found["rollout"].items():
        own = attention.rollout(maps[:, :3], encoder.prefix, query).numpy()
        np.testing.assert_allclose(value, own, rtol=1e-4, atol=1e-6)
    # features and neighbours, positions and filters: their functions' own numbers are numpy's in test_embeddings.py
    features = tokens[:, encoder.prefix :].mean(1)
    rows = table(tmp_path / "out" / "features.csv")
    assert [int(row["sample"]) for row in rows] == found["samples"]
    assert [row["class"] for row in rows] == classes
    mine, _ = collect.two_dimensions(features)
    theirs = placed(tmp_path / "out")
    signs = np.sign((theirs * mine.numpy()).sum(0))
    np.testing.assert_allclose(theirs * signs, mine.numpy(), atol=1e-3 * float(mine[:, 1].abs().max()))
    nearest = collect.nearest(features, torch.arange(8), 7)
    rows = table(tmp_path / "out" / "neighbours.csv")
    assert [int(row["sample"]) for row in rows] == found["samples"][: len(rows)]
    for row, near in zip(rows, nearest.tolist(), strict=False):
        assert [int(row[f"nearest{j}"]) for j in range(1, 8)] == [found["samples"][j] for j in near]
    same = np.mean([classes[i] == classes[j] for i, j in enumerate(nearest[:, 0].tolist())])
    assert found["nearest_of_same_class"] == pytest.approx(same)
    said = np.loadtxt(tmp_path / "out" / "position_similarity.csv", delimiter=",")
    alike = collect.similarity(encoder.pos_embed.detach()[0, encoder.prefix :])
    np.testing.assert_allclose(said, alike.numpy(), atol=1e-5)
    _, values = collect.principal_components(encoder.patch_embed.proj.weight.detach())
    np.testing.assert_allclose(found["filters"]["variance"], values / values.sum(), rtol=1e-4, atol=1e-12)


def test_a_pretraining_shows_its_reconstructions(given: Path, tiny_run: Any, tmp_path: Path):
    pretrained = tiny_run(1)
    before = frozen.stamps(pretrained)
    words = [f"encoder={pretrained}", f"data={given}/shards", f"run={tmp_path}/out", "workers=0", "images=2"]
    said = frozen.run_tool("analyze", words, tmp_path)
    assert f"{tmp_path}/out" in said
    assert "not drawn" not in said
    found = written(tmp_path / "out")
    assert {"reconstruction"} | ALL <= pictures(tmp_path / "out")
    assert found["not_drawn"] == []
    assert len(found["samples"]) == 8, "of splits it takes val"
    drawn = np.asarray(Image.open(tmp_path / "out" / "report" / "reconstruction.png"))
    np.testing.assert_array_equal(drawn, panel_of(pretrained, given / "shards" / "val", found["samples"][:2]))
    assert {path.name for path in (tmp_path / "out").glob("*.csv")} == TABLES
    assert frozen.stamps(pretrained) == before


@torch.no_grad()
def panel_of(run: Path, shards: Path, numbers: list[int]) -> np.ndarray:
    """The picture that the last checkpoint's head makes of the samples, every tensor of it found there."""
    encoder: Any = load_encoder(run)
    head: Any = config.parse(Pretrain, [f"recipe={run}/recipe.yaml"], FOLDER).head.build(encoder, 1)
    kept = load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    head.load_state_dict({name.removeprefix("head."): kept[name] for name in kept if name.startswith("head.")})
    data = Data(image_size=frozen.SIDE, workers=0)
    stream = EvaluationStream(manifest.load(shards), data, 2, np.array(numbers))
    batch = next(iter(stream.batches(Share(micro_batch=2), torch.device("cpu"))))
    return head.eval().panel(encoder, batch).permute(1, 2, 0).numpy()


def test_layers_heads_query_readout_and_projection(given: Path, tmp_path: Path):
    pytest.importorskip("sklearn")
    asked = ["layers=1,2", "heads=2", "query=class", "readout=class", "projection=tsne", "images=8"]
    found = analyze(given, tmp_path, *asked)
    assert {"attention-1", "attention-2"} <= pictures(tmp_path)
    assert len(table(tmp_path / "attention_distance.csv")) == 4  # of all, whatever is drawn
    image, _ = images_of(given / "shards" / "val", found["samples"])
    tokens, _ = seen(load_encoder(given / "run"), image)
    nearest = collect.nearest(tokens[:, 0], torch.arange(8), 1)[:, 0].tolist()
    rows = table(tmp_path / "neighbours.csv")
    assert [int(row["nearest1"]) for row in rows] == [found["samples"][i] for i in nearest][: len(rows)]
    again = analyze(given, tmp_path / "again", "projection=tsne", "readout=class", drawn=True)
    assert again["samples"] == found["samples"]
    np.testing.assert_allclose(placed(tmp_path / "again"), placed(tmp_path), rtol=1e-5)
    assert not (tmp_path / "again" / "report" / "attention-1.png").exists()


@pytest.mark.parametrize("query", ["class", "mean"])
def test_the_maps_that_are_drawn(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str):
    """Layers, heads, and who asks: as the hooks give them."""
    drawn = {}

    def noted(rows: Any, titles: Any, *_: Any, **__: Any) -> Sketch:
        if "head" in titles[1]:
            drawn[len(drawn) + 1] = ([row[1:] for row in rows], titles[1:])
        return Sketch()

    monkeypatch.setattr(figures, "tiles", noted)
    found = analyze(given, tmp_path, "layers=2,1", "heads=2,1", f"query={query}", drawn=True)
    image, _ = images_of(given / "shards" / "val", found["samples"][:2])
    _, maps = seen(load_encoder(given / "run"), image)
    asked = maps[:, :, :, 0, 1:] if query == "class" else maps[:, :, :, 1:, 1:].mean(3)
    assert set(drawn) == {1, 2}
    for layer, (rows, titles) in drawn.items():
        assert titles == ["head 2", "head 1"]
        wanted = asked[layer - 1][:, [1, 0]].unflatten(2, (4, 4)).numpy()
        np.testing.assert_allclose(np.array(rows), wanted, rtol=1e-4, atol=1e-6)


def test_the_choice_of_images_is_everybodys_and_grows(given: Path, tmp_path: Path):
    whole = analyze(given, tmp_path / "a")["samples"]
    other = frozen.encoder(tmp_path / "other", depth=1, class_token=False, pool="mean")
    assert analyze(given, tmp_path / "b", "samples=5", encoder=other)["samples"] == whole[:5]
    assert analyze(given, tmp_path / "c", "seed=1")["samples"] != whole


def test_images_without_classes(given: Path, tmp_path: Path):
    frozen.draw(tmp_path / "images", [f"{i}.png" for i in range(5)])
    found = analyze(given, tmp_path / "out", data=tmp_path / "images", drawn=True)
    assert pictures(tmp_path / "out") >= ALL
    assert [row["class"] for row in table(tmp_path / "out" / "features.csv")] == [""] * 5
    assert found.get("nearest_of_same_class") is None
    assert "of the same class" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("asked", [False, True])
def test_any_height_and_width(given: Path, tmp_path: Path, asked: bool):
    encoder = given / "run" if asked else frozen.encoder(tmp_path / "wide", image=(8, 20))
    found = analyze(given, tmp_path, *["image_size=8,20"][:asked], encoder=encoder, drawn=not asked)
    assert np.array(found["rollout"]["mean"]).shape == (2, 10)
    assert np.loadtxt(tmp_path / "position_similarity.csv", delimiter=",").shape == (10, 10)
    ways = [np.hypot(a // 5 - b // 5, a % 5 - b % 5) * 4 for a in range(10) for b in range(10)]
    assert found["attention_distance"]["equal_attention"] == pytest.approx(np.mean(ways), abs=1e-4)
    assert "| 8 x 20 |" in (tmp_path / "report.md").read_text()
    assert pictures(tmp_path) >= ALL


def test_a_damaged_image_is_left_out(given: Path, tmp_path: Path):
    frozen.damaged(given / "shards", tmp_path / "shards")
    found = analyze(given, tmp_path / "out", "images=8", data=tmp_path / "shards")
    assert sorted(found["samples"]) == [0, 2, 3, 4, 5, 6, 7]
    assert len(table(tmp_path / "out" / "features.csv")) == len(found["rollout"]["mean"]) == 7
    whole = analyze(given, tmp_path / "whole", "images=8")
    others = [whole["rollout"]["mean"][whole["samples"].index(sample)] for sample in found["samples"]]
    np.testing.assert_allclose(found["rollout"]["mean"], others, rtol=1e-4)  # not shifted by it
    assert found["attention_distance"]["images"] == 7


KINDS: dict[str, tuple[Any, set[str]]] = {  # what is not drawn of each, beside reconstructions
    "hybrid": (Vit(size="Ti", width=16, depth=2, heads=2, patch=16, image=32, stem="r50"), set()),
    "timm": (TimmZoo(name="vit_tiny_patch16_224", image=(32, 48)), set()),
    "swin": (TimmZoo(name="swin_tiny_patch4_window7_224", image=64), {"rollout", "positions"}),
    "bit": (Bit(image=32), {"rollout", "distance", "positions"}),
    "resnet": (TimmZoo(name="resnet18", image=32), {"rollout", "distance", "positions"}),
    "relative": (Vit(**SMALL, positions="relative"), {"positions"}),
}


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.process)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gets_what_applies_and_a_line_on_what_does_not(given: Path, tmp_path: Path, kind: str, drawn: bool):
    """And nothing stale stays of an earlier look at another encoder."""
    shape, missing = KINDS[kind]
    out, place = tmp_path / "out", exported(tmp_path / kind, shape)
    analyze(given, out, "layers=1")
    assert "attention-1" in pictures(out)
    found = analyze(given, out, "images=2", "samples=4", encoder=place, drawn=drawn)
    assert pictures(out) & ALL == ALL - missing
    assert "attention-1" not in pictures(out)
    told = (out / "report.md").read_text()
    for name, words in {"rollout": "rollout", "distance": "mean attention distance", "positions": "position"}.items():
        lines = [line for line in found["not_drawn"] if words in line.lower()]
        assert bool(lines) == (name in missing), found["not_drawn"]
        assert all(line in told for line in lines)
    partly = [line for line in found["not_drawn"] if "attention distance of 10 layers" in line]
    assert bool(partly) == (kind == "swin")  # whose last stage has one window, which is all
    assert ("rollout" in found) == ("rollout" not in missing)
    assert ("attention_distance" in found) == ("distance" not in missing)
    for name, file in {"positions": "position_similarity.csv", "distance": "attention_distance.csv"}.items():
        assert (out / file).exists() == (name not in missing)
    assert len(table(out / "features.csv")) == 4
    if kind == "timm":
        layers = found["attention_distance"]["layers"]
        assert {name: len(heads) for name, heads in layers.items()} == {str(i): 3 for i in range(1, 13)}
        assert np.array(found["rollout"]["class"]).shape == (2, 6)
    shutil.rmtree(place)  # timm's are large


def test_what_cannot_be_looked_into_is_refused_in_one_line(given: Path, tiny_run: Any, tmp_path: Path):
    """And nothing is written, least of all over a training or another tool's report."""
    tokenless = frozen.encoder(tmp_path / "tokenless", class_token=False, pool="mean")
    few = frozen.shards(tmp_path / "few", ["0.png", "1.png"])
    reported, out = tmp_path / "reported", tmp_path / "out"
    reported.mkdir()
    (reported / "report.html").write_text("an evaluation")
    before = frozen.stamps(tiny_run(1)), frozen.stamps(reported)
    keys: dict[str, Any] = {"encoder": given / "run", "data": given / "shards" / "val", "run": out, "workers": 0}
    for code, named, changed in [
        (64, "encoder", {"encoder": None}),
        (64, "data", {"data": None}),
        (65, "/nowhere", {"encoder": "/nowhere"}),
        (65, "/nowhere", {"data": "/nowhere"}),
        (65, "images", {"data": few}),
        (64, "layers", {"layers": 3}),
        (64, "heads", {"heads": "0"}),
        (64, "layers", {"layer": 1}),
        (64, "18", {"image_size": 18}),
        (64, "samples", {"samples": 2}),
        (64, "class token", {"encoder": tokenless, "readout": "class"}),
        (64, "class token", {"encoder": tokenless, "query": "class"}),
        (64, "run=", {"run": reported}),
        (64, "run", {"encoder": tiny_run(1), "run": tiny_run(1)}),
    ]:
        words = [f"{key}={value}" for key, value in (keys | changed).items() if value is not None]
        said = frozen.run_tool("analyze", words, tmp_path, codes=(code,))
        assert len([line for line in said.splitlines() if line.strip()]) == 1, said
        assert named in said
        assert not out.exists() or not any(out.iterdir())
    assert (frozen.stamps(tiny_run(1)), frozen.stamps(reported)) == before


def test_what_is_held_does_not_grow_with_images_times_tokens(given: Path, tmp_path: Path, monkeypatch):
    """At each pass over a batch the bytes of all living new tensors are counted, 20 images against 200."""
    frozen.shards(tmp_path, [f"{i:03d}.png" for i in range(200)])
    real, counts = VitEncoder.forward, []

    def counted(self: Any, image: Tensor, *more: Any, **named: Any) -> Tensor:
        alive = [one.untyped_storage() for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter)]
        counts.append(sum({one.data_ptr(): one.nbytes() for one in alive}.values()))
        return real(self, image, *more, **named)

    class Seen(Exception):
        pass

    def seen_all(*_: Any) -> None:
        raise Seen

    monkeypatch.setattr(VitEncoder, "forward", counted)
    monkeypatch.setattr(command, "Portrait", seen_all)  # what is drawn does not matter here
    for readout in ("mean", "class"):
        grown = {}
        for samples in (20, 200):
            gc.collect()
            gc.freeze()  # what is there already is not looked through again
            counts.clear()
            words = [f"samples={samples}", "batch=20", "images=4", f"distance_images={samples}", "layers=1,2"]
            with pytest.raises(Seen):
                analyze(given, tmp_path / "out", *words, f"readout={readout}", data=tmp_path / "shards")
            gc.unfreeze()
            grown[samples] = counts[-1] - counts[0]
        maps = 17 * 17 * 2 * 2 * 4  # bytes of an image's maps, here
        assert max(grown.values()) < 200 * maps / 4, grown
        each = 16 * 4 + 8 + 8 + 4 * 8 + 200  # features, label, number, distances
        assert grown[200] - grown[20] < 180 * each, grown


def test_neighbours_among_many_images_take_little_memory():
    """All with all would be a matrix of images squared."""
    most = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            made = func(*args, **(kwargs or {}))
            parts = made if isinstance(made, tuple) else (made,)
            most = max([most, *(one.numel() for one in parts if isinstance(one, Tensor))])
            return made

    features = torch.randn(6000, 2, generator=torch.Generator().manual_seed(0))
    with Largest():
        found = collect.nearest(features, torch.arange(6000), 1)
    assert most < 6000 * 6000 / 4
    for one in (0, 1023, 1024, 5999):
        alike = torch.nn.functional.cosine_similarity(features[one : one + 1], features)
        alike[one] = -2
        assert float(alike[found[one, 0]]) == pytest.approx(float(alike.max()), abs=1e-6)
