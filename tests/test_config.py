"""Settings: validated, saved, loaded."""

import pytest

from src.config import REPOSITORY, VOC_CLASSES, Config
from src.model.network import ANCHORS


def test_unknown_settings_and_broken_files_are_named(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (
        ('{"widht": 1}', r"config\.json: unknown settings \['widht'\]"),
        ('{"width": ', r"config\.json is not a JSON file of settings"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Config.load(path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 100}, "image size 100 is not a positive multiple of 32"),
        ({"multiscale_sizes": (256, 300)}, "image size 300"),
        ({"dataset": "imagenet"}, "Config.dataset is 'imagenet'"),
        ({"classes": ("a", "a")}, "Config.classes"),
        ({"mosaic_prob": 1.5}, "Config.mosaic_prob is 1.5"),
        ({"epochs": 0}, "Config.epochs is 0"),
    ],
)
def test_invalid_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Config(**setting)


def test_lists_paths_and_single_strings_become_what_is_saved(tmp_path):
    """("mask") without its comma is a string; it would be read as four classes."""
    config = Config(
        classes="mask",
        train_splits=["2012/*"],
        multiscale_sizes=range(64, 129, 32),
        run_dir=tmp_path / "run",
    )
    assert config.classes == ("mask",) and config.train_splits == ("2012/*",)
    assert config.multiscale_sizes == (64, 96, 128)
    assert config.replace(anchors=[list(map(list, scale)) for scale in ANCHORS]) == config
    config.save(tmp_path / "new" / "config.json")
    assert Config.load(tmp_path / "new" / "config.json") == config


def test_data_root_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("VOC_ROOT", "/somewhere")
    assert Config().data_root == "/somewhere"


def test_voc_classes_and_anchors():
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)
    areas = [[w * h for w, h in scale] for scale in ANCHORS]
    assert min(areas[0]) > max(areas[1]) > min(areas[1]) > max(areas[2])


def test_pretrained_weights_of_the_current_folder_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(pretrained_weights="weights/backbone")
    assert config.pretrained_path == str(REPOSITORY / "weights/backbone")
    (tmp_path / "weights/backbone").mkdir(parents=True)
    assert config.pretrained_path == "weights/backbone" and Config().pretrained_path == ""
