"""Detect objects in an image, a folder of images or a video, and save the results.

python -m src.serving.predict SOURCE [--weights FOLDER] [--save FOLDER] [--heatmap]
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from src.serving.drawing import draw_detections, draw_explanation
from src.serving.images import IMAGE_SUFFIXES, load_image
from src.serving.predictor import CONFIDENCE, IOU_THRESHOLD, Detections, Predictor

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
DEFAULT_FPS = 25.0  # if a video does not state its own
PROGRESS_INTERVAL = 5.0  # seconds between two progress lines of a video
BAD_VIDEO = "Check that it plays, or convert it to MP4."
SUPPORTED = f"Supported files: {', '.join(sorted(IMAGE_SUFFIXES))}."
WEIGHTS = Path(__file__).parents[2] / "weights"


def predict(
    source: str | Path,
    predictor: Predictor,
    folder: str | Path = "runs/predict",
    confidence: float = CONFIDENCE,
    iou_threshold: float = IOU_THRESHOLD,
    heatmap: bool = False,
) -> list[dict]:
    """Save copies of all images of `source` with their detections drawn, and predictions.json.

    source: an image, a folder of images or a video. A video is saved as MP4, without sound.
    heatmap: also save the heatmap of each image's detections. Not for videos.
    Returns the content of predictions.json: per image its name (of a video also "frame", from 0),
    width, height and the detections, see `detections_to_dicts`; of an unreadable image "error".
    Raises FileNotFoundError if `source` is missing or has no images, ValueError if an option
    doesn't fit or a video can't be decoded, OSError if a file can't be written.
    """
    source = Path(source)
    folder = Path(folder)
    files = source_files(source)
    if files[0].parent.resolve() == folder.resolve():
        raise ValueError(f"{folder} contains the source. Choose another folder for the results.")
    is_video = files[0].suffix.lower() in VIDEO_SUFFIXES
    if is_video and heatmap:
        raise ValueError("There are no heatmaps for videos. Leave out the heatmap.")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    entries = []
    thresholds = (confidence, iou_threshold)
    try:
        if is_video:
            entries.extend(predict_video(source, predictor, folder, thresholds))
        else:
            entries.extend(predict_images(files, predictor, folder, thresholds, heatmap))
    finally:  # also after Ctrl-C
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        (folder / "predictions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print_summary(entries, time.perf_counter() - start, "frame" if is_video else "image")
    print(f"Results: {folder}")
    return entries


def source_files(source: Path) -> list[Path]:
    """Return the file `source`, or the image files in the folder `source`, sorted.

    Prints how many other files a folder has. Raises FileNotFoundError if there is none.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist. Give an image, a folder of images or a video."
        )
    if source.is_file():
        return [source]
    files = [path for path in source.iterdir() if path.is_file() and path.name[0] != "."]
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise FileNotFoundError(f"{source} has no images. {SUPPORTED}")
    if others := sorted({path.suffix.lower() or path.name for path in set(files) - set(images)}):
        count = len(files) - len(images)
        print(f"{source}: other files are left out ({count}): {', '.join(others)}. {SUPPORTED}")
    return images


def predict_images(
    files: list[Path], predictor: Predictor, folder: Path, thresholds: tuple, heatmap: bool
) -> Iterator[dict]:
    """Save and yield the results of each image. Unreadable ones are reported and skipped."""
    for number, (file, stem) in enumerate(zip(files, output_stems(files), strict=True), start=1):
        try:
            image = load_image(file)
        except (OSError, ValueError) as error:
            print(f"{number} of {len(files)}: {error}")
            yield {"image": file.name, "error": str(error)}
            continue
        drawn, result = detect(predictor, image, thresholds)
        Image.fromarray(drawn).save(folder / f"{stem}.jpg", quality=90)
        if heatmap:
            from src.serving.gradcam import explain  # loads matplotlib, through grad-cam

            explanation = explain(
                predictor, image, confidence=thresholds[0], iou_threshold=thresholds[1]
            )
            drawn = draw_explanation(image, explanation, predictor.classes)
            Image.fromarray(drawn).save(folder / f"{stem}_heatmap.jpg", quality=90)
        print(f"{number} of {len(files)}: {file.name}: {count_classes(result)}", flush=True)
        yield {"image": file.name, **result}


def predict_video(
    source: Path, predictor: Predictor, folder: Path, thresholds: tuple
) -> Iterator[dict]:
    """Save a video of the results, and yield those of each frame."""
    capture = cv2.VideoCapture(str(source))
    fps = capture.get(cv2.CAP_PROP_FPS)
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    writer = None
    printed = time.perf_counter()
    number = 0
    try:
        while (frame := capture.read()[1]) is not None:
            drawn, result = detect(predictor, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), thresholds)
            writer = writer or open_writer(folder / f"{source.stem}.mp4", fps, frame)
            writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            yield {"image": source.name, "frame": number, **result}
            number += 1
            if time.perf_counter() - printed > PROGRESS_INTERVAL:
                printed = time.perf_counter()
                found = count_classes(result)
                print(f"{source.name}: frame {number} of {total}: {found}", flush=True)
    finally:
        capture.release()
        if writer:
            writer.release()
    if not number:
        raise ValueError(f"{source} can't be read as a video. {BAD_VIDEO}")


def detect(
    predictor: Predictor, image: np.ndarray, thresholds: tuple[float, float]
) -> tuple[np.ndarray, dict]:
    """Return a copy of uint8 [H, W, 3] RGB with its detections drawn, and size and detections."""
    detections = predictor(image, *thresholds)
    height, width = image.shape[:2]
    rows = detections_to_dicts(detections, predictor.classes)
    result = {"width": width, "height": height, "detections": rows}
    return draw_detections(image, detections, predictor.classes), result


def detections_to_dicts(detections: Detections, classes: list[str]) -> list[dict]:
    """Return "class", "confidence" and "box" of each detection, best first.

    "box": left, top, right, bottom in pixels.
    """
    return [
        {
            "class": classes[label],
            "confidence": round(float(score), 4),
            "box": box.astype(float).round(1).tolist(),
        }
        for label, score, box in zip(
            detections.labels, detections.scores, detections.boxes, strict=True
        )
    ]


def output_stems(files: list[Path]) -> list[str]:
    """Return the names of the results without suffix: the images' stems, if all differ.

    Otherwise the images' full names. A and a are one file on macOS and Windows.
    """
    stems = [file.stem for file in files]
    names = {f"{stem}{end}".casefold() for stem in stems for end in ("", "_heatmap")}
    return stems if len(names) == 2 * len(files) else [file.name for file in files]


def open_writer(path: Path, fps: float, frame: np.ndarray) -> cv2.VideoWriter:
    """Start an MP4 file of frames of this frame's size. Raises OSError if OpenCV can't write it."""
    height, width = frame.shape[:2]
    fps = fps if 0 < fps < 1000 else DEFAULT_FPS
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise OSError(f"{path} can't be written as a video of {width} x {height} pixels.")
    return writer


def count_classes(result: dict) -> str:
    """Describe detections, such as "2 dog, 1 person"."""
    counts = Counter(detection["class"] for detection in result["detections"])
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no detections"


def print_summary(entries: list[dict], seconds: float, unit: str) -> None:
    """Print the number of images or frames, detections and errors, and the speed."""
    counts = [len(entry["detections"]) for entry in entries if "error" not in entry]
    speed = f"{len(counts) / seconds:.1f} {unit}s per second with reading and writing"
    print(f"{unit.capitalize()}s: {len(counts)}, detections: {sum(counts)}, {speed}.")
    if failed := len(entries) - len(counts):
        print(f"{failed} of {len(entries)} images can't be read.")


def main() -> None:
    """Run the command. The exit status is 1 if an image can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m src.serving.predict",
        description="Detect objects and save the results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("source", help="an image, a folder of images or a video")
    add("--weights", default=WEIGHTS, help="exported weights: a folder or Hub id")
    add("--confidence", type=float, default=CONFIDENCE, help="confidence threshold")
    add("--iou-threshold", type=float, default=IOU_THRESHOLD, help="NMS IoU threshold")
    add("--save", default="runs/predict", metavar="FOLDER", help="for the results")
    add("--heatmap", action="store_true", help="also save the heatmap of each image")
    args = parser.parse_args()
    thresholds = (args.confidence, args.iou_threshold)
    try:
        predictor = Predictor.load(args.weights)
        entries = predict(args.source, predictor, args.save, *thresholds, args.heatmap)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(str(error))
    sys.exit(any("error" in entry for entry in entries))


if __name__ == "__main__":
    main()
