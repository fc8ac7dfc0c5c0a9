"""The section [[classifiers]]: trained classifiers that work on what a model segments."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from volseg.recipe.section import AUTO, Auto, Name, Section, Text

Role = Literal["gate", "filter", "type"]
ROLES: tuple[Role, ...] = get_args(Role)  # in the order in which they are run
GATE: Role = "gate"
FILTER: Role = "filter"
TYPE: Role = "type"
INPUTS = {GATE: "slice", FILTER: "lesion", TYPE: "lesion"}  # role → `data.input` of its recipe
# Class of what stays: a slice with a lesion, a predicted lesion with a partner in the reference.
KEPT = {GATE: "with label", FILTER: "matched"}


class RoleOfClassifier(Section):
    """A trained classifier, and what it does in segmentation.

    A `gate` skips tiles in slices that hold nothing, a `filter` drops predicted lesions, and a
    `type` gives every lesion its class. The first channel is what it sees.
    """

    role: Role
    model: Text  # folder of the classifier; in a trained model its name
    # Of a gate or a filter: the class of a slice with a lesion, or of a true lesion; auto: those of
    # `KEPT`.
    keeps: Name | Auto = AUTO
    # Smallest probability of that class; below it a slice is skipped, or a lesion dropped. auto:
    # the classifier's operating point of sensitivity 0.99.
    threshold: Annotated[float, Field(ge=0, le=1)] | Auto = AUTO

    @model_validator(mode="after")
    def _keys_fit_the_role(self) -> RoleOfClassifier:
        if self.role == TYPE and (self.keeps, self.threshold) != (AUTO, AUTO):
            raise ValueError(f'role = "{TYPE}" drops nothing: leave out keeps and threshold')
        return self

    @property
    def kept_class(self) -> str:
        return KEPT[self.role] if self.keeps == AUTO else self.keeps
