"""The project's errors, one small tree, grouped by who must act.

::

    NfqproxyError                  exit 1
    ├── InputError                 exit 2  whoever wrote the manifest, config or flag
    │   └── ManifestError                  names file, object and field
    ├── HostError                  exit 3  whoever runs the machine: root, tools, kernel abilities
    └── KernelError                exit 1  a kernel call failed: operation and errno
        └── CodecError                     bytes from the kernel or the network do not parse

Ordinary outcomes (no ready backend, unknown frontend) are values, never errors. Every message is one
clear sentence that ends with what to do next.
"""

import errno as _errno
import os as _os

__all__ = ["CodecError", "HostError", "InputError", "KernelError", "ManifestError", "NfqproxyError"]


class NfqproxyError(Exception):
    """Base of all; ``exit_code`` is what the command line returns for it (DESIGN section 5)."""

    exit_code = 1


class InputError(NfqproxyError):
    """A flag, a config file or a manifest is wrong; nothing was changed."""

    exit_code = 2


class ManifestError(InputError):
    """A manifest is wrong; carries where."""

    def __init__(self, problem: str, *, file: str, object_name: str = "", field: str = "") -> None:
        self.problem = problem
        self.file = file
        self.object_name = object_name
        self.field = field
        where = ": ".join(part for part in (file, object_name, field) if part)
        super().__init__(f"{where}: {problem}")


class HostError(NfqproxyError):
    """The host lacks something (root, a tool, a kernel ability)."""

    exit_code = 3


class KernelError(NfqproxyError):
    """A kernel operation failed; carries the operation and the errno."""

    def __init__(self, operation: str, errno: int, hint: str = "") -> None:
        self.operation = operation
        self.errno = errno
        name = _errno.errorcode.get(errno, str(errno))
        text = f"{operation}: {_os.strerror(errno)} ({name})"
        super().__init__(f"{text}; {hint}" if hint else text)


class CodecError(NfqproxyError):
    """Bytes do not parse as what they should be: truncated, bad length, wrong type."""
