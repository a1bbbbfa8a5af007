"""What is made up: messages of a descriptor, and bytes that are nearly right."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

_SIGNED: Final = {
    FieldDescriptor.TYPE_INT32: 31,
    FieldDescriptor.TYPE_SINT32: 31,
    FieldDescriptor.TYPE_SFIXED32: 31,
    FieldDescriptor.TYPE_ENUM: 31,
    FieldDescriptor.TYPE_INT64: 63,
    FieldDescriptor.TYPE_SINT64: 63,
    FieldDescriptor.TYPE_SFIXED64: 63,
}
_UNSIGNED: Final = {
    FieldDescriptor.TYPE_UINT32: 32,
    FieldDescriptor.TYPE_FIXED32: 32,
    FieldDescriptor.TYPE_UINT64: 64,
    FieldDescriptor.TYPE_FIXED64: 64,
}
#: Words that mean something somewhere.
WORDS: Final = (
    "",
    ".",
    "..",
    "../x",
    "/",
    "/etc/passwd",
    "a/b",
    "a\0b",
    "\n",
    "x" * 300,
    "core-1.img",
    "a",
    "%s{}",
    "é",
)
DEPTH: Final = 4


def texts() -> SearchStrategy[str]:
    return st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))


def numbers(low: int, high: int) -> SearchStrategy[int]:
    near = [each for each in (low, low + 1, -1, 0, 1, 2, 4096, high - 1, high) if low <= each <= high]
    return st.one_of(st.sampled_from(near), st.integers(low, high))


def messages(descriptor: Descriptor, depth: int = DEPTH) -> SearchStrategy[Message]:
    """Any message of this type, with values at the edges of what its fields can hold."""
    parts = {each.name: _field(each, depth) for each in descriptor.fields if depth or not each.message_type}
    return st.fixed_dictionaries({}, optional=parts).map(lambda values: _message(descriptor, values))


def _field(field: FieldDescriptor, depth: int) -> SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return st.dictionaries(_value(key, depth), _value(value, depth), max_size=2)
    one = _value(field, depth)
    return st.lists(one, max_size=3) if field.is_repeated else one


def _value(field: FieldDescriptor, depth: int) -> SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type, depth - 1)
    if (bits := _SIGNED.get(field.type)) is not None:
        return numbers(-(1 << bits), (1 << bits) - 1)
    if (bits := _UNSIGNED.get(field.type)) is not None:
        return numbers(0, (1 << bits) - 1)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_STRING:
        return texts()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=64)
    return st.floats()


def _message(descriptor: Descriptor, values: dict[str, Any]) -> Message:
    message = GetMessageClass(descriptor)()
    for name, value in values.items():
        field = descriptor.fields_by_name[name]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, name).update(value)
        elif field.is_repeated:
            getattr(message, name).extend(value)
        elif field.message_type is not None:
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


@st.composite
def damaged(draw: st.DrawFn, whole: SearchStrategy[bytes]) -> bytes:
    """Bytes that were right, and then were cut, changed or repeated in a few places."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0:
                del data[place:]
            case 1:
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case 2:
                data[place:place] = draw(st.binary(max_size=16))
            case 3:
                del data[place : place + draw(st.integers(1, 16))]
            case _:
                data[place : place + 4] = draw(
                    st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
                )
    return bytes(data)


def nearly(whole: SearchStrategy[bytes]) -> SearchStrategy[bytes]:
    """Right, nearly right, or anything."""
    return st.one_of(damaged(whole), st.binary(max_size=200))
