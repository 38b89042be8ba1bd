"""The benchmarks' baselines return what src returns, and every command runs with tiny settings."""

import json
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import ablations, baselines, evaluation, gpu, loader, ultralytics
from benchmarks.__main__ import COMMANDS, PARTS, main
from benchmarks.synthetic_inputs import random_logits, write_jpegs
from benchmarks.timing import Row, seconds, table
from src.config import SHAPE_CLASSES, Config
from src.data.cache import ImageCache
from src.data.datamodule import DetectionDataModule
from src.data.mosaic import MosaicDataset
from src.model.network import ANCHORS
from src.training import module
from src.training.loss import YOLOLoss, assign_targets
from src.training.metrics import Evaluation
from tests.test_loss import count_objects, random_targets
from tests.test_metrics import loop_average_precision, loop_curve, random_results

ANCHOR, GRIDS = torch.tensor(ANCHORS), [3, 6, 12]


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in (*PARTS, *COMMANDS))


def test_dense_targets_and_loss_equal_ours():
    """On targets of which no two are assigned to the same cell and anchor."""
    targets, logits = random_targets(8, 4), random_logits(4, image_size=96, classes=4)
    assigned = assign_targets(targets, GRIDS, ANCHOR, 4)
    targets = targets[torch.stack([scale.valid for scale in assigned]).all(dim=0)]
    rows = [targets[targets[:, 0] == image, 1:].tolist() for image in range(4)]
    images = [baselines.dense_targets(objects, GRIDS, ANCHOR) for objects in rows]
    dense = [torch.stack(scale) for scale in zip(*images, strict=True)]
    for grid, assigned in zip(dense, assign_targets(targets, GRIDS, ANCHOR, 4), strict=True):
        assert torch.equal(grid[..., 0] == 1, assigned.positive)
        assert torch.equal(grid[..., 0] == -1, assigned.ignored)
    ours = YOLOLoss(Config())(logits, targets, count_objects(targets, 4), ANCHOR)
    for name, value in baselines.dense_loss(logits, dense, ANCHOR, targets).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_baseline_loader_returns_comparable_samples(tmp_path):
    records = write_jpegs(tmp_path, 4)
    ours = MosaicDataset(records, Config(image_size=96), ImageCache(tmp_path / "cache", 4, 96))
    augment = baselines.course_augmentations(96)
    theirs = baselines.BaselineDataset(records, 96, ANCHOR, augment)
    for index in range(4):
        image, dense = theirs[index]
        assert image.shape == ours[index][0].shape and 0 <= image.min() <= image.max() <= 1
        assert [scale.shape for scale in dense] == [(3, grid, grid, 6) for grid in GRIDS]
        rows = np.concatenate([scale[scale[..., 0] == 1][:, 1:5] for scale in dense])
        assert ((rows >= 0) & (rows <= 1)).all()


def test_table_compares_ratios_with_their_targets():
    rows = [
        Row("a", "1 ms", "b, 5 ms", 5.0, 4),
        Row("c", "2 s", "d, 1 s", 2.0, 1.1, upper_bound=True),
        Row("e", "", "", 1.0),
    ]
    assert [row.met for row in rows] == ["met", "not met", "-"]
    lines = table(rows).splitlines()
    assert len(lines) == 5 and len(set(map(len, lines))) == 1 and "at most 1.1x" in lines[3]
    assert seconds(lambda: sum(range(20000)), lambda: None, rounds=2)[0] > 0


def test_loader_and_evaluation_rows_at_small_size(monkeypatch):
    monkeypatch.setattr(evaluation, "IMAGES", 4)
    monkeypatch.setattr(evaluation, "BATCH", 2)
    monkeypatch.setattr(loader, "IMAGES", 3)
    monkeypatch.setattr(loader, "IMAGE_SIZE", 64)
    monkeypatch.setattr(
        loader, "samples_per_second", lambda dataset, batch_size, workers: 10.0 * workers
    )
    rows = [*evaluation.rows(), *loader.rows()]
    assert len(rows) == 5 and all(0 < row.ratio < float("inf") for row in rows)
    assert rows[-1].ratio == 2 and all(len(row.cells()) == 6 for row in rows)


def test_gpu_measures_a_cpu_too(capsys):
    gpu.main("--size 64 --width 0.0625 --batch 2 --steps 2".split())
    printed = capsys.readouterr().out
    assert "prediction: finite" in printed and "images/s" in printed


def test_data_for_ultralytics_are_a_yolo_data_set(tmp_path):
    ultralytics.write_data(tmp_path, 3)
    config = Config(dataset="yolo", data_root=str(tmp_path), image_size=64, cache_gb=0)
    data = DetectionDataModule(config)
    data.setup()
    assert data.config.classes == SHAPE_CLASSES and len(data.val_records) == 3
    assert sum(len(record.labels) for record in data.train_records) > 0


def options(*arguments) -> ablations.argparse.Namespace:
    with mock.patch.object(ablations, "train") as train:
        ablations.main(["baseline", *arguments])
    return train.call_args.args[1]


@pytest.mark.parametrize("name", ablations.CHANGES)
def test_each_change_changes_the_settings_or_what_it_replaces(name):
    change = ablations.CHANGES[name]
    base = ablations.configure("baseline", options("--backbone", "weights/backbone"))
    config = ablations.configure(name, options("--backbone", "weights/backbone"))
    differs = config.replace(run_dir=base.run_dir) != base
    assert differs == bool(change.settings or name == "multi")
    if change.replacements:
        plain = loss_and_constants(ablations.BASE)
        with ExitStack() as stack:
            for target, replacement in change.replacements.items():
                stack.enter_context(mock.patch(target, replacement))
            changed = loss_and_constants(ablations.BASE)
        assert (changed - plain).abs().max() > 1e-3


def loss_and_constants(config: Config) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 3, grid, grid, 25, generator=random) for grid in (5, 10, 20)]
    targets = random_targets(30, 4)
    loss = module.YOLOLoss(config)(logits, targets, count_objects(targets, 4), ANCHOR)["loss"]
    weights = module.build_model(config).parameters()
    return torch.cat([loss[None], *(weight.detach() for weight in weights if weight.ndim == 1)])


def test_table_of_ablations_compares_runs_with_the_same_seed(tmp_path):
    values = {"baseline-0": 0.2, "baseline-1": 0.3, "box-1-1": 0.4, "box-1-2": 0.2}
    for name, value in values.items():
        (tmp_path / name).mkdir()
        result = {"micro_AP50": value, "mAP50": value / 2, "class": value + 0.1, "object@0.05": 0.5}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    rows = ablations.table(tmp_path).splitlines()[2:]
    assert rows[0] == "| none (`baseline`) | 0.200 0.300 | +0.000 +0.000 | 0.125 | 35.0 | 50.0 |"
    assert rows[1] == "| box weight: 1 (`box-1`) | 0.400 0.200 | +0.100 ? | 0.150 | 40.0 | 50.0 |"


@pytest.mark.parametrize("seed", range(3))
def test_micro_average_precision_equals_a_loop(seed):
    """One ranking of all classes; a detection matches objects of its image and class only."""
    results = random_results(seed)
    rows = [[[3 * row[0] + row[1], 0, *row[2:]] for row in part.tolist()] for part in results]
    expected = loop_average_precision(loop_curve(*rows, label=0, course=False)[0], "area")
    measured = ablations.micro_average_precision(Evaluation({}, {}, [], *results))
    assert 0.2 < expected < 0.95 and measured == pytest.approx(expected, abs=1e-6)
