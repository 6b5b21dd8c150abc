"""Quantized products on a GPU against float64, by whichever way serves the number of rows; and PiSSA's split on both devices."""

import pytest
import torch

from src.adapters.pissa import principal_part

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


@pytest.mark.parametrize(("out", "width"), [(96, 160), (160, 96)])
def test_pissa_splits_a_weight_alike_on_both_devices(out, width):
    """Up to float32 rounding of the product: singular values fall like 1/i, so that the subspace is well told apart."""
    u, _, v = torch.linalg.svd(torch.randn(out, width, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    weight = u @ torch.diag(1 / torch.arange(1, 97.0)) @ v
    (a, b), (other_a, other_b) = principal_part(weight, 8), principal_part(weight.cuda(), 8)
    assert (other_b @ other_a).cpu().sub(b @ a).norm() < 1e-5 * (b @ a).norm()
    assert other_a.is_contiguous() and other_b.is_contiguous()
