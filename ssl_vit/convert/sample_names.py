"""What a shard's samples are called: the path of the image that was converted, or the key that others gave it."""

import json
import os

from ssl_vit.data.manifest import Manifest
from ssl_vit.data.tar import Member, iter_members
from ssl_vit.errors import ExitCode, ExitError


def read_sample_names(manifest: Manifest) -> list[str]:
    """A name for every sample, by id: what `path` in its KEY.json says, or `SHARD/KEY`."""
    sample_names: list[str] = []
    for number, shard in enumerate(manifest.shards):
        stem = shard.name.removesuffix(".tar")
        offsets = manifest.index(number)["offset"].tolist()
        path = manifest.tar(number)
        keys: dict[int, str] = {}
        paths: dict[str, str] = {}
        handle = os.open(path, os.O_RDONLY)
        try:
            for member in (item for item in iter_members(path) if isinstance(item, Member)):
                keys[member.offset] = member.name.partition(".")[0]
                if member.name.endswith(".json"):
                    paths |= _read_path(keys[member.offset], os.pread(handle, min(member.size, 1 << 16), member.offset))
        finally:
            os.close(handle)
        missing = sum(offset not in keys for offset in offsets)
        if missing:
            raise ExitError(
                ExitCode.DATA, f"{manifest.describe_shard(number)}: {missing} samples of its index are not in it"
            )
        sample_names += [paths.get(keys[offset], f"{stem}/{keys[offset]}") for offset in offsets]
    return sample_names


def _read_path(key: str, text: bytes) -> dict[str, str]:
    try:
        path = json.loads(text)["path"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {key: path} if isinstance(path, str) else {}
