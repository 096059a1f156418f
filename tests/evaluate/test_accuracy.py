"""Each sample of a split counts once, whatever the processes and the padding."""

from functools import reduce
from pathlib import Path

import pytest
import torch

from ssl_vit.data import manifest
from ssl_vit.data.samples import Data, Samples
from ssl_vit.data.stream import EvaluationStream, Share
from ssl_vit.encoders.vit import Vit
from ssl_vit.evaluate.accuracy import HeldOut, Sums
from ssl_vit.heads.transfer import Transfer
from ssl_vit.model import Model

DATA = Data(image_size=16, workers=0)


def judge() -> Model:
    """A model whose answers are mixed: right for some, wrong for others."""
    torch.manual_seed(0)
    encoder = Vit(size="Ti", width=32, depth=1, heads=2, patch=4, image=16).build()
    model = Model(encoder, Transfer().build(encoder, 3)).eval()
    torch.nn.init.normal_(model.head.layers[0].weight)
    return model


@pytest.mark.parametrize(("world", "batch"), [(1, 5), (2, 3), (3, 4), (16, 2)])
def test_equals_a_plain_loop_over_the_split(shards: Path, world: int, batch: int):
    split, model = manifest.load(shards / "val"), judge()
    samples = Samples(split, DATA, seed=0, training=False)
    right, loss = 0, 0.0
    for i in range(split.samples):
        one, faults = samples.batch([(0, i)])
        assert not faults
        with torch.no_grad():
            logits = model.head.layers(model.encoder(one["image"])[:, 0])
        right += int(logits.argmax()) == int(one["label"])
        loss += float(torch.nn.functional.cross_entropy(logits, one["label"]))
    assert 0 < right < split.samples

    stream, parts = EvaluationStream(split, DATA, batch), []

    def collect(sums: Sums) -> Sums:
        parts.append(sums)
        return {**sums, "_weight": torch.tensor(1)}  # what one process has alone is of no interest here

    with torch.no_grad():
        for rank in range(world):
            list(HeldOut(stream, Share(rank, world, batch), torch.device("cpu"), collect, model.head.report).run(model))
    whole = reduce(lambda a, b: {name: a[name] + b[name] for name in a}, parts)
    assert whole["_weight"] == split.samples
    assert whole["top1"] == right
    assert whole["top5"] == split.samples
    assert float(whole["loss"]) == pytest.approx(loss, rel=1e-5)
