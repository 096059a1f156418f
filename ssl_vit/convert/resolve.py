"""What a path of data means: a set of shards, a URL, a pattern, or images that are converted first."""

import re
from pathlib import Path
from typing import Any, TypeVar

from ssl_vit.convert import image_list
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.convert.shard_writer import SHARD_STATE_DIR
from ssl_vit.data import manifest, remote
from ssl_vit.data.cache import CacheDir
from ssl_vit.data.manifest import MANIFEST_FILE, Manifest
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.rng import hash_key
from ssl_vit.runtime import world_size

Value = TypeVar("Value")
SPLIT_FOLDERS = {
    "train": ("train",),
    "val": ("val", "validation", "valid", "test"),
}  # of a split's folder, the first that is


def resolve_manifest(
    paths: tuple[str, ...], split: str, output_root: Path, cache_dir: CacheDir, may_convert: bool = True
) -> Manifest:
    """The manifest of one or several sets; of one that holds splits, `split` (train or val) is taken.

    A folder of images is converted first, into a folder under `converted`. ExitError(DATA) where a set is missing,
    has tars but no manifest, or would have to be converted and `may_convert` is False.
    """
    return manifest.join_manifests([_resolve_path(path, split, output_root, cache_dir, may_convert) for path in paths])


def _resolve_path(path: str, split: str, output_root: Path, cache_dir: CacheDir, may_convert: bool) -> Manifest:
    if remote.is_url(path):
        return _fetch_from_url(remote.check_url(path), split, cache_dir)
    folder = Path(path)
    if path.endswith(".tar") or not folder.is_dir() or (folder / MANIFEST_FILE).exists():
        if re.search(r"[{*?]|\.tar$", path):
            hint = f"index them: tools/index_shards.py shards='{path}'"
            raise ExitError(
                ExitCode.DATA, f"{path}: names tars; {hint}, then give the folder, or set data.reader=webdataset"
            )
        return manifest.load(folder, cache_dir)
    splits = {p.parent.name: p.parent for p in folder.glob(f"*/{MANIFEST_FILE}")}
    if splits:
        return manifest.load(_select_split(splits, split, path), cache_dir)
    if (folder / SHARD_STATE_DIR).exists() or any(folder.glob(f"*/{SHARD_STATE_DIR}")):
        raise ExitError(
            ExitCode.DATA, f"{folder}: has no {MANIFEST_FILE}: its conversion did not end; run make_shards again"
        )
    if any(folder.glob("*.tar")) or any(folder.glob("*/*.tar")):
        hint = f"index them first: tools/index_shards.py shards={folder}"
        raise ExitError(
            ExitCode.DATA, f"{folder}: has tars but no {MANIFEST_FILE}; {hint} (or set data.reader=webdataset)"
        )
    return _convert_images(folder, split, output_root, may_convert)


def _fetch_from_url(url: str, split: str, cache_dir: CacheDir) -> Manifest:
    if url.endswith(".tar"):
        hint = f"index them: tools/index_shards.py shards='{url}' output=FOLDER"
        raise ExitError(ExitCode.DATA, f"{url}: names tars; {hint}, or set data.reader=webdataset")
    for candidate in (url, *(f"{url}/{name}" for name in SPLIT_FOLDERS[split])):
        fetched = manifest.fetch_manifest(candidate, cache_dir)
        if fetched is not None:
            return fetched
    hint = "shards that others wrote need tools/index_shards.py, or data.reader=webdataset"
    raise ExitError(
        ExitCode.DATA,
        f"{url}: has no {MANIFEST_FILE}, nor has a folder {' or '.join(SPLIT_FOLDERS[split])} in it; {hint}",
    )


def _convert_images(folder: Path, split: str, output_root: Path, may_convert: bool) -> Manifest:
    listing = image_list.read_listing(folder, 0.0)
    names = [name for part in listing.splits.values() for name in part]
    sources = image_list.list_sources(listing, sorted(names), {})  # other images in it are another data set
    target = output_root / f"{folder.resolve().name}-{hash_key(str(folder.resolve()), *map(str, sources)):016x}"
    command = f"tools/make_shards.py input={folder} output={target}"
    if not may_convert:
        raise ExitError(
            ExitCode.DATA, f"{folder}: is a folder of images, which several processes cannot convert; first: {command}"
        )
    print(f"{folder} is a folder of images; doing {command}", flush=True)
    manifests = convert_images(MakeShards(input=str(folder), output=str(target)))
    return (
        manifests[""]
        if "" in manifests
        else manifests[_select_split({name: name for name in manifests}, split, str(folder))]
    )


def _select_split(splits: dict[str, Value], split: str, path: str) -> Value:
    selected = next((splits[name] for name in SPLIT_FOLDERS[split] if name in splits), None)
    if selected is None:
        raise ExitError(ExitCode.DATA, f"{path}: has no split {split}, only {', '.join(sorted(splits))}")
    return selected


def resolve_for_recipe(recipe: Any, paths: tuple[str, ...], split: str) -> Manifest:
    """A set of a recipe or an evaluation, converted first where it is images; raises ExitError.

    Where a benchmark's data is missing, how to get it is said too.
    """
    output_root = Path(recipe.run).parent / "shards"
    try:
        return resolve_manifest(
            paths, split, output_root=output_root, cache_dir=recipe.data.cache_dir, may_convert=world_size() == 1
        )
    except ExitError as error:
        benchmark = getattr(recipe, "benchmark", None)
        if benchmark is None or benchmark.get is None or error.code != ExitCode.DATA:
            raise
        message = f"{error}; {benchmark.name or 'its data'}: {benchmark.get}"
        raise ExitError(ExitCode.DATA, message, error.shared) from error
