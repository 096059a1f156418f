"""Convert images to WebDataset shards: tools/make_shards.py input=DIR output=DIR [key=value ...]

On several machines, or to use a launcher's processes: torchrun ... tools/make_shards.py (or srun); each writes its
share of the shards, and the one that ends last writes the manifest.
"""

import os

from ssl_vit.convert.make_shards import REJECTS, convert_images
from ssl_vit.convert.make_shards import MakeShards as Config


def run(options: Config) -> int:
    """Write the shards and print one line per split; returns the exit code."""
    rank, world = rank_and_world()
    manifests = convert_images(options, rank, world)
    for split in manifests.values():
        rejected, duplicates = split.job["rejects"], split.job.get("duplicates")
        note = f", {rejected} rejected (see {split.name}/{REJECTS})" if rejected else ""
        note += f", {duplicates} equal to an earlier one" if duplicates else ""
        print(f"{split.name}: {split.samples} samples, {len(split.classes)} classes, {len(split.shards)} shards{note}")
    if not manifests:
        print(f"process {rank} of {world}: its shards are done; the one that ends last writes the manifest")
    return 0


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many torchrun, accelerate or srun started."""
    names = [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]
    return next(((int(os.environ[r]), int(os.environ[w])) for r, w in names if w in os.environ), (0, 1))
