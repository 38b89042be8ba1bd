"""Cache of resized images, shared by all loader processes through a memory-mapped file."""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from src.config import atomic_write

FOLDER = Path("data/cache")
CONTENT = b"antialiased"  # how the images were resized; caches of other contents are not read
DISK_MARGIN = 3e9  # bytes that stay free: three checkpoints at full width


class ImageCache:
    """`count` slots for images of at most size x size pixels, each filled on its first use.

    The file takes its full disk space at once (16,551 images of VOC 07+12 at 416: 8.6 GB). If the
    disk filled up later, the writing process would be killed by a bus error. The pages are shared,
    so each image is in memory once.
    """

    def __init__(self, path: Path, count: int, size: int):
        self.path = path
        self.count = count
        self.dtype = np.dtype([("shape", "<i4", 4), ("pixels", "u1", (size * size * 3,))])
        self.num_bytes = count * self.dtype.itemsize
        self.file = None
        self.slots = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "file": None, "slots": None}  # each process opens the file itself

    def open(self) -> None:
        """Reserve the file's disk space and map it. Raises OSError if that is impossible."""
        self.path.touch()
        self.file = self.path.open("r+b")
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.file.fileno(), 0, self.num_bytes)
        else:  # macOS: `open_cache` has checked the free space
            self.file.truncate(self.num_bytes)
        self.slots = np.memmap(self.file, self.dtype, "r+", shape=(self.count,))

    def fetch(self, index: int, read: Callable, *arguments) -> tuple[np.ndarray, tuple[int, int]]:
        """Return image `index`, uint8 [h, w, 3], and its original (width, height).

        On first use, both come from `read(*arguments)`.
        """
        if self.slots is None:
            self.open()
        slot = self.slots[index]
        height, width, *original_size = slot["shape"].tolist()
        if height:
            image = slot["pixels"][: height * width * 3].reshape(height, width, 3)
            return image, tuple(original_size)
        image, original_size = read(*arguments)
        start = index * self.dtype.itemsize + self.dtype.fields["pixels"][1]
        # half the time of writing through the memory map
        os.pwrite(self.file.fileno(), np.ascontiguousarray(image), start)
        slot["shape"] = (*image.shape[:2], *original_size)  # last: other processes may be reading
        return image, original_size


def open_cache(images: list, name: str, size: int, max_gb: float) -> ImageCache | None:
    """Return a cache for image files at this size, or None if it isn't needed or impossible.

    It isn't needed for arrays, which are in memory already. If it is impossible, a line says why.
    The file name contains a digest of the images, so changed images get a new file.
    """
    files = [image for image in images if not isinstance(image, np.ndarray)]
    if not files or not max_gb:
        return None
    cache = ImageCache(FOLDER / f"{name}-{size}-{digest_files(files)}.u8", len(files), size)
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        delete_stale_caches()
        free = shutil.disk_usage(FOLDER).free
        if cache.num_bytes > max_gb * 1e9:
            raise OSError(f"Config.cache_gb allows {max_gb:g} GB")
        if not cache.path.exists() and free < cache.num_bytes + DISK_MARGIN:
            raise OSError(f"the disk has {free / 1e9:.1f} GB free, and checkpoints need some")
        cache.open()
        listing = os.fsencode("\n".join(files))
        atomic_write(cache.path.with_suffix(".txt"), lambda file: file.write(listing))
    except OSError as error:
        with suppress(OSError):
            cache.path.unlink()
        needed = f"{cache.num_bytes / 1e9:.1f} GB for {len(files):,} {name} images"
        print(f"No cache, {needed} ({error}). Each epoch decodes them again.")
        return None
    return cache


def delete_stale_caches() -> None:
    """Delete the caches of images that have changed or don't exist any more."""
    for listing in FOLDER.glob("*.txt"):
        files = os.fsdecode(listing.read_bytes()).split("\n")
        exist = all(map(os.path.exists, files))
        if not (exist and digest_files(files) in listing.name):
            listing.with_suffix(".u8").unlink(missing_ok=True)
            listing.unlink()


def digest_files(files: list[str]) -> str:
    """Return a digest of the paths, sizes and times of files."""
    digest = hashlib.blake2b(CONTENT, digest_size=8)
    for file in files:
        status = os.stat(file)
        digest.update(os.fsencode(file) + f" {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
