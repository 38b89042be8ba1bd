"""Resized pictures, decoded once and shared by every loader process through one memory-mapped file."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from src.data.records import ImageRecord

FOLDER = Path("data/cache")


class ImageCache:
    """`count` slots for pictures of at most side x side pixels, filled as they are first asked for.

    The file takes its room on the disk at once (16,551 pictures of 07+12 at 416: 8.6 GB): where a disk fills up under
    a mapped file, the process that writes dies by a bus error. Pages are shared: memory is that of the pictures once.
    """

    def __init__(self, path: Path, count: int, side: int):
        self.path, self.count, self.side = path, count, side
        self.file = None  # opened by the process that uses it

    def __getstate__(self) -> dict:
        return {**self.__dict__, "file": None}

    def _kind(self) -> np.dtype:
        return np.dtype([("shape", "<i4", 4), ("pixels", "u1", (self.side * self.side * 3,))])

    def reserve(self) -> None:
        """Make the file. Raises OSError where it can't be written or has no room."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.count * self._kind().itemsize
        with open(self.path, "ab") as file:
            if file.tell() < size:
                try:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:
                        os.truncate(self.path, size)
                except OSError:
                    self.path.unlink()
                    raise

    def _open(self) -> np.memmap:
        self.reserve()
        return np.memmap(self.path, dtype=self._kind(), mode="r+", shape=(self.count,))

    def fetch(self, index: int, read: Callable[[], tuple[np.ndarray, tuple[int, int]]]) -> tuple:
        """Picture `index`, uint8 [h, w, 3], and the (width, height) it had; `read` gives both the first time."""
        if self.file is None:
            self.file = self._open()
        slot = self.file[index]
        height, width, *original = (int(v) for v in slot["shape"])
        if height:
            return slot["pixels"][: height * width * 3].reshape(height, width, 3), tuple(original)
        image, original = read()
        slot["pixels"][: image.size] = image.ravel()
        slot["shape"] = (*image.shape[:2], *original)  # last: another process may be reading
        return image, original


def open_cache(records: list[ImageRecord], name: str, side: int, room_gb: float) -> ImageCache | None:
    """The cache of these pictures at this side, or None with a word why: over `room_gb`, or no place to write it.

    Its file is named after the pictures (path, size and time, or content), so changed pictures get a new one.
    """
    need = len(records) * (side * side * 3 + 16) / 1e9
    if not room_gb:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        if isinstance(record.image, np.ndarray):
            digest.update(record.image)
        else:
            status = os.stat(record.image)
            digest.update(os.fsencode(record.image) + f" {status.st_size} {status.st_mtime_ns}".encode())
    cache = ImageCache(FOLDER / f"{name}-{side}-{digest.hexdigest()}.u8", len(records), side)
    try:
        if need > room_gb:
            raise OSError(f"Config.cache_gb allows {room_gb:g} GB")
        cache.reserve()
    except OSError as error:
        print(f"No cache for {len(records):,} {name} pictures, {need:.1f} GB ({error}): each epoch decodes them again")
        return None
    return cache
