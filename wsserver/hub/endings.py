"""The end of a reply: its terminal, and an estimate of its usage if the model reported none."""

import secrets
from typing import Any

from wsserver.content import Usage
from wsserver.errors import UNBILLED, Code, ModelError
from wsserver.generation import End, Log
from wsserver.hub.live import Generation, Outcome
from wsserver.logs import log as events
from wsserver.protocol import Done, Error, Terminal
from wsserver.stores.base import StoredGeneration
from wsserver.text import tokens_in, well_formed


def terminal_of(generation: Generation, how: Outcome) -> Terminal:
    """Make the terminal of a generation."""
    thought = None if generation.thought is None else round(generation.thought, 3)
    facts: dict[str, Any] = {"id": generation.id, "seq": generation.log.seq, "thought": thought}
    if isinstance(how, End):
        usage = how.usage or usage_of(generation)
        return Done(**facts, reason=well_formed(how.reason), usage=usage)
    if isinstance(how, str):
        return Done(**facts, reason="stopped", by=how, usage=usage_of(generation))
    error = how if isinstance(how, ModelError) else ModelError(Code.INTERNAL)
    unanswered = generation.usage is None and not generation.log.seq
    free = unanswered and error.code in UNBILLED
    return Error(
        **facts,
        code=error.code,
        message=well_formed(error.message),
        retryable=error.retryable,
        retry_after=error.retry_after,
        usage=Usage() if free else usage_of(generation),
        ref=_new_ref(),
    )


def usage_of(generation: Generation) -> Usage:
    """Return the usage that the model reported, or else an estimate."""
    if generation.began is None:
        return Usage()
    if (usage := generation.usage) is not None and not usage.estimated:
        return usage
    if usage is None:
        usage = Usage(input_tokens=generation.input_tokens, estimated=True)
    thought = tokens_in(generation.log.pieces.joined("thinking"))
    said = tokens_in(generation.log.text) + max(thought, usage.thinking_tokens)
    return usage.but(output_tokens=max(usage.output_tokens, said))


def restored(stored: StoredGeneration) -> Generation:
    """Make a generation from the store. A reply whose process died ends as ``interrupted``."""
    header = stored.header
    generation = Generation(
        header.id,
        header.owner,
        header.prompt,
        header.model,
        header.conversation,
        log=Log(stored.pieces),
    )
    log = generation.log
    terminal = stored.terminal
    if terminal is None:
        if stored.pieces:  # else the model was perhaps not asked
            generation.began = 0.0
            generation.input_tokens = tokens_in(header.prompt.text)
        code, ref = Code.INTERRUPTED, _new_ref()
        events.info("interrupted", id=header.id, conversation=header.conversation, ref=ref)
        terminal = Error(
            code=code,
            message=code.meaning,
            id=header.id,
            seq=log.seq,
            retryable=code.retryable,
            usage=usage_of(generation),
            ref=ref,
        )
    generation.restore(terminal)
    return generation


def _new_ref() -> str:
    return secrets.token_hex(4)
