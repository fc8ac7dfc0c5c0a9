"""Rewrites of an OpenVINO graph before it is compiled, and its peak memory."""

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
    """Replace a convolution of concatenated channels by a sum of convolutions of the parts.

    The result is the same, and the concatenated tensor, the largest of a U-Net, is never allocated:
    a fifth less memory. OpenVINO fuses the addition of the second part into the convolution of the
    first, the skip connection.
    """
    operations = _operations()
    for joined in model.get_ordered_ops():
        if joined.get_type_name() != "Concat" or joined.get_axis() != 1:
            continue
        convolutions = [user.get_node() for user in joined.output(0).get_target_inputs()]
        if not all(map(_has_fixed_kernel, convolutions)):
            continue
        parts = joined.input_values()
        for convolution in convolutions:
            total = reduce(operations.add, reversed(_split(convolution, parts)))
            for user in convolution.output(0).get_target_inputs():
                user.replace_source_output(total.output(0))
    model.validate_nodes_and_infer_types()


def _has_fixed_kernel(node: openvino.Node) -> bool:
    is_convolution = node.get_type_name() == "Convolution"
    return is_convolution and node.input_value(1).get_node().get_type_name() == "Constant"


def _split(convolution: openvino.Node, parts: Sequence[openvino.Output]) -> list[openvino.Node]:
    """Return a convolution of each part of the channels."""
    operations = _operations()
    ends = np.cumsum([part.get_partial_shape()[1].get_length() for part in parts])
    weights = np.split(convolution.input_value(1).get_node().data, ends[:-1], axis=1)
    names = ("strides", "pads_begin", "pads_end", "dilations", "auto_pad")
    settings = [getattr(convolution, f"get_{name}")() for name in names]
    kernels = [operations.constant(np.ascontiguousarray(weight)) for weight in weights]
    return [
        operations.convolution(part, kernel, *settings)
        for part, kernel in zip(parts, kernels, strict=True)
    ]


def sum_axis_by_axis(model: openvino.Model) -> None:
    """Rewrite instance normalisation to compute mean and variance along one axis at a time.

    OpenVINO sums the voxels of a channel one by one in float32. Over the two million voxels of a
    128³ patch, each addition rounds the same way where a scan is constant, such as air. On patches
    of a CT with much air the logits differed from torch's by 0.012, of 6.9; axis by axis by 1.2e-5,
    for 7 % more time (docs/benchmarks.md).
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
        # reads the image once and writes no tensor of its size
        rows = operations.reduce_l2(centred, [axes[-1]], True)
        length = operations.gather(operations.shape_of(image), axes[-1], 0)
        n = operations.convert(length, np.float32)
        variance = operations.divide(_mean(operations.multiply(rows, rows), axes[:-1]), n)
        sd = operations.sqrt(operations.add(variance, np.float32(settings["eps"])))
        normalised = operations.multiply(centred, operations.divide(np.float32(1), sd))
        for user in norm.output(0).get_target_inputs():
            user.replace_source_output(normalised.output(0))
    model.validate_nodes_and_infer_types()


def halve_output(model: openvino.Model) -> None:
    """Convert the output to float16: with many features it is as large as any inner tensor."""
    operations = _operations()
    for result in model.get_results():
        half = operations.convert(result.input_value(0), np.float16)
        result.input(0).replace_source_output(half.output(0))
    model.validate_nodes_and_infer_types()


def _mean(values: openvino.Output | openvino.Node, axes: Sequence[int]) -> openvino.Node:
    """Return the mean along one axis after the other, the last axis first."""
    operations = _operations()
    for axis in reversed(axes):
        # The factor keeps OpenVINO from fusing the steps into one again.
        values = operations.multiply(operations.reduce_mean(values, [axis], True), np.float32(0.5))
    return operations.multiply(values, np.float32(2 ** len(axes)))


def live_bytes(model: openvino.Model) -> int:
    """Return the peak bytes of live tensors when a model of static shape runs its ops in order."""
    operations = model.get_ordered_ops()
    last_use: dict[tuple[str, int], int] = {}
    for index, operation in enumerate(operations):
        for source in operation.input_values():
            last_use[source.get_node().get_name(), source.get_index()] = index
    total = peak = 0
    live: dict[tuple[str, int], int] = {}
    for index, operation in enumerate(operations):
        for output in () if operation.get_type_name() == "Constant" else operation.outputs():
            key = (operation.get_name(), output.get_index())
            if key in last_use and output.get_partial_shape().is_static:
                live[key] = math.prod(output.get_shape()) * output.get_element_type().size
                total += live[key]
        peak = max(peak, total)
        for source in operation.input_values():
            key = (source.get_node().get_name(), source.get_index())
            if last_use[key] == index:
                total -= live.pop(key, 0)
    return peak


def _operations() -> ModuleType:
    return importlib.import_module("openvino.opset13")
