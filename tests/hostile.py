"""Attacks on a public app: files, paths, numbers and requests, and the allowed kinds of answers.

A case is (kinds, pattern, method, arguments): a call of a method of Client, the kinds of answers
that are allowed, and a pattern in the answer's text. Kinds:
answered; error (with a message of the app); refused (4xx); silent (an error event or a 500 without
a message); hung; broken (any other).
"""

import io
import itertools
import json
import random
import re
import struct
import time
import zipfile
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
STATUS = {2: "answered", 3: "answered", 4: "refused", 5: "broken"}


class Client:
    """A client that follows no rules: bytes over HTTP, and a new connection per request."""

    def __init__(self, address: str):
        self.address = urlsplit(address)
        limits = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(timeout=TIMEOUT_S, limits=limits)
        self.session_numbers = itertools.count()
        config = self.request("GET", b"/config").json()
        self.functions = {each["api_name"]: each["id"] for each in config["dependencies"]}

    def request(self, method: str, path: bytes, **options) -> httpx.Response:
        """path: sent unchanged, with its dots."""
        host, port = self.address.hostname, self.address.port
        url = httpx.URL(scheme="http", host=host, port=port, raw_path=path)
        return self.http.request(method, url, **options)

    def send(self, method: str, path: bytes) -> tuple[str, str]:
        return judge(self.request(method, path))

    def upload(self, name: str, content: bytes) -> httpx.Response:
        return self.request("POST", API + b"upload", files={"files": (name, content)})

    def detect_upload(self, name: str, content: bytes, *thresholds) -> tuple[str, str]:
        """Upload a file, with a name that gradio may refuse; if it doesn't, run /detect on it."""
        response = self.upload(name, content)
        if response.status_code != 200:
            return judge(response)
        path = response.json()[0]
        assert Path(path).parent.parent == Path(get_upload_folder())
        return self.detect(file_data(path), *thresholds)

    def detect(self, file, confidence=0.3, iou_threshold=0.5) -> tuple[str, str]:
        return self.call(b"call/detect", {"data": [file, confidence, iou_threshold]})

    def call_page(self, function: str, *data, session: str = "") -> tuple[str, str]:
        """Call one of the page's functions in a new session."""
        body = {
            "data": data,
            "fn_index": self.functions[function],
            "session_hash": f"{session} {next(self.session_numbers)}",
            "simple_format": True,
        }
        return self.call(b"queue/join", body)

    def call(self, route: bytes, body) -> tuple[str, str]:
        content = body if isinstance(body, bytes) else json.dumps(body)
        headers = {"content-type": "application/json"}
        response = self.request("POST", API + route, content=content, headers=headers)
        if response.status_code != 200:
            return judge(response)
        end = time.monotonic() + TIMEOUT_S
        address = f"http://{self.address.netloc}/gradio_api/call/detect/"
        text = ""
        with self.http.stream("GET", address + response.json()["event_id"]) as lines:
            for line in lines.iter_lines():  # gradio's heartbeats keep a lost request open for ever
                text = (text + line + "\n").removesuffix("event: heartbeat\ndata: null\n\n")
                if text.endswith("\n\n") or time.monotonic() > end:
                    break
        silent = '"error": null' in text or "data: null" in text
        failure = "silent" if silent else "error" if "error" in text else "hung"
        return "answered" if "event: complete" in text else failure, text


def judge(response: httpx.Response) -> tuple[str, str]:
    """Return kind and text of an answer."""
    silent = response.status_code == 500 and response.text == "Internal Server Error"
    kind = "silent" if silent else STATUS[response.status_code // 100]
    return kind, f"{response.text}\n{response.headers}"


def file_data(path) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def encoded(form: str, image=None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(blurred_noise(150, 90))).save(buffer, form, **options)
    return buffer.getvalue()


def zipped(before: bytes) -> bytes:
    """Return a ZIP archive of a program, after other bytes."""
    archive = io.BytesIO(before)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("run.py", b"print(1)")
    return archive.getvalue()


def cases(kinds: str, pattern: str, method: str, *arguments: tuple) -> list[tuple]:
    """One case for each tuple of arguments."""
    return [(kinds, pattern, method, each) for each in arguments]


def not_images() -> list[tuple]:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">%s</svg>'
    )
    entity = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    files = {
        "empty.png": b"",
        "html.jpg": b"<html><script>alert(1)</script>",
        "archive.png": zipped(b""),
        "noise.jpg": random.Random(0).randbytes(50_000),
        "pickle.png": b"cos\nsystem\n(S'touch hostile'\ntR.",
        "pickle.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}",
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
        "head.gif": b"GIF89a",
        "head.webp": b"RIFF\0\0\0\0WEBPVP8 ",
        "video.mp4": b"\0\0\0\x18ftypmp42" + bytes(2000),
    }
    return cases("error", "This file can't be read as an image", "detect_upload", *files.items())


def damaged_images() -> list[tuple]:
    """Truncated images, and images with 1 to 16 bits flipped, most of them in the header."""
    generator = random.Random(1)
    files = []
    for form, number in itertools.product(("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"), range(4)):
        whole = encoded(form)
        files.append((f"cut{number}.{form}", whole[: generator.randrange(len(whole) - 20)]))
        flipped = bytearray(whole)
        for position in generator.sample(range(60 if number else len(whole)), 4 ** (number % 3)):
            flipped[position] ^= 1 << generator.randrange(8)
        files.append((f"flipped{number}.{form}", bytes(flipped)))
    return cases("error answered", "can't be read as an image|detections", "detect_upload", *files)


def large_images() -> list[tuple]:
    claims = encoded("PNG").replace(struct.pack(">II", 150, 90), struct.pack(">II", 30_000, 30_000))
    frames = [Image.new("L", (64, 64), shade) for shade in range(256)]
    bombs = {
        "claims.png": claims,
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
        "zip.jpg": zipped(encoded("JPEG")),
        "script.html": encoded("GIF") + b"/*<script>alert(1)</script>*/",
    }
    pattern = "million|decompression bomb|can't be read"
    refused = cases("error", pattern, "detect_upload", *bombs.items())
    return refused + cases("answered", '"width"', "detect_upload", *fine.items())


def names() -> list[tuple]:
    odd = ["a" * 5_000 + ".png", "", " ", "a\0b.png", "a\r\nb.png", "\u202egnp.exe", "a'b\"c.png"]
    odd += ["..\\..\\win.ini", "🙂.png", "<b>.png", "{x}.png", "$(id).png", "a;b|c&d.png"]
    odd += "../../etc/passwd /etc/passwd . .. ... %2e%2e%2f.png CON .gradio -rf a.png/".split()
    files = ((name, encoded("PNG")) for name in odd)
    return cases("answered refused silent", "", "detect_upload", *files)


def forged_paths(folder: Path) -> list[tuple]:
    """Files and URLs that nobody uploaded, marked as gradio marks files and unmarked."""
    upload = get_upload_folder()
    paths = ["", upload, "a" * 5_000, "\ud800"]
    paths += f"""
        /etc/passwd /proc/self/environ /dev/zero / . ~/.bashrc ../../../../../etc/passwd
        {folder}/app.py {folder}/secret.txt {folder}/weights/model.safetensors
        {folder}/samples/first.jpg app.py samples/first.jpg ./samples/first.jpg
        {upload}/../../etc/passwd {upload}/nothing.png {upload}/\0.png
        file:///etc/passwd file:/etc/passwd ftp://127.0.0.1/etc/passwd data:/etc/passwd
        gopher://[::1]:1/etc/passwd http://127.0.0.1:1/a.png http://localhost:1/a.png
        http://0.0.0.0:1/a.png http://[::1]:1/a.png http://169.254.169.254/a.png
        http://2130706433:1/a.png http://[::ffff:127.0.0.1]:1/a.png http://example.com/a.png
        https://127.0.0.1:1/a.png HTTP://127.0.0.1:1/a.png data:image/png;base64,iVBORw0KGgo=
        """.split()
    forged = [(file,) for path in paths for file in (file_data(path), {"path": path})]
    passwd = file_data("/etc/passwd")
    odd = [
        passwd | {"is_stream": True},
        passwd | {"url": "http://127.0.0.1:1/"},
        [passwd],
        {"a": passwd},
        passwd | {"meta": "gradio.FileData"},
    ]
    calls = [("on_upload", file_data(path), 0.3, 0.5) for path in paths]
    calls.append(("on_threshold_change", None, "all", passwd, 1))
    return [
        *cases("error", REFUSED_PATH, "detect", *forged),
        *cases("error silent", "", "detect", *((file,) for file in odd)),
        *cases("error", REFUSED_PATH, "call_page", *calls),
    ]


def invalid_values() -> list[tuple]:
    """A session without an image answers with no action, or gradio with an error."""
    image = ("a.png", encoded("PNG"))
    numbers = [float("nan"), float("inf"), -float("inf"), 1e300, 10**400, -1, 1.0001, "x" * 99_999]
    numbers += [[0.5], {"a": 1}, {"path": 1}, "__import__('os').system('id')", "{{7*7}}"]
    empty = [2, None, "", "0.5", "nan", [], {}]
    files = [None, 1, 0, True, "", "x", "/etc/passwd", [], ["x"], {}, {"path": None}, {"path": 0}]
    files += [{"path": ["x"]}, {"url": "http://127.0.0.1:1/"}, {"name": "/x"}]
    files.append({"meta": {"_type": "gradio.FileData"}})
    calls = [
        call
        for number in numbers
        for call in (
            ("on_threshold_change", None, "all", number, 0.5),
            ("explain", None, number, *DEFAULTS, 0.7, 0.3, 0.5),
            ("explain", None, "all", number, DEFAULTS[1], 0.7, 0.3, 0.5),
            ("load_example", None, number),
        )
    ]
    thresholds = numbers + empty
    first = [(*image, number, 0.5) for number in thresholds]
    second = [(*image, 0.3, number) for number in thresholds]
    return [
        *cases("error", REFUSED_PATH, "detect", *((file,) for file in files)),
        *cases("error", "must be in 0..1|not supported between", "detect_upload", *first),
        *cases("error", "must be in 0..1|not supported between", "detect_upload", *second),
        *cases("error silent answered", "", "call_page", *calls),
        *cases("answered", "", "call_page", *(("on_upload", None, each, each) for each in numbers)),
    ]


def invalid_requests() -> list[tuple]:
    """Violations of the protocol. Gradio answers unknown names with a 500 without a message."""
    bodies = b'{ [] null 1 "x" {} \xff\xfe {"data":1} {"data":null} {"data":{}}'.split()
    bodies += [b"", b"[" * 100_000, b'{"data": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"]
    bodies.append(b'{"data": "' + b"x" * 1_000 + b'"}')
    huge = [b'{"data": [' + b"[]," * 5_000_000 + b"[]]}", b'{"data": ["' + bytes(10**7) + b'"]}']
    data = [b"[]", b"[1, 2, 3, 4]", b"[" * 300 + b"]" * 300]
    data.append(b'["' + b"x" * (MAX_REQUEST_BYTES - 50) + b'"]')
    unknown = b"nothing ..%2f.. __class__ on_upload/ %00 detect;id predict".split()
    unknown.append(b"a" * 3_000)
    indices = b'-1 99 1e9 "x" null 99999999999999999999 [1]'.split()
    by_index = b'{"data": [], "session_hash": "a", "fn_index": %s}'
    forged = json.dumps({"data": [file_data("/etc/passwd"), 0.3, 0.5]}).encode()
    internal = b"""component_server cancel stream/x stream/x/close vibe-edit vibe-code reset
        process_recording upload run-history custom_component/x/client/y/z""".split()
    function = b'{"data": [], "fn_name": "__init__", "component_id": 1, "session_hash": "a"}'
    methods = "GET PUT DELETE PATCH OPTIONS TRACE PROPFIND HACK".split()
    product = itertools.product
    functions = [b"call/detect", b"queue/join", b"run/detect", b"api/detect"]
    named = [route + name for route in (b"call/", b"call/v2/", b"run/") for name in unknown]
    bypassing_the_queue = [b"run/detect", b"api/detect", b"run/on_upload"]
    return [
        *cases("refused", "", "call", *product(functions, bodies)),
        *cases("refused", "larger than 0.25 MB", "call", *product(functions, huge)),
        *cases("error silent", "", "call", *((b"call/detect", b'{"data": %s}' % d) for d in data)),
        *cases("refused silent", "", "call", *product(named, [b'{"data": []}'])),
        *cases("refused silent", "", "call", *((b"queue/join", by_index % i) for i in indices)),
        *cases("refused", "", "call", *product(bypassing_the_queue, [forged])),
        *cases("refused", "", "send", *product(methods, (API + b"call/detect", API + b"upload"))),
        *cases("refused", "", "call", *product(internal, [b"{}", b"[", function])),
    ]


def routes(folder: Path) -> list[tuple]:
    """Gradio's routes to files, to URLs and to its internals."""
    targets = f"""/etc/passwd /proc/self/environ {folder}/secret.txt {folder}/app.py
        {folder}/weights/config.json {folder}/weights/model.safetensors app.py secret.txt ./app.py
        src/serving/app.py""".encode().split()
    up = b"../ ..%2f %2e%2e/ ..%252f ..%5c ....// %00/../".split()
    targets += [dots * 12 + b"etc/passwd" for dots in up]
    prefixes = b"""/gradio_api/file= /gradio_api/file/ /file= /static/ /assets/ /svelte/
        /gradio_api/proxy=""".split()
    addresses = b"""http://127.0.0.1:1/ http://169.254.169.254/latest/ http://localhost:1/
        http://[::1]:1/ file:///etc/passwd ftp://127.0.0.1/ //127.0.0.1/x http://0/
        http://2130706433/ http:///""".split()
    paths = b"""/gradio_api/proxy=http://127.0.0.1:1/ /monitoring /monitoring/summary
        /gradio_api/custom_component/image/server/../../app.py /gradio_api/vibe-code/
        /gradio_api/stream/a/b/1/playlist.m3u8 /gradio_api/stream/a/b/1/playlist-file
        /gradio_api/queue/data /pwa_icon/99999999 /.git/config /app.py /../app.py /..%2fapp.py
        /weights/config.json""".split()
    paths += [prefix + target for prefix in prefixes for target in targets]
    paths += [b"/gradio_api/file=" + address for address in addresses]
    return cases("refused", "", "send", *(("GET", path) for path in paths))


def all_cases(folder: Path) -> list[tuple]:
    """folder: of the Space."""
    files = [*not_images(), *damaged_images(), *large_images(), *names(), *forged_paths(folder)]
    return [*files, *invalid_values(), *invalid_requests(), *routes(folder)]
