"""The kernels as processors with narrower vectors compile them: each path of C that this machine can run."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

from model.backends.native import compiler
from model.backends.native.compiler import library
from model.backends.native.matrices import FORMATS
from tests.conftest import VARIANTS, Variant
from tests.model import test_matrices, test_runner
from tests.model.test_recurrence_aft import Case, relative_error, shape, spread_out

PATHS = {"AVX2": (["-mno-avx512f"], 16), "SSE": (["-march=x86-64"], 8)}  # flags; columns of a panel: two vectors

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one path")


@pytest.fixture(scope="module", params=PATHS, autouse=True)
def _path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    flags, width = PATHS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("kernels")))
        patch.setattr(compiler, "FLAGS", [*compiler.FLAGS, *flags])
        library.cache_clear()
        kernels = library()
        assert kernels is not None
        if kernels.panel_width < width:
            pytest.skip("the processor does not have it")
        assert kernels.panel_width == width
        yield
    library.cache_clear()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recurrence_equals_the_reference(variant: Variant) -> None:
    """Fewer features than a vector has, more keys than are taken at a time."""
    for width, n_head in ((6, 3), (90, 5)):
        bias, n_key = shape(variant, d_model=width, n_head=n_head, window=6, d_bias=3, max_positions=256)
        random = torch.Generator().manual_seed(0)
        keys = 20 * torch.randn(1, 50, n_key, generator=random)
        values = torch.randn(1, 50, n_key, width // n_key, generator=random)
        case = Case(spread_out(bias, 2.0, seed=0), keys, values)
        assert relative_error(case.native(), case.reference().detach()) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_gives_the_same_bits_in_any_batch_and_what_pytorch_gives(variant: Variant) -> None:
    test_runner.test_reading_and_stepping_equal_the_model(variant, variant != "rwkv4", "native")
    test_runner.test_any_cut_and_any_batch_give_the_same(variant, "native")


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_of_every_format(name: str) -> None:
    test_matrices.test_a_product_is_that_with_the_unpacked_weight(name, torch.float32, 77, 130)
