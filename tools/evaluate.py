"""Judge an encoder's frozen features, or a classifier: python tools/evaluate.py encoder=runs/NAME [key=value ...]"""

import sys

from ssl_vit import config, evaluation, exits, recipe


def main(arguments: list[str]) -> int:
    if config.usage(arguments):
        print(f"{__doc__}\n\n{config.describe(evaluation.Evaluate)}")
        return 0
    return evaluation.run(config.parse(evaluation.Evaluate, arguments, recipe.FOLDER))


if __name__ == "__main__":
    sys.exit(exits.run(main))
