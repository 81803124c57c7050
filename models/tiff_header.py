"""Bounds on the cost of decoding a TIFF, from its first directory (TIFF 6.0; BigTIFF as in libtiff).

A directory with a few entries can describe thousands of tiles, each larger than the image, that share the same bytes of
the file.
"""

import struct

MAX_ENTRIES = 1_000  # of the directory; cameras write about 60
MAX_PARTS = 65_536  # tiles or strips; an image of 64 megapixels in tiles of 256 pixels a side has 1,000
PIXELS_OF_A_SMALL_FILE = 1_048_576  # tiles of smaller images may have more pixels than `MAX_PADDING` allows
MAX_PADDING = 4  # pixels in tiles per pixel of the image
MAX_BITS_PER_PIXEL = 128

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_WIDTH, _HEIGHT, _BITS, _STRIPS, _SAMPLES, _ROWS_PER_STRIP, _PLANAR = 256, 257, 258, 273, 277, 278, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES = 322, 323, 324


def tiff_excess(data: bytes, max_pixels: int) -> str | None:
    """A message if the first image of a TIFF exceeds a limit, else None.

    Raises:
        struct.error: the directory is not within the file.
    """
    entries = _directory(data)
    if isinstance(entries, str):
        return entries
    first = {tag: values[0] for tag, (_, values) in entries.items() if values}
    width, height = first.get(_WIDTH, 0), first.get(_HEIGHT, 0)
    pixels = width * height
    if pixels > max_pixels:
        return f"{width}x{height} = {pixels} pixels, the limit is {max_pixels}"
    samples = first.get(_SAMPLES, 1)
    if first.get(_BITS, 1) * samples > MAX_BITS_PER_PIXEL:
        return f"{samples} samples of {first.get(_BITS, 1)} bits a pixel, the limit is {MAX_BITS_PER_PIXEL} bits"
    planes = samples if first.get(_PLANAR, 1) == 2 else 1  # noqa: PLR2004
    if _TILES in entries or _TILE_WIDTH in first:
        return _tiles_excess(entries, first, pixels, planes)
    declared = entries.get(_STRIPS, (0, ()))[0]
    needed = -(-height // max(1, min(height, first.get(_ROWS_PER_STRIP, height)))) * planes
    if max(declared, needed) > MAX_PARTS:
        return f"{max(declared, needed)} strips, the limit is {MAX_PARTS}"
    return None


def _tiles_excess(
    entries: dict[int, tuple[int, tuple[int, ...]]], first: dict[int, int], pixels: int, planes: int
) -> str | None:
    width, height = first.get(_TILE_WIDTH, 0), first.get(_TILE_HEIGHT, 0)
    across = -(-first.get(_WIDTH, 0) // max(1, width))
    down = -(-first.get(_HEIGHT, 0) // max(1, height))
    tiles = max(entries.get(_TILES, (0, ()))[0], across * down * planes)
    if tiles > MAX_PARTS:
        return f"{tiles} tiles, the limit is {MAX_PARTS}"
    if tiles * width * height > max(PIXELS_OF_A_SMALL_FILE, MAX_PADDING * pixels * planes):
        return f"{tiles} tiles of {width}x{height} pixels for an image of {first.get(_WIDTH)}x{first.get(_HEIGHT)}"
    return None


def _directory(data: bytes) -> dict[int, tuple[int, tuple[int, ...]]] | str:
    """The entries of the first directory, tag → (number of values, the first one if it is an integer).

    A message if there are too many.
    """
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    if big:
        (at,) = struct.unpack_from(f"{order}Q", data, 8)
        (count,) = struct.unpack_from(f"{order}Q", data, at)
        at, step, layout, inline = at + 8, 20, f"{order}HHQ", 8
    else:
        (at,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, at)
        at, step, layout, inline = at + 2, 12, f"{order}HHI", 4
    if count > MAX_ENTRIES:
        return f"a directory of {count} entries, the limit is {MAX_ENTRIES}"
    entries: dict[int, tuple[int, tuple[int, ...]]] = {}
    named = 0  # bytes that entries refer to, which a reader copies
    for position in range(at, at + count * step, step):
        tag, kind, n = struct.unpack_from(layout, data, position)
        size = _SIZES.get(kind, 0) * n
        place = position + step - inline
        if size > inline:
            named += size
            (place,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, place)
        values: tuple[int, ...] = ()
        if kind in _NUMBERS and n and place + _SIZES[kind] <= len(data):
            values = struct.unpack_from(order + _NUMBERS[kind], data, place)
        entries[tag] = (n, values)
    if named > 2 * len(data) + PIXELS_OF_A_SMALL_FILE:
        return f"a directory whose entries name {named} bytes, of a file of {len(data)}"
    return entries
