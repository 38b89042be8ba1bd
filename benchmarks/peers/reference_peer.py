"""Jobs of the reference solution (github.com/sdev2030/ERA1_Session13), from a checkout. Runs in its own environment only."""

import importlib
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.peers.serve import Job, bias_shift, calibrate_batch_norm, describe, files, serve

CLASSES = 20
OPTIONAL = ("torchsummary",)  # imported by the checkout, but not needed here


def start(settings: dict) -> tuple[dict, dict]:
    """Build the network and the jobs. The network is the one without pooling, which would fix the grids of 416 pixels."""
    sys.path.insert(0, settings["checkout"])
    for name in OPTIONAL:
        sys.modules.setdefault(name, types.SimpleNamespace(summary=None))
    config = load_config(Path(settings["checkout"]), settings["size"])
    model, utils = importlib.import_module("model"), importlib.import_module("utils")
    utils.tqdm = lambda iterable, **_: iterable  # its progress bar needs a notebook
    model.model_config[:] = [scale_width(layer, settings["width"]) for layer in model.model_config]
    network = model.YOLOv3(num_classes=CLASSES)
    batch = next(
        iter(
            DataLoader(
                Usable(dataset(config, settings, "train", config.train_transforms)),
                settings["batch"],
            )
        )
    )
    calibrate(network, batch[0], config.CONF_THRESHOLD)
    images = files(f"{settings['data']}/images/val", settings["folder"])
    loader_config = load_config(Path(settings["checkout"]), settings["loader_size"])
    samples = Usable(
        dataset(loader_config, settings, "train", loader_config.train_transforms, mosaic=1.0)
    )
    validation = DataLoader(
        Usable(dataset(config, settings, "val", config.test_transforms)), settings["batch"]
    )
    return describe("reference solution", network, settings["size"]), {
        "train float32": lambda: training_step(model, config, batch, False),
        "train bfloat16": lambda: training_step(model, config, batch, True),
        "sample cold": lambda: lambda: len([samples[number] for number in range(len(samples))]),
        "sample warm": lambda: lambda: len([samples[number] for number in range(len(samples))]),
        "validate": lambda: lambda: validate(utils, config, network, validation),
        "predict image": lambda: lambda: predict(utils, config, network, images[:1]),
        "predict folder": lambda: lambda: predict(utils, config, network, images),
    }


def load_config(checkout: Path, size: int) -> types.ModuleType:
    """Load its config.py with another image size."""
    module = sys.modules["config"] = types.ModuleType("config")
    source = re.sub(
        r"^IMAGE_SIZE = .*$",
        f"IMAGE_SIZE = {size}",
        (checkout / "config.py").read_text(),
        flags=re.MULTILINE,
    )
    exec(compile(source, str(checkout / "config.py"), "exec"), module.__dict__)
    return module


def scale_width(layer, width: float):
    """Scale the channels of an entry (channels, kernel, stride) of its model_config."""
    return (max(1, int(layer[0] * width)), *layer[1:]) if isinstance(layer, tuple) else layer


def dataset(config, settings: dict, split: str, transform, mosaic: float = 0.0):
    root = settings["data"]
    data = importlib.import_module("dataset").YOLODataset(
        f"{root}/{split}.csv",
        f"{root}/images/{split}",
        f"{root}/labels/{split}",
        config.ANCHORS,
        image_size=config.IMAGE_SIZE,
        S=config.S,
        C=CLASSES,
        transform=transform,
    )
    data.mosaic_p = mosaic
    return data


class Usable:
    """Its data set, with the next sample instead of one that raises an error: boxes at the edge do, in albumentations 2."""

    def __init__(self, data):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        for offset in range(len(self)):
            try:
                return self.data[(index + offset) % len(self)]
            except (ValueError, IndexError):
                continue
        raise RuntimeError("no sample of the reference's data set can be used")


def calibrate(network, images, threshold: float) -> None:
    """Calibrate batch norm and the objectness bias on a batch."""
    calibrate_batch_norm(network, images)
    with torch.no_grad():
        logits = torch.cat([level[..., 0].flatten() for level in network(images)])
        shift = bias_shift(lambda shift: (logits + shift).sigmoid(), threshold, len(images))
        for layer in network.layers:
            if hasattr(layer, "pred"):
                layer.pred[-1].conv.bias.view(3, -1)[:, 0] += shift


def training_step(model, config, batch, bfloat16: bool) -> Job:
    """Forward pass, loss, backward pass and Adam; it has neither clipping nor EMA."""
    network, loss_function = model.YOLOv3(num_classes=CLASSES).train(), model.YoloLoss()
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.LEARNING_RATE, weight_decay=config.WEIGHT_DECAY
    )
    anchors = torch.tensor(config.ANCHORS) * torch.tensor(config.S)[:, None, None]
    images, targets = batch

    def step() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = network(images)
        parts = zip(logits, targets, anchors, strict=True)
        loss = sum(
            loss_function(level.float(), target.clone(), scale) for level, target, scale in parts
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(images)

    return step


def validate(utils, config, network, loader) -> int:
    """Validate with its predictions, NMS and mean average precision."""
    predictions, ground_truth = utils.get_evaluation_bboxes(
        loader,
        network,
        iou_threshold=config.NMS_IOU_THRESH,
        anchors=config.ANCHORS,
        threshold=config.CONF_THRESHOLD,
        device="cpu",
    )
    utils.mean_average_precision(
        predictions,
        ground_truth,
        iou_threshold=config.MAP_IOU_THRESH,
        box_format="midpoint",
        num_classes=CLASSES,
    )
    return len(loader.dataset)


@torch.no_grad()
def predict(utils, config, network, images: list[str]) -> int:
    """Predict one image after another with its transforms, decoding and NMS."""
    network.eval()
    for path in images:
        image = config.test_transforms(image=np.array(Image.open(path).convert("RGB")), bboxes=[])[
            "image"
        ][None]
        boxes = []
        for level, anchors in zip(network(image), config.ANCHORS, strict=True):
            grid = level.shape[2]
            boxes += utils.cells_to_bboxes(level, torch.tensor(anchors) * grid, S=grid)[0]
        utils.non_max_suppression(boxes, config.NMS_IOU_THRESH, 0.25, box_format="midpoint")
    return len(images)


if __name__ == "__main__":
    serve(start)
