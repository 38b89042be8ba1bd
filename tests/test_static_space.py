"""The static Space in headless Chromium gives what Python gives."""

import json
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CalledProcessError
from threading import Thread

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

pytest.importorskip("selenium")
pytest.importorskip("onnxscript")

from selenium.webdriver import Keys

from src.model.network import YOLOv3
from src.serving.gradcam import Explainer
from src.serving.predictor import CONFIDENCE, Predictor
from src.serving.static_space import CDN, export_static_space
from tests.visitor import CHROMIUM, DRIVER, Visitor, browser

WEIGHTS = Path(__file__).parents[1] / "weights"
SAMPLES = sorted((WEIGHTS / "samples").glob("*.jpg"))
HORSES = WEIGHTS / "samples/horses.jpg"
MODEL = YOLOv3.from_pretrained(WEIGHTS)
if not (CHROMIUM and DRIVER and shutil.which("npm")):
    pytest.skip(
        "Chromium, its driver or npm is missing: apt install chromium chromium-driver npm",
        allow_module_level=True,
    )
FILES = {  # name -> size, EXIF orientation
    **{f"image.{kind}": ((480, 360), 1) for kind in ("png", "webp", "gif", "bmp", "avif")},
    "rotated.jpg": ((480, 360), 6),
    "large.jpg": ((5184, 3888), 1),
}


class Page(Visitor):
    """The page in a browser; its script's variables can be read."""

    def __init__(self, driver, address: str):
        self.driver, self.address = driver, address
        driver.get(address)
        self.until(lambda: self.js("$('loading').hidden"))

    def js(self, expression: str, *arguments):
        return self.script(f"return {expression}", *arguments)

    def act(self, action) -> None:
        """Do what leads to a new heatmap, and wait for it, or for an error."""
        self.script("if (current) current.heatmap = null; $('summary').replaceChildren()")
        action()
        self.until(lambda: self.js("current?.heatmap || document.querySelector('[role=alert]')"))

    def set(self, name: str, value) -> None:
        """Set a slider or a menu."""
        event = "new Event('input', {bubbles: true})"
        code = f"$('{name}').value = arguments[0]; $('{name}').dispatchEvent({event})"
        self.act(lambda: self.script(code, value))

    def upload(self, path: Path) -> None:
        self.script("current = null")
        self.act(lambda: self.all("#file")[0].send_keys(str(path)))

    def check(self, path: Path, target: str | int = "all", **settings) -> None:
        """Compare detections and heatmap with Python's."""
        assert not self.all("[role=alert]")
        expected = Explainer(Predictor(MODEL, device="cpu"), path).explain(target, **settings)
        shown = self.js("current.detections.length ? current.detections : [current.candidates[0]]")
        assert [each["label"] for each in shown] == expected.detections.labels.tolist()
        scores = [each["score"] for each in shown]
        assert scores == pytest.approx(expected.detections.scores, abs=0.01)
        boxes = torch.tensor([each["box"] for each in shown]).clamp(min=0)
        boxes = boxes.minimum(torch.tensor(expected.heatmap.shape[::-1] * 2))
        assert box_iou(boxes, torch.tensor(expected.detections.boxes)).diag().min() >= 0.99
        size = self.js("[current.placement.width, current.placement.height]")
        heatmap = cv2.resize(expected.heatmap, size, interpolation=cv2.INTER_AREA).flatten()
        assert np.corrcoef(self.js("[...current.heatmap]"), heatmap)[0, 1] >= 0.99


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, links = tmp_path_factory.mktemp("static") / "space", {"Code": "https://example.org"}
    try:
        return export_static_space(MODEL, folder, SAMPLES, links, vendor=True)
    except CalledProcessError:
        pytest.skip("npm can't download onnxruntime-web")


@pytest.fixture(scope="module")
def page(folder):
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, browser() as driver:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Page(driver, f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_samples_give_what_python_gives(sample, page):
    page.script("current = null")
    page.act(page.all(f"[alt='{sample.name}']")[0].click)
    page.check(sample)


def test_thresholds_rows_classes_layers_and_opacity(page):
    page.upload(HORSES)
    thresholds = {"confidence": 0.05, "iou_threshold": 0.2}
    for name, value in thresholds.items():
        page.set(name, value)
    page.check(HORSES, **thresholds)
    page.set("target", "class 12")
    page.check(HORSES, "horse", **thresholds)
    page.act(lambda: page.all("#rows tr")[1].send_keys(Keys.ENTER))
    page.check(HORSES, 1, **thresholds)
    page.act(page.all("#rows tr")[2].click)
    assert page.js("$('target').selectedOptions[0].text").startswith("3: cow")
    page.set("layers", "32")
    page.check(HORSES, 2, layers="32", **thresholds)
    for name, value in {"layers": "all", "opacity": 0, "confidence": 0.95}.items():
        page.set(name, value)
    page.check(HORSES, confidence=0.95, iou_threshold=0.2)
    assert "none" in page.text("#summary") and "top candidate" in page.text("#message")
    assert page.js("getComputedStyle($('colours')).opacity") == "0"
    page.set("confidence", CONFIDENCE)  # the default again, for the next tests
    page.set("iou_threshold", 0.45)


@pytest.mark.parametrize("name", FILES)
def test_files(name, page, tmp_path):
    size, orientation = FILES[name]
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.open(WEIGHTS / "samples/cow.jpg").resize(size)
    image.save(tmp_path / name, quality=95, exif=exif)
    page.upload(tmp_path / name)
    page.check(tmp_path / name)


@pytest.mark.parametrize(
    "event",
    [
        "new DragEvent('drop', {dataTransfer: files, cancelable: true})",
        "new ClipboardEvent('paste', {clipboardData: files})",
    ],
)
def test_drop_and_paste(event, page):
    code = (
        "let file = new File([await (await fetch('samples/horses.jpg')).blob()], 'horses.jpg');"
        "let files = new DataTransfer(); files.items.add(file); current = null;"
    )
    page.act(lambda: page.script(f"{code} document.dispatchEvent({event})"))
    page.check(HORSES)


def test_files_that_are_no_images(page, tmp_path):
    (tmp_path / "image.jpg").write_text("not an image")
    page.upload(tmp_path / "image.jpg")
    assert "can't be read as an image" in page.text("#summary [role=alert]")
    assert not page.js("$('detections').offsetWidth || $('rows').innerText")


def test_the_page_describes_the_model_fits_a_phone_and_requests_nothing_else(page):
    for text in ("nothing is uploaded", "NASA", "aeroplane", "PASCAL VOC", "3.9 million", "Code"):
        assert text in page.text("body")
    assert page.js("[...document.links].some((a) => a.href.endsWith('/model.onnx'))")
    page.resize(360)
    assert page.js("document.documentElement.scrollWidth") <= 360
    page.reset_size()
    names = page.js("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert names and all(name.startswith((page.address, f"blob:{page.address}")) for name in names)
    assert not [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_page_says_why_it_does_not_start(page, folder):
    """The last test of the page: it changes the folder."""
    command, source = "Page.addScriptToEvaluateOnNewDocument", "delete window.WebAssembly"
    script = page.driver.execute_cdp_cmd(command, {"source": source})
    page.driver.get(page.address)
    page.until(lambda: "needs WebAssembly" in page.text("[role=alert]"))
    page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    with open(folder / "runtime/ort.wasm.bundle.min.mjs", "a") as file:
        file.write(" ")  # another hash
    page.driver.get(page.address)
    page.until(lambda: "bundle.min.mjs can't be loaded" in page.text("[role=alert]"))


def test_the_folder(folder, tmp_path, monkeypatch):
    assert (folder / "model.onnx").stat().st_size < 9e6
    assert "\nsdk: static\n" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "samples/LICENSES.txt").is_file()
    monkeypatch.setattr("src.serving.static_space.export_onnx", lambda model, path: folder)
    online = export_static_space(MODEL, tmp_path / "online", SAMPLES[:1])
    _, *runtime = json.loads((online / "facts.json").read_text(encoding="utf-8"))["downloads"]
    assert all(part["url"].startswith(CDN) and part["integrity"] for part in runtime)
