"""A page in a real browser, Chromium without a window, through its debugging pipe: no package is needed.

    python benchmarks/browser.py RUN/report.html --out shots

prints what opening takes, requests, errors of the console and the page's weight, tries sorting, the filter and the
theme, and with `--out` writes screenshots (light, dark, narrow) and the page as PDF.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--disable-extensions")


def find_browser() -> str | None:
    """The program, which the variable CHROMIUM may name."""
    return os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser. `events` holds what it reported."""

    def __init__(self, read: int, write: int) -> None:
        self._in, self._out = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self._left = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """Closes both ends of the pipes that are ours."""
        self._in.close()
        self._out.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol; events that come before it are kept."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": parameters, **session}
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._in.fileno(), 2**20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def open(self, page: Path) -> float:
        """Opens a file; the seconds until all of it is there and laid out."""
        self.events.clear()
        began = time.monotonic()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self.run("document.readyState + location.protocol") != "completefile:":
            time.sleep(0.01)
        self.run("document.body.offsetHeight")
        return time.monotonic() - began

    @property
    def requests(self) -> list[str]:
        """What the page asked for, itself and its `data:` apart."""
        asked = (
            each["params"]["request"]["url"]
            for each in self.events
            if each.get("method") == "Network.requestWillBeSent"
        )
        return [url for url in asked if not url.startswith(("file:", "data:"))]

    @property
    def errors(self) -> list[str]:
        """Exceptions, and what the console was told."""
        wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(each["params"]) for each in self.events if each.get("method") in wrong]

    def screenshot(self, file: Path, width: int, height: int) -> None:
        """Writes the top of the page as PNG."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A browser with one page, which is gone when the block ends."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()

    def connect() -> None:
        os.dup2(theirs_in, 3)
        os.dup2(theirs_out, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4, theirs_in, theirs_out),
            preexec_fn=connect,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        page = Browser(ours_in, ours_out)
        try:
            yield page
        finally:
            process.terminate()
            process.wait()
            page.close()


SORTED = """(() => {
  const table = document.getElementById("layers");
  const button = [...table.querySelectorAll("thead button")].find((each) => each.textContent === "MACs");
  button.click(); button.click();
  const column = button.closest("th").cellIndex;
  const shown = [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.value ?? -1));
  return shown.every((value, index) => index === 0 || shown[index - 1] >= value)
    && button.closest("th").getAttribute("aria-sort") === "descending";
})()"""

FILTERED = """(() => {
  const box = document.querySelector("input[data-filters=layers]");
  const rows = [...document.getElementById("layers").tBodies[0].rows];
  box.value = rows[0].cells[0].textContent; box.dispatchEvent(new Event("input"));
  const few = rows.filter((row) => !row.hidden).length;
  const told = document.getElementById("layers-shown").textContent;
  box.value = ""; box.dispatchEvent(new Event("input"));
  return few >= 1 && few < rows.length && told === `${few} of ${rows.length} shown` && rows.every((row) => !row.hidden);
})()"""

THEMED = """(() => {
  const paper = () => getComputedStyle(document.body).backgroundColor;
  const before = paper();
  document.getElementById("theme").click();
  const after = paper();
  document.getElementById("theme").click();
  return before !== after && paper() === before;
})()"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    program = find_browser()
    if program is None:
        raise SystemExit("no Chromium is installed; name one in the variable CHROMIUM")
    with browser(program) as page:
        for file in args.pages:
            page.open(file)
            took = min(page.open(file) for _ in range(3))
            tried = {
                name: page.run(script)
                for name, script in (("sorts", SORTED), ("filters", FILTERED), ("themes", THEMED))
            }
            print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, opens in {took:.2f} s, {len(page.requests)} requests, "
                  f"{len(page.errors)} errors, {tried}, PDF {len(page.pdf()) / 1e6:.2f} MB")  # fmt: skip
            if args.out:
                _shots(page, args.out, file.parent.name)


def _shots(page: Browser, out: Path, name: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for scheme, width in (("light", 1280), ("dark", 1280), ("narrow", 400)):
        features = [{"name": "prefers-color-scheme", "value": "dark" if scheme == "dark" else "light"}]
        page.call("Emulation.setEmulatedMedia", features=features)
        page.screenshot(out / f"{name}-{scheme}.png", width, 1600)
    (out / f"{name}.pdf").write_bytes(page.pdf())


if __name__ == "__main__":
    main()
