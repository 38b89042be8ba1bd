"""A public app under attack: a Space in its own process, and the 600 cases of hostile.py."""

import json
import random
import re
import shutil
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from src.serving.predictor import Predictor
from src.serving.session import MAX_PIXELS
from tests.hostile import Client, all_cases, encoded
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
    malloc = {
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }  # returns freed memory to the system
    with serving(folder, SECRET=SECRET, **malloc) as (address, process):
        client = Client(address)
        warm(client)
        yield client, process


def resident(process) -> float:
    """Resident memory of the process in MB."""
    return (
        int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024
    )


def settled(process, limit: float) -> float:
    """Resident memory in MB after the server has finished its requests, at most 30 s later."""
    for _ in range(60):
        if resident(process) < limit:
            break
        time.sleep(0.5)
    return resident(process)


def warm(client: Client) -> None:
    """Send normal requests until memory stops growing.

    The maximum number of sessions, and the largest accepted image.
    """
    upload = client.upload("a.png", encoded("PNG"))
    largest = encoded("PNG", Image.new("1", (MAX_PIXELS // 5_000, 5_000)))
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        calls = [pool.submit(client.call_page, "on_upload", upload, 0.3, 0.5) for _ in range(64)]
    assert {call.result().kind for call in calls} == {"answered"}
    for _ in range(2):
        assert client.detect(client.upload("a.png", largest)).kind == "answered"


def test_attacks_are_refused(server, folder):
    client, process = server
    cases = all_cases(folder)
    assert len(cases) >= 600
    random.Random(2).shuffle(cases)
    before = resident(process)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(pool.map(lambda case: case.run(client), cases))
    wrong = [
        f"{case.method} {case.arguments!r:.99}: "
        f"{answer.kind}, {answer.seconds:.1f} s, {answer.text[:300]}"
        for case, answer in zip(cases, answers, strict=True)
        if answer.kind not in case.expected.split()
        or not re.search(case.pattern, answer.text)
        or any(text in answer.text for text in PRIVATE)
    ]
    print(
        len(cases),
        Counter(answer.kind for answer in answers),
        f"slowest {max(a.seconds for a in answers):.1f} s",
    )
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    assert process.poll() is None and not (folder / "hostile").exists()
    after = settled(process, before + MAX_GROWTH_MB)
    print(f"{before:.0f} MB before, {after:.0f} MB after")
    assert after < before + MAX_GROWTH_MB
    answer = client.detect(client.upload("a.png", encoded("PNG")), 0.3, 0.5)
    expected = Predictor.load(folder / "weights", device="cpu")(blurred_noise(150, 90), 0.3, 0.5)
    response = json.loads(answer.text.split("data: ")[1])[0]["detections"]
    assert len(response) and [row["box"] for row in response] == pytest.approx(
        expected.boxes.round(1), abs=0.06
    )


def test_uploaded_files_are_served_as_downloads(server):
    """A file with a script is offered as a download, and not opened under the app's address."""
    for name in ("a.html", "a.svg", "a.xhtml", "a.js"):
        path = server[0].upload(name, b"<script>alert(1)</script>")["path"]
        response = server[0].request("GET", b"/gradio_api/file=" + path.encode())
        assert response.headers["content-disposition"].startswith("attachment")
        assert response.headers["content-type"] == "application/octet-stream"


def test_slow_clients_do_not_block_the_page(server):
    """Thirty clients upload slowly and thirty never read their answer; others don't wait."""
    client, _ = server
    host, port = client.address.hostname, client.address.port
    head = (
        f"HTTP/1.1\r\nHost: {host}\r\nContent-Length: 999999\r\n"
        "Content-Type: multipart/form-data; boundary=x"
    )
    slow = [socket.create_connection((host, port)) for _ in range(60)]
    try:
        for number, connection in enumerate(slow):
            upload, page = (
                f"POST /gradio_api/upload {head}\r\n\r\n--x\r\n",
                f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
            )
            connection.sendall((upload if number % 2 else page).encode())
        start = time.monotonic()
        assert client.request("GET", b"/").status_code == 200
        assert client.detect(client.upload("a.png", encoded("PNG"))).kind == "answered"
        print(f"{time.monotonic() - start:.2f} s with 60 slow clients")
        for connection in slow[1::2]:
            connection.sendall(b"-")  # still connected
    finally:
        for connection in slow:
            connection.close()
