"""Take the README's screenshots of the app: python -m tools.screenshots SPACE [--sample 11]

Serves an exported Space, clicks a sample, and writes images/app_desktop.png and app_phone.png;
then the static Space of the same weights (needs npm), and writes images/static_desktop.png.
"""

import argparse
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from src.serving.predictor import Predictor
from src.serving.static_space import export_static_space
from tests.visitor import CHROMIUM, DRIVER, Visitor, browser, serving

ROOT = Path(__file__).parents[1]
SIZES = {
    "desktop": (1280, 1290, 1),
    "phone": (390, 1240, 1.25),
}  # width and least height in CSS pixels, density; down to the heatmap

DESKTOP = {"width": 1280, "height": 1000, "deviceScaleFactor": 1, "mobile": False}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.screenshots", description=__doc__.partition(":")[0]
    )
    parser.add_argument("space", type=Path, help="folder of an exported Space")
    parser.add_argument(
        "--sample", type=int, default=11, help="number of the sample image that is shown"
    )
    arguments = parser.parse_args()
    space, sample = arguments.space, arguments.sample
    if not (space / "app.py").exists():
        parser.error(
            f"{space} is not an exported Space: it has no app.py. "
            "`app_with_gradCAM.ipynb` writes one to space/."
        )
    if not 1 <= sample <= (count := len(list((space / "samples").glob("*.jpg")))):
        parser.error(f"--sample {sample}: {space}/samples has {count} images.")
    if not (CHROMIUM and DRIVER):
        parser.error(
            "Chromium and its driver are missing (Debian: apt install chromium chromium-driver)."
        )
    (ROOT / "images").mkdir(exist_ok=True)
    with serving(space) as (address, _), browser() as driver:
        for name, (width, height, density) in SIZES.items():
            visitor = Visitor(driver, address)
            visitor.resize(width, height, density)
            visitor.script(
                "arguments[0].click()", visitor.all("#samples .gallery-item")[sample - 1]
            )
            visitor.until(lambda page=visitor: page.source("detections") and page.source("heatmap"))
            time.sleep(3)  # for the page's animations
            heatmap = visitor.all("#heatmap")[0]
            bottom = visitor.script("return arguments[0].getBoundingClientRect().bottom", heatmap)
            visitor.resize(width, max(height, round(bottom) + 16), density)
            save(driver, f"app_{name}.png")
        shoot_static_space(driver, space, sample)


def shoot_static_space(driver, space: Path, sample: int) -> None:
    """Export the weights and samples of a Gradio Space as a static one, and take its picture."""
    with TemporaryDirectory() as folder:
        model, samples = Predictor.load(space / "weights").model, (space / "samples").glob("*.jpg")
        static = export_static_space(model, Path(folder, "static"), sorted(samples), vendor=True)
        handler = partial(SimpleHTTPRequestHandler, directory=static)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            driver.get(f"http://127.0.0.1:{server.server_port}/")
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", DESKTOP)
            wait = WebDriverWait(driver, 60)
            wait.until(lambda page: page.execute_script("return $('loading').hidden"))
            driver.find_elements(By.CSS_SELECTOR, "#samples button")[sample - 1].click()
            wait.until(lambda page: page.execute_script("return Boolean(current?.heatmap)"))
            save(driver, "static_desktop.png")
            server.shutdown()


def save(driver, name: str) -> None:
    """Write what the browser shows to images/."""
    path = ROOT / "images" / name
    driver.save_screenshot(str(path))
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
