"""The exported Space in its own process, used through headless Chromium."""

import re

import pytest
from PIL import Image

pytest.importorskip("selenium")

from src.serving.gradcam import LAYERS
from tests.planted import blurred_noise
from tests.visitor import CHROMIUM, DRIVER, Visitor, browser, served

if not (CHROMIUM and DRIVER):
    pytest.skip(
        "No Chromium with chromedriver. Install them: apt install chromium chromium-driver",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files to upload: two images of different shape, and one file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    for name, seed, size in (("wide", 5, (300, 180)), ("tall", 6, (160, 240))):
        Image.fromarray(blurred_noise(*size, seed)).save(folder / f"{name}.jpg")
    (folder / "invalid.jpg").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def address(exported_space):
    """The address of the running Space."""
    with served(exported_space) as address:
        yield address


@pytest.fixture(scope="module")
def driver():
    with browser() as driver:
        yield driver


@pytest.fixture
def visitor(driver, address):
    return Visitor(driver, address)


def test_upload_shows_detections_heatmap_table_and_time(visitor, images):
    visitor.upload(images / "wide.jpg")
    visitor.wait_for_images(300, 180)
    assert re.search(r"\d+ detections · \d+\.\d\d s · 300 × 180 pixels", visitor.text("#summary"))
    rows = visitor.until(visitor.rows)
    assert re.fullmatch(r"1\s+■ (circle|square|star)\s+\d+\.\d%\s+\d+, \d+, \d+, \d+", rows[0])


def test_a_sample_can_be_clicked(visitor):
    visitor.script("arguments[0].click()", visitor.all("#samples .gallery-item")[1])
    visitor.wait_for_images(192, 192)


def test_a_slider_updates_without_another_forward_pass(visitor, images):
    visitor.upload(images / "wide.jpg")
    visitor.wait_for_images(300, 180)
    seconds = visitor.text("#summary").split("·")[1]
    boxes, heatmap = visitor.source("detections"), visitor.source("heatmap")
    visitor.set_slider("confidence", 0.45)
    visitor.until(
        lambda: visitor.source("detections") != boxes and visitor.source("heatmap") != heatmap
    )
    assert visitor.text("#summary").split("·")[1] == seconds  # of the one forward pass
    visitor.set_slider("confidence", 0.95)
    visitor.until(lambda: "No detections" in visitor.text("#summary"))
    visitor.until(lambda: "top candidate" in visitor.text("#message"))
    assert not visitor.rows()


def test_a_class_or_a_row_can_be_explained(visitor, images):
    visitor.upload(images / "wide.jpg")
    visitor.wait_for_images(300, 180)
    heatmap = visitor.source("heatmap")
    visitor.choose("target", "Class square")
    visitor.until(lambda: visitor.source("heatmap") != heatmap)
    heatmap = visitor.source("heatmap")
    visitor.until(lambda: visitor.all("#table .virtual-row .body-cell"))[
        5
    ].click()  # the second row
    visitor.until(lambda: visitor.source("heatmap") != heatmap)
    assert visitor.all("#target input")[0].get_attribute("value").startswith("2: ")
    for name, choice in (
        ("method", "EigenCAM"),
        ("target", "Class star"),
        ("layers", [*LAYERS.values()][1]),
    ):
        heatmap = visitor.source("heatmap")
        visitor.choose(name, choice)
        visitor.until(lambda before=heatmap: visitor.source("heatmap") != before)


def test_unreadable_files_give_a_message(visitor, images):
    visitor.upload(images / "invalid.jpg")
    visitor.until(
        lambda: "This file can't be read as an image" in visitor.text("#summary [role=alert]")
    )
    assert not visitor.source("detections") and not visitor.source("heatmap") and not visitor.rows()
    visitor.upload(images / "tall.jpg")
    visitor.wait_for_images(160, 240)
    assert not visitor.all("#summary [role=alert]")


def test_two_visitors_have_their_own_images(driver, address, images):
    first = Visitor(driver, address)
    first.upload(images / "wide.jpg")
    first.wait_for_images(300, 180)
    window = driver.current_window_handle
    driver.switch_to.new_window("tab")
    second = Visitor(driver, address)
    second.upload(images / "tall.jpg")
    second.wait_for_images(160, 240)
    second_window = driver.current_window_handle
    driver.switch_to.window(window)
    boxes = first.source("detections")
    first.set_slider("confidence", 0.4)
    first.until(lambda: first.source("detections") != boxes)
    first.wait_for_images(300, 180)
    assert "300 × 180" in first.text("#summary")
    driver.switch_to.window(second_window)
    driver.close()
    driver.switch_to.window(window)


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
    code = (
        "let r = document.getElementById(arguments[0]).getBoundingClientRect();"
        "return [r.left, r.right, r.top]"
    )
    places = {
        name: visitor.script(code, name)
        for name in ("image", "detections", "heatmap", "table", "confidence", "target")
    }
    visitor.reset_size()
    assert all(
        0 <= left < right <= width and right - left > 300 for left, right, _ in places.values()
    )
    above = places["image"][2] < places["detections"][2] < places["heatmap"][2]
    assert (
        above
        if width < 500
        else places["image"][2] == places["detections"][2] == places["heatmap"][2]
    )


def test_the_browser_logs_no_errors(visitor, images):
    visitor.driver.get_log("browser")
    visitor.upload(images / "wide.jpg")
    visitor.wait_for_images(300, 180)
    assert not [
        entry["message"]
        for entry in visitor.driver.get_log("browser")
        if entry["level"] == "SEVERE"
    ]
