"""What GPUs can do: by their data sheets, and as a plan assumes it."""

import re
from dataclasses import dataclass

from pydantic import Field, field_validator

from ssl_vit.config import Config


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    tflops: float  # 10^12 FLOP/s, dense bf16
    memory_gb: float  # 10^9 bytes; of the larger one where there are two


GPUS = {  # NVIDIA's data sheets, by words of a GPU's name; the first that fits
    "H100 PCIe": Gpu(756, 80),
    "H100 NVL": Gpu(835, 94),
    "H100": Gpu(989, 80),
    "H200 NVL": Gpu(835, 141),
    "H200": Gpu(989, 141),
    "GH200": Gpu(989, 96),
    "B200": Gpu(2250, 180),
    "A100": Gpu(312, 80),
    "L40S": Gpu(362, 48),
    "L4": Gpu(121, 24),
    "A10": Gpu(125, 24),
    "RTX 4090": Gpu(165, 24),
    "RTX 3090": Gpu(71, 24),
}


def canonical_gpu_name(name: str) -> str:
    """The table's name of a GPU, whatever its capitals and gaps: `rtx4090`, `H100-NVL`; ValueError lists all."""
    names = {_normalize_name(gpu): gpu for gpu in GPUS}
    if _normalize_name(name) not in names:
        raise ValueError(f"{name!r} is not in the table of data sheets; these are: {', '.join(GPUS)}")
    return names[_normalize_name(name)]


def _normalize_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def spec_flops(name: str, half: bool) -> float | None:
    """FLOP/s that NVIDIA promises of a GPU of a name; None for others, and in fp32."""
    if not half or "MIG" in name:  # which is a part of one
        return None
    return next((1e12 * gpu.tflops for model, gpu in GPUS.items() if re.search(rf"\b{model}\b", name)), None)


class Hardware(Config):
    """What a GPU and its node can do; the defaults are those of a common node of eight H100."""

    gpu: str = Field(default="H100", description=f"the GPU to plan for, of: {', '.join(GPUS)}")
    mfu: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="share of its data sheet's dense bf16 rate that training reaches: an assumption; a row of "
        "metrics.jsonl has `mfu_data_sheet`",
    )
    tflops: float | None = Field(
        default=None,
        gt=0,
        description="sustained a GPU, 10^12/s under bf16 (none: data sheet times hardware.mfu): `tflops` of a row "
        "of metrics.jsonl (of a run without activation checkpointing) divided by its processes",
    )
    memory_gb: float | None = Field(
        default=None, gt=0, description="memory of a GPU, 10^9 bytes (none: the data sheet's); a tenth is left free"
    )
    gpus_per_node: int = Field(default=8, ge=1, description="GPUs of a node")
    network_gbps: float = Field(default=400, gt=0, description="network between nodes, 10^9 bits/s for each GPU")
    cores: int = Field(default=16, ge=1, description="CPU cores for each GPU")
    storage_gbs: float = Field(default=2, gt=0, description="what a node reads from where shards are, 10^9 bytes/s")

    @field_validator("gpu")
    @classmethod
    def _check_gpu(cls, name: str) -> str:
        return canonical_gpu_name(name)

    @property
    def sustained_tflops(self) -> float:
        """10^12 FLOP/s that training reaches on a GPU."""
        return self.tflops or self.mfu * GPUS[self.gpu].tflops

    def compute_seconds(self, flops: float, recompute: bool) -> float:
        """That a GPU computes, were it never to wait; with checkpointing the forward pass is computed `recompute`."""
        return flops / (self.sustained_tflops * 1e12) * (4 / 3 if recompute else 1)

    @property
    def gpu_memory_gb(self) -> float:
        """Memory of a GPU, 10^9 bytes."""
        return self.memory_gb or GPUS[self.gpu].memory_gb
