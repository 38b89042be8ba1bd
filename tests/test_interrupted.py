"""Interrupted training: killed processes, damaged files, full disks, locked folders, and resuming after them."""

import contextlib
import io
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from src.config import SHAPE_CLASSES, Config, atomic_write
from src.data.datamodule import DetectionDataModule
from src.training.callbacks import Progress, ResumableCSVLogger
from src.training.checkpoints import (
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    BestCheckpoint,
    find_corruption,
    latest_valid_checkpoint,
    run_lock,
)
from src.training.fit import fit, load_detector, prepare_run
from src.training.module import YOLOv3Module
from tests.forking import begin
from tests.test_training import metrics_rows


def tiny(folder: Path, **changes) -> Config:
    """A run of 2 steps per epoch."""
    return Config(
        dataset="shapes",
        classes=SHAPE_CLASSES,
        shapes_train=8,
        shapes_val=2,
        image_size=64,
        width=0.0625,
        epochs=3,
        batch_size=4,
        max_lr=1e-3,
        close_mosaic_epochs=1,
        num_workers=0,
        cache_gb=0,
        precision="32-true",
        run_dir=str(folder),
    ).replace(**changes)


def equal(one: dict, other: dict) -> bool:
    """Return whether two state dicts are identical."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the detector of a complete run. The folder's name has spaces and non-ASCII letters."""
    folder = tmp_path_factory.mktemp("runs") / "Lauf é 猫"
    return folder, fit(tiny(folder))


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run[0], tmp_path / "copy")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def flip_bit(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


def test_previous_checkpoint_is_kept(run):
    epochs = [torch.load(run[0] / name, weights_only=True)["epoch"] for name in (LAST, PREVIOUS)]
    assert epochs == [2, 1] and not list(run[0].glob("*.part"))


@pytest.mark.parametrize(
    "damage", [truncate, flip_bit, lambda file: os.truncate(file, 0), Path.unlink]
)
def test_damaged_checkpoint_is_detected_and_the_previous_one_used(run, copy, damage, capsys):
    """A missing last.ckpt is what a kill between the two renames leaves."""
    damage(copy / LAST)
    assert latest_valid_checkpoint(copy) == copy / PREVIOUS
    assert "last.ckpt is damaged" in capsys.readouterr().out or damage == Path.unlink
    if damage == flip_bit:
        resumed = fit(tiny(copy), ckpt_path="last")
        assert equal(resumed.state_dict(), run[1].state_dict()) and not find_corruption(copy / LAST)


def test_all_checkpoints_damaged_raises(copy):
    for name in (LAST, PREVIOUS, "best.ckpt"):
        flip_bit(copy / name)
    for call in (lambda: fit(tiny(copy), ckpt_path="auto"), lambda: load_detector(copy, "last")):
        with pytest.raises(ValueError, match="Every checkpoint to resume from in .* is damaged"):
            call()
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged: its digest"):
        load_detector(copy)
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged"):
        fit(tiny(copy), ckpt_path=str(copy / "best.ckpt"))


def test_any_damage_to_a_checkpoint_is_detected(tmp_path):
    """Each of 600 flipped bits and 100 truncations is detected, or changes nothing that is read."""
    file, rng = tmp_path / "some.ckpt", random.Random(0)
    values = {"epoch": 3, "state_dict": {name: torch.randn(40) for name in "abc"}}
    AtomicCheckpointIO().save_checkpoint(values, file)
    content, undetected = file.read_bytes(), 0
    for number in range(700):
        damaged = bytearray(content)
        if number < 600:
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(content)) :]
        file.write_bytes(damaged)
        if not find_corruption(file):
            undetected += 1
            read = torch.load(file, weights_only=True)
            assert read["epoch"] == 3 and equal(read["state_dict"], values["state_dict"]), number
    assert undetected < 20  # damage to the digest's own mark


def test_checkpoint_without_digest_is_read(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "some.ckpt")
    assert not find_corruption(tmp_path / "some.ckpt")


def test_full_disk_raises_and_keeps_the_last_valid_checkpoint(run, copy):
    (copy / PREVIOUS).replace(copy / LAST)
    (copy / f"{LAST}.part").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"last\.ckpt can't be written: .*The disk may be full\..*ckpt_path=\"last\""
    ):
        fit(tiny(copy), ckpt_path="last")
    assert (
        not list(copy.glob("*.part"))
        and torch.load(latest_valid_checkpoint(copy), weights_only=True)["epoch"] == 1
    )
    assert equal(fit(tiny(copy), ckpt_path="last").state_dict(), run[1].state_dict())


def test_atomic_write_replaces_a_file_completely_or_not_at_all(tmp_path):
    file = tmp_path / "some.txt"
    atomic_write(file, lambda out: out.write(b"one"))
    with pytest.raises(ZeroDivisionError):
        atomic_write(file, lambda out: (out.write(b"two"), 1 / 0))
    assert file.read_bytes() == b"one" and list(tmp_path.iterdir()) == [file]


def test_resuming_a_finished_run_changes_nothing(run, copy):
    before = (copy / LAST).read_bytes()
    for ckpt_path in ("last", "auto"):
        assert equal(fit(tiny(copy), ckpt_path=ckpt_path).state_dict(), run[1].state_dict())
    assert (copy / LAST).read_bytes() == before and metrics_rows(copy) == metrics_rows(run[0])


def prepare(folder: Path, ckpt_path: str | None) -> Path | None:
    return prepare_run(YOLOv3Module, tiny(folder), DetectionDataModule(tiny(folder)), ckpt_path)[1]


def test_new_run_deletes_the_former_checkpoints(copy):
    assert prepare(copy, "auto") == copy / LAST
    (copy / "last-1.ckpt").touch()
    assert (
        prepare(copy, None) is None
        and latest_valid_checkpoint(copy) is None
        and not (copy / "best.ckpt").exists()
    )
    assert prepare(copy, "auto") is None
    with pytest.raises(FileNotFoundError, match="there is no run to resume"):
        prepare(copy, "last")


@pytest.mark.parametrize(
    "changes", [{"pretrained_weights": "mistyped"}, {"dataset": "yolo", "data_root": "mistyped"}]
)
def test_a_start_that_fails_deletes_nothing(copy, changes):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises((FileNotFoundError, ValueError), match="mistyped"):
        fit(tiny(copy, **changes))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_copied_run_keeps_its_best_checkpoint(run, copy):
    """Lightning alone would forget the best score, and the next epoch would replace best.ckpt."""
    score = {
        "monitor": "val/mAP50",
        "best_model_score": torch.tensor(0.5),
        "best_k_models": {},
        "kth_value": torch.tensor(0.5),
    }
    paths = {
        "best_model_path": str(run[0] / "best.ckpt"),
        "kth_best_model_path": "",
        "last_model_path": "",
    }
    for present in (True, False):
        callback = BestCheckpoint(copy, "best", monitor="val/mAP50", mode="max")
        callback.load_state_dict(score | paths | {"dirpath": str(run[0])})
        assert (callback.best_model_score is not None) == present
        (copy / "best.ckpt").unlink(missing_ok=True)


def test_a_checkpoint_of_another_folder_is_resumed_with_the_settings_beside_it(run, tmp_path):
    """As on Kaggle, where the output of an earlier session is read-only."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / PREVIOUS).touch()
    checkpoint = prepare(tmp_path / "new", str(run[0] / LAST))
    assert checkpoint == run[0] / LAST
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "config.json",
        "best.ckpt",
        "metrics.csv",
    }
    assert all(
        (tmp_path / "new" / name).read_bytes() == (run[0] / name).read_bytes()
        for name in ("best.ckpt", "metrics.csv")
    )
    with pytest.raises(ValueError, match="Config.image_size is 96"):
        prepare_run(YOLOv3Module, tiny(tmp_path / "new", image_size=96), None, str(run[0] / LAST))


def test_checkpoint_names_and_keys_of_older_runs(run, copy):
    """Older runs wrote last-1.ckpt, and metadata under the key "about"."""
    checkpoint = torch.load(copy / PREVIOUS, weights_only=True)
    metadata = checkpoint["about"] = checkpoint.pop("metadata")
    (copy / PREVIOUS).unlink()
    torch.save(checkpoint, copy / "last-1.ckpt")
    flip_bit(copy / LAST)
    assert load_detector(copy, "last").model.metadata == metadata != {}
    assert equal(fit(tiny(copy), ckpt_path="last").state_dict(), run[1].state_dict())


def test_metrics_before_the_checkpoint_are_kept(tmp_path):
    logger = ResumableCSVLogger(tmp_path / "metrics.csv")
    for step in range(4):
        logger.log_metrics(
            {"a/b": torch.tensor(step + 0.5), "epoch": step} | ({"late": 1.0} if step == 3 else {}),
            step,
        )
        logger.save()
    resumed = ResumableCSVLogger(tmp_path / "metrics.csv", before=2)
    assert len(metrics_rows(tmp_path)) == 4  # the file changes only when something is logged
    resumed.log_metrics({"c": 7.0}, 2)
    resumed.save()
    rows = metrics_rows(tmp_path)
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert [row["a/b"] for row in rows] == ["0.5", "1.5", ""] and rows[0]["epoch"] == "0"


def test_run_folder_is_locked(tmp_path):
    """The lock of a killed run ends at once, even if its loader processes are still alive."""
    code = (
        "import fcntl, os, sys, time\n"
        f"file = open({str(tmp_path / 'lock')!r}, 'a')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "if not os.fork(): time.sleep(30)\n"
        "print('locked', flush=True); time.sleep(30)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match=r"Another process is training in .*Config\.run_dir"):
            fit(tiny(tmp_path))
        other.kill()
        other.wait()
        with run_lock(tmp_path):
            pass
    finally:
        os.killpg(other.pid, signal.SIGKILL)


def train(folder: Path, pipe) -> None:
    """Train, and send the time at the start of each epoch."""

    def send_time(self, *args):
        pipe.send(time.monotonic())

    Progress.on_train_epoch_start = send_time
    logging.disable()
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        fit(tiny(folder, epochs=12), ckpt_path="auto")


def test_run_killed_ten_times_gives_the_same_result(tmp_path):
    """SIGKILL at a random time: during the start, or within an epoch's duration, so also while a checkpoint is written."""
    start, (process, pipe) = time.monotonic(), begin(train, tmp_path / "uninterrupted")
    times = [pipe.recv() for _ in range(12)]
    process.join()
    startup, epoch = times[0] - start, min(later - one for one, later in itertools.pairwise(times))
    seed = time.time_ns()
    rng, epochs = random.Random(seed), []
    for _ in range(10):
        process, pipe = begin(train, tmp_path / "killed")
        complete = rng.choice((0, 1, 1, 2))
        for _ in range(complete):
            pipe.recv()
        time.sleep(rng.uniform(0, epoch if complete else min(startup, 1)))
        assert process.exitcode is None, seed
        process.kill()
        process.join()
        checkpoint = (
            latest_valid_checkpoint(tmp_path / "killed") if (tmp_path / "killed").exists() else None
        )
        epochs.append(torch.load(checkpoint, weights_only=True)["epoch"] if checkpoint else -1)
    assert epochs == sorted(epochs), seed
    process, _ = begin(train, tmp_path / "killed")
    process.join()
    folders = tmp_path / "uninterrupted", tmp_path / "killed"
    uninterrupted, killed = (torch.load(folder / LAST, weights_only=True) for folder in folders)
    for part in ("state_dict", "current_model_state"):
        assert equal(uninterrupted[part], killed[part]), (seed, epochs)
    one, other = (
        [row["val/mAP50"] for row in metrics_rows(folder) if row["val/mAP50"]] for folder in folders
    )
    assert one == other and len(one) == 12
