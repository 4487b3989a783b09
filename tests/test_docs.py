"""Documentation is a test: every command in it composes, every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from running import ROOT

from launcher.compose import compose_run, expand_sweep

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m launcher((?:\.\w+)?)([^\n#`]*)")


def commands() -> list[tuple[str, str, str]]:
    found = [(page.name, *match.groups()) for page in PAGES for match in COMMAND.finditer(page.read_text())]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "module", "arguments"), commands())
def test_a_command_composes(page: str, module: str, arguments: str) -> None:
    if module:
        assert importlib.util.find_spec(f"launcher{module}") is not None
        return
    words = [word for word in shlex.split(arguments) if "=" in word]
    for point in expand_sweep(words):
        compose_run(point)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
