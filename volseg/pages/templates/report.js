// The tables of report.html. Rows link to the viewer page of their scan, if it has one.

function pageOf(table, row) {
  const name = table.value(row, "case_id");
  return pages.has(name) ? `viewer/${encodeURIComponent(name)}.html` : null;
}

const pages = new Set(island("pages"));
const pictures = island("pictures");

function reportCell(column, row, table) {
  if (column.name === "case_id" || column.name === "lesion_id") {
    const page = pageOf(table, row);
    const value = table.value(row, column.name);
    if (!page || value === null) return null;
    const lesion = table.value(row, "lesion_id");
    const link = make("a", { href: lesion === null ? page : `${page}#lesion=${lesion}` }, shown(value));
    return make("td", { class: column.number ? "number" : null }, link);
  }
  if (column.name === "montage") {
    const picture = pictures[table.value(row, "case_id")];
    if (!picture) return null;
    const name = table.value(row, "case_id");
    const image = make("img", {
      src: `data:image/jpeg;base64,${picture}`, loading: "lazy", decoding: "async", height: String(pictureHeight), width: String(3 * pictureHeight),
      alt: `axial, coronal and sagittal slice of ${name}`,
    });
    const page = pageOf(table, row);
    return make("td", { class: "picture" }, page ? make("a", { href: page }, image) : image);
  }
  return null;
}

const pictureHeight = Number(document.getElementById("pictures").dataset.height);
followTheme();
for (const root of document.querySelectorAll("[data-table]")) {
  new DataTable(root, island(root.dataset.table), {
    cell: reportCell,
    look: (line, row, table) => { if (table.value(row, "status") === "failed") line.classList.add("failed"); },
  });
}
document.documentElement.dataset.ready = "1";
