"""What a shard's samples are called: the path of the image that was converted, or the key that others gave it."""

import json
import os

from ssl_vit.data.manifest import Manifest
from ssl_vit.data.tar import Member, walk
from ssl_vit.errors import DATA, Refusal


def names(manifest: Manifest) -> list[str]:
    """A name for every sample, by id: what `path` in its KEY.json says, or `SHARD/KEY`."""
    found: list[str] = []
    for number, shard in enumerate(manifest.shards):
        stem = shard.name.removesuffix(".tar")
        offsets = manifest.index(number)["offset"].tolist()
        path = manifest.tar(number)
        keys: dict[int, str] = {}
        said: dict[str, str] = {}
        handle = os.open(path, os.O_RDONLY)
        try:
            for member in (one for one in walk(path) if isinstance(one, Member)):
                keys[member.offset] = member.name.partition(".")[0]
                if member.name.endswith(".json"):
                    said |= _path(keys[member.offset], os.pread(handle, min(member.size, 1 << 16), member.offset))
        finally:
            os.close(handle)
        missing = sum(offset not in keys for offset in offsets)
        if missing:
            raise Refusal(DATA, f"{manifest.where(number)}: {missing} samples of its index are not in it")
        found += [said.get(keys[offset], f"{stem}/{keys[offset]}") for offset in offsets]
    return found


def _path(key: str, text: bytes) -> dict[str, str]:
    try:
        path = json.loads(text)["path"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {key: path} if isinstance(path, str) else {}
