"""The generation loop: a prompt through a decoder, then one step a token, on a GPU as replays of one CUDA graph.

options.py   what a request can ask for, checked, as tensors
rules.py     what becomes of the logits before a token is drawn, and when a row has ended: torch ops that a graph can hold
session.py   tensors at fixed addresses for one batch size and length, and the graphs captured over them
beams.py     a session that searches with beams
loop.py      the loop: an iterator of tokens, and everything it made
lookup.py    a session and a loop that check several tokens a step; draft.py those of a smaller model
stream.py    a loop that is read while it runs; text.py its text
"""
from __future__ import annotations

from ftops.generation.beams import BeamDecoder, BeamOptions, Beams, BeamSession
from ftops.generation.draft import DraftDecoder, DraftSession
from ftops.generation.lookup import LookupDecoder, LookupLoop, LookupSession
from ftops.generation.loop import Decoder, Generated, Loop
from ftops.generation.options import Options
from ftops.generation.session import Session
from ftops.generation.stream import Stream

__all__ = ["BeamDecoder", "BeamOptions", "BeamSession", "Beams", "Decoder", "DraftDecoder", "DraftSession", "Generated", "LookupDecoder",
           "LookupLoop", "LookupSession", "Loop", "Options", "Session", "Stream"]
