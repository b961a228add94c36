"""Names of tensors, taken apart into their numbers and what is the same for all layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

# No leading zeros: `layers.0` and `layers.00` are two names.
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")


def template(name: str) -> str:
    """The name with `{}` in place of each number: `model.layers.{}.mlp.up_proj.weight`."""
    return _NUMBER.sub("{}", name)


def numbers(name: str) -> tuple[int, ...]:
    """The numbers of a name, which `template` leaves out."""
    return tuple(map(int, _NUMBER.findall(name)))


def by_template(names: Iterable[str]) -> dict[str, list[str]]:
    """The names under their templates, in the order given; those with braces are no model's."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        if "{" not in name and "}" not in name:
            found[template(name)].append(name)
    return dict(found)
