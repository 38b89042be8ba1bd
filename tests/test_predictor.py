"""Reading of any image file, boxes in its pixels, and thresholds after the forward pass."""

import copy
import io
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src.model.boxes import decode, nms
from src.serving.gradcam import Explainer
from src.serving.images import get_image_size, letterbox, load_image
from src.serving.predictor import MIN_SCORE, Predictor
from tests.planted import planted_model

ROOT = Path(__file__).parents[1]
SAMPLES = sorted(ROOT.glob("weights/samples/*.jpg"))
WIDTH, HEIGHT = 48, 32
# EXIF orientation -> what a viewer does to the pixels
ORIENTATIONS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def quarters() -> np.ndarray:
    """Four quarters of different colours, so that every rotation and reflection is visible."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:16, :24], image[:16, 24:] = (220, 40, 40), (40, 200, 40)
    image[16:, :24], image[16:, 24:] = (40, 40, 210), (230, 230, 230)
    return image


def grey_quarters() -> np.ndarray:
    return np.asarray(Image.fromarray(quarters()).convert("L"))


def saved(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


RGB = Image.fromarray(quarters())
KINDS = {
    "jpeg": saved(RGB, "JPEG", quality=95, subsampling=0),
    "png": saved(RGB, "PNG"),
    "webp": saved(RGB, "WEBP", lossless=True),
    "bmp": saved(RGB, "BMP"),
    "tiff": saved(RGB, "TIFF"),
    "cmyk": saved(RGB.convert("CMYK"), "JPEG", quality=95),
    "palette": saved(RGB.quantize(16), "PNG"),
    "rgba": saved(RGB.convert("RGBA"), "PNG"),
    "gif": saved(RGB, "GIF"),
    "animated gif": saved(
        RGB, "GIF", save_all=True, append_images=[Image.new("RGB", RGB.size)] * 2
    ),
    "animated webp": saved(
        RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", RGB.size)]
    ),
    "animated png": saved(RGB, "PNG", save_all=True, append_images=[Image.new("RGB", RGB.size)]),
}
GREYS = {
    "grey": saved(RGB.convert("L"), "PNG"),
    "grey with alpha": saved(RGB.convert("LA"), "PNG"),
    "grey jpeg": saved(RGB.convert("L"), "JPEG", quality=98),
    "16-bit png": saved(Image.fromarray(grey_quarters().astype(np.uint16) * 257), "PNG"),
    "16-bit tiff": saved(Image.fromarray(grey_quarters().astype(np.uint16) * 257), "TIFF"),
    "32-bit tiff": saved(Image.fromarray(grey_quarters().astype(np.int32)), "TIFF"),
}


@pytest.fixture(scope="module")
def predictor():
    return Predictor(planted_model(), device="cpu")


@pytest.mark.parametrize("kind", [*KINDS, *GREYS])
def test_every_file_format_gives_the_same_image(kind, tmp_path):
    (tmp_path / "file").write_bytes((KINDS | GREYS)[kind].getvalue())
    loaded = load_image(tmp_path / "file")
    assert loaded.dtype == np.uint8 and loaded.shape == (HEIGHT, WIDTH, 3)
    expected = quarters() if kind in KINDS else grey_quarters()[..., None]
    error = np.abs(loaded.astype(int) - expected)
    assert error.mean() < 4 if kind in KINDS else error.max() <= 6


def test_arrays_and_pil_images_are_accepted():
    assert np.array_equal(load_image(quarters()), quarters())
    assert np.array_equal(load_image(RGB), quarters())
    assert np.array_equal(
        load_image(grey_quarters()), np.repeat(grey_quarters()[..., None], 3, axis=2)
    )
    wrong = [quarters() / 255, quarters().astype(np.int64), torch.zeros(3, 8, 8)]
    shapes = ((3, 40, 50), (40, 50, 1), (2, 40, 50, 3), (40,))
    for other in (*wrong, *(np.zeros(shape, np.uint8) for shape in shapes)):
        stated = re.escape(f"{other.dtype} {list(other.shape)}, not a uint8")
        with pytest.raises(ValueError, match=stated + ".*Channels come last"):
            load_image(other)
    with pytest.raises(ValueError, match="can't be read as an image"):
        load_image(None)


@pytest.mark.parametrize("mode", ["RGBA", "palette"])
def test_transparency_becomes_white(mode, tmp_path):
    image = RGB.convert("RGBA")
    image.paste((9, 9, 9, 0), (0, 0, 24, 16))
    image = image.quantize(16) if mode == "palette" else image
    image.save(tmp_path / "x.png")
    loaded = load_image(tmp_path / "x.png")
    assert (loaded[2:14, 2:22] > 250).all() and np.array_equal(loaded[20, 40], quarters()[20, 40])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_images_are_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("x.png", "x.tif"):
        RGB.save(tmp_path / name, exif=exif)
        image = load_image(tmp_path / name)
        assert np.array_equal(image, ORIENTATIONS[orientation](quarters()))
        assert get_image_size(tmp_path / name) == image.shape[1::-1]


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "text.jpg": b"not an image",
        "empty.png": b"",
        "short.jpg": KINDS["jpeg"].getvalue()[:500],
        "short.png": KINDS["png"].getvalue()[:60],
        "bomb.png": saved(Image.new("1", (14_000, 14_000)), "PNG").getvalue(),  # in 24 kB
    }.items(),
)
def test_unreadable_files_are_named(name, content, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*JPEG or PNG"):
        load_image(tmp_path / name)


def test_larger_images_are_refused():
    with pytest.raises(ValueError, match="48 x 32 pixels, more than"):
        load_image(RGB, max_pixels=WIDTH * HEIGHT - 1)
    assert load_image(RGB, max_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    "size", [(96, 96), (150, 40), (33, 97), (8, 8), (1, 1), (1, 300), (700, 500)]
)
def test_boxes_are_in_pixels_of_the_image(size, predictor):
    """Slow: from the letterboxed square to the image, box by box."""
    width, height = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    detections = predictor(image, confidence=0.3)
    square, _ = letterbox(image, 96)
    inputs = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        boxes, scores = decode(predictor.model(inputs), predictor.model.anchors_at(96))
    inner = np.array([max(1, round(side * 96 / max(size))) for side in size])
    start = (96 - inner) // 2
    for n, index in enumerate(detections.index):
        corners = (boxes[0, index].reshape(2, 2).numpy() * 96 - start) * size / inner
        assert detections.boxes[n] == pytest.approx(corners.clip(0, size).flatten(), abs=1e-2)
        score = scores[0, index, detections.labels[n]].item()
        assert detections.scores[n] == pytest.approx(score, abs=1e-5)
    assert len(detections)


def test_batch_prediction_equals_single_images():
    predictor = Predictor(planted_model(64), device="cpu")
    shapes = [(40 + 9 * n, 70, 3) for n in range(3)]
    images = [np.random.default_rng(0).integers(256, size=s, dtype=np.uint8) for s in shapes]
    for image, detections in zip(images, predictor.batch(images), strict=True):
        single = predictor(image)
        assert detections.labels.tolist() == single.labels.tolist() != []
        np.testing.assert_allclose(detections.boxes, single.boxes, atol=0.05)


def test_thresholds_need_no_further_forward_pass(predictor):
    candidates = predictor.candidates(quarters())
    with mock.patch("torch.nn.Module.__call__", side_effect=AssertionError("a forward pass")):
        counts = [len(candidates.detections(limit, 0.45)) for limit in (0.99, 0.5, 0.4, 0.3, 0.01)]
        kept = [
            len(candidates.detections(0.3, iou_threshold)) for iou_threshold in (0.1, 0.45, 0.9)
        ]
    assert counts == sorted(counts) and counts[0] == 0 < counts[-1]
    assert kept == sorted(kept) and kept[0] < kept[-1]


def test_candidates_contain_everything_above_min_score(predictor):
    inputs, _ = predictor.preprocess(quarters())
    with torch.no_grad():
        boxes, scores = decode(predictor.model(inputs), predictor.model.anchors_at(96))
    index, labels = nms(boxes[0], scores[0], 2 * MIN_SCORE, 0.45)
    detections = predictor.candidates(quarters()).detections(2 * MIN_SCORE, 0.45)
    assert detections.index.tolist() == index.tolist()
    assert detections.labels.tolist() == labels.tolist()


def test_without_detections_there_is_a_top_candidate():
    model = planted_model()
    with torch.no_grad():
        for head in model.heads:
            head.predict.bias.view(3, -1)[:, 0] = -9.0
    candidates = Predictor(model, device="cpu").candidates(quarters())
    assert len(candidates.detections(0.0)) == 0
    best = candidates.top_candidate()
    assert len(best) == 1 and 0 < best.scores[0] < MIN_SCORE
    assert best.labels[0] == candidates.scores.max(dim=0).values.argmax()


def test_the_top_candidate_of_a_class(predictor):
    candidates = predictor.candidates(quarters())
    for label in range(3):
        best = candidates.top_candidate(label)
        assert (
            best.labels.tolist() == [label] and best.scores[0] == candidates.scores[:, label].max()
        )


def test_half_precision_gives_nearly_the_same_detections(predictor):
    exact = predictor(quarters(), confidence=0.3, iou_threshold=0.9)
    half = Predictor(planted_model().to(torch.bfloat16), device="cpu")(
        quarters(), confidence=0.3, iou_threshold=0.9
    )
    assert half.scores.dtype == np.float32 and abs(len(half) - len(exact)) <= 3
    common, a, b = np.intersect1d(exact.index, half.index, return_indices=True)
    assert len(common) > 0.8 * len(exact) and np.abs(exact.boxes[a] - half.boxes[b]).max() < 2


def test_saved_weights_give_the_same_detections(predictor, tmp_path):
    predictor.model.save_pretrained(tmp_path)
    again = Predictor.load(tmp_path, device="cpu")
    assert again.classes == predictor.classes and again.image_size == predictor.image_size
    assert np.array_equal(again(quarters(), 0.3).boxes, predictor(quarters(), 0.3).boxes)


@pytest.fixture(scope="module")
def shipped():
    return Predictor.load(ROOT / "weights", device="cpu")


def test_fused_batch_norms_change_scores_by_rounding_only(shipped):
    """On the shipped weights, whose batch norms are trained; float64 is the reference."""
    inputs = torch.cat([shipped.preprocess(load_image(path))[0] for path in SAMPLES[::3]])
    exact = copy.deepcopy(shipped.model).double()
    anchors = shipped.model.anchors_at(shipped.image_size)
    with torch.no_grad():
        boxes, scores = decode(exact(inputs.double()), anchors)
        its_boxes, its_scores = decode(shipped.fused(inputs), anchors)
    assert (its_scores - scores).abs().max() < 1e-5
    confident = scores.amax(dim=2) > MIN_SCORE
    assert (its_boxes - boxes)[confident].abs().max() * shipped.image_size < 0.01  # pixels
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in shipped.fused.modules())


def test_fusing_does_not_change_the_model(tmp_path):
    model = planted_model()
    before = copy.deepcopy(model.state_dict())
    training = [parameter.requires_grad for parameter in model.parameters()]
    predictor = Predictor(model, device="cpu")
    assert len(predictor(quarters(), 0.3)) and "fused" in vars(predictor)
    Explainer(predictor, quarters()).explain()  # runs the fused copy
    assert predictor.model is model and model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == training
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == before.keys()
