"""Fine-tune an encoder to classify: accelerate launch tools/finetune.py recipe=NAME [key=value ...]"""

import sys

from ssl_vit import config, exits, recipe, session


def main(arguments: list[str]) -> int:
    if config.usage(arguments):
        print(f"{__doc__}\n\n{config.describe(recipe.Finetune)}")
        return 0
    return session.run(config.parse(recipe.Finetune, arguments, recipe.FOLDER))


if __name__ == "__main__":
    sys.exit(exits.run(main))
