"""What the counters count: FLOPs of training on an image, by formula (reference: peers 6.2); and what --help loads."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit import cost, recipe
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.timm_zoo import TimmZoo
from ssl_vit.encoders.vit import Vit
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.model import Model

ROOT = Path(__file__).parent.parent
TABLE: dict[tuple[str, int], tuple[float, float]] = {  # GFLOP, and half a unit of its last place
    ("Ti", 16): (7.52, 0.005),
    ("S", 16): (27.59, 0.005),
    ("B", 16): (105.38, 0.005),
    ("L", 16): (369.3, 0.05),
    ("H", 16): (763.9, 0.05),
    ("H", 14): (1003.9, 0.05),
}


def test_the_nominal_cost_of_an_image():
    for (size, patch), (want, near) in TABLE.items():
        with torch.device("meta"):
            encoder = Vit(size=size, patch=patch).build()  # type: ignore[arg-type]
        model = Model(encoder, MeanColor().build(encoder, 0))
        assert recipe.flops(model) / 1e9 == pytest.approx(want, abs=1.01 * near), (size, patch)


def test_what_nobody_asks_for_is_the_gradient_of_pixels():
    """Counted by torch: of a whole training step all but that, and but for the last block's other tokens.

    Encoders of other stems need all of it.
    """
    config = Vit(size="Ti", width=32, depth=2, heads=2, patch=4, image=(12, 20), channels=4)
    with torch.device("meta"):
        encoder: Any = config.build()
    image = torch.zeros(1, 4, 12, 20, dtype=torch.uint8, device="meta")

    def counted(forward: Callable[[], torch.Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            forward().sum().backward()
        return counter.get_total_flops()

    def patches(wanted: bool) -> int:
        return counted(lambda: encoder.patch_embed.proj(encoder.normalise(image).requires_grad_(wanted)))

    needless = cost.needless_flops(config)
    assert patches(True) - patches(False) == needless == 2 * 15 * 4 * 16 * 32
    every = cost.training_flops(cost.encoder_macs(config))
    assert counted(lambda: encoder(image)) == pytest.approx(every - needless, rel=0.03)
    with torch.device("meta"):
        assert cost.needless_flops(Vit(size="B", patch=32, stem="r50")) == 0
        assert cost.needless_flops(TimmZoo()) == 0
    assert cost.needless_flops(Axial(size="B", patch=16)) == cost.needless_flops(Vit(size="B", patch=16)) > 0


HELP = """
import io, runpy, sys
from contextlib import redirect_stdout
import torch
torch.cuda.is_available = None
before = set(sys.modules)
for tool in ("pretrain", "finetune", "evaluate"):
    sys.argv = [f"tools/{tool}.py", "--help"]
    with redirect_stdout(io.StringIO()) as said:
        try: runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end: assert not end.code, end.code
    assert sys.argv[0] in said.getvalue()
print(*sorted(set(sys.modules) - before))
import ssl_vit.train.window, ssl_vit.train.attention
"""


def test_help_loads_nothing_heavy_and_imports_ask_no_gpu():
    """What takes long to import, beside torch: --help takes at most 1.5 times as long as `import torch`."""
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = done.stdout.split()
    heavy = "accelerate timm torchvision webdataset tensorboard transformers deepspeed sklearn scipy pandas matplotlib "
    heavy += "fsspec aiohttp onnx onnxruntime datasets huggingface_hub markdown"
    assert "ssl_vit" in loaded
    assert {name.split(".")[0] for name in loaded} & set(heavy.split()) == set()
    parts = {"torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.tensor", "torch.distributed.fsdp"}
    assert parts & set(loaded) == set()
