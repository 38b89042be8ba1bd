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
