"""Answers as messages: a row of `predictions` or `quarantine` as the key, value and headers of one Kafka message.

The headers are those of CloudEvents in binary mode, as for images, with the `traceparent` of the image passed on.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from producer.message import (
    HEADER_CONTENT_TYPE,
    HEADER_ID,
    HEADER_SOURCE,
    HEADER_SPEC_VERSION,
    HEADER_TIME,
    HEADER_TRACEPARENT,
    HEADER_TYPE,
    read_headers,
)
from streaming.pipeline import answer_avro, answer_value
from streaming.pipeline.answer_value import as_text, json_value

AnswerFormat = Literal["json", "avro"]
HEADER_SUBJECT = "ce_subject"  # the image's id
HEADER_SCHEMA = "ce_dataschema"
HEADER_BATCH = "ce_batch"  # the batch's number in its stream
TYPES = {"predictions": "imagestream.prediction", "quarantine": "imagestream.quarantine"}
MADE_AT = {"predictions": "scored_at", "quarantine": "quarantined_at"}
CONTENT_TYPES: dict[AnswerFormat, str] = {"json": "application/json", "avro": "application/avro"}
SCHEMA_IDS: dict[AnswerFormat, str] = {"json": answer_value.SCHEMA_ID, "avro": answer_avro.SCHEMA_ID}


class AnswerMessage(NamedTuple):
    """One message as it is sent to the broker; without a key if the image's had none."""

    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


def answer_message(
    table: str, row: Mapping[str, Any], format_: AnswerFormat = "json", schema_id: int | None = None
) -> AnswerMessage:
    """The message about a row.

    Args:
        table: predictions or quarantine.
        row: the columns of `answer_fields` as Python values; for `quarantine` its headers too.
        schema_id: of the Avro schema in a schema registry; None without one.
    """
    value = answer_value.answer_value(table, row)
    trace = row["traceparent"] if "traceparent" in row else read_headers(row["headers"]).traceparent
    headers = {
        HEADER_SPEC_VERSION: "1.0",
        HEADER_TYPE: TYPES[table],
        HEADER_SOURCE: f"/streams/{row['query_id']}",
        HEADER_ID: f"{row['topic']}/{row['partition']}/{row['offset']}",
        HEADER_SUBJECT: row["image_id"],
        HEADER_TIME: as_text(made_at) if (made_at := row[MADE_AT[table]]) else None,
        HEADER_SCHEMA: SCHEMA_IDS[format_],
        HEADER_BATCH: str(row["batch_id"]),
        HEADER_CONTENT_TYPE: CONTENT_TYPES[format_],
        HEADER_TRACEPARENT: trace,
    }
    encoded = [(name, text.encode()) for name, text in headers.items() if text is not None]
    data = json_value(value) if format_ == "json" else answer_avro.avro_value(value, schema_id)
    return AnswerMessage(value["key"], data, encoded)
