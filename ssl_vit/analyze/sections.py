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
from ssl_vit.analyze.collect import Found
from ssl_vit.config import Config
from ssl_vit.data.loader import EvaluationStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.encoders import weights
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.evaluate.attention import Query, distances, places
from ssl_vit.recipes import FOLDER, Pretrain
from ssl_vit.report.format import per_cent, plain
from ssl_vit.report.page import Page, png
from ssl_vit.runtime import command
from ssl_vit.train import checkpoint

TABLES = ("attention_distance.csv", "position_similarity.csv", "features.csv", "neighbours.csv")


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


COMPONENTS = 28  # of the filters, as in the paper's Figure 7
NEIGHBOURS = 7


class Portrait:
    """What was found of an encoder, as a page, tables and numbers; `notes` say what does not apply to it."""

    def __init__(
        self, options: "Analyze", encoder: weights.AnyEncoder, split: Manifest, stream: EvaluationStream, found: Found
    ):
        self.options, self.encoder, self.split, self.stream, self.found = options, encoder, split, stream, found
        self.page = Page(f"Inside {options.encoder}")
        self.notes: list[str] = []
        self.tables: dict[str, list[Sequence[Any]]] = {}
        self.numbers: dict[str, Any] = {"encoder": options.encoder, "title": encoder.config.title}
        self.images = [image.permute(1, 2, 0).numpy() for batch in found.drawn for image in batch["image"]]
        self.vectors, self.labels = torch.cat(found.features), torch.cat(found.labels).numpy()
        self.layers = {name: number for number, (name, _) in enumerate(places(encoder), start=1)}
        self.ids = np.asarray(stream.ids)[torch.cat(found.at).numpy()]

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
        sections += [self.positions, self.reconstructions, self.features, self.neighbours]
        for section in sections:
            section()
        if self.notes:
            self.page.section("What does not apply")
            for note in self.notes:
                self.page.text(plain(note))
        self.page.section("To repeat it")
        self.page.code(command())
        self.numbers |= {"samples": self.ids.tolist(), "not_drawn": self.notes, "command": command()}

    def rollout(self) -> None:
        """Attention rollout over the images (paper Figure 6)."""
        found = {query: torch.cat(parts).numpy() for query, parts in self.found.rollouts.items()}
        if not found:
            self.notes.append(f"attention rollout: {self._no_attention()}")
            return
        drawn, names = [[image] for image in self.images], ["image"]
        for query, one in found.items():
            names += [{"class": "class token", "mean": "mean of patches"}[query], "its map"]
            for row, values in zip(drawn, one.reshape(-1, *self.encoder.grid), strict=True):
                row += [figures.shaded(row[0], values, self.encoder.stride), values]
        self.page.section("Attention rollout")
        self.page.text(
            "Bright is what reaches the output through the attention of all layers: heads averaged, the identity "
            "added, layers multiplied (paper D.8); beside it the map itself, from its least to its largest value. "
            "Masked patch prediction trains no class token: there look at the mean of the patches."
        )
        self.page.picture("rollout", "attention rollout", figures.tiles(drawn, names, 1.4))
        self.numbers["rollout"] = {query: one.tolist() for query, one in found.items()}

    def _no_attention(self) -> str:
        title = self.encoder.config.title
        if not self.layers:
            return f"{title} has no attention that can be looked into"
        return f"not every attention layer of {title} is among all patches; windows, channels or class tokens are not"

    def attention(self) -> None:
        """Maps of the layers and heads that were asked for."""
        query = self.options.query
        for name, parts in self.found.maps.items():
            maps, layer = torch.cat(parts), self.layers[name]  # [B, heads, N]
            heads = self.options.heads or tuple(range(1, maps.shape[1] + 1))
            shown = maps[:, [head - 1 for head in heads]].unflatten(2, self.encoder.grid).numpy()
            rows = [[image, *shown[n]] for n, image in enumerate(self.images)]
            self.page.section(f"Attention of layer {layer}")
            who = "the class token looks" if query == "class" else "patches look on average"
            self.page.text(f"Where {who}, a column a head; each map by its own largest value.")
            figure = figures.tiles(rows, ["image", *(f"head {head}" for head in heads)], 1.0, vmin=0)
            self.page.picture(f"attention-{layer}", f"attention of layer {layer}", figure)
        if not self.found.maps and self.layers:
            self.notes.append(f"attention maps: {self._no_attention()}")

    def distance(self) -> None:
        """Mean attention distance by layer and head (paper Figure 7, right)."""
        found = self.found.mean_distances()
        if not found:
            self.notes.append(f"mean attention distance: {self._no_attention()}")
            return
        grid, stride = self.encoder.grid, self.encoder.stride
        patches = grid[0] * grid[1]
        equal = float(distances(torch.ones(1, 1, patches, patches, dtype=torch.float64), grid, stride))
        count = sum(map(len, next(iter(self.found.distances.values()))))
        layers = {self.layers[name]: heads.tolist() for name, heads in found.items()}
        if len(layers) < len(self.layers):
            self.notes.append(f"attention distance of {len(self.layers) - len(layers)} layers: {self._no_attention()}")
        self.page.section("Mean attention distance")
        self.page.text(
            f"A dot a head: how far from a patch it looks, in pixels, the mean over {count} images (paper D.7). Class "
            "and register tokens are left out, and rows normalised again. Equal attention to all patches has "
            f"{equal:.1f}."
        )
        self.page.picture("distance", "mean attention distance", figures.distance_dots(layers, equal))
        table = [(layer, head + 1, value) for layer, heads in layers.items() for head, value in enumerate(heads)]
        self.tables["attention_distance.csv"] = [("layer", "head", "pixels"), *table]
        self.numbers["attention_distance"] = {"layers": layers, "equal_attention": equal, "images": count}

    def filters(self) -> None:
        """Principal components of what meets the pixels first (paper Figure 7, left)."""
        conv = collect.first_convolution(self.encoder)
        if conv is None:
            self.notes.append(f"filters: {self.encoder.config.title} has no convolution that meets the pixels")
            return
        components, variance = collect.principal_components(conv.weight.detach().cpu())
        share = (variance / variance.sum().clamp(min=1e-300)).tolist()
        what = (
            "patch embedding" if conv.stride == conv.kernel_size else "first convolution, behind which patches are cut"
        )
        self.page.section("Filters")
        shown = components[:COMPONENTS]
        self.page.text(
            f"The first {len(shown)} principal components of the filters of the {what} ({len(conv.weight):,} of "
            f"{' x '.join(map(str, conv.kernel_size))} pixels), with their share of the variance (paper 4.5)."
        )
        titles = [f"{value:.1%}" for value in share]
        self.page.picture("filters", "principal components of the filters", figures.filter_tiles(shown.numpy(), titles))
        self.numbers["filters"] = {"of": what, "variance": share}

    def positions(self) -> None:
        """Similarity of the positions of patches (paper Figure 7, centre)."""
        table = collect.position_table(self.encoder)
        if table is None:
            self.notes.append(f"position similarity: {self.encoder.config.title} has no table of positions")
            return
        alike = collect.similarity(table).cpu().numpy()
        self.page.section("Positions")
        self.page.text("One tile a patch: how similar its position is to that of each patch (paper Figure 7, centre).")
        figure = figures.similarity_tiles(alike, self.encoder.grid)
        self.page.picture("positions", "similarity of positions", figure)
        self.tables["position_similarity.csv"] = alike.round(6).tolist()

    def reconstructions(self) -> None:
        """What the head that it was pretrained with makes of the images, where a run still has it."""
        try:
            head = self._head()
        except (Refusal, ValueError, KeyError, RuntimeError, OSError) as error:
            self.notes.append(f"reconstructions: {' '.join(str(error).split())[:200]}")
            return
        self.page.section("Reconstructions")
        self.page.text(
            "Columns: the image; what the encoder saw (masked patches grey, swapped ones framed in red, kept ones in "
            "white); what was predicted; what was true; the error, the brighter the larger."
        )
        batch = {name: torch.cat([one[name] for one in self.found.drawn]) for name in self.found.drawn[0]}
        device = next(self.encoder.parameters()).device
        picture = head.to(device).eval().panel(self.encoder, {name: value.to(device) for name, value in batch.items()})
        self.page.image("reconstruction", "reconstructions", png(picture))

    def _head(self) -> Any:
        """The head of the run that the encoder is from, with its last weights; raises where there is none."""
        folder = Path(str(self.options.encoder))
        kept = checkpoint.steps(folder / "checkpoints")
        if not kept or not (folder / "recipe.yaml").is_file():
            raise Refusal(USAGE, "the head is in the checkpoints of a pretraining; give its run as encoder=")
        try:
            recipe = config.parse(Pretrain, [f"recipe={folder / 'recipe.yaml'}"], FOLDER)
        except Refusal as error:
            raise Refusal(USAGE, "its run is no pretraining, so it has no head that predicts patches") from error
        head = recipe.head.build(self.encoder, 1)
        if not hasattr(head, "panel"):
            raise Refusal(USAGE, f"head.kind={recipe.head.kind} predicts nothing that could be drawn")
        saved = checkpoint.trained(kept[-1])
        head.load_state_dict({n.removeprefix("head."): v for n, v in saved.items() if n.startswith("head.")})
        return head

    def features(self) -> None:
        """Features of all images in two dimensions, coloured by class."""
        if self.options.projection == "tsne":
            at, axes = _tsne(self.vectors, self.options.seed), ("", "")
            what = "t-SNE keeps neighbours; distances between groups mean little"
        else:
            at, share = collect.two_dimensions(self.vectors)
            axes = f"component 1, {share[0]:.1%} of the variance", f"component 2, {share[1]:.1%}"
            what = "the first two principal components"
        self.page.section("Features")
        self.page.text(f"{len(self.vectors):,} images by their features ({_READOUTS[self.options.readout]}): {what}.")
        figure = figures.scatter(at.numpy(), self.labels, self.split.classes, axes)
        self.page.picture("features", "features of images", figure)
        places = zip(self.ids.tolist(), self.labels.tolist(), at.tolist(), strict=True)
        rows = [(sample, self._named(label), *place) for sample, label, place in places]
        self.tables["features.csv"] = [("sample", "class", "x", "y"), *rows]

    def neighbours(self) -> None:
        """For some images those whose features are nearest."""
        vectors = self.vectors
        asked = torch.arange(len(self.images))
        near = collect.nearest(vectors, asked, NEIGHBOURS)
        rows = [[image, *(self._image(n) for n in near[i].tolist())] for i, image in enumerate(self.images)]
        self.page.section("Nearest neighbours")
        every = collect.nearest(vectors, torch.arange(len(vectors)), 1)[:, 0].numpy()
        known = (self.labels >= 0) & (self.labels[every] >= 0)
        share = float((self.labels[every] == self.labels)[known].mean()) if known.any() else None
        same = (
            "" if share is None else f" The nearest of all is of the same class for {per_cent(share)} % of the images."
        )
        self.page.text(f"First column: the image; then those with the most similar features, by cosine.{same}")
        self.page.picture("neighbours", "nearest neighbours", figures.tiles(rows, ["image", "nearest"], 1.1))
        table = [(int(self.ids[i]), *self.ids[near[i].numpy()].tolist()) for i in range(len(asked))]
        self.tables["neighbours.csv"] = [("sample", *(f"nearest{n + 1}" for n in range(near.shape[1]))), *table]
        self.numbers["nearest_of_same_class"] = share

    def _image(self, place: int) -> np.ndarray:
        image, _ = self.stream.samples.sample(int(self.ids[place]), 0)
        return image.permute(1, 2, 0).numpy()

    def _named(self, label: int) -> str:
        return self.split.classes[label] if label >= 0 else ""


_READOUTS = {"mean": "mean of the patch tokens", "class": "class token"}


def _tsne(features: Tensor, seed: int) -> Tensor:
    """Features [M, D] as places [M, 2]; the usual perplexity, less where images are few."""
    if importlib.util.find_spec("sklearn") is None:
        raise Refusal(USAGE, "projection=tsne needs scikit-learn: pip install 'ssl_vit[demo]', or projection=pca")
    from sklearn.manifold import TSNE

    near = min(30.0, (len(features) - 1) / 3)
    made = TSNE(2, perplexity=near, init="pca", random_state=seed).fit_transform(features.numpy())
    return torch.from_numpy(made)
