"""Publish: files written into a staging folder in, the same files under the folder's own name out, all or none.

The staging folder lies beside the target, and takes its place by one rename (an exchange of the two, if the target
exists), so that whoever looks sees the old files or the new ones. Files of the target that the staging folder does not
replace are kept, by hard links. Where the target cannot be renamed (a mount point, the current directory, a parent
that may not be written) staging lies inside it, and files are replaced one at a time, put back if one fails.
A lock on the directory that holds the staging folder lets one process publish at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from qpass.errors import CheckpointError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def publish_folder(target: Path, replaces: Callable[[str], bool]) -> Iterator[Path]:
    """A new empty folder to write into; on leaving the block without an error, its files become those of `target`.

    `replaces(name)` says which old files go because the new ones take their place, whatever their names.
    On any error, an interruption included, `target` is as it was and nothing else is left behind.
    Raises CheckpointError, with the operating system's reason, if the files cannot be written.
    """
    target = Path(os.path.abspath(target)).resolve()
    with _told(target):
        _refuse(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = _can_rename(target)
        home = target.parent if beside else target
        staging = _staging(home, target)
        try:
            os.mkdir(staging)
            yield staging
            _flush_folder(staging)
            with _locked(home):
                (_exchange if beside else _replace_each)(staging, target, replaces)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raise now the CheckpointError that publish_folder would raise at once, after the work that is to be saved."""
    target = Path(os.path.abspath(target)).resolve()
    with _told(target):
        _refuse(target)
        home = next(folder for folder in target.parents if folder.exists())
        # Made and taken away again: neither root nor some file systems obey what a folder's mode says.
        probe = _staging(target if target.exists() and not _can_rename(target) else home, target)
        os.mkdir(probe)
        os.rmdir(probe)


def _refuse(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; save needs a folder")
    if target.exists() and not os.access(target, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot save to {target}: the folder is read-only; nothing was written")


def _staging(home: Path, target: Path) -> Path:
    return home / f".{target.name}.saving-{os.getpid()}-{secrets.token_hex(4)}"


def _exchange(staging: Path, target: Path, replaces: Callable[[str], bool]) -> None:
    if not target.exists():
        os.rename(staging, target)
    else:
        new = {entry.name for entry in os.scandir(staging)}
        for entry in os.scandir(target):
            if entry.name in new or replaces(entry.name) or ".saving-" in entry.name:
                continue
            kept = staging / entry.name
            if entry.is_dir(follow_symlinks=False):
                shutil.copytree(entry.path, kept, symlinks=True, copy_function=_link)
            else:
                _link(entry.path, str(kept))
        shutil.copymode(target, staging)
        _swap_names(staging, target)
    _flush_folder(target.parent)


def _replace_each(staging: Path, target: Path, replaces: Callable[[str], bool]) -> None:
    new = sorted(entry.name for entry in os.scandir(staging))
    # config.json last: without it a folder is no checkpoint, with it everything that it describes is there.
    new.sort(key=lambda name: name == "config.json")
    backup = staging / ".before"
    backup.mkdir()
    old = [entry.name for entry in os.scandir(target) if entry.name in new or replaces(entry.name)]
    moved: list[str] = []
    try:
        for name in sorted(old, key=lambda name: name != "config.json"):
            moved.append(name)
            os.rename(target / name, backup / name)
        for name in new:
            os.rename(staging / name, target / name)
        _flush_folder(target)
    except BaseException:
        for name in moved:
            if (backup / name).exists():
                os.replace(backup / name, target / name)
        for name in set(new) - set(old):
            (target / name).unlink(missing_ok=True)
        raise


def _swap_names(a: Path, b: Path) -> None:
    """Exchange two folders at once; where the system cannot, by three renames, undone if one fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2") and libc.renameat2(
            _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return
    aside = a.with_name(a.name + "-old")
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except BaseException:
        os.rename(aside, b)
        raise
    os.rename(aside, a)


def _can_rename(target: Path) -> bool:
    parent = target.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        return False
    inside = Path.cwd() if target.exists() else parent
    return not target.exists() or (not target.is_mount() and target != inside and target not in inside.parents)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot save to {target}: {error.strerror or error}; what was there before is untouched"
                              ) from error


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
