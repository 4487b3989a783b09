"""`python -m launcher.doctor.importing MODULE[:PART] ...`: import each, and print the results on stdout as JSON lines.

Runs in its own process, since an import may raise, crash in native code or hang. Output of the modules goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from shards.untrusted_files import JsonObject


def attempt(name: str, part: str = "") -> JsonObject:
    """Import module `name`; returns its version, `missing`, or a one-line error.

    `part` is an attribute to access, for a module that imports its parts on first use.
    """
    try:
        if importlib.util.find_spec(name) is None:
            return {"module": name, "missing": True}
        module = importlib.import_module(name)
        if part:
            getattr(module, part)
    except BaseException as error:  # also SystemExit, which a module may raise at import
        words = [type(error).__name__, *str(error).strip().splitlines()[:1]]
        return {"module": name, "error": ": ".join(words)}
    version = getattr(module, "__version__", None)
    if version is None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
    cuda = getattr(vars(module).get("version"), "cuda", None)  # set by torch, except in CPU builds
    return {"module": name, "version": version and str(version), "cuda": cuda}


def main() -> None:
    """Import the modules on the command line in order, until one fails."""
    out: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for package in sys.argv[1:]:
        name, _, part = package.partition(":")
        print(json.dumps({"importing": name}), file=out, flush=True)
        result = attempt(name, part)
        print(json.dumps(result), file=out, flush=True)
        if "version" not in result:
            break
    out.flush()
    os._exit(0)  # engines leave threads and exit handlers behind


if __name__ == "__main__":
    main()
