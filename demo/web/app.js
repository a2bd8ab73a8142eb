// The page: takes a picture, hands its tiles to worker.js one by one, shows what comes back.
const TILE = 192;
const OVERLAP = 28; // as in aethersr/tiling.py: trained networks stay within a step of the whole picture
const ZOOM = 6; // how large a pixel of the given picture is in the enlarged view

const $ = (id) => document.getElementById(id);
// Started from a blob: so the page's Content-Security-Policy holds for it, too.
const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)}`;
const worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
let current; // the picture that may show something; the next one ends its run
let network; // the chosen one or its promise: place in the list, scale and engine
let working; // the last one that could be loaded

function ask(request, transfer = []) {
  const { port1: port, port2 } = new MessageChannel();
  worker.postMessage({ ...request, port: port2 }, [port2, ...transfer]);
  return new Promise((resolve, reject) => {
    port.onmessage = ({ data }) => (data.problem ? reject(new Error(data.problem)) : resolve(data));
    worker.addEventListener("error", () => reject(new Error("worker.js fails")));
  });
}

/** Load the chosen network; the one before stays if that fails. A picture on the page is upscaled again. */
async function choose() {
  const { selectedIndex: index, selectedOptions: [{ text, value }] } = $("networks");
  const picture = current;
  const mine = (network = ask({ network: value }).then((answer) => ({ index, ...answer })));
  current = null;
  say(`Loading ${text} …`);
  try {
    working = await mine;
    $("engine").textContent = working.engine;
    if (!current) picture ? upscale(picture.file) : say("Ready.");
  } catch (error) {
    if (network !== mine) return; // another was chosen meanwhile
    network = working;
    $("networks").selectedIndex = working?.index ?? -1;
    say(`${text} can't be used: ${error.message}; choose another ONNX file below.`, "wrong");
  }
}

/** Say something in a state of the page: "" (no picture to see), "wrong" (none, either), "working", "done". */
function say(text, state = "") {
  $("status").textContent = text;
  document.body.dataset.state = state;
  split();
}

/** Parts of an axis: begin and end, and those of what the network sees. */
function cuts(length) {
  const count = Math.ceil(length / TILE);
  const edges = Array.from({ length: count + 1 }, (_, k) => Math.floor((length * k) / count));
  const seen = edges.map((edge) => [Math.max(0, edge - OVERLAP), Math.min(length, edge + OVERLAP)]);
  return edges.slice(1).map((end, k) => [edges[k], end, seen[k][0], seen[k + 1][1]]);
}

/** A new canvas in place of one. No browser says what is too large for it; the last pixel does. */
function surface(id, width, height) {
  const canvas = Object.assign($(id).cloneNode(), { width, height });
  $(id).replaceWith(canvas);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const last = [width - 1, height - 1, 1, 1];
  context.fillRect(...last);
  if (!context.getImageData(...last).data[3]) {
    throw new Error(`${width}x${height} is more than this browser can hold; choose a smaller picture`);
  }
  context.clearRect(...last);
  return context;
}

/** The picture of a file. An animation is refused, as aether-upscale does, where the browser knows it. */
async function read(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error("this browser can't open it as a picture; choose a PNG, JPEG, WebP or AVIF file");
  });
  if (await globalThis.ImageDecoder?.isTypeSupported(file.type)) {
    const decoder = new ImageDecoder({ data: file.stream(), type: file.type });
    await decoder.completed;
    const { frameCount } = decoder.tracks.selectedTrack;
    decoder.close();
    if (frameCount > 1) throw new Error(`it holds ${frameCount} frames of an animation; choose one picture`);
  }
  return bitmap;
}

async function upscale(file) {
  const run = (current = { file });
  const stale = () => run !== current;
  say(`Opening ${file.name} …`);
  try {
    if (!network) throw new Error("there is no network yet; choose an ONNX file below");
    const { scale } = await network;
    const bitmap = await read(file);
    if (stale()) return;
    const { width, height } = bitmap;
    const after = surface("after", width * scale, height * scale);
    const before = surface("before", width, height);
    before.drawImage(bitmap, 0, 0);
    const detail = await tiles(before, after, scale, stale);
    if (stale()) return;
    say(`Done: ${width}x${height} became ${width * scale}x${height * scale}.`, "done");
    const [left, top] = detail.map((place) => (place * $("after").clientWidth) / width);
    $("frame").scrollTo(left - $("frame").clientWidth / 2, top - $("frame").clientHeight / 2);
  } catch (error) {
    if (!stale()) say(`${file.name}: ${error.message}.`, "wrong");
  }
}

/** Upscale tile by tile. Returns the middle of the one with the most detail. */
async function tiles(before, after, scale, stale) {
  const { width, height } = before.canvas;
  const all = cuts(height).flatMap((row) => cuts(width).map((column) => [...row, ...column]));
  const start = performance.now();
  let most = [-1];
  $("progress").max = all.length;
  say("Upscaling …", "working");
  for (const [done, [top, bottom, y0, y1, left, right, x0, x1]] of all.entries()) {
    const seconds = Math.ceil(((performance.now() - start) / 1000 / done) * (all.length - done));
    $("count").textContent = `${done} of ${all.length} tiles${done ? `, about ${seconds} s left` : ""}`;
    $("progress").value = done;
    const { data } = before.getImageData(x0, y0, x1 - x0, y1 - y0);
    const detail = data.reduce((sum, value, k) => sum + (k > 3 ? Math.abs(value - data[k - 4]) : 0), 0);
    if (detail > most[0]) most = [detail, (left + right) / 2, (top + bottom) / 2];
    const { pixels } = await ask({ pixels: data, width: x1 - x0, height: y1 - y0 }, [data.buffer]);
    if (stale()) break;
    const part = [left - x0, top - y0, right - left, bottom - top].map((value) => value * scale);
    after.putImageData(new ImageData(pixels, (x1 - x0) * scale), x0 * scale, y0 * scale, ...part);
  }
  return most.slice(1);
}

/** Cut both pictures where the divider stands; tiles that arrive cover the picture before. */
function split() {
  const done = document.body.dataset.state === "done";
  const enlarged = document.body.classList.toggle("enlarged", done && $("zoom").checked);
  $("after").style.width = enlarged ? `${$("before").width * ZOOM}px` : "";
  const x = done ? $("frame").scrollLeft + ($("frame").clientWidth * $("split").value) / 100 : 0;
  $("bar").style.left = `${$("split").value}%`;
  $("before").style.clipPath = done ? `inset(0 calc(100% - ${x}px) 0 0)` : "";
  $("after").style.clipPath = `inset(0 0 0 ${x}px)`;
}

function take(file) {
  if (file?.name.toLowerCase().endsWith(".onnx")) {
    $("networks").add(new Option(file.name, URL.createObjectURL(file), false, true));
    choose();
  } else if (file) upscale(file);
}

for (const input of [$("file"), $("onnx")]) {
  input.onchange = () => {
    take(input.files[0]);
    input.value = ""; // the same file may be chosen again
  };
}
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
};
document.onpaste = (event) => take(event.clipboardData.files[0]);
$("cancel").onclick = () => {
  current = null;
  say("Cancelled.");
  $("file").focus();
};
$("save").onclick = () =>
  $("after").toBlob((blob) => {
    const scale = $("after").width / $("before").width;
    const download = `${current.file.name.replace(/\.[^.]*$/, "")}_${scale}x.png`;
    Object.assign(document.createElement("a"), { download, href: URL.createObjectURL(blob) }).click();
  });
$("networks").onchange = choose;
$("zoom").onchange = $("frame").onscroll = $("split").oninput = window.onresize = split;

const names = await fetch("files/networks.json").then((answer) => answer.json()).catch(() => []);
for (const name of names) $("networks").add(new Option(name, new URL(`files/${name}`, import.meta.url).href));
names.length ? choose() : say("No network lies beside this page; choose an ONNX file below.", "wrong");
