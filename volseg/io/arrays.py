"""Scans and masks in memory: from NumPy, torch, nibabel, SimpleITK and MONAI to volumes, and back.

The types are recognised by name, so that no library is imported that the caller does not use. Every
grid comes out as RAS mm, in the axis order (I, J, K) of NIfTI.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.analyze import AnalyzeHeader
from nibabel.nifti1 import Nifti1Header

from volseg.errors import ScanError, VolsegError
from volseg.io import nifti
from volseg.io.gzip_stream import COPY_AGAIN, refusal
from volseg.io.header import ScanWarning, checked_grid, refuse_tilt, volume_shape
from volseg.io.label_table import parse_label_table, read_label_table
from volseg.io.volumes import (
    MAX_LABELS,
    checked_mask,
    checked_scan,
    mask_notes,
    read_header,
    read_mask,
    read_volume,
)
from volseg.volume import LPS_TO_RAS, Geometry, Volume

ACCEPTED = (
    "a path, a NumPy array or torch tensor with affine= or spacing_mm=, a nibabel image, a "
    "SimpleITK image, a MONAI MetaTensor or a volseg.Volume"
)
GRID, AXES = "W_GRID", "W_AXES"
# torch has few operations for these.
_TORCH_TYPES = {"uint16": np.int32, "uint32": np.int64}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Placement:
    """The grid of arrays that bring none of their own: an affine, or a spacing.

    Args:
        affine: (4, 4), voxel index → RAS mm, as in nibabel.
        spacing_mm: distance of the voxels along each axis of the array, in the order of its axes.

    Raises:
        VolsegError: both are given, or one of them is not valid.
    """

    affine: Any = None
    spacing_mm: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.affine is not None and self.spacing_mm is not None:
            raise _usage("affine and spacing_mm are both given", "give one: affine has the spacing")
        if self.affine is not None:
            object.__setattr__(self, "affine", _numbers(self.affine, (4, 4), "affine"))
        if self.spacing_mm is not None:
            spacing_mm = _numbers(self.spacing_mm, (3,), "spacing_mm")
            if not (spacing_mm > 0).all():
                raise _usage(f"spacing_mm must be over 0, got {spacing_mm}", "give it in mm")
            object.__setattr__(self, "spacing_mm", tuple(spacing_mm.tolist()))

    @property
    def is_given(self) -> bool:
        return self.affine is not None or self.spacing_mm is not None

    def grid(self, shape: tuple[int, int, int], name: str) -> tuple[Geometry, list[ScanWarning]]:
        """Return the grid of an array of this shape, and its oddities.

        Raises:
            ScanError: nothing is given, or no scanner makes such a grid.
        """
        if self.affine is not None:
            return checked_grid(shape, self.affine, name, source="affine")
        if self.spacing_mm is None:
            raise refusal(
                name,
                "E_NOGEOM",
                "an array has no voxel size, so nothing can be measured in mm",
                "give affine= (voxel → RAS mm), or spacing_mm= in the order of the array's axes",
            )
        affine = np.diag([*self.spacing_mm, 1.0])
        geometry, warnings = checked_grid(shape, affine, name, source="spacing_mm")
        text = "only spacing_mm is given, so the axes of the array are taken as R, A and S"
        return geometry, [ScanWarning(AXES, f"{text}; give affine= to state them"), *warnings]


NOWHERE = Placement()


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Voxels as the caller holds them: (I, J, K), their grid if they have one, and oddities."""

    array: np.ndarray
    geometry: Geometry | None
    warnings: Sequence[ScanWarning] = ()
    slope: float = 1.0
    intercept: float = 0.0

    def placed(self, grid: Geometry) -> Volume:
        return Volume(self.array, grid, self.slope, self.intercept)


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """A scan or mask of the caller as a volume, with what is odd about it.

    Args:
        source: the object of the caller.
        name: what messages call it.
    """

    volume: Volume
    source: Any
    name: str
    warnings: tuple[ScanWarning, ...] = ()


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of scan in memory: how it is called, read, and made again.

    Args:
        read: object and its name in messages → voxels.
        make: volume on the grid of an object, and that object → an object of its type.
    """

    name: str
    read: Callable[[Any, str], Stored]
    make: Callable[[Volume, Any], Any]


def kind_of(image: Any, what: str = "image") -> Kind:
    """Return the kind of a scan or mask, by its type alone.

    Raises:
        VolsegError: it is of no kind that volseg reads (`E_TYPE`).
    """
    if isinstance(image, str | os.PathLike):
        return KINDS["", "path"]
    owners = [(base.__module__.partition(".")[0], base.__name__) for base in type(image).__mro__]
    kind = next((KINDS[owner] for owner in owners if owner in KINDS), None)
    if kind is None:
        fix = f"give {ACCEPTED}"
        raise VolsegError(f"{what} is of type {type_name(image)}", fix=fix, code="E_TYPE")
    return kind


def needs_placement(image: Any) -> bool:
    """Check whether a scan brings no grid of its own."""
    return kind_of(image).read in (_from_numpy, _from_torch)


def as_scan(image: Any, *, what: str = "image", placement: Placement = NOWHERE) -> InMemory:
    """Return a scan in memory as a volume; a path is read.

    Args:
        what: name of the argument, for messages. placement: of an array without a grid.

    Raises:
        VolsegError: the type is unknown (`E_TYPE`), or the scan would be refused as a file.
    """
    kind = kind_of(image, what)
    if kind.read is _from_path:
        path = Path(image)
        header = read_header(path)
        return InMemory(read_volume(path, is_finite=False), image, str(path), header.warnings)
    name = f"{what} ({kind.name})"
    stored = kind.read(image, name)
    grid, warnings = stored.geometry, list(stored.warnings)
    if grid is None:
        grid, warnings = placement.grid(_shape_of(stored.array), name)
    refuse_tilt(grid, name)
    scan = checked_scan(stored.placed(grid), name, is_finite=False)
    return InMemory(scan, image, name, tuple(warnings))


def as_mask(
    mask: Any,
    *,
    like: InMemory,
    placement: Placement = NOWHERE,
    max_labels: int = MAX_LABELS,
    threshold: float | None = None,
) -> InMemory:
    """Return a mask in memory as a volume; a path is read.

    Args:
        like: its scan: an array without a grid lies on the same voxels.
        placement: of an array without a grid, if the scan is an array too.

    Raises:
        VolsegError: the type is unknown (`E_TYPE`), or the mask would be refused as a file.
    """
    kind = kind_of(mask, "mask")
    if kind.read is _from_path:
        path, place = Path(mask), _place_of_scan(like)
        return InMemory(
            read_mask(path, like=place, max_labels=max_labels, threshold=threshold), mask, str(path)
        )
    name = f"mask ({kind.name})"
    stored, warnings = kind.read(mask, name), []
    grid = stored.geometry
    if grid is None and placement.is_given:
        grid, warnings = placement.grid(_shape_of(stored.array), name)
    elif grid is None:
        grid = _grid_of_scan(stored.array, like, name)
    refuse_tilt(grid, name)
    labels = checked_mask(stored.placed(grid), name, max_labels=max_labels, threshold=threshold)
    return InMemory(labels, mask, name, (*stored.warnings, *warnings))


def _place_of_scan(scan: InMemory) -> Path | Geometry:
    """Return the file of a scan, or its grid if it is in memory."""
    is_file = kind_of(scan.source).read is _from_path
    return Path(scan.source) if is_file else scan.volume.geometry


def label_names_of(mask: Any, like: InMemory) -> dict[int, str]:
    """Return value → name from the label table of a mask; {} if there is none.

    Args:
        like: its scan.

    Raises:
        ScanError: its file cannot be read.
    """
    kind = kind_of(mask, "mask")
    if kind.read is _from_path:
        return read_label_table(mask, _place_of_scan(like))
    extensions = getattr(getattr(mask, "header", None), "extensions", ())
    content = (extension.get_content() for extension in extensions)
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in content]
    return parse_label_table(b"".join(parts).decode("utf-8", "replace"))


def notes_on_mask(mask: Any, like: InMemory) -> list[str]:
    """Describe what was left out of the mask of a file, each as `W_CODE: sentence`.

    Args:
        like: its scan.
    """
    is_file = kind_of(mask, "mask").read is _from_path
    return mask_notes(Path(mask), _place_of_scan(like)) if is_file else []


def like_source(volume: Volume, source: Any) -> Any:
    """Return a volume as an object of the caller's type; inverts `as_scan`.

    Args:
        volume: on the grid of `source`. source: what `as_scan` was given; a path gives a Volume.
    """
    return kind_of(source).make(volume, source)


def type_name(value: Any) -> str:
    """Return the name of a value's type, with its library.

    >>> type_name({}), type_name(Path())
    ('dict', 'pathlib.PosixPath')
    """
    kind = type(value)
    library = kind.__module__.partition(".")[0]
    return kind.__qualname__ if library == "builtins" else f"{library}.{kind.__qualname__}"


def _grid_of_scan(array: np.ndarray, scan: InMemory, name: str) -> Geometry:
    """Return the grid of the scan for a mask array that was made from the scan's voxels."""
    if kind_of(scan.source) is KINDS["SimpleITK", "Image"]:
        raise refusal(
            name,
            "E_PAIR",
            "the scan is a SimpleITK image, whose arrays are (K, J, I): the axes of the mask are "
            "unknown",
            "give SimpleITK.GetImageFromArray(mask) after CopyInformation(image)",
        )
    shape, expected = _shape_of(array), scan.volume.geometry.shape
    if shape == expected:
        return scan.volume.geometry
    fix = "give the mask that was drawn on this scan"
    if shape == expected[::-1]:
        fix = "its axes are reversed, as in arrays of SimpleITK: give mask.transpose(2, 1, 0)"
    raise refusal(name, "E_PAIR", f"has shape {shape}, but its scan {expected}", fix)


# ---- NumPy and torch


def _from_numpy(array: Any, name: str) -> Stored:
    if isinstance(array, np.ma.MaskedArray):
        n_masked = int(np.ma.count_masked(array))
        if n_masked:
            problem = f"{n_masked:,} voxels of the array are masked, so they have no value"
            raise refusal(name, "E_NAN", problem, "fill them first: array.filled(value)")
        array = np.ma.getdata(array)
    return Stored(_voxels(np.asarray(array), name), None)


def _to_numpy(volume: Volume, source: np.ndarray) -> np.ndarray:
    return volume.array.reshape(np.shape(source))


def _from_torch(tensor: Any, name: str) -> Stored:
    return Stored(_voxels(_array_of_tensor(tensor), name), None)


def _array_of_tensor(tensor: Any) -> np.ndarray:
    plain = tensor.detach().cpu()
    plain = plain.as_tensor() if hasattr(plain, "as_tensor") else plain
    if str(plain.dtype) == "torch.bfloat16":  # NumPy has no such type
        plain = plain.float()
    return plain.resolve_conj().resolve_neg().numpy()


def _to_torch(volume: Volume, source: Any) -> Any:
    array = volume.array
    array = array.astype(_TORCH_TYPES.get(array.dtype.name, array.dtype), order="C")
    return sys.modules["torch"].from_numpy(array).reshape(tuple(source.shape))


def _voxels(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array as (I, J, K) of a type that a file could hold, rarely as a copy."""
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    elif array.dtype == np.float16 or (array.dtype.kind == "f" and array.dtype.itemsize > 8):
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    if array.dtype.kind not in "iuf":
        problem = f"voxels are of type {array.dtype}"
        raise refusal(name, "E_DTYPE", problem, "give integers or floats")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.ndim == 4 and array.shape[0] == 1:  # the channel axis of torch and MONAI
        array = array[0]
    return array.reshape(volume_shape(array.shape, name, one=_one_of(array)).shape)


def _one_of(array: np.ndarray) -> str:
    """Return how to take one volume of an array of several: its shortest outer axis has them."""
    is_first = array.ndim == 4 and array.shape[0] < array.shape[-1]
    return "take one of them, such as array[0]" if is_first else "take one of them: array[..., 0]"


def _shape_of(array: np.ndarray) -> tuple[int, int, int]:
    i, j, k = array.shape
    return i, j, k


# ---- MONAI


def _from_monai(tensor: Any, name: str) -> Stored:
    """Read a MetaTensor (C, I, J, K) or (I, J, K), whose affine is RAS unless its meta says LPS."""
    if tensor.ndim == 5 or getattr(tensor, "is_batch", False):
        raise refusal(name, "E_NDIM", f"is a batch {tuple(tensor.shape)}", "give batch[0]")
    if tensor.ndim == 4 and tensor.shape[0] > 1:
        raise _channels(tensor.shape[0], name, "image[0:1]")
    array = _voxels(_array_of_tensor(tensor), name)
    affine = _numbers(tensor.affine, (4, 4), f"{name}: its affine")
    if str(tensor.meta.get("space")).rpartition(".")[2] == "LPS":
        affine = LPS_TO_RAS @ affine
    return _with_grid(array, affine, name)


def _to_monai(volume: Volume, source: Any) -> Any:
    meta = {"space": source.meta["space"]} if "space" in source.meta else {}
    return type(source)(_to_torch(volume, source), affine=source.affine.clone(), meta=meta)


# ---- SimpleITK


def _from_simpleitk(image: Any, name: str) -> Stored:
    """Read an image, whose geometry is LPS and whose arrays are (K, J, I)."""
    if image.GetDimension() != 3:
        volume_shape(image.GetSize(), name)
        fix = "take one volume: image[:, :, :, 0]"
        if image.GetDimension() == 2:
            fix = "keep the third axis: image[:, :, k:k+1] of the volume"
        raise refusal(name, "E_NDIM", f"has {image.GetDimension()} axes", fix)
    if image.GetNumberOfComponentsPerPixel() > 1:
        fix = "SimpleITK.VectorIndexSelectionCast(image, 0)"
        raise _channels(image.GetNumberOfComponentsPerPixel(), name, fix)
    array = sys.modules["SimpleITK"].GetArrayFromImage(image).transpose(2, 1, 0)
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return _with_grid(_voxels(array, name), LPS_TO_RAS @ lps, name)


def _to_simpleitk(volume: Volume, source: Any) -> Any:
    image = sys.modules["SimpleITK"].GetImageFromArray(volume.array.transpose(2, 1, 0))
    image.CopyInformation(source)
    return image


# ---- nibabel


def _from_nibabel(image: Any, name: str) -> Stored:
    """Read an image with its stored values; the header must say where it lies, as in a file."""
    one = "take one of them: image.slicer[..., 0]"
    header, shape = image.header, volume_shape(image.shape, name, one=one).shape
    if image.affine is None:
        fix = "give it one: nibabel.Nifti1Image(array, affine)"
        raise refusal(name, "E_NOGEOM", "has no affine", fix)
    if isinstance(header, AnalyzeHeader) and not isinstance(header, Nifti1Header):
        fix = "convert it to NIfTI from the original: ANALYZE does not store left and right"
        raise refusal(name, "E_NOGEOM", "left and right are unknown", fix)
    geometry, warnings = checked_grid(shape, image.affine, name, source="affine")
    if isinstance(header, Nifti1Header) and np.allclose(
        np.asarray(header.get_best_affine()), image.affine
    ):
        _, warnings = nifti.grid_of(header, shape, name)
    voxels, slope, intercept = image.dataobj, 1.0, 0.0
    try:
        if hasattr(voxels, "get_unscaled") and np.ndim(voxels.slope) == 0:
            slope, intercept = float(voxels.slope), float(voxels.inter)
            voxels = voxels.get_unscaled()
        array = _voxels(np.asanyarray(voxels), name)
    except (OSError, EOFError) as error:
        raise refusal(name, "E_TRUNCATED", f"cannot be read ({error})", COPY_AGAIN) from error
    warnings = [*_default_grid(geometry.affine), *warnings]
    return Stored(array, geometry, warnings, slope, intercept)


def _to_nibabel(volume: Volume, source: Any) -> Any:
    array = volume.array.reshape(source.shape)
    image = sys.modules["nibabel"].Nifti1Image(array, source.affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    return image


# ---- volumes and paths


def _from_volume(volume: Volume, name: str) -> Stored:
    array = _voxels(volume.array, name)
    return Stored(array, volume.geometry, (), volume.slope, volume.intercept)


def _from_path(path: Any, name: str) -> Stored:
    """Read a file as it is stored; `as_scan` and `as_mask` call its reader."""
    return _from_volume(read_volume(Path(path), is_finite=False), name)


def _to_volume(volume: Volume, source: Any) -> Volume:
    return volume


# ---- parts


def _with_grid(array: np.ndarray, affine: np.ndarray, name: str) -> Stored:
    geometry, warnings = checked_grid(_shape_of(array), affine, name, source="affine")
    return Stored(array, geometry, [*_default_grid(affine), *warnings])


def _default_grid(affine: np.ndarray) -> list[ScanWarning]:
    """Return a warning for a grid that is likely only the default of its library."""
    if not np.array_equal(np.abs(affine), np.eye(4)):
        return []
    text = "voxels of 1 × 1 × 1 mm at the origin are the default of a new image"
    return [ScanWarning(GRID, f"{text}: copy spacing and origin from the scan if they are not its")]


def _channels(n: int, name: str, one: str) -> ScanError:
    fix = f"give each channel by its name: {{'t1': {one}, ...}}"
    return refusal(name, "E_CHANNELS", f"has {n} channels", fix)


def _numbers(values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Return finite numbers of this shape as float64.

    Raises:
        VolsegError: they are not.
    """
    try:
        plain = _array_of_tensor(values) if hasattr(values, "detach") else values
        numbers = np.array(plain, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise _usage(
            f"{what} is of type {type_name(values)}", f"give numbers of shape {shape}"
        ) from error
    if numbers.shape != shape or not np.isfinite(numbers).all():
        text = numbers.shape if numbers.shape != shape else numbers.tolist()
        problem = f"{what} must be finite numbers of shape {shape}, got {text}"
        raise _usage(problem, "give voxel → RAS mm, or the three spacings in mm")
    return numbers


def _usage(problem: str, fix: str) -> VolsegError:
    return VolsegError(problem, fix=fix, code="E_USAGE")


# (library, name of the type) → how it is read and made
KINDS: dict[tuple[str, str], Kind] = {
    ("", "path"): Kind("path", _from_path, _to_volume),
    ("volseg", "Volume"): Kind("Volume", _from_volume, _to_volume),
    ("numpy", "ndarray"): Kind("NumPy array", _from_numpy, _to_numpy),
    ("monai", "MetaTensor"): Kind("MetaTensor", _from_monai, _to_monai),
    ("torch", "Tensor"): Kind("torch tensor", _from_torch, _to_torch),
    ("SimpleITK", "Image"): Kind("SimpleITK image", _from_simpleitk, _to_simpleitk),
    ("nibabel", "SpatialImage"): Kind("nibabel image", _from_nibabel, _to_nibabel),
}
