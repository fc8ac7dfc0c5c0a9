// What a reader decides about lesions: accepted, rejected, a comment. Reviews are kept in memory, in
// the storage of the browser (by results folder) and, from page to page, in the address; all texts
// are inserted as text. The reader saves them as review.csv.

const VERDICTS = ["accepted", "rejected"];
const REVIEW_COLUMNS = ["case_id", "lesion_id", "verdict", "comment", "n_voxels", "reviewed_at"];
const MAX_COMMENT = 1000, MAX_REVIEWS = 100000;

class Reviews {
  constructor(folder) {
    this.key = `volseg-review ${folder}`;
    this.entries = new Map();
    this.scans = [];
  }

  // Merge entries [case, lesion, verdict, comment, voxels, time] from anywhere; the newest one counts.
  merge(entries) {
    for (const entry of Array.isArray(entries) ? entries.slice(0, MAX_REVIEWS) : []) {
      if (!Array.isArray(entry)) continue;
      const [name, lesion, verdict, comment, voxels, time] = entry;
      const isValid = typeof name === "string" && Number.isInteger(lesion) && (verdict === "" || VERDICTS.includes(verdict)) && typeof comment === "string" && typeof time === "string";
      if (!isValid) continue;
      const key = JSON.stringify([name, lesion]), earlier = this.entries.get(key);
      if (!earlier || earlier[5] <= time) this.entries.set(key, [name, lesion, verdict, comment.slice(0, MAX_COMMENT), Number.isInteger(voxels) ? voxels : null, time.slice(0, 40)]);
    }
  }

  // Load what this browser stored, and what the last page put into the address.
  load() {
    const read = (text) => {
      try {
        const { reviews, scans } = JSON.parse(text);
        this.merge(reviews);
        if (Array.isArray(scans) && scans.every((name) => typeof name === "string")) this.scans = scans;
      } catch { /* nothing that these pages wrote */ }
    };
    try { read(localStorage.getItem(this.key)); } catch { /* storage is not allowed */ }
    const handed = new URLSearchParams(location.hash.slice(1)).get("state");
    if (handed !== null) {
      read(handed);
      const rest = new URLSearchParams(location.hash.slice(1));
      rest.delete("state");
      try { history.replaceState(null, "", `#${rest}`); } catch { /* the address stays long */ }
    }
    this.store();
  }

  state() { return JSON.stringify({ reviews: [...this.entries.values()], scans: this.scans }); }

  store() {
    try { localStorage.setItem(this.key, this.state()); } catch { /* storage is not allowed or full */ }
  }

  // Return the review of a lesion as [verdict, comment]; none if it was of another mask.
  of(name, lesion, voxels) {
    const entry = this.entries.get(JSON.stringify([name, lesion]));
    if (!entry || (voxels !== null && entry[4] !== null && entry[4] !== voxels)) return ["", ""];
    return [entry[2], entry[3]];
  }

  set(name, lesion, voxels, verdict, comment) {
    const time = new Date().toISOString().replace(/\.\d+Z$/, "Z");
    this.entries.set(JSON.stringify([name, lesion]), [name, lesion, verdict, comment.slice(0, MAX_COMMENT), voxels, time]);
    this.store();
  }

  // Return the address of another page, which then knows the reviews.
  address(page, parameters = {}) {
    return `${page}#${new URLSearchParams({ ...parameters, state: this.state() })}`;
  }

  get made() { return [...this.entries.values()].filter((entry) => entry[2] || entry[3]); }

  csv() {
    const order = (a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1]);
    return [REVIEW_COLUMNS, ...this.made.sort(order)].map((cells) => `${cells.map(csvCell).join(",")}\n`).join("");
  }

  download() {
    const link = make("a", { href: URL.createObjectURL(new Blob([this.csv()], { type: "text/csv" })), download: "review.csv" });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }
}

// Quote a cell as volseg's tables do: no reader splits it, and no spreadsheet evaluates it.
function csvCell(value) {
  const text = value === null ? "" : /^[=+\-@\t\r]/.test(String(value)) && typeof value === "string" ? `'${value}` : String(value);
  return /[",\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
