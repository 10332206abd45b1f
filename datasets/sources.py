"""Where images come from: folders, archives and parquet files, read without being extracted.

A source lists its images from what is cheap to read, and then reads the wanted ones in the order in which they are stored.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from archives import Archive, Member, reading
from download import Remote, RemoteFile, download

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


class Source(ABC):
    """Images that can be listed and read."""

    def __init__(self, where: str) -> None:
        self.where = where  # for messages and the manifest

    @abstractmethod
    def entries(self) -> list[Entry]:
        """Every file in it."""

    @abstractmethod
    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        """Names and contents of the wanted entries that it has, in the order in which they are stored."""


class ConcatSource(Source):
    """Several sources as one. Of files with the same name, only the first is used."""

    def __init__(self, where: str, sources: Sequence[Source]) -> None:
        super().__init__(where)
        self.sources = sources

    def entries(self) -> list[Entry]:
        return [entry for source in self.sources for entry in source.entries()]

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for source in self.sources:
            yield from source.read(wanted)


def open_source(path: Path, archives: Collection[str] = ()) -> Source:
    """The folder, archive or parquet file at a path; archives of these names, or of ImageNet's classes, in a folder."""
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    parquet = {file.name: file for file in files if file.suffix == ".parquet"}
    if parquet:
        return Parquet(path.name, parquet)
    if not path.is_dir():
        return ArchiveSource(path)
    found = [ArchiveSource(file) for file in files if file.name in archives or CLASS_TAR.fullmatch(file.name)]
    return ConcatSource(path.name, found) if found else Folder(path)


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


class Parquet(Source):
    """Parquet files as Hugging Face has them: ``image`` (``bytes`` and ``path``), ``label``, and optionally ``bbox``.

    Those on a server are listed by reading ranges of them, and kept in ``scratch`` only while they are read.
    """

    def __init__(self, where: str, files: dict[str, Path | Remote], scratch: Path | None = None) -> None:
        super().__init__(where)
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise InputError("parquet files require pyarrow. Run: pip install -r requirements-data.txt") from error
        self.files, self.scratch, self.opener = files, scratch, ParquetFile

    def entries(self) -> list[Entry]:
        found = []
        for name, file in self.files.items():
            is_remote = isinstance(file, Remote)
            size = file.size if is_remote else file.stat().st_size
            with reading(name), self.opener(RemoteFile(file) if is_remote else file) as table:
                schema = table.schema_arrow
                if "image" not in schema.names or "label" not in schema.names:
                    raise InputError(f"{name} needs the columns image and label; it has {', '.join(schema.names)}")
                rows = table.read(columns=["label", "bbox", "image.path"]).to_pylist()  # without those it lacks
            classes = _class_names(schema)
            for number, row in enumerate(rows):
                path = (row.get("image") or {}).get("path") or f"{number:05d}"
                label, box = row["label"], row.get("bbox")
                label = classes[label] if isinstance(label, int) and 0 <= label < len(classes) else str(label)
                place = f"{name}/{number:05d}/{PurePosixPath(path).name}"
                found.append(Entry(place, size // len(rows), label, tuple(box) if box is not None else None))
        return found

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for name, file in self.files.items():
            # The row is in the name, so the listing is not needed again.
            of_file = {int(entry.split("/")[1]): entry for entry in wanted if entry.startswith(f"{name}/")}
            if not of_file:
                continue
            path = download(file, self.scratch / name) if isinstance(file, Remote) else file
            with reading(name), self.opener(path) as table:
                batches = table.iter_batches(batch_size=64, columns=["image.bytes"])
                images = (image for batch in batches for image in batch.column("image"))
                for row, image in enumerate(images):
                    if row in of_file:
                        yield of_file[row], image["bytes"].as_py() or b""  # which is reported as no image
            if path != file:
                path.unlink()


def _class_names(schema: Any) -> list[str]:
    """The names behind whole numbers as labels, from what Hugging Face's library writes beside the schema."""
    try:
        return list(json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (TypeError, KeyError, ValueError, RecursionError):
        return []


def is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return names_image(Path(name)) and not path.name.startswith(".") and "__MACOSX" not in path.parts
