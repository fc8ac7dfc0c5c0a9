"""Time the bare forward pass of one patch: every backend, in seconds and in % of the fp32 GEMM.

    python benchmarks/forward.py [--networks small,big] [--repeats 7] [--device cpu|cuda]

`small` is a U-Net with 16 to 256 features on 96³ voxels; `big` resembles nnU-Net's default, with 32
to 320 features on 128³. Random weights, one channel, three classes. Each backend runs in a separate
process, and they alternate patch by patch, so that other load on the machine affects all of them.
FLOPs: 2 per multiply-add, convolutions only, counted by torch. GEMM: torch.mm of 4096² in fp32 on
the same threads, measured in the same turns. int8 is calibrated on random patches, for its speed
only; `volseg quantise` measures its accuracy.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field

GEMM = "GEMM"
CPU_VARIANTS = (
    "torch eager",
    "torch eager, allocator",
    "torch.compile, channels-last, allocator",
    "openvino fp32",
    "openvino fp32, allocator",
    "openvino half",
    "openvino int8",
)
CUDA_VARIANTS = (
    "torch fp32",
    "torch fp16",
    "torch fp16, channels-last",
    "torch fp16, torch.compile",
    "torch fp16, CUDA graph",
)
NETWORKS = {
    "small": {"features": (16, 32, 64, 128, 256), "patch": 96},
    "big": {"features": (32, 64, 128, 256, 320, 320), "patch": 128},
}
CLASSES = 3
GEMM_SIZE = 4096
SETUP_SECONDS = 420


def make_network(name: str):
    import torch

    from volseg.networks import build_network

    features = NETWORKS[name]["features"]
    torch.manual_seed(0)
    strides = [(1, 1, 1)] + [(2, 2, 2)] * (len(features) - 1)
    return build_network(
        "unet3d", in_channels=1, out_channels=CLASSES, features=features, strides=strides
    ).eval()


def count_flops(name: str) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network, patch = make_network(name).to("meta"), NETWORKS[name]["patch"]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.empty((1, 1, patch, patch, patch), device="meta"))
    return counter.get_total_flops()


def prepare_run(variant: str, name: str, device: str) -> Callable[[], object]:
    """Return the function a worker times: one patch, from an array to its logits in memory."""
    import numpy as np
    import torch

    if variant == GEMM:
        a, b = (torch.rand(GEMM_SIZE, GEMM_SIZE, device=device) for _ in range(2))

        def multiply() -> None:
            torch.mm(a, b)
            if device == "cuda":
                torch.cuda.synchronize()

        return multiply
    from volseg.inference.export import convert
    from volseg.inference.openvino_backend import OpenVINOBackend
    from volseg.inference.torch_backend import TorchBackend

    network, patch = make_network(name), int(NETWORKS[name]["patch"])
    shape = (1, 1, patch, patch, patch)
    batch = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if variant.startswith("openvino"):
        model = convert(network, shape)
        precision = variant.replace("half", "fp16").replace(",", "").split()[1]
        if precision == "int8":
            from volseg.inference.quantise import quantise_network

            small = [batch[:, :, n : n + 64, n : n + 64, n : n + 64] for n in (0, 16, 32)]
            model = quantise_network(model, small)
        backend = OpenVINOBackend(model, shape, precision=precision)
    elif device == "cpu":
        if "channels-last" in variant:
            network = network.to(memory_format=torch.channels_last_3d)
        if "torch.compile" in variant:
            network = torch.compile(network)
        backend = TorchBackend(network, torch.device("cpu"))
    else:
        backend = cuda_backend(variant, network, batch)
    return lambda: backend.logits(batch)


def cuda_backend(variant: str, network, batch):
    import torch

    from volseg.inference.cuda_graph import CudaGraph
    from volseg.inference.torch_backend import TorchBackend

    precision = "fp32" if "fp32" in variant else "fp16"
    backend = TorchBackend(
        network, torch.device("cuda"), precision=precision, channels_last="channels-last" in variant
    )
    if "torch.compile" in variant:
        backend.network = torch.compile(network)
    if "graph" in variant:
        images = torch.from_numpy(batch).cuda()
        with (
            torch.no_grad(),
            torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True),
            torch.autocast("cuda", torch.float16, cache_enabled=False),
        ):
            backend.network = CudaGraph(network, images)
    return backend


def work(variant: str, name: str, device: str) -> None:
    """Print when ready, then run one forward pass per line on stdin and print its seconds."""
    if "allocator" in variant:
        from volseg.execution.cpu import keep_freed_memory

        keep_freed_memory()
    import torch

    from volseg.execution.cpu import physical_cores

    torch.set_num_threads(physical_cores())
    started = time.perf_counter()
    run = prepare_run(variant, name, device)
    run()
    print(json.dumps({"setup": time.perf_counter() - started}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "rss": rss}), flush=True)


@dataclass
class Worker:
    """Process of one variant; `seconds` holds the time of each of its turns."""

    variant: str
    process: subprocess.Popen
    setup: float = 0.0
    rss: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """Run one forward pass and record its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        answer = self.read()
        self.seconds.append(answer["seconds"])
        self.rss = answer["rss"]

    def read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):  # printed by a library
            line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.variant}: {self.process.wait()}")
        return json.loads(line)


def start(variant: str, name: str, device: str) -> Worker | None:
    """Return a worker that is ready; None if it failed or took too long."""
    options = ["--worker", variant, "--networks", name, "--device", device]
    command = [sys.executable, __file__, *options]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    worker = Worker(variant, process)
    cap = threading.Timer(SETUP_SECONDS, process.kill)
    cap.start()
    try:
        worker.setup = worker.read()["setup"]
    except RuntimeError as error:
        reason = f"failed, or not ready after {SETUP_SECONDS} s"
        print(f"not measured: {error} ({reason})", file=sys.stderr)
        return None
    finally:
        cap.cancel()
    return worker


def measure(name: str, device: str, repeats: int) -> None:
    variants = CPU_VARIANTS if device == "cpu" else CUDA_VARIANTS
    workers = [
        worker
        for variant in (GEMM, *variants)
        if (worker := start(variant, name, device)) is not None
    ]
    for _ in range(repeats):
        for worker in workers:
            worker.turn()
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
    gemm, *others = workers
    flops = count_flops(name)
    rate = [2 * GEMM_SIZE**3 / seconds / 1e9 for seconds in gemm.seconds]
    best, typical = max(rate), statistics.median(rate)
    patch = NETWORKS[name]["patch"]
    print(
        f"\n{name}: {flops / 1e9:.0f} GFLOP per patch of {patch}³; GEMM {typical:.0f} GFLOP/s "
        f"(best {best:.0f})\n"
    )
    print(
        f"| {name}, {patch}³ | s per patch, min | median | % of GEMM, best | median "
        f"| × {others[0].variant} | peak RSS, MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for worker in others:
        low, middle = min(worker.seconds), statistics.median(worker.seconds)
        ratio = statistics.median(
            b / a for a, b in zip(worker.seconds, others[0].seconds, strict=True)
        )
        print(
            f"| {worker.variant} | {low:.3f} | {middle:.3f} | {flops / low / best / 1e7:.0f} "
            f"| {flops / middle / typical / 1e7:.0f} | {ratio:.2f} | {worker.rss:.0f} |"
        )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="small,big")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--worker", help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.networks, arguments.device)
        return
    for name in arguments.networks.split(","):
        measure(name, arguments.device, arguments.repeats)


if __name__ == "__main__":
    main()
