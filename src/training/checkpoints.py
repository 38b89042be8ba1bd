"""The folder of a run: files written whole or not at all, what to go on from and by which settings, one process at a time."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

from src.config import Config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
RESUMABLE_FIELDS = (  # when a run goes on
    "voc_root", "skip_bad_files", "cache_gb", "num_workers", "precision", "compile", "run_dir", "max_lr", "pretrained_weights",
)  # fmt: skip
MARK, BLOCK = b"blake2b:", 1 << 20


def atomic_write(path: Path, write: Callable, mode: str = "wb", keep_as: Path | None = None, **options) -> None:
    """Call `write(file)` on a file beside `path`, and give it that name once it lies on the disk.

    keep_as: what bore the name until then gets this one.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, mode, **options) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if keep_as and path.exists():
        os.replace(path, keep_as)
    os.replace(part, path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints through `atomic_write`; of a run the last but one is kept too.

    Lightning by itself writes to the system's temporary folder and moves from there, which between disks is a copy.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        """Raises OSError that says what is left where the file can't be written, as on a full disk."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_as = path.with_name(PREVIOUS) if path.name == LAST else None
        try:
            atomic_write(path, lambda file: self._write(checkpoint, file), "w+b", keep_as)
        except (OSError, RuntimeError) as error:  # of a full disk torch tells as a RuntimeError
            raise OSError(
                f"{path} can't be written ({error}). Is the disk full? The checkpoint of the epoch before stands: "
                'make room and go on with fit(config, data, ckpt_path="last")'
            ) from error

    def _write(self, checkpoint: dict, file: BinaryIO) -> None:
        torch.save(checkpoint, file)
        file.write(digest(file, file.seek(0, 2)))  # behind an archive's end nobody minds what stands


def digest(file: BinaryIO, length: int) -> bytes:
    """BLAKE2 of the first `length` bytes, after a mark to know it by."""
    file.seek(0)
    found = hashlib.blake2b(digest_size=32)
    for start in range(0, length, BLOCK):
        found.update(file.read(min(BLOCK, length - start)))
    return MARK + found.digest()


def find_corruption(path: Path) -> str:
    """What is wrong with a checkpoint, in one line; "" if nothing.

    The checksums within it won't do: torch.load does not look at them, and they leave out the archive's directory.
    """
    try:
        with open(path, "rb") as file:
            length = max(0, file.seek(0, 2) - len(MARK) - 32)
            file.seek(length)
            end = file.read()
            if end.startswith(MARK) and end != digest(file, length):
                return "its digest is not that of its content"
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged archive leads its reader anywhere
        return f"{error}".partition("\n")[0][:200] or type(error).__name__
    return ""


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """last.ckpt of a run's folder or, where it is damaged, the one before it, with a message; None if there is none.

    Raises ValueError where both are damaged.
    """
    there = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    for path in there:
        wrong = find_corruption(path)
        if not wrong:
            return path
        print(f"{path} is damaged ({wrong}): looking for the checkpoint before it")
    if there:
        raise ValueError(
            f'every last checkpoint in {folder} is damaged; start anew, or fit(config, ckpt_path="{folder}/best.ckpt")'
        )
    return None


def find_checkpoint(folder: Path, asked: str | None) -> Path | None:
    """The checkpoint of a run's folder to go on from: "last" or "auto", if there is one, or a path; None for None.

    Raises FileNotFoundError where "last" or a path is missing, and ValueError where it is damaged.
    """
    if not asked:
        return None
    path = latest_valid_checkpoint(folder) if asked in ("last", "auto") else Path(asked)
    if not path and asked == "auto":
        return None
    if not path or not path.exists():
        missing = path or folder / LAST
        raise FileNotFoundError(f"{missing} is missing: there is no run to go on with; call fit without ckpt_path")
    if asked not in ("last", "auto") and (wrong := find_corruption(path)):
        raise ValueError(f"{path} is damaged: {wrong}")
    return path


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep `folder` to this process until it ends, however it ends.

    Not by flock: loader processes would inherit it, and outlive a killed trainer for seconds. Processes that another
    one started to share the work pass. Raises RuntimeError where another process has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            if fcntl and not rank_zero_only.rank:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RuntimeError(
                f"another process is training in {folder}: wait for it, stop it, or choose another Config.run_dir"
            ) from None
        except OSError as error:
            print(f"{folder} can't be locked ({error}): make sure that no other process trains there")
        yield


def config_for_resume(config: Config, path: Path) -> Config:
    """`config` with the learning rate that the run at `path` found; all but where and how fast it runs must be the same.

    Raises ValueError that names the setting that differs.
    """
    saved = Config.load(path)
    for name in (field.name for field in fields(Config) if field.name not in RESUMABLE_FIELDS):
        if getattr(saved, name) != getattr(config, name):
            raise ValueError(
                f"Config.{name} is {getattr(config, name)}, but {path} was started with {getattr(saved, name)}: set it back "
                "to go on, or start anew in another Config.run_dir"
            )
    return config.replace(max_lr=saved.max_lr)
