"""Reading of any image file, boxes in its pixels, and thresholds after the forward pass."""

import copy
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.model.boxes import decode, nms
from src.serving.gradcam import Explainer
from src.serving.images import get_image_size, letterbox, load_image
from src.serving.predictor import IOU_THRESHOLD, MIN_SCORE, Predictor
from tests.planted import planted_model

ROOT = Path(__file__).parents[1]
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
    colours = np.uint8([[(220, 40, 40), (40, 200, 40)], [(40, 40, 210), (230, 230, 230)]])
    return colours.repeat(HEIGHT // 2, axis=0).repeat(WIDTH // 2, axis=1)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RGB = Image.fromarray(quarters())
GREY = np.asarray(RGB.convert("L"))
SEVERAL = {"save_all": True, "append_images": [Image.new("RGB", RGB.size)] * 2}
FILES = {
    "jpeg": saved(RGB, "JPEG", quality=95, subsampling=0),
    "png": saved(RGB, "PNG"),
    "webp": saved(RGB, "WEBP", lossless=True),
    "bmp": saved(RGB, "BMP"),
    "tiff": saved(RGB, "TIFF"),
    "cmyk": saved(RGB.convert("CMYK"), "JPEG", quality=95),
    "palette": saved(RGB.quantize(16), "PNG"),
    "rgba": saved(RGB.convert("RGBA"), "PNG"),
    "gif": saved(RGB, "GIF"),
    "animated gif": saved(RGB, "GIF", **SEVERAL),
    "animated webp": saved(RGB, "WEBP", lossless=True, **SEVERAL),
    "animated png": saved(RGB, "PNG", **SEVERAL),
    "grey": saved(RGB.convert("L"), "PNG"),
    "grey with alpha": saved(RGB.convert("LA"), "PNG"),
    "grey jpeg": saved(RGB.convert("L"), "JPEG", quality=98),
    "16-bit png": saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "16-bit tiff": saved(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
    "32-bit tiff": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
}
GREYS = [*FILES][[*FILES].index("grey") :]


@pytest.fixture(scope="module")
def predictor():
    return Predictor(planted_model(), device="cpu")


@pytest.mark.parametrize("kind", FILES)
def test_every_file_format_gives_the_same_image(kind, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(FILES[kind])
    loaded = load_image(path)
    assert loaded.dtype == np.uint8 and loaded.shape == (HEIGHT, WIDTH, 3)
    expected = GREY[..., None] if kind in GREYS else quarters()
    assert np.abs(loaded.astype(int) - expected).mean() < 4


def test_arrays_and_pil_images_are_accepted():
    assert np.array_equal(load_image(quarters()), quarters())
    assert np.array_equal(load_image(GREY), np.repeat(GREY[..., None], 3, axis=2))
    wrong = [quarters() / 255, quarters().astype(np.int64), torch.zeros(3, 8, 8)]
    shapes = ((3, 40, 50), (40, 50, 1), (2, 40, 50, 3), (40,))
    for other in (*wrong, *(np.zeros(shape, np.uint8) for shape in shapes)):
        stated = re.escape(f"{other.dtype} {list(other.shape)}, not a uint8")
        with pytest.raises(ValueError, match=stated + ".*Channels come last"):
            load_image(other)


def test_transparency_becomes_white(tmp_path):
    image = RGB.convert("RGBA")
    image.paste((9, 9, 9, 0), (0, 0, 24, 16))
    for each in (image, image.quantize(16)):
        each.save(tmp_path / "x.png")
        loaded = load_image(tmp_path / "x.png")
        assert (loaded[2:14, 2:22] > 250).all()
        assert np.array_equal(loaded[20, 40], quarters()[20, 40])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_images_are_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("x.png", "x.tif"):
        RGB.save(tmp_path / name, exif=exif)
        image = load_image(tmp_path / name)
        assert np.array_equal(image, ORIENTATIONS[orientation](quarters()))
        assert get_image_size(tmp_path / name) == image.shape[1::-1]


def test_unreadable_files_are_named_and_bombs_refused_before_decoding(tmp_path):
    bad = {
        "text.jpg": b"not an image",
        "empty.png": b"",
        "short.jpg": FILES["jpeg"][: len(FILES["jpeg"]) // 2],
        "short.png": FILES["png"][:60],
        "bomb.png": saved(Image.new("1", (14_000, 14_000)), "PNG"),  # 196 megapixels in 24 kB
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*JPEG or PNG"):
            load_image(tmp_path / name)
    with pytest.raises(ValueError, match="missing.jpg can't be read.*No such file"):
        load_image(tmp_path / "missing.jpg")


@pytest.mark.parametrize(
    "size", [(96, 96), (150, 40), (33, 97), (8, 8), (1, 1), (1, 300), (700, 500)]
)
@pytest.mark.parametrize("side", [96, 160])
def test_boxes_are_in_pixels_of_the_image(size, side, predictor):
    """Oracle: the network without fused batch norms on the letterbox, one box after the other."""
    width, height = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    detections = Predictor(predictor.model, side, "cpu")(image, confidence=0.3)
    inputs = torch.from_numpy(letterbox(image, side)[0]).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():  # anchors keep the pixels of 96 x 96
        boxes, scores = decode(predictor.model(inputs), predictor.model.anchors * 96 / side)
    index, labels = nms(boxes[0], scores[0], 0.3, IOU_THRESHOLD)
    assert np.array_equal([detections.index, detections.labels], [index.numpy(), labels.numpy()])
    assert len(index) and detections.scores == pytest.approx(
        scores[0, index, labels].numpy(), abs=1e-5
    )
    inner = [max(1, round(edge * side / max(size))) for edge in size]
    for box, square in zip(detections.boxes, boxes[0, index] * side, strict=True):
        for axis in (0, 1):
            bar = (side - inner[axis]) // 2
            edges = (square[axis::2].numpy() - bar) * size[axis] / inner[axis]
            assert box[axis::2] == pytest.approx(edges.clip(0, size[axis]), abs=1e-2)


def test_thresholds_are_applied_to_the_candidates(predictor):
    candidates = predictor.candidates(quarters())
    counts = [len(candidates.detections(confidence)) for confidence in (0.99, 0.5, 0.4, 0.3, 0.01)]
    assert counts == sorted(counts) and 0 == counts[0] < counts[-1]
    kept = [len(candidates.detections(0.3, iou_threshold)) for iou_threshold in (0.1, 0.45, 0.9)]
    assert kept == sorted(kept) and kept[0] < kept[-1]


def test_top_candidates(predictor):
    """Of a class or of all, also if none has the minimum score."""
    silent = planted_model()
    with torch.no_grad():
        for head in silent.heads:
            head.predict.bias.view(3, -1)[:, 0] = -9.0
    unsure = Predictor(silent, device="cpu").candidates(quarters())
    assert len(unsure.detections(0.0)) == 0 < unsure.top_candidate().scores[0] < MIN_SCORE
    for candidates in (unsure, predictor.candidates(quarters())):
        assert candidates.top_candidate().scores == candidates.scores.max()
        for label in range(3):
            best = candidates.top_candidate(label)
            assert best.labels == label and best.scores == candidates.scores[:, label].max()


def test_half_precision_gives_nearly_the_same_detections(predictor):
    half = Predictor(planted_model().to(torch.bfloat16), device="cpu")
    exact, rounded = (each(quarters(), 0.3, 0.9) for each in (predictor, half))
    assert rounded.scores.dtype == np.float32 and abs(len(rounded) - len(exact)) <= 3
    common, a, b = np.intersect1d(exact.index, rounded.index, return_indices=True)
    assert len(common) > 0.8 * len(exact) and np.abs(exact.boxes[a] - rounded.boxes[b]).max() < 2


def test_fusing_does_not_change_the_model():
    predictor = Predictor(planted_model(), device="cpu")
    before = copy.deepcopy(predictor.model.state_dict())
    Explainer(predictor, quarters()).explain()  # runs the fused copy
    assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in predictor.fused.modules())
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_fusing_changes_detections_by_rounding_only():
    """On the shipped weights, whose batch norms are trained."""
    shipped, unfused = (Predictor.load(ROOT / "weights", device="cpu") for _ in range(2))
    unfused.fused = unfused.model
    for path in sorted(ROOT.glob("weights/samples/*.jpg")):
        exact, fused = unfused(path), shipped(path)
        assert np.array_equal([exact.index, exact.labels], [fused.index, fused.labels])
        assert exact.scores == pytest.approx(fused.scores, abs=1e-5)
        assert exact.boxes == pytest.approx(fused.boxes, abs=0.05)
