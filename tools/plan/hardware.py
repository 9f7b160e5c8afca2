"""The devices that can be planned for: published figures, what is assumed to be reached of them, and this machine, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

USABLE_MEMORY = 0.92
"""Of a GPU's memory: CUDA's context, NCCL's buffers and fragmentation take the rest (assumed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One kind of device and how it is connected. Rates are those of the data sheet; the `..._rate`s say what share of them is reached."""

    name: str
    peak_tflops: float
    """Of matrix products in bf16 and fp16, without sparsity; of fp32 ones on a CPU."""
    fp32_tflops: float
    """Of fp32 products as torch computes them by default (no TF32)."""
    memory_gb: float
    """10^9 bytes."""
    memory_gb_s: float
    node_gb_s: float
    """What a device sends to others of its node, one direction."""
    network_gb_s: float
    """What a device sends to other nodes, one direction."""
    devices_per_node: int = 8
    matrix_rate: float = 0.50
    """Reached of the peak in a training run's products: set so that published runs of others come out (docs/plan.md)."""
    attention_rate: float = 0.40
    """Reached of the peak in the products of attention over the pairs that are computed."""
    memory_rate: float = 0.85
    """Reached of the memory's bandwidth by operators that only move data."""
    link_rate: float = 0.80
    """Reached of the links' bandwidth by large messages."""
    latency_us: float = 5.0
    """Of one hop of a message."""
    launch_us: float = 150.0
    """Shortest time of a layer's forward pass: Python and the driver starting some 25 kernels."""
    source: str

    @property
    def usable_bytes(self) -> float:
        return self.memory_gb * 1e9 * USABLE_MEMORY

    def peak(self, precision: str) -> float:
        """Operations a second."""
        return (self.fp32_tflops if precision == "fp32" else self.peak_tflops) * 1e12


_H100 = Hardware(
    name="h100",
    peak_tflops=989.0,
    fp32_tflops=67.0,
    memory_gb=80.0,
    memory_gb_s=3350.0,
    node_gb_s=450.0,
    network_gb_s=50.0,
    source="https://www.nvidia.com/en-us/data-center/h100/ (SXM; bf16 half of the sparse figure); "
    "DGX H100/H200: 8 devices, NVLink 4 with 450 GB/s each way, one 400 Gb/s adapter a device",
)
_A100_80 = Hardware(
    name="a100-80",
    peak_tflops=312.0,
    fp32_tflops=19.5,
    memory_gb=80.0,
    memory_gb_s=2039.0,
    matrix_rate=0.65,
    node_gb_s=300.0,
    network_gb_s=25.0,
    source="https://www.nvidia.com/en-us/data-center/a100/ (SXM); "
    "DGX A100: 8 devices, NVLink 3 with 300 GB/s each way, one 200 Gb/s adapter a device",
)
_H200 = replace(_H100, name="h200", memory_gb=141.0, memory_gb_s=4800.0, source=_H100.source.replace("h100/", "h200/"))
_A100_40 = replace(_A100_80, name="a100-40", memory_gb=40.0, memory_gb_s=1555.0)
PUBLISHED = {hardware.name: hardware for hardware in (_H200, _H100, _A100_80, _A100_40)}
NAMES = (*PUBLISHED, "cpu")


def hardware_named(name: str) -> Hardware:
    """The published figures of that name, or for ``cpu`` those of this machine, measured now."""
    return measured_cpu() if name == "cpu" else PUBLISHED[name]


def measured_cpu() -> Hardware:
    """This machine with the threads that torch uses. A minute of nobody else's work makes a better figure."""
    import torch

    from tools.bench.machine import cpu_model, gemm_tflops, memory_bytes
    from tools.bench.measure import least_s

    device = torch.device("cpu")
    source = torch.ones(2**25)
    copied = torch.empty_like(source)
    copy_gb_s = 2 * source.nbytes / least_s(lambda: copied.copy_(source)) / 1e9
    peak = gemm_tflops(torch.float32, device)
    return replace(
        cpu_of(peak_tflops=peak, memory_gb=memory_bytes(device) / 1e9, memory_gb_s=copy_gb_s),
        source=f"{cpu_model()}, {torch.get_num_threads()} threads, measured {time.strftime('%Y-%m-%d')}: a 2048 x 2048 product, a copy of 128 MiB",
    )


def cpu_of(*, peak_tflops: float, memory_gb: float, memory_gb_s: float) -> Hardware:
    """A CPU whose rates were measured, so that they are reached. Processes of one machine share them and speak through its memory."""
    return Hardware(
        name="cpu",
        peak_tflops=peak_tflops,
        fp32_tflops=peak_tflops,
        memory_gb=memory_gb,
        memory_gb_s=memory_gb_s,
        node_gb_s=memory_gb_s / 8,
        network_gb_s=1.0,
        devices_per_node=1024,
        matrix_rate=1.0,
        attention_rate=1.0,
        memory_rate=1.0,
        link_rate=1.0,
        latency_us=100.0,
        launch_us=500.0,
        source="measured",
    )
