"""The checklist CLAIM: what a paper on AI in medical imaging should say, and which of it is known.

Source: Tejani et al., Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024
Update, Radiol Artif Intell 6:e240300 (2024), for numbers and sections; the wording is volseg's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from volseg.manuscript.facts import Statement

SOURCE = (
    "CLAIM 2024: Tejani et al., Radiol Artif Intell 6:e240300 (2024), doi 10.1148/ryai.240300; "
    "the items are in the words of volseg, so fill in the journal's own form from this table."
)
AUTHOR = "author"  # in place of an answer that no file holds


@dataclass(frozen=True, slots=True)
class Item:
    """An item of the checklist.

    Args:
        left: what an answer from stored facts still lacks; empty if it can be complete.
    """

    number: int
    section: str
    asked: str
    left: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of an item.

    Args:
        statements: sentences whose first item it is. see: numbers of the items that have others.
    """

    item: Item
    statements: tuple[Statement, ...] = ()
    see: tuple[int, ...] = ()

    @property
    def is_answered(self) -> bool:
        """Whether any file says something about the item."""
        return bool(self.statements or self.see)

    @property
    def text(self) -> str:
        """The sentences, and where the others are; `author` without any."""
        parts = [statement.text for statement in self.statements]
        if self.see:
            items = "items" if len(self.see) > 1 else "item"
            parts.append(f"See {items} {', '.join(map(str, self.see))}.")
        return " ".join(parts) or AUTHOR

    @property
    def left(self) -> str:
        """What the author has to add to the answer."""
        return self.item.left if self.is_answered else ""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for line in self.statements for key in line.keys))


def answer_items(statements: Iterable[Statement]) -> list[Answer]:
    """Return an answer per item of the checklist; a sentence stands at the first of its items."""
    lines, answers = list(statements), list[Answer]()
    for item in ITEMS:
        relevant = [line for line in lines if item.number in line.items]
        first = tuple(line for line in relevant if line.items[0] == item.number)
        see = sorted({line.items[0] for line in relevant} - {item.number})
        answers.append(Answer(item, first, tuple(see)))
    return answers


def _items(section: str, *lines: tuple[int, str, str]) -> Sequence[Item]:
    return [Item(number, section, asked, left) for number, asked, left in lines]


ITEMS: tuple[Item, ...] = (
    *_items(
        "Title or abstract",
        (1, "The title or abstract says that AI was used, and of which kind", ""),
    ),
    *_items(
        "Abstract",
        (2, "A summary of design, methods, results and conclusions", ""),
    ),
    *_items(
        "Introduction",
        (3, "Background, and the use and role for which the method is meant", "the background"),
        (4, "Aims and hypotheses", ""),
    ),
    *_items(
        "Methods: study design",
        (5, "Whether the study looks back or ahead", ""),
        (6, "What the study is to achieve", "the goal of the study"),
    ),
    *_items(
        "Methods: data",
        (7, "Where the data come from", "sites, dates, and links to public data"),
        (8, "Which patients and scans were included and excluded", "the criteria of the study"),
        (9, "How images were processed before the network", ""),
        (10, "Which parts of the data were used", "why, and who chose them"),
        (11, "How data were de-identified", ""),
        (12, "What was done about missing data", "how many were missing"),
        (13, "How images were acquired", "scanners, sequences, doses and contrast agents"),
    ),
    *_items(
        "Methods: reference standard",
        (14, "What counts as the truth, and how it was obtained", "how it was obtained"),
        (15, "Why this truth and no other", ""),
        (16, "Who annotated, and with what training", ""),
        (17, "How the test set was annotated", ""),
        (18, "How far annotators agree with each other and with themselves", ""),
    ),
    *_items(
        "Methods: data partitions",
        (19, "How cases were divided for training and testing", "who drew the partitions, and how"),
        (20, "On which level, such as the patient, partitions are disjoint", ""),
    ),
    *_items(
        "Methods: testing data",
        (21, "The planned number of test cases, and its reason", ""),
    ),
    *_items(
        "Methods: model",
        (22, "The model: inputs, outputs, layers", ""),
        (23, "Software with versions", ""),
        (24, "The weights from which training started", "where these weights come from"),
    ),
    *_items(
        "Methods: training",
        (25, "How the model was trained: augmentation, settings, number of models", ""),
        (26, "How the final model was selected", ""),
        (27, "Ensembles, and how their outputs are combined", ""),
    ),
    *_items(
        "Methods: evaluation",
        (28, "The metrics of performance", "why these metrics"),
        (29, "Measures of uncertainty and significance", "tests of significance, if there are any"),
        (30, "Analyses of robustness", "why these subgroups"),
        (31, "Methods that explain outputs", ""),
        (32, "Evaluation on data from the same source", ""),
        (33, "Testing on data from elsewhere", ""),
        (34, "Registration of the trial", ""),
    ),
    *_items(
        "Results: data",
        (35, "Numbers of patients and scans, included and excluded", "a flow chart"),
        (36, "Who the patients are, in each partition", "age, sex and disease"),
    ),
    *_items(
        "Results: model performance",
        (37, "Performance with its uncertainty", ""),
        (38, "Diagnostic accuracy with its precision", ""),
        (39, "Analysis of errors", "examples, and why they occur"),
    ),
    *_items(
        "Discussion",
        (40, "Limitations", "those of the study"),
        (41, "What follows for practice", ""),
    ),
    *_items(
        "Other information",
        (42, "Where the protocol and technical details are", "where these files are published"),
        (43, "Availability of software, model and data", "where model and data can be had"),
        (44, "Funding, and the role of funders", ""),
    ),
)
