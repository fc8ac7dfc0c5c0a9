"""Training state on disk: tensors and a JSON header in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from volseg.errors import VolsegError
from volseg.inputs import open_regular, parse_json
from volseg.io.files import write_bytes_atomic


def save_checkpoint(
    path: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """`state` holds plain numbers, texts and lists."""
    content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_bytes_atomic(path, save_tensors(content, metadata={"state": json.dumps(dict(state))}))


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state as they were saved.

    Raises:
        VolsegError: the file is damaged or not a checkpoint.
    """
    try:
        open_regular(path).close()  # opening as below would wait for a pipe
        with safe_open(path, framework="pt") as file:
            state = parse_json((file.metadata() or {})["state"], is_finite=False)
            if not isinstance(state, dict):
                raise ValueError("its state is not a JSON object")
            return {key: file.get_tensor(key) for key in file.keys()}, state  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise unusable_checkpoint(path, error) from error


def unusable_checkpoint(path: Path, why: object) -> VolsegError:
    return VolsegError(
        f"{path}: not a usable checkpoint ({why})",
        fix="delete it and train again without --resume",
        code="E_CKPT",
    )


def flatten(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def unflatten(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `flatten`."""
    start = f"{prefix}."
    return {
        key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)
    }
