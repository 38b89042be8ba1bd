"""Jobs of this project."""

import itertools
import tempfile
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.peers.serve import Job, bias_shift, calibrate_batch_norm, describe, files, serve
from src.config import Config
from src.data.cache import ImageCache
from src.data.datamodule import DetectionDataModule, collate
from src.data.mosaic import MosaicDataset
from src.model.boxes import decode
from src.serving.images import to_network_input
from src.serving.predictor import MIN_SCORE, Predictor
from src.training.fit import evaluate
from src.training.module import YOLOv3Module
from src.training.optimizer import onecycle_adamw

CHUNK = 8  # images per forward pass when a folder is predicted


def start(settings: dict) -> tuple[dict, dict]:
    """Build the network and the jobs."""
    config = Config(
        data_root=settings["data"],
        image_size=settings["size"],
        width=settings["width"],
        batch_size=settings["batch"],
        max_lr=1e-3,
        mosaic_prob=1.0,
        num_workers=0,
        cache_gb=0,
        epochs=1000,
        precision="32-true",
    )
    data = DetectionDataModule(config)
    data.setup()
    config = data.config
    detector = YOLOv3Module(config)
    batch = collate([data.train_data[number] for number in range(settings["batch"])])
    calibrate(detector, batch)
    predictor = Predictor(detector.model, device="cpu")
    images = files(f"{settings['data']}/images/val", settings["folder"])
    loader_config = config.replace(image_size=settings["loader_size"])
    return describe("this project", detector.model, settings["size"]), {
        "train float32": lambda: training_step(config, batch, False),
        "train bfloat16": lambda: training_step(config, batch, True),
        "sample cold": lambda: first_epoch(data.train_records, loader_config),
        "sample warm": lambda: later_epochs(data.train_records, loader_config),
        "validate": lambda: lambda: (evaluate(detector, data), len(data.val_records))[1],
        "predict image": lambda: lambda: (predictor(images[0]), 1)[1],
        "predict folder": lambda: lambda: predict_folder(predictor, images),
    }


def calibrate(detector: YOLOv3Module, batch: dict) -> None:
    """Calibrate batch norm and the objectness bias on a batch."""
    model, images = detector.model, to_network_input(batch["images"])
    calibrate_batch_norm(model, images)
    with torch.no_grad():
        logits = [level.float() for level in model(images)]

        def scores(shift: float) -> torch.Tensor:
            shifted = [
                torch.cat((level[..., :1] + shift, level[..., 1:]), dim=-1) for level in logits
            ]
            return decode(shifted, model.anchors_at(images.shape[-1]))[1].amax(dim=2)

        for head in model.heads:
            head.predict.bias.view(3, -1)[:, 0] += bias_shift(scores, MIN_SCORE, len(images))


def training_step(config: Config, batch: dict, bfloat16: bool) -> Job:
    """Forward pass, loss, backward pass, clipping, AdamW, schedule and EMA."""
    detector = YOLOv3Module(config).train()
    model = detector.model.to(memory_format=torch.channels_last)
    optimizers = onecycle_adamw(
        detector, config.max_lr, config.weight_decay, config.warmup_fraction, 1_000_000
    )
    optimizer, scheduler = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    ema = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))

    def step() -> int:
        images = to_network_input(batch["images"])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            terms = detector.loss(
                model(images), batch["targets"], model.anchors_at(images.shape[-1])
            )
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), config.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        ema.update_parameters(detector)
        return len(images)

    return step


def first_epoch(records: list, config: Config) -> Job:
    """One pass over the images with an empty cache."""

    def epoch() -> int:
        with tempfile.TemporaryDirectory() as folder:
            dataset = MosaicDataset(
                records, config, ImageCache(Path(folder) / "cache", len(records), config.image_size)
            )
            return len([dataset[number] for number in range(len(records))])

    return epoch


def later_epochs(records: list, config: Config) -> Job:
    """Passes over the images with a filled cache."""
    folder = tempfile.TemporaryDirectory()
    dataset = MosaicDataset(
        records, config, ImageCache(Path(folder.name) / "cache", len(records), config.image_size)
    )
    sample_ids = itertools.count()

    def epoch() -> int:
        folder.name  # keeps the cache until the process ends  # noqa: B018
        return len([dataset[next(sample_ids)] for _ in records])

    for index in range(len(records)):
        dataset.image(index)
    return epoch


def predict_folder(predictor: Predictor, images: list[str]) -> int:
    for first in range(0, len(images), CHUNK):
        predictor.batch(images[first : first + CHUNK])
    return len(images)


if __name__ == "__main__":
    serve(start)
