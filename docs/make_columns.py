"""Write docs/columns.md from the code; a test compares the two."""

from pathlib import Path

from volseg.commands import table_columns


def columns_page() -> str:
    parts = [
        "# Columns",
        "",
        "`make docs` writes this page from the code. An empty cell means unknown, 0 means zero.",
        "World coordinates are RAS+ millimetres. Tables are CSV in UTF-8 (RFC 4180). Cells that",
        "contain a comma, a quote or a line separator are quoted; cells are cut after 32 767",
        "characters, the maximum of spreadsheets.",
        "",
    ]
    for title, columns in table_columns().items():
        parts += [f"## {title}", "", "| column | unit | meaning | source |", "|---|---|---|---|"]
        parts += [
            f"| `{name}` | {unit} | {meaning.replace('|', chr(92) + '|')} | {source} |"
            for name, unit, meaning, source in columns
        ]
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("columns.md").write_text(columns_page(), encoding="utf-8")
