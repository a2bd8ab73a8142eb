"""The page of demo/web in real headless Chromium, without a network, against ONNX Runtime.

Needs Chromium (Debian's package `chromium`, or its path in the variable CHROMIUM) and npm.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, small_net
from PIL import Image
from skimage import data

from aethersr.onnx import export_onnx
from aethersr.upscaling import through_transparency

sys.path.insert(0, str(ROOT / "demo"))
import serve_web

chromium = pytest.importorskip("chromium", reason="needs pipes as POSIX has them")
needs_chromium = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="needs Chromium: apt install chromium, or CHROMIUM=its path"
)
SERVE = [sys.executable, str(ROOT / "demo" / "serve_web.py"), "--port", "0"]


def start(**environment: str) -> tuple[subprocess.Popen[str], str, str]:
    """The server, its address, and what it said before."""
    process = subprocess.Popen(
        SERVE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        address = re.match(r"http://localhost:\d+/", line)
        if address:
            return process, address[0], said
        said += line
    raise AssertionError(said)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the page with all that it needs beside it."""
    process, found, said = start()
    try:
        if said:
            pytest.skip(said.strip())
        yield found
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def page(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium.Chromium(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(address)
        opened.wait(f"{STATUS} === 'Ready.'")
        yield opened


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network x2 that sees no further than tiles overlap."""
    net = small_net(2, embed_dim=8, depths=(1,), use_channel_attn=False).float()
    return Path(export_onnx(net, 2, output_path=str(tmp_path_factory.mktemp("net") / "tiny.onnx")))


STATUS = "document.getElementById('status').textContent"
DONE = "document.body.dataset.state === 'done'"


def load(page: Any, network: Path) -> None:
    page.choose("#onnx", network)
    page.wait(f"{STATUS} === 'Ready.'")
    assert network.name in page.js("document.getElementById('network').textContent")


def upscaled(page: Any, picture: Path, scale: int = 2) -> np.ndarray:
    """Choose a picture, wait, save: what lies in the downloads."""
    page.choose("#file", picture)
    page.wait(DONE)
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(picture.parent))
    page.js("document.getElementById('save').click()")
    saved = picture.with_name(f"{picture.stem}_{scale}x.png")
    end = time.monotonic() + chromium.PATIENCE
    while not saved.exists():
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.05)
    with Image.open(saved) as image:
        return np.asarray(image).astype(np.float32)


def expected(network: Path, pixels: np.ndarray) -> np.ndarray:
    """ONNX Runtime on the whole picture: (H, W, 3) from 0 to 255 to the same, larger, not rounded."""
    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    output = session.run(None, {"input": (pixels / 255).transpose(2, 0, 1)[None].astype(dtype)})[0][0]
    return np.asarray(output, np.float32).transpose(1, 2, 0).clip(0, 1) * 255


def photograph(folder: Path, width: int, height: int, name: str = "photo.png") -> Path:
    Image.fromarray(data.astronaut()).crop((150, 40, 150 + width, 40 + height)).save(folder / name)
    return folder / name


def check(page: Any, network: Path, picture: Path, scale: int = 2, steps: float = 1) -> None:
    output = upscaled(page, picture, scale)
    with Image.open(picture) as image:
        wanted = expected(network, np.asarray(image.convert("RGB"), np.float32))
    assert output.shape[:2] == wanted.shape[:2]
    error = np.abs(output[..., :3] - wanted.round()).max()
    assert error <= steps, f"{error} steps of 1/255"
    assert output.shape[2] == 3 or (output[..., 3] == 255).all()


def test_the_page_is_short_and_needs_no_build() -> None:
    lines = [path.read_text(encoding="utf-8").splitlines() for path in serve_web.PAGE.glob("*.*")]
    assert sum(map(len, lines)) <= 400
    assert max(len(line) for each in lines for line in each) <= 110


@needs_chromium
def test_tiles_give_what_onnx_runtime_makes_of_the_whole_picture(
    page: Any, tiny: Path, tmp_path: Path
) -> None:
    load(page, tiny)
    check(page, tiny, photograph(tmp_path, 301, 193))


@needs_chromium
def test_so_do_the_shipped_weights_and_pictures_of_one_pixel(page: Any, tmp_path: Path) -> None:
    load(page, serve_web.MODEL)
    for size in ((1, 1), (196, 24)):  # one tile, and two
        check(page, serve_web.MODEL, photograph(tmp_path, *size, f"{size[0]}.png"))


@needs_chromium
def test_a_second_picture_follows_the_first_and_may_interrupt_it(
    page: Any, tiny: Path, tmp_path: Path
) -> None:
    load(page, tiny)
    check(page, tiny, photograph(tmp_path, 40, 31, "first.png"))
    page.choose("#file", photograph(tmp_path, 350, 400, "interrupted.png"))
    page.wait("document.body.dataset.state === 'working'")
    check(page, tiny, photograph(tmp_path, 31, 40, "second.jpg"))
    assert page.js(STATUS) == "Done: 31x40 became 62x80."


@needs_chromium
def test_the_javascript_of_the_documentation_runs(page: Any, tmp_path: Path) -> None:
    photo = photograph(tmp_path, 40, 31)
    text = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
    (code,) = re.findall("```js\n(.*?)```", text, re.DOTALL)
    assert f"onnxruntime-web@{serve_web.VERSION}/" in code
    code = re.sub(r'import \* as ort from ".*"', "const ort = await import('./files/ort.wasm.min.mjs')", code)
    code = code.replace("2x_mine_fp32.onnx", f"files/{serve_web.MODEL.name}").replace('"webgpu", ', "")
    bytes_of = base64.b64encode(photo.read_bytes()).decode()
    before = f"const file = new Blob([Uint8Array.from(atob('{bytes_of}'), (c) => c.charCodeAt(0))]);"
    output = page.js(f"(async () => {{ {before} {code}; return [...pixels.data]; }})()")
    with Image.open(photo) as image:
        wanted = expected(serve_web.MODEL, np.asarray(image, np.float32))
    assert np.abs(np.reshape(output, (62, 80, 4))[..., :3] - wanted).max() <= 1
    assert page.js("document.querySelector('canvas').width") == 80


@contextmanager
def bare_page(folder: Path) -> Iterator[str]:
    """The page alone, on a static host that sends no headers of its own."""
    shutil.copytree(serve_web.PAGE, folder / "host", ignore=shutil.ignore_patterns("files"))
    host = partial(SimpleHTTPRequestHandler, directory=str(folder / "host"))
    with ThreadingHTTPServer(("127.0.0.1", 0), host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def served(url: str) -> bytes:
    """The CDN's files, out of the package from npm."""
    return (serve_web.FILES / url.rsplit("/", 1)[1]).read_bytes()


@needs_chromium
def test_beside_nothing_the_page_takes_the_runtime_from_the_cdn_and_asks_for_a_network(
    address: str, tiny: Path, tmp_path: Path
) -> None:
    asked: list[str] = []

    def cdn(url: str) -> bytes:
        asked.append(url)
        return served(url)

    with bare_page(tmp_path) as bare, chromium.Chromium(tmp_path / "profile", served=cdn) as page:
        page.open(bare)
        page.wait(f"{STATUS}.endsWith('choose an ONNX file below.')")
        assert page.js(STATUS).startswith(f"{serve_web.MODEL.name} can't be used")
        load(page, tiny)
        check(page, tiny, photograph(tmp_path, 20, 20))
    folder = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{serve_web.VERSION}/dist/"
    assert asked == [f"{folder}{name}" for name in serve_web.RUNTIME[:1] + serve_web.RUNTIME[2:4]]


@pytest.mark.slow  # SwiftShader, a GPU in software, compiles for minutes
@needs_chromium
def test_webgpu_gives_the_same(address: str, tiny: Path, tmp_path: Path) -> None:
    flags = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
    with bare_page(tmp_path) as bare, chromium.Chromium(tmp_path / "profile", *flags, served=served) as page:
        page.open(bare)
        page.wait(f"{STATUS}.endsWith('choose an ONNX file below.')")
        load(page, tiny)
        assert "WebGPU" in page.js("document.getElementById('network').textContent")
        check(page, tiny, photograph(tmp_path, 220, 40))


@needs_chromium
def test_half_precision_and_another_scale(page: Any, tmp_path: Path) -> None:
    net = small_net(4, embed_dim=8, depths=(1,), use_channel_attn=False).float()
    network = Path(export_onnx(net, 4, "fp16", str(tmp_path / "half.onnx")))
    load(page, network)
    check(page, network, photograph(tmp_path, 31, 40), scale=4, steps=2)


@needs_chromium
def test_transparency_is_kept(page: Any, tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(photograph(tmp_path, 48, 40)).convert("RGBA")).copy()
    pixels[:, :, 3] = np.linspace(0, 255, 48).round()  # a ramp,
    pixels[:20, :24, 3], pixels[:20, 24:, 3] = 0, 255  # and a hard edge
    Image.fromarray(pixels).save(tmp_path / "glass.png")
    load(page, serve_web.MODEL)
    output = upscaled(page, tmp_path / "glass.png")

    def network(x: torch.Tensor) -> torch.Tensor:
        shown = expected(serve_web.MODEL, x[0].permute(1, 2, 0).numpy() * 255)
        return torch.from_numpy(shown).permute(2, 0, 1)[None] / 255

    alpha = pixels[..., 3:].astype(np.float32)  # a canvas holds colours times alpha, in 8 bits
    pixels[..., :3] = ((pixels[..., :3] * alpha / 255).round() * 255 / alpha.clip(1)).round().clip(0, 255)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    wanted = (through_transparency(network)(planes)[0].permute(1, 2, 0) * 255).numpy()
    assert np.abs(output[..., 3] - wanted[..., 3]).max() <= 1
    shown, wanted = (picture[..., :3] * (picture[..., 3:] / 255) for picture in (output, wanted))
    assert np.abs(shown - wanted).max() <= 2
    assert np.abs(shown - wanted)[:30, 56:].max() <= 0.6  # where it is opaque
    assert (output[:30, :40, 3] == 0).all()
    assert (output[:30, 56:, 3] == 255).all()


@needs_chromium
def test_what_is_no_picture_or_no_network_is_one_line_and_the_page_goes_on(
    page: Any, tiny: Path, tmp_path: Path
) -> None:
    load(page, tiny)
    for field, name, remedy in (
        ("#file", "notes.png", "choose a PNG, JPEG, WebP or AVIF file."),
        ("#onnx", "notes.onnx", "choose an ONNX file below."),
    ):
        (tmp_path / name).write_text("no such thing")
        page.choose(field, tmp_path / name)
        page.wait("document.getElementById('status').className === 'wrong'")
        told = page.js(STATUS)
        assert told.startswith(name)
        assert told.endswith(remedy)
        assert len(told) < 200
        assert "\n" not in told
    fixed = tmp_path / "fixed.onnx"
    net = small_net(2, embed_dim=8, depths=(1,)).float()
    export_onnx(net, 2, output_path=str(fixed), static=(3, 48, 64))
    page.choose("#onnx", fixed)
    page.wait(f"{STATUS}.includes('without --static')")
    check(page, tiny, photograph(tmp_path, 20, 20))


@needs_chromium
def test_a_picture_that_is_too_large_is_named_with_its_size(page: Any, tiny: Path, tmp_path: Path) -> None:
    load(page, tiny)
    Image.new("RGB", (40000, 2)).save(tmp_path / "long.png")
    page.choose("#file", tmp_path / "long.png")
    page.wait("document.getElementById('status').className === 'wrong'")
    assert page.js(STATUS).startswith("long.png: 80000x4 is more than this browser can hold")
    check(page, tiny, photograph(tmp_path, 20, 20))


@needs_chromium
def test_tiles_arrive_one_by_one_and_a_run_can_be_cancelled(page: Any, tiny: Path, tmp_path: Path) -> None:
    load(page, tiny)
    Image.fromarray(np.tile(data.astronaut(), (2, 3, 1))).save(tmp_path / "large.png")
    page.choose("#file", tmp_path / "large.png")
    page.wait("document.getElementById('progress').value >= 2")
    assert re.match(
        r"\d+ of 48 tiles, about \d+ s left", page.js("document.getElementById('count').textContent")
    )
    alpha = "document.getElementById('after').getContext('2d').getImageData({}, 1, 1).data[3]"
    assert [page.js(alpha.format(place)) for place in ("300, 100", "3071, 2047")] == [255, 0]
    page.js("document.getElementById('cancel').focus()")
    page.press("Enter")
    assert page.js(STATUS) == "Cancelled."
    assert page.js("document.activeElement.id") == "file"
    assert page.js("document.body.dataset.state") == ""
    check(page, tiny, photograph(tmp_path, 20, 20))


@needs_chromium
def test_pictures_are_dropped_and_pasted(page: Any, tiny: Path) -> None:
    load(page, tiny)
    give = """(async () => {
        const canvas = new OffscreenCanvas(%d, 5);
        canvas.getContext("2d");
        const blob = await canvas.convertToBlob();
        const given = new DataTransfer();
        given.items.add(new File([blob], "image.png", { type: "image/png" }));
        document.dispatchEvent(%s);
    })()"""
    for width, event in (
        (6, "new DragEvent('drop', { dataTransfer: given, cancelable: true })"),
        (7, "new ClipboardEvent('paste', { clipboardData: given })"),
    ):
        page.js(give % (width, event))
        page.wait(f"{STATUS} === 'Done: {width}x5 became {2 * width}x10.'")


@needs_chromium
def test_the_keyboard_reaches_everything_and_everything_has_a_name(
    page: Any, tiny: Path, tmp_path: Path
) -> None:
    load(page, tiny)
    upscaled(page, photograph(tmp_path, 20, 20))
    page.js("Object.assign(document.querySelector('h1'), { tabIndex: -1 }).focus()")
    reached = []
    for _ in range(6):
        page.press("Tab")
        reached.append(page.js("document.activeElement.id || document.activeElement.tagName"))
        if reached[-1] == "split":
            page.press("ArrowRight")
    assert reached == ["file", "frame", "split", "save", "actual", "SUMMARY"]
    assert page.js("document.getElementById('split').value") == "51"
    assert (
        page.js("document.getElementById('before').style.clipPath")
        == "inset(0px calc(100% - 20.4px) 0px 0px)"
    )
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if any(each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", []))
        and node["role"]["value"] != "RootWebArea"
    ]
    assert len(focusable) >= 6
    for node in focusable:
        assert node["name"]["value"], node["role"]
    assert "status" in {node["role"]["value"] for node in nodes}


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(page: Any, width: int, tiny: Path, tmp_path: Path) -> None:
    load(page, tiny)
    page.look(width, 844)
    upscaled(page, photograph(tmp_path, 350, 200))
    assert page.js("document.documentElement.scrollWidth") <= width
    page.js("document.getElementById('actual').click()")
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js("document.getElementById('after').clientWidth") == 700
    page.js("document.getElementById('actual').click()")


@needs_chromium
def test_nothing_leaves_the_machine(page: Any, address: str) -> None:
    asked = [event["params"] for event in page.events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    for each in asked:
        assert re.match(f"{address}|blob:|data:", each["request"]["url"]), each["request"]["url"]
        assert each["request"]["method"] == "GET"
    page.js("document.addEventListener('securitypolicyviolation', () => (globalThis.refused = true))")
    page.js("fetch('https://example.com').catch(() => new Promise((done) => setTimeout(done, 500)))")
    assert page.js("globalThis.refused")


def test_without_npm_the_server_says_where_the_runtime_will_come_from() -> None:
    """Nothing is there yet: the folder with the files is another one."""
    code = "import pathlib, tempfile, serve_web; serve_web.FILES = pathlib.Path(tempfile.mkdtemp()); "
    code += "print(serve_web.fetch_runtime())"
    environment = {**os.environ, "PATH": "", "PYTHONPATH": str(ROOT / "demo")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "npm is not installed", done.stderr
