"""Read a checkpoint of nnU-Net v2, a pickle of which only the names in `ALLOWED` are loaded."""

from __future__ import annotations

import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # what torch raises with weights_only; nothing is unpickled here
from typing import Any

import numpy as np
import torch

from volseg.errors import VolsegError
from volseg.inputs import open_regular, read_bytes, shorten

# All that a checkpoint of nnU-Net may ask the unpickler for: tensors, containers, and the NumPy
# scalars of its log.
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = frozenset(
    {
        "_codecs.encode",
        "collections.OrderedDict",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.device",
        *(f"torch.{kind}Storage" for kind in _STORAGES),
    }
)
_DAMAGE = (  # raised by reading a file that is not a checkpoint
    UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
# Twice the log of 8000 epochs with 117 classes; the weights are separate files in the archive.
MAX_PICKLE_BYTES = 64 << 20
MAX_PICKLE_RATIO = 20  # of compression; `torch.save` does not compress at all
MAX_OPCODES = 10_000_000
MAX_MEMBERS = 100_000  # files in the archive: one per tensor
_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    weights: Mapping[str, torch.Tensor]
    trainer: str
    configuration: str
    tta_axes: tuple[int, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the parts of a checkpoint that inference needs, without running code from it.

    Raises:
        VolsegError: the pickle asks for a name outside `ALLOWED`, or is not a checkpoint.
    """
    make_scalar: Any = np.float64(0).__reduce__()[0]
    cores = ("_core", "core")  # NumPy 2 and 1
    scalars: list[Any] = [(make_scalar, f"numpy.{core}.multiarray.scalar") for core in cores]
    dtypes = [type(np.dtype(kind)) for kind in _DTYPES]
    try:
        _refuse_other_names(path)
        with torch.serialization.safe_globals([np.dtype, *dtypes, *scalars]):
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        arguments, weights = content["init_args"], content["network_weights"]
        tta_axes = content.get("inference_allowed_mirroring_axes")
        return Checkpoint(
            weights={str(key): tensor.detach() for key, tensor in weights.items()},
            trainer=shorten(str(content["trainer_name"]), 200),
            configuration=shorten(str(arguments["configuration"]), 200),
            tta_axes=tuple(int(axis) for axis in tta_axes or ()),
        )
    except _DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise VolsegError(
            f"{path}: not a checkpoint of nnU-Net v2 ({type(error).__name__}: {reason})",
            fix="copy it again",
            code="E_CKPT",
        ) from error
    except OSError as error:
        raise VolsegError(
            f"{path}: cannot be read ({error.strerror or error})",
            fix="check its permissions",
            code="E_PERM",
        ) from error


def _refuse_other_names(path: Path) -> None:
    """Check the names that a pickle asks for, without running it."""
    requested, from_the_stack = _names_in(_pickle_of(path))
    others = sorted(requested - ALLOWED)
    if others or from_the_stack:
        names = ", ".join(others[:5]) or "names that it puts together while it is read"
        raise VolsegError(
            f"{path}: its pickle asks for {names}, which no checkpoint of nnU-Net needs; "
            "it was not loaded",
            fix="take the checkpoint from a source that you trust, or save it again without "
            "these objects",
            code="E_PICKLE",
        )


def _pickle_of(path: Path) -> bytes:
    """Read the pickle in a zip archive of `torch.save`; any other file is taken to be a pickle."""
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return read_bytes(path, max_bytes=MAX_PICKLE_BYTES)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise ValueError(f"holds {len(members):,} files, more than {MAX_MEMBERS:,}")
            (member,) = (member for member in members if member.filename.endswith("/data.pkl"))
            size, packed = member.file_size, member.compress_size
            if size > min(MAX_PICKLE_BYTES, MAX_PICKLE_RATIO * packed):
                raise ValueError(f"its pickle of {packed:,} bytes unpacks to {size:,}")
            return archive.read(member)


def _names_in(data: bytes) -> tuple[set[str], bool]:
    """Return the names `module.name` that a pickle asks for, and whether any come from its stack.

    `torch.save` takes none from the stack; such a name is guessed from the last two texts, as in an
    honest pickle.
    """
    names: set[str] = set()
    from_the_stack = False
    texts, memo = ["", ""], {}
    last: str | None = None
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == MAX_OPCODES:
            raise ValueError(f"its pickle holds more than {MAX_OPCODES:,} instructions")
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", "."))
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            from_the_stack = True
            names.add(".".join(texts[-2:]) if argument is None else f"extension {argument}")
        elif opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = last
            continue
        last = memo.get(argument) if opcode.name in ("BINGET", "LONG_BINGET") else argument
        if isinstance(last, str):
            texts = [texts[-1], last]
    return names, from_the_stack
