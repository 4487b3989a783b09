"""The table of techniques in the README matches what the engines accept."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
from running import ROOT

from launcher.config.engines import load_engine
from launcher.config.parts.formats import WeightFormat


@pytest.mark.slow
def test_the_table_of_the_readme_is_what_engines_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    techniques = importlib.import_module("techniques")
    for name in techniques.ENGINES:
        if missing := [module for module in load_engine(name).modules() if not importlib.util.find_spec(module)]:
            pytest.skip(f"{name} needs {missing}")
    assert techniques.table() in (ROOT / "README.md").read_text(), "python scripts/techniques.py"
    named = " ".join([*techniques.TECHNIQUES, *techniques.TECHNIQUES.values()])
    assert [word for word in WeightFormat.__members__ if word not in named] == ["none"]
