"""What a run ran on: versions, this program's own code, and the machine. Looked up, not imported."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hethub

__all__ = ["code_digest", "environment"]

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


@cache
def code_digest() -> str:
    """SHA-256 (hex) of this program's source files: processes that work together have the same."""
    root = Path(hethub.__file__).parent
    found = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        content = file.read_bytes()
        found.update(f"{file.relative_to(root)} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()
