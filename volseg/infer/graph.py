"""What volseg changes in a network's graph before OpenVINO compiles it, and what it reads from it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import reduce
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import openvino


def split_joined_convolutions(model: openvino.Model) -> None:
    """Let each part of a concatenation of channels go through its own share of the convolution's weights, and add what comes out.

    The sum is the same, and the joined tensor, the largest of a U-Net, never exists: a fifth less memory. OpenVINO adds the second
    part within the convolution of the first, which is that of the skip connection.
    """
    operations = _operations()
    for joined in model.get_ordered_ops():
        if joined.get_type_name() != "Concat" or joined.get_axis() != 1:
            continue
        inputs = list(joined.output(0).get_target_inputs())
        convolutions = [each.get_node() for each in inputs]
        if any(
            each.get_type_name() != "Convolution"
            or each.input_value(1).get_node().get_type_name() != "Constant"
            for each in convolutions
        ):
            continue
        parts = joined.input_values()
        widths = [part.get_partial_shape()[1].get_length() for part in parts]
        for convolution in convolutions:
            weights = np.split(
                convolution.input_value(1).get_node().data, np.cumsum(widths)[:-1], axis=1
            )
            settings = [
                getattr(convolution, f"get_{name}")()
                for name in ("strides", "pads_begin", "pads_end", "dilations", "auto_pad")
            ]
            found = [
                operations.convolution(
                    part, operations.constant(np.ascontiguousarray(own)), *settings
                )
                for part, own in zip(parts, weights, strict=True)
            ]
            total = reduce(operations.add, reversed(found))
            for following in convolution.output(0).get_target_inputs():
                following.replace_source_output(total.output(0))
    model.validate_nodes_and_infer_types()


def sum_axis_by_axis(model: openvino.Model) -> None:
    """Let instance normalisation take its mean and variance along one axis after the other.

    OpenVINO adds the voxels of a channel up one after the other in float32. Over the two million of a patch of 128³ each addition
    rounds the same way where a scan is constant, as air is. On patches of a CT with much air the logits were off from torch's by
    0.012, of 6.9; axis by axis by 1.2e-5, for 7 % more time (docs/benchmarks.md).
    """
    operations = _operations()
    for norm in model.get_ordered_ops():
        if norm.get_type_name() != "MVN":
            continue
        settings = norm.get_attributes()
        image = norm.input_value(0)
        n_axes = norm.input_value(1).get_partial_shape()[0]
        if (
            n_axes.is_dynamic
            or not settings["normalize_variance"]
            or settings["eps_mode"].lower() != "inside_sqrt"
        ):
            continue
        rank = len(image.get_partial_shape())
        axes = range(rank - n_axes.get_length(), rank)  # torch normalises over its last axes
        centred = operations.subtract(image, _mean(image, axes))
        rows = operations.reduce_l2(
            centred, [axes[-1]], True
        )  # reads the image once and writes none
        n = operations.convert(
            operations.gather(operations.shape_of(image), axes[-1], 0), np.float32
        )
        variance = operations.divide(_mean(operations.multiply(rows, rows), axes[:-1]), n)
        deviation = operations.sqrt(operations.add(variance, np.float32(settings["eps"])))
        normalised = operations.multiply(centred, operations.divide(np.float32(1), deviation))
        for following in norm.output(0).get_target_inputs():
            following.replace_source_output(normalised.output(0))
    model.validate_nodes_and_infer_types()


def halve_output(model: openvino.Model) -> None:
    """Let the model give float16: of many features, the array is as large as any within the network."""
    operations = _operations()
    for result in model.get_results():
        result.input(0).replace_source_output(
            operations.convert(result.input_value(0), np.float16).output(0)
        )
    model.validate_nodes_and_infer_types()


def _mean(values: openvino.Output | openvino.Node, axes: Sequence[int]) -> openvino.Node:
    """Over one axis after the other, the last first."""
    operations = _operations()
    for axis in reversed(axes):
        # The factor keeps OpenVINO from joining the steps into one again.
        values = operations.multiply(operations.reduce_mean(values, [axis], True), np.float32(0.5))
    return operations.multiply(values, np.float32(2 ** len(axes)))


def live_bytes(model: openvino.Model) -> int:
    """Bytes of the tensors alive at the worst moment, when the operations of a model of static shape run one after the other."""
    operations = model.get_ordered_ops()
    last: dict[tuple[str, int], int] = {}
    for index, operation in enumerate(operations):
        for source in operation.input_values():
            last[source.get_node().get_name(), source.get_index()] = index
    now = peak = 0
    held: dict[tuple[str, int], int] = {}
    for index, operation in enumerate(operations):
        for output in () if operation.get_type_name() == "Constant" else operation.outputs():
            key = (operation.get_name(), output.get_index())
            if key in last and output.get_partial_shape().is_static:
                held[key] = math.prod(output.get_shape()) * output.get_element_type().size
                now += held[key]
        peak = max(peak, now)
        for source in operation.input_values():
            key = (source.get_node().get_name(), source.get_index())
            if last[key] == index:
                now -= held.pop(key, 0)
    return peak


def _operations() -> ModuleType:
    return importlib.import_module("openvino.opset13")
