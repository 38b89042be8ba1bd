"""Draw the README's pictures of the app: python tests/screenshots.py SPACE [number of the sample to click]

Serves an exported Space, clicks one of its samples, and stores images/app_desktop.png and images/app_phone.png.
"""

import sys
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.visitor import Visitor, browser, served  # noqa: E402

SIZES = {"desktop": (1280, 1290, 1), "phone": (390, 1240, 1.25)}  # width and height in CSS pixels, density


def main(space: str, sample: int = 2) -> None:
    (ROOT / "images").mkdir(exist_ok=True)
    with served(Path(space)) as address, browser() as driver:
        for name, size in SIZES.items():
            visitor = Visitor(driver, address)
            visitor.resize(*size)
            visitor.script("arguments[0].click()", visitor.all("#samples .gallery-item")[sample - 1])
            visitor.until(lambda page=visitor: page.source("boxes") and page.source("heatmap"))
            time.sleep(3)  # until nothing moves any more
            path = ROOT / "images" / f"app_{name}.png"
            driver.save_screenshot(str(path))
            picture = Image.open(path).convert("RGB")  # stored with 256 colours, dithered: a third of the size
            colours = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE)
            picture.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
