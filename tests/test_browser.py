"""report.html and TensorBoard as a person opens them: in a browser, headless Chromium, where there is one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import frozen
from tests.conftest import TINY
from tests.starts import free_port

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1400,1400"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing leaves this machine
]
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
EVIL = "<script>alert(1)</script>"  # a class, from a folder "<script>alert(1)<" with "script>" in it
ODD = """odd <img src=x onerror=alert(2)> & "quotes" '$x$' |*_`[a](b) ü"""
HEADINGS = [
    *("Attention rollout", "Attention of layer 2", "Mean attention distance", "Filters", "Positions"),
    *("Reconstructions", "Features", "Nearest neighbours", "To repeat it"),
]
FIRST = "<script>window.alert = () => { window.alerted = true }</script>"
LAST = """<script>window.addEventListener("load", () => {
  const told = document.createElement("pre"); told.id = "told"
  told.textContent = btoa(unescape(encodeURIComponent(JSON.stringify({
    images: [...document.images].map(one => [one.alt, one.complete, one.naturalWidth, one.naturalHeight]),
    headings: [...document.querySelectorAll("h1, h2")].map(one => one.textContent),
    elements: [...new Set([...document.body.querySelectorAll("*")].map(one => one.tagName))],
    scripts: document.scripts.length, alerted: !!window.alerted, text: document.body.innerText,
    requests: performance.getEntriesByType("resource").map(one => one.name.slice(0, 80)),
    wide: document.documentElement.scrollWidth <= innerWidth,
  })))); document.body.append(told) })</script>"""


def chromium(folder: Path, address: str, *words: str) -> str:
    """What Chromium prints of a page; it is ended with all its children."""
    assert CHROMIUM is not None
    profile = folder / f"profile-{time.monotonic_ns()}"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=8000", *words, address]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
    try:
        said, errors = process.communicate(timeout=60)
    finally:
        end(process)
    shutil.rmtree(profile, ignore_errors=True)
    assert process.returncode == 0, errors[-2000:]
    return said


def end(process: subprocess.Popen) -> None:
    """End a process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short pretraining, run/, on shards/ with a class of a wicked name."""
    folder = tmp_path_factory.mktemp("browser")
    frozen.shards(folder, frozen.files({"a": 10, EVIL: 10}, {"a": 5, EVIL: 5}))
    data = [f"data.train={folder}/shards/train", f"data.val={folder}/shards/val", f"run={folder}/run"]
    words = [*TINY, *data, "steps=20", "log_every=5", "save_every=20", "eval_every=10", "panel_every=10"]
    frozen.run_tool("pretrain", [*words, "tracker=tensorboard"], folder)
    return folder


@browser
def test_the_report_is_whole_needs_nothing_else_and_runs_nothing(given: Path, tmp_path: Path):
    """The analysis of the run, which lies at an odd place."""
    shutil.copytree(given / "run", given / ODD)
    words = [f"encoder={given}/{ODD}", f"data={given}/shards", f"run={tmp_path}/look", "images=3", "workers=0"]
    frozen.run_tool("analyze", words, given)
    text = (tmp_path / "look" / "report.html").read_text()
    # without what it shows as code, which may hold anything, escaped
    plain = re.sub(r"<code>.*?</code>|<title>.*?</title>|<h1>.*?</h1>|&[^;]*;", "", text, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?(?!["']?data:)""", plain)
    assert not re.findall(r"url\(|@import|<link|<iframe", text)
    assert EVIL in (tmp_path / "look" / "features.csv").read_text()  # so it was among the data
    watched = text.replace("<head>", f"<head>{FIRST}", 1).replace("</body>", f"{LAST}</body>")
    (tmp_path / "copy.html").write_text(watched)
    dom = chromium(tmp_path, f"file://{tmp_path}/copy.html", "--dump-dom", f"--screenshot={tmp_path}/page.png")
    found = re.search(r'<pre id="told">([^<]*)</pre>', dom)
    assert found, dom[-2000:]
    told = json.loads(b64decode(found[1]))
    assert told["headings"][1:] == HEADINGS
    assert told["headings"][0] == f"Inside {given}/{ODD}"
    assert len(told["images"]) == 8
    assert all(complete and min(width, height) > 40 for _, complete, width, height in told["images"]), told["images"]
    assert not told["alerted"]
    assert told["scripts"] == 2, "its own two"
    assert {"IFRAME", "LINK", "FORM", "OBJECT", "B"}.isdisjoint(told["elements"])
    assert [one for one in told["requests"] if not one.startswith("data:")] == []
    assert told["wide"], "it scrolls sideways"
    assert f"encoder={given}/odd" in told["text"].replace("'", "")
    assert not re.findall("&#|&amp;", told["text"])


Get = Callable[..., Any]


@pytest.fixture(scope="module")
def board(given: Path) -> Iterator[Get]:
    """TensorBoard over the run; called with a plugin's route it gives the answer."""
    port, program = free_port(), Path(sys.executable).with_name("tensorboard")
    command = [str(program), "--logdir", str(given / "run"), "--host", "127.0.0.1", "--port", str(port)]
    with (given / "tensorboard.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def get(route: str = "", raw: bool = False, **query: str) -> Any:
        address = f"http://127.0.0.1:{port}/"
        if not route:
            return address
        address += f"data/plugin/{route}" + ("?" + urllib.parse.urlencode(query) if query else "")
        with urllib.request.urlopen(address, timeout=10) as answer:
            data = answer.read()
        return data if raw else json.loads(data)

    def ready() -> bool:
        try:
            return bool(get("scalars/tags") and get("images/tags") and get("custom_scalars/layout"))
        except OSError:
            return False

    try:
        until = time.monotonic() + 60
        while not ready():
            assert process.poll() is None, (given / "tensorboard.log").read_text()
            assert time.monotonic() < until, (given / "tensorboard.log").read_text()
            time.sleep(0.2)
        yield get
    finally:
        end(process)


@pytest.mark.process
def test_tensorboard_serves_what_the_run_wrote(given: Path, board: Get):
    """By its own program, with its plugins; what a run writes is compared in tests/train/test_tracker.py."""
    rows = [json.loads(line) for line in (given / "run" / "metrics.jsonl").read_text().splitlines()]
    ((run, tags),) = board("scalars/tags").items()
    for part, key in (("train", "loss"), ("val", "val_loss"), ("train", "neighbour_loss"), ("train", "uniform")):
        found = board("scalars/scalars", tag=f"{part}/{key.removeprefix('val_')}", run=run)
        wanted = [(row["step"], row[key]) for row in rows if key in row]
        assert [step for _, step, _ in found] == [step for step, _ in wanted] != []
        np.testing.assert_allclose([value for *_, value in found], [value for _, value in wanted], rtol=1e-5)
    layout = board("custom_scalars/layout")
    charts = {chart["title"]: chart["multiline"]["tag"] for part in layout["category"] for chart in part["chart"]}
    assert layout["category"][0]["title"] == "loss"
    for title, patterns in charts.items():
        matched = [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        assert len(matched) > 1, f"{title} draws nothing beside something"
        asked = board("custom_scalars/scalars", tag=patterns[0], run=run)
        assert asked["regex_valid"]
        assert set(asked["tag_to_events"]) == set(matched)
    assert [list(names) for names in board("images/tags").values()] == [["reconstruction"]]
    panels = board("images/images", tag="reconstruction", run=run)
    assert [one["step"] for one in panels] == [10, 20]
    seen = board(f"images/individualImage?{panels[-1]['query']}", raw=True)
    pixels = np.asarray(Image.open(BytesIO(seen)).convert("RGB"))
    np.testing.assert_array_equal(pixels, Image.open(given / "run" / "reconstruction.png").convert("RGB"))
    assert pixels.shape[1] > 4 * 16, "five columns"
    assert [list(names) for names in board("histograms/tags").values()] == [["labels"]]
    found = board("histograms/histograms", tag="labels", run=run)
    assert [step for _, step, _ in found] == [5, 10, 15, 20]
    counted = {round(sum(count for *_, count in buckets)) for _, _, buckets in found}
    assert counted in ({5 * 8 * 8}, {5 * 8 * 16})  # of 5 updates of 8 images the corrupted patches, or all


@browser
@pytest.mark.process
def test_tensorboard_draws_them(given: Path, board: Get, tmp_path: Path):
    only = urllib.parse.quote("train/loss|train/neighbour_loss|reconstruction|labels")
    dom = ""
    for _ in range(3):  # a busy machine may have the page half drawn
        dom = chromium(tmp_path, f"{board()}?tagFilter={only}#timeseries", "--dump-dom")
        if "reconstruction" in dom and "train/loss" in dom:
            break
    for name in ("train/loss", "train/neighbour_loss", "reconstruction", "labels"):
        assert name in dom, dom[:3000]
    picture = tmp_path / "charts.png"
    chromium(tmp_path, f"{board()}#custom_scalars", f"--screenshot={picture}")
    drawn = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert drawn.shape[:2] == (1400, 1400)
    chart = drawn[100:, 360:]  # beside the bar and the settings
    colored = np.abs(chart - chart.mean(2, keepdims=True)).max(2) > 60
    assert colored.sum() > 500, "no curve is drawn"
