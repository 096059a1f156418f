"""Right answers that are not one class of the split: sets for an image (ReaL), classes of other names (ObjectNet)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ssl_vit.errors import ExitCode, ExitError

VALIDATION_NUMBER = re.compile(r"_val_(\d{8})\b")  # how ImageNet numbers its validation images, from 1


def read_label_sets(path: str, keys: Sequence[str], classes: int) -> list[list[int]]:
    """The accepted class numbers of each image, from JSON; an empty set means that the image does not count.

    A list holds them in the order of the images' file names (ImageNet's by the number in the name, so that a part of
    the set will do); an object by file name. Raises ExitError(DATA).
    """
    content, files = _read_json(path), [PurePosixPath(key).name for key in keys]
    if isinstance(content, dict):
        if len(set(files)) != len(files):
            duplicate = next(name for name in files if files.count(name) > 1)
            raise ExitError(ExitCode.DATA, f"{path}: names files, and {duplicate} is the name of more than one image")
        missing = [name for name in files if name not in content]
        if missing:
            raise ExitError(ExitCode.DATA, f"{path}: has no labels for {len(missing)} images (such as {missing[0]})")
        sets = [content[name] for name in files]
    elif isinstance(content, list):
        sets = [content[index] for index in _label_set_indices(path, files, len(content))]
    else:
        raise ExitError(ExitCode.DATA, f"{path}: not a JSON list or object of label lists")
    for name, labels in zip(files, sets, strict=True):
        if not isinstance(labels, list) or not all(type(n) is int and 0 <= n < classes for n in labels):
            raise ExitError(
                ExitCode.DATA, f"{path}: {name} has {labels!r:.60}, not a list of class numbers below {classes}"
            )
    return sets


def _label_set_indices(path: str, files: list[str], count: int) -> list[int]:
    matches = [VALIDATION_NUMBER.search(name) for name in files]
    if all(matches):
        indices = [int(match[1]) - 1 for match in matches if match]
        out_of_range = [name for name, index in zip(files, indices, strict=True) if not 0 <= index < count]
        if out_of_range:
            raise ExitError(ExitCode.DATA, f"{path}: has {count} label sets, none for {out_of_range[0]}")
        return indices
    if len(set(files)) != len(files) or len(files) != count:
        text = f"has {count} label sets for {len(files)} images ({len(set(files))} file names)"
        raise ExitError(ExitCode.DATA, f"{path}: {text}; give an object by file name")
    order = {name: index for index, name in enumerate(sorted(files))}
    return [order[name] for name in files]


def read_class_map(path: str, folders: Sequence[str], classes: Sequence[str]) -> list[list[int]]:
    """For each class of the split the classifier's class numbers that are right; an empty list leaves its images out.

    JSON: {class folder: class, or a list of classes}, each by name or number. Raises ExitError(DATA).
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise ExitError(ExitCode.DATA, f"{path}: not a JSON object, class folder -> classes of the classifier")
    class_indices = {name: index for index, name in enumerate(classes)}
    class_map = []
    for folder in folders:
        entry = content.get(folder, [])
        mapped = [
            class_indices.get(item, item) if isinstance(item, str) else item
            for item in (entry if isinstance(entry, list) else [entry])
        ]
        invalid = [item for item in mapped if type(item) is not int or not 0 <= item < len(classes)]
        if invalid:
            raise ExitError(ExitCode.DATA, f"{path}: {folder}: {invalid[0]!r} is not a class of the classifier")
        class_map.append(mapped)
    if not any(class_map):
        raise ExitError(ExitCode.DATA, f"{path}: maps none of the {len(folders)} classes of the split")
    return class_map


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ExitError(ExitCode.DATA, f"{path}: cannot be read as JSON ({reason})") from error
