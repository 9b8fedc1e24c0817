"""Which stage of a teacher teaches which stage of a student, where their depths differ."""

from __future__ import annotations

from typing import Literal

from finedetr.errors import ConfigError

__all__ = ["Grouping", "layer_stages", "links", "source_stages"]

Grouping = Literal["group", "last_of_group", "last"]


def layer_stages(names: tuple[str, ...]) -> range:
    """The stages that are decoder layers; they stand last."""
    return range(sum(not name.startswith("layer") for name in names), len(names))


def links(student: int, teacher: int, how: Grouping = "group") -> tuple[tuple[int, int], ...]:
    """Pairs (layer of the student, layer of the teacher), in the student's order, counted from 0.

    With r = teacher / student, layer k (from 1) learns from the layers ceil((k-1)r)+1 .. ceil(kr) of a deeper teacher,
    and from ceil(kr) of a shallower one (DETRDistill, fig. 5; spec 4.5).

    Args:
        student: Layers of the student.
        teacher: Layers of the teacher.
        how: `group`: all layers of the group; `last_of_group`: its last; `last`: the teacher's last layer teaches all.
    """
    if student < 1 or teacher < 1:
        raise ConfigError(f"a student and a teacher have layers, got {student} and {teacher}")
    found = []
    for k in range(student):
        end = -(-(k + 1) * teacher // student)
        first = -(-k * teacher // student) if teacher >= student else end - 1
        match how:
            case "group":
                found += [(k, layer) for layer in range(first, end)]
            case "last_of_group":
                found.append((k, end - 1))
            case "last":
                found.append((k, teacher - 1))
    return tuple(found)


def source_stages(student: tuple[str, ...], teacher: tuple[str, ...]) -> tuple[int, ...]:
    """For each stage of the student, by name, the stage of the teacher that stands for it.

    Layers go by the last of their group. What the teacher does not have (a first box, where its boxes are plain) is
    taken from its first layer.
    """
    own, other = layer_stages(student), layer_stages(teacher)
    layers = {own[k]: other[layer] for k, layer in links(len(own), len(other), "last_of_group")}
    return tuple(
        layers[index] if index in layers else teacher.index(name) if name in teacher else other[0]
        for index, name in enumerate(student)
    )
