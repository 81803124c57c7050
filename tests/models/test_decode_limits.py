"""Decoding at its limits: the largest allowed sizes, pixels and scans, and files that lack only their end."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile, UnidentifiedImageError
from test_decode import PHOTOGRAPH, SIZE, encode, pixels, plain, png, refusal

import models.decode as decode_module
import models.pixels as module
from models.decode import (
    DEFAULT_LIMITS,
    BadImage,
    Limits,
    Picture,
    Reason,
    Stage,
    decode,
    decode_full_size,
    decode_marked,
    read_limited,
)
from models.image_header import Header
from models.pixels import TruncatedError, centred_box, decode_pixels, explain, is_cut_off, shape_pixels

JPEG_SCAN = b"\xff\xda"


# Limits


def test_default_limit_is_20_mebibytes() -> None:
    most = 20 * 1024**2
    data = encode(plain((10, 200, 30)), "BMP")
    assert (pixels(data + bytes(most - len(data))) == (10, 200, 30)).all()
    bad = refusal(data + bytes(most + 1 - len(data)))
    assert (bad.stage, bad.reason) == (Stage.READ, Reason.TOO_LARGE)


def test_default_limit_is_64_million_pixels() -> None:
    assert refusal(png(8000, 8000, 8, 2, b"")).reason is not Reason.DECOMPRESSION_BOMB, "only its pixels are missing"
    bad = refusal(png(64_000_001, 1, 8, 2, b""))
    assert (bad.stage, bad.reason) == (Stage.DECODE, Reason.DECOMPRESSION_BOMB)
    assert "64000001 pixels, the limit is 64000000" in bad.detail


def test_image_at_the_pixel_limit_is_decoded() -> None:
    data = encode(plain("teal"), "PNG")
    pixels(data, limits=Limits(max_pixels=80 * 60))
    assert refusal(data, limits=Limits(max_pixels=80 * 60 - 1)).reason is Reason.DECOMPRESSION_BOMB


def test_jpeg_with_100_scans_is_decoded() -> None:
    progressive = encode(PHOTOGRAPH, "JPEG", progressive=True)
    last = progressive[progressive.rindex(JPEG_SCAN) : -2]
    missing = 100 - progressive.count(JPEG_SCAN)
    pixels(progressive[:-2] + last * missing + b"\xff\xd9")
    bad = refusal(progressive[:-2] + last * (missing + 1) + b"\xff\xd9")
    assert (bad.reason, bad.detail) == (Reason.DECOMPRESSION_BOMB, "JPEG: 101 scans, the limit is 100")
    png_with_such_bytes = encode(plain("teal"), "PNG") + JPEG_SCAN * 200
    pixels(png_with_such_bytes)


@pytest.mark.parametrize(("size", "read"), [(0, 0), (9, 9), (10, 10), (11, 11), (50, 11)])
def test_reading_stops_one_byte_after_the_limit(tmp_path: Path, size: int, read: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    assert len(read_limited(path, Limits(max_bytes=10))) == read


# Reasons


@pytest.mark.parametrize(
    ("image_format", "whole"),
    [
        ("JPEG", b"\xff\xd8\xff..\xff\xd9" + bytes(62)),  # cameras append data after the end
        ("PNG", b"\x89PNG..IEND12345678"),
        ("GIF", b"GIF89a..;"),
        ("GIF", b"GIF89a..;\0\0\0"),
        ("WEBP", b"RIFF" + struct.pack("<I", 6) + b"WEBP.."),
        ("WEBP", b"RIFF" + struct.pack("<I", 5) + b"WEBP.."),
        ("BMP", b"BM" + struct.pack("<I", 8) + b".."),
        ("BMP", b"BM" + struct.pack("<I", 7) + b".."),
        ("TIFF", b"II*\0" + struct.pack("<I", 8) + b".."),
        ("TIFF", b"MM\0*" + struct.pack(">I", 8) + b".."),
        ("AVIF", b"\0\0\0\x0aftyp..\0\0\0\x0dmdat....."),
        ("AVIF", b"\0\0\0\x0aftyp..\0\0\0\x01mdat" + struct.pack(">Q", 20) + b"...."),  # a size of 64 bits
        ("AVIF", b"\0\0\0\x0aftyp..\0\0\0\x07md\xff\xff\xff\xff"),  # a box smaller than its header
        ("ICO", b""),  # a format without a known end
    ],
)
def test_file_with_the_end_that_its_format_requires_is_not_cut_off(image_format: str, whole: bytes) -> None:
    assert not is_cut_off(whole, image_format)


@pytest.mark.parametrize(
    ("image_format", "cut"),
    [
        ("JPEG", b"\xff\xd8\xff..\xff\xd9" + bytes(63)),
        ("JPEG", b"\xff\xd8\xff..\xff"),
        ("PNG", b"\x89PNG..IEND123456789"),
        ("PNG", b"\x89PNG..IEN"),
        ("GIF", b"GIF89a..;."),
        ("WEBP", b"RIFF" + struct.pack("<I", 7) + b"WEBP.."),
        ("BMP", b"BM" + struct.pack("<I", 9) + b".."),
        ("TIFF", b"II*\0" + struct.pack("<I", 9) + b".."),
        ("TIFF", b"MM\0*" + struct.pack(">I", 9) + b".."),
        ("WEBP", b"RIFF" + struct.pack("<I", 1 << 24) + b"WEBP.."),
        ("BMP", b"BM" + struct.pack("<I", 1 << 24) + b".."),
        ("TIFF", b"II*\0" + struct.pack("<I", 1 << 24) + b".."),
        ("AVIF", b"\0\0\0\x0aftyp..\0\0\0\x0emdat....."),
        ("AVIF", b"\0\0\0\x0aftyp..\0\0\0\x08free\0\0\0\x0emdat....."),
    ],
)
def test_file_without_the_end_that_its_format_requires_is_cut_off(image_format: str, cut: bytes) -> None:
    assert is_cut_off(cut, image_format)


def test_only_the_first_thousand_boxes_are_examined() -> None:
    free, cut = b"\0\0\0\x08free", b"\0\0\0\x0emdat"
    assert is_cut_off(free * 1000 + cut, "AVIF")
    assert not is_cut_off(free * 1001 + cut, "AVIF")


def test_unreadable_header_error_contains_no_memory_address() -> None:
    bad = refusal(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert (bad.stage, bad.detail) == (Stage.DECODE, "PNG: its header cannot be read")
    assert "0x" not in explain(UnidentifiedImageError("<_io.BytesIO at 0x7f>"), Stage.DECODE, b"", "PNG").detail


def test_decoder_message_is_shortened_and_replaced_by_the_error_name_if_empty() -> None:
    detail = explain(ValueError("x" * 500), Stage.DECODE, b"", "TIFF").detail
    assert detail == "TIFF: " + "x" * 194
    assert explain(ValueError(), Stage.DECODE, b"", "AVIF") == BadImage(
        Stage.DECODE, Reason.CORRUPT, "AVIF: ValueError"
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Image.DecompressionBombError("too many"), Reason.DECOMPRESSION_BOMB),
        (ValueError("Too much memory used in text chunks"), Reason.DECOMPRESSION_BOMB),
        (OSError("image file is truncated (3 bytes not processed)"), Reason.TRUNCATED),
        (OSError("Truncated_File_Read"), Reason.TRUNCATED),
        (OSError("broken data stream"), Reason.CORRUPT),
    ],
)
def test_reason_is_derived_from_the_decoder_error(error: Exception, reason: Reason) -> None:
    whole = encode(plain("teal"), "PNG")
    assert explain(error, Stage.DECODE, whole, "PNG").reason is reason
    if reason is Reason.CORRUPT:
        assert explain(error, Stage.DECODE, whole[:-12], "PNG").reason is Reason.TRUNCATED


def test_pixels_without_a_defined_range_are_explained() -> None:
    bad = decoded(encode(Image.new("F", (8, 8), 0.5), "TIFF"), "TIFF")
    assert isinstance(bad, BadImage)
    assert (bad.stage, bad.reason) == (Stage.PREPROCESS, Reason.UNSUPPORTED_MODE)


def test_unsupported_format_with_too_many_pixels_is_a_format_error() -> None:
    bad = refusal(b"P6 50000 50000 255\n")
    assert (bad.stage, bad.reason) == (Stage.DECODE, Reason.FORMAT_NOT_ALLOWED)
    assert "PPM" in bad.detail


# Data that ends early


JPEG = encode(PHOTOGRAPH, "JPEG", quality=90, subsampling=0)
PNG = encode(PHOTOGRAPH, "PNG")


def decoded(
    data: bytes, image_format: str, *, repair: bool = True, limits: Limits = DEFAULT_LIMITS, **header: Any
) -> Picture | BadImage:
    """Decode in this process and at full size."""
    return decode_pixels(Header(data, **header), image_format, (400, 400), limits, "whole", repair=repair)


def picture(data: bytes, image_format: str, **header: Any) -> Picture:
    got = decoded(data, image_format, **header)
    assert isinstance(got, Picture), got
    return got


@pytest.mark.parametrize(("height", "most"), [(160, 20), (1000, 32), (2000, 40)])
@pytest.mark.parametrize("image_format", ["BMP", "TIFF"])
def test_few_missing_rows_are_black_and_counted(image_format: str, height: int, most: int) -> None:
    """An eighth of the rows, but no more than 32 or one in fifty."""
    data = encode(Image.new("RGB", (8, height), "teal"), image_format)
    got = picture(data[: -24 * most], image_format)
    assert got.damage == f"{most} of {height} rows are missing"
    rows = got.pixels if image_format == "TIFF" else got.pixels[::-1]  # BMP begins with the last row
    assert (rows[:-most] == (0, 128, 128)).all()
    assert (rows[-most:] == 0).all()
    assert decoded(data[: -24 * (most + 1)], image_format) == BadImage(
        Stage.DECODE,
        Reason.TRUNCATED,
        f"{image_format}: image file is truncated: {most + 1} of {height} rows are missing",
    )
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(("mode", "row_bytes"), [("1", 8), ("P", 64), ("L", 64)])
@pytest.mark.parametrize("image_format", ["BMP", "TIFF"])
def test_missing_rows_of_one_channel_are_counted(image_format: str, mode: str, row_bytes: int) -> None:
    for color in ("white", "black"):
        image = Image.new("RGB", (64, 160), color)
        data = encode(image.quantize(4) if mode == "P" else image.convert(mode), image_format)
        assert picture(data[: -15 * row_bytes], image_format).damage == "15 of 160 rows are missing"


def test_missing_rows_are_not_replaced_in_this_process_in_strict_mode_or_in_other_formats() -> None:
    assert picture(PNG[:-300], "PNG").damage == "1 of 150 rows are missing"
    with pytest.raises(TruncatedError):
        decoded(PNG[:-300], "PNG", repair=False)
    corrupt = PNG[: len(PNG) // 2] + bytes(64) + PNG[len(PNG) // 2 + 64 :]
    gif = encode(PHOTOGRAPH, "GIF")[:-300]
    for repair in (False, True):
        for data, image_format, limits, reason in (
            (PNG[:-300], "PNG", Limits(strict=True), Reason.TRUNCATED),
            (gif, "GIF", DEFAULT_LIMITS, Reason.TRUNCATED),
            (corrupt, "PNG", DEFAULT_LIMITS, Reason.CORRUPT),
        ):
            bad = decoded(data, image_format, repair=repair, limits=limits)
            assert isinstance(bad, BadImage)
            assert (bad.stage, bad.reason) == (Stage.DECODE, reason)


def test_error_of_an_image_with_all_rows_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_missing_rows", lambda *_, **__: None)
    bad = decoded(PNG[:-300], "PNG")
    assert isinstance(bad, BadImage)
    assert (bad.reason, bad.detail) == (Reason.TRUNCATED, "PNG: image file is truncated")


def test_image_without_its_end_marker_is_complete() -> None:
    for data, image_format, end in ((JPEG, "JPEG", 2), (PNG, "PNG", 12)):
        got = picture(data[:-end], image_format, cut=True, damage="its end marker is missing")
        assert got.damage == "its end marker is missing"
        assert (got.pixels == picture(data, image_format).pixels).all()


def test_missing_rows_of_a_jpeg_are_counted() -> None:
    got = picture(JPEG[:-60], "JPEG", cut=True, damage="its end marker is missing")
    assert got.damage == "6 of 150 rows are missing"  # blocks have 8 rows, and 144 is a multiple of 8
    assert (got.pixels[:144] == picture(JPEG, "JPEG").pixels[:144]).all()
    for end in (len(JPEG) * 3 // 5, JPEG.index(b"\xff\xda") + 4):
        bad = decoded(JPEG[:end], "JPEG", cut=True)
        assert isinstance(bad, BadImage)
        assert bad.reason is Reason.TRUNCATED


def test_jpeg_whose_missing_rows_cannot_be_counted_is_truncated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILLER", b"\xff\xc4\0\x14\0" + b"\xff" * 16)  # an invalid table
    with pytest.raises(TruncatedError):
        decoded(JPEG[:-60], "JPEG", cut=True)
    bad = decoded(JPEG[: JPEG.index(b"\xff\xda") + 4], "JPEG", cut=True)  # without any pixels
    assert isinstance(bad, BadImage)
    assert bad.reason is Reason.TRUNCATED


def test_pixels_are_limited_while_decoding() -> None:
    bad = decoded(PNG, "PNG", limits=Limits(max_pixels=29_999))
    assert bad == BadImage(Stage.DECODE, Reason.DECOMPRESSION_BOMB, "PNG: 200x150 = 30000 pixels, the limit is 29999")


# Where an image is decoded


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formats of the images that would be decoded in a guarded process; the answers are the same."""
    asked: list[str] = []

    def answer(request: dict[str, Any], data: bytes, limits: Limits) -> BadImage:
        asked.append(request["format"])
        return BadImage(Stage.DECODE, Reason.DECODE_TIMEOUT, "of the guarded process")

    monkeypatch.setattr(decode_module, "run_guarded", answer)
    return asked


def test_only_images_of_bounded_cost_are_decoded_in_this_process(guarded: list[str]) -> None:
    small = encode(plain("teal"), "PNG")
    for data in (JPEG, small):
        pixels(data)
    assert guarded == []
    photograph = encode(PHOTOGRAPH.resize((40, 30)), "PNG")
    body = photograph[37:-116]  # the type and the content of the only chunk of pixels, without its last 100 bytes
    short = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    for data in (JPEG[:-60], small[:-40], photograph[:33] + short + photograph[-12:], encode(PHOTOGRAPH, "GIF")):
        assert refusal(data).detail == "of the guarded process"
    assert guarded == ["JPEG", "PNG", "PNG", "GIF"]


def test_guarded_process_returns_the_damage() -> None:
    got = decode_marked(JPEG[:-60], (150, 200))
    assert isinstance(got, Picture)
    assert (got.damage, got.pixels.shape) == ("6 of 150 rows are missing", (150, 200, 3))


def test_lack_of_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Picture:
        raise MemoryError

    monkeypatch.setattr(decode_module, "decode_pixels", fail)
    bad = refusal(JPEG)
    assert (bad.stage, bad.reason) == (Stage.DECODE, Reason.DECODE_MEMORY)


def test_strict_mode_distinguishes_cut_off_from_other_damage() -> None:
    strict = Limits(strict=True)
    cut, trailer = refusal(JPEG[:-2], limits=strict), refusal(JPEG + b"trailer", limits=strict)
    assert cut == BadImage(Stage.DECODE, Reason.TRUNCATED, "JPEG: its end marker is missing")
    assert trailer == BadImage(Stage.DECODE, Reason.CORRUPT, "JPEG: 7 bytes after the image")


def test_heif_is_decoded_if_its_decoder_is_installed(guarded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    heif, without = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", Limits(formats=("JPEG", "PNG"))
    for installed in (False, True):
        monkeypatch.setattr(decode_module, "_reads_heif", lambda installed=installed: installed)
        assert refusal(heif, limits=without).detail == "HEIC, accepted are JPEG, PNG"
        bad = refusal(heif, limits=Limits(formats=("JPEG", "HEIF")))
        expected = "HEIC, accepted are JPEG; install imagestream[heif] to decode it"
        assert bad.detail == ("of the guarded process" if installed else expected)
        pixels(JPEG, limits=without)
    assert guarded == ["HEIF"]


def test_decoder_of_heif_is_the_package_pillow_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    find = decode_module._reads_heif.__wrapped__
    for spec in (None, object()):
        monkeypatch.setattr(decode_module, "find_spec", {"pillow_heif": spec}.get)
        assert find() is (spec is not None)


def test_warnings_of_the_decoder_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 60 - 1)  # Pillow warns up to twice this number
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(encode(plain("teal"), "PNG")) == (0, 128, 128)).all()


# Pixels


@pytest.mark.parametrize("orientation", [1, 6])
def test_full_size_is_that_of_the_upright_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PHOTOGRAPH.resize((640, 480)), "JPEG", exif=exif)
    got = decode_full_size(data)
    assert isinstance(got, Picture)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    assert (got.pixels == (stored if orientation == 1 else np.rot90(stored, -1))).all()


@pytest.mark.parametrize("size", [(512, 64), (64, 512)])
def test_stripes_of_a_jpeg_remain_if_only_the_other_dimension_is_reduced(size: tuple[int, int]) -> None:
    along = int(size[1] > size[0])
    lines = np.indices((512, 1024) if along == 0 else (1024, 512))[along] // 2 % 2
    data = encode(Image.fromarray((255 * lines).astype(np.uint8)), "JPEG", quality=95)
    got = pixels(data, size)[..., 0].astype(int)
    assert np.abs(np.diff(got, axis=along)).max(axis=along).min() > 200


def test_large_jpeg_is_decoded_at_a_reduced_size_that_covers_the_result() -> None:
    data = encode(PHOTOGRAPH.resize((640, 480)), "JPEG")
    sizes = [module._open(data, "JPEG", size, DEFAULT_LIMITS).size for size in ((48, 64), (100, 130), (400, 100))]
    assert sizes == [(160, 120), (320, 240), (640, 480)]  # 1/8 has 60 rows, less than the larger of 48 and 64


@pytest.mark.parametrize(("width", "plain_bilinear"), [(64, True), (96, True), (97, False)])
def test_plain_bilinear_sampling_is_used_up_to_a_factor_of_1_5(width: int, plain_bilinear: bool) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, width, 3), np.uint8))
    expected = cv2.resize(np.asarray(image), (64, 48), interpolation=cv2.INTER_LINEAR)
    assert (shape_pixels(image, (48, 64), "stretch", 1) == expected).all() == plain_bilinear


@pytest.mark.parametrize(("tag", "turned"), [(6, True), ("6", True), ("abcd", False), (1, False)])
def test_orientation_is_read_unless_it_is_known(tag: Any, turned: bool) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    image.getexif()[0x0112] = tag
    stored = np.asarray(image)
    expected = np.rot90(stored, -1) if turned else stored
    assert (shape_pixels(image, (4, 4), "stretch") == expected).all()
    assert (shape_pixels(image, (4, 4), "stretch", 1) == stored).all()


def test_colours_are_composited_over_white_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (7, 10, 4), np.uint8)
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    image = Image.fromarray(values)
    for band_pixels in (5, 30, 10_000):  # one row, three rows, all rows
        monkeypatch.setattr(module, "_BAND_PIXELS", band_pixels)
        assert np.abs(shape_pixels(image, (7, 10), "stretch", 1) - expected).max() <= 1
    gray = Image.fromarray(values[..., [0, 3]])
    expected = values[..., [0, 0, 0]] * alpha + 255 * (1 - alpha)
    for mode in ("LA", "La"):  # alpha multiplied in
        got = shape_pixels(gray.convert(mode), (7, 10), "stretch", 1)
        assert np.abs(got - expected).max() <= 2


def test_pixels_are_read_only_and_have_the_requested_size() -> None:
    for image in (plain("teal"), plain(77, "L"), PHOTOGRAPH):
        got = pixels(encode(image, "PNG"), (30, 50))
        assert not got.flags.writeable
        assert got.shape == (30, 50, 3)


def test_every_16_bit_value_is_rounded_to_8_bits() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = pixels(encode(Image.fromarray(values), "PNG"), (256, 256))
    assert (got == np.rint(values / 257)[..., np.newaxis]).all()


@pytest.mark.parametrize(
    ("image", "window", "box"),
    [
        ((300, 100), (50, 50), (100, 0, 200, 100)),
        ((100, 300), (50, 50), (0, 100, 100, 200)),
        ((100, 100), (50, 50), (0, 0, 100, 100)),
        ((101, 40), (20, 20), (30, 0, 70, 40)),
        ((40, 103), (20, 20), (0, 31, 40, 71)),
        ((200, 100), (40, 10), (0, 25, 200, 75)),
        ((1, 1000), (1000, 1), (0, 499, 1, 500)),
        ((1000, 1), (1, 1000), (499, 0, 500, 1)),
    ],
)
def test_crop_is_the_largest_centred_window_with_the_target_aspect_ratio(
    image: tuple[int, int], window: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert centred_box(*image, *window) == box


@pytest.mark.parametrize("orientation", [1, 6])
def test_crop_uses_the_aspect_ratio_after_orientation(orientation: int) -> None:
    stored = Image.new("RGB", (120, 60), "red")
    stored.paste("blue", (30, 0, 90, 60) if orientation == 1 else (45, 0, 75, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (40, 40) if orientation == 1 else (20, 40)
    assert (pixels(encode(stored, "PNG", exif=exif), size, resize="crop") == (0, 0, 255)).all()


@pytest.mark.parametrize("factors", [(1, 3), (3, 1), (3, 3)])
def test_fine_stripes_become_gray_when_downscaled(factors: tuple[int, int]) -> None:
    height, width = SIZE[0] * factors[0], SIZE[1] * factors[1]
    rows, columns = np.indices((height, width))
    stripes = (255 * ((rows // 2 if factors[0] > 1 else columns // 2) % 2)).astype(np.uint8)
    got = pixels(encode(Image.fromarray(stripes), "PNG")).astype(int)
    assert np.abs(got[4:-4, 4:-4] - 127).max() < 60
    assert abs(got.mean() - 127.5) < 2


def test_photograph_decodes_close_to_pillow() -> None:
    large = PHOTOGRAPH.resize((800, 600))
    expected = np.asarray(large.resize((64, 48), Image.Resampling.BILINEAR), float)
    assert np.abs(pixels(encode(large, "PNG")) - expected).mean() < 1
    assert np.abs(pixels(encode(large, "JPEG", quality=95)) - expected).mean() < 2


def test_opencv_uses_one_thread() -> None:
    cv2.setNumThreads(2)
    module.opencv.__wrapped__()
    assert cv2.getNumThreads() == 1


def test_transparent_gray_and_palette_colours_are_composited_over_white() -> None:
    clear = io.BytesIO()
    Image.new("L", (8, 8), 0).save(clear, "PNG", transparency=0)
    assert (pixels(clear.getvalue()) == 255).all()
    red = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(red, "PNG", transparency=(255, 0, 0))
    assert (pixels(red.getvalue()) == 255).all()


@pytest.mark.parametrize("data", [None, b"", b"x", bytes(30)])
def test_invalid_image_has_a_detail_message(data: Any) -> None:
    bad = decode(data, SIZE)
    assert isinstance(bad, BadImage)
    assert bad.detail
