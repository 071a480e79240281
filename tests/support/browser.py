# SPDX-License-Identifier: Apache-2.0
"""A real chromium without a window, spoken to by its own protocol (CDP) through a pair of pipes: what a page shows,
where, in which colours, and what it asks for."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sessions import end_session

Json = dict[str, Any]
DEADLINE_S = 60.0

# Those after --user-data-dir keep it from speaking to the outside by itself.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-default-apps", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    def __init__(self, process: subprocess.Popen[bytes], read_fd: int, write_fd: int) -> None:
        self._process, self._read_fd, self._write_fd = process, read_fd, write_fd
        self._number = 0
        self._buffer = b""
        self.events: list[Json] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Json:
        """One request, and its answer; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: Json = answer["result"]
                return result
            self.events.append(answer)

    def wait_event(self, method: str, session: str) -> Json:
        while True:
            for event in self.events:
                if event.get("method") == method and event.get("sessionId") == session:
                    return event
            self.events.append(self._next())

    def _next(self) -> Json:
        deadline = time.monotonic() + DEADLINE_S
        while b"\0" not in self._buffer:
            assert select.select([self._read_fd], [], [], max(0, deadline - time.monotonic()))[0], (
                "chromium says nothing"
            )
            data = os.read(self._read_fd, 1 << 20)
            assert data, f"chromium has ended: {self._process.poll()}"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: Json = json.loads(text)
        return message


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """With a profile of its own, which is gone with it, and so are all of its processes."""
    with tempfile.TemporaryDirectory(prefix="postcopy-chromium-", ignore_cleanup_errors=True) as profile:
        requests, answers = os.pipe(), os.pipe()
        # (numbers that the shell's 3 and 4 are not among)
        for_child = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (requests[0], answers[1])]
        script = f'exec "$@" 3<&{for_child[0]} 4>&{for_child[1]}'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", "chromium", *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=for_child, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env={**os.environ, "HOME": profile},
        )  # fmt: skip
        try:
            for fd in (*for_child, requests[0], answers[1]):
                os.close(fd)
            yield Browser(process, answers[0], requests[1])
        finally:
            end_session(process)
            for fd in (answers[0], requests[1]):
                os.close(fd)


@contextlib.contextmanager
def open_page(browser: Browser, path: Path, *, scripts: bool = False) -> Iterator[Page]:
    """A file, to be looked at in any way (`Page.show`)."""
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    page = Page(browser, session, path.as_uri())
    page.call("Page.enable")
    page.call("Network.enable")
    page.call("Log.enable")
    page.call("Emulation.setScriptExecutionDisabled", value=not scripts)
    page.call("Page.navigate", url=page.url)
    browser.wait_event("Page.loadEventFired", session)
    try:
        yield page
    finally:
        browser.call("Target.closeTarget", targetId=target)


class Page:
    def __init__(self, browser: Browser, session: str, url: str) -> None:
        self._browser, self._session, self.url = browser, session, url

    def call(self, method: str, **parameters: Any) -> Json:
        return self._browser.call(method, self._session, **parameters)

    def show(self, width: int, scheme: str, medium: str = "screen") -> None:
        """In a window of this width, light or dark, on a screen or on paper (print)."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=medium, features=features)

    def evaluate(self, expression: str) -> Any:
        """Ours, not the page's: scripts may be off there."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    @property
    def _events(self) -> list[Json]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    @property
    def requested(self) -> set[str]:
        """The addresses that the page has asked for; of one that is its own content the scheme only."""
        found = [
            event["params"]["request"]["url"]
            for event in self._events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return {"data:" if url.startswith("data:") else url for url in found}

    @property
    def complaints(self) -> list[str]:
        """What the browser has to say about it, as that the policy of the page forbids something."""
        return [event["params"]["entry"]["text"] for event in self._events if event.get("method") == "Log.entryAdded"]

    def screenshot(self, path: Path) -> None:
        import base64

        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))


TEXTS = """
(() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const background = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  let svgs = [...document.querySelectorAll('svg')];
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement, text = node.nodeValue.trim();
    if (!text || !element.checkVisibility()) continue;
    const svg = element.closest('svg'), style = getComputedStyle(element);
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = (svg ? element : range).getBoundingClientRect();
    found.push({text, x: box.left + scrollX, y: box.top + scrollY, width: box.width, height: box.height,
      size: svg ? parseFloat(style.fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width
        : parseFloat(style.fontSize),
      cut: !!svg && (box.left < svg.getBoundingClientRect().left || box.right > svg.getBoundingClientRect().right + 1),
      colour: svg ? style.fill : style.color, background: background(element), svg: svgs.indexOf(svg),
      scrolls: !!element.closest('.scroll'), tag: element.tagName.toLowerCase()});
  }
  return {texts: found, width: document.documentElement.scrollWidth, window: innerWidth};
})()
"""
"""Each visible text: where it is on the page, how large, in which colours."""


def contrast(one: str, other: str) -> float:
    """Of two colours as the browser writes them (WCAG 2)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    numbers = [float(part) for part in colour[colour.index("(") + 1 : -1].replace(",", " ").split()[:3]]
    parts = [value / 255 for value in numbers]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
