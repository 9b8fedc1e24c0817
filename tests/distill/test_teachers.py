from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finedetr.distill.teachers import Teacher, Teachers, build_adapters, map_classes
from finedetr.distill.terms import FeatureDistillation
from finedetr.errors import ConfigError, DataError
from finedetr.model.detector import Detector
from finedetr.train.ema import MovingAverage
from tests.distill.small import PLAIN, WIDE, batch, detector
from tests.train.tiny import TINY


def test_a_teacher_answers_at_all_stages_in_eval_without_gradient_and_stays_as_it_is() -> None:
    other = Detector(TINY, 5).train()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    taught = Teacher(other)(*batch())
    assert taught.answers.stages == ("encoder", "initial", "layer0", "layer1")
    assert [state.shape for state in taught.trace.states] == [(2, 12, 16)] * 2
    assert taught.trace.embedded is not None
    assert taught.trace.embedded.shape == (2, 20, 16)
    tensors = [taught.answers.logits, taught.answers.boxes, *taught.memory, *taught.trace.features]
    tensors += taught.trace.states
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_the_average_teaches_in_eval_whatever_the_student_does() -> None:
    student = Detector(TINY, 5)
    average = MovingAverage(student, 0.5, 0)
    teacher = Teacher(average.model)
    answers = []
    for mode in (True, False):
        student.train(mode)
        answers.append(teacher(*batch()).answers.logits)
    assert torch.equal(*answers)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1
    average.update()
    assert not torch.equal(answers[0], teacher(*batch()).answers.logits)


def test_classes_are_matched_by_name() -> None:
    other = detector(classes=5)
    found = map_classes(("cat", "dog", "cow"), ("dog", "bird", "cat", "fish", "bee"))
    assert found is not None
    assert (found.missing, found.unused) == (("cow",), ("bird", "fish", "bee"))
    plain, mapped = Teacher(other)(*batch((0, 0))), Teacher(other, found)(*batch((0, 0)))
    assert torch.equal(mapped.answers.logits[..., :2], plain.answers.logits[..., [2, 0]])
    assert bool((mapped.answers.logits[..., 2] == -torch.inf).all())
    assert mapped.known is not None
    assert mapped.known.tolist() == [True, True, False]
    assert map_classes(("a", "b"), ("a", "b")) is None


def test_classes_that_cannot_be_matched_are_an_error() -> None:
    with pytest.raises(DataError, match="no name is the same"):
        map_classes(("cat",), ("dog",))
    with pytest.raises(DataError, match="stands twice"):
        map_classes(("cat", "cat"), ("cat",))


def test_pictures_come_as_the_teacher_was_trained_to_see_them() -> None:
    images, targets = batch()
    own = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    shift, width = (torch.tensor(v).view(1, 3, 1, 1) for v in own)
    bare = Teacher(detector())(images, targets).answers.logits
    undone = Teacher(detector(), given=own)((images - shift) / width, targets).answers.logits
    torch.testing.assert_close(undone, bare, atol=1e-4, rtol=1e-4)
    wanted = Teacher(detector(), wanted=own)(images, targets).answers.logits
    torch.testing.assert_close(wanted, Teacher(detector())((images - shift) / width, targets).answers.logits)
    seen = Teacher(detector(), scale=1.5)(images, targets)
    assert seen.trace.shapes == ((6, 6), (3, 3))


def test_adapters_stand_where_widths_differ_on_common_levels() -> None:
    student, teacher = detector(), detector(WIDE)
    assert not list(build_adapters((FeatureDistillation(weight=0.0),), student, teacher).parameters())
    forced = build_adapters((FeatureDistillation(adapter="conv", tap="backbone"),), student, student)
    assert set(forced.layers) == {"backbone0", "backbone1"}
    with pytest.raises(ConfigError, match="without an adapter"):
        build_adapters((FeatureDistillation(adapter="none"),), student, teacher)
    coarse = replace(PLAIN, backbone=replace(PLAIN.backbone, stages=(0, 1)))
    with pytest.raises(ConfigError, match=r"no level in common: strides \(16, 32\) and \(4.0, 8.0\)"):
        build_adapters((FeatureDistillation(),), student, detector(coarse))
    assert set(build_adapters((FeatureDistillation(adapter="conv"),), student, detector(coarse), 0.25).layers) == {
        "encoder0",
        "encoder1",
    }


def test_the_average_is_silent_without_strength() -> None:
    teachers = Teachers(Teacher(detector()), Teacher(detector(seed=1)))
    silent, loud = teachers(*batch(), strength=0.0), teachers(*batch(), strength=0.3)
    assert silent.average is None
    assert silent.frozen is not None
    assert silent.frozen.strength == 1
    assert loud.average is not None
    assert loud.average.strength == 0.3
    assert loud.size == (64, 64)
    assert teachers.seconds > 0
    said = [teachers.price(0.5) for _ in range(20)]
    assert [bool(line) for line in said].count(True) == 1
    assert "of 0.500 s" in str(said[13])
