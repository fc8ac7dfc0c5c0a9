"""Tables of 2D images, and of slices of volumes; the rows of MedMNIST files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from volseg.errors import ScanError, VolsegError
from volseg.io.cases import COLUMNS, Case, cell_path, listed, safe_id, split_of
from volseg.io.formats import is_scan, stem_of
from volseg.io.image_listing import ImageCase, ImageListing, slice_id
from volseg.io.images import through_axis
from volseg.io.medmnist import SUFFIX as NPZ_SUFFIX
from volseg.io.medmnist import ImageArrays
from volseg.io.tables import Table, read_table
from volseg.io.volumes import read_header
from volseg.recipe.classification import SEPARATOR

LABEL = "label"  # column that a MedMNIST file gives; of the masks of volumes
SLICE = "slice"
HEADS = {  # column → other usual heads
    "image": (
        *(*COLUMNS["image"], "filename", "file_name", "filepath", "file_path", "path"),
        *("image_name", "img_path", "image_filename"),
    ),
    "subject": COLUMNS["subject"],
    "patient": COLUMNS["patient"],
    "split": COLUMNS["split"],
    SLICE: ("slice_index", "slice_number", "slice_no", "slice_idx"),
}
NO_CELLS = ("image", "subject", "patient", "split", "why")  # have fields of their own
PAGED_SUFFIXES = (".tif", ".tiff")


def read_image_table(path: Path) -> ImageListing:
    """List the images of a table with a column `image`.

    `slice` names the image in a file that holds several, from 0; beside files of one image it is a
    column like any other.

    Raises:
        VolsegError: the table cannot be read, or has no column `image`.
    """
    table = read_table(path, HEADS)
    if "image" not in table.columns:
        raise VolsegError(
            f"{path}: has no column 'image'; its columns are {listed(table.columns)}",
            fix="name the column of images 'image'",
            code="E_DATASET",
        )
    listing = ImageListing(remarks=list(table.remarks))
    rows = list(_rows_of(table, listing))
    if len(rows) == 1 and is_arrays(rows[0].path) and not rows[0].cells.get(SLICE):
        arrays = read_image_arrays(rows[0].path)
        arrays.remarks = listing.remarks
        return arrays
    listing.columns = [name for name in table.columns if name not in NO_CELLS]
    listing.mask_columns = _mask_columns(rows, listing.columns)
    reader = _RowReader(rows, listing)
    for row in rows:
        reader.add(row)
    return listing


def is_arrays(path: Path) -> bool:
    """Check whether the name is that of a MedMNIST file."""
    return path.name.lower().endswith(NPZ_SUFFIX)


def read_image_arrays(path: Path) -> ImageListing:
    """List the images of a MedMNIST file; its labels are the column `label`.

    Several columns of labels are `label_0`, …; if they hold only 0 and 1, `label` lists those of 1,
    several labels at once.

    Raises:
        ScanError: it is no such file.
    """
    listing = ImageListing()
    rows = ImageArrays(path).labels()
    n_labels = max((len(numbers) for _, numbers in rows), default=0)
    names = [LABEL] if n_labels == 1 else [f"{LABEL}_{number}" for number in range(n_labels)]
    are_flags = n_labels > 1 and all(set(numbers) <= {0, 1} for _, numbers in rows)
    n_of = Counter[str]()
    for index, (split, numbers) in enumerate(rows):
        row, cells = n_of[split], dict(zip(names, map(str, numbers), strict=False))
        cells = {LABEL: _labels_of(numbers), **cells} if are_flags and numbers else cells
        n_of[split] += 1
        where = f"{path.name} {split}_images[{row}]"
        case = ImageCase(f"{split}_{row}", path, index, None, split, cells, None, where)
        listing.cases.append(case)
    listing.columns = [LABEL, *names] if are_flags else names
    return listing


def _labels_of(flags: Sequence[int]) -> str:
    """Return a cell of the labels whose flag is set."""
    return SEPARATOR.join(str(label) for label, is_set in enumerate(flags) if is_set) or SEPARATOR


def slices_of_scans(scans: Sequence[Case], listing: ImageListing) -> None:
    """Add all axial slices of these scans, whose slices belong to one patient.

    Masks make the column `label`. Of several channels the first is used.
    """
    listing.columns = list(dict.fromkeys(name for scan in scans for name in scan.classes))
    if any(scan.reference is not None for scan in scans):
        listing.mask_columns = [LABEL]
    for scan in scans:
        path = next(iter(scan.images.values()))
        try:
            n = n_slices(path)
        except ScanError as error:
            listing.mistakes.append(error.problem)
            continue
        patient, mask = scan.patient or scan.id, scan.reference
        for index in range(n):
            name, where = slice_id(scan.id, index), f"{path.name} slice {index}"
            case = ImageCase(name, path, index, patient, scan.split, scan.classes, mask, where)
            listing.cases.append(case)


def n_slices(path: Path) -> int:
    """Return the number of axial slices of a volume from its header; 1 for a single slice.

    Raises:
        ScanError: the header cannot be read.
    """
    shape = read_header(path).geometry.canonical().shape
    return shape[through_axis(shape)]


# ---- rows


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a table, with the file that it names."""

    where: str
    path: Path
    folder: Path
    cells: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.cells.get("subject") or safe_id(_stem(self.path))


def _stem(path: Path) -> str:
    return stem_of(path) if is_scan(path) else path.stem


def _rows_of(table: Table, listing: ImageListing) -> Iterator[_Row]:
    folder = table.path.parent
    for number, texts in table.lines:
        where = f"{table.path.name} line {number}"
        if len(texts) != len(table.columns):
            text = f"{where}: has {len(texts)} cells under {len(table.columns)} columns"
            listing.mistakes.append(text)
            continue
        cells = dict(zip(table.columns, texts, strict=True))
        if cells["image"]:
            yield _Row(where, cell_path(folder, cells["image"]), folder, cells)
        else:
            listing.mistakes.append(f"{where}: the cell of 'image' is empty")


def _mask_columns(rows: Sequence[_Row], columns: Sequence[str]) -> list[str]:
    """Return the columns whose cells all name files of volumes, beside images that are slices."""
    if not rows or not all(is_scan(row.path) for row in rows):
        return []
    texts = {name: [row.cells[name] for row in rows if row.cells[name]] for name in columns}
    return [name for name in columns if texts[name] and all(map(_names_a_scan, texts[name]))]


def _names_a_scan(cell: str) -> bool:
    return is_scan(Path(cell.replace("\\", "/")))


class _RowReader:
    """Makes images of the rows of a table."""

    def __init__(self, rows: Sequence[_Row], listing: ImageListing) -> None:
        self._n_of_name = Counter(row.name for row in rows)
        self._listing = listing
        self._n_images: dict[Path, int | str] = {}  # or what is wrong with the file

    def add(self, row: _Row) -> None:
        """List the image of a row, or what is wrong with it."""
        is_stack = is_scan(row.path) or is_arrays(row.path)
        text = row.cells.get(SLICE, "")
        if not is_stack and not (text and row.path.name.lower().endswith(PAGED_SUFFIXES)):
            self._listing.cases.append(self._case(row, None, row.name, row.cells.get("patient")))
            return
        index = _whole_number(text)
        problem = self._index_problem(row, text, index) if is_stack else ""
        if index is None or problem:
            problem = problem or f"slice {text!r} is not a whole number"
            self._listing.mistakes.append(f"{row.where}: {problem}")
            return
        name = row.name if self._n_of_name[row.name] == 1 else slice_id(row.name, index)
        patient = row.cells.get("patient") or (_stem(row.path) if is_scan(row.path) else None)
        self._listing.cases.append(self._case(row, index, name, patient))

    def _index_problem(self, row: _Row, text: str, index: int | None) -> str:
        n = self._count(row.path)
        if isinstance(n, str):
            return n
        if index is None or not 0 <= index < n:
            return f"slice {text!r} is not a whole number from 0 to {n - 1}"
        return ""

    def _count(self, path: Path) -> int | str:
        """Return the number of images in a file, or what is wrong with it."""
        if path not in self._n_images:
            try:
                n = n_slices(path) if is_scan(path) else len(ImageArrays(path))
                self._n_images[path] = n
            except ScanError as error:
                self._n_images[path] = error.problem
        return self._n_images[path]

    def _case(self, row: _Row, index: int | None, name: str, patient: str | None) -> ImageCase:
        split = row.cells.get("split", "")
        masks = [row.cells[column] for column in self._listing.mask_columns if row.cells[column]]
        not_cells = {*NO_CELLS, *self._listing.mask_columns}
        cells = {column: text for column, text in row.cells.items() if column not in not_cells}
        mask = cell_path(row.folder, masks[0]) if masks else None
        word = split_of(split) or split or None
        return ImageCase(name, row.path, index, patient or None, word, cells, mask, row.where)


def _whole_number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
