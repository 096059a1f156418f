"""An encoder in another format: what tools/export.py does."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from ssl_vit.config import Config
from ssl_vit.encoders import classified, export, weights
from ssl_vit.encoders.weights import AnyEncoder
from ssl_vit.exits import CANNOT_CREATE, USAGE, Refusal


class Export(Config):
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
    classifier: bool = Field(default=False, description="timm and onnx: with the classifier of a fine-tuned run")
    init_share: float = Field(
        default=1.0, gt=0, le=1, description="least share of the encoder's numbers that the source has to fill"
    )


def run(options: Export) -> str:
    """Write it; returns what was written and what opens it."""
    if options.encoder is None:
        raise Refusal(USAGE, "encoder: it must be given: a run, an encoder folder, a weights file, or timm:NAME")
    encoder, said = _encoder(options)
    head = classified.read_classifier(options.encoder)[1] if options.classifier else None
    folder = Path(options.output)
    try:
        (folder.parent if options.format == "onnx" else folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(CANNOT_CREATE, f"output={folder}: {error.strerror}; name another folder") from error
    return f"{said}\n{folder}: {_written(options, encoder, head, folder)}"


def _encoder(options: Export) -> tuple[AnyEncoder, str]:
    """The encoder at the size that was asked for, and what became of the source's tensors."""
    source = str(options.encoder)
    config, tensors = weights.read(source, classifier=options.classifier)
    wanted = config if options.image_size is None else config.model_copy(update={"image": options.image_size})
    try:
        encoder = wanted.build().eval()
    except ValueError as error:
        raise Refusal(USAGE, f"image_size={options.image_size}: {error}") from error
    return encoder, str(weights.fill(encoder, config, tensors, source, options.init_share))


def _written(options: Export, encoder: AnyEncoder, head: classified.Classifier | None, folder: Path) -> str:
    kind = encoder.config.kind
    if options.format == "onnx":
        difference = export.onnx(encoder, folder, head)
        made = "logits" if head else "features"
        return f"image uint8 in, tokens and {made} out; onnxruntime differs by {difference:.1e}"
    if head is not None and options.format != "timm":
        raise Refusal(USAGE, f"classifier=true: format={options.format} has no place for it; take timm or onnx")
    if options.format == "hf":
        export.hugging_face(encoder, folder)
        return "opened by transformers.ViTModel.from_pretrained(FOLDER, add_pooling_layer=False)"
    if options.format == "timm":
        encoder = export.plain(encoder)
        if export.timm_architecture(encoder.config) is None:
            text = f"timm cannot express this encoder (kind={kind}, or its positions); format=safetensors takes any"
            raise Refusal(USAGE, f"format=timm: {text}")
    return export.export(encoder, folder, head)
