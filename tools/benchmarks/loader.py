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
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.convert.output import Target
from ssl_vit.convert.shard_writer import SHARD_STATE_DIR, Job, read_source, write_shard
from ssl_vit.data import augment, decode, manifest
from ssl_vit.data.augment import Box
from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.tar import Member, iter_members
from tools.benchmarks.timing import Row, Seconds, format_spread, race, speed_stats

BATCH = 64
BASELINE = "webdataset + Pillow + torchvision"  # to normalized floats, as its tutorials do


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
        images = unpack_images(Path(options.images), Path(folder) / "images")
        rows = []
        for case, resize in (("full size", None), ("short side 256", 256)):
            output = Path(folder) / f"shards-{resize}"
            convert_images(MakeShards(input=str(images), output=str(output), resize=resize, quiet=True))
            rows += measure_loading(manifest.load(output), case, options)
        return rows + measure_conversion(images, Path(folder), options)


def unpack_images(source: Path, folder: Path) -> Path:
    """A folder as it is; the images of a tar in a new folder, by number."""
    if source.is_dir():
        return source
    folder.mkdir()
    with source.open("rb") as file:
        for number, member in enumerate(iter_members(source)):
            if isinstance(member, Member) and Path(member.name).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
                file.seek(member.offset)
                (folder / f"{number:06d}{Path(member.name).suffix.lower()}").write_bytes(file.read(member.size))
    return folder


def measure_loading(dataset: Manifest, case: str, options: Options) -> list[Row]:
    """Rows of the whole loader, of its stages, of the choices for the crop's resize."""
    config = Data(image_size=options.image_size, workers=0)
    samples = SampleDataset(dataset, config, seed=0, training=True)
    keys = [(0, sample) for sample in range(dataset.samples)]
    data = [samples.read_sample(sample)[0] for _, sample in keys]
    pixels = [decode.decode_image(image) for image in data]
    boxes = [samples.crop_box(image.shape[0], image.shape[1], seed) for seed, image in enumerate(pixels)]
    size = config.image_hw
    crops = [augment.crop_and_resize(image, box, size, False) for image, box in zip(pixels, boxes, strict=True)]
    choices = resize_functions(size)

    def collate() -> None:
        for start in range(0, len(crops), BATCH):
            batch = np.empty((BATCH, *size, 3), np.uint8)
            for slot, crop in enumerate(crops[start : start + BATCH]):
                batch[slot] = crop.permute(1, 2, 0).numpy()

    def crop(image: np.ndarray, box: Box) -> torch.Tensor:
        return augment.crop_and_resize(image, box, size, flip=box.left % 2 == 0)

    loaders = {
        "ssl_vit": lambda: [samples.batch(keys[start : start + BATCH]) for start in range(0, len(keys), BATCH)],
        BASELINE: webdataset_loader(dataset, options.image_size, floats=True),
        f"{BASELINE}, kept uint8": webdataset_loader(dataset, options.image_size, floats=False),
        "decoding alone (simplejpeg)": lambda: [decode_alone(image) for image in data],
    }
    stages = {
        "stage read": lambda: [samples.read_sample(sample) for _, sample in keys],
        "stage decode": lambda: [decode.decode_image(image) for image in data],
        "stage crop": partial(crop_all, crop, pixels, boxes),
        "stage collate": collate,
    }
    resizing = {f"resize {name}": partial(crop_all, resize, pixels, boxes) for name, resize in choices.items()}
    seconds = race({**loaders, **stages, **resizing}, options.rounds, warm_up=1, clock=time.process_time)
    rows = [
        make_row("loader", case, name, len(keys), seconds, BASELINE if name in loaders else None) for name in seconds
    ]
    expected = [np.asarray(pillow_resize(image, box, size)) for image, box in zip(pixels, boxes, strict=True)]
    for name, resize in choices.items():
        outputs = [resize(image, box) for image, box in zip(pixels, boxes, strict=True)]
        errors = [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(outputs, expected, strict=True)]
        next(r for r in rows if r["who"] == f"resize {name}")["mean_absolute_difference"] = round(
            float(np.mean(errors)), 3
        )
    return rows


def crop_all(crop: Callable[[np.ndarray, Box], Any], pixels: list[np.ndarray], boxes: list[Box]) -> None:
    """Resize every image's box."""
    for image, box in zip(pixels, boxes, strict=True):
        crop(image, box)


def pillow_resize(image: np.ndarray, box: Box, size: tuple[int, int]) -> Image.Image:
    """The reference: what torchvision does with a Pillow image."""
    part = Image.fromarray(image).crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return part.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def resize_functions(size: tuple[int, int]) -> dict[str, Callable[[np.ndarray, Box], np.ndarray]]:
    """The candidates for the crop's resize, uint8 [h, w, 3]; OpenCV's where it is installed."""
    functions: dict[str, Callable[[np.ndarray, Box], np.ndarray]] = {
        "torch antialiased": lambda image, box: (
            augment.crop_and_resize(image, box, size, False).permute(1, 2, 0).numpy()
        ),
        "Pillow bilinear": lambda image, box: np.asarray(pillow_resize(image, box, size)),
    }
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError:
        return functions
    cv2.setNumThreads(0)
    for name, interpolation in {"area": cv2.INTER_AREA, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}.items():
        functions[f"OpenCV {name}"] = lambda image, box, interpolation=interpolation: cv2.resize(
            image[box.top : box.top + box.height, box.left : box.left + box.width],
            size[::-1],
            interpolation=interpolation,
        )
    return functions


def decode_alone(data: bytes) -> Any:
    """simplejpeg's decoder and nothing else; Pillow's where it cannot."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return Image.open(io.BytesIO(data)).convert("RGB").load()


def webdataset_loader(dataset: Manifest, side: int, floats: bool) -> Callable[[], None]:
    """What one writes first: webdataset's reader and Pillow decoder, torchvision's transforms, the default collate."""
    import webdataset.compat
    from torch.utils.data import default_collate
    from torchvision import transforms

    to_tensor = [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)] if floats else [transforms.PILToTensor()]
    crop = transforms.RandomResizedCrop(side, scale=(0.05, 1.0))
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *to_tensor])
    paths = [str(dataset.tar(shard)) for shard in range(len(dataset.shards))]

    def run() -> None:
        stream: Any = webdataset.compat.WebDataset(paths, shardshuffle=False, empty_check=False).decode("pil")
        samples: Iterator[Any] = iter(
            stream.to_tuple("jpg;png;webp").map_tuple(transform).batched(BATCH, default_collate)
        )
        for _ in samples:
            pass

    return run


def measure_conversion(images: Path, folder: Path, options: Options) -> list[Row]:
    """Rows of the conversion beside the check of the images alone: in CPU time of a core, and in time by processes."""
    listing = image_list.read_listing(images, 0.0)
    names = [name for part in listing.splits.values() for name in part]
    sources = image_list.list_sources(listing, names, {})
    Path(folder / "bare").mkdir()
    job = Job(images, Target(folder / "bare"), sources, {"resize": None, "quality": None, "keep_location": False})

    def shard() -> None:
        shutil.rmtree(job.target.folder / SHARD_STATE_DIR, ignore_errors=True)  # else it would find that all is done
        write_shard(job, 0, sources, len(sources))

    bare = "decoding every file once"
    contestants = {
        bare: lambda: [decode.decode_image(read_source(images / source.path, source)) for source in sources],
        "its check at an eighth of the size": lambda: [
            decode.verify_image(read_source(images / s.path, s)) for s in sources
        ],
        "conversion": shard,
    }
    seconds = race(contestants, options.rounds, warm_up=1, clock=time.process_time)
    rows = [make_row("conversion", "full size, a core", name, len(names), seconds, bare) for name in seconds]

    def convert_all(workers: int) -> None:
        shutil.rmtree(folder / "many", ignore_errors=True)
        size = -(-len(names) // 16)
        config = MakeShards(
            input=str(images), output=str(folder / "many"), workers=workers, shard_samples=size, quiet=True
        )
        convert_images(config)

    by_count = {f"{n} processes": partial(convert_all, n) for n in (1, 2)}
    wall = race(by_count, options.rounds, warm_up=1)
    return rows + [
        make_row("conversion", "full size, wall clock", name, len(names), wall, "1 processes") for name in wall
    ]


def make_row(benchmark: str, case: str, name: str, images: int, seconds: Seconds, rival: str | None) -> Row:
    """One line of the table; `ratio` is the speed over the rival's, within each round, `milliseconds` an image's."""
    row = {"benchmark": benchmark, "case": case, "who": name, **speed_stats(seconds, name, images, rival)}
    return row | {"milliseconds": round(row["milliseconds"] / images, 4)}


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    lines = []
    for number, r in enumerate(rows):
        if not number or (r["benchmark"], r["case"]) != (rows[number - 1]["benchmark"], rows[number - 1]["case"]):
            heading = f"{r['benchmark']}, {r['case']}"
            lines.append(f"\n{heading:<44}{'images/s':>10}{'ms':>9}{'ratio':>8}{'spread':>14}")
        spread = format_spread(r["ratio_spread"])
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
        difference = f"   {r['mean_absolute_difference']} levels off Pillow" if "mean_absolute_difference" in r else ""
        lines.append(
            f"{r['who']:<44}{r['images_per_second']:>10.0f}{r['milliseconds']:>9.3f}{ratio:>8}{spread:>14}{difference}"
        )
    return "\n".join(lines).lstrip("\n")
