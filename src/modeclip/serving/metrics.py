"""What a service counts, for Prometheus: requests, seconds, batches, caches, models, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from modeclip.serving.batching import Batcher
    from modeclip.serving.service import Service

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper ends of the classes of latency."""


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.in_flight = Gauge("modeclip_requests_in_flight", "Requests under way.", registry=self.registry)
        self._requests = Counter(
            "modeclip_requests", "Requests that were answered.", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "modeclip_request_seconds", "Time of a request.", ["route"], buckets=SECONDS, registry=self.registry
        )

    def watch(self, service: Service) -> None:
        """Report of the model and its batches too, whenever somebody asks."""
        self.registry.register(_ModelCollector(service))

    def observe(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """Count a request under the route that answered it, not under its path, of which there are any number."""
        route = getattr(scope.get("route"), "path", "") or "none"
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return all of it in Prometheus's format."""
        return generate_latest(self.registry)


class _ModelCollector:
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        service = self._service
        answers = service.answers
        batchers: dict[str, Batcher[Any, Any]] = {
            "images": answers.image_batches,
            "texts": answers.text_batches,
            "router": answers.router_batches,
            "searches": service.search_batches,
        }
        for name, about, own in (
            ("batches", "Batches that were computed.", "batches"),
            ("batch_items", "Pictures, texts and searches in them.", "items"),
            ("batch_seconds", "Seconds that they took.", "seconds"),
            ("batch_refused", "Requests that found the queue full.", "refused"),
        ):
            family = CounterMetricFamily(f"modeclip_{name}", about, labels=["kind"])
            for kind, batcher in batchers.items():
                family.add_metric([kind], getattr(batcher.counts, own))
            yield family
        waiting = GaugeMetricFamily("modeclip_waiting", "Pictures, texts and searches that wait.", labels=["kind"])
        largest = GaugeMetricFamily("modeclip_largest_batch", "Items of the largest batch.", labels=["kind"])
        for kind, batcher in batchers.items():
            waiting.add_metric([kind], batcher.waiting)
            largest.add_metric([kind], batcher.counts.largest)
        yield waiting
        yield largest
        for name, cache in (("texts", answers.texts), ("classes", answers.lists)):
            yield CounterMetricFamily(f"modeclip_{name}_cache_hits", "Found in memory.", value=cache.hits)
            yield CounterMetricFamily(f"modeclip_{name}_cache_misses", "Not found in memory.", value=cache.misses)
            yield GaugeMetricFamily(f"modeclip_{name}_cache_bytes", "Bytes of it.", value=cache.num_bytes)
        yield GaugeMetricFamily("modeclip_models", "Experts in memory.", value=len(answers.model.pool))
        images = GaugeMetricFamily("modeclip_index_images", "Images of each index.", labels=["index"])
        for name, index in service.indexes.items():
            images.add_metric([name], len(index))
        yield images
        yield CounterMetricFamily(
            "modeclip_reloads", "How often model and indexes were reloaded.", value=service.now.number
        )
        yield GaugeMetricFamily(
            "modeclip_trouble", "1 if what lies on disk cannot be served.", value=bool(service.trouble)
        )
        yield GaugeMetricFamily("modeclip_uptime_seconds", "Since the start.", value=time.time() - service.began)
