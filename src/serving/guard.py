"""Protection of a public app: bounded request sizes, and no files but uploaded ones."""

import os

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_file_obj, traverse
from starlette.exceptions import HTTPException

MAX_UPLOAD_BYTES = 64 * 2**20  # per request with files
MAX_REQUEST_BYTES = 256 * 2**10  # per other request; the page's own have a few thousand
NOT_UPLOADED = (
    "Only uploaded files are read, no URLs and no paths. "
    "In Python, upload with gradio_client.handle_file(path)."
)


class BoundedRequests:
    """ASGI middleware that limits the size of requests.

    Gradio parses JSON of any size, and blocks meanwhile.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        is_upload = scope.get("path", "").endswith("/upload")
        limit = MAX_UPLOAD_BYTES if is_upload else MAX_REQUEST_BYTES
        received = 0

        async def receive_bounded():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, f"The request is larger than {limit / 2**20:g} MB")
            return message

        await self.app(scope, receive_bounded, send)


class GuardedBlocks(gr.Blocks):
    """Blocks whose functions accept uploaded files only.

    Gradio itself downloads from URLs, of any size, and accepts the path of a file that isn't marked
    as one.
    """

    def validate_inputs(self, block_fn, inputs):
        """Check the inputs before each function call. Raises gradio.Error."""
        super().validate_inputs(block_fn, inputs)
        traverse(inputs, _require_upload, is_file_obj)


def _require_upload(file: dict) -> None:
    if not (os.path.isfile(file["path"]) and is_in_or_equal(file["path"], get_upload_folder())):
        raise gr.Error(NOT_UPLOADED, print_exception=False)
