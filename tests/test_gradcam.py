"""Heat maps: what the library computes, checked against plain autograd; the model left as it was."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from src.config import SHAPE_CLASSES
from src.data.shapes import draw_shapes
from src.serving.gradcam import MAX_EXPLAINED, METHODS, Explainer, explain
from src.serving.predictor import Predictor
from tests.planted import blurred_noise, planted_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def predictor():
    return Predictor(planted_model(), device="cpu")


@pytest.fixture(scope="module")
def image():
    return blurred_noise()


@pytest.fixture(scope="module")
def trained():
    """A network that knows the built-in shapes: a shipped one, or that of the last run's Space."""
    for config in (*ROOT.glob("weights/**/config.json"), *ROOT.glob("space/weights/config.json")):
        predictor = Predictor.load(config.parent, device="cpu")
        if predictor.classes == list(SHAPE_CLASSES):
            return predictor
    pytest.skip("no network that knows the built-in shapes in weights/ or space/: make run")


def slow_map(predictor, image, detections, row, method):
    """One detection's map on its own scale by autograd on the whole network: [S, S], not normalised."""
    model = copy.deepcopy(predictor.model)
    kept = {}
    grids = [predictor.image_size // stride for stride in (32, 16, 8)]
    scale = int(np.searchsorted(np.cumsum([3 * grid * grid for grid in grids]), detections.index[row], side="right"))
    model.heads[scale].neck.register_forward_hook(lambda _, __, out: kept.update(activation=out))
    logits = torch.cat([level.flatten(1, 3) for level in model(predictor.preprocess(image)[0])], dim=1)
    prediction = logits[0, detections.index[row]]
    score = prediction[0] + prediction[5 + detections.labels[row]]
    activation = kept["activation"]
    gradient = torch.autograd.grad(score, activation)[0]
    weights = gradient.mean(dim=(2, 3), keepdim=True) if method == "gradcam" else gradient
    heatmap = (weights * activation).sum(dim=1, keepdim=True).relu()
    heatmap = heatmap - heatmap.min()
    return torch.nn.functional.interpolate(heatmap, size=(96, 96), mode="bilinear")[0, 0].detach().numpy()


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_maps_are_those_of_plain_autograd(method, predictor, image):
    detections = predictor(image, 0.2)
    assert len({*np.digitize(detections.index, [27])}) == 2  # two scales take part
    for row in (0, 1, len(detections) - 1):
        expected = slow_map(predictor, image, detections, row, method)
        found = explain(predictor, image, target=row, method=method, confidence=0.2)
        assert found.explained.tolist() == [row]
        assert found.heatmap == pytest.approx(expected / max(expected.max(), 1e-7), abs=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["own", "all", 0, 1])
def test_every_method_on_every_layer(method, layer, predictor, image):
    found = explain(predictor, image, layer=layer, method=method, confidence=0.2)
    assert found.heatmap.shape == (96, 96) and found.heatmap.dtype == np.float32
    assert found.heatmap.min() >= 0 and len(found.explained) <= len(found.detections)
    assert found.heatmap.max() == pytest.approx(0 if "No part" in found.message else 1, abs=1e-5)


def test_targets_choose_rows(predictor, image):
    detections = predictor(image, 0.3)
    assert explain(predictor, image, confidence=0.3).explained.tolist() == [*range(len(detections))]
    for label, name in enumerate(predictor.classes):
        found = explain(predictor, image, target=name, confidence=0.3)
        assert found.explained.tolist() == np.flatnonzero(detections.labels == label).tolist() != []
    assert np.array_equal(found.detections.boxes, detections.boxes)


def test_a_map_of_several_lays_theirs_over_each_other(predictor, image):
    """And only those that survive the thresholds count."""
    together = explain(predictor, image, confidence=0.45)
    assert 1 < len(together.detections) < len(predictor(image, 0.2))
    alone = [explain(predictor, image, int(row), confidence=0.45).heatmap for row in together.explained]
    assert together.heatmap == pytest.approx(np.max(alone, axis=0), abs=1e-4)


def test_of_very_many_the_best_are_explained(predictor, image):
    found = explain(predictor, image, confidence=0.02, iou_threshold=0.95)
    assert len(found.detections) > MAX_EXPLAINED and found.explained.tolist() == [*range(MAX_EXPLAINED)]
    assert f"best {MAX_EXPLAINED} of {len(found.detections)}" in found.message


@pytest.mark.parametrize(
    ("name", "value"), [("target", "cow"), ("target", 99), ("target", -1), ("layer", 3), ("layer", "x"), ("method", 0)]
)
def test_wrong_choices_are_named(name, value, predictor, image):
    with pytest.raises(ValueError, match=f"explain: no .*{value}"):
        explain(predictor, image, confidence=0.2, **{name: value})


def test_a_scale_without_a_part_says_so(predictor, image):
    found = explain(predictor, image, layer=2, confidence=0.2)
    assert "Stride 8 had no part" in found.message and not found.heatmap.any() and not len(found.explained)


def test_with_nothing_found_the_strongest_candidate_is_shown(predictor, image):
    found = explain(predictor, image, confidence=0.99)
    best = predictor.candidates(image).top_candidate()
    assert "Nothing found above 99%" in found.message and predictor.classes[best.labels[0]] in found.message
    assert found.detections.index.tolist() == best.index.tolist() and found.explained.tolist() == [0]
    assert "No star found above 45%" in explain(predictor, image, "star", confidence=0.45).message


def test_the_model_is_left_as_it_was(image):
    model = planted_model()
    predictor = Predictor(model, device="cpu")
    frozen = next(model.parameters()).requires_grad_(False)
    model.heads[1].train()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    before = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    for method in METHODS:
        explain(predictor, image, layer="all", method=method, confidence=0.2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert [p.requires_grad for p in model.parameters()].count(False) == 1 and not frozen.requires_grad
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, predictor, image):
    half = Predictor(planted_model().to(dtype), device="cpu")
    row = explain(half, image, 0, confidence=0.2)
    same = np.flatnonzero(predictor(image, 0.2).index == row.detections.index[0])[0]
    exact = explain(predictor, image, int(same), confidence=0.2)
    assert np.corrcoef(row.heatmap.ravel(), exact.heatmap.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (300, 40), (31, 97), (6000, 6000)])
def test_any_size(size, predictor):
    width, height = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = explain(predictor, image, confidence=0.2)
    assert found.heatmap.shape == (height, width) and 0 <= found.heatmap.min() and found.heatmap.max() <= 1 + 1e-6


def test_the_bars_of_the_letterbox_are_cut_off(predictor, image):
    """A picture with its own grey bars, letterboxed to the same square, has the same map where the picture is."""
    wide = image[16:80]
    barred = np.full((96, 96, 3), 114, np.uint8)
    barred[16:80] = wide
    whole, part = (explain(predictor, picture, 0, confidence=0.2).heatmap for picture in (barred, wide))
    assert part.shape == (64, 96)
    assert part == pytest.approx(whole[16:80] / whole[16:80].max(), abs=1e-4)


def pointing_game(predictor, records, **options):
    """Over all correct detections: share of maps that peak in their own box, and mean share of mass in it."""
    hits, shares = [], []
    for record in records:
        explainer = Explainer(predictor, record.image)
        for row, box in enumerate(explainer.candidates.detections(0.5).boxes):
            heatmap = explainer.explain(row, confidence=0.5, **options).heatmap
            y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
            hits.append(box[0] <= x + 0.5 <= box[2] and box[1] <= y + 0.5 <= box[3])
            (x1, y1), (x2, y2) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
            shares.append(heatmap[y1:y2, x1:x2].sum() / heatmap.sum())
    return np.mean(hits), np.mean(shares), len(hits)


def test_each_map_points_at_its_own_object(trained):
    records = draw_shapes(20, 256, seed=2024)
    hits, mass, count = pointing_game(trained, records)
    eigen_hits, eigen_mass, _ = pointing_game(trained, records[:5], method="eigencam")
    print(f"{count} detections: hit {hits:.3f}, mass {mass:.3f}; EigenCAM {eigen_hits:.3f}, {eigen_mass:.3f}")
    assert count > 20 and hits >= 0.9 and mass > 0.6
    assert eigen_hits < 0.6 and eigen_mass < 0.4  # the same map for every object


def test_two_objects_have_two_maps(trained):
    for record in draw_shapes(20, 256, seed=2024):
        explainer = Explainer(trained, record.image)
        if len(explainer.candidates.detections(0.5)) > 1:
            first, second = (explainer.explain(row, confidence=0.5).heatmap for row in (0, 1))
            assert np.abs(first - second).max() > 0.5


def test_eigencam_has_one_map_for_all(trained):
    explainer = Explainer(trained, draw_shapes(2, 256, seed=2024)[1].image)
    first, second = (explainer.explain(row, layer=0, method="eigencam", confidence=0.5).heatmap for row in (0, 1))
    assert np.array_equal(first, second)
