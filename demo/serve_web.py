"""Serve demo/web on localhost, with the shipped networks and ONNX Runtime Web in its folder files.

    python demo/serve_web.py [--port 8000]

Afterwards demo/web can be copied to any static host. Without npm the page loads ONNX Runtime Web from a CDN.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import List, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from aethersr.commands import Parser, exit_code  # noqa: E402
from aethersr.errors import UserError  # noqa: E402

WEIGHTS = ROOT / "weights"
FIRST = "2x_AetherNet_small_wallpapers_fp16.safetensors"  # what the page opens with
PAGE = ROOT / "demo" / "web"
FILES = PAGE / "files"
(VERSION,) = re.findall(r'VERSION = "(.+?)"', (PAGE / "worker.js").read_text(encoding="utf-8"))
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# Of ONNX Runtime Web, what the page loads: with WebGPU, and without.
RUNTIME = [f"ort.{engine}.min.mjs" for engine in ("wasm", "webgpu")]
RUNTIME += [f"ort-wasm-simd-threaded{kind}" for kind in (".mjs", ".wasm", ".asyncify.mjs", ".asyncify.wasm")]


def export_networks() -> None:
    """An ONNX file for every fused network in weights/, and their list, which the page reads."""
    names = []
    for weights in sorted(WEIGHTS.glob("*.safetensors"), key=lambda path: (path.name != FIRST, path.name)):
        if "_training_" in weights.name:
            continue
        file = FILES / f"{weights.stem.replace('_fp16', '_fp32')}.onnx"
        names.append(file.name)
        if file.is_file() and file.stat().st_mtime >= weights.stat().st_mtime:
            continue
        print(f"Exporting {weights.name} for the page ...", flush=True)
        import torch  # takes seconds, so not before there is work
        from aether_arch import export_onnx

        from aethersr import aether_from_state_dict, read_checkpoint

        torch.set_num_threads(1)  # more help little, and wait for each other on a busy machine
        network = aether_from_state_dict(read_checkpoint(weights).state)
        licence = {"license": "CC-BY-SA-4.0"}
        export_onnx(network, network.scale, output_path=str(file), simplify=True, metadata=licence)
    (FILES / "networks.json").write_text(json.dumps(names), encoding="utf-8")


def fetch_runtime() -> Optional[str]:
    """ONNX Runtime Web from npm into files/, unless it is there. What is in the way, or None."""
    if all((FILES / name).is_file() for name in RUNTIME):
        return None
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    print(f"Fetching ONNX Runtime Web {VERSION} from npm ...", flush=True)
    with tempfile.TemporaryDirectory(dir=FILES) as folder:
        command = [npm, "pack", "--silent", f"onnxruntime-web@{VERSION}", "--pack-destination", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        packed = next(Path(folder).glob("*.tgz"), None)
        if packed is None:
            return f"npm pack failed: {(done.stdout.strip() or 'no message').splitlines()[-1]}"
        if base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode() != SHA512:
            return f"npm gave another onnxruntime-web {VERSION} than serve_web.py expects (SHA-512)"
        shutil.unpack_archive(packed, folder)
        for name in RUNTIME:
            (Path(folder) / "package" / "dist" / name).replace(FILES / name)
    return None


class Handler(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        """With these two a browser gives a page several threads."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_request(self, *_: object) -> None:
        """Errors alone are worth a line."""


def serve(port: int) -> None:
    for ending in (".js", ".mjs"):
        mimetypes.add_type("text/javascript", ending)  # Windows has other ideas
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(PAGE)))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip(".")
        raise UserError(f"--port {port} can't be used: {reason}; pass another one, or 0 for any.") from None
    FILES.mkdir(exist_ok=True)
    export_networks()
    problem = fetch_runtime()
    if problem:
        print(f"{problem}; the page will load ONNX Runtime Web {VERSION} from a CDN.", file=sys.stderr)
    print(f"Open http://localhost:{server.server_port}/ in a browser. Ctrl+C ends it.", flush=True)
    server.serve_forever()


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser("serve_web.py", __doc__)
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free (default: 8000)")
    return exit_code("serve_web.py", lambda: serve(parser.parse(argv).port), "the page is no longer there.")


if __name__ == "__main__":
    sys.exit(main())
