"""The metrics and their names; no other module knows Prometheus.

- `cerberus_requests_total{route, status}`: HTTP requests answered; an unknown path is `other`.
- `cerberus_requests_in_flight`: predictions being answered.
- `cerberus_stage_seconds{stage}`: a request's `wait` for a round trip, a batch's `features` (Redis
  and evaluation), `model` and `claim`.
- `cerberus_predictions_total{prediction, degraded}`: decisions by their first reason of doubt,
  empty if there is none; the share of the others is the degraded share.
- `cerberus_records_total{outcome}`: records of the log, by outcome.
- `cerberus_partition_lag{partition}`: records from an owned partition's position to its end.
- `cerberus_decisions_waiting{store}`: decisions on requests that a store has not acknowledged.
- `cerberus_decisions_dropped_total{store}`: decisions that its full buffer did not take, or whose
  data it refused.
- `cerberus_labels_total{outcome}`: labels from requests and the topic, by outcome.
- `cerberus_task_up{task}`: 1 while the task runs.
- `cerberus_task_restarts_total{task}`: restarts since the process began.

`process_*` and `python_gc_*` are exposed too. Each process counts for itself: scrape each.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import prometheus_client
from prometheus_client import core, registry

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counts of other parts, read at each scrape.

    Attributes:
        in_flight: Predictions being answered.
        records: By outcome.
        lag: By partition.
        decisions: By store, how many wait and how many were dropped.
        labels: By outcome.
        up: By task, whether it runs.
        restarts: By task.
    """

    in_flight: int = 0
    records: Mapping[str, int] = field(default_factory=dict)
    lag: Mapping[int, int] = field(default_factory=dict)
    decisions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    up: Mapping[str, bool] = field(default_factory=dict)
    restarts: Mapping[str, int] = field(default_factory=dict)


class Metrics:
    """The counters of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.snapshot: Callable[[], Snapshot] = Snapshot
        self._registry = prometheus_client.CollectorRegistry()
        self._requests = prometheus_client.Counter(
            "cerberus_requests",
            "HTTP requests answered",
            ("route", "status"),
            registry=self._registry,
        )
        self._predictions = prometheus_client.Counter(
            "cerberus_predictions",
            "Decisions on requests, by the first reason of doubt",
            ("prediction", "degraded"),
            registry=self._registry,
        )
        stages = prometheus_client.Histogram(
            "cerberus_stage_seconds",
            "Stages of a prediction",
            ("stage",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._wait, self._features, self._model, self._claim = map(
            stages.labels, ("wait", "features", "model", "claim")
        )
        self._registry.register(_Parts(self))
        prometheus_client.ProcessCollector(registry=self._registry)
        prometheus_client.GCCollector(registry=self._registry)

    def request(self, route: str, status: int) -> None:
        """Count an answered request."""
        self._requests.labels(route, status).inc()

    def prediction(self, prediction: str, degraded: Sequence[str]) -> None:
        """Count a decision."""
        self._predictions.labels(prediction, degraded[0] if degraded else "").inc()

    def batch(
        self, waits_s: Sequence[float], features_s: float, model_s: float, claim_s: float
    ) -> None:
        """Record the stages of one batch."""
        for wait_s in waits_s:
            self._wait.observe(wait_s)
        self._features.observe(features_s)
        self._model.observe(model_s)
        self._claim.observe(claim_s)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)


class _Parts(registry.Collector):
    """Reads the parts' own counts when scraped, so that they need not know of metrics."""

    def __init__(self, meter: Metrics) -> None:
        self._meter = meter

    def collect(self) -> Iterable[core.Metric]:
        now = self._meter.snapshot()
        yield core.GaugeMetricFamily(
            "cerberus_requests_in_flight", "Predictions being answered", value=now.in_flight
        )
        records = core.CounterMetricFamily(
            "cerberus_records", "Records of the log by outcome", labels=("outcome",)
        )
        for outcome, count in now.records.items():
            records.add_metric((outcome,), count)
        lag = core.GaugeMetricFamily(
            "cerberus_partition_lag", "Records to the end of the log", labels=("partition",)
        )
        for partition, behind in now.lag.items():
            lag.add_metric((str(partition),), behind)
        waiting = core.GaugeMetricFamily(
            "cerberus_decisions_waiting", "Decisions not stored yet", labels=("store",)
        )
        dropped = core.CounterMetricFamily(
            "cerberus_decisions_dropped",
            "Decisions that did not fit in the buffer or were refused",
            labels=("store",),
        )
        for store, (held, lost) in now.decisions.items():
            waiting.add_metric((store,), held)
            dropped.add_metric((store,), lost)
        told = core.CounterMetricFamily("cerberus_labels", "Labels by outcome", labels=("outcome",))
        for outcome, count in now.labels.items():
            told.add_metric((outcome,), count)
        up = core.GaugeMetricFamily("cerberus_task_up", "1 while the task runs", labels=("task",))
        for task, running in now.up.items():
            up.add_metric((task,), running)
        restarts = core.CounterMetricFamily(
            "cerberus_task_restarts", "Restarts of the task", labels=("task",)
        )
        for task, count in now.restarts.items():
            restarts.add_metric((task,), count)
        yield from (records, lag, waiting, dropped, told, up, restarts)
