"""Training samples: four-image mosaics and single images, augmented."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from src.config import Config
from src.data.cache import ImageCache
from src.data.records import ImageRecord
from src.model.boxes import xyxy_to_cxcywh
from src.serving.images import PAD, image_size_of, load_image, resize_long_side

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


def place_boxes(boxes: np.ndarray, matrix: np.ndarray, region: tuple, min_visibility: float) -> tuple:
    """Boxes [n, 4] xyxy moved by `matrix` and cut at `region`; which keep enough of their area: bool [n]."""
    moved = boxes * matrix[[0, 1, 0, 1], [0, 1, 0, 1]] + matrix[[0, 1, 0, 1], 2]
    cut = np.clip(moved, region[:2] * 2, region[2:] * 2)
    sides, whole = cut[:, 2:] - cut[:, :2], moved[:, 2:] - moved[:, :2]
    kept = (sides >= MIN_SIDE).all(axis=1) & (sides.prod(axis=1) >= min_visibility * whole.prod(axis=1))
    return cut.astype(np.float32), kept


class MosaicDataset(Dataset):
    """Training samples: `dataset[sample_id]`, sample_id = epoch * len(dataset) + index.

    What is drawn depends on (seed, sample_id) alone, not on workers, so a resumed run goes on as if never stopped.
    `config.mosaic_prob` of the draws join four images around a random centre; the others place one. Each image is
    resized by `config.mosaic_scale` or `image_scale` and a small change of shape in the same warp that places it.
    """

    def __init__(self, records: list[ImageRecord], config: Config, cache: ImageCache | None = None):
        self.records, self.config, self.cache = records, config, cache
        self.augment = augmentations()

    def __len__(self) -> int:
        return len(self.records)

    def is_mosaic(self, sample_id: int) -> bool:
        """Whether this sample_id is a four-image mosaic."""
        return self._is_mosaic(sample_id, self._random(sample_id))

    def _is_mosaic(self, sample_id: int, random: np.random.Generator) -> bool:
        return random.random() < self.config.mosaic_prob and sample_id // len(self) < self.config.close_mosaic_epoch

    def __getitem__(self, sample_id: int) -> Sample:
        random = self._random(sample_id)
        draw_canvas = self._mosaic if self._is_mosaic(sample_id, random) else self._single
        canvas, boxes, labels = draw_canvas(sample_id % len(self), random)
        self.augment.set_random_seed(int(random.integers(2**31)))
        out = self.augment(image=canvas, bboxes=boxes, labels=labels)
        return to_sample(out["image"], np.float32(out["bboxes"]).reshape(-1, 4), np.int64(out["labels"]))

    def _random(self, sample_id: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, sample_id))

    def image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture `index` with `canvas` pixels on its long side, uint8, and its boxes in these pixels."""
        record, side = self.records[index], self.config.canvas_size

        def read():
            return resize_long_side(load_image(record.image, side), side), image_size_of(record.image)

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
        side = self.config.canvas_size
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
        side = self.config.canvas_size
        canvas = np.empty((side, side, 3), dtype=np.uint8)
        scale = self._jitter(random, self.config.image_scale)
        image, boxes = self.image(index)
        free = np.float64([side - image.shape[1] * scale[0], side - image.shape[0] * scale[1]])
        picture = image, boxes, self.records[index].labels
        return canvas, *self._place(canvas, (0, 0, side, side), picture, scale, free * random.random(2))

    def _place(self, canvas: np.ndarray, region: tuple, picture: tuple, scale: tuple, corner: tuple) -> tuple:
        """Draw a picture (image, boxes, labels), its top left at `corner`, in `region`; the boxes and labels left."""
        image, boxes, labels = picture
        matrix = np.float64([[scale[0], 0, corner[0]], [0, scale[1], corner[1]]])
        paste(canvas, region, image, matrix)
        cut, kept = place_boxes(boxes, matrix, region, self.config.min_visibility)
        return cut[kept], labels[kept]


def to_sample(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> Sample:
    """uint8 [S, S, 3] and boxes xyxy in its pixels -> what `collate` takes."""
    boxes = xyxy_to_cxcywh(torch.from_numpy(boxes)) / image.shape[0]
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1), boxes, torch.from_numpy(labels)
