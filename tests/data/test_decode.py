"""Image files of every mode, and files that are no images. Expected pixels follow from the formats' definitions."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from skipway.data.decode import DecodeSpec, UnreadableImage, decode, read_header
from skipway.data.inspection import InspectTask
from skipway.data.sources.readers import FileStore

SIDE = 8


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def grey_ramp() -> np.ndarray:
    return np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) * 3


def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def read(path: Path, channels: int = 3) -> np.ndarray:
    return decode(path, DecodeSpec(channels, SIDE))


def test_colour_and_grey_come_out_as_they_are(tmp_path):
    assert np.array_equal(read(save(tmp_path / "c.png", colours())), colours())
    grey = read(save(tmp_path / "g.png", grey_ramp()), channels=1)
    assert grey.shape == (SIDE, SIDE, 1)
    assert np.array_equal(grey[..., 0], grey_ramp())


def test_grey_as_colour_repeats_and_colour_as_grey_is_luma(tmp_path):
    assert np.array_equal(read(save(tmp_path / "g.png", grey_ramp())), np.repeat(grey_ramp()[..., None], 3, 2))
    luma = colours() @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(read(save(tmp_path / "c.png", colours()), channels=1)[..., 0] - luma).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65_535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    pixels = read(save(tmp_path / f"deep.{suffix}", values), channels=1)[..., 0]
    assert np.array_equal(pixels, np.round(values / 257))
    assert read_header(tmp_path / f"deep.{suffix}")[:3] == (SIDE, SIDE, True)


def test_alpha_is_laid_on_white(tmp_path):
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (10, 20, 30, 0)
    pixels[0, 2] = (100, 100, 100, 128)
    out = read(save(tmp_path / "alpha.png", pixels))
    assert out[0, 0].tolist() == [10, 20, 30]
    assert out[0, 1].tolist() == [255, 255, 255]
    assert np.abs(out[0, 2] - (100 * 128 + 255 * 127) / 255).max() <= 1


def test_grey_with_alpha(tmp_path):
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[0, 0, 3] = 255
    out = read(save(tmp_path / "la.png", pixels, "LA"), channels=1)[..., 0]
    assert out[0, 0] == 0
    assert out[1, 1] == 255


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(np.indices((SIDE, SIDE))[1].astype(np.uint8) % 2)
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.save(tmp_path / "p.png")
    image.save(tmp_path / "t.png", transparency=1)
    assert read(tmp_path / "p.png")[0, :2].tolist() == [[200, 10, 10], [10, 200, 10]]
    assert read(tmp_path / "t.png")[0, :2].tolist() == [[200, 10, 10], [255, 255, 255]]


def test_cmyk_is_converted(tmp_path):
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[0] = (0, 255, 255, 0)
    image = Image.frombytes("CMYK", (SIDE, SIDE), pixels.tobytes())
    image.save(tmp_path / "ink.tif")
    out = read(tmp_path / "ink.tif")
    assert out[0, 0].tolist() == [255, 0, 0]
    assert out[1, 0].tolist() == [255, 255, 255]
    image.save(tmp_path / "ink.jpg", quality=100)
    assert np.abs(read(tmp_path / "ink.jpg")[4:].astype(int) - 255).max() < 8


def test_one_bit_and_animation(tmp_path):
    save(tmp_path / "bit.png", grey_ramp(), "1")
    assert set(np.unique(read(tmp_path / "bit.png", channels=1))) <= {0, 255}
    frames = [Image.new("L", (SIDE, SIDE), value) for value in (40, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.unique(read(tmp_path / "moving.gif", channels=1)).tolist() == [40]


# EXIF 2.3, table 6, tag 274: how the stored rows and columns are shown
SHOWN = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    path = save(tmp_path / f"turned.{suffix}", colours(), exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read(path), SHOWN[orientation](colours()))


def test_the_largest_central_square_is_taken(tmp_path):
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = colours()
    assert np.array_equal(read(save(tmp_path / "wide.png", wide)), colours())


def test_large_images_shrink_without_aliasing(tmp_path):
    """A fine checkerboard averages to grey; picking single pixels would keep black or white."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    out = read(save(tmp_path / "board.png", board), channels=1)
    assert np.abs(out.astype(int) - 127.5).max() < 4


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is that large; Pillow has read its size before it misses the pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", crc32(header), 9) + b"IDAT"


def bad_files(root: Path) -> dict[str, tuple[Path, str]]:
    large = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg = save(root / "whole.jpg", large).read_bytes()
    png = save(root / "whole.png", large).read_bytes()
    written = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "no_end.png": (png[: len(png) // 2], ""),
        "flipped.png": (png[:200] + bytes([png[200] ^ 255]) + png[201:], ""),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not an image but HTML"),
        "empty.png": (b"", "an empty file"),
        "text.png": (b"hello", "not an image but text"),
        "bundle.jpg": (b"PK\x03\x04....", "an archive"),
        "bomb.png": (png_of(9_000, 9_000), "more than 64 megapixels"),
        "larger_bomb.png": (png_of(50_000, 50_000), "more than 64 megapixels"),
    }
    found = {}
    for name, (content, reason) in written.items():
        (root / name).write_bytes(content)
        found[name] = (root / name, reason)
    Image.fromarray(np.zeros((SIDE, SIDE), np.float32)).save(root / "float.tif")
    Image.fromarray(np.full((SIDE, SIDE), 1_000_000, np.int32)).save(root / "wide.tif")
    Image.new("L", (3, 300)).save(root / "sliver.png")
    found["float.tif"] = (root / "float.tif", "32-bit float")
    found["wide.tif"] = (root / "wide.tif", "32-bit integers")
    found["sliver.png"] = (root / "sliver.png", "3x300: smaller than 8 pixels")
    found["missing.png"] = (root / "missing.png", "no such file")
    return found


@pytest.mark.filterwarnings("default")
def test_what_cannot_be_read_is_refused_with_a_reason(tmp_path):
    for name, (path, reason) in bad_files(tmp_path).items():
        with pytest.raises(UnreadableImage) as caught:
            decode(path, DecodeSpec(3, SIDE))
        assert reason in caught.value.reason, name
        assert name in str(caught.value)
        assert fault_of(path) == caught.value.reason, name


def fault_of(path: Path) -> str:
    return InspectTask(FileStore(path.parent), [path.name], DecodeSpec(3, SIDE), pixels=False)(0, None).reason


def test_inspection_passes_what_decode_reads(tmp_path):
    assert fault_of(save(tmp_path / "c.jpg", np.zeros((64, 48, 3), np.uint8))) == ""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\x00", b"BM"]),
)
def test_random_bytes_raise_nothing_else(tmp_path, content, magic):
    path = tmp_path / "noise.img"
    path.write_bytes(magic + content)
    with contextlib.suppress(UnreadableImage):
        decode(path, DecodeSpec(3, SIDE))


def jpegs(root: Path) -> dict[str, Path]:
    """Photographs in small: smooth colours with noise, of sides that no block size divides."""
    noise = np.random.default_rng(3)
    smooth = Image.fromarray(noise.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((211, 147), 3)
    exif = Image.Exif()
    exif[274] = 6
    smooth.save(root / "plain.jpg", quality=90)
    smooth.save(root / "full.jpg", quality=95, subsampling=0)
    smooth.save(root / "progressive.jpg", progressive=True, exif=exif)
    smooth.convert("L").save(root / "grey.jpg")
    smooth.convert("CMYK").save(root / "ink.jpg")
    whole = (root / "plain.jpg").read_bytes()
    (root / "tail.jpg").write_bytes(whole + b"more" * 50)
    (root / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "no_end.jpg").write_bytes(whole[:-2])
    return {path.stem: path for path in root.glob("*.jpg")}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [9, 40, 100])
def test_the_faster_jpeg_path_gives_pillows_pixels(tmp_path, monkeypatch, channels, size):
    pytest.importorskip("simplejpeg")

    def outcomes() -> dict[str, np.ndarray | str]:
        found: dict[str, np.ndarray | str] = {}
        for name, path in jpegs(tmp_path).items():
            try:
                found[name] = decode(path, DecodeSpec(channels, size))
            except UnreadableImage as error:
                found[name] = error.reason
        return found

    fast = outcomes()
    monkeypatch.setattr("skipway.data.jpeg.simplejpeg", lambda: None)
    for name, expected in outcomes().items():
        if isinstance(expected, str):
            assert fast[name] == expected, name
        else:
            # the two may be built with different versions of libjpeg-turbo
            assert np.abs(fast[name].astype(int) - expected).max() <= 2, name
    assert [name for name, outcome in sorted(fast.items()) if isinstance(outcome, str)] == ["cut", "no_end"]


def test_the_faster_jpeg_path_is_taken(tmp_path, monkeypatch):
    library = pytest.importorskip("simplejpeg")
    taken = []
    monkeypatch.setattr(
        library,
        "decode_jpeg",
        lambda *given, _own=library.decode_jpeg, **more: (taken.append(given[1]), _own(*given, **more))[1],
    )
    for name, path in jpegs(tmp_path).items():
        if name in ("plain", "progressive", "grey", "ink"):
            decode(path, DecodeSpec(3, 32))
    assert sorted(taken) == ["GRAY", "RGB", "RGB"]


def test_16_bit_grey_can_be_stretched(tmp_path):
    values = np.linspace(1_000, 3_000, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    path = save(tmp_path / "deep.png", values)
    out = decode(path, DecodeSpec(1, SIDE, "minmax"))[..., 0]
    assert (out.min(), out.max()) == (0, 255)
    assert np.abs(out - (values.astype(float) - 1_000) * 255 / 2_000).max() <= 0.51


def test_postscript_is_never_run(tmp_path):
    """Pillow gives EPS to Ghostscript, whatever the file is called."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n(marker) (w) file closefile\n")
    with pytest.raises(UnreadableImage, match="a PostScript document"):
        decode(path, DecodeSpec(3, SIDE))
