"""The sections of an analysis: attention, filters, positions, features, reconstructions."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_vit import config
from ssl_vit.analyze import collect, figures
from ssl_vit.analyze.collect import Measurements
from ssl_vit.config import Config
from ssl_vit.data.loader import EvaluationStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.encoders import weights
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate.attention import Query, attention_distances, find_attention_layers
from ssl_vit.recipes import Pretrain
from ssl_vit.report.format import escape, format_percent
from ssl_vit.report.page import Page, encode_png
from ssl_vit.runtime import command_line
from ssl_vit.train import checkpoint

TABLES = ("attention_distance.csv", "position_similarity.csv", "features.csv", "neighbors.csv")


class Analyze(Config):
    """Look into an encoder."""

    encoder: str | None = Field(
        default=None, description="what to look into: a run, an encoder folder, a weights file, or timm:NAME"
    )
    data: tuple[str, ...] | None = Field(
        default=None, description="shards, or a folder of images, which is converted first; of splits the val split"
    )
    run: str = Field(default="runs/analyze", min_length=1, description="output folder")
    image_size: int | tuple[int, int] | None = Field(default=None, description="input size, pixels (none: its own)")
    images: int = Field(default=8, ge=1, le=100, description="images that are drawn")
    distance_images: int = Field(default=128, ge=1, description="images for the attention distance; the paper's 128")
    samples: int = Field(default=1000, ge=3, description="images whose features are drawn and compared")
    layers: tuple[int, ...] = Field(default=(), description="layers whose attention is drawn, from 1 (none: the last)")
    heads: tuple[int, ...] = Field(default=(), description="heads of these, from 1 (none: all)")
    query: Query = Field(default="mean", description="who attends there: the class token, or the mean of the patches")
    readout: Literal["mean", "class"] = Field(
        default="mean", description="features: mean of the patch tokens, or class token"
    )
    projection: Literal["pca", "tsne"] = Field(
        default="pca", description="how features become two numbers; tsne takes scikit-learn"
    )
    batch: int = Field(default=32, ge=1, description="images at once")
    workers: int | None = Field(default=None, ge=0, description="loader processes (none: by the cores)")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="which images, and of t-SNE")
    quiet: bool = Field(default=False, description="no lines on the screen")


MAX_COMPONENTS = 28  # of the filters, as in the paper's Figure 7
NUM_NEIGHBORS = 7


class AnalysisReport:
    """What was found of an encoder, as a page, tables and numbers; `notes` say what does not apply to it."""

    def __init__(
        self,
        options: "Analyze",
        encoder: weights.AnyEncoder,
        split: Manifest,
        stream: EvaluationStream,
        measurements: Measurements,
    ):
        self.options, self.encoder, self.split, self.stream, self.measurements = (
            options,
            encoder,
            split,
            stream,
            measurements,
        )
        self.page = Page(f"Inside {options.encoder}")
        self.notes: list[str] = []
        self.tables: dict[str, list[Sequence[Any]]] = {}
        self.numbers: dict[str, Any] = {"encoder": options.encoder, "title": encoder.config.title}
        self.images = [
            image.permute(1, 2, 0).numpy() for batch in measurements.drawn_batches for image in batch["image"]
        ]
        self.vectors, self.labels = torch.cat(measurements.features), torch.cat(measurements.labels).numpy()
        self.layers = {name: number for number, (name, _) in enumerate(find_attention_layers(encoder), start=1)}
        self.ids = np.asarray(stream.ids)[torch.cat(measurements.indices).numpy()]

    def draw(self) -> None:
        """All sections."""
        self.page.values(
            {
                "encoder": self.encoder.config.title,
                "images": f"{len(self.ids):,} of {self.split.name}",
                "input": " x ".join(map(str, self.encoder.config.image_hw)),
                "patches": " x ".join(map(str, self.encoder.grid)),
            }
        )
        sections: list[Callable[[], None]] = [self.rollout, self.attention, self.distance, self.filters]
        sections += [self.positions, self.reconstructions, self.features, self.neighbors]
        for section in sections:
            section()
        if self.notes:
            self.page.section("What does not apply")
            for note in self.notes:
                self.page.text(escape(note))
        self.page.section("To repeat it")
        self.page.code(command_line())
        self.numbers |= {"samples": self.ids.tolist(), "not_drawn": self.notes, "command": command_line()}

    def rollout(self) -> None:
        """Attention rollout over the images (paper Figure 6)."""
        rollouts = {query: torch.cat(parts).numpy() for query, parts in self.measurements.rollouts.items()}
        if not rollouts:
            self.notes.append(f"attention rollout: {self._no_attention_reason()}")
            return
        rows, titles = [[image] for image in self.images], ["image"]
        for query, maps in rollouts.items():
            titles += [{"class": "class token", "mean": "mean of patches"}[query], "its map"]
            for row, values in zip(rows, maps.reshape(-1, *self.encoder.grid), strict=True):
                row += [figures.shaded(row[0], values, self.encoder.stride), values]
        self.page.section("Attention rollout")
        self.page.text(
            "Bright is what reaches the output through the attention of all layers: heads averaged, the identity "
            "added, layers multiplied (paper D.8); beside it the map itself, from its least to its largest value. "
            "Masked patch prediction trains no class token: there look at the mean of the patches."
        )
        self.page.picture("rollout", "attention rollout", figures.tiles(rows, titles, 1.4))
        self.numbers["rollout"] = {query: maps.tolist() for query, maps in rollouts.items()}

    def _no_attention_reason(self) -> str:
        title = self.encoder.config.title
        if not self.layers:
            return f"{title} has no attention that can be looked into"
        return f"not every attention layer of {title} is among all patches; windows, channels or class tokens are not"

    def attention(self) -> None:
        """Maps of the layers and heads that were asked for."""
        query = self.options.query
        for name, parts in self.measurements.maps.items():
            maps, layer = torch.cat(parts), self.layers[name]  # [B, heads, N]
            heads = self.options.heads or tuple(range(1, maps.shape[1] + 1))
            selected = maps[:, [head - 1 for head in heads]].unflatten(2, self.encoder.grid).numpy()
            rows = [[image, *selected[n]] for n, image in enumerate(self.images)]
            self.page.section(f"Attention of layer {layer}")
            subject = "the class token looks" if query == "class" else "patches look on average"
            self.page.text(f"Where {subject}, a column a head; each map by its own largest value.")
            figure = figures.tiles(rows, ["image", *(f"head {head}" for head in heads)], 1.0, vmin=0)
            self.page.picture(f"attention-{layer}", f"attention of layer {layer}", figure)
        if not self.measurements.maps and self.layers:
            self.notes.append(f"attention maps: {self._no_attention_reason()}")

    def distance(self) -> None:
        """Mean attention distance by layer and head (paper Figure 7, right)."""
        mean_distances = self.measurements.mean_distances()
        if not mean_distances:
            self.notes.append(f"mean attention distance: {self._no_attention_reason()}")
            return
        grid, stride = self.encoder.grid, self.encoder.stride
        patches = grid[0] * grid[1]
        uniform = float(attention_distances(torch.ones(1, 1, patches, patches, dtype=torch.float64), grid, stride))
        num_images = sum(map(len, next(iter(self.measurements.distances.values()))))
        layers = {self.layers[name]: heads.tolist() for name, heads in mean_distances.items()}
        if len(layers) < len(self.layers):
            self.notes.append(
                f"attention distance of {len(self.layers) - len(layers)} layers: {self._no_attention_reason()}"
            )
        self.page.section("Mean attention distance")
        self.page.text(
            f"A dot a head: how far from a patch it looks, in pixels, the mean over {num_images} images (paper D.7). "
            "Class and register tokens are left out, and rows normalized again. Equal attention to all patches has "
            f"{uniform:.1f}."
        )
        self.page.picture("distance", "mean attention distance", figures.distance_dots(layers, uniform))
        table = [(layer, head + 1, value) for layer, heads in layers.items() for head, value in enumerate(heads)]
        self.tables["attention_distance.csv"] = [("layer", "head", "pixels"), *table]
        self.numbers["attention_distance"] = {"layers": layers, "equal_attention": uniform, "images": num_images}

    def filters(self) -> None:
        """Principal components of what meets the pixels first (paper Figure 7, left)."""
        conv = collect.first_convolution(self.encoder)
        if conv is None:
            self.notes.append(f"filters: {self.encoder.config.title} has no convolution that meets the pixels")
            return
        components, variance = collect.principal_components(conv.weight.detach().cpu())
        explained = (variance / variance.sum().clamp(min=1e-300)).tolist()
        layer_name = (
            "patch embedding" if conv.stride == conv.kernel_size else "first convolution, behind which patches are cut"
        )
        self.page.section("Filters")
        displayed = components[:MAX_COMPONENTS]
        self.page.text(
            f"The first {len(displayed)} principal components of the filters of the {layer_name} ({len(conv.weight):,} "
            f"of {' x '.join(map(str, conv.kernel_size))} pixels), with their share of the variance (paper 4.5)."
        )
        titles = [f"{value:.1%}" for value in explained]
        self.page.picture(
            "filters", "principal components of the filters", figures.filter_tiles(displayed.numpy(), titles)
        )
        self.numbers["filters"] = {"of": layer_name, "variance": explained}

    def positions(self) -> None:
        """Similarity of the positions of patches (paper Figure 7, center)."""
        table = collect.position_table(self.encoder)
        if table is None:
            self.notes.append(f"position similarity: {self.encoder.config.title} has no table of positions")
            return
        similarity = collect.similarity(table).cpu().numpy()
        self.page.section("Positions")
        self.page.text("One tile a patch: how similar its position is to that of each patch (paper Figure 7, center).")
        figure = figures.similarity_tiles(similarity, self.encoder.grid)
        self.page.picture("positions", "similarity of positions", figure)
        self.tables["position_similarity.csv"] = similarity.round(6).tolist()

    def reconstructions(self) -> None:
        """What the head that it was pretrained with makes of the images, where a run still has it."""
        try:
            head = self._load_head()
        except (ExitError, ValueError, KeyError, RuntimeError, OSError) as error:
            self.notes.append(f"reconstructions: {' '.join(str(error).split())[:200]}")
            return
        self.page.section("Reconstructions")
        self.page.text(
            "Columns: the image; what the encoder saw (masked patches gray, swapped ones framed in red, kept ones in "
            "white); what was predicted; what was true; the error, the brighter the larger."
        )
        batch = {
            name: torch.cat([part[name] for part in self.measurements.drawn_batches])
            for name in self.measurements.drawn_batches[0]
        }
        device = next(self.encoder.parameters()).device
        picture = (
            head.to(device).eval().visualize(self.encoder, {name: value.to(device) for name, value in batch.items()})
        )
        self.page.image("reconstruction", "reconstructions", encode_png(picture))

    def _load_head(self) -> Any:
        """The head of the run that the encoder is from, with its last weights; raises where there is none."""
        folder = Path(str(self.options.encoder))
        checkpoints = checkpoint.list_checkpoints(folder / "checkpoints")
        if not checkpoints or not (folder / "recipe.yaml").is_file():
            raise ExitError(ExitCode.USAGE, "the head is in the checkpoints of a pretraining; give its run as encoder=")
        try:
            recipe = config.parse(Pretrain, [f"recipe={folder / 'recipe.yaml'}"])
        except ExitError as error:
            raise ExitError(
                ExitCode.USAGE, "its run is no pretraining, so it has no head that predicts patches"
            ) from error
        head = recipe.head.build(self.encoder, 1)
        if head.visualize is None:
            raise ExitError(ExitCode.USAGE, f"head.kind={recipe.head.kind} predicts nothing that could be drawn")
        state_dict = checkpoint.trained_weights(checkpoints[-1])
        head.load_state_dict({n.removeprefix("head."): v for n, v in state_dict.items() if n.startswith("head.")})
        return head

    def features(self) -> None:
        """Features of all images in two dimensions, colored by class."""
        if self.options.projection == "tsne":
            points, axis_names = _tsne(self.vectors, self.options.seed), ("", "")
            method = "t-SNE keeps neighbors; distances between groups mean little"
        else:
            points, explained = collect.two_dimensions(self.vectors)
            axis_names = f"component 1, {explained[0]:.1%} of the variance", f"component 2, {explained[1]:.1%}"
            method = "the first two principal components"
        self.page.section("Features")
        self.page.text(f"{len(self.vectors):,} images by their features ({_READOUTS[self.options.readout]}): {method}.")
        figure = figures.scatter(points.numpy(), self.labels, self.split.classes, axis_names)
        self.page.picture("features", "features of images", figure)
        entries = zip(self.ids.tolist(), self.labels.tolist(), points.tolist(), strict=True)
        rows = [(sample, self._class_name(label), *point) for sample, label, point in entries]
        self.tables["features.csv"] = [("sample", "class", "x", "y"), *rows]

    def neighbors(self) -> None:
        """For some images those whose features are nearest."""
        vectors = self.vectors
        queries = torch.arange(len(self.images))
        neighbors = collect.nearest(vectors, queries, NUM_NEIGHBORS)
        rows = [[image, *(self._load_image(n) for n in neighbors[i].tolist())] for i, image in enumerate(self.images)]
        self.page.section("Nearest neighbors")
        nearest = collect.nearest(vectors, torch.arange(len(vectors)), 1)[:, 0].numpy()
        labeled = (self.labels >= 0) & (self.labels[nearest] >= 0)
        same_class = float((self.labels[nearest] == self.labels)[labeled].mean()) if labeled.any() else None
        sentence = (
            ""
            if same_class is None
            else f" The nearest of all is of the same class for {format_percent(same_class)} % of the images."
        )
        self.page.text(f"First column: the image; then those with the most similar features, by cosine.{sentence}")
        self.page.picture("neighbors", "nearest neighbors", figures.tiles(rows, ["image", "nearest"], 1.1))
        table = [(int(self.ids[i]), *self.ids[neighbors[i].numpy()].tolist()) for i in range(len(queries))]
        self.tables["neighbors.csv"] = [("sample", *(f"nearest{n + 1}" for n in range(neighbors.shape[1]))), *table]
        self.numbers["nearest_of_same_class"] = same_class

    def _load_image(self, index: int) -> np.ndarray:
        image, _ = self.stream.samples.load_sample(int(self.ids[index]), 0)
        return image.permute(1, 2, 0).numpy()

    def _class_name(self, label: int) -> str:
        return self.split.classes[label] if label >= 0 else ""


_READOUTS = {"mean": "mean of the patch tokens", "class": "class token"}


def _tsne(features: Tensor, seed: int) -> Tensor:
    """Features [M, D] as places [M, 2]; the usual perplexity, less where images are few."""
    if importlib.util.find_spec("sklearn") is None:
        raise ExitError(
            ExitCode.USAGE, "projection=tsne needs scikit-learn: pip install 'ssl_vit[demo]', or projection=pca"
        )
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.numpy())
    return torch.from_numpy(points)
