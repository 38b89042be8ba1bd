"""The results table, and the commands that export and measure weights."""

import sys

import pytest
from PIL import Image

from src.config import REPOSITORY, Config
from src.data.datamodule import DetectionDataModule
from src.training.fit import evaluate, fit, load_detector
from src.training.report import course_targets, main, measure, result_rows, write
from tests.runs import tiny


def test_course_targets_are_lower_at_reduced_width(tmp_path):
    assert list(course_targets(tiny(tmp_path)).values()) == [0.75, 0.95, 0.70]
    assert list(course_targets(tiny(tmp_path, width=1.0)).values()) == [0.80, 0.98, 0.78]
    accuracies = {
        "class": 0.76,
        "no_object@0.05": 0.96,
        "object@0.05": 0.72,
        "no_object@0.5": 1.0,
        "object@0.5": 0.1,
    }
    for width, passed in ((0.5, True), (1.0, False)):
        rows = result_rows(accuracies, tiny(tmp_path, width=width))
        assert [row["passed"] for row in rows] == [passed] * 3
        assert [row["strict"] for row in rows] == [0.76, 1.0, 0.1]


def test_measuring_without_voc_says_what_is_missing_and_downloads_nothing(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    monkeypatch.setenv("VOC_ROOT", str(empty))
    monkeypatch.setattr(sys, "argv", ["report", "check", str(REPOSITORY / "weights")])
    with pytest.raises(SystemExit, match="VOC_ROOT") as error:
        main()
    assert str(empty) in str(error.value) and not empty.exists()


def test_exported_weights_have_card_log_and_settings(trained_run, tmp_path):
    config = Config.load(trained_run / "config.json")
    evaluation = write(trained_run, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"| class accuracy | 75.00% | {evaluation.accuracies['class']:.2%} |" in card
    assert "| initial weights | random |" in card and "(6 images)" in card
    assert (tmp_path / "metrics.csv").read_bytes() == (trained_run / "metrics.csv").read_bytes()
    trained = evaluate(load_detector(trained_run), DetectionDataModule(config))
    assert evaluation.precisions == pytest.approx(trained.precisions, abs=0.02)  # half precision
    assert evaluation.accuracies == pytest.approx(trained.accuracies, abs=0.02)
    again, _ = measure(tmp_path)
    assert again.accuracies == evaluation.accuracies and again.precisions == evaluation.precisions
    assert Config.load(tmp_path / "run.json").replace(data_root=config.data_root) == config


def test_weights_of_own_data_are_measured_on_it(tmp_path):
    for split in ("train", "val"):
        images, labels = (tmp_path / "mine" / part / split for part in ("images", "labels"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(images / f"{number}.png")
            (labels / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    settings = "train: images/train\nval: images/val\nnames: [square]\n"
    (tmp_path / "mine/data.yaml").write_text(settings)
    own = {"dataset": "voc", "classes": Config().classes, "data_root": str(tmp_path / "mine")}
    config = tiny(tmp_path / "run", epochs=1, **own)
    fit(config)
    evaluation = write(tmp_path / "run", tmp_path / "weights")
    assert [row["class"] for row in evaluation.per_class] == ["square"]
    assert Config.load(tmp_path / "weights/run.json").data_root == config.data_root
