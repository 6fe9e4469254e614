"""The page of `scripts/chat.py --web` in a real browser: Chromium without a window, a run with random weights.

Needs Chromium, the extra `web` and playwright (its Python package alone). To run it:

    python -m pip install -c constraints.txt -e '.[web]' playwright
    LLAVA_NEXT_BROWSER=/usr/bin/chromium python -m pytest tests/commands/test_chat_page.py
"""

import base64
import http.client
import io
import os
import re
import shutil
import subprocess
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from support.demo import build_run
from support.launching import ROOT
from talking.conversation import Chat
from talking.models import load

BROWSER = os.environ.get("LLAVA_NEXT_BROWSER")
QUESTION, LONGEST = "What number is written?", 200
# notes the texts that an answer has while it is made, and may stop it at the third
WATCH = """new MutationObserver(() => {
    const text = document.querySelector(".busy .said")?.textContent;
    if (!text || window.texts.includes(text)) return;
    window.texts.push(text);
    if (window.texts.length === 3) window.stopAfterThree();
}).observe(document.getElementById("chat"), { childList: true, subtree: true, characterData: true })"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="needs a browser: set LLAVA_NEXT_BROWSER to its path, see the file's top"),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def url(run_dir):
    """The page's address, as the command prints it."""
    command = [sys.executable, "scripts/chat.py", "--model", str(run_dir), "--web", "--port", "0"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield re.search(r"http://127.0.0.1:\d+/", server.stdout.readline())[0]
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture
def page(browser, url):
    """An empty chat; at the end, nothing was asked of other addresses and no script failed."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(120_000)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    page.close()
    assert errors == [] and [a for a in asked if not a.startswith((url, "data:"))] == []


@pytest.fixture(scope="module")
def chat(run_dir):
    return Chat(*load(str(run_dir / "model")), max_new_tokens=LONGEST)


@pytest.fixture(scope="module")
def long_question(chat) -> str:
    """One whose greedy answer is long enough to be watched and stopped."""
    for number in range(40):
        chat.reset()
        pieces = []
        chat.ask(f"{QUESTION} {number}", [], pieces.append)
        if sum(map(bool, pieces)) > 8:
            return f"{QUESTION} {number}"
    raise AssertionError("all answers are short")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 90, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def upload(page, *seeds: int) -> None:
    page.set_input_files(
        "#files", [{"name": f"{seed}.png", "mimeType": "image/png", "buffer": png(seed)} for seed in seeds]
    )
    page.wait_for_selector(f"#waiting figure >> nth={len(seeds) - 1}")


def set_longest(page, tokens: int) -> None:
    page.click("summary")
    page.fill("#most", str(tokens))
    page.click("summary")


def ended(page) -> str:
    """The last answer, once it is whole."""
    page.wait_for_selector(".turn:last-child .again")
    return page.locator(".turn:last-child .said").text_content()


def sideways(page) -> int:
    """Pixels that the page is wider than its window."""
    return page.evaluate(
        "Math.max(...[document.documentElement, document.getElementById('chat')]"
        ".map((e) => e.scrollWidth - e.clientWidth))"
    )


def test_pictures_are_asked_about_and_answered_as_in_the_terminal(page, chat):
    set_longest(page, 12)
    chat.reset()
    chat.max_new_tokens = 12
    upload(page, 1, 2)
    page.wait_for_selector("#waiting .canvas >> nth=1")
    assert "90 × 40 px: 1 + 2 × 3 tiles, 18 tokens" in page.locator("#waiting figcaption").first.text_content()
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    assert ended(page) == chat.ask(QUESTION, [picture(1), picture(2)], lambda piece: None) != ""
    page.fill("#question", "And now?")
    page.click("#send")
    assert ended(page) == chat.ask("And now?", [], lambda piece: None)
    page.click(".turn:last-child .show-prompt")
    prompt = page.locator(".prompt").text_content()
    for text in ("<s>", "picture 1: 18 tokens", "picture 2: 18 tokens", "And now? [/INST]"):
        assert text in prompt
    chat.max_new_tokens = LONGEST


def test_answers_stream_and_stop_and_are_made_again(page, chat, long_question):
    set_longest(page, LONGEST)
    chat.reset()
    whole = chat.ask(long_question, [], lambda piece: None)
    page.fill("#question", long_question)
    page.evaluate("for (const id of ['send', 'stop']) document.getElementById(id).click()")  # before its first token
    assert ended(page) == "" and "stopped" in page.locator(".turn:last-child .actions").text_content()
    page.evaluate(WATCH)
    page.fill("#question", long_question)
    stops = [
        "document.getElementById('stop').click()",
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))",
    ]
    for way, again in zip((*stops, ""), ("#send", ".again", ".again"), strict=True):
        page.evaluate(f"window.texts = []; window.stopAfterThree = () => {{ {way} }}")
        page.click(again)
        said, texts = ended(page), page.evaluate("window.texts")
        assert len(texts) >= 3 and all(whole.startswith(text.strip()) for text in texts)  # it grew as it was made
        assert whole.startswith(said.strip()) and (len(said) < len(whole)) == bool(way)


def test_refused_file_says_why_and_the_chat_goes_on(page, tmp_path):
    set_longest(page, 4)
    upload(page, 1)
    files = [("notes.pdf", b"%PDF-1.4"), ("cut.png", png(1)[:300]), ("big.jpg", bytes((50 << 20) + 1))]
    for name, data in files:
        (tmp_path / name).write_bytes(data)
        page.set_input_files("#files", tmp_path / name)
    for text in ("notes.pdf: not a picture of a format", "cut.png: image cannot be read", "big.jpg: larger than 50 MB"):
        page.wait_for_selector(f".toast:has-text('{text}')")
    assert page.locator("#waiting figure").count() == 1
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    assert ended(page) is not None and page.locator(".failure").count() == 0
    page.fill("#question", "a <image> here")
    page.press("#question", "Enter")
    page.wait_for_selector(".failure:has-text('stands for a picture')")
    page.click("text=Take back")
    assert page.input_value("#question") == "a <image> here" and page.locator(".turn").count() == 1


def test_keyboard_and_files_that_are_pasted_or_dropped(page):
    set_longest(page, 4)
    page.type("#question", "one")
    page.press("#question", "Shift+Enter")
    page.type("#question", "two")
    assert page.input_value("#question") == "one\ntwo" and page.locator(".turn").count() == 0
    for kind, holder in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(
            """([kind, holder, data]) => {
                const files = new DataTransfer();
                files.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], `${kind}.png`));
                const event = new Event(kind, { bubbles: true, cancelable: true });
                Object.defineProperty(event, holder, { value: files });
                document.getElementById("question").dispatchEvent(event);
            }""",
            [kind, holder, base64.b64encode(png(3)).decode()],
        )
        page.wait_for_selector(f"#waiting figcaption:has-text('{kind}.png')")
    page.press("#question", "Enter")
    ended(page)
    assert page.locator(".turn .question > p").text_content() == "one\ntwo"
    assert page.locator(".turn figure").count() == 2
    page.reload()
    assert ended(page) is not None and page.locator(".turn figure .canvas").count() == 2


def test_phone_shows_all_of_it_without_scrolling_sideways(page):
    page.set_viewport_size({"width": 390, "height": 780})
    assert sideways(page) == 0
    set_longest(page, 30)
    upload(page, 1, 2)
    page.fill("#question", "word" * 100 + "\n" + "a long line of words " * 20)
    assert sideways(page) == 0
    page.click("#send")
    ended(page)
    page.click(".show-prompt")
    page.set_input_files("#files", [{"name": "n" * 80 + ".txt", "mimeType": "text/plain", "buffer": b"text"}])
    page.wait_for_selector(".toast")
    assert sideways(page) == 0
    page.locator(".open").first.click()
    assert sideways(page) == 0 and page.locator("dialog[open] .canvas").is_visible()


def test_models_can_be_chosen_while_a_run_writes_them(page, run_dir, chat):
    set_longest(page, 12)
    shutil.copytree(run_dir / "model", run_dir / "model-step-300.tmp")
    page.select_option("#model", "adapter")
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    adapted = ended(page)
    chat.reset()
    assert adapted != "" and not chat.ask(QUESTION, [], lambda piece: None).startswith(adapted)
    assert page.locator("#model option").all_text_contents() == ["model", "adapter", "model-step-100", "model-step-20"]
    (run_dir / "model-step-300.tmp").rename(run_dir / "model-step-300")
    page.wait_for_selector(".toast:has-text('Can be chosen now: model-step-300')")
    assert page.input_value("#model") == "adapter"
    shutil.rmtree(run_dir / "model-step-300")


def test_other_sites_and_names_are_refused(url):
    where = urlsplit(url).netloc
    cases = [({}, 200), ({"Origin": f"http://{where}"}, 200), ({"Origin": "http://other.example"}, 403)]
    for headers, expected in [*cases, ({"Host": "other.example"}, 400), ({"Origin": "null"}, 403)]:
        connection = http.client.HTTPConnection(where)
        connection.request("GET", "/models", headers=headers)
        assert connection.getresponse().status == expected, headers
