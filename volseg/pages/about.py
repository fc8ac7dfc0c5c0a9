"""What pages and run.json say about a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from volseg import __version__
from volseg.pages.model_box import ModelBox, read_model_box


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a page and run.json say about a run: the command, when it started, and what it used.

    Args:
        model: name and hash; empty without a model. boxes: of the models that made the masks.
    """

    command: str = ""
    volseg: str = __version__
    model: str = ""
    started: str = ""
    boxes: tuple[ModelBox, ...] = ()

    @classmethod
    def now(cls, command: str, model: str = "", boxes: tuple[ModelBox, ...] = ()) -> About:
        """Describe a run that starts now."""
        started = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
        return cls(command=command, model=model, started=started, boxes=boxes)

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> About:
        """Read it from the content of run.json; what is missing or not valid is left out."""
        texts = {name: run.get(name) for name in ("command", "volseg", "model", "started")}
        texts = {name: text for name, text in texts.items() if isinstance(text, str) and text}
        box = read_model_box(run.get("model_box"))
        return cls(**texts, boxes=() if box is None else (box,))

    def as_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"command": self.command, "volseg": self.volseg}
        content |= {"model": self.model, "started": self.started}
        if self.boxes:
            content["model_box"] = self.boxes[0].model_dump(mode="json")
        return content

    @property
    def made_with(self) -> list[str]:
        return [text for text in (f"volseg {self.volseg}", self.model, self.started) if text]
