"""Heatmaps: equal to plain autograd, one per object; the model is not changed."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from src.serving.gradcam import MAX_EXPLAINED, METHODS, Explainer, explain
from src.serving.images import load_image
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
    """The shipped weights."""
    return Predictor.load(ROOT / "weights", device="cpu")


@pytest.fixture(scope="module")
def photographs():
    return [load_image(path) for path in sorted(ROOT.glob("weights/samples/*.jpg"))]


def slow_map(predictor, image, detections, row, method):
    """One detection's heatmap on its own scale by autograd through the whole network: [S, S], not normalized."""
    model = copy.deepcopy(predictor.model)
    hooked = {}
    grids = [predictor.image_size // stride for stride in (32, 16, 8)]
    scale = int(
        np.searchsorted(
            np.cumsum([3 * grid * grid for grid in grids]), detections.index[row], side="right"
        )
    )
    model.heads[scale].neck.register_forward_hook(lambda _, __, out: hooked.update(activation=out))
    logits = torch.cat(
        [level.flatten(1, 3) for level in model(predictor.preprocess(image)[0])], dim=1
    )
    prediction = logits[0, detections.index[row]]
    score = prediction[0] + prediction[5 + detections.labels[row]]
    activation = hooked["activation"]
    gradient = torch.autograd.grad(score, activation)[0]
    weights = gradient.mean(dim=(2, 3), keepdim=True) if method == "gradcam" else gradient
    heatmap = (weights * activation).sum(dim=1, keepdim=True).relu()
    heatmap = heatmap - heatmap.min()
    return (
        torch.nn.functional.interpolate(heatmap, size=(96, 96), mode="bilinear")[0, 0]
        .detach()
        .numpy()
    )


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_heatmaps_equal_plain_autograd(method, predictor, image):
    detections = predictor(image, 0.2)
    assert len({*np.digitize(detections.index, [27])}) == 2  # from two scales
    for row in (0, 1, len(detections) - 1):
        expected = slow_map(predictor, image, detections, row, method)
        result = explain(predictor, image, target=row, method=method, confidence=0.2)
        assert result.explained.tolist() == [row]
        assert result.heatmap == pytest.approx(expected / max(expected.max(), 1e-7), abs=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["own", "all", 0, 1])
def test_every_method_on_every_layer(method, layer, predictor, image):
    result = explain(predictor, image, layer=layer, method=method, confidence=0.2)
    assert result.heatmap.shape == (96, 96) and result.heatmap.dtype == np.float32
    assert result.heatmap.min() >= 0 and len(result.explained) <= len(result.detections)
    assert result.heatmap.max() == pytest.approx(0 if "No part" in result.message else 1, abs=1e-5)


def test_target_selects_rows(predictor, image):
    detections = predictor(image, 0.3)
    assert explain(predictor, image, confidence=0.3).explained.tolist() == [*range(len(detections))]
    for label, name in enumerate(predictor.classes):
        result = explain(predictor, image, target=name, confidence=0.3)
        assert (
            result.explained.tolist() == np.flatnonzero(detections.labels == label).tolist() != []
        )
    assert np.array_equal(result.detections.index, detections.index)
    assert np.array_equal(result.detections.boxes, detections.boxes)


def test_several_detections_give_the_maximum_of_their_heatmaps(predictor, image):
    """Only detections above the thresholds count."""
    together = explain(predictor, image, confidence=0.45)
    assert 1 < len(together.detections) < len(predictor(image, 0.2))
    alone = [
        explain(predictor, image, int(row), confidence=0.45).heatmap for row in together.explained
    ]
    assert together.heatmap == pytest.approx(np.max(alone, axis=0), abs=1e-4)


def test_the_best_of_many_detections_are_explained(predictor, image):
    result = explain(predictor, image, confidence=0.02, iou_threshold=0.95)
    assert len(result.detections) > MAX_EXPLAINED and result.explained.tolist() == [
        *range(MAX_EXPLAINED)
    ]
    assert f"best {MAX_EXPLAINED} of {len(result.detections)}" in result.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", "cow"),
        ("target", 99),
        ("target", -1),
        ("layer", 3),
        ("layer", "x"),
        ("method", 0),
    ],
)
def test_unknown_arguments_are_named(name, value, predictor, image):
    with pytest.raises(ValueError, match=f"Unknown {name} .*{value}"):
        explain(predictor, image, confidence=0.2, **{name: value})


def test_a_scale_that_does_not_contribute_gives_a_message(predictor, image):
    result = explain(predictor, image, layer=2, confidence=0.2)
    assert (
        "Stride 8 does not contribute" in result.message
        and not result.heatmap.any()
        and not len(result.explained)
    )


def test_without_detections_the_top_candidate_is_explained(predictor, image):
    result = explain(predictor, image, confidence=0.99)
    best = predictor.candidates(image).top_candidate()
    assert result.is_candidate and "No detection above 99%" in result.message
    assert predictor.classes[best.labels[0]] in result.message
    assert (
        result.detections.index.tolist() == best.index.tolist() and result.explained.tolist() == [0]
    )
    assert "No star above 45%" in explain(predictor, image, "star", confidence=0.45).message


def test_the_model_is_not_changed(image):
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
    assert [p.requires_grad for p in model.parameters()].count(
        False
    ) == 1 and not frozen.requires_grad
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
    result = explain(predictor, image, confidence=0.2)
    assert (
        result.heatmap.shape == (height, width)
        and result.heatmap.min() >= 0
        and result.heatmap.max() <= 1 + 1e-6
    )


def test_letterbox_bars_are_cropped(predictor, image):
    """An image with its own grey bars, letterboxed to the same square, has the same heatmap inside the bars."""
    wide = image[16:80]
    barred = np.full((96, 96, 3), 114, np.uint8)
    barred[16:80] = wide
    expected, heatmap = (
        explain(predictor, each, 0, confidence=0.2).heatmap for each in (barred, wide)
    )
    assert heatmap.shape == (64, 96)
    assert heatmap == pytest.approx(expected[16:80] / expected[16:80].max(), abs=1e-4)


def pointing_game(predictor, images, **options):
    """Over all detections above 0.5: share of heatmaps that peak in their own box, and mean share of their mass in it."""
    hits, shares = [], []
    for image in images:
        explainer = Explainer(predictor, image)
        for row, box in enumerate(explainer.candidates.detections(0.5).boxes):
            heatmap = explainer.explain(row, confidence=0.5, **options).heatmap
            y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
            hits.append(box[0] <= x + 0.5 <= box[2] and box[1] <= y + 0.5 <= box[3])
            (x1, y1), (x2, y2) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
            shares.append(heatmap[y1:y2, x1:x2].sum() / heatmap.sum())
    return np.mean(hits), np.mean(shares), len(hits)


def test_each_heatmap_peaks_in_its_own_object(trained, photographs):
    hits, mass, count = pointing_game(trained, photographs)
    eigen_hits, eigen_mass, _ = pointing_game(trained, photographs, method="eigencam")
    print(
        f"{count} detections: hit {hits:.3f}, mass {mass:.3f}; EigenCAM {eigen_hits:.3f}, {eigen_mass:.3f}"
    )
    assert count >= 10 and hits >= 0.9 and mass > 0.6
    assert eigen_hits < 0.6 and eigen_mass < 0.4  # the same heatmap for every object


def most_detections(predictor, images) -> Explainer:
    """The explainer of the image with the most detections above 0.5, at least two."""
    explainer = max(
        (Explainer(predictor, image) for image in images),
        key=lambda e: len(e.candidates.detections(0.5)),
    )
    assert len(explainer.candidates.detections(0.5)) > 1
    return explainer


def test_two_objects_have_different_heatmaps(trained, photographs):
    explainer = most_detections(trained, photographs)
    first, second = (explainer.explain(row, confidence=0.5).heatmap for row in (0, 1))
    assert np.abs(first - second).max() > 0.5


def test_eigencam_has_the_same_heatmap_for_every_detection(trained, photographs):
    explainer = most_detections(trained, photographs)
    first, second = (
        explainer.explain(row, layer=0, method="eigencam", confidence=0.5).heatmap for row in (0, 1)
    )
    assert np.array_equal(first, second)
