"""Pages in a browser without a network, as a reader sees them."""

import shutil

import pytest

FLAGS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox", "--disable-quic"]


def launched(playwright, *flags):
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("NO BROWSER: pages not tested; install one (apt-get install chromium)")
    return playwright.chromium.launch(executable_path=path, args=[*FLAGS, *flags])


class Visit:
    """A page in an offline browser, with its requests and its errors."""

    def __init__(self, browser, path, fragment="", ready="1", **options):
        context = browser.new_context(
            viewport={"width": 1280, "height": 800}, offline=True, **options
        )
        self.page = context.new_page()
        self.requests, self.trouble = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: self.trouble.append("dialog") or dialog.dismiss())
        self.page.on(
            "console", lambda line: line.type == "error" and self.trouble.append(line.text)
        )
        self.uri = path.resolve().as_uri() + fragment
        self.page.goto(self.uri)
        self.page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        assert self.page.get_attribute("html", "data-ready") == ready, self.page.inner_text(
            "#message"
        )

    def place(self):
        return self.page.evaluate("({...document.getElementById('place').dataset})")

    def end(self):
        assert self.trouble == []
        assert [
            request for request in self.requests if not request.startswith(("data:", "blob:"))
        ] == [self.uri.partition("#")[0]]
        root = "document.documentElement"
        assert self.page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), (
            "wider than the window"
        )
        self.page.context.close()
