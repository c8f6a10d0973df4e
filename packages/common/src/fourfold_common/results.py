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
    """Figures measured by one command, with the environment they were measured in.

    Args:
        package: Distribution that was measured, such as `"mole"`.
        command: Command line that reproduces the figures.
        seed: Seed it ran with, if any.
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
        value: int | float | str,
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
            value: The figure; the median where `n` is above 1.
            unit: Its unit, such as `"ms"`; `""` for a bare number.
            p20: 20th percentile, same unit.
            p80: 80th percentile, same unit.
            n: Number of measurements behind `value`.
            peak_mib: Peak memory, in MiB.
            error: Largest error against the oracle in the same run.
            **parameters: What the case varies, such as `length=8192`.
        """
        case = {"parameters": parameters, "provider": provider, "metric": metric, "unit": unit}
        figures = {"median": value, "p20": p20, "p80": p80, "n": n}
        self.cases.append(case | figures | {"peak_mib": peak_mib, "error": error})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file as JSON, whole or not at all; make missing folders; return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        version = self.environment["packages"].get(self.package)
        content = {"schema": _SCHEMA, "version": version, **vars(self)}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".results-") as folder:
            part = Path(folder, path.name)
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Return the results stored in a file; ValueError if it holds none of this schema."""
        results = cls.__new__(cls)
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["schema"] != _SCHEMA:
                raise ValueError
            for name in ("package", "command", "seed", "environment", "cases"):
                setattr(results, name, content[name])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"`path` must name a results file of schema {_SCHEMA}, as `Results.save` writes "
                f"it; got {str(path)!r}."
            ) from None
        return results

    def to_markdown(self) -> str:
        """Return a table: a row per parameters and provider, a column per metric."""
        keys = list(dict.fromkeys(key for case in self.cases for key in case["parameters"]))
        rows: dict[tuple[str, ...], dict[str, str]] = {}
        for case in self.cases:
            row = (*(str(case["parameters"].get(key, "")) for key in keys), case["provider"])
            metric = f"{case['metric']} ({case['unit']})" if case["unit"] else case["metric"]
            rows.setdefault(row, {})[metric] = _format(case["median"])
        metrics = list(dict.fromkeys(metric for values in rows.values() for metric in values))
        cells = [[*row, *(values.get(m, "") for m in metrics)] for row, values in rows.items()]
        return _table([*keys, self.package, *metrics], cells, n_text=len(keys) + 1)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(header: list[str], rows: list[list[str]], n_text: int) -> str:
    """Lay out a Markdown table: the first `n_text` columns to the left, the rest to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = "<" * n_text + ">" * (len(header) - n_text)
    rule = [
        "-" * w if s == "<" else "-" * (w - 1) + ":" for s, w in zip(sides, widths, strict=True)
    ]

    def line(row: list[str]) -> str:
        cells = (f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True))
        return f"| {' | '.join(cells)} |"

    return "\n".join(map(line, [header, rule, *rows]))
