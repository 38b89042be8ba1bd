"""A public app under attack: a Space in its own process, and the cases of hostile.py."""

import json
import random
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from src.serving.predictor import Predictor
from src.serving.session import MAX_PIXELS
from tests.hostile import Client, all_cases, encoded, file_data
from tests.planted import blurred_noise
from tests.visitor import serving

SECRET = "8d1f-this-must-not-leave-the-server"
PRIVATE = (
    SECRET,
    "root:",
    "HERE = Path(__file__)",
    "class Predictor",
    '"num_classes"',
    "Traceback",
    'File "',
)
CONCURRENCY = 8
MAX_GROWTH_MB = 64  # of the server's memory; one image of 50 million pixels alone takes 150


@pytest.fixture(scope="module")
def folder(exported_space, tmp_path_factory):
    folder = shutil.copytree(exported_space, tmp_path_factory.mktemp("hostile") / "space")
    (folder / "secret.txt").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """A client of the running Space, and the Space's process, after normal requests.

    Its memory has stopped growing: after the maximum number of sessions and the largest image.
    """
    malloc = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # returns freed memory
    largest = encoded("PNG", Image.new("1", (MAX_PIXELS // 5_000, 5_000)))
    with serving(folder, SECRET=SECRET, **malloc) as (address, process):
        client = Client(address)
        file = file_data(client.upload("a.png", encoded("PNG")).json()[0])
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            calls = [pool.submit(client.call_page, "on_upload", file, 0.3, 0.5) for _ in range(64)]
        kinds = {call.result()[0] for call in calls}
        kinds |= {client.detect_upload("a.png", largest)[0] for _ in range(2)}
        assert kinds == {"answered"}
        yield client, process


def resident(process) -> float:
    """Resident memory of the process in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def test_attacks_are_refused(server, folder):
    client, process = server
    cases = all_cases(folder)
    assert len(cases) >= 550
    random.Random(2).shuffle(cases)
    limit = resident(process) + MAX_GROWTH_MB
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(pool.map(lambda case: getattr(client, case[2])(*case[3]), cases))
    wrong = [
        f"{case[2]} {case[3]!r:.99}: {kind}, {text[:300]}"
        for case, (kind, text) in zip(cases, answers, strict=True)
        if kind not in case[0].split()
        or not re.search(case[1], text)
        or any(private in text for private in PRIVATE)
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    assert process.poll() is None and not (folder / "hostile").exists()
    end = time.monotonic() + 30  # for the requests that it still works on
    while resident(process) > limit and time.monotonic() < end:
        time.sleep(0.5)
    assert resident(process) < limit
    _, answer = client.detect_upload("a.png", encoded("PNG"), 0.3, 0.5)
    expected = Predictor.load(folder / "weights", device="cpu")(blurred_noise(150, 90), 0.3, 0.5)
    boxes = [row["box"] for row in json.loads(answer.split("data: ")[1])[0]["detections"]]
    assert boxes and boxes == pytest.approx(expected.boxes.round(1), abs=0.06)


def test_uploaded_files_are_served_as_downloads(server):
    """A file with a script is offered as a download, and not opened under the app's address."""
    for name in ("a.html", "a.svg", "a.xhtml", "a.js"):
        path = server[0].upload(name, b"<script>alert(1)</script>").json()[0]
        response = server[0].request("GET", b"/gradio_api/file=" + path.encode())
        assert response.headers["content-disposition"].startswith("attachment")
        assert response.headers["content-type"] == "application/octet-stream"


def test_slow_clients_do_not_block_the_page(server):
    """Thirty clients upload slowly and thirty never read their answer; others don't wait."""
    client, _ = server
    host, port = client.address.hostname, client.address.port
    upload = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: 999999\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    page = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"
    with ExitStack() as slow:
        for number in range(60):
            connection = slow.enter_context(socket.create_connection((host, port)))
            connection.sendall((upload if number % 2 else page).encode())
        assert client.request("GET", b"/").status_code == 200
        assert client.detect_upload("a.png", encoded("PNG"))[0] == "answered"
        connection.sendall(b"-")  # still connected
