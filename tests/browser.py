"""A browser without a window, driven through its pipe: nothing has to be installed but Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A page in Chromium; `do(script)` runs a script in it and returns its value.

    A page is open when something of it, that `mark` selects, stands there.
    """

    def __init__(self, page: str, width: int = 1200, mark: str = ".card") -> None:
        self._mark = mark
        to_browser, self._send = os.pipe()
        self._receive, from_browser = os.pipe()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.set_inheritable(to_browser, True)
        os.set_inheritable(from_browser, True)
        # Chromium reads its pipe at descriptor 3 and answers at 4
        shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            [
                *("bash", "-c", shell, str(CHROMIUM), "--headless", "--no-sandbox"),
                *("--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"),
                *(f"--window-size={width},900", "--disable-gpu", "about:blank"),
            ],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number = 0
        self._session: str | None = None
        self._rest = b""
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.open(page)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._send)
        os.close(self._receive)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "result" in answer, answer
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._receive, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def open(self, page: str) -> float:
        """Open a page and return after how many seconds its mark stood there."""
        self.call("Page.navigate", url="about:blank")
        began = time.monotonic()
        self.call("Page.navigate", url=page)
        while time.monotonic() - began < 30:
            if self.do(f"document.querySelectorAll('{self._mark}').length"):
                return time.monotonic() - began
            time.sleep(0.02)
        raise AssertionError(f"{page}: no {self._mark} within 30 s")

    def wait_for(self, script: str, seconds: float = 120) -> Any:
        """Run a script until it returns something, and return that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.do(script):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{script}: nothing within {seconds} s")

    def wait_until(self, true: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds} s"
            time.sleep(0.1)

    def do(self, script: str) -> Any:
        """Return the value of a script; what it throws is an error here."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Look at the page in a window of so many pixels; `scale` makes pictures of it smaller or larger."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def press(self, key: str) -> None:
        """Press a key."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def draw(self, file: Path) -> None:
        """Write a picture of what is seen."""
        import base64

        drawn = self.call("Page.captureScreenshot")["data"]
        file.write_bytes(base64.b64decode(drawn))


# the label of a field is around it, that of a slider beside it
_FIELD = """(label => label.querySelector('textarea, input')
  || label.closest('.block').querySelector('input'))(
  [...document.querySelectorAll('label')]
    .filter(label => label.offsetParent)
    .find(label => label.innerText.trim().startsWith('%s')))"""
_WRITE = """(() => {
  const field = %s;
  Object.getOwnPropertyDescriptor(field.constructor.prototype, 'value').set.call(field, '%s');
  field.dispatchEvent(new Event('input', {bubbles: true}));
})()"""
# tabs are buttons, too, and stand there twice: seen, and measured
_BUTTON = """[...document.querySelectorAll('button')]
  .filter(button => button.offsetParent && !button.closest('.tab-wrapper'))
  .find(button => button.innerText.split('\\n')[0].trim() == '%s')"""
_TAB = """[...document.querySelectorAll('button[role=tab]')]
  .find(tab => tab.offsetParent && tab.innerText.trim() == '%s')"""
_MORE = """(() => {
  const more = document.querySelector('.overflow-menu button');
  if (more && more.offsetParent) more.click();
})()"""
_IN_MENU = """[...document.querySelectorAll('.overflow-dropdown button')]
  .find(tab => tab.innerText.trim() == '%s')"""
# its first click, once it stands there
_EXAMPLE = """(() => {
  const drawn = [...document.querySelectorAll('button img[src*="%s"]')];
  const seen = drawn.find(image => image.offsetParent && image.naturalWidth);
  if (seen) seen.closest('button').click();
  return !!seen;
})()"""
_PICTURES = """[...document.querySelectorAll('img')].filter(i => i.offsetParent
  && i.closest('.image-frame, .image-container') && i.naturalWidth).length"""


class PageOfTabs(Browser):
    """The page of `mmedit ui`: its fields are found by their labels, its buttons and tabs by what stands on them."""

    def __init__(self, page: str) -> None:
        super().__init__(page, mark="button[role=tab]")

    def write(self, label: str, text: str) -> None:
        """Write into a field."""
        self.do(_WRITE % (_FIELD % label, text))

    def read(self, label: str, seconds: float = 120) -> str:
        """Return what stands in a field, once something does."""
        return str(self.wait_for((_FIELD % label) + ".value", seconds))

    def click(self, button: str) -> None:
        """Press a button, once it is seen."""
        self.wait_for(f"!!{_BUTTON % button}")
        self.do((_BUTTON % button) + ".click()")

    def tab(self, name: str) -> None:
        """Open a tab; where there is no room for it, it stands in a menu."""
        if not self.do(f"!!{_TAB % name}"):
            self.do(_MORE)
            self.wait_for(f"!!{_IN_MENU % name}")
            self.do((_IN_MENU % name) + ".click()")
            return
        self.do((_TAB % name) + ".click()")

    def choose(self, drawing: str) -> None:
        """Take one of the drawings to try as the picture."""
        self.wait_for(_EXAMPLE % drawing)
        self.wait_for(_PICTURES)

    def pictures(self) -> int:
        """Return how many pictures are shown in fields for one picture."""
        return int(self.do(_PICTURES))

    def files(self) -> int:
        """Return how many files were chosen in a field for several."""
        return int(self.do("document.querySelectorAll('.file-preview tr').length"))
