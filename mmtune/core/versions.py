"""The versions that decide a number, stamped into everything that holds one."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("mmtune", "torch", "transformers", "peft", "accelerate", "tokenizers", "pillow", "numpy")


def versions() -> dict[str, str]:
    """Python's and each package's version; a package that is not installed is said to be so."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
