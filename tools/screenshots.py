"""Take the README's screenshots of the app: python -m tools.screenshots SPACE [--sample 11]

Serves an exported Space, clicks a sample, and writes images/app_desktop.png and app_phone.png.
"""

import argparse
import time
from pathlib import Path

from tests.visitor import CHROMIUM, DRIVER, Visitor, browser, serving

ROOT = Path(__file__).parents[1]
SIZES = {
    "desktop": (1280, 1290, 1),
    "phone": (390, 1240, 1.25),
}  # width and least height in CSS pixels, density; down to the heatmap


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
            path = ROOT / "images" / f"app_{name}.png"
            driver.save_screenshot(str(path))
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
