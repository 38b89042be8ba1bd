"""Detect objects in an image, a folder of images, a video or a camera's stream, and save the results.

python -m src.serving.predict SOURCE [--weights FOLDER] [--save FOLDER] [--format json|yolo] [--heatmap]
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from src.serving.drawing import draw_detections, draw_heatmap
from src.serving.images import IMAGE_SUFFIXES, load_image
from src.serving.predictor import CONFIDENCE, IOU_THRESHOLD, Detections, Predictor

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
FORMATS = ("json", "yolo")
DEFAULT_FPS = 25.0  # if a video or camera does not state its own
PROGRESS_INTERVAL = 5.0  # seconds between two progress lines of a video
BAD_VIDEO = "Check that it plays, or convert it to MP4."
SUPPORTED = f"Supported files: {', '.join(sorted(IMAGE_SUFFIXES))}."
WEIGHTS = Path(__file__).parents[2] / "weights"


def predict(
    source: str | Path | int,
    predictor: Predictor,
    folder: str | Path = "runs/predict",
    confidence: float = CONFIDENCE,
    iou_threshold: float = IOU_THRESHOLD,
    format: str = "json",
    heatmap: bool = False,
) -> list[dict]:
    """Save copies of all images of `source` with their detections drawn, and the detections themselves, in `folder`.

    source: an image, a folder of images, a video, or the number of a camera (until Ctrl-C). Videos are saved as MP4.
    format: "json" writes predictions.json: a list of the image's name (in videos also "frame", from 0), width, height
        and detections as `detections_to_dicts` returns them. "yolo" writes STEM.txt per image: class index, cx, cy, w, h
        as fractions of the image.
    heatmap: also save the Grad-CAM heatmap of each image's detections. Images only.
    Returns the content of predictions.json. The entry of an unreadable image has its name and "error".
    Raises FileNotFoundError if `source` is missing or has no images, ValueError for options that don't fit it or a
    video that can't be decoded, OSError if a camera or output can't be opened.
    """
    source, folder = parse_source(source), Path(folder)
    is_video = isinstance(source, int) or source.suffix.lower() in VIDEO_SUFFIXES
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}. Choose one of {', '.join(FORMATS)}.")
    if is_video and heatmap:
        raise ValueError(
            "Heatmaps are computed for images only. Leave out the heatmap, or give an image or a folder."
        )
    files = source_files(source, folder)
    run = PredictionRun(predictor, folder, confidence, iou_threshold, format)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if is_video:
            run.predict_video(source)
        else:
            run.predict_images(files, heatmap)
    finally:
        if format == "json" and run.entries:
            lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in run.entries)
            (folder / "predictions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    run.print_summary("frame" if is_video else "image")
    return run.entries


def parse_source(source: str | Path | int) -> Path | int:
    """Convert a path or a camera number in digits. Raises FileNotFoundError if there is no such path."""
    if isinstance(source, int) or (str(source).isdecimal() and not Path(source).exists()):
        return int(source)
    if not Path(source).exists():
        raise FileNotFoundError(
            f"{source} does not exist. Give an image, a folder of images, a video file or a camera number."
        )
    return Path(source)


def source_files(source: Path | int, folder: Path) -> list[Path]:
    """Return the files of a source, none for a camera. Raises ValueError if results in `folder` could overwrite them."""
    files = [] if isinstance(source, int) else [source] if source.is_file() else list_images(source)
    if any(file.parent.resolve() == folder.resolve() for file in files):
        raise ValueError(
            f"{folder} contains the source, which the results could overwrite. Choose another folder."
        )
    return files


def list_images(folder: Path) -> list[Path]:
    """Return the image files of a folder, without its subfolders, sorted. Prints how many other files it has.

    Raises FileNotFoundError if there are no images.
    """
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )  # macOS: ._photo.jpg
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise FileNotFoundError(f"{folder} has no images. {SUPPORTED}")
    if others := sorted({path.suffix.lower() or path.name for path in set(files) - set(images)}):
        print(
            f"{folder}: other files are left out ({len(files) - len(images)}): {', '.join(others)}. {SUPPORTED}"
        )
    return images


def detections_to_dicts(detections: Detections, classes: list[str]) -> list[dict]:
    """Return "class", "confidence" and "box" (left, top, right, bottom in pixels) of each detection, best first."""
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


def detections_to_yolo(detections: Detections, width: int, height: int) -> str:
    """Return a YOLO label file of an image of width x height pixels: a line "class cx cy w h" per detection, in 0..1."""
    x1, y1, x2, y2 = (detections.boxes / (width, height, width, height)).T
    rows = zip(detections.labels, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, strict=True)
    return "".join(f"{label} {cx:.6f} {cy:.6f} {w:.6f} {h:.6f}\n" for label, cx, cy, w, h in rows)


@dataclass
class PredictionRun:
    """One call of `predict`: its settings and the entries so far."""

    predictor: Predictor
    folder: Path
    confidence: float
    iou_threshold: float
    format: str
    entries: list[dict] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def predict_images(self, files: list[Path], heatmap: bool) -> None:
        """Process image files. Unreadable ones are reported and skipped."""
        for number, (file, stem) in enumerate(
            zip(files, output_stems(files), strict=True), start=1
        ):
            try:
                image = load_image(file)
            except (OSError, ValueError) as error:
                self.entries.append({"image": file.name, "error": str(error)})
                print(error)
                continue
            self.save_image(self.detect(image, stem, image_name=file.name), f"{stem}.jpg")
            if heatmap:
                self.save_image(self.explain(image), f"{stem}_heatmap.jpg")
            print(
                f"{number} of {len(files)}: {file.name}: {count_classes(self.entries[-1])}",
                flush=True,
            )

    def predict_video(self, source: Path | int) -> None:
        """Process a video file, or a camera until Ctrl-C."""
        name, stem = (
            (source.name, source.stem)
            if isinstance(source, Path)
            else (f"camera {source}", f"camera_{source}")
        )
        capture, writer, printed = open_video(source), None, self.start
        total = (
            f" of {capture.get(cv2.CAP_PROP_FRAME_COUNT):.0f}" if isinstance(source, Path) else ""
        )
        try:
            while (frame := capture.read()[1]) is not None:
                number, image = len(self.entries), cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                drawn = self.detect(image, f"{stem}_{number:06d}", image_name=name, frame=number)
                writer = writer or open_writer(
                    self.folder / f"{stem}.mp4", capture.get(cv2.CAP_PROP_FPS), frame
                )
                writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
                if time.perf_counter() - printed > PROGRESS_INTERVAL:
                    printed = time.perf_counter()
                    print(
                        f"{name}: frame {number + 1}{total}: {count_classes(self.entries[-1])}",
                        flush=True,
                    )
        except KeyboardInterrupt:
            if isinstance(source, Path):
                raise
        finally:
            capture.release()
            if writer:
                writer.release()
        if not self.entries:
            raise ValueError(f"{name} has no readable frame. {BAD_VIDEO}")

    def detect(self, image: np.ndarray, stem: str, image_name: str, **position: int) -> np.ndarray:
        """Detect objects in uint8 [H, W, 3] RGB, record them, and return a copy with the detections drawn."""
        classes, (height, width) = self.predictor.classes, image.shape[:2]
        detections = self.predictor(image, self.confidence, self.iou_threshold)
        entry = {"image": image_name, **position, "width": width, "height": height}
        self.entries.append(entry | {"detections": detections_to_dicts(detections, classes)})
        if self.format == "yolo":
            text = detections_to_yolo(detections, width, height)
            (self.folder / f"{stem}.txt").write_text(text, encoding="utf-8")
        return draw_detections(image, detections, classes)

    def explain(self, image: np.ndarray) -> np.ndarray:
        """Return a copy of the image with its Grad-CAM heatmap and the boxes that this explains."""
        from src.serving.gradcam import explain  # loads matplotlib, through grad-cam

        result = explain(
            self.predictor, image, confidence=self.confidence, iou_threshold=self.iou_threshold
        )
        drawn, classes = draw_heatmap(image, result.heatmap), self.predictor.classes
        return draw_detections(
            drawn, result.detections, classes, result.is_candidate, result.explained
        )

    def save_image(self, image: np.ndarray, name: str) -> None:
        """Write a JPEG file."""
        Image.fromarray(image).save(self.folder / name, quality=90)

    def print_summary(self, unit: str) -> None:
        """Print the number of images or frames, detections and errors, and the speed."""
        counts = [len(entry["detections"]) for entry in self.entries if "error" not in entry]
        done, seconds = len(counts), time.perf_counter() - self.start
        numbers = ", ".join(
            f"{n:,} {noun}{'s' * (n != 1)}"
            for n, noun in ((done, unit), (sum(counts), "detection"))
        )
        print(
            f"{numbers}, {done / seconds:.1f} {unit}s per second (with reading and writing). Results: {self.folder}"
        )
        failed = len(self.entries) - done
        if failed:
            print(f"{failed} of {len(self.entries)} images can't be read.")


def output_stems(files: list[Path]) -> list[str]:
    """Return the file names of the results, without suffix: the images' stems, or their full names if results would collide."""
    stems = [file.stem for file in files]
    names = {
        f"{stem}{suffix}".casefold() for stem in stems for suffix in ("", "_heatmap")
    }  # A and a are one file on macOS
    return stems if len(names) == 2 * len(files) else [file.name for file in files]


def open_video(source: Path | int) -> cv2.VideoCapture:
    """Open a video file or a camera. Raises ValueError for a file and OSError for a camera if that fails."""
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if capture.isOpened():
        return capture
    if isinstance(source, int):
        raise OSError(
            f"Camera {source} can't be opened. Check that it is connected and that no other program uses it."
        )
    raise ValueError(f"{source} can't be read as a video. {BAD_VIDEO}")


def open_writer(path: Path, fps: float, frame: np.ndarray) -> cv2.VideoWriter:
    """Start an MP4 file of frames of this frame's size. Raises OSError if OpenCV can't write it."""
    height, width = frame.shape[:2]
    fps = fps if 0 < fps < 1000 else DEFAULT_FPS
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise OSError(f"{path} can't be written as a video of {width} x {height} pixels.")
    return writer


def count_classes(entry: dict) -> str:
    """Describe an entry's detections, such as "2 dog, 1 person"."""
    counts = Counter(detection["class"] for detection in entry["detections"])
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no detections"


def main() -> None:
    """Run the command. The exit status is 1 if an image can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m src.serving.predict", description="Detect objects and save the results."
    )
    parser.add_argument(
        "source", help="an image, a folder of images, a video file or a camera number"
    )
    parser.add_argument(
        "--weights",
        default=WEIGHTS,
        help="exported weights: a folder or Hub id; default: the shipped ones",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=CONFIDENCE,
        help="confidence threshold (default: %(default)s)",
    )
    parser.add_argument(
        "--iou-threshold",
        type=float,
        default=IOU_THRESHOLD,
        help="NMS IoU threshold (default: %(default)s)",
    )
    parser.add_argument(
        "--save",
        default="runs/predict",
        metavar="FOLDER",
        help="for the results (default: %(default)s)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="json", help="of the detections (default: %(default)s)"
    )
    parser.add_argument(
        "--heatmap", action="store_true", help="also save a Grad-CAM heatmap per image"
    )
    args = parser.parse_args()
    try:
        predictor = Predictor.load(args.weights)
        entries = predict(
            args.source,
            predictor,
            args.save,
            args.confidence,
            args.iou_threshold,
            args.format,
            args.heatmap,
        )
    except (OSError, ValueError, ImportError) as error:
        sys.exit(str(error))
    sys.exit(any("error" in entry for entry in entries))


if __name__ == "__main__":
    main()
