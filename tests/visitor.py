"""A browser for the tests of the app and for tools/screenshots.py."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
TIMEOUT_S = 60  # long enough for a busy machine


@contextlib.contextmanager
def serving(
    folder: Path, python: str | Path = sys.executable, **variables: str
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run an exported Space in a process of its own. Yields its address and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    environment |= {"PYTHONPATH": "", **variables}
    command = [python, "app.py"]
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 4 * TIMEOUT_S
        while not answers(address):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"The Space stopped or did not answer in {4 * TIMEOUT_S} s.")
            time.sleep(0.1)
        yield address, server
    finally:
        server.terminate()
        server.wait(10)


def answers(address: str) -> bool:
    """Return whether a server answers there."""
    with contextlib.suppress(OSError):
        return bool(urllib.request.urlopen(address, timeout=5).read())
    return False


@contextlib.contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium that logs its console and makes no other connections."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run hide-scrollbars"
    for flag in [*flags.split(), "disable-background-networking", "window-size=1280,1400"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Visitor:
    """One browser window with the app."""

    def __init__(self, driver, address: str):
        self.driver = driver
        driver.get(address)
        self.until(lambda: self.all("#image input[type=file]") and self.all("#target input"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return " ".join(element.text for element in self.all(selector))

    def source(self, elem_id: str) -> str:
        """Address of the image in #detections or #heatmap, empty if there is none."""
        images = self.all(f"#{elem_id} img")
        return images[0].get_attribute("src") if images else ""

    def size(self, elem_id: str) -> list:
        code = f"let image = document.querySelector('#{elem_id} img');"
        return self.script(code + "return [image.naturalWidth, image.naturalHeight]")

    def script(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def until(self, condition):
        """Wait until a condition is true, and return its value."""
        wait = WebDriverWait(self.driver, TIMEOUT_S, 0.1, [StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def upload(self, path) -> None:
        if clear := self.all("#image button[aria-label='Remove Image']"):
            self.script("arguments[0].click()", clear[0])
        field = self.until(lambda: self.all("#image input[type=file]"))[0]
        field.send_keys(str(path))

    def wait_for_images(self, width: int, height: int) -> None:
        """Wait until detections and heatmap of an image of this size are shown, long side 480."""
        scale = 480 / max(width, height)
        expected = [round(width * scale), round(height * scale)]
        for elem_id in ("detections", "heatmap"):
            self.until(lambda name=elem_id: self.source(name) and self.size(name) == expected)

    def set_slider(self, name: str, value: float) -> None:
        """Set a slider by its number field."""
        field = self.all(f"#{name} input[type=number]")[0]
        self.script(
            "let set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;"
            "set.call(arguments[0], arguments[1]);"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('change', {bubbles: true})); arguments[0].blur()",
            field,
            str(value),
        )

    def rows(self) -> list[str]:
        """Text of the table's visible rows."""
        return [row.text for row in self.all("#table .virtual-row") if row.text.strip()]

    def choose(self, name: str, choice: str) -> None:
        """Click the option that contains `choice` in a dropdown."""
        self.all(f"#{name} input")[0].click()
        options = "[role=option]"
        self.until(lambda: [each for each in self.all(options) if choice in each.text])[0].click()

    def resize(self, width: int, height: int = 900, density: float = 1) -> None:
        """Set the viewport in CSS pixels; below 500 it is a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": density}
        size["mobile"] = width < 500
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def reset_size(self) -> None:
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
