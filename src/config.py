"""Settings of a run and their defaults."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from src.model.network import ANCHORS

DATA_ROOT = "data"  # default folder of the data; PASCAL VOC is downloaded into this one only
VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor".split()
)
SHAPE_CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "arrow")
DATASETS = {
    "voc": "PASCAL VOC",
    "yolo": "YOLO data set",
    "coco": "COCO data set",
    "shapes": "synthetic data set",
}
LIMITS = {  # lowest and highest value of a setting
    "val_fraction": (0, 1),
    "mosaic_prob": (0, 1),
    "min_visibility": (0, 1),
    "warmup_fraction": (0, 0.99),
    "ema_decay": (0, 1),
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
}


def atomic_write(
    path: Path, write: Callable, mode: str = "wb", keep_as: Path | None = None, **options
) -> None:
    """Write a file completely or not at all.

    Calls `write(file)` on a temporary file beside `path`, syncs it and renames it.
    keep_as: new name of the file that `path` replaces. options: of `open`.
    """
    part = path.with_name(path.name + ".part")
    with open(part, mode, **options) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if keep_as and path.exists():
        os.replace(path, keep_as)
    os.replace(part, path)


def setting(default, **metadata):
    """Declare a field of `Config`.

    metadata: data=True if the field determines the batches: a data module made with another value
    is refused; resumable=True if it may differ when a run is resumed.
    """
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run, written as JSON into its folder; `Config.load` reads them back."""

    # data
    # "voc": files in data_root, also recognized as "yolo" or "coco"; "shapes": synthetic data set
    dataset: str = setting("voc", data=True)
    data_root: str = dataclasses.field(  # folder of VOCdevkit, data.yaml or COCO
        default_factory=lambda: os.environ.get("VOC_ROOT", DATA_ROOT),
        metadata={"data": True, "resumable": True},
    )
    train_splits: tuple[str, ...] = setting(("2007/trainval", "2012/trainval"), data=True)
    val_splits: tuple[str, ...] = setting(("2007/test",), data=True)  # empty: see val_fraction
    val_fraction: float = setting(0.2, data=True)  # of the training images, at random
    # YOLO and COCO: the default stands for the data set's own classes
    classes: tuple[str, ...] = setting(VOC_CLASSES, data=True)
    skip_bad_files: bool = setting(False, data=True, resumable=True)  # leave out unusable images
    shapes_train: int = setting(1200, data=True)  # training images of the synthetic data set
    shapes_val: int = setting(300, data=True)
    cache_gb: float = setting(12.0, resumable=True)  # limit per cache of resized images; 0: none
    # loader processes per device; -1: the cores divided by the devices, at most 8
    num_workers: int = setting(-1, resumable=True)

    # images
    image_size: int = setting(416, data=True)  # width and height in pixels, a multiple of 32
    # image sizes of multi-resolution training; empty: image_size only
    multiscale_sizes: tuple[int, ...] = setting((), data=True)
    multiscale_interval: int = 10  # steps until the next random image size
    mosaic_prob: float = setting(0.75, data=True)  # fraction of four-image mosaics
    # last epochs without mosaics, at image_size; at most half of the epochs
    close_mosaic_epochs: int = setting(2, data=True)
    # long side of an image in a mosaic, relative to the canvas; the same for single images
    mosaic_scale: tuple[float, float] = setting((0.7, 1.1), data=True)
    image_scale: tuple[float, float] = setting((0.85, 1.15), data=True)
    # boxes with a smaller visible fraction of their area are dropped
    min_visibility: float = setting(0.25, data=True)

    # model
    width: float = 1.0  # width multiplier: channels of every layer, relative to the paper
    # [3 scales][3] (width, height), relative to an image of image_size; a pretrained detector
    # brings its own
    anchors: tuple = ANCHORS
    # a folder (detector or backbone), a detector's Hub id, darknet53.conv.74 or yolov3.weights
    pretrained_weights: str = setting("", resumable=True)

    # training
    epochs: int = setting(40, data=True)
    batch_size: int = setting(32, data=True)  # images per batch and device
    # batches per optimizer step; effective batch size: batch_size * this * devices
    accumulate_grad_batches: int = 1
    # peak of OneCycle; 0: find it with the learning-rate range test. A resumed run keeps its own.
    max_lr: float = setting(0.0, resumable=True)
    warmup_fraction: float = 0.1  # fraction of the steps in which the learning rate rises
    weight_decay: float = 0.05  # of kernels only, not of biases and batch norm
    gradient_clip_val: float = 10.0  # L2 norm; 0: no clipping
    ema_decay: float = 0.998
    box_weight: float = 2.0
    objectness_weight: float = 2.0  # of positives
    background_weight: float = 1.0  # objectness of the background
    class_weight: float = 1.0
    # "auto": "16-mixed" on CUDA, "bf16-mixed" on a CPU with bfloat16, else "32-true"
    precision: str = setting("auto", resumable=True)
    devices: int = setting(1, data=True)  # GPUs, each with a process of its own
    seed: int = setting(0, data=True)
    run_dir: str = setting("runs/voc", resumable=True)

    def __post_init__(self):
        for name in self.names():
            object.__setattr__(self, name, to_tuple(getattr(self, name)))
        self._validate()

    def _validate(self) -> None:
        """Raise ValueError that names the first setting that can't be used."""
        for name in ("classes", "train_splits", "val_splits", "multiscale_sizes"):
            value = getattr(self, name)
            if not isinstance(value, tuple):  # ("mask") is a text, ("mask",) a tuple
                raise ValueError(f"Config.{name} is {value!r}. Use a tuple: ({value!r},)")
        for size in (self.image_size, *self.multiscale_sizes):
            if size < 32 or size % 32:
                raise ValueError(f"Config: image size {size} is not a positive multiple of 32.")
        if self.dataset not in DATASETS:
            raise ValueError(
                f"Config.dataset is {self.dataset!r}. Use one of {', '.join(DATASETS)}."
            )
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(
                f"Config.classes is {self.classes!r}. Use at least one class, each only once."
            )
        for name, (lowest, highest) in LIMITS.items():
            if not lowest <= getattr(self, name) <= highest:
                raise ValueError(
                    f"Config.{name} is {getattr(self, name)}. Use {lowest} to {highest}."
                )

    @classmethod
    def names(cls, **metadata: bool) -> list[str]:
        """Return the names of the fields with this metadata, such as data=True; see `setting`."""
        return [
            field.name
            for field in dataclasses.fields(cls)
            if all(field.metadata.get(key, False) == value for key, value in metadata.items())
        ]

    def replace(self, **changes) -> "Config":
        """Return a copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON, paths as text, atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=1, default=str) + "\n"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), lambda file: file.write(text), "w", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        """Read settings written by `save`."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    @property
    def canvas_size(self) -> int:
        """Size of the training samples: the largest image size, so batches are only downscaled."""
        return max((self.image_size, *self.multiscale_sizes))

    @property
    def close_mosaic_epoch(self) -> int:
        """First epoch (from 0) without mosaics and multi-resolution."""
        return self.epochs - min(self.close_mosaic_epochs, self.epochs // 2)


def to_tuple(value):
    """Convert lists and ranges, also nested, to tuples: JSON has lists only."""
    return tuple(map(to_tuple, value)) if isinstance(value, list | tuple | range) else value


PRESETS = {
    # the assignment: full width, 416 pixels, 07+12 trainval to 07 test; needs a GPU
    "voc": Config(),
    # the detector in weights/; 80 epochs of its 8,090 photographs (docs/RESULTS.md) are as many
    # samples as 39 epochs of 07+12; about 5 hours on 2 CPU cores with bfloat16
    "photographs": Config(
        train_splits=("2007/train", "2012/train"),
        val_splits=("2007/val", "2012/val"),
        image_size=320,
        multiscale_sizes=(128, 192, 256, 320),
        close_mosaic_epochs=10,
        width=0.25,
        pretrained_weights="weights/backbone",
        epochs=80,
        batch_size=16,
        max_lr=6e-3,
        objectness_weight=3.0,
        class_weight=2.0,
        run_dir="runs/photographs",
    ),
    "small": Config(  # your own data on a CPU or a small GPU, from the detector in weights/
        image_size=224,
        width=0.25,
        pretrained_weights="weights",
        batch_size=16,
        max_lr=4e-3,
        run_dir="runs/small",
    ),
    "shapes": Config(  # synthetic data set; about 3 minutes on 2 CPU cores
        dataset="shapes",
        classes=SHAPE_CLASSES,
        shapes_train=1000,
        shapes_val=200,
        image_size=128,
        width=0.25,
        pretrained_weights="weights/backbone",
        epochs=9,
        batch_size=8,
        max_lr=2e-3,
        warmup_fraction=0.15,
        close_mosaic_epochs=3,
        run_dir="runs/shapes",
    ),
}
