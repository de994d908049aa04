"""Every metric of the proxy by name: what exporter, alerts, dashboard and docs/operations.md go by.

kube-proxy's names (k/pkg/proxy/metrics/metrics.go) where the meaning is the same, ``nfqproxy_`` else. One sync
serves both IP families, so that kube-proxy's label ``ip_family`` stands only where something is counted by
family. The client library adds ``process_`` and ``python_`` metrics of the supervisor.
"""

from enum import StrEnum

from msgspec import Struct

__all__ = ["METRICS", "Kind", "Metric"]


class Kind(StrEnum):
    """Types of the Prometheus text format."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(Struct, frozen=True):
    """One metric family."""

    name: str
    """As exported; of a histogram without _bucket, _sum, _count."""
    kind: Kind
    help: str
    """One sentence, with the unit where the name has none."""
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its time series."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))
        return (self.name,)


_SYNC = "kubeproxy_sync_proxy_rules"
_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_QUEUE = ("queue",)

METRICS: tuple[Metric, ...] = (
    # kube-proxy's.
    Metric(
        f"{_SYNC}_duration_seconds", _H, "Time that workers and kernel took to follow a change."
    ),
    Metric(
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        _H,
        "The same of changes that put everything anew: at the start, after a failure, on SIGHUP.",
    ),
    Metric(
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        _H,
        "The same of changes that were sent as differences.",
    ),
    Metric(f"{_SYNC}_last_timestamp_seconds", _G, "When the last change was followed."),
    Metric(f"{_SYNC}_last_queued_timestamp_seconds", _G, "When the last change came."),
    Metric(
        "kubeproxy_network_programming_duration_seconds",
        _H,
        "From an EndpointSlice's last-change-trigger-time until workers and kernel follow it.",
    ),
    Metric(f"{_SYNC}_endpoint_changes_pending", _G, "EndpointSlice changes not yet followed."),
    Metric(f"{_SYNC}_endpoint_changes_total", _C, "EndpointSlice changes that came."),
    Metric(f"{_SYNC}_service_changes_pending", _G, "Service changes not yet followed."),
    Metric(f"{_SYNC}_service_changes_total", _C, "Service changes that came."),
    Metric(
        f"{_SYNC}_no_local_endpoints_total",
        _G,
        "Service ports with a Local policy that have endpoints, but none on this node.",
        ("traffic_policy",),
    ),
    Metric("kubeproxy_proxy_healthz_total", _C, "Answers of /healthz by HTTP status.", ("code",)),
    Metric("kubeproxy_proxy_livez_total", _C, "Answers of /livez by HTTP status.", ("code",)),
    Metric(
        "kubeproxy_conntrack_reconciler_sync_duration_seconds",
        _H,
        "Time that a sweep of the connection tracking table took.",
        ("ip_family",),
    ),
    Metric(
        "kubeproxy_conntrack_reconciler_deleted_entries_total",
        _C,
        "Stale connection tracking entries that sweeps deleted.",
        ("ip_family",),
    ),
    # Ours: what runs.
    Metric(
        "nfqproxy_build_info",
        _G,
        "1; the labels tell version and settings.",
        ("version", "mode", "data_path"),
    ),
    Metric("nfqproxy_revision", _G, "Number of the newest change that workers and kernel follow."),
    Metric("nfqproxy_services", _G, "Services that are served or refused."),
    Metric("nfqproxy_frontends", _G, "Addresses and ports of Services."),
    Metric("nfqproxy_affinity_records", _G, "Clients whose backend is kept by ClientIP affinity."),
    # Workers and their queues.
    Metric("nfqproxy_worker_up", _G, "1 while the queue has a worker that decides.", _QUEUE),
    Metric("nfqproxy_worker_restarts_total", _C, "Times that a worker was replaced.", _QUEUE),
    Metric("nfqproxy_worker_packets_total", _C, "First packets that workers read.", _QUEUE),
    Metric("nfqproxy_worker_batches_total", _C, "Batches in which they were read.", _QUEUE),
    Metric("nfqproxy_worker_connections_total", _C, "Connections that workers translated.", _QUEUE),
    Metric("nfqproxy_worker_cpu_seconds_total", _C, "Processor time of workers.", _QUEUE),
    Metric(
        "nfqproxy_worker_events_total",
        _C,
        "What was out of the ordinary, by the names that nfqproxy status shows.",
        ("queue", "event"),
    ),
    Metric("nfqproxy_queue_waiting", _G, "Packets that wait for a verdict.", _QUEUE),
    Metric(
        "nfqproxy_queue_dropped_total",
        _C,
        "Packets that the kernel dropped because the queue or the socket was full.",
        ("queue", "reason"),
    ),
    # The kernel's side.
    Metric(
        "nfqproxy_queued_packets_total",
        _C,
        "Packets that the queue rules matched; without a reader they passed to the fallback.",
        ("ip_family", "protocol"),
    ),
    Metric(
        "nfqproxy_refused_packets_total",
        _C,
        "Packets that the refusal rules answered or dropped, by the counter's name.",
        ("ip_family", "counter"),
    ),
    Metric("nfqproxy_conntrack_entries", _G, "Entries in the connection tracking table."),
    Metric("nfqproxy_conntrack_max", _G, "Entries that the table can hold."),
    # What went wrong.
    Metric("nfqproxy_sync_failures_total", _C, "Changes that the kernel did not take at once."),
    Metric("nfqproxy_reconciler_failures_total", _C, "Sweeps that failed."),
    Metric("nfqproxy_source_up", _G, "1 while Services can be read from their source."),
    Metric(
        "nfqproxy_health_check_ports_failed",
        _G,
        "Health-check node ports that cannot be opened.",
    ),
    Metric(
        "nfqproxy_backends_without_mark",
        _G,
        "Data path mark: backends that the bits of markMask have no number for.",
    ),
)
"""All of them, each name once."""
