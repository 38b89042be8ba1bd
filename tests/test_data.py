"""Mosaics, augmentation, the held-out letterbox, loaders."""

from math import ceil, floor

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

from src.config import Config
from src.data.cache import ImageCache
from src.data.datamodule import DetectionDataModule, SampleIdSampler, ValDataset, collate
from src.data.mosaic import MosaicDataset, augmentations
from src.data.records import make_record
from src.model.boxes import cxcywh_to_xyxy
from src.model.network import YOLOv3
from src.serving.images import PAD, letterbox, load_image, to_network_input
from src.serving.predictor import Predictor

YELLOW = (250, 250, 30)
SIZES = ((120, 90), (80, 140), (64, 64), (200, 50))


def one_object(number: int, drawn: bool = True):
    """A grey picture with a yellow rectangle that its box encloses exactly, or without it."""
    width, height = SIZES[number]
    image = np.full((height, width, 3), PAD, dtype=np.uint8)
    box = [width // 4, height // 5, width * 3 // 4, height * 4 // 5]
    if drawn:
        image[box[1] : box[3], box[0] : box[2]] = YELLOW
    return make_record(image, [box], [number], [False])


def records(missing: int = -1):
    return [one_object(number, drawn=number != missing) for number in range(4)]


def differ(one, other) -> np.ndarray:
    """Where two pictures differ by more than a change of light would explain: uint8 [..., 3] -> bool [...]."""
    return (np.abs(np.int16(one) - np.int16(other)) > 30).any(axis=-1)


def settings(**changes) -> Config:
    return Config(image_size=96, classes=("a", "b", "c", "d"), epochs=1000, close_mosaic_epochs=0, cache_gb=0).replace(
        **changes
    )


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_boxes_follow_the_pixels_they_label(mosaic):
    """The object's pixels are those that change when it is not drawn, whatever the augmentation did to them."""
    config = settings(mosaic_prob=mosaic, min_visibility=0.0)
    whole, seen = MosaicDataset(records(), config), 0
    for label in range(4):
        without = MosaicDataset(records(missing=label), config)
        for draw in range(label, 160, 4):
            image, boxes, labels = whole[draw]
            changed = torch.from_numpy(differ(image.permute(1, 2, 0), without[draw][0].permute(1, 2, 0)))  # [S, S]
            enclosed = torch.zeros_like(changed)
            for x1, y1, x2, y2 in (cxcywh_to_xyxy(boxes[labels == label]) * 96).tolist():
                enclosed[max(0, floor(y1 - 1.1)) : ceil(y2 + 1.1), max(0, floor(x1 - 1.1)) : ceil(x2 + 1.1)] = True
                inside = changed[ceil(y1 + 0.6) : floor(y2 - 0.6), ceil(x1 + 0.6) : floor(x2 - 0.6)]
                assert inside.all(), (draw, label)
                seen += inside.numel() > 0
            lost = (changed & ~enclosed).nonzero()
            assert len(lost) == 0 or (lost.max(dim=0).values - lost.min(dim=0).values).min() <= 2, (draw, label)
    assert seen > 100


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_multi_resolution_composes_at_the_largest_side(mosaic):
    """The same picture as a run at that side alone has: detail is read, not made by enlarging."""
    config = settings(mosaic_prob=mosaic)
    large, sized = (
        MosaicDataset(records(), changed)
        for changed in (config.replace(image_size=160), config.replace(multiscale_sizes=(64, 160, 128)))
    )
    for draw in range(20):
        for one, other in zip(large[draw], sized[draw], strict=True):
            assert torch.equal(one, other)
    assert large[0][0].shape == (3, 160, 160)


@pytest.mark.filterwarnings("ignore:Got processor for bboxes")  # colour alone moves no box
def test_each_augmentation_moves_boxes_with_pixels():
    image = np.full((64, 64, 3), PAD, dtype=np.uint8)
    image[10:30, 5:20] = YELLOW
    plain = np.full_like(image, PAD)
    for step in augmentations().transforms:
        step.p = 1.0
        pipeline = A.Compose([step], bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]))
        pipeline.set_random_seed(1)
        out = pipeline(image=image, bboxes=np.float32([[5, 10, 20, 30]]), labels=[0])
        pipeline.set_random_seed(1)
        bare = pipeline(image=plain, bboxes=np.float32([[5, 10, 20, 30]]), labels=[0])
        rows, columns = np.nonzero(differ(out["image"], bare["image"]))
        edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(out["bboxes"][0], edges, atol=0.01, err_msg=type(step).__name__)


def test_three_quarters_are_mosaics():
    data = MosaicDataset(records(), settings())
    share = np.mean([data.is_mosaic(draw) for draw in range(4000)])
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)
    whole = MosaicDataset(records(), settings(epochs=10, close_mosaic_epochs=2))
    assert any(whole.is_mosaic(draw) for draw in range(8 * 4)) and not any(whole.is_mosaic(draw) for draw in range(32, 40))


def test_mosaic_shows_four_pictures_at_a_random_centre():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    pictures = [make_record(np.full((96, 96, 3), c, np.uint8), [[0, 0, 96, 96]], [i], [False]) for i, c in enumerate(colours)]
    data = MosaicDataset(pictures, settings(mosaic_prob=1.0, mosaic_scale=(1.2, 1.25), min_visibility=0.0))
    corners, kinds = set(), set()
    for draw in range(40):
        _, boxes, labels = data[draw]
        assert len(boxes) == 4 and labels.tolist().count(draw % 4) >= 1  # its own picture and three others
        corners |= {round(v.item(), 2) for v in (boxes[:, 0] - boxes[:, 2] / 2)}
        kinds |= set(labels.tolist())
        assert boxes[:, 2:].prod(dim=1).sum() == pytest.approx(1, abs=0.02)  # together they cover the canvas
    assert len(corners) > 20 and kinds == {0, 1, 2, 3}


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_pictures_are_scaled_by_what_the_settings_say(mosaic):
    """Shapes change, areas do not: a box has scale squared of its area in the picture as it was read."""
    low, high = scales = (0.6, 0.8) if mosaic else (0.3, 0.5)
    data = MosaicDataset(
        records(), settings(mosaic_prob=mosaic, mosaic_scale=(0.6, 0.8), image_scale=(0.3, 0.5), min_visibility=0.99)
    )
    read = np.concatenate([data.image(number)[1] for number in range(4)]) / 96
    areas = (read[:, 2:] - read[:, :2]).prod(axis=1)
    drawn = [(boxes[:, 2:].prod(dim=1), labels) for _, boxes, labels in map(data.__getitem__, range(120))]
    found = np.sqrt(np.concatenate([area.numpy() / areas[labels.numpy()] for area, labels in drawn]))
    assert len(found) > 60 and low - 0.01 < found.min() and found.max() < high + 0.01
    assert found.min() < np.quantile(scales, 0.2) and found.max() > np.quantile(scales, 0.8)


@pytest.mark.parametrize("min_visibility", [0.0, 0.25, 0.7])
def test_no_degenerate_box_leaves_the_data_set(min_visibility):
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(12):
        corner = random.uniform(0, 90, (8, 2))
        boxes = np.concatenate((corner, corner + random.uniform(0.5, 10, (8, 2))), axis=1)
        pictures.append(make_record(np.zeros((100, 100, 3), np.uint8), boxes, random.integers(0, 4, 8), np.zeros(8)))
    data = MosaicDataset(pictures, settings(min_visibility=min_visibility))
    for draw in range(200):
        image, boxes, labels = data[draw]
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert boxes.dtype == torch.float32 and labels.dtype == torch.int64 and len(boxes) == len(labels)
        edges = cxcywh_to_xyxy(boxes)
        assert edges.min(initial=0) >= -1e-6 if len(edges) == 0 else edges.min() >= -1e-6 and edges.max() <= 1 + 1e-6
        assert (boxes[:, 2:] * 96 >= 1.99).all()


def test_a_box_stays_while_enough_of_it_is_left():
    data = MosaicDataset(records(), settings(mosaic_prob=1.0, min_visibility=0.6, mosaic_scale=(0.9, 1.25)))
    kept = sum(len(data[draw][1]) for draw in range(60))
    everything = MosaicDataset(records(), settings(mosaic_prob=1.0, min_visibility=0.0, mosaic_scale=(0.9, 1.25)))
    assert 0 < kept < sum(len(everything[draw][1]) for draw in range(60))


def test_one_seed_gives_one_result_and_epochs_differ():
    one, again, other = (MosaicDataset(records(), settings(seed=seed)) for seed in (3, 3, 4))
    for draw in range(12):
        assert torch.equal(one[draw][0], again[draw][0]) and torch.equal(one[draw][1], again[draw][1])
    assert not any(torch.equal(one[draw][0], other[draw][0]) for draw in range(8))
    assert not any(torch.equal(one[draw][0], one[draw + 4][0]) for draw in range(4))  # the next epoch


def test_workers_change_nothing_and_repeat_nothing():
    def images(workers: int, epoch: int) -> torch.Tensor:
        config = settings(batch_size=4, num_workers=workers)
        data = DetectionDataModule(config)
        data.train_records = records() * 4
        data.train_data = MosaicDataset(data.train_records, config)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch["images"] for batch in loader])

    alone, two = images(0, 0), images(2, 0)
    assert torch.equal(alone, two)
    both = torch.cat((two, images(2, 1))).flatten(1)
    assert len(torch.unique(both, dim=0)) == len(both) == 32


def test_an_epoch_draws_every_picture_once():
    sampler = SampleIdSampler(MosaicDataset(records(), settings()), seed=0)
    sampler.set_epoch(5)
    assert sorted(sampler) == [20, 21, 22, 23]


def test_collate():
    data = MosaicDataset(records(), settings())
    samples = [data[0], (*data[1][:1], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), data[2]]
    batch = collate(samples)
    assert batch["images"].shape == (3, 3, 96, 96) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert batch["targets"].shape == (len(samples[0][1]) + len(samples[2][1]), 6)
    assert set(batch["targets"][:, 0].tolist()) <= {0, 2}
    torch.testing.assert_close(batch["targets"][batch["targets"][:, 0] == 2, 2:], samples[2][1])


@pytest.mark.parametrize("size", [(53, 200), (200, 53), (96, 96), (31, 17), (500, 375)])
def test_one_letterbox_serves_held_out_split_and_predictor(tmp_path, size):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    record = make_record(str(path), [[5, 4, 15, 12]], [0], [False])
    square, boxes, _, _ = ValDataset([record], settings())[0]
    predictor = Predictor(YOLOv3(4, 0.125), image_size=96, device="cpu")
    inputs, placement = predictor.preprocess(load_image(path))
    assert torch.equal(to_network_input(square[None]), inputs)
    there = cxcywh_to_xyxy(boxes)[0].numpy() * 96
    back = (there - placement[[2, 3, 2, 3]]) / placement[[0, 1, 0, 1]]
    np.testing.assert_allclose(back, [5, 4, 15, 12], atol=1e-3)


def test_letterbox_keeps_the_shape():
    square, (scale_x, scale_y, left, top) = letterbox(np.zeros((50, 100, 3), np.uint8), 64)
    assert (scale_x, scale_y, left, top) == pytest.approx((0.64, 0.64, 0, 16))
    assert (square[:16] == PAD).all() and (square[16:48] == 0).all() and (square[48:] == PAD).all()


def test_cache_gives_what_was_read_once(tmp_path):
    cache, reads = ImageCache(tmp_path / "pictures.u8", count=3, side=64), []

    def read():
        reads.append(1)
        return np.arange(40 * 64 * 3, dtype=np.uint8).reshape(40, 64, 3), (400, 250)

    first, again = cache.fetch(1, read), ImageCache(tmp_path / "pictures.u8", 3, 64).fetch(1, read)
    assert len(reads) == 1 and first[1] == again[1] == (400, 250)
    assert np.array_equal(first[0], again[0])
    assert cache.fetch(2, lambda: (np.ones((8, 8, 3), np.uint8), (8, 8)))[0].sum() == 192


def test_cache_changes_no_sample(tmp_path):
    plain = MosaicDataset(records(), settings())
    cached = MosaicDataset(records(), settings(), ImageCache(tmp_path / "c.u8", 4, 96))
    for draw in (0, 1, 2, 3, 0, 1, 2, 3):
        assert torch.equal(plain[draw][0], cached[draw][0]) and torch.equal(plain[draw][1], cached[draw][1])


def test_a_cache_without_room_is_refused_with_a_word(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from src.data.cache import open_cache

    assert open_cache(records(), "training", 96, room_gb=1e-6) is None
    assert "Config.cache_gb allows 1e-06" in capsys.readouterr().out
    assert open_cache(records(), "training", 96, room_gb=0) is None
    assert capsys.readouterr().out == ""
    assert open_cache(records(), "training", 96, room_gb=1).count == 4
