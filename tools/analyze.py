"""Look into an encoder: python tools/analyze.py encoder=runs/NAME data=shards/val run=runs/analyze

Writes a page with the paper's pictures (attention rollout, attention distance, filters, positions), reconstructions,
features and neighbours; the pictures as PNG, the numbers as JSON and CSV.
"""

import sys

from ssl_vit import analysis, config, exits, recipe


def main(arguments: list[str]) -> int:
    if config.usage(arguments):
        print(f"{__doc__}\n{config.describe(analysis.Analyze)}")
        return 0
    return analysis.run(config.parse(analysis.Analyze, arguments, recipe.FOLDER))


if __name__ == "__main__":
    sys.exit(exits.run(main))
