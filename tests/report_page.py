"""A report as a browser would read it, and what a browser makes of its script: what the tests of ``report`` look at."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{data}} &amp; \u2028 \\boxed{7}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a browser would make of the page: elements, text outside of scripts, the data, and unbalanced tags."""

    VOID = ("meta", "input", "br", "img", "link")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.script = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        body = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)
        assert body is not None
        self.data = json.loads(body[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        self.runs = self.data["runs"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        elif not (self.open and self.open[-1] == "style"):
            self.text += f" {data}"

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def drawn(path: Path, profile: Path) -> str:
    """The page's markup after its script has run in a browser, which must not have complained."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={profile} --window-size=1280,900"
    flags += " --virtual-time-budget=2000 --enable-logging=stderr --dump-dom"
    done = subprocess.run([str(BROWSER), *flags.split(), path.as_uri()], capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def charts_of(markup: str) -> dict[str, str]:
    """Each chart's markup by its title."""
    charts = re.findall(r'<div class="card chart"[^>]*>(.*?)<div class="tip"', markup, re.DOTALL)
    return {re.sub(r"<[^>]+>", "", re.findall(r"<h3.*?</h3>", chart)[0]): chart for chart in charts}
