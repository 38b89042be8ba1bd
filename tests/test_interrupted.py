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

import pytest
import torch

from src.config import SHAPE_CLASSES, atomic_write
from src.model.network import ANCHORS, YOLOv3
from src.training.callbacks import Progress
from src.training.fit import fit, load_detector
from src.training.run_folder import (
    BEST,
    LAST,
    METRICS,
    PREVIOUS,
    AtomicCheckpointIO,
    find_checkpoint,
    find_corruption,
    run_lock,
    write_start,
)
from tests.forking import begin
from tests.runs import epoch_rows, equal, load, metrics_rows, tiny


@pytest.fixture
def copy(trained_run, tmp_path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "copy")


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip_bit, lambda file: os.truncate(file, 1000), lambda file: os.truncate(file, 0)]
)
def test_damaged_checkpoint_is_detected_and_the_previous_one_used(trained, copy, damage, capsys):
    assert [load(copy / name)["epoch"] for name in (LAST, PREVIOUS)] == [2, 1]
    damage(copy / LAST)
    assert find_checkpoint(copy, "last") == copy / PREVIOUS
    assert "last.ckpt is damaged" in capsys.readouterr().out
    if damage == flip_bit:
        resumed = fit(tiny(copy), ckpt_path="last")
        assert equal(resumed.state_dict(), trained[1].state_dict())
        assert not find_corruption(copy / LAST)
        assert metrics_rows(copy) == metrics_rows(trained[0])


def test_damaged_or_missing_checkpoints_are_named(copy, capsys):
    for name in (LAST, PREVIOUS, BEST):
        flip_bit(copy / name)
    for call, name in (
        (lambda: fit(tiny(copy), ckpt_path="auto"), "auto"),
        (lambda: load_detector(copy, "last"), "last"),
        (lambda: load_detector(copy), "best"),
        (lambda: fit(tiny(copy / "new"), ckpt_path="last"), "last"),
        (lambda: fit(tiny(copy), ckpt_path="mistyped.ckpt"), "mistyped.ckpt"),
    ):
        with pytest.raises(FileNotFoundError, match=f"has no valid checkpoint '{name}'"):
            call()
    printed = capsys.readouterr().out
    assert printed.count("is damaged: the checksum of") == 5


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
            read = load(file)
            assert read["epoch"] == 3 and equal(read["state_dict"], values["state_dict"]), number


def test_full_disk_raises_and_keeps_the_last_valid_checkpoint(trained, copy):
    (copy / PREVIOUS).replace(copy / LAST)
    part = copy / f"{LAST}.part"
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"last\.ckpt can't be written: .*The disk may be full\."):
        fit(tiny(copy), ckpt_path="last")
    part.unlink()
    assert load(find_checkpoint(copy, "last"))["epoch"] == 1
    assert equal(fit(tiny(copy), ckpt_path="last").state_dict(), trained[1].state_dict())


def test_atomic_write_replaces_a_file_completely_or_not_at_all(tmp_path):
    file = tmp_path / "some.txt"
    atomic_write(file, lambda out: out.write(b"one"))
    with pytest.raises(ZeroDivisionError):
        atomic_write(file, lambda out: (out.write(b"two"), 1 / 0))
    assert file.read_bytes() == b"one"


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
    for ckpt_path, kept in (("best", True), ("auto", True), (None, False)):
        write_start(tiny(copy), find_checkpoint(copy, ckpt_path))
        assert {(copy / name).exists() for name in (BEST, LAST, PREVIOUS, METRICS)} == {kept}
    assert find_checkpoint(copy, "auto") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrained_weights": "no/mistyped/folder"},
        {"dataset": "yolo", "data_root": "mistyped"},
        {"precision": "mistyped"},
        {"devices": 2, "max_lr": 0.0},
    ],
)
def test_a_start_that_fails_deletes_nothing(copy, changes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises((FileNotFoundError, ValueError), match="mistyped|GPUs found: 1"):
        fit(tiny(copy, **changes))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


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
        checkpoint = find_checkpoint(killed, "auto")
        epochs.append(load(checkpoint)["epoch"] if checkpoint else -1)
    assert epochs == sorted(epochs), seed
    process, _ = begin(train, killed)
    process.join()
    one, other = (load(folder / LAST) for folder in (whole, killed))
    for part in ("state_dict", "current_model_state"):
        assert equal(one[part], other[part]), (seed, epochs)
    assert metrics_rows(whole) == metrics_rows(killed) and len(epoch_rows(killed)) == 12
