"""The plan of a run: each figure by hand, each warning where its limit is, each cure a cure."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssl_vit import cost, scaling
from ssl_vit.encoders.vit import Vit
from ssl_vit.exits import Refusal
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.model import count_parameters
from ssl_vit.scaling import LARGE, SMALL, Device, Job, core_rate, plan

ROOT = Path(__file__).parent.parent
H100 = Device()
RICH = Device(storage_gbs=1e6, cores=10**6, network_gbps=1e9, memory_gb=1e6)


def a_job(world: int, encoder: Vit | None = None, **changes: object) -> Job:
    """The paper's run on full-size shards, with changes."""
    encoder = encoder or Vit()
    with torch.device("meta"):
        made = encoder.build()
        head = MeanColor().build(made, 1)
    parameters = count_parameters(made) + count_parameters(head)
    job = Job(encoder, head.macs, parameters, 2, 4096, None, 100_000, world, False, True, LARGE[0], 1_281_167, None)
    return replace(job, **changes)  # type: ignore[arg-type]


def device(**changes: float) -> Device:
    """One that is short of nothing but these."""
    return RICH.model_copy(update=changes)


def named(job: Job, there: Device) -> list[str]:
    """What is warned of."""
    return [warning.split(":")[0] for warning in plan(job, there)[1]]


def test_time_is_flops_by_the_rate():
    """B/16 takes 17.563 GMAC forward (paper's formula), and the head 98 x 768 x 512; pixels need no gradient.

    An H100 promises 989 TFLOP/s, of which 0.4 are assumed.
    """
    flops = (6 * (17.563e9 + 98 * 768 * 512) - 2 * 196 * 768 * 768) * 512
    lines, warnings = plan(a_job(8), RICH)
    assert a_job(8).seconds(H100) == pytest.approx(flops / (0.4 * 989e12), rel=1e-4)
    assert lines[1] == "step        136 ms of computation at 396 TFLOP/s a GPU (assumed): 30,033 images/s"
    assert lines[2] == "run         100,000 steps, 320 epochs: 3.79 hours, 30.3 GPU-hours"
    assert warnings == []
    again = replace(a_job(8), activation_checkpointing=True)
    assert again.seconds(H100) == pytest.approx(4 / 3 * a_job(8).seconds(H100))
    measured = Device(tflops=0.2 * 989)
    assert a_job(8).seconds(measured) == 2 * a_job(8).seconds(H100)
    assert "(assumed)" not in plan(a_job(8), measured)[0][1]


def test_a_plan_is_short():
    for world in (1, 8, 64, 512, 4096):
        lines, warnings = plan(a_job(world, lanes=16), H100)
        assert len(lines) + len(warnings) <= 20
        assert max(map(len, lines)) <= 120
        assert all(warning.count(":") >= 2 for warning in warnings), "what: by what factor: what to change"


def test_rates_of_a_core_are_the_benchmarks():
    rows = json.loads((ROOT / "docs" / "benchmark_loader_cpu.json").read_text())["rows"]
    for case, (sample_bytes, rate) in {"full size": LARGE, "short side 256": SMALL}.items():
        (row,) = (r for r in rows if (r["benchmark"], r["case"], r["who"]) == ("loader", case, "ssl_vit"))
        assert rate == pytest.approx(row["images_per_second"], abs=0.5)
        assert core_rate(sample_bytes) == pytest.approx(rate)
    assert SMALL[1] < core_rate(0) < 10_000
    between = core_rate((SMALL[0] + LARGE[0]) / 2)
    assert 1 / between == pytest.approx((1 / SMALL[1] + 1 / LARGE[1]) / 2)


def test_loader_and_storage_by_hand():
    job = a_job(8)
    images = 512 / job.seconds(H100)
    cores, gigabytes = images / LARGE[1], 8 * images * LARGE[0] / 1e9
    for factor, expected in ((1.01, []), (0.99, ["loader", "storage"])):
        assert named(job, device(cores=cores * factor, storage_gbs=gigabytes * factor)) == expected
    slow = device(storage_gbs=gigabytes / 3)
    lines, warnings = plan(job, slow)
    assert warnings == ["storage: 3 times too slow: shards made with resize=256, or a copy on each node's own disk"]
    assert lines[2].endswith("11.4 hours with the worst of the limits below")
    shrunk = replace(job, sample_bytes=SMALL[0])
    assert named(shrunk, slow) == []
    assert "resize" not in plan(shrunk, H100.model_copy(update={"cores": 1}))[1][0]


def test_network_by_hand():
    """All-reduce of 4 bytes a parameter over a ring, behind 2/3 of the computation; a node's cards share it."""
    job = a_job(512, batch=65536)
    sent = 2 * 511 / 512 * 4 * job.parameters
    need = 8 * sent / (2 / 3 * job.seconds(H100)) / 8 / 1e9
    for factor, expected in ((1.01, []), (0.99, ["network"])):
        assert named(job, device(network_gbps=need * factor)) == expected
    fast, slow = (plan(job, device(network_gbps=need * factor))[0][2] for factor in (1, 0.5))
    hours = [float(re.findall(r"([\d.]+) hours", line)[-1]) for line in (fast, slow)]
    assert hours[1] / hours[0] == pytest.approx(1 + 2 / 3, rel=0.01), "the forward pass waits for nothing"
    (warning,) = plan(replace(job, micro_batch=64), device(network_gbps=need * 1.01))[1]
    assert warning.startswith("network: 2 times too slow"), "only the last micro batch hides it"
    lines = plan(a_job(8), device(network_gbps=1e-3))[0]
    assert any(line.startswith("network") and line.endswith("within the node") for line in lines)
    assert not any(line.startswith("network") for line in plan(a_job(1), RICH)[0])


def test_a_small_batch_starves_and_the_cure_feeds():
    (warning,) = plan(a_job(512), RICH)[1]
    assert warning.startswith("batch: 4.5 times too few images at once")
    (cure,) = re.findall(r"or (\d+) GPUs", warning)
    assert named(a_job(int(cure)), RICH) == []
    assert named(a_job(2 * int(cure)), RICH) == ["batch"]
    assert plan(a_job(8, micro_batch=4), RICH)[1][0].endswith("a larger micro_batch")


G = Vit(patch=14, width=1408, depth=40, heads=16, mlp=6144)


@pytest.mark.parametrize(
    ("encoder", "world"), [(Vit(), 1), pytest.param(Vit(size="L"), 8, marks=pytest.mark.process), (G, 8), (G, 64)]
)
def test_cures_of_too_little_memory(encoder: Vit, world: int):
    there = device(memory_gb=80 if world < 64 else 20)
    job = a_job(world, encoder)
    lines, (warning,) = plan(job, there)
    assert "take this" not in "".join(lines)
    assert warning.startswith("memory: ")
    (images, engine, gigabytes) = re.findall(r"micro_batch=(\d+) under (\w+), or .*\(([\d.]+) GB\)", warning)[0]
    cured = replace(job, micro_batch=int(images))
    assert any(line.startswith(f"  {engine} ") and "take this" in line for line in plan(cured, there)[0])
    assert job.memory(engine, 2 * int(images), False)[1] > 0.9e9 * there.gigabytes, "the largest is named"
    lines, warnings = plan(replace(job, activation_checkpointing=True), there)
    (taken,) = (line for line in lines if "take this" in line)
    assert float(re.findall(r"= +([\d.]+) GB", taken)[0]) == pytest.approx(float(gigabytes), rel=0.01)
    assert warnings == []


def test_the_first_engine_that_fits_is_taken():
    """g without images keeps 16.3 GB under ddp; the others less and less, but for the buckets of ZeRO-1 and 2."""
    job = a_job(64, G, batch=64)
    sizes = {engine: job.memory(engine, 1, False)[1] / 1e9 for engine in cost.ENGINES}
    assert sizes["ddp"] > sizes["zero1"] > sizes["fsdp2"]
    for engine in ("ddp", "zero1", "fsdp2"):
        there = device(memory_gb=sizes[engine] * 1.001 / scaling.USABLE)
        (taken,) = (line.split()[0] for line in plan(job, there)[0] if "take this" in line)
        assert taken == engine
    alone = plan(replace(job, world=1, batch=1), RICH)[0]
    assert [line.split()[0] for line in alone if line.startswith("  ")] == ["ddp"]


def test_memory_by_hand():
    """What cost.memory is told: images, bf16 copies, whether gradients are accumulated; a tenth is left free."""
    job = a_job(8)
    images = cost.activation_bytes(Vit(), True, False)
    between, peak = job.memory("ddp", 512, False)
    assert between == 16 * job.parameters
    assert peak == between + 2 * job.parameters + 512 * images
    assert replace(job, micro_batch=64).memory("ddp", 64, False)[1] == peak + 4 * job.parameters - 448 * images
    in_fp32 = replace(job, bf16=False).memory("ddp", 512, False)
    assert in_fp32[1] == between + 512 * cost.activation_bytes(Vit(), False, False)
    for gigabytes, fits in ((peak / 0.899e9, True), (peak / 0.901e9, False)):
        lines = plan(job, device(memory_gb=gigabytes))[0]
        assert lines[4].startswith("  ddp ")
        assert ("take this" in lines[4]) == fits


def test_the_cure_is_an_engine_under_which_enough_images_fit():
    """Where ddp has room for one image of g, another engine for more."""
    job = a_job(64, G, batch=64 * 256)
    room = job.memory("ddp", 1, False)[1] * 1.001 / scaling.USABLE / 1e9
    (warning,) = plan(job, device(memory_gb=room))[1]
    (images, engine) = re.findall(r"micro_batch=(\d+) under (\w+)", warning)[0]
    assert engine != "ddp"
    assert int(images) >= job.enough(RICH)


def test_what_the_run_would_refuse_and_lanes_where_shards_are_remote():
    with pytest.raises(Refusal, match="batch=4096 cannot be shared by 500 processes; these can: 32, 64, 128, 256, 512"):
        plan(a_job(500), H100)
    (warning,) = plan(a_job(512, batch=512 * 64, lanes=16), RICH)[1]
    assert warning.startswith("data.lanes=16: each shard is fetched by 4 nodes: data.lanes=64")
    assert named(a_job(512, batch=512 * 64, lanes=64), RICH) == []
