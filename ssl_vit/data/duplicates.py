"""Equal images, by the sha256 of their files: within a data set, across its splits, and with other sets."""

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.data.manifest import Manifest
from ssl_vit.data.pool import do
from ssl_vit.data.tar import Member, walk
from ssl_vit.data.write import DIGEST
from ssl_vit.exits import DATA, Refusal

MAX_JSON = 1 << 20  # bytes of a sample's JSON that are read


def held(manifests: list[Manifest], workers: int) -> np.ndarray:
    """The sorted digests of all images of some sets: of their bytes, and of the files they were made from.

    Raises Refusal(DATA) where a shard is damaged: what it lost would not be left out.
    """
    pieces = [(m, n) for m in range(len(manifests)) for n in range(len(manifests[m].shards))]
    found = do(pieces, workers, _of_shard, lambda piece: (manifests[piece[0]].tar(piece[1]),))
    return np.unique(np.concatenate([np.empty(0, DIGEST), *(digests for _, digests in found)]))


def _of_shard(tar: Path) -> np.ndarray:
    digests = []
    with tar.open("rb") as file:
        for member in walk(tar):
            if not isinstance(member, Member):
                raise Refusal(DATA, f"{tar}: {member.reason} at byte {member.offset}; tools/verify_shards.py says more")
            suffix = member.name.rsplit(".", 1)[-1].lower()
            if suffix in ("jpg", "jpeg", "png", "webp"):
                digests.append(hashlib.sha256(os.pread(file.fileno(), member.size, member.offset)).digest())
            elif suffix == "json" and member.size <= MAX_JSON:
                digests += _said(os.pread(file.fileno(), member.size, member.offset))
    return np.frombuffer(b"".join(digests), DIGEST)


def _said(data: bytes) -> list[bytes]:
    """The digest of the original that a sample's JSON names: ours, and img2dataset's."""
    try:
        digest = bytes.fromhex(json.loads(data)["sha256"])
    except (ValueError, TypeError, KeyError):
        return []
    return [digest] if len(digest) == DIGEST.itemsize else []


def across(splits: dict[str, tuple[np.ndarray, list[str]]]) -> Iterator[dict[str, Any]]:
    """A row for each image that stands in more than one split: its sha256, and its (first) path in each of the two.

    `splits` holds for each split the digests (DIGEST, empty = none) and paths of its images.
    """
    firsts = {split: np.unique(digests, return_index=True) for split, (digests, _) in splits.items()}
    for one, other in combinations(splits, 2):
        common, mine, theirs = np.intersect1d(firsts[one][0], firsts[other][0], return_indices=True)
        for digest, a, b in zip(common, mine, theirs, strict=True):
            if digest:
                paths = {one: splits[one][1][firsts[one][1][a]], other: splits[other][1][firsts[other][1][b]]}
                yield {"sha256": bytes(digest).ljust(32, b"\0").hex(), **paths}


def within(digests: np.ndarray) -> int:
    """How many images are equal to an earlier one of the same split."""
    known = digests[digests != b""]
    return len(known) - len(np.unique(known))
