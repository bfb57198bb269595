"""Compile the CPU kernel once per machine and source, and load it.

The library lives in the cache folder of the user, `$XDG_CACHE_HOME/vision-attn` or `~/.cache/vision-attn`. It is built
under another name and then renamed, and ends with a checksum of itself: a build that was killed, ran twice or left a
damaged file behind is never loaded. `VISION_ATTN_NATIVE` switches the kernel off (0) or names the instruction set.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SOURCES = tuple(sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".cpp", ".h")))
FLAGS = ("-O3", "-fPIC", "-shared", "-std=c++17", "-pthread", "-fno-math-errno", "-ffp-contract=fast")

# Slowest first. Each is a library of its own: one that a processor lacks is never loaded.
PATHS = {
    "portable": ("-DLANES=4",),
    "avx2": ("-DLANES=8", "-mavx2", "-mfma"),
    "avx512": (
        "-DLANES=16", "-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq",
        "-mprefer-vector-width=512",
    ),
}  # fmt: skip

SWITCH = "VISION_ATTN_NATIVE"
SECONDS = 20  # what a build takes on one free core, for the message
PATIENCE = 300  # seconds after which a compiler, or another process that builds the same, is given up on

_MARK = b"vision-attn sha256 "

_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}  # by what the switch says
_failed: dict[str, str] = {}  # by instruction set


def instruction_set() -> str:
    """The widest of `PATHS` that this processor has, or the one that `VISION_ATTN_NATIVE` names."""
    asked = os.environ.get(SWITCH, "")
    return asked if asked in PATHS else _widest()


@functools.cache
def _widest() -> str:
    import torch

    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")


def missing() -> list[str]:
    """Why there is no kernel here: switched off, no compiler, or the build failed. Does not build."""
    asked = os.environ.get(SWITCH, "")
    if asked in _loaded:
        return []
    if asked == "0":
        return [f"switched off by {SWITCH}=0"]
    if asked not in ("", "1", *PATHS):
        return [f"{SWITCH}={asked!r}; allowed: 0, 1, {', '.join(PATHS)}"]
    if list(PATHS).index(instruction_set()) > list(PATHS).index(_widest()):
        return [f"{SWITCH}={asked}, but this processor offers {_widest()}"]
    if instruction_set() in _failed:
        return [_failed[instruction_set()]]
    if sys.platform == "win32":
        return ["the kernel does not build on Windows"]
    if compiler() is None and not any(_cached_by_anyone()):
        return ["no C++ compiler found (tried CXX, c++, g++, clang++); install one, for example g++"]
    return []


def compiler() -> tuple[str, ...] | None:
    """The C++ compiler to call: what `CXX` says, or the first of c++, g++ and clang++."""
    if os.environ.get("CXX", "").strip():
        command = tuple(shlex.split(os.environ["CXX"]))
        return command if shutil.which(command[0]) else None
    return next(((found,) for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def library() -> ctypes.CDLL:
    """The loaded kernel; compiles it first where that was not done yet. Raises RuntimeError with the reason."""
    asked = os.environ.get(SWITCH, "")
    if asked in _loaded:
        return _loaded[asked]
    with _lock:
        if reasons := missing():
            raise RuntimeError(f"no CPU kernel: {'; '.join(reasons)}")
        if asked not in _loaded:
            try:
                _loaded[asked] = _declare(ctypes.CDLL(str(_find() or _build())))
            except (OSError, subprocess.SubprocessError) as error:  # not tried again in this process
                _failed[instruction_set()] = f"the CPU kernel could not be built: {error}"
                raise RuntimeError(_failed[instruction_set()]) from error
        return _loaded[asked]


def load() -> bool:
    """Have the kernel ready to run; False when that failed, and then `missing` says why."""
    with contextlib.suppress(RuntimeError):
        return library() is not None
    return False


def _team() -> int | None:
    """Address of the function that starts threads in the OpenMP runtime that torch has loaded; None where there is
    none of that kind."""
    try:
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
        (path,) = (path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp")))
        return ctypes.cast(ctypes.CDLL(path, os.RTLD_NOLOAD).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, ValueError, AttributeError):  # another system, no such library or several, another runtime
        return None


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    lanes = getattr(lib, "vision_attn_lanes", None)
    if lanes is None or lanes() != int(PATHS[instruction_set()][0].partition("=")[2]):
        raise OSError("what the compiler wrote is not the kernel")
    lib.vision_attn_use_team(ctypes.c_void_p(_team()))
    return lib


def _source_key() -> str:
    text = repr((FLAGS, PATHS[instruction_set()], platform.machine(), sys.platform))
    parts = [text.encode(), *(p.name.encode() + b"\0" + p.read_bytes() for p in SOURCES)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@functools.cache
def _compiler_key(command: tuple[str, ...]) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, timeout=PATIENCE).stdout
    return hashlib.sha256(repr(command).encode() + version).hexdigest()[:8]


def _name(compiler_key: str) -> str:
    return f"attention-{instruction_set()}-{_source_key()}-{compiler_key}.so"


def _cached_by_anyone() -> Iterator[Path]:
    """Libraries of this source that any compiler built; for machines that have none."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            yield from (p for p in sorted(folder.glob(_name("*"))) if _whole(p))


def _find() -> Path | None:
    command = compiler()
    if command is None:
        return next(_cached_by_anyone(), None)
    name = _name(_compiler_key(command))
    return next((f / name for f in _folders() if _whole(f / name)), None)


def _folders() -> list[Path]:
    """Where libraries may lie: the cache of the user, then a private folder among the temporary files."""
    folders = []
    with contextlib.suppress(RuntimeError):  # no home
        folders.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vision-attn")
    owner = os.getuid() if hasattr(os, "getuid") else "me"
    return [*folders, Path(tempfile.gettempdir()) / f"vision-attn-{owner}"]


def _whole(path: Path) -> bool:
    """Complete and ours: the file ends with the checksum of what stands before, nobody else may write it."""
    try:
        about, data = path.stat(), path.read_bytes()
    except OSError:
        return False
    if hasattr(os, "getuid") and about.st_uid not in (os.getuid(), 0) or about.st_mode & stat.S_IWOTH:
        return False
    body, mark, digest = data.rpartition(_MARK)
    return bool(mark) and digest == hashlib.sha256(body).hexdigest().encode()


def _writable() -> Path:
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
            if hasattr(os, "getuid") and about.st_uid != os.getuid() or about.st_mode & stat.S_IWOTH:
                continue
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="vision-attn-"))


def _build() -> Path:
    command = compiler()
    if command is None:
        raise OSError("no C++ compiler, and the library in the cache was removed")
    folder = _writable()
    path = folder / _name(_compiler_key(command))
    with _alone(path.with_suffix(".lock")):
        if _whole(path):  # another process was faster
            return path
        where = "" if folder == _folders()[0] else f" into {folder}, as {_folders()[0]} cannot be written"
        print(f"vision-attn: building the CPU kernel{where} (once, about {SECONDS} s) ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        for left in folder.glob("*.part"):  # by builds that were killed
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 2 * PATIENCE:
                    left.unlink()
        handle, part = tempfile.mkstemp(suffix=".part", dir=folder)
        os.close(handle)
        try:
            sources = [str(p) for p in SOURCES if p.suffix == ".cpp"]
            call = [*command, *FLAGS, *PATHS[instruction_set()], *sources, "-o", part]
            done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                said = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
                raise OSError(f"{command[0]} ended with {done.returncode}: {said}")
            body = Path(part).read_bytes()
            with open(part, "ab") as file:
                file.write(_MARK + hashlib.sha256(body).hexdigest().encode())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)
        print(f"vision-attn: built in {time.monotonic() - started:.0f} s: {path}", file=sys.stderr, flush=True)
    return path


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process build at a time, to save work only: whoever waited too long, or cannot lock, builds as well.

    The system lifts the lock of a process that ends, however it ends.
    """
    try:
        import fcntl

        file = open(path, "w")
    except (ImportError, OSError):
        yield
        return
    with file:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        yield
