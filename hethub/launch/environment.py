"""What a run ran on: versions and the machine. Looked up, not imported."""

from __future__ import annotations

import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version

__all__ = ["environment"]

_PACKAGES = ("torch", "ray", "numpy", "numba", "safetensors", "tokenizers")


def environment() -> dict[str, str]:
    """Name -> version or fact of the driver's machine; packages that are not installed are left out."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": str(os.cpu_count()),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
