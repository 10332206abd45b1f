"""Tar and zip archives from anywhere: read member by member, checked to the end, and within bounds."""

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from utils import InputError

# Images and weights hardly compress: an archive that holds more than this many times its own size is not one of theirs.
MOST_GROWTH, SPARE_BYTES = 20, 64 << 20
CHUNK = 1 << 16  # bytes read at once; no header of a tar is longer
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open, b"]\0\0": lzma.open}


class BrokenArchive(InputError):
    """The archive itself is at fault; nothing is gained by keeping it."""


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn any error that a damaged file causes in its reader into one line."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} needs more memory than there is") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk is at fault
            raise InputError(f"cannot read {path} ({error.strerror})") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenArchive(f"{path} is broken or incomplete ({reason})") from error


class Member(NamedTuple):
    """A member of an archive: ``kind`` is "file", "folder" or "other"; ``open`` works until the next member is asked for."""

    name: str
    kind: str
    size: int
    open: Callable[[], IO[bytes]]


class Archive:
    """A zip, or a tar, compressed or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bound = MOST_GROWTH * path.stat().st_size + SPARE_BYTES

    def members(self) -> Iterator[Member]:
        """Every member, as stored; BrokenArchive if it is damaged or no archive, or out of proportion to its size."""
        total = 0
        with reading(self.path):
            with open(self.path, "rb") as file:
                start = file.read(6)
            is_zip = start.startswith(b"PK") and zipfile.is_zipfile(self.path)
            for member in self._zip_members() if is_zip else self._tar_members(start):
                total += member.size
                self.check_growth(total)
                yield member

    def check_growth(self, size: int) -> None:
        """Raise BrokenArchive if the content is out of proportion to the size of the archive."""
        if size > self.bound:
            raise BrokenArchive(f"{self.path} holds over {self.bound >> 20} MiB, out of proportion to its own size")

    def chunks(self, member: Member) -> Iterator[bytes]:
        """The content of a file, in pieces."""
        count = 0
        with reading(self.path), member.open() as file:
            while chunk := file.read(CHUNK):
                count += len(chunk)
                yield chunk
            if count != member.size:
                raise BrokenArchive(f"{self.path} is broken: {member.name} ends after {count} of {member.size} bytes")

    def inner_members(self, member: Member) -> Iterator[Member]:
        """The members of a tar in this archive."""
        with reading(self.path), member.open() as file:
            yield from _read_tar(_BoundedStream(file, self))

    def _zip_members(self) -> Iterator[Member]:
        with zipfile.ZipFile(self.path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                is_bounded = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # as zipfile reads it
                if info.flag_bits & 1 or not is_bounded:
                    raise BrokenArchive(f"{self.path} is encrypted, or not compressed by deflate. Extract it")
                mode = stat.S_IFMT(info.external_attr >> 16)
                is_folder = info.is_dir() or mode == stat.S_IFDIR
                kind = "folder" if is_folder else "file" if mode in (0, stat.S_IFREG) else "other"
                yield Member(info.filename, kind, info.file_size, partial(archive.open, info))  # reading checks the CRC

    def _tar_members(self, start: bytes) -> Iterator[Member]:
        opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), open)
        with opener(self.path, "rb") as file:
            yield from _read_tar(_BoundedStream(file, self))


class _BoundedStream:
    """The decompressed bytes of a tar. tarfile would read a header whole, whatever size it claims."""

    def __init__(self, file: IO[bytes], archive: Archive) -> None:
        self.file, self.archive, self.tell, self.seekable = file, archive, file.tell, file.seekable

    def read(self, size: int) -> bytes:
        if not 0 <= size <= CHUNK:
            raise BrokenArchive(f"{self.archive.path} is broken: it has a header of over {CHUNK >> 10} KiB")
        content = self.file.read(size)
        self.archive.check_growth(self.file.tell())
        return content

    def seek(self, position: int) -> int:
        self.archive.check_growth(position)
        return self.file.seek(position)


def _read_tar(stream: _BoundedStream) -> Iterator[Member]:
    path = stream.archive.path
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise BrokenArchive(f"{path} is neither a tar nor a zip archive, or it is broken or incomplete") from error
    with archive:
        while info := archive.next():
            if info.size < 0 or info.issparse():
                raise BrokenArchive(f"{path} is broken: {info.name} has an impossible size, or is a sparse file")
            archive.members = []  # tarfile keeps them all: gigabytes for all of ImageNet
            kind = "file" if info.isreg() else "folder" if info.isdir() else "other"
            size = info.size if info.isreg() else 0
            yield Member(info.name.removeprefix("./"), kind, size, partial(archive.extractfile, info))
        # tarfile takes a header that it cannot read for the end, and stops before the checksum of a compressed archive.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise BrokenArchive(f"{path} is broken or incomplete: byte {archive.offset} cannot be read as a header")
        while stream.read(CHUNK):
            pass
