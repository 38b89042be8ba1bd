"""Pretraining: layouts, determinism, learning, resume, and detectors that start from its backbone."""

import numpy as np
import pytest
import torch
from PIL import Image

from src.config import Config
from src.data.imagefolder import ClassificationDataset, read_image_folder
from src.model.network import YOLOv3
from src.model.pretrained import is_backbone, load_backbone, read_metadata
from src.training import pretrain as pretraining
from src.training.checkpoints import LAST
from src.training.module import build_model
from src.training.pretrain import PretrainConfig, PretrainDataModule, pretrain


def write_image(path, label, seed):
    """An image whose class is its colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 60, (48, 40, 3))
    noise[..., label] += 150
    Image.fromarray(noise.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes; training images in subfolders, validation images listed as Tiny ImageNet does."""
    root, lines = tmp_path_factory.mktemp("images"), []
    for label, name in enumerate(("blue", "green", "red")):
        for number in range(8):
            write_image(root / f"train/{name}/images/{number}.JPEG", label, number)
        for number in range(4):
            write_image(root / f"val/images/{name}{number}.JPEG", label, 100 + number)
            lines.append(f"{name}{number}.JPEG\t{name}\t0\t0\t9\t9\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    return root


def tiny(folder, run_dir, **changes):
    config = PretrainConfig(
        str(folder),
        width=0.125,
        image_size=32,
        final_size=64,
        final_epochs=1,
        epochs=4,
        batch_size=4,
        max_lr=3e-3,
        ema_decay=0.5,
        num_workers=0,
        cache_gb=0,
        precision="32-true",
        run_dir=str(run_dir),
    )
    return config.replace(**changes)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run: its folder and its backbone's."""
    config = tiny(folder, tmp_path_factory.mktemp("run"))
    return config, pretrain(config)


def test_both_layouts_are_read_alike(folder, tmp_path):
    classes, train, val = read_image_folder(folder)
    assert classes == ["blue", "green", "red"]
    assert len(train) == 24 and [label for _, label in val] == [0] * 4 + [1] * 4 + [2] * 4
    for split in ("train", "val"):
        for label, name in enumerate(("blue", "green", "red")):
            write_image(tmp_path / split / name / "deeper/still/1.jpg", label, 0)
    write_image(tmp_path / "train/.ipynb_checkpoints/1.jpg", 0, 0)
    (tmp_path / "val/.ipynb_checkpoints").mkdir()
    (tmp_path / "train/red/._1.jpg").write_text("written by macOS")
    classes, train, val = read_image_folder(tmp_path)
    assert classes == ["blue", "green", "red"] and [label for _, label in train] == [
        label for _, label in val
    ] == [0, 1, 2]
    assert pretraining.Darknet53Classifier(tiny(tmp_path, tmp_path)).linear.out_features == 3


def test_wrong_layouts_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="train is not in ImageNet's layout.*Expected train/CLASS"):
        read_image_folder(tmp_path)
    write_image(tmp_path / "train/only/1.jpg", 0, 0)
    with pytest.raises(ValueError, match=r"has only the class \['only'\]"):
        read_image_folder(tmp_path)
    write_image(tmp_path / "train/other/1.jpg", 1, 0)
    write_image(tmp_path / "val/third/1.jpg", 1, 0)
    with pytest.raises(ValueError, match=r"classes without training images: \['third'\]"):
        read_image_folder(tmp_path)
    (tmp_path / "val/val_annotations.txt").write_text("1.jpg\tonly\n2.jpg\tnobody\n")
    with pytest.raises(ValueError, match="val_annotations.txt, line 2"):
        read_image_folder(tmp_path)


def test_an_unreadable_image_is_named(folder, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    dataset = ClassificationDataset(
        [(str(tmp_path / "bad.jpg"), 0)], tiny(folder, tmp_path), training=True
    )
    with pytest.raises(ValueError, match="bad.jpg"):
        dataset[0]


def test_a_sample_depends_on_its_number_only(folder, tmp_path):
    data, again = (PretrainDataModule(tiny(folder, tmp_path)).train_data for _ in range(2))
    for sample_id in (5, 30, 5):
        assert (
            torch.equal(data[sample_id][0], again[sample_id][0])
            and data[sample_id][1] == (sample_id % 24) // 8
        )
    assert not torch.equal(data[5][0], data[29][0])
    assert data[5][0].shape == (32, 32, 3) and data[3 * 24][0].shape == (64, 64, 3), (
        "the last epoch has the final size"
    )


def test_it_learns_and_its_backbone_starts_detectors(run):
    config, backbone = run
    card = (backbone / "README.md").read_text()
    assert "top-1 accuracy | 100.0%" in card and "24 images of 3 classes" in card
    assert is_backbone(backbone)
    saved = build_model(
        Config(width=0.125, pretrained_weights=str(backbone), image_size=96, classes=("a", "b"))
    )
    fresh = build_model(Config(width=0.125, image_size=96, classes=("a", "b")))
    assert not torch.equal(saved.backbone.stem[0].weight, fresh.backbone.stem[0].weight)
    for one, other in zip(saved.heads.parameters(), fresh.heads.parameters(), strict=True):
        assert torch.equal(one, other)
    model = YOLOv3(5, 0.125)
    load_backbone(model, backbone)
    assert read_metadata(backbone)["classes"] == 3
    state = torch.load(f"{config.run_dir}/{LAST}", weights_only=True)["state_dict"]
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, state[f"backbone.{name}"], rtol=1e-3, atol=1e-4)


def test_accuracies_count_the_best_and_the_five_best_classes(folder, tmp_path):
    module, logged = pretraining.Darknet53Classifier(tiny(folder, tmp_path)), {}
    logits = torch.arange(7.0).repeat(4, 1)
    module.forward, module.log_dict = (
        lambda images: logits,
        lambda values, **_: logged.update(values),
    )
    module.validation_step(
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([6, 5, 2, 1])), 0
    )
    assert logged["val/top1"] == 0.25 and logged["val/top5"] == 0.75


def test_another_width_is_refused(run):
    with pytest.raises(
        ValueError, match=r"width 0.125, but the network has width 0.25. Set Config.width=0.125"
    ):
        build_model(Config(width=0.25, pretrained_weights=str(run[1])))


def test_an_interrupted_run_ends_with_the_same_weights(folder, run, tmp_path, monkeypatch):
    steps = iter(range(100))

    def crash(self, batch, number, step=pretraining.Darknet53Classifier.training_step):
        if next(steps) == 15:
            raise KeyboardInterrupt
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Darknet53Classifier, "training_step", crash)
        with pytest.raises(BaseException):  # noqa: B017
            pretrain(tiny(folder, tmp_path))
    pretrain(tiny(folder, tmp_path))
    resumed, whole = (
        torch.load(f"{path}/{LAST}", weights_only=True)["state_dict"]
        for path in (tmp_path, run[0].run_dir)
    )
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_other_settings_are_refused_on_resume(folder, run):
    with pytest.raises(ValueError, match="label_smoothing is 0.0"):
        pretrain(run[0].replace(label_smoothing=0.0))


def test_fewer_images_than_a_batch_are_one_batch(folder, tmp_path):
    data = PretrainDataModule(tiny(folder, tmp_path, batch_size=1000))
    assert [len(images) for images, _ in data.train_dataloader()] == [len(data.train_data)]
