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
ALLOWED_PARTS = {
    "accelerate": {"train"},
    "deepspeed": {"train"},
    "webdataset": {"data"},
    "timm": {"encoders", "heads", "data"},
}


def imported_names(file: Path) -> list[tuple[str, bool]]:
    """Dotted names that a file imports, and whether at module level (code for type checkers only does not count)."""
    tree = ast.parse(file.read_text())
    if_nodes = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    guarded = {
        node for if_node in if_nodes if ast.unparse(if_node.test) == "TYPE_CHECKING" for node in ast.walk(if_node)
    }
    imports = []
    for node in {*ast.walk(tree)} - guarded:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            imports += [(prefix + alias.name, node in tree.body) for alias in node.names]
    return imports


def part_of(name: str) -> str:
    """`encoders` of `ssl_vit.encoders.vit`."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path):
    home = file.relative_to(ROOT / "ssl_vit").parts[0].removesuffix(".py")
    for name, at_module_level in imported_names(file):
        package = name.split(".")[0]
        if package in ALLOWED_PARTS:
            assert home in ALLOWED_PARTS[package], f"{file} imports {package}"
            assert not at_module_level, f"{file} imports {package} before it is needed"
        if package == "ssl_vit" and home not in ("__init__", "__main__"):
            assert LEVEL[part_of(name)] <= LEVEL[home], f"{file} imports {name}, which is above it"
            assert {part_of(name), home} != {"train", "evaluate"}, f"{file} imports {name}"


def test_starting_loads_nothing_heavy_and_no_file_is_named_for_nothing():
    heavy = "accelerate timm torchvision webdataset tensorboard transformers deepspeed sklearn scipy torch._dynamo"
    code = f"import sys, ssl_vit, ssl_vit.commands.setup; print([m for m in {heavy.split()!r} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
    assert not {file.stem for file in FILES} & {"utils", "misc", "common", "helpers", "base"}


def test_the_root_holds_what_the_design_says():
    root = {path.stem for path in (ROOT / "ssl_vit").glob("*.py")} - {"__init__", "__main__"}
    assert root == {"model", "config", "recipes", "errors", "rng", "files", "runtime", "distributed", "fault_injection"}
    folders = {path.parent.name for path in (ROOT / "ssl_vit").glob("*/__init__.py")}
    assert folders == LEVEL.keys() - root


# words of our own, or for a name's history instead of the thing; the field has others (issue 18)
RETIRED = """Refusal Silent GOLDEN device_words serve_parent launcher_words born mean_over read_out told Masked
MaskedHead ColorHead paint copying neighbours Pixels Normalised Axes attended said Samples Made borne BadSource Ahead
Wanted
in_order neighbour Tars deadly name_of_note without_location Loop Live outfit judged owed postponed introduction judging
preempted NumberWatch DataWatch LeftOut and_also unrepeatable Later Beat agreed Asked cuts_layers share_of Facts
forget_gathered check_alike flaw tidy HeldOut Bench Unlabelled NOWHERE remarks confused ascii_of Portrait Standing
PASSED JUDGED Rehearsal rehearse relieved Cure imagined Blank attempted seeded kept_head streamed write_tuned
found made mine asked wanted shown cure racing"""


@pytest.mark.parametrize("folder", ["ssl_vit", "tools"])
def test_no_name_is_a_retired_one(folder: str):
    names = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            is_stored = isinstance(getattr(node, "ctx", None), ast.Store)
            names |= {getattr(node, key, None) for key in ("id", "attr") if is_stored}
            names |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
            names |= {node.arg} if isinstance(node, ast.arg) else set()
    assert names.isdisjoint(RETIRED.split()), names & {*RETIRED.split()}
