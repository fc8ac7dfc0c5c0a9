"""Valid headers of NRRD and MetaImage, written by the definitions of the formats."""

from __future__ import annotations

import numpy as np
from laws import oblique

from volseg.volume import LPS_TO_RAS

SHAPE = (16, 17, 12)
VOXELS = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)
AFFINE = oblique((0.75, 0.8, 2.5))
RAW = VOXELS.tobytes(order="F")


def nrrd_header(affine=AFFINE, *, removed=(), **fields) -> str:
    """Return a header of these voxels, written here by the definition of the format.

    Args:
        removed: fields to leave out. fields: other values, with _ for a space.
    """
    lps = LPS_TO_RAS @ affine
    vectors = [f"({','.join(map(repr, lps[:3, axis].tolist()))})" for axis in range(4)]
    values = {
        "type": "int16",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "16 17 12",
        "space directions": " ".join(vectors[:3]),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": vectors[3],
    }
    values |= {name.replace("_", " "): value for name, value in fields.items()}
    lines = [f"{name}: {value}" for name, value in values.items() if name not in removed]
    return "\n".join(["NRRD0004", "# a comment", *lines, "", ""])


def metaimage_header(affine=AFFINE, *, removed=(), **fields) -> str:
    """Return a header of these voxels, written here by the definition of the format."""
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    values = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": " ".join(map(repr, (lps[:3, :3] / spacing).T.ravel().tolist())),
        "Offset": " ".join(map(repr, lps[:3, 3].tolist())),
        "ElementSpacing": " ".join(map(repr, spacing.tolist())),
        "DimSize": "16 17 12",
        "ElementType": "MET_SHORT",
    }
    values |= fields
    values["ElementDataFile"] = values.pop("ElementDataFile", "LOCAL")
    return "".join(f"{key} = {value}\n" for key, value in values.items() if key not in removed)
