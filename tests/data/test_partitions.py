from __future__ import annotations

import gzip
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3 import S3

from flowfn_runtime.data.globs import files, split, translate
from flowfn_runtime.data.partitions import Partition, align, parse_size, partitions
from flowfn_runtime.errors import DataChanged, DataError, DataNotFound, ValidationError


def tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


# -- files


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.csv", ["a.csv", ".csv"], ["a/b.csv", "a.csvx"]),
        ("**/*.csv", ["a.csv", "x/a.csv", "x/y/a.csv"], ["a.txt", "xa.csv/b"]),
        ("**", ["a", "a/b"], []),
        ("a/**/b", ["a/b", "a/x/y/b"], ["ab", "a/xb"]),
        ("part-?.[ct]sv", ["part-1.csv", "part-2.tsv"], ["part-10.csv", "part-1.xsv"]),
        ("[!a]", ["b"], ["a"]),
        ("[^a]", ["^", "a"], ["b"]),
        ("a[!b]c", ["axc"], ["a/c"]),
        ("[", ["["], [""]),
        ("a+(b)", ["a+(b)"], ["aab"]),
    ],
)
def test_globs(pattern: str, yes: list[str], no: list[str]) -> None:
    matches = translate(pattern).fullmatch
    assert all(map(matches, yes)) and not any(map(matches, no))


def test_where_a_glob_begins() -> None:
    assert split("s3://b/p/**/*.csv") == ("s3://b/p/", "**/*.csv")
    assert split("s3://b/*") == ("s3://b/", "*")
    assert split("s3://b/p/") == ("s3://b/p/", "**")
    assert split("s3://b/p") == ("s3://b/p", "")
    assert split("/a/b?.csv") == ("/a/", "b?.csv")
    assert split("https://h/x?q=*") == ("https://h/x?q=*", "")


def test_files_of_a_directory(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.csv", "a/b/2.csv", "a.csv", "a-/0.csv", "c.txt")
    found = [file.url for file in files(f"{tmp_path}/**/*.csv")]
    assert [os.path.relpath(url, tmp_path) for url in found] == ["a-/0.csv", "a.csv", "a/1.csv", "a/b/2.csv"]
    assert [file.name for file in files(f"{tmp_path}/*.csv")] == ["a.csv"]
    assert len(list(files(f"{tmp_path}/"))) == 5
    with pytest.raises(DataNotFound, match="nothing matches"):
        list(files(f"{tmp_path}/*.parquet"))
    with pytest.raises(DataNotFound):
        list(files(f"{tmp_path}/none/*"))


def test_a_glob_looks_only_where_it_can_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3) -> None:
    tree(tmp_path, "1.csv", "run-1/2.csv", "run-1/deep/3.csv", "other/4.csv")
    (tmp_path / "run-2").symlink_to("other")
    seen: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(os.path.basename(path.rstrip("/"))) or scandir(path))
    assert [file.name for file in files(f"{tmp_path}/*.csv")] == ["1.csv"]
    assert [file.name for file in files(f"{tmp_path}/run-?/*.csv")] == ["2.csv", "4.csv"]
    assert seen == [tmp_path.name, tmp_path.name, "run-1", "run-2"]
    tree(s3.root, "1.csv", "run-1.csv", "run.csv", *(f"run-1/{n:04}.csv" for n in range(1001)))
    with s3.proxy() as proxy:
        options = s3.through(proxy).options
        assert [file.name for file in files(f"{s3.url}/r*.csv", storage_options=options)] == ["run-1.csv", "run.csv"]
        assert len(proxy.requests) == 1
        assert sum(1 for _ in files(f"{s3.url}/run-*/*", storage_options=options)) == 1001
        assert len(proxy.requests) == 3


def test_files_of_a_bucket_are_pinned_and_listed_lazily(bucket: Path) -> None:
    tree(bucket, *(f"p/{n:04}.bin" for n in range(1500)), "q/x")
    found = iter(files(f"s3://{bucket.name}/p/*.bin"))
    first = next(found)
    assert first.url == f"s3://{bucket.name}/p/0000.bin"
    (bucket / "p" / "1400.bin").unlink()  # on the second page, which nobody has asked for yet
    rest = list(found)
    assert len(rest) == 1498
    (bucket / "p" / "0000.bin").write_bytes(b"another content")
    with pytest.raises(DataChanged):
        first.prepare()
    assert Path(rest[0]).read_bytes() == b"p/0001.bin"


def test_files_of_a_volume() -> None:
    import fsspec

    fs = fsspec.filesystem("volume")
    fs.pipe({"volume://data/a/1.csv": b"1", "volume://data/2.csv": b"22"})
    assert [file.url for file in files("volume://data/**/*.csv")] == ["volume://data/2.csv", "volume://data/a/1.csv"]
    with next(files("volume://data/*")).open() as stream:
        assert stream.read() == b"22"


# -- partitions


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("partitions")


texts = st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=60)


@settings(deadline=None, max_examples=200)
@given(lines=texts, step=st.integers(1, 200), last=st.booleans())
def test_parts_are_every_record_once_and_whole(scratch: Path, lines: list[bytes], step: int, last: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if last else b"")
    file = scratch / "text"
    file.write_bytes(data)
    parts = list(partitions(file, size=step))
    pieces = [part.read() for part in parts]
    assert b"".join(pieces) == data
    assert all(piece.endswith(b"\n") for piece in pieces[:-1] if piece and data[len(b"".join(pieces)) :])
    assert [record for part in parts for record in part] == list(io.BytesIO(data))


@settings(deadline=None, max_examples=200)
@given(
    data=st.lists(st.sampled_from([b"a", b"b", b"\r", b"\n", b"|"]), max_size=200).map(b"".join),
    boundary=st.sampled_from([b"\r\n", b"|", b"ab|"]),
    step=st.integers(1, 50),
)
def test_parts_with_other_boundaries(scratch: Path, data: bytes, boundary: bytes, step: int) -> None:
    file = scratch / "records"
    file.write_bytes(data)
    parts = list(partitions(file, size=step, boundary=boundary))
    assert b"".join(part.read() for part in parts) == data
    expected = [record + boundary for record in data.split(boundary)[:-1]]
    expected += [tail] if (tail := data.split(boundary)[-1]) else []
    assert [record for part in parts for record in part] == expected


@settings(deadline=None)
@given(data=st.binary(max_size=500), step=st.integers(1, 100))
def test_parts_of_exact_size(scratch: Path, data: bytes, step: int) -> None:
    file = scratch / "binary"
    file.write_bytes(data)
    pieces = [part.read() for part in partitions(file, size=step, boundary=None)]
    assert pieces == [data[start : start + step] for start in range(0, len(data), step)]


@given(data=st.binary(max_size=300), boundary=st.binary(min_size=1, max_size=3), position=st.integers(0, 300))
def test_align_finds_the_next_boundary(data: bytes, boundary: bytes, position: int) -> None:
    found = align(io.BytesIO(data), position, len(data), boundary)
    after = [at for at in range(position, len(data) + 1) if at in (0, len(data)) or data[:at].endswith(boundary)]
    assert found == (after[0] if after else len(data))


def test_parts_in_a_bucket_stream_and_pickle(bucket: Path) -> None:
    lines = [f"{n},{'x' * (n % 97)}\n".encode() for n in range(40_000)]
    (bucket / "t.csv").write_bytes(b"".join(lines))
    parts = list(partitions(f"s3://{bucket.name}/*.csv", size="300KiB"))
    assert len(parts) == -(-sum(map(len, lines)) // (300 << 10)) > 5
    parts = pickle.loads(pickle.dumps(parts))
    assert [line for part in parts for line in part] == lines
    with parts[1].open("rt") as text:
        first = next(text)
    assert first.encode() in lines
    assert not os.path.exists(os.environ["FLOW_CACHE"])
    (bucket / "t.csv").write_bytes(b"".join(reversed(lines)))
    with pytest.raises(DataChanged):
        parts[0].read()


def test_a_reader_who_stops_early_fetches_little(bucket: Path) -> None:
    (bucket / "big").write_bytes(b"line\n" * 4_000_000)
    (part, *_) = partitions(f"s3://{bucket.name}/big", size="10MB")
    with part.open() as stream:
        assert stream.readline() == b"line\n"
        raw: Any = stream.raw  # type: ignore[attr-defined]
        assert raw._whole.raw._position < 11_000_000


def test_compressed_files_are_one_part(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.csv.gz", "wb") as file:
        file.write(b"1\n2\n" * 10_000)
    (part,) = partitions(tmp_path / "a.csv.gz", size=100)
    assert part.read() == b"1\n2\n" * 10_000
    assert sum(1 for _ in part) == 20_000


@pytest.mark.parametrize("frames", [1, 3])
def test_zstd_files_are_one_part_of_any_number_of_frames(bucket: Path, frames: int) -> None:
    import zstandard

    lines = [b"%d\n" % number for number in range(30_000)]
    step = len(lines) // frames
    packed = [zstandard.compress(b"".join(lines[at : at + step])) for at in range(0, len(lines), step)]
    (bucket / "a.jsonl.zst").write_bytes(b"".join(packed))
    (part,) = partitions(f"s3://{bucket.name}/*.zst", size=100)
    assert part.read() == b"".join(lines)
    assert [line + b"\n" if not line.endswith(b"\n") else line for line in part] == lines
    with part.open("rt") as text:
        assert text.readline() == "0\n"


def test_row_groups(bucket: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"n": list(range(1000)), "text": [str(n) * 50 for n in range(1000)]})
    parquet.write_table(table, bucket / "t.parquet", row_group_size=100)
    parts = list(partitions(f"s3://{bucket.name}/t.parquet", size=5000))
    assert 1 < len(parts) <= 10
    parts = pickle.loads(pickle.dumps(parts))
    assert pyarrow.concat_tables([part.table() for part in parts]) == table
    assert parts[0].table(columns=["n"]).column_names == ["n"]
    with pytest.raises(DataError, match="table"):
        parts[0].open()


def test_empty_files_have_no_parts(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert list(partitions(tmp_path / "empty")) == []


@pytest.mark.parametrize(
    ("size", "expected"), [(5, 5), ("64MiB", 64 << 20), ("1.5k", 1500), ("2 GB", 2 * 10**9), ("7", 7), ("3b", 3)]
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", [0, -1, "x", "", "5%", "0MiB", 1.5, None, True])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(ValidationError):
        partitions("/x", size=size)


def test_secrets_are_not_shown() -> None:
    assert "s3cr3t" not in repr(Partition("s3://b/k", 0, 10, storage_options={"secret": "s3cr3t"}))
