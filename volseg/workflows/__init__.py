"""Imperative shell: read files, loop over cases, write folders and tables; all below is pure."""

from volseg.measure.selftest import selftest
from volseg.options import Progress
from volseg.reports import RunReport
from volseg.workflows.checking import check, table_columns
from volseg.workflows.comparing import compare
from volseg.workflows.evaluating import evaluate
from volseg.workflows.importing import import_nnunet
from volseg.workflows.inference import infer
from volseg.workflows.measuring import measure
from volseg.workflows.planning import plan
from volseg.workflows.preparing import preprocess
from volseg.workflows.quantising import quantise
from volseg.workflows.reporting import report
from volseg.workflows.training import train

__all__ = [
    "Progress",
    "RunReport",
    "check",
    "compare",
    "evaluate",
    "import_nnunet",
    "infer",
    "measure",
    "plan",
    "preprocess",
    "quantise",
    "report",
    "selftest",
    "table_columns",
    "train",
]
