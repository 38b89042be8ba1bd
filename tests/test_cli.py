"""Prediction from the command line and from Python; the preset for small data sets; progress."""

import json
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src.config import PRESETS, REPOSITORY, Config
from src.serving import predict as cli
from src.serving.drawing import draw_detections, draw_heatmap
from src.serving.gradcam import explain
from src.serving.images import load_image
from src.serving.predict import predict
from src.serving.predictor import Detections, Predictor
from src.training import callbacks
from src.training.fit import fit
from src.training.module import build_model
from tests.planted import CLASSES, blurred_noise, planted_model
from tests.runs import tiny


@pytest.fixture(scope="module")
def predictor():
    return Predictor(planted_model())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    planted_model().save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder of two images, and files that are not images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size, seed in (("a.png", (96, 96), 3), ("b.JPG", (120, 80), 4)):
        Image.fromarray(blurred_noise(*size, seed)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_bytes(b"written by macOS")
    return folder


def run_command(monkeypatch, *arguments) -> int | str:
    """Run the command and return its exit status, or the message that it exits with."""
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def write_video(path, count: int = 7, size=(96, 64), fps: float = 12.0) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
    for seed in range(count):
        writer.write(blurred_noise(*size, seed))
    writer.release()


def read_video(path) -> tuple[list[np.ndarray], float]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read()[1]) is not None:
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    return frames, capture.get(cv2.CAP_PROP_FPS)


def assert_same_detections(entry: dict, detections: Detections) -> None:
    assert [row["class"] for row in entry["detections"]] == [
        CLASSES[label] for label in detections.labels
    ]
    np.testing.assert_allclose(
        [row["confidence"] for row in entry["detections"]], detections.scores, atol=1e-4
    )
    np.testing.assert_allclose(
        [row["box"] for row in entry["detections"]], detections.boxes, atol=0.06
    )


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The mean difference of two images of one size. It is not 0 after JPEG or MPEG-4."""
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b).mean()


def test_folder_of_images(photos, weights, predictor, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results"
    options = ("--weights", weights, "--save", folder, "--confidence", 0.3, "--iou-threshold", 0.6)
    assert run_command(monkeypatch, photos, *options) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a.jpg", "b.jpg", "predictions.json"]
    entries = json.loads((folder / "predictions.json").read_text())
    assert [(entry["image"], entry["width"], entry["height"]) for entry in entries] == [
        ("a.png", 96, 96),
        ("b.JPG", 120, 80),
    ]
    for entry in entries:
        image = load_image(photos / entry["image"])
        detections = predictor(image, 0.3, 0.6)
        assert len(detections)
        assert_same_detections(entry, detections)
        drawn = draw_detections(image, detections, CLASSES)
        saved = load_image((folder / entry["image"]).with_suffix(".jpg"))
        assert difference(saved, drawn) < difference(saved, image) / 2
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1].startswith("1 of 2: a.png: ")
        and lines[2].startswith("2 of 2: b.JPG: ")
        and len(lines) == 5
    )
    total = sum(len(entry["detections"]) for entry in entries)
    assert lines[3].startswith(f"Images: 2, detections: {total}, ")
    assert "images per second" in lines[3] and str(folder) in lines[4]


def test_heatmap_of_one_image(photos, predictor, tmp_path):
    predict(str(photos / "b.JPG"), predictor, tmp_path / "results", heatmap=True)
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "b.jpg",
        "b_heatmap.jpg",
        "predictions.json",
    ]
    image = load_image(photos / "b.JPG")
    result = explain(predictor, image)
    overlay = draw_heatmap(image, result.heatmap)
    expected = draw_detections(
        overlay, result.detections, CLASSES, labels=False, rows=result.explained
    )
    saved = load_image(tmp_path / "results" / "b_heatmap.jpg")
    assert (
        difference(saved, expected) < min(difference(saved, overlay), difference(saved, image)) / 2
    )


def test_unreadable_images_are_named_and_skipped(photos, weights, tmp_path, monkeypatch, capsys):
    (photos / "aa.jpg").write_bytes(b"no image")
    assert (
        run_command(monkeypatch, photos, "--weights", weights, "--save", tmp_path / "results") == 1
    )
    output = capsys.readouterr().out
    assert f"{photos / 'aa.jpg'} can't be read as an image" in output
    assert "3 of 3: b.JPG" in output and "1 of 3 images can't be read.\n" in output
    entries = json.loads((tmp_path / "results" / "predictions.json").read_text())
    assert [entry["image"] for entry in entries] == ["a.png", "aa.jpg", "b.JPG"]
    assert "aa.jpg can't be read" in entries[1]["error"] and "detections" not in entries[1]


def test_results_of_images_with_the_same_stem_do_not_collide(photos, predictor, tmp_path):
    Image.fromarray(blurred_noise(seed=5)).save(photos / "a.bmp")
    predict(photos, predictor, tmp_path / "results")
    assert {path.name for path in (tmp_path / "results").glob("*.jpg")} == {
        "a.bmp.jpg",
        "a.png.jpg",
        "b.JPG.jpg",
    }
    assert cli.output_stems([tmp_path / "a.jpg", tmp_path / "a_heatmap.jpg"]) == [
        "a.jpg",
        "a_heatmap.jpg",
    ]
    assert cli.output_stems([tmp_path / "A.jpg", tmp_path / "a.png"]) == [
        "A.jpg",
        "a.png",
    ]  # one file on macOS and Windows


def test_video(predictor, tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(cli, "PROGRESS_INTERVAL", 0)
    entries = predict(tmp_path / "clip.mp4", predictor, tmp_path / "results")
    frames, _ = read_video(tmp_path / "clip.mp4")
    annotated, fps = read_video(tmp_path / "results" / "clip.mp4")
    assert len(frames) == len(annotated) == len(entries) == 7 and fps == 12
    assert json.loads((tmp_path / "results" / "predictions.json").read_text()) == entries
    for number, (entry, frame, drawn) in enumerate(zip(entries, frames, annotated, strict=True)):
        assert (entry["image"], entry["frame"], entry["width"], entry["height"]) == (
            "clip.mp4",
            number,
            96,
            64,
        )
        detections = predictor(frame)
        assert_same_detections(entry, detections)
        expected = draw_detections(frame, detections, CLASSES)
        assert difference(drawn, expected) < difference(drawn, frame) / 2
    output = capsys.readouterr().out
    assert (
        "clip.mp4: frame 7 of 7: " in output
        and "\nFrames: 7, " in output
        and "frames per second" in output
    )


def test_other_files_of_a_folder_are_named(photos, predictor, tmp_path, capsys):
    for name in ("IMG_1.HEIC", "IMG_2.heic"):
        (photos / name).write_bytes(b"")
    assert len(predict(photos, predictor, tmp_path / "results")) == 2
    assert (
        "photos: other files are left out (3): .heic, .txt. Supported files: "
        in capsys.readouterr().out
    )


def test_errors_say_what_to_do(photos, weights, predictor, tmp_path, monkeypatch):
    def message(*arguments) -> str:
        return run_command(
            monkeypatch, *arguments, "--weights", weights, "--save", tmp_path / "results"
        )

    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert "missing.jpg does not exist. Give an image" in message(tmp_path / "missing.jpg")
    assert "empty has no images. Supported files: " in message(tmp_path / "empty")
    assert "broken.mp4 can't be read as a video" in message(tmp_path / "broken.mp4")
    assert "There are no heatmaps for videos" in message(tmp_path / "broken.mp4", "--heatmap")
    assert "confidence must be a number in 0..1" in message(photos, "--confidence", 2)
    assert "model.safetensors is missing" in run_command(
        monkeypatch, photos, "--weights", tmp_path / "empty"
    )


def test_source_is_not_overwritten(photos, predictor):
    before = {path: path.read_bytes() for path in photos.iterdir()}
    for source in (photos, photos / "a.png"):
        with pytest.raises(ValueError, match="contains the source"):
            predict(source, predictor, photos)
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_small_preset_starts_from_the_shipped_detector_in_any_folder(tmp_path, monkeypatch):
    config = PRESETS["small"]
    assert (config.width, config.image_size, config.batch_size, config.epochs) == (
        0.25,
        224,
        16,
        40,
    )
    monkeypatch.chdir(tmp_path)
    model = build_model(config.replace(classes=("mask", "no mask")))
    weights = load_file(REPOSITORY / "weights/model.safetensors")
    for name, value in model.state_dict().items():
        if (
            ".predict." not in name and name != "anchors"
        ):  # the heads' last layers depend on the classes
            assert torch.equal(value, weights[name].to(value.dtype)), name
    config.save(tmp_path / "config.json")
    assert str(REPOSITORY) not in (tmp_path / "config.json").read_text()


def test_pretrained_path_prefers_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(pretrained_weights="weights/backbone")
    assert config.pretrained_path == str(REPOSITORY / "weights/backbone")
    (tmp_path / "weights/backbone").mkdir(parents=True)
    assert config.pretrained_path == str(
        REPOSITORY / "weights/backbone"
    )  # a folder of something else
    (tmp_path / "weights/backbone/config.json").touch()
    assert config.pretrained_path == "weights/backbone"
    assert [Config(pretrained_weights=name).pretrained_path for name in ("", "name/model")] == [
        "",
        "name/model",
    ]


def run_clock(monkeypatch, config: Config, steps: int, seconds: float) -> list[str]:
    """Return what Progress prints in two epochs of `steps` steps. The first takes 1000 s more."""
    progress, lines, clock = callbacks.Progress(), [], [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "write", lines.append)
    trainer = SimpleNamespace(
        num_training_batches=steps, max_epochs=config.epochs, global_step=0, current_epoch=0
    )
    for trainer.current_epoch in range(2):
        for batch in range(steps):
            progress.on_train_batch_start(trainer, SimpleNamespace(config=config), None, batch)
            clock[0] += seconds + 1000 * (trainer.global_step == 0)
            trainer.global_step += 1
    return lines


def test_time_estimate(monkeypatch):
    config = Config(epochs=40)
    assert run_clock(monkeypatch, config, 100, 3) == [
        "Estimated time: 5.0 minutes per epoch, 3.3 hours for the remaining 40, plus validation."
    ]
    estimate, warning = run_clock(monkeypatch, config, 1000, 30)
    assert (
        estimate
        == "Estimated time: 8.3 hours per epoch, 13.9 days for the remaining 40, plus validation."
    )
    assert warning.startswith("Warning: that is more than a day.") and 'PRESETS["small"]' in warning
    (estimate,) = run_clock(monkeypatch, config, 3, 30)
    assert estimate.startswith(
        "Estimated time: 1.5 minutes per epoch, 60.0 minutes for the remaining 40"
    )
    assert (
        run_clock(monkeypatch, config, 2, 30) == []
    )  # an epoch has no step between its first and its last


def test_started_and_resumed_training_print_one_estimate(tmp_path, capsys, monkeypatch):
    config = tiny(tmp_path, shapes_train=26, batch_size=2, image_size=32, width=0.05, epochs=2)
    fit(config)
    output = capsys.readouterr().out
    assert (
        output.count("Estimated time: ") == 1
        and "for the remaining 2," in output
        and "Warning" not in output
    )
    monkeypatch.setattr(callbacks, "DURATIONS", ((1e-6, "days"),))
    fit(config, ckpt_path=str(tmp_path / "previous.ckpt"))
    output = capsys.readouterr().out
    assert (
        output.count("for the remaining 1,")
        == output.count("Warning: that is more than a day")
        == 1
    )
