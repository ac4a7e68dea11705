// Pictures that people bring: chosen, dropped, pasted, or drawn. They stay in this tab, so that reload and back find them.
import { ask, ServiceError } from "./api.js";
import { h, icon, speak } from "./parts.js";

const MOST_PIXELS = 1024, MOST_BYTES = 1_500_000, SVG_PIXELS = 512;
const PICTURE = "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 9.5v.01";

const load = address => new Promise((done, fail) => {
  const image = new Image();
  image.onload = () => done(image);
  image.onerror = () => fail(new Error("this browser cannot show the file as a picture; choose a PNG, JPEG, WebP, GIF or SVG"));
  image.src = address;
});

const toDataUrl = file => new Promise((done, fail) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.onerror = () => fail(reader.error);
  reader.readAsDataURL(file);
});

/** Return a file as the data URL that is sent: as it is if it is small, else with at most 1,024 pixels a side. */
export async function readPicture(file) {
  if (!file.type.startsWith("image/")) throw new Error(`${file.name || "that"} is no picture; choose a PNG, JPEG, WebP, GIF or SVG`);
  const address = URL.createObjectURL(file), isDrawing = file.type === "image/svg+xml";
  try {
    const image = await load(address);
    const most = Math.max(image.naturalWidth, image.naturalHeight) || SVG_PIXELS;
    if (!isDrawing && file.size <= MOST_BYTES && most <= MOST_PIXELS) return await toDataUrl(file);
    const scale = isDrawing ? SVG_PIXELS / most : Math.min(1, MOST_PIXELS / most);
    const canvas = h("canvas");
    canvas.width = Math.max(1, Math.round((image.naturalWidth || SVG_PIXELS) * scale));
    canvas.height = Math.max(1, Math.round((image.naturalHeight || SVG_PIXELS) * scale));
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL(isDrawing ? "image/png" : "image/webp", 0.92);
  } finally {
    URL.revokeObjectURL(address);
  }
}

/** Return a picture that the service shows as the data URL that is sent. */
export async function fetchPicture(address) {
  if (!/^\/(atlas\/)?pictures\//.test(address)) throw new ServiceError("the address names no picture of this service", 400);
  return toDataUrl(await (await ask(address, { as: "response" })).blob());
}

/** Keep a picture in this tab and return the name that addresses have for it. */
export function keep(picture) {
  let hash = 5381;
  for (let place = 0; place < picture.length; place++) hash = (Math.imul(hash, 33) ^ picture.charCodeAt(place)) >>> 0;
  const name = hash.toString(36);
  for (let attempt = 0; attempt < 20; attempt++) {
    try {
      sessionStorage.setItem(`picture.${name}`, picture);
      break;
    } catch { // no room: the oldest one goes
      const old = Object.keys(sessionStorage).find(key => key.startsWith("picture."));
      if (!old) break;
      sessionStorage.removeItem(old);
    }
  }
  return name;
}
export const kept = name => (name ? sessionStorage.getItem(`picture.${name}`) : null);

/** Make an element take pictures: dropped on it, or pasted while it is on the page. */
export function takePictures(element, use, complain) {
  const read = async file => {
    try {
      use(await readPicture(file));
    } catch (error) {
      complain(error);
    }
  };
  let depth = 0;
  element.addEventListener("dragenter", event => { event.preventDefault(); depth++; element.classList.add("over"); });
  element.addEventListener("dragover", event => event.preventDefault());
  element.addEventListener("dragleave", () => { if (--depth <= 0) element.classList.remove("over"); });
  element.addEventListener("drop", event => {
    event.preventDefault();
    depth = 0;
    element.classList.remove("over");
    const file = [...event.dataTransfer.files][0];
    if (file) read(file);
    else complain(new Error("drop the file of a picture; an address is not fetched"));
  });
  const paste = event => {
    if (!element.isConnected) { document.removeEventListener("paste", paste); return; }
    const file = [...event.clipboardData.files].find(one => one.type.startsWith("image/"));
    if (file) { event.preventDefault(); read(file); }
  };
  document.addEventListener("paste", paste);
  return read;
}

/** A button that chooses a file. */
export function chooser(words, read, attributes = {}) {
  const field = h("input", { type: "file", accept: "image/*", hidden: true,
    onchange: () => { if (field.files[0]) read(field.files[0]); field.value = ""; } });
  return h("span", { class: "chooser" }, h("button", { type: "button", ...attributes, onclick: () => field.click() }, icon(PICTURE), words), field);
}

/** A small canvas to draw on with a pen of the width that icons have; `use` gets the drawing after each stroke. */
export function drawingBoard(use, size = 288) {
  const canvas = h("canvas", { class: "board", width: size, height: size, role: "img", "aria-label": "Drawing; draw with the pointer" });
  const pen = canvas.getContext("2d");
  let strokes = [], stroke = null, width = 22;
  function paint() {
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, size, size);
    pen.strokeStyle = pen.fillStyle = "#000";
    pen.lineCap = pen.lineJoin = "round";
    for (const line of strokes) {
      pen.lineWidth = line.width;
      pen.beginPath();
      line.points.forEach(([x, y], place) => place ? pen.lineTo(x, y) : pen.moveTo(x, y));
      if (line.points.length === 1) pen.lineTo(line.points[0][0] + 0.1, line.points[0][1]);
      pen.stroke();
    }
    undo.disabled = clear.disabled = !strokes.length;
    board.classList.toggle("blank", !strokes.length);
  }
  const at = event => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * size / box.width, (event.clientY - box.top) * size / box.height];
  };
  canvas.addEventListener("pointerdown", event => {
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    stroke = { width, points: [at(event)] };
    strokes.push(stroke);
    paint();
  });
  canvas.addEventListener("pointermove", event => { if (stroke) { for (const one of event.getCoalescedEvents?.() ?? [event]) stroke.points.push(at(one)); paint(); } });
  const end = () => { if (stroke) { stroke = null; use(canvas.toDataURL("image/png")); } };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  const undo = h("button", { type: "button", onclick: () => { strokes.pop(); paint(); use(strokes.length ? canvas.toDataURL("image/png") : null); } }, "Undo");
  const clear = h("button", { type: "button", onclick: () => { strokes = []; paint(); use(null); speak("The drawing is empty."); } }, "Clear");
  const widths = h("label", { class: "inline" }, "Pen ", h("input", { type: "range", min: 8, max: 44, value: width, "aria-label": "Width of the pen", oninput: event => { width = Number(event.target.value); } }));
  const board = h("div", { class: "drawing" }, h("div", { class: "paper" }, canvas, h("span", { class: "hint", "aria-hidden": "true" }, "Draw here")), h("div", { class: "row" }, widths, undo, clear));
  paint();
  board.reset = () => { strokes = []; paint(); };
  return board;
}
