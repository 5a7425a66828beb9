"""What nobody expects: values, arrays, JSON and files."""

import json

import numpy as np
from hypothesis import strategies as st

DEEP = "a very deep one"  # stands in JSON for what Python's own writer does not write
LARGE = "a very large one"
NUMBERS = [0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, 2**64, -(2**63) - 1, 10**400]
FLOATS = [0.0, -0.0, 0.5, 1.5, -2.5, 1e-320, 1e39, 1e308, -1e308, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", "x", "0", "1", "nan", "é", "\ud800", "\0", "a\nb", "\x1b[31m", "$\\frac$", "../x", "/", "a" * 5000, "٣"]
numbers = st.sampled_from(NUMBERS) | st.integers(-5, 20)
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.sampled_from(FLOATS), st.floats(), st.sampled_from(TEXTS), st.text(max_size=5)
)
json_values = st.recursive(
    scalars | st.sampled_from([DEEP, LARGE]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TEXTS[:8]), inner, max_size=3),
    max_leaves=6,
)
# What a Python function may be given.
things = st.one_of(
    scalars,
    st.just(1j),
    st.just(b"x"),
    st.just(()),
    st.just({}),
    st.just(object),
    st.sampled_from([np.float32(2), np.int64(2), np.bool_(True), np.array(2), np.array([2]), np.datetime64(3, "s")]),
)

NUMERIC = ["float32", "float64", "int32", "int64"]
DTYPES = [
    *NUMERIC,
    *("float16", "uint8", "int8", "uint16", "uint64", "bool", "complex64", "complex128", "longdouble"),
    *("O", "U3", "S2", "datetime64[s]", "timedelta64[s]", "V3", "i4,f4", ">f4", ">i8"),
]


@st.composite
def contents(draw, shape, dtype):
    """An array of this shape and dtype, of small integers mostly, now and then of what is none."""
    size = int(np.prod(shape))
    seed = draw(st.integers(0, 9))
    array = np.random.default_rng(seed).integers(0, 4, size).reshape(shape)
    array = np.zeros(shape, dtype) if np.dtype(dtype).kind in "V" else array.astype(dtype)
    if size and draw(st.integers(0, 3)) == 0:
        value = draw(st.sampled_from([*NUMBERS, *FLOATS, "x", None]))
        try:
            with np.errstate(all="ignore"):
                array.reshape(-1)[draw(st.integers(0, size - 1))] = value
        except (ValueError, TypeError, OverflowError):
            pass
    return array


@st.composite
def arrays(draw, shapes=((), (0,), (1,), (2,), (3,), (2, 0), (2, 3), (3, 3), (3, 2, 2), (0, 3)), dtypes=tuple(DTYPES)):
    """An array of one of these shapes, mostly of a usual dtype."""
    dtype = draw(st.sampled_from(NUMERIC) | st.sampled_from(dtypes))
    return draw(contents(draw(st.sampled_from(shapes)), dtype))


def maybe(usual, odd=things, one_of=4):
    """What is usual, and once in so many what is odd."""
    return st.integers(1, one_of).flatmap(lambda number: odd if number == 1 else usual)


# JSON.


def to_text(content) -> str:
    """As JSON, which Python reads with NaN and with what is too deep or too large for most."""
    text = json.dumps(content)
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{LARGE}"', "9" * 5000)


def places(content, path=()):
    """The paths of all parts of a tree of dictionaries and lists."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def edited(content, edits):
    """The tree, some parts of it replaced or removed; an edit is (where, what), `...` removes."""
    content = json.loads(json.dumps(content))
    for where, what in edits:
        paths = list(places(content))
        path = paths[where % len(paths)]
        if not path:
            content = {} if what is ... else what
            continue
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        if what is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = what
    return content


json_edits = st.lists(st.tuples(st.integers(0, 10**6), json_values | st.just(...)), max_size=3)


# Bytes.

_PATTERNS = [b"\0", b"\xff", b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"{", b'"', b"\n", b"9" * 20, b"\x80\x04"]
byte_edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "write", "insert", "delete", "cut", "repeat"]),
        st.integers(0, 2**16),
        st.integers(0, 40),
        st.sampled_from(_PATTERNS) | st.binary(max_size=6),
    ),
    max_size=4,
)


def damaged(content: bytes, edits) -> bytes:
    """The bytes after some accidents."""
    content = bytearray(content)
    for kind, where, size, pattern in edits:
        at = where % (len(content) + 1)
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << size % 8
        elif kind == "write":
            content[at : at + len(pattern)] = pattern
        elif kind == "insert":
            content[at:at] = pattern
        elif kind == "delete":
            del content[at : at + size]
        elif kind == "cut":
            del content[at:]
        elif kind == "repeat":
            content[at:at] = content[at : at + size] * 3
    return bytes(content)
