"""What a server counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The metrics of one server. `observe` is told what happens; gauges are read when they are asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = dict(registry=self.registry)
        self.waiting = Gauge("perfusion_queue_pictures", "Pictures that wait for a worker.", **own)
        self.drawing = Gauge("perfusion_drawing_pictures", "Pictures that workers have.", **own)
        self.rows = Histogram("perfusion_batch_rows", "Pictures in one step.", buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64), **own)
        self.fill = Histogram("perfusion_batch_fill", "Their share of what one step may have.", buckets=(0.125, 0.25, 0.5, 0.75, 1), **own)
        self.step = Histogram("perfusion_step_seconds", "One step.", ["model"], buckets=SECONDS, **own)
        self.begun = Histogram("perfusion_first_step_seconds", "From a request to its first step.", buckets=SECONDS, **own)
        self.drawn = Histogram("perfusion_picture_seconds", "From a request to its picture.", buckets=SECONDS, **own)
        self.failed = Counter("perfusion_failed_pictures", "Pictures that could not be drawn.", **own)
        self.cancelled = Counter("perfusion_cancelled_pictures", "Pictures that nobody waited for any more.", **own)
        self.refused = Counter("perfusion_refused_requests", "Requests that were refused.", ["reason"], **own)
        self.restarts = Counter("perfusion_worker_restarts", "Workers that ended and were replaced.", **own)
        self.concepts = Counter("perfusion_concept_lookups", "Concepts of prompts: loaded already, or to be loaded.", ["result"], **own)
        self.requests = Counter("perfusion_http_requests", "Requests.", ["route", "status"], **own)
        self.jobs = Counter("perfusion_training_jobs", "Training jobs that ended.", ["status"], **own)
        self._seen: dict[tuple[int, str], tuple[int, int]] = {}

    def observe(self, event: str, value: Any) -> None:
        """An event of `Pool`: begun, drawn and failed with seconds, refused with a reason, cancelled, restarted, step with its report."""
        if event == "step":
            worker, report = value
            self.rows.observe(report.rows)
            self.fill.observe(report.rows / report.capacity)
            self.step.labels(report.model).observe(report.seconds)
            before = self._seen.get((worker, report.model), (0, 0))
            now = report.hits, report.misses
            before = before if before <= now else (0, 0)  # another process has its place
            for result, old, new in zip(("hit", "miss"), before, now):
                self.concepts.labels(result).inc(max(0, new - old))
            self._seen[worker, report.model] = now
        elif event in ("begun", "drawn"):
            getattr(self, event).observe(value)
        elif event == "refused":
            self.refused.labels(value).inc()
        else:
            {"failed": self.failed, "cancelled": self.cancelled, "restarted": self.restarts}[event].inc()

    def text(self, waiting: int, drawing: int) -> bytes:
        self.waiting.set(waiting)
        self.drawing.set(drawing)
        return generate_latest(self.registry)
