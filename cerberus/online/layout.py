"""Feast's Redis layout, read and written without importing Feast.

The layout is part of Feast's public contract; the code follows Feast 0.67, entity key format 3. One
entity is one hash: key = serialised entity + project, field = murmur3 of "view:feature", value =
a serialised `feast.types.Value`, and `_ts:<view>` = a serialised protobuf Timestamp.
"""

import pathlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import mmh3
import orjson

from cerberus import documents, errors

PROJECT = "cerberus"
_USER = struct.pack("<II", 1, 2) + struct.pack("<I", 7) + b"user_id" + struct.pack("<II", 4, 8)
_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_U64 = 1 << 64

Scalar = int | float | bytes | None


def entity_key(user_id: int, project: str) -> bytes:
    """Return the Redis key of the hash that all views of a user share."""
    return _USER + _I64.pack(user_id) + project.encode()


def field(view: str, feature: str) -> bytes:
    """Return the hash field of a feature: 4 bytes."""
    return struct.pack("<I", mmh3.hash(f"{view}:{feature}", signed=False))


def ts_field(view: str) -> bytes:
    """Return the hash field of a view's event timestamp."""
    return b"_ts:" + view.encode()


def _varint(value: int) -> bytes:
    out = bytearray()
    value %= _U64
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value - _U64 if value >= 1 << 63 else value, at
        shift += 7


def encode_int64(value: int | None) -> bytes:
    """Write an Int64; None is the empty value."""
    return b"" if value is None else b"\x20" + _varint(value)


def encode_double(value: float | None) -> bytes:
    """Write a Float64; None is the empty value."""
    return b"" if value is None else b"\x29" + _F64.pack(value)


def encode_bytes(value: bytes) -> bytes:
    """Write a Bytes value."""
    return b"\x0a" + _varint(len(value)) + value


def encode_timestamp(us: int) -> bytes:
    """Write µs since the Unix epoch as a protobuf Timestamp; zero parts are left out."""
    seconds, rest = divmod(us, 1_000_000)
    head = b"\x08" + _varint(seconds) if seconds else b""
    return head + (b"\x10" + _varint(rest * 1000) if rest else b"")


def decode_timestamp(data: bytes) -> int:
    """Read a protobuf Timestamp as µs since the Unix epoch."""
    seconds = nanos = at = 0
    while at < len(data):
        tag = data[at]
        value, at = _read_varint(data, at + 1)
        if tag == 0x08:
            seconds = value
        else:
            nanos = value
    return seconds * 1_000_000 + nanos // 1000


def stamp_ms(data: bytes | None) -> int:
    """Read a protobuf Timestamp as ms since the Unix epoch; 0 when there is none."""
    return decode_timestamp(data) // 1000 if data else 0


def decode(data: bytes) -> Scalar:
    """Read a Value of the three types that the views use; the empty value is None.

    Raises:
        ValueError: The value has another type.
    """
    if not data:
        return None
    tag = data[0]
    if tag == 0x20:
        return _read_varint(data, 1)[0]
    if tag == 0x29:
        value: float = _F64.unpack_from(data, 1)[0]
        return value
    if tag == 0x0A:
        length, at = _read_varint(data, 1)
        return data[at : at + length]
    raise ValueError(f"a Feast value with tag 0x{tag:02x} is not one of Int64, Float64, Bytes")


@dataclass(frozen=True, slots=True)
class Plan:
    """What serving must know about the applied registry.

    Attributes:
        project: Feast's project.
        ttl_ms: How long a view's row is valid, one entry a view; 0 is for ever.
        schema: Type name of each feature, by view.
    """

    project: str
    ttl_ms: Mapping[str, int]
    schema: Mapping[str, Mapping[str, str]]

    def alive(self, view: str, stamp: bytes, now_ms: int) -> bool:
        """Return whether a row with this stamp may be served: `now − stamp ≤ ttl`, as in training.

        Feast's own online reads do not check this. A stamp ahead of `now` is alive: a stream's
        frontier may lead the clock by the allowed skew.
        """
        ttl_ms = self.ttl_ms[view]
        return not ttl_ms or now_ms * 1000 - decode_timestamp(stamp) <= ttl_ms * 1000

    def pack(self) -> bytes:
        """Write the plan as the JSON that stands beside the model."""
        options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
        return orjson.dumps(self, option=options)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Plan":
        """Read what `pack` wrote, of a later version too: unknown fields are ignored.

        Raises:
            ModelMismatch: The message says how to write it again.
        """
        try:
            told = documents.read(path.read_bytes())
            return cls(**{name: told[name] for name in cls.__slots__ if name in told})
        except (OSError, ValueError, TypeError) as error:
            raise errors.ModelMismatch(
                f"{path} is not a feature plan ({error}); "
                "`python -m cerberus features compile` writes one"
            ) from error
