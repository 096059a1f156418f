"""Index WebDataset shards that others wrote: tools/index_shards.py shards=FOLDER|URL|PATTERN [key=value ...]

Scans every byte once, writes manifest.json and an index a shard (beside the shards, or into output=), and says what it
cannot use. Afterwards data.train= takes the folder as any other.
"""

from ssl_vit.convert.index_shards import IndexShards as Config
from ssl_vit.convert.index_shards import index_tars


def run(options: Config) -> int:
    """Write the manifest and the indexes; returns the exit code."""
    index_tars(options)
    return 0
