import gzip

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing in data/ may open a connection."""

    def refuse(*args):
        raise AssertionError(f"network use: {args}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def write_idx():
    """Writes an array of bytes in the format of the original MNIST files, straight from its description."""

    def write(path, array):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = header + array.astype("u1").tobytes()
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)

    return write


@pytest.fixture
def write_image():
    """Writes an array [H, W] or [H, W, 3] as an image file."""

    def write(path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    return write
