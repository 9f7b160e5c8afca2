"""From what a step did to what people and dashboards see of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron.config.schema import Config
from megatron.training.flops import runtime_metrics
from megatron.training.logging import Console, Interval, console_line
from megatron.training.metrics import MetricLogger
from megatron.training.progress import Progress
from megatron.training.ratios import RatioReport, Ratios
from megatron.training.step import StepReport


class Reporter:
    """Collects the steps of an interval; writes metrics every step and a console line every `log_interval`."""

    def __init__(self, config: Config, *, train_iters: int, metrics: MetricLogger, console: Console) -> None:
        self.metrics = metrics
        self.console = console
        self._config = config
        self._train_iters = train_iters
        self._steps: list[tuple[StepReport, float]] = []
        attention = config.attention
        self._ratios = RatioReport(every=attention.print_ratio_intervals, say=console.say) if attention.print_kv_ratio else None

    def step(self, report: StepReport, progress: Progress, *, lr: float, elapsed_s: float, extra: Mapping[str, float]) -> None:
        """One step is done. ``lr``: the rate of the next. ``extra``: further metrics."""
        runtime = self._runtime(steps=1, elapsed_s=elapsed_s, ratios=report.ratios)
        metrics = {"train/lm_loss": report.loss, "train/learning_rate": lr}
        if report.grad_norm is not None:
            metrics["train/grad_norm"] = report.grad_norm
        if report.loss_scale is not None:
            metrics["train/loss_scale"] = report.loss_scale
        self.metrics.write(progress.iteration, metrics | runtime | dict(extra))
        self.console.step(loss=report.loss, tokens_per_s=runtime["runtime/tokens_per_sec"])
        self._steps.append((report, elapsed_s))
        if self._ratios is not None:
            self._ratios.note(report.ratios, passes=len(report.micro_losses), what="step")
        if progress.iteration % self._config.logging.log_interval == 0:
            self._end_interval(progress, lr=lr)

    def evaluation(self, label: str, progress: Progress, metrics: Mapping[str, float]) -> None:
        """An evaluation is done; ``metrics`` under their dashboard names."""
        self.metrics.write(progress.iteration, metrics)
        figures = " | ".join(f"{name.split('/')[1]}: {value:.6E}" for name, value in metrics.items())
        self.console.say(f" {label} at iteration {progress.iteration} | {figures} |")

    def close(self) -> None:
        """Flushes the metrics and leaves the bar."""
        self.metrics.close()
        self.console.close()

    def _end_interval(self, progress: Progress, *, lr: float) -> None:
        elapsed_s = sum(elapsed for _, elapsed in self._steps)
        count = len(self._steps)
        losses = [report.loss for report, _ in self._steps if math.isfinite(report.loss) and not report.is_skipped]
        last = self._steps[-1][0]
        runtime = self._runtime(steps=count, elapsed_s=elapsed_s, ratios=last.ratios)
        interval = Interval(
            iteration=progress.iteration,
            train_iters=self._train_iters,
            steps=count,
            elapsed_s=elapsed_s,
            samples=count * self._config.batch.train_batch_size,
            learning_rate=lr,
            flops_per_s=runtime["runtime/flops_per_sec_per_gpu"],
            loss=sum(losses) / len(losses) if losses else math.nan,
            model_utilization=runtime.get("runtime/model_flops_utilization"),
            hardware_utilization=runtime.get("runtime/hardware_flops_utilization"),
            loss_scale=last.loss_scale,
            skipped=sum(report.is_skipped for report, _ in self._steps),
            nan=sum(not math.isfinite(report.loss) for report, _ in self._steps),
        )
        self.console.say(console_line(interval))
        self._steps = []

    def _runtime(self, *, steps: int, elapsed_s: float, ratios: Ratios) -> dict[str, float]:
        metrics = runtime_metrics(
            self._config.model,
            samples=steps * self._config.batch.train_batch_size,
            elapsed_s=elapsed_s,
            world_size=self._config.runtime.world_size,
            recomputes=self._config.training.checkpoint_activations and self._config.training.recompute_granularity == "full",
            kept_ratio=ratios.attention_map,
            peak_tflops=self._config.logging.peak_theoretical_tflops,
        )
        return metrics | {"runtime/kv_ratio": ratios.kv}
