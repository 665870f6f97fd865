"""The picture of the chat page, docs/chat-page.png: mimo-nano answers two commands in a browser.

    python tools/page_picture.py BUNDLE [--ram 400MiB]

Needs Chromium and its driver, a font with Chinese characters, and the extra dev.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path

from chromium import chromium
from PIL import Image

from mimo_edge.api import Runtime
from mimo_edge.nano.commands import DEMO_TOOLS
from mimo_edge.serve.limits import Limits
from mimo_edge.serve.server import bind, make_server, url_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "chat-page.png"
COMMANDS = ("把客厅的灯调暗一点", "turn on guest wifi for two hours")
_WAIT_S = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--ram", default="400MiB")
    options = parser.parse_args()
    bound, local = bind("127.0.0.1", 0, None, False)
    with bound, Runtime.open(options.bundle, ram=options.ram) as runtime:
        limits = Limits(concurrent=1, conversations=runtime.planned_conversations or 1)
        server = make_server(runtime, limits=limits, local=local, thinking=False, tools=DEMO_TOOLS)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            picture = _talk(url_of(bound))
        finally:
            server.should_exit = True
            thread.join()
    # The page has few colours: a palette keeps the file small.
    Image.open(BytesIO(picture)).convert("RGB").quantize(64).save(PAGE, optimize=True)


def _talk(url: str) -> bytes:
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as driver:
        driver.set_window_size(860, 860)
        driver.get(f"{url}/")
        for number, command in enumerate(COMMANDS, 1):
            field = driver.find_element("id", "text")
            field.send_keys(command, "\n")
            _until(driver, f"document.querySelectorAll('.call').length == {number}")
            _until(driver, "!!document.querySelector('form.results button')")
            driver.find_element("css selector", "form.results button").click()
            _until(driver, f"document.querySelectorAll('.assistant').length == {2 * number}")
            _until(driver, "!document.querySelector('.waiting')")
        time.sleep(0.5)  # the last statistics
        return bytes(driver.get_screenshot_as_png())


def _until(driver: object, condition: str) -> None:
    end = time.monotonic() + _WAIT_S
    while not driver.execute_script(f"return {condition}"):  # type: ignore[attr-defined]
        if time.monotonic() > end:
            raise SystemExit(f"the page never had {condition}")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
