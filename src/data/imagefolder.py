"""Images with one class each, in ImageNet's layout, for pretraining."""

import csv
from pathlib import Path

import albumentations as A
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, has_file_allowed_extension

from src.data.cache import open_cache
from src.data.records import is_hidden
from src.serving.images import get_image_size, load_image, resize_long_side

LAYOUT = "Expected train/CLASS/**/*.jpg and val/CLASS/**/*.jpg, or Tiny ImageNet's val/images and val/val_annotations.txt."


def read_image_folder(
    root: str | Path,
) -> tuple[list[str], list[tuple[str, int]], list[tuple[str, int]]]:
    """Read the names of the classes and the (path, label) pairs of both splits.

    root: a folder in ImageNet's layout (`train/CLASS/**/*.jpg`, `val` the same), or Tiny ImageNet's.
    Raises ValueError that names what is missing.
    """
    root = Path(root)
    classes, train = _read_split(root / "train")
    if len(classes) < 2:
        raise ValueError(
            f"{root / 'train'} has only the class {classes}. Pretraining needs at least two. {LAYOUT}"
        )
    annotations = root / "val" / "val_annotations.txt"
    if annotations.exists():
        return classes, train, _read_annotations(annotations, classes)
    val_classes, val = _read_split(root / "val")
    if unknown := set(val_classes) - set(classes):
        raise ValueError(
            f"{root / 'val'} has classes without training images: {sorted(unknown)[:5]}. {LAYOUT}"
        )
    return classes, train, [(path, classes.index(val_classes[label])) for path, label in val]


def list_classes(folder: str | Path) -> list[str]:
    """Return the names of a split's classes: its folders, without hidden ones such as .ipynb_checkpoints."""
    return [name for name in find_classes(folder)[0] if not name.startswith(".")]


class VisibleImageFolder(ImageFolder):
    """ImageFolder of `list_classes`."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = list_classes(directory)
        return classes, {name: label for label, name in enumerate(classes)}


def _read_split(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    def is_image(path: str) -> bool:
        return has_file_allowed_extension(path, IMG_EXTENSIONS) and not is_hidden(
            Path(path), folder
        )

    try:
        split = VisibleImageFolder(folder, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not in ImageNet's layout: {error}. {LAYOUT}") from None
    return split.classes, split.samples


def _read_annotations(path: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Read Tiny ImageNet's list: image file, class and a box in each line, separated by tabs."""
    labels, samples = {name: label for label, name in enumerate(classes)}, []
    with open(path, encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.reader(file, delimiter="\t"), start=1):
            if len(row) < 2 or row[1] not in labels:
                raise ValueError(
                    f"{path}, line {line}: no image file and class of train/. Restore the data set's own list."
                )
            samples.append((str(path.parent / "images" / row[0]), labels[row[1]]))
    return samples


class ClassificationDataset(Dataset):
    """Samples (uint8 [S, S, 3], label).

    Training: `dataset[sample_id]`, sample_id = epoch * len(dataset) + index, a random crop (Szegedy et al. 2015) that
    depends on (seed, sample_id) only. Validation: the centre. S is config.size_at(epoch), or the final size.
    """

    def __init__(self, samples: list[tuple[str, int]], config, training: bool):
        self.samples, self.config, self.training = samples, config, training
        self.cache_size = max(config.image_size, config.final_size) * 5 // 4
        name = "pretraining" if training else "pretraining-val"
        self.cache = open_cache(
            [path for path, _ in samples], name, self.cache_size, config.cache_gb
        )
        final = config.final_size
        self.center = A.Compose([A.SmallestMaxSize(final), A.CenterCrop(final, final)])
        self.random = {size: self._random_crop(size) for size in (config.image_size, final)}

    def _random_crop(self, size: int) -> A.Compose:
        return A.Compose(
            [
                A.RandomResizedCrop((size, size), scale=(self.config.min_crop, 1)),
                A.HorizontalFlip(p=0.5),
                A.RandomBrightnessContrast(0.2, 0.2, p=0.5),
                A.HueSaturationValue(8, 40, 20, p=0.5),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, sample_id: int) -> tuple[Tensor, int]:
        epoch, index = divmod(sample_id, len(self))
        path, label = self.samples[index]

        def read():
            image = load_image(path, self.cache_size)
            return resize_long_side(image, min(max(image.shape), self.cache_size)), get_image_size(
                path
            )

        image = np.array((self.cache.fetch(index, read) if self.cache else read())[0])
        transform = self.center
        if self.training:
            transform = self.random[self.config.size_at(epoch)]
            transform.set_random_seed(
                int(np.random.default_rng((self.config.seed, sample_id)).integers(2**31))
            )
        return torch.from_numpy(transform(image=image)["image"]), label


def collate_classification(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Join samples into images uint8 [B, 3, S, S], channels last in memory, and labels int64 [B]."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images).permute(0, 3, 1, 2), torch.tensor(labels)
