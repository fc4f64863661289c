"""Commands in processes of their own: closed and full standard streams, locales, Ctrl-C and system limits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from xl2jax.bench import command as bench
from xl2jax.commands.infer import main as infer_main
from xl2jax.errors import UserError
from xl2jax.system.backend import start_backend
from xl2jax.system.terminal import argument_text, explain

ROOT = Path(__file__).parent.parent
HELLO = "print('caf\\u00e9'); print('told', file=sys.stderr)"
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line: str, body: str = HELLO, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs `line` in a shell, in which $COMMAND runs `body` under run_command."""
    program = f"import sys\nfrom xl2jax.system.terminal import run_command\ndef main():\n {body}\nrun_command(main)"
    variables = os.environ | {"PYTHON": sys.executable, "PROGRAM": program, "PYTHONPATH": str(ROOT)} | (env or {})
    line = line.replace("$COMMAND", '"$PYTHON" -c "$PROGRAM"')
    return subprocess.run(["bash", "-c", line], env=variables, capture_output=True, timeout=60, check=False)


def test_open_streams() -> None:
    run = shell("$COMMAND")
    assert (run.returncode, run.stdout, run.stderr) == (0, b"caf\xc3\xa9\n", b"told\n")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2> >(exit 0)"])
def test_an_unusable_stderr_does_not_lose_the_answer(redirection: str) -> None:
    run = shell(f"$COMMAND {redirection}", f"import time; time.sleep(0.2); {HELLO}; print('more', file=sys.stderr)")
    assert (run.returncode, run.stdout) == (0, b"caf\xc3\xa9\n")


@pytest.mark.parametrize(("redirection", "reason"), [(">&-", b"closed"), (">/dev/full", b"No space left on device")])
def test_an_unusable_stdout_is_an_error(redirection: str, reason: bytes) -> None:
    run = shell(f"$COMMAND {redirection}", "print('x')")
    assert run.returncode == 2
    assert run.stderr.startswith(b"error: standard output ")
    assert reason in run.stderr
    assert run.stderr.count(b"\n") == 1


def test_a_closed_pipe() -> None:
    run = shell("$COMMAND | true; exit ${PIPESTATUS[0]}", "import time; time.sleep(0.2); print('x' * 10**6)")
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, b"")


def test_files_do_not_get_descriptors_of_closed_streams(tmp_path: Path) -> None:
    """The first file that a process opens must not get the descriptor of a closed stream, and with it its messages."""
    run = shell(
        f"$COMMAND >&- 2>&- <&-; cat {tmp_path}/f", f"f = open('{tmp_path}/f', 'w'); print('x', file=sys.stderr)"
    )
    assert run.stdout == b""


def test_text_in_an_ascii_locale() -> None:
    body = "from xl2jax.system.terminal import argument_text; print(argument_text(sys.argv[1]))"
    run = shell("$COMMAND $'caf\\xc3\\xa9 \\xe4\\xb8\\xad'", body, C_LOCALE)
    assert (run.returncode, run.stdout.decode()) == (0, "café 中\n")
    assert argument_text("caf\udce9") == "caf\udce9"  # Latin-1 stays as it is, and `check_unicode` refuses it


def infer(*flags: object, redirection: str = "") -> subprocess.CompletedProcess[str]:
    line = f'exec "$0" infer.py "$@" {redirection}'
    command = ["bash", "-c", line, sys.executable, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_streams_are_checked_before_anything_slow() -> None:
    run = infer("--video", "/none.mp4", "--question", "x", redirection=">&-")
    assert (run.returncode, run.stderr.splitlines()) == (
        2, ["error: standard output is closed: the answer could not be written anywhere"],
    )  # fmt: skip
    run = infer("--video", "/none.mp4", "--interactive", redirection="<&-")
    assert (run.returncode, run.stderr.splitlines()) == (
        2, ["error: standard input is closed: --interactive has no questions to read"],
    )  # fmt: skip


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.6, 1.2])
def test_ctrl_c_at_any_time_is_one_line(seconds: float) -> None:
    """This includes the time of imports, when modules may raise another error."""
    program = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import xl2jax.system.terminal
print('ready', flush=True)
import runpy
runpy.run_path('infer.py', run_name='__main__')"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--video", "/dev/null", "--question", "x"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert (process.returncode, last) == (130, "interrupted") or (process.returncode, last[:6]) == (2, "error:")


def test_ctrl_c_in_a_callback_is_noticed() -> None:
    """JAX has a callback in the garbage collector, and Python ignores exceptions of such callbacks."""
    body = """import gc, signal, time
 signal.signal(signal.SIGINT, signal.default_int_handler)
 gc.callbacks.append(lambda phase, _: phase == 'start' and gc.callbacks.pop() and signal.raise_signal(signal.SIGINT))
 gc.collect()
 time.sleep(5)
 print('went on')"""
    run = shell("$COMMAND", body)
    assert (run.returncode, run.stdout, run.stderr) == (130, b"", b"interrupted\n")


def test_ctrl_c_does_not_wait_for_threads() -> None:
    """Those of copies of a model still compute then. A second Ctrl-C, while they are waited for, would be a traceback."""
    body = """import signal, threading, time
 threading.Thread(target=time.sleep, args=(50,)).start()
 signal.raise_signal(signal.SIGINT)"""
    started = time.monotonic()
    run = shell("$COMMAND", f"import signal\n signal.signal(signal.SIGINT, signal.default_int_handler)\n {body}")
    assert (run.returncode, run.stdout, run.stderr) == (130, b"", b"interrupted\n")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("a\nb"), "a\nb"),
        (MemoryError(), "out of host memory"),
        (ImportError("libx.so: failed to map segment: Cannot allocate memory"), "out of host memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of host memory"),
        (RuntimeError("can't start new thread"), "no more threads"),
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
        (RuntimeError("Unable to initialize backend 'cpu': INVALID_ARGUMENT"), "XLA_FLAGS may be wrong"),
        (ValueError("a fault of the program"), None),
    ],
)
def test_errors_of_the_machine_are_one_line(error: Exception, words: str | None) -> None:
    line = explain(error)
    assert (line is None) if words is None else (line is not None and words in line)


def test_a_platform_that_is_not_available() -> None:
    program = "from xl2jax.system.terminal import run_command\nfrom xl2jax.system.backend import start_backend\nrun_command(start_backend)"
    env = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "JAX cannot start on the platform cuda" in run.stderr
    assert "Traceback" not in run.stderr


def test_programs_are_cached_unless_the_user_set_it_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    mine = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start_backend()
    assert jax.config.jax_compilation_cache_dir == mine  # the setting of the tests
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(jax.config, "update", lambda name, value: updates.update({name: value}))
    updates: dict[str, object] = {}
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
    start_backend(keep_programs=False)
    assert updates == {}
    start_backend()
    assert str(updates["jax_compilation_cache_dir"]).startswith(str(tmp_path / "xl2jax" / "programs" / "cpu-"))
    assert 0 < int(str(updates["jax_compilation_cache_max_size"])) <= 8 << 30
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    updates.clear()
    start_backend()  # warns that nothing is cached, and continues
    assert updates == {}


def twice(env: dict[str, str], command: list[str]) -> list[dict[str, int]]:
    """The counts of two runs of a command that prints {"programs": ...}."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | env
    runs = [subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True) for _ in range(2)]
    return [json.loads(run.stdout)["programs"] for run in runs]


def test_a_second_run_reads_cached_programs(tmp_path: Path) -> None:
    program = """
import json
from xl2jax.system.backend import program_count, start_backend
count = program_count()
start_backend()
import jax
jax.jit(lambda x: x * 2 + 1)(3.0)
print(json.dumps({"programs": {"compiled": count.compiled, "from_cache": count.from_cache}}))"""
    first, second = twice({"XDG_CACHE_HOME": str(tmp_path)}, [sys.executable, "-c", program])
    assert first["compiled"] > 0
    assert second == {"compiled": 0, "from_cache": first["compiled"]}


@pytest.mark.slow
def test_a_second_run_of_infer_compiles_nothing(checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    flags = ["--video", clip, "--checkpoint", checkpoint, "--question", "What?", "--json"]
    first, second = twice({"XDG_CACHE_HOME": str(tmp_path)}, [sys.executable, "infer.py", *map(str, flags)])
    assert first["compiled"] > 10
    assert second == {"compiled": 0, "from_cache": first["compiled"]}


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (infer_main, ("--video", "a", "--max-frame", 3), "--max-frame, 3; Perhaps you meant: --max-frames INT"),
        (infer_main, ("--video", "a", "--max-frames", "x"), "--max-frames: invalid literal for int()"),
        (infer_main, ("--video", "a", "--dtype", "int4"), "invalid choice 'int4' for argument '--dtype'"),
        (infer_main, ("--video", "a", "--max-frames", "x" * 150), "'" + "x" * 150 + "'"),
        (train.main, ("--bar",), "Unrecognized options: --bar"),
        (bench.main, ("foo",), "Unrecognized options: foo; Available subcommands: prefill"),
    ],
)
def test_a_wrong_flag_is_one_line(
    refused: Callable[..., str], main: Callable[[], int], flags: tuple[object, ...], message: str
) -> None:
    line = refused(main, *flags)
    assert message in line
    assert line.endswith("--help)")


def test_help_on_a_narrow_terminal() -> None:
    env = os.environ | {"COLUMNS": "3"}
    run = subprocess.run(
        [sys.executable, "infer.py", "--help"], cwd=ROOT, env=env, capture_output=True, timeout=60, check=False
    )
    assert run.returncode == 0
    assert b"--video" in run.stdout
