"""Takes from this process what only Linux and other Unix systems have; run before code that has to do without.

Libraries that were built for Linux keep what they need: they are imported first. This is no Windows: paths, file locks
and processes stay Linux's.
"""

import builtins
import importlib
import io
import os
import signal
import sys

UNIX_MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "curses")
UNIX_FUNCTIONS = (
    "sysconf", "sysconf_names", "sched_getaffinity", "sched_setaffinity", "getloadavg", "uname", "fork", "killpg",
    "getpgid", "setsid", "nice", "sync", "statvfs", "getuid", "geteuid", "getgid", "mkfifo", "chown", "posix_fadvise",
)  # fmt: skip
UNIX_SIGNALS = ("SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE")
LINUX_BUILDS = (
    "asyncio", "ctypes", "multiprocessing", "platform", "shutil", "subprocess", "tempfile", "datasets", "highspy",
    "matplotlib.pyplot", "optuna", "pandas", "safetensors.torch", "torch", "transformers.integrations.accelerate",
    "transformers.generation", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "yaml",
)  # fmt: skip


def leave_linux():
    sys.modules["triton"] = None  # torch and transformers do without it
    for name in LINUX_BUILDS:
        importlib.import_module(name)
    import torch

    torch.nn.functional.scaled_dot_product_attention(*[torch.zeros(1, 1, 2, 8)] * 3)
    for name in list(sys.modules):
        if name.partition(".")[0] in UNIX_MODULES:
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(UNIX_MODULES))
    for home, names in ((os, UNIX_FUNCTIONS), (signal, UNIX_SIGNALS)):
        for name in names:
            vars(home).pop(name, None)
    for home, name in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "open")):
        setattr(home, name, without_proc(getattr(home, name)))


def without_proc(function):
    def call(path, *arguments, **options):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(path, *arguments, **options)

    return call
