// The tables of report.html. Rows link to the viewer page of their scan, if it has one, and each
// lesion can be reviewed.

const at = (id) => document.getElementById(id);
const pageNames = island("pages");
const pages = new Set(pageNames);
const pictures = island("pictures");
const pictureHeight = Number(at("pictures").dataset.height);
const reviews = new Reviews(new URL("./", location.href).pathname);
reviews.merge(island("reviews"));
reviews.load();
reviews.scans = pageNames;
reviews.store();

function pageOf(table, row) {
  const name = table.value(row, "case_id") ?? table.value(row, "patient");
  return pages.has(name) ? `viewer/${encodeURIComponent(name)}.html` : null;
}

// Follow a link with the reviews, so that the next page knows them.
function follow(link) {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const [page, fragment = ""] = link.getAttribute("href").split("#");
    location.assign(reviews.address(page, Object.fromEntries(new URLSearchParams(fragment))));
  });
  return link;
}

function reportCell(column, row, table) {
  if (["case_id", "lesion_id", "patient"].includes(column.name)) {
    const page = pageOf(table, row);
    const value = table.value(row, column.name);
    if (!page || value === null) return null;
    const lesion = table.value(row, "lesion_id");
    const link = follow(make("a", { href: lesion === null ? page : `${page}#lesion=${lesion}` }, shown(value)));
    return make("td", { class: column.number ? "number" : null }, link);
  }
  if (column.name === "montage" || column.name === "picture") {
    const picture = pictures[table.value(row, "case_id")];
    if (!picture) return null;
    const name = table.value(row, "case_id"), isMontage = column.name === "montage";
    const image = make("img", {
      src: `data:image/jpeg;base64,${picture}`, loading: "lazy", decoding: "async",
      height: String(pictureHeight), width: isMontage && String(3 * pictureHeight),
      alt: isMontage ? `axial, coronal and sagittal slice of ${name}` : `image ${name}`,
    });
    const page = pageOf(table, row);
    return make("td", { class: "picture" }, page ? follow(make("a", { href: page }, image)) : image);
  }
  return null;
}

// ---- the review

// Add the columns verdict and comment to the table of lesions, after the number.
function withReview(data) {
  const place = data.columns.findIndex((column) => column.name === "lesion_id") + 1;
  const index = Object.fromEntries(data.columns.map((column, n) => [column.name, n]));
  data.columns.splice(place, 0, { name: "verdict", unit: "", meaning: "of the reader, as in review.csv", shown: true }, { name: "comment", unit: "", meaning: "of the reader", shown: true });
  for (const row of data.rows) {
    const voxels = "n_voxels" in index ? row[index.n_voxels] : null;
    row.splice(place, 0, ...reviews.of(row[index.case_id], row[index.lesion_id], voxels));
  }
  return data;
}

class Review {
  constructor(table) {
    this.table = table;
    this.counted = table.data.rows.length;
    at("accept").addEventListener("click", () => this.judge("accepted"));
    at("reject").addEventListener("click", () => this.judge("rejected"));
    at("comment").addEventListener("change", () => this.finishComment());
    at("comment").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      this.finishComment();
      at("comment").blur();
    });
    at("lesion-before").addEventListener("click", () => this.step(-1));
    at("lesion-after").addEventListener("click", () => this.step(1));
    at("save").addEventListener("click", () => this.save());
    at("open").addEventListener("click", () => this.open());
    table.body.addEventListener("click", (event) => {
      const line = event.target.closest("tr");
      if (line && !event.target.closest("a")) this.choose(table.rows[table.page * ROWS_PER_PAGE + [...table.body.children].indexOf(line)]);
    });
    onKeys({
      n: () => this.step(1), p: () => this.step(-1), a: () => this.judge("accepted"), r: () => this.judge("rejected"), u: () => this.judge(""),
      c: () => at("comment").focus(), o: () => this.open(), s: () => this.save(),
    }, () => at("keys").checked);
    this.choose(table.rows[0], { isMarked: false });
  }

  key(row) { return [this.table.value(row, "case_id"), this.table.value(row, "lesion_id"), this.table.value(row, "n_voxels")]; }

  choose(row, { isMarked = true } = {}) {
    if (!row) return;
    this.finishComment();
    this.row = row;
    this.isStarted = isMarked;
    if (isMarked) this.table.mark(row);
    this.show();
    if (isMarked) at("review").scrollIntoView({ block: "nearest" });
  }

  // The first key chooses the first lesion, the next ones go on from there.
  step(by) {
    const index = this.table.rows.indexOf(this.row);
    this.choose(this.table.rows[this.isStarted ? index + by : Math.max(0, index)]);
  }

  set(verdict, comment) {
    const [name, lesion, voxels] = this.key(this.row), index = this.table.index;
    reviews.set(name, lesion, voxels, verdict, comment);
    [this.row[index.verdict], this.row[index.comment]] = [verdict, comment];
    this.table.mark(this.row);
    this.isStarted = true;
    this.show();
  }

  judge(verdict) {
    if (!this.row) return;
    const earlier = this.table.value(this.row, "verdict");
    this.set(earlier === verdict ? "" : verdict, this.table.value(this.row, "comment"));
  }

  finishComment() {
    if (!this.row) return;
    const text = at("comment").value.trim();
    if (text !== this.table.value(this.row, "comment")) this.set(this.table.value(this.row, "verdict"), text);
  }

  open() {
    const page = this.row && pageOf(this.table, this.row);
    if (!page) return;
    this.finishComment();
    location.assign(reviews.address(page, { lesion: this.table.value(this.row, "lesion_id") }));
  }

  save() {
    this.finishComment();
    reviews.download();
  }

  show() {
    const [name, lesion] = this.key(this.row), verdict = this.table.value(this.row, "verdict");
    const title = at("review-lesion");
    title.textContent = `of ${name}, ${title.dataset.noun} ${lesion}`;
    at("accept").setAttribute("aria-pressed", String(verdict === "accepted"));
    at("reject").setAttribute("aria-pressed", String(verdict === "rejected"));
    at("comment").value = this.table.value(this.row, "comment");
    at("open").hidden = !pageOf(this.table, this.row);
    const picture = pictures[name], image = at("review-picture");
    image.hidden = !picture;
    if (picture) Object.assign(image, { src: `data:image/jpeg;base64,${picture}`, height: pictureHeight, alt: `axial, coronal and sagittal slice of ${name}` });
    const n = this.table.data.rows.filter((row) => this.table.value(row, "verdict")).length;
    at("review-place").textContent = `${n} of ${this.counted} reviewed`;
  }
}

// ---- the plots

// The arrow keys move from dot to dot, Enter opens one.
function controlStrip(strip) {
  const dots = [...strip.querySelectorAll("a")];
  for (const dot of dots) {
    dot.append(Object.assign(document.createElementNS("http://www.w3.org/2000/svg", "title"), { textContent: dot.getAttribute("aria-label") }));
    if (dot.hasAttribute("href")) follow(dot);
  }
  strip.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const index = dots.indexOf(document.activeElement);
    dots[index < 0 ? (by > 0 ? 0 : dots.length - 1) : Math.min(Math.max(0, index + by), dots.length - 1)]?.focus();
  });
}

followTheme();
for (const link of document.querySelectorAll("a.opens")) follow(link);
for (const strip of document.querySelectorAll("svg.strip")) controlStrip(strip);
for (const root of document.querySelectorAll("[data-table]")) {
  const data = island(root.dataset.table), isReviewed = data.name === "lesions" && at("review") !== null;
  const table = new DataTable(root, isReviewed ? withReview(data) : data, {
    cell: reportCell,
    look: (line, row, owner) => {
      if (owner.value(row, "status") === "failed") line.classList.add("failed");
      if (isReviewed) line.dataset.verdict = owner.value(row, "verdict");
    },
  });
  if (isReviewed) new Review(table);
}
document.documentElement.dataset.ready = "1";
