"""Imports point down only, heavy packages stay where the design puts them, and nothing heavy loads at start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "ssl_vit").rglob("*.py"))

# a part may import the parts on its own level and below; train and evaluate do not import each other
LEVELS = [
    {"errors", "rng", "runtime"},
    {"config", "distributed", "files", "fault_injection"},
    {"model"},
    {"report"},
    {"encoders"},
    {"heads"},
    {"data"},
    {"convert"},
    {"train", "evaluate"},
    {"recipes"},
    {"estimate", "analyze", "runs"},
    {"commands"},
]
LEVEL = {part: i for i, parts in enumerate(LEVELS) for part in parts}
HOMES = {"accelerate": {"train"}, "deepspeed": {"train"}, "webdataset": {"data"}, "timm": {"encoders", "heads", "data"}}


def imported(file: Path) -> list[tuple[str, bool]]:
    """Dotted names that a file imports, and whether at module level (code for type checkers only does not count)."""
    tree = ast.parse(file.read_text())
    ifs = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    guarded = {node for one in ifs if ast.unparse(one.test) == "TYPE_CHECKING" for node in ast.walk(one)}
    found = []
    for node in {*ast.walk(tree)} - guarded:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module):
            home = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found += [(home + alias.name, node in tree.body) for alias in node.names]
    return found


def part(name: str) -> str:
    """`encoders` of `ssl_vit.encoders.vit`."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path):
    home = file.relative_to(ROOT / "ssl_vit").parts[0].removesuffix(".py")
    for name, top in imported(file):
        package = name.split(".")[0]
        if package in HOMES:
            assert home in HOMES[package], f"{file} imports {package}"
            assert not top, f"{file} imports {package} before it is needed"
        if package == "ssl_vit" and home != "__init__":
            assert LEVEL[part(name)] <= LEVEL[home], f"{file} imports {name}, which is above it"
            assert {part(name), home} != {"train", "evaluate"}, f"{file} imports {name}"


def test_starting_loads_nothing_heavy_and_no_file_is_named_for_nothing():
    heavy = "accelerate timm torchvision webdataset tensorboard transformers deepspeed sklearn scipy torch._dynamo"
    code = f"import sys, ssl_vit, ssl_vit.commands.setup; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not {file.stem for file in FILES} & {"utils", "misc", "common", "helpers", "base"}


def test_the_root_holds_what_the_design_says():
    root = {path.stem for path in (ROOT / "ssl_vit").glob("*.py")} - {"__init__", "__main__"}
    assert root == {"model", "config", "recipes", "errors", "rng", "files", "runtime", "distributed", "fault_injection"}
    folders = {path.parent.name for path in (ROOT / "ssl_vit").glob("*/__init__.py")}
    assert folders == LEVEL.keys() - root
