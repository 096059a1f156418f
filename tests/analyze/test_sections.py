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
from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.data.loader import EvaluationStream, ProcessShard
from ssl_vit.encoders import export
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.encoders.weights import load_encoder
from ssl_vit.evaluate import attention
from ssl_vit.recipes import Pretrain
from tests import evaluate_cases

ALL_SECTIONS = {"rollout", "distance", "filters", "positions", "features", "neighbors"}
SMALL_VIT: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image": 16}
TABLE_NAMES = {"attention_distance.csv", "position_similarity.csv", "features.csv", "neighbors.csv"}
FIGURE_NAMES = ("tiles", "filter_tiles", "similarity_tiles", "scatter", "distance_dots")


class FakeFigure:
    """Stands for a figure where nobody looks at it: drawing takes most of the time."""

    def savefig(self, buffer: Any, **options: Any) -> None:
        del options
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")


def export_encoder(folder: Path, encoder_config: Any) -> Path:
    """An encoder of any kind."""
    torch.manual_seed(0)
    export.export_encoder(encoder_config.build().eval(), folder)
    return folder


def run_analysis(
    root: Path, output: Path, *args: str, encoder: Path | str = "", data: Path | str = "", draw_figures: bool = False
) -> dict[str, Any]:
    """The numbers of an analysis in this process; what it wrote is whole, though sketched unless it is `drawn`."""
    paths = [f"encoder={encoder or root / 'run'}", f"data={data or root / 'shards' / 'val'}", f"run={output}"]
    arguments = [*paths, "workers=0", "quiet=true", "batch=3", "images=2", *args]
    parsed = config.parse(sections.Analyze, arguments)
    fakes = {} if draw_figures else dict.fromkeys(FIGURE_NAMES, lambda *_, **__: FakeFigure())
    with patch.multiple(figures, **fakes) if fakes else nullcontext():
        assert command.run(parsed) == 0
    return read_analysis(output)


def read_analysis(output: Path) -> dict[str, Any]:
    """What is in analysis.json, after a look at everything beside it."""
    page, markdown = (output / "report.html").read_text(), (output / "report.md").read_text()
    for path in (output / "report").iterdir():
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 1, f"{path} shows nothing"
        assert f"report/{path.name}" in markdown
    assert page.count('src="data:image/png;base64,') == len(list((output / "report").iterdir())) == page.count("<img")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "nan" not in markdown.lower().split()
    return evaluate_cases.read_results(output, "analysis.json")


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_coordinates(output: Path) -> np.ndarray:
    """Where features lie in two dimensions, by features.csv."""
    return np.array([[float(row["x"]), float(row["y"])] for row in read_table(output / "features.csv")])


def picture_names(output: Path) -> set[str]:
    return {path.stem for path in (output / "report").iterdir()}


def load_samples(shards: Path, numbers: list[int]) -> tuple[Tensor, list[str]]:
    """The images of these samples as evaluations crop them, and their classes as the tars have them, in their order."""
    data_manifest, classes = manifest.load(shards), []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            label_files = [tar.extractfile(member) for member in tar if member.name.endswith(".cls")]
            classes += [data_manifest.classes[int(file.read())] for file in label_files if file is not None]
    samples = SampleDataset(data_manifest, Data(image_size=evaluate_cases.SIDE), seed=0, training=False)
    return torch.stack([samples.load_sample(number, 0)[0] for number in numbers]), [
        classes[number] for number in numbers
    ]


@torch.no_grad()
def tokens_and_maps(encoder: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens, and maps [layers, B, heads, T, T]."""
    maps: list[Tensor] = []
    with attention.capture_attention(encoder, lambda _, attention_map: maps.append(attention_map)):
        return encoder(image), torch.stack(maps)


@pytest.mark.parametrize("kind", ["class", "no class", "axial"])
def test_numbers_are_those_that_one_computes_oneself(given: Path, tmp_path: Path, kind: str):
    encoder_config = {"no class": Vit(**SMALL_VIT, class_token=False, pool="mean"), "axial": Axial(**SMALL_VIT)}.get(
        kind
    )
    folder = given / "run" / "encoder" if encoder_config is None else export_encoder(tmp_path / kind, encoder_config)
    args, draw_figures = ["images=3", "distance_images=5"], encoder_config is None
    results = run_analysis(given, tmp_path / "out", *args, encoder=folder, draw_figures=draw_figures)
    encoder: Any = load_encoder(folder)
    assert picture_names(tmp_path / "out") >= ALL_SECTIONS
    assert sorted(results["samples"]) == list(range(8))
    image, classes = load_samples(given / "shards" / "val", results["samples"])
    tokens, maps = tokens_and_maps(encoder, image)
    # attention distance: JSON, CSV and one's own agree
    distances = attention.mean_distance(maps[:, :5], (4, 4), 4).numpy()
    layers = results["attention_distance"]["layers"]
    assert results["attention_distance"]["images"] == 5
    assert results["attention_distance"]["equal_attention"] == pytest.approx(2.008015 * 4, abs=1e-4)
    np.testing.assert_allclose([layers[number] for number in sorted(layers, key=int)], distances, rtol=1e-5)
    rows = read_table(tmp_path / "out" / "attention_distance.csv")
    layer_heads = [(i, j) for i in range(1, len(distances) + 1) for j in (1, 2)]
    assert [(int(row["layer"]), int(row["head"])) for row in rows] == layer_heads
    np.testing.assert_allclose([float(row["pixels"]) for row in rows], distances.ravel(), rtol=1e-5)
    # rollout of those that are drawn
    assert set(results["rollout"]) == ({"class", "mean"} if encoder.prefix else {"mean"})
    for query, value in results["rollout"].items():
        expected = attention.rollout(maps[:, :3], encoder.prefix, query).numpy()
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    # features and neighbors, positions and filters: their functions' own numbers are numpy's in test_embeddings.py
    features = tokens[:, encoder.prefix :].mean(1)
    rows = read_table(tmp_path / "out" / "features.csv")
    assert [int(row["sample"]) for row in rows] == results["samples"]
    assert [row["class"] for row in rows] == classes
    coordinates, _ = collect.two_dimensions(features)
    written_coordinates = read_coordinates(tmp_path / "out")
    signs = np.sign((written_coordinates * coordinates.numpy()).sum(0))
    np.testing.assert_allclose(
        written_coordinates * signs, coordinates.numpy(), atol=1e-3 * float(coordinates[:, 1].abs().max())
    )
    nearest = collect.nearest(features, torch.arange(8), 7)
    rows = read_table(tmp_path / "out" / "neighbors.csv")
    assert [int(row["sample"]) for row in rows] == results["samples"][: len(rows)]
    for row, indices in zip(rows, nearest.tolist(), strict=False):
        assert [int(row[f"nearest{j}"]) for j in range(1, 8)] == [results["samples"][j] for j in indices]
    same_class = np.mean([classes[i] == classes[j] for i, j in enumerate(nearest[:, 0].tolist())])
    assert results["nearest_of_same_class"] == pytest.approx(same_class)
    written_similarity = np.loadtxt(tmp_path / "out" / "position_similarity.csv", delimiter=",")
    similarity = collect.similarity(encoder.pos_embed.detach()[0, encoder.prefix :])
    np.testing.assert_allclose(written_similarity, similarity.numpy(), atol=1e-5)
    _, values = collect.principal_components(encoder.patch_embed.proj.weight.detach())
    np.testing.assert_allclose(results["filters"]["variance"], values / values.sum(), rtol=1e-4, atol=1e-12)


def test_a_pretraining_shows_its_reconstructions(given: Path, tiny_run: Any, tmp_path: Path):
    pretrained = tiny_run(1)
    times = evaluate_cases.modified_times(pretrained)
    args = [f"encoder={pretrained}", f"data={given}/shards", f"run={tmp_path}/out", "workers=0", "images=2"]
    output = evaluate_cases.run_tool("analyze", args, tmp_path)
    assert f"{tmp_path}/out" in output
    assert "not drawn" not in output
    results = read_analysis(tmp_path / "out")
    assert {"reconstruction"} | ALL_SECTIONS <= picture_names(tmp_path / "out")
    assert results["not_drawn"] == []
    assert len(results["samples"]) == 8, "of splits it takes val"
    pixels = np.asarray(Image.open(tmp_path / "out" / "report" / "reconstruction.png"))
    np.testing.assert_array_equal(
        pixels, reconstruction_panel(pretrained, given / "shards" / "val", results["samples"][:2])
    )
    assert {path.name for path in (tmp_path / "out").glob("*.csv")} == TABLE_NAMES
    assert evaluate_cases.modified_times(pretrained) == times


@torch.no_grad()
def reconstruction_panel(run: Path, shards: Path, numbers: list[int]) -> np.ndarray:
    """The picture that the last checkpoint's head makes of the samples, every tensor of it found there."""
    encoder: Any = load_encoder(run)
    head: Any = config.parse(Pretrain, [f"recipe={run}/recipe.yaml"]).head.build(encoder, 1)
    tensors = load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    head.load_state_dict({name.removeprefix("head."): tensors[name] for name in tensors if name.startswith("head.")})
    data = Data(image_size=evaluate_cases.SIDE, workers=0)
    stream = EvaluationStream(manifest.load(shards), data, 2, np.array(numbers))
    batch = next(iter(stream.batches(ProcessShard(micro_batch=2), torch.device("cpu"))))
    return head.eval().visualize(encoder, batch).permute(1, 2, 0).numpy()


def test_layers_heads_query_readout_and_projection(given: Path, tmp_path: Path):
    pytest.importorskip("sklearn")
    args = ["layers=1,2", "heads=2", "query=class", "readout=class", "projection=tsne", "images=8"]
    results = run_analysis(given, tmp_path, *args)
    assert {"attention-1", "attention-2"} <= picture_names(tmp_path)
    assert len(read_table(tmp_path / "attention_distance.csv")) == 4  # of all, whatever is drawn
    image, _ = load_samples(given / "shards" / "val", results["samples"])
    tokens, _ = tokens_and_maps(load_encoder(given / "run"), image)
    nearest = collect.nearest(tokens[:, 0], torch.arange(8), 1)[:, 0].tolist()
    rows = read_table(tmp_path / "neighbors.csv")
    assert [int(row["nearest1"]) for row in rows] == [results["samples"][i] for i in nearest][: len(rows)]
    second = run_analysis(given, tmp_path / "again", "projection=tsne", "readout=class", draw_figures=True)
    assert second["samples"] == results["samples"]
    np.testing.assert_allclose(read_coordinates(tmp_path / "again"), read_coordinates(tmp_path), rtol=1e-5)
    assert not (tmp_path / "again" / "report" / "attention-1.png").exists()


@pytest.mark.parametrize("query", ["class", "mean"])
def test_the_maps_that_are_drawn(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str):
    """Layers, heads, and who asks: as the hooks give them."""
    tiles_by_layer = {}

    def record_tiles(rows: Any, titles: Any, *_: Any, **__: Any) -> FakeFigure:
        if "head" in titles[1]:
            tiles_by_layer[len(tiles_by_layer) + 1] = ([row[1:] for row in rows], titles[1:])
        return FakeFigure()

    monkeypatch.setattr(figures, "tiles", record_tiles)
    results = run_analysis(given, tmp_path, "layers=2,1", "heads=2,1", f"query={query}", draw_figures=True)
    image, _ = load_samples(given / "shards" / "val", results["samples"][:2])
    _, maps = tokens_and_maps(load_encoder(given / "run"), image)
    query_maps = maps[:, :, :, 0, 1:] if query == "class" else maps[:, :, :, 1:, 1:].mean(3)
    assert set(tiles_by_layer) == {1, 2}
    for layer, (rows, titles) in tiles_by_layer.items():
        assert titles == ["head 2", "head 1"]
        expected = query_maps[layer - 1][:, [1, 0]].unflatten(2, (4, 4)).numpy()
        np.testing.assert_allclose(np.array(rows), expected, rtol=1e-4, atol=1e-6)


def test_the_choice_of_images_is_everybodys_and_grows(given: Path, tmp_path: Path):
    samples = run_analysis(given, tmp_path / "a")["samples"]
    encoder = evaluate_cases.export_tiny_encoder(tmp_path / "other", depth=1, class_token=False, pool="mean")
    assert run_analysis(given, tmp_path / "b", "samples=5", encoder=encoder)["samples"] == samples[:5]
    assert run_analysis(given, tmp_path / "c", "seed=1")["samples"] != samples


def test_images_without_classes(given: Path, tmp_path: Path):
    evaluate_cases.draw_blocks(tmp_path / "images", [f"{i}.png" for i in range(5)])
    results = run_analysis(given, tmp_path / "out", data=tmp_path / "images", draw_figures=True)
    assert picture_names(tmp_path / "out") >= ALL_SECTIONS
    assert [row["class"] for row in read_table(tmp_path / "out" / "features.csv")] == [""] * 5
    assert results.get("nearest_of_same_class") is None
    assert "of the same class" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("asked", [False, True])
def test_any_height_and_width(given: Path, tmp_path: Path, asked: bool):
    encoder = given / "run" if asked else evaluate_cases.export_tiny_encoder(tmp_path / "wide", image=(8, 20))
    results = run_analysis(given, tmp_path, *["image_size=8,20"][:asked], encoder=encoder, draw_figures=not asked)
    assert np.array(results["rollout"]["mean"]).shape == (2, 10)
    assert np.loadtxt(tmp_path / "position_similarity.csv", delimiter=",").shape == (10, 10)
    distances = [np.hypot(a // 5 - b // 5, a % 5 - b % 5) * 4 for a in range(10) for b in range(10)]
    assert results["attention_distance"]["equal_attention"] == pytest.approx(np.mean(distances), abs=1e-4)
    assert "| 8 x 20 |" in (tmp_path / "report.md").read_text()
    assert picture_names(tmp_path) >= ALL_SECTIONS


def test_a_damaged_image_is_left_out(given: Path, tmp_path: Path):
    evaluate_cases.damage_shards(given / "shards", tmp_path / "shards")
    results = run_analysis(given, tmp_path / "out", "images=8", data=tmp_path / "shards")
    assert sorted(results["samples"]) == [0, 2, 3, 4, 5, 6, 7]
    assert len(read_table(tmp_path / "out" / "features.csv")) == len(results["rollout"]["mean"]) == 7
    undamaged = run_analysis(given, tmp_path / "whole", "images=8")
    expected = [undamaged["rollout"]["mean"][undamaged["samples"].index(sample)] for sample in results["samples"]]
    np.testing.assert_allclose(results["rollout"]["mean"], expected, rtol=1e-4)  # not shifted by it
    assert results["attention_distance"]["images"] == 7


KINDS: dict[str, tuple[Any, set[str]]] = {  # what is not drawn of each, beside reconstructions
    "hybrid": (Vit(size="Ti", width=16, depth=2, heads=2, patch=16, image=32, stem="r50"), set()),
    "timm": (TimmZoo(name="vit_tiny_patch16_224", image=(32, 48)), set()),
    "swin": (TimmZoo(name="swin_tiny_patch4_window7_224", image=64), {"rollout", "positions"}),
    "bit": (Bit(image=32), {"rollout", "distance", "positions"}),
    "resnet": (TimmZoo(name="resnet18", image=32), {"rollout", "distance", "positions"}),
    "relative": (Vit(**SMALL_VIT, positions="relative"), {"positions"}),
}


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.process)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gets_what_applies_and_a_line_on_what_does_not(given: Path, tmp_path: Path, kind: str, drawn: bool):
    """And nothing stale stays of an earlier look at another encoder."""
    encoder_config, missing = KINDS[kind]
    output, folder = tmp_path / "out", export_encoder(tmp_path / kind, encoder_config)
    run_analysis(given, output, "layers=1")
    assert "attention-1" in picture_names(output)
    results = run_analysis(given, output, "images=2", "samples=4", encoder=folder, draw_figures=drawn)
    assert picture_names(output) & ALL_SECTIONS == ALL_SECTIONS - missing
    assert "attention-1" not in picture_names(output)
    markdown = (output / "report.md").read_text()
    for name, phrase in {"rollout": "rollout", "distance": "mean attention distance", "positions": "position"}.items():
        lines = [line for line in results["not_drawn"] if phrase in line.lower()]
        assert bool(lines) == (name in missing), results["not_drawn"]
        assert all(line in markdown for line in lines)
    partial = [line for line in results["not_drawn"] if "attention distance of 10 layers" in line]
    assert bool(partial) == (kind == "swin")  # whose last stage has one window, which is all
    assert ("rollout" in results) == ("rollout" not in missing)
    assert ("attention_distance" in results) == ("distance" not in missing)
    for name, file in {"positions": "position_similarity.csv", "distance": "attention_distance.csv"}.items():
        assert (output / file).exists() == (name not in missing)
    assert len(read_table(output / "features.csv")) == 4
    if kind == "timm":
        layers = results["attention_distance"]["layers"]
        assert {name: len(heads) for name, heads in layers.items()} == {str(i): 3 for i in range(1, 13)}
        assert np.array(results["rollout"]["class"]).shape == (2, 6)
    shutil.rmtree(folder)  # timm's are large


def test_what_cannot_be_looked_into_is_refused_in_one_line(given: Path, tiny_run: Any, tmp_path: Path):
    """And nothing is written, least of all over a training or another tool's report."""
    tokenless = evaluate_cases.export_tiny_encoder(tmp_path / "tokenless", class_token=False, pool="mean")
    few_shards = evaluate_cases.write_shards(tmp_path / "few", ["0.png", "1.png"])
    report_dir, output = tmp_path / "reported", tmp_path / "out"
    report_dir.mkdir()
    (report_dir / "report.html").write_text("an evaluation")
    times = evaluate_cases.modified_times(tiny_run(1)), evaluate_cases.modified_times(report_dir)
    keys: dict[str, Any] = {"encoder": given / "run", "data": given / "shards" / "val", "run": output, "workers": 0}
    for code, message, changes in [
        (64, "encoder", {"encoder": None}),
        (64, "data", {"data": None}),
        (65, "/nowhere", {"encoder": "/nowhere"}),
        (65, "/nowhere", {"data": "/nowhere"}),
        (65, "images", {"data": few_shards}),
        (64, "layers", {"layers": 3}),
        (64, "heads", {"heads": "0"}),
        (64, "layers", {"layer": 1}),
        (64, "18", {"image_size": 18}),
        (64, "samples", {"samples": 2}),
        (64, "class token", {"encoder": tokenless, "readout": "class"}),
        (64, "class token", {"encoder": tokenless, "query": "class"}),
        (64, "run=", {"run": report_dir}),
        (64, "run", {"encoder": tiny_run(1), "run": tiny_run(1)}),
    ]:
        args = [f"{key}={value}" for key, value in (keys | changes).items() if value is not None]
        text = evaluate_cases.run_tool("analyze", args, tmp_path, codes=(code,))
        assert len([line for line in text.splitlines() if line.strip()]) == 1, text
        assert message in text
        assert not output.exists() or not any(output.iterdir())
    assert (evaluate_cases.modified_times(tiny_run(1)), evaluate_cases.modified_times(report_dir)) == times


def test_what_is_held_does_not_grow_with_images_times_tokens(given: Path, tmp_path: Path, monkeypatch):
    """At each pass over a batch the bytes of all living new tensors are counted, 20 images against 200."""
    evaluate_cases.write_shards(tmp_path, [f"{i:03d}.png" for i in range(200)])
    original_forward, byte_counts = VitEncoder.forward, []

    def counting_forward(self: Any, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        storages = [
            value.untyped_storage() for value in gc.get_objects() if type(value) in (Tensor, torch.nn.Parameter)
        ]
        byte_counts.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        return original_forward(self, image, *args, **kwargs)

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(VitEncoder, "forward", counting_forward)
    monkeypatch.setattr(command, "AnalysisReport", stop)  # what is drawn does not matter here
    for readout in ("mean", "class"):
        growth = {}
        for samples in (20, 200):
            gc.collect()
            gc.freeze()  # what is there already is not looked through again
            byte_counts.clear()
            args = [f"samples={samples}", "batch=20", "images=4", f"distance_images={samples}", "layers=1,2"]
            with pytest.raises(Stop):
                run_analysis(given, tmp_path / "out", *args, f"readout={readout}", data=tmp_path / "shards")
            gc.unfreeze()
            growth[samples] = byte_counts[-1] - byte_counts[0]
        maps = 17 * 17 * 2 * 2 * 4  # bytes of an image's maps, here
        assert max(growth.values()) < 200 * maps / 4, growth
        image_bytes = 16 * 4 + 8 + 8 + 4 * 8 + 200  # features, label, number, distances
        assert growth[200] - growth[20] < 180 * image_bytes, growth


def test_neighbors_among_many_images_take_little_memory():
    """All with all would be a matrix of images squared."""
    max_numel = 0

    class TrackLargest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal max_numel
            output = func(*args, **(kwargs or {}))
            outputs = output if isinstance(output, tuple) else (output,)
            max_numel = max([max_numel, *(tensor.numel() for tensor in outputs if isinstance(tensor, Tensor))])
            return output

    features = torch.randn(6000, 2, generator=torch.Generator().manual_seed(0))
    with TrackLargest():
        neighbors = collect.nearest(features, torch.arange(6000), 1)
    assert max_numel < 6000 * 6000 / 4
    for tensor in (0, 1023, 1024, 5999):
        similarities = torch.nn.functional.cosine_similarity(features[tensor : tensor + 1], features)
        similarities[tensor] = -2
        assert float(similarities[neighbors[tensor, 0]]) == pytest.approx(float(similarities.max()), abs=1e-6)
