"""Resized pictures, decoded once and shared by every loader process through one memory-mapped file."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from src.voc import Record

FOLDER = Path("data/cache")


class ImageCache:
    """`count` slots for pictures of at most side x side pixels, filled as they are first asked for.

    The file is sparse: only what was written takes room on the disk, and the pages are shared, so memory is that
    of the pictures once (16,551 pictures of 07+12 at 416: 8.6 GB reserved, about 6.4 GB written).
    """

    def __init__(self, path: Path, count: int, side: int):
        self.path, self.count, self.side = path, count, side
        self.file = None  # opened by the process that uses it

    def __getstate__(self) -> dict:
        return {**self.__dict__, "file": None}

    def _open(self) -> np.memmap:
        kind = np.dtype([("shape", "<i4", 4), ("pixels", "u1", (self.side * self.side * 3,))])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.count * kind.itemsize
        with open(self.path, "ab") as file:
            if file.tell() != size:
                os.truncate(self.path, size)
        return np.memmap(self.path, dtype=kind, mode="r+", shape=(self.count,))

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


def open_cache(records: list[Record], name: str, side: int, room_gb: float) -> ImageCache | None:
    """The cache of these pictures at this side, or None with a word why: over `room_gb`, or over the free disk.

    Its file is named after the pictures (path, size and time, or content), so changed pictures get a new one.
    """
    need = len(records) * (side * side * 3 + 16)
    FOLDER.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(FOLDER).free
    if need > min(room_gb * 1e9, free):
        if room_gb:
            print(f"No cache for {len(records):,} {name} pictures: {need / 1e9:.1f} GB wanted, Config.cache_gb allows "
                  f"{room_gb:g} and the disk has {free / 1e9:.1f} free; each epoch decodes them again")  # fmt: skip
        return None
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        if isinstance(record.image, np.ndarray):
            digest.update(record.image)
        else:
            status = os.stat(record.image)
            digest.update(f"{record.image} {status.st_size} {status.st_mtime_ns}".encode())
    return ImageCache(FOLDER / f"{name}-{side}-{digest.hexdigest()}.u8", len(records), side)
