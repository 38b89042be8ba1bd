"""The open app: an exported Space in a process of its own, and the more than 600 attempts of hostile.py."""

import json
import random
import re
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from src.serving.app import MAX_PIXELS
from src.serving.predictor import Predictor
from src.serving.space import export_space
from tests.hostile import Door, all_cases, encoded
from tests.planted import blurred_noise, planted_model
from tests.visitor import serving

SECRET = "8d1f-this-must-not-leave-the-server"
PRIVATE = (SECRET, "root:", "HERE = Path(__file__)", "class Predictor", '"num_classes"', "Traceback", 'File "')
AT_ONCE = 8
MORE_MEMORY = 64  # MB the server may hold more after all of it; one picture of 50 million pixels alone takes 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = export_space(planted_model(), tmp_path_factory.mktemp("hostile") / "space", [blurred_noise(96, 96)])
    (folder / "secret.txt").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    giving_back = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # freed memory, to the system
    with serving(folder, SECRET=SECRET, **giving_back) as (address, process):
        yield Door(address), process


def resident(process) -> float:
    """MB the process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def settled(process, below: float) -> float:
    """MB the process holds, once it is through with what those who hung up had asked for: at most 30 s later."""
    for _ in range(60):
        if resident(process) < below:
            break
        time.sleep(0.5)
    return resident(process)


def warm(door: Door) -> None:
    """Normal visitors until nothing grows: as many sessions as are kept, and the largest picture that is taken."""
    picture, largest = encoded("PNG"), encoded("PNG", Image.new("1", (MAX_PIXELS // 5_000, 5_000)))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        send = lambda n: door.page("on_upload", door.upload("a.png", picture), 0.3, 0.5)  # noqa: E731
        assert {answer.kind for answer in pool.map(send, range(64))} == {"answered"}
    for _ in range(2):
        assert door.detect(door.upload("a.png", largest)).kind == "answered"


def test_a_public_address(server, folder):
    door, process = server
    cases = all_cases(folder)
    assert len(cases) >= 300
    random.Random(2).shuffle(cases)
    warm(door)
    before = resident(process)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda case: case.send(door), cases))
    wrong = [
        f"{case.name}: {answer.kind}, {answer.seconds:.1f} s, {answer.text[:300]}"
        for case, answer in zip(cases, answers, strict=True)
        if answer.kind not in case.expected.split() or not re.search(case.says, answer.text)
        or any(text in answer.text for text in PRIVATE)
    ]  # fmt: skip
    print(len(cases), Counter(answer.kind for answer in answers), f"slowest {max(a.seconds for a in answers):.1f} s")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    assert process.poll() is None and not (folder / "hostile").exists()
    after = settled(process, before + MORE_MEMORY)
    print(f"{before:.0f} MB before, {after:.0f} MB after")
    assert after < before + MORE_MEMORY
    answer = door.detect(door.upload("a.png", encoded("PNG")), 0.3, 0.5)
    found = Predictor.load(folder / "weights", device="cpu")(blurred_noise(150, 90), 0.3, 0.5)
    told = json.loads(answer.text.split("data: ")[1])[0]["detections"]
    assert len(told) and [row["box"] for row in told] == pytest.approx(found.boxes.round(1), abs=0.06)


def test_what_was_uploaded_is_not_shown_as_a_page(server):
    """A file that holds a script comes back to be saved, not opened under the app's address."""
    for name in ("a.html", "a.svg", "a.xhtml", "a.js"):
        path = server[0].upload(name, b"<script>alert(1)</script>")["path"]
        response = server[0].request("GET", b"/gradio_api/file=" + path.encode())
        assert response.headers["content-disposition"].startswith("attachment")
        assert response.headers["content-type"] == "application/octet-stream"


def test_slow_visitors_do_not_block_the_page(server):
    """Thirty who upload a byte a while and thirty who never read their answer; others are served meanwhile."""
    door, _ = server
    host, port = door.address.hostname, door.address.port
    head = f"HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 999999"
    slow = [socket.create_connection((host, port)) for _ in range(60)]
    try:
        for number, connection in enumerate(slow):
            upload, page = f"POST /gradio_api/upload {head}\r\n\r\n--x\r\n", f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"
            connection.sendall((upload if number % 2 else page).encode())
        start = time.monotonic()
        assert door.request("GET", b"/").status_code == 200
        assert door.detect(door.upload("a.png", encoded("PNG"))).kind == "answered"
        print(f"{time.monotonic() - start:.2f} s beside 60 slow visitors")
        for connection in slow[1::2]:
            connection.sendall(b"-")  # they are still there
    finally:
        for connection in slow:
            connection.close()
