"""Training state on disk: tensors and a JSON header in one safetensors file, written atomically."""

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
    """Write tensors and `state`, which holds JSON values only."""
    content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_bytes_atomic(path, save_tensors(content, metadata={"state": json.dumps(dict(state))}))


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and state that `save_checkpoint` wrote.

    Raises:
        VolsegError: the file is damaged or not a checkpoint.
    """
    try:
        open_regular(path).close()  # safe_open would block on a pipe
        with safe_open(path, framework="pt") as file:
            state = parse_json((file.metadata() or {})["state"], is_finite=False)
            if not isinstance(state, dict):
                raise ValueError("its state is not a JSON object")
            names = file.keys()  # not a mapping
            return {key: file.get_tensor(key) for key in names}, state
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
    """Undo `flatten`: return the tensors under this prefix, without it."""
    start = f"{prefix}."
    return {
        key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)
    }
