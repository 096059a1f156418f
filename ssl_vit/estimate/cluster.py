"""The plan of a run on many GPUs, by formula and before any GPU is asked for: time, memory, network, loader, limits."""

import math
from dataclasses import dataclass

from ssl_vit.encoders import Encoder
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.estimate import cost
from ssl_vit.report.format import number
from ssl_vit.runtime import ENGINES, Engine
from ssl_vit.train.hardware import Device

Cure = tuple[Engine, str]  # an engine, and what to change
GB = 1e9
USABLE = 0.9  # assumed: the rest of a GPU's memory is the CUDA context's, NCCL's, and lost between allocations
HOST = 0.8e-3  # seconds a block and micro batch, assumed: 80 kernels forward and backward, 10 microseconds a launch
# bytes of shard a sample, and images/s that a core reads, decodes and crops to 224 pixels: measured, docs/data.md
SMALL, LARGE = (33_341, 1834), (112_558, 642)


@dataclass(frozen=True)
class Job:
    """The numbers of a run that its plan depends on."""

    encoder: Encoder
    head_macs: int  # multiply-accumulates an image
    parameters: int  # of encoder and head
    moments: int  # numbers that the optimizer keeps a parameter
    batch: int
    micro_batch: int | None
    steps: int
    world: int
    activation_checkpointing: bool
    bf16: bool
    sample_bytes: float  # of shard, a sample
    samples: int  # an epoch
    lanes: int | None  # of the data where its shards are remote

    @property
    def share(self) -> int:
        """Images a GPU and step."""
        return self.batch // self.world

    @property
    def micro(self) -> int:
        """Images that a GPU takes at once."""
        return self.micro_batch or self.share

    def seconds(self, device: Device) -> float:
        """Of computation a step, were a GPU never to wait; with checkpointing the forward pass is computed twice."""
        flops = cost.image_flops(self.encoder, self.head_macs) * self.share
        return device.seconds(flops, self.activation_checkpointing)

    def enough(self, device: Device) -> int:
        """Images at once from which on their kernels take longer to run than to be launched."""
        return math.ceil(HOST * len(cost.blocks(self.encoder)) / (self.seconds(device) / self.share))

    def memory(self, engine: Engine, micro: int, checkpointing: bool) -> tuple[int, int]:
        """Bytes of a GPU between steps, and at a step's peak."""
        images = micro * cost.activation_bytes(self.encoder, self.bf16, checkpointing)
        copies = 2 * self.parameters if self.bf16 else 0
        block, accumulates = cost.block_parameters(self.encoder), micro < self.share
        return cost.memory(engine, self.parameters, block, self.moments, self.world, accumulates, copies, images)


@dataclass(frozen=True)
class Limit:
    """Something that a GPU may have to wait for."""

    slowdown: float  # of the step; 1 where nothing waits
    line: str
    warning: str  # what is the limit, by what factor, what to change; '' where it is none


def plan(job: Job, device: Device) -> tuple[list[str], list[str]]:
    """The lines of a run's plan, and its warnings; Refusal(USAGE) where the processes cannot share the batch."""
    _check(job)
    seconds, nodes = job.seconds(device), -(-job.world // device.gpus_per_node)
    engine, memory, warnings = _memory(job, device)
    limits = [_host(job, device), _network(job, device, engine, seconds), *_data(job, device, seconds)]
    hours, slowdown = job.steps * seconds / 3600, max(limit.slowdown for limit in limits)
    assumed = "" if device.tflops else " (assumed)"
    pieces = f", in {job.share // job.micro} micro batches" if job.micro < job.share else ""
    again = ", blocks computed twice" if job.activation_checkpointing else ""
    longer = f"; {number(hours * slowdown)} hours with the worst of the limits below" if slowdown > 1 else ""
    lines = [
        f"GPUs        {job.world:,} on {nodes:,} node{'s' * (nodes > 1)}, {job.share:,} images each a step{pieces}",
        f"step        {number(seconds * 1e3)} ms of computation at {number(device.sustained)} TFLOP/s a GPU{assumed}"
        f"{again}: {number(job.batch / seconds)} images/s",
        f"run         {job.steps:,} steps, {number(job.steps * job.batch / job.samples)} epochs: "
        f"{number(hours)} hours, {number(hours * job.world)} GPU-hours{longer}",
        *memory,
        *(limit.line for limit in limits if limit.line),
    ]
    return lines, [*warnings, *(limit.warning for limit in limits if limit.warning)]


def _check(job: Job) -> None:
    """Refuse what the run itself would refuse."""
    if job.batch % job.world:
        shares = [n for n in range(1, job.batch + 1) if job.batch % n == 0]
        near = sorted(sorted(shares, key=lambda n: abs(n - job.world))[:5])
        text = f"batch={job.batch} cannot be shared by {job.world} processes; these can: {', '.join(map(str, near))}"
        raise Refusal(USAGE, text)
    if job.share % job.micro:
        text = f"micro_batch={job.micro} does not divide the {job.share} images of each of {job.world} processes"
        raise Refusal(USAGE, text)


def _memory(job: Job, device: Device) -> tuple[Engine, list[str], list[str]]:
    """The engine to take, which is the first that fits; the table of engines; a warning where none fits."""
    room, again = USABLE * device.gigabytes * GB, job.activation_checkpointing
    engines: tuple[Engine, ...] = ENGINES if job.world > 1 else ENGINES[:1]
    sizes = {engine: job.memory(engine, job.micro, again) for engine in engines}
    fitting: list[Engine] = [engine for engine in engines if sizes[engine][1] <= room]
    cures = [] if fitting else _cures(job, engines, room, job.enough(device))
    each = cost.activation_bytes(job.encoder, job.bf16, again) / 1e6
    usable = f"{room / GB:.3g} of {device.gigabytes:g} GB usable"
    lines = [f"memory      {usable}; {job.micro:,} images at once, {number(each)} MB each"]
    for engine, (kept, peak) in sizes.items():
        verdict = f"{peak / room:.2g} times too much" if peak > room else "fits"
        table = f"model {kept / GB:6.2f} + step {(peak - kept) / GB:6.2f} = {peak / GB:6.2f} GB"
        lines.append(f"  {engine:<9} {table}  {'take this' if fitting[:1] == [engine] else verdict}")
    if fitting:
        return fitting[0], lines, []
    factor = min(peak for _, peak in sizes.values()) / room
    text = ", or ".join(f"{cure} under {engine}" for engine, cure in cures) or "a smaller encoder"
    return cures[0][0] if cures else "fsdp2", lines, [f"memory: {factor:.2g} times too small: {text}"]


def _cures(job: Job, engines: tuple[Engine, ...], room: float, enough: int) -> list[Cure]:
    """What makes a run fit that fits under no engine: fewer images at once, and activation checkpointing.

    Of the former it is the first engine under which still enough images fit, or else the one with most.
    """
    fewer = [images for images in range(job.micro - 1, 0, -1) if job.share % images == 0]
    again = job.activation_checkpointing
    fitting: list[tuple[Engine, int]] = [(e, n) for e in engines for n in fewer if job.memory(e, n, again)[1] <= room]
    fitting.sort(key=lambda found: -min(found[1], enough))
    pieces: list[Cure] = [(e, f"micro_batch={n}") for e, n in fitting]
    twice: list[Cure] = [
        (e, f"activation_checkpointing=true ({size / GB:.3g} GB)")
        for e in engines
        if (size := job.memory(e, job.micro, True)[1]) <= room
    ]
    return pieces[:1] + twice[:1]


def relief(job: Job, engine: Engine, room: float) -> list[tuple[str, int]]:
    """What to set where a step did not fit into `room` bytes, each with the memory that it takes by formula.

    The images at once are the most that fit by formula, and at most half of those that did not.
    """
    again = job.activation_checkpointing
    fewer = [images for images in range(job.micro // 2, 0, -1) if job.share % images == 0]
    sizes = {images: job.memory(engine, images, again)[1] for images in fewer}
    images = next((images for images in fewer if sizes[images] <= USABLE * room), fewer[-1] if fewer else 0)
    cures = [(f"micro_batch={images}", sizes[images])] if images else []
    return cures if again else [*cures, ("activation_checkpointing=true", job.memory(engine, job.micro, True)[1])]


def _network(job: Job, device: Device, engine: Engine, seconds: float) -> Limit:
    """What the engine sends, against what the network takes while the GPU computes.

    DDP sends while the last micro batch goes back, which is 2/3 of its computation; the others are taken to send all
    the time. A ring enters and leaves a node once, so the network cards of a node share the load of one GPU.
    """
    if job.world == 1:
        return Limit(1, "", "")
    pieces = job.share // job.micro
    sent = cost.sent_bytes(engine, job.parameters, job.world, pieces)
    text = f"network     {engine} sends {number(sent / GB)} GB a GPU and step"
    if job.world <= device.gpus_per_node:
        return Limit(1, f"{text}, within the node", "")
    window = 2 / 3 / pieces if engine == "ddp" else 1.0
    need = 8 * sent / (seconds * window) / device.gpus_per_node / 1e9
    factor = need / device.network_gbps
    line = f"{text}; computation hides it at {number(need)} Gbit/s a GPU, there are {device.network_gbps:g}"
    warning = f"network: {factor:.2g} times too slow to hide behind computation: a larger batch, or fewer GPUs"
    return Limit(1 + window * max(0.0, factor - 1), line, warning if factor > 1 else "")


def core_rate(sample_bytes: float) -> float:
    """Images/s of a core: its time a sample is a straight line in the bytes, through the two measured points."""
    (less, fast), (more, slow) = SMALL, LARGE
    return 1 / (1 / fast + (1 / slow - 1 / fast) * (sample_bytes - less) / (more - less))


def _data(job: Job, device: Device, seconds: float) -> list[Limit]:
    """What loader and storage have to deliver so that no GPU waits."""
    images, rate, size = job.share / seconds, core_rate(job.sample_bytes), job.sample_bytes
    cores, gbs = images / rate, images * min(job.world, device.gpus_per_node) * size / GB
    line = f"{number(images)} images/s a GPU take {number(cores)} cores at {number(rate)} images/s each"
    loader = _supply("loader", cores, device.cores, line, size, "more cores a GPU")
    line = f"{number(gbs)} GB/s a node at {size / 1e3:.3g} kB a sample"
    storage = _supply("storage", gbs, device.storage_gbs, line, size, "a copy on each node's own disk")
    nodes = -(-job.world // device.gpus_per_node)
    if job.lanes is not None and nodes > job.lanes:
        cure = f"data.lanes={nodes}, from the first step on: it changes the order of samples"
        warning = f"data.lanes={job.lanes}: each shard is fetched by {nodes / job.lanes:.2g} nodes: {cure}"
        return [loader, storage, Limit(1, "", warning)]
    return [loader, storage]


def _supply(name: str, need: float, has: float, line: str, sample_bytes: float, cure: str) -> Limit:
    factor = need / has
    shrunk = "shards made with resize=256, or " if sample_bytes > 1.5 * SMALL[0] else ""
    warning = f"{name}: {factor:.2g} times too slow: {shrunk}{cure}" if factor > 1 else ""
    return Limit(max(1, factor), f"{name:<12}{line}, there are {has:g}", warning)


def _host(job: Job, device: Device) -> Limit:
    """Kernels have to run longer than their launches take: below that a GPU waits for its host."""
    launches, computes = HOST * len(cost.blocks(job.encoder)), job.seconds(device) * job.micro / job.share
    factor, enough = launches / computes, job.enough(device)
    line = f"batch       {job.micro:,} images at once take {number(computes * 1e3)} ms to compute, "
    line += f"{number(launches * 1e3)} ms to launch (assumed): {enough:,} fill a GPU"
    shares = [n for n in range(1, job.world + 1) if job.batch % n == 0 and job.batch >= n * enough]
    cure = "a larger micro_batch" if job.micro < job.share else f"a larger batch, or {max(shares, default=1)} GPUs"
    warning = f"batch: {factor:.2g} times too few images at once, the GPU waits for kernels to be launched: {cure}"
    return Limit(max(1, factor), line, warning if factor > 1 else "")
