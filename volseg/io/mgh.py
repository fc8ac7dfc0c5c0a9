"""FreeSurfer's MGH and MGZ: read a header; encode a volume."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from nibabel.freesurfer.mghformat import DATA_OFFSET, MGHError, MGHHeader

from volseg.io.gzip_stream import COPY_AGAIN, refusal
from volseg.io.header import (
    ScanHeader,
    checked_grid,
    listed,
    read_start,
    volume_shape,
)
from volseg.io.series import split_volume
from volseg.io.voxels import FileContent, voxel_bytes
from volseg.volume import Volume

LENGTH_TOLERANCE = 0.01  # of the vectors of direction, whose length is 1
_N_FIELD_BYTES = 90  # the other bytes before the voxels are unused
_DTYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}


def read_header(path: Path) -> ScanHeader:
    """Read the header of `.mgh` or `.mgz`, without voxels.

    The affine is the file's voxel-to-RAS matrix, rounded to float32 like the fields that it is
    made of, so that a mask in NIfTI-1 has the same affine bit for bit.

    Raises:
        ScanError: the file or its header cannot be trusted; `code` is the reason.

    Source: https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat
    """
    path, number = split_volume(path)
    stored, warnings = read_start(path, DATA_OFFSET)
    version = int.from_bytes(stored[:4], "big")
    if version & 0xFFFF00FF != 1:  # FreeSurfer 7 stores what the image is for in the third byte
        problem, fix = (
            f"is not MGH: its version reads {version}, not 1",
            "give a file of FreeSurfer",
        )
        raise refusal(path, "E_NOTMGH", problem, fix)
    if len(stored) < DATA_OFFSET:
        text = f"holds {len(stored)} of {DATA_OFFSET} header bytes"
        raise refusal(path, "E_TRUNCATED", text, COPY_AGAIN)
    header = MGHHeader(stored[:_N_FIELD_BYTES], check=False)
    sizes = [int(n) for n in header["dims"]]
    if min(sizes) < 1:
        raise refusal(path, "E_DIM", f"dims is {sizes}", COPY_AGAIN)
    series = volume_shape(sizes, path, volume=number)
    code = int(header["type"])
    if code not in _DTYPES:
        text = f"voxels are of the unknown type {code}"
        raise refusal(path, "E_DTYPE", text, "convert the voxels to float with mri_convert")
    affine = _affine(header, stored, path)
    geometry, grid_warnings = checked_grid(series.shape, affine, path, source="voxel-to-RAS matrix")
    dtype = np.dtype(_DTYPES[code])
    n_bytes = math.prod(series.shape) * dtype.itemsize
    return ScanHeader(
        geometry=geometry,
        dtype=dtype,
        path=path,
        stored=stored,
        data_path=path,
        data_offset=DATA_OFFSET + series.n_before * n_bytes,
        n_after=series.n_after * n_bytes,
        warnings=(*grid_warnings, *warnings),
    )


def encode(volume: Volume, path: Path, like: ScanHeader | None = None) -> FileContent:
    """Return the contents of an `.mgh` file; the grid reads back within rounding to float32.

    Args:
        path: the future file, for messages.
        like: not needed, because the grid is that of the volume.

    Raises:
        ScanError: `read_header` would refuse the grid, for example a line of voxels.
        ValueError: the dtype or scale cannot be stored.
    """
    volume_shape(volume.geometry.shape, path)
    if volume.is_scaled:
        raise ValueError("MGH holds no slope and intercept")
    header, geometry = MGHHeader(), volume.geometry
    try:
        header.set_data_dtype(volume.array.dtype.newbyteorder("="))
    except MGHError as error:
        raise ValueError(f"cannot write voxels of type {volume.array.dtype} as MGH") from error
    header.set_data_shape(geometry.shape)
    header["delta"] = geometry.spacing_mm
    header["Mdc"] = geometry.directions.T
    header["Pxyz_c"] = geometry.to_world_mm(np.array([geometry.shape]) / 2)[0]
    prefix = header.binaryblock[:_N_FIELD_BYTES].ljust(DATA_OFFSET, b"\0")
    return FileContent(prefix, voxel_bytes(volume.array, ">"))


def _affine(header: MGHHeader, stored: bytes, path: Path) -> np.ndarray:
    """Return the affine (4, 4) in float32; refuse one that FreeSurfer would take for granted."""
    if not any(stored[28:30]):  # nibabel replaces the flag and all fields by a default
        raise refusal(
            path,
            "E_NOGEOM",
            "goodRASFlag is 0, so left and right are unknown",
            "convert the original again; never guess",
        )
    spacing = np.asarray(header["delta"], np.float64)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        text = f"its voxel sizes are {listed(spacing)} mm"
        raise refusal(path, "E_GEOM", text, "convert the original again")
    with np.errstate(all="ignore"):  # absurd headers may overflow; the checks catch that
        lengths = np.linalg.norm(np.asarray(header["Mdc"], np.float64), axis=1)
        affine = np.asarray(header.get_affine()).astype(np.float32)
    if (np.abs(lengths - 1) > LENGTH_TOLERANCE).any():
        text = f"its directions have the lengths {listed(lengths)}, not 1"
        raise refusal(path, "E_GEOM", text, "convert the original again")
    return affine
