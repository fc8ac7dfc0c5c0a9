"""Write the table of flags in docs/quality.md from the code; a test compares the two."""

from pathlib import Path

from volseg.quality.flags import FLAGS

START, END = "| flag | raised if | what to do |", "\n\n"


def with_flags(page: str) -> str:
    """Return the page with the current table of flags."""
    before, _, after = page.partition(START)
    rows = [f"| `{flag.code}` | {flag.rule} | {flag.fix} |" for flag in FLAGS]
    return before + "\n".join([START, "|---|---|---|", *rows]) + END + after.partition(END)[2]


if __name__ == "__main__":
    path = Path(__file__).with_name("quality.md")
    path.write_text(with_flags(path.read_text(encoding="utf-8")), encoding="utf-8")
