"""When a recording is taken, on any machine, where a copy of the network stands for its recording; what a CUDA graph computes, on a GPU."""

import copy
import time

import numpy as np
import pytest
import torch

from volseg.infer.backends import TorchBackend
from volseg.infer.cuda_graph import TRIAL_AFTER, CudaGraph, Recorded
from volseg.models import build_network

SHAPE = (2, 1, 16, 16, 16)


def network():
    torch.manual_seed(0)
    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    return build_network("unet3d", in_channels=1, out_channels=3, features=(4, 8, 8), strides=strides).eval()


def batch(seed=0, n=2):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, *SHAPE[1:])).astype(np.float32))


class Recorder:
    """Records by copying and counts what was asked of it; `slower` of each call, seconds, of the recording or of the pass itself."""

    def __init__(self, forward, *, recording_slower=0.0, forward_slower=0.0):
        self.recordings = self.replays = self.emptied = 0
        self.recording_slower = recording_slower

        def run(images):
            time.sleep(forward_slower)
            return forward(images)

        self.recorded = Recorded(run, record=self.record, synchronize=lambda: None, empty_cache=self.empty)
        self.forward = forward

    def record(self, forward, images):
        self.recordings += 1
        copied = copy.deepcopy(self.forward)

        def replay(given):
            self.replays += 1
            time.sleep(self.recording_slower)
            return copied(given)

        return replay

    def empty(self):
        self.emptied += 1

    @torch.no_grad()
    def __call__(self, images):
        return self.recorded(images)


def test_a_faster_recording_is_taken_after_the_trial_and_gives_the_same_logits():
    found = network()
    run = Recorder(found, forward_slower=0.02)
    for index in range(TRIAL_AFTER + 4):
        images = batch(index)
        with torch.no_grad():
            torch.testing.assert_close(run(images), found(images), rtol=1e-5, atol=1e-5)
        assert run.recordings == (index >= TRIAL_AFTER)
    replays = run.replays
    rest = batch(99, n=1)
    with torch.no_grad():  # the last tiles of a layer
        torch.testing.assert_close(run(rest), found(rest), rtol=1e-5, atol=1e-5)
    assert (run.recordings, run.replays) == (1, replays + 1)


def test_a_slower_recording_is_dropped_with_its_memory_and_not_tried_again():
    run = Recorder(network(), recording_slower=0.02)
    for index in range(3 * TRIAL_AFTER):
        run(batch(index))
    assert run.recordings == 1
    replays = run.replays
    run(batch())
    assert run.replays == replays
    assert run.emptied == 2  # before it was made, and after it was dropped


def test_what_cannot_be_recorded_runs_as_it_is():
    def fail(forward, images):
        raise RuntimeError("operation not permitted when stream is capturing")

    calls = []
    recorded = Recorded(
        lambda images: (calls.append(1), images + 1)[1], record=fail, synchronize=lambda: None, empty_cache=lambda: None
    )
    for index in range(2 * TRIAL_AFTER):
        torch.testing.assert_close(recorded(batch(index)), batch(index) + 1)
    assert len(calls) == 2 * TRIAL_AFTER + 3  # three to know how long it takes


def test_a_released_recording_is_made_again_without_another_trial_and_other_patches_start_anew():
    run = Recorder(network(), forward_slower=0.02)
    for index in range(TRIAL_AFTER + 1):
        run(batch(index))
    run.recorded.release()
    replays = run.replays
    run(batch())
    assert (run.recordings, run.replays) == (2, replays + 1)
    run(torch.zeros(2, 1, 24, 16, 16))
    run(batch())
    assert (run.recordings, run.replays) == (2, replays + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_cuda_graph_gives_the_logits_of_the_pass_that_it_records(precision):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    backend = TorchBackend(network(), torch.device("cuda"), precision=precision)
    recorded = TorchBackend(network(), torch.device("cuda"), precision=precision)
    images = batch(1).cuda()
    with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=precision == "fp16", cache_enabled=False):
        recorded.network = CudaGraph(recorded.network, images)
    first = recorded.run(images)
    kept = first.clone()
    torch.testing.assert_close(first, backend.run(images), rtol=1e-2, atol=1e-2 if precision == "fp16" else 1e-4)
    rest = batch(2, n=1).cuda()
    torch.testing.assert_close(recorded.run(rest), backend.run(rest), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)  # a caller may keep what it was given


@pytest.mark.gpu
def test_a_gpu_gives_the_same_logits_before_and_after_it_records():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    backend = TorchBackend(network(), torch.device("cuda"), may_record=True)
    images = batch(3).cuda()
    first = backend.run(images).clone()
    for _ in range(2 * TRIAL_AFTER):
        found = backend.run(images)
    torch.testing.assert_close(found, first, rtol=1e-2, atol=1e-2)
    backend.release()
    torch.testing.assert_close(backend.run(images), first, rtol=1e-2, atol=1e-2)
