"""Prediction from the command line and from Python."""

import json
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from src.serving import predict as cli
from src.serving.drawing import draw_detections, draw_explanation
from src.serving.gradcam import explain
from src.serving.images import load_image
from src.serving.predict import predict
from src.serving.predictor import Detections, Predictor
from tests.planted import CLASSES, blurred_noise, planted_model


@pytest.fixture(scope="module")
def predictor():
    return Predictor(planted_model())


@pytest.fixture
def photos(tmp_path):
    """A folder of two images, and files that are not images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size, seed in (("a.png", (96, 96), 3), ("b.JPG", (120, 80), 4)):
        Image.fromarray(blurred_noise(*size, seed)).save(folder / name)
    (folder / "IMG_1.HEIC").write_text("no image")
    (folder / "._a.png").write_bytes(b"written by macOS")
    return folder


@pytest.fixture
def run_command(tmp_path, monkeypatch):
    """The command: returns its exit status, or the message that it exits with."""
    planted_model().save_pretrained(tmp_path / "weights")
    options = ["--weights", tmp_path / "weights", "--save", tmp_path / "results"]

    def run(*arguments) -> int | str:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, [*options, *arguments])])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    return run


def read_video(path) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read()[1]) is not None:
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    return frames


def assert_same_detections(entry: dict, detections: Detections) -> None:
    labels, scores, boxes = (
        [row[name] for row in entry["detections"]] for name in ("class", "confidence", "box")
    )
    assert labels == [CLASSES[label] for label in detections.labels] and labels
    np.testing.assert_allclose(scores, detections.scores, atol=1e-4)
    np.testing.assert_allclose(boxes, detections.boxes, atol=0.06)


def assert_nearly_equal(saved: np.ndarray, expected: np.ndarray, original: np.ndarray) -> None:
    """JPEG and MPEG-4 change pixels, but less than what is drawn."""
    errors = [np.abs(saved.astype(int) - other).mean() for other in (expected, original)]
    assert errors[0] < errors[1] / 2


def test_folder_of_images(photos, run_command, predictor, tmp_path, capsys):
    (photos / "aa.jpg").write_bytes(b"no image")
    (photos / "c.mp4").write_bytes(b"no video")
    Image.fromarray(blurred_noise(seed=5)).save(photos / "a.jpg")
    assert run_command(photos, "--confidence", 0.3, "--iou-threshold", 0.6) == 1  # two unreadable
    entries = json.loads((tmp_path / "results" / "predictions.json").read_text())
    assert [entry["image"] for entry in entries] == ["a.jpg", "a.png", "aa.jpg", "b.JPG", "c.mp4"]
    output = capsys.readouterr().out
    for number, error in ((4, "c.mp4 can't be read as a video"), (2, "aa.jpg can't be read as an")):
        assert error in entries.pop(number)["error"] and f"{photos}/{error}" in output
    assert "b.JPG: " in output
    for entry in entries:
        image = load_image(photos / entry["image"])
        assert image.shape[:2] == (entry["height"], entry["width"])
        detections = predictor(image, 0.3, 0.6)
        assert_same_detections(entry, detections)
        saved = load_image(tmp_path / "results" / entry["image"])
        assert_nearly_equal(saved, draw_detections(image, detections, CLASSES), image)


def test_heatmap_of_one_image(photos, run_command, predictor, tmp_path):
    assert run_command(photos / "b.JPG", "--heatmap") == 0
    image = load_image(photos / "b.JPG")
    saved = load_image(tmp_path / "results" / "b_heatmap.JPG")
    assert_nearly_equal(saved, draw_explanation(image, explain(predictor, image), CLASSES), image)


def test_video(predictor, tmp_path):
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12.0, (96, 64))
    for seed in range(7):
        writer.write(blurred_noise(96, 64, seed))
    writer.release()
    entries = predict(path, predictor, tmp_path / "results")
    annotated = read_video(tmp_path / "results" / "clip.mp4")
    assert [(entry["image"], entry["frame"]) for entry in entries] == [
        ("clip.mp4", number) for number in range(7)
    ]
    for entry, frame, drawn in zip(entries, read_video(path), annotated, strict=True):
        detections = predictor(frame)
        assert_same_detections(entry, detections)
        assert_nearly_equal(drawn, draw_detections(frame, detections, CLASSES), frame)


def test_errors_say_what_to_do(photos, run_command, tmp_path):
    before = {path: path.read_bytes() for path in photos.iterdir()}
    (tmp_path / "empty").mkdir()
    for arguments, message in {
        (tmp_path / "missing.jpg",): "missing.jpg is missing, not a supported file, or",
        (
            tmp_path / "empty",
        ): "empty is missing, not a supported file, or a folder without one. Supp",
        (photos / "IMG_1.HEIC",): "IMG_1.HEIC is missing, not a supported file",
        (photos, "--confidence", 2): "confidence and iou_threshold must be in 0..1",
        (photos, "--weights", tmp_path / "empty"): "is not a folder with model.safetensors",
        (photos, "--save", photos): "contains the source",
        (photos / "a.png", "--save", photos): "contains the source",
    }.items():
        assert message in run_command(*arguments)
    assert {path: path.read_bytes() for path in photos.iterdir()} == before
