"""Mosaics, augmentation, validation letterbox, loaders, cache."""

import os
from math import ceil, floor

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

from src.config import Config
from src.data import cache
from src.data.cache import ImageCache, open_cache
from src.data.datamodule import DetectionDataModule, SampleIdSampler, ValDataset, collate
from src.data.mosaic import MosaicDataset, paste, transform_boxes
from src.data.records import make_record
from src.model.boxes import cxcywh_to_xyxy
from src.model.network import YOLOv3
from src.serving.images import PAD, letterbox, load_image, to_network_input
from src.serving.predictor import Predictor

YELLOW = (250, 250, 30)
SIZES = ((120, 90), (80, 140), (64, 64), (200, 50))


def one_object(number: int, visible: bool = True):
    """A gray image with a yellow rectangle (if visible), which its box encloses exactly."""
    width, height = SIZES[number]
    image = np.full((height, width, 3), PAD, dtype=np.uint8)
    box = [width // 4, height // 5, width * 3 // 4, height * 4 // 5]
    if visible:
        image[box[1] : box[3], box[0] : box[2]] = YELLOW
    return make_record(image, [box], [number], [False])


def records(missing: int = -1):
    return [one_object(number, visible=number != missing) for number in range(4)]


def differ(one, other) -> np.ndarray:
    """Mark pixels [..., 3] that differ by more than augmented brightness explains: bool [...]."""
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


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_multi_resolution_composes_at_the_largest_size(fraction):
    """The samples equal those of a run at that size alone, so they are not upscaled."""
    config = settings(mosaic_prob=fraction)
    single = MosaicDataset(records(), config.replace(image_size=160))
    multi = MosaicDataset(records(), config.replace(multiscale_sizes=(64, 160, 128)))
    for sample_id in range(20):
        assert all(map(torch.equal, single[sample_id], multi[sample_id]))
    assert single[0][0].shape == (3, 160, 160)


def test_a_new_augmentation_is_told_the_minimum_visibility():
    """A crop leaves 40 % of a box."""
    for min_visibility, kept in ((0.3, 1), (0.5, 0)):
        augment = MosaicDataset(records(), settings(min_visibility=min_visibility)).augment
        augment.transforms.insert(0, A.Crop(0, 0, 48, 96))
        image = np.zeros((96, 96, 3), np.uint8)
        augmented = augment(image=image, bboxes=np.array([[40, 10, 60, 30]]), labels=[0])
        assert len(augmented["bboxes"]) == kept


def test_the_box_of_a_whole_image_ends_where_its_pixels_end():
    """Pixels that are more than half covered, at random placements inside the region and beyond."""
    random = np.random.default_rng(0)
    region = (10, 20, 80, 90)
    compared = 0
    for _ in range(500):
        width, height = random.integers(3, 120, 2)
        canvas = np.full((96, 96, 3), PAD, dtype=np.uint8)
        image = np.full((height, width, 3), 250, dtype=np.uint8)
        top_left, scale = random.uniform(5, 75, 2), random.uniform(0.5, 1.5, 2)
        paste(canvas, region, image, scale, top_left)
        box, _ = transform_boxes(np.array([[0, 0, width, height]]), scale, top_left, region, 0.0)
        rows, columns = np.nonzero(canvas[..., 0] > (PAD + 250) / 2)
        if len(rows):
            edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            np.testing.assert_allclose(box[0], edges, atol=0.55)
            compared += 1
    assert compared > 450


def test_mosaic_fraction_and_closing_epochs():
    data = MosaicDataset(records(), settings())
    fraction = np.mean([data.is_mosaic(sample_id) for sample_id in range(4000)])
    assert abs(fraction - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)
    closing = MosaicDataset(records(), settings(epochs=10, close_mosaic_epochs=2))
    assert any(map(closing.is_mosaic, range(8 * 4)))
    assert not any(map(closing.is_mosaic, range(8 * 4, 10 * 4)))


def test_mosaic_joins_four_images_at_a_random_point():
    images = []
    for label, color in enumerate([(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]):
        pixels = np.full((96, 96, 3), color, np.uint8)
        images.append(make_record(pixels, [[0, 0, 96, 96]], [label], [False]))
    config = settings(mosaic_prob=1.0, mosaic_scale=(1.2, 1.25), min_visibility=0.0)
    data = MosaicDataset(images, config)
    corners, classes = set(), set()
    for sample_id in range(40):
        _, boxes, labels = data[sample_id]
        assert len(boxes) == 4 and sample_id % 4 in labels  # its own image and three others
        corners |= {round(v.item(), 2) for v in (boxes[:, 0] - boxes[:, 2] / 2)}
        classes |= set(labels.tolist())
        covered = boxes[:, 2:].prod(dim=1).sum()
        assert covered == pytest.approx(1, abs=0.02)
    assert len(corners) > 20 and classes == {0, 1, 2, 3}
    small = MosaicDataset(images, config.replace(mosaic_scale=(0.15, 0.2)))
    for sample_id in range(40):  # smaller than their quadrants, they touch the point
        x1, y1, x2, y2 = cxcywh_to_xyxy(small[sample_id][1]).T.sort().values
        for start, end in ((x1, x2), (y1, y2)):
            point = torch.cat((start[2:], end[:2]))
            assert point.std() < 1e-4 and 0.24 < point[0] < 0.76


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0.3, 0.5), (1.0, 0.6, 0.8)])
def test_images_are_scaled_by_config(fraction, low, high):
    """A box has scale squared times its original area; the aspect ratio's change keeps it."""
    scales = {"mosaic_scale": (0.6, 0.8), "image_scale": (0.3, 0.5)}
    config = settings(image_size=416, mosaic_prob=fraction, min_visibility=0.99, **scales)
    data = MosaicDataset(records(), config)
    original = np.concatenate([data.image(number)[1] for number in range(4)]) / 416
    areas = (original[:, 2:] - original[:, :2]).prod(axis=1)
    measured = []
    for sample_id in range(80):
        _, boxes, labels = data[sample_id]
        measured.extend(np.sqrt(boxes[:, 2:].prod(dim=1).numpy() / areas[labels]))
    assert len(measured) > 40 and low - 0.01 < min(measured) and max(measured) < high + 0.01
    assert min(measured) < np.quantile((low, high), 0.2)
    assert max(measured) > np.quantile((low, high), 0.8)


@pytest.mark.parametrize("min_visibility", [0.0, 0.7])
def test_samples_have_no_degenerate_boxes(min_visibility):
    random = np.random.default_rng(0)
    images = []
    for _ in range(12):
        corner = random.uniform(0, 90, (8, 2))
        boxes = np.concatenate((corner, corner + random.uniform(0.5, 10, (8, 2))), axis=1)
        pixels = np.zeros((100, 100, 3), np.uint8)
        images.append(make_record(pixels, boxes, random.integers(0, 4, 8), np.zeros(8)))
    data = MosaicDataset(images, settings(min_visibility=min_visibility))
    for sample_id in range(150):
        image, boxes, labels = data[sample_id]
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert (boxes.dtype, labels.dtype) == (torch.float32, torch.int64)
        edges = cxcywh_to_xyxy(boxes)
        assert len(boxes) == len(labels) and ((edges >= -1e-6) & (edges <= 1 + 1e-6)).all()
        assert (boxes[:, 2:] * 96 >= 1.99).all()


@pytest.mark.parametrize(
    "region, limit, kept",
    [((0, 0, 50, 100), 0.25, True), ((0, 0, 45, 100), 0.25, False), ((0, 0, 60, 40), 0.5, False)],
)
def test_boxes_with_low_visibility_are_dropped(region, limit, kept):
    box, scale, top_left = np.array([[10, 10, 30, 30]]), np.array([2, 2]), np.array([20, 0])
    moved, keep = transform_boxes(box, scale, top_left, region, limit)
    assert keep.tolist() == [kept]
    assert moved.tolist() == [[40, 20, min(80, region[2]), min(60, region[3])]]


def test_samples_are_flipped_and_change_in_light():
    pixels = np.full((96, 96, 3), (60, 120, 60), np.uint8)
    record = make_record(pixels, [[0, 0, 48, 96]], [0], [False])
    data = MosaicDataset([record], settings(mosaic_prob=0.0, image_scale=(1.0, 1.0)))
    samples = [data[sample_id] for sample_id in range(40)]
    assert 8 < sum(bool(boxes[0, 0] < 0.5) for _, boxes, _ in samples) < 32
    assert len({int(image.max()) for image, _, _ in samples}) > 5


def test_boxes_fit_a_jpeg_that_is_decoded_at_reduced_scale(tmp_path):
    path = str(tmp_path / "large.jpg")
    Image.new("RGB", (800, 600)).save(path)
    record = make_record(path, [[400, 300, 800, 600]], [0], [False])
    image, boxes = MosaicDataset([record], settings()).image(0)
    assert load_image(path, 96).shape == (75, 100, 3) and image.shape == (72, 96, 3)
    np.testing.assert_allclose(boxes, [[48, 36, 96, 72]], atol=1e-3)


def test_same_seed_gives_same_samples_and_epochs_differ():
    sampler = SampleIdSampler(MosaicDataset(records(), settings()), seed=0)
    sampler.set_epoch(5)
    assert sorted(sampler) == [20, 21, 22, 23]  # each image once
    one, again, other = (MosaicDataset(records(), settings(seed=seed)) for seed in (3, 3, 4))
    for sample_id in range(8):
        assert all(map(torch.equal, one[sample_id], again[sample_id]))
        assert not torch.equal(one[sample_id][0], other[sample_id][0])
        assert not torch.equal(one[sample_id][0], one[sample_id + 4][0])  # the next epoch


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


def test_collate():
    data = MosaicDataset(records(), settings())
    empty = (data[1][0], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    samples = [data[0], empty, data[2]]
    batch = collate(samples)
    assert batch["images"].shape == (3, 3, 96, 96) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert batch["counts"] == [len(sample[2]) for sample in samples]
    assert batch["targets"].dtype == torch.float32
    for number, rows in enumerate(batch["targets"].split(batch["counts"])):
        assert (rows[:, 0] == number).all()
        assert torch.equal(rows[:, 1].long(), samples[number][2])
        assert torch.equal(rows[:, 2:], samples[number][1])


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
    image = np.full((50, 100, 3), (200, 100, 20), np.uint8)
    square, (scale_x, scale_y, left, top) = letterbox(image, 64)
    assert (scale_x, scale_y, left, top) == pytest.approx((0.64, 0.64, 0, 16))
    assert (square[:16] == PAD).all() and (square[48:] == PAD).all()
    assert (square[16:48] == image[0, 0]).all()


def test_cache_does_not_change_samples(tmp_path):
    uncached = MosaicDataset(records(), settings())
    cached = MosaicDataset(records(), settings(), ImageCache(tmp_path / "c.u8", 4, 96))
    for sample_id in (0, 1, 2, 3, 0, 1, 2, 3):
        assert all(map(torch.equal, uncached[sample_id], cached[sample_id]))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two image files; caches go to a folder beside them."""
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    return paths


def test_cache_reads_each_image_once(files):
    reads = []

    def read(value):
        reads.append(value)
        return np.full((40, 64, 3), value, np.uint8), (2, 0.5, 0, 7)

    first = open_cache(files, "one", 64, max_gb=1)
    assert first.fetch(1, read, 7)[0].max() == 7 and first.fetch(0, read, 9)[0].max() == 9
    image, placement = open_cache(files, "one", 64, max_gb=1).fetch(1, read, 8)
    assert reads == [7, 9] and placement.tolist() == [2, 0.5, 0, 7]
    assert image.shape == (40, 64, 3) and (image == 7).all()


def load_pixels(value: int) -> tuple:
    return np.full((8, 8, 3), value, np.uint8), (1, 1, 0, 0)


def test_another_cache_of_the_name_replaces_the_former(files):
    opened = []
    for time, (name, images) in enumerate((("two", files), ("one", files), ("one", files[:1]))):
        os.utime(files[0], (time, 1))
        opened.append(open_cache(images, name, 64, max_gb=1))
        opened[-1].fetch(0, load_pixels, 3)
    assert {*cache.FOLDER.iterdir()} == {opened[0].path, opened[2].path}
    assert opened[1].fetch(0, load_pixels, 4)[0].max() == 4  # of a run that goes on


@pytest.mark.parametrize(("max_gb", "margin"), [(1e-6, 0), (1, 1e18)])
def test_training_continues_without_a_cache(files, monkeypatch, capsys, max_gb, margin):
    monkeypatch.setattr(cache, "DISK_MARGIN", margin)
    assert open_cache([np.zeros((8, 8, 3))], "one", 64, max_gb) is None
    assert open_cache(files, "one", 64, max_gb=0) is None
    assert capsys.readouterr().out == ""  # not needed, or not wanted
    assert open_cache(files, "one", 64, max_gb) is None
    output = capsys.readouterr().out
    assert "allow 0.0 GB" in output and "Each epoch decodes them again" in output
