"""The settings of each command, declared once."""

from volseg.options.declare import (
    Announce,
    Options,
    Progress,
    command,
    ignore_progress,
    ignore_text,
)
from volseg.options.explaining import ExplainOptions
from volseg.options.inference import InferOptions, MethodsOptions, ReportOptions
from volseg.options.measurement import (
    CompareOptions,
    EvaluateOptions,
    MaskOptions,
    MeasureOptions,
)
from volseg.options.memory import LoadModelOptions, MeasureMaskOptions, SegmentOptions
from volseg.options.training import (
    AttachOptions,
    CandidatesOptions,
    CasesOptions,
    ImportOptions,
    PlanOptions,
    PreprocessOptions,
    PretrainOptions,
    QuantiseOptions,
    TrainOptions,
)

COMMANDS: dict[str, type[Options]] = {
    "cases": CasesOptions,
    "preprocess": PreprocessOptions,
    "plan": PlanOptions,
    "train": TrainOptions,
    "pretrain": PretrainOptions,
    "infer": InferOptions,
    "explain": ExplainOptions,
    "quantise": QuantiseOptions,
    "candidates": CandidatesOptions,
    "attach": AttachOptions,
    "measure": MeasureOptions,
    "evaluate": EvaluateOptions,
    "compare": CompareOptions,
    "report": ReportOptions,
    "methods": MethodsOptions,
    "import_nnunet": ImportOptions,
}

__all__ = [
    "COMMANDS",
    "Announce",
    "AttachOptions",
    "CandidatesOptions",
    "CasesOptions",
    "CompareOptions",
    "EvaluateOptions",
    "ExplainOptions",
    "ImportOptions",
    "InferOptions",
    "LoadModelOptions",
    "MaskOptions",
    "MeasureMaskOptions",
    "MeasureOptions",
    "MethodsOptions",
    "Options",
    "PlanOptions",
    "PreprocessOptions",
    "PretrainOptions",
    "Progress",
    "QuantiseOptions",
    "ReportOptions",
    "SegmentOptions",
    "TrainOptions",
    "command",
    "ignore_progress",
    "ignore_text",
]
