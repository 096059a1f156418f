"""Look into an encoder: python tools/analyze.py encoder=runs/NAME data=shards/val run=runs/analyze

Writes a page with the paper's pictures (attention rollout, attention distance, filters, positions), reconstructions,
features and neighbors; the pictures as PNG, the numbers as JSON and CSV.
"""

import sys

from ssl_vit import config, errors, recipes
from ssl_vit.analyze import sections
from ssl_vit.commands import analyze


def main(arguments: list[str]) -> int:
    if config.wants_help(arguments):
        print(f"{__doc__}\n{config.format_help(sections.Analyze)}")
        return 0
    return analyze.run(config.parse(sections.Analyze, arguments, recipes.RECIPES_FOLDER))


if __name__ == "__main__":
    sys.exit(errors.run_main(main))
