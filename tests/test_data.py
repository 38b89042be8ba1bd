"""Mosaics, augmentation, validation letterbox, loaders, cache."""

from math import ceil, floor

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

from src.config import Config
from src.data.cache import ImageCache
from src.data.datamodule import DetectionDataModule, SampleIdSampler, ValDataset, collate
from src.data.mosaic import MosaicDataset, augmentations, paste, transform_boxes
from src.data.records import make_record
from src.model.boxes import cxcywh_to_xyxy
from src.model.network import YOLOv3
from src.serving.images import PAD, letterbox, load_image, to_network_input
from src.serving.predictor import Predictor

YELLOW = (250, 250, 30)
SIZES = ((120, 90), (80, 140), (64, 64), (200, 50))


def one_object(number: int, visible: bool = True):
    """A grey image with a yellow rectangle, which its box encloses exactly. visible: False leaves out the rectangle."""
    width, height = SIZES[number]
    image = np.full((height, width, 3), PAD, dtype=np.uint8)
    box = [width // 4, height // 5, width * 3 // 4, height * 4 // 5]
    if visible:
        image[box[1] : box[3], box[0] : box[2]] = YELLOW
    return make_record(image, [box], [number], [False])


def records(missing: int = -1):
    return [one_object(number, visible=number != missing) for number in range(4)]


def differ(one, other) -> np.ndarray:
    """Mark pixels that differ by more than augmentation of brightness explains: uint8 [..., 3] -> bool [...]."""
    return (np.abs(np.int16(one) - np.int16(other)) > 30).any(axis=-1)


def settings(**changes) -> Config:
    return Config(
        image_size=96, classes=("a", "b", "c", "d"), epochs=1000, close_mosaic_epochs=0, cache_gb=0
    ).replace(**changes)


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_boxes_follow_their_pixels(mosaic):
    """The pixels of an object are those that change if it is left out, with any augmentation."""
    config = settings(mosaic_prob=mosaic, min_visibility=0.0)
    complete, seen = MosaicDataset(records(), config), 0
    for label in range(4):
        without = MosaicDataset(records(missing=label), config)
        for sample_id in range(label, 160, 4):
            image, boxes, labels = complete[sample_id]
            changed = torch.from_numpy(
                differ(image.permute(1, 2, 0), without[sample_id][0].permute(1, 2, 0))
            )  # [S, S]
            enclosed = torch.zeros_like(changed)
            for x1, y1, x2, y2 in (cxcywh_to_xyxy(boxes[labels == label]) * 96).tolist():
                enclosed[
                    max(0, floor(y1 - 1.1)) : ceil(y2 + 1.1),
                    max(0, floor(x1 - 1.1)) : ceil(x2 + 1.1),
                ] = True
                inside = changed[ceil(y1 + 0.6) : floor(y2 - 0.6), ceil(x1 + 0.6) : floor(x2 - 0.6)]
                assert inside.all(), (sample_id, label)
                seen += inside.numel() > 0
            outside = (changed & ~enclosed).nonzero()
            assert (
                len(outside) == 0
                or (outside.max(dim=0).values - outside.min(dim=0).values).min() <= 2
            ), (sample_id, label)
    assert seen > 100


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_multi_resolution_composes_at_the_largest_size(mosaic):
    """The samples equal those of a run at that size alone, so they are not upscaled."""
    config = settings(mosaic_prob=mosaic)
    single, multi = (
        MosaicDataset(records(), changed)
        for changed in (
            config.replace(image_size=160),
            config.replace(multiscale_sizes=(64, 160, 128)),
        )
    )
    for sample_id in range(20):
        for one, other in zip(single[sample_id], multi[sample_id], strict=True):
            assert torch.equal(one, other)
    assert single[0][0].shape == (3, 160, 160)


@pytest.mark.filterwarnings("ignore:Got processor for bboxes")  # for colour augmentations
def test_each_augmentation_moves_boxes_with_pixels():
    image = np.full((64, 64, 3), PAD, dtype=np.uint8)
    image[10:30, 5:20] = YELLOW
    background = np.full_like(image, PAD)
    for step in augmentations().transforms:
        step.p = 1.0
        pipeline = A.Compose(
            [step], bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"])
        )
        pipeline.set_random_seed(1)
        out = pipeline(image=image, bboxes=np.float32([[5, 10, 20, 30]]), labels=[0])
        pipeline.set_random_seed(1)
        without = pipeline(image=background, bboxes=np.float32([[5, 10, 20, 30]]), labels=[0])
        rows, columns = np.nonzero(differ(out["image"], without["image"]))
        edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(out["bboxes"][0], edges, atol=0.01, err_msg=type(step).__name__)


def test_the_box_of_a_whole_image_ends_where_its_pixels_end():
    """Random placements, inside the region and beyond it, of images down to a height of one pixel."""
    random, region = np.random.default_rng(0), (10, 20, 80, 90)
    for _ in range(500):
        width, height = random.integers(1, 120, 2)
        canvas = np.full((96, 96, 3), PAD, dtype=np.uint8)
        image = np.full((height, width, 3), 250, dtype=np.uint8)
        top_left, scale = random.uniform(5, 75, 2), random.uniform(0.5, 1.5, 2)
        moved, shift = paste(canvas, region, image, scale, top_left)
        box, _ = transform_boxes(np.float32([[0, 0, width, height]]), moved, shift, region, 0.0)
        rows, columns = np.nonzero((canvas != PAD).any(axis=-1))
        np.testing.assert_allclose(
            box[0], (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), atol=1e-3
        )


def test_mosaic_fraction_and_closing_epochs():
    data = MosaicDataset(records(), settings())
    fraction = np.mean([data.is_mosaic(sample_id) for sample_id in range(4000)])
    assert abs(fraction - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)
    closing = MosaicDataset(records(), settings(epochs=10, close_mosaic_epochs=2))
    assert any(map(closing.is_mosaic, range(8 * 4))) and not any(
        map(closing.is_mosaic, range(32, 40))
    )


def test_mosaic_joins_four_images_at_a_random_point():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    images = [
        make_record(np.full((96, 96, 3), c, np.uint8), [[0, 0, 96, 96]], [i], [False])
        for i, c in enumerate(colours)
    ]
    data = MosaicDataset(
        images, settings(mosaic_prob=1.0, mosaic_scale=(1.2, 1.25), min_visibility=0.0)
    )
    corners, classes = set(), set()
    for sample_id in range(40):
        _, boxes, labels = data[sample_id]
        assert (
            len(boxes) == 4 and labels.tolist().count(sample_id % 4) >= 1
        )  # its own image and three others
        corners |= {round(v.item(), 2) for v in (boxes[:, 0] - boxes[:, 2] / 2)}
        classes |= set(labels.tolist())
        assert boxes[:, 2:].prod(dim=1).sum() == pytest.approx(
            1, abs=0.02
        )  # together they cover the canvas
    assert len(corners) > 20 and classes == {0, 1, 2, 3}


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_images_are_scaled_by_config(mosaic):
    """A box has scale squared times its original area. The change of the aspect ratio keeps the area.

    Up to the rounding to pixels, so the canvas is large.
    """
    low, high = scales = (0.6, 0.8) if mosaic else (0.3, 0.5)
    data = MosaicDataset(
        records(),
        settings(
            image_size=416,
            mosaic_prob=mosaic,
            mosaic_scale=(0.6, 0.8),
            image_scale=(0.3, 0.5),
            min_visibility=0.99,
        ),
    )
    original = np.concatenate([data.image(number)[1] for number in range(4)]) / 416
    areas = (original[:, 2:] - original[:, :2]).prod(axis=1)
    samples = [
        (boxes[:, 2:].prod(dim=1), labels) for _, boxes, labels in map(data.__getitem__, range(120))
    ]
    measured = np.sqrt(
        np.concatenate([area.numpy() / areas[labels.numpy()] for area, labels in samples])
    )
    assert len(measured) > 60 and low - 0.01 < measured.min() and measured.max() < high + 0.01
    assert measured.min() < np.quantile(scales, 0.2) and measured.max() > np.quantile(scales, 0.8)


@pytest.mark.parametrize("min_visibility", [0.0, 0.25, 0.7])
def test_samples_have_no_degenerate_boxes(min_visibility):
    random = np.random.default_rng(0)
    images = []
    for _ in range(12):
        corner = random.uniform(0, 90, (8, 2))
        boxes = np.concatenate((corner, corner + random.uniform(0.5, 10, (8, 2))), axis=1)
        images.append(
            make_record(
                np.zeros((100, 100, 3), np.uint8), boxes, random.integers(0, 4, 8), np.zeros(8)
            )
        )
    data = MosaicDataset(images, settings(min_visibility=min_visibility))
    for sample_id in range(200):
        image, boxes, labels = data[sample_id]
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert (
            boxes.dtype == torch.float32
            and labels.dtype == torch.int64
            and len(boxes) == len(labels)
        )
        edges = cxcywh_to_xyxy(boxes)
        assert (edges >= -1e-6).all() and (edges <= 1 + 1e-6).all()
        assert (boxes[:, 2:] * 96 >= 1.99).all()


def test_boxes_with_low_visibility_are_dropped():
    data = MosaicDataset(
        records(), settings(mosaic_prob=1.0, min_visibility=0.6, mosaic_scale=(0.9, 1.25))
    )
    kept = sum(len(data[sample_id][1]) for sample_id in range(60))
    all_boxes = MosaicDataset(
        records(), settings(mosaic_prob=1.0, min_visibility=0.0, mosaic_scale=(0.9, 1.25))
    )
    assert 0 < kept < sum(len(all_boxes[sample_id][1]) for sample_id in range(60))


def test_same_seed_gives_same_samples_and_epochs_differ():
    one, again, other = (MosaicDataset(records(), settings(seed=seed)) for seed in (3, 3, 4))
    for sample_id in range(12):
        assert torch.equal(one[sample_id][0], again[sample_id][0]) and torch.equal(
            one[sample_id][1], again[sample_id][1]
        )
    assert not any(torch.equal(one[sample_id][0], other[sample_id][0]) for sample_id in range(8))
    assert not any(
        torch.equal(one[sample_id][0], one[sample_id + 4][0]) for sample_id in range(4)
    )  # the next epoch


def test_worker_count_does_not_change_samples():
    def images(workers: int, epoch: int) -> torch.Tensor:
        config = settings(batch_size=4, num_workers=workers)
        data = DetectionDataModule(config)
        data.train_records = records() * 4
        data.train_data = MosaicDataset(data.train_records, config)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch["images"] for batch in loader])

    no_workers, two_workers = images(0, 0), images(2, 0)
    assert torch.equal(no_workers, two_workers)
    both = torch.cat((two_workers, images(2, 1))).flatten(1)
    assert len(torch.unique(both, dim=0)) == len(both) == 32


def test_an_epoch_has_each_image_once():
    sampler = SampleIdSampler(MosaicDataset(records(), settings()), seed=0)
    sampler.set_epoch(5)
    assert sorted(sampler) == [20, 21, 22, 23]


def test_collate():
    data = MosaicDataset(records(), settings())
    samples = [
        data[0],
        (*data[1][:1], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
        data[2],
    ]
    batch = collate(samples)
    assert batch["images"].shape == (3, 3, 96, 96) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert batch["targets"].shape == (len(samples[0][1]) + len(samples[2][1]), 6)
    images = [0] * len(samples[0][1]) + [2] * len(samples[2][1])
    assert batch["targets"][:, 0].tolist() == images
    assert batch["counts"] == [images.count(image) for image in range(3)]
    torch.testing.assert_close(batch["targets"][batch["targets"][:, 0] == 2, 2:], samples[2][1])


@pytest.mark.parametrize("size", [(53, 200), (200, 53), (96, 96), (31, 17), (500, 375)])
def test_validation_and_predictor_use_the_same_letterbox(tmp_path, size):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(
        0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8
    )
    Image.fromarray(pixels).resize(size).save(path)
    record = make_record(str(path), [[5, 4, 15, 12]], [0], [False])
    square, boxes, _, _ = ValDataset([record], settings())[0]
    predictor = Predictor(YOLOv3(4, 0.125), image_size=96, device="cpu")
    inputs, placement = predictor.preprocess(load_image(path))
    assert torch.equal(to_network_input(square[None]), inputs)
    letterboxed = cxcywh_to_xyxy(boxes)[0].numpy() * 96
    back = (letterboxed - placement[[2, 3, 2, 3]]) / placement[[0, 1, 0, 1]]
    np.testing.assert_allclose(back, [5, 4, 15, 12], atol=1e-3)


def test_letterbox_keeps_the_aspect_ratio():
    square, (scale_x, scale_y, left, top) = letterbox(np.zeros((50, 100, 3), np.uint8), 64)
    assert (scale_x, scale_y, left, top) == pytest.approx((0.64, 0.64, 0, 16))
    assert (square[:16] == PAD).all() and (square[16:48] == 0).all() and (square[48:] == PAD).all()


def test_cache_reads_each_image_once(tmp_path):
    cache, reads = ImageCache(tmp_path / "images.u8", count=3, size=64), []

    def read():
        reads.append(1)
        return np.arange(40 * 64 * 3, dtype=np.uint8).reshape(40, 64, 3), (400, 250)

    first, again = cache.fetch(1, read), ImageCache(tmp_path / "images.u8", 3, 64).fetch(1, read)
    assert len(reads) == 1 and first[1] == again[1] == (400, 250)
    assert np.array_equal(first[0], again[0])
    assert cache.fetch(2, lambda: (np.ones((8, 8, 3), np.uint8), (8, 8)))[0].sum() == 192


def test_cache_does_not_change_samples(tmp_path):
    uncached = MosaicDataset(records(), settings())
    cached = MosaicDataset(records(), settings(), ImageCache(tmp_path / "c.u8", 4, 96))
    for sample_id in (0, 1, 2, 3, 0, 1, 2, 3):
        assert torch.equal(uncached[sample_id][0], cached[sample_id][0]) and torch.equal(
            uncached[sample_id][1], cached[sample_id][1]
        )


def test_a_cache_that_is_too_large_is_refused_with_a_message(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from src.data.cache import open_cache

    assert open_cache([record.image for record in records()], "training", 96, max_gb=1e-6) is None
    assert "Config.cache_gb allows 1e-06" in capsys.readouterr().out
    assert open_cache([record.image for record in records()], "training", 96, max_gb=0) is None
    assert capsys.readouterr().out == ""
    assert open_cache([record.image for record in records()], "training", 96, max_gb=1).count == 4
