"""Files of a run folder: whole or not there, whatever happens while they are written.

A file is filled under a temporary name (`.NAME.PID.tmp`) beside its place, synced to the disk, and renamed into place.
What a killed run leaves under a temporary name is no part of the run; `lock_run` removes it at the next start.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastppo.errors import UserError

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "make the disk writable",
    errno.EACCES: "allow writing there",
    errno.EPERM: "allow writing there",
}
_OF_THE_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM)  # what another folder helps against


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full, read-only, forbidden or missing disk into a UserError of one line that names `path` and says what to do:
    within the folder of a run or study that had begun, how to go on with it.

    Covers safetensors, whose errors carry the system's number as text. `torch.save` to a file hides it: save to memory
    and give the bytes to `write_bytes`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _os_error_in_text(str(error))
        if code is None or isinstance(error, (BlockingIOError, BrokenPipeError)):
            raise
        what, command = f"cannot write {path}: {os.strerror(code)}", _go_on(path)
        if command:
            advice = f"{_ADVICE[code]}, then " if code in _ADVICE else ""
            raise UserError(f"{what}; everything saved before is intact; {advice}go on with: {command}") from error
        advice = _ADVICE.get(code, "")
        elsewhere = "choose another place" if not advice else "or choose another folder" if code in _OF_THE_PLACE else ""
        raise UserError(f"{what}; {', '.join(filter(None, (advice, elsewhere)))}") from error


def _go_on(path: Path) -> str:
    """The command that goes on with the study, else the run, whose folder holds the path; "" outside of those that have begun.

    A user's own folder may hold a config.yaml too, but no lock.
    """
    folders = [folder for folder in (path, *path.parents) if os.path.isfile(folder / ".lock")]
    for name, command in (("study.yaml", "study"), ("config.yaml", "train")):
        for folder in folders:
            if os.path.isfile(folder / name):
                return f"fastppo {command} --resume {shlex.quote(str(folder))}"
    return ""


def _os_error_in_text(text: str) -> int | None:
    for code in _ADVICE:
        if f"(os error {code})" in text or os.strerror(code) in text:
            return code
    return None


def _sync(path: Path) -> None:
    # For a folder too: a rename is on the disk only once the folder that holds the name is.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes the file whole: after a crash at any instant, `path` holds the old content or the new."""
    with disk_errors(path):
        fresh = _temporary(path)
        try:
            fresh.write_bytes(data)
            _sync(fresh)
            os.replace(fresh, path)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: object) -> None:
    """`write_bytes` for JSON, indented; numbers that are not finite become null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`write_bytes` for one JSON object a line, which `read_json_lines` reads; numbers that are not finite become null."""
    write_text(path, "".join(map(_json_line, rows)))


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON's own types: numpy and torch scalars as numbers, paths as text, numbers that are not finite as null."""
    if hasattr(value, "item") and not isinstance(value, (dict, list, tuple)):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill; at the end of the block it takes the place of `path`, whole.

    A folder that stands at `path` is set aside for the instant between two renames, and `lock_run` puts it back if the
    process dies in that instant. If the block raises, `path` stays as it was.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh, aside = _temporary(path), path.with_name(f".{path.name}.old")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir()
            yield fresh
            for folder, _, names in os.walk(fresh, topdown=False):
                for name in names:
                    # safetensors makes files that only their owner may read, whatever the umask says.
                    os.chmod(Path(folder, name), fresh.stat().st_mode & 0o666)
                    _sync(Path(folder, name))
                _sync(Path(folder))
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
            os.rename(fresh, path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _clean(run: Path) -> None:
    """Removes what killed runs left under temporary names, and puts back a folder that was being replaced."""
    for folder, folders, names in os.walk(run):
        for name in [*names, *folders]:
            path = Path(folder, name)
            if name.startswith(".") and name.endswith(".tmp"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif name.startswith(".") and name.endswith(".old") and path.is_dir():
                place = path.with_name(name[1 : -len(".old")])
                shutil.rmtree(path) if place.exists() else path.rename(place)
        folders[:] = [name for name in folders if not name.startswith(".")]


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Makes the run folder if need be, keeps it for this process alone, and removes what killed runs left in it.

    The lock is the kernel's (flock on `RUN/.lock`), so it ends with the process, however that ends.

    Raises:
        UserError: another process trains in the folder.
    """
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / ".lock", "a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip()
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise UserError(f"run folder {run}: in use by {who}; wait for it, or choose another --out") from None
        with disk_errors(run):
            file.truncate(0)
            os.write(file.fileno(), b"%d\n" % os.getpid())  # past the buffer, which would be written once more at the end
            _clean(run)
        yield


def is_unused(run: Path) -> bool:
    """Whether a new run may begin there: no folder, or nothing in it but what a run that never began left behind."""
    try:
        return all(re.fullmatch(r"\.lock|\..*\.\d+\.tmp", entry.name) for entry in run.iterdir())
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UserError(f"folder {run}: cannot be used: {error.strerror}") from None


def unused(path: Path) -> Path:
    """The path, or the first of ``path-2``, ``path-3``, .. where a new run may begin."""
    chosen, n = path, 1
    while not is_unused(chosen):
        n += 1
        chosen = path.with_name(f"{path.name}-{n}")
    return chosen


def whole_path(value: str | None) -> str | None:
    """What is on this disk by its whole path, so that it is found from any folder; other names as they are."""
    path = os.path.expanduser(value) if value is not None else ""
    return os.path.abspath(path) if path and os.path.exists(path) else value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line that was cut off is left out.

    Raises:
        UserError: a line that is no JSON object (the message names the file and the line), or no such file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: is not a JSON object")
        rows.append(row)
    return rows


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is no such file, or it holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class JsonLines:
    """A file of one JSON object per line, only ever appended to, or cut back to where a checkpoint was taken."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; a last line that a killed run left cut off is removed."""
        self.path = path
        with disk_errors(path):
            self._file = open(path, "ab+", buffering=0)  # no buffer that a full disk would leave half written
            self._file.seek(0)
            data = self._file.readall()
            self._lines = data.count(b"\n")
            self._file.truncate(data.rfind(b"\n") + 1)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one line and hands it to the operating system, so that it outlives this process."""
        rest = memoryview(_json_line(row).encode("utf-8", errors="backslashreplace"))
        with disk_errors(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._lines += 1

    def tell(self) -> int:
        """How many lines there are; they are on the disk, not only with the operating system, when this returns."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
        return self._lines

    def truncate_to(self, n_lines: int) -> None:
        """Keeps the first `n_lines` lines, those that a checkpoint knows of.

        Raises:
            UserError: the file has fewer lines.
        """
        with disk_errors(self.path):
            self._file.seek(0)
            lines = self._file.readall().splitlines(keepends=True)
            if len(lines) < n_lines:
                raise UserError(f"{self.path}: has {len(lines)} lines, but the checkpoint was taken after {n_lines}")
            self._file.truncate(sum(map(len, lines[:n_lines])))
        self._lines = n_lines

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
