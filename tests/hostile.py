"""Attacks on a public app: files, paths, numbers and requests, and the allowed kinds of answers."""

import io
import itertools
import json
import random
import re
import time
import zipfile
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
API = b"/gradio_api/"
REFUSED_PATH = re.escape(NOT_UPLOADED)


@dataclass(frozen=True)
class Answer:
    """kind: answered; error (with a message of the app); refused (4xx); silent (an error event or a
    500 without a message); hung."""

    kind: str
    text: str
    seconds: float


@dataclass(frozen=True)
class Case:
    """A call of a method of Client, the allowed kinds of answers, and a pattern in the answer."""

    expected: str  # kinds, separated by spaces
    pattern: str
    method: str
    arguments: tuple

    def run(self, client: "Client") -> Answer:
        return getattr(client, self.method)(*self.arguments)


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
        kinds = {2: "answered", 3: "answered", 4: "refused", 5: "silent" if silent else "broken"}
        kind = kinds[status // 100]
        return Answer(kind, f"{text}\n{response.headers}", time.monotonic() - start)

    def upload(self, name: str, content: bytes) -> dict:
        """Upload a file. Returns what the page sends for it."""
        response = self.request("POST", b"/gradio_api/upload", files={"files": (name, content)})
        assert response.status_code == 200, response.text
        return file_data(response.json()[0])

    def upload_as(self, name: str, content: bytes) -> Answer:
        """Upload a file with a name that gradio may refuse; if it doesn't, run /detect on it."""
        start = time.monotonic()
        response = self.request("POST", b"/gradio_api/upload", files={"files": (name, content)})
        if response.status_code != 200:
            return self.judge(response, start)
        assert Path(response.json()[0]).parent.parent == Path(get_upload_folder())
        return self.detect(file_data(response.json()[0]))

    def detect_upload(self, name: str, content: bytes, *thresholds) -> Answer:
        return self.detect(self.upload(name, content), *thresholds)

    def detect(self, file, confidence=0.3, iou_threshold=0.5) -> Answer:
        return self.call(b"call/detect", {"data": [file, confidence, iou_threshold]})

    def call_page(self, function: str, *data, session: str = "") -> Answer:
        """Call one of the page's functions in a new session."""
        body = {
            "data": data,
            "fn_index": self.functions[function],
            "session_hash": f"{session} {next(self.session_numbers)}",
            "simple_format": True,
        }
        return self.call(b"queue/join", body)

    def call_in_session(self, session: str) -> Answer:
        return self.call_page("on_upload", None, 1, 1, session=session)

    def call(self, route: bytes, body) -> Answer:
        start = time.monotonic()
        content = body if isinstance(body, bytes) else json.dumps(body)
        headers = {"content-type": "application/json"}
        response = self.request("POST", API + route, content=content, headers=headers)
        if response.status_code != 200:
            return self.judge(response, start)
        address = f"http://{self.address.netloc}/gradio_api/call/detect/"
        text = ""
        with self.http.stream("GET", address + response.json()["event_id"]) as lines:
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


def zipped(name: str, content: bytes, before: bytes = b"") -> bytes:
    """Return a ZIP archive of one file, after other bytes."""
    archive = io.BytesIO(before)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, content)
    return archive.getvalue()


def cases(expected: str, pattern: str, method: str, *arguments: tuple) -> list[Case]:
    """One case for each tuple of arguments."""
    return [Case(expected, pattern, method, each) for each in arguments]


def not_images() -> list[Case]:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">%s</svg>'
    entity = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    files = {
        "empty.png": b"",
        "text.png": b"not an image",
        "html.jpg": b"<html><script>alert(1)</script>",
        "archive.png": zipped("a.png", encoded("PNG")),
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
    message = "This file can't be read as an image"
    return cases("error", message, "detect_upload", *files.items())


def damaged_images() -> list[Case]:
    """Truncated images, and images with 1 to 16 bits flipped."""
    generator = random.Random(1)
    files = {}
    for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encoded(form)
        for number in range(5):
            files[f"truncated{number}.{form}"] = whole[: generator.randrange(len(whole) - 20)]
            flipped = bytearray(whole)
            for _ in range(4**number if number < 3 else 1):
                position = generator.randrange(len(whole) if number < 3 else 60)
                flipped[position] ^= 1 << generator.randrange(8)
            files[f"flipped{number}.{form}"] = bytes(flipped)
    pattern = "can't be read as an image|detections"
    return cases("error answered", pattern, "detect_upload", *files.items())


def large_images() -> list[Case]:
    claims = bytearray(encoded("PNG"))
    claims[16:24] = (30_000).to_bytes(4, "big") * 2
    frames = [Image.new("L", (64, 64), shade) for shade in range(256)]
    bombs = {
        "claims.png": bytes(claims),
        "bomb.png": encoded("PNG", Image.new("1", (14_000, 14_000))),
        "bomb.gif": encoded("GIF", Image.new("L", (9_000, 9_000))),
        "bomb.jpg": encoded("JPEG", Image.new("L", (8_000, 8_000))),
        "bomb.tif": encoded("TIFF", Image.new("1", (14_000, 14_000)), compression="group4"),
    }
    fine = {
        "long.png": encoded("PNG", Image.new("RGB", (20_000, 3))),
        "tall.gif": encoded("GIF", Image.new("L", (3, 20_000))),
        "film.gif": encoded("GIF", frames[0], save_all=True, append_images=frames[1:]),
        "film.webp": encoded("WEBP", frames[0], save_all=True, append_images=frames[1:20]),
        "most.png": encoded("PNG", Image.new("1", (MAX_PIXELS // 5_000, 5_000))),
    }
    pattern = "million|decompression bomb|can't be read"
    refused = cases("error", pattern, "detect_upload", *bombs.items())
    return refused + cases("answered", '"width"', "detect_upload", *fine.items())


def polyglots_and_names() -> list[Case]:
    script = encoded("GIF") + b"/*<script>alert(1)</script>*/"
    files = {
        "zip.jpg": zipped("run.py", b"print(1)", before=encoded("JPEG")),
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
    odd = [(name, encoded("PNG")) for name in names]
    return [
        *cases("answered", '"width": 150', "detect_upload", *files.items()),
        *cases("answered refused silent", "", "upload_as", *odd),
    ]


def forged_paths(folder: Path) -> list[Case]:
    """Files and URLs that nobody uploaded, marked as gradio marks files and unmarked."""
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
    forged = [file for path in paths for file in (file_data(path), {"path": path})]
    odd = [
        {**file_data("/etc/passwd"), "is_stream": True},
        {**file_data("x"), "url": "http://127.0.0.1:1/"},
        [file_data("/etc/passwd")],
        {"a": file_data("/etc/passwd")},
        {**file_data("/etc/passwd"), "meta": "gradio.FileData"},
    ]
    calls = [("on_upload", file_data(path), 0.3, 0.5) for path in paths]
    calls.append(("on_threshold_change", None, "all", file_data("/etc/passwd"), 1))
    return [
        *cases("error", REFUSED_PATH, "detect", *((file,) for file in forged)),
        *cases("error silent", "", "detect", *((file,) for file in odd)),
        *cases("error", REFUSED_PATH, "call_page", *calls),
    ]


def invalid_values() -> list[Case]:
    """A session without an image answers with no action, or gradio with an error."""
    image = ("a.png", encoded("PNG"))
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

    few = [number for number in numbers if number not in (2, None, "", "0.5", "nan", [], {})]
    calls = [
        call
        for number in few
        for call in (
            ("on_threshold_change", None, "all", number, 0.5),
            ("explain", None, number, *DEFAULTS, 0.7, 0.3, 0.5),
            ("explain", None, "all", number, DEFAULTS[1], 0.7, 0.3, 0.5),
            ("load_example", None, number),
        )
    ]
    uploads = [("on_upload", None, number, number) for number in few]
    first = [(*image, number, 0.5) for number in numbers]
    second = [(*image, 0.3, number) for number in numbers]
    return [
        *cases("error", REFUSED_PATH, "detect", *((file,) for file in files)),
        *cases("error", "confidence must be a number", "detect_upload", *first),
        *cases("error", "iou_threshold must be a number", "detect_upload", *second),
        *cases("error silent answered", "", "call_page", *calls),
        *cases("answered", "", "call_page", *uploads),
    ]


def invalid_requests() -> list[Case]:
    """Violations of the protocol. Gradio answers unknown names with a 500 without a message."""
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
    huge = [
        b'{"data": [' + b"[]," * 5_000_000 + b"[]]}",
        b'{"data": ["' + b"x" * 10_000_000 + b'"]}',
    ]
    data = [
        b"[]",
        b"[1, 2, 3, 4]",
        b"[" * 300 + b"]" * 300,
        b'["' + b"x" * (MAX_REQUEST_BYTES - 50) + b'"]',
    ]
    names = [b"nothing", b"..%2f..", b"__class__", b"on_upload/", b"%00", b"a" * 3_000]
    names += [b"detect;id", b"predict"]
    indices = [b"-1", b"99", b"1e9", b'"x"', b"null", b"99999999999999999999", b"[1]"]
    by_index = b'{"data": [], "session_hash": "a", "fn_index": %s}'
    forged = json.dumps({"data": [file_data("/etc/passwd"), 0.3, 0.5]}).encode()
    internal = [b"component_server", b"cancel", b"stream/x", b"stream/x/close", b"vibe-edit"]
    internal += [b"vibe-code", b"reset", b"process_recording", b"upload", b"run-history"]
    internal += [b"custom_component/x/client/y/z"]
    function = b'{"data": [], "fn_name": "__init__", "component_id": 1, "session_hash": "a"}'
    sessions = ["../..", "\0", "x" * 9_000, "<script>", "None"]
    methods = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "HACK"]
    product = itertools.product
    functions = [b"call/detect", b"queue/join", b"run/detect", b"api/detect"]
    named = [route + name for route in (b"call/", b"call/v2/", b"run/") for name in names]
    bypassing_the_queue = [b"run/detect", b"api/detect", b"run/on_upload"]
    return [
        *cases("refused", "", "call", *product(functions, bodies)),
        *cases("refused", "larger than 0.25 MB", "call", *product(functions, huge)),
        *cases("error silent", "", "call", *((b"call/detect", b'{"data": %s}' % d) for d in data)),
        *cases("refused silent", "", "call", *product(named, [b'{"data": []}'])),
        *cases("refused silent", "", "call", *((b"queue/join", by_index % i) for i in indices)),
        *cases("refused", "", "call", *product(bypassing_the_queue, [forged])),
        *cases("answered", "", "call_in_session", *((session,) for session in sessions)),
        *cases("refused", "", "send", *product(methods, (API + b"call/detect", API + b"upload"))),
        *cases("refused", "", "call", *product(internal, [b"{}", b"[", function])),
    ]


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
    return cases("refused", "", "send", *(("GET", path) for path in paths))


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
