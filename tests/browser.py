"""Pages in a real headless Chromium, through the DevTools protocol: what is drawn, what overflows, what is fetched."""

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

# Wide and narrow, light and dark: (width in pixels, prefers-color-scheme).
VIEWS = ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark"))
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
    "--remote-allow-origins=*",
)
# What sticks out of the page although nothing around it scrolls or is folded away.
_STICKS_OUT = """
[...document.querySelectorAll("main *")].filter(e => {
  const box = e.getBoundingClientRect();
  const out = box.width && box.right > document.documentElement.clientWidth + 1;
  return out && !e.closest(".scroll, .diagram, pre, figure");
}).map(e => e.tagName + " " + e.textContent.slice(0, 40))
"""
# Contrast of every text of a plot, and of every filled shape, against the page: the ratio of WCAG 2.1.
_CONTRASTS = """
(() => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = colour => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = colour => { const l = light(colour); return (Math.max(l, paper) + .05) / (Math.min(l, paper) + .05); };
  const of = (select, what) => [...document.querySelectorAll(select)].map(e => getComputedStyle(e)[what])
    .filter(c => c !== "none").map(ratio);
  return {text: of("main > figure text, main figure > svg[role] text", "fill"),
          shapes: of("main figure > svg[role] [style*='fill: var(--s']", "fill")};
})()
"""


class Chromium:
    """One browser with one page."""

    def __init__(self, binary: str, profile: Path):
        self.process = subprocess.Popen(
            [binary, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.requested: list[str] = []
        self._calls = 0
        self._socket = self._connect(profile / "DevToolsActivePort")
        self.call("Page.enable")
        self.call("Network.enable")

    def _connect(self, told: Path):
        import websocket

        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
                port = told.read_text().split()[0]
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
                    page = next(entry for entry in json.load(answer) if entry["type"] == "page")
                return websocket.create_connection(page["webSocketDebuggerUrl"], timeout=120)
            time.sleep(0.1)
        self.process.kill()
        raise ChildProcessError(f"{self.process.args[0]} is there, but did not start")

    def call(self, method: str, **parameters):
        """The result of a DevTools command; addresses that the page asks for meanwhile are noted."""
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("id") == self._calls:
                assert "error" not in message, (method, message)
                return message["result"]

    def run(self, code: str):
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def show(self, page: Path, width: int, scheme: str) -> None:
        """Opens a page at a width, in light or dark, unfolds everything and waits until the diagrams are drawn."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.requested.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._wait("document.readyState === 'complete' && location.protocol === 'file:'")
        self.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        self._wait("[...document.querySelectorAll('.diagram-block')].every(b => b.querySelector('.diagram svg'))")

    def _wait(self, condition: str, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"still waiting for: {condition}"
            time.sleep(0.1)

    def close(self) -> None:
        self._socket.close()
        self.process.terminate()
        self.process.wait(30)


@contextlib.contextmanager
def chromium():
    """A running browser; skips the test where there is none."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    pytest.importorskip("websocket", reason="the DevTools protocol needs websocket-client (extra [test])")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        try:
            browser = Chromium(binary, Path(profile))
        except ChildProcessError as error:  # such as the stub that stands for a snap, or a box without shared memory
            pytest.skip(str(error))
        try:
            yield browser
        finally:
            browser.close()


def check_page(browser: Chromium, page: Path, diagrams: int) -> None:
    """At every width, in light and dark: nothing sticks out, everything is drawn and legible, nothing fetched."""
    for width, scheme in VIEWS:
        browser.show(page, width, scheme)
        where = f"{page.name} at {width} in {scheme}"
        wide = browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{where}: {wide} pixels too wide"
        assert browser.run(_STICKS_OUT) == [], where
        drawn = browser.run(
            "[...document.querySelectorAll('.diagram svg')].map(s => s.querySelectorAll('.node').length)"
        )
        assert len(drawn) == diagrams and all(count > 1 for count in drawn), f"{where}: boxes drawn {drawn}"
        contrasts = browser.run(_CONTRASTS)
        assert min(contrasts["text"], default=21) >= 4.5, f"{where}: text of a plot is too faint"
        assert min(contrasts["shapes"], default=21) >= 3, f"{where}: a shape of a plot is too faint"
        small = browser.run(
            "Math.min(99, ...[...document.querySelectorAll('figure > svg[role] text, figure .plot text')]"
            ".map(t => t.getBoundingClientRect().height))"
        )
        assert small >= 8, f"{where}: text of a plot is {small:.1f} pixels high"
        assert [url for url in browser.requested if not url.startswith(("file:", "data:"))] == [], where
