"""The options of an answer stand in three forms, because two of them are typed signatures."""

from __future__ import annotations

import inspect
from dataclasses import fields

from mimo_edge.answer_options import AnswerKeywords, AnswerOptions
from mimo_edge.session import Session


def test_keywords_are_the_fields_of_the_options() -> None:
    types = {one.name: one.type for one in fields(AnswerOptions)}
    keywords = {name: ref.__forward_arg__ for name, ref in AnswerKeywords.__annotations__.items()}
    assert keywords == types


def test_stream_has_every_option_with_its_default() -> None:
    parameters = inspect.signature(Session.stream).parameters
    for one in fields(AnswerOptions):
        assert parameters[one.name].default == one.default, one.name
