"""A public app under attack: a Space in its own process, with uploads and paths that are hostile.

Each is answered with a message, none with a file that is not public. Requests are plain HTTP,
because gradio's own client follows the rules.
"""

import io
import json
import random
import re
import shutil
import struct

import httpx
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from src.serving.gradcam import LAYERS, METHODS
from src.serving.guard import NOT_UPLOADED
from src.serving.predictor import Predictor
from tests.planted import blurred_noise
from tests.visitor import TIMEOUT_S, serving

SECRET = "8d1f-this-must-not-leave-the-server"
PRIVATE = (SECRET, "root:", "HERE = Path(__file__)", '"num_classes"', "Traceback", 'File "')
UNREADABLE = "This file can't be read as an image"
API = "gradio_api/"


def encoded(form: str, image=None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(blurred_noise(150, 90))).save(buffer, form, **options)
    return buffer.getvalue()


NOT_IMAGES = {
    "empty.png": b"",
    "html.jpg": b"<html><script>alert(1)</script>",
    "noise.jpg": random.Random(0).randbytes(50_000),
    "pickle.png": b"cos\nsystem\n(S'touch hostile'\ntR.",
    "program.exe": b"MZ" + bytes(500),
    "script.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "entity.svg": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
    "ghostscript.eps": encoded("EPS"),
    "ghostscript.jpg": encoded("EPS"),
    "old.pcx": encoded("PCX"),
    "head.jpg": b"\xff\xd8\xff\xe0",
    "head.webp": b"RIFF\0\0\0\0WEBPVP8 ",
    "video.mp4": b"\0\0\0\x18ftypmp42" + bytes(2000),
    "cut.jpg": encoded("JPEG")[:1000],
    "cut.png": encoded("PNG")[:1000],
    "claims.png": encoded("PNG").replace(
        struct.pack(">II", 150, 90), struct.pack(">II", 30000, 30000)
    ),
    "bomb.png": encoded("PNG", Image.new("1", (14_000, 14_000))),
    "bomb.tif": encoded("TIFF", Image.new("1", (14_000, 14_000)), compression="group4"),
}
UNUSUAL = {  # images nevertheless
    "long.png": encoded("PNG", Image.new("RGB", (20_000, 3))),
    "film.gif": encoded("GIF", save_all=True, append_images=[Image.new("L", (150, 90))] * 99),
    "script.html": encoded("GIF") + b"/*<script>alert(1)</script>*/",
}


@pytest.fixture(scope="module")
def folder(exported_space, tmp_path_factory):
    folder = shutil.copytree(exported_space, tmp_path_factory.mktemp("hostile") / "space")
    (folder / "secret.txt").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def client(folder):
    """An HTTP client of the running Space, which must survive all tests."""
    with serving(folder, SECRET=SECRET) as (address, process):
        with httpx.Client(base_url=address, timeout=TIMEOUT_S) as client:
            yield client
        assert process.poll() is None and not (folder / "hostile").exists()


def call(client: httpx.Client, route: str, body: dict) -> str:
    """Call a function of the app, and return the text of its answer."""
    headers = {"content-type": "application/json"}
    response = client.post(API + route, content=json.dumps(body), headers=headers)
    if response.status_code == 200:
        response = client.get(f"{API}call/detect/{response.json()['event_id']}")
    assert not any(private in response.text for private in PRIVATE)
    return response.text


def detect(client: httpx.Client, file, confidence=0.3, iou_threshold=0.5) -> str:
    return call(client, "call/detect", {"data": [file, confidence, iou_threshold]})


def call_page(client: httpx.Client, function: str, *data) -> str:
    """Call one of the page's functions, as a new visitor."""
    functions = client.get("config").json()["dependencies"]
    number = next(each["id"] for each in functions if each["api_name"] == function)
    session = {"session_hash": f"{random.random()}", "simple_format": True}
    return call(client, "queue/join", {"data": data, "fn_index": number, **session})


def file_data(path) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def detect_upload(client: httpx.Client, name: str, content: bytes, *thresholds) -> str:
    path = client.post(API + "upload", files={"files": (name, content)}).json()[0]
    return detect(client, file_data(path), *thresholds)


@pytest.mark.parametrize(("files", "text"), [(NOT_IMAGES, UNREADABLE), (UNUSUAL, '"width"')])
def test_files(files, text, client):
    for name, content in files.items():
        answer = detect_upload(client, name, content)
        assert text in answer, f"{name}: {answer}"


def test_files_that_nobody_uploaded_are_not_read(client, folder):
    """Paths and addresses, marked as gradio marks files and unmarked."""
    upload = get_upload_folder()
    paths = f"""
        /etc/passwd /proc/self/environ /dev/zero / . ~/.bashrc ../../../../../etc/passwd
        {folder}/app.py {folder}/secret.txt {folder}/weights/model.safetensors
        {folder}/samples/first.jpg app.py samples/first.jpg {upload}/../../etc/passwd
        file:///etc/passwd ftp://127.0.0.1/etc/passwd
        data:/etc/passwd http://127.0.0.1:1/a.png http://169.254.169.254/a.png
        http://example.com/a.png data:image/png;base64,iVBORw0KGgo=""".split()
    for path in ["", "a" * 5_000, *paths]:
        for answer in (
            detect(client, file_data(path)),
            detect(client, {"path": path}),
            call_page(client, "on_upload", file_data(path), 0.3, 0.5),
        ):
            assert NOT_UPLOADED in answer, f"{path}: {answer}"
    for path in (upload, f"{upload}/nothing.png"):
        assert UNREADABLE in detect(client, file_data(path))
    settings = (next(iter(LAYERS)), next(iter(METHODS)), 0.7, 0.3, 0.5)
    passwd = file_data("/etc/passwd")
    assert NOT_UPLOADED in call_page(client, "explain", None, passwd, *settings)
    for file in (None, 0, "/etc/passwd", [], ["x"], {}, {"path": 0}, {"url": "http://127.0.0.1/"}):
        assert NOT_UPLOADED in detect(client, file)
    for file in (
        file_data(f"{upload}/\0.png"),
        [passwd],
        {"a": passwd},
        passwd | {"is_stream": True},
    ):
        assert "event: error" in detect(client, file)


def test_thresholds_that_are_no_fractions_are_refused(client):
    image = encoded("PNG")
    for value in (
        float("nan"),
        1e300,
        10**400,
        -1,
        1.0001,
        None,
        "",
        "0.5",
        "x" * 99_999,
        [0.5],
        {"a": 1},
    ):
        for thresholds in ((value, 0.5), (0.3, value)):
            answer = detect_upload(client, "a.png", image, *thresholds)
            assert re.search("must be in 0..1|not supported between", answer), answer


def test_nothing_else_is_served(client, folder):
    """The server's files, the queue's bypass, gradio's statistics; a script only as a download."""
    paths = ("/etc/passwd", "/proc/self/environ", f"{folder}/secret.txt", f"{folder}/app.py")
    for path in (*paths, "app.py", "..%2f" * 12 + "etc/passwd"):
        for prefix in (f"{API}file=", f"{API}file/", f"{API}proxy=", "static/", "assets/"):
            response = client.get(prefix + path)
            assert 400 <= response.status_code < 500 and SECRET not in response.text
    assert client.get("monitoring").status_code in (403, 404)
    for route in ("run/detect", "api/detect", "run/on_upload"):
        response = client.post(API + route, json={"data": [file_data(paths[0]), 0.3, 0.5]})
        assert 400 <= response.status_code < 500
    path = client.post(API + "upload", files={"files": ("a.html", b"<script>")}).json()[0]
    disposition = client.get(f"{API}file={path}").headers["content-disposition"]
    assert disposition.startswith("attachment")


def test_it_still_answers(client, folder):
    """The last test: the detections are right after all attacks."""
    answer = detect_upload(client, "a.png", encoded("PNG"))
    expected = Predictor.load(folder / "weights", device="cpu")(blurred_noise(150, 90), 0.3, 0.5)
    boxes = [row["box"] for row in json.loads(answer.split("data: ")[1])[0]["detections"]]
    assert boxes and boxes == pytest.approx(expected.boxes.round(1), abs=0.06)
