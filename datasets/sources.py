"""Where images come from: folders, archives and parquet files, read without being extracted.

A source lists its images (:class:`Entry`) from what is cheap to read - folder listings, headers, one column - and then
gives the content of those that are wanted, in the order in which they are stored, so that it is read once.
"""

import io
import itertools
import json
import pickle
import re
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from download import HubRepository, RemoteFile, download
from PIL import Image

from dataloader.readers import IMAGE_SUFFIXES
from utils import InputError

CLASS_TAR = re.compile(r"n\d{8}\.tar")  # ImageNet's training images are a tar of such tars
CIFAR_PARTS = ("train", "test")


class Entry(NamedTuple):
    """An image, or another file, of a source.

    Attributes:
        name: its path in the source, with ``/``; no other entry has it.
        size: in bytes, where that is known; else an average.
        label: its class, where the source says so beside the name.
        box: ``x1, y1, x2, y2`` in pixels, where the source has bounding boxes.
    """

    name: str
    size: int
    label: str | None = None
    box: tuple[float, ...] | None = None


Content = tuple[str, bytes]


class Source(ABC):
    """Images that can be listed and read."""

    def __init__(self, where: str) -> None:
        self.where = where  # for messages and the manifest

    @abstractmethod
    def entries(self) -> list[Entry]:
        """All that is in it."""

    @abstractmethod
    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        """Names and contents of the entries of these names, in the order in which they are stored."""


class Several(Source):
    """Sources read one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__(" + ".join(source.where for source in sources))
        self.sources = sources

    def entries(self) -> list[Entry]:
        found = [entry for source in self.sources for entry in source.entries()]
        if len({entry.name for entry in found}) < len(found):
            raise InputError(f"expected different images in {self.where}; some have the same names in two of them")
        return found

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for source in self.sources:
            yield from source.read({entry.name for entry in source.entries()}.intersection(wanted))


def open_source(path: Path) -> Source:
    """The source at a path, by what is there.

    Raises:
        InputError: there is nothing, or nothing that can be read.
    """
    if path.is_dir():
        parquet = sorted(path.rglob("*.parquet"))
        source: Source = Parquet(path.name, [_LocalFile(file) for file in parquet]) if parquet else Folder(path)
    elif not path.is_file():
        raise InputError(f"-source {path}: expected a file or a folder; there is none")
    elif path.suffix == ".parquet":
        source = Parquet(path.name, [_LocalFile(path)])
    else:
        with _reading(path):
            kind = Tar if tarfile.is_tarfile(path) else Zip if zipfile.is_zipfile(path) else None
        if kind is None:
            raise InputError(f"-source {path}: expected a tar, zip or parquet file; it is none, or it is cut off")
        source = kind(path)
    return source


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turns whatever a broken archive makes its reader raise into one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, tarfile.TarError, zipfile.BadZipFile) as error:
        _broken(path, error)
    except Exception as error:  # zlib.error, lzma.LZMAError, struct.error, pyarrow's own
        if type(error).__module__.split(".")[0] in ("zlib", "_lzma", "struct", "pyarrow", "_pickle"):
            _broken(path, error)
        raise


def _broken(path: Path | str, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path} cannot be read ({reason}): it is broken, cut off, or not what its name says") from error


# --- Folders and archives ---------------------------------------------------------------------------------------------


class Folder(Source):
    """Files at any depth below a folder. Tars of ImageNet's classes in it are read as if they were folders."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.path = path

    def entries(self) -> list[Entry]:
        found = []
        with _reading(self.path):
            for path in sorted(self.path.rglob("*")):
                name = path.relative_to(self.path).as_posix()
                if CLASS_TAR.fullmatch(path.name):
                    found += [entry._replace(name=f"{name}/{entry.name}") for entry in Tar(path).entries()]
                elif path.is_file():
                    found.append(Entry(name, path.stat().st_size))
        return found

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for container, names in itertools.groupby(sorted(wanted), key=_class_tar):
            if container:
                inner = {name.removeprefix(container + "/") for name in names}
                for name, content in Tar(self.path / container).read(inner):
                    yield f"{container}/{name}", content
            else:
                for name in names:
                    with _reading(self.path / name):
                        content = (self.path / name).read_bytes()
                    yield name, content


def _class_tar(name: str) -> str | None:
    folder, _, _ = name.rpartition("/")
    return folder if CLASS_TAR.fullmatch(PurePosixPath(folder).name) else None


class Zip(Source):
    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.path = path

    def entries(self) -> list[Entry]:
        with _reading(self.path), zipfile.ZipFile(self.path) as archive:
            return [Entry(info.filename, info.file_size) for info in archive.infolist() if not info.is_dir()]

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        with _reading(self.path), zipfile.ZipFile(self.path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                if info.filename in wanted:
                    yield info.filename, archive.read(info)  # checks the CRC


class Tar(Source):
    """A tar, compressed or not, in which tars of ImageNet's classes are read as if they were folders."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.path = path

    def entries(self) -> list[Entry]:
        with _reading(self.path), tarfile.open(self.path) as archive:
            return [Entry(name, member.size) for name, member, _ in self._members(archive)]

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        folders = {_class_tar(name) for name in wanted}
        with _reading(self.path), tarfile.open(self.path) as archive:
            for name, member, holder in self._members(archive, folders):
                if name in wanted:
                    yield name, _read_member(holder, member)

    def _members(
        self, archive: tarfile.TarFile, folders: Collection[str | None] | None = None
    ) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        for member in archive:
            archive.members = []  # tarfile keeps them all: gigabytes for all of ImageNet
            name = member.name.removeprefix("./")
            if member.isreg() and CLASS_TAR.fullmatch(PurePosixPath(name).name):
                if folders is None or name in folders:
                    with tarfile.open(fileobj=archive.extractfile(member)) as inner:
                        for image in inner:
                            if image.isreg():
                                yield f"{name}/{image.name.removeprefix('./')}", image, inner
            elif member.isreg():
                yield name, member, archive


def _read_member(holder: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: IO[bytes] | None = holder.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} ends after {len(content)} of {member.size} bytes")
    return content


# --- CIFAR-100's own format -------------------------------------------------------------------------------------------


class CifarPickles(Source):
    """The official ``cifar-100-python``, as if it were ``{train,test}/<class>/<file>.png``."""

    def __init__(self, source: Source, folder: str) -> None:
        super().__init__(source.where)
        content = {
            name.rpartition("/")[2]: data
            for name, data in source.read({f"{folder}{name}" for name in (*CIFAR_PARTS, "meta")})
        }
        self.images: dict[str, tuple[str, int]] = {}
        self.pixels: dict[str, Any] = {}
        with _reading(source.where):
            names = _unpickle(content["meta"])["fine_label_names"]
            for part in CIFAR_PARTS:
                table = _unpickle(content[part])
                self.pixels[part] = table["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                files, labels = table["filenames"], table["fine_labels"]
                if not len(self.pixels[part]) == len(files) == len(labels):
                    raise ValueError(
                        f"{part}: {len(self.pixels[part])} images, {len(files)} names, {len(labels)} labels"
                    )
                for row, (file, label) in enumerate(zip(files, labels, strict=True)):
                    self.images[f"{part}/{names[label]}/{file}"] = part, row

    def entries(self) -> list[Entry]:
        return [Entry(name, 2300) for name in self.images]  # an average PNG

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for name, (part, row) in self.images.items():
            if name in wanted:
                buffer = io.BytesIO()
                Image.fromarray(self.pixels[part][row]).save(buffer, "PNG")
                yield name, buffer.getvalue()


def _unpickle(content: bytes) -> dict[str, Any]:
    return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()


class _PlainUnpickler(pickle.Unpickler):
    """Arrays and plain values; a pickle that asks for anything else is refused before it can run it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0], name) in {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}, which is refused")


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
    """Listed by reading ranges of it; downloaded for as long as it is read."""

    def __init__(self, repository: HubRepository, path: str, scratch: Path) -> None:
        self.name, self.scratch = PurePosixPath(path).name, scratch
        self.remote = repository.file(path)
        self.size = self.remote.size or 0

    def open(self) -> Any:
        import pyarrow

        return pyarrow.PythonFile(RemoteFile(self.remote), mode="r")

    @contextmanager
    def whole(self) -> Iterator[Path]:
        path = download(self.remote, self.scratch / self.name)
        yield path
        path.unlink()


class Parquet(Source):
    """Parquet files as Hugging Face has them: ``image`` (``bytes`` and ``path``), ``label``, perhaps ``bbox``."""

    def __init__(self, where: str, files: list[Any]) -> None:
        super().__init__(where)
        try:
            import pyarrow.parquet  # noqa: F401 - here, to say what is missing before anything is downloaded
        except ImportError as error:
            raise InputError(
                "expected pyarrow, to read parquet files; it is not installed. Run: pip install -r requirements-data.txt"
            ) from error
        self.files = files

    def entries(self) -> list[Entry]:
        return [entry for file in self.files for entry in self._listing(file)]

    def _listing(self, file: Any) -> list[Entry]:
        import pyarrow.parquet

        with _reading(file.name), pyarrow.parquet.ParquetFile(file.open()) as table:
            schema = table.schema_arrow
            if "image" not in schema.names or "label" not in schema.names:
                raise InputError(f"expected the columns image and label in {file.name}; got {', '.join(schema.names)}")
            columns = ["label", *(["bbox"] if "bbox" in schema.names else [])]
            has_path = any(field.name == "path" for field in schema.field("image").type)
            rows = table.read(columns=columns + ["image.path"] * has_path)
            labels, boxes = rows["label"].to_pylist(), rows["bbox"].to_pylist() if "bbox" in columns else None
            paths = [(image or {}).get("path") for image in rows["image"].to_pylist()] if has_path else []
        names = _class_names(schema)
        found = []
        for row, label in enumerate(labels):
            path = paths[row] if has_path else None
            base = PurePosixPath(path.replace("\\", "/")).name if path else f"{row:05d}"
            text = names[label] if names and isinstance(label, int) and 0 <= label < len(names) else str(label)
            found.append(
                Entry(
                    f"{file.name}/{row:05d}/{base}",
                    file.size // max(len(labels), 1),
                    text,
                    tuple(boxes[row]) if boxes and boxes[row] is not None else None,
                )
            )
        return found

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        import pyarrow.parquet

        for file in self.files:
            # The row is in the name, so the listing is not needed again.
            of_file = {int(name.split("/")[1]): name for name in wanted if name.startswith(f"{file.name}/")}
            if not of_file:
                continue
            with file.whole() as path, _reading(file.name), pyarrow.parquet.ParquetFile(path) as table:
                row = 0
                for batch in table.iter_batches(batch_size=64, columns=["image.bytes"]):
                    for image in batch.column("image"):
                        if row in of_file:
                            content = image["bytes"].as_py()
                            if content is None:
                                raise InputError(
                                    f"expected the bytes of an image in row {row} of {file.name}; it has none"
                                )
                            yield of_file[row], content
                        row += 1


def hub_parquet(name: str, revision: str, is_wanted: Callable[[str], bool], *, scratch: Path) -> Parquet:
    """The parquet files of a data set on Hugging Face whose names are wanted."""
    repository = HubRepository(name, revision)
    paths = [path for path in repository.files() if path.endswith(".parquet") and is_wanted(PurePosixPath(path).name)]
    if not paths:
        raise InputError(f"expected parquet files in {repository}; it has none")
    return Parquet(str(repository), [_HubFile(repository, path, scratch) for path in paths])


def _class_names(schema: Any) -> list[str] | None:
    """The names behind whole numbers as labels, from what Hugging Face's library writes beside the schema."""
    try:
        label = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]
        return list(label["names"])
    except (TypeError, KeyError, ValueError):
        return None


def is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and "__MACOSX" not in path.parts
