// Object detection with heatmaps in the browser: model.onnx, run by onnxruntime-web in a worker.

const $ = (id) => document.getElementById(id);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const roundHalfEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // as Python
const percent = (score) => `${(100 * score).toFixed(1)}%`;

let facts; // facts.json: what the page knows about the model
let ort; // onnxruntime-web
let session; // promise of the loaded model
let current; // the analyzed image: width, height, pixels, placement, candidates, detections, ...
let work = 0; // counts images and heatmaps; results of any but the newest are dropped
let choices = 0; // counts chosen images and starts of the camera; only the newest goes on

/** Download a file. The browser refuses it if its hash is not `integrity`. */
async function download({ url, integrity }) {
  const response = await fetch(url, { integrity }).catch(() => ({}));
  if (!response.ok) throw new Error(`${url} can't be loaded. README.md says how to run this page.`);
  const content = await response.arrayBuffer();
  $("progress").value += content.byteLength;
  return content;
}

async function loadNetwork() {
  $("progress").max = facts.downloads.reduce((sum, { bytes }) => sum + bytes, 0);
  const [model, wasmBinary, script] = await Promise.all(facts.downloads.map(download));
  ort = await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
  Object.assign(ort.env.wasm, { proxy: true, numThreads: 1, wasmBinary });
  return ort.InferenceSession.create(new Uint8Array(model));
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

/** Resample the middle axis: [outer, from, inner] -> [outer, to, inner], bilinear with
 *  antialiasing as in torch: an output is a mean weighted by a triangle. */
function resample(data, outer, from, to, inner, round = (x) => x) {
  const result = new Float32Array(outer * to * inner);
  const support = Math.max(from / to, 1);
  for (let i = 0; i < to; i++) {
    const centre = (from / to) * (i + 0.5);
    const first = Math.max(Math.floor(centre - support + 0.5), 0);
    const end = Math.min(Math.floor(centre + support + 0.5), from);
    const weights = Array.from({ length: end - first }, (_, k) =>
      Math.max(0, 1 - Math.abs(first + k - centre + 0.5) / support));
    const total = weights.reduce((a, b) => a + b);
    for (let o = 0; o < outer; o++) {
      for (let c = 0; c < inner; c++) {
        const start = (o * from + first) * inner + c;
        const sum = weights.reduce((part, weight, k) => part + weight * data[start + k * inner], 0);
        result[(o * to + i) * inner + c] = round(sum / total);
      }
    }
  }
  return result;
}

/** Bitmap -> pixels [3, S, S] in 0..1, and where in the square the image is, as images.py does. */
function letterbox(bitmap, size) {
  const scale = size / Math.max(bitmap.width, bitmap.height);
  const [width, height] = [bitmap.width, bitmap.height].map((edge) =>
    Math.max(1, roundHalfEven(edge * scale)));
  const placement = { left: (size - width) >> 1, top: (size - height) >> 1, width, height };
  const narrow = new Float32Array((bitmap.height + 255) * width * 4);
  const band = element("canvas", { width: bitmap.width, height: 256 }); // phones limit canvases
  const context = band.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind transparent pixels
  for (let y = 0; y < bitmap.height; y += band.height) {
    context.fillRect(0, 0, band.width, band.height);
    context.drawImage(bitmap, 0, -y);
    const { data } = context.getImageData(0, 0, band.width, band.height);
    narrow.set(resample(data, band.height, bitmap.width, width, 4, Math.round), y * width * 4);
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

/** Logits -> predictions, best first, at least one, decoded as in src/model/boxes.py. */
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
        (edge, i) => (edge / 2) * Math.exp(Math.min(i ? h : w, Math.log(1000 / 16))));
      predictions.push({ index: predictions.length, scale, start, label, objectness, probability,
        score: objectness * probability, box: [-1, 1].flatMap((side) =>
          [(centreX + side * halfWidth) * scaleX, (centreY + side * halfHeight) * scaleY]) });
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

/** Non-maximum suppression per class, of at most 1000 predictions to at most 300 detections, as
 *  src/model/boxes.py does. */
function nms(candidates, confidence, threshold) {
  const kept = [];
  for (const candidate of candidates.filter(({ score }) => score > confidence).slice(0, 1000)) {
    const duplicate = (other) =>
      other.label === candidate.label && iou(other.box, candidate.box) > threshold;
    if (!kept.some(duplicate)) kept.push(candidate);
  }
  return kept.slice(0, 300);
}

function normalize(map) {
  const maximum = map.reduce((a, b) => Math.max(a, b), 0);
  return maximum ? map.map((value) => value / maximum) : map;
}

/** Scale each layer's map to 1, upsample, sum, cut off the letterbox's bars, as gradcam.py does. */
function combine(cams, layers, { left, top, width, height }) {
  const size = facts.image_size;
  const heatmap = new Float32Array(width * height);
  facts.strides.forEach((stride, i) => {
    if (layers !== "all" && layers !== `${stride}`) return;
    const grid = size / stride;
    const wide = resample(normalize(cams[i]), grid, grid, size, 1);
    const upsampled = resample(wide, 1, grid, size, size);
    for (let p = 0; p < heatmap.length; p++) {
      heatmap[p] += upsampled[(Math.floor(p / width) + top) * size + (p % width) + left];
    }
  });
  return normalize(heatmap);
}

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Show boxes over an image, the first on top. */
function showBoxes(id, detections) {
  const { width, height } = current.bitmap;
  const boxes = detections.map(({ box: [x1, y1, x2, y2], label, score }) => {
    const inset = [y1 / height, 1 - x2 / width, 1 - y2 / height, x1 / width]
      .map((edge) => `${100 * clamp(edge, 0, 1)}%`).join(" ");
    const style = `inset: ${inset}; --colour: rgb(${facts.colours[label]})`;
    const text = `${facts.classes[label]} ${(100 * score).toFixed(0)}%`;
    return element("div", { style }, element("span", {}, text));
  });
  $(id).replaceChildren(...boxes.reverse());
}

/** Show the heatmap of what is selected: the maximum over its predictions. */
async function showHeatmap() {
  const number = ++work;
  const { detections, candidates: [top], placement, pixels } = current;
  const target = $("target").value; // "all", "class 7", or the index of a prediction
  for (const row of $("rows").children) row.ariaCurrent = row.dataset.target === target;
  const selected = detections.filter(({ index, label }) =>
    ["all", `class ${label}`, `${index}`].includes(target));
  const explained = selected.length ? selected.slice(0, facts.max_explained) : [top];
  let heatmap = new Float32Array(placement.width * placement.height);
  for (const candidate of explained) {
    candidate.cams ??= run(pixels, candidate).then(({ cams }) => cams);
    const own = combine(await candidate.cams, $("layers").value, placement);
    if (number !== work) return;
    heatmap = heatmap.map((value, i) => Math.max(value, own[i]));
  }
  showBoxes("explained", explained);
  $("explained").classList.toggle("candidate", !selected.length);
  const { width, height } = placement;
  const colours = new ImageData(width, height);
  heatmap.forEach((value, i) => {
    const colour = facts.heatmap_colours[Math.round(255 * value)];
    colours.data.set([...colour, 255 * (0.25 + 0.75 * value)], 4 * i);
  });
  Object.assign($("colours"), { width, height }).getContext("2d").putImageData(colours, 0, 0);
  const best = `The heatmap shows the best ${explained.length} of ${selected.length} detections.`;
  let message = selected.length > explained.length ? best : facts.bright_areas;
  if (!selected.length) {
    message = `No detection above ${Math.round(100 * $("confidence").value)}%. ` +
      `The top candidate is ${facts.classes[top.label]} at ${percent(top.score)}.`;
  }
  $("message").textContent = message;
  current.heatmap = heatmap;
}

/** Show the detections above the thresholds; the network doesn't run again. */
function update() {
  for (const slider of document.querySelectorAll("input[type=range]")) {
    slider.previousElementSibling.textContent = slider.value;
  }
  $("colours").style.opacity = $("opacity").value;
  if (!current) return;
  const { bitmap: { width, height }, candidates } = current;
  const detections = nms(candidates, $("confidence").value, $("iou_threshold").value);
  current.detections = detections;
  showBoxes("detections", detections);
  const count = `Detections: ${detections.length || "none. Lower the confidence threshold."}`;
  $("summary").replaceChildren(element("b", {}, count), ` · ${width} × ${height} pixels`);
  const former = $("target").value;
  const classes = [...new Set(detections.map(({ label }) => label))].map((label) =>
    new Option(`Class ${facts.classes[label]}`, `class ${label}`));
  $("target").replaceChildren(new Option("All detections", "all"), ...classes);
  $("rows").replaceChildren(...detections.map(({ index, label, score, box }, i) => {
    const name = facts.classes[label];
    $("target").append(new Option(`${i + 1}: ${name}, ${percent(score)}`, index));
    const edges = box.map((edge, k) => clamp(edge, 0, k % 2 ? height : width).toFixed(0));
    const colour = element("i", { style: `--colour: rgb(${facts.colours[label]})` });
    const cells = [[i + 1], [colour, " ", name], [percent(score)], [edges.join(", ")]];
    const row = element("tr", { tabIndex: 0 }, ...cells.map((cell) => element("td", {}, ...cell)));
    row.dataset.target = index;
    return row;
  }));
  $("target").value = former;
  if ($("target").selectedIndex < 0) $("target").value = "all";
  showHeatmap();
}

/** Read an image file, run the network once, and show the result. */
async function analyze(file) {
  const number = ++work;
  choices++;
  current = null;
  $("video").srcObject?.getTracks().forEach((track) => track.stop());
  $("video").srcObject = null;
  $("camera").textContent = "Camera";
  $("main").className = "empty";
  for (const id of ["rows", "target", "message", "explained"]) $(id).replaceChildren();
  $("colours").width = 0;
  $("summary").textContent = "Detecting objects.";
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }).catch(() => {
    if (number !== work) return;
    throw new Error("This file can't be read as an image. Use a JPEG or PNG file.");
  });
  await session;
  if (number !== work) return;
  const { pixels, placement } = letterbox(bitmap, facts.image_size);
  const { logits } = await run(pixels);
  if (number !== work) return;
  const candidates = decode(logits, placement, bitmap);
  current = { bitmap, pixels, placement, candidates };
  const src = URL.createObjectURL(file);
  for (const image of document.querySelectorAll(".image img")) image.src = src;
  $("main").style.setProperty("--ratio", bitmap.width / bitmap.height);
  $("main").className = "";
  update();
}

/** Start the camera; the second time, take a photograph. */
async function useCamera() {
  const video = $("video");
  if (video.srcObject) {
    if (!video.videoWidth) return; // no frame yet
    const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    return canvas.toBlob(analyze);
  }
  const number = ++choices;
  const constraints = { video: { facingMode: "environment" } };
  const stream = await navigator.mediaDevices.getUserMedia(constraints);
  if (number !== choices) return stream.getTracks().forEach((track) => track.stop());
  work++; // an image that is still being analyzed is dropped
  video.srcObject = stream;
  $("camera").textContent = "Take the photograph";
  $("main").className = "camera";
}

async function start() {
  if (typeof WebAssembly !== "object") {
    throw new Error("This page needs WebAssembly. Use a current Chrome, Edge, Firefox or Safari.");
  }
  facts = JSON.parse(new TextDecoder().decode(await download({ url: "facts.json" })));
  for (const id of ["confidence", "iou_threshold"]) $(id).value = facts[id];
  for (const [value, name] of facts.layers) $("layers").append(new Option(name, value));
  for (const name of facts.samples) {
    const image = element("img", { src: `samples/${encodeURIComponent(name)}`, alt: name });
    const onclick = async () => {
      const number = ++choices;
      const file = await (await fetch(image.src)).blob();
      if (number === choices) analyze(file);
    };
    $("samples").append(element("button", { onclick }, image));
  }
  $("credits").innerHTML = facts.credits_html;
  $("about").innerHTML = facts.about_html;
  const analyzeFirst = ([file]) => file && analyze(file);
  const explainRow = (event) => {
    $("target").value = event.target.closest("tr").dataset.target;
    showHeatmap();
  };
  $("file").onclick = () => { $("file").value = ""; }; // the same file may be chosen again
  $("file").onchange = () => analyzeFirst($("file").files);
  $("camera").onclick = useCamera;
  $("camera").hidden = !navigator.mediaDevices;
  document.onpaste = (event) => analyzeFirst(event.clipboardData.files);
  document.ondragover = document.ondrop = (event) => {
    event.preventDefault();
    analyzeFirst(event.dataTransfer.files);
  };
  $("main").oninput = ({ target }) => target !== $("file") && update();
  $("rows").onclick = explainRow;
  $("rows").onkeydown = (event) => event.key === "Enter" && explainRow(event);
  update();
  session = loadNetwork();
  await session;
}

window.onunhandledrejection = (event) => {
  event.preventDefault();
  $("summary").replaceChildren(element("b", { role: "alert" }, event.reason.message));
};
start().finally(() => { $("loading").hidden = true; });
