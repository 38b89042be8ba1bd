"""What several test files share; nothing here is written to by a test."""

from pathlib import Path

import pytest
from PIL import Image

from src.serving.space import export_space
from tests.planted import blurred_noise, planted_model

LICENSES = """\
Images of noise.

first.jpg  96x96
  author: Ada <Lovelace>
  licence: CC-BY-4.0
  source: https://example.org/first

second.jpg  192x192
  author: Charles Babbage
  licence: Public Domain
  source: (none named)
"""


@pytest.fixture(scope="session")
def sample_files(tmp_path_factory) -> list[Path]:
    """Two JPEG files with a LICENSES.txt beside them."""
    folder = tmp_path_factory.mktemp("samples")
    for seed, (name, size) in enumerate({"first.jpg": 96, "second.jpg": 192}.items()):
        Image.fromarray(blurred_noise(size, size, seed)).save(folder / name)
    (folder / "LICENSES.txt").write_text(LICENSES)
    return [folder / "first.jpg", folder / "second.jpg"]


@pytest.fixture(scope="session")
def exported_space(tmp_path_factory, sample_files) -> Path:
    """A Gradio Space of the planted model with two files and an array as samples."""
    model = planted_model(metadata={"data": "nothing yet", "metrics": {"mAP50": 0.12345}})
    return export_space(
        model,
        tmp_path_factory.mktemp("exported") / "space",
        [*sample_files, blurred_noise(150, 90)],
        {"Code": "https://example.org/code"},
        hub_model="a/b",
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple:
    """The folder and the detector of a finished run. The path has a space and other letters."""
    from src.training.fit import fit  # seconds, which other tests need not wait for
    from tests.runs import tiny

    folder = tmp_path_factory.mktemp("runs") / "Lauf é 猫"
    return folder, fit(tiny(folder))


@pytest.fixture(scope="session")
def trained_run(trained) -> Path:
    """The folder of a finished run; copy it before you change anything in it."""
    return trained[0]
