"""A client of the real routes, and the judge of what they answer."""

import decimal
import re

import httpx
import jsonschema

from cerberus.api import codes, gate, openapi

LOCAL = "http://127.0.0.1:8000"


def client(app, *, peer="127.0.0.1", base_url=LOCAL, headers=None):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(peer, 50_000))
    return httpx.AsyncClient(transport=transport, base_url=base_url, headers=headers)


def _multiple(validator, step, value, schema):
    """Divide the written decimals: as doubles, 0.57 is not a multiple of 0.01."""
    if validator.is_type(value, "number"):
        if decimal.Decimal(repr(value)) % decimal.Decimal(repr(step)):
            yield jsonschema.ValidationError(f"{value!r} is not a multiple of {step}")


Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"multipleOf": _multiple})


def validate(document, schema_name, body):
    schema = {"$ref": f"#/components/schemas/{schema_name}", "components": document["components"]}
    Validator(schema).validate(body)


def is_problem(response, code, field=None):
    """Hold a response against RFC 9457 and the table of codes."""
    known = codes.PROBLEMS[code]
    body = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, body["status"], body["code"]) == (
        known.status,
        known.status,
        code,
    )
    assert (body["type"], body["title"]) == (f"/docs#{code}", known.title)
    assert body.get("field") == field
    assert len(body["detail"]) > 10
    document = openapi.document(("10m",), "USD")
    validate(document, "Problem", body)
    path, method = response.request.url.path, response.request.method.lower()
    for template, methods in document["paths"].items():
        of_api = template.startswith(gate.OF_API[:5])
        if of_api and re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path):
            told = methods.get(method) or next(iter(methods.values()))
            assert f"`{code}`" in told["responses"][str(known.status)]["description"]
    return body
