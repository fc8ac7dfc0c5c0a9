"""Laws of every network of sequences; a new file in networks/sequence/ is tested as it is."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch.nn import functional

from volseg.errors import VolsegError
from volseg.networks.scan_network import ScanNetwork, SliceNorm
from volseg.networks.sequence import build_sequence, sequence_names
from volseg.networks.sequence.base import InOrder
from volseg.networks.sequence.pooling import GatedAttention
from volseg.networks.sequence.tcn import Settings as Tcn

NAMES, FEATURES, LENGTHS = sequence_names(), 6, (1, 5, 9, 3)
ORDERED = [name for name in NAMES if isinstance(build_sequence(name, in_features=2), InOrder)]
UNORDERED = [name for name in NAMES if name not in ORDERED]


def scan_network(name, *, outputs=2, **settings):
    torch.manual_seed(0)
    network = build_sequence(name, in_features=FEATURES, **settings)
    return ScanNetwork(network, FEATURES, outputs).eval()


def scans(lengths=LENGTHS, *, padding=0.0, seed=0):
    """Return (N, S, features + 1), with slices of random features and `padding` after them."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.full((len(lengths), max(lengths), FEATURES + 1), padding)
    batch[..., -1] = 0
    for row, n in zip(batch, lengths, strict=True):
        row[:n, :-1] = torch.randn(n, FEATURES, generator=generator)
        row[:n, -1] = 1
    return batch


@pytest.mark.parametrize("padding", [0.0, 1e6, float("nan")])
@pytest.mark.parametrize("name", NAMES)
def test_a_scan_gives_the_same_alone_and_beside_longer_ones(name, padding):
    network, batch = scan_network(name), scans(padding=padding)
    with torch.no_grad():
        together, of_slices = network(batch), network.slice_logits(batch)
        for row, n in enumerate(LENGTHS):
            alone = batch[row : row + 1, :n]
            torch.testing.assert_close(network(alone)[0], together[row])
            torch.testing.assert_close(network.slice_logits(alone)[0], of_slices[row, :n])
    assert len({tuple(line) for line in together.tolist()}) == len(LENGTHS)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_of_padding_are_zero_and_every_parameter_learns(name):
    network, batch = scan_network(name).train(), scans().requires_grad_()
    targets = torch.tensor([0, 1, 0, 1])
    loss = functional.cross_entropy(network(batch), targets)
    loss = loss + network.slice_logits(batch)[scans()[..., -1] > 0].square().mean()
    loss.backward()
    assert batch.grad is not None
    assert bool((batch.grad[scans()[..., -1] == 0] == 0).all())
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert [key for key, value in gradients.items() if value is None or not value.any()] == []
    assert network.stages()[-1] == ["head.weight", "head.bias"]
    assert sorted(key for stage in network.stages() for key in stage) == sorted(gradients)


def test_there_are_networks_of_both_kinds():
    assert {"lstm", "transformer", "tcn"} <= set(ORDERED)
    assert {"mean", "max", "attention"} <= set(UNORDERED)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_slices_counts_where_it_should_and_nowhere_else(name):
    network, batch = scan_network(name), scans([8])
    shuffled = batch[:, torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        difference = (network(batch) - network(shuffled)).abs().max()
    assert bool(difference > 1e-3) == (name in ORDERED)
    if name in UNORDERED:
        torch.testing.assert_close(network(batch), network(shuffled))


def reached(network, n, changed):
    """Return which of n slices have another output if one slice changes."""
    batch = scans([n])
    other = batch.clone()
    other[0, changed, :-1] += 1
    with torch.no_grad():
        difference = (network.slice_logits(batch) - network.slice_logits(other)).abs().amax(2)[0]
    return np.flatnonzero(difference.numpy() > 0).tolist()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_convolutional_network_sees_so_far_and_no_farther(layers):
    network, reach = scan_network("tcn", layers=layers), Tcn(layers=layers).reach
    assert reached(network, 31, 15) == list(range(15 - reach, 15 + reach + 1))


@pytest.mark.parametrize("name", ["lstm", "transformer"])
@pytest.mark.parametrize("changed", [0, 4, 8])
def test_every_slice_reaches_all_others_before_and_after_it(name, changed):
    assert reached(scan_network(name), 9, changed) == list(range(9))


@pytest.mark.parametrize("name", UNORDERED)
def test_without_an_order_a_slice_reaches_itself_alone(name):
    assert reached(scan_network(name), 9, 4) == [4]


def test_attention_is_the_formula_of_its_source():
    torch.manual_seed(0)
    attention = GatedAttention(FEATURES, hidden=3)
    batch = scans()
    slices, is_slice = batch[..., :-1], batch[..., -1] > 0
    weights = attention.weights(slices, is_slice).detach().numpy()
    pooled = attention(slices, is_slice).detach().numpy()
    array = {key: value.numpy() for key, value in attention.state_dict().items()}
    for row, n in enumerate(LENGTHS):
        h = slices[row, :n].numpy()
        content = np.tanh(h @ array["content.weight"].T + array["content.bias"])
        gate = 1 / (1 + np.exp(-(h @ array["gate.weight"].T + array["gate.bias"])))
        scores = np.exp((content * gate) @ array["score.weight"][0])
        expected = scores / scores.sum()
        np.testing.assert_allclose(weights[row, :n], expected, rtol=1e-5)
        assert (weights[row, n:] == 0).all()
        np.testing.assert_allclose(pooled[row], expected @ h, rtol=1e-4, atol=1e-6)


def test_mean_and_max_are_those_of_the_slices_alone():
    batch = scans(padding=1e6)
    slices, is_slice = batch[..., :-1], batch[..., -1] > 0
    mean = build_sequence("mean", in_features=FEATURES).eval()(slices, is_slice)
    largest = build_sequence("max", in_features=FEATURES).eval()
    pooled = largest(slices, is_slice)
    for row, n in enumerate(LENGTHS):
        torch.testing.assert_close(mean[row], slices[row, :n].mean(0))
        torch.testing.assert_close(
            pooled[row], largest.project(slices[row, :n]).amax(0), check_stride=False
        )


def test_features_are_scaled_by_the_slices_without_padding():
    norm, batch = SliceNorm(FEATURES).train(), 3 + 5 * scans()
    slices, is_slice = batch[..., :-1], scans()[..., -1] > 0
    scaled = norm(slices, is_slice)
    valid = slices[is_slice]
    expected = (valid - valid.mean(0)) / (valid.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(scaled[is_slice], expected)
    assert bool((scaled[~is_slice] == 0).all())


def test_an_unknown_network_or_setting_is_refused_by_name():
    with pytest.raises(VolsegError, match=r"'lstmm' is unknown.*did you mean 'lstm'"):
        build_sequence("lstmm", in_features=2)
    with pytest.raises(VolsegError, match="unknown key heads"):
        build_sequence("lstm", in_features=2, heads=2)
    with pytest.raises(VolsegError, match="no multiple of 2 and of heads = 3"):
        build_sequence("transformer", in_features=2, heads=3)


# ---- what they can learn: scans of 6 to 12 slices with 4 features


def simulated(task, n, seed):
    """Return scans (n, 12, 5), and the label of each (n,)."""
    rng = np.random.default_rng(seed)
    batch, labels = np.zeros((n, 12, 5), np.float32), rng.integers(2, size=n)
    for row, label in enumerate(labels.tolist()):
        length = int(rng.integers(6, 13))
        slices = rng.normal(size=(length, 4))
        if task == "one slice decides" and label:
            slices[rng.integers(length), 0] += 6
        if task == "every slice says a little":
            slices[:, 0] += 1.2 * label
        if task == "which of two comes first":
            first, second = np.sort(rng.choice(length, 2, replace=False))
            slices[first, label] += 6
            slices[second, 1 - label] += 6
        batch[row, :length, :-1], batch[row, :length, -1] = slices, 1
    return torch.from_numpy(batch), torch.from_numpy(labels)


@cache
def accuracy(name, task):
    """Return the accuracy on 400 new scans after training on 400."""
    torch.manual_seed(0)
    settings = {"dropout": 0.0} | ({} if name == "mean" else {"features": 16})
    network = ScanNetwork(build_sequence(name, in_features=4, **settings), 4, 2)
    batch, labels = simulated(task, 400, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=1e-3)
    for step in range(300):
        part = slice(step % 8 * 50, step % 8 * 50 + 50)
        optimizer.zero_grad()
        functional.cross_entropy(network(batch[part]), labels[part]).backward()
        optimizer.step()
    batch, labels = simulated(task, 400, seed=1)
    with torch.no_grad():
        return float((network.eval()(batch).argmax(1) == labels).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mean"])
def test_where_one_slice_decides_all_but_the_mean_find_it(name):
    assert accuracy(name, "one slice decides") > 0.95
    assert accuracy("mean", "one slice decides") < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_only_networks_in_order_tell_which_of_two_slices_comes_first(name):
    right = accuracy(name, "which of two comes first")
    assert right > 0.93 if name in ORDERED else 0.4 < right < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_network_loses_where_the_order_says_nothing(name):
    task = "every slice says a little"
    assert accuracy("mean", task) > 0.93
    assert accuracy(name, task) > accuracy("mean", task) - 0.05
