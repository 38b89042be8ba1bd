"""Time a training step and a prediction of this project and of ultralytics' YOLOv3, in turns.

Needs an environment of its own, because ultralytics (AGPL-3.0) is no requirement of this project:
    python3 -m venv .peers && .peers/bin/pip install -r requirements.txt ultralytics
    .peers/bin/python -m benchmarks ultralytics
Both networks are untrained and have the same width multiplier; ultralytics' has more parameters.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.synthetic_inputs import HEIGHT, WIDTH, write_jpegs
from benchmarks.timing import Row, milliseconds, seconds, table
from src.config import SHAPE_CLASSES, Config
from src.data.datamodule import DetectionDataModule, collate
from src.serving.images import to_network_input
from src.serving.predictor import Predictor
from src.training.module import YOLOv3Module

Job = Callable[[], object]


def write_data(folder: Path, images: int) -> Path:
    """Write synthetic images as a YOLO data set with the same images in both splits; return one."""
    labels = folder / "labels"
    labels.mkdir()
    (folder / "images").mkdir()
    for record in write_jpegs(folder / "images", images):
        x1, y1, x2, y2 = (record.boxes / (WIDTH, HEIGHT, WIDTH, HEIGHT)).T
        rows = zip(record.labels, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, strict=True)
        lines = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        (labels / Path(record.image).with_suffix(".txt").name).write_text(lines)
    names = dict(enumerate(SHAPE_CLASSES))
    data = {"path": str(folder), "train": "images", "val": "images", "names": names}
    (folder / "data.yaml").write_text(json.dumps(data))  # JSON is YAML
    return Path(record.image)


def our_jobs(config: Config, image: Path) -> tuple[Job, Job]:
    """Return a training step in float32 (with clipping, AdamW and EMA), and a prediction."""
    data = DetectionDataModule(config)
    data.setup()
    batch = collate([data.train_data[number] for number in range(config.batch_size)])
    detector = YOLOv3Module(data.config).train()
    model = detector.model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4, fused=True)
    ema = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    predictor = Predictor(YOLOv3Module(data.config).model, device="cpu")

    def step() -> None:
        images = to_network_input(batch["images"])
        anchors = model.anchors_at(images.shape[-1])
        logits, targets = model(images), batch["targets"]
        detector.loss(logits, targets, batch["counts"], anchors)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), config.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(detector)

    return step, lambda: predictor(image)


def their_jobs(config: Config, image: Path, folder: Path) -> tuple[Job, Job]:
    """Return the same two jobs of ultralytics, with its own trainer and its settings on a CPU."""
    os.environ["YOLO_CONFIG_DIR"] = str(folder)
    import ultralytics
    import yaml
    from ultralytics.models.yolo.detect import DetectionTrainer

    source = Path(ultralytics.__file__).parent / "cfg/models/v3/yolov3.yaml"
    model = folder / "yolov3-width.yaml"
    settings = yaml.safe_load(source.read_text()) | {"width_multiple": config.width}
    model.write_text(yaml.safe_dump(settings))
    options = {"imgsz": config.image_size, "device": "cpu", "verbose": False, "save": False}
    options["project"] = str(folder / "runs")
    training = {"model": str(model), "data": f"{folder}/data.yaml", "batch": config.batch_size}
    trainer = DetectionTrainer(overrides=options | training | {"workers": 0, "plots": False})
    trainer._setup_train()
    trainer.model.train()
    batch = next(iter(trainer.train_loader))
    yolo = ultralytics.YOLO(str(model), task="detect")

    def step() -> None:
        loss, _ = trainer.model(trainer.preprocess_batch(dict(batch)))
        loss.sum().backward()
        trainer.optimizer_step()

    return step, lambda: yolo.predict(image, **options)


def main(arguments: list[str]) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ultralytics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=int, default=224, help="image size in pixels (224)")
    parser.add_argument("--width", type=float, default=0.25, help="width multiplier (0.25)")
    parser.add_argument("--batch", type=int, default=16, help="images per batch (16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the best counts (5)")
    options = parser.parse_args(arguments)
    config = Config(
        image_size=options.size, width=options.width, batch_size=options.batch, cache_gb=0
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        image = write_data(folder, options.batch)
        ours = our_jobs(config.replace(data_root=name, dataset="yolo"), image)
        theirs = their_jobs(config, image, folder)
        times = [seconds(*jobs, rounds=options.rounds) for jobs in zip(ours, theirs, strict=True)]
    names = (f"training step, float32, batch {options.batch}", "prediction of one file")
    rows = [
        Row(name, milliseconds(mine), f"ultralytics, {milliseconds(other)}", other / mine)
        for name, (mine, other) in zip(names, times, strict=True)
    ]
    print(table(rows))
