"""The fast local response normalisation against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zskd_nni.models.local_response_norm import PrunedLocalResponseNorm, fast_response_norms


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("beta", [0.75, 0.4])
def test_values_and_gradients_are_those_of_pytorch(size, beta):
    norm = nn.Sequential(nn.LocalResponseNorm(size, alpha=0.9, beta=beta, k=1.3)).double()
    x = torch.randn(3, 7, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = norm(x)
    gradient = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, x, gradient)
    with fast_response_norms(norm):
        assert "forward" in norm[0].__dict__
        found = norm(x)
        (found_gradient,) = torch.autograd.grad(found, x, gradient)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(found_gradient, expected_gradient, atol=1e-12)
    assert torch.autograd.gradcheck(lambda y: _fast(norm, y), x)


def _fast(norm, x):
    with fast_response_norms(norm):
        return norm(x)


def test_other_shapes_and_half_precision_go_on_as_in_pytorch():
    norm = nn.Sequential(nn.LocalResponseNorm(3))
    flat, half = torch.rand(2, 5, 6), torch.rand(2, 5, 6, 6).bfloat16()
    with fast_response_norms(norm):
        assert torch.equal(norm(flat), nn.LocalResponseNorm(3)(flat))
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(half).dtype == torch.float32
            assert torch.allclose(norm(half), nn.LocalResponseNorm(3)(half.float()), atol=1e-6)


def test_the_module_is_itself_again_afterwards_and_a_copy_works_alone():
    norm = nn.Sequential(nn.LocalResponseNorm(3))
    x = torch.rand(1, 4, 2, 2)
    with pytest.raises(RuntimeError, match="stop"), fast_response_norms(norm):
        copied = copy.deepcopy(norm)
        with fast_response_norms(norm):  # within itself: nothing more to replace, nothing taken away
            pass
        assert "forward" in norm[0].__dict__
        raise RuntimeError("stop")
    assert "forward" not in norm[0].__dict__
    assert torch.allclose(copied(x), norm(x), atol=1e-6)


def test_a_pruned_one_is_fast_too():
    pruned = nn.Sequential(PrunedLocalResponseNorm([0, 1, 4, 6], 5, alpha=0.7))
    x = torch.rand(2, 4, 3, 3)
    expected = pruned(x)
    with fast_response_norms(pruned):
        assert "forward" in pruned[0].__dict__
        assert torch.allclose(pruned(x), expected, atol=1e-6)


def test_a_first_look_without_gradients_spoils_nothing():
    norm = nn.Sequential(nn.LocalResponseNorm(3))
    x = torch.rand(1, 9, 2, 2)  # a width that no other test has
    with fast_response_norms(norm):
        with torch.inference_mode():
            norm(x)
        x.requires_grad_()
        assert torch.autograd.grad(norm(x).sum(), x)[0].isfinite().all()
