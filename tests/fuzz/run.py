"""`make fuzz`: ten thousand inputs, evenly spread over what a command reads; none may end badly.

    python -m tests.fuzz.run [--inputs 10000] [--category plans] [--first 0] [--table FILE]

Prints how the cases of each category ended, and every fault with a case that shows it. Exit 1 when
there is any.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.categories import CATEGORIES
from tests.fuzz.judge import Ended, ended, limit_memory
from tests.fuzz.workspace import made

# A run that somebody stops has said how far it came.
COUNTED = 250


def main() -> None:
    """Run the cases and print what they show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--category", choices=sorted(CATEGORIES), action="append")
    asked = parser.parse_args()
    names = asked.category or list(CATEGORIES)
    limit_memory()
    shown: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="mist-fuzz-") as folder:
        workspace = made(Path(folder))
        for name in names:
            numbers = range(asked.first, asked.first + -(-asked.inputs // len(names)))
            results: list[Ended] = []
            for number in numbers:
                result = ended(name, number, workspace)
                results.append(result)
                if len(results) % COUNTED == 0:
                    _count(name, results)
                for fault in set(result.faults) - shown:
                    shown.add(fault)
                    _show(result, fault)
            if len(results) % COUNTED:
                _count(name, results)
    sys.exit(bool(shown))


def _show(result: Ended, fault: str) -> None:
    words = json.dumps([word[:80] for word in result.argv])
    print(f"FAULT {fault}\n   {result.name}: {words}\n   {result.err[-300:]!r}", flush=True)


def _count(name: str, results: list[Ended]) -> None:
    codes = Counter(str(each.code)[:20] for each in results)
    words = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items()))
    faulty = sum(bool(each.faults) for each in results)
    slowest = max(results, key=lambda each: each.seconds)
    print(
        f"{name}: {len(results)} inputs, {faulty} faulty; exit codes {words}; slowest "
        f"{slowest.seconds:.1f} s ({slowest.name})",
        flush=True,
    )


if __name__ == "__main__":
    main()
