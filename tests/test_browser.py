"""The exported Space, served by a process of its own and used through headless Chromium as a visitor would."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image

from src.shapes import draw_shapes
from src.space import export_space
from tests.planted import planted_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium with chromedriver here: apt install chromium chromium-driver", allow_module_level=True)

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402

PATIENCE = 60  # seconds; busy machines are slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files to upload: two pictures of different shape, and one that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, seed, size in (("wide", 5, (300, 180)), ("tall", 6, (160, 240))):
        Image.fromarray(draw_shapes(1, 300, seed)[0].image).resize(size).save(folder / f"{name}.jpg")
    (folder / "rubbish.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The exported folder, running."""
    model = planted_model(about={"data": "nothing, for a test", "map50": 0.125})
    samples = [record.image for record in draw_shapes(3, 192, seed=3)]
    folder = export_space(model, tmp_path_factory.mktemp("served") / "space", samples, {"Code": "https://example.org"})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    environment.pop("PYTHONPATH", None)
    server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    for _ in range(4 * PATIENCE):
        try:
            urllib.request.urlopen(address, timeout=5).read()
            break
        except OSError:
            assert server.poll() is None, "the Space ended before it answered"
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait(10)


class Visitor:
    """One window of a browser on the page."""

    def __init__(self, driver, address: str):
        self.driver = driver
        driver.get(address)
        self.until(lambda: self.all("#photo input[type=file]") and self.all("#target input"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return " ".join(element.text for element in self.all(selector))

    def source(self, picture: str) -> str:
        """Address of the picture in #boxes or #heat, empty where there is none."""
        images = self.all(f"#{picture} img")
        return images[0].get_attribute("src") if images else ""

    def size(self, picture: str) -> list:
        code = f"let image = document.querySelector('#{picture} img'); return [image.naturalWidth, image.naturalHeight]"
        return self.script(code)

    def script(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def until(self, condition):
        """Wait for a condition, and return what it gave."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except StaleElementReferenceException:
                pass
            time.sleep(0.1)
        raise TimeoutError(f"not in {PATIENCE} s; the page says {self.text('#found')!r} and {self.text('#why')!r}")

    def upload(self, path) -> None:
        if clear := self.all("#photo button[aria-label='Remove Image']"):
            self.script("arguments[0].click()", clear[0])
        field = self.until(lambda: self.all("#photo input[type=file]"))[0]
        field.send_keys(str(path))

    def see(self, width: int, height: int) -> None:
        """Wait until picture and map of this shape, long side 480, are shown."""
        scale = 480 / max(width, height)
        expected = [round(width * scale), round(height * scale)]
        for picture in ("boxes", "heat"):
            self.until(lambda name=picture: self.source(name) and self.size(name) == expected)

    def slide(self, name: str, value: float) -> None:
        """Set a slider by its number field."""
        field = self.all(f"#{name} input[type=number]")[0]
        self.script(
            "let set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;"
            "set.call(arguments[0], arguments[1]); arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('change', {bubbles: true})); arguments[0].blur()",
            field, str(value),
        )  # fmt: skip

    def rows(self) -> list[str]:
        """Text of the table's rows that are in view."""
        return [row.text for row in self.all("#table .virtual-row") if row.text.strip()]

    def choose(self, name: str, choice: str) -> None:
        """Click what begins with `choice` in a dropdown."""
        self.all(f"#{name} input")[0].click()
        self.until(lambda: [option for option in self.all("[role=option]") if choice in option.text])[0].click()


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", "--window-size=1280,1400"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


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
    seconds, boxes, heat = visitor.text("#found").split("·")[1], visitor.source("boxes"), visitor.source("heat")
    visitor.slide("confidence", 0.45)
    visitor.until(lambda: visitor.source("boxes") != boxes and visitor.source("heat") != heat)
    assert visitor.text("#found").split("·")[1] == seconds  # the time of the one forward pass
    visitor.slide("confidence", 0.95)
    visitor.until(lambda: "Nothing found" in visitor.text("#found"))
    visitor.until(lambda: "strongest candidate" in visitor.text("#why"))
    assert not visitor.rows()


def test_a_class_or_a_row_can_be_explained(visitor, pictures):
    visitor.upload(pictures / "wide.jpg")
    visitor.see(300, 180)
    heat = visitor.source("heat")
    visitor.choose("target", "Every square")
    visitor.until(lambda: visitor.source("heat") != heat)
    heat = visitor.source("heat")
    visitor.until(lambda: visitor.all("#table .virtual-row .body-cell"))[5].click()  # the second row
    visitor.until(lambda: visitor.source("heat") != heat)
    assert visitor.all("#target input")[0].get_attribute("value").startswith("2: ")
    for name, choice in (("method", "EigenCAM"), ("target", "Every star"), ("layer", "All, averaged")):
        heat = visitor.source("heat")
        visitor.choose(name, choice)
        visitor.until(lambda before=heat: visitor.source("heat") != before)


def test_rubbish_gets_a_message_and_the_page_goes_on(visitor, pictures):
    visitor.upload(pictures / "rubbish.jpg")
    visitor.until(lambda: "This file can't be read as a picture" in visitor.text("#found [role=alert]"))
    assert not visitor.source("boxes") and not visitor.source("heat") and not visitor.rows()
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
    first.slide("confidence", 0.4)
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
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    visitor.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    visitor.upload(pictures / "wide.jpg")
    visitor.see(300, 180)
    assert visitor.script("return document.documentElement.scrollWidth") <= width
    code = "let r = document.getElementById(arguments[0]).getBoundingClientRect(); return [r.left, r.right, r.top]"
    places = {name: visitor.script(code, name) for name in ("photo", "boxes", "heat", "table", "confidence", "target")}
    visitor.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert all(0 <= left < right <= width and right - left > 300 for left, right, _ in places.values())
    above = places["photo"][2] < places["boxes"][2] < places["heat"][2]
    assert above if width < 500 else places["photo"][2] == places["boxes"][2] == places["heat"][2]


def test_the_browser_has_nothing_to_complain_about(visitor, pictures):
    visitor.driver.get_log("browser")
    visitor.upload(pictures / "wide.jpg")
    visitor.see(300, 180)
    assert not [entry["message"] for entry in visitor.driver.get_log("browser") if entry["level"] == "SEVERE"]
