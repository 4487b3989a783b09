"""Texts in quotes, as Hydra's grammar and a shell read them back."""

from __future__ import annotations

import re
import shlex


def quoted(text: str) -> str:
    """`text` as a value of an override that stands for exactly itself: no quote, brace or `${...}` in it is read."""
    return in_quotes(re.sub(r"(\\*)\$\{", lambda match: match.group(1) * 2 + r"\${", text))  # OmegaConf's own escape


def in_quotes(text: str) -> str:
    """`text` as Hydra's grammar reads it back; `${...}` in it is still OmegaConf's."""
    text = re.sub(r"(\\*)(')", lambda match: match.group(1) * 2 + r"\'", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"


def for_shell(override: str) -> str:
    """An override as it is pasted into a shell."""
    if re.fullmatch(r"[\w@%+=:,./-]+", override, re.ASCII):
        return override
    plain = f'"{override}"'
    if set('"`$!') & set(override) or shlex.split(plain) != [override]:
        return shlex.quote(override)
    return plain
