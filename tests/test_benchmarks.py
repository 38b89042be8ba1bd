"""The benchmarks' baselines give what src gives, so their times may be compared."""

import json
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
from torchvision.ops import complete_box_iou_loss

from benchmarks import ablations, baselines, evaluation, run_ablations
from benchmarks.synthetic_inputs import empty_logits, objects, photographs, plant
from benchmarks.timing import Row, seconds, table
from src.config import Config
from src.data.cache import ImageCache
from src.data.mosaic import MosaicDataset
from src.model.boxes import cxcywh_to_xyxy, decode, decode_above
from src.model.network import ANCHORS
from src.serving.predictor import Predictor
from src.training import module
from src.training.loss import YOLOLoss, assign_targets, complete_iou_loss
from src.training.metrics import Evaluation, average_precision
from tests.planted import planted_model
from tests.test_loss import random_targets
from tests.test_metrics import iou, random_results

ANCHOR, GRIDS = torch.tensor(ANCHORS), [3, 6, 12]


def apart(images: int, seed: int = 0) -> torch.Tensor:
    """Targets of which no two want the same cell."""
    targets = random_targets(2 * images, images, seed=seed)
    found = assign_targets(targets, GRIDS, ANCHOR, images)
    return targets[torch.stack([scale.valid for scale in found]).all(dim=0)]


def test_dense_targets_and_loss_equal_ours():
    targets, logits = apart(4), empty_logits(4, side=96, classes=4)
    pictures = [baselines.dense_targets(targets[targets[:, 0] == i, 1:].tolist(), GRIDS, ANCHOR) for i in range(4)]
    dense = [torch.stack(scale) for scale in zip(*pictures, strict=True)]
    for grid, found in zip(dense, assign_targets(targets, GRIDS, ANCHOR, 4), strict=True):
        assert torch.equal(grid[..., 0] == 1, found.positive)
        assert torch.equal(grid[..., 0] == -1, found.ignored)
    ours = YOLOLoss(Config())(logits, targets, ANCHOR)
    for name, value in baselines.dense_loss(logits, dense, ANCHOR, targets).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_complete_iou_equals_torchvisions_with_its_gradient():
    random = torch.Generator().manual_seed(0)
    wanted = torch.rand(50, 4, generator=random) * 0.5 + 0.1
    gradients = []
    for loss in (
        lambda a, b: complete_iou_loss(a, b)[0],
        lambda a, b: complete_box_iou_loss(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)),
    ):
        found = (torch.rand(50, 4, generator=random.manual_seed(1)) * 0.5 + 0.1).requires_grad_()
        value = loss(found, wanted)
        gradients.append((value, *torch.autograd.grad(value.sum(), found)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_loops_find_the_same_average_precision(monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 4)
    _, values, candidates = evaluation.scores(8)
    assert candidates > 0
    for overlap in (baselines.tensor_iou, baselines.float_iou):
        assert evaluation.obvious_scores(8, overlap)[1] == pytest.approx(values["ap"], abs=1e-4)


def test_cells_that_are_sure_enough_are_decoded_as_all_are():
    targets, logits = objects(3, 3), empty_logits(3, side=96)
    plant(logits, targets, ANCHOR)
    boxes, scores = decode(logits, ANCHOR)
    sure = torch.cat([level[..., 0].flatten(1) for level in logits], dim=1).sigmoid() > 0.01
    assert 0 < sure.sum() < sure.numel() / 2
    for image, (some_boxes, some_scores) in enumerate(decode_above(logits, ANCHOR, 0.01)):
        torch.testing.assert_close(some_boxes, boxes[image][sure[image]])
        torch.testing.assert_close(some_scores, scores[image][sure[image]])
        assert (scores[image][~sure[image]] <= 0.01).all()


def test_loaders_give_samples_of_one_kind(tmp_path):
    records = photographs(tmp_path, 4)
    ours = MosaicDataset(records, Config(image_size=96), ImageCache(tmp_path / "cache", 4, 96))
    for pipeline in (baselines.course_augmentations, baselines.same_augmentations):
        theirs = baselines.ObviousDataset(records, 96, ANCHOR, pipeline(96))
        for draw in range(4):
            image, dense = theirs[draw]
            assert image.shape == ours[draw][0].shape and 0 <= image.min() <= image.max() <= 1
            assert [scale.shape for scale in dense] == [(3, grid, grid, 6) for grid in GRIDS]
            rows = np.concatenate([scale[scale[..., 0] == 1][:, 1:5] for scale in dense])
            assert ((rows >= 0) & (rows <= 1)).all()


def test_a_batch_of_pictures_gives_what_one_after_the_other_gives():
    predictor = Predictor(planted_model(64), device="cpu")
    pictures = [np.random.default_rng(n).integers(256, size=(40 + 9 * n, 70, 3), dtype=np.uint8) for n in range(3)]
    many = predictor.batch(pictures)
    assert sum(map(len, many)) > 0
    for picture, found in zip(pictures, many, strict=True):
        alone = predictor(picture)
        np.testing.assert_array_equal(found.labels, alone.labels)
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=0.05)


def test_table_says_what_is_met():
    rows = [Row("a", "1 ms", "b, 5 ms", 5.0, 4), Row("c", "2 s", "d, 1 s", 2.0, 1.1, most=True), Row("e", "", "", 1.0)]
    assert [row.met for row in rows] == ["met", "not met", "-"]
    lines = table(rows).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1 and "at most 1.1x" in lines[3]
    assert seconds(lambda: sum(range(20000)), lambda: None, rounds=2)[0] > 0


LOSSES = [
    name
    for name in ablations.CHANGES
    if name.startswith(("box", "object-", "class", "ignore", "positives")) and "bias" not in name
]


@pytest.mark.parametrize("name", LOSSES)
def test_each_change_of_the_loss_is_one(name):
    change, targets = ablations.CHANGES[name], random_targets(30, 4)
    chance = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 3, grid, grid, 25, generator=chance).requires_grad_() for grid in (5, 10, 20)]
    plain = module.YOLOLoss(ablations.BASE)(logits, targets, ANCHOR)["loss"]
    with ExitStack() as stack:
        for target, instead in change.instead.items():
            stack.enter_context(mock.patch(target, instead))
        changed = module.YOLOLoss(ablations.BASE.replace(**change.settings))(logits, targets, ANCHOR)["loss"]
    changed.backward()
    assert changed.isfinite() and abs(changed - plain) > 1e-3
    assert all(level.grad.isfinite().all() for level in logits)


def test_the_table_of_changes_compares_runs_of_one_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_ablations, "RUNS", tmp_path)
    for name, pooled in {"baseline-0": 0.2, "baseline-1": 0.3, "box-1-1": 0.4, "box-1-2": 0.2}.items():
        (tmp_path / "6" / name).mkdir(parents=True)
        result = {"pooled": pooled, "mAP50": pooled / 2, "class": pooled + 0.1, "object@0.05": 0.5}
        (tmp_path / "6" / name / "result.json").write_text(json.dumps(result))
    rows = run_ablations.table(6).splitlines()[2:]
    assert rows[0] == "| nothing (`baseline`) | 0.200 0.300 | +0.000 +0.000 | 0.125 | 35.0 | 50.0 |"
    assert rows[1] == "| weight of the box term 1 (`box-1`) | 0.400 0.200 | +0.100 ? | 0.150 | 40.0 | 50.0 |"


@pytest.mark.parametrize("seed", range(3))
def test_one_ranking_of_all_classes(seed):
    """Against a loop: classes only say which truth a detection may find."""
    found, truth = random_results(seed)
    taken, right = set(), []
    for row in sorted(found, key=lambda row: -row[2]):
        there = [number for number, other in enumerate(truth) if (other[:2] == row[:2]).all()]
        best = max(there, key=lambda number: iou(row[3:], truth[number, 3:]), default=None)
        hit = best is not None and iou(row[3:], truth[best, 3:]) >= 0.5
        if hit and truth[best, 2]:
            continue  # difficult
        right.append(hit and best not in taken)
        taken |= {best} if hit else set()
    true = np.cumsum(right)
    expected = average_precision(true / np.arange(1, len(right) + 1), true / (truth[:, 2] == 0).sum(), "area")
    assert 0.2 < expected < 0.95 and run_ablations.pooled(Evaluation({}, {}, [], found, truth)) == pytest.approx(
        expected, abs=1e-6
    )
