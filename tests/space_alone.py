"""Run an exported Space in a new environment that contains only its requirements.

    python tests/space_alone.py     (or make space-test)

Exports a Space with untrained weights of width 1, creates a virtual environment from its
requirements.txt, starts app.py there, sends a sample to its endpoint, and prints the time of a
start and the peak memory (Linux). Downloads about 3 GB. Removes everything that it creates.
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

REQUEST = """
import sys
from gradio_client import Client, handle_file
print(Client(sys.argv[1], verbose=False).predict(handle_file(sys.argv[2]), api_name="/detect"))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = YOLOv3(len(SHAPE_CLASSES), 1.0, list(SHAPE_CLASSES))
        samples = [record.image for record in draw_shapes(2, 416, seed=1)]
        space = export_space(model, Path(scratch) / "space", samples)
        venv.create(Path(scratch) / "venv", with_pip=True)
        python = Path(scratch) / "venv/bin/python"
        pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r"]
        subprocess.run([*pip, space / "requirements.txt"], check=True)
        subprocess.run([python, "-m", "pip", "check"], check=True)
        begin = time.perf_counter()
        with serving(space, python, HF_HUB_OFFLINE="1") as (address, server):
            print(f"start: {time.perf_counter() - begin:.1f} s")
            image = space / "samples" / "01.png"
            subprocess.run([python, "-c", REQUEST, address, image], check=True)
            status = Path(f"/proc/{server.pid}/status").read_text()
            print("peak memory:", *re.findall(r"VmHWM:\s+(.+)", status))


if __name__ == "__main__":
    main()
