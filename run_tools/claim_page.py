"""The page of a claim: Markdown from tables of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal


@dataclass
class Table:
    """A table of texts.

    Args:
        head: Names of the columns.
        body: Rows, as long as ``head``.
        left: Number of columns that are flush left.
    """

    head: list[str]
    body: list[list[str]] = field(default_factory=list)
    left: int = 1

    def markdown(self) -> str:
        """As a Markdown table."""
        rule = ["---" if index < self.left else "---:" for index in range(len(self.head))]
        cells = [
            [text.replace("|", "\\|") for text in row] for row in [self.head, rule, *self.body]
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)


@dataclass
class Page:
    """Parts of the page.

    Args:
        claim: Its name.
        text: Written by people; put at the top as it is.
        notes: What a reader must know before the numbers: arms not run, unequal steps.
        main: Arms and inference rows.
        paired: Differences by seed.
        extra: Tags shown once an arm.
        seeds: Arm and its seeds, as texts.
        commands: That made the runs and the page.
        seconds: Of each run that recorded its time.
        num_runs: Finished runs.
        figure: File name of the figure.
        along: What happened along the way: one row an arm.
        curves: File name of the figure of curves; empty for none.
        plots: Metrics against each other, as Markdown; empty for none.
    """

    claim: str
    text: str
    notes: list[str]
    main: Table
    paired: Table
    extra: Table
    seeds: list[tuple[str, str]]
    commands: list[str]
    seconds: list[float]
    num_runs: int
    figure: str
    along: Table = field(default_factory=lambda: Table(["arm"]))
    curves: str = ""
    plots: str = ""

    def markdown(self) -> str:
        """The page; the same parts give the same bytes."""
        pm = "\u00b1"
        text = self.text.strip("\n")
        # a text with a heading of its own gets no second one
        parts = [] if text.startswith("# ") else [f"# Claim: {self.claim}"]
        parts += [text] if text else []
        if self.notes:
            parts.append("\n".join(f"- **Note:** {note}" for note in self.notes))
        parts += ["## Results", self.main.markdown()]
        parts.append(
            f"Mean {pm} standard error over seeds; (n=...) where a cell has fewer seeds than its "
            f"row."
        )
        parts.append(f"![Means and standard errors by arm and inference]({self.figure})")
        if self.paired.body:
            parts += ["## Paired differences", self.paired.markdown()]
            parts.append(
                f"Mean {pm} standard error of the differences by seed, over the seeds that both "
                f"sides have. In brackets: seeds whose difference has the sign of the mean, of "
                f"all such seeds."
            )
        if self.curves:
            parts += ["## Along the way", self.along.markdown()]
            parts.append(f"![Curves by arm: mean, and lowest to highest seed]({self.curves})")
        parts += [self.plots] if self.plots else []
        if self.extra.body:
            parts += ["## Further measurements", self.extra.markdown()]
        parts += ["## How it was made", self._origin()]
        return "\n\n".join(parts) + "\n"

    def _origin(self) -> str:
        total = sum(self.seconds)
        timed = len(self.seconds)
        over = f"{timed} run{'s' if timed != 1 else ''}"
        if timed != self.num_runs:
            over += f"; the other {self.num_runs - timed} recorded no time"
        lines = [f"- Seeds of {arm}: {seeds}" for arm, seeds in self.seeds]
        lines.append(f"- Total run time: {total / 60:.1f} minutes (time/wall_s over {over})")
        lines.append(f"- torch where this page was made: {metadata.version('torch')}")
        commands = "\n".join(self.commands)
        return "\n".join(lines) + f"\n\n```bash\n{commands}\n```"


def print_page(title: str, page: Page, footer: Sequence[str]) -> None:
    """Print the main table, the notes and what else there is to say."""
    from rich.console import Console
    from rich.table import Table as RichTable

    # in a file or a pipe nothing is wrapped
    width = None if Console().is_terminal else 240
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    table = RichTable(title=title)
    for index, name in enumerate(page.main.head):
        side: Literal["left", "right"] = "left" if index < page.main.left else "right"
        table.add_column(name, justify=side, overflow="fold")
    for row in page.main.body:
        table.add_row(*row)
    console.print(table)
    for line in [*(f"note: {note}" for note in page.notes), *footer]:
        console.print(line, soft_wrap=True)
