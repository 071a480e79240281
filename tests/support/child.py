# SPDX-License-Identifier: Apache-2.0
"""What a child process of the tests starts with: dies with the thread that started it, leads a session.

child.py exec COMMAND [ARGUMENT...]
child.py call FILE FUNCTION RESULT-FD    (pickled arguments on standard input)

An asynchronous function runs in Trio, with warnings as errors.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_PDEATHSIG")
    if sys.argv[1] == "exec":
        os.execvp(sys.argv[2], sys.argv[2:])
    _call()


def _call() -> None:
    import functools  # only here: of most children the command is what takes time
    import importlib.util
    import inspect
    import pickle
    import warnings

    path, name, result_fd = sys.argv[2:]
    # The test's module, from its file: it has no name that another process could import it by.
    spec = importlib.util.spec_from_file_location("_module_under_test", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    arguments, keywords = pickle.loads(sys.stdin.buffer.read())
    spec.loader.exec_module(module)
    function = getattr(module, name)
    if inspect.iscoroutinefunction(function):
        import trio  # only here: most children start without it

        warnings.simplefilter("error")
        result = trio.run(functools.partial(function, *arguments, **keywords))
    else:
        result = function(*arguments, **keywords)
    with open(int(result_fd), "wb") as file:
        pickle.dump(result, file)


if __name__ == "__main__":
    main()
