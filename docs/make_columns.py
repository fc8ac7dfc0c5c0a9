"""Write docs/columns.md from the code; a test compares the two."""

from pathlib import Path

from volseg.store.tables import columns_page
from volseg.workflows import table_columns

if __name__ == "__main__":
    Path(__file__).with_name("columns.md").write_text(
        columns_page(table_columns()), encoding="utf-8"
    )
