"""The products with matrices of a training step by `sepllm.ops.linear` and by torch's own `linear`, in turn.

    python -m tools.bench.products --model 160m --seq-length 2048 --threads 2 --save

For each matrix of the model the product and the gradient of its input, in float32 on a CPU: the measurement behind `linear`'s choice of a
library. Where it chooses torch's own, both columns are the same and the ratios are 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from megatron.model.mlp import linear1_rows
from sepllm.ops.linear import linear
from sepllm.ops.linear_cross_entropy import CHUNK
from tools.bench import report
from tools.bench.arms import config_of
from tools.bench.machine import describe
from tools.bench.measure import Ratio, clock_s, interleave
from tools.command import exit_status

Direction = Literal["result", "gradient of the input"]
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """``[rows, width_in] @ [width_out, width_in].T`` and its gradient ``[rows, width_out] @ [width_out, width_in]``."""

    name: str
    rows: int
    width_in: int
    width_out: int

    @property
    def flops(self) -> int:
        """Of each direction: a multiplication and an addition are two."""
        return 2 * self.rows * self.width_in * self.width_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    product: Product
    direction: Direction
    torch_gflops: float
    ours_gflops: float
    """Medians, 1e9 operations a second."""
    ratio: Ratio
    """Torch's time over ours, round by round."""
    spread: Ratio
    """Torch's over torch's."""


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.products", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="160m", help="a size of configs/size/ (default: %(default)s)")
    flags.add_argument("--seq-length", type=int, default=2048, metavar="S", help="rows of a product (default: %(default)s)")
    flags.add_argument("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    flags.add_argument("--rounds", type=int, default=25, help="(default: %(default)s)")
    return report.parsed(flags, argv)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    machine = describe(CPU)
    rows = [row for product in products_of(arguments.model, arguments.seq_length) for row in measured(product, rounds=arguments.rounds)]
    table = table_of(rows)
    print(table.text())
    result = report.Result(
        header={**machine.as_dict(), "command": arguments.command, "rounds": arguments.rounds},
        body={"rows": [asdict(row) for row in rows]},
        tables=[table],
        notes=[],
        title=f"Products of {arguments.model} in fp32: {machine.title()}",
        picture=None,
    )
    report.deliver(result, arguments, "products", arguments.model, f"s{arguments.seq_length}")


def products_of(size: str, length: int) -> list[Product]:
    """Of a layer, and of the output matrix, which takes a chunk of the tokens at a time."""
    model = config_of(size, length=length, window=64, batch=1, dtype="fp32", separator_ids=[0]).model
    assert model.padded_vocab_size is not None
    width, wide = model.hidden_size, model.intermediate_size
    product = partial(Product, rows=length)
    return [
        product(name="queries, keys, values", width_in=width, width_out=3 * width),
        product(name="attention's output", width_in=width, width_out=width),
        product(name="linear1", width_in=width, width_out=linear1_rows(model)),
        product(name="linear2", width_in=wide, width_out=width),
        Product(name="output matrix", rows=min(CHUNK, length), width_in=width, width_out=model.padded_vocab_size),
    ]


def measured(product: Product, *, rounds: int) -> list[Row]:
    """Both directions. ValueError where the results differ by more than rounding."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((product.rows, product.width_in), (product.rows, product.width_out), (product.width_out, product.width_in))
    x, gradient, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    directions: dict[Direction, tuple[Tensor, Tensor]] = {"result": (x, weight), "gradient of the input": (gradient, weight.t())}
    return [_measured(product, direction, *factors, rounds=rounds) for direction, factors in directions.items()]


@torch.no_grad()
def _measured(product: Product, direction: Direction, x: Tensor, weight: Tensor, *, rounds: int) -> Row:
    theirs, ours = functional.linear(x, weight), linear(x, weight)
    worst = ((theirs - ours).abs().max() / theirs.abs().max()).item()
    if worst > 1e-5:
        raise ValueError(f"{product.name}, {direction}: the two results differ by {worst:.1e} of the largest value: more than rounding.")
    contenders = {"torch": functional.linear, "ours": linear, "again": functional.linear}
    seconds = interleave({name: partial(_seconds, function, x, weight) for name, function in contenders.items()}, rounds=rounds)
    return Row(
        product=product,
        direction=direction,
        torch_gflops=product.flops / median(seconds["torch"]) / 1e9,
        ours_gflops=product.flops / median(seconds["ours"]) / 1e9,
        ratio=Ratio.of(seconds["torch"], seconds["ours"]),
        spread=Ratio.of(seconds["torch"], seconds["again"]),
    )


def _seconds(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    start = clock_s(CPU)
    function(x, weight)
    return clock_s(CPU) - start


def table_of(rows: Sequence[Row]) -> report.Table:
    def cells(row: Row) -> tuple[str, ...]:
        size = f"{row.product.rows} x {row.product.width_in} x {row.product.width_out}"
        ratio, spread = row.ratio, row.spread
        return (
            f"{row.product.name}: {row.direction}",
            size,
            f"{row.torch_gflops:.0f}",
            f"{row.ours_gflops:.0f}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
            f"{spread.low:.2f}-{spread.high:.2f}",
        )

    columns = ("product", "rows x in x out", "torch GFLOP/s", "ours", "ratio", "10-90 %", "torch to itself")
    title = "Products in float32: torch's linear and sepllm.ops.linear in turn; ratio is torch's time over ours."
    return report.Table(title=title, columns=columns, rows=[cells(row) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
