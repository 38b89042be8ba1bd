"""The folder of a run: atomic files, valid checkpoints, the config to resume with, and a lock."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from src.config import Config, atomic_write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
RESUME_CANDIDATES = (LAST, PREVIOUS, "last-1.ckpt")  # best first; older runs wrote "last-1.ckpt"
DIGEST_MARK, DIGEST_SIZE = b"blake2b:", 32


class BestCheckpoint(ModelCheckpoint):
    """Save the best epoch. Lightning's forgets the best score when a run is resumed in a copied or renamed folder."""

    @property
    def state_key(self) -> str:
        return super().state_key.replace(
            "BestCheckpoint", "ModelCheckpoint"
        )  # as in checkpoints of older runs

    def load_state_dict(self, state_dict: dict) -> None:
        """Keep the score if the folder has its best.ckpt."""
        copied = Path(self.dirpath, BEST).exists()
        super().load_state_dict({**state_dict, "dirpath": self.dirpath} if copied else state_dict)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints with `atomic_write` and a digest, and keep the two latest.

    Lightning itself writes to the system's temporary folder and moves the file, which is not atomic between disks.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        """Raises OSError if the file can't be written, for example on a full disk."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_as = path.with_name(PREVIOUS) if path.name == LAST else None
        try:
            atomic_write(path, lambda file: self._write(checkpoint, file), "w+b", keep_as)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
            raise OSError(
                f"{path} can't be written: {error}. The disk may be full. The previous epoch's checkpoint is intact. "
                'Free some space, then resume with fit(config, data, ckpt_path="last").'
            ) from error

    def _write(self, checkpoint: dict, file: BinaryIO) -> None:
        torch.save(checkpoint, file)
        file.write(
            compute_digest(file, file.seek(0, 2))
        )  # zip readers ignore what follows the archive


def compute_digest(file: BinaryIO, length: int) -> bytes:
    """Return BLAKE2b of the first `length` bytes, after a mark that identifies it."""
    file.seek(0)
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for start in range(0, length, 1 << 20):
        digest.update(file.read(min(1 << 20, length - start)))
    return DIGEST_MARK + digest.digest()


def find_corruption(path: Path) -> str:
    """Describe what is wrong with a checkpoint in one line, "" if nothing.

    The zip checksums are not enough: torch.load ignores them, and they don't cover the archive's directory.
    """
    try:
        with open(path, "rb") as file:
            length = max(0, file.seek(0, 2) - len(DIGEST_MARK) - DIGEST_SIZE)
            file.seek(length)
            end = file.read()
            if end.startswith(DIGEST_MARK) and end != compute_digest(file, length):
                return "its digest does not match its content"
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # reading a damaged archive can raise anything
        return f"{error}".partition("\n")[0][:200] or type(error).__name__
    return ""


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """Return last.ckpt, or the checkpoint before it (with a message) if last.ckpt is damaged; None if there are none.

    Raises ValueError if all are damaged.
    """
    candidates = [folder / name for name in RESUME_CANDIDATES if (folder / name).exists()]
    for path in candidates:
        problem = find_corruption(path)
        if not problem:
            return path
        print(f"{path} is damaged: {problem}. Trying the checkpoint before it.")
    if candidates:
        raise ValueError(
            f"Every checkpoint to resume from in {folder} is damaged. Start again without ckpt_path, "
            f'or resume from the best one: fit(config, ckpt_path="{folder}/best.ckpt").'
        )
    return None


def find_checkpoint(folder: Path, ckpt_path: str | None) -> Path | None:
    """Return the checkpoint to resume from; `ckpt_path` is "last", "auto" (None if there are none), a path, or None.

    Raises FileNotFoundError if "last" or the path is missing, ValueError if it is damaged.
    """
    if not ckpt_path:
        return None
    if ckpt_path in ("last", "auto"):
        path = latest_valid_checkpoint(folder)
        if not path and ckpt_path == "last":
            raise FileNotFoundError(
                f"{folder / LAST} is missing, so there is no run to resume. Call fit without ckpt_path."
            )
        return path
    path = Path(ckpt_path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. Give the path of a checkpoint, or call fit without ckpt_path."
        )
    if problem := find_corruption(path):
        raise ValueError(
            f'{path} is damaged: {problem}. Use another checkpoint, or ckpt_path="last".'
        )
    return path


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; the lock ends with the process, even if it is killed.

    Uses lockf, not flock: loader processes inherit an flock and outlive a killed trainer for seconds. Only the first of
    several training processes locks. Raises RuntimeError if another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            if fcntl and not rank_zero_only.rank:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RuntimeError(
                f"Another process is training in {folder}. Wait for it, stop it, or choose another Config.run_dir."
            ) from None
        except OSError as error:
            print(
                f"{folder} can't be locked ({error}). Make sure that no other process trains there."
            )
        yield


def config_for_resume(config: Config, path: Path) -> Config:
    """Return `config` with the learning rate of the run whose settings are at `path`.

    Raises ValueError that names the first field that differs and isn't resumable, see `setting`.
    """
    saved = type(config).load(path)
    for name in config.names(resumable=False):
        if getattr(saved, name) != getattr(config, name):
            raise ValueError(
                f"Config.{name} is {getattr(config, name)}, but {path} was started with {getattr(saved, name)}. "
                "Set it back to resume, or start a new Config.run_dir."
            )
    return config.replace(max_lr=saved.max_lr)
