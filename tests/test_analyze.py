"""tools/analyze.py as a user has it: what it writes for every kind of encoder, and what it refuses."""

import csv
import gc
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit import analysis, config, load_encoder
from ssl_vit.data import manifest
from ssl_vit.data.samples import Data, Samples
from ssl_vit.data.stream import EvaluationStream, Share
from ssl_vit.encoders import export
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.timm_zoo import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.evaluate import attention, drawings, embeddings
from ssl_vit.recipe import FOLDER, Pretrain
from tests import frozen
from tests.conftest import TINY

ALL = {"rollout", "distance", "filters", "positions", "features", "neighbours"}
TABLES = {"attention_distance.csv", "position_similarity.csv", "features.csv", "neighbours.csv"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """shards/train and shards/val of three classes, and run/encoder; encoders of other kinds come beside it."""
    folder = tmp_path_factory.mktemp("analyze")
    frozen.shards(folder, frozen.files({"a": 5, "b": 4, "c": 6}, {"a": 3, "b": 3, "c": 2}), shard_samples=4)
    frozen.encoder(folder / "run")
    yield folder
    shutil.rmtree(folder)  # timm's are large


@pytest.fixture(scope="module")
def pretrained(given: Path) -> Path:
    """A run of a few steps."""
    data = [f"data.train={given}/shards/train", f"data.val={given}/shards/val", f"run={given}/pretrained"]
    frozen.run_tool("pretrain", [*TINY, *data, "steps=3", "log_every=1", "save_every=3", "tracker=none"], given)
    return given / "pretrained"


def exported(given: Path, name: str, shape: Any) -> Path:
    """An encoder of any kind, in a folder."""
    if not (given / name).exists():
        torch.manual_seed(0)
        export.export(shape.build().eval(), given / name)
    return given / name


def analyze(given: Path, out: Path, *words: str, encoder: Path | str = "", data: Path | str = "") -> dict[str, Any]:
    """The numbers of an analysis in this process; what it wrote is whole."""
    named = [f"encoder={encoder or given / 'run'}", f"data={data or given / 'shards' / 'val'}", f"run={out}"]
    few = [] if any(word.startswith("images=") for word in words) else ["images=2"]  # drawing takes most of the time
    parsed = config.parse(analysis.Analyze, [*named, "workers=0", "quiet=true", "batch=3", *few, *words], FOLDER)
    assert analysis.run(parsed) == 0
    return written(out)


def written(out: Path) -> dict[str, Any]:
    """What is in analysis.json, strict, after a look at everything beside it."""

    def strange(word: str) -> None:
        raise ValueError(f"{word} in analysis.json")

    page, told = (out / "report.html").read_text(), (out / "report.md").read_text()
    for path in (out / "report").iterdir():
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 1, f"{path} shows nothing"
        assert f"report/{path.name}" in told
    assert page.count('src="data:image/png;base64,') == len(list((out / "report").iterdir())) == page.count("<img")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "nan" not in told.lower().split()
    return json.loads((out / "analysis.json").read_text(), parse_constant=strange)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
    numbers: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image": 16}
    shape = {"no class": Vit(**numbers, class_token=False, pool="mean"), "axial": Axial(**numbers)}.get(kind)
    place = given / "run" / "encoder" if shape is None else exported(given, kind, shape)
    found = analyze(given, tmp_path / "out", "images=3", "distance_images=5", encoder=place)
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
    assert [(int(row["layer"]), int(row["head"])) for row in rows] == [
        (i + 1, j + 1) for i in range(len(wanted)) for j in range(2)
    ]
    np.testing.assert_allclose([float(row["pixels"]) for row in rows], wanted.ravel(), rtol=1e-5)
    # rollout of those that are drawn
    assert set(found["rollout"]) == ({"class", "mean"} if encoder.prefix else {"mean"})
    for query, value in found["rollout"].items():
        np.testing.assert_allclose(
            value, attention.rollout(maps[:, :3], encoder.prefix, query).numpy(), rtol=1e-4, atol=1e-6
        )
    # features and neighbours
    features = tokens[:, encoder.prefix :].mean(1).double().numpy()
    rows = table(tmp_path / "out" / "features.csv")
    assert [int(row["sample"]) for row in rows] == found["samples"]
    assert [row["class"] for row in rows] == classes
    centred = features - features.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    for axis, name in enumerate("xy"):
        mine, theirs = centred @ directions[axis], np.array([float(row[name]) for row in rows])
        np.testing.assert_allclose(theirs * np.sign(theirs @ mine), mine, atol=1e-3 * np.abs(mine).max())
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    alike = unit @ unit.T - 10 * np.eye(8)
    rows = table(tmp_path / "out" / "neighbours.csv")
    assert [int(row["sample"]) for row in rows] == found["samples"][: len(rows)]
    for i, row in enumerate(rows):
        order = [int(row[f"nearest{j}"]) for j in range(1, 8)]
        assert order == [found["samples"][j] for j in np.argsort(-alike[i])[:7]]
    same = np.mean([classes[i] == classes[j] for i, j in enumerate(alike.argmax(1))])
    assert found["nearest_of_same_class"] == pytest.approx(same)
    # positions and filters
    said = np.loadtxt(tmp_path / "out" / "position_similarity.csv", delimiter=",")
    assert isinstance(encoder.pos_embed, Tensor)
    positions = encoder.pos_embed.detach()[0, encoder.prefix :].numpy()
    unit = positions / np.linalg.norm(positions, axis=1, keepdims=True)
    np.testing.assert_allclose(said, unit @ unit.T, atol=1e-5)
    filters = encoder.patch_embed.proj.weight.detach().flatten(1).double().numpy()
    values = np.linalg.eigvalsh(np.cov(filters.T, bias=True))[::-1]
    shares = np.array(found["filters"]["variance"])
    assert (np.diff(shares) <= 0).all()
    ratio = shares / values[: len(shares)]
    np.testing.assert_allclose(ratio[:10], ratio[0], rtol=1e-4)


def test_a_pretraining_shows_its_reconstructions(given: Path, pretrained: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")}
    said = frozen.run_tool(
        "analyze",
        [f"encoder={pretrained}", f"data={given}/shards", f"run={tmp_path}/out", "workers=0", "images=2"],
        tmp_path,
    )
    assert f"{tmp_path}/out" in said
    assert "not drawn" not in said
    found = written(tmp_path / "out")
    assert {"reconstruction"} | ALL <= pictures(tmp_path / "out")
    assert found["not_drawn"] == []
    assert len(found["samples"]) == 8, "of splits it takes val"
    drawn = np.asarray(Image.open(tmp_path / "out" / "report" / "reconstruction.png"))
    np.testing.assert_array_equal(drawn, panel_of(pretrained, given / "shards" / "val", found["samples"][:2]))
    assert {path.name for path in (tmp_path / "out").glob("*.csv")} == TABLES
    assert {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")} == before


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
    found = analyze(
        given, tmp_path, "layers=1,2", "heads=2", "query=class", "readout=class", "projection=tsne", "images=8"
    )
    assert {"attention-1", "attention-2"} <= pictures(tmp_path)
    assert len(table(tmp_path / "attention_distance.csv")) == 4  # of all, whatever is drawn
    image, _ = images_of(given / "shards" / "val", found["samples"])
    tokens, _ = seen(load_encoder(given / "run"), image)
    features = tokens[:, 0].double().numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = (unit @ unit.T - 10 * np.eye(8)).argmax(1)
    rows = table(tmp_path / "neighbours.csv")
    assert [int(row["nearest1"]) for row in rows] == [found["samples"][i] for i in nearest][: len(rows)]
    places = np.array([[float(row["x"]), float(row["y"])] for row in table(tmp_path / "features.csv")])
    again = analyze(given, tmp_path / "again", "projection=tsne", "readout=class")
    assert again["samples"] == found["samples"]
    repeated = [[float(row["x"]), float(row["y"])] for row in table(tmp_path / "again" / "features.csv")]
    np.testing.assert_allclose(repeated, places, rtol=1e-5)
    assert not (tmp_path / "again" / "report" / "attention-1.png").exists()


@pytest.mark.parametrize("query", ["class", "mean"])
def test_the_maps_that_are_drawn(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str):
    """Layers, heads, and who asks: as the hooks give them."""
    drawn, real = {}, drawings.tiles

    def noted(rows: Any, titles: Any, *more: Any, **options: Any) -> Any:
        if "head" in titles[1]:
            drawn[len(drawn) + 1] = ([row[1:] for row in rows], titles[1:])
        return real(rows, titles, *more, **options)

    monkeypatch.setattr(drawings, "tiles", noted)
    found = analyze(given, tmp_path, "layers=2,1", "heads=2,1", f"query={query}")
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
    other = exported(given, "no class", Vit(size="Ti", width=16, depth=1, heads=2, patch=4, image=16))
    assert analyze(given, tmp_path / "b", "samples=5", encoder=other)["samples"] == whole[:5]
    assert analyze(given, tmp_path / "c", "seed=1")["samples"] != whole


def test_images_without_classes(given: Path, tmp_path: Path):
    frozen.draw(tmp_path / "images", [f"{i}.png" for i in range(5)])
    found = analyze(given, tmp_path / "out", data=tmp_path / "images")
    assert pictures(tmp_path / "out") >= ALL
    assert [row["class"] for row in table(tmp_path / "out" / "features.csv")] == [""] * 5
    assert found.get("nearest_of_same_class") is None
    assert "of the same class" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("how", ["own", "asked"])
def test_any_height_and_width(given: Path, tmp_path: Path, how: str):
    shape = Vit(size="Ti", width=16, depth=2, heads=2, patch=4, image=(8, 20))
    words = ["image_size=8,20"] if how == "asked" else []
    place = given / "run" if how == "asked" else exported(given, "wide", shape)
    found = analyze(given, tmp_path, *words, "images=2", encoder=place)
    assert np.array(found["rollout"]["mean"]).shape == (2, 10)
    assert np.loadtxt(tmp_path / "position_similarity.csv", delimiter=",").shape == (10, 10)
    ways = [np.hypot(a // 5 - b // 5, a % 5 - b % 5) * 4 for a in range(10) for b in range(10)]
    assert found["attention_distance"]["equal_attention"] == pytest.approx(np.mean(ways), abs=1e-4)
    assert "| 8 x 20 |" in (tmp_path / "report.md").read_text()
    assert pictures(tmp_path) >= ALL


def test_a_damaged_image_is_left_out(given: Path, tmp_path: Path):
    shutil.copytree(given / "shards", tmp_path / "shards")
    entry = manifest.load(tmp_path / "shards" / "val").index(0)[1]
    with (tmp_path / "shards" / "val" / "000000.tar").open("r+b") as file:
        file.seek(int(entry["offset"]) + 30)
        file.write(b"\0damaged\0")
    found = analyze(given, tmp_path / "out", "images=8", data=tmp_path / "shards")
    assert sorted(found["samples"]) == [0, 2, 3, 4, 5, 6, 7]
    assert len(table(tmp_path / "out" / "features.csv")) == 7
    assert len(found["rollout"]["mean"]) == 7
    whole = analyze(given, tmp_path / "whole", "images=8")
    for i, sample in enumerate(found["samples"]):  # and the others are not shifted by it
        np.testing.assert_allclose(
            found["rollout"]["mean"][i], whole["rollout"]["mean"][whole["samples"].index(sample)], rtol=1e-4
        )
    assert found["attention_distance"]["images"] == 7


KINDS = {  # what is not drawn of each, beside reconstructions
    "hybrid": (Vit(size="Ti", width=16, depth=2, heads=2, patch=16, image=32, stem="r50"), set()),
    "timm": (TimmZoo(name="vit_tiny_patch16_224", image=(32, 48)), set()),
    "registers": (TimmZoo(name="vit_tiny_patch16_dinov3", image=32), None),
    "swin": (TimmZoo(name="swin_tiny_patch4_window7_224", image=64), {"rollout", "positions"}),
    "bit": (Bit(image=32), {"rollout", "distance", "positions"}),
    "resnet": (TimmZoo(name="resnet18", image=32), {"rollout", "distance", "positions"}),
    "relative": (
        Vit(size="Ti", width=16, depth=2, heads=2, patch=4, image=16, positions="relative"),
        {"positions"},
    ),
}


@pytest.mark.parametrize("kind", ["hybrid", "timm", "swin", "bit", "resnet", "relative"])
def test_every_kind_gets_what_applies_and_a_line_on_what_does_not(given: Path, tmp_path: Path, kind: str):
    shape, missing = KINDS[kind]
    assert missing is not None
    found = analyze(given, tmp_path, "images=2", "samples=4", encoder=exported(given, kind, shape))
    assert pictures(tmp_path) & ALL == ALL - missing
    told = (tmp_path / "report.md").read_text()
    for name, words in {"rollout": "rollout", "distance": "mean attention distance", "positions": "position"}.items():
        lines = [line for line in found["not_drawn"] if words in line.lower()]
        assert bool(lines) == (name in missing), found["not_drawn"]
        assert all(line in told for line in lines)
    partly = [line for line in found["not_drawn"] if "attention distance of 10 layers" in line]
    assert bool(partly) == (kind == "swin")  # whose last stage has one window, which is all
    names = {
        "rollout": "rollout",
        "distance": "attention_distance",
        "positions": "position_similarity.csv",
    }
    for name, key in names.items():
        there = (tmp_path / key).exists() if key.endswith(".csv") else key in found
        assert there == (name not in missing)
    assert len(table(tmp_path / "features.csv")) == 4
    if kind == "timm":
        encoder: Any = load_encoder(given / kind)
        layers = found["attention_distance"]["layers"]
        assert {name: len(heads) for name, heads in layers.items()} == {str(i): 3 for i in range(1, 13)}
        assert np.array(found["rollout"]["class"]).shape == (2, 6)
        assert encoder.prefix == 1


def test_nothing_stale_stays_of_an_earlier_look(given: Path, tmp_path: Path):
    analyze(given, tmp_path, "layers=1")
    analyze(given, tmp_path, encoder=exported(given, "resnet", KINDS["resnet"][0]))
    assert not (tmp_path / "attention_distance.csv").exists()
    assert "attention-1" not in pictures(tmp_path)


def test_another_tools_report_is_not_written_over(given: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("an evaluation")
    refuse([f"encoder={given}/run", f"data={given}/shards/val", f"run={tmp_path}/out"], tmp_path, 64, "run=")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_planted_attention_is_lit_in_what_is_written(given: Path, tmp_path: Path):
    from tests.evaluate.test_attention import planted

    for at in (0, 7, 13):
        export.export(planted(at), tmp_path / f"planted-{at}")
        found = analyze(given, tmp_path / f"{at}", "images=2", encoder=tmp_path / f"planted-{at}")
        for maps in found["rollout"].values():
            assert [int(np.argmax(one)) for one in maps] == [at, at]
        assert all(one[at] == pytest.approx(0.5) for one in found["rollout"]["class"])
        layers = found["attention_distance"]["layers"]
        assert layers["1"] == layers["2"] == pytest.approx([0, 0], abs=1e-4)
        ways = [np.hypot(one // 5 - at // 5, one % 5 - at % 5) * 8 for one in range(15)]
        assert layers["3"] == pytest.approx([np.mean(ways)] * 2, abs=1e-4)


REFUSED = {  # words changed, code, what the line names
    "no encoder": ({"encoder": None}, 64, "encoder"),
    "no data": ({"data": None}, 64, "data"),
    "encoder missing": ({"encoder": "/nowhere"}, 65, "/nowhere"),
    "data missing": ({"data": "/nowhere"}, 65, "/nowhere"),
    "layer": ({"layers": "3"}, 64, "layers"),
    "layer zero": ({"layers": "0"}, 64, "layers"),
    "head": ({"heads": "3"}, 64, "heads"),
    "head zero": ({"heads": "0"}, 64, "heads"),
    "unknown": ({"layer": "1"}, 64, "layers"),
    "size": ({"image_size": "18"}, 64, "18"),
    "samples": ({"samples": "2"}, 64, "samples"),
    "images": ({"images": "5000"}, 64, "images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(given: Path, tmp_path: Path, case: str):
    changed, code, named = REFUSED[case]
    keys: dict[str, Any] = {"encoder": given / "run", "data": given / "shards" / "val", "run": tmp_path / "out"}
    refuse([f"{key}={value}" for key, value in (keys | changed).items() if value], tmp_path, code, named)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def refuse(words: list[str], folder: Path, code: int, named: str) -> None:
    """It ends with this code and one line, which has the name in it."""
    said = frozen.run_tool("analyze", [*words, "workers=0"], folder, codes=(code,))
    closing = [line for line in said.splitlines() if line.strip()]
    assert len(closing) == 1, said
    assert named in closing[0]


def test_no_class_token_to_read_out(given: Path, tmp_path: Path):
    shape = Vit(size="Ti", width=16, depth=1, heads=2, patch=4, image=16, class_token=False, pool="mean")
    place = exported(given, "tokenless", shape)
    keys = [f"encoder={place}", f"data={given}/shards/val", f"run={tmp_path}/out"]
    for key in ("readout", "query"):
        refuse([*keys, f"{key}=class"], tmp_path, 64, "class token")
    assert not (tmp_path / "out").exists()


def test_too_few_images(given: Path, tmp_path: Path):
    frozen.shards(tmp_path, ["0.png", "1.png"])
    keys = [f"encoder={given}/run", f"data={tmp_path}/shards", f"run={tmp_path}/out"]
    refuse(keys, tmp_path, 65, "images")
    assert not list((tmp_path / "out").rglob("*.html")) + list((tmp_path / "out").rglob("*.csv"))


def test_a_training_is_not_written_over(given: Path, pretrained: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")}
    refuse([f"encoder={pretrained}", f"data={given}/shards", f"run={pretrained}"], tmp_path, 64, "run")
    assert {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")} == before


def test_what_is_held_does_not_grow_with_images_times_tokens(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At each pass over a batch the bytes of all living tensors are counted, 40 images against 400."""
    frozen.shards(tmp_path, [f"{i:03d}.png" for i in range(400)])
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
    monkeypatch.setattr(analysis, "Portrait", seen_all)  # what is drawn does not matter here
    for readout in ("mean", "class"):
        grown = {}
        for samples in (40, 400):
            gc.collect()
            counts.clear()
            words = [f"samples={samples}", "batch=40", "images=4", f"distance_images={samples}", "layers=1,2"]
            with pytest.raises(Seen):
                analyze(given, tmp_path / "out", *words, f"readout={readout}", data=tmp_path / "shards")
            grown[samples] = counts[-1] - counts[0]
        maps = 17 * 17 * 2 * 2 * 4  # bytes of an image's maps, here
        assert max(grown.values()) < 400 * maps / 4, grown
        assert grown[400] - grown[40] < 360 * (16 * 4 + 8 + 8 + 4 * 8 + 200), (
            grown
        )  # features, label, number, distances


def test_neighbours_among_many_images_take_little_memory():
    """All with all would be a matrix of images squared."""
    most = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            made = func(*args, **(kwargs or {}))
            most = max(
                [
                    most,
                    *(one.numel() for one in (made if isinstance(made, tuple) else (made,)) if isinstance(one, Tensor)),
                ]
            )
            return made

    features = torch.randn(6000, 2, generator=torch.Generator().manual_seed(0))
    with Largest():
        found = embeddings.nearest(features, torch.arange(6000), 1)
    assert most < 6000 * 6000 / 4
    for one in (0, 1023, 1024, 5999):
        alike = torch.nn.functional.cosine_similarity(features[one : one + 1], features)
        alike[one] = -2
        assert float(alike[found[one, 0]]) == pytest.approx(float(alike.max()), abs=1e-6)
