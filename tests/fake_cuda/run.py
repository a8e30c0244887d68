"""Runs a module on a fake GPU: `python -m tests.fake_cuda.run MODULE [ARGUMENT ...]`.

The module's `main` gets the arguments as a list of strings, and prints JSON lines.
"""

import importlib
import os
import sys
import traceback

from tests.fake_cuda import install


def main() -> None:
    name, *arguments = sys.argv[1:]
    install(os.environ.get("FAKE_DEVICE", "H200"))
    code = 1
    try:
        importlib.import_module(f"tests.fake_cuda.{name}").main(arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: destructors at the end of the interpreter may meet the replaced parts of CUDA
    # and end in a segmentation fault.
    os._exit(code)


if __name__ == "__main__":
    main()
