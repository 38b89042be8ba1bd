"""Interrupted training: killed processes, damaged files, full disks, locked folders."""

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
from types import SimpleNamespace

import pytest
import torch

from src.config import SHAPE_CLASSES, atomic_write
from src.model.network import ANCHORS, YOLOv3
from src.training.callbacks import MetricsCSV, Progress
from src.training.fit import fit, load_detector
from src.training.run_folder import (
    BEST,
    LAST,
    METRICS,
    PREVIOUS,
    AtomicCheckpointIO,
    RunCheckpoint,
    find_checkpoint,
    find_corruption,
    latest_valid_checkpoint,
    run_lock,
    write_start,
)
from tests.forking import begin
from tests.runs import epoch_rows, equal, metrics_rows, tiny


@pytest.fixture
def copy(trained_run, tmp_path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "copy")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def flip_bit(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


def test_previous_checkpoint_is_kept(trained_run):
    names = (LAST, PREVIOUS)
    epochs = [torch.load(trained_run / name, weights_only=True)["epoch"] for name in names]
    assert epochs == [2, 1] and not list(trained_run.glob("*.part"))


@pytest.mark.parametrize(
    "damage", [truncate, flip_bit, lambda file: os.truncate(file, 0), Path.unlink]
)
def test_damaged_checkpoint_is_detected_and_the_previous_one_used(trained, copy, damage, capsys):
    """A missing last.ckpt is what a kill between the two renames leaves."""
    damage(copy / LAST)
    assert latest_valid_checkpoint(copy) == copy / PREVIOUS
    assert "last.ckpt is damaged" in capsys.readouterr().out or damage == Path.unlink
    if damage == flip_bit:
        resumed = fit(tiny(copy), ckpt_path="last")
        assert equal(resumed.state_dict(), trained[1].state_dict())
        assert not find_corruption(copy / LAST)


def test_all_checkpoints_damaged_raises(copy):
    for name in (LAST, PREVIOUS, "best.ckpt"):
        flip_bit(copy / name)
    for call in (lambda: fit(tiny(copy), ckpt_path="auto"), lambda: load_detector(copy, "last")):
        with pytest.raises(ValueError, match="Every checkpoint to resume from in .* is damaged"):
            call()
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged: the checksum of .* is wrong"):
        load_detector(copy)
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged"):
        fit(tiny(copy), ckpt_path=str(copy / "best.ckpt"))


def test_any_damage_to_a_checkpoint_is_detected(tmp_path):
    """Each of 600 flipped bits and 100 truncations is detected, or changes nothing that is read."""
    file, rng = tmp_path / "some.ckpt", random.Random(0)
    values = {"epoch": 3, "state_dict": {name: torch.randn(40) for name in "abc"}}
    AtomicCheckpointIO().save_checkpoint(values, file)
    content = file.read_bytes()
    for number in range(700):
        damaged = bytearray(content)
        if number < 600:
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(content)) :]
        file.write_bytes(damaged)
        if not find_corruption(file):
            read = torch.load(file, weights_only=True)
            assert read["epoch"] == 3 and equal(read["state_dict"], values["state_dict"]), number


def test_full_disk_raises_and_keeps_the_last_valid_checkpoint(trained, copy):
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
    assert equal(fit(tiny(copy), ckpt_path="last").state_dict(), trained[1].state_dict())


def test_atomic_write_replaces_a_file_completely_or_not_at_all(tmp_path):
    file = tmp_path / "some.txt"
    atomic_write(file, lambda out: out.write(b"one"))
    with pytest.raises(ZeroDivisionError):
        atomic_write(file, lambda out: (out.write(b"two"), 1 / 0))
    assert file.read_bytes() == b"one" and list(tmp_path.iterdir()) == [file]


def test_resuming_a_finished_run_changes_nothing(trained, copy):
    before = (copy / LAST).read_bytes()
    for ckpt_path in ("last", "auto"):
        resumed = fit(tiny(copy), ckpt_path=ckpt_path)
        assert equal(resumed.state_dict(), trained[1].state_dict())
    assert (copy / LAST).read_bytes() == before and metrics_rows(copy) == metrics_rows(trained[0])


def test_a_resumed_average_has_the_anchors_of_its_checkpoint(trained, copy, tmp_path, capsys):
    """Other pretrained weights have other anchors, which must not enter the validation."""
    anchors = [[[1.5 * w, 1.5 * h] for w, h in scale] for scale in ANCHORS]
    YOLOv3(8, 0.0625, SHAPE_CLASSES, anchors).save_pretrained(tmp_path / "other")
    (copy / LAST).unlink()
    config = tiny(copy, pretrained_weights=str(tmp_path / "other"))
    resumed = fit(config, ckpt_path="last")
    assert equal(resumed.state_dict(), trained[1].state_dict())
    assert torch.equal(resumed.model.anchors, trained[1].model.anchors)
    assert capsys.readouterr().out.count(": loaded ") == 1
    assert metrics_rows(copy) == metrics_rows(trained[0])


def test_new_run_deletes_the_former_checkpoints(copy):
    for ckpt_path, kept in (("auto", True), (None, False)):
        checkpoint = find_checkpoint(copy, ckpt_path)
        assert write_start(tiny(copy), checkpoint) == (copy / LAST if kept else None)
        assert {(copy / name).exists() for name in (BEST, LAST, PREVIOUS, METRICS)} == {kept}
    assert find_checkpoint(copy, "auto") is None
    with pytest.raises(FileNotFoundError, match="there is no run to resume"):
        fit(tiny(copy), ckpt_path="last")


@pytest.mark.parametrize(
    "changes",
    [{"pretrained_weights": "no/mistyped/folder"}, {"dataset": "yolo", "data_root": "mistyped"}],
)
def test_a_start_that_fails_deletes_nothing(copy, changes):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises((FileNotFoundError, ValueError), match="mistyped"):
        fit(tiny(copy, **changes))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_copied_run_keeps_its_best_checkpoint(trained_run, copy):
    """Lightning alone would forget the best score, and the next epoch would replace best.ckpt."""
    score = torch.tensor(0.5)
    state = {
        "monitor": "val/mAP50",
        "best_model_score": score,
        "best_k_models": {},
        "kth_value": score,
        "best_model_path": str(trained_run / BEST),
        "kth_best_model_path": "",
        "last_model_path": "",
        "dirpath": str(trained_run),
    }
    for present in (True, False):
        callback = RunCheckpoint(copy, "best", monitor="val/mAP50", mode="max")
        callback.load_state_dict(state)
        assert (callback.best_model_score is not None) == present
        (copy / BEST).unlink(missing_ok=True)


def test_a_checkpoint_of_another_folder_brings_its_files(trained_run, tmp_path):
    """As on Kaggle, where the output of an earlier session is read-only."""
    new = tmp_path / "new"
    new.mkdir()
    (new / PREVIOUS).touch()
    assert write_start(tiny(new), trained_run / LAST) == trained_run / LAST
    assert {path.name for path in new.iterdir()} == {"config.json", BEST, METRICS}
    for name in (BEST, METRICS):
        assert (new / name).read_bytes() == (trained_run / name).read_bytes()
    with pytest.raises(ValueError, match=r"Config\.image_size is 96"):
        fit(tiny(new, image_size=96), ckpt_path=str(trained_run / LAST))


def test_metrics_before_the_checkpoint_are_kept(tmp_path):
    path = tmp_path / METRICS

    def log(rows: MetricsCSV, epoch: int, **values) -> None:
        metrics = {name: torch.tensor(value) for name, value in values.items()}
        trainer = {"global_step": 2 * epoch + 2, "current_epoch": epoch, "is_global_zero": True}
        rows.on_train_epoch_end(SimpleNamespace(callback_metrics=metrics, **trainer), None)

    metrics = MetricsCSV(path)
    for epoch in range(4):
        log(metrics, epoch, a=epoch + 0.5, **({"late": 1.0} if epoch == 3 else {}))
    resumed = MetricsCSV(path, before=4)
    assert len(metrics_rows(tmp_path)) == 4  # the file changes only when an epoch ends
    log(resumed, 2, c=7.0)
    rows = metrics_rows(tmp_path)
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    assert [row["a"] for row in rows] == ["0.5", "1.5", ""] and rows[2]["c"] == "7.0"


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
        config = tiny(folder, shapes_train=4, shapes_val=2, batch_size=2, width=0.01)
        fit(config.replace(image_size=32, epochs=12), ckpt_path="auto")


def test_run_killed_ten_times_gives_the_same_result(tmp_path):
    """SIGKILL during the start or an epoch, so also while a checkpoint is written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start, (process, pipe) = time.monotonic(), begin(train, whole)
    times = [pipe.recv() for _ in range(12)]
    process.join()
    startup, epoch = times[0] - start, min(later - one for one, later in itertools.pairwise(times))
    seed = time.time_ns()
    rng, epochs = random.Random(seed), []
    for _ in range(10):
        process, pipe = begin(train, killed)
        started = rng.choice((0, 1, 1, 2))  # epochs
        for _ in range(started):
            pipe.recv()
        time.sleep(rng.uniform(0, epoch if started else min(startup, 1)))
        assert process.exitcode is None, seed
        process.kill()
        process.join()
        checkpoint = latest_valid_checkpoint(killed)
        epochs.append(torch.load(checkpoint, weights_only=True)["epoch"] if checkpoint else -1)
    assert epochs == sorted(epochs), seed
    process, _ = begin(train, killed)
    process.join()
    one, other = (torch.load(folder / LAST, weights_only=True) for folder in (whole, killed))
    for part in ("state_dict", "current_model_state"):
        assert equal(one[part], other[part]), (seed, epochs)
    assert metrics_rows(whole) == metrics_rows(killed) and len(epoch_rows(killed)) == 12
