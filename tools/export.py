"""Write an encoder for other programs: tools/export.py encoder=SOURCE format=timm|hf|onnx|safetensors output=FOLDER

SOURCE is a run, an encoder folder, a weights file (safetensors, .pth, Google's .npz) or timm:NAME. With image_size=H
or H,W positions are interpolated to that size by the paper's rule and baked in.
"""

import sys
from pathlib import Path

from ssl_vit import config, errors
from ssl_vit.commands import export


def main(arguments: list[str]) -> int:
    if config.wants_help(arguments):
        print(f"{__doc__}\n\n{config.format_help(export.Export)}")
        return 0
    print(export.run(config.parse(export.Export, arguments, Path("recipes"))))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run_main(main))
