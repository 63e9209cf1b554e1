"""The page at /docs: paths, fields and answers of the OpenAPI schema as plain HTML, without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

Schema = Mapping[str, Any]

_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 900px; margin: 0 auto; padding: 20px 24px 60px; }
h2 { font-size: 16px; margin: 34px 0 4px; } h2 b { color: #0d8a7f; margin-right: 8px; }
code, h2 { font-family: ui-monospace, "DejaVu Sans Mono", monospace; } code { font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; } p { margin: 4px 0 8px; }
td { border-top: 1px solid #8885; padding: 3px 14px 3px 0; vertical-align: top; }
td:first-child { white-space: nowrap; }
"""


def interface_html(openapi: Schema) -> str:
    """Return the page of an OpenAPI schema."""
    known = openapi.get("components", {}).get("schemas", {})
    parts = [
        _operation(path, method, operation, known)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    title = f"{escape(openapi['info']['title'])} {escape(openapi['info']['version'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1><p>{escape(openapi['info'].get('summary', ''))}. The same as a schema: "
        f'<a href="/openapi.json">/openapi.json</a>.</p>{"".join(parts)}</body></html>'
    )


def _operation(path: str, method: str, operation: Schema, known: Schema) -> str:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    rows = "".join(_rows(_resolved(content.get("schema", {}), known), known))
    statuses = ", ".join(f"{status} {escape(a.get('description', ''))}" for status, a in operation["responses"].items())
    return (
        f"<h2><b>{method.upper()}</b>{escape(path)}</h2><p>{escape(operation.get('description', ''))}</p>"
        + (f"<table>{rows}</table>" if rows else "")
        + f"<p><small>{statuses}</small></p>"
    )


def _rows(schema: Schema, known: Schema) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        needed = "required" if name in schema.get("required", ()) else ""
        yield f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(field, known))}</td><td>{needed}</td></tr>"


def _type(field: Schema, known: Schema) -> str:
    """Return a field's type in words."""
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(_type(one, known) for one in field[several] if one.get("type") != "null"))
    if "enum" in field or "const" in field:
        return " | ".join(str(value) for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return ", ".join(_resolved(field, known).get("properties", {})) or "object"
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), known)}"
    return str(field.get("type", "anything"))


def _resolved(schema: Schema, known: Schema) -> Schema:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Schema = known.get(name, schema)
    return found
