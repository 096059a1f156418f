"""Fine-tune an encoder to classify: accelerate launch tools/finetune.py recipe=NAME [key=value ...]"""

import sys

from ssl_vit import config, errors, recipes
from ssl_vit.commands import train


def main(arguments: list[str]) -> int:
    if config.wants_help(arguments):
        print(f"{__doc__}\n\n{config.format_help(recipes.Finetune)}")
        return 0
    return train.run(config.parse(recipes.Finetune, arguments, recipes.RECIPES_FOLDER))


if __name__ == "__main__":
    sys.exit(errors.run_main(main))
