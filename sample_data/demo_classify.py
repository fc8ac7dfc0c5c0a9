"""Demo: train a classifier on drawn masses, classify unseen ones and judge the classes.

Run by `make demo-classify`. Prints AUC and accuracy on the test images, and where the results are.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from pathlib import Path

from make_images import write_images
from rich.console import Console

import volseg

LEAST_AUC = 0.95


def main() -> int:
    """Return 0 if the AUC on the test images is at least `LEAST_AUC`, else 1."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_classify_results"))
    out: Path = parser.parse_args().out
    console, started = Console(width=110), time.monotonic()
    images = out / "images"
    if not (images / "test").is_dir():
        write_images(images)
    if not (out / "model" / "model.json").exists():
        console.print("training on 240 drawn images: about a minute on two cores …")
        volseg.train(
            images,
            out=out / "model",
            epochs=12,
            resume=True,
            progress=lambda stage, fraction, detail: (
                console.print(f"  {stage} {fraction:4.0%} {detail}", highlight=False)
                if stage == "Training" and detail.startswith("epoch")
                else None
            ),
        )
    report = volseg.infer(images / "test", model=out / "model", out=out / "results")
    judged = volseg.evaluate(
        reference=images / "test", predicted=out / "results", out=out / "evaluation"
    )
    metrics = volseg.read_table(out / "evaluation" / "metrics.csv")
    values = metrics[metrics["average"] == "macro"].set_index("metric")["value"]
    console.print(f"{report.headline}\n{judged.headline}")
    console.print(f"training, inference and evaluation took {time.monotonic() - started:.0f} s")
    is_met = values["auc"] >= LEAST_AUC
    verdict = "met" if is_met else "NOT met"
    console.print(f"AUC on unseen images {values['auc']:.3f}; at least {LEAST_AUC}: {verdict}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
