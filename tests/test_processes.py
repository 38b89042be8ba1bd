"""Number of loader processes, folders without write permission."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from src.config import Config
from src.data.datamodule import DetectionDataModule, make_loader
from tests.test_voc import obj, write_tree


def test_loader_processes_share_the_available_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    configs = [Config(devices=devices) for devices in (1, 2, 8)]
    assert [make_loader([], config).num_workers for config in configs] == [6, 3, 1]


def load_batches(config: Config) -> None:
    data = DetectionDataModule(config)
    data.prepare_data()
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert len(next(iter(loader))["images"]) == 1


def test_read_only_voc_tree():
    """Kaggle's input folders are read-only."""
    root = write_tree(Path(tempfile.mkdtemp()), "2007", {"train": {"1": obj()}})
    for path in (root, *root.rglob("*")):
        path.chmod(0o555)
    splits = {"train_splits": ("2007/train",), "val_splits": ("2007/train",)}
    settings = {"classes": ("cat",), "image_size": 64, "num_workers": 0, "batch_size": 1}
    config = Config(data_root=str(root), cache_gb=0, **settings, **splits)
    load_batches(config)  # imports modules that the user nobody can't read
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
