"""The page of demo/web in real headless Chromium, without a network, against ONNX Runtime.

Needs Chromium (Debian's package `chromium`, or its path in the variable CHROMIUM) and npm.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import onnxruntime
import pytest
import serve_web
import torch
from conftest import ROOT, tiny_net
from PIL import Image
from skimage import data

from aethersr.onnx import export_onnx
from aethersr.upscaling import through_transparency

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt install chromium, or CHROMIUM=its path"
)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"
MODEL = serve_web.FILES / serve_web.FIRST.replace("_fp16.safetensors", "_fp32.onnx")
SHIPPED = [path.stem for path in serve_web.WEIGHTS.glob("*.safetensors") if "_training_" not in path.name]
# In steps of 1/255. A value in 8 bits is half a step off; two float32 runtimes differ by far less than this.
ROUNDING, RUNTIMES = 0.5, 0.01


@contextmanager
def hosted(folder: Path, handler: Any) -> Iterator[str]:
    """The address of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the page with all that it needs beside it."""
    serve_web.FILES.mkdir(exist_ok=True)
    serve_web.export_networks()
    problem = serve_web.fetch_runtime()
    if problem:
        pytest.skip(problem)
    with hosted(serve_web.PAGE, serve_web.Handler) as found:
        yield found


@pytest.fixture(scope="module")
def start() -> Iterator[Any]:
    """A function that opens a page in a browser for which no name is resolved but localhost."""
    with playwright.sync_playwright() as started:

        def start(*flags: str) -> Any:
            words = [OFFLINE, *flags, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
            page = started.chromium.launch(executable_path=CHROMIUM, args=words).new_page()
            page.set_default_timeout(300_000)  # milliseconds; a machine may be busy with other things
            return page

        yield start


@pytest.fixture(scope="module")
def page(address: str, start: Any) -> Iterator[Any]:
    opened, asked = start(), []
    opened.on("request", lambda request: asked.append(request))
    opened.goto(address)
    says(opened, "Ready.")
    yield opened
    assert asked
    for each in asked:  # nothing leaves the machine, or may
        assert re.match(f"{address}|blob:|data:", each.url), each.url
        assert each.method == "GET"
    assert opened.evaluate("""() => new Promise((tell) => {
        document.addEventListener("securitypolicyviolation", () => tell(true));
        fetch("https://example.com").catch(() => setTimeout(() => tell(false), 5000));
    })""")
    opened.context.browser.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network x2 that sees no further than tiles overlap."""
    path = tmp_path_factory.mktemp("net") / "tiny.onnx"
    return Path(export_onnx(tiny_net().float(), 2, output_path=str(path)))


def says(page: Any, text: str) -> None:
    page.wait_for_selector(f'#status:text-is("{text}")')


def load(page: Any, network: Path) -> None:
    page.evaluate("document.getElementById('cancel').click()")  # else a picture that is there comes again
    page.set_input_files("#onnx", network)
    says(page, "Ready.")
    assert network.name == page.evaluate("document.getElementById('networks').selectedOptions[0].text")


def upscaled(page: Any, picture: Path, scale: int = 2) -> np.ndarray:
    """Choose a picture, wait, save: what is downloaded."""
    page.set_input_files("#file", picture)
    page.wait_for_selector("[data-state=done]")
    with page.expect_download() as saved:
        page.click("#save")
    assert saved.value.suggested_filename == f"{picture.stem}_{scale}x.png"
    with Image.open(saved.value.path()) as image:
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


def check(page: Any, network: Path, picture: Path, scale: int = 2, error: float = RUNTIMES) -> None:
    output = upscaled(page, picture, scale)
    with Image.open(picture) as image:
        wanted = expected(network, np.asarray(image.convert("RGB"), np.float32))
    assert output.shape[:2] == wanted.shape[:2]
    found = np.abs(output[..., :3] - wanted).max()
    assert found <= ROUNDING + error, f"{found} steps of 1/255, allowed {ROUNDING + error}"
    assert output.shape[2] == 3 or (output[..., 3] == 255).all()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_network_takes_a_pixel_and_two_tiles(page: Any, name: str, tmp_path: Path) -> None:
    network = serve_web.FILES / f"{name.replace('_fp16', '_fp32')}.onnx"
    page.evaluate("document.getElementById('cancel').click()")
    page.select_option("#networks", label=network.name)
    says(page, "Ready.")
    for size in ((1, 1), (196, 24)):
        check(page, network, photograph(tmp_path, *size), int(name[0]))


def test_half_precision_and_another_scale(page: Any, tmp_path: Path) -> None:
    net = tiny_net(4).float()
    files = [Path(export_onnx(net, 4, kind, str(tmp_path / f"{kind}.onnx"))) for kind in ("fp16", "fp32")]
    picture = photograph(tmp_path, 31, 40)
    half, exact = (expected(file, np.asarray(Image.open(picture), np.float32)) for file in files)
    load(page, files[0])
    # Each runtime may be as far off, and not alike.
    check(page, files[0], picture, scale=4, error=2 * np.abs(half - exact).max())


def test_tiles_arrive_one_by_one_until_another_picture_or_cancel_ends_them(
    page: Any, tiny: Path, tmp_path: Path
) -> None:
    load(page, tiny)
    Image.fromarray(np.tile(data.astronaut(), (2, 3, 1))).save(tmp_path / "large.png")
    alpha = "document.getElementById('after').getContext('2d').getImageData({}, 1, 1).data[3]"
    for how in ("another", "cancel"):
        page.set_input_files("#file", tmp_path / "large.png")
        page.wait_for_selector("#count:text-matches('^([2-9]|[1-4][0-9]) of 48 tiles, about [0-9]+ s left$')")
        assert [page.evaluate(alpha.format(place)) for place in ("300, 100", "3071, 2047")] == [255, 0]
        if how == "cancel":
            page.focus("#cancel")
            page.keyboard.press("Enter")
            says(page, "Cancelled.")
            assert page.evaluate("document.activeElement.id") == "file"
        check(page, tiny, photograph(tmp_path, 301, 193, "small.jpg"))
        says(page, "Done: 301x193 became 602x386.")
        assert page.text_content("#count").startswith("3 of 4 tiles, ")  # the first run has ended


def test_the_javascript_of_the_documentation_runs(page: Any, tmp_path: Path) -> None:
    photo = photograph(tmp_path, 40, 31)
    text = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
    (code,) = re.findall("```js\n(.*?)```", text, re.DOTALL)
    assert f"onnxruntime-web@{serve_web.VERSION}/" in code
    code = re.sub(r'import \* as ort from ".*"', "const ort = await import('./files/ort.wasm.min.mjs')", code)
    code = code.replace("2x_mine_fp32.onnx", f"files/{MODEL.name}").replace('"webgpu", ', "")
    bytes_of = base64.b64encode(photo.read_bytes()).decode()
    before = f"const file = new Blob([Uint8Array.from(atob('{bytes_of}'), (c) => c.charCodeAt(0))]);"
    output = page.evaluate(f"async () => {{ {before} {code}; return [...pixels.data]; }}")
    with Image.open(photo) as image:
        wanted = expected(MODEL, np.asarray(image, np.float32))
    # ONNX Runtime Web cuts its output to 8 bits instead of rounding it.
    assert np.abs(np.reshape(output, (62, 80, 4))[..., :3] - wanted).max() <= 2 * ROUNDING + RUNTIMES
    assert page.evaluate("document.querySelector('canvas').width") == 80


SWIFTSHADER = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


# Slow: SwiftShader, a GPU in software, compiles for minutes.
@pytest.mark.parametrize("kind", ["WebAssembly", pytest.param("WebGPU", marks=pytest.mark.slow)])
def test_beside_nothing_the_page_takes_the_runtime_from_the_cdn_and_asks_for_a_network(
    address: str, start: Any, kind: str, tiny: Path, tmp_path: Path
) -> None:
    """On a static host that sends no headers of its own."""
    shutil.copytree(serve_web.PAGE, tmp_path / "host", ignore=shutil.ignore_patterns("files"))
    page, asked = start(*(SWIFTSHADER if kind == "WebGPU" else [])), []
    network = page.context.browser.new_browser_cdp_session()  # playwright's own routes don't reach workers

    def cdn(event: Any) -> None:
        """Its files, out of the package from npm."""
        asked.append(event["request"]["url"])
        file = serve_web.FILES / asked[-1].rsplit("/", 1)[1]
        headers = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}
        headers["Content-Type"] = "application/wasm" if file.suffix == ".wasm" else "text/javascript"
        answer: Any = {"requestId": event["requestId"], "responseCode": 200}
        answer["responseHeaders"] = [{"name": name, "value": value} for name, value in headers.items()]
        network.send("Fetch.fulfillRequest", {**answer, "body": base64.b64encode(file.read_bytes()).decode()})

    network.on("Fetch.requestPaused", cdn)
    network.send("Fetch.enable", {"patterns": [{"urlPattern": "https://*"}]})
    with hosted(tmp_path / "host", SimpleHTTPRequestHandler) as bare:
        page.goto(bare)
        says(page, "No network lies beside this page; choose an ONNX file below.")
        page.set_input_files("#file", photograph(tmp_path, 20, 20))
        says(page, "photo.png: there is no network yet; choose an ONNX file below.")
        load(page, tiny)
        assert page.text_content("#engine") == kind
        check(page, tiny, photograph(tmp_path, 220, 40))
    page.context.browser.close()
    folder = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{serve_web.VERSION}/dist"
    assert {url.rsplit("/", 1)[0] for url in asked} == {folder}
    assert {url.rsplit("/", 1)[1] for url in asked} <= set(serve_web.RUNTIME)


def test_transparency_is_kept(page: Any, tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(photograph(tmp_path, 48, 40)).convert("RGBA")).copy()
    pixels[:, :, 3] = np.linspace(0, 255, 48).round()  # a ramp,
    pixels[:20, :24, 3], pixels[:20, 24:, 3] = 0, 255  # and a hard edge
    Image.fromarray(pixels).save(tmp_path / "glass.png")
    load(page, MODEL)
    output = upscaled(page, tmp_path / "glass.png")

    def network(x: torch.Tensor) -> torch.Tensor:
        shown = expected(MODEL, x[0].permute(1, 2, 0).numpy() * 255)
        return torch.from_numpy(shown).permute(2, 0, 1)[None] / 255

    # What the canvas holds, which is colours times alpha in 8 bits, is what the network sees.
    canvas = "document.getElementById('before').getContext('2d')"
    held = torch.tensor(page.evaluate(f"[...{canvas}.getImageData(0, 0, 48, 40).data]"), dtype=torch.float32)
    planes = held.view(1, 40, 48, 4).permute(0, 3, 1, 2) / 255
    wanted = (through_transparency(network)(planes)[0].permute(1, 2, 0) * 255).numpy()
    assert np.abs(output[..., 3] - wanted[..., 3]).max() <= ROUNDING + RUNTIMES
    shown, wanted = (picture[..., :3] * (picture[..., 3:] / 255) for picture in (output, wanted))
    error = np.abs(shown - wanted)
    # The page rounds colour and alpha. The canvas multiplies them, and divides them to save a PNG, each time
    # in 8 bits; a browser may cut instead of rounding, which is as much as two.
    assert error.max() <= (1 + 1 + 2 + 2) * ROUNDING + RUNTIMES
    assert error[:30, 56:].max() <= ROUNDING + RUNTIMES  # where it is opaque


def test_what_cannot_be_used_is_one_line_and_the_page_goes_on(page: Any, tiny: Path, tmp_path: Path) -> None:
    load(page, tiny)
    colours = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    colours[0].save(tmp_path / "moving.gif", save_all=True, append_images=colours[1:])
    colours[0].save(tmp_path / "still.gif")
    Image.new("RGB", (40000, 2)).save(tmp_path / "long.png")
    for name in ("notes.png", "notes.onnx"):
        (tmp_path / name).write_text("no such thing")
    export_onnx(tiny_net().float(), 2, output_path=str(tmp_path / "fixed.onnx"), static=(3, 48, 64))
    for field, name, words in (
        ("#file", "notes.png", "choose a PNG, JPEG, WebP or AVIF file."),
        ("#file", "moving.gif", "it holds 2 frames of an animation; choose one picture."),
        ("#file", "long.png", "80000x4 is more than this browser can hold; choose a smaller picture."),
        ("#onnx", "notes.onnx", "choose another ONNX file below."),
        ("#onnx", "fixed.onnx", "(aether-fuse without --static); choose another ONNX file below."),
    ):
        page.set_input_files(field, tmp_path / name)
        page.wait_for_selector(f"[data-state=wrong] #status:text('{name}')")
        told = page.text_content("#status")
        assert told.endswith(words)
        assert len(told) < 220
    assert page.evaluate("document.getElementById('networks').selectedOptions[0].text") == tiny.name
    page.set_input_files("#file", tmp_path / "still.gif")
    says(page, "Done: 20x20 became 40x40.")


def test_pictures_are_dropped_and_pasted(page: Any, tiny: Path) -> None:
    for event, field in (("DragEvent('drop'", "dataTransfer"), ("ClipboardEvent('paste'", "clipboardData")):
        load(page, tiny)
        page.evaluate(f"""async () => {{
            const canvas = new OffscreenCanvas(7, 5);
            canvas.getContext("2d");
            const given = new DataTransfer();
            given.items.add(new File([await canvas.convertToBlob()], "image.png", {{ type: "image/png" }}));
            document.dispatchEvent(new {event}, {{ {field}: given, cancelable: true }}));
        }}""")
        says(page, "Done: 7x5 became 14x10.")


@pytest.mark.parametrize("width", [390, 1280])
def test_what_is_done_is_seen_enlarged_and_reached_by_the_keyboard_in_any_window(
    page: Any, width: int, tiny: Path, tmp_path: Path
) -> None:
    load(page, tiny)
    page.set_viewport_size({"width": width, "height": 844})
    pixels = np.full((400, 420, 3), 90, np.uint8)
    pixels[220:380, 230:400] = data.astronaut()[:160, :170]
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    upscaled(page, tmp_path / "corner.png")
    frame, wide = (f"document.getElementById('{name}')" for name in ("frame", "after"))
    assert page.evaluate(f"{wide}.clientWidth") == 6 * 420
    assert page.evaluate(f"{frame}.scrollLeft + {frame}.clientWidth / 2") > 3 * 420  # in the right half
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("Object.assign(document.querySelector('h1'), { tabIndex: -1 }).focus()")
    for name in ("file", "networks", "split", "frame", "save", "zoom", "onnx"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
        before = page.evaluate("document.getElementById('before').style.clipPath")
        page.keyboard.press({"split": "ArrowRight", "zoom": "Space"}.get(name, "Shift"))
        if name == "split":
            assert page.evaluate("document.getElementById('before').style.clipPath") != before
    assert page.evaluate(f"{wide}.clientWidth <= {frame}.clientWidth")
    page.click("#zoom")
    for node in page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]:
        if any(each["name"] == "focusable" for each in node.get("properties", [])):
            assert node["name"]["value"] or node["role"]["value"] == "RootWebArea", node["role"]


def test_the_first_start_says_what_it_does_and_ctrl_c_ends_it_with_a_line(tmp_path: Path) -> None:
    """Nothing is there yet: the folder with the files is another one. Without npm, that is said."""
    code = f"import os, pathlib, sys, serve_web; serve_web.FILES = pathlib.Path({str(tmp_path)!r}); "
    code += "os.environ['PATH'] = ''; sys.exit(serve_web.main(['--port', '0']))"
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "demo", **pipes)
    said = []
    for line in process.stdout or ():
        said.append(line)
        if line.startswith("Open http://"):
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert said[-1] == "serve_web.py: stopped; the page is no longer there.\n"
    assert said[-3].startswith("npm is not installed; the page will load ONNX Runtime Web")
    assert sorted(said[:-3]) == sorted(f"Exporting {name}.safetensors for the page ...\n" for name in SHIPPED)


def test_a_port_in_use_is_one_line_before_any_work(address: str, capsys: pytest.CaptureFixture) -> None:
    port = address.split(":")[-1].strip("/")
    assert serve_web.main(["--port", port]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(f"serve_web.py: error: --port {port} can't be used: .*; pass another one, .*\n", told)
