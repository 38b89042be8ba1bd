"""The exported Space: complete, ready for free accounts, independent of the project, and never written over other files."""

import ast
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import httpx
import pytest
import yaml
from gradio_client import Client, handle_file
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file

from src.serving.images import load_image
from src.serving.predict import detections_to_dicts
from src.serving.predictor import Predictor
from src.serving.space import MARKER, export_space, push_space
from tests.planted import CLASSES, blurred_noise, planted_model
from tests.visitor import serving

ROOT = Path(__file__).parents[1]
# Run inside an exported folder: reports the files and modules that it opens, and the detections.
START = """
import json, os, sys
opened = set()
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened.add(os.path.realpath(arguments[0]))
sys.addaudithook(hook)
import app
from src.serving.predictor import Predictor
detections = Predictor.load("weights")("samples/01.jpg", 0.2)
json.dump([sorted(opened), sorted(sys.modules), detections.index.tolist()], open("report.json", "w"))
"""


@pytest.fixture(scope="module")
def model():
    return planted_model(metadata={"data": "nothing yet", "metrics": {"mAP50": 0.12345}})


@pytest.fixture
def folder(model, tmp_path):
    samples = [blurred_noise(96, 96), blurred_noise(150, 90)]
    return export_space(
        model,
        tmp_path / "space",
        samples,
        {"The code": "https://example.org/code"},
        hub_model="a/b",
    )


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_folder_contains_what_a_space_needs(folder, model):
    names = files(folder)
    assert {
        "app.py",
        "README.md",
        "requirements.txt",
        "weights/config.json",
        "weights/model.safetensors",
    } <= names
    assert {name for name in names if name.startswith("src/")} == {
        str(path.relative_to(ROOT))
        for path in [
            ROOT / "src/__init__.py",
            *ROOT.glob("src/model/*.*"),
            *ROOT.glob("src/serving/*.*"),
        ]
    }
    assert {name for name in names if name.startswith("samples/")} == {
        "samples/01.jpg",
        "samples/02.jpg",
    }
    assert not any(
        name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pyc")) for name in names
    )
    stored = load_file(folder / "weights" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()


def test_the_readme_header_is_valid(folder):
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_load(header)
    assert (
        header["sdk"] == "gradio"
        and header["sdk_version"] == version("gradio")
        and header["license"] == "mit"
    )
    assert (
        header["app_file"] == "app.py"
        and header["models"] == ["a/b"]
        and len(header["short_description"]) <= 60
    )
    assert header["python_version"] == "3.12"
    assert {header["colorFrom"], header["colorTo"]} <= {
        *["red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"]
    }
    assert "nothing yet" in text
    for link in ("https://example.org/code", "https://huggingface.co/a/b"):  # also in the app
        assert link in text and link in (folder / "app.py").read_text(encoding="utf-8")


def test_the_weights_have_a_card(folder):
    _, header, text = (
        (folder / "weights" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    )
    header = yaml.safe_load(header)
    assert header["license"] == "mit" and header["pipeline_tag"] == "object-detection"
    assert (
        "| data | nothing yet |\n| mAP50 | 0.123 |\n" in text
        and ", ".join(CLASSES) in text
        and "width 0.05" in text
    )


def test_titles_may_contain_any_character(model, tmp_path):
    title = 'It\'s "YOLO": {x} \\ é'
    folder = export_space(model, tmp_path / "space", title=title)
    assert (
        yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])[
            "title"
        ]
        == title
    )
    script = ast.parse((folder / "app.py").read_text(encoding="utf-8"))
    assert title in [node.value for node in ast.walk(script) if isinstance(node, ast.Constant)]


def test_a_predictors_model_is_exported_unfused(tmp_path):
    predictor = Predictor(planted_model(), device="cpu")
    predictor(blurred_noise(96, 96))
    folder = export_space(predictor.model, tmp_path / "space")
    assert (
        load_file(folder / "weights" / "model.safetensors").keys()
        == planted_model().state_dict().keys()
    )


def test_requirements_are_pinned_to_the_installed_versions_except_torch(folder):
    """ZeroGPU stops the build if torch is pinned to a version that it doesn't have."""
    lines = [
        line
        for line in (folder / "requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {*lines} - {f"{name}=={pin}" for name, pin in pins.items()} == {"torch", "torchvision"}
    assert {"gradio", "grad-cam", "opencv-python-headless", "safetensors"} <= pins.keys()
    assert all(version(name) == pin for name, pin in pins.items())
    assert not {"pytorch-lightning", "albumentations"} & pins.keys()


def test_an_older_export_is_replaced_as_a_whole(folder, model):
    (folder / "weights" / "stale.bin").write_text("old")
    (folder / "left.txt").write_text("old")
    export_space(model, folder, [Image.fromarray(blurred_noise())])
    assert not {"left.txt", "weights/stale.bin", "samples/02.jpg"} & files(folder)
    assert "samples/01.jpg" in files(folder) and [
        path.name for path in folder.parent.iterdir()
    ] == ["space"]


def test_other_folders_are_never_replaced(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("five years of work")
    with pytest.raises(FileExistsError, match="not made by export_space"):
        export_space(model, tmp_path)
    with pytest.raises(FileExistsError, match="not made by export_space"):
        export_space(model, tmp_path / "thesis.txt")
    assert files(tmp_path) == {"thesis.txt"}


def test_a_failed_export_keeps_the_older_one(folder, model, tmp_path):
    before = files(folder)
    (tmp_path / "bad.jpg").write_text("not an image")
    with pytest.raises(ValueError, match="bad.jpg"):
        export_space(model, folder, [tmp_path / "bad.jpg"])
    assert files(folder) == before and {path.name for path in tmp_path.iterdir()} == {
        "space",
        "bad.jpg",
    }


def test_an_empty_folder_is_used(model, tmp_path):
    (tmp_path / "space").mkdir()
    assert (export_space(model, tmp_path / "space") / MARKER).is_file()


def test_samples_are_upright_and_resized(model, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (2000, 1000)).save(tmp_path / "turned.jpg", exif=exif)
    folder = export_space(model, tmp_path / "space", [tmp_path / "turned.jpg"])
    assert load_image(folder / "samples" / "01.jpg").shape == (640, 320, 3)


def test_it_starts_from_its_own_files_only(folder, model):
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([sys.executable, "-c", START], cwd=folder, env=environment, check=True)
    opened, modules, index = json.loads((folder / "report.json").read_text())
    project = str(export_space.__code__.co_filename).removesuffix("src/serving/space.py")
    interpreter = (os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix))
    assert not [
        path for path in opened if path.startswith(project) and not path.startswith(interpreter)
    ]
    assert not {"pytorch_lightning", "lightning", "albumentations"} & {
        name.partition(".")[0] for name in modules
    }
    assert (
        index == Predictor(model, device="cpu")(folder / "samples" / "01.jpg", 0.2).index.tolist()
    )


def test_it_starts_on_zerogpu_and_predicts_on_the_cpu(folder, model):
    """Hugging Face's own package `spaces` reports the GPU function to its server, and makes torch claim a GPU."""
    reports = []

    class DeviceServer(BaseHTTPRequestHandler):
        def do_POST(self):
            reports.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), DeviceServer)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with (
        server,
        serving(folder, SPACES_ZERO_GPU="true", SPACES_ZERO_DEVICE_API_URL=address) as (space, _),
    ):
        answer = Client(space, verbose=False).predict(
            handle_file(folder / "samples" / "01.jpg"), 0.2, api_name="/detect"
        )
        server.shutdown()
    assert reports == ["/startup-report"]
    expected = Predictor(model, device="cpu")(folder / "samples" / "01.jpg", 0.2)
    assert answer["detections"] == detections_to_dicts(expected, model.classes)


def test_pushing_without_a_token_explains_what_to_do(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("src.serving.space.get_token", lambda: None)
    with pytest.raises(PermissionError, match="huggingface.co/settings/tokens"):
        push_space(folder, "someone/space")
    with pytest.raises(FileNotFoundError, match="export_space"):
        push_space(tmp_path, "someone/space", token="x")


def test_pushing_uploads_the_folder(folder, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, **options):
            calls.append(options)
            return f"https://huggingface.co/spaces/{name}"

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr("src.serving.space.HfApi", Hub)
    assert (
        push_space(folder, "someone/space", token="secret")
        == "https://huggingface.co/spaces/someone/space"
    )
    assert (
        calls[0] == "secret" and calls[1]["space_hardware"] == "zero-a10g" and calls[1]["exist_ok"]
    )
    assert calls[2]["folder_path"] == folder and calls[2]["repo_type"] == "space"


@pytest.mark.parametrize(
    "status, error", [(402, PermissionError), (403, PermissionError), (500, HfHubHTTPError)]
)
def test_a_refused_space_explains_what_to_do(folder, monkeypatch, status, error):
    response = httpx.Response(
        status, request=httpx.Request("POST", "https://huggingface.co/api/repos/create")
    )

    def create_repo(*_, **__):
        raise HfHubHTTPError("a PRO subscription is required", response=response)

    monkeypatch.setattr("src.serving.space.HfApi.create_repo", create_repo)
    with pytest.raises(
        error,
        match="(?s)PRO subscription is required" + ".*older than 30 days.*app.py" * (status < 500),
    ):
        push_space(folder, "someone/space", token="secret")
