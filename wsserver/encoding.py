"""Encoding what the server sends: from a frame, or from pieces of a reply, to UTF-8 JSON."""

from json.encoder import encode_basestring

from wsserver.pieces import TEXT, Kind, Run
from wsserver.protocol import ServerFrame

# What each kind of piece becomes: the beginning of its frame, and the key of the data.
_FRAMES: dict[Kind, tuple[str, str]] = {
    "text": ('{"type":"token",', "text"),
    "thinking": ('{"type":"thinking",', "text"),
    "signature": ('{"type":"thinking","text":"",', "signature"),
    "citation": ('{"type":"token","text":"",', "citation"),
    "block": ('{"type":"block",', "partial_json"),
}


def encode(frame: ServerFrame) -> bytes:
    """Encode a frame as UTF-8 JSON, without the keys that have no value."""
    return frame.model_dump_json(exclude_none=True).encode()


def encode_run(generation: str, run: Run) -> bytes:
    """Encode the frame of a run, as :func:`encode` would.

    Written by hand, as this is what the server does most: an id needs no escaping, and the C
    function that escapes the text is a tenth of the cost of building and dumping a model.
    """
    seq, kind, block, data = run
    if kind == TEXT and not block:
        text = encode_basestring(data)
        return f'{{"type":"token","id":"{generation}","seq":{seq},"text":{text}}}'.encode()
    head, key = _FRAMES[kind]
    number = f',"block":{block}' if block else ""
    value = data if kind == "citation" else encode_basestring(data)
    return f'{head}"id":"{generation}","seq":{seq}{number},"{key}":{value}}}'.encode()
