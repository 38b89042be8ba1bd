"""The commands that export and measure weights."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from src.config import SHAPE_CLASSES, Config
from src.data.datamodule import DetectionDataModule
from src.model.network import YOLOv3
from src.model.pretrained import save_backbone
from src.training.fit import evaluate, fit, load_detector
from src.training.model_card import describe_start, measure, write

ROOT = Path(__file__).parents[1]


def check(folder, voc_root):
    command = [sys.executable, "-m", "src.training.model_card", "check", str(folder)]
    environment = {"PATH": "/usr/bin:/bin", "VOC_ROOT": str(voc_root)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_measuring_without_voc_says_what_is_missing_and_downloads_nothing(tmp_path):
    result = check("weights", tmp_path / "empty")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert str(tmp_path / "empty") in line and "val.txt is missing" in line and "VOC_ROOT" in line
    assert not (tmp_path / "empty").exists()


def test_exported_weights_have_card_log_and_settings(tmp_path):
    config = Config(
        dataset="shapes",
        classes=SHAPE_CLASSES,
        image_size=64,
        width=0.125,
        epochs=1,
        batch_size=4,
        shapes_train=8,
        shapes_val=6,
        close_mosaic_epochs=0,
        max_lr=1e-3,
        num_workers=0,
        cache_gb=0,
        precision="32-true",
        run_dir=str(tmp_path / "run"),
    )
    fit(config)
    evaluation = write(tmp_path / "run", tmp_path / "weights", limits="Bad at everything.")
    card = (tmp_path / "weights/README.md").read_text()
    assert (
        f"| class accuracy | {evaluation.accuracies['class']:.1%} |" in card
        and "Bad at everything." in card
    )
    assert "scratch (no pretrained weights)" in card and "6 images: synthetic" in card
    assert (tmp_path / "weights/metrics.csv").read_text() == (
        tmp_path / "run/metrics.csv"
    ).read_text()
    trained = evaluate(load_detector(tmp_path / "run"), DetectionDataModule(config))
    assert evaluation.precisions == pytest.approx(trained.precisions, abs=0.02)  # half precision
    assert evaluation.accuracies == pytest.approx(trained.accuracies, abs=0.02)
    again, _ = measure(tmp_path / "weights")
    assert again.accuracies == evaluation.accuracies and again.precisions == evaluation.precisions
    assert (
        Config.load(tmp_path / "weights/run.json").replace(
            run_dir=config.run_dir, data_root=config.data_root
        )
        == config
    )


def test_weights_of_own_data_are_measured_on_it(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / "mine/images" / split
        folder.mkdir(parents=True)
        (tmp_path / "mine/labels" / split).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(folder / f"{number}.png")
            (tmp_path / "mine/labels" / split / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "mine/data.yaml").write_text(
        "train: images/train\nval: images/val\nnames: [square]\n"
    )
    config = Config(
        data_root=str(tmp_path / "mine"),
        image_size=64,
        width=0.125,
        epochs=1,
        batch_size=4,
        max_lr=1e-3,
        num_workers=0,
        cache_gb=0,
        precision="32-true",
        run_dir=str(tmp_path / "run"),
    )
    fit(config)
    evaluation = write(tmp_path / "run", tmp_path / "weights")
    assert [row["class"] for row in evaluation.per_class] == ["square"]
    assert Config.load(tmp_path / "weights/run.json").data_root == config.data_root


def test_a_pretrained_backbone_is_named_on_the_card(tmp_path):
    facts = {"data": "Some ImageNet", "images": 1000, "classes": 10, "top1": 0.5}
    save_backbone(YOLOv3(1, 0.125).backbone, tmp_path, 0.125, facts)
    text = describe_start(Config(width=0.125, pretrained_weights=str(tmp_path)))
    assert "Some ImageNet (1,000 images, 10 classes, top-1 accuracy 50.0%)" in text
    detector = YOLOv3(1, 0.125)
    detector.metadata = {"data": "Some VOC", "epochs": "3 of 4"}
    detector.save_pretrained(tmp_path / "detector")
    text = describe_start(Config(width=0.125, pretrained_weights=str(tmp_path / "detector")))
    assert text.endswith("trained for 3 of 4 epochs on Some VOC")
    detector.metadata = {}
    detector.save_pretrained(tmp_path / "detector")
    assert (
        describe_start(Config(width=0.125, pretrained_weights=str(tmp_path / "detector")))
        == "detector"
    )
