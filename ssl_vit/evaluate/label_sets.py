"""Right answers that are not one class of the split: sets for an image (ReaL), classes of other names (ObjectNet)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ssl_vit.errors import DATA, Refusal

NUMBERED = re.compile(r"_val_(\d{8})\b")  # how ImageNet numbers its validation images, from 1


def read_label_sets(path: str, keys: Sequence[str], classes: int) -> list[list[int]]:
    """The accepted class numbers of each image, from JSON; an empty set means that the image does not count.

    A list holds them in the order of the images' file names (ImageNet's by the number in the name, so that a part of
    the set will do); an object by file name. Raises Refusal(DATA).
    """
    content, files = _json(path), [PurePosixPath(key).name for key in keys]
    if isinstance(content, dict):
        if len(set(files)) != len(files):
            twice = next(name for name in files if files.count(name) > 1)
            raise Refusal(DATA, f"{path}: names files, and {twice} is the name of more than one image")
        missing = [name for name in files if name not in content]
        if missing:
            raise Refusal(DATA, f"{path}: has no labels for {len(missing)} images (such as {missing[0]})")
        sets = [content[name] for name in files]
    elif isinstance(content, list):
        sets = [content[place] for place in _places(path, files, len(content))]
    else:
        raise Refusal(DATA, f"{path}: not a JSON list or object of label lists")
    for name, one in zip(files, sets, strict=True):
        if not isinstance(one, list) or not all(type(n) is int and 0 <= n < classes for n in one):
            raise Refusal(DATA, f"{path}: {name} has {one!r:.60}, not a list of class numbers below {classes}")
    return sets


def _places(path: str, files: list[str], count: int) -> list[int]:
    found = [NUMBERED.search(name) for name in files]
    if all(found):
        places = [int(one[1]) - 1 for one in found if one]
        strange = [name for name, place in zip(files, places, strict=True) if not 0 <= place < count]
        if strange:
            raise Refusal(DATA, f"{path}: has {count} label sets, none for {strange[0]}")
        return places
    if len(set(files)) != len(files) or len(files) != count:
        text = f"has {count} label sets for {len(files)} images ({len(set(files))} file names)"
        raise Refusal(DATA, f"{path}: {text}; give an object by file name")
    order = {name: place for place, name in enumerate(sorted(files))}
    return [order[name] for name in files]


def read_class_map(path: str, folders: Sequence[str], classes: Sequence[str]) -> list[list[int]]:
    """For each class of the split the classifier's class numbers that are right; an empty list leaves its images out.

    JSON: {class folder: class, or a list of classes}, each by name or number. Raises Refusal(DATA).
    """
    content = _json(path)
    if not isinstance(content, dict):
        raise Refusal(DATA, f"{path}: not a JSON object, class folder -> classes of the classifier")
    number = {name: place for place, name in enumerate(classes)}
    found = []
    for folder in folders:
        given = content.get(folder, [])
        mapped = [
            number.get(one, one) if isinstance(one, str) else one
            for one in (given if isinstance(given, list) else [given])
        ]
        wrong = [one for one in mapped if type(one) is not int or not 0 <= one < len(classes)]
        if wrong:
            raise Refusal(DATA, f"{path}: {folder}: {wrong[0]!r} is not a class of the classifier")
        found.append(mapped)
    if not any(found):
        raise Refusal(DATA, f"{path}: maps none of the {len(folders)} classes of the split")
    return found


def _json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise Refusal(DATA, f"{path}: cannot be read as JSON ({why})") from error
