"""The Bloom filter of a model's training images: no false negatives, and false positives at the specified rate."""

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.arrays import Arrays, read_npz, write_npz
from models.bloom_filter import FALSE_POSITIVES, BloomFilter, FittedOn
from models.errors import ModelError
from models.xxhash64 import spark_xxhash64, xxhash64

SALT = 2**63 + 7


def ids(count: int, first: int = 0) -> list[bytes]:
    return [sha256(b"%d" % number).hexdigest().encode() for number in range(first, first + count)]


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [  # test vectors of the specification, and output of xxhsum
        (b"", 0, 0xEF46DB3751D8E999),
        (b"a", 0, 0xD24EC4F1A98C6E5B),
        (b"abc", 0, 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0, 0xFBCEA83C8A378BF1),
    ],
)
def test_xxhash64_matches_the_reference_vectors(data: bytes, seed: int, expected: int) -> None:
    assert xxhash64([data], seed).tolist() == [expected]


def test_batch_hashes_equal_single_hashes() -> None:
    mixed = [bytes(range(length)) for length in (0, 3, 4, 7, 8, 31, 32, 33, 64, 100, 64)]
    alone = [xxhash64([one], 614)[0] for one in mixed]
    assert xxhash64(mixed, 614).tolist() == alone
    assert len(set(alone)) == len(set(mixed))
    assert spark_xxhash64(mixed, 42)[1] != spark_xxhash64(mixed, 43)[1]


@given(st.lists(st.binary(max_size=300), max_size=50), st.integers(0, 2**64 - 1))
def test_added_values_are_always_found(values: list[bytes], salt: int) -> None:
    one = BloomFilter.empty(len(values), salt)
    one.add(values)
    assert one.contains(values).all()


def test_false_positive_rate_at_capacity_is_as_specified() -> None:
    one = BloomFilter.empty(20_000, SALT)
    one.add(ids(20_000))
    wrong = one.contains(ids(200_000, first=10**6)).sum()
    expected = 200_000 * FALSE_POSITIVES
    assert abs(wrong - expected) < 5 * np.sqrt(expected)  # five standard deviations of a binomial count
    assert len(one.bits) * 8 / 20_000 == pytest.approx(14.38, abs=0.01)


def test_filters_with_different_salts_have_independent_false_positives() -> None:
    first, second = (BloomFilter.empty(2_000, salt) for salt in (SALT, SALT + 2))
    for one in (first, second):
        one.add(ids(2_000))
    others = ids(200_000, first=10**6)
    both = first.contains(others) & second.contains(others)
    assert both.sum() <= 5


def test_partition_filters_merge_to_the_filter_of_all_rows() -> None:
    whole, parts = BloomFilter.empty(100, SALT), [BloomFilter.empty(100, SALT) for _ in range(2)]
    whole.add(ids(100))
    parts[0].add(ids(40))
    parts[1].add(ids(60, first=40))
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].bits, whole.bits)
    with pytest.raises(ModelError, match="the same size and salt"):
        parts[0].merge(BloomFilter.empty(100, SALT + 1))


def test_filter_above_the_maximum_size_is_rejected() -> None:
    with pytest.raises(ModelError, match="needs 1,797,198,446 bytes, the limit is 268,435,456"):
        BloomFilter.empty(10**9, 0)


@pytest.mark.parametrize("with_backbone", [True, False])
def test_fitted_on_round_trips_through_npz(with_backbone: bool) -> None:
    own, backbone = BloomFilter.empty(10, SALT), BloomFilter.empty(10, 3)
    own.add(ids(10))
    backbone.add(ids(10, first=10))
    seen = FittedOn(own, backbone if with_backbone else None)
    back = FittedOn.from_arrays(read_npz(write_npz(seen.to_arrays()), "fitted_on.npz"))
    np.testing.assert_array_equal(back.contains(ids(30)), seen.contains(ids(30)))
    assert back.contains(ids(20)).sum() == (20 if with_backbone else 10)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"images": np.zeros(0, np.uint8)}, "'images' should be 1 to"),
        ({"images": np.zeros((2, 2), np.uint8)}, r"got uint8 of shape \(2, 2\)"),
        ({"images": np.zeros(4, np.float32)}, "got float32"),
        ({"images_salt": np.zeros(2, np.uint64)}, "'images_salt' should be 1 to 1 numbers of type uint64"),
        ({"backbone": np.zeros(4, np.uint8)}, "'backbone_salt' is missing"),
    ],
)
def test_invalid_filter_arrays_are_rejected(change: Arrays, why: str) -> None:
    arrays = FittedOn(BloomFilter.empty(10, SALT)).to_arrays() | change
    with pytest.raises(ModelError, match=why):
        FittedOn.from_arrays(arrays)
