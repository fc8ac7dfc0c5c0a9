"""One scan in every form in which a caller may hold it."""

from __future__ import annotations

import nibabel
import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

from volseg.io.arrays import NOWHERE, Placement
from volseg.volume import Geometry, Volume

ITK_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def of_numpy(array, affine):
    return array, Placement(affine=affine)


def of_torch(array, affine):
    return torch.from_numpy(np.array(array)), Placement(affine=torch.tensor(np.array(affine)))


def of_torch_with_channel(array, affine):
    return torch.from_numpy(np.array(array))[None], Placement(affine=affine)


def of_nibabel(array, affine):
    return nibabel.Nifti1Image(array, affine), NOWHERE


def of_monai(array, affine):
    tensor = torch.from_numpy(np.array(array))[None]
    return MetaTensor(tensor, affine=torch.tensor(np.array(affine))), NOWHERE


def of_monai_without_channel(array, affine):
    return MetaTensor(
        torch.from_numpy(np.array(array)), affine=torch.tensor(np.array(affine))
    ), NOWHERE


def of_simpleitk(array, affine):
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    steps = (ITK_LPS @ affine)[:3, :3]
    spacing = np.linalg.norm(steps, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((steps / spacing).ravel().tolist())
    image.SetOrigin((ITK_LPS @ affine)[:3, 3].tolist())
    return image, NOWHERE


def of_volume(array, affine):
    return Volume(array, Geometry(array.shape, affine)), NOWHERE


# name → function of (array (I, J, K), affine (4, 4) in RAS mm) → (image, placement)
FORMS = {
    "NumPy array": of_numpy,
    "torch tensor": of_torch,
    "torch tensor with a channel": of_torch_with_channel,
    "nibabel": of_nibabel,
    "MONAI": of_monai,
    "MONAI without a channel": of_monai_without_channel,
    "SimpleITK": of_simpleitk,
    "Volume": of_volume,
}
