"""What is known of a lab outside the process that made it: /run/nfqproxy-lab/NAME/state.json.

The folder is made first and removed last. Making it is the lock on the name; whatever happens to the
process in between, ``lab down`` finds what there is to remove.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from nfqproxy.errors import HostError, InputError, KernelError, NfqproxyError
from nfqproxy.kernel.affinity_file import remove_stored, store_path
from nfqproxy.kernel.netns import Namespace, remove_namespaces
from nfqproxy.kernel.processes import ProcessRef, stop_processes, uninterrupted
from nfqproxy.lab.topology import Topology, TopologySpec
from nfqproxy.model import DataPath

__all__ = [
    "FIRST_UDP_PORT",
    "LabState",
    "claim",
    "load",
    "names",
    "remove",
    "remove_affinities",
    "save",
]

FOLDER = Path("/run/nfqproxy-lab")
FIRST_UDP_PORT = 5_000
"""The first source port of the load's UDP flows."""


class LabState(Struct, frozen=True, kw_only=True):
    """One lab."""

    name: str
    prefix: str
    """Of its namespaces."""
    clients: int
    pods: int
    """Of the first node, where the proxy runs."""
    weights: tuple[int, ...]
    workers: int
    reader: str
    owner: ProcessRef | None
    """The process that builds it or runs its traffic; None once it stands by itself."""
    processes: tuple[ProcessRef, ...] = ()
    """Servers and the proxy, each the leader of its session."""
    next_port: int = FIRST_UDP_PORT
    """First UDP source port that no run has used yet."""
    far_pods: int = 0
    """Of a second node without a proxy; 0: there is none."""
    data_path: DataPath = DataPath.CTNETLINK
    """How decisions of the proxy's workers reach the kernel."""

    @property
    def folder(self) -> Path:
        """Its private directory: manifests, server files, logs."""
        return FOLDER / self.name

    @property
    def has_owner(self) -> bool:
        """Whether a living process is at work on it."""
        return self.owner is not None and self.owner.is_alive()

    def topology(self) -> Topology:
        """Its network, to be used without being built."""
        pods = (self.pods, self.far_pods) if self.far_pods else (self.pods,)
        return Topology(TopologySpec(clients=self.clients, pods=pods), self.prefix)


def claim(state: LabState) -> None:
    """Take the name and write the state down; NfqproxyError when the name is taken."""
    plain = state.name.replace("-", "")
    if not (plain.isascii() and plain.isalnum() and len(state.name) <= 40):
        raise InputError(f'--name "{state.name}": use up to 40 letters, digits and hyphens')
    try:
        FOLDER.mkdir(exist_ok=True)
        state.folder.mkdir()
        # Servers in it run as the user nobody, whatever root's umask is.
        FOLDER.chmod(0o755)
        state.folder.chmod(0o755)
    except FileExistsError:
        raise NfqproxyError(
            f"a lab named {state.name} stands already: send traffic with"
            f" `nfqproxy lab run --name {state.name}`, remove it with"
            f" `nfqproxy lab down --name {state.name}`, or choose another --name"
        ) from None
    except OSError as error:
        raise HostError(f"cannot make {state.folder}: {error.strerror}") from error
    save(state)


def save(state: LabState) -> None:
    """Write the state, whole or not at all."""
    fresh = state.folder / "state.json.new"
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    fresh.replace(state.folder / "state.json")


def load(name: str) -> LabState | None:
    """The lab of this name; None when there is none."""
    try:
        data = (FOLDER / name / "state.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return msgspec.json.decode(data, type=LabState)
    except msgspec.DecodeError as error:
        raise NfqproxyError(
            f"{FOLDER / name}/state.json does not say what to remove ({error});"
            " remove the namespaces of `ip netns` that begin with nfqp- by hand"
        ) from error


def names() -> list[str]:
    """The labs there are, in alphabetical order."""
    if not FOLDER.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(FOLDER) if entry.is_dir())


def remove_affinities(node: Namespace) -> None:
    """Remove the records that the proxy, which has ended, kept of clients of a node about to go."""
    if node.path.exists():
        # A namespace that was being made when an interrupt came cannot be entered, and has none.
        with suppress(KernelError, OSError):
            node.call(lambda: remove_stored(store_path()))


def remove(name: str) -> bool:
    """End a lab's processes, remove its namespaces and files; False when there is none. Idempotent.

    Other processes in its namespaces (somebody's shell) are left alone; the kernel keeps an unnamed
    namespace until the last of them ends.
    """
    with uninterrupted():
        state = load(name)
        if state is not None:
            stop_processes(state.processes)
            topology = state.topology()
            remove_affinities(topology.node.namespace)
            remove_namespaces([member.name for member in topology.group])
        elif name not in names():
            return False
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        try:
            FOLDER.rmdir()
        except OSError:
            pass  # other labs
    return True
