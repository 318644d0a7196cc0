"""Folders that a package manager's own client has unpacked: which package one is, of which version,
by whom and under which licence."""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from acetate.documents import parse, read_plain

MOST_TEXT = 2**24  # bytes of a package's description
EMOJI = [f"@lobehub/fluent-emoji-anim-{number}" for number in range(1, 5)]
# kind -> Debian package, and its folder below usr/share/games
DEBIAN = {
    "flare": ("flare-game", "flare"),
    "endless-sky": ("endless-sky-data", "endless-sky"),
    "wesnoth": ("wesnoth-1.16-data", "wesnoth"),
}
GPL = re.compile(r"General\s+Public\s+License\s+version\s+(\d)(?:\s+or\s+at\s+your\s+option)?")


@dataclass(frozen=True)
class Package:
    """root: the folder that paths of the package are relative to. terms: path -> licence and
    author."""

    name: str
    version: str
    root: Path
    terms: Callable[[str], tuple[str, str]]

    def said(self, path: Path) -> dict[str, str]:
        """Returns what a table says of a file's origin: licence, author and source."""
        inside = path.relative_to(self.root).as_posix()
        licence, author = self.terms(inside)
        source = f"{self.name} {self.version}: {inside}; by {author}"
        return {"licence": licence, "author": author, "source": source}


def packages_of(kind: str, source: Path) -> list[Package]:
    """Returns those of the kind that are unpacked in the folder. Raises FileNotFoundError with the
    way out if none is."""
    if kind == "emoji":
        packages, lacks = npm_packages(source, EMOJI), " or ".join(("package.json of", *EMOJI[:1]))
        way = f"npm install --prefix {source} {' '.join(EMOJI)}"
    else:
        name, data = DEBIAN[kind]
        package = debian_package(source, name, data)
        packages = [package] if package else []
        lacks = f"usr/share/doc/{name} with usr/share/games/{data}"
        way = f"apt-get download {name} && dpkg-deb -x {name}_*.deb {source}"
    if not packages:
        raise FileNotFoundError(
            f"source={source} holds no unpacked {kind} package: it lacks {lacks}. Name the folder "
            f"that it was unpacked into, or unpack it there: {way}"
        )
    return packages


def npm_packages(source: Path, names: Sequence[str]) -> list[Package]:
    """Returns those of the names that are unpacked in the folder, in their order; none is no
    error."""
    found = {}
    for path in sorted(source.rglob("package.json")):
        try:
            about = parse(read_plain(path, MOST_TEXT))
        except (OSError, ValueError):
            continue
        if isinstance(about, dict) and about.get("name") in names:
            licence, author = str(about.get("license", "unknown")), author_of(about.get("author"))
            found[about["name"]] = Package(
                about["name"],
                str(about.get("version")),
                path.parent,
                lambda _, said=(licence, author): said,
            )
    return [found[name] for name in names if name in found]


def author_of(said: Any) -> str:
    """Returns the author of a package.json, without the address."""
    name = said.get("name", "") if isinstance(said, dict) else str(said or "")
    return name.split(" <")[0].strip() or "unknown"


def debian_package(source: Path, name: str, data: str) -> Package | None:
    """Returns the one that `dpkg-deb -x` has unpacked there, or that is installed if source is /;
    None if it is not there. data: its folder of data below usr/share/games, which licences are said
    of."""
    about = source / "usr/share/doc" / name
    root = source / "usr/share/games" / data
    try:
        with gzip.open(about / "changelog.Debian.gz") as file:
            head = file.readline(MOST_TEXT).decode(errors="replace")
        terms = read_plain(about / "copyright", MOST_TEXT).decode(errors="replace")
    except (OSError, EOFError):
        return None
    version = re.match(r"\S+ \((\S+)\)", head)
    if version is None or not root.is_dir():
        return None
    return Package(name, version[1], root, terms_of(terms))


def terms_of(text: str) -> Callable[[str], tuple[str, str]]:
    """Reads path -> licence and author from debian/copyright. Of its machine-readable form the last
    matching paragraph counts; other texts are one licence for all."""
    paragraphs = [
        fields for part in re.split(r"\n\s*\n", text) if "Files" in (fields := fields_of(part))
    ]
    if not paragraphs:
        found = GPL.search(text)
        author = re.search(r"Upstream Author: (.+?)(?: <|\n)", text)
        said = f"GPL-{found[1]}.0-or-later" if found else "unknown"
        return lambda _: (said, f"{author[1]} and others" if author else "unknown")
    known = [
        (p["Files"].split(), p.get("License", "unknown").split("\n")[0], holders(p))
        for p in paragraphs
    ]

    def terms(path: str) -> tuple[str, str]:
        fitting = [p for p in known if any(fnmatchcase(path, glob) for glob in p[0])]
        return fitting[-1][1:] if fitting else ("unknown", "unknown")

    return terms


def fields_of(paragraph: str) -> dict[str, str]:
    """Reads a paragraph of the control format: a line that begins with a blank goes on with the
    field before it."""
    parts = re.findall(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.M)
    return {name: value.strip() for name, value in parts}


def holders(paragraph: Mapping[str, str]) -> str:
    names = [
        re.sub(r"<.*?>|\(c\)|©|^[\d\s,-]+", "", line).strip()
        for line in paragraph.get("Copyright", "").splitlines()
    ]
    return ", ".join(dict.fromkeys(filter(None, names))) or "unknown"


def digest_of(root: Path, files: Iterable[Path]) -> str:
    """Returns the SHA-256 of the names and contents of files, whatever else a folder holds."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([path.relative_to(root).as_posix(), content]).encode())
    return digest.hexdigest()


def strangers(packages: Iterable[tuple[Package, str]], known: Sequence[str]) -> Iterator[str]:
    """Yields a line for each package, with the digest of its files, that is not as the recipe knows
    it. known: "NAME VERSION SHA256" each."""
    recipe = {name: said for name, *said in map(str.split, known)}
    for package, sha256 in packages:
        here = f"{package.name} {package.version} (sha256 {sha256})"
        if package.name not in recipe:
            yield f"{here} is not in the recipe"
        elif recipe[package.name] != [package.version, sha256]:
            version, theirs = recipe[package.name]
            yield (
                f"{here} is not the one of the recipe, {version} (sha256 {theirs}): its clips, and "
                "what is made of them, can differ"
            )
