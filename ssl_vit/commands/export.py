"""Write an encoder for other programs: tools/export.py encoder=SOURCE format=timm|hf|onnx|safetensors output=FOLDER

SOURCE is a run, an encoder folder, a weights file (safetensors, .pth, Google's .npz) or timm:NAME. With image_size=H
or H,W positions are interpolated to that size by the paper's rule and baked in.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from safetensors import SafetensorError

from ssl_vit import config
from ssl_vit.encoders import export, weights
from ssl_vit.encoders.vit import VitEncoder
from ssl_vit.encoders.weights import AnyEncoder
from ssl_vit.errors import ExitCode, ExitError

ROUNDING = 1e-3  # of the largest number: how far onnxruntime may be off without a word


class Config(config.Config):
    """What is written, from what, and where."""

    encoder: str | None = Field(
        default=None, description="a run, an encoder folder, a weights file (safetensors, .pth, .npz), or timm:NAME"
    )
    format: Literal["timm", "hf", "onnx", "safetensors"] = Field(
        default="timm",
        description="a folder for timm, for Hugging Face's ViTModel, an ONNX file, or our own folder, which takes any "
        "encoder",
    )
    output: str = Field(default="exported", min_length=1, description="folder to write; of onnx the file, NAME.onnx")
    image_size: int | tuple[int, int] | None = Field(default=None, description="input size, pixels (none: as it is)")
    classifier: bool = Field(default=False, description="with the classifier of a fine-tuned run; not of hf")
    init_min_fraction: float = Field(
        default=1.0, gt=0, le=1, description="least share of the encoder's numbers that the source has to fill"
    )

    @field_validator("image_size")
    @classmethod
    def _has_pixels(cls, size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        if size is not None and min((size,) if isinstance(size, int) else size) < 1:
            raise ValueError(f"an image of {size} has no pixels")
        return size


def run(options: Config) -> int:
    """Write the encoder and print what opens it; returns the exit code."""
    if options.encoder is None:
        raise ExitError(
            ExitCode.USAGE, "encoder: it must be given: a run, an encoder folder, a weights file, or timm:NAME"
        )
    if options.classifier and options.format == "hf":
        raise ExitError(
            ExitCode.USAGE, "classifier=true: format=hf has no place for it; take timm, onnx or safetensors"
        )
    encoder, load_report = _load_encoder(options)
    head = weights.read_classifier(options.encoder)[1] if options.classifier else None
    target = Path(options.output)
    with _staged_output(target, folder=options.format != "onnx") as draft:
        description = _write_encoder(options, encoder, head, draft)
    print(f"{load_report}\n{target}: {description}")
    return 0


@contextmanager
def _staged_output(target: Path, folder: bool) -> Iterator[Path]:
    """Where to write; files take their place in the end, each whole. What `target` has already may be the source."""
    if target.exists() and target.is_dir() != folder:
        raise ExitError(
            ExitCode.CANNOT_CREATE, f"output={target}: is {'no' if folder else 'a'} folder; name another place"
        )
    draft = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        yield draft if folder else draft / target.name
        destination = target if folder else target.parent
        destination.mkdir(exist_ok=True)
        mode = 0o666 & ~_umask()  # safetensors gives its files to their owner alone
        for path in sorted(draft.iterdir()):
            path.chmod(mode)
            os.replace(path, destination / path.name)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ExitError(ExitCode.CANNOT_CREATE, f"output={target}: {reason}; name another place") from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
    """What new files are not to allow; there is no way to look but to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _load_encoder(options: Config) -> tuple[AnyEncoder, str]:
    """The encoder at the size that was asked for, and what became of the source's tensors."""
    source = str(options.encoder)
    original, tensors = weights.read_source(source, classifier=options.classifier)
    resized = original if options.image_size is None else original.model_copy(update={"image": options.image_size})
    try:
        encoder = resized.build().eval()
    except ValueError as error:
        raise ExitError(ExitCode.USAGE, f"image_size={options.image_size}: {error}") from error
    return encoder, str(weights.load_weights(encoder, original, tensors, source, options.init_min_fraction))


def _write_encoder(options: Config, encoder: AnyEncoder, head: weights.PretrainedClassifier | None, path: Path) -> str:
    kind = encoder.config.kind
    if options.format == "onnx":
        difference = export.export_onnx(encoder, path, head)
        outputs = "logits" if head else "features"
        caveat = "" if difference < ROUNDING else ", more than rounding explains: compare before you use it"
        return f"image uint8 in, tokens and {outputs} out; onnxruntime differs by {difference:.1e}{caveat}"
    if options.format == "hf":
        export.export_hugging_face(encoder, path)
        return "opened by transformers.ViTModel.from_pretrained(FOLDER, add_pooling_layer=False)"
    if options.format == "timm":
        encoder = export.with_1d_positions(encoder)
        if export.timm_architecture(encoder.config) is None:
            text = f"timm cannot express this encoder (kind={kind}, or its positions); format=safetensors takes any"
            raise ExitError(ExitCode.USAGE, f"format=timm: {text}")
        if head is not None and not isinstance(encoder, VitEncoder):
            text = f"of kind={kind} there is only our own folder with it, format=safetensors"
            raise ExitError(ExitCode.USAGE, f"classifier=true with format=timm: {text}")
    return export.export_encoder(encoder, path, head)
