// The page of a patient at two times: both scans on one grid, with one crosshair.

const FLICKER_MS = 700;
const COLOURS = [[77, 211, 77], [255, 140, 51]]; // of the lesions at baseline and at follow-up
const content = island("content");
const viewers = [];
let shownRow = null, front = 0, timer = null;

const table = new DataTable(at("changes"), content.table, {
  look: (line, row) => line.addEventListener("click", () => choose(row)),
});

function choose(row) {
  if (!row) return;
  shownRow = row;
  table.mark(row);
  const point = content.points[content.table.rows.indexOf(row)];
  if (!point || !viewers.length) { at("place").textContent = "The place of this lesion is not known."; return; }
  moveTo(fractionOf(viewers[0], point));
}

function stepRow(by) {
  choose(table.rows[shownRow === null ? 0 : table.rows.indexOf(shownRow) + by]);
}

// Move the crosshair of both scans, which share one grid.
function moveTo(position) {
  for (const nv of viewers) {
    nv.scene.crosshairPos = [...position];
    nv.drawScene();
  }
  viewers[0].createOnLocationChange();
}

function sliderAxis() {
  return { 1: 1, 2: 0 }[at("plane").value] ?? 2;
}

function showPlace(place) {
  const [r, a, s] = place.mm, axis = sliderAxis(), n = viewers[0].volumes[0].dims[axis + 1];
  const index = Math.floor(Math.min(viewers[0].scene.crosshairPos[axis], 0.999999) * n);
  Object.assign(at("place").dataset, { r, a, s });
  at("place").textContent = `R ${r.toFixed(1)}  A ${a.toFixed(1)}  S ${s.toFixed(1)} mm in the baseline scan`;
  at("slice").max = n;
  at("slice").value = index + 1;
  at("slice-place").textContent = `${index + 1} of ${n}`;
}

async function viewerOf(side) {
  const nv = new niivue.Niivue({
    isRadiologicalConvention: true, backColor: [0, 0, 0, 1], crosshairColor: [0.45, 0.75, 1, 0.8], crosshairWidth: 0.25, crosshairWidthUnit: "percent", crosshairGap: 6,
    showLegend: false, clipPlaneHotKey: "", viewModeHotKey: "", dragAndDropEnabled: false, logLevel: "error", loadingText: "", scrollRequiresFocus: false,
    isOrientationTextVisible: false, sagittalNoseLeft: true,
  });
  await nv.attachToCanvas(at(`canvas-${side}`));
  const [low, high] = content.windows[side];
  const image = await niivue.NVImage.loadFromBase64({ base64: at(`packed-${2 * side}`).textContent, name: "image.nii.gz", colormap: "gray", cal_min: low, cal_max: high, trustCalMinMax: false });
  const ids = await niivue.NVImage.loadFromBase64({ base64: at(`packed-${2 * side + 1}`).textContent, name: "ids.nii.gz", opacity: 0.3 });
  const [red, green, blue] = COLOURS[side];
  ids.setColormapLabel({ R: [0, red], G: [0, green], B: [0, blue], A: [0, 255], I: [0, 1], labels: ["", "lesion"] });
  ids.hdr.intent_code = 1002;
  nv.addVolume(image);
  nv.addVolume(ids);
  [image.cal_min, image.cal_max] = [low, high];
  nv.opts.multiplanarShowRender = niivue.SHOW_RENDER.NEVER;
  nv.setSliceType(niivue.SLICE_TYPE.MULTIPLANAR);
  const draw = nv.drawScene.bind(nv);
  nv.drawScene = () => { const text = draw(); drawOver(nv, side); return text; };
  return nv;
}

function drawOver(nv, side) {
  const canvas = at(`lines-${side}`);
  if (canvas.width !== nv.canvas.width) canvas.width = nv.canvas.width;
  if (canvas.height !== nv.canvas.height) canvas.height = nv.canvas.height;
  const pen = canvas.getContext("2d"), scale = nv.uiData.dpr || 1;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.font = `${12 * scale}px sans-serif`;
  for (const slice of nv.screenSlices) {
    drawBar(pen, slice, scale);
    drawLetters(nv, pen, slice, scale);
  }
}

function link(nv, other) {
  nv.onLocationChange = (place) => {
    if (nv.scene.crosshairPos.some((value, n) => value !== other.scene.crosshairPos[n])) {
      other.scene.crosshairPos = [...nv.scene.crosshairPos];
      other.drawScene();
    }
    showPlace(place);
  };
  moveByKeys(nv);
}

function swap() {
  front = 1 - front;
  at("two").dataset.front = String(front);
}

// Show both scans in the same place, in turn; a reader who asked for less motion swaps by hand.
function flicker() {
  const isOn = at("flicker").getAttribute("aria-pressed") !== "true";
  at("flicker").setAttribute("aria-pressed", String(isOn));
  at("two").classList.toggle("flicker", isOn);
  at("swap").disabled = !isOn;
  clearInterval(timer);
  if (isOn && !matchMedia("(prefers-reduced-motion: reduce)").matches) timer = setInterval(swap, FLICKER_MS);
  at("two").dataset.front = String(front);
  for (const nv of viewers) { nv.resizeListener(); nv.drawScene(); }
}

function control() {
  at("plane").addEventListener("change", () => {
    const value = at("plane").value;
    for (const nv of viewers) nv.setCustomLayout(value === "all" ? THREE_PLANES : [{ sliceType: Number(value), position: [0, 0, 1, 1] }]);
    viewers[0].createOnLocationChange();
  });
  at("slice").addEventListener("input", () => {
    const axis = sliderAxis(), position = [...viewers[0].scene.crosshairPos];
    position[axis] = (Number(at("slice").value) - 0.5) / viewers[0].volumes[0].dims[axis + 1];
    moveTo(position);
  });
  at("opacity").addEventListener("input", () => viewers.forEach((nv) => nv.setOpacity(1, Number(at("opacity").value))));
  at("preset")?.addEventListener("change", () => {
    const preset = content.presets[Number(at("preset").value)];
    for (const nv of viewers) {
      [nv.volumes[0].cal_min, nv.volumes[0].cal_max] = [preset.low, preset.high];
      nv.updateGLVolume();
    }
  });
  at("flicker").addEventListener("click", flicker);
  at("swap").addEventListener("click", () => { clearInterval(timer); swap(); });
  at("row-before").addEventListener("click", () => stepRow(-1));
  at("row-after").addEventListener("click", () => stepRow(1));
  onKeys({ n: () => stepRow(1), p: () => stepRow(-1), f: flicker, x: () => at("swap").click() }, () => at("keys").checked);
}

async function start() {
  if (!hasWebGL()) {
    without("no-webgl", "The slices cannot be shown: this browser has no WebGL 2. The table below works without it.");
    return;
  }
  document.head.append(make("script", {}, await inflated("niivue")));
  for (const side of [0, 1]) viewers.push(await viewerOf(side));
  link(viewers[0], viewers[1]);
  link(viewers[1], viewers[0]);
  control();
  at("plane").dispatchEvent(new Event("change"));
  const asked = new URLSearchParams(location.hash.slice(1)).get("row");
  choose(content.table.rows[Number(asked) || 0]);
  document.documentElement.dataset.ready = "1";
}

function without(state, text) {
  say(text);
  at("controls").hidden = at("two").hidden = true;
  document.documentElement.dataset.ready = state;
}

followTheme();
start().catch((error) => without("error", `The slices cannot be shown (${error.message}). The table below still works.`));
