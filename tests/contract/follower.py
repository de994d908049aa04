"""A client that follows the rules: the state of one resource by list and watch, come what may."""

import asyncio
from collections import Counter

import aiohttp
import msgspec

from tests.contract.api import Object

PAUSE_S = 0.01


class Follower:
    """Lists, watches from there, and lists anew when it must. ``state`` is by namespace and name."""

    def __init__(self, url: str, path: str) -> None:
        self.state: dict[tuple[str, str], Object] = {}
        self.position = ""
        self.met: Counter[str] = Counter()
        """What came in the way."""
        self._url, self._path = url, path

    async def run(self) -> None:
        """Until cancelled."""
        async with aiohttp.ClientSession(self._url, read_bufsize=1 << 20) as session:
            while True:
                try:
                    if not self.position:
                        await self._list(session)
                    await self._watch(session)
                    self.met["end"] += 1
                except (aiohttp.ClientError, ConnectionError, msgspec.DecodeError) as error:
                    self.met[type(error).__name__] += 1
                await asyncio.sleep(PAUSE_S)

    async def _list(self, session: aiohttp.ClientSession) -> None:
        found: dict[tuple[str, str], Object] = {}
        query = {"limit": "7"}
        while True:
            async with session.get(self._path, params=query) as response:
                body = await response.json()
                if response.status == 410:
                    self.met["410 of a list"] += 1
                    return await self._list(session)
                response.raise_for_status()
            for item in body["items"]:
                found[item["metadata"]["namespace"], item["metadata"]["name"]] = item
            token = body["metadata"].get("continue")
            if not token:
                break
            query = {"limit": "7", "continue": token}
        self.state, self.position = found, body["metadata"]["resourceVersion"]
        return None

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        query = {
            "watch": "1",
            "resourceVersion": self.position,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": "30",
        }
        async with session.get(self._path, params=query) as response:
            if response.status == 410:
                self.position = ""
            response.raise_for_status()
            async for line in response.content:
                event = msgspec.json.decode(line)
                value = event["object"]
                if event["type"] == "ERROR":
                    self.met[f"error {value['code']}"] += 1
                    self.position = ""
                    return
                metadata = value["metadata"]
                self.position = metadata["resourceVersion"]
                if event["type"] == "BOOKMARK":
                    continue
                del value["kind"], value["apiVersion"]
                key = (metadata["namespace"], metadata["name"])
                if event["type"] == "DELETED":
                    self.state.pop(key, None)
                else:
                    self.state[key] = value
