"""Pages as a browser shows them."""

import base64
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")

# true once the page stands and, where it plays clips, all that is in view has its pictures
READY = """new Promise((done) => {
  const settled = () => document.readyState === "complete" && (typeof load !== "function" ||
    all.some((one) => one.seen) && all.every((one) => !one.seen ||
      Object.values(one.pictures).every((picture) => picture.complete)));
  const look = () => settled()
    ? requestAnimationFrame(() => requestAnimationFrame(() => done(true)))
    : setTimeout(look, 20);
  look();
})"""


class Tab:
    """A page in Chromium, over the DevTools protocol: waits for what a page does, not for time."""

    def __init__(self, to_browser, from_browser):
        self._to, self._from, self._rest, self._calls, self.said = (
            to_browser,
            from_browser,
            b"",
            0,
            [],
        )
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=1400, height=900,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip

    _session = None

    def call(self, method, **params):
        """What the browser answers; what its console says meanwhile is kept in ``said``."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            event = self._next(method)
            if event.get("id") == self._calls:
                assert "error" not in event, event
                return event["result"]
            if event.get("method") in (
                "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"
            ):  # fmt: skip
                self.said.append(json.dumps(event["params"]))

    def _next(self, method, seconds=110):
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            left = end - time.monotonic()
            assert left > 0 and select.select([self._from], [], [], left)[0], f"no end of {method}"
            part = os.read(self._from, 1 << 20)
            assert part, f"the browser ended in {method}"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def run(self, script):
        """The value of a script, or of the promise that it is."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, page, fragment=""):
        self.call("Page.navigate", url=f"{page.as_uri()}#{fragment}")
        self.run(READY)

    def pixels(self):
        """The window's pixels, (900, 1400, 3)."""
        data = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@contextlib.contextmanager
def tab(page, folder, fragment=""):
    """The page, opened, with a profile in ``folder``."""
    # the browser reads its descriptor 3 and writes 4
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    options = (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update",
        "--remote-debugging-pipe", f"--user-data-dir={folder}",
    )  # fmt: skip
    browser = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", CHROMIUM, *options],
        pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        one = Tab(ours_out, ours_in)
        one.open(page, fragment)
        yield one
        one.call("Browser.close")
    finally:
        browser.kill()
        browser.wait()
        os.close(ours_out)
        os.close(ours_in)


def chromium(page, folder, fragment=""):
    """The page's DOM after its script, and what the console said."""
    with tab(page, folder, fragment) as one:
        return one.run("document.documentElement.outerHTML"), one.said


def screenshot(page, folder, fragment=""):
    """The page's pixels, (900, 1400, 3), and what the console said."""
    with tab(page, folder / "profile", fragment) as one:
        return one.pixels(), one.said
