"""What a path of data means: a set of shards, a URL, a pattern, or images that are converted first."""

import re
from pathlib import Path
from typing import Any, TypeVar

from ssl_vit.convert import image_list
from ssl_vit.convert.make_shards import MakeShards, convert
from ssl_vit.convert.shard_writer import NOTES
from ssl_vit.data import manifest, remote
from ssl_vit.data.cache import Store
from ssl_vit.data.manifest import FILE, Manifest
from ssl_vit.errors import DATA, Refusal
from ssl_vit.rng import key
from ssl_vit.runtime import world

Value = TypeVar("Value")
NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "test")}  # of a split's folder, the first that is


def sets(paths: tuple[str, ...], split: str, converted: Path, store: Store, may_convert: bool = True) -> Manifest:
    """The manifest of one or several sets; of one that holds splits, `split` (train or val) is taken.

    A folder of images is converted first, into a folder under `converted`. Raises Refusal(DATA) where a set is missing,
    has tars but no manifest, or would have to be converted and `may_convert` is False.
    """
    return manifest.join([_one(path, split, converted, store, may_convert) for path in paths])


def _one(path: str, split: str, converted: Path, store: Store, may_convert: bool) -> Manifest:
    if remote.is_url(path):
        return _at_url(remote.check(path), split, store)
    given = Path(path)
    if path.endswith(".tar") or not given.is_dir() or (given / FILE).exists():
        if re.search(r"[{*?]|\.tar$", path):
            cure = f"index them: tools/index_shards.py shards='{path}'"
            raise Refusal(DATA, f"{path}: names tars; {cure}, then give the folder, or set data.reader=webdataset")
        return manifest.load(given, store)
    parts = {p.parent.name: p.parent for p in given.glob(f"*/{FILE}")}
    if parts:
        return manifest.load(_part(parts, split, path), store)
    if (given / NOTES).exists() or any(given.glob(f"*/{NOTES}")):
        raise Refusal(DATA, f"{given}: has no {FILE}: its conversion did not end; run make_shards again")
    if any(given.glob("*.tar")) or any(given.glob("*/*.tar")):
        cure = f"index them first: tools/index_shards.py shards={given}"
        raise Refusal(DATA, f"{given}: has tars but no {FILE}; {cure} (or set data.reader=webdataset)")
    return _of_images(given, split, converted, may_convert)


def _at_url(url: str, split: str, store: Store) -> Manifest:
    if url.endswith(".tar"):
        cure = f"index them: tools/index_shards.py shards='{url}' output=FOLDER"
        raise Refusal(DATA, f"{url}: names tars; {cure}, or set data.reader=webdataset")
    for place in (url, *(f"{url}/{name}" for name in NAMES[split])):
        found = manifest.fetch(place, store)
        if found is not None:
            return found
    cure = "shards that others wrote need tools/index_shards.py, or data.reader=webdataset"
    raise Refusal(DATA, f"{url}: has no {FILE}, nor has a folder {' or '.join(NAMES[split])} in it; {cure}")


def _of_images(given: Path, split: str, converted: Path, may_convert: bool) -> Manifest:
    found = image_list.read(given, 0.0)
    names = [name for part in found.splits.values() for name in part]
    stamps = image_list.sources(found, sorted(names), {})  # other images in it are another data set
    target = converted / f"{given.resolve().name}-{key(str(given.resolve()), *map(str, stamps)):016x}"
    command = f"tools/make_shards.py input={given} output={target}"
    if not may_convert:
        raise Refusal(DATA, f"{given}: is a folder of images, which several processes cannot convert; first: {command}")
    print(f"{given} is a folder of images; doing {command}", flush=True)
    made = convert(MakeShards(input=str(given), output=str(target)))
    return made[""] if "" in made else made[_part({name: name for name in made}, split, str(given))]


def _part(parts: dict[str, Value], split: str, given: str) -> Value:
    found = next((parts[name] for name in NAMES[split] if name in parts), None)
    if found is None:
        raise Refusal(DATA, f"{given}: has no split {split}, only {', '.join(sorted(parts))}")
    return found


def found(recipe: Any, paths: tuple[str, ...], split: str) -> Manifest:
    """A set of a recipe or an evaluation, converted first where it is images; raises Refusal.

    Where a benchmark's data is missing, how to get it is said too.
    """
    converted = Path(recipe.run).parent / "shards"
    try:
        return sets(paths, split, converted=converted, store=recipe.data.store, may_convert=world() == 1)
    except Refusal as refusal:
        wanted = getattr(recipe, "benchmark", None)
        if wanted is None or wanted.get is None or refusal.code != DATA:
            raise
        text = f"{refusal}; {wanted.name or 'its data'}: {wanted.get}"
        raise Refusal(DATA, text, refusal.shared) from refusal
