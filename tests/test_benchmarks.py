"""The benchmarks' baselines return what src returns, so that their times can be compared."""

import importlib
import json
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import ablations, baselines, evaluation, loader, run_ablations, train_voc
from benchmarks.__main__ import PARTS
from benchmarks.synthetic_inputs import background_logits, write_jpegs
from benchmarks.timing import Row, seconds, table
from src.config import Config
from src.data.cache import ImageCache
from src.data.mosaic import MosaicDataset
from src.data.records import make_record
from src.data.shapes import draw_shapes
from src.model.network import ANCHORS
from src.training import module
from src.training.loss import YOLOLoss, assign_targets
from src.training.metrics import Evaluation, average_precision
from tests.test_loss import random_targets
from tests.test_metrics import iou, random_results

ANCHOR, GRIDS = torch.tensor(ANCHORS), [3, 6, 12]


def targets_in_different_cells(images: int, seed: int = 0) -> torch.Tensor:
    """Random targets of which no two are assigned to the same cell and anchor."""
    targets = random_targets(2 * images, images, seed=seed)
    assigned = assign_targets(targets, GRIDS, ANCHOR, images)
    return targets[torch.stack([scale.valid for scale in assigned]).all(dim=0)]


def test_dense_targets_and_loss_equal_ours():
    targets, logits = targets_in_different_cells(4), background_logits(4, image_size=96, classes=4)
    images = [
        baselines.dense_targets(targets[targets[:, 0] == i, 1:].tolist(), GRIDS, ANCHOR)
        for i in range(4)
    ]
    dense = [torch.stack(scale) for scale in zip(*images, strict=True)]
    for grid, assigned in zip(dense, assign_targets(targets, GRIDS, ANCHOR, 4), strict=True):
        assert torch.equal(grid[..., 0] == 1, assigned.positive)
        assert torch.equal(grid[..., 0] == -1, assigned.ignored)
    ours = YOLOLoss(Config())(logits, targets, ANCHOR)
    for name, value in baselines.dense_loss(logits, dense, ANCHOR, targets).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_loops_compute_the_same_average_precision(monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 4)
    _, values, candidates = evaluation.evaluate(8)
    assert candidates > 0
    for loop_iou in (baselines.tensor_iou, baselines.float_iou):
        assert evaluation.evaluate_by_loops(8, loop_iou)[1] == pytest.approx(values["ap"], abs=1e-4)


def test_baseline_loaders_return_comparable_samples(tmp_path):
    records = write_jpegs(tmp_path, 4)
    ours = MosaicDataset(records, Config(image_size=96), ImageCache(tmp_path / "cache", 4, 96))
    for pipeline in (baselines.course_augmentations, baselines.same_augmentations):
        theirs = baselines.BaselineDataset(records, 96, ANCHOR, pipeline(96))
        for index in range(4):
            image, dense = theirs[index]
            assert image.shape == ours[index][0].shape and 0 <= image.min() <= image.max() <= 1
            assert [scale.shape for scale in dense] == [(3, grid, grid, 6) for grid in GRIDS]
            rows = np.concatenate([scale[scale[..., 0] == 1][:, 1:5] for scale in dense])
            assert ((rows >= 0) & (rows <= 1)).all()


@pytest.mark.parametrize("name", PARTS)
def test_each_part_imports_and_has_rows(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").rows)


def test_peers_job_of_this_project_imports():
    assert callable(importlib.import_module("benchmarks.peers.ours").start)


def test_table_compares_ratios_with_their_targets():
    rows = [
        Row("a", "1 ms", "b, 5 ms", 5.0, 4),
        Row("c", "2 s", "d, 1 s", 2.0, 1.1, upper_bound=True),
        Row("e", "", "", 1.0),
    ]
    assert [row.met for row in rows] == ["met", "not met", "-"]
    lines = table(rows).splitlines()
    assert (
        len(lines) == 5 and len({len(line) for line in lines}) == 1 and "at most 1.1x" in lines[3]
    )
    assert seconds(lambda: sum(range(20000)), lambda: None, rounds=2)[0] > 0


LOSSES = [
    name
    for name in ablations.CHANGES
    if name.startswith(("box", "object", "class", "ignore", "positives"))
]


@pytest.mark.parametrize("name", LOSSES)
def test_each_change_of_the_loss_changes_its_value(name):
    change, targets = ablations.CHANGES[name], random_targets(30, 4)
    random = torch.Generator().manual_seed(0)
    logits = [
        torch.randn(4, 3, grid, grid, 25, generator=random).requires_grad_() for grid in (5, 10, 20)
    ]
    baseline = module.YOLOLoss(ablations.BASE)(logits, targets, ANCHOR)["loss"]
    with ExitStack() as stack:
        for target, replacement in change.replacements.items():
            stack.enter_context(mock.patch(target, replacement))
        changed = module.YOLOLoss(change.config(ablations.BASE))(logits, targets, ANCHOR)["loss"]
    changed.backward()
    assert changed.isfinite() and abs(changed - baseline) > 1e-3
    assert all(level.grad.isfinite().all() for level in logits)


@pytest.mark.parametrize("name", ablations.CHANGES)
def test_each_change_replaces_names_and_settings_that_exist(name):
    change, base = ablations.CHANGES[name], run_ablations.base_config(20, 160, "both", "folder")
    for target, replacement in change.replacements.items():
        with mock.patch(target, replacement):  # raises AttributeError if the name is gone
            pass
    if name != "anchors-kmeans":  # reads the data set
        assert (change.config(base) == base) == (not change.settings)


def test_loader_and_evaluation_rows_at_small_size(monkeypatch):
    for name, value in {"IMAGES": 4, "BATCH": 2, "SUBSET": 2}.items():
        monkeypatch.setattr(evaluation, name, value)
    monkeypatch.setattr(loader, "IMAGES", 3)
    monkeypatch.setattr(loader, "IMAGE_SIZE", 64)
    monkeypatch.setattr(
        loader, "samples_per_second", lambda dataset, batch_size, workers: 10.0 * workers
    )
    rows = [*evaluation.rows(), *loader.rows()]
    assert len(rows) == 9 and all(0 < row.ratio < float("inf") for row in rows)
    assert rows[-2].ratio == 2 and all(len(row.cells()) == 6 for row in rows)


def test_mixup_joins_the_objects_of_two_samples_until_mosaics_end():
    config = Config(dataset="shapes", image_size=64, epochs=4, close_mosaic_epochs=2)
    data, count = MosaicDataset(draw_shapes(6), config), 0
    for sample_id in range(4 * len(data)):
        (image, boxes, labels), plain = ablations.mixup_sample(data, sample_id), data[sample_id]
        mixed = len(labels) > len(plain[2])
        assert mixed or torch.equal(image, plain[0])
        assert torch.equal(boxes[: len(plain[1])], plain[1]) and len(boxes) == len(labels)
        count += mixed
        assert not (mixed and sample_id >= 2 * len(data))
    assert count > 0


def test_rare_classes_are_drawn_more_often():
    config = Config(dataset="shapes", image_size=64, mosaic_prob=1.0)
    images = [record.image for record in draw_shapes(9)]
    box = [0, 0, 9, 9]
    records = [
        make_record(image, [box, box], [int(i == 0), 0], [0, 0])
        for i, image in enumerate(images[:8])
    ]
    data = MosaicDataset([*records, make_record(images[8], [], [], [])], config)
    weights = ablations.rare_class_weights(data)
    assert weights.sum() == pytest.approx(1)
    assert weights / weights[8] == pytest.approx([3, *[(9 / 8) ** 0.5] * 7, 1])
    with mock.patch.object(data, "image", wraps=data.image) as image:
        canvases = [
            ablations.rare_class_mosaic(data, 1, np.random.default_rng(seed))[0]
            for seed in (*range(300), 0)
        ]
    assert np.array_equal(canvases[0], canvases[-1])
    drawn = [call.args[0] for call in image.call_args_list]
    assert all(first == 1 for first in drawn[::4])
    counts = np.bincount(drawn, minlength=9) - [0, 301, *[0] * 7]
    assert counts / counts.sum() == pytest.approx(weights, abs=0.04)


def test_settings_of_the_runs_on_voc():
    base = run_ablations.base_config(20, 224, "both")
    assert base.train_splits == ("2007/train", "2012/train") and base.val_splits == (
        "2007/val",
        "2012/val",
    )
    assert (base.epochs, base.image_size, base.close_mosaic_epochs) == (20, 224, 2)
    assert run_ablations.base_config(6, 160, "2012") == ablations.BASE.replace(
        epochs=6, close_mosaic_epochs=1
    )
    multi = train_voc.settings("multi", 80, 224, "folder", "both", 6e-3, 0.1)
    assert (
        multi.multiscale_sizes == (160, 192, 224, 256, 288) and multi.pretrained_weights == "folder"
    )
    assert multi.close_mosaic_epochs == 8
    assert multi.run_dir != train_voc.settings("multi", 80, 224, "", "both", 6e-3, 0.1).run_dir
    assert train_voc.sizes(128) == (96, 128, 160) and train_voc.sizes(32) == (32,)


def test_table_of_ablations_compares_runs_with_the_same_seed(tmp_path):
    for name, value in {
        "baseline-0": 0.2,
        "baseline-1": 0.3,
        "box-1-1": 0.4,
        "box-1-2": 0.2,
    }.items():
        (tmp_path / name).mkdir()
        result = {"micro_AP50": value, "mAP50": value / 2, "class": value + 0.1, "object@0.05": 0.5}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    rows = run_ablations.table(tmp_path).splitlines()[2:]
    assert rows[0] == "| none (`baseline`) | 0.200 0.300 | +0.000 +0.000 | 0.125 | 35.0 | 50.0 |"
    assert rows[1] == "| box weight: 1 (`box-1`) | 0.400 0.200 | +0.100 ? | 0.150 | 40.0 | 50.0 |"


@pytest.mark.parametrize("seed", range(3))
def test_micro_average_precision_equals_a_loop(seed):
    """The loop ranks all classes together; a detection matches objects of its class only."""
    predictions, ground_truth = random_results(seed)
    matched, correct = set(), []
    for row in sorted(predictions, key=lambda row: -row[2]):
        objects = [
            number for number, other in enumerate(ground_truth) if (other[:2] == row[:2]).all()
        ]
        best = max(objects, key=lambda number: iou(row[3:], ground_truth[number, 3:]), default=None)
        hit = best is not None and iou(row[3:], ground_truth[best, 3:]) >= 0.5
        if hit and ground_truth[best, 2]:
            continue  # difficult
        correct.append(hit and best not in matched)
        matched |= {best} if hit else set()
    true = np.cumsum(correct)
    expected = average_precision(
        true / np.arange(1, len(correct) + 1), true / (ground_truth[:, 2] == 0).sum(), "area"
    )
    measured = run_ablations.micro_average_precision(
        Evaluation({}, {}, [], predictions, ground_truth)
    )
    assert 0.2 < expected < 0.95 and measured == pytest.approx(expected, abs=1e-6)
