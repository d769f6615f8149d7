"""Chromium for the tests of what people see, and everything that a page complains about.

A test file marks itself `pytestmark = pytest.mark.browser` and takes the fixtures `browser` and `site` (conftest.py). Without playwright,
Chromium or the built site its tests are skipped and say what is missing; where DEVSKY_BROWSER=required, as in .ci/run, they fail instead.
"""
import os, shutil, threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

SITE = Path(__file__).resolve().parents[1] / "_docs"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def unavailable(reason):
    "Skip the test, or fail it where the browser tests must run."
    (pytest.fail if os.environ.get("DEVSKY_BROWSER") == "required" else pytest.skip)(reason)


@contextmanager
def chromium():
    "A running Chromium of this machine, without a window."
    try: from playwright.sync_api import sync_playwright
    except ImportError: unavailable("playwright is not installed: `make browser` installs it and runs these tests")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None: unavailable("no Chromium on PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try: yield browser
        finally: browser.close()


@contextmanager
def open_page(browser, **options):
    """A page in a context of its own, and the list of its complaints: console errors, uncaught exceptions, failed requests, and
    requests that would leave this machine (they are refused). `options` go to `browser.new_context`, e.g. viewport, color_scheme.
    """
    context = browser.new_context(**options)
    page, complaints = context.new_page(), []

    def local(route):
        url = urlsplit(route.request.url)
        if url.scheme in ("data", "blob", "file") or url.hostname in ("localhost", "127.0.0.1"): return route.continue_()
        complaints.append(f"left the machine: {route.request.url}")
        route.abort()

    context.route("**/*", local)
    page.on("console", lambda m: m.type == "error" and complaints.append(f"console: {m.text}"))
    page.on("pageerror", lambda e: complaints.append(f"exception: {e}"))
    page.on("requestfailed", lambda r: complaints.append(f"failed: {r.url} {r.failure}"))
    page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status}: {r.url}"))
    try: yield page, complaints
    finally: context.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@contextmanager
def served_site():
    "The address of the built site, served from this machine."
    built, sources = SITE / "index.html", [p for p in SITE.with_name("nbs").rglob("*") if p.suffix in (".ipynb", ".qmd", ".js", ".css") and "checkpoint" not in p.name]
    if not built.exists() or max(p.stat().st_mtime for p in sources) > built.stat().st_mtime:
        unavailable("the site is not built, or older than nbs/: `make browser` builds it and runs these tests")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try: yield f"http://127.0.0.1:{server.server_port}/"
        finally: server.shutdown()
