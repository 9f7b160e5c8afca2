"""What context parallelism sends for one attention layer, and how long that takes: SepLLM's exchange against all-gather and ring.

    python -m tools.bench.context_parallel --seq-lengths 2048 8192 --pieces 2 --save

Counted, for several numbers of pieces: the bytes that the busiest process sends, from the plan of the exchange itself and from the formulas
of the other two, and the pairs that each piece computes. Measured, with one process a piece over gloo, all ways in turn: the communication
alone and with the attention, forward and backward. A round takes as long as its slowest process. Ring is communication alone.

    all-gather    (P - 1) T keys and values forward, as many gradients backward
    ring          the same forward; backward keys, values and both gradients go round, the gradients one step further
    exchange      the far keys and the windows that others read, and their gradients
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from torch import Tensor

from megatron.parallel.context import KeyExchange
from sepllm.attention import attend
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import AttentionPattern
from sepllm.pieces import PieceRanges, zigzag_columns
from tools.bench import report
from tools.bench.machine import describe
from tools.bench.measure import Ratio, clock_s, interleave
from tools.bench.problem import INITIAL_TOKENS
from tools.bench.text import add_text_flags, chosen_stream
from tools.command import exit_status

WAYS = ("exchange", "all-gather", "ring")
COUNTED_PIECES = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of one layer."""

    heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def key_bytes(self) -> int:
        """Of one key and its value."""
        return 2 * self.heads * self.head_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Of one layer and one row, forward and backward together; bytes are those of the process that sends most."""

    seq_length: int
    pieces: int
    sent_bytes: Mapping[str, int]
    work_ratio: float
    """Pairs of the busiest piece over the mean."""
    plain_work_ratio: float
    """The same, were pieces cut in the order of the text."""

    @classmethod
    def of(cls, ranges: KeyRanges, pieces: int, key_bytes: int) -> Counted:
        length = ranges.num_keys
        columns, reads = zigzag_columns(length, pieces), ranges.read_keys().sum(0).double()
        sent = max(PieceRanges.of(ranges, columns, piece=piece).exchange.num_sent for piece in range(pieces))
        round_trip = (pieces - 1) * (length // pieces) * key_bytes
        zigzag, plain = reads[columns].sum(1), reads.view(pieces, -1).sum(1)
        return cls(
            seq_length=length,
            pieces=pieces,
            sent_bytes={"exchange": 2 * sent * key_bytes, "all-gather": 2 * round_trip, "ring": 3 * round_trip + length // pieces * key_bytes},
            work_ratio=float(zigzag.max() / zigzag.mean()),
            plain_work_ratio=float(plain.max() / plain.mean()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What every process measures."""

    rows: tuple[Tensor, ...]
    """``[1, S]`` of each length."""
    pattern: AttentionPattern
    shape: Shape
    pieces: int
    rounds: int
    threads: int
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of one length: seconds of each round, forward and backward, of the slowest process."""

    seq_length: int
    communication_s: Mapping[str, Sequence[float]]
    layer_s: Mapping[str, Sequence[float]]
    """With the attention; ``alone``: the whole row on one process."""
    attention_s: Sequence[float]
    """Of each process: the median of its attention by itself."""

    @classmethod
    def of(cls, seq_length: int, by_rank: Sequence[Mapping[str, Sequence[float]]]) -> Times:
        def slowest(kind: str) -> dict[str, list[float]]:
            names = [name for name in by_rank[0] if name.startswith(f"{kind} ")]
            return {name.removeprefix(f"{kind} "): np.max([seconds[name] for seconds in by_rank], axis=0).tolist() for name in names}

        return cls(
            seq_length=seq_length,
            communication_s=slowest("communication"),
            layer_s=slowest("layer"),
            attention_s=[float(np.median(seconds["attention"])) for seconds in by_rank],
        )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    return exit_status(lambda: report.deliver(run(arguments), arguments, "context-parallel", arguments.dtype))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.context_parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--count-lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072], metavar="S", help="(default: %(default)s)")
    flags.add_argument("--seq-lengths", type=int, nargs="+", default=[2048, 8192], metavar="S", help="that are measured (default: %(default)s)")
    flags.add_argument("--pieces", type=int, default=2, help="processes that are measured (default: %(default)s)")
    flags.add_argument("--heads", type=int, default=12, help="(default: %(default)s)")
    flags.add_argument("--head-size", type=int, default=64, help="(default: %(default)s)")
    flags.add_argument("--window", type=int, default=64, help="n, the nearest keys that a query reads (default: %(default)s)")
    flags.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    flags.add_argument("--rounds", type=int, default=11, help="(default: %(default)s)")
    flags.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    add_text_flags(flags)
    return report.parsed(flags, argv)


def run(arguments: argparse.Namespace) -> report.Result:
    machine, stream = describe(torch.device("cpu")), chosen_stream(arguments)
    rows = {length: stream.rows(1, length, target=arguments.density_target) for length in {*arguments.seq_lengths, *arguments.count_lengths}}
    pattern = AttentionPattern(initial_tokens=INITIAL_TOKENS, separator_ids=frozenset(stream.separator_ids), windows=(arguments.window,))
    shape = Shape(heads=arguments.heads, head_size=arguments.head_size, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype])
    layouts = {length: TokenLayout.from_ids(ids, pattern) for length, ids in rows.items()}
    counted = [Counted.of(layouts[length].ranges(0), pieces, shape.key_bytes) for length in arguments.count_lengths for pieces in COUNTED_PIECES]
    task = Task(
        rows=tuple(rows[length] for length in arguments.seq_lengths),
        pattern=pattern,
        shape=shape,
        pieces=arguments.pieces,
        rounds=arguments.rounds,
        threads=arguments.threads,
        port=_free_port(),
    )
    measured = measured_on(task)
    tables = [counted_table(counted, shape), measured_table(measured, arguments.pieces)]
    print("", *(f"{table.text()}\n" for table in tables), sep="\n")
    density = {length: float(layout.is_separator.double().mean()) for length, layout in sorted(layouts.items())}
    return report.Result(
        header={**machine.as_dict(), "command": arguments.command, "text": stream.name, "density": density},
        body={"counted": [asdict(row) for row in counted], "measured": [asdict(row) for row in measured]},
        tables=tables,
        notes=[f"{arguments.pieces} processes with {arguments.threads} threads each on {machine.cores} cores, over gloo and the loopback device."],
        title=f"Context parallelism of one layer in {arguments.dtype}: {machine.title()}",
        picture=None,
    )


def counted_table(rows: Sequence[Counted], shape: Shape) -> report.Table:
    cells = [
        (
            str(row.seq_length),
            str(row.pieces),
            *(f"{row.sent_bytes[way] / 1e6:.2f}" for way in WAYS),
            *(f"{row.sent_bytes[way] / row.sent_bytes['exchange']:.1f}x" for way in WAYS[1:]),
            f"{row.work_ratio:.2f}",
            f"{row.plain_work_ratio:.2f}",
        )
        for row in rows
    ]
    return report.Table(
        title=f"MB that the busiest process sends for a layer, forward and backward ({shape.heads} heads of {shape.head_size}), and pairs of the "
        "busiest piece over the mean",
        columns=("S", "pieces", *(f"{way} MB" for way in WAYS), *(f"{way} / exchange" for way in WAYS[1:]), "work max/mean", "in text order"),
        rows=cells,
    )


def measured_table(rows: Sequence[Times], pieces: int) -> report.Table:
    cells = [
        (
            str(row.seq_length),
            way,
            f"{1e3 * np.median(row.communication_s[way]):.1f}" if way in row.communication_s else "",
            _against(row.communication_s, way),
            f"{1e3 * np.median(row.layer_s[way]):.1f}" if way in row.layer_s else "",
            _against(row.layer_s, way),
            f"{max(row.attention_s) / np.mean(row.attention_s):.2f}" if way == "exchange" else "",
        )
        for row in rows
        for way in (*WAYS, "alone")
    ]
    return report.Table(
        title=f"Milliseconds forward and backward on {pieces} processes, medians, and how many times the exchange's (10 % and 90 % of the rounds)",
        columns=("S", "way", "communication", "/ exchange", "with attention", "/ exchange", "rank time max/mean"),
        rows=cells,
    )


def _against(seconds: Mapping[str, Sequence[float]], way: str) -> str:
    if way not in seconds or way == "exchange":
        return ""
    ratio = Ratio.of(seconds[way], seconds["exchange"])
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def measured_on(task: Task) -> list[Times]:
    """The times of every length, by processes of their own."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(task.pieces)]
    workers = [context.Process(target=measure, args=(theirs, task, rank), daemon=True) for rank, (_, theirs) in enumerate(pipes)]
    for worker in workers:
        worker.start()
    for _, theirs in pipes:
        theirs.close()
    by_rank = [mine.recv() for mine, _ in pipes]
    for worker in workers:
        worker.join()
    return [Times.of(ids.shape[1], [seconds[place] for seconds in by_rank]) for place, ids in enumerate(task.rows)]


def measure(connection: Connection, task: Task, rank: int) -> None:
    """Sends, for every length, the seconds of each round by what was timed."""
    torch.set_num_threads(task.threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(task.port))
    distributed.init_process_group("gloo", rank=rank, world_size=task.pieces)
    connection.send([_Layer.of(ids, task, rank).times(task.rounds) for ids in task.rows])
    distributed.barrier()
    distributed.destroy_process_group()


Fetch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One attention layer of one process."""

    q: Tensor
    k: Tensor
    v: Tensor
    ranges: Mapping[str, KeyRanges]
    """By way, over the keys that it fetches."""
    fetch: Mapping[str, Fetch]
    whole: tuple[Tensor, Tensor, Tensor, KeyRanges]

    @classmethod
    def of(cls, ids: Tensor, task: Task, rank: int) -> _Layer:
        whole, columns = TokenLayout.from_ids(ids, task.pattern).ranges(0), zigzag_columns(ids.shape[1], task.pieces)
        torch.manual_seed(0)
        shape = (1, ids.shape[1], task.shape.heads, task.shape.head_size)
        q, k, v = (torch.randn(shape, dtype=task.shape.dtype) for _ in range(3))
        own_q, own_k, own_v = (x[:, columns[rank]].clone().requires_grad_() for x in (q, k, v))
        own = PieceRanges.of(whole, columns, piece=rank)
        group = distributed.group.WORLD
        assert group is not None
        places = columns.flatten().argsort()
        return cls(
            q=own_q,
            k=own_k,
            v=own_v,
            ranges={"exchange": own.ranges, "all-gather": whole.at(columns[rank])},
            fetch={
                "exchange": KeyExchange(plan=own.exchange, group=group.group_name),
                "all-gather": lambda k, v: _AllGather.apply(torch.stack([k, v]), places).unbind(0),
                "ring": lambda k, v: _Ring.apply(torch.stack([k, v])).unbind(0),
            },
            whole=(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), whole),
        )

    def times(self, rounds: int) -> dict[str, list[float]]:
        contenders: dict[str, Callable[[], float]] = {}
        for way, fetch in self.fetch.items():
            contenders[f"communication {way}"] = lambda fetch=fetch: _timed(lambda: fetch(self.k, self.v), (self.k, self.v))  # type: ignore[misc]
        for way, ranges in self.ranges.items():
            contenders[f"layer {way}"] = lambda fetch=self.fetch[way], ranges=ranges: self._layer(fetch, ranges)  # type: ignore[misc]
        contenders["layer alone"] = lambda: self._alone() if distributed.get_rank() == 0 else 0.0
        read_k, read_v = (x.detach().requires_grad_() for x in self.fetch["exchange"](self.k, self.v))
        contenders["attention"] = lambda: self._by_itself(read_k, read_v)
        for run in contenders.values():
            run()
        return interleave(contenders, rounds=rounds)

    def _layer(self, fetch: Fetch, ranges: KeyRanges) -> float:
        return _timed(lambda: (_attention(self.q, *fetch(self.k, self.v), ranges),), (self.q, self.k, self.v))

    def _alone(self) -> float:
        q, k, v, ranges = self.whole
        return _timed(lambda: (_attention(q, k, v, ranges),), (q, k, v), is_together=False)

    def _by_itself(self, k: Tensor, v: Tensor) -> float:
        """One process after the other, so that none waits for a core."""
        elapsed_s = 0.0
        for rank in range(distributed.get_world_size()):
            if distributed.get_rank() == rank:
                elapsed_s = _timed(lambda: (_attention(self.q, k, v, self.ranges["exchange"]),), (self.q, k, v), is_together=False)
            distributed.barrier()
        return elapsed_s


def _attention(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Tensor:
    return attend(q, k, v, ranges, scale=1 / math.sqrt(q.shape[-1]))


def _timed(compute: Callable[[], tuple[Tensor, ...]], leaves: tuple[Tensor, ...], *, is_together: bool = True) -> float:
    """Seconds of ``compute`` and its backward, begun by all processes at the same time."""
    if is_together:
        distributed.barrier()
    start = clock_s(torch.device("cpu"))
    out = compute()
    torch.autograd.grad(out, leaves, out)
    return clock_s(torch.device("cpu")) - start


class _AllGather(torch.autograd.Function):
    """``[2, B, T, K, H]`` of every process, in the order of the text. The backward sums in fp32 what comes from each."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        size = distributed.get_world_size()
        everyone = own.new_empty(size, *own.shape)
        distributed.all_gather(list(everyone), own)
        return everyone.movedim(0, 2).flatten(2, 3)[:, :, places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = distributed.get_world_size()
        by_piece = torch.empty_like(grad)
        by_piece[:, :, ctx.places] = grad
        sent = by_piece.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent)
        return received.sum(0, dtype=torch.float32).to(grad.dtype), None


class _Ring(torch.autograd.Function):
    """What ring attention passes on, without the attention between; it hands back the own keys and values."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.save_for_backward(own)
        _pass_on(own, times=distributed.get_world_size() - 1)
        return own.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (own,) = ctx.saved_tensors
        _pass_on(torch.stack([own, grad]), times=distributed.get_world_size() - 1)
        _pass_on(grad, times=1)
        return grad


def _pass_on(x: Tensor, *, times: int) -> None:
    """To the next process and from the one before, so many times."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    x = x.contiguous()
    for _ in range(times):
        received = torch.empty_like(x)
        sending = distributed.isend(x, (rank + 1) % size)
        distributed.recv(received, (rank - 1) % size)
        assert sending is not None
        sending.wait()
        x = received


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
