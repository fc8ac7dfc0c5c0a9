"use strict";
// A table with sorting, filtering, paging and selectable columns. It inserts all content as text,
// never as markup.

const ROWS_PER_PAGE = 100;

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// Format with four significant digits; the CSV files have more.
function shown(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 1000 ? String(Math.round(value)) : String(Number(value.toPrecision(4)));
}

function island(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

// Endings of column names that state the unit already.
const UNIT_ENDINGS = { mL: "_ml", mm: "_mm", "mm³": "_mm3", "mm²": "_mm2", "%": "_percent", "g/cm³": "_g_cm3", g: "_g", mg: "_mg", s: "seconds" };

function hasUnitInName(column) {
  const ending = UNIT_ENDINGS[column.unit];
  return ending !== undefined && column.name.endsWith(ending);
}

class DataTable {
  // `data` is {name, columns: [{name, unit, meaning, shown}], rows: [[…]]}. `cell(column, row)` may
  // return an element for a cell; `look(line, row)` may change a row's element.
  constructor(root, data, { cell = () => null, look = () => {} } = {}) {
    this.data = data;
    this.cell = cell;
    this.look = look;
    this.index = Object.fromEntries(data.columns.map((column, n) => [column.name, n]));
    this.order = { column: null, falling: false };
    this.page = 0;
    this.marked = null;
    const name = data.name;
    this.filter = make("input", {
      type: "search", id: `${name}-filter`, "aria-describedby": `${name}-hint`, autocomplete: "off", spellcheck: "false",
      oninput: () => { this.page = 0; this.refresh(); },
    });
    this.state = make("output", { "aria-live": "polite", class: "muted", for: `${name}-filter` });
    this.previous = make("button", { type: "button", onclick: () => this.turn(-1) }, "Previous");
    this.next = make("button", { type: "button", onclick: () => this.turn(1) }, "Next");
    this.choice = make("div", { class: "choice" });
    this.head = make("tr");
    this.body = make("tbody");
    root.append(
      make("div", { class: "tools" },
        make("label", { for: `${name}-filter` }, "Filter"), this.filter,
        make("span", { id: `${name}-hint`, class: "muted" }, data.hint),
        make("details", {}, make("summary", {}, "Columns"), this.choice),
        this.previous, this.next, this.state),
      make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": `${data.caption}, scrollable` },
        make("table", {}, make("caption", { class: "hidden-text" }, data.caption), make("thead", {}, this.head), this.body)));
    for (const column of data.columns) {
      const hasValues = data.rows.some((row) => row[this.index[column.name]] !== null);
      const box = make("input", { type: "checkbox", checked: column.shown, onchange: () => { column.shown = box.checked; this.draw(); } });
      this.choice.append(make("label", { title: column.meaning }, box, ` ${column.name}${hasValues ? "" : " (no values)"}`));
    }
    root.addEventListener("keydown", (event) => {
      const details = root.querySelector("details[open]");
      if (event.key === "Escape" && details) { details.open = false; details.firstElementChild.focus(); }
    });
    this.draw();
  }

  value(row, name) { return name in this.index ? row[this.index[name]] : null; }

  draw() {
    this.visible = this.data.columns.filter((column) => column.shown);
    const isNumber = (column) => this.data.rows.some((row) => typeof this.value(row, column.name) === "number");
    for (const column of this.visible) column.number ??= isNumber(column);
    this.head.replaceChildren(...this.visible.map((column) => {
      const button = make("button", { type: "button", title: column.meaning, onclick: () => this.sort(column.name) }, column.name);
      if (column.unit && !hasUnitInName(column)) button.append(" ", make("span", { class: "unit" }, column.unit));
      return make("th", { scope: "col", class: column.number ? "number" : null, "data-column": column.name }, button);
    }));
    this.refresh();
  }

  sort(name) {
    const again = this.order.column === name;
    this.order = again && this.order.falling ? { column: null, falling: false } : { column: name, falling: again };
    this.page = 0;
    this.refresh();
  }

  turn(by) { this.page += by; this.refresh(); }

  // Return the rows that contain all words and meet all conditions such as volume_ml>1.
  matching() {
    const tests = [];
    const words = this.filter.value.replace(/\b([a-z0-9_]+)\s*(>=|<=|!=|>|<|=)\s*(\S+)/gi, (term, name, relation, text) => {
      const column = this.index[name.toLowerCase()];
      if (column === undefined) return term;
      tests.push((row) => compare(row[column], relation, text));
      return " ";
    });
    for (const word of words.toLowerCase().split(/\s+/).filter(Boolean)) {
      tests.push((row) => row.some((value) => value !== null && shown(value).toLowerCase().includes(word)));
    }
    return this.data.rows.filter((row) => tests.every((test) => test(row)));
  }

  refresh() {
    let rows = this.matching();
    if (this.order.column !== null) {
      const column = this.index[this.order.column];
      rows = rows.slice().sort((a, b) => inOrder(a[column], b[column], this.order.falling));
    }
    for (const head of this.head.children) {
      const isSorted = head.dataset.column === this.order.column;
      head.setAttribute("aria-sort", !isSorted ? "none" : this.order.falling ? "descending" : "ascending");
    }
    this.rows = rows;
    const pages = Math.max(1, Math.ceil(rows.length / ROWS_PER_PAGE));
    this.page = Math.min(Math.max(0, this.page), pages - 1);
    const first = this.page * ROWS_PER_PAGE;
    const listed = rows.slice(first, first + ROWS_PER_PAGE);
    this.body.replaceChildren(...listed.map((row) => this.line(row)));
    const total = rows.length === this.data.rows.length ? "" : ` (of ${this.data.rows.length})`;
    this.state.textContent = rows.length ? `${first + 1}–${first + listed.length} of ${rows.length}${total}` : `no match (of ${this.data.rows.length})`;
    this.previous.hidden = this.next.hidden = pages === 1;
    this.previous.disabled = this.page === 0;
    this.next.disabled = this.page === pages - 1;
  }

  line(row) {
    const line = make("tr");
    for (const column of this.visible) {
      const element = this.cell(column, row, this);
      const value = this.value(row, column.name);
      if (element) line.append(element);
      else if (value === null) {
        const reason = this.reason(column, row);
        line.append(make("td", { class: column.number ? "number unknown" : "unknown", title: reason },
          make("span", { "aria-hidden": "true" }, "–"), make("span", { class: "hidden-text" }, reason)));
      } else if (typeof value === "number") line.append(make("td", { class: "number", title: String(value) }, shown(value)));
      else line.append(make("td", { class: typeof value === "string" && value.length > 40 ? "long" : null }, shown(value)));
    }
    if (row === this.marked) line.setAttribute("aria-current", "true");
    this.look(line, row, this);
    return line;
  }

  // Explain an empty cell: with its reason from `notes` ("name: why; name, name: why"), else with the
  // meaning of its column.
  reason(column, row) {
    for (const note of String(this.value(row, "notes") ?? "").split("; ")) {
      const [names, ...reasons] = note.split(": ");
      const isMeant = (name) => column.name === name || column.name.startsWith(`${name}_`);
      if (reasons.length && names.split(", ").some(isMeant)) return `unknown: ${reasons.join(": ")}`;
    }
    return `unknown (${column.meaning})`;
  }

  // Mark a row as current and turn to its page. Only the table scrolls: a picture next to it stays.
  mark(row) {
    this.marked = row;
    const index = this.rows.indexOf(row);
    if (index >= 0) this.page = Math.floor(index / ROWS_PER_PAGE);
    const focused = document.activeElement?.dataset?.key;
    this.refresh();
    if (focused) this.body.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
    const line = this.body.querySelector('[aria-current="true"]'), box = line?.closest(".wide");
    if (!line) return;
    const top = line.offsetTop - this.head.offsetHeight;
    const bottom = line.offsetTop + line.offsetHeight;
    box.scrollTop = Math.max(Math.min(box.scrollTop, top), bottom - box.clientHeight);
  }
}

function compare(value, relation, text) {
  if (value === null) return false;
  const number = Number(text);
  const [a, b] = typeof value === "number" && !Number.isNaN(number) ? [value, number] : [shown(value).toLowerCase(), text.toLowerCase()];
  return { ">": a > b, "<": a < b, ">=": a >= b, "<=": a <= b, "=": a === b, "!=": a !== b }[relation];
}

// Unknown values come last in either order.
function inOrder(a, b, falling) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "number" && typeof b === "number" ? a - b : shown(a).localeCompare(shown(b), undefined, { numeric: true });
  return falling ? -order : order;
}

// Follow the system's light or dark theme until the reader presses the button.
function followTheme() {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const stored = () => { try { return localStorage.getItem("volseg-theme"); } catch { return null; } };
  const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  const theme = stored();
  if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("volseg-theme", root.dataset.theme); } catch { /* storage is not allowed */ }
    label();
  });
  label();
}

// Call an action for a key that is pressed alone, unless the reader is typing or turned keys off.
function onKeys(actions, isOn) {
  document.addEventListener("keydown", (event) => {
    const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && !/^(range|checkbox|button)$/.test(event.target.type);
    const action = actions[event.key];
    if (!action || isTyping || event.ctrlKey || event.altKey || event.metaKey || !isOn()) return;
    event.preventDefault();
    event.stopPropagation(); // NiiVue has keys of its own
    action();
  }, { capture: true });
}
