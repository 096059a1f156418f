"""YAML and key=value become one typed, frozen, validated object; nothing here knows of vision.

Every scalar is text until pydantic gives it a type: PyYAML's BaseLoader reads a file as text, the command line is text,
so that `1e-3`, `on`, `007` and `1:30` mean the same in both. Unions are told apart by their `kind`.
"""

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ssl_vit.errors import ExitCode, ExitError

Tree = dict[str, Any]
MAX_BYTES = 1 << 20  # a recipe is a page of text; more is a mistake or an attack
RECIPE_FOLDERS = (Path("recipes"), Path(__file__).parents[1] / "recipes")  # the user's come before the checkout's


class Config(BaseModel):
    """A frozen set of keys; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, tree: Any) -> Any:
        """Give text the shape that the field wants: `none`, comma-separated tuples, the default `kind`."""
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        for name, field in cls.model_fields.items():
            if isinstance(tree.get(name), str):
                tree[name] = _convert_text(tree[name], field.annotation)
            elif isinstance(tree.get(name), dict) and field.discriminator:
                tree[name] = {"kind": field.default.kind, **tree[name]}
        return tree


Schema = TypeVar("Schema", bound=Config)


def _union_members(annotation: Any) -> list[Any]:
    """The alternatives of a union, or the one type there is."""
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _convert_text(text: str, annotation: Any) -> Any:
    members = _union_members(annotation)
    if type(None) in members and text.lower() in ("none", "null", ""):
        return None
    for choices in (get_args(m) for m in members if get_origin(m) is Literal):
        return next((choice for choice in choices if str(choice) == text), text)  # pydantic takes no "50" for 50
    if any(get_origin(m) is tuple for m in members) and (int not in members or "," in text):
        parts = re.split(r",(?![^{]*\})", text.strip("[]() "))  # `{a,b}` in a file name is one name's
        return [part.strip() for part in parts if part.strip()]
    return text


def parse(schema: type[Schema], arguments: list[str], folders: Sequence[Path] = RECIPE_FOLDERS) -> Schema:
    """Read `recipe=NAME key=value ...` against a schema.

    `recipe` is a path, or names NAME.yaml in the first of `folders` that has it; later keys override earlier ones.
    ExitError(USAGE) has one line.
    """
    pairs = [_split_argument(argument) for argument in arguments]
    tree: Tree = {}
    for path, value in pairs:
        if path == "recipe":
            tree = read_recipe(value, schema, folders)
            tree.setdefault("run", f"runs/{Path(value).stem}") if "run" in schema.model_fields else None
    overrides = [(path.split("."), value) for path, value in pairs if path != "recipe"]
    for path, value in sorted(overrides, key=lambda pair: pair[0][-1] != "kind"):  # kinds first: they drop old keys
        set_key(tree, path, value, schema)
    return validate(schema, tree)


def _split_argument(argument: str) -> tuple[str, str]:
    path, equals, value = argument.partition("=")
    if not equals or not path:
        raise ExitError(ExitCode.USAGE, f"'{argument}' is not key=value; try --help")
    return path, value


def read_recipe(name: str, schema: type[Config], folders: Sequence[Path] = RECIPE_FOLDERS) -> Tree:
    """A recipe file as a tree of text, laid over its `base` (one level deep)."""
    tree = _load_yaml(name, folders)
    base = tree.pop("base", None)
    if base is None:
        return tree
    base_tree = _load_yaml(base, folders)
    if "base" in base_tree:
        raise ExitError(ExitCode.USAGE, f"recipe {name}: its base {base} has a base of its own; one level is allowed")
    for path, value in sorted(flatten(tree), key=lambda leaf: leaf[0][-1] != "kind"):
        set_key(base_tree, list(path), value, schema)
    return base_tree


class TextLoader(yaml.BaseLoader):
    """Text as text, and no aliases: ten lines of them stand for gigabytes, or for themselves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not read")
        return super().compose_node(parent, index)


def _load_yaml(name: str, folders: Sequence[Path]) -> Tree:
    candidates = [Path(name)] if name.endswith((".yaml", ".yml")) else [folder / f"{name}.yaml" for folder in folders]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        raise ExitError(
            ExitCode.USAGE, f"no recipe {name}{_suggest_key(name, known) or '; there are ' + ', '.join(known)}"
        )
    if path.stat().st_size > MAX_BYTES:
        raise ExitError(ExitCode.USAGE, f"recipe {path} is larger than {MAX_BYTES} bytes")
    try:
        tree = yaml.load(path.read_text(), TextLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ExitError(ExitCode.USAGE, f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ExitError(ExitCode.USAGE, f"recipe {path} is not a set of keys")
    return tree


def flatten(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of a tree with its path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), value


def set_key(tree: Tree, path: list[str], value: Any, schema: type[Config]) -> None:
    """Set one key; a `kind` that changes drops the keys of the old one."""
    for depth, key in enumerate(path[:-1]):
        if path[depth + 1 :] == ["kind"] and _kind(tree.get(key), path[: depth + 1], schema) != value:
            tree[key] = {}
        if not isinstance(tree.setdefault(key, {}), dict):
            raise ExitError(
                ExitCode.USAGE, f"{'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, not a group of keys"
            )
        tree = tree[key]
    tree[path[-1]] = value


def _kind(subtree: Any, path: list[str], schema: type[Config]) -> str | None:
    if isinstance(subtree, dict) and "kind" in subtree:
        return subtree["kind"]
    field = schema.model_fields.get(path[0])
    return getattr(field.default, "kind", None) if field and len(path) == 1 else None


def validate(schema: type[Schema], tree: Tree) -> Schema:
    """The typed object, or ExitError(USAGE) naming every bad key in one line."""
    try:
        return schema.model_validate(tree)
    except ValidationError as errors:
        lines: dict[str, str] = {}  # one for each key, although each member of a union has its say
        for error in errors.errors():
            lines.setdefault(
                _key_path(error["loc"], tree, error["type"] == "missing"), _format_error(error, tree, schema)
            )
        raise ExitError(ExitCode.USAGE, "; ".join(lines.values())) from None


HINTS = {
    "int_parsing": "give a whole number, like 256",
    "int_from_float": "give a whole number, like 256",
    "float_parsing": "give a number, like 1e-3",
    "bool_parsing": "give true or false",
    "missing": "it must be given",
    "model_type": "it is a group of keys, give one of them",
}


def _format_error(error: Any, tree: Tree, schema: type[Config]) -> str:
    kind = error["type"]
    path = _key_path(error["loc"], tree, kind == "missing")
    if kind == "extra_forbidden":
        known = [key for key, _ in keys(schema)]
        group = path.rpartition(".")[0]
        if path in known:  # of another kind
            return f"{group}.kind={_kind(tree.get(group), [group], schema)} has no key {path}"
        return f"unknown key {path}{_suggest_key(path, known)}"
    if kind == "union_tag_invalid":
        return f"{path}.kind: '{error['ctx']['tag']}' is not one of {error['ctx']['expected_tags']}"
    if kind == "value_error":
        return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    if kind == "missing" and isinstance(error["loc"][-1], int):
        return f"{path}: give more values, with commas between them"
    hint = HINTS.get(kind) or error["msg"][0].lower() + error["msg"][1:].replace("Input should be", "it should be")
    hint = hint.replace("input should", "it should")
    value = "" if kind == "missing" else f"'{error['input']}': "
    return f"{path}: {value}{hint}"


def _key_path(location: tuple[Any, ...], tree: Any, missing: bool) -> str:
    """The dotted key that an error speaks of, without the tags and type names that pydantic puts in between."""
    parts: list[str] = []
    for part in location:
        if isinstance(tree, dict) and (part in tree or (missing and part == location[-1])):
            parts.append(str(part))
            tree = tree.get(part)
    return ".".join(parts)


def _suggest_key(name: str, known: list[str]) -> str:
    """`; did you mean ...?` where something is near, comparing the last part of a dotted key too."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not matches:
        last_parts = {key.rsplit(".", 1)[-1]: key for key in known}
        matches = [
            last_parts[last_part]
            for last_part in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last_parts), n=1, cutoff=0.7)
        ]
    return f"; did you mean {matches[0]}?" if matches else ""


def keys(schema: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of a schema with its field, `kind` first; a union contributes the keys of all its kinds."""
    for name, field in sorted(schema.model_fields.items(), key=lambda item: item[0] != "kind"):
        groups = [m for m in _union_members(field.annotation) if isinstance(m, type) and issubclass(m, Config)]
        for group in groups:
            yield from keys(group, f"{prefix}{name}.")
        if not groups:
            yield prefix + name, field


def format_help(schema: type[Config]) -> str:
    """Every key with its type, default and meaning, from the fields themselves."""
    lines = []
    if "run" in schema.model_fields:
        lines.append("  recipe=NAME  (recipes/NAME.yaml or a path; then any of these keys)")
    for name, field in keys(schema):
        group, _, last = name.rpartition(".")
        if last == "kind":
            is_default = schema.model_fields[group].default.kind == field.default
            lines.append(f"\n  {name}={field.default}{'  (the default)' if is_default else ''}")
            continue
        default = "must be given" if field.default is PydanticUndefined else f"default {_format_value(field.default)}"
        lines.append(f"  {name}  ({_format_type(field.annotation)}; {default})  {field.description or ''}".rstrip())
    return "\n".join(lines)


def _format_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _format_type(annotation: Any) -> str:
    names = []
    for member in _union_members(annotation):
        if get_origin(member) is Literal:
            names.append("|".join(map(str, get_args(member))))
        elif get_origin(member) is tuple:
            names.append(",".join("..." if a is Ellipsis else _format_type(a) for a in get_args(member)))
        else:
            names.append("none" if member is type(None) else member.__name__)
    return " or ".join(names)


def dump(config: Config) -> str:
    """The whole object as YAML that `parse` reads back to the same object."""
    return yaml.safe_dump(_kind_first(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _kind_first(tree: Any) -> Any:
    """A tree in which each group opens with its `kind`."""
    if not isinstance(tree, dict):
        return tree
    return {key: _kind_first(tree[key]) for key in sorted(tree, key=lambda key: key != "kind")}


def diff(old: Tree, new: Tree) -> list[str]:
    """Dotted keys whose text differs between two dumped objects, as `key: old -> new`."""
    before, after = ({".".join(p): v for p, v in flatten(t)} for t in (old, new))
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: {before.get(name, '(unset)')} -> {after.get(name, '(unset)')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def wants_help(arguments: list[str]) -> bool:
    """Whether the command line asks for help."""
    return any(re.fullmatch(r"-h|--help|help", argument) for argument in arguments)
