"""The affinity records of all workers, kept over restarts of any process of the proxy.

Workers tell what they recorded; the store passes it on to the others and appends it to a file on /run,
one per network namespace. A new worker gets everything, a new supervisor reads the file. The file is
rewritten when most of it is stale. Times are of CLOCK_BOOTTIME: /run does not outlive a boot.
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from nfqproxy.core.affinity import AffinityRecord, Identity, ServiceKey

log = logging.getLogger(__name__)

_LENGTH_BYTES = 2
_MAX_AGE_S = 86400.0
"""The longest time-out the Service API allows."""
_COMPACT_FACTOR = 4
_COMPACT_AT_LEAST = 10000

_decoder = msgspec.msgpack.Decoder(AffinityRecord)
_encoder = msgspec.msgpack.Encoder()


class AffinityStore:
    """See the module. Disk trouble is logged once and costs only the memory over restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[tuple[ServiceKey, bytes], AffinityRecord] = {}
        self._appended = 0
        self._file: int | None = None
        self._has_failed = False

    def open(self, now_s: float) -> None:
        """Read what an earlier process left. Without records there is no file."""
        self._load(now_s)
        if self._records:
            self._rewrite(now_s)

    def __len__(self) -> int:
        return len(self._records)

    def records(self) -> tuple[AffinityRecord, ...]:
        """All records, for a worker that starts."""
        return tuple(self._records.values())

    def add(self, records: Iterable[AffinityRecord], now_s: float) -> None:
        """Take records of a worker, durable (for process deaths) when this returns.

        One that another worker's has overtaken on the way is left out, as by the workers.
        """
        frames = []
        for record in records:
            known = self._records.get((record.service, record.client))
            if known is None or _age(known) < _age(record):
                self._records[record.service, record.client] = record
                frames.append(_frame(record))
        self._appended += len(frames)
        is_stale = self._appended > _COMPACT_AT_LEAST + _COMPACT_FACTOR * len(self._records)
        if is_stale or (self._file is None and not self._has_failed):
            self._rewrite(now_s)
        elif self._file is not None:
            self._write(b"".join(frames))

    def close(self) -> None:
        """Close the file; it stays for the next start."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        try:
            os.write(self._file, data)
        except OSError as error:
            self._give_up(error)

    def _load(self, now_s: float) -> None:
        try:
            data = self._path.read_bytes()
        except OSError:
            return
        offset = 0
        while offset + _LENGTH_BYTES <= len(data):
            start = offset + _LENGTH_BYTES
            offset = start + int.from_bytes(data[offset:start])
            try:
                record = _decoder.decode(data[start:offset])
            except msgspec.MsgspecError:
                # A process died in the middle of a write: what follows cannot be trusted.
                log.warning("%s is cut off; %d records were read", self._path, len(self._records))
                return
            if 0 <= now_s - record.last_s < _MAX_AGE_S:
                self._records[record.service, record.client] = record

    def _rewrite(self, now_s: float) -> None:
        """Write the living records to a new file and put it in place of the old one."""
        self.close()
        self._records = {
            key: record
            for key, record in self._records.items()
            if now_s - record.last_s < _MAX_AGE_S
        }
        fresh = self._path.with_suffix(".next")
        try:
            self._path.parent.mkdir(mode=0o755, exist_ok=True)
            fresh.write_bytes(b"".join(map(_frame, self._records.values())))
            fresh.replace(self._path)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            self._give_up(error)
        self._appended = 0

    def _give_up(self, error: OSError) -> None:
        log.warning("%s: %s; affinity will not outlive a restart", self._path, error)
        self._has_failed = True
        self.close()


def _age(record: AffinityRecord) -> tuple[float, Identity]:
    """What says which of two records of a client counts, as in ``Affinity.put``."""
    return record.last_s, (record.address, record.port)


def _frame(record: AffinityRecord) -> bytes:
    body = _encoder.encode(record)
    return len(body).to_bytes(_LENGTH_BYTES) + body
