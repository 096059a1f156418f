"""Peak memory of a training step by batch, and the largest batch that fits, of ours and of its rivals.

Each measurement builds its contestant anew and takes three steps on random images; the peak is that of the last two.
On a GPU it is what torch had allocated (torch.cuda.max_memory_allocated), everything before it being given back.

A CPU has no such counter. There each measurement is a process of its own, and the peak what it had resident at most
(VmHWM of /proc/self/status, set back after the first step) beyond what it had when all was imported. Not ru_maxrss,
which in a new process begins with its parent's. `limit` is what the process may allocate beyond its imports, by
RLIMIT_DATA: above it the allocator refuses, as a GPU's does. Some 40 MB of that peak are code that steps touch first.

The largest batch is found by doubling, from the largest of `batches`, and by halving what is between, in multiples of
`granularity`; the smallest that did not fit is told too. MB an image is the slope from at most half of the largest
batch to that; the formula's is of an eager encoder without head (ssl_vit/estimate/cost.py, docs/scaling.md).

`python tools/benchmark.py memory recipe=NAME` runs it.
"""

import importlib
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from pydantic import Field

from ssl_vit import recipes, runtime
from ssl_vit.commands import setup
from ssl_vit.errors import ExitCode, ExitError, is_out_of_memory
from ssl_vit.estimate import cost
from ssl_vit.model import Batch, Model, count_parameters
from ssl_vit.train import optim
from ssl_vit.train.prepare import has_compiler
from tools.benchmarks import baselines
from tools.benchmarks.engines import reset_state
from tools.benchmarks.timing import Row, format_table, random_batch

OURS = "ssl_vit"
FORMULA = "formula"
CLASSES = 1000  # of a classifier
IMPORTS = ("accelerate", "torch._dynamo", "timm", "transformers.models.vit.modeling_vit")  # what contestants ask for


class Options(recipes.Pretrain):
    """A recipe, and which batches are tried."""

    batches: tuple[int, ...] = Field(
        default=(), description="images at once (none given: doubling up to `most`, from 128 on a GPU, 8 on a CPU)"
    )
    most: int | None = Field(default=None, ge=1, description="where doubling ends (none: 4096 on a GPU, 64 on a CPU)")
    granularity: int | None = Field(
        default=None, ge=1, description="the largest batch is a multiple of it (none: 64 on a GPU, 8 on a CPU)"
    )
    limit: float | None = Field(
        default=None, gt=0, description="memory there is, GiB (none: all of the GPU's, half of the machine's)"
    )
    who: tuple[str, ...] = Field(
        default=(), description=f"contestants, by how their names begin (none given: {OURS} and all rivals)"
    )
    compiled_rivals: bool = Field(default=True, description="on a GPU, rivals compiled as a whole too (takes minutes)")
    output: str = Field(default="runs/benchmark", description="folder for the JSON")


def measure(options: Options) -> Iterator[Row]:
    """A row for every contestant, and one for the formula."""
    options = resolve_options(options)
    model, sample = setup.build_model(options, CLASSES), random_batch(1, options.encoder, default_device())
    contestants = (OURS, *rivals(options, model, sample))
    selected = [contestant for contestant in contestants if not options.who or contestant.startswith(options.who)]
    if not selected:
        raise ExitError(ExitCode.USAGE, f"who={','.join(options.who)}: there are {'; '.join(contestants)}")
    precision = "bf16" if runtime.uses_bf16(options.precision) else "fp32"
    height, width = options.encoder.image_hw
    case = f"{options.encoder.title} at {height} x {width}, {precision}, {options.limit:.2f} GiB"
    first = None
    for contestant in selected:
        row = {
            "benchmark": "memory",
            "case": case,
            "who": contestant,
            "images_per_second": None,
            **measure_contestant(options, contestant),
        }
        first = first or row["largest_batch"]
        yield {**row, "ratio": round(row["largest_batch"] / first, 3) if first else None}
    yield {"benchmark": "memory", "case": case, "who": FORMULA, **formula_row(options, count_parameters(model))}


def resolve_options(options: Options) -> Options:
    """With all that was left open decided."""
    gpu = runtime.on_gpu()
    options, _, _ = recipes.resolve_recipe(options)  # type: ignore[assignment]
    available = runtime.peak_and_total_memory()[1] / 2**30
    most = options.most or (4096 if gpu else 64)
    batches = tuple(sorted(options.batches)) or tuple(doubling_sizes(min(128 if gpu else 8, most), most))
    if batches[0] < 1:
        raise ExitError(ExitCode.USAGE, f"batches={batches[0]}: give numbers above 0, such as 8,16,32")
    updates = {
        "most": max(most, batches[-1]),
        "batches": batches,
        "granularity": options.granularity or (64 if gpu else 8),
    }
    return options.model_copy(update={**updates, "limit": options.limit or (available if gpu else available / 2)})


def measure_contestant(options: Options, contestant: str) -> Row:
    """The peaks of a contestant, the largest batch that it takes, and the slope of its memory."""
    assert options.most
    assert options.granularity
    peaks: dict[int, int | None] = {}

    def fits(batch: int) -> bool:
        peaks[batch] = peak_bytes(options, contestant, batch)
        return peaks[batch] is not None

    sizes = [*options.batches, *doubling_sizes(2 * options.batches[-1], options.most)]
    low, high = find_largest(fits, sizes, options.granularity)
    return {
        "peak_gib": {str(batch): gib(size) for batch, size in sorted(peaks.items())},
        "largest_batch": low,
        "fails_at": high,
        "mb_an_image": slope(peaks),
    }


def slope(peaks: dict[int, int | None]) -> float | None:
    """MB an image, from a batch of at most half of the largest that fits to that one."""
    measured = {batch: size for batch, size in peaks.items() if size is not None}
    large = max(measured, default=0)
    small = max((batch for batch in measured if batch <= large / 2), default=None)
    return None if small is None else round((measured[large] - measured[small]) / (large - small) / 1e6, 3)


def formula_row(options: Options, parameters: int) -> Row:
    """What ssl_vit.estimate.cost expects of the same batches."""
    bf16 = runtime.uses_bf16(options.precision)
    bytes_per_image = cost.activation_bytes(options.encoder, bf16, options.activation_checkpointing)
    block, moments = cost.block_parameters(options.encoder), optim.num_moments(options.optim)
    step_memory = partial(
        cost.step_memory_bytes, "ddp", parameters, block, moments, 1, False, 2 * parameters if bf16 else 0
    )
    peaks = {str(batch): gib(step_memory(images=batch * bytes_per_image)[1]) for batch in options.batches}
    return {
        "images_per_second": None,
        "ratio": None,
        "peak_gib": peaks,
        "largest_batch": None,
        "fails_at": None,
        "mb_an_image": round(bytes_per_image / 1e6, 3),
    }


def gib(size: int | None) -> float | None:
    """Bytes for reading."""
    return None if size is None else round(size / 2**30, 4)


def doubling_sizes(first: int, most: int) -> Iterator[int]:
    """The first, its doubles, and at last the most there may be; half of the first was tried before."""
    while first < most:
        yield first
        first *= 2
    if first // 2 < most:
        yield most


def find_largest(fits: Callable[[int], bool], sizes: Iterable[int], granularity: int) -> tuple[int, int | None]:
    """The largest batch that fits, 0 for none, and the smallest that was seen not to.

    Sizes are tried as they come, until one does not fit; then multiples of `granularity` before it, by halves.
    """
    low, high = 0, None
    for size in sizes:
        if not fits(size):
            high = size
            break
        low = size
    while high and (between := range((low // granularity + 1) * granularity, high, granularity)):
        middle = between[len(between) // 2]
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def peak_bytes(options: Options, contestant: str, batch: int) -> int | None:
    """Peak bytes of a contestant's step, or None where memory does not hold it."""
    if runtime.on_gpu():
        num_bytes = gpu_peak_bytes(options, contestant, batch)
        release()
        return num_bytes
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        try:
            return processes.submit(cpu_peak_bytes, options, contestant, batch).result()
        except BrokenProcessPool:  # the system ended it, as it does where memory is used up
            return None


def gpu_peak_bytes(options: Options, contestant: str, batch: int) -> int | None:
    """As torch counts it, on a GPU."""
    assert options.limit
    torch.cuda.set_per_process_memory_fraction(min(1.0, options.limit * 2**30 / torch.cuda.mem_get_info()[1]))
    try:
        train(options, contestant, batch, torch.cuda.reset_peak_memory_stats)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        return None
    return torch.cuda.max_memory_allocated()


def cpu_peak_bytes(options: Options, contestant: str, batch: int) -> int | None:
    """As the system counts it, in a process for this alone."""
    assert options.limit
    for name in IMPORTS[:2] if contestant == OURS else IMPORTS:
        with suppress(ImportError):
            importlib.import_module(name)
    before, hard = proc_status_bytes("VmRSS"), resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (proc_status_bytes("VmData") + int(options.limit * 2**30), hard))
    try:
        train(options, contestant, batch, lambda: Path("/proc/self/clear_refs").write_text("5"))  # VmHWM := VmRSS
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return None
    return proc_status_bytes("VmHWM") - before


def proc_status_bytes(name: str) -> int:
    """Bytes of this process, of a line of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def train(options: Options, contestant: str, batch: int, forget_peak: Callable[[], object]) -> None:
    """Three steps, of which the first one's peak is forgotten: it makes what later ones find."""
    recipe = options.model_copy(update={"batch": batch, "micro_batch": None})
    model, inputs = setup.build_model(recipe, CLASSES), random_batch(batch, options.encoder, default_device())
    is_ours = contestant == OURS
    step = (
        baselines.ssl_vit_step(recipe, model, inputs, Path(options.output))
        if is_ours
        else rivals(recipe, model, inputs)[contestant]()
    )
    del model
    step()
    forget_peak()
    step()
    step()
    if runtime.on_gpu():
        torch.cuda.synchronize()


def rivals(options: Options, model: Model, inputs: Batch) -> baselines.Rivals:
    """Those that are installed."""
    compiled = options.compiled_rivals and runtime.on_gpu() and has_compiler()
    return baselines.rivals(options, model, inputs, compiled=compiled)


def default_device() -> torch.device:
    """Where steps run."""
    return torch.device("cuda" if runtime.on_gpu() else "cpu")


def lacks_memory(error: BaseException) -> bool:
    """Whether it ended because memory did, also as libraries below torch say it."""
    words = ("out of memory", "ALLOC_FAILED", "bad_alloc")
    return is_out_of_memory(error) or any(word in str(error) for word in words)


def release() -> None:
    """Let the next measurement find a GPU as a new process does; compiled code would else go on to any batch."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    reset_state()


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    sizes = sorted({int(batch) for row in rows for batch in row["peak_gib"]})
    lines = []
    for row in rows:
        peaks = [row["peak_gib"].get(str(size), "") for size in sizes]
        cells = ["no" if peak is None else peak and f"{peak:.3f}" for peak in peaks]
        ends = ["", ""]
        if row["who"] != FORMULA:
            ends = [str(row["largest_batch"]), str(row["fails_at"] or "not tried")]
        lines.append([row["who"], *cells, *ends, "" if row["mb_an_image"] is None else f"{row['mb_an_image']:.2f}"])
    heads = ["GiB at batch", *map(str, sizes), "largest", "fails at", "MB an image"]
    return f"{rows[0]['case']}\n{format_table(heads, lines)}"
