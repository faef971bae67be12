"""What the default build makes its users trust: lines of Rust that the compiler reads, of this crate
and of each dependency, and how often they say `unsafe` outside comments. Reads the lists of sources
that cargo leaves beside a release build."""

import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = re.compile(r"\S*/registry/src/[^/]+/([^/]+)/\S+\.rs\b")


def default_crates():
    """Names with versions, but for macros, which run at build time and are no part of the binary."""
    tree = ["cargo", "tree", "-e", "normal", "--prefix", "none", "--format", "{p}"]
    for line in subprocess.check_output(tree, cwd=ROOT, text=True).splitlines():
        if "/" not in line and "(proc-macro)" not in line:
            yield line.split(" (")[0].replace(" v", "-")


def main():
    sources = {crate: set() for crate in default_crates()}
    for listing in (ROOT / "target/release/deps").glob("*.d"):
        for match in SOURCE.finditer(listing.read_text()):
            if match[1] in sources:
                sources[match[1]].add(pathlib.Path(match[0]))
    rows = []
    for crate, files in sources.items():
        lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
        code = (line for line in lines if not line.lstrip().startswith("//"))
        rows.append((len(lines), sum(len(re.findall(r"\bunsafe\b", line)) for line in code), crate))
    for lines, unsafe, crate in sorted(rows, reverse=True):
        print(f"{lines:8,} lines {unsafe:6,} unsafe  {crate}")
    print(f"{sum(row[0] for row in rows):8,} lines {sum(row[1] for row in rows):6,} unsafe"
          f"  in {len(rows)} crates")


main()
