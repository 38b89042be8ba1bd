"""Records to batches: mosaics, augmentation, the held-out letterbox, loaders."""

import os
import shutil
from functools import cached_property

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version

import albumentations as A
import cv2
import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from src.boxes import xyxy_to_cxcywh
from src.cache import ImageCache, open_cache
from src.config import VOC_CLASSES, Config
from src.predict import PAD, fit_inside, letterbox, letterbox_placement, load_image, picture_size
from src.shapes import draw_shapes
from src.voc import Record, download_voc, read_voc

SHARED = "/dev/shm"  # where loader processes leave their batches; 64 MB in a Docker container that asks for no more
MIN_SIDE = 2  # pixels; smaller remains of a box are dropped

Sample = tuple[Tensor, Tensor, Tensor]  # uint8 [3, S, S]; boxes float32 [n, 4] cxcywh in 0..1; labels int64 [n]


def augmentations() -> A.Compose:
    """What happens to a finished canvas: mirrored half the time, then its light and colours changed."""
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
            A.HueSaturationValue(hue_shift_limit=8, sat_shift_limit=40, val_shift_limit=20, p=0.5),
            A.ToGray(p=0.05),
        ],
        bbox_params=A.BboxParams(format="pascal_voc", label_fields=["labels"], check_each_transform=False),
    )


def paste(canvas: np.ndarray, region: tuple[int, int, int, int], image: np.ndarray, matrix: np.ndarray) -> None:
    """Draw `image` on the part `region` (left, top, right, bottom) of the canvas; grey where it does not reach.

    matrix float64 [2, 3]: scale and shift that bring pixel edges of the image to pixel edges of the canvas.
    """
    left, top, right, bottom = region
    scale = matrix[[0, 1], [0, 1]]
    matrix = matrix.copy()
    matrix[:, 2] += 0.5 * scale - 0.5 - (left, top)  # warpAffine counts from pixel centres
    canvas[top:bottom, left:right] = cv2.warpAffine(
        image, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR, borderValue=(PAD, PAD, PAD)
    )


def place_boxes(boxes: np.ndarray, matrix: np.ndarray, region: tuple, min_visible: float) -> tuple:
    """Boxes [n, 4] xyxy moved by `matrix` and cut at `region`; which keep enough of their area: bool [n]."""
    moved = boxes * matrix[[0, 1, 0, 1], [0, 1, 0, 1]] + matrix[[0, 1, 0, 1], 2]
    cut = np.clip(moved, region[:2] * 2, region[2:] * 2)
    sides, whole = cut[:, 2:] - cut[:, :2], moved[:, 2:] - moved[:, :2]
    kept = (sides >= MIN_SIDE).all(axis=1) & (sides.prod(axis=1) >= min_visible * whole.prod(axis=1))
    return cut.astype(np.float32), kept


class MosaicDataset(Dataset):
    """Training samples: `dataset[draw]`, draw = epoch * len(dataset) + index.

    What is drawn depends on (seed, draw) alone, not on workers, so a resumed run goes on as if never stopped.
    `config.mosaic` of the draws join four images around a random centre; the others place one. Each image is
    resized by `config.mosaic_scale` or `single_scale` and a small change of shape in the same warp that places it.
    """

    def __init__(self, records: list[Record], config: Config, cache: ImageCache | None = None):
        self.records, self.config, self.cache = records, config, cache
        self.augment = augmentations()

    def __len__(self) -> int:
        return len(self.records)

    def is_mosaic(self, draw: int) -> bool:
        """Whether this draw is a four-image mosaic."""
        return self._wants_mosaic(draw, self._random(draw))

    def _wants_mosaic(self, draw: int, random: np.random.Generator) -> bool:
        return random.random() < self.config.mosaic and draw // len(self) < self.config.whole_from

    def __getitem__(self, draw: int) -> Sample:
        random = self._random(draw)
        draw_canvas = self._mosaic if self._wants_mosaic(draw, random) else self._single
        canvas, boxes, labels = draw_canvas(draw % len(self), random)
        self.augment.set_random_seed(int(random.integers(2**31)))
        out = self.augment(image=canvas, bboxes=boxes, labels=labels)
        return to_sample(out["image"], np.float32(out["bboxes"]).reshape(-1, 4), np.int64(out["labels"]))

    def _random(self, draw: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, draw))

    def image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture `index` with `canvas` pixels on its long side, uint8, and its boxes in these pixels."""
        record, side = self.records[index], self.config.canvas

        def read():
            return fit_inside(load_image(record.image, side), side), picture_size(record.image)

        small, original = self.cache.fetch(index, read) if self.cache else read()
        return small, record.boxes * np.array((small.shape[1] / original[0], small.shape[0] / original[1]) * 2)

    @staticmethod
    def _jitter(random: np.random.Generator, scales: tuple[float, float]) -> tuple[float, float]:
        """Scale in x and in y, around one of `scales`."""
        scale = np.exp(random.uniform(*np.log(scales)))
        shape = np.exp(random.uniform(-0.2, 0.2))
        return scale * shape, scale / shape

    def _mosaic(self, index: int, random: np.random.Generator) -> tuple:
        """Four images around a point: canvas, boxes, labels. YOLOv4 (Bochkovskiy et al. 2020), section 3.3.

        An image larger than its part shows a random cut of itself, a smaller one lies at the common point.
        """
        side = self.config.canvas
        x, y = (int(v) for v in random.uniform(0.25, 0.75, 2) * side)
        regions = (0, 0, x, y), (x, 0, side, y), (0, y, x, side), (x, y, side, side)
        canvas = np.empty((side, side, 3), dtype=np.uint8)
        found = []
        numbers = index, *random.integers(len(self), size=3)
        for corner, (number, region) in enumerate(zip(numbers, regions, strict=True)):
            scale = self._jitter(random, self.config.mosaic_scale)
            image, around = self.image(number)
            free = np.subtract(region[2:], region[:2]) - image.shape[1::-1] * np.float64(scale)
            towards_centre = np.maximum(free, 0) * ((corner in (0, 2)), (corner in (0, 1)))
            start = region[:2] + np.where(free > 0, towards_centre, free * random.random(2))
            labels = self.records[number].labels
            found.append(self._place(canvas, region, (image, around, labels), scale, start))
        return canvas, np.concatenate([boxes for boxes, _ in found]), np.concatenate([labels for _, labels in found])

    def _single(self, index: int, random: np.random.Generator) -> tuple:
        """One image somewhere on the canvas: canvas, boxes, labels."""
        side = self.config.canvas
        canvas = np.empty((side, side, 3), dtype=np.uint8)
        scale = self._jitter(random, self.config.single_scale)
        image, boxes = self.image(index)
        free = np.float64([side - image.shape[1] * scale[0], side - image.shape[0] * scale[1]])
        picture = image, boxes, self.records[index].labels
        return canvas, *self._place(canvas, (0, 0, side, side), picture, scale, free * random.random(2))

    def _place(self, canvas: np.ndarray, region: tuple, picture: tuple, scale: tuple, corner: tuple) -> tuple:
        """Draw a picture (image, boxes, labels), its top left at `corner`, in `region`; the boxes and labels left."""
        image, boxes, labels = picture
        matrix = np.float64([[scale[0], 0, corner[0]], [0, scale[1], corner[1]]])
        paste(canvas, region, image, matrix)
        cut, kept = place_boxes(boxes, matrix, region, self.config.min_visible)
        return cut[kept], labels[kept]


class HeldOutDataset(Dataset):
    """Evaluation samples: each record letterboxed, nothing random. Also gives the difficult flags."""

    def __init__(self, records: list[Record], config: Config, cache: ImageCache | None = None):
        self.records, self.config, self.cache = records, config, cache

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        record, side = self.records[index], self.config.image_size

        def read():
            return letterbox(load_image(record.image), side)[0], picture_size(record.image)

        square, (width, height) = self.cache.fetch(index, read) if self.cache else read()
        placement = letterbox_placement(width, height, side)
        boxes = record.boxes * np.tile(placement[:2], 2) + np.tile(placement[2:], 2)
        boxes = np.clip(boxes, 0, side).astype(np.float32)
        return *to_sample(np.array(square), boxes, record.labels), torch.from_numpy(record.difficult)


def to_sample(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> Sample:
    """uint8 [S, S, 3] and boxes xyxy in its pixels -> what `collate` takes."""
    boxes = xyxy_to_cxcywh(torch.from_numpy(boxes)) / image.shape[0]
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1), boxes, torch.from_numpy(labels)


def collate(samples: list[tuple]) -> dict[str, Tensor]:
    """Samples of one side -> a batch.

    "images" uint8 [B, 3, S, S], channels last in memory; "targets" float32 [N, 6]: image index, class, cx, cy,
    w, h in 0..1; and, of held-out samples, "difficult" bool [N].
    """
    images = torch.stack([sample[0].permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2)
    owner = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s[2]) for s in samples]))
    boxes, labels = (torch.cat([sample[part] for sample in samples]) for part in (1, 2))
    columns = owner[:, None].float(), labels[:, None].float(), boxes
    batch = {"images": images, "targets": torch.cat(columns, dim=1)}
    if len(samples[0]) == 4:
        batch["difficult"] = torch.cat([sample[3] for sample in samples])
    return batch


class DrawSampler(DistributedSampler):
    """Every picture once an epoch, shuffled by (seed, epoch), as draws of `MosaicDataset`; a part to each process."""

    def __init__(self, dataset: Dataset, seed: int):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        super().__init__(dataset, world, rank, shuffle=True, seed=seed)

    def __iter__(self):
        return (self.epoch * len(self.dataset) + index for index in super().__iter__())


OF_DATA = (  # what of a Config decides which batches there are
    "data", "voc_root", "train_splits", "val_splits", "classes", "skip_bad_files", "shapes_train", "shapes_val",
    "image_size", "sizes", "mosaic", "mosaic_off_epochs", "mosaic_scale", "single_scale", "min_visible",
    "epochs", "batch_size", "devices", "seed",
)  # fmt: skip


class DetectionData(pl.LightningDataModule):
    """The two splits of `config.data` and their loaders; the download happens in `prepare_data`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.train_records: list[Record] = []
        self.val_records: list[Record] = []

    def must_suit(self, config: Config) -> None:
        """Raises ValueError that names a setting of the data in which `config` differs from the one they were made with."""
        for name in OF_DATA:
            ours, asked = getattr(self.config, name), getattr(config, name)
            if ours != asked:
                raise ValueError(
                    f"the data were made with Config.{name} {ours}, not {asked}: make them anew, DetectionData(config)"
                )

    def prepare_data(self) -> None:
        if self.config.data == "voc" and self.config.classes == VOC_CLASSES:
            download_voc(self.config.voc_root, self.config.train_splits + self.config.val_splits)

    def setup(self, stage: str = "") -> None:
        """Read or draw the records, once. stage: Lightning's; both splits are read whatever it is."""
        if self.train_records:
            return
        config = self.config
        if config.data == "voc":
            where, how = config.voc_root, (config.classes, config.skip_bad_files)
            self.val_records = read_voc(where, config.val_splits, *how)
            self.train_records = read_voc(where, config.train_splits, *how)  # last: see above
        else:
            self.train_records = draw_shapes(config.shapes_train, seed=2 * config.seed)
            self.val_records = draw_shapes(config.shapes_val, seed=2 * config.seed + 1)
        train_cache = open_cache(self.train_records, "training", config.canvas, config.cache_gb)
        self.train_data = MosaicDataset(self.train_records, config, train_cache)
        val_cache = open_cache(self.val_records, "held-out", config.image_size, config.cache_gb)
        self.val_data = HeldOutDataset(self.val_records, config, val_cache)

    def train_dataloader(self) -> DataLoader:
        """Batches without end of an epoch's remainder: the last, smaller one is dropped."""
        few = len(self.train_data) < self.config.batch_size
        return self._loader(self.train_data, DrawSampler(self.train_data, self.config.seed), drop_last=not few)

    def val_dataloader(self) -> DataLoader:
        """Every held-out picture exactly once, whatever the number of processes."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return self._loader(self.val_data, range(rank, len(self.val_data), world))

    def _loader(self, dataset: Dataset, sampler, **options) -> DataLoader:
        return DataLoader(
            dataset, self.config.batch_size, sampler=sampler, num_workers=self.workers, collate_fn=collate, **options,
            worker_init_fn=_quiet_worker, persistent_workers=self.workers > 0, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

    @cached_property
    def workers(self) -> int:
        """Loader processes: as many as asked for and as have room in SHARED, where a full disk kills by a bus error.

        Two finished batches wait there for each, and two more are on their way.
        """
        wanted = self.config.workers if self.config.workers >= 0 else min(8, os.cpu_count() or 1)
        batch = 3 * self.config.canvas**2 * self.config.batch_size * self.config.devices
        free = shutil.disk_usage(SHARED).free if os.path.isdir(SHARED) else 2 * batch * (wanted + 1)
        room = max(0, free // (2 * batch) - 1)
        if room < wanted:
            print(f"{SHARED} has {free / 1e6:.0f} MB free: room for the batches of {room} loader processes, not of "
                  f"{wanted}; going on with {room} (docker run --shm-size=2g gives more)")  # fmt: skip
        return min(wanted, room)


def _quiet_worker(_: int) -> None:
    """One loader process, one thread: OpenCV's own threads would fight over the cores."""
    cv2.setNumThreads(0)
