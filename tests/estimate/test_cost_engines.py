"""What each engine really holds and sends, in two processes on the CPU: `make test-long`, or with -m long -s.

A process's resident memory is what the system says of it, read where it grows by the model: between models of two
sizes, so that libraries, buckets and buffers of fixed size drop out.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ssl_vit import runtime
from ssl_vit.encoders.vit import Vit
from ssl_vit.estimate import cost
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.model import Batch, Model, count_parameters
from ssl_vit.train import launch
from ssl_vit.train.optim import AdamW
from tests.train.engines import BIN, run_checked

BUCKET = 4_000_000  # parameters, far below a model's
COLLECTIVES = {
    "all_reduce": "reduced",
    "all_gather_into_tensor": "gathered",
    "all_gather_single": "gathered",
    "reduce_scatter_tensor": "scattered",
    "reduce_scatter_single": "scattered",
}


def make_config(depth: int) -> Vit:
    return Vit(patch=8, image=16, width=512, depth=depth, heads=8, mlp=2048)


def resident_bytes(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def count_sent(sent: dict[str, int]) -> None:
    """Add up what collectives are given or give, whichever is larger."""
    for name, kind in COLLECTIVES.items():
        original = getattr(dist, name, None)

        def counting(*args: Any, original: Any = original, kind: str = kind, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            sent[kind] = sent.get(kind, 0) + max(tensor.nbytes for tensor in tensors)
            return original(*args, **kwargs)

        if original is not None:
            setattr(dist, name, counting)


def make_step(name: str, model: Model, micro_batches: int) -> Callable[[Batch, bool], None]:
    """A function that takes a micro batch, and steps after the last one."""
    engine: Any = model
    if name.startswith("zero"):
        import deepspeed  # type: ignore

        settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_batches}
        settings |= {"zero_optimization": {"stage": int(name[-1]), "reduce_bucket_size": BUCKET}}
        settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        settings |= {"gradient_clipping": 1.0}
        engine, *_ = deepspeed.initialize(model=model, optimizer=AdamW().build(model), config=settings)
    elif name == "ddp":
        engine = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in [*model.encoder.blocks, model]:
            fully_shard(module, mesh=mesh)
    optimizer = engine if name.startswith("zero") else AdamW().build(model)

    def step(batch: Batch, last: bool) -> None:
        if name.startswith("zero"):
            engine.backward(engine(batch).loss)
            return engine.step()
        if name == "fsdp2":
            engine.set_requires_gradient_sync(last)
        with nullcontext() if last or name == "fsdp2" else engine.no_sync():
            engine(batch).loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
        return None

    return step


def run_steps(name: str, depth: int, micro_batches: int) -> dict[str, Any]:
    """Bytes between steps, at the peak of one, and by collective, of a process."""
    torch.set_num_threads(1)
    sent_bytes: dict[str, int] = {}
    count_sent(sent_bytes)
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(BUCKET))
    encoder = make_config(depth).build()
    model = Model(encoder, MeanColor().build(encoder, 1))
    parameters = count_parameters(model)
    step = make_step(name, model, micro_batches)
    zeros = torch.zeros(1, dtype=torch.int64)
    batch = {"image": torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "seed": zeros, "valid": zeros == 0, "label": zeros}
    between = 0
    for _ in range(4):
        sent_bytes.clear()
        between = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the most until now
        for micro in range(micro_batches):
            step(batch, micro == micro_batches - 1)
    peak = resident_bytes("VmHWM")
    dist.destroy_process_group()
    return {"parameters": parameters, "between": between, "peak": peak, "sent": sent_bytes}


def measure(name: str, depth: int, micro_batches: int, folder: Path) -> dict[str, Any]:
    """What the first of two processes found."""
    output = folder / f"{depth}.json"
    # every tensor is given back to the system when it is freed
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node", 2, __file__, name, depth, micro_batches, output]
    run_checked(*command, **malloc, DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="1", PYTHONWARNINGS="ignore")
    return json.loads(output.read_text())


@pytest.mark.long
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", runtime.ENGINES)
def test_memory_and_what_is_sent(name: runtime.Engine, micro_batches: int, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(launch, "ZERO_BUCKET", BUCKET)
    small, large = (measure(name, depth, micro_batches, tmp_path) for depth in (8, 20))
    unit_bytes = 4 * (large["parameters"] - small["parameters"])
    actual = [(large[key] - small[key]) / unit_bytes for key in ("between", "peak")]
    block = cost.block_parameters(make_config(8))
    sizes = [
        cost.step_memory_bytes(name, result["parameters"], block, 2, 2, micro_batches > 1, 0, 0)
        for result in (small, large)
    ]
    expected = [(b - a) / unit_bytes for a, b in zip(*sizes, strict=True)]
    sent = {kind: round(size / (4 * large["parameters"]), 2) for kind, size in large["sent"].items()}
    print(f"\n{name}, {micro_batches} micro batches, bytes / (4 x parameters): between steps {actual[0]:.2f} (formula")
    print(f"{expected[0]:.2f}), peak {actual[1]:.2f} ({expected[1]:.2f}), given to collectives {sent}")
    assert actual == pytest.approx(expected, rel=0.08)
    if name != "ddp":  # whose collectives are out of Python's sight
        ring_bytes = sent.get("gathered", 0) + 2 * sent.get("reduced", 0) + sent.get("scattered", 0)
        expected_sent = cost.sent_bytes(name, large["parameters"], 2, micro_batches) / (4 * large["parameters"] / 2)
        assert ring_bytes == pytest.approx(expected_sent, rel=0.02)


if __name__ == "__main__":
    result = run_steps(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[4]).write_text(json.dumps(result))
