"""Images/s of encoders over input sizes, each at its best batch, and the largest batch that fits (paper, Figure 12).

A pass is forward only, in eval mode, of uint8 images to tokens, eager. Batches are doubled until two in a row bring
less than 5 % more, or memory ends; ours and timm's model of the same name then take turns, each at its best batch, with
the same weights (`difference` is that of their tokens, of the largest number). Sizes are rounded to what patches tile,
as 64 to 70 for H/14. The largest batch is that of one pass alone, by doubling and halving as in `memory`; where
doubling ended at `most` it is a bound, ">=". On a CPU it always is: its memory does not end without the machine.

Images/s a core are those of the whole device for a GPU, and by the threads in use for a CPU. TFLOP/s are by formula.

`python tools/benchmark.py inference encoders=B/16,R50x1 sizes=224,384` runs it.
"""

import gc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ssl_vit.encoders import Encoder
from ssl_vit.encoders.timm_encoder import TimmZoo
from ssl_vit.encoders.vit import Transformer, Vit
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.estimate import cost
from ssl_vit.runtime import Precision, on_gpu, uses_bf16
from ssl_vit.train.prepare import set_attention_kernel
from tools.benchmarks.memory import doubling_sizes, find_largest, lacks_memory
from tools.benchmarks.models import CASES, Case
from tools.benchmarks.timing import (
    Rounds,
    Row,
    format_spread,
    format_table,
    race,
    random_batch,
    speed_stats,
    synchronize,
)

GROWTH = 1.05  # that a doubled batch has to bring
OURS, TIMM = "ssl_vit", "timm"
CASES_BY_NAME = {
    case.encoder.title.replace("ViT-", ""): case
    for case in (*CASES, Case(Vit(size="S", patch=32), timm="vit_small_patch32_224"))
}
ON_GPU = ("B/32", "B/16", "L/32", "L/16", "H/14", "R50+B/32", "R50+B/16", "R50+L/32", "R50+L/16")
ON_GPU += ("R50x1", "R50x2", "R101x1", "R152x1", "R152x2", "R200x3")
ON_CPU = ("Ti/16", "S/16", "S/32", "R50x1")


class Options(Rounds):
    """Which encoders are measured, on which images."""

    encoders: tuple[str, ...] = Field(
        default=(), description="such as B/16,R50+B/32,R50x1 (none given: the paper's on a GPU, small ones on a CPU)"
    )
    sizes: tuple[int, ...] = Field(
        default=(64, 128, 224, 384, 512), min_length=1, description="sides of images, pixels"
    )
    most: int | None = Field(default=None, ge=1, description="largest batch to try (none: 32768 on a GPU, 16 on a CPU)")
    granularity: int = Field(default=16, ge=1, description="the largest batch that fits is a multiple of it, if above")
    precision: Precision = Field(default="auto", description="bf16 autocast or fp32; auto is bf16 on a GPU")
    round_steps: int = Field(default=3, ge=1, description="passes of each contestant in a round")


class Forward:
    """Passes of an encoder over random images."""

    def __init__(self, config: Encoder, bf16: bool):
        release()
        self.device = torch.device("cuda" if on_gpu() else "cpu")
        with self.device:
            self.encoder: Any = config.build().eval()
        self.config, self.bf16 = config, bf16

    def images(self, batch: int) -> Tensor:
        """As many images."""
        return random_batch(batch, self.config, self.device)["image"]

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.encoder(image)


def measure(options: Options) -> Iterator[Row]:
    """Rows of ours, and of timm's where it has the same model, for every encoder and size."""
    if min(options.sizes) < 1:
        raise ExitError(ExitCode.USAGE, "sizes: give numbers above 0, such as 224,384")
    set_attention_kernel("auto")  # as trainings have it
    cases = [find_case(name) for name in options.encoders or (ON_GPU if on_gpu() else ON_CPU)]
    if missing := [case.encoder.title for case in cases if needs_timm(case.encoder) and not has_timm()]:
        if options.encoders:
            raise ExitError(
                ExitCode.USAGE, f"encoders={missing[0]}: is timm's, at least in part: pip install 'ssl_vit[timm]'"
            )
        cases = [case for case in cases if case.encoder.title not in missing]
    for case in cases:
        for size in options.sizes:
            yield from compare(options, case, size)


def find_case(name: str) -> Case:
    """An encoder by its name, with or without ViT-."""
    case = CASES_BY_NAME.get(name.replace("ViT-", ""))
    if case is None:
        raise ExitError(ExitCode.USAGE, f"encoders={name}: there are {', '.join(CASES_BY_NAME)}")
    return case


def needs_timm(config: Encoder) -> bool:
    """Whether timm builds it, or its stem."""
    return not isinstance(config, Transformer) or getattr(config, "stem", "patch") == "r50"


def has_timm() -> bool:
    """Whether timm is installed."""
    return find_spec("timm") is not None


def compare(options: Options, case: Case, size: int) -> list[Row]:
    """The rows of an encoder at a size; of a BiT ResNet ours alone, because that is timm's own code."""
    patch = getattr(case.encoder, "patch", 1)
    side = max(1, round(size / patch)) * patch
    configs: dict[str, Encoder] = {OURS: case.encoder.model_copy(update={"image": side})}
    if case.timm and isinstance(case.encoder, Vit) and has_timm():
        configs[TIMM] = TimmZoo(name=case.timm, image=side)
    max_batch, threads = options.most or (32768 if on_gpu() else 16), 1 if on_gpu() else torch.get_num_threads()
    timings = time_encoders(options, configs, max_batch)
    flops = 2 * cost.encoder_macs(configs[OURS])
    rows: list[Row] = []
    for name, config in configs.items():
        row: Row = {"benchmark": "inference", "case": f"{case.encoder.title} at {side} x {side}", "size": size}
        row |= {"who": name, "images_per_second": None, "ratio": None, "tflops": None, **timings[name]}
        if row["images_per_second"]:
            row["images_per_second_a_core"] = round(row["images_per_second"] / threads, 2)
            row["tflops"] = float(f"{flops * row['images_per_second'] / 1e12:.4g}")
        rows.append({**row, **capacity(config, options, max_batch)})
    return rows


def time_encoders(options: Options, configs: dict[str, Encoder], max_batch: int) -> dict[str, Row]:
    """Of each contestant the images/s at its best batch, in turns, and those that it showed at every batch."""
    passes = {name: Forward(config, uses_bf16(options.precision)) for name, config in configs.items()}
    results: dict[str, Row] = {name: {} for name in passes}
    if TIMM in passes:
        passes[TIMM].encoder.model.load_state_dict(passes[OURS].encoder.state_dict())
        image = passes[OURS].images(1)
        our_tokens, timm_tokens = (passes[name](image).double() for name in (OURS, TIMM))
        results[TIMM]["difference"] = float((our_tokens - timm_tokens).abs().max() / timm_tokens.abs().max())
    steps: dict[str, Callable[[], object]] = {}
    for name, run in passes.items():
        rates = sweep_batches(run, max_batch, options.round_steps)
        results[name] |= {"batch": max(rates, key=rates.__getitem__, default=None), "tried": rates}
        if rates:
            steps[name] = bind_images(run, run.images(results[name]["batch"]))
    device = passes[OURS].device
    seconds = race(steps, options.rounds, options.round_steps, device, warm_up=1)
    seconds_per_image = {
        name: [elapsed / results[name]["batch"] for elapsed in times] for name, times in seconds.items()
    }
    for name in steps:
        results[name] |= speed_stats(seconds_per_image, name, 1, TIMM if TIMM in steps else None)
    return results


def bind_images(run: Forward, image: Tensor) -> Callable[[], object]:
    """A pass over the same images."""
    return lambda: run(image)


def sweep_batches(run: Forward, most: int, steps: int) -> dict[int, float]:
    """Images/s by batch, doubling from 1 until two in a row bring too little, memory ends, or there are `most`."""
    rates: dict[int, float] = {}
    stalled = 0
    for batch in doubling_sizes(1, most):
        try:
            seconds = race({"": bind_images(run, run.images(batch))}, 1, steps, run.device, warm_up=1)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            break
        rate = batch / seconds[""][0]
        stalled = 0 if rate > GROWTH * max(rates.values(), default=0) else stalled + 1
        rates[batch] = round(rate, 2)
        if stalled == 2:
            break
    return rates


def capacity(config: Encoder, options: Options, max_batch: int) -> Row:
    """The largest batch of one pass, alone on the device, and the smallest that was seen to fail, with the reason.

    Not every failure at a size that nobody uses is for want of memory: some kernels count in 32 bits.
    """
    run, reasons = Forward(config, uses_bf16(options.precision)), {}

    def fits(batch: int) -> bool:
        try:
            run(run.images(batch))
            synchronize(run.device)
        except RuntimeError as error:
            if batch == 1 and not lacks_memory(error):
                raise
            reasons[batch] = "memory" if lacks_memory(error) else str(error).partition("\n")[0][:200]
        release()
        return batch not in reasons

    low, high = find_largest(fits, doubling_sizes(1, max_batch), options.granularity)
    return {"largest_batch": low, "fails_at": high, "fails_because": reasons.get(high or 0)}


def release() -> None:
    """Give back what passes leave behind."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    heads = ["encoder", "who", "batch", "images/s", "a core", "speed", "spread", "TFLOP/s", "largest batch"]
    lines = []
    for row in rows:
        fits = f"{'' if row['fails_at'] else '>='}{row['largest_batch']}"
        if row["images_per_second"] is None:
            lines.append([row["case"], row["who"], "", "no memory", *[""] * 4, fits])
            continue
        numbers = [f"{row[name]:.1f}" for name in ("images_per_second", "images_per_second_a_core")]
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        numbers += [ratio, format_spread(row["ratio_spread"]), f"{row['tflops']:.2f}", fits]
        lines.append([row["case"], row["who"], str(row["batch"]), *numbers])
    return format_table(heads, lines)
