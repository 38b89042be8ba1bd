"""Settings: checked, written, read back."""

import dataclasses

import pytest

from src.config import VOC_CLASSES, Config
from src.model.network import ANCHORS


def test_a_run_can_be_started_again_from_its_settings(tmp_path):
    config = Config(dataset="shapes", classes=("a", "b"), multiscale_sizes=(256, 288), width=0.25, max_lr=0.003)
    config.save(tmp_path / "run" / "config.json")
    assert Config.load(tmp_path / "run" / "config.json") == config


def test_unknown_settings_and_broken_files_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"widht": 1}')
    with pytest.raises(ValueError, match=r"config\.json: unknown settings \['widht'\]"):
        Config.load(path)
    path.write_text('{"width": ')
    with pytest.raises(ValueError, match=r"config\.json is not a JSON file of settings"):
        Config.load(path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 100}, "side 100 is not a positive multiple of 32. Use e.g. 96"),
        ({"multiscale_sizes": (256, 300)}, "side 300"),
        ({"dataset": "coco"}, "Config.dataset is 'coco'"),
        ({"classes": ("a", "a")}, "Config.classes"),
        ({"mosaic_prob": 1.5}, "Config.mosaic_prob is 1.5"),
        ({"epochs": 0}, "Config.epochs is 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(setting, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Config(**setting)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().width = 2


def test_voc_root_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("VOC_ROOT", "/somewhere")
    assert Config().voc_root == "/somewhere"


def test_the_papers_classes_and_anchors():
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)
    areas = [[w * h for w, h in scale] for scale in ANCHORS]
    assert min(areas[0]) > max(areas[1]) > min(areas[1]) > max(areas[2])
