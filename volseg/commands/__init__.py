"""Imperative shell: read files, loop over cases, write folders and tables; all below is pure."""

from volseg.commands.checking import check, table_columns
from volseg.commands.comparing import compare
from volseg.commands.evaluating import evaluate
from volseg.commands.importing import import_nnunet
from volseg.commands.inference import infer
from volseg.commands.listing import cases
from volseg.commands.measuring import measure
from volseg.commands.planning import plan
from volseg.commands.preparing import preprocess
from volseg.commands.quantising import quantise
from volseg.commands.reporting import report
from volseg.commands.training import train
from volseg.measurement.selftest import selftest
from volseg.options import Progress
from volseg.reports import RunReport
from volseg.store.tables import read_table

__all__ = [
    "Progress",
    "RunReport",
    "cases",
    "check",
    "compare",
    "evaluate",
    "import_nnunet",
    "infer",
    "measure",
    "plan",
    "preprocess",
    "quantise",
    "read_table",
    "report",
    "selftest",
    "table_columns",
    "train",
]
