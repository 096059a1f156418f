"""Index WebDataset shards that others wrote: tools/index_shards.py shards=FOLDER|URL|PATTERN [key=value ...]

Scans every byte once, writes manifest.json and an index a shard (beside the shards, or into output=), and says what it
cannot use. Afterwards data.train= takes the folder as any other.
"""

import sys
from pathlib import Path

from ssl_vit import config, errors
from ssl_vit.convert.index_shards import IndexShards, index_tars


def main(arguments: list[str]) -> int:
    if config.wants_help(arguments):
        print(f"{__doc__}\n\n{config.format_help(IndexShards)}")
        return 0
    index_tars(config.parse(IndexShards, arguments, Path("recipes")))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run_main(main))
