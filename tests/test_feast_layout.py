import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerberus.online import layout

int64 = st.integers(-(2**63), 2**63 - 1)


@given(int64)
def test_an_int64_comes_back(value):
    assert layout.decode(layout.encode_int64(value)) == value


@given(st.floats())
def test_a_double_comes_back_to_the_bit(value):
    decoded = layout.decode(layout.encode_double(value))
    assert struct.pack("<d", decoded) == struct.pack("<d", value)


@given(st.binary(max_size=500))
def test_bytes_come_back(value):
    assert layout.decode(layout.encode_bytes(value)) == value


@given(st.integers(-(10**15), 10**16))
def test_a_timestamp_comes_back_to_the_microsecond(us):
    assert layout.decode_timestamp(layout.encode_timestamp(us)) == us


def test_none_is_the_empty_value():
    assert layout.encode_int64(None) == layout.encode_double(None) == b""
    assert layout.decode(b"") is None


def test_a_foreign_type_is_refused():
    with pytest.raises(ValueError, match="0x12"):
        layout.decode(b"\x12\x01a")


def test_the_golden_bytes_of_the_format():
    assert layout.entity_key(7, "labproj").hex() == (
        "01000000" "02000000" "07000000" "757365725f6964" "04000000" "08000000"
        "0700000000000000" "6c616270726f6a"
    )  # fmt: skip
    assert layout.encode_int64(0) == b"\x20\x00"
    assert layout.encode_timestamp(1_500_000) == b"\x08\x01\x10\x80\xca\xb5\xee\x01"


@pytest.mark.parametrize(("age_us", "alive"), [(0, True), (5_000_000, True), (5_000_001, False)])
def test_a_row_lives_exactly_as_long_as_training_sees_it(age_us, alive):
    plan = layout.Plan("p", {"v": 5_000}, {})
    assert plan.alive("v", layout.encode_timestamp(10_000_000 - age_us), 10_000) is alive
