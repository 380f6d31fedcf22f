"""Encodes frames and runs of pieces as UTF-8 JSON."""

from json.encoder import encode_basestring

from wsserver.pieces import TEXT, Kind, Run
from wsserver.protocol import ServerFrame

# For each kind of piece: the beginning of its frame, and the key of its data.
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

    This is the most frequent operation of the server, so it does not build a model. An id needs no
    escaping. Escaping the text in C costs a tenth of building and dumping a model.
    """
    seq, kind, block, data = run
    if kind == TEXT and not block:
        text = encode_basestring(data)
        return f'{{"type":"token","id":"{generation}","seq":{seq},"text":{text}}}'.encode()
    head, key = _FRAMES[kind]
    number = f',"block":{block}' if block else ""
    value = data if kind == "citation" else encode_basestring(data)
    return f'{head}"id":"{generation}","seq":{seq}{number},"{key}":{value}}}'.encode()
