// Object detection with heatmaps in the browser: model.onnx, run by onnxruntime-web in a worker.
const MAX_LOG_SCALE = Math.log(1000 / 16); // bounds exp(w), exp(h), as src/model/boxes.py does
const PRE_NMS_TOPK = 1000;
const MAX_DETECTIONS = 300;
const MAX_EXPLAINED = 24; // detections per heatmap; each costs a run of the network
const MAX_VIEW = 1024; // largest long side of a displayed image, in pixels

const $ = (id) => document.getElementById(id);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const roundHalfEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // as Python
const percent = ({ score }) => `${(100 * score).toFixed(1)}%`;

let facts; // facts.json: what the page knows about the model
let ort; // onnxruntime-web
let session; // promise of the loaded model
let current; // the analyzed image: width, height, pixels, placement, candidates, detections, ...
let target = "all"; // what is explained: "all", "class 7", or the index of a prediction
let uploads = 0; // results of an older upload or heatmap than the newest are dropped
let heatmaps = 0;

// ---- The network ---------------------------------------------------------------------------

/** Download a file as a Blob. The browser refuses it if its hash is not `integrity`. */
async function download({ url, integrity }, report) {
  const response = await fetch(url, { integrity }).catch((error) => error);
  const reason = response.message ?? response.status;
  if (!response.ok) throw new Error(`${url} can't be loaded: ${reason}`);
  const chunks = [];
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    chunks.push(part.value);
    report(part.value.length);
  }
  return new Blob(chunks, { type: "text/javascript" });
}

async function loadNetwork() {
  let loaded = 0;
  const total = facts.downloads.reduce((sum, file) => sum + file.bytes, 0);
  const report = (bytes) => {
    loaded += bytes;
    $("progress").value = loaded / total;
    $("status").textContent = `Loading the model: ${Math.round((100 * loaded) / total)}%`;
  };
  const [model, wasm, script] = await Promise.all(
    facts.downloads.map((file) => download(file, report)));
  $("status").textContent = "Starting the model";
  ort = await import(URL.createObjectURL(script));
  const wasmBinary = await wasm.arrayBuffer();
  Object.assign(ort.env.wasm, { proxy: true, numThreads: 1, wasmBinary });
  return ort.InferenceSession.create(new Uint8Array(await model.arrayBuffer()));
}

/** Run the graph of src/serving/onnx_model.py -> logits of three scales, maps of three stages.
 *  The maps explain log(objectness) + log(class probability) of `candidate`. */
async function run(pixels, candidate) {
  const size = facts.image_size;
  const feeds = { images: new ort.Tensor("float32", pixels.slice(), [1, 3, size, size]) };
  facts.strides.forEach((stride, scale) => {
    const shape = [1, 3, size / stride, size / stride, 5 + facts.classes.length];
    const seed = new Float32Array(shape.reduce((a, b) => a * b));
    if (candidate?.scale === scale) {
      seed[candidate.start] = 1 - candidate.objectness; // the derivative of log(sigmoid)
      seed[candidate.start + 5 + candidate.label] = 1 - candidate.probability;
    }
    feeds[`seed${stride}`] = new ort.Tensor("float32", seed, shape);
  });
  const outputs = await (await session).run(feeds);
  const perStride = (name) => facts.strides.map((stride) => outputs[name + stride].data);
  return { logits: perStride("logits"), cams: perStride("cam") };
}

// ---- Pixels: src/serving/images.py ---------------------------------------------------------

/** The weights of torch's antialiased bilinear interpolation: one triangle per output. */
function triangles(from, to) {
  const support = Math.max(from / to, 1);
  return Array.from({ length: to }, (_, i) => {
    const centre = (from / to) * (i + 0.5);
    const first = Math.max(Math.floor(centre - support + 0.5), 0);
    const end = Math.min(Math.floor(centre + support + 0.5), from);
    const weights = Array.from({ length: end - first }, (_, k) =>
      Math.max(0, 1 - Math.abs(first + k - centre + 0.5) / support));
    const sum = weights.reduce((a, b) => a + b);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

/** Resample the middle axis: [outer, from, inner] -> [outer, to, inner]. */
function resample(data, outer, from, to, inner, round = (x) => x) {
  const result = new Float32Array(outer * to * inner);
  triangles(from, to).forEach(({ first, weights }, i) => {
    for (let o = 0; o < outer; o++) {
      for (let c = 0; c < inner; c++) {
        let sum = 0;
        let position = (o * from + first) * inner + c;
        for (let k = 0; k < weights.length; k++) {
          sum += weights[k] * data[position];
          position += inner;
        }
        result[(o * to + i) * inner + c] = round(sum);
      }
    }
  });
  return result;
}

/** Bitmap -> pixels [3, S, S] in 0..1, and where in the square the image is. */
function letterbox(bitmap, size) {
  const scale = size / Math.max(bitmap.width, bitmap.height);
  const [width, height] = [bitmap.width, bitmap.height].map((edge) =>
    Math.max(1, roundHalfEven(edge * scale)));
  const placement = { left: (size - width) >> 1, top: (size - height) >> 1, width, height };
  const narrow = new Float32Array(bitmap.height * width * 4);
  const band = element("canvas", { width: bitmap.width, height: 256 }); // phones limit canvases
  const context = band.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind transparent pixels
  for (let y = 0; y < bitmap.height; y += band.height) {
    const rows = Math.min(band.height, bitmap.height - y);
    context.fillRect(0, 0, band.width, band.height);
    context.drawImage(bitmap, 0, -y);
    const { data } = context.getImageData(0, 0, bitmap.width, rows);
    narrow.set(resample(data, rows, bitmap.width, width, 4, Math.round), y * width * 4);
  }
  const inner = resample(narrow, 1, bitmap.height, height, width * 4, Math.round);
  const pixels = new Float32Array(3 * size * size).fill(114 / 255);
  for (let i = 0; i < width * height; i++) {
    const x = placement.left + (i % width);
    const y = placement.top + Math.floor(i / width);
    for (let c = 0; c < 3; c++) pixels[(c * size + y) * size + x] = inner[4 * i + c] / 255;
  }
  return { pixels, placement };
}

// ---- Detections: src/model/boxes.py --------------------------------------------------------

/** Logits -> predictions above the minimum score, and the best in any case, best first. */
function decode(logits, { left, top, width, height }, image) {
  const length = 5 + facts.classes.length;
  const [scaleX, scaleY] = [image.width / width, image.height / height];
  const predictions = [];
  facts.strides.forEach((stride, scale) => {
    const grid = facts.image_size / stride;
    for (let cell = 0; cell < 3 * grid ** 2; cell++) { // in the order anchor, row, column
      const start = cell * length;
      const [first, x, y, w, h, ...classes] = logits[scale].subarray(start, start + length);
      const label = classes.indexOf(Math.max(...classes));
      const objectness = sigmoid(first);
      const probability = sigmoid(classes[label]);
      const centreX = ((cell % grid) + sigmoid(x)) * stride - left;
      const centreY = ((Math.floor(cell / grid) % grid) + sigmoid(y)) * stride - top;
      const [halfWidth, halfHeight] = facts.anchors[scale][Math.floor(cell / grid ** 2)].map(
        (edge, i) => (edge / 2) * Math.exp(Math.min(i ? h : w, MAX_LOG_SCALE)));
      predictions.push({ index: predictions.length, scale, start, label, objectness, probability,
        score: objectness * probability,
        box: [(centreX - halfWidth) * scaleX, (centreY - halfHeight) * scaleY,
          (centreX + halfWidth) * scaleX, (centreY + halfHeight) * scaleY] });
    }
  });
  predictions.sort((a, b) => b.score - a.score);
  return predictions.filter(({ score }, i) => i === 0 || score > facts.min_score);
}

function iou(a, b) {
  const width = Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0]));
  const height = Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return (width * height) / (area(a) + area(b) - width * height);
}

/** Non-maximum suppression per class. */
function nms(candidates, confidence, threshold) {
  const above = candidates.filter(({ score }) => score > Math.max(confidence, facts.min_score));
  const kept = [];
  for (const candidate of above.slice(0, PRE_NMS_TOPK)) {
    const duplicate = (other) =>
      other.label === candidate.label && iou(other.box, candidate.box) > threshold;
    if (!kept.some(duplicate)) kept.push(candidate);
  }
  return kept.slice(0, MAX_DETECTIONS);
}

// ---- Heatmaps: src/serving/gradcam.py ------------------------------------------------------

function normalize(map) {
  const maximum = map.reduce((a, b) => Math.max(a, b), 0);
  return maximum ? map.map((value) => value / maximum) : map;
}

/** Scale each layer's map to 1, upsample, sum, cut off the bars of the letterbox, scale to 1. */
function combine(cams, layers, { left, top, width, height }) {
  const size = facts.image_size;
  const heatmap = new Float32Array(width * height);
  facts.strides.forEach((stride, i) => {
    if (layers !== "all" && 2 ** layers !== stride) return; // stage 3 has stride 8
    const grid = size / stride;
    const wide = resample(normalize(cams[i]), grid, grid, size, 1);
    const upsampled = resample(wide, 1, grid, size, size);
    for (let p = 0; p < heatmap.length; p++) {
      heatmap[p] += upsampled[(Math.floor(p / width) + top) * size + (p % width) + left];
    }
  });
  return normalize(heatmap);
}

/** The heatmap of some predictions: the maximum over theirs; null if another was asked for. */
async function explain(image, candidates, layers) {
  const number = ++heatmaps;
  let heatmap = new Float32Array(image.placement.width * image.placement.height);
  for (const candidate of candidates) {
    candidate.cams ??= run(image.pixels, candidate).then(({ cams }) => cams);
    const own = combine(await candidate.cams, layers, image.placement);
    if (number !== heatmaps) return null;
    heatmap = heatmap.map((value, i) => Math.max(value, own[i]));
  }
  return heatmap;
}

// ---- The page ------------------------------------------------------------------------------

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** An element in the colour of a class, its text black or white by the luminance of WCAG 2. */
function coloured(tag, label, ...children) {
  const colour = facts.colours[label];
  const [red, green, blue] = colour.map((channel) => (channel / 255) ** 2.2);
  const isLight = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18;
  const node = element(tag, {}, ...children);
  node.style.setProperty("--colour", `rgb(${colour})`);
  node.style.setProperty("--contrast", isLight ? "black" : "white");
  return node;
}

/** Draw an image of any size, at most MAX_VIEW pixels on its long side. */
function draw(id, image) {
  const scale = Math.min(1, MAX_VIEW / Math.max(image.width, image.height));
  const canvas = $(id).querySelector("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  $(id).hidden = false;
}

/** Show the image with boxes over it, the first on top. */
function showBoxes(id, detections, withLabels) {
  draw(id, $("image").querySelector("canvas"));
  const { width, height } = current;
  $(id).querySelector(".boxes").replaceChildren(...detections.toReversed().map((detection) => {
    const { box: [x1, y1, x2, y2], label, score } = detection;
    const text = `${facts.classes[label]} ${(100 * score).toFixed(0)}%`;
    const node = coloured("div", label, ...(withLabels ? [element("span", {}, text)] : []));
    const inset = [y1 / height, 1 - x2 / width, 1 - y2 / height, x1 / width];
    node.style.inset = inset.map((edge) => `${100 * clamp(edge, 0, 1)}%`).join(" ");
    node.classList.toggle("at-top", inset[0] < 0.08);
    return node;
  }));
  const free = []; // labels that overlap no other, the best detection's first
  for (const label of [...$(id).querySelectorAll("span")].reverse()) {
    const { left, right, top, height } = label.getBoundingClientRect();
    let down = 0;
    const overlaps = (other) => left < other.right && other.left < right &&
      Math.abs(top + down - other.top) < height;
    while (free.some(overlaps)) down += height;
    label.style.translate = `0 ${down}px`;
    free.push({ left, right, top: top + down });
  }
}

/** Draw the colours of the heatmap; their opacity grows with the value. */
function drawHeatmap({ heatmap, placement: { width, height } }) {
  const colours = new ImageData(width, height);
  heatmap.forEach((value, i) => {
    const opacity = $("opacity").value * (0.25 + 0.75 * value);
    colours.data.set([...facts.heatmap_colours[Math.round(255 * value)], 255 * opacity], 4 * i);
  });
  Object.assign($("colours"), { width, height }).getContext("2d").putImageData(colours, 0, 0);
}

async function showHeatmap() {
  const { detections, candidates: [top] } = current;
  const selected = detections.filter(({ index, label }) =>
    ["all", `class ${label}`, `${index}`].includes(target));
  const explained = selected.length ? selected.slice(0, MAX_EXPLAINED) : [top];
  const heatmap = await explain(current, explained, $("layers").value);
  if (!heatmap) return;
  current.heatmap = heatmap;
  showBoxes("heatmap", explained, !selected.length);
  drawHeatmap(current);
  let message = facts.bright_areas;
  if (!selected.length) {
    message = `No detection above ${Math.round(100 * $("confidence").value)}%. ` +
      `The top candidate is ${facts.classes[top.label]} at ${percent(top)}.`;
  } else if (selected.length > MAX_EXPLAINED) {
    message = `The heatmap shows the best ${MAX_EXPLAINED} of ${selected.length} detections.`;
  }
  $("message").textContent = message;
}

/** Show the detections above the thresholds; the network doesn't run again. */
function update() {
  for (const slider of document.querySelectorAll("input[type=range]")) {
    slider.previousElementSibling.textContent = slider.value;
  }
  if (!current) return;
  const { width, height, candidates, seconds } = current;
  const detections = nms(candidates, $("confidence").value, $("iou_threshold").value);
  current.detections = detections;
  showBoxes("detections", detections, true);
  const count = `${detections.length} detection${detections.length === 1 ? "" : "s"}`;
  $("summary").replaceChildren(
    element("b", {}, detections.length ? count : "No detections. Lower the confidence threshold."),
    ` · ${seconds.toFixed(2)} s · ${width} × ${height} pixels`);
  const labels = detections.map(({ label }) => label);
  const names = labels.map((label) => facts.classes[label]);
  const options = [new Option("All detections", "all"),
    ...[...new Set(labels)].map((label) =>
      new Option(`Class ${facts.classes[label]}`, `class ${label}`)),
    ...detections.map((detection, i) =>
      new Option(`${i + 1}: ${names[i]}, ${percent(detection)}`, detection.index))];
  $("target").replaceChildren(...options);
  $("rows").replaceChildren(...detections.map(({ index, label, score, box }, i) => {
    const edges = box.map((edge, k) => clamp(edge, 0, k % 2 ? height : width).toFixed(0));
    const texts = [i + 1, "", percent({ score }), edges.join(", ")];
    const cells = texts.map((text) => element("td", {}, text));
    cells[1].append(coloured("i", label), ` ${names[i]}`);
    const row = element("tr", { tabIndex: 0 }, ...cells);
    row.dataset.target = index;
    return row;
  }));
  explainTarget(options.some(({ value }) => value === target) ? target : "all");
}

function explainTarget(value) {
  target = value;
  $("target").value = value;
  for (const row of $("rows").children) row.ariaCurrent = row.dataset.target === value;
  showHeatmap().catch(showError);
}

function showError(error) {
  const properties = { className: "error", role: "alert" };
  $("summary").replaceChildren(element("span", properties, error.message));
}

/** Read an image (a Blob or a video), run the network once, and show the result. */
async function analyze(source) {
  const number = ++uploads;
  current = null;
  for (const id of ["image", "detections", "heatmap"]) $(id).hidden = true;
  for (const id of ["rows", "message"]) $(id).replaceChildren();
  $("summary").textContent = "Detecting objects.";
  const bitmap = await createImageBitmap(source, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error("This file can't be read as an image. Use a JPEG or PNG file.");
  });
  stopCamera();
  draw("image", bitmap);
  await session;
  const start = performance.now();
  const { pixels, placement } = letterbox(bitmap, facts.image_size);
  const { logits } = await run(pixels);
  if (number !== uploads) return;
  const { width, height } = bitmap;
  const seconds = (performance.now() - start) / 1000;
  const candidates = decode(logits, placement, bitmap);
  current = { width, height, pixels, placement, candidates, seconds };
  target = "all";
  update();
}

function stopCamera() {
  $("video").srcObject?.getTracks().forEach((track) => track.stop());
  $("video").hidden = true;
  $("camera").textContent = "Camera";
}

async function useCamera() {
  if (!$("video").hidden) return analyze($("video"));
  const constraints = { video: { facingMode: "environment" } };
  $("video").srcObject = await navigator.mediaDevices.getUserMedia(constraints);
  $("camera").textContent = "Take the photograph";
  $("image").hidden = true;
  $("video").hidden = false;
  return $("video").play();
}

function connect() {
  const on = (node, type, action) =>
    node.addEventListener(type, (event) => Promise.resolve(action(event)).catch(showError));
  const analyzeFirst = ([file]) => file && analyze(file);
  on($("upload"), "click", () => $("file").click());
  on($("file"), "change", () => analyzeFirst($("file").files));
  on($("camera"), "click", useCamera);
  on(document, "paste", (event) => analyzeFirst(event.clipboardData.files));
  on(document, "dragover", (event) => event.preventDefault());
  on(document, "drop", (event) => {
    event.preventDefault();
    return analyzeFirst(event.dataTransfer.files);
  });
  for (const id of ["confidence", "iou_threshold", "opacity", "layers"]) on($(id), "input", update);
  on($("target"), "input", () => explainTarget($("target").value));
  const explainRow = (event) => explainTarget(event.target.closest("tr").dataset.target);
  on($("rows"), "click", explainRow);
  on($("rows"), "keydown", (event) => event.key === "Enter" && explainRow(event));
  $("camera").hidden = !navigator.mediaDevices;
}

/** Fill in what facts.json says. */
function describe() {
  document.title = facts.title;
  $("title").textContent = facts.title;
  for (const id of ["confidence", "iou_threshold"]) $(id).value = facts[id];
  for (const [value, name] of facts.layers) $("layers").append(new Option(name, value));
  for (const name of facts.samples) {
    const image = element("img", { src: `samples/${name}`, alt: name, loading: "lazy" });
    const open = () => fetch(image.src).then((response) => response.blob()).then(analyze);
    $("samples").append(element("button", { onclick: () => open().catch(showError) }, image));
  }
  $("credits").innerHTML = facts.credits_html;
  $("about").innerHTML = facts.about_html;
}

async function start() {
  if (location.protocol === "file:") {
    throw new Error("Start a server here, python -m http.server, and open http://localhost:8000.");
  }
  if (typeof WebAssembly !== "object") {
    throw new Error("This page needs WebAssembly. Use a current Chrome, Edge, Firefox or Safari.");
  }
  facts = await (await fetch("facts.json")).json();
  describe();
  connect();
  update();
  session = loadNetwork();
  await session;
  $("loading").hidden = true;
}

start().catch(showError);
