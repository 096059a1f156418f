"""The plan of a run on many GPUs, by formula and before any GPU is asked for: time, memory, network, loader, limits."""

import math
from dataclasses import dataclass

from ssl_vit.encoders import Encoder
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.estimate import cost
from ssl_vit.report.format import format_number
from ssl_vit.runtime import ENGINES, Engine
from ssl_vit.train.hardware import Hardware

Suggestion = tuple[Engine, str]  # an engine, and what to change
GB = 1e9
USABLE = 0.9  # assumed: the rest of a GPU's memory is the CUDA context's, NCCL's, and lost between allocations
LAUNCH_SECONDS_PER_BLOCK = (
    0.8e-3  # seconds a block and micro batch, assumed: 80 kernels forward and backward, 10 microseconds a launch
)
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

    def seconds(self, device: Hardware) -> float:
        """Of computation a step, were a GPU never to wait; with checkpointing the forward pass is computed twice."""
        flops = cost.image_flops(self.encoder, self.head_macs) * self.share
        return device.compute_seconds(flops, self.activation_checkpointing)

    def min_images(self, device: Hardware) -> int:
        """Images at once from which on their kernels take longer to run than to be launched."""
        return math.ceil(
            LAUNCH_SECONDS_PER_BLOCK
            * len(cost.parameters_per_block(self.encoder))
            / (self.seconds(device) / self.share)
        )

    def memory(self, engine: Engine, micro: int, checkpointing: bool) -> tuple[int, int]:
        """Bytes of a GPU between steps, and at a step's peak."""
        images = micro * cost.activation_bytes(self.encoder, self.bf16, checkpointing)
        copies = 2 * self.parameters if self.bf16 else 0
        block, accumulates = cost.block_parameters(self.encoder), micro < self.share
        return cost.step_memory_bytes(
            engine, self.parameters, block, self.moments, self.world, accumulates, copies, images
        )


@dataclass(frozen=True)
class Limit:
    """Something that a GPU may have to wait for."""

    slowdown: float  # of the step; 1 where nothing waits
    line: str
    warning: str  # what is the limit, by what factor, what to change; '' where it is none


def plan_run(job: Job, device: Hardware) -> tuple[list[str], list[str]]:
    """The lines of a run's plan, and its warnings; ExitError(USAGE) where the processes cannot share the batch."""
    _check_divisible(job)
    seconds, nodes = job.seconds(device), -(-job.world // device.gpus_per_node)
    engine, memory, warnings = _plan_memory(job, device)
    limits = [
        _launch_limit(job, device),
        _network_limit(job, device, engine, seconds),
        *_data_limits(job, device, seconds),
    ]
    hours, slowdown = job.steps * seconds / 3600, max(limit.slowdown for limit in limits)
    assumed = "" if device.tflops else " (assumed)"
    accumulation = f", in {job.share // job.micro} micro batches" if job.micro < job.share else ""
    recompute = ", blocks computed twice" if job.activation_checkpointing else ""
    worst_case = f"; {format_number(hours * slowdown)} hours with the worst of the limits below" if slowdown > 1 else ""
    lines = [
        f"GPUs        {job.world:,} on {nodes:,} node{'s' * (nodes > 1)}, {job.share:,} images each a step"
        f"{accumulation}",
        f"step        {format_number(seconds * 1e3)} ms of computation at {format_number(device.sustained_tflops)} "
        f"TFLOP/s a GPU{assumed}{recompute}: {format_number(job.batch / seconds)} images/s",
        f"run         {job.steps:,} steps, {format_number(job.steps * job.batch / job.samples)} epochs: "
        f"{format_number(hours)} hours, {format_number(hours * job.world)} GPU-hours{worst_case}",
        *memory,
        *(limit.line for limit in limits if limit.line),
    ]
    return lines, [*warnings, *(limit.warning for limit in limits if limit.warning)]


def _check_divisible(job: Job) -> None:
    """Refuse what the run itself would refuse."""
    if job.batch % job.world:
        divisors = [n for n in range(1, job.batch + 1) if job.batch % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - job.world))[:5])
        text = f"batch={job.batch} cannot be shared by {job.world} processes; these can: {', '.join(map(str, nearest))}"
        raise ExitError(ExitCode.USAGE, text)
    if job.share % job.micro:
        text = f"micro_batch={job.micro} does not divide the {job.share} images of each of {job.world} processes"
        raise ExitError(ExitCode.USAGE, text)


def _plan_memory(job: Job, device: Hardware) -> tuple[Engine, list[str], list[str]]:
    """The engine to take, which is the first that fits; the table of engines; a warning where none fits."""
    room, checkpointing = USABLE * device.gpu_memory_gb * GB, job.activation_checkpointing
    engines: tuple[Engine, ...] = ENGINES if job.world > 1 else ENGINES[:1]
    sizes = {engine: job.memory(engine, job.micro, checkpointing) for engine in engines}
    fitting: list[Engine] = [engine for engine in engines if sizes[engine][1] <= room]
    suggestions = [] if fitting else _suggest_changes(job, engines, room, job.min_images(device))
    bytes_per_image = cost.activation_bytes(job.encoder, job.bf16, checkpointing) / 1e6
    usable = f"{room / GB:.3g} of {device.gpu_memory_gb:g} GB usable"
    lines = [f"memory      {usable}; {job.micro:,} images at once, {format_number(bytes_per_image)} MB each"]
    for engine, (persistent, peak) in sizes.items():
        verdict = f"{peak / room:.2g} times too much" if peak > room else "fits"
        table = f"model {persistent / GB:6.2f} + step {(peak - persistent) / GB:6.2f} = {peak / GB:6.2f} GB"
        lines.append(f"  {engine:<9} {table}  {'take this' if fitting[:1] == [engine] else verdict}")
    if fitting:
        return fitting[0], lines, []
    factor = min(peak for _, peak in sizes.values()) / room
    text = ", or ".join(f"{hint} under {engine}" for engine, hint in suggestions) or "a smaller encoder"
    return suggestions[0][0] if suggestions else "fsdp2", lines, [f"memory: {factor:.2g} times too small: {text}"]


def _suggest_changes(job: Job, engines: tuple[Engine, ...], room: float, min_images: int) -> list[Suggestion]:
    """What makes a run fit that fits under no engine: fewer images at once, and activation checkpointing.

    Of the former it is the first engine under which still enough images fit, or else the one with most.
    """
    smaller = [images for images in range(job.micro - 1, 0, -1) if job.share % images == 0]
    checkpointing = job.activation_checkpointing
    fitting: list[tuple[Engine, int]] = [
        (e, n) for e in engines for n in smaller if job.memory(e, n, checkpointing)[1] <= room
    ]
    fitting.sort(key=lambda fit: -min(fit[1], min_images))
    micro_batches: list[Suggestion] = [(e, f"micro_batch={n}") for e, n in fitting]
    checkpointed: list[Suggestion] = [
        (e, f"activation_checkpointing=true ({size / GB:.3g} GB)")
        for e in engines
        if (size := job.memory(e, job.micro, True)[1]) <= room
    ]
    return micro_batches[:1] + checkpointed[:1]


def oom_suggestions(job: Job, engine: Engine, room: float) -> list[tuple[str, int]]:
    """What to set where a step did not fit into `room` bytes, each with the memory that it takes by formula.

    The images at once are the most that fit by formula, and at most half of those that did not.
    """
    checkpointing = job.activation_checkpointing
    smaller = [images for images in range(job.micro // 2, 0, -1) if job.share % images == 0]
    sizes = {images: job.memory(engine, images, checkpointing)[1] for images in smaller}
    images = next((images for images in smaller if sizes[images] <= USABLE * room), smaller[-1] if smaller else 0)
    suggestions = [(f"micro_batch={images}", sizes[images])] if images else []
    return (
        suggestions
        if checkpointing
        else [*suggestions, ("activation_checkpointing=true", job.memory(engine, job.micro, True)[1])]
    )


def _network_limit(job: Job, device: Hardware, engine: Engine, seconds: float) -> Limit:
    """What the engine sends, against what the network takes while the GPU computes.

    DDP sends while the last micro batch goes back, which is 2/3 of its computation; the others are taken to send all
    the time. A ring enters and leaves a node once, so the network cards of a node share the load of one GPU.
    """
    if job.world == 1:
        return Limit(1, "", "")
    micro_batches = job.share // job.micro
    bytes_sent = cost.sent_bytes(engine, job.parameters, job.world, micro_batches)
    text = f"network     {engine} sends {format_number(bytes_sent / GB)} GB a GPU and step"
    if job.world <= device.gpus_per_node:
        return Limit(1, f"{text}, within the node", "")
    window = 2 / 3 / micro_batches if engine == "ddp" else 1.0
    required = 8 * bytes_sent / (seconds * window) / device.gpus_per_node / 1e9
    factor = required / device.network_gbps
    line = f"{text}; computation hides it at {format_number(required)} Gbit/s a GPU, there are {device.network_gbps:g}"
    warning = f"network: {factor:.2g} times too slow to hide behind computation: a larger batch, or fewer GPUs"
    return Limit(1 + window * max(0.0, factor - 1), line, warning if factor > 1 else "")


def core_rate(sample_bytes: float) -> float:
    """Images/s of a core: its time a sample is a straight line in the bytes, through the two measured points."""
    (small_bytes, small_rate), (large_bytes, large_rate) = SMALL, LARGE
    return 1 / (
        1 / small_rate + (1 / large_rate - 1 / small_rate) * (sample_bytes - small_bytes) / (large_bytes - small_bytes)
    )


def _data_limits(job: Job, device: Hardware, seconds: float) -> list[Limit]:
    """What loader and storage have to deliver so that no GPU waits."""
    images, rate, size = job.share / seconds, core_rate(job.sample_bytes), job.sample_bytes
    cores, gbs = images / rate, images * min(job.world, device.gpus_per_node) * size / GB
    line = f"{format_number(images)} images/s a GPU take {format_number(cores)} cores"
    line += f" at {format_number(rate)} images/s each"
    loader = _supply_limit("loader", cores, device.cores, line, size, "more cores a GPU")
    line = f"{format_number(gbs)} GB/s a node at {size / 1e3:.3g} kB a sample"
    storage = _supply_limit("storage", gbs, device.storage_gbs, line, size, "a copy on each node's own disk")
    nodes = -(-job.world // device.gpus_per_node)
    if job.lanes is not None and nodes > job.lanes:
        hint = f"data.lanes={nodes}, from the first step on: it changes the order of samples"
        warning = f"data.lanes={job.lanes}: each shard is fetched by {nodes / job.lanes:.2g} nodes: {hint}"
        return [loader, storage, Limit(1, "", warning)]
    return [loader, storage]


def _supply_limit(name: str, required: float, available: float, line: str, sample_bytes: float, hint: str) -> Limit:
    factor = required / available
    shrunk = "shards made with resize=256, or " if sample_bytes > 1.5 * SMALL[0] else ""
    warning = f"{name}: {factor:.2g} times too slow: {shrunk}{hint}" if factor > 1 else ""
    return Limit(max(1, factor), f"{name:<12}{line}, there are {available:g}", warning)


def _launch_limit(job: Job, device: Hardware) -> Limit:
    """Kernels have to run longer than their launches take: below that a GPU waits for its host."""
    launches, computes = (
        LAUNCH_SECONDS_PER_BLOCK * len(cost.parameters_per_block(job.encoder)),
        job.seconds(device) * job.micro / job.share,
    )
    factor, min_images = launches / computes, job.min_images(device)
    line = f"batch       {job.micro:,} images at once take {format_number(computes * 1e3)} ms to compute, "
    line += f"{format_number(launches * 1e3)} ms to launch (assumed): {min_images:,} fill a GPU"
    divisors = [n for n in range(1, job.world + 1) if job.batch % n == 0 and job.batch >= n * min_images]
    hint = "a larger micro_batch" if job.micro < job.share else f"a larger batch, or {max(divisors, default=1)} GPUs"
    warning = f"batch: {factor:.2g} times too few images at once, the GPU waits for kernels to be launched: {hint}"
    return Limit(max(1, factor), line, warning if factor > 1 else "")
