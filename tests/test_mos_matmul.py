"""Checks the matmuls against F.linear, with oneDNN and without."""

import pytest
import torch
import torch.nn.functional as F

from hf_mos.remote_code import mos_matmul
from hf_mos.remote_code.mos_matmul import COLUMNS, NARROW, TILE, add_product_, multiply, multiply_into

# Rows, width, classes; the last do not fill their tile.
SIZES = [(1, 8, 5), (COLUMNS, 16, 40), (7, 16, TILE), (33, 24, 2 * TILE + 3)]


@pytest.fixture(params=[(True, True), (True, False), (False, False)], ids=["onednn", "onednn for few rows", "blas"])
def onednn(request, monkeypatch):
    is_available, mkl_is_slow = request.param
    if is_available and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: is_available)
    monkeypatch.setattr(mos_matmul, "_mkl_is_slow", lambda adds=False: mkl_is_slow)
    monkeypatch.setattr(mos_matmul, "SMALL", 0)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "D", "V"), SIZES)
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_equals_linear(n, D, V, dtype, has_bias):
    rows, weight = torch.randn(n, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    bias = torch.randn(V, dtype=dtype) if has_bias else None
    expected = F.linear(rows, weight, bias)
    torch.testing.assert_close(multiply(rows, weight, bias), expected)
    out = torch.full((n, V), torch.nan, dtype=dtype)
    assert multiply_into(out, rows, weight, bias) is out
    torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [3, NARROW + 1])
@torch.no_grad()
def test_adds_a_product(D, dtype):
    """To a sum, and to memory that was never written; the left matrix is a transposed part of a wider buffer."""
    error, rows = torch.randn(9, TILE + 5, dtype=dtype)[:7], torch.randn(7, D, dtype=dtype)
    total = torch.full((TILE + 5, D), torch.nan, dtype=dtype)
    add_product_(total, error.t(), rows, is_first=True)
    torch.testing.assert_close(total, error.t() @ rows)
    add_product_(total, error.t(), rows, is_first=False)
    torch.testing.assert_close(total, 2 * (error.t() @ rows))


@pytest.mark.usefixtures("onednn")
@torch.no_grad()
def test_layouts():
    """Transposed, with gaps between the rows, and empty."""
    weight, wide = torch.randn(40, 12), torch.randn(9, 80)
    rows = torch.randn(6, 12)
    torch.testing.assert_close(multiply(torch.randn(6, 40).zero_() + 1, weight.t()), weight.sum(0).expand(6, 12))
    torch.testing.assert_close(multiply(rows, wide[:, ::5][:, :12]), rows @ wide[:, ::5][:, :12].t())
    torch.testing.assert_close(multiply(wide[:, :12], weight), wide[:, :12] @ weight.t())
    assert multiply(rows[:0], weight).shape == (0, 40)
    assert multiply_into(torch.empty(0, 40), rows[:0], weight).shape == (0, 40)


@pytest.fixture
def given_to_onednn(monkeypatch):
    """The matrices of each product that oneDNN is given."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    product = mos_matmul._onednn
    monkeypatch.setattr(mos_matmul, "_onednn", lambda *args: given.append(args[:2]) or product(*args))
    return given


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_onednn_is_given_no_matrix_with_gaps(transposed, given_to_onednn, monkeypatch):
    """It takes a thousand times as long for one, such as a tile of a transposed weight."""
    monkeypatch.setattr(mos_matmul, "_mkl_is_slow", lambda adds=False: True)
    monkeypatch.setattr(mos_matmul, "SMALL", 0)
    rows, weight = torch.randn(6, 12), torch.randn(12, TILE + 5).t()
    weight = weight if transposed else weight.contiguous()
    out = multiply_into(torch.empty(6, TILE + 5), rows, weight)
    torch.testing.assert_close(out, F.linear(rows, weight))
    torch.testing.assert_close(multiply(rows, weight), out)
    assert len(given_to_onednn) == (1 if transposed else 3)
    for matrix in (matrix for pair in given_to_onednn for matrix in pair):
        assert matrix.is_contiguous() or matrix.t().is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_a_sum_gives_onednn_no_matrix_with_gaps(transposed, given_to_onednn, monkeypatch):
    """It copies a tile of a transposed matrix element by element, which took longer than the product."""
    monkeypatch.setattr(mos_matmul, "_mkl_is_slow", lambda adds=False: True)
    monkeypatch.setattr(mos_matmul, "SMALL", 0)
    left, right = torch.randn(6, TILE + 5).t(), torch.randn(6, NARROW + 1)
    left = left if transposed else left.contiguous()
    total = torch.zeros(TILE + 5, NARROW + 1)
    add_product_(total, left, right, is_first=False)
    torch.testing.assert_close(total, left @ right)
    assert len(given_to_onednn) == 2
    for matrix in (matrix for pair in given_to_onednn for matrix in pair):
        assert matrix.is_contiguous() or matrix.t().is_contiguous()


@pytest.mark.parametrize("is_slow", [True, False])
@torch.no_grad()
def test_a_small_product_and_a_single_row_stay_with_the_blas(is_slow, given_to_onednn, monkeypatch):
    """oneDNN takes longer to begin than they take."""
    monkeypatch.setattr(mos_matmul, "_mkl_is_slow", lambda adds=False: is_slow)
    weight = torch.randn(2**11, 2**10)

    def products(rows: int, classes: int) -> int:
        given_to_onednn.clear()
        multiply(torch.randn(rows, 2**10), weight[:classes])
        return len(given_to_onednn)

    assert products(8, 2**11) == 1
    assert products(8, 2**9) == products(1, 2**11) == 0
    assert products(32, 2**11) == is_slow  # MKL is the faster one for many rows on Intel


@torch.no_grad()
def test_autocast_decides_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert multiply(torch.randn(3, 8), torch.randn(5, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("vendor", "family", "slow", "slow_to_add"),
    [
        ("GenuineIntel", 6, False, False),
        ("AuthenticAMD", 23, True, True),
        ("AuthenticAMD", 25, True, False),
        ("AuthenticAMD", 26, True, True),
    ],
)
def test_the_processor_decides(vendor, family, slow, slow_to_add, monkeypatch):
    text = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 1\n"
    monkeypatch.setattr(mos_matmul.Path, "exists", lambda self: True)
    monkeypatch.setattr(mos_matmul.Path, "read_text", lambda self, **options: text)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    chosen = mos_matmul._mkl_is_slow.__wrapped__
    assert (bool(chosen()), bool(chosen(adds=True))) == (slow, slow_to_add)
