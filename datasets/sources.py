"""Where images come from: folders, archives and parquet files, read without being extracted.

A source lists its images (:class:`Entry`) from what is cheap to read (folder listings, headers, one column), and then reads
the wanted ones in the order in which they are stored.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from archives import Archive, Member, reading
from download import Remote, RemoteFile, download, hub_files

from dataloader.readers import names_image
from utils import InputError

CLASS_TAR = re.compile(r"n\d{8}\.tar")  # ImageNet's training images are a tar of such tars


class Entry(NamedTuple):
    """An image, or another file, of a source."""

    name: str  # its path in the source, with "/"; unique
    size: int  # in bytes, where it is known; otherwise an average
    label: str | None = None  # its class, where the source states it apart from the name
    box: tuple[float, ...] | None = None  # left, upper, right, lower, in pixels, where the source has bounding boxes


Content = tuple[str, bytes]


class Source:
    """Images that can be listed and read."""

    def __init__(self, where: str) -> None:
        self.where = where  # for messages and the manifest

    def entries(self) -> list[Entry]:
        """Every file in it."""
        raise NotImplementedError

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        """Names and contents of the wanted entries that it has, in the order in which they are stored."""
        raise NotImplementedError


class ConcatSource(Source):
    """Several sources as one."""

    def __init__(self, where: str, sources: Sequence[Source]) -> None:
        super().__init__(where)
        self.sources = sources

    def entries(self) -> list[Entry]:
        found = [entry for source in self.sources for entry in source.entries()]
        if len({entry.name for entry in found}) < len(found):
            raise InputError(f"two of the sources {self.where} hold files of the same name. Leave one of them out")
        return found

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for source in self.sources:
            yield from source.read(wanted)


def open_source(path: Path, archives: Collection[str] = ()) -> Source:
    """The folder, archive or parquet file at a path; archives of these names, or of ImageNet's classes, in a folder.

    Raises:
        InputError: there is no such file, or it is none of these.
    """
    if path.is_dir():
        files = sorted(path.rglob("*"))
        parquet = [file for file in files if file.suffix == ".parquet"]
        found = [ArchiveSource(file) for file in files if file.name in archives or CLASS_TAR.fullmatch(file.name)]
        if found:
            return found[0] if len(found) == 1 else ConcatSource(path.name, found)
        return Parquet(path.name, [_LocalFile(file) for file in parquet]) if parquet else Folder(path)
    if not path.is_file():
        raise InputError(f"there is no file or folder {path}")
    return Parquet(path.name, [_LocalFile(path)]) if path.suffix == ".parquet" else ArchiveSource(path)


# --- Folders and archives ---------------------------------------------------------------------------------------------


class Folder(Source):
    """Files at any depth below a folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.path = path

    def entries(self) -> list[Entry]:
        with reading(self.path):
            files = [path for path in sorted(self.path.rglob("*")) if path.is_file()]
            return [Entry(path.relative_to(self.path).as_posix(), path.stat().st_size) for path in files]

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for name in sorted(wanted):
            path = self.path / name
            if path.is_file():
                with reading(path):
                    content = path.read_bytes()
                yield name, content


class ArchiveSource(Source):
    """A tar or a zip. Tars of ImageNet's classes in it are read as if they were folders."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.archive = Archive(path)

    def entries(self) -> list[Entry]:
        return [Entry(member.name, member.size) for member in self._files()]

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for member in self._files({name.rpartition("/")[0] for name in wanted}):
            if member.name in wanted:
                yield member.name, b"".join(self.archive.chunks(member))

    def _files(self, folders: Collection[str] | None = None) -> Iterator[Member]:
        for member in self.archive.members():
            if member.kind != "file":
                continue
            if not CLASS_TAR.fullmatch(PurePosixPath(member.name).name):
                yield member
            elif folders is None or member.name in folders:
                for inner in self.archive.inner_members(member):
                    if inner.kind == "file":
                        yield inner._replace(name=f"{member.name}/{inner.name}")


# --- Parquet ----------------------------------------------------------------------------------------------------------


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self.name, self.path, self.size = path.name, path, path.stat().st_size

    def open(self) -> Any:
        return self.path

    @contextmanager
    def whole(self) -> Iterator[Path]:
        yield self.path


class _HubFile:
    """Listed by reading ranges of it; kept on disk only while it is read."""

    def __init__(self, remote: Remote, name: str, scratch: Path) -> None:
        self.name, self.remote, self.size, self.scratch = name, remote, remote.size or 0, scratch

    def open(self) -> Any:
        return RemoteFile(self.remote)

    @contextmanager
    def whole(self) -> Iterator[Path]:
        path = download(self.remote, self.scratch / self.name)
        yield path
        path.unlink()


class Parquet(Source):
    """Parquet files as Hugging Face has them: ``image`` (``bytes`` and ``path``), ``label``, and optionally ``bbox``."""

    def __init__(self, where: str, files: list[Any]) -> None:
        super().__init__(where)
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise InputError(
                "reading parquet files requires pyarrow, which is not installed. Run: pip install -r requirements-data.txt"
            ) from error
        self.files, self.opener = files, ParquetFile

    def entries(self) -> list[Entry]:
        return [entry for file in self.files for entry in self._listing(file)]

    def _listing(self, file: Any) -> list[Entry]:
        with reading(file.name), self.opener(file.open()) as table:
            schema = table.schema_arrow
            if "image" not in schema.names or "label" not in schema.names:
                raise InputError(f"{file.name} needs the columns image and label; it has {', '.join(schema.names)}")
            has_path = any(field.name == "path" for field in schema.field("image").type)
            rows = table.read(columns=["label", "bbox"] + ["image.path"] * has_path).to_pylist()
        names = _class_names(schema)
        found = []
        for number, row in enumerate(rows):
            path = (row.get("image") or {}).get("path") or f"{number:05d}"
            label, box = row["label"], row.get("bbox")
            text = names[label] if isinstance(label, int) and 0 <= label < len(names) else str(label)
            name = f"{file.name}/{number:05d}/{PurePosixPath(path).name}"
            found.append(Entry(name, file.size // len(rows), text, tuple(box) if box is not None else None))
        return found

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for file in self.files:
            # The row is in the name, so the listing is not needed again.
            of_file = {int(name.split("/")[1]): name for name in wanted if name.startswith(f"{file.name}/")}
            if not of_file:
                continue
            with file.whole() as path, reading(file.name), self.opener(path) as table:
                batches = table.iter_batches(batch_size=64, columns=["image.bytes"])
                images = (image for batch in batches for image in batch.column("image"))
                for row, image in enumerate(images):
                    if row in of_file:
                        yield of_file[row], image["bytes"].as_py() or b""  # which is reported as no image


def hub_parquet(name: str, revision: str, *, scratch: Path) -> Parquet:
    """The parquet files of a data set on Hugging Face."""
    where, files = hub_files(name, revision)
    names = sorted(name for name in files if name.endswith(".parquet"))
    if not names:
        raise InputError(f"{where} lists no parquet files with their SHA-256")
    return Parquet(where, [_HubFile(files[name], PurePosixPath(name).name, scratch) for name in names])


def _class_names(schema: Any) -> list[str]:
    """The names behind whole numbers as labels, from what Hugging Face's library writes beside the schema."""
    try:
        return list(json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (TypeError, KeyError, ValueError):
        return []


def is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return names_image(Path(name)) and not path.name.startswith(".") and "__MACOSX" not in path.parts
