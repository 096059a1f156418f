"""What an encoder has learned, in pictures and numbers (paper 4.5, D.7, D.8): a start of tools/analyze.py."""

import csv
import io
import json
from pathlib import Path

import torch

from ssl_vit.analyze.collect import Wanted, look
from ssl_vit.analyze.sections import TABLES, Analyze, Portrait
from ssl_vit.convert import resolve
from ssl_vit.data.dataset import Data, printable
from ssl_vit.data.loader import EvaluationStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.encoders import weights
from ssl_vit.errors import DATA, USAGE, Refusal
from ssl_vit.evaluate.attention import has_class_token, places
from ssl_vit.files import made, write_bytes
from ssl_vit.rng import key, permutation


def run(options: Analyze) -> int:
    """Write pictures, numbers and the page; returns the exit code."""
    folder = Path(options.run)
    if options.encoder is None or options.data is None:
        missing = "encoder" if options.encoder is None else "data"
        raise Refusal(USAGE, f"{missing}: it must be given; --help says what it takes")
    if (folder / "recipe.yaml").exists():
        raise Refusal(USAGE, f"run={folder}: holds a training; its report would be lost; name another folder")
    if (folder / "report.html").exists() and not (folder / "analysis.json").exists():
        raise Refusal(USAGE, f"run={folder}: holds another tool's report, which would be lost; name another folder")
    encoder = _encoder(options, options.encoder)
    wanted = _wanted(options, encoder)
    split = resolve.sets(options.data, "val", converted=folder.parent / "shards", store=Data().store)
    split.check(full=False)
    made(folder)
    stream = _stream(options, encoder, split)
    found = look(encoder, stream, wanted)
    for fault in stream.faults.take():
        print(f"left out: sample {fault.sample}: {printable(fault.reason)}", flush=True)
    if stream.faults.fatal:
        raise stream.faults.fatal
    if not found.features or sum(map(len, found.features)) < 3:
        raise Refusal(DATA, f"{split.name}: has fewer than 3 images that can be read")
    portrait = Portrait(options, encoder, split, stream, found)
    portrait.draw()
    for stale in [*folder.glob("report/*.png"), *(folder / name for name in TABLES)]:
        stale.unlink(missing_ok=True)  # of an earlier look, at another encoder
    for name, rows in portrait.tables.items():
        with io.StringIO(newline="") as text:
            csv.writer(text).writerows(rows)
            write_bytes(folder / name, text.getvalue().encode(errors="backslashreplace"))
    write_bytes(folder / "analysis.json", (json.dumps(portrait.numbers, indent=1) + "\n").encode())
    portrait.page.write(folder)
    if not options.quiet:
        for note in portrait.notes:
            print(f"not drawn: {note}")
        print(f"{folder}: report.html, report/*.png, analysis.json, {', '.join(portrait.tables)}", flush=True)
    return 0


def _encoder(options: Analyze, name: str) -> weights.AnyEncoder:
    """The encoder, at the size that was asked for."""
    source, tensors = weights.read(name)
    size = options.image_size or source.image
    if source.channels != 3:
        raise Refusal(USAGE, f"{name}: takes {source.channels} channels; images are read as RGB, which has 3")
    try:
        encoder = source.model_copy(update={"image": size}).build().eval()
    except ValueError as error:
        raise Refusal(USAGE, f"image_size={size}: {error}") from error
    weights.fill(encoder, source, tensors, name)
    if options.readout == "class" and not has_class_token(encoder):
        raise Refusal(USAGE, "readout=class: the encoder has no class token; take mean")
    if options.query == "class" and not has_class_token(encoder):
        raise Refusal(USAGE, "query=class: the encoder has no class token; take mean")
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


def _wanted(options: Analyze, encoder: weights.AnyEncoder) -> Wanted:
    """What to look at; the layers by the names of their modules."""
    there = places(encoder)
    for number in options.layers:
        if not 1 <= number <= len(there):
            has = f"'s attention layers are 1 to {len(there)}" if there else " has no attention that can be looked into"
            raise Refusal(USAGE, f"layers={number}: the encoder{has}")
    chosen = [there[number - 1] for number in options.layers] or there[-1:]
    for name, module in chosen:
        most: int = getattr(module, "num_heads", getattr(module, "heads", 0))
        for head in options.heads:
            if not 1 <= head <= most:
                raise Refusal(USAGE, f"heads={head}: {name} has heads 1 to {most}")
    layers = frozenset(name for name, _ in chosen)
    counts = options.images, options.distance_images, options.samples
    return Wanted(*counts, layers, options.query, options.readout)


def _stream(options: Analyze, encoder: weights.AnyEncoder, split: Manifest) -> EvaluationStream:
    """A random choice of the images, which is the same for every encoder; a smaller one begins a larger one."""
    chosen = permutation(key("analyze", options.seed, split.samples), split.samples)
    most = max(options.samples, options.images, options.distance_images)
    data = Data(image_size=encoder.config.image, workers=options.workers)
    return EvaluationStream(split, data, options.batch, chosen[:most])
