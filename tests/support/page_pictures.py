"""Makes the pictures of scripts/chat.py's page: scripts/pictures/page.webp and scripts/pictures/phone.webp.

    python scripts/chat.py --model demo/finetune --web
    python tests/support/page_pictures.py demo/digits/images/held_out/000/000000.png \
        demo/digits/images/held_out/000/000005.png --out scripts/pictures

Needs Chromium and playwright, see tests/commands/test_chat_page.py.
"""

import argparse
import io
import os
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

SIZES = {"page": (1000, 720, "light"), "phone": (390, 844, "dark")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pictures", nargs=2, help="the first is asked about, the second waits for its question")
    parser.add_argument("--question", default="What number is written?")
    parser.add_argument("--url", default="http://127.0.0.1:7860/")
    parser.add_argument("--browser", default=os.environ.get("LLAVA_NEXT_BROWSER", "/usr/bin/chromium"))
    parser.add_argument("--out", type=Path, required=True, help="folder")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        for name, (width, height, scheme) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            shown = Image.open(io.BytesIO(talk(page, options)))
            shown.convert("RGB").save(options.out / f"{name}.webp", quality=85, method=6)
            page.close()


def talk(page: Page, options: argparse.Namespace) -> bytes:
    """A question with its answer and prompt, and the next picture, as PNG."""
    page.goto(options.url)
    page.wait_for_selector("#model option", state="attached")
    for number, picture in enumerate(options.pictures):
        page.set_input_files("#files", picture)
        page.wait_for_selector("#waiting figure.sight:not(.loading)")
        if number == 0:
            page.fill("#question", options.question)
            page.press("#question", "Enter")
            page.click(".show-prompt")
    page.fill("#question", "And what is written here?")
    page.locator("#chat").evaluate("(chat) => { chat.scrollTop = chat.scrollHeight; }")
    return page.screenshot()


if __name__ == "__main__":
    main()
