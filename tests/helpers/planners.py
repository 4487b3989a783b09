"""The planners of all engines by name, with default options."""

from __future__ import annotations

from launcher.prepare.planning import default_planners

PLANNERS = {planner.name: planner for planner in default_planners()}
