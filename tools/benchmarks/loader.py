"""The loader's benchmark: images/s of a core, in CPU time, beside what one would write first and beside its own limits.

All contestants make random 224-pixel crops, flipped half the time, in batches from the same shards, in one
process and one thread; they take turns. `tools/benchmark.py loader images=FOLDER|TAR` runs it.
"""

import importlib
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from pydantic import Field

from ssl_vit.config import Config
from ssl_vit.convert import image_list
from ssl_vit.convert.make_shards import MakeShards, convert
from ssl_vit.convert.output import Target
from ssl_vit.convert.shard_writer import NOTES, Job, read, write_shard
from ssl_vit.data import augment, decode, manifest
from ssl_vit.data.augment import Box
from ssl_vit.data.dataset import Data, Samples
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.tar import Member, walk
from tools.benchmarks.racing import Row, Seconds, between, race, speed

BATCH = 64
USUAL = "webdataset + Pillow + torchvision"  # to normalised floats, as its tutorials do


class Options(Config):
    """What to measure on."""

    images: str = Field(description="folder of images, or a tar of one")
    image_size: int = Field(default=224, ge=1, description="of the crops, pixels")
    rounds: int = Field(default=7, ge=1, description="interleaved rounds")
    output: str = Field(default="runs/benchmark", description="folder for the JSON")


def measure(options: Options) -> list[Row]:
    """Rows for the images as they are and for the same shrunk to a short side of 256, and for the conversion."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = unpacked(Path(options.images), Path(folder) / "images")
        rows = []
        for case, resize in (("full size", None), ("short side 256", 256)):
            output = Path(folder) / f"shards-{resize}"
            convert(MakeShards(input=str(images), output=str(output), resize=resize, quiet=True))
            rows += loading(manifest.load(output), case, options)
        return rows + converting(images, Path(folder), options)


def unpacked(given: Path, folder: Path) -> Path:
    """A folder as it is; the images of a tar in a new folder, by number."""
    if given.is_dir():
        return given
    folder.mkdir()
    with given.open("rb") as file:
        for number, member in enumerate(walk(given)):
            if isinstance(member, Member) and Path(member.name).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
                file.seek(member.offset)
                (folder / f"{number:06d}{Path(member.name).suffix.lower()}").write_bytes(file.read(member.size))
    return folder


def loading(made: Manifest, case: str, options: Options) -> list[Row]:
    """Rows of the whole loader, of its stages, of the choices for the crop's resize."""
    config = Data(image_size=options.image_size, workers=0)
    samples = Samples(made, config, seed=0, training=True)
    keys = [(0, sample) for sample in range(made.samples)]
    data = [samples.read(sample)[0] for _, sample in keys]
    pixels = [decode.decode(image) for image in data]
    boxes = [samples.box(image.shape[0], image.shape[1], seed) for seed, image in enumerate(pixels)]
    size = config.image_hw
    crops = [augment.resized(image, box, size, False) for image, box in zip(pixels, boxes, strict=True)]
    choices = resizes(size)

    def collate() -> None:
        for first in range(0, len(crops), BATCH):
            batch = np.empty((BATCH, *size, 3), np.uint8)
            for slot, crop in enumerate(crops[first : first + BATCH]):
                batch[slot] = crop.permute(1, 2, 0).numpy()

    def crop(image: np.ndarray, box: Box) -> torch.Tensor:
        return augment.resized(image, box, size, flip=box.left % 2 == 0)

    whole = {
        "ssl_vit": lambda: [samples.batch(keys[first : first + BATCH]) for first in range(0, len(keys), BATCH)],
        USUAL: usual(made, options.image_size, floats=True),
        f"{USUAL}, kept uint8": usual(made, options.image_size, floats=False),
        "decoding alone (simplejpeg)": lambda: [decode_alone(image) for image in data],
    }
    stages = {
        "stage read": lambda: [samples.read(sample) for _, sample in keys],
        "stage decode": lambda: [decode.decode(image) for image in data],
        "stage crop": partial(each, crop, pixels, boxes),
        "stage collate": collate,
    }
    resizing = {f"resize {who}": partial(each, how, pixels, boxes) for who, how in choices.items()}
    seconds = race({**whole, **stages, **resizing}, options.rounds, warm_up=1, clock=time.process_time)
    rows = [row("loader", case, who, len(keys), seconds, USUAL if who in whole else None) for who in seconds]
    wanted = [np.asarray(pillow(image, box, size)) for image, box in zip(pixels, boxes, strict=True)]
    for who, how in choices.items():
        found = [how(image, box) for image, box in zip(pixels, boxes, strict=True)]
        off = [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(found, wanted, strict=True)]
        next(r for r in rows if r["who"] == f"resize {who}")["mean_absolute_difference"] = round(float(np.mean(off)), 3)
    return rows


def each(how: Callable[[np.ndarray, Box], Any], pixels: list[np.ndarray], boxes: list[Box]) -> None:
    """Resize every image's box."""
    for image, box in zip(pixels, boxes, strict=True):
        how(image, box)


def pillow(image: np.ndarray, box: Box, size: tuple[int, int]) -> Image.Image:
    """The reference: what torchvision does with a Pillow image."""
    part = Image.fromarray(image).crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return part.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def resizes(size: tuple[int, int]) -> dict[str, Callable[[np.ndarray, Box], np.ndarray]]:
    """The candidates for the crop's resize, uint8 [h, w, 3]; OpenCV's where it is installed."""
    found: dict[str, Callable[[np.ndarray, Box], np.ndarray]] = {
        "torch antialiased": lambda image, box: augment.resized(image, box, size, False).permute(1, 2, 0).numpy(),
        "Pillow bilinear": lambda image, box: np.asarray(pillow(image, box, size)),
    }
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError:
        return found
    cv2.setNumThreads(0)
    for name, how in {"area": cv2.INTER_AREA, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}.items():
        found[f"OpenCV {name}"] = lambda image, box, how=how: cv2.resize(
            image[box.top : box.top + box.height, box.left : box.left + box.width], size[::-1], interpolation=how
        )
    return found


def decode_alone(data: bytes) -> Any:
    """simplejpeg's decoder and nothing else; Pillow's where it cannot."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return Image.open(io.BytesIO(data)).convert("RGB").load()


def usual(made: Manifest, side: int, floats: bool) -> Callable[[], None]:
    """What one writes first: webdataset's reader and Pillow decoder, torchvision's transforms, the default collate."""
    import webdataset.compat
    from torch.utils.data import default_collate
    from torchvision import transforms

    last = [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)] if floats else [transforms.PILToTensor()]
    crop = transforms.RandomResizedCrop(side, scale=(0.05, 1.0))
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last])
    paths = [str(made.tar(shard)) for shard in range(len(made.shards))]

    def run() -> None:
        stream: Any = webdataset.compat.WebDataset(paths, shardshuffle=False, empty_check=False).decode("pil")
        samples: Iterator[Any] = iter(
            stream.to_tuple("jpg;png;webp").map_tuple(transform).batched(BATCH, default_collate)
        )
        for _ in samples:
            pass

    return run


def converting(images: Path, folder: Path, options: Options) -> list[Row]:
    """Rows of the conversion beside the check of the images alone: in CPU time of a core, and in time by processes."""
    found = image_list.read(images, 0.0)
    names = [name for part in found.splits.values() for name in part]
    sources = image_list.sources(found, names, {})
    Path(folder / "bare").mkdir()
    job = Job(images, Target(folder / "bare"), sources, {"resize": None, "quality": None, "keep_location": False})

    def shard() -> None:
        shutil.rmtree(job.target.folder / NOTES, ignore_errors=True)  # else it would find that all is done
        write_shard(job, 0, sources, len(sources))

    bare = "decoding every file once"
    contestants = {
        bare: lambda: [decode.decode(read(images / source.path, source)) for source in sources],
        "its check at an eighth of the size": lambda: [decode.check(read(images / s.path, s)) for s in sources],
        "conversion": shard,
    }
    seconds = race(contestants, options.rounds, warm_up=1, clock=time.process_time)
    rows = [row("conversion", "full size, a core", who, len(names), seconds, bare) for who in seconds]

    def all_of_it(workers: int) -> None:
        shutil.rmtree(folder / "many", ignore_errors=True)
        size = -(-len(names) // 16)
        given = MakeShards(
            input=str(images), output=str(folder / "many"), workers=workers, shard_samples=size, quiet=True
        )
        convert(given)

    by_count = {f"{n} processes": partial(all_of_it, n) for n in (1, 2)}
    wall = race(by_count, options.rounds, warm_up=1)
    return rows + [row("conversion", "full size, wall clock", who, len(names), wall, "1 processes") for who in wall]


def row(benchmark: str, case: str, who: str, images: int, seconds: Seconds, rival: str | None) -> Row:
    """One line of the table; `ratio` is the speed over the rival's, within each round, `milliseconds` an image's."""
    row = {"benchmark": benchmark, "case": case, "who": who, **speed(seconds, who, images, rival)}
    return row | {"milliseconds": round(row["milliseconds"] / images, 4)}


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    lines = []
    for number, r in enumerate(rows):
        if not number or (r["benchmark"], r["case"]) != (rows[number - 1]["benchmark"], rows[number - 1]["case"]):
            heading = f"{r['benchmark']}, {r['case']}"
            lines.append(f"\n{heading:<44}{'images/s':>10}{'ms':>9}{'ratio':>8}{'spread':>14}")
        spread = between(r["ratio_spread"])
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
        off = f"   {r['mean_absolute_difference']} levels off Pillow" if "mean_absolute_difference" in r else ""
        lines.append(
            f"{r['who']:<44}{r['images_per_second']:>10.0f}{r['milliseconds']:>9.3f}{ratio:>8}{spread:>14}{off}"
        )
    return "\n".join(lines).lstrip("\n")
