"""The end of ``make gpu-test``: one table of what passed, failed and was not run, and a file of the same. Needs nothing."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_VERDICTS = {True: "passed", False: "failed", None: "not run"}


def count(results: Sequence[Sequence[Any]]) -> dict[str, int]:
    """Verdict -> checks."""
    return {word: sum(result[3] is verdict for result in results) for verdict, word in _VERDICTS.items()}


def table(results: Sequence[Sequence[Any]]) -> Iterator[str]:
    """A line for every kind of check with its counts, and below it what failed or was not run, with the reason."""
    names = list(dict.fromkeys(str(result[0]) for result in results))
    width = max(map(len, [*names, "check"]), default=0)
    yield f"{'check':<{width}}  passed  failed  not run"
    for name in names:
        own = [result for result in results if result[0] == name]
        counts = count(own)
        yield f"{name:<{width}}  {counts['passed']:>6}  {counts['failed']:>6}  {counts['not run']:>7}"
        for _, what, measure, ok in own:
            if not ok:
                yield f"{'':<{width}}    {_VERDICTS[ok]}: {what}: {measure}"


def evidence(machine: str, results: Sequence[Sequence[Any]], date: str) -> str:
    """A line for the table of evidence in tests/README.md. What failed or was not run is no evidence."""
    names = dict.fromkeys(str(result[0]) for result in results if result[3])
    counts = count(results)
    failed = f"; {counts['failed']} checks failed" if counts["failed"] else ""
    return (
        f"| `make gpu-test`: {', '.join(names) or 'nothing'}: {counts['passed']} checks{failed} | device | {machine} | {date} |"
    )


def write(file: Path, machine: str, results: Sequence[Sequence[Any]], seconds: float) -> None:
    """The same as JSON: {machine, date, seconds, counts, evidence, checks [{check, what, measure, verdict}]}."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    keys = ("check", "what", "measure", "verdict")
    checks = [dict(zip(keys, (*result[:3], _VERDICTS[result[3]]), strict=True)) for result in results]
    content = {"machine": machine, "date": date, "seconds": round(seconds), "counts": count(results)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**content, "evidence": evidence(machine, results, date), "checks": checks}, indent=1) + "\n")
