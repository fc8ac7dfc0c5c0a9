"""Make the pictures of README.md: a report page and a figure of phantoms. Needs Chromium."""

import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import volseg

PICTURES = Path(__file__).with_name("pictures")
SAMPLES = Path(__file__).parents[1] / "sample_data" / "cases.csv"
SIZE = {"width": 1280, "height": 800}
CASE = "phantom_02"  # three lesions in several slices
FLAGS = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox")


def save(picture: Path, name: str, width: int) -> None:
    """Save a picture as a JPEG of this width."""
    with Image.open(picture) as image:
        height = round(image.height * width / image.width)
        smaller = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        smaller.save(PICTURES / name, quality=80, optimize=True)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    browser_path = next(filter(None, browsers))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        results = Path(folder) / "results"
        volseg.measure(cases=SAMPLES, out=results, intensity_unit="HU", figures=True)
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto((results / "report.html").as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        page.wait_for_timeout(2000)  # images are loaded as they come into view
        page.screenshot(path=Path(folder) / "report.png")
        browser.close()
        save(Path(folder) / "report.png", "report.jpg", 1000)
        save(results / "figures" / f"{CASE}.png", "figure.jpg", 700)


if __name__ == "__main__":
    main()
