"""Requests made up from an OpenAPI description."""

import random
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

ODD = [
    *("", " ", "NaN", "-Infinity", "1e400", "-1", "0", "1", "0.5", "1_0", "0x10", "١٢", "1e3"),
    *("9" * 30, "9" * 5000, "-" + "9" * 400, "2147483648", "9223372036854775807"),
    *("18446744073709551615", "18446744073709551616", "1e-400", "true", "null", "None", "[]"),
    *("../../../../etc/passwd", "/etc/passwd", "..", ".", "%2e%2e%2f", "C:\\x", "file:///etc"),
    *("\0", "a\nb", "\r\nx: y", "\x1b[31m", "\u202e", "é", "日本", "🙂", "\ufffd", "a" * 12_000),
    *("(", "(a+)+$", "[", "a{9999}", "(?P<x>", "\\", "(?i)x", "a|b|", ".*", "\\p{Greek}"),
    *("{id}", "{name}", "'; drop table x; --", "<script>", "${7*7}", ":", ":1", "a:b:c", "::"),
    *("h.0.attn.q_proj", "h.0.attn.q_proj:", "h.0.attn.q_proj:-1", "h.0.attn.q_proj:٣"),
    *("wte:1", "output:3", "h.0.attn.q_proj:" + "9" * 40, ",", "a,b,c", ",,,"),
]


class Fuzzer:
    """Requests with valid values, bounds, and odd ones, in a random order that a seed decides.

    Args:
        description: the OpenAPI description.
        known: values that exist, by the name of a parameter.
        seed: the seed.
    """

    def __init__(self, description: Mapping[str, Any], known: Mapping[str, list[str]], seed: int):
        self._paths = description["paths"]
        self._known = known
        self._random = random.Random(seed)

    def request(self) -> tuple[str, str]:
        """Return a path, and the query after it."""
        draw = self._random
        path = draw.choice(list(self._paths))
        pairs = []
        for parameter in self._paths[path]["get"]["parameters"]:
            if parameter["in"] == "path":
                value = self._value(parameter)
                path = path.replace("{" + parameter["name"] + "}", value)
            elif parameter["required"] or draw.random() < 0.4:
                repeats = 1 if draw.random() < 0.95 else 2
                pairs += [(parameter["name"], self._value(parameter)) for _ in range(repeats)]
        if draw.random() < 0.03:
            pairs.append((draw.choice(ODD), draw.choice(ODD)))
        if draw.random() < 0.02:
            path += draw.choice(ODD)
        query = urlencode(pairs)
        if draw.random() < 0.02:
            query += draw.choice(["&", "&&=", "&=x", "%", "%ff%fe", "&a=%zz", ";", "#"])
        return path, query

    def _value(self, parameter: Mapping[str, Any]) -> str:
        schema = parameter["schema"]
        draw = self._random
        if draw.random() < 0.15:
            return draw.choice(ODD)
        if known := self._known.get(parameter["name"]):
            return draw.choice(known)
        if "enum" in schema:
            return draw.choice(schema["enum"])
        if schema["type"] == "string":
            return draw.choice(["1", "1 2", "probe", *ODD])
        least, most = schema["minimum"], schema["maximum"]
        edges = [least, most, least - 1, most + 1, schema["default"]]
        if schema["type"] == "number":
            return repr(draw.choice([*edges, draw.uniform(least, most)]))
        return str(draw.choice([*edges, *[draw.randint(0, 30)] * 8]))
