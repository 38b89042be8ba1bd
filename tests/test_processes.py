"""Two devices as two processes on the CPU, loader processes with little shared memory, folders that can't be written."""

import errno
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from src.config import SHAPE_CLASSES, Config
from src.data import cache, datamodule
from src.data.datamodule import DetectionDataModule
from src.data.shapes import draw_shapes
from src.training import checkpoints, module
from src.training import fit as fitting
from src.training.checkpoints import LAST
from src.training.fit import evaluate, load_detector
from src.training.module import YOLOv3Module
from tests.forking import begin
from tests.test_training import metrics_rows

CONFIG = Config(
    dataset="shapes", classes=SHAPE_CLASSES, shapes_train=8, shapes_val=5, image_size=64, multiscale_sizes=(32, 64, 96), multiscale_interval=1,
    width=0.125, epochs=2, batch_size=2, max_lr=1e-3, close_mosaic_epochs=1, num_workers=0, cache_gb=0, precision="32-true",
    devices=2,
)  # fmt: skip


def train_on_two(folder: Path, poisoned: bool, pipe) -> None:
    """As from a notebook's cell. What each process draws, sees and writes goes to the file "events" beside the folder."""
    sys.ps1, plain = ">>> ", (module.sample_image_size, checkpoints.atomic_write, YOLOv3Module.on_validation_epoch_end)
    forward = module.YOLOLoss.forward

    def note(*what) -> None:
        with open(folder.parent / "events", "a") as file:
            file.write(" ".join(map(str, (dist.get_rank() if dist.is_initialized() else -1, *what))) + "\n")

    def sample_image_size(config, step, epoch):
        note("side", step, plain[0](config, step, epoch))
        return plain[0](config, step, epoch)

    def atomic_write(path, *args, **options):
        note("wrote", path.name)
        plain[1](path, *args, **options)

    def on_validation_epoch_end(self):
        plain[2](self)
        note("saw", len(self.ground_truth), len(set(self.ground_truth[:, 0])), self.results["mAP50"])

    def poison(self, *args):
        terms = forward(self, *args)
        spoilt = poisoned and torch.is_grad_enabled() and dist.get_rank() == 1 and next(calls) == 3
        return terms | {"loss": terms["loss"] * (math.nan if spoilt else 1)}

    logging.disable()
    warnings.simplefilter("ignore")
    calls = iter(range(100))
    module.sample_image_size, checkpoints.atomic_write, module.YOLOLoss.forward = sample_image_size, atomic_write, poison
    YOLOv3Module.on_validation_epoch_end = on_validation_epoch_end
    try:
        detector = fitting.fit(CONFIG.replace(run_dir=str(folder)))
        pipe.send(detector.state_dict()["model.backbone.stem.0.weight"].numpy())
    except Exception as error:
        pipe.send(str(error))


def test_two_processes_see_what_one_sees(tmp_path):
    """Every held-out picture once, although one process has three of them and the other two; one process writes."""
    folder = tmp_path / "run"
    process, pipe = begin(train_on_two, folder, False)
    weights = pipe.recv()
    process.join()
    events = [line.split() for line in (tmp_path / "events").read_text().splitlines()]
    sides = [sorted(event[2:] for event in events if event[:2] == [rank, "side"]) for rank in "01"]
    assert sides[0] == sides[1] and len(sides[0]) == 2 * 2
    data = DetectionDataModule(CONFIG.replace(devices=1))
    detector = load_detector(folder, "last")
    alone = evaluate(detector, data)
    seen = {rank: [event[2:] for event in events if event[:2] == [rank, "saw"]] for rank in "01"}
    objects = sum(len(record.labels) for record in data.val_records)
    assert seen["0"] == seen["1"] and [event[:2] for event in seen["0"]] == [[str(objects), "5"]] * 2
    last = [row for row in metrics_rows(folder) if row["val/mAP50"]][-1]
    assert float(last["val/mAP50"]) == pytest.approx(detector.results["mAP50"], abs=1e-6)
    for name, value in alone.accuracies.items():
        assert float(last[f"val/accuracy/{name}"]) == pytest.approx(value, abs=1e-6), name
    assert {event[0] for event in events if event[1] == "wrote" and not event[2].startswith(".")} == {"0"}
    assert torch.equal(torch.from_numpy(weights), detector.state_dict()["model.backbone.stem.0.weight"])


def test_a_loss_that_is_no_number_in_one_process_stops_both(tmp_path):
    process, pipe = begin(train_on_two, tmp_path / "run", True)
    assert "the loss is not finite at step 4" in pipe.recv()
    process.join()
    kept = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert kept["epoch"] == 0 and all(value.isfinite().all() for value in kept["state_dict"].values())


@pytest.mark.parametrize(("megabytes", "room"), [(64, 0), (70, 1), (250, 6), (2000, 8)])
def test_loader_processes_fit_in_shared_memory(monkeypatch, capsys, megabytes, room):
    """64 MB is what Docker gives. Where it fills up, a loader process dies by a bus error."""
    usage = namedtuple("usage", "total used free")(0, 0, megabytes * 10**6)
    monkeypatch.setattr(datamodule.shutil, "disk_usage", lambda _: usage)
    data = DetectionDataModule(Config(image_size=416, batch_size=32, num_workers=8))
    assert data.num_workers == room and DetectionDataModule(Config(num_workers=0)).num_workers == 0
    assert (f"Using {room}." in capsys.readouterr().out) == (room < 8)


@pytest.mark.parametrize("why", ["no folder", "full disk"])
def test_no_place_for_a_cache_is_said_and_training_goes_on(tmp_path, monkeypatch, capsys, why):
    """A disk that fills up under a mapped file kills by a bus error, so its room is taken beforehand."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if why == "full disk":
        monkeypatch.setattr(cache.os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(cache, "FOLDER", tmp_path if why == "full disk" else Path("/dev/null/cache"))
    assert cache.open_cache([record.image for record in draw_shapes(2, seed=0)], "training", 64, max_gb=1) is None
    assert "Each epoch decodes them again" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_cache_has_its_room(tmp_path):
    pictures = cache.ImageCache(tmp_path / "pictures.u8", count=50, size=64)
    pictures.reserve()
    status = os.stat(pictures.path)
    assert status.st_size == 50 * (64 * 64 * 3 + 16) <= status.st_blocks * 512


def test_a_tree_that_can_not_be_written(monkeypatch):
    """As Kaggle's inputs."""
    root = Path(tempfile.mkdtemp())
    folder = root / "VOCdevkit" / "VOC2007"
    for name in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (100, 80)).save(folder / "JPEGImages" / "1.jpg")
    (folder / "Annotations" / "1.xml").write_text("<annotation/>")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("1\n")
    for path in (root, *root.rglob("*")):
        path.chmod(0o555)
    monkeypatch.setattr(cache, "FOLDER", root / "cache")
    splits = {"train_splits": ("2007/train",), "val_splits": ("2007/train",)}
    config = Config(voc_root=str(root), image_size=64, num_workers=0, batch_size=1, **splits)

    def use(config: Config) -> None:
        data = DetectionDataModule(config)
        data.prepare_data()
        data.setup()
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert len(next(iter(loader))["images"]) == 1

    use(config.replace(cache_gb=0))  # imports what it needs: nobody may not read root's Python
    user = os.geteuid()
    try:
        os.seteuid(65534 if user == 0 else user)
        with pytest.raises(PermissionError):
            (root / "new").touch()
        use(config)
    finally:
        os.seteuid(user)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(root)
