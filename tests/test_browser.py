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

from tests import evaluate_cases
from tests.conftest import TINY
from tests.processes import free_port

CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1400,1400"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing leaves this machine
]
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
EVIL_CLASS = "<script>alert(1)</script>"  # a class, from a folder "<script>alert(1)<" with "script>" in it
ODD_NAME = """odd <img src=x onerror=alert(2)> & "quotes" '$x$' |*_`[a](b) ü"""
HEADINGS = [
    *("Attention rollout", "Attention of layer 2", "Mean attention distance", "Filters", "Positions"),
    *("Reconstructions", "Features", "Nearest neighbors", "To repeat it"),
]
HEAD_SCRIPT = "<script>window.alert = () => { window.alerted = true }</script>"
BODY_SCRIPT = """<script>window.addEventListener("load", () => {
  const told = document.createElement("pre"); told.id = "told"
  told.textContent = btoa(unescape(encodeURIComponent(JSON.stringify({
    images: [...document.images].map(one => [one.alt, one.complete, one.naturalWidth, one.naturalHeight]),
    headings: [...document.querySelectorAll("h1, h2")].map(one => one.textContent),
    elements: [...new Set([...document.body.querySelectorAll("*")].map(one => one.tagName))],
    scripts: document.scripts.length, alerted: !!window.alerted, text: document.body.innerText,
    requests: performance.getEntriesByType("resource").map(one => one.name.slice(0, 80)),
    wide: document.documentElement.scrollWidth <= innerWidth,
  })))); document.body.append(told) })</script>"""


def run_chromium(folder: Path, address: str, *args: str) -> str:
    """What Chromium prints of a page; it is ended with all its children."""
    assert CHROMIUM is not None
    profile = folder / f"profile-{time.monotonic_ns()}"
    command = [CHROMIUM, *CHROMIUM_FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=8000", *args, address]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        end_process(process)
    shutil.rmtree(profile, ignore_errors=True)
    assert process.returncode == 0, errors[-2000:]
    return output


def end_process(process: subprocess.Popen) -> None:
    """End a process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short pretraining, run/, on shards/ with a class of a wicked name."""
    folder = tmp_path_factory.mktemp("browser")
    evaluate_cases.write_shards(folder, evaluate_cases.image_names({"a": 10, EVIL_CLASS: 10}, {"a": 5, EVIL_CLASS: 5}))
    data = [f"data.train={folder}/shards/train", f"data.val={folder}/shards/val", f"run={folder}/run"]
    args = [*TINY, *data, "steps=20", "log_every=5", "save_every=20", "eval_every=10", "visualize_every=10"]
    evaluate_cases.run_tool("pretrain", [*args, "tracker=tensorboard"], folder)
    return folder


@browser
def test_the_report_is_whole_needs_nothing_else_and_runs_nothing(given: Path, tmp_path: Path):
    """The analysis of the run, which lies at an odd place."""
    shutil.copytree(given / "run", given / ODD_NAME)
    args = [f"encoder={given}/{ODD_NAME}", f"data={given}/shards", f"run={tmp_path}/look", "images=3", "workers=0"]
    evaluate_cases.run_tool("analyze", args, given)
    text = (tmp_path / "look" / "report.html").read_text()
    # without what it shows as code, which may hold anything, escaped
    markup = re.sub(r"<code>.*?</code>|<title>.*?</title>|<h1>.*?</h1>|&[^;]*;", "", text, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?(?!["']?data:)""", markup)
    assert not re.findall(r"url\(|@import|<link|<iframe", text)
    assert EVIL_CLASS in (tmp_path / "look" / "features.csv").read_text()  # so it was among the data
    instrumented = text.replace("<head>", f"<head>{HEAD_SCRIPT}", 1).replace("</body>", f"{BODY_SCRIPT}</body>")
    (tmp_path / "copy.html").write_text(instrumented)
    dom = run_chromium(tmp_path, f"file://{tmp_path}/copy.html", "--dump-dom", f"--screenshot={tmp_path}/page.png")
    match = re.search(r'<pre id="told">([^<]*)</pre>', dom)
    assert match, dom[-2000:]
    page = json.loads(b64decode(match[1]))
    assert page["headings"][1:] == HEADINGS
    assert page["headings"][0] == f"Inside {given}/{ODD_NAME}"
    assert len(page["images"]) == 8
    assert all(complete and min(width, height) > 40 for _, complete, width, height in page["images"]), page["images"]
    assert not page["alerted"]
    assert page["scripts"] == 2, "its own two"
    assert {"IFRAME", "LINK", "FORM", "OBJECT", "B"}.isdisjoint(page["elements"])
    assert [request for request in page["requests"] if not request.startswith("data:")] == []
    assert page["wide"], "it scrolls sideways"
    assert f"encoder={given}/odd" in page["text"].replace("'", "")
    assert not re.findall("&#|&amp;", page["text"])


Getter = Callable[..., Any]


@pytest.fixture(scope="module")
def board(given: Path) -> Iterator[Getter]:
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
        with urllib.request.urlopen(address, timeout=10) as response:
            data = response.read()
        return data if raw else json.loads(data)

    def ready() -> bool:
        try:
            return bool(get("scalars/tags") and get("images/tags") and get("custom_scalars/layout"))
        except OSError:
            return False

    try:
        deadline = time.monotonic() + 60
        while not ready():
            assert process.poll() is None, (given / "tensorboard.log").read_text()
            assert time.monotonic() < deadline, (given / "tensorboard.log").read_text()
            time.sleep(0.2)
        yield get
    finally:
        end_process(process)


@pytest.mark.process
def test_tensorboard_serves_what_the_run_wrote(given: Path, board: Getter):
    """By its own program, with its plugins; what a run writes is compared in tests/train/test_tracker.py."""
    rows = [json.loads(line) for line in (given / "run" / "metrics.jsonl").read_text().splitlines()]
    ((run, tags),) = board("scalars/tags").items()
    for part, key in (("train", "loss"), ("val", "val_loss"), ("train", "neighbor_loss"), ("train", "uniform")):
        events = board("scalars/scalars", tag=f"{part}/{key.removeprefix('val_')}", run=run)
        expected = [(row["step"], row[key]) for row in rows if key in row]
        assert [step for _, step, _ in events] == [step for step, _ in expected] != []
        np.testing.assert_allclose([value for *_, value in events], [value for _, value in expected], rtol=1e-5)
    layout = board("custom_scalars/layout")
    charts = {chart["title"]: chart["multiline"]["tag"] for part in layout["category"] for chart in part["chart"]}
    assert layout["category"][0]["title"] == "loss"
    for title, patterns in charts.items():
        matching_tags = [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        assert len(matching_tags) > 1, f"{title} draws nothing beside something"
        response = board("custom_scalars/scalars", tag=patterns[0], run=run)
        assert response["regex_valid"]
        assert set(response["tag_to_events"]) == set(matching_tags)
    assert [list(names) for names in board("images/tags").values()] == [["reconstruction"]]
    panels = board("images/images", tag="reconstruction", run=run)
    assert [panel["step"] for panel in panels] == [10, 20]
    panel_bytes = board(f"images/individualImage?{panels[-1]['query']}", raw=True)
    pixels = np.asarray(Image.open(BytesIO(panel_bytes)).convert("RGB"))
    np.testing.assert_array_equal(pixels, Image.open(given / "run" / "reconstruction.png").convert("RGB"))
    assert pixels.shape[1] > 4 * 16, "five columns"
    assert [list(names) for names in board("histograms/tags").values()] == [["labels"]]
    events = board("histograms/histograms", tag="labels", run=run)
    assert [step for _, step, _ in events] == [5, 10, 15, 20]
    totals = {round(sum(count for *_, count in buckets)) for _, _, buckets in events}
    assert totals in ({5 * 8 * 8}, {5 * 8 * 16})  # of 5 updates of 8 images the corrupted patches, or all


@browser
@pytest.mark.process
def test_tensorboard_draws_them(given: Path, board: Getter, tmp_path: Path):
    tag_filter = urllib.parse.quote("train/loss|train/neighbor_loss|reconstruction|labels")
    dom = ""
    for _ in range(3):  # a busy machine may have the page half drawn
        dom = run_chromium(tmp_path, f"{board()}?tagFilter={tag_filter}#timeseries", "--dump-dom")
        if "reconstruction" in dom and "train/loss" in dom:
            break
    for name in ("train/loss", "train/neighbor_loss", "reconstruction", "labels"):
        assert name in dom, dom[:3000]
    screenshot = tmp_path / "charts.png"
    run_chromium(tmp_path, f"{board()}#custom_scalars", f"--screenshot={screenshot}")
    pixels = np.asarray(Image.open(screenshot).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (1400, 1400)
    chart = pixels[100:, 360:]  # beside the bar and the settings
    is_colored = np.abs(chart - chart.mean(2, keepdims=True)).max(2) > 60
    assert is_colored.sum() > 500, "no curve is drawn"
