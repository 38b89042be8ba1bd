"""Training samples: four-image mosaics and single images, augmented."""

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from src.config import Config
from src.data.cache import ImageCache
from src.data.records import ImageRecord
from src.serving.images import PAD, get_image_size, load_image, resize_long_side

MIN_SIDE = 2  # pixels; a box that is cut to less is dropped
Region = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the canvas
Sample = tuple[Tensor, Tensor, Tensor]  # see `to_sample`


def augmentations(min_visibility: float) -> A.Compose:
    """Return the augmentations of a finished canvas: horizontal flip, brightness, contrast, color.

    min_visibility: of a box's area. Transforms that cut boxes, such as crops, drop boxes below it.
    """
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
            A.HueSaturationValue(hue_shift_limit=8, sat_shift_limit=40, val_shift_limit=20, p=0.5),
            A.ToGray(p=0.05),
        ],
        bbox_params=A.BboxParams(
            format="pascal_voc",
            label_fields=["labels"],
            min_visibility=min_visibility,
            check_each_transform=False,
        ),
    )


def paste(
    canvas: np.ndarray, region: Region, image: np.ndarray, scale: np.ndarray, top_left: np.ndarray
) -> None:
    """Draw a scaled image into a region of the canvas; what is outside the region is cut off.

    A point (x, y) of the image, uint8 [h, w, 3], moves to (x, y) * scale + top_left on the canvas.
    """
    left, top, right, bottom = region
    scale_x, scale_y = scale
    # OpenCV counts from the centers of pixels, we from their corners: half a pixel less.
    shift_x, shift_y = top_left - (left, top) + 0.5 * scale - 0.5
    matrix = np.array([[scale_x, 0, shift_x], [0, scale_y, shift_y]])
    size = (right - left, bottom - top)
    canvas[top:bottom, left:right] = cv2.warpAffine(image, matrix, size, borderValue=(PAD,) * 3)


def transform_boxes(
    boxes: np.ndarray,
    scale: np.ndarray,
    top_left: np.ndarray,
    region: Region,
    min_visibility: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Move boxes [n, 4] xyxy like the pixels in `paste`, and clip them to the region.

    Returns float32 [n, 4], and bool [n]: whether at least `min_visibility` of the area is inside.
    """
    moved = boxes * np.tile(scale, 2) + np.tile(top_left, 2)  # [n, 4]
    clipped = np.clip(moved, region[:2] * 2, region[2:] * 2)  # [n, 4]
    full_size = moved[:, 2:] - moved[:, :2]  # [n, 2]
    visible_size = clipped[:, 2:] - clipped[:, :2]  # [n, 2]
    is_visible = visible_size.prod(axis=1) >= min_visibility * full_size.prod(axis=1)
    is_large = (visible_size >= MIN_SIDE).all(axis=1)
    return clipped.astype(np.float32), is_visible & is_large


class RecordDataset(Dataset):
    """Records whose resized images are cached. Subclasses define `__getitem__` and `read`.

    read(image) returns it resized, uint8 [h, w, 3], and its placement, float32 (scale x, scale y,
    left, top): coordinates move as x -> x * scale x + left, y likewise.
    """

    def __init__(self, records: list[ImageRecord], config: Config, cache: ImageCache | None = None):
        self.records = records
        self.config = config
        self.cache = cache

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image `index`, resized, and its boxes [n, 4] xyxy in its pixels."""
        record = self.records[index]
        if self.cache:
            image, placement = self.cache.fetch(index, self.read, record.image)
        else:
            image, placement = self.read(record.image)
        return image, record.boxes * np.tile(placement[:2], 2) + np.tile(placement[2:], 2)


class MosaicDataset(RecordDataset):
    """Training samples: `dataset[sample_id]` with sample_id = epoch * len(dataset) + index.

    A sample depends only on (seed, sample_id), so a resumed run gets the same samples.
    A fraction `config.mosaic_prob` of the samples joins four images; the others show one image.
    """

    def __init__(self, records: list[ImageRecord], config: Config, cache: ImageCache | None = None):
        super().__init__(records, config, cache)
        self.augment = augmentations(config.min_visibility)

    def is_mosaic(self, sample_id: int) -> bool:
        """Return whether this sample is a four-image mosaic."""
        return self._begin(sample_id)[1]

    def _begin(self, sample_id: int) -> tuple[Generator, bool]:
        """Return the sample's random generator, and whether it is a mosaic: its first number."""
        random = np.random.default_rng((self.config.seed, sample_id))
        is_chosen = random.random() < self.config.mosaic_prob
        epoch = sample_id // len(self)
        return random, is_chosen and epoch < self.config.close_mosaic_epoch

    def __getitem__(self, sample_id: int) -> Sample:
        random, is_mosaic = self._begin(sample_id)
        index = sample_id % len(self)
        size = self.config.canvas_size
        canvas = np.empty((size, size, 3), np.uint8)
        if is_mosaic:
            boxes, labels = self._mosaic(canvas, index, random)
        else:
            scales = self.config.image_scale
            boxes, labels = self._place(canvas, (0, 0, size, size), index, scales, random)
        self.augment.set_random_seed(int(random.integers(2**31)))
        augmented = self.augment(image=canvas, bboxes=boxes, labels=labels)
        boxes = np.float32(augmented["bboxes"]).reshape(-1, 4)
        return to_sample(augmented["image"], boxes, np.int64(augmented["labels"]))

    def _mosaic(self, canvas: np.ndarray, index: int, random: Generator) -> tuple:
        """Draw four images around a random point of the canvas and return boxes and labels.

        YOLOv4 (Bochkovskiy et al. 2020, https://arxiv.org/abs/2004.10934), section 3.3.
        """
        size = len(canvas)
        x, y = (random.uniform(0.25, 0.75, 2) * size).astype(int).tolist()
        quadrants = [  # (region, its corner at the common point as fractions of width and height)
            ((0, 0, x, y), (1, 1)),
            ((x, 0, size, y), (0, 1)),
            ((0, y, x, size), (1, 0)),
            ((x, y, size, size), (0, 0)),
        ]
        indices = [index, *random.integers(len(self), size=3)]
        placed = [
            self._place(canvas, region, image_index, self.config.mosaic_scale, random, corner)
            for image_index, (region, corner) in zip(indices, quadrants, strict=True)
        ]
        boxes, labels = zip(*placed, strict=True)
        return np.concatenate(boxes), np.concatenate(labels)

    def _place(
        self,
        canvas: np.ndarray,
        region: Region,
        index: int,
        scales: tuple[float, float],
        random: Generator,
        corner: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw image `index` into a region and return its visible boxes and their labels.

        Its scale is log-uniform in `scales`, with a small change of the aspect ratio. An image
        larger than the region shows a random crop. A smaller one is at a random position, or
        touches the `corner` of the region.
        """
        image, boxes = self.image(index)
        scale = np.exp(random.uniform(*np.log(scales)))
        aspect = np.exp(random.uniform(-0.2, 0.2))
        scale = np.array([scale * aspect, scale / aspect])
        free = np.subtract(region[2:], region[:2]) - image.shape[1::-1] * scale  # < 0: is cropped
        position = random.random(2)  # fraction of the free space to the left and above
        if corner:
            position = np.where(free > 0, corner, position)
        top_left = region[:2] + free * position
        paste(canvas, region, image, scale, top_left)
        boxes, keep = transform_boxes(boxes, scale, top_left, region, self.config.min_visibility)
        return boxes[keep], self.records[index].labels[keep]

    def read(self, image: str | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return an image with a long side of `canvas_size`, and its placement."""
        size = self.config.canvas_size
        resized = resize_long_side(load_image(image, size), size)
        scale = np.divide(resized.shape[1::-1], get_image_size(image))
        return resized, np.float32([*scale, 0, 0])


def to_sample(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> Sample:
    """Convert uint8 [S, S, 3] and boxes xyxy in pixels to a sample for `collate`.

    Returns uint8 [3, S, S], boxes float32 [n, 4] cxcywh in 0..1 and labels int64 [n].
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)  # [3, S, S]
    boxes = box_convert(torch.from_numpy(boxes), "xyxy", "cxcywh") / image.shape[0]  # [n, 4]
    return pixels, boxes, torch.from_numpy(labels)
