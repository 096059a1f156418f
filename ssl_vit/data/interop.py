"""What other readers of WebDataset shards want to find beside them."""

import json

from ssl_vit.data.manifest import Manifest


def sizes(made: Manifest) -> bytes:
    """`sizes.json`, by which open_clip counts samples: file name -> samples."""
    return _encoded({shard.name: shard.samples for shard in made.shards})


def info(splits: dict[str, Manifest], below: bool) -> bytes:
    """`_info.json`, by which timm's `wds/` reader finds splits and counts; `below`: each split in its folder."""
    described = {}
    for split, made in splits.items():
        name = split or "train"
        described[name] = {
            "name": name,
            "num_samples": made.samples,
            "filenames": [f"{split}/{shard.name}" if below else shard.name for shard in made.shards],
            "shard_lengths": [shard.samples for shard in made.shards],
        }
    return _encoded({"splits": described})


def _encoded(content: object) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
