"""Fit the classes of head.kind=clusters to shards: tools/fit_clusters.py data.train=FOLDER clusters=512 output=FILE

k-means of patches (space=patch, as iBOT's Table 20 has it) or of mean colors (space=color), cropped as in training.
Then: tools/pretrain.py recipe=mpp_clusters head.codebook=FILE
"""

import sys
from pathlib import Path

from ssl_vit import config, errors
from ssl_vit.commands import fit_clusters


def main(arguments: list[str]) -> int:
    if config.wants_help(arguments):
        print(f"{__doc__}\n\n{config.format_help(fit_clusters.FitClusters)}")
        return 0
    print(fit_clusters.fit(config.parse(fit_clusters.FitClusters, arguments, Path("recipes"))))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run_main(main))
