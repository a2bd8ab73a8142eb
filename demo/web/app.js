// The page: takes a picture, hands its tiles to worker.js one by one, shows what comes back.
const SHIPPED = "2x_AetherNet_small_wallpapers_fp32.onnx"; // serve_web.py writes it
const TILE = 192;
const OVERLAP = 28; // as in aethersr/tiling.py: trained networks stay within a step of the whole picture

const $ = (id) => document.getElementById(id);
const size = (width, height) => `${width}x${height}`;
let worker, current; // current: the picture that may show something; the next one ends its run
const calls = []; // what the worker has not answered yet, in order
let network = load(SHIPPED, new URL(`files/${SHIPPED}`, import.meta.url).href);

function ask(request, transfer) {
  if (!worker) {
    // Started from a blob: so the page's Content-Security-Policy holds for it, too.
    const code = [`import ${JSON.stringify(new URL("worker.js", import.meta.url).href)}`];
    const blob = new Blob(code, { type: "text/javascript" });
    worker = new Worker(URL.createObjectURL(blob), { type: "module" });
    worker.onmessage = ({ data: { problem, ...answer } }) => {
      const { resolve, reject } = calls.shift();
      problem ? reject(new Error(problem)) : resolve(answer);
    };
    worker.onerror = () => calls.splice(0).forEach((call) => call.reject(new Error("worker.js fails")));
  }
  worker.postMessage(request, transfer);
  return new Promise((resolve, reject) => calls.push({ resolve, reject }));
}

/** The network of an ONNX file, or nothing after saying why. */
async function load(name, url) {
  try {
    const { scale, engine } = await ask({ network: url });
    $("network").textContent = `${name} (${scale} times larger, ${engine})`;
    if (!current) say("Ready.");
    return { scale };
  } catch (error) {
    say(`${name} can't be used: ${error.message}; choose an ONNX file below.`, true);
  }
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

/** What is on the page: "" (nothing yet), "working" or "done". */
function show(state) {
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
    throw new Error(`${size(width, height)} is more than this browser can hold; choose a smaller picture`);
  }
  context.clearRect(...last);
  return context;
}

async function upscale(file) {
  const run = (current = { name: file.name });
  const stale = () => run !== current;
  show("");
  try {
    const { scale } = (await network) ?? {};
    if (!scale || stale()) return;
    const bitmap = await createImageBitmap(file).catch(() => {
      throw new Error("this browser can't open it as a picture; choose a PNG, JPEG, WebP or AVIF file");
    });
    if (stale()) return;
    const { width, height } = bitmap;
    const after = surface("after", width * scale, height * scale);
    const before = surface("before", width, height);
    before.drawImage(bitmap, 0, 0);
    bitmap.close();
    await tiles(before, after, scale, stale);
    if (stale()) return;
    say(`Done: ${size(width, height)} became ${size(width * scale, height * scale)}.`);
    const { id } = document.activeElement;
    show("done");
    if (id === "cancel") $("save").focus(); // that button has gone
  } catch (error) {
    if (stale()) return;
    show("");
    say(`${file.name}: ${error.message}.`, true);
  }
}

async function tiles(before, after, scale, stale) {
  const { width, height } = before.canvas;
  const all = cuts(height).flatMap((row) => cuts(width).map((column) => [...row, ...column]));
  const start = performance.now();
  $("progress").removeAttribute("value"); // until there is a first tile
  $("progress").max = all.length;
  show("working");
  for (const [done, [top, bottom, y0, y1, left, right, x0, x1]] of all.entries()) {
    const seconds = Math.ceil(((performance.now() - start) / 1000 / done) * (all.length - done));
    $("count").textContent = `${done} of ${all.length} tiles${done ? `, about ${seconds} s left` : ""}`;
    if (done) $("progress").value = done;
    // Read aloud, so not at every tile.
    if (done % Math.ceil(all.length / 4) === 0) say(`Upscaling, ${Math.round((100 * done) / all.length)} %`);
    const { data } = before.getImageData(x0, y0, x1 - x0, y1 - y0);
    const { pixels } = await ask({ pixels: data, width: x1 - x0, height: y1 - y0 }, [data.buffer]);
    if (stale()) return;
    const part = [left - x0, top - y0, right - left, bottom - top].map((value) => value * scale);
    after.putImageData(new ImageData(pixels, (x1 - x0) * scale), x0 * scale, y0 * scale, ...part);
  }
}

/** Cut both pictures where the divider stands; tiles that arrive cover the picture before. */
function split() {
  const done = document.body.dataset.state === "done";
  const actual = document.body.classList.contains("actual");
  $("after").style.width = actual ? `${$("after").width / devicePixelRatio}px` : "";
  const x = done ? $("frame").scrollLeft + ($("frame").clientWidth * $("split").value) / 100 : 0;
  $("before").style.clipPath = done ? `inset(0 calc(100% - ${x}px) 0 0)` : "";
  $("after").style.clipPath = `inset(0 0 0 ${x}px)`;
  $("split").setAttribute("aria-valuetext", `${Math.round($("split").value)} %`);
}

function take(file) {
  if (file?.name.toLowerCase().endsWith(".onnx")) {
    const earlier = network;
    stop(`Loading ${file.name} …`);
    network = load(file.name, URL.createObjectURL(file)).then((found) => found ?? earlier);
  } else if (file) {
    upscale(file);
  }
}

function stop(text) {
  current = null;
  show("");
  say(text);
}

for (const input of [$("file"), $("onnx")]) {
  input.onchange = () => {
    take(input.files[0]);
    input.value = ""; // the same file may be chosen again
  };
}
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}
document.onpaste = (event) => take(event.clipboardData.files[0]);
$("cancel").onclick = () => {
  stop("Cancelled.");
  $("file").focus();
};
$("save").onclick = () =>
  $("after").toBlob((blob) => {
    const link = document.createElement("a");
    link.download = `${current.name.replace(/\.[^.]*$/, "")}_${$("after").width / $("before").width}x.png`;
    link.href = URL.createObjectURL(blob);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
$("actual").onclick = () => {
  $("actual").setAttribute("aria-pressed", document.body.classList.toggle("actual"));
  split();
};
$("frame").onpointermove = (event) => {
  if (!event.buttons) return;
  const { left, width } = $("frame").getBoundingClientRect();
  if (!document.body.classList.contains("actual")) $("split").value = (100 * (event.clientX - left)) / width;
  else if (event.pointerType === "mouse") $("frame").scrollBy(-event.movementX, -event.movementY);
  split();
};
$("frame").onscroll = $("split").oninput = window.onresize = split;
