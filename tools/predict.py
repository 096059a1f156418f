"""Classify a folder of images: python tools/predict.py encoder=runs/NAME input=IMAGES output=predictions.csv"""

import sys
from pathlib import Path

from ssl_vit import config, exits, prediction


def main(arguments: list[str]) -> int:
    if config.usage(arguments):
        print(f"{__doc__}\n\n{config.describe(prediction.Predict)}")
        return 0
    return prediction.run(config.parse(prediction.Predict, arguments, Path()))


if __name__ == "__main__":
    sys.exit(exits.run(main))
