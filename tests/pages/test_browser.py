"""Every page in a browser, on a desk and on a telephone, by day and by night: nothing amiss that a reader would see."""

from __future__ import annotations

import io
import shutil
from collections import defaultdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from tests.pages.browser import Browser, find_chromium
from tests.pages.contents import PAGES, ROOT

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; `bash scripts/pages-check` installs one"),
    pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="an installed package has no studies"),
]
DESK, TELEPHONE, SHEET = 1280, 390, 720
BYTES = 1_000_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(str(CHROMIUM), tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def unpainted(browser: Browser) -> list[str]:
    """Curves whose colour is not in the picture at most of their markers."""
    markers = browser.run("painted()")
    if not markers:
        return []
    pixels = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
    hits: dict[str, list[bool]] = defaultdict(list)
    for series, x, y, color in markers:
        around = pixels[max(0, int(y) - 3) : int(y) + 4, max(0, int(x) - 3) : int(x) + 4].astype(int)
        if around.size:
            hits[series].append(bool(np.abs(around - color).sum(-1).min() < 60))
    return [f"not in the picture: {series}" for series, found in hits.items() if 3 <= len(found) > 2 * sum(found)]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_sound(browser, tmp_path, name):
    path = PAGES[name](tmp_path)
    site = name.startswith("site/")
    problems = [] if path.stat().st_size <= BYTES else [f"{path.stat().st_size:,} bytes"]
    browser.look(DESK)
    loaded = browser.load(path)
    browser.run((Path(__file__).parent / "inspect.js").read_text("utf-8"))
    browser.run("for (const each of document.querySelectorAll('details')) each.open = true")
    browser.press("Tab", 9)  # from here on the browser shows focus
    problems += browser.run("outline()")
    problems += [] if site else browser.run("words()")
    found = browser.run("curves()")
    problems += found["problems"]
    if not site and name not in ("study-scheme-table", "figures") and not (found["lines"] and found["points"]):
        problems.append("no curve was compared with its numbers")
    for width, dark in ((DESK, False), (DESK, True), (TELEPHONE, True), (TELEPHONE, False)):
        browser.look(width, dark=dark)
        problems += [f"{width} {'dark' if dark else 'light'}: {each}" for each in browser.run("inspected()")]
        problems += unpainted(browser) if dark and width == DESK else []
    browser.look(SHEET, media="print")
    problems += [f"printed: {each}" for each in browser.run("inspected()")]
    problems += browser.run("sorted()")
    problems += loaded.complaints
    problems += [
        f"requested {url}"
        for url in loaded.requests
        if not url.startswith(("data:", "file:" if site else path.as_uri()))
    ]
    assert problems == [], "\n".join(problems)


class Lost(SimpleHTTPRequestHandler):
    """Serves a folder, and its `site/404.html` for what is not there, as hosts of static pages do."""

    def send_error(self, code, message=None, explain=None):
        body = (Path(self.directory) / "site" / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *words):
        pass


def test_a_wrong_address_leads_to_the_start_of_a_site_in_a_folder(browser, tmp_path):
    (tmp_path / "site").mkdir()
    shutil.copy(ROOT / "scripts" / "404.html", tmp_path / "site")
    (tmp_path / "site" / "iframe-worker.js").touch()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Lost, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.load(f"http://127.0.0.1:{server.server_port}/site/guide/deep/gone.html")
        script = "new Promise(r => setInterval(() => document.links.length && r(document.links[0].pathname), 20))"
        assert browser.run(script) == "/site/index.html"
    finally:
        server.shutdown()
        server.server_close()
