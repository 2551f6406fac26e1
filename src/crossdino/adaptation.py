"""Change what a trained detector is asked for: its classes and its number of queries.

Everything learnt that can be kept is kept, and each function says in words what begins anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from crossdino.config import close_matches
from crossdino.errors import InputError
from crossdino.models.detector import CrossDINO


@torch.no_grad()
def change_classes(
    model: CrossDINO, class_names: Sequence[str], class_map: Mapping[str, str] | None = None
) -> list[str]:
    """Give a detector other classes, in place; make the optimiser after it.

    A class keeps what was learnt (its rows of both class heads and of the label embedding) if the model had one of the
    same name; upper and lower case, spaces, `-` and `_` make no difference. Every other class begins anew, at
    probability 0.01 as in a new model.

    Args:
        model: the detector to change.
        class_names: the new classes in the order of the labels.
        class_map: new name -> old name, for classes that shall begin with what another one has learnt
            (`{"pedestrian": "person"}`).

    Returns:
        What was kept and what begins anew, one line each.

    Raises:
        InputError: if there is no class, or `class_map` names one that there is not.
    """
    if not class_names:
        raise InputError("class_names is empty: a detector needs at least one class")
    old_names = model.config.class_names
    rows = {_plain(name): row for row, name in reversed(list(enumerate(old_names)))}
    wanted = {_plain(name): _plain(name) for name in class_names}
    for new, old in (class_map or {}).items():
        if _plain(new) not in wanted:
            raise InputError(f"class_map: '{new}' is none of the new classes{close_matches(new, class_names)}")
        if _plain(old) not in rows:
            raise InputError(f"class_map: '{old}' is no class of the model{close_matches(old, old_names)}")
        wanted[_plain(new)] = _plain(old)
    sources = [rows.get(wanted[_plain(name)]) for name in class_names]

    anew = nn.Linear(model.config.hidden_dim, len(class_names))
    nn.init.constant_(anew.bias, -math.log((1 - 0.01) / 0.01))
    for head in (model.class_embed, model.enc_class_embed):
        head.weight = _rows(head.weight, sources, anew.weight)
        head.bias = _rows(head.bias, sources, anew.bias)
        head.out_features = len(class_names)
    labels = model.label_enc
    # The last row stands for "no label".
    labels.weight = _rows(
        labels.weight, [*sources, len(old_names)], torch.randn(len(class_names) + 1, model.config.hidden_dim)
    )
    labels.num_embeddings = len(class_names) + 1
    model.config = dataclasses.replace(model.config, class_names=tuple(class_names))
    model.calibration = None  # was that of the old classes

    taken = [(name, old_names[source]) for name, source in zip(class_names, sources, strict=True) if source is not None]
    fresh = [name for name, source in zip(class_names, sources, strict=True) if source is None]
    lines = []
    if taken:
        words = [new if new == old else f"{new} (from {old})" for new, old in taken]
        lines.append(f"classes kept, {len(taken)} of {len(class_names)}: {', '.join(words)}")
    if fresh:
        lines.append(f"classes re-initialised, {len(fresh)} of {len(class_names)}: {', '.join(fresh)}")
    return lines


@torch.no_grad()
def change_num_queries(model: CrossDINO, num_queries: int) -> list[str]:
    """Give a detector more or fewer queries, in place; make the optimiser after it.

    The contents of the queries go with the anchors in the order of the encoder's scores, so content i has learnt to
    be the i-th best. Fewer queries keep the first contents. More queries repeat the last ones, which have learnt to
    be the least certain: the best anchors keep their contents, and the new ones begin as background.

    Args:
        model: the detector to change.
        num_queries: Q, at least 1.

    Returns:
        One line that says what was done, or none where nothing was to do.

    Raises:
        InputError: if `num_queries` is less than 1.
    """
    if num_queries < 1:
        raise InputError(f"num_queries is {num_queries}: it must be at least 1")
    old = model.config.num_queries
    if num_queries == old:
        return []
    rows = list(range(min(old, num_queries)))
    while len(rows) < num_queries:
        missing = num_queries - len(rows)
        rows += range(max(0, old - missing), old)
    contents = model.tgt_embed
    contents.weight = nn.Parameter(contents.weight[rows].clone(), requires_grad=contents.weight.requires_grad)
    contents.num_embeddings = num_queries
    model.config = dataclasses.replace(model.config, num_queries=num_queries)
    model.calibration = None  # was that of the old queries
    if num_queries < old:
        return [f"queries cut from {old} to the first {num_queries}"]
    return [f"queries raised from {old} to {num_queries}: the new ones begin as copies of the last"]


def _plain(name: str) -> str:
    """A class name without what is written one way here and another there."""
    return "".join(letter for letter in name.casefold() if letter not in "-_" and not letter.isspace())


def _rows(old: Tensor, sources: Sequence[int | None], anew: Tensor) -> nn.Parameter:
    """Row i is row `sources[i]` of `old`, or row i of `anew` where that is None."""
    picked = [anew[i].to(old) if source is None else old[source] for i, source in enumerate(sources)]
    return nn.Parameter(torch.stack(picked), requires_grad=old.requires_grad)
