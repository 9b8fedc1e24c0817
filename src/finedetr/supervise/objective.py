"""The objective: terms × groups × stages, one weighted value each; reductions and counts in the open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from finedetr.errors import ConfigError, DivergedError, did_you_mean
from finedetr.records import Edges, Guidance, Match, Output, Prediction, QueryGroup, Supervision, Targets
from finedetr.supervise.matching import Fixed, MatchingPolicy, UnionOfStages
from finedetr.supervise.terms import Term

__all__ = ["Losses", "Objective", "average_counts", "describe"]


@dataclass(frozen=True)
class Losses(Mapping[str, Tensor]):
    """The weighted losses of one step by name, "group/stage/Term", all in one vector on the device."""

    names: tuple[str, ...]
    vector: Float[Tensor, " N"]
    output: Output | None = field(default=None, repr=False)  # what was judged, to find the pictures of a bad step

    def __getitem__(self, name: str) -> Float[Tensor, ""]:
        try:
            return self.vector[self.names.index(name)]
        except ValueError:
            raise KeyError(f"no loss {name!r}. {did_you_mean(name, self.names)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def total(self) -> Float[Tensor, ""]:
        """The plain sum: what is minimized."""
        return self.vector.sum()

    def by_name(self, pictures: tuple[str, ...] = ()) -> dict[str, float]:
        """All values as numbers, in one copy to the host.

        Args:
            pictures: Names of the batch's pictures, for the message.

        Raises:
            DivergedError: A value is not finite; names the losses, and the pictures whose answers are not finite.
        """
        numbers = dict(zip(self.names, self.vector.detach().cpu().tolist(), strict=True))
        bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if bad:
            raise DivergedError(
                f"{_few([f'{name} is {value}' for name, value in bad.items()])} ({len(bad)} of {len(numbers)} losses)"
                f"{self._suspects(pictures)}",
                hint="A lower learning rate, bf16 instead of fp16, or a look at the named pictures helps most often.",
                losses=bad,
            )
        return numbers

    def _suspects(self, names: tuple[str, ...]) -> str:
        if self.output is None:
            return ""
        found: dict[str, str] = {}
        answers = {"matching": self.output.matching, **{group.name: said for group, said in self.output.groups}}
        for group, said in answers.items():
            finite = said.logits.isfinite().all(-1).all(-1) & said.boxes.isfinite().all(-1).all(-1)
            if said.edges is not None:
                finite = finite & said.edges.logits.isfinite().flatten(2).all(-1).all(0)
            for stage, image in (~finite).nonzero().tolist():
                picture = names[image] if image < len(names) else f"picture {image} of the batch"
                found.setdefault(picture, f"{group}/{said.stages[stage]}")
        if not found:
            return "; the answers to all pictures are finite"
        return "; answers are not finite for " + _few([f"{name} (first in {at})" for name, at in found.items()])


@dataclass(frozen=True)
class Objective:
    """What a training minimizes: the sum of all terms over all groups of queries and all stages.

    Example:
        >>> from finedetr.supervise.terms import BoxGIoU, BoxL1, MatchabilityAware
        >>> objective = Objective((MatchabilityAware(), BoxL1(), BoxGIoU()))
        >>> objective.with_weights({"BoxL1": 2.0}).formula()
        '1·MatchabilityAware + 2·BoxL1 + 2·BoxGIoU, matched by UnionOfStages'

    Attributes:
        terms: The summands, of different types.
        policy: Matches the detector's own queries, and groups that bring no assignment.
    """

    terms: tuple[Term, ...]
    policy: MatchingPolicy = field(default_factory=UnionOfStages)

    def __post_init__(self) -> None:
        names = self.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"The objective has the term {twice[0]} more than once; its losses would share a name")
        if not names:
            raise ConfigError("The objective has no term")

    @property
    def names(self) -> tuple[str, ...]:
        """The terms' names."""
        return tuple(type(term).__name__ for term in self.terms)

    def __call__(self, output: Output, targets: Targets, guidance: Guidance | None = None) -> Losses:
        """Judges an output.

        Args:
            output: Of the detector, at all stages.
            targets: The truth of the same batch.
            guidance: What teachers say about it.
        """
        names: list[str] = []
        values: list[Tensor] = []
        with torch.autocast(output.matching.logits.device.type, enabled=False):
            for group, weight, supervision in self.supervise(output, targets, guidance):
                for name, term in zip(self.names, self.terms, strict=True):
                    seen = supervision.judged if term.needs_truth else supervision
                    stages = term.covers(seen)
                    if stages:
                        values.append(term(seen) * (term.weight * weight))
                        names += [f"{group}/{supervision.answers.stages[stage]}/{name}" for stage in stages]
        return Losses(tuple(names), torch.cat(values), output)

    def supervise(
        self, output: Output, targets: Targets, guidance: Guidance | None = None
    ) -> list[tuple[str, float, Supervision]]:
        """Name, weight and supervision of each group of queries; the matching group comes first."""
        answers = [_as_float(output.matching), *(_as_float(answer) for _, answer in output.groups)]
        groups = [group for group, _ in output.groups]
        policies = [self.policy.informed(output, guidance), *(self._policy_of(group) for group in groups)]
        truths = [targets, *(_targets_of(group, targets) for group in groups)]
        judged = zip(policies, answers, truths, strict=True)
        matches = average_counts([policy(answer, truth) for policy, answer, truth in judged])
        matching = Supervision(answers[0], matches[0], targets, output=output, guidance=guidance)
        return [
            ("matching", 1.0, matching),
            *(
                (
                    group.name,
                    group.weight,
                    Supervision(answer, match, truth, group.taught, matching, by_targets=group.by_targets),
                )
                for group, answer, match, truth in zip(groups, answers[1:], matches[1:], truths[1:], strict=True)
            ),
        ]

    def _policy_of(self, group: QueryGroup) -> MatchingPolicy:
        return self.policy if group.assignment is None else Fixed(group.assignment)

    def swap(self, old: type[Term] | str, new: Term) -> Objective:
        """The same objective with another term in the place of one."""
        name = self._known(old)
        return replace(self, terms=tuple(new if n == name else t for n, t in zip(self.names, self.terms, strict=True)))

    def without(self, *terms: type[Term] | str) -> Objective:
        """The same objective without some terms."""
        gone = {self._known(term) for term in terms}
        return replace(self, terms=tuple(t for n, t in zip(self.names, self.terms, strict=True) if n not in gone))

    def plus(self, *terms: Term) -> Objective:
        """The same objective with more terms."""
        return replace(self, terms=self.terms + terms)

    def with_weights(self, weights: Mapping[str, float]) -> Objective:
        """The same objective with other weights, by the terms' names."""
        new = {self._known(name): weight for name, weight in weights.items()}
        return replace(
            self,
            terms=tuple(replace(t, weight=new.get(n, t.weight)) for n, t in zip(self.names, self.terms, strict=True)),
        )

    def _known(self, term: type[Term] | str) -> str:
        name = term if isinstance(term, str) else term.__name__
        if name not in self.names:
            raise ConfigError(f"The objective has no term {name!r}", code="term", hint=did_you_mean(name, self.names))
        return name

    def formula(self) -> str:
        """The objective in one line, without what has no weight; numbers other than the published ones are shown."""
        terms = [term for term in self.terms if term.weight]
        summands = " + ".join(f"{term.weight:g}·{describe(term, without='weight')}" for term in terms)
        return f"{summands}, matched by {describe(self.policy)}"


def average_counts(matches: list[Match]) -> list[Match]:
    """Replaces each count by its mean over all processes, at least 1: one reduction for all groups and stages.

    Every process must bring the same groups and stages, also where it has no target.
    """
    pairs = [side for match in matches for side in (match.labels, match.boxes)]
    counts = torch.cat([side.count for side in pairs])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(counts)
        counts = counts / distributed.get_world_size()
    parts = counts.clamp(min=1).split([side.stages for side in pairs])
    result = []
    for match, labels, boxes in zip(matches, parts[::2], parts[1::2], strict=True):
        own = replace(match.labels, count=labels)
        # one assignment stays one: what is computed for its pairs is then shared
        shared = own if match.boxes is match.labels else replace(match.boxes, count=boxes)
        second = match.second and replace(match.second, count=labels)
        result.append(replace(match, labels=own, boxes=shared, second=second))
    return result


def _targets_of(group: QueryGroup, targets: Targets) -> Targets:
    """What a group is held to."""
    return replace(targets, labels=torch.zeros_like(targets.labels)) if group.agnostic else targets


def _as_float(answers: Prediction) -> Prediction:
    """The same in fp32, once for all terms."""
    edges = answers.edges
    if edges is not None:
        edges = Edges(edges.logits.float(), edges.anchors.float(), edges.bins.float(), edges.scale)
    return Prediction(answers.logits.float(), answers.boxes.float(), answers.stages, edges)


def describe(thing: object, without: str = "") -> str:
    """Its class, and those of its fields that differ from their defaults."""
    changed = []
    for f in fields(thing):  # type: ignore[arg-type]
        value = getattr(thing, f.name)
        standard = f.default_factory() if callable(f.default_factory) else f.default
        if f.name != without and value != standard:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            if hasattr(value, "__dataclass_fields__"):
                shown = describe(value)
            changed.append(f"{f.name}={shown}")
    return type(thing).__name__ + (f"({', '.join(changed)})" if changed else "")


def _few(words: list[str], most: int = 5) -> str:
    """A list for a message, cut where it would flood the screen."""
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")
