"""Cache of resized images, shared by all loader processes through a memory-mapped file."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

FOLDER = Path("data/cache")
CONTENT = b"antialiased"  # how the images were resized; caches of other contents are not read


class ImageCache:
    """`count` slots for images of at most size x size pixels. A slot is filled when its image is first read.

    The file takes its full disk space at once (16,551 images of VOC 07+12 at 416: 8.6 GB): if the disk filled up later,
    the writing process would be killed by a bus error. The pages are shared, so each image is in memory once.
    """

    def __init__(self, path: Path, count: int, size: int):
        self.path, self.count = path, count
        self.dtype = np.dtype([("shape", "<i4", 4), ("pixels", "u1", (size * size * 3,))])
        self.slots = None  # each process opens the file itself

    def __getstate__(self) -> dict:
        return {**self.__dict__, "slots": None}

    def reserve(self) -> None:
        """Create the file at its full size. Raises OSError if it can't be written or the disk is full."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.count * self.dtype.itemsize
        with open(self.path, "ab") as file:
            if file.tell() < size:
                try:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:  # macOS: the space is only checked
                        if shutil.disk_usage(self.path.parent).free < size - file.tell():
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                        os.truncate(self.path, size)
                except OSError:
                    self.path.unlink()
                    raise

    def fetch(self, index: int, read: Callable[[], tuple[np.ndarray, tuple[int, int]]]) -> tuple:
        """Return image `index`, uint8 [h, w, 3], and its original (width, height). `read` returns both on first use."""
        if self.slots is None:
            self.reserve()
            self.slots = np.memmap(self.path, dtype=self.dtype, mode="r+", shape=(self.count,))
        slot = self.slots[index]
        height, width, *original_size = (int(v) for v in slot["shape"])
        if height:
            return slot["pixels"][: height * width * 3].reshape(height, width, 3), tuple(
                original_size
            )
        image, original_size = read()
        with open(self.path, "r+b") as file:  # half the time of writing through the memory map
            file.seek(index * self.dtype.itemsize + self.dtype.fields["pixels"][1])
            file.write(np.ascontiguousarray(image))
        slot["shape"] = (*image.shape[:2], *original_size)  # last: other processes may be reading
        return image, original_size


def open_cache(
    images: list[str | np.ndarray], name: str, size: int, max_gb: float
) -> ImageCache | None:
    """Return a cache for these images at this size, or None with a printed reason if it can't be created.

    The file name contains a digest of CONTENT and the images (path, file size and time, or pixels), so changed images get a
    new file.
    """
    if not max_gb:
        return None
    digest = hashlib.blake2b(CONTENT, digest_size=8)
    for image in images:
        if isinstance(image, np.ndarray):
            digest.update(image)
        else:
            status = os.stat(image)
            digest.update(os.fsencode(image) + f" {status.st_size} {status.st_mtime_ns}".encode())
    cache = ImageCache(FOLDER / f"{name}-{size}-{digest.hexdigest()}.u8", len(images), size)
    required_gb = cache.count * cache.dtype.itemsize / 1e9
    try:
        if required_gb > max_gb:
            raise OSError(f"Config.cache_gb allows {max_gb:g} GB")
        cache.reserve()
    except OSError as error:
        print(
            f"No cache for {len(images):,} {name} images, {required_gb:.1f} GB ({error}). Each epoch decodes them again."
        )
        return None
    return cache
