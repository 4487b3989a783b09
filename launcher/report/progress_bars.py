"""Progress bars on a terminal, drawn by the watching process from what the ranks write; silent anywhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from rich.console import Console

    from launcher.run_dir.progress import Progress as RankProgress


class Bars:
    """One bar: the stage of the first rank that has begun, and how far it is in it."""

    def __init__(self, title: str, console: Console) -> None:
        columns = (
            TextColumn("[bold]{task.fields[title]}[/]"),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("start", total=None, title=title, tokens="")

    def __enter__(self) -> Bars:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, ranks: Sequence[RankProgress | None]) -> None:
        """Draw the present state."""
        begun = next((rank for rank in ranks if rank is not None), None)
        if begun is not None:
            tokens = f"{begun.tokens:,} tokens" if begun.tokens else ""
            self._bar.update(
                self._task, description=begun.stage, completed=begun.done, total=begun.total or None, tokens=tokens
            )
