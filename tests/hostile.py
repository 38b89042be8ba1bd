"""Attacks on a public app: files, paths, numbers and requests, each with the kinds of answer that are allowed."""

import io
import itertools
import json
import random
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from gradio.utils import get_upload_folder
from PIL import Image

from src.serving.gradcam import LAYERS, METHODS
from src.serving.guard import MAX_REQUEST_BYTES, NOT_UPLOADED
from src.serving.session import MAX_PIXELS
from tests.planted import blurred_noise
from tests.visitor import TIMEOUT_S

DEFAULTS = (next(iter(LAYERS)), next(iter(METHODS)))


@dataclass(frozen=True)
class Answer:
    """kind: answered; error (with a message of the app); refused (4xx); silent (an error event or a 500 without a
    message); hung."""

    kind: str
    text: str
    seconds: float


@dataclass(frozen=True)
class Case:
    name: str
    send: Callable[["Client"], Answer]
    expected: str  # allowed kinds, separated by spaces
    pattern: str = ""  # that the answer has to match


class Client:
    """A client that follows no rules: bytes over HTTP, and a new connection per request."""

    def __init__(self, address: str):
        self.address = urlsplit(address)
        self.http = httpx.Client(
            timeout=TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self.session_numbers = itertools.count()
        config = self.request("GET", b"/config").json()
        self.functions = {
            function["api_name"]: function["id"] for function in config["dependencies"]
        }

    def request(self, method: str, path: bytes, **options) -> httpx.Response:
        """path: sent unchanged, with its dots."""
        url = httpx.URL(
            scheme="http", host=self.address.hostname, port=self.address.port, raw_path=path
        )
        return self.http.request(method, url, **options)

    def send(self, method: str, path: bytes, **options) -> Answer:
        start = time.monotonic()
        return self.judge(self.request(method, path, **options), start)

    def judge(self, response: httpx.Response, start: float) -> Answer:
        status, text = response.status_code, response.text
        silent = status == 500 and text == "Internal Server Error"
        kind = (
            "silent"
            if silent
            else "refused"
            if 400 <= status < 500
            else "answered"
            if status < 400
            else "broken"
        )
        return Answer(kind, f"{text}\n{response.headers}", time.monotonic() - start)

    def upload(self, name: str, content: bytes) -> dict:
        """Upload a file. Returns what the page sends for it."""
        response = self.request("POST", b"/gradio_api/upload", files={"files": (name, content)})
        assert response.status_code == 200, response.text
        return file_data(response.json()[0])

    def upload_as(self, name: str, content: bytes) -> Answer:
        """Upload a file with a name that gradio may refuse; if it doesn't, run /detect on the file."""
        start = time.monotonic()
        response = self.request("POST", b"/gradio_api/upload", files={"files": (name, content)})
        if response.status_code != 200:
            return self.judge(response, start)
        assert Path(response.json()[0]).parent.parent == Path(get_upload_folder())
        return self.detect(file_data(response.json()[0]))

    def detect(self, file, confidence=0.3, iou_threshold=0.5) -> Answer:
        return self.call(b"/gradio_api/call/detect", {"data": [file, confidence, iou_threshold]})

    def call_page(self, function: str, *data, session: str = "") -> Answer:
        """Call one of the page's functions in a new session."""
        session = f"{session} {next(self.session_numbers)}"
        body = {
            "data": data,
            "fn_index": self.functions[function],
            "session_hash": session,
            "simple_format": True,
        }
        return self.call(b"/gradio_api/queue/join", body)

    def call(self, path: bytes, body) -> Answer:
        start = time.monotonic()
        content = body if isinstance(body, bytes) else json.dumps(body)
        response = self.request(
            "POST", path, content=content, headers={"content-type": "application/json"}
        )
        if response.status_code != 200:
            return self.judge(response, start)
        event = response.json()["event_id"]
        text = ""
        with self.http.stream(
            "GET", f"http://{self.address.netloc}/gradio_api/call/detect/{event}"
        ) as lines:
            for line in lines.iter_lines():  # gradio's heartbeats keep a lost request open for ever
                text = (text + line + "\n").removesuffix("event: heartbeat\ndata: null\n\n")
                if text.endswith("\n\n") or time.monotonic() > start + TIMEOUT_S:
                    break
        silent = '"error": null' in text or "data: null" in text
        failure = "silent" if silent else "error" if "error" in text else "hung"
        kind = "answered" if "event: complete" in text else failure
        return Answer(kind, text, time.monotonic() - start)


def file_data(path) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def encoded(form: str, image=None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(blurred_noise(150, 90))).save(buffer, form, **options)
    return buffer.getvalue()


def uploads(expected: str, pattern: str, files: dict[str, bytes]) -> list[Case]:
    def send(name, content):
        return lambda client: client.detect(client.upload(name, content))

    return [
        Case(f"file {name[:60]}", send(name, content), expected, pattern)
        for name, content in files.items()
    ]


def not_images() -> list[Case]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", encoded("PNG"))
    svg = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">%s</svg>'
    entity = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    files = {
        "empty.png": b"",
        "text.png": b"not an image",
        "html.jpg": b"<html><script>alert(1)</script>",
        "archive.png": archive.getvalue(),
        "noise.jpg": random.Random(0).randbytes(50_000),
        "pickle.png": b"cos\nsystem\n(S'touch hostile'\ntR.",
        "pickle.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}",
        "zeros.gif": bytes(100_000),
        "page.pdf": b"%PDF-1.7\n",
        "program.exe": b"MZ" + bytes(500),
        "script.svg": (svg % "<script>alert(1)</script>").encode(),
        "entity.svg": (entity + svg % "&x;").encode(),
        "address.svg": (svg % '<image xlink:href="http://127.0.0.1:1/"/>').encode(),
        "ghostscript.eps": encoded("EPS"),
        "ghostscript.jpg": encoded("EPS"),
        "old.pcx": encoded("PCX"),
        "icon.icns": encoded("ICNS"),
        "head.png": b"\x89PNG\r\n\x1a\n",
        "head.jpg": b"\xff\xd8\xff\xe0",
        "video.mp4": b"\0\0\0\x18ftypmp42" + bytes(2000),
        "head.gif": b"GIF89a",
        "head.webp": b"RIFF\0\0\0\0WEBPVP8 ",
    }
    return uploads("error", "This file can't be read as an image", files)


def damaged_images() -> list[Case]:
    """Truncated images, and images with 1 to 16 bits flipped."""
    generator, files = random.Random(1), {}
    for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encoded(form)
        for number in range(5):
            files[f"truncated{number}.{form}"] = whole[: generator.randrange(len(whole) - 20)]
            flipped = bytearray(whole)
            for _ in range(4**number if number < 3 else 1):
                flipped[generator.randrange(len(whole) if number < 3 else 60)] ^= (
                    1 << generator.randrange(8)
                )
            files[f"flipped{number}.{form}"] = bytes(flipped)
    return uploads("error answered", "can't be read as an image|detections", files)


def large_images() -> list[Case]:
    claims = bytearray(encoded("PNG"))
    claims[16:24] = (30_000).to_bytes(4, "big") * 2
    frames = [Image.new("L", (64, 64), shade) for shade in range(256)]
    bombs = {
        "claims.png": bytes(claims),
        "bomb.png": encoded("PNG", Image.new("1", (30_000, 30_000))),
        "bomb.gif": encoded("GIF", Image.new("L", (9_000, 9_000))),
        "bomb.jpg": encoded("JPEG", Image.new("L", (8_000, 8_000))),
        "bomb.tif": encoded("TIFF", Image.new("1", (30_000, 30_000)), compression="group4"),
    }
    fine = {
        "long.png": encoded("PNG", Image.new("RGB", (20_000, 3))),
        "tall.gif": encoded("GIF", Image.new("L", (3, 20_000))),
        "film.gif": encoded("GIF", frames[0], save_all=True, append_images=frames[1:]),
        "film.webp": encoded("WEBP", frames[0], save_all=True, append_images=frames[1:20]),
        "most.png": encoded("PNG", Image.new("1", (MAX_PIXELS // 5_000, 5_000))),
    }
    return uploads("error", "million|decompression bomb|can't be read", bombs) + uploads(
        "answered", '"width"', fine
    )


def polyglots_and_names() -> list[Case]:
    archive = io.BytesIO(encoded("JPEG"))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("run.py", "print(1)")
    script = encoded("GIF") + b"/*<script>alert(1)</script>*/"
    files = {
        "zip.jpg": archive.getvalue(),
        "script.gif": script,
        "script.html": script,
        "jpeg.png": encoded("JPEG"),
    }
    names = [
        "../../etc/passwd",
        "..\\..\\win.ini",
        "/etc/passwd",
        "a" * 5_000 + ".png",
        "",
        " ",
        ".",
        "..",
        "...",
        "a\0b.png",
        "日本語.png",
        "🙂.png",
        "\u202egnp.exe",
        "a'b\"c.png",
        "a;b|c&d.png",
        "$(id).png",
        "%2e%2e%2f.png",
        "CON",
        "a\r\nb.png",
        ".gradio",
        "-rf",
        "{x}.png",
        "<b>.png",
        "a.png/",
    ]
    image_bytes = encoded("PNG")

    def send(name):
        return lambda client: client.upload_as(name, image_bytes)

    odd = [Case(f"name {name[:60]!r}", send(name), "answered refused silent") for name in names]
    return uploads("answered", '"width": 150', files) + odd


def forged_paths(folder: Path) -> list[Case]:
    """Files and URLs that nobody uploaded, marked as gradio marks files and unmarked, for all functions that take one."""
    upload = get_upload_folder()
    paths = [
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/maps",
        "/dev/zero",
        "/dev/stdin",
        "/",
        "",
        ".",
        "~/.bashrc",
        *(
            str(folder / name)
            for name in (
                "app.py",
                "secret.txt",
                "src/serving/app.py",
                "weights/model.safetensors",
                "weights/config.json",
                "samples/first.jpg",
            )
        ),
        "app.py",
        "samples/first.jpg",
        "./samples/first.jpg",
        "../../../../../etc/passwd",
        f"{upload}/../../etc/passwd",
        f"{upload}/nothing.png",
        upload,
        f"{upload}/\0.png",
        "a" * 5_000,
        "\ud800",
        *(
            scheme + "/etc/passwd"
            for scheme in ("file://", "file:", "ftp://127.0.0.1", "data:", "gopher://[::1]:1")
        ),
        *(
            f"http://{host}/a.png"
            for host in (
                "127.0.0.1:1",
                "localhost:1",
                "0.0.0.0:1",
                "[::1]:1",
                "169.254.169.254",
                "10.0.0.1",
                "2130706433:1",
                "[::ffff:127.0.0.1]:1",
                "example.com",
            )
        ),
        "https://127.0.0.1:1/a.png",
        "HTTP://127.0.0.1:1/a.png",
        "data:image/png;base64,iVBORw0KGgo=",
    ]
    cases, pattern = [], re.escape(NOT_UPLOADED)
    for path in paths:
        for file in (file_data(path), {"path": path}):
            name = f"{'un' * ('meta' not in file)}marked {path[:50]!r}"
            cases.append(
                Case(f"detect {name}", lambda client, f=file: client.detect(f), "error", pattern)
            )
        send = lambda client, p=path: client.call_page("on_upload", file_data(p), 0.3, 0.5)  # noqa: E731
        cases.append(Case(f"on_upload {name}", send, "error", pattern))
    odd = [
        {**file_data("/etc/passwd"), "is_stream": True},
        {**file_data("x"), "url": "http://127.0.0.1:1/"},
        [file_data("/etc/passwd")],
        {"a": file_data("/etc/passwd")},
        {**file_data("/etc/passwd"), "meta": "gradio.FileData"},
    ]
    cases += [
        Case(f"file {file}", lambda client, f=file: client.detect(f), "error silent")
        for file in odd
    ]
    send = lambda client: client.call_page(
        "on_threshold_change", None, "all", file_data("/etc/passwd"), 1
    )
    cases.append(Case("slider", send, "error", pattern))
    return cases


def invalid_values() -> list[Case]:
    image_bytes = encoded("PNG")
    numbers = [
        float("nan"),
        float("inf"),
        -float("inf"),
        1e300,
        -1e300,
        10**400,
        -1,
        1.0001,
        2,
        None,
        "",
        "0.5",
        "nan",
        "x" * 99_999,
        [],
        [0.5],
        {},
        {"a": 1},
        {"path": 1},
        "__import__('os').system('id')",
        "{{7*7}}",
    ]
    files = [
        None,
        1,
        0,
        True,
        "",
        "x",
        "/etc/passwd",
        [],
        ["x"],
        {},
        {"path": None},
        {"path": 0},
        {"path": ["x"]},
        {"url": "http://127.0.0.1:1/"},
        {"meta": {"_type": "gradio.FileData"}},
        {"name": "/x"},
    ]

    def with_thresholds(*rest):
        return lambda client: client.detect(client.upload("a.png", image_bytes), *rest)

    def without_image(function, *data):
        return lambda client: client.call_page(function, None, *data)

    pattern = re.escape(NOT_UPLOADED)
    cases = [
        Case(f"image {file!r}", lambda client, f=file: client.detect(f), "error", pattern)
        for file in files
    ]
    for number in numbers:
        name = repr(number)[:40]
        cases.append(
            Case(
                f"confidence {name}",
                with_thresholds(number, 0.5),
                "error",
                "confidence must be a number",
            )
        )
        cases.append(
            Case(
                f"iou_threshold {name}",
                with_thresholds(0.3, number),
                "error",
                "iou_threshold must be a number",
            )
        )
    for number in (
        float("nan"),
        -float("inf"),
        10**400,
        -1,
        "x",
        [0.5],
        {"a": 1},
        "__import__('os').system('id')",
    ):
        name = repr(number)[:40]
        any_of = (
            "error silent answered"  # a session without an image: no action, or an error of gradio
        )
        cases.append(
            Case(
                f"on_threshold_change {name}",
                without_image("on_threshold_change", "all", number, 0.5),
                any_of,
            )
        )
        cases.append(
            Case(
                f"row {name}",
                without_image("explain", number, *DEFAULTS, 0.7, 0.3, 0.5),
                any_of,
            )
        )
        cases.append(
            Case(
                f"layer {name}",
                without_image("explain", "all", number, DEFAULTS[1], 0.7, 0.3, 0.5),
                any_of,
            )
        )
        cases.append(
            Case(
                f"on_upload {name}",
                lambda client, n=number: client.call_page("on_upload", None, n, n),
                "answered",
            )
        )
        cases.append(
            Case(
                f"example {name}",
                lambda client, n=number: client.call_page("load_example", n),
                any_of,
            )
        )
    return cases


def invalid_requests() -> list[Case]:
    """Violations of the protocol. Gradio answers unknown names with a 500 without a message."""

    def post(path, content, kinds, pattern=""):
        return Case(
            f"{path.decode()} {content[:50]!r}",
            lambda client: client.call(path, content),
            kinds,
            pattern,
        )

    api, cases = b"/gradio_api/", []
    bodies = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        b'{"data": 1}',
        b'{"data": null}',
        b'{"data": {}}',
        b"[" * 100_000,
        b'{"data": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"data": "' + b"x" * 1_000 + b'"}',
    ]
    for path in (b"call/detect", b"queue/join", b"run/detect", b"api/detect"):
        cases += [post(api + path, body, "refused") for body in bodies]
        huge = [
            b'{"data": [' + b"[]," * 5_000_000 + b"[]]}",
            b'{"data": ["' + b"x" * 10_000_000 + b'"]}',
        ]
        cases += [post(api + path, body, "refused", "larger than 0.25 MB") for body in huge]
    for data in (
        b"[]",
        b"[1, 2, 3, 4]",
        b"[" * 300 + b"]" * 300,
        b'["' + b"x" * (MAX_REQUEST_BYTES - 50) + b'"]',
    ):
        cases.append(post(api + b"call/detect", b'{"data": %s}' % data, "error silent"))
    for name in (
        b"nothing",
        b"..%2f..",
        b"__class__",
        b"on_upload/",
        b"%00",
        b"a" * 3_000,
        b"detect;id",
        b"predict",
    ):
        cases += [
            post(api + route + name, b'{"data": []}', "refused silent")
            for route in (b"call/", b"call/v2/", b"run/")
        ]
    for index in (b"-1", b"99", b"1e9", b'"x"', b"null", b"99999999999999999999", b"[1]"):
        body = b'{"data": [], "session_hash": "a", "fn_index": %s}' % index
        cases.append(post(api + b"queue/join", body, "refused silent"))
    body = json.dumps({"data": [file_data("/etc/passwd"), 0.3, 0.5]}).encode()
    bypassing_the_queue = b"run/detect", b"api/detect", b"run/on_upload"
    cases += [post(api + route, body, "refused") for route in bypassing_the_queue]
    for session in ("../..", "\0", "x" * 9_000, "<script>", "None"):
        send = lambda client, s=session: client.call_page("on_upload", None, 1, 1, session=s)  # noqa: E731
        cases.append(Case(f"session {session[:20]!r}", send, "answered"))
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "HACK"):
        for path in (b"/gradio_api/call/detect", b"/gradio_api/upload"):
            cases.append(
                Case(
                    f"{method} {path}",
                    lambda client, m=method, p=path: client.send(m, p),
                    "refused",
                )
            )
    for path in (
        b"component_server",
        b"cancel",
        b"stream/x",
        b"stream/x/close",
        b"vibe-edit",
        b"vibe-code",
        b"reset",
        b"process_recording",
        b"upload",
        b"custom_component/x/client/y/z",
        b"run-history",
    ):
        for body in (
            b"{}",
            b"[",
            b'{"data": [], "fn_name": "__init__", "component_id": 1, "session_hash": "a"}',
        ):
            cases.append(post(api + path, body, "refused"))
    return cases


def routes(folder: Path) -> list[Case]:
    """Gradio's routes to files, to URLs and to its internals."""
    targets = [
        "/etc/passwd",
        "/proc/self/environ",
        f"{folder}/secret.txt",
        f"{folder}/app.py",
        f"{folder}/weights/config.json",
        f"{folder}/weights/model.safetensors",
        "app.py",
        "secret.txt",
        "./app.py",
        "src/serving/app.py",
    ]
    up = [
        b"../" * 12,
        b"..%2f" * 12,
        b"%2e%2e/" * 12,
        b"..%252f" * 12,
        b"..%5c" * 12,
        b"....//" * 12,
        b"/" * 3,
        b"%00/../" * 12,
    ]
    prefixes = [
        b"/gradio_api/file=",
        b"/gradio_api/file/",
        b"/file=",
        b"/static/",
        b"/assets/",
        b"/svelte/",
        b"/gradio_api/proxy=",
    ]
    paths = [route + path.encode() for route in prefixes for path in targets]
    paths += [route + dots + b"etc/passwd" for route in prefixes for dots in up]
    paths += [
        b"/gradio_api/file=" + address
        for address in (
            b"http://127.0.0.1:1/",
            b"http://169.254.169.254/latest/",
            b"http://localhost:1/",
            b"http://[::1]:1/",
            b"file:///etc/passwd",
            b"ftp://127.0.0.1/",
            b"//127.0.0.1/x",
            b"http://0/",
            b"http://2130706433/",
            b"http:///",
        )
    ]
    paths += [
        b"/gradio_api/proxy=http://127.0.0.1:1/",
        b"/gradio_api/custom_component/image/server/../../app.py",
        b"/gradio_api/stream/a/b/1/playlist.m3u8",
        b"/gradio_api/stream/a/b/1/playlist-file",
        b"/gradio_api/vibe-code/",
        b"/monitoring",
        b"/monitoring/summary",
        b"/monitoring/x",
        b"/pwa_icon/99999999",
        b"/gradio_api/queue/data",
        b"/.git/config",
        b"/app.py",
        b"/../app.py",
        b"/..%2fapp.py",
        b"/weights/config.json",
    ]
    return [
        Case(path.decode()[:90], lambda client, p=path: client.send("GET", p), "refused")
        for path in paths
    ]


def all_cases(folder: Path) -> list[Case]:
    """folder: of the Space."""
    return [
        *not_images(),
        *damaged_images(),
        *large_images(),
        *polyglots_and_names(),
        *forged_paths(folder),
        *invalid_values(),
        *invalid_requests(),
        *routes(folder),
    ]
