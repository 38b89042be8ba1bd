"""Heatmaps: equal to plain autograd, one per object, measured by insertion and deletion."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from src.serving.gradcam import LAYERS, MAX_EXPLAINED, METHODS, Explainer, explain
from src.serving.predictor import Candidates, Detections, Predictor
from src.training.faithfulness import FRACTIONS, insertion_deletion
from tests.planted import blurred_noise, planted_model

ROOT = Path(__file__).parents[1]
IMAGE = blurred_noise()


@pytest.fixture(scope="module")
def predictor():
    return Predictor(planted_model(), device="cpu")


@pytest.fixture(scope="module")
def explainers():
    """Explainers of the sample photographs with the shipped weights."""
    trained = Predictor.load(ROOT / "weights", device="cpu")
    return [Explainer(trained, path) for path in sorted(ROOT.glob("weights/samples/*.jpg"))]


def slow_map(predictor, index, label, stages, method):
    """Compute the heatmap [96, 96] of one prediction by autograd through the whole network."""
    model, features, heatmap = copy.deepcopy(predictor.model), {}, 0
    for stage in stages:
        model.backbone.stages[stage - 1].register_forward_hook(
            lambda _, __, output, stage=stage: features.update({stage: output})
        )
    logits = model(predictor.preprocess(IMAGE)[0])
    prediction = torch.cat([level.flatten(1, 3) for level in logits], dim=1)[0, index]
    score = (prediction[0].sigmoid() * prediction[5 + label].sigmoid()).log()
    for feature in features.values():
        gradient = torch.autograd.grad(score, feature, retain_graph=True)[0]
        weights = {
            "layercam": gradient.relu(),
            "hirescam": gradient,
            "gradcam": gradient.mean(dim=(2, 3), keepdim=True),
        }
        layer = (weights[method] * feature).sum(dim=1, keepdim=True).relu()
        heatmap += interpolate(layer / layer.max().clamp(min=1e-9), size=(96, 96), mode="bilinear")
    return (heatmap / heatmap.max().clamp(min=1e-9))[0, 0].detach().numpy()


@pytest.mark.parametrize("method", ["layercam", "hirescam", "gradcam"])
@pytest.mark.parametrize(("layers", "stages"), [("all", (3, 4, 5)), ("8", (3,)), ("32", (5,))])
def test_heatmaps_equal_plain_autograd(layers, stages, method, predictor):
    found = predictor(IMAGE, 0.2)
    assert len({*np.digitize(found.index, [27])}) == 2  # from two scales
    for row in (0, 1, len(found) - 1):
        expected = slow_map(predictor, found.index[row], found.labels[row], stages, method)
        result = explain(predictor, IMAGE, row, layers, method, confidence=0.2)
        assert result.explained.tolist() == [row]
        assert result.heatmap == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", LAYERS)
def test_every_method_on_every_layer(method, layers, predictor):
    result = explain(predictor, IMAGE, "all", layers, method, confidence=0.45)
    assert result.heatmap.shape == (96, 96) and result.heatmap.dtype == np.float32
    assert result.heatmap.min() >= 0 and result.heatmap.max() == pytest.approx(1)
    assert result.explained.tolist() == [*range(len(result.detections))] and not result.message


def test_a_class_and_all_give_the_maximum_of_their_detections(predictor):
    for target in ("all", *predictor.classes):
        result = explain(predictor, IMAGE, target, confidence=0.4)
        names = [predictor.classes[label] for label in result.detections.labels]
        rows = [row for row, name in enumerate(names) if target in ("all", name)]
        assert result.explained.tolist() == rows != []
        alone = [explain(predictor, IMAGE, row, confidence=0.4).heatmap for row in rows]
        assert result.heatmap == pytest.approx(np.max(alone, axis=0), abs=1e-4)


def test_the_best_of_many_detections_are_explained(predictor):
    result = explain(predictor, IMAGE, confidence=0.02, iou_threshold=0.95)
    assert len(result.detections) > MAX_EXPLAINED
    assert result.explained.tolist() == [*range(MAX_EXPLAINED)]
    assert f"best {MAX_EXPLAINED} of {len(result.detections)}" in result.message


@pytest.mark.parametrize(
    ("name", "value"),
    [("target", "cow"), ("target", 99), ("target", -1), ("layers", "2"), ("method", 0)],
)
def test_unknown_arguments_are_named(name, value, predictor):
    with pytest.raises(ValueError, match=f"Unknown {name} .*{value}"):
        explain(predictor, IMAGE, confidence=0.2, **{name: value})


@pytest.mark.parametrize(("target", "label"), [("all", None), (0, None), ("star", 2)])
def test_without_detections_the_top_candidate_is_explained(target, label, predictor):
    result = explain(predictor, IMAGE, target, confidence=0.99)
    best = predictor.candidates(IMAGE).top_candidate(label)
    missing = "detection" if label is None else target
    assert result.is_candidate and f"No {missing} above 99%" in result.message
    assert predictor.classes[best.labels[0]] in result.message
    assert result.detections.index == best.index and [*result.explained] == [0]


def test_the_model_is_not_changed(predictor):
    before = copy.deepcopy(predictor.fused.state_dict())
    for method in METHODS:
        explain(predictor, IMAGE, method=method, confidence=0.3)
    after = predictor.fused.state_dict()
    assert all(map(torch.equal, after.values(), before.values()))
    assert all(parameter.grad is None for parameter in predictor.fused.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, predictor):
    half = explain(Predictor(planted_model().to(dtype), device="cpu"), IMAGE, 0, confidence=0.2)
    row = predictor(IMAGE, 0.2).index.tolist().index(half.detections.index[0])
    exact = explain(predictor, IMAGE, row, confidence=0.2)
    assert np.corrcoef(half.heatmap.ravel(), exact.heatmap.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (300, 40), (31, 97), (6000, 6000)])
def test_any_size(size, predictor):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    heatmap = explain(predictor, noise, 0, confidence=0.2).heatmap
    assert heatmap.shape == size and heatmap.min() >= 0 and heatmap.max() == pytest.approx(1)


def test_letterbox_bars_are_cropped(predictor):
    """An image with its own grey bars has the same heatmap as without, inside the bars."""
    barred = np.full((96, 96, 3), 114, np.uint8)
    barred[16:80] = IMAGE[16:80]
    expected = explain(predictor, barred, 0, confidence=0.2).heatmap[16:80]
    heatmap = explain(predictor, IMAGE[16:80], 0, confidence=0.2).heatmap
    assert heatmap == pytest.approx(expected / expected.max(), abs=1e-4)


def test_two_objects_have_different_heatmaps(explainers):
    explainer = max(explainers, key=lambda each: len(each.candidates.detections(0.5)))
    maps = [explainer.explain(row, "32", confidence=0.5).heatmap for row in (0, 1)]
    assert np.abs(maps[0] - maps[1]).max() > 0.5


def test_most_heatmaps_peak_in_their_own_box(explainers):
    """A check of coordinates and targets alone: any blob at the centre of a box would pass.

    Whether a heatmap marks the evidence is measured by `python -m benchmarks heatmaps`.
    """
    hits = []
    for explainer in explainers:
        for row, (x1, y1, x2, y2) in enumerate(explainer.candidates.detections(0.5).boxes):
            heatmap = explainer.explain(row, confidence=0.5).heatmap
            y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
            hits.append(x1 <= x + 0.5 <= x2 and y1 <= y + 0.5 <= y2)
    assert len(hits) >= 5 and np.mean(hits) >= 0.8, hits


def test_insertion_and_deletion_tell_evidence_from_background():
    """The detector's score of a white square on grey is 0.8 times how much of it is white.

    Two other candidates have higher scores, for another class or at another box.
    """

    def candidates(image):
        white = (image[40:60, 40:60] == 255).mean()
        scores = torch.tensor([[0.8 * white, 0.9], [0.9, 0.0]])
        boxes = torch.tensor([[40.0, 40, 60, 60], [40, 40, 49, 60]])
        return Candidates(boxes, scores, torch.arange(2), (100, 100))

    detector, image = SimpleNamespace(candidates=candidates), np.full((100, 100, 3), 80, np.uint8)
    image[40:60, 40:60] = 255  # 4% of the pixels
    square = Detections(np.float32([[40, 40, 60, 60]]), np.float32([0.8]), np.zeros(1, int), None)
    evidence = (image[..., 0] == 255).astype(float)
    shown = np.mean([min(fraction / 0.04, 1) for fraction in FRACTIONS])
    for heatmap, expected in ((evidence, (shown, 1 - shown)), (1 - evidence, (0, 1))):
        measured = insertion_deletion(detector, image, square, 0, heatmap)
        assert measured == pytest.approx(expected)
