"""Classify a folder of images: python tools/predict.py encoder=runs/NAME input=IMAGES output=predictions.csv"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ssl_vit import config
from ssl_vit.convert import image_list
from ssl_vit.data.dataset import BadSample, Data, SampleDataset, printable
from ssl_vit.data.loader import EvaluationStream, ProcessShard
from ssl_vit.data.manifest import Manifest
from ssl_vit.encoders import weights
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate.metrics import TOP_K, write_table
from ssl_vit.model import pool_tokens


class Config(config.Config):
    """Classify the images of a folder."""

    encoder: str = Field(description="a fine-tuning run, its classifier/ folder, a classifier's weights, or timm:NAME")
    input: str = Field(description="folder of images, of any depth")
    output: str = Field(default="predictions.csv", description="the table to write: .csv or .parquet")
    image_size: int | None = Field(default=None, ge=1, description="input size, pixels (none: the classifier's)")
    batch: int = Field(default=64, ge=1, description="images at once")
    workers: int | None = Field(default=None, ge=0, description="loader processes (none: by the cores)")
    quiet: bool = Field(default=False, description="no closing line")


class ImageFiles(SampleDataset):
    """Images of a folder as samples."""

    def __init__(self, root: Path, names: list[str], data: Data):
        super().__init__(Manifest(root, {}, [], []), data, seed=0, training=False)
        self.root, self.names = root, names

    def read_sample(self, sample: int) -> tuple[bytes, int]:
        """The bytes of a file; raises BadSample where it cannot be read."""
        try:
            return (self.root / self.names[sample]).read_bytes(), -1
        except OSError as error:
            raise BadSample(f"{self.describe_sample(sample)} cannot be read: {error.strerror}") from error

    def describe_sample(self, sample: int) -> str:
        """The path of a file."""
        return str(self.root / self.names[sample])


def run(recipe: Config) -> int:
    """Write the table; returns the exit code. Images that cannot be read have empty cells, and are named."""
    output = Path(recipe.output)
    if output.suffix not in (".csv", ".parquet"):
        raise ExitError(ExitCode.USAGE, f"output={output}: give a name that ends in .csv or .parquet")
    if not output.parent.is_dir():
        raise ExitError(ExitCode.CANNOT_CREATE, f"output={output}: there is no folder {output.parent}")
    names, _ = image_list.list_images(Path(recipe.input))
    encoder, head = weights.read_classifier(recipe.encoder)
    size = recipe.image_size or encoder.config.image
    if encoder.channels != 3:
        text = f"takes {encoder.channels} channels; images are read as RGB, which has 3"
        raise ExitError(ExitCode.USAGE, f"{recipe.encoder}: {text}")
    if size != encoder.config.image:
        source = encoder.config
        try:
            encoder = source.model_copy(update={"image": size}).build().eval()
        except ValueError as error:
            raise ExitError(ExitCode.USAGE, f"image_size={size}: {error}") from error
        weights.load_weights(encoder, source, weights.read_source(recipe.encoder, classifier=True)[1], recipe.encoder)
    data = Data(image_size=size, eval_crop=head.crop, workers=recipe.workers)
    stream = EvaluationStream.from_dataset(ImageFiles(Path(recipe.input), names, data), len(names), recipe.batch)
    predictions: list[list[Any] | None] = [None] * len(names)
    for index, cells in _predict(encoder, head, stream):
        predictions[index] = cells
    faults = stream.faults.drain()
    for fault in faults[:10]:
        print(f"left out: {printable(fault.reason)}", flush=True)
    if stream.faults.fatal:
        raise stream.faults.fatal
    if len(faults) == len(names):
        raise ExitError(ExitCode.DATA, f"{recipe.input}: not one of its {len(names)} images can be read")
    top = min(TOP_K, head.num_classes)
    columns = ["file", *(f"{prefix}{i + 1}" for i in range(top) for prefix in ("top", "score"))]
    empty = [None] * 2 * top
    write_table(columns, [[name, *(cells or empty)] for name, cells in zip(names, predictions, strict=True)], output)
    if not recipe.quiet:
        print(f"{output}: {len(names) - len(faults)} images classified, {len(faults)} could not be read", flush=True)
    return 0


@torch.no_grad()
def _predict(
    encoder: weights.AnyEncoder, head: weights.PretrainedClassifier, stream: EvaluationStream
) -> Iterator[tuple[int, list[Any]]]:
    """For every image that can be read: its place, and its best classes with their probabilities."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, weight, bias = encoder.to(device), head.weight.to(device), head.bias.to(device)
    for start, batch in stream.enumerate_batches(ProcessShard(micro_batch=stream.batch), device):
        features = pool_tokens(encoder(batch["image"]), encoder.pool, encoder.prefix)
        scores, top = torch.softmax(features @ weight.T + bias, 1).topk(min(TOP_K, head.num_classes))
        for row in torch.nonzero(batch["valid"])[:, 0].tolist():
            pairs = zip(top[row].tolist(), scores[row].tolist(), strict=True)
            yield start + row, [cell for label, score in pairs for cell in (head.names[label], score)]
