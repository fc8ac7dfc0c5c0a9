"""The one training loop: batches → steps → validation → the best weights."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from volseg.errors import VolsegError
from volseg.evaluate.overlap import dice
from volseg.infer.backends import TorchBackend
from volseg.infer.stream import Tiling, predict_logits
from volseg.io.prepared import PreparedCase
from volseg.models import build_segmentation, set_weights, weights_of
from volseg.plan import Plan
from volseg.recipe import Recipe
from volseg.train.augment import augment, enlarged_shape
from volseg.train.checkpoint import flatten, load_checkpoint, save_checkpoint, unflatten
from volseg.train.losses import dice_cross_entropy
from volseg.train.samples import sample_batch

WARM_UP = 0.03  # share of the run in which the learning rate rises
LARGEST_RESERVE = 0.1  # share of the time budget kept for the final validation
VALIDATION_OVERLAP = 0.25  # cheap and close: the final metrics use the recipe's own overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run may use. `seconds` is the budget of the whole loop with its final validation, None for no limit."""

    device: torch.device
    seed: int = 0
    epochs: int
    patience: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of history.csv."""

    epoch: int
    step: int
    seconds: float
    learning_rate: float
    loss: float
    validation_dice: float


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The best weights, how they came about, and what the whole validation split says of them."""

    weights: Mapping[str, torch.Tensor]
    history: Sequence[Epoch]
    metrics: Mapping[str, Any]


@dataclass(slots=True)
class _State:
    identity: str = ""  # of the run: recipe, plan, seed and cases
    step: int = 0
    seconds: float = 0.0
    best_dice: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def train_segmentation(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
    settings: RunSettings,
    *,
    checkpoints: Path,
    resume: bool,
    initial: Mapping[str, torch.Tensor],
    report: Callable[[Epoch, float], None],
) -> Trained:
    """Train the recipe's network and keep the weights with the best validation Dice.

    A batch depends on the seed and the step alone, so an interrupted run that is resumed sees what it would have seen.

    Args:
        checkpoints: folder for `last` (written after each epoch) and `best`.
        resume: go on from `last` where it is there.
        initial: weights to start from where name and shape agree with the network's; empty for random ones.
        report: called after each epoch with it and the share of the run that is done, in [0, 1].

    Raises:
        VolsegError: the loss is no longer finite, or the checkpoint to resume from is damaged.
    """
    fabric = _fabric(settings.device)
    raw = _new_network(recipe, settings.seed).to(settings.device)  # before the optimizer takes its parameters
    set_weights(raw, weights_of(raw) | _fitting(initial, weights_of(raw)))
    optimizer = torch.optim.AdamW(
        raw.parameters(), lr=recipe.train.learning_rate, weight_decay=recipe.train.weight_decay
    )
    averaged = {key: tensor.clone().to(settings.device) for key, tensor in weights_of(raw).items()}
    state = _State(identity=_identity(training, validation, recipe, plan, settings.seed))
    last, best = checkpoints / "last.safetensors", checkpoints / "best.safetensors"
    if resume and last.exists():
        state = _restore(last, raw, averaged, optimizer, expected=state.identity)
    network, optimizer = fabric.setup(raw, optimizer)
    loss_function = dice_cross_entropy(recipe.train.class_weights).to(settings.device)
    evaluated = build_segmentation(recipe)
    watched = _spread(validation, recipe.train.validation_cases)
    started = time.monotonic() - state.seconds
    reserve = 0.0

    def done() -> float:
        share = state.step / (settings.epochs * recipe.train.steps_per_epoch)
        if settings.seconds is not None:
            share = max(share, (time.monotonic() - started) / max(1.0, settings.seconds - reserve))
        return min(1.0, share)

    while done() < 1 and len(state.history) - state.best_epoch < settings.patience:
        losses: list[float] = []
        rate = 0.0
        network.train()
        for _ in range(recipe.train.steps_per_epoch):
            if done() >= 1 and losses:
                break
            rate = recipe.train.learning_rate * _schedule(done())
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, masks = _batch(training, recipe, plan, seed=settings.seed, step=state.step)
            loss = loss_function(network(images.to(settings.device)), masks.to(settings.device)[:, None])
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss)
            fabric.clip_gradients(network, optimizer, max_norm=5.0, error_if_nonfinite=False)
            optimizer.step()
            state.step += 1
            _average(averaged, weights_of(raw), min(recipe.train.ema_decay, state.step / (state.step + 10)))
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise VolsegError(
                    f"the loss became {losses[-1]} at step {state.step}",
                    fix="lower learning_rate in the recipe and train again",
                    code="E_DIVERGED",
                )
        before = time.monotonic()
        set_weights(evaluated, averaged)
        score = _mean_dice(evaluated, watched, recipe, plan, settings.device, overlap=VALIDATION_OVERLAP)
        if settings.seconds is not None:
            # The final metrics look at all cases with more overlap: about twice the cost per case, which is kept free.
            per_case = (time.monotonic() - before) / len(watched)
            reserve = min(2 * per_case * len(validation), LARGEST_RESERVE * settings.seconds)
        state.seconds = time.monotonic() - started
        epoch = Epoch(
            len(state.history) + 1,
            state.step,
            round(state.seconds, 1),
            rate,
            round(float(np.mean(losses)), 4),
            round(score, 4),
        )
        state.history.append(asdict(epoch))
        if score > state.best_dice:
            state.best_dice, state.best_epoch = score, epoch.epoch
            save_checkpoint(best, averaged, {"epoch": epoch.epoch, "validation_dice": score})
        _save(last, raw, averaged, optimizer, state)
        report(epoch, done())
    weights, chosen = load_checkpoint(best)
    set_weights(evaluated, weights)
    history = [Epoch(**line) for line in state.history]
    metrics = {
        "steps": state.step,
        "training_seconds": round(state.seconds, 1),
        "best_epoch": chosen["epoch"],
        **_final_metrics(evaluated, validation, recipe, plan, settings.device),
    }
    return Trained(weights, history, metrics)


def _fabric(device: torch.device) -> Fabric:
    """Fabric in the precision that suits the device, without its line on stderr about it."""
    logger = logging.getLogger("lightning_fabric.utilities.rank_zero")
    logger.addFilter(_is_not_about_precision)
    try:
        precision = "bf16-mixed" if _is_fast_in_bf16(device) else "32-true"
        return Fabric(accelerator=device.type, devices=1, precision=precision)
    finally:
        logger.removeFilter(_is_not_about_precision)


def _is_not_about_precision(record: logging.LogRecord) -> bool:
    return "Automatic Mixed Precision" not in record.getMessage()


def _is_fast_in_bf16(device: torch.device) -> bool:
    """GPUs are, and CPUs with AMX, where a step takes half the time; without it, torch falls back to slow kernels."""
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))
    return True


def _identity(
    training: Sequence[PreparedCase], validation: Sequence[PreparedCase], recipe: Recipe, plan: Plan, seed: int
) -> str:
    """Hash of all that decides what a step does, so that two different runs are never continued as one."""
    cases = [[case.id, case.record.get("key")] for case in (*training, *validation)]
    facts = [recipe.sha256, plan.model_dump(mode="json"), seed, cases, len(training)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _new_network(recipe: Recipe, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from torch's global generator
        torch.manual_seed(seed)
        return build_segmentation(recipe)


def _fitting(initial: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the initial weights that the network can take: all but a head for other labels, usually."""
    fitting = {
        name: tensor for name, tensor in initial.items() if name in wanted and wanted[name].shape == tensor.shape
    }
    if initial and len(fitting) < len(wanted) / 2:
        raise VolsegError(
            f"only {len(fitting)} of the {len(wanted)} tensors of the recipe's network fit the model to start from",
            fix="use a recipe with the [network] of that model, or train without --init",
            code="E_CKPT",
        )
    return fitting


def _schedule(done: float) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to 0 at the end of the run."""
    if done < WARM_UP:
        return max(0.05, done / WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def _batch(
    cases: Sequence[PreparedCase], recipe: Recipe, plan: Plan, *, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    settings, share = recipe.train.augment, recipe.train.foreground_share
    assert share != "auto", "the plan completed the recipe"
    rng = np.random.default_rng([seed, step])
    images, masks = sample_batch(
        cases,
        enlarged_shape(plan.patch_shape, settings),
        n=plan.batch_size,
        foreground_share=share,
        rng=rng,
    )
    return augment(
        torch.from_numpy(images),
        torch.from_numpy(masks),
        settings,
        patch_shape=plan.patch_shape,
        spacing_mm=plan.spacing_mm,
        n_classes=1 + len(recipe.data.labels),
        generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
    )


@torch.no_grad()
def _average(averaged: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor], decay: float) -> None:
    for key, tensor in averaged.items():
        tensor.lerp_(current[key], 1 - decay)


def _spread(cases: Sequence[PreparedCase], n: int) -> list[PreparedCase]:
    """At most `n` cases, evenly spread over the list."""
    return [cases[round(index)] for index in np.linspace(0, len(cases) - 1, min(n, len(cases)))]


def _case_dice(
    network: nn.Module, case: PreparedCase, recipe: Recipe, plan: Plan, device: torch.device, overlap: float
) -> list[float]:
    """Dice per label of one case on the prepared grid; NaN for a label that neither mask has."""
    tiling = Tiling(patch_shape=plan.patch_shape, overlap=overlap)
    n_classes = 1 + len(recipe.data.labels)
    logits = predict_logits(np.asarray(case.image), TorchBackend(network, device), tiling, n_classes=n_classes)
    predicted = logits.argmax(axis=0)
    return [dice(case.mask, predicted, index) for index in range(1, len(logits))]


def _mean_dice(
    network: nn.Module,
    cases: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
    device: torch.device,
    *,
    overlap: float,
) -> float:
    """Mean over labels and cases; a label absent from mask and prediction counts as 1, one found where none is as 0."""
    scores = np.array([_case_dice(network, case, recipe, plan, device, overlap) for case in cases])
    return float(np.nan_to_num(scores, nan=1.0).mean())


def _final_metrics(
    network: nn.Module, cases: Sequence[PreparedCase], recipe: Recipe, plan: Plan, device: torch.device
) -> dict[str, Any]:
    """Dice on the prepared grid, mean over the validation cases that have the label or were given it."""
    scores = np.array([_case_dice(network, case, recipe, plan, device, recipe.infer.overlap) for case in cases])
    found: dict[str, Any] = {"validation_cases": len(cases)}
    for index, name in enumerate(recipe.data.label_names.values()):
        known = scores[:, index][~np.isnan(scores[:, index])]
        if known.size:
            found[f"validation_dice_{name}"] = round(float(known.mean()), 4)
    return found


def _save(
    path: Path,
    network: nn.Module,
    averaged: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: _State,
) -> None:
    moments = {
        f"{index}.{key}": tensor
        for index, values in optimizer.state_dict()["state"].items()
        for key, tensor in values.items()
    }
    tensors = flatten("network", weights_of(network)) | flatten("averaged", averaged) | flatten("optimizer", moments)
    save_checkpoint(path, tensors, asdict(state))


def _restore(
    path: Path,
    network: nn.Module,
    averaged: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    expected: str,
) -> _State:
    tensors, state = load_checkpoint(path)
    if state["identity"] != expected:
        raise VolsegError(
            f"{path}: belongs to a run with another recipe, seed, fold or other cases",
            fix="resume with what it was started with, or delete the folder",
            code="E_EXISTS",
        )
    set_weights(network, unflatten("network", tensors))
    for key, tensor in unflatten("averaged", tensors).items():
        averaged[key].copy_(tensor)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in unflatten("optimizer", tensors).items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return _State(**state)
