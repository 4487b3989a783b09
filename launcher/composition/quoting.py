"""Quoting of texts for Hydra's grammar and for a shell."""

from __future__ import annotations

import re
import shlex


def quoted(text: str) -> str:
    """`text` as an override value that means exactly this text: quotes, braces and `${...}` in it are escaped."""
    return in_quotes(re.sub(r"(\\*)\$\{", lambda match: match.group(1) * 2 + r"\${", text))  # OmegaConf's own escape


def in_quotes(text: str) -> str:
    """`text` quoted for Hydra's grammar; `${...}` in it is still interpolated by OmegaConf."""
    text = re.sub(r"(\\*)(')", lambda match: match.group(1) * 2 + r"\'", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"


def for_shell(override: str) -> str:
    """An override quoted for a shell."""
    if re.fullmatch(r"[\w@%+=:,./-]+", override, re.ASCII):
        return override
    plain = f'"{override}"'
    if set('"`$!') & set(override) or shlex.split(plain) != [override]:
        return shlex.quote(override)
    return plain
