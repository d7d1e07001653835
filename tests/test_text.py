"""Streaming text: whole, in order, and without a trace of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.text import TextWriter


class Letters:
    """A detokenizer whose tokens are indices into a list of texts."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token):
        return self.pieces[token]

    def finish(self):
        return ""


def write(pieces, stop):
    writer = TextWriter(Letters(pieces), stop)
    out = []
    for i in range(len(pieces)):
        out.append(writer.push(i))
        if writer.stopped:
            break
    out.append(writer.finish())
    return out, writer


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_pieces_join_to_the_text_before_the_first_stop(pieces, stop):
    out, writer = write(pieces, stop)
    whole = "".join(pieces)
    ends = [at for at in (whole.find(s) for s in stop) if at >= 0]
    if not ends:
        assert "".join(out) == whole == writer.text
        assert not writer.stopped
    else:
        assert writer.stopped
        assert "".join(out) == writer.text
        # The stop string that is complete first ends the text.
        first = min(whole.find(s) + len(s) for s in stop if s in whole)
        assert any(writer.text + s == whole[: len(writer.text) + len(s)] for s in stop)
        assert len(writer.text) <= first
    joined = ""
    for piece in out:  # nothing handed out is ever part of a stop string
        joined += piece
        assert not any(s in joined for s in stop)


def test_the_beginning_of_a_stop_string_is_held_back_and_given_at_the_end():
    writer = TextWriter(Letters(["a<", "|en", "x", "<|e"]), ["<|end|>"])
    assert [writer.push(i) for i in range(4)] == ["a", "", "<|enx", ""]
    assert writer.finish() == "<|e"
    assert writer.text == "a<|enx<|e"


def test_a_silent_token_has_no_text():
    writer = TextWriter(Letters(["a", "<eos>"]), [])
    assert writer.push(0) + writer.push(1, silent=True) + writer.finish() == "a"
    assert writer.token_ids == [0, 1]


@pytest.mark.parametrize("stop", ["ab", "b"])
def test_what_follows_a_stop_string_is_dropped(stop):
    out, writer = write(["xabyyy"], [stop])
    assert "".join(out) == "xabyyy"[: "xabyyy".find(stop)]
    assert writer.stopped
