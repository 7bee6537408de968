"""The table of docs/server.md of what a server survives, of what the tests wrote while they ran.

    make test-serve proof                                          # or the tests of tests/serve alone, with --junitxml
    python bench/serve_faults.py build/serve.xml build/proof.xml

A test of a fault records what it did, how often, and what it saw come of it (fixture `survived`). Rows are of tests that passed.
"""

from __future__ import annotations

import argparse
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/server.md"
BEGIN, END = "<!-- faults: bench/serve_faults.py -->\n", "<!-- end of faults -->\n"


def rows(reports: Iterable[Path]) -> dict[str, tuple[int, str, str]]:
    """fault -> how often, what came of it last, and the test, in the order of the reports."""
    found: dict[str, tuple[int, str, str]] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            told = {each.get("name"): each.get("value") for each in case.iter("property")}
            if "fault" not in told or any(case.find(kind) is not None for kind in ("failure", "error", "skipped")):
                continue
            before = found.get(told["fault"], (0,))[0]
            found[told["fault"]] = before + int(told["times"]), told["outcome"], case.get("name").partition("[")[0]
    return found


def table(found: dict[str, tuple[int, str, str]]) -> str:
    lines = ["| what was done | times | what came of it | test |", "|---|---|---|---|"]
    lines += [f"| {fault} | {times} | {outcome} | `{test}` |" for fault, (times, outcome, test) in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="of pytest --junitxml")
    text = PAGE.read_text(encoding="utf-8")
    made = BEGIN + table(rows(parser.parse_args().reports)) + END
    PAGE.write_text(re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: made, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
