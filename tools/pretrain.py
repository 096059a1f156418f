"""Pretrain an encoder: accelerate launch tools/pretrain.py recipe=NAME [key=value ...]"""

import sys

from ssl_vit import config, exits, recipe, session


def main(arguments: list[str]) -> int:
    if config.usage(arguments):
        print(f"{__doc__}\n\n{config.describe(recipe.Pretrain)}")
        return 0
    return session.run(config.parse(recipe.Pretrain, arguments, recipe.FOLDER))


if __name__ == "__main__":
    sys.exit(exits.run(main))
