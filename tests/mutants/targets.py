"""The mutated modules and the tests that must detect their mutants."""

from dataclasses import dataclass

# Tests that use these fixtures start Kafka or Spark, which takes longer than all other tests together.
SERVICES = frozenset({"jars_dir", "broker", "spark"})
# Tests that call these start processes, which import the unchanged module and cannot detect a mutant.
PROCESSES = frozenset({"imagestream", "multiprocessing", "subprocess"})


@dataclass(frozen=True)
class Target:
    """A module, the test files that must detect its faults, and the functions that they cannot reach.

    Attributes:
        tests: files, fastest first.
        excluded: qualified names of functions that are not mutated, because they need Kafka or Spark.
    """

    path: str
    tests: tuple[str, ...]
    excluded: frozenset[str] = frozenset()

    @property
    def module(self) -> str:
        """Its import name."""
        return self.path.removesuffix(".py").replace("/", ".")


TARGETS = (
    Target(
        "streaming/pipeline/offsets.py",
        ("tests/streaming/pipeline/test_offsets.py",),
        excluded=frozenset({"TopicOffsets.__init__", "TopicOffsets.read", "TopicOffsets._read", "TopicOffsets.close"}),
    ),
    Target("streaming/pipeline/reconcile.py", ("tests/streaming/pipeline/test_reconcile.py",)),
    Target("streaming/pipeline/positions.py", ("tests/streaming/pipeline/test_positions.py",)),
    Target("streaming/pipeline/decisions.py", ("tests/streaming/pipeline/test_decisions.py",)),
    Target(
        "streaming/pipeline/finish.py",
        ("tests/streaming/pipeline/test_finish.py", "tests/streaming/pipeline/test_commit.py"),
    ),
    Target("streaming/pipeline/migrate.py", ("tests/streaming/pipeline/test_migrate.py",)),
    Target(
        "streaming/pipeline/ingest.py",
        ("tests/streaming/pipeline/test_ingest.py",),
        excluded=frozenset({"read_topics"}),
    ),
    Target(
        "streaming/jobs/audit.py", ("tests/streaming/jobs/test_audit_rules.py", "tests/streaming/jobs/test_audit.py")
    ),
    Target("streaming/jobs/rewrite.py", ("tests/streaming/jobs/test_rewrite.py",)),
    Target("streaming/storage/store_base.py", ("tests/streaming/storage/test_store.py",)),
    Target(
        "streaming/storage/local_store.py",
        ("tests/streaming/storage/test_local_store.py", "tests/streaming/storage/test_store.py"),
    ),
    Target(
        "streaming/storage/bucket_store.py",
        ("tests/streaming/storage/test_bucket_store.py", "tests/streaming/storage/test_store.py"),
    ),
    Target(
        "streaming/storage/table_log.py",
        ("tests/streaming/storage/test_table_log.py", "tests/streaming/jobs/test_rewrite.py"),
    ),
    Target(
        "streaming/storage/tables.py",
        (
            "tests/streaming/storage/test_tables.py",
            "tests/streaming/jobs/test_rewrite.py",
            "tests/streaming/pipeline/test_finish.py",
            "tests/streaming/storage/test_bad_bucket.py",
        ),
    ),
    Target(
        "streaming/pipeline/commit.py",
        ("tests/streaming/pipeline/test_commit.py",),
        excluded=frozenset({"BatchCommitter._score"}),
    ),
    Target("models/bundle.py", ("tests/models/test_manifest.py", "tests/models/test_bundle.py")),
    Target(
        "streaming/registry.py",
        ("tests/streaming/test_registry.py", "tests/streaming/storage/test_old_registry.py"),
    ),
    Target("streaming/storage/registry_objects.py", ("tests/streaming/test_registry.py",)),
    Target("streaming/storage/alias_log.py", ("tests/streaming/test_registry.py",)),
    Target("streaming/storage/old_registry.py", ("tests/streaming/storage/test_old_registry.py",)),
    Target("models/decode.py", ("tests/models/test_decode_limits.py", "tests/models/test_decode.py")),
    Target("models/pixels.py", ("tests/models/test_decode_limits.py", "tests/models/test_decode.py")),
    Target(
        "models/image_header.py",
        ("tests/models/test_image_header.py", "tests/models/test_damaged.py", "tests/models/test_decode.py"),
    ),
    Target("producer/read.py", ("tests/producer/test_read.py",)),
    Target("producer/message.py", ("tests/producer/test_message.py", "tests/producer/test_read.py")),
    Target(
        "streaming/training/gate.py",
        ("tests/streaming/training/test_gate.py",),
        excluded=frozenset({"pair", "_paired_mean", "_paired_f1", "_right", "_difference", "_bin"}),
    ),
    Target("models/paired.py", ("tests/models/test_paired.py",)),
)
