"""Look into an encoder: python tools/analyze.py encoder=runs/NAME data=shards/val run=runs/analyze

Writes a page with the paper's pictures (attention rollout, attention distance, filters, positions; 4.5, D.7, D.8),
reconstructions, features and neighbors; the pictures as PNG, the numbers as JSON and CSV.
"""

import csv
import io
import json
from pathlib import Path

import torch

from ssl_vit.analyze.collect import Request, collect
from ssl_vit.analyze.sections import TABLES, AnalysisReport
from ssl_vit.analyze.sections import Analyze as Config
from ssl_vit.convert import resolve
from ssl_vit.data.dataset import Data, printable
from ssl_vit.data.loader import EvaluationStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.encoders import weights
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate.attention import find_attention_layers, has_class_token
from ssl_vit.files import ensure_dir, write_bytes
from ssl_vit.rng import hash_key, permutation


def run(options: Config) -> int:
    """Write pictures, numbers and the page; returns the exit code."""
    folder = Path(options.run)
    if options.encoder is None or options.data is None:
        missing = "encoder" if options.encoder is None else "data"
        raise ExitError(ExitCode.USAGE, f"{missing}: it must be given; --help says what it takes")
    if (folder / "recipe.yaml").exists():
        raise ExitError(
            ExitCode.USAGE, f"run={folder}: holds a training; its report would be lost; name another folder"
        )
    if (folder / "report.html").exists() and not (folder / "analysis.json").exists():
        raise ExitError(
            ExitCode.USAGE, f"run={folder}: holds another tool's report, which would be lost; name another folder"
        )
    encoder = _build_encoder(options, options.encoder)
    request = _make_request(options, encoder)
    split = resolve.resolve_manifest(
        options.data, "val", output_root=folder.parent / "shards", cache_dir=Data().cache_dir
    )
    split.check_shards(full=False)
    ensure_dir(folder)
    stream = _make_stream(options, encoder, split)
    measurements = collect(encoder, stream, request)
    for fault in stream.faults.drain():
        print(f"left out: sample {fault.sample}: {printable(fault.reason)}", flush=True)
    if stream.faults.fatal:
        raise stream.faults.fatal
    if not measurements.features or sum(map(len, measurements.features)) < 3:
        raise ExitError(ExitCode.DATA, f"{split.name}: has fewer than 3 images that can be read")
    report = AnalysisReport(options, encoder, split, stream, measurements)
    report.draw()
    for path in [*folder.glob("report/*.png"), *(folder / name for name in TABLES)]:
        path.unlink(missing_ok=True)  # of an earlier look, at another encoder
    for name, rows in report.tables.items():
        with io.StringIO(newline="") as text:
            csv.writer(text).writerows(rows)
            write_bytes(folder / name, text.getvalue().encode(errors="backslashreplace"))
    write_bytes(folder / "analysis.json", (json.dumps(report.numbers, indent=1) + "\n").encode())
    report.page.write(folder)
    if not options.quiet:
        for note in report.notes:
            print(f"not drawn: {note}")
        print(f"{folder}: report.html, report/*.png, analysis.json, {', '.join(report.tables)}", flush=True)
    return 0


def _build_encoder(options: Config, name: str) -> weights.AnyEncoder:
    """The encoder, at the size that was asked for."""
    source, tensors = weights.read_source(name)
    size = options.image_size or source.image
    if source.channels != 3:
        raise ExitError(
            ExitCode.USAGE, f"{name}: takes {source.channels} channels; images are read as RGB, which has 3"
        )
    try:
        encoder = source.model_copy(update={"image": size}).build().eval()
    except ValueError as error:
        raise ExitError(ExitCode.USAGE, f"image_size={size}: {error}") from error
    weights.load_weights(encoder, source, tensors, name)
    if options.readout == "class" and not has_class_token(encoder):
        raise ExitError(ExitCode.USAGE, "readout=class: the encoder has no class token; take mean")
    if options.query == "class" and not has_class_token(encoder):
        raise ExitError(ExitCode.USAGE, "query=class: the encoder has no class token; take mean")
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


def _make_request(options: Config, encoder: weights.AnyEncoder) -> Request:
    """What to look at; the layers by the names of their modules."""
    modules = find_attention_layers(encoder)
    for number in options.layers:
        if not 1 <= number <= len(modules):
            reason = (
                f"'s attention layers are 1 to {len(modules)}"
                if modules
                else " has no attention that can be looked into"
            )
            raise ExitError(ExitCode.USAGE, f"layers={number}: the encoder{reason}")
    selected = [modules[number - 1] for number in options.layers] or modules[-1:]
    for name, module in selected:
        num_heads: int = getattr(module, "num_heads", getattr(module, "heads", 0))
        for head in options.heads:
            if not 1 <= head <= num_heads:
                raise ExitError(ExitCode.USAGE, f"heads={head}: {name} has heads 1 to {num_heads}")
    layers = frozenset(name for name, _ in selected)
    counts = options.images, options.distance_images, options.samples
    return Request(*counts, layers, options.query, options.readout)


def _make_stream(options: Config, encoder: weights.AnyEncoder, split: Manifest) -> EvaluationStream:
    """A random choice of the images, which is the same for every encoder; a smaller one begins a larger one."""
    samples = permutation(hash_key("analyze", options.seed, split.samples), split.samples)
    num_samples = max(options.samples, options.images, options.distance_images)
    data = Data(image_size=encoder.config.image, workers=options.workers)
    return EvaluationStream(split, data, options.batch, samples[:num_samples])
