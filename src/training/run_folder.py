"""The folder of a run: its files, valid checkpoints, the config to resume with, and a lock."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from src.config import Config, atomic_write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
METRICS, CONFIG = "metrics.csv", "config.json"
CHECKPOINTS = {  # to look for, by ckpt_path
    "best": [BEST],
    "last": [LAST, PREVIOUS],
    "auto": [LAST, PREVIOUS],
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints with `atomic_write`, and keep the two latest.

    Lightning itself writes to the system's temporary folder and moves the file, which is not atomic
    between disks.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        """Write a checkpoint. Raises OSError if that fails, for example on a full disk."""
        path = Path(path)
        keep_as = path.with_name(PREVIOUS) if path.name == LAST else None
        try:
            atomic_write(path, lambda file: torch.save(checkpoint, file), keep_as=keep_as)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
            raise OSError(
                f"{path} can't be written: {error}. The disk may be full. The previous epoch's "
                "checkpoint is intact. Free some space, then resume with "
                'fit(config, data, ckpt_path="last").'
            ) from error


def find_corruption(path: Path) -> str:
    """Describe what is wrong with a checkpoint in one line, "" if nothing.

    torch.load ignores the checksums of the archive's members, and they don't cover its directory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            return f"the checksum of {damaged} is wrong"
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # reading a damaged archive can raise anything
        return f"{error}".partition("\n")[0][:200] or type(error).__name__
    return ""


def find_checkpoint(folder: Path, ckpt_path: str | None) -> Path | None:
    """Return the path of a valid checkpoint of a run; a message names those that are damaged.

    ckpt_path: "best"; "last": last.ckpt, or previous.ckpt if last.ckpt is damaged; "auto": the
    same, or None if there is no checkpoint; None returns None.
    Raises FileNotFoundError if there is no valid checkpoint, also of another name.
    """
    paths = [folder / name for name in CHECKPOINTS.get(ckpt_path, [])]
    found = [path for path in paths if path.exists()]
    for path in found:
        problem = find_corruption(path)
        if not problem:
            return path
        print(f"{path} is damaged: {problem}.")
    if ckpt_path in (None, "auto") and not found:
        return None
    raise FileNotFoundError(
        f"{folder} has no valid checkpoint {ckpt_path!r}. Correct the folder, load another one of "
        f"{', '.join(CHECKPOINTS)}, or train without ckpt_path."
    )


def config_for_resume(config: Config, checkpoint: Path) -> Config:
    """Return `config` with the peak learning rate of the run of `checkpoint`.

    Raises ValueError that names the first field that differs and isn't resumable, see `setting`.
    """
    path = checkpoint.with_name(CONFIG)
    saved = type(config).load(path)
    for name in config.names(resumable=False):
        if getattr(saved, name) != getattr(config, name):
            raise ValueError(
                f"Config.{name} is {getattr(config, name)}, but {path} was started with "
                f"{getattr(saved, name)}. Set it back to resume, or start a new Config.run_dir."
            )
    return config.replace(max_lr=saved.max_lr)


def write_start(config: Config, checkpoint: Path | None) -> None:
    """Prepare `config.run_dir` for training: last.ckpt is the checkpoint to resume, if any.

    Without one, deletes the former run. Writes config.json.
    """
    folder = Path(config.run_dir)
    if not checkpoint:
        for name in (BEST, LAST, PREVIOUS, METRICS):
            (folder / name).unlink(missing_ok=True)
    elif checkpoint.name != LAST:
        atomic_write(folder / LAST, lambda file: file.write(checkpoint.read_bytes()))
    config.save(folder / CONFIG)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; the lock ends with the process, even if it is killed.

    Uses lockf, not flock: loader processes inherit an flock and outlive a killed trainer for
    seconds. Raises RuntimeError if another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RuntimeError(
                f"Another process is training in {folder}. Wait for it, stop it, or choose "
                "another Config.run_dir."
            ) from None
        except OSError as error:
            print(
                f"{folder} can't be locked ({error}). Make sure that no other process trains there."
            )
        yield
