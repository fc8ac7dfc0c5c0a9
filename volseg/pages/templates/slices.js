// What the pages with slices share: planes, places, letters and scale bars.

const AXIAL = 0, CORONAL = 1, SAGITTAL = 2;
const BARS_MM = [1, 2, 5, 10, 20, 50, 100, 200];
const THREE_PLANES = [
  { sliceType: AXIAL, position: [0, 0, 0.6, 1] },
  { sliceType: CORONAL, position: [0.6, 0, 0.4, 0.5] },
  { sliceType: SAGITTAL, position: [0.6, 0.5, 0.4, 0.5] },
];

const at = (id) => document.getElementById(id);

// Convert mm to fractions (0 to 1) along the volume's axes. Without the last argument NiiVue treats
// an oblique grid as aligned with the world axes.
function fractionOf(nv, point) {
  return nv.mm2frac(point, 0, true);
}

async function inflated(id) {
  const bytes = Uint8Array.from(atob(at(id).textContent), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function hasWebGL() {
  try { return document.createElement("canvas").getContext("webgl2") !== null; } catch { return false; }
}

// Draw R, L, A, P, S and I at the edges of a slice, beside the crosshair where it would cross them.
function drawLetters(nv, pen, slice, scale) {
  const [start, top, signed, height] = slice.leftTopWidthHeight, width = Math.abs(signed), left = Math.min(start, start + signed);
  const cross = nv.frac2canvasPosWithTile([...nv.scene.crosshairPos], slice.axCorSag)?.pos ?? [left, top];
  const [west, east] = slice.axCorSag === SAGITTAL ? ["A", "P"] : nv.opts.isRadiologicalConvention ? ["R", "L"] : ["L", "R"];
  const [north, south] = slice.axCorSag === AXIAL ? ["A", "P"] : ["S", "I"];
  const gap = 22 * scale, beside = (middle, line) => (Math.abs(middle - line) < gap ? line + (line < middle ? 1 : -1) * 1.4 * gap : middle);
  const x = beside(left + width / 2, cross[0]), y = beside(top + height / 2, cross[1]), edge = 12 * scale;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (const [letter, h, v] of [[west, left + edge, y], [east, left + width - edge, y], [north, x, top + edge], [south, x, top + height - edge]]) {
    write(pen, letter, h, v, scale, "#ffd24d");
  }
  pen.textAlign = "start";
  pen.textBaseline = "alphabetic";
}

function drawBar(pen, slice, scale) {
  const [left, top, width, height] = slice.leftTopWidthHeight;
  const perMm = Math.abs(width) / Math.abs(slice.fovMM[0]);
  const mm = BARS_MM.filter((bar) => bar * perMm < Math.abs(width) / 3).pop();
  if (!mm || !Number.isFinite(perMm)) return;
  const x = Math.min(left, left + width) + 10 * scale, y = top + height - 10 * scale;
  pen.fillStyle = "#000000";
  pen.fillRect(x - scale, y - scale, mm * perMm + 2 * scale, 4 * scale);
  pen.fillStyle = "#ffffff";
  pen.fillRect(x, y, mm * perMm, 2 * scale);
  write(pen, `${mm} mm`, x, y - 5 * scale, scale);
}

function write(pen, text, x, y, scale, colour = "#ffffff") {
  pen.lineWidth = 3 * scale;
  pen.strokeStyle = "#000000";
  pen.fillStyle = colour;
  pen.strokeText(text, x, y);
  pen.fillText(text, x, y);
}

function say(text) {
  at("message").textContent = [at("message").textContent, text].filter(Boolean).join(" ");
  at("message").hidden = false;
}

// NiiVue's arrow keys change the frame of a time series; here they move the crosshair.
function moveByKeys(nv) {
  const toRight = nv.opts.isRadiologicalConvention ? -1 : 1;
  const steps = {
    ArrowLeft: [-toRight, 0, 0], ArrowRight: [toRight, 0, 0], ArrowUp: [0, 1, 0],
    ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1],
  };
  nv.canvas.addEventListener("keydown", (event) => {
    if (event.key !== "Tab") event.stopImmediatePropagation();
    if (!steps[event.key]) return;
    event.preventDefault();
    nv.moveCrosshairInVox(...steps[event.key]);
    nv.createOnLocationChange();
  }, { capture: true });
}
