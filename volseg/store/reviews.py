"""Read review.csv, the verdicts of a reader: which lesions of which scan are rejected."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from volseg.errors import ScanError, VolsegError
from volseg.io.csv_text import iterate_csv
from volseg.io.files import sha256_of
from volseg.measurement.review import ACCEPTED, REJECTED, LesionReview
from volseg.store.tables import typed_row
from volseg.words import format_count, format_list

REVIEW, REVIEWED = "review.csv", "W_REVIEW"
NEEDED = ("case_id", "lesion_id", "verdict")
VERDICTS = {
    "accept": ACCEPTED, "accepted": ACCEPTED, "reject": REJECTED, "rejected": REJECTED, "": "",
}  # fmt: skip
MAX_ROWS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviews:
    """The reviews of a file; without a file there are none.

    Args:
        of_case: case id → number of a lesion → its review.
    """

    path: Path | None = None
    sha256: str = ""
    of_case: Mapping[str, Mapping[int, LesionReview]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.path is not None

    @property
    def rows(self) -> list[LesionReview]:
        return [row for of_case in self.of_case.values() for row in of_case.values()]

    def entries(self) -> list[list[str | int | None]]:
        """Return the reviews as the script of a page reads them."""
        return [
            [row.case_id, row.lesion_id, row.verdict, row.comment, row.n_voxels, row.reviewed_at]
            for row in self.rows
        ]

    def summary(self, sizes: Mapping[tuple[str, int], int]) -> str:
        """Count the reviews in a sentence; `sizes`: (case, lesion) → its voxels, where known."""
        rows = self.rows
        counts = {word: sum(row.verdict == word for row in rows) for word in (ACCEPTED, REJECTED)}
        verdicts = ", ".join(f"{count} {word}" for word, count in counts.items())
        text = f"Reviewed in {self.path}: {format_count(len(rows), 'lesion')}, {verdicts}."
        now = [sizes.get((row.case_id, row.lesion_id)) for row in rows]
        n_outdated = sum(
            None not in (size, row.n_voxels) and size != row.n_voxels
            for row, size in zip(rows, now)
        )
        if n_outdated:
            text += f" {n_outdated} of them changed size since and count as not reviewed."
        return text

    def rejected(self, case_id: str) -> list[int]:
        """Return the numbers of the rejected lesions of a scan, ascending."""
        rows = self.of_case.get(case_id, {}).values()
        return sorted(row.lesion_id for row in rows if row.verdict == REJECTED)

    def check(self, case_id: str, sizes: Mapping[int, int]) -> None:
        """Check that the reviews of a scan are of these lesions: number → number of voxels.

        Raises:
            ScanError: one is of a lesion that is missing, or had another size (`E_REVIEW`).
        """
        for number, row in self.of_case.get(case_id, {}).items():
            size = sizes.get(number)
            if size is not None and row.n_voxels in (None, size):
                continue
            now = "is missing" if size is None else f"has {size} voxels, not {row.n_voxels}"
            raise ScanError(
                f"{self.path}: reviews lesion {number} of case {case_id!r}, which {now}: the mask "
                "changed after the review",
                fix="review the case again, or remove its rows",
                code="E_REVIEW",
            )

    def remark(self, case_ids: Iterable[str]) -> str:
        """Return a warning about the rejected lesions of these cases; empty without any."""
        counts = {name: len(self.rejected(name)) for name in case_ids}
        names = [name for name, n in counts.items() if n]
        if not names:
            return ""
        n = sum(counts.values())
        verb = "is" if n == 1 else "are"
        return (
            f"{REVIEWED}: {format_count(n, 'lesion')} that {self.path} rejects {verb} left out "
            f"({format_list(names, 3, 'scan')})"
        )


def read_reviews(path: Path | None) -> Reviews:
    """Read review.csv; None gives no reviews. Of several rows of a lesion the last one counts.

    Raises:
        VolsegError: it cannot be read, lacks a column, or has a row that is not valid.
    """
    if path is None:
        return Reviews()
    of_case: dict[str, dict[int, LesionReview]] = defaultdict(dict)
    try:
        for review in _rows(path):
            of_case[review.case_id][review.lesion_id] = review
        return Reviews(path=path, sha256=sha256_of(path), of_case=dict(of_case))
    except OSError as error:
        raise _invalid(path, f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise _invalid(path, str(error)) from error


def _rows(path: Path) -> Iterator[LesionReview]:
    for n, cells in enumerate(iterate_csv(path), start=2):
        if n > MAX_ROWS:
            raise ValueError(f"has over {MAX_ROWS} rows")
        missing = [name for name in NEEDED if name not in cells]
        if missing:
            raise ValueError(f"lacks the columns {', '.join(missing)}")
        verdict = VERDICTS.get(cells["verdict"].strip().lower())
        if verdict is None:
            options = f"{ACCEPTED}, {REJECTED} or empty"
            raise ValueError(f"row {n}, verdict: must be {options}, got {cells['verdict']!r}")
        try:
            yield typed_row(LesionReview, cells | {"verdict": verdict})
        except ValueError as error:
            raise ValueError(f"row {n}: is not valid ({error})") from error


def _invalid(path: Path, problem: str) -> VolsegError:
    return VolsegError(
        f"{path}: {problem}",
        fix="download review.csv from report.html or a viewer page again",
        code="E_REVIEW",
    )
