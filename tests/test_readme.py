"""The README is finished, and what it points at is there."""

import re
from pathlib import Path

import pytest

from ssl_vit import config, recipe
from ssl_vit.recipe import Finetune, Pretrain

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md"]


@pytest.mark.parametrize(("page", "least"), [("README.md", 4), ("docs/benchmarks.md", 1)])
def test_the_training_commands_parse(page: str, least: int):
    """Backslashes join lines; every key=value of a training command is a key of its tool."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(r"tools/(pretrain|finetune)\.py ([^\n`]*)", text)
    commands = [(tool, rest) for tool, rest in found if "recipe=NAME" not in rest]
    assert len(commands) >= least
    for tool, rest in commands:
        arguments = [word for word in rest.split("#")[0].split() if "=" in word and "..." not in word]
        config.parse({"pretrain": Pretrain, "finetune": Finetune}[tool], arguments, recipe.FOLDER)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_no_blank_is_left(page: Path):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b(?!=)", re.sub(r"`[^`]*`|```.*?```", "", text, flags=re.S))


def test_the_list_of_files_is_complete():
    text = (ROOT / "README.md").read_text()
    for file in [*ROOT.glob("tools/*.py"), *ROOT.glob("ssl_vit/**/*.py")]:
        name = file.relative_to(ROOT / file.relative_to(ROOT).parts[0]).as_posix()
        assert f"  {name} " in text or name.endswith("__init__.py"), name
