"""Cache of resized images in a file that all loader processes share."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

FOLDER = Path("runs/cache")
DISK_MARGIN = 7e9  # bytes that stay free: four checkpoints at full width, validation images
HEADER = 6  # float32: height, width, placement; all 0 before the first use


class ImageCache:
    """`count` slots for images of at most size x size pixels, each filled on its first use.

    The system keeps what was read in memory, once for all processes.
    """

    def __init__(self, path: Path, count: int, size: int):
        self.path = path
        self.slot_bytes = 4 * HEADER + 3 * size * size
        self.num_bytes = count * self.slot_bytes

    def fetch(self, index: int, read: Callable, image) -> tuple[np.ndarray, np.ndarray]:
        """Return image `index`, uint8 [h, w, 3], and its placement, float32 [4].

        On first use, both come from `read(image)`.
        """
        self.path.touch()
        with self.path.open("r+b") as file:
            file.seek(index * self.slot_bytes)
            header = np.fromfile(file, np.float32, HEADER)
            if header.any():
                height, width = header[:2].astype(int)
                pixels = np.fromfile(file, np.uint8, 3 * height * width)
                return pixels.reshape(height, width, 3), header[2:]
            pixels, placement = read(image)
            file.seek(index * self.slot_bytes + 4 * HEADER)
            file.write(np.ascontiguousarray(pixels))
            file.seek(index * self.slot_bytes)  # last: other processes may be reading
            file.write(np.float32([*pixels.shape[:2], *placement]))
        return pixels, placement


def open_cache(images: list, name: str, size: int, max_gb: float) -> ImageCache | None:
    """Return a cache for image files at this size, or None if it isn't needed or too large.

    It isn't needed for arrays, which are in memory already. If it is too large, a line says so
    (16,551 images of VOC 07+12 at 416: 8.6 GB). One cache per name is kept: another size, and other
    or changed images, replace it.
    """
    if not max_gb or isinstance(images[0], np.ndarray):
        return None
    versions = repr([(image, Path(image).stat().st_mtime) for image in images])
    digest = hashlib.blake2b(versions.encode(), digest_size=8).hexdigest()
    cache = ImageCache(FOLDER / f"{name}-{size}-{digest}.u8", len(images), size)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in {*FOLDER.glob(f"{name}-*")} - {cache.path}:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(FOLDER).free - DISK_MARGIN
    allowed = min(max_gb * 1e9, cache.num_bytes if cache.path.exists() else free)
    if cache.num_bytes > allowed:
        print(
            f"No cache: {len(images):,} {name} images take {cache.num_bytes / 1e9:.1f} GB, but "
            f"Config.cache_gb and the disk allow {max(0, allowed) / 1e9:.1f} GB. Each epoch "
            "decodes them again."
        )
        return None
    return cache
