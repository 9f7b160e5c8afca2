"""The comparison of matrix products: what it measures, and that wrong products get no row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from tools.bench import products
from tools.bench.products import Product, measured, products_of

SMALL = Product(name="small", rows=4, width_in=8, width_out=6)


def test_products_are_those_of_the_model() -> None:
    sizes = [(product.rows, product.width_in, product.width_out) for product in products_of("160m", 2048)]
    assert sizes == [(2048, 768, 2304), (2048, 768, 768), (2048, 768, 3072), (2048, 3072, 768), (512, 768, 50304)]
    assert SMALL.flops == 2 * 4 * 8 * 6


def test_both_directions_have_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(products, "products_of", lambda size, length: [SMALL])
    assert products.main(["--rounds", "2", "--threads", "1", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["direction"] for row in rows] == ["result", "gradient of the input"]
    assert all(row["torch_gflops"] > 0 and row["ours_gflops"] > 0 and row["ratio"]["median"] > 0 for row in rows)
    assert "small: gradient of the input  4 x 8 x 6" in capsys.readouterr().out


def test_wrong_product_has_no_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t() + 0.01

    monkeypatch.setattr(products, "linear", wrong)
    with pytest.raises(ValueError, match="small, result: the two results differ"):
        measured(SMALL, rounds=1)
    monkeypatch.setattr(products, "products_of", lambda size, length: [SMALL])
    assert products.main(["--rounds", "1", "--threads", "1"]) == 2
    assert "more than rounding" in capsys.readouterr().err
