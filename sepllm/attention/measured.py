"""What `auto` prefers, by measurement: the table of `python -m tools.bench.cores`, whose results are in benchmarks/results/.

A device without a row has not been measured. There `auto` keeps to torch's own kernels, and says so (`is_measured`); measuring it and
adding its row is one command. A `core:` in the configuration always decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sepllm.attention.spec import AttentionSpec

FEW_QUERIES = 32
"""Up to this many queries (decoding) there is too little work to divide into chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """The cores for some calls, the fastest first; one that cannot compute a call is passed over."""

    cores: tuple[str, ...]
    max_queries: int | None = None
    """Only up to this many queries."""
    is_causal: bool | None = None
    """Only where every earlier key is read, or only where not."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """Only in these."""

    def holds(self, spec: AttentionSpec) -> bool:
        return (
            (self.max_queries is None or spec.num_queries <= self.max_queries)
            and self.is_causal in (None, spec.is_causal)
            and (self.dtypes is None or spec.dtype in self.dtypes)
        )


MEASURED = {
    "cpu": (
        # One token over a whole cache is hardly any work: copying the keys first, as native does, costs. In bf16 torch's way costs more.
        Preference(max_queries=1, is_causal=True, dtypes=(torch.float32, torch.float64), cores=("sdpa", "native", "dense")),
        Preference(max_queries=FEW_QUERIES, cores=("native", "sdpa", "dense")),
        Preference(cores=("native", "sdpa", "chunked", "dense")),
    ),
}
"""By type of device. The first row that holds decides."""

UNMEASURED = (Preference(max_queries=FEW_QUERIES, cores=("sdpa", "dense")), Preference(cores=("sdpa", "chunked", "dense")))


def preferred(spec: AttentionSpec) -> tuple[str, ...]:
    """Names of cores for such a call, the best first. The last is `dense`, which computes all that any core can."""
    return next(row.cores for row in MEASURED.get(spec.device_type, UNMEASURED) if row.holds(spec))


def is_measured(device_type: str) -> bool:
    """Whether anybody has measured the cores on such a device."""
    return device_type in MEASURED
