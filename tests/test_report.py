"""The results table, and the commands that export and measure weights."""

import json
import sys

import pytest

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training.fit import evaluate, load_detector
from src.training.metrics import Evaluation
from src.training.report import ResultsTable, main, measure, write
from tests.runs import tiny
from tests.test_rooms import ROOT


def test_course_targets_are_lower_at_reduced_width(tmp_path):
    accuracies = {
        "class": 0.76,
        "no_object@0.05": 0.96,
        "object@0.05": 0.72,
        "no_object@0.5": 1.0,
        "object@0.5": 0.1,
    }
    evaluation = Evaluation(accuracies, {"COCO AP@.5": 0.5}, [], [], [])
    for width, targets, verdict in ((0.5, (75, 95, 70), "pass"), (1.0, (80, 98, 78), "not yet")):
        table = repr(ResultsTable(evaluation, tiny(tmp_path, width=width)))
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]
        assert rows[2:] == [
            ["class accuracy", f"{targets[0]}%", "76.00%", "76.00%", verdict],
            ["no-object accuracy", f"{targets[1]}%", "96.00%", "100.00%", verdict],
            ["object accuracy", f"{targets[2]}%", "72.00%", "10.00%", verdict],
            ["COCO AP@.5", "", "0.5000", "", ""],
        ]


def test_measuring_without_voc_says_what_is_missing_and_downloads_nothing(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    monkeypatch.setenv("VOC_ROOT", str(empty))
    monkeypatch.setattr(sys, "argv", ["report", str(ROOT / "weights")])
    with pytest.raises(SystemExit, match="VOC_ROOT") as error:
        main()
    assert str(empty) in str(error.value) and not empty.exists()


def test_exported_weights_have_card_log_and_settings(trained_run, tmp_path):
    config = Config.load(trained_run / "config.json")
    table = write(trained_run, tmp_path)
    evaluation = table.evaluation
    card = (tmp_path / "README.md").read_text()
    assert repr(table) in card
    assert "| initial weights | random |" in card and "(6 images)" in card
    assert (tmp_path / "metrics.csv").read_bytes() == (trained_run / "metrics.csv").read_bytes()
    trained = evaluate(load_detector(trained_run), DetectionDataModule(config))
    assert evaluation.precisions == pytest.approx(trained.precisions, abs=0.02)  # half precision
    assert evaluation.accuracies == pytest.approx(trained.accuracies, abs=0.02)
    validation = json.loads((tmp_path / "validation.json").read_text())
    rows = [(row["class"], row["num_gt"]) for row in evaluation.per_class]
    assert [(row["class"], row["num_gt"]) for row in validation["per_class"]] == rows
    assert sum(sum(row[:-1]) for row in validation["confusion"][:-1]) <= sum(n for _, n in rows)
    again, _ = measure(tmp_path, Config.load(tmp_path / "run.json"))
    assert again.accuracies == evaluation.accuracies and again.precisions == evaluation.precisions
    assert Config.load(tmp_path / "run.json").replace(data_root=config.data_root) == config
