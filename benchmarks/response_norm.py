"""The fast local response normalisation against PyTorch's own, forward and backward, on AlexNet's two layers.

python benchmarks/response_norm.py [--device cuda] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from zskd_nni.models.local_response_norm import fast_response_norms


def main() -> None:
    """Time pairs of both and print the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    norm = nn.Sequential(nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=1.0))

    def seconds(x: torch.Tensor) -> float:
        started = time.perf_counter()
        for _ in range(5):
            torch.autograd.grad(norm(x).sum(), x)
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / 5

    for shape in ((128, 48, 32, 32), (128, 128, 15, 15)):
        x = torch.rand(shape, device=arguments.device).to(memory_format=torch.channels_last).requires_grad_()
        pairs = []
        for _ in range(6):
            plain = seconds(x)
            with fast_response_norms(norm):
                pairs.append((plain, seconds(x)))
        plain, fast = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        ratio = statistics.median(one / other for one, other in pairs[1:])
        print(f"{shape}: PyTorch {plain * 1e3:.1f} ms, fast {fast * 1e3:.1f} ms, ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
