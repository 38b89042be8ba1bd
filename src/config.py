"""Settings of a run and their defaults."""

import dataclasses
import json
import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from src.model.network import ANCHORS

REPOSITORY = Path(__file__).parents[1]
DATA_ROOT = "data"  # default folder of the data; only this one is created to download PASCAL VOC
VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor".split()
)
SHAPE_CLASSES = tuple("circle triangle star ring crescent heart arrow bolt".split())


class Settings:
    """Base of the dataclasses that hold a run's settings: copies and JSON files."""

    def replace(self, **changes) -> "Settings":
        """Return a copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON, atomically."""
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> "Settings":
        """Read settings written by `save`, with current or former names. Raises ValueError that names file and field."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a JSON file of settings: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not a JSON file of settings: it has no names.")
        values = {FORMER_NAMES.get(name, name): value for name, value in values.items()}
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"{path}: unknown settings {sorted(unknown)}. Remove them, or use the version that wrote the file."
            )
        return cls(**values)


DATASETS = {
    "voc": "PASCAL VOC",
    "yolo": "YOLO data set",
    "coco": "COCO data set",
    "shapes": "synthetic",
}


@dataclass(frozen=True)
class Config(Settings):
    """Settings of one run, written as JSON into its folder; `Config.load` reads them back."""

    # data
    dataset: str = "voc"  # "voc": files in data_root, also recognized as "yolo" or "coco"; "shapes": synthetic data set
    data_root: str = field(
        default_factory=lambda: os.environ.get("VOC_ROOT", DATA_ROOT)
    )  # of VOCdevkit, data.yaml or COCO
    train_splits: tuple[str, ...] = ("2007/trainval", "2012/trainval")
    val_splits: tuple[str, ...] = (
        "2007/test",
    )  # empty: val_fraction of the training images, at random
    val_fraction: float = 0.2
    classes: tuple[str, ...] = (
        VOC_CLASSES  # YOLO and COCO: the default stands for the data set's own classes
    )
    skip_bad_files: bool = False  # leave out unusable images instead of raising an error
    shapes_train: int = 1200  # training images of the synthetic data set
    shapes_val: int = 300
    cache_gb: float = 12.0  # maximum size of each cache of resized images on disk; 0: no cache
    num_workers: int = (
        -1
    )  # loader processes per device; -1: the cores divided by the devices, at most 8

    # images
    image_size: int = 416  # width and height in pixels, a multiple of 32
    multiscale_sizes: tuple[
        int, ...
    ] = ()  # image sizes of multi-resolution training; empty: image_size only
    multiscale_interval: int = 10  # steps until the next random image size
    mosaic_prob: float = 0.75  # fraction of the training samples that are four-image mosaics
    close_mosaic_epochs: int = (
        2  # last epochs without mosaics, at image_size; at most half of the epochs
    )
    mosaic_scale: tuple[float, float] = (
        0.7,
        1.1,
    )  # long side of an image in a mosaic, relative to the canvas
    image_scale: tuple[float, float] = (0.85, 1.15)  # the same for single images
    min_visibility: float = 0.25  # boxes with a smaller visible fraction of their area are dropped

    # model
    width: float = 1.0  # width multiplier: channels of every layer, relative to the paper
    anchors: tuple = (
        ANCHORS  # [3 scales][3] (width, height), relative to an image of image_size pixels
    )
    pretrained_weights: str = (
        ""  # a folder or hub id (detector or backbone), darknet53.conv.74 or yolov3.weights
    )
    freeze_epochs: int = 0  # first epochs, in which the backbone is frozen

    # training
    epochs: int = 40
    batch_size: int = 32  # images per batch and device
    accumulate_grad_batches: int = (
        1  # batches per optimizer step; effective batch size: batch_size * this * devices
    )
    max_lr: float = 0.0  # peak of OneCycle; 0: find it with the learning-rate range test
    warmup_fraction: float = 0.1  # fraction of the steps in which the learning rate rises
    weight_decay: float = 0.05  # of kernels only, not of biases and batch norm
    gradient_clip_val: float = 10.0  # L2 norm; 0: no clipping
    ema_decay: float = 0.998
    box_weight: float = 2.0
    objectness_weight: float = 2.0  # of positives
    background_weight: float = 1.0  # objectness of the background
    class_weight: float = 1.0
    precision: str = (
        "auto"  # "16-mixed" on CUDA, "bf16-mixed" on a CPU with bfloat16, else "32-true"
    )
    compile: bool = False  # torch.compile
    devices: int = 1  # GPUs, each with a process of its own
    seed: int = 0
    run_dir: str = "runs/voc"
    voc_root: InitVar[str] = ""  # former name of data_root

    def __post_init__(self, voc_root: str):
        if voc_root:
            object.__setattr__(self, "data_root", voc_root)
        for name in ("classes", "train_splits", "val_splits"):
            value = getattr(self, name)  # a string: ("mask") without its comma
            object.__setattr__(self, name, (value,) if isinstance(value, str) else _tuples(value))
        for name in ("multiscale_sizes", "mosaic_scale", "image_scale", "anchors"):
            object.__setattr__(self, name, _tuples(getattr(self, name)))
        for name in ("data_root", "run_dir", "pretrained_weights"):
            object.__setattr__(self, name, os.fspath(getattr(self, name)))
        for size in (self.image_size, *self.multiscale_sizes):
            if size < 32 or size % 32:
                raise ValueError(
                    f"Config: image size {size} is not a positive multiple of 32. Use e.g. {max(32, size // 32 * 32)}."
                )
        if self.dataset not in DATASETS:
            raise ValueError(
                f"Config.dataset is {self.dataset!r}. Use one of {', '.join(DATASETS)}."
            )
        if len(set(self.classes)) != len(self.classes) or not self.classes:
            raise ValueError(
                f"Config.classes is {self.classes}. Name at least one class, each only once."
            )
        for name in (
            "val_fraction",
            "mosaic_prob",
            "min_visibility",
            "warmup_fraction",
            "ema_decay",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"Config.{name} is {getattr(self, name)}. Use a value from 0 to 1."
                )
        for name in (
            "epochs",
            "batch_size",
            "accumulate_grad_batches",
            "multiscale_interval",
            "devices",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"Config.{name} is {getattr(self, name)}. Use at least 1.")

    @property
    def pretrained_path(self) -> str:
        """`pretrained_weights`, completed to an absolute path if weights are there only in the repository's folder."""
        local, shipped = Path(self.pretrained_weights), REPOSITORY / self.pretrained_weights
        is_local = local.is_file() or (local / "config.json").exists()
        return (
            str(shipped)
            if self.pretrained_weights and shipped.exists() and not is_local
            else self.pretrained_weights
        )

    @property
    def canvas_size(self) -> int:
        """Size of the training samples: the largest of all image sizes, so that batches are only ever downscaled."""
        return max((self.image_size, *self.multiscale_sizes))

    @property
    def close_mosaic_epoch(self) -> int:
        """First epoch (from 0) without mosaics and multi-resolution."""
        return self.epochs - min(self.close_mosaic_epochs, self.epochs // 2)


FORMER_NAMES = {  # names in config.json of older runs
    "data": "dataset",
    "voc_root": "data_root",
    "sizes": "multiscale_sizes",
    "size_steps": "multiscale_interval",
    "mosaic": "mosaic_prob",
    "mosaic_off_epochs": "close_mosaic_epochs",
    "single_scale": "image_scale",
    "min_visible": "min_visibility",
    "clip": "gradient_clip_val",
    "warmup": "warmup_fraction",
    "workers": "num_workers",
    "weights": "pretrained_weights",
}


def _tuples(value):
    """Convert lists and ranges, also nested, to tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple | range) else value


PRESETS = {
    "voc": Config(),  # the assignment: full width, 416 pixels, 07+12 trainval to 07 test; needs a GPU
    "small": Config(  # your own data on a CPU or a small GPU, from the detector in weights/
        image_size=224,
        width=0.25,
        pretrained_weights="weights",
        batch_size=16,
        max_lr=4e-3,
        run_dir="runs/small",
    ),
    "shapes": Config(  # synthetic data set; minutes on 2 CPU cores
        dataset="shapes",
        classes=SHAPE_CLASSES,
        image_size=160,
        width=0.25,
        epochs=24,
        batch_size=16,
        close_mosaic_epochs=4,
        run_dir="runs/shapes",
    ),
}
