"""Every knob of the project, with its default."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from src.model.network import ANCHORS

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


SHAPE_CLASSES = ("circle", "triangle", "star", "ring", "crescent", "heart", "arrow", "bolt")  # the built-in set


@dataclass(frozen=True)
class Config:
    """Settings of one run; written as JSON beside it, and read back to start it again."""

    # data
    data: str = "voc"  # "voc": a VOCdevkit tree; "shapes": the built-in set, nothing to download
    voc_root: str = field(default_factory=lambda: os.environ.get("VOC_ROOT", "data"))  # holds VOCdevkit
    train_splits: tuple[str, ...] = ("2007/trainval", "2012/trainval")
    val_splits: tuple[str, ...] = ("2007/test",)
    classes: tuple[str, ...] = VOC_CLASSES
    skip_bad_files: bool = False  # leave out pictures that can't be used, instead of refusing to start
    shapes_train: int = 1200  # pictures of the built-in set
    shapes_val: int = 300
    cache_gb: float = 12.0  # most that a memory-mapped file of resized images may take; 0 turns it off
    workers: int = -1  # loader processes; -1: one for each core, at most 8

    # what the network sees
    image_size: int = 416  # pixels a side, a multiple of 32
    sizes: tuple[int, ...] = ()  # multi-resolution training: the sides drawn from; empty: image_size only
    size_steps: int = 10  # steps a drawn side is held for
    mosaic: float = 0.75  # part of the draws that are four-image mosaics
    mosaic_off_epochs: int = 2  # the last epochs, at most half, see whole images only, and at image_size
    mosaic_scale: tuple[float, float] = (0.7, 1.1)  # the long side of an image in a mosaic, in sides of the canvas
    single_scale: tuple[float, float] = (0.85, 1.15)  # the same of an image that has the canvas to itself
    min_visible: float = 0.25  # a box keeps its label while this part of its area is left

    # model
    width: float = 1.0  # kernels of every layer, as a part of the paper's
    anchors: tuple = ANCHORS  # [3 scales][3] (width, height) in sides of an image of image_size pixels
    weights: str = ""  # start from: a folder or hub id, darknet53.conv.74 or yolov3.weights
    freeze_epochs: int = 0  # first epochs that leave the backbone as it is

    # training
    epochs: int = 40
    batch_size: int = 32
    max_lr: float = 0.0  # peak of OneCycle; 0: ask the learning-rate finder
    warmup: float = 0.1  # part of the steps that OneCycle rises
    weight_decay: float = 0.05  # on weights alone: not on biases nor batch norm
    clip: float = 10.0  # gradient norm
    ema_decay: float = 0.998
    box_weight: float = 2.0
    object_weight: float = 2.0  # of positives' objectness
    no_object_weight: float = 1.0  # of the background's
    class_weight: float = 1.0
    label_smoothing: float = 0.0
    precision: str = "auto"  # "16-mixed" on CUDA, "bf16-mixed" on a CPU that computes it, else "32-true"
    compile: bool = False  # torch.compile
    devices: int = 1
    seed: int = 0
    run_dir: str = "runs/voc"

    def __post_init__(self):
        for size in (self.image_size, *self.sizes):
            if size < 32 or size % 32:
                raise ValueError(f"Config: side {size} is not a positive multiple of 32; use e.g. {max(32, size // 32 * 32)}")
        if self.data not in ("voc", "shapes"):
            raise ValueError(f'Config.data is {self.data!r}; choose "voc" or "shapes"')
        if len(set(self.classes)) != len(self.classes) or not self.classes:
            raise ValueError(f"Config.classes must name each class once, not {self.classes}")
        for name in ("mosaic", "min_visible", "warmup", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Config.{name} is {getattr(self, name)}; it must lie in 0..1")
        for name in ("epochs", "batch_size", "size_steps", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"Config.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def canvas(self) -> int:
        """Pixels a side that training pictures are composed at: the largest drawn, so a batch is only ever made smaller."""
        return max((self.image_size, *self.sizes))

    @property
    def whole_from(self) -> int:
        """The first epoch, counted from 0, that draws no mosaics and no sides; not before half of the epochs are done."""
        return self.epochs - min(self.mosaic_off_epochs, self.epochs // 2)

    def replace(self, **changes) -> "Config":
        """The same settings with some changed."""
        return dataclasses.replace(self, **changes)

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON, whole or not at all."""
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        """Read settings written by `save`. Raises ValueError that names the file and the unknown field."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a run's settings: {error}") from None
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"{path}: unknown settings {sorted(unknown)}; this version has no such field")
        return cls(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value):
    """JSON's lists back to the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


SETTINGS = {
    "voc": Config(),  # the assignment: full kernels, 416 pixels, 07+12 trainval to 07 test; wants a GPU
    "shapes": Config(  # the built-in set on 2 CPU cores, in minutes
        data="shapes", classes=SHAPE_CLASSES, image_size=160, width=0.25, epochs=24, batch_size=16, mosaic_off_epochs=4,
        run_dir="runs/shapes",
    ),
}  # fmt: skip
