"""Run an exported Space in a new environment that contains only its requirements.

    python tests/space_alone.py [width]     (or make space-test)

Exports a Space with untrained weights of width 1 (or the given width), creates a virtual
environment from its requirements.txt, starts app.py there, sends a sample to its endpoint, and
prints the time and memory that it took.
Downloads about 3 GB. Removes everything that it creates.
"""

import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from src.config import SHAPE_CLASSES
from src.data.shapes import draw_shapes
from src.model.network import YOLOv3
from src.serving.space import export_space
from tests.visitor import serving

MAX_SECONDS, MAX_BYTES = 20, 2e9  # limits of the start-up time and of the memory in use
REQUEST = """
import sys
from gradio_client import Client, handle_file
answer = Client(sys.argv[1], verbose=False).predict(handle_file(sys.argv[2]), api_name="/detect")
print(answer["width"], answer["height"], f'{answer["seconds"]:.2f}')
"""


def memory(pid: int) -> int:
    """Peak memory of a process in bytes (Linux)."""
    return 1024 * int(
        re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1)
    )


def size(folder: Path) -> float:
    """Size of a folder's files in megabytes."""
    return (
        sum(
            path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file() and not path.is_symlink()
        )
        / 1e6
    )


def install(folder: Path, requirements: Path) -> Path:
    """Create a virtual environment with only the requirements. Returns its python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", requirements]
    subprocess.run(command, check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    return python


def main(width: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = YOLOv3(len(SHAPE_CLASSES), width, list(SHAPE_CLASSES))
        samples = [record.image for record in draw_shapes(2, 416, seed=1)]
        space = export_space(model, Path(scratch) / "space", samples)
        begin = time.perf_counter()
        python = install(Path(scratch) / "venv", space / "requirements.txt")
        print(
            f"installed in {time.perf_counter() - begin:.0f} s: {size(python.parents[1]):,.0f} MB"
        )
        seconds = []
        for _ in range(2):  # the first start compiles bytecode
            begin = time.perf_counter()
            with serving(space, python, HF_HUB_OFFLINE="1") as (address, server):
                seconds.append(time.perf_counter() - begin)
                command = [python, "-c", REQUEST, address, space / "samples" / "01.png"]
                answer = subprocess.run(
                    command, check=True, capture_output=True, text=True
                ).stdout.split()
                peak = memory(server.pid)
        print(
            f"Space: {size(space):,.0f} MB; "
            f"first start {seconds[0]:.1f} s, second start {seconds[1]:.1f} s"
        )
        print(f"peak memory {peak / 1e6:,.0f} MB")
        print(f"detection of {answer[0]} x {answer[1]} pixels: {answer[2]} s")
        if seconds[1] > MAX_SECONDS or peak > MAX_BYTES:
            raise SystemExit(
                f"The start took more than {MAX_SECONDS} s, "
                f"or the peak memory is above {MAX_BYTES / 1e6:,.0f} MB."
            )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
