// The network: a tile in, a larger tile out. It runs beside the page, so that the page answers meanwhile.
const VERSION = "1.30.0"; // serve_web.py reads it, too
const FOLDERS = ["./files/", `https://cdn.jsdelivr.net/npm/onnxruntime-web@${VERSION}/dist/`];
let ort, session;
let queue = Promise.resolve(); // a session takes one tile after the other

onmessage = ({ data: { port, ...data } }) => {
  queue = queue
    .then(() => (data.network ? open(data.network) : upscale(data)))
    .catch((error) => ({ problem: String(error?.message ?? error).split("\n")[0].slice(0, 200) }))
    .then((answer) => port.postMessage(answer, answer.pixels ? [answer.pixels.buffer] : []));
};

/** Take the network of an ONNX file (its URL). The one before stays if this one does not run. */
async function open(url) {
  const before = { ort, session };
  const gpu = await navigator.gpu?.requestAdapter().catch(() => null);
  for (const engine of gpu ? ["webgpu", "wasm"] : ["wasm"]) {
    try {
      const [beside, cdn] = FOLDERS.map((folder) => `${folder}ort.${engine}.min.mjs`);
      ort = await import(beside).catch(() => import(cdn)).catch(() => {
        throw new Error("ONNX Runtime Web is not in the folder files, and its CDN is out of reach");
      });
      ort.env.logLevel = "error";
      session = await ort.InferenceSession.create(url, { executionProviders: [engine] });
      const { shape } = session.inputMetadata[0];
      if (shape[1] !== 3 || shape.slice(2).some(Number.isInteger)) {
        throw new Error(`it takes [${shape}], expected RGB of any size (aether-fuse without --static)`);
      }
      const scale = (await run(new Float32Array(3 * 64 * 64), 64, 64)).width / 64;
      await before.session?.release();
      return { scale, engine: engine === "webgpu" ? "WebGPU" : "WebAssembly" };
    } catch (error) {
      ({ ort, session } = before);
      if (engine === "wasm") throw error;
    }
  }
}

/** Planes (3, height, width) from 0 to 1 to larger ones. */
async function run(planes, width, height) {
  const { name, type } = session.inputMetadata[0];
  const values = type === "float16" ? Float16Array.from(planes) : planes;
  const input = new ort.Tensor(type, values, [1, 3, height, width]);
  const output = (await session.run({ [name]: input }))[session.outputNames[0]];
  if (!output.data.every(Number.isFinite)) throw new Error("the network's output is not finite");
  return { data: output.data.map((value) => Math.min(1, Math.max(0, value))), width: output.dims[3] };
}

/** For each value the lowest or highest of the 5x5 round it. */
function around(values, width, pick) {
  const along = values.map((_, k) => {
    const x = k % width;
    return pick(...values.slice(k - Math.min(2, x), k + Math.min(3, width - x)));
  });
  return along.map((value, k) => pick(...[-2, -1, 0, 1, 2].map((n) => along[k + n * width] ?? value)));
}

/** Pixels (RGBA) to larger ones. Transparent ones go through over black and over white: see upscaling.py. */
async function upscale({ pixels, width, height }) {
  const area = width * height;
  const over = (shade) => {
    const planes = Float32Array.from({ length: 3 * area }, (_, k) => {
      const [value, alpha] = [Math.floor(k / area), 3].map((c) => pixels[4 * (k % area) + c] / 255);
      return value * alpha + shade * (1 - alpha);
    });
    return run(planes, width, height);
  };
  const channels = [0, 1, 2, 3].map((c) => pixels.filter((_, k) => k % 4 === c));
  const opaque = channels[3].every((value) => value === 255);
  const [black, white] = opaque ? Array(2).fill(await over(0)) : [await over(0), await over(1)];
  const [low, high] = [Math.min, Math.max].map((pick) =>
    channels.map((c) => (opaque ? new Uint8Array(area).fill(255) : around(c, width, pick))));
  const [scale, out] = [black.width / width, new Uint8ClampedArray((4 / 3) * black.data.length)];
  for (let k = 0; k < out.length / 4; k++) {
    const place = Math.floor(k / black.width / scale) * width + Math.floor((k % black.width) / scale);
    const [b, w] = [black, white].map(({ data }) => [0, 1, 2].map((c) => data[k + (c * out.length) / 4]));
    const [least, most] = [Math.min, Math.max].map((pick) => pick(...b.map((value, c) => w[c] - value)));
    const fit = (2 * Math.max(...b, ...w.map((value) => 1 - value)) + 1 - most) / 3;
    const alpha = Math.min(high[3][place] / 255, Math.max(low[3][place] / 255, 1 - (least + most) / 2, fit));
    for (let c = 0; c < 3; c++) {
      const [given, spare] = [(255 * (b[c] + w[c] - 1 + alpha)) / Math.max(2 * alpha, 1e-4), low[3][place]];
      out[4 * k + c] = Math.min(high[c][place] + spare, Math.max(low[c][place] - spare, given));
    }
    out[4 * k + 3] = 255 * alpha;
  }
  return { pixels: out };
}
