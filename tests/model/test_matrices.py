from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.activation import Activation
from model.backends.native.compiler import library
from model.backends.native.matrices import FORMATS, PackedMatrix, _pages, stored_format


def packed(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> PackedMatrix:
    kernels = library()
    assert kernels is not None
    return PackedMatrix(weight, bias, kernels, FORMATS[name])


@torch.inference_mode()
def test_int8_rounds_weights_and_nothing_else() -> None:
    weight, bias, x = torch.randn(77, 130), torch.randn(77), torch.randn(5, 130)
    matrix = packed(weight, bias, "int8")
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    torch.testing.assert_close(matrix.multiply(x), F.linear(x, rounded, bias), rtol=1e-5, atol=1e-4)
    assert matrix.panels.tensor.dtype == torch.int8


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (77, 130), (96, 31)])
@torch.inference_mode()
def test_a_product_is_that_with_the_unpacked_weight(name: str, dtype: torch.dtype, n: int, k: int) -> None:
    """Against float64, for more rows than a kernel takes at a time."""
    weight, bias, x = torch.randn(n, k).to(dtype), torch.randn(n), torch.randn(2, 13, k)
    matrix = packed(weight, bias, name)
    unpacked = matrix.format.unpack(matrix.panels, n)
    assert (unpacked.dtype, unpacked.shape) == (torch.float32, weight.shape)
    expected = F.linear(x.double(), unpacked.double(), bias.double())
    torch.testing.assert_close(matrix.multiply(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "steps"), [("float32", 0), ("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_packing_loses_no_more_than_rounding(name: str, steps: float) -> None:
    weight = torch.randn(77, 130)
    matrix = packed(weight, None, name)
    error = (matrix.format.unpack(matrix.panels, 77) - weight).abs().amax(1)
    assert bool((error <= 1.01 * steps * weight.abs().amax(1)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_format_loses_nothing(dtype: torch.dtype) -> None:
    weight = torch.randn(77, 130).to(dtype)
    kept = stored_format(dtype)
    panels = kept.pack(weight, 32)
    assert torch.equal(kept.unpack(panels, 77), weight.float())
    assert panels.tensor.element_size() == (2 if dtype == torch.bfloat16 else 4)


class LiveCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """peak: how many tensors in float32, as large as the source but without its memory, were held at a time."""

    def __init__(self, source: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source, self.peak = source, 0
        self._seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            storage = result.untyped_storage()
            is_as_large = result.numel() >= self._source.numel()
            if is_as_large and storage.data_ptr() != self._source.data_ptr():
                self._seen[storage.data_ptr()] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(not seen.expired() for seen in self._seen.values()))  # type: ignore[no-untyped-call]
        return result


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_holds_one_copy_in_float32_at_most(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(77, 130).to(dtype)
    with LiveCopies(weight) as copies:
        FORMATS[name].pack(weight, 32)
    assert copies.peak == (name != "bfloat16")


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    matrix = packed(torch.zeros(3, 5), None, "int8")
    assert not matrix.multiply(torch.ones(2, 5)).any()


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (Activation.NONE, lambda y: y),
        (Activation.GELU, F.gelu),
        (Activation.RELU_SQUARED, lambda y: torch.relu(y).square()),
    ],
)
@torch.inference_mode()
def test_inputs_and_outputs_may_be_columns_of_wider_tensors(
    activation: Activation, function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weight, bias, wide = torch.randn(40, 20), torch.randn(40), torch.randn(7, 50)
    matrix, kernels = packed(weight, bias, "float32"), library()
    assert kernels is not None
    x, results = wide[:, 10:30], torch.ones(7, 100)
    expected = results.clone()
    expected[:, 50:90] += function(F.linear(x, weight, bias))
    kernels.tasks([matrix.call(x, results[:, 50:90], activation=activation, adds=True)]).run(7, 2)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


def test_a_linux_without_huge_pages_has_kernels_too() -> None:
    with mock.patch("model.backends.native.matrices.mmap.mmap") as pages:
        pages.return_value.madvise.side_effect = OSError(22, "Invalid argument")
        assert _pages(4096) is pages.return_value
