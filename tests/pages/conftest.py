"""A browser for the tests of pages, started once."""

import pytest
from browser_visits import launched


@pytest.fixture(scope="session")
def playwright():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="NO BROWSER: playwright is not installed"
    )
    with sync_api.sync_playwright() as started:
        yield started


@pytest.fixture(scope="session")
def browser(playwright):
    browser = launched(playwright)
    yield browser
    browser.close()
