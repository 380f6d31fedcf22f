"""The metrics of a node of a cluster."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from wsserver.cluster.cluster import Cluster


class Figures(Collector):
    """Reads the figures when Prometheus asks for them.

    Args:
        cluster: the node.
    """

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Yield all metrics."""
        cluster, bus = self._cluster, self._cluster.peers.bus
        nodes = len(cluster.membership.others) + cluster.membership.alive
        for name, text, value in (
            ("nodes", "Nodes that renew their leases, as this node knows.", nodes),
            ("conversations", "Conversations that this node leases.", len(cluster.leases)),
            ("mirrors", "Replies of other nodes that this node follows.", len(cluster.mirrors)),
            (
                "readers",
                "Replies of this node that other nodes follow.",
                len(cluster.readers),
            ),
            ("bus_delay_seconds", "Time of the last message to Redis and back.", bus.counts.delay),
        ):
            yield GaugeMetricFamily(f"wsserver_cluster_{name}", text, value)
        for name, text, value in (
            ("forwarded", "Prompts that this node has sent to other nodes.", cluster.forwarded),
            ("messages_sent", "Messages that Redis has accepted.", bus.counts.sent),
            ("messages_lost", "Messages that Redis did not get.", bus.counts.lost),
            ("messages_received", "Messages of other nodes.", bus.counts.received),
            ("resets", "Times that the subscription was lost.", bus.counts.resets),
            ("fenced", "Times that the others have buried this node.", cluster.fenced),
        ):
            yield CounterMetricFamily(f"wsserver_cluster_{name}", text, value)
