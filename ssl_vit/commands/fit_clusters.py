"""Fit the classes of head.kind=clusters to shards: tools/fit_clusters.py data.train=FOLDER clusters=512 output=FILE

k-means of patches (space=patch, as iBOT's Table 20 has it) or of mean colors (space=color), cropped as in training.
Then: tools/pretrain.py recipe=mpp_clusters head.codebook=FILE
"""

from pathlib import Path

import torch
from pydantic import Field

from ssl_vit import config
from ssl_vit.convert import resolve
from ssl_vit.data.dataset import Data
from ssl_vit.data.loader import ProcessShard, TrainingStream, split_holdout
from ssl_vit.data.webdataset_stream import TarList
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.heads import clusters
from ssl_vit.heads.clusters import ClusterSpace

BATCH_SIZE = 64  # images at once


class Config(config.Config):
    """What is clustered, and into how many."""

    data: Data = Data()
    patch: int = Field(default=16, ge=1, description="side of the encoder's patches, pixels")
    space: ClusterSpace = Field(default="patch", description="cluster mean colors, or whole patches")
    clusters: int = Field(default=4096, ge=2, description="how many; the head has as many outputs")
    images: int = Field(default=10_000, ge=1, description="images to take patches from, cropped as in training")
    points: int = Field(default=200_000, ge=2, description="patches to fit, drawn from all images alike")
    seed: int = Field(default=0, ge=0, description="of crops, patches and centers")
    output: str = Field(default="runs/codebook.safetensors", min_length=1, description="file to write")

    @property
    def run(self) -> str:
        """Beside which images are converted."""
        return self.output


def run(options: Config) -> int:
    """Fit a codebook, write it and print what it leaves; returns the exit code."""
    if options.data.train is None:
        raise ExitError(ExitCode.USAGE, "data.train: it must be given: a folder of shards, or of images")
    output = Path(options.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExitError(ExitCode.CANNOT_CREATE, f"output={output}: {error.strerror}; name another file") from error
    if output.is_dir():
        raise ExitError(ExitCode.CANNOT_CREATE, f"output={output}: is a folder; name a file in it")
    train = resolve.resolve_for_recipe(options, options.data.train, "train")
    assert not isinstance(train, TarList)
    points = sample_vectors(options, TrainingStream(train, options.data, options.seed, BATCH_SIZE), train.samples)
    if len(points) < options.clusters:
        raise ExitError(ExitCode.DATA, f"clusters={options.clusters}: {len(points)} patches are too few to fit them to")
    centers = clusters.fit_kmeans(points, options.clusters, options.seed)
    assignments = clusters.nearest_center(points[None], centers)[0]
    frequencies = assignments.bincount(minlength=options.clusters).double() / len(assignments)
    entropy = float(-(frequencies * frequencies.clamp(min=1e-12).log()).sum())
    metadata = {"space": options.space, "patch": str(options.patch), "seed": str(options.seed), "data": train.identity}
    clusters.write_codebook(output, centers, metadata)
    error = float((points - centers[assignments]).square().mean() / (points - points.mean(0)).square().mean())
    print(
        f"{options.output}: {options.clusters} clusters of {len(points):,} {options.space} vectors; they leave "
        f"{error:.1%} of the variance, the commonest holds {float(frequencies.max()):.1%}, entropy {entropy:.2f} nats"
    )
    return 0


def sample_vectors(options: Config, stream: TrainingStream, samples: int) -> torch.Tensor:
    """About `points` vectors [M, d] of the first `images` of the stream, equally many of each."""
    count = min(options.images, len(split_holdout(samples, options.data)[0]))
    per_image = max(1, options.points // count)
    generator = torch.Generator().manual_seed(options.seed)
    chunks, remaining = [], count
    for batch in stream.batches(0, ProcessShard(micro_batch=BATCH_SIZE), torch.device("cpu")):
        height, width = batch["image"].shape[2:]
        if height % options.patch or width % options.patch:
            raise ExitError(ExitCode.USAGE, f"patch={options.patch} does not divide data.image_size={height},{width}")
        for vectors in clusters.patch_vectors(batch["image"][:remaining], options.patch, options.space):
            chunks.append(vectors[torch.randperm(len(vectors), generator=generator)[:per_image]])
        remaining -= BATCH_SIZE
        if remaining <= 0:
            break
    return torch.cat(chunks)
