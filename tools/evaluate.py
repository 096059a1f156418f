"""Judge an encoder's frozen features, or a classifier: python tools/evaluate.py encoder=runs/NAME [key=value ...]"""

import sys

from ssl_vit import config, errors, recipes
from ssl_vit.commands import evaluate


def main(arguments: list[str]) -> int:
    if config.wants_help(arguments):
        print(f"{__doc__}\n\n{config.format_help(evaluate.Evaluate)}")
        return 0
    return evaluate.run(config.parse(evaluate.Evaluate, arguments, recipes.RECIPES_FOLDER))


if __name__ == "__main__":
    sys.exit(errors.run_main(main))
