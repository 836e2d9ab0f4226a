"""Fuzzes one target: `python -m tests.fuzz.worker TARGET ARGUMENT...`, with libFuzzer's arguments."""

from __future__ import annotations

import sys

import atheris

from tests.fuzz.choices import Choices

#: What is measured while it runs. TOML is decoded in Python, JSON is not.
_INSTRUMENTED = ["cc_proxy", "tests.fuzz.targets", "tests.fuzz.grammar", "tomllib"]


def main() -> None:
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=_INSTRUMENTED):
        from tests.fuzz.targets import load  # noqa: PLC0415 - what is imported here is instrumented

        run = load(name)
    # libFuzzer has a shell begin it again, in place of what has crashed.
    again = f"{sys.executable} -m tests.fuzz.worker {name}"
    atheris.Setup([again, *arguments], lambda data: run(Choices(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
