"""Time many cases in slices: each run does some that are not in the folder yet, into one more file.

    python benchmarks/slices.py FOLDER --cases all --seconds 50     until it says done
    python benchmarks/table.py FOLDER/*.json

For machines that are quiet for minutes only. Other arguments are pytest's: -k option --rounds 7
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from cases import select

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where the files are, and one more is written")
    parser.add_argument("--cases", action="append", help="as pytest's; default: smoke")
    parser.add_argument("--seconds", default="inf", help="no case is begun later; default: inf")
    options, more = parser.parse_known_args()

    options.folder.mkdir(exist_ok=True)
    wanted = [case.name for case in select(options.cases or ["smoke"])]
    left = [name for name in wanted if name not in cases_in(options.folder)]
    if left:
        command = [sys.executable, "-m", "pytest", str(HERE), "--seconds", options.seconds]
        command += [word for name in left for word in ("--cases", name)]
        target = options.folder / f"{len(list(options.folder.glob('*.json'))):03}"
        command += ["--benchmark-json", str(target), *(more or ["-k", "implementation"])]
        subprocess.run(command, check=False)  # what fails is not in the file
        if not target.stat().st_size:
            return 1
        target.rename(target.with_suffix(".json"))
        left = [name for name in left if name not in cases_in(options.folder)]
    print(
        f"{len(wanted) - len(left)} of {len(wanted)} cases: {'to be continued' if left else 'done'}"
    )
    return 0


def cases_in(folder: Path) -> set[str]:
    files = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {one["extra_info"]["case"] for file in files for one in file["benchmarks"]}


if __name__ == "__main__":
    sys.exit(main())
