"""The gateway's page /docs: the OpenAPI description as plain HTML, without scripts and external files."""

from html import escape
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
STYLE = """:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 50rem; margin: 2rem auto; padding: 0 1rem } code { font-size: .95em }
h2 { margin-top: 2rem; font-size: 1.1rem } pre { white-space: pre-wrap; font: inherit } td { padding-right: 1rem }"""


def page(openapi: dict[str, Any]) -> str:
    """The page of an OpenAPI description."""
    parts = [
        _operation(method, path, operation)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    ]
    info = openapi["info"]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(info['title'])}</h1><p>{escape(info['description'])} The description for programs is at "
        f"<code>/openapi.json</code>.</p>{''.join(parts)}</body></html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = [
        (f"{one['name']} ({one['in']})", one.get("description", "")) for one in operation.get("parameters", [])
    ]
    bodies = [(name, "the body") for name in operation.get("requestBody", {}).get("content", {})]
    answers = [(code, answer.get("description", "")) for code, answer in operation.get("responses", {}).items()]
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><pre>{escape(operation.get('description', ''))}</pre>"
        f"{_table('takes', parameters + bodies)}{_table('answers', answers)}"
    )


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    cells = "".join(f"<tr><td><code>{escape(name)}</code></td><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table><caption>{title}</caption>{cells}</table>"
