"""Settings: validated, saved, loaded."""

import pytest

from src.config import DATA_ROOT, PRESETS, Config
from src.model.network import ANCHORS, YOLOv3
from tests.test_rooms import ROOT


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 100}, "image size 100 is not a positive multiple of 32"),
        ({"multiscale_sizes": (256, 300)}, "image size 300"),
        ({"dataset": "imagenet"}, "Config.dataset is 'imagenet'"),
        ({"classes": ("a", "a")}, "Config.classes"),
        ({"classes": "mask"}, r"Config.classes is 'mask'. Use a tuple"),
        ({"train_splits": "2012/train"}, "Config.train_splits is '2012/train'. Use a tuple"),
        ({"mosaic_prob": 75}, "Config.mosaic_prob is 75. Use 0 to 1"),
        ({"epochs": 0}, "Config.epochs is 0"),
    ],
)
def test_invalid_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Config(**setting)


def test_lists_and_ranges_become_what_is_saved(tmp_path):
    """Paths are saved as text."""
    config = Config(train_splits=["2012/val"], multiscale_sizes=range(64, 129, 32))
    assert config.train_splits == ("2012/val",) and config.multiscale_sizes == (64, 96, 128)
    assert config.replace(anchors=[list(map(list, scale)) for scale in ANCHORS]) == config
    path = tmp_path / "new" / "config.json"
    config.replace(run_dir=path.parent).save(path)
    assert Config.load(path) == config.replace(run_dir=str(path.parent))


def test_data_root_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("VOC_ROOT", "/somewhere")
    assert Config().data_root == "/somewhere"


def test_a_preset_repeats_the_training_of_the_shipped_weights():
    settings = Config.load(ROOT / "weights/run.json")
    assert settings == PRESETS["photographs"].replace(data_root=DATA_ROOT)
    assert settings.pretrained_weights == "weights/backbone"
    samples = settings.epochs * 8090  # photographs of the training splits at hand
    assert samples <= 662_040  # 40 epochs of VOC 07+12 trainval
    shipped = YOLOv3.from_pretrained(ROOT / "weights")
    for config in (settings, PRESETS["small"], PRESETS["shapes"]):
        assert config.width == shipped.width
    assert (settings.image_size, settings.classes) == (shipped.image_size, tuple(shipped.classes))
