"""Serve demo/web on localhost, with the shipped weights and ONNX Runtime Web in its folder files.

    python demo/serve_web.py [--port 8000]

Afterwards demo/web can be copied to any static host. Without npm the page loads ONNX Runtime Web from a CDN.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from aethersr.checkpoint import read_checkpoint  # noqa: E402
from aethersr.files import Together  # noqa: E402
from aethersr.identify import aether_from_state_dict  # noqa: E402
from aethersr.onnx import export_onnx  # noqa: E402

PAGE = ROOT / "demo" / "web"
FILES = PAGE / "files"
WEIGHTS = ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors"
MODEL = FILES / "2x_AetherNet_small_wallpapers_fp32.onnx"
(VERSION,) = re.findall(r'VERSION = "(.+?)"', (PAGE / "worker.js").read_text(encoding="utf-8"))
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# Of the package, what the page loads: with WebGPU, and without.
RUNTIME = [f"ort.{engine}.min.mjs" for engine in ("wasm", "webgpu")]
RUNTIME += [f"ort-wasm-simd-threaded{kind}" for kind in (".mjs", ".wasm", ".asyncify.mjs", ".asyncify.wasm")]


def fetch_runtime() -> Optional[str]:
    """ONNX Runtime Web from npm into files/. What is in the way, or None."""
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", f"onnxruntime-web@{VERSION}", "--pack-destination", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        packed = next(Path(folder).glob("*.tgz"), None)
        if packed is None:
            return f"npm pack failed: {(done.stdout.strip() or 'no message').splitlines()[-1]}"
        if base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode() != SHA512:
            return f"onnxruntime-web {VERSION} has another hash than serve_web.py expects"
        with tarfile.open(packed) as archive, Together() as files:
            for name in RUNTIME:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None
                files.part(FILES / name).write_bytes(member.read())
            files.commit()
    return None


def prepare() -> Optional[str]:
    """Write what is missing in files/. What kept ONNX Runtime Web away, or None."""
    FILES.mkdir(exist_ok=True)
    if not MODEL.is_file() or MODEL.stat().st_mtime < WEIGHTS.stat().st_mtime:
        network = aether_from_state_dict(read_checkpoint(WEIGHTS).state)
        licence = {"license": "CC-BY-SA-4.0"}
        export_onnx(network, network.scale, output_path=str(MODEL), simplify=True, metadata=licence)
    return None if all((FILES / name).is_file() for name in RUNTIME) else fetch_runtime()


class Handler(SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012  Windows has other ideas
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        """With these two a browser gives a page several threads."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_request(self, *_: object) -> None:
        """Errors alone are worth a line."""


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free (default: 8000)")
    args = parser.parse_args(argv)
    problem = prepare()
    if problem:
        print(
            f"serve_web.py: {problem}; the page will load ONNX Runtime Web {VERSION} from a CDN.",
            file=sys.stderr,
        )
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), partial(Handler, directory=str(PAGE)))
    except OSError as error:
        parser.error(f"port {args.port} can't be used: {error.strerror}; pass another --port.")
    print(f"http://localhost:{server.server_port}/  (Ctrl+C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
