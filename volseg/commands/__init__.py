"""Imperative shell: read files, loop over cases, write folders and tables; all below is pure."""

from volseg.commands.attaching import attach
from volseg.commands.checking import check, table_columns
from volseg.commands.collecting import candidates
from volseg.commands.comparing import compare
from volseg.commands.describing import methods
from volseg.commands.evaluating import evaluate
from volseg.commands.explaining import explain
from volseg.commands.importing import import_nnunet
from volseg.commands.in_memory import (
    LoadedModel,
    MaskResult,
    SegmentResult,
    load_model,
    measure_mask,
    segment,
)
from volseg.commands.inference import infer
from volseg.commands.listing import cases
from volseg.commands.measuring import measure
from volseg.commands.planning import plan
from volseg.commands.preparing import preprocess
from volseg.commands.pretraining import pretrain
from volseg.commands.quantising import quantise
from volseg.commands.reporting import report
from volseg.commands.training import train
from volseg.errors import VolsegError
from volseg.io.volumes import read_mask, read_volume, write_volume
from volseg.measurement.selftest import selftest
from volseg.options import Progress
from volseg.reports import RunReport
from volseg.store.tables import read_table
from volseg.volume import Geometry, Volume

__all__ = [
    "Geometry",
    "LoadedModel",
    "MaskResult",
    "Progress",
    "RunReport",
    "SegmentResult",
    "VolsegError",
    "Volume",
    "attach",
    "candidates",
    "cases",
    "check",
    "compare",
    "evaluate",
    "explain",
    "import_nnunet",
    "infer",
    "load_model",
    "measure",
    "measure_mask",
    "methods",
    "plan",
    "preprocess",
    "pretrain",
    "quantise",
    "read_mask",
    "read_table",
    "read_volume",
    "report",
    "segment",
    "selftest",
    "table_columns",
    "train",
    "write_volume",
]
