"""Training samples: four-image mosaics and single images, augmented."""

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from src.config import Config
from src.data.cache import ImageCache
from src.data.records import ImageRecord
from src.serving.images import PAD, get_image_size, load_image, resize_long_side

MIN_SIDE = 2  # pixels; a box that is cut to less is dropped
Sample = tuple[
    Tensor, Tensor, Tensor
]  # uint8 [3, S, S]; boxes float32 [n, 4] cxcywh in 0..1; labels int64 [n]


def augmentations() -> A.Compose:
    """Return the augmentations of a finished canvas: horizontal flip, brightness, contrast and colour."""
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
            A.HueSaturationValue(hue_shift_limit=8, sat_shift_limit=40, val_shift_limit=20, p=0.5),
            A.ToGray(p=0.05),
        ],
        bbox_params=A.BboxParams(
            format="pascal_voc", label_fields=["labels"], check_each_transform=False
        ),
    )


def paste(
    canvas: np.ndarray, region: tuple[int, int, int, int], image: np.ndarray, scale, top_left
) -> tuple:
    """Draw `image`, scaled by `scale` (x, y), at `top_left` (x, y) into `region` (left, top, right, bottom) of the canvas.

    Only the visible part is resized, with its edges rounded to pixels of the image and of the canvas.
    Returns the rounded transform of coordinates: scale (x, y) and shift (x, y), x -> x * scale + shift.
    """
    low, high = np.array(region[:2]), np.array(region[2:])
    size = np.array(image.shape[1::-1])
    first = np.clip(np.rint(top_left), low, high - 1).astype(int)
    last = np.clip(np.rint(top_left + size * scale), first + 1, high).astype(int)
    crop_first = np.where(
        first > low, 0, np.clip(np.rint((first - top_left) / scale), 0, size - 1)
    ).astype(int)
    crop_last = np.where(
        last < high, size, np.clip(np.rint((last - top_left) / scale), crop_first + 1, size)
    ).astype(int)
    crop = image[crop_first[1] : crop_last[1], crop_first[0] : crop_last[0]]
    canvas[first[1] : last[1], first[0] : last[0]] = cv2.resize(
        crop, (last - first).tolist(), interpolation=cv2.INTER_LINEAR
    )
    scale = (last - first) / (crop_last - crop_first)
    return scale, first - crop_first * scale


def transform_boxes(boxes: np.ndarray, scale, shift, region: tuple, min_visibility: float) -> tuple:
    """Transform boxes [n, 4] xyxy by `scale` (x, y) and `shift` (x, y), and clip them to `region`.

    Returns float32 [n, 4], and bool [n]: True if at least `min_visibility` of the box's area is inside.
    """
    moved = boxes * np.tile(scale, 2) + np.tile(shift, 2)
    clipped = np.clip(moved, region[:2] * 2, region[2:] * 2)
    visible_wh, full_wh = clipped[:, 2:] - clipped[:, :2], moved[:, 2:] - moved[:, :2]
    keep = (visible_wh >= MIN_SIDE).all(axis=1) & (
        visible_wh.prod(axis=1) >= min_visibility * full_wh.prod(axis=1)
    )
    return clipped.astype(np.float32), keep


class MosaicDataset(Dataset):
    """Training samples: `dataset[sample_id]` with sample_id = epoch * len(dataset) + index.

    A sample depends only on (seed, sample_id), not on the loader processes, so a resumed run gets the same samples.
    A fraction `config.mosaic_prob` of the samples joins four images around a random point; the others show one image.
    Each image is scaled by `config.mosaic_scale` or `image_scale`, with a small change of its aspect ratio.
    """

    def __init__(self, records: list[ImageRecord], config: Config, cache: ImageCache | None = None):
        self.records, self.config, self.cache = records, config, cache
        self.augment = augmentations()

    def __len__(self) -> int:
        return len(self.records)

    def is_mosaic(self, sample_id: int) -> bool:
        """Return whether this sample is a four-image mosaic."""
        return self._seeded_choice(sample_id)[1]

    def _seeded_choice(self, sample_id: int) -> tuple[np.random.Generator, bool]:
        """Return the sample's random generator, and whether it is a mosaic: the generator's first number."""
        random = np.random.default_rng((self.config.seed, sample_id))
        chosen = random.random() < self.config.mosaic_prob
        return random, chosen and sample_id // len(self) < self.config.close_mosaic_epoch

    def __getitem__(self, sample_id: int) -> Sample:
        random, is_mosaic = self._seeded_choice(sample_id)
        compose = self._mosaic if is_mosaic else self._single
        canvas, boxes, labels = compose(sample_id % len(self), random)
        self.augment.set_random_seed(int(random.integers(2**31)))
        out = self.augment(image=canvas, bboxes=boxes, labels=labels)
        return to_sample(
            out["image"], np.float32(out["bboxes"]).reshape(-1, 4), np.int64(out["labels"])
        )

    def image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image `index` resized to `canvas_size` pixels on its long side, uint8, and its boxes in these pixels."""
        record, size = self.records[index], self.config.canvas_size

        def read():
            return resize_long_side(load_image(record.image, size), size), get_image_size(
                record.image
            )

        image, original_size = self.cache.fetch(index, read) if self.cache else read()
        return image, record.boxes * np.array(
            (image.shape[1] / original_size[0], image.shape[0] / original_size[1]) * 2
        )

    @staticmethod
    def _random_scale(
        random: np.random.Generator, scales: tuple[float, float]
    ) -> tuple[float, float]:
        """Sample the scale in x and in y: log-uniform within `scales`, with a small change of the aspect ratio."""
        scale = np.exp(random.uniform(*np.log(scales)))
        aspect = np.exp(random.uniform(-0.2, 0.2))
        return scale * aspect, scale / aspect

    def _mosaic(self, index: int, random: np.random.Generator) -> tuple:
        """Join four images around a random point: canvas, boxes, labels. YOLOv4 (Bochkovskiy et al. 2020), section 3.3.

        An image larger than its region shows a random crop. A smaller one touches the common point.
        """
        size = self.config.canvas_size
        x, y = (int(v) for v in random.uniform(0.25, 0.75, 2) * size)
        regions = (0, 0, x, y), (x, 0, size, y), (0, y, x, size), (x, y, size, size)
        canvas = np.full((size, size, 3), PAD, dtype=np.uint8)
        placed = []
        indices = index, *random.integers(len(self), size=3)
        for corner, (image_index, region) in enumerate(zip(indices, regions, strict=True)):
            scale = self._random_scale(random, self.config.mosaic_scale)
            image, boxes = self.image(image_index)
            free = np.subtract(region[2:], region[:2]) - image.shape[1::-1] * np.float64(scale)
            towards_centre = np.maximum(free, 0) * ((corner in (0, 2)), (corner in (0, 1)))
            top_left = region[:2] + np.where(free > 0, towards_centre, free * random.random(2))
            placed.append(
                self._place(
                    canvas, region, image, boxes, self.records[image_index].labels, scale, top_left
                )
            )
        return (
            canvas,
            np.concatenate([boxes for boxes, _ in placed]),
            np.concatenate([labels for _, labels in placed]),
        )

    def _single(self, index: int, random: np.random.Generator) -> tuple:
        """Place one image at a random position: canvas, boxes, labels."""
        size = self.config.canvas_size
        canvas = np.full((size, size, 3), PAD, dtype=np.uint8)
        scale = self._random_scale(random, self.config.image_scale)
        image, boxes = self.image(index)
        free = size - image.shape[1::-1] * np.float64(scale)
        top_left = free * random.random(2)
        return canvas, *self._place(
            canvas, (0, 0, size, size), image, boxes, self.records[index].labels, scale, top_left
        )

    def _place(
        self, canvas, region, image, boxes, labels, scale, top_left
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw an image into a region of the canvas and return its visible boxes and their labels."""
        scale, shift = paste(canvas, region, image, scale, top_left)
        boxes, keep = transform_boxes(boxes, scale, shift, region, self.config.min_visibility)
        return boxes[keep], labels[keep]


def to_sample(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> Sample:
    """Convert uint8 [S, S, 3] and boxes xyxy in pixels to a Sample for `collate`."""
    boxes = box_convert(torch.from_numpy(boxes), "xyxy", "cxcywh") / image.shape[0]
    return (
        torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1),
        boxes,
        torch.from_numpy(labels),
    )
