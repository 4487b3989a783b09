"""The planners of all engines by name, with their options as they are if nobody changes them."""

from __future__ import annotations

from launcher.prepare.planning import default_planners

PLANNERS = {planner.name: planner for planner in default_planners()}
