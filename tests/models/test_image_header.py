"""Inspecting headers of images: formats, limits, the cost of decoding, orientation and damage."""

import struct

import pytest

from models.image_header import Header, Sniffed, _jpeg_scale, exif_orientation, name_of, read_header, sniff

SIZE = (4, 4)
MAX_PIXELS = 64_000_000
EOI = b"\xff\xd9"
ENTROPY = b"\x01\x02\x03"
JFIF, EXIF, XMP = b"JFIF\0", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


def header(data: bytes, size: tuple[int, int] = SIZE, max_pixels: int = MAX_PIXELS) -> Header:
    found = sniff(data)
    assert found is not None
    return read_header(data, found, size, max_pixels)


# Formats


@pytest.mark.parametrize(
    ("data", "image_format"),
    [
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"GIF89a", "GIF"),
        (b"RIFF....WEBP", "WEBP"),
        (b"BM....\0\0\0\0", "BMP"),
        (b"II*\0", "TIFF"),
        (b"\0\0\0\x18ftypavif", "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x14ftypmif1\0\0\0\0avif", "AVIF"),
        (b"\0\0\0\x14ftypmif1\0\0\0avif.", "HEIF"),  # partly in the version
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "AVIF"),
        (b"\0\0\0\x17ftypmif1\0\0\0\0mif1avif", "HEIF"),  # the list of brands ends within the last one
        (b"\0\0\0\x18ftypmif1avif\0\0\0\0heic", "HEIF"),  # in place of the version
        (b"\0\0\x02\0ftypmif1" + bytes(240) + b"avif", "AVIF"),
        (b"\0\0\x02\0ftypmif1" + bytes(241) + b"avif", "HEIF"),  # only the first 256 bytes are searched
        (b"..TRUEVISION-XFILE.\0", "TGA"),
    ],
)
def test_format_is_detected_by_its_signature(data: bytes, image_format: str) -> None:
    assert sniff(data) == Sniffed(image_format, 0)


def test_image_begins_within_the_first_1024_bytes() -> None:
    image = b"\x89PNG\r\n\x1a\n"
    assert sniff(b"." * 1024 + image) == Sniffed("PNG", 1024)
    assert sniff(b"." * 1025 + image) is None
    assert sniff(b".\xff\xd8\xff\xc0") == Sniffed("JPEG", 1)
    assert sniff(b".\xff\xd8\xff\0") is None
    assert sniff(b"PK\xff\xd8\xff\xc0") is None
    assert sniff(b"") is None


def test_usual_names_differ_from_those_of_pillow() -> None:
    assert [name_of(one) for one in ("HEIF", "JXL", "PNG")] == ["HEIC", "JPEG XL", "PNG"]


def test_format_without_limits_is_passed_on() -> None:
    data = b"\0\0\0\x18ftypavif" + bytes(12)
    assert header(data) == Header(data)


@pytest.mark.parametrize("lead", [b"", b"text"])
@pytest.mark.parametrize("start", [b"\xff\xd8\xff\xc0", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"])
def test_unreadable_header_is_passed_on(start: bytes, lead: bytes) -> None:
    assert header(lead + start) == Header(start, damage="4 bytes before the image" if lead else None)


# JPEG


def segment(marker: int, content: bytes = b"") -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def frame(width: int = 8, height: int = 8, *, marker: int = 0xC0, precision: int = 8) -> bytes:
    return segment(marker, struct.pack(">BHHB", precision, height, width, 3) + bytes(9))


def scan(components: int = 3) -> bytes:
    return segment(0xDA, bytes([components, *bytes(9)])) + ENTROPY


def jpeg(*parts: bytes, end: bytes = EOI) -> bytes:
    return b"\xff\xd8" + b"".join(parts) + end


def exif(orientation: int) -> bytes:
    return EXIF + b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation, 0, 0, 0])


def test_jpeg_without_metadata_is_unchanged_and_cheap() -> None:
    data = jpeg(segment(0xE0, JFIF), segment(0xDB), frame(), segment(0xC4), scan())
    assert header(data) == Header(data, cheap=True, orientation=1)


def test_only_tables_and_colour_segments_of_a_jpeg_are_kept() -> None:
    alone = {0x01, *range(0xD0, 0xD8)}
    for marker in {*range(0x02, 0xFF)} - alone - {0xD8, 0xD9, 0xDA}:
        one = segment(marker, b"content")
        kept = header(jpeg(frame(), one, scan())).data == jpeg(frame(), one, scan())
        assert kept == (marker in {*range(0xC0, 0xD0), 0xDB, 0xDC, 0xDD}), hex(marker)
    for marker, content, kept in (
        (0xE0, b"JFIF\0..", True), (0xE0, b"JFXX\0..", False), (0xE1, b"JFIF\0..", False),
        (0xEE, b"Adobe..", True), (0xEE, b"Other..", False), (0xE0, b"Adobe..", False),
    ):  # fmt: skip
        one = segment(marker, content)
        assert header(jpeg(one, frame(), scan())).data == jpeg(one if kept else b"", frame(), scan())


def test_trailing_bytes_are_removed_with_and_without_metadata() -> None:
    clean = jpeg(frame(), scan())
    for data in (clean + b"xyz", jpeg(segment(0xFE, b"comment"), frame(), scan()) + b"xyz"):
        assert header(data) == Header(clean, cheap=True, orientation=1, damage="3 bytes after the image")
    assert header(jpeg(segment(0xFE, b"comment"), frame(), scan())).data == clean


def test_bytes_before_a_jpeg_are_its_first_damage() -> None:
    clean = jpeg(frame(), scan())
    assert header(b"text" + clean + b"xyz") == Header(
        clean, cheap=True, orientation=1, damage="4 bytes before the image"
    )


def test_markers_may_be_filled_or_have_no_length() -> None:
    for marker in (0x01, *range(0xD0, 0xD8), 0xFF):
        assert header(jpeg(frame(), b"\xff" + bytes([marker]), segment(0xE1, exif(6)), scan())).orientation == 6
    for between in (b"\0", b"\xff\xd8"):  # no marker, and one of another place
        data = jpeg(frame(), between, segment(0xE1, exif(6)), scan())
        assert header(data) == Header(data)


def test_jpeg_segment_has_at_least_two_bytes_and_ends_within_the_file() -> None:
    for length in (0, 1):
        data = jpeg(b"\xff\xe5" + struct.pack(">H", length), frame(), scan())
        assert header(data) == Header(data)
    assert header(jpeg(segment(0xE5), frame(), scan())).cheap
    cut = jpeg(frame(), scan(), end=b"")[: len(jpeg(frame(), end=b"")) + 13]  # within the header of the scan
    assert header(cut + b"") == Header(cut)


def test_jpeg_has_at_most_1000_segments_before_its_first_scan() -> None:
    data = jpeg(frame(), *[segment(0xE5)] * 999, scan())
    assert header(data).excess is None
    data = jpeg(frame(), *[segment(0xE5)] * 1000, scan())
    assert header(data) == Header(data, "more than 1000 segments before its first scan")


@pytest.mark.parametrize(("scans", "excess"), [(100, None), (101, "101 scans, the limit is 100")])
def test_jpeg_has_at_most_100_scans(scans: int, excess: str | None) -> None:
    data = jpeg(frame(marker=0xC2), *[scan(1)] * scans)
    assert header(data).excess == excess
    assert header(data).data == data
    assert header(data + b"\xff\xda").excess == excess, "a scan after the end"


def test_pixels_of_a_jpeg_are_limited() -> None:
    data = jpeg(frame(30, 20), scan())
    assert header(data, max_pixels=600).excess is None
    assert header(data, max_pixels=599) == Header(data, "30x20 = 600 pixels, the limit is 599")
    frames = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
    for marker in range(0xBF, 0xD0):
        excess = header(jpeg(frame(30, 20, marker=marker), scan()), max_pixels=599).excess
        assert (excess is not None) == (marker in frames), hex(marker)
    two = jpeg(frame(3, 2), frame(30, 20), scan())
    assert header(two, max_pixels=599).excess is None, "only the first frame counts"


@pytest.mark.parametrize(
    ("parts", "cheap"),
    [
        ((frame(), scan()), True),
        ((frame(marker=0xC1), scan()), True),
        ((frame(marker=0xC2), scan()), False),  # progressive
        ((frame(marker=0xC9), scan()), False),  # arithmetic coding
        ((frame(precision=12), scan()), False),
        ((frame(precision=7), scan()), False),
        ((frame(), scan(1)), False),  # not of all components
        ((frame(), scan(), scan()), False),
        ((scan(0),), False),  # without a frame
    ],
)
def test_only_a_baseline_jpeg_of_one_scan_is_cheap(parts: tuple[bytes, ...], cheap: bool) -> None:
    assert header(jpeg(*parts)).cheap == cheap


@pytest.mark.parametrize(
    ("shape", "longer_side", "cheap"),
    [
        ((4000, 4000), 4000, True),  # 16 million pixels
        ((109 * 229, 641), 4000, False),  # and one more
        ((8000, 8000), 4000, True),  # 16 million at half the size
        ((8000, 8001), 4000, False),
        ((17_800, 10_000), 1, True),  # Pillow's limit, 178 million
        ((17_801, 10_000), 1, False),
    ],
)
def test_cheap_jpeg_has_at_most_16_million_pixels_after_scaling(
    shape: tuple[int, int], longer_side: int, cheap: bool
) -> None:
    assert header(jpeg(frame(*shape), scan()), (1, longer_side), 200_000_000).cheap == cheap


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [(80, 99, 8), (99, 80, 8), (79, 99, 4), (40, 99, 4), (39, 99, 2), (20, 99, 2), (19, 99, 1), (5, 5, 1)],
)
def test_jpeg_is_scaled_by_the_largest_factor_that_covers_the_longer_side(width: int, height: int, scale: int) -> None:
    assert _jpeg_scale(width, height, (10, 5)) == _jpeg_scale(width, height, (5, 10)) == scale


def test_jpeg_without_its_end_marker_is_cut() -> None:
    data = jpeg(frame(), scan(), end=b"")
    for one in (data, data + b"\xff"):
        assert header(one) == Header(one, orientation=1, damage="its end marker is missing", cut=True)


def test_baseline_jpeg_ends_at_its_first_end_marker_and_others_at_their_last() -> None:
    tables = segment(0xC4, EOI)
    single = jpeg(frame(), scan())
    assert header(single + tables + EOI).damage == f"{len(tables + EOI)} bytes after the image"
    data = jpeg(frame(marker=0xC2), scan(1), tables, scan(1))
    assert header(data) == Header(data, orientation=1)


def test_further_images_of_a_file_are_not_damage() -> None:
    image, thumbnail = jpeg(frame(), scan()), jpeg(frame(), scan())
    assert header(image + thumbnail) == Header(image, cheap=True, orientation=1)
    for index, damage in ((b"MPF\0", None), (b"ICC\0", "3 bytes after the image")):
        assert header(jpeg(segment(0xE2, index), frame(), scan()) + b"xyz").damage == damage


# Orientation


@pytest.mark.parametrize(
    ("segments", "orientation"),
    [
        ([], 1),
        ([exif(6)], 6),
        ([XMP + b'<x tiff:Orientation="8"/>'], 8),
        ([XMP + b"<tiff:Orientation>3</tiff:Orientation>"], 3),
        ([XMP + b"<x/>"], 1),
        ([exif(6)[:5] + b"." + exif(6)[6:]], 1),
        ([b"other" + b'tiff:Orientation="8"'], 1),
        ([exif(6), exif(3)], 6),
        ([exif(0), exif(3)], 3),
    ],
)
def test_first_orientation_of_a_jpeg_counts(segments: list[bytes], orientation: int) -> None:
    data = jpeg(*(segment(0xE1, one) for one in segments), frame(), scan())
    assert header(data).orientation == orientation
    assert header(data.replace(b"\xff\xe1", b"\xff\xe3")).orientation == 1


def tiff(*entries: tuple[int, int, bytes], order: str = "<", start: int = 8) -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    packed = (struct.pack(f"{order}HHI", tag, kind, 1) + value for tag, kind, value in entries)
    return head.ljust(start, b".") + struct.pack(f"{order}H", len(entries)) + b"".join(packed)


@pytest.mark.parametrize(
    ("data", "orientation"),
    [
        (tiff((0x112, 3, b"\6\0\0\0")), 6),
        (tiff((0x112, 3, b"\0\6\0\0"), order=">"), 6),
        (tiff((0x112, 1, b"\6...")), 6),
        (tiff((0x112, 4, b"\6\0\0\0")), 6),
        (tiff((0x112, 2, b"\6\0\0\0")), None),  # text
        (tiff((0x112, 3, b"\0\0\0\0")), None),
        (tiff((0x112, 3, b"\1\0\0\0")), 1),
        (tiff((0x112, 3, b"\x08\0\0\0")), 8),
        (tiff((0x112, 3, b"\x09\0\0\0")), None),
        (tiff((0x111, 3, b"\6\0\0\0")), None),
        (tiff((0x111, 3, b"\5\0\0\0"), (0x112, 3, b"\6\0\0\0"), (0x113, 3, b"\7\0\0\0")), 6),
        (tiff((0x112, 3, b"\6\0\0\0"), start=12), 6),
        (tiff(*[(0x111, 3, b"\5\0\0\0")] * 12, (0x112, 3, b"\6\0\0\0")), 6),
        (tiff((0x111, 3, b"\5\0\0\0"), (0x112, 3, b"\6\0\0\0")).replace(b"\x02\0\x11", b"\x01\0\x11"), None),  # counts
        (tiff((0x112, 3, b"\6\0\0\0"))[:-3], None),
        (tiff((0x112, 3, b"\6\0\0\0"))[:9], None),
        (b"II*\0", None),
        (b"XX" + tiff((0x112, 3, b"\6\0\0\0"))[2:], None),
        (b"", None),
    ],
)
def test_orientation_is_an_entry_of_the_first_directory(data: bytes, orientation: int | None) -> None:
    assert exif_orientation(data) == orientation


# PNG


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + bytes(4)


IEND = chunk(b"IEND")


def png(*parts: bytes, width: int = 8, height: int = 8, end: bytes = IEND) -> bytes:
    size = struct.pack(">II", width, height) + bytes(5)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + b"".join(parts) + end


@pytest.mark.parametrize(
    ("data", "cheap"),
    [
        (png(chunk(b"IDAT", b"...")), True),
        (png(width=4_000_000, height=1), True),
        (png(width=4_000_001, height=1), False),
        (png(width=2_000, height=2_001), False),
        (png(*[chunk(b"IDAT")] * 498), True),  # 500 chunks
        (png(*[chunk(b"IDAT")] * 499), False),
        (png(chunk(b"tEXt", bytes(40_000)), chunk(b"iTXt", bytes(65_536 - 40_000))), True),
        (png(chunk(b"tEXt", bytes(40_000)), chunk(b"iTXt", bytes(65_537 - 40_000))), False),
        (png(*(chunk(kind, bytes(65_537)) for kind in (b"IDAT", b"PLTE", b"tRNS"))), True),
        (png(chunk(b"acTL"), chunk(b"fcTL")), False),  # animated
    ],
)
def test_cost_of_a_png_is_bounded_by_pixels_chunks_and_metadata(data: bytes, cheap: bool) -> None:
    assert header(data) == Header(data, cheap=cheap)


def test_png_has_at_most_20000_chunks() -> None:
    data = png(*[chunk(b"IDAT")] * 19_998)
    assert header(data + chunk(b"tEXt")).excess is None, "chunks after the end do not count"
    data = png(*[chunk(b"IDAT")] * 19_999)
    assert header(data) == Header(data, "more than 20000 chunks")


def test_pixels_of_a_png_are_limited() -> None:
    data = png(width=30, height=20)
    assert header(data, max_pixels=600).excess is None
    assert header(data, max_pixels=599) == Header(data, "30x20 = 600 pixels, the limit is 599")


def test_png_without_its_whole_end_is_cut() -> None:
    for data in (png(end=b""), png()[:-1], png()[:-4], png()[:-5]):
        assert header(data) == Header(data, damage="its end marker is missing", cut=True)


def test_bytes_around_a_png_are_damage() -> None:
    data = png()
    assert header(data + b"xyz") == Header(data + b"xyz", cheap=True, damage="3 bytes after the image")
    lead = "4 bytes before the image"
    assert header(b"text" + data) == Header(data, cheap=True, damage=lead)
    assert header(b"text" + data + b"xyz") == Header(data + b"xyz", cheap=True, damage=lead)
    assert header(b"text" + data[:-1]) == Header(data[:-1], damage=lead, cut=True)


# Other formats


def gif(*extensions: bytes, screen: tuple[int, int] = (8, 8), flags: int = 0, first: bytes | None = None) -> bytes:
    table = bytes([0x21]) * (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    image = struct.pack("<B4HB", 0x2C, 0, 0, 8, 8, 0) if first is None else first
    return b"GIF89a" + struct.pack("<HHBBB", *screen, flags, 0, 0) + table + b"".join(extensions) + image + b";"


@pytest.mark.parametrize("flags", [0, 7, *range(0x80, 0x88), 0xF2])
def test_first_frame_of_a_gif_may_exceed_the_screen(flags: int) -> None:
    first = struct.pack("<B4HB", 0x2C, 5, 7, 30, 20, 0)
    extension = b"\x21\xf9\x04....\0\x21\xfe\x02..\x03...\0"
    for data in (gif(flags=flags, first=first), gif(extension, flags=flags, first=first)):
        assert header(data, max_pixels=35 * 27).excess is None
        assert header(data, max_pixels=35 * 27 - 1) == Header(data, "35x27 = 945 pixels, the limit is 944")


def test_screen_of_a_gif_counts_if_it_is_larger_or_no_frame_follows() -> None:
    for first in (None, b""):
        data = gif(screen=(300, 200), first=first)
        assert header(data, max_pixels=60_000).excess is None
        assert header(data, max_pixels=59_999).excess == "300x200 = 60000 pixels, the limit is 59999"


def test_gif_has_at_most_10000_blocks_before_its_first_frame() -> None:
    excess = "more than 10000 blocks before its first frame"
    assert header(gif(b"\x21\xfe" + b"\x01." * 9_999 + b"\0")).excess is None
    assert header(gif(b"\x21\xfe" + b"\x01." * 10_000 + b"\0")).excess == excess
    assert header(gif(b"\x21\xfe\0" * 10_000)).excess is None
    assert header(gif(b"\x21\xfe\0" * 10_001)).excess == excess


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


WEBP_SIZES = {  # of 301x201 pixels
    "extended": (b"VP8X", b"...." + (300).to_bytes(3, "little") + (200).to_bytes(3, "little")),
    "lossless": (b"VP8L", b"\x2f" + struct.pack("<I", 300 | 200 << 14 | 0xF << 28)),
    "lossy": (b"VP8 ", b"...\x9d\x01\x2a" + struct.pack("<HH", 301 | 0xC000, 201 | 0x4000)),
}


@pytest.mark.parametrize("kind", WEBP_SIZES)
@pytest.mark.parametrize("before", [(), ((b"ICCP", b"12"),), ((b"ICCP", b"123"), (b"XMP ", b""))])
def test_pixels_of_every_webp_chunk_are_limited(kind: str, before: tuple[tuple[bytes, bytes], ...]) -> None:
    data = webp(*before, WEBP_SIZES[kind])
    assert header(data, max_pixels=60_501) == Header(data)
    assert header(data, max_pixels=60_500) == Header(data, "301x201 = 60501 pixels, the limit is 60500")
    wide = webp(*before, (b"VP8X", b"...." + (69_999).to_bytes(3, "little") + (69_999).to_bytes(3, "little")))
    assert header(wide).excess == "70000x70000 = 4900000000 pixels, the limit is 64000000"


def test_sides_of_a_lossless_webp_have_14_bits() -> None:
    data = webp((b"VP8L", b"\x2f" + struct.pack("<I", 0x3FFF | 0x3FFF << 14 | 0xF << 28)))
    assert header(data).excess == "16384x16384 = 268435456 pixels, the limit is 64000000"


def test_webp_has_at_most_10000_chunks() -> None:
    assert header(webp(*[(b"XMP ", b"")] * 10_000)).excess is None
    assert header(webp(*[(b"XMP ", b"")] * 10_001)).excess == "more than 10000 chunks"


def bmp(width: int, height: int, compression: int = 0, length: int = 34) -> bytes:
    head = b"BM" + bytes(4) + bytes(4) + struct.pack("<IIiiHHI", 54, 40, width, height, 1, 24, compression)
    return head.ljust(length, b".")


def test_pixels_of_a_bmp_are_limited() -> None:
    old = b"BM" + bytes(4) + bytes(4) + struct.pack("<IIHH", 26, 12, 300, 200) + bytes(12)
    for data in (bmp(300, 200), bmp(300, -200), bmp(-300, 200), old):
        assert header(data, max_pixels=60_000) == Header(data)
        assert header(data, max_pixels=59_999) == Header(data, "300x200 = 60000 pixels, the limit is 59999")


@pytest.mark.parametrize(("compression", "limited"), [(0, False), (1, True), (2, True), (3, False)])
def test_bmp_has_at_most_256_pixels_per_run_length_encoded_byte(compression: int, limited: bool) -> None:
    for width, height in ((256, 40), (256, -40), (-256, 40)):
        assert header(bmp(width, height, compression, 40)).excess is None
        found = header(bmp(width, height, compression, 39)).excess
        assert found == ("10240 pixels of run lengths in 39 bytes" if limited else None)
    assert (header(bmp(10_241, 1, compression, 40)).excess is not None) == limited
