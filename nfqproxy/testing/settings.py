"""What a test API server is made with."""

from msgspec import Struct

__all__ = ["Settings"]


class Settings(Struct, frozen=True, kw_only=True):
    """Choices that hold for one server's life."""

    history: int = 10_000
    """Writes that can be looked back at; older ones are compacted."""
    has_watch_list: bool = True
    """Whether a watch may ask for sendInitialEvents; otherwise it is refused with 422, as by a server whose
    feature gate WatchList is off."""
    expired_as_http: bool = False
    """Whether a watch from a compacted version is answered by HTTP status 410; otherwise by 200 and an ERROR
    event, as newer servers do."""
    bookmark_s: float = 60.0
    """Time between the bookmarks of a watch, seconds. (One more comes 2 s before a watch ends.)"""
    fresh_wait_s: float = 3.0
    """How long a read waits for a resourceVersion that has not come yet, seconds; then 504."""
    watch_timeout_s: float = 1800.0
    """Life of a watch without timeoutSeconds, seconds: up to twice as long, at random."""
    gzip_bytes: int = 128 * 1024
    """Lists from this size on are compressed for clients that accept it, bytes."""
    service_cidrs: tuple[str, ...] = ("10.96.0.0/16", "fd00:10:96::/112")
    """Where a Service without cluster IP gets one, one network per family."""
    node_ports: tuple[int, int] = (30_000, 32_767)
    """Where node ports are taken from, both ends included."""
