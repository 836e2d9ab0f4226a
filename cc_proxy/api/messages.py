"""Client messages as bytes (docs/protocol.md, 1): framing and JSON, no I/O.

`encode` makes the bytes of one message. `MessageParser` splits a byte stream, which may arrive in arbitrary
pieces, into the texts of messages. `decode` turns such a text into a typed value.
"""

import functools
import re
import struct
from typing import Any, TypeVar

import msgspec

from cc_proxy.api.errors import ProtocolError

#: Longest JSON text of a message, in bytes.
MAX_TEXT = 1024 * 1024
#: Longest JSON text of a response that the runtime in the field accepts.
MAX_RESPONSE = 1024
#: Longest JSON text of the response to `status`, which that runtime never asks for.
MAX_STATUS = 16 * 1024 * 1024
#: The header: length of the text, and 4 reserved bytes that are 0.
HEADER = struct.Struct(">II")

#: How deep arrays and objects may be nested in a text.
MAX_NESTING = 200

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_STRINGS_AND_BRACKETS = re.compile(_STRINGS.pattern + rb"|[\[\]{}]", re.DOTALL)

T = TypeVar("T", bound=msgspec.Struct)

_encoder = msgspec.json.Encoder()


def frame_text(text: bytes, limit: int = MAX_TEXT) -> bytes:
    """Return a JSON text with its header before it.

    Raises `ProtocolError` if the text is longer than `limit` bytes.
    """
    if len(text) > limit:
        raise ProtocolError(f"a message of {len(text)} bytes is over the limit of {limit}")
    return HEADER.pack(len(text), 0) + text


def encode(message: msgspec.Struct, limit: int = MAX_TEXT) -> bytes:
    """Return one whole message: the header and compact JSON.

    Raises `ProtocolError` if the text is longer than `limit` bytes.
    """
    return frame_text(_encoder.encode(message), limit)


def text_length(header: bytes | bytearray | memoryview, limit: int = MAX_TEXT) -> int:
    """Return the length of the text that follows the 8 bytes of `header`.

    Raises `ProtocolError` for a length over `limit` or a reserved field that is not 0.
    """
    length, reserved = HEADER.unpack(header)
    if length > limit:
        raise ProtocolError(f"a message announces {length} bytes, the limit is {limit}")
    if reserved:
        raise ProtocolError(f"the reserved field of a message header is {reserved:#x}, not 0")
    return int(length)


@functools.cache
def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


class MemberError(ProtocolError):
    """The text is a JSON object, but a member does not fit the wanted type; the error names it."""


def decode(text: bytes, kind: type[T]) -> T:
    """Decode the JSON text of a message.

    Raises `ProtocolError` if the text is not UTF-8 or not a JSON object; its subclass `MemberError` if it is
    an object, but not one that `kind` describes, or is nested deeper than `MAX_NESTING`.
    """
    try:
        str(text, "utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"not UTF-8: {error.reason}") from None
    try:
        if len(text) > MAX_NESTING and text.count(b"[") + text.count(b"{") > MAX_NESTING:
            _check_nesting(text)
        message: T = _decoder(kind).decode(text)
        return message
    except ValueError as error:
        if _is_object(text):
            raise MemberError(str(error)) from None
        raise ProtocolError(f"not a JSON object: {error}") from None


def _is_object(text: bytes) -> bool:
    """Whether a text is a JSON object at all. Only for text that is not nested too deeply."""
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except ValueError:
        return False
    return True


def _check_nesting(text: bytes) -> None:
    """Refuse text that is nested too deeply for the decoder, which recurses for each level.

    From the level that is too deep on, only the numbers of opening and closing brackets are compared: going
    through all of them would take long. Raises `MemberError`, or `ProtocolError` if the numbers differ.
    """
    depth = 0
    for token in _STRINGS_AND_BRACKETS.finditer(text):
        first = text[token.start()]
        depth += (first in b"[{") - (first in b"]}")
        if depth > MAX_NESTING:
            break
    else:
        return
    bare = _STRINGS.sub(b"", text)
    opened, closed = (sum(map(bare.count, kinds)) for kinds in ((b"[", b"{"), (b"]", b"}")))
    if opened != closed or not text.lstrip().startswith(b"{"):
        raise ProtocolError("not a JSON object")
    raise MemberError(f"nested more than {MAX_NESTING} levels deep")


class MessageParser:
    """Splits a byte stream into the JSON texts of its messages.

    Pass what arrives to `receive_data`, then call `next_text` until it returns None. The parser holds only
    bytes that have arrived: it allocates no memory for a length that is merely announced.
    """

    def __init__(self) -> None:
        self._data: bytes | bytearray = b""
        self._pos = 0

    @property
    def missing(self) -> int:
        """After `next_text` returned None: how many bytes of the next message are known to be missing."""
        held = len(self._data) - self._pos
        if held < HEADER.size:
            return HEADER.size - held
        return HEADER.size + text_length(self._data[self._pos : self._pos + HEADER.size]) - held

    @property
    def unfinished(self) -> bool:
        """After `next_text` returned None: whether a message has begun to arrive."""
        return self._pos < len(self._data)

    @property
    def unread(self) -> bytes:
        """What has arrived, but was not returned by `next_text`."""
        return bytes(self._data[self._pos :])

    def receive_data(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        if self.unfinished:
            if not isinstance(self._data, bytearray) or self._pos:
                self._data = bytearray(self._data[self._pos :])
            self._data += data
        else:
            self._data = data
        self._pos = 0

    def next_text(self) -> bytes | None:
        """Return the next whole JSON text, or None if more has to arrive first.

        Raises `ProtocolError` for an invalid header; the stream is unusable after that.
        """
        begin = self._pos + HEADER.size
        if len(self._data) < begin:
            return None
        end = begin + text_length(self._data[self._pos : begin])
        if len(self._data) < end:
            return None
        text = bytes(self._data[begin:end])
        self._pos = end
        if not self.unfinished:
            self._data, self._pos = b"", 0
        return text
