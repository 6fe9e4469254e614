"""A result served as scripts/README.md says, by `transformers serve`, and asked by the `openai` client.

Needs the packages of `transformers[serving]`. To run it:

    python -m pip install -c constraints.txt 'transformers[serving]'
    LLAVA_NEXT_SERVED=1 python -m pytest tests/commands/test_served.py
"""

import base64
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.demo import build_run
from talking.conversation import Chat
from talking.models import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("LLAVA_NEXT_SERVED") != "1", reason="starts a server; set LLAVA_NEXT_SERVED=1 to run"
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_run(tmp_path_factory.mktemp("served") / "run") / "model"


@pytest.fixture(scope="module")
def client(model):
    from openai import OpenAI

    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", str(model), "--port", str(port)]
    with subprocess.Popen(command) as server:
        try:
            deadline = time.monotonic() + 300
            while server.poll() is None and time.monotonic() < deadline:
                try:
                    socket.create_connection(("localhost", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=300)
        finally:
            server.terminate()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 90, 3), dtype=np.uint8))


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("seeds", [(), (1,), (1, 2)], ids=["text", "picture", "pictures"])
def test_server_answers_as_the_chat_does(client, model, seeds):
    question, pictures = "What number is written?", [picture(seed) for seed in seeds]
    expected = Chat(*load(str(model)), max_new_tokens=16).ask(question, pictures, lambda piece: None)
    content = [{"type": "image_url", "image_url": {"url": data_url(shown)}} for shown in pictures]
    content.append({"type": "text", "text": question})
    answer = client.chat.completions.create(
        model=str(model), messages=[{"role": "user", "content": content}], max_tokens=16, temperature=0
    )
    assert answer.choices[0].message.content.strip() == expected != ""
