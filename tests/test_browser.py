"""The exported Space in its own process, used through headless Chromium."""

import re

import pytest
from PIL import Image

pytest.importorskip("selenium")

from src.serving.gradcam import LAYERS
from tests.planted import blurred_noise
from tests.visitor import CHROMIUM, DRIVER, Visitor, browser, serving

if not (CHROMIUM and DRIVER):
    pytest.skip(
        "No Chromium with chromedriver. Install them: apt install chromium chromium-driver",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files to upload: two images of different shape, and one file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    for name, size in {"wide": (300, 180), "tall": (160, 240)}.items():
        Image.fromarray(blurred_noise(*size, seed=5)).save(folder / f"{name}.jpg")
    (folder / "invalid.jpg").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def visit(exported_space):
    """Open the running Space in the browser's window."""
    with serving(exported_space) as (address, _), browser() as driver:
        yield lambda: Visitor(driver, address)


@pytest.fixture
def visitor(visit):
    return visit()


def test_upload_shows_detections_heatmap_and_table(visitor, images):
    visitor.driver.get_log("browser")
    visitor.upload(images / "wide.jpg")
    visitor.wait_for_images(300, 180)
    assert re.search(r"Detections: \d+ · 300 × 180 pixels", visitor.text("#summary"))
    rows = visitor.until(visitor.rows)
    assert re.fullmatch(r"1\s+■ (circle|square|star)\s+\d+\.\d%\s+\d+, \d+, \d+, \d+", rows[0])
    assert "SEVERE" not in [entry["level"] for entry in visitor.driver.get_log("browser")]


def test_a_sample_can_be_clicked(visitor):
    visitor.script("arguments[0].click()", visitor.all("#samples .gallery-item")[1])
    visitor.wait_for_images(192, 192)


def test_sliders_update_detections_and_heatmap(visitor, images):
    visitor.upload(images / "wide.jpg")
    visitor.wait_for_images(300, 180)
    boxes, heatmap = visitor.source("detections"), visitor.source("heatmap")
    visitor.set_slider("confidence", 0.6)
    visitor.until(
        lambda: visitor.source("detections") != boxes and visitor.source("heatmap") != heatmap
    )
    visitor.set_slider("confidence", 0.95)
    visitor.until(lambda: "Detections: none" in visitor.text("#summary"))
    visitor.until(lambda: "top candidate" in visitor.text("#message"))
    assert not visitor.rows()


def test_a_class_or_a_row_can_be_explained(visitor, images):
    visitor.upload(images / "wide.jpg")
    visitor.wait_for_images(300, 180)
    for name, choice in (
        ("target", "Class square"),
        ("row", ""),
        ("method", "EigenCAM"),
        ("layers", [*LAYERS.values()][1]),
    ):
        heatmap = visitor.source("heatmap")
        if name == "row":
            cells = visitor.until(lambda: visitor.all("#table .virtual-row .body-cell"))
            cells[5].click()  # the second row
        else:
            visitor.choose(name, choice)
        visitor.until(lambda before=heatmap: visitor.source("heatmap") != before)
    assert visitor.all("#target input")[0].get_attribute("value").startswith("2: ")


def test_unreadable_files_give_a_message(visitor, images):
    visitor.upload(images / "invalid.jpg")
    message = "This file can't be read as an image"
    visitor.until(lambda: message in visitor.text("#summary [role=alert]"))
    assert not visitor.source("detections") and not visitor.source("heatmap") and not visitor.rows()
    visitor.upload(images / "tall.jpg")
    visitor.wait_for_images(160, 240)
    assert not visitor.all("#summary [role=alert]")


def test_two_visitors_have_their_own_images(visit, visitor, images):
    visitor.upload(images / "wide.jpg")
    visitor.wait_for_images(300, 180)
    window = visitor.driver.current_window_handle
    visitor.driver.switch_to.new_window("tab")
    second = visit()
    second.upload(images / "tall.jpg")
    second.wait_for_images(160, 240)
    visitor.driver.close()
    visitor.driver.switch_to.window(window)
    boxes = visitor.source("detections")
    visitor.set_slider("confidence", 0.4)
    visitor.until(lambda: visitor.source("detections") != boxes)
    visitor.wait_for_images(300, 180)


def test_the_page_describes_the_model(visitor):
    facts = visitor.text("#model")
    for part in ("circle", "square", "star", "nothing yet", "mAP", "0.123", "Code"):
        assert part in facts
    links = [link.get_attribute("href") for link in visitor.all("#model a")]
    assert links == ["https://huggingface.co/a/b", "https://example.org/code"]
    assert "CC-BY-4.0: first by Ada <Lovelace>" in visitor.text("#credits")


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_page_fits_the_window(visitor, images, width):
    visitor.resize(width)
    visitor.upload(images / "wide.jpg")
    visitor.wait_for_images(300, 180)
    assert visitor.script("return document.documentElement.scrollWidth") <= width
    code = "return document.getElementById(arguments[0]).getBoundingClientRect()"
    names = ("image", "detections", "heatmap", "table", "confidence", "target")
    places = [visitor.script(code, name) for name in names]
    visitor.reset_size()
    for place in places:
        assert place["left"] >= 0 and place["right"] <= width and place["width"] > 300
    tops = [place["top"] for place in places[:3]]
    rows = 3 if width < 500 else 1  # below each other, or side by side
    assert tops == sorted(tops) and len(set(tops)) == rows
