"""Measured figures: one JSON file, from which tables and plots are made."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .environment import environment_report

_SCHEMA = 1


class Results:
    """Cases measured by one command, with the environment they were measured in.

    Args:
        package: Distribution that was measured, such as `"mole"`.
        command: Command line that reproduces the figures.
        seed: Seed it ran with, if any.

    Source: own.
    """

    def __init__(self, package: str, *, command: str = "", seed: int | None = None) -> None:
        self.package = package
        self.command = command
        self.seed = seed
        self.environment = environment_report()
        self.cases: list[dict[str, Any]] = []

    def add(
        self,
        provider: str,
        metric: str,
        value: float,
        unit: str,
        *,
        p20: float | None = None,
        p80: float | None = None,
        n: int = 1,
        peak_mib: float | None = None,
        error: float | None = None,
        **parameters: Any,
    ) -> None:
        """Append one figure.

        Args:
            provider: Who produced it, such as `"softmax"`.
            metric: What was measured, such as `"forward"`.
            value: The figure; a median where `n` is above 1.
            unit: Its unit, such as `"ms"`; `""` for a bare number.
            p20: 20th percentile, same unit.
            p80: 80th percentile, same unit.
            n: Number of measurements behind `value`.
            peak_mib: Peak memory, in MiB.
            error: Largest error against the oracle in the same run.
            **parameters: What the case varies, such as `length=8192`.
        """
        self.cases.append(
            {
                "parameters": parameters,
                "provider": provider,
                "metric": metric,
                "unit": unit,
                "median": value,
                "p20": p20,
                "p80": p80,
                "n": n,
                "peak_mib": peak_mib,
                "error": error,
            }
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file as JSON, whole or not at all, and return its path.

        Folders that are missing are made.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": _SCHEMA,
            "package": self.package,
            "version": self.environment["packages"].get(self.package),
            "command": self.command,
            "seed": self.seed,
            "environment": self.environment,
            "cases": self.cases,
        }
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.write("\n")
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Return the results stored in a file.

        Raises:
            ValueError: The file is no results file of a known schema.
            OSError: It cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = content["schema"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"`path` must name a results file written by `Results.save`; got {str(path)!r}."
            ) from None
        if schema != _SCHEMA:
            raise ValueError(f"`path` has schema {schema!r}; this version reads schema {_SCHEMA}.")
        results = cls.__new__(cls)
        results.package = content["package"]
        results.command = content["command"]
        results.seed = content["seed"]
        results.environment = content["environment"]
        results.cases = content["cases"]
        return results

    def to_markdown(self) -> str:
        """Return a table: a row per parameters and provider, a column per metric."""
        parameters = _unique(key for case in self.cases for key in case["parameters"])
        metrics = _unique((case["metric"], case["unit"]) for case in self.cases)
        cells: dict[tuple[str, ...], dict[Any, str]] = {}
        for case in self.cases:
            row = (*(str(case["parameters"].get(key, "")) for key in parameters), case["provider"])
            cells.setdefault(row, {})[case["metric"], case["unit"]] = _format(case["median"])
        header = [
            *parameters,
            "",
            *(f"{name} ({unit})" if unit else name for name, unit in metrics),
        ]
        rows = [
            [*row, *(values.get(metric, "") for metric in metrics)] for row, values in cells.items()
        ]
        return _table(header, rows, left=len(parameters) + 1)


def _unique(items: Any) -> list[Any]:
    return list(dict.fromkeys(items))


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(header: list[str], rows: list[list[str]], left: int) -> str:
    """Lay out a Markdown table whose first `left` columns are text and the rest numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: list[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line([r or "-" for r in rule]), *map(line, rows)])
