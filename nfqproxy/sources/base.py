"""What the program asks of any source of objects."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol

from nfqproxy.control.objects import ObjectChange, Objects


class Source(Protocol):
    """Objects now and after every change: :meth:`start`, iterate over :meth:`changes`, :meth:`close`."""

    @property
    def last_error(self) -> str | None:
        """What is wrong with the source now; None: nothing."""

    async def start(self) -> Objects:
        """All objects; raises InputError for what its user must mend."""

    async def reload(self) -> ObjectChange:
        """Look at everything again; what differs, as far as it is known at once."""

    def changes(self, stop: asyncio.Event) -> AsyncGenerator[ObjectChange, None]:
        """Every change since :meth:`start`, until ``stop`` is set."""

    def warn(self, namespace: str, service: str, reason: str, message: str) -> None:
        """Tell the owner of a Service what is wrong with it, where the source has a way to.

        ``reason`` is a word in CamelCase, ``message`` a sentence. The log has it already.
        """

    async def close(self) -> None:
        """Give back what it holds; nothing is asked of it afterwards."""
