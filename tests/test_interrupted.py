"""Training killed, files torn, disks full, folders shared: what is left, and that it goes on from there."""

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

from src.config import SHAPE_CLASSES, Config
from src.data.datamodule import DetectionDataModule
from src.training.callbacks import Progress, ResumableCSVLogger
from src.training.checkpoints import (
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    atomic_write,
    find_corruption,
    latest_valid_checkpoint,
    run_lock,
)
from src.training.fit import fit, load_detector, prepare_run
from tests.forking import begin
from tests.test_training import rows


def tiny(folder: Path, **changes) -> Config:
    """Two steps an epoch."""
    return Config(
        dataset="shapes", classes=SHAPE_CLASSES, shapes_train=8, shapes_val=2, image_size=64, width=0.0625, epochs=3, batch_size=4,
        max_lr=1e-3, close_mosaic_epochs=1, num_workers=0, cache_gb=0, precision="32-true", run_dir=str(folder),
    ).replace(**changes)  # fmt: skip


def same(one: dict, other: dict) -> bool:
    """Whether two state dicts hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run: its folder, in whose name are a space and letters beyond ASCII, and its detector."""
    folder = tmp_path_factory.mktemp("runs") / "Lauf é 猫"
    return folder, fit(tiny(folder))


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run[0], tmp_path / "copy")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def flip(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


def test_the_checkpoint_before_the_last_is_kept(run):
    epochs = [torch.load(run[0] / name, weights_only=True)["epoch"] for name in (LAST, PREVIOUS)]
    assert epochs == [2, 1] and not list(run[0].glob("*.part"))


@pytest.mark.parametrize("spoil", [cut, flip, lambda file: os.truncate(file, 0), Path.unlink])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_used(run, copy, spoil, capsys):
    """Unlinked: killed between the two renames."""
    spoil(copy / LAST)
    assert latest_valid_checkpoint(copy) == copy / PREVIOUS
    assert "last.ckpt is damaged" in capsys.readouterr().out or spoil == Path.unlink
    if spoil == flip:
        resumed = fit(tiny(copy), ckpt_path="last")
        assert same(resumed.state_dict(), run[1].state_dict()) and not find_corruption(copy / LAST)


def test_nothing_good_left_is_said(copy):
    for name in (LAST, PREVIOUS, "best.ckpt"):
        flip(copy / name)
    for call in (lambda: fit(tiny(copy), ckpt_path="auto"), lambda: load_detector(copy, "last")):
        with pytest.raises(ValueError, match="every last checkpoint in .* is damaged"):
            call()
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged \(its digest"):
        load_detector(copy)
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged"):
        fit(tiny(copy), ckpt_path=str(copy / "best.ckpt"))


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    """Of 600 flipped bits and 100 cuts each is recognised, or changes nothing that is read."""
    file, draw = tmp_path / "some.ckpt", random.Random(0)
    values = {"epoch": 3, "state_dict": {name: torch.randn(40) for name in "abc"}}
    AtomicCheckpointIO().save_checkpoint(values, file)
    whole, unseen = file.read_bytes(), 0
    for number in range(700):
        spoilt = bytearray(whole)
        if number < 600:
            spoilt[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            del spoilt[draw.randrange(len(whole)) :]
        file.write_bytes(spoilt)
        if not find_corruption(file):
            unseen += 1
            read = torch.load(file, weights_only=True)
            assert read["epoch"] == 3 and same(read["state_dict"], values["state_dict"]), number
    assert unseen < 20  # of the digest's own mark


def test_a_checkpoint_without_digest_is_read(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "some.ckpt")
    assert not find_corruption(tmp_path / "some.ckpt")


def test_a_full_disk_stops_with_a_message_and_the_last_good_checkpoint_stands(run, copy):
    (copy / PREVIOUS).replace(copy / LAST)
    (copy / f"{LAST}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"last\.ckpt can't be written \(.*\)\. Is the disk full\?.*ckpt_path=\"last\""):
        fit(tiny(copy), ckpt_path="last")
    assert not list(copy.glob("*.part")) and torch.load(latest_valid_checkpoint(copy), weights_only=True)["epoch"] == 1
    assert same(fit(tiny(copy), ckpt_path="last").state_dict(), run[1].state_dict())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "some.txt"
    atomic_write(file, lambda out: out.write(b"one"))
    with pytest.raises(ZeroDivisionError):
        atomic_write(file, lambda out: (out.write(b"two"), 1 / 0))
    assert file.read_bytes() == b"one" and list(tmp_path.iterdir()) == [file]


def test_a_finished_run_gone_on_with_is_as_it_was(run, copy):
    before = (copy / LAST).read_bytes()
    for way in ("last", "auto"):
        assert same(fit(tiny(copy), ckpt_path=way).state_dict(), run[1].state_dict())
    assert (copy / LAST).read_bytes() == before and rows(copy) == rows(run[0])


def test_starting_anew_leaves_no_checkpoint_to_mistake_for_its_own(copy):
    config, data = tiny(copy), DetectionDataModule(tiny(copy))
    assert prepare_run(config, data, "auto")[1] == copy / LAST
    assert prepare_run(config, data, None)[1] is None and latest_valid_checkpoint(copy) is None
    assert prepare_run(config, data, "auto")[1] is None
    with pytest.raises(FileNotFoundError, match="there is no run to go on with"):
        prepare_run(config, data, "last")


def test_metrics_of_a_torn_run_stay_up_to_the_checkpoint(tmp_path):
    log = ResumableCSVLogger(tmp_path / "metrics.csv")
    for step in range(4):
        log.log_metrics({"a/b": torch.tensor(step + 0.5), "epoch": step} | ({"late": 1.0} if step == 3 else {}), step)
        log.save()
    resumed = ResumableCSVLogger(tmp_path / "metrics.csv", before=2)
    assert len(rows(tmp_path)) == 4  # nothing is lost before something is logged
    resumed.log_metrics({"c": 7.0}, 2)
    resumed.save()
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2"]
    assert [row["a/b"] for row in rows(tmp_path)] == ["0.5", "1.5", ""] and rows(tmp_path)[0]["epoch"] == "0"


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    """And a killed one gives it back at once, while its loader processes still live."""
    code = (
        "import fcntl, os, sys, time\n"
        f"file = open({str(tmp_path / 'lock')!r}, 'a')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "if not os.fork(): time.sleep(30)\n"
        "print('held', flush=True); time.sleep(30)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=r"another process is training in .*Config\.run_dir"):
            fit(tiny(tmp_path))
        other.kill()
        other.wait()
        with run_lock(tmp_path):
            pass
    finally:
        os.killpg(other.pid, signal.SIGKILL)


def train(folder: Path, pipe) -> None:
    """Sends the time at the start of each epoch."""

    def tell(self, *args):
        pipe.send(time.monotonic())

    Progress.on_train_epoch_start = tell
    logging.disable()
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        fit(tiny(folder, epochs=12), ckpt_path="auto")


def test_killed_ten_times_it_ends_as_if_never(tmp_path):
    """SIGKILL while it starts, or within an epoch's time from the start of an epoch, so also in a checkpoint."""
    begun, (process, pipe) = time.monotonic(), begin(train, tmp_path / "whole")
    times = [pipe.recv() for _ in range(12)]
    process.join()
    starting, epoch = times[0] - begun, min(later - one for one, later in itertools.pairwise(times))
    draw, reached = random.Random(time.time()), []
    for _ in range(10):
        process, pipe = begin(train, tmp_path / "killed")
        epochs = draw.choice((0, 1, 1, 2))
        for _ in range(epochs):
            pipe.recv()
        time.sleep(draw.uniform(0, epoch if epochs else min(starting, 1)))
        assert process.exitcode is None
        process.kill()
        process.join()
        good = latest_valid_checkpoint(tmp_path / "killed") if (tmp_path / "killed").exists() else None
        reached.append(torch.load(good, weights_only=True)["epoch"] if good else -1)
    assert reached == sorted(reached)
    process, _ = begin(train, tmp_path / "killed")
    process.join()
    whole, killed = (torch.load(tmp_path / name / LAST, weights_only=True) for name in ("whole", "killed"))
    for part in ("state_dict", "current_model_state"):
        assert same(whole[part], killed[part]), reached
    one, other = ([row["val/mAP50"] for row in rows(tmp_path / name) if row["val/mAP50"]] for name in ("whole", "killed"))
    assert one == other and len(one) == 12
