"""What every encoder of the paper costs, beside the paper's own numbers and timm's: nothing is trained or timed."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ssl_vit import config, recipes
from ssl_vit.config import Config
from ssl_vit.encoders import Encoder
from ssl_vit.encoders.axial import Axial, AxialResnet
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit
from ssl_vit.errors import Refusal
from ssl_vit.estimate import cost
from ssl_vit.heads import clusters
from ssl_vit.model import count_parameters

CLUSTERS = 4096  # of a codebook that is still to be fitted, as in mpp_clusters
JFT = 303e6  # images (paper 4.1)
Row = dict[str, Any]


class Options(Config):
    """What is shown, and where the table goes."""

    activations: bool = Field(default=True, description="the memory of activations, which takes most of the time")
    output: str = Field(default="runs/benchmark", description="folder for the JSON")


@dataclass(frozen=True)
class Case:
    """An encoder, how many parameters the paper gives it, timm's name, and its rows of Table 6: epochs, exaFLOPs."""

    encoder: Encoder
    said: str = ""
    timm: str = ""
    epochs: tuple[tuple[int, int], ...] = ()


CASES = (
    Case(Vit(size="Ti"), timm="vit_tiny_patch16_224"),
    Case(Vit(size="S"), timm="vit_small_patch16_224"),
    Case(Vit(size="B", patch=32), "86M", "vit_base_patch32_224", ((7, 55),)),
    Case(Vit(size="B", patch=16), "86M", "vit_base_patch16_224", ((7, 224),)),
    Case(Vit(size="B", patch=8), timm="vit_base_patch8_224"),
    Case(Vit(size="L", patch=32), "307M", "vit_large_patch32_224", ((7, 196),)),
    Case(Vit(size="L", patch=16), "307M", "vit_large_patch16_224", ((7, 783), (14, 1567))),
    Case(Vit(size="H", patch=14), "632M", "vit_huge_patch14_224", ((14, 4262),)),
    Case(Vit(size="B", patch=32, stem="r50"), epochs=((7, 106),)),
    Case(Vit(size="B", patch=16, stem="r50"), timm="vit_base_r50_s16_224", epochs=((7, 274),)),
    Case(Vit(size="L", patch=32, stem="r50"), timm="vit_large_r50_s32_224", epochs=((7, 246),)),
    Case(Vit(size="L", patch=16, stem="r50"), epochs=((7, 859), (14, 1668))),
    Case(Bit(depth=50), timm="resnetv2_50x1_bit", epochs=((7, 50),)),
    Case(Bit(depth=50, widen=2), epochs=((7, 199),)),
    Case(Bit(depth=101), timm="resnetv2_101x1_bit", epochs=((7, 96),)),
    Case(Bit(depth=152), epochs=((7, 141),)),
    Case(Bit(depth=152, widen=2), timm="resnetv2_152x2_bit", epochs=((7, 563), (14, 1126))),
    Case(Bit(depth=200, widen=3), epochs=((14, 3306),)),
    Case(Axial(size="B", patch=32)),
    Case(Axial(size="B", patch=16)),
    Case(AxialResnet()),
)
WRONG = (("R50+ViT-L/16", 7),)  # 859 contradicts the table's own 1668 for twice the epochs
LOOSER = {"ViT-B/32": 0.02}  # others: 1 %


def measure(options: Options) -> Iterator[Row]:
    """A row for every encoder, and for every number of epochs that Table 6 has of it."""
    for case in CASES:
        encoder = case.encoder
        row: Row = {"benchmark": "models", "case": encoder.title, "parameters": parameters(encoder)}
        row |= {"macs": cost.encoder_macs(encoder), "paper_parameters": case.said or None}
        row["macs_in_image"] = row["macs"] - cost.padding_macs(encoder)
        if case.timm:
            theirs = TimmZoo(name=case.timm)
            row |= {"timm_parameters": parameters(theirs), "timm_macs": cost.counted_macs(theirs)}
        kept = cost.activation_bytes(encoder, True, False) / 1e6 if options.activations else 0.0
        row["activation_mb"] = round(kept, 1)
        for epochs, said in case.epochs or ((0, 0),):
            if not epochs:
                yield row
                continue
            found = cost.exaflops(row["macs_in_image"], epochs * JFT)
            known = (encoder.title, epochs) in WRONG
            off = found / said - 1
            row |= {"epochs": epochs, "exaflops": round(found, 1), "paper_exaflops": said, "deviation": round(off, 4)}
            beyond = max(0.0, abs(found - said) - 0.5) / said  # Table 6 is rounded to whole numbers
            row |= {"within": None if known else beyond <= LOOSER.get(encoder.title, 0.01)}
            yield dict(row)


def parameters(encoder: Encoder) -> int:
    """Of an encoder, without any head."""
    return count_parameters(cost.skeleton(encoder))


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    lines = [
        f"{'encoder, 224 px, no head':<22}{'parameters':>13}{'paper':>7}{'timm':>13}"
        f"{'GMAC':>10}{'timm':>9}{'in image':>10}{'MB':>8}{'epochs':>8}{'exaFLOP':>9}{'Table 6':>9}{'off':>8}"
    ]
    for row in rows:
        timm = (f"{row['timm_parameters']:,}", f"{row['timm_macs'] / 1e9:.3f}") if "timm_macs" in row else ("", "")
        line = f"{row['case']:<22}{row['parameters']:>13,}{row['paper_parameters'] or '':>7}{timm[0]:>13}"
        line += f"{row['macs'] / 1e9:>10.3f}{timm[1]:>9}{row['macs_in_image'] / 1e9:>10.3f}{row['activation_mb']:>8.1f}"
        if "epochs" in row:
            verdict = {True: "", False: "  OUTSIDE", None: "  (the paper's entry is wrong)"}[row["within"]]
            line += f"{row['epochs']:>8}{row['exaflops']:>9.1f}{row['paper_exaflops']:>9}{row['deviation']:>8.1%}"
            line += verdict
        lines.append(line)
    lines.append("GMAC: all taps of a convolution; in image: without those on padding, which exaFLOPs count (Table 6).")
    lines.append("MB: activations of an image in training, bf16, eager. exaFLOPs: 6 x MAC x epochs x 303e6 images.")
    return "\n".join(lines)


def of_recipe(arguments: list[str]) -> str:
    """What a recipe's model costs an image, and its whole run."""
    try:
        made: recipes.Recipe = config.parse(recipes.Pretrain, arguments, recipes.FOLDER)
    except Refusal as refusal:
        try:
            made = config.parse(recipes.Finetune, arguments, recipes.FOLDER)
        except Refusal as other:  # the kind of recipe that it is meant as has less to say
            raise min(refusal, other, key=lambda one: len(one.message)) from None
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(made.head, clusters.Clusters) and not Path(made.head.codebook or "").is_file():
            print(f"there is no head.codebook yet: its head's cost is that of {CLUSTERS:,} clusters")
            file = Path(folder) / "codebook.safetensors"
            clusters.write(file, torch.zeros(CLUSTERS, made.encoder.channels), {})
            made = made.model_copy(update={"head": made.head.model_copy(update={"codebook": str(file)})})
        made, _, _ = recipes.resolve(made)
        with torch.device("meta"):
            head = made.head.build(cost.skeleton(made.encoder), 1000)
    encoder = cost.skeleton(made.encoder)
    macs = cost.encoder_macs(made.encoder)
    sizes = {
        (bf16, again): cost.activation_bytes(made.encoder, bf16, again) / 1e6
        for bf16 in (True, False)
        for again in (False, True)
    }
    height, width = made.encoder.image_hw
    images, padding = made.steps * made.batch, cost.padding_macs(made.encoder)
    total, inside = (cost.exaflops(macs + head.macs - left_out, images) for left_out in (0, padding))
    rows = {
        "encoder": f"{made.encoder.title} at {height} x {width}: {count_parameters(encoder):,} parameters",
        "head": f"{made.head.kind}: {count_parameters(head):,} parameters (a classifier's for 1,000 classes)",
        "forward": f"{macs / 1e9:.3f} GMAC an image, head {head.macs / 1e9:.3f}",
        "training": f"{cost.training_flops(macs + head.macs) / 1e9:.1f} GFLOP an image; {made.steps:,} steps of "
        f"{made.batch:,}: {total:.4g} exaFLOPs"
        + (f" ({inside:.4g} without padding, as in Table 6)" if padding else ""),
        "activations": f"{sizes[True, False]:.1f} MB an image in bf16, {sizes[False, False]:.1f} in fp32; with "
        f"activation_checkpointing {sizes[True, True]:.1f} and {sizes[False, True]:.1f}",
    }
    return "\n".join(f"{name:<13}{text}" for name, text in rows.items())
