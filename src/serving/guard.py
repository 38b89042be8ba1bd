"""What a public address lets in: requests of bounded size, and no files but those that were uploaded."""

import os

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_file_obj, traverse
from starlette.exceptions import HTTPException

MAX_UPLOAD_BYTES = 64 * 2**20  # bytes of a request that brings files
MAX_REQUEST_BYTES = 256 * 2**10  # bytes of any other; the page's own hold some thousand


class BoundedRequests:
    """ASGI middleware: a request stops at its most bytes. Gradio by itself parses JSON of any size, while all wait."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        most, seen = MAX_UPLOAD_BYTES if scope.get("path", "").endswith("/upload") else MAX_REQUEST_BYTES, 0

        async def bounded():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, f"This request is larger than {most / 2**20:g} MB")
            return message

        await self.app(scope, bounded, send)


class GuardedBlocks(gr.Blocks):
    """Blocks whose requests may name no file but one that was uploaded.

    By itself gradio fetches addresses, of any size, and lets the path of a file that isn't marked as one pass.
    """

    def validate_inputs(self, block_fn, inputs):
        """Called before each function. Raises gradio.Error."""
        super().validate_inputs(block_fn, inputs)
        traverse(inputs, _require_upload, is_file_obj)


def _require_upload(file: dict) -> None:
    if not (os.path.isfile(file["path"]) and is_in_or_equal(file["path"], get_upload_folder())):
        raise gr.Error("Upload the picture first: neither addresses nor other files are read")
