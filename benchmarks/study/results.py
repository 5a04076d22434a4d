"""The runs that were made, in one JSON file that is written as a whole or not at all, and the rates they lead to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.study.design import HARD, Cell, cells
from benchmarks.study.outcomes import area
from benchmarks.study.work import Record

FILE = Path(__file__).with_name("results.json")
Run = tuple[Cell, float, int]  # with its learning rate and seed


class Results:
    """Records by cell, rate and seed. ``path`` is read if it is there, and rewritten with every added record."""

    def __init__(self, path: Path = FILE) -> None:
        self.path = path
        tree: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.machine: dict[str, Any] = tree.get("machine", {})
        self._records: dict[tuple[str, float, int], Record] = {}
        for record in tree.get("runs", []):
            self._put(record)

    def add(self, record: Record) -> None:
        """Keep a record and write the file."""
        self._put(record)
        lines = ",\n".join(json.dumps(record) for record in self.all())
        text = f'{{"machine": {json.dumps(self.machine)},\n"runs": [\n{lines}\n]}}\n'
        partial = self.path.with_suffix(".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(self.path)

    def _put(self, record: Record) -> None:
        self._records[record["cell"], record["rate"], record["seed"]] = record

    def all(self) -> list[Record]:
        """Every record, sorted, so that the file does not depend on the order of the runs."""
        return [self._records[key] for key in sorted(self._records)]

    def of(self, cell: Cell, rate: float, seeds: Iterable[int]) -> list[Record]:
        """The records of a cell at a rate that are there, in the order of ``seeds``."""
        found = (self._records.get((cell.key, rate, seed)) for seed in seeds)
        return [record for record in found if record is not None]

    def tuning(self, cell: Cell) -> dict[float, list[Record]]:
        """The records of the tuning seeds by rate, for the rates that have all of them."""
        rates = sorted({rate for key, rate, _ in self._records if key == cell.key})
        found = {rate: self.of(cell, rate, cell.tuning_seeds) for rate in rates}
        return {rate: records for rate, records in found.items() if len(records) == len(cell.tuning_seeds)}

    def best_rate(self, cell: Cell) -> float | None:
        """The rate with the largest mean area under the held-out curve, once no run that decides it is missing."""
        if self.missing_tuning(cell):
            return None
        return _best(self.tuning(cell))

    def missing_tuning(self, cell: Cell) -> list[Run]:
        """The runs that the choice of a rate still lacks: those of the grid, and then one rate beyond a best end."""
        tuned = self.tuning(cell)
        rates = cell.setting.rates
        if missing := [rate for rate in rates if rate not in tuned]:
            return self._lacking(cell, missing)
        best = _best(tuned)
        beyond = best / 2 if best == min(tuned) else best * 2 if best == max(tuned) else None
        if beyond is None or not rates[0] / 2 <= beyond <= rates[-1] * 2:
            return []
        return self._lacking(cell, [beyond])

    def _lacking(self, cell: Cell, rates: Iterable[float]) -> list[Run]:
        have = self._records
        return [(cell, rate, s) for rate in rates for s in cell.tuning_seeds if (cell.key, rate, s) not in have]

    def rate_of(self, cell: Cell, by_key: dict[str, Cell]) -> float | None:
        """The rate of a cell's results, None while runs that decide it are missing; ``by_key`` are all cells."""
        if cell.rate_of is None:
            return self.best_rate(cell)
        rate = self.best_rate(by_key[f"{cell.setting.name}: {cell.rate_of}"])
        if rate is None or cell.factor_of is None:
            return rate
        weighted, seeds = by_key[f"{cell.setting.name}: {cell.factor_of}"], cell.setting.seeds
        own = self.best_rate(weighted)
        if own is None or len(runs := self.of(weighted, own, seeds)) < len(seeds):
            return None
        return float(f"{rate * fmean(fmean(run['weight']) for run in runs):.3g}")


def _best(tuned: Mapping[float, Sequence[Record]]) -> float:
    """The rate whose runs have the largest mean area; of equal ones the smallest."""
    return max(tuned, key=lambda rate: (fmean(map(area, tuned[rate])), -rate))


class Made:
    """The cells that have results, and their runs."""

    def __init__(self, results: Results) -> None:
        by_key = {cell.key: cell for cell in cells()}
        self.results = results
        self.rates: dict[str, float] = {}
        self.runs: dict[str, list[Record]] = {}
        for cell in by_key.values():
            rate = results.rate_of(cell, by_key)
            if rate is not None and len(found := results.of(cell, rate, cell.setting.seeds)) > 1:
                self.rates[cell.key], self.runs[cell.key] = rate, found

    def cells(self, family: str) -> list[Cell]:
        """The cells of a family that have results."""
        return [cell for cell in cells() if cell.family == family and cell.key in self.runs]

    def of(self, name: str) -> list[Record]:
        """The runs of a cell of the setting HARD; none if it has no results."""
        return self.runs.get(f"{HARD.name}: {name}", [])
