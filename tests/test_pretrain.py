"""Pretraining: layout, samples, learning, resume, and detectors that start from its backbone."""

import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from src.config import Config
from src.model.network import YOLOv3
from src.model.pretrained import load_backbone
from src.training import pretrain as pretraining
from src.training.module import build_model
from src.training.pretrain import PRETRAIN, PretrainDataModule, pretrain
from tests.runs import equal, fail_in, load


def write_image(path, label, seed):
    """Write an image whose class is its colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 60, (48, 40, 3))
    noise[..., label] += 150
    Image.fromarray(noise.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes as in Tiny ImageNet: the docstring's command sorts the validation images."""
    root, lines = tmp_path_factory.mktemp("images") / "tiny-imagenet-200", []
    for label, name in enumerate(("blue", "green", "red")):
        for number in range(8):
            write_image(root / f"train/{name}/images/{number}.JPEG", label, number)
        for number in range(4):
            write_image(root / f"val/images/{name}{number}.JPEG", label, 100 + number)
            lines.append(f"{name}{number}.JPEG\t{name}\t0\t0\t9\t9\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    command = pretraining.__doc__[pretraining.__doc__.index("cd tiny-imagenet-200") :]
    subprocess.run(["bash", "-ec", command], cwd=root.parent, check=True)
    return root


def tiny(folder, run_dir, **changes):
    config = PRETRAIN.replace(
        data_root=str(folder),
        width=0.0625,
        multiscale_sizes=(32,),
        image_size=56,
        close_mosaic_epochs=1,
        epochs=4,
        batch_size=4,
        max_lr=3e-3,
        ema_decay=0.5,
        num_workers=0,
        precision="32-true",
        run_dir=str(run_dir),
    )
    return config.replace(**changes)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run: its settings and the folder of its backbone."""
    config = tiny(folder, tmp_path_factory.mktemp("run"))
    return config, pretrain(config)


def test_wrong_layouts_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train"):
        PretrainDataModule(tiny(tmp_path, tmp_path))
    write_image(tmp_path / "train/one/1.jpg", 0, 0)
    write_image(tmp_path / "val/other/1.jpg", 1, 0)
    with pytest.raises(ValueError, match=r"different classes, such as \['one', 'other'\]"):
        PretrainDataModule(tiny(tmp_path, tmp_path))
    with pytest.raises(ValueError, match="no range test. Set max_lr"):
        tiny(tmp_path, tmp_path, max_lr=0.0)


def test_a_sample_depends_on_its_number_only(folder, tmp_path):
    data, again = (PretrainDataModule(tiny(folder, tmp_path)).train_data for _ in range(2))
    assert data.classes == ["blue", "green", "red"]
    for sample_id in (5, 30, 5):
        image, label = data[sample_id]
        assert torch.equal(image, again[sample_id][0]) and label == (sample_id % 24) // 8
    assert not torch.equal(data[5][0], data[29][0])
    assert data[5][0].dtype == torch.uint8 and data[5][0].shape == (3, 32, 32)
    assert data[3 * 24][0].shape == (3, 56, 56)  # the last epoch has the final size


def test_fewer_images_than_a_batch_are_one_batch(folder, tmp_path):
    for batch_size, batches in ((100, 1), (24, 1), (10, 2)):
        data = PretrainDataModule(tiny(folder, tmp_path, batch_size=batch_size))
        assert len(data.train_dataloader()) == batches


def test_it_learns_and_its_backbone_starts_detectors(run):
    config, backbone = run
    card = (backbone / "README.md").read_text()
    assert "top-1 accuracy 100.0%" in card and "24 images of 3 classes (tiny-image" in card
    settings = {"width": 0.0625, "image_size": 96, "classes": ("a", "b")}
    saved = build_model(Config(pretrained_weights=str(backbone), **settings))
    fresh = build_model(Config(**settings))
    assert not torch.equal(saved.backbone.stem[0].weight, fresh.backbone.stem[0].weight)
    assert equal(saved.heads.state_dict(), fresh.heads.state_dict())
    assert json.loads((backbone / "config.json").read_text())["metadata"]["classes"] == 3
    model, state = YOLOv3(5, 0.0625), load(f"{config.run_dir}/last.ckpt")["state_dict"]
    load_backbone(model, backbone)
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, state[f"backbone.{name}"], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"width 0.0625, .* Set Config.width=0.0625"):
        build_model(Config(width=0.25, pretrained_weights=str(backbone)))


def test_an_interrupted_run_ends_with_the_same_weights(folder, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_in(patch, epoch=2)
        with pytest.raises(ConnectionError):
            pretrain(tiny(folder, tmp_path))
    pretrain(tiny(folder, tmp_path))
    states = [load(f"{folder}/last.ckpt")["state_dict"] for folder in (tmp_path, run[0].run_dir)]
    assert equal(*states)
