"""What cc-proxyctl makes of a daemon's answers to `status`, with texts in them that others chose.

`ProtocolError` may be raised for what is no status. What is one becomes lines that do nothing to a terminal.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from cc_proxy.api import messages
from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.payloads import Response
from cc_proxy.api.status import Status
from cc_proxy.ctl.overview import overview
from tests.fuzz.choices import Choices
from tests.fuzz.grammar import object_text

_WORDS = ("success", "error", "data", "vms", "version", "id", "ended")


def run(choices: Choices) -> None:
    """A response that is right but for some of its values, or any object."""
    text = object_text(choices, _WORDS) if choices.number(3) == 0 else _answer(choices)
    try:
        response = messages.decode(text, Response)
        status = messages.decode(bytes(response.data or b"{}"), Status)
    except ProtocolError:
        return
    shown = overview(status)
    assert shown.endswith("\n")
    assert all(line.isprintable() for line in shown.split("\n"))


def _answer(choices: Choices) -> bytes:
    data = _made(choices, msgspec.json.schema(Status)["$defs"], "Status")
    return json.dumps({"success": True, "data": data}).encode(errors="replace")


def _made(choices: Choices, kinds: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        member: _value(choices, kinds, schema)
        for member, schema in kinds[name]["properties"].items()
        if choices.number(60) != 1
    }


def _value(choices: Choices, kinds: dict[str, Any], schema: dict[str, Any]) -> Any:
    """A value that the schema asks for, mostly."""
    if "anyOf" in schema:
        return _value(choices, kinds, choices.pick(schema["anyOf"]))
    if "$ref" in schema:
        return _made(choices, kinds, schema["$ref"].rpartition("/")[2])
    kind = schema["type"] if choices.number(60) != 1 else choices.pick(("string", "null"))
    if kind == "array":
        return choices.some(4, lambda: _value(choices, kinds, schema["items"]))
    return _plain(choices, kind)


def _plain(choices: Choices, kind: str) -> Any:
    if kind == "integer":
        return choices.pick((0, 1, 2, 2**62, -1))
    if kind == "number":
        return choices.pick((0.0, 0.5, 61.0, 90_000.0, 1e300, -1.0))
    if kind == "boolean":
        return choices.yes()
    return choices.raw().decode(errors="replace") if kind == "string" else None
