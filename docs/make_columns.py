"""Write docs/columns.md from the code; a test compares the two."""

from pathlib import Path

from volseg.commands import table_columns
from volseg.store.tables import columns_page

if __name__ == "__main__":
    Path(__file__).with_name("columns.md").write_text(
        columns_page(table_columns()), encoding="utf-8"
    )
