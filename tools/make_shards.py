"""Convert a folder of images to WebDataset shards: tools/make_shards.py input=DIR output=DIR [key=value ...]"""

import sys
from pathlib import Path

from ssl_vit import config, exits
from ssl_vit.data.shards import REJECTS, MakeShards, convert


def main(arguments: list[str]) -> int:
    if config.usage(arguments):
        print(f"{__doc__}\n\n{config.describe(MakeShards)}")
        return 0
    options = config.parse(MakeShards, arguments, Path("recipes"))
    for made in convert(options).values():
        rejected = made.job["rejects"]
        note = f", {rejected} rejected (see {made.folder / REJECTS})" if rejected else ""
        print(f"{made.folder}: {made.samples} samples, {len(made.classes)} classes, {len(made.shards)} shards{note}")
    return 0


if __name__ == "__main__":
    sys.exit(exits.run(main))
