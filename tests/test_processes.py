"""Two training processes on the CPU, loader processes with little shared memory, folders without write permission."""

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
    dataset="shapes", classes=SHAPE_CLASSES, shapes_train=8, shapes_val=5, image_size=64, multiscale_sizes=(32, 64, 96),
    multiscale_interval=1, width=0.125, epochs=2, batch_size=2, max_lr=1e-3, close_mosaic_epochs=1, num_workers=0, cache_gb=0,
    precision="32-true", devices=2,
)  # fmt: skip


def train_on_two(folder: Path, make_nan: bool, pipe) -> None:
    """Train as a notebook does. Log what each process samples, validates and writes to the file "events" beside the folder."""
    sys.ps1 = ">>> "
    originals = module.sample_image_size, checkpoints.atomic_write, YOLOv3Module.on_validation_epoch_end
    forward = module.YOLOLoss.forward

    def log(*event) -> None:
        with open(folder.parent / "events", "a") as file:
            file.write(" ".join(map(str, (dist.get_rank() if dist.is_initialized() else -1, *event))) + "\n")

    def sample_image_size(config, step, epoch):
        log("size", step, originals[0](config, step, epoch))
        return originals[0](config, step, epoch)

    def atomic_write(path, *args, **options):
        log("wrote", path.name)
        originals[1](path, *args, **options)

    def on_validation_epoch_end(self):
        originals[2](self)
        log("validated", len(self.ground_truth), len(set(self.ground_truth[:, 0])), self.results["mAP50"])

    def loss_forward(self, *args):
        terms = forward(self, *args)
        is_nan = make_nan and torch.is_grad_enabled() and dist.get_rank() == 1 and next(steps) == 3
        return terms | {"loss": terms["loss"] * (math.nan if is_nan else 1)}

    logging.disable()
    warnings.simplefilter("ignore")
    steps = iter(range(100))
    module.sample_image_size, checkpoints.atomic_write, module.YOLOLoss.forward = sample_image_size, atomic_write, loss_forward
    YOLOv3Module.on_validation_epoch_end = on_validation_epoch_end
    try:
        detector = fitting.fit(CONFIG.replace(run_dir=str(folder)))
        pipe.send(detector.state_dict()["model.backbone.stem.0.weight"].numpy())
    except Exception as error:
        pipe.send(str(error))


def test_two_processes_give_the_results_of_one(tmp_path):
    """Each validation image counts once, although one process has three and the other two. Only one process writes."""
    folder = tmp_path / "run"
    process, pipe = begin(train_on_two, folder, False)
    weights = pipe.recv()
    process.join()
    events = [line.split() for line in (tmp_path / "events").read_text().splitlines()]
    sizes = [sorted(event[2:] for event in events if event[:2] == [rank, "size"]) for rank in "01"]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2 * 2
    data = DetectionDataModule(CONFIG.replace(devices=1))
    detector = load_detector(folder, "last")
    one_process = evaluate(detector, data)
    validated = {rank: [event[2:] for event in events if event[:2] == [rank, "validated"]] for rank in "01"}
    objects = sum(len(record.labels) for record in data.val_records)
    assert validated["0"] == validated["1"] and [event[:2] for event in validated["0"]] == [[str(objects), "5"]] * 2
    last = [row for row in metrics_rows(folder) if row["val/mAP50"]][-1]
    assert float(last["val/mAP50"]) == pytest.approx(detector.results["mAP50"], abs=1e-6)
    for name, value in one_process.accuracies.items():
        assert float(last[f"val/accuracy/{name}"]) == pytest.approx(value, abs=1e-6), name
    assert {event[0] for event in events if event[1] == "wrote" and not event[2].startswith(".")} == {"0"}
    assert torch.equal(torch.from_numpy(weights), detector.state_dict()["model.backbone.stem.0.weight"])


def test_non_finite_loss_in_one_process_stops_both(tmp_path):
    process, pipe = begin(train_on_two, tmp_path / "run", True)
    assert "The loss is not finite at step 4" in pipe.recv()
    process.join()
    checkpoint = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert checkpoint["epoch"] == 0 and all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize(("megabytes", "num_workers"), [(64, 0), (70, 1), (250, 6), (2000, 8)])
def test_loader_processes_fit_in_shared_memory(monkeypatch, capsys, megabytes, num_workers):
    """Docker's default is 64 MB. If it fills up, a loader process dies of a bus error."""
    usage = namedtuple("usage", "total used free")(0, 0, megabytes * 10**6)
    monkeypatch.setattr(datamodule.shutil, "disk_usage", lambda _: usage)
    data = DetectionDataModule(Config(image_size=416, batch_size=32, num_workers=8))
    assert data.num_workers == num_workers and DetectionDataModule(Config(num_workers=0)).num_workers == 0
    assert (f"Using {num_workers}." in capsys.readouterr().out) == (num_workers < 8)


@pytest.mark.parametrize("problem", ["no folder", "full disk"])
def test_training_continues_without_a_cache(tmp_path, monkeypatch, capsys, problem):
    """Writing to a mapped file on a full disk is a bus error, so the cache reserves its disk space first."""

    def raise_no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if problem == "full disk":
        monkeypatch.setattr(cache.os, "posix_fallocate", raise_no_space, raising=False)
    monkeypatch.setattr(cache, "FOLDER", tmp_path if problem == "full disk" else Path("/dev/null/cache"))
    assert cache.open_cache([record.image for record in draw_shapes(2, seed=0)], "training", 64, max_gb=1) is None
    assert "Each epoch decodes them again" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_cache_reserves_disk_space(tmp_path):
    image_cache = cache.ImageCache(tmp_path / "images.u8", count=50, size=64)
    image_cache.reserve()
    status = os.stat(image_cache.path)
    assert status.st_size == 50 * (64 * 64 * 3 + 16) <= status.st_blocks * 512


def test_read_only_voc_tree(monkeypatch):
    """Kaggle's input folders are read-only."""
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
    config = Config(data_root=str(root), image_size=64, num_workers=0, batch_size=1, **splits)

    def load_batches(config: Config) -> None:
        data = DetectionDataModule(config)
        data.prepare_data()
        data.setup()
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert len(next(iter(loader))["images"]) == 1

    load_batches(config.replace(cache_gb=0))  # imports all modules: the user nobody can't read root's Python
    user = os.geteuid()
    try:
        os.seteuid(65534 if user == 0 else user)
        with pytest.raises(PermissionError):
            (root / "new").touch()
        load_batches(config)
    finally:
        os.seteuid(user)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(root)
