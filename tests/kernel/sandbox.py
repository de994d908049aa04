"""What a container or a systemd unit leaves a program of root's power: capabilities and writable paths.

Read from the texts in deploy/, so that what is tested is what is deployed. Set up by util-linux in a mount
namespace of the program's own; the network namespace is the caller's.
"""

import configparser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
DAEMON_SET = DEPLOY / "kubernetes/base/daemonset.yaml"
CLEANUP = DEPLOY / "kubernetes/overlays/cleanup/daemonset.yaml"
UNIT = DEPLOY / "systemd/nfqproxy.service"

# $1: writable directories, $2: writable files, both separated by blanks; then the command. Everything but /dev
# is read-only, /proc/sys included; of the host's /run nothing is left.
_WALLS = """
set -e
directories=$1 files=$2
shift 2
while read -r _ at _; do
  case $at in /dev|/dev/*) ;; *) mount -o remount,bind,ro "$at" ;; esac
done < /proc/self/mounts
mount -t tmpfs none /run
for path in $directories; do mkdir -p "$path"; mount -t tmpfs none "$path"; done
for path in $files; do touch "$path"; mount --bind "$path" "$path"; done
mount -o remount,bind,ro /run
exec "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """What is left to a program that runs as user id 0."""

    capabilities: tuple[str, ...]
    """Names without CAP_, in capitals."""
    directories: tuple[str, ...] = ()
    """Below /run; writable."""
    files: tuple[str, ...] = ()
    """Below /run; there, and writable."""

    @classmethod
    def of_container(cls, manifest: Path, group: str = "containers") -> Self:
        """Of the first container of a DaemonSet, which must be as narrow as this class can make it."""
        spec = yaml.safe_load(manifest.read_text())["spec"]["template"]["spec"]
        container = spec[group][0]
        rights: dict[str, Any] = container["securityContext"]
        assert rights["runAsUser"] == 0
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["privileged"] is False
        assert rights["capabilities"]["drop"] == ["ALL"]
        kinds = {each["name"]: each.get("hostPath", {}).get("type", "") for each in spec["volumes"]}
        writable = [each for each in container["volumeMounts"] if not each.get("readOnly")]
        paths = {
            kind: tuple(each["mountPath"] for each in writable if kinds[each["name"]] == kind)
            for kind in ("DirectoryOrCreate", "FileOrCreate")
        }
        assert sum(map(len, paths.values())) == len(writable)
        return cls(
            capabilities=tuple(rights["capabilities"]["add"]),
            directories=paths["DirectoryOrCreate"],
            files=paths["FileOrCreate"],
        )

    @classmethod
    def of_unit(cls, unit: Path = UNIT) -> Self:
        """Of a unit, in the same way."""
        parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes="#")
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read_string(unit.read_text())
        service = parser["Service"]
        assert service["ProtectSystem"] == "strict"
        assert service["NoNewPrivileges"] == "yes"
        assert service["ProtectKernelTunables"] == "yes"
        assert not {"User", "AmbientCapabilities", "ReadWritePaths"} & set(service)
        return cls(
            capabilities=tuple(
                word.removeprefix("CAP_") for word in service["CapabilityBoundingSet"].split()
            ),
            directories=(f"/run/{service['RuntimeDirectory']}",),
            # There, by ExecStartPre; whether it is writable makes no difference to a lock.
            files=(service["ExecStartPre"].removeprefix("+/usr/bin/touch "),),
        )

    @property
    def command(self) -> Sequence[str]:
        """What to put before a command."""
        held = ",".join(["-all", *(f"+{name.lower()}" for name in self.capabilities)])
        return [
            *("unshare", "--mount", "sh", "-c", _WALLS, "sh"),
            *(" ".join(self.directories), " ".join(self.files)),
            *("setpriv", "--no-new-privs", f"--bounding-set={held}", f"--inh-caps={held}"),
        ]

    def without_capability(self, name: str) -> Self:
        """With one capability less."""
        return replace(self, capabilities=tuple(c for c in self.capabilities if c != name))

    def without_paths(self) -> Self:
        """With nothing writable."""
        return replace(self, directories=(), files=())
