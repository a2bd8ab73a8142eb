"""Headless Chromium, told what to do over DevTools' pipe: no package is needed for that."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

PROGRAM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 300  # seconds; a machine may be busy with other things
QUIET = ["gpu", "quic", "background-networking", "component-update", "sync"]
KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39}


class Chromium:
    """One page. No name is resolved but localhost, so the page has no network.

    ``served`` gives the bytes of an address that seems to be out there.
    """

    def __init__(self, folder: Path, *flags: str, served: Callable[[str], bytes] | None = None) -> None:
        assert PROGRAM is not None
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        # It takes 3 and 4 for reading and writing, which may be in use here.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read, write)]
        os.close(read)
        os.close(write)
        start = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        words = [PROGRAM, "--headless", "--no-first-run", "--remote-debugging-pipe"]
        words += [f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"]
        words += [f"--disable-{name}" for name in QUIET if name != "gpu" or not flags]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []
        self._process = subprocess.Popen(
            [sys.executable, "-c", start.format(*theirs), *words, *flags],
            pass_fds=theirs,
            stderr=subprocess.DEVNULL,
        )
        for fd in theirs:
            os.close(fd)
        self._rest, self._count, self._session, self._served = b"", 0, "", served
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        if served:
            self.call("Fetch.enable", patterns=[{"urlPattern": "https://*"}])
        for domain in ("Page", "Runtime", "DOM", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._write)  # it ends when the pipe does
        self._process.wait(30)
        os.close(self._read)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], PATIENCE)[0], "Chromium does not answer"
            got = os.read(self._read, 2**20)
            assert got, "Chromium has ended"
            self._rest += got
        message, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(message))

    def _send(self, method: str, **parameters: Any) -> int:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.", "Fetch.")):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._count

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol and its answer; events on the way are kept."""
        number = self._send(method, **parameters)
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            if answer.get("method") == "Fetch.requestPaused":
                self._serve(answer["params"]["requestId"], answer["params"]["request"]["url"])
            elif "method" in answer:
                self.events.append(answer)

    def _serve(self, request: str, address: str) -> None:
        assert self._served is not None
        kind = "text/javascript" if address.endswith("js") else "application/wasm"
        headers = {"Content-Type": kind, "Access-Control-Allow-Origin": "*"}
        headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        self._send(
            "Fetch.fulfillRequest",
            requestId=request,
            responseCode=200,
            responseHeaders=[{"name": name, "value": value} for name, value in headers.items()],
            body=base64.b64encode(self._served(address)).decode(),
        )

    def js(self, code: str) -> Any:
        """The value of an expression; a promise is awaited."""
        told = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.js(condition):
            assert time.monotonic() < end, f"{condition}: {self.js('document.body.innerText')}"
            time.sleep(0.05)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(address)}")

    def choose(self, selector: str, file: Path) -> None:
        """As if a person had chosen the file in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def press(self, key: str) -> None:
        words = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **words, text="\r" if key == "Enter" else "")
        self.call("Input.dispatchKeyEvent", type="keyUp", **words)
