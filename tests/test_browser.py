"""The exported Space, served by a process of its own and used through headless Chromium as a visitor would."""

import re

import pytest
from PIL import Image

pytest.importorskip("selenium")

from src.serving.space import export_space
from tests.planted import blurred_noise, planted_model  # noqa: E402
from tests.visitor import CHROMIUM, DRIVER, Visitor, browser, served  # noqa: E402

if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium with chromedriver here: apt install chromium chromium-driver", allow_module_level=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files to upload: two pictures of different shape, and one that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, seed, size in (("wide", 5, (300, 180)), ("tall", 6, (160, 240))):
        Image.fromarray(blurred_noise(*size, seed)).save(folder / f"{name}.jpg")
    (folder / "rubbish.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The exported folder, running."""
    model = planted_model(metadata={"data": "nothing, for a test", "mAP50": 0.125})
    samples = [blurred_noise(192, 192, seed) for seed in range(3)]
    folder = export_space(model, tmp_path_factory.mktemp("served") / "space", samples, {"Code": "https://example.org"})
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def driver():
    with browser() as driver:
        yield driver


@pytest.fixture
def visitor(driver, address):
    return Visitor(driver, address)


def test_upload_shows_boxes_map_table_and_time(visitor, pictures):
    visitor.upload(pictures / "wide.jpg")
    visitor.see(300, 180)
    assert re.search(r"\d+ objects · \d+\.\d\d s · 300 × 180 pixels", visitor.text("#found"))
    rows = visitor.until(visitor.rows)
    assert re.fullmatch(r"1\s+■ (circle|square|star)\s+\d+\.\d%\s+\d+, \d+, \d+, \d+", rows[0])


def test_a_sample_can_be_clicked(visitor):
    visitor.script("arguments[0].click()", visitor.all("#samples .gallery-item")[1])
    visitor.see(192, 192)


def test_a_slider_redraws_without_another_forward_pass(visitor, pictures):
    visitor.upload(pictures / "wide.jpg")
    visitor.see(300, 180)
    seconds, boxes, heat = visitor.text("#found").split("·")[1], visitor.source("boxes"), visitor.source("heatmap")
    visitor.on_threshold_change("confidence", 0.45)
    visitor.until(lambda: visitor.source("boxes") != boxes and visitor.source("heatmap") != heat)
    assert visitor.text("#found").split("·")[1] == seconds  # the time of the one forward pass
    visitor.on_threshold_change("confidence", 0.95)
    visitor.until(lambda: "Nothing found" in visitor.text("#found"))
    visitor.until(lambda: "top_candidate candidate" in visitor.text("#why"))
    assert not visitor.rows()


def test_a_class_or_a_row_can_be_explained(visitor, pictures):
    visitor.upload(pictures / "wide.jpg")
    visitor.see(300, 180)
    heat = visitor.source("heatmap")
    visitor.choose("target", "Every square")
    visitor.until(lambda: visitor.source("heatmap") != heat)
    heat = visitor.source("heatmap")
    visitor.until(lambda: visitor.all("#table .virtual-row .body-cell"))[5].click()  # the second row
    visitor.until(lambda: visitor.source("heatmap") != heat)
    assert visitor.all("#target input")[0].get_attribute("value").startswith("2: ")
    for name, choice in (("method", "EigenCAM"), ("target", "Every star"), ("layer", "All, averaged")):
        heat = visitor.source("heatmap")
        visitor.choose(name, choice)
        visitor.until(lambda before=heat: visitor.source("heatmap") != before)


def test_rubbish_gets_a_message_and_the_page_goes_on(visitor, pictures):
    visitor.upload(pictures / "rubbish.jpg")
    visitor.until(lambda: "This file can't be read as a picture" in visitor.text("#found [role=alert]"))
    assert not visitor.source("boxes") and not visitor.source("heatmap") and not visitor.rows()
    visitor.upload(pictures / "tall.jpg")
    visitor.see(160, 240)
    assert not visitor.all("#found [role=alert]")


def test_two_visitors_keep_their_own_pictures(driver, address, pictures):
    first = Visitor(driver, address)
    first.upload(pictures / "wide.jpg")
    first.see(300, 180)
    window = driver.current_window_handle
    driver.switch_to.new_window("tab")
    second = Visitor(driver, address)
    second.upload(pictures / "tall.jpg")
    second.see(160, 240)
    second_window = driver.current_window_handle
    driver.switch_to.window(window)
    boxes = first.source("boxes")
    first.on_threshold_change("confidence", 0.4)
    first.until(lambda: first.source("boxes") != boxes)
    first.see(300, 180)
    assert "300 × 180" in first.text("#found")
    driver.switch_to.window(second_window)
    driver.close()
    driver.switch_to.window(window)


def test_the_page_says_what_the_model_is(visitor):
    about = visitor.text("#about")
    for part in ("circle", "square", "star", "nothing, for a test", "mAP", "0.125", "Code"):
        assert part in about
    assert visitor.all("#about a")[0].get_attribute("href") == "https://example.org/"


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_page_fits_its_window(visitor, pictures, width):
    visitor.resize(width)
    visitor.upload(pictures / "wide.jpg")
    visitor.see(300, 180)
    assert visitor.script("return document.documentElement.scrollWidth") <= width
    code = "let r = document.getElementById(arguments[0]).getBoundingClientRect(); return [r.left, r.right, r.top]"
    places = {name: visitor.script(code, name) for name in ("photo", "boxes", "heatmap", "table", "confidence", "target")}
    visitor.unsize()
    assert all(0 <= left < right <= width and right - left > 300 for left, right, _ in places.values())
    above = places["photo"][2] < places["boxes"][2] < places["heatmap"][2]
    assert above if width < 500 else places["photo"][2] == places["boxes"][2] == places["heatmap"][2]


def test_the_browser_has_nothing_to_complain_about(visitor, pictures):
    visitor.driver.get_log("browser")
    visitor.upload(pictures / "wide.jpg")
    visitor.see(300, 180)
    assert not [entry["message"] for entry in visitor.driver.get_log("browser") if entry["level"] == "SEVERE"]
