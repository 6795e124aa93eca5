"""Writes the table of docs/layouts.md from a real run of tests/proofs/test_layouts.py.

python tools/layout_table.py    # runs every layout, some minutes on two cores
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/proofs/test_layouts.py"
PAGE = ROOT / "docs" / "layouts.md"
BEGIN, END = "<!-- table: tools/layout_table.py -->\n", "<!-- end of table -->\n"

Rows = dict[str, dict[str, float]]
"""The largest differences of each layout, under the key '{model}: log-probs' or '{model}: gradients'."""


def run_layouts() -> Rows:
    """Runs the tests and reads what each layout recorded.

    Raises:
        SystemExit: a layout failed; pytest's report is on the terminal.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", TESTS, "-o", "junit_family=xunit1", f"--junitxml={report}"]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit("a layout failed; the table is as it was")
        cases = ElementTree.parse(report).getroot().iter("testcase")
        rows: Rows = {}
        for case in cases:
            name = case.attrib["name"]
            if "[" in name:
                found = {p.attrib["name"]: float(p.attrib["value"]) for p in case.iter("property")}
                rows[name[name.index("[") + 1 : -1]] = found
        return rows


def table(rows: Rows) -> str:
    models = list(dict.fromkeys(key.split(":")[0] for found in rows.values() for key in found))
    head = ["Layout", *(f"{model}: {what}" for model in models for what in ("log-probs", "gradients"))]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *(f"{found[column]:.0e}" for column in head[1:])] for name, found in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def layouts_of(page: str) -> list[str]:
    """Lists the layouts in the first column of the page's table."""
    body = page[page.index(BEGIN) + len(BEGIN) : page.index(END)]
    return [line.split("|")[1].strip() for line in body.splitlines()[2:]]


def main() -> None:
    rows, page = run_layouts(), PAGE.read_text()
    print(table(rows))
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(before + table(rows) + after)


if __name__ == "__main__":
    main()
