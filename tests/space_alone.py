"""Run an exported Space in a new environment that contains only its requirements.

    python tests/space_alone.py [width]     (or make space-test)

Exports a Space with untrained weights of width 1 (or the given width), creates a virtual environment from its
requirements.txt, starts app.py there, sends a sample to its endpoint, and prints the time and memory that it took.
Downloads about 3 GB. Removes everything that it creates.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from src.config import SHAPE_CLASSES
from src.data.shapes import draw_shapes
from src.model.network import YOLOv3
from src.serving.space import export_space

MAX_SECONDS, MAX_BYTES = 20, 2e9  # limits of the start-up time and of the memory in use
REQUEST = """
import sys
from gradio_client import Client, handle_file
answer = Client(sys.argv[1], verbose=False).predict(handle_file(sys.argv[2]), api_name="/detect")
print(answer["width"], answer["height"], f'{answer["seconds"]:.2f}')
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def memory(pid: int) -> int:
    """Peak memory of a process in bytes (Linux)."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1))


def size(folder: Path) -> float:
    """Size of a folder's files in megabytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def install(folder: Path, requirements: Path) -> Path:
    """Create a virtual environment with only the requirements. Returns its python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", requirements]
    subprocess.run(command, check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    return python


def start(python: Path, space: Path, port: int) -> tuple[subprocess.Popen, float]:
    """Start app.py and wait for its first response. Returns the process and the seconds until then."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment = {**keep, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    server = subprocess.Popen([python, "app.py"], cwd=space, env=environment)
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).read()
            return server, time.perf_counter() - begin
        except OSError:
            if server.poll() is not None or time.perf_counter() - begin > 300:
                server.kill()
                raise SystemExit("The Space did not start.") from None
            time.sleep(0.1)


def main(width: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = YOLOv3(len(SHAPE_CLASSES), width, list(SHAPE_CLASSES))
        samples = [record.image for record in draw_shapes(2, 416, seed=1)]
        space = export_space(model, Path(scratch) / "space", samples)
        begin = time.perf_counter()
        python = install(Path(scratch) / "venv", space / "requirements.txt")
        print(f"installed in {time.perf_counter() - begin:.0f} s: {size(python.parents[1]):,.0f} MB")
        port = free_port()
        server, first = start(python, space, port)
        server.terminate()
        server.wait(30)
        server, again = start(python, space, port)  # the first start compiled bytecode
        try:
            command = [python, "-c", REQUEST, f"http://127.0.0.1:{port}/", space / "samples" / "01.jpg"]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            peak = memory(server.pid)
        finally:
            server.terminate()
            server.wait(30)
        print(f"Space: {size(space):,.0f} MB; first start {first:.1f} s, second start {again:.1f} s")
        print(f"peak memory {peak / 1e6:,.0f} MB")
        print(f"detection of {answer[0]} x {answer[1]} pixels: {answer[2]} s")
        if again > MAX_SECONDS or peak > MAX_BYTES:
            raise SystemExit(
                f"The start took more than {MAX_SECONDS} s, or the peak memory is above {MAX_BYTES / 1e6:,.0f} MB."
            )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
