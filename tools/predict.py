"""Classify a folder of images: python tools/predict.py encoder=runs/NAME input=IMAGES output=predictions.csv"""

import sys
from pathlib import Path

from ssl_vit import config, errors
from ssl_vit.commands import predict


def main(arguments: list[str]) -> int:
    if config.wants_help(arguments):
        print(f"{__doc__}\n\n{config.format_help(predict.Predict)}")
        return 0
    return predict.run(config.parse(predict.Predict, arguments, Path()))


if __name__ == "__main__":
    sys.exit(errors.run_main(main))
