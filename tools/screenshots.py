"""Take the README's screenshots of the app: python -m tools.screenshots SPACE [number of the sample image]

Serves an exported Space, clicks a sample image, and writes images/app_desktop.png and images/app_phone.png.
"""

import sys
import time
from pathlib import Path

from PIL import Image

from tests.visitor import Visitor, browser, served

ROOT = Path(__file__).parents[1]
SIZES = {"desktop": (1280, 1290, 1), "phone": (390, 1240, 1.25)}  # width and height in CSS pixels, density


def main(space: str, sample: int = 2) -> None:
    (ROOT / "images").mkdir(exist_ok=True)
    with served(Path(space)) as address, browser() as driver:
        for name, size in SIZES.items():
            visitor = Visitor(driver, address)
            visitor.resize(*size)
            visitor.script("arguments[0].click()", visitor.all("#samples .gallery-item")[sample - 1])
            visitor.until(lambda page=visitor: page.source("detections") and page.source("heatmap"))
            time.sleep(3)  # for the page's animations
            path = ROOT / "images" / f"app_{name}.png"
            driver.save_screenshot(str(path))
            image = Image.open(path).convert("RGB")  # 256 colours take a third of the space
            palette = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
            image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
