"""When a pass is recorded, with a copy as stand-in for a CUDA graph; its numbers, on a GPU."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from volseg.inference import cuda_graph
from volseg.inference.cuda_graph import AGAIN_AFTER, TRIAL_AFTER, RecordedPass
from volseg.inference.torch_backend import TorchBackend
from volseg.networks import build_network

SHAPE = (2, 1, 16, 16, 16)


def network():
    torch.manual_seed(0)
    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    return build_network(
        "unet3d", in_channels=1, out_channels=3, features=(4, 8, 8), strides=strides
    ).eval()


def batch(seed=0, n=2):
    images = np.random.default_rng(seed).normal(size=(n, *SHAPE[1:])).astype(np.float32)
    return torch.from_numpy(images)


class Recorder:
    """A recorder that copies the network and counts calls, with a clock that calls advance."""

    def __init__(self, forward, monkeypatch, *, recording_s=1.0, forward_s=1.0):
        self.recordings = self.replays = self.emptied = 0
        self.recording_s, self.now = recording_s, 0.0
        monkeypatch.setattr(cuda_graph, "time", SimpleNamespace(perf_counter=lambda: self.now))

        def run(images):
            self.now += forward_s
            return forward(images)

        self.run = run
        self.recorded = RecordedPass(
            record=self.record, synchronize=lambda: None, empty_cache=self.empty
        )
        self.forward = forward

    def record(self, forward, images):
        self.recordings += 1
        copied = copy.deepcopy(self.forward)

        def replay(images):
            self.replays += 1
            self.now += self.recording_s
            return copied(images)

        return replay

    def empty(self):
        self.emptied += 1

    @torch.no_grad()
    def __call__(self, images):
        return self.recorded.run(self.run, images)


def test_a_faster_recording_is_used_after_the_trial_and_gives_the_same_logits(monkeypatch):
    unet = network()
    run = Recorder(unet, monkeypatch, forward_s=2.0)
    for index in range(TRIAL_AFTER + 4):
        images = batch(index)
        with torch.no_grad():
            torch.testing.assert_close(run(images), unet(images), rtol=1e-5, atol=1e-5)
        assert run.recordings == (index >= TRIAL_AFTER)


def test_a_recording_is_dropped_when_a_batch_of_another_shape_comes(monkeypatch):
    unet = network()
    run = Recorder(unet, monkeypatch, forward_s=2.0)
    for index in range(TRIAL_AFTER + 1):
        run(batch(index))
    emptied, replays = run.emptied, run.replays
    smaller = batch(99, n=1)  # the last tiles of a layer
    with torch.no_grad():
        torch.testing.assert_close(run(smaller), unet(smaller))
    assert (run.emptied, run.replays) == (emptied + 1, replays)
    for index in range(2 * TRIAL_AFTER):  # shapes alternate, so no trial begins
        run(batch(index, n=1 + index % 2))
    assert run.recordings == 1


def test_a_slower_recording_is_dropped_with_its_memory_and_not_tried_again(monkeypatch):
    run = Recorder(network(), monkeypatch, recording_s=2.0)
    for index in range(3 * TRIAL_AFTER):
        run(batch(index))
    assert run.recordings == 1
    replays = run.replays
    run(batch())
    assert run.replays == replays
    assert run.emptied == 2  # before it was made, and after it was dropped


def test_a_pass_that_cannot_be_recorded_runs_plainly():
    def fail(forward, images):
        raise RuntimeError("operation not permitted when stream is capturing")

    calls = []

    def forward(images):
        calls.append(1)
        return images + 1

    recorded = RecordedPass(record=fail, synchronize=lambda: None, empty_cache=lambda: None)
    for index in range(2 * TRIAL_AFTER):
        torch.testing.assert_close(recorded.run(forward, batch(index)), batch(index) + 1)
    assert len(calls) == 2 * TRIAL_AFTER + 3  # three calls time the plain pass


def test_after_release_a_pass_is_recorded_again_without_another_trial(monkeypatch):
    run = Recorder(network(), monkeypatch, forward_s=2.0)
    for index in range(TRIAL_AFTER + 1):
        run(batch(index))
    run.recorded.release()
    replays = run.replays
    for index in range(AGAIN_AFTER):
        run(batch(index))
    assert (run.recordings, run.replays) == (1, replays)
    run(batch())
    assert (run.recordings, run.replays) == (2, replays + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_gives_the_same_logits_before_and_after_it_records(precision, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    monkeypatch.setattr(cuda_graph, "WORTH", 1e9)  # record even without a gain
    device = torch.device("cuda")
    backend = TorchBackend(network(), device, precision=precision, may_record=True)
    plain = TorchBackend(network(), device, precision=precision)
    batches = [batch(index).cuda() for index in range(TRIAL_AFTER + 3)]
    outputs = [backend.run(images) for images in batches]  # kept, as a caller may
    assert backend._recorded._recording is not None
    for images, logits in zip(batches, outputs, strict=True):
        torch.testing.assert_close(logits, plain.run(images), rtol=1e-2, atol=1e-2)
    before = torch.cuda.memory_reserved()
    backend.release()
    assert torch.cuda.memory_reserved() < before
    torch.testing.assert_close(backend.run(batches[0]), outputs[0], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_network_that_synchronises_runs_plainly():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")

    class Synchronising(torch.nn.Module):
        def forward(self, images):
            return images * (2 if images.mean().item() > -1e9 else 3)

    stream = torch.cuda.current_stream()
    backend = TorchBackend(Synchronising(), torch.device("cuda"), precision="fp32", may_record=True)
    images = batch().cuda()
    for _ in range(2 * TRIAL_AFTER):
        torch.testing.assert_close(backend.run(images), images * 2)
    assert backend._recorded._recording is None
    assert torch.cuda.current_stream() == stream
    large = torch.empty(2**28, device="cuda")
    del large
    reserved = torch.cuda.memory_reserved()
    backend.release()
    assert torch.cuda.memory_reserved() < reserved
