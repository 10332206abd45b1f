"""Tar and zip archives, which may come from anywhere: read member by member, checked to the end, and within bounds."""

import bz2
import gzip
import lzma
import posixpath
import stat
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from utils import InputError

# Images and weights hardly compress: an archive that holds more than this many times its own size is not one of theirs.
MOST_GROWTH, SPARE_BYTES = 20, 64 << 20
LARGEST_HEADER = 1 << 20  # bytes of a tar between the content of one member and that of the next
BLOCK = tarfile.BLOCKSIZE
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open, b"]\0\0": lzma.open}


class BrokenArchive(InputError):
    """The archive itself is at fault; nothing is gained by keeping it."""


class NotATar(BrokenArchive):
    """It does not begin as a tar does."""


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn any error that a damaged file causes in its reader into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk is at fault
            raise InputError(f"cannot read {path} ({error.strerror})") from error
        known = (OSError, EOFError, ValueError, KeyError, RuntimeError, OverflowError, tarfile.TarError)
        libraries = ("zipfile", "zlib", "_lzma", "lzma", "struct", "pyarrow", "_pickle")
        if not isinstance(error, known) and type(error).__module__.split(".")[0] not in libraries:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenArchive(f"{path} is broken or incomplete ({reason})") from error


class Member(NamedTuple):
    """A member of an archive.

    Attributes:
        kind: "file", "folder", "link" or "other".
        open: gives the content of a file, until the next member is asked for.
        link: where a link leads, from the root of the archive.
    """

    name: str
    kind: str
    size: int
    open: Callable[[], IO[bytes]]
    link: str = ""


class Archive(ABC):
    """A file that holds files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bound = MOST_GROWTH * path.stat().st_size + SPARE_BYTES

    @abstractmethod
    def _members(self) -> Iterator[Member]: ...

    def members(self) -> Iterator[Member]:
        """Every member, in the order in which they are stored.

        Raises:
            BrokenArchive: it is damaged, or its content is out of proportion to its size.
        """
        total = 0
        with reading(self.path):
            for member in self._members():
                total += member.size
                self.check_growth(total)
                yield member

    def check_growth(self, size: int) -> None:
        """Raise BrokenArchive if the content is out of proportion to the size of the archive."""
        if size > self.bound:
            raise BrokenArchive(
                f"{self.path} holds over {self.bound >> 20} MiB, which is out of proportion to its own size"
            )

    def chunks(self, member: Member) -> Iterator[bytes]:
        """The content of a file, in pieces."""
        count = 0
        with reading(self.path), member.open() as file:
            while chunk := file.read(1 << 20):
                count += len(chunk)
                yield chunk
            if count != member.size:
                raise BrokenArchive(f"{self.path} is broken: {member.name} ends after {count} of {member.size} bytes")

    def inner_members(self, member: Member) -> Iterator[Member]:
        """The members of a tar in this archive."""
        with reading(self.path), member.open() as file:
            yield from _tar_members(_BoundedStream(file, self))


def open_archive(path: Path) -> Archive:
    """The tar, compressed or not, or the zip at a path.

    Raises:
        BrokenArchive: it is neither.
    """
    try:
        next(Tar(path).members(), None)
        return Tar(path)
    except NotATar:
        if zipfile.is_zipfile(path):
            return Zip(path)
    raise BrokenArchive(f"{path} is neither a tar nor a zip archive, or it is incomplete")


class Zip(Archive):
    def _members(self) -> Iterator[Member]:
        with zipfile.ZipFile(self.path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                if info.flag_bits & 1:
                    raise BrokenArchive(f"{self.path} is encrypted, which is not supported")
                if info.compress_type not in (
                    zipfile.ZIP_STORED,
                    zipfile.ZIP_DEFLATED,
                ):  # zipfile does not bound others
                    raise BrokenArchive(
                        f"{self.path} has another compression than deflate. Extract it, and pass the folder"
                    )
                mode = stat.S_IFMT(info.external_attr >> 16)
                is_folder = info.is_dir() or mode == stat.S_IFDIR
                kind = "folder" if is_folder else "file" if mode in (0, stat.S_IFREG) else "other"
                yield Member(info.filename, kind, info.file_size, partial(archive.open, info))  # reading checks the CRC


class Tar(Archive):
    def _members(self) -> Iterator[Member]:
        with open(self.path, "rb") as file:
            start = file.read(6)
        opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), open)
        with opener(self.path, "rb") as file:
            yield from _tar_members(_BoundedStream(file, self))


class _BoundedStream:
    """The decompressed bytes of a tar, for tarfile to read from.

    tarfile reads a header into memory whole, whatever size it claims: ``left`` is the number of bytes that may be read until
    it is set again.
    """

    def __init__(self, file: IO[bytes], archive: Archive) -> None:
        self.file, self.archive, self.left = file, archive, LARGEST_HEADER
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise BrokenArchive(f"{self.archive.path} is broken: it has a header of over {LARGEST_HEADER >> 10} KiB")
        content = self.file.read(size)
        self.left -= len(content)
        self.archive.check_growth(self.file.tell())
        return content

    def seek(self, position: int) -> int:
        self.archive.check_growth(position)
        return self.file.seek(position)


def _tar_members(stream: _BoundedStream) -> Iterator[Member]:
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise NotATar(f"{stream.archive.path} is broken: it holds something else than a tar ({error})") from error
    with archive:
        previous = -1
        while True:
            stream.left = LARGEST_HEADER
            info = archive.next()
            stream.left = 2 * stream.archive.bound
            if info is None:
                break
            if info.size < 0 or archive.offset <= previous:  # a negative size would have tarfile read in circles
                raise BrokenArchive(f"{stream.archive.path} is broken: {info.name} has an impossible size")
            previous, archive.members = archive.offset, []  # tarfile keeps them all: gigabytes for all of ImageNet
            name = info.name.removeprefix("./")
            is_link = info.issym() or info.islnk()
            kind = "file" if info.isreg() else "folder" if info.isdir() else "link" if is_link else "other"
            target = posixpath.join(posixpath.dirname(name) if info.issym() else "", info.linkname)
            size = info.size if info.isreg() else 0
            yield Member(name, kind, size, partial(archive.extractfile, info), posixpath.normpath(target))
        # tarfile takes a header that it cannot read for the end, and stops before the checksum of a compressed archive.
        stream.seek(archive.offset)
        if stream.read(BLOCK) != bytes(BLOCK):
            raise BrokenArchive(
                f"{stream.archive.path} is broken or incomplete: byte {archive.offset} cannot be read as a header"
            )
        while stream.read(1 << 20):
            pass
