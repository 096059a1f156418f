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
from ssl_vit.errors import USAGE, Refusal, out_of_memory
from ssl_vit.estimate import cost
from ssl_vit.model import Batch, Model, count_parameters
from ssl_vit.train import optim
from ssl_vit.train.prepare import has_compiler
from tools.benchmarks import contestants
from tools.benchmarks.engines import forget
from tools.benchmarks.racing import Row, grid, images

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


def measure(made: Options) -> Iterator[Row]:
    """A row for every contestant, and one for the formula."""
    made = settled(made)
    model, one = setup.build(made, CLASSES), images(1, made.encoder, device())
    known = (OURS, *rivals(made, model, one))
    taking_part = [who for who in known if not made.who or who.startswith(made.who)]
    if not taking_part:
        raise Refusal(USAGE, f"who={','.join(made.who)}: there are {'; '.join(known)}")
    precision = "bf16" if runtime.uses_bf16(made.precision) else "fp32"
    height, width = made.encoder.image_hw
    case = f"{made.encoder.title} at {height} x {width}, {precision}, {made.limit:.2f} GiB"
    first = None
    for who in taking_part:
        row = {"benchmark": "memory", "case": case, "who": who, "images_per_second": None, **contest(made, who)}
        first = first or row["largest_batch"]
        yield {**row, "ratio": round(row["largest_batch"] / first, 3) if first else None}
    yield {"benchmark": "memory", "case": case, "who": FORMULA, **formula(made, count_parameters(model))}


def settled(made: Options) -> Options:
    """With all that was left open decided."""
    gpu = runtime.on_gpu()
    made, _, _ = recipes.resolve(made)  # type: ignore[assignment]
    there = runtime.memory()[1] / 2**30
    most = made.most or (4096 if gpu else 64)
    batches = tuple(sorted(made.batches)) or tuple(doubled(min(128 if gpu else 8, most), most))
    if batches[0] < 1:
        raise Refusal(USAGE, f"batches={batches[0]}: give numbers above 0, such as 8,16,32")
    chosen = {"most": max(most, batches[-1]), "batches": batches, "granularity": made.granularity or (64 if gpu else 8)}
    return made.model_copy(update={**chosen, "limit": made.limit or (there if gpu else there / 2)})


def contest(made: Options, who: str) -> Row:
    """The peaks of a contestant, the largest batch that it takes, and the slope of its memory."""
    assert made.most
    assert made.granularity
    peaks: dict[int, int | None] = {}

    def fits(batch: int) -> bool:
        peaks[batch] = peak(made, who, batch)
        return peaks[batch] is not None

    sizes = [*made.batches, *doubled(2 * made.batches[-1], made.most)]
    low, high = largest(fits, sizes, made.granularity)
    return {
        "peak_gib": {str(batch): gib(size) for batch, size in sorted(peaks.items())},
        "largest_batch": low,
        "fails_at": high,
        "mb_an_image": slope(peaks),
    }


def slope(peaks: dict[int, int | None]) -> float | None:
    """MB an image, from a batch of at most half of the largest that fits to that one."""
    found = {batch: size for batch, size in peaks.items() if size is not None}
    large = max(found, default=0)
    small = max((batch for batch in found if batch <= large / 2), default=None)
    return None if small is None else round((found[large] - found[small]) / (large - small) / 1e6, 3)


def formula(made: Options, parameters: int) -> Row:
    """What ssl_vit.estimate.cost expects of the same batches."""
    bf16 = runtime.uses_bf16(made.precision)
    each = cost.activation_bytes(made.encoder, bf16, made.activation_checkpointing)
    block, moments = cost.block_parameters(made.encoder), optim.moments(made.optim)
    of = partial(cost.memory, "ddp", parameters, block, moments, 1, False, 2 * parameters if bf16 else 0)
    peaks = {str(batch): gib(of(images=batch * each)[1]) for batch in made.batches}
    return {
        "images_per_second": None,
        "ratio": None,
        "peak_gib": peaks,
        "largest_batch": None,
        "fails_at": None,
        "mb_an_image": round(each / 1e6, 3),
    }


def gib(size: int | None) -> float | None:
    """Bytes for reading."""
    return None if size is None else round(size / 2**30, 4)


def doubled(first: int, most: int) -> Iterator[int]:
    """The first, its doubles, and at last the most there may be; half of the first was tried before."""
    while first < most:
        yield first
        first *= 2
    if first // 2 < most:
        yield most


def largest(fits: Callable[[int], bool], sizes: Iterable[int], granularity: int) -> tuple[int, int | None]:
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


def peak(made: Options, who: str, batch: int) -> int | None:
    """Peak bytes of a contestant's step, or None where memory does not hold it."""
    if runtime.on_gpu():
        found = allocated(made, who, batch)
        release()
        return found
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        try:
            return processes.submit(resident, made, who, batch).result()
        except BrokenProcessPool:  # the system ended it, as it does where memory is used up
            return None


def allocated(made: Options, who: str, batch: int) -> int | None:
    """As torch counts it, on a GPU."""
    assert made.limit
    torch.cuda.set_per_process_memory_fraction(min(1.0, made.limit * 2**30 / torch.cuda.mem_get_info()[1]))
    try:
        train(made, who, batch, torch.cuda.reset_peak_memory_stats)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        return None
    return torch.cuda.max_memory_allocated()


def resident(made: Options, who: str, batch: int) -> int | None:
    """As the system counts it, in a process for this alone."""
    assert made.limit
    for name in IMPORTS[:2] if who == OURS else IMPORTS:
        with suppress(ImportError):
            importlib.import_module(name)
    before, hard = status("VmRSS"), resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + int(made.limit * 2**30), hard))
    try:
        train(made, who, batch, lambda: Path("/proc/self/clear_refs").write_text("5"))  # VmHWM := VmRSS
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return None
    return status("VmHWM") - before


def status(name: str) -> int:
    """Bytes of this process, of a line of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def train(made: Options, who: str, batch: int, forget_peak: Callable[[], object]) -> None:
    """Three steps, of which the first one's peak is forgotten: it makes what later ones find."""
    sized = made.model_copy(update={"batch": batch, "micro_batch": None})
    model, given = setup.build(sized, CLASSES), images(batch, made.encoder, device())
    if who == OURS:
        step = contestants.ours(sized, model, given, Path(made.output))
    else:
        step = rivals(sized, model, given)[who]()
    del model
    step()
    forget_peak()
    step()
    step()
    if runtime.on_gpu():
        torch.cuda.synchronize()


def rivals(made: Options, model: Model, given: Batch) -> contestants.Rivals:
    """Those that are installed."""
    compiled = made.compiled_rivals and runtime.on_gpu() and has_compiler()
    return contestants.rivals(made, model, given, compiled=compiled)


def device() -> torch.device:
    """Where steps run."""
    return torch.device("cuda" if runtime.on_gpu() else "cpu")


def lacks_memory(error: BaseException) -> bool:
    """Whether it ended because memory did, also as libraries below torch say it."""
    words = ("out of memory", "ALLOC_FAILED", "bad_alloc")
    return out_of_memory(error) or any(word in str(error) for word in words)


def release() -> None:
    """Let the next measurement find a GPU as a new process does; compiled code would else go on to any batch."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    forget()


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
    return f"{rows[0]['case']}\n{grid(heads, lines)}"
