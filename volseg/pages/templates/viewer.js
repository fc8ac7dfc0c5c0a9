// The viewer page of a scan: slices, lesions and their numbers.

const BORDER = 0.35; // extra opacity of a lesion's border
const HARDLY = 0.001; // opacity; NiiVue does not draw a layer with opacity 0
const content = island("content");
const NOUN = content.noun.charAt(0).toUpperCase() + content.noun.slice(1);
const reviews = new Reviews(new URL("../", location.href).pathname);
let viewer = null;
let selected = null;

function colourOf(number) {
  return `#${content.colours.slice(6 * number - 6, 6 * number)}`;
}

// ---- the table and the measurements of the selected lesion

// The cell is a button, so it is not right-aligned like a number.
content.table.columns.find((column) => column.name === "lesion_id").number = false;
const table = new DataTable(at("lesions"), content.table, {
  cell: (column, row, owner) => {
    if (column.name !== "lesion_id") return null;
    const number = owner.value(row, "lesion_id");
    const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = colourOf(number);
    const button = make("button", { type: "button", "data-key": String(number), "aria-label": `Show ${content.noun} ${number}` }, swatch, String(number));
    return make("td", {}, button, make("span", { class: "verdict" }));
  },
  look: (line, row, owner) => {
    line.dataset.lesion = owner.value(row, "lesion_id");
    line.addEventListener("click", () => choose(owner.value(row, "lesion_id")));
    mark(line, owner.value(row, "lesion_id"), owner.value(row, "n_voxels"));
  },
});

function rowOf(number) {
  return content.table.rows.find((row) => table.value(row, "lesion_id") === number) ?? null;
}

function choose(number, { move = true } = {}) {
  const row = rowOf(number);
  if (row === null) return;
  selected = number;
  table.mark(row);
  showNumbers(row);
  showReview();
  const point = content.points[number];
  if (move && viewer && point) {
    viewer.scene.crosshairPos = fractionOf(viewer, point);
    viewer.drawScene();
    viewer.createOnLocationChange();
  } else if (move && viewer) {
    at("place").textContent = `${NOUN} ${number} is not drawn at this resolution.`;
  }
}

// Select the lesion that the address names (#lesion=3), else the first.
function chooseFirst() {
  const words = new URLSearchParams(location.hash.slice(1)).get("lesion");
  const last = content.table.rows.at(-1);
  const asked = words === "last" && last ? table.value(last, "lesion_id") : Number(words === "first" ? 0 : words);
  if (rowOf(asked)) choose(asked);
  else if (asked) say(`${NOUN} ${asked} is not listed on this page; lesions.csv lists all ${content.noun}s.`);
  else if (content.table.rows.length) choose(table.value(content.table.rows[0], "lesion_id"));
}

function showNumbers(row) {
  const list = make("dl");
  const unknown = [];
  for (const column of content.table.columns) {
    const value = table.value(row, column.name);
    if (value === null) unknown.push(column);
    else if (value !== "" && column.name !== "case_id") {
      const unit = column.unit === "intensity_unit" ? content.unit : column.unit;
      const isMeasure = typeof value === "number" || / /.test(String(value));
      list.append(make("dt", { title: column.meaning }, column.name), make("dd", {}, shown(value), isMeasure && unit && !hasUnitInName(column) && column.name !== "notes" ? ` ${unit}` : ""));
    }
  }
  const reasons = make("ul", {}, ...unknown.map((column) => make("li", {}, `${column.name}: ${table.reason(column, row)}`)));
  const details = make("details", {}, make("summary", {}, `${unknown.length} unknown`), reasons);
  at("numbers").replaceChildren(make("h3", {}, `${NOUN} ${table.value(row, "lesion_id")}`), list, ...(unknown.length ? [details] : []));
}

// ---- from lesion to lesion and from scan to scan

// Go to the next lesion of the table as it is sorted and filtered; after the last one to the next
// scan.
function stepLesion(by) {
  const index = table.rows.findIndex((row) => table.value(row, "lesion_id") === selected) + by;
  if (table.rows[index]) choose(table.value(table.rows[index], "lesion_id"));
  else if (scanAt(by)) stepScan(by);
}

function scanAt(by) {
  const index = reviews.scans.indexOf(content.case);
  return index < 0 ? undefined : reviews.scans[index + by];
}

function stepScan(by) {
  const name = scanAt(by);
  if (name === undefined) return;
  leave(`${encodeURIComponent(name)}.html`, { lesion: by > 0 ? "first" : "last" });
}

function leave(page, parameters) {
  finishComment();
  location.assign(reviews.address(page, parameters));
}

function showScans() {
  const index = reviews.scans.indexOf(content.case);
  at("scan-place").textContent = index < 0 ? "" : `${index + 1} of ${reviews.scans.length}`;
  for (const [id, by] of [["scan-before", -1], ["scan-after", 1]]) {
    at(id).hidden = index < 0;
    at(id).disabled = scanAt(by) === undefined;
    at(id).addEventListener("click", () => stepScan(by));
  }
  at("report").addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    leave(at("report").getAttribute("href"), {});
  });
  at("lesion-before").addEventListener("click", () => stepLesion(-1));
  at("lesion-after").addEventListener("click", () => stepLesion(1));
}

// ---- the review

function voxelsOf(number) {
  return table.value(rowOf(number), "n_voxels");
}

function reviewOf(number) {
  return reviews.of(content.case, number, voxelsOf(number));
}

function review(verdict, comment) {
  if (selected === null) return;
  reviews.set(content.case, selected, voxelsOf(selected), verdict, comment);
  showReview();
}

// Set a verdict, or take it back if the lesion has it already.
function judge(verdict) {
  if (selected === null) return;
  const [earlier, comment] = reviewOf(selected);
  review(earlier === verdict ? "" : verdict, comment);
}

function finishComment() {
  if (selected === null) return;
  const [verdict, comment] = reviewOf(selected), text = at("comment").value.trim();
  if (text !== comment) review(verdict, text);
}

function showReview() {
  const [verdict, comment] = reviewOf(selected);
  at("accept").setAttribute("aria-pressed", String(verdict === "accepted"));
  at("reject").setAttribute("aria-pressed", String(verdict === "rejected"));
  at("comment").value = comment;
  const numbers = content.table.rows.map((row) => table.value(row, "lesion_id"));
  const n = numbers.filter((number) => reviewOf(number)[0]).length;
  at("review-place").textContent = `${n} of ${numbers.length} here, ${reviews.made.length} in review.csv`;
  at("lesion-place").textContent = `${numbers.indexOf(selected) + 1} of ${numbers.length}`;
  for (const line of document.querySelectorAll("#lesions tbody tr")) {
    mark(line, Number(line.dataset.lesion), voxelsOf(Number(line.dataset.lesion)));
  }
}

// Show the verdict of a lesion beside its number.
function mark(line, number, voxels) {
  const [verdict, comment] = reviews.of(content.case, number, voxels);
  line.dataset.verdict = verdict;
  const sign = line.querySelector(".verdict");
  if (!sign) return;
  sign.textContent = { accepted: " ✓", rejected: " ✗" }[verdict] ?? (comment ? " …" : "");
  sign.title = [verdict, comment].filter(Boolean).join(": ");
}

function controlReview() {
  at("accept").addEventListener("click", () => judge("accepted"));
  at("reject").addEventListener("click", () => judge("rejected"));
  at("comment").addEventListener("change", finishComment);
  at("comment").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    finishComment();
    at("comment").blur();
    at("canvas").focus();
  });
  at("save").addEventListener("click", () => { finishComment(); reviews.download(); });
  const next = (id) => {
    const options = [...at(id).options].filter((option) => !option.disabled);
    const index = options.findIndex((option) => option.value === at(id).value);
    at(id).value = options[(index + 1) % options.length].value;
    at(id).dispatchEvent(new Event("change"));
  };
  onKeys({
    n: () => stepLesion(1), p: () => stepLesion(-1), N: () => stepScan(1), P: () => stepScan(-1),
    a: () => judge("accepted"), r: () => judge("rejected"), u: () => review("", selected === null ? "" : reviewOf(selected)[1]),
    c: () => at("comment").focus(), s: () => reviews.download(), w: () => next("preset"), v: () => next("plane"), o: () => at("outline").click(),
  }, () => at("keys").checked);
}

// ---- the slices

async function start() {
  if (!hasWebGL()) {
    withoutViewer("no-webgl", "The slices cannot be shown: this browser has no WebGL 2. The table and the picture below work without it.");
    return;
  }
  // The content security policy of this page allows NiiVue by its hash.
  document.head.append(make("script", {}, await inflated("niivue")));
  const nv = new niivue.Niivue({
    isRadiologicalConvention: true, backColor: [0, 0, 0, 1], crosshairColor: [0.45, 0.75, 1, 0.8], crosshairWidth: 0.25, crosshairWidthUnit: "percent", crosshairGap: 6,
    showLegend: false, clipPlaneHotKey: "", viewModeHotKey: "", dragAndDropEnabled: false, logLevel: "error", loadingText: "", scrollRequiresFocus: false,
    isNearestInterpolation: false, isOrientationTextVisible: false, sagittalNoseLeft: true,
  });
  await nv.attachToCanvas(at("canvas"));
  const image = await niivue.NVImage.loadFromBase64({
    base64: at("image").textContent, name: "image.nii.gz", colormap: "gray", cal_min: content.window[0], cal_max: content.window[1], trustCalMinMax: false,
  });
  const ids = await niivue.NVImage.loadFromBase64({ base64: at("ids").textContent, name: "ids.nii.gz", opacity: Number(at("opacity").value) });
  ids.setColormapLabel(labelColours());
  // NIFTI_INTENT_LABEL: colours are looked up by number. Without it NiiVue tints the background if
  // there are more than 128 labels.
  ids.hdr.intent_code = 1002;
  nv.addVolume(image);
  nv.addVolume(ids);
  [image.cal_min, image.cal_max] = content.window;
  nv.opts.multiplanarShowRender = niivue.SHOW_RENDER.NEVER;
  nv.setSliceType(niivue.SLICE_TYPE.MULTIPLANAR);
  nv.setCustomLayout(THREE_PLANES);
  showMask(nv);
  const draw = nv.drawScene.bind(nv);
  nv.drawScene = () => { const text = draw(); drawLines(nv); return text; };
  nv.onLocationChange = showPlace;
  viewer = nv;
  control(nv, image);
  at("montage").open = false;
  nv.drawScene();
  chooseFirst();
  if (selected === null) nv.createOnLocationChange();
  document.documentElement.dataset.ready = "1";
}

function labelColours() {
  const n = content.colours.length / 6;
  const channel = (offset) => [0, ...Array.from({ length: n }, (_, i) => parseInt(content.colours.slice(6 * i + offset, 6 * i + offset + 2), 16))];
  const numbers = Array.from({ length: n + 1 }, (_, i) => i);
  return { R: channel(0), G: channel(2), B: channel(4), A: numbers.map((i) => (i ? 255 : 0)), I: numbers, labels: numbers.map(String) };
}

function showPlace(location) {
  const [r, a, s] = location.mm;
  const [value, id] = location.values.map((layer) => layer.value);
  const number = Math.round(id);
  const place = at("place");
  Object.assign(place.dataset, { r, a, s, id: number, value });
  place.textContent = `R ${r.toFixed(1)}  A ${a.toFixed(1)}  S ${s.toFixed(1)} mm · about ${shown(Math.round(value * 10) / 10)} ${content.unit} · ${number ? `${content.noun} ${number}` : `no ${content.noun}`}`;
  showSlice();
  if (number && number !== selected) choose(number, { move: false });
}

// The axis along which the slider moves: that across the shown plane, of three planes the axial one.
function sliderAxis() {
  return { 1: 1, 2: 0 }[at("plane").value] ?? 2;
}

function showSlice() {
  const axis = sliderAxis(), n = viewer.volumes[0].dims[axis + 1];
  const index = Math.floor(Math.min(viewer.scene.crosshairPos[axis], 0.999999) * n);
  at("slice").max = n;
  at("slice").value = index + 1;
  at("slice-place").textContent = `${index + 1} of ${n}`;
}

// Show a window, and its name if it is one of the presets.
function showWindow(image, low, high) {
  [image.cal_min, image.cal_max] = [low, high];
  viewer.updateGLVolume();
  const index = content.presets.findIndex((preset) => preset.low === low && preset.high === high);
  at("preset").value = index < 0 ? "" : String(index);
  [at("low").value, at("high").value] = [shown(low), shown(high)];
}

let solid = null; // the second viewer, of the surfaces

async function showSurface() {
  const isShown = at("plane").value === "surface";
  at("surface").hidden = !isShown;
  at("canvas").hidden = at("lines").hidden = isShown;
  for (const id of ["slice", "side", "opacity", "outline", "axes"]) at(id).disabled = isShown;
  if (!isShown) { showMask(viewer); return; }
  if (solid) { solid.drawScene(); return; }
  solid = new niivue.Niivue({ backColor: [0, 0, 0, 1], show3Dcrosshair: false, isOrientCube: true, dragAndDropEnabled: false, logLevel: "error", loadingText: "", scrollRequiresFocus: false });
  await solid.attachToCanvas(at("surface"));
  const lesions = viewer.volumes[1], dims = lesions.hdr.dims.slice(1, 4);
  let cells = 0;
  for (const [number, box] of [...boxesOf(lesions.img, dims)].sort((a, b) => a[0] - b[0])) {
    cells += box[0].reduce((product, low, axis) => product * (box[1][axis] - low + 3), 1);
    if (cells > MAX_SURFACE_CELLS) {
      say(`Only the largest ${content.noun}s have a surface.`);
      break;
    }
    const { points, triangles } = surfaceOf(lesions.img, dims, number, box);
    const colour = [1, 3, 5].map((start) => parseInt(colourOf(number).slice(start, start + 2), 16));
    solid.addMesh(new niivue.NVMesh(toMm(points, lesions.hdr.affine), triangles, `lesion ${number}`, new Uint8Array([...colour, 255]), 1, true, solid.gl));
  }
  solid.setSliceType(niivue.SLICE_TYPE.RENDER);
  at("surface").dataset.meshes = String(solid.meshes.length);
}

function control(nv, image) {
  const pressed = (id, act) => at(id).addEventListener("click", () => {
    const now = at(id).getAttribute("aria-pressed") !== "true";
    at(id).setAttribute("aria-pressed", String(now));
    act(now);
  });
  at("plane").addEventListener("change", () => {
    const value = at("plane").value;
    const isPlane = ["0", "1", "2"].includes(value);
    showSurface().catch((error) => say(`The surfaces cannot be shown (${error.message}).`));
    nv.setCustomLayout(isPlane ? [{ sliceType: Number(value), position: [0, 0, 1, 1] }] : THREE_PLANES);
    showSlice();
  });
  at("slice").addEventListener("input", () => {
    const axis = sliderAxis();
    nv.scene.crosshairPos[axis] = (Number(at("slice").value) - 0.5) / nv.volumes[0].dims[axis + 1];
    nv.drawScene();
    nv.createOnLocationChange();
  });
  at("preset").addEventListener("change", () => {
    const preset = content.presets[Number(at("preset").value)];
    showWindow(image, preset.low, preset.high);
  });
  let radiological = true;
  at("side").addEventListener("click", () => {
    radiological = !radiological;
    nv.setRadiologicalConvention(radiological);
    nv.drawScene();
    at("side").textContent = radiological ? "R is left" : "R is right";
  });
  at("opacity").addEventListener("input", () => showMask(nv));
  pressed("outline", () => showMask(nv));
  at("axes").hidden = !Object.keys(content.axes).length;
  pressed("axes", () => nv.drawScene());
  const edges = [at("low"), at("high")];
  for (const input of edges) {
    input.addEventListener("change", () => {
      const [low, high] = edges.map((input) => Number(input.value));
      if (low < high) showWindow(image, low, high);
    });
  }
  showWindow(image, ...content.window);
  moveByKeys(nv);
}

// A lesion's border is drawn more opaque than its inside, so that a single voxel is visible too.
function showMask(nv) {
  const only = at("outline").getAttribute("aria-pressed") === "true";
  const within = Number(at("opacity").value);
  at("opacity").disabled = only;
  nv.opts.atlasOutline = only ? 1 : within && Math.min(1, within + BORDER);
  nv.setOpacity(1, only ? HARDLY : within);
}

// ---- overlay: diameters of the lesions in the current axial slice, and scale bars

function drawLines(nv) {
  const canvas = at("lines");
  if (canvas.width !== nv.canvas.width) canvas.width = nv.canvas.width;
  if (canvas.height !== nv.canvas.height) canvas.height = nv.canvas.height;
  const pen = canvas.getContext("2d");
  const scale = nv.uiData.dpr || 1;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.font = `${12 * scale}px sans-serif`;
  for (const slice of nv.screenSlices) {
    drawBar(pen, slice, scale);
    drawLetters(nv, pen, slice, scale);
  }
  if (at("axes").getAttribute("aria-pressed") !== "true") return;
  const depth = nv.volumes[0].dims[3];
  const layer = (frac) => Math.floor(Math.min(frac[2], 0.999999) * depth);
  const current = layer(nv.scene.crosshairPos);
  let drawn = 0;
  for (const [number, lines] of Object.entries(content.axes)) {
    lines.forEach(([from, to], n) => {
      const fracs = [fractionOf(nv, from), fractionOf(nv, to)];
      if (fracs.some((frac) => Math.abs(layer(frac) - current) > 0)) return;
      // Project onto the shown plane: NiiVue gives no canvas position for points far from it, as in
      // thick slices.
      const ends = fracs.map(([r, a]) => nv.frac2canvasPosWithTile([r, a, nv.scene.crosshairPos[2]], AXIAL)?.pos);
      if (!ends[0] || !ends[1]) return;
      drawn += 1;
      for (const [width, colour] of [[4, "#000000"], [2, n ? "#7fdfff" : "#ffffff"]]) {
        pen.lineWidth = width * scale;
        pen.strokeStyle = colour;
        pen.beginPath();
        pen.moveTo(...ends[0]);
        pen.lineTo(...ends[1]);
        pen.stroke();
      }
      if (Number(number) === selected) {
        const row = rowOf(selected);
        const length = row && table.value(row, n ? "short_axis_mm" : "long_axis_mm");
        if (length !== null) write(pen, `${shown(length)} mm`, Math.max(ends[0][0], ends[1][0]) + 5 * scale, ends[ends[0][0] > ends[1][0] ? 0 : 1][1], scale);
      }
    });
  }
  canvas.dataset.drawn = String(drawn);
}

function withoutViewer(state, text) {
  say(text);
  at("controls").closest("section").hidden = true;
  at("viewer").prepend(at("montage"));
  at("montage").open = true;
  chooseFirst();
  document.documentElement.dataset.ready = state;
}

followTheme();
reviews.load();
showScans();
controlReview();
start().catch((error) => withoutViewer("error", `The slices cannot be shown (${error.message}). The table and the picture below still work.`));
