"""A profile that only says how it differs from another of its family: `like: NAME` in its file.

    figures of a profile = those of its base, as guesses, under those that its own file gives

Mappings merge key by key; a number, a list, or an empty mapping replaces what the base says.
"""

import re
from collections.abc import Mapping

from mist.plans.provenance import Kind

# What a profile is called, and which others it names, is never that of its base.
OWN_KEYS = frozenset(
    {"name", "what", "chip", "default_cluster", "devices", "host_memory_by_device"}
)


def base_of(content: bytes) -> str | None:
    """The name of the base of a profile, of which `content` is the file; None where it has none."""
    # Most files have none: to look for the words is quicker than to parse.
    match = re.search(rb"^like: *([\w.-]+) *$", content, re.MULTILINE)
    return match[1].decode() if match else None


def over_base(own: Mapping[str, object], base: Mapping[str, object]) -> dict[str, object]:
    """What a profile says over what its base does, both as their files hold it."""
    shared = {key: value for key, value in base.items() if key not in OWN_KEYS}
    merged = _merged({key: own[key] for key in own if key != "like"}, _guessed(shared, own["like"]))
    assert isinstance(merged, dict)
    return merged


def _merged(own: object, base: object) -> object:
    if not isinstance(own, dict) or not isinstance(base, dict) or not own or "kind" in own:
        return own
    return {**base, **{key: _merged(value, base.get(key)) for key, value in own.items()}}


def _guessed(node: object, name: object) -> object:
    """What a base says, of which nobody knows whether it holds for another part."""
    if isinstance(node, list):
        return [_guessed(item, name) for item in node]
    if not isinstance(node, dict):
        return node
    if "kind" in node and "source" in node:
        return {**node, "source": f"as {name}: {node['source']}", "kind": Kind.GUESS.value}
    return {key: _guessed(item, name) for key, item in node.items()}
